"""Computing the constant parts of an ONNX graph, with onnx's reference evaluator.

For weights that something else than a change of axes or a quantization makes out of what is stored: they have to be
computed to know what is multiplied. Tensors that the model's operations compute are not kept: what is large is computed
again when its bits are counted.
"""

from collections.abc import Callable
from typing import Any, final

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from sparsepass.export.pattern.onnx.data import OnnxData
from sparsepass.graph.support import first_line

__all__ = ["ConstantValues", "NotComputableError"]

Array = npt.NDArray[Any]

# What the reference evaluator raises for models it cannot run; it has no error type of its own for all of them.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


class NotComputableError(Exception):
    """Why a constant cannot be computed."""


@final
class ConstantValues:
    """Computes constant values of one model.

    Args:
        data: Reads its stored tensors.
        model: The model.
        stored: Gives the tensor stored for a value, or None.
    """

    def __init__(self, data: OnnxData, model: ir.Model, stored: Callable[[ir.Value], ir.TensorProtocol | None]) -> None:
        self._data = data
        self._opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
        self._ir_version = model.ir_version
        self._stored = stored
        self._lazy: dict[ir.Value, ir.LazyTensor] = {}

    def lazy(self, value: ir.Value) -> ir.LazyTensor:
        """A tensor that is computed when it is read; one and the same for one value.

        Raises:
            NotComputableError: It cannot be computed.
        """
        if value not in self._lazy:
            # Computed once to learn its type and shape, and to know that it can be.
            found = self.compute(value)
            self._lazy[value] = ir.LazyTensor(
                lambda: ir.tensor(self.compute(value)),
                dtype=ir.DataType.from_numpy(found.dtype),
                shape=ir.Shape(found.shape),
                name=value.name,
            )
        return self._lazy[value]

    def compute(self, value: ir.Value) -> Array:
        """Compute a constant value.

        Raises:
            NotComputableError: It cannot be computed.
        """
        from onnx.reference import ReferenceEvaluator

        nodes, leaves = self._part(value)
        names = {leaf: f"leaf_{i}" for i, leaf in enumerate(leaves)}
        for i, node in enumerate(nodes):
            names |= {output: f"value_{i}_{j}" for j, output in enumerate(node.outputs)}
        protos = []
        for node in nodes:
            proto = ir.to_proto(node)
            proto.input[:] = [names[v] if v is not None else "" for v in node.inputs]
            proto.output[:] = [names[v] for v in node.outputs]
            protos.append(proto)
        info = [onnx.helper.make_value_info(names[leaf], onnx.TypeProto()) for leaf in leaves]
        result = onnx.helper.make_value_info(names[value], onnx.TypeProto())
        graph = onnx.helper.make_graph(protos, "constants", info, [result])
        model = onnx.helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version)
        feeds = {names[leaf]: self._data.values(tensor, leaf.name or "?") for leaf, tensor in leaves.items()}
        try:
            with np.errstate(all="ignore"):
                found = next(iter(ReferenceEvaluator(model).run(None, feeds)))
        except _FAILURES as error:
            raise NotComputableError(f"{type(error).__name__}: {first_line(error)}") from error
        if not isinstance(found, np.ndarray | np.generic):
            raise NotComputableError("it is no tensor")
        return np.asarray(found)

    def operations(self, value: ir.Value) -> tuple[str, ...]:
        """The operation types that a value is computed through, in order, each once."""
        return tuple(dict.fromkeys(node.op_type for node in self._part(value)[0]))

    def _part(self, value: ir.Value) -> tuple[list[ir.Node], dict[ir.Value, ir.TensorProtocol]]:
        """The nodes that make a value, producers first, and the stored tensors they start from."""
        leaves: dict[ir.Value, ir.TensorProtocol] = {}
        seen: dict[ir.Node, int] = {}
        ordered: list[ir.Node] = []
        stack: list[tuple[ir.Value, bool]] = [(value, False)]
        while stack:
            current, is_ready = stack.pop()
            node = current.producer()
            tensor = self._stored(current)
            if tensor is not None:
                leaves[current] = tensor
            elif node is None:
                raise NotComputableError(f"{current.name!r} is a slice of a scanned tensor or a sparse initializer")
            elif is_ready:
                ordered.append(node)
            elif node not in seen:
                seen[node] = len(seen)
                stack.append((current, True))
                stack.extend((v, False) for v in node.inputs if v is not None)
        return ordered, leaves
