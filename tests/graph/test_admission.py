"""Which models are taken: those whose weights have values, everywhere where values are needed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from sparsepass.graph import CaptureError, SparsepassError, capture
from sparsepass.graph.admission import check_has_values
from sparsepass.graph.load import load_model
from sparsepass.graph.perplexity import perplexity
from sparsepass.passes import apply_passes

IDS = torch.arange(64).reshape(2, 32)


def llama(device: str) -> Any:
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    with torch.device(device):
        return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        lambda model: apply_passes(model, ["nm_sparsify{criterion=magnitude}"]),
        lambda model: apply_passes(model, ["nm_sparsify{criterion=wanda}"], calibration=IDS),
        lambda model: load_model(model, dtype="bf16"),
        lambda model: perplexity(model, IDS.flatten(), context=16),
    ],
    ids=["magnitude", "wanda", "load", "perplexity"],
)
def test_weights_on_the_meta_device_are_refused_in_words(use: Callable[[Any], object], captured: bool) -> None:
    model = llama("meta")
    with pytest.raises(SparsepassError, match=r"14 tensors without values: model.embed_tokens.weight is on the meta device"):
        use(capture(model) if captured else model)


def test_a_model_with_a_part_on_the_meta_device_is_refused_in_words() -> None:
    model = llama("cpu")
    model.lm_head.to("meta")
    with pytest.raises(CaptureError, match=r"1 tensors without values: lm_head.weight.*all of them in memory"):
        capture(model)


def test_what_has_values_is_let_through() -> None:
    check_has_values(nn.Linear(2, 2))
    check_has_values(capture(nn.Linear(2, 2), torch.ones(2, 2)))
