"""Example inputs that are made from a configuration: for every argument that a model asks for, or a refusal that names it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from sparsepass.graph import CaptureError, capture
from sparsepass.graph.capture.examples import example_inputs_for
from sparsepass.passes import apply_passes

LAYERS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT: dict[str, Any] = {**LAYERS, "vocab_size": 64, "max_position_embeddings": 32}
IMAGE: dict[str, Any] = {**LAYERS, "image_size": 32, "patch_size": 8}
SOUND: dict[str, Any] = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
SOUND |= {**LAYERS, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": 16}
BART: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "max_position_embeddings": 32,
}
BART |= {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("attention_heads", 4), ("ffn_dim", 64))}
GPT2: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
WHISPER: dict[str, Any] = {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def clip() -> Any:
    return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT | {"eos_token_id": 63}, vision_config=IMAGE, projection_dim=16))


def trocr() -> Any:
    as_decoder: dict[str, Any] = {"is_decoder": True, "add_cross_attention": True}
    decoder = hf.GPT2Config(**GPT2, **as_decoder)
    return hf.VisionEncoderDecoderModel(encoder=hf.ViTModel(hf.ViTConfig(**IMAGE)), decoder=hf.GPT2LMHeadModel(decoder))


def spectrogram() -> Any:
    return hf.ASTForAudioClassification(hf.ASTConfig(**LAYERS, max_length=32, num_mel_bins=16, patch_size=8))


# Model -> its inputs, and for some the axes that vary.
MADE: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "clip": (clip, {"input_ids", "attention_mask", "pixel_values"}),
    "siglip": (
        lambda: hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=IMAGE)),
        {"input_ids", "attention_mask", "pixel_values"},
    ),
    "clip's image half": (
        lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**IMAGE, projection_dim=16)),
        {"pixel_values"},
    ),
    "vision encoder-decoder": (trocr, {"pixel_values", "decoder_input_ids"}),
    "wav2vec2": (lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**SOUND)), {"input_values"}),
    "hubert": (lambda: hf.HubertForCTC(hf.HubertConfig(**SOUND)), {"input_values"}),
    "spectrogram": (spectrogram, {"input_values"}),
    "whisper": (
        lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
        {"input_features", "decoder_input_ids"},
    ),
    "bart, classes": (
        lambda: hf.BartForSequenceClassification(hf.BartConfig(**BART)),
        {"input_ids", "attention_mask", "decoder_input_ids"},
    ),
    "llama, classes, no padding": (
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**TEXT, pad_token_id=None)),
        {"input_ids", "attention_mask"},
    ),
    "gpt2, no padding": (
        lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2)),
        {"input_ids", "attention_mask"},
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_every_argument_that_a_model_asks_for_is_made(name: str) -> None:
    torch.manual_seed(0)
    build, wanted = MADE[name]
    model = build().eval()
    inputs = example_inputs_for(model)
    assert set(inputs) >= wanted - {"decoder_input_ids"} if name == "bart, classes" else set(inputs) == wanted
    assert all(
        torch.equal(tensor, other) for tensor, other in zip(inputs.values(), example_inputs_for(model).values(), strict=True)
    )
    program = capture(model)
    alone = name.endswith("no padding")  # the model itself takes one row at a time
    inputs = {key: tensor[: 1 if alone else None] for key, tensor in inputs.items()}
    with torch.no_grad():
        expected, found = model(**inputs, return_dict=True), program(**inputs)
    key = next(key for key in ("logits", "logits_per_image", "image_embeds") if key in expected)
    assert torch.allclose(expected[key], found[key], atol=1e-5)


def test_the_samples_of_sound_vary() -> None:
    torch.manual_seed(0)
    model = hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**SOUND)).eval()
    program = capture(model)
    for batch, samples in ((2, 900), (3, 1234)):
        sound = torch.randn(batch, samples)
        with torch.no_grad():
            assert torch.allclose(model(sound).logits, program(input_values=sound).logits, atol=1e-5)


class Unknown(hf.LlamaForCausalLM):
    """Asks for something that no configuration describes."""

    def forward(self, input_ids: Tensor, weather: Tensor, **others: Any) -> Any:
        return super().forward(input_ids=input_ids, **others) + weather


def test_an_argument_that_is_not_known_is_named() -> None:
    model = Unknown(hf.LlamaConfig(**TEXT))
    with pytest.raises(
        CaptureError, match=r"no example inputs are known for Unknown, whose input 'weather'.*pass example_inputs"
    ):
        capture(model)
    with pytest.raises(CaptureError, match="Linear is no transformers model, so its inputs are not known: pass example_inputs"):
        capture(nn.Linear(2, 2))


def llava() -> Any:
    parts: dict[str, Any] = {"vision_config": hf.CLIPVisionConfig(**IMAGE), "text_config": hf.LlamaConfig(**TEXT)}
    parts["image_token_id"] = 63
    torch.manual_seed(0)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(**parts)).eval()


def test_layers_that_the_graph_never_runs_are_told() -> None:
    program = apply_passes(llava(), ["nm_sparsify{criterion=magnitude}"], validate=False)
    report = program.report()
    idle = [name for name in report.idle if "vision_tower" in name]
    assert any(name.endswith("mlp.fc1") for name in idle)
    assert any("multi_modal_projector" in name for name in report.idle)
    assert not any("language_model" in name for name in report.idle)
    assert all(report.skipped()[name].startswith("the captured graph never runs it") for name in report.idle)
    assert not set(report.idle) & {site.name for site in report.sites}


def test_with_an_image_they_are_run() -> None:
    model = llava()
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    ids[:, 1:17] = 63
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 32, 32)}
    program = capture(model, inputs)
    assert not [name for name in program.report().idle if name.endswith(("fc1", "fc2", "q_proj", "linear_1"))]


def test_choices_are_an_axis_of_their_own() -> None:
    model = hf.BertForMultipleChoice(hf.BertConfig(**TEXT)).eval()
    program = capture(model)
    assert program.dynamic_axes == {"input_ids": (0, 1, 2), "attention_mask": (0, 1, 2)}
    ids = torch.randint(3, 64, (3, 4, 11))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(program(**given).logits, model(**given).logits)
