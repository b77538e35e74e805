"""Attention told that it is causal: wherever a mask says just that, and nowhere else."""

import copy

import pytest
import torch
from tests.families import BY_NAME, FAMILIES, captured
from torch import Tensor, nn

from sparsepass.graph import Program, SparsepassError, capture
from sparsepass.graph.attention import ATTENTION, drop_causal_masks, is_causal_mask, mask_of, share_heads
from sparsepass.retrain.student import halves

CAUSAL = [family.name for family in FAMILIES if family.generates and BY_NAME[family.name].inputs(1, 3).keys() <= {
    "input_ids", "attention_mask"
}]  # fmt: skip
T = 7


def masked_calls(program: Program) -> int:
    """Attention operations that read a mask."""
    nodes = program.graph_module.graph.nodes
    return sum(node.target is ATTENTION and mask_of(node.args, node.kwargs) is not None for node in nodes)


@pytest.mark.parametrize("name", CAUSAL)
def test_without_padding_results_stay(name: str) -> None:
    program = copy.deepcopy(captured(name))
    calls = masked_calls(program)
    dropped = drop_causal_masks(program, T)
    assert masked_calls(program) == calls - dropped
    assert dropped == calls > 0
    for batch, tokens in ((3, T), (1, T - 2)):
        ids = BY_NAME[name].inputs(batch, tokens)["input_ids"]
        inputs = {key: value for key, value in {"input_ids": ids, "attention_mask": torch.ones_like(ids)}.items()
                  if key in program.input_names}  # fmt: skip
        torch.testing.assert_close(program(**inputs).logits, captured(name)(**inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "shared"), [("llama", True), ("qwen3", True), ("mixtral", True), ("gpt2", False)])
def test_causal_attention_reads_shared_heads_without_copies(name: str, shared: bool) -> None:
    copying, sharing = (copy.deepcopy(captured(name)) for _ in range(2))
    calls = drop_causal_masks(copying, T)
    assert drop_causal_masks(sharing, T) == calls > 0
    assert share_heads(sharing) == (calls if shared else 0)
    ids = BY_NAME[name].inputs(2, T)["input_ids"]
    kept: dict[Program, dict[int, int]] = {}
    for program in (copying, sharing):
        storages = kept[program] = {}

        def note(tensor: Tensor, into: dict[int, int] = storages) -> Tensor:
            into[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            program(input_ids=ids).logits.square().sum().backward()
    assert torch.equal(sharing(input_ids=ids).logits, copying(input_ids=ids).logits)
    fewer = sum(kept[copying].values()) - sum(kept[sharing].values())
    # Two of four heads share one: of each call, half of the keys and of the values is no longer kept.
    assert fewer == (2 * calls * 2 * 2 * T * 8 * 4 if shared else 0)
    expected = dict(copying.named_parameters())
    for parameter, tensor in sharing.named_parameters():
        torch.testing.assert_close(tensor.grad, expected[parameter].grad, rtol=1e-4, atol=1e-5)


def test_attention_under_a_mask_keeps_its_copies() -> None:
    assert share_heads(copy.deepcopy(captured("llama"))) == 0


def test_a_body_for_unpadded_text_refuses_a_mask() -> None:
    parts = halves(captured("llama"), unpadded=T)
    ids = torch.ones(2, T, dtype=torch.int64)
    torch.testing.assert_close(parts.body(ids), halves(captured("llama")).body(ids), rtol=1e-4, atol=1e-5)
    with pytest.raises(SparsepassError, match="at most 7 tokens without padding"):
        parts.body(ids, torch.ones_like(ids))
    with pytest.raises(SparsepassError, match="at most 7 tokens without padding"):
        parts.body(torch.ones(2, T + 1, dtype=torch.int64))


class Attending(nn.Module):
    """Attention over embedded tokens, under a mask of some kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embed = kind, nn.Embedding(10, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.embed(input_ids).unsqueeze(1)
        tokens = input_ids.shape[1]
        ones = torch.ones(tokens, tokens, dtype=torch.bool)
        mask = ones.tril() & attention_mask.bool()[:, None, None]
        if self.kind == "window of 4":
            mask = mask & ones.triu(-3)
        elif self.kind == "all":
            mask = attention_mask.bool()[:, None, None].expand(-1, -1, tokens, -1)
        elif self.kind == "of the ids":
            mask = mask & (input_ids != 3)[:, None, None]
        if self.kind in ("added", "with a bias"):
            mask = torch.zeros(tokens, tokens).masked_fill(~mask, torch.finfo(torch.float32).min)
        if self.kind == "with a bias":
            mask = mask - 0.1 * torch.arange(tokens)
        return nn.functional.scaled_dot_product_attention(states, states, states, attn_mask=mask)


@pytest.mark.parametrize(
    ("kind", "tokens", "dropped"),
    [("plain", T, 1), ("added", T, 1), ("window of 4", 4, 1), ("window of 4", 5, 0), ("all", T, 0), ("with a bias", T, 0),
     ("of the ids", T, 0)],
)  # fmt: skip
def test_a_mask_that_says_more_stays(kind: str, tokens: int, dropped: int) -> None:
    ids = torch.randint(0, 10, (2, 6), generator=torch.Generator().manual_seed(0))
    program = capture(Attending(kind), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    ids = torch.randint(0, 10, (2, tokens), generator=torch.Generator().manual_seed(1))
    before = program(ids, torch.ones_like(ids))
    assert drop_causal_masks(program, tokens) == dropped
    assert masked_calls(program) == 1 - dropped
    torch.testing.assert_close(program(ids, torch.ones_like(ids)), before)


def test_padding_is_no_causal_mask() -> None:
    mask = torch.ones(2, 1, T, T, dtype=torch.bool).tril()
    assert is_causal_mask(mask, T)
    assert not is_causal_mask(mask, T + 1)
    assert not is_causal_mask(mask[..., :1, :1], T)
    mask[1, ..., 0] = False
    assert not is_causal_mask(mask, T)
