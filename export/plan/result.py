"""What `plan` found, and its JSON."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from sparsepass.export.plan.devices import Device
from sparsepass.export.plan.memory import MemoryRow
from sparsepass.export.plan.model import Layer, ModelShape
from sparsepass.export.plan.phases import PhaseTimes, Workload
from sparsepass.export.plan.roofline import Matmul
from sparsepass.export.plan.runtimes import Dtype, Runtime

Projection = Literal["fixed", "trainable"]


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer: what it would cost dense and 2:4, and what is recommended.

    Attributes:
        layer: The layer.
        matmul: Its shape, with the branch that it has or would have.
        decision: ``2:4``, or ``dense``.
        reason: Why.
        prefill_intensity: Operations for each byte in prefill, at the first workload.
        decode_intensity: The same in a decoding step; None if it does not run there.
        prefill_s: Dense and 2:4 seconds in prefill, at the first workload; 2:4 is None where no kernel takes it.
        decode_s: The same for a decoding step; None if it does not run there.
        pays_at: Ranges of token counts at which 2:4 is faster (see `paying_ranges`); empty where no kernel takes it.
    """

    layer: Layer
    matmul: Matmul
    decision: Literal["2:4", "dense"]
    reason: str
    prefill_intensity: float
    decode_intensity: float | None
    prefill_s: tuple[float, float | None]
    decode_s: tuple[float, float | None] | None
    pays_at: tuple[tuple[int, int | None], ...]


@dataclass(frozen=True, kw_only=True)
class PointPlan:
    """One workload.

    Attributes:
        load: Batch, prompt and new tokens.
        prefill: Times as recommended. For an encoder, its whole run.
        decode: Times of a mean decoding step as recommended; None for an encoder.
        everything: Speedup of prefill and decode if every layer that a kernel takes were 2:4.
        without_branches: The same of the recommended layers without their SLoRB branches; None if they have none.
        cache_bytes: Of the key-value cache at the end.
        needs_bytes: Weights and cache, dense and planned.
    """

    load: Workload
    prefill: PhaseTimes
    decode: PhaseTimes | None
    everything: tuple[float, float | None]
    without_branches: tuple[float, float | None] | None
    cache_bytes: float
    needs_bytes: tuple[float, float]

    @property
    def request(self) -> tuple[float, float]:
        """Seconds of the whole request, dense and planned."""
        steps = self.load.new_tokens
        decode = (self.decode.dense_s, self.decode.planned_s) if self.decode is not None else (0.0, 0.0)
        return self.prefill.dense_s + steps * decode[0], self.prefill.planned_s + steps * decode[1]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan` found. `to_dict` gives JSON, `sparsepass.export.plan.page` a page for people.

    Attributes:
        source: What was planned for.
        shape: The model.
        device: The GPU.
        runtime: The model of its kernels.
        dtype: Type of the weights.
        slorb_k: Of the branches that were asked for; 0 for none.
        projection: Of those branches.
        points: One for each workload.
        layers: One for each layer, in the graph's order.
        ignore: Patterns for the ``ignore`` of the passes; empty if nothing has to be left out.
        pipeline: The passes as text, ready for ``--passes``; None if nothing is worth pruning.
        memory: Bytes of the weights for each type.
        notes: What is not covered, and what was assumed.
    """

    source: str
    shape: ModelShape
    device: Device
    runtime: Runtime
    dtype: Dtype
    slorb_k: int
    projection: Projection
    points: tuple[PointPlan, ...]
    layers: tuple[LayerPlan, ...]
    ignore: tuple[str, ...]
    pipeline: str | None
    memory: tuple[MemoryRow, ...]
    notes: tuple[str, ...]

    @property
    def pays(self) -> bool:
        """Whether 2:4 is predicted to gain anything at the workloads that were asked for."""
        return any(layer.decision == "2:4" for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON."""
        return _plan_json(self)


def _plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON; times in seconds, sizes in bytes."""
    return {
        "model": plan.source,
        "kind": plan.shape.kind,
        "num_parameters": plan.shape.num_parameters,
        "device": dataclasses.asdict(plan.device),
        "runtime": dataclasses.asdict(plan.runtime),
        "dtype": plan.dtype,
        "slorb": {"k": plan.slorb_k, "projection": plan.projection} if plan.slorb_k else None,
        "pays": plan.pays,
        "points": [_point_json(point) for point in plan.points],
        "memory": [dataclasses.asdict(row) for row in plan.memory],
        "layers": [_layer_json(item) for item in plan.layers],
        "ignore": list(plan.ignore),
        "passes": plan.pipeline,
        "notes": list(plan.notes),
    }


def _point_json(point: PointPlan) -> dict[str, Any]:
    dense, planned = point.request
    return {
        **dataclasses.asdict(point.load),
        "prefill": {**dataclasses.asdict(point.prefill), "speedup": point.prefill.speedup},
        "decode": None if point.decode is None else {**dataclasses.asdict(point.decode), "speedup": point.decode.speedup},
        "request": {"dense_s": dense, "planned_s": planned, "speedup": dense / planned},
        "everything": {"prefill_speedup": point.everything[0], "decode_speedup": point.everything[1]},
        "cache_bytes": point.cache_bytes,
        "needs_bytes": {"dense": point.needs_bytes[0], "planned": point.needs_bytes[1]},
    }


def _layer_json(item: LayerPlan) -> dict[str, Any]:
    def times(pair: tuple[float, float | None] | None) -> dict[str, float | None] | None:
        return None if pair is None else {"dense_s": pair[0], "sparse_s": pair[1]}

    return {
        "name": item.layer.site.name,
        "weight": item.layer.site.weight,
        "layout": item.layer.site.layout,
        **dataclasses.asdict(item.matmul),
        "decision": item.decision,
        "reason": item.reason,
        "prefill": times(item.prefill_s),
        "decode": times(item.decode_s),
        "prefill_intensity": item.prefill_intensity,
        "decode_intensity": item.decode_intensity,
        "pays_at": [list(pair) for pair in item.pays_at],
    }
