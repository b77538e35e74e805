"""The pass `fuse_siblings`: layers that read one input become one wider layer, and its result is cut."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import fx, nn

from sparsepass.graph import Program, Site
from sparsepass.graph.fusion import fuse
from sparsepass.graph.nodes import linear_behind, memory_sharers, module_path, writes_into
from sparsepass.passes.base import Facts, GroupContext, Pass
from sparsepass.passes.engine import SiteGroup, site_groups

_ALONE = "no other layer that can be fused reads its input"
_LAYOUTS = {
    "experts": "experts: their weights are one tensor for a kernel of their own",
    "experts_transposed": "experts: their weights are one tensor for a kernel of their own",
    "conv1d": "a convolution: only linear layers are fused",
    "conv2d": "a convolution: only linear layers are fused",
    "conv1d_hf": "its weight is stored [in, out]: only layers that store [out, in] are fused",
}


@dataclass(frozen=True, kw_only=True)
class FuseSiblings(Pass):
    """Make one linear layer of those that read the same input, such as q, k and v, or gate and up.

    1. Rewrites linear layers whose input is one and the same node of the graph, whatever they are called, within one block.
       The weights are stacked; masks, folded zeros, masks that are being learned, SLoRB branches and scales with them. One
       split cuts the result.
    2. Fuses those of one kind: of one dtype, all with a bias or none, all trained or all frozen, all dense or all of one N:M
       pattern, with branches of one k or none, rounded to one grid or none. So a layer may be left out while its siblings are
       fused; the reason names the difference.
    3. Leaves alone experts, convolutions, weights that are tied or read twice, branches with a trained projection (each is
       for one layer), and what is changed in place.

    The program remembers which rows were whose: reports and later passes speak of the layers by their names, and
    `split_siblings` of `sparsepass.graph`, ``to_model()`` and the targets that write checkpoints take them apart again.

    Exactness: equal but for rounding, as the wider product may sum in another order: 1e-6 in float32, relative, and within what
    passes of this kind are held to (1e-9 in float64, 1e-5 in float32).
    """

    name = "fuse_siblings"
    promise = "exact"
    needs = "nothing"
    prepares = True

    def refusal(self, site: Site, program: Program) -> str | None:
        """Layers without a sibling of their kind."""
        return _plan(program, self).get(site.weight, _ALONE)

    def rewrite(self, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
        """Fuse the siblings of a group, kind by kind."""
        del context
        found: dict[str, Facts] = {}
        for alike in _kinds(program, group.sites, _Facts.of(program)).values():
            name = fuse(program, alike).name
            found |= {site.name: {"fused_as": name} for site in alike}
        return found


def siblings(program: Program, *, as_modules: bool = False) -> tuple[tuple[str, ...], ...]:
    """Weights of the layers that `fuse_siblings` would fuse, group by group, in the graph's order.

    Args:
        program: Not changed.
        as_modules: Whether the layers stay modules of their own that are computed in one call: then some may have a bias and
            some none, and each a trained projection of its own.
    """
    facts = _Facts.of(program, as_modules=as_modules)
    able = [site for site in program.sites() if site.left_alone is None and _unable(site, program, facts) is None]
    kinds = [kind for group in site_groups(able) for kind in _kinds(program, group.sites, facts).values()]
    return tuple(tuple(site.weight for site in kind) for kind in kinds if len(kind) > 1)


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What is asked of a graph at each layer.

    Attributes:
        reading: Name of a tensor -> the nodes that read it from the program.
        order: Node -> its number.
        written: Nodes whose values are changed in place, and the number of the node that does it.
        as_modules: See `siblings`.
    """

    reading: Mapping[str, list[fx.Node]]
    order: Mapping[fx.Node, int]
    written: tuple[tuple[fx.Node, int], ...]
    as_modules: bool

    @classmethod
    def of(cls, program: Program, *, as_modules: bool = False) -> "_Facts":
        reading: dict[str, list[fx.Node]] = {}
        order = {node: number for number, node in enumerate(program.graph_module.graph.nodes)}
        for node in order:
            if node.op == "get_attr":
                reading.setdefault(str(node.target), []).append(node)
        written = tuple((value, number) for node, number in order.items() for value in writes_into(node))
        return cls(reading=reading, order=order, written=written, as_modules=as_modules)

    def writes(self, node: fx.Node) -> list[int]:
        """Numbers of the nodes that change the memory of a node's value."""
        if not self.written:
            return []
        shared = memory_sharers(node)
        return [number for value, number in self.written if value in shared]


_KNOWN: "WeakKeyDictionary[fx.Graph, tuple[object, Mapping[str, str | None]]]" = WeakKeyDictionary()
"""A pass is asked at each layer, and nothing changes in between."""


def _plan(program: Program, item: Pass) -> Mapping[str, str | None]:
    """Weight -> why it is not fused, or None if it is."""
    graph = program.graph_module.graph
    states = tuple(program.sparse.items()), tuple(program.quantized.items()), tuple(program.fused)
    key = (tuple(node.name for node in graph.nodes), states, item)
    known = _KNOWN.get(graph)
    if known is None or known[0] != key:
        known = _KNOWN[graph] = key, _planned(program, item.left_out)
    return known[1]


def _planned(program: Program, left_out: Callable[[Site], str | None]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    facts, able = _Facts.of(program), []
    for site in program.sites():
        found[site.weight] = reason = _unable(site, program, facts)
        if reason is None:
            found[site.weight] = _ALONE
            able += [site] if left_out(site) is None else []
    for group in site_groups(able):
        kinds = _kinds(program, group.sites, facts)
        for kind, sites in kinds.items():
            for site in sites:
                found[site.weight] = None if len(sites) > 1 else _difference(kind, kinds)
    return found


def _unable(site: Site, program: Program, facts: _Facts) -> str | None:
    """Why a layer cannot be fused with any other."""
    if site.parts:
        return f"it is fused already, of {', '.join(name.removesuffix('.weight') for name in site.parts)}"
    if site.layout != "linear":
        return _LAYOUTS.get(site.layout) or site.left_alone or f"it is no linear layer ({site.layout})"
    if site.ties:
        return f"tied to {', '.join(site.ties)}: one weight would be in two places"
    if len(site.nodes) > 1:
        return f"it is used {len(site.nodes)} times"
    linear = linear_behind(facts.reading[site.weight])
    if linear is None:
        return "something else than one linear layer reads its weight"
    if linear.kwargs or (len(linear.args) > 2 and not _is_own_bias(linear.args[2], site, program, facts)):
        return "its bias is computed, or not its own"
    state = program.sparse.get(site.weight)
    branch = None if state is None else state.branch
    if branch is not None and branch.projection is not None and not facts.as_modules:
        return "the projection of its SLoRB branch is trained, and is for this layer alone"
    if facts.writes(_result(linear, program, site)):
        return "its result is changed in place"
    return None


def _is_own_bias(bias: object, site: Site, program: Program, facts: _Facts) -> bool:
    if not isinstance(bias, fx.Node):
        return bias is None
    name = str(bias.target)
    is_alone = bias.op == "get_attr" and len(bias.users) == 1 and facts.reading[name] == [bias]
    return is_alone and name not in program.aliases.values() and program.tensor(name).shape == (site.out_features,)


def _result(linear: fx.Node, program: Program, site: Site) -> fx.Node:
    """What a layer gives, its branch included."""
    state = program.sparse.get(site.weight)
    return linear if state is None or state.branch is None else next(iter(linear.users))


Kind = tuple[str, ...]
"""What layers have to have in common, in words that complete "this one ..."."""


def _kinds(program: Program, sites: Sequence[Site], facts: _Facts) -> dict[Kind, list[Site]]:
    """Layers that read one input, by what they have to have in common."""
    found: dict[Kind, list[Site]] = {}
    for site in sites:
        found.setdefault(_kind(program, site, facts), []).append(site)
    return found


def _kind(program: Program, site: Site, facts: _Facts) -> Kind:
    linear = linear_behind(facts.reading[site.weight])
    assert linear is not None
    x = linear.args[0]
    assert isinstance(x, fx.Node)
    weight, state = program.tensor(site.weight), program.sparse.get(site.weight)
    pattern = "dense"
    if state is not None:
        how = "folded" if state.mask is None else "behind a mask" if state.learned is None else "behind a mask that is learned"
        pattern = f"{state.pattern} {how}"
    branch = None if state is None else state.branch
    grid = program.quantized.get(site.weight)
    rounded = "" if branch is None or branch.weight not in program.quantized else ", quantized"
    block = _block(linear)
    num_writes = sum(number < facts.order[linear] for number in facts.writes(x))
    return (
        f"stands in {block}" if block else "stands in no block",
        f"is {str(weight.dtype).removeprefix('torch.')}",
        f"is {'a parameter' if isinstance(weight, nn.Parameter) else 'no parameter'}",
        f"has {_bias(program, site, facts)} bias",
        f"is {'trained' if facts.as_modules or weight.requires_grad else 'frozen'}",
        f"is {pattern}",
        f"has {'no SLoRB branch' if branch is None else f'a SLoRB branch with k={branch.k}'}{rounded}",
        f"is {'not quantized' if grid is None else f'quantized ({grid.grid.text})'}",
        f"reads it after {num_writes} changes in place",
    )


def _bias(program: Program, site: Site, facts: _Facts) -> str:
    if facts.as_modules:
        return "a"
    return "no" if site.bias is None else "a" if program.tensor(site.bias).requires_grad else "a frozen"


def _difference(kind: Kind, kinds: Mapping[Kind, Sequence[Site]]) -> str:
    """Why a layer has no sibling of its kind, told by the kind that is nearest."""
    others = [other for other in kinds if other != kind]
    if not others:
        return _ALONE
    nearest = max(others, key=lambda other: sum(mine == theirs for mine, theirs in zip(kind, other, strict=True)))
    mine, theirs = next((mine, theirs) for mine, theirs in zip(kind, nearest, strict=True) if mine != theirs)
    names = ", ".join(site.name for site in kinds[nearest])
    return f"{names} read{'s' if len(kinds[nearest]) == 1 else ''} the same input, but this layer {mine}: that one {theirs}"


def _block(linear: fx.Node) -> str:
    """The outermost module with a number for a name that a layer is in; empty for none."""
    path = re.sub(r"@\d+", "", module_path(linear)).rpartition(".")[0]
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])
