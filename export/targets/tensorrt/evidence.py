"""Did the runtime use the sparsity? Four states for each weight, told apart and never merged, and what follows from them.

1. *conforms*: the stored weight is 2:4 along the axis that its product sums over. Checked in the file.
2. *flag requested*: the builder was allowed to use sparse tactics. Ours to know.
3. *eligible*: the builder found the layer fit for them. Told by its log, or ruled out by what kernels can take.
4. *chosen*: the builder took one. Told by the engine inspector, else by the log.

Whether a layer *ran sparse* follows: yes if one was chosen, no if any state says no, else unknown. Nothing is guessed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, final

import onnx_ir as ir

from sparsepass.export.pattern import PatternEntry
from sparsepass.export.targets.evidence import Known, LayerEvidence
from sparsepass.export.targets.tensorrt.log import InspectedLayer, SparsityLog, TacticTimes, Told

_SPARSE_DTYPES: Final = ("float16", "bfloat16", "int8", "float8e4m3fn")
"""What sparse tensor cores multiply in 2:4. For float32 (TF32) their pattern is 1:2, which 2:4 does not imply."""

_ON_PURPOSE: Final = "left out"
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


@final
@dataclass(frozen=True, kw_only=True)
class Observed:
    """What is known of one build.

    Attributes:
        engine: Name of the engine.
        runtime: Name of the package that built it.
        sparse: Whether the flag was set.
        on_gpu: Whether the builder had a GPU to time tactics on.
        log: What its log says.
        inspected: Layer of the graph -> what the engine inspector says.
    """

    engine: str
    runtime: str
    sparse: bool
    on_gpu: bool
    log: SparsityLog
    inspected: Mapping[str, InspectedLayer]


def gather(
    entries: Iterable[PatternEntry], around: Mapping[tuple[str, str], Around], seen: Observed
) -> tuple[LayerEvidence, ...]:
    """Bring together what is known of every weight of one engine.

    Args:
        entries: What the pattern checker found in the file, one for each use of a weight.
        around: What stands around each use, from `surroundings`.
        seen: What is known of the build.
    """
    return tuple(_judge(entry, around.get((entry.node, entry.weight), Around()), seen) for entry in entries)


def obstacle(entry: PatternEntry, around: Around) -> str:
    """Say which rule keeps a weight from sparse kernels, whatever the builder says; empty if none is known to.

    The rules are the hardware's and ONNX's: types, the axis, groups of four, and what hides the weight from the product.
    """
    if entry.verdict not in ("conforms", _ON_PURPOSE):
        if entry.conforming_axes:
            axes = " and ".join(map(str, entry.conforming_axes))
            return f"axis: the stored weight is 2:4 along axis {axes}, and the product sums over axis {entry.axis}"
        return f"pattern: {entry.reason or entry.verdict}"
    kind = entry.dtype.lower().removeprefix("tensorproto.")
    kind = {"float": "float32", "double": "float64"}.get(kind, kind)
    if kind not in _SPARSE_DTYPES:
        return f"dtype: {kind}, and sparse kernels take {', '.join(_SPARSE_DTYPES)}; export with --dtype float16"
    if around.plugin:
        return f"plugin: the weight goes into {around.plugin}, whose kernel decides"
    if entry.axis is not None and entry.shape and entry.shape[entry.axis] % 4:
        return f"shape rule: {entry.shape[entry.axis]} inputs are no multiple of 4"
    hidden = [op for op in around.between if op not in ("DequantizeLinear", "QuantizeLinear")]
    if hidden:
        return f"{', '.join(hidden)} in between: the builder looks for 2:4 in the weight that the product reads"
    return ""


def _judge(entry: PatternEntry, around: Around, seen: Observed) -> LayerEvidence:
    on_purpose = entry.verdict == _ON_PURPOSE
    conforms: Known = "unknown" if on_purpose else _known(entry.verdict == "conforms")
    rule = obstacle(entry, around)
    inspected = seen.inspected.get(entry.node)
    timing = seen.log.timings.get(entry.node, TacticTimes())
    eligible = _told(entry.node, seen.log.eligible, seen.log.eligible)
    if eligible == "unknown" and rule:
        eligible = "no"
    chosen = _told(entry.node, seen.log.chosen, seen.log.eligible)
    if inspected is not None and inspected.sparse is not None:
        chosen = _known(inspected.sparse)
    ran: Known = "unknown"
    if chosen == "yes":
        ran = "yes"
    elif "no" in (chosen, eligible, conforms) or not seen.sparse or on_purpose:
        ran = "no"
    evidence = LayerEvidence(
        engine=seen.engine,
        layer=entry.node,
        op=entry.op,
        weight=entry.weight,
        shape=entry.shape,
        dtype=entry.dtype,
        axis=entry.axis,
        conforms=conforms,
        flag_requested=_known(seen.sparse),
        eligible=eligible,
        chosen=chosen,
        ran_sparse=ran,
        reason="",
        tactic=inspected.tactic if inspected is not None else "",
        dense_ms=timing.dense_ms,
        sparse_ms=timing.sparse_ms,
    )
    return replace(evidence, reason=_reason(evidence, rule, around, seen, on_purpose))


def _reason(found: LayerEvidence, rule: str, around: Around, seen: Observed, on_purpose: bool) -> str:
    if found.ran_sparse == "yes":
        return "the builder took a sparse tactic" + (f" ({found.tactic})" if found.tactic else "")
    if on_purpose:
        return "dense on purpose"
    if not seen.sparse:
        return "the engine was built without the sparsity flag"
    if rule:
        return rule
    if found.chosen == "no" and found.eligible != "no":
        return _why_not_chosen(found, around, bool(seen.log.timings))
    if found.eligible == "no":
        return _between(around) or "the builder does not count the layer as eligible, and no rule known here tells why"
    return _why_unknown(seen)


def _why_not_chosen(found: LayerEvidence, around: Around, timed: bool) -> str:
    if found.sparse_ms is not None and found.dense_ms is not None:
        return f"dense tactic faster: {found.dense_ms:.4g} ms against {found.sparse_ms:.4g} ms"
    if timed and found.dense_ms is not None:
        return "no kernel on this target: the builder tried no sparse tactic for this layer"
    return _between(around) or "dense tactic faster: the builder takes a sparse tactic only where it is"


def _between(around: Around) -> str:
    if around.is_requantized is False:
        return (
            "quantize nodes in between: the product is not quantized again at once, and sparse int8 kernels are taken where "
            "the output stays int8"
        )
    quantizers = [op for op in around.between if op in ("DequantizeLinear", "QuantizeLinear")]
    return f"quantize nodes in between: {', '.join(quantizers)} between the weight and the product" if quantizers else ""


def _why_unknown(seen: Observed) -> str:
    if not seen.on_gpu:
        return (
            f"no GPU here: {seen.runtime} built ahead of time, and its kernels are picked on the GPU that loads the engine; "
            "build and inspect it there"
        )
    if seen.log.chosen is not None and seen.log.chosen.names is None:
        total = f" of {seen.log.eligible.count}" if seen.log.eligible is not None else ""
        return f"the log says that {seen.log.chosen.count}{total} layers run sparse, and not which"
    return "neither the log nor the engine inspector tells"


def _told(layer: str, line: Told | None, eligible: Told | None) -> Known:
    """What a line of the log says of one layer; a number alone tells of none or, if it is all that are eligible, of all."""
    if line is None:
        return "unknown"
    if line.names is not None:
        return _known(layer in line.names)
    if line.count == 0:
        return "no"
    if line is not eligible and eligible is not None and line.count == eligible.count and eligible.names is not None:
        return _known(layer in eligible.names)
    return "unknown"


def _known(value: bool) -> Known:
    return "yes" if value else "no"


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
            producer = other.producer() if other is not None else None
            requantized = None
            if producer is not None and producer.op_type == "DequantizeLinear":
                requantized = any(usage.node.op_type == "QuantizeLinear" for usage in node.outputs[0].uses())
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
