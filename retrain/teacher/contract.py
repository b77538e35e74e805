"""What stands for the teacher while a student is trained: a model in memory, or its top-k logits on disk.

Tensor shape legend: B batch, T tokens, N rows, H the teacher's hidden features, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from hashlib import blake2b
from typing import final

import torch
from torch import Tensor, nn

from sparsepass.graph.support import SparsepassError
from sparsepass.retrain.loss import FullDistribution, TeacherTargets

# Elements of each weight that its fingerprint looks at.
_SAMPLES = 1 << 16


def fingerprint(parameters: Iterable[Tensor]) -> str:
    """A hash of weights: shapes, dtypes, and up to 65536 elements of each, evenly spaced. It does not depend on names.

    >>> fingerprint([torch.zeros(3)]) == fingerprint([torch.ones(3)])
    False
    """
    found = set()
    for parameter in parameters:
        flat_X = parameter.detach().reshape(-1)
        sample_X = flat_X[:: max(flat_X.numel() // _SAMPLES, 1)].contiguous().cpu()
        kind = f"{tuple(parameter.shape)} {parameter.dtype} ".encode()
        found.add(kind + blake2b(sample_X.view(torch.uint8).numpy().tobytes()).digest())
    return blake2b(b"".join(sorted(found)), digest_size=16).hexdigest()


class Teacher(ABC):
    """Gives targets for batches."""

    @abstractmethod
    def targets(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None, sequence_indices_B: Tensor | None = None
    ) -> TeacherTargets:
        """What the teacher says about a batch.

        Args:
            input_ids_BT: Tokens.
            attention_mask_BT: 0 at padding; None if there is none.
            sequence_indices_B: The global number of each sequence in the data; a cached teacher goes by it.
        """


@final
class OnlineTeacher(Teacher):
    """A model in memory, cut in two. Nothing of it is trained: it runs without gradients.

    Its hidden size is its own; its vocabulary must be the student's. Under autocast it is faster with weights that already have
    the dtype of autocast (weights that ask for no gradient are cast at every call).

    Args:
        body: ``(input_ids, attention_mask) -> [B, T, H]``; a mask of None means that there is no padding.
        head: ``[1, N, H] -> [1, N, V]``. If weights are sharded, they must be whole when the loss asks for logits: processes
            may differ in how many chunks they ask for.

    Example:
        >>> class Body(nn.Embedding):
        ...     def forward(self, input_ids, attention_mask):
        ...         return super().forward(input_ids)
        >>> teacher = OnlineTeacher(Body(10, 4), nn.Linear(4, 10))
        >>> targets = teacher.targets(torch.tensor([[1, 2, 3]]))
        >>> targets.rows(torch.tensor([0, 1])).check(2, 10, temperature=1.0)
    """

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        self._body, self._head = body, head

    @torch.no_grad()
    def targets(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None, sequence_indices_B: Tensor | None = None
    ) -> "OnlineTargets":
        """See `Teacher.targets`; keeps the hidden states."""
        hidden_BTH = self._body(input_ids_BT, attention_mask_BT)
        if hidden_BTH.shape[:-1] != input_ids_BT.shape:
            raise SparsepassError(
                f"the teacher's body gives {tuple(hidden_BTH.shape)} for tokens {tuple(input_ids_BT.shape)}; expected [B, T, H]"
            )
        return OnlineTargets(hidden_BTH.reshape(-1, hidden_BTH.shape[-1]), self._head)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((p.device for module in (self._head, self._body) for p in module.parameters()), torch.device("cpu"))

    def fingerprint(self) -> str:
        """A hash of the weights: shapes, dtypes, and up to 65536 elements of each, evenly spaced.

        It tells models apart, and one model from its fine-tuned or differently rounded copy. It does not depend on names.
        """
        return fingerprint((*self._body.parameters(), *self._head.parameters()))


@final
class OnlineTargets(TeacherTargets):
    """Hidden states of a teacher, and its head to make logits of them when they are asked for.

    Args:
        hidden_XH: Hidden states of the flattened batch, [B * T, H].
        head: ``[1, N, H] -> [1, N, V]``.
    """

    def __init__(self, hidden_XH: Tensor, head: nn.Module) -> None:
        self._hidden_XH, self._head = hidden_XH, head

    def rows(self, rows_N: Tensor) -> FullDistribution:
        """See `TeacherTargets.rows`."""
        return FullDistribution(self.logits(rows_N))

    @torch.no_grad()
    def logits(self, rows_N: Tensor) -> Tensor:
        """The teacher's logits at some positions of the flattened batch, [N, V]."""
        logits_1NV: Tensor = self._head(self._hidden_XH[rows_N].unsqueeze(0))
        return logits_1NV.squeeze(0)
