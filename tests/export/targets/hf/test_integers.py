"""The target hf of a quantized program: integers as compressed-tensors stores them, read by stock transformers."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.families import BY_NAME, FAMILIES, captured, tensors_of

from sparsepass.export.pattern import check_pattern
from sparsepass.export.targets import LoweringContext
from sparsepass.export.targets.hf import HuggingFace, load_plain
from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.integer_words import from_words
from sparsepass.graph.integers import integers_of
from sparsepass.graph.program import masked_weight
from sparsepass.passes import apply_passes

UP = "model.layers.0.mlp.up_proj"
# Weights that are no nn.Linear of their own: GPT-2's Conv1D, experts.
REFUSED = {"gpt2": "no nn.Linear", "mixtral": "no nn.Linear", "qwen3_moe": "no nn.Linear"}
CONVOLUTIONS = ("vit", "whisper")


def _program(name: str, options: str = "") -> Program:
    return apply_passes(captured(name), f"nm_sparsify,quantize{options}", validate=False)


def _checks(program: Program, folder: Path, lowered: Any) -> dict[str, Any]:
    return {check.name: check for check in HuggingFace().verify(program, folder, lowered, LoweringContext())}


@pytest.mark.parametrize(("options", "numbers"), [("{group_size=16}", "integers"), ("{format=fp8}", "numbers of fp8")])
@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.name != "convnet"])
def test_every_family_is_loaded_by_stock_transformers_or_refused(name: str, options: str, numbers: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    program = _program(name, options)
    if name in REFUSED:
        with pytest.raises(SparsepassError, match=f"cannot be stored as {numbers}: it is {REFUSED[name]}.*form=dense"):
            HuggingFace().lower(program, tmp_path, LoweringContext())
        assert not (tmp_path / "model.safetensors").exists()
        target = HuggingFace(form="dense")
        dense = target.lower(program, tmp_path, LoweringContext())
        found = target.verify(program, tmp_path, dense, LoweringContext())
        assert all(check.held for check in found), found
        return
    lowered = HuggingFace().lower(program, tmp_path, LoweringContext())
    checks = _checks(program, tmp_path, lowered)
    assert all(check.held for check in checks.values()), checks
    assert "zeros included" in checks["weights"].summary
    assert any("floating-point values on the grid" in note for note in lowered.notes) == (name in CONVOLUTIONS)
    model = load_plain(tmp_path)
    with torch.no_grad():
        output = tensors_of(model(**BY_NAME[name].inputs(3, 6)))[0]
        expected = tensors_of(program(**BY_NAME[name].inputs(3, 6)))[0]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", ["", "{symmetric=false}", "{bits=8,group_size=0}", "{bits=8,symmetric=false,group_size=16}"]
)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_files_hold_the_integers_of_the_program(options: str, dtype: str | None, tmp_path: Path) -> None:
    program = _program("llama", options)
    HuggingFace(dtype=dtype).lower(program, tmp_path, LoweringContext())
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for weight, state in program.quantized.items():
        own, layer = integers_of(program, weight), weight.removesuffix(".weight")
        assert own is not None
        numbers = from_words(stored[f"{layer}.weight_packed"], state.bits, own.columns).short()
        middle = 0 if own.zeros_OG is not None else 2 ** (state.bits - 1)
        assert torch.equal(numbers - middle, own.numbers_OI.short())
        assert torch.equal(stored[f"{layer}.weight_scale"].float(), own.scales_OG.float())
        assert stored[f"{layer}.weight_shape"].tolist() == list(program.tensor(weight).shape)
        assert weight not in stored
    document = json.loads((tmp_path / "config.json").read_text())
    assert "sparsity_config" not in json.dumps(document)
    assert document["quantization_config"]["format"] == "pack-quantized"
    report = check_pattern(tmp_path, expected_sparse=list(program.sparse))
    assert report.conforms
    assert sum(entry.required for entry in report.entries) == len(program.sparse)


@pytest.mark.parametrize(("options", "strategy"), [("format=fp8", "channel"), ("format=fp8,group_size=16", "group")])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_files_hold_fp8(options: str, strategy: str, dtype: str | None, tmp_path: Path) -> None:
    program = _program("llama", f"{{{options}}}")
    lowered = HuggingFace(dtype=dtype).lower(program, tmp_path, LoweringContext())
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for weight in program.quantized:
        own, found = integers_of(program, weight), stored[weight]
        assert own is not None
        assert found.dtype == torch.float8_e4m3fn
        assert torch.equal(found.view(torch.uint8), own.numbers_OI.view(torch.uint8))
        assert torch.equal(stored[f"{weight}_scale"].float(), own.scales_OG.float())
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["format"] == "float-quantized"
    assert said["config_groups"]["group_0"]["weights"]["strategy"] == strategy
    assert "numbers of fp8" in (tmp_path / "README.md").read_text()
    assert check_pattern(tmp_path, expected_sparse=list(program.sparse)).conforms
    if importlib.util.find_spec("compressed_tensors"):
        assert all(check.held for check in _checks(program, tmp_path, lowered).values())


@pytest.mark.parametrize(("size", "strategy"), [(16, "group"), (32, "group"), (64, "channel"), (128, "channel")])
def test_groups_that_fill_some_rows_are_one_grid_for_the_reader(size: int, strategy: str, tmp_path: Path) -> None:
    """Rows of 32 and of 64. With zero points, several grids would be refused."""
    pytest.importorskip("compressed_tensors")
    program = _program("llama", f"{{group_size={size},symmetric=false}}")
    checks = _checks(program, tmp_path, HuggingFace().lower(program, tmp_path, LoweringContext()))
    assert all(check.held for check in checks.values()), checks
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["weights"]["strategy"] for group in groups.values()] == [strategy]


def test_layers_of_fp8_beside_layers_of_integers(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    program = _program("llama", "{targets=*.mlp.*,format=fp8}")
    program = apply_passes(program, "quantize{targets=*.self_attn.*}", validate=False)
    lowered = HuggingFace().lower(program, tmp_path, LoweringContext())
    checks = _checks(program, tmp_path, lowered)
    assert all(check.held for check in checks.values()), checks
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["format"] == "mixed-precision"
    assert [group["format"] for group in said["config_groups"].values()] == ["float-quantized", "pack-quantized"]


@pytest.mark.parametrize("options", ["", "{symmetric=false}", "{format=fp8}"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_callers_of_both_types_get_the_programs_weights(dtype: torch.dtype, options: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    import transformers

    program = _program("qwen2", options)
    HuggingFace().lower(program, tmp_path, LoweringContext())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    with torch.no_grad():
        found = model(**BY_NAME["qwen2"].inputs(2, 6)).logits  # unpacks, where it has not been done yet
        expected = program(**BY_NAME["qwen2"].inputs(2, 6)).logits
    assert float((found.float() - expected).norm() / expected.norm()) < (1e-5 if dtype == torch.float32 else 3e-2)
    assert torch.equal(model.get_parameter(f"{UP}.weight").detach(), masked_weight(program, f"{UP}.weight").to(dtype))


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("weight_packed", "has lost 1 zeros"),
        ("weight_scale", "the program's own integers and scales"),
        ("weight_zero_point", "has lost [1-9][0-9]* zeros"),
        ("weight", "has lost 1 zeros"),
        ("bytes", "has lost 1 zeros"),
    ],
)
def test_a_lost_zero_and_a_changed_scale_are_found(part: str, told: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    program = _program("llama", {"weight": "{format=fp8}", "bytes": "{bits=8}"}.get(part, "{symmetric=false}"))
    lowered = HuggingFace().lower(program, tmp_path, LoweringContext())
    file = tmp_path / "model.safetensors"
    stored = safetensors.torch.load_file(file)
    if part == "weight_packed":  # a weight that is dropped gets another integer
        mask = program.tensor(program.sparse[f"{UP}.weight"].mask)  # type: ignore[arg-type]
        column = int((~mask[0]).nonzero()[0])
        stored[f"{UP}.{part}"][0, column // 8] ^= 1 << 4 * (column % 8) if column % 8 < 7 else -(1 << 28)
    elif part == "bytes":  # the same, where a word holds four
        mask = program.tensor(program.sparse[f"{UP}.weight"].mask)  # type: ignore[arg-type]
        stored[f"{UP}.weight_packed"][0, 0] ^= 1 << 8 * int((~mask[0]).nonzero()[0])
    elif part == "weight":  # the least number that is not 0
        mask = program.tensor(program.sparse[f"{UP}.weight"].mask)  # type: ignore[arg-type]
        stored[f"{UP}.{part}"].view(torch.uint8)[0, int((~mask[0]).nonzero()[0])] = 1
    elif part == "weight_scale":
        stored[f"{UP}.{part}"][0, 0] *= 2
    else:
        stored[f"{UP}.{part}"][0, 0] ^= 1
    safetensors.torch.save_file(stored, file, metadata={"format": "pt"})
    checks = _checks(program, tmp_path, lowered)
    assert checks["weights"].held is False
    assert re.search(told, checks["weights"].summary)
    assert checks["pattern"].held is (part == "weight_scale")


def test_without_the_package_the_files_are_checked_and_the_rest_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = _program("llama")
    lowered = HuggingFace().lower(program, tmp_path, LoweringContext())
    monkeypatch.setattr("sparsepass.export.targets.hf.verify.package_version", lambda name: None)
    checks = _checks(program, tmp_path, lowered)
    assert checks["weights"].held
    assert checks["pattern"].held
    assert checks["outputs"].held is None
    assert "pip install compressed-tensors" in checks["outputs"].summary


def test_dense_values_on_the_grid_are_written_where_that_is_asked_for(tmp_path: Path) -> None:
    program = _program("gpt2")
    target = HuggingFace(form="dense")
    lowered = target.lower(program, tmp_path, LoweringContext())
    assert not lowered.artifact.integers
    assert all(check.held for check in target.verify(program, tmp_path, lowered, LoweringContext()))
    weight = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(load_plain(tmp_path).get_parameter(weight).detach(), masked_weight(program, weight))


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        ("nm_sparsify,slorb{k=8},quantize", "its SLoRB branch would have to be an adapter"),
        (
            "nm_sparsify,quantize{targets=q_proj,symmetric=false},quantize{targets=k_proj}",
            "loads if all layers have one",
        ),
    ],
)
def test_what_has_no_form_is_refused(passes: str, told: str, tmp_path: Path) -> None:
    program = captured("llama")
    for text in passes.split(",quantize"):
        program = apply_passes(program, text if text.startswith("nm_") else f"quantize{text}", validate=False)
    with pytest.raises(SparsepassError, match=told):
        HuggingFace().lower(program, tmp_path, LoweringContext())


def test_features_that_are_no_multiple_of_a_group_are_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = {"input_ids": torch.arange(3, 11)[None]}
    program = apply_passes(model, "nm_sparsify,quantize{group_size=32}", example_inputs=ids, validate=False)
    with pytest.raises(SparsepassError, match="48 input features are no multiple of group_size 32"):
        HuggingFace().lower(program, tmp_path, LoweringContext())
    with pytest.raises(SparsepassError, match="expected integers or dense"):
        HuggingFace(form="packed")  # type: ignore[arg-type]
