"""What keeps a training run alive and told: checkpoints, processes, signals, progress, metrics."""

from sparsepass.retrain.run.checkpoint import CHECKPOINTS, STATE_FILE, Checkpoints, step_of, stored_names
from sparsepass.retrain.run.diagnose import GO_ON, NonFiniteLossError, first_not_finite
from sparsepass.retrain.run.metrics import METRICS, MetricsFile, read_metrics
from sparsepass.retrain.run.parallel import checkpoint_activations, make_accelerator, replicate, shard, total, whole
from sparsepass.retrain.run.pieces import local_box
from sparsepass.retrain.run.processes import any_process, is_first_process, leave_processes, together
from sparsepass.retrain.run.progress import ProgressLine, memory_bytes
from sparsepass.retrain.run.seeds import random_states, set_random_states
from sparsepass.retrain.run.signals import StopSignals
from sparsepass.retrain.run.trackers import tracking

__all__ = [
    "CHECKPOINTS",
    "GO_ON",
    "METRICS",
    "STATE_FILE",
    "Checkpoints",
    "MetricsFile",
    "NonFiniteLossError",
    "ProgressLine",
    "StopSignals",
    "any_process",
    "checkpoint_activations",
    "first_not_finite",
    "is_first_process",
    "leave_processes",
    "local_box",
    "make_accelerator",
    "memory_bytes",
    "random_states",
    "read_metrics",
    "replicate",
    "set_random_states",
    "shard",
    "step_of",
    "stored_names",
    "together",
    "total",
    "tracking",
    "whole",
]
