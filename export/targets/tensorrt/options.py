"""The options of engines, checked before anything is loaded."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sparsepass.export.targets.contract import Target, option, option_error
from sparsepass.export.targets.evidence import LOWEST_SM
from sparsepass.export.targets.onnx import check_form

DEFAULT_TIMEOUT_S: Final = 3600.0

Range = tuple[int, int, int]
"""Smallest, most common and largest length of an axis."""

_NAMES: Final = {75: "Turing", 72: "Volta", 70: "Volta", 62: "Pascal", 61: "Pascal", 60: "Pascal", 87: "Orin"}


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
            raise option_error(f"--sm {item.strip()!r} is no compute capability; expected such as 86, sm_86 or 8.6")
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
        raise option_error(
            f"SM{number}{family} has no 2:4 kernels: they need Ampere (SM{LOWEST_SM}) or newer; name another --sm, or use the "
            "onnx target and run the model dense"
        )


@dataclass(frozen=True, kw_only=True)
class EngineTarget(Target):
    """A target that builds engines: its options. `TensorRT` is the one that there is."""

    opset: int | None = None
    task: str | None = None
    form: str = option("qdq", parse=str)
    runtime: str | None = None
    sm: tuple[int, ...] = option((), parse=parse_sm)
    profiles: tuple[str, ...] = option((), flag="profile")
    timeout_s: float = option(DEFAULT_TIMEOUT_S, flag="timeout")
    timing_cache: Path | None = None
    hardware_compatible: bool = False
    one_engine: bool = False
    sparse: bool = True
    measure: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_form(self.form, False, ("qdq", "dense"), "tensorrt")
        if self.runtime is not None:
            from sparsepass.export.targets.tensorrt.packages import RUNTIMES

            if self.runtime not in RUNTIMES:
                raise option_error(f"unknown runtime {self.runtime!r} (known are {', '.join(RUNTIMES)})")
        for number in self.sm:
            check_sm(number)
        if self.timeout_s <= 0:
            raise option_error(f"--timeout must be a positive number of seconds, got {self.timeout_s:g}")
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


def _parse_range(item: str) -> tuple[str, str, Range]:
    match = re.fullmatch(r"(?:(\w+)\.)?(\w+)=(\d+)(?::(\d+):(\d+))?", item)
    if match is None:
        raise option_error(
            f"--profile {item!r} cannot be read; expected AXIS=N or AXIS=MIN:COMMON:MAX, such as batch=1:1:8, or with an "
            "engine before it, decode.batch=1:8:32"
        )
    low = int(match[3])
    lengths = (low, int(match[4] or low), int(match[5] or low))
    if not lengths[0] <= lengths[1] <= lengths[2]:
        raise option_error(f"--profile {item!r}: the lengths must not fall, expected MIN <= COMMON <= MAX")
    return match[1] or "", match[2], lengths
