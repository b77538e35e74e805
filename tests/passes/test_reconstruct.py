"""Block-wise reconstruction against a plain loop over the model's own layers, and what it must never do."""

import copy
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.families import BY_NAME, captured
from torch import Tensor, nn

from sparsepass.graph import Program, capture
from sparsepass.passes import apply_passes, reconstruct as reconstruct_module
from sparsepass.passes.engine import find_blocks, site_groups
from sparsepass.passes.maths.pattern import NMPattern, is_nm, nm_mask
from sparsepass.passes.maths.reconstruct import Trained, fit, held_out, step_size, token_error

PATTERN = NMPattern(2, 4)
MAGNITUDE = "nm_sparsify{criterion=magnitude}"


def _calls(model: nn.Module, layer: nn.Module, batches: list[dict[str, Tensor]]) -> list[tuple[Any, Any, Tensor]]:
    """What a layer is given and gives, batch by batch."""
    seen: list[tuple[Any, Any, Tensor]] = []
    hook = layer.register_forward_hook(lambda _, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    hook.remove()
    return seen


def _error(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target).square().sum(-1) / target.square().sum(-1)).mean()


def _reference(dense: nn.Module, batches: list[dict[str, Tensor]], *, steps: int, lr: float, moving: int | None) -> nn.Module:
    """The definition: prune a layer, run it on what the pruned ones before give, train it towards the dense layer's output."""
    student = copy.deepcopy(dense)
    training, judging = held_out(len(batches))
    for layer, teacher in zip(student.model.layers, dense.model.layers, strict=True):  # type: ignore[union-attr, arg-type]
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        masks = {linear.weight: nm_mask(linear.weight.detach().abs(), PATTERN) for linear in linears}
        with torch.no_grad():
            for weight, mask in masks.items():
                weight.mul_(mask)
        inputs = _calls(student, layer, batches)
        targets = [output for _, _, output in _calls(dense, teacher, batches)]
        scale = {
            p: float(p.detach()[masks.get(p, torch.ones_like(p).bool())].square().mean()) ** 0.5 for p in layer.parameters()
        }
        before = {p: p.detach().clone() for p in layer.parameters()}
        optimizer = torch.optim.AdamW(
            [{"params": [p], "lr": 0.0, "scale": scale[p]} for p in layer.parameters()], betas=(0.9, 0.95), weight_decay=0.0
        )
        hidden = {p: p.detach().clone() for p in masks}  # what the optimizer moves, behind the mask too

        def judge(layer: nn.Module = layer, inputs: Any = inputs, targets: Any = targets) -> float:
            with torch.no_grad():
                return float(sum(_error(layer(*inputs[i][0], **inputs[i][1]), targets[i]) for i in judging)) / len(judging)

        start = judge()
        order: list[int] = []
        generator = random.Random(0)
        while len(order) < steps:
            order += generator.sample(training, len(training))
        for step, index in enumerate(order[:steps]):
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"] * step_size(step, steps)
            optimizer.zero_grad()
            with torch.no_grad():
                for p, mask in masks.items():
                    p.copy_(torch.where(mask, hidden[p], 0))
            _error(layer(*inputs[index][0], **inputs[index][1]), targets[index]).backward()
            with torch.no_grad():
                for p, mask in masks.items():
                    p.copy_(hidden[p])
                    if moving is None:
                        assert p.grad is not None
                        p.grad.mul_(mask)
            optimizer.step()
            with torch.no_grad():
                for p in masks:
                    hidden[p].copy_(p)
                    if moving is not None and (step + 1) % moving == 0 and step + 1 <= 0.8 * steps:
                        masks[p] = nm_mask(p.abs(), PATTERN)
        with torch.no_grad():
            for p, mask in masks.items():
                p.copy_(torch.where(mask, hidden[p], 0))
            if judge() >= start:
                for p, value in before.items():
                    p.copy_(value)
    return student


@pytest.mark.parametrize("moving", [None, 3])
def test_it_equals_a_plain_loop_over_the_models_own_layers(moving: int | None) -> None:
    model = BY_NAME["llama"].model()
    batches = [BY_NAME["llama"].inputs(2, tokens) for tokens in (12, 13, 14, 15)]
    expected = _reference(model, batches, steps=15, lr=0.02, moving=moving)
    masks = "fixed" if moving is None else f"moving,refresh_steps={moving}"
    program = apply_passes(
        model, f"{MAGNITUDE},reconstruct{{steps=15,lr=0.02,masks={masks}}}", calibration=batches, compute="float32"
    )
    found = program.to_model()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=1e-3, atol=1e-5, msg=name)
    improved = {o.facts["block"] for o in program.history[-1].outcomes if o.facts and "note" not in o.facts}
    assert improved == {"model.layers.0", "model.layers.1"}


def _prune(text: str, **options: Any) -> Program:
    batches = [BY_NAME["llama"].inputs(2, tokens) for tokens in range(10, 26)]
    return apply_passes(captured("llama"), text, calibration=batches, **options)


@pytest.fixture(scope="module")
def sparse() -> Program:
    return _prune("nm_sparsify")


def _relative_error(program: Program) -> float:
    validation = program.history[-1].validation
    assert validation is not None
    return float(validation["relative_error"])


def _errors(program: Program) -> list[tuple[float, float]]:
    """Before and after, for every layer that was trained."""
    facts = [o.facts for o in program.history[-1].outcomes if "error_after" in o.facts]
    return [(float(known["error_before"]), float(known["error_after"])) for known in facts]


def _mask(program: Program, weight: str) -> Tensor:
    name = program.sparse[weight].mask
    assert name is not None
    return program.tensor(name)


def test_fixed_masks_stay_and_so_does_what_stands_behind_them(sparse: Program) -> None:
    dense, program = captured("llama"), _prune("nm_sparsify,reconstruct{steps=24}", compute="float32")
    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(_mask(program, first), _mask(sparse, first))
    for weight in program.sparse:
        mask = _mask(program, weight)
        assert torch.equal(program.tensor(weight)[~mask], dense.tensor(weight)[~mask])
        assert bool((program.tensor(weight)[mask] != sparse.tensor(weight)[mask]).any())
    assert _relative_error(program) < 0.9 * _relative_error(sparse)
    assert program.history[0].validation is None, "pruning alone cannot be measured any more"


def test_moving_masks_move_and_leave_the_original_weights_behind_them() -> None:
    dense, fixed = captured("llama"), _prune(MAGNITUDE)
    program = _prune(f"{MAGNITUDE},reconstruct{{steps=24,lr=0.05,masks=moving}}")
    moved = 0
    for weight in program.sparse:
        mask = _mask(program, weight)
        moved += int((mask != _mask(fixed, weight)).sum())
        folded = torch.ops.sparsepass.masked_weight(program.tensor(weight), mask)
        assert is_nm(folded, PATTERN)
        assert torch.equal(program.tensor(weight)[~mask], dense.tensor(weight)[~mask])
    assert moved > 0


def test_a_block_is_never_made_worse() -> None:
    plain, program = _prune(MAGNITUDE), _prune(f"{MAGNITUDE},reconstruct{{steps=4,lr=0.99}}")
    assert len(_errors(program)) == 14
    assert all(after >= before for before, after in _errors(program))
    assert all("smaller lr" in str(o.facts["note"]) for o in program.history[1].outcomes if o.facts)
    for name, tensor in plain.tensors().items():
        assert torch.equal(program.tensor(name), tensor), name


def test_norms_stay_where_they_are_not_to_train() -> None:
    dense, program = captured("llama"), _prune(f"{MAGNITUDE},reconstruct{{steps=8,vectors=false}}")
    free = _prune(f"{MAGNITUDE},reconstruct{{steps=8}}")
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(program.tensor(norm), dense.tensor(norm))
    assert not torch.equal(free.tensor(norm), dense.tensor(norm))
    assert torch.equal(free.tensor("model.norm.weight"), dense.tensor("model.norm.weight")), "it stands in no block"


def test_the_same_run_gives_the_same_bits_and_another_seed_others() -> None:
    one, two = (_prune("nm_sparsify,reconstruct{steps=5}") for _ in range(2))
    other = _prune("nm_sparsify,reconstruct{steps=5,seed=1}")
    name = "model.layers.1.mlp.down_proj.weight"
    assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one.tensors())
    assert not torch.equal(one.tensor(name), other.tensor(name))


def test_branches_train_too() -> None:
    plain, program = (_prune(f"nm_sparsify,slorb{{k=4}}{tail}") for tail in ("", ",reconstruct{steps=24}"))
    branch = plain.sparse["model.layers.0.mlp.down_proj.weight"].branch
    assert branch is not None
    assert not torch.equal(plain.tensor(branch.weight), program.tensor(branch.weight))
    assert _relative_error(program) < _relative_error(plain)


@pytest.mark.parametrize(("dtype", "compute"), [(torch.bfloat16, "auto"), (torch.float32, "bfloat16")])
def test_low_precision(dtype: torch.dtype, compute: Any) -> None:
    model = BY_NAME["llama"].model().to(dtype)
    batches = [BY_NAME["llama"].inputs(2, tokens) for tokens in range(10, 18)]
    program = apply_passes(model, f"{MAGNITUDE},reconstruct{{steps=16}}", calibration=batches, compute=compute)
    for weight in program.sparse:
        assert program.tensor(weight).dtype is dtype
    assert len(_errors(program)) == 14
    assert all(after < before for before, after in _errors(program))


def test_an_interrupted_run_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BY_NAME["llama"].model()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*args, **options)

    monkeypatch.setattr(reconstruct_module, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_passes(model, f"{MAGNITUDE},reconstruct{{steps=2}}", calibration=BY_NAME["llama"].inputs(4, 8))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_layers_left_out_stay_and_are_accounted_for(sparse: Program) -> None:
    program = _prune("nm_sparsify,reconstruct{steps=4,ignore=*.mlp.*}")
    outcomes = {o.site: o for o in program.history[1].outcomes}
    assert outcomes["model.layers.0.mlp.up_proj"].reason == "ignored by '*.mlp.*'"
    assert outcomes["model.layers.0.self_attn.q_proj"].action == "rewritten"
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(program.tensor(weight), sparse.tensor(weight))


class _Interleaved(nn.Module):
    """Two numbered modules whose operations alternate."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in range(2))
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers

        for part in ("a", "b"):
            x = first[part](x).relu()  # type: ignore[index]
            x = second[part](x).relu()  # type: ignore[index]
        return self.last(x).relu() + 1  # type: ignore[no-any-return]


def test_blocks_that_are_mixed_are_left_alone_with_a_reason() -> None:
    torch.manual_seed(0)
    program = capture(_Interleaved().eval(), torch.randn(4, 8))
    blocks, refused = find_blocks(program, site_groups(program.sites()))
    assert [block.name for block in blocks] == ["layers.0", "last"]
    assert set(refused) == {"layers.1.a", "layers.1.b"}
    assert "mixed with those of another block" in refused["layers.1.a"]


def test_cross_attention_of_all_layers_is_divided_among_them() -> None:
    program = captured("t5")
    groups = site_groups([site for site in program.sites() if site.left_alone is None])
    blocks, refused = find_blocks(program, groups)
    assert not refused
    assert [block.name for block in blocks] == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    assert {site.name.split(".layer")[0] for site in blocks[2].sites} == {"decoder.block.0"}


def test_padding_and_silent_tokens_take_no_part_in_the_error() -> None:
    output, target = torch.tensor([[[1.0, 1.0], [9.0, 9.0]]]), torch.tensor([[[1.0, 2.0], [1.0, 1.0]]])
    assert float(token_error(output, target, torch.tensor([[True, False]]))) == pytest.approx(0.2)
    assert float(token_error(output, target)) == pytest.approx((0.2 + 64.0) / 2)
    assert float(token_error(torch.zeros(2, 3), torch.zeros(2, 3))) == 0.0


def test_batches_held_out_are_spread_and_never_trained_on() -> None:
    for num_batches in (2, 3, 16, 33):
        training, judging = held_out(num_batches)
        assert sorted([*training, *judging]) == list(range(num_batches))
        assert len(judging) == max(1, num_batches // 8)
    seen: list[int] = []

    def error(batch: int, values: Mapping[str, Tensor], _: Mapping[str, Tensor]) -> Tensor:
        if values["w"].requires_grad and torch.is_grad_enabled():
            seen.append(batch)
        return values["w"].square().sum()

    fit(error, {"w": Trained(start=torch.ones(2))}, 16, steps=28, lr=0.1, refresh_steps=1, seed=0)
    assert sorted(seen) == sorted(2 * held_out(16)[0])
