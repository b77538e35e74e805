"""Rounding SLoRB branches with their layers: `quantize{slorb=quantize}`."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.families import BY_NAME, captured, tensors_of
from torch import Tensor

from sparsepass.export.targets import LoweringContext
from sparsepass.export.targets.hf import HuggingFace
from sparsepass.export.targets.onnx import lower_onnx, verify_onnx
from sparsepass.export.targets.packed import Packed
from sparsepass.graph import PassError, Program, ProgramFormatError, SparsepassError, split_siblings
from sparsepass.graph.program import masked_weight
from sparsepass.graph.rounding import RoundingGrid, round_to_nearest
from sparsepass.graph.saved import PROGRAM_FILE
from sparsepass.graph.support import CHECKSUMS_FILE
from sparsepass.passes import apply_passes

PASSES = "nm_sparsify{criterion=magnitude},slorb{k=16}"
INT8 = RoundingGrid(bits=8, group_size=0)


def _program(name: str = "llama", options: str = "slorb=quantize,group_size=16", passes: str = PASSES) -> Program:
    return apply_passes(captured(name), f"{passes},quantize{{{options}}}", validate=False)


def _branches(program: Program) -> list[str]:
    return [state.branch.weight for state in program.sparse.values() if state.branch is not None]


def _output(program: Any, name: str = "llama") -> Tensor:
    with torch.no_grad():
        return tensors_of(program(**BY_NAME[name].inputs(3, 7)))[0]


@pytest.mark.parametrize("passes", [PASSES, "nm_sparsify{criterion=magnitude},slorb{k=16,projection=trainable}"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_branches_are_rounded_to_int8_a_row_in_the_graph_and_in_files(name: str, passes: str, tmp_path: Path) -> None:
    program, kept = _program(name, passes=passes), _program(name, "group_size=16", passes)
    by_hand = _program(name, "group_size=16", passes)
    assert _branches(program)
    for branch in _branches(program):
        assert program.quantized[branch].grid == INT8
        assert branch not in kept.quantized
        rounded = round_to_nearest(kept.tensor(branch), INT8)
        assert torch.equal(masked_weight(program, branch), rounded.weight_OI)
        assert torch.equal(program.tensor(branch), kept.tensor(branch)), "S itself stays behind the rounding"
        assert not torch.equal(rounded.weight_OI, kept.tensor(branch))
        by_hand.write_tensor(branch, rounded.weight_OI)
    assert torch.equal(_output(program, name), _output(by_hand, name))
    assert torch.equal(_output(program.to_model(), name), _output(program, name))
    program.save(tmp_path / "program")
    loaded = Program.load(tmp_path / "program")
    assert loaded.quantized == program.quantized
    assert torch.equal(_output(loaded, name), _output(program, name))
    assert torch.equal(_output(apply_passes(program, "fold"), name), _output(program, name))


def test_the_report_says_it() -> None:
    facts = [o.facts for o in _program().history[-1].outcomes if o.action == "rewritten"]
    assert all(found["branch"] == "int8, one scale a row" and 0 < float(found["branch_error"]) < 0.01 for found in facts)
    assert not any("branch" in o.facts for o in _program(options="").history[-1].outcomes)


@pytest.mark.parametrize("options", ["slorb=quantize,group_size=16", "slorb=quantize,format=fp8"])
def test_fused_layers_have_branches_on_their_grids(options: str) -> None:
    program = _program(options=options)
    fused = apply_passes(program, "fuse_siblings")
    assert len(fused.quantized) < len(program.quantized)
    torch.testing.assert_close(_output(fused), _output(program))
    apart = split_siblings(fused)
    assert apart.quantized == program.quantized
    assert torch.equal(_output(apart), _output(program))
    partly = apply_passes(_program(options="slorb=quantize,targets=q_proj"), "quantize{ignore=q_proj}", validate=False)
    told = {o.site: o.reason for o in apply_passes(partly, "fuse_siblings").history[-1].outcomes}
    assert "has a SLoRB branch with k=16, quantized" in told["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"form": "qdq"}, 28),
        ({"form": "matmulnbits", "with_past": False}, 28),
        ({"form": "matmulnbits", "with_past": False, "fold_slorb": True}, 14),
        ({"form": "dense", "with_past": False}, 0),
    ],
)
def test_onnx_files_hold_integers_of_branches(options: dict[str, Any], given: int, tmp_path: Path) -> None:
    program = _program()
    artifact = lower_onnx(program, tmp_path, **options)
    found = verify_onnx(program, tmp_path, artifact)
    assert found["holds"], found
    assert found["weights"]["num_integers"] == given
    assert max(case["max_relative"] for case in found["outputs"]["cases"]) < 1e-5


@pytest.mark.parametrize("target", [HuggingFace(form="dense"), Packed()])
@pytest.mark.filterwarnings("ignore:the kernels were not compiled")
def test_other_targets_hold_branches_on_their_grids(target: HuggingFace | Packed, tmp_path: Path) -> None:
    program = _program()
    lowered = target.lower(program, tmp_path, LoweringContext())
    assert all(check.held for check in target.verify(program, tmp_path, lowered, LoweringContext()))
    file = tmp_path / ("adapter/adapter_model.safetensors" if isinstance(target, HuggingFace) else "model.safetensors")
    tensors = safetensors.torch.load_file(file)
    for branch in _branches(program):
        path = branch.removesuffix(".slorb_weight")
        name = f"base_model.model.{path}.lora_B.weight" if isinstance(target, HuggingFace) else branch
        assert torch.equal(tensors[name], masked_weight(program, branch).to(tensors[name].dtype))


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        ("nm_sparsify,quantize{slorb=quantize}", "there are none; leave it out; put slorb before it"),
        (f"{PASSES},quantize{{slorb=fold}}", r"export with onnx\{form=matmulnbits,fold_slorb=true\}"),
        (f"{PASSES},quantize{{slorb=int4}}", "slorb expects keep or quantize, got 'int4'"),
    ],
)
def test_what_cannot_be_is_refused(passes: str, told: str) -> None:
    with pytest.raises((PassError, SparsepassError), match=told):
        apply_passes(captured("llama"), passes)


def test_a_file_that_hides_the_rounding_is_refused(tmp_path: Path) -> None:
    program = _program()
    program.save(tmp_path / "program")
    file = tmp_path / "program" / PROGRAM_FILE
    document = json.loads(file.read_text())
    document["quantized"].pop(_branches(program)[0])
    file.write_text(json.dumps(document))
    (tmp_path / "program" / CHECKSUMS_FILE).unlink(missing_ok=True)
    with pytest.raises(ProgramFormatError, match="the graph rounds it, and it is not said to be quantized"):
        Program.load(tmp_path / "program")
