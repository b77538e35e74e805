"""Training: what a run leaves in a report, with its curves in few points, and the part of the pages about it."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from sparsepass.export.report.blocks import EVERYWHERE, Block, Drawing, Drawings, Subheading, Table, figures, words
from sparsepass.export.report.charts import Line, Picture, grid_chart, line_chart
from sparsepass.export.report.depth import depth_grid
from sparsepass.export.report.parts import is_number
from sparsepass.export.report.schema import ReportDocument
from sparsepass.export.report.sections import RetrainingSection, TrainingEntry
from sparsepass.export.report.words import number

NUM_POINTS: Final = 200
"""Points of a curve in the report; `metrics.jsonl` in the run folder has every step."""

_MEANS: Final = ("loss", "kl", "ce", "grad_norm", "flip_rate", "tokens_per_second")
_LASTS: Final = ("step", "tokens", "lr", "decay", "flips_since_first", "decided", "kept_norm", "memory_bytes")

FOLDER: Final = "figures"
"""Where report.md finds its pictures."""

CAPTIONS: Final[Mapping[str, str]] = {
    "loss": "On the training sequences, and what it is made of; each point is a mean over its part of the run.",
    "validation": "On held-out sequences, at the precision of the training. The circle marks the weights that were kept.",
    "flips": "Which share of all mask entries changed when the masks were chosen anew.",
    "moved": "Which share of all mask entries is no longer as it was at the start.",
    "rate": "As it was at each step.",
    "layers": "Which share of each layer's mask entries is no longer as it was at the start.",
}
"""What is shown of a run -> what a reader should know of the picture."""
_UNITS: Final = (("billion tokens", 1e9), ("million tokens", 1e6), ("thousand tokens", 1e3), ("tokens", 1.0))
_LOSSES: Final = (("loss", "loss", "a"), ("kl", "KL to the teacher", "b"), ("ce", "cross-entropy", "c"))
"""Column of the curve, its label and its tone."""
_MOVED: Final = "Mask entries that differ from the first mask"
_NUM_LAYERS_SHOWN: Final = 5


def retraining_run(record: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bring the record of a run and its measurements together, as an entry of ``retraining.runs``.

    Args:
        record: The last entry of `Program.retraining`.
        metrics: Lines of ``metrics.jsonl``; may be empty.
    """
    seconds = float(record["seconds"])
    taken = {name: value for name, value in record.items() if name != "flips_since_first_by_layer"}
    return {
        **taken,
        "method": record["settings"]["method"],
        "tokens_per_second": record["num_tokens"] / seconds if seconds > 0 else 0.0,
        "flips_by_layer": {name: _short(value) for name, value in record["flips_since_first_by_layer"].items()},
        "curve": curve([line for line in metrics if "loss" in line]),
    }


def curve(lines: Sequence[Mapping[str, Any]], num_points: int = NUM_POINTS) -> dict[str, list[float | None]]:
    """Make columns of at most so many points: means over equal pieces of the run, and what stood at the end of each.

    Args:
        lines: One mapping a logged step, in order.
        num_points: Points at most.

    Returns:
        Column -> values; a value is None where nothing finite was measured.

    Example:
        >>> curve([{"step": i, "loss": 10.0 - i, "lr": 0.1} for i in range(1, 5)], 2)
        {'step': [2, 4], 'lr': [0.1, 0.1], 'loss': [8.5, 6.5]}
    """
    if not lines:
        return {}
    count = min(num_points, len(lines))
    ends = [(index + 1) * len(lines) // count for index in range(count)]
    pieces = [lines[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    lasts = {name: [piece[-1].get(name) for piece in pieces] for name in _LASTS if name in lines[-1]}
    means = {name: [_mean([line.get(name) for line in piece]) for piece in pieces] for name in _MEANS if name in lines[-1]}
    return lasts | means


def training_view(section: RetrainingSection, report: ReportDocument) -> Iterator[Block]:
    """Facts, curves and settings of each training. The terminal shows the facts of the last one."""
    for count, run in enumerate(section.runs, 1):
        is_last = count == len(section.runs)
        if len(section.runs) > 1:
            yield Subheading(f"Training {count} of {len(section.runs)}")
        yield Table.of_facts("What the training did", training_facts(run), EVERYWHERE if is_last else ("html", "markdown"))
        yield Drawings(tuple(
            Drawing(picture, CAPTIONS[what], f"{FOLDER}/retraining-{count}-{what}.svg")
            for what, picture in training_pictures(run).items()
        ))  # fmt: skip
        yield from _moved_most(run.flips_by_layer)
        rows = sorted((name, "" if value is None else str(value)) for name, value in run.settings.items())
        yield Table("All settings", words("setting", "value"), rows, folded="All settings")


def training_facts(run: TrainingEntry) -> list[tuple[str, str]]:
    """What matters most about a run, as rows (what, value) for people."""
    train, teacher = run.data.train, run.teacher
    epochs = f", {train.epochs:.2g} epochs" if train is not None and is_number(train.epochs) and train.epochs else ""
    named = teacher.source or teacher.class_ or ""
    kinds = {"none": "none: cross-entropy with the text alone", "CachedTeacher": f"{named}, from cached logits".lstrip(", ")}
    found = [
        ("method", run.method),
        ("length", f"{run.num_steps} steps, {run.num_tokens:,} tokens{epochs}"),
        ("text", (train.source or "") if train is not None else ""),
        ("teacher", kinds.get(teacher.kind, named)),
        ("time", f"{float(run.seconds) / 60:.1f} minutes of training, {float(run.tokens_per_second):,.0f} tokens a second"),
        ("validation", _validation_fact(run)),
    ]
    if run.method in ("ast", "maskllm"):
        found.append(("masks", f"{_percent(run.flips_since_first)} of their entries differ from the first mask"))
    if run.decided is not None and run.kept_norm is not None:
        decided = f"{_percent(run.decided)} of the groups are decided (a probability above 0.99)"
        found.append(("learned masks", f"{decided}; the masks keep {_percent(run.kept_norm)} of the weights' squared norm"))
    return found


def training_pictures(run: TrainingEntry) -> dict[str, Picture]:
    """Draw what a run measured: what is shown -> picture.

    Returns:
        Of ``loss``, ``validation``, ``flips``, ``moved``, ``rate`` and ``layers`` those that there are figures for.
    """
    losses = [Line(label=label, values=_numbers(run, name), tone=tone) for name, label, tone in _LOSSES]
    # The masks are refreshed now and then: what lies between has no rate.
    rates = [100 * value if value else None for value in _numbers(run, "flip_rate")]
    moved = [None if value is None else 100 * value for value in _numbers(run, "flips_since_first")]
    found = {
        "loss": _over_tokens(run, "Training loss", [line for line in losses if any(line.values)], "nats per token"),
        "validation": _validation(run),
        "flips": _over_tokens(run, "Flip rate: mask entries that change at a refresh", [Line(values=rates, tone="b")], "%"),
        "moved": _over_tokens(run, _MOVED, [Line(values=moved)], "%", from_zero=True) if any(moved) else None,
        "rate": _over_tokens(run, "Learning rate", [Line(values=_numbers(run, "lr"), tone="d")], "", from_zero=True),
        "layers": _layers(run),
    }
    return {what: picture for what, picture in found.items() if picture is not None}


def _validation_fact(run: TrainingEntry) -> str:
    found = run.validations
    if not found:
        return "none: the last weights were kept"
    kept = [entry for entry in found if entry.step == run.step_of_weights]
    text = f"perplexity {number(found[0].perplexity)} at step {found[0].step}"
    if kept and kept[-1] is not found[0]:
        text += f", {number(kept[-1].perplexity)} at step {kept[-1].step}, whose weights were kept"
    return text


def _moved_most(by_layer: Mapping[str, float | str]) -> Iterable[Block]:
    known = {name: float(value) for name, value in by_layer.items() if is_number(value)}
    if any(known.values()):
        ordered = sorted(known.items(), key=lambda item: -item[1])
        rows = [(name, _percent(value)) for name, value in ordered[:_NUM_LAYERS_SHOWN]]
        rows.append((f"median of {len(ordered)} layers", _percent(statistics.median(known.values()))))
        columns = (*words("masks that moved most"), *figures("entries that differ from the first mask"))
        yield Table("Masks that moved most", columns, rows, on=("markdown",))


def _over_tokens(run: TrainingEntry, title: str, lines: list[Line], y_label: str, *, from_zero: bool = False) -> Picture | None:
    tokens = [value for value in _numbers(run, "tokens") if value is not None]
    if (
        len(tokens) != len(run.curve.get("tokens") or ())
        or not tokens
        or not any(value is not None for line in lines for value in line.values)
    ):
        return None
    x, unit = _scaled(tokens)
    return line_chart(title, x, lines, x_label=unit, y_label=y_label, from_zero=from_zero)


def _validation(run: TrainingEntry) -> Picture | None:
    found = [(entry.step, float(entry.perplexity)) for entry in run.validations if is_number(entry.perplexity)]
    if len(found) < 2:
        return None
    per_step = run.num_tokens / max(run.num_steps, 1)
    x, unit = _scaled([step * per_step for step, _ in found])
    values = [value for _, value in found]
    kept = [index for index, (step, _) in enumerate(found) if step == run.step_of_weights]
    marked = (x[kept[-1]], values[kept[-1]], f"kept: {number(values[kept[-1]])}") if kept else None
    title = f"Validation perplexity (start: {number(values[0])})"
    return line_chart(title, x, [Line(values=values)], x_label=unit, y_label="perplexity", marked=marked)


def _layers(run: TrainingEntry) -> Picture | None:
    values = {name: 100 * value for name, value in run.flips_by_layer.items() if is_number(value)}
    if not any(values.values()):
        return None
    label = {name: f"{value:.3g}% of the mask's entries differ from the first mask" for name, value in values.items()}
    return grid_chart(f"{_MOVED}, layer by layer", depth_grid(values), values, label=label, tone="b", unit="%")


def _numbers(run: TrainingEntry, name: str) -> list[float | None]:
    return [float(value) if is_number(value) else None for value in run.curve.get(name) or ()]


def _scaled(tokens: Sequence[float]) -> tuple[list[float], str]:
    """Numbers of tokens in a handy unit, and its name."""
    unit, size = next(((name, size) for name, size in _UNITS if max(tokens) >= size), _UNITS[-1])
    return [value / size for value in tokens], unit


def _percent(share: float | str) -> str:
    return f"{100 * float(share):.3g}%"


def _mean(values: Sequence[Any]) -> float | None:
    known = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return _short(sum(known) / len(known)) if known else None


def _short(value: float) -> float:
    """Five digits: what a picture can show."""
    return float(f"{value:.5g}")
