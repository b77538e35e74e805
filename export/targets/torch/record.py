"""torch_semi_structured.json: which layers are lowered, from which size on, by which times, and why the rest is dense."""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, final

from sparsepass.export.targets.torch.choice import ChoiceRules, Timing, Verdict
from sparsepass.export.targets.torch.kernels import BACKENDS, MeasuredOn, check_generation
from sparsepass.graph.support import SparsepassError, read_object, write_text

RECORD_FILE: Final = "torch_semi_structured.json"
SCHEMA_VERSION: Final = 1
State = Literal["lowered", "dense", "to be measured"]
TO_BE_MEASURED: Final = "nothing was measured yet: to be measured on the GPU where the folder is loaded"


@final
@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What is known of one linear layer.

    Attributes:
        layer: Module path.
        shape: Shape of the weight as it multiplies, out and in features for a linear layer.
        bias: Whether it adds a bias.
        sparse: Whether its weight is 2:4; if not, it is dense on purpose.
        eligible: Whether a 2:4 kernel takes it, by the rules of type and shape.
        state: What it is.
        reason: Why.
        backend: Whose kernel it runs, if it is lowered.
        min_tokens: Tokens at once from which that kernel runs; 0 if it always does.
        k: Of its SLoRB branch; 0 without one.
        projection: Of the branch: ``fixed`` or ``trainable``; empty without one.
    """

    layer: str
    shape: tuple[int, ...]
    bias: bool
    sparse: bool
    eligible: bool
    state: State
    reason: str
    backend: str | None = None
    min_tokens: int = 0
    k: int = 0
    projection: str = ""

    def decided(self, verdict: Verdict) -> "LayerRecord":
        """The same layer with what was decided."""
        state: State = "lowered" if verdict.backend else "dense"
        return replace(self, state=state, reason=verdict.reason, backend=verdict.backend, min_tokens=verdict.min_tokens)


@final
@dataclass(frozen=True, kw_only=True)
class Times:
    """Times of all layers of one shape: a kernel's time depends on the shape and not on the values.

    Attributes:
        shape: Out and in features.
        bias: Whether a bias is added.
        points: Times at each size.
    """

    shape: tuple[int, ...]
    bias: bool
    points: tuple[Timing, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Measured:
    """Times, and where and how they were taken.

    Attributes:
        device: GPU and torch.
        dtype: Type of the weights, such as ``bfloat16``.
        compiled: Whether the calls were compiled.
        backends: Backend -> why it could not be used there; empty if it could.
        times: One for each shape.
    """

    device: MeasuredOn
    dtype: str
    compiled: bool
    backends: Mapping[str, str]
    times: tuple[Times, ...]

    def points(self, shape: tuple[int, ...], bias: bool) -> tuple[Timing, ...]:
        """The times of one shape; empty if there are none."""
        return next((each.points for each in self.times if (each.shape, each.bias) == (shape, bias)), ())

    def of(self, layers: Iterable[LayerRecord]) -> "Measured":
        """The times of the shapes of some layers, and no others."""
        shapes = {(layer.shape, layer.bias) for layer in layers if layer.eligible}
        return replace(self, times=tuple(each for each in self.times if (each.shape, each.bias) in shapes))

    def to_dict(self) -> dict[str, Any]:
        """The times as JSON."""
        times = [{"shape": list(t.shape), "bias": t.bias, "points": [p.to_dict() for p in t.points]} for t in self.times]
        own = {"dtype": self.dtype, "compiled": self.compiled, "backends": dict(self.backends), "times": times}
        return self.device.to_dict() | own


@final
@dataclass(frozen=True, kw_only=True)
class Record:
    """The whole file.

    Attributes:
        dtype: Type of the weights, such as ``bfloat16``.
        layers: Every linear layer.
        options: How layers are chosen.
        measured: The times; None if they are to be taken where the folder is loaded.
    """

    dtype: str
    layers: tuple[LayerRecord, ...]
    options: ChoiceRules = field(default_factory=ChoiceRules)
    measured: Measured | None = None

    def in_state(self, state: State) -> tuple[LayerRecord, ...]:
        """The layers in a state."""
        return tuple(layer for layer in self.layers if layer.state == state)

    def summary(self) -> str:
        """One line for people.

        Example:
            >>> Record(dtype="bfloat16", layers=()).summary()
            '0 layers lowered, 0 to be measured on a GPU, 0 dense'
        """
        lowered, waiting, dense = (len(self.in_state(state)) for state in ("lowered", "to be measured", "dense"))
        return f"{lowered} layers lowered, {waiting} to be measured on a GPU, {dense} dense"

    def commonest_reason(self) -> str:
        """Why most of the sparse layers are what they are."""
        reasons = Counter(layer.reason for layer in self.layers if layer.sparse)
        return reasons.most_common(1)[0][0] if reasons else "no layer is sparse"

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON."""
        return {
            "schema": "sparsepass-torch-semi-structured",
            "schema_version": SCHEMA_VERSION,
            "dtype": self.dtype,
            "options": self.options.to_dict(),
            "measured": self.measured and self.measured.to_dict(),
            "layers": [asdict(layer) | {"shape": list(layer.shape)} for layer in self.layers],
        }


def write_record(record: Record, folder: Path) -> None:
    """Write a record into a folder; an interrupted run leaves the old one."""
    write_text(folder / RECORD_FILE, json.dumps(record.to_dict(), indent=1) + "\n")


def read_record(folder: str | Path) -> Record:
    """Read a folder's record.

    Raises:
        SparsepassError: If there is none, or it cannot be read.
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        raise SparsepassError(
            f"{path} does not exist: {folder} is no folder of the target torch; write one with sparse-export --target torch"
        )
    advice = "export the model again, or load the folder dense with transformers"
    document = _read(path, advice)
    with _readable(path, advice):
        version = document["schema_version"]
        if version > SCHEMA_VERSION:
            raise SparsepassError(
                f"{path} has schema {version}, and this sparsepass reads up to {SCHEMA_VERSION}; upgrade sparsepass"
            )
        options = document["options"]
        return Record(
            dtype=document["dtype"],
            layers=tuple(map(_layer, document["layers"])),
            options=ChoiceRules(**{**options, "shapes": tuple(map(tuple, options["shapes"]))}),
            measured=None if document["measured"] is None else _measured(document["measured"]),
        )


def read_timings(path: str | Path) -> Measured:
    """Read recorded times: the file of another folder of this target, that folder, or a result of benchmarks/gpu_torch.py.

    Raises:
        SparsepassError: If there are none, they cannot be read, or the GPU has no 2:4 kernels.
    """
    file = Path(path)
    file = file / RECORD_FILE if file.is_dir() else file
    advice = f"give a {RECORD_FILE} that was written on a GPU, or a result of benchmarks/gpu_torch.py"
    if not file.is_file():
        raise SparsepassError(f"the timings {file} do not exist; {advice}")
    document = _read(file, advice)
    if document.get("measured", document) is None:
        raise SparsepassError(f"{file} holds no times, because nothing was measured for it; {advice}")
    with _readable(file, advice):
        return _measured(document.get("measured", document))


def _read(path: Path, advice: str) -> Mapping[str, Any]:
    return read_object(path, advice=advice)


@contextlib.contextmanager
def _readable(path: Path, advice: str) -> Iterator[None]:
    """Turn whatever goes wrong with a file's content into one error that names the file."""
    try:
        yield
    except SparsepassError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SparsepassError(f"{path} is damaged ({type(error).__name__}: {error}); {advice}") from error


def _measured(found: Mapping[str, Any]) -> Measured:
    times = tuple(
        Times(shape=tuple(each["shape"]), bias=each["bias"], points=tuple(_timing(point) for point in each["points"]))
        for each in found["times"]
    )
    return Measured(
        device=check_generation(MeasuredOn(name=found["name"], sm=found["sm"], torch=found["torch"])),
        dtype=found["dtype"],
        compiled=found["compiled"],
        backends=dict(found["backends"]),
        times=times,
    )


def _timing(point: Mapping[str, Any]) -> Timing:
    timing = Timing(**point)
    if unknown := set(timing.sparse_ms) - set(BACKENDS):
        raise ValueError(f"unknown backend {min(unknown)!r}")
    if not all(ms > 0 and math.isfinite(ms) for ms in (timing.dense_ms, *timing.sparse_ms.values())):
        raise ValueError(f"a time at {timing.batch}x{timing.sequence} is not positive")
    return timing


def _layer(entry: Mapping[str, Any]) -> LayerRecord:
    layer = LayerRecord(**{**entry, "shape": tuple(entry["shape"])})
    if layer.state not in ("lowered", "dense", "to be measured"):
        raise ValueError(f"{layer.layer} has the state {layer.state!r}")
    if (layer.state == "lowered") != (layer.backend is not None) or layer.backend not in (None, *BACKENDS):
        raise ValueError(f"{layer.layer} is {layer.state} with the backend {layer.backend!r}")
    return layer
