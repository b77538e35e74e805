"""Packed folders on the command line: unpacked, compared, verified, measured; refused where a program is wanted."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from tests.export.cli.commands import run
from tests.export.targets.packed.packing import NO_KERNELS, inputs, sparse, write
from tests.export.tiny import WORDS, save_tiny_llama
from tests.families import tensors_of

from sparsepass.export import export
from sparsepass.export.targets.packed import check_packed_folder, unpack_folder
from sparsepass.graph import SparsepassError
from sparsepass.graph.program import masked_weight
from sparsepass.passes import apply_passes

pytestmark = [
    pytest.mark.filterwarnings(NO_KERNELS),
    # peft 0.21 asks a model for an attribute that transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


TASKS = Path(__file__).parents[3] / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Path = tmp_path_factory.mktemp("packed")
    export(str(save_tiny_llama(place / "dense")), "packed", place / "packed", passes="nm_sparsify{criterion=magnitude}")
    return place / "packed"


@pytest.mark.parametrize("values", ["bf16", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "mixtral"])
def test_the_plain_folder_holds_the_weights_with_their_zeros(name: str, values: str, tmp_path: Path) -> None:
    program = sparse(name)
    artifact = write(
        program, tmp_path / "packed", values=values, embedding="int8" if values == "int8" and name != "vit" else None
    )
    done = unpack_folder(tmp_path / "packed", tmp_path / "plain")
    assert (done.num_layers, done.dtype, done.num_branches) == (len(artifact.packed), "bfloat16", 0)
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    kind = getattr(transformers, artifact.auto_class)
    plain, packed = kind.from_pretrained(tmp_path / "plain"), kind.from_pretrained(tmp_path / "packed")
    if values == "bf16":
        expected = program.to_model().to(torch.bfloat16).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in plain.state_dict().items())
    with torch.no_grad():
        mine, theirs = (tensors_of(model(**inputs(name, torch.bfloat16)))[0].float() for model in (packed, plain))
    assert float((mine - theirs).norm() / theirs.norm()) < 3e-2


@pytest.mark.parametrize("options", ["{group_size=16}", "{bits=8,group_size=0}"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_plain_folder_holds_the_programs_integers_times_their_scales(name: str, options: str, tmp_path: Path) -> None:
    program = apply_passes(sparse(name), f"quantize{options},quantize_embedding", validate=False)
    artifact = write(program, tmp_path / "packed")
    unpack_folder(tmp_path / "packed", tmp_path / "plain")
    plain = getattr(transformers, artifact.auto_class).from_pretrained(tmp_path / "plain").state_dict()
    assert artifact.packed
    for layer in artifact.packed:
        assert torch.equal(plain[layer.weight], masked_weight(program, layer.weight).bfloat16()), layer.weight


@pytest.mark.parametrize("projection", ["fixed", "trainable"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_branches_become_a_peft_adapter(name: str, projection: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    program = sparse(name, f"slorb{{k=8,projection={projection}}}")
    artifact = write(program, tmp_path / "packed")
    assert unpack_folder(tmp_path / "packed", tmp_path / "plain").num_branches == len(artifact.packed)
    kind = getattr(transformers, artifact.auto_class)
    plain = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "plain"), tmp_path / "plain" / "adapter").eval()
    packed = kind.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        mine, theirs = (tensors_of(model(**inputs(name, torch.bfloat16)))[0].float() for model in (packed, plain))
    assert float((mine - theirs).norm() / theirs.norm()) < 5e-2


def test_shards_stay_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsepass.export.targets.hf.lower._MAX_SHARD", "20KB")
    write(sparse("mistral"), tmp_path / "packed")
    shards = sorted(path.name for path in (tmp_path / "packed").glob("*.safetensors"))
    assert len(shards) > 1
    unpack_folder(tmp_path / "packed", tmp_path / "plain")
    assert sorted(path.name for path in (tmp_path / "plain").glob("*.safetensors")) == shards
    index = json.loads((tmp_path / "plain/model.safetensors.index.json").read_text())
    stored = {key: file for file in shards for key in safetensors.torch.load_file(tmp_path / "plain" / file)}
    assert index["weight_map"] == stored
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")


def test_the_command_writes_the_plain_folder(folder: Path, tmp_path: Path) -> None:
    done = run("unpack", folder, "-o", tmp_path / "plain")
    assert done.exit_code == 0, done.output
    assert "14 layers unpacked" in done.output
    assert (tmp_path / "plain/tokenizer.json").is_file()
    again = run("unpack", folder, "-o", tmp_path / "plain")
    assert again.exit_code == 2
    assert "--force" in again.output
    compared = run("compare", folder, tmp_path / "plain")
    assert compared.exit_code == 0, compared.output
    not_packed = run("unpack", tmp_path / "plain", "-o", tmp_path / "other")
    assert not_packed.exit_code == 2
    assert "is no packed folder" in not_packed.output
    assert not (tmp_path / "other").exists()


def test_verify_unpacks_each_weight_and_reads_the_reasons(folder: Path) -> None:
    done = run("verify", folder)
    assert done.exit_code == 0, done.output
    assert "14 conforms" in done.output
    assert "output head" in done.output
    one_four = run("verify", folder, "--pattern", "1:4")
    assert one_four.exit_code == 1
    ignored = check_packed_folder(folder, ignore=("re:.*up_proj.*", "misspelled"))
    assert ignored.conforms
    assert ignored.unused == ("misspelled",)


def test_verify_names_a_damaged_tensor(tmp_path: Path) -> None:
    write(sparse("llama"), tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.codes"].zero_()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = run("verify", tmp_path)
    assert done.exit_code == 2
    assert "model.layers.0.mlp.up_proj" in done.output


def test_perplexity_and_tasks_are_measured(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(TASKS)
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 20)
    done = run(
        "eval", folder, "--text", text, "--context", 32, "--tasks", "sparsepass_capitals", "--include-path", TASKS, "--json"
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["perplexity"]["value"] > 1
    assert "sparsepass_capitals" in found["lm_eval"]["results"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "-o", "{out}"),
        ("retrain", "-o", "{out}", "--data", "python-docs", "--set", "train.max_steps=2"),
        ("export", "-o", "{out}", "--target", "onnx"),
    ],
)
def test_what_rewrites_or_trains_refuses_a_packed_folder(arguments: tuple[Any, ...], folder: Path, tmp_path: Path) -> None:
    command, *rest = arguments
    done = run(command, folder, *(str(each).format(out=tmp_path / "out") for each in rest))
    assert done.exit_code == 2
    assert "packed folders are for inference" in " ".join(done.output.split())
    assert "sparsepass unpack" in done.output
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write(sparse("llama"), tmp_path / "packed")
    file = tmp_path / "packed/model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SparsepassError, match=r"model.safetensors is truncated or damaged"):
        unpack_folder(tmp_path / "packed", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
