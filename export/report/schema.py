"""report.json as a model: the header, the sections, and how one is checked.

1. A new section, or a new field in one, does not change the version: readers keep what they do not know.
2. A field that changes its meaning raises `SCHEMA_VERSION`. A reader refuses a newer version than its own.
3. A section is a field of `ReportDocument`, a model in `sections.py`, and a view in `view.py`.
"""

from collections.abc import Mapping
from typing import Any, Final, Self, final

from pydantic import BaseModel, Field, ValidationError

from sparsepass.export.report import sections
from sparsepass.export.report.parts import Number, Part
from sparsepass.export.report.sizes import SizeSection
from sparsepass.export.report.speed import SpeedSection
from sparsepass.graph.support import SparsepassError

SCHEMA: Final = "sparsepass-report"
SCHEMA_VERSION: Final = 1
"""Version of the schema. It is raised when a field changes its meaning, not when one is added."""

_KINDS: Final = {
    "string_type": "text", "int_type": "integer", "int_from_float": "integer", "float_type": "number", "number_type": "number",
    "bool_type": "flag", "dict_type": "object", "model_type": "object", "list_type": "list",
}  # fmt: skip
"""Type of a pydantic error -> the type that was expected, as docs/report.md calls it."""


@final
class MachineEntry(Part):
    """The machine of a run; nothing names it or its user."""

    system: str | None = Field(default=None, description="operating system and architecture")
    processor: str = Field(default="", description="the processor's model")
    cores: int | None = Field(default=None, description="logical cores")
    threads: int | None = Field(default=None, description="threads that torch computed with")
    memory_bytes: int | None = Field(default=None, description="main memory")
    accelerators: list[str] = Field(default=[], description="names of the GPUs")


@final
class RunEntry(Part):
    """A command that added to the report."""

    stage: str = Field(
        description="`prune`, `retrain`, `eval`, `export`, `measure`, `plan`, `verify`, `bench` or `size` so far"
    )
    command: str = Field(description="the command line, or `python` for a call from Python")
    created: str = Field(description="when it ended, ISO 8601, UTC")
    seconds: Number = Field(description="wall time, loading included")
    versions: dict[str, Any] = Field(description="sparsepass, Python and the libraries")
    machine: MachineEntry = Field(description="what it ran on")


@final
class ReportDocument(Part):
    """A whole report."""

    schema_: str = Field(default=SCHEMA, alias="schema", description=f"always `{SCHEMA}`")
    schema_version: int = Field(default=SCHEMA_VERSION, description=f"{SCHEMA_VERSION} today")
    recipe: str = Field(description="the passes as one line of text, which `--passes` takes; empty if none ran")
    runs: list[RunEntry] = Field(description="one entry for each command that added to the report, in order")
    model: sections.ModelSection | None = None
    passes: sections.PassesSection | None = None
    retraining: sections.RetrainingSection | None = None
    accuracy: sections.AccuracySection | None = None
    artifact: sections.ArtifactSection | None = None
    sparsity: sections.SparsitySection | None = None
    speed: SpeedSection | None = None
    size: SizeSection | None = None
    pattern: sections.PatternSection | None = None
    plan: sections.PlanSection | None = None
    verification: sections.VerificationSection | None = None
    samples: sections.SamplesSection | None = None

    @classmethod
    def parse(cls, document: Any, where: str = "the report") -> Self:
        """Check a document, and give access to its fields.

        Args:
            document: Plain JSON, as it was read.
            where: Its name, for errors.

        Raises:
            SparsepassError: If it is no report, of a newer schema, or a field is missing or of the wrong type.

        Example:
            >>> ReportDocument.parse({"schema": "sparsepass-report", "schema_version": 99})
            Traceback (most recent call last):
            ...
            sparsepass.SparsepassError: the report has report schema 99, and this sparsepass reads up to 1; ...
        """
        if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
            raise SparsepassError(
                f"{where} is no sparsepass report (expected an object with schema {SCHEMA!r}); check the path"
            )
        version = document.get("schema_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise SparsepassError(f"{where} has the schema_version {version!r}; expected an integer from 1 on")
        if version > SCHEMA_VERSION:
            raise SparsepassError(
                f"{where} has report schema {version}, and this sparsepass reads up to {SCHEMA_VERSION}; upgrade sparsepass"
            )
        try:
            return cls.model_validate(document, strict=True)
        except ValidationError as error:
            raise SparsepassError(f"{_first_fault(error, where)}; write the folder again") from error


SECTIONS: Final[Mapping[str, type[BaseModel]]] = {
    name: next(kind for kind in field.annotation.__args__ if kind is not type(None))  # type: ignore[union-attr]
    for name, field in ReportDocument.model_fields.items()
    if not field.is_required() and name not in ("schema_", "schema_version")
}
"""Section -> its model."""


def check_report(document: Any, where: str = "the report") -> dict[str, Any]:
    """Check a document against the schema; see `ReportDocument.parse`.

    Returns:
        The document itself, as plain JSON.
    """
    ReportDocument.parse(document, where)
    return dict(document)


def json_schema() -> dict[str, Any]:
    """The JSON schema of report.json.

    Example:
        >>> json_schema()["properties"]["schema"]["const"]
        'sparsepass-report'
    """
    found = ReportDocument.model_json_schema()
    found["properties"]["schema"]["const"] = SCHEMA
    found["required"] = ["schema", "schema_version", *found["required"]]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _first_fault(error: ValidationError, where: str) -> str:
    fault = error.errors()[0]
    *places, name = fault["loc"]
    parent = "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place in places).removeprefix(".")
    inside = f"{where}: {parent}" if parent else where
    if fault["type"] == "missing":
        return f"{inside} has no field {name!r}"
    if fault["type"] == "model_type":
        whole = f"{parent}[{name}]" if isinstance(name, int) else f"{parent}.{name}".removeprefix(".")
        return f"{where}: {whole} is a {type(fault['input']).__name__} where an object is expected"
    return f"{inside}: field {name!r} is {fault['input']!r}, expected {_KINDS.get(fault['type'], fault['msg'])}"
