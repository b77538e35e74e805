"""The class and configuration of a program's model, which a file may have named: nothing is fetched or run by their words."""

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from sparsepass.graph.records import Origin
from sparsepass.graph.support import CaptureError, SparsepassError, first_line

FETCHED = ("auto_map", "custom_pipelines", "trust_remote_code")
"""Names of code and of other weights: what stands there would be fetched."""
# Said of a file that the weights came from: a program's own are not stored so.
_OF_THE_SOURCE = {"quantization_config"}
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_OURS = {None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "batched_mm", "grouped_mm"}
# A configuration makes lists of as many entries.
_COUNTS = re.compile(r"layer|depth|block|stage|level|^num_|^n_head")
_MOST, _MOST_COUNTED, _DEEPEST = 2**40, 2**20, 16
_MOST_LAYERS = 2**14


def class_of(origin: Origin) -> Any:
    """The model's class in transformers; None for a plain module.

    Raises:
        CaptureError: If transformers has no model of that name.
    """
    import transformers

    if origin.model_class is None:
        return None
    kind = getattr(transformers, origin.model_class.removeprefix("transformers."), None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel) or kind.config_class is None:
        raise CaptureError(
            f"the program is said to be a {origin.model_class}, and the installed transformers has no such model"
        )
    return kind


def configuration_of(origin: Origin) -> Any:
    """The configuration of a program's model, an object of transformers; None where its class is not known to transformers.

    Numbers that JSON lacks (infinity) are as they were, and so are outputs that not every implementation of attention has.

    Raises:
        CaptureError: If transformers refuses it, or it names code or weights that would have to be fetched.
    """
    kind = class_of(origin)
    if kind is None or origin.config is None:
        return None
    facts = _plain(origin.config)
    attentions = facts.pop("output_attentions", False)
    with told_as_configuration(origin):
        config = _config_class(kind, facts.get("model_type")).from_dict(facts)
        if attentions:
            config._attn_implementation = "eager"  # the only implementation that a configuration allows with it
            config.output_attentions = True
    return config


def _config_class(kind: Any, model_type: Any) -> Any:
    """That of the configuration's own type: models of several types share a class, and each type has its names of weights."""
    from transformers import CONFIG_MAPPING

    if kind.config_class.model_type == model_type or model_type not in CONFIG_MAPPING:
        return kind.config_class
    return CONFIG_MAPPING[model_type]


def generation_config_of(origin: Origin) -> Any:
    """The generation settings of a program's model, an object of transformers."""
    import transformers

    return transformers.GenerationConfig.from_dict(_plain(origin.generation_config or {}))


@contextlib.contextmanager
def told_as_configuration(origin: Origin) -> Iterator[None]:
    """Say what transformers makes of a configuration that it cannot use.

    Raises:
        CaptureError: If the block raises anything.
    """
    try:
        yield
    except SparsepassError:
        raise
    except Exception as error:  # checks of transformers and code of the model raise anything
        raise CaptureError(
            f"transformers cannot make a {origin.model_class} of the program's configuration: {type(error).__name__}: "
            f"{first_line(error)[:300]}"
        ) from error


@contextlib.contextmanager
def at_most_modules(most: int) -> Iterator[None]:
    """Stop a model's construction that makes more modules than that.

    Raises:
        CaptureError: When it does.
    """
    count = itertools.count(1)

    def seen(module: nn.Module, name: str, child: nn.Module | None) -> None:
        del module, name, child
        if next(count) > most:
            raise CaptureError(f"by its configuration the model has over {most:,} modules, far more than the program's tensors")

    handle = nn.modules.module.register_module_module_registration_hook(seen)
    try:
        yield
    finally:
        handle.remove()


def _plain(value: Any, depth: int = 0) -> Any:
    """Copy a configuration. ``{"__float__": "Infinity"}`` of transformers is a number again, and outputs have names."""
    if depth > _DEEPEST:
        raise CaptureError("the program's configuration is nested too deeply")
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"__float__"}:
        return float(value["__float__"]) if value["__float__"] in ("Infinity", "-Infinity", "NaN") else None
    for key, item in value.items():
        if (words := _refused(key, item)) is not None:
            raise CaptureError(f"the program's configuration has {key}: {item!r:.100}, {words}")
    kept = ((key, item) for key, item in value.items() if key not in _OF_THE_SOURCE and (key, item) != ("return_dict", False))
    found = {key: _plain(item, depth + 1) for key, item in kept}
    if found.get("use_pretrained_backbone"):
        found["use_pretrained_backbone"] = False  # its weights are the program's
    return found


def _refused(key: str, item: Any) -> str | None:
    if key in FETCHED and item:
        return "which a program does not need and which could fetch code or weights"
    if key in _IMPLEMENTATIONS and not (isinstance(item, str | None) and item in _OURS):
        return "and only transformers' own implementations are used"
    if type(item) is int:
        most = (_MOST_LAYERS if "layer" in key else _MOST_COUNTED) if _COUNTS.search(key) else _MOST
        return f"and {most:,} is the most" if item > most else None
    return None
