"""Channel flow: what it allows changes no result, on every family and on random graphs; what it refuses has a reason."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from numpy.typing import NDArray
from tests.families import BY_NAME, FAMILIES, captured, tensors_of
from tests.graph.channels.random_net import STEPS, RandomNet
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsepass.graph import Program, capture, capture_without_weights
from sparsepass.graph.channels import ChannelFlow, ChannelPlace, channel_flow, permuted, rotated, scaled, uneven_gains, without
from sparsepass.passes import apply_passes

GOLDEN = Path(__file__).parent / "golden"
IN_FLOAT32 = ("mixtral", "qwen3_moe")
"""Families whose experts do not run in float64."""
CASTS_TO_FLOAT32 = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", *IN_FLOAT32)
"""Families whose norms compute in float32 whatever the model's type."""


def changed(program: Program, flow: ChannelFlow, seed: int = 0) -> tuple[Program, Program]:
    """The program with random permutations, and with random factors, wherever the flow allows them."""
    random = np.random.default_rng(seed)
    moved, scaled_ = copy.deepcopy(program), copy.deepcopy(program)
    for group in flow.permutations:
        order = random.permutation(group.num_channels)
        for place in group.places:
            moved.set_tensor(place.tensor, permuted(moved.tensor(place.tensor).detach(), place, order))
    for factors in flow.scalings:
        values = torch.from_numpy(random.uniform(0.5, 2.0, factors.num_factors))
        if factors.positive is None:
            values *= torch.from_numpy(random.choice([-1.0, 1.0], factors.num_factors))
        for place in factors.places:
            scaled_.set_tensor(place.tensor, scaled(scaled_.tensor(place.tensor).detach(), place, values))
    return moved, scaled_


def turned(program: Program, flow: ChannelFlow, seed: int = 0) -> Program:
    """The program with random orthogonal matrices wherever the flow allows them, whatever gains hold."""
    moved = copy.deepcopy(program)
    for number, group in enumerate(flow.rotations):
        assert not uneven_gains(program, group)
        matrix = orthogonal(group.num_channels, seed + number, keeps_mean=group.keeps_mean)
        for place in group.places:
            stored = moved.tensor(place.tensor).detach()
            moved.set_tensor(place.tensor, rotated(stored.double(), place, matrix).to(stored.dtype))
    return moved


def orthogonal(size: int, seed: int, *, keeps_mean: bool) -> Tensor:
    """A random orthogonal matrix; one that has ones for a fixed point, if it keeps the mean."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size - keeps_mean, size - keeps_mean, generator=generator, dtype=torch.float64)
    free: Tensor = torch.linalg.qr(start).Q
    if not keeps_mean:
        return free
    start = torch.cat([torch.ones(size, 1), torch.randn(size, size - 1, generator=generator)], 1).double()
    basis: Tensor = torch.linalg.qr(start).Q
    one = torch.ones(1, 1, dtype=torch.float64)
    turned_: Tensor = basis @ torch.block_diag(one, free) @ basis.T
    return turned_


def with_even_gains(program: Program, flow: ChannelFlow) -> Program:
    """The program with one number for all channels in every gain that rotations ask it of."""
    even = copy.deepcopy(program)
    for place in [place for group in flow.rotations for place in group.gains]:
        even.set_tensor(place.tensor, torch.full_like(even.tensor(place.tensor).detach(), 0.7))
    return even


def cleared_and_cut(program: Program, flow: ChannelFlow, seed: int = 0) -> tuple[Program, Program]:
    """The program with a third of the channels zero that can be taken out, and with them taken out."""
    random = np.random.default_rng(seed)
    cleared, cut = copy.deepcopy(program), copy.deepcopy(program)
    gone: dict[str, list[tuple[ChannelPlace, NDArray[np.int64]]]] = {}
    for group in flow.removals:
        channels = random.permutation(group.num_channels)[: max(1, group.num_channels // 3)]
        for place in group.places:
            gone.setdefault(place.tensor, []).append((place, channels))
            if not place.reads:
                zeros = torch.from_numpy(place.positions[channels].reshape(-1))
                stored = cleared.tensor(place.tensor).detach().clone()
                cleared.set_tensor(place.tensor, stored.index_fill_(place.axes[0], zeros, -place.offset))
    for name, its in gone.items():
        cut.set_tensor(name, without(cleared.tensor(name).detach(), its))
    return cleared, cut


def distance(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest error, relative to the largest value of each tensor."""
    return max(
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
        for a, b in zip(expected, found, strict=True)
        if a.is_floating_point()
    )


def family_program(name: str) -> tuple[Program, dict[str, Tensor]]:
    """A program in float64 whose gains and biases differ from channel to channel, and inputs of another shape."""
    family = BY_NAME[name]
    model = family.model()
    wide = model if name in IN_FLOAT32 else model.double()
    for parameter in wide.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)

    def inputs(batch: int, tokens: int) -> dict[str, Tensor]:
        found = family.inputs(batch, tokens)
        return {k: v.double() if v.is_floating_point() and name not in IN_FLOAT32 else v for k, v in found.items()}

    return capture(wide, example_inputs=inputs(2, 16)), inputs(3, 11)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_what_is_allowed_changes_nothing(name: str) -> None:
    program, inputs = family_program(name)
    flow = channel_flow(program)
    assert flow.permutations
    assert flow.scalings
    text = "\n".join(flow.lines()) + "\n"
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("SPARSEPASS_GOLDEN") == "write":
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")
    bound = 3e-6 if name in CASTS_TO_FLOAT32 else 1e-9
    with torch.no_grad():
        expected = tensors_of(program(**inputs))
        for other in changed(program, flow):
            assert distance(expected, tensors_of(other(**inputs))) < bound
        even = with_even_gains(program, flow)
        assert distance(tensors_of(even(**inputs)), tensors_of(turned(even, flow)(**inputs))) < bound
        cleared, cut = cleared_and_cut(program, flow)
        assert distance(tensors_of(cleared(**inputs)), tensors_of(cut(**inputs))) < bound


def test_factors_that_a_residual_reader_forbids_are_refused() -> None:
    """BERT's norms come after the sum: what they make is read by the next sum too."""
    flow = channel_flow(family_program("bert")[0])
    makers = [place.tensor for group in flow.scalings for place in group.places if not place.reads]
    assert not [name for name in makers if "LayerNorm" in name]
    reason = flow.unscaled["encoder.layer.0.attention.output.LayerNorm.weight", (0,)]
    assert reason == "layer_norm divides it by its own size (encoder.layer.0.output.LayerNorm)"


def test_what_is_not_mixed_or_taken_out_says_why() -> None:
    llama, bert, gpt2, mixtral = (channel_flow(family_program(name)[0]) for name in ("llama", "bert", "gpt2", "mixtral"))
    down = "model.layers.0.mlp.down_proj.weight"
    assert llama.unmixed[down, (1,)] == "silu is not linear (model.layers.0.mlp.act_fn)"
    assert llama.kept[down, (0,)] == "mean runs over its channels, and counts them (model.layers.0.input_layernorm)"
    value = "model.layers.0.self_attn.v_proj.weight"
    assert llama.kept[value, (0,)] == "it is a channel of one of several blocks of one size (model.layers.0.self_attn)"
    assert llama.unmixed["model.layers.0.self_attn.q_proj.weight", (0,)].startswith("it is not both made and read by weights")
    assert bert.unmixed["encoder.layer.0.output.dense.weight", (0,)] == "it is an output of the model"
    fc = "transformer.h.0.mlp.c_fc.weight"
    assert gpt2.kept[fc, (1,)] == "view has the number of its channels in it (transformer.h.0.mlp.c_fc)"
    experts = "model.layers.0.mlp.experts.down_proj"
    assert mixtral.kept[experts, (0, 2)] == "it is a channel of one of several experts of one size (model.layers.0.mlp.experts)"


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_every_axis_is_mixed_or_taken_out_or_says_why_not(name: str) -> None:
    flow = channel_flow(captured(name))
    places = [[place for group in flow.rotations for place in (*group.places, *group.gains)],
              [place for group in flow.removals for place in group.places]]  # fmt: skip
    moving = [group.places for group in flow.permutations] + [group.places for group in flow.scalings]
    every = {(place.tensor, place.axes) for its in moving for place in its}
    for its, reasons in zip(places, (flow.unmixed, flow.kept), strict=True):
        assert {(place.tensor, place.axes) for place in its}.isdisjoint(reasons)
        assert every <= {(place.tensor, place.axes) for place in its} | reasons.keys()
        assert all(reasons.values())


def test_an_uneven_gain_is_named() -> None:
    program = family_program("llama")[0]
    stream = max(channel_flow(program).rotations, key=lambda group: group.num_channels)
    assert uneven_gains(program, stream) == [place.tensor for place in stream.gains]
    assert uneven_gains(captured("llama"), stream) == []


def test_masks_are_neither_mixed_nor_cut() -> None:
    flow = channel_flow(apply_passes(captured("llama"), "nm_sparsify"))
    assert flow.unmixed["model.layers.0.self_attn.o_proj.weight", (1,)].endswith("_proj.weight stands behind a mask")
    assert flow.kept["model.layers.0.mlp.down_proj.weight", (1,)].endswith("_proj.weight stands behind a mask")
    assert not flow.rotations
    assert not flow.removals


def test_masks_are_permuted_with_their_weights() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    program = apply_passes(net, "nm_sparsify", example_inputs=torch.randn(2, 8, dtype=torch.float64))
    flow = channel_flow(program)
    assert any(place.tensor.endswith("mask") for group in flow.permutations for place in group.places)
    inputs = torch.randn(5, 8, dtype=torch.float64)
    with torch.no_grad():
        for other in changed(program, flow):
            assert distance([program(inputs)], [other(inputs)]) < 1e-9


@settings(max_examples=40, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=4))
def test_random_graphs(steps: list[str]) -> None:
    torch.manual_seed(0)
    net = RandomNet(steps).double().eval()
    program = capture(net, example_inputs=torch.arange(12).reshape(2, 6) % 11)
    inputs = torch.arange(15).reshape(3, 5) % 11
    with torch.no_grad():
        expected, flow = [program(inputs)], channel_flow(program)
        for other in changed(program, flow):
            assert distance(expected, [other(inputs)]) < 1e-9
        even = with_even_gains(program, flow)
        assert distance([even(inputs)], [turned(even, flow)(inputs)]) < 1e-9
        cleared, cut = cleared_and_cut(program, flow)
        assert distance([cleared(inputs)], [cut(inputs)]) < 1e-9


class Padded(nn.Module):
    """A number is added where the mask is 0, which it is nowhere in the example."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.second(torch.tanh(self.first(x)))
        away = (1 - mask).unsqueeze(-1).to(y.dtype)
        if self.step == "add":
            y = y + away * 3.0
        elif self.step == "cat":
            y = torch.cat([y, away.expand(-1, -1, 8)], 1)
        else:
            y = away.expand(-1, -1, 8).index_put((torch.tensor([0, 1]),), y[:2])
        return self.head(torch.tanh(self.last(y)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("step", ["add", "cat", "index_put"])
def test_zeros_of_an_example_are_no_zeros_of_the_graph(step: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    net = Padded(step).double().eval()
    program = capture(net, example_inputs={"x": x, "mask": torch.ones(3, 4, dtype=torch.int64)})
    inputs = {"x": x, "mask": torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]])}
    with torch.no_grad():
        expected, flow = [program(**inputs)], channel_flow(program)
        for other in (*changed(program, flow), turned(program, flow)):
            assert distance(expected, [other(**inputs)]) < 1e-9
        cleared, cut = cleared_and_cut(program, flow)
        assert distance([cleared(**inputs)], [cut(**inputs)]) < 1e-9
    assert flow.scalings == ()


def test_each_step_by_itself_lets_something_through() -> None:
    """A guard against refusing everything: what single steps allow between layers of their own."""
    allowed = {}
    for step in ("relu", "gated", "in_heads", "attention", "outer", "unit", "norm", "rms", "shared_heads", "halves"):
        program = capture(RandomNet([step]).double().eval(), example_inputs=torch.arange(12).reshape(2, 6) % 11)
        flow = channel_flow(program)
        allowed[step] = tuple(map(len, (flow.permutations, flow.scalings, flow.rotations, flow.removals)))
    assert allowed == {
        "relu": (2, 2, 1, 2), "gated": (3, 3, 2, 3), "in_heads": (4, 3, 4, 2), "attention": (2, 1, 2, 0), "outer": (2, 3, 2, 2),
        "unit": (3, 2, 3, 3), "norm": (3, 2, 3, 2), "rms": (1, 1, 1, 0), "shared_heads": (2, 2, 2, 2), "halves": (3, 3, 2, 3),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_a_program_without_weights_has_the_same_flow(name: str, tmp_path: Path) -> None:
    model = BY_NAME[name].model()
    assert isinstance(model, PreTrainedModel)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    expected = channel_flow(capture(model, example_inputs=BY_NAME[name].inputs(2, 8)))
    found = channel_flow(capture_without_weights(tmp_path))
    assert found.lines() == expected.lines()
    for reasons in ("refused", "unscaled", "unmixed", "kept"):
        assert getattr(found, reasons) == getattr(expected, reasons)
