"""Where text and samples come from, and how they become calibration batches."""

from sparsepass.passes.data.calibration import CalibrationBatch, CalibrationData, calibration_batches, default_text
from sparsepass.passes.data.sources import TEXT_SUFFIXES, load_data_set, locate, path_kind, special_frame

__all__ = [
    "TEXT_SUFFIXES",
    "CalibrationBatch",
    "CalibrationData",
    "calibration_batches",
    "default_text",
    "load_data_set",
    "locate",
    "path_kind",
    "special_frame",
]
