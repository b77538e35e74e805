"""The target `torch`: a Hugging Face folder, and beside it which of its layers torch's 2:4 kernels run, and from which size on.

1. The folder is what the target hf writes: strictly 2:4 weights, which plain transformers loads and runs dense.
2. torch_semi_structured.json names each linear layer: lowered, dense (with the reason), or to be measured on a GPU.
3. Times come from a GPU when the folder is written, from a file, or from the GPU where `load_torch` loads it.
4. `load_torch` gives the model's own class with the chosen weights packed, bit for bit the stored ones.

Weights are packed on loading, which takes milliseconds, because cuSPARSELt's packed form belongs to one GPU and library.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import nn

from sparsepass.export.targets.hf import ADAPTER_FOLDER, HfArtifact, load_plain, lower_hf, read_adapter
from sparsepass.export.targets.tensorrt import Known, LayerEvidence, break_even, counts
from sparsepass.export.targets.torch.layer import apply_record, choose, survey
from sparsepass.export.targets.torch.measure import default_shapes, measure_layers, probe
from sparsepass.export.targets.torch.packing import check_packing
from sparsepass.export.targets.torch.record import (
    RECORD_FILE,
    LayerRecord,
    Measured,
    Record,
    SemiStructuredOptions,
    read_record,
    read_timings,
    write_record,
)
from sparsepass.export.targets.torch.rules import check_device, check_dtype, check_patterns, short
from sparsepass.graph.equivalence import compare
from sparsepass.graph.limits import position_limit
from sparsepass.graph.model import SLoRBLinear
from sparsepass.graph.program import Program
from sparsepass.graph.states import masked_weight
from sparsepass.graph.support import SparsepassError, quiet_loading

__all__ = ["RECORD_FILE", "SemiStructuredOptions", "TorchArtifact", "load_torch", "record_of", "verify_torch", "write_torch"]

_GPU: Final = torch.device("cuda")
_ENGINE: Final = "model"  # the report's name for the one thing that runs
_CHOSEN: Final[Mapping[str, Known]] = {"lowered": "yes", "dense": "no", "to be measured": "unknown"}


@final
@dataclass(frozen=True, kw_only=True)
class TorchArtifact:
    """What `write_torch` wrote.

    Attributes:
        hf: The Hugging Face folder.
        record: What is known of each layer.
        notes: What a reader should know.
    """

    hf: HfArtifact
    record: Record
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON; paths are relative to the folder."""
        return self.hf.to_dict() | {"record": RECORD_FILE, "layers": self.record.summary()}

    def section(self) -> dict[str, Any]:
        """The section ``sparsity`` of the report: the same states and words as for the target tensorrt."""
        measured = self.record.measured
        layers = tuple(_evidence(layer, self.record) for layer in self.record.layers)
        return {
            "runtime": "torch",
            "runtime_version": str(torch.__version__),
            "gpus": [f"{measured.device.name} (SM{measured.device.sm})"] if measured else [],
            "engines": [
                {
                    "name": _ENGINE,
                    "file": RECORD_FILE,
                    "targets": [measured.device.sm] if measured else [],
                    "size_bytes": sum(size for name, size in self.hf.files.items() if name.endswith(".safetensors")),
                    "flag_requested": True,
                    "num_eligible": sum(layer.eligible for layer in self.record.layers),
                    "num_chosen": len(self.record.in_state("lowered")) if measured else None,
                }
            ],
            "layers": [layer.to_dict() for layer in layers],
            "counts": counts(layers),
            "measured": measured and _measured(measured),
        }


def write_torch(
    program: Program,
    folder: Path,
    *,
    options: SemiStructuredOptions | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    processor: Any = None,
) -> TorchArtifact:
    """Write a program as a folder that `load_torch` (and plain transformers) loads.

    Args:
        program: Captured from a transformers model. It is not changed.
        folder: An existing, empty folder.
        options: How layers are chosen.
        dtype: Type of the written weights; None keeps the program's.
        tokenizer: Saved beside the model.
        processor: Saved beside the model.

    Returns:
        What was written. Without a GPU and without recorded times, layers that a kernel takes wait to be measured where
        the folder is loaded.

    Raises:
        SparsepassError: If the type, a pattern or the GPU has no kernels, the times cannot be read, or the target hf cannot
            write the program.
    """
    settings = options or SemiStructuredOptions()
    check_patterns(program)
    own = next((t.dtype for t in program.tensors().values() if t.is_floating_point()), torch.float32)
    wanted = dtype or own
    check_dtype(wanted)
    measured = None
    if settings.timings is not None:
        measured = read_timings(settings.timings)
        _check_type(measured, wanted, settings.timings)
    on_gpu = settings.measure and measured is None and _gpu_is_here()
    if on_gpu:
        check_device(_GPU)
    written = lower_hf(program, folder, dtype=dtype, tokenizer=tokenizer, processor=processor)
    layers = survey(program, wanted)
    if on_gpu:
        shapes = settings.shapes or default_shapes(position_limit(program.origin.config))
        measured = measure_layers(layers, shapes, wanted, _GPU, compiled=settings.compiled)
    if measured is not None:
        measured = measured.of(layers)
        layers = choose(layers, measured, sparse_only=settings.sparse_only)
    record = Record(dtype=short(wanted), layers=layers, options=settings, measured=measured)
    write_record(record, folder)
    return TorchArtifact(hf=written, record=record, notes=_notes(record, settings, written))


def verify_torch(program: Program, folder: Path, artifact: TorchArtifact) -> list[dict[str, Any]]:
    """Check what goes beyond the target hf: weights survive packing, and on a GPU the lowered model computes the same.

    Args:
        program: What was lowered.
        folder: Where it was written.
        artifact: What `write_torch` returned.

    Returns:
        The checks ``packing`` and ``kernels``: name, whether it held (None if it cannot be known here), summary, details.
    """
    return [_check_packing(program, artifact.record), _check_kernels(program, folder)]


def load_torch(
    folder: str | Path,
    *,
    device: str | torch.device = "cuda",
    measure: bool = False,
    options: SemiStructuredOptions | None = None,
    remember: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> nn.Module:
    """Load a folder of the target torch with transformers, and put in the 2:4 kernels where they were measured to be faster.

    Args:
        folder: What `sparse-export --target torch` wrote.
        device: The GPU.
        measure: Whether to measure here although times are recorded; if none are, it is always measured.
        options: How layers are chosen, if they are measured; by default as it was said when the folder was written.
        remember: Whether what was measured here is written into the folder.
        tell: Called with one line at the beginning of each step.

    Returns:
        The model's own class on the GPU, for inference, SLoRB branches included; `generate()` and `torch.compile` work on
        it. `record_of` tells what became of each layer.

    Raises:
        SparsepassError: If there is no GPU with 2:4 kernels, the folder is damaged, or a weight is not 2:4 any more.

    Exactness: lowered weights are bitwise the stored ones; outputs equal up to the kernels' order of summation.

    Example:
        >>> model = load_torch("out")  # doctest: +SKIP
        >>> print(record_of(model).summary())  # doctest: +SKIP
    """
    place, where = torch.device(device), Path(folder)
    record = read_record(where)
    here = check_device(place)
    dtype: torch.dtype = getattr(torch, record.dtype)
    check_dtype(dtype)
    model = load_dense(where, record).to(place, dtype)
    if measure or record.measured is None:
        tell(f"measuring the layers on {here}")
        settings = options or record.options
        shapes = settings.shapes or default_shapes(position_limit(model.config))  # type: ignore[arg-type]
        measured = measure_layers(record.layers, shapes, dtype, place, compiled=settings.compiled)
        layers = choose(record.layers, measured, sparse_only=settings.sparse_only)
        record = replace(record, layers=layers, options=settings, measured=measured)
        if remember:
            write_record(record, where)
    else:
        _check_measured_here(record, record.measured, where, place)
    if not record.in_state("lowered"):
        warnings.warn(
            f"no layer of {where} was lowered, the model runs dense: {_commonest_reason(record)}; record_of(model) tells all",
            stacklevel=2,
        )
    tell("packing the chosen weights")
    apply_record(model, record)
    model.__dict__["_semi_structured_record"] = record
    return model


def record_of(model: nn.Module) -> Record:
    """What became of each layer of a model that `load_torch` loaded.

    Raises:
        SparsepassError: If it was loaded by something else.
    """
    record = model.__dict__.get("_semi_structured_record")
    if not isinstance(record, Record):
        raise SparsepassError(f"this {type(model).__name__} was not loaded by load_torch, so nothing is known of its layers")
    return record


def load_dense(folder: Path, record: Record) -> nn.Module:
    """The model as transformers loads it, with its SLoRB branches beside the layers."""
    with quiet_loading():
        model: nn.Module = load_plain(folder)
    branches = {layer.layer: layer for layer in record.layers if layer.k}
    tensors = read_adapter(folder / ADAPTER_FOLDER) if branches else {}
    for path, layer in branches.items():
        if path not in tensors:
            raise SparsepassError(f"{path} has a SLoRB branch, and {folder / ADAPTER_FOLDER} lacks it; export the model again")
        x_RI, s_OR = tensors[path]
        base = model.get_submodule(path)
        parent, _, name = path.rpartition(".")
        projection = x_RI if layer.projection == "trainable" else None
        branched = SLoRBLinear(base, s_OR, layer.k, projection, transposed=type(base).__name__ == "Conv1D")
        setattr(model.get_submodule(parent), name, branched)
    return model


def _check_type(measured: Measured, dtype: torch.dtype, source: Path) -> None:
    if measured.dtype != short(dtype):
        raise SparsepassError(
            f"the times in {source} are for {measured.dtype}, and the weights are {short(dtype)}; export with --dtype "
            f"{measured.dtype}, or give other times"
        )


def _check_measured_here(record: Record, measured: Measured, folder: Path, device: torch.device) -> None:
    here = check_device(device)
    if here != measured.device:
        warnings.warn(
            f"the layers of {folder} were chosen by times measured on {measured.device}, and this is {here}: another "
            "choice may be faster here; load_torch(..., measure=True) measures again, and remember=True keeps that",
            stacklevel=3,
        )
    missing = probe(getattr(torch, record.dtype), device)
    for backend in sorted({layer.backend for layer in record.in_state("lowered") if layer.backend}):
        if missing[backend]:
            raise SparsepassError(
                f"{folder} was measured with {backend}, which cannot be used here ({missing[backend]}); measure again with "
                "load_torch(..., measure=True)"
            )


def _check_packing(program: Program, record: Record) -> dict[str, Any]:
    dtype = getattr(torch, record.dtype)
    checked, failures = 0, []
    for layer in record.layers:
        if not layer.eligible:
            continue
        weight = program.aliases.get(f"{layer.layer}.weight", f"{layer.layer}.weight")
        state = program.sparse[weight]
        stored = masked_weight(program, weight)
        matrix_OI = stored.to(dtype) if state.axis % 2 else stored.to(dtype).t()
        try:
            check_packing(weight, matrix_OI.contiguous())
        except SparsepassError as error:
            failures.append(str(error))
        checked += 1
    said = f"{checked} weights come back bit for bit out of torch's packed form"
    details = {"num_packed": checked, "failures": failures}
    return {"name": "packing", "held": not failures, "summary": "; ".join(failures[:3]) or said, "details": details}


def _check_kernels(program: Program, folder: Path) -> dict[str, Any]:
    """On a GPU, compare the lowered model with the dense one. The 2:4 kernels run whatever the number of tokens, to be seen."""
    record = read_record(folder)
    dtype = getattr(torch, record.dtype)
    if unknown := _why_not_run(record, dtype):
        return {"name": "kernels", "held": None, "summary": unknown, "details": {}}
    always = replace(record, layers=tuple(replace(layer, min_tokens=0) for layer in record.layers))
    dense, lowered = (load_dense(folder, record).to(_GPU, dtype).eval() for _ in range(2))
    found = compare(dense, apply_record(lowered, always), program.example_inputs, layers=False)
    failures = found.failures()
    name, number = torch.cuda.get_device_name(_GPU), len(record.in_state("lowered"))
    said = f"{number} lowered layers on {name}: relative error {found.relative_error:.2g} (allowed {found.tolerance:g})"
    return {
        "name": "kernels",
        "held": not failures,
        "summary": "; ".join(failures) or said,
        "details": found.to_dict(),
    }


def _why_not_run(record: Record, dtype: torch.dtype) -> str:
    if not _gpu_is_here():
        todo = "which layers they run is measured there" if record.measured is None else "compare the outputs there"
        return f"no GPU here, so the 2:4 kernels were not run: load the folder by load_torch on one; {todo}"
    if record.measured is None:
        return "nothing was measured, so no layer is lowered yet"
    if not record.in_state("lowered"):
        return f"no layer is lowered: {_commonest_reason(record)}"
    missing = probe(dtype, _GPU)
    needed = {layer.backend for layer in record.in_state("lowered")}
    return "; ".join(f"{name} cannot be used on this GPU: {why}" for name, why in missing.items() if why and name in needed)


def _notes(record: Record, options: SemiStructuredOptions, written: HfArtifact) -> tuple[str, ...]:
    notes = [
        f"plain transformers loads it by {written.auto_class}.from_pretrained, dense; "
        "load_torch of sparsepass.export.targets.torch puts in the 2:4 kernels",
        record.summary(),
    ]
    if record.measured is None:
        why = "no GPU is here" if options.measure else "measuring was switched off"
        notes.append(
            f"{why}: which layers 2:4 kernels run is measured when load_torch loads the folder on a GPU (or give recorded "
            "times with --timings)"
        )
    else:
        notes.append(f"chosen by times measured on {record.measured.device}")
        notes += [f"{name} was not tried: {why}" for name, why in record.measured.backends.items() if why]
    if written.adapter is not None:
        notes.append(f"the SLoRB branches of {written.num_branches} layers are the PEFT adapter in {written.adapter.name}/")
    return tuple(notes)


def _evidence(layer: LayerRecord, record: Record) -> LayerEvidence:
    points = record.measured.points(layer.shape, layer.bias) if record.measured and layer.eligible else ()
    largest = max(points, key=lambda point: point.tokens, default=None)
    return LayerEvidence(
        engine=_ENGINE,
        layer=layer.layer,
        op="Linear",
        weight=f"{layer.layer}.weight",
        shape=layer.shape,
        dtype=record.dtype,
        axis=1,
        conforms="yes" if layer.sparse else "unknown",
        flag_requested="yes",
        eligible="yes" if layer.eligible else "no",
        chosen=_CHOSEN[layer.state],
        ran_sparse=_CHOSEN[layer.state],
        reason=layer.reason + (f"; runs dense below {layer.min_tokens} tokens at once" if layer.min_tokens else ""),
        tactic=layer.backend or "",
        dense_ms=largest.dense_ms if largest else None,
        sparse_ms=min(largest.sparse_ms.values(), default=None) if largest else None,
    )


def _measured(measured: Measured) -> Mapping[str, Any]:
    """Shape and backend -> times and break-even, as the report shows them."""
    found = {}
    for times in measured.times:
        for backend in dict.fromkeys(name for point in times.points for name in point.sparse_ms):
            points = [point.point(backend) for point in times.points if backend in point.sparse_ms]
            name = f"{'x'.join(map(str, times.shape))}{' with bias' if times.bias else ''}, {backend}"
            found[name] = {"points": [p.to_dict() for p in points], "break_even": break_even(points)}
    return found


def _commonest_reason(record: Record) -> str:
    reasons = Counter(layer.reason for layer in record.layers if layer.sparse)
    return reasons.most_common(1)[0][0] if reasons else "no layer is sparse"


def _gpu_is_here() -> bool:
    return torch.cuda.is_available()
