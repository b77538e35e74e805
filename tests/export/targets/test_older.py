"""What transformers 4 reads of a folder: it takes rotary positions from keys that version 5 does not write."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from tests.export.tiny import save_tiny_llama

from sparsepass.export import export
from sparsepass.export.targets.older import add_older_keys

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4}
DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": 5e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


# What transformers 4.57.3 needs to compute the same was tried with it: all but Phi-3's long positions.
@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        (hf.LlamaConfig, {"rope_parameters": DEFAULT}, {"rope_theta": 5e4}),
        (
            hf.LlamaConfig,
            {"rope_parameters": YARN | {"rope_theta": 1e6}, "max_position_embeddings": 64},
            {"rope_theta": 1e6, "rope_scaling": YARN},
        ),
        (hf.PhiConfig, {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}, {"partial_rotary_factor": 0.5}),
        (
            hf.GPTNeoXConfig,
            {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}, "bos_token_id": 1, "eos_token_id": 2},
            {"rotary_emb_base": 5e4, "rotary_pct": 0.5},
        ),
        (hf.Gemma3TextConfig, {}, {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
    ],
)
def test_the_keys_of_transformers_4_stand_beside_the_new_ones(
    kind: Any, settings: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    kind(**SIZES, **settings).save_pretrained(tmp_path)
    before = hf.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert add_older_keys(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    assert {name: document.get(name) for name in expected} == expected
    assert hf.AutoConfig.from_pretrained(tmp_path).to_dict() == before, "transformers 5 reads what it read before"


def test_an_exported_folder_can_be_read_by_transformers_4(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "tiny")
    for out, target in (("hf", "hf"), ("packed", "packed")):
        export(folder, target, tmp_path / out, passes="nm_sparsify", validate=False, verify=False)
        document = json.loads((tmp_path / out / "config.json").read_text())
        assert document["rope_theta"] == document["rope_parameters"]["rope_theta"]
        settings = json.loads((tmp_path / out / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert hf.AutoTokenizer.from_pretrained(tmp_path / out)("the fox").input_ids


def test_what_transformers_4_reads_wrongly_is_said(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = hf.Phi3Config(
        **SIZES,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters={"rope_type": "longrope", "rope_theta": 5e4, **factors},
    )
    model = hf.Phi3ForCausalLM(config)
    export(model, "hf", tmp_path / "out", passes="nm_sparsify", validate=False, verify=False)
    assert "Needs transformers >= 5" in (tmp_path / "out" / "README.md").read_text()
