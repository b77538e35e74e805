"""torch-tensorrt's own route: an engine straight from a program's graph, without ONNX in between.

It is imported in a child process only: it needs a CUDA build of torch, and raises plain exceptions at import. Precision comes
from the program's dtype, so there is no list of precisions to give.
"""

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from sparsepass.export.targets.onnx import plain_program
from sparsepass.export.targets.tensorrt.build import Built, run_child
from sparsepass.export.targets.tensorrt.options import EngineTarget
from sparsepass.export.targets.tensorrt.profiles import EnginePlan, shapes
from sparsepass.graph.program import Program
from sparsepass.graph.support import SparsepassError

CHILD: Final = Path(__file__).with_name("through_torch_child.py")

Lengths = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, most common and largest shape of an input."""


def build_torch_engine(
    program: Program, plan: EnginePlan, engine: Path, log: Path, options: EngineTarget, dtype: torch.dtype
) -> Built:
    """Build one engine with torch-tensorrt, in a child process.

    Args:
        program: The program; it is not changed.
        plan: Profile of the engine; it has one.
        engine: Where the engine goes.
        log: Where the log goes.
        options: How it is built.
        dtype: Type of the weights and of the arithmetic.

    Raises:
        BuildError: If torch-tensorrt cannot be imported, refuses the graph, crashes or takes too long.
    """
    (profile,) = plan.profiles
    lengths = shapes(plan.graph, profile).shapes
    exported = engine.with_suffix(".pt2")
    try:
        plain = plain_program(program, dtype)
        torch.export.save(exported_program(plain, lengths), exported)
        request = {
            "program": str(exported),
            "engine": str(engine),
            "arguments": arguments(options),
            "inputs": [[name, lengths[name] if varying_axes(lengths.get(name)) else None] for name in plain.input_names],
        }
        command = [sys.executable, "-P", str(CHILD)]
        return Built(**run_child(command, request, log=log, timeout_s=options.timeout_s, what=engine.name))
    finally:
        exported.unlink(missing_ok=True)


def arguments(options: EngineTarget) -> dict[str, Any]:
    """Keyword arguments for ``torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine``.

    Example:
        >>> from sparsepass.export.targets import TensorRT
        >>> arguments(TensorRT())["sparse_weights"]
        True
    """
    found: dict[str, Any] = {
        "sparse_weights": options.sparse,
        "hardware_compatible": options.hardware_compatible,
        "require_full_compilation": True,
        "disable_tf32": False,
    }
    if options.timing_cache is not None:
        found["timing_cache_path"] = str(options.timing_cache)
    return found


def exported_program(program: Program, lengths: Mapping[str, Lengths]) -> torch.export.ExportedProgram:
    """Export a program's graph, with the axes that a profile lets vary.

    Args:
        program: The program; it is not changed.
        lengths: Input -> its smallest, most common and largest shape.

    Raises:
        SparsepassError: If torch cannot export it with these lengths.
    """
    inputs = {name: program.example_inputs[name] for name in program.input_names}
    dynamic = tuple(dict.fromkeys(varying_axes(lengths.get(name)), torch.export.Dim.AUTO) for name in inputs)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(program.graph_module, tuple(inputs.values()), dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch.export raises anything
        raise SparsepassError(f"the program cannot be exported for torch-tensorrt: {type(error).__name__}: {error}") from error


def varying_axes(lengths: "Lengths | None") -> tuple[int, ...]:
    """The axes whose length a profile lets vary; none without a profile.

    Example:
        >>> varying_axes(((1, 8), (1, 8), (4, 8)))
        (0,)
    """
    return (
        ()
        if lengths is None
        else tuple(n for n, (low, high) in enumerate(zip(lengths[0], lengths[2], strict=True)) if low != high)
    )
