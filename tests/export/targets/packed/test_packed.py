"""The target packed: what is packed in each family, what the files hold, and that the loaded model is the program."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from tests.export.targets.packed.packing import NO_KERNELS, inputs, sparse, write
from tests.families import BY_NAME, FAMILIES, captured, tensors_of

from sparsepass.export import export
from sparsepass.export.targets import LoweringContext, parse_target, target_to_text
from sparsepass.export.targets.packed import Packed
from sparsepass.graph import SparsepassError
from sparsepass.graph.packed import PackedLinear, PackedWeight, unpack
from sparsepass.passes import apply_passes

pytestmark = pytest.mark.filterwarnings(NO_KERNELS)

IN_TRANSFORMERS = [family.name for family in FAMILIES if family.name != "convnet"]
# Relative error of the outputs in bfloat16, as the target hf allows it: ViT's tiny head gives small differences of large ones.
TOLERANCE = 5e-2
DENSE = {
    "mixtral": {"experts", "router"},
    "qwen3_moe": {"experts", "router"},
    "vit": {"convolution"},
    "whisper": {"convolution"},
}
LEFT = {"experts": "experts", "router": "TopKRouter", "convolution": "a convolution"}


@pytest.mark.parametrize("slorb", ["", "slorb{k=8}", "slorb{k=8,projection=trainable}"])
@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_every_linear_layer_of_every_family_is_packed_and_gives_the_programs_outputs(
    name: str, slorb: str, tmp_path: Path
) -> None:
    program = sparse(name, slorb)
    artifact = write(program, tmp_path / "packed")
    model = getattr(transformers, artifact.auto_class).from_pretrained(tmp_path / "packed")
    assert type(model) is type(BY_NAME[name].model())
    packed = {path for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert packed == {layer.layer for layer in artifact.packed}
    linear = {p for p, m in BY_NAME[name].model().named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    reasons = {layer.layer: layer.reason for layer in artifact.layers if layer.reason}
    assert all("head" in reasons[path] or "tied" in reasons[path] for path in linear - packed if path in reasons)
    assert linear - packed <= set(reasons) | {"lm_head", "proj_out"}  # a tied head is the embedding's weight
    for kind in DENSE.get(name, ()):
        assert any(LEFT[kind] in reason for reason in reasons.values())
    with torch.no_grad():
        found = model(**inputs(name, torch.bfloat16))
        expected = program(**BY_NAME[name].inputs(3, 6))
    for mine, theirs in zip(tensors_of(found)[:1], tensors_of(expected)[:1], strict=True):
        assert float((mine.float() - theirs).norm() / theirs.norm()) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "qwen3_moe"])
@pytest.mark.parametrize("options", [{}, {"values": "fp16"}, {"values": "int8"}, {"values": "int4", "group_size": 16}])
def test_the_files_hold_the_kept_values_of_the_program(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    program = sparse(name)
    target = Packed(**options)
    lowered = target.lower(program, tmp_path, LoweringContext())
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for layer in lowered.artifact.packed:
        weight = program.tensor(layer.weight) * program.tensor(program.sparse[layer.weight].mask)  # type: ignore[arg-type]
        expected = weight.t() if layer.transposed else weight
        rows, columns = expected.shape
        kept, codes = stored[f"{layer.name}.weight"], stored[f"{layer.name}.codes"]
        assert codes.shape == (rows, columns // 8)
        assert kept.shape == (rows, columns // (4 if target.values == "int4" else 2))
        scales = stored.get(f"{layer.name}.scales")
        group = target.group_size if scales is not None else 0
        packed = PackedWeight(
            values=target.values or "bf16",  # type: ignore[arg-type]
            shape=(rows, columns),
            kept=kept,
            codes=codes,
            scales=scales,
            group_size=group,
        )
        if scales is None:
            assert torch.equal(unpack(packed), expected.to(kept.dtype))
        else:
            steps = scales.float().repeat_interleave(group, 1)[:, :columns]
            assert ((unpack(packed) - expected).abs() <= steps * 0.501).all()
            assert 0 < lowered.artifact.errors[layer.layer] < (0.02 if target.values == "int8" else 0.2)
    checks = {check.name: check for check in target.verify(program, tmp_path, lowered, LoweringContext())}
    assert all(check.held for check in checks.values()), checks
    assert list(checks) == ["pattern", "weights", "layers", "outputs"]


def test_verification_sees_a_changed_value_and_a_broken_code(tmp_path: Path) -> None:
    program = sparse("llama")
    lowered = Packed().lower(program, tmp_path, LoweringContext())
    file = tmp_path / "model.safetensors"
    stored = safetensors.torch.load_file(file)
    name = "model.layers.0.mlp.up_proj"
    stored[f"{name}.weight"][3, 1] += 1
    safetensors.torch.save_file(stored, file, metadata={"format": "pt"})
    checks = {check.name: check for check in Packed().verify(program, tmp_path, lowered, LoweringContext())}
    assert checks["weights"].held is False
    assert name in checks["weights"].summary
    assert checks["pattern"].held


def test_config_json_tells_the_layers_in_groups_that_read_one_input(tmp_path: Path) -> None:
    write(sparse("llama", "slorb{k=8}"), tmp_path, values="int4")
    document = json.loads((tmp_path / "config.json").read_text())
    found = document["quantization_config"]
    assert "sparsity_config" not in json.dumps(document)
    assert found["quant_method"] == "sparsepass"
    assert (found["version"], found["values"], found["group_size"]) == (1, "int4", 64)
    assert ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"] in found[
        "layers"
    ]
    assert ["model.layers.1.mlp.down_proj"] in found["layers"]
    assert found["slorb"]["model.layers.0.mlp.up_proj"] == {"k": 8, "projection": "fixed"}


def test_layers_are_named_as_in_the_files_where_transformers_renames_them(tmp_path: Path) -> None:
    artifact = write(sparse("vit"), tmp_path)
    layer = next(layer for layer in artifact.packed if layer.layer.endswith("q_proj"))
    assert layer.name != layer.layer
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert f"{layer.name}.codes" in stored
    assert layer.name in artifact.settings.layers


def test_what_is_two_four_already_is_packed_without_a_pass(tmp_path: Path) -> None:
    pruned = sparse("llama").to_model()
    from sparsepass.graph import capture

    artifact = write(capture(pruned, BY_NAME["llama"].inputs(2, 8)), tmp_path)
    assert len(artifact.packed) == 14


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "whisper", "t5"])
def test_embedding_and_head_in_int8_are_one_tensor_where_they_are_tied(name: str, tmp_path: Path) -> None:
    program = sparse(name)
    target = Packed(values="int8", embedding="int8")
    lowered = target.lower(program, tmp_path, LoweringContext())
    checks = target.verify(program, tmp_path, lowered, LoweringContext())
    assert all(check.held for check in checks), checks
    bytes_of = {k: t for k, t in safetensors.torch.load_file(tmp_path / "model.safetensors").items() if t.dtype == torch.int8}
    tables = [key for key in bytes_of if key.removesuffix(".weight") in lowered.artifact.settings.embeddings]
    model = getattr(transformers, lowered.artifact.auto_class).from_pretrained(tmp_path)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = name != "mistral"
    assert len(tables) == (1 if is_tied else 2)
    assert (head.weight is embedding.weight) == is_tied == (head.scales is embedding.scales)
    assert head.weight.dtype == torch.int8


def test_the_card_says_how_to_load_and_to_unpack(tmp_path: Path) -> None:
    write(sparse("mixtral"), tmp_path)
    card = (tmp_path / "README.md").read_text()
    for said in ("pip install sparsepass", "import sparsepass", "AutoModelForCausalLM", "sparsepass unpack", "experts"):
        assert said in card


def test_the_report_tells_of_every_layer(tmp_path: Path) -> None:
    result = export(sparse("whisper"), "packed", tmp_path / "out")
    assert result.held
    section = result.report["sparsity"]
    assert section["counts"]["total"]["ran_sparse"]["yes"] == 32
    assert any("convolution" in layer["reason"] for layer in section["layers"])
    assert result.report["artifact"]["details"]["num_packed"] == 32


def test_a_layer_of_another_pattern_or_size_stays_dense_with_its_reason(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=24,
            intermediate_size=36,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).eval()
    program = apply_passes(model, "nm_sparsify{criterion=magnitude}", validate=False)
    artifact = write(program, tmp_path)
    reasons = {layer.layer: layer.reason for layer in artifact.layers if layer.reason}
    assert "its 36 input features are not a multiple of 8" in reasons["model.layers.0.mlp.down_proj"]
    branched = apply_passes(model, ["nm_sparsify{criterion=magnitude}", "slorb{k=12}"], validate=False)
    with pytest.raises(SparsepassError, match=r"down_proj has a SLoRB branch and cannot be packed .*36 input features"):
        write(branched, tmp_path / "branched")
    four_eight = apply_passes(model, "nm_sparsify{criterion=magnitude,pattern=4:8}", validate=False)
    with pytest.raises(SparsepassError, match="no layer of this program can be packed"):
        write(four_eight, tmp_path / "other")


def test_a_program_that_cannot_be_packed_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(SparsepassError, match=r"no layer of this program can be packed .*prune it first"):
        write(captured("llama"), tmp_path)
    with pytest.raises(SparsepassError, match="a plain nn"):
        write(sparse("convnet"), tmp_path)
    with pytest.raises(SparsepassError, match="does more than look up"):
        write(sparse("gemma3"), tmp_path, embedding="int8")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"values": "int5"}, "values=int5 is not known"),
        ({"group_size": 32}, "name one of them"),
        ({"values": "bf16", "group_size": 32}, "has no scales"),
        ({"values": "int4", "group_size": 24}, "16, 32, 64 or a multiple of 128"),
        ({"embedding": "int4"}, "embedding=int4 is not known"),
        ({"dtype": "float64"}, "choose one of these"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SparsepassError, match=said):
        Packed(**options)


def test_text_and_back() -> None:
    target = Packed(values="int4", group_size=32, embedding="int8")
    assert parse_target(target_to_text(target)) == target
    assert target_to_text(Packed()) == "packed"
