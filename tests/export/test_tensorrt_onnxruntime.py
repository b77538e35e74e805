"""The session configuration for onnxruntime's TensorRT provider."""

import json
from pathlib import Path

import pytest

from sparsepass.export.onnx_artifact import OnnxGraph, OnnxValue
from sparsepass.export.tensorrt_onnxruntime import (
    CONFIGURATION_FILE,
    PROVIDER,
    open_tensorrt_session,
    read_configuration,
    session_configuration,
)
from sparsepass.export.tensorrt_profiles import EnginePlan, Profile
from sparsepass.graph import SparsepassError

IDS = OnnxValue(name="input_ids", dtype="int64", axes=("batch", "sequence"))
MASK = OnnxValue(name="attention_mask", dtype="int64", axes=("batch", "sequence"))
GRAPH = OnnxGraph(file="model.onnx", role="model", inputs=(IDS, MASK), outputs=(), num_nodes=1)
PLAN = EnginePlan(
    name="model", graph=GRAPH, profiles=(Profile(name="model", ranges={"batch": (1, 1, 4), "sequence": (1, 8, 16)}),)
)

# Options of the provider in onnxruntime 1.22 to 1.32 (onnxruntime.ai, "TensorRT Execution Provider", Configurations).
KNOWN = {
    "trt_sparsity_enable", "trt_fp16_enable", "trt_bf16_enable", "trt_engine_cache_enable", "trt_engine_cache_path",
    "trt_timing_cache_enable", "trt_timing_cache_path", "trt_detailed_build_log", "trt_profile_min_shapes",
    "trt_profile_opt_shapes", "trt_profile_max_shapes",
}  # fmt: skip


def test_the_configuration_is_ready_for_a_session() -> None:
    found = session_configuration([PLAN], dtype="float16")["model"]
    assert found["graph"] == "model.onnx"
    (name, options), *fallbacks = found["providers"]
    assert name == PROVIDER
    assert set(options) == KNOWN
    assert all(isinstance(value, str) for value in options.values())
    assert options["trt_sparsity_enable"] == options["trt_fp16_enable"] == "True"
    assert options["trt_bf16_enable"] == "False"
    assert options["trt_profile_min_shapes"] == "input_ids:1x1,attention_mask:1x1"
    assert options["trt_profile_max_shapes"] == "input_ids:4x16,attention_mask:4x16"
    assert [each[0] for each in fallbacks] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert session_configuration([PLAN], dtype="bfloat16", sparse=False)["model"]["providers"][0][1]["trt_sparsity_enable"] == (
        "False"
    )


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
    with pytest.raises(SparsepassError, match=r"has no TensorrtExecutionProvider; .* pip install onnxruntime-gpu"):
        open_tensorrt_session(tmp_path)
