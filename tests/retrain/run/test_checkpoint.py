"""Checkpoints in one process: exact round trips, damage, interruptions, what is kept, and what is refused."""

import errno
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsepass.graph import SparsepassError
from sparsepass.retrain.run import checkpoint, pieces
from sparsepass.retrain.run.checkpoint import Checkpoints
from sparsepass.retrain.run.manifest import MANIFEST_FILE
from sparsepass.retrain.run.pieces import Box
from sparsepass.retrain.state import random_states, set_random_states

DTYPES = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)

# For each line of its input it forks a process that saves every step twice, and kills it some time after the first step.
KILLED_AGAIN_AND_AGAIN = """
import os, random, signal, sys, time
from itertools import count
import torch
from sparsepass.retrain.run.checkpoint import Checkpoints

for line in sys.stdin:
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        checkpoints = Checkpoints(sys.argv[1])
        newest = checkpoints.newest()
        for step in count(newest.step + 1 if newest else 1):
            for _ in range(2):
                checkpoints.save(step, {str(i): torch.full((20000,), step) for i in range(20)}, {"step": step})
            os.write(said, b"saved")
    os.read(heard, 5)
    time.sleep(random.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""


def of_every_kind() -> dict[str, Tensor]:
    """Every type, no dimension, no element, strides, a parameter, two names of one tensor, two parts of one."""
    bits = torch.randint(0, 255, (6, 8), dtype=torch.uint8)
    tensors = {str(dtype): (bits > 99 if dtype == torch.bool else bits.view(dtype)) for dtype in DTYPES}
    flat = torch.randn(10)
    return tensors | {
        "step": torch.tensor(7.0),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(3, 5).T,
        "parameter": nn.Parameter(torch.randn(4)),
        "frozen mask": nn.Parameter(torch.rand(4) > 0.5, requires_grad=False),
        "tied": (tied := torch.randn(3)),
        "head": tied,
        "first": flat[:6],
        "second": flat[4:],
    }


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 4
    path.write_bytes(data[: len(data) // 2] if how == "truncated" else data)
    if how == "missing":
        path.unlink()


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Checkpoints of steps 10, 20 and 30 that hold their step; step 20 is the best."""
    for step, metric in ((10, 5.0), (20, 3.0), (30, 4.0)):
        Checkpoints(tmp_path, keep=3).save(step, {"w": torch.full((5,), step)}, {"step": step}, metric=metric)
    return tmp_path


class TestRoundTrip:
    def test_bitwise(self, tmp_path: Path) -> None:
        tensors = of_every_kind()
        Checkpoints(tmp_path).save(1, tensors, {})
        into = blank(tensors)
        Checkpoints(tmp_path).restore("newest", into)
        assert {name: bits(tensor) for name, tensor in into.items()} == {name: bits(t) for name, t in tensors.items()}

    def test_in_place_into_parameters_with_strides(self, tmp_path: Path) -> None:
        tensors = of_every_kind()
        Checkpoints(tmp_path).save(1, tensors, {})
        saved = {name: bits(tensor) for name, tensor in tensors.items()}
        places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        for name in ("parameter", "transposed", "tied", "step"):
            tensors[name].data.zero_()
        Checkpoints(tmp_path).restore(1, tensors)
        assert {name: bits(tensor) for name, tensor in tensors.items()} == saved
        assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == places
        assert tensors["parameter"].requires_grad

    def test_tied_names_are_stored_once(self, tmp_path: Path) -> None:
        weight = torch.randn(1000)
        path = Checkpoints(tmp_path).save(1, {"embedding": weight, "head": weight}, {})
        assert weight.nbytes < (path / "rank-00000-0.safetensors").stat().st_size < 1.5 * weight.nbytes

    def test_many_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pieces, "_FILE_BYTES", 100)
        self.test_bitwise(tmp_path)
        assert len(list(tmp_path.glob("step-00000001/rank-00000-*[0-9].safetensors"))) > 5

    def test_state_and_own_tensors(self, tmp_path: Path) -> None:
        state = {"seen": 3, "lr": 0.1 + 0.2, "flips": [[1, 2.5], None], "config": "a: 1\n", "done": False}
        own = {"generator": torch.get_rng_state()}
        Checkpoints(tmp_path).save(1, {}, state, metric=2.5, local_tensors=own, local_state={"position": (3, "file")})
        restored = Checkpoints(tmp_path).restore("newest", {})
        assert (restored.step, restored.metric, restored.state, restored.notes) == (1, 2.5, state, ())
        assert restored.local_state == {"position": [3, "file"]}
        assert torch.equal(restored.local_tensors["generator"], own["generator"])

    def test_random_generators_go_on_as_they_would_have(self, tmp_path: Path) -> None:
        def draw() -> list[Any]:
            return [random.gauss(0, 1), random.random(), np.random.normal(), float(np.random.rand()), torch.randn(3).tolist()]

        draw()  # leaves half of a pair of normal numbers in the states of Python and numpy
        states, tensors = random_states()
        Checkpoints(tmp_path).save(1, {}, {}, local_state=states, local_tensors=tensors)
        expected = [draw() for _ in range(3)]
        restored = Checkpoints(tmp_path).restore("newest", {})
        set_random_states(restored.local_state, restored.local_tensors)
        assert [draw() for _ in range(3)] == expected

    def test_random_states_without_a_generator_are_refused(self) -> None:
        with pytest.raises(SparsepassError, match="torch_random_cpu"):
            set_random_states(random_states()[0], {})

    def test_optimizer_with_moments_continues_bitwise(self, tmp_path: Path) -> None:
        def training() -> tuple[nn.Module, torch.optim.Optimizer]:
            torch.manual_seed(3)
            model = nn.Linear(4, 2)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            return model, optimizer

        def run(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
            for step in range(first, last):
                optimizer.zero_grad()
                model(torch.full((3, 4), 0.1 * step)).square().sum().backward()
                optimizer.step()

        def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
            named = dict(model.named_parameters())
            moments = {f"{n}/{key}": value for n, p in named.items() for key, value in optimizer.state[p].items()}
            return {**named, **moments}

        whole = training()
        run(*whole, 0, 6)
        first = training()
        run(*first, 0, 3)
        Checkpoints(tmp_path).save(3, everything(*first), {})
        second = training()
        run(*second, 0, 1)
        Checkpoints(tmp_path).restore("newest", everything(*second))
        run(*second, 3, 6)
        assert {n: bits(t) for n, t in everything(*second).items()} == {n: bits(t) for n, t in everything(*whole).items()}

    def test_no_pickle(self, three: Path) -> None:
        assert {path.suffix for path in three.rglob("*") if path.is_file()} == {".json", ".safetensors"}


class TestKept:
    def test_newest_and_best(self, tmp_path: Path) -> None:
        checkpoints = Checkpoints(tmp_path, keep=2)
        stood = []
        for step, metric in ((1, 9.0), (2, 3.0), (3, 5.0), (4, None), (5, 3.0), (6, 2.0), (7, 8.0), (8, 8.0)):
            checkpoints.save(step, {}, {}, metric=metric)
            stood.append(steps(tmp_path))
        assert stood == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7], [6, 7, 8]]
        newest, best = checkpoints.newest(), checkpoints.best()
        assert newest is not None
        assert best is not None
        assert (newest.step, best.step, best.metric) == (8, 6, 2.0)

    def test_a_run_resumed_from_the_best_is_newer_than_what_it_left(self, three: Path) -> None:
        checkpoints = Checkpoints(three, keep=2)
        assert checkpoints.restore("best", {"w": torch.zeros(5, dtype=torch.int64)}).step == 20
        checkpoints.save(25, {"w": torch.zeros(5)}, {})
        newest = checkpoints.newest()
        assert newest is not None
        assert newest.step == 25
        assert steps(three) == [20, 25, 30]

    def test_the_same_step_is_replaced(self, three: Path) -> None:
        Checkpoints(three).save(30, {"w": torch.ones(2)}, {"again": True})
        into = {"w": torch.zeros(2)}
        assert Checkpoints(three).restore("newest", into).state == {"again": True}
        assert into["w"].tolist() == [1, 1]

    def test_leftovers_go_and_other_files_stay(self, three: Path) -> None:
        for name in (".step-00000040.abc.partial", ".step-00000005.removed"):
            (three / name).mkdir()
            (three / name / "rank-00000-0.safetensors").write_bytes(b"half")
        (three / "step-notes").mkdir()
        (three / "metrics.jsonl").write_text("{}\n")
        Checkpoints(three, keep=3).save(40, {}, {})
        assert sorted(path.name for path in three.iterdir()) == [
            "metrics.jsonl",
            *(f"step-000000{step}" for step in (20, 30, 40)),
            "step-notes",
        ]

    def test_a_run_killed_while_a_step_was_replaced_loses_nothing(self, three: Path) -> None:
        hidden = three / ".step-00000030.abc.old"
        hidden.mkdir()
        (three / "step-00000030").rename(hidden / "step-00000030")
        into = {"w": torch.zeros(5, dtype=torch.int64)}
        assert Checkpoints(three).restore("newest", into).step == 30
        Checkpoints(three, keep=2).save(40, into, {})
        assert Checkpoints(three).restore(30, into).step == 30
        Checkpoints(three, keep=1).save(50, into, {})
        assert sorted(path.name for path in three.iterdir()) == ["step-00000020", "step-00000050"]

    def test_nothing_there(self, tmp_path: Path) -> None:
        checkpoints = Checkpoints(tmp_path / "none")
        assert checkpoints.newest() is None
        assert checkpoints.best() is None
        with pytest.raises(SparsepassError, match="has no checkpoint;"):
            checkpoints.restore("newest", {})
        with pytest.raises(SparsepassError, match="has no checkpoint of step 7;"):
            checkpoints.restore(7, {})

    def test_keeping_none_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SparsepassError, match="keep=0"):
            Checkpoints(tmp_path, keep=0)


class TestDamage:
    @pytest.mark.parametrize("how", ["truncated", "missing", "flipped"])
    @pytest.mark.parametrize("file", ["rank-00000-0.safetensors", "rank-00000.json", "state.json", MANIFEST_FILE])
    def test_falls_back_and_says_so(self, three: Path, file: str, how: str) -> None:
        damage(three / "step-00000030" / file, how)
        into = {"w": torch.zeros(5, dtype=torch.int64)}
        restored = Checkpoints(three).restore("newest", into)
        assert (restored.step, restored.state, into["w"].tolist()) == (20, {"step": 20}, [20] * 5)
        (note,) = restored.notes
        assert note.startswith("step-00000030")
        assert file in note
        assert "passed over" in note

    def test_newest_sees_wrong_sizes(self, three: Path) -> None:
        damage(three / "step-00000030" / "rank-00000-0.safetensors", "truncated")
        newest = Checkpoints(three).newest()
        assert newest is not None
        assert newest.step == 20
        assert re.search(r"has \d+ bytes and should have \d+", newest.notes[0])

    def test_every_byte_counts(self, three: Path) -> None:
        path = three / "step-00000030" / "rank-00000-0.safetensors"
        whole = path.read_bytes()
        for position in range(0, len(whole), 7):
            data = bytearray(whole)
            data[position] ^= 1
            path.write_bytes(data)
            assert Checkpoints(three).restore("newest", {}, partial=True).step == 20, position
        path.write_bytes(whole)
        assert Checkpoints(three).restore("newest", {}, partial=True).step == 30

    def test_all_damaged(self, three: Path) -> None:
        for folder in three.iterdir():
            damage(folder / "state.json", "truncated")
        with pytest.raises(SparsepassError, match=r"none of the .*step-00000010 is damaged: state\.json has"):
            Checkpoints(three).newest()

    def test_the_one_asked_for_is_damaged(self, three: Path) -> None:
        damage(three / "step-00000010" / "state.json", "flipped")
        with pytest.raises(SparsepassError, match=r"no intact checkpoint of step 10 .*state\.json"):
            Checkpoints(three).restore(10, {})

    def test_a_damaged_one_goes_at_the_next_save(self, three: Path) -> None:
        damage(three / "step-00000030" / "state.json", "truncated")
        Checkpoints(three, keep=3).save(40, {}, {})
        assert steps(three) == [10, 20, 40]


class TestInterrupted:
    def test_killed_at_any_moment(self, tmp_path: Path) -> None:
        """A process saves without end and is killed, again and again; what stands is always whole and goes on growing."""
        program = [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, str(tmp_path)]
        reached, num_in_a_save = 0, 0
        with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            for _ in range(8):
                process.stdin.write(b"go\n")
                process.stdin.flush()
                assert process.stdout.readline() == b"killed\n"
                num_in_a_save += any(path.name.startswith(".") for path in tmp_path.iterdir())
                into = {str(i): torch.zeros(20000, dtype=torch.int64) for i in range(20)}
                restored = Checkpoints(tmp_path).restore("newest", into)
                assert restored.notes == ()
                assert restored.state == {"step": restored.step}
                assert all((tensor == restored.step).all() for tensor in into.values())
                assert restored.step > reached
                reached = restored.step
        assert num_in_a_save, "no kill fell into a save: this test shows nothing"

    @pytest.mark.parametrize("what", ["write_pieces", "write_manifest", "_settle"])
    def test_a_full_disk_leaves_the_old_ones(self, three: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        before = self.contents(three)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, what, refuse)
            with pytest.raises(SparsepassError, match=r"the disk is full: .*step-00000040 was not written"):
                Checkpoints(three, keep=1).save(40, {"w": torch.ones(5)}, {})
            with pytest.raises(SparsepassError, match="the disk is full"):
                Checkpoints(three, keep=1).save(30, {"w": torch.ones(5)}, {})
        assert self.contents(three) == before

    def test_a_disk_that_is_really_full(self, three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """safetensors, which writes in Rust, meets a limit on the size of files."""
        resource = pytest.importorskip("resource")
        before = self.contents(three)
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
        try:
            with pytest.raises(SparsepassError, match=r"a file may not grow so large here .*step-00000040 was not written"):
                Checkpoints(three, keep=1).save(40, {"w": torch.ones(1 << 20)}, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            signal.signal(signal.SIGXFSZ, handler)
        assert self.contents(three) == before

    def test_interrupted_by_the_user(self, three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        before = self.contents(three)
        monkeypatch.setattr(checkpoint, "write_pieces", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Checkpoints(three).save(40, {}, {})
        assert self.contents(three) == before

    @staticmethod
    def contents(folder: Path) -> dict[str, str]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class TestRefused:
    def test_another_run(self, tmp_path: Path) -> None:
        config = "lr: 0.1\nsteps: 10\nmethod: ast\n"
        Checkpoints(tmp_path).save(1, {"w": torch.ones(2)}, {"config": config, "program": {"sites": 3, "hash": "a"}, "seen": 4})
        into = {"w": torch.zeros(2)}
        same = {"config": config, "program": {"sites": 3, "hash": "a"}}
        assert Checkpoints(tmp_path).restore("newest", into, expected=same).state["seen"] == 4
        into["w"].zero_()
        other = {"config": config.replace("0.1", "0.2"), "program": {"sites": 3, "hash": "b"}, "teacher": "x"}
        with pytest.raises(SparsepassError, match="checkpoint of another run") as caught:
            Checkpoints(tmp_path).restore("newest", into, expected=other)
        message = str(caught.value)
        assert "config, line 1, is 'lr: 0.2' here and 'lr: 0.1' in the checkpoint" in message
        assert 'program.hash is "b" here and "a" in the checkpoint' in message
        assert 'teacher is "x" here and null in the checkpoint' in message
        assert "sites" not in message
        assert into["w"].tolist() == [0, 0]

    @pytest.mark.parametrize(
        ("into", "message"),
        [
            ({"w": (4, 2), "m": (2,), "b": (1,)}, "b is not in the checkpoint"),
            ({"w": (4, 2)}, "m is in the checkpoint, and nothing here takes it"),
            ({"w": (2, 4), "m": (2,)}, r"w is float32 \[4, 2\] in the checkpoint and float32 \[2, 4\] here"),
        ],
    )
    def test_tensors_that_do_not_fit(self, tmp_path: Path, into: dict[str, tuple[int, ...]], message: str) -> None:
        Checkpoints(tmp_path).save(1, {"w": torch.ones(4, 2), "m": torch.ones(2)}, {})
        tensors = {name: torch.zeros(shape) for name, shape in into.items()}
        with pytest.raises(SparsepassError, match=message):
            Checkpoints(tmp_path).restore("newest", tensors)
        assert all((tensor == 0).all() for tensor in tensors.values()), "nothing may be copied unless everything fits"

    def test_another_type(self, tmp_path: Path) -> None:
        Checkpoints(tmp_path).save(1, {"w": torch.ones(2)}, {})
        with pytest.raises(SparsepassError, match=r"w is float32 \[2\] in the checkpoint and bfloat16 \[2\] here"):
            Checkpoints(tmp_path).restore("newest", {"w": torch.zeros(2, dtype=torch.bfloat16)})

    def test_a_part_is_taken_when_asked_for(self, tmp_path: Path) -> None:
        Checkpoints(tmp_path).save(1, {"w": torch.ones(2), "w/exp_avg": torch.ones(2)}, {})
        into = {"w": torch.zeros(2)}
        Checkpoints(tmp_path).restore("newest", into, partial=True)
        assert into["w"].tolist() == [1, 1]

    def test_a_newer_format(self, three: Path) -> None:
        path = three / "step-00000010" / MANIFEST_FILE
        document = json.loads(path.read_text())
        document["manifest"]["format"] = 2
        path.write_text(json.dumps(document))
        for call in (Checkpoints(three).newest, lambda: Checkpoints(three).restore("newest", {}, partial=True)):
            with pytest.raises(SparsepassError, match="is a checkpoint of format 2, and this version reads up to 1"):
                call()

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"masks": [torch.ones(2)]}, r"state\.masks\[0\] is a Tensor"),
            ({"by step": {3: 1}}, r"state\.by step has the key 3"),
            ({"folder": Path("a")}, r"state\.folder is a PosixPath"),
        ],
    )
    def test_a_state_that_is_not_json(self, tmp_path: Path, state: dict[str, Any], message: str) -> None:
        with pytest.raises(SparsepassError, match=message):
            Checkpoints(tmp_path).save(1, {}, state)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("metric", [float("nan"), float("inf")])
    def test_a_metric_that_is_not_finite(self, tmp_path: Path, metric: float) -> None:
        with pytest.raises(SparsepassError, match="finite"):
            Checkpoints(tmp_path).save(1, {}, {}, metric=metric)

    def test_tensors_without_data(self, tmp_path: Path) -> None:
        with pytest.raises(SparsepassError, match="w is on the meta device or sparse"):
            Checkpoints(tmp_path).save(1, {"w": torch.ones(2, device="meta")}, {})
        assert not list(tmp_path.iterdir())


def test_boxes_against_sets_of_indices() -> None:
    """Where two boxes meet, for many boxes, by listing their elements."""

    def cells(box: Box) -> set[tuple[int, int]]:
        (a, b), (m, n) = box.start, box.shape
        return {(i, j) for i in range(a, a + m) for j in range(b, b + n)}

    draw = random.Random(1)
    boxes = [Box((draw.randrange(5), draw.randrange(5)), (draw.randrange(4), draw.randrange(4))) for _ in range(40)]
    met = 0
    for first in boxes:
        for second in boxes:
            shared = first.meet(second)
            assert (cells(shared) if shared else set()) == cells(first) & cells(second)
            if shared:
                met += 1
                numbered = torch.arange(first.shape[0] * first.shape[1]).view(first.shape)
                rows, columns = shared.start[0] - first.start[0], shared.start[1] - first.start[1]
                expected = numbered[rows : rows + shared.shape[0], columns : columns + shared.shape[1]]
                assert torch.equal(numbered[shared.slices_in(first)], expected)
    assert met > 100
