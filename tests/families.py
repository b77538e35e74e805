"""Tiny random models of many families, built at run time, with inputs of two shapes each."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from sparsepass.graph import Program, capture

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class ConvNet(nn.Module):
    """A plain module: convolutions (grouped too), a shared linear layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.stem(images))
        x = torch.relu(self.body(x))
        x = torch.relu(self.depthwise(x)).mean((2, 3))
        return self.head(torch.relu(self.mix(torch.relu(self.mix(x)))))  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to build one tiny model, and inputs of a given batch and length for it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]
    generates: bool = False

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()


def _ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(3, 96, (batch, tokens), generator=torch.Generator().manual_seed(batch * 100 + tokens))


def _text(batch: int, tokens: int) -> dict[str, Tensor]:
    ids = _ids(batch, tokens)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _images(batch: int, _: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))}


def _speech(batch: int, tokens: int) -> dict[str, Tensor]:
    features = torch.randn(batch, 8, 60, generator=torch.Generator().manual_seed(batch))
    return {"input_features": features, "decoder_input_ids": _ids(batch, tokens)}


def _two_sided(batch: int, tokens: int) -> dict[str, Tensor]:
    return {**_text(batch, tokens + 2), "decoder_input_ids": _ids(batch, tokens)}


def _plain_images(batch: int, _: int) -> dict[str, Tensor]:
    return {"images": torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))}


def _causal(name: str, prefix: str, **extra: object) -> Family:
    def build() -> nn.Module:
        config = getattr(hf, f"{prefix}Config")(**{**_LLAMA_LIKE, **extra})
        return getattr(hf, f"{prefix}ForCausalLM")(config)  # type: ignore[no-any-return]

    return Family(name=name, build=build, inputs=_text, generates=True)


_GPT2: dict[str, Any] = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_TOKENS}
_OPT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32, **_TOKENS,
}  # fmt: skip
_NEOX: dict[str, Any] = {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}
_BERT: dict[str, Any] = {**_NEOX}
_VIT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_WHISPER: dict[str, Any] = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
    "max_source_positions": 30, "max_target_positions": 32, "decoder_start_token_id": 1, **_TOKENS,
}  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": 96, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip

FAMILIES = (
    _causal("llama", "Llama", tie_word_embeddings=True),
    _causal("mistral", "Mistral", sliding_window=8),
    _causal("qwen2", "Qwen2"),
    _causal("qwen3", "Qwen3", head_dim=8),
    Family(
        name="gemma3",
        build=lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_LLAMA_LIKE, head_dim=8, sliding_window=8)),
        inputs=_text,
        generates=True,
    ),
    _causal("phi3", "Phi3"),
    Family(name="gpt2", build=lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)), inputs=_text, generates=True),
    Family(name="opt", build=lambda: hf.OPTForCausalLM(hf.OPTConfig(**_OPT)), inputs=_text, generates=True),
    Family(name="gpt_neox", build=lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_NEOX)), inputs=_text, generates=True),
    _causal("mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2),
    _causal("qwen3_moe", "Qwen3Moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    Family(name="bert", build=lambda: hf.BertModel(hf.BertConfig(**_BERT)), inputs=_text),
    Family(name="vit", build=lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VIT)), inputs=_images),
    Family(
        name="whisper",
        build=lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**_WHISPER)),
        inputs=_speech,
        generates=True,
    ),
    Family(name="t5", build=lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)), inputs=_two_sided, generates=True),
    Family(name="convnet", build=ConvNet, inputs=_plain_images),
)
BY_NAME = {family.name: family for family in FAMILIES}


@functools.cache
def _captured(name: str) -> Program:
    family = BY_NAME[name]
    return capture(family.model(), family.inputs(2, 8))


def captured(name: str) -> Program:
    """A program of the family's tiny model: captured once in a process (it takes seconds), copied for each test."""
    return copy.deepcopy(_captured(name))


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of whatever a model returns, in order."""
    leaves = output.to_tuple() if hasattr(output, "to_tuple") else (output,)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
