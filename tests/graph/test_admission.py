"""Which models are taken: those whose weights have values, everywhere where values are needed."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

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


def compiled_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward)
    return model


def checkpointed(model: Any) -> Any:
    model.model.layers[0].mlp = checkpoint_wrapper(model.model.layers[0].mlp)
    return model


@pytest.mark.parametrize("wrap", [compiled_forward, checkpointed])
def test_what_is_put_around_a_part_is_taken_off_and_put_back(wrap: Callable[[Any], Any]) -> None:
    model = llama("cpu")
    plain = [site.name for site in capture(llama("cpu")).sites()]
    mlp, forward = wrap(model).model.layers[0].mlp, model.forward
    assert [site.name for site in capture(model).sites()] == plain
    assert model.model.layers[0].mlp is mlp
    assert model.forward is forward or model.forward == forward


def test_a_model_in_parts_of_fsdp_is_refused_as_what_it_is() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    with pytest.raises(CaptureError, match="is sharded by FSDP: save it whole"):
        capture(FullyShardedDataParallel(llama("cpu")))


def test_a_model_that_torch_quantized_is_refused_as_what_it_is() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(llama("cpu").eval(), {nn.Linear}, torch.qint8)
    with pytest.raises(CaptureError, match="is already quantized"):
        capture(model)


def test_a_model_made_in_inference_mode_is_refused_as_what_it_is() -> None:
    with torch.inference_mode():
        model = llama("cpu")
    assert perplexity(model, IDS.flatten(), context=16).num_tokens
    with pytest.raises(CaptureError, match=r"model.embed_tokens.weight was made in torch.inference_mode\(\)"):
        capture(model)


def test_what_has_values_is_let_through() -> None:
    check_has_values(nn.Linear(2, 2))
    check_has_values(capture(nn.Linear(2, 2), torch.ones(2, 2)))
