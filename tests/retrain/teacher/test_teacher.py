"""The teacher in memory and the cached one: the bucketed divergence against autograd, and what a cache refuses."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st
from tests.families import BY_NAME, captured
from torch import Tensor, nn

from sparsepass.graph import SparsepassError
from sparsepass.passes import apply_passes
from sparsepass.retrain.config import RetrainConfig
from sparsepass.retrain.loss.divergence import FullDistribution, TeacherTargets, TopKDistribution, row_losses
from sparsepass.retrain.loss.objective import distillation_loss, next_token_targets
from sparsepass.retrain.teacher.cache import top_k, write_teacher_cache
from sparsepass.retrain.teacher.cached import MANIFEST_FILE, CachedTeacher, CacheManifest
from sparsepass.retrain.teacher.online import OnlineTeacher, check_hidden

S, T, V, H = 10, 6, 23, 5


class Body(nn.Module):
    """A causal body: each position sees the mean of what came."""

    def __init__(self, features: int, vocabulary: int = V) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, features)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        assert attention_mask is None or attention_mask.shape == input_ids.shape
        out: Tensor = self.table(input_ids).cumsum(1)
        return out


def online(seed: int = 0, vocabulary: int = V, features: int = 2 * H) -> OnlineTeacher:
    torch.manual_seed(seed)
    return OnlineTeacher(Body(features, vocabulary), nn.Linear(features, vocabulary))


def sequences(seed: int = 1) -> Tensor:
    return torch.randint(0, V, (S, T), generator=torch.Generator().manual_seed(seed))


def loss_and_gradient(targets: TeacherTargets, ids_BT: Tensor, temperature: float = 2.0) -> tuple[float, Tensor]:
    torch.manual_seed(5)
    head, hidden = nn.Linear(H, V), torch.randn(*ids_BT.shape, H, requires_grad=True)
    options: dict[str, Any] = {"kd_weight": 1.0, "temperature": temperature, "num_tokens": 1, "chunk_tokens": 7}
    found = distillation_loss(hidden, head, next_token_targets(ids_BT), targets, **options)
    found.loss.backward()
    assert hidden.grad is not None
    return found.kl_sum.item(), hidden.grad


def cached(folder: Path, temperature: float = 2.0) -> CachedTeacher:
    return CachedTeacher(folder, temperature=temperature, vocab_size=V)


def bucketed(z_NV: Tensor, y_NV: Tensor, k: int, temperature: float) -> Tensor:
    """KL over the k most probable tokens and one event for all others, written out; differentiable in z."""
    p_NV, q_NV = torch.softmax(y_NV / temperature, -1), torch.softmax(z_NV / temperature, -1)
    total = torch.zeros((), dtype=z_NV.dtype)
    for p_V, q_V in zip(p_NV, q_NV, strict=True):
        order = p_V.argsort(descending=True)
        kept, rest = order[:k], order[k:]
        total = total + (p_V[kept] * (p_V[kept] / q_V[kept]).log()).sum()
        if len(rest):
            total = total + p_V[rest].sum() * (p_V[rest].sum() / q_V[rest].sum()).log()
    return total


@settings(max_examples=40)
@given(
    k=st.integers(1, V),
    temperature=st.sampled_from([1.0, 2.0]) | st.floats(0.5, 5),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_bucketed_divergence(k: int, temperature: float, seed: int, scale: float) -> None:
    """Equals autograd on the definition, is a lower bound, and is the whole for k = V."""
    torch.manual_seed(seed)
    z_NV = (scale * torch.randn(4, V, dtype=torch.float64)).requires_grad_()
    y_NV = scale * torch.randn(4, V, dtype=torch.float64)
    index, _, (tail,) = top_k(y_NV, k, [temperature])
    log_p = torch.log_softmax(y_NV / temperature, -1).gather(-1, index)
    kept = TopKDistribution(index, log_p, tail, vocab_size=V, temperature=temperature)
    options: dict[str, Any] = {"kd_weight": 1.0, "temperature": temperature, "gradient": True}
    found = row_losses(z_NV.detach(), torch.zeros(4).long(), kept, **options)
    expected = bucketed(z_NV, y_NV, k, temperature)
    (gradient,) = torch.autograd.grad(temperature**2 * expected, z_NV)
    assert found.gradient is not None
    assert torch.allclose(found.kl, expected, rtol=1e-9, atol=1e-12)
    assert torch.allclose(found.gradient, gradient, rtol=1e-8, atol=1e-11)
    full = row_losses(z_NV.detach(), torch.zeros(4).long(), FullDistribution(y_NV), **options)
    assert found.kl <= full.kl + 1e-10
    if k == V:
        assert torch.allclose(found.kl, full.kl, rtol=1e-10)
        assert full.gradient is not None
        assert torch.allclose(found.gradient, full.gradient, rtol=1e-9, atol=1e-12)


def test_a_vanished_tail_stays_finite() -> None:
    """A student that rules the tail out, and a teacher whose kept entries round to nothing."""
    z = torch.tensor([[300.0, 0.0, 0.0]])
    teacher = TopKDistribution(
        torch.tensor([[0]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log(), vocab_size=3, temperature=1.0
    )
    found = row_losses(z, torch.tensor([0]), teacher, kd_weight=1.0, temperature=1.0, gradient=True)
    assert found.gradient is not None
    assert found.kl.isfinite()
    assert found.gradient.isfinite().all()
    assert found.kl > 10


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_entries_cached_equal_the_teacher_in_memory(tmp_path: Path, temperature: float) -> None:
    """The teacher's hidden size differs from the student's; logits were rounded to fp16, hence the tolerance."""
    teacher, data = online(), sequences()
    manifest = write_teacher_cache(tmp_path, teacher, data, k=V, temperatures=(1.0, 2.0), batch_size=4, shard_sequences=3)
    assert (manifest.num_sequences, manifest.complete, manifest.vocab_size, manifest.context) == (S, True, V, T)
    assert [count for _, count, _ in manifest.shards] == [3, 3, 3, 1]
    picked = torch.tensor([7, 0, 9])
    expected, gradient = loss_and_gradient(teacher.targets(data[picked]), data[picked], temperature)
    targets = cached(tmp_path, temperature).targets(data[picked], torch.ones(3, T), picked)
    found, found_gradient = loss_and_gradient(targets, data[picked], temperature)
    assert abs(found / expected - 1) < 2e-3
    assert (found_gradient - gradient).norm() / gradient.norm() < 2e-3


def test_a_cache_is_written_under_autocast(tmp_path: Path) -> None:
    """And read: as on a processor that is fast in bfloat16."""
    data = sequences()
    with torch.autocast("cpu", torch.bfloat16):
        assert write_teacher_cache(tmp_path, online(), data, k=3).complete
        targets = cached(tmp_path).targets(data[:2], torch.ones(2, T), torch.arange(2))
        assert loss_and_gradient(targets, data[:2])[0] > 0


def test_fewer_entries_are_a_lower_bound_that_grows(tmp_path: Path) -> None:
    teacher, data = online(), sequences()
    found = []
    for k in (1, 4, 12, V):
        write_teacher_cache(tmp_path / str(k), teacher, data, k=k)
        targets = cached(tmp_path / str(k)).targets(data, None, torch.arange(S))
        found.append(loss_and_gradient(targets, data)[0])
    whole, _ = loss_and_gradient(teacher.targets(data), data)
    assert 0 < found[0] < found[1] < found[2] < whole * (1 + 2e-3)
    assert abs(found[3] / whole - 1) < 2e-3


def test_size_is_what_the_documentation_says(tmp_path: Path) -> None:
    vocabulary, k, tokens = 400, 64, 512
    teacher = online(vocabulary=vocabulary)
    data = torch.randint(0, vocabulary, (4, tokens))
    manifest = write_teacher_cache(tmp_path, teacher, data, k=k)
    assert abs(sum(size for _, _, size in manifest.shards) / (4 * tokens) - (k * 4 + 4)) < 1


class _Stop(Exception):  # noqa: N818, not an error
    pass


def interrupted(data: Tensor, after: int) -> Iterator[Tensor]:
    yield from data[:after]
    raise _Stop


def test_an_interrupted_write_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, data = online(), sequences()
    options: dict[str, Any] = {"k": 5, "batch_size": 2, "shard_sequences": 4}
    write_teacher_cache(tmp_path / "whole", teacher, data, **options)
    part = tmp_path / "part"
    with pytest.raises(_Stop):
        write_teacher_cache(part, teacher, interrupted(data, 7), **options)
    manifest = CacheManifest.read(part)
    assert (manifest.num_sequences, manifest.complete) == (4, False)
    cached(part).targets(data[:4], None, torch.arange(4))
    with pytest.raises(SparsepassError, match=r"sequence 4 is not in .* which holds 4 \(unfinished"):
        cached(part).targets(data[4:5], None, torch.tensor([4]))
    ran: list[int] = []
    targets = OnlineTeacher.targets

    def counted(self: OnlineTeacher, ids: Tensor) -> TeacherTargets:
        ran.append(len(ids))
        return targets(self, ids)

    monkeypatch.setattr(OnlineTeacher, "targets", counted)
    assert write_teacher_cache(part, teacher, iter(data), **options) == CacheManifest.read(tmp_path / "whole")
    assert sum(ran) == S - 4
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (part / path.name).read_bytes()
    ran.clear()
    assert write_teacher_cache(part, teacher, data, **options).complete
    assert not ran


def test_a_shard_half_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, data = online(), sequences()
    save = safetensors.torch.save_file
    calls: list[Path] = []

    def breaks(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", breaks)
    with pytest.raises(SparsepassError, match=r"the disk is full: .*shard-00001"):
        write_teacher_cache(tmp_path, teacher, data, k=3, shard_sequences=4, batch_size=4)
    assert CacheManifest.read(tmp_path).num_sequences == 4
    monkeypatch.undo()
    assert write_teacher_cache(tmp_path, teacher, data, k=3, shard_sequences=4, batch_size=4).num_sequences == S
    assert not list(tmp_path.glob(".*.partial"))


def test_more_data_extends_a_cache(tmp_path: Path) -> None:
    teacher, data = online(), sequences()
    assert write_teacher_cache(tmp_path, teacher, data, k=3, num_sequences=4).num_sequences == 4
    assert write_teacher_cache(tmp_path, teacher, data, k=3).num_sequences == S
    cached(tmp_path).targets(data, None, torch.arange(S))


def test_progress_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_teacher_cache(tmp_path, online(), sequences(), k=3, num_sequences=S, progress=True)
    assert "caching the teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 4}, "k is 3 there, 4 here"),
        ({"temperatures": (1.0,)}, r"temperatures is \(2.0,\) there, \(1.0,\) here"),
        ({"teacher": online(seed=3)}, "holds another teacher cache: teacher is"),
        ({"about": {"model": "other"}}, "about is"),
        ({"sequences": sequences(2)}, "sequence 0 has other tokens"),
        ({"k": 0}, "must be at least 1"),
        ({"temperatures": ()}, "temperatures must be positive, and at least one"),
    ],
)
def test_another_cache_is_not_touched(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_teacher_cache(tmp_path, online(), sequences(), k=3, about={"model": "this"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    options: dict[str, Any] = {"teacher": online(), "sequences": sequences(), "k": 3, "about": {"model": "this"}} | changes
    with pytest.raises(SparsepassError, match=message):
        write_teacher_cache(tmp_path, **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x", encoding="utf-8")
    with pytest.raises(SparsepassError, match="not empty and holds no teacher cache"):
        write_teacher_cache(tmp_path / "other", online(), sequences())
    with pytest.raises(SparsepassError, match=f"vocabulary has {V} tokens"):
        write_teacher_cache(tmp_path / "large", online(), sequences(), k=V + 1)
    with pytest.raises(SparsepassError, match="all need the same number of tokens"):
        write_teacher_cache(tmp_path / "ragged", online(), [torch.zeros(3).long(), torch.zeros(4).long()], k=3)
    with pytest.raises(SparsepassError, match="no sequences to cache"):
        write_teacher_cache(tmp_path / "empty", online(), [], k=3)


def test_another_run_cannot_read_a_cache(tmp_path: Path) -> None:
    data = sequences()
    write_teacher_cache(tmp_path, online(), data, k=3)
    with pytest.raises(SparsepassError, match=r"holds temperatures \[2.0\], the loss uses 1.0"):
        cached(tmp_path, 1.0)
    with pytest.raises(SparsepassError, match=f"vocabulary of {V}, the student has 99"):
        CachedTeacher(tmp_path, temperature=2.0, vocab_size=99)
    teacher = cached(tmp_path)
    with pytest.raises(SparsepassError, match="sequence 1 has other tokens"):
        teacher.targets(data[[0, 2]], None, torch.tensor([0, 1]))
    with pytest.raises(SparsepassError, match="needs the global index of each of the 2"):
        teacher.targets(data[:2])
    with pytest.raises(SparsepassError, match="sequence 10 is not in"):
        teacher.targets(data[:1], None, torch.tensor([S]))
    with pytest.raises(SparsepassError, match="holds sequences of 6 tokens, the batch has 5"):
        teacher.targets(data[:1, :5], None, torch.tensor([0]))
    with pytest.raises(SparsepassError, match="padding on the right only"):
        teacher.targets(data[:1], torch.tensor([[0, 1, 1, 1, 1, 1]]), torch.tensor([0]))
    targets = teacher.targets(data[:1], None, torch.tensor([0]))
    with pytest.raises(SparsepassError, match=r"taken at temperature 2\.0, the loss asks for 1\.0"):
        loss_and_gradient(targets, data[:1], temperature=1.0)
    with pytest.raises(SparsepassError, match="one vocabulary"):
        distillation_loss(
            torch.zeros(1, T, H), nn.Linear(H, V + 2), next_token_targets(data[:1]), targets, kd_weight=1.0, num_tokens=5
        )


def test_damage_is_told(tmp_path: Path) -> None:
    data = sequences()
    with pytest.raises(SparsepassError, match=f"holds no {MANIFEST_FILE}"):
        cached(tmp_path)
    manifest = write_teacher_cache(tmp_path, online(), data, k=3)
    shard = tmp_path / manifest.shards[0][0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(SparsepassError, match=f"bytes, expected {len(whole)} bytes"):
        cached(tmp_path).targets(data[:1], None, torch.tensor([0]))
    shard.write_bytes(b"\xff" * len(whole))
    with pytest.raises(SparsepassError, match="cannot be read"):
        cached(tmp_path).targets(data[:1], None, torch.tensor([0]))
    shard.unlink()
    with pytest.raises(SparsepassError, match="is gone"):
        cached(tmp_path).targets(data[:1], None, torch.tensor([0]))
    text = (tmp_path / MANIFEST_FILE).read_text(encoding="utf-8")
    (tmp_path / MANIFEST_FILE).write_text(text[:-20], encoding="utf-8")
    with pytest.raises(SparsepassError, match="is damaged"):
        cached(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(json.loads(text) | {"format": 99}), encoding="utf-8")
    with pytest.raises(SparsepassError, match="has format 99"):
        cached(tmp_path)


def test_large_vocabularies_and_small_integers(tmp_path: Path) -> None:
    """Tokens above 32767 and above 65535 survive their storage."""
    for vocabulary in (40_000, 70_000):
        data = torch.randint(0, vocabulary, (2, 4))
        teacher = online(vocabulary=vocabulary, features=3)
        write_teacher_cache(tmp_path / str(vocabulary), teacher, data, k=7)
        targets = CachedTeacher(tmp_path / str(vocabulary), temperature=2.0).targets(data.int(), None, torch.arange(2))
        expected = teacher.targets(data).logits(torch.arange(8)).topk(7).indices
        assert torch.equal(targets.rows(torch.arange(8))._index_NK, expected)
        assert expected.max() > 32767


def test_the_fingerprint_tells_models_apart() -> None:
    assert online().fingerprint() == online().fingerprint()
    assert online().fingerprint() != online(seed=1).fingerprint()
    changed = online()
    with torch.no_grad():
        next(changed._body.parameters())[3, 2] += 1e-6
    assert changed.fingerprint() != online().fingerprint()


def test_the_teacher_in_memory_takes_no_gradient() -> None:
    teacher, data = online(), sequences()
    targets = teacher.targets(data)
    assert not targets.logits(torch.arange(4)).requires_grad
    loss_and_gradient(targets, data)
    assert all(p.grad is None for module in (teacher._body, teacher._head) for p in module.parameters())
    with pytest.raises(SparsepassError, match=r"expected \[B, T, H\]"):
        OnlineTeacher(_Flat(), nn.Linear(3, V)).targets(data)


class _Flat(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.zeros(input_ids.numel(), 3)


def test_hidden_states_in_another_order_are_not_compared() -> None:
    dense = captured("llama")
    student = apply_passes(dense, ["permute_channels", "nm_sparsify{criterion=magnitude}"])
    config = RetrainConfig(max_steps=1, hidden_weight=0.1)
    for teacher in (dense, BY_NAME["llama"].model()):
        with pytest.raises(
            SparsepassError, match=r"compares channels of hidden states, and permute_channels\{.*\} has changed"
        ):
            check_hidden(student, teacher, config)
    check_hidden(student, apply_passes(dense, "permute_channels"), config)
    check_hidden(student, dense, RetrainConfig(max_steps=1))
    check_hidden(apply_passes(dense, "nm_sparsify{criterion=magnitude}"), dense, config)
