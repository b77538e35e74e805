"""Configurations without weights, from which a model is planned."""

from pathlib import Path
from typing import Any

import transformers as hf

TINY: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def saved_config(folder: Path, kind: str, config: dict[str, Any], architecture: str) -> Path:
    made = hf.AutoConfig.for_model(kind, **config)
    made.architectures = [architecture]
    made.save_pretrained(folder)
    return folder
