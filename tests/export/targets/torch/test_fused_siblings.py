"""Fused siblings for torch's semi-structured kernels: layers are recorded one by one, under their own names."""

from pathlib import Path

import pytest
import torch
from tests.export.targets.torch.torch_cpu import pruned, tiny_llama

from sparsepass.export.targets.contract import LoweringContext
from sparsepass.export.targets.torch.record import read_record
from sparsepass.export.targets.torch.target import SemiStructured
from sparsepass.passes import apply_passes


def test_layers_are_recorded_and_verified_one_by_one(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        before = pruned(tiny_llama)
        after = apply_passes(before, "fuse_siblings", validate=False)
        found = []
        for name, program in (("before", before), ("after", after)):
            (tmp_path / name).mkdir()
            target = SemiStructured(dtype="bfloat16")
            lowered = target.lower(program, tmp_path / name, LoweringContext())
            checks = target.verify(program, tmp_path / name, lowered, LoweringContext())
            assert all(check.held is not False for check in checks), checks
            found.append(read_record(tmp_path / name).layers)
    assert found[0] == found[1]
    assert any(layer.layer.endswith("self_attn.q_proj") and layer.sparse for layer in found[1])
