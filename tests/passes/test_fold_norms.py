"""Folding norms: outputs stay, gains become 1, all readers take part or none."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.families import BY_NAME, FAMILIES, tensors_of
from tests.graph.channels.random_net import STEPS, RandomNet
from torch import nn

from sparsepass.graph import PassError, Program, capture
from sparsepass.passes import apply_passes
from sparsepass.passes.fold_norms import FoldNorms

PRE_NORM = [family.name for family in FAMILIES if family.name not in ("bert", "convnet")]


def with_gains(name: str) -> Program:
    """A tiny model whose norms have gains and biases that differ from channel to channel."""
    model = BY_NAME[name].model()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return capture(model, example_inputs=BY_NAME[name].inputs(2, 8))


def error(before: Program, after: Program, name: str) -> float:
    inputs = BY_NAME[name].inputs(3, 8 if name == "whisper" else 7)
    with torch.no_grad():
        pairs = zip(tensors_of(before(**inputs)), tensors_of(after(**inputs)), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs if a.is_floating_point())


@pytest.mark.parametrize("name", PRE_NORM)
def test_every_family_keeps_its_outputs(name: str) -> None:
    before = with_gains(name)
    after = apply_passes(before, "fold_norms")
    assert error(before, after, name) < 1e-5
    done = [outcome.site for outcome in after.history[0].outcomes if outcome.action == "rewritten"]
    assert any("q_proj" in site or "c_attn" in site or "qkv" in site or "SelfAttention.q" in site or "query_key_value" in site
               for site in done), done  # fmt: skip


def test_gains_are_gone_and_offsets_are_kept() -> None:
    llama, gemma = (apply_passes(with_gains(name), "fold_norms") for name in ("llama", "gemma3"))
    assert bool((llama.tensor("model.layers.0.input_layernorm.weight") == 1).all())
    assert bool((gemma.tensor("model.layers.0.input_layernorm.weight") == 0).all())  # Gemma adds 1


def test_biases_go_where_all_readers_have_one() -> None:
    program = apply_passes(with_gains("opt"), "fold_norms")
    assert bool((program.tensor("model.decoder.layers.0.self_attn_layer_norm.bias") == 0).all())


def test_post_norm_models_are_refused_with_the_reader() -> None:
    with pytest.raises(PassError, match=r"no layer can be rewritten .*LayerNorm"):
        apply_passes(with_gains("bert"), "fold_norms")


def test_masks_stay_and_the_change_is_noted() -> None:
    before = apply_passes(with_gains("qwen2"), "nm_sparsify")
    after = apply_passes(before, "fold_norms")
    assert error(before, after, "qwen2") < 1e-5
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert after.sparse[weight].changed_by == "fold_norms"
    mask = before.sparse[weight].mask
    assert mask is not None
    assert torch.equal(before.tensor(mask), after.tensor(mask))


def test_a_reader_that_is_to_be_ignored_keeps_its_norm() -> None:
    program = apply_passes(with_gains("llama"), FoldNorms(ignore=("model.layers.0.self_attn.k_proj",)))
    assert not bool((program.tensor("model.layers.0.input_layernorm.weight") == 1).all())
    reasons = {outcome.site: outcome.reason for outcome in program.history[0].outcomes}
    assert "to be ignored" in reasons["model.layers.0.self_attn.q_proj"]


class Gain(nn.Module):
    """A norm whose gain is 0 in places, with a bias, and readers with and without one."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.norm.weight.data[:] = torch.tensor([0.0, 2, -1, 0, 0.5, 3, 1, 1])
        self.norm.bias.data[:] = torch.tensor([1.0, 0, 2, 0, -1, 0, 0, 1])
        self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 4, bias=bias)
        self.last = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.last(torch.relu(self.first(y)) * torch.tanh(self.second(y)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("bias", [True, False])
def test_gains_of_zero(bias: bool) -> None:
    net = Gain(bias=bias).double()
    inputs = torch.randn(5, 8, dtype=torch.float64)
    program = apply_passes(net, "fold_norms", example_inputs=inputs)
    with torch.no_grad():
        assert torch.allclose(program(inputs), net(inputs), rtol=1e-12, atol=1e-12)
    gain = program.tensor("norm.weight")
    assert gain.tolist() == ([1.0] * 8 if bias else [0.0] + [1.0] * 7)


def test_the_model_is_not_changed() -> None:
    net = Gain(bias=True)
    before = copy.deepcopy(net.state_dict())
    apply_passes(net, "fold_norms", example_inputs=torch.randn(2, 8))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_pruning_after_it_sees_weights_that_say_how_much_they_count() -> None:
    program = apply_passes(with_gains("llama"), "fold_norms,nm_sparsify")
    assert program.recipe.startswith("fold_norms,nm_sparsify{")


def of_steps(*steps: str) -> tuple[Program, torch.Tensor]:
    """A program of steps, and inputs of another shape than those that it was captured with."""
    torch.manual_seed(0)
    net = RandomNet(list(steps)).double().eval()
    return capture(net, example_inputs=torch.arange(12).reshape(2, 6) % 11), torch.arange(15).reshape(3, 5) % 11


def relative(before: Program, after: Program, inputs: torch.Tensor) -> float:
    with torch.no_grad():
        expected, found = before(inputs), after(inputs)
    return float((expected - found).abs().max() / expected.abs().max())


MOVED = {"pre_norm": True, "norm_by_hand": True, "norm_scaled": False, "norm_masked": False, "norm_summed": False,
         "bias_twice": False}  # fmt: skip
"""Step whose norm is folded -> whether its bias moves into the reader's, too."""


@pytest.mark.parametrize("step", MOVED)
def test_a_bias_moves_only_where_its_reader_meets_it_as_it_is(step: str) -> None:
    before, inputs = of_steps(step)
    after = apply_passes(before, "fold_norms")
    assert relative(before, after, inputs) < 1e-9
    gain = "gains.0" if step == "norm_by_hand" else "norms.0.weight"
    assert bool((after.tensor(gain) == 1).all())
    assert bool((after.tensor("norms.0.bias") == 0).all()) == MOVED[step]
    assert torch.equal(before.tensor("layers.0.bias"), after.tensor("layers.0.bias")) != MOVED[step]


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ("norm_relu", r"relu lets only positive factors through, and some in norms.0.weight are not"),
        ("norm_maximum", r"maximum lets only positive factors through, and some in norms.0.weight are not"),
        ("two_norms", r"several norms: norms.0.weight, others.0.weight"),
        ("joined_norms", r"several norms: norms.0.weight, others.0.weight"),
    ],
)
def test_norms_that_cannot_be_folded_say_why(step: str, told: str) -> None:
    before, _ = of_steps(step)
    with pytest.raises(PassError, match=rf"no layer can be rewritten .*{told}"):
        apply_passes(before, "fold_norms")


@pytest.mark.parametrize("step", ["norm_relu", "norm_maximum"])
def test_positive_gains_go_through_what_lets_only_these_through(step: str) -> None:
    before, inputs = of_steps(step)
    before.write_tensor("norms.0.weight", before.tensor("norms.0.weight").detach().abs())
    after = apply_passes(before, "fold_norms")
    assert relative(before, after, inputs) < 1e-9
    assert bool((after.tensor("norms.0.weight") == 1).all())
    assert bool((after.tensor("norms.0.bias") != 0).any())


@settings(max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=3), st.sampled_from([*MOVED, "norm_relu", "two_norms"]))
def test_random_graphs_are_folded_or_refused_in_words(steps: list[str], last: str) -> None:
    before, inputs = of_steps(*steps, last)
    try:
        after = apply_passes(before, "fold_norms")
    except PassError as error:
        assert "no layer can be rewritten" in str(error)  # noqa: PT017
        return
    assert relative(before, after, inputs) < 1e-9
    with pytest.raises(PassError, match="no layer can be rewritten"):  # a second run has nothing left to do
        apply_passes(after, "fold_norms")


def test_masked_readers_that_are_no_targets_are_noted_as_changed() -> None:
    before = apply_passes(with_gains("qwen2"), "nm_sparsify")
    after = apply_passes(before, "fold_norms{targets=q_proj}")
    for name in ("q_proj", "k_proj", "v_proj"):
        assert after.sparse[f"model.layers.0.self_attn.{name}.weight"].changed_by == after.history[-1].text
    assert after.sparse["model.layers.0.self_attn.o_proj.weight"].changed_by is None
