"""The same numbers on two processes as on one, replicated (DDP) and sharded (FSDP2)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.retrain.loop_processes import NUMBERS, launch
from tests.retrain.runs import sparse, validation_loss

TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of all kinds, in a program of their own: see `loop_processes`."""
    folder = tmp_path_factory.mktemp("runs")
    launch("numbers", folder)
    return folder


def read(folder: Path) -> Any:
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_give_the_numbers_of_one(runs: Path, kind: str, name: str) -> None:
    one, two = read(runs / "one" / name), read(runs / kind / name)
    # The gradients of two halves of a batch are added, where one process sums over all of it: float64's rounding, which
    # AdamW carries on (most for gradients that are rounding themselves).
    for mine, theirs in zip(one["steps"], two["steps"], strict=True):
        for key in ("flip_rate", "flips_since_first", "lr", "decay", "tokens"):
            assert theirs[key] == mine[key], (key, mine["step"])
        for key in ("loss", "ce", "kl", "grad_norm"):
            assert theirs[key] == pytest.approx(mine[key], rel=TOLERANCE), (key, mine["step"])
    for mine, theirs in zip(one["record"]["validations"], two["record"]["validations"], strict=True):
        assert theirs["nll"] == pytest.approx(mine["nll"], rel=TOLERANCE)
        assert theirs["num_tokens"] == mine["num_tokens"]
    assert two["record"]["step_of_weights"] == one["record"]["step_of_weights"]
    assert two["masks"] == one["masks"]
    assert one["record"]["flips_since_first"] > 0


def test_a_difference_would_be_seen(runs: Path) -> None:
    losses = [found["loss"] for found in read(runs / "one" / "llama")["steps"]]
    other = [found["loss"] for found in read(runs / "one" / "llama cast")["steps"]]
    assert losses != pytest.approx(other, rel=TOLERANCE)
    first = torch.load(runs / "one" / "llama" / "masks.pt", weights_only=True)
    second = torch.load(runs / "one" / "llama cast" / "masks.pt", weights_only=True)
    assert any(not torch.equal(mask, second[name]) for name, mask in first.items())


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_uneven_validation_rows_count_once(runs: Path, kind: str) -> None:
    found = json.loads((runs / kind / "uneven.json").read_text())
    assert [one["num_tokens"] for one in found] == [7 * 15, 7 * 15]
    assert found[0]["nll"] == pytest.approx(validation_loss(sparse(), 7), rel=1e-5)
