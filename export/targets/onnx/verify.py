"""Verification of the target `onnx`: the files, the pattern, the weights, and the outputs in onnxruntime."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from sparsepass.export.pattern import check_pattern
from sparsepass.export.targets.onnx.artifact import DECODER_FILE, ENCODER_FILE, MODEL_FILE, OnnxArtifact, apply_view
from sparsepass.export.targets.onnx.lower import converted
from sparsepass.export.targets.onnx.session import Array, DecoderSession, open_widened, run_session, to_numpy
from sparsepass.export.targets.onnx.stored import holds_integers
from sparsepass.export.targets.onnx.ties import picks, repeating, tie_in, without_ties
from sparsepass.graph.admission import in_float64, plain_settings
from sparsepass.graph.limits import broken
from sparsepass.graph.program import Program, masked_weight
from sparsepass.graph.support import SparsepassError, first_line
from sparsepass.passes.maths import canonical_zeros

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest allowed difference of an output, relative to the largest entry of the program's."""

# A float32 difference above the tolerance is rounding if the file is at most this many times further from the float64
# result than the program is, and nowhere further than the second number. Above the third, float64 takes too much memory.
_ROUNDING_FACTOR, _LARGEST_ROUNDING, _LARGEST_IN_FLOAT64 = 4.0, 1e-2, 2_000_000_000
# Rounding to float16 moves the outputs of a deep model by less than this; what overflows moves them further.
_LARGEST_IN_FLOAT16 = 0.5


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
    - *weights*: every initializer is bitwise the program's weight (masks folded, dtype converted, laid out anew), and what
      integers stand for is bitwise what the program's do.
    - *outputs*: what onnxruntime computes equals what the program computes on its example inputs: for graphs with a cache
      the prefill, one decoded token, several tokens at once, a batch of one, and left-padded prompts. A larger difference
      in float32 is accepted as rounding only if the file is about as near to a float64 run as the program itself. The CPU
      has no kernels for bfloat16, so of such a file a copy in float32 is run. It computes float16 in float32, where nothing
      overflows, so the model is run in float16 by torch too, and its outputs have to be finite.

    Args:
        program: The program that was exported.
        folder: Where its files are.
        artifact: What `lower_onnx` returned.
        tolerance: Largest difference relative to the largest output; by default 1e-4 in float32, 2e-2 in float16.

    Returns:
        The findings as JSON; ``holds`` says whether all of them are good.
    """
    place = Path(folder)
    limit = TOLERANCES[artifact.dtype] if tolerance is None else tolerance
    findings: dict[str, Any] = {
        "files": {graph.file: _check_file(place / graph.file) for graph in artifact.graphs},
        "pattern": {graph.file: _pattern(place / graph.file, artifact) for graph in artifact.graphs},
        "weights": _compare_weights(program, place, artifact),
        "outputs": _compare_outputs(without_ties(program)[0], place, artifact, limit),
    }
    findings["holds"] = (
        all(said == "ok" for said in findings["files"].values())
        and all(found["conforms"] for found in findings["pattern"].values())
        and not findings["weights"]["differing"]
        and all(case["holds"] for case in findings["outputs"]["cases"])
        and bool(findings["outputs"]["cases"])
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
    wanted: torch.dtype = getattr(torch, artifact.dtype)
    differing, num_converted, num_integers = [], 0, 0
    for name, found in artifact.weights.items():
        weight = masked_weight(program, name).cpu()
        for stored in found:
            if stored.form != "floats":
                num_integers += 1
                if not holds_integers(program, name, stored, models[stored.file].graph):
                    differing.append(stored.initializer)
                continue
            value = models[stored.file].graph.initializers.get(stored.initializer)
            tensor = value.const_value if value is not None else None
            if tensor is None:
                differing.append(stored.initializer)
                continue
            in_file = np.asarray(tensor.numpy(), order="C")
            expected = weight
            if weight.is_floating_point() and tensor.dtype.name.lower() != _onnx_name(weight.dtype):
                expected, num_converted = canonical_zeros(weight.to(wanted)), num_converted + 1
            laid_out = apply_view(_tensor_bits(expected), stored.view)
            if not np.array_equal(laid_out, in_file.view(f"i{in_file.dtype.itemsize}")):
                differing.append(stored.initializer)
    return {
        "num_checked": sum(map(len, artifact.weights.values())),
        "num_converted": num_converted,
        "num_integers": num_integers,
        "differing": differing,
    }


def _compare_outputs(program: Program, place: Path, artifact: OnnxArtifact, limit: float) -> dict[str, Any]:
    found: dict[str, Any] = {"tolerance": limit, "not_run": None, "cases": []}
    cases = {"forward": _plain_cases, "decoder-with-past": _decoder_cases, "encoder-decoder-with-past": _two_sided_cases}
    kind = cases[artifact.kind]
    try:
        with torch.no_grad():
            mine = list(kind(program, place, _Forward(program)))
            found["cases"] = [{"case": name, **_difference(expected, got, limit)} for name, expected, got in mine]
            if artifact.dtype == "float16":
                found["cases"] += _float16_cases(program)
            if artifact.dtype == "float32" and not all(case["holds"] for case in found["cases"]):
                _weigh_by_rounding(mine, list(_exact_cases(program, place, kind)), found["cases"])
            _explain_by_ties(program, found["cases"])
    except SparsepassError as error:
        found["not_run"], found["cases"] = str(error), []
    return found


def _explain_by_ties(program: Program, judged: list[dict[str, Any]]) -> None:
    """Give outputs that are too far off their reason, where the model itself leaves to chance what it computes."""
    failed = [case for case in judged if not case["holds"] and "reason" not in case]
    inputs = {name: program.example_inputs[name] for name in program.input_names}
    said = next((said for each in (inputs, repeating(inputs)) if (said := tie_in(program, each))), None) if failed else None
    for case in failed if said else ():
        case["reason"] = said


def _float16_cases(program: Program) -> list[dict[str, Any]]:
    """What the model computes where all arithmetic is float16, as on a GPU: activations may overflow there.

    A program that is float16 itself was run so already.
    """
    if program.origin.model_class is None or any(t.dtype is torch.float16 for t in program.tensors().values()):
        return []
    expected = program(**program.example_inputs)
    inputs = {n: t.cpu().half() if t.is_floating_point() else t.cpu() for n, t in program.example_inputs.items()}
    outputs = _plainly(converted(program, torch.float16).cpu())(**inputs)
    found = []
    for name in program.output_names:
        mine, halved = (each.get(name) if isinstance(each, Mapping) else None for each in (expected, outputs))
        if isinstance(mine, Tensor) and isinstance(halved, Tensor):
            judged = _difference(mine, halved.detach().cpu().numpy(), _LARGEST_IN_FLOAT16, "its")
            if not judged["holds"]:
                judged["reason"] = f"activations overflow in float16: {judged.get('reason', 'too far from the program')}"
            found.append({"case": f"float16 arithmetic: {name}", **judged})
    return found


def _exact_cases(program: Program, place: Path, kind: "Callable[[Program, Path, _Forward], Cases]") -> "Cases":
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
        own = _difference(truth, expected.detach().cpu().double().numpy(), 0.0).get("max_relative", np.inf)
        theirs = _difference(truth, got, 0.0).get("max_relative", np.inf)
        verdict["against_float64"] = {"program": own, "file": theirs}
        verdict["holds"] = bool(theirs <= _ROUNDING_FACTOR * own and theirs <= _LARGEST_ROUNDING)


def _difference(expected: Tensor, got: Array, limit: float, whose: str = "the file's") -> dict[str, Any]:
    reference = expected.detach().cpu().to(torch.float64).numpy()
    if reference.shape != got.shape:
        return {"holds": False, "reason": f"the program gives shape {reference.shape}, the file {got.shape}"}
    values = got.astype(np.float64)
    ruled_out = np.isneginf(reference) & np.isneginf(values)
    for owner, each in (("the program's", reference), (whose, values)):
        unknown = int((~np.isfinite(each) & ~ruled_out).sum()) or (each.size if ruled_out.all() else 0)
        if unknown:
            return {"holds": False, "reason": f"{unknown} of {owner} {each.size} values are NaN or infinite: nothing is known"}
    error = np.where(ruled_out, 0.0, np.abs(np.where(ruled_out, 0.0, values) - np.where(ruled_out, 0.0, reference)))
    largest = float(np.abs(np.where(ruled_out, 0.0, reference)).max(initial=0.0))
    worst = float(error.max(initial=0.0))
    relative = worst / largest if largest else worst
    return {
        "holds": bool(relative <= limit),
        "max_error": worst,
        "mean_error": float(error.mean()) if error.size else 0.0,
        "max_relative": relative,
    }


Case = tuple[str, Tensor, Array]
Cases = Iterator[Case]


class _Forward:
    """What computes the expected outputs: the program itself."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """All outputs of the program, in its order."""
        return self.program.run(inputs)

    def logits(self, ids: Tensor, **others: Tensor) -> Tensor:
        """Logits of (decoder) tokens; no token is padding."""
        program = self.program
        main = "decoder_input_ids" if "decoder_input_ids" in program.input_names else "input_ids"
        given = {main: ids.to(program.device), **{n: t.to(program.device) for n, t in others.items()}}
        if "position_ids" in program.input_names:
            first = int(program.example_inputs["position_ids"].min())  # RoBERTa's do not begin at 0
            positions = torch.arange(first, first + ids.shape[1], device=program.device)
            given["position_ids"] = positions[None].repeat(ids.shape[0], 1)
        if "attention_mask" in program.input_names and main == "input_ids":
            given["attention_mask"] = torch.ones_like(given[main])
        flat = program.run(program.flat_inputs(**given))
        logits = flat[program.output_names.index("logits")]
        assert isinstance(logits, Tensor)
        return logits

    def padded(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits of tokens some of which are padding, as the model's own class computes them."""
        model = _plainly(self.program.to_model().cpu())
        return model(input_ids=ids, attention_mask=mask).logits  # type: ignore[no-any-return]


def _plainly(model: nn.Module) -> nn.Module:
    """The model, set to run as it was captured: what it does with a cache may be something else."""
    with plain_settings(model):
        return model


@final
class _ExactForward(_Forward):
    """The program's model in float64."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.model = _plainly(in_float64(program.to_model().cpu()))

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        found = self.model(**{n: t.cpu().double() if t.is_floating_point() else t.cpu() for n, t in inputs.items()})
        return [found[name] for name in self.program.output_names]

    def padded(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).logits  # type: ignore[no-any-return]

    def logits(self, ids: Tensor, **others: Tensor) -> Tensor:
        main = "decoder_input_ids" if "decoder_input_ids" in self.program.input_names else "input_ids"
        given = {n: t.double() if t.is_floating_point() else t for n, t in others.items()}
        return self.model(**{main: ids}, **given).logits  # type: ignore[no-any-return]


def _plain_cases(program: Program, place: Path, forward: _Forward) -> Cases:
    session = open_widened(place / MODEL_FILE)
    example = {name: program.example_inputs[name] for name in program.input_names}
    variants = {"example inputs": example}
    if all(0 in program.dynamic_axes.get(name, ()) for name in example):
        variants["batch of 1"] = {name: tensor[:1] for name, tensor in example.items()}
    tokens = {n for n, t in example.items() if t.dim() == 2 and 1 in program.dynamic_axes.get(n, ()) and t.shape[1] > 2}
    if tokens:
        variants["shorter"] = {n: t[:, :-1] if n in tokens else t for n, t in example.items()}
    if picks(program):
        variants["tokens that come twice"] = repeating(example)
    for variant, inputs in variants.items():
        if broken(program.limits, {name: tuple(tensor.shape) for name, tensor in inputs.items()}) is not None:
            continue  # the graph does not hold for it: the artifact's notes say so
        expected = forward.outputs(inputs)
        outputs = run_session(session, {name: to_numpy(tensor) for name, tensor in inputs.items()})
        for (name, got), reference in zip(outputs.items(), expected, strict=True):
            yield f"{variant}: {name}", reference, got


def _decoder_cases(program: Program, place: Path, forward: _Forward) -> Cases:
    session = open_widened(place / MODEL_FILE)
    ids = _long_enough(program.example_inputs["input_ids"].cpu())
    ids = ids if ids.shape[0] > 1 else ids.repeat(2, 1)
    length = ids.shape[1]
    full = forward.logits(ids)

    def run(*chunks: Tensor, mask: Tensor | None = None) -> Array:
        return _run_chunks(DecoderSession(session), chunks, mask)

    yield from _stepped(ids, full, run)
    names = {value.name for value in session.get_inputs()}
    if "attention_mask" in names:
        short = ids[:1, : length - 3]
        padded = torch.cat([torch.cat([short[:, :1].repeat(1, 2), short], 1), ids[1:2, : length - 1]], 0)
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, :2] = 0
        step = ids[:2, -1:]
        if "position_ids" in names:
            alone = forward.logits(torch.cat([short, step[:1]], 1).repeat(2, 1))[:1]
        else:  # positions count the padding, too: what is right is what the model itself makes of it
            alone = forward.padded(torch.cat([padded, step], 1), mask)[:1, 2:]
        yield "left padding, prefill", alone[:, :-1], run(padded, mask=mask[:, :-1])[:1, 2:]
        yield "left padding, decode", alone[:, -1:], run(padded, step, mask=mask)[:1]


def _two_sided_cases(program: Program, place: Path, forward: _Forward) -> Cases:
    encoder, decoder = open_widened(place / ENCODER_FILE), open_widened(place / DECODER_FILE)
    inputs = {name: tensor.cpu() for name, tensor in program.example_inputs.items()}
    ids = _long_enough(inputs.pop("decoder_input_ids"))
    given = {name: tensor for name, tensor in inputs.items() if not name.startswith("decoder_")}
    full = forward.logits(ids, **given)

    def run(*chunks: Tensor) -> Array:
        return _run_chunks(DecoderSession(decoder, encoder, {name: t[: len(chunks[0])] for name, t in given.items()}), chunks)

    yield from _stepped(ids, full, run)


def _run_chunks(runner: DecoderSession, chunks: tuple[Tensor, ...], mask: Tensor | None = None) -> Array:
    """Feed tokens chunk by chunk, each with the mask of all so far; the last chunk's logits."""
    ids = torch.cat(chunks, 1)
    mask = torch.ones_like(ids) if mask is None else mask
    seen = 0
    for chunk in chunks:
        seen += chunk.shape[1]
        logits = runner.step(chunk.numpy(), mask[:, :seen].numpy())
    return logits


def _stepped(ids: Tensor, full: Tensor, run: Callable[..., Array]) -> Cases:
    """The cases of a graph with a cache that need no padding; `full` are the logits of all tokens at once."""
    yield "prefill", full, run(ids)
    yield "decode one token", full[:, -1:], run(ids[:, :-1], ids[:, -1:])
    yield "two tokens after a past, batch of 1", full[:1, -2:], run(ids[:1, :-2], ids[:1, -2:])
    yield "one token without a past", full[:1, :1], run(ids[:1, :1])


def _long_enough(ids: Tensor) -> Tensor:
    return ids if ids.shape[1] >= 6 else ids.repeat(1, -(-6 // ids.shape[1]))


def _tensor_bits(tensor: Tensor) -> Array:
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(whole).numpy()


def _onnx_name(dtype: torch.dtype) -> str:
    return {"float32": "float", "float64": "double"}.get(name := str(dtype).removeprefix("torch."), name)
