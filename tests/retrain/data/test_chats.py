"""Chats as training data: rows of messages become what the tokenizer's chat template makes of them."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tests.passes.data.number_words import make_tokenizer

from sparsepass.graph import SparsepassError
from sparsepass.retrain.data import DataConfig, open_data

CHATS = [[{"role": "user", "content": f"w{n} w{n + 1}"}, {"role": "assistant", "content": f"w{n + 2}"}] for n in (4, 7, 10)]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
TEXTS = [f"w{n} w{n + 1} w{n + 2} " for n in (4, 7, 10)]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def tokens(source: object, **settings: Any) -> list[int]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = DataConfig(context=12, validation=None, shuffle=False, **settings)
    found: list[int] = open_data(config, tokenizer, source=source).train.take(1).input_ids[0].tolist()
    return found


def rows(column: str, path: Path | None = None) -> Any:
    found = [{"id": index, column: chat} for index, chat in enumerate(CHATS)]
    if path is None:
        return found
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["rows", "jsonl", "parquet"])
def test_chats_are_read_where_there_is_no_text(kind: str, streaming: bool, tmp_path: Path) -> None:
    source = rows("messages", tmp_path / "chats.jsonl" if kind == "jsonl" else None)
    if kind == "parquet":
        datasets.Dataset.from_list(source).to_parquet(tmp_path / "chats.parquet")
        source = tmp_path / "chats.parquet"
    assert tokens(source, streaming=streaming) == tokens(TEXTS)


def test_a_column_of_chats_can_be_named(tmp_path: Path) -> None:
    place = rows("talk", tmp_path / "chats.jsonl")
    assert tokens(place, text_column="talk") == tokens(TEXTS)
    with pytest.raises(SparsepassError, match="'text' or 'messages'; name it with text_column"):
        tokens(place)


def test_texts_win_over_chats() -> None:
    both = [{"text": text, "messages": []} for text in TEXTS]
    assert tokens(both) == tokens(TEXTS)


def test_a_tokenizer_without_a_template_is_told() -> None:
    with pytest.raises(SparsepassError, match="row 0: the text column holds a chat, and the tokenizer has no chat template"):
        open_data(DataConfig(context=12, validation=None), make_tokenizer(), source=rows("messages"))
