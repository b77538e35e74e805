"""`plan`: what 2:4 sparsity would buy, layer by layer, before any GPU hour is spent."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from sparsepass.export.plan.choice import Ineligible, ignore_list, matmul_of, pipeline_text, refusals, verify_choice
from sparsepass.export.plan.devices import find_device
from sparsepass.export.plan.load import load_for_plan
from sparsepass.export.plan.memory import memory_table, model_bytes
from sparsepass.export.plan.model import Layer, ModelShape, model_shape
from sparsepass.export.plan.phases import PhaseTimes, Workload, cache_bytes, layer_tokens, time_phase
from sparsepass.export.plan.result import LayerPlan, Plan, PointPlan, Projection
from sparsepass.export.plan.roofline import Machine, Matmul, branch_time, dense_time, intensity, paying_ranges, sparse_time
from sparsepass.export.plan.runtimes import DTYPES, Dtype, Runtime, find_runtime
from sparsepass.graph import Program, SparsepassError

_DEFAULT_SEQ = 2048


def plan(
    source: "Program | str | Path",
    *,
    gpu: str,
    runtime: str = "tensorrt-llm",
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
        gpu: A name from the table of devices.
        runtime: ``ideal``, ``tensorrt-llm`` or ``torch``.
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
    device, kernels = find_device(gpu), find_runtime(runtime)
    _check(batches, seqs, new_tokens, slorb_k, projection, min_gain)
    program = source if isinstance(source, Program) else load_for_plan(source, gguf_file=gguf_file)
    shape = model_shape(program)
    chosen_dtype, notes = _dtype(program, dtype)
    loads = _workloads(shape, batches, seqs, new_tokens, notes)
    kinds: set[Dtype] = {chosen_dtype, "bf16"}
    machines: dict[str, Machine] = {kind: kernels.machine(device, kind) for kind in kinds}
    refused = refusals(shape, kernels, chosen_dtype)
    matmuls = {
        layer.site.name: matmul_of(layer, refused.get(layer.site.name), chosen_dtype, slorb_k, projection == "trainable")
        for layer in shape.layers
    }
    layers = tuple(
        _plan_layer(shape, layer, matmuls[layer.site.name], refused.get(layer.site.name), loads, machines, min_gain)
        for layer in shape.layers
    )
    chosen = {item.layer.site.name for item in layers if item.decision == "2:4"}
    able = {layer.site.name for layer in shape.layers if layer.site.name not in refused}
    ignore = ignore_list(shape, chosen)
    verify_choice(shape, ignore, chosen)
    weights = model_bytes(shape, matmuls, set()), model_bytes(shape, matmuls, chosen)
    return Plan(
        source=str(program.origin.model_class or "a module in memory") if isinstance(source, Program) else str(source),
        shape=shape,
        device=device,
        runtime=kernels,
        dtype=chosen_dtype,
        slorb_k=slorb_k,
        projection=projection,
        points=tuple(_point(shape, matmuls, chosen, able, load, machines, weights) for load in loads),
        layers=layers,
        ignore=ignore,
        pipeline=pipeline_text(ignore, slorb_k, projection) if chosen else None,
        memory=memory_table(shape, matmuls, chosen, able),
        notes=(*notes, *_notes(shape, kernels)),
    )


def _plan_layer(
    shape: ModelShape,
    layer: Layer,
    matmul: Matmul,
    refused: Ineligible | None,
    loads: Sequence[Workload],
    machines: dict[str, Machine],
    min_gain: float,
) -> LayerPlan:
    machine = machines[matmul.dtype]
    prefill = layer_tokens(shape, layer, loads[0], decode=False)
    decode = layer_tokens(shape, layer, loads[0], decode=True)

    def seconds(tokens: float) -> tuple[float, float | None]:
        dense = float(dense_time(matmul, tokens, machine))
        return dense, None if refused else float(sparse_time(matmul, tokens, machine))

    dense_s = sparse_s = branch_s = 0.0
    for load in loads:
        for tokens, times in (
            (layer_tokens(shape, layer, load, decode=False), 1),
            (layer_tokens(shape, layer, load, decode=True), load.new_tokens),
        ):
            if tokens and times:
                dense_s += times * float(dense_time(matmul, tokens, machine))
                sparse_s += times * float(sparse_time(matmul, tokens, machine))
                branch_s += times * float(branch_time(matmul, tokens, machine))
    gain = dense_s / sparse_s if sparse_s else 1.0
    if refused is not None:
        decision, reason = "dense", refused.reason
    elif gain >= min_gain:
        decision, reason = "2:4", f"{gain:.2f}x faster over the request"
    else:
        decision, reason = "dense", _slow(gain, dense_s / (sparse_s - branch_s) if sparse_s > branch_s else 1.0, min_gain)
    return LayerPlan(
        layer=layer,
        matmul=matmul,
        decision=decision,  # type: ignore[arg-type]
        reason=reason,
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


def _point(
    shape: ModelShape,
    matmuls: dict[str, Matmul],
    chosen: set[str],
    able: set[str],
    load: Workload,
    machines: dict[str, Machine],
    weights: tuple[float, float],
) -> PointPlan:
    generates = load.new_tokens > 0
    plain = {name: replace(matmul, branch_k=0) for name, matmul in matmuls.items()}

    def times(names: set[str], *, decode: bool, of: dict[str, Matmul] = matmuls) -> PhaseTimes:
        return time_phase(shape, of, names, load, machines.__getitem__, decode=decode)

    def speedups(names: set[str], of: dict[str, Matmul]) -> tuple[float, float | None]:
        decode = times(names, decode=True, of=of).speedup if generates else None
        return times(names, decode=False, of=of).speedup, decode

    cache = cache_bytes(shape, load) if generates else 0.0
    return PointPlan(
        load=load,
        prefill=times(chosen, decode=False),
        decode=times(chosen, decode=True) if generates else None,
        everything=speedups(able, matmuls),
        without_branches=speedups(chosen, plain) if any(matmuls[name].branch_k for name in chosen) else None,
        cache_bytes=cache,
        needs_bytes=(weights[0] + cache, weights[1] + cache),
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
    if own == torch.float16:
        return "fp16", []
    if own == torch.bfloat16:
        return "bf16", []
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
            "give a shorter --seq or fewer --new-tokens"
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
    return notes
