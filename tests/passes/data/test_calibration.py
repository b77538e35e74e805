"""Everything a user may bring as calibration data, and every mistake in it."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.passes.data.number_words import CountingTokenizer, make_tokenizer, words
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from sparsepass.graph.support.errors import SparsepassError
from sparsepass.graph.texts.rows import spread_order
from sparsepass.passes.data.calibration import calibration_batches
from sparsepass.passes.data.texts import default_text

BOTH = ("input_ids", "attention_mask")


def all_ids(data: Any) -> Tensor:
    return torch.cat([batch["input_ids"] for batch in data])


# Tensors and what is like them


def test_ids_are_split_into_batches_with_a_mask_of_ones() -> None:
    ids_BT = torch.arange(5 * 6).reshape(5, 6)
    data = calibration_batches(ids_BT, input_names=BOTH, batch_size=2)
    batches = list(data)
    assert [tuple(batch) for batch in batches] == [BOTH] * 3
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), ids_BT)
    assert all(bool((batch["attention_mask"] == 1).all()) for batch in batches)
    assert data.describe()["num_sequences"] == 5
    assert data.describe()["num_tokens"] == 30
    assert data.describe()["complete"] is True
    json.dumps(data.describe())


def test_it_can_be_read_again() -> None:
    data = calibration_batches(torch.arange(12).reshape(3, 4), input_names=BOTH)
    assert torch.equal(all_ids(data), all_ids(data))
    assert data.describe()["num_sequences"] == 3


def test_a_generator_is_read_once_and_lazily() -> None:
    read = []

    def generate() -> Iterator[Tensor]:
        for index in range(1000):
            read.append(index)
            yield torch.full((2, 4), index)

    data = calibration_batches(generate(), input_names=BOTH, num_sequences=6, batch_size=2)
    assert len(read) < 4
    assert all_ids(data)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert len(read) < 5
    with pytest.raises(SparsepassError, match="generator can be read only once"):
        list(data)


@pytest.mark.parametrize(
    "make",
    [
        lambda ids: [ids[:2], ids[2:]],
        lambda ids: {"input_ids": ids},
        lambda ids: [{"input_ids": row[None]} for row in ids],
        lambda ids: DataLoader(TensorDataset(ids), batch_size=2),
        lambda ids: TensorDataset(ids),
        lambda ids: ids.tolist(),
        lambda ids: ids.numpy(),
        lambda ids: ids.int(),
        lambda ids: iter([(ids, torch.ones_like(ids))]),
        lambda ids: [{"input_ids": ids, "labels": ids, "token_type_ids": torch.zeros_like(ids)}],
    ],
)
def test_every_form_gives_the_same_ids(make: Any) -> None:
    ids_BT = torch.arange(24).reshape(4, 6)
    batches = list(calibration_batches(make(ids_BT), input_names=BOTH))
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), ids_BT)
    assert batches[0]["input_ids"].dtype == torch.int64
    assert tuple(batches[0]) == BOTH


def test_batch_encoding_and_padding() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "[EOS]"
    encoded = tokenizer(["w4 w5 w6", "w7"], padding=True, return_tensors="pt")
    data = calibration_batches(encoded, input_names=BOTH)
    (batch,) = data.batches()
    assert batch.valid_BT is not None
    assert batch.valid_BT.tolist() == [[True] * 3, encoded["attention_mask"][1].bool().tolist()]
    assert (data.describe()["num_tokens"], data.describe()["num_padding"]) == (4, 2)


def test_padding_is_known_even_if_the_program_takes_no_mask() -> None:
    ids_BT, mask_BT = torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [1, 0, 0]])
    (batch,) = calibration_batches({"input_ids": ids_BT, "attention_mask": mask_BT}, input_names=["input_ids"]).batches()
    assert tuple(batch.inputs) == ("input_ids",)
    assert batch.valid_BT is not None
    assert batch.valid_BT.tolist() == mask_BT.bool().tolist()


def test_no_padding_means_no_mask_to_apply() -> None:
    (batch,) = calibration_batches(torch.ones(2, 3, dtype=torch.long), input_names=BOTH).batches()
    assert batch.valid_BT is None


def test_sequences_of_different_lengths_are_batched_apart() -> None:
    items = [torch.ones(1, length, dtype=torch.long) for length in (4, 4, 6, 4)]
    shapes = [tuple(batch["input_ids"].shape) for batch in calibration_batches(items, input_names=BOTH)]
    assert shapes == [(2, 4), (1, 6), (1, 4)]


def test_pixel_values() -> None:
    pixels = torch.rand(3, 3, 8, 8)
    (batch,) = calibration_batches(pixels, input_names=["pixel_values"])
    assert torch.equal(batch["pixel_values"], pixels)


def test_a_plain_module_takes_a_tensor_by_its_first_input() -> None:
    x = torch.rand(3, 5)
    (batch,) = calibration_batches(x, input_names=["x"])
    assert torch.equal(batch["x"], x)


def test_token_types_are_filled_with_zeros() -> None:
    names = ("input_ids", "token_type_ids", "attention_mask")
    (batch,) = calibration_batches(torch.ones(1, 3, dtype=torch.long), input_names=names)
    assert tuple(batch) == names
    assert not batch["token_type_ids"].any()


def test_calibration_data_passes_through() -> None:
    data = calibration_batches(torch.ones(1, 3, dtype=torch.long), input_names=BOTH)
    assert calibration_batches(data, input_names=BOTH) is data


# Data sets


def test_tokenized_data_set_ignores_other_columns() -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"input_ids": [[i, i + 1, i + 2] for i in range(10)], "url": ["u"] * 10}
    for data in (datasets.Dataset.from_dict(rows), datasets.Dataset.from_dict(rows).to_iterable_dataset()):
        found = all_ids(calibration_batches(data, input_names=BOTH))
        assert sorted(found[:, 0].tolist()) == list(range(10))


def test_text_data_sets_are_packed_and_streamed() -> None:
    datasets = pytest.importorskip("datasets")
    tokenizer = make_tokenizer()
    rows = {"text": [words(4 + 7 * i, 11 + 7 * i) for i in range(600)]}
    streamed = calibration_batches(
        datasets.Dataset.from_dict(rows).to_iterable_dataset(),
        input_names=BOTH,
        tokenizer=tokenizer,
        context=20,
        num_sequences=3,
    )
    assert torch.equal(all_ids(streamed), torch.arange(4, 64).reshape(3, 20))
    assert CountingTokenizer.num_characters < 1000  # of some 20,000
    mapped = calibration_batches(
        datasets.Dataset.from_dict(rows), input_names=BOTH, tokenizer=tokenizer, context=20, num_sequences=30
    )
    found = all_ids(mapped)
    assert found.shape == (30, 20)
    assert int(found.min()) < 600
    assert int(found.max()) > 3600


def test_several_files_give_as_many_sequences_each(tmp_path: Path) -> None:
    """Of any kinds; a list of strings is texts, so files are paths."""
    text, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text(words(4, 400))
    rows.write_text("".join(json.dumps({"text": words(n, n + 50)}) + "\n" for n in range(1000, 1400, 50)))

    def firsts(number: int) -> list[int]:
        data = calibration_batches(
            [text, rows], input_names=["input_ids"], tokenizer=make_tokenizer(), num_sequences=number, context=10
        )
        found = [int(ids[0]) for batch in data for ids in batch["input_ids"]]
        assert data.describe()["kind"] == "2 files"
        return found

    assert [value < 1000 for value in firsts(5)] == [True, True, False, False, False]
    with pytest.raises(SparsepassError, match="num_sequences is 1, and there are 2 calibration files"):
        firsts(1)
    with pytest.raises(SparsepassError, match=r"missing.txt does not exist"):
        calibration_batches([text, Path("missing.txt")], input_names=["input_ids"], tokenizer=make_tokenizer())


def test_other_text_column(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"body": words(4, 30)}) + "\n\n" for _ in range(3)))
    data = calibration_batches(
        str(path), input_names=BOTH, tokenizer=make_tokenizer(), context=10, text_column="body", num_sequences=None
    )
    assert all_ids(data).shape == (7, 10)  # 78 tokens
    with pytest.raises(SparsepassError, match=r"columns body.*text column 'text'"):
        calibration_batches(path, input_names=BOTH, tokenizer=make_tokenizer())


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_files_of_rows(tmp_path: Path, suffix: str) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / f"data{suffix}"
    records = [{"text": words(4 + 10 * i, 14 + 10 * i), "id": i} for i in range(100)]
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records))
    else:
        datasets.Dataset.from_list(records).to_parquet(str(path))
    make: dict[str, Any] = {"input_names": BOTH, "tokenizer": make_tokenizer(), "context": 10, "num_sequences": 20}
    found = all_ids(calibration_batches(path, **make))
    # Each row is one sequence here; the chosen rows lie over the whole file.
    assert found.shape == (20, 10)
    starts = sorted(found[:, 0].tolist())
    assert max(b - a for a, b in zip([4, *starts], [*starts, 1004], strict=True)) <= 200
    assert torch.equal(found, all_ids(calibration_batches(path, **make)))


def test_tokenized_rows_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [i, 1, 2], "note": "x"}) for i in range(4)))
    assert sorted(all_ids(calibration_batches(path, input_names=BOTH))[:, 0].tolist()) == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:fsspec")
def test_local_folder_as_a_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    for split, start in (("train", 4), ("validation", 1004)):
        (tmp_path / "set" / f"{split}.jsonl").write_text(json.dumps({"text": words(start, start + 100)}) + "\n")
    make: dict[str, Any] = {"input_names": BOTH, "tokenizer": make_tokenizer(), "context": 50}
    folder = tmp_path / "set"
    assert all_ids(calibration_batches(str(folder), **make))[0, 0] == 4
    data = calibration_batches(f"{folder}::validation", **make)
    assert all_ids(data)[0, 0] == 1004
    assert data.describe()["kind"] == "streamed data set"
    with pytest.raises(SparsepassError, match="split nonsense"):
        calibration_batches(f"{folder}::nonsense", **make)


def test_hub_name_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(*args: object, **kwargs: object) -> None:
        assert args == ("nobody/nothing", "config")
        assert kwargs["split"] == "test"
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SparsepassError, match=r"hub data set \(config config, split test\).*HF_HUB_OFFLINE"):
        calibration_batches("nobody/nothing:config:test", input_names=BOTH, tokenizer=make_tokenizer())


# Text


def test_file_is_spread_over_the_whole_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(words(4, 5000) for _ in range(8)))
    tokenizer = make_tokenizer()
    data = calibration_batches(path, input_names=BOTH, tokenizer=tokenizer, context=100, num_sequences=20, seed=1)
    found = all_ids(data)
    assert found.shape == (20, 100)
    for row in found.tolist():  # consecutive words of the text, from a word's beginning
        assert all(b == a + 1 or (a, b) == (4999, 4) for a, b in itertools.pairwise(row))
    assert len({row[0] for row in found.tolist()}) == 20
    assert CountingTokenizer.num_characters < path.stat().st_size / 3
    again = calibration_batches(str(path), input_names=BOTH, tokenizer=tokenizer, context=100, num_sequences=20, seed=1)
    other = calibration_batches(path, input_names=BOTH, tokenizer=tokenizer, context=100, num_sequences=20, seed=2)
    assert torch.equal(found, all_ids(again))
    assert not torch.equal(found, all_ids(other))
    facts = data.describe()
    assert facts["source"] == str(path)
    assert facts["num_tokens"] == 2000
    assert (facts["context"], facts["seed"]) == (100, 1)


def test_short_text_is_packed_whole_and_the_rest_left_out() -> None:
    make: dict[str, Any] = {"input_names": BOTH, "tokenizer": make_tokenizer(), "context": 20}
    few = calibration_batches(words(4, 114), num_sequences=128, **make)
    assert torch.equal(all_ids(few), torch.arange(4, 104).reshape(5, 20))
    assert (few.describe()["num_sequences"], few.describe()["num_sequences_asked"]) == (5, 128)
    spread = calibration_batches([words(4, 204)], num_sequences=4, **make)
    assert all_ids(spread)[:, 0].tolist() == [4, 44, 104, 144]


def test_texts_are_framed_as_the_tokenizer_does() -> None:
    make: dict[str, Any] = {"input_names": BOTH, "tokenizer": make_tokenizer(framed=True), "context": 10}
    found = all_ids(calibration_batches([words(4, 20)], **make))
    assert found.tolist() == [[1, *range(4, 12), 2], [1, *range(12, 20), 2]]
    streamed = all_ids(calibration_batches(iter([words(4, 10), words(10, 20)]), **make))
    assert torch.equal(found, streamed)


def test_multi_byte_text_is_not_cut_inside_a_character(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + ("世界" * 5000 + " ").encode() + ("w5 é\r\n" * 40000).encode())
    data = calibration_batches(path, input_names=BOTH, tokenizer=make_tokenizer(), context=16, num_sequences=9)
    assert all_ids(data).shape[1] == 16


def test_default_text_has_two_disjoint_parts() -> None:
    parts: dict[str, list[str]] = {}
    for part in ("calibration", "evaluation"):
        text = default_text(part)
        assert text == default_text(part)
        assert len(text) > 100_000
        parts[part] = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
        assert len(set(parts[part])) == len(parts[part])
    assert not set(parts["calibration"]) & set(parts["evaluation"])
    with pytest.raises(SparsepassError, match="'calibration' or 'evaluation'"):
        default_text("train")  # type: ignore[arg-type]


@given(count=st.integers(0, 300), seed=st.integers(0, 2**31))
@settings(max_examples=60)
def test_spread_order_visits_each_once(count: int, seed: int) -> None:
    order = list(spread_order(count, seed))
    assert sorted(order) == list(range(count))
    if count >= 100:  # the first twenty leave no gap wider than a fifth
        first = sorted(order[:20])
        assert max(b - a for a, b in zip(first, [*first[1:], first[0] + count], strict=True)) <= count / 5


# Mistakes


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "calibration data is empty: the list gave nothing"),
        (iter([]), "the generator gave nothing"),
        (torch.zeros(0, 4, dtype=torch.long), "calibration data is empty"),
        (torch.zeros(2, 0, dtype=torch.long), "holds no tokens"),
        ({}, "none of the program's inputs"),
        (torch.arange(4), r"of shape \[batch, tokens\], and is of shape \[4\]; give it a batch dimension"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.long), r"is of shape \[1, 2, 3, 4\].*looks like pixel values"),
        (torch.rand(2, 4), "has to hold integer token ids, and is torch.float32"),
        (torch.tensor([[1, 50]]), "holds the id 50, and the model's vocabulary has 50"),
        (torch.tensor([[1, -100]]), "negative id -100"),
        ([1, 2, 3], r"shape \[3\]"),
        ([torch.ones(1, 2, dtype=torch.long), torch.ones(3, dtype=torch.long)], r"item 1: input_ids .* \[3\]"),
        ({"input_idz": torch.ones(1, 2)}, "'input_idz', which is not an input.*did you mean 'input_ids'"),
        ({"attention_mask": torch.ones(1, 2)}, "lacks the program's input 'input_ids'"),
        ({"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 2)}, "have to be equal"),
        ({"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.full((2, 3), 2)}, "only 0"),
        ({"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.zeros(2, 3)}, "all padding"),
        ({"input_ids": [[1, 2], [3]]}, "is not a tensor and cannot be made one"),
        ((torch.ones(1, 2).long(),) * 3, None),
        ([(torch.ones(1, 2).long(),) * 3], "gives 3 tensors at a time"),
        (["some text", 3], "mixes texts with int"),
        (3, "calibration of type int is not understood"),
        ([None], "item of type NoneType"),
        ("", "empty string"),
        ("missing.txt", "missing.txt does not exist"),
        ("./nowhere", "nowhere does not exist"),
        (Path("missing"), "missing does not exist"),
        ("two words", "neither a file here nor the name"),
        ("a:b:c:d", "neither a file here nor the name"),
        (["too short"], "has 2 tokens, and one sequence of context 512 needs 512"),
        (iter(["too", "short"]), "has 2 tokens, and one sequence"),
    ],
)
def test_bad_calibration(calibration: Any, message: str | None) -> None:
    make: dict[str, Any] = {"input_names": BOTH, "tokenizer": make_tokenizer(), "vocab_size": 50}
    if message is None:
        assert all_ids(calibration_batches(calibration, **make)).shape == (3, 2)
        return
    with pytest.raises(SparsepassError, match=message):
        list(calibration_batches(calibration, **make))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.rand(3, 8, 8), r"\[batch, channels, height, width\], and is torch.float32 of shape \[3, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "image processor"),
        (torch.full((1, 3, 8, 8), float("nan")), "NaN or Inf"),
        (["some\ntext"], "is text, and the program takes pixel_values"),
    ],
)
def test_bad_pixel_values(pixels: Any, message: str) -> None:
    with pytest.raises(SparsepassError, match=message):
        list(calibration_batches(pixels, input_names=["pixel_values"], tokenizer=make_tokenizer()))


def test_bad_files(tmp_path: Path) -> None:
    contents = {
        "empty.txt": b"",
        "latin.txt": "é ".encode("latin-1") * 5000,
        "bad.jsonl": b'{"text": "a"}\n{"text": \n',
        "list.jsonl": b"[1, 2]\n",
        "blank.jsonl": b"\n\n",
        "bad.parquet": b"PAR1 nothing",
        "numbers.jsonl": b'{"text": 3}\n',
        "table.csv": b"a,b\n",
    }
    messages = {
        "empty.txt": "is empty",
        "latin.txt": "not UTF-8",
        "bad.jsonl": "line 2 cannot be read as JSON",
        "list.jsonl": "line 1 holds a list",
        "blank.jsonl": "has no rows",
        "bad.parquet": "not a readable parquet file",
        "numbers.jsonl": "row 0: column 'text' holds int, not text",
        "table.csv": "suffix '.csv'",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SparsepassError, match=messages[name]):
            list(calibration_batches(tmp_path / name, input_names=BOTH, tokenizer=make_tokenizer(), context=8))


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    for text in (["a text"], "a text\n", iter(["a text"])):
        with pytest.raises(SparsepassError, match="no tokenizer"):
            calibration_batches(text, input_names=BOTH)


def test_splits_have_to_be_chosen() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(SparsepassError, match=r"choose one, such as data\['test'\]"):
        calibration_batches(data, input_names=BOTH)


@pytest.mark.parametrize("name", ["num_sequences", "context", "batch_size"])
def test_settings_are_checked(name: str) -> None:
    settings_given: dict[str, Any] = {name: 0}
    with pytest.raises(SparsepassError, match=f"{name} has to be at least 1"):
        calibration_batches(torch.ones(1, 1).long(), input_names=BOTH, **settings_given)


def test_context_too_small_for_special_tokens() -> None:
    with pytest.raises(SparsepassError, match="no room"):
        calibration_batches([words(4, 20)], input_names=BOTH, tokenizer=make_tokenizer(framed=True), context=2)
