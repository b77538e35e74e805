"""Text that a model writes itself: from its own distribution, to a file that training takes, and not lost when interrupted."""

import copy
import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tests.export.tiny import save_tiny_llama
from torch import Tensor, nn
from typer.testing import CliRunner

from sparsepass.export.cli.app import app
from sparsepass.graph import SparsepassError
from sparsepass.retrain.data import DataConfig, open_data
from sparsepass.retrain.teacher import sample as module
from sparsepass.retrain.teacher.sample import SampleConfig, sample, sample_to_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return hf.AutoTokenizer.from_pretrained(folder)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_tokens_follow_the_models_distribution_whatever_its_generation_config_says(model: Any) -> None:
    peaked = copy.deepcopy(model)
    with torch.no_grad():
        peaked.lm_head.weight.mul_(20)
    peaked.generation_config.repetition_penalty, peaked.generation_config.min_p = 5.0, 0.5
    prompts = torch.tensor([[1, 70, 80]])
    with torch.no_grad():
        expected = torch.softmax(peaked(input_ids=prompts).logits[0, -1] / 0.7, -1)
    assert float((expected - 1 / len(expected)).abs().sum()) / 2 > 0.5
    drawn = sample(peaked, prompts.repeat(4000, 1), 4, temperature=0.7)[:, -1]
    counts = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    assert float((counts - expected).abs().sum()) / 2 < 0.1
    assert peaked.generation_config.repetition_penalty == 5.0


def test_the_end_of_a_document_stops_nothing_and_the_random_state_stays(model: Any) -> None:
    head = model.lm_head.weight.detach().clone()
    before = torch.get_rng_state()
    try:
        with torch.no_grad():
            model.lm_head.weight.zero_()
        found = sample(model, torch.full((64, 1), 1), 40, seed=3)
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(head)
    assert found.shape == (64, 40)
    assert int((found[:, 1:-1] == 2).sum()) > 0, "no end came, so the test shows nothing"
    after_end = [row[i + 1 :] for row in found.tolist() for i in range(1, 39) if row[i] == 2]
    assert any(set(rest) - {0, 2} for rest in after_end)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found[:, :1], torch.full((64, 1), 1))


def test_a_file_is_the_same_however_often_it_was_interrupted(
    model: nn.Module, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"num_tokens": 130, "length": 16, "batch_size": 4, "seed": 5}
    whole = sample_to_file(model, tokenizer, tmp_path / "whole.jsonl", SampleConfig(**options))
    assert [len(row["input_ids"]) for row in rows(whole)] == [16] * 9
    assert rows(whole)[3]["text"] == tokenizer.decode(rows(whole)[3]["input_ids"])

    calls = 0

    def interrupted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls in (2, 3):
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    monkeypatch.setattr(module, "sample", interrupted)
    target, partial = tmp_path / "parts.jsonl", tmp_path / "parts.jsonl.partial"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sample_to_file(model, tokenizer, target, SampleConfig(**options))
        assert not target.exists()
    partial.write_bytes(partial.read_bytes()[:-30])  # a row cut off, as by a full disk
    with pytest.raises(SparsepassError, match="another seed"):
        sample_to_file(model, tokenizer, target, SampleConfig(**options | {"seed": 6}))
    with pytest.raises(SparsepassError, match="another model"):
        sample_to_file(copy.deepcopy(model).bfloat16(), tokenizer, target, SampleConfig(**options))
    sample_to_file(model, tokenizer, target, SampleConfig(**options))
    assert target.read_bytes() == whole.read_bytes()
    assert calls == 6, "the first batch is drawn again for the row that was cut off, and no more"
    assert not partial.exists()

    partial.write_text(json.dumps({"other": "settings"}) + "\n" + "{}\n")
    sample_to_file(model, tokenizer, target, SampleConfig(**options), force=True)
    assert target.read_bytes() == whole.read_bytes()


def test_runs_of_other_seeds_share_no_sequence(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    found = []
    for seed in (0, 4):
        file = tmp_path / f"{seed}.jsonl"
        sample_to_file(model, tokenizer, file, SampleConfig(num_tokens=192, length=16, batch_size=4, seed=seed))
        found.append({tuple(row["input_ids"]) for row in rows(file)})
    assert not found[0] & found[1]


def test_training_takes_the_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "sampled.jsonl"
    done = CliRunner().invoke(app, ["sample", str(folder), "-o", str(out), "--tokens", "512", "--length", "32"])
    assert done.exit_code == 0, done.output
    data = open_data(DataConfig(context=32, validation=2), source=out)
    assert data.describe()["train"]["num_sequences"] == 14  # type: ignore[index]
    assert all(row["input_ids"][0] == 1 for row in rows(out))
    again = CliRunner().invoke(app, ["sample", str(folder), "-o", str(out), "--tokens", "512"])
    assert again.exit_code == 2
    assert "exists" in again.output


def test_bad_input_is_refused(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out, named in (("a.txt", r"\.jsonl"), ("file/a.jsonl", "is no folder")):
        with pytest.raises(SparsepassError, match=named):
            sample_to_file(model, tokenizer, tmp_path / out, SampleConfig(num_tokens=32))
    with pytest.raises(SparsepassError, match="no token"):
        sample_to_file(model, tokenizer, tmp_path / "a.jsonl", SampleConfig(num_tokens=32, start=""))
    with pytest.raises(SparsepassError, match="generate"):
        sample(nn.Linear(2, 2), torch.ones(1, 1, dtype=torch.int64), 4)
    with pytest.raises(SparsepassError, match="context of 64"):
        sample(model, torch.ones(1, 1, dtype=torch.int64), 65)
    for length, temperature in ((1, 1.0), (4, 0.0)):
        with pytest.raises(SparsepassError, match="to be above the prompt"):
            sample(model, torch.ones(1, 1, dtype=torch.int64), length, temperature=temperature)
    assert not list(tmp_path.glob("*.jsonl"))


def test_two_runs_do_not_write_one_file(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    target, config = tmp_path / "rows.jsonl", SampleConfig(num_tokens=32, length=16, batch_size=2)
    beside = tmp_path / "rows.jsonl.partial"
    with beside.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SparsepassError, match="another run writes"):
            sample_to_file(model, tokenizer, target, config)
    assert beside.exists()
    assert not target.exists()
    sample_to_file(model, tokenizer, target, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_rows_so_far_are_kept_where_there_is_no_room(
    model: nn.Module, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, config = tmp_path / "rows.jsonl", SampleConfig(num_tokens=64, length=16, batch_size=2)
    sample = module.sample

    def full(*args: Any, **kwargs: Any) -> Tensor:
        if (tmp_path / "rows.jsonl.partial").stat().st_size:
            raise OSError(errno.ENOSPC, "No space left on device")
        return sample(*args, **kwargs)

    monkeypatch.setattr(module, "sample", full)
    with pytest.raises(SparsepassError, match=r"rows so far are kept in .*rows\.jsonl\.partial"):
        sample_to_file(model, tokenizer, target, config)
    monkeypatch.undo()
    sample_to_file(model, tokenizer, target, config)
    assert len(rows(target)) == 4


def test_rows_are_not_written_through_another_name(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    os.link(tmp_path / "precious", tmp_path / "rows.jsonl.partial")
    with pytest.raises(SparsepassError, match="has another name too"):
        sample_to_file(model, tokenizer, tmp_path / "rows.jsonl", SampleConfig(num_tokens=32, length=16), force=True)
    assert (tmp_path / "precious").read_text() == "mine"
