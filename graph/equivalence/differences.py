"""How far two sets of named tensors are apart: error norms, and the divergence of distributions.

Tensor shape legend: X any dimensions flattened, N rows (tokens), V vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsepass.graph.support import EquivalenceError

# Elements taken at a time, so that float64 copies of large logits never stand in memory as a whole.
_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """How far one tensor is from its reference.

    Where both hold the same infinity, or both NaN, the difference is zero; where only one does, it is infinite. Nothing is
    known of entries that are NaN or +inf on both sides: that is what an overflow leaves. -inf rules an entry out, so it
    counts as a value, unless nothing in the tensor is finite.

    Attributes:
        name: Flat name of the output, or module path of a layer.
        num_elements: Entries compared.
        max_error: Largest absolute difference.
        mean_error: Mean absolute difference.
        norm_error: Euclidean norm of the difference.
        norm_reference: Euclidean norm of the reference, its infinities and NaN left out.
        kl: Mean over rows of KL(reference || candidate), natural logarithm, softmax over the last axis; None unless the
            tensor holds logits.
        num_nan: Entries that are NaN on both sides: nothing is known of these.
        num_infinite: Entries that are infinite on both sides of which nothing is known either.
    """

    name: str
    num_elements: int
    max_error: float
    mean_error: float
    norm_error: float
    norm_reference: float
    kl: float | None = None
    num_nan: int = 0
    num_infinite: int = 0

    @property
    def relative_error(self) -> float:
        """Norm of the difference over the norm of the reference."""
        return _ratio(self.norm_error, self.norm_reference)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON."""
        counts = {"num_elements": self.num_elements, "num_nan": self.num_nan, "num_infinite": self.num_infinite}
        return figures(self) | counts


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a set of outputs is from a reference.

    Attributes:
        outputs: Name -> the difference of that output, in the reference's order.
    """

    outputs: Mapping[str, TensorDifference]

    @property
    def max_error(self) -> float:
        """Largest absolute difference in any output."""
        return max(found.max_error for found in self.outputs.values())

    @property
    def mean_error(self) -> float:
        """Mean absolute difference over all entries of all outputs."""
        total = sum(found.mean_error * found.num_elements for found in self.outputs.values())
        return total / max(sum(found.num_elements for found in self.outputs.values()), 1)

    @property
    def relative_error(self) -> float:
        """Norm of the difference over the norm of the reference, all outputs taken as one vector."""
        error = sum(found.norm_error**2 for found in self.outputs.values()) ** 0.5
        return _ratio(error, sum(found.norm_reference**2 for found in self.outputs.values()) ** 0.5)

    @property
    def kl(self) -> float | None:
        """Largest divergence of any output that holds logits; None if none does."""
        found = [output.kl for output in self.outputs.values() if output.kl is not None]
        return max(found) if found else None

    @property
    def num_nan(self) -> int:
        """Entries that are NaN on both sides."""
        return sum(found.num_nan for found in self.outputs.values())

    @property
    def unknown(self) -> str:
        """Which entries are not finite on both sides, so that nothing is known of them, in words; empty if none is."""
        infinite = sum(found.num_infinite for found in self.outputs.values())
        kinds = [kind for number, kind in ((self.num_nan, "NaN"), (infinite, "infinite")) if number]
        if not kinds:
            return ""
        return f"{self.num_nan + infinite} values are {' or '.join(kinds)} on both sides, so nothing is known of them"

    @property
    def exact(self) -> bool:
        """Whether the outputs are equal, and something is known of each entry."""
        return self.max_error == 0 and not self.unknown

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON."""
        return figures(self) | {"outputs": {name: found.to_dict() for name, found in self.outputs.items()}}


def figures(found: TensorDifference | Difference) -> dict[str, Any]:
    """The figures that a difference has, of one tensor or of many."""
    return {name: getattr(found, name) for name in ("max_error", "mean_error", "relative_error", "kl")}


def difference(reference: Mapping[str, Tensor], candidate: Mapping[str, Tensor]) -> Difference:
    """Measure how far a candidate's outputs are from a reference's. Dtypes and devices may differ.

    Shapes: each candidate tensor has the shape of the reference's tensor of the same name.

    Args:
        reference: Output name -> tensor.
        candidate: The same names.

    Returns:
        Figures for each output and over all; the divergence for outputs named ``logits`` (or ending in ``.logits``).

    Raises:
        EquivalenceError: If there are no outputs, an output is missing, too many, or of another shape.

    Exactness: computed in float64; a zero ``max_error`` means equal numbers (+0.0 and -0.0 are equal).

    Example:
        >>> found = difference({"logits": torch.tensor([[1.0, 0.0]])}, {"logits": torch.tensor([[1.0, 0.5]])})
        >>> found.max_error, round(found.relative_error, 3), round(found.kl, 4)
        (0.5, 0.5, 0.0263)
    """
    if not reference:
        raise EquivalenceError("the reference has no outputs, so there is nothing to compare; check what it returns")
    if missing := [name for name in reference if name not in candidate]:
        raise EquivalenceError(
            f"the candidate lacks the outputs {missing}: expected {list(reference)}, got {list(candidate)}; compare "
            "what both return, or export the candidate with the same outputs"
        )
    if extra := [name for name in candidate if name not in reference]:
        raise EquivalenceError(
            f"the candidate has outputs that the reference lacks, {extra}: expected {list(reference)}; leave them out, "
            "or let the reference return them too"
        )
    return Difference(outputs={name: tensor_difference(name, t, candidate[name]) for name, t in reference.items()})


def tensor_difference(name: str, reference: Tensor, candidate: Tensor) -> TensorDifference:
    """Measure how far one tensor is from another of the same shape; see `difference`.

    Raises:
        EquivalenceError: If the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise EquivalenceError(
            f"{name} has another shape in the candidate: expected {tuple(reference.shape)}, got "
            f"{tuple(candidate.shape)}; give both the same inputs, and check which axes were fixed when it was "
            "captured or exported"
        )
    largest = total = squares = squares_reference = 0.0
    num_nan = num_above = num_below = num_finite = 0
    for a_X, b_X in _chunks(reference.reshape(-1), candidate.reshape(-1), _CHUNK):
        nan_X = a_X.isnan() & b_X.isnan()
        same_X = nan_X | ((a_X == b_X) & a_X.isinf())
        num_nan += int(nan_X.sum())
        num_above += int((same_X & (a_X == torch.inf)).sum())
        num_below += int((same_X & (a_X == -torch.inf)).sum())
        num_finite += int(a_X.isfinite().sum())
        error_X = torch.where(same_X, 0.0, (a_X - b_X).abs()).nan_to_num_(nan=torch.inf, posinf=torch.inf)
        largest = max(largest, float(error_X.amax()))
        total += float(error_X.sum())
        squares += float(error_X.square().sum())
        squares_reference += float(torch.where(a_X.isfinite(), a_X, 0.0).square().sum())
    count = reference.numel()
    holds_logits = (name == "logits" or name.endswith(".logits")) and reference.dim() > 0 and count > 0
    return TensorDifference(
        name=name,
        num_elements=count,
        max_error=largest,
        mean_error=total / max(count, 1),
        norm_error=squares**0.5,
        norm_reference=squares_reference**0.5,
        kl=kl_divergence(reference, candidate) if holds_logits and reference.is_floating_point() else None,
        num_nan=num_nan,
        num_infinite=num_above + (0 if num_finite else num_below),
    )


def kl_divergence(reference: Tensor, candidate: Tensor) -> float:
    """Mean over rows of KL(softmax(reference) || softmax(candidate)), in nats.

    Shapes: both [..., V].

    Returns:
        A number that is not negative; infinite where only the candidate rules a token out, or where a logit is NaN.

    Exactness: computed in float64, so equal logits give exactly 0.

    Example:
        >>> kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3))
        0.0
    """
    width = reference.shape[-1]
    total, rows = 0.0, 0
    for p_NV, q_NV in _chunks(reference.reshape(-1, width), candidate.reshape(-1, width), max(_CHUNK // width, 1)):
        log_p_NV, log_q_NV = p_NV.log_softmax(-1), q_NV.log_softmax(-1)
        terms_NV = torch.where(log_p_NV == -torch.inf, 0.0, log_p_NV.exp() * (log_p_NV - log_q_NV))
        total += float(terms_NV.sum(-1).clamp_(min=0).nan_to_num_(nan=torch.inf, posinf=torch.inf).sum())
        rows += p_NV.shape[0]
    return total / rows


def _chunks(a: Tensor, b: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for part_a, part_b in zip(torch.split(a.detach(), size), torch.split(b.detach(), size), strict=True):
        if part_a.numel():
            yield part_a.to("cpu", torch.float64), part_b.to("cpu", torch.float64)


def _ratio(error: float, reference: float) -> float:
    if error == 0:
        return 0.0
    return error / reference if reference > 0 else float("inf")
