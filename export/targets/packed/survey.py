"""Which layers of a program are packed, which read one input, and why the others stay dense.

Tensor shape legend: O out features, I in features.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from torch import Tensor, nn

from sparsepass.graph.packed_folder import BranchSettings, is_conv1d, linear_layers, stored_names
from sparsepass.graph.program import Program, masked_weight
from sparsepass.graph.sites import Site
from sparsepass.graph.support import SparsepassError
from sparsepass.passes.maths import NMPattern, num_violations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COLUMNS = 8
"""Codes of so many columns fill a byte."""
_EXPERTS = ("experts", "experts_transposed")


@final
@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """What becomes of one linear layer.

    Attributes:
        layer: Module path.
        name: Its name in the files; the module path if it stays dense.
        shape: Out and in features; the shape of the stored weight for one that is no linear layer.
        transposed: Whether the dense weight is stored [in, out].
        branch: Its SLoRB branch, if it has one.
        pattern: N:M that a pass has given it; empty for none.
        reason: Why it stays dense; empty if it is packed.
    """

    layer: str
    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    branch: BranchSettings | None = None
    pattern: str = ""
    reason: str = ""

    @property
    def weight(self) -> str:
        """Name of its weight in the model."""
        return f"{self.layer}.weight"


def survey(program: Program, model: "PreTrainedModel") -> tuple[LayerChoice, ...]:
    """Decide for every linear layer whether it is packed. Whatever is 2:4 along its input features can be, pruned here or not.

    Args:
        program: Captured from a model of transformers.
        model: The model's skeleton.

    Returns:
        Every linear layer, every stack of experts and every convolution, in the order in which the model runs them, and then
        layers that it did not run when it was captured.
    """
    linear = linear_layers(model)
    names = stored_names(model, linear)
    users = _users(program, model)
    sites = {site.weight: site for site in program.sites() if site.layout != "embedding" and site.shape}
    skipped = program.report().skipped()
    found = []
    for weight, site in sites.items():
        path = weight.removesuffix(".weight")
        state = program.sparse.get(weight)
        is_linear = path in linear and weight == f"{path}.weight" and site.layout in ("linear", "conv1d_hf")
        if is_linear:
            reason = _why_dense(program, site, linear[path], users, skipped)
            if not reason and path not in names:
                reason = "transformers stores it fused with others or turned, where no packed tensor has a place"
        else:
            reason = _why_not_linear(model, site)
        branch = None
        if state is not None and state.branch is not None:
            branch = BranchSettings(k=state.branch.k, projection="trained" if state.branch.projection else "fixed")
        transposed = is_linear and is_conv1d(linear[path])
        found.append(
            LayerChoice(
                layer=path,
                name=names.get(path, path),
                shape=(site.out_features, site.in_features) if is_linear else site.shape,
                transposed=transposed,
                branch=branch,
                pattern="" if state is None else state.pattern,
                reason=reason,
            )
        )
    known = {program.aliases.get(weight, weight) for weight in sites}
    for path, module in linear.items():
        if program.aliases.get(f"{path}.weight", f"{path}.weight") not in known:
            shape = tuple(_matrix(module, module.weight).shape)  # type: ignore[arg-type]
            found.append(LayerChoice(layer=path, name=path, shape=shape, reason="not run when the model was captured"))
    return tuple(found)


def groups(layers: Iterable[LayerChoice], siblings: Iterable[Iterable[str]]) -> tuple[tuple[str, ...], ...]:
    """Names of the packed layers; siblings stand together.

    Args:
        layers: All layers.
        siblings: Weights of layers that read one input, group by group; see `sparsepass.passes.fuse_siblings.siblings`.

    Example:
        >>> q, k, o = (LayerChoice(layer=n, name=n, shape=(8, 8)) for n in ("q", "k", "o"))
        >>> groups([q, k, o], [("q.weight", "k.weight")])
        (('q', 'k'), ('o',))
    """
    group_of = {weight: number for number, group in enumerate(siblings) for weight in group}
    found: dict[object, list[str]] = defaultdict(list)
    for layer in layers:
        if not layer.reason:
            found[group_of.get(layer.weight, layer.layer)].append(layer.name)
    return tuple(map(tuple, found.values()))


def tables(program: Program, model: "PreTrainedModel", packed: Iterable[str], *, is_asked: bool = True) -> dict[str, str]:
    """Module path -> name in the files, of the embedding and the output head that can be kept in int8.

    A head that is tied to the embedding has its weight, and is not named.

    Args:
        program: Captured from a model of transformers.
        model: The model's skeleton.
        packed: Module paths of layers that are packed, and so are no tables.
        is_asked: Whether somebody wants it; otherwise there may be none.

    Raises:
        SparsepassError: If the embedding is no plain one, and somebody wants it.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    if type(embedding) is not nn.Embedding or id(embedding) not in paths:
        if not is_asked:
            return {}
        raise SparsepassError(
            f"embedding=int8: the model's embedding is a {type(embedding).__name__}, which does more than look up; leave it out"
        )
    found: dict[str, nn.Module] = {paths[id(embedding)]: embedding}
    if type(head) is nn.Linear and paths[id(head)] not in {*packed}:
        names = {program.aliases.get(f"{paths[id(m)]}.weight", f"{paths[id(m)]}.weight") for m in (embedding, head)}
        if len(names) == 2 and head.weight is not embedding.weight:
            found[paths[id(head)]] = head
    return stored_names(model, found)


def matrix_of(program: Program, layer: LayerChoice) -> Tensor:
    """The weight of a linear layer as it multiplies, behind its mask: [O, I]."""
    weight = masked_weight(program, layer.weight)
    return weight.t().contiguous() if layer.transposed else weight


def _matrix(module: nn.Module, weight: Tensor) -> Tensor:
    return weight.t() if is_conv1d(module) else weight


def _users(program: Program, model: nn.Module) -> dict[str, set[str]]:
    """Weight in the graph -> all names that it has in the model."""
    users: dict[str, set[str]] = defaultdict(set)
    shared: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = shared.setdefault(id(parameter), name)
        canonical = program.aliases.get(first, program.aliases.get(name, name))
        users[canonical] |= {name, first}
    return users


def _why_dense(
    program: Program, site: Site, module: nn.Module, users: Mapping[str, set[str]], skipped: Mapping[str, str]
) -> str:
    others = sorted((users.get(site.weight, set()) | set(site.ties)) - {site.weight})
    if others:
        return f"tied: {others[0]} uses the same weight"
    if site.in_features % _COLUMNS:
        return f"its {site.in_features} input features are not a multiple of {_COLUMNS}"
    matrix_OI = _matrix(module, masked_weight(program, site.weight))
    if num_violations(matrix_OI, NMPattern(2, 4)):
        state = program.sparse.get(site.weight)
        if state is not None:
            return f"its pattern {state.pattern} is not 2:4 along its input features"
        said = skipped.get(site.name) or skipped.get(site.weight) or "no pass has pruned it"
        return f"not 2:4: {said}"
    return ""


def _why_not_linear(model: nn.Module, site: Site) -> str:
    if site.layout in _EXPERTS:
        return "experts: their weights are one tensor for a kernel of their own, and packed layers stand for linear ones only"
    if site.layout in ("conv1d", "conv2d"):
        return "a convolution: packed layers stand for linear ones only"
    if site.layout == "computed":
        return site.left_alone or "its weight is computed"
    if site.left_alone and site.left_alone.startswith("tied"):
        return site.left_alone
    try:
        kind = type(model.get_submodule(site.weight.rpartition(".")[0])).__name__
    except AttributeError:
        kind = site.module_type or "module of its own"
    return f"it belongs to a {kind}, and packed layers stand for nn.Linear and GPT-2's Conv1D only"
