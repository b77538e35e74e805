"""Programs cut at their head: the halves together are the whole, and share its parameters."""

from typing import Any

import pytest
import torch
from tests.families import BY_NAME, FAMILIES, captured
from torch import Tensor, nn

from sparsepass.graph import CaptureError, Program, capture
from sparsepass.graph.cut import cut_head
from sparsepass.graph.hierarchy import Hierarchy, blocks

CAUSAL = [family.name for family in FAMILIES if family.generates]


@pytest.mark.parametrize("name", CAUSAL)
def test_the_halves_are_the_whole(name: str) -> None:
    program = captured(name)
    graph, tensors = str(program.graph_module.graph), {key: id(t) for key, t in program.tensors().items()}
    inputs = BY_NAME[name].inputs(3, 5)
    body, head = cut_head(program)
    hidden = body(**inputs)
    assert not isinstance(head, nn.Identity)
    assert hidden.shape[-1] < 96
    assert torch.equal(head(hidden), program(**inputs).logits)
    # One token at a time, as a loss in chunks calls it.
    parts = torch.cat([head(hidden[:1, token : token + 1]) for token in range(hidden.shape[1])], 1)
    assert torch.allclose(parts, program(**inputs).logits[:1], atol=1e-6)
    assert {id(p) for half in (body, head) for p in half.parameters()} <= {id(p) for p in program.parameters()}
    used = {id(p) for p in program.graph_module.parameters()}
    assert {id(p) for half in (body, head) for p in half.parameters()} == used
    assert str(program.graph_module.graph) == graph
    assert {key: id(t) for key, t in program.tensors().items()} == tensors


def test_a_body_has_the_models_tree_and_no_head() -> None:
    body, head = cut_head(captured("llama"))
    tree = body.hierarchy()
    assert isinstance(tree, Hierarchy)
    assert blocks(tree) == ("tree.model.layers.0", "tree.model.layers.1")
    assert [name for name, _ in tree.named_children()] == ["tree"]
    assert [name for name, _ in head.named_parameters()] == ["model.embed_tokens.weight"]  # tied


class Head(nn.Module):
    """A small network with a head of a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.body, self.head = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        hidden = torch.relu(self.body(x))
        logits = self.head(hidden)
        if self.kind == "capped":
            logits = 3 * torch.tanh(logits / 3)
        if self.kind == "reads an input":
            logits = logits + y
        if self.kind == "reads the body twice":
            logits = logits + hidden[..., :4]
        if self.kind == "none":
            logits = x + y
        return logits


def of(kind: str) -> tuple[Program, dict[str, Tensor]]:
    inputs = {"x": torch.randn(2, 8), "y": torch.randn(2, 8 if kind == "none" else 4)}
    return capture(Head(kind), inputs), inputs


@pytest.mark.parametrize(("kind", "is_cut"), [("plain", True), ("capped", True), ("reads an input", False), ("none", False)])
def test_heads_of_all_kinds(kind: str, is_cut: bool) -> None:
    program, inputs = of(kind)
    body, head = cut_head(program, "output")
    assert isinstance(head, nn.Identity) is not is_cut
    assert body(**inputs).shape == (2, 6 if is_cut else inputs["y"].shape[1])
    assert torch.equal(head(body(**inputs)), program(**inputs))


def test_what_follows_the_head_may_read_its_input_too() -> None:
    program, inputs = of("reads the body twice")
    body, head = cut_head(program, "output")
    assert torch.equal(head(body(**inputs)), program(**inputs))


def test_gradients_reach_the_program() -> None:
    program, inputs = of("plain")
    body, head = cut_head(program, "output")
    head(body(**inputs)).square().sum().backward()
    found = {name: p.grad.clone() for name, p in program.named_parameters() if p.grad is not None}
    assert len(found) == 4
    program.zero_grad()
    program(**inputs).square().sum().backward()
    assert all(torch.equal(p.grad, found[name]) for name, p in program.named_parameters() if p.grad is not None)


def test_a_program_without_logits_says_so() -> None:
    with pytest.raises(CaptureError, match=r"returns last_hidden_state, pooler_output and no 'logits'; .*ForCausalLM"):
        cut_head(captured("bert"))


def test_blocks_are_the_outermost_numbered_children() -> None:
    inner = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    shared = nn.Linear(2, 2)
    net = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"experts": inner}), shared, shared]), "head": nn.Linear(2, 2)})
    assert blocks(net) == ("h.0", "h.1")
    assert blocks(nn.Linear(2, 2)) == ()
