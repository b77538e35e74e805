"""Channel flow: what it allows changes no result, on every family and on random graphs; what it refuses has a reason."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.families import BY_NAME, FAMILIES, tensors_of
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from sparsepass.graph import Program, capture, capture_without_weights
from sparsepass.graph.channels import ChannelFlow, channel_flow, permuted, scaled
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
        for place in factors.places:
            scaled_.set_tensor(place.tensor, scaled(scaled_.tensor(place.tensor).detach(), place, values))
    return moved, scaled_


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


def test_factors_that_a_residual_reader_forbids_are_refused() -> None:
    """BERT's norms come after the sum: what they make is read by the next sum too."""
    flow = channel_flow(family_program("bert")[0])
    makers = [place.tensor for group in flow.scalings for place in group.places if not place.reads]
    assert not [name for name in makers if "LayerNorm" in name]
    reason = flow.unscaled["encoder.layer.0.attention.output.LayerNorm.weight", (0,)]
    assert reason == "layer_norm divides it by its own size (encoder.layer.0.output.LayerNorm)"


def test_masks_are_permuted_with_their_weights() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    program = apply_passes(net, "nm_sparsify", example_inputs=torch.randn(2, 8, dtype=torch.float64))
    flow = channel_flow(program)
    assert any(place.tensor.endswith("mask") for group in flow.permutations for place in group.places)
    inputs = torch.randn(5, 8, dtype=torch.float64)
    with torch.no_grad():
        for other in changed(program, flow):
            assert distance([program(inputs)], [other(inputs)]) < 1e-9


class RandomNet(nn.Module):
    """Steps drawn by hypothesis, on values of 8 channels."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3 * len(steps)))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in steps)
        self.gains = nn.ParameterList(torch.randn(8) for _ in steps)
        self.heads = nn.ParameterList(torch.randn(2, 4) for _ in steps)
        self.register_buffer("fixed", torch.randn(8))
        self.embedding = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for number, step in enumerate(self.steps):
            x = getattr(self, f"_{step}")(x, number, self.layers[3 * number : 3 * number + 3])
        return self.head(x)  # type: ignore[no-any-return]

    def _linear(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        return layers[0](x)  # type: ignore[no-any-return]

    def _relu(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        return torch.relu(layers[0](x))

    def _gated(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        return layers[2](functional.silu(layers[0](x)) * layers[1](x))  # type: ignore[no-any-return]

    def _residual(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        return x + layers[1](torch.tanh(layers[0](self.norms[number](x))))  # type: ignore[no-any-return]

    def _rms(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.gains[number])  # type: ignore[no-any-return]

    def _gain(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        return x * self.gains[number]  # type: ignore[no-any-return]

    def _squared(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        y = layers[0](x)
        return y * y  # type: ignore[no-any-return]

    def _fixed(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        return layers[1](layers[0](x) * self.fixed)  # type: ignore[no-any-return]

    def _swapped(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        first, second = layers[0](x).chunk(2, -1)
        return torch.cat([second, -first], -1)

    def _picked(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        y = layers[0](x)
        return y + y[..., :1]  # type: ignore[no-any-return]

    def _rolled(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        y = layers[0](x)
        return y + y.flip(-1)  # type: ignore[no-any-return]

    def _parts(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        y = layers[0](x)
        return torch.cat([torch.relu(y[..., :3]), torch.sigmoid(y[..., 3:])], -1)

    def _in_heads(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        y = layers[0](x).view(*x.shape[:-1], 2, 4)
        y = y / (y.pow(2).sum(-1, keepdim=True) + 1) * self.heads[number]
        return layers[1](y.flatten(-2))  # type: ignore[no-any-return]

    def _head_softmax(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        y = layers[0](x).view(*x.shape[:-1], 2, 4)
        return layers[1](torch.softmax(y, -1).flatten(-2))  # type: ignore[no-any-return]

    def _attention(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:-1], 2, 4).transpose(1, 2) for layer in layers)
        weights = torch.softmax(q @ k.transpose(-1, -2), -1)
        return x + (weights @ v).transpose(1, 2).flatten(-2)  # type: ignore[no-any-return]

    def _shared(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        return layers[0](torch.relu(layers[0](x)))  # type: ignore[no-any-return]

    def _mean(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        return x + layers[0](x).mean(1, keepdim=True)  # type: ignore[no-any-return]

    def _outer(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        first, second = layers[0](x)[..., :4], layers[1](x)[..., :2]
        return layers[2]((first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2))  # type: ignore[no-any-return]

    def _unknown(self, x: Tensor, number: int, layers: nn.ModuleList) -> Tensor:
        return x + torch.cumsum(layers[0](x), -1)


STEPS = sorted(name[1:] for name in vars(RandomNet) if name.startswith("_") and not name.startswith("__"))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=4))
def test_random_graphs(steps: list[str]) -> None:
    torch.manual_seed(0)
    net = RandomNet(steps).double().eval()
    program = capture(net, example_inputs=torch.arange(12).reshape(2, 6) % 11)
    inputs = torch.arange(15).reshape(3, 5) % 11
    with torch.no_grad():
        expected = [program(inputs)]
        for other in changed(program, channel_flow(program)):
            assert distance(expected, [other(inputs)]) < 1e-9


def test_each_step_by_itself_lets_something_through() -> None:
    """A guard against refusing everything: what single steps allow between layers of their own."""
    allowed = {}
    for step in ("relu", "gated", "in_heads", "attention", "outer"):
        program = capture(RandomNet([step]).double().eval(), example_inputs=torch.arange(12).reshape(2, 6) % 11)
        flow = channel_flow(program)
        allowed[step] = (len(flow.permutations), len(flow.scalings))
    assert allowed == {"relu": (2, 2), "gated": (3, 3), "in_heads": (4, 3), "attention": (2, 1), "outer": (2, 3)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_a_program_without_weights_has_the_same_flow(name: str, tmp_path: Path) -> None:
    model = BY_NAME[name].model()
    assert isinstance(model, PreTrainedModel)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    expected = channel_flow(capture(model, example_inputs=BY_NAME[name].inputs(2, 8)))
    found = channel_flow(capture_without_weights(tmp_path))
    assert (found.lines(), found.refused, found.unscaled) == (expected.lines(), expected.refused, expected.unscaled)
