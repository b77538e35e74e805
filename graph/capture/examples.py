"""Small random inputs for models of transformers, made from their configuration."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsepass.graph.support import CaptureError

# Exporting inputs of size 0 or 1 bakes that size in, so examples have at least two of everything.
_EXAMPLE_BATCH, _EXAMPLE_TOKENS, _EXAMPLE_PIXELS, _EXAMPLE_CHOICES = 2, 8, 224, 3
# A configuration with one of these takes images where its text has that token, and runs on text alone too.
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_token")


def example_inputs_for(model: nn.Module, tokens: int = _EXAMPLE_TOKENS) -> dict[str, Tensor]:
    """Make small random inputs for a transformers model from its configuration, the same each time.

    1. The model's main input, and every argument of its forward that has no default.
    2. Both inputs of a model that compares text with images; the decoder's tokens of an encoder-decoder.
    3. Rows of a classifier end with the end-of-text token, and have it nowhere else: BART's ask for as many in each row.

    Args:
        model: Of transformers.
        tokens: Length of its sequences; sound gets as many frames.

    Raises:
        CaptureError: If an input is not known here; it names the argument.
    """
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise CaptureError(
            f"{type(model).__name__} is no transformers model, so its inputs are not known: pass example_inputs, for "
            "example example_inputs=torch.randn(2, 8) or a dict of tensors"
        )
    parameters = inspect.signature(model.forward).parameters
    wanted = [main, *(p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty)]
    if main == "input_ids" and "pixel_values" in parameters and _compares_text_with_images(config):
        wanted.append("pixel_values")
    if main == "pixel_values" and getattr(config, "model_type", "") == "clip" and hasattr(config, "text_config"):
        wanted.append("input_ids")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        wanted.append("decoder_input_ids")
    maker = _Maker(model, config, tokens)
    inputs: dict[str, Tensor] = {}
    for name in dict.fromkeys(wanted):
        inputs[name] = maker.make(name)
        if name == "input_ids" and "attention_mask" in parameters:
            inputs["attention_mask"] = torch.ones_like(inputs[name])
    device = next(iter(model.parameters())).device
    return {name: t.to(device) for name, t in inputs.items()}


def _compares_text_with_images(config: Any) -> bool:
    if any(getattr(config, name, None) is not None for name in _IMAGE_TOKENS):
        return False
    return hasattr(config, "vision_config") or getattr(config, "image_size", None) is not None


class _Maker:
    """Random tensors for the arguments of one model."""

    def __init__(self, model: nn.Module, config: Any, tokens: int) -> None:
        self.model, self.config, self.tokens = model, config, tokens
        parts = [getattr(config, name, None) for name in ("text_config", "encoder", "decoder")]
        self.text = next((part for part in parts if hasattr(part, "vocab_size")), config)
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.generator = torch.Generator().manual_seed(0)

    def make(self, name: str) -> Tensor:
        kinds: dict[str, Callable[[], Tensor]] = {
            "input_ids": lambda: self._ids(self.text),
            "decoder_input_ids": lambda: self._ids(getattr(self.config, "decoder", None) or self.text),
            "pixel_values": self._image,
            "input_features": self._features,
            "input_values": self._sound,
            "inputs": self._sound,
        }
        try:
            return kinds[name]()
        except (KeyError, AttributeError) as error:
            raise CaptureError(
                f"no example inputs are known for {type(self.model).__name__}, whose input {name!r} its configuration does "
                "not describe: pass example_inputs"
            ) from error

    def _ids(self, text: Any) -> Tensor:
        vocabulary = int(getattr(text, "vocab_size", None) or self.config.get_text_config().vocab_size)
        is_choice = type(self.model).__name__.endswith("ForMultipleChoice")  # reads [B, choices, T]
        shape = (_EXAMPLE_BATCH, *((_EXAMPLE_CHOICES,) if is_choice else ()), self.tokens)
        ids = torch.randint(min(3, vocabulary - 1), vocabulary, shape, generator=self.generator)
        end = getattr(self.config, "eos_token_id", None)
        if type(self.model).__name__.endswith("ForSequenceClassification") and isinstance(end, int) and end < vocabulary:
            ids = torch.where(ids == end, min(3, vocabulary - 1), ids)
            ids[:, -1] = end
        return ids

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(_EXAMPLE_BATCH, *shape, generator=self.generator).to(self.dtype)

    def _encoder(self) -> Any:
        """The configuration of the part that reads images or sound."""
        for name in ("vision_config", "encoder", "audio_config"):
            part = getattr(self.config, name, None)
            if hasattr(part, "to_dict"):
                return part
        return self.config

    def _image(self) -> Tensor:
        vision = self._encoder()
        size = getattr(vision, "image_size", None) or _EXAMPLE_PIXELS  # convolutional models take any size, and name none
        size = list(size) if isinstance(size, list | tuple) else [size] * 2
        return self._noise(getattr(vision, "num_channels", 3), *size)

    def _features(self) -> Tensor:
        """Spectrograms: [B, bins, frames] of a fixed length (Whisper), or [B, frames, features]."""
        audio = self._encoder()
        if hasattr(audio, "max_source_positions") and hasattr(audio, "num_mel_bins"):
            return self._noise(audio.num_mel_bins, 2 * audio.max_source_positions)
        for name in ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins"):
            if (features := getattr(audio, name, None)) is not None:
                return self._noise(8 * self.tokens, features)
        raise AttributeError("input_features")

    def _sound(self) -> Tensor:
        """Samples [B, time], enough for some frames behind the convolutions; or spectrograms [B, frames, bins] (AST)."""
        audio = self._encoder()
        if hasattr(audio, "max_length") and hasattr(audio, "num_mel_bins"):
            return self._noise(audio.max_length, audio.num_mel_bins)
        return self._noise(sum(audio.conv_kernel) * 4 + self.tokens * math.prod(audio.conv_stride) + 3)
