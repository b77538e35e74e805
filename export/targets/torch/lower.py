"""The target `torch`: a Hugging Face folder, and beside it which of its layers torch's 2:4 kernels run, and from which size on.

1. The folder is what the target hf writes: strictly 2:4 weights, which plain transformers loads and runs dense.
2. torch_semi_structured.json names each linear layer: lowered, dense (with the reason), or to be measured on a GPU.
3. Times come from a GPU when the folder is written, from a file, or from the GPU where `load_torch` loads it.
4. `load_torch` gives the model's own class with the chosen weights packed, bit for bit the stored ones.

Weights are packed on loading, which takes milliseconds, because cuSPARSELt's packed form belongs to one GPU and library.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch

from sparsepass.export.targets.evidence import Known, LayerEvidence, break_even, counts
from sparsepass.export.targets.hf import HfArtifact, lower_hf
from sparsepass.export.targets.torch.choice import ChoiceRules
from sparsepass.export.targets.torch.kernels import check_device, check_dtype, check_patterns, gpu_is_here, short
from sparsepass.export.targets.torch.layer import choose, survey
from sparsepass.export.targets.torch.measure import default_shapes, measure_layers
from sparsepass.export.targets.torch.record import RECORD_FILE, LayerRecord, Measured, Record, read_timings, write_record
from sparsepass.graph.fusion import split_siblings
from sparsepass.graph.limits import position_limit
from sparsepass.graph.load import parse_dtype
from sparsepass.graph.program import Program
from sparsepass.graph.support import SparsepassError

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
    rules: ChoiceRules = ChoiceRules(),  # noqa: B008  (it is frozen)
    timings: Path | None = None,
    measure: bool = True,
    dtype: "torch.dtype | str | None" = None,
) -> TorchArtifact:
    """Write a program as a folder that `load_torch` (and plain transformers) loads.

    Args:
        program: Captured from a transformers model. It is not changed.
        folder: An existing, empty folder.
        rules: How layers are chosen.
        timings: File (or folder of this target) with times, which are taken instead of measuring.
        measure: Whether layers are measured, if a GPU is here.
        dtype: Type of the written weights; None keeps the program's.

    Returns:
        What was written. Without a GPU and without recorded times, layers that a kernel takes wait to be measured where
        the folder is loaded.

    Raises:
        SparsepassError: If the type, a pattern or the GPU has no kernels, the times cannot be read, or the target hf cannot
            write the program.
    """
    program = split_siblings(program)
    check_patterns(program)
    own = next((t.dtype for t in program.tensors().values() if t.is_floating_point()), torch.float32)
    wanted = own if dtype is None else parse_dtype(dtype)
    check_dtype(wanted)
    measured = None
    if timings is not None:
        measured = read_timings(timings)
        _check_type(measured, wanted, timings)
    on_gpu = measure and measured is None and gpu_is_here()
    if on_gpu:
        check_device(_GPU)
    written = lower_hf(program, folder, dtype=dtype, as_integers=False)
    layers = survey(program, wanted)
    if on_gpu:
        shapes = rules.shapes or default_shapes(position_limit(program.origin.config))
        measured = measure_layers(layers, shapes, wanted, _GPU, compiled=rules.compiled)
    if measured is not None:
        measured = measured.of(layers)
        layers = choose(layers, measured, sparse_only=rules.sparse_only)
    record = Record(dtype=short(wanted), layers=layers, options=rules, measured=measured)
    write_record(record, folder)
    return TorchArtifact(hf=written, record=record, notes=_notes(record, written, measure=measure))


def check_machine(dtype: "str | torch.dtype | None", timings: Path | None, *, measure: bool) -> None:
    """Make sure of what can be told before there is a program.

    Raises:
        SparsepassError: If the type or the GPU has no kernels, or recorded times cannot be read.
    """
    if dtype is not None:
        check_dtype(parse_dtype(dtype))
    if timings is not None:
        read_timings(timings)
    elif measure and gpu_is_here():
        check_device(_GPU)


def _check_type(measured: Measured, dtype: torch.dtype, source: Path) -> None:
    if measured.dtype != short(dtype):
        raise SparsepassError(
            f"the times in {source} are for {measured.dtype}, and the weights are {short(dtype)}; export with --dtype "
            f"{measured.dtype}, or give other times"
        )


def _notes(record: Record, written: HfArtifact, *, measure: bool) -> tuple[str, ...]:
    notes = [
        f"plain transformers loads it by {written.auto_class}.from_pretrained, dense; "
        "load_torch of sparsepass.export.targets.torch puts in the 2:4 kernels",
        record.summary(),
    ]
    if record.measured is None:
        why = "no GPU is here" if measure else "measuring was switched off"
        notes.append(
            f"{why}: which layers 2:4 kernels run is measured when load_torch loads the folder on a GPU (or give recorded "
            "times with --timings)"
        )
    else:
        notes.append(f"chosen by times measured on {record.measured.device}")
        notes += [f"{name} was not tried: {why}" for name, why in record.measured.backends.items() if why]
    if written.adapter is not None:
        notes.append(written.adapter_note)
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
