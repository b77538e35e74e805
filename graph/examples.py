"""Small random inputs for models of transformers, made from their configuration."""

import inspect

import torch
from torch import Tensor, nn

from sparsepass.graph.support import CaptureError

# Exporting inputs of size 0 or 1 bakes that size in, so examples have at least two of everything.
_EXAMPLE_BATCH, _EXAMPLE_TOKENS, _EXAMPLE_PIXELS = 2, 8, 224


def example_inputs_for(model: nn.Module, tokens: int = _EXAMPLE_TOKENS) -> dict[str, Tensor]:
    """Make small random inputs for a transformers model from its configuration, the same each time.

    Raises:
        CaptureError: If its kind of input is not known here.
    """
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise CaptureError(
            f"{type(model).__name__} is no transformers model, so its inputs are not known: pass example_inputs, for "
            "example example_inputs=torch.randn(2, 8) or a dict of tensors"
        )
    device = next(iter(model.parameters())).device
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    generator = torch.Generator().manual_seed(0)
    shape = (_EXAMPLE_BATCH, tokens)

    def ids() -> Tensor:
        vocabulary = int(getattr(text, "vocab_size", None) or config.vocab_size)
        return torch.randint(min(3, vocabulary - 1), vocabulary, shape, generator=generator)

    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs: dict[str, Tensor]
    if main == "input_ids":
        inputs = {"input_ids": ids()}
        if "attention_mask" in inspect.signature(model.forward).parameters:
            inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
    elif main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or _EXAMPLE_PIXELS  # convolutional models take any size, and name none
        size = size if isinstance(size, list | tuple) else [size] * 2
        inputs = {"pixel_values": torch.randn(_EXAMPLE_BATCH, vision.num_channels, *size, generator=generator).to(dtype)}
        if getattr(config, "model_type", "") == "clip" and hasattr(config, "text_config"):
            inputs |= {"input_ids": ids(), "attention_mask": torch.ones(shape, dtype=torch.long)}
    elif main == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions
        inputs = {"input_features": torch.randn(_EXAMPLE_BATCH, config.num_mel_bins, frames, generator=generator).to(dtype)}
    else:
        raise CaptureError(
            f"no example inputs are known for {type(model).__name__}, whose main input is {main!r}: pass example_inputs"
        )
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = ids()
    return {name: t.to(device) for name, t in inputs.items()}
