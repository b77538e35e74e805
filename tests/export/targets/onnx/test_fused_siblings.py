"""Fused siblings as ONNX: one product and one split for each group, with a cache and without."""

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from tests.families import BY_NAME, captured

from sparsepass.export.targets.onnx import lower_onnx, verify_onnx
from sparsepass.passes import apply_passes

PASSES = "nm_sparsify,slorb{k=8}"


@pytest.mark.parametrize(
    ("name", "dtype", "num_splits"),
    [
        ("llama", None, 4),
        ("llama", torch.float16, 4),
        ("opt", None, 2),
        ("vit", None, 2),
        ("vit", torch.float16, 2),
        ("whisper", None, 4),
    ],
)
def test_one_product_and_one_split_for_each_group(
    name: str, dtype: torch.dtype | None, num_splits: int, tmp_path: Path
) -> None:
    program = apply_passes(captured(name), f"{PASSES},fuse_siblings", validate=False)
    artifact = lower_onnx(program, tmp_path, dtype=dtype)
    found = verify_onnx(program, tmp_path, artifact)
    assert found["holds"], found
    assert program.fused
    assert program.fused.keys() <= artifact.weights.keys()
    parts = {part.weight for parts in program.fused.values() for part in parts}
    assert not parts & artifact.weights.keys()
    expected = {name for weights in artifact.expected_sparse.values() for name in weights}
    assert program.fused.keys() <= expected
    graphs = [ir.load(tmp_path / graph.file).graph for graph in artifact.graphs]
    kinds = Counter(node.op_type for graph in graphs for node in graph)
    assert kinds["Split"] == num_splits
    for graph in graphs:
        for weight in program.fused.keys() & graph.initializers.keys():
            uses = list(graph.initializers[weight].uses())
            assert [use.node.op_type for use in uses] in (["MatMul"], ["Gemm"])


def test_a_plain_module(tmp_path: Path) -> None:
    program = apply_passes(captured("bert"), f"fuse_siblings,{PASSES}", validate=False)
    artifact = lower_onnx(program, tmp_path)
    assert artifact.kind == "forward"
    assert verify_onnx(program, tmp_path, artifact)["holds"]
    inputs = BY_NAME["bert"].inputs(2, 8)
    assert inputs.keys() >= {value.name for value in artifact.graphs[0].inputs}
