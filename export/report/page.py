"""report.md: the page for people, rendered from report.json and nothing else."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from sparsepass.export.report.answers import Answer, skipped_rows, summary
from sparsepass.export.report.document import HEADER
from sparsepass.export.report.markdown import markdown_table, number
from sparsepass.export.report.retraining import retraining_part

_NUM_FAILURES_SHOWN = 20


def render_page(document: Mapping[str, Any]) -> str:
    """Render a report as a Markdown page.

    Args:
        document: A checked report. Sections that this version does not know are shown as JSON.

    Returns:
        The page.

    Example:
        >>> from sparsepass.export.report.document import new_report
        >>> render_page(new_report()).splitlines()[0]
        '# sparsepass report'
    """
    parts = [_title(document)]
    parts += [render(document[name]) for name, render in _RENDERERS.items() if name in document]
    for name, section in document.items():
        if name not in _RENDERERS and name not in HEADER:
            parts.append(f"## {name}\n\n```json\n{json.dumps(section, indent=1)[:4000]}\n```")
    parts.append(_runs(document["runs"]))
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def accuracy_rows(section: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (what, perplexity, times the first one) of the section ``accuracy``."""
    entries = section["measurements"]
    first = entries[0]["perplexity"] if entries else 0
    rows = []
    for entry in entries:
        value = entry["perplexity"]
        finite = not isinstance(value, str) and not isinstance(first, str) and first > 0
        rows.append((str(entry["name"]), number(value), f"{value / first:.2f}x" if finite else ""))
    return rows


def accuracy_setting(section: Mapping[str, Any]) -> str:
    """One line: how the perplexities were measured."""
    entry = section["measurements"][0]
    bos = "each window begins with the BOS token" if entry["bos"] else "no BOS token"
    return (
        f"Perplexity on {section['text']}: {entry['num_tokens']} tokens scored, windows of {entry['context']}, stride "
        f"{entry['stride']}, {bos}, computed in {entry['dtype']}. Lower is better."
    )


def size(num_bytes: float) -> str:
    """A size for people.

    Example:
        >>> size(538_000_000)
        '538.0 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} bytes" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError


def _title(document: Mapping[str, Any]) -> str:
    model, artifact = document.get("model"), document.get("artifact")
    about = f": {model['source']}" if model else ""
    about += f" as {artifact['target']}" if artifact else ""
    lines = [f"# sparsepass report{about}"]
    lines += [_answer(answer) for answer in summary(document)]
    if document["recipe"]:
        lines.append(f"Passes: `{document['recipe']}`")
    return "\n\n".join(lines)


def _answer(answer: Answer) -> str:
    return f"**{answer.question} {answer.short[:1].upper()}{answer.short[1:]}.** {' '.join(answer.sentences)}"


def _model(section: Mapping[str, Any]) -> str:
    facts = {
        "source": f"{section['source']} ({section['kind']})",
        "class": section.get("class") or "",
        "parameters": f"{section['num_parameters']:,}",
        "dtype": section["dtype"],
    }
    for name in ("revision", "commit", "gguf_file"):
        if section.get(name):
            facts[name] = section[name]
    notes = [f"- {note}" for note in section.get("notes", ())]
    return "## Model\n\n" + markdown_table(("", ""), facts.items()) + ("\n\n" + "\n".join(notes) if notes else "")


def _accuracy(section: Mapping[str, Any]) -> str:
    if not section["measurements"]:
        return ""
    table = markdown_table(("model", "perplexity", "times dense"), accuracy_rows(section))
    return f"## Accuracy\n\n{accuracy_setting(section)}\n\n{table}"


def _passes(section: Mapping[str, Any]) -> str:
    parts = ["## What the passes did"]
    rows = []
    for record in section["passes"]:
        outcomes = record["outcomes"]
        done = sum(outcome["action"] == "rewritten" for outcome in outcomes)
        rows.append(
            (
                f"`{record['text']}`",
                done,
                len(outcomes) - done,
                _validation(record),
                f"{record['seconds']:.1f} s",
            )
        )
    if rows:
        parts.append(markdown_table(("pass", "layers rewritten", "left alone", "how far the outputs moved", "time"), rows))
    for record in section["passes"]:
        if record.get("calibration"):
            parts.append(f"Calibration of `{record['text'].partition('{')[0]}`: {_calibration(record['calibration'])}.")
    skipped = skipped_rows(section)
    if skipped:
        parts.append("Layers that are dense, and why:\n\n" + markdown_table(("reason", "layers", "which"), skipped))
    parts.append(_layers(section))
    return "\n\n".join(part for part in parts if part)


def _layers(section: Mapping[str, Any]) -> str:
    facts: dict[str, list[str]] = {}
    shapes: dict[str, str] = {}
    for record in section["passes"]:
        name = record["text"].partition("{")[0]
        for outcome in record["outcomes"]:
            shapes[outcome["site"]] = "x".join(map(str, outcome["shape"]))
            if outcome["action"] == "rewritten":
                said = ", ".join(f"{key} {number(value)}" for key, value in outcome["facts"].items())
                facts.setdefault(outcome["site"], []).append(name + (f" ({said})" if said else ""))
    if not shapes:
        return ""
    rows = [
        (layer, shape, "; ".join(facts.get(layer, ())) or f"dense: {section['skipped'].get(layer, '')}")
        for layer, shape in shapes.items()
    ]
    table = markdown_table(("layer", "stored shape", "what was done"), rows)
    return f"<details><summary>Layer by layer</summary>\n\n{table}\n\n</details>"


def _artifact(section: Mapping[str, Any]) -> str:
    files = [(name, size(num_bytes)) for name, num_bytes in section["files"].items()]
    files.append(("together", size(section["size_bytes"])))
    notes = [f"- {note}" for note in section["notes"]]
    number_sparse = sum(len(weights) for weights in section["expected_sparse"].values())
    lines = [
        f"## Files ({section['target']}, {section['dtype']})",
        markdown_table(("file", "size"), files),
        f"{number_sparse} stored weights have to be N:M sparse; `artifact.expected_sparse` in report.json names them, "
        "and `sparsepass verify` on this folder checks them again.",
        "A sparse weight is stored with its zeros: the file is as large as a dense one. Runtimes that know 2:4 pack it "
        "when they load it.",
    ]
    return "\n\n".join(lines + (["\n".join(notes)] if notes else []))


def _sparsity(section: Mapping[str, Any]) -> str:
    rows = []
    for engine in section["engines"]:
        states = section["counts"]["engines"].get(engine["name"], {})
        told = [_tally(states.get(state, {})) for state in ("conforms", "flag_requested", "eligible", "chosen", "ran_sparse")]
        targets = ", ".join(f"SM{number}" for number in engine["targets"])
        rows.append((engine["name"], targets, size(engine["size_bytes"]), *told))
    headings = ("engine", "runs on", "size", "weights conform", "flag requested", "eligible", "chosen", "ran sparse")
    gpu = ", ".join(section["gpus"]) or "without a GPU"
    parts = [
        f"## Was the sparsity used? (built by {section['runtime']} {section['runtime_version']}, {gpu})",
        "Over the weights that are meant to be sparse. The states are independent: a weight that conforms need not be "
        "eligible, and an eligible layer runs sparse only if the builder chose a sparse kernel.",
        markdown_table(headings, rows),
    ]
    meant = [layer for layer in section["layers"] if layer["conforms"] != "unknown"]
    reasons = Counter((layer["ran_sparse"], layer["reason"]) for layer in meant)
    parts.append(markdown_table(("ran sparse", "why", "layers"), ((ran, why, n) for (ran, why), n in reasons.most_common())))
    if section.get("measured"):
        parts.append(_measured(section["measured"]))
    table = markdown_table(
        ("engine", "weight", "shape", "conforms", "flag", "eligible", "chosen", "ran sparse", "why"),
        (
            (
                layer["engine"],
                layer["weight"],
                "x".join(map(str, layer["shape"])),
                *(layer[state] for state in ("conforms", "flag_requested", "eligible", "chosen", "ran_sparse", "reason")),
            )
            for layer in section["layers"]
        ),
    )
    parts.append(f"<details><summary>Layer by layer</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(parts)


def _measured(measured: Mapping[str, Any]) -> str:
    parts = []
    for engine, found in measured.items():
        rows = [
            (p["batch"], p["sequence"], number(p["dense_ms"]), number(p["sparse_ms"]), f"{p['dense_ms'] / p['sparse_ms']:.2f}x")
            for p in found["points"]
        ]
        parts.append(f"Measured, {engine}: {found['break_even']}")
        parts.append(markdown_table(("batch", "tokens", "dense ms", "sparse ms", "gain"), rows))
    return "\n\n".join(parts)


def _tally(values: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {value}" for value, count in values.items() if count)


def _plan(section: Mapping[str, Any]) -> str:
    rows = []
    for point in section["points"]:
        gains = [f"{point[phase]['speedup']:.2f}x" if point[phase] else "" for phase in ("prefill", "decode")]
        rows.append((point["batch"], point["seq"], *gains))
    device = f"{section['device'].get('title', '')}, {section['runtime'].get('name', '')}, {section['dtype']} weights"
    parts = [f"## Plan ({device})", "Predicted gain as recommended: a forecast, not a measurement."]
    parts.append(markdown_table(("batch", "prompt", "prefill", "decode"), rows))
    if section["passes"]:
        parts.append(f"Recommended passes: `{section['passes']}`")
    layers = (
        (row["name"], f"{row['out_features']}x{row['in_features']}", row["decision"], row["reason"])
        for row in section["layers"]
    )
    table = markdown_table(("layer", "out x in", "plan", "why"), layers)
    parts.append(f"<details><summary>Layer by layer</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(parts)


def _pattern(section: Mapping[str, Any]) -> str:
    parts = ["## Stored weights"]
    for report in section["reports"]:
        said = "holds" if report["conforms"] else "does NOT hold"
        parts.append(f"{report['source']}: {report['pattern']} {said}.")
        parts.append(
            markdown_table(("verdict", "weights"), ((word, count) for word, count in report["counts"].items() if count))
        )
        wrong = [entry for entry in report["entries"] if entry.get("required") and entry["verdict"] != "conforms"]
        if wrong:
            rows = ((entry["weight"], entry["verdict"], entry["reason"]) for entry in wrong[:_NUM_FAILURES_SHOWN])
            parts.append(markdown_table(("weight", "verdict", "why"), rows))
            if (more := len(wrong) - _NUM_FAILURES_SHOWN) > 0:
                parts.append(f"And {more} more.")
    return "\n\n".join(parts)


def _verification(section: Mapping[str, Any]) -> str:
    said = {True: "held", False: "DID NOT HOLD", None: "not checked"}
    rows = [(check["name"], said[check["held"]], check["summary"]) for check in section["checks"]]
    if not rows:
        return ""
    return "## Verification\n\n" + markdown_table(("check", "result", "what was found"), rows)


def _samples(section: Mapping[str, Any]) -> str:
    rows = [
        (kind, name, "x".join(map(str, facts["shape"])), facts["dtype"])
        for kind in ("inputs", "outputs")
        for name, facts in section[kind].items()
    ]
    return (
        f"## Samples\n\n`{section['file']}` holds these tensors, so that another runtime can be checked against this "
        "export.\n\n" + markdown_table(("", "name", "shape", "type"), rows)
    )


def _runs(runs: Iterable[Mapping[str, Any]]) -> str:
    parts = []
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        place = run["machine"]
        memory = place.get("memory_bytes")
        on = f"{place['processor']}, {place['cores']} cores" + (f", {size(memory)} memory" if memory else "")
        on += "".join(f", {name}" for name in place.get("accelerators", ()))
        parts.append(
            f"- **{run['stage']}**: `{run['command']}`, {run['created']}, {run['seconds']} s\n  - {versions}\n  - {on}"
        )
    return "## How it was made\n\n" + "\n".join(parts) if parts else ""


def _validation(record: Mapping[str, Any]) -> str:
    found = record.get("validation")
    if found is None:
        return "not measured"
    if record["promise"] == "exact":
        return "not at all (exact)"
    kl = f", KL {number(found['kl'])}" if found.get("kl") is not None else ""
    return f"relative error {number(found['relative_error'])}{kl}, on {found['inputs']}"


def _calibration(facts: Mapping[str, Any]) -> str:
    said = f"{facts['source']}"
    if facts.get("num_sequences") is not None:
        said += f", {facts['num_sequences']} sequences"
    if facts.get("num_tokens"):
        said += f", {facts['num_tokens']} tokens"
    return said


_RENDERERS: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "model": _model,
    "accuracy": _accuracy,
    "retraining": retraining_part,
    "passes": _passes,
    "artifact": _artifact,
    "sparsity": _sparsity,
    "plan": _plan,
    "pattern": _pattern,
    "verification": _verification,
    "samples": _samples,
}
"""Section -> its part of the page, in the page's order."""
