"""The command `verify` on what sparsepass wrote itself: programs, ONNX and Hugging Face folders, and parts of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.export.tiny import save_tiny_llama
from typer.testing import CliRunner

from sparsepass.export.cli import app as cli
from sparsepass.graph import Program
from sparsepass.graph.support import write_checksums

HEAD = "output head: pruning it costs much accuracy"


def verify(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["verify", *map(str, arguments)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned program and its two exports."""
    place = tmp_path_factory.mktemp("verify")
    save_tiny_llama(place / "tiny")
    for arguments in (
        ["prune", place / "tiny", "-o", place / "program"],
        ["export", place / "program", "-t", "onnx", "-o", place / "onnx"],
        ["export", place / "program", "-t", "hf", "-o", place / "hf"],
    ):
        result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
    return place


@pytest.mark.parametrize("name", ["program", "onnx", "hf", "onnx/model.onnx", "hf/model.safetensors"])
def test_what_has_to_be_sparse_and_what_is_dense_on_purpose_is_said(name: str, place: Path) -> None:
    result = verify(place / name)
    assert result.exit_code == 0, result.output
    assert "2:4 holds (14 conforms" in result.output
    assert "has to be sparse: 14 weights" in result.output
    assert f"dense on purpose: {HEAD}" in result.output.replace("\n", " ")
    assert "Likely causes" not in result.output


def test_a_shard_has_to_hold_only_what_it_holds(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "hf", tmp_path / "hf")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for i, part in enumerate((names[:8], names[8:])):
        safetensors.torch.save_file({name: tensors[name] for name in part}, folder / f"model-{i}.safetensors")
    weights = {name: f"model-{int(name not in names[:8])}.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    write_checksums(folder)  # sharded on purpose
    assert verify(folder).exit_code == 0
    for i in range(2):
        assert verify(folder / f"model-{i}.safetensors").exit_code == 0
    # A weight that the report names and no file holds is missing.
    lost = "model.layers.0.mlp.up_proj.weight"
    file = folder / weights.pop(lost)
    held = safetensors.torch.load_file(file)
    del held[lost]
    safetensors.torch.save_file(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    result = verify(folder)
    assert result.exit_code == 1
    assert "1 missing" in result.output


def test_zeros_that_were_trained_away_are_named_with_what_to_do(place: Path, tmp_path: Path) -> None:
    """A checkpoint that sparsepass wrote, loaded by transformers, trained for one step of AdamW and saved over it."""
    import transformers as hf

    folder = shutil.copytree(place / "hf", tmp_path / "hf")
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(folder)

    result = verify(folder)

    assert result.exit_code == 1
    said = result.output.replace("\n", " ")
    assert "14 violates" in said
    assert "trained without mask: 14 of 14 weights" in said
    assert "Train with the mask in the forward pass (sparsepass retrain)" in said
    found = json.loads(verify(folder, "--json").stdout)
    assert [len(cause["weights"]) for cause in found["reports"][0]["causes"]] == [14]


def test_a_misspelled_ignore_is_noted(place: Path) -> None:
    result = verify(place / "tiny", "--ignore", "lm_haed")
    assert result.exit_code == 1
    assert "--ignore 'lm_haed' means no weight here" in result.stderr.replace("\n", " ")
    assert "lm_haed" not in verify(place / "tiny", "--ignore", "lm_head").stderr


def test_a_program_is_checked_as_its_graph_reads_it(place: Path, tmp_path: Path) -> None:
    """With its masks: the weights behind them are dense, and damage to a mask is found."""
    program = Program.load(place / "program")
    name, state = next(iter(program.sparse.items()))
    assert state.mask is not None
    mask = program.tensor(state.mask)
    mask.view(-1)[:4] = True
    program.tensor(name).data.view(-1)[:4] = 1.0
    program.save(tmp_path / "damaged")
    result = verify(tmp_path / "damaged")
    assert result.exit_code == 1
    assert f"{name} [" in result.output
    assert "1 of" in result.output
