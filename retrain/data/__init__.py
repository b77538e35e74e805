"""Training data: sources, tokens, sequences, their order, and streams."""

from sparsepass.retrain.data.sequences import Batch
from sparsepass.retrain.data.training import DataConfig, TrainingData, open_data

__all__ = [
    "Batch",
    "DataConfig",
    "TrainingData",
    "open_data",
]
