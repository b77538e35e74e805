"""A module tree made lean computes what it computed, keeps less for the backward pass, and holds no copies."""

from typing import Any

import pytest
import torch
from tests.families import BY_NAME, captured
from torch import Tensor, fx

from sparsepass.graph.hierarchy import Hierarchy
from sparsepass.passes import apply_passes
from sparsepass.retrain.lean import make_lean, masked_linear


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
    ("name", "passes", "merged"),
    [
        ("llama", "nm_sparsify", 14),
        ("llama", "nm_sparsify,slorb{k=4}", 14),
        ("qwen2", "nm_sparsify", 14),
        ("phi3", "nm_sparsify", 8),
        ("gpt2", "nm_sparsify", 0),
    ],
)
def test_results_and_gradients_stay_bit_for_bit(name: str, passes: str, merged: int, low: bool) -> None:
    plain, lean = trees(name, passes)
    assert calls(lean, masked_linear) == merged
    assert calls(plain, masked_linear) == 0
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
