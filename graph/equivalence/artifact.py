"""What can be compared: modules and programs, run with flat named outputs, and where the results of their layers stand.

A layer is a module that owns a weight. It is known by its module path, and its result is the last value that is
computed from its matmul within that module: past the bias, past a SLoRB branch, past the views around GPT-2's Conv1D.
"""

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx, nn

from sparsepass.graph.admission import named_outputs
from sparsepass.graph.fusion import split_siblings
from sparsepass.graph.hierarchy import Hierarchy
from sparsepass.graph.nodes import cut_of, linear_that_reads, module_path
from sparsepass.graph.packed_folder import is_packed_module
from sparsepass.graph.program import Program
from sparsepass.graph.support import EquivalenceError, evaluating

Observe = Callable[[str, Tensor], None]
"""Takes the module path of a layer and its result, in the order in which layers finish."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One node of a graph, reduced to what is needed to find the results of layers.

    Attributes:
        path: Module path of the innermost module it was traced in.
        reads: Names of the values it reads.
        writes: Names of the values it computes.
        is_matmul: Whether it multiplies by a weight.
        is_tensor: Whether its first value is a single tensor that may be a layer's result.
    """

    path: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    is_matmul: bool
    is_tensor: bool


def layer_results(steps: Sequence[Step]) -> dict[str, str]:
    """Find the value that each layer returns.

    Args:
        steps: The nodes in the order in which they run.

    Returns:
        Name of a value -> module path of the layer that returns it, in the order of the graph. A path occurs once for
        each call of its module.
    """
    readers: dict[str, list[int]] = {}
    for index, step in enumerate(steps):
        for name in step.reads:
            readers.setdefault(name, []).append(index)
    found: dict[int, str] = {}
    for index, step in enumerate(steps):
        if step.is_matmul and step.path:
            found[_last_within(steps, readers, index)] = step.path
    return {steps[index].writes[0]: found[index] for index in sorted(found)}


def _last_within(steps: Sequence[Step], readers: Mapping[str, list[int]], start: int) -> int:
    path = steps[start].path
    reached, stack = {start}, [start]
    while stack:
        for name in steps[stack.pop()].writes:
            for index in readers.get(name, ()):
                inside = steps[index].path == path or steps[index].path.startswith(f"{path}.")
                if inside and index not in reached:
                    reached.add(index)
                    stack.append(index)
    return max(index for index in reached if steps[index].is_tensor or index == start)


class CallNumbers:
    """Tells the calls of one module apart: ``mix``, ``mix#1``, ``mix#2``. Final."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def name(self, path: str) -> str:
        """Name of the next call of a module."""
        number = self._seen.get(path, 0)
        self._seen[path] = number + 1
        return f"{path}#{number}" if number else path


def canonical_path(path: str) -> str:
    """The model's own path of a module that stands in a wrapper (compiled, PEFT, a hierarchy's second call).

    >>> canonical_path("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    'model.layers.0.mlp.up_proj'
    >>> canonical_path("mix@1")
    'mix'
    """
    path = path.partition("@")[0]
    for prefix in ("_orig_mod.", "tree.", "base_model.model."):
        path = path.removeprefix(prefix)
    return path.removesuffix(".base_layer")


Inputs = Mapping[str, Tensor | None] | Tensor | Sequence[Tensor]


class Artifact(ABC):
    """Something that computes named outputs from named inputs."""

    @property
    @abstractmethod
    def description(self) -> str:
        """What it is, for messages."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The coarsest floating dtype among its weights."""

    @abstractmethod
    def run(self, inputs: Inputs, observe: Observe | None = None) -> dict[str, Tensor]:
        """Compute the outputs; with ``observe``, hand it the result of each layer too."""

    @abstractmethod
    def facts(self, layer: str) -> str:
        """What is known of one layer's weight; empty if nothing is."""


@final
class ModuleArtifact(Artifact):
    """Any nn.Module: run in evaluation mode, without gradients and without a cache; afterwards it is as it was.

    Layers are watched by forward hooks on the modules that own a weight of two or more axes.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        _check_values(self.description, [*module.named_parameters(), *module.named_buffers()])

    @property
    def description(self) -> str:
        """What it is."""
        return "hierarchy of a program" if isinstance(self._module, Hierarchy) else type(self._module).__name__

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest floating dtype among its parameters."""
        return coarsest(p.dtype for p in self._module.parameters())

    def run(self, inputs: Inputs, observe: Observe | None = None) -> dict[str, Tensor]:
        """Compute the outputs; see `Artifact.run`."""
        module = self._module
        args, kwargs = self._arguments(inputs)
        with torch.no_grad(), evaluating(module), named_outputs(module), _hooks(module, observe):
            return flat_outputs(module(*args, **kwargs))

    def facts(self, layer: str) -> str:
        """Nothing: a module keeps no record of its weights."""
        return ""

    def _arguments(self, inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        parameters = inspect.signature(self._module.forward).parameters
        tensors = [*self._module.parameters(), *self._module.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        floats = {p.dtype for p in self._module.parameters() if p.is_floating_point()}
        dtype = floats.pop() if len(floats) == 1 else None

        def moved(t: Tensor) -> Tensor:
            return t.to(device, dtype if t.is_floating_point() else None)

        if not isinstance(inputs, Mapping):
            given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
            return tuple(moved(t) for t in given), _flags(self._module, parameters)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) or isinstance(self._module, Hierarchy)
        named = fitting(inputs, None if takes_any else parameters, self.description)
        return (), {name: moved(t) for name, t in named.items()} | _flags(self._module, parameters)


@final
class ProgramArtifact(Artifact):
    """A program: its flat graph is run as it is, node by node where layers are watched (same operators, same bits)."""

    def __init__(self, program: Program) -> None:
        self._program = program
        _check_values(self.description, program.tensors().items())

    @property
    def description(self) -> str:
        """What it is."""
        source = (self._program.origin.model_class or "").removeprefix("transformers.")
        passes = ", ".join(record.text.partition("{")[0] for record in self._program.history)
        return "program" + (f" of {source}" if source else "") + (f" ({passes})" if passes else "")

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest floating dtype among its parameters."""
        return coarsest(p.dtype for p in self._program.parameters())

    def run(self, inputs: Inputs, observe: Observe | None = None) -> dict[str, Tensor]:
        """Compute the outputs; see `Artifact.run`."""
        program = self._program
        examples, device = program.example_inputs, program.device
        if isinstance(inputs, Mapping):
            bound = program.flat_inputs(**fitting(inputs, program.input_names, self.description))
        else:
            bound = program.flat_inputs(*((inputs,) if isinstance(inputs, Tensor) else inputs))
        flat = {name: t.to(device, examples[name].dtype) for name, t in bound.items()}
        with torch.no_grad(), program.checked(flat):
            leaves = program.run(flat) if observe is None else _Watching(program, observe).run(*flat.values())
        return dict(zip(program.output_names, leaves, strict=True))

    def facts(self, layer: str) -> str:
        """What passes did to the layer's weight."""
        program = split_siblings(self._program)
        by_name = {node.name: node for node in program.graph_module.graph.nodes}
        said = []
        for site in program.sites():
            if layer not in {site.name, *(canonical_path(module_path(by_name[name])) for name in site.nodes)}:
                continue
            state = program.sparse.get(site.weight)
            grid = program.quantized.get(site.weight)
            rounded = "" if grid is None else f", rounded to {grid.grid.text}"
            if state is None:
                said.append(f"{site.weight} {list(site.shape)} is dense{rounded}")
                continue
            mask = f"mask {state.mask}" if state.mask else "mask folded"
            branch = f"SLoRB branch {state.branch.weight}, k={state.branch.k}" if state.branch else "no SLoRB branch"
            if state.branch and (beside := program.quantized.get(state.branch.weight)) is not None:
                branch += f", rounded to {beside.grid.text}"
            said.append(
                f"{site.weight} {list(site.shape)} is {state.pattern} along axis {state.axis}, {mask}, {branch}{rounded}"
            )
        return "; ".join(said)


class _Watching(fx.Interpreter):
    """Runs a program's graph and hands on the results of its layers."""

    def __init__(self, program: Program, observe: Observe) -> None:
        super().__init__(program.graph_module)
        self._observe = observe
        nodes = list(program.graph_module.graph.nodes)
        weighted = {name for site in program.sites() for name in site.nodes}
        weighted |= {node.name for node in nodes if node.target is torch.ops.aten.embedding.default}
        self._layers = dict(layer_results([_step(node, weighted) for node in nodes]))
        for weight, parts in program.fused.items():  # beside the fused layer: an ONNX file has that one
            linear = linear_that_reads(program.graph_module.graph, weight)
            cut = None if linear is None else cut_of(linear, tuple(part.rows for part in parts))
            self._layers |= {
                node.name: canonical_path(parts[int(str(node.args[1]))].name) for node in (cut.users if cut else ())
            }

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; see `fx.Interpreter`."""
        value = super().run_node(n)
        if n.name in self._layers and isinstance(value, Tensor) and value.is_floating_point():
            self._observe(self._layers[n.name], value)
        return value


def _step(node: fx.Node, matmuls: Collection[str]) -> Step:
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return Step(
        path=canonical_path(module_path(node)),
        reads=tuple(source.name for source in node.all_input_nodes),
        writes=(node.name,),
        is_matmul=node.name in matmuls,
        is_tensor=len(returns) == 1 and str(returns[0].type) == "Tensor",
    )


def flat_outputs(output: Any) -> dict[str, Tensor]:
    """Name the tensors of a model's output as programs do: ``logits``, ``hidden_states.0``; caches are left out.

    >>> sorted(flat_outputs({"logits": torch.zeros(1), "states": (torch.zeros(1), None)}))
    ['logits', 'states.0']
    """
    return dict(_leaves(output, ""))


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix or "output", value
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))


def fitting(inputs: Mapping[str, Any], accepted: Collection[str] | None, where: str) -> dict[str, Tensor]:
    """Keep the inputs that an artifact takes; leave out those it does not take only where they say nothing.

    An attention mask of ones, token types of zeros, and positions 0, 1, 2... are what a model assumes anyway.

    Args:
        inputs: Name -> tensor; None counts as not given.
        accepted: Names it takes; None if it takes any.
        where: The artifact, for the message.

    Raises:
        EquivalenceError: If an input is not a tensor, or is not taken although it says something.
    """
    kept: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if value is None or (isinstance(value, bool) and accepted is not None and name not in accepted):
            continue
        if not isinstance(value, Tensor):
            raise EquivalenceError(f"input {name!r} is a {type(value).__name__}; inputs are tensors")
        if accepted is None or name in accepted:
            kept[name] = value
        elif not _says_nothing(name, value):
            raise EquivalenceError(
                f"{where} does not take the input {name!r} (it takes {', '.join(sorted(accepted))}), and dropping it "
                "would change the result; leave it out on both sides, or capture or export with it"
            )
    return kept


def _says_nothing(name: str, value: Tensor) -> bool:
    if name.endswith("attention_mask"):
        return bool((value == 1).all())
    if name == "token_type_ids":
        return bool((value == 0).all())
    if name in ("position_ids", "cache_position"):
        return bool((value == torch.arange(value.shape[-1], device=value.device)).all())
    return False


def coarsest(dtypes: Any) -> torch.dtype:
    """The floating dtype with the largest rounding error; float32 if there is none."""
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _check_values(where: str, tensors: Any) -> None:
    for name, tensor in tensors:
        if tensor.is_meta:
            raise EquivalenceError(f"{where} has no values yet ({name} is on the meta device); fill it from a checkpoint")


def _flags(module: nn.Module, parameters: Mapping[str, Any]) -> dict[str, Any]:
    flags: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    if getattr(getattr(module, "config", None), "return_dict", True) is False:
        flags["return_dict"] = True
    return flags


@contextlib.contextmanager
def _hooks(module: nn.Module, observe: Observe | None) -> Iterator[None]:
    """Watch the modules that own a weight; where an adapter wraps a layer, the wrapper is the layer."""
    handles = []
    wrappers = {path.removesuffix(".base_layer") for path, _ in module.named_modules() if path.endswith(".base_layer")}
    try:
        for path, child in module.named_modules() if observe is not None else ():
            owns = any(p.dim() > 1 and p.is_floating_point() for p in child.parameters(recurse=False))
            owns = owns or is_packed_module(child)
            inside = any(path.startswith(f"{wrapper}.") for wrapper in wrappers)
            name = canonical_path(path)
            if name and (path in wrappers or (owns and not inside)):
                handles.append(child.register_forward_hook(_hook(name, observe)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, observe: Observe | None) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        if observe is not None and isinstance(output, Tensor) and output.is_floating_point():
            observe(name, output)

    return hook
