"""Training data: sources, tokens, sequences, their order, and streams."""

from sparsepass.retrain.data.sequences import Batch
from sparsepass.retrain.data.sources import DataConfig
from sparsepass.retrain.data.training import TrainingData, open_data

__all__ = [
    "Batch",
    "DataConfig",
    "TrainingData",
    "open_data",
]
