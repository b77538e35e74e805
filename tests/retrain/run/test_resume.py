"""Runs that were stopped, killed or damaged, and went on: they end where they would have ended."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import captured
from tests.retrain.loop_processes import launch
from tests.retrain.runs import assert_same, assert_whole, data, digest, run, settings, sparse, steps, stopping_at, train, whole

from sparsepass.graph import Program, SparsepassError
from sparsepass.retrain import loop
from sparsepass.retrain.config import learning_rate
from sparsepass.retrain.learner import NonFiniteLossError
from sparsepass.retrain.loop import TrainingStoppedError
from sparsepass.retrain.restart import program_of_checkpoint
from sparsepass.retrain.run import checkpoint
from sparsepass.retrain.run.checkpoint import CHECKPOINTS, Checkpoints
from sparsepass.retrain.run.metrics import METRICS
from sparsepass.retrain.trainee import make_trainee

TERM, INT = signal.SIGTERM, signal.SIGINT


# At step 4 a validation is due, at step 3 a refresh, and step 8 is the last.
@pytest.mark.parametrize(("step", "number"), [(1, TERM), (3, TERM), (4, TERM), (4, INT), (8, TERM)])
def test_a_signal_saves_and_the_run_goes_on(step: int, number: signal.Signals, tmp_path: Path) -> None:
    def act() -> Program:
        return train(sparse(), captured("llama"), settings(), data=stopping_at(step, number), run_folder=tmp_path)

    if step < 8:  # else the run is over anyway
        with pytest.raises(TrainingStoppedError, match=rf"after step {step} of 8 by {number.name}; saved in .*same command"):
            act()
        assert (tmp_path / CHECKPOINTS / f"step-{step:08d}").is_dir()
        assert steps(tmp_path)[-1]["step"] == step
    resumed = act() if step == 8 else train(sparse(), captured("llama"), settings(), run_folder=tmp_path)
    assert_same(resumed, whole())
    assert_whole(tmp_path)
    again = run(folder=tmp_path)  # it is over: nothing is left to do
    assert_same(again, resumed)
    assert_whole(tmp_path)


@pytest.mark.parametrize(
    "options", [{"method": "cast", "decay": 1e-3}, {"method": "fixed"}, {"optimizer": "sgd", "momentum": 0.9}]
)
def test_every_method_goes_on(options: dict[str, Any], tmp_path: Path) -> None:
    for step in (3, 3):  # twice: the second is step 6, where masks are refreshed
        with pytest.raises(TrainingStoppedError):
            train(sparse(), captured("llama"), settings(**options), data=stopping_at(step), run_folder=tmp_path)
    assert steps(tmp_path)[-1]["step"] == 6
    resumed = run(folder=tmp_path, **options)
    assert_same(resumed, whole(**options))
    assert_whole(tmp_path)


def test_without_a_folder_a_signal_still_ends_the_run() -> None:
    with pytest.raises(
        TrainingStoppedError, match="after step 2 of 8 by SIGTERM; nothing was saved: no checkpoints were asked for"
    ):
        train(sparse(), captured("llama"), settings(), data=stopping_at(2))


def test_a_truncated_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"checkpoint_every": 2}
    with pytest.raises(TrainingStoppedError):
        train(sparse(), captured("llama"), settings(**options), data=stopping_at(7), run_folder=tmp_path)
    newest = tmp_path / CHECKPOINTS / "step-00000007"
    largest = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-9])
    capsys.readouterr()
    resumed = train(sparse(), captured("llama"), settings(**options), run_folder=tmp_path, progress=True)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{newest.name}" in said
    assert "it was passed over" in said
    assert "going on from step 6 (step-00000006)" in said
    assert_same(resumed, whole(**options))
    assert_whole(tmp_path)


def test_changed_bytes_are_passed_over_too(tmp_path: Path) -> None:
    with pytest.raises(TrainingStoppedError):
        train(sparse(), captured("llama"), settings(checkpoint_every=2), data=stopping_at(5), run_folder=tmp_path)
    largest = max((tmp_path / CHECKPOINTS / "step-00000005").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-1] ^= 1
    largest.write_bytes(content)
    assert_same(run(folder=tmp_path, checkpoint_every=2), whole(checkpoint_every=2))
    assert_whole(tmp_path)


def test_a_run_that_breaks_keeps_its_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "learning_rate", lambda step, **options: 1e30 if step == 5 else learning_rate(step, **options))
    with pytest.raises(NonFiniteLossError, match=r"step 7: the loss is nan, first in the output of model\.layers\.0"):
        run(folder=tmp_path)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000004"]
    assert_same(run(folder=tmp_path), whole())
    assert_whole(tmp_path)


def test_a_validation_that_breaks_keeps_its_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        loop, "learning_rate", lambda step, **options: math.inf if step == 7 else learning_rate(step, **options)
    )
    with pytest.raises(
        NonFiniteLossError, match=r"after step 8 the validation loss is not finite, first in the output of model"
    ):
        run(folder=tmp_path)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000004"]
    assert_same(run(folder=tmp_path), whole())


def test_a_broken_mask_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(*args: Any, **options: Any) -> Any:
        trainee = make_trainee(*args, **options)
        refresh = trainee.masks.refresh

        def planted() -> Any:
            flips = refresh()
            next(iter(trainee.masks.sites.values())).mask[0, :3] = True
            return flips

        trainee.masks.refresh = planted  # type: ignore[method-assign]
        return trainee

    monkeypatch.setattr(loop, "make_trainee", breaking)
    with pytest.raises(SparsepassError, match="breaks 2:4 in 1 groups"):
        run(folder=tmp_path)
    assert not (tmp_path / CHECKPOINTS).exists()
    with pytest.raises(SparsepassError, match="breaks 2:4 in 1 groups"):
        run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 2e-2}, r"another run: settings\.lr is 0\.02 here and 0\.01 in the checkpoint; resume with the same settings"),
        ({"max_steps": 9}, r"settings\.max_steps is 9 here and 8 in the checkpoint; num_steps is 9 here and 8"),
        ({"method": "cast"}, r'settings\.method is "cast" here and "ast" in the checkpoint'),
        ({"recipe": "nm_sparsify{pattern=1:4}"}, "recipe is .*1:4.* here and .*slorb"),
        ({"name": "gpt2", "recipe": "nm_sparsify,slorb{k=8}"}, "sparse_weights"),
    ],
)
def test_another_run_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    before = run(folder=tmp_path, max_steps=8)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SparsepassError, match=message):
        run(folder=tmp_path, **changes)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    # What does not change the numbers may change.
    assert_same(run(folder=tmp_path, log_every=2, keep_checkpoints=5, compile=True), before)


def test_other_data_is_refused(tmp_path: Path) -> None:
    run(folder=tmp_path)
    with pytest.raises(SparsepassError, match="training data is not what the checkpoint was made with"):
        train(sparse(), captured("llama"), settings(), data=data(num_sequences=40), run_folder=tmp_path)


def test_another_teacher_or_program_is_refused(tmp_path: Path) -> None:
    run(folder=tmp_path)
    with torch.no_grad():
        teacher, program = captured("llama"), sparse()
        for model in (teacher, program):
            model.tensor("model.norm.weight")[0] += 1
    with pytest.raises(SparsepassError, match="another run: teacher is"):
        train(sparse(), teacher, settings(), run_folder=tmp_path)
    with pytest.raises(SparsepassError, match="another run: program is"):
        train(program, captured("llama"), settings(), run_folder=tmp_path)


def values(program: Program) -> str:
    """Tells programs apart by their tensors' bits."""
    return digest({name: tensor.detach() for name, tensor in program.tensors().items()})


def test_a_checkpoint_is_a_program_for_a_run_with_other_settings(tmp_path: Path) -> None:
    trained = run(folder=tmp_path, frozen=("*embed_tokens*",))
    checkpoints = tmp_path / CHECKPOINTS
    start = sparse()
    first, last = values(start), values(trained)
    for place in (tmp_path, checkpoints, checkpoints / "step-00000008"):
        found, note = program_of_checkpoint(start, place)
        assert "step-00000008" in note
        assert values(found) == last
    middle, _ = program_of_checkpoint(start, checkpoints / "step-00000004")
    assert values(middle) not in (first, last)
    assert values(start) == first
    again = train(middle, captured("llama"), settings(lr=2e-3, max_steps=2), run_folder=tmp_path / "new")
    assert again.retraining[0]["num_steps"] == 2


def test_a_program_of_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SparsepassError, match="holds no checkpoint; name a run folder"):
        program_of_checkpoint(sparse(), tmp_path)
    run(folder=tmp_path / "cast", method="cast")
    with pytest.raises(SparsepassError, match=r"method cast.*start it anew"):
        program_of_checkpoint(sparse(), tmp_path / "cast")
    run(folder=tmp_path / "other", recipe="nm_sparsify")
    with pytest.raises(SparsepassError, match="another run: recipe is"):
        program_of_checkpoint(sparse(), tmp_path / "other")


def test_a_folder_with_checkpoints_is_refused_where_a_new_run_is_wanted(tmp_path: Path) -> None:
    run(folder=tmp_path)
    with pytest.raises(SparsepassError, match="holds checkpoints of an earlier run; resume it, or give another folder"):
        train(sparse(), captured("llama"), settings(), run_folder=tmp_path, resume="never")
    fresh = train(sparse(), captured("llama"), settings(), run_folder=tmp_path / "new", resume="never")
    assert fresh.retraining[0]["num_steps"] == 8


def test_a_run_without_checkpoints_keeps_its_metrics_alone(tmp_path: Path) -> None:
    found = run(folder=tmp_path / "none", keep_checkpoints=0)
    assert [path.name for path in (tmp_path / "none").iterdir()] == [METRICS]
    assert found.retraining[0]["step_of_weights"] == 8  # the last ones, whatever validation said
    run(folder=tmp_path / "some")
    with pytest.raises(SparsepassError, match="holds checkpoints, which a run with keep_checkpoints: 0 would not go on from"):
        run(folder=tmp_path / "some", keep_checkpoints=0)


def test_a_checkpoint_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_pieces", full)
    with pytest.raises(SparsepassError, match=r"the disk is full: .*step-00000004 was not written"):
        run(folder=tmp_path)
    monkeypatch.undo()
    assert Checkpoints(tmp_path / CHECKPOINTS).newest() is None
    assert_same(run(folder=tmp_path), whole())


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs that were killed again and again, on one process and on two, in a program of their own: see `loop_processes`."""
    folder = tmp_path_factory.mktemp("killed")
    launch("kills", folder)
    return json.loads((folder / "found.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp", "maskllm"])
def test_a_run_killed_again_and_again_ends_bit_equal(killed: dict[str, Any], kind: str) -> None:
    found = killed[kind]
    assert found["whole"]["digest"] == found["killed"]["digest"]
    assert found["whole"]["record"] == found["killed"]["record"]
    assert found["metrics"] == list(range(1, found["num_steps"] + 1))
    # It was killed, in different steps, and more than once while a checkpoint was being written.
    assert found["kills"] >= 4
    assert found["kills_in_a_save"] >= 2
    assert len(set(found["resumed_at"])) >= 2
