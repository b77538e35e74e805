"""The command masks: writes, shows and compares packs."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import transformers as hf
from tests.export.tiny import WORDS, save_tiny_llama
from tests.families import captured
from tests.retrain.runs import exports_once
from typer.testing import CliRunner

from sparsepass.export.cli.app import app
from sparsepass.graph import Program
from sparsepass.passes import apply_passes
from sparsepass.passes.masks.pack import MaskPack

ROOT = Path(__file__).parents[3]


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


def test_the_domain_example_of_the_readme_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of it, on a tiny model, with few tokens; what comes out is the domain's pack on the model's own weights."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Masks for a domain\n")[2].partition("\n## ")[0]
    lines = [shlex.split(line, comments=True) for line in section.split("```")[1].splitlines() if line]
    assert [line[:2] for line in lines].count(["sparsepass", "retrain"]) == 2
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "MODEL")
    Path("general.txt").write_text(WORDS * 60)
    Path("code.txt").write_text("def f(x): return x + 1\n" * 200)
    small = ["train.max_tokens=1024", "train.lr=2e-2", "data.context=16", "data.validation=4", "train.validate_every=4"]
    with exports_once():
        for line in lines:
            few = [part for value in small for part in ("--set", value)] if line[1] == "retrain" else []
            done = CliRunner().invoke(app, [*line[1:], *few])
            assert done.exit_code == 0, f"{line}: {done.output}"
    general, code = MaskPack.load("general.safetensors"), MaskPack.load("code.safetensors")
    assert (general.about, code.about) == ("general", "Python source code")
    assert any(not torch.equal(general.masks[name].mask(), code.masks[name].mask()) for name in general.masks)
    found, trained = Program.load("for-code"), Program.load("code")
    weights = hf.LlamaForCausalLM.from_pretrained("MODEL").state_dict()
    for name, state in found.sparse.items():
        assert state.mask is not None
        assert torch.equal(found.tensor(state.mask), trained.tensor(state.mask))
        assert torch.equal(found.tensor(name), weights[name])
