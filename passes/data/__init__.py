"""Where text and samples come from, and how they become calibration batches."""

from sparsepass.passes.data.calibration import CalibrationBatch, CalibrationData, calibration_batches
from sparsepass.passes.data.sources import (
    TEXT_SUFFIXES,
    RecordError,
    arrow_schema,
    check_one_split,
    data_set_name,
    load_data_set,
    locate,
    path_kind,
    records,
    special_frame,
)
from sparsepass.passes.data.texts import PYTHON_DOCS, default_text, text_pieces

__all__ = [
    "PYTHON_DOCS",
    "TEXT_SUFFIXES",
    "CalibrationBatch",
    "CalibrationData",
    "RecordError",
    "arrow_schema",
    "calibration_batches",
    "check_one_split",
    "data_set_name",
    "default_text",
    "load_data_set",
    "locate",
    "path_kind",
    "records",
    "special_frame",
    "text_pieces",
]
