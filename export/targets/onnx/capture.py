"""From torch to an ONNX model in memory: plain graphs, and graphs that carry a key-value cache.

A generative model becomes one decoder that takes the past as inputs and returns past and present together, so that
prefill (a past of length 0) and decode (length n) are one graph and weights are stored once. The cache is one of full
length for every layer: models with a sliding window apply it in the attention mask, and stay right beyond the window.

An encoder-decoder becomes two graphs: the encoder, which also computes the keys and values of the cross attention (once,
not at every step), and the decoder, which takes them as inputs.
"""

import contextlib
import inspect
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from sparsepass.export.targets.onnx.artifact import Role
from sparsepass.graph.capture import run_exporter
from sparsepass.graph.nodes import is_mutable
from sparsepass.graph.support import SparsepassError, first_line, one_at_a_time

Axes = tuple[str | None, ...]
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
PREFIX = "model."
"""What stands before the program's weight names in those of a piece's module."""

_EXAMPLE_PAST, _EXAMPLE_STEP = 5, 3  # differ from each other, from the batch and from 0 and 1, which export bakes in


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One graph to be made.

    Attributes:
        role: What it is for.
        module: What computes it; takes keyword arguments.
        inputs: Example inputs, by argument name.
        input_names: Argument name -> name in the file, if that is another.
        output_names: Names of the outputs, in order.
        axes: Input name in the file -> axis names; None for an axis that is fixed.
    """

    role: Role
    module: nn.Module
    inputs: Mapping[str, Tensor]
    input_names: Mapping[str, str] = field(default_factory=dict)
    output_names: tuple[str, ...]
    axes: Mapping[str, Axes]


class CacheUnsupportedError(SparsepassError):
    """A generative model whose state is no key-value cache that ONNX graphs can carry."""


@one_at_a_time
def to_ir(piece: Piece, opset: int) -> ir.Model:
    """Lower one piece with transformers' exporter, whose patches of torch and torch.onnx it needs.

    Returns:
        The model, not optimized, with the names of the piece; inputs that nothing reads are dropped where they are
        position ids.

    Raises:
        SparsepassError: If torch.export or torch.onnx cannot lower it.
    """
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    auto = torch.export.Dim.AUTO
    names = [piece.input_names.get(name, name) for name in piece.inputs]
    shapes = {
        argument: {n: auto for n, axis in enumerate(piece.axes[name]) if axis is not None}
        for argument, name in zip(piece.inputs, names, strict=True)
    }
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=opset, optimize=False)
    try:
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), _one_trace():
            found = run_exporter(OnnxExporter(), piece.module, piece.inputs, config)
    except Exception as error:  # torch.export and torch.onnx raise anything
        raise SparsepassError(
            f"the {piece.role} graph cannot be lowered to ONNX: {_reason(error)}. Try another "
            "opset (opset=...), or a plain forward graph (task=... without a cache); the hf target needs no lowering"
        ) from error
    model: ir.Model = getattr(found, "model", found)  # older versions give torch's ONNXProgram
    graph = model.graph
    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name
    for value in list(graph.inputs):
        if value.name == "position_ids" and not value.uses():
            graph.inputs.remove(value)
    for value, name in zip(graph.outputs, piece.output_names, strict=True):
        value.name = name
    return model


def plain_piece(
    graph_module: nn.Module,
    inputs: Mapping[str, Tensor],
    axes: Mapping[str, Axes],
    output_names: tuple[str, ...],
) -> Piece:
    """One plain graph.

    Args:
        graph_module: A flat graph, masks folded.
        inputs: Its example inputs, in its order.
        axes: Input -> axis names.
        output_names: Its outputs.
    """
    shown = tuple(f"output.{name}" if name in inputs else name for name in output_names)
    return Piece(
        role="model",
        module=_Plain(graph_module),
        inputs=inputs,
        output_names=shown,
        axes=axes,
    )


def decoder_piece(model: nn.Module, example_ids: Tensor) -> Piece:
    """The decoder of a decoder-only model, with its cache.

    Args:
        model: A transformers causal language model.
        example_ids: Token ids, [batch >= 2, tokens].

    Raises:
        CacheUnsupportedError: If its state is no plain key-value cache.
    """
    batch = max(2, example_ids.shape[0])
    ids = example_ids[:1, :1].repeat(batch, _EXAMPLE_PAST)
    with torch.no_grad(), _probing():
        output = model(input_ids=ids, use_cache=True)
        pairs = _cache_pairs(output.past_key_values)
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        if takes_positions and not _counts_from_zero(model, ids, output.logits):
            raise CacheUnsupportedError(
                "its positions begin behind its padding token's number and leave out padding, which a graph that sees the last "
                "tokens alone cannot count"
            )
    inputs = {"input_ids": ids[:, :_EXAMPLE_STEP]}
    axes: dict[str, Axes] = {"input_ids": ("batch", "sequence")}
    inputs["attention_mask"] = torch.ones(batch, _EXAMPLE_PAST + _EXAMPLE_STEP, dtype=torch.long)
    axes["attention_mask"] = ("batch", "total_sequence")
    if takes_positions:
        positions = torch.arange(_EXAMPLE_PAST, _EXAMPLE_PAST + _EXAMPLE_STEP)
        inputs["position_ids"] = positions[None].repeat(batch, 1)
        axes["position_ids"] = ("batch", "sequence")
    past, names, outputs = _past("", pairs)
    axes |= dict.fromkeys(names.values(), ("batch", None, "past_sequence", None))
    return Piece(
        role="model",
        module=_Decoder(model, len(pairs)),
        inputs=inputs | past,
        input_names=names,
        output_names=("logits", *outputs),
        axes=axes,
    )


def _counts_from_zero(model: nn.Module, ids: Tensor, logits: Tensor) -> bool:
    """Whether the positions that a model takes count from 0, as users of a graph give them. RoBERTa's do not."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None].expand_as(ids)
    again = model(input_ids=ids, position_ids=positions, use_cache=True).logits
    return bool(torch.allclose(again.float(), logits.float(), rtol=1e-2, atol=1e-3 * float(logits.abs().max())))


@contextlib.contextmanager
def _probing() -> Iterator[None]:
    """A model that does not run with a cache has none that a graph could carry: any error of its own code says so."""
    try:
        yield
    except SparsepassError:
        raise
    except Exception as error:
        raise CacheUnsupportedError(
            f"run with a cache, it fails ({type(error).__name__}: {first_line(error)[:200]})"
        ) from error


def encoder_decoder_pieces(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Piece, Piece]:
    """Encoder and decoder of an encoder-decoder model, with the caches of both attentions.

    Args:
        model: A transformers encoder-decoder model.
        inputs: Its inputs, decoder_input_ids among them, batch of at least 2.

    Raises:
        CacheUnsupportedError: If its state is no pair of key-value caches.
    """
    from transformers import EncoderDecoderCache

    main = str(model.main_input_name)
    first = inputs[main]
    batch = first.shape[0]
    ids = inputs["decoder_input_ids"][:1, :1].repeat(batch, _EXAMPLE_PAST)
    masked = main == "input_ids"
    given = {name: inputs[name] for name in (main, "attention_mask") if name in inputs}
    if masked and "attention_mask" not in given:
        given["attention_mask"] = torch.ones_like(first)
    with torch.no_grad(), _probing():
        output = model(**given, decoder_input_ids=ids, use_cache=True)
    cache = output.past_key_values
    if not isinstance(cache, EncoderDecoderCache):
        raise CacheUnsupportedError(f"its state is a {type(cache).__name__}, not the caches of a decoder's two attentions")
    own, cross = _cache_pairs(cache.self_attention_cache), _cache_pairs(cache.cross_attention_cache)
    text: Axes = ("batch", "encoder_sequence")
    encoder_axes = {
        name: text if tensor.dim() == 2 else ("batch", *[None] * (tensor.dim() - 1)) for name, tensor in given.items()
    }
    cross_past, cross_names, cross_present = _past("encoder.", cross)
    encoder = Piece(
        role="encoder",
        module=_EncoderGraph(model, main),
        inputs=given,
        output_names=("last_hidden_state", *cross_present),
        axes=encoder_axes,
    )
    own_past, own_names, own_present = _past("decoder.", own)
    step: dict[str, Tensor] = {"input_ids": ids[:, :_EXAMPLE_STEP]}
    axes: dict[str, Axes] = {"input_ids": ("batch", "sequence")}
    if masked:
        step["encoder_attention_mask"] = given["attention_mask"]
        axes["encoder_attention_mask"] = text
    axes |= dict.fromkeys(own_names.values(), ("batch", None, "past_sequence", None))
    axes |= dict.fromkeys(cross_names.values(), ("batch", None, "encoder_sequence" if masked else None, None))
    decoder = Piece(
        role="decoder",
        module=_CrossDecoder(model, len(own), output.encoder_last_hidden_state.shape[-1]),
        inputs=step | own_past | cross_past,
        input_names=own_names | cross_names,
        output_names=("logits", *own_present),
        axes=axes,
    )
    return encoder, decoder


class _Plain(nn.Module):
    """A flat graph. torch.export would interpret a bare GraphModule, past the patches of the exporter. Final."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {f"output_{number}": tensor for number, tensor in enumerate(self.model(*inputs.values()))}


class _Decoder(nn.Module):
    """A causal language model as a function of tokens and past. Final."""

    def __init__(self, model: nn.Module, num_layers: int) -> None:
        super().__init__()
        self.model, self.num_layers = model, num_layers

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        cache = _make_cache(inputs, "past", self.num_layers)
        plain = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        output = self.model(**plain, past_key_values=cache, use_cache=True)
        return {"logits": output.logits, **_present(output.past_key_values)}


class _EncoderGraph(nn.Module):
    """An encoder, and the keys and values that the decoder's cross attention makes of its output. Final."""

    def __init__(self, model: nn.Module, main: str) -> None:
        super().__init__()
        self.model, self.main = model, main

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        hidden = self.model.get_encoder()(**inputs).last_hidden_state  # type: ignore[operator]
        # One step of the decoder, of which only the keys and values of the cross attention are kept.
        start = torch.zeros((inputs[self.main].shape[0], 2), dtype=torch.long, device=hidden.device)
        arguments: dict[str, Any] = {"encoder_outputs": (hidden,), "decoder_input_ids": start, "use_cache": True}
        if "attention_mask" in inputs:
            arguments["attention_mask"] = inputs["attention_mask"]
        cache = self.model(**arguments).past_key_values.cross_attention_cache
        return {"last_hidden_state": hidden, **_present(cache)}


class _CrossDecoder(nn.Module):
    """The decoder of an encoder-decoder model as a function of tokens and both pasts. Final."""

    def __init__(self, model: nn.Module, num_layers: int, width: int) -> None:
        super().__init__()
        self.model, self.num_layers, self.width = model, num_layers, width

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        from transformers import EncoderDecoderCache

        own, cross = (_make_cache(inputs, f"past_{half}", self.num_layers) for half in ("decoder", "encoder"))
        keys = inputs["past_encoder_0_key"]
        # The encoder's output itself is read by nothing any more; only its shape is.
        hidden = keys.new_zeros((keys.shape[0], keys.shape[2], self.width))
        arguments: dict[str, Any] = {"encoder_outputs": (hidden,), "decoder_input_ids": inputs["input_ids"]}
        if "encoder_attention_mask" in inputs:
            arguments["attention_mask"] = inputs["encoder_attention_mask"]
        output = self.model(**arguments, past_key_values=EncoderDecoderCache(own, cross), use_cache=True)
        return {"logits": output.logits, **_present(output.past_key_values.self_attention_cache)}


def _make_cache(inputs: Mapping[str, Tensor], prefix: str, num_layers: int) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(num_layers):
        cache.update(inputs[f"{prefix}_{layer}_key"], inputs[f"{prefix}_{layer}_value"], layer)
    return cache


def _present(cache: Any) -> dict[str, Tensor]:
    return {
        f"present_{number}_{part}": tensor
        for number, layer in enumerate(cache.layers)
        for part, tensor in (("key", layer.keys), ("value", layer.values))
    }


def _past(half: str, pairs: list[tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]:
    """Of the past, argument name -> example, and argument name -> name in the file; and the names of the present."""
    prefix = f"past_{half.rstrip('.')}" if half else "past"
    examples, names = {}, {}
    for layer, pair in enumerate(pairs):
        for part, tensor in zip(("key", "value"), pair, strict=True):
            examples[f"{prefix}_{layer}_{part}"] = tensor.detach().clone()
            names[f"{prefix}_{layer}_{part}"] = f"past_key_values.{layer}.{half}{part}"
    return examples, names, tuple(name.replace("past_key_values", "present") for name in names.values())


def _cache_pairs(cache: Any) -> list[tuple[Tensor, Tensor]]:
    from transformers import DynamicCache

    if not isinstance(cache, DynamicCache):
        raise CacheUnsupportedError(f"its state is a {type(cache).__name__}, not a key-value cache")
    pairs = []
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not (isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dim() == values.dim() == 4):
            raise CacheUnsupportedError(
                f"layer {number} keeps a {type(layer).__name__} in its cache, which is no pair of keys and values"
            )
        pairs.append((keys, values))
    return pairs


@contextlib.contextmanager
def _one_trace() -> Iterator[None]:
    """Spare torch.onnx the second trace of the whole graph, which takes as long as the first, where nothing needs it.

    It decomposes operations that have no ONNX translation. After `_make_translatable`, most graphs have none such, and
    then a trace gives the same graph again. If torch moves this function, exports are slower and otherwise the same.
    """
    from torch.onnx._internal.exporter import _fx_passes

    original = getattr(_fx_passes, "decompose_with_registry", None)
    if original is None:
        yield
        return

    def decompose(exported: torch.export.ExportedProgram, registry: Any) -> torch.export.ExportedProgram:
        _make_translatable(exported.graph_module)
        calls = [node for node in exported.graph.nodes if node.op == "call_function"]
        if all("val" in node.meta and registry.is_registered(node.target) and not is_mutable(node.target) for node in calls):
            return exported
        return original(exported, registry)  # type: ignore[no-any-return]

    _fx_passes.decompose_with_registry = decompose  # type: ignore[assignment]
    try:
        yield
    finally:
        _fx_passes.decompose_with_registry = original


def _make_translatable(graph_module: fx.GraphModule) -> None:
    """Write casts and boolean conjunctions as the operations that torch.onnx translates, and drop aliases."""
    aten = torch.ops.aten
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source, result = node.args[0].meta.get("val"), node.meta.get("val")
        if any(user.op == "output" for user in node.users):
            continue  # the program's signature names it
        if node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif not isinstance(result, Tensor) or not isinstance(source, Tensor):
            continue
        elif node.target in (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other):
            if source.dtype == result.dtype:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
            else:
                node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": result.dtype}
        elif node.target is aten.__and__.Tensor and result.dtype == torch.bool:
            node.target = aten.logical_and.default
        elif node.target is aten.min.other:
            node.target = aten.minimum.default
        elif node.target in (aten.scatter_add.default, aten.scatter_add_.default) and _counts(node):
            _count_by_comparing(node, result)
    graph_module.recompile()


def _counts(scatter: fx.Node) -> bool:
    """Whether ones are added to a row of zeros: mixtures of experts count their tokens so."""
    if len(scatter.args) != 4:
        return False
    zeros, dim, _, ones = scatter.args
    aten = torch.ops.aten
    if not isinstance(zeros, fx.Node) or not isinstance(ones, fx.Node) or dim != 0:
        return False
    made = zeros.target is aten.zeros.default and ones.target is aten.ones_like.default
    return made and len(zeros.users) == 1 and bool(zeros.meta["val"].dim() == 1)


def _count_by_comparing(scatter: fx.Node, result: Tensor) -> None:
    """Write a count without scattering, which TensorRT-RTX cannot add with. Exact."""
    aten = torch.ops.aten
    places = scatter.args[2]
    graph = scatter.graph
    with graph.inserting_before(scatter):
        column = graph.call_function(aten.unsqueeze.default, (places, -1))
        numbers = graph.call_function(aten.arange.default, (len(result),), {"dtype": torch.int64, "device": result.device})
        same = graph.call_function(aten.eq.Tensor, (column, numbers))
        found = graph.call_function(aten.sum.dim_IntList, (same, [0]), {"dtype": result.dtype})
    scatter.replace_all_uses_with(found)
    graph.erase_node(scatter)


def _reason(error: BaseException) -> str:
    """What went wrong, in one line: torch.onnx wraps the failing operation in pages of advice."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    told = next((each for each in chain if str(each).startswith("Error when translating")), error)
    lines = [line.strip() for line in str(told).splitlines() if line.strip()] or ["no message"]
    root = chain[-1] if told is not chain[-1] and type(chain[-1]) is not type(told) else None
    because = f" ({type(root).__name__}: {first_line(root)[:200]})" if root is not None and str(root).strip() else ""
    return f"{type(told).__name__}: {_ANSI.sub('', lines[0])[:400]}{because}"
