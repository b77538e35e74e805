"""The layers of a model: which can be lowered, which are chosen, and the module that multiplies a semi-structured weight.

1. Only linear layers whose weight is 2:4 are candidates; every other one has its reason.
2. A candidate gets a 2:4 kernel where that was measured to be faster, and stays dense elsewhere.
3. A lowered weight is, bit for bit, the folded weight.
"""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from sparsepass.export.targets.hf import ADAPTER_FOLDER, load_plain, read_adapter
from sparsepass.export.targets.torch.choice import decide
from sparsepass.export.targets.torch.kernels import refusals, semi_structured
from sparsepass.export.targets.torch.record import TO_BE_MEASURED, LayerRecord, Measured, Record
from sparsepass.graph.model import SLoRBLinear, skeleton, slorb_branch
from sparsepass.graph.program import Program
from sparsepass.graph.support import SparsepassError, quiet_loading


@final
class SemiStructuredLinear(nn.Module):
    """A linear layer whose weight is semi-structured: ``y = x W^T + b``, plus the SLoRB branch if the layer has one.

    1. With at least `min_tokens` tokens at once, the 2:4 kernel multiplies.
    2. With fewer, a dense kernel multiplies the same weight, of which a dense copy is then kept.
    3. torch's operator takes inputs that can be viewed as a matrix; others are copied first.

    It is for inference: no gradient goes through a semi-structured weight, and `to(device)` does not know one.

    Shapes: x [..., in] -> [..., out].

    Args:
        weight: The semi-structured weight, [out, in].
        bias: [out], or None.
        dense_weight: The same weight, dense; None if the 2:4 kernel always runs.
        min_tokens: Tokens at once from which the 2:4 kernel is used.
        base: The layer that it replaces, for its SLoRB branch.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        dense_weight: Tensor | None = None,
        min_tokens: int = 0,
        base: nn.Module | None = None,
    ) -> None:
        super().__init__()
        assert (dense_weight is None) == (min_tokens == 0)
        self.out_features, self.in_features = weight.shape
        self.min_tokens = min_tokens
        # Entries of the input below which the 2:4 kernel does not run. One comparison of plain numbers, because a module's
        # overhead counts where a kernel takes microseconds.
        self._fewest = max(min_tokens, 1) * self.in_features
        self.weight = _frozen(weight)
        self.bias = None if bias is None else _frozen(bias)
        self.dense_weight = None if dense_weight is None else _frozen(dense_weight)
        branch, projection = (base.slorb_weight, base.slorb_projection) if isinstance(base, SLoRBLinear) else (None, None)
        self.k = base.k if isinstance(base, SLoRBLinear) else 0
        self.slorb_weight = None if branch is None else _frozen(branch)
        self.slorb_projection = None if projection is None else _frozen(projection)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [..., in] -> [..., out]."""
        if x.numel() < self._fewest:
            y = self._few(x)
        else:
            flat = x.reshape(-1, self.in_features)
            y = nn.functional.linear(flat, self.weight, self.bias).view(*x.shape[:-1], self.out_features)
        if self.k == 0:
            return y
        assert self.slorb_weight is not None
        return y + slorb_branch(x, self.slorb_weight, self.k, self.slorb_projection)

    def _few(self, x: Tensor) -> Tensor:
        if self.dense_weight is None:  # no token at all, which kernels refuse
            return x.new_zeros((*x.shape[:-1], self.out_features))
        return nn.functional.linear(x, self.dense_weight, self.bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        kept = f", dense below {self.min_tokens} tokens" if self.min_tokens else ""
        branch = f", SLoRB k={self.k}" if self.k else ""
        kind = type(self.weight).__name__
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}{kept}{branch}"


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def matrix_of(layer: nn.Module) -> Tensor | None:
    """The weight of a linear layer as it multiplies, [out, in]; None if the layer is of another kind.

    Kinds: nn.Linear itself (not its subclasses, which may do more), `SLoRBLinear`, and GPT-2's Conv1D, which stores [in, out].
    """
    kind = type(layer)
    weight = layer._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        return None
    if isinstance(layer, SLoRBLinear):
        return weight.detach().t() if layer.transposed else weight.detach()
    if kind.__name__ == "Conv1D":
        return weight.detach().t()
    return weight.detach() if kind is nn.Linear else None


def survey(program: Program, dtype: torch.dtype) -> tuple[LayerRecord, ...]:
    """Say of every linear layer whether a 2:4 kernel takes it, by rules of type and shape, and why if not.

    Args:
        program: Captured from a model of transformers. Its values are not read.
        dtype: Type in which it is lowered.
    """
    model = skeleton(program)
    users = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)].append(name)
    skipped = program.report().skipped()
    found = []
    for path, module in model.named_modules():
        matrix_OI = matrix_of(module)
        if matrix_OI is None or not path:  # a model that is one layer has no place to put another one
            continue
        weight = f"{path}.weight"
        shape, state = tuple(matrix_OI.shape), program.sparse.get(program.aliases.get(weight, weight))
        others = [name for name in users[id(module.weight)] if name != weight]
        others += [each for pair in program.aliases.items() if weight in pair for each in pair if each != weight]
        branch = None if state is None else state.branch
        reason = refusals(shape, dtype)
        if state is None:
            reason = f"dense on purpose: {skipped.get(path, 'its weight is not 2:4')}"
        elif others:
            reason = f"tied: {others[0]} uses the same weight, which would have to be kept beside the packed one"
        found.append(
            LayerRecord(
                layer=path,
                shape=shape,
                bias=module.bias is not None,
                sparse=state is not None,
                eligible=not reason,
                state="dense" if reason else "to be measured",
                reason=reason or TO_BE_MEASURED,
                k=0 if branch is None else branch.k,
                projection="" if branch is None else "trainable" if branch.projection else "fixed",
            )
        )
    known = {program.aliases.get(name, name) for name in (f"{layer.layer}.weight" for layer in found)}
    return (*found, *_not_linear(program, model, known))


def choose(layers: tuple[LayerRecord, ...], measured: Measured, *, sparse_only: bool = False) -> tuple[LayerRecord, ...]:
    """Decide for every layer that a 2:4 kernel takes, by measured times. The same times always give the same choice.

    Args:
        layers: What `survey` found, or what was decided before.
        measured: The times. A layer whose shape they lack stays dense.
        sparse_only: See `decide`.
    """
    missing = {name: why for name, why in measured.backends.items() if why}
    decided = []
    for layer in layers:
        if not layer.eligible:
            decided.append(layer)
            continue
        points = measured.points(layer.shape, layer.bias)
        verdict = decide(points, sparse_only=sparse_only)
        if not points:
            size = f"{'x'.join(map(str, layer.shape))} {'with' if layer.bias else 'without'} a bias"
            verdict = replace(verdict, reason=f"no time of {size} was recorded")
        elif missing and not any(point.sparse_ms for point in points):
            said = "; ".join(f"{name}: {why}" for name, why in missing.items())
            verdict = replace(verdict, reason=f"no kernel of that GPU takes it ({said})")
        decided.append(layer.decided(verdict))
    return tuple(decided)


def load_dense(folder: Path, record: Record) -> nn.Module:
    """The model as transformers loads it, with its SLoRB branches beside the layers."""
    with quiet_loading():
        model: nn.Module = load_plain(folder)
    branches = {layer.layer: layer for layer in record.layers if layer.k}
    tensors = read_adapter(folder / ADAPTER_FOLDER) if branches else {}
    for path, layer in branches.items():
        if path not in tensors:
            raise SparsepassError(f"{path} has a SLoRB branch, and {folder / ADAPTER_FOLDER} lacks it; export the model again")
        x_RI, s_OR = tensors[path]
        base = model.get_submodule(path)
        parent, _, name = path.rpartition(".")
        projection = x_RI if layer.projection == "trainable" else None
        branched = SLoRBLinear(base, s_OR, layer.k, projection, transposed=type(base).__name__ == "Conv1D")
        setattr(model.get_submodule(parent), name, branched)
    return model


def apply_record(model: nn.Module, record: Record) -> nn.Module:
    """Put semi-structured weights into the layers that a record names. The model itself is changed, and returned.

    Args:
        model: On the GPU, with folded weights in the record's type.
        record: What was decided.

    Raises:
        SparsepassError: If a layer is not there, or its weight is not 2:4 (any more) or does not come back bit for bit.
    """
    for layer in record.in_state("lowered"):
        parent, _, name = layer.layer.rpartition(".")
        try:
            module = model.get_submodule(layer.layer)
        except AttributeError:
            module = nn.Module()
        matrix_OI = matrix_of(module)
        if matrix_OI is None or tuple(matrix_OI.shape) != layer.shape:
            raise SparsepassError(
                f"the model has no linear layer {layer.layer} of {' x '.join(map(str, layer.shape))}, which its record names; "
                "the folder was changed after it was written: export the model again"
            )
        assert layer.backend is not None
        matrix_OI, bias = matrix_OI.contiguous(), module.bias
        lowered = SemiStructuredLinear(
            semi_structured(f"{layer.layer}.weight", matrix_OI, layer.backend),
            bias if isinstance(bias, Tensor) else None,
            dense_weight=matrix_OI if layer.min_tokens else None,
            min_tokens=layer.min_tokens,
            base=module,
        )
        setattr(model.get_submodule(parent), name, lowered)
    return model.eval().requires_grad_(False)


def _not_linear(program: Program, model: nn.Module, known: set[str]) -> list[LayerRecord]:
    """Sparse weights of a program that no linear layer holds: experts, convolutions and others."""
    found = []
    for weight in program.sparse:
        if weight not in known:
            path = weight.rpartition(".")[0]
            kind = type(model.get_submodule(path)).__name__
            reason = f"layer: {weight} belongs to {kind}, and semi-structured tensors stand for linear layers only"
            shape = tuple(program.tensor(weight).shape)
            found.append(
                LayerRecord(layer=path, shape=shape, bias=False, sparse=True, eligible=False, state="dense", reason=reason)
            )
    return found
