"""Texts as people have them: several files, folders with data sets, and columns, to evaluate and to compare on."""

import json
from pathlib import Path

import datasets
import pytest
from tests.export.cli.commands import run
from tests.export.tiny import WORDS, save_tiny_llama

from sparsepass.export.stages import Evaluation


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("texts")
    save_tiny_llama(place / "tiny")
    (place / "a.txt").write_text(WORDS * 30)
    (place / "b.jsonl").write_text("".join(json.dumps({"body": WORDS}) + "\n" for _ in range(30)))
    datasets.Dataset.from_dict({"body": [WORDS] * 30}).save_to_disk(place / "rows")
    return place


def test_eval_takes_as_many_tokens_of_each_text(place: Path) -> None:
    texts = ["--text", place / "a.txt", "--text", place / "b.jsonl", "--text", place / "rows", "--text-column", "body"]
    found = json.loads(run("eval", place / "tiny", *texts, "--context", 16, "--max-tokens", 49, "--json").stdout)["perplexity"]
    assert found["text"] == [str(place / "a.txt"), str(place / "b.jsonl"), str(place / "rows")]
    assert found["num_tokens"] == 45  # 49 tokens are 4 windows, of each of which the first is not scored
    alone = json.loads(run("eval", place / "tiny", *texts[4:], "--context", 16, "--max-tokens", 49, "--json").stdout)
    assert alone["perplexity"]["text"] == str(place / "rows")


def test_compare_takes_several(place: Path) -> None:
    texts = ["--text", place / "a.txt", "--text", place / "rows", "--text-column", "body", "--tokens", 12]
    assert run("compare", place / "tiny", place / "tiny", *texts).exit_code == 0
    refused = run("compare", place / "tiny", place / "tiny", "--text-column", "body")
    assert refused.exit_code == 2
    assert "--text-column would change nothing" in refused.stderr


def test_what_cannot_be_read_is_refused_by_name(place: Path) -> None:
    first = ["--text", place / "a.txt", "--text"]
    for texts, said in (
        ([*first, place / "no.txt"], "no.txt does not exist"),
        ([*first, place / "b.jsonl", "--text-column", "no"], "no text column 'no'"),
    ):
        for command in (["eval", place / "tiny"], ["compare", place / "tiny", place / "tiny"]):
            refused = run(*command, *texts)
            assert refused.exit_code == 2
            assert said in refused.stderr
    assert "--max-tokens is 1" in run("eval", place / "tiny", *first, place / "a.txt", "--max-tokens", 1).stderr


def test_a_list_of_a_recipe_is_several_texts() -> None:
    assert Evaluation(text=["python-docs"]).text == "python-docs"
    several = Evaluation(text=["a.txt", "python-docs"])
    assert several.text == ("a.txt", "python-docs")
    assert several.name == "a.txt, Python's documentation topics (evaluation part)"
