"""Output heads, routers and gates, found behind whatever models put after them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from sparsepass.graph import capture


def reasons(model: nn.Module, example: Any = None) -> dict[str, str | None]:
    torch.manual_seed(0)
    return {site.name: site.left_alone for site in capture(model.eval(), example).sites()}


class Net(nn.Module):
    """Two layers, and a function of the result of the second."""

    def __init__(self, last: Callable[[Tensor], Tensor], outputs: int = 8) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(32, 64), nn.Linear(64, outputs), last
        self.experts = nn.Parameter(torch.randn(outputs, 64, 64))
        self.register_buffer("shift", torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.last(self, hidden, self.second(hidden))  # type: ignore[call-arg, arg-type]


HEADS: dict[str, Any] = {
    "softmax": lambda net, h, y: y.softmax(-1),
    "log_softmax": lambda net, h, y: y.log_softmax(-1),
    "sigmoid": lambda net, h, y: y.sigmoid(),
    "scaled": lambda net, h, y: y / 0.7 * 3 - 1,
    "shifted by a buffer": lambda net, h, y: y + net.shift,
    "soft cap": lambda net, h, y: (y / 30).tanh() * 30,
    "cast": lambda net, h, y: y.double().softmax(-1),
    "last row": lambda net, h, y: y[torch.arange(y.shape[0]), -1],
    "normalized": lambda net, h, y: nn.functional.normalize(y, dim=-1),
    "clamped": lambda net, h, y: y.clamp(-5, 5),
    "masked": lambda net, h, y: y.masked_fill(net.shift > 0, -1e9),
    "mean over tokens": lambda net, h, y: y.mean(1),
    "largest of tokens": lambda net, h, y: y.max(1).values,
    "dropout": lambda net, h, y: nn.functional.dropout(y, 0.1, net.training),
}
ROUTERS: dict[str, Any] = {
    "topk": lambda net, h, y: h * y.softmax(-1).topk(2).values.sum(-1, keepdim=True),
    "argmax": lambda net, h, y: torch.einsum("bti,btio->bto", h, net.experts[y.argmax(-1)]),
    "max": lambda net, h, y: h * net.experts[y.softmax(-1).max(-1).indices][..., 0],
    "top-p": lambda net, h, y: h * (y.softmax(-1).cumsum(-1) < 0.9).sum(-1, keepdim=True),
    "normalized": lambda net, h, y: h * nn.functional.layer_norm(y, (8,)).topk(2).values.sum(-1, keepdim=True),
    "argsort": lambda net, h, y: h + y.argsort(-1).sum(-1, keepdim=True),
    "threshold": lambda net, h, y: torch.where(y.sigmoid().sum(-1, keepdim=True) > 4, h, -h) * (y[..., :1] > 0.5),
}
GATES: dict[str, Any] = {
    "shared expert": lambda net, h, y: y[..., :1].sigmoid() * h,
    "all experts": lambda net, h, y: (y.softmax(-1).unsqueeze(-1) * torch.einsum("bti,eio->bteo", h, net.experts)).sum(-2),
}
OTHERS: dict[str, Any] = {
    "residual": lambda net, h, y: h + y.sum(-1, keepdim=True),
    "gated by an input": lambda net, h, y: y * h[..., :8],
    "values in a cache": lambda net, h, y: ((h @ h.mT).softmax(-1) @ y, y.transpose(1, 2)),
    "pooled": lambda net, h, y: (y.relu() + 1).max(1).values,
}


@pytest.mark.parametrize(
    ("last", "word"),
    [(last, word) for group, word in ((HEADS, "output head"), (ROUTERS, "router"), (GATES, "gate"), (OTHERS, None))
     for last in group.values()],
    ids=[name for group in (HEADS, ROUTERS, GATES, OTHERS) for name in group],
)  # fmt: skip
def test_what_a_layer_is(last: Any, word: str | None) -> None:
    found = reasons(Net(last), torch.randn(2, 6, 32))
    assert found["first"] is None
    said = found["second"]
    assert (said is None) if word is None else (said is not None and said.startswith(word)), said


class Masked(nn.Module):
    """A head whose results count where a mask says so, and a layer that is added to what it read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.last = nn.Linear(32, 64), nn.Linear(64, 8), nn.Linear(64, 32)

    def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x).relu()
        keep = padding[..., None].to(x.dtype)
        return self.head(hidden) * keep - 1e30 * (1 - keep), x + self.last(hidden)


def test_a_mask_behind_a_head_is_seen_through() -> None:
    found = reasons(Masked(), (torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.long)))
    assert found["first"] is None
    assert found["last"] is None
    assert str(found["head"]).startswith("output head")


SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("LlamaForSequenceClassification", {"num_labels": 3}, {"score": "output head"}),
        ("PhimoeForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}, {"model.layers.0.mlp.router": "router"}),
        (
            "Qwen2MoeForCausalLM",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
            {"model.layers.0.mlp.gate": "router", "model.layers.0.mlp.shared_expert_gate": "gate"},
        ),
        ("BertForTokenClassification", {"num_labels": 3}, {"classifier": "output head"}),
    ],
)
def test_what_layers_of_known_models_are(kind: str, settings: dict[str, Any], expected: dict[str, str]) -> None:
    config_class = getattr(hf, kind).config_class
    taken = {name: value for name, value in SMALL.items() if kind[:4] != "Bert" or name != "num_key_value_heads"}
    found = reasons(getattr(hf, kind)(config_class(**taken, **settings)))
    left = {name: reason.split(":")[0].split(" (")[0] for name, reason in found.items() if reason and "embed" not in reason}
    left.pop("lm_head", None)
    assert left == expected


def test_layers_without_weights_are_told() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        net = nn.ModuleDict({"empty": nn.Linear(0, 8), "full": nn.Linear(8, 8)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net["full"](self.net["empty"](x[:, :0]) + x).relu() + x  # type: ignore[no-any-return]

    assert reasons(Both(), torch.randn(2, 8)) == {"net.empty": "it has no weights: 0 inputs, 8 outputs", "net.full": None}
