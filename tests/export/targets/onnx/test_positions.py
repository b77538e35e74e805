"""Models whose positions or states are not those of a Llama: what is right is what the model itself computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from sparsepass.export.targets.onnx import lower_onnx, verify_onnx
from sparsepass.graph import capture

TOKENS: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
TWO_SIDED: dict[str, Any] = {"d_model": 32, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
TWO_SIDED |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "is_encoder_decoder": False}
BERT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BERT |= {"max_position_embeddings": 64, "is_decoder": True}


def bart(encoder_layers: int = 2) -> Any:
    return hf.BartForCausalLM(hf.BartConfig(**TOKENS, **TWO_SIDED, encoder_layers=encoder_layers, is_decoder=True))


def marian() -> Any:
    config = hf.MarianConfig(**TOKENS, **TWO_SIDED, encoder_layers=2, is_decoder=True, decoder_vocab_size=64)
    return hf.MarianForCausalLM(config)


def mamba() -> Any:
    return hf.MambaForCausalLM(hf.MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4))


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (bart, "decoder-with-past"),  # no position_ids: padding on the left counts
        (marian, "decoder-with-past"),
        (lambda: hf.RobertaForCausalLM(hf.RobertaConfig(**TOKENS, **BERT)), "forward"),  # positions begin at 2, without padding
        (lambda: hf.BertLMHeadModel(hf.BertConfig(**TOKENS, **BERT)), "decoder-with-past"),
        (lambda: bart(encoder_layers=1), "forward"),  # transformers makes too small a cache, and fails
        (mamba, "forward"),  # its state is no keys and values, and its last operation a cast
    ],
)
def test_positions_and_states_of_other_kinds_hold(build: Callable[[], Any], kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = capture(build().eval())
    artifact = lower_onnx(program, tmp_path)
    assert artifact.kind == kind, artifact.notes
    assert bool(artifact.notes) is (kind == "forward"), "why there is no cache is said"
    found = verify_onnx(program, tmp_path, artifact)
    assert found["holds"], found["outputs"]
