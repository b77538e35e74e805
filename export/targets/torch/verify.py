"""Verification of what the target torch adds to the target hf: torch's packing, and on a GPU its 2:4 kernels."""

from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from sparsepass.export.targets.contract import Check
from sparsepass.export.targets.torch.kernels import check_packing, gpu_is_here
from sparsepass.export.targets.torch.layer import apply_record, load_dense
from sparsepass.export.targets.torch.measure import probe
from sparsepass.export.targets.torch.record import Record, read_record
from sparsepass.graph.equivalence import compare
from sparsepass.graph.fusion import split_siblings
from sparsepass.graph.program import Program, masked_weight
from sparsepass.graph.support import SparsepassError

_GPU: Final = torch.device("cuda")


def verify_torch(program: Program, folder: Path, record: Record) -> tuple[Check, ...]:
    """Check what goes beyond the target hf: weights survive packing, and on a GPU the lowered model computes the same.

    Args:
        program: What was lowered.
        folder: Where it was written.
        record: What `write_torch` wrote of the layers.

    Returns:
        The checks ``packing`` and ``kernels``.
    """
    program = split_siblings(program)
    return (_check_packing(program, record), _check_kernels(program, folder))


def _check_packing(program: Program, record: Record) -> Check:
    dtype = getattr(torch, record.dtype)
    checked, failures = 0, []
    for layer in record.layers:
        if not layer.eligible:
            continue
        weight = program.aliases.get(f"{layer.layer}.weight", f"{layer.layer}.weight")
        state = program.sparse[weight]
        stored = masked_weight(program, weight)
        matrix_OI = stored.to(dtype) if state.axis % 2 else stored.to(dtype).t()
        try:
            check_packing(weight, matrix_OI.contiguous())
        except SparsepassError as error:
            failures.append(str(error))
        checked += 1
    said = f"{checked} weights come back bit for bit out of torch's packed form"
    details = {"num_packed": checked, "failures": failures}
    return Check(name="packing", held=not failures, summary="; ".join(failures[:3]) or said, details=details)


def _check_kernels(program: Program, folder: Path) -> Check:
    """On a GPU, compare the lowered model with the dense one. The 2:4 kernels run whatever the number of tokens, to be seen."""
    record = read_record(folder)
    dtype = getattr(torch, record.dtype)
    if unknown := _why_not_run(record, dtype):
        # Where no layer is lowered yet, the folder computes what the target hf has checked.
        return Check(name="kernels", held=None, summary=unknown, decides=bool(record.in_state("lowered")))
    always = replace(record, layers=tuple(replace(layer, min_tokens=0) for layer in record.layers))
    dense, lowered = (load_dense(folder, record).to(_GPU, dtype).eval() for _ in range(2))
    found = compare(dense, apply_record(lowered, always), program.example_inputs, layers=False)
    failures = found.failures()
    name, number = torch.cuda.get_device_name(_GPU), len(record.in_state("lowered"))
    said = f"{number} lowered layers on {name}: relative error {found.relative_error:.2g} (allowed {found.tolerance:g})"
    return Check(name="kernels", held=not failures, summary="; ".join(failures) or said, details=found.to_dict())


def _why_not_run(record: Record, dtype: torch.dtype) -> str:
    if not gpu_is_here():
        todo = "which layers they run is measured there" if record.measured is None else "compare the outputs there"
        return f"no GPU here, so the 2:4 kernels were not run: load the folder by load_torch on one; {todo}"
    if record.measured is None:
        return "nothing was measured, so no layer is lowered yet"
    if not record.in_state("lowered"):
        return f"no layer is lowered: {record.commonest_reason()}"
    missing = probe(dtype, _GPU)
    needed = {layer.backend for layer in record.in_state("lowered")}
    return "; ".join(f"{name} cannot be used on this GPU: {why}" for name, why in missing.items() if why and name in needed)
