"""The target hf: what is on disk, loaded by the real transformers and the real peft, and not by us."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from tests.families import BY_NAME, FAMILIES, captured, tensors_of
from torch import Tensor, nn

from sparsepass.export.targets import LoweringContext
from sparsepass.export.targets.hf import (
    ADAPTER_FOLDER,
    HfArtifact,
    HuggingFace,
    lower as hf,
    lower_hf,
    verify as hf_verify,
    verify_hf,
)
from sparsepass.export.targets.hf.adapter import adapter_config
from sparsepass.graph import Program, SparsepassError
from sparsepass.passes import SLoRB, apply_passes
from sparsepass.passes.maths.pattern import NMPattern, is_nm
from sparsepass.passes.maths.slorb import fixed_projection

peft = pytest.importorskip("peft")
# peft 0.21 asks a model for an attribute that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

HF_FAMILIES = [family.name for family in FAMILIES if family.name != "convnet"]
TWO_FOUR = NMPattern.parse("2:4")


def sparse(name: str, *, slorb: bool = False) -> Program:
    program = captured(name)
    passes: list[Any] = ["nm_sparsify", *(["slorb"] if slorb else [])]
    apply_passes(program, passes, inplace=True, validate=False)
    if slorb:  # the branch of a tiny random model is too small to be missed: make it count
        with torch.no_grad():
            for state in program.sparse.values():
                if state.branch is not None:
                    program.tensor(state.branch.weight).add_(0.05)
    return program


def load(artifact: HfArtifact) -> Any:
    return getattr(transformers, artifact.auto_class).from_pretrained(artifact.folder)


@torch.no_grad()
def outputs(model: nn.Module, name: str) -> list[Tensor]:
    kept = {"logits", "last_hidden_state", "pooler_output"}
    found = model(**BY_NAME[name].inputs(3, 6))
    return [t for key, t in found.items() if key in kept]


def rewrite(file: Path, **changes: Tensor) -> None:
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({**tensors, **changes}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "vit"])
def test_without_slorb_plain_transformers_gives_the_programs_outputs(name: str, tmp_path: Path) -> None:
    program = sparse(name)
    artifact = lower_hf(program, tmp_path)
    assert artifact.adapter is None
    for found, expected in zip(outputs(load(artifact), name), outputs(program, name), strict=True):
        assert torch.equal(found, expected)
    verdict = verify_hf(program, tmp_path, BY_NAME[name].inputs(3, 6))
    assert verdict["holds"], verdict["failures"]
    assert verdict["outputs"]["max_error"] == 0
    assert json.dumps(verdict)


@pytest.mark.parametrize("name", HF_FAMILIES)
def test_with_slorb_transformers_and_peft_give_the_programs_outputs(name: str, tmp_path: Path) -> None:
    program = sparse(name, slorb=True)
    artifact = lower_hf(program, tmp_path)
    assert artifact.adapter == tmp_path / ADAPTER_FOLDER
    base = load(artifact)
    assert type(base).__name__ == artifact.model_class == type(BY_NAME[name].model()).__name__
    assert outputs(base, name)[0].sub(outputs(program, name)[0]).abs().max() > 1e-3  # the adapter is not there yet
    wrapped = peft.PeftModel.from_pretrained(base, artifact.adapter)
    for found, expected in zip(outputs(wrapped, name), outputs(program, name), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    layers = [m for m in wrapped.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == artifact.num_branches
    assert all(layer.scaling == {"default": 1.0} for layer in layers)
    verdict = verify_hf(program, tmp_path, BY_NAME[name].inputs(3, 6))
    assert verdict["holds"], verdict["failures"]
    assert verdict["adapter_read_by"] == f"peft {peft.__version__}"
    assert verdict["pattern"]["num_checked"] >= artifact.num_sparse == len(program.sparse)
    assert not verdict["pattern"]["fused_with_dense"]


def test_experts_are_written_one_by_one_and_each_is_checked(tmp_path: Path) -> None:
    program = sparse("qwen3_moe")
    artifact = lower_hf(program, tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    experts = [name for name in stored if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    assert all(is_nm(stored[name], TWO_FOUR) for name in experts)
    assert {name for name in artifact.expected_sparse if ".experts." in name} == set(experts)
    assert {artifact.axes[name] for name in experts} == {1}
    verdict = verify_hf(program, tmp_path)
    assert verdict["pattern"]["num_checked"] == 2 * 4 + len(experts)


def test_the_axis_of_a_converted_weight_is_found_where_it_is_on_disk(tmp_path: Path) -> None:
    """transformers transposes some experts on their way to the disk, under the same name, and fuses some weights."""
    from transformers.core_model_loading import Concatenate, Transpose, WeightConverter

    program = sparse("mixtral")
    lower_hf(program, tmp_path)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    down, q, k = (f"model.layers.0.{n}" for n in ("mlp.experts.down_proj", "self_attn.q_proj", "self_attn.k_proj"))
    model._weight_conversions = [
        WeightConverter("experts.down_proj", "experts.down_proj", operations=[Transpose(1, 2)]),
        WeightConverter(
            "self_attn.kv_proj.weight",
            ["self_attn.k_proj.weight", "self_attn.v_proj.weight"],
            operations=[Concatenate(dim=0).reverse_op],
        ),
    ]
    fused = "model.layers.0.self_attn.kv_proj.weight"
    sizes = {down: 4 * 32 * 64, fused: 2 * 16 * 32, f"{q}.weight": 32 * 32}
    assert hf._on_disk(program, down, model, sizes) == {down: (1, 4 * 32 * 64)}
    assert hf._on_disk(program, f"{q}.weight", model, sizes) == {f"{q}.weight": (1, 32 * 32)}
    assert hf._on_disk(program, f"{k}.weight", model, sizes) == {fused: (1, 16 * 32)}
    assert hf._on_disk(program, f"{k}.weight", model, {}) == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "_sizes", lambda _: sizes)
        program.sparse = {name: program.sparse[name] for name in (f"{k}.weight", f"{q}.weight")}
        stored = hf.stored_weights(program, model, tmp_path)
    assert stored.fused_with_dense == (fused,)  # v_proj is dense here
    assert stored.expected_sparse == {f"{q}.weight": "2:4"}


def test_conv1d_of_gpt2_is_sparse_along_its_own_axis_and_the_adapter_says_so(tmp_path: Path) -> None:
    lower_hf(sparse("gpt2", slorb=True), tmp_path)
    weight = safetensors.torch.load_file(tmp_path / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
    assert weight.shape == (32, 128)
    assert is_nm(weight, TWO_FOUR, 0)
    assert not is_nm(weight, TWO_FOUR, 1)
    assert json.loads((tmp_path / ADAPTER_FOLDER / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_the_adapter_is_what_peft_itself_would_write(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    program = sparse("llama", slorb=True)
    artifact = lower_hf(program, ours, base_name=str(ours))
    assert artifact.adapter is not None
    peft.PeftModel.from_pretrained(load(artifact), artifact.adapter).save_pretrained(theirs)
    written = safetensors.torch.load_file(artifact.adapter / "adapter_model.safetensors")
    rewritten = safetensors.torch.load_file(theirs / "adapter_model.safetensors")
    assert written.keys() == rewritten.keys()
    assert all(torch.equal(written[key], rewritten[key]) for key in written)
    config = json.loads((artifact.adapter / "adapter_config.json").read_text())
    theirs_config = json.loads((theirs / "adapter_config.json").read_text())
    assert config.keys() <= theirs_config.keys()
    assert set(config["target_modules"]) == set(theirs_config["target_modules"])
    same = config.keys() - {"target_modules"}
    assert {key: config[key] for key in same} == {key: theirs_config[key] for key in same}
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    assert torch.equal(written[key.format("A")], fixed_projection(64, 16))
    assert torch.equal(written[key.format("B")], program.tensor("model.layers.0.mlp.down_proj.slorb_weight"))
    assert config["r"] == 2
    assert config["rank_pattern"] == {f"^model\\.layers\\.{layer}\\.mlp\\.down_proj": 4 for layer in (0, 1)}


def test_generation_with_the_adapter_equals_the_models_own_class(tmp_path: Path) -> None:
    program = sparse("llama", slorb=True)
    artifact = lower_hf(program, tmp_path, base_name=str(tmp_path))
    inputs = BY_NAME["llama"].inputs(2, 6)
    expected = program.to_model().generate(**inputs, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(artifact.adapter)  # finds its base by base_name
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=8, do_sample=False), expected)


def test_a_merged_adapter_destroys_the_pattern_as_the_card_says(tmp_path: Path) -> None:
    artifact = lower_hf(sparse("llama", slorb=True), tmp_path)
    merged = peft.PeftModel.from_pretrained(load(artifact), artifact.adapter).merge_and_unload()
    assert not is_nm(merged.model.layers[0].mlp.up_proj.weight, TWO_FOUR)
    card = (tmp_path / "README.md").read_text()
    assert "Do not merge the adapter" in card
    assert "nm_sparsify{pattern=2:4" in card
    assert "Do **not** merge" in (tmp_path / ADAPTER_FOLDER / "README.md").read_text()


def test_a_trained_projection_becomes_lora_a(tmp_path: Path) -> None:
    program = captured("llama")
    apply_passes(program, ["nm_sparsify", SLoRB(k=8, projection="trainable")], inplace=True, validate=False)
    with torch.no_grad():
        for state in program.sparse.values():
            assert state.branch is not None
            assert state.branch.projection is not None
            program.tensor(state.branch.projection).add_(torch.randn(1))
    artifact = lower_hf(program, tmp_path)
    found = outputs(peft.PeftModel.from_pretrained(load(artifact), artifact.adapter), "llama")
    torch.testing.assert_close(found, outputs(program, "llama"), rtol=1e-4, atol=1e-5)


def test_dtype_is_the_weights_and_the_configs(tmp_path: Path) -> None:
    program = sparse("t5", slorb=True)
    artifact = lower_hf(program, tmp_path, dtype=torch.bfloat16)
    assert artifact.dtype == "bfloat16"
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    stored |= safetensors.torch.load_file(tmp_path / ADAPTER_FOLDER / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert load(artifact).dtype == torch.bfloat16
    verdict = verify_hf(program, tmp_path)
    assert verdict["holds"], verdict["failures"]
    assert verdict["outputs"]["max_error"] > 0
    assert {t.dtype for t in program.tensors().values() if t.is_floating_point()} == {torch.float32}


def test_large_checkpoints_are_sharded_and_checked_in_their_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "_MAX_SHARD", "20KB")
    program = sparse("llama")
    artifact = lower_hf(program, tmp_path)
    assert "model.safetensors.index.json" in artifact.files
    assert len([name for name in artifact.files if name.endswith(".safetensors")]) > 2
    assert sum(artifact.files.values()) == sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    verdict = verify_hf(program, tmp_path)
    assert verdict["holds"], verdict["failures"]


def test_the_config_is_that_of_a_plain_checkpoint(tmp_path: Path) -> None:
    program = sparse("llama")
    left_over = {**(program.origin.config or {}), "quantization_config": {"quant_method": "gguf"}, "architectures": None}
    settings = {**(program.origin.generation_config or {}), "temperature": 0.5, "do_sample": False}
    program.origin = replace(program.origin, config=left_over, generation_config=settings)
    lower_hf(program, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()
    # transformers loads such settings with a warning and refuses to save them; they stay as they came.
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.5
    assert not hasattr(transformers.AutoConfig.from_pretrained(tmp_path), "quantization_config")


def test_tokenizer_and_processor_go_along(tmp_path: Path) -> None:
    words = tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
    fast: Any = transformers.PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=tokenizers.Tokenizer(words), unk_token="[UNK]")
    extractor: Any = transformers.WhisperFeatureExtractor
    processor = extractor(feature_size=8)
    lowered = HuggingFace().lower(sparse("llama"), tmp_path, LoweringContext(tokenizer=tokenizer, processor=processor))
    assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} <= lowered.artifact.files.keys()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("a") == 1


def test_without_peft_the_adapter_is_applied_by_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = sparse("llama", slorb=True)
    lower_hf(program, tmp_path)
    monkeypatch.setattr("sparsepass.export.targets.hf.adapter.util.find_spec", lambda _: None)
    verdict = verify_hf(program, tmp_path)
    assert verdict["holds"], verdict["failures"]
    assert "definition" in verdict["adapter_read_by"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    program, folder = sparse("llama", slorb=True), tmp_path_factory.mktemp("llama")
    lower_hf(program, folder)
    return program, folder


@pytest.fixture
def planted(written: tuple[Program, Path], tmp_path: Path) -> tuple[Program, Path]:
    program, folder = written
    copy = tmp_path / "copy"
    for file in (p for p in folder.rglob("*") if p.is_file()):
        target = copy / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return program, copy


UP = "model.layers.0.mlp.up_proj.weight"


def test_a_group_filled_again_is_found(planted: tuple[Program, Path]) -> None:
    program, folder = planted
    weight = safetensors.torch.load_file(folder / "model.safetensors")[UP]
    weight[0, :4] = 1
    rewrite(folder / "model.safetensors", **{UP: weight})
    said = " ".join(verify_hf(program, folder)["failures"])
    assert "the N:M pattern does not hold in the files" in said
    assert f"{UP} breaks 2:4 in 1 groups" in said
    assert f"{UP} is not the program's" in said


def test_a_permuted_input_channel_is_found(planted: tuple[Program, Path]) -> None:
    program, folder = planted
    weight = safetensors.torch.load_file(folder / "model.safetensors")[UP]
    rewrite(folder / "model.safetensors", **{UP: weight[:, [1, 0, *range(2, 32)]].contiguous()})  # 2:4 all the same
    verdict = verify_hf(program, folder)
    assert verdict["pattern"]["conforms"]
    assert f"{UP} is not the program's" in " ".join(verdict["failures"])
    assert verdict["outputs"]["relative_error"] > verdict["outputs"]["tolerance"]


def test_a_dropped_branch_is_found(planted: tuple[Program, Path]) -> None:
    program, folder = planted
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    rewrite(folder / ADAPTER_FOLDER / "adapter_model.safetensors", **{key: torch.zeros(64, 2)})
    said = " ".join(verify_hf(program, folder)["failures"])
    assert f"{key} is not the program's" in said
    assert "the outputs differ" in said
    assert "not rounding" in said


def test_an_adapter_that_is_scaled_is_found(planted: tuple[Program, Path]) -> None:
    program, folder = planted
    file = folder / ADAPTER_FOLDER / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 4}))
    (failure,) = verify_hf(program, folder)["failures"]
    assert "the outputs differ" in failure


def test_rounding_that_a_model_amplifies_is_told_from_a_mistake(
    written: tuple[Program, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_verify, "_TOLERANCES", {torch.float32: 0.0})
    verdict = verify_hf(*written)
    assert verdict["holds"], verdict["failures"]
    assert verdict["outputs"]["rounding"]["computed_in"] == "float64"
    assert 0 < verdict["outputs"]["rounding"]["checkpoint"] < 1e-6


def test_a_missing_adapter_is_found(planted: tuple[Program, Path]) -> None:
    program, folder = planted
    for file in (folder / ADAPTER_FOLDER).iterdir():
        file.unlink()
    said = " ".join(verify_hf(program, folder)["failures"])
    assert "holds no adapter/" in said
    assert "the outputs differ" in said


def test_a_plain_module_is_told_which_targets_work(tmp_path: Path) -> None:
    with pytest.raises(SparsepassError, match=r"plain nn.Module.*use the target onnx"):
        lower_hf(captured("convnet"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_that_end_alike_are_told_apart() -> None:
    modules = {"layer": nn.Linear(4, 4), "tower.layer": nn.Linear(4, 4), "x": nn.Linear(8, 4)}
    document = adapter_config({"layer": 2, "x": 4}, modules, base_name="b", task=None, fan_in_fan_out=False)
    model = nn.ModuleDict({"layer": modules["layer"], "tower": nn.ModuleDict({"layer": modules["tower.layer"]})})
    model["x"] = modules["x"]
    tuned = peft.inject_adapter_in_model(peft.LoraConfig(**{k: v for k, v in document.items() if k != "peft_type"}), model)
    ranks = {n: m.r for n, m in tuned.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert ranks == {"layer": {"default": 2}, "x": {"default": 4}}


def test_every_output_is_compared() -> None:
    assert len(tensors_of(captured("bert")(**BY_NAME["bert"].inputs(2, 8)))) == 2
    assert list(hf_verify._flat_outputs(captured("bert"), captured("bert")(**BY_NAME["bert"].inputs(2, 8)))) == [
        "last_hidden_state",
        "pooler_output",
    ]
