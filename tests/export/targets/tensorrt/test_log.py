"""What builders' logs and the engine inspector say, in recorded text of several versions."""

import json

import pytest

from sparsepass.export.targets.tensorrt.log import (
    InspectedLayer,
    TacticTimes,
    Told,
    is_sparse_tactic,
    parse_inspection,
    parse_log,
)

# TensorRT 8.4, from NVIDIA/TensorRT issue 4056 (shortened), 1403 and 2271.
OLD = """\
[08/05/2024-12:06:54] [I] [TRT] (Sparsity) Layers eligible for sparse math: MatMul_401, Conv_619 + Relu_620, Conv_626
[08/05/2024-12:06:54] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: Conv_619 + Relu_620
"""
OLD_NONE_CHOSEN = """\
[TensorRT] INFO: (Sparsity) Layers eligible for sparse math: Conv_0
[TensorRT] INFO: (Sparsity) TRT inference plan picked sparse implementation for layers:
"""
OLD_NONE_ELIGIBLE = """\
[09/16/2022-09:55:37] [I] [TRT] (Sparsity) Layers eligible for sparse math:
[09/16/2022-09:55:37] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers:
"""
# TensorRT 10, at the level INFO, and at the level VERBOSE with names.
NEW = """\
[I] (Sparsity) Found 39 layer(s) eligible to use sparse tactics
[I] (Sparsity) Chose 0 layer(s) using sparse tactics
"""
NEW_NAMES = """\
[V] (Sparsity) Found 3 layer(s) eligible to use sparse tactics: node_linear, node_linear_1 + node_Add_2, node_linear_3
[V] (Sparsity) Chose 1 layer(s) using sparse tactics: node_linear_1 + node_Add_2
"""
# The form of TensorRT 8 and 10's tactic timings (a Caffe classifier's log), with sparse kernels among them.
TIMINGS = """\
[V] *************** Autotuning format combination: Half(1024,1,1,1) -> Half(1000,1,1,1) ***************
[V] --------------- Timing Runner: loss3/classifier (CaskGemmConvolution[0x80000009])
[V] loss3/classifier Set Tactic Name: sm75_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc Tactic: 0xc399fdbffdc34032
[V] Tactic: 0xc399fdbffdc34032 Time: 0.0262451
[V] loss3/classifier Set Tactic Name: sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tt_t_sptensor16x8x32 Tactic: 0x105f56cf03ee5549
[V] Tactic: 0x105f56cf03ee5549 Time: 0.0241811
[V] Fastest Tactic: 0x105f56cf03ee5549 Time: 0.0241811
[V] >>>>>>>>>>>>>>> Chose Runner Type: CaskGemmConvolution Tactic: 0x105f56cf03ee5549
[V] --------------- Timing Runner: prob (CudaSoftMax)
[V] Tactic: 0x00000000000003ea Time: 0.00364102
[V] Fastest Tactic: 0x00000000000003ea Time: 0.00364102
[V] --------------- Timing Runner: prob (CaskSoftMax)
[V] CaskSoftMax has no valid tactics for this config, skipping
"""


def lines(text: str) -> list[str]:
    return text.splitlines()


def test_the_old_wording() -> None:
    found = parse_log(lines(OLD))
    assert found.eligible == Told(count=3, names=frozenset({"MatMul_401", "Conv_619", "Relu_620", "Conv_626"}))
    assert found.chosen == Told(count=1, names=frozenset({"Conv_619", "Relu_620"}))
    found = parse_log(lines(OLD_NONE_CHOSEN))
    assert (found.eligible, found.chosen) == (Told(count=1, names=frozenset({"Conv_0"})), Told(count=0, names=frozenset()))
    found = parse_log(lines(OLD_NONE_ELIGIBLE))
    assert found.eligible == found.chosen == Told(count=0, names=frozenset())


def test_the_new_wording() -> None:
    found = parse_log(lines(NEW))
    assert (found.eligible, found.chosen) == (Told(count=39, names=None), Told(count=0, names=frozenset()))
    found = parse_log(lines(NEW_NAMES))
    assert found.eligible is not None
    assert found.eligible.names == frozenset({"node_linear", "node_linear_1", "node_Add_2", "node_linear_3"})
    assert found.chosen == Told(count=1, names=frozenset({"node_linear_1", "node_Add_2"}))


def test_a_log_without_these_lines_tells_nothing() -> None:
    found = parse_log(["[I] Building engine", "[V] (Sparsity) something new"])
    assert (found.eligible, found.chosen, dict(found.timings)) == (None, None, {})


def test_names_that_are_cut_off_or_stand_for_regions_prove_nothing() -> None:
    cut = parse_log(["[V] (Sparsity) Found 3 layer(s) eligible to use sparse tactics: a, b"])
    assert cut.eligible == Told(count=3, names=None)
    region = parse_log(["[V] (Sparsity) Chose 1 layer(s) using sparse tactics: {ForeignNode[a...z]}"])
    assert region.chosen == Told(count=1, names=None)


def test_of_two_builds_the_last_one_counts() -> None:
    found = parse_log(lines(OLD + NEW))
    assert found.eligible is not None
    assert found.eligible.count == 39
    cut = parse_log(lines(NEW + "[I] (Sparsity) Found 2 layer(s) eligible to use sparse tactics"))
    assert cut.chosen is None, "the line of the build before does not hold for this one"


def test_times_of_dense_and_sparse_tactics() -> None:
    found = parse_log(lines(TIMINGS)).timings
    assert found == {
        "loss3/classifier": TacticTimes(dense_ms=0.0262451, sparse_ms=0.0241811),
        "prob": TacticTimes(dense_ms=0.00364102),
    }


def test_layers_are_traced_to_their_nodes() -> None:
    text = "[V] Registering layer: node_Gemm_0_7 for ONNX node: node_Gemm_0\n" + (
        "[V] (Sparsity) Found 1 layer(s) eligible to use sparse tactics: node_Gemm_0_7\n"
    )
    found = parse_log(lines(text))
    assert found.eligible == Told(count=1, names=frozenset({"node_Gemm_0"}))
    assert parse_inspection({"Layers": [{"Name": "node_Gemm_0_7", "TacticName": "t"}]}, found.nodes) == {
        "node_Gemm_0": InspectedLayer(tactic="t", sparse=False)
    }


@pytest.mark.parametrize(
    ("name", "sparse"),
    [
        ("sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tt_t_tilesize128x128x64_stage3_warpsize2x2x1_sptensor16x8x32", True),
        ("sm80_xmma_fprop_sparse_conv_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs", True),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x32_stage4_warpsize2x2x1_tensor16x8x16", False),
        ("sm75_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x128x64", False),
    ],
)
def test_sparse_kernels_are_told_by_name(name: str, sparse: bool) -> None:
    assert is_sparse_tactic(name) is sparse


def test_the_inspector() -> None:
    # The form of TensorRT 8.6 to 10: a convolution, a fused layer with the nodes it was made of, Myelin, and a bare name.
    both = "[ONNX Layer: a]\x1e[ONNX Layer: b]"
    document = {
        "Layers": [
            {"Name": "conv", "HasSparseWeights": 0, "TacticName": "sm80_xmma_fprop_implicit_gemm"},
            {"Name": "a + b", "HasSparseWeights": 1, "TacticName": "sm80_xmma_sparse_gemm", "Metadata": both},
            {"Name": "node_linear_myl0_23", "TacticName": "sm80_xmma_gemm_f16", "Metadata": "[ONNX Layer: node_linear]"},
            {"Name": "unknown", "LayerType": "Myelin"},
            "bare",
        ],
        "Bindings": ["input"],
    }  # fmt: skip
    found = parse_inspection(json.dumps(document))
    assert {name: layer.sparse for name, layer in found.items()} == {
        "conv": False,
        "a": True,
        "b": True,
        "node_linear": False,
        "unknown": None,
    }
    assert found["a"].tactic == "sm80_xmma_sparse_gemm"


def test_an_inspector_that_failed_tells_nothing() -> None:
    assert parse_inspection(None) == {}
    assert parse_inspection({"error": "no GPU"}) == {}
