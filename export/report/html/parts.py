"""The parts of the page, one function a section of the report; layers have a file of their own."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Final

from sparsepass.export.report.charts import Bar, Line, Picture, bar_chart, line_chart
from sparsepass.export.report.figures import training_pictures
from sparsepass.export.report.html.layers import gain_pictures, layer_table
from sparsepass.export.report.html.markup import Html, el, join
from sparsepass.export.report.html.tables import Column, facts, figure_of, figures, table
from sparsepass.export.report.layers import is_number, layer_facts
from sparsepass.export.report.markdown import number
from sparsepass.export.report.page import accuracy_rows, accuracy_setting, size
from sparsepass.export.report.retraining import CAPTIONS, training_facts

_STATES: Final = ("conforms", "flag_requested", "eligible", "chosen", "ran_sparse")
_STATE_NAMES: Final = ("weights conform", "flag requested", "eligible", "chosen", "ran sparse")
_TONES: Final = (("yes", "c"), ("no", "b"), ("unknown", "n"))
_MOST_FILES: Final = 10
_MOST_BARS: Final = 12
_MOST_MEASURED: Final = 6
_CHECKED: Final = {True: "held", False: "DID NOT HOLD", None: "not checked"}


def title(document: Mapping[str, Any]) -> str:
    """The page's heading: the model's name, what was done to it, and its form."""
    model = document.get("model", {})
    name = str(model.get("source") or document.get("plan", {}).get("model") or "")
    shown = PurePath(name).name or name
    what = list(dict.fromkeys(layer.pattern for layer in layer_facts(document) if layer.pattern))
    what += ["retrained"] if document.get("retraining", {}).get("runs") else []
    form = f"as {document['artifact']['target']}" if "artifact" in document else ""
    return " ".join(part for part in (f"{shown}:" if shown and (what or form) else shown, ", ".join(what), form) if part) or (
        "sparsepass report"
    )


def subtitle(document: Mapping[str, Any]) -> Html:
    """What stands under the heading: where the model came from, the passes, and when."""
    lines = []
    if source := document.get("model", {}).get("source"):
        lines.append(el("p", "Model: ", el("code", source)))
    if document["recipe"]:
        lines.append(el("p", "Passes: ", el("code", document["recipe"])))
    if document["runs"]:
        last = document["runs"][-1]
        version = last["versions"].get("sparsepass", "")
        stages = " > ".join(run["stage"] for run in document["runs"])
        lines.append(el("p", f"{stages}, {last['created']}, sparsepass {version}"))
    return join(lines)


def with_code(text: str) -> Html:
    """A sentence in which words between backticks are code."""
    return join(el("code", part) if index % 2 else part for index, part in enumerate(re.split(r"`([^`]*)`", text)))


def accuracy_part(section: Mapping[str, Any], document: Mapping[str, Any]) -> Html | None:
    """Perplexities as bars and as a table, and what is known of the exported files."""
    entries = section["measurements"]
    if not entries:
        return None
    rows = [list(row) for row in accuracy_rows(section)]
    bars = [
        Bar(label=row[0], parts=((float(entry["perplexity"]), "n" if index == 0 else "a"),), text=f"{row[1]}  {row[2]}")
        for index, (entry, row) in enumerate(zip(entries, rows, strict=True))
        if is_number(entry["perplexity"])
    ]
    parts: list[Html | None] = []
    if bars:
        parts.append(figure_of(bar_chart("Perplexity (shorter is better)", bars)))
    if exported := _exported(document):
        rows.append(exported)
    columns = (Column("model"), Column("perplexity", is_number=True), Column("times the first", is_number=True))
    parts += [table(columns, rows, label="Perplexities"), el("p", accuracy_setting(section), class_="soft")]
    return join(parts)


def _exported(document: Mapping[str, Any]) -> list[str] | None:
    """A row on the exported artifact, whose perplexity nobody measured, but whose outputs were compared."""
    artifact = document.get("artifact")
    if artifact is None:
        return None
    checks = [check for check in document.get("verification", {}).get("checks", ()) if check["name"] == "outputs"]
    if not checks or checks[0]["held"] is None:
        said = "not known: not run here"
    else:
        said = "as the program's: outputs agree" if checks[0]["held"] else "not known: outputs DIFFER"
    return [f"exported files ({artifact['target']}, {artifact['dtype']})", said, ""]


def retraining_part(section: Mapping[str, Any], document: Mapping[str, Any]) -> Html:
    """Facts, curves and settings of each training."""
    del document
    parts: list[Html | None] = []
    runs = section["runs"]
    for index, run in enumerate(runs, 1):
        if len(runs) > 1:
            parts.append(el("h3", f"Training {index} of {len(runs)}"))
        parts.append(facts(training_facts(run), label="What the training did"))
        drawn = training_pictures(run)
        parts.append(figures((picture, CAPTIONS[what]) for what, picture in drawn.items() if picture.is_fluid))
        parts += [figure_of(picture, CAPTIONS[what], is_wide=True) for what, picture in drawn.items() if not picture.is_fluid]
        rows = sorted((name, "" if value is None else str(value)) for name, value in run["settings"].items())
        listed = table((Column("setting"), Column("value")), rows, label="All settings")
        parts.append(el("details", el("summary", "All settings"), listed))
    return join(parts)


def sparsity_part(section: Mapping[str, Any], document: Mapping[str, Any]) -> Html:
    """The evidence: four states that are never merged, and what follows from them, weight by weight."""
    del document
    built = f"Built by {section['runtime']} {section['runtime_version']}, {', '.join(section['gpus']) or 'without a GPU'}."
    parts: list[Html | None] = [
        el("p", built),
        el(
            "p",
            "Four states are told apart: the stored weight conforms to 2:4; the builder was allowed to use sparse kernels "
            "(flag requested); it found the layer fit for one (eligible); it took one (chosen). None follows from another. "
            "Counted over the weights that are meant to be sparse.",
            class_="soft",
        ),
    ]
    meant = [layer for layer in section["layers"] if layer["conforms"] != "unknown"]
    pictures = []
    for engine in dict.fromkeys(layer["engine"] for layer in meant):
        mine = [layer for layer in meant if layer["engine"] == engine]
        pictures.append((_states(engine, mine), ""))
    parts.append(figures(pictures))
    reasons = Counter((layer["ran_sparse"], layer["reason"]) for layer in meant)
    columns = (Column("why", is_wide=True), Column("ran sparse"), Column("weights", is_number=True))
    rows = [(why, ran, count) for (ran, why), count in reasons.most_common()]
    parts.append(table(columns, rows[: _MOST_MEASURED * 5], label="Why"))
    parts += [el("h3", "Engines"), _engines(section["engines"])]
    if section.get("measured"):
        parts += [el("h3", "Measured latency"), *_measured(section["measured"])]
    parts += [el("h3", "Weight by weight"), _evidence(section["layers"])]
    return join(parts)


def _states(engine: str, layers: Sequence[Mapping[str, Any]]) -> Picture:
    bars = []
    for state, name in zip(_STATES, _STATE_NAMES, strict=True):
        counts = Counter(layer[state] for layer in layers)
        told = ", ".join(f"{counts[value]} {value}" for value, _ in _TONES if counts[value])
        bars.append(Bar(label=name, parts=tuple((float(counts[value]), tone) for value, tone in _TONES), text=told))
    return bar_chart(f"{engine}: {len(layers)} weights", bars, legend=_TONES)


def _engines(engines: Sequence[Mapping[str, Any]]) -> Html:
    columns = (Column("engine"), Column("file"), Column("runs on"), Column("size", is_number=True), Column("flag requested"),
               Column("eligible by the log", is_number=True), Column("chosen by the log", is_number=True))  # fmt: skip
    rows = [
        (
            engine["name"],
            engine["file"],
            ", ".join(f"SM{capability}" for capability in engine.get("targets", ())),
            size(engine["size_bytes"]),
            number(engine["flag_requested"]),
            "not told" if engine.get("num_eligible") is None else engine["num_eligible"],
            "not told" if engine.get("num_chosen") is None else engine["num_chosen"],
        )
        for engine in engines
    ]
    return table(columns, rows, label="Engines")


def _evidence(layers: Sequence[Mapping[str, Any]]) -> Html:
    """One row a weight; engines of which all the same is known share it."""
    engines: dict[tuple[Any, ...], list[str]] = {}
    reasons = Counter(layer["reason"] for layer in layers)
    for layer in layers:
        states = tuple(layer[state] for state in _STATES)
        times = " / ".join(number(layer[name]) for name in ("dense_ms", "sparse_ms") if layer.get(name) is not None)
        key = (
            layer["weight"],
            "x".join(map(str, layer.get("shape", ()))),
            *states,
            _shortened(layer["reason"], reasons),
            times,
        )
        engines.setdefault(key, []).append(layer["engine"])
    has_times = any(key[-1] for key in engines)
    columns = [Column("weight"), Column("engine"), Column("shape"), *(Column(name) for name in _STATE_NAMES)]
    columns += [Column("why", is_wide=True)] + ([Column("dense / sparse ms")] if has_times else [])
    rows = []
    for key, names in engines.items():
        weight, shape, *rest, times = key
        rows.append([weight, ", ".join(dict.fromkeys(names)), shape, *rest, *([times] if has_times else [])])
    return table(columns, rows, label="Evidence for each weight", is_sortable=True, kind="names")


def _shortened(reason: str, counts: Mapping[str, int]) -> str:
    """A long reason that many rows share, without what the table of reasons above tells in full."""
    return reason.partition(":")[0] if len(reason) > 60 and counts[reason] > 3 else reason


def _measured(measured: Mapping[str, Any]) -> list[Html]:
    parts = []
    for name, found in list(measured.items())[:_MOST_MEASURED]:
        points = sorted(found["points"], key=lambda point: point["batch"] * point["sequence"])
        parts.append(el("p", el("b", name), f": {found['break_even']}"))
        x = [float(point["batch"] * point["sequence"]) for point in points]
        lines = [
            Line(label="dense", values=[point["dense_ms"] for point in points], tone="n"),
            Line(label="sparse", values=[point["sparse_ms"] for point in points], tone="c"),
        ]
        pictures = [(line_chart(f"Time, {name}", x, lines, x_label="tokens at once", y_label="ms"), "")] if len(x) > 1 else []
        parts.append(figures(pictures))
        columns = (Column("batch", is_number=True), Column("tokens", is_number=True), Column("dense ms", is_number=True),
                   Column("sparse ms", is_number=True), Column("gain", is_number=True))  # fmt: skip
        rows = [
            (p["batch"], p["sequence"], number(p["dense_ms"]), number(p["sparse_ms"]), f"{p['dense_ms'] / p['sparse_ms']:.2f}x")
            for p in points
        ]
        parts.append(table(columns, rows, label=f"Measured times, {name}"))
    if len(measured) > _MOST_MEASURED:
        parts.append(el("p", f"{len(measured) - _MOST_MEASURED} more in report.json.", class_="soft"))
    return parts


def plan_part(section: Mapping[str, Any], document: Mapping[str, Any]) -> Html:
    """What 2:4 is predicted to gain: workload by workload, layer by layer, and in memory."""
    device, runtime = section["device"], section["runtime"]
    named = f"{device.get('title', '')}, runtime {runtime.get('name', '')}, {section['dtype']} weights."
    bars = []
    for point in section["points"][:_MOST_BARS]:
        for phase in ("prefill", "decode"):
            if point[phase] is not None:
                gain = point[phase]["speedup"]
                label = f"{phase}, batch {point['batch']}, {point['seq']} tokens"
                bars.append(Bar(label=label, parts=((gain, "c" if gain >= 1 else "b"),), text=f"{gain:.2f}x"))
    picture = bar_chart("Predicted gain as recommended (longer is better)", bars, reference=(1.0, "dense"))
    parts: list[Html | None] = [
        el("p", named, " A forecast from a roofline, not a measurement."),
        figure_of(picture),
        _workloads(section["points"]),
        el("p", "Recommended passes: ", el("code", section["passes"])) if section["passes"] else None,
        el("h3", "Weights in memory"),
        _memory(section["memory"]),
    ]
    if section["notes"]:
        parts.append(el("ul", (el("li", note) for note in section["notes"])))
    layers = layer_facts(document)
    parts += [figure_of(picture, note, is_wide=True) for picture, note in gain_pictures(layers)]
    if "passes" not in document:
        parts += [el("h3", "Layer by layer"), layer_table(layers)]
    else:
        parts.append(el("p", "Each layer's predicted gain stands in the table of layers.", class_="soft"))
    return join(parts)


def _workloads(points: Sequence[Mapping[str, Any]]) -> Html:
    columns = (Column("batch", is_number=True), Column("prompt", is_number=True), Column("prefill, dense", is_number=True),
               Column("planned", is_number=True), Column("gain", is_number=True), Column("a token, dense", is_number=True),
               Column("planned", is_number=True), Column("gain", is_number=True))  # fmt: skip
    rows = []
    for point in points:
        row: list[object] = [point["batch"], point["seq"]]
        for phase in ("prefill", "decode"):
            times = point[phase]
            milliseconds = ("", "", "") if times is None else (
                f"{number(1e3 * times['dense_s'])} ms", f"{number(1e3 * times['planned_s'])} ms", f"{times['speedup']:.2f}x"
            )  # fmt: skip
            row += milliseconds
        rows.append(row)
    return table(columns, rows, label="Predicted times")


def _memory(rows: Sequence[Mapping[str, Any]]) -> Html:
    columns = (Column("linear layers in"), Column("dense", is_number=True), Column("as recommended", is_number=True),
               Column("all 2:4", is_number=True))  # fmt: skip
    sizes = [(row["dtype"], *(size(row[f"{kind}_bytes"]) for kind in ("dense", "planned", "everything"))) for row in rows]
    return table(columns, sizes, label="Weights in memory")


def artifact_part(section: Mapping[str, Any], document: Mapping[str, Any]) -> Html:
    """Files and their sizes, as bars and as a table."""
    ordered = sorted(section["files"].items(), key=lambda item: -item[1])
    bars = [Bar(label=name, parts=((float(count), "a"),), text=size(count)) for name, count in ordered[:_MOST_FILES]]
    rest = ordered[_MOST_FILES:]
    if rest:
        count = sum(count for _, count in rest)
        bars.append(Bar(label=f"{len(rest)} smaller files", parts=((float(count), "n"),), text=size(count)))
    model = document.get("model", {}).get("files") or {}
    dense = sum(count for name, count in model.items() if str(name).endswith((".safetensors", ".gguf")) and is_number(count))
    if dense:
        bars.append(
            Bar(label="for comparison: weights of the model it came from", parts=((float(dense), "n"),), text=size(dense))
        )
    num_sparse = sum(len(weights) for weights in section["expected_sparse"].values())
    parts: list[Html | None] = [
        el("p", f"{section['target']}, {section['dtype']}: {size(section['size_bytes'])} in {len(section['files'])} files."),
        figure_of(bar_chart("Sizes on disk", bars)) if bars else None,
        el(
            "p",
            with_code(
                f"{num_sparse} stored weights have to be N:M sparse; `artifact.expected_sparse` in report.json names them, and "
                "`sparsepass verify` on this folder checks them again. A sparse weight is stored with its zeros, so the files "
                "are as large as dense ones; runtimes that know 2:4 pack it when they load it."
            ),
        ),
        el("ul", (el("li", note) for note in section["notes"])) if section["notes"] else None,
    ]
    columns = (Column("file"), Column("size", is_number=True), Column("bytes", is_number=True))
    rows = [(name, size(count), f"{count:,}") for name, count in ordered]
    parts.append(el("details", el("summary", "All files"), table(columns, rows[:500], label="All files")))
    return join(parts)


def verification_part(section: Mapping[str, Any], document: Mapping[str, Any]) -> Html:
    """Each check, whether it held, and what was found."""
    del document
    if section.get("held") is None:
        return el("p", "Verification was switched off: nothing is known of the written files.", class_="unknown")
    rows = [(check["name"], _CHECKED[check.get("held")], check["summary"]) for check in section["checks"]]
    return table((Column("check"), Column("result"), Column("what was found", is_wide=True)), rows, label="Checks")


def pattern_part(section: Mapping[str, Any], document: Mapping[str, Any]) -> Html:
    """What `sparsepass verify` found in the stored weights."""
    del document
    parts: list[Html] = []
    for report in section["reports"]:
        parts.append(
            el("p", el("b", report["source"]), f": {report['pattern']} {'holds' if report['conforms'] else 'does NOT hold'}")
        )
        rows = []
        for entry in report["entries"]:
            shape = "x".join(map(str, entry["shape"]))
            total = 1
            for length in entry["shape"]:
                total *= length
            zeros = f"{100 * (1 - entry['num_nonzeros'] / total):.4g}%" if entry["num_groups"] and total else ""
            axis = "" if entry["axis"] is None else entry["axis"]
            rows.append((entry["weight"], entry["verdict"], shape, axis, zeros, entry["num_violations"] or "", entry["reason"]))
        columns = (Column("weight"), Column("verdict"), Column("stored shape"), Column("summed along axis", is_number=True),
                   Column("zeros", is_number=True), Column("groups that violate", is_number=True),
                   Column("why", is_wide=True))  # fmt: skip
        parts.append(table(columns, rows, label=f"Weights of {report['source']}", is_sortable=True, kind="names"))
    return join(parts)


def samples_part(section: Mapping[str, Any], document: Mapping[str, Any]) -> Html:
    """Inputs and outputs to check another runtime against."""
    del document
    rows = [
        (name, kind, "x".join(map(str, tensor["shape"])), tensor["dtype"])
        for kind in ("inputs", "outputs")
        for name, tensor in section[kind].items()
    ]
    told = el(
        "p", el("code", section["file"]), " holds these tensors, so that another runtime can be checked against this export."
    )
    return join([told, table((Column("name"), Column("kind"), Column("shape"), Column("type")), rows[:200], label="Samples")])


def model_part(section: Mapping[str, Any], document: Mapping[str, Any]) -> Html:
    """Where the model came from."""
    del document
    known = [("source", f"{section['source']} ({section['kind']})"), ("class", section.get("class") or "")]
    known += [("parameters", f"{section['num_parameters']:,}"), ("type of the weights", section["dtype"])]
    known += [(name, str(section[name])) for name in ("revision", "commit", "gguf_file") if section.get(name)]
    notes = section.get("notes") or ()
    listed = el("ul", (el("li", note) for note in notes)) if notes else None
    return join([facts(known, label="Model"), listed])


def runs_part(document: Mapping[str, Any]) -> Html | None:
    """Each command with its time and machine, and the versions of all of them."""
    items, names = [], list(dict.fromkeys(name for run in document["runs"] for name in run["versions"]))
    for run in document["runs"]:
        place = run["machine"]
        memory = f", {size(place['memory_bytes'])} memory" if place.get("memory_bytes") else ""
        on = f"{place.get('processor', '')}, {place.get('cores', '')} cores{memory}"
        on += "".join(f", {name}" for name in place.get("accelerators", ()))
        said = el("b", run["stage"]), f", {run['created']}, {run['seconds']} s", el("br"), el("code", run["command"]), el("br")
        items.append(el("li", *said, el("span", on, class_="soft")))
    if not items:
        return None
    columns = (Column("package"), *(Column(f"{index}. {run['stage']}") for index, run in enumerate(document["runs"], 1)))
    rows = [[name, *(str(run["versions"].get(name, "")) for run in document["runs"])] for name in names]
    listed = table(columns, rows, label="Versions")
    return join([el("ol", items, class_="runs"), el("details", el("summary", "Versions"), listed), _schema(document)])


def _schema(document: Mapping[str, Any]) -> Html:
    said = json.dumps({name: document[name] for name in ("schema", "schema_version")})
    return el("p", "Rendered from report.json (", el("code", said), ") and nothing else.", class_="soft")
