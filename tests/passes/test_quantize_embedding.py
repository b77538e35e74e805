"""Embedding and head as bytes: one tensor where they are tied, the same wherever it is read, and in files."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.families import BY_NAME, captured, tensors_of
from torch import Tensor

from sparsepass.export.targets import LoweringContext
from sparsepass.export.targets.hf import HuggingFace
from sparsepass.export.targets.packed import Packed
from sparsepass.graph import PassError, Program
from sparsepass.graph.integers import integers_of
from sparsepass.graph.rewrite import finish, fold_grid
from sparsepass.passes import apply_passes
from sparsepass.passes.quantize_embedding import GRID

TIED, UNTIED = "llama", "mistral"
PASSES = "nm_sparsify,quantize{group_size=16},quantize_embedding"


def _program(name: str, passes: str = PASSES) -> Program:
    return apply_passes(captured(name), passes, validate=False)


def _outputs(program: Program, name: str) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(program(**BY_NAME[name].inputs(3, 7)))


def _tables(program: Program) -> dict[str, str | None]:
    return {site.weight: site.role for site in program.sites() if site.role in ("embedding", "head")}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "bert", "t5", "vit"])
def test_tables_are_found_by_what_the_graph_does_with_them(name: str) -> None:
    program = _program(name)
    tables = _tables(program)
    assert tables
    assert all(program.quantized[weight].grid == GRID for weight in tables)
    others = [site for site in program.sites() if site.weight not in tables and site.weight in program.quantized]
    assert others
    assert all(program.quantized[site.weight].grid.bits == 4 for site in others)
    small = [site.weight for site in program.sites() if site.role == "table"]
    assert not set(small) & program.quantized.keys()


def test_a_tied_table_is_rounded_once_for_all_that_read_it() -> None:
    program = _program(TIED, "quantize_embedding")
    (weight,) = _tables(program)
    state = program.quantized[weight]
    rounding = [
        node for node in program.graph_module.graph.nodes if node.target is torch.ops.sparsepass.quantized_weight.default
    ]
    assert len(rounding) == 1
    assert len(rounding[0].users) == 2
    before = _outputs(program, TIED)
    own = integers_of(program, weight)
    assert own is not None
    assert own.numbers_OI.abs().amax() <= 127
    assert own.scales_OG.shape == (program.tensor(weight).shape[0], 1)
    error = (own.weight_OI - program.tensor(weight).detach().float()).abs()
    assert bool((error <= own.scales_OG.float() * 0.5001).all())
    fold_grid(program, weight)
    finish(program)
    assert state.scales not in program.tensors()
    assert all(map(torch.equal, _outputs(program, TIED), before))


def test_what_it_leaves_alone_has_a_reason() -> None:
    program = _program(UNTIED)
    said = {outcome.site: outcome.reason for outcome in program.history[-1].outcomes if outcome.action == "skipped"}
    assert set(said.values()) == {"neither the embedding of the tokens nor the output head"}
    with pytest.raises(PassError, match="cannot be rewritten: neither the embedding"):
        _program(UNTIED, "quantize_embedding{targets=model.layers.0.mlp.up_proj}")
    with pytest.raises(PassError, match=r"quantize\b.*put quantize in front of it"):
        _program(UNTIED, "nm_sparsify,quantize_embedding,quantize")
    with pytest.raises(PassError, match=r"quantized already \(int8, one scale a row\)"):
        apply_passes(program, "quantize_embedding")


@pytest.mark.parametrize("name", [TIED, UNTIED])
def test_a_packed_folder_holds_the_programs_own_bytes(name: str, tmp_path: Path) -> None:
    program = _program(name)
    lowered = Packed().lower(program, tmp_path, LoweringContext())
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert lowered.artifact.settings.embedding == "int8"
    for weight in _tables(program):
        own = integers_of(program, weight)
        assert own is not None
        path = weight.removesuffix(".weight")
        assert torch.equal(stored[f"{path}.weight"], own.numbers_OI)
        assert torch.equal(stored[f"{path}.scales"], own.scales_OG)
    assert all(check.held for check in Packed().verify(program, tmp_path, lowered, LoweringContext()))
    stored[f"{path}.weight"][3, 5] ^= 1
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    broken = {check.name: check for check in Packed().verify(program, tmp_path, lowered, LoweringContext())}
    assert not broken["weights"].held
    assert f"{path} does not hold the program's own integers" in broken["weights"].summary


def test_a_part_of_the_tables_is_packed_as_asked(tmp_path: Path) -> None:
    program = _program(UNTIED, "nm_sparsify,quantize{group_size=16},quantize_embedding{ignore=lm_head}")
    lowered = Packed().lower(program, tmp_path, LoweringContext())
    assert lowered.artifact.settings.embeddings == ("model.embed_tokens",)
    assert all(check.held for check in Packed().verify(program, tmp_path, lowered, LoweringContext()))


def test_a_table_that_does_more_than_look_up_stays_on_its_grid(tmp_path: Path) -> None:
    program = _program("gemma3")  # which scales what it looks up
    lowered = Packed().lower(program, tmp_path, LoweringContext())
    assert lowered.artifact.settings.embedding is None
    assert all(check.held for check in Packed().verify(program, tmp_path, lowered, LoweringContext()))


@pytest.mark.parametrize("name", [TIED, UNTIED])
def test_hf_stores_values_on_the_grid(name: str, tmp_path: Path) -> None:
    program = _program(name)
    lowered = HuggingFace().lower(program, tmp_path, LoweringContext())
    tables = set(_tables(program))
    assert set(lowered.artifact.rounded) == tables
    assert any("floating-point values on the grid" in note for note in lowered.notes)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for weight in tables:
        own = integers_of(program, weight)
        assert own is not None
        assert torch.equal(stored[weight], own.weight_OI)
    assert all(check.held for check in HuggingFace().verify(program, tmp_path, lowered, LoweringContext()))
