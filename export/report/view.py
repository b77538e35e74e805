"""A report as a reader sees it: its title, its answers, and one list of blocks for each section.

report.html, report.md and the terminal are renderings of this view, and read nothing else.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Final, Literal, final

from sparsepass.export.report import section_views
from sparsepass.export.report.blocks import Block, Column, Drawings, Notes, Raw, Sentence, Steps, Table
from sparsepass.export.report.layers import layer_facts, passes_view, skipped_rows
from sparsepass.export.report.parts import is_number
from sparsepass.export.report.schema import ReportDocument, RunEntry
from sparsepass.export.report.sections import PassesSection, PatternSection, PlanSection, VerificationSection
from sparsepass.export.report.speed import SpeedSection
from sparsepass.export.report.training import training_view
from sparsepass.export.report.words import number, rate, size

Tone = Literal["good", "bad", "unknown", "plain"]

_HOW_TO_FIND_OUT: Final = (
    "To find out, on a machine with the GPU: `sparse-export FOLDER --target tensorrt` builds engines and records for each "
    "layer which kernel was chosen; `--target torch` measures torch's own 2:4 kernels. On a processor: `sparse-export FOLDER "
    "--target packed`, then `sparsepass bench`."
)
_MOST_REASONS: Final = 6
_MAX_UNKNOWN_LETTERS: Final = 4000

SectionViewer = Callable[[Any, ReportDocument], Iterable[Block]]
"""Takes a section and the whole report."""

VIEWS: Final[Mapping[str, tuple[str, SectionViewer]]] = {
    "accuracy": ("Accuracy", section_views.accuracy_view),
    "passes": ("Layers", passes_view),
    "retraining": ("Training", training_view),
    "sparsity": ("Was the sparsity used?", section_views.sparsity_view),
    "speed": ("Speed", section_views.speed_view),
    "size": ("Size", section_views.size_view),
    "plan": ("Plan", section_views.plan_view),
    "artifact": ("Files", section_views.artifact_view),
    "verification": ("Verification", section_views.verification_view),
    "pattern": ("Stored weights", section_views.pattern_view),
    "samples": ("Samples", section_views.samples_view),
    "model": ("Model", section_views.model_view),
}
"""Section -> its heading and its view, in the order of the page."""


@final
@dataclass(frozen=True)
class Answer:
    """One question that a reader has, answered.

    Attributes:
        question: In a few words.
        short: The answer in a few words, for a reader in a hurry.
        sentences: The answer. Words between backticks are code.
        tone: Whether it is good news, bad news, or not known.
    """

    question: str
    short: str
    sentences: Sequence[str]
    tone: Tone = "plain"


@final
@dataclass(frozen=True)
class SectionView:
    """A section of a report.

    Attributes:
        heading: What stands above it.
        blocks: What it shows, in order.
    """

    heading: str
    blocks: tuple[Block, ...]


@final
@dataclass(frozen=True)
class ReportView:
    """A report.

    Attributes:
        title: The model's name, what was done to it, and its form.
        lines: What stands under the title.
        answers: What a reader wants to know first.
        sections: The rest.
    """

    title: str
    lines: tuple[Sentence, ...]
    answers: tuple[Answer, ...]
    sections: tuple[SectionView, ...]


def report_view(report: ReportDocument) -> ReportView:
    """View a report. Sections that this version does not know are shown as JSON."""
    sections = [section_view(report, name) for name in VIEWS]
    sections += [SectionView(name, (Raw(_cut(section)),)) for name, section in (report.model_extra or {}).items()]
    sections.append(SectionView("How it was made", tuple(_runs(report))))
    return ReportView(
        title=_title(report),
        lines=tuple(_lines(report)),
        answers=tuple(summary(report)),
        sections=tuple(section for section in sections if section.blocks),
    )


def section_view(report: ReportDocument, name: str) -> SectionView:
    """View one section; without blocks if the report does not have it."""
    heading, view = VIEWS[name]
    section = getattr(report, name)
    blocks = () if section is None else view(section, report)
    return SectionView(heading, tuple(block for block in blocks if not isinstance(block, Drawings | Notes) or block.items))


def _title(report: ReportDocument) -> str:
    name = report.model.source if report.model is not None else report.plan.model if report.plan is not None else ""
    shown = PurePath(name).name or name
    what = list(dict.fromkeys(layer.pattern for layer in layer_facts(report) if layer.pattern))
    what += ["retrained"] if report.retraining is not None and report.retraining.runs else []
    form = f"as {report.artifact.target}" if report.artifact is not None else ""
    named = f"{shown}:" if shown and (what or form) else shown
    return " ".join(part for part in (named, ", ".join(what), form) if part) or "sparsepass report"


def _lines(report: ReportDocument) -> Iterator[Sentence]:
    if report.model is not None and report.model.source:
        yield Sentence(f"Model: `{report.model.source}`")
    if report.recipe:
        yield Sentence(f"Passes: `{report.recipe}`")
    if report.runs:
        last, stages = report.runs[-1], " > ".join(run.stage for run in report.runs)
        yield Sentence(f"{stages}, {last.created}, sparsepass {last.versions.get('sparsepass', '')}")


def _runs(report: ReportDocument) -> Iterator[Block]:
    """Each command with its time and machine, and the versions of all of them."""
    runs = report.runs
    if runs:
        yield Steps(tuple((run.stage, f"{run.created}, {run.seconds} s", run.command, _machine(run)) for run in runs))
        columns = [Column("package"), *(Column(f"{index}. {run.stage}") for index, run in enumerate(runs, 1))]
        names = dict.fromkeys(name for run in runs for name in run.versions)
        rows = [[name, *(str(run.versions.get(name, "")) for run in runs)] for name in names]
        yield Table("Versions", columns, rows, folded="Versions")
        header = json.dumps({"schema": report.schema_, "schema_version": report.schema_version})
        yield Sentence(f"Rendered from report.json (`{header}`) and nothing else.", tone="soft")


def _machine(run: RunEntry) -> str:
    place = run.machine
    cores = "" if place.cores is None else place.cores
    memory = f", {size(place.memory_bytes)} memory" if place.memory_bytes else ""
    return f"{place.processor}, {cores} cores{memory}" + "".join(f", {name}" for name in place.accelerators)


def _cut(section: Any) -> str:
    text = json.dumps(section, indent=1, ensure_ascii=False)
    cut = f"\n... ({len(text):,} characters in report.json)" if len(text) > _MAX_UNKNOWN_LETTERS else ""
    return text[:_MAX_UNKNOWN_LETTERS] + cut


def summary(report: ReportDocument) -> list[Answer]:
    """Answer a reader's questions from the report alone; what it does not tell is said to be unknown, with what to do.

    Example:
        >>> from sparsepass.export.report.document import new_report
        >>> [answer.question for answer in summary(ReportDocument.parse(new_report()))]
        ['What was pruned?', 'Is the accuracy kept?', 'Does a runtime use the sparsity?']
    """
    passes = report.passes
    has_more = report.plan is not None or report.pattern is not None
    answers = [_pruned(report)] if passes is not None or not has_more else []
    if passes is not None and passes.skipped:
        answers.append(_left_dense(passes))
    if passes is not None or report.accuracy is not None or not has_more:
        answers.append(_accuracy(report))
    if report.plan is not None:
        answers.append(_plan(report.plan))
    if passes is not None or report.sparsity is not None or report.speed is not None or not has_more:
        answers.append(_used(report) if report.speed is None else _measured(report, report.speed))
    if report.verification is not None:
        answers.append(_verified(report.verification))
    if report.pattern is not None:
        answers.append(_stored(report.pattern))
    return answers


def _pruned(report: ReportDocument) -> Answer:
    question, section = "What was pruned?", report.passes
    if section is None or not section.num_sparse:
        none = "No pass has made a layer sparse." if section is None else f"All {section.num_sites} linear layers are dense."
        return Answer(question, "nothing", (none,))
    patterns = "/".join(sorted({layer.pattern for layer in layer_facts(report) if layer.pattern})) or "N:M"
    said = [f"{section.num_sparse} of {section.num_sites} linear layers are {patterns} sparse."]
    if patterns == "2:4":
        direction = "along the direction in which a layer sums"
        said.append(f"That means: of every 4 consecutive weights {direction}, at most 2 are not zero.")
    calibrated: dict[str, list[str]] = {}
    for record in section.passes:
        if (known := record.calibration) is not None:
            tokens = f", {known.num_tokens:,} tokens" if is_number(known.num_tokens) else ""
            calibrated.setdefault(f"{known.source}{tokens}", []).append(f"`{record.name}`")
    said += [f"Calibrated on {source}: {', '.join(names)}." for source, names in calibrated.items()]
    branches = [layer.branch_k for layer in (section.layers or {}).values() if layer.branch_k]
    if branches:
        ks = "/".join(str(k) for k in sorted(set(branches)))
        said.append(f"{len(branches)} of them have a small dense branch beside them (SLoRB, k={ks}).")
    for run in report.retraining.runs if report.retraining is not None else ():
        said.append(f"Afterwards it was trained for {run.num_steps:,} steps ({run.num_tokens:,} tokens, {run.method}).")
    return Answer(question, f"{section.num_sparse} of {section.num_sites} layers {patterns}", said)


def _left_dense(section: PassesSection) -> Answer:
    rows = skipped_rows(section)
    said = [f"{_layers(count)}, {names}: {reason}." for reason, count, names in rows[:_MOST_REASONS]]
    if len(rows) > _MOST_REASONS:
        said.append(f"{sum(row[1] for row in rows[_MOST_REASONS:])} more, for {len(rows) - _MOST_REASONS} other reasons.")
    return Answer("What was left dense, and why?", _layers(len(section.skipped)), said)


def _accuracy(report: ReportDocument) -> Answer:
    question, section = "Is the accuracy kept?", report.accuracy
    if section is None or not section.measurements:
        said = ["Not measured. `--eval-text FILE` measures perplexity before and after.", *_kept_by_export(report)]
        return Answer(question, "not measured", said, tone="unknown")
    found = [(entry.name, float(entry.perplexity)) for entry in section.measurements if is_number(entry.perplexity)]
    if not found:
        said = ["Perplexity is infinite or not a number: the model no longer works on this text."]
        return Answer(question, "no finite perplexity", said, tone="bad")
    (base, first), (_, last) = found[0], found[-1]
    parts = [f"{number(first)} for {base}"]
    parts += [f"{number(value)} for {name} ({value / first:.2f} times {base})" for name, value in found[1:]]
    said = [f"Perplexity on {section.text}, lower is better: {', '.join(parts)}."]
    said += (*_won_back(found), *_kept_by_export(report))
    short = f"{last / first:.2f} times the perplexity of {base}" if len(found) > 1 else "measured once"
    is_bad = any("Training made it worse" in sentence or "do NOT compute" in sentence for sentence in said)
    return Answer(question, short, said, tone="bad" if is_bad else "plain")


def _won_back(found: list[tuple[str, float]]) -> Iterator[str]:
    """What training changed, where the report has all three figures."""
    pruned = [value for name, value in found[1:] if "retrained" not in name and "switched off" not in name]
    trained = [value for name, value in found if "retrained" in name]
    if not pruned or not trained or found[0][0] != "dense":
        return
    base, before, after = map(math.log, (found[0][1], pruned[-1], trained[-1]))
    if before - base > 0.005:
        share = (before - after) / (before - base)
        if share >= 0:
            yield f"Training closed {share:.0%} of the gap that pruning had opened (in log-perplexity)."
        else:
            yield f"Training made it worse: the gap that pruning had opened grew by {-share:.0%} (in log-perplexity)."


def _kept_by_export(report: ReportDocument) -> Iterator[str]:
    """How the written files relate to what was measured."""
    artifact, verification = report.artifact, report.verification
    if artifact is None or verification is None:
        return
    files = f"The exported files ({artifact.target}, {artifact.dtype})"
    ran = {"outputs": files, "engine outputs": "The engines", "kernels": "The 2:4 kernels"}
    found = [check for check in verification.checks if check.name in ran]
    for check in found:
        subject, said = ran[check.name], check.summary
        if check.held:
            yield f"{subject} were run and compute what the program computes: {said}."
        elif check.held is False:
            yield f"{subject} do NOT compute what the program computes: {said}."
        else:
            yield f"{subject} could not be run here, so their own accuracy is not known: {said}."
    if not found:
        yield f"{files} were not run, so their own accuracy is not known."


def _plan(section: PlanSection) -> Answer:
    question = "What is 2:4 predicted to gain?"
    where = f"{section.device.get('title', '')}, {section.runtime.get('name', '')}, {section.dtype} weights"
    planned = sum(row.decision == "2:4" for row in section.layers)
    if not section.pays:
        return Answer(question, "nothing", [f"Nothing, at these sizes, on {where}."], tone="bad")
    point = section.points[0]
    gained = f"On {where}, at batch {point.batch}, {point.seq} tokens: prefill {point.prefill.speedup:.2f} times as fast"
    short = f"prefill {point.prefill.speedup:.2f}x"
    if point.decode is not None:
        gained += f", decoding {point.decode.speedup:.2f} times"
        short += f", decoding {point.decode.speedup:.2f}x"
    worth = f"{planned} of {len(section.layers)} layers are worth making 2:4. A forecast, not a measurement."
    return Answer(question, short, (f"{gained}.", worth))


def _used(report: ReportDocument) -> Answer:
    question, section = "Does a runtime use the sparsity?", report.sparsity
    if section is None:
        return _not_known(question, report)
    meant = section.meant
    ran = Counter(layer.ran_sparse for layer in meant)
    runtime = f"{section.runtime} {section.runtime_version}"
    if not meant:
        return Answer(question, "nothing is sparse", (f"{runtime} got no sparse weight.",))
    said = []
    for engine in dict.fromkeys(layer.engine for layer in meant):
        counts = Counter(layer.ran_sparse for layer in meant if layer.engine == engine)
        told = {"yes": "ran sparse", "no": "ran dense", "unknown": "unknown"}
        parts = [f"{counts[value]} {word}" for value, word in told.items() if counts[value]]
        said.append(f"{runtime}, {engine}: of {sum(counts.values())} weights, {', '.join(parts)}.")
    for value, word in (("no", "ran dense"), ("unknown", "is unknown")):
        reasons = Counter(layer.reason for layer in meant if layer.ran_sparse == value)
        said += [f"Why it {word} ({count} times): {reason}." for reason, count in reasons.most_common(2)]
    if ran["unknown"] == len(meant):
        states = section.counts.get("total", {})
        if states.get("conforms", {}).get("yes") and states.get("flag_requested", {}).get("yes"):
            said.append("What is known: the weights conform, and the builder was allowed to use sparse kernels.")
        said.append(_HOW_TO_FIND_OUT)
        return Answer(question, "unknown", said, tone="unknown")
    said += [f"Measured, {name}: {found.break_even}." for name, found in list((section.measured or {}).items())[:2]]
    short = f"yes for {ran['yes']} of {len(meant)}" if ran["yes"] else "no" if not ran["unknown"] else "not seen"
    tone: Tone = "good" if ran["yes"] and ran["yes"] >= ran["no"] else "bad" if ran["no"] else "unknown"
    return Answer(question, short, said, tone=tone)


def _measured(report: ReportDocument, section: SpeedSection) -> Answer:
    """Whether a kernel skips the zeros, and what that gains, by what a benchmark measured."""
    question, side, point = "Does a runtime use the sparsity?", section.sides[0], section.main
    if side.runs_packed:
        word, said = "yes", [f"Yes: {side.name}: {side.said}."]
    elif side.num_packed:
        word = "no"
        said = [
            f"No: {side.name}: {side.said}. torch's own operations unpack each weight for each call; no kernel of ours ran."
        ]
    else:
        word = "no"
        said = [f"No: {side.name}: {side.said}. Zeros are multiplied as any other number; `--target packed` leaves them out."]
    if not side.num_packed and report.sparsity is not None:
        return _used(report)  # another runtime, which knows better than plain transformers
    if point is None or not point.rates:
        return Answer(question, word, said, tone="good" if side.runs_packed else "bad")
    where = section.place
    gain = point.gain
    if gain is None:
        said.append(f"Measured, {point.said}: {rate(point.rates[0])} tokens a second ({where}).")
        said.append("How much that gains is not known: `sparsepass bench FOLDER --against DENSE` measures both.")
        short = f"{word}, {rate(point.rates[0])} tokens a second"
        return Answer(question, short, said, tone="good" if side.runs_packed else "bad")
    other = section.sides[1].name
    for each in section.points:
        if each.gain is not None:
            both = " against ".join(map(rate, each.rates))
            said.append(f"Measured, {each.said}: {both} tokens a second, {each.gain:.2f} times {other}.")
    if side.loaded_bytes and section.sides[1].loaded_bytes:
        said.append(f"Memory: {side.loaded_bytes / section.sides[1].loaded_bytes:.2f} times {other}.")
    said.append(f"Measured on {where}.")
    short = f"{word}, {gain:.2f} times as fast as {other}"
    return Answer(question, short, said, tone="good" if side.runs_packed and gain >= 1 else "bad")


def _not_known(question: str, report: ReportDocument) -> Answer:
    if report.passes is None or not report.passes.num_sparse:
        return Answer(question, "nothing is sparse", ("There is no sparse layer that it could use.",))
    if report.artifact is None:
        said = "Unknown: nothing was exported yet, so no runtime has seen these weights."
    else:
        said = (
            f"Unknown: {report.artifact.target} files hold the weights with their zeros, and do not say which kernels run. "
            "onnxruntime's and plain transformers' own kernels multiply them as dense ones: right results, no speedup."
        )
    return Answer(question, "unknown", (said, _HOW_TO_FIND_OUT), tone="unknown")


def _verified(section: VerificationSection) -> Answer:
    question, checks = "Do the written files hold what they should?", section.checks
    if not checks:
        said = ["Verification was switched off: nothing is known of the written files."]
        return Answer(question, "not checked", said, tone="unknown")
    rest = [f"Could not be checked here: {check.name} ({check.summary})." for check in checks if check.held is None]
    if failed := [check for check in checks if check.held is False]:
        broken = [f"`{check.name}` did NOT hold: {check.summary}." for check in failed]
        return Answer(question, "verification did NOT hold", broken + rest, tone="bad")
    held = [check.name for check in checks if check.held]
    if any(check.held is None and check.decides for check in checks):
        said = [f"Not everything could be checked here. Checked, and held: {', '.join(held) or 'nothing'}."]
        return Answer(question, "not checked", said + rest, tone="unknown")
    said = [f"Verification held. Checked in the files themselves: {', '.join(held) or 'nothing'}."]
    return Answer(question, "verification held", said + rest, tone="good")


def _stored(section: PatternSection) -> Answer:
    question = "Do the stored weights hold the pattern?"
    said = [f"{found.source}: {found.said}, {_counted(found.counts)}." for found in section.reports]
    said += [f"Likely cause: {cause.text}. {cause.advice}" for found in section.reports for cause in found.causes]
    short = "the pattern holds" if section.conforms else "the pattern does NOT hold"
    return Answer(question, short, said, tone="good" if section.conforms else "bad")


def _counted(counts: Mapping[str, int]) -> str:
    words = {"conforms": "conform", "violates": "violate"}
    parts = [f"{count} {words.get(verdict, verdict)}" for verdict, count in counts.items() if count]
    return f"of its weights {', '.join(parts)}" if parts else "no weight found"


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"
