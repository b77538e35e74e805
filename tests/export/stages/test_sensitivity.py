"""Layers made sensitive on purpose are found, and the list keeps exactly the chosen ones dense."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.tiny import WORDS, save_tiny_llama
from tests.families import BY_NAME, captured
from typer.testing import CliRunner

from sparsepass.export.cli.app import app
from sparsepass.export.stages.sensitivity import Sensitivity, auto_ignore, saved_bytes
from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.equivalence.differences import difference
from sparsepass.passes import NMSparsify, apply_passes, parse_pipeline
from sparsepass.passes.maths.pattern import NMPattern, nm_mask

LAYER = "model.layers.1.mlp.down_proj"


def _model() -> Program:
    """A tiny Llama in which every layer but one is 2:4 already, so that pruning costs nothing anywhere else."""
    program = captured("llama")
    program.write_tensor(f"{LAYER}.weight", program.tensor(f"{LAYER}.weight").detach() * 10)
    for site in NMSparsify().choose(program)[0]:
        if site.name != LAYER:
            weight = program.tensor(site.weight).detach()
            program.write_tensor(site.weight, weight * nm_mask(weight.abs(), NMPattern(2, 4)))
    return program


def _find(program: Program, **options: Any) -> Sensitivity:
    return auto_ignore(program, BY_NAME["llama"].inputs(4, 12), compute="float32", **options)


def test_the_sensitive_layer_is_found_and_left_dense() -> None:
    program = _model()
    before = {name: tensor.clone() for name, tensor in program.tensors().items()}
    found = _find(program, budget=0.15)
    assert found.rows[0].name == LAYER
    assert found.rows[0].is_kept_dense
    assert found.rows[0].loss > 0
    assert all(row.loss < 1e-3 * found.rows[0].loss for row in found.rows[1:])
    assert [row.loss_per_mb for row in found.rows] == sorted((row.loss_per_mb for row in found.rows), reverse=True)
    assert found.given_up <= 0.15
    assert found.num_tokens == 48
    for name, tensor in program.tensors().items():
        assert torch.equal(tensor, before[name]), "the model was changed"

    (item,) = parse_pipeline(found.text)
    pruned = apply_passes(program, [item])
    dense = {layer for row in found.rows if row.is_kept_dense for layer in row.layers}
    assert {site.name for site in pruned.sites() if site.weight in pruned.sparse} == {row.name for row in found.rows} - dense


def test_the_loss_is_that_of_pruning_the_layer_alone() -> None:
    program, inputs = captured("llama"), BY_NAME["llama"].inputs(4, 12)
    found = {row.name: row for row in _find(program, criterion="magnitude", loss_sequences=4).rows}
    for name in (LAYER, "model.layers.0.self_attn.k_proj"):
        alone = apply_passes(program, f"nm_sparsify{{criterion=magnitude,targets={name}}}")
        with torch.no_grad():
            expected = difference({"logits": program(**inputs).logits}, {"logits": alone(**inputs).logits}).kl
        assert found[name].loss == pytest.approx(expected, rel=1e-3)


def test_layer_errors_find_a_layer_that_loses_half_of_itself() -> None:
    program, name = captured("llama"), "model.layers.0.self_attn.q_proj"
    weight = program.tensor(f"{name}.weight")
    program.write_tensor(f"{name}.weight", weight.sign() * weight.abs().mean())  # no weight is less than another
    found = _find(program, loss="layer-error", criterion="magnitude", budget=0.1)
    assert max(found.rows, key=lambda row: row.loss).name == name
    assert found.num_tokens == 0
    assert 0.4 < max(row.loss for row in found.rows) < 0.6


def test_blocks_are_taken_as_a_whole() -> None:
    found = _find(_model(), unit="block", budget=0.5)
    assert [row.name for row in found.rows] == ["model.layers.1", "model.layers.0"]
    assert [row.is_kept_dense for row in found.rows] == [True, False]
    assert len(found.rows[0].layers) == 7
    assert found.given_up == pytest.approx(0.5)
    pruned = apply_passes(_model(), found.text)
    assert {weight.split(".")[2] for weight in pruned.sparse} == {"0"}


def test_what_is_ignored_in_any_case_is_in_the_list_too() -> None:
    found = _find(_model(), ignore=("*.self_attn.*",), loss="layer-error", budget=0.3)
    assert all(".mlp." in row.name for row in found.rows)
    pruned = apply_passes(_model(), found.text)
    assert not any("self_attn" in weight for weight in pruned.sparse)


def test_a_layer_that_the_budget_has_no_room_for_is_passed_over() -> None:
    found = _find(captured("llama"), budget=0.04, loss="layer-error")
    total = sum(row.saved_bytes for row in found.rows)
    for row in found.rows:
        assert not row.is_kept_dense or row.saved_bytes <= 0.04 * total
    assert 0 < found.given_up <= 0.04


def test_saved_bytes_count_indices() -> None:
    assert saved_bytes(64, NMPattern(2, 4)) == 64 * 7 // 8
    assert saved_bytes(64, NMPattern(1, 4)) == (64 * 16 - 16 * 18) // 8


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(SparsepassError, match="between 0 and 1"):
        _find(captured("llama"), budget=1.5)
    with pytest.raises(SparsepassError, match="sparse already"):
        _find(apply_passes(captured("llama"), "nm_sparsify"))
    with pytest.raises(SparsepassError, match=r"no logits.*layer-error"):
        auto_ignore(captured("bert"), BY_NAME["bert"].inputs(2, 8))


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(WORDS * 40, encoding="utf-8")
    model = str(save_tiny_llama(tmp_path / "model"))
    arguments = ["sensitivity", model, "--calibration", str(tmp_path / "train.txt"), "--context", "16", "--num-sequences", "4"]
    done = CliRunner().invoke(app, [*arguments, "--budget", "0.2", "--top", "3"])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "leave dense" in said
    assert "and 11 more" in said
    assert "--passes 'nm_sparsify{ignore=[" in said
    done = CliRunner().invoke(app, [*arguments, "--unit", "block", "--loss", "layer-error", "--budget", "0.5", "--json"])
    document = json.loads(done.stdout)
    assert {row["name"] for row in document["rows"]} == {"model.layers.0", "model.layers.1"}
    assert len(document["ignore"]) > 0
    assert CliRunner().invoke(app, [*arguments, "--budget", "2"]).exit_code == 2
