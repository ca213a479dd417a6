"""Chat with a model that repeats the user in capitals."""

from __future__ import annotations

from pathlib import Path

from macft.backends.base import Sampling
from macft.data.templates.chat_template import load_template
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.inference.chat import ChatModel


class Parrot:
    """A model that answers with the last user text, upper-cased, and remembers what it was asked."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.asked: list[str] = []
        self.seeds: list[int] = []
        self.rooms: list[int] = []

    def generate(self, prompt, *, max_new_tokens, stop_ids, sampling):
        text = self.tokenizer.decode(prompt, skip_special=False)
        self.asked.append(text)
        self.seeds.append(sampling.seed)
        self.rooms.append(max_new_tokens)
        said = text.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0].upper()
        for token in [*self.tokenizer.encode(said + "<|im_end|>after").ids][:max_new_tokens]:
            if token in stop_ids:
                return
            yield token


def make_model(folder: Path, *, raw: bool = False, **changes) -> ChatModel:
    tokenizer = load_tokenizer(folder)
    values = {
        "model": Parrot(tokenizer),
        "tokenizer": tokenizer,
        "template": None if raw else load_template(folder, tokenizer.special_map),
        "stop_ids": tokenizer.eos_ids,
        "sampling": Sampling(seed=7),
        "max_new_tokens": 50,
        **changes,
    }
    return ChatModel(**values)
