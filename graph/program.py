"""Program: a captured model as a flat graph, with everything that is known about it."""

import copy
import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from sparsepass.graph import structure
from sparsepass.graph.binding import bound_arguments
from sparsepass.graph.limits import check_input, refused
from sparsepass.graph.nodes import retarget_device
from sparsepass.graph.records import (
    FusedPart,
    Origin,
    PassRecord,
    QuantizedState,
    Report,
    SparseState,
    changes_told_by_history,
    from_json,
    fused_part_from_json,
    pass_record_from_json,
    sparse_state_from_json,
    to_json,
)
from sparsepass.graph.saved import (
    EXAMPLE_PREFIX,
    FORMAT_VERSION,
    PROGRAM_FILE,
    Guard,
    check_as_written,
    graph_from_json,
    graph_to_json,
    read_state,
    write_state,
)
from sparsepass.graph.sites import Site, find_sites, idle_layers
from sparsepass.graph.spec import check_program
from sparsepass.graph.support import ProgramFormatError, SparsepassError, replaced_folder


class Program(nn.Module):
    """A model captured as a flat torch.fx graph. Final.

    It is called like the model and returns what the model returns. Its parameters carry the model's names. Passes rewrite
    `graph_module`; `sparse` and `history` tell what they did. Made by `capture` or `apply_passes`, not by hand.

    Behaviour that differs from the model's: dropout and batch norm stay as they were when it was captured (evaluation mode
    by default), whatever `train()` says; a dtype is changed on the model before capture, not on the program.

    Attributes:
        graph_module: Flat graph; its placeholders are `input_names`, its output the flat tuple `output_names`.
        input_names: Names of the inputs.
        output_structure: What stands around the output tensors, as JSON.
        example_inputs: Inputs it was captured with.
        dynamic_axes: Input name -> axes that may vary.
        limits: Conditions on the sizes along these axes, such as ``input_ids[1] <= 8``, beyond which the graph is wrong.
        aliases: Other name -> name in the graph, for parameters with several names.
        origin: The source model's class and configuration.
        sparse: Weight name -> what passes did to it.
        fused: Name of a fused weight -> the layers that it stands for; see `sparsepass.graph.fusion`.
        quantized: Weight name -> the grid of integers that the graph rounds it to.
        history: Every pass applied, with its configuration and evidence.
        retraining: What `retrain` did, one JSON object a run: settings, data, validations, flips.
        guard: What a program that was read from a file may take; None for one that was made here.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        *,
        output_structure: Any,
        example_inputs: Mapping[str, Tensor],
        dynamic_axes: Mapping[str, tuple[int, ...]],
        limits: tuple[str, ...] = (),
        aliases: Mapping[str, str] | None = None,
        origin: Origin | None = None,
        sparse: Mapping[str, SparseState] | None = None,
        fused: Mapping[str, tuple[FusedPart, ...]] | None = None,
        quantized: Mapping[str, QuantizedState] | None = None,
        history: tuple[PassRecord, ...] = (),
        retraining: tuple[Mapping[str, Any], ...] = (),
    ) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.output_structure = output_structure
        self.example_inputs = dict(example_inputs)
        self.dynamic_axes = {name: tuple(axes) for name, axes in dynamic_axes.items()}
        self.limits = tuple(limits)
        self.aliases = dict(aliases or {})
        self.origin = origin or Origin()
        self.sparse = dict(sparse or {})
        self.fused = dict(fused or {})
        self.quantized = dict(quantized or {})
        self.history = history
        self.retraining = retraining
        self.training = False
        self.guard: Guard | None = None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in the graph's order."""
        return tuple(str(n.target) for n in self.graph_module.graph.nodes if n.op == "placeholder")

    @property
    def output_names(self) -> tuple[str, ...]:
        """Flat names of the outputs, such as ``logits``."""
        return tuple(structure.names(self.output_structure))

    @property
    def recipe(self) -> str:
        """The passes applied so far as one line of text, which `apply_passes` takes."""
        return ",".join(record.text for record in self.history)

    @property
    def device(self) -> torch.device:
        """Device of the parameters; that of the example inputs if there are none."""
        return next(iter((self.tensors() or self.example_inputs).values())).device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph. Takes the model's arguments (those it was captured with), returns the model's output type.

        A missing attention mask means all ones and missing token types all zeros, as in the models themselves.

        Raises:
            SparsepassError: If an argument is missing, or was not part of the capture.
        """
        return structure.build(self.output_structure, self.run(self.flat_inputs(*args, **kwargs)))

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors `output_names` for inputs as `flat_inputs` gives them. What fails in a program that was read is told."""
        with self.checked(inputs):
            return list(self.graph_module(*inputs.values()))

    def checked(self, inputs: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Around whatever runs the graph: nothing, unless the program was read from a file. See `Guard.checked`."""
        if self.guard is None:
            return nullcontext()
        return self.guard.checked(self.graph_module.graph, self.tensors, inputs)

    def flat_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Bind arguments as the model's forward would: input name -> tensor, in the graph's order.

        Raises:
            SparsepassError: If an argument is missing, or was not part of the capture.
        """
        names = self.input_names
        bound = bound_arguments(args, kwargs, names=names, order=self.origin.signature or names)
        for name, value in bound.items():
            check_input(name, value, self.example_inputs[name], self.dynamic_axes.get(name, ()))
        shapes = tuple((name, tuple(value.shape)) for name, value in bound.items())
        is_traced = not all(type(size) is int for _, shape in shapes for size in shape)
        if not is_traced and (words := refused(self.limits, shapes)):
            raise SparsepassError(f"{words}; capture the model again with example_inputs of such sizes")
        return bound

    def sites(self) -> tuple[Site, ...]:
        """Every linear-like operation of the graph, in the order in which it runs, with reasons for those left alone."""
        branches = [state.branch for state in self.sparse.values() if state.branch is not None]
        ours = {name for branch in branches for name in (branch.weight, branch.projection)}
        found = find_sites(self.graph_module, output_heads=self.origin.output_heads, aliases=self.aliases)
        apart = {weight: tuple(part.weight for part in parts) for weight, parts in self.fused.items()}
        return tuple(replace(site, parts=apart.get(site.weight, ())) for site in found if site.weight not in ours)

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the graph, persistent or not, by name. Tied names are in `aliases`."""
        return dict(self.graph_module.named_parameters(remove_duplicate=True)) | dict(self.graph_module.named_buffers())

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of that name, or the one it is tied to.

        Raises:
            KeyError: If there is none.
        """
        try:
            found = attrgetter(self.aliases.get(name, name))(self.graph_module)
        except AttributeError as error:
            raise KeyError(name) from error
        if not isinstance(found, Tensor):
            raise KeyError(name)
        return found

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Put a tensor in the place of a parameter or buffer (or beside them). The old tensor is left as it is.

        A parameter stays a parameter with the same requires_grad; anything new is a buffer unless it is a Parameter.
        """
        path, _, attribute = self.aliases.get(name, name).rpartition(".")
        module: nn.Module = self.graph_module
        for part in path.split(".") if path else ():
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        old = module._parameters.get(attribute)
        if old is not None and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        if isinstance(value, nn.Parameter):
            module.register_parameter(attribute, value)
        else:
            module.register_buffer(attribute, value)

    def write_tensor(self, name: str, value: Tensor) -> None:
        """Copy values into a parameter or buffer, whoever else holds it (the model, after ``inplace=True``)."""
        self.tensor(name).detach().copy_(value)

    def delete_tensor(self, name: str) -> None:
        """Remove a parameter or buffer that no node reads any more."""
        path, _, attribute = name.rpartition(".")
        delattr(module := self.graph_module.get_submodule(path), attribute)
        while path and not (module._parameters or module._buffers or module._modules):
            path, _, attribute = path.rpartition(".")
            delattr(module := self.graph_module.get_submodule(path), attribute)

    def train(self, mode: bool = True) -> Self:
        """Set the flag `training`. The graph stays as captured: see the class."""
        self.training = mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = {name: (t.dtype, t.device) for name, t in self.tensors().items()}
        scales = {state.scales: self.tensor(state.scales) for state in self.quantized.values()}
        for name, (dtype, _) in before.items():
            if name not in scales and dtype.is_floating_point and (became := fn(torch.empty(0, dtype=dtype)).dtype) != dtype:
                raise SparsepassError(
                    f"a program keeps the dtype it was captured with ({dtype}, {name}): its graph holds it in its casts; "
                    f"convert the model to {became} and capture it again, or use program.to_model().to({became})"
                )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in scales.items():  # bfloat16, whatever the weights are
            if (now := self.tensor(name)).dtype != tensor.dtype:
                self.set_tensor(name, tensor.to(now.device))
        self.example_inputs = {name: fn(t) if not t.is_meta else t for name, t in self.example_inputs.items()}
        devices = {old: self.tensors()[name].device for name, (_, old) in before.items()}
        for old, new in devices.items():
            if old != new:
                retarget_device(self.graph_module, old, new)
        return self

    def report(self) -> Report:
        """What each pass did at each site, and why not; `str()` of it is a table. Fused layers are told one by one."""
        from sparsepass.graph.fusion import split_siblings

        apart, idle = split_siblings(self), idle_layers(self.graph_module, self.tensors())
        return Report(history=self.history, sites=apart.sites(), sparse=apart.sparse, idle=idle, quantized=apart.quantized)

    def hierarchy(self) -> nn.Module:
        """The model's original module tree, its layers as modules, over this program's own parameters.

        See `sparsepass.graph.hierarchy.hierarchy`.
        """
        from sparsepass.graph.hierarchy import hierarchy

        return hierarchy(self)

    def to_model(self) -> nn.Module:
        """The model's own class with masks folded and branches attached: `generate()` and the rest of it work.

        See `sparsepass.graph.model.to_model`.
        """
        from sparsepass.graph.model import to_model

        return to_model(self)

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the program to a folder: `program.json` (graph, history, configuration) and `program.safetensors`.

        Args:
            folder: Where to write. Nothing half-written is left there, whatever happens.
            force: Whether a folder that is not empty is replaced, if this library wrote it.

        Raises:
            SparsepassError: If the folder is not free, the program has no weights yet, or it calls what none may that is saved.
        """
        with replaced_folder(folder, force=force) as staging:
            self.save_into(staging)

    def save_into(self, folder: Path) -> None:
        """Write the program's two files into a folder that the caller fills and moves into place."""
        write_state(folder, *self._state())

    @classmethod
    def load(cls, folder: str | Path, *, check_patterns: bool = True) -> "Program":
        """Read a program that `save` wrote. Bit-equal; runs nothing that the folder brings.

        Args:
            folder: What `save` wrote.
            check_patterns: Whether masks that are not N:M, and edited files, are refused; the checker tells where.

        Raises:
            ProgramFormatError: If the folder holds no program, a truncated or edited one, or one of a newer format.
        """
        document, tensors = read_state(Path(folder))
        try:
            program = _from_state(document, tensors, check_patterns=check_patterns)
            program.guard = Guard.of(program.graph_module.graph, program.tensors(), program.example_inputs)
        except ProgramFormatError as error:
            raise ProgramFormatError(f"{Path(folder) / PROGRAM_FILE} is no sound program: {error}") from error
        except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
            raise ProgramFormatError(f"{Path(folder) / PROGRAM_FILE} is damaged ({error!r}); save the program again") from error
        if check_patterns:
            check_as_written(Path(folder))
        return program

    def sharing(self, **changes: Any) -> "Program":
        """A program with the same tensors and facts, but for the fields given, such as ``sparse``."""
        fields = {name: getattr(self, name) for name in inspect.signature(Program.__init__).parameters if name != "self"}
        program = Program(**(fields | changes)).train(self.training)
        program.guard = self.guard
        return program

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_state, self._state()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Program":
        """Copies the graph itself, so that a program whose operators cannot be saved can still be copied."""
        tensors = {name: copy.deepcopy(t.detach(), memo) for name, t in self._saved_tensors().items()}
        graph = copy.deepcopy(self.graph_module.graph, {})
        program = _from_state(copy.deepcopy(self._document()), tensors, graph, check_patterns=False)
        program.guard = self.guard
        return program

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The whole program as JSON and tensors; the JSON says which tensors are parameters."""
        return {**self._document(), "graph": graph_to_json(self.graph_module.graph)}, self._saved_tensors()

    def _document(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "output_structure": self.output_structure,
            "dynamic_axes": {name: list(axes) for name, axes in self.dynamic_axes.items()},
            "limits": list(self.limits),
            "aliases": self.aliases,
            "parameters": {name: p.requires_grad for name, p in self.graph_module.named_parameters()},
            "origin": to_json(self.origin),
            "sparse": to_json(self.sparse),
            "history": to_json(self.history),
            "retraining": to_json(self.retraining),
            "training": self.training,
            **({"fused": to_json(self.fused)} if self.fused else {}),  # earlier versions read programs without these
            **({"quantized": to_json(self.quantized)} if self.quantized else {}),
        }

    def _saved_tensors(self) -> dict[str, Tensor]:
        return self.tensors() | {f"{EXAMPLE_PREFIX}{name}": t for name, t in self.example_inputs.items()}


def _from_state(
    document: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    graph: fx.Graph | None = None,
    *,
    check_patterns: bool = True,
) -> Program:
    structure.check(document["output_structure"])
    examples = {name: t for name, t in tensors.items() if name.startswith(EXAMPLE_PREFIX)}
    own = {name: t for name, t in tensors.items() if name not in examples}
    own |= {name: nn.Parameter(own[name].detach(), grad) for name, grad in document["parameters"].items() if name in own}
    origin = document["origin"]
    lists = {name: tuple(origin[name]) for name in ("output_heads", "signature")}
    program = Program(
        fx.GraphModule(nn.Module(), fx.Graph()),
        output_structure=document["output_structure"],
        example_inputs={name.removeprefix(EXAMPLE_PREFIX): t for name, t in examples.items()},
        dynamic_axes={name: tuple(axes) for name, axes in document["dynamic_axes"].items()},
        limits=tuple(document.get("limits", ())),
        aliases=document["aliases"],
        origin=Origin(**(origin | lists)),
        sparse={name: sparse_state_from_json(state) for name, state in document["sparse"].items()},
        fused={w: tuple(map(fused_part_from_json, parts)) for w, parts in document.get("fused", {}).items()},
        quantized={name: QuantizedState(**state) for name, state in document.get("quantized", {}).items()},
        history=tuple(pass_record_from_json(record) for record in document["history"]),
        retraining=tuple(from_json(list(document.get("retraining", ())))),
    )
    for name, tensor in own.items():
        program.set_tensor(name, tensor)
    if document["format_version"] < 2:
        for weight, told in changes_told_by_history(program.history, program.retraining).items():
            if weight in program.sparse:
                with_sparse(program, weight, changed_by=told)
    graph = graph if graph is not None else graph_from_json(document["graph"])
    check_program(program, graph, patterns=check_patterns)
    program.graph_module = fx.GraphModule(program.graph_module, graph)
    for name in [name for name in own if name not in program.tensors()]:  # GraphModule keeps only what the graph reads
        program.set_tensor(name, own[name])
    program.training = document["training"]
    return program


def with_sparse(program: Program, weight: str, **changes: Any) -> None:
    """Change fields of a weight's sparse state, which must exist."""
    program.sparse[weight] = replace(program.sparse[weight], **changes)


def write_weight(program: Program, name: str, value: Tensor, changed_by: str) -> None:
    """Write values into a tensor; where it is a weight behind a mask, note what has changed it, unless something had before."""
    program.write_tensor(name, value)
    weight = program.aliases.get(name, name)
    state = program.sparse.get(weight)
    if state is not None and state.mask is not None and state.changed_by is None:
        with_sparse(program, weight, changed_by=changed_by)


def masked_weight(program: Program, name: str) -> Tensor:
    """A weight as the graph uses it: behind its mask, if it has one, and rounded to its grid, if it has one.

    Args:
        program: Not changed.
        name: Of the weight, or one that it is tied to.

    Returns:
        The weight without its gradient; the program's own tensor where there is neither. A mask that is being learned counts as
        the hard one.

    Exactness: bitwise.

    Example:
        >>> from sparsepass.passes import apply_passes
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> program = apply_passes(net, "nm_sparsify", example_inputs=torch.randn(2, 8))
        >>> int(masked_weight(program, "0.weight").count_nonzero())
        8
    """
    name = program.aliases.get(name, name)
    weight = program.tensor(name).detach()
    sparse, grid = program.sparse.get(name), program.quantized.get(name)
    if sparse is not None and sparse.mask is not None:
        weight = torch.ops.sparsepass.masked_weight(weight, program.tensor(sparse.mask))
    if grid is not None:
        tensors = (program.tensor(grid.scales), grid.zero_points and program.tensor(grid.zero_points))
        weight = torch.ops.sparsepass.quantized_weight(weight, *tensors, *grid.call)
    return weight
