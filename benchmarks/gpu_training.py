"""Perplexity against tokens: SmolLM2-135M-Instruct retrained (AST) and with learned masks (MaskLLM) on one GPU.

    python benchmarks/gpu_training.py --device cuda --train-text FILE --eval-text FILE [--only NAME ...] [--tokens NAME=N ...]
                                      [--set train.lr=1e-4 ...] [--work DIR] [--out DIR]

Rows: ast and slorb are the recipe smollm2-gpu from SparseGPT's start, without and with SLoRB branches; masks is the recipe
smollm2-maskllm-gpu over the original weights. The curve is of the evaluation text's first 64 windows (context 512); the table
of all of it, fp32. Rows that are done are kept in the work folder, so that several can run side by side (one process each,
--only), and a call without --only makes the table of those that are there. An interrupted row goes on only if it was started
with --set train.keep_checkpoints=2.

More text for it: benchmarks/debian_text.py. Writes gpu_training.json, gpu_training.md and the curves as a picture; the pack of
the row masks stays in the work folder.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common import TrainingBench, commit, curves, heading, tokens_at, training_options

from sparsepass.passes.masks import pack_program

SPARSEGPT, MASK = "nm_sparsify{criterion=sparsegpt}", "nm_sparsify{criterion=sparsegpt,compensate=false}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train."""

    title: str
    passes: str
    recipe: str = "smollm2-gpu"
    tokens: int = 50_000_000


ROWS = {
    "ast": Row(title="AST", passes=SPARSEGPT),
    "slorb": Row(title="AST with SLoRB", passes=f"{SPARSEGPT},slorb{{k=16}}"),
    "masks": Row(title="learned masks", passes=f"{MASK},learn_masks{{alpha=3.0}}", recipe="smollm2-maskllm-gpu"),
}


class Bench(TrainingBench):
    """Rows that can run side by side."""

    def row(self, name: str) -> dict[str, Any]:
        """Train one row, or read what is known of it."""
        return dict(self.remember(f"row-{name}", lambda: self._train(name, ROWS[name])))

    def _train(self, name: str, row: Row) -> dict[str, Any]:
        program = self.pruned(row.passes)
        tokens = {**{key: known.tokens for key, known in ROWS.items()}, **dict(self.args.tokens)}[name]
        changes = [
            f"train.max_tokens={tokens}",
            "train.keep_checkpoints=0",
            "data.streaming=false",
            f"data.validation={self.text}",
            "data.validation_limit=64",
            *self.args.set,
        ]
        trained, about = self.trained(name, program, row.recipe, changes)
        found = {"name": name, "title": row.title, "after": self.perplexity(trained)}
        if row.recipe != "smollm2-gpu":
            pack = pack_program(trained)
            pack.save(self.work / f"{name}.safetensors")
            found["bits_per_weight"] = pack.bits_per_weight
        shutil.rmtree(self.run_folder(name))
        return found | about


def table(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    dense = report["dense"]["perplexity"]
    lines = [
        "# Perplexity against tokens on one GPU, SmolLM2-135M-Instruct, 2:4",
        "",
        *heading(report),
        "",
        "| | tokens | tokens/s | perplexity | over dense | mask entries moved |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        run, after = row["run"], row["after"]["perplexity"]
        lines.append(
            f"| {row['title']} | {run['num_tokens']:,} | {run['num_tokens'] / run['seconds']:,.0f} | {after:.2f} "
            f"| {after / dense - 1:+.1%} | {run['flips_since_first']:.2%} |"
        )
    for row in report["rows"]:
        about = f"commit {row['commit']}, {', '.join(row['changes'])}"
        lines += ["", f"{row['title']} ({about}), perplexity of the first 64 windows after so many tokens:", ""]
        lines += [", ".join(f"{tokens:,}: {value:.2f}" for tokens, value in tokens_at(row).items())]
    if report["picture"]:
        lines += ["", f"![Perplexity over tokens]({report['picture']})"]
    return "\n".join(lines) + "\n"


def _tokens(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    return name, int(number)


def main() -> None:
    """Run what is asked for and not there yet, and write the table of all that is there."""
    parser = training_options(__doc__, ".gpu_training")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=[], help="rows to train, if they are not there yet")
    parser.add_argument("--tokens", nargs="+", type=_tokens, default=[], metavar="NAME=N", help="of a row, instead of its own")
    parser.add_argument("--set", action="append", default=[], metavar="train.lr=1e-4", help="another setting, for every row")
    args = parser.parse_args()
    if unknown := [name for name, _ in args.tokens if name not in ROWS]:
        parser.error(f"--tokens knows no row {unknown[0]}; there are {', '.join(ROWS)}")
    bench = Bench(args)
    rows: list[dict[str, Any]] = []
    for name in ROWS:
        if name in args.only or (args.work / f"row-{name}.json").is_file():
            rows.append(bench.row(name))
    drawn = curves(rows, "Perplexity", (1e6, "million tokens"), "perplexity, first 64 windows")
    report = bench.facts() | {"rows": rows, "picture": "gpu_training.svg" if drawn else None, "commit": commit()}
    if drawn:
        (args.out / "gpu_training.svg").write_text(drawn.file(), encoding="utf-8")
    (args.out / "gpu_training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "gpu_training.md").write_text(table(report), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
