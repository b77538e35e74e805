"""The command masks: writes, shows and compares packs."""

import json
from pathlib import Path

import pytest
from tests.families import captured
from typer.testing import CliRunner

from sparsepass.export.cli import app
from sparsepass.graph import Program
from sparsepass.passes import apply_passes


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["masks", *map(str, arguments)])
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture
def program(tmp_path: Path) -> Path:
    apply_passes(captured("llama"), "nm_sparsify").save(tmp_path / "pruned")
    return tmp_path / "pruned"


def test_a_pack_is_written_shown_compared_and_applied(program: Path, tmp_path: Path) -> None:
    pack = tmp_path / "masks.safetensors"
    code, said = run(program, "-o", pack, "--about", "general")
    assert code == 0
    assert "14 masks of transformers.LlamaForCausalLM, 2:4" in said
    code, said = run(pack, "--json")
    assert code == 0
    assert json.loads(said)["about"] == "general"
    code, said = run(pack, program, "--json")
    assert code == 0
    assert json.loads(said)["total"]["num_flipped"] == 0
    code, said = run(pack, program)
    assert "all" in said
    assert "100.00%" in said
    again = apply_passes(captured("llama"), f'nm_sparsify{{masks="{pack}"}}')
    assert again.sparse == Program.load(program).sparse


def test_what_does_not_go_together_is_refused(program: Path, tmp_path: Path) -> None:
    pack = tmp_path / "masks.safetensors"
    assert run(program, "-o", pack)[0] == 0
    before = pack.read_bytes()
    for arguments, message in (
        ((program, "-o", pack), "exists; choose another name, or pass --force"),
        ((program, program, "-o", tmp_path / "x"), "leave one of them out"),
        ((program, "--about", "x"), "name the file with --out"),
        ((tmp_path / "nowhere",), "give a folder that `sparsepass prune` wrote, or a mask pack"),
    ):
        code, said = run(*arguments)
        assert code == 2
        assert message in said
    assert pack.read_bytes() == before
    assert run(program, "-o", pack, "--force")[0] == 0
