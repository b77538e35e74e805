"""One tiny model through capture, hf and onnx, compared with the model itself at lengths from 1 to 80."""

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from tests.architectures.tiny import text, tiny_model
from torch import Tensor, nn

from sparsepass.export import export
from sparsepass.graph import Program, SparsepassError, capture
from sparsepass.passes import apply_passes

LENGTHS = range(1, 81)
PARTS = ("capture", "hf", "onnx")
_WITH_OTHER_BATCHES = (1, 7, 8, 9, 16, 33, 40)
_IN_ONNXRUNTIME = (*range(1, 18), 23, 31, 32, 33, 39, 40, 41, 48, 63, 64, 65, 72, 79, 80)
_OF_A_PROGRAM, _OF_A_FILE = 1e-4, 1e-3  # relative to the largest output: random weights amplify the order of additions
_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool", "tensor(int32)": "int32"}
_FOLDERS = re.compile(r"/\S*?/(?=(?:transformers|torch|sparsepass|onnxruntime)/)")


def check(kind: str, folder: Path, row: dict[str, Any], parts: tuple[str, ...] = PARTS) -> Iterator[None]:
    """Write into `row` what comes of one model type; it yields after each step, so that the caller can keep what there is.

    Args:
        kind: A model type of the mapping.
        folder: For exports; empty.
        row: Filled with one entry a part: its ``state`` and what else was found.
        parts: Of `PARTS`; what the model cannot be captured for is left out.
    """
    row["capture"] = {"state": "unbuilt"}
    try:
        model = tiny_model(kind)
        _run(model, text(model, 2, 8))
    except Exception as error:  # noqa: BLE001 -- a model's own code raises anything
        row["capture"]["said"] = _words(error)
        return
    row["capture"] = {"state": "ended"}
    yield
    try:
        program, said = _captured(model)
    except SparsepassError as error:
        row["capture"] = {"state": "refused", "said": _words(error)}
        return
    row["capture"] = {"limits": list(program.limits), "said": said} | _at_all_lengths(model, program)
    targets = [target for target in ("hf", "onnx") if target in parts]
    row |= {target: {"state": "ended"} for target in targets}
    yield
    sparse = apply_passes(program, ["nm_sparsify"])
    for target in targets:
        row[target] = _exported(sparse, target, folder / target)
        yield
    if "onnx" in parts and row["onnx"]["state"] != "refused":
        row["onnx"] |= _in_onnxruntime(sparse, folder / "onnx")


def _captured(model: nn.Module) -> tuple[Program, str]:
    try:
        return capture(model), ""
    except SparsepassError as error:
        said = _words(error)
    return capture(model, text(model, 2, 8)), f"needs example_inputs; without: {said}"


def _cases(lengths: Any) -> Iterator[tuple[int, int, int]]:
    """Length, batch and tokens of padding."""
    for length in lengths:
        yield length, 2, 0
        if length in _WITH_OTHER_BATCHES:
            yield length, 1, 0
            if length > 4:
                yield length, 3, 4


def _at_all_lengths(model: nn.Module, program: Program) -> dict[str, Any]:
    """Where program and model agree, where the program refuses, and what is neither."""
    found: dict[str, Any] = {"state": "held", "holds": [], "refuses": [], "model_fails": [], "wrong": [], "raw": []}
    for length, batch, padding in _cases(LENGTHS):
        inputs = _inputs(model, program, batch, length, padding)
        plain = (batch, padding) == (2, 0)
        try:
            expected = _run(model, inputs)
        except Exception:  # noqa: BLE001 -- beyond its positions, a model's own code raises anything
            found["model_fails"] += [length] if plain else []
            continue
        try:
            with torch.no_grad():
                got = _flat(program(**inputs))
        except SparsepassError as refusal:
            found["refuses"] += [length] if plain else []
            found.setdefault("refusal", _words(refusal))
            continue
        except Exception as error:  # noqa: BLE001 -- noted as what it is
            found["raw"].append([length, batch, padding, _words(error)])
            continue
        off = _off(expected, got, inputs if padding else {})
        if off < _OF_A_PROGRAM:
            found["holds"] += [length] if plain else []
        else:
            found["wrong"].append([length, batch, padding, off])
    if found["wrong"] or found["raw"]:
        found["state"] = "did_not_hold"
    return found | {name: _runs_of(found[name]) for name in ("holds", "refuses", "model_fails")}


def _runs_of(lengths: list[int]) -> list[list[int]]:
    """First and last of each run of lengths."""
    runs: list[list[int]] = []
    for length in lengths:
        if runs and runs[-1][1] == length - 1:
            runs[-1][1] = length
        else:
            runs.append([length, length])
    return runs


def _exported(sparse: Program, target: str, folder: Path) -> dict[str, Any]:
    try:
        result = export(sparse, target, folder, progress=False)
    except SparsepassError as error:
        return {"state": "refused", "said": _words(error)}
    artifact = result.report["artifact"]
    said = {"state": result.state, "said": "; ".join(result.failures), "notes": list(artifact["notes"])}
    return said | ({"layout": artifact["details"]["kind"]} if target == "onnx" else {})


def _in_onnxruntime(sparse: Program, folder: Path) -> dict[str, Any]:
    """What onnxruntime makes of the file, apart from the export's own verification."""
    model = sparse.to_model()
    session = _open(folder / "model.onnx")
    names = {value.name for value in session.get_inputs()}
    found: dict[str, Any] = {"wrong": [], "refuses": 0, "agrees": 0}
    for length, batch, padding in _cases(_IN_ONNXRUNTIME):
        inputs = _inputs(model, sparse, batch, length, padding)
        mask = inputs.get("attention_mask", torch.ones(batch, length, dtype=torch.long))
        asked = dict(inputs)
        if padding and "position_ids" in names:
            asked["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        try:
            expected = _run(model, asked)
        except Exception:  # noqa: BLE001 -- see above
            continue
        try:
            runs = _outputs(session, inputs, mask)
        except Exception as error:  # noqa: BLE001 -- onnxruntime's own, and they have no common class
            found["refuses"] += 1
            found.setdefault("refusal", _words(error))
            continue
        for name, got in runs.items():
            off = _off(expected, got, inputs if padding else {})
            found["agrees"] += off < _OF_A_FILE
            if not off < _OF_A_FILE:
                found["wrong"].append([length, batch, padding, name, off])
    return found


def _outputs(session: Any, inputs: Mapping[str, Tensor], mask: Tensor) -> dict[str, dict[str, Tensor]]:
    """The outputs for all tokens at once, and, of a graph with a cache, for all but the last and then the last."""
    values = {value.name: value for value in session.get_inputs()}
    batch, length = mask.shape
    past = {n: v for n, v in values.items() if n.startswith("past_key_values.")}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if not past:
        given = {"position_ids": positions, "attention_mask": mask, **inputs}
        return {"whole": _feed(session, {name: given[name] for name in values})}

    def step(kept: Mapping[str, Any], first: int, end: int) -> dict[str, Tensor]:
        given = {"input_ids": inputs["input_ids"][:, first:end], "attention_mask": mask[:, :end], **kept}
        given |= {"position_ids": positions[:, first:end]} if "position_ids" in values else {}
        return _feed(session, {name: given[name] for name in values})

    nothing = {n: torch.zeros(batch, v.shape[1], 0, v.shape[3], dtype=getattr(torch, _DTYPES[v.type])) for n, v in past.items()}
    found = {"whole": {"logits": step(nothing, 0, length)["logits"]}}
    if length > 1:
        first = step(nothing, 0, length - 1)
        last = step({name: first[name.replace("past_key_values", "present")] for name in past}, length - 1, length)
        found["step"] = {"logits": torch.cat([first["logits"], last["logits"]], 1)}
    return found


def _feed(session: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kinds = {value.name: _DTYPES[value.type] for value in session.get_inputs()}
    arrays = {name: np.asarray(tensor.numpy(), kinds[name]) for name, tensor in given.items()}
    outputs = session.run(None, arrays)
    return {value.name: torch.as_tensor(array) for value, array in zip(session.get_outputs(), outputs, strict=True)}


def _open(file: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _inputs(model: nn.Module, program: Program, batch: int, length: int, padding: int) -> dict[str, Tensor]:
    """Text, and of what the program takes beside it (images) the example's first row."""
    given = text(model, batch, length, padding)
    others = {n: t[:1].repeat(batch, *[1] * (t.dim() - 1)) for n, t in program.example_inputs.items() if t.is_floating_point()}
    return given | others


def _run(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    given: dict[str, Any] = {name: tensor.clone() for name, tensor in inputs.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
    with torch.no_grad():
        return _flat(model(**given))


def _flat(output: Any, prefix: str = "") -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {prefix or "0": output}
    items = output.items() if isinstance(output, Mapping) else enumerate(output) if isinstance(output, list | tuple) else ()
    found: dict[str, Tensor] = {}
    for name, value in items:
        found |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def _off(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], padded: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to the largest entry; what padding gets does not count."""
    common = [name for name in got if name in expected]
    mask = padded.get("attention_mask")
    worst = 0.0 if common else math.inf
    for name in common:
        a, b = expected[name].double(), got[name].double()
        if a.shape != b.shape:
            return math.inf
        if mask is not None and a.shape[:2] == mask.shape:
            a, b = a[mask.bool()], b[mask.bool()]
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(math.inf)
        scale = torch.where(a.isfinite(), a.abs(), 0.0).max()
        worst = max(worst, float(difference.max() / scale if scale else difference.max()))
    return worst


def _words(error: BaseException) -> str:
    """The first lines of an error, without the folders of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:2]
    kind = "" if isinstance(error, SparsepassError) else f"{type(error).__name__}: "
    return kind + _FOLDERS.sub("", " ".join(lines))[:500]
