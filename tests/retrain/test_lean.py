"""A module tree made lean computes what it computed, keeps less for the backward pass, and holds no copies."""

from typing import Any

import pytest
import torch
from tests.families import BY_NAME, captured
from torch import Tensor, fx

from sparsepass.graph.hierarchy import Hierarchy
from sparsepass.passes import apply_passes
from sparsepass.retrain import lean as lean_module
from sparsepass.retrain.lean import gated_silu, make_lean, masked_linear, quantized_linear


def trees(name: str, passes: str) -> tuple[Hierarchy, Hierarchy]:
    program = apply_passes(captured(name), passes, validate=False)
    plain, lean = program.hierarchy(), program.hierarchy()
    assert isinstance(plain, Hierarchy)
    assert isinstance(lean, Hierarchy)
    make_lean(lean)
    return plain, lean


def calls(tree: Hierarchy, target: Any) -> int:
    graphs = [graph for module in tree.modules() if isinstance(graph := getattr(module, "graph", None), fx.Graph)]
    return sum(node.target is target for graph in graphs for node in graph.nodes)


def results(tree: Hierarchy, inputs: dict[str, Tensor], *, low: bool) -> tuple[Tensor, dict[str, Tensor], int]:
    """Logits, gradients, and bytes kept for the backward pass that are not parameters or buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*tree.parameters(), *tree.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for parameter in tree.parameters():
        parameter.grad = None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = tree(**inputs).logits
        loss = logits.float().square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in tree.named_parameters() if p.grad is not None}
    return logits.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(
    ("name", "passes", "merged", "gates"),
    [
        ("llama", "nm_sparsify,quantize{group_size=16}", 14, 2),
        ("llama", "nm_sparsify{ignore=q_proj},slorb{k=4},quantize{symmetric=false}", 14, 2),
        ("qwen2", "nm_sparsify,quantize{bits=8,group_size=0}", 14, 2),
        ("qwen2", "nm_sparsify,quantize{format=fp8}", 14, 2),
        ("gpt2", "nm_sparsify,quantize", 0, 0),
        ("llama", "nm_sparsify", 14, 2),
        ("llama", "nm_sparsify,slorb{k=4}", 14, 2),
        ("qwen2", "nm_sparsify", 14, 2),
        ("phi3", "nm_sparsify", 8, 2),
        ("gpt2", "nm_sparsify", 0, 0),
    ],
)
def test_results_and_gradients_stay_bit_for_bit(name: str, passes: str, merged: int, gates: int, low: bool) -> None:
    plain, lean = trees(name, passes)
    linear = quantized_linear if "quantize" in passes else masked_linear
    assert (calls(lean, linear), calls(lean, gated_silu)) == (merged, gates)
    assert (calls(plain, linear), calls(plain, gated_silu)) == (0, 0)
    inputs = BY_NAME[name].inputs(2, 6)
    logits, gradients, kept = results(plain, inputs, low=low)
    again, others, less = results(lean, inputs, low=low)
    assert torch.equal(again, logits)
    assert others.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert torch.equal(others[key], gradient), key
    assert less <= kept
    assert less < kept or not merged


def test_slices_that_take_a_part_stay() -> None:
    plain, lean = trees("llama", "nm_sparsify")
    slices = torch.ops.aten.slice.Tensor
    assert 0 < calls(lean, slices) < calls(plain, slices)  # rotary embeddings halve their states


class TestGatedSiLU:
    @staticmethod
    def gradients(function: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = [tensor.clone().requires_grad_() for tensor in inputs]
        found = function(*given)
        return (found, *torch.autograd.grad(found.sin().sum(), given))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_equals_silu_and_product(self, dtype: torch.dtype) -> None:
        gate, up = torch.randn(2, 3, 5, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
        gate[0, 0] = torch.inf  # and nan gradients
        found = self.gradients(gated_silu, gate, up)
        expected = self.gradients(lambda a, b: torch.nn.functional.silu(a) * b, gate, up)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))

    def test_an_input_without_gradient(self) -> None:
        gate, up = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
        (found,) = torch.autograd.grad(gated_silu(gate, up).sum(), up)
        assert torch.equal(found, torch.nn.functional.silu(gate))

    def test_shapes_and_dtypes_that_differ(self) -> None:
        gate, up = torch.randn(3, 4), torch.randn(4).double()
        assert torch.equal(gated_silu(gate, up), torch.nn.functional.silu(gate) * up)

    @pytest.mark.parametrize("twice", ["silu * silu", "read elsewhere"])
    def test_a_gate_that_is_needed_stays(self, twice: str) -> None:
        class Block(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                gate = torch.nn.functional.silu(x)
                return gate * gate if twice == "silu * silu" else gate * x + gate

        graph = torch.export.export(Block(), (torch.randn(3),)).graph
        before = str(graph)
        for node in list(graph.nodes):
            if node.target is torch.ops.aten.mul.Tensor:
                lean_module._merge_gate(node, torch.nn.Module())
        assert str(graph) == before
