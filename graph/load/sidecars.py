"""Files beside a model that decide how it is used, or may be used: they go with it wherever it goes."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import TypeAdapter
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from sparsepass.graph.support import quiet_loading, read_as

SIDECARS: Final = (
    # What may be done with it.
    "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*", "license*", "*_LICENSE*", "Notice*", "THIRD_PARTY_NOTICES*",
    "SOURCE_README.md",
    # How sentence-transformers makes a vector of its outputs; the folders that modules.json names belong to it.
    "modules.json", "sentence_*_config.json", "config_sentence_transformers.json", "router_config.json",
    # How its inputs are made, and its outputs generated.
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "generation_config.json",
    "chat_template.json", "chat_template.jinja",
)  # fmt: skip
"""Patterns of file names. What a target writes itself stands before them."""


CARD: Final = "README.md"
SOURCE_CARD: Final = "SOURCE_README.md"
"""The card of the model that a folder was made of, which has its licence."""
_LICENCES: Final = "LICENSES"
"""A folder of them, as reuse.software has it."""
_OF_A_SNAPSHOT: Final = re.compile(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]")
_FRONT: Final = re.compile(r"\A---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)


class _Module(TypedDict):
    path: str


_MODULES: Final = TypeAdapter(list[_Module])
MODULES: Final = "modules.json"
OF_MODULES: Final = (".json", ".safetensors", ".txt", ".model")
"""Suffixes of the files of a module. Pickled weights are read by nobody here, and code is none of ours."""


def module_folders(folder: Path) -> tuple[str, ...]:
    """The folders that the modules.json of a sentence-transformers model names; none that lie elsewhere.

    Raises:
        SparsepassError: If the file cannot be read.
    """
    if not (folder / MODULES).is_file():
        return ()
    names = [module["path"] for module in read_as(_MODULES, folder / MODULES) if module["path"]]
    return tuple(name for name in names if Path(name).name == name and not name.startswith("."))


def copy_sidecars(source: Path, folder: Path) -> tuple[str, ...]:
    """Copy the files that go with a model into a folder, but for those that are there already.

    Args:
        source: Folder of the model.
        folder: Where to.

    Returns:
        What was copied, as paths in the folder.
    """
    copied = []
    for path in _found(source):
        name = path.relative_to(source)
        target = folder / name
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        copied.append(str(name))
    if not (folder / SOURCE_CARD).exists() and (card := _card_of(source)) is not None:
        (folder / SOURCE_CARD).write_text(card, encoding="utf-8")
        copied.append(SOURCE_CARD)
    return tuple(copied)


def card_facts(folder: Path) -> dict[str, Any]:
    """What the card of the model that a folder was made of says of its origin and of its use.

    Args:
        folder: With `SOURCE_CARD`, or without.

    Returns:
        Of ``base_model``, ``license``, ``license_name`` and ``license_link`` those that it has.
    """
    file = folder / SOURCE_CARD
    front = _front(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else {}
    return {key: front[key] for key in ("base_model", "license", "license_name", "license_link") if front.get(key)}


def _card_of(source: Path) -> str | None:
    """The card of a source, whose base is the source itself where it comes from the hub; None for folders of our own."""
    file = source / CARD
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    front = _front(text)
    found = _OF_A_SNAPSHOT.search(str(source) + os.sep)
    if "sparsepass" in (front.get("tags") or ()) or not (text or found):
        return None
    if found is None:
        return text
    front["base_model"] = "/".join(found.groups())
    return f"---\n{yaml.safe_dump(front, allow_unicode=True, sort_keys=False)}---\n{_FRONT.sub('', text, count=1)}"


def _front(text: str) -> dict[str, Any]:
    """The fields at the top of a card; none where they cannot be read."""
    found = _FRONT.match(text)
    try:
        fields = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError:
        return {}
    return fields if isinstance(fields, dict) else {}


def save_companions(folder: Path, *, tokenizer: Any, processor: Any, source: Path | None) -> None:
    """Write what goes with a model into a folder.

    Args:
        folder: Where to.
        tokenizer: The model's tokenizer, if it has one.
        processor: Its processor, if it has one. What both write, the tokenizer has written last.
        source: The folder that the model came from, if it came from one; see `copy_sidecars`.
    """
    with quiet_loading():
        for companion in (processor, tokenizer):
            if companion is not None:
                companion.save_pretrained(folder)
    if source is not None:
        copy_sidecars(source, folder)


def _found(source: Path) -> Iterator[Path]:
    for pattern in SIDECARS:
        yield from sorted(path for path in source.glob(pattern) if path.is_file())
    yield from sorted(path for path in (source / _LICENCES).rglob("*") if path.is_file())
    for name in module_folders(source):
        yield from sorted(path for path in (source / name).rglob("*") if path.is_file() and path.suffix in OF_MODULES)
