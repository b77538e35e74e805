"""Running exported graphs in onnxruntime: sessions, greedy generation, and the verification of what was written."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from sparsepass.export.pattern import check_pattern
from sparsepass.export.targets.onnx.artifact import DECODER_FILE, ENCODER_FILE, MODEL_FILE, OnnxArtifact, apply_view
from sparsepass.graph.program import Program
from sparsepass.graph.states import masked_weight
from sparsepass.graph.support import SparsepassError, first_line
from sparsepass.passes.maths import canonical_zeros

Array = npt.NDArray[Any]
Session = Any  # onnxruntime.InferenceSession; the package has no types

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest allowed difference of an output, relative to the largest entry of the program's."""

# A float32 difference above the tolerance is rounding if the file is at most this many times further from the float64
# result than the program is, and nowhere further than the second number. Above the third, float64 takes too much memory.
_ROUNDING_FACTOR, _LARGEST_ROUNDING, _LARGEST_IN_FLOAT64 = 4.0, 1e-2, 2_000_000_000
_NO_BFLOAT16 = "onnxruntime's CPU provider has no bfloat16 kernels for MatMul; run the file on a GPU to compare outputs"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NUMPY = {
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


def open_session(path: str | Path) -> Session:
    """Open an ONNX file in onnxruntime on the CPU.

    Raises:
        SparsepassError: If the file is missing or onnxruntime cannot run it.
    """
    if not Path(path).is_file():
        raise SparsepassError(f"{path} is no file; give the .onnx file, or the folder that holds {MODEL_FILE}")
    options = ort.SessionOptions()
    options.log_severity_level = 3
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
    ids = _numpy(input_ids).astype(np.int64)
    if ids.ndim != 2 or not ids.size or num_tokens < 1:
        raise SparsepassError(
            f"expected prompts of shape [batch, tokens] and at least one token to generate, got {ids.shape} and {num_tokens}"
        )
    mask = np.ones_like(ids) if attention_mask is None else _numpy(attention_mask).astype(np.int64)
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


def verify_onnx(
    program: Program,
    folder: str | Path,
    artifact: OnnxArtifact,
    *,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Open what `lower_onnx` wrote again, and prove it: the files, the pattern, the weights, the outputs.

    - *files*: `onnx.checker` accepts each graph.
    - *pattern*: every sparse weight is N:M in the file, along the axis that its operation reduces.
    - *weights*: every initializer is bitwise the program's weight (masks folded, dtype converted, laid out anew).
    - *outputs*: what onnxruntime computes equals what the program computes on its example inputs: for graphs with a cache
      the prefill, one decoded token, several tokens at once, a batch of one, and left-padded prompts. A larger difference
      in float32 is accepted as rounding only if the file is about as near to a float64 run as the program itself.

    Args:
        program: The program that was exported.
        folder: Where its files are.
        artifact: What `lower_onnx` returned.
        tolerance: Largest difference relative to the largest output; by default 1e-4 in float32, 2e-2 in float16.

    Returns:
        The findings as JSON; ``holds`` says whether all of them are good. A bfloat16 file is not run, and says so.
    """
    place = Path(folder)
    limit = TOLERANCES[artifact.dtype] if tolerance is None else tolerance
    findings: dict[str, Any] = {
        "files": {graph.file: _check_file(place / graph.file) for graph in artifact.graphs},
        "pattern": {graph.file: _pattern(place / graph.file, artifact) for graph in artifact.graphs},
        "weights": _compare_weights(program, place, artifact),
        "outputs": _compare_outputs(program, place, artifact, limit),
    }
    findings["holds"] = (
        all(said == "ok" for said in findings["files"].values())
        and all(found["conforms"] for found in findings["pattern"].values())
        and not findings["weights"]["differing"]
        and all(case["holds"] for case in findings["outputs"]["cases"])
        and (bool(findings["outputs"]["cases"]) or findings["outputs"]["not_run"] == _NO_BFLOAT16)
    )
    return findings


def _check_file(path: Path) -> str:
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        return first_line(error)[:300]
    return "ok"


def _pattern(path: Path, artifact: OnnxArtifact) -> dict[str, Any]:
    expected = artifact.expected_sparse[path.name]
    report = check_pattern(path, expected_sparse=expected)
    return {
        "conforms": report.conforms,
        "num_sparse": len(expected),
        "num_negative_zeros": report.num_negative_zeros,
        "failures": [entry.to_dict() for entry in report.failures],
        "summary": report.summary(),
    }


def _compare_weights(program: Program, place: Path, artifact: OnnxArtifact) -> dict[str, Any]:
    models = {graph.file: ir.load(place / graph.file) for graph in artifact.graphs}
    wanted = _DTYPES[artifact.dtype]
    differing, num_converted = [], 0
    for name, found in artifact.weights.items():
        weight = masked_weight(program, name).cpu()
        for stored in found:
            value = models[stored.file].graph.initializers.get(stored.initializer)
            tensor = value.const_value if value is not None else None
            if tensor is None:
                differing.append(stored.initializer)
                continue
            in_file = _bits(np.asarray(tensor.numpy(), order="C"))
            expected = weight
            if weight.is_floating_point() and tensor.dtype.name.lower() != _onnx_name(weight.dtype):
                expected, num_converted = canonical_zeros(weight.to(wanted)), num_converted + 1
            laid_out = apply_view(_tensor_bits(expected), stored.view)
            if not np.array_equal(laid_out, in_file):
                differing.append(stored.initializer)
    return {"num_checked": sum(map(len, artifact.weights.values())), "num_converted": num_converted, "differing": differing}


def _compare_outputs(program: Program, place: Path, artifact: OnnxArtifact, limit: float) -> dict[str, Any]:
    found: dict[str, Any] = {"tolerance": limit, "not_run": None, "cases": []}
    cases = {"forward": _plain_cases, "decoder-with-past": _decoder_cases, "encoder-decoder-with-past": _two_sided_cases}
    kind = cases[artifact.kind]
    try:
        with torch.no_grad():
            mine = list(kind(program, place, _ProgramForward(program)))
            found["cases"] = [{"case": name, **_difference(expected, got, limit)} for name, expected, got in mine]
            if artifact.dtype == "float32" and not all(case["holds"] for case in found["cases"]):
                _weigh_by_rounding(mine, list(_exact_cases(program, place, kind)), found["cases"])
    except SparsepassError as error:
        found["not_run"] = _NO_BFLOAT16 if artifact.dtype == "bfloat16" else str(error)
        found["cases"] = []
    return found


def _exact_cases(program: Program, place: Path, kind: "Callable[[Program, Path, Forward], Cases]") -> "Cases":
    """The same cases with outputs computed in float64; none where that cannot be done."""
    num_weights = sum(tensor.numel() for tensor in program.tensors().values())
    if program.origin.model_class is None or num_weights > _LARGEST_IN_FLOAT64:
        return
    yield from kind(program, place, _ExactForward(program))


def _weigh_by_rounding(mine: "list[Case]", exact: "list[Case]", judged: list[dict[str, Any]]) -> None:
    """Accept a difference that is float32 rounding: the file is about as near to the float64 result as the program is.

    Some models amplify rounding a thousandfold on some inputs, so that no fixed tolerance tells it from a mistake.
    """
    for verdict, (_, expected, got), (_, truth, _) in zip(judged, mine, exact, strict=bool(exact)):
        if verdict["holds"] or "max_relative" not in verdict:
            continue
        own = _difference(truth, expected.detach().cpu().numpy(), 0.0)["max_relative"]
        theirs = _difference(truth, got, 0.0)["max_relative"]
        verdict["against_float64"] = {"program": own, "file": theirs}
        verdict["holds"] = bool(theirs <= _ROUNDING_FACTOR * own and theirs <= _LARGEST_ROUNDING)


def _difference(expected: Tensor, got: Array, limit: float) -> dict[str, Any]:
    reference = expected.detach().cpu().to(torch.float64).numpy()
    if reference.shape != got.shape:
        return {"holds": False, "reason": f"the program gives shape {reference.shape}, the file {got.shape}"}
    error = np.abs(got.astype(np.float64) - reference)
    largest = float(np.abs(reference).max(initial=0.0))
    worst = float(error.max(initial=0.0))
    relative = worst / largest if largest else worst
    return {
        "holds": bool(relative <= limit),  # false for NaN too
        "max_error": worst,
        "mean_error": float(error.mean()) if error.size else 0.0,
        "max_relative": relative,
    }


Case = tuple[str, Tensor, Array]
Cases = Iterator[Case]


class Forward(Protocol):
    """What computes the expected outputs."""

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """All outputs of the program, in its order."""

    def logits(self, ids: Tensor, **others: Tensor) -> Tensor:
        """Logits of (decoder) tokens; no token is padding."""


@final
class _ProgramForward:
    """The program itself."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return list(self.program.graph_module(*inputs.values()))

    def logits(self, ids: Tensor, **others: Tensor) -> Tensor:
        program = self.program
        main = "decoder_input_ids" if "decoder_input_ids" in program.input_names else "input_ids"
        given = {main: ids.to(program.device), **{n: t.to(program.device) for n, t in others.items()}}
        if "position_ids" in program.input_names:
            given["position_ids"] = torch.arange(ids.shape[1], device=program.device)[None].repeat(ids.shape[0], 1)
        if "attention_mask" in program.input_names and main == "input_ids":
            given["attention_mask"] = torch.ones_like(given[main])
        flat = program.graph_module(*program.flat_inputs(**given).values())
        logits = flat[program.output_names.index("logits")]
        assert isinstance(logits, Tensor)
        return logits


@final
class _ExactForward:
    """The program's model in float64."""

    def __init__(self, program: Program) -> None:
        self.program, self.model = program, program.to_model().cpu().double()

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        found = self.model(**{n: t.cpu().double() if t.is_floating_point() else t.cpu() for n, t in inputs.items()})
        return [found[name] for name in self.program.output_names]

    def logits(self, ids: Tensor, **others: Tensor) -> Tensor:
        main = "decoder_input_ids" if "decoder_input_ids" in self.program.input_names else "input_ids"
        given = {n: t.double() if t.is_floating_point() else t for n, t in others.items()}
        return self.model(**{main: ids}, **given).logits  # type: ignore[no-any-return]


def _plain_cases(program: Program, place: Path, forward: Forward) -> Cases:
    session = open_session(place / MODEL_FILE)
    example = {name: program.example_inputs[name] for name in program.input_names}
    variants = {"example inputs": example}
    if all(0 in program.dynamic_axes.get(name, ()) for name in example):
        variants["batch of 1"] = {name: tensor[:1] for name, tensor in example.items()}
    tokens = {n for n, t in example.items() if t.dim() == 2 and 1 in program.dynamic_axes.get(n, ()) and t.shape[1] > 2}
    if tokens:
        variants["shorter"] = {n: t[:, :-1] if n in tokens else t for n, t in example.items()}
    for variant, inputs in variants.items():
        expected = forward.outputs(inputs)
        outputs = _run(session, {name: _numpy(tensor) for name, tensor in inputs.items()})
        for (name, got), reference in zip(outputs.items(), expected, strict=True):
            yield f"{variant}: {name}", reference, got


def _decoder_cases(program: Program, place: Path, forward: Forward) -> Cases:
    session = open_session(place / MODEL_FILE)
    ids = _long_enough(program.example_inputs["input_ids"].cpu())
    ids = ids if ids.shape[0] > 1 else ids.repeat(2, 1)
    length = ids.shape[1]
    full = forward.logits(ids)

    def run(*chunks: Tensor, mask: Tensor | None = None) -> Array:
        runner = _Runner(session)
        padding = torch.ones(chunks[0].shape[0], sum(chunk.shape[1] for chunk in chunks), dtype=torch.long)
        padding = padding if mask is None else mask
        seen = 0
        for chunk in chunks:
            seen += chunk.shape[1]
            logits = runner.step(chunk.numpy(), padding[:, :seen].numpy())
        return logits

    yield "prefill", full, run(ids)
    yield "decode one token", full[:, -1:], run(ids[:, :-1], ids[:, -1:])
    yield "two tokens after a past, batch of 1", full[:1, -2:], run(ids[:1, :-2], ids[:1, -2:])
    yield "one token without a past", full[:1, :1], run(ids[:1, :1])
    if "attention_mask" in {value.name for value in session.get_inputs()}:
        short = ids[:1, : length - 3]
        padded = torch.cat([torch.cat([short[:, :1].repeat(1, 2), short], 1), ids[1:2, : length - 1]], 0)
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, :2] = 0
        step = ids[:2, -1:]
        alone = forward.logits(torch.cat([short, step[:1]], 1).repeat(2, 1))[:1]
        yield "left padding, prefill", alone[:, :-1], run(padded, mask=mask[:, :-1])[:1, 2:]
        yield "left padding, decode", alone[:, -1:], run(padded, step, mask=mask)[:1]


def _two_sided_cases(program: Program, place: Path, forward: Forward) -> Cases:
    encoder, decoder = open_session(place / ENCODER_FILE), open_session(place / DECODER_FILE)
    inputs = {name: tensor.cpu() for name, tensor in program.example_inputs.items()}
    ids = _long_enough(inputs.pop("decoder_input_ids"))
    given = {name: tensor for name, tensor in inputs.items() if not name.startswith("decoder_")}
    full = forward.logits(ids, **given)

    def run(*chunks: Tensor) -> Array:
        rows = chunks[0].shape[0]
        runner = _Runner(decoder, encoder, {name: tensor[:rows] for name, tensor in given.items()})
        seen = 0
        for chunk in chunks:
            seen += chunk.shape[1]
            logits = runner.step(chunk.numpy(), np.ones((rows, seen), np.int64))
        return logits

    yield "prefill", full, run(ids)
    yield "decode one token", full[:, -1:], run(ids[:, :-1], ids[:, -1:])
    yield "two tokens after a past, batch of 1", full[:1, -2:], run(ids[:1, :-2], ids[:1, -2:])
    yield "one token without a past", full[:1, :1], run(ids[:1, :1])


def _long_enough(ids: Tensor) -> Tensor:
    return ids if ids.shape[1] >= 6 else ids.repeat(1, -(-6 // ids.shape[1]))


@final
class _Runner:
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
                "the graph has no key-value cache, so it cannot generate step by step; export it with --task "
                "text-generation-with-past"
            )
        if encoder is not None:
            given = {name: _numpy(value) for name, value in (encoder_inputs or {}).items()}
            names = {value.name for value in encoder.get_inputs()}
            if "attention_mask" in names and "attention_mask" not in given and "input_ids" in given:
                given["attention_mask"] = np.ones_like(given["input_ids"])
            made = _run(encoder, given)
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
        found = _run(self.session, feed)
        self.past |= {
            name.replace("present", "past_key_values"): value for name, value in found.items() if name.startswith("present.")
        }
        return found["logits"]


def _open_runner(source: "str | Path | Session", encoder_inputs: Mapping[str, "Tensor | Array"] | None) -> _Runner:
    if not isinstance(source, str | Path):
        return _Runner(source)
    place = Path(source)
    if (place / DECODER_FILE).is_file():
        if encoder_inputs is None:
            raise SparsepassError(f"{place} holds an encoder-decoder: give encoder_inputs, such as its input_ids")
        return _Runner(open_session(place / DECODER_FILE), open_session(place / ENCODER_FILE), encoder_inputs)
    return _Runner(open_session(place / MODEL_FILE if place.is_dir() else place))


def _run(session: Session, feed: Mapping[str, Array]) -> dict[str, Array]:
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
        raise SparsepassError(f"an input of type {kind} cannot be made from numpy arrays; {_NO_BFLOAT16}")
    return array if array.dtype == wanted else array.astype(wanted)


def _numpy(value: "Tensor | Array") -> Array:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _bits(array: Array) -> Array:
    return array.view({1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[array.dtype.itemsize])


def _tensor_bits(tensor: Tensor) -> Array:
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(whole).numpy()


def _onnx_name(dtype: torch.dtype) -> str:
    return {"float32": "float", "float64": "double"}.get(name := str(dtype).removeprefix("torch."), name)
