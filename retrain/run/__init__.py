"""What a training run needs around its steps: checkpoints, processes, signals, progress, metrics."""

from sparsepass.retrain.run.checkpoint import CHECKPOINTS, Checkpoints, step_of
from sparsepass.retrain.run.metrics import METRICS, MetricsFile, read_metrics, tracking
from sparsepass.retrain.run.pieces import local, local_box
from sparsepass.retrain.run.processes import (
    StopSignals,
    any_process,
    checkpoint_activations,
    is_first_process,
    leave_processes,
    local_device,
    make_accelerator,
    replicate,
    shard,
    together,
    total,
    trains_on_processor,
    whole,
)
from sparsepass.retrain.run.progress import ProgressLine, memory_bytes

__all__ = [
    "CHECKPOINTS",
    "METRICS",
    "Checkpoints",
    "MetricsFile",
    "ProgressLine",
    "StopSignals",
    "any_process",
    "checkpoint_activations",
    "is_first_process",
    "leave_processes",
    "local",
    "local_box",
    "local_device",
    "make_accelerator",
    "memory_bytes",
    "read_metrics",
    "replicate",
    "shard",
    "step_of",
    "together",
    "total",
    "tracking",
    "trains_on_processor",
    "whole",
]
