"""Programs and mask packs that earlier code saved: loaded, run, saved again, applied."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.compatibility.command_line import FIXTURES, run

from sparsepass import Program, apply_passes, load_model
from sparsepass.graph import ProgramFormatError

PROGRAMS = ("out/pruned", "out/retrained", "programs/folded", "programs/learned", "programs/mixtral")


def outputs(program: Program, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = program(input_ids=stored["input_ids"], attention_mask=stored["attention_mask"]).logits
    return found


def branches(program: Program) -> list[str]:
    return [name for name, state in program.sparse.items() if state.branch is not None]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_loaded_as_it_was_saved(name: str, tmp_path: Path) -> None:
    """Its tensors bit for bit; its outputs but for what another processor rounds otherwise; and once more after saving it."""
    stored = safetensors.torch.load_file(FIXTURES / "outputs.safetensors")
    program = Program.load(FIXTURES / name)
    tensors = safetensors.torch.load_file(FIXTURES / name / "program.safetensors")
    assert tensors
    for key, tensor in tensors.items():
        kind, _, given = key.partition("/")
        found = program.example_inputs[given] if kind == "example_inputs" else program.tensor(key)
        assert torch.equal(found, tensor), key
    found = outputs(program, stored)
    torch.testing.assert_close(found, stored[name], rtol=1e-5, atol=1e-6)
    program.save(tmp_path / "again")
    again = Program.load(tmp_path / "again")
    assert torch.equal(outputs(again, stored), found)
    assert (again.recipe, again.sparse) == (program.recipe, program.sparse)


def test_what_is_known_of_a_program_is_still_known() -> None:
    pruned, retrained = (Program.load(FIXTURES / name) for name in ("out/pruned", "out/retrained"))
    assert pruned.recipe.startswith("nm_sparsify{pattern=2:4,criterion=sparsegpt")
    assert pruned.recipe == retrained.recipe
    assert len(pruned.sparse) == len(branches(pruned)) == 7
    assert pruned.report().num_sparse == 7
    (run,) = retrained.retraining
    assert [found["step"] for found in run["validations"]] == [0, 3, 6]
    folded, learned = (Program.load(FIXTURES / "programs" / name) for name in ("folded", "learned"))
    assert "fold" in folded.recipe
    assert {state.mask for state in folded.sparse.values()} == {None}
    assert len(branches(folded)) == 7
    assert "learn_masks" in learned.recipe
    assert learned.sparse


def test_a_program_of_earlier_code_goes_through_passes() -> None:
    """What a pass asks of the state that earlier code left: the original weights that were kept, or were not."""
    program = apply_passes(Program.load(FIXTURES / "out/retrained"), "fold", validate=False)
    assert {state.mask for state in program.sparse.values()} == {None}
    assert program.recipe.endswith("fold")
    stored = safetensors.torch.load_file(FIXTURES / "outputs.safetensors")
    torch.testing.assert_close(outputs(program, stored), stored["out/retrained"], rtol=1e-4, atol=1e-5)


def test_a_mask_pack_is_applied(tmp_path: Path) -> None:
    """To the dense model it was made of: none of its masks differs in what comes out."""
    dense = load_model(FIXTURES / "model").model
    pack = FIXTURES / "masks.safetensors"
    program = apply_passes(dense, f'nm_sparsify{{masks="{pack}"}}', validate=False)
    assert len(program.sparse) == 7
    program.save(tmp_path / "applied")
    found = json.loads(run("masks", pack, tmp_path / "applied", "--json").output)
    assert len(found["layers"]) == 7
    assert found["total"]["num_flipped"] == 0


def test_a_program_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    text = (FIXTURES / "out/pruned/program.json").read_text(encoding="utf-8")
    (tmp_path / "program.json").write_text(text.replace('"format_version": 1', '"format_version": 999', 1), encoding="utf-8")
    with pytest.raises(ProgramFormatError):
        Program.load(tmp_path)
