"""Which package builds, what a machine without one or without a GPU is told, and that every call exists in each of them."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from sparsepass.export import tensorrt_packages
from sparsepass.export.tensorrt import AHEAD_OF_TIME, resolve_targets
from sparsepass.export.tensorrt_build import CHILD
from sparsepass.export.tensorrt_options import EngineOptions
from sparsepass.export.tensorrt_packages import RUNTIMES, Gpu, Installed, abilities, choose, find, gpus
from sparsepass.graph import SparsepassError

ADA = (Gpu(name="GeForce RTX 4090", sm=89),)
TURING = (Gpu(name="Tesla T4", sm=75),)

# Names in the Python bindings of TensorRT 11.4 (the wheel tensorrt-cu13-bindings, which needs its libraries to be imported),
# read from its extension module. Of TensorRT-RTX, whose wheel can be imported anywhere, the module itself is asked.
TENSORRT_11_4 = {
    "Builder", "BuilderFlag", "EngineInspector", "HardwareCompatibilityLevel", "ILogger", "LayerInformationFormat",
    "Logger", "NetworkDefinitionCreationFlag", "OnnxParser", "ProfilingVerbosity", "Runtime", "AMPERE_PLUS",
    "DETAILED", "ERROR", "JSON", "SPARSE_WEIGHTS", "STRONGLY_TYPED", "add_optimization_profile",
    "build_serialized_network", "create_builder_config", "create_engine_inspector", "create_execution_context",
    "create_network", "create_optimization_profile", "create_timing_cache", "desc", "deserialize_cuda_engine",
    "execute_async_v3", "get_engine_information", "get_error", "get_input", "get_tensor_dtype", "get_tensor_mode",
    "get_tensor_name", "get_tensor_profile_shape", "get_tensor_shape", "hardware_compatibility_level", "log", "name",
    "node_name", "node_operator", "num_errors", "num_inputs", "num_io_tensors", "num_layers",
    "num_optimization_profiles", "parse_from_file", "profiling_verbosity", "serialize", "set_flag", "set_input_shape",
    "set_optimization_profile_async", "set_shape", "set_tensor_address", "set_timing_cache", "shape",
}  # fmt: skip
ONLY_RTX = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    there = {module for row in RUNTIMES.values() if row.name not in missing for module in row.modules[:1]}
    monkeypatch.setattr(tensorrt_packages, "_is_there", lambda module: module in there)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_missing_package_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *RUNTIMES)
    assert find(name) is None
    with pytest.raises(SparsepassError) as caught:
        choose(name, ADA)
    said = str(caught.value)
    assert said.startswith(f'{name} is not installed; pip install "sparsepass[{name}]"')
    for row in RUNTIMES.values():
        assert f"- {row.name} is not installed ({row.install})" in said


def test_nothing_installed_suggests_what_works_here(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *RUNTIMES)
    with pytest.raises(SparsepassError, match=r'pip install "sparsepass\[tensorrt-rtx\]"\nOn this machine \(no GPU\)'):
        choose(None, ())
    with pytest.raises(
        SparsepassError, match=r'pip install "sparsepass\[tensorrt\]"\nOn this machine \(GeForce RTX 4090, SM89\)'
    ):
        choose(None, ADA)


def test_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch)
    assert choose(None, ADA).runtime.name == "tensorrt"
    assert choose(None, ()).runtime.name == "tensorrt-rtx"
    assert choose("torch-tensorrt", ADA).module == "torch_tensorrt"
    without(monkeypatch, "tensorrt")
    assert choose(None, ADA).runtime.name == "tensorrt-rtx"


def test_a_machine_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch-tensorrt")
    with pytest.raises(SparsepassError, match="builds on a GPU only, and none is here"):
        choose("tensorrt", ())
    said = abilities(())
    assert "it cannot build here, for want of a GPU; elsewhere it times dense and sparse tactics" in said
    assert "outputs, times and the kernels that were taken stay unknown" in said
    without(monkeypatch, "tensorrt-rtx")
    with pytest.raises(SparsepassError, match="no TensorRT that can build here"):
        choose(None, ())


def test_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SparsepassError, match="known are tensorrt, tensorrt-rtx, torch-tensorrt"):
        find("trt")


def test_gpus_are_asked_from_the_driver() -> None:
    found = gpus()
    assert all(gpu.sm >= 50 and gpu.name for gpu in found)


def installed(name: str) -> Installed:
    return Installed(runtime=RUNTIMES[name], module=RUNTIMES[name].modules[0], version="0")


def test_targets_of_each_package() -> None:
    rtx, standard = installed("tensorrt-rtx"), installed("tensorrt")
    assert resolve_targets(EngineOptions(), rtx, ()) == AHEAD_OF_TIME
    assert resolve_targets(EngineOptions(), rtx, ADA) == (89,)
    assert resolve_targets(EngineOptions(sm=(86,)), rtx, ADA) == (86,)
    assert resolve_targets(EngineOptions(sm=(89,)), standard, ADA) == ()
    with pytest.raises(SparsepassError, match="GeForce RTX 4090 \\(SM89\\), and --sm asks for SM86"):
        resolve_targets(EngineOptions(sm=(86,)), standard, ADA)
    for package in (rtx, standard):
        with pytest.raises(SparsepassError, match="SM75 \\(Turing\\) has no 2:4 kernels"):
            resolve_targets(EngineOptions(), package, TURING)


def test_every_extra_is_there() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for row in RUNTIMES.values():
        assert re.search(rf"^{row.extra} = \[", text, re.MULTILINE)


def names_called(path: Path) -> set[str]:
    """Attributes of TensorRT's objects that a module uses: those reached from names that hold such an object."""
    holders = {"trt", "builder", "network", "parser", "config", "made", "cache", "engine", "tensor", "error"}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            value: Any = node.value
            while isinstance(value, ast.Attribute | ast.Call):
                value = value.value if isinstance(value, ast.Attribute) else value.func
            if isinstance(value, ast.Name) and value.id in holders:
                found.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("_call", "getattr"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str) and a.value}
    return found - {"__members__", "__version__", "__init__", "errors", "log_tells_more", "unknown", "write_bytes"}


def test_every_call_of_the_builder_is_in_both_packages() -> None:
    called = names_called(CHILD)
    assert len(called) > 25
    assert called - ONLY_RTX - TENSORRT_11_4 == set()
    assert called >= ONLY_RTX


def rtx_module() -> Any:
    found = find("tensorrt-rtx")
    if found is None:
        pytest.skip("tensorrt-rtx is to be had for Linux and Windows on x86-64 only")
    import importlib

    return importlib.import_module(found.module)


def test_every_call_of_the_builder_is_in_tensorrt_rtx() -> None:
    trt = rtx_module()
    classes = [value for value in vars(trt).values() if isinstance(value, type)]
    names = set(dir(trt)) | {name for each in classes for name in dir(each)}
    assert names_called(CHILD) - names == set()


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("Builder.create_network", ("flags",)),
        ("Builder.build_serialized_network", ("network", "config")),
        ("OnnxParser.parse_from_file", ("model",)),
        ("IBuilderConfig.set_flag", ("flag",)),
        ("IBuilderConfig.add_optimization_profile", ("profile",)),
        ("IBuilderConfig.set_compute_capability", ("compute_capability", "index")),
        ("IBuilderConfig.create_timing_cache", ("serialized_timing_cache",)),
        ("IBuilderConfig.set_timing_cache", ("cache", "ignore_mismatch")),
        ("IOptimizationProfile.set_shape", ("input", "min", "opt", "max")),
        ("EngineInspector.get_engine_information", ("format",)),
        ("IExecutionContext.set_optimization_profile_async", ("profile_index", "stream_handle")),
        ("IExecutionContext.set_tensor_address", ("name", "memory")),
        ("IExecutionContext.execute_async_v3", ("stream_handle",)),
        ("ICudaEngine.get_tensor_profile_shape", ("name", "profile_index")),
    ],
)
def test_arguments_are_those_of_the_library(method: str, arguments: tuple[str, ...]) -> None:
    """In its order: the calls are positional. pybind11 writes the signature into the docstring."""
    owner, name = method.split(".")
    signature = getattr(getattr(rtx_module(), owner), name).__doc__.strip().splitlines()[0]
    inside = signature[signature.index("(") + 1 :]
    assert tuple(re.findall(r"(?:^|, )(\w+): ", inside))[1 : 1 + len(arguments)] == arguments
