"""Which layers can be 2:4, and the `ignore` list that leaves the others to themselves."""

import json
import re
from collections.abc import Collection, Sequence

from sparsepass.export.plan.devices import Dtype, Runtime
from sparsepass.export.plan.model import Layer, ModelShape
from sparsepass.export.plan.phases import experts_per_token
from sparsepass.export.plan.roofline import Matmul
from sparsepass.graph import Site
from sparsepass.passes import NMSparsify, parse_pipeline
from sparsepass.passes.base import matches
from sparsepass.passes.maths import NMPattern

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def in_stack(name: str) -> str:
    """The name that a layer shares with those at its place in other blocks.

    >>> in_stack("model.layers.7.mlp.gate")
    'model.layers.*.mlp.gate'
    """
    return _NUMBER.sub("*", name)


def refusals(shape: ModelShape, runtime: Runtime, dtype: Dtype) -> dict[str, str]:
    """Site name -> why it cannot be 2:4, for those that cannot.

    Of a program that is sparse already, every layer that it keeps dense is among them.
    """
    found = {layer.site.name: _refusal(shape, layer, runtime, dtype) for layer in shape.layers}
    return {name: reason for name, reason in found.items() if reason is not None}


def matmul_of(layer: Layer, is_able: bool, dtype: Dtype, slorb_k: int, trained: bool) -> Matmul:
    """The roofline's view of a layer: its shape, its type, and the branch that it has or would have.

    What the passes leave alone (output head, router) stays in 16 bits.

    Args:
        layer: The layer.
        is_able: Whether it can be 2:4.
        dtype: Planned type of the weights.
        slorb_k: Of the branches that are planned; 0 for none.
        trained: Whether their projection is trainable.
    """
    branch = layer.state.branch if layer.state is not None else None
    k, trained = (branch.k, branch.projection is not None) if branch is not None else (slorb_k, trained)
    has_branch = branch is not None or (
        k > 0 and is_able and layer.site.layout in ("linear", "conv1d_hf") and layer.in_features % k == 0
    )
    return Matmul(
        in_features=layer.in_features,
        out_features=layer.site.out_features,
        num_experts=layer.experts,
        experts_per_token=experts_per_token(layer),
        dtype="bf16" if layer.site.left_alone is not None else dtype,
        branch_k=k if has_branch else 0,
        branch_trained=trained and has_branch,
    )


def ignore_list(shape: ModelShape, chosen: Collection[str]) -> tuple[str, ...]:
    """Patterns that leave exactly those layers dense which the passes would take and the plan does not choose."""
    return ignore_patterns(NMSparsify().choose(shape.program)[0], chosen)


def ignore_patterns(able: Sequence[Site], chosen: Collection[str]) -> tuple[str, ...]:
    """Patterns that leave exactly those of some sites dense that are not chosen.

    One pattern serves for all layers of a stack: a glob where that suffices, a regular expression where the glob would match
    more, and names where only some of the stack are left out.

    Args:
        able: The sites that a pass takes if it is given nothing to ignore.
        chosen: Names of those that it should take.
    """
    leave = {site.name for site in able if site.name not in chosen}
    groups: dict[str, list[str]] = {}
    for site in able:
        if site.name in leave:
            groups.setdefault(in_stack(site.name), []).append(site.name)
    patterns: list[str] = []
    for glob, names in groups.items():
        expression = "re:" + re.escape(glob).replace(r"\*", r"\d+")
        for pattern in (glob, expression):
            hit = {site.name for site in able if matches(pattern, site)}
            if set(names) <= hit <= leave:
                patterns.append(pattern)
                break
        else:
            patterns += names
    return tuple(patterns)


def pipeline_text(ignore: Collection[str], slorb_k: int, projection: str) -> str:
    """The passes as text, ready to paste after ``--passes``.

    >>> pipeline_text(("model.layers.*.mlp.gate",), 16, "fixed")
    'nm_sparsify{ignore=["model.layers.*.mlp.gate"]},slorb{k=16}'
    """
    options = f"{{ignore={json.dumps(list(ignore), separators=(',', ':'))}}}" if ignore else ""
    branch = f",slorb{{k={slorb_k}{',projection=trainable' if projection == 'trainable' else ''}}}" if slorb_k else ""
    return f"nm_sparsify{options}{branch}"


def verify_choice(shape: ModelShape, ignore: Collection[str], chosen: Collection[str]) -> None:
    """Our own invariant: with this list the pass takes exactly the chosen layers."""
    (read,) = parse_pipeline(pipeline_text(ignore, 0, "fixed"))
    taken = {site.name for site in read.choose(shape.program)[0]}
    assert taken == set(chosen), f"the ignore list takes {sorted(taken ^ set(chosen))} wrongly"


def _implies_2_4(pattern: NMPattern) -> bool:
    """Whether weights of that pattern are 2:4 too, as those of 1:2, 1:4 and 2:8 are."""
    if pattern.m % 4 == 0:
        return pattern.n <= 2
    return 4 % pattern.m == 0 and pattern.n * (4 // pattern.m) <= 2


def _refusal(shape: ModelShape, layer: Layer, runtime: Runtime, dtype: Dtype) -> str | None:
    site = layer.site
    by_pass = site.left_alone or NMSparsify().refusal(site, shape.program)
    if by_pass is not None:
        return by_pass
    if shape.program.sparse:
        if layer.state is None:
            return "dense in this program"
        pattern = NMPattern.parse(layer.state.pattern)
        if not _implies_2_4(pattern):
            return f"its pattern is {pattern}, and hardware runs 2:4 alone"
    if layer.experts > 1 and not runtime.takes_experts:
        return f"experts: the grouped matmuls of {runtime.name} have no 2:4 kernels"
    if site.layout in ("conv1d", "conv2d"):
        if not runtime.takes_convolutions:
            return f"a convolution: 2:4 kernels of {runtime.name} take matrices only"
        if site.groups > 1:
            return f"a convolution in {site.groups} groups: no 2:4 kernel takes it"
    return runtime.refusal(layer.in_features, site.out_features, dtype)
