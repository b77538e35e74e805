"""The command `size`: what is promised, counted by hand, and what packed folders and checkpoints really take."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from tests.export.plan.configs import TINY, saved_config
from typer.testing import CliRunner

from sparsepass.export.cli import app as cli
from sparsepass.export.plan import sizes
from sparsepass.export.report import SizeSection
from sparsepass.export.stages import export
from sparsepass.graph import SparsepassError
from sparsepass.passes import apply_passes

_LAYERS = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)  # q and o, k and v, three of the MLP
_ROWS = 2 * (64 * 2 + 32 * 2 + 128 * 2 + 64)
_SCALES = 2 * (64 * 2 + 32 * 2 + 128 * 2 + 64 * 2)  # groups of 64: two in a row of down
_TABLE, _NORMS = 320 * 64, 5 * 64


def _config(tmp_path: Path, kind: str = "llama", **more: Any) -> Path:
    architecture = {"llama": "LlamaForCausalLM", "bert": "BertModel", "gpt2": "GPT2LMHeadModel"}[kind]
    return saved_config(tmp_path / kind, kind, TINY | {"tie_word_embeddings": True} | more, architecture)


def _forms(found: SizeSection) -> dict[str, Any]:
    return {form.form: form for form in found.forms}


def test_the_parts_are_those_of_the_definition(tmp_path: Path) -> None:
    found = sizes(_config(tmp_path), slorb_k=16)
    assert (found.num_layers, found.num_layer_weights, found.num_parameters) == (14, _LAYERS, _LAYERS + _TABLE + _NORMS)
    forms = _forms(found)
    assert forms["dense fp32"].total_bytes == 4 * found.num_parameters
    assert forms["dense bf16"].total_bytes == 2 * found.num_parameters
    assert forms["2:4 bf16"].layers_bytes == _LAYERS * 9 / 8
    small = forms["2:4 int4"]
    assert (small.values_bytes, small.indices_bytes, small.scales_bytes) == (_LAYERS / 4, _LAYERS / 8, 2 * _SCALES)
    assert (small.embedding_bytes, small.others_bytes, small.branches_bytes) == (2 * _TABLE, 2 * _NORMS, 0)
    branched = forms["2:4 int4, SLoRB k=16"]
    assert branched.total_bytes - small.total_bytes == branched.branches_bytes == 2 * _LAYERS / 16
    last = forms["2:4 int4, SLoRB k=16, embedding int8"]
    assert last.embedding_bytes == _TABLE + 2 * 320
    assert found.paper is not None
    assert "16 times" in found.paper


def test_options_are_counted(tmp_path: Path) -> None:
    config = _config(tmp_path)
    one_a_row = _forms(sizes(config, group_size=0))["2:4 int8"]
    assert one_a_row.scales_bytes == 2 * _ROWS
    quarter = sizes(config, pattern="1:4")
    assert _forms(quarter)["1:4 bf16"].layers_bytes == _LAYERS * (2 / 4 + 2 / 8 / 4)
    assert quarter.paper is None
    trained = _forms(sizes(config, slorb_k=16, projection="trainable"))["2:4 bf16, SLoRB k=16"]
    projections = 2 * (6 * 64 * 64 + 128 * 128) // 16
    assert trained.branches_bytes == 2 * (_LAYERS // 16 + projections)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_other_families(kind: str, tmp_path: Path) -> None:
    found = sizes(_config(tmp_path, kind))
    model = hf.AutoModel.from_config(hf.AutoConfig.from_pretrained(tmp_path / kind))
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    assert 0 < _forms(found)["2:4 int4"].layers_bytes < _forms(found)["2:4 bf16"].layers_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    torch.manual_seed(0)
    config = hf.LlamaConfig(**(TINY | {"tie_word_embeddings": True, "hidden_size": 256, "intermediate_size": 512}))
    hf.LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "model")
    return folder


def test_a_packed_folder_takes_what_is_promised(folder: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "model")
    program = apply_passes(model, "nm_sparsify,quantize,quantize_embedding", validate=False)
    export(program, "packed", folder / "packed", verify=False)
    export(program, "hf", folder / "hf", verify=False)
    unsigned = apply_passes(model, "nm_sparsify,quantize{group_size=16,symmetric=false}", validate=False)
    export(unsigned, "hf", folder / "asymmetric", verify=False)
    export(apply_passes(model, "nm_sparsify,slorb{k=16}", validate=False), "packed", folder / "slorb", verify=False)
    found = sizes(folder / "model", [folder / "packed", folder / "slorb", folder / "hf", folder / "asymmetric"])
    dense, packed, slorb, integers, asymmetric = found.files
    assert dense.form == "dense bf16"
    assert packed.form == "2:4 int4, embedding int8"
    assert slorb.form == "2:4 bf16, SLoRB k=16"
    assert integers.form == "dense int4"
    assert asymmetric.form == "dense int4, zero points"
    for file in found.files:
        taken = sum(each.stat().st_size for each in Path(file.source).glob("*.safetensors"))
        assert file.bytes == taken
        assert file.promised_bytes is not None
        assert 1 <= taken / file.promised_bytes < 1.06, file  # headers: much of a file as small as these


def test_layers_that_a_folder_leaves_alone_are_promised_as_they_are(tmp_path: Path) -> None:
    """Convolutions, layers that were not asked for, and those that a pattern in the folder's list names."""
    torch.manual_seed(0)
    sized: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.ViTConfig(image_size=32, patch_size=16, **sized)
    model = hf.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    quantized = apply_passes(model, 'quantize{ignore=["*fc1"]}', validate=False)
    export(quantized, "hf{dtype=bfloat16}", tmp_path / "hf", verify=False)

    def share() -> float:
        (found,) = sizes(tmp_path / "model", [tmp_path / "hf"]).files[1:]
        assert found.promised_bytes is not None
        return found.bytes / found.promised_bytes

    assert 1 <= share() < 1.06
    file = tmp_path / "hf" / "config.json"
    stated = json.loads(file.read_text())
    assert any("fc1" in name for name in stated["quantization_config"]["ignore"])
    stated["quantization_config"]["ignore"] = ["re:.*fc1", "classifier"]
    file.write_text(json.dumps(stated))
    assert 1 <= share() < 1.06
    stated["quantization_config"]["ignore"] = []
    file.write_text(json.dumps(stated))
    assert share() > 1.2


def test_a_file_without_a_known_form_is_measured(folder: Path) -> None:
    save_file({"weight": torch.zeros(10)}, folder / "some.safetensors")
    found = sizes(folder / "model", [folder / "some.safetensors"])
    assert (found.files[-1].form, found.files[-1].promised_bytes) == (None, None)
    assert found.files[-1].bytes == (folder / "some.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pattern", "4:4"], "4:4"),
        (["--group-size", "-1"], "0 or more"),
        (["--projection", "none"], "fixed or trainable"),
        (["no/such/file"], "does not exist"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["size", str(_config(tmp_path)), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_command(tmp_path: Path) -> None:
    config = _config(tmp_path)
    shown = CliRunner().invoke(cli.app, ["size", str(config), "--report", str(tmp_path / "out")])
    assert shown.exit_code == 0
    assert all(len(line) <= 80 for line in shown.stdout.splitlines() if "│" in line)
    for part in ("2:4 int4", "layers of", "16 times", "14 layers that passes take"):
        assert part in shown.stdout
    as_json = CliRunner().invoke(cli.app, ["size", str(config), "--json"])
    section = json.loads(as_json.stdout)
    reported = json.loads((tmp_path / "out" / "report.json").read_text())["size"]
    assert reported["forms"] == section["forms"]
    assert "| 2:4 int4, embedding int8 |" in (tmp_path / "out" / "report.md").read_text()


def test_a_model_without_layers_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SparsepassError):
        sizes(tmp_path)
