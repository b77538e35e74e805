"""What a configuration describes, checked before anything is built of it: a small file may ask for any amount of memory."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import safetensors
import torch
from huggingface_hub.errors import StrictDataclassError

from sparsepass.graph.support import INFINITIES, SparsepassError, first_line, quiet_loading, read_object, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LOADING_ERRORS: Final = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError, ArithmeticError, AssertionError,
    safetensors.SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises about a checkpoint or a configuration that it cannot use."""

_MAX_NUMBER: Final = 1 << 53
_MAX_LAYERS: Final = 1024
_NUM_LAYERS: Final = re.compile(r"(^|\.)(n_layers?|num_(\w+_)?layers|depth)$")
_LAYERS: Final = re.compile(r"(^|_)(layers?|depths?|blocks?)$")
_SLACK: Final = 1 << 26
"""Elements that a model may have beside those of its files: buffers that are computed, a head that is tied."""
_MAX_BUFFERS: Final = 1 << 31
_JSON_FILES: Final = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.json",
)  # fmt: skip
"""Files that transformers reads beside the weights, each an object."""
_TOKENIZER_PARTS: Final = {
    "normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "truncation", "padding",
    "normalizers", "pretokenizers", "processors", "decoders",
}  # fmt: skip
"""What tokenizer.json is made of, each an object, or a list of them where it is named for many."""


@contextmanager
def explained(name: str, what: str = "") -> Iterator[None]:
    """Turn what transformers raises about a checkpoint into our error, keeping its own words. Nothing of ours belongs in."""
    try:
        yield
    except SparsepassError:
        raise
    except LOADING_ERRORS as error:
        raise SparsepassError(
            f"model {name} could not be loaded{f' ({what})' if what else ''}: {type(error).__name__}: {first_line(error)}"
        ) from error


def check_companions(folder: Path) -> None:
    """Read the JSON files of a folder that transformers reads, strictly: what it makes of damaged ones is no error of theirs.

    Raises:
        SparsepassError: If one cannot be read, or is no object, or a part of tokenizer.json is none.
    """
    for name in _JSON_FILES:
        if (folder / name).exists():
            document = read_object(folder / name, allowed=INFINITIES)
            if name == "tokenizer.json":
                _check_parts(document, folder / name, "")


def _check_parts(document: Mapping[str, Any], path: Path, where: str) -> None:
    # The package tokenizers takes a list for an object too, its fields in order, and makes a part of what was none.
    for key in _TOKENIZER_PARTS & document.keys():
        value, place = document[key], f"{where}{key}"
        many = isinstance(value, list) and key.endswith("s")
        for index, part in enumerate(value) if many else [(None, value)]:
            here = place if index is None else f"{place}[{index}]"
            if isinstance(part, Mapping):
                _check_parts(part, path, f"{here}.")
            elif part is not None or many:
                raise SparsepassError(f"{path}: {here} is {type(part).__name__}, expected an object; copy the file again")


def check_numbers(document: Mapping[str, Any], where: "Path | str") -> None:
    """Refuse a configuration with numbers that no model has.

    Args:
        document: The configuration, as JSON.
        where: Its file, for the message.

    Raises:
        SparsepassError: If a number is too large, or there are more layers than a model has.

    Example:
        >>> check_numbers({"num_hidden_layers": 10**9}, "config.json")
        Traceback (most recent call last):
        ...
        sparsepass.SparsepassError: config.json: num_hidden_layers is 1000000000, expected at most 1024; copy it again
    """
    for place, number in _numbers(document, ""):
        if number < 0 and _NUM_LAYERS.search(place):
            raise SparsepassError(f"{shown(where)}: {place} is {number}, and no model has fewer than no layers; copy it again")
        largest = _MAX_LAYERS if _LAYERS.search(place.partition("[")[0]) else _MAX_NUMBER
        if abs(number) > largest:
            value = str(number) if number.bit_length() < 100 else "a number of more than 30 digits"
            raise SparsepassError(f"{shown(where)}: {place} is {value}, expected at most {largest}; copy it again")


def _numbers(value: object, place: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{place}.{key}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{place}[{index}]")


def check_described(model_class: Any, config: "PretrainedConfig", num_stored: int, name: str) -> None:
    """Refuse a configuration that describes a much larger model than the one whose weights are there.

    What is missing in the files would be made up, in memory, before it is noticed.

    Args:
        model_class: The model's class.
        config: Its configuration.
        num_stored: Elements of all tensors in the files, in the form in which the model holds them.
        name: The model's name.

    Raises:
        SparsepassError: If it is, or the class cannot be made of the configuration.
    """
    with quiet_loading(), explained(name), torch.device("meta"):
        model = model_class(config)
    described = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() for buffer in model.buffers())
    if described > 2 * num_stored + _SLACK or buffers > _MAX_BUFFERS:
        raise SparsepassError(
            f"model {name}: its config.json describes {described:,} parameters and {buffers:,} elements of buffers, and its "
            f"files hold {num_stored:,} elements; the two are not of one model: copy it again"
        )
