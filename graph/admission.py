"""Which models may be captured, and how they are taken out of what others have put around them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsepass.graph.packed_folder import FOR_INFERENCE, is_packed_module
from sparsepass.graph.program import Program
from sparsepass.graph.support import CaptureError

_NO_TOKEN = -1
_CAN_BE_UNPACKED = {"gguf", "mxfp4", "fp8"}
# Wrapper -> the module in it. By name: naming the class of torch.compile imports triton.
_INNER = {
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
}
_QUANTIZERS = {"bitsandbytes", "gptqmodel", "awq", "auto_gptq", "optimum", "hqq", "eetq", "aqlm", "vptq", "fp_quant"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what compiles, distributes or checkpoints it; the model itself if there is nothing around.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(net)) is net
        True
    """
    while True:
        inner = _INNER.get(type(model).__name__)
        if inner is not None and inner in model._modules:
            model = model.get_submodule(inner)
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


@contextlib.contextmanager
def named_outputs(model: object) -> Iterator[None]:
    """Run a model for a block as if no configuration in it asked for tuples (``return_dict=False``, which old ones do)."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    configs: list[Any] = [c for module in modules if (c := getattr(module, "config", None)) is not None]
    changed = [config for config in configs if getattr(config, "return_dict", True) is False]
    for config in changed:
        config.return_dict = True
    try:
        yield
    finally:
        for config in changed:
            config.return_dict = False


@contextlib.contextmanager
def plain_settings(model: nn.Module) -> Iterator[None]:
    """Run a model plainly for a block: without a cache, with named outputs, its modules not compiled.

    Encoder-decoders hold a configuration for each half. Classifiers without a padding token get one that no text has. The
    caller puts back what is changed: see `untouched`.
    """
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = unwrapped(child)
        if module._compiled_call_impl is not None:
            module._compiled_call_impl = None
        plain = getattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable", None)
        if plain is not None:
            module.__dict__["forward"] = plain
    configs: list[Any] = [c for module in model.modules() if (c := getattr(module, "config", None)) is not None]
    for config in configs:
        for name, value in (("use_cache", False), ("return_dict", True)):
            if hasattr(config, name) and getattr(config, name) is not value:
                setattr(config, name, value)
        if getattr(config, "_attn_implementation", None) == "flex_attention":  # it compiles itself, which no trace survives
            config._attn_implementation = "sdpa"
        if _needs_padding(model, config):
            config.pad_token_id = _NO_TOKEN
    yield


def in_float64(model: nn.Module) -> nn.Module:
    """Turn a model into float64, its experts run one by one: kernels for groups of them know no float64."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"  # type: ignore[union-attr]
    return model.double()


def _needs_padding(model: nn.Module, config: Any) -> bool:
    """Whether a classifier takes one row at a time because its padding token is not known: it reads the last token then."""
    return type(model).__name__.endswith("ForSequenceClassification") and getattr(config, "pad_token_id", 0) is None


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be captured, in words.

    Raises:
        CaptureError: If it is no plain model of floating-point tensors on one device.
    """
    if isinstance(model, Program):
        raise CaptureError("this is a program already; pass it on as it is")
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected an nn.Module, got {type(model).__name__}; load the checkpoint first")
    kinds = {type(m).__module__.split(".")[0] for m in model.modules()}
    if "peft" in kinds:
        raise CaptureError(
            "the model is wrapped by PEFT: merge the adapter first (model = model.merge_and_unload()), then prune the "
            "result; merged after pruning, an adapter would destroy the pattern"
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise CaptureError(
            "the model is sharded by FSDP: save it whole (a full state dict), and load that with from_pretrained"
        )
    if any(is_packed_module(module) for module in model.modules()):
        raise CaptureError(FOR_INFERENCE)
    quantized_by_torch = any(type(m).__module__.startswith(("torch.ao.nn.", "torchao.")) for m in model.modules())
    if kinds & _QUANTIZERS or quantized_by_torch or (getattr(model, "is_quantized", False) and not is_dequantized(model)):
        raise CaptureError("the model is already quantized: prune the original floating-point checkpoint, quantize after")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if torch.nn.parameter.is_lazy(tensor):
            raise CaptureError(f"{name} has no shape yet: run the model once on an example, then capture it")
        if type(tensor) not in (Tensor, nn.Parameter) and "Parameter" not in type(tensor).__name__:
            raise CaptureError(
                f"{name} is a {type(tensor).__name__}, not a plain tensor: the model is already quantized, sparse or "
                "sharded; prune the original floating-point checkpoint"
            )
        if tensor.is_inference():
            raise CaptureError(
                f"{name} was made in torch.inference_mode(), which torch cannot trace; load the model outside of it"
            )
        if tensor.layout != torch.strided:
            raise CaptureError(f"{name} is already a sparse tensor ({tensor.layout}); use the dense checkpoint")
    devices = {str(t.device) for t in [*model.parameters(), *model.buffers()]}
    if len(devices) > 1 and "meta" in devices:
        check_has_values(model)
    if len(devices) > 1:
        raise CaptureError(
            f"parts of the model are on different devices ({', '.join(sorted(devices))}); move it to one device first "
            "(model.to('cpu')), or load it without device_map"
        )


def is_dequantized(model: nn.Module) -> bool:
    """Whether transformers has unpacked the weights while loading them: plain floats throughout.

    The model's configuration goes on to say that they are quantized.
    """
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    if getattr(method, "value", method) not in _CAN_BE_UNPACKED:
        return False
    if any(type(module).__module__.startswith("transformers.integrations.") for module in model.modules()):
        return False  # a layer that unpacks its weights when it runs
    return all(p.is_floating_point() and p.element_size() > 1 for p in model.parameters())


def check_has_values(model: nn.Module) -> None:
    """Refuse a model or program whose weights, or some of them, are on the meta device.

    Raises:
        CaptureError: It names one of them, and says how they get values.
    """
    named = model.tensors().items() if isinstance(model, Program) else [*model.named_parameters(), *model.named_buffers()]
    if empty := [name for name, tensor in named if tensor.is_meta]:
        how = "fill it from its checkpoint (sparsepass.graph.fill)"
        if not isinstance(model, Program):
            how = "load it with its weights, all of them in memory (from_pretrained without device_map and disk offload)"
        raise CaptureError(
            f"{type(model).__name__} has {len(empty)} tensors without values: {empty[0]} is on the meta device; {how}"
        )
