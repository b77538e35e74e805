"""What the target tensorrt writes: engines, and what is known of their layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from sparsepass.export.targets.evidence import LayerEvidence, counts
from sparsepass.export.targets.onnx import OnnxArtifact
from sparsepass.export.targets.tensorrt.packages import Gpu


@final
@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine that was built.

    Attributes:
        name: ``prefill``, ``decode``, ``encoder`` or ``model``; the role of the graph if it has several profiles.
        file: File with the engine.
        log: File with the builder's whole log, gzipped.
        graph: ONNX file that it was built from.
        profiles: Profile -> axis -> smallest, most common and largest length.
        targets: Compute capabilities that it runs on, as 86; empty if the runtime does not tell.
        size_bytes: Size of the engine.
        num_layers: Layers of the network.
        seconds: Time the builder took.
        flag_requested: Whether sparse tactics were allowed.
        num_eligible: Layers that the builder's log counts as eligible; None if it does not say.
        num_chosen: Layers that run sparse by the log; None if it does not say.
    """

    name: str
    file: str
    log: str
    graph: str
    profiles: Mapping[str, Mapping[str, tuple[int, int, int]]]
    targets: tuple[int, ...]
    size_bytes: int
    num_layers: int
    seconds: float
    flag_requested: bool
    num_eligible: int | None
    num_chosen: int | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@final
@dataclass(frozen=True, kw_only=True)
class TensorrtArtifact:
    """What `lower_tensorrt` wrote.

    Attributes:
        onnx: The graphs that the engines were built from.
        runtime: Name of the package that built them.
        version: Its version.
        gpus: GPUs of the machine.
        engines: The engines.
        layers: What is known of each weight in each engine.
        notes: What a reader should know.
        measured: Profile -> times of the dense and the sparse engine, and the break-even; None if none were taken.
    """

    onnx: OnnxArtifact
    runtime: str
    version: str
    gpus: tuple[Gpu, ...]
    engines: tuple[Engine, ...]
    layers: tuple[LayerEvidence, ...]
    notes: tuple[str, ...]
    measured: Mapping[str, Any] | None = None

    def section(self) -> dict[str, Any]:
        """The section ``sparsity`` of the report."""
        return {
            "runtime": self.runtime,
            "runtime_version": self.version,
            "gpus": [f"{gpu.name} (SM{gpu.sm})" for gpu in self.gpus],
            "engines": [engine.to_dict() for engine in self.engines],
            "layers": [layer.to_dict() for layer in self.layers],
            "counts": counts(self.layers),
            "measured": self.measured,
        }
