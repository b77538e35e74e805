"""The chunked loss and its gradients against the plain ones written from the formula, in float64."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sparsepass.graph import SparsepassError
from sparsepass.retrain.loss import divergence
from sparsepass.retrain.loss.divergence import FullDistribution, row_losses
from sparsepass.retrain.loss.objective import Distillation, distillation_loss, hidden_state_loss, next_token_targets
from sparsepass.retrain.teacher.online import OnlineTargets

pytestmark = pytest.mark.numerics

B, T, H, V = 3, 7, 5, 11


class Capped(nn.Module):
    """A head with more than a matmul: bias and soft cap, as Gemma has."""

    def __init__(self, features: int = H, vocabulary: int = V) -> None:
        super().__init__()
        self.linear = nn.Linear(features, vocabulary)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.linear(hidden) / 3) * 3


class Case:
    """A student's hidden states and head, a wider teacher, and tokens with padding."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.hidden = torch.randn(B, T, H, dtype=dtype, requires_grad=True)
        self.head = Capped().to(dtype)
        self.teacher_hidden = torch.randn(B, T, 2 * H, dtype=dtype)
        self.teacher_head = nn.Linear(2 * H, V).to(dtype).requires_grad_(False)
        self.ids = torch.randint(0, V, (B, T))
        self.mask = torch.ones(B, T, dtype=torch.int64)
        self.mask[1, 4:] = 0
        self.mask[2, :2] = 0
        self.labels = self.ids.clone()
        self.labels[0, 2:4] = -100

    def teacher(self) -> OnlineTargets:
        return OnlineTargets(self.teacher_hidden.reshape(B * T, -1), self.teacher_head)

    def targets(self) -> Tensor:
        return next_token_targets(self.ids, self.mask, self.labels)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [self.hidden, *self.head.parameters()], retain_graph=False))


def reference(case: Case, kd_weight: float, temperature: float, num_tokens: float, factor: float | None = None) -> Tensor:
    """The formula, token by token, with the probabilities written out."""
    total = torch.zeros((), dtype=torch.float64)
    factor = temperature**2 if factor is None else factor
    for b, t in itertools.product(range(B), range(T - 1)):
        if not (case.mask[b, t] and case.mask[b, t + 1]) or case.labels[b, t + 1] == -100:
            continue
        z, y = case.head(case.hidden[b, t]), case.teacher_head(case.teacher_hidden[b, t])
        q, q_soft = torch.exp(z) / torch.exp(z).sum(), torch.exp(z / temperature) / torch.exp(z / temperature).sum()
        p = torch.exp(y / temperature) / torch.exp(y / temperature).sum()
        kl = sum(p[v] * (torch.log(p[v]) - torch.log(q_soft[v])) for v in range(V))
        total = total + kd_weight * factor * kl - (1 - kd_weight) * torch.log(q[case.labels[b, t + 1]])
    return total / num_tokens


def agree(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> bool:
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("kd_weight", [0.0, 1 / 3, 1.0])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
def test_equals_the_formula(kd_weight: float, temperature: float, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "_CPU_PIECE", 2 * V)
    case = Case()
    teacher = case.teacher() if kd_weight else None
    options: dict[str, Any] = {"kd_weight": kd_weight, "temperature": temperature, "num_tokens": 17}
    found = distillation_loss(case.hidden, case.head, case.targets(), teacher, **options, chunk_tokens=chunk_tokens)
    expected = reference(case, kd_weight, temperature, 17)
    assert abs(found.loss.item() - expected.item()) < 1e-12
    assert found.num_counted == int((case.targets() != -100).sum()) == 11
    assert agree(case.gradients(found.loss), case.gradients(expected))
    mixed = (kd_weight * temperature**2 * found.kl_sum + (1 - kd_weight) * found.ce_sum) / 17
    assert torch.allclose(mixed, found.loss.detach())
    assert not found.kl_sum.requires_grad
    assert not found.ce_sum.requires_grad


def test_a_wrong_factor_is_caught() -> None:
    """The comparison above can fail: with T in place of T^2 it does."""
    case = Case()
    options: dict[str, Any] = {"kd_weight": 1 / 3, "temperature": 2.0, "num_tokens": 12}
    found = distillation_loss(case.hidden, case.head, case.targets(), case.teacher(), **options)
    planted = reference(case, 1 / 3, 2.0, 12, factor=2.0)
    assert abs(found.loss.item() - planted.item()) > 1e-2
    assert not agree(case.gradients(found.loss), case.gradients(planted), 1e-3)


@settings(max_examples=40)
@given(
    kd_weight=st.sampled_from([0.0, 0.3, 1.0]) | st.floats(0, 1),
    temperature=st.sampled_from([1.0]) | st.floats(0.5, 8),
    chunk_tokens=st.integers(1, 30),
    seed=st.integers(0, 1000),
    keep=st.lists(st.booleans(), min_size=B * T, max_size=B * T),
)
def test_any_chunks_any_mask(kd_weight: float, temperature: float, chunk_tokens: int, seed: int, keep: list[bool]) -> None:
    case = Case(seed=seed)
    targets = torch.where(torch.tensor(keep).view(B, T), case.ids, -100)
    options: dict[str, Any] = {"kd_weight": kd_weight, "temperature": temperature, "num_tokens": 9.5}
    found = distillation_loss(case.hidden, case.head, targets, case.teacher(), **options, chunk_tokens=chunk_tokens)
    z = case.head(case.hidden)[targets != -100]
    p = torch.softmax(case.teacher_head(case.teacher_hidden)[targets != -100] / temperature, -1)
    kl = (p * (p.log() - torch.log_softmax(z / temperature, -1))).sum()
    ce = nn.functional.cross_entropy(z, targets[targets != -100], reduction="sum")
    expected = (kd_weight * temperature**2 * kl + (1 - kd_weight) * ce) / 9.5
    assert torch.allclose(found.loss, expected, rtol=1e-11, atol=1e-12)
    assert agree(case.gradients(found.loss), case.gradients(expected), 1e-10)


def test_gradient_against_differences() -> None:
    """Central differences; torch's gradcheck goes backward twice, which this loss refuses."""
    case = Case()
    inputs = [case.hidden, *case.head.parameters()]

    def value() -> Distillation:
        options: dict[str, Any] = {"kd_weight": 0.67, "temperature": 2.0, "num_tokens": 12}
        return distillation_loss(case.hidden, case.head, case.targets(), case.teacher(), **options, chunk_tokens=4)

    found = case.gradients(value().loss)
    with torch.no_grad():
        for tensor, gradient in zip(inputs, found, strict=True):
            flat = tensor.view(-1)
            for i in range(0, flat.numel(), 3):
                old, sides = flat[i].item(), []
                for step in (1e-6, -1e-6):
                    flat[i] = old + step
                    sides.append(value().loss.item())
                flat[i] = old
                assert abs((sides[0] - sides[1]) / 2e-6 - gradient.view(-1)[i].item()) < 1e-8


@pytest.mark.parametrize("grads", [True, False])
def test_nothing_counts(grads: bool) -> None:
    case = Case()
    targets = torch.full((B, T), -100)
    with torch.set_grad_enabled(grads):
        found = distillation_loss(case.hidden, case.head, targets, case.teacher(), kd_weight=0.5, num_tokens=0)
    assert found.loss.item() == found.kl_sum.item() == found.ce_sum.item() == found.num_counted == 0
    if grads:
        assert all(bool((g == 0).all()) for g in case.gradients(found.loss))


def test_two_halves_equal_the_whole() -> None:
    case = Case()
    targets = case.targets()
    options: dict[str, Any] = {"kd_weight": 0.67, "temperature": 2.0, "num_tokens": 12}
    whole = case.gradients(distillation_loss(case.hidden, case.head, targets, case.teacher(), **options).loss)
    for tensor in (case.hidden, *case.head.parameters()):
        tensor.grad = None
    for rows in (slice(0, 1), slice(1, B)):
        hidden = case.teacher_hidden[rows].reshape(-1, 2 * H)
        teacher = OnlineTargets(hidden, case.teacher_head)
        distillation_loss(case.hidden[rows], case.head, targets[rows], teacher, **options).loss.backward()
    halves = [tensor.grad for tensor in (case.hidden, *case.head.parameters()) if tensor.grad is not None]
    assert agree(halves, whole)


def test_the_same_model_has_no_divergence() -> None:
    case = Case()
    teacher = OnlineTargets(case.hidden.detach().reshape(B * T, -1), case.head)
    found = distillation_loss(case.hidden, case.head, case.targets(), teacher, kd_weight=1.0, num_tokens=12)
    assert abs(found.kl_sum.item()) < 1e-14
    assert all(g.abs().max() < 1e-14 for g in case.gradients(found.loss))


def test_bf16_autocast() -> None:
    """Within what rounding logits to bf16 allows; gradients of the fp32 weight stay fp32 sums."""
    exact = Case()
    case = copy.deepcopy(exact)
    case.head.float()
    case.teacher_head.float()
    case.hidden = case.hidden.detach().float().requires_grad_()
    case.teacher_hidden = case.teacher_hidden.float()
    options: dict[str, Any] = {"kd_weight": 0.67, "temperature": 2.0, "num_tokens": 12, "chunk_tokens": 5}
    with torch.autocast("cpu", torch.bfloat16):
        found = distillation_loss(case.hidden, case.head, case.targets(), case.teacher(), **options)
    assert found.loss.dtype == torch.float32
    expected = reference(exact, 0.67, 2.0, 12)
    assert abs(found.loss.item() / expected.item() - 1) < 1e-2
    for a, b in zip(case.gradients(found.loss), exact.gradients(expected), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 3e-2


def test_low_precision_weights_add_up_in_fp32() -> None:
    """Many chunks, each far below the sum: adding in bf16 would stall."""
    head = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(head.weight)
    hidden = torch.ones(1, 2000, 1, dtype=torch.bfloat16)
    targets = torch.zeros(1, 2000, dtype=torch.int64)
    distillation_loss(hidden, head, targets, None, kd_weight=0.0, num_tokens=1, chunk_tokens=1).loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.bfloat16
    assert head.weight.grad[0].item() == -1000


def test_frozen_head_and_frozen_body() -> None:
    case = Case()
    options: dict[str, Any] = {"kd_weight": 0.5, "num_tokens": 12}
    whole = case.gradients(distillation_loss(case.hidden, case.head, case.targets(), case.teacher(), **options).loss)
    body_frozen = distillation_loss(case.hidden.detach(), case.head, case.targets(), case.teacher(), **options).loss
    assert agree(list(torch.autograd.grad(body_frozen, list(case.head.parameters()))), whole[1:])
    case.head.linear.weight.requires_grad_(False)
    loss = distillation_loss(case.hidden, case.head, case.targets(), case.teacher(), **options).loss
    found = torch.autograd.grad(loss, [case.hidden, case.head.linear.bias])
    assert agree(list(found), [whole[0], whole[2]])
    case.head.requires_grad_(False)
    loss = distillation_loss(case.hidden.detach(), case.head, case.targets(), case.teacher(), **options).loss
    assert not loss.requires_grad


def test_tied_weights_checkpointed_body_and_hooks() -> None:
    """A tied embedding gets both gradients, with the body checkpointed; a hook fires once, with the sum over chunks."""
    case = Case()
    table = nn.Embedding(V, H, dtype=torch.float64)
    mix = nn.Linear(H, H, dtype=torch.float64)
    head = nn.Linear(H, V, bias=False, dtype=torch.float64)
    head.weight = table.weight
    seen: list[Tensor] = []

    def body(ids: Tensor) -> Tensor:
        return torch.tanh(mix(table(ids)))

    z = head(body(case.ids))
    (nn.functional.cross_entropy(z[:, :-1].reshape(-1, V), case.ids[:, 1:].reshape(-1), reduction="sum") / 18).backward()
    parameters = [table.weight, mix.weight, mix.bias]
    expected = [p.grad.clone() for p in parameters if p.grad is not None]
    for p in parameters:
        p.grad = None
    handle = table.weight.register_hook(seen.append)
    hidden = checkpoint(body, case.ids, use_reentrant=False)
    targets = next_token_targets(case.ids)
    distillation_loss(hidden, head, targets, None, kd_weight=0.0, num_tokens=18, chunk_tokens=4).loss.backward()
    handle.remove()
    assert agree([p.grad for p in parameters if p.grad is not None], expected)
    assert len(seen) == 1


def test_one_gradient_for_two_parameters() -> None:
    """Autograd hands out one tensor for both biases: the sums must not share it."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(V)), nn.Parameter(torch.zeros(V))

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + self.a + self.b

    head, hidden = Twice(), torch.randn(1, 6, V)
    distillation_loss(hidden, head, torch.zeros(1, 6).long(), None, kd_weight=0.0, num_tokens=6, chunk_tokens=2).loss.backward()
    expected = torch.softmax(hidden, -1).mean((0, 1)) - nn.functional.one_hot(torch.tensor(0), V)
    assert head.a.grad is not None
    assert head.b.grad is not None
    assert torch.allclose(head.a.grad, expected, atol=1e-6)
    assert torch.allclose(head.b.grad, expected, atol=1e-6)


def test_the_loss_scales_and_goes_backward_once() -> None:
    case = Case()
    options: dict[str, Any] = {"kd_weight": 0.5, "num_tokens": 12}

    def loss() -> Tensor:
        return distillation_loss(case.hidden, case.head, case.targets(), case.teacher(), **options).loss

    assert agree(case.gradients(loss() * 4), [4 * g for g in case.gradients(loss())])
    kept = loss()
    kept.backward(retain_graph=True)
    with pytest.raises(SparsepassError, match="only once"):
        kept.backward()


class _Sizes(TorchDispatchMode):
    """Records the largest tensor that any operation makes, and what autocast casts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = self.largest_wide = 0
        self.casts: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                if func is torch.ops.aten._to_copy.default and tensor.dtype == torch.bfloat16:
                    self.casts.append(tuple(tensor.shape))
                if tensor.element_size() >= 4:
                    self.largest_wide = max(self.largest_wide, tensor.numel())
        return out


@pytest.mark.parametrize("grads", [True, False])
def test_logits_are_never_whole(grads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of more than one chunk's logits, and in fp32 none of more than a piece (or the head's weight)."""
    monkeypatch.setattr(divergence, "_CPU_PIECE", 4 * 1000)
    features, vocabulary, tokens, chunk = 4, 1000, 256, 32
    head = nn.Linear(features, vocabulary, bias=False)
    teacher = OnlineTargets(torch.randn(tokens, features), nn.Linear(features, vocabulary).requires_grad_(False))
    hidden = torch.randn(1, tokens, features, requires_grad=True)
    targets = torch.randint(0, vocabulary, (1, tokens))
    options: dict[str, Any] = {"kd_weight": 0.5, "num_tokens": tokens, "chunk_tokens": chunk}
    with torch.set_grad_enabled(grads), torch.autocast("cpu", torch.bfloat16), _Sizes() as sizes:
        distillation_loss(hidden, head, targets, teacher, **options)
    assert sizes.largest == chunk * vocabulary
    assert sizes.largest_wide == 4 * vocabulary
    assert sizes.casts.count((vocabulary, features)) == 1 + tokens // chunk, (
        "the student's weight once, the teacher's each time"
    )


def test_the_head_runs_once_per_chunk_and_takes_no_gradient_in_validation() -> None:
    case = Case()
    calls: list[bool] = []
    case.head.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    options: dict[str, Any] = {"kd_weight": 0.5, "num_tokens": 12, "chunk_tokens": 5}
    trained = distillation_loss(case.hidden, case.head, case.targets(), case.teacher(), **options)
    trained.loss.backward()
    assert calls == [True] * 3
    calls.clear()
    with torch.no_grad():
        found = distillation_loss(case.hidden, case.head, case.targets(), case.teacher(), **options)
    assert calls == [False] * 3
    assert not found.loss.requires_grad
    assert torch.equal(found.loss, trained.loss.detach())


# Torch's own, when it goes on after a graph break with a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_callers() -> None:
    """A compiled caller breaks its graph around the loss and gives the same numbers."""
    case = Case()

    def step(hidden: Tensor) -> Tensor:
        return distillation_loss(hidden * 2, case.head, case.targets(), None, kd_weight=0.0, num_tokens=12).loss

    compiled: Callable[[Tensor], Tensor] = torch.compile(step, backend="eager")
    assert torch.allclose(compiled(case.hidden), step(case.hidden))
    torch._dynamo.reset()


def test_targets_of_each_position() -> None:
    ids = torch.tensor([[9, 5, 6, 7], [9, 5, 6, 7]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    assert next_token_targets(ids).tolist() == [[5, 6, 7, -100]] * 2
    assert next_token_targets(ids, mask).tolist() == [[-100, 6, 7, -100], [5, 6, -100, -100]]
    labels = torch.tensor([[-100, -100, 6, 7], [9, 5, -100, 7]])
    assert next_token_targets(ids, None, labels).tolist() == [[-100, 6, 7, -100], [5, -100, 7, -100]]
    assert next_token_targets(torch.tensor([[3]])).tolist() == [[-100]]


def test_hidden_states_against_the_formula() -> None:
    case = Case()
    student, teacher = [case.hidden, case.hidden * 2], [torch.randn(B, T, H, dtype=torch.float64) for _ in range(2)]
    valid = case.targets() != -100
    found = hidden_state_loss(student, teacher, valid, num_tokens=12)
    expected = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        for b, i in valid.nonzero().tolist():
            expected = expected + (1 + ((s[b, i] - t[b, i]) ** 2).sum() / (t[b, i] ** 2).sum()).log() / (2 * 12)
    assert torch.allclose(found, expected, rtol=1e-12)
    a, b = (torch.autograd.grad(loss, case.hidden, retain_graph=True)[0] for loss in (found, expected))
    assert torch.allclose(a, b, rtol=1e-11)
    assert not a[~valid].any()
    assert hidden_state_loss(student, teacher, torch.zeros(B, T, dtype=torch.bool), num_tokens=0).item() == 0


def test_a_token_with_a_huge_state_does_not_make_the_gradient_of_hidden_states() -> None:
    teacher = torch.randn(1, 2, H, dtype=torch.float64)
    student = (teacher * torch.tensor([[[1000.0], [1.1]]])).requires_grad_()
    loss = hidden_state_loss([student], [teacher], torch.ones(1, 2, dtype=torch.bool), num_tokens=2)
    huge, ordinary = torch.autograd.grad(loss, student)[0][0].norm(dim=-1).tolist()
    assert huge < ordinary
    silent = hidden_state_loss([student], [teacher * 0], torch.ones(1, 2, dtype=torch.bool), num_tokens=2)
    assert silent.isfinite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kd_weight": 1.5}, r"kd_weight must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        ({"num_tokens": 0}, "num_tokens is 0, but 11 positions count"),
        ({"teacher": None}, "there is no teacher"),
        ({"targets": torch.zeros(2, 2, dtype=torch.int64)}, r"expected \[B, T, H\] and \[B, T\]"),
        ({"targets": torch.full((B, T), V)}, f"targets hold token {V}, but the head gives {V} logits"),
        ({"targets": torch.full((B, T), -1)}, "targets hold -1"),
        ({"head": nn.Flatten()}, r"expected \[1, N, V\]"),
        ({"teacher": OnlineTargets(torch.zeros(B * T, 2), nn.Linear(2, V + 1))}, "needs one vocabulary"),
    ],
)
def test_mistakes_are_told(changes: dict[str, Any], message: str) -> None:
    case = Case(torch.float32)
    options: dict[str, Any] = {"kd_weight": 0.5, "temperature": 2.0, "num_tokens": 12, "chunk_tokens": 4}
    options |= {"head": case.head, "targets": case.targets(), "teacher": case.teacher()} | changes
    head, targets, teacher = (options.pop(name) for name in ("head", "targets", "teacher"))
    with pytest.raises(SparsepassError, match=message):
        distillation_loss(case.hidden, head, targets, teacher, **options)


def test_mistakes_about_hidden_states_and_labels_are_told() -> None:
    state, valid = torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(SparsepassError, match="student gives 1 hidden states, the teacher 2"):
        hidden_state_loss([state], [state, state], valid, num_tokens=1)
    with pytest.raises(SparsepassError, match="hidden state 0 is"):
        hidden_state_loss([state], [torch.zeros(1, 2, 4)], valid, num_tokens=1)
    with pytest.raises(SparsepassError, match="num_tokens is 0, but 2 positions count"):
        hidden_state_loss([state], [state], valid, num_tokens=0)
    with pytest.raises(SparsepassError, match="labels has shape"):
        next_token_targets(torch.zeros(1, 3), None, torch.zeros(1, 2))


def test_rows_are_upcast_in_pieces_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the pieces changes nothing, and the logits given stay as they were."""
    z, y = torch.randn(9, V, dtype=torch.bfloat16), torch.randn(9, V, dtype=torch.bfloat16)
    before, targets, found = z.clone(), torch.randint(0, V, (9,)), []
    for piece in (V, 4 * V, 100 * V):
        monkeypatch.setattr(divergence, "_CPU_PIECE", piece)
        for temperature in (1.0, 2.0):
            found.append(row_losses(z, targets, FullDistribution(y), kd_weight=0.3, temperature=temperature, gradient=True))
    assert torch.equal(z, before)
    for a, b in zip(found[2:], found[:2] * 2, strict=True):
        assert torch.allclose(a.kl, b.kl)
        assert torch.allclose(a.ce, b.ce)
        assert a.gradient is not None
        assert b.gradient is not None
        assert torch.equal(a.gradient, b.gradient)
