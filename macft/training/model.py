"""Find the model to train, or the shape of a new one, with its tokenizer and template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from macft.config.settings import Settings
from macft.data.kinds import kind_of_stage
from macft.data.templates.chat_template import ChatTemplate, load_template
from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from macft.errors import ConfigError, ModelError
from macft.models.from_config import is_only_shape, locate_shape, new_model
from macft.models.locate import resolve_model
from macft.weights.folder import ModelFolder
from macft.weights.model_config import read_config

_SPECIAL = ("bos_token", "eos_token", "pad_token")


@dataclass(frozen=True)
class StartingPoint:
    """What training starts from."""

    base: ModelFolder  # without weights if it starts from scratch
    tokenizer: Tokenizer
    tokenizer_folder: Path  # where the chat template is looked for too
    from_scratch: bool


def resolve_start(settings: Settings) -> StartingPoint:
    """Find model and tokenizer; raises ConfigError when they do not fit, or when there are no weights."""
    from_scratch = settings.train_from_scratch
    if not from_scratch:
        _check_weights(settings)
    locate = locate_shape if from_scratch else resolve_model
    base = locate(settings.model_name_or_path, settings.hub)
    named = settings.tokenizer_name_or_path
    folder = base.path if named is None else _tokenizer_folder(named, settings.hub)
    tokenizer = load_tokenizer(folder)
    if from_scratch:
        tokens = {} if named is None else _special_ids(tokenizer)
        base = new_model(base, settings.model_overrides, tokens, tokenizer.vocab_size)
    elif named is not None:
        size = read_config(base.path).get("vocab_size")
        if isinstance(size, int) and size < tokenizer.vocab_size:
            raise ConfigError(
                f"tokenizer_name_or_path: {named} has {tokenizer.vocab_size} tokens, the model {base.name} knows "
                f"{size}; take the model's own tokenizer"
            )
    return StartingPoint(base, tokenizer, folder, from_scratch)


def _check_weights(settings: Settings) -> None:
    """Raise ConfigError for a folder without weights: random ones are only taken where they are asked for."""
    name = settings.model_name_or_path
    if not is_only_shape(name):
        return
    if settings.finetuning_type != "full":
        raise ConfigError(f"{name}: no weights found, and an adapter needs those of a trained model: download them")
    if settings.has_reference:
        raise ConfigError(f"{name}: no weights found, and stage {settings.stage} needs a trained model: download them")
    raise ConfigError(f"{name}: no weights found; download them, or set train_from_scratch: true for random ones")


def _tokenizer_folder(name: str, hub: str) -> Path:
    """A folder is taken as it is, as it may hold only a tokenizer; anything else names a model."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else resolve_model(name, hub).path


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """config.json's entries for the tokens that the tokenizer names."""
    found = {
        name: tokenizer.encode(tokenizer.special_map[name]).ids for name in _SPECIAL if name in tokenizer.special_map
    }
    return {f"{name}_id": ids[0] for name, ids in found.items() if len(ids) == 1}


def resolve_template(settings: Settings, folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template that the settings name, or the folder's; None for `stage: pt` where there is none."""
    try:
        return load_template(
            folder,
            tokenizer.special_map,
            settings.template,
            default_system=settings.default_system,
            enable_thinking=settings.enable_thinking,
            opening=tokenizer.opening,
        )
    except ModelError:
        # a base model has none, and texts need none
        if not kind_of_stage(settings.stage).has_template and settings.template is None:
            return None
        raise
