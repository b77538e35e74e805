"""The session configuration for onnxruntime's TensorRT provider."""

import json
import sys
from pathlib import Path

import pytest
from tests.export.targets.tensorrt.record_signatures import DATA

from sparsepass.export.targets.onnx.artifact import OnnxGraph, OnnxValue
from sparsepass.export.targets.tensorrt.profiles import EnginePlan, Profile
from sparsepass.export.targets.tensorrt.session import (
    CONFIGURATION_FILE,
    INSTALL,
    PROVIDER,
    load_libraries,
    open_tensorrt_session,
    read_configuration,
    session_configuration,
)
from sparsepass.graph import SparsepassError

IDS = OnnxValue(name="input_ids", dtype="int64", axes=("batch", "sequence"))
MASK = OnnxValue(name="attention_mask", dtype="int64", axes=("batch", "sequence"))
GRAPH = OnnxGraph(file="model.onnx", role="model", inputs=(IDS, MASK), outputs=(), num_nodes=1)
PLAN = EnginePlan(
    name="model", graph=GRAPH, profiles=(Profile(name="model", ranges={"batch": (1, 1, 4), "sequence": (1, 8, 16)}),)
)

# What `record_signatures` read in the provider's library, in the wheel onnxruntime-gpu.
RECORDED = json.loads(DATA.read_text(encoding="utf-8"))["onnxruntime-gpu 1.31.1"]


def test_the_configuration_is_ready_for_a_session() -> None:
    found = session_configuration([PLAN], dtype="float16")["model"]
    assert found["graph"] == "model.onnx"
    (name, options), *fallbacks = found["providers"]
    assert name == PROVIDER
    assert set(options) - set(RECORDED["options"]) == set()
    assert len(options) == 11
    assert all(isinstance(value, str) for value in options.values())
    assert options["trt_sparsity_enable"] == options["trt_fp16_enable"] == "True"
    assert options["trt_bf16_enable"] == "False"
    assert options["trt_profile_min_shapes"] == "input_ids:1x1,attention_mask:1x1"
    assert options["trt_profile_max_shapes"] == "input_ids:4x16,attention_mask:4x16"
    assert [each[0] for each in fallbacks] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert session_configuration([PLAN], dtype="bfloat16", sparse=False)["model"]["providers"][0][1]["trt_sparsity_enable"] == (
        "False"
    )


def test_the_tensorrt_that_is_named_is_the_one_that_the_provider_links_to() -> None:
    assert RECORDED["links_to"] == ["libnvinfer.so.10"]
    assert '"tensorrt>=10.8,<11"' in INSTALL
    script = (Path(__file__).parents[4] / "benchmarks" / "gpu_tensorrt.sh").read_text(encoding="utf-8")
    assert "'tensorrt>=10.8,<11'" in script


def test_it_is_read_back_with_caches_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / CONFIGURATION_FILE).write_text(json.dumps(session_configuration([PLAN], dtype="float16")))
    graph, providers = read_configuration(tmp_path, "model")
    assert graph == tmp_path / "model.onnx"
    assert providers[0][1]["trt_engine_cache_path"] == str(tmp_path / "onnxruntime-cache" / "model")
    with pytest.raises(SparsepassError, match="has no engine 'decode'; it has model"):
        read_configuration(tmp_path, "decode")
    with pytest.raises(SparsepassError, match="name a folder that the tensorrt target wrote"):
        read_configuration(tmp_path / "nowhere", "model")


def test_an_onnxruntime_without_the_provider_is_told_what_to_install(tmp_path: Path) -> None:
    import onnxruntime

    if PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the provider")
    (tmp_path / CONFIGURATION_FILE).write_text(json.dumps(session_configuration([PLAN], dtype="float16")))
    with pytest.raises(SparsepassError, match=r'has no TensorrtExecutionProvider; .* pip install onnxruntime-gpu "tensorrt>='):
        open_tensorrt_session(tmp_path)


class Session:
    """What onnxruntime does when a session opens: the provider works if the libraries it links to are loaded by then."""

    def __init__(self, graph: str, providers: list[tuple[str, dict[str, str]]]) -> None:
        self.graph, self.given = graph, providers
        works = "tensorrt_libs" in sys.modules and "cuda" in LOADED
        self.names = [name for name, _ in providers if works or name == "CPUExecutionProvider"]

    def get_providers(self) -> list[str]:
        return self.names


LOADED: list[str] = []


@pytest.fixture
def gpu_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to open, and an onnxruntime with the provider, in an environment where pip installed all."""
    import onnxruntime

    LOADED.clear()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDER, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: LOADED.append("cuda"))
    monkeypatch.delitem(sys.modules, "tensorrt_libs", raising=False)
    (tmp_path / CONFIGURATION_FILE).write_text(json.dumps(session_configuration([PLAN], dtype="float16")))
    return tmp_path


def test_the_libraries_are_loaded_before_a_session_opens(gpu_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (gpu_build / "tensorrt_libs.py").write_text("")
    monkeypatch.syspath_prepend(gpu_build)
    monkeypatch.setitem(sys.modules, "tensorrt_libs", None)  # so that it is taken out again
    monkeypatch.delitem(sys.modules, "tensorrt_libs")
    session = open_tensorrt_session(gpu_build)
    assert session.get_providers()[0] == PROVIDER
    assert session.given[0][1]["trt_sparsity_enable"] == "True"


def test_a_provider_that_cannot_be_loaded_is_an_error_message(gpu_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_libs", None)  # cannot be imported
    LOADED.clear()
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None)
    with pytest.raises(SparsepassError, match=r"fell back to CPUExecutionProvider: .*tensorrt>=10.8,<11"):
        open_tensorrt_session(gpu_build)


def test_the_onnxruntime_here_can_load_libraries() -> None:
    load_libraries()
