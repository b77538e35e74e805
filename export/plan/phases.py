"""From layers to a model: the time of prefill (or of an encoder's whole run) and of one decoding step, and bytes of memory."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from sparsepass.export.plan.devices import Dtype
from sparsepass.export.plan.model import Extent, Layer, ModelShape, Product
from sparsepass.export.plan.roofline import Machine, Matmul, branch_weights, dense_time, sparse_time, weight_bits

START_TOKENS = 1
"""Tokens of the decoder in the prefill of an encoder-decoder."""
_HALF_BITS = 16
TABLE: tuple[Dtype, ...] = ("bf16", "fp8", "int8", "int4")
"""Types of the weights whose bytes are told."""


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


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """Bytes of all weights when the linear layers are of one type.

    Attributes:
        dtype: Of the layers that the passes take; all else (embedding, output head, norms, branches) is in 16 bits.
        dense_bytes: With all layers dense.
        planned_bytes: With the chosen layers 2:4, branches included.
        branch_bytes: The branches' part of these.
        everything_bytes: With every layer 2:4 that a kernel takes.
    """

    dtype: Dtype
    dense_bytes: float
    planned_bytes: float
    branch_bytes: float
    everything_bytes: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a GPU.

    Attributes:
        shape: The model.
        matmuls: Site name -> its matmul, with the branch that it has or would have.
        machines: Type of the weights -> the GPU, as the runtime uses it.
    """

    shape: ModelShape
    matmuls: Mapping[str, Matmul]
    machines: Mapping[str, Machine]

    def time(self, chosen: Collection[str], load: Workload, *, decode: bool) -> PhaseTimes:
        """Add up a phase.

        Args:
            chosen: Names of the sites that are 2:4 in the plan.
            load: Batch and lengths.
            decode: One decoding step (averaged over those of the workload) instead of prefill.
        """
        shape, machine = self.shape, self.machines["bf16"]
        before = after = rest = head = other = 0.0
        seen: set[tuple[str, ...]] = set()
        for layer in shape.layers:
            tokens = layer_tokens(shape, layer, load, decode=decode)
            if not tokens:
                continue
            matmul = self.matmuls[layer.site.name]
            seconds = float(dense_time(matmul, tokens, self.machines[matmul.dtype]))
            if layer.site.name in chosen:
                before += seconds
                after += float(sparse_time(matmul, tokens, self.machines[matmul.dtype]))
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

    def weight_bytes(self, chosen: Collection[str]) -> float:
        """Bytes of all weights with the chosen layers 2:4."""
        in_layers = sum(matmul.num_weights for matmul in self.matmuls.values())
        bits = (self.shape.num_parameters - in_layers) * float(_HALF_BITS)
        for name, matmul in self.matmuls.items():
            bits += matmul.num_weights * weight_bits(matmul.dtype, sparse=name in chosen)
            bits += branch_weights(matmul) * _HALF_BITS if name in chosen else 0
        return bits / 8

    def memory(self, chosen: Collection[str], able: Collection[str], types: Iterable[Dtype]) -> tuple[MemoryRow, ...]:
        """One row for each type, whatever type is planned."""
        return tuple(self._memory_of(dtype, chosen, able) for dtype in types)

    def _memory_of(self, dtype: Dtype, chosen: Collection[str], able: Collection[str]) -> MemoryRow:
        plain = {layer.site.name for layer in self.shape.layers if layer.site.left_alone is not None}
        typed = {name: replace(found, dtype="bf16" if name in plain else dtype) for name, found in self.matmuls.items()}
        of_type = replace(self, matmuls=typed)
        return MemoryRow(
            dtype=dtype,
            dense_bytes=of_type.weight_bytes(()),
            planned_bytes=of_type.weight_bytes(chosen),
            branch_bytes=sum(branch_weights(matmul) * _HALF_BITS / 8 for name, matmul in typed.items() if name in chosen),
            everything_bytes=of_type.weight_bytes(able),
        )


def layer_tokens(shape: ModelShape, layer: Layer, load: Workload, *, decode: bool) -> float:
    """Tokens that a layer sees in prefill, or in one decoding step; of an encoder-decoder, of its own side."""
    of_last = decode or (layer.is_head and shape.kind == "decoder")  # a head: only the last position's logits are needed
    rows = layer.rows.per_new_token(shape.kind) if of_last else layer.rows.at(load.seq, START_TOKENS)
    return load.batch * rows / experts_per_token(layer)


def experts_per_token(layer: Layer) -> int:
    """Experts that each token takes; 1 for a plain layer."""
    return max(1, round(layer.rows.source or layer.rows.target)) if layer.experts > 1 else 1


def cache_bytes(shape: ModelShape, load: Workload) -> float:
    """Bytes of keys and values, in 16 bits, when the last token is generated."""
    context, generated = load.seq + load.new_tokens, START_TOKENS + load.new_tokens
    source = context if shape.kind == "decoder" else load.seq
    return sum(
        2 * load.batch * p.cached_heads * _length(shape, p.k, source, generated) * _length(shape, p.n, source, generated)
        for p in shape.products
        if p.in_decode
    )


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
        m = product.m.per_new_token(shape.kind)
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
