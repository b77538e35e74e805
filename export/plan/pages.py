"""A plan for people (tables for the terminal) and for programs (JSON)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsepass.export.plan.phases import PhaseTimes
from sparsepass.export.plan.result import LayerPlan, Plan, PointPlan

_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


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
    rows = []
    for members in groups.values():
        names = tuple(dict.fromkeys(_INDEX.sub("*", item.layer.site.name) for item in members))
        rows.append(LayerRow(count=len(members), names=names, first=members[0]))
    return rows


def page(plan: Plan, *, every_layer: bool = False) -> Group:
    """The plan in one screen: what it gains, why not more, then the layers.

    Args:
        plan: What was found.
        every_layer: Whether layers of one shape get a row each.
    """
    rows = (
        [LayerRow(count=1, names=(item.layer.site.name,), first=item) for item in plan.layers]
        if every_layer
        else layer_rows(plan.layers)
    )
    parts: list[Any] = [Text(_title(plan), style="bold"), Text(), points_table(plan), Text(), _said(plan), Text()]
    parts += [memory_table(plan), Text(), layers_table(plan, rows), *_dense_reasons(rows), Text(), _advice(plan)]
    parts += [Text(f"Note: {note}.", style="dim") for note in plan.notes]
    return Group(*parts)


def points_table(plan: Plan) -> Table:
    """One row for each workload."""
    generates, differs = plan.points[0].decode is not None, _everything_differs(plan)
    table = Table(title="Predicted time, dense and as recommended", title_justify="left", show_edge=False)
    table.add_column("batch", justify="right")
    if plan.shape.takes_tokens:
        table.add_column("tokens" if plan.shape.kind == "encoder" else "prompt", justify="right")
    table.add_column("run ms" if plan.shape.kind == "encoder" else "prefill ms", justify="right")
    table.add_column("gain", justify="right")
    if generates:
        for heading in ("ms a token", "gain", f"prompt + {plan.points[0].load.new_tokens} tokens", "cache"):
            table.add_column(heading, justify="right")
    if differs:
        table.add_column("if all 2:4", justify="right")
    table.add_column(f"fits {plan.device.memory_gb:g} GB", justify="right")
    for point in plan.points:
        cells = [str(point.load.batch)]
        cells += [str(point.load.seq)] if plan.shape.takes_tokens else []
        cells += [_arrow(point.prefill), _times(point.prefill.speedup)]
        if generates:
            dense, planned = point.request
            cells += [_arrow(point.decode), _times(point.decode.speedup)] if point.decode is not None else ["", ""]
            cells += [_times(dense / planned), _gigabytes(point.cache_bytes)]
        if differs:
            cells.append(" / ".join(_times(x) for x in point.everything if x is not None))
        cells.append(_fits(plan, point))
        table.add_row(*cells)
    return table


def memory_table(plan: Plan) -> Table:
    """Bytes of the weights for each type."""
    table = Table(title="Weights in memory", title_justify="left", show_edge=False)
    differs = any(row.planned_bytes != row.everything_bytes for row in plan.memory)
    for heading in ("linear layers in", "dense", "as recommended", *(["if all 2:4"] if differs else []), ""):
        table.add_column(heading, justify="right")
    for row in plan.memory:
        branch = f" (branches {_gigabytes(row.branch_bytes)})" if row.branch_bytes else ""
        cells = [row.dtype, _gigabytes(row.dense_bytes), f"{_share(row.planned_bytes, row.dense_bytes)}{branch}"]
        cells += [_share(row.everything_bytes, row.dense_bytes)] if differs else []
        table.add_row(*cells, "planned" if row.dtype == ("bf16" if plan.dtype == "fp16" else plan.dtype) else "")
    return table


def layers_table(plan: Plan, rows: Sequence[LayerRow]) -> Table:
    """The layers: shape, decision, times at the first workload, break-even."""
    load = plan.points[0].load
    generates = plan.points[0].decode is not None
    at = f"batch {load.batch}" + (f", {load.seq} tokens" if plan.shape.takes_tokens else "")
    table = Table(title=f"Layers (times at {at}; op/byte: arithmetic intensity)", title_justify="left", show_edge=False)
    table.add_column("", justify="right")
    table.add_column("layers", overflow="fold")
    table.add_column("out x in", justify="right")
    table.add_column("plan")
    for phase in ("run",) if plan.shape.kind == "encoder" else ("prefill", "decode") if generates else ("prefill",):
        table.add_column(f"{phase} us", justify="right")
    table.add_column("op/byte", justify="right")
    table.add_column("2:4 pays at", overflow="fold")
    for row in rows:
        item = row.first
        shape = f"{item.matmul.out_features} x {item.matmul.in_features}"
        if item.matmul.num_experts > 1:
            shape = f"{item.matmul.num_experts} x {shape}, {item.matmul.experts_per_token} a token"
        cells = [str(row.count), escape(_shortened(row.names)), shape]
        cells.append("[green]2:4[/]" if item.decision == "2:4" else "dense")
        cells.append(_pair(item.prefill_s))
        cells += [_pair(item.decode_s) if item.decode_s is not None else ""] if generates else []
        decode = "" if item.decode_intensity is None or not generates else f", {_number(item.decode_intensity)}"
        cells.append(f"{_number(item.prefill_intensity)}{decode}")
        table.add_row(*cells, ranges(item.pays_at) if item.prefill_s[1] is not None else "")
    return table


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
    phases = [("The run" if plan.shape.kind == "encoder" else "Prefill", point.prefill)]
    phases += [("Decoding", point.decode)] if point.decode is not None else []
    lines = [f"{name}: {_why(times)}" for name, times in phases]
    at = f"batch {point.load.batch}" + (f" and {point.load.seq} tokens" if plan.shape.takes_tokens else "")
    if point.without_branches is not None:
        names = ("the run" if plan.shape.kind == "encoder" else "prefill", "decoding")
        after = (point.prefill.speedup, point.decode.speedup if point.decode is not None else None)
        cost = [
            f"{name} gains {_times(now)} instead of {_times(plain)}"
            for name, now, plain in zip(names, after, point.without_branches, strict=False)
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
        abs(every - mine) > 0.005 * mine
        for point in plan.points
        for every, mine in zip(
            (x for x in point.everything if x is not None),
            (times.speedup for times in (point.prefill, point.decode) if times is not None),
            strict=True,
        )
    )


def _fits(plan: Plan, point: PointPlan) -> str:
    dense, planned = (needs <= plan.device.memory_gb * 1e9 for needs in point.needs_bytes)
    if dense:
        return "yes"
    return "[green]only as planned[/]" if planned else f"[red]no, needs {_gigabytes(point.needs_bytes[1])}[/]"


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


def _arrow(times: PhaseTimes | None) -> str:
    return "" if times is None else f"{_number(times.dense_s * 1e3)} > {_number(times.planned_s * 1e3)}"


def _pair(seconds: tuple[float, float | None]) -> str:
    dense, sparse = seconds
    if sparse is None:
        return _number(dense * 1e6)
    return f"{_number(dense * 1e6)} > {_number(sparse * 1e6)}, {_times(dense / sparse)}"


def _times(factor: float) -> str:
    return f"{factor:.2f}x"


def _share(after: float, before: float) -> str:
    return f"{_gigabytes(after)}, {after / before:.2f} of it" if before else _gigabytes(after)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
