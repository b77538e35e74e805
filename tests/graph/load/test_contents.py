"""Checkpoints whose weights are not what a plain class would take them for."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparsepass.export.pattern import check_pattern
from sparsepass.graph import SparsepassError, capture
from sparsepass.graph.load import load_model
from sparsepass.passes import apply_passes

FP8 = torch.float8_e4m3fn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def rewritten(folder: Path, change: Callable[[str, Tensor], dict[str, Tensor]]) -> Path:
    """The checkpoint with each tensor replaced by others."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({a: b for key, value in tensors.items() for a, b in change(key, value).items()}, path, metadata={"format": "pt"})
    return folder


def of_layers(change: Callable[[str, Tensor], dict[str, Tensor]]) -> Callable[[str, Tensor], dict[str, Tensor]]:
    return lambda key, value: change(key, value) if key.endswith("proj.weight") else {key: value}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda k, v: {k: (v * 448).to(FP8), f"{k}_scale": torch.ones(())}, "is quantized: .* is F8_E4M3, and .*weight_scale"),
        (lambda k, v: {k: v.to(FP8), f"{k}_scale_inv": torch.ones(1, 1)}, "is quantized: .*weight_scale_inv beside it"),
        (lambda k, v: {k: torch.zeros(v.shape[0], 4, dtype=torch.int32)}, r"is quantized or compressed.*is I32 \[32, 4\]"),
        (lambda k, v: {k: v.to(torch.int8), k.replace("weight", "SCB"): torch.ones(32)}, "q?k?_proj.weight is I8"),
        (lambda k, v: {k.replace("weight", "qweight"): torch.zeros(4, 32, dtype=torch.int32)}, "qweight is I32"),
        (lambda k, v: {k + ".compressed": v.flatten()}, "compressed is F32"),
        (
            lambda k, v: {k: v, f"{k}_scale": torch.full((), 3.0)},
            "which LlamaForCausalLM does not read: a part of",
        ),
        (lambda k, v: {k: v, k.replace("weight", "bias"): torch.ones(len(v))}, "does not read: a part of the layer"),
        (lambda k, v: {k: v, k.replace("weight", "lora_A.weight"): torch.ones(2, 2)}, "an adapter that is not merged"),
    ],
)
def test_what_is_not_plain_is_refused_in_words(folder: Path, change: Any, said: str) -> None:
    with pytest.raises(SparsepassError, match=said):
        load_model(rewritten(folder, of_layers(change)))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model._orig_mod."])
def test_weights_saved_out_of_a_wrapper_say_so(folder: Path, prefix: str) -> None:
    with pytest.raises(SparsepassError, match=f"out of a wrapper: its weights have names such as {prefix}"):
        load_model(rewritten(folder, lambda key, value: {prefix + key: value}))


def test_sparse_weights_that_llm_compressor_stored_plainly_load(folder: Path, tmp_path: Path) -> None:
    model: Any = apply_passes(load_model(folder).model, ["nm_sparsify"], progress=False).to_model()
    model.save_pretrained(folder)
    document = json.loads((folder / "config.json").read_text())
    sparsity = {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]}
    method = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "sparsity_config": sparsity}
    (folder / "config.json").write_text(json.dumps(document | {"quantization_config": method}))
    loaded = load_model(folder).model
    assert loaded.config.to_dict().get("quantization_config") is None  # type: ignore[union-attr, operator]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    method["sparsity_config"] = sparsity | {"format": "sparse-24-bitmask"}
    (folder / "config.json").write_text(json.dumps(document | {"quantization_config": method}))
    with pytest.raises(SparsepassError, match="already quantized or compressed"):
        load_model(folder)


def test_gguf_files_beside_a_configuration_are_found(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model-Q8_0.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(SparsepassError, match=r"model-Q8_0\.gguf: the file may be truncated"):
        load_model(folder)
    (folder / "model-Q4_0.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(SparsepassError, match=r"several GGUF files .*choose one with gguf_file"):
        load_model(folder)


def test_a_tokenizer_of_another_version_is_named(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))).save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"BPE"', '"BPE2"'))
    with pytest.raises(SparsepassError, match=r"no tokenizer can be made of tokenizer\.json.*This is transformers"):
        load_model(folder)


def with_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": [None]}, r"names its architectures as \[None\], where a list of class names is expected"),
        ({"architectures": "LlamaForCausalLM"}, "where a list of class names is expected"),
        ({"num_attention_heads": 5}, r"hidden size \(32\) is not a multiple"),
        ({"transformers_weights": "elsewhere.safetensors"}, "that is in the folder; copy it there"),
        ({"transformers_weights": "../model.safetensors"}, "that is in the folder"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_what_of_it(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SparsepassError, match=said):
        load_model(with_config(folder, **changes))


@pytest.mark.parametrize(
    "name", ["self_attn.q_norm.weight", "post_feedforward_layernorm.weight", "mlp.experts.0.up_proj.weight"]
)
def test_a_weight_of_a_block_that_nobody_reads_is_refused(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"model.layers.0.{name}": torch.ones(8)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SparsepassError, match=rf"holds model\.layers\.0\.{re.escape(name)}, .*a part of the block model\.layers\.0"
    ):
        load_model(folder)


def test_other_tensors_that_nobody_reads_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    more = {name: torch.ones(4, 8) for name in ("vision.a", "vision.b", "vision.c", "vision.d")}
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
    [note] = cast("list[str]", load_model(folder).provenance["notes"])
    assert note == ("4 weights of the checkpoint are not used by LlamaForCausalLM: vision.a, vision.b, vision.c and 1 more")


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize(
    "named", ["flash_attention_2", "kernels-community/flash-attn", "flex_attention", {"": "flash_attention_3"}]
)
def test_attention_that_is_not_everywhere_is_computed_by_another(folder: Path, key: str, named: Any) -> None:
    loaded = load_model(with_config(folder, **{key: named}))
    [note] = cast("list[str]", loaded.provenance["notes"])
    text = named if isinstance(named, str) else named[""]
    assert note == f"the configuration names {text}; attention is computed by sdpa here"
    capture(loaded.model)


def test_flex_attention_of_a_model_in_memory(folder: Path) -> None:
    model: Any = load_model(folder).model
    model.config._attn_implementation = "flex_attention"
    capture(model)
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize(
    "more", [{"auto_map": {"AutoConfig": "own.Config"}}, {"trust_remote_code": True}, {"custom_pipelines": {"a": {}}}]
)
def test_words_of_code_do_not_go_along(folder: Path, more: dict[str, Any]) -> None:
    """Classes that transformers has now: what their folder said of code of its own is of no use any more."""
    program = capture(load_model(with_config(folder, **more)).model)
    assert program.origin.config is not None
    assert program.origin.config.keys().isdisjoint(more)
    program.to_model()


def test_a_table_of_classes_that_is_none(folder: Path) -> None:
    with pytest.raises(SparsepassError, match="auto_map is None, no table of classes"):
        load_model(with_config(folder, auto_map=None))


def test_fewer_layers_than_the_weights_have_are_noted(folder: Path) -> None:
    notes = load_model(with_config(folder, num_hidden_layers=0)).provenance["notes"]
    assert any("are not used by LlamaForCausalLM" in note for note in notes)  # type: ignore[attr-defined]


def test_the_file_that_config_json_names_is_the_one_that_counts(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "real.safetensors")
    expected = load_model(with_config(folder, transformers_weights="real.safetensors"))
    save_file({"x.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    found = load_model(folder)
    assert (
        found.provenance["files"]
        == expected.provenance["files"]
        == {"real.safetensors": (folder / "real.safetensors").stat().st_size}
    )
    assert {entry.file for entry in check_pattern(folder).entries} == {"real.safetensors"}


def test_an_adapter_beside_the_model_is_refused_as_what_it_is(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    with pytest.raises(SparsepassError, match="has a PEFT adapter beside its weights"):
        load_model(folder)


def test_parts_of_a_distributed_checkpoint_are_refused(folder: Path) -> None:
    save_file({"x.weight": torch.zeros(2, 2)}, folder / "shard-00000-model-00001-of-00001.safetensors")
    with pytest.raises(SparsepassError, match="parts of a distributed checkpoint"):
        load_model(folder)


@pytest.mark.parametrize("index", ['{"weight_map": []}', '{"weight_map": {"a": 3}}', "[]", '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused_in_words(folder: Path, index: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SparsepassError, match=r"Input should be an object|weight_map\.a: Input should|names 0 files"):
        load_model(folder)
