import copy
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from tests.families import BY_NAME, captured, tensors_of
from torch import Tensor

from sparsepass.graph import CaptureError, Program, SparsepassError
from sparsepass.graph.fill import capture_without_weights, fill

FAMILIES = ("llama", "gemma3", "bert", "t5", "whisper")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> a checkpoint as save_pretrained writes it."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in FAMILIES:
        BY_NAME[name].model().save_pretrained(root / name)  # type: ignore[operator]
    return {name: root / name for name in FAMILIES}


@pytest.fixture(scope="module")
def empty(checkpoints: dict[str, Path]) -> Program:
    return capture_without_weights(checkpoints["llama"])


def snapshot(program: Program) -> dict[str, Any]:
    return {
        "tensors": {name: (id(t), str(t.device)) for name, t in program.tensors().items()},
        "examples": {name: id(t) for name, t in program.example_inputs.items()},
        "graph": program.graph_module.code,
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_filled_program_is_the_captured_one(name: str, checkpoints: dict[str, Path]) -> None:
    model = BY_NAME[name].model()
    expected = captured(name)
    program = capture_without_weights(checkpoints[name])
    assert {t.device.type for t in program.tensors().values()} == {"meta"}
    assert [site.weight for site in program.sites()] == [site.weight for site in expected.sites()]
    assert fill(program, checkpoints[name]) is program
    assert program.tensors().keys() == expected.tensors().keys()
    for key, tensor in expected.tensors().items():
        found = program.tensor(key)
        assert torch.equal(found, tensor), key
        assert (found.dtype, found.device, type(found)) == (tensor.dtype, tensor.device, type(tensor)), key
    assert program.aliases == expected.aliases
    assert program.origin.model_class == expected.origin.model_class
    inputs = BY_NAME[name].inputs(3, 5)
    for other in (expected, model.eval()):
        with torch.no_grad():
            outputs = tensors_of(other(**inputs) if other is expected else other(**inputs, **_no_cache(other)))
            assert all(torch.equal(a, b) for a, b in zip(tensors_of(program(**inputs)), outputs, strict=True))


def _no_cache(model: Any) -> dict[str, bool]:
    return {"use_cache": False} if getattr(model.config, "use_cache", False) else {}


def test_weights_come_from_shards_a_file_or_a_dict(empty: Program, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = BY_NAME["llama"].model()
    expected = model.state_dict()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")  # type: ignore[operator]
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    sources: list[Any] = [tmp_path / "shards", checkpoints["llama"] / "model.safetensors", expected]
    for source in sources:
        program = fill(copy.deepcopy(empty), source)
        assert all(torch.equal(program.tensor(name), tensor) for name, tensor in expected.items())


def test_either_name_of_a_tied_weight_will_do(empty: Program) -> None:
    state = dict(BY_NAME["llama"].model().state_dict())
    del state["model.embed_tokens.weight"]
    program = fill(copy.deepcopy(empty), state)
    assert torch.equal(program.tensor("model.embed_tokens.weight"), state["lm_head.weight"])


def test_the_dtype_is_the_one_asked_for(checkpoints: dict[str, Path]) -> None:
    program = fill(capture_without_weights(checkpoints["llama"], dtype=torch.bfloat16), checkpoints["llama"])
    model = hf.LlamaForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.bfloat16)
    ids = BY_NAME["llama"].inputs(2, 6)["input_ids"]
    assert program.tensor("model.norm.weight").dtype == torch.bfloat16
    assert program.tensor("model.rotary_emb.inv_freq").dtype == torch.float32
    assert torch.equal(program(ids).logits, model(ids).logits)


def test_a_program_without_weights_can_be_planned(empty: Program) -> None:
    assert len(empty.sites()) == 15
    assert "0 of 15 layers sparse" in str(empty.report())
    assert all(t.is_meta for t in empty.tensors().values())


def _without(name: str) -> dict[str, Tensor]:
    return {n: t for n, t in BY_NAME["llama"].model().state_dict().items() if n != name}


def _with(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {**BY_NAME["llama"].model().state_dict(), name: tensor}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lambda: _without("model.layers.1.mlp.up_proj.weight"),
            r"the state dict lacks 1 tensors, model\.layers\.1\.mlp\.up_proj\.weight the first.*load it with transformers",
        ),
        (
            lambda: _with("model.norm.weight", torch.ones(33)),
            r"model\.norm\.weight has shape \(33,\) in the state dict, but the program expects \(32,\).*another configuration",
        ),
        (dict, r"lacks 20 tensors, model\.embed_tokens\.weight the first"),
    ],
)
def test_a_checkpoint_that_does_not_fit_leaves_the_program_as_it_was(empty: Program, state: Any, message: str) -> None:
    before = snapshot(empty)
    with pytest.raises(SparsepassError, match=message):
        fill(empty, state())
    assert snapshot(empty) == before


def only_index(folder: Path, text: str) -> None:
    """An index without the one file beside it, which would win over it."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda f: (f / "model.safetensors").unlink(), r"holds no model\.safetensors and no model\.safetensors\.index"),
    "half a file": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        r"model\.safetensors is truncated or damaged .*download it again",
    ),
    "an index without its shards": (
        lambda f: only_index(f, '{"weight_map": {"a": "shard.safetensors"}}'),
        r"shard\.safetensors is truncated or damaged|shard\.safetensors is missing",
    ),
    "an index that is none": (
        lambda f: only_index(f, "{"),
        r"index\.json cannot be read as JSON .*copy it again",
    ),
    "an index of something else": (
        lambda f: only_index(f, "[]"),
        r"index\.json: Input should be an object.*copy it again",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_leaves_the_program_as_it_was(
    damage: str, empty: Program, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in checkpoints["llama"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change, message = DAMAGES[damage]
    change(folder)
    before = snapshot(empty)
    with pytest.raises(SparsepassError, match=message):
        fill(empty, folder)
    assert snapshot(empty) == before


def test_a_source_without_configuration_is_said(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"has no configuration that transformers can read .*check the path"):
        capture_without_weights(tmp_path)
    hf.LlamaConfig(architectures=["NoSuchModel"]).save_pretrained(tmp_path)
    with pytest.raises(CaptureError, match=r"names the architecture \['NoSuchModel'\], which this transformers does not have"):
        capture_without_weights(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["pipeline"]}))
    with pytest.raises(CaptureError, match="names the architecture"):
        capture_without_weights(tmp_path)


def test_an_8b_model_is_captured_in_no_memory(tmp_path: Path) -> None:
    import resource

    hf.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    program = capture_without_weights(tmp_path)
    seconds = time.process_time() - started
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert sum(site.num_weights for site in program.sites()) == 8_030_261_248 - 65 * 4096
    assert sum(site.left_alone is None for site in program.sites()) == 7 * 32
    assert {t.dtype for t in program.graph_module.parameters()} == {torch.bfloat16}
    assert grown_bytes < 1e9
    assert seconds < 60  # of processor time: the machine may be busy with something else


BASE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64,
}  # fmt: skip


def described(folder: Path, **fields: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(BASE | fields))
    return folder


def test_attention_kernels_that_are_not_installed_are_no_matter(tmp_path: Path) -> None:
    assert capture_without_weights(described(tmp_path, attn_implementation="flash_attention_2")).sites()


def test_weights_of_a_type_that_is_not_computed_in_are_taken_as_bfloat16(tmp_path: Path) -> None:
    program = capture_without_weights(described(tmp_path, torch_dtype="float8_e4m3fn"))
    assert {p.dtype for p in program.graph_module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "fields",
    [
        {"torch_dtype": "float99"},
        {"hidden_size": "many"},
        {"num_attention_heads": 0},
        {"hidden_act": "never"},
        {"rope_parameters": {"rope_type": "never"}},
        {"architectures": "LlamaForCausalLM"},
        {"model_type": "never"},
    ],
)
def test_a_configuration_that_makes_no_model_is_refused_in_words(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=re.escape(str(tmp_path))):
        capture_without_weights(described(tmp_path, **fields))


def test_code_beside_a_configuration_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "configuration_x.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig\nclass X(LlamaConfig): model_type = 'x'\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(CaptureError, match="code of its own"):
        capture_without_weights(described(tmp_path, model_type="x", auto_map={"AutoConfig": "configuration_x.X"}))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda k, v: {k: v.to(torch.float8_e4m3fn), f"{k}_scale": torch.ones(())}, "is quantized: .*weight_scale beside it"),
        (lambda k, v: {k: v.to(torch.int8)}, "is quantized or compressed.*I(NT)?8"),
        (lambda k, v: {k: v, k.replace("weight", "bias"): torch.ones(len(v))}, "does not read: a part of the layer"),
        (lambda k, v: {k: v, k.replace("weight", "lora_A.weight"): torch.ones(2, 2)}, "an adapter that is not merged"),
        (lambda k, v: {k: v, f"_orig_mod.{k}": v.clone()}, r"saved out of a wrapper.*torch\.compile"),
    ],
)
@pytest.mark.parametrize("stored", [False, True], ids=["state dict", "file"])
def test_weights_that_are_not_plain_are_refused(
    change: Callable[[str, Tensor], dict[str, Tensor]], said: str, stored: bool, empty: Program, tmp_path: Path
) -> None:
    program = copy.deepcopy(empty)
    state = BY_NAME["llama"].model().state_dict()
    layers = [(key, value) for key, value in state.items() if key.endswith("q_proj.weight")]
    state |= {name: tensor for key, value in layers for name, tensor in change(key, value).items()}
    if stored:
        save_file({key: value.clone() for key, value in state.items()}, tmp_path / "model.safetensors")
    before = snapshot(program)
    with pytest.raises(SparsepassError, match=said):
        fill(program, tmp_path if stored else state)
    assert snapshot(program) == before


def test_weights_that_the_programs_type_cannot_hold_are_refused(checkpoints: dict[str, Path]) -> None:
    program = capture_without_weights(checkpoints["llama"], dtype=torch.float16)
    state = BY_NAME["llama"].model().state_dict()
    with pytest.raises(SparsepassError, match=r"norm.weight holds values up to 1e\+05, which float16 cannot hold"):
        fill(program, state | {"model.norm.weight": torch.full_like(state["model.norm.weight"], 1e5)})
