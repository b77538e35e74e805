"""What a builder's log and the engine inspector say of sparse tactics, in the wordings of all versions.

1. TensorRT 8: ``(Sparsity) Layers eligible for sparse math: a, b`` and ``(Sparsity) TRT inference plan picked sparse
   implementation for layers: b``.
2. TensorRT 10 and later, and TensorRT-RTX: ``(Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b`` and
   ``(Sparsity) Chose 1 layer(s) using sparse tactics: b``. The names are there at the level VERBOSE only.
3. A layer of the log may be several layers of the graph, joined by `` + ``.
4. At the level VERBOSE the builder tells the time of each tactic that it tried, by name: a layer of which no sparse
   tactic was tried has none on this GPU; of one that was tried and not chosen, the times tell by how much it lost.
5. A node of the ONNX graph may become several layers; the parser's lines tell which, and names here are those of nodes.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

_ELIGIBLE: Final = (
    re.compile(r"Layers eligible for sparse math:(?P<names>.*)"),
    re.compile(r"Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics(?::(?P<names>.*))?"),
)
_CHOSEN: Final = (
    re.compile(r"TRT inference plan picked sparse implementation for layers:(?P<names>.*)"),
    re.compile(r"Chose (?P<count>\d+) layer\(s\) using sparse tactics(?::(?P<names>.*))?"),
)
_RUNNER: Final = re.compile(r"Timing Runner: (.+) \([A-Za-z]\w*(?:\[[^\]]*\])?\)\s*$")
_TACTIC_NAME: Final = re.compile(r"Tactic Name: (\S+) Tactic: (\S+)(?: Time: ([\d.eE+-]+))?")
_TACTIC_TIME: Final = re.compile(r"Tactic: (\S+) Time: ([\d.eE+-]+)")
_ONNX_LAYER: Final = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_REGISTERED: Final = re.compile(r"Registering layer: (\S+) for ONNX node: (\S+)")
_SPARSE_TACTIC: Final = re.compile(r"sparse|sptensor|spgemm|sphmma|spimma")


@final
@dataclass(frozen=True, kw_only=True)
class Told:
    """One of the two lines: how many layers, and which.

    Attributes:
        count: Number of layers that the builder counts.
        names: The layers of the graph; None if the log gives the number alone, or fused regions in place of layers.
    """

    count: int
    names: frozenset[str] | None


@final
@dataclass(frozen=True, kw_only=True)
class TacticTimes:
    """Fastest times that the builder measured for one layer, in milliseconds; None where no such tactic was tried."""

    dense_ms: float | None = None
    sparse_ms: float | None = None


@final
@dataclass(frozen=True, kw_only=True)
class SparsityLog:
    """What a log says.

    Attributes:
        eligible: Layers whose weights the builder found to be 2:4; None if it does not say.
        chosen: Layers for which it took a sparse tactic; None if it does not say.
        timings: Node -> measured times; empty if the log has none.
        nodes: Layer -> the node that it was made for, where their names differ.
    """

    eligible: Told | None = None
    chosen: Told | None = None
    timings: Mapping[str, TacticTimes] = field(default_factory=dict)
    nodes: Mapping[str, str] = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True)
class InspectedLayer:
    """What the engine inspector says of one layer of the graph.

    Attributes:
        tactic: Name of the kernel; empty if it does not say.
        sparse: Whether that is a sparse kernel; None if it does not say.
    """

    tactic: str
    sparse: bool | None


def parse_log(lines: Iterable[str]) -> SparsityLog:
    """Read the lines of a log.

    A log of several builds tells of the last one.

    Example:
        >>> found = parse_log(["[I] (Sparsity) Found 39 layer(s) eligible to use sparse tactics"])
        >>> found.eligible.count, found.eligible.names, found.chosen
        (39, None, None)
    """
    eligible: Told | None = None
    chosen: Told | None = None
    times = _TimeCollector()
    nodes: dict[str, str] = {}
    for line in lines:
        if (match := _REGISTERED.search(line)) and match[1] != match[2]:
            nodes[match[1]] = match[2]
        elif "(Sparsity)" in line:
            if told := _told(line, _ELIGIBLE):
                eligible, chosen = told, None
            elif told := _told(line, _CHOSEN):
                chosen = told
        elif "Tactic" in line or "Timing Runner" in line:
            times.read(line)
    return SparsityLog(
        eligible=_of_nodes(eligible, nodes),
        chosen=_of_nodes(chosen, nodes),
        timings={nodes.get(layer, layer): timing for layer, timing in times.found().items()},
        nodes=nodes,
    )


def layer_names(text: str) -> frozenset[str]:
    """The layers of the graph in a list of the log's layers, fused ones taken apart.

    Example:
        >>> sorted(layer_names("Conv_619 + Relu_620, MatMul_401"))
        ['Conv_619', 'MatMul_401', 'Relu_620']
    """
    names = (name.strip() for layer in text.split(", ") for name in layer.split(" + "))
    return frozenset(name for name in names if name)


def parse_inspection(
    found: Mapping[str, Any] | str | None, nodes: Mapping[str, str] | None = None
) -> dict[str, InspectedLayer]:
    """Read what the engine inspector said.

    Args:
        found: Its JSON, or that as text; None if it was not asked.
        nodes: Layer -> the node that it was made for, where their names differ.

    Returns:
        Node of the graph -> what is known of it; empty if the engine was built without details.
    """
    document = json.loads(found) if isinstance(found, str) else found
    layers: dict[str, InspectedLayer] = {}
    for layer in (document or {}).get("Layers", ()):
        if not isinstance(layer, Mapping):
            continue  # a bare name: the engine was built without details
        tactic = str(layer.get("TacticName", ""))
        # HasSparseWeights tells that weights were packed, 0 that they were not; kernels of Myelin have neither field.
        flag = layer.get("HasSparseWeights")
        sparse = bool(flag) if isinstance(flag, int) and flag else (is_sparse_tactic(tactic) if tactic else None)
        names = set(_ONNX_LAYER.findall(str(layer.get("Metadata", "")))) or layer_names(str(layer.get("Name", "")))
        for name in ((nodes or {}).get(each, each) for each in names):
            known = layers.get(name)
            if known is None or (known.sparse is not True and sparse is not None):
                layers[name] = InspectedLayer(tactic=tactic, sparse=sparse)
    return layers


def is_sparse_tactic(name: str) -> bool:
    """Whether a kernel's name says that it takes 2:4 weights.

    Example:
        >>> is_sparse_tactic("sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tt_t_tilesize128x128x64_sptensor16x8x32")
        True
    """
    return _SPARSE_TACTIC.search(name) is not None


class _TimeCollector:
    """Collects the fastest dense and sparse tactic of each layer."""

    def __init__(self) -> None:
        self._layer = ""
        self._names: dict[str, str] = {}
        self._fastest: dict[str, dict[bool, float]] = {}

    def read(self, line: str) -> None:
        if match := _RUNNER.search(line):
            self._layer, self._names = match[1], {}
            self._fastest.setdefault(self._layer, {})
        elif match := _TACTIC_NAME.search(line):
            self._names[match[2]] = match[1]
            if match[3]:
                self._note(match[1], float(match[3]))
        elif "Fastest" not in line and (match := _TACTIC_TIME.search(line)):
            self._note(self._names.get(match[1], ""), float(match[2]))

    def _note(self, name: str, time_ms: float) -> None:
        if self._layer:
            kinds, sparse = self._fastest[self._layer], is_sparse_tactic(name)
            kinds[sparse] = min(time_ms, kinds.get(sparse, time_ms))

    def found(self) -> dict[str, TacticTimes]:
        return {
            name: TacticTimes(dense_ms=kinds.get(False), sparse_ms=kinds.get(True))
            for layer, kinds in self._fastest.items()
            if kinds
            for name in layer_names(layer)
        }


def _told(line: str, wordings: tuple[re.Pattern[str], ...]) -> Told | None:
    """What a line tells in one of the wordings; None if it is another line.

    The names hold only if there are as many as the line counts: a line that was cut off proves nothing.
    """
    match = next(filter(None, (wording.search(line) for wording in wordings)), None)
    if match is None:
        return None
    found = match.groupdict()
    text = found["names"] or ""
    num_named = sum(bool(layer.strip()) for layer in text.split(", "))
    count = int(found.get("count", num_named))
    return Told(count=count, names=_certain(text) if count == num_named else None)


def _of_nodes(told: Told | None, nodes: Mapping[str, str]) -> Told | None:
    if told is None or told.names is None:
        return told
    return Told(count=told.count, names=frozenset(nodes.get(name, name) for name in told.names))


def _certain(text: str) -> frozenset[str] | None:
    """A fused region is named by its first and last layer, which does not tell what is in it."""
    return None if "ForeignNode[" in text else layer_names(text)
