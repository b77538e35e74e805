import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from sparsepass.graph.packed import fused_norm


def norm_of(columns: int, dtype: torch.dtype) -> LlamaRMSNorm:
    module = LlamaRMSNorm(columns, eps=1e-5).to(dtype)
    nn.init.normal_(module.weight)
    return module


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 8, 13, 576, 2048])
def test_one_call_gives_what_the_operations_give(columns: int, dtype: torch.dtype) -> None:
    module = norm_of(columns, dtype)
    fused = fused_norm(module)
    assert fused is not None
    assert fused.weight is module.weight
    wide = torch.randn(40, 2, columns).to(dtype)
    wide[0] *= 1e-4
    with torch.no_grad():
        for x in (wide, wide[:, 1], wide[0, 0], wide[:0], wide.transpose(0, 1)):
            y, expected = fused(x), module(x)
            assert y.dtype == dtype
            # The mean and its root may differ in their last bits.
            torch.testing.assert_close(y, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
        if dtype != torch.float32:
            assert (fused(wide) == module(wide)).float().mean() > 0.99


def test_what_is_not_finite_stays_so() -> None:
    module = norm_of(16, torch.bfloat16)
    fused = fused_norm(module)
    assert fused is not None
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    x[0, 3], x[1, 2] = float("nan"), float("inf")
    with torch.no_grad():
        assert torch.equal(fused(x).isnan(), module(x).isnan())


class Doubled(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states)


OTHERS = [nn.LayerNorm(16), nn.LayerNorm(16, bias=False), GemmaRMSNorm(16), Doubled(16), nn.Linear(16, 16), nn.Embedding(4, 16)]


@pytest.mark.parametrize("other", OTHERS, ids=lambda module: type(module).__name__)
def test_what_computes_anything_else_stays(other: nn.Module) -> None:
    if isinstance(other, GemmaRMSNorm):
        nn.init.ones_(other.weight)  # it multiplies by one more than this
    assert fused_norm(other) is None


def test_a_module_that_somebody_listens_to_stays() -> None:
    module = norm_of(16, torch.float32)
    module.register_forward_hook(lambda *_: None)
    assert fused_norm(module) is None


@pytest.mark.parametrize("kind", [Qwen3RMSNorm, T5LayerNorm])
def test_other_models_have_the_same(kind: Callable[..., nn.Module]) -> None:
    assert fused_norm(kind(16, eps=1e-6)) is not None


def test_gradients_types_and_compilers_get_the_operations() -> None:
    fused = fused_norm(norm_of(16, torch.float32))
    assert fused is not None
    x = torch.randn(3, 16, requires_grad=True)
    fused(x).sum().backward()
    assert x.grad is not None
    assert fused.weight.grad is not None
    with torch.no_grad():
        assert fused(x.bfloat16()).dtype == torch.float32  # as with a weight that is kept in float32
        torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), fused(x))
    exported = torch.export.export(fused, (x.detach(),))
    torch.testing.assert_close(exported.module()(x), fused(x))


def test_copies_work_and_without_a_library_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = fused_norm(norm_of(16, torch.bfloat16))
    assert fused is not None
    x = torch.randn(3, 16).bfloat16()
    with torch.no_grad():
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert torch.equal(other(x), fused(x))
        expected = fused(x)
        monkeypatch.setattr("sparsepass.graph.packed.norm.kernels", lambda: None)
        torch.testing.assert_close(fused(x), expected)


def test_state_is_that_of_the_module_before() -> None:
    module = norm_of(16, torch.float32)
    fused = fused_norm(module)
    assert fused is not None
    assert list(fused.state_dict()) == list(module.state_dict())
    assert repr(fused) == "RMSNorm((16,), eps=1e-05)"
