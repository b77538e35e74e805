"""The original module tree of a program: flat for rewriting, hierarchical for scale."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.export.unflatten import InterpreterModule, UnflattenedModule

from sparsepass.graph import structure
from sparsepass.graph.ops import ASSERTIONS
from sparsepass.graph.program import Program
from sparsepass.graph.support import CaptureError, one_at_a_time


class Hierarchy(nn.Module):
    """A program as a tree of modules with the original names, over the program's own parameters. Final.

    Called like the program. `tree` is the root; its children carry the model's names, so sharding, checkpointing and hooks
    can be applied layer by layer. Training it trains the program.

    Attributes:
        tree: The unflattened module.
    """

    def __init__(self, program: Program, tree: nn.Module) -> None:
        super().__init__()
        self.tree = tree
        self._flat_inputs, self._checked = program.flat_inputs, program.checked
        self._structure = program.output_structure

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the tree; see `Program.forward`."""
        inputs = self._flat_inputs(*args, **kwargs)
        with self._checked(inputs):
            leaves = self.tree(*inputs.values())
        return structure.build(self._structure, list(leaves))


@one_at_a_time
def hierarchy(program: Program) -> Hierarchy:
    """Give a program's original module tree back.

    The flat graph is exported again and unflattened, which restores the module calls from the graph's metadata. Parameters
    and buffers of the tree are the program's own objects.

    Returns:
        A module with the program's state-dict names under ``tree.``.

    Raises:
        CaptureError: If the rewritten graph cannot be exported again.

    Exactness: results and gradients are bitwise those of the flat graph.

    Example:
        >>> from sparsepass.graph import capture
        >>> program = capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8))
        >>> sorted(name for name, _ in program.hierarchy().tree.named_parameters())
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    inputs = tuple(program.example_inputs[name] for name in program.input_names)
    shapes = tuple(dict.fromkeys(program.dynamic_axes.get(name, ()), torch.export.Dim.AUTO) for name in program.input_names)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(program.graph_module, inputs, dynamic_shapes=shapes, strict=False)
            # What checks dtypes and sizes goes: under autocast the dtypes are others, and each check takes time.
            for node in list(exported.graph.nodes):
                if node.target in ASSERTIONS and not node.users:
                    exported.graph.erase_node(node)
            tree = torch.export.unflatten(exported)
    except Exception as error:  # torch.export raises anything
        raise CaptureError(
            f"the rewritten graph cannot be exported again, so it has no hierarchy: {type(error).__name__}: {error}"
        ) from error
    for name, tensor in program.tensors().items():
        path, _, attribute = name.rpartition(".")
        try:
            module = tree.get_submodule(path)
        except AttributeError:
            continue  # a parameter that the graph never reads
        for table in (module._parameters, module._buffers):
            if attribute in table:
                table[attribute] = tensor  # type: ignore[assignment]
    write_code(tree)
    tree.train(program.training)
    return Hierarchy(program, tree)


def write_code(tree: nn.Module) -> None:
    """Generate the code of an unflattened module and of all modules in it anew, from their graphs and their own tensors.

    torch.export.unflatten leaves each module with code that holds copies of the weights, and interprets the graph, node by
    node, instead of running that code.
    """
    for module in tree.modules():
        if isinstance(module, InterpreterModule | UnflattenedModule):
            # A child named self, as BERT's attention has, would hide the module in its code.
            module._run_with_interpreter = any(node.name == "self" for node in module.graph.nodes)
            module.finalize()  # type: ignore[no-untyped-call]


def blocks(module: nn.Module) -> tuple[str, ...]:
    """Names of the repeated blocks of a model: the numbered children that are in no other numbered child.

    They are what is sharded, checkpointed or compiled one by one. A module called more than once counts once.

    >>> blocks(nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.ReLU()]), "head": nn.Linear(2, 2)}))
    ('layers.0', 'layers.1')
    """
    found: list[str] = []
    for name, _ in module.named_modules():
        last = name.rpartition(".")[2]
        if last.isdigit() and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return tuple(found)
