import json
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tests.export.tiny import tiny_tokenizer
from tests.passes.data.number_words import CountingTokenizer, make_tokenizer, words

from sparsepass.graph import SparsepassError
from sparsepass.graph.texts.files import check_text_file, first_ids, row_text

CHAT = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]


TOKENIZER = tiny_tokenizer()


@settings(max_examples=40)
@given(
    lines=st.lists(
        st.lists(st.sampled_from(["the", "quick fox", " ", "", "jumps", "über"]), max_size=8).map(" ".join),
        min_size=1,
        max_size=1500,
    ),
    count=st.integers(1, 3000),
)
def test_the_first_tokens_are_those_of_the_whole(lines: list[str], count: int) -> None:
    text = "\n".join([*lines, "dog"])
    whole = TOKENIZER(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert first_ids(text, TOKENIZER, count, what="text") == whole[:count]
    assert first_ids(text, TOKENIZER, None, what="text") == whole


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_no_more_is_tokenized_than_is_needed(suffix: str, tmp_path: Path) -> None:
    rows = [words(4, 54) for _ in range(4000)]
    path = tmp_path / f"text{suffix}"
    path.write_text("\n".join(json.dumps({"text": row}) if suffix == ".jsonl" else row for row in rows))
    assert len(first_ids(path, make_tokenizer(), 100, what="text")) == 100
    assert CountingTokenizer.num_characters < 20_000


def test_a_mark_of_byte_order_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf1 2 3")
    tokenizer = make_tokenizer()
    plain = tokenizer("1 2 3", add_special_tokens=False)["input_ids"]
    assert first_ids(tmp_path / "a.txt", tokenizer, None, what="text") == plain


def test_chats_go_through_the_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(SparsepassError, match="no chat template"):
        row_text(CHAT, tokenizer, "row 0")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    assert row_text(CHAT, tokenizer, "row 0") == "<user> one two\n<assistant> three\n"
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    rendered = tokenizer(row_text(CHAT, tokenizer, "") + "\n\n", add_special_tokens=False)["input_ids"]
    assert first_ids(tmp_path / "chats.jsonl", tokenizer, None, what="text") == rendered
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SparsepassError, match="row 0: the chat template does not take this chat: roles must alternate"):
        row_text(CHAT, tokenizer, "row 0")


def test_messages_as_others_write_them() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}"
    assert (
        row_text([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "you"}], tokenizer, "")
        == "<user> hi<assistant> you"
    )
    parts = [{"type": "text", "text": "one "}, "two"]
    assert row_text([{"role": "user", "content": parts, "name": "me"}], tokenizer, "") == "<user> one two"
    for message in ({"role": "user"}, {"speaker": "a", "said": "b"}, {}):
        with pytest.raises(SparsepassError, match=r"row 0 holds a message of .*expected role and content"):
            row_text([message], tokenizer, "row 0")
    with pytest.raises(SparsepassError, match="a part that is no text"):
        row_text([{"role": "user", "content": [{"type": "image"}]}], tokenizer, "row 0")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{}", "suffix '.json'"),
        ("a.csv", "text\n", "suffix '.csv'"),
        ("a.jsonl", '{"body": "words"}', "columns body and no text column 'text' or 'messages'"),
        ("b.jsonl", "\n", "no rows"),
        ("a.txt", "", "is empty"),
    ],
)
def test_what_is_no_text_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SparsepassError, match=message):
        check_text_file(tmp_path / name, "evaluation text")


def test_half_of_a_character_is_refused_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two \\ud83d"}\n')
    with pytest.raises(SparsepassError, match=r"rows\.jsonl, line 2 .*half of a character"):
        first_ids(path, make_tokenizer(), 100, what="text")
