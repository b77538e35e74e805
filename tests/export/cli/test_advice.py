import json
from pathlib import Path

import pytest
from tests.export.cli.commands import run
from tests.export.tiny import save_tiny_llama

from sparsepass.export.cli.advice import as_options

FLAGS = {
    "force": "--force",
    "text_column": "--text-column",
    "evaluation.text_column": "--eval-text-column",
    "evaluation.max_tokens": "--max-tokens",
    "gguf_file": "--gguf-file",
    "bos": "--eval-bos",
    "memory": "--no-memory",
    "context": "--context",
}


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("pass force=True to replace it", "pass --force to replace it"),
        ("choose one with gguf_file", "choose one with --gguf-file"),
        ("name it with text_column", "name it with --text-column"),
        ("evaluation text has no such column; name it with text_column", "--eval-text-column"),
        ("a training run needs max_steps or max_tokens", "needs max_steps or max_tokens"),
        ("use bos=False", "use --no-eval-bos"),
        ("times alone (memory=False)", "times alone (--no-memory)"),
        ("a context of 5, by force", "a context of 5, by force"),
        ("choose context=512.", "choose --context 512."),
        ("pass tokenizer=..., or ids", "The command line has no option for tokenizer: Python has"),
        ("the file my_text_column.txt, 'text_column' and {force=True}", "my_text_column.txt, 'text_column' and {force=True}"),
    ],
)
def test_parameters_are_said_as_options(said: str, wanted: str) -> None:
    assert wanted in as_options(said, FLAGS)


def test_a_column_is_named_by_the_option_that_there_is(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "m")
    (tmp_path / "c.jsonl").write_text(json.dumps({"content": "a fox " * 99}) + "\n")
    common = ["prune", str(model), "-o", str(tmp_path / "o"), "--calibration", str(tmp_path / "c.jsonl"), "--context", "16"]
    refused = run(*common)
    assert refused.exit_code == 2
    assert "--text-column" in refused.stderr
    assert run(*common, "--text-column", "content").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prune", "M", "-o", "O", "--eval-context", "64", "--eval-stride", "8"], "--eval-context, --eval-stride would change"),
        (["prune", "M", "-o", "O", "--no-eval-bos"], "--eval-bos would change nothing, because --eval-text was not given"),
        (["export", "M", "-t", "hf", "-o", "O", "--max-tokens", "9"], "--max-tokens would change nothing"),
        (["retrain", "M", "-o", "O", "--eval-context", "64"], "--eval-text was not given"),
        (["prune", "M", "-o", "O", "--num-sequences", "9"], "--num-sequences would change nothing, because --calibration was"),
        (["eval", "M", "--context", "64"], "--context would change nothing, because --text was not given"),
        (["eval", "M", "--text", "python-docs", "--limit", "3"], "--limit would change nothing, because --tasks was not given"),
        (["compare", "A", "B", "--tokens", "3"], "--tokens would change nothing, because --text was not given"),
    ],
)
def test_settings_of_what_is_not_given_are_refused(arguments: list[str], said: str) -> None:
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert said in refused.stderr


def test_what_can_be_refused_is_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    model = save_tiny_llama(tmp_path / "m")
    monkeypatch.setattr("sparsepass.export.stages.settings.ModelSource.load", load)
    (tmp_path / "rows.csv").write_text("a,b\n")
    (tmp_path / "file").write_text("")
    out, text = tmp_path / "o", str(tmp_path / "rows.csv")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "r.jsonl").write_text('{"body": "words"}\n')
    train = ["retrain", model, "-o", out, "--data", "python-docs", "--set", "train.max_tokens=9"]
    data, measured = ["--calibration", "python-docs"], ["--eval-text", "python-docs"]
    export = ["export", model, "-o", out, "-t"]
    for arguments, said in (
        ([*export, "onnx", "--dtype", "float64"], "float64 is not supported by the onnx target"),
        ([*export, "onnx", "--opset", "3"], "opset 3 is not supported"),
        ([*export, "onnx", "--task", "poetry"], "'poetry' is not known to the onnx target"),
        ([*export, "tensorrt", "--runtime", "torch-tensorrt"], "torch-tensorrt is not installed"),
        ([*export, "torch", "--timings", tmp_path / "no.json"], "no.json"),
        (["prune", model, "-o", out, "--calibration", text], "suffix '.csv'"),
        (["prune", model, "-o", out, "--calibration", tmp_path / "no.txt"], "no.txt does not exist"),
        (["prune", model, "-o", out, "--eval-text", text], "suffix '.csv'"),
        (["prune", model, "-o", tmp_path / "file/o"], "is no folder"),
        (["prune", model, "-o", out, "--passes", "nm_sparsify{criterion=wanda}"], "needs calibration data"),
        (["prune", model, "-o", out, "--passes", 'nm_sparsify{masks="no.safetensors"}'], "no.safetensors"),
        (["prune", model, "-o", out, "--calibration", tmp_path / "empty.txt"], "empty.txt is empty"),
        (["prune", model, "-o", out, *data, "--context", 0], "context has to be at least 1"),
        (["prune", model, "-o", out, "--calibration", tmp_path / "r.jsonl", "--text-column", "no"], "no text column 'no'"),
        (["prune", model, "-o", out, *measured, "--eval-context", 1], "at least 2 tokens"),
        (["eval", model, "--text", "python-docs", "--stride", 0], "stride has to lie"),
        (["eval", model, "--tasks", "no_such_task", "--include-path", tmp_path / "no"], "is not a folder"),
        (["compare", model, tmp_path / "no"], "no does not exist"),
        (["compare", model, model, "--inputs", tmp_path / "no.safetensors"], "no.safetensors does not exist"),
        (["bench", model, "--against", tmp_path / "no"], "no does not exist"),
        (["bench", model, "--report", tmp_path / "file/o"], "is no folder"),
        (["plan", model, "--gpu", "a100", "--report", tmp_path / "file/o"], "is no folder"),
        (["verify", model, "--report", tmp_path / "file/o"], "is no folder"),
        (["report", model, "-o", tmp_path / "file/o"], "is no folder"),
        (["masks", model, tmp_path / "no"], "there is no"),
        (["criteria", model, *data, *measured, "--work", tmp_path / "file/o"], "is no folder"),
        (["criteria", model, *data, *measured, "--dtype", "int3"], "int3"),
        (["criteria", tmp_path / "no", *data, *measured], "no does not exist"),
        (["sensitivity", model, *data, "--budget", 2], "the budget is the share"),
        (["sensitivity", model, *data, "--criterion", "wnada"], "wanda"),
        (["sensitivity", model, *data, "--pattern", "4:2"], "4:2"),
        ([*train, "--teacher", tmp_path / "no"], "no does not exist"),
        ([*train, "--teacher-cache", tmp_path / "file/o"], "is no folder"),
        ([*train, "--teacher-cache", tmp_path / "file/o", "--cache-only"], "is no folder"),
        ([*train, "--run-folder", tmp_path / "file/o"], "is no folder"),
        ([*train, "--from-checkpoint", tmp_path / "no"], "no does not exist"),
        (["criteria", model, "--calibration", text, "--eval-text", "python-docs"], "suffix '.csv'"),
        (["criteria", model, *data, *measured, "-o", tmp_path / "folder"], "is a folder"),
        (["sensitivity", model, "--calibration", text], "suffix '.csv'"),
        *(
            ([*words, "--device", "nothing"], "device nothing cannot be used here")
            for words in (
                ["prune", model, "-o", out],
                [*export, "onnx"],
                ["eval", model, "--text", "python-docs"],
                ["criteria", model, *data, *measured],
                ["sensitivity", model, *data],
                ["sample", model, "-o", tmp_path / "s.jsonl", "--tokens", 9],
                ["bench", model],
                ["retrain", model, "-o", out, "--data", "python-docs", "--set", "train.max_tokens=9"],
            )
        ),
        (["retrain", model, "-o", out, "--data", tmp_path / "no.txt", "--set", "train.max_tokens=9"], "no.txt does not exist"),
    ):
        refused = run(*arguments)
        assert refused.exit_code == 2, arguments
        assert said in refused.stderr, refused.stderr


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("prune: {passes: 'nm_sparsify{criterion=wanda}'}", "needs calibration data"),
        ("prune: {}\nretrain: {teacher: PLACE/no, train: {max_steps: 1}, data: {source: python-docs}}", "no does not exist"),
        (
            "prune: {}\nretrain: {teacher_cache: PLACE/r.yaml/x, train: {max_steps: 1}, data: {source: python-docs}}",
            "no folder",
        ),
        ("prune: {}\neval: {text: PLACE/no.txt}", "no.txt does not exist"),
        ("prune: {}\nexport: {target: tensorrt, runtime: torch-tensorrt}", "torch-tensorrt is not installed"),
    ],
)
@pytest.mark.parametrize("words", [["--dry-run"], []])
def test_a_recipe_that_cannot_be_run_is_refused_before_its_first_stage(
    words: list[str], section: str, said: str, tmp_path: Path
) -> None:
    model, recipe = save_tiny_llama(tmp_path / "m"), tmp_path / "r.yaml"
    recipe.write_text(f"model: {model}\nout: {tmp_path}/out\n{section.replace('PLACE', str(tmp_path))}\n")
    refused = run("run", recipe, *words)
    assert refused.exit_code == 2
    assert said in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--dry-run"], []])
def test_a_recipe_whose_model_is_missing_is_refused(words: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {tmp_path}/missing\nout: {tmp_path}/out\nprune: {{passes: nm_sparsify}}\n")
    refused = run("run", recipe, *words)
    assert refused.exit_code == 2
    assert "missing does not exist" in refused.stderr
