"""What a user may set of the engines, checked before anything is loaded."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from sparsepass.export.targets.tensorrt.packages import LOWEST_SM, RUNTIMES
from sparsepass.graph.support import SparsepassError

DEFAULT_TIMEOUT_S: Final = 3600.0

Range = tuple[int, int, int]
"""Smallest, most common and largest length of an axis."""

_NAMES: Final = {75: "Turing", 72: "Volta", 70: "Volta", 62: "Pascal", 61: "Pascal", 60: "Pascal", 87: "Orin"}


@final
@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How engines are built.

    Attributes:
        runtime: Name in `RUNTIMES`; None to take what can build here.
        sm: Compute capabilities to build for, as 86 for SM86; empty for the GPU that is there, or, with tensorrt-rtx and
            without a GPU, for all that it knows from SM80 on.
        profiles: Lengths of axes, each ``AXIS=N``, ``AXIS=MIN:COMMON:MAX`` or the same with ``ENGINE.`` before it.
        timeout_s: Seconds that the builder may take for one engine.
        timing_cache: File that keeps measured times from build to build.
        hardware_compatible: Whether an engine of tensorrt has to run on all GPUs from Ampere on, at some cost of speed.
        one_engine: Whether prefill and decode share one engine (with a profile each, and weights once) instead of two.
        sparse: Whether the builder may use sparse tactics; off, the engine is the dense one to compare with.
        measure: Whether, on a GPU, each engine is built dense too and both are timed.

    Raises:
        SparsepassError: If a value cannot be used.

    Example:
        >>> EngineOptions(sm=(86,), profiles=("decode.batch=1:8:32",)).ranges
        {'decode': {'batch': (1, 8, 32)}}
        >>> EngineOptions(sm=(75,))
        Traceback (most recent call last):
        ...
        sparsepass.SparsepassError: SM75 (Turing) has no 2:4 kernels: they need Ampere (SM80) or newer; ...
    """

    runtime: str | None = None
    sm: tuple[int, ...] = ()
    profiles: tuple[str, ...] = ()
    timeout_s: float = DEFAULT_TIMEOUT_S
    timing_cache: Path | None = None
    hardware_compatible: bool = False
    one_engine: bool = False
    sparse: bool = True
    measure: bool = True

    def __post_init__(self) -> None:
        if self.runtime is not None and self.runtime not in RUNTIMES:
            raise SparsepassError(f"unknown runtime {self.runtime!r} (known are {', '.join(RUNTIMES)})")
        for number in self.sm:
            check_sm(number)
        if self.timeout_s <= 0:
            raise SparsepassError(f"--timeout must be a positive number of seconds, got {self.timeout_s:g}")
        _ = self.ranges

    @property
    def ranges(self) -> dict[str, dict[str, Range]]:
        """Engine (empty: every one) -> axis -> its lengths."""
        found: dict[str, dict[str, Range]] = {}
        for text in self.profiles:
            for item in text.split(","):
                engine, axis, lengths = _parse_range(item.strip())
                found.setdefault(engine, {})[axis] = lengths
        return found


def parse_sm(text: str) -> tuple[int, ...]:
    """Read compute capabilities: ``80,86``, ``sm_86`` or ``8.6``.

    Raises:
        SparsepassError: If one is none, or older than Ampere.

    Example:
        >>> parse_sm("80, sm_86,8.9")
        (80, 86, 89)
    """
    found = []
    for item in text.split(","):
        match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)a?", item.strip().lower())
        if match is None:
            raise SparsepassError(f"--sm {item.strip()!r} is no compute capability; expected such as 86, sm_86 or 8.6")
        number = int(match[1] + match[2])
        check_sm(number)
        if number not in found:
            found.append(number)
    return tuple(found)


def check_sm(number: int) -> None:
    """Refuse GPUs without 2:4 kernels.

    Raises:
        SparsepassError: If it is older than Ampere.
    """
    if number < LOWEST_SM:
        family = f" ({_NAMES[number]})" if number in _NAMES else ""
        raise SparsepassError(
            f"SM{number}{family} has no 2:4 kernels: they need Ampere (SM{LOWEST_SM}) or newer; name another --sm, or use the "
            "onnx target and run the model dense"
        )


def _parse_range(item: str) -> tuple[str, str, Range]:
    match = re.fullmatch(r"(?:(\w+)\.)?(\w+)=(\d+)(?::(\d+):(\d+))?", item)
    if match is None:
        raise SparsepassError(
            f"--profile {item!r} cannot be read; expected AXIS=N or AXIS=MIN:COMMON:MAX, such as batch=1:1:8, or with an "
            "engine before it, decode.batch=1:8:32"
        )
    low = int(match[3])
    lengths = (low, int(match[4] or low), int(match[5] or low))
    if not lengths[0] <= lengths[1] <= lengths[2]:
        raise SparsepassError(f"--profile {item!r}: the lengths must not fall, expected MIN <= COMMON <= MAX")
    return match[1] or "", match[2], lengths
