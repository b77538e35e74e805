"""Tiny programs, pruned by magnitude, and the packed folders that are written of them."""

from pathlib import Path
from typing import Any

import torch
from tests.families import BY_NAME, captured

from sparsepass.export.targets import LoweringContext
from sparsepass.export.targets.packed import Packed, PackedArtifact
from sparsepass.graph import Program
from sparsepass.passes import apply_passes

NO_KERNELS = "ignore:the kernels were not compiled:UserWarning"
"""Without a compiler packed layers run by torch, which is told once in a process."""


def sparse(name: str, slorb: str = "") -> Program:
    """A program of a family, pruned; with a branch that counts, if one is asked for."""
    program = captured(name)
    apply_passes(program, ["nm_sparsify{criterion=magnitude}", *([slorb] if slorb else [])], inplace=True, validate=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for state in program.sparse.values():
            if state.branch is not None:
                branch = program.tensor(state.branch.weight)
                branch.add_(torch.randn(branch.shape, generator=generator) * 0.05)
    return program


def write(program: Program, folder: Path, **options: Any) -> PackedArtifact:
    """Write a packed folder."""
    folder.mkdir(exist_ok=True)
    artifact: PackedArtifact = Packed(**options).lower(program, folder, LoweringContext()).artifact
    return artifact


def inputs(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs of a family, in the type of a model."""
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in BY_NAME[name].inputs(3, 6).items()}
