"""AWQ's scales: outputs stay, rounding to few bits costs less, zeros stay zeros, and what cannot be scaled is told."""

import copy
import json
from typing import Any

import pytest
import torch
from tests.families import BY_NAME, FAMILIES, captured, tensors_of
from torch import Tensor, nn

from sparsepass.graph import PassError, Program, SparsepassError, capture
from sparsepass.graph.program import masked_weight
from sparsepass.graph.rounding import RoundingGrid, round_to_nearest
from sparsepass.passes import apply_passes
from sparsepass.passes.awq_scale import AWQScale
from sparsepass.passes.maths import EXPONENTS, InputStatistics, awq_factors, rounding_error

GRID = RoundingGrid(bits=4, group_size=16)
IN_FLOAT32 = ("mixtral", "qwen3_moe")
CASTS_TO_FLOAT32 = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", *IN_FLOAT32)
"""Families whose norms compute in float32 whatever the model's type."""


def in_float64(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in values.items()}


def scaled_layers(program: Program) -> dict[str, dict[str, Any]]:
    return {o.site: dict(o.facts) for o in program.history[-1].outcomes if o.action == "rewritten"}


def left_alone(program: Program) -> dict[str, str]:
    return {o.site: o.reason for o in program.history[-1].outcomes if o.action == "skipped"}


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_every_family_keeps_its_outputs_and_loses_less(name: str) -> None:
    family = BY_NAME[name]
    model, inputs, batch = family.model(), family.inputs(3, 8), family.inputs(4, 8)
    if name not in IN_FLOAT32:
        model, inputs, batch = model.double(), in_float64(inputs), in_float64(batch)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    before = capture(model, example_inputs=batch)
    after = apply_passes(before, AWQScale(group_size=16), calibration=batch)
    with torch.no_grad():
        pairs = list(zip(tensors_of(before(**inputs)), tensors_of(after(**inputs)), strict=True))
    error = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs if a.is_floating_point())
    assert error < (3e-6 if name in CASTS_TO_FLOAT32 else 1e-9)
    found = scaled_layers(after).values()
    assert any(known["exponent"] for known in found)
    assert sum(known["error_after"] ** 2 for known in found) < sum(known["error_before"] ** 2 for known in found)


def test_what_it_scales_on_the_shapes_that_models_have() -> None:
    """Norm -> q/k/v and gate/up, v -> o under grouped-query attention, up * gate -> down, experts, and no router."""
    program = apply_passes(captured("llama"), "awq_scale", calibration=BY_NAME["llama"].inputs(4, 8))
    searched = set(scaled_layers(program)) | {site for site, why in left_alone(program).items() if "no factors lower" in why}
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    mlp = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert searched == {f"model.layers.{layer}.{part}" for layer in range(2) for part in (*parts, *mlp)}
    program = apply_passes(captured("qwen3_moe"), "awq_scale", calibration=BY_NAME["qwen3_moe"].inputs(4, 8))
    assert "model.layers.0.mlp.experts.down_proj" in scaled_layers(program)
    assert "model.layers.0.mlp.gate" not in scaled_layers(program)
    router = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(program.tensor(router), captured("qwen3_moe").tensor(router)), "it takes up what its norm lost"


def test_query_heads_that_share_a_value_head_share_its_factors() -> None:
    before = captured("llama")  # 4 query heads, 2 value heads of 8 channels
    after = apply_passes(before, "awq_scale{targets=o_proj,group_size=16}", calibration=BY_NAME["llama"].inputs(4, 8))
    assert set(scaled_layers(after)) == {f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)}
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn"
        made, read = (
            after.tensor(f"{path}.{name}.weight").double() / before.tensor(f"{path}.{name}.weight").double()
            for name in ("v_proj", "o_proj")
        )
        factors = made[:, 0]
        assert len(factors.unique()) > 8
        assert torch.allclose(made, factors[:, None].expand_as(made), rtol=1e-5)
        assert torch.allclose(read, 1 / factors.reshape(2, 1, 8).expand(2, 2, 8).reshape(1, -1).expand_as(read), rtol=1e-5)


class Planted(nn.Module):
    """A pre-norm block with one input channel that is far larger than the others, as large language models have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.norm.weight.data[5] = 60.0
        self.up, self.down, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.down(torch.relu(self.up(self.norm(x)))))  # type: ignore[no-any-return]


def planted() -> tuple[Planted, Tensor]:
    torch.manual_seed(0)
    return Planted().eval(), torch.randn(32, 16, 64)


def output_error(program: Program, name: str, activations: Tensor) -> float:
    """The error of a layer's output when its weight is rounded, from the definition."""
    weight = masked_weight(program, f"{name}.weight").double()
    rounded = round_to_nearest(weight.float(), RoundingGrid()).weight_OI.double()
    return float(((activations @ (rounded - weight).T).square().sum() / (activations @ weight.T).square().sum()).sqrt())


def test_an_outlier_channel_costs_much_less() -> None:
    net, x = planted()
    before = capture(net, x[:2])
    after = apply_passes(before, "awq_scale{targets=up}", calibration=[(x,)])  # without down, which would scale the rows of up
    found = scaled_layers(after)["up"]
    assert found["error_after"] < 0.4 * found["error_before"]
    # What is reported is what a forward pass shows.
    for program, key in ((before, "error_before"), (after, "error_after")):
        norm = nn.functional.layer_norm(x, (64,), program.tensor("norm.weight"), program.tensor("norm.bias")).double()
        assert output_error(program, "up", norm.detach()) == pytest.approx(found[key], rel=1e-3)


def test_it_takes_the_best_of_all_exponents() -> None:
    net, x = planted()
    program = apply_passes(net, "awq_scale{targets=up}", calibration=[(x,)], example_inputs=x[:2])
    inputs = net.norm(x).detach().reshape(-1, 64)
    weight = net.up.weight.detach()
    errors = {}
    for exponent in EXPONENTS:
        factors = awq_factors(inputs.square().mean(0).sqrt(), exponent)
        rounded = round_to_nearest(weight * factors, RoundingGrid()).weight_OI / factors
        errors[exponent] = float((inputs @ (rounded - weight).T).square().sum())
    assert scaled_layers(program)["up"]["exponent"] == min(errors, key=lambda one: errors[one])


def test_nothing_is_applied_that_lowers_no_error() -> None:
    """Weights that lie on the grid already cannot lose less than nothing."""
    net, x = planted()
    net.up.weight.data = torch.randint(-6, 8, (64, 64)).float()
    net.up.weight.data[:, 0] = 7
    program = apply_passes(net, "awq_scale{targets=up}", calibration=[(x,)], example_inputs=x[:2])
    assert left_alone(program)["up"].startswith("no factors lower the error that rounding makes, which is 0")
    assert not scaled_layers(program)
    program = apply_passes(net, "awq_scale", calibration=[(x,)], example_inputs=x[:2])
    assert left_alone(program)["up"].startswith("no factors lower")
    assert scaled_layers(program)["down"]["error_after"] < scaled_layers(program)["down"]["error_before"]
    assert torch.equal(program.tensor("norm.weight"), net.norm.weight)


@pytest.mark.parametrize(
    "passes", ["nm_sparsify", "nm_sparsify{criterion=wanda},slorb{k=4,projection=trainable}", "nm_sparsify,fold"]
)
def test_zeros_stay_zeros(passes: str) -> None:
    batch = BY_NAME["qwen2"].inputs(4, 8)
    before = apply_passes(captured("qwen2"), passes, calibration=batch)
    after = apply_passes(before, "awq_scale{group_size=16}", calibration=batch)
    assert any(known["exponent"] for known in scaled_layers(after).values())
    for weight, state in before.sparse.items():
        assert torch.equal(masked_weight(after, weight) == 0, masked_weight(before, weight) == 0)
        rounded = round_to_nearest(masked_weight(after, weight), GRID).weight_OI
        assert not bool(rounded[masked_weight(before, weight) == 0].any())
        if state.mask is not None:
            assert torch.equal(before.tensor(state.mask), after.tensor(state.mask))
    inputs = BY_NAME["qwen2"].inputs(3, 7)
    with torch.no_grad():
        torch.testing.assert_close(after(**inputs).logits, before(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_fixed_projection_takes_no_factors() -> None:
    """A branch that sums blocks of the input would see other sums."""
    program = apply_passes(
        captured("qwen2"), "nm_sparsify,slorb{k=4,targets=down_proj}", calibration=BY_NAME["qwen2"].inputs(4, 8)
    )
    skipped = left_alone(apply_passes(program, "awq_scale", calibration=BY_NAME["qwen2"].inputs(4, 8)))
    assert "sum runs over channels" in skipped["model.layers.0.mlp.down_proj"]
    assert "sum runs" not in skipped.get("model.layers.0.mlp.up_proj", "")


def test_a_masked_layer_that_only_makes_channels_is_noted_as_changed() -> None:
    batch = BY_NAME["qwen2"].inputs(4, 8)
    before = apply_passes(captured("qwen2"), "nm_sparsify")
    after = apply_passes(before, "awq_scale{targets=down_proj}", calibration=batch)
    assert after.sparse["model.layers.0.mlp.up_proj.weight"].changed_by == after.history[-1].text
    assert after.sparse["model.layers.0.mlp.gate_proj.weight"].changed_by is None


def test_what_cannot_be_scaled_is_told() -> None:
    bert = left_alone(apply_passes(captured("bert"), "awq_scale", calibration=BY_NAME["bert"].inputs(4, 8)))
    assert "LayerNorm" in bert["encoder.layer.0.attention.self.query"]
    assert bert["encoder.layer.0.output.dense"]
    convnet = left_alone(apply_passes(captured("convnet"), "awq_scale", calibration=BY_NAME["convnet"].inputs(4, 8)))
    assert convnet["stem"] == "it reads an input of the model"
    assert "16 groups" in convnet["depthwise"]
    item = AWQScale(ignore=("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"))
    llama = left_alone(apply_passes(captured("llama"), item, calibration=BY_NAME["llama"].inputs(4, 8)))
    assert llama["model.layers.0.self_attn.q_proj"].startswith(
        "model.layers.0.self_attn.k_proj makes or reads the same channels"
    )
    assert llama["model.layers.0.mlp.down_proj"].startswith("model.layers.0.mlp.up_proj makes or reads the same channels")


def test_the_reason_is_that_of_the_input_and_not_of_the_output() -> None:
    chosen, skipped = AWQScale().choose(captured("whisper"))
    assert "model.decoder.layers.0.encoder_attn.q_proj" in {site.name for site in chosen}
    assert skipped["model.encoder.conv1"] == "it reads an input of the model"  # and a GELU reads what it makes
    assert skipped["model.encoder.conv2"] == "what it reads is not made by weights that could take a change up"


def test_a_second_run_is_refused() -> None:
    batch = BY_NAME["llama"].inputs(4, 8)
    program = apply_passes(captured("llama"), "awq_scale", calibration=batch)
    with pytest.raises(PassError, match="an earlier awq_scale has searched its factors"):
        apply_passes(program, "awq_scale{bits=8}", calibration=batch)
    fused = apply_passes(program, "fuse_siblings")
    with pytest.raises(PassError, match="an earlier awq_scale has searched its factors"):
        apply_passes(fused, "awq_scale{bits=8}", calibration=batch)


@pytest.mark.parametrize(("options", "told"), [("bits=3", "8 or 4 bits"), ("group_size=-1", "whole row")])
def test_options_that_no_grid_has(options: str, told: str) -> None:
    with pytest.raises(SparsepassError, match=told):
        apply_passes(captured("llama"), f"awq_scale{{{options}}}", calibration=BY_NAME["llama"].inputs(4, 8))


def test_pruning_behind_it_sees_the_scaled_model() -> None:
    batch = BY_NAME["llama"].inputs(4, 8)
    alone = apply_passes(captured("llama"), "awq_scale", calibration=batch, compute="float32")
    both = apply_passes(captured("llama"), "awq_scale,nm_sparsify{criterion=wanda}", calibration=batch, compute="float32")
    weight = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(alone.tensor(weight), both.tensor(weight))
    plain = apply_passes(captured("llama"), "nm_sparsify{criterion=wanda}", calibration=batch, compute="float32")
    mask, its = both.sparse[weight].mask, plain.sparse[weight].mask
    assert mask is not None
    assert its is not None
    assert float((both.tensor(mask) == plain.tensor(its)).float().mean()) > 0.999, "Wanda's masks do not change under factors"


def test_the_model_is_not_changed() -> None:
    net, x = planted()
    before = copy.deepcopy(net.state_dict())
    apply_passes(net, "awq_scale", calibration=[(x,)], example_inputs=x[:2])
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_experts_count_by_their_own_tokens() -> None:
    torch.manual_seed(0)
    weight, factors = torch.randn(2, 4, 8), torch.rand(2, 1, 8) + 0.5
    inputs = [torch.randn(5, 8), torch.randn(0, 8)]
    statistics = [InputStatistics.zeros(8, gram=True) for _ in range(2)]
    for known, x in zip(statistics, inputs, strict=True):
        known.update(x)
    rounded = round_to_nearest(weight * factors, GRID).weight_OI / factors
    expected = float((inputs[0] @ (rounded - weight)[0].T).square().sum())
    assert rounding_error(weight, factors, statistics, GRID) == pytest.approx(expected, rel=1e-4)


def test_what_it_found_can_be_saved() -> None:
    program = apply_passes(captured("llama"), "awq_scale", calibration=BY_NAME["llama"].inputs(4, 8))
    assert json.dumps([dict(outcome.facts) for outcome in program.history[-1].outcomes])
