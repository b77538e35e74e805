"""`plan`: what 2:4 sparsity would buy, layer by layer, before any GPU hour is spent; what it found, and its JSON."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from sparsepass.export.plan.choice import ignore_list, matmul_of, pipeline_text, refusals, verify_choice
from sparsepass.export.plan.devices import DTYPES, Device, Dtype, Runtime, find_device, is_processor, runtime_for
from sparsepass.export.plan.model import Layer, ModelShape, load_for_plan, model_shape
from sparsepass.export.plan.phases import TABLE, Case, MemoryRow, PhaseTimes, Workload, cache_bytes, layer_tokens
from sparsepass.export.plan.processor import this_processor
from sparsepass.export.plan.roofline import Machine, Matmul, branch_time, dense_time, intensity, paying_ranges, sparse_time
from sparsepass.graph import Program, SparsepassError

Projection = Literal["fixed", "trainable"]
_DEFAULT_SEQ = 2048
_PROCESSOR_NOTES = (
    "bandwidth and peak were measured here, just now, on all threads of torch: another program that runs makes them smaller",
    "these are limits by bytes: how near the kernels come is what benchmarks/packed.py measures, and what transformers itself "
    "takes for each token (Python, attention, norms) comes on top of both times",
    "up to 16 tokens in one call are counted as gaining, by the bytes of the packed weights; prefill takes as long as it does "
    "dense in this plan, which a kernel or torch may miss by some percent",
    "embedding and head stay in 16 bits; `packed{embedding=int8}` halves them, which is not counted",
    "int8 counts one scale a row, int4 one in 128 columns (`group_size=0` and `group_size=128` of the target packed)",
    "files are as large as the weights in memory: `sparse-export --target packed` writes the packed form",
)


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
        device: The GPU, or the processor.
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
        """Everything as JSON; times in seconds, sizes in bytes."""
        return {
            "model": self.source,
            "kind": self.shape.kind,
            "num_parameters": self.shape.num_parameters,
            "device": asdict(self.device),
            "runtime": asdict(self.runtime),
            "dtype": self.dtype,
            "slorb": {"k": self.slorb_k, "projection": self.projection} if self.slorb_k else None,
            "pays": self.pays,
            "points": [_point_json(point) for point in self.points],
            "memory": [asdict(row) for row in self.memory],
            "layers": [_layer_json(item) for item in self.layers],
            "ignore": list(self.ignore),
            "passes": self.pipeline,
            "notes": list(self.notes),
        }


def _point_json(point: PointPlan) -> dict[str, Any]:
    dense, planned = point.request
    return {
        **asdict(point.load),
        "prefill": {**asdict(point.prefill), "speedup": point.prefill.speedup},
        "decode": None if point.decode is None else {**asdict(point.decode), "speedup": point.decode.speedup},
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
        **asdict(item.matmul),
        "decision": item.decision,
        "reason": item.reason,
        "prefill": times(item.prefill_s),
        "decode": times(item.decode_s),
        "prefill_intensity": item.prefill_intensity,
        "decode_intensity": item.decode_intensity,
        "pays_at": [list(pair) for pair in item.pays_at],
    }


def plan(
    source: "Program | str | Path",
    *,
    gpu: str,
    runtime: str | None = None,
    batches: Sequence[int] = (1,),
    seqs: Sequence[int] = (),
    new_tokens: int = 128,
    dtype: str | None = None,
    slorb_k: int = 0,
    projection: Projection = "fixed",
    min_gain: float = 1.02,
    gguf_file: str | None = None,
) -> Plan:
    """Predict what 2:4 sparsity gains, and recommend which layers to leave dense.

    No weight is read. A roofline times every layer, dense and 2:4, in prefill and in decoding; attention, the key-value
    cache and element-wise work are added and stay as they are. A layer is recommended for 2:4 if a request (prefill and
    `new_tokens` decoding steps, added up over all workloads) spends at least `min_gain` times less in it.

    Args:
        source: A program (with or without weights, with or without masks and branches), or what `load_for_plan` takes.
        gpu: A name from the table of devices, or ``cpu`` for this machine's processor, which is measured.
        runtime: ``ideal``, ``tensorrt-llm`` (by default) or ``torch``; for ``cpu``, ``packed``.
        batches: Sequences at once.
        seqs: Prompt lengths; by default 2048, or as many as the model allows.
        new_tokens: Generated for each prompt, by models that generate.
        dtype: Of the weights: bf16, fp16, fp8, int8 or int4; by default the model's own, or bf16.
        slorb_k: Plan SLoRB branches of that k; 0 for none. Branches that a program has are counted anyway.
        projection: Whether those branches' projection is fixed or trainable.
        min_gain: Least speedup of a layer for which it is worth its loss of accuracy.
        gguf_file: Name of the .gguf file, if the folder holds several.

    Raises:
        SparsepassError: If the GPU is unknown or older than Ampere, the model has no configuration, or an option is wrong.

    Example:
        >>> import torch
        >>> from sparsepass import capture
        >>> program = capture(torch.nn.Sequential(torch.nn.Linear(4096, 4096), torch.nn.ReLU()), torch.randn(2, 4096))
        >>> found = plan(program, gpu="a100", runtime="ideal")
        >>> round(found.points[0].prefill.sparse_layers_s / found.points[0].prefill.planned_layers_s, 2)
        1.78
    """
    device = this_processor() if is_processor(gpu) else find_device(gpu)
    kernels = runtime_for(device, runtime)
    _check(batches, seqs, new_tokens, slorb_k, projection, min_gain)
    program = source if isinstance(source, Program) else load_for_plan(source, gguf_file=gguf_file)
    shape = model_shape(program)
    chosen_dtype, notes = _dtype(program, dtype)
    loads = _workloads(shape, batches, seqs, new_tokens, notes)
    kinds: set[Dtype] = {chosen_dtype, "bf16"}
    refused = refusals(shape, kernels, chosen_dtype)
    able = {layer.site.name for layer in shape.layers} - refused.keys()
    trained = projection == "trainable"
    case = Case(
        shape=shape,
        matmuls={x.site.name: matmul_of(x, x.site.name in able, chosen_dtype, slorb_k, trained) for x in shape.layers},
        machines={kind: kernels.machine(device, kind) for kind in kinds},
    )
    layers = tuple(_plan_layer(case, layer, refused.get(layer.site.name), loads, min_gain) for layer in shape.layers)
    chosen = {item.layer.site.name for item in layers if item.decision == "2:4"}
    ignore = ignore_list(shape, chosen)
    verify_choice(shape, ignore, chosen)
    return Plan(
        source=str(program.origin.model_class or "a module in memory") if isinstance(source, Program) else str(source),
        shape=shape,
        device=device,
        runtime=kernels,
        dtype=chosen_dtype,
        slorb_k=slorb_k,
        projection=projection,
        points=tuple(_point(case, chosen, able, load) for load in loads),
        layers=layers,
        ignore=ignore,
        pipeline=pipeline_text(ignore, slorb_k, projection) if chosen else None,
        memory=case.memory(chosen, able, (kind for kind in TABLE if kind != "fp8" or not kernels.is_of_processor)),
        notes=(*notes, *_notes(shape, kernels)),
    )


def _plan_layer(case: Case, layer: Layer, refused: str | None, loads: Sequence[Workload], min_gain: float) -> LayerPlan:
    matmul = case.matmuls[layer.site.name]
    machine = case.machines[matmul.dtype]
    prefill, decode = (layer_tokens(case.shape, layer, loads[0], decode=decode) for decode in (False, True))

    def seconds(tokens: float) -> tuple[float, float | None]:
        dense = float(dense_time(matmul, tokens, machine))
        return dense, None if refused else float(sparse_time(matmul, tokens, machine))

    dense_s = sparse_s = branch_s = 0.0
    for load in loads:
        for is_decode, times in ((False, 1), (True, load.new_tokens)):
            tokens = layer_tokens(case.shape, layer, load, decode=is_decode)
            if tokens and times:
                dense_s += times * float(dense_time(matmul, tokens, machine))
                sparse_s += times * float(sparse_time(matmul, tokens, machine))
                branch_s += times * float(branch_time(matmul, tokens, machine))
    gain = dense_s / sparse_s if sparse_s else 1.0
    pays = refused is None and gain >= min_gain
    without_branch = dense_s / (sparse_s - branch_s) if sparse_s > branch_s else 1.0
    return LayerPlan(
        layer=layer,
        matmul=matmul,
        decision="2:4" if pays else "dense",
        reason=refused or (f"{gain:.2f}x faster over the request" if pays else _slow(gain, without_branch, min_gain)),
        prefill_intensity=float(intensity(matmul, prefill)) if prefill else 0.0,
        decode_intensity=float(intensity(matmul, decode)) if decode else None,
        prefill_s=seconds(prefill),
        decode_s=seconds(decode) if decode else None,
        pays_at=() if refused else _pays_at(matmul, machine),
    )


@lru_cache(maxsize=256)
def _pays_at(matmul: Matmul, machine: Machine) -> tuple[tuple[int, int | None], ...]:
    return paying_ranges(lambda n: dense_time(matmul, n, machine), lambda n: sparse_time(matmul, n, machine))


def _slow(gain: float, without_branch: float, min_gain: float) -> str:
    if without_branch >= min_gain:
        return f"{gain:.2f}x with its SLoRB branch ({without_branch:.2f}x without)"
    if gain < 0.995:
        return f"{gain:.2f}x: 2:4 is slower here"
    return f"{gain:.2f}x: 2:4 gains nothing here" if gain < 1.005 else f"{gain:.2f}x: below the least gain of {min_gain:g}x"


def _point(case: Case, chosen: Collection[str], able: Collection[str], load: Workload) -> PointPlan:
    generates = load.new_tokens > 0
    plain = replace(case, matmuls={name: replace(matmul, branch_k=0) for name, matmul in case.matmuls.items()})

    def times(names: Collection[str], of: Case = case) -> tuple[PhaseTimes, PhaseTimes | None]:
        return of.time(names, load, decode=False), of.time(names, load, decode=True) if generates else None

    def speedups(prefill: PhaseTimes, decode: PhaseTimes | None) -> tuple[float, float | None]:
        return prefill.speedup, decode.speedup if decode is not None else None

    prefill, decode = times(chosen)
    cache = cache_bytes(case.shape, load) if generates else 0.0
    return PointPlan(
        load=load,
        prefill=prefill,
        decode=decode,
        everything=speedups(*times(able)),
        without_branches=speedups(*times(chosen, plain)) if any(case.matmuls[name].branch_k for name in chosen) else None,
        cache_bytes=cache,
        needs_bytes=(case.weight_bytes(()) + cache, case.weight_bytes(chosen) + cache),
    )


def _check(
    batches: Sequence[int], seqs: Sequence[int], new_tokens: int, slorb_k: int, projection: str, min_gain: float
) -> None:
    for what, values in (("batch", batches), ("seq", seqs)):
        if wrong := [value for value in values if value < 1]:
            raise SparsepassError(f"{what} expects whole numbers of at least 1, got {wrong[0]}")
    if not batches:
        raise SparsepassError("batch expects at least one whole number, got none")
    if new_tokens < 0:
        raise SparsepassError(f"new_tokens expects a whole number of at least 0, got {new_tokens}")
    if slorb_k < 0:
        raise SparsepassError(f"slorb expects k of at least 1, or 0 for no branches, got {slorb_k}")
    if projection not in ("fixed", "trainable"):
        raise SparsepassError(f"projection expects fixed or trainable, got {projection!r}")
    if not 1 <= min_gain < float("inf"):
        raise SparsepassError(f"min_gain expects a speedup of at least 1, got {min_gain}")


def _dtype(program: Program, asked: str | None) -> tuple[Dtype, list[str]]:
    if asked is not None:
        known = {name: name for name in DTYPES} | {"bfloat16": "bf16", "float16": "fp16"}
        if asked not in known:
            raise SparsepassError(f"dtype {asked!r} is not known; expected one of {', '.join(DTYPES)}")
        return known[asked], []  # type: ignore[return-value]
    import torch

    own = next((t.dtype for t in program.graph_module.parameters() if t.is_floating_point()), torch.bfloat16)
    if own in (torch.float16, torch.bfloat16):
        return "fp16" if own == torch.float16 else "bf16", []
    return "bf16", [f"the model is in {str(own).removeprefix('torch.')}; planned as bf16 (--dtype chooses)"]


def _workloads(
    shape: ModelShape, batches: Sequence[int], seqs: Sequence[int], new_tokens: int, notes: list[str]
) -> list[Workload]:
    steps = 0 if shape.kind == "encoder" else new_tokens
    if not shape.takes_tokens:
        if seqs:
            notes.append("--seq has no effect: this model's input has a fixed length")
        return [Workload(batch=batch, seq=1, new_tokens=steps) for batch in batches]
    limit, inside = shape.max_tokens, steps if shape.kind == "decoder" else 0
    if not seqs:
        seqs = (max(1, min(_DEFAULT_SEQ, (limit or _DEFAULT_SEQ + inside) - inside)),)
    if limit is not None and max(seqs) + inside > limit:
        raise SparsepassError(
            f"seq {max(seqs)}{f' and {inside} new tokens' if inside else ''} exceed the {limit} positions of this model; "
            "give shorter seqs or fewer new_tokens"
        )
    return [Workload(batch=batch, seq=seq, new_tokens=steps) for batch in batches for seq in seqs]


def _notes(shape: ModelShape, kernels: Runtime) -> list[str]:
    notes = []
    if shape.kind == "encoder":
        notes.append("this model does not generate: there is no decoding, and prefill is its whole run")
    if shape.kind == "encoder-decoder":
        notes.append("prefill is the encoder and the decoder's first token; a decoding step is the decoder alone")
    if shape.is_unrolled:
        notes.append("the graph holds one fixed length: rows are scaled to yours, its recurrence or attention is not counted")
    elif not shape.products:
        notes.append("no attention was found in the graph, so none is counted")
    if shape.window is not None:
        notes.append(f"attention looks back {shape.window} tokens in {shape.window_share:.0%} of the layers")
    if any(layer.experts > 1 for layer in shape.layers):
        notes.append("experts: each token is taken to pick its experts evenly; only the picked ones' weights are read")
    if kernels.picks_faster:
        notes.append(
            "this runtime runs a 2:4 layer densely where that is faster; where it picks no sparse tactic, 1.0x is left"
        )
    if kernels.is_of_processor:
        notes += _PROCESSOR_NOTES
    return notes
