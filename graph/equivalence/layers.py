"""Where the results of layers stand in a graph, whatever kind of graph it is.

A layer is a module that owns a weight. It is known by its module path, and its result is the last value that is
computed from its matmul within that module: past the bias, past a SLoRB branch, past the views around GPT-2's Conv1D.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

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
