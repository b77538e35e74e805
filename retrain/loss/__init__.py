"""What training minimises: distillation, next tokens, hidden states."""

from sparsepass.retrain.loss.divergence import FullDistribution, TeacherTargets, TopKDistribution, log_probabilities
from sparsepass.retrain.loss.objective import (
    CHUNK_TOKENS,
    IGNORED,
    Distillation,
    distillation_loss,
    hidden_state_loss,
    next_token_targets,
)

__all__ = [
    "CHUNK_TOKENS",
    "IGNORED",
    "Distillation",
    "FullDistribution",
    "TeacherTargets",
    "TopKDistribution",
    "distillation_loss",
    "hidden_state_loss",
    "log_probabilities",
    "next_token_targets",
]
