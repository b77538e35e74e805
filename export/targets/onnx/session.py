"""Exported graphs in onnxruntime: sessions, decoders with their cache, and greedy generation."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor

from sparsepass.export.targets.onnx.artifact import DECODER_FILE, ENCODER_FILE, MODEL_FILE
from sparsepass.graph.equivalence import exact_products, widened_copy
from sparsepass.graph.support import SparsepassError, first_line

Array = npt.NDArray[Any]
Session = Any  # onnxruntime.InferenceSession; the package has no types

NO_BFLOAT16: Final = "onnxruntime's CPU provider has no bfloat16 kernels for MatMul; run the file on a GPU to compare outputs"
_NUMPY: Final = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


@final
@dataclass(frozen=True, kw_only=True)
class Greedy:
    """Tokens that a graph generated.

    Attributes:
        tokens: [batch, new tokens], int64.
        margins: [batch, new tokens]: best logit minus second best. Where it is tiny, another runtime may rightly choose
            the other token.
    """

    tokens: Array
    margins: Array


def open_widened(path: Path) -> Session:
    """Open an ONNX file in onnxruntime on the CPU; of one in bfloat16, a copy that computes the same in float32.

    Raises:
        SparsepassError: If the file is missing or onnxruntime cannot run it.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = widened_copy(path, Path(folder)) if path.is_file() else None
        return open_session(copy or path)


def open_session(path: str | Path) -> Session:
    """Open an ONNX file in onnxruntime on the CPU.

    Raises:
        SparsepassError: If the file is missing or onnxruntime cannot run it.
    """
    if not Path(path).is_file():
        raise SparsepassError(f"{path} is no file; give the .onnx file, or the folder that holds {MODEL_FILE}")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    exact_products(options)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its extension module, which have no common base
        raise SparsepassError(f"onnxruntime cannot run {path}: {first_line(error)[:300]}") from error


def generate_greedy(
    source: "str | Path | Session",
    input_ids: "Tensor | Array",
    num_tokens: int,
    *,
    attention_mask: "Tensor | Array | None" = None,
    encoder_inputs: Mapping[str, "Tensor | Array"] | None = None,
) -> Greedy:
    """Generate with a key-value-cache graph in onnxruntime, always taking the best token, past any end token.

    Args:
        source: An open session, an .onnx file, or a folder that an export wrote.
        input_ids: Prompts [batch, tokens]; for an encoder-decoder (a folder) the decoder's first tokens.
        num_tokens: How many to generate.
        attention_mask: 0 where a prompt is padded, on its left; all ones by default.
        encoder_inputs: Inputs of the encoder, for an encoder-decoder.

    Returns:
        The new tokens, and how clear each choice was.

    Raises:
        SparsepassError: If the graph has no cache, or the inputs do not fit it.
    """
    ids = to_numpy(input_ids).astype(np.int64)
    if ids.ndim != 2 or not ids.size or num_tokens < 1:
        raise SparsepassError(
            f"expected prompts of shape [batch, tokens] and at least one token to generate, got {ids.shape} and {num_tokens}"
        )
    mask = np.ones_like(ids) if attention_mask is None else to_numpy(attention_mask).astype(np.int64)
    if mask.shape != ids.shape or not bool(mask[:, -1].all()):
        raise SparsepassError(
            f"the attention mask must be shaped like the prompts {ids.shape} and end in ones (pad on the left), "
            f"got {mask.shape}"
        )
    runner = _open_runner(source, encoder_inputs)
    tokens, margins = [], []
    step = ids
    for _ in range(num_tokens):
        last = runner.step(step, mask)[:, -1].astype(np.float32)
        best = last.argmax(-1)
        two = np.partition(last, -2, axis=-1)[:, -2:]
        tokens.append(best)
        margins.append(two[:, 1] - two[:, 0])
        step = best[:, None].astype(np.int64)
        mask = np.concatenate([mask, np.ones_like(step)], axis=1)
    return Greedy(tokens=np.stack(tokens, 1), margins=np.stack(margins, 1))


@final
class DecoderSession:
    """A decoder graph with its cache: feeds tokens, keeps the past."""

    def __init__(
        self, session: Session, encoder: Session | None = None, encoder_inputs: Mapping[str, "Tensor | Array"] | None = None
    ) -> None:
        self.session = session
        self.inputs = {value.name: value for value in session.get_inputs()}
        self.outputs = [value.name for value in session.get_outputs()]
        self.past: dict[str, Array] = {}
        if not any(name.startswith("past_key_values.") for name in self.inputs):
            raise SparsepassError(
                "the graph has no key-value cache, so it cannot generate step by step; export it with "
                "task=text-generation-with-past"
            )
        if encoder is not None:
            given = {name: to_numpy(value) for name, value in (encoder_inputs or {}).items()}
            names = {value.name for value in encoder.get_inputs()}
            if "attention_mask" in names and "attention_mask" not in given and "input_ids" in given:
                given["attention_mask"] = np.ones_like(given["input_ids"])
            made = run_session(encoder, given)
            self.past = {
                name.replace("present", "past_key_values"): value for name, value in made.items() if name.startswith("present.")
            }
            if "encoder_attention_mask" in self.inputs:
                self.past["encoder_attention_mask"] = given["attention_mask"]

    def step(self, ids: Array, mask: Array) -> Array:
        """Feed tokens [batch, sequence] with the mask of all tokens so far; returns their logits."""
        feed = {"input_ids": ids, **self.past}
        if "attention_mask" in self.inputs:
            feed["attention_mask"] = mask
        if "position_ids" in self.inputs:
            feed["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        for name, value in self.inputs.items():
            if name not in feed and name.startswith("past_key_values."):
                heads, size = value.shape[1], value.shape[3]
                feed[name] = np.zeros((ids.shape[0], heads, 0, size), _NUMPY[value.type])
        found = run_session(self.session, feed)
        self.past |= {
            name.replace("present", "past_key_values"): value for name, value in found.items() if name.startswith("present.")
        }
        return found["logits"]


def _open_runner(source: "str | Path | Session", encoder_inputs: Mapping[str, "Tensor | Array"] | None) -> DecoderSession:
    if not isinstance(source, str | Path):
        return DecoderSession(source)
    place = Path(source)
    if (place / DECODER_FILE).is_file():
        if encoder_inputs is None:
            raise SparsepassError(f"{place} holds an encoder-decoder: give encoder_inputs, such as its input_ids")
        return DecoderSession(open_session(place / DECODER_FILE), open_session(place / ENCODER_FILE), encoder_inputs)
    return DecoderSession(open_session(place / MODEL_FILE if place.is_dir() else place))


def run_session(session: Session, feed: Mapping[str, Array]) -> dict[str, Array]:
    """Run a graph: output -> array.

    Raises:
        SparsepassError: If an input is missing, or onnxruntime fails.
    """
    wanted = {value.name: value for value in session.get_inputs()}
    if missing := sorted(set(wanted) - set(feed)):
        raise SparsepassError(f"the graph needs {', '.join(missing)}, which were not given; it takes {', '.join(wanted)}")
    given = {name: _as(feed[name], value.type) for name, value in wanted.items()}
    try:
        outputs = session.run(None, given)
    except Exception as error:  # see open_session
        shapes = {name: array.shape for name, array in given.items()}
        raise SparsepassError(f"onnxruntime failed on inputs of shapes {shapes}: {first_line(error)[:300]}") from error
    return {value.name: output for value, output in zip(session.get_outputs(), outputs, strict=True)}


def _as(array: Array, kind: str) -> Array:
    wanted = _NUMPY.get(kind)
    if wanted is None:
        raise SparsepassError(f"an input of type {kind} cannot be made from numpy arrays; {NO_BFLOAT16}")
    return array if array.dtype == wanted else array.astype(wanted)


def to_numpy(value: "Tensor | Array") -> Array:
    """A tensor of any device as an array; of bfloat16, which numpy does not know, as float32, which holds all its values."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    return (value.float() if value.dtype is torch.bfloat16 else value).detach().cpu().numpy()
