"""The calibration sweep against a slow reference: run the whole program again before each group."""

import copy
from typing import Any

import pytest
import torch
from tests.families import BY_NAME, captured
from torch import Tensor, fx, nn

from sparsepass.graph import PassError, Program, capture
from sparsepass.graph.rewrite import attach_mask, finish
from sparsepass.passes import NMSparsify, apply_passes
from sparsepass.passes.criteria.table import CRITERIA, CriterionOptions
from sparsepass.passes.engine import site_groups
from sparsepass.passes.maths.pattern import NMPattern
from sparsepass.passes.maths.statistics import InputStatistics

PATTERN = NMPattern.parse("2:4")


class _Inputs(fx.Interpreter):
    """Records what a node is given."""

    def __init__(self, module: fx.GraphModule, node: str) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.wanted, self.seen = node, []  # type: ignore[var-annotated]

    def run_node(self, n: fx.Node) -> Any:
        if n.name == self.wanted:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self.seen.append(args[1] if n.target is torch.ops.aten.addmm.default else args[0])
        return super().run_node(n)


def _reference(program: Program, batches: list[dict[str, Tensor]], criterion: str) -> Program:
    """True-sequential pruning by the definition: one full forward of the current program for every group."""
    row = CRITERIA[criterion]
    chosen, _ = NMSparsify(criterion=criterion).choose(program)
    for group in site_groups(chosen):
        statistics = InputStatistics.zeros(group.sites[0].in_features, gram=row.needs == "gram")
        for batch in batches:
            recorder = _Inputs(program.graph_module, group.sites[0].nodes[0])
            recorder.run(*program.flat_inputs(**batch).values())
            (x,) = recorder.seen
            statistics.update(x.reshape(-1, x.shape[-1]))
        for site in group.sites:
            weight = program.tensor(site.weight).detach()
            pruned = row.function(site.to_matrix(weight), statistics, PATTERN, CriterionOptions())
            mask = site.from_matrix(pruned.mask_OI)
            program.set_tensor(site.weight, torch.where(mask, site.from_matrix(pruned.weight_OI), weight))
            attach_mask(program, site, mask, "2:4")
        finish(program)
    return program


@pytest.mark.parametrize("criterion", ["wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_sweep_equals_a_full_forward_for_every_group(family: str, criterion: str) -> None:
    batches = [BY_NAME[family].inputs(2, 24), BY_NAME[family].inputs(3, 17)]
    with torch.no_grad():
        expected = _reference(captured(family), batches, criterion)
        found = apply_passes(
            captured(family),
            [f"nm_sparsify{{criterion={criterion}}}"],
            calibration=batches,
            compute="float32",
            validate=False,
        )
    assert found.sparse.keys() == expected.sparse.keys()
    for weight, state in found.sparse.items():
        assert state.mask is not None
        same = (found.tensor(state.mask) == expected.tensor(state.mask)).float().mean()
        assert same > 0.999, weight  # fp32 sums in another order may turn a near-tie
        torch.testing.assert_close(found.tensor(weight), expected.tensor(weight), rtol=1e-3, atol=1e-4)


def test_batching_changes_nothing_but_rounding() -> None:
    ids = BY_NAME["llama"].inputs(6, 16)
    one = apply_passes(captured("llama"), "nm_sparsify{criterion=sparsegpt}", calibration=ids, batch_size=1, compute="float32")
    all_at_once = apply_passes(
        captured("llama"), "nm_sparsify{criterion=sparsegpt}", calibration=ids, batch_size=6, compute="float32"
    )
    for weight in one.sparse:
        torch.testing.assert_close(one.tensor(weight), all_at_once.tensor(weight), rtol=1e-3, atol=1e-4)


def test_bf16_compute_keeps_weights_in_fp32_and_stays_near() -> None:
    ids = BY_NAME["llama"].inputs(4, 16)
    low = apply_passes(captured("llama"), "nm_sparsify{criterion=sparsegpt}", calibration=ids, compute="bfloat16")
    full = apply_passes(captured("llama"), "nm_sparsify{criterion=sparsegpt}", calibration=ids, compute="float32")
    errors = []
    for program in (low, full):
        assert all(program.tensor(weight).dtype is torch.float32 for weight in program.sparse)
        assert program.history[0].validation is not None
        errors.append(program.history[0].validation["relative_error"])
    assert errors[0] < 1.25 * errors[1]  # random tiny weights are full of near-ties, so masks may differ; quality may not


def test_padding_takes_no_part() -> None:
    ids = BY_NAME["llama"].inputs(2, 12)["input_ids"]
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones(2, 12), torch.zeros(2, 5)], dim=1).long()
    plain = apply_passes(captured("llama"), "nm_sparsify{criterion=wanda}", calibration={"input_ids": ids}, compute="float32")
    with_padding = apply_passes(
        captured("llama"),
        "nm_sparsify{criterion=wanda}",
        calibration={"input_ids": padded, "attention_mask": mask},
        compute="float32",
    )
    tokens = {o.facts["tokens"] for o in with_padding.history[0].outcomes if o.action == "rewritten"}
    assert tokens == {24}
    for weight, state in plain.sparse.items():
        assert state.mask is not None
        assert torch.equal(plain.tensor(state.mask), with_padding.tensor(state.mask)), weight


def test_experts_are_pruned_by_the_tokens_routed_to_them() -> None:
    batches = [BY_NAME["mixtral"].inputs(4, 16)]
    found = apply_passes(captured("mixtral"), "nm_sparsify{criterion=wanda}", calibration=batches, compute="float32")
    experts = [o for o in found.history[0].outcomes if "experts" in o.site]
    assert experts
    for outcome in experts:
        assert outcome.facts["tokens"] == 4 * 16 * 2  # every token goes to two experts


def test_a_convolution_is_calibrated_on_its_patches() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net, images = Net().eval(), torch.randn(5, 4, 9, 9)
    program = apply_passes(
        net, "nm_sparsify{criterion=sparsegpt}", calibration={"x": images}, example_inputs=images[:2], compute="float32"
    )
    # The same layer as a matmul over unfolded patches, channels innermost.
    patches = torch.nn.functional.unfold(images, 3, stride=2, padding=1)
    x_TI = patches.reshape(5, 4, 9, -1).permute(0, 3, 2, 1).reshape(-1, 36)
    statistics = InputStatistics.zeros(36, gram=True)
    statistics.update(x_TI)
    weight_OI = net.conv.weight.detach().movedim(1, -1).reshape(6, 36)
    expected = CRITERIA["sparsegpt"].function(weight_OI, statistics, PATTERN, CriterionOptions())
    folded = torch.ops.sparsepass.masked_weight(program.tensor("conv.weight"), program.tensor("conv.mask"))
    torch.testing.assert_close(folded.movedim(1, -1).reshape(6, 36), expected.weight_OI, rtol=1e-3, atol=1e-4)


def test_a_weight_used_twice_is_rewritten_once_with_both_inputs() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    program = apply_passes(
        captured("convnet"),
        ["nm_sparsify{criterion=wanda}", "slorb{k=4}"],
        calibration={"images": images},
        compute="float32",
    )
    (mix,) = [o for o in program.history[0].outcomes if o.site == "mix"]
    assert mix.facts["tokens"] == 8  # four images, two uses
    assert program.sparse["mix.weight"].branch is not None
    assert torch.isfinite(program(images=images)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_activations_name_the_layer(bad: float) -> None:
    model = BY_NAME["llama"].model()
    with torch.no_grad():
        model.get_parameter("model.norm.weight")
        model.get_parameter("model.layers.1.input_layernorm.weight")[3] = bad
    program = capture(model, BY_NAME["llama"].inputs(2, 8))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PassError, match=r"model\.layers\.1\.self_attn\.q_proj"):
        apply_passes(program, "nm_sparsify{criterion=wanda}", calibration=BY_NAME["llama"].inputs(2, 8), validate=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) or torch.isnan(tensor).any()


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_every_criterion_runs_from_text_on_siblings_and_experts(criterion: str) -> None:
    batches = BY_NAME["mixtral"].inputs(4, 16)
    text = f"nm_sparsify{{criterion={criterion},pattern=1:4}}"
    program = apply_passes(captured("mixtral"), text, calibration=batches, compute="float32", validate=False)
    assert f"criterion={criterion}" in program.history[0].text
    assert any(outcome.site.endswith("q_proj") for outcome in program.history[0].outcomes)
    for weight, state in program.sparse.items():
        assert state.mask is not None
        mask = program.tensor(state.mask)
        assert bool((mask.unflatten(-1, (-1, 4)).sum(-1) == 1).all()), weight
