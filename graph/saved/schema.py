"""What program.json holds, field by field: checked before anything is built of it."""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from sparsepass.graph.saved.names import check_input_name, check_keyword, check_node_name, check_tensor_name
from sparsepass.graph.support import ProgramFormatError

FORMAT_VERSION = 2
"""Version of the folder format. A reader refuses a newer one."""

EXAMPLE_PREFIX = "example_inputs/"

JSON = Any
TensorName = Annotated[str, AfterValidator(check_tensor_name)]
InputName = Annotated[str, AfterValidator(check_input_name)]
Keyword = Annotated[str, AfterValidator(check_keyword)]
NodeName = Annotated[str, AfterValidator(check_node_name)]
_MOST_AXES = 64
_NODES, _NODES_OF_TENSOR = 2000, 200
"""Nodes of a graph at most: a language model has ten for each of its tensors."""


class _Entry(BaseModel):
    """An object of the file: no field is missing, none is unknown, and each has its type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class _BranchFields(_Entry):
    k: Annotated[int, Field(ge=1)]
    weight: TensorName
    projection: TensorName | None


class _LearnedFields(_Entry):
    logits: TensorName
    control: TensorName


class _SparseFields(_Entry):
    pattern: Annotated[str, Field(pattern=r"^\s*[0-9]{1,9}\s*:\s*[0-9]{1,9}\s*$")]
    axis: Annotated[int, Field(ge=-_MOST_AXES, lt=_MOST_AXES)]
    mask: TensorName | None
    branch: _BranchFields | None
    learned: _LearnedFields | None = None
    changed_by: str | None = None


class _QuantizedFields(_Entry):
    bits: Literal[4, 8]
    group_size: Annotated[int, Field(ge=0, lt=2**31)]
    axis: Annotated[int, Field(ge=0, lt=_MOST_AXES)]
    scales: TensorName
    zero_points: TensorName | None
    format: Literal["int", "fp8"] = "int"


class _FusedFields(_Entry):
    weight: TensorName
    bias: TensorName | None
    rows: Annotated[int, Field(ge=1)]
    levels: list[Annotated[list[str], Field(min_length=2, max_length=2)]]


class _OutcomeFields(_Entry):
    site: str
    weight: str
    shape: list[Annotated[int, Field(ge=0)]]
    action: Literal["rewritten", "skipped"]
    reason: str
    facts: dict[str, JSON]


class _NotFiniteFields(_Entry):
    float: Literal["nan", "inf", "-inf"]


class _ValidationFields(_Entry):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    relative_error: float | _NotFiniteFields
    kl: float | _NotFiniteFields | None = None


class _RecordFields(_Entry):
    text: str
    promise: Literal["exact", "approximate"]
    outcomes: list[_OutcomeFields]
    validation: _ValidationFields | None
    calibration: dict[str, JSON] | None
    seconds: float


class _OriginFields(_Entry):
    model_class: Annotated[str, Field(pattern=r"^transformers\.[A-Za-z][A-Za-z0-9_]*$")] | None
    config: dict[str, JSON] | None
    generation_config: dict[str, JSON] | None
    output_heads: list[TensorName]
    signature: list[Annotated[str, Field(pattern=r"^[^\W\d]\w*$")]]
    versions: dict[str, str]


class _NodeFields(_Entry):
    name: NodeName
    op: Literal["placeholder", "get_attr", "call_function", "output"]
    target: str
    args: list[JSON] = []
    kwargs: dict[Keyword, JSON] = {}
    stack: Annotated[int, Field(ge=0)] | None = None


class _GraphFields(_Entry):
    nodes: list[_NodeFields]
    stacks: list[list[Annotated[list[str], Field(min_length=2, max_length=2)]]]


class _DocumentFields(_Entry):
    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)]
    output_structure: JSON
    dynamic_axes: dict[InputName, list[Annotated[int, Field(ge=0, lt=_MOST_AXES)]]]
    limits: list[Annotated[str, Field(max_length=1000)]] = []
    aliases: dict[TensorName, TensorName]
    parameters: dict[TensorName, bool]
    origin: _OriginFields
    sparse: dict[TensorName, _SparseFields]
    fused: dict[TensorName, Annotated[list[_FusedFields], Field(min_length=2)]] = {}
    quantized: dict[TensorName, _QuantizedFields] = {}
    history: list[_RecordFields]
    retraining: list[dict[str, JSON]] = []
    training: bool
    graph: _GraphFields


def check_document(document: JSON, tensors: Collection[str], where: str) -> None:
    """Check what stands in program.json, and that the tensors which it names are there.

    Args:
        document: Read from the file, or to be written.
        tensors: Names of the tensors in the file beside it.
        where: What an error begins with.

    Raises:
        ProgramFormatError: It names the place and the reason.
    """
    try:
        for name in tensors:
            _check_stored(name)
        found = _DocumentFields.model_validate(document)
        _check_references(found, {name for name in tensors if not name.startswith(EXAMPLE_PREFIX)})
    except ValidationError as error:
        raise ProgramFormatError(f"{where}: {_told(error)}") from error
    except ProgramFormatError as error:
        raise ProgramFormatError(f"{where}: {error}") from error


def _check_stored(name: str) -> None:
    if name.startswith(EXAMPLE_PREFIX):
        check_input_name(name.removeprefix(EXAMPLE_PREFIX))
    else:
        check_tensor_name(name)


def _check_references(document: _DocumentFields, tensors: Collection[str]) -> None:
    folders = {name[:end] for name in tensors for end, letter in enumerate(name) if letter == "."}
    for name in tensors:
        if name in folders:
            raise ProgramFormatError(f"the tensor {name} has the name of a module that holds others")
    for name in document.parameters:
        if name not in tensors:
            raise ProgramFormatError(f"parameters: there is no tensor {name}")
    for alias, name in document.aliases.items():
        if alias in tensors or alias in folders or name not in tensors:
            raise ProgramFormatError(f"aliases: {alias} cannot be another name of {name}")
    known = {*tensors, *document.aliases}
    for part in (part for parts in document.fused.values() for part in parts):
        for own in filter(None, (part.weight, part.bias)):
            above = {own[:end] for end, letter in enumerate(own) if letter == "."}
            if own in known or own in folders or above & known:
                raise ProgramFormatError(f"fused: a layer gets its {own} again, and there is one of that name")
            known.add(own)
    names = [node.name for node in document.graph.nodes]
    if len(names) > (most := _NODES + _NODES_OF_TENSOR * len(tensors)):
        raise ProgramFormatError(f"graph.nodes: {len(names):,} nodes over {len(tensors):,} tensors, and {most:,} are the most")
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ProgramFormatError(f"graph.nodes: two nodes are named {twice}")
    inputs = [node.target for node in document.graph.nodes if node.op == "placeholder"]
    if len(set(inputs)) < len(inputs):
        raise ProgramFormatError("graph.nodes: two inputs have the same name")
    for name in document.dynamic_axes:
        if name not in inputs:
            raise ProgramFormatError(f"dynamic_axes: there is no input {name}")
    for node in document.graph.nodes:
        if node.stack is not None and node.stack >= len(document.graph.stacks):
            raise ProgramFormatError(f"graph.nodes: {node.name} stands in stack {node.stack}, and there is none")


def _told(error: ValidationError) -> str:
    """The first fault: its place, what it is, and what is there."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the file"
    reason = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] in ("missing", "extra_forbidden"):
        return f"{place}: {'this field is missing' if first['type'] == 'missing' else 'there is no such field'}"
    if first["type"] == "value_error":  # of ours
        return f"{place}: {reason}"
    return f"{place}: {reason[:1].lower()}{reason[1:]}, got {first['input']!r:.100}"
