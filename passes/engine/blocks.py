"""The blocks of a graph: the repeated layers of a model, each a stretch of operations that can be run and trained alone."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import fx

from sparsepass.graph import Program, Site
from sparsepass.graph.nodes import writes_into


@dataclass(frozen=True, kw_only=True)
class SiteGroup:
    """Sites that are rewritten together: those that read the same activation, but for passes with groups of their own.

    Attributes:
        sites: In graph order; a site that is used more than once is alone in its group.
    """

    sites: tuple[Site, ...]


def site_groups(sites: Sequence[Site]) -> list[SiteGroup]:
    """Group sites that read the same activations, in graph order. Expert and convolution weights stand alone."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        alone = site.layout not in ("linear", "conv1d_hf") or len(site.nodes) > 1
        groups.setdefault(site.weight if alone else (site.inputs, site.in_features), []).append(site)
    return [SiteGroup(sites=tuple(found)) for found in groups.values()]


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """A stretch of a flat graph, told by what stands around it, so that nodes inserted by rewrites belong to it.

    Attributes:
        name: Path of its module, such as ``model.layers.0``; for a site that stands in no numbered module, the site's name.
        groups: The groups of sites in it.
        before: The last node in front of it.
        after: The first node behind it.
    """

    name: str
    groups: tuple[SiteGroup, ...]
    before: fx.Node
    after: fx.Node

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of all its groups."""
        return tuple(site for group in self.groups for site in group.sites)

    def nodes(self) -> list[fx.Node]:
        """Its operations as the graph is now, in order."""
        found, node = [], self.before.next
        while node is not self.after:
            found.append(node)
            node = node.next
        return found

    def outputs(self) -> list[fx.Node]:
        """What the rest of the graph reads of it and its sites have a part in, in order."""
        inside = set(self.nodes())
        weights = {site.weight for site in self.sites}
        reached: set[fx.Node] = set()
        constant: set[fx.Node] = set()  # made of parameters alone, such as a transposed weight, wherever it stands
        for node in self.before.graph.nodes:
            if node is self.after:
                break
            sources = node.all_input_nodes
            if node.op == "get_attr" or (node.op == "call_function" and sources and all(each in constant for each in sources)):
                constant.add(node)
            if node.op == "get_attr":
                if node.target in weights:
                    reached.add(node)
            elif (node in inside or node in constant) and any(source in reached for source in sources):
                reached.add(node)
        return [node for node in self.nodes() if node in reached and any(user not in inside for user in node.users)]


def find_blocks(program: Program, groups: Sequence[SiteGroup]) -> tuple[list[Block], dict[str, str]]:
    """Find the block that each group of sites belongs to.

    A block is the outermost module with a number for a name (``model.layers.0``), as in `sparsepass.graph.hierarchy.blocks`.
    A group whose sites stand in several blocks (cross-attention of all decoder layers reads one activation) is divided. A
    site that stands in none is a block of its own.

    Args:
        program: Its graph is not changed.
        groups: From `site_groups`, none rewritten yet.

    Returns:
        The blocks in graph order, and site name -> reason for sites whose block cannot be run alone.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from sparsepass.graph import capture
        >>> program = capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()), torch.randn(2, 8))
        >>> [block.name for block in find_blocks(program, site_groups(program.sites()))[0]]
        ['0', '2']
    """
    nodes = list(program.graph_module.graph.nodes)
    position = {node.name: index for index, node in enumerate(nodes)}
    spans: dict[str, tuple[int, int]] = {}
    for index, node in enumerate(nodes):
        name = _block_name(node)
        if name is not None and node.op not in ("get_attr", "placeholder", "output"):
            spans[name] = (spans.get(name, (index, index))[0], index)
    members: dict[str, list[SiteGroup]] = {}
    refused: dict[str, str] = {}
    for group in groups:
        for name, part in _by_block(group, nodes, position):
            uses = [position[use] for site in part.sites for use in site.nodes]
            first, last = spans.setdefault(name, (min(uses), max(uses)))
            if min(uses) < first or max(uses) > last:
                refused |= {site.name: f"it is used outside its block {name} too" for site in part.sites}
            else:
                members.setdefault(name, []).append(part)
    blocks = []
    reach = -1
    for name in sorted(members, key=lambda name: spans[name]):
        first, last = spans[name]
        block = Block(name=name, groups=tuple(members[name]), before=nodes[first].prev, after=nodes[last].next)
        reason = _refusal(block, overlaps=first <= reach)
        if reason is None:
            blocks.append(block)
            reach = last
        else:
            refused |= {site.name: reason for site in block.sites}
    return blocks, refused


def _by_block(group: SiteGroup, nodes: list[fx.Node], position: dict[str, int]) -> Iterator[tuple[str, SiteGroup]]:
    def name_of(site: Site) -> str:
        return _block_name(nodes[position[site.nodes[0]]]) or group.sites[0].name

    for name, sites in groupby(sorted(group.sites, key=name_of), key=name_of):
        yield name, replace(group, sites=tuple(sites))


def _block_name(node: fx.Node) -> str | None:
    stack = node.meta.get("nn_module_stack") or {}
    path = re.sub(r"@\d+", "", str(list(stack.values())[-1][0])) if stack else ""
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return None if number is None else ".".join(parts[: number + 1])


def _refusal(block: Block, *, overlaps: bool) -> str | None:
    if overlaps:
        return f"the operations of its block {block.name} are mixed with those of another block"
    inside = set(block.nodes())
    for node in block.nodes():
        if any(value not in inside for value in writes_into(node)):
            return f"its block {block.name} writes into its inputs ({node.name}), so it cannot be run again"
    if not block.outputs():
        return f"nothing reads what its block {block.name} computes"
    return None
