"""Rotating channels: outputs stay, what weights count is concentrated, the form says what the program looks like."""

import copy
from typing import Any

import pytest
import torch
from tests.families import BY_NAME, FAMILIES, captured, tensors_of
from tests.graph.channels.test_flow import CASTS_TO_FLOAT32, family_program
from tests.graph.channels.trying import distance
from torch import nn
from transformers import PreTrainedModel

from sparsepass.graph import CaptureError, PassError, Program, SparsepassError, capture
from sparsepass.graph.channels import channel_flow
from sparsepass.graph.sites import BETWEEN_BLOCKS
from sparsepass.passes import Rotate, apply_passes

NAMES = [family.name for family in FAMILIES if family.name != "convnet"]
CHAINS = ("llama", "gpt2", "opt", "mixtral", "vit", "phi3")
POST_NORM = ("gemma3",)
"""Families whose gains stand behind layers, where no reader can take them up."""


def with_gains(name: str) -> Program:
    """A tiny model, in float32, whose norms have gains that differ from channel to channel."""
    program = captured(name)
    for tensor_name, tensor in program.tensors().items():
        if tensor.dim() == 1 and isinstance(tensor, nn.Parameter):
            program.write_tensor(tensor_name, tensor.detach() + 0.3 * torch.randn_like(tensor))
    return program


def entropies(program: Program) -> tuple[float, float]:
    """Sums over the layers that say so, before and after."""
    facts = [outcome.facts for outcome in program.history[0].outcomes if outcome.facts]
    before, after = (sum(float(each[key]) for each in facts) for key in ("entropy_before", "entropy_after"))
    return before, after


@pytest.mark.parametrize("name", NAMES)
def test_every_family_keeps_its_outputs(name: str) -> None:
    before, inputs = family_program(name)
    calibration = {key: value.to(before.example_inputs[key].dtype) for key, value in BY_NAME[name].inputs(4, 8).items()}
    after = apply_passes(before, "rotate{steps=4}", calibration=calibration)
    with torch.no_grad():
        expected, found = (tensors_of(program(**inputs)) for program in (before, after))
    assert distance(expected, found) < (6e-6 if name in CASTS_TO_FLOAT32 else 1e-9)
    start, end = entropies(after)
    assert end < start


@pytest.mark.parametrize("name", CHAINS)
def test_one_rotation_a_block(name: str) -> None:
    before = with_gains(name)
    after = apply_passes(before, "rotate{steps=4,form=blocks}", calibration=BY_NAME[name].inputs(4, 8), compute="float32")
    inputs = BY_NAME[name].inputs(3, 7)
    with torch.no_grad():
        expected, found = (tensors_of(program(**inputs)) for program in (before, after))
    assert distance(expected, found) < 1e-5
    (matrix,) = [name for name in after.tensors() if name.endswith(BETWEEN_BLOCKS)]
    values = after.tensor(matrix).detach().double()
    torch.testing.assert_close(values @ values.T, torch.eye(len(values), dtype=torch.float64), rtol=0, atol=1e-5)
    assert not torch.allclose(values, torch.eye(len(values), dtype=torch.float64), atol=1e-3)
    with pytest.raises(
        CaptureError, match="the model's own class has no place; call the program itself, or rotate with form=mod"
    ):
        after.to_model()


def test_matrices_between_blocks_stay_dense_and_belong_to_no_block() -> None:
    pruned = apply_passes(
        with_gains("llama"),
        "rotate{steps=2,form=blocks},nm_sparsify{criterion=sparsegpt}",
        calibration=BY_NAME["llama"].inputs(4, 8),
    )
    assert pruned.report().num_sparse == 14
    assert "rotation between two blocks" in pruned.report().skipped()["model.layers.1.rotation_between_blocks"]
    inputs = BY_NAME["llama"].inputs(2, 8)
    with torch.no_grad():
        hierarchy = pruned.hierarchy()
        assert torch.equal(hierarchy(**inputs).logits, pruned(**inputs).logits)
    assert any(name.endswith("layers.1.self_attn.q_proj") for name, _ in hierarchy.named_modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_tied_head_gets_a_weight_of_its_own(name: str) -> None:
    before = with_gains(name)
    (tied,) = before.aliases
    calibration = BY_NAME[name].inputs(4, 8)
    after = apply_passes(before, "rotate{steps=3}", calibration=calibration, compute="float32")
    assert before.aliases.keys() == {tied}
    assert not after.aliases
    assert not torch.equal(after.tensor("lm_head.weight"), after.tensor(before.aliases[tied]))
    inputs = BY_NAME[name].inputs(2, 8)
    model = after.to_model()
    assert isinstance(model, PreTrainedModel)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, after(**inputs).logits)
    assert model.config.tie_word_embeddings is False


def test_even_gains_leave_the_head_tied() -> None:
    after = apply_passes(captured("llama"), "rotate{steps=3}", calibration=BY_NAME["llama"].inputs(4, 8))
    assert after.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_matrix_for_the_stream_and_one_for_each_key_value_head() -> None:
    """All that is rotated is rotated by these: weights hold what they held, in another basis."""
    before = captured("llama")
    after = apply_passes(before, "rotate{steps=5}", calibration=BY_NAME["llama"].inputs(4, 8))
    assert sorted(group.num_channels for group in channel_flow(before).rotations) == [8, 8, 8, 8, 32]
    up = "model.layers.0.mlp.up_proj.weight"
    stream = torch.linalg.lstsq(before.tensor(up).double(), after.tensor(up).double()).solution.detach()
    for name in ("model.layers.1.mlp.gate_proj.weight", "model.embed_tokens.weight"):
        torch.testing.assert_close(before.tensor(name).double() @ stream, after.tensor(name).double(), rtol=0, atol=1e-5)
    name = "model.layers.0.self_attn.v_proj.weight"
    for old, new in zip((before.tensor(name).double() @ stream).split(8), after.tensor(name).double().split(8), strict=True):
        torch.testing.assert_close(old.T @ old, new.T @ new, rtol=0, atol=1e-5)  # rows of a head are mixed among themselves


def test_the_seed_decides() -> None:
    def embedding(seed: int) -> torch.Tensor:
        item = Rotate(steps=3, layers_per_step=2, seed=seed)
        return apply_passes(captured("qwen2"), item, calibration=BY_NAME["qwen2"].inputs(4, 8)).tensor(
            "model.embed_tokens.weight"
        )

    assert torch.equal(embedding(0), embedding(0))
    assert not torch.equal(embedding(0), embedding(1))


def test_statistics_are_those_behind_a_folded_gain() -> None:
    """Folding first, in a pass of its own, leads to the same learning."""
    calibration = BY_NAME["qwen2"].inputs(4, 8)
    program = with_gains("qwen2")
    both = apply_passes(program, "fold_norms,rotate{steps=1}", calibration=calibration, compute="float32")
    again = apply_passes(program, "rotate{steps=1}", calibration=calibration, compute="float32")
    assert both.history[1].num_rewritten == again.history[0].num_rewritten == 14
    for one, other in zip(both.history[1].outcomes, again.history[0].outcomes, strict=True):
        if one.facts:
            assert one.facts["entropy_before"] == pytest.approx(other.facts["entropy_before"], rel=1e-3)


@pytest.mark.parametrize("salience", ["sparsegpt", "wanda"])
def test_both_saliences(salience: str) -> None:
    after = apply_passes(captured("llama"), f"rotate{{steps=5,salience={salience}}}", calibration=BY_NAME["llama"].inputs(4, 8))
    assert after.history[0].num_rewritten == 14
    start, end = entropies(after)
    assert end < start


def test_reasons() -> None:
    calibration = BY_NAME["gemma3"].inputs(4, 8)
    gemma = apply_passes(with_gains("gemma3"), "rotate{steps=2}", calibration=calibration)
    reason = gemma.report().skipped()["model.layers.0.mlp.down_proj"]
    assert reason == (
        "model.layers.0.post_attention_layernorm.weight holds another number for each channel, and cannot be folded into what "
        "reads it"
    )
    assert gemma.aliases, "nothing would be gained by untying"
    with pytest.raises(PassError, match=r"its residual stream cannot be rotated: .*post_attention_layernorm.*; use form=model"):
        apply_passes(with_gains("gemma3"), "rotate{form=blocks}", calibration=calibration)
    bert = apply_passes(captured("bert"), "rotate{steps=2}", calibration=BY_NAME["bert"].inputs(4, 8)).report().skipped()
    assert bert["encoder.layer.0.intermediate.dense"] == "it is an output of the model"
    for name in ("bert", "whisper", "t5"):
        with pytest.raises(PassError, match="are no single chain with a residual stream that can be rotated; use form=model"):
            apply_passes(captured(name), "rotate{form=blocks}", calibration=BY_NAME[name].inputs(4, 8))


def test_what_cannot_be_concentrated_stays() -> None:
    """Rows and columns of a single weight."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    for layer in (net[0], net[1]):
        assert isinstance(layer, nn.Linear)
        layer.weight.data.copy_(torch.eye(8))
    batches = [(torch.randn(4, 8),) for _ in range(4)]
    before = capture(net, batches[0])
    after = apply_passes(before, "rotate{steps=2,lr=0.5}", calibration=batches)
    assert after.history[0].num_rewritten == 0
    assert after.report().skipped()["1"] == "no rotation was found that concentrates what its weights count"
    assert all(torch.equal(tensor, after.tensor(name)) for name, tensor in before.tensors().items())


@pytest.mark.parametrize("form", ["model", "blocks"])
def test_nothing_is_left_behind_where_nothing_is_better(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head stays tied, gains stay where they are, and no matrix stands between blocks."""

    def none(sizes: dict[int, tuple[int, bool]], *_: Any, **__: Any) -> dict[int, torch.Tensor]:
        return {number: torch.eye(size) for number, (size, _) in sizes.items()}

    monkeypatch.setattr("sparsepass.passes.rotate.learn_rotations", none)
    before = with_gains("llama")
    after = apply_passes(before, f"rotate{{form={form}}}", calibration=BY_NAME["llama"].inputs(4, 8))
    assert after.history[0].num_rewritten == 0
    assert after.aliases == before.aliases
    assert [node.name for node in after.graph_module.graph.nodes] == [node.name for node in before.graph_module.graph.nodes]
    assert after.tensors().keys() == before.tensors().keys()
    assert all(torch.equal(tensor, after.tensor(name)) for name, tensor in before.tensors().items())


def test_a_second_run_is_refused_of_fused_layers_too() -> None:
    calibration = BY_NAME["llama"].inputs(4, 8)
    program = apply_passes(captured("llama"), "rotate{steps=1},fuse_siblings", calibration=calibration)
    with pytest.raises(PassError, match="an earlier rotate has rotated it"):
        apply_passes(program, "rotate{steps=1}", calibration=calibration)


def test_a_gain_of_zero_that_stays_keeps_its_channels() -> None:
    """It cannot be divided out of a bias that stays, as only some of the norm's readers have one."""
    before = captured("whisper")
    norm = "model.decoder.layers.0.self_attn_layer_norm"
    gain = before.tensor(f"{norm}.weight").detach().clone()
    gain[3] = 0
    before.write_tensor(f"{norm}.weight", gain)
    before.write_tensor(f"{norm}.bias", torch.ones_like(gain))
    after = apply_passes(before, "rotate{steps=2}", calibration=BY_NAME["whisper"].inputs(4, 8), compute="float32")
    told = after.report().skipped()["model.decoder.layers.0.self_attn.q_proj"]
    assert told.startswith(f"{norm}.weight holds another number for each channel")


def test_layers_to_be_ignored_do_not_change() -> None:
    before = captured("llama")
    item = Rotate(steps=2, ignore=("model.layers.1.mlp.down_proj",))
    after = apply_passes(before, item, calibration=BY_NAME["llama"].inputs(4, 8))
    done = [outcome.site for outcome in after.history[0].outcomes if outcome.action == "rewritten"]
    assert sorted(site.rpartition(".")[2] for site in done) == ["o_proj", "o_proj", "v_proj", "v_proj"]
    for name in ("model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        assert torch.equal(before.tensor(name), after.tensor(name))
    assert "to be ignored" in after.report().skipped()["model.layers.0.mlp.up_proj"]
    gains = apply_passes(with_gains("llama"), item, calibration=BY_NAME["llama"].inputs(4, 8))
    assert gains.aliases, "the stream stays, so that the head may stay tied"


def test_masks_are_refused_before_anything_changes() -> None:
    masked = apply_passes(captured("llama"), "nm_sparsify{targets=*.mlp.*}")
    calibration = BY_NAME["llama"].inputs(4, 8)
    for text in ("rotate", "rotate{targets=*.self_attn.*}"):  # channels of other layers would be mixed, too
        with pytest.raises(PassError, match="destroy the N:M pattern: layers have masks already; start from the dense model"):
            apply_passes(masked, text, calibration=calibration)


def test_the_model_is_not_changed() -> None:
    model = BY_NAME["llama"].model()
    before = copy.deepcopy(model.state_dict())
    apply_passes(model, "rotate{steps=2}", calibration=BY_NAME["llama"].inputs(4, 8))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


def test_progress_has_a_step_for_each_of_adam(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    item = Rotate(steps=6)
    assert item.num_steps == 6
    apply_passes(captured("bert"), item, calibration=BY_NAME["bert"].inputs(4, 8), progress=True)
    shown = capsys.readouterr().err + caplog.text
    assert "rotate" in shown
    assert "7/7" in shown


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"form": "layers"}, "form expects one of model, blocks, got 'layers'"),
        ({"salience": "magnitude"}, "salience expects one of sparsegpt, wanda, got 'magnitude'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 1.0}, "lr must lie between 0 and 1, got 1.0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], told: str) -> None:
    with pytest.raises(SparsepassError, match=told):
        Rotate(**options)
