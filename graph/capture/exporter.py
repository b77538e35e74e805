"""Capturing a model as a Program: torch.export in non-strict mode, through transformers' exporter for its models."""

import contextlib
import gc
import inspect
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_symbols

from sparsepass.graph import structure
from sparsepass.graph.admission import check_model, plain_settings, unwrapped
from sparsepass.graph.binding import FLAGS_WITHOUT_EFFECT
from sparsepass.graph.capture.examples import example_inputs_for
from sparsepass.graph.capture.faithful import check_against
from sparsepass.graph.capture.untouched import untouched
from sparsepass.graph.configuration import FETCHED
from sparsepass.graph.limits import end_before, limits_of, position_limit
from sparsepass.graph.ops import ASSERTIONS
from sparsepass.graph.program import Program
from sparsepass.graph.records import Origin
from sparsepass.graph.saved import OF_ZEROS
from sparsepass.graph.support import CaptureError, evaluating, first_line, one_at_a_time, quiet_export

# Tokens of the examples made here: few, or as many as it takes for a model that asks whether there are few. Primes are
# multiples of nothing that a model could ask for.
_TOKENS = (8, 37, 149, 521)
_FAR = 4 * _TOKENS[-1]
_SOUND = ("input_values", "inputs")
_LOG = logging.getLogger(__name__)


@one_at_a_time
def capture(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | tuple[Tensor, ...] | Tensor | None = None,
    *,
    dynamic_axes: Mapping[str, tuple[int, ...]] | None = None,
    inplace: bool = False,
) -> Program:
    """Capture a model as a Program.

    Args:
        model: A transformers model or any nn.Module, on one device (the meta device too: see `Program.fill`). Captured
            in evaluation mode; its mode and configuration are as before afterwards.
        example_inputs: Arguments of its forward, tensors only, with a batch of at least 2. A transformers model can do
            without: small random ones are made from its configuration.
        dynamic_axes: Input name -> axes that may vary. By default batch, sequence, and image height and width do, where
            the model allows it.
        inplace: Whether the program takes over the model's own tensors (saves memory; leave the model alone from then
            on). By default it has copies.

    Returns:
        The program, bit-equal to the model on the example inputs.

    Raises:
        CaptureError: If the model cannot be captured, with the place in its source and what to try; or if it is already
            quantized, wrapped by PEFT, or spread over several devices.

    Example:
        >>> import torch
        >>> program = capture(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()), torch.randn(2, 8))
        >>> program(torch.ones(3, 8)).shape
        torch.Size([3, 4])
    """
    model = unwrapped(model)
    check_model(model)
    origin = _origin(model)
    with untouched(model), evaluating(model), plain_settings(model), torch.no_grad():
        program = _captured(model, example_inputs, dynamic_axes)
        program.origin = origin
        check_against(model, program)
    for name, tensor in program.tensors().items():
        if not inplace:
            program.set_tensor(name, tensor.detach().clone())
    return program


def _captured(model: nn.Module, example_inputs: Any, dynamic_axes: Mapping[str, tuple[int, ...]] | None) -> Program:
    """The program around the model's own tensors. Of our own examples a longer one is taken where that rids it of its end.

    A model that works in chunks, one by one, has an end whatever the example: it keeps the shortest.
    """
    if example_inputs is not None:
        return _traced(model, example_inputs, dynamic_axes)
    program = _traced(model, example_inputs_for(model, _TOKENS[0]), dynamic_axes)
    most = position_limit(getattr(model, "config", None))
    for tokens in _TOKENS[1:]:
        if tokens <= (most or tokens) and end_before(program.limits, program.example_inputs, tokens):
            with contextlib.suppress(CaptureError):
                other = _traced(model, example_inputs_for(model, tokens), dynamic_axes)
                if not end_before(other.limits, other.example_inputs, min(most or _FAR, _FAR)):
                    return other
    return program


def _traced(model: nn.Module, given: Any, dynamic_axes: Mapping[str, tuple[int, ...]] | None) -> Program:
    named = _named_inputs(model, given)
    asked = dynamic_axes if dynamic_axes is not None else _default_axes(named)
    axes = {name: tuple(found) for name, found in asked.items()}
    if unknown := sorted(set(axes) - set(named)):
        raise CaptureError(f"dynamic_axes names {unknown}, but the inputs are {sorted(named)}")
    return _to_program(model, _export(model, named, axes), named)


def program_from_graph_module(graph_module: fx.GraphModule, example_inputs: Mapping[str, Tensor]) -> Program:
    """Make a program around a graph that somebody else exported, such as an `ExportedProgram.module()`.

    The program is flat on both sides: it takes the graph's placeholders by name and returns the tuple of its outputs.
    It reads the graph's own parameters, in a graph and a module tree of its own, so that rewriting it leaves the
    caller's as they are. An output head is recognised only where its result is an output of the graph: there is no
    model to ask.

    Args:
        graph_module: The exported graph, whatever its calling convention.
        example_inputs: A tensor for each placeholder, by its name.

    Returns:
        A program without a model class; axes that are symbolic in the graph are its dynamic axes.

    Raises:
        CaptureError: If a placeholder has no example, or the graph holds nested graphs.

    Example:
        >>> exported = torch.export.export(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), (torch.randn(2, 8),))
        >>> program = program_from_graph_module(exported.module(), {"input": torch.randn(2, 8)})
        >>> program.output_names, [site.name for site in program.sites()]
        (('0',), ['0'])
    """
    aliases = _aliases(graph_module)
    flat = fx.GraphModule(graph_module, _flat_graph(graph_module.graph, aliases, graph_module))
    placeholders = [node for node in flat.graph.nodes if node.op == "placeholder"]
    if missing := [n.target for n in placeholders if not isinstance(example_inputs.get(str(n.target)), Tensor)]:
        raise CaptureError(f"the graph's inputs {missing} need a tensor each; given: {sorted(example_inputs)}")
    num_outputs = len(flat.graph.output_node().args[0])  # type: ignore[arg-type]
    return Program(
        flat,
        output_structure={"kind": "tuple", "items": ["tensor"] * num_outputs},
        example_inputs={str(node.target): example_inputs[str(node.target)] for node in placeholders},
        dynamic_axes={str(node.target): _symbolic_axes(node) for node in placeholders},
        limits=limits_of(placeholders),
        aliases=aliases,
    )


def _symbolic_axes(placeholder: fx.Node) -> tuple[int, ...]:
    shape = getattr(placeholder.meta.get("val"), "shape", ())
    return tuple(axis for axis, size in enumerate(shape) if free_symbols(size))  # a SymInt may have been found to be fixed


def _named_inputs(model: nn.Module, given: Any) -> dict[str, Tensor]:
    if isinstance(given, Tensor):
        given = (given,)
    parameters = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if isinstance(given, list | tuple):
        if len(given) > len(parameters):
            raise CaptureError(f"forward takes {len(parameters)} arguments ({', '.join(parameters)}), got {len(given)}")
        given = dict(zip(parameters, given, strict=False))
    if not isinstance(given, Mapping):
        raise CaptureError(
            f"example_inputs is a tensor, a tuple of tensors, or a dict of input name -> tensor, not a {type(given).__name__}"
        )
    named = {
        name: value
        for name, value in given.items()
        if value is not None and not (name in FLAGS_WITHOUT_EFFECT and value is FLAGS_WITHOUT_EFFECT[name])
    }
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"example input {name!r} is a {type(value).__name__} ({value!r}); a program's inputs are tensors, so set "
                "other arguments in the model's configuration, or wrap the model"
            )
        if value.numel() == 0:
            raise CaptureError(f"example input {name!r} is empty (shape {tuple(value.shape)}); give at least 2 of each")
    if not named:
        raise CaptureError("example_inputs is empty; give at least one tensor")
    return named


def _default_axes(named: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Batch always; the second axis of [B, T] and [B, T, D]; choices and tokens; height and width of images; samples of sound.

    Mel spectrograms are fixed.
    """
    axes = {}
    for name, tensor in named.items():
        by_rank: dict[int, tuple[int, ...]] = {0: (), 1: (0,), 2: (0, 1), 3: (0, 1), 4: (0, 2, 3)}
        found = by_rank.get(tensor.dim(), (0,))
        if tensor.dim() == 2 and tensor.is_floating_point() and name not in _SOUND:
            found = (0,)
        if tensor.dim() == 3 and not tensor.is_floating_point():
            found = (0, 1, 2)
        if name == "input_features":
            found = (0,)
        axes[name] = tuple(axis for axis in found if tensor.shape[axis] > 1)
    return axes


def _export(model: nn.Module, named: Mapping[str, Tensor], axes: Mapping[str, tuple[int, ...]]) -> torch.export.ExportedProgram:
    shapes = {name: dict.fromkeys(axes.get(name, ()), torch.export.Dim.AUTO) for name in named}
    try:
        with quiet_export("transformers", "torch"), _graph_dumps_kept_back(), _without_collection(), untouched(model):
            if _is_pretrained(model):
                return _export_pretrained(model, named, shapes)
            return torch.export.export(model, (), kwargs=dict(named), dynamic_shapes=_by_signature(model, shapes), strict=False)
    except Exception as error:  # torch.export raises anything the model's own code raises
        raise CaptureError(
            f"{type(model).__name__} cannot be captured{_where(error)}: {type(error).__name__}: {first_line(error)}. "
            "Common causes: control flow that depends on tensor values (use torch.where or torch.cond), .item() or .numpy() "
            "in forward, inputs that the model does not take. Try other example_inputs, fixed sizes "
            "(dynamic_axes={}), or capture a submodule"
        ) from error


def _export_pretrained(
    model: nn.Module, named: Mapping[str, Tensor], shapes: Mapping[str, Any]
) -> torch.export.ExportedProgram:
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    config = DynamoConfig(dynamic=True, dynamic_shapes=dict(shapes))
    return run_exporter(DynamoExporter(), model, named, config)  # type: ignore[no-any-return]


def run_exporter(exporter: Any, model: nn.Module, inputs: Mapping[str, Tensor], config: Any) -> Any:
    """Run one of transformers' exporters and return what it makes of a model.

    In older versions (5.17 to 5.20 seen) ``export`` returns it; in newer ones ``export_program`` does, with metadata beside it.
    """
    given = dict(inputs)  # the exporter takes its own options out of it
    if hasattr(exporter, "export_program"):
        return exporter.export_program(model, given, config)[0]
    return exporter.export(model, given, config)


@contextlib.contextmanager
def _graph_dumps_kept_back() -> Iterator[None]:
    """torch.export (2.13) prints the whole graph before some of its errors: it goes to the log, for those who ask for it."""
    with io.StringIO() as printed:
        try:
            with contextlib.redirect_stderr(printed):
                yield
        finally:
            if text := printed.getvalue().strip():
                _LOG.debug("torch.export printed:\n%s", text)


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Pause the cycle collector: a trace only adds objects, and looking through them again and again takes a fifth of it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _to_program(
    model: nn.Module,
    exported: torch.export.ExportedProgram,
    named: Mapping[str, Tensor],
) -> Program:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = exported.module(check_guards=False)
    aliases = _aliases(model)
    flat = fx.GraphModule(module, _flat_graph(module.graph, aliases, module))
    outputs = structure.describe(module.graph._codegen.pytree_info.out_spec)  # type: ignore[attr-defined]
    (leaves,) = flat.graph.output_node().args
    outputs = structure.without(outputs, _leaves_without_tensor(leaves))  # type: ignore[arg-type]
    flat.graph.output_node().args = (tuple(leaf for leaf in leaves if leaf is not None),)  # type: ignore[union-attr]
    _write_outer_products(flat.graph)
    flat.recompile()
    placeholders = [node for node in flat.graph.nodes if node.op == "placeholder"]
    program = Program(
        flat,
        output_structure=outputs,
        example_inputs={name: t.detach().clone() for name, t in named.items()},
        dynamic_axes={str(node.target): _symbolic_axes(node) for node in placeholders},
        limits=limits_of(placeholders),
        aliases=aliases,
    )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in aliases:
            program.set_tensor(name, tensor)
    return program


def _leaves_without_tensor(leaves: Sequence[Any]) -> list[bool]:
    """Which outputs are None; numbers among them are refused."""
    for leaf in leaves:
        value = leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf
        if value is not None and not isinstance(value, Tensor):
            raise CaptureError(
                f"the model returns a {type(value).__name__} among its outputs, and a program returns tensors; wrap the model "
                "so that it leaves that out, or returns it as a tensor"
            )
    return [leaf is None for leaf in leaves]


def _flat_graph(graph: fx.Graph, aliases: Mapping[str, str], module: fx.GraphModule) -> fx.Graph:
    """Copy a graph with plain placeholders and output, without guards and dtype assertions, reading canonical names."""
    flat = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_module" and str(node.target).startswith("_guards"):
            continue
        if node.target in ASSERTIONS or (node.op == "get_attr" and not node.users):
            continue
        if node.op == "get_attr" and isinstance(attrgetter(str(node.target))(module), fx.GraphModule):
            raise CaptureError(
                f"the model runs a nested graph ({node.target}: torch.cond, autocast or a loop), which passes cannot "
                "rewrite yet; capture it outside of torch.autocast, or without that control flow"
            )
        copies[node] = flat.node_copy(node, lambda n: copies[n])
        copies[node].target = OF_ZEROS.get(node.target, node.target)
        if node.op == "get_attr":
            copies[node].target = aliases.get(str(node.target), str(node.target))
    flat.lint()
    return flat


def _write_outer_products(graph: fx.Graph) -> None:
    """Write a product over an inner dimension of 1 as a multiplication, which it is, bit for bit outside of autocast.

    Rotary embeddings of older transformers are made by one. Their model switches autocast off for it, which a graph does not
    know; autocast leaves multiplications in float32.
    """
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.matmul.default:
            shapes = [node.args[i].meta["val"].shape for i in (0, 1)]
            inner = [shape[axis] for shape, axis in zip(shapes, (-1, -2), strict=True) if len(shape) >= 2]
            if len(inner) == 2 and all(isinstance(size, int) and size == 1 for size in inner):
                node.target = torch.ops.aten.mul.Tensor


def _aliases(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    aliases = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    return aliases


def _origin(model: Any) -> Origin:
    import transformers

    versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    signature = tuple(p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD)
    if not _is_pretrained(model):
        return Origin(signature=signature, versions=versions)
    heads = []
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        heads = [f"{name}.weight" if name else "weight" for name, m in model.named_modules() if m is head]
    kind = type(model)
    known = getattr(transformers, kind.__name__, None) is kind
    generation = getattr(model, "generation_config", None)
    return Origin(
        model_class=f"transformers.{kind.__name__}" if known else None,
        config=_written(model.config),
        generation_config=json.loads(generation.to_json_string(use_diff=False)) if generation is not None else None,
        output_heads=tuple(heads),
        signature=signature,
        versions=versions,
    )


def _written(config: Any) -> dict[str, Any]:
    """A configuration as JSON. It describes plain weights and a class of transformers: what it said of others goes."""
    facts: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))  # to_dict() has keys that JSON turns into others
    return {key: value for key, value in facts.items() if key not in ("quantization_config", *FETCHED)}


def _is_pretrained(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _by_signature(model: nn.Module, shapes: Mapping[str, Any]) -> Any:
    """torch.export wants the shapes of ``**kwargs`` nested under that name."""
    parameters = inspect.signature(model.forward).parameters
    variadic = next((p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
    plain = {name: shape for name, shape in shapes.items() if name in parameters}
    rest = {name: shape for name, shape in shapes.items() if name not in parameters}
    return {**plain, variadic: rest} if rest and variadic else {**plain, **rest}


def _where(error: BaseException) -> str:
    """The last line of the model's own source on the way to an error."""
    place = ""
    import transformers

    here, library = Path(__file__).parent, Path(transformers.__file__).parent
    folders = (Path(torch.__file__).parent, library / "exporters", here, here.resolve())
    machinery = (contextlib.__file__, *(f"{folder}{os.sep}" for folder in folders))
    traceback = error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith(machinery) and "<" not in file:
            place = f" (at {file}, line {traceback.tb_lineno}, in {traceback.tb_frame.f_code.co_name})"
        traceback = traceback.tb_next
    return place
