"""What a target is: a form in which a program leaves.

1. A target is a frozen, keyword-only dataclass. Its fields are its options, in Python, as text, in a recipe, and on the
   command line.
2. `Target.lower` writes files into a folder. `Target.verify` opens them again and compares them with the program.
3. The file of a target imports torch, onnx and the like inside its methods only, so its work lies in files beside it (see
   `hf/`): the command line reads the fields of every target for its help, which comes at once.
4. A field has its help in the class's docstring. One that is true by default becomes ``--no-NAME`` on the command line.
5. A dtype that a target cannot hold is refused. After a conversion, `canonical_zeros` of `passes/maths` takes away -0.0.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from sparsepass.graph import Program
    from sparsepass.passes import Pass


@dataclass(frozen=True, kw_only=True)
class LoweringContext:
    """What comes with a program.

    Attributes:
        tokenizer: The model's tokenizer, if it has one.
        processor: Its processor, if it has one.
        source: The folder that the model came from, if it came from one.
    """

    tokenizer: Any = None
    processor: Any = None
    source: Path | None = None

    def save_companions(self, folder: Path) -> None:
        """Write tokenizer and processor into a folder, and copy what else goes with the model: its licence, say."""
        from sparsepass.export.targets.older import add_older_tokenizer_keys
        from sparsepass.graph.load import save_companions

        save_companions(folder, tokenizer=self.tokenizer, processor=self.processor, source=self.source)
        add_older_tokenizer_keys(folder)


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """What a target wrote.

    Attributes:
        dtype: Type of the written weights.
        expected_sparse: File (empty: the folder) -> stored weight -> pattern; every other weight is dense on purpose. The
            pattern checker reads .onnx and .safetensors files, and leaves others to the target's own `verify`.
        axes: File -> stored weight -> axis along which the pattern runs, where the file itself does not tell.
        notes: What a reader should know of the files.
        details: The target's own record as JSON.
        artifact: The target's own record, for its verification.
        sections: Sections of the report that the target knows.
    """

    dtype: str
    expected_sparse: Mapping[str, Mapping[str, str]]
    axes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    artifact: Any = None
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


State = Literal["held", "did_not_hold", "not_checked"]
"""What verification came to: everything that decides was checked and held; something differs; something was not checked."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was verified in the written files.

    Attributes:
        name: Such as ``pattern`` or ``outputs``.
        held: Whether it held; None if it cannot be checked here, and the summary says why.
        summary: One line for people.
        details: Everything for machines.
        decides: Whether what is written counts as not checked if this could not be checked. False for what is only told.
    """

    name: str
    held: bool | None
    summary: str
    details: Mapping[str, Any] = field(default_factory=dict)
    decides: bool = True


def state_of(checks: Iterable[Check]) -> State:
    """What checks come to as a whole. No check at all proves nothing.

    Example:
        >>> pattern, outputs = Check(name="pattern", held=True, summary=""), Check(name="outputs", held=None, summary="")
        >>> state_of([pattern]), state_of([pattern, outputs]), state_of([])
        ('held', 'not_checked', 'not_checked')
    """
    found = list(checks)
    if any(check.held is False for check in found):
        return "did_not_hold"
    if not found or any(check.held is None and check.decides for check in found):
        return "not_checked"
    return "held"


def option(default: Any, help: str | None = None, *, flag: str | None = None, parse: Callable[[str], Any] | None = None) -> Any:
    """A field of a target that the command line treats in its own way.

    Args:
        default: Its default.
        help: What ``--help`` says of it; by default what the class's docstring does.
        flag: Its name on the command line; by default the field's. A field that is True by default has ``no-`` before it.
        parse: Reads it from text; by default its type tells.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "parse": parse})


def option_error(said: str) -> ValueError:
    """A `SparsepassError` for a value that cannot be used. Its class is imported only now: see 3 above."""
    from sparsepass.graph.support import SparsepassError

    return SparsepassError(said)


@dataclass(frozen=True, kw_only=True)
class Target(ABC):
    """A form in which a program leaves. Its fields are its options, and the help of the command line is read from here.

    Attributes:
        dtype: Write the weights as float32, bfloat16 or float16; by default as they are.

    Raises:
        SparsepassError: If an option cannot be used.
    """

    name: ClassVar[str]
    description: ClassVar[str]

    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            from sparsepass.graph.load import parse_dtype

            object.__setattr__(self, "dtype", str(parse_dtype(self.dtype)).removeprefix("torch."))

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(each.name for each in fields(cls))

    @property
    def model_task(self) -> str | None:
        """What the model is for, if an option `task` says so; it is loaded as that."""
        return getattr(self, "task", None)

    def is_checkpoint(self, *, is_quantized: bool) -> bool:
        """Whether `load_model` loads the folder that is written, so that it can be timed beside other models.

        Args:
            is_quantized: Whether the program's weights are rounded to integers or fp8.
        """
        del is_quantized
        return False

    @abstractmethod
    def check_here(self) -> None:
        """Make sure that this machine can write this form, before a model is loaded.

        Raises:
            SparsepassError: If a package or a GPU is missing, a file cannot be read, or an option suits nothing here.
        """

    def check_passes(self, passes: "Iterable[Pass]") -> None:
        """Make sure that this form can hold what passes make, before any of them runs.

        What depends on the shape of a layer is for `lower` to refuse.

        Args:
            passes: Those that are going to be applied.

        Raises:
            SparsepassError: If it holds no weight that one of them rounds.
        """
        del passes

    @abstractmethod
    def lower(self, program: "Program", folder: Path, context: LoweringContext) -> Lowered:
        """Write the files into an existing, empty folder. The program is not changed.

        The caller moves the folder into place when all is written and verified, so files are written plainly. Weights are
        the parameters of ``program.graph_module``: a sparse one is read through `masked_weight` (`graph/program.py`), the
        logits of learned masks (``SparseState.learned``) are none, and ``program.aliases`` has the names of tied ones.

        Raises:
            SparsepassError: If the program cannot be written in this form.
        """

    @abstractmethod
    def verify(self, program: "Program", folder: Path, lowered: Lowered, context: LoweringContext) -> tuple[Check, ...]:
        """Open what `lower` wrote, and compare it with the program."""
