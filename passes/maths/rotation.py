"""Orthogonal matrices that concentrate what layers' weights count, so that dropping the rest costs less.

Shape suffixes: O out, I in, C channels of a rotation, N times that they lie in a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class TurnedLayer:
    """A layer, or several that read one input, whose inputs or outputs are rotated.

    Attributes:
        weight_OI: The weight before any rotation, float32.
        metric_II: What a change of inputs costs: salience is w^2 divided by its diagonal, or multiplied. Where no input is
            rotated, the diagonal alone, [I].
        divides: Whether salience is divided by it, as with the inverse Hessian of SparseGPT.
        reads: Number of a rotation -> where the channels lie along I, [C, N].
        makes: The same along O.
    """

    weight_OI: Tensor  # noqa: N815
    metric_II: Tensor  # noqa: N815
    divides: bool
    reads: Mapping[int, Tensor]
    makes: Mapping[int, Tensor]

    @property
    def rotations(self) -> frozenset[int]:
        """Numbers of the rotations that it meets."""
        return frozenset((*self.reads, *self.makes))


def rotation_from(free_CC: Tensor, *, keeps_mean: bool = False) -> Tensor:
    """The orthogonal matrix that a free matrix stands for: Q of its QR decomposition; the identity stands for the identity.

    Shapes: ``[C, C]``; one less than the result's where the mean is kept.

    Args:
        free_CC: Any matrix of full rank.
        keeps_mean: Whether the result is to leave the vector of ones as it is.

    Source: arXiv 2505.23049.

    Example:
        >>> rotation_from(torch.tensor([[2.0, 0.0], [0.0, 3.0]])).abs()
        tensor([[1., 0.],
                [0., 1.]])
    """
    basis_CC: Tensor
    basis_CC, upper_CC = torch.linalg.qr(free_CC)
    signs_C = torch.where(upper_CC.diagonal() < 0, -1.0, 1.0).to(basis_CC)
    basis_CC = basis_CC * signs_C
    if not keeps_mean:
        return basis_CC
    size = len(basis_CC) + 1
    # A reflection takes the vector of ones to the first axis and back; the others turn meanwhile.
    axis_C = torch.full((size,), size**-0.5, dtype=basis_CC.dtype, device=basis_CC.device)
    axis_C[0] -= 1
    axis_C = axis_C / axis_C.norm().clamp_min(_TINY)
    whole_CC = torch.nn.functional.pad(basis_CC, (1, 0, 1, 0))
    whole_CC = whole_CC + torch.nn.functional.pad(torch.ones_like(whole_CC[:1, :1]), (0, size - 1, 0, size - 1))
    half_CC: Tensor = whole_CC - 2 * axis_C.outer(axis_C @ whole_CC)
    turned_CC: Tensor = half_CC - 2 * (half_CC @ axis_C).outer(axis_C)
    return turned_CC


def salience_entropy(layer: TurnedLayer, rotations: Mapping[int, Tensor]) -> Tensor:
    """How evenly what a layer's weights count is spread, once rotated: the mean entropy of rows, and of columns.

    Rows count where the input is rotated, columns where the output is, both where both are.

    Args:
        layer: The layer.
        rotations: Number -> orthogonal matrix, [C, C].

    Returns:
        A number, in nats.

    Source: DenoiseRotator, arXiv 2505.23049; methods.md section 7.
    """
    weight_OI, metric_I = layer.weight_OI, layer.metric_II
    if layer.reads:
        whole_II = _whole(layer.reads, rotations, weight_OI.shape[1], weight_OI)
        weight_OI = weight_OI @ whole_II.T
        metric_I = ((whole_II @ layer.metric_II) * whole_II).sum(1)
    for number, places_CN in layer.makes.items():
        for rows_C in places_CN.unbind(1):
            weight_OI = weight_OI.index_copy(0, rows_C, rotations[number] @ weight_OI[rows_C])
    salience_OI = weight_OI.square() / metric_I if layer.divides else weight_OI.square() * metric_I
    terms = [_entropy(salience_OI, 1)] if layer.reads else []
    if layer.makes:
        rows = torch.cat([places_CN.flatten() for places_CN in layer.makes.values()])
        terms.append(_entropy(salience_OI[rows], 0))
    return torch.stack(terms).sum()


def learn_rotations(
    sizes: Mapping[int, tuple[int, bool]],
    layers: Sequence[TurnedLayer],
    *,
    steps: int,
    lr: float,
    layers_per_step: int,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[int, Tensor]:
    """Learn rotations that lower the entropy of layers' salience, with Adam from the identity.

    Args:
        sizes: Number of a rotation -> its channels, and whether it keeps their mean.
        layers: The layers that count.
        steps: Of Adam.
        lr: Its learning rate.
        layers_per_step: Layers that a step looks at, drawn anew each time.
        seed: Of the draws.
        advance: Called after each step.

    Returns:
        Number -> rotation in float64, [C, C]; identities, where the mean entropy of the layers has not fallen.
    """
    device = layers[0].weight_OI.device
    free = {n: torch.eye(size - keeps, device=device).requires_grad_() for n, (size, keeps) in sizes.items()}
    optimizer = torch.optim.Adam(free.values(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        drawn = torch.randperm(len(layers), generator=generator)[:layers_per_step].tolist()
        chosen = [layers[index] for index in drawn]
        met = sorted(frozenset().union(*(layer.rotations for layer in chosen)))
        rotations = {n: rotation_from(free[n], keeps_mean=sizes[n][1]) for n in met}
        loss = torch.stack([salience_entropy(layer, rotations) for layer in chosen]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        advance()
    start = {n: torch.eye(size, dtype=torch.float64, device=device) for n, (size, _) in sizes.items()}
    found = {n: rotation_from(its.detach().double(), keeps_mean=sizes[n][1]) for n, its in free.items()}
    return found if sum(entropies(layers, found)) < sum(entropies(layers, start)) else start


@torch.no_grad()
def entropies(layers: Sequence[TurnedLayer], rotations: Mapping[int, Tensor]) -> list[float]:
    """`salience_entropy` of each of these layers, with rotations of any float type."""
    found = []
    for layer in layers:
        known = {number: rotations[number].to(layer.weight_OI) for number in layer.rotations}
        found.append(float(salience_entropy(layer, known)))
    return found


def _whole(parts: Mapping[int, Tensor], rotations: Mapping[int, Tensor], size: int, like: Tensor) -> Tensor:
    """The matrix that rotates all inputs of a layer, of those of its parts."""
    if len(parts) == 1:
        ((number, places_CN),) = parts.items()
        if places_CN.shape == (size, 1) and bool((places_CN[:, 0] == torch.arange(size, device=places_CN.device)).all()):
            return rotations[number]
    whole_II = torch.eye(size, dtype=like.dtype, device=like.device)
    for number, places_CN in parts.items():
        for inputs_C in places_CN.unbind(1):
            whole_II = whole_II.index_put((inputs_C[:, None], inputs_C[None, :]), rotations[number])
    return whole_II


def _entropy(salience: Tensor, axis: int) -> Tensor:
    shares = salience / salience.sum(axis, keepdim=True).clamp_min(_TINY)
    return -(shares * (shares + _TINY).log()).sum(axis).mean()
