"""The training loop: its numbers against a loop written plainly, masks while it runs, and what it refuses."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers as hf
from tests.families import BY_NAME, captured
from tests.retrain.runs import (
    CONTEXT,
    RECIPE,
    data,
    digest,
    masks,
    measures,
    run,
    settings,
    sparse,
    steps,
    train,
    validation_loss,
)
from torch import Tensor, nn

from sparsepass.graph import Program, SparsepassError, capture
from sparsepass.passes import apply_passes
from sparsepass.passes.maths.pattern import NMPattern, is_nm, nm_mask
from sparsepass.retrain.config import RetrainConfig
from sparsepass.retrain.data import DataConfig, open_data
from sparsepass.retrain.learner import NonFiniteLossError
from sparsepass.retrain.loop import retrain
from sparsepass.retrain.masks import MovingMasks
from sparsepass.retrain.run.checkpoint import CHECKPOINTS
from sparsepass.retrain.run.processes import checkpoint_activations
from sparsepass.retrain.student import masked_sites

PATTERN = NMPattern(2, 4)


class PlainRun:
    """Retraining as one would write it down: transformers' own model, whole logits, formulas tensor by tensor."""

    def __init__(self, model: nn.Module, program: Program, config: RetrainConfig) -> None:
        self.model, self.config = model, config
        self.weights = {name: t.detach().clone() for name, t in program.tensors().items() if isinstance(t, nn.Parameter)}
        self.masks = {name: mask.clone() for name, mask in masks(program).items()}
        self.grids = {name: state.grid for name, state in program.quantized.items()}
        self.branches = {n.removesuffix(".weight"): state.branch for n, state in program.sparse.items() if state.branch}
        self.moments = {name: [torch.zeros_like(w), torch.zeros_like(w)] for name, w in self.weights.items()}
        for name, mask in self.masks.items():  # clipped: no larger than 0.99 of the smallest kept weight of the group
            w = self.weights[name].unflatten(1, (-1, 4))
            kept = mask.unflatten(1, (-1, 4))
            limit = 0.99 * torch.where(kept, w.abs(), math.inf).amin(2, keepdim=True)
            self.weights[name] = torch.where(kept, w, w.sign() * torch.minimum(w.abs(), limit)).flatten(1)

    def logits(self, leaves: dict[str, Tensor], ids: Tensor) -> Tensor:
        """What the sparse model says; the gradient of a masked weight goes straight through to the dense one."""
        used = {n: w + (self.rounded(n, w * self.masks[n]) - w).detach() if n in self.masks else w for n, w in leaves.items()}
        hooks = []
        for path, branch in self.branches.items():

            def add(_: nn.Module, inputs: tuple[Tensor], output: Tensor, branch: Any = branch) -> Tensor:
                summed = inputs[0].unflatten(-1, (-1, branch.k)).sum(-1)
                total: Tensor = output + summed @ leaves[branch.weight].T
                return total

            hooks.append(self.model.get_submodule(path).register_forward_hook(add))
        own = {name: used[name] for name, _ in self.model.named_parameters()}
        logits: Tensor = torch.func.functional_call(self.model, own, kwargs={"input_ids": ids}).logits
        for hook in hooks:
            hook.remove()
        return logits

    def rounded(self, name: str, w: Tensor) -> Tensor:
        """What a weight is rounded to, if it is: a scale is the largest weight over the largest integer, rounded up."""
        if name not in self.grids:
            return w
        grouped = w.float().unflatten(1, (-1, self.grids[name].group_size))
        exact = grouped.abs().amax(2, keepdim=True) / self.grids[name].ends[1]
        scale = exact.bfloat16()
        scale = torch.where(scale < exact, torch.nextafter(scale, scale + 1), scale).float()
        found: Tensor = (grouped / scale).round().clamp(*self.grids[name].ends) * scale
        return found.flatten(1).double()

    def loss(self, logits: Tensor, ids: Tensor) -> Tensor:
        a, t = self.config.kd_weight, self.config.temperature
        with torch.no_grad():
            teacher = F.log_softmax(self.model(input_ids=ids).logits[:, :-1] / t, -1)
        student = F.log_softmax(logits[:, :-1] / t, -1)
        kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
        return a * t**2 * kl + (1 - a) * F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def step(self, ids: Tensor, t: int) -> tuple[float, float]:
        """Take the step ``t``, counted from 1; return the loss and the norm of the gradients."""
        config = self.config
        leaves = {name: w.clone().requires_grad_() for name, w in self.weights.items()}
        loss = self.loss(self.logits(leaves, ids), ids)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        scale = min(1.0, (config.clip_grad_norm or math.inf) / (norm + 1e-6))
        # Two steps up, four along a cosine, two down to zero: `SMALL`.
        rates = [0.005, 0.01, *(0.001 + 0.009 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)), 0.001, 0.0005]
        lr, decay = rates[t - 1], 0.01 * min(1.0, (t - 1) / 4)
        for name, w in self.weights.items():
            g = grads[name] * scale
            wd = config.weight_decay if w.dim() > 1 else 0.0
            d = decay * w * ~self.masks[name] if name in self.masks else 0
            m, v = self.moments[name]
            if config.optimizer == "sgd":
                m.mul_(config.momentum).add_(g + wd * w)
                w.sub_(lr * (m + d))
                continue
            b1, b2 = config.betas
            w.mul_(1 - lr * wd)
            d = decay * w * ~self.masks[name] if name in self.masks else 0
            m.mul_(b1).add_((1 - b1) * g)
            v.mul_(b2).add_((1 - b2) * (g + d) ** 2)
            w.sub_(lr / (1 - b1**t) * (m + d) / (v.sqrt() / math.sqrt(1 - b2**t) + config.eps))
        if t % config.mask_interval == 0:
            self.masks = {name: nm_mask(self.weights[name].abs(), PATTERN) for name in self.masks}
        return float(loss.detach()), norm


SGD = {"optimizer": "sgd", "momentum": 0.9, "lr": 0.01, "clip_grad_norm": None}


@pytest.mark.parametrize(
    ("recipe", "options"), [(RECIPE, {}), (RECIPE, SGD), ("nm_sparsify,slorb{k=8},quantize{group_size=16}", {"quantize": True})]
)
def test_it_is_the_loop_one_would_write_down(recipe: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, program = BY_NAME["llama"].model().double(), sparse(recipe=recipe, double=True)
    config = settings(**options)
    plain = PlainRun(model, program, config)
    first = {name: mask.clone() for name, mask in masks(program).items()}
    trained = train(program, model, config, run_folder=tmp_path, data=data(None))
    source = data(None)
    for t, found in enumerate(steps(tmp_path), 1):
        last = {name: mask.clone() for name, mask in plain.masks.items()}
        loss, norm = plain.step(source.train.take(8).input_ids, t)
        # float64 on both sides; the norm is summed in another order.
        assert found["loss"] == pytest.approx(loss, rel=1e-11)
        assert found["grad_norm"] == pytest.approx(norm, rel=1e-11)
        if t % 3 == 0:
            entries = sum(mask.numel() for mask in last.values())
            assert found["flip_rate"] == sum(int((plain.masks[n] != last[n]).sum()) for n in last) / entries
            assert found["flips_since_first"] == sum(int((plain.masks[n] != first[n]).sum()) for n in last) / entries
    assert t == 8
    assert all(torch.equal(mask, plain.masks[name]) for name, mask in masks(trained).items())
    assert any(not torch.equal(mask, first[name]) for name, mask in masks(trained).items())
    for name, weight in plain.weights.items():
        assert torch.allclose(trained.tensor(name), weight, rtol=1e-9, atol=1e-12), name


def test_masks_are_refreshed_between_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    refreshed = MovingMasks.refresh
    seen: list[str] = []

    def refresh(self: MovingMasks) -> Any:
        calls["refresh"] += 1
        assert torch.is_grad_enabled()  # neither a forward under no_grad nor within backward
        return refreshed(self)

    monkeypatch.setattr(MovingMasks, "refresh", refresh)
    made = checkpoint_activations

    def watched(block: nn.Module) -> Callable[..., Any]:
        inner = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls["forward"] += torch.is_grad_enabled()
            if torch.is_grad_enabled():
                seen.append(digest({name: t for name, t in block.named_buffers() if t.dtype == torch.bool}))
            return inner(*args, **kwargs)

        return forward

    def watch(blocks: Any) -> None:
        found = list(blocks)
        for block in found:
            block.forward = watched(block)
        made(found)

    monkeypatch.setattr("sparsepass.retrain.trainee.checkpoint_activations", watch)
    options: dict[str, Any] = {"activation_checkpointing": True, "validate_every": 8}
    trained = run(micro_batch_size=2, **options)
    # 8 steps of 4 micro-batches through 2 blocks, each once more in the backward pass.
    assert calls == {"refresh": 2, "forward": 8 * 4 * 2 * 2}
    # Each block sees one set of masks through steps 1 to 3, another through 4 to 6, another in 7 and 8.
    parts = [set(seen[:48]), set(seen[48:96]), set(seen[96:])]
    assert [len(part) for part in parts] == [2, 2, 2]
    assert len(set.union(*parts)) == 6
    plain = run(**options | {"activation_checkpointing": False})
    assert all(torch.equal(mask, masks(plain)[name]) for name, mask in masks(trained).items())


@pytest.mark.parametrize(("share", "num_refreshes"), [(0.5, 1), (0.75, 2), (0.0, 0)])
def test_masks_freeze_for_the_last_part(share: float, num_refreshes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    refreshed = MovingMasks.refresh

    def refresh(self: MovingMasks) -> Any:
        calls.append(1)
        return refreshed(self)

    monkeypatch.setattr(MovingMasks, "refresh", refresh)
    trained = run(freeze_masks_after=share)
    assert len(calls) == num_refreshes
    assert (trained.retraining[0]["flips_since_first"] > 0) is (num_refreshes > 0)


def assert_nm(program: Program) -> None:
    for site, pattern, mask in masked_sites(program).values():
        assert is_nm(program.tensor(mask), pattern, site.nm_axis)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_ast_moves_masks_and_keeps_them_nm(name: str) -> None:
    before, trained = masks(sparse(name)), run(name)
    assert_nm(trained)
    assert any(not torch.equal(mask, before[weight]) for weight, mask in masks(trained).items())
    record = trained.retraining[0]
    moved = {weight: float((mask != before[weight]).double().mean()) for weight, mask in masks(trained).items()}
    assert record["flips_since_first_by_layer"] == pytest.approx(moved)


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "sgd", "momentum": 0.9}])
@pytest.mark.parametrize("behind", ["original", 0.5])
def test_a_fixed_mask_and_what_is_behind_it_never_change(behind: Any, optimizer: dict[str, Any]) -> None:
    program = sparse()
    trained = run(method="fixed", behind=behind, **optimizer)
    start = run(method="fixed", behind=behind, max_steps=1, warmup=0, lr=0.0, min_lr=0.0, **optimizer)
    for name, mask in masks(program).items():
        assert torch.equal(masks(trained)[name], mask)
        weight, first = trained.tensor(name).detach(), start.tensor(name).detach()
        assert torch.equal(weight[~mask], first[~mask]), name
        assert first[~mask].any()
        assert not torch.equal(weight[mask], first[mask])
        if behind == "original":
            assert torch.equal(first, program.tensor(name))
    assert trained.retraining[0]["flips_since_first"] == 0


@pytest.mark.parametrize(("name", "recipe"), [("llama", "nm_sparsify,slorb{k=8}"), ("gpt2", "nm_sparsify")])
def test_cast_computes_densely_and_ends_sparse(name: str, recipe: str, tmp_path: Path) -> None:
    program = sparse(name, "nm_sparsify")
    dense = train(program, captured(name), settings(method="cast", behind="original"), run_folder=tmp_path)
    assert steps(tmp_path)[0]["kl"] == pytest.approx(0, abs=1e-6)  # it still is the teacher
    assert dense.retraining[0]["validations"][0]["kl"] > 1e-5  # behind its masks it is not
    trained = run(name, recipe=recipe, method="cast", decay=1e-3)
    assert_nm(trained)
    assert trained.tensors().keys() == sparse(name, recipe).tensors().keys()
    assert any(not torch.equal(mask, masks(sparse(name, recipe))[weight]) for weight, mask in masks(trained).items())
    step = trained.retraining[0]["step_of_weights"]
    expected = next(found["nll"] for found in trained.retraining[0]["validations"] if found["step"] == step)
    assert validation_loss(trained) == pytest.approx(expected, abs=1e-5)  # the two products are rounded in another order


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-3)])
def test_validation_is_the_one_perplexity(dtype: str, tolerance: float, micro: int | None) -> None:
    # 7 rows: the last batch is not full. In bfloat16 the teacher plays no part; sums run over batches of another size.
    trained = train(sparse(), captured("llama"), settings(dtype=dtype, micro_batch_size=micro), data=data(7))
    record = trained.retraining[0]
    found = next(found for found in record["validations"] if found["step"] == record["step_of_weights"])
    low = None if dtype == "float32" else dtype
    assert found["nll"] == pytest.approx(validation_loss(trained, 7, low), abs=tolerance)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert found["num_tokens"] == 7 * (CONTEXT - 1)
    start = validation_loss(sparse(), 7, low)
    assert record["validations"][0]["nll"] == pytest.approx(start, abs=tolerance)
    assert all(tensor.dtype != torch.bfloat16 for tensor in trained.tensors().values())


def test_padding_and_labels_count_as_they_should() -> None:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (5, 16, 9, 12, 7, 16, 3, 11)]
    rows = [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids]
    source = open_data(DataConfig(context=CONTEXT, packing=False, validation=4, shuffle=False), source=rows)
    program = sparse("gpt2")
    trained = train(program, captured("gpt2"), settings(max_steps=2, batch_size=4), data=source)
    assert source.validation is not None
    losses = []
    for place in source.validation.places:
        row = torch.tensor([ids[place]])
        logits = program(input_ids=row).logits[0, 1:-1]
        losses += F.cross_entropy(logits, row[0, 2:], reduction="none").tolist()
    assert trained.retraining[0]["validations"][0]["nll"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert trained.retraining[0]["validations"][0]["num_tokens"] == len(losses)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_numbers_however_a_step_is_worked_through(name: str, tmp_path: Path) -> None:
    whole = run(name, tmp_path / "whole", hidden_weight=0.1)
    recomputed = run(name, tmp_path / "recomputed", hidden_weight=0.1, activation_checkpointing=True)
    assert digest(whole.tensors()) == digest(recomputed.tensors())
    parts = run(name, tmp_path / "parts", hidden_weight=0.1, micro_batch_size=2)
    losses = [[found["loss"] for found in steps(tmp_path / kind)] for kind in ("whole", "recomputed", "parts")]
    assert losses[0] == losses[1]
    # Gradients of micro-batches are added in another order: float32's rounding, grown over eight steps of AdamW.
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert all(torch.equal(mask, masks(parts)[weight]) for weight, mask in masks(whole).items())
    other = run(name, tmp_path / "other", micro_batch_size=2)  # no hidden states: a difference that is seen
    assert measures(other) != pytest.approx(measures(whole), rel=1e-5)


# torch 2.13's dynamo asks for the gradient of its inputs, and hides the warning in a way that does not stop an error; it makes
# an object of autograd's Function, of which torch warns.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_blocks_give_the_same_numbers(tmp_path: Path) -> None:
    run(folder=tmp_path / "plain")
    run(folder=tmp_path / "compiled", compile=True)
    losses = [[found["loss"] for found in steps(tmp_path / kind)] for kind in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


BREAKS: dict[str, Any] = {
    "lr": 3.0, "min_lr": 0.0, "warmup": 8, "final_linear": 0.0, "lr_shape": "constant", "validate_every": 1
}  # fmt: skip
"""The rate rises to where the model breaks."""


def test_the_best_by_validation_is_returned(tmp_path: Path) -> None:
    trained = run(folder=tmp_path, **BREAKS)
    record = trained.retraining[0]
    losses = {found["step"]: found["nll"] for found in record["validations"] if found["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert record["step_of_weights"] == best < 8
    assert losses[8] > losses[best] + 0.1
    assert validation_loss(trained) == pytest.approx(losses[best], abs=1e-5)
    # What is told of the masks is of these weights: they moved after the best step only.
    assert record["flips_since_first"] == 0
    before = masks(sparse())
    assert all(torch.equal(mask, before[name]) for name, mask in masks(trained).items())
    assert steps(tmp_path)[-1]["flips_since_first"] > 0.1
    # The state of the end is there as well.
    assert (tmp_path / CHECKPOINTS / "step-00000008").is_dir()


def test_the_best_validation_is_kept_between_checkpoints(tmp_path: Path) -> None:
    trained = run(folder=tmp_path, **BREAKS, checkpoint_every=5)
    record = trained.retraining[0]
    losses = {found["step"]: found["nll"] for found in record["validations"] if found["step"]}
    assert record["step_of_weights"] == min(losses, key=lambda step: losses[step]) not in (5, 8)


def test_a_damaged_best_checkpoint_is_passed_over_and_its_step_not_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run(folder=tmp_path, **BREAKS).retraining[0]["step_of_weights"]
    (path,) = tmp_path.glob(f"{CHECKPOINTS}/step-{best:08d}/rank-00000-0.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = train(sparse(), captured("llama"), settings(**BREAKS), run_folder=tmp_path, progress=True)
    assert f"step-{best:08d} was passed over" in capsys.readouterr().err
    record = again.retraining[0]
    losses = {found["step"]: found["nll"] for found in record["validations"]}
    assert record["step_of_weights"] != best
    assert validation_loss(again) == pytest.approx(losses[record["step_of_weights"]], abs=1e-5)


def test_without_a_run_folder_the_last_weights_are_returned() -> None:
    trained = run(**BREAKS)
    assert trained.retraining[0]["step_of_weights"] == 8
    assert validation_loss(trained) == pytest.approx(measures(trained)[-1], abs=1e-4)


def test_without_validation_data_the_last_weights_are_returned(tmp_path: Path) -> None:
    trained = train(sparse(), captured("llama"), settings(), data=data(None), run_folder=tmp_path)
    assert trained.retraining[0]["validations"] == []
    assert trained.retraining[0]["step_of_weights"] == 8


def test_the_text_alone(tmp_path: Path) -> None:
    trained = train(sparse(), None, settings(kd_weight=0.0), run_folder=tmp_path)
    assert all(found["loss"] == pytest.approx(found["ce"]) for found in steps(tmp_path))
    assert trained.retraining[0]["teacher"] == {"kind": "none"}


def test_a_teacher_of_another_size() -> None:
    small = small_teacher(hidden_size=16, num_hidden_layers=1)
    trained = train(sparse(), small, settings(max_steps=2))
    assert trained.retraining[0]["validations"][0]["kl"] > 0


def small_teacher(**changes: Any) -> nn.Module:
    torch.manual_seed(3)
    config: Any = BY_NAME["llama"].model().config
    model: nn.Module = hf.LlamaForCausalLM(hf.LlamaConfig(**config.to_dict() | {"head_dim": None} | changes))
    return model.eval()


def snapshot(module: nn.Module) -> tuple[str, bool]:
    tensors = (
        module.tensors() if isinstance(module, Program) else {**dict(module.named_parameters()), **dict(module.named_buffers())}
    )
    return digest(tensors), module.training


@pytest.mark.parametrize("kind", ["model", "program"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_given_is_not_changed(kind: str, dtype: str) -> None:
    program = sparse()
    teacher = BY_NAME["llama"].model().train() if kind == "model" else captured("llama")
    before = snapshot(program), snapshot(teacher)
    trained = train(program, teacher, settings(dtype=dtype, hidden_weight=0.1, max_steps=3))
    assert (snapshot(program), snapshot(teacher)) == before
    assert program.retraining == ()
    assert digest(trained.tensors()) != before[0][0]
    teacher.zero_grad()
    with pytest.raises(NonFiniteLossError):
        train(program, teacher, settings(dtype=dtype, lr=1e30))
    assert (snapshot(program), snapshot(teacher)) == before
    assert train(program, teacher, settings(dtype=dtype, max_steps=1), inplace=True) is program
    assert snapshot(program) != before[0]
    assert snapshot(teacher) == before[1]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"step \d: the (loss is|norm of the gradients).*Lower lr \(it is 1e\+30\)"):
        run(folder=tmp_path, lr=1e30, checkpoint_every=1, warmup=0)
    assert {path.name for path in (tmp_path / CHECKPOINTS).iterdir()} == {"step-00000001"}
    assert [found["step"] for found in steps(tmp_path)] == [1]
    program = sparse("gpt2")
    with torch.no_grad():
        program.tensor("transformer.h.1.mlp.c_fc.weight")[:, 3] = math.inf
    with pytest.raises(
        NonFiniteLossError,
        match=r"step 1: the loss is nan, first in the output of transformer\.h\.1\.mlp\.c_fc; the weight "
        r"transformer\.h\.1\.mlp\.c_fc\.weight is not finite itself",
    ):
        train(program, captured("gpt2"), settings(behind="original"), data=data(None), run_folder=tmp_path / "inf")
    assert not (tmp_path / "inf" / CHECKPOINTS).exists()


def folded() -> Program:
    return apply_passes(captured("llama"), "nm_sparsify,fold", validate=False)


def low() -> Program:
    model = BY_NAME["llama"].model().bfloat16()
    return apply_passes(capture(model, BY_NAME["llama"].inputs(2, 8)), "nm_sparsify", validate=False)


def retrained(name: str) -> Program:
    return train(apply_passes(captured(name), "nm_sparsify", validate=False), captured(name), settings())


def taught(teacher: Any, **changes: Any) -> Program:
    return train(sparse(), teacher, settings(**changes))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no masks": (
        lambda: train(captured("llama"), captured("llama"), settings()),
        "there is nothing to retrain: it has no sparse layers; apply nm_sparsify",
    ),
    "folded masks": (
        lambda: train(folded(), captured("llama"), settings()),
        "its masks have been folded into the weights",
    ),
    "bfloat16": (
        lambda: train(low(), captured("llama"), settings()),
        "is torch.bfloat16: training keeps its weights in float32",
    ),
    "no teacher": (lambda: taught(None), "there is no teacher; give the dense model, or set kd_weight: 0"),
    "sparse teacher": (lambda: taught(sparse()), "the teacher has sparse layers; give the dense model"),
    "vocabulary": (
        lambda: taught(small_teacher(vocab_size=80)),
        "the teacher knows 80 tokens and the program 96; .* give a teacher with the same tokenizer",
    ),
    "depth": (
        lambda: taught(small_teacher(num_hidden_layers=1), hidden_weight=0.1),
        "hidden_weight compares block by block, and the program has 2 blocks, the teacher 1; .*hidden_weight: 0",
    ),
    "width": (
        lambda: taught(small_teacher(hidden_size=16), hidden_weight=0.1),
        r"hidden state 0 is \(8, 16, 32\) in the student, \(8, 16, 16\) in the teacher",
    ),
    "micro-batches": (
        lambda: run(micro_batch_size=3),
        "micro_batch_size 3 does not divide the 8 sequences of each process",
    ),
    "encoder": (lambda: retrained("bert"), "retraining works on causal language models, .* returns last_hidden_state"),
    "two sides": (lambda: retrained("t5"), "retraining works on causal language models, .* takes .*decoder_input_ids"),
    "frozen": (lambda: run(frozen=("*embed_token",)), r"frozen: no parameter is named '\*embed_token'"),
    "all frozen": (lambda: run(frozen=("*",)), "frozen leaves no parameter to train"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_said(kind: str) -> None:
    act, message = REFUSED[kind]
    with pytest.raises(SparsepassError, match=message):
        act()


def test_frozen_parameters_stay() -> None:
    trained = run(frozen=("*embed_tokens*", "*norm*", "model.layers.0.mlp.up_proj.weight"))
    before = sparse()
    moved = {name for name, t in trained.tensors().items() if not torch.equal(t, before.tensor(name)) and t.dtype != torch.bool}
    frozen = {name for name in trained.tensors() if "embed_tokens" in name or "norm" in name}
    assert not moved & frozen
    assert "model.layers.0.mlp.gate_proj.weight" in moved
    up = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(masks(trained)[up], masks(before)[up])
    assert {name for name, p in trained.named_parameters() if "norm" in name}


def test_a_weight_that_is_not_trained_keeps_its_mask() -> None:
    """Magnitude would choose another one: the weights behind the first mask are as large as any."""
    frozen = "model.layers.0.mlp.up_proj.weight"
    before = sparse()
    mask = before.tensor(str(before.sparse[frozen].mask))
    mask.copy_(mask.reshape(-1, 2, 2).flip(1).reshape(mask.shape))
    chosen = mask.clone()
    trained = train(before, captured("llama"), settings(frozen=(frozen,), behind="original"))
    assert torch.equal(masks(trained)[frozen], chosen)
    assert trained.retraining[0]["flips_since_first_by_layer"][frozen] == 0
    assert trained.retraining[0]["flips_since_first"] > 0


def test_a_warm_up_longer_than_the_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    train(sparse(), captured("llama"), settings(max_steps=2, warmup=2000), progress=True)
    assert "the warm-up of 2000 steps leaves no room in a run of 2" in capsys.readouterr().err


def test_the_line_of_progress(capsys: pytest.CaptureFixture[str]) -> None:
    train(sparse(), captured("llama"), settings(max_steps=2), progress=True)
    shown = capsys.readouterr().err
    assert "step 2/2" in shown
    assert "validation perplexity" in shown
    train(sparse(), captured("llama"), settings(max_steps=1))
    assert capsys.readouterr().err == ""


def test_retrain_needs_no_help_with_exports() -> None:
    options: dict[str, Any] = {"data": data(), "config": settings(max_steps=2), "progress": False}
    plain = retrain(sparse(), captured("llama"), **options)
    assert digest(plain.tensors()) == digest(run(max_steps=2).tensors())
