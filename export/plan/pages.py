"""A plan for people: tables for the terminal."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from sparsepass.export.plan.choice import in_stack
from sparsepass.export.plan.forecast import LayerPlan, Plan, PointPlan
from sparsepass.export.plan.phases import PhaseTimes
from sparsepass.export.plan.roofline import Matmul

_Columns: TypeAlias = list[tuple[str | Column, Sequence[str | Text]]]
"""Heading and cells of each column. One that is headed by a text alone holds figures."""


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """Layers that are planned alike: same shape, same times, same decision.

    Attributes:
        count: How many.
        names: Their names, with ``*`` for the number in the stack.
        first: One of them.
    """

    count: int
    names: tuple[str, ...]
    first: LayerPlan


def layer_rows(layers: Sequence[LayerPlan]) -> list[LayerRow]:
    """Group the layers by what they have in common, in the order in which they first occur."""
    groups: dict[Any, list[LayerPlan]] = {}
    for item in layers:
        key = (item.matmul, item.layer.rows, item.layer.in_decode, item.layer.is_head, item.decision, item.reason)
        groups.setdefault(key, []).append(item)
    return [
        LayerRow(count=len(same), names=tuple(dict.fromkeys(in_stack(item.layer.site.name) for item in same)), first=same[0])
        for same in groups.values()
    ]


def page(plan: Plan, *, every_layer: bool = False) -> Group:
    """The plan in one screen: what it gains, why not more, then the layers.

    Args:
        plan: What was found.
        every_layer: Whether layers of one shape get a row each.
    """
    alone = [LayerRow(count=1, names=(item.layer.site.name,), first=item) for item in plan.layers]
    rows = alone if every_layer else layer_rows(plan.layers)
    parts: list[Any] = [Text(_title(plan), style="bold"), Text(), points_table(plan), Text(), _said(plan), Text()]
    parts += [memory_table(plan), Text(), layers_table(plan, rows), *_dense_reasons(rows), Text(), _advice(plan)]
    parts += [Text(f"Note: {note}.", style="dim") for note in plan.notes]
    return Group(*parts)


def points_table(plan: Plan) -> Table:
    """One row for each workload."""
    points, is_encoder = plan.points, plan.shape.kind == "encoder"
    columns: _Columns = [("batch", [str(point.load.batch) for point in points])]
    if plan.shape.takes_tokens:
        columns.append(("tokens" if is_encoder else "prompt", [str(point.load.seq) for point in points]))
    columns.append(("run ms" if is_encoder else "prefill ms", [_arrow(point.prefill) for point in points]))
    columns.append(("gain", [_times(point.prefill.speedup) for point in points]))
    steps = [point.decode for point in points if point.decode is not None]
    if steps:
        columns.append(("ms a token", [_arrow(step) for step in steps]))
        columns.append(("gain", [_times(step.speedup) for step in steps]))
        gains = [_times(dense / planned) for dense, planned in (point.request for point in points)]
        columns.append((f"prompt + {points[0].load.new_tokens} tokens", gains))
        columns.append(("cache", [_gigabytes(point.cache_bytes) for point in points]))
    if _everything_differs(plan):
        every = [" / ".join(_times(gain) for gain in point.everything if gain is not None) for point in points]
        columns.append(("if all 2:4", every))
    columns.append((f"fits {plan.device.memory_gb:g} GB", [_fits(plan, point) for point in points]))
    return _table("Predicted time, dense and as recommended", columns)


def memory_table(plan: Plan) -> Table:
    """Bytes of the weights for each type."""
    rows, planned = plan.memory, "bf16" if plan.dtype == "fp16" else plan.dtype
    branches = [f" (branches {_gigabytes(row.branch_bytes)})" if row.branch_bytes else "" for row in rows]
    shares = [f"{_share(row.planned_bytes, row.dense_bytes)}{branch}" for row, branch in zip(rows, branches, strict=True)]
    columns: _Columns = [("linear layers in", [str(row.dtype) for row in rows])]
    columns += [("dense", [_gigabytes(row.dense_bytes) for row in rows]), ("as recommended", shares)]
    if any(row.planned_bytes != row.everything_bytes for row in rows):
        columns.append(("if all 2:4", [_share(row.everything_bytes, row.dense_bytes) for row in rows]))
    columns.append(("", ["planned" if row.dtype == planned else "" for row in rows]))
    return _table("Weights in memory", columns)


def layers_table(plan: Plan, rows: Sequence[LayerRow]) -> Table:
    """The layers: shape, decision, times at the first workload, break-even."""
    load = plan.points[0].load
    at = f"batch {load.batch}" + (f", {load.seq} tokens" if plan.shape.takes_tokens else "")
    items = [row.first for row in rows]
    around = _around([name for row in rows for name in row.names])
    named = [
        f"{row.count} of {_dimensions(row.first.matmul)}\n{_shortened([name.removeprefix(around) for name in row.names])}"
        for row in rows
    ]
    columns: _Columns = [
        (Column(f"layers of {around.removesuffix('.')}" if around else "layers", overflow="fold"), named),
        (Column("plan"), [Text("2:4", "green") if item.decision == "2:4" else "dense" for item in items]),
        ("run us" if plan.shape.kind == "encoder" else "prefill us", [_pair(item.prefill_s) for item in items]),
    ]
    intensities = [_number(item.prefill_intensity) for item in items]
    if plan.points[0].decode is not None:
        columns.append(("decode us", [_pair(item.decode_s) if item.decode_s is not None else "" for item in items]))
        later = ["" if item.decode_intensity is None else f"\n{_number(item.decode_intensity)}" for item in items]
        intensities = [f"{first}{second}" for first, second in zip(intensities, later, strict=True)]
    columns.append(("op/byte", intensities))
    pays = [ranges(item.pays_at).replace(" and ", "\n") if item.prefill_s[1] is not None else "" for item in items]
    columns.append((Column("2:4 pays at", overflow="fold"), pays))
    return _table(f"Layers (times at {at}; op/byte: arithmetic intensity)", columns)


def ranges(found: Sequence[tuple[int, int | None]]) -> str:
    """Break-even in words, for 1 to 65536 tokens.

    >>> ranges(((1, 12), (300, None)))
    '1-12 and 300+ tokens'
    """
    if not found:
        return "never"
    if list(found) == [(1, None)]:
        return "always"
    return " and ".join(f"{a}+" if b is None else f"{a}-{b}" for a, b in found) + " tokens"


def _title(plan: Plan) -> str:
    branches = f", SLoRB k={plan.slorb_k} ({plan.projection})" if plan.slorb_k else ""
    return (
        f"2:4 plan of {plan.source} ({plan.shape.num_parameters / 1e9:.3g} B parameters) on {plan.device.title}, "
        f"runtime {plan.runtime.name}, {plan.dtype} weights{branches}"
    )


def _said(plan: Plan) -> Text:
    """Why the gain is not larger, in a sentence for each phase."""
    point = plan.points[0]
    phases = (("The run" if plan.shape.kind == "encoder" else "Prefill", point.prefill), ("Decoding", point.decode))
    lines = [f"{name}: {_why(times)}" for name, times in phases if times is not None]
    at = f"batch {point.load.batch}" + (f" and {point.load.seq} tokens" if plan.shape.takes_tokens else "")
    if point.without_branches is not None:
        cost = [
            f"{name.lower()} gains {_times(now.speedup)} instead of {_times(plain)}"
            for (name, now), plain in zip(phases, point.without_branches, strict=True)
            if now is not None and plain is not None
        ]
        lines.append(f"SLoRB: with the branches {' and '.join(cost)}.")
    return Text(f"Why not more (at {at}):\n" + "\n".join(lines))


def _why(times: PhaseTimes) -> str:
    if not times.sparse_layers_s:
        return "no layer is planned 2:4."
    total = times.dense_s
    gain = times.sparse_layers_s / times.planned_layers_s
    rest = {
        "the output head": times.head_s,
        "other dense layers": times.dense_layers_s - times.head_s,
        "attention and cache": times.attention_s,
        "element-wise work": times.other_s,
    }
    stays = ", ".join(f"{name} {share / total:.0%}" for name, share in rest.items() if share / total >= 0.005)
    text = f"the 2:4 layers take {times.sparse_layers_s / total:.0%} of the dense time, and become {gain:.2f}x faster"
    return f"{text}; as it is stays {stays}." if stays else f"{text}."


def _advice(plan: Plan) -> Text:
    if plan.pipeline is None:
        return Text("Recommended: prune nothing for speed at these sizes; 2:4 is not predicted to pay.", style="bold")
    num = sum(item.decision == "2:4" for item in plan.layers)
    if plan.shape.program.sparse:
        return Text(f"Of this program, {num} layers gain. Anew, the passes would be: {plan.pipeline}", style="bold")
    return Text(f"Recommended ({num} of {len(plan.layers)} layers 2:4): --passes '{plan.pipeline}'", style="bold")


def _dense_reasons(rows: Sequence[LayerRow]) -> list[Text]:
    """Why layers stay dense, one line for each reason."""
    reasons: dict[str, list[LayerRow]] = {}
    for row in rows:
        if row.first.decision == "dense":
            reasons.setdefault(row.first.reason, []).append(row)
    lines = []
    for reason, members in reasons.items():
        names = _shortened([name for row in members for name in row.names][:4])
        more = sum(row.count for row in members)
        lines.append(Text(f"{more} dense: {reason} ({names})"))
    return lines


def _everything_differs(plan: Plan) -> bool:
    return any(
        every is not None and times is not None and abs(every - times.speedup) > 0.005 * times.speedup
        for point in plan.points
        for every, times in zip(point.everything, (point.prefill, point.decode), strict=True)
    )


def _fits(plan: Plan, point: PointPlan) -> str | Text:
    dense, planned = (needs <= plan.device.memory_gb * 1e9 for needs in point.needs_bytes)
    if dense:
        return "yes"
    return Text("only as planned", "green") if planned else Text(f"no, needs {_gigabytes(point.needs_bytes[1])}", "red")


def _shortened(names: Sequence[str]) -> str:
    """Names that share a beginning, written once.

    >>> _shortened(("h.*.attn.q_proj", "h.*.attn.o_proj"))
    'h.*.attn.q_proj, .o_proj'
    """
    shown = [names[0]]
    for name in names[1:]:
        head, _, tail = name.rpartition(".")
        shown.append(f".{tail}" if names[0].startswith(f"{head}.") else name)
    return ", ".join(shown)


def _around(names: Sequence[str]) -> str:
    """What most names begin with, the dot included: the stack of layers. Empty if fewer than half have it.

    >>> _around(("model.layers.*.mlp.up_proj", "model.layers.*.self_attn.q_proj", "lm_head"))
    'model.layers.*.'
    """
    stacks = Counter(name[: name.index("*.") + 2] for name in names if "*." in name)
    found, count = stacks.most_common(1)[0] if stacks else ("", 0)
    return found if 2 * count >= len(names) else ""


def _table(title: str, columns: _Columns) -> Table:
    headings = [Column(heading, justify="right") if isinstance(heading, str) else heading for heading, _ in columns]
    table = Table(*headings, title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table


def _arrow(times: PhaseTimes) -> str:
    return f"{_number(times.dense_s * 1e3)} > {_number(times.planned_s * 1e3)}"


def _dimensions(matmul: Matmul) -> str:
    shape = f"{matmul.out_features} x {matmul.in_features}"
    return f"{matmul.num_experts} x {shape}, {matmul.experts_per_token} a token" if matmul.num_experts > 1 else shape


def _pair(seconds: tuple[float, float | None]) -> str:
    dense, sparse = seconds
    if sparse is None:
        return _number(dense * 1e6)
    return f"{_number(dense * 1e6)} > {_number(sparse * 1e6)}\n{_times(dense / sparse)}"


def _times(factor: float) -> str:
    return f"{factor:.2f}x"


def _share(after: float, before: float) -> str:
    return f"{_gigabytes(after)}, {after / before:.2f} of it" if before else _gigabytes(after)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
