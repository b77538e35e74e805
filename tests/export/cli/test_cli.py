"""The command line as its user meets it: what it prints, what it writes, and its exit codes."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.export.cli.commands import run
from tests.export.tiny import WORDS, save_tiny_llama

from sparsepass.export.cli import app as cli, support as cli_support
from sparsepass.export.report.document import read_report
from sparsepass.export.targets import Check, HuggingFace
from sparsepass.graph import Program
from sparsepass.graph.support import CHECKSUMS_FILE, write_checksums

TASKS = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, a pruned program, and its two exports."""
    place = tmp_path_factory.mktemp("cli")
    save_tiny_llama(place / "tiny")
    (place / "words.txt").write_text(WORDS * 60)
    calibration = ["--calibration", place / "words.txt", "--num-sequences", 2, "--context", 16]
    evaluation = ["--eval-text", place / "words.txt", "--eval-context", 16, "--max-tokens", 64]
    result = run("prune", place / "tiny", "-o", place / "pruned", "--passes", "nm_sparsify,slorb", *calibration, *evaluation)
    assert result.exit_code == 0, result.output
    assert "14" in result.output
    assert "times dense" in result.output
    return place


@pytest.fixture(scope="module")
def onnx(place: Path) -> Path:
    result = run("export", place / "pruned", "-t", "onnx", "-o", place / "onnx")
    assert result.exit_code == 0, result.output
    assert "did NOT" not in result.output
    return place / "onnx"


def test_prune_writes_a_program_with_its_tokenizer_and_report(place: Path) -> None:
    program = Program.load(place / "pruned")
    assert program.recipe.startswith("nm_sparsify{pattern=2:4,criterion=sparsegpt")
    assert len(program.sparse) == 14
    assert (place / "pruned" / "tokenizer.json").is_file()
    report = read_report(place / "pruned")
    assert report["recipe"] == program.recipe
    assert [run["stage"] for run in report["runs"]] == ["prune"]
    assert report["accuracy"]["text"] == str(place / "words.txt")
    assert set(report["passes"]["skipped"]) == {"lm_head", "model.embed_tokens"}
    assert "artifact" not in report


def test_targets_and_ignore_choose_layers(place: Path, tmp_path: Path) -> None:
    choice = ["--targets", "*.mlp.*", "--targets", "*.q_proj", "--ignore", "re:.*layers\\.1.*"]
    result = run("prune", place / "tiny", "-o", tmp_path / "out", "--dtype", "bfloat16", *choice)
    assert result.exit_code == 0, result.output
    program = Program.load(tmp_path / "out")
    assert set(program.sparse) == {
        f"model.layers.0.{name}.weight" for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")
    }
    assert program.tensor("model.layers.0.mlp.up_proj.weight").dtype == torch.bfloat16


def test_sparse_export_is_the_export_command(place: Path, tmp_path: Path) -> None:
    result = run(place / "tiny", "-t", "hf", "-o", tmp_path / "out", app=cli.export_app)
    assert result.exit_code == 0, result.output
    report = read_report(tmp_path / "out")
    assert report["recipe"].startswith("nm_sparsify{pattern=2:4,criterion=magnitude"), "the default passes"
    assert report["verification"]["held"] is True


def test_passes_none_exports_the_dense_model(place: Path, tmp_path: Path) -> None:
    result = run("export", place / "tiny", "-t", "hf", "-o", tmp_path / "out", "--passes", "none", "--no-verify")
    assert result.exit_code == 0, result.output
    assert read_report(tmp_path / "out")["recipe"] == ""


def test_a_check_that_fails_gives_exit_code_1(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HuggingFace, "verify", lambda *_: (Check(name="outputs", held=False, summary="too far"),))
    result = run("export", place / "pruned", "-t", "hf", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "outputs: too far" in result.stderr


def test_what_could_not_be_checked_gives_exit_code_3(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HuggingFace, "verify", lambda *_: (Check(name="outputs", held=None, summary="no kernels here"),))
    result = run("export", place / "pruned", "-t", "hf", "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert "Not checked: outputs: no kernels here" in result.stderr
    assert run("export", place / "pruned", "-t", "hf", "-o", tmp_path / "b", "--allow-unchecked").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "{}/nowhere", "-t", "onnx", "-o", "{}/x"], "does not exist"),
        (["export", "{}/tiny", "-t", "onxx", "-o", "{}/x"], "did you mean 'onnx'"),
        (["export", "{}/tiny", "-t", "onnx", "-o", "{}/tiny"], "is the input"),
        (["export", "{}/tiny", "-t", "onnx", "-o", "{}/pruned"], "not empty"),
        (["export", "{}/tiny", "-t", "onnx", "-o", "{}/x", "--passes", "nm_sparsfy"], "nm_sparsify"),
        (["export", "{}/tiny", "-t", "hf", "-o", "{}/x", "--task", "image-classification"], "has no option task"),
        (["prune", "{}/tiny", "-o", "{}/x", "--passes", "nm_sparsify{pattern=0:4}"], "0:4"),
        (["prune", "{}/tiny", "-o", "{}/x", "--passes", "slorb"], "put nm_sparsify before it"),
        (["prune", "{}/pruned", "-o", "{}/x"], "made sparse already"),
        (["prune", "{}/tiny", "-o", "{}/x", "--passes", "nm_sparsify{criterion=wanda}"], "needs calibration"),
        (["prune", "{}/tiny", "-o", "{}/x", "--calibration", "{}/nowhere.txt"], "nowhere.txt"),
        (["prune", "{}/tiny", "-o", "{}/x", "--eval-text", "{}/nowhere.txt"], "does not exist"),
        (["eval", "{}/tiny"], "nothing to measure"),
        (["eval", "{}/tiny", "--text", "{}/nowhere.txt"], "does not exist"),
        (["eval", "{}/tiny", "--text", "{}/words.txt", "--context", "4096"], "64 positions"),
        (["compare", "{}/tiny", "{}/nowhere"], "does not exist"),
        (["compare", "{}/tiny", "{}/tiny", "--text", "{}/words.txt", "--inputs", "x"], "choose one"),
        (["verify", "{}/nowhere"], "does not exist"),
        (["verify", "{}/words.txt"], "words.txt"),
        (["verify", "{}/pruned", "--pattern", "4:2"], "did you mean 2:4"),
    ],
)
def test_a_mistake_is_one_message_exit_code_2_and_nothing_written(arguments: list[str], said: str, place: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    result = run(*(argument.replace("{}", str(place), 1) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert said in result.stderr.replace("\n", " ")
    lines = [line for line in result.stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]  # but for news
    assert lines[0].startswith("Error: ")
    assert "Traceback" not in result.output
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


@pytest.mark.parametrize("arguments", [["export", "m"], ["prune", "m", "-o", "x", "--batch-size", "0"], ["nothing"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_full_disk_and_a_missing_permission_are_messages(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(Program, "save_into", refuse)
    result = run("prune", place / "tiny", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "Permission denied: somewhere; name a place where you may read and write" in result.stderr.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_eval_states_everything_the_figure_depends_on(place: Path) -> None:
    result = run("eval", place / "pruned", "--text", place / "words.txt", "--context", 16, "--stride", 8, "--max-tokens", 64)
    assert result.exit_code == 0, result.output
    for part in ("perplexity", "tokens scored", "context 16", "stride 8", "no BOS", "float32"):
        assert part in result.output
    again = run("eval", place / "pruned", "--text", place / "words.txt", "--context", 16, "--max-tokens", 64, "--bos", "--json")
    found = json.loads(again.stdout)["perplexity"]
    assert (found["bos"], found["context"], found["text"]) == (True, 16, str(place / "words.txt"))


def test_eval_runs_a_task_file_of_ones_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def tasks(model: Any, tokenizer: Any, names: list[str], **options: Any) -> dict[str, Any]:
        asked.update(options, names=names, is_program=isinstance(model, Program), has_tokenizer=tokenizer is not None)
        return {"lm_eval": "0", "results": {"capitals": {"alias": "capitals", "acc,none": 0.25}}}

    monkeypatch.setattr("sparsepass.export.stages.lm_eval_tasks", tasks)
    monkeypatch.setattr("sparsepass.export.stages.check_tasks", lambda *_, **__: None)
    result = run("eval", place / "pruned", "--tasks", "capitals, other", "--include-path", TASKS, "--limit", 3)
    assert result.exit_code == 0, result.output
    assert "acc,none" in result.output
    assert "0.2500" in result.output
    assert asked["names"] == ["capitals", "other"]
    assert (asked["limit"], asked["include_path"], asked["batch_size"]) == (3, TASKS, 1)
    assert asked["is_program"]
    assert asked["has_tokenizer"]


def test_compare_finds_a_program_and_its_onnx_file_equivalent(place: Path, onnx: Path) -> None:
    result = run("compare", place / "pruned", onnx)
    assert result.exit_code == 0, result.output
    assert "Equivalent on these inputs." in result.output
    text = run("compare", onnx / "model.onnx", place / "pruned", "--text", place / "words.txt", "--json")
    assert text.exit_code == 0, text.output
    assert json.loads(text.stdout)["equivalent"] is True


def test_compare_tells_a_pruned_model_from_its_dense_one(place: Path) -> None:
    result = run("compare", place / "tiny", place / "pruned")
    assert result.exit_code == 1
    assert "exceeds rtol" in result.stderr
    assert "first layer at which they part: model.layers.0.self_attn.q_proj" in result.output
    assert run("compare", place / "tiny", place / "pruned", "--rtol", 9, "--max-kl", 9, "--no-layers").exit_code == 0
    assert run("compare", place / "tiny", place / "tiny", "--exact").exit_code == 0


def test_compare_takes_inputs_from_a_file(place: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 300, (2, 5))
    safetensors.torch.save_file({"input_ids": ids}, tmp_path / "inputs.safetensors")
    result = run("compare", place / "tiny", place / "tiny", "--inputs", tmp_path / "inputs.safetensors", "--exact")
    assert result.exit_code == 0, result.output
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    unknown = run("compare", tmp_path / "model.onnx", tmp_path / "model.onnx")
    assert unknown.exit_code == 2
    assert "no inputs are known" in unknown.stderr


def test_verify_knows_from_the_report_what_is_dense_on_purpose(place: Path, onnx: Path) -> None:
    for checked in (place / "pruned", onnx, onnx / "model.onnx"):
        result = run("verify", checked)
        assert result.exit_code == 0, result.output
        assert "2:4 holds (14 conforms" in result.output
    assert run("verify", onnx, "--pattern", "1:4").exit_code == 1
    dense = run("verify", place / "tiny")
    assert dense.exit_code == 1
    assert "does NOT hold" in dense.output
    found = json.loads(run("verify", onnx, "--json").stdout)
    assert found["conforms"] is True
    assert len(found["reports"][0]["entries"]) > 14


def test_verify_without_a_report_needs_to_be_told_what_may_be_dense(place: Path, tmp_path: Path) -> None:
    from sparsepass.export.stages.exporting import export

    export(place / "pruned", "hf", tmp_path / "out", verify=False)
    for name in ("report.json", CHECKSUMS_FILE):
        (tmp_path / "out" / name).unlink()
    assert run("verify", tmp_path / "out").exit_code == 1, "the output head is dense"
    assert run("verify", tmp_path / "out", "--ignore", "lm_head").exit_code == 0
    noted = run("eval", tmp_path / "out", "--text", place / "words.txt", "--context", 16, "--max-tokens", 64)
    assert "without the SLoRB branches" in noted.stderr.replace("\n", " ")


def test_verify_catches_a_weight_that_was_filled_again(place: Path, onnx: Path, tmp_path: Path) -> None:
    import shutil

    import onnx_ir as ir

    damaged = shutil.copytree(onnx, tmp_path / "onnx")
    model = ir.load(damaged / "model.onnx")
    value = model.graph.initializers["model.layers.0.mlp.up_proj.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() + 1, name=value.name)
    ir.save(model, damaged / "model.onnx")
    result = run("verify", damaged)
    assert result.exit_code == 1
    assert "model.layers.0.mlp.up_proj.weight" in result.output
    assert "[32x64, summed along axis 0]: dense: every group" in result.output.replace("\n", "")


def test_help_comes_without_loading_torch() -> None:
    code = (
        "import sys; import sparsepass.export.cli.app as c; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    for app in (cli.app, cli.export_app):
        result = run("--help", app=app)
        assert result.exit_code == 0
    version = run("--version")
    assert version.exit_code == 0
    assert version.output.startswith("sparsepass ")
    for command in ("prune", "export", "eval", "compare", "verify"):
        assert run(command, "--help").exit_code == 0


def test_the_package_runs_as_a_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sparsepass", "verify", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("sparsepass", run_name="__main__")
    assert ended.value.code == 0
    assert "Usage: sparsepass verify" in capsys.readouterr().out


def test_the_public_names_are_all_there() -> None:
    import sparsepass
    import sparsepass.export

    for package in (sparsepass, sparsepass.export):
        for name in package.__all__:
            assert getattr(package, name) is not None
        assert set(package.__all__) <= set(dir(package))
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = package.nothing


def test_ctrl_c_leaves_the_old_output_and_exits_with_130(place: Path, tmp_path: Path) -> None:
    """In a process of its own: a real signal, while the passes run."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    write_checksums(out)
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs are born without it
        "import sparsepass.passes.manager as manager\n"
        "def slow(*_): print('running', file=sys.__stdout__, flush=True); time.sleep(60)\n"  # sys.stdout is kept for results
        "manager._rewrite = slow\n"
        "from sparsepass.export.cli.app import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "prune", str(place / "tiny"), "-o", str(out), "--force"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=600)
    assert process.returncode == cli_support.INTERRUPTED
    assert "interrupted" in said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "old").read_text() == "old"
