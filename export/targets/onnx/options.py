"""What can be asked of the target `onnx`, checked before anything is lowered."""

from dataclasses import dataclass
from typing import Final, final

import onnx
import torch

from sparsepass.export.targets.onnx.forms import Form, check_form
from sparsepass.graph.load import parse_dtype
from sparsepass.graph.program import Program
from sparsepass.graph.records import SparseState
from sparsepass.graph.rounding import RoundingGrid
from sparsepass.graph.support import SparsepassError, closest

DEFAULT_OPSET, _LOWEST_OPSET, _HIGHEST_OPSET = 20, 18, 23
_FLOAT8_OPSET: Final = 19
INTEGERS_OPSET: Final = 21
"""The first operator set with integers of 4 bits and with scales for blocks."""

BLOCKS: Final = (16, 32, 64, 128, 256)
"""Weights that share a scale in onnxruntime's MatMulNBits."""
_WITH_PAST = "-with-past"
_GENERATIVE_TASKS = ("text-generation", "text2text-generation", "automatic-speech-recognition")
_PLAIN_TASKS = (
    "forward", "text-generation-no-past", "feature-extraction", "fill-mask", "text-classification", "token-classification",
    "question-answering", "image-classification", "image-text-to-text", "zero-shot-image-classification",
    "audio-classification",
)  # fmt: skip
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@final
@dataclass(frozen=True, kw_only=True)
class Integers:
    """How the weights of a quantized program are written.

    Attributes:
        form: See `lower_onnx`.
        opset: Operator set of the file.
        fold_slorb: Whether SLoRB branches go into zero points.
    """

    form: Form
    opset: int
    fold_slorb: bool


def check_options(
    dtype: "str | torch.dtype | None", opset: int | None, task: str | None, form: str = "qdq", fold_slorb: bool = False
) -> None:
    """Make sure that options can be used, before there is a program.

    Raises:
        SparsepassError: If the type, the operator set, the task or the form is none of those that can be written.
    """
    check_opset(opset)
    check_task(task)
    if dtype is not None:
        check_dtype(parse_dtype(dtype))
    check_form(form, fold_slorb)


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a type of weights that is not written."""
    if dtype not in _DTYPES:
        raise SparsepassError(f"dtype {dtype} is not supported by the onnx target; use float32, float16 or bfloat16")


def check_task(task: str | None) -> None:
    """Refuse a task that is not known."""
    known = (*_GENERATIVE_TASKS, *(f"{name}{_WITH_PAST}" for name in _GENERATIVE_TASKS), *_PLAIN_TASKS)
    if task is not None and task not in known:
        near = closest(task, known)
        hint = f"; did you mean {near}?" if near else ""
        raise SparsepassError(f"task {task!r} is not known to the onnx target, which has {', '.join(known)}{hint}")


def check_opset(opset: int | None) -> int:
    """The operator set that is written; refuses one that is not."""
    if opset is None:
        return DEFAULT_OPSET
    highest = min(_HIGHEST_OPSET, onnx.defs.onnx_opset_version())
    if not _LOWEST_OPSET <= opset <= highest:
        raise SparsepassError(
            f"opset {opset} is not supported: torch.onnx writes {_LOWEST_OPSET} to {highest}; leave opset=... out for "
            f"{DEFAULT_OPSET}, which TensorRT and onnxruntime both read"
        )
    return opset


def wants_past(program: Program, task: str | None, with_past: bool | None) -> bool | None:
    """True: with a cache or an error; None: with a cache if it can be; False: one plain graph."""
    check_task(task)
    if task in _PLAIN_TASKS:
        if with_past:
            raise SparsepassError(f"task {task} makes a plain graph, and with_past=True asks for a cache; drop one of them")
        return False
    if task is not None and task.endswith(_WITH_PAST):
        if with_past is False:
            raise SparsepassError(f"task {task} asks for a cache, and with_past=False for none; drop one of them")
        with_past = True
    if with_past is False:
        return False
    if program.origin.generation_config is None:
        if with_past:
            raise SparsepassError(
                f"{program.origin.model_class or 'this module'} does not generate, so it has no cache to export; leave "
                "with_past and the task out"
            )
        return False
    return with_past


def integers_wanted(program: Program, form: Form, opset: int | None, fold_slorb: bool, dtype: torch.dtype) -> Integers:
    """How the quantized weights of a program are written: the operator set is raised to what they need if none was given.

    Args:
        program: Not changed.
        form: As asked for.
        opset: As asked for.
        fold_slorb: As asked for.
        dtype: Of what is written.

    Raises:
        SparsepassError: If the operator set that was given cannot say them, or a branch cannot be folded.
    """
    chosen = check_opset(opset)
    least = {
        name: least_opset(state.grid, is_blocked=program.tensor(state.scales).shape[-1] > 1)
        for name, state in program.quantized.items()
    }
    needing = max(least, key=lambda name: least[name], default=None)
    if form != "dense" and needing is not None and chosen < least[needing]:
        if opset is None:
            chosen = least[needing]
        elif form == "qdq":
            grid = program.quantized[needing].grid.text
            raise SparsepassError(
                f"opset {opset} has no DequantizeLinear for {grid}, as {needing} has: give opset={least[needing]} or leave "
                "it out, give form=matmulnbits or form=dense, or quantize{bits=8,group_size=0}"
            )
    if fold_slorb:
        _check_fold(program, dtype)
    return Integers(form=form, opset=chosen, fold_slorb=fold_slorb)


def least_opset(grid: RoundingGrid, *, is_blocked: bool) -> int:
    """The first operator set whose DequantizeLinear takes numbers of a grid.

    Args:
        grid: Theirs.
        is_blocked: Whether a row has several scales.

    Example:
        >>> from sparsepass.graph.rounding import RoundingGrid
        >>> least_opset(RoundingGrid(bits=8, group_size=0, format="fp8"), is_blocked=False)
        19
    """
    if is_blocked or grid.bits == 4:
        return INTEGERS_OPSET
    return _FLOAT8_OPSET if grid.format == "fp8" else _LOWEST_OPSET


def _check_fold(program: Program, dtype: torch.dtype) -> None:
    branched = {name: state for name, state in program.sparse.items() if state.branch is not None}
    if not branched:
        raise SparsepassError("fold_slorb has nothing to fold: the program has no SLoRB branch; leave it out")
    if dtype == torch.bfloat16:
        raise SparsepassError(
            "fold_slorb needs zero points that tell a branch from a step, and bfloat16 has 8 bits for both; give dtype=float16 "
            "or float32"
        )
    for name, state in branched.items():
        if reason := _not_foldable(program, name, state):
            raise SparsepassError(f"the SLoRB branch of {name} cannot be folded: {reason}; leave fold_slorb out")


def _not_foldable(program: Program, name: str, state: SparseState) -> str:
    branch, quantized = state.branch, program.quantized.get(name)
    assert branch is not None
    if quantized is None:
        return "its weight is not quantized, so that it has no zero points"
    if branch.projection is not None:
        return "its projection is trainable, so that it gives no constant for each block"
    if quantized.format != "int":
        return f"onnxruntime's MatMulNBits takes integers, and these are {quantized.grid.kind}"
    if quantized.bits == 8:
        return "onnxruntime's MatMulNBits takes 8 bits with integer zero points only (1.32, on the CPU)"
    if not quantized.group_size or branch.k % quantized.group_size:
        return f"k={branch.k} is no multiple of its groups ({quantized.grid.text})"
    if quantized.group_size not in BLOCKS:
        return f"groups of {quantized.group_size} are no blocks of MatMulNBits ({', '.join(map(str, BLOCKS))})"
    return ""
