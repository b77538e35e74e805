"""The teacher in a run: a dense model made cheap to ask, or whatever else gives targets."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sparsepass.graph import Program, SparsepassError, capture
from sparsepass.retrain.config import RetrainConfig
from sparsepass.retrain.data import Batch
from sparsepass.retrain.loss import TeacherTargets
from sparsepass.retrain.run import shard
from sparsepass.retrain.student import Halves, States, Student, halves, recording
from sparsepass.retrain.teacher.contract import OnlineTeacher, Teacher


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
        """What there is for sequences other than those of the training: a cache knows nothing of them."""
        return self if isinstance(self.teacher, OnlineTeacher) else replace(self, teacher=None)

    def look(self, batch: Batch) -> tuple[TeacherTargets | None, list[Tensor] | None]:
        """What the teacher says about a batch."""
        if self.teacher is None:
            return None, None
        with recording(self.states) as states:
            targets = self.teacher.targets(batch.input_ids, batch.attention_mask, torch.tensor(batch.indices))
        return targets, states or None


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
    """Store the weights of linear layers in bfloat16; one that is looked up as well keeps its precision there."""
    low: dict[int, nn.Parameter] = {}
    looked_up = {site.weight for site in teacher.sites() if not site.can_be_named}
    for site in teacher.sites():
        if site.layout in ("linear", "conv1d_hf") and site.weight:
            tensor = teacher.tensor(site.weight)
            if tensor.dtype == torch.float32:
                low[id(tensor)] = nn.Parameter(tensor.detach().to(torch.bfloat16), requires_grad=False)
    keep = {id(teacher.tensor(name)) for name in looked_up if name}
    for root, spared in ((parts.body, keep), (parts.head, set())):
        for module in root.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and id(parameter) in low and id(parameter) not in spared:
                    module._parameters[name] = low[id(parameter)]
