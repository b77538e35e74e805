"""The order of a pipeline, checked before anything runs: what each pass requires and forbids, against what holds by then."""

from collections.abc import Sequence

from sparsepass.graph import PassError, Program, SparsepassError
from sparsepass.graph.records import QuantizedState, SparseState
from sparsepass.passes.base import Pass
from sparsepass.passes.conditions import Condition
from sparsepass.passes.table import parse_pipeline, passes_table

# What a pass does that brings a condition about.
_DONE = {
    Condition.MASKED: "makes masks",
    Condition.MASKED_NOW: "makes masks",
    Condition.FOLDED: "writes zeros there",
    Condition.FOLDED_NOW: "folds them",
    Condition.BRANCHED: "adds branches",
    Condition.BRANCHED_NOW: "adds branches",
    Condition.LEARNED: "makes masks trainable",
    Condition.CHANGED: "changes them",
    Condition.TRAINED_NOW: "trains whole blocks",
    Condition.QUANTIZED: "rounds weights",
}
# What is said of a program in which a condition holds from the start, and what to do then.
_FOUND = {
    Condition.MASKED: "layers have masks already; start from the dense model",
    Condition.FOLDED: "masks have been folded already; start from a program with masks",
    Condition.BRANCHED: "layers have branches already; leave {name} out, or name other layers in targets",
    Condition.LEARNED: "masks are being learned already; leave {name} out, or name other layers in targets",
    Condition.QUANTIZED: "layers are quantized already; start from the program as it was before",
}
_State = tuple[SparseState | None, QuantizedState | None]


def check_pipeline(program: Program, pipeline: Sequence[Pass]) -> None:
    """Check that every pass of a pipeline finds what it requires and nothing that it forbids.

    Raises:
        PassError: If it does not, with what to do.
    """
    sites = program.sites()
    for index, item in enumerate(pipeline):
        # What prepares reaches back to layers that it was not told to rewrite.
        mine = [site.weight for site in sites if item.prepares or item.left_out(site) is None]
        _check(item, pipeline[:index], [(program.sparse.get(weight), program.quantized.get(weight)) for weight in mine])
        _check_blocks(item, pipeline[:index])
        item.check(program, pipeline[:index])


def _check(item: Pass, before: Sequence[Pass], states: Sequence[_State]) -> None:
    makers = {known: earlier for earlier in before for made in earlier.provides for known in made.implied()}
    for condition, why in item.forbids.items():
        if (maker := makers.get(condition)) is not None:
            raise PassError(item.name, "pipeline", f"{why}: {_clash(item, maker, condition)}")
        if (found_in := next((each for each in states if condition.holds(*each)), None)) is not None:
            found = _FOUND.get(condition, "").format(name=item.name) or _change(found_in[0], condition)
            raise PassError(item.name, "program", f"{why}: {found}")
    for condition, why in item.requires.items():
        if condition in makers or any(condition.holds(*each) for each in states):
            continue
        if any(made.holds(*each) for made in item.provides for each in states):
            raise PassError(item.name, "program", f"{why}: this has been done already; leave {item.name} out")
        known = [name for name, kind in passes_table().items() if condition in _provided(kind)]
        told = " or ".join(known) or "a pass that provides it"
        raise PassError(item.name, "pipeline", f"{why.format(makers=told)}; put {told} before it")


def _check_blocks(item: Pass, before: Sequence[Pass]) -> None:
    """A pass over whole blocks compares with the dense model, in one run with whatever prunes it: nothing goes between."""
    if item.block_work is None:
        return
    maker = next((earlier for earlier in before if Condition.MASKED in earlier.provides), None)
    between = [later for later in before[before.index(maker) :] if later.prepares] if maker is not None else []
    if maker is not None and between:
        raise PassError(
            item.name,
            "pipeline",
            f"{between[0].name} stands between {maker.name} and {item.name}, which would then compare with the pruned model; "
            f"put {between[0].name} before {maker.name}, or into a call of its own afterwards",
        )


def _clash(item: Pass, maker: Pass, condition: Condition) -> str:
    if maker.name == item.name:
        return f"{item.name} stands in the pipeline twice; leave one out, or name other layers in targets"
    advice = next((advice for made, advice in maker.provides.items() if condition in made.implied()), "")
    return f"{maker.name} {_DONE[condition]}; {advice or f'put {item.name} before {maker.name}'}"


def _change(state: SparseState | None, condition: Condition) -> str:
    """Say which pass of an earlier run has changed the weights, and what to do."""
    changed_by = None if state is None else state.changed_by
    assert changed_by is not None
    told = f"{changed_by} has changed them in an earlier run; start from the dense model"
    if condition is Condition.CHANGED_BEFORE:
        return f"{told}, with both passes in one call"
    try:
        (maker,) = parse_pipeline(changed_by)
    except SparsepassError:  # retraining, or a pass of another package that is not here
        return told
    return f"{told}, and {maker.provides.get(Condition.CHANGED) or 'leave it out'}"


def _provided(kind: type[Pass]) -> set[Condition]:
    """What a pass with default options brings about."""
    try:
        item = kind()
    except TypeError:  # it has options without a default
        return set()
    return {known for made in item.provides for known in made.implied()}
