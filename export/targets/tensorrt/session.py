"""A ready session configuration for onnxruntime's TensorRT provider, with its sparsity option on.

The provider builds engines from the ONNX file when a session opens, so it needs the onnxruntime-gpu package and a GPU; no
engine of ours is read. Options are text, as its Python interface takes them.
"""

import contextlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from sparsepass.export.targets.tensorrt.profiles import EnginePlan, shapes
from sparsepass.graph.support import SparsepassError, read_as

CONFIGURATION_FILE: Final = "onnxruntime.json"
PROVIDER: Final = "TensorrtExecutionProvider"
INSTALL: Final = 'pip uninstall --yes onnxruntime, then pip install onnxruntime-gpu "tensorrt>=10.8,<11"'
"""Both packages of onnxruntime fill one folder, so one has to go. Its provider links to TensorRT 10, up to 1.31 at least."""
_FALLBACKS: Final = ("CUDAExecutionProvider", "CPUExecutionProvider")


def session_configuration(plans: Sequence[EnginePlan], *, dtype: str, sparse: bool = True) -> dict[str, Any]:
    """Say for each engine how a session on its graph is opened.

    Args:
        plans: The engines, for their profiles.
        dtype: Type of the model: the provider has to be told which precisions it may use.
        sparse: Whether sparse tactics may be used.

    Returns:
        Engine -> its graph, and providers as `onnxruntime.InferenceSession` takes them.

    Example:
        >>> session_configuration([], dtype="float16")
        {}
    """
    found = {}
    for plan in plans:
        options = {
            "trt_sparsity_enable": str(sparse),
            "trt_fp16_enable": str(dtype == "float16"),
            "trt_bf16_enable": str(dtype == "bfloat16"),
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": f"onnxruntime-cache/{plan.name}",
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": "onnxruntime-cache",
            "trt_detailed_build_log": "True",
        }
        for place, which in enumerate(("min", "opt", "max")):
            text = [
                f"{name}:{'x'.join(map(str, lengths[place]))}"
                for profile in plan.profiles
                for name, lengths in shapes(plan.graph, profile).shapes.items()
            ]
            if text:
                options[f"trt_profile_{which}_shapes"] = ",".join(text)
        found[plan.name] = {"graph": plan.graph.file, "providers": [[PROVIDER, options], *([name, {}] for name in _FALLBACKS)]}
    return found


class _EngineFields(TypedDict):
    """How the graph of an engine is opened."""

    graph: str
    providers: list[tuple[str, dict[str, str]]]


_CONFIGURATION: Final = TypeAdapter(dict[str, _EngineFields])


def read_configuration(folder: str | Path, engine: str) -> tuple[Path, list[tuple[str, dict[str, str]]]]:
    """Read what an export wrote: the graph, and providers for `onnxruntime.InferenceSession(graph, providers=...)`.

    Caches are placed in the folder.

    Raises:
        SparsepassError: If the folder has no such configuration, or no such engine.
    """
    place = Path(folder)
    path = place / CONFIGURATION_FILE
    if not path.is_file():
        raise SparsepassError(f"{path} does not exist; name a folder that the tensorrt target wrote")
    document = read_as(_CONFIGURATION, path)
    if engine not in document:
        raise SparsepassError(f"{path} has no engine {engine!r}; it has {', '.join(document)}")
    providers = []
    for name, options in document[engine]["providers"]:
        placed = {key: str(place / value) if key.endswith("_path") else value for key, value in options.items()}
        providers.append((name, placed))
    return place / document[engine]["graph"], providers


def open_tensorrt_session(folder: str | Path, engine: str = "model") -> Any:
    """Open a session that runs a graph in onnxruntime's TensorRT provider with sparse tactics allowed.

    Args:
        folder: What the tensorrt target wrote.
        engine: ``model``, ``prefill``, ``decode`` or ``encoder``.

    Returns:
        The `onnxruntime.InferenceSession`.

    Raises:
        SparsepassError: If the installed onnxruntime has no such provider, or it cannot be used on this machine.
    """
    import onnxruntime

    graph, providers = read_configuration(folder, engine)
    if PROVIDER not in onnxruntime.get_available_providers():
        raise SparsepassError(
            f"the installed onnxruntime {onnxruntime.__version__} has no {PROVIDER}; in an environment with a GPU, {INSTALL}"
        )
    load_libraries()
    session = onnxruntime.InferenceSession(str(graph), providers=providers)
    if session.get_providers()[0] != PROVIDER:
        raise SparsepassError(
            f"onnxruntime fell back to {session.get_providers()[0]}: {PROVIDER} could not be loaded; its log, on standard "
            f"error, names the library that is missing. The TensorRT and CUDA it was built for have to be there: {INSTALL}"
        )
    return session


def load_libraries() -> None:
    """Load the libraries that the provider links to: pip puts TensorRT and CUDA where the system's linker does not look.

    A library that is loaded already is found by its name. What is not installed is left to the system.
    """
    import onnxruntime

    with contextlib.suppress(ImportError):
        importlib.import_module("tensorrt_libs")  # loads what lies in it, as it does for tensorrt's own bindings
    onnxruntime.preload_dlls()
