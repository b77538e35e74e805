"""The end of a recipe: what was exported is measured, and the report of a target gets its speed and its size."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsepass.export.plan import sizes
from sparsepass.export.report import SizeSection, add_to_report
from sparsepass.export.stages.benching import bench
from sparsepass.export.stages.settings import BenchSettings, ModelSource
from sparsepass.export.targets import Target
from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.load import parse_dtype
from sparsepass.graph.saved import PROGRAM_FILE
from sparsepass.graph.support import find_device


@dataclass(frozen=True, kw_only=True)
class MeasureSection:
    """What is measured of what a recipe exported. It goes into the report of one target.

    Attributes:
        target: The export that is measured.
        against: The dense model beside it: folder, hub id or .gguf file; by default the recipe's model.
        dtype: Type in which the dense model is loaded; by default as it is stored.
        bench: The settings of `sparsepass bench`; null if nothing is timed.
        size: Count and measure sizes, as `sparsepass size` does: of the dense model and of each export.
    """

    target: str = "packed"
    against: str | None = None
    dtype: str | None = None
    bench: BenchSettings | None = field(default_factory=BenchSettings)
    size: bool = True

    def check(self, exports: Sequence[Target], where: str, model: ModelSource, *, is_program: bool, is_quantized: bool) -> None:
        """Make sure that a recipe exports what is measured, and that it can be measured.

        Args:
            exports: What the recipe exports.
            where: Place of the section, for messages.
            model: The recipe's.
            is_program: Whether that is a saved program, which is no dense model.
            is_quantized: Whether the recipe rounds weights.

        Raises:
            SparsepassError: If it cannot.
        """
        found = next((target for target in exports if target.name == self.target), None)
        if found is None:
            named = ", ".join(target.name for target in exports) or "nothing"
            raise SparsepassError(
                f"{where}: the target {self.target} is not exported ({named} is); add it to export, or name another target"
            )
        if self.bench is None and not self.size:
            raise SparsepassError(f"{where}: neither bench nor size is wanted; leave the section out")
        if self.bench is not None and not found.is_checkpoint(is_quantized=is_quantized):
            integers = " of integers" if found.is_checkpoint(is_quantized=False) else ""
            raise SparsepassError(
                f"{where}: bench runs folders that load as a model, and the target {self.target} writes none{integers}; set "
                "bench: null for its size alone, or name another target"
            )
        if self.against is None and is_program:
            raise SparsepassError(
                f"{where}: the recipe's model is a saved program; name the dense model that it is compared with: against: MODEL"
            )
        if self.size and self.against is None and (model.revision is not None or model.trust_remote_code):
            raise SparsepassError(
                f"{where}: sizes are counted from a configuration of the hub's default revision, without code of its own, and "
                "model has revision or trust_remote_code; set size: false, or name a local folder as model"
            )
        if self.dtype is not None:
            parse_dtype(self.dtype)

    def check_here(self, trust_remote_code: bool) -> None:
        """Make sure that the dense model and the device are there, before anything runs.

        Raises:
            SparsepassError: If they are not.
        """
        if self.against is not None:
            if (Path(self.against).expanduser() / PROGRAM_FILE).is_file():
                raise SparsepassError(f"measure.against: {self.against} is a saved program; name the dense model")
            ModelSource(source=self.against, trust_remote_code=trust_remote_code).check()
        if self.bench is not None:
            find_device(self.bench.device)

    def dense(self, model: ModelSource) -> ModelSource:
        """The dense model of a recipe whose model is ``model``."""
        if self.against is not None:
            return ModelSource(source=self.against, dtype=self.dtype, trust_remote_code=model.trust_remote_code)
        return replace(model, dtype=self.dtype or model.dtype)


def measure_export(
    folder: Path,
    section: MeasureSection,
    model: ModelSource,
    exports: Sequence[Path],
    *,
    program: Path,
    command: str | None = None,
) -> None:
    """Measure an exported folder beside the dense model, and add what was found to its report.

    Args:
        folder: The folder.
        section: What is measured.
        model: The recipe's model.
        exports: All folders whose size is measured.
        program: Folder of the program that was exported: its pattern and its grids are those that sizes are counted for.
        command: The command line, for the report.

    Raises:
        SparsepassError: See `bench` and `sizes`.
    """
    started = time.perf_counter()
    dense = section.dense(model)
    found: dict[str, Any] = {}
    if section.size:
        found["size"] = _sizes(dense, exports, Program.load(program))
    if section.bench is not None:
        written = ModelSource(source=str(folder), trust_remote_code=model.trust_remote_code)
        found["speed"] = bench(written, dense, settings=section.bench)
    add_to_report(folder, found, stage="measure", command=command, seconds=time.perf_counter() - started)


def _sizes(dense: ModelSource, exports: Sequence[Path], program: Program) -> SizeSection:
    """Sizes of the dense model and of exports, counted for the pattern, the groups and the branches that a program has."""
    patterns = {state.pattern for state in program.sparse.values()}
    branch = next((state.branch for state in program.sparse.values() if state.branch is not None), None)
    grid = next((program.quantized[name] for name in program.sparse if name in program.quantized), None)
    how: dict[str, Any] = {"pattern": patterns.pop()} if len(patterns) == 1 else {}
    if branch is not None:
        how |= {"slorb_k": branch.k, "projection": "fixed" if branch.projection is None else "trainable"}
    if grid is not None:
        how["group_size"] = grid.group_size
    return sizes(dense.source, exports, gguf_file=dense.gguf_file, **how)
