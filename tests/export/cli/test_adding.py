"""A command is a function and a line in `app.py`: settings become its options, and errors one line."""

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from sparsepass.export.cli import support
from sparsepass.export.cli.app import app
from sparsepass.export.cli.options import Fields
from sparsepass.export.stages import Calibration, ModelSource
from sparsepass.graph import SparsepassError


def echo_command(
    model: support.Model,
    *,
    calibration: Annotated[
        Calibration, Fields(flags={"data": "--text"}, left_out=("batch_size", "compute"), defaults={"data": ..., "seed": 3})
    ],
    evaluation: support.EvaluationOptions,
    times: Annotated[int, typer.Option("--times", help="How often.")] = 1,
) -> None:
    """Print the settings that were given."""
    if times < 0:
        raise SparsepassError(f"--times has to be at least 0, got {times}")
    for _ in range(times):
        print(model, calibration, evaluation, sep="\n")


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))
    app.command("echo", short_help="Print the settings.")(support.clean(echo_command))
    return CliRunner(env={"COLUMNS": "200"})


def test_a_command_gets_the_options_of_its_settings(echo: CliRunner) -> None:
    given = ["--text", "a.txt", "--context", "32", "--gguf-file", "q4.gguf", "--trust-remote-code"]
    result = echo.invoke(app, ["echo", "some/model", *given])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        str(ModelSource(source="some/model", gguf_file="q4.gguf", trust_remote_code=True)),
        str(Calibration(data="a.txt", context=32, seed=3)),
        "None",
    ]
    more = ["--eval-text", "b.txt", "--no-eval-bos", "--max-tokens", "64", "--times", "2"]
    result = echo.invoke(app, ["echo", "some/model", *given, *more])
    assert "Evaluation(text='b.txt', context=512, stride=None, bos=False, max_tokens=64, text_column=None," in result.output
    assert len(result.output.splitlines()) == 6


def test_help_is_what_the_settings_say_of_themselves(echo: CliRunner) -> None:
    shown = " ".join(echo.invoke(app, ["echo", "--help"]).output.split())
    assert "Chooses where in the calibration data the sequences lie." in shown
    assert "[default: 3]" in shown
    assert "--batch-size" not in shown
    assert "echo" in echo.invoke(app, ["--help"]).output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["some/model"], "Missing option '--text'"),
        (["--text", "a.txt"], "Missing argument 'MODEL'"),
        (["some/model", "--text", "a.txt", "--compute", "float32"], "No such option: --compute"),
        (["some/model", "--text", "a.txt", "--times", "-1"], "Error: --times has to be at least 0, got -1"),
    ],
)
def test_wrong_usage_is_one_message_and_code_2(arguments: list[str], said: str, echo: CliRunner) -> None:
    result = echo.invoke(app, ["echo", *arguments])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output
