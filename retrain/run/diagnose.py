"""When a loss is not finite: where it began, and what to change."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsepass.graph import SparsepassError
from sparsepass.retrain.config import RetrainConfig

GO_ON = "and start anew in another folder, from an earlier checkpoint if one is good (--from-checkpoint)"
"""What to do with other settings, which an interrupted run does not take."""


class NonFiniteLossError(SparsepassError):
    """The loss or a gradient became NaN or infinite; the message says at which step, in which layer, and what to change."""

    @classmethod
    def at(
        cls,
        step: int,
        loss: float,
        grad_norm: float,
        where: str | None,
        trained: Mapping[str, nn.Parameter],
        config: RetrainConfig,
    ) -> Self:
        """Make the error for a step.

        Args:
            step: Counted from 1.
            loss: Of the step.
            grad_norm: Norm of all gradients.
            where: The first module whose output is not finite, if one is known.
            trained: Trained parameters, to name one whose gradient is not finite.
            config: The run's.
        """
        weights = next((name for name, p in trained.items() if not bool(_finite(p))), None)
        gradients = next((name for name, p in trained.items() if p.grad is not None and not bool(_finite(p.grad))), None)
        place = f"first in the output of {where}" if where else f"first in the gradient of {gradients or 'an unknown weight'}"
        if weights is not None:
            place += f"; the weight {weights} is not finite itself"
        clip = "" if config.clip_grad_norm else ", set clip_grad_norm: 1.0"
        what = f"the loss is {loss:.4g}" if not math.isfinite(loss) else f"the norm of the gradients is {grad_norm:.4g}"
        return cls(
            f"step {step}: {what}, {place}. The step was not taken, and earlier checkpoints are intact. Lower lr (it is "
            f"{config.lr:g}) or make warmup longer{clip}, {GO_ON}; at the first step, check the model and the data, "
            "and try dtype: float32"
        )


@torch.no_grad()
def first_not_finite(module: nn.Module, run: Callable[[], Any]) -> str | None:
    """Run a forward pass and name the first module whose output holds NaN or infinity.

    Args:
        module: Its submodules are watched.
        run: Runs it.

    Returns:
        The module's path in the model; None if every output is finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> _ = nn.init.constant_(net[0].weight, float("inf"))
        >>> first_not_finite(net, lambda: net(torch.ones(1, 2)))
        '0'
    """
    found: list[str] = []
    handles = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(watched: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [output] if isinstance(output, Tensor) else [t for t in output or () if isinstance(t, Tensor)]
            if not found and any(t.is_floating_point() and not bool(_finite(t)) for t in tensors):
                found.append(name)

        return look

    for name, child in module.named_modules():
        if name:
            handles.append(child.register_forward_hook(watch(name.removeprefix("body.hierarchy.tree."))))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _finite(tensor: Tensor) -> Tensor:
    return tensor.detach().isfinite().all()
