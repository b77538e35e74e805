"""Which layers to keep dense: those whose pruning costs the most for each byte that it saves, measured one at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsepass.export.plan import ignore_patterns, pipeline_text
from sparsepass.graph import Program, Site, SparsepassError, capture
from sparsepass.graph.equivalence import difference
from sparsepass.graph.limits import default_context
from sparsepass.graph.program import masked_weight
from sparsepass.graph.support import item_progress, shows_progress
from sparsepass.passes import NMSparsify, apply_passes
from sparsepass.passes.data import calibration_batches
from sparsepass.passes.engine import ComputeDtype, find_blocks, site_groups
from sparsepass.passes.maths import NMPattern

Unit = Literal["layer", "block"]
Loss = Literal["kl", "layer-error"]

_LOGITS = "logits"
_STORED_BITS = 16


@dataclass(frozen=True, kw_only=True)
class Sensitive:
    """What pruning one layer or block costs and saves.

    Attributes:
        name: The layer, or the module of the block.
        layers: The layers that it holds.
        loss: What pruning it alone does: KL divergence of the logits in nats a token; or, for ``layer-error``, the sum over its
            layers of the squared relative error of their outputs.
        saved_bytes: What it saves, stored in 16 bits.
        is_kept_dense: Whether it is chosen to be left alone.
    """

    name: str
    layers: tuple[str, ...]
    loss: float
    saved_bytes: int
    is_kept_dense: bool = False

    @property
    def loss_per_mb(self) -> float:
        """Loss for each million bytes saved: what the ranking goes by."""
        return self.loss / self.saved_bytes * 1e6


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """A ranking of layers by what their pruning costs, and the list of those to leave dense.

    Attributes:
        rows: The most sensitive first.
        ignore: Patterns for the option ``ignore`` of passes that leave exactly the chosen layers dense.
        budget: Share of all bytes saved that may be given up.
        given_up: Share that the chosen layers give up.
        unit: What was pruned at a time.
        loss: What was measured.
        passes: How it was pruned.
        num_tokens: Tokens that the loss was measured on; 0 for ``layer-error``.
    """

    rows: tuple[Sensitive, ...]
    ignore: tuple[str, ...]
    budget: float
    given_up: float
    unit: Unit
    loss: Loss
    passes: str
    num_tokens: int

    @property
    def text(self) -> str:
        """The passes as text with the list in it, ready to paste after ``--passes``."""
        return pipeline_text(self.ignore, 0, "fixed")

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON."""
        rows = [asdict(row) | {"loss_per_mb": row.loss_per_mb} for row in self.rows]
        return asdict(self) | {"rows": rows, "text": self.text}


def auto_ignore(
    model: nn.Module,
    calibration: Any,
    *,
    budget: float = 0.05,
    unit: Unit = "layer",
    loss: Loss = "kl",
    criterion: str | None = None,
    pattern: str = "2:4",
    ignore: Sequence[str] = (),
    tokenizer: Any = None,
    num_sequences: int = 32,
    loss_sequences: int = 4,
    context: int | None = None,
    seed: int = 0,
    text_column: str | None = None,
    compute: ComputeDtype = "auto",
    example_inputs: Any = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Choose the layers to leave dense by measured loss for each byte saved.

    All layers are pruned once, by the criterion and on the calibration data. Then one layer (or block) at a time takes its
    pruned weight in the dense model, and the divergence of the logits from the dense model's is measured. Layers are taken
    from the top of the ranking as long as what they would have saved stays within the budget.

    Cost of ``kl``: a forward pass over ``loss_sequences`` for each layer or block. ``layer-error`` costs none: it ranks by
    the error of each layer's own outputs, and sees nothing of what the layers behind make of it.

    Args:
        model: A dense model or program; it is not changed.
        calibration: See `apply_passes`.
        budget: Share of all bytes saved that may be given up for accuracy, between 0 and 1.
        unit: ``layer``, or ``block`` for the numbered modules (``model.layers.0``) as a whole.
        loss: ``kl`` or ``layer-error``.
        criterion: Of nm_sparsify; by default SparseGPT.
        pattern: N:M.
        ignore: Layers that are left alone in any case; their patterns go into the list.
        tokenizer: Turns text into tokens.
        num_sequences: Calibration sequences for pruning.
        loss_sequences: The first so many of them are what the loss is measured on.
        context: Tokens in a sequence made from text; by default 2048 or the model's limit.
        seed: See `apply_passes`.
        text_column: See `apply_passes`.
        compute: See `apply_passes`.
        example_inputs: See `apply_passes`.
        progress: See `apply_passes`.

    Returns:
        The ranking, and the list that passes take.

    Raises:
        SparsepassError: If the budget is no share, the model is sparse already, or has no logits for ``kl``.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> inputs = torch.randn(8, 16)
        >>> found = auto_ignore(model, {"input": inputs}, budget=0.5, loss="layer-error", example_inputs=inputs)
        >>> len(found.rows), len(found.ignore)
        (2, 1)
    """
    if not 0 < budget < 1:
        raise SparsepassError(
            f"the budget is the share of the saving that may be given up, between 0 and 1, such as 0.05; got {budget}"
        )
    dense = model if isinstance(model, Program) else capture(model, example_inputs)
    if dense.sparse:
        raise SparsepassError("the model is sparse already, so nothing can be measured by pruning it; give the dense model")
    if loss == "kl" and _LOGITS not in dense.output_names:
        raise SparsepassError(
            f"the model returns {', '.join(dense.output_names)} and no logits, so there is no divergence to measure; choose "
            "the loss layer-error"
        )
    item = NMSparsify(pattern=pattern, criterion=criterion, ignore=tuple(ignore)).resolve(has_calibration=True)
    batches = calibration_batches(
        calibration,
        tokenizer=tokenizer,
        input_names=dense.input_names,
        num_sequences=num_sequences,
        context=default_context(dense.origin.config) if context is None else context,
        batch_size=1,
        seed=seed,
        text_column=text_column,
        vocab_size=(dense.origin.config or {}).get("vocab_size"),
    )
    inputs = [batch.inputs for batch in batches.batches()]
    pruned = apply_passes(
        dense, [item], calibration=inputs, num_sequences=num_sequences, seed=seed, compute=compute, progress=progress
    )
    able = item.choose(dense)[0]
    units = _units(dense, able, unit)
    saved = {site.name: saved_bytes(site.num_weights, NMPattern.parse(pattern)) for site in able}
    num_tokens = 0
    if loss == "kl":
        taken = inputs[:loss_sequences]
        num_tokens = sum(next(iter(batch.values())).numel() for batch in taken)
        losses = _divergences(dense, pruned, units, taken, shown=shows_progress(progress))
    else:
        errors = {o.site: float(o.facts["relative_error"]) for o in pruned.history[-1].outcomes if o.facts}
        losses = {name: sum(errors[site.name] ** 2 for site in sites) for name, sites in units.items()}
    rows = [
        Sensitive(
            name=name,
            layers=tuple(site.name for site in sites),
            loss=losses[name],
            saved_bytes=sum(saved[site.name] for site in sites),
        )
        for name, sites in units.items()
    ]
    rows.sort(key=lambda row: -row.loss_per_mb)
    kept = _within(rows, budget)
    chosen = {layer for row in rows if row.name not in kept for layer in row.layers}
    every = replace(item, ignore=()).choose(dense)[0]
    return Sensitivity(
        rows=tuple(replace(row, is_kept_dense=row.name in kept) for row in rows),
        ignore=ignore_patterns(every, chosen),
        budget=budget,
        given_up=sum(row.saved_bytes for row in rows if row.name in kept) / sum(row.saved_bytes for row in rows),
        unit=unit,
        loss=loss,
        passes=pruned.recipe,
        num_tokens=num_tokens,
    )


def saved_bytes(num_weights: int, pattern: NMPattern) -> int:
    """Bytes that N:M saves of 16-bit weights: what is dropped, less the indices of what is kept.

    Source: methods.md section 4: 2:4 takes 9 bits a weight.

    Example:
        >>> saved_bytes(1600, NMPattern(2, 4))
        1400
    """
    kept = num_weights * pattern.n // pattern.m
    index_bits = math.ceil(math.log2(pattern.m))
    return (num_weights * _STORED_BITS - kept * (_STORED_BITS + index_bits)) // 8


def _units(program: Program, sites: Sequence[Site], unit: Unit) -> dict[str, tuple[Site, ...]]:
    if unit == "layer":
        return {site.name: (site,) for site in sites}
    blocks, no_block = find_blocks(program, site_groups(sites))
    found = {block.name: block.sites for block in blocks}
    return found | {site.name: (site,) for site in sites if site.name in no_block}


def _within(rows: Sequence[Sensitive], budget: float) -> set[str]:
    """From the top of the ranking, all that the budget still has room for."""
    room = budget * sum(row.saved_bytes for row in rows)
    kept = set()
    for row in rows:
        if row.saved_bytes <= room and row.loss > 0:
            kept.add(row.name)
            room -= row.saved_bytes
    return kept


@torch.no_grad()
def _divergences(
    dense: Program,
    pruned: Program,
    units: Mapping[str, Sequence[Site]],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    shown: bool,
) -> dict[str, float]:
    """Mean divergence of the logits, each unit pruned alone. One batch's logits are held at a time."""
    totals = dict.fromkeys(units, 0.0)
    num_tokens = 0
    with item_progress(shown, "sensitivity", len(units) * len(batches)) as advance:
        for batch in batches:
            here = {name: tensor.to(dense.device) for name, tensor in batch.items()}
            reference = _logits(dense, here)
            rows = reference.numel() // reference.shape[-1]
            num_tokens += rows
            for name, sites in units.items():
                with _pruned_weights(dense, pruned, sites):
                    found = difference({_LOGITS: reference}, {_LOGITS: _logits(dense, here)}).kl
                assert found is not None
                totals[name] += found * rows
                advance(name)
    return {name: total / num_tokens for name, total in totals.items()}


def _logits(program: Program, inputs: Mapping[str, Tensor]) -> Tensor:
    values = program.run(program.flat_inputs(**inputs))
    logits: Tensor = values[program.output_names.index(_LOGITS)]
    return logits


@contextmanager
def _pruned_weights(dense: Program, pruned: Program, sites: Sequence[Site]) -> Iterator[None]:
    """Put pruned weights in the place of dense ones for as long as the block runs."""
    old = {site.weight: dense.tensor(site.weight) for site in sites}
    try:
        for name in old:
            dense.set_tensor(name, nn.Parameter(masked_weight(pruned, name), requires_grad=False))
        yield
    finally:
        for name, tensor in old.items():
            dense.set_tensor(name, tensor)
