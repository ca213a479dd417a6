"""Find out whether the model that an adapter is put on is the one that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from macft.errors import ModelError
from macft.weights.adapters.peft import Adapter
from macft.weights.folder import ModelFolder, token_ids, weights_hash

_HUB_CACHE = "models--"  # the hub cache's folder of org/name is models--org--name


def other_base_note(adapter: Adapter, base: ModelFolder) -> str | None:
    """A sentence for the user when an adapter seems to have been trained on weights other than these.

    Adapters of other tools only name their base. Raises ModelError when the tokenizer in the adapter's folder, or
    else that of the base it names, has other tokens under the same ids.
    """
    name = adapter.config.base
    folder = Path(name).expanduser()
    # a relative name is a hub's, or relative to a folder that is not known here
    here = _hash_if_whole(folder) if folder.is_absolute() and folder.is_dir() else None
    trained_on = adapter.base_hash or here
    if trained_on is not None and trained_on == weights_hash(base.path):
        return None
    _check_tokens(adapter, base, folder if here is not None else None)
    if trained_on is not None:
        return (
            f"{adapter.folder} was trained on {name}, whose weight files differ from those of {base.name}: right where "
            "one is the other converted, else its answers mean nothing"
        )
    if not name or _last_part(name) in (_last_part(base.name), _last_part(str(base.path))):
        return None
    return (
        f"{adapter.folder} names {name} as its base, not {base.name}: on any other weights than those it was trained "
        "on its answers mean nothing"
    )


def _hash_if_whole(folder: Path) -> str | None:
    try:
        return weights_hash(folder)
    except ModelError:
        return None


def _last_part(name: str) -> str:
    """What a model is called, whichever hub, folder or cache it is in."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    cached = [part.rpartition("--")[2] for part in parts if part.startswith(_HUB_CACHE)]
    return (cached or list(parts) or [""])[-1].lower()


def _check_tokens(adapter: Adapter, base: ModelFolder, trained_on: Path | None) -> None:
    folders = [adapter.folder] if trained_on is None else [adapter.folder, trained_on]
    known = next((ids for folder in folders if (ids := token_ids(folder)) is not None), {})
    expected, found = _by_id(known), _by_id(token_ids(base.path) or {})
    # what only one of them has does no harm: added tokens, names for rows that nothing uses
    other = sorted(id_ for id_ in expected.keys() & found.keys() if expected[id_] != found[id_])
    if other:
        raise ModelError(
            f"{adapter.folder}: made for a model with another vocabulary than {base.name}: {len(other)} tokens differ, "
            f"the first is {other[0]}, {expected[other[0]]!r} there and {found[other[0]]!r} here; name the model that "
            f"it was trained on{f' ({adapter.config.base})' if adapter.config.base else ''}"
        )


def _by_id(ids: Mapping[str, int]) -> dict[int, str]:
    return {id_: text for text, id_ in ids.items()}
