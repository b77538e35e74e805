"""The optimizers against slow float64 references written from the formulas, and against torch's own."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsepass.graph import SparsepassError
from sparsepass.passes.maths.pattern import NMPattern, nm_mask
from sparsepass.retrain import optimizers
from sparsepass.retrain.optimizers import ASTSGD, AdamS, ASTAdamW

pytestmark = pytest.mark.numerics

STEPS, REFRESH = 25, 5
PATTERN = NMPattern(2, 4)


def gradient(weight: list[float], step: int) -> list[float]:
    """A gradient that depends on the weight and on the step, so that errors grow."""
    return [math.sin(3 * w + 0.7 * i + step) + 0.2 * w for i, w in enumerate(weight)]


def reference_adamw(w: list[float], state: dict[str, list[float]], g: list[float], keep: list[bool], t: int, o: Any) -> None:
    b1, b2 = o["betas"]
    for i in range(len(w)):
        w[i] *= 1 - o["lr"] * o["weight_decay"]
        state["m"][i] = b1 * state["m"][i] + (1 - b1) * g[i]
        d = o["decay"] * (1 - keep[i]) * w[i]
        state["v"][i] = b2 * state["v"][i] + (1 - b2) * (g[i] + d) ** 2
        w[i] -= o["lr"] / (1 - b1**t) * (state["m"][i] + d) / (math.sqrt(state["v"][i]) / math.sqrt(1 - b2**t) + o["eps"])


def reference_sgd(w: list[float], state: dict[str, list[float]], g: list[float], keep: list[bool], t: int, o: Any) -> None:
    for i in range(len(w)):
        state["m"][i] = o["momentum"] * state["m"][i] + g[i] + o["weight_decay"] * w[i]
        w[i] -= o["lr"] * (state["m"][i] + o["decay"] * (1 - keep[i]) * w[i])


def reference_adams(w: list[float], state: dict[str, list[float]], g: list[float], keep: list[bool], t: int, o: Any) -> None:
    b1, b2 = o["betas"]
    a = o["progress"]
    for i in range(len(w)):
        state["m"][i] = b1 * state["m"][i] + (1 - b1) * g[i]
        driven = state["m"][i] if keep[i] else (1 - a) * state["m"][i] + a * o["decay"] * math.copysign(1, w[i])
        state["v"][i] = b2 * state["v"][i] + (1 - b2) * driven**2
        w[i] *= 1 - o["lr"] * o["weight_decay"]
        w[i] -= o["lr"] / (1 - b1**t) * driven / (math.sqrt(state["v"][i] / (1 - b2**t)) + o["eps"])


ADAM = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "decay": 0.0}
CASES: dict[str, tuple[type[Any], Callable[..., None], dict[str, Any]]] = {
    "adamw": (ASTAdamW, reference_adamw, ADAM),
    "sgd": (ASTSGD, reference_sgd, {"lr": 0.05, "momentum": 0.0, "weight_decay": 0.0, "decay": 0.0}),
    "sgd with momentum": (ASTSGD, reference_sgd, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "decay": 0.0}),
    "adams": (AdamS, reference_adams, ADAM | {"decay": 0.02, "progress": 0.0}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("piece", [1 << 17, 5])
def test_equals_the_formulas_with_a_moving_mask(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step, masks included: they are refreshed by magnitude as in training, and both sides must agree on them."""
    monkeypatch.setattr(optimizers, "_CPU_PIECE", piece)
    kind, reference, options = CASES[name]
    options = dict(options)
    start = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = nn.Parameter(start.clone())
    mask = nm_mask(start, PATTERN)
    optimizer = kind([weight], {weight: mask}, **options)
    slow, keep = start.flatten().tolist(), mask.flatten().tolist()
    state = {"m": [0.0] * len(slow), "v": [0.0] * len(slow)}
    moved = 0
    for step in range(1, STEPS + 1):
        annealed = {"progress": step / STEPS} if name == "adams" else {"decay": 0.3 * min(step, 15)}
        options |= annealed
        optimizer.param_groups[0].update(annealed)
        weight.grad = torch.tensor(gradient(weight.detach().flatten().tolist(), step), dtype=torch.float64).view(6, 8)
        optimizer.step()
        reference(slow, state, gradient(slow, step), keep, step, options)
        torch.testing.assert_close(weight.detach().flatten(), torch.tensor(slow, dtype=torch.float64), rtol=1e-9, atol=1e-10)
        if step % REFRESH == 0:
            fresh = nm_mask(weight.detach(), PATTERN)
            moved += int((fresh != mask).sum())
            mask.copy_(fresh)
            slow_fresh = nm_mask(torch.tensor(slow, dtype=torch.float64).view(6, 8), PATTERN)
            assert torch.equal(mask, slow_fresh)
            keep = mask.flatten().tolist()
    assert moved, "the mask never moved, so nothing was shown about moving masks"


@pytest.mark.parametrize("shape", [(7, 12), (3, 5, 8), (11,)])
@pytest.mark.parametrize("mask_kind", ["all ones", "none"])
def test_with_nothing_masked_adamw_is_torchs(shape: tuple[int, ...], mask_kind: str) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.zeros(shape))
    theirs.data.copy_(ours.data)
    masks: dict[Tensor, Tensor] = {ours: torch.ones(shape, dtype=torch.bool)} if mask_kind == "all ones" else {}
    a = ASTAdamW([ours], masks, lr=3e-3, weight_decay=0.1, decay=0.5)
    b = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    slow = nn.Parameter(theirs.detach().clone())
    c = torch.optim.AdamW([slow], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=False, fused=False)
    for _ in range(20):
        ours.grad = torch.randn(shape)
        theirs.grad, slow.grad = ours.grad.clone(), ours.grad.clone()
        a.step()
        b.step()
        c.step()
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, slow, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_with_nothing_masked_sgd_is_torchs(momentum: float) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(7, 12)), nn.Parameter(torch.zeros(7, 12))
    theirs.data.copy_(ours.data)
    a = ASTSGD([ours], {ours: torch.ones(7, 12, dtype=torch.bool)}, lr=0.1, momentum=momentum, weight_decay=0.01, decay=0.5)
    b = torch.optim.SGD([theirs], lr=0.1, momentum=momentum, weight_decay=0.01, foreach=False, fused=False)
    for _ in range(20):
        ours.grad = torch.randn(7, 12)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
        assert torch.equal(ours, theirs)


def shrinks(kind: type[Any]) -> bool:
    """Whether decay alone brings every masked weight nearer to zero and leaves the kept ones where they are."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, -4.0] * 3).view(3, 4))
    mask = nm_mask(weight.detach(), PATTERN)
    optimizer = kind([weight], {weight: mask}, lr=0.01, decay=0.1)
    before = weight.detach().abs().clone()
    for _ in range(5):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    after = weight.detach().abs()
    return bool((after[~mask] < before[~mask]).all()) and torch.equal(after[mask], before[mask])


@pytest.mark.parametrize("kind", [ASTAdamW, ASTSGD])
def test_decay_shrinks_masked_weights(kind: type[Any]) -> None:
    assert shrinks(kind)


@pytest.mark.parametrize("kind", [ASTAdamW, ASTSGD])
def test_the_released_codes_sign_error_would_be_caught(kind: type[Any]) -> None:
    """`~` on an int32 mask gives -1 for a masked weight's 0 ... and -2 for a 1: planted here, it must fail the check."""

    class Planted(kind):  # type: ignore[misc]
        def _update(self, weight: Tensor, grad: Tensor, moments: list[Tensor], mask: Tensor, step: int, group: Any) -> None:
            wrong = (~mask.int()).to(weight.dtype)
            super()._update(weight, grad + group["decay"] * wrong * weight, moments, None, step, group)

    assert not shrinks(Planted)


def test_decay_does_not_enter_the_first_moment() -> None:
    weight = nn.Parameter(torch.ones(1, 4))
    optimizer = ASTAdamW([weight], {weight: torch.tensor([[True, True, False, False]])}, lr=0.01, decay=0.5)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    assert torch.equal(state["exp_avg"], torch.zeros(1, 4))
    assert (state["exp_avg_sq"] > 0).tolist() == [[False, False, True, True]]


def test_state_goes_on_where_it_was_saved() -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 8)) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    mask = nm_mask(weights[0].detach(), PATTERN)
    grads = [torch.randn(4, 8) for _ in range(6)]
    first, second = (ASTAdamW([w], {w: mask}, lr=0.01, decay=0.2) for w in weights)
    for grad in grads[:3]:
        weights[0].grad = grad
        first.step()
    weights[1].data.copy_(weights[0].data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch would share the moments
    for grad in grads[3:]:
        for weight, optimizer in zip(weights, (first, second), strict=True):
            weight.grad = grad.clone()
            optimizer.step()
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w, m: ASTAdamW([w], {w: m.int()}), "masks are bool, got torch.int32"),
        (lambda w, m: ASTAdamW([w], {w: m[:1]}), "has shape"),
        (lambda w, m: ASTAdamW([w], {nn.Parameter(w.detach().clone()): m}), "not optimized"),
        (lambda w, m: ASTAdamW([w], {w: m}, lr=-1.0), "lr must be at least 0, got -1"),
        (lambda w, m: ASTAdamW([w], {w: m}, decay=math.nan), "decay must be at least 0, got nan"),
        (lambda w, m: ASTAdamW([w], {w: m}, betas=(0.9, 1.0)), "betas"),
        (lambda w, m: ASTSGD([w], {w: m}, momentum=1.0), "momentum"),
        (lambda w, m: AdamS([w], {w: m}, progress=1.5), "progress"),
        (lambda w, m: AdamS([b := nn.Parameter(w.detach().bfloat16())], {b: m}), "fp32 master weights"),
    ],
)
def test_bad_options_are_named(make: Callable[[Tensor, Tensor], Any], message: str) -> None:
    weight = nn.Parameter(torch.randn(2, 4))
    with pytest.raises(SparsepassError, match=message):
        make(weight, nm_mask(weight.detach(), PATTERN))
