"""Fused siblings in a packed folder: it is that of the layers apart, which stand in one group and run in one call."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.export.targets.packed.packing import NO_KERNELS, sparse, write
from transformers import AutoModelForCausalLM

from sparsepass.export.targets import LoweringContext
from sparsepass.export.targets.packed import Packed
from sparsepass.graph.native import TORCH, best_path
from sparsepass.passes import apply_passes

pytestmark = pytest.mark.filterwarnings(NO_KERNELS)


@pytest.mark.parametrize("slorb", ["", "slorb{k=8}"])
def test_the_folder_is_that_of_the_program_before(slorb: str, tmp_path: Path) -> None:
    before = sparse("llama", slorb)
    after = apply_passes(before, "fuse_siblings", validate=False)
    write(before, tmp_path / "before")
    (tmp_path / "after").mkdir()
    lowered = Packed().lower(after, tmp_path / "after", LoweringContext())
    checks = Packed().verify(after, tmp_path / "after", lowered, LoweringContext())
    assert all(check.held for check in checks), checks
    one, other = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    groups = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["layers"]
        for name in ("before", "after")
    ]
    assert groups[0] == groups[1]
    first = "model.layers.0.self_attn"
    assert [f"{first}.{name}_proj" for name in "qkv"] in groups[0]
    layer = AutoModelForCausalLM.from_pretrained(tmp_path / "after").model.layers[0]
    native = best_path("bf16") != TORCH
    assert (layer.mlp.up_proj.siblings is layer.mlp.gate_proj.siblings is not None) == native


def test_layers_with_and_without_a_bias_and_with_projections_of_their_own_stand_in_one_group(tmp_path: Path) -> None:
    artifact = write(sparse("whisper", "slorb{k=8,projection=trainable}"), tmp_path)
    first = "model.encoder.layers.0.self_attn"
    (group,) = (group for group in artifact.settings.groups if f"{first}.q_proj" in group)
    assert set(group) == {f"{first}.{name}_proj" for name in "qkv"}
