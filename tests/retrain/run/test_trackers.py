"""Trackers: TensorBoard for real, and any other through accelerate."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparsepass.retrain.run.metrics import tracking

CONFIG = {"lr": 2e-4, "method": "ast", "data": {"length": 512, "files": ["a", "b"]}, "teacher": None}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def train(folder: Path, first: int, last: int, resumed_at: int | None = None) -> None:
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=folder)
    with tracking(accelerator, "run", CONFIG, resumed_at=resumed_at) as log:
        for step in range(first, last):
            log({"step": step, "loss": np.float32(step / 2), "flips": {"layer 0": step}, "note": "text", "list": [1.0]})
    assert accelerator.trackers == []


def test_event_files_hold_the_scalars(tmp_path: Path) -> None:
    train(tmp_path, 1, 4)
    assert scalars(tmp_path / "run") == {
        "loss": [(1, 0.5), (2, 1.0), (3, 1.5)],
        "flips/layer 0": [(1, 1.0), (2, 2.0), (3, 3.0)],
    }
    (written,) = tmp_path.glob("run/*/hparams.yml")
    assert "data/length: 512" in written.read_text()


def test_a_resumed_run_hides_what_it_measures_again(tmp_path: Path) -> None:
    train(tmp_path, 1, 6)
    train(tmp_path, 3, 5, resumed_at=2)
    assert [step for step, _ in scalars(tmp_path / "run")["loss"]] == [1, 2, 3, 4]


def test_trackers_end_when_the_training_fails(tmp_path: Path) -> None:
    class Recorder(GeneralTracker):  # type: ignore[misc]
        name, requires_logging_directory, tracker = "recorder", False, None

        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Any] = []

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.calls.append(values)

        def log(self, values: dict[str, Any], step: int | None, **_: Any) -> None:
            self.calls.append((step, values))

        def finish(self) -> None:
            self.calls.append("finished")

    recorder = Recorder()
    accelerator = Accelerator(cpu=True, log_with=recorder)

    def fail() -> None:
        with tracking(accelerator, "run", CONFIG) as log:
            log({"step": 4, "loss": 0.5, "is_frozen": True})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert recorder.calls == [
        {"lr": 2e-4, "method": "ast", "data/length": 512, "data/files": "['a', 'b']", "teacher": "None"},
        (4, {"loss": 0.5, "is_frozen": 1.0}),
        "finished",
    ]


def test_without_a_tracker_nothing_happens() -> None:
    with tracking(Accelerator(cpu=True), "run", CONFIG) as log:
        log({"step": 1, "loss": 0.5})
