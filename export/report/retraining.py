"""The part of report.md about training: settings and results of each run, and its pictures."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any, Final

from sparsepass.export.report.figures import figure_names
from sparsepass.export.report.markdown import markdown_table, number

CAPTIONS: Final[Mapping[str, str]] = {
    "loss": "On the training sequences, and what it is made of; each point is a mean over its part of the run.",
    "validation": "On held-out sequences, at the precision of the training. The circle marks the weights that were kept.",
    "flips": "Which share of all mask entries changed when the masks were chosen anew.",
    "moved": "Which share of all mask entries is no longer as it was at the start.",
    "rate": "As it was at each step.",
    "layers": "Which share of each layer's mask entries is no longer as it was at the start.",
}
"""What is shown of a run -> what a reader should know of the picture."""
_NUM_LAYERS_SHOWN: Final = 5


def retraining_part(section: Mapping[str, Any]) -> str:
    """Render the report's section ``retraining`` as Markdown.

    Args:
        section: Of a checked report.

    Returns:
        Headings, tables and links to the pictures that `drawn_figures` draws.
    """
    runs = section["runs"]
    parts = []
    for index, run in enumerate(runs, 1):
        parts.append("## Training" + (f" ({index} of {len(runs)})" if len(runs) > 1 else ""))
        parts.append(markdown_table(("", ""), training_facts(run)))
        parts += [f"![{CAPTIONS[what]}]({path})\n\n{CAPTIONS[what]}" for what, path in figure_names(index, run).items()]
        parts.append(_layers(run["flips_by_layer"]))
        rows = sorted((name, "" if value is None else value) for name, value in run["settings"].items())
        table = markdown_table(("setting", "value"), rows)
        parts.append(f"<details><summary>All settings</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(part for part in parts if part)


def training_facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What matters most about a run, as rows (what, value) for people.

    Args:
        run: Entry of ``retraining.runs``.
    """
    train = run["data"].get("train", {})
    epochs = train.get("epochs")
    teacher = run["teacher"]
    named = teacher.get("source") or teacher.get("class") or ""
    kinds = {"none": "none: cross-entropy with the text alone", "CachedTeacher": f"{named}, from cached logits".lstrip(", ")}
    facts = [
        ("method", str(run["method"])),
        ("length", f"{run['num_steps']} steps, {run['num_tokens']:,} tokens" + (f", {epochs:.2g} epochs" if epochs else "")),
        ("text", str(train.get("source", ""))),
        ("teacher", kinds.get(teacher["kind"], str(named))),
        ("time", f"{run['seconds'] / 60:.1f} minutes of training, {run['tokens_per_second']:,.0f} tokens a second"),
    ]
    facts += _validation_facts(run)
    if run["method"] in ("ast", "maskllm"):
        facts.append(("masks", f"{100 * run['flips_since_first']:.3g}% of their entries differ from the first mask"))
    if "decided" in run:
        facts.append(
            (
                "learned masks",
                f"{100 * run['decided']:.3g}% of the groups are decided (a probability above 0.99); the masks keep "
                f"{100 * run['kept_norm']:.3g}% of the weights' squared norm",
            )
        )
    return facts


def _validation_facts(run: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    found = run["validations"]
    if not found:
        return [("validation", "none: the last weights were kept")]
    kept = [entry for entry in found if entry["step"] == run["step_of_weights"]]
    text = f"perplexity {number(found[0]['perplexity'])} at step {found[0]['step']}"
    if kept and kept[-1] is not found[0]:
        text += f", {number(kept[-1]['perplexity'])} at step {kept[-1]['step']}, whose weights were kept"
    return [("validation", text)]


def _layers(by_layer: Mapping[str, float]) -> str:
    if not any(by_layer.values()):
        return ""
    ordered = sorted(by_layer.items(), key=lambda item: -item[1])
    rows = [(name, f"{100 * value:.3g}%") for name, value in ordered[:_NUM_LAYERS_SHOWN]]
    median = statistics.median(by_layer.values())
    return f"Masks that moved most (the median of {len(ordered)} layers is {100 * median:.3g}%):\n\n" + markdown_table(
        ("weight", "entries that differ from the first mask"), rows
    )
