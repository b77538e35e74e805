"""Perplexities of several models on one text, for the report."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sparsepass.export.report import AccuracySection, MeasurementEntry, measurement
from sparsepass.export.stages.settings import Evaluation, ModelSource
from sparsepass.graph import Program
from sparsepass.graph.support import AUTO

_LOG = logging.getLogger(__name__)
Measured = ModelSource | Program


def accuracy(
    entries: Sequence[tuple[str, Measured]],
    evaluation: Evaluation,
    tokenizer: Any,
    *,
    known: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> AccuracySection:
    """Measure the perplexity of several models, for the report's section ``accuracy``.

    Args:
        entries: Name in the report, and what is measured: a program, or what `load_model` takes. The last one is measured
            in any case.
        evaluation: Text and windows.
        tokenizer: Of all of them.
        device: Where to measure: see `perplexity`; by default the GPU, where there is one.
        known: The section of an earlier stage: what it holds of the same text and windows is not measured again.
    """

    def measure(name: str, model: Measured) -> MeasurementEntry:
        _LOG.info("measuring perplexity: %s", name)
        return measurement(name, evaluation.measure(_measured(model), tokenizer, device or AUTO))

    *earlier, last = entries
    newest = measure(*last)
    section = None if known is None else AccuracySection.model_validate(known)
    there = [] if section is None or section.text != evaluation.name else section.measurements
    there = [entry for entry in there if entry.name != newest.name and entry.setting == newest.setting]
    measured = [entry.name for entry in there]
    missing = [measure(name, model) for name, model in earlier if name not in measured]
    return AccuracySection(text=evaluation.name, measurements=[*missing, *there, newest])


def _measured(model: Measured) -> nn.Module:
    # What is retrained is float32, and figures compare at one precision.
    return model if isinstance(model, Program) else dataclasses.replace(model, dtype="float32").load().model
