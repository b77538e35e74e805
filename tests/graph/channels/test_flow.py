"""Channel flow: what it allows changes no result, on every family and on random graphs; what it refuses has a reason."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.families import BY_NAME, FAMILIES, captured, tensors_of
from tests.graph.channels.random_net import STEPS, RandomNet
from tests.graph.channels.trying import changed, cleared_and_cut, distance, largest_error, turned, with_even_gains
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsepass.graph import Program, capture, capture_without_weights
from sparsepass.graph.channels import ChannelFlow, channel_flow, uneven_gains
from sparsepass.passes import apply_passes

GOLDEN = Path(__file__).parent / "golden"
IN_FLOAT32 = ("mixtral", "qwen3_moe")
"""Families whose experts do not run in float64."""
CASTS_TO_FLOAT32 = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", *IN_FLOAT32)
"""Families whose norms compute in float32 whatever the model's type."""


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
    for reader in ("query", "key", "value"):  # what they read is read by the sum that the next norm takes, too
        reason = flow.unscaled[f"encoder.layer.1.attention.self.{reader}.weight", (1,)]
        assert reason == "layer_norm divides it by its own size (encoder.layer.1.attention.output.LayerNorm)"


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
def test_every_axis_has_an_answer_or_says_why_not(name: str) -> None:
    """Each axis of each tensor that channels run along, of every parameter that is used: four questions, four answers."""
    program = captured(name)
    flow = channel_flow(program)
    places = [[place for group in flow.permutations for place in group.places],
              [place for group in flow.scalings for place in group.places],
              [place for group in flow.rotations for place in (*group.places, *group.gains)],
              [place for group in flow.removals for place in group.places]]  # fmt: skip
    answers = (flow.refused, flow.unscaled, flow.unmixed, flow.kept)
    given_axes = [{(place.tensor, place.axes) for place in its} for its in places]
    every = set.union(*given_axes, *map(set, answers))
    for its, reasons in zip(given_axes, answers, strict=True):
        assert every <= its | reasons.keys()
        assert all(reasons.values())
    for its, reasons in zip(given_axes[2:], answers[2:], strict=True):  # of the others, a part of an axis may be held
        assert its.isdisjoint(reasons)
    axes_of = {tensor: {axis for name, axes in every if name == tensor for axis in axes} for tensor, _ in every}
    for site in program.sites():  # rows of a table are looked up by numbers, and are nobody's channels
        rows = {0} if site.layout == "embedding" else set()
        kernel = {2, 3} if site.layout.startswith("conv") else set()
        several = {axis for axis, size in enumerate(site.shape) if size > 1} - rows - kernel
        assert several <= axes_of[site.weight]
    unused = [name for name, tensor in program.tensors().items() if isinstance(tensor, nn.Parameter) and name not in axes_of]
    assert unused == []


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
    assert largest_error(program, channel_flow(program), {"ids": torch.arange(15).reshape(3, 5) % 11}) < 1e-9


@pytest.mark.parametrize("step", STEPS)
def test_a_step_by_itself(step: str) -> None:
    torch.manual_seed(0)
    program = capture(RandomNet([step]).double().eval(), example_inputs=torch.arange(12).reshape(2, 6) % 11)
    flow = channel_flow(program)
    assert ("head.weight", (0,)) in flow.refused
    for batch, tokens in ((3, 5), (2, 9)):
        ids = torch.arange(batch * tokens).reshape(batch, tokens) * 7 % 11
        assert largest_error(program, flow, {"ids": ids}) < 1e-9


def test_what_turns_together_stays_together() -> None:
    """Rotary embeddings: a channel and its partner move as one, and only to where the angle is the same."""

    def flow(step: str) -> ChannelFlow:
        net = RandomNet([step]).double().eval()
        return channel_flow(capture(net, example_inputs=torch.arange(12).reshape(2, 6) % 11))

    (pairs,) = [group for group in flow("turned").permutations if group.order == "pairs"]
    made = pairs.places[0]
    assert made.tensor == "layers.0.weight"
    assert [tuple(row) for row in np.sort(made.positions).tolist()] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    (factors,) = [group for group in flow("turned").scalings if group.places[0].tensor == made.tensor]
    assert [tuple(row) for row in np.sort(factors.places[0].positions).tolist()] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    apart = flow("turned_apart")
    assert (made.tensor, (0,)) not in {(place.tensor, place.axes) for group in apart.permutations for place in group.places}
    assert apart.refused[made.tensor, (0,)].startswith("it is not both made and read by weights, or no other channel")


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
