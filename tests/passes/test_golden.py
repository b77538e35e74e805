"""The graph before and after each pass, one small file per pass. SPARSEPASS_GOLDEN=write writes them anew."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsepass.graph import Program, capture
from sparsepass.passes import PASSES, apply_passes

GOLDEN = Path(__file__).parent / "golden"

# What is applied before the graph is printed first, and then. reconstruct works in the same call as what makes masks.
_TEXTS = {
    "fold_norms": ("", "fold_norms"),
    "rotate": ("", "rotate{form=blocks,steps=2}"),
    "permute_channels": ("", "permute_channels"),
    "awq_scale": ("", "awq_scale"),
    "fuse_siblings": ("nm_sparsify", "fuse_siblings"),
    "nm_sparsify": ("", "nm_sparsify"),
    "slorb": ("nm_sparsify", "slorb{k=4}"),
    "learn_masks": ("nm_sparsify", "learn_masks"),
    "reconstruct": ("", "nm_sparsify{criterion=magnitude},reconstruct{steps=1}"),
    "quantize": ("nm_sparsify", "quantize{symmetric=false,group_size=0}"),
    "quantize_embedding": ("", "quantize_embedding"),
    "fold": ("nm_sparsify", "fold"),
}


class _Block(nn.Module):
    """Two siblings on one input, and a layer after them."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 8, bias=bias), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.gate(x).relu() * self.up(x))  # type: ignore[no-any-return]


class _Chain(nn.Module):
    """Blocks on a residual stream that can be rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)  # type: ignore[no-any-return]


class _Words(nn.Module):
    """An embedding that is the output head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(16, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.layer(self.embedding(ids)), self.embedding.weight)


def printed(program: Program) -> str:
    """Nodes, their arguments and the modules they stand in, one line each."""
    lines = []
    for node in program.graph_module.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        lines.append(f"{node.name} = {node.op} {node.target!s} {list(node.args)}{node.kwargs or ''}  # {path}".rstrip(" #"))
    return "\n".join(lines)


@pytest.mark.parametrize("name", PASSES)
def test_the_graph_before_and_after(name: str) -> None:
    assert name in _TEXTS, f"say in {Path(__file__).name} what {name} is applied to"
    before, text = _TEXTS[name]
    torch.manual_seed(0)
    batches = [torch.randn(2, 3, 8) for _ in range(2)]
    net = nn.Sequential(_Block(bias=name == "fuse_siblings"))
    if name == "fold_norms":
        norm = nn.LayerNorm(8)
        norm.weight.data.fill_(2)
        net = nn.Sequential(norm, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    if name == "quantize_embedding":
        batches = [torch.randint(16, (2, 3))]
    model = {"rotate": _Chain, "quantize_embedding": _Words}.get(name, lambda: net)()
    program = capture(model.eval(), batches[0])
    if before:
        program = apply_passes(program, before)
    calibration = [(batch,) for batch in batches] if name in ("reconstruct", "awq_scale", "rotate") else None
    after = apply_passes(program, text, calibration=calibration)
    found = f"# before\n{printed(program)}\n\n# {text}\n{printed(after)}\n"
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("SPARSEPASS_GOLDEN") == "write":
        file.parent.mkdir(exist_ok=True)
        file.write_text(found, encoding="utf-8")
    assert file.is_file(), f"{file.name} is missing; run this test with SPARSEPASS_GOLDEN=write, and read what it wrote"
    assert found == file.read_text(encoding="utf-8")


def test_there_is_no_other_file() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(PASSES)
