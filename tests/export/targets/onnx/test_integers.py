"""Quantized programs as ONNX: the file holds the program's own integers, and onnxruntime gives the program's outputs."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from tests.export.targets.zeros import check_zeros
from tests.families import BY_NAME, FAMILIES, captured
from torch import nn

from sparsepass.export.pattern import check_pattern
from sparsepass.export.stages.exporting import export
from sparsepass.export.targets.onnx import Onnx, OnnxArtifact, generate_greedy, lower_onnx, verify_onnx
from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.equivalence import OnnxFile
from sparsepass.graph.integers import integers_of
from sparsepass.passes import apply_passes

ROUNDING = 1e-5
"""Largest difference of an output in float32, relative to the largest output; 3e-7 was measured."""
LAYERS = {"llama": ("q_proj", "k_proj", "up_proj", "down_proj"), "gpt2": ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")}
GRIDS = (
    "bits=4,group_size=16", "bits=4,group_size=0,symmetric=false",
    "bits=8,group_size=0", "bits=8,group_size=32,symmetric=false",
)  # fmt: skip
FP8 = ("format=fp8", "format=fp8,group_size=16")


@functools.cache
def every_grid(name: str, method: str) -> Program:
    """A program with each grid in layers of one kind."""
    pairs = zip(LAYERS[name], GRIDS, strict=True)
    rounding = "joint" if method == "joint" else "rtn"
    passes = [f"quantize{{targets={layer},method={rounding},{grid}}}" for layer, grid in pairs]
    if method == "awq":
        passes.insert(0, "awq_scale{group_size=16}")
    calibration = None if method == "rtn" else BY_NAME[name].inputs(4, 8)["input_ids"]
    text = ",".join(("nm_sparsify{criterion=magnitude}", *passes))
    program = apply_passes(captured(name), text, calibration=calibration, validate=False)
    assert check_zeros(program) > 0
    return program


def quantized(name: str, options: str, passes: str = "nm_sparsify{criterion=magnitude}") -> Program:
    return apply_passes(captured(name), f"{passes},quantize{{{options}}}", validate=False)


def layers(
    options: str = "group_size=16", *, passes: str = "", features: int = 64, dtype: torch.dtype = torch.float32
) -> Program:
    """A program of two layers, the first of which is 2:4 and quantized."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, 16)).to(dtype)
    with torch.no_grad():
        next(iter(model.parameters()))[3, :32] = 0  # groups without a scale
    text = f"nm_sparsify{{criterion=magnitude}},{passes}quantize{{{options}}}"
    return apply_passes(model, text, example_inputs=torch.randn(4, features).to(dtype), validate=False)


def written(program: Program, folder: Path, **options: Any) -> tuple[OnnxArtifact, dict[str, Any]]:
    artifact = lower_onnx(program, folder, **options)
    found = verify_onnx(program, folder, artifact)
    assert found["holds"], json.dumps(found, indent=1)
    if artifact.dtype == "float32":
        assert max(case["max_relative"] for case in found["outputs"]["cases"]) < ROUNDING
    return artifact, found


def forms(artifact: OnnxArtifact) -> dict[str, str]:
    """Initializer -> how it is stored, of the weights of products."""
    return {one.initializer: one.form for found in artifact.weights.values() for one in found if one.axis is not None}


def changed(folder: Path, name: str, change: Any) -> None:
    """Change the numbers of an initializer in a file."""
    model = onnx.load(folder / "model.onnx")
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, folder / "model.onnx")


@pytest.mark.parametrize("form", ["qdq", "matmulnbits"])
@pytest.mark.parametrize("method", ["rtn", "awq", "joint"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_file_holds_the_integers_of_the_program(name: str, method: str, form: str, tmp_path: Path) -> None:
    program = every_grid(name, method)
    artifact, found = written(program, tmp_path, form=form, with_past=False)
    assert found["weights"]["num_integers"] == len(program.quantized) == 2 * len(GRIDS)
    graph = ir.load(tmp_path / "model.onnx").graph
    for weight, state in program.quantized.items():
        (one,) = artifact.weights[weight]
        assert one.form == form
        own, stored = integers_of(program, weight), graph.initializers[weight].const_value
        assert own is not None
        assert stored is not None
        if form == "qdq":
            assert stored.dtype.name == f"{'' if own.zeros_OG is None else 'U'}INT{state.bits}"
            numbers = stored.numpy().astype(np.int16)
            assert np.array_equal(numbers if one.axis == 1 else numbers.T, own.numbers_OI.short().numpy())
        else:
            row = own.numbers_OI[0].short().numpy() + (0 if own.zeros_OG is not None else 1 << state.bits - 1)
            packed = stored.numpy()[0].reshape(-1)
            halves = np.stack([packed & 15, packed >> 4], 1).reshape(-1) if state.bits == 4 else packed
            assert np.array_equal(halves[: len(row)], row)


@pytest.mark.parametrize(("name", "form"), [("llama", "qdq"), ("gpt2", "matmulnbits")])
def test_a_decoder_with_its_cache(name: str, form: str, tmp_path: Path) -> None:
    program = every_grid(name, "rtn")
    artifact, found = written(program, tmp_path, form=form)
    assert artifact.kind == "decoder-with-past"
    assert found["weights"]["num_integers"] == len(program.quantized)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.name not in ("llama", "gpt2")])
def test_every_family_by_dequantize_linear(name: str, tmp_path: Path) -> None:
    program = quantized(name, "group_size=16")
    artifact, found = written(program, tmp_path, with_past=False)
    assert found["weights"]["num_integers"] > 0
    told = " ".join(artifact.notes)
    for weight in program.quantized:
        for one in artifact.weights[weight]:
            is_convolution = program.tensor(weight).dim() > 3 or one.op == "Conv"
            assert one.form == "qdq" or (is_convolution and "its groups span several positions of the kernel" in told), one
            assert bool(one.reason) == (one.form == "floats")


@pytest.mark.parametrize("options", FP8)
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "whisper"])
def test_fp8_by_dequantize_linear(name: str, options: str, tmp_path: Path) -> None:
    """onnxruntime's CPU provider runs it."""
    program = quantized(name, options)
    artifact, found = written(program, tmp_path, form="qdq" if name == "gpt2" else "matmulnbits", with_past=False)
    assert artifact.opset == (21 if "group_size" in options else 20)
    assert any(note.startswith("fp8: ") for note in artifact.notes)
    assert not any("rounds activations to 8 bits" in note for note in artifact.notes)
    for file in artifact.expected_sparse:
        graph = ir.load(tmp_path / file).graph
        for weight in program.quantized:
            own = integers_of(program, weight)
            assert own is not None
            for one in artifact.weights[weight]:
                if one.file != file or one.form == "floats":
                    continue
                assert one.reason == ("" if name == "gpt2" else "no MatMulNBits, because it takes integers, and these are fp8")
                stored = graph.initializers[one.initializer].const_value
                assert stored is not None
                assert stored.dtype == ir.DataType.FLOAT8E4M3FN
                if name == "gpt2":
                    numbers = stored.numpy().astype(np.float32)
                    assert np.array_equal(numbers if one.axis == 1 else numbers.T, own.numbers_OI.float().numpy())
    assert found["weights"]["num_integers"] > 0


@pytest.mark.parametrize(
    ("form", "dtype", "options"),
    [
        ("qdq", torch.float16, "group_size=16,symmetric=false"),
        ("matmulnbits", torch.bfloat16, "group_size=16,symmetric=false"),
        ("qdq", torch.float16, "format=fp8"),
    ],
)
def test_other_types(form: str, dtype: torch.dtype, options: str, tmp_path: Path) -> None:
    program = quantized("bert", options)
    name = str(dtype).removeprefix("torch.")
    _, found = written(program, tmp_path, form=form, dtype=name)
    scale = ir.load(tmp_path / "model.onnx").graph.initializers["pooler.dense.weight_scale"].const_value
    assert scale is not None
    assert scale.dtype.name == name.upper()
    assert found["weights"]["num_integers"] == len(program.quantized)


@pytest.mark.parametrize("form", ["qdq", "matmulnbits", "dense"])
def test_inputs_of_bfloat16(form: str, tmp_path: Path) -> None:
    """A module of torch's own, whose input is a float: numpy knows no bfloat16, and the session takes float32."""
    artifact, found = written(layers(dtype=torch.bfloat16), tmp_path, form=form)
    assert artifact.dtype == "bfloat16"
    assert "example inputs" in found["outputs"]["cases"][0]["case"]


def test_experts_are_multiplied_one_by_one(tmp_path: Path) -> None:
    program = quantized("mixtral", "group_size=16,symmetric=false")
    artifact, _ = written(program, tmp_path, form="matmulnbits", with_past=False)
    stored = artifact.weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert [(one.form, one.op, one.shape) for one in stored] == [("matmulnbits", "MatMulNBits", (128, 2, 8))] * 4


@pytest.mark.parametrize("form", ["qdq", "matmulnbits"])
def test_a_short_last_group(form: str, tmp_path: Path) -> None:
    artifact, _ = written(layers("group_size=128", features=576), tmp_path, form=form)
    scale = ir.load(tmp_path / "model.onnx").graph.initializers["0.weight_scale"]
    assert scale.shape is not None
    assert 5 in scale.shape.numpy()
    assert forms(artifact)["0.weight"] == form


def test_one_scale_a_row_is_repeated_for_blocks(tmp_path: Path) -> None:
    written(layers("group_size=0", features=576), tmp_path, form="matmulnbits")
    (node,) = (node for node in ir.load(tmp_path / "model.onnx").graph if node.op_type == "MatMulNBits")
    assert node.attributes.get_int("block_size") == 128


def test_what_is_no_product_of_matrices_is_dequantized(tmp_path: Path) -> None:
    program = apply_passes(
        nn.Sequential(nn.Conv1d(16, 8, 3), nn.ReLU(), nn.Linear(6, 4)),
        "nm_sparsify{criterion=magnitude},quantize{group_size=16}",
        example_inputs=torch.randn(2, 16, 8),
        validate=False,
    )
    artifact, _ = written(program, tmp_path, form="matmulnbits")
    assert forms(artifact)["0.weight"] == "qdq"
    assert "0.weight: no MatMulNBits, because its weight has 3 axes" in artifact.notes


def test_an_embedding_is_looked_up_before_it_is_multiplied(tmp_path: Path) -> None:
    program = apply_passes(captured("llama"), "quantize_embedding", validate=False)
    artifact, found = written(program, tmp_path, with_past=False)
    assert found["weights"]["num_integers"] == 1
    graph = ir.load(tmp_path / "model.onnx").graph
    readers = {use.node.op_type for use in graph.initializers["model.embed_tokens.weight"].uses()}
    assert readers == {"Gather", "DequantizeLinear"}, "the rows that are looked up, and the tied head"
    changed(tmp_path, "model.embed_tokens.weight_scale", lambda scales: scales.__imul__(2))
    assert verify_onnx(program, tmp_path, artifact)["weights"]["differing"] == ["model.embed_tokens.weight"]


def test_dense_values_where_that_is_asked_for(tmp_path: Path) -> None:
    artifact, found = written(layers(), tmp_path, form="dense")
    assert set(forms(artifact).values()) == {"floats"}
    assert (artifact.opset, found["weights"]["num_integers"]) == (20, 0)


def test_a_scale_that_the_type_cannot_hold(tmp_path: Path) -> None:
    program = layers("group_size=0,bits=8", dtype=torch.float16)
    program.tensor(program.quantized["0.weight"].scales)[0, 0] = 3e-8
    artifact, _ = written(program, tmp_path)
    assert forms(artifact)["0.weight"] == "floats"
    said = "0.weight: floating-point values on their grid, because a scale of bfloat16 does not fit float16"
    assert said in artifact.notes


@pytest.mark.parametrize(
    ("options", "form", "opset", "expected"),
    [
        ("group_size=16", "qdq", None, 21),
        ("bits=8,group_size=0", "qdq", None, 20),
        ("bits=8,group_size=0", "qdq", 18, 18),
        ("group_size=16", "matmulnbits", 18, 18),
        ("group_size=16", "dense", 18, 18),
        ("format=fp8", "qdq", 19, 19),
        ("format=fp8", "matmulnbits", 18, 18),
    ],
)
def test_the_operator_set_is_what_is_needed(options: str, form: str, opset: int | None, expected: int, tmp_path: Path) -> None:
    artifact, _ = written(layers(options), tmp_path, form=form, opset=opset)
    assert artifact.opset == expected


@pytest.mark.parametrize("options", ["group_size=16", "bits=8,group_size=16", "bits=4,group_size=0"])
def test_a_lower_operator_set_is_refused(options: str, tmp_path: Path) -> None:
    with pytest.raises(SparsepassError, match=r"opset 20 has no DequantizeLinear for .*give opset=21 .*form=matmulnbits"):
        lower_onnx(layers(options), tmp_path, opset=20)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SparsepassError, match=r"opset 18 has no DequantizeLinear for fp8, one scale a row, .*give opset=19 "):
        lower_onnx(layers("format=fp8"), tmp_path, opset=18)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("qdq", "group_size=16"), ("qdq", "group_size=16,symmetric=false"), ("qdq", "bits=8,group_size=0"),
        ("matmulnbits", "group_size=16"), ("matmulnbits", "bits=8,group_size=0,symmetric=false"),
        ("fold", "group_size=16"), ("fold", "group_size=16,symmetric=false"), ("qdq", FP8[0]), ("qdq", FP8[1]),
    ],
)  # fmt: skip
def test_a_lost_zero_is_found(form: str, options: str, tmp_path: Path) -> None:
    folds = form == "fold"
    program = layers(options, passes="slorb{k=16}," if folds else "")
    artifact, _ = written(program, tmp_path, form="matmulnbits" if folds else form, fold_slorb=folds)
    assert check_pattern(tmp_path, expected_sparse=artifact.expected_sparse["model.onnx"]).conforms
    mask = program.tensor(program.sparse["0.weight"].mask)  # type: ignore[arg-type]
    column = int((~mask[0]).nonzero()[0])

    def lose(array: Any) -> None:
        if form == "qdq":
            row = (0, column) if array.shape[0] == 32 else (column, 0)
            array[row] = 1 if "fp8" in options else int(array[row]) ^ 1
        else:
            half = program.quantized["0.weight"].bits == 4
            array.reshape(32, -1)[0, column // 2 if half else column] ^= 16 if half and column % 2 else 1

    changed(tmp_path, "0.weight", lose)
    report = check_pattern(tmp_path, expected_sparse=artifact.expected_sparse["model.onnx"])
    assert not report.conforms
    assert "groups of 4 have more than 2 nonzeros" in report.failures[0].reason
    found = verify_onnx(program, tmp_path, artifact)
    assert (found["holds"], found["weights"]["differing"]) == (False, ["0.weight"])
    assert not found["pattern"]["model.onnx"]["conforms"]


@pytest.mark.parametrize("part", ["scale", "zero_point"])
@pytest.mark.parametrize("form", ["qdq", "matmulnbits"])
def test_a_changed_scale_or_zero_point_is_found(form: str, part: str, tmp_path: Path) -> None:
    program = layers("bits=8,group_size=16,symmetric=false")
    artifact, _ = written(program, tmp_path, form=form)
    changed(tmp_path, f"0.weight_{part}", lambda array: array.__setitem__((0, 0), array[0, 0] + 1))
    found = verify_onnx(program, tmp_path, artifact)
    assert found["weights"]["differing"] == ["0.weight"]
    assert found["pattern"]["model.onnx"]["conforms"] is (part == "scale")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", ["group_size=16", "group_size=16,symmetric=false", "group_size=32"])
def test_branches_go_into_zero_points(options: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Outputs are compared with the program, which has its branches. With groups of zeros, and k of two groups."""
    program = layers(options, passes="slorb{k=32},", dtype=dtype)
    artifact, _ = written(program, tmp_path, form="matmulnbits", fold_slorb=True)
    graph = ir.load(tmp_path / "model.onnx").graph
    assert [node.op_type for node in graph if node.op_type in ("MatMulNBits", "ReduceSum", "Reshape")] == ["MatMulNBits"]
    points = graph.initializers["0.weight_zero_point"]
    assert points.dtype is not None
    assert points.dtype.is_floating_point()
    assert not any("slorb" in name for name in graph.initializers)
    report = check_pattern(tmp_path, expected_sparse=artifact.expected_sparse["model.onnx"])
    assert ["SLoRB folded" in entry.reason for entry in report.entries if entry.verdict == "conforms"] == [True]
    changed(tmp_path, "0.weight_zero_point", lambda array: array.__setitem__((0, 0), array[0, 0] + 0.1))
    assert verify_onnx(program, tmp_path, artifact)["weights"]["differing"] == ["0.weight"]


def test_a_language_model_with_folded_branches(tmp_path: Path) -> None:
    program = quantized("llama", "group_size=16", "nm_sparsify{criterion=magnitude},slorb{k=16}")
    artifact, _ = written(program, tmp_path, form="matmulnbits", fold_slorb=True)
    assert artifact.kind == "decoder-with-past"
    assert set(forms(artifact).values()) >= {"matmulnbits"}
    (tmp_path / "unfolded").mkdir()
    lower_onnx(program, tmp_path / "unfolded", form="matmulnbits")
    ids = BY_NAME["llama"].inputs(2, 6)["input_ids"]
    folded, unfolded = (generate_greedy(folder, ids, 8) for folder in (tmp_path, tmp_path / "unfolded"))
    assert np.array_equal(folded.tokens, unfolded.tokens)
    assert np.abs(folded.margins - unfolded.margins).max() < 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
@pytest.mark.parametrize("options", ["group_size=16", "group_size=16,symmetric=false", "group_size=32"])
def test_folded_branches_equal_the_graph_that_has_operators_for_them(
    options: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    program = layers(options, passes="slorb{k=32},", dtype=dtype)
    outputs = []
    for name in ("folded", "unfolded"):
        (tmp_path / name).mkdir()
        lower_onnx(program, tmp_path / name, form="matmulnbits", fold_slorb=name == "folded")
        (output,) = OnnxFile(tmp_path / name / "model.onnx").run(program.example_inputs).values()
        outputs.append(output.double())
    assert float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()) < tolerance


def test_zero_points_that_are_no_integers_need_the_file_to_say_why(tmp_path: Path) -> None:
    program = layers(passes="slorb{k=16},")
    artifact, _ = written(program, tmp_path, form="matmulnbits", fold_slorb=True)
    for damaged, said in ((None, "not stored as packed integers"), ("{", "is damaged"), ('{"0.weight": "?"}', "does not fit")):
        model = onnx.load(tmp_path / "model.onnx")
        (note,) = (each for each in model.metadata_props if each.key == "sparsepass.slorb_folded")
        if damaged is None:
            model.metadata_props.remove(note)
        else:
            note.value = damaged
        report = check_pattern(model, expected_sparse=artifact.expected_sparse["model.onnx"])
        assert said in report.failures[0].reason


@pytest.mark.parametrize(
    ("passes", "options", "dtype", "said"),
    [
        ("", "group_size=16", None, "the program has no SLoRB branch"),
        ("slorb{k=16,projection=trainable},", "group_size=16", None, "its projection is trainable"),
        ("slorb{k=16},", "group_size=32", None, "k=16 is no multiple of its groups (int4, groups of 32)"),
        ("slorb{k=16},", "group_size=0", None, "k=16 is no multiple of its groups (int4, one scale a row)"),
        ("slorb{k=16},", "group_size=16,bits=8", None, "takes 8 bits with integer zero points only"),
        ("slorb{k=16},", "group_size=16", "bfloat16", "bfloat16 has 8 bits for both"),
    ],
)
def test_branches_that_cannot_be_folded(passes: str, options: str, dtype: str | None, said: str, tmp_path: Path) -> None:
    program = layers(options, passes=passes)
    if dtype:
        program = quantized("llama", options, f"nm_sparsify{{criterion=magnitude}},{passes[:-1]}")
    with pytest.raises(SparsepassError, match=re.escape(said)):
        lower_onnx(program, tmp_path, form="matmulnbits", fold_slorb=True, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_onnxruntime_refuses_eight_bits_with_such_zero_points(tmp_path: Path) -> None:
    """Why `fold_slorb` is for 4 bits: if this passes with a newer version, 8 bits can be folded, too."""
    import onnxruntime

    program = layers("bits=8,group_size=16,symmetric=false")
    lower_onnx(program, tmp_path, form="matmulnbits")
    model = onnx.load(tmp_path / "model.onnx")
    (points,) = (each for each in model.graph.initializer if each.name == "0.weight_zero_point")
    points.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(points).astype(np.float32), points.name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match="does not support 8-bit weights with floating-point zero points"):
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_options_that_do_not_fit_are_refused_at_once() -> None:
    with pytest.raises(
        SparsepassError, match="form=int4 is not known to the target onnx; expected qdq or matmulnbits or dense"
    ):
        Onnx(form="int4")
    with pytest.raises(SparsepassError, match="give form=matmulnbits, not qdq"):
        Onnx(fold_slorb=True)


def test_the_report_says_what_became_of_each_weight(tmp_path: Path) -> None:
    result = export(layers(), Onnx(form="matmulnbits"), tmp_path / "out")
    assert result.held
    text = (tmp_path / "out" / "report.md").read_text()
    assert "integers: 1 weights by MatMulNBits" in text
    assert "1 of them are the program's own integers" in text


def test_other_sessions_compute_with_whole_activations_too(tmp_path: Path) -> None:
    """`compare` and `eval` open the file on a way of their own."""
    program = apply_passes(
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)),
        "quantize{group_size=16}",
        example_inputs=torch.randn(2, 3, 64),  # MatMul, not Gemm
        validate=False,
    )
    lower_onnx(program, tmp_path)
    inputs = {name: program.example_inputs[name] for name in program.input_names}
    with torch.no_grad():
        (found,) = OnnxFile(tmp_path / "model.onnx").run(inputs).values()
        (expected,) = program.run(inputs)
    assert float((found - expected).abs().max() / expected.abs().max()) < ROUNDING
