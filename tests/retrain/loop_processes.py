"""Runs of retraining on several processes: a program of its own, which forks them.

What takes long (importing, capturing, exporting) is done once, before the forks.

Usage: loop_processes.py numbers|kills FOLDER
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tests.families import captured
from tests.retrain.runs import data, digest, masks, run, settings, sparse, steps, train
from torch import distributed
from tqdm import tqdm  # type: ignore[import-untyped]

from sparsepass.graph import Program, SparsepassError
from sparsepass.retrain.learner import NonFiniteLossError
from sparsepass.retrain.run import checkpoint
from sparsepass.retrain.run.checkpoint import CHECKPOINTS
from sparsepass.retrain.run.metrics import METRICS

ROOT = Path(__file__).parents[2]
KILLED_STEPS = 32


def launch(what: str, folder: Path) -> None:
    """Run this program, and leave none of its processes behind."""
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-W", "error", __file__, what, str(folder)]
    process = subprocess.Popen(command, env=os.environ | ours, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        said = process.communicate(timeout=400)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said


def fork(action: Callable[[int], None], num_processes: int, folder: Path) -> list[int]:
    """Start processes that do something together; return their numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    rendezvous = next(path for i in count() if not (path := folder / f"rendezvous-{i}").exists())
    started = []
    for rank in range(num_processes):
        child = os.fork()
        if child:
            started.append(child)
            continue
        try:
            AcceleratorState._reset_state(reset_partial_state=True)  # the parent was alone
            if num_processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(num_processes)}
                distributed.init_process_group(
                    "gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=num_processes, timeout=timedelta(seconds=60)
                )
            action(rank)
            if num_processes > 1:
                distributed.barrier()
                distributed.destroy_process_group()
            code = 0
        except BaseException:  # noqa: BLE001  # a forked process must not go on where its parent does
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    return started


def wait(started: list[int]) -> None:
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
    if any(codes):
        raise SystemExit(f"processes ended with {codes}")


def found_in(program: Program) -> dict[str, Any]:
    """What two runs are compared by."""
    record = {key: program.retraining[0][key] for key in ("validations", "step_of_weights", "flips_since_first")}
    return {"digest": digest(program.tensors()), "masks": digest(masks(program)), "record": record}


def written(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


# Numbers: the same run on one process and on two.

# In float64, so that a difference is not taken for rounding: GPT-2's key biases have gradients that are nothing but
# rounding, and AdamW makes steps of full size of them.
NUMBERS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_weight": 0.1},
    "llama cast": {"method": "cast", "decay": 1e-3},
    "gpt2": {"micro_batch_size": 2},
    "gpt2 maskllm": {"recipe": "nm_sparsify,learn_masks{alpha=1.0}", "method": "maskllm", "lr": 5e-3, "behind": "original",
                     "mask_norm": 1e-2, "micro_batch_size": 2},
    "llama quantized": {"recipe": "nm_sparsify,quantize{group_size=16}", "quantize": True},
    "gpt2 quantized": {"recipe": "nm_sparsify,quantize{bits=8,symmetric=false,clip=weights}", "quantize": True},
}  # fmt: skip


def numbers(folder: Path) -> None:
    def act(kind: str) -> Callable[[int], None]:
        def on(rank: int) -> None:
            for name, options in NUMBERS.items():
                place = folder / kind / name
                options = options | {"parallel": "fsdp" if kind == "fsdp" else "ddp"}
                trained = run(name.split()[0], place, double=True, **options)
                same_everywhere(trained)
                if rank == 0:
                    written(place / "found.json", found_in(trained) | {"steps": steps(place)})
                    torch.save({n: m.clone() for n, m in masks(trained).items()}, place / "masks.pt")
            if kind != "one":
                uneven(folder / kind, rank, kind)
                refusals(folder / kind, kind)

        return on

    for kind in ("one", "ddp", "fsdp"):
        if kind == "one":
            for name, options in NUMBERS.items():
                run(
                    name.split()[0],
                    double=True,
                    max_steps=1,
                    **{k: v for k, v in options.items() if k in ("method", "recipe", "quantize")},
                )
        wait(fork(act(kind), 1 if kind == "one" else 2, folder / kind))


def same_everywhere(program: Program) -> None:
    """Every process has the whole program, and the same one."""
    if distributed.is_initialized():
        all_of_them: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(all_of_them, found_in(program))
        assert all(found == all_of_them[0] for found in all_of_them)


def uneven(folder: Path, rank: int, kind: str) -> None:
    """Seven validation rows in micro-batches of two on two processes: one of them runs out of rows before the other."""
    options = settings(max_steps=1, micro_batch_size=2, parallel=kind)
    trained = train(sparse(), captured("llama"), options, data=data(7))
    if rank == 0:
        written(folder / "uneven.json", trained.retraining[0]["validations"])


def refusals(folder: Path, kind: str) -> None:
    with pytest.raises(SparsepassError, match="batch_size 7 is not a multiple of 2 processes"):
        run(batch_size=7, parallel=kind)
    with pytest.raises(SparsepassError, match="micro_batch_size 3 does not divide the 4 sequences of each process"):
        run(micro_batch_size=3, parallel=kind)
    program, teacher = sparse(), captured("llama")
    before = digest(program.tensors()), digest(teacher.tensors())
    with pytest.raises(NonFiniteLossError, match=r"step \d: .* first in .* Lower lr"):
        train(program, teacher, settings(lr=1e30, warmup=0, parallel=kind, validate_every=8))
    assert (digest(program.tensors()), digest(teacher.tensors())) == before


# Kills: a run killed again and again ends as one that was not.


def killed_run(kind: str) -> Callable[[Path], Program]:
    options: dict[str, Any] = {"parallel": kind if kind in ("ddp", "fsdp") else "auto"}
    options |= {"max_steps": KILLED_STEPS, "checkpoint_every": 2}
    if kind == "maskllm":
        options |= {key: value for key, value in NUMBERS["gpt2 maskllm"].items() if key != "micro_batch_size"}
    name = "gpt2" if kind == "fsdp" else "llama"
    return lambda folder: run(name, folder, **options)


def kills(folder: Path) -> None:
    found: dict[str, Any] = {}
    for kind in ("one", "ddp", "fsdp", "maskllm"):
        act, num_processes, place = killed_run(kind), 2 if kind in ("ddp", "fsdp") else 1, folder / kind
        if kind in ("one", "fsdp"):
            run("gpt2" if kind == "fsdp" else "llama", max_steps=1)  # so that the exports are there before the forks
        if kind == "maskllm":
            run("llama", max_steps=1, recipe=NUMBERS["gpt2 maskllm"]["recipe"], method=kind, behind="original")

        def finish(rank: int, into: str, act: Callable[[Path], Program] = act, place: Path = place) -> None:
            trained = act(place / into)
            if rank == 0:
                written(place / f"{into}.json", found_in(trained))

        wait(fork(lambda rank, finish=finish: finish(rank, "whole"), num_processes, place))  # type: ignore[misc]
        tally = kill_until_done(lambda rank, finish=finish: finish(rank, "killed"), num_processes, place)  # type: ignore[misc]
        found[kind] = tally | {name: json.loads((place / f"{name}.json").read_text()) for name in ("whole", "killed")}
        found[kind] |= {"metrics": [line["step"] for line in steps(place / "killed")], "num_steps": KILLED_STEPS}
    written(folder / "found.json", found)


def kill_until_done(act: Callable[[int], None], num_processes: int, place: Path) -> dict[str, Any]:
    """Start a run and kill it at a random step, or somewhere in a save, until it was killed often enough; let it end then."""
    chance = random.Random(str(num_processes))
    tally: dict[str, Any] = {"kills": 0, "kills_in_a_save": 0, "resumed_at": []}
    for turn in range(4):
        in_a_save = turn % 2 == 1
        victim = chance.randrange(num_processes)
        dying = chance.randrange(1, 7 if victim else 25)  # the first process does more of them

        def run_and_die(rank: int, armed: bool = in_a_save, victim: int = victim, dying: int = dying) -> None:
            if armed and rank == victim:
                die_in_a_save(dying)
            act(rank)

        started = fork(run_and_die, num_processes, place)
        if not in_a_save:
            goal = newest_step(place) + chance.randrange(1, 5)
            while newest_step(place) < min(goal, KILLED_STEPS):
                time.sleep(0.005)
            time.sleep(chance.random() * 0.05)
            os.kill(started[victim], signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(started[victim], 0)[1])
        for process in started:
            if process != started[victim]:  # as a launcher does
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
        assert ended == -signal.SIGKILL, f"it was to be killed, and ended with {ended}"
        tally["kills_in_a_save"] += in_a_save
        tally["kills"] += 1
        tally["resumed_at"].append(
            max((int(path.name[5:]) for path in (place / "killed" / CHECKPOINTS).glob("step-*")), default=0)
        )
    wait(fork(act, num_processes, place))
    return tally


def newest_step(place: Path) -> int:
    try:
        return (place / "killed" / METRICS).read_bytes().count(b'"loss"')
    except FileNotFoundError:
        return 0


def die_in_a_save(after: int) -> None:
    """Let this process kill itself at the n-th file operation of its checkpoints."""
    left = [after]

    def dying(name: str, module: Any) -> None:
        inner = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **kwargs)

        setattr(module, name, counted)

    for name in ("write_pieces", "_settle", "write_manifest", "_settle_names", "_remove"):
        dying(name, checkpoint)


def main() -> None:
    torch.set_num_threads(1)
    # tqdm (torch's interpreter of graphs makes one at each call) shares a lock with forked processes, and one that is killed
    # keeps it.
    tqdm.set_lock(threading.RLock())
    {"numbers": numbers, "kills": kills}[sys.argv[1]](Path(sys.argv[2]))


if __name__ == "__main__":
    main()
