"""Fused siblings as engines: one layer for each group, in the engine's ONNX and in the evidence."""

import platform
import sys
from pathlib import Path

import pytest
from tests.families import captured

from sparsepass.export.pattern.check import check_pattern
from sparsepass.export.targets.tensorrt import lower as tensorrt
from sparsepass.export.targets.tensorrt.lower import lower_tensorrt
from sparsepass.export.targets.tensorrt.packages import find
from sparsepass.export.targets.tensorrt.target import TensorRT
from sparsepass.passes import apply_passes

pytestmark = pytest.mark.skipif(
    find("tensorrt-rtx") is None and (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="tensorrt-rtx is to be had for x86-64 only",
)


def test_each_fused_weight_has_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "gpus", lambda: ())
    program = apply_passes(captured("llama"), "nm_sparsify,fuse_siblings", validate=False)
    artifact = lower_tensorrt(program, tmp_path, TensorRT(runtime="tensorrt-rtx", sm=(86,), dtype="float16"))
    assert [engine.name for engine in artifact.engines] == ["prefill", "decode"]
    for engine in artifact.engines:
        meant = [layer for layer in artifact.layers if layer.engine == engine.name and layer.conforms == "yes"]
        assert {layer.weight for layer in meant} == set(program.sparse)
        assert len(meant) == 2 * 4
    assert check_pattern(tmp_path / "model.onnx", expected_sparse=artifact.onnx.expected_sparse["model.onnx"]).conforms
