"""The student: a rewritten program, cut at its head and given its module tree back, with the loss inside.

The loss is computed inside the module's forward, so that DDP and FSDP2, which wrap the module, see every parameter used.

Tensor shape legend: B batch, T tokens, H hidden features.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsepass.graph import Program, Site, SparsepassError
from sparsepass.graph.attention import drop_causal_masks, share_heads
from sparsepass.graph.cut import cut_head
from sparsepass.graph.hierarchy import Hierarchy, blocks
from sparsepass.graph.support import name_matches
from sparsepass.passes.maths import NMPattern
from sparsepass.retrain.config import RetrainConfig
from sparsepass.retrain.lean import make_lean
from sparsepass.retrain.loss import CHUNK_TOKENS, IGNORED, Distillation, TeacherTargets, distillation_loss, hidden_state_loss
from sparsepass.retrain.masks import put_behind


class Body(nn.Module):
    """A program without its head. Final.

    Shapes: input_ids_BT and attention_mask_BT [B, T] -> hidden states [B, T, H].

    Args:
        hierarchy: The body.
        input_names: Names of the program's inputs: ids, and perhaps a mask.
        longest: The largest T that it takes, if its attention was told that nothing is padding; None for no limit.
    """

    def __init__(self, hierarchy: Hierarchy, input_names: Iterable[str], longest: int | None = None) -> None:
        super().__init__()
        self.hierarchy = hierarchy
        self._takes_mask = "attention_mask" in input_names
        self._longest = longest

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        """Run the body; no mask means all ones."""
        if self._longest is not None and (attention_mask_BT is not None or input_ids_BT.shape[-1] > self._longest):
            raise SparsepassError(
                f"this body was made for sequences of at most {self._longest} tokens without padding; make one without unpadded"
            )
        inputs = {"input_ids": input_ids_BT}
        if self._takes_mask:
            inputs["attention_mask"] = torch.ones_like(input_ids_BT) if attention_mask_BT is None else attention_mask_BT
        hidden_BTH: Tensor = self.hierarchy(**inputs)
        return hidden_BTH


@dataclass(frozen=True, kw_only=True)
class Halves:
    """A causal language model in two, over the program's own parameters.

    Attributes:
        body: Ids to hidden states.
        head: Hidden states to logits.
        blocks: The repeated blocks of the body, in order.
        vocabulary: Logits of a token; None if no linear layer makes them.
    """

    body: Body
    head: nn.Module
    blocks: tuple[nn.Module, ...]
    vocabulary: int | None


def halves(program: Program, unpadded: int | None = None) -> Halves:
    """Cut a causal language model at its head.

    Args:
        program: It is not changed.
        unpadded: If all sequences have this length and none has padding, attention need not look at masks.

    Raises:
        SparsepassError: If it is no causal language model.
    """
    needed = [name for name in program.input_names if name not in ("input_ids", "attention_mask")]
    if "input_ids" not in program.input_names or needed or "logits" not in program.output_names:
        raise SparsepassError(
            f"retraining works on causal language models, which take input_ids and return logits; this program takes "
            f"{', '.join(program.input_names)} and returns {', '.join(program.output_names)}"
        )
    body, head = cut_head(program)
    dropped = drop_causal_masks(body, unpadded) if unpadded else 0
    share_heads(body)
    hierarchy = body.hierarchy()
    assert isinstance(hierarchy, Hierarchy)
    make_lean(hierarchy)
    found = tuple(hierarchy.get_submodule(name) for name in blocks(hierarchy))
    longest = unpadded if dropped else None
    return Halves(body=Body(hierarchy, program.input_names, longest), head=head, blocks=found, vocabulary=_vocabulary(head))


def _vocabulary(head: nn.Module) -> int | None:
    sizes = [
        int(head.get_parameter(str(node.args[1].target)).shape[0])
        for node in (head.graph.nodes if isinstance(head, fx.GraphModule) else ())
        if node.target is torch.ops.aten.linear.default
        if isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr"
    ]
    return sizes[-1] if sizes else None


class Student(nn.Module):
    """A body, a head and the loss between them. Final.

    Args:
        parts: The halves of the program.
        config: Settings of the loss.
    """

    def __init__(self, parts: Halves, config: RetrainConfig) -> None:
        super().__init__()
        self.body, self.head = parts.body, parts.head
        self.vocabulary, self.num_blocks = parts.vocabulary, len(parts.blocks)
        self._config = config
        self._states = States(parts.blocks) if config.hidden_weight else None

    def forward(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor | None,
        targets_BT: Tensor,
        teacher: TeacherTargets | None,
        teacher_states: list[Tensor] | None,
        num_tokens: float,
    ) -> Distillation:
        """Compute the loss of a batch; see `distillation_loss`."""
        config = self._config
        with recording(self._states) as states:
            hidden_BTH = self.body(input_ids_BT, attention_mask_BT)
        found = distillation_loss(
            hidden_BTH,
            self.head,
            targets_BT,
            teacher,
            kd_weight=config.kd_weight if teacher is not None else 0.0,
            temperature=config.temperature,
            num_tokens=num_tokens,
            chunk_tokens=config.chunk_tokens or CHUNK_TOKENS,
        )
        if states and teacher_states is not None:
            error = hidden_state_loss(states, teacher_states, targets_BT != IGNORED, num_tokens=num_tokens)
            found = found._replace(loss=found.loss + config.hidden_weight * error)
        return found


class States:
    """Records what blocks return while it is switched on. Final."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.recorded: list[Tensor] | None = None
        for module in modules:
            module.register_forward_hook(self._take)

    def _take(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.recorded is not None:
            tensors = [output] if isinstance(output, Tensor) else [t for t in output if isinstance(t, Tensor)]
            self.recorded.append(tensors[0])


@contextlib.contextmanager
def recording(states: States | None) -> Iterator[list[Tensor]]:
    """Give the list that states are recorded into while a block runs; what the backward pass computes again is not recorded."""
    found: list[Tensor] = []
    if states is not None:
        states.recorded = found
    try:
        yield found
    finally:
        if states is not None:
            states.recorded = None


class Slots:
    """Where each named tensor of a program lives in the module trees, whatever wraps them later. Final.

    Sharding puts other Parameter objects in the places of the old ones; the places stay.

    Args:
        program: Names and tensors.
        roots: Modules that hold these tensors.
    """

    def __init__(self, program: Program, roots: Iterable[nn.Module]) -> None:
        names = {id(tensor): name for name, tensor in program.tensors().items()}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for root in roots:
            for module in root.modules():
                for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
                    name = names.get(id(tensor))
                    if name is not None:
                        self._places.setdefault(name, (module, attribute))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, name: str) -> Tensor:
        module, attribute = self._places[name]
        tensor = getattr(module, attribute)
        assert isinstance(tensor, Tensor)
        return tensor

    def make_parameter(self, name: str) -> None:
        """Turn a buffer into a parameter that is not trained, so that it is sharded with its module."""
        module, attribute = self._places[name]
        tensor = module._buffers.pop(attribute)
        assert tensor is not None
        module.register_parameter(attribute, nn.Parameter(tensor, requires_grad=False))


def masked_sites(program: Program) -> dict[str, tuple[Site, NMPattern, str]]:
    """Weight name -> site, pattern and mask name, of every weight that has a mask.

    Raises:
        SparsepassError: If the program has none.
    """
    sites = {site.weight: site for site in program.sites()}
    found = {
        weight: (sites[weight], NMPattern.parse(state.pattern), state.mask)
        for weight, state in program.sparse.items()
        if state.mask is not None
    }
    if not found:
        why = "its masks have been folded into the weights" if program.sparse else "it has no sparse layers"
        raise SparsepassError(f"there is nothing to retrain: {why}; apply nm_sparsify (and no fold) first")
    return found


@torch.no_grad()
def set_behind(program: Program, behind: "str | float") -> None:
    """Set what stands behind every mask of a program; see `put_behind`. The program's tensors are changed in place."""
    for weight, (site, pattern, mask) in masked_sites(program).items():
        tensor = program.tensor(weight)
        matrix_OI, mask_OI = site.to_matrix(tensor.detach()), site.to_matrix(program.tensor(mask))
        tensor.copy_(site.from_matrix(put_behind(matrix_OI, mask_OI, behind, pattern)))


def choose_trained(program: Program, frozen: Collection[str], only: Collection[str] | None = None) -> list[str]:
    """Ask for the gradients of all floating-point parameters but the frozen ones.

    Args:
        program: Its parameters are told.
        frozen: Name patterns, see `name_matches`.
        only: If given, all others are frozen too.

    Returns:
        Names of the trained parameters.

    Raises:
        SparsepassError: If a pattern names no parameter, or parameters are not float32.
    """
    parameters: Mapping[str, nn.Parameter] = dict(program.graph_module.named_parameters())
    for pattern in frozen:
        if not any(_named(name, pattern, program) for name in parameters):
            raise SparsepassError(
                f"frozen: no parameter is named {pattern!r}; names look like {next(iter(parameters), '')!r}; "
                "globs and 're:...' work"
            )
    trained = []
    for name, parameter in parameters.items():
        wanted = parameter.is_floating_point() and not any(_named(name, pattern, program) for pattern in frozen)
        wanted = wanted and (only is None or name in only)
        parameter.requires_grad_(wanted)
        if wanted:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise SparsepassError(
                    f"{name} is {parameter.dtype}: training keeps its weights in float32 (updates vanish in less); load the "
                    "model with dtype float32 before the passes. What is computed in is another setting, dtype"
                )
            trained.append(name)
    if not trained:
        raise SparsepassError("frozen leaves no parameter to train")
    return trained


def _named(name: str, pattern: str, program: Program) -> bool:
    names = [name, *(alias for alias, target in program.aliases.items() if target == name)]
    return name_matches(pattern, names)
