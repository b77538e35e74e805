"""What rewriting does to the graph. Golden files: run pytest with SPARSEPASS_GOLDEN=write to write them anew."""

import copy
import functools
import itertools
import os
from pathlib import Path

import pytest
import torch
from tests.families import captured
from torch import Tensor, fx, nn

from sparsepass.graph import Program, Site, capture
from sparsepass.graph.records import BranchState, SparseState
from sparsepass.graph.rewrite import attach_branch, attach_logits, attach_mask, beside, detach_logits, finish, fold_mask

GOLDEN = Path(__file__).parent / "golden"
_aten = torch.ops.aten


class Attention(nn.Module):
    """Three siblings on one input, one layer after them, and one of GPT-2's layout."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 4, bias=False), nn.Linear(8, 4), nn.Linear(8, 4, bias=False)
        self.out = nn.Parameter(torch.randn(4, 8))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = (self.q(x) * self.k(x)).tanh() + self.v(x)
        return torch.addmm(self.bias, y, self.out).tanh()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)  # type: ignore[no-any-return]


@functools.cache
def _program() -> Program:
    torch.manual_seed(0)
    return capture(nn.Sequential(Block()).eval(), torch.randn(2, 8))


def program_and_sites() -> tuple[Program, dict[str, Site]]:
    program = copy.deepcopy(_program())
    return program, {site.name.rpartition(".")[2]: site for site in program.sites()}


def mask_of(site: Site) -> Tensor:
    """The first and last of every four along the N:M axis."""
    row = torch.tensor([True, False, False, True]).repeat(site.in_features // 4)
    shape = [1] * len(site.shape)
    shape[site.nm_axis] = -1
    return row.view(shape).expand(site.shape).contiguous()


def branch_of(site: Site, k: int = 4) -> Tensor:
    shape = (site.out_features, site.in_features // k)
    return torch.randn(shape, generator=torch.Generator().manual_seed(site.out_features))


def check_golden(program: Program, name: str) -> None:
    """Nodes, their arguments and the modules they stand in, one line each."""
    lines = []
    for node in program.graph_module.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        target = node.target if isinstance(node.target, str) else str(node.target)
        lines.append(f"{node.name} = {node.op} {target} {list(node.args)}{node.kwargs or ''}  # {path}".rstrip(" #"))
    text = "\n".join(lines) + "\n"
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("SPARSEPASS_GOLDEN") == "write":
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_the_graph_before() -> None:
    check_golden(program_and_sites()[0], "before")


def test_the_graph_with_masks() -> None:
    program, sites = program_and_sites()
    for name in ("q", "out"):
        attach_mask(program, sites[name], mask_of(sites[name]), "2:4")
    finish(program)
    check_golden(program, "with_masks")


def test_the_graph_with_masks_and_branches() -> None:
    program, sites = program_and_sites()
    for name in ("q", "k", "out"):
        attach_mask(program, sites[name], mask_of(sites[name]), "2:4")
        attach_branch(program, sites[name], branch_of(sites[name]), 4)
    attach_mask(program, sites["v"], mask_of(sites["v"]), "2:4")
    attach_branch(program, sites["v"], branch_of(sites["v"]), 4, torch.ones(2, 8))
    finish(program)
    check_golden(program, "with_branches")


def test_the_graph_with_learned_masks() -> None:
    program, sites = program_and_sites()
    for name in ("q", "out"):
        attach_mask(program, sites[name], mask_of(sites[name]), "2:4")
    before = [node.target for node in program.graph_module.graph.nodes]
    for name in ("q", "out"):
        attach_logits(program, sites[name], torch.zeros(4, 6, sites[name].in_features // 4), 2, 4)
    finish(program)
    check_golden(program, "with_learned_masks")
    for name in ("q", "out"):
        detach_logits(program, sites[name].weight)
    finish(program)
    assert [node.target for node in program.graph_module.graph.nodes] == before
    assert not any("mask_" in name for name in program.tensors())
    assert all(state.learned is None for state in program.sparse.values())


def test_what_a_masked_program_computes() -> None:
    program, sites = program_and_sites()
    model = nn.Sequential(Block())
    model.load_state_dict({name: t.detach().clone() for name, t in program.tensors().items()})
    for site in sites.values():
        attach_mask(program, site, mask_of(site), "2:4")
        with torch.no_grad():
            model.get_parameter(site.weight).mul_(mask_of(site))
    finish(program)
    x = torch.randn(5, 8)
    assert torch.equal(program(x), model(x))
    for site in sites.values():
        name = f"{site.weight}_mask" if site.name.endswith("out") else f"{site.name}.mask"
        assert program.sparse[site.weight] == SparseState(pattern="2:4", axis=site.nm_axis, mask=name)
        assert torch.equal(program.tensor(name), mask_of(site))
        assert not isinstance(program.tensor(name), nn.Parameter)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", ["q", "k", "out"])
def test_what_a_branch_adds(name: str, trainable: bool) -> None:
    program, sites = program_and_sites()
    site = sites[name]
    attach_mask(program, site, torch.ones(site.shape, dtype=torch.bool), "2:4")
    finish(program)
    x = torch.randn(5, 8)
    nodes = dense_values(program, x)
    projection = torch.randn(site.in_features // 4, site.in_features) if trainable else None
    attach_branch(program, site, branch_of(site), 4, projection)
    finish(program)
    after = dense_values(program, x)
    (input_name,) = site.inputs
    fixed = torch.eye(site.in_features // 4).repeat_interleave(4, dim=1)
    X_RI = projection if projection is not None else fixed
    expected = nodes[site.nodes[0]] + (nodes[input_name] @ X_RI.t()) @ branch_of(site).t()
    (total,) = [n for n in program.graph_module.graph.nodes if n.target is _aten.add.Tensor and n.args[0].name == site.nodes[0]]
    torch.testing.assert_close(after[total.name], expected, rtol=1e-5, atol=1e-5)  # the order of the sums differs
    prefix = f"{site.weight}_" if name == "out" else f"{site.name}."
    state = program.sparse[site.weight].branch
    assert state == BranchState(
        k=4, weight=f"{prefix}slorb_weight", projection=f"{prefix}slorb_projection" if trainable else None
    )
    assert isinstance(program.tensor(state.weight), nn.Parameter)


def dense_values(program: Program, x: Tensor) -> dict[str, Tensor]:
    """Node name -> its value."""
    values: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Tensor:
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        Recorder(program.graph_module).run(x)
    return values


def test_siblings_share_one_segment_sum() -> None:
    program, sites = program_and_sites()
    for name in ("q", "k", "v"):
        attach_mask(program, sites[name], mask_of(sites[name]), "2:4")
        attach_branch(program, sites[name], branch_of(sites[name]), 4)
    finish(program)
    sums = [node for node in program.graph_module.graph.nodes if node.target is _aten.sum.dim_IntList]
    assert len(sums) == 1
    assert len(sums[0].users) == 3


def test_siblings_of_another_k_do_not_share() -> None:
    program, sites = program_and_sites()
    for name, k in (("q", 4), ("k", 2)):
        attach_mask(program, sites[name], mask_of(sites[name]), "2:4")
        attach_branch(program, sites[name], branch_of(sites[name], k), k)
    finish(program)
    assert sum(node.target is _aten.sum.dim_IntList for node in program.graph_module.graph.nodes) == 2


def test_an_unflatten_of_the_models_own_is_not_taken_for_a_segment_sum() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x)) + torch.unflatten(x, -1, (2, 4)).amax(-1)

    program = capture(Own().eval(), torch.randn(3, 8))
    (site,) = program.sites()
    x = torch.randn(5, 8)
    attach_mask(program, site, torch.ones(2, 8, dtype=torch.bool), "2:4")
    attach_branch(program, site, branch_of(site), 4)
    finish(program)
    linear = nn.functional.linear(x, program.tensor("linear.weight"), program.tensor("linear.bias"))
    x_BRK = torch.unflatten(x, -1, (2, 4))
    expected = torch.tanh(linear + x_BRK.sum(-1) @ branch_of(site).t()) + x_BRK.amax(-1)
    torch.testing.assert_close(program(x), expected)


@pytest.mark.parametrize("order", list(itertools.permutations(("q", "k", "v", "out"))))
def test_the_order_of_rewriting_does_not_matter(order: tuple[str, ...]) -> None:
    reference, sites = program_and_sites()
    other = copy.deepcopy(reference)
    for program, names in ((reference, ("q", "k", "v", "out")), (other, order)):
        for name in names:
            attach_mask(program, sites[name], mask_of(sites[name]), "2:4")
        for name in names:
            attach_branch(program, sites[name], branch_of(sites[name]), 4)
        finish(program)
    x = torch.randn(5, 8)
    assert torch.equal(reference(x), other(x))
    targets = [
        [
            (str(n.target), (list((n.meta.get("nn_module_stack") or {"": ("",)}).values()))[-1][0])
            for n in p.graph_module.graph.nodes
        ]
        for p in (reference, other)
    ]
    assert sorted(targets[0]) == sorted(targets[1])
    assert torch.equal(reference.hierarchy()(x), other.hierarchy()(x))


def test_folding_is_bitwise_and_removes_the_mask() -> None:
    program, sites = program_and_sites()
    for site in sites.values():
        with torch.no_grad():
            program.tensor(site.weight).view(-1)[0] = -0.0
        attach_mask(program, site, mask_of(site), "2:4")
    attach_branch(program, sites["q"], branch_of(sites["q"]), 4)
    finish(program)
    x = torch.randn(5, 8)
    expected = program(x)
    for site in sites.values():
        before = program.tensor(site.weight)
        fold_mask(program, site.weight)
        after = program.tensor(site.weight)
        assert isinstance(after, nn.Parameter)
        assert after is not before
        assert torch.equal(after, torch.where(mask_of(site), before, 0.0))
        assert not bool(torch.signbit(after[~mask_of(site)]).any())
        assert program.sparse[site.weight].mask is None
    finish(program)
    assert torch.equal(program(x), expected)
    assert not [name for name in program.tensors() if "mask" in name]
    assert not [node for node in program.graph_module.graph.nodes if "mask" in str(node.target)]
    assert program.sparse[sites["q"].weight].branch is not None


def test_folding_a_copy_leaves_the_source_alone() -> None:
    program, sites = program_and_sites()
    attach_mask(program, sites["q"], mask_of(sites["q"]), "2:4")
    finish(program)
    other = copy.deepcopy(program)
    fold_mask(other, sites["q"].weight)
    finish(other)
    x = torch.randn(5, 8)
    assert torch.equal(program(x), other(x))
    assert bool(program.tensor(sites["q"].weight)[~mask_of(sites["q"])].any())


def test_a_weight_that_is_used_twice() -> None:
    program = captured("convnet")
    site = next(site for site in program.sites() if site.name == "mix")
    attach_mask(program, site, mask_of(site), "2:4")
    attach_branch(program, site, branch_of(site), 4)
    finish(program)
    graph = program.graph_module.graph
    assert sum(node.target is torch.ops.sparsepass.masked_weight.default for node in graph.nodes) == 2
    assert sum(node.target is _aten.sum.dim_IntList for node in graph.nodes) == 2  # two inputs
    images = torch.randn(3, 3, 8, 8)
    t = {name: tensor.detach() for name, tensor in program.tensors().items()}
    x = torch.relu(nn.functional.conv2d(images, t["stem.weight"], t["stem.bias"], padding=1))
    x = torch.relu(nn.functional.conv2d(x, t["body.weight"], t["body.bias"], padding=1))
    x = torch.relu(nn.functional.conv2d(x, t["depthwise.weight"], t["depthwise.bias"], padding=1, groups=16)).mean((2, 3))
    for _ in range(2):
        y = nn.functional.linear(x, t["mix.weight"] * mask_of(site), t["mix.bias"])
        x = torch.relu(y + torch.unflatten(x, -1, (4, 4)).sum(-1) @ branch_of(site).t())
    torch.testing.assert_close(program(images), nn.functional.linear(x, t["head.weight"], t["head.bias"]))
    expected = program(images)
    fold_mask(program, site.weight)
    finish(program)
    assert torch.equal(program(images), expected)
    assert torch.equal(program.hierarchy()(images), expected)


def test_a_mask_on_a_tied_weight_leaves_the_embedding_whole() -> None:
    program = captured("llama")
    site = next(site for site in program.sites() if site.name == "model.embed_tokens")
    attach_mask(program, site, torch.zeros(site.shape, dtype=torch.bool), "2:4")
    finish(program)
    ids = torch.tensor([[3, 4, 5]])
    assert not program(ids).logits.any()
    (embedding,) = [n for n in program.graph_module.graph.nodes if n.target is _aten.embedding.default]
    assert embedding.args[0].op == "get_attr"


def test_masks_on_experts_and_convolutions() -> None:
    for family in ("mixtral", "whisper"):
        program = captured(family)
        sites = [site for site in program.sites() if site.layout in ("experts", "conv1d") and site.in_features % 4 == 0]
        assert sites
        for site in sites:
            attach_mask(program, site, mask_of(site), "2:4")
        finish(program)
        expected = program(**program.example_inputs).logits
        for site in sites:
            fold_mask(program, site.weight)
            assert not program.tensor(site.weight)[~mask_of(site)].any()
        finish(program)
        assert torch.equal(program(**program.example_inputs).logits, expected)


def test_names_beside_a_weight() -> None:
    _, sites = program_and_sites()
    assert beside(sites["q"], "mask") == "0.attn.q.mask"
    assert beside(sites["out"], "mask") == "0.attn.out_mask"
