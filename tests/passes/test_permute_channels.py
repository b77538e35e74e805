"""Permuting channels: outputs stay, the kept score never falls, and what cannot move has a reason."""

import copy

import pytest
import torch
from tests.families import BY_NAME, FAMILIES, captured, tensors_of
from tests.graph.channels.test_flow import CASTS_TO_FLOAT32, family_program
from tests.graph.channels.trying import distance
from torch import Tensor, nn

from sparsepass.graph import PassError, Program, Site, SparsepassError, capture
from sparsepass.graph.channels import channel_flow
from sparsepass.passes import PermuteChannels, apply_passes
from sparsepass.passes.criteria import CRITERIA
from sparsepass.passes.data import calibration_batches
from sparsepass.passes.engine import SiteGroup, site_groups, sweep
from sparsepass.passes.maths import InputStatistics, NMPattern, kept_score

NAMES = [family.name for family in FAMILIES]
MOVED = {
    "llama": 14, "mistral": 14, "qwen2": 14, "qwen3": 14, "gemma3": 14, "phi3": 8, "gpt2": 8, "opt": 12, "gpt_neox": 8,
    "mixtral": 12, "qwen3_moe": 12, "bert": 4, "vit": 12, "whisper": 21, "t5": 10, "convnet": 2,
}  # fmt: skip
"""Family -> how many layers get a better order: a guard against refusing more."""


def kept(program: Program, site: Site) -> float:
    """The share of a layer's magnitude that 2:4 keeps."""
    matrix = site.to_matrix(program.tensor(site.weight).detach()).abs().flatten(0, -2)
    return kept_score(matrix.T, NMPattern(2, 4)) / float(matrix.double().sum())


def assert_no_group_loses(before: Program, after: Program, item: PermuteChannels) -> None:
    """Layers that read the same channels keep at least as much together, and somewhere more."""
    facts = {outcome.site: outcome.facts for outcome in after.history[0].outcomes if outcome.facts}
    shares = []
    for group in item.groups(before, item.choose(before)[0]):
        moved = [facts[site.name] for site in group.sites if site.name in facts]
        shares.append([sum(float(its[key]) for its in moved) for key in ("kept_before", "kept_after")])
    assert all(new >= old for old, new in shares)
    assert any(new > old for old, new in shares)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["assignment", "greedy"])
def test_every_family_keeps_its_outputs_and_more_score(name: str, method: str) -> None:
    before, inputs = family_program(name)
    after = apply_passes(before, f"permute_channels{{method={method}}}")
    with torch.no_grad():
        expected, found = (tensors_of(program(**inputs)) for program in (before, after))
    assert distance(expected, found) < (3e-6 if name in CASTS_TO_FLOAT32 else 1e-9)
    done = {outcome.site: outcome.facts for outcome in after.history[0].outcomes if outcome.action == "rewritten"}
    if method == "assignment":
        assert len(done) == MOVED[name]
    sites = {site.name: site for site in before.sites()}
    shares = [(kept(before, sites[site]), kept(after, sites[site])) for site in done]
    assert sum(new for _, new in shares) > sum(old for old, _ in shares)
    assert_no_group_loses(before, after, PermuteChannels(criterion="magnitude"))
    for facts, (old, new) in zip(done.values(), shares, strict=True):
        assert facts["kept_before"] == pytest.approx(old, abs=1e-6)
        assert facts["kept_after"] == pytest.approx(new, abs=1e-6)


@pytest.mark.parametrize("criterion", ["wanda", "ria"])
@pytest.mark.parametrize("name", NAMES)
def test_calibrated_criteria_in_float32(name: str, criterion: str) -> None:
    family = BY_NAME[name]
    before = captured(name)
    after = apply_passes(
        before, ["permute_channels{criterion=" + criterion + "}", f"nm_sparsify{{criterion={criterion}}}"],
        calibration=family.inputs(4, 8), compute="float32",
    )  # fmt: skip
    validation = after.history[0].validation
    assert validation is not None
    assert validation["relative_error"] <= 1e-5
    assert after.history[0].calibration is not None
    assert after.recipe.startswith(f"permute_channels{{pattern=2:4,criterion={criterion},method=assignment}},nm_sparsify{{")
    for outcome in after.history[0].outcomes:
        assert outcome.reason or outcome.facts
    assert_no_group_loses(before, after, PermuteChannels(criterion=criterion))


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "ria"])
def test_the_mask_keeps_what_was_promised(criterion: str) -> None:
    """nm_sparsify after the pass keeps the score that it reported, and more than without it."""
    inputs = BY_NAME["llama"].inputs(6, 16)
    permuted = apply_passes(
        captured("llama"), f"permute_channels{{criterion={criterion}}}", calibration=inputs, compute="float32"
    )
    facts = {outcome.site: outcome.facts for outcome in permuted.history[0].outcomes if outcome.facts}
    totals = dict.fromkeys(("kept_before", "kept_after"), 0.0)
    for program, key in ((captured("llama"), "kept_before"), (permuted, "kept_after")):
        gathered = _statistics(program, inputs)
        for site in program.sites():
            if site.name in facts:
                score = CRITERIA[criterion].score
                assert score is not None
                found = score(program.tensor(site.weight).detach(), gathered[site.weight])
                share = kept_score(found.T, NMPattern(2, 4)) / float(found.double().sum())
                assert share == pytest.approx(facts[site.name][key], abs=2e-6), site.name
                totals[key] += share
    assert totals["kept_after"] > totals["kept_before"]


def _statistics(program: Program, inputs: dict[str, Tensor]) -> dict[str, InputStatistics]:
    batches = list(calibration_batches(inputs, input_names=program.input_names).batches())
    found: dict[str, InputStatistics] = {}

    def keep(group: SiteGroup, statistics: tuple[InputStatistics, ...]) -> None:
        found.update({site.weight: statistics[0] for site in group.sites})

    groups = site_groups([site for site in program.sites() if site.left_alone is None])
    sweep(program, batches, groups, keep, gram=False, compute="float32")
    return found


def test_masks_are_refused_before_anything_changes() -> None:
    masked = apply_passes(captured("llama"), "nm_sparsify{targets=*.mlp.*}")
    for text in ("permute_channels", "permute_channels{targets=*.self_attn.*}"):  # channels of other layers would move, too
        with pytest.raises(PassError, match="destroy the N:M pattern: layers have masks already; start from the dense model"):
            apply_passes(masked, text)
    with pytest.raises(PassError, match="would destroy the N:M pattern: masks have been folded already"):
        apply_passes(apply_passes(masked, "fold"), "permute_channels")
    with pytest.raises(PassError, match="nm_sparsify makes masks; put permute_channels before nm_sparsify"):
        apply_passes(captured("llama"), ["nm_sparsify", "permute_channels"])


def test_a_tied_embedding_moves_with_the_residual_stream() -> None:
    before = captured("llama")
    after = apply_passes(before, "permute_channels")
    assert before.aliases == after.aliases
    assert not torch.equal(before.tensor("model.embed_tokens.weight"), after.tensor("model.embed_tokens.weight"))
    assert after.tensor("lm_head.weight") is after.tensor("model.embed_tokens.weight")
    assert "tied to the embedding" in after.report().skipped()["model.embed_tokens"]


def test_experts_move_within_themselves() -> None:
    program = captured("mixtral")
    down = "model.layers.0.mlp.experts.down_proj"
    after = apply_passes(program, PermuteChannels(targets=(down,)))
    (done,) = [outcome for outcome in after.history[0].outcomes if outcome.action == "rewritten"]
    assert done.weight == down
    for old_OI, new_OI in zip(program.tensor(down), after.tensor(down), strict=True):
        assert torch.equal(old_OI.sort(-1).values, new_OI.sort(-1).values)
        assert not torch.equal(old_OI, new_OI)
    router = "model.layers.0.mlp.gate.weight"
    assert torch.equal(program.tensor(router), after.tensor(router))


def test_heads_keep_their_channels() -> None:
    program = captured("llama")
    after = apply_passes(program, PermuteChannels(targets=("o_proj",)))
    name = "model.layers.0.self_attn.v_proj.weight"
    for old, new in zip(program.tensor(name).split(8), after.tensor(name).split(8), strict=True):
        assert torch.equal(old.sort(0).values, new.sort(0).values)


def test_reasons() -> None:
    skipped = apply_passes(family_program("bert")[0], "permute_channels").report().skipped()
    assert skipped["encoder.layer.0.attention.self.query"] == "it is an output of the model"
    assert "embedding" in skipped["embeddings.word_embeddings"]
    with pytest.raises(PassError, match="8 channels that may change places do not fill whole groups of 16"):
        apply_passes(captured("llama"), "permute_channels{pattern=8:16,targets=o_proj}")
    with pytest.raises(PassError, match=r"down_proj makes or reads the same channels and is to be ignored"):
        apply_passes(captured("llama"), "permute_channels{targets=*.layers.0.mlp.*,ignore=down_proj}")


def test_why_a_layer_is_not_sparse_is_what_the_pass_that_makes_masks_says() -> None:
    program = apply_passes(captured("bert"), ["permute_channels", "nm_sparsify{criterion=magnitude,ignore=query}"])
    skipped = program.report().skipped()
    assert skipped["encoder.layer.0.attention.self.query"] == "ignored by 'query'"


class Best(nn.Module):
    """Weights that no order improves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        nn.init.ones_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))  # type: ignore[no-any-return]


def test_an_order_that_is_no_better_is_not_taken() -> None:
    program = capture(Best(), torch.randn(2, 4))
    after = apply_passes(program, "permute_channels,nm_sparsify{criterion=magnitude}")
    assert all(torch.equal(tensor, after.tensor(name)) for name, tensor in program.tensors().items())
    reasons = {outcome.site: outcome.reason for outcome in after.history[0].outcomes}
    assert reasons["second"] == "no order was found that keeps more than its own, which keeps 50.00%"
    assert after.history[0].num_rewritten == 0


def test_the_model_is_not_changed() -> None:
    model = BY_NAME["llama"].model()
    before = copy.deepcopy(model.state_dict())
    program = apply_passes(model, ["permute_channels", "nm_sparsify"])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    inputs = BY_NAME["llama"].inputs(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(program.to_model()(**inputs).logits, program(**inputs).logits)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("permute_channels{criterion=sparsegpt}", "has no score"),
        ("permute_channels{criterion=wander}", "unknown criterion 'wander'; did you mean 'wanda'"),
        ("permute_channels{method=best}", "known: 'assignment', 'greedy'"),
        ("permute_channels{pattern=4:4}", "keep every weight"),
        ("permute_channels{criterion=wanda}", "needs calibration data"),
        ("permute_channels{pattern=2:5}", "not a multiple of 5"),
    ],
)
def test_options_that_cannot_be(text: str, told: str) -> None:
    with pytest.raises(SparsepassError) as error:
        apply_passes(captured("llama"), text)
    assert told in str(error.value)


def test_criterion_by_default() -> None:
    assert PermuteChannels().resolve(has_calibration=True).criterion == "ria"
    assert PermuteChannels().resolve(has_calibration=False).criterion == "magnitude"


def test_groups_of_whole_models_are_found_from_the_graph() -> None:
    """Layers of the residual stream are one group, whose order is found once."""
    program = captured("llama")
    item = PermuteChannels(criterion="magnitude")
    groups = item.groups(program, item.choose(program)[0])
    assert sorted(len(group.sites) for group in groups) == [1, 1, 1, 1, 10]
    assert len(channel_flow(program).permutations) == 7
