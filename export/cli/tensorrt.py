"""The options of `sparsepass export` that only the target tensorrt reads."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sparsepass.export.targets.tensorrt import EngineOptions

Runtime = Annotated[
    str | None,
    typer.Option(
        "--runtime",
        help="What builds engines: tensorrt, tensorrt-rtx or torch-tensorrt; by default what is installed and can build here.",
    ),
]
Sm = Annotated[
    str | None,
    typer.Option(
        "--sm",
        help="Compute capabilities to build for: 80,86. By default this machine's GPU, or, with tensorrt-rtx and without a "
        "GPU, 80,86,89,120.",
    ),
]
Profile = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        help="Lengths of an axis: AXIS=N or AXIS=MIN:COMMON:MAX, for one engine with ENGINE. before it: "
        "decode.batch=1:8:32. Separated by commas, or repeated.",
    ),
]
Timeout = Annotated[
    float | None, typer.Option("--timeout", help="Seconds that the builder may take for one engine; by default 3600.")
]
TimingCache = Annotated[
    Path | None, typer.Option("--timing-cache", help="File that keeps the builder's measured times from build to build.")
]
HardwareCompatible = Annotated[
    bool,
    typer.Option("--hardware-compatible", help="Engines that run on all GPUs from Ampere on, at some cost of speed."),
]
OneEngine = Annotated[
    bool,
    typer.Option("--one-engine", help="One engine with two profiles for prefill and decode: weights once, not twice."),
]
NoSparse = Annotated[bool, typer.Option("--no-sparse", help="Build without sparse tactics: the dense engine to compare with.")]
NoMeasure = Annotated[
    bool,
    typer.Option(
        "--no-measure", help="On a GPU, do not time dense against sparse (for which tensorrt builds dense engines too)."
    ),
]


def engine_options(
    *,
    runtime: str | None,
    sm: str | None,
    profiles: list[str] | None,
    timeout_s: float | None,
    timing_cache: Path | None,
    hardware_compatible: bool,
    one_engine: bool,
    sparse: bool,
    measure: bool,
) -> "EngineOptions | None":
    """Bring the options together; None if none was given.

    Raises:
        SparsepassError: If one cannot be used.
    """
    given = (runtime, sm, profiles, timeout_s, timing_cache)
    if all(value is None for value in given) and not (hardware_compatible or one_engine) and sparse and measure:
        return None
    from sparsepass.export.targets.tensorrt import DEFAULT_TIMEOUT_S, EngineOptions, parse_sm

    return EngineOptions(
        runtime=runtime,
        sm=parse_sm(sm) if sm is not None else (),
        profiles=tuple(profiles or ()),
        timeout_s=DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s,
        timing_cache=timing_cache.absolute() if timing_cache is not None else None,
        hardware_compatible=hardware_compatible,
        one_engine=one_engine,
        sparse=sparse,
        measure=measure,
    )
