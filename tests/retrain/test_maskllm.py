"""Learned masks: the loop against one written plainly, what changes and what does not, and what is refused."""

import copy
import functools
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tests.families import BY_NAME, captured
from tests.retrain.runs import (
    LEARN_MASKS,
    MASKLLM,
    assert_same,
    assert_whole,
    data,
    dense,
    digest,
    learn,
    masks,
    measures,
    settings,
    sparse,
    steps,
    stopping_at,
    train,
    validation_loss,
)
from torch import Tensor, nn

from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.soft_masks import candidate_masks, gumbel_noise, hard_mask, noise_key
from sparsepass.passes import apply_passes
from sparsepass.passes.masks.pack import pack_program
from sparsepass.passes.maths.pattern import NMPattern, is_nm, nm_mask
from sparsepass.retrain.loop import TrainingStoppedError
from sparsepass.retrain.student import masked_sites


class PlainRun:
    """MaskLLM as one would write it down: transformers' own model, every soft mask whole, autograd for all gradients."""

    def __init__(self, model: nn.Module, program: Program) -> None:
        self.model = model
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        learned = {name: state.learned for name, state in program.sparse.items() if state.learned is not None}
        self.logits = {name: program.tensor(state.logits).detach().clone() for name, state in learned.items()}
        self.moments = {name: [torch.zeros_like(pi), torch.zeros_like(pi)] for name, pi in self.logits.items()}

    def soft(self, name: str, pi: Tensor, t: int) -> Tensor:
        scale, temperature = 100 + 100 * (t - 1) / 7, 2 - 1.5 * (t - 1) / 7
        key = noise_key(0, t - 1, zlib.crc32(name.encode()))
        noise = gumbel_noise(pi.shape[0], pi.shape[1], pi.shape[2], key, first_row=0, device=pi.device).double()
        y = torch.softmax((scale * pi + noise) / temperature, 1)
        mask = torch.einsum("rcg,cm->rgm", y, candidate_masks(2, 4).double())
        return self.weights[name] * mask.flatten(1)

    def loss(self, used: dict[str, Tensor], ids: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = F.log_softmax(self.model(input_ids=ids).logits[:, :-1] / 2, -1)
        logits: Tensor = torch.func.functional_call(self.model, used, kwargs={"input_ids": ids}).logits
        student = F.log_softmax(logits[:, :-1] / 2, -1)
        kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
        return 0.67 * 4 * kl + 0.33 * F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def step(self, ids: Tensor, t: int) -> tuple[float, float]:
        """Take the step ``t``, counted from 1; return the loss and the norm of the gradients."""
        leaves = {name: pi.clone().requires_grad_() for name, pi in self.logits.items()}
        soft = {name: self.soft(name, pi, t) for name, pi in leaves.items()}
        loss = self.loss(self.weights | soft, ids)
        norm_of_weights = torch.stack([w.square().sum() for w in soft.values()]).sum()
        grads = torch.autograd.grad(loss - 1e-3 * (1 - (t - 1) / 7) * norm_of_weights, list(leaves.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        # Two steps up, four along a cosine, two down to zero: `SMALL`.
        rates = [0.0025, 0.005, *(0.001 + 0.004 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)), 0.001, 0.0005]
        lr = rates[t - 1]
        for name, grad in zip(leaves, grads, strict=True):
            g, (m, v) = grad * min(1.0, 1.0 / (norm + 1e-6)), self.moments[name]
            self.logits[name].mul_(1 - lr * 0.1)
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.95).add_(0.05 * g**2)
            self.logits[name].sub_(lr / (1 - 0.9**t) * m / (v.sqrt() / math.sqrt(1 - 0.95**t) + 1e-8))
        return float(loss.detach()), norm


def test_it_is_the_loop_one_would_write_down(tmp_path: Path) -> None:
    model, program = BY_NAME["llama"].model().double(), sparse(recipe=LEARN_MASKS, double=True)
    plain = PlainRun(model, program)
    first = masks(program)
    trained = train(program, model, settings(**MASKLLM), run_folder=tmp_path, data=data(None))
    source = data(None)
    for t, found in enumerate(steps(tmp_path), 1):
        loss, norm = plain.step(source.train.take(8).input_ids, t)
        # float64 on both sides; the norm is summed in another order.
        assert found["loss"] == pytest.approx(loss, rel=1e-11)
        assert found["grad_norm"] == pytest.approx(norm, rel=1e-10)
        if t % 3 == 0 or t == 8:
            hard = {name: hard_mask(pi, 2, 4) for name, pi in plain.logits.items()}
            entries = sum(mask.numel() for mask in hard.values())
            assert found["flips_since_first"] == sum(int((hard[n] != first[n]).sum()) for n in hard) / entries
            scale = 100 + 100 * (t - 1) / 7
            largest = torch.cat([torch.softmax(scale * pi, 1).amax(1).flatten() for pi in plain.logits.values()])
            assert found["decided"] == float((largest > 0.99).double().mean())
            kept = sum(float((plain.weights[n] * hard[n]).square().sum()) for n in hard)
            whole = sum(float(plain.weights[n].square().sum()) for n in hard)
            assert found["kept_norm"] == pytest.approx(kept / whole, rel=1e-12)
    assert t == 8
    assert all(torch.equal(mask, hard[name]) for name, mask in masks(trained).items())
    assert found["flips_since_first"] > 0.01
    assert 0 < found["decided"] < 1
    assert trained.retraining[0]["decided"] == found["decided"]
    assert trained.retraining[0]["kept_norm"] == found["kept_norm"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_nothing_but_masks_changes(name: str) -> None:
    trained, plain = learn(name=name), sparse(name, "nm_sparsify")
    assert trained.tensors().keys() == plain.tensors().keys()
    assert [n.target for n in trained.graph_module.graph.nodes] == [n.target for n in plain.graph_module.graph.nodes]
    assert trained.sparse == plain.sparse
    for weight, tensor in trained.tensors().items():
        assert tensor.dtype == torch.bool or torch.equal(tensor, dense(name).tensor(weight)), weight
    assert any(not torch.equal(mask, masks(sparse(name, LEARN_MASKS))[weight]) for weight, mask in masks(trained).items())
    for site, pattern, mask in masked_sites(trained).values():
        assert is_nm(trained.tensor(mask), pattern, site.nm_axis)
    assert validation_loss(trained) == pytest.approx(measures(trained)[-1], abs=1e-5)  # of the hard masks


def test_what_comes_out_is_an_ordinary_program(tmp_path: Path) -> None:
    trained = learn()
    pack_program(trained).save(tmp_path / "masks.safetensors")
    again = apply_passes(captured("llama"), f'nm_sparsify{{masks="{tmp_path / "masks.safetensors"}"}}')
    inputs = BY_NAME["llama"].inputs(3, 7)
    with torch.no_grad():
        expected = trained(**inputs).logits
        assert torch.equal(again(**inputs).logits, expected)
        assert torch.equal(apply_passes(trained, "fold")(**inputs).logits, expected)
        trained.save(tmp_path / "program")
        assert torch.equal(Program.load(tmp_path / "program")(**inputs).logits, expected)


@functools.cache
def planted() -> tuple[Program, Program]:
    """A model that a certain 2:4 mask leaves as it is, and its program behind another mask; weights are large."""
    model = dense()
    generator = torch.Generator().manual_seed(5)
    pruned = apply_passes(model, "nm_sparsify", validate=False)
    with torch.no_grad():
        for site, _, mask in masked_sites(pruned).values():
            weight = pruned.tensor(site.weight)
            right = nm_mask(torch.rand(weight.shape, generator=generator), NMPattern(2, 4))
            value = torch.where(right, 4 * weight, 0.05 * weight)
            # Half of the groups start from the right mask, the others from any.
            start = torch.rand(weight.shape[0], weight.shape[1] // 4, 1, generator=generator).expand(-1, -1, 4).flatten(1) > 0.5
            wrong = nm_mask(torch.rand(weight.shape, generator=generator), NMPattern(2, 4))
            pruned.write_tensor(site.weight, value)
            pruned.write_tensor(mask, torch.where(start, right, wrong))
            model.write_tensor(site.weight, value)
    return model, apply_passes(pruned, "learn_masks{alpha=6.0}", validate=False)


def test_learning_beats_the_prior() -> None:
    model, program = planted()
    changes: dict[str, Any] = {"lr": 0.02, "max_steps": 80, "mask_norm": 0.0, "kd_weight": 1.0, "validate_every": 40}
    changes |= {"mask_scale": (100.0, 100.0), "mask_temperature": (1.0, 0.1), "temperature": 1.0}
    trained = train(copy.deepcopy(program), copy.deepcopy(model), settings(**MASKLLM | changes))
    before, after = (trained.retraining[0]["validations"][k]["kl"] for k in (0, -1))
    assert after < 0.6 * before


def test_the_norm_is_rewarded() -> None:
    found = {reward: learn(mask_norm=reward, max_steps=40).retraining[0]["kept_norm"] for reward in (0.0, 1.0)}
    largest = apply_passes(captured("llama"), "nm_sparsify")
    tensors = [(largest.tensor(name).detach(), mask) for name, mask in masks(largest).items()]
    most = sum(float((w * m).square().sum()) for w, m in tensors) / sum(float(w.square().sum()) for w, _ in tensors)
    assert found[0.0] < found[1.0] <= most
    assert found[1.0] > 0.97 * most


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_numbers_however_a_step_is_worked_through(name: str, tmp_path: Path) -> None:
    whole = learn(tmp_path / "whole", name=name)
    recomputed = learn(tmp_path / "recomputed", name=name, activation_checkpointing=True)
    assert digest(whole.tensors()) == digest(recomputed.tensors())
    learn(tmp_path / "parts", name=name, micro_batch_size=2)
    losses = [[found["loss"] for found in steps(tmp_path / kind)] for kind in ("whole", "recomputed", "parts")]
    assert losses[0] == losses[1]
    # Gradients of micro-batches are added in another order: float32's rounding, grown over eight steps of AdamW.
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)
    learn(tmp_path / "other", name=name, seed=1)  # other noise: a difference that is seen
    assert [found["loss"] for found in steps(tmp_path / "other")] != pytest.approx(losses[0], rel=1e-4)


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    program = functools.partial(sparse, recipe=LEARN_MASKS)
    for step in (3, 2):  # the second is step 5, after which nothing is due
        with pytest.raises(TrainingStoppedError):
            train(program(), captured("llama"), settings(**MASKLLM), data=stopping_at(step), run_folder=tmp_path)
    assert steps(tmp_path)[-1]["step"] == 5
    resumed, unbroken = learn(tmp_path), learn(tmp_path / "whole")
    assert_same(resumed, unbroken)
    assert {name: resumed.retraining[0][name] for name in ("decided", "kept_norm")} == {
        name: unbroken.retraining[0][name] for name in ("decided", "kept_norm")
    }
    assert_whole(tmp_path)


def test_a_checkpoint_belongs_to_its_weights(tmp_path: Path) -> None:
    learn(tmp_path)
    other = sparse(recipe=LEARN_MASKS)
    with torch.no_grad():
        other.tensor("model.norm.weight")[0] += 1
    with pytest.raises(SparsepassError, match=r"another run: program is .* here and .* in the checkpoint"):
        train(other, captured("llama"), settings(**MASKLLM), run_folder=tmp_path)


def test_frozen_layers_keep_their_prior() -> None:
    trained = learn(frozen=("*.mlp.*",))
    before = masks(sparse(recipe=LEARN_MASKS))
    moved = {name for name, mask in masks(trained).items() if not torch.equal(mask, before[name])}
    assert moved
    assert not any(".mlp." in name for name in moved)


def test_masks_that_are_not_learned_stay() -> None:
    recipe = 'nm_sparsify,learn_masks{alpha=1.0,targets="*.mlp.*"}'
    trained, before = learn(recipe=recipe), masks(sparse(recipe=recipe))
    assert {name for name, mask in masks(trained).items() if not torch.equal(mask, before[name])} <= {
        name for name in before if ".mlp." in name
    }
    assert set(trained.retraining[0]["flips_since_first_by_layer"]) == {name for name in before if ".mlp." in name}


def test_the_weights_may_be_bfloat16() -> None:
    model = BY_NAME["llama"].model().bfloat16()
    program = apply_passes(model, LEARN_MASKS, example_inputs=BY_NAME["llama"].inputs(2, 8), validate=False)
    trained = train(program, model, settings(**MASKLLM, max_steps=2))
    assert {t.dtype for t in trained.graph_module.parameters()} == {torch.bfloat16}
    assert trained.retraining[0]["flips_since_first"] > 0


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("nm_sparsify", {}, "the program has no logits to learn; apply learn_masks first"),
        (
            LEARN_MASKS,
            {"method": "ast"},
            r"masks are to be learned \(learn_masks, 14 weights\), and method: ast trains weights",
        ),
        (LEARN_MASKS, {"method": "cast", "decay": 1e-3}, "method: cast trains weights; use method: maskllm"),
        (LEARN_MASKS + ",slorb{k=4}", {}, "has a SLoRB branch, and method: maskllm trains nothing but masks"),
        (LEARN_MASKS, {"frozen": ("*mask_logits",)}, "frozen leaves no parameter to train"),
    ],
)
def test_what_does_not_fit_is_said(recipe: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsepassError, match=message):
        learn(recipe=recipe, **changes)
