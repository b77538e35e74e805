"""How long calibration sequences are where nothing is said: 2048 tokens, or the positions that the model has."""

from typing import Any

import pytest
import torch
import transformers as hf

from sparsepass.passes import apply_passes

SMALL = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1}


def words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"[UNK]": 0} | {f"w{i}": i for i in range(1, 64)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = hf.PreTrainedTokenizerFast
    return make(tokenizer_object=backend, unk_token="[UNK]")


@pytest.mark.parametrize("name", ["GPT2", "GPTBigCode"])
def test_a_model_is_not_run_beyond_its_positions(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(hf, f"{name}ForCausalLM" if name == "GPTBigCode" else f"{name}LMHeadModel")(
        getattr(hf, f"{name}Config")(**SMALL)
    )
    text = "\n".join(f"w{i % 63 + 1}" for i in range(4500))
    program = apply_passes(model, "nm_sparsify{criterion=wanda}", calibration=text, tokenizer=words(), validate=False)
    assert program.history[0].calibration is not None
    assert program.history[0].calibration["context"] == 24
