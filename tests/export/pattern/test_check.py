"""The report, the expectations, and safetensors checkpoints."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers as hf
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from sparsepass.export.pattern.check import check_pattern
from sparsepass.graph.support.errors import SparsepassError
from sparsepass.passes import apply_passes
from sparsepass.passes.maths.pattern import NMPattern


def sparse(*shape: int, axis: int = -1, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """2:4 along `axis`, at random places, and hardly by chance along any other."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(shape, generator=generator) + 0.5).movedim(axis, -1)
    keep = torch.rand((*values.shape[:-1], values.shape[-1] // 4, 4), generator=generator).argsort(-1) < 2
    return (values * keep.reshape(values.shape)).movedim(-1, axis).to(dtype).contiguous()


def dense(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5


def two_layers(first: Any, second: Any) -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "model.up.weight"], ["h"], "up"),
        helper.make_node("MatMul", ["h", "lm_head.weight"], ["y"], "head"),
    ]
    weights = [
        numpy_helper.from_array(first.numpy(), "model.up.weight"),
        numpy_helper.from_array(second.numpy(), "lm_head.weight"),
    ]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    return helper.make_model(helper.make_graph(nodes, "two", info[:1], info[1:], weights))


GOOD, DENSE, WRONG = sparse(8, 8, axis=0), dense(8, 8), sparse(8, 8, axis=1)


# ---- what decides


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_head", "*head*", "head", r"re:lm_h.*"])
def test_ignored_weights_do_not_decide(name: str) -> None:
    model = two_layers(GOOD, DENSE)
    assert not check_pattern(model).conforms
    report = check_pattern(model, ignore=[name])
    assert report.conforms
    assert (report.entries[1].verdict, report.entries[1].reason) == ("left out", f"ignored by {name!r}")
    assert check_pattern(model, expected_dense=[name]).entries[1].reason == "dense on purpose"


def test_expected_sparse_weights_alone_decide() -> None:
    assert check_pattern(two_layers(GOOD, DENSE), expected_sparse={"model.up.weight"}).conforms
    report = check_pattern(two_layers(WRONG, GOOD), expected_sparse=["model.up"])
    assert not report.conforms
    assert [e.weight for e in report.failures] == ["model.up.weight"]


def test_expected_weight_that_is_not_there_is_missing() -> None:
    report = check_pattern(two_layers(GOOD, DENSE), expected_sparse=["model.up.weight", "model.down.weight"])
    assert (report.exit_code, report.entries[-1].verdict, report.entries[-1].weight) == (
        1,
        "missing",
        "model.down.weight",
    )


def test_each_weight_may_have_its_own_pattern() -> None:
    one_of_four = torch.zeros(8, 8)
    one_of_four[[1, 6]] = 1.0
    model = two_layers(GOOD, one_of_four)
    report = check_pattern(model, expected_sparse={"model.up.weight": "2:4", "lm_head.weight": NMPattern.parse("1:4")})
    assert report.conforms
    assert [e.pattern for e in report.entries] == ["2:4", "1:4"]
    assert not check_pattern(model, expected_sparse={"*": "1:4"}).conforms


def test_expectations_that_contradict_each_other() -> None:
    model = two_layers(GOOD, DENSE)
    with pytest.raises(SparsepassError, match=r"'lm_head\.weight' is expected to be sparse and, by '\*head\*', to be dense"):
        check_pattern(model, expected_sparse=["*.weight"], expected_dense=["*head*"])
    with pytest.raises(SparsepassError, match="expected to be 2:4 and 1:4 at once"):
        check_pattern(model, expected_sparse={"*.weight": "2:4", "lm_head*": "1:4"})
    with pytest.raises(SparsepassError, match=r"ignore has to be a collection of names, and 'lm_head' is one string"):
        check_pattern(model, ignore="lm_head")
    with pytest.raises(SparsepassError, match="no regular expression"):
        check_pattern(model, ignore=["re:("])
    with pytest.raises(ValueError, match="4:2"):
        check_pattern(model, "4:2")


def test_nothing_to_check_proves_nothing_unless_stated() -> None:
    report = check_pattern(two_layers(DENSE, DENSE), ignore=["*"])
    assert (report.conforms, report.exit_code) == (False, 1)
    assert "nothing is proven" in report.summary()
    assert check_pattern(two_layers(DENSE, DENSE), expected_sparse=[]).conforms


# ---- the report


def test_report_as_text_and_json() -> None:
    report = check_pattern(two_layers(WRONG, GOOD))
    values = json.loads(json.dumps(report.to_dict()))
    assert (values["source"], values["pattern"], values["conforms"], values["exit_code"]) == (
        "model 'two'",
        "2:4",
        False,
        1,
    )
    assert values["counts"] == report.counts
    assert (values["counts"]["violates"], values["counts"]["conforms"], values["counts"]["missing"]) == (1, 1, 0)
    first = values["entries"][0]
    assert (first["weight"], first["axis"], first["conforming_axes"], first["shape"]) == (
        "model.up.weight",
        0,
        [1],
        [8, 8],
    )
    assert first["first_violation"] == list(report.entries[0].first_violation or ())
    text = str(report)
    assert "does NOT hold (1 violates, 1 conforms)" in text
    assert text.index("model.up.weight") < text.index("lm_head.weight")
    assert "wrong axis" in text


def test_long_reports_show_failures_and_count_the_rest(tmp_path: Path) -> None:
    save_file(
        {f"l{i}.weight": sparse(4, 8, seed=i) for i in range(80)} | {"bad.weight": dense(4, 8)},
        tmp_path / "model.safetensors",
    )
    report = check_pattern(tmp_path)
    text = str(report)
    assert "bad.weight" in text
    assert "80 more entries are not shown" in text
    assert report.table(all_entries=True).row_count == 81


# ---- safetensors


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_linear_weights_are_checked_along_the_last_axis(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "a.q_proj.weight": sparse(12, 8, dtype=dtype),
        "b.q_proj.weight": sparse(12, 8, axis=0, dtype=dtype),
        "b.q_proj.bias": dense(12),
        "norm.weight": dense(8),
        "a.mask": torch.ones(12, 8, dtype=torch.bool),
    }
    report = check_pattern(checkpoint(tmp_path, tensors))
    verdicts = {e.weight: (e.verdict, e.axis, e.conforming_axes) for e in report.entries}
    assert verdicts == {"a.q_proj.weight": ("conforms", 1, ()), "b.q_proj.weight": ("violates", 1, (0,))}
    assert report.entries[0].node == "a.q_proj"
    assert check_pattern(tmp_path / "model.safetensors", ignore=["b.q_proj"]).conforms


def test_negative_zeros_in_a_checkpoint(tmp_path: Path) -> None:
    weight = sparse(4, 8, dtype=torch.bfloat16)
    weight[weight == 0] = -0.0
    report = check_pattern(checkpoint(tmp_path, {"a.weight": weight}))
    assert (report.conforms, report.num_negative_zeros) == (True, 16)


def test_embeddings_are_listed_and_not_judged_unless_expected(tmp_path: Path) -> None:
    names = (
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "embeddings.word_embeddings.weight",
        "shared.weight",
    )
    tensors = {name: dense(12, 8) for name in names} | {"cls": dense(1, 8), "a.weight": sparse(4, 8)}
    report = check_pattern(checkpoint(tmp_path, tensors))
    assert report.conforms
    assert {e.weight for e in report.entries if e.reason == "an embedding"} == set(names)
    assert next(e for e in report.entries if e.weight == "cls").reason.startswith("not named as a matmul weight is")
    assert [e.verdict for e in check_pattern(tmp_path, expected_sparse=[names[0]]).failures] == ["violates"]


def test_conv1d_of_gpt2_runs_along_the_first_axis(tmp_path: Path) -> None:
    tensors = {"h.0.attn.c_attn.weight": sparse(8, 12, axis=0), "lm_head.weight": sparse(16, 8)}
    report = check_pattern(checkpoint(tmp_path, tensors, {"model_type": "gpt2"}))
    assert report.conforms
    assert {e.weight: e.axis for e in report.entries} == {"h.0.attn.c_attn.weight": 0, "lm_head.weight": 1}
    (tmp_path / "config.json").unlink()
    assert not check_pattern(tmp_path).conforms
    assert check_pattern(tmp_path, axes={"*.c_attn": 0}).conforms


def test_experts(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert check_pattern(checkpoint(tmp_path, {name: sparse(3, 12, 8)})).entries[0].axis == 2
    transposed = {"text_config": {"model_type": "llama4_text"}}
    report = check_pattern(checkpoint(tmp_path, {name: sparse(3, 8, 12, axis=1)}, transposed))
    assert (report.conforms, report.entries[0].axis) == (True, 1)


def test_convolutions_in_a_checkpoint(tmp_path: Path) -> None:
    tensors = {
        "patch_embeddings.projection.weight": sparse(6, 8, 3, 3, axis=1),
        "conv1.weight": sparse(6, 8, 3, axis=1),
        "depthwise.weight": dense(8, 1, 4),
    }
    report = check_pattern(checkpoint(tmp_path, tensors))
    assert report.conforms
    assert {e.axis for e in report.entries} == {1}


def test_axes_that_cannot_be(tmp_path: Path) -> None:
    checkpoint(tmp_path, {"a.weight": sparse(4, 8)})
    with pytest.raises(SparsepassError, match=r"axis 2 for 'a\.weight' of shape \[4, 8\]: expected -2 to 1"):
        check_pattern(tmp_path, axes={"a": 2})
    with pytest.raises(SparsepassError, match=r"axes names 'b\.weight'"):
        check_pattern(tmp_path, axes={"b.weight": 0})


def test_quantized_checkpoints(tmp_path: Path) -> None:
    tensors = {
        "a.weight": (sparse(4, 8) * 50).to(torch.int8),
        "b.weight": (sparse(4, 8) * 50).to(torch.int8),
        "b.weight_zero_point": torch.zeros(4, 1, dtype=torch.int8),
        "c.qweight": torch.zeros(1, 8, dtype=torch.int32),
        "d.weight": torch.zeros(64, 1, dtype=torch.uint8),
    }
    verdicts = {e.weight: e.verdict for e in check_pattern(checkpoint(tmp_path, tensors)).entries}
    uncheckable = dict.fromkeys(("b.weight", "c.qweight", "d.weight"), "not checkable")
    assert verdicts == {"a.weight": "conforms", **uncheckable}


def test_shards(tmp_path: Path) -> None:
    files = {
        "model-1-of-2.safetensors": {"a.weight": sparse(4, 8)},
        "model-2-of-2.safetensors": {"b.weight": dense(4, 8)},
    }
    for file, tensors in files.items():
        save_file(tensors, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, tensors in files.items() for name in tensors}}))
    report = check_pattern(tmp_path)
    assert [(e.file, e.verdict) for e in report.entries] == list(zip(files, ["conforms", "violates"], strict=True))
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(SparsepassError, match=r"incomplete: .* model-2-of-2\.safetensors is missing"):
        check_pattern(tmp_path)
    index.write_text("{")
    with pytest.raises(SparsepassError, match="cannot be read"):
        check_pattern(tmp_path)


def test_an_index_and_its_files_have_to_belong_together(tmp_path: Path) -> None:
    save_file({"a.weight": sparse(4, 8)}, tmp_path / "model-1.safetensors")
    save_file({"b.weight": sparse(4, 8)}, tmp_path / "model-2.safetensors")
    weights = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors", "c.weight": "model-2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(SparsepassError, match=r"model-2\.safetensors is incomplete .* such as 'c\.weight'"):
        check_pattern(tmp_path)
    assert check_pattern(tmp_path / "model-2.safetensors").conforms, "a shard by itself promises nothing"


def test_indices_of_variants_and_of_other_libraries(tmp_path: Path) -> None:
    save_file({"a.weight": sparse(4, 8)}, tmp_path / "part-1.safetensors")
    save_file({"old.weight": dense(4, 8)}, tmp_path / "left_over.safetensors")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "part-1.safetensors"}}))
    assert [entry.weight for entry in check_pattern(tmp_path).entries] == ["a.weight"]


def test_a_pipeline_of_several_models_in_folders_below(tmp_path: Path) -> None:
    for name, weight in (("text_encoder", sparse(4, 8)), ("unet", dense(4, 8))):
        (tmp_path / name).mkdir()
        checkpoint(tmp_path / name, {"a.weight": weight})
    found = check_pattern(tmp_path)
    assert [(entry.file, entry.verdict) for entry in found.entries] == [
        ("text_encoder/model.safetensors", "conforms"),
        ("unet/model.safetensors", "violates"),
    ]


def test_pickled_weights_are_not_read_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(SparsepassError, match="save them as safetensors"):
        check_pattern(tmp_path)


def test_tensors_in_memory_are_taken_as_a_checkpoint(tmp_path: Path) -> None:
    tensors = {
        "a.weight": sparse(4, 8, dtype=torch.bfloat16),
        "b.weight": sparse(8, 8, axis=0),
        "c.weight": dense(4, 8)[:, ::2],
        "embed_tokens.weight": dense(4, 8),
        "b.bias": dense(4),
    }
    memory = check_pattern(tensors, axes={"b.weight": 0})
    checkpoint(tmp_path, {name: tensor.contiguous() for name, tensor in tensors.items()})
    files = check_pattern(tmp_path, axes={"b.weight": 0})
    assert {e.weight: (e.verdict, e.axis, e.num_violations, e.reason) for e in memory.entries} == {
        e.weight: (e.verdict, e.axis, e.num_violations, e.reason) for e in files.entries
    }
    assert memory.source == "tensors in memory"


def test_ignored_names_that_mean_nothing_are_reported() -> None:
    report = check_pattern(two_layers(GOOD, DENSE), ignore=["*head*", "lm_haed", "re:nothing"])
    assert report.unused == ("lm_haed", "re:nothing")
    assert report.to_dict()["unused"] == ["lm_haed", "re:nothing"]


def test_folder_with_checkpoint_and_graph(tmp_path: Path) -> None:
    checkpoint(tmp_path, {"a.weight": sparse(4, 8)})
    (tmp_path / "onnx").mkdir()
    onnx.save(two_layers(GOOD, GOOD), tmp_path / "onnx" / "model.onnx")
    assert [Path(e.file).name for e in check_pattern(tmp_path).entries] == [
        "model.safetensors",
        "model.onnx",
        "model.onnx",
    ]


def test_unreadable_sources(tmp_path: Path) -> None:
    with pytest.raises(SparsepassError, match="does not exist"):
        check_pattern(tmp_path / "nothing")
    with pytest.raises(SparsepassError, match="holds nothing to check"):
        check_pattern(tmp_path)
    other = tmp_path / "model.engine"
    other.write_bytes(b"x")
    with pytest.raises(SparsepassError, match=r"neither an \.onnx nor a \.safetensors file"):
        check_pattern(other)
    whole = checkpoint(tmp_path, {"a.weight": sparse(64, 64)}) / "model.safetensors"
    data = whole.read_bytes()
    for size in (len(data) - 1, 100, 4, 0):
        whole.write_bytes(data[:size])
        with pytest.raises(SparsepassError, match="cannot be read as a safetensors file"):
            check_pattern(whole)


def test_values_agree_with_the_passes_own_check(tmp_path: Path) -> None:
    weight = torch.as_tensor(np.random.default_rng(0).standard_normal((64, 32)), dtype=torch.float32)
    weight[torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    groups = (weight.reshape(64, 8, 4) != 0).sum(-1)
    entry = check_pattern(checkpoint(tmp_path, {"a.weight": weight})).entries[0]
    assert entry.num_violations == int((groups > 2).sum()) > 0
    first = (groups > 2).nonzero()[0].tolist()
    assert entry.first_violation == (first[0], 4 * first[1])


def test_many_names_cost_no_time() -> None:
    """A mixture of experts has tens of thousands of weights: names are looked up and not tried one by one."""
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj.weight" for i in range(48) for j in range(128)]
    weight = sparse(4, 8)
    begin = time.process_time()
    report = check_pattern(
        dict.fromkeys(names, weight), expected_sparse=dict.fromkeys(names, "2:4"), axes=dict.fromkeys(names, 1)
    )
    assert time.process_time() - begin < 5
    assert report.conforms
    assert len(report.entries) == len(names)


def test_the_shapes_of_experts_tell_how_they_are_stored() -> None:
    """GPT-OSS and Llama 4 store [expert, in, out], Mixtral [expert, out, in]; a state dict has no configuration that tells."""
    up, down = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
    straight = check_pattern({up: sparse(3, 24, 8), down: sparse(3, 8, 12)})
    transposed = check_pattern({up: sparse(3, 8, 24, axis=1), down: sparse(3, 12, 8, axis=1)})
    assert [e.axis for e in straight.entries] == [2, 2]
    assert [e.axis for e in transposed.entries] == [1, 1]
    assert straight.conforms
    assert transposed.conforms
    wrong = check_pattern({up: sparse(3, 8, 24), down: sparse(3, 12, 8)})
    assert not wrong.conforms
    assert [e.conforming_axes for e in wrong.entries] == [(2,), (2,)]


@pytest.mark.parametrize("name", ["gpt_oss", "gpt2", "mixtral"])
def test_models_and_programs_in_memory_are_checked_along_their_own_axes(name: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts: dict[str, Any] = {"num_local_experts": 4, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    kinds: dict[str, Any] = {
        "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, **experts)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)),
        "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, **experts)),
    }
    model = kinds[name]().eval()
    assert not check_pattern(model).conforms
    program = apply_passes(model, ["nm_sparsify{criterion=magnitude}"], validate=False)
    for source in (program, program.to_model()):
        report = check_pattern(source, expected_sparse=list(program.sparse))
        assert report.conforms, report.summary()
        assert {e.weight: e.axis for e in report.entries if e.verdict == "conforms"}.keys() >= program.sparse.keys()
