"""The first logits of masks that are to be learned: normal noise, moved towards a mask that is there already.

The axis that N:M runs along comes last here. R stands for all other axes.

Shape suffixes: R rows, C candidates, G groups of a row, M entries of a group, I = G * M.
"""

import torch
from torch import Tensor

from sparsepass.graph.soft_masks import candidate_masks
from sparsepass.graph.support import SparsepassError
from sparsepass.passes.maths.pattern import NMPattern


def first_logits(
    rows: tuple[int, ...], num_groups: int, pattern: NMPattern, *, std: float, seed: int, device: torch.device
) -> Tensor:
    """Logits from ``N(0, std^2)``.

    Shapes: float32 ``[..., C, G]``.

    Args:
        rows: The leading axes.
        num_groups: G.
        pattern: N:M.
        std: Standard deviation.
        seed: The same numbers for the same seed, on every device.
        device: Where they go.

    Source: MaskLLM, arXiv 2409.17481, section 4 (settings).

    >>> first_logits((2,), 3, NMPattern(2, 4), std=0.01, seed=0, device=torch.device("cpu")).shape
    torch.Size([2, 6, 3])
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (*rows, len(candidate_masks(pattern.n, pattern.m)), num_groups)
    return torch.randn(shape, generator=generator).mul_(std).to(device)


def add_prior(logits_RCG: Tensor, mask_RI: Tensor, pattern: NMPattern, alpha: float) -> Tensor:
    """Move logits towards a mask: ``pi_i += std(pi) (M0 . S_i - N^2 / M) alpha``, S_i the candidates.

    ``N^2 / M`` is the mean of ``M0 . S_i`` over the candidates, so the mean of a group's logits stays.

    Shapes: logits ``[..., C, G]``, mask ``[..., G * M]``; the result is like the logits.

    Args:
        logits_RCG: ``pi``; their standard deviation is taken over all of them.
        mask_RI: M0, bool.
        pattern: N:M.
        alpha: How strong the mask is; 0 leaves the logits as they are.

    Returns:
        New logits.

    Raises:
        SparsepassError: If a group of the mask does not keep exactly N.

    Source: MaskLLM, arXiv 2409.17481, section 3 (transfer learning).

    >>> mask = torch.tensor([[True, True, False, False]])
    >>> logits = torch.tensor([-1.0, 1, -1, 1, -1, 1]).view(1, 6, 1)
    >>> moved = add_prior(logits, mask, NMPattern(2, 4), alpha=3.0) - logits
    >>> [round(x, 2) for x in (moved / logits.std()).flatten().tolist()]
    [3.0, 0.0, 0.0, 0.0, 0.0, -3.0]
    """
    mask_RGM = torch.unflatten(mask_RI, -1, (-1, pattern.m))
    if bool((mask_RGM.sum(-1) != pattern.n).any()):
        raise SparsepassError(
            f"a prior for learned {pattern} masks keeps exactly {pattern.n} of every {pattern.m} weights, and a group of this "
            "mask keeps another number; use the mask of a criterion, or alpha=0"
        )
    if not alpha:
        return logits_RCG.clone()
    table_CM = candidate_masks(pattern.n, pattern.m).to(logits_RCG.device, logits_RCG.dtype)
    overlap_RCG = torch.matmul(table_CM, mask_RGM.to(logits_RCG.dtype).transpose(-1, -2))
    return torch.add(logits_RCG, overlap_RCG - pattern.n**2 / pattern.m, alpha=alpha * float(logits_RCG.std()))
