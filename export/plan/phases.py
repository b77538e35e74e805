"""From layers to a model: the time of prefill (or of an encoder's whole run) and of one decoding step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sparsepass.export.plan.model import Extent, Layer, ModelShape, Product
from sparsepass.export.plan.roofline import Machine, Matmul, dense_time, sparse_time

START_TOKENS = 1
"""Tokens of the decoder in the prefill of an encoder-decoder."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the model is asked to do.

    Attributes:
        batch: Sequences at once.
        seq: Tokens of each prompt, or of each input of an encoder.
        new_tokens: Tokens that are generated for each; 0 for an encoder.
    """

    batch: int
    seq: int
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class PhaseTimes:
    """Seconds of one phase, dense and planned, and where they go.

    Attributes:
        dense_s: The whole phase with dense weights.
        planned_s: The whole phase as planned.
        sparse_layers_s: Dense time of the layers that are planned 2:4.
        planned_layers_s: Their planned time, with branches.
        dense_layers_s: Time of the other layers, output head included.
        head_s: Time of the output head.
        attention_s: Time of attention and the key-value cache.
        other_s: Time of norms, activation functions, residuals.
    """

    dense_s: float
    planned_s: float
    sparse_layers_s: float
    planned_layers_s: float
    dense_layers_s: float
    head_s: float
    attention_s: float
    other_s: float

    @property
    def speedup(self) -> float:
        """Dense time over planned time."""
        return self.dense_s / self.planned_s if self.planned_s else 1.0


def layer_tokens(shape: ModelShape, layer: Layer, load: Workload, *, decode: bool) -> float:
    """Tokens that a layer sees in prefill, or in one decoding step; of an encoder-decoder, of its own side."""
    per_token = layer.rows.target if shape.kind == "encoder-decoder" else layer.rows.source
    if decode:
        rows = per_token if layer.in_decode else 0.0
    elif layer.is_head and shape.kind == "decoder":
        rows = per_token  # only the last position's logits are needed
    else:
        rows = layer.rows.at(load.seq, START_TOKENS)
    return load.batch * rows / experts_per_token(layer)


def experts_per_token(layer: Layer) -> int:
    """Experts that each token takes; 1 for a plain layer."""
    return max(1, round(layer.rows.source or layer.rows.target)) if layer.experts > 1 else 1


def time_phase(
    shape: ModelShape,
    matmuls: Mapping[str, Matmul],
    chosen: set[str],
    load: Workload,
    machines: Callable[[str], Machine],
    *,
    decode: bool,
) -> PhaseTimes:
    """Add up a phase.

    Args:
        shape: The model.
        matmuls: Site name -> its matmul, with the branch that it would have.
        chosen: Names of the sites that are 2:4 in the plan.
        load: Batch and lengths.
        machines: Type of the weights -> the machine.
        decode: One decoding step (averaged over those of the workload) instead of prefill.
    """
    machine = machines("bf16")
    before = after = rest = head = other = 0.0
    seen: set[tuple[str, ...]] = set()
    for layer in shape.layers:
        tokens = layer_tokens(shape, layer, load, decode=decode)
        if not tokens:
            continue
        matmul = matmuls[layer.site.name]
        seconds = float(dense_time(matmul, tokens, machines(matmul.dtype)))
        if layer.site.name in chosen:
            before += seconds
            after += float(sparse_time(matmul, tokens, machines(matmul.dtype)))
        else:
            rest += seconds
            head += seconds if layer.is_head else 0.0
        other += _around(layer, tokens * matmul.experts_per_token, machine, counts_input=layer.site.inputs not in seen)
        seen.add(layer.site.inputs)
    attention = sum(_product_time(shape, product, load, machine, decode=decode) for product in shape.products)
    fixed = rest + attention + other
    return PhaseTimes(
        dense_s=before + fixed,
        planned_s=after + fixed,
        sparse_layers_s=before,
        planned_layers_s=after,
        dense_layers_s=rest,
        head_s=head,
        attention_s=attention,
        other_s=other,
    )


def cache_bytes(shape: ModelShape, load: Workload) -> float:
    """Bytes of keys and values, in 16 bits, when the last token is generated."""
    context, generated = load.seq + load.new_tokens, START_TOKENS + load.new_tokens
    source = context if shape.kind == "decoder" else load.seq
    return sum(
        2 * load.batch * p.cached_heads * _length(shape, p.k, source, generated) * _length(shape, p.n, source, generated)
        for p in _cached(shape)
    )


def _cached(shape: ModelShape) -> Sequence[Product]:
    return [product for product in shape.products if product.in_decode]


def _around(layer: Layer, rows: float, machine: Machine, *, counts_input: bool) -> float:
    """Element-wise work beside a layer: its result is read again, its input is written, and a residual like it read."""
    moved = rows * layer.site.out_features * 2
    if not counts_input:
        return moved / machine.dense_bandwidth
    moved += rows * layer.in_features * 2 * 2
    return max(moved / machine.dense_bandwidth, machine.dense_host_s) + machine.gap_s


def _product_time(shape: ModelShape, product: Product, load: Workload, machine: Machine, *, decode: bool) -> float:
    """One product of attention, scores never leaving the chip. What a decoder may not see is not computed."""
    if decode and not product.in_decode:
        return 0.0
    if decode:
        generated = load.new_tokens / 2
        source = load.seq + (generated if shape.kind == "decoder" else 0.0)
        target = START_TOKENS + generated
        m = product.m.target if shape.kind == "encoder-decoder" else product.m.source
    else:
        source, target = float(load.seq), float(START_TOKENS)
        m = product.m.at(source, target)
    k, n = (_length(shape, extent, source, target) for extent in (product.k, product.n))
    right_bytes = 2 * product.cached_heads * k * n
    is_causal = product.in_decode and not decode and product.m.source and (product.k.source or product.n.source)
    if is_causal:
        k, n = (_length(shape, e, source / 2, target) if e.source else size for e, size in ((product.k, k), (product.n, n)))
    left_bytes = 0.0 if product.k.varies else 2 * product.heads * m * k
    out_bytes = 0.0 if product.n.varies else 2 * product.heads * m * n
    compute = 2 * product.heads * m * k * n * load.batch / machine.dense_flops
    memory = (left_bytes + right_bytes + out_bytes) * load.batch / machine.dense_bandwidth
    return max(compute, memory, machine.dense_host_s) + machine.gap_s


def _length(shape: ModelShape, extent: Extent, source: float, target: float) -> float:
    """A length of attention; of layers that slide, no longer than their window (averaged over the layers)."""
    full = extent.at(source, target)
    if shape.window is None or not extent.varies:
        return full
    return (1 - shape.window_share) * full + shape.window_share * min(full, shape.window)
