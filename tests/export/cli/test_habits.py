"""Habits of all commands: results on standard output alone, one form of JSON, tables of 80 columns, quiet and verbose."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.export.cli.commands import run
from tests.export.cli.documentation import commands
from tests.export.tiny import WORDS, save_tiny_llama
from typer.testing import Result

from sparsepass.export.cli import main
from sparsepass.export.cli.output import JSON_KEYS

_RECIPE = """
model: {place}/tiny
out: {place}/recipe
prune: {{passes: nm_sparsify, calibration: {place}/words.txt, num_sequences: 2, context: 16}}
eval: {{text: {place}/words.txt, context: 16, max_tokens: 64}}
"""
_BENCH = ("--batch", 1, "--new-tokens", 2, "--prefill-tokens", 8, "--repeats", 1, "--no-memory")
_TRAIN = ("train.max_steps=1", "train.batch_size=2", "data.context=16", "data.validation=1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, texts, a pruned program, a packed folder, and a recipe."""
    place = tmp_path_factory.mktemp("habits")
    save_tiny_llama(place / "tiny")
    (place / "words.txt").write_text(WORDS * 60)
    (place / "recipe.yaml").write_text(_RECIPE.format(place=place))
    assert run("prune", place / "tiny", "-o", place / "pruned", *calibration(place)).exit_code == 0
    assert run("export", place / "pruned", "-t", "packed", "-o", place / "packed").exit_code == 0
    return place


def calibration(place: Path) -> list[Any]:
    return ["--calibration", place / "words.txt", "--num-sequences", 2, "--context", 16]


def every(place: Path, out: Path) -> dict[str, list[Any]]:
    """A run of each command that ends with 0."""
    text = place / "words.txt"
    evaluation = ["--eval-text", text, "--eval-context", 16, "--max-tokens", 64]
    settings = [word for one in _TRAIN for word in ("--set", one)]
    return {
        "plan": ["plan", place / "tiny", "--gpu", "a100", "--seq", 16, "--new-tokens", 8, "--min-gain", "1"],
        "channels": ["channels", place / "tiny"],
        "prune": ["prune", place / "tiny", "-o", out / "p", *calibration(place), *evaluation],
        "retrain": ["retrain", place / "pruned", "-o", out / "r", "--data", text, *settings, *evaluation],
        "run": ["run", place / "recipe.yaml", "--out", out / "recipe"],
        "export": ["export", place / "pruned", "-t", "hf", "-o", out / "hf"],
        "eval": ["eval", place / "pruned", "--text", text, "--context", 16, "--max-tokens", 64],
        "compare": ["compare", place / "tiny", place / "tiny"],
        "bench": ["bench", place / "packed", *_BENCH],
        "size": ["size", place / "tiny", place / "packed"],
        "verify": ["verify", place / "packed"],
        "unpack": ["unpack", place / "packed", "-o", out / "u"],
        "sample": ["sample", place / "tiny", "-o", out / "s.jsonl", "--tokens", 32, "--length", 16],
        "masks": ["masks", place / "pruned", place / "pruned"],
        "criteria": ["criteria", place / "tiny", *calibration(place), *evaluation, "--criteria", "magnitude"],
        "sensitivity": ["sensitivity", place / "tiny", *calibration(place), "--loss", "layer-error"],
        "report": ["report", place / "pruned", "-o", out / "pages"],
    }


def test_every_command_has_the_options_that_all_have() -> None:
    for name, command in commands().items():
        flags = {flag for each in command.params for flag in each.opts}
        assert {"--quiet", "--verbose", "--json"} <= flags, name


@pytest.fixture(scope="module")
def said(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """What each command says as it comes, at 80 columns."""
    out = tmp_path_factory.mktemp("said")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        return {name: run(*arguments) for name, arguments in every(place, out).items()}


def test_every_command_is_run(said: dict[str, Result]) -> None:
    assert said.keys() == commands().keys()
    assert {name: result.exit_code for name, result in said.items()} == dict.fromkeys(said, 0)


def test_results_are_on_standard_output_and_news_are_not(said: dict[str, Result]) -> None:
    for name, result in said.items():
        assert result.stdout.strip(), name
        assert not re.search(r"^\d\d:\d\d:\d\d ", result.stdout, re.MULTILINE), name
    for name in ("prune", "retrain", "run", "export", "eval", "sample", "criteria"):
        assert re.search(r"^\d\d:\d\d:\d\d loading|row 1", said[name].stderr, re.MULTILINE), (name, said[name].stderr)


def test_tables_fit_80_columns(said: dict[str, Result]) -> None:
    for name, result in said.items():
        for line in result.stdout.splitlines():
            is_of_table = "│" in line or "┃" in line or "━" in line
            assert not is_of_table or len(line) <= 80, (name, line)
            assert "…" not in line, f"{name} cuts words off: {line}"
    for name in ("compare", "masks", "sensitivity"):
        assert "model.layers.1.self_attn.q_proj" in said[name].stdout, f"{name} breaks the names of layers"


@pytest.mark.parametrize("name", sorted(commands()))
def test_json_is_one_object_of_one_form(name: str, place: Path, tmp_path: Path) -> None:
    result = run(*every(place, tmp_path)[name], "--json", "--quiet")
    document = json.loads(result.stdout)
    assert tuple(document)[: len(JSON_KEYS)] == JSON_KEYS
    assert document["command"] == name
    assert document["exit_code"] == result.exit_code == 0
    assert len(document) > len(JSON_KEYS)
    assert not result.stderr.strip(), "quiet says nothing"


def test_quiet_and_verbose_exclude_each_other(place: Path) -> None:
    assert run("verify", place / "packed", "--quiet", "--verbose").exit_code == 2


def test_verbose_says_what_is_logged(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    from sparsepass.export.pattern import check_pattern

    def check(*given: Any, **more: Any) -> Any:
        logging.getLogger("sparsepass.export.pattern").debug("looking at %s", given[0])
        return check_pattern(*given, **more)

    monkeypatch.setattr("sparsepass.export.pattern.check_pattern", check)
    assert "looking at" in run("verify", place / "tiny", "--verbose", "--ignore", "*").stderr
    assert "looking at" not in run("verify", place / "tiny", "--ignore", "*").stderr


def test_an_interrupt_before_a_command_begins_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsepass.export.cli.app.app", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines() == ["Error: interrupted"]
