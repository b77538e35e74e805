"""Builds the kernels for packed weights, where there is a C++ compiler; all else stands in pyproject.toml.

The library is no Python extension: it knows neither Python nor torch, so one wheel fits every version of both. Where it cannot
be compiled, sparsepass is installed without it, and packed layers run by torch's own operations.

    python setup.py build_ext --inplace     # into graph/native/, for a checkout that is not installed
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = Path("src/sparsepass/graph/native")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-shared", "-pthread")
"""No -march: functions that need instructions name them, and are called where the processor has them."""
NAME = "libsparsepass.dylib" if sys.platform == "darwin" else "libsparsepass.so"


def compiler() -> list[str]:
    """The C++ compiler that CXX names, or the first one that is found."""
    if given := os.environ.get("CXX"):
        return shlex.split(given)
    return [next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "c++")]


class BuildKernels(build_ext):
    """Compiles one file into one shared library, beside the Python file that loads it."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the tag of a Python version."""
        return os.path.join(*fullname.split(".")[:-1], NAME)

    def build_extension(self, ext: Extension) -> None:
        """Compile.

        Raises:
            CompileError: If there is no compiler, or it fails; setuptools tells so and goes on, the library being optional.
        """
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [*compiler(), *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), *ext.sources, "-o", str(target)]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the kernels for packed weights were not compiled: {error}") from error


class Wheel(bdist_wheel):
    """Names the platform alone: any Python 3 will do."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tag; of a wheel without the library, that of any platform."""
        is_built = (Path(self.bdist_dir) / "sparsepass/graph/native" / NAME).is_file()
        return "py3", "none", super().get_tag()[2] if is_built or self.get_finalized_command("build_ext").inplace else "any"


setup(
    ext_modules=[
        Extension(
            "sparsepass.graph.native.libsparsepass",
            sources=[str(NATIVE / "kernels.cpp")],
            depends=sorted(str(path) for path in NATIVE.glob("*.h")),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
