"""Which layers can be 2:4, and the `ignore` list that leaves the others to themselves."""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sparsepass.export.plan.model import Layer, ModelShape
from sparsepass.export.plan.phases import experts_per_token
from sparsepass.export.plan.roofline import Matmul
from sparsepass.export.plan.runtimes import Dtype, Runtime
from sparsepass.graph import Site
from sparsepass.passes import NMSparsify, parse_pipeline
from sparsepass.passes.base import matches
from sparsepass.passes.maths import NMPattern

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, kw_only=True)
class Ineligible:
    """Why a layer cannot be 2:4.

    Attributes:
        reason: For people.
        by_pass: Whether the passes leave it alone by themselves, so that it needs no pattern.
    """

    reason: str
    by_pass: bool


def refusals(shape: ModelShape, runtime: Runtime, dtype: Dtype) -> dict[str, Ineligible]:
    """Site name -> why it cannot be 2:4, for those that cannot.

    Of a program that is sparse already, every layer that it keeps dense is among them.
    """
    found = {}
    for layer in shape.layers:
        reason, by_pass = _refusal(shape, layer, runtime, dtype)
        if reason is not None:
            found[layer.site.name] = Ineligible(reason=reason, by_pass=by_pass)
    return found


def takes(shape: ModelShape) -> list[Site]:
    """The sites that nm_sparsify rewrites if it is given no targets and nothing to ignore."""
    return NMSparsify().choose(shape.program)[0]


def matmul_of(layer: Layer, refused: Ineligible | None, dtype: Dtype, slorb_k: int, trained: bool) -> Matmul:
    """The roofline's view of a layer: its shape, its type, and the branch that it has or would have.

    What the passes leave alone (output head, router) stays in 16 bits.
    """
    branch = layer.state.branch if layer.state is not None else None
    k, trained = (branch.k, branch.projection is not None) if branch is not None else (slorb_k, trained)
    has_branch = branch is not None or (
        k > 0 and refused is None and layer.site.layout in ("linear", "conv1d_hf") and layer.in_features % k == 0
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
    return ignore_patterns(takes(shape), chosen)


def ignore_patterns(able: Sequence[Site], chosen: Collection[str]) -> tuple[str, ...]:
    """Patterns that leave exactly those of some sites dense that are not chosen.

    One pattern serves for all layers of a stack: a glob where that suffices, a regular expression where the glob would match
    more, and names where only some of the stack are left out.

    Args:
        able: The sites that a pass takes if it is given nothing to ignore.
        chosen: Names of those that it should take.
    """
    leave = {site.name for site in able if site.name not in chosen}
    groups: dict[str, set[str]] = {}
    for site in able:
        if site.name in leave:
            groups.setdefault(_NUMBER.sub("*", site.name), set()).add(site.name)
    patterns: list[str] = []
    for glob, names in groups.items():
        expression = "re:" + re.escape(glob).replace(r"\*", r"\d+")
        for pattern in (glob, expression):
            hit = {site.name for site in able if matches(pattern, site)}
            if names <= hit <= leave:
                patterns.append(pattern)
                break
        else:
            patterns.extend(sorted(names, key=[site.name for site in able].index))
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


def _refusal(shape: ModelShape, layer: Layer, runtime: Runtime, dtype: Dtype) -> tuple[str | None, bool]:
    site = layer.site
    by_pass = site.left_alone or NMSparsify().refusal(site, shape.program)
    if by_pass is not None:
        return by_pass, True
    if shape.program.sparse:
        if layer.state is None:
            return "dense in this program", False
        pattern = NMPattern.parse(layer.state.pattern)
        if not _implies_2_4(pattern):
            return f"its pattern is {pattern}, and hardware runs 2:4 alone", False
    if layer.experts > 1 and not runtime.takes_experts:
        return f"experts: the grouped matmuls of {runtime.name} have no 2:4 kernels", False
    if site.layout in ("conv1d", "conv2d"):
        if not runtime.takes_convolutions:
            return f"a convolution: 2:4 kernels of {runtime.name} take matrices only", False
        if site.groups > 1:
            return f"a convolution in {site.groups} groups: no 2:4 kernel takes it", False
    return runtime.refusal(layer.in_features, site.out_features, dtype), False
