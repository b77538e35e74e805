"""Running a pipeline: check the order, run each pass, validate its result, and record what it did."""

import copy
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsepass.graph import PassError, Program, Site, SparsepassError, capture
from sparsepass.graph.admission import check_has_values
from sparsepass.graph.equivalence import Difference, difference
from sparsepass.graph.fusion import layers_of
from sparsepass.graph.limits import default_context
from sparsepass.graph.placement import lent, streamed
from sparsepass.graph.program import with_sparse
from sparsepass.graph.records import PassRecord, SiteOutcome
from sparsepass.graph.rewrite import finish, without_branches
from sparsepass.graph.spec import violations
from sparsepass.graph.support import find_device, item_progress, one_at_a_time, shows_progress
from sparsepass.passes.base import NEEDS_ORDER, Facts, GroupContext, Pass
from sparsepass.passes.conditions import Condition
from sparsepass.passes.data import CalibrationBatch, CalibrationData, calibration_batches
from sparsepass.passes.engine import Block, BlockRun, ComputeDtype, SiteGroup, find_blocks, site_groups, sweep
from sparsepass.passes.maths import InputStatistics
from sparsepass.passes.nm_sparsify import NMSparsify
from sparsepass.passes.preconditions import check_pipeline
from sparsepass.passes.table import parse_pipeline, pass_to_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROVIDED = (Condition.MASKED, Condition.FOLDED, Condition.BRANCHED, Condition.LEARNED, Condition.QUANTIZED)
_VALIDATION_SEQUENCES = 2
_LOG = logging.getLogger(__name__)


@one_at_a_time
def apply_passes(
    model: nn.Module,
    passes: str | Pass | Iterable[str | Pass],
    *,
    calibration: Any = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    num_sequences: int | None = 128,
    context: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    text_column: str | None = None,
    compute: ComputeDtype = "auto",
    example_inputs: Mapping[str, Any] | tuple[Tensor, ...] | Tensor | None = None,
    inplace: bool = False,
    validate: bool = True,
    progress: bool | None = None,
    device: torch.device | str | None = None,
) -> Program:
    """Rewrite a model's linear layers with a list of passes.

    Args:
        model: A transformers model, any nn.Module, or a Program.
        passes: Names (``"nm_sparsify"``), pass objects, or text (``"nm_sparsify{criterion=wanda},slorb{k=16}"``), in the
            order in which they run.
        calibration: What the model is run on, where a criterion needs it: token tensors, batches, an iterable, a
            ``datasets.Dataset``, a text file, or a hub data set name. See `calibration_batches`.
        tokenizer: Turns text into tokens; needed if calibration is text.
        num_sequences: Calibration sequences to use at most.
        context: Tokens per sequence made from text; by default 2048 or the model's limit.
        batch_size: Sequences run at once, at most. Memory and speed only; a pass that trains has a batch size of its own.
        seed: Where in the text the sequences are taken.
        text_column: The column of calibration rows that holds text; by default ``text``, or else chats in ``messages``.
        compute: Precision of calibration's matmuls: ``auto`` is bfloat16 where the processor computes in it.
        example_inputs: What to capture the model with; transformers models can do without.
        inplace: Whether the program takes over the model's tensors and writes into them (or is the given Program itself):
            that takes the memory of one model, not of two. By default the model is never changed.
        validate: Whether to measure, after every pass, how far the outputs moved. Exact passes must not move them.
        progress: Whether to show progress with the time left; by default where standard error is a terminal.
        device: Where to compute, see `find_device`; by default where the model is. The weights stay where they are: what is
            worked on moves to the device and back, so that it needs room for one layer (one block with `reconstruct`) and
            the activations at one place, not for the model.

    Returns:
        The rewritten program. ``print(program.report())`` tells what was rewritten, and what was skipped and why.

    Raises:
        SparsepassError: If a pass or option is unknown, stands in the wrong order, or meets something it cannot rewrite. The
            model is then as it was; with ``inplace``, the layers that were rewritten by then have their new weights.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> program = apply_passes(model, ["nm_sparsify{pattern=2:4}"], example_inputs=torch.randn(2, 16))
        >>> program.report().num_sparse
        1
    """
    place = None if device is None else find_device(device)
    asked = parse_pipeline(passes)
    pipeline = resolved(asked, has_calibration=calibration is not None)
    if any(_falls_back(before, after) for before, after in zip(asked, pipeline, strict=True)):
        _LOG.warning(
            "Without calibration data nm_sparsify keeps the largest weights (criterion=magnitude), which most often leaves a "
            "language model useless until it is retrained: give a text to calibrate on, or choose the criterion yourself"
        )
    check_has_values(model)
    if isinstance(model, Program):
        program = model if inplace else copy.deepcopy(model)
    else:
        program = capture(model, example_inputs, inplace=inplace)
    check_pipeline(program, pipeline)
    run = _Run(program, pipeline, validate=validate, compute=compute, progress=shows_progress(progress), device=place)
    if any(p.needs != "nothing" for p in pipeline):
        run.calibration = calibration_batches(
            calibration,
            tokenizer=tokenizer,
            input_names=program.input_names,
            num_sequences=num_sequences,
            context=default_context(program.origin.config) if context is None else context,
            batch_size=min([batch_size, *(p.block_work.batch_size for p in pipeline if p.block_work is not None)]),
            seed=seed,
            text_column=text_column,
            vocab_size=_vocabulary(program),
        )
    run.all()
    return program


def resolved(pipeline: Sequence[Pass], *, has_calibration: bool) -> tuple[Pass, ...]:
    """The passes with what depends on calibration filled in; needs no model, so that a mistake shows before one is loaded.

    Raises:
        SparsepassError: If there is none, a file that one names is not there, or one needs calibration and gets none.
    """
    if not pipeline:
        raise SparsepassError("the pipeline is empty; name at least one pass, such as nm_sparsify")
    found = tuple(item.resolve(has_calibration=has_calibration) for item in pipeline)
    if not has_calibration and (asking := [item for item in found if item.needs != "nothing"]):
        raise SparsepassError(
            f"{pass_to_text(asking[0])} needs calibration data, got none; pass calibration=... (text, tokens, a data set), "
            "or choose criterion=magnitude and init=mean"
        )
    return found


def _falls_back(asked: Pass, resolved: Pass) -> bool:
    """Whether a criterion that needs no calibration stands in for the one that is chosen with it."""
    if not (isinstance(asked, NMSparsify) and isinstance(resolved, NMSparsify)):
        return False
    return asked.criterion is None and resolved.criterion == "magnitude"


class _Run:
    """One run of a pipeline over a program."""

    def __init__(
        self,
        program: Program,
        pipeline: tuple[Pass, ...],
        *,
        validate: bool,
        compute: ComputeDtype,
        progress: bool,
        device: torch.device | None = None,
    ) -> None:
        self.program, self.pipeline = program, pipeline
        self.calibration: CalibrationData | None = None
        self._validates, self._compute, self._progress = validate, compute, progress
        self._device = device or program.device
        self._batches: list[CalibrationBatch] = []

    def all(self) -> None:
        """Run every pass. Consecutive passes that read statistics share one sweep.

        A pass that rewrites whole blocks needs the dense model's blocks, so all passes before it run in its sweep. A pass that
        prepares has a sweep of its own: what it rewrites reaches back to operations that have run.
        """
        if self.calibration is not None:
            self._batches = list(self.calibration.batches())
        if self._validates:
            self._inputs, self._inputs_name = self._validation_inputs()
            self._start = self._previous = self._outputs()
        before_blocks = max((i for i, item in enumerate(self.pipeline) if item.block_work), default=-1)
        runs = [not p.prepares and (p.needs != "nothing" or i <= before_blocks) for i, p in enumerate(self.pipeline)]
        calibrated = {id(p) for p, inside in zip(self.pipeline, runs, strict=True) if inside}
        for is_calibrated, items in groupby(self.pipeline, key=lambda p: id(p) in calibrated):
            if is_calibrated:
                self._sweep(tuple(items))
            else:
                for item in items:
                    self._plain(item)

    def _plain(self, item: Pass) -> None:
        started = time.perf_counter()
        chosen, skipped = item.choose(self.program)
        _require_work(item, chosen, skipped)
        facts: dict[str, Facts] = {}
        tried: dict[str, str] = {}
        known = {} if item.needs == "nothing" else self._gathered(item, chosen)
        groups = item.groups(self.program, chosen)
        with item_progress(self._progress, item.name, len(groups) * (1 + item.num_steps)) as advance:
            for group in groups:
                context = GroupContext(measure=self._validates, by_weight=known, advance=advance)
                # Layers all over the model may be most of it: they stay where they are.
                with self._lent(group) if len(site_groups(group.sites)) == 1 else nullcontext():
                    found = _rewrite(item, self.program, group, context)
                facts |= {name: its for name, its in found.items() if name not in context.unchanged}
                tried |= context.unchanged
                advance(group.sites[0].name)
        _require_work(item, [*facts, *tried], skipped)
        _finish(self.program, item.name)
        self._record(item, facts, {**skipped, **tried}, time.perf_counter() - started, self._measure(item))

    def _gathered(self, item: Pass, chosen: Sequence[Site]) -> dict[str, tuple[InputStatistics, ...]]:
        """Statistics of what the chosen sites read, by their weights."""
        known: dict[str, tuple[InputStatistics, ...]] = {}
        groups = site_groups(chosen)
        with item_progress(self._progress, f"{item.name}: calibration", len(groups)) as advance:
            sweep(
                self.program,
                self._batches,
                groups,
                lambda group, statistics: known.update({site.weight: statistics for site in group.sites}),
                gram=item.needs == "gram",
                compute=self._compute,
                device=self._device,
                advance=advance,
            )
        return known

    def _sweep(self, items: tuple[Pass, ...]) -> None:
        assert self.calibration is not None
        started = time.perf_counter()
        first = items[0]
        chosen, skipped = first.choose(self.program)
        _require_work(first, chosen, skipped)
        for item in items[1:]:
            chosen += item.choose(self.program)[0]
        weights = {site.weight for site in chosen}
        groups = site_groups([site for site in self.program.sites() if site.weight in weights])
        facts: dict[str, dict[str, Facts]] = {item.name: {} for item in items}
        reasons: dict[str, dict[str, str]] = {item.name: {} for item in items}
        reasons[first.name] = skipped
        by_group = [item for item in items if item.block_work is None]
        by_block = [item for item in items if item.block_work is not None]
        blocks: list[Block] = []
        originals: dict[str, Tensor] = {}
        if by_block:
            blocks, no_block = find_blocks(self.program, groups)
            in_blocks = {site.weight for block in blocks for site in block.sites}
            alone = [replace(g, sites=tuple(s for s in g.sites if s.weight not in in_blocks)) for g in groups]
            groups = [g for block in blocks for g in block.groups] + [g for g in alone if g.sites]
            for item in by_block:
                reasons[item.name] |= no_block

        def rewrite_by(item: Pass, group: SiteGroup, context: GroupContext) -> None:
            refused = {site.name: item.reason(site, self.program) for site in group.sites}
            mine = tuple(site for site in group.sites if refused[site.name] is None)
            reasons[item.name] |= {name: reason for name, reason in refused.items() if reason is not None}
            if mine:
                facts[item.name] |= _rewrite(item, self.program, SiteGroup(sites=mine), context)

        def rewrite(group: SiteGroup, statistics: tuple[InputStatistics, ...]) -> None:
            context = GroupContext(statistics=statistics, measure=self._validates)
            with self._lent(group):
                for item in by_group:
                    rewrite_by(item, group, context)
            if by_block:
                originals.update(context.originals)

        def rewrite_block(block: Block, run: BlockRun) -> None:
            for item in by_block:
                context = GroupContext(originals=originals, measure=self._validates, block=run)
                group = SiteGroup(sites=block.sites)
                with self._lent(group, run.own_vectors()):
                    rewrite_by(item, group, context)
            originals.clear()

        needs = max((item.needs for item in items), key=NEEDS_ORDER.index)
        title = "+".join(item.name for item in items)
        num_steps = len(groups) + len(blocks) * sum(item.block_work.steps for item in by_block if item.block_work)
        with item_progress(self._progress, title, num_steps) as advance:
            sweep(
                self.program,
                self._batches,
                groups,
                rewrite,
                gram=needs == "gram",
                compute=self._compute,
                device=self._device,
                blocks=blocks,
                rewrite_block=rewrite_block,
                advance=advance,
            )
        _finish(self.program, title)
        seconds = time.perf_counter() - started
        for index, item in enumerate(items):
            if index:
                _require_work(item, list(facts[item.name]), reasons[item.name])
            # Each pass is measured as if the later ones had not run: branches are switched off; training and rounding last.
            later = items[index + 1 :]
            touched = {s.weight for s in self.program.sites() if any(s.name in facts[each.name] for each in later)}
            with without_branches(self.program, touched):
                lasts = any(each in by_block or Condition.QUANTIZED in each.provides for each in later)
                measured = None if lasts else self._measure(item)
            self._record(item, facts[item.name], reasons[item.name], seconds, measured)

    def _validation_inputs(self) -> tuple[dict[str, Tensor], str]:
        if self._batches:
            first = self._batches[0].inputs
            return {name: t[:_VALIDATION_SEQUENCES] for name, t in first.items()}, "the first calibration sequences"
        return self.program.example_inputs, "example inputs"

    def _lent(self, group: SiteGroup, more: Sequence[str] = ()) -> AbstractContextManager[None]:
        """The weights of a group, with all that stands beside them, on the device that is computed on."""
        weights, known = [site.weight for site in group.sites], (self.program.sparse, self.program.quantized)
        beside = [name for states in known for weight in weights if weight in states for name in states[weight].names]
        return lent(self.program, [*weights, *beside, *more], self._device)

    @torch.no_grad()
    def _outputs(self) -> dict[str, Tensor]:
        bound = self.program.flat_inputs(**{n: t.to(self._device) for n, t in self._inputs.items()})
        is_elsewhere = self._device != self.program.device
        with streamed(self.program, self._device) if is_elsewhere else nullcontext():
            values = self.program.run(bound)
        return dict(zip(self.program.output_names, values, strict=True))

    def _measure(self, item: Pass) -> dict[str, Any] | None:
        """Measure how far the outputs moved: since the start of the run; for an exact pass, since the pass.

        Raises:
            PassError: If an exact pass has moved the outputs.
        """
        if not self._validates:
            return None
        now, against = self._outputs(), self._previous if item.promise == "exact" else self._start
        found = difference(against, now)
        self._previous = now
        if item.promise == "exact" and not _is_kept(item, found, self.program, now):
            raise PassError(
                item.name,
                "validation",
                f"it promises to be exact, and the outputs moved by {found.max_error:.3g}; this is a defect of the pass, "
                "please report it with the model's configuration",
            )
        return {
            "against": "the outputs before the pass" if item.promise == "exact" else "the outputs before the run",
            "inputs": self._inputs_name,
            "max_error": found.max_error,
            "relative_error": found.relative_error,
            "kl": found.kl,
        }

    def _record(
        self, item: Pass, facts: Mapping[str, Facts], skipped: Mapping[str, str], seconds: float, measured: Any
    ) -> None:
        outcomes = []
        layers = [(layer, site) for site in self.program.sites() for layer in layers_of(self.program, site)]
        for site, whole in layers:
            measured_at = next((name for name in (site.name, whole.name) if name in facts), None)
            done = measured_at is not None
            reason = "" if done else skipped.get(whole.name) or item.reason(whole, self.program) or "not reached"
            outcomes.append(
                SiteOutcome(
                    site=site.name,
                    weight=site.weight,
                    shape=site.shape,
                    action="rewritten" if done else "skipped",
                    reason=reason,
                    facts=dict(facts[measured_at]) if measured_at is not None else {},
                )
            )
        record = PassRecord(
            text=pass_to_text(item),
            promise=item.promise,
            outcomes=tuple(outcomes),
            validation=measured,
            calibration=self.calibration.describe() if item.needs != "nothing" and self.calibration else None,
            seconds=seconds,
        )
        self.program.history = (*self.program.history, record)


def _is_kept(item: Pass, found: Difference, program: Program, outputs: Mapping[str, Tensor]) -> bool:
    """Whether outputs are as an exact pass promises: equal, or equal but for the rounding of weights that it computes anew."""
    if not item.prepares:
        return found.max_error == 0
    bounds = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.5, torch.float16: 0.5}  # 0.5: what only defects break
    types = {tensor.dtype for tensor in outputs.values() if tensor.is_floating_point()}
    # Norms of many models compute in float32, whatever the weights are.
    if any(torch.float32 in (*node.args, *node.kwargs.values()) for node in program.graph_module.graph.nodes):
        types.add(torch.float32)
    return found.relative_error <= max((bounds.get(dtype, math.inf) for dtype in types), default=0.0)


def _rewrite(item: Pass, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
    """Rewrite a group, check what the pass promises of each site, and note whose weight has changed.

    Raises:
        PassError: If the values do not allow the rewrite, or a promise is broken.
    """
    for site in group.sites:
        state = program.sparse.get(site.weight)
        if state is None and item.prepares:
            continue  # it shares its context with no pass that would ask
        if site.weight not in context.originals and (state is None or state.changed_by is None):
            context.originals[site.weight] = program.tensor(site.weight).detach().clone()
    try:
        facts: dict[str, Facts] = {site.name: {} for site in group.sites} | item.rewrite(program, group, context)
    except PassError:
        raise
    except SparsepassError as error:
        raise PassError(item.name, ", ".join(site.name for site in group.sites), str(error)) from error
    for site in group.sites:
        state = program.sparse.get(site.weight)
        missing = [m for m in item.provides if m in _PROVIDED and not m.holds(state, program.quantized.get(site.weight))]
        broken = f"the layer is not {missing[0].name.lower()}" if missing else item.ensures(site, program)
        if broken:
            raise PassError(item.name, site.name, f"it has not done what it promises: {broken}; this is a defect of the pass")
        if state is None or state.mask is None or state.changed_by is not None:
            continue
        if not torch.equal(program.tensor(site.weight), context.originals[site.weight]):
            with_sparse(program, site.weight, changed_by=pass_to_text(item))
    return facts


def _finish(program: Program, names: str) -> None:
    """Check the program against the rules that every program keeps, and compile it.

    Raises:
        PassError: If the passes have broken a rule.
    """
    for where, reason in violations(program, program.graph_module.graph):
        raise PassError(names, where, f"{reason}; this is a defect of the pass")
    finish(program)


def _require_work(item: Pass, chosen: Sequence[Any], skipped: Mapping[str, str]) -> None:
    if chosen:
        return
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:6])
    more = f" and {len(skipped) - 6} more" if len(skipped) > 6 else ""
    raise PassError(item.name, "program", f"no layer can be rewritten ({reasons or 'the model has no linear layers'}{more})")


def _vocabulary(program: Program) -> int | None:
    size = (program.origin.config or {}).get("vocab_size")
    return size if isinstance(size, int) else None
