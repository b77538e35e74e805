"""The compiled kernels for packed weights: `interface.h` says what they compute, `kernels.cpp` how."""

from sparsepass.graph.native.library import (
    KINDS,
    PATHS,
    TORCH,
    TYPES,
    VARIABLE,
    Kernels,
    NativeWeight,
    available_paths,
    best_path,
    find_kernels,
    kernels,
    openmp,
    processor,
)

__all__ = [
    "KINDS",
    "PATHS",
    "TORCH",
    "TYPES",
    "VARIABLE",
    "Kernels",
    "NativeWeight",
    "available_paths",
    "best_path",
    "find_kernels",
    "kernels",
    "openmp",
    "processor",
]
