"""On a GPU everything gives what it gives on the processor. Skipped where there is none.

Float32 products on a GPU are summed in another order, so that values agree within a tolerance, and masks but for near ties.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tests.families import BY_NAME, captured
from tests.retrain.runs import dense, digest, learn, masks, measures, run, settings, sparse, steps, stopping_at, train
from torch import Tensor

from sparsepass.export.stages.exporting import export
from sparsepass.graph import Program, capture
from sparsepass.graph.perplexity import perplexity
from sparsepass.graph.soft_masks import gumbel_noise
from sparsepass.passes import apply_passes
from sparsepass.passes.criteria.table import CRITERIA
from sparsepass.passes.masks.pack import pack_program
from sparsepass.retrain.loop import TrainingStoppedError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
_CALIBRATION = torch.randint(3, 96, (16, 32), generator=torch.Generator().manual_seed(2))
_PASSES = [f"nm_sparsify{{criterion={name}}}" for name in CRITERIA] + [
    "nm_sparsify{criterion=sparsegpt},slorb{k=8}",
    "nm_sparsify{criterion=sparsegpt},reconstruct{steps=4}",
    "awq_scale,nm_sparsify{criterion=sparsegpt}",
]


def logits(program: Program, device: str) -> Tensor:
    inputs = {name: tensor.to(device) for name, tensor in BY_NAME["llama"].inputs(3, 7).items()}
    with torch.no_grad():
        return program(**inputs).logits.cpu()  # type: ignore[no-any-return]


def agreement(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    same = sum(int((a[name].cpu() == b[name].cpu()).sum()) for name in a)
    return same / sum(mask.numel() for mask in a.values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert"])
def test_a_program_moves_and_a_model_is_captured_there(name: str) -> None:
    family = BY_NAME[name]
    inputs = {key: tensor.cuda() for key, tensor in family.inputs(3, 7).items()}
    moved, model = captured(name).cuda(), family.model().cuda()
    there = capture(model, {key: tensor.cuda() for key, tensor in family.inputs(2, 8).items()})
    with torch.no_grad():
        expected = model(**inputs)[0]
        for program in (moved, there):
            assert program.device.type == "cuda"
            torch.testing.assert_close(program(**inputs)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("passes", _PASSES)
def test_passes_choose_what_they_choose_on_the_processor(passes: str) -> None:
    options: dict[str, Any] = {"calibration": _CALIBRATION, "compute": "float32"}
    here, there = (apply_passes(dense().to(device), passes, **options) for device in ("cpu", "cuda"))
    assert there.device.type == "cuda"
    assert agreement(masks(here), masks(there)) > 0.99
    torch.testing.assert_close(logits(there, "cuda"), logits(here, "cpu"), rtol=0.05, atol=0.02)
    low = apply_passes(dense().cuda(), passes, calibration=_CALIBRATION)  # bfloat16, as it comes
    assert agreement(masks(here), masks(low)) > 0.9


def test_noise_is_the_same_on_every_device() -> None:
    here, there = (gumbel_noise(5, 6, 7, 11, first_row=3, device=torch.device(device)) for device in ("cpu", "cuda"))
    assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("method", ["ast", "cast", "fixed", "maskllm"])
def test_training_loses_what_it_loses_on_the_processor(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(folder: Path, **changes: Any) -> Program:
        return learn(folder, **changes) if method == "maskllm" else run("llama", folder, method=method, **changes)

    there = trained(tmp_path / "gpu")
    low = trained(tmp_path / "low", dtype="bfloat16")
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    here = trained(tmp_path / "cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    losses = [[step["loss"] for step in steps(tmp_path / name)] for name in ("cpu", "gpu", "low")]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(losses[2], losses[0], rtol=0.05, atol=0.02)
    torch.testing.assert_close(measures(there), measures(here), rtol=1e-3, atol=1e-4)
    assert agreement(masks(there), masks(here)) > 0.98
    assert low.device.type == there.device.type == "cuda"


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingStoppedError):
        train(sparse(), dense(), settings(), data=stopping_at(6), run_folder=tmp_path / "parts")
    resumed, unbroken = run("llama", tmp_path / "parts"), run("llama", tmp_path / "whole")
    assert digest(resumed.cpu().tensors()) == digest(unbroken.cpu().tensors())
    assert measures(resumed) == measures(unbroken)


def test_compiled_and_checkpointed_blocks_change_nothing(tmp_path: Path) -> None:
    plain, other = run("llama", tmp_path / "plain"), run("llama", tmp_path / "other", activation_checkpointing=True)
    assert measures(plain) == measures(other)
    compiled = run("llama", tmp_path / "compiled", compile=True)
    torch.testing.assert_close(measures(compiled), measures(plain), rtol=1e-3, atol=1e-4)


def test_what_was_made_there_is_packed_measured_and_exported(tmp_path: Path) -> None:
    program = apply_passes(dense().cuda(), "nm_sparsify{criterion=sparsegpt},slorb{k=8}", calibration=_CALIBRATION)
    pack = pack_program(program)
    assert agreement(masks(program), {name: pack.masks[name].mask() for name in masks(program)}) == 1
    here = perplexity(program.cpu(), _CALIBRATION.flatten(), context=16)
    there = perplexity(program.cuda(), _CALIBRATION.flatten(), context=16)
    assert there.value == pytest.approx(here.value, rel=1e-4)
    assert export(program, "onnx", tmp_path / "onnx").folder.is_dir()
