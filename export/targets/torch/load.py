"""Loading a folder of the target torch with the 2:4 kernels that were chosen for its layers."""

import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import nn

from sparsepass.export.targets.torch.kernels import check_device, check_dtype
from sparsepass.export.targets.torch.layer import apply_record, choose, load_dense
from sparsepass.export.targets.torch.measure import default_shapes, measure_layers, probe
from sparsepass.export.targets.torch.record import Measured, Record, read_record, write_record
from sparsepass.export.targets.torch.target import SemiStructured
from sparsepass.graph.limits import position_limit
from sparsepass.graph.support import SparsepassError

_LOGGER: Final = logging.getLogger(__name__)


def load_torch(
    folder: str | Path,
    *,
    device: str | torch.device = "cuda",
    measure: bool = False,
    options: SemiStructured | None = None,
    remember: bool = False,
) -> nn.Module:
    """Load a folder of the target torch with transformers, and put in the 2:4 kernels where they were measured to be faster.

    Args:
        folder: What `sparse-export --target torch` wrote.
        device: The GPU.
        measure: Whether to measure here although times are recorded; if none are, it is always measured.
        options: How layers are chosen, if they are measured; by default as it was said when the folder was written.
        remember: Whether what was measured here is written into the folder.

    Returns:
        The model's own class on the GPU, for inference, SLoRB branches included; `generate()` and `torch.compile` work on
        it. `record_of` tells what became of each layer. The steps are logged at the level INFO.

    Raises:
        SparsepassError: If there is no GPU with 2:4 kernels, the folder is damaged, or a weight is not 2:4 any more.

    Exactness: lowered weights are bitwise the stored ones; outputs equal up to the kernels' order of summation.

    Example:
        >>> model = load_torch("out")  # doctest: +SKIP
        >>> print(record_of(model).summary())  # doctest: +SKIP
    """
    place, where = torch.device(device), Path(folder)
    record = read_record(where)
    here = check_device(place)
    dtype: torch.dtype = getattr(torch, record.dtype)
    check_dtype(dtype)
    model = load_dense(where, record).to(place, dtype)
    if measure or record.measured is None:
        _LOGGER.info("measuring the layers on %s", here)
        rules = record.options if options is None else options.rules
        shapes = rules.shapes or default_shapes(position_limit(model.config))  # type: ignore[arg-type]
        measured = measure_layers(record.layers, shapes, dtype, place, compiled=rules.compiled)
        layers = choose(record.layers, measured, sparse_only=rules.sparse_only)
        record = replace(record, layers=layers, options=rules, measured=measured)
        if remember:
            write_record(record, where)
    else:
        _check_measured_here(record, record.measured, where, place)
    if not record.in_state("lowered"):
        warnings.warn(
            f"no layer of {where} was lowered, the model runs dense: {record.commonest_reason()}; record_of(model) tells all",
            stacklevel=2,
        )
    _LOGGER.info("packing the chosen weights")
    apply_record(model, record)
    model.__dict__["_semi_structured_record"] = record
    return model


def record_of(model: nn.Module) -> Record:
    """What became of each layer of a model that `load_torch` loaded.

    Raises:
        SparsepassError: If it was loaded by something else.
    """
    record = model.__dict__.get("_semi_structured_record")
    if not isinstance(record, Record):
        raise SparsepassError(f"this {type(model).__name__} was not loaded by load_torch, so nothing is known of its layers")
    return record


def _check_measured_here(record: Record, measured: Measured, folder: Path, device: torch.device) -> None:
    here = check_device(device)
    if here != measured.device:
        warnings.warn(
            f"the layers of {folder} were chosen by times measured on {measured.device}, and this is {here}: another "
            "choice may be faster here; load_torch(..., measure=True) measures again, and remember=True keeps that",
            stacklevel=3,
        )
    missing = probe(getattr(torch, record.dtype), device)
    for backend in sorted({layer.backend for layer in record.in_state("lowered") if layer.backend}):
        if missing[backend]:
            raise SparsepassError(
                f"{folder} was measured with {backend}, which cannot be used here ({missing[backend]}); measure again with "
                "load_torch(..., measure=True)"
            )
