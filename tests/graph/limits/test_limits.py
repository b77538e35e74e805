"""How many positions a model has, against the model itself where one can be run."""

from typing import Any

import pytest
import torch
import transformers as hf

from sparsepass.graph.limits.positions import default_context, position_limit

LLAMA = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64,
}  # fmt: skip
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1}

# Models with a table of positions: one token more than the limit cannot be looked up.
TABLES: dict[str, tuple[dict[str, Any], int]] = {
    "GPT2": (GPT | {"n_positions": 24}, 24),
    "GPTBigCode": (GPT | {"n_positions": 24}, 24),
    "OPT": (LLAMA | {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 24}, 24),
    "Bert": (LLAMA | {"max_position_embeddings": 24}, 24),
    "Roberta": (LLAMA | {"max_position_embeddings": 24, "pad_token_id": 1}, 22),
    "XLMRoberta": (LLAMA | {"max_position_embeddings": 24, "pad_token_id": 1}, 22),
    "Camembert": (LLAMA | {"max_position_embeddings": 24, "pad_token_id": 1}, 22),
    "MPNet": (LLAMA | {"max_position_embeddings": 24, "pad_token_id": 1}, 22),
    "Esm": (LLAMA | {"max_position_embeddings": 24, "pad_token_id": 1, "position_embedding_type": "absolute"}, 22),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_limit_is_the_longest_sequence_that_runs(name: str) -> None:
    settings, expected = TABLES[name]
    config = getattr(hf, f"{name}Config")(**settings)
    model = getattr(hf, f"{name}Model")(config).eval()
    limit = position_limit(config)
    assert limit == expected == position_limit(config.to_dict())
    with torch.no_grad():
        model(torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(torch.full((1, limit + 1), 5))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("Llama", {"max_position_embeddings": 131072}, 131072),
        ("GPTJ", {"n_positions": 2048}, 2048),
        ("CodeGen", {"n_positions": 512}, 512),
        ("CTRL", {"n_positions": 256}, 256),
        ("Whisper", {"max_target_positions": 448}, 448),
        ("LED", {"max_decoder_position_embeddings": 1024}, 1024),
        ("Mpt", {"max_seq_len": 2048}, 2048),
        ("Dbrx", {"max_seq_len": 2048}, 2048),
        ("CLIP", {"text_config": {"max_position_embeddings": 77}}, 77),
        ("Falcon", {"alibi": False}, 2048),
        ("Falcon", {"alibi": True}, None),
        ("Bloom", {"seq_length": 2048}, None),
        ("T5", {"n_positions": 512}, None),
        ("ViT", {}, None),
        ("Esm", {"position_embedding_type": "rotary", "pad_token_id": 1}, 1026),
    ],
)
def test_each_architecture_names_it_its_own_way(name: str, settings: dict[str, Any], expected: int | None) -> None:
    config = getattr(hf, f"{name}Config")(**settings)
    assert position_limit(config) == expected


def test_nested_parts_and_nothing() -> None:
    gpt2 = hf.GPT2Config(n_positions=24)
    both = hf.VisionEncoderDecoderConfig(encoder=hf.ViTConfig().to_dict(), decoder=gpt2.to_dict())
    assert position_limit(both) == 24
    assert position_limit(None) is None
    assert position_limit({"max_position_embeddings": -1}) is None
    assert (default_context(gpt2), default_context({"max_position_embeddings": 8192})) == (24, 2048)
