"""What all sections of report.json are made of: objects whose fields are known, and numbers that JSON may lack."""

import math
from collections.abc import Mapping
from typing import Annotated, TypeGuard

from pydantic import BaseModel, ConfigDict, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

_TEXTS = ("inf", "-inf", "nan")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite figure, and not one of the texts inf, -inf and nan."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: object) -> object:
    if isinstance(value, Mapping) and value.keys() == {"float"}:  # as records of a program hold what JSON lacks
        value = value["float"]
    if (isinstance(value, int | float) and not isinstance(value, bool)) or value in _TEXTS:
        return value
    raise PydanticCustomError("number_type", "expected a number, or one of the texts inf, -inf and nan")


Number = Annotated[
    int | float | str,
    PlainValidator(_number),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string", "enum": list(_TEXTS)}]}),
]
"""A figure. JSON has no infinities and no NaN, so these are texts."""


class Part(BaseModel):
    """A section of a report, or an entry of one. It keeps the fields that it does not know. Abstract."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)
