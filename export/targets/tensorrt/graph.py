"""What stands around each weight in an ONNX graph: what keeps a runtime from seeing a plain product of a 2:4 weight."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import onnx_ir as ir

_DEFAULT_DOMAINS: Final = ("", "ai.onnx")
_PRODUCTS: Final = ("MatMul", "Gemm", "Conv", "ConvTranspose")


@final
@dataclass(frozen=True, kw_only=True)
class Around:
    """The neighbourhood of one use of a weight.

    Attributes:
        between: Operations between the stored weight and the one that multiplies it, from the weight on.
        plugin: Type and domain of the operation that multiplies it, if ONNX does not define it; else empty.
        is_requantized: Whether the product of a quantized input is quantized again at once; None if nothing is quantized.
    """

    between: tuple[str, ...] = ()
    plugin: str = ""
    is_requantized: bool | None = None


def surroundings(path: Path) -> dict[tuple[str, str], Around]:
    """Read the graph of a file, without its weights.

    Returns:
        (node, stored weight) -> what stands around that use.
    """
    graph = ir.load(path).graph
    found = {}
    for node in graph:
        plugin = "" if node.domain in _DEFAULT_DOMAINS else f"{node.op_type} of {node.domain}"
        if node.op_type not in _PRODUCTS and not plugin:
            continue
        for index, value in enumerate(node.inputs):
            chain = _chain(value)
            if chain is None or chain[0] not in graph.initializers:
                continue
            other = node.inputs[0] if index else (node.inputs[1] if len(node.inputs) > 1 else None)
            requantized = _feeds(node.outputs[0], "QuantizeLinear") if _made_by(other, "DequantizeLinear") else None
            found[node.name or "", chain[0]] = Around(between=chain[1], plugin=plugin, is_requantized=requantized)
    return found


def _chain(value: ir.Value | None) -> tuple[str, tuple[str, ...]] | None:
    """The stored weight behind a value, and the operations on the way; None if it is computed from inputs."""
    between: list[str] = []
    while value is not None:
        producer = value.producer()
        if producer is None:
            return (value.name or "", tuple(reversed(between)))
        between.append(producer.op_type)
        value = producer.inputs[0] if producer.inputs else None
    return None


def _made_by(value: ir.Value | None, op_type: str) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == op_type


def _feeds(value: ir.Value, op_type: str) -> bool:
    return any(usage.node.op_type == op_type for usage in value.uses())
