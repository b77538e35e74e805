"""No command writes over what it reads, whatever it is called, with --force or without."""

import hashlib
import logging
import os
import shutil
from pathlib import Path

import pytest
from tests.export.tiny import WORDS, save_tiny_llama
from typer.testing import CliRunner

from sparsepass.export.cli.app import app
from sparsepass.export.stages.exporting import export
from sparsepass.export.stages.preparing import prepare, write_program
from sparsepass.graph import SparsepassError
from sparsepass.graph.support import CHECKSUMS_FILE, as_utf8


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("originals") / "project"
    model = save_tiny_llama(place / "model")
    write_program(prepare(model, passes="nm_sparsify", validate=False), place / "program")
    export(place / "program", "packed", place / "packed", verify=False)
    (place / "texts").mkdir()
    (place / "texts" / "text.txt").write_text(WORDS * 40)
    (place / "link").symlink_to("program")
    (place / "model-link").symlink_to("model")
    return place


@pytest.fixture
def project(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = shutil.copytree(originals, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(place)
    return place


def state(place: Path) -> dict[str, str]:
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in place.rglob("*")
        if path.is_file()
    }


TEXT = "texts/text.txt"
COMMANDS = {
    "prune": "prune model --calibration texts/text.txt --eval-text texts/text.txt",
    "prune a link": "prune model-link",
    "export": "export program -t hf",
    "export a link": "export link -t hf",
    "retrain": "retrain program --teacher model --data texts -c smollm2-cpu",
    "unpack": "unpack packed",
}
OUTPUTS = {
    "prune": ["model", "./texts/../model", "model/out", "model-link/out", "texts", "."],
    "prune a link": ["model", "model/out", "model-link/../model"],
    "export": ["program", "program/sub/out", "link/out"],
    "export a link": ["program", "program/out"],
    "retrain": ["program", "model", "texts", "texts/out", "link/deep/out"],
    "unpack": ["packed", "packed/out"],
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(("command", "out"), [(command, out) for command, outs in OUTPUTS.items() for out in outs])
def test_an_output_is_no_input(command: str, out: str, force: bool, project: Path) -> None:
    before = state(project)
    result = CliRunner().invoke(app, [*COMMANDS[command].split(), "-o", out, *(["--force"] if force else [])])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    said = " ".join(result.output.split())
    assert "the input" in said
    assert "choose a place apart from what is read" in said
    assert state(project) == before


@pytest.mark.parametrize(
    "arguments",
    [
        "masks program -o program/program.safetensors",
        "masks program -o link/new.safetensors",
        "sample model -o model/sampled.jsonl --tokens 64 --length 16",
        "criteria model --calibration texts/text.txt --eval-text texts/text.txt -o texts/text.txt",
        "criteria model --calibration texts/text.txt --eval-text texts/text.txt --json model/config.json",
    ],
)
def test_neither_is_a_file(arguments: str, project: Path) -> None:
    before = state(project)
    force = [] if arguments.startswith("criteria") else ["--force"]
    result = CliRunner().invoke(app, [*arguments.split(), *force])
    assert result.exit_code == 2, result.output
    assert "the input" in result.output
    assert state(project) == before


@pytest.mark.parametrize(
    "arguments",
    [
        "masks program -o texts/text.txt",
        "sample model -o rows.jsonl --tokens 64 --length 16",
        "prune model -o texts",
        "export program -t hf -o texts",
        "unpack packed -o texts",
    ],
)
def test_what_another_wrote_is_not_replaced(arguments: str, project: Path) -> None:
    (project / "rows.jsonl").write_text('{"text": "mine"}\n')
    before = state(project)
    result = CliRunner().invoke(app, [*arguments.split(), "--force"])
    assert result.exit_code == 2, result.output
    assert "sparsepass did not write" in " ".join(result.output.split())
    assert state(project) == before


def test_functions_refuse_it_too(project: Path) -> None:
    before = state(project)
    with pytest.raises(SparsepassError, match="is the input"):
        export(project / "program", "hf", project / "program", force=True)
    with pytest.raises(SparsepassError, match="is the input"):
        write_program(prepare(project / "program", passes=None), project / "link" / ".." / "program", force=True)
    assert state(project) == before


def test_a_result_is_replaced(project: Path) -> None:
    for _ in range(2):
        result = CliRunner().invoke(app, ["unpack", "packed", "-o", "new", "--force"])
        assert result.exit_code == 0, result.output
    assert (project / "new" / CHECKSUMS_FILE).is_file()


def test_any_name_can_be_written_and_read(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system takes any bytes for a name, and libraries in Rust take UTF-8 only. Folders are made."""
    monkeypatch.setattr(logging.root, "handlers", [])  # what pytest keeps of the log has to be UTF-8
    name = "new\udcff[/b]caf\udce9"
    model = Path("model").rename(f"m{name.replace('/', '')}")
    runner = CliRunner()
    for arguments in (
        ["prune", model, "-o", name, "--no-validate"],
        ["prune", model, "-o", name, "--no-validate", "--force"],
        ["export", name, "-t", "hf", "-o", f"{name}-hf"],
        ["export", name, "-t", "packed", "-o", f"{name}-packed"],
        ["masks", name, "-o", f"{name}.safetensors"],
        ["masks", f"{name}.safetensors"],
        ["verify", f"{name}-hf"],
        ["verify", name, "--report", name],
        ["compare", name, f"{name}-hf"],
        ["unpack", f"{name}-packed", "-o", f"{name}-plain"],
        ["sample", model, "-o", f"{name}.jsonl", "--tokens", "20", "--length", "10"],
        ["report", name],
    ):
        result = runner.invoke(app, list(map(str, arguments)))
        assert result.exit_code == 0, as_utf8(f"{arguments}: {result.output}")
    assert not [path for path in project.rglob(".*") if path.name.endswith((".partial", ".old"))]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_told_in_one_line(project: Path) -> None:
    Path("texts").chmod(0)
    result = CliRunner().invoke(app, ["report", "texts"])
    Path("texts").chmod(0o755)
    assert result.exit_code == 2
    assert "Permission denied" in result.stderr
