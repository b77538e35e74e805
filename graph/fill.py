"""Programs without weights: captured on the meta device, filled from safetensors later."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from sparsepass.graph.capture import capture
from sparsepass.graph.load import (
    LOADING_ERRORS,
    check_all_used,
    check_fits,
    check_numbers,
    check_plain,
    check_plain_state,
    choose_attention,
)
from sparsepass.graph.model import skeleton
from sparsepass.graph.nodes import retarget_device
from sparsepass.graph.program import Program
from sparsepass.graph.support import (
    INFINITIES,
    WEIGHTS_FILE,
    WEIGHTS_INDEX,
    CaptureError,
    SparsepassError,
    check_inside,
    check_tensors,
    default_dtype,
    first_line,
    one_at_a_time,
    open_tensors,
    read_object,
    weights_entry,
    weights_files,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_COMPUTED: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@one_at_a_time
def capture_without_weights(source: str | Path, *, dtype: torch.dtype | None = None) -> Program:
    """Capture a transformers model from its configuration alone: the structure is there, the weights take no memory.

    Args:
        source: A folder (or hub id) with a ``config.json`` that names the architecture.
        dtype: Of the weights to come; by default what the configuration says, or float32.

    Returns:
        A program on the meta device. It has sites and can be planned; `fill` gives it weights.

    Raises:
        CaptureError: If the configuration names no architecture that transformers has, or the model cannot be captured.
    """
    import transformers

    config = _config(source)
    named = getattr(config, "architectures", None)
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    if not names:
        raise CaptureError(
            f"the configuration in {source} names no architecture; add the model's class to its config.json, such as "
            '"architectures": ["LlamaForCausalLM"]'
        )
    kind = getattr(transformers, names[0], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CaptureError(
            f"the configuration in {source} names the architecture {names}, which this transformers does not "
            "have; load the model yourself and capture it"
        )
    with default_dtype(dtype or _own_dtype(config)), torch.device("meta"):
        try:
            model = kind(config)
        except LOADING_ERRORS as error:
            raise CaptureError(
                f"the configuration in {source} does not make a {names[0]} ({type(error).__name__}: {first_line(error)}); "
                "compare it with that of a model which loads"
            ) from error
    return capture(model, inplace=True)


def _config(source: str | Path) -> "PretrainedConfig":
    """The configuration in a folder or on the hub. Code that comes with it never runs.

    Attention kernels that only some machines have (flash attention) are no matter here, so their name is taken out.
    """
    from transformers import AutoConfig

    if Path(source).is_dir():
        check_inside(source)
    if (path := Path(source) / "config.json").is_file():
        check_numbers(read_object(path, allowed=INFINITIES, error=CaptureError), path)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    except LOADING_ERRORS as error:
        if "trust_remote_code" in str(error):
            raise CaptureError(
                f"{source} describes its model by code of its own, and a structure is read without running any; load the "
                "model yourself if you trust it (load_model with trust_remote_code=True), and plan the captured program"
            ) from error
        raise CaptureError(
            f"{source} has no configuration that transformers can read ({type(error).__name__}: {first_line(error)}); "
            "check the path and the file"
        ) from error
    choose_attention(config)
    return config


def _own_dtype(config: "PretrainedConfig") -> torch.dtype:
    """The type of the weights that a configuration names; bfloat16 for those in which nothing is computed, such as float8."""
    named = getattr(config, "dtype", None)
    if named is None:
        return torch.float32
    return named if named in _COMPUTED else torch.bfloat16


def fill(program: Program, source: str | Path | Mapping[str, Tensor], *, device: torch.device | str = "cpu") -> Program:
    """Give weights to a program that was captured on the meta device.

    Args:
        program: Changed in place; its meta tensors are replaced.
        source: A safetensors file, a folder with one (or with shards and an index), or a state dict. Names are those of
            the model's state dict. Tensors are read one at a time.
        device: Where the weights go.

    Returns:
        The same program, ready to run.

    Raises:
        SparsepassError: If a weight is missing or has another shape, is not plain (see `load_model`) or too large for its type,
            or a file is truncated; the program is then as before.

    Exactness: bitwise the program that capturing the loaded model gives.
    """
    target = torch.device(device)
    wanted = {name: t for name, t in program.tensors().items() if t.is_meta}
    named = dict(wanted) | {alias: wanted[name] for alias, name in program.aliases.items() if name in wanted}
    held = _check_contents(source)
    found: dict[str, Tensor] = {}
    for name, tensor in _tensors(source, named.keys()):
        expected = named[name]
        if tuple(tensor.shape) != tuple(expected.shape):
            raise SparsepassError(
                f"{name} has shape {tuple(tensor.shape)} in {_say(source)}, but the program expects {tuple(expected.shape)}; "
                "the checkpoint belongs to another configuration"
            )
        check_fits({name: tensor}, expected.dtype)
        found[program.aliases.get(name, name)] = tensor.to(device=target, dtype=expected.dtype)
    missing = wanted.keys() - found.keys()
    if missing:
        found |= _computed_buffers(program, missing, target)
    if missing := wanted.keys() - found.keys():
        raise SparsepassError(
            f"{_say(source)} lacks {len(missing)} tensors, {sorted(missing)[0]} the first; if its names differ from the "
            "model's (experts stored one by one, another prefix), load it with transformers and capture the model"
        )
    if program.origin.model_class is not None and (unread := held - program.tensors().keys() - program.aliases.keys()):
        check_all_used(skeleton(program), {"unexpected_keys": unread}, _say(source))
    for name, tensor in found.items():
        program.set_tensor(name, tensor)
    program.example_inputs = {
        name: torch.zeros(t.shape, dtype=t.dtype, device=target) if t.is_meta else t.to(target)
        for name, t in program.example_inputs.items()
    }
    retarget_device(program.graph_module, torch.device("meta"), target)
    return program


def _check_contents(source: str | Path | Mapping[str, Tensor]) -> set[str]:
    """Refuse weights that are quantized or were saved out of a wrapper, though their names and shapes fit.

    Returns:
        The names of all tensors in the source.
    """
    name = _say(source)
    if isinstance(source, Mapping):
        check_plain_state(source, name)
        return set(source)
    held: set[str] = set()
    for file in _files(Path(source)):
        check_plain(file.parent, [file.name], name)
        held |= set(check_tensors(file))
    return held


def _computed_buffers(program: Program, names: set[str], device: torch.device) -> dict[str, Tensor]:
    """Buffers that checkpoints leave out, such as rotary frequencies: the model's own code computes them."""
    if program.origin.model_class is None:
        return {}
    model: nn.Module = skeleton(program, real_buffers=True)
    return {name: b.detach().to(device) for name, b in model.named_buffers() if name in names and not b.is_meta}


def _tensors(source: str | Path | Mapping[str, Tensor], names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(source, Mapping):
        yield from ((name, source[name]) for name in names if name in source)
        return
    for file in _files(Path(source)):
        with open_tensors(file) as handle:
            for name in handle.keys():  # noqa: SIM118  (a handle is no mapping)
                if name in names:
                    yield name, handle.get_tensor(name)


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if (entry := weights_entry(source)) is not None:
        return [*weights_files(entry)]
    raise SparsepassError(f"{source} holds no {WEIGHTS_FILE} and no {WEIGHTS_INDEX}; give a safetensors checkpoint")


def _say(source: object) -> str:
    return "the state dict" if isinstance(source, Mapping) else str(source)
