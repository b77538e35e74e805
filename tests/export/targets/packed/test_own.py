"""The target packed of a quantized program: its own integers and scales, never rounded twice, and no zero lost."""

import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from tests.export.targets.packed.packing import NO_KERNELS, inputs, sparse, write
from tests.families import FAMILIES, captured, tensors_of

from sparsepass.export.targets import LoweringContext
from sparsepass.export.targets.packed import Packed
from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.integers import integers_of
from sparsepass.graph.load import check_model
from sparsepass.graph.packed import PackedWeight, unpack
from sparsepass.passes import apply_passes

pytestmark = pytest.mark.filterwarnings(NO_KERNELS)

IN_TRANSFORMERS = [family.name for family in FAMILIES if family.name != "convnet"]
UP = "model.layers.0.mlp.up_proj"


def _stored(folder: Path, name: str, values: str, group_size: int) -> PackedWeight:
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    kept, codes = stored[f"{name}.weight"], stored[f"{name}.codes"]
    shape = kept.shape[0], codes.shape[1] * 8
    scales = stored[f"{name}.scales"]
    return PackedWeight(values=values, shape=shape, kept=kept, codes=codes, scales=scales, group_size=group_size)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_every_family_keeps_its_integers(name: str, tmp_path: Path) -> None:
    program = apply_passes(sparse(name), "quantize{group_size=16,clip=weights}", validate=False)
    target = Packed()
    lowered = target.lower(program, tmp_path, LoweringContext())
    artifact = lowered.artifact
    assert (artifact.own, artifact.settings.values, artifact.settings.group_size) == (True, "int4", 16)
    assert not artifact.errors
    assert artifact.packed
    for layer in artifact.packed:
        own = integers_of(program, layer.weight)
        assert own is not None
        packed = _stored(tmp_path, layer.name, "int4", 16)
        assert torch.equal(unpack(packed), own.weight_OI)
        assert packed.scales is not None
        assert torch.equal(packed.scales, own.scales_OG)
    checks = target.verify(program, tmp_path, lowered, LoweringContext())
    assert all(check.held for check in checks), checks
    assert any("the program's own int4, zeros included" in check.summary for check in checks)
    check_model(tmp_path)  # as `bench` and recipes do before anything runs
    model = getattr(transformers, artifact.auto_class).from_pretrained(tmp_path)
    with torch.no_grad():
        mine = tensors_of(model(**inputs(name, torch.bfloat16)))[0]
        theirs = tensors_of(program(**inputs(name, torch.float32)))[0]
    assert float((mine.float() - theirs).norm() / theirs.norm()) < 0.1, "the kernels round activations to bytes"


def test_experts_are_on_their_grids_and_the_notes_say_so(tmp_path: Path) -> None:
    artifact = Packed().lower(apply_passes(sparse("mixtral"), "quantize", validate=False), tmp_path, LoweringContext()).artifact
    assert all(".experts." in name for name in artifact.rounded)
    assert any(f"{len(artifact.rounded)} weights that are quantized and not packed" in note for note in artifact.notes)


@pytest.mark.parametrize("options", ["{bits=8,group_size=0}", "{group_size=128}", "{bits=8,group_size=32}"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_grids_and_types(options: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
        )
    ).to(dtype)  # type: ignore[arg-type]
    ids = {"input_ids": torch.arange(3, 11)[None]}
    program = apply_passes(model.eval(), f"nm_sparsify,quantize{options}", example_inputs=ids, validate=False)
    target = Packed()
    lowered = target.lower(program, tmp_path, LoweringContext())
    assert all(check.held for check in target.verify(program, tmp_path, lowered, LoweringContext()))
    for layer in lowered.artifact.packed:
        own = integers_of(program, layer.weight)
        assert own is not None
        settings = lowered.artifact.settings
        assert torch.equal(unpack(_stored(tmp_path, layer.name, settings.values, settings.group_size)), own.weight_OI)


def test_a_joint_program_with_a_branch_and_an_int8_embedding(tmp_path: Path) -> None:
    program = sparse("llama", "slorb{k=8}")
    calibration = inputs("llama", torch.float32)
    program = apply_passes(program, "quantize{method=joint}", calibration=calibration, validate=False)
    target = Packed(embedding="int8")
    lowered = target.lower(program, tmp_path, LoweringContext())
    assert all(check.held for check in target.verify(program, tmp_path, lowered, LoweringContext()))
    assert list(lowered.artifact.errors) == ["model.embed_tokens"], "only the embedding is rounded here"
    assert "packed as int4, the program's own" in lowered.artifact.notes[0]


def _quantized(passes: str) -> Program:
    return apply_passes(captured("llama"), f"nm_sparsify{passes}", validate=False)


@pytest.mark.parametrize(
    ("passes", "options", "told"),
    [
        (",quantize{symmetric=false}", {}, "no zero points.*symmetric=true"),
        (",quantize{format=fp8}", {}, "is fp8; quantize with format=int, or write the target hf or onnx"),
        (",quantize{targets=q_proj},quantize{targets=up_proj,bits=8}", {}, "holds integers of one grid.*several"),
        (",quantize", {"values": "int8"}, "values=int8 with group_size=64 would round it again"),
        (",quantize", {"values": "bf16"}, "values=bf16 .*would round it again"),
        (",quantize{group_size=16}", {"values": "int4"}, "group_size=64 would round it again"),
    ],
)
def test_what_packed_layers_do_not_take_is_refused(passes: str, options: dict[str, str], told: str, tmp_path: Path) -> None:
    program = _quantized(passes)
    with pytest.raises(SparsepassError, match=told):
        write(program, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_layers_that_are_not_quantized_stay_dense_and_say_so(tmp_path: Path) -> None:
    artifact = write(_quantized(",quantize{targets=*.mlp.*}"), tmp_path / "out")
    reasons = {layer.layer: layer.reason for layer in artifact.layers if layer.reason}
    assert "not quantized, and a packed folder holds values of one kind" in reasons["model.layers.0.self_attn.q_proj"]
    assert len(artifact.packed) == 6
    plain = write(_quantized(""), tmp_path / "plain")
    assert (plain.own, plain.settings.values) == (False, "bf16")


@pytest.mark.parametrize(
    ("part", "told"),
    [("weight", "the program's own integers and scales"), ("scales", "own integers"), ("codes", "has lost 1 zeros")],
)
def test_a_changed_integer_scale_and_place_is_found(part: str, told: str, tmp_path: Path) -> None:
    program = _quantized(",quantize{bits=8}")
    target = Packed()
    lowered = target.lower(program, tmp_path, LoweringContext())
    file = tmp_path / "model.safetensors"
    stored = safetensors.torch.load_file(file)
    found = stored[f"{UP}.{part}"]
    if part == "codes":  # the first value of a group moves to a place that is dropped, which is no damage by itself
        row, byte = next(
            (row, byte)
            for row, byte in torch.cartesian_prod(torch.arange(found.shape[0]), torch.arange(found.shape[1])).tolist()
            if int(found[row, byte]) & 15 == 0b1101 and int(stored[f"{UP}.weight"][row, 4 * byte])
        )
        found[row, byte] ^= 0b0001
    else:
        found[3, 0] += 1
    safetensors.torch.save_file(stored, file, metadata={"format": "pt"})
    checks = {check.name: check for check in target.verify(program, tmp_path, lowered, LoweringContext())}
    assert checks["pattern"].held
    assert checks["weights"].held is False
    assert told in checks["weights"].summary


def test_options() -> None:
    assert Packed().values is None
    with pytest.raises(SparsepassError, match="name one of them"):
        Packed(group_size=32)
    assert dataclasses.replace(Packed(), values="int8").values == "int8"
