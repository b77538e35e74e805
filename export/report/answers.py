"""A report in plain words: what was pruned, what was not and why, what accuracy was kept, and whether the sparsity is used."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from sparsepass.export.report.layers import is_number, joined_names, layer_facts
from sparsepass.export.report.markdown import number

Tone = Literal["good", "bad", "unknown", "plain"]

_HOW_TO_FIND_OUT: Final = (
    "To find out, on a machine with the GPU: `sparse-export FOLDER --target tensorrt` builds engines and records for each "
    "layer which kernel was chosen; `--target torch` measures torch's own 2:4 kernels."
)
_MOST_REASONS: Final = 6


@final
@dataclass(frozen=True, kw_only=True)
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
    sentences: tuple[str, ...]
    tone: Tone = "plain"


def summary(document: Mapping[str, Any]) -> list[Answer]:
    """Answer a reader's questions from the report alone; what it does not tell is said to be unknown, with what to do.

    Args:
        document: A checked report.

    Example:
        >>> from sparsepass.export.report.document import new_report
        >>> [answer.question for answer in summary(new_report())]
        ['What was pruned?', 'Is the accuracy kept?', 'Does a runtime use the sparsity?']
    """
    passes = document.get("passes")
    has_more = any(name in document for name in ("plan", "pattern"))
    answers = [_pruned(document)] if passes is not None or not has_more else []
    if passes is not None and passes["skipped"]:
        answers.append(_left_dense(passes))
    if passes is not None or "accuracy" in document or not has_more:
        answers.append(_accuracy(document))
    if "plan" in document:
        answers.append(_plan(document["plan"]))
    if passes is not None or "sparsity" in document or not has_more:
        answers.append(_used(document))
    if "verification" in document:
        answers.append(_verified(document["verification"]))
    if "pattern" in document:
        answers.append(_stored(document["pattern"]))
    return answers


def skipped_rows(section: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Rows (reason, number of layers, which) of what the section ``passes`` says was left dense."""
    reasons: Mapping[str, str] = section["skipped"]
    layers: dict[str, list[str]] = {}
    for layer, reason in reasons.items():
        layers.setdefault(reason, []).append(layer)
    ordered = sorted(layers.items(), key=lambda item: -len(item[1]))
    return [(reason, len(names), joined_names(names)) for reason, names in ordered]


def _pruned(document: Mapping[str, Any]) -> Answer:
    question, section = "What was pruned?", document.get("passes")
    if section is None or not section["num_sparse"]:
        none = "No pass has made a layer sparse." if section is None else f"All {section['num_sites']} linear layers are dense."
        return Answer(question=question, short="nothing", sentences=(none,))
    patterns = "/".join(sorted({layer.pattern for layer in layer_facts(document) if layer.pattern})) or "N:M"
    said = [f"{section['num_sparse']} of {section['num_sites']} linear layers are {patterns} sparse."]
    if patterns == "2:4":
        said.append(
            "That means: of every 4 consecutive weights along the direction in which a layer sums, at most 2 are not zero."
        )
    calibrated: dict[str, list[str]] = {}
    for record in section["passes"]:
        known = record.get("calibration")
        if known:
            tokens = f", {known['num_tokens']:,} tokens" if is_number(known.get("num_tokens")) else ""
            name = record["text"].partition("{")[0]
            calibrated.setdefault(f"{known['source']}{tokens}", []).append(f"`{name}`")
    said += [f"Calibrated on {source}: {', '.join(names)}." for source, names in calibrated.items()]
    branches = [facts["branch_k"] for facts in (section.get("layers") or {}).values() if facts.get("branch_k")]
    if branches:
        ks = "/".join(str(k) for k in sorted(set(branches)))
        said.append(f"{len(branches)} of them have a small dense branch beside them (SLoRB, k={ks}).")
    runs = document.get("retraining", {}).get("runs", ())
    for run in runs:
        said.append(
            f"Afterwards it was trained for {run['num_steps']:,} steps ({run['num_tokens']:,} tokens, {run['method']})."
        )
    return Answer(question=question, short=f"{section['num_sparse']} of {section['num_sites']} layers {patterns}",
                  sentences=tuple(said))  # fmt: skip


def _left_dense(section: Mapping[str, Any]) -> Answer:
    rows = skipped_rows(section)
    said = [f"{_layers(count)}, {names}: {reason}." for reason, count, names in rows[:_MOST_REASONS]]
    if len(rows) > _MOST_REASONS:
        said.append(f"{sum(row[1] for row in rows[_MOST_REASONS:])} more, for {len(rows) - _MOST_REASONS} other reasons.")
    return Answer(question="What was left dense, and why?", short=_layers(len(section["skipped"])), sentences=tuple(said))


def _accuracy(document: Mapping[str, Any]) -> Answer:
    question = "Is the accuracy kept?"
    section = document.get("accuracy", {})
    entries = [entry for entry in section.get("measurements", ()) if is_number(entry["perplexity"])]
    if not section.get("measurements"):
        said = ["Not measured. `--eval-text FILE` measures perplexity before and after.", *_kept_by_export(document)]
        return Answer(question=question, short="not measured", sentences=tuple(said), tone="unknown")
    if not entries:
        said = ["Perplexity is infinite or not a number: the model no longer works on this text."]
        return Answer(question=question, short="no finite perplexity", sentences=tuple(said), tone="bad")
    first, last = entries[0], entries[-1]
    parts = [f"{number(float(first['perplexity']))} for {first['name']}"]
    for entry in entries[1:]:
        times = entry["perplexity"] / first["perplexity"]
        parts.append(f"{number(float(entry['perplexity']))} for {entry['name']} ({times:.2f} times {first['name']})")
    said = [f"Perplexity on {section['text']}, lower is better: {', '.join(parts)}."]
    said += _won_back(entries)
    said += _kept_by_export(document)
    times = last["perplexity"] / first["perplexity"]
    short = f"{times:.2f} times the perplexity of {first['name']}" if last is not first else "measured once"
    is_bad = any("Training made it worse" in sentence or "do NOT compute" in sentence for sentence in said)
    return Answer(question=question, short=short, sentences=tuple(said), tone="bad" if is_bad else "plain")


def _won_back(entries: list[Mapping[str, Any]]) -> Iterator[str]:
    """What training changed, where the report has all three figures."""
    pruned = [entry for entry in entries[1:] if "retrained" not in entry["name"] and "switched off" not in entry["name"]]
    trained = [entry for entry in entries if "retrained" in entry["name"]]
    if not pruned or not trained or entries[0]["name"] != "dense":
        return
    base, before, after = (math.log(entry["perplexity"]) for entry in (entries[0], pruned[-1], trained[-1]))
    if before - base > 0.005:
        share = (before - after) / (before - base)
        if share >= 0:
            yield f"Training closed {share:.0%} of the gap that pruning had opened (in log-perplexity)."
        else:
            yield f"Training made it worse: the gap that pruning had opened grew by {-share:.0%} (in log-perplexity)."


def _kept_by_export(document: Mapping[str, Any]) -> Iterator[str]:
    """How the written files relate to what was measured."""
    artifact, verification = document.get("artifact"), document.get("verification")
    if artifact is None or verification is None:
        return
    files = f"The exported files ({artifact['target']}, {artifact['dtype']})"
    ran = {"outputs": files, "engine outputs": "The engines", "kernels": "The 2:4 kernels"}
    found = [check for check in verification["checks"] if check["name"] in ran]
    for check in found:
        subject, said = ran[check["name"]], check["summary"]
        if check["held"]:
            yield f"{subject} were run and compute what the program computes: {said}."
        elif check["held"] is False:
            yield f"{subject} do NOT compute what the program computes: {said}."
        else:
            yield f"{subject} could not be run here, so their own accuracy is not known: {said}."
    if not found:
        yield f"{files} were not run, so their own accuracy is not known."


def _plan(section: Mapping[str, Any]) -> Answer:
    question, device = "What is 2:4 predicted to gain?", section["device"]
    where = f"{device.get('title', '')}, {section['runtime'].get('name', '')}, {section['dtype']} weights"
    planned = sum(row["decision"] == "2:4" for row in section["layers"])
    if not section["pays"]:
        nothing = (f"Nothing, at these sizes, on {where}.",)
        return Answer(question=question, short="nothing", sentences=nothing, tone="bad")
    point = section["points"][0]
    at = f"batch {point['batch']}, {point['seq']} tokens"
    said = [f"On {where}, at {at}: prefill {point['prefill']['speedup']:.2f} times as fast"]
    short = f"prefill {point['prefill']['speedup']:.2f}x"
    if point["decode"] is not None:
        said[0] += f", decoding {point['decode']['speedup']:.2f} times"
        short += f", decoding {point['decode']['speedup']:.2f}x"
    said[0] += "."
    said.append(f"{planned} of {len(section['layers'])} layers are worth making 2:4. A forecast, not a measurement.")
    return Answer(question=question, short=short, sentences=tuple(said))


def _used(document: Mapping[str, Any]) -> Answer:
    question, section = "Does a runtime use the sparsity?", document.get("sparsity")
    if section is None:
        return _not_known(question, document)
    meant = [layer for layer in section["layers"] if layer["conforms"] != "unknown"]
    ran = Counter(layer["ran_sparse"] for layer in meant)
    runtime = f"{section['runtime']} {section['runtime_version']}"
    if not meant:
        return Answer(question=question, short="nothing is sparse", sentences=(f"{runtime} got no sparse weight.",))
    said, engines = [], list(dict.fromkeys(layer["engine"] for layer in meant))
    for engine in engines:
        counts = Counter(layer["ran_sparse"] for layer in meant if layer["engine"] == engine)
        told = {"yes": "ran sparse", "no": "ran dense", "unknown": "unknown"}
        parts = [f"{counts[value]} {word}" for value, word in told.items() if counts[value]]
        said.append(f"{runtime}, {engine}: of {sum(counts.values())} weights, {', '.join(parts)}.")
    for value, word in (("no", "ran dense"), ("unknown", "is unknown")):
        reasons = Counter(layer["reason"] for layer in meant if layer["ran_sparse"] == value)
        for reason, count in reasons.most_common(2):
            said.append(f"Why it {word} ({count} times): {reason}.")
    if ran["unknown"] == len(meant):
        states = section["counts"].get("total", {})
        ready = states.get("conforms", {}).get("yes"), states.get("flag_requested", {}).get("yes")
        if all(ready):
            said.append("What is known: the weights conform, and the builder was allowed to use sparse kernels.")
        said.append(_HOW_TO_FIND_OUT)
        return Answer(question=question, short="unknown", sentences=tuple(said), tone="unknown")
    if section.get("measured"):
        said += [f"Measured, {name}: {found['break_even']}." for name, found in list(section["measured"].items())[:2]]
    short = f"yes for {ran['yes']} of {len(meant)}" if ran["yes"] else "no" if not ran["unknown"] else "not seen"
    tone: Tone = "good" if ran["yes"] and ran["yes"] >= ran["no"] else "bad" if ran["no"] else "unknown"
    return Answer(question=question, short=short, sentences=tuple(said), tone=tone)


def _not_known(question: str, document: Mapping[str, Any]) -> Answer:
    artifact, passes = document.get("artifact"), document.get("passes", {})
    if not passes.get("num_sparse"):
        return Answer(question=question, short="nothing is sparse", sentences=("There is no sparse layer that it could use.",))
    if artifact is None:
        said = ["Unknown: nothing was exported yet, so no runtime has seen these weights."]
    else:
        said = [
            f"Unknown: {artifact['target']} files hold the weights with their zeros, and do not say which kernels run. "
            "onnxruntime's and plain transformers' own kernels multiply them as dense ones: right results, no speedup."
        ]
    return Answer(question=question, short="unknown", sentences=(*said, _HOW_TO_FIND_OUT), tone="unknown")


def _verified(section: Mapping[str, Any]) -> Answer:
    question, checks = "Do the written files hold what they should?", section["checks"]
    if section.get("held") is None:
        said = ("Verification was switched off: nothing is known of the written files.",)
        return Answer(question=question, short="not checked", sentences=said, tone="unknown")
    failed = [check for check in checks if check["held"] is False]
    unchecked = [check for check in checks if check["held"] is None]
    rest = [f"Could not be checked here: {check['name']} ({check['summary']})." for check in unchecked]
    if failed:
        broken = [f"`{check['name']}` did NOT hold: {check['summary']}." for check in failed]
        return Answer(question=question, short="verification did NOT hold", sentences=(*broken, *rest), tone="bad")
    held = [check["name"] for check in checks if check["held"]]
    said = (f"Verification held. Checked in the files themselves: {', '.join(held) or 'nothing'}.",)
    return Answer(question=question, short="verification held", sentences=(*said, *rest), tone="good")


def _stored(section: Mapping[str, Any]) -> Answer:
    question = "Do the stored weights hold the pattern?"
    said = [f"{report['source']}: {report['pattern']} {'holds' if report['conforms'] else 'does NOT hold'}, "
            f"{_counted(report['counts'])}." for report in section["reports"]]  # fmt: skip
    for report in section["reports"]:
        said += [f"Likely cause: {cause['text']}. {cause['advice']}" for cause in report.get("causes", ())]
    if section["conforms"]:
        return Answer(question=question, short="the pattern holds", sentences=tuple(said), tone="good")
    return Answer(question=question, short="the pattern does NOT hold", sentences=tuple(said), tone="bad")


def _counted(counts: Mapping[str, int]) -> str:
    words = {"conforms": "conform", "violates": "violate"}
    parts = [f"{count} {words.get(verdict, verdict)}" for verdict, count in counts.items() if count]
    return f"of its weights {', '.join(parts)}" if parts else "no weight found"


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"
