"""Pictures of a training run, drawn from the report's section ``retraining`` and nothing else."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparsepass.export.curves import layer_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER: Final = "figures"
_BLUE, _ORANGE, _GREEN, _GREY = "#1f5fa8", "#d9730d", "#2a8a4a", "#8a8a8a"
_WIDTH, _PANEL, _DPI = 8.0, 2.6, 120


def figure_names(number: int, run: Mapping[str, Any]) -> dict[str, str]:
    """Pictures that are drawn of a run: what is shown -> path beside the report.

    Args:
        number: Of the run, from 1.
        run: Entry of ``retraining.runs``.
    """
    there = {
        "loss": bool(run["curve"].get("loss")),
        "validation": len(run["validations"]) > 1,
        "flips": bool(run["curve"].get("flips_since_first")) and _moved(run),
        "layers": bool(run["flips_by_layer"]) and _moved(run),
    }
    return {what: f"{FOLDER}/retraining-{number}-{what}.png" for what, known in there.items() if known}


def draw_figures(folder: Path, section: Mapping[str, Any]) -> None:
    """Draw the pictures of every run into a report's folder.

    Args:
        folder: Where report.md stands.
        section: The report's ``retraining``.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its font cache
    for number, run in enumerate(section["runs"], 1):
        for what, path in figure_names(number, run).items():
            place = folder / path
            place.parent.mkdir(exist_ok=True)
            # Without the version in it, the same report gives the same bytes.
            _DRAWN[what](run).savefig(place, dpi=_DPI, metadata={"Software": None})


def _loss(run: Mapping[str, Any]) -> "Figure":
    curve, (figure, (top, bottom)) = run["curve"], _panels(2, (1.6, 1.0))
    x, scale = _tokens(curve["tokens"])
    for name, label, colour in (("loss", "loss", _BLUE), ("kl", "KL to the teacher", _ORANGE), ("ce", "cross-entropy", _GREEN)):
        if any(value for value in curve.get(name, ())):
            top.plot(x, _numbers(curve[name]), color=colour, label=label, linewidth=1.6)
    _log_if_wide(top, [value for name in ("loss", "kl", "ce") for value in curve.get(name, ())])
    top.set_ylabel("nats per token")
    top.set_title("Training loss")
    top.legend(frameon=False, ncols=3)
    bottom.plot(x, _numbers(curve["lr"]), color=_GREY, linewidth=1.6)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel(scale)
    return figure


def _validation(run: Mapping[str, Any]) -> "Figure":
    found = run["validations"]
    with_kl = [entry for entry in found if entry.get("kl") is not None]
    figure, panels = _panels(2 if len(with_kl) > 1 else 1, (1.5, 1.0))
    per_step = run["num_tokens"] / run["num_steps"]
    x, scale = _tokens([entry["step"] * per_step for entry in found])
    perplexities = [entry["perplexity"] for entry in found]
    top = panels[0]
    top.plot(x, perplexities, color=_BLUE, marker="o", markersize=3.5, linewidth=1.6)
    kept = [index for index, entry in enumerate(found) if entry["step"] == run["step_of_weights"]]
    for index in kept[-1:]:
        label = f"kept: {perplexities[index]:.4g} (start: {perplexities[0]:.4g})"
        top.plot(x[index], perplexities[index], color=_ORANGE, marker="o", markersize=8, linestyle="none", label=label)
        top.legend(frameon=False)
    _log_if_wide(top, perplexities)
    top.set_ylabel("perplexity")
    top.set_title("Validation")
    if len(panels) > 1:
        x, _ = _tokens([entry["step"] * per_step for entry in with_kl], like=scale)
        panels[1].plot(x, [entry["kl"] for entry in with_kl], color=_ORANGE, marker="o", markersize=3.5, linewidth=1.6)
        panels[1].set_ylabel("KL to the teacher")
    panels[-1].set_xlabel(scale)
    return figure


def _flips(run: Mapping[str, Any]) -> "Figure":
    curve, (figure, (top, bottom)) = run["curve"], _panels(2, (1.0, 1.0))
    x, scale = _tokens(curve["tokens"])
    rates = [100 * value if value else math.nan for value in _numbers(curve["flip_rate"])]
    top.plot(x, rates, color=_ORANGE, linewidth=1.6)
    known = [rate for rate in rates if not math.isnan(rate)]
    _log_if_wide(top, known)
    top.set_ylabel("at a refresh, %")
    top.set_title("Flip rate: entries of the masks that changed")
    bottom.plot(x, [100 * value for value in _numbers(curve["flips_since_first"])], color=_BLUE, linewidth=1.6)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("against the first mask, %")
    bottom.set_xlabel(scale)
    return figure


def _layers(run: Mapping[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    kinds, blocks, values = layer_grid(run["flips_by_layer"])
    figure = Figure(figsize=(_WIDTH, 1.4 + 0.34 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    percent = [[math.nan if value is None else 100 * value for value in row] for row in values]
    image = axes.imshow(percent, aspect="auto", cmap="viridis", vmin=0)
    axes.set_yticks(range(len(kinds)), kinds)
    every = max(1, math.ceil(len(blocks) / 16))
    axes.set_xticks(range(0, len(blocks), every), blocks[::every])
    axes.set_xlabel("block")
    axes.set_title("Entries that differ from the first mask, layer by layer")
    figure.colorbar(image, ax=axes, label="%", pad=0.01)
    return figure


_DRAWN: Final[Mapping[str, Callable[[Mapping[str, Any]], "Figure"]]] = {
    "loss": _loss,
    "validation": _validation,
    "flips": _flips,
    "layers": _layers,
}


def _panels(count: int, heights: tuple[float, ...]) -> "tuple[Figure, list[Axes]]":
    """A figure with panels one above the other, over one axis of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _PANEL * sum(heights[:count])), layout="constrained")
    found = figure.subplots(count, 1, sharex=True, squeeze=False, height_ratios=heights[:count])
    panels: list[Axes] = list(found[:, 0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4")
        axes.set_axisbelow(True)
    return figure, panels


def _tokens(values: Any, like: str | None = None) -> tuple[list[float], str]:
    """Numbers of tokens in a handy unit, and the axis' label."""
    units = {"tokens": 1.0, "thousand tokens": 1e3, "million tokens": 1e6, "billion tokens": 1e9}
    largest = max(values)
    label = like or [name for name, size in units.items() if largest >= size or size == 1.0][-1]
    return [value / units[label] for value in values], label


def _numbers(values: Any) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _log_if_wide(axes: "Axes", values: Any) -> None:
    """A logarithmic axis where the largest value is more than ten times the smallest."""
    from matplotlib.ticker import LogLocator, NullFormatter

    known = [value for value in values if value is not None and value > 0]
    if known and max(known) > 10 * min(known):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _moved(run: Mapping[str, Any]) -> bool:
    return any(run["flips_by_layer"].values()) or any(run["curve"].get("flip_rate") or ())
