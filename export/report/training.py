"""The part of a report about training: settings, results and pictures of each run."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from sparsepass.export.report.blocks import EVERYWHERE, Block, Drawing, Drawings, Subheading, Table, facts, figures, words
from sparsepass.export.report.charts import Line, Picture, grid_chart, line_chart
from sparsepass.export.report.depth import depth_grid
from sparsepass.export.report.schema import ReportDocument
from sparsepass.export.report.sections import RetrainingSection, TrainingEntry, is_number
from sparsepass.export.report.words import number

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
_NUM_LAYERS_SHOWN: Final = 5


def training_view(section: RetrainingSection, report: ReportDocument) -> Iterator[Block]:
    """Facts, curves and settings of each training. The terminal shows the facts of the last one."""
    del report
    for count, run in enumerate(section.runs, 1):
        is_last = count == len(section.runs)
        if len(section.runs) > 1:
            yield Subheading(f"Training {count} of {len(section.runs)}")
        yield facts("What the training did", training_facts(run), EVERYWHERE if is_last else ("html", "markdown"))
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
    found = {"loss": _loss(run), "validation": _validation(run), "flips": _flips(run), "moved": _moved(run)}
    found |= {"rate": _rate(run), "layers": _layers(run)}
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


def _loss(run: TrainingEntry) -> Picture | None:
    named = (("loss", "loss", "a"), ("kl", "KL to the teacher", "b"), ("ce", "cross-entropy", "c"))
    lines = [
        Line(label=label, values=_numbers(run, name), tone=tone) for name, label, tone in named if any(_numbers(run, name))
    ]
    return _over_tokens(run, "Training loss", lines, "nats per token")


def _rate(run: TrainingEntry) -> Picture | None:
    return _over_tokens(run, "Learning rate", [Line(label="", values=_numbers(run, "lr"), tone="d")], "", from_zero=True)


def _flips(run: TrainingEntry) -> Picture | None:
    """The masks are refreshed now and then: what lies between has no rate."""
    rates = [100 * value if value else None for value in _numbers(run, "flip_rate")]
    title = "Flip rate: mask entries that change at a refresh"
    return _over_tokens(run, title, [Line(label="", values=rates, tone="b")], "%")


def _moved(run: TrainingEntry) -> Picture | None:
    shares = [None if value is None else 100 * value for value in _numbers(run, "flips_since_first")]
    if not any(shares):
        return None
    title = "Mask entries that differ from the first mask"
    return _over_tokens(run, title, [Line(label="", values=shares)], "%", from_zero=True)


def _over_tokens(run: TrainingEntry, title: str, lines: list[Line], y_label: str, *, from_zero: bool = False) -> Picture | None:
    tokens = run.curve.get("tokens") or ()
    if not tokens or not any(value is not None for line in lines for value in line.values):
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
    return line_chart(title, x, [Line(label="", values=values)], x_label=unit, y_label="perplexity", marked=marked)


def _layers(run: TrainingEntry) -> Picture | None:
    values = {name: 100 * value for name, value in run.flips_by_layer.items() if is_number(value)}
    if not any(values.values()):
        return None
    label = {name: f"{value:.3g}% of the mask's entries differ from the first mask" for name, value in values.items()}
    title = "Mask entries that differ from the first mask, layer by layer"
    return grid_chart(title, depth_grid(values), values, label=label, tone="b", unit="%")


def _numbers(run: TrainingEntry, name: str) -> list[float | None]:
    return [float(value) if is_number(value) else None for value in run.curve.get(name) or ()]


def _scaled(tokens: Sequence[float]) -> tuple[list[float], str]:
    """Numbers of tokens in a handy unit, and its name."""
    unit, size = next(((name, size) for name, size in _UNITS if max(tokens) >= size), _UNITS[-1])
    return [value / size for value in tokens], unit


def _percent(share: float | str) -> str:
    return f"{100 * float(share):.3g}%"
