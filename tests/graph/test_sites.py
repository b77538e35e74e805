import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.families import FAMILIES, captured
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

from sparsepass.graph import Program, Site, capture
from sparsepass.graph.rewrite import attach_mask, finish


def sites_of(model: nn.Module, *inputs: Tensor) -> dict[str, Site]:
    return {site.name: site for site in capture(model.eval(), inputs).sites()}


def by_name(program: Program) -> dict[str, Site]:
    return {site.name: site for site in program.sites()}


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_every_matrix_of_a_model_is_a_site_and_a_site_fits_its_weight(name: str) -> None:
    program = captured(name)
    sites = program.sites()
    assert len({site.name for site in sites}) == len(sites)
    matrices = {n for n, p in program.graph_module.named_parameters() if p.dim() > 1}
    bare = {  # added or indexed, not multiplied
        "vit": {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"},
        "whisper": {"model.decoder.embed_positions.weight"},
    }
    assert {site.weight for site in sites} == matrices - bare.get(name, set())
    nodes = {node.name for node in program.graph_module.graph.nodes}
    for site in sites:
        assert tuple(program.tensor(site.weight).shape) == site.shape
        assert site.shape[site.nm_axis] == site.in_features
        assert {*site.nodes, *site.inputs} <= nodes
        assert len(site.nodes) == len(site.inputs) > 0
        assert site.bias is None or program.tensor(site.bias).shape == (site.out_features,)
        assert sum(site.splits) in (0, site.out_features)
        matrix = site.to_matrix(program.tensor(site.weight))
        assert torch.equal(site.from_matrix(matrix), program.tensor(site.weight))
    order = [node.name for node in program.graph_module.graph.nodes]
    firsts = [order.index(site.nodes[0]) for site in sites if not site.ties]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_sites_are_the_same_with_masks(name: str) -> None:
    program = captured(name)
    before = program.sites()
    for site in before:
        if site.left_alone is None:
            attach_mask(program, site, torch.ones(site.shape, dtype=torch.bool), "2:4")
    finish(program)
    assert [replace(site, inputs=(), nodes=()) for site in program.sites()] == [
        replace(site, inputs=(), nodes=()) for site in before
    ]


@pytest.mark.parametrize(
    ("family", "name", "facts"),
    [
        ("llama", "model.layers.0.mlp.down_proj", {"layout": "linear", "shape": (32, 64), "in_features": 64, "nm_axis": 1}),
        ("llama", "model.layers.1.self_attn.k_proj", {"out_features": 16, "bias": None, "module_type": "Linear"}),
        ("qwen2", "model.layers.1.self_attn.k_proj", {"bias": "model.layers.1.self_attn.k_proj.bias"}),
        ("phi3", "model.layers.0.self_attn.qkv_proj", {"splits": (32, 16, 16)}),
        ("phi3", "model.layers.0.mlp.gate_up_proj", {"splits": (64, 64), "shape": (128, 32)}),
        (
            "gpt2",
            "transformer.h.0.attn.c_attn",
            {
                "layout": "conv1d_hf",
                "shape": (32, 96),
                "in_features": 32,
                "out_features": 96,
                "nm_axis": 0,
                "splits": (32, 32, 32),
                "bias": "transformer.h.0.attn.c_attn.bias",
                "module_type": "Conv1D",
            },
        ),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value", {"splits": (), "shape": (96, 32)}),  # heads interleave
        (
            "mixtral",
            "model.layers.0.mlp.experts.gate_up_proj",
            {
                "weight": "model.layers.0.mlp.experts.gate_up_proj",
                "layout": "experts",
                "shape": (4, 128, 32),
                "in_features": 32,
                "out_features": 128,
                "nm_axis": 2,
                "splits": (64, 64),
                "left_alone": None,
            },
        ),
        ("qwen3_moe", "model.layers.1.mlp.experts.down_proj", {"layout": "experts", "shape": (4, 32, 32), "nm_axis": 2}),
        ("whisper", "model.encoder.conv1", {"layout": "conv1d", "shape": (32, 8, 3), "in_features": 8, "nm_axis": 1}),
        ("vit", "vit.embeddings.patch_embeddings.projection", {"layout": "conv2d", "in_features": 3, "nm_axis": 1}),
        ("convnet", "depthwise", {"layout": "conv2d", "groups": 16, "in_features": 1, "out_features": 16}),
        ("bert", "pooler.dense", {"left_alone": None}),
    ],
)
def test_what_a_site_says(family: str, name: str, facts: dict[str, Any]) -> None:
    site = by_name(captured(family))[name]
    assert {key: getattr(site, key) for key in facts} == facts


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("llama", "model.embed_tokens", "tied to the embedding (lm_head.weight)"),
        ("mistral", "model.embed_tokens", "embedding: a table"),
        ("mistral", "lm_head", "output head: pruning it costs much accuracy; name it in targets"),
        ("vit", "classifier", "output head (its result is an output of the model)"),
        ("convnet", "head", "output head (its result is an output of the model)"),
        ("mixtral", "model.layers.0.mlp.gate", "router: it picks the experts"),
        ("qwen3_moe", "model.layers.1.mlp.gate", "router: it picks the experts"),
        ("t5", "shared", "tied to the embedding (decoder.embed_tokens.weight, encoder.embed_tokens.weight, lm_head.weight)"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "embedding: a table"),
        ("bert", "embeddings.position_embeddings", "embedding: a table"),
    ],
)
def test_why_a_site_is_left_alone(family: str, name: str, reason: str) -> None:
    left_alone = by_name(captured(family))[name].left_alone
    assert left_alone is not None
    assert left_alone.startswith(reason)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_nothing_else_is_left_alone(name: str) -> None:
    kinds = Counter(site.left_alone.split(":")[0].split(" (")[0] for site in captured(name).sites() if site.left_alone)
    assert set(kinds) <= {"embedding", "tied to the embedding", "output head", "router"}
    assert kinds["output head"] + kinds["tied to the embedding"] == (name != "bert")
    assert kinds["router"] == (2 if name in ("mixtral", "qwen3_moe") else 0)


def test_a_weight_used_twice_is_one_site() -> None:
    site = by_name(captured("convnet"))["mix"]
    assert len(site.nodes) == len(site.inputs) == 2
    assert site.inputs[0] != site.inputs[1]
    assert site.left_alone is None


LAYOUTS = {
    "linear": (0, 1),
    "conv1d_hf": (1, 0),
    "experts": (0, 1, 2),
    "experts_transposed": (0, 2, 1),
}


def a_site(layout: Any, shape: tuple[int, ...], nm_axis: int) -> Site:
    return Site(
        name="x",
        weight="x.weight",
        layout=layout,
        shape=shape,
        in_features=shape[nm_axis],
        out_features=shape[0],
        nm_axis=nm_axis,
    )


@settings(max_examples=40)
@given(data=st.data())
def test_the_matrix_of_every_layout_and_back(data: st.DataObject) -> None:
    size = st.integers(1, 5)
    layout = data.draw(st.sampled_from([*LAYOUTS, "conv1d", "conv2d"]))
    rank = {"linear": 2, "conv1d_hf": 2, "conv2d": 4}.get(layout, 3)
    shape = tuple(data.draw(size) for _ in range(rank))
    nm_axis = {"linear": 1, "conv1d_hf": 0, "experts": 2, "experts_transposed": 1, "conv1d": 1, "conv2d": 1}[layout]
    site = a_site(layout, shape, nm_axis)
    weight = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    matrix = site.to_matrix(weight)
    back = site.from_matrix(matrix)
    assert torch.equal(back, weight)
    assert back.is_contiguous()
    assert back.shape == shape
    mask = site.from_matrix(matrix > 3)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, weight > 3)
    if layout in LAYOUTS:
        assert torch.equal(matrix, weight.permute(LAYOUTS[layout]))
    else:  # groups of M are channels at one kernel position
        channels = matrix.reshape(shape[0], -1, shape[1])
        assert torch.equal(channels, weight.reshape(shape[0], shape[1], -1).transpose(1, 2))


class Holder(nn.Module):
    """One weight, used by whatever function a test gives."""

    def __init__(self, function: Any, *shape: int) -> None:
        super().__init__()
        self.w, self.function = nn.Parameter(torch.randn(*shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.function(x, self.w))


@pytest.mark.parametrize(
    ("function", "x", "w", "layout", "nm_axis"),
    [
        (lambda x, w: x @ w, (2, 8), (8, 4), "conv1d_hf", 0),
        (lambda x, w: x @ w.t(), (2, 8), (4, 8), "linear", 1),
        (lambda x, w: x @ w.T, (2, 8), (4, 8), "linear", 1),
        (lambda x, w: x @ w.mT, (2, 8), (4, 8), "linear", 1),
        (lambda x, w: x @ w.permute(1, 0), (2, 8), (4, 8), "linear", 1),
        (lambda x, w: nn.functional.linear(x, w.t()), (2, 8), (8, 4), "conv1d_hf", 0),
        (lambda x, w: nn.functional.linear(x, w), (2, 3, 8), (4, 8), "linear", 1),
        (lambda x, w: x.mm(w), (2, 8), (8, 4), "conv1d_hf", 0),
        (lambda x, w: torch.addmm(torch.zeros(4), x, w), (2, 8), (8, 4), "conv1d_hf", 0),
        (lambda x, w: torch.bmm(x, w), (2, 3, 8), (2, 8, 4), "experts_transposed", 1),
        (lambda x, w: torch.bmm(x, w.transpose(1, 2)), (2, 3, 8), (2, 4, 8), "experts", 2),
        (lambda x, w: torch.bmm(x, w.transpose(-2, -1)), (2, 3, 8), (2, 4, 8), "experts", 2),
        (lambda x, w: nn.functional.conv1d(x, w), (2, 8, 5), (4, 8, 3), "conv1d", 1),
        (lambda x, w: nn.functional.conv2d(x, w, padding="same"), (2, 8, 5, 5), (4, 8, 3, 3), "conv2d", 1),
        (lambda x, w: nn.functional.conv2d(x, w, groups=2), (2, 8, 5, 5), (4, 4, 3, 3), "conv2d", 1),
    ],
)
def test_the_axis_is_the_one_that_the_product_sums_over(
    function: Any, x: tuple[int, ...], w: tuple[int, ...], layout: str, nm_axis: int
) -> None:
    (site,) = capture(Holder(function, *w), torch.randn(x), dynamic_axes={}).sites()
    assert (site.name, site.weight, site.layout, site.nm_axis, site.left_alone) == ("w", "w", layout, nm_axis, None)
    # A weight that is zero but for one index of the axis reads only that index of the input.
    model, example = Holder(function, *w), torch.randn(x)
    with torch.no_grad():
        model.w[(slice(None),) * nm_axis + (slice(1, None),)] = 0
        other = example.clone()
        reduced = 1 if layout.startswith("conv") and layout != "conv1d_hf" else -1
        keep = range(0, other.shape[reduced], w[nm_axis])
        gone = [i for i in range(other.shape[reduced]) if i not in keep]
        other.index_fill_(reduced, torch.tensor(gone), 7.0)
        assert torch.equal(model(example), model(other))


@pytest.mark.parametrize(
    ("function", "x", "w", "said"),
    [
        (lambda x, w: torch.einsum("bi,oi->bo", x, w), (2, 8), (4, 8), "einsum is not an operation"),
        (lambda x, w: w @ x.t(), (2, 8), (4, 8), "matmul is not an operation"),
        (lambda x, w: nn.functional.conv3d(x, w), (2, 4, 3, 3, 3), (4, 4, 2, 2, 2), "conv3d is not an operation"),
        (lambda x, w: nn.functional.conv_transpose2d(x, w), (2, 4, 3, 3), (4, 4, 2, 2), "conv_transpose2d is not"),
        (lambda x, w: nn.functional.linear(x, w * 2), (2, 8), (4, 8), "its weight is computed in the graph"),
        (lambda x, w: x @ w.abs().t(), (2, 8), (4, 8), "its weight is computed in the graph"),
        (lambda x, w: torch.einsum("bi,oi->bo", x, w.abs()), (2, 8), (4, 8), "its weight is computed in the graph"),
    ],
)
def test_a_product_that_passes_cannot_rewrite_is_listed_with_its_reason(
    function: Any, x: tuple[int, ...], w: tuple[int, ...], said: str
) -> None:
    (site,) = capture(Holder(function, *w), torch.randn(x), dynamic_axes={}).sites()
    assert site.layout == "computed"
    assert site.weight == ""
    assert site.left_alone is not None
    assert said in site.left_alone


def test_a_product_of_activations_is_no_site() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return torch.bmm(q, k.transpose(1, 2)).softmax(-1) @ k

    assert sites_of(Attention(), torch.randn(2, 3, 8), torch.randn(2, 3, 8)) == {}


def test_recurrent_layers_are_listed() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.mix = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.mix(self.lstm(x)[0]))

    sites = sites_of(Recurrent(), torch.randn(2, 3, 8))
    assert set(sites) == {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "mix"}
    assert sites["lstm.weight_hh_l0"].left_alone == "lstm is not an operation that passes can rewrite"
    assert sites["mix"].left_alone is None


def test_weights_that_other_tools_compute_are_said_to_be_computed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    prune.random_unstructured(model[0], "weight", 0.5)
    parametrizations.weight_norm(model[2])
    sites = sites_of(model, torch.randn(2, 8))
    assert [site.left_alone for site in sites.values()] == [
        "its weight is computed in the graph, not stored: there is nothing to mask"
    ] * 2
    assert set(sites) == {"0", "2"}


def test_one_weight_in_two_layouts_serves_no_axis() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.encode(x).relu() @ self.encode.weight)

    (site,) = sites_of(Tied(), torch.randn(2, 8)).values()
    assert site.left_alone == "used in several layouts (conv1d_hf, linear): no axis serves them all"


def test_ties_between_layers_are_one_site() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    model[2].weight = model[0].weight
    (site,) = sites_of(model, torch.randn(2, 8)).values()
    assert (site.name, site.ties, len(site.nodes), site.left_alone) == ("0", ("2.weight",), 2, None)


@pytest.mark.parametrize(
    ("cut", "splits"),
    [
        (lambda y: y.chunk(3, -1), (4, 4, 4)),
        (lambda y: y.chunk(3, 2), (4, 4, 4)),
        (lambda y: y.split([2, 4, 6], -1), (2, 4, 6)),
        (lambda y: y.split(5, -1), (5, 5, 2)),
        (lambda y: (y[..., :8], y[..., 8:]), (8, 4)),
        (lambda y: (y[..., :8], y[..., -4:]), (8, 4)),
        (lambda y: (y[..., :8], y[..., 4:]), ()),  # they overlap
        (lambda y: (y[..., ::2], y[..., 1::2]), ()),  # rows take turns
        (lambda y: (y[:, :1], y[:, 1:]), ()),  # another axis
        (lambda y: y.unflatten(-1, (2, 6)).chunk(3, -1), ()),  # within heads
    ],
)
def test_splits_are_those_of_the_output_axis(cut: Any, splits: tuple[int, ...]) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fused = nn.Linear(8, 12)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch.tanh(part) for part in cut(self.fused(x)))

    assert sites_of(Cut(), torch.randn(2, 3, 8))["fused"].splits == splits


def test_a_fused_conv1d_is_split_behind_its_view() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = Conv1D(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.c_attn(x).split(8, dim=2)
            return torch.tanh(q * k + v)

    site = sites_of(Fused(), torch.randn(2, 3, 8))["c_attn"]
    assert (site.splits, site.layout, site.bias) == ((8, 8, 8), "conv1d_hf", "c_attn.bias")


def test_a_site_survives_a_copy_and_its_tensors_are_found_by_name() -> None:
    program = captured("gpt2")
    assert copy.deepcopy(program).sites() == program.sites()
    assert all(site.num_weights == program.tensor(site.weight).numel() for site in program.sites())
