"""Where text and samples come from, and how they become calibration batches."""

from sparsepass.passes.data.calibration import LONGEST_NAME, CalibrationBatch, CalibrationData, calibration_batches
from sparsepass.passes.data.sources import check_one_split, data_set_name, load_data_set, locate, special_frame
from sparsepass.passes.data.texts import PYTHON_DOCS, default_text, text_pieces

__all__ = [
    "LONGEST_NAME",
    "PYTHON_DOCS",
    "CalibrationBatch",
    "CalibrationData",
    "calibration_batches",
    "check_one_split",
    "data_set_name",
    "default_text",
    "load_data_set",
    "locate",
    "special_frame",
    "text_pieces",
]
