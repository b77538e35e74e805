"""The end of the demo: the sparse model without its zeros, beside the dense one."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sparsepass.export.report import SpeedSection
    from sparsepass.graph import Program

_VALUES: Final = "bf16"
_DENSE: Final = "dense"


@dataclass(frozen=True, kw_only=True)
class PackedDemo:
    """What came of the packed model.

    Attributes:
        folder: Where it stands.
        held: Whether verification held.
        speed: What was measured, dense beside it.
    """

    folder: Path
    held: bool
    speed: "SpeedSection"

    @property
    def said(self) -> str:
        """What a newcomer should make of it."""
        packed, dense = self.speed.sides
        point = self.speed.main
        gain = None if point is None else point.gain
        faster = "" if gain is None else f"a token comes {gain:.2f} times as fast, "
        memory = ""
        if packed.loaded_bytes and dense.loaded_bytes:
            memory = f"memory is {packed.loaded_bytes / dense.loaded_bytes:.2f} times as large, "
        disk = f"the file {packed.disk_bytes / dense.disk_bytes:.2f} times"
        beside = f"Beside the dense one: {faster}{memory}{disk}."
        return f"Packed, without its zeros, the sparse model runs on kernels of sparsepass. {beside}"


def why_not() -> str:
    """Why packed layers have no kernel here; empty if they have one.

    Example:
        >>> why_not() == "" or "kernel" in why_not().lower()
        True
    """
    from sparsepass.graph.native import TORCH, VARIABLE, best_path, find_kernels
    from sparsepass.graph.support import SparsepassError

    found = find_kernels()
    if isinstance(found, SparsepassError):
        return f"{found}. Install a C++ compiler (g++) and `make clean demo`, or install the wheel of sparsepass"
    return f"{VARIABLE}={TORCH} switches the kernels off; leave it unset" if best_path(_VALUES) == TORCH else ""


def pack_and_measure(
    program: "Program", dense: Any, out: Path, *, tokenizer: Any, document: Mapping[str, Any], command: str
) -> PackedDemo:
    """Export a sparse program packed, and measure it beside the dense model.

    Args:
        program: The sparse program.
        dense: The dense one.
        out: Folder to write.
        tokenizer: Of both.
        document: Sections of the report that are known already.
        command: The command line, for the report.
    """
    from sparsepass.export.report import OF_FILES, add_to_report
    from sparsepass.export.stages import BenchSettings, bench, export

    sections = {name: section for name, section in document.items() if name not in OF_FILES}
    written = export(program, f"packed{{values={_VALUES}}}", out, tokenizer=tokenizer, sections=sections, command=command)
    started = time.perf_counter()
    settings = BenchSettings(batches=(1,), prompt_tokens=16, new_tokens=32, prefill_tokens=256)
    with tempfile.TemporaryDirectory() as place:
        plain = Path(place) / _DENSE
        export(dense, "hf{dtype=bfloat16}", plain, tokenizer=tokenizer, verify=False)
        speed = bench(out, plain, settings=settings)
    seconds = time.perf_counter() - started
    add_to_report(out, {"speed": speed}, stage="bench", command=command, seconds=seconds)
    return PackedDemo(folder=out, held=written.held, speed=speed)
