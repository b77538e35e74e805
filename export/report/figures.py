"""Pictures of a report's training runs, drawn from the section ``retraining`` and nothing else."""

from collections.abc import Mapping
from typing import Any, Final

from sparsepass.export.report.charts import Line, Picture, grid_chart, line_chart
from sparsepass.export.report.depth import depth_grid
from sparsepass.export.report.layers import is_number
from sparsepass.export.report.markdown import number

FOLDER: Final = "figures"
_UNITS: Final = (("billion tokens", 1e9), ("million tokens", 1e6), ("thousand tokens", 1e3), ("tokens", 1.0))


def training_pictures(run: Mapping[str, Any]) -> dict[str, Picture]:
    """Draw what a run measured: what is shown -> picture.

    Args:
        run: Entry of ``retraining.runs``.

    Returns:
        Of ``loss``, ``validation``, ``flips``, ``moved``, ``rate`` and ``layers`` those that there are figures for.
    """
    found = {"loss": _loss(run), "validation": _validation(run), "flips": _flips(run), "moved": _moved(run)}
    found |= {"rate": _rate(run), "layers": _layers(run)}
    return {what: picture for what, picture in found.items() if picture is not None}


def figure_names(count: int, run: Mapping[str, Any]) -> dict[str, str]:
    """What is shown of a run -> path of the picture beside report.md.

    Args:
        count: Of the run, from 1.
        run: Entry of ``retraining.runs``.
    """
    return {what: f"{FOLDER}/retraining-{count}-{what}.svg" for what in training_pictures(run)}


def drawn_figures(section: Mapping[str, Any]) -> dict[str, str]:
    """Draw the pictures of every run: path beside report.md -> SVG.

    Args:
        section: The report's ``retraining``.
    """
    return {
        f"{FOLDER}/retraining-{count}-{what}.svg": picture.file()
        for count, run in enumerate(section["runs"], 1)
        for what, picture in training_pictures(run).items()
    }


def _loss(run: Mapping[str, Any]) -> Picture | None:
    named = (("loss", "loss", "a"), ("kl", "KL to the teacher", "b"), ("ce", "cross-entropy", "c"))
    lines = [
        Line(label=label, values=_numbers(run, name), tone=tone) for name, label, tone in named if any(_numbers(run, name))
    ]
    return _over_tokens(run, "Training loss", lines, "nats per token")


def _rate(run: Mapping[str, Any]) -> Picture | None:
    return _over_tokens(run, "Learning rate", [Line(label="", values=_numbers(run, "lr"), tone="d")], "", from_zero=True)


def _flips(run: Mapping[str, Any]) -> Picture | None:
    """The masks are refreshed now and then: what lies between has no rate."""
    rates = [100 * value if value else None for value in _numbers(run, "flip_rate")]
    title = "Flip rate: mask entries that change at a refresh"
    return _over_tokens(run, title, [Line(label="", values=rates, tone="b")], "%")


def _moved(run: Mapping[str, Any]) -> Picture | None:
    shares = [None if value is None else 100 * value for value in _numbers(run, "flips_since_first")]
    if not any(shares):
        return None
    title = "Mask entries that differ from the first mask"
    return _over_tokens(run, title, [Line(label="", values=shares)], "%", from_zero=True)


def _over_tokens(
    run: Mapping[str, Any], title: str, lines: list[Line], y_label: str, *, from_zero: bool = False
) -> Picture | None:
    tokens = run["curve"].get("tokens") or ()
    if not tokens or not any(value is not None for line in lines for value in line.values):
        return None
    x, unit = _scaled(tokens)
    return line_chart(title, x, lines, x_label=unit, y_label=y_label, from_zero=from_zero)


def _validation(run: Mapping[str, Any]) -> Picture | None:
    found = [entry for entry in run["validations"] if is_number(entry["perplexity"])]
    if len(found) < 2:
        return None
    per_step = run["num_tokens"] / max(run["num_steps"], 1)
    x, unit = _scaled([entry["step"] * per_step for entry in found])
    values = [float(entry["perplexity"]) for entry in found]
    kept = [index for index, entry in enumerate(found) if entry["step"] == run["step_of_weights"]]
    marked = (x[kept[-1]], values[kept[-1]], f"kept: {number(values[kept[-1]])}") if kept else None
    title = f"Validation perplexity (start: {number(values[0])})"
    return line_chart(title, x, [Line(label="", values=values)], x_label=unit, y_label="perplexity", marked=marked)


def _layers(run: Mapping[str, Any]) -> Picture | None:
    values = {name: 100 * value for name, value in run["flips_by_layer"].items() if is_number(value)}
    if not any(values.values()):
        return None
    label = {name: f"{value:.3g}% of the mask's entries differ from the first mask" for name, value in values.items()}
    title = "Mask entries that differ from the first mask, layer by layer"
    return grid_chart(title, depth_grid(values), values, label=label, tone="b", unit="%")


def _numbers(run: Mapping[str, Any], name: str) -> list[float | None]:
    return [float(value) if is_number(value) else None for value in run["curve"].get(name) or ()]


def _scaled(tokens: Any) -> tuple[list[float], str]:
    """Numbers of tokens in a handy unit, and its name."""
    unit, size = next(((name, size) for name, size in _UNITS if max(tokens) >= size), _UNITS[-1])
    return [value / size for value in tokens], unit
