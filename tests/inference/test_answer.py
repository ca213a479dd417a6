"""Text from a growing token sequence: whole characters, nothing lost, in linear time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as CoreTokenizer

from macft.inference.answer import stream_text


def byte_tokenizer() -> CoreTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = CoreTokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def byte_fallback_tokenizer() -> CoreTokenizer:
    vocab = {f"<0x{i:02X}>": i for i in range(256)}
    vocab.update({"▁a": 256, "b": 257, "▁": 258, "c": 259})
    core = CoreTokenizer(models.BPE(vocab, [], byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


TEXTS = st.text(st.sampled_from("ab c你好🙂é\n𠮷"), max_size=80)


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.sampled_from([byte_tokenizer(), byte_fallback_tokenizer()]))
def test_pieces_join_to_the_decoded_whole_and_hold_whole_characters(text, core):
    ids = core.encode(text).ids
    pieces = list(stream_text(iter(ids), core.decode))
    assert "".join(pieces) == core.decode(ids)
    assert not any("\ufffd" in piece or piece == "" for piece in pieces)


def test_a_character_of_four_tokens_comes_at_once_and_as_soon_as_it_is_whole():
    core = byte_tokenizer()
    ids = core.encode("🙂é!").ids
    assert len(ids) == 7
    arrived = []
    given_out = 0

    def count():
        nonlocal given_out
        for token in ids:
            given_out += 1
            yield token

    for piece in stream_text(count(), core.decode):
        arrived.append((given_out, piece))
    assert arrived == [(4, "🙂"), (6, "é"), (7, "!")]


def test_half_a_character_at_the_end_is_dropped():
    core = byte_tokenizer()
    assert list(stream_text(iter(core.encode("ok 🙂").ids[:-1]), core.decode)) == ["o", "k", " "]


def test_endless_broken_bytes_are_shown_while_they_come_and_text_goes_on_after_them():
    core = byte_tokenizer()
    lone = core.encode("é").ids[1]
    pieces = list(stream_text(iter([lone] * 200 + core.encode("fine").ids), core.decode))
    assert "".join(pieces) == "\ufffd" * 200 + "fine"
    assert max(map(len, pieces)) < 80


def test_a_space_after_a_hidden_special_token_is_kept():
    core = byte_fallback_tokenizer()
    core.add_special_tokens([AddedToken("<x>", special=True, normalized=False)])
    special = core.token_to_id("<x>")
    ids = [257] * 16 + [special, 256]
    assert core.decode(ids) == "b" * 16 + " a"
    assert "".join(stream_text(iter(ids), core.decode)) == "b" * 16 + " a"


def test_the_time_to_stream_grows_with_the_tokens_not_their_square():
    core = byte_tokenizer()
    ids = core.encode("a你" * 1000).ids
    decoded = 0

    def decode(part):
        nonlocal decoded
        decoded += len(part)
        return core.decode(part)

    assert "".join(stream_text(iter(ids), decode)) == "a你" * 1000
    assert decoded < 30 * len(ids)
