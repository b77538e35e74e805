"""The compiled kernels for packed weights: `interface.h` says what they compute, `kernels.cpp` how."""

from sparsepass.graph.native.library import (
    KINDS,
    PATHS,
    TORCH,
    VARIABLE,
    Kernels,
    NativeWeight,
    available_paths,
    best_path,
    kernels,
)

__all__ = ["KINDS", "PATHS", "TORCH", "VARIABLE", "Kernels", "NativeWeight", "available_paths", "best_path", "kernels"]
