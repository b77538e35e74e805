"""Checkpoints of sharded tensors: written by two processes, read by one or two, sharded alike, otherwise or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from tests.retrain.run.checkpoint_processes import equal, whole

from sparsepass.retrain.run.checkpoint import Checkpoints

PROGRAM = Path(__file__).with_name("checkpoint_processes.py")
ROOT = PROGRAM.parents[2]


def run(folder: Path, *actions: str, num_processes: int = 2) -> None:
    """Let processes do the actions one after the other."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(PROGRAM), str(rank), str(num_processes), str(folder), *actions],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_processes)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * num_processes, "\n".join(said)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that two processes wrote and read in all ways; they are started once, since they take seconds to start."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    Checkpoints(folder / "one").save(3, whole(), {"seen": 5})
    run(
        folder,
        "fsdp:fsdp",
        *("two:save", "two:restore", "two:restore swapped", "two:restore replicated"),
        *("two:second process has a full disk", "two:restore"),
        *("one:restore", "one:restore swapped", "one:restore replicated"),
        *("replicated:save replicated", "replicated:restore replicated", "replicated:restore"),
        *("damaged:save", "damaged:restore damaged"),
        "none:any",
    )
    return folder


@pytest.mark.parametrize("kind", ["two", "replicated", "one"])
def test_one_process_reads_what_any_number_wrote(saved: Path, kind: str) -> None:
    into = whole(0)
    restored = Checkpoints(saved / kind).restore("newest", into)
    assert equal(into, whole())
    assert restored.state == {"seen": 5}
    assert (restored.local_state, dict(restored.local_tensors)) == (None, {})
    if kind == "one":
        assert restored.notes == ()
    else:
        assert "written by 2 process(es) and is read by 1" in restored.notes[0]


def test_each_process_wrote_its_own_shards(saved: Path) -> None:
    files = {path.name for path in (saved / "two" / "step-00000003").iterdir()}
    assert {"rank-00000-0.safetensors", "rank-00001-0.safetensors", "rank-00001-local.safetensors"} <= files
    with safetensors.safe_open(saved / "two" / "step-00000003" / "rank-00001-0.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes == {"rows": [3, 4], "columns": [4, 2], "mask": [3, 4], "one_row": [0, 3]}


def test_two_processes_write_replicated_tensors_once(saved: Path) -> None:
    assert not (saved / "replicated" / "step-00000003" / "rank-00001-0.safetensors").exists()


def test_a_full_disk_in_one_process_leaves_no_trace(saved: Path) -> None:
    assert [path.name for path in (saved / "two").iterdir()] == ["step-00000003"]


def test_a_comparison_that_sees_a_difference() -> None:
    other = whole()
    other["columns"] = other["columns"].clone()
    other["columns"][3, 4] += 1
    assert not equal(other, whole())
    assert torch.equal(other["rows"], whole()["rows"])
