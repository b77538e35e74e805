import copy
import pickle

import pytest
import torch
from torch import nn

from sparsepass import SparsepassError
from sparsepass.graph.packed import DenseLinear, Int8Embedding

IDS = torch.tensor([[1, 5, 5, 0]])


def test_a_head_shares_the_weight_of_its_embedding() -> None:
    embedding = nn.Embedding(40, 64, dtype=torch.bfloat16)
    head = DenseLinear.tied_to(embedding)
    assert head.weight is embedding.weight
    with torch.no_grad():
        x = embedding(IDS)
        torch.testing.assert_close(head(x), x @ embedding.weight.T)
        embedding.weight.mul_(2)
        torch.testing.assert_close(head(x), x @ embedding.weight.T)
        model = nn.ModuleList([embedding, head]).half()
        assert model[1].weight is model[0].weight
        torch.testing.assert_close(head(x.half()), x.half() @ embedding.weight.T)
        model.float()  # no 16-bit weight any more: torch multiplies
        assert head(x.float()).dtype == torch.float32


def test_an_embedding_of_bytes() -> None:
    weight = torch.randn(40, 64)
    embedding = Int8Embedding.from_weight(weight)
    rows = embedding(IDS)
    assert rows.shape == (1, 4, 64)
    assert rows.dtype == torch.float32
    assert (rows - weight[IDS]).abs().max() < weight.abs().max() / 127
    head = DenseLinear.tied_to(embedding)
    assert head.weight is embedding.weight
    assert head.scales is embedding.scales
    model = nn.ModuleList([embedding, head]).half()
    assert embedding.weight.dtype == torch.int8
    assert embedding.scales.dtype == torch.bfloat16
    assert model[0](IDS).dtype == torch.float16
    known = embedding.weight.float() * embedding.scales.float()
    torch.testing.assert_close(head(weight[:3]), weight[:3] @ known.T, rtol=0.05, atol=0.3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[1].weight is other[0].weight
        assert torch.equal(other[1](weight[:3]), head(weight[:3]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_compilers_see_the_operator(dtype: torch.dtype) -> None:
    head = DenseLinear.from_weight(torch.randn(40, 64), dtype=dtype, bias=torch.randn(40)).eval()
    x = torch.randn(2, 64)
    with torch.no_grad():
        assert torch.equal(torch.compile(head, fullgraph=True, backend="aot_eager")(x), head(x))
    exported = torch.export.export(head, (x,))
    assert "sparsepass.packed_linear" in str(exported.graph)
    assert torch.equal(exported.module()(x), head(x))


def test_states_load_and_training_is_refused() -> None:
    head = DenseLinear.from_weight(torch.randn(40, 64), dtype=torch.int8)
    other = DenseLinear(64, 40, dtype=torch.int8, device="meta")
    x = torch.randn(2, 64)
    with pytest.raises(SparsepassError, match="no weights yet"):
        other(x)
    other.load_state_dict(head.state_dict(), assign=True)
    assert torch.equal(other(x), head(x))
    with pytest.raises(SparsepassError, match="for inference"):
        head.train()(x.requires_grad_())
    with pytest.raises(SparsepassError, match=r"not torch.float32"):
        DenseLinear(64, 40, dtype=torch.float32)
    with pytest.raises(SparsepassError, match=r"takes 64 features"):
        head(torch.zeros(2, 63))
