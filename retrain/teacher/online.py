"""What stands for the teacher while a student is trained, and a dense model in memory that is cheap to ask.

Tensor shape legend: B batch, T tokens, N rows, H the teacher's hidden features, V vocabulary, X any shape.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sparsepass.graph import Program, SparsepassError, capture
from sparsepass.passes.table import passes_table
from sparsepass.retrain.config import RetrainConfig
from sparsepass.retrain.data import Batch
from sparsepass.retrain.loss import FullDistribution, TeacherTargets
from sparsepass.retrain.run import shard
from sparsepass.retrain.student import Halves, States, Student, halves, recording

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


@dataclass(frozen=True, kw_only=True)
class OnlineParts:
    """A teacher, and the hidden states of its blocks where the loss wants them.

    Attributes:
        teacher: Gives targets; None trains on the text alone.
        states: Records the blocks' outputs; None without a hidden-state loss.
        about: What it is, for the report.
        parts: The model's halves, where it is in memory.
    """

    teacher: Teacher | None
    states: States | None
    about: Mapping[str, Any]
    parts: Halves | None = None

    def check(self, student: Student) -> None:
        """Make sure that the teacher can teach a student.

        Raises:
            SparsepassError: If it has another vocabulary; with a hidden-state loss, if it has another number of blocks.
        """
        if self.parts is None:
            return
        if self.parts.vocabulary != student.vocabulary and self.parts.vocabulary and student.vocabulary:
            raise SparsepassError(
                f"the teacher knows {self.parts.vocabulary} tokens and the program {student.vocabulary}; distillation compares "
                "them token by token, so give a teacher with the same tokenizer"
            )
        if self.states is not None and len(self.parts.blocks) != student.num_blocks:
            raise SparsepassError(
                f"hidden_weight compares block by block, and the program has {student.num_blocks} blocks, the teacher "
                f"{len(self.parts.blocks)}; give a teacher of the same depth, or set hidden_weight: 0"
            )

    def without_cache(self) -> "OnlineParts":
        """The same, without a cached teacher: for sequences outside of the training, which a cache does not hold."""
        return self if isinstance(self.teacher, OnlineTeacher) else replace(self, teacher=None)

    def look(self, batch: Batch) -> tuple[TeacherTargets | None, list[Tensor] | None]:
        """What the teacher says about a batch."""
        if self.teacher is None:
            return None, None
        with recording(self.states) as states:
            targets = self.teacher.targets(batch.input_ids, batch.attention_mask, torch.tensor(batch.indices))
        return targets, states or None


def check_hidden(program: Program, teacher: nn.Module | Teacher | None, config: RetrainConfig) -> None:
    """Make sure that hidden states of a program can be compared with the teacher's, if they are to be.

    Raises:
        SparsepassError: If passes have changed what the channels between blocks are, and the teacher's are others.
    """
    mine, theirs = (_changes(model) for model in (program, teacher))
    if config.hidden_weight and mine != theirs:
        raise SparsepassError(
            f"hidden_weight compares channels of hidden states, and {', '.join(mine or theirs)} has changed what they are; "
            "give a teacher after the same passes (apply_passes on the dense model), or set hidden_weight: 0"
        )


def _changes(model: nn.Module | Teacher | None) -> list[str]:
    """The passes of a program that leave its hidden states not comparable with those before."""
    known = passes_table()
    texts = [record.text for record in model.history] if isinstance(model, Program) else []
    named = [(known.get(text.partition("{")[0]), text) for text in texts]
    return [text for kind, text in named if kind is not None and not kind.keeps_hidden_states]


def online_teacher(
    teacher: nn.Module | Teacher | None, config: RetrainConfig, accelerator: Accelerator, *, unpadded: int | None = None
) -> OnlineParts:
    """Make a teacher ready to be asked in training.

    A model is captured and cut like the student. Under autocast the weights of its matmuls are stored in bfloat16, which is
    what autocast would make of them at every call.

    Args:
        teacher: A dense model, its program, anything else that gives targets, or None.
        config: The settings.
        accelerator: Process and device.
        unpadded: The length of all sequences, if none has padding.

    Raises:
        SparsepassError: If the settings need what the teacher does not give.
    """
    if teacher is None:
        if config.kd_weight or config.hidden_weight:
            raise SparsepassError("there is no teacher; give the dense model, or set kd_weight: 0 to train on the text alone")
        return OnlineParts(teacher=None, states=None, about={"kind": "none"})
    if isinstance(teacher, Teacher):
        if config.hidden_weight:
            raise SparsepassError("hidden_weight needs a teacher in memory: a cache holds its logits only")
        return OnlineParts(teacher=teacher, states=None, about={"kind": type(teacher).__name__})
    here = all(tensor.device == accelerator.device for tensor in [*teacher.parameters(), *teacher.buffers()])
    if not isinstance(teacher, Program):
        # On the right device it is only read: the teacher in training shares the model's tensors.
        teacher = capture(teacher, inplace=here)
    elif not here:
        teacher = copy.deepcopy(teacher)
    if teacher.sparse:
        raise SparsepassError("the teacher has sparse layers; give the dense model that the program was made from")
    if not here:
        teacher.to(accelerator.device)
    parts = halves(teacher, unpadded)
    if config.dtype == "bfloat16":
        _store_low(teacher, parts)
    states = States(parts.blocks) if config.hidden_weight else None
    online = OnlineTeacher(parts.body, parts.head)
    about = {"kind": "model", "class": teacher.origin.model_class, "dtype": config.dtype, "fingerprint": online.fingerprint()}
    if config.parallel == "fsdp" and accelerator.num_processes > 1:
        shard(parts.body, parts.blocks, {}, accelerator.device, whole=True)
    return OnlineParts(teacher=online, states=states, about=about, parts=parts)


def _store_low(teacher: Program, parts: Halves) -> None:
    """Store the weights of linear layers in bfloat16. A weight that an embedding reads too keeps its precision there."""
    low: dict[int, nn.Parameter] = {}
    for site in teacher.sites():
        if site.layout in ("linear", "conv1d_hf") and site.weight:
            tensor = teacher.tensor(site.weight)
            if tensor.dtype == torch.float32:
                low[id(tensor)] = nn.Parameter(tensor.detach().to(torch.bfloat16), requires_grad=False)
    keep = {id(teacher.tensor(site.weight)) for site in teacher.sites() if site.weight and not site.can_be_named}
    for root, spared in ((parts.body, keep), (parts.head, set())):
        for module in root.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and id(parameter) in low and id(parameter) not in spared:
                    module._parameters[name] = low[id(parameter)]
