"""Training data: nothing lost, one order for any number of processes, resumed bit for bit, and every mistake told."""

import dataclasses
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.passes.data.number_words import make_tokenizer, words
from torch import Tensor

from sparsepass.graph.support.errors import SparsepassError
from sparsepass.passes.data.texts import default_text, text_pieces
from sparsepass.retrain.data import DataConfig, TrainingData, open_data
from sparsepass.retrain.data.sequences import permutation, spread
from sparsepass.retrain.data.stream import Place, TokenStream
from sparsepass.retrain.data.tokens import TokenRows, TokenTable, part_of_rows

EOS = 2


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def byte_tokenizer() -> Any:
    """A byte-level BPE with GPT-2's rule of where words begin, that knows line breaks in a row."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    breaks = ["w\n\n", "\n\n\n", "\n    x"] * 500
    core.train_from_iterator([*breaks, *default_text("evaluation")[:5000].split("\n")], trainer)
    assert core.token_to_id("\u010a\u010a") is not None
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def texts(sizes: list[int]) -> tuple[list[str], list[int]]:
    """Documents of so many words, and all their tokens, each document followed by EOS."""
    documents, tokens, start = [], [], 4
    for size in sizes:
        documents.append(words(start, start + size, per_line=3))
        tokens += [*range(start, start + size), EOS] if size else []
        start += size
    return documents, tokens


def stream_of(documents: list[str], *, shards: int = 1) -> Any:
    return datasets.Dataset.from_dict({"text": documents}).to_iterable_dataset(num_shards=shards)


def one_epoch(data: TrainingData) -> list[Tensor]:
    """Sequences until the second epoch begins, by place."""
    found: dict[int, Tensor] = {}
    while True:
        batch = data.train.take(1)
        if batch.places[0] in found:
            return [found[place] for place in sorted(found)]
        found[batch.places[0]] = batch.input_ids[0]


def same(a: Any, b: Any) -> bool:
    equal = torch.equal(a.input_ids, b.input_ids) and a.indices == b.indices and a.places == b.places
    for name in ("labels", "attention_mask"):
        x, y = getattr(a, name), getattr(b, name)
        equal = equal and ((x is None and y is None) or torch.equal(x, y))
    return bool(equal)


# Nothing is lost


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), context=st.integers(1, 30), streamed=st.booleans())
@settings(max_examples=40)
def test_packing_keeps_every_token_in_order(sizes: list[int], context: int, streamed: bool) -> None:
    documents, tokens = texts(sizes)
    if len(tokens) < context:
        return
    config = DataConfig(context=context, validation=None, shuffle_buffer=3)
    source: Any = stream_of(documents) if streamed else documents
    data = open_data(config, make_tokenizer(), source=source)
    sequences = one_epoch(data)
    assert torch.cat(sequences).tolist() == tokens[: len(tokens) // context * context]
    if not streamed:
        assert data.train.num_sequences == len(sequences)


@given(
    pieces=st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=5), st.integers(1, 3)), max_size=8),
    spans=st.lists(st.integers(0, 60), min_size=2, max_size=2),
)
def test_a_table_reads_across_its_parts(pieces: list[tuple[list[int], int]], spans: list[int]) -> None:
    parts = [part_of_rows({"input_ids": [ids] * times}, "data") for ids, times in pieces]
    whole = [token for ids, times in pieces for token in ids * times]
    table = TokenTable(parts)
    start, stop = sorted(min(span, len(whole)) for span in spans)
    assert table.read(start, stop)["input_ids"].tolist() == whole[start:stop]
    assert table.lengths.tolist() == [len(ids) for ids, times in pieces for _ in range(times) if ids]


def test_a_text_file_in_pieces_gives_the_ids_of_the_whole(
    tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = default_text("calibration")[:60_000] + "\n\n\nfox  \n jumps.\n\tover\r\nthe \u4e16\u754c lazy\ndog"
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    monkeypatch.setattr("sparsepass.passes.data.texts._PIECE", 377)
    pieces = [row["text"] for row in text_pieces([str(path)])]
    assert len(pieces) > 50
    assert "".join(pieces) == text.replace("\r\n", "\n")
    whole = byte_tokenizer("".join(pieces), add_special_tokens=False, verbose=False)["input_ids"]
    for streaming in (False, True):
        config = DataConfig(source=str(path), context=16, validation=None, streaming=streaming, shuffle_buffer=100)
        found = torch.cat(one_epoch(open_data(config, byte_tokenizer))).tolist()
        expected = [*whole, byte_tokenizer.eos_token_id]
        assert found == expected[: len(expected) // 16 * 16]
    # The faults that are prevented: cut behind any line break, or tokenized as if a text began there (this tokenizer puts a
    # space before one), the ids differ.
    cuts = [text.index("\n\n") + 1, len(pieces[0])]
    for cut in cuts:
        apart = [*byte_tokenizer(text[:cut])["input_ids"], *byte_tokenizer(text[cut:])["input_ids"]]
        assert apart != byte_tokenizer(text, verbose=False)["input_ids"]


def test_text_without_a_line_break_is_cut_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsepass.passes.data.texts._PIECE", 10)
    monkeypatch.setattr("sparsepass.passes.data.texts._LONGEST_PIECE", 20)
    for text in ("a" * 20, "a" * 77, "aaa\n" * 30, " \n" * 20, "\n" * 40):
        path = tmp_path / "text.txt"
        path.write_text(text)
        rows = list(text_pieces([str(path)]))
        assert "".join(row["text"] for row in rows) == text
        assert [row["ends"] for row in rows] == [False] * (len(rows) - 1) + [True]
        assert rows[-1]["text"]  # so that the document's end is not lost


def test_sequences_begin_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = make_tokenizer(framed=True)
    data = open_data(DataConfig(context=5, validation=None), tokenizer, source=[words(4, 11)])
    assert torch.stack(one_epoch(data)).tolist() == [[1, 4, 5, 6, 7], [1, 8, 9, 10, EOS]]
    train: Any = data.describe()["train"]
    assert (train["sequence_start_tokens"], train["document_end_token"]) == ([1], "[EOS]")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    data = open_data(DataConfig(context=5, validation=None), tokenizer, source=["w4 w5 w6", "", "w7 w8"])
    assert data.train.take(1).input_ids.tolist() == [[4, 5, 6, 7, 8]]


# One order for any number of processes


def opened(kind: str, **options: Any) -> TrainingData:
    documents, _ = texts([17, 3, 0, 41, 9, 30, 8, 25])
    given: dict[str, Any] = {"context": 6, "shuffle_buffer": 4, "seed": 3, "validation": 2} | options
    if kind == "rows":
        rows = [{"input_ids": list(range(20 * n, 21 * n + 1)), "labels": [-100] * n + [n]} for n in range(1, 20)]
        return open_data(DataConfig(packing=False, **given), source=rows)
    if kind == "streamed rows":
        rows = [{"input_ids": list(range(20 * n, 21 * n + 1)), "labels": [-100] * n + [n]} for n in range(1, 20)]
        return open_data(DataConfig(packing=False, **given), source=datasets.Dataset.from_list(rows).to_iterable_dataset())
    source: Any = {
        "table": documents,
        "stream": stream_of(documents),
        "shards": stream_of(documents, shards=3),
        "shuffled stream": stream_of(documents, shards=2).shuffle(seed=1, buffer_size=3),
        "mapped stream": stream_of(documents).map(lambda row: {"text": row["text"]}),
    }[kind]
    return open_data(DataConfig(**given), make_tokenizer(), source=source)


KINDS = ["table", "stream", "shards", "shuffled stream", "mapped stream", "rows", "streamed rows"]
quiet = pytest.mark.filterwarnings("ignore:.*shuffle buffer")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_processes_see_together_what_one_sees(kind: str, num_processes: int) -> None:
    whole, parts = opened(kind), [opened(kind) for _ in range(num_processes)]
    for step in range(6):  # some 24 sequences, more than an epoch
        batch = whole.train.take(4)
        share = 4 // num_processes
        found = [data.train.take(4, slice(r * share, (r + 1) * share)) for r, data in enumerate(parts)]
        assert torch.equal(torch.cat([part.input_ids for part in found]), batch.input_ids)
        assert [index for part in found for index in part.indices] == batch.indices == list(range(4 * step, 4 * step + 4))
        assert [place for part in found for place in part.places] == batch.places
        assert all(part.train.state() == whole.train.state() for part in parts)
        assert all(part.train.num_tokens == whole.train.num_tokens for part in parts)


def test_rows_in_any_form_and_order() -> None:
    batch = opened("table").train.take(5)
    assert opened("table").train.take(5, [3, 1]).places == [batch.places[3], batch.places[1]]
    assert opened("table").train.take(5, range(1, 5, 2)).places == batch.places[1:5:2]
    empty = opened("table").train.take(5, [])
    assert (tuple(empty.input_ids.shape), empty.input_ids.dtype, len(empty)) == ((0, 6), torch.int64, 0)
    part = batch[1:3].to("cpu")
    assert (part.places, part.indices) == (batch.places[1:3], [1, 2])
    with pytest.raises(SparsepassError, match="not all among the 5 sequences"):
        opened("table").train.take(5, [5])


@pytest.mark.parametrize("kind", KINDS)
def test_each_sequence_once_an_epoch_in_another_order(kind: str) -> None:
    data = opened(kind)
    assert data.validation is not None
    length = len(one_epoch(opened(kind)))
    first, second = data.train.take(length), data.train.take(length)
    assert sorted(first.places) == sorted(second.places)
    assert len(set(first.places)) == length
    assert first.places != second.places
    assert not set(first.places) & set(data.validation.places)
    assert data.train.num_sequences == length or kind not in ("table", "rows")
    again = dict(zip(second.places, second.input_ids.tolist(), strict=True))
    assert [again[place] for place in first.places] == first.input_ids.tolist()
    assert opened(kind).train.take(length).places == first.places
    assert opened(kind, seed=4).train.take(length).places != first.places
    in_order = opened(kind, shuffle=False).train.take(2 * length).places
    assert in_order == sorted(first.places) * 2


def test_a_small_budget_is_spread_over_all_of_the_data() -> None:
    data = open_data(DataConfig(context=4, validation=None), source=torch.arange(8000).reshape(2000, 4))
    places = sorted(data.train.take(200).places)
    assert max(b - a for a, b in itertools.pairwise([0, *places, 2000])) < 100
    used = open_data(DataConfig(context=4, validation=None, max_tokens=40), source=torch.arange(8000).reshape(2000, 4))
    assert sorted(used.train.take(10).places) == spread(10, 2000).tolist() == sorted(used.train.take(10).places)
    streamed = open_data(
        DataConfig(context=4, validation=2, max_tokens=21),
        source=datasets.Dataset.from_dict({"input_ids": torch.arange(80).reshape(20, 4).tolist()}).to_iterable_dataset(),
    )
    assert [sorted(streamed.train.take(5).places) for _ in range(2)] == [[2, 3, 4, 5, 6]] * 2


def test_the_order_is_the_one_of_its_definition() -> None:
    """Slow reference: splitmix64 on Python's whole numbers."""

    def mix(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    for count, key in ((0, (1,)), (1, ()), (257, (0, 5)), (1000, (2**40, -1, 7))):
        state = 0
        for number in key:
            state = mix((state + 0x9E3779B97F4A7C15 + number) % 2**64)
        values = [mix((state + (index + 1) * 0x9E3779B97F4A7C15) % 2**64) for index in range(count)]
        assert permutation(count, *key).tolist() == sorted(range(count), key=values.__getitem__)
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the first number of splitmix64 from 0, as published


# Resuming


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_bit_for_bit_from_any_position(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsepass.retrain.data.stream._ROWS", 2)  # so that places are inside of the small data set
    draw = random.Random(5)
    reference = opened(kind)
    batches, states = [], [json.dumps(reference.train.state())]
    for _ in range(25):  # several epochs, of batches that end anywhere in a block
        batches.append(reference.train.take(draw.randint(1, 7)))
        states.append(json.dumps(reference.train.state()))
    assert reference.train.epoch >= 1
    for start in draw.sample(range(25), 8):
        resumed = opened(kind)
        if start % 2:
            resumed.train.take(5)  # restoring also works in the middle of another run
        resumed.train.restore(json.loads(states[start]))
        for index in range(start, 25):
            assert same(resumed.train.take(len(batches[index])), batches[index]), (start, index)
            expected = json.loads(states[index + 1])
            assert (resumed.train.position, resumed.train.num_tokens) == (expected["position"], expected["num_tokens"])


def test_a_stream_is_resumed_without_reading_it_from_the_beginning() -> None:
    tokenizer = make_tokenizer()

    def fresh() -> TrainingData:
        source = stream_of([words(4 + index, 8 + index) for index in range(3000)], shards=30)
        return open_data(DataConfig(context=10, validation=None, shuffle_buffer=50), tokenizer, source=source)

    data = fresh()
    data.train.take(1000)
    state = data.train.state()
    assert len(json.dumps(state)) < 2000
    resumed = fresh()
    before = type(tokenizer).num_characters  # of a list, the number of texts
    resumed.train.restore(state)
    num_encoded = type(tokenizer).num_characters - before
    assert same(resumed.train.take(20), data.train.take(20))
    assert 50 < num_encoded < 1000  # texts of 3000: those of one block, and of the rows that are tokenized together


def test_a_place_in_a_file_that_another_reader_left_is_found_again(tmp_path: Path) -> None:
    """Checkpoints of before hold the state of datasets' own reader of JSON lines."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": words(4 + index, 12 + index)}) + "\n" for index in range(200)))

    def fresh() -> TrainingData:
        config = DataConfig(source=str(path), context=10, validation=None, streaming=True, shuffle_buffer=8)
        return open_data(config, make_tokenizer())

    data = fresh()
    data.train.take(100)
    state = json.loads(json.dumps(data.train.state()))
    rows = {"shard_idx": 0, "shard_example_idx": 200, "type": "ArrowExamplesIterable"}
    chunks = {"batch_idx": 128, "num_chunks_since_previous_state": 128, "cropped_chunk_length": 0}
    before = {"examples_iterable": rows, "previous_state": rows | {"shard_example_idx": 0}, **chunks}
    state["place"]["block"]["place"]["source"] = {
        "examples_iterable": before | {"type": "RebatchedArrowExamplesIterable"},
        "epoch": 0,
    }
    resumed = fresh()
    resumed.train.restore(state)
    assert same(resumed.train.take(50), data.train.take(50))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_cannot_be_read_is_named_by_file_and_line(streaming: bool, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    config = DataConfig(source=str(path), context=4, validation=None, streaming=streaming)
    good = json.dumps({"text": words(4, 40)})
    for line, message in (
        ('{"text": ', "line 3 cannot be read as JSON"),
        ("[1, 2]", "line 3 holds a list"),
        ('{"text": "a", "labels": [1]}', "line 3 has the column labels, which rows before it lack"),
    ):
        path.write_text(f"{good}\n\n{line}\n")
        with pytest.raises(SparsepassError, match=re.escape(f"file {path}, {message}")):
            open_data(config, make_tokenizer()).train.take(20)
    other = tmp_path / "other.jsonl"
    other.write_text('{"body": "a"}\n')
    path.write_text(good)
    with pytest.raises(SparsepassError, match=r"other\.jsonl has the columns body, and files before it text"):
        open_data(config, make_tokenizer(), source=(str(path), str(other)))


def test_a_changed_source_or_setting_is_refused() -> None:
    state = opened("table").train.state()
    for options, message in (
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"context": 7}, "context was 6 and is 7"),
        ({"validation": 3}, "sequences held out was 2 and is 3"),
        ({"shuffle": False}, "shuffle was True and is False"),
    ):
        with pytest.raises(SparsepassError, match=f"training data is not what the checkpoint was made with.*{message}"):
            opened("table", **options).train.restore(state)
    other = open_data(DataConfig(context=6, seed=3, validation=2), make_tokenizer(), source=[words(5, 150)])
    with pytest.raises(SparsepassError, match=r"data was .* and is"):
        other.train.restore(state)
    with pytest.raises(SparsepassError, match="streamed was False and is True"):
        opened("stream").train.restore(state)


def test_a_stream_that_is_not_the_same_again_is_refused() -> None:
    """The first sequence is the same, so only the check of the block can tell."""
    documents, _ = texts([20] * 20)
    config = DataConfig(context=10, validation=None, shuffle_buffer=4)
    data = open_data(config, make_tokenizer(), source=stream_of(documents))
    data.train.take(18)
    changed = open_data(config, make_tokenizer(), source=stream_of([documents[0], *reversed(documents[1:])]))
    with pytest.raises(SparsepassError, match="gives other text than before at sequence 16"):
        changed.train.restore(data.train.state())


def test_a_token_stream_is_found_again_at_every_token() -> None:
    documents, tokens = texts([5, 0, 3, 9, 1])
    data = stream_of(documents)
    prepared: Any = open_data(DataConfig(context=4, validation=None), make_tokenizer(), source=data).train
    for passed in range(len(tokens) + 1):
        stream = TokenStream(data, prepared._encode, Place())
        stream.skip_to(passed)
        again = TokenStream(data, prepared._encode, stream.place)
        assert stream.read(100)["input_ids"].tolist() == again.read(100)["input_ids"].tolist() == tokens[passed:]


# Validation


@pytest.mark.parametrize("kind", ["table", "stream", "rows", "streamed rows"])
def test_what_is_held_out_is_never_trained_on(kind: str) -> None:
    data = opened(kind, validation=3)
    assert data.validation is not None
    assert same(data.validation, opened(kind, validation=3, seed=9).validation)
    held = data.validation.input_ids.tolist()
    trained = [row.tolist() for row in one_epoch(data)]
    assert len(held) == 3
    assert not [row for row in held if row in trained]
    everything = one_epoch(opened(kind, validation=None))
    assert len(trained) + len(held) == len(everything)
    if "rows" not in kind:
        assert sorted(trained + held) == sorted(row.tolist() for row in everything)
    expected = spread(3, len(everything)).tolist() if kind in ("table", "rows") else [0, 1, 2]
    assert data.validation.places == expected


def test_a_fraction_and_its_limit() -> None:
    source = torch.arange(4000).reshape(1000, 4)
    for validation, limit, number in ((0.02, 256, 20), (0.5, 256, 256), (0.5, None, 500), (0.0001, 256, 1), (300, 256, 300)):
        data = open_data(DataConfig(context=4, validation=validation, validation_limit=limit), source=source)
        assert data.validation is not None
        assert len(data.validation) == number
        assert data.train.num_sequences == 1000 - number


def test_a_validation_source_of_its_own(tmp_path: Path) -> None:
    documents, _ = texts([400])
    for name, text in (("train.txt", documents[0]), ("valid.txt", words(2000, 2100)), ("copy.txt", documents[0])):
        (tmp_path / name).write_text(text)
    train, valid, copy = (str(tmp_path / name) for name in ("train.txt", "valid.txt", "copy.txt"))
    for streaming in (False, True):
        make: dict[str, Any] = {"context": 10, "streaming": streaming, "validation_limit": 4}
        data = open_data(DataConfig(source=train, validation=valid, **make), make_tokenizer())
        assert data.validation is not None
        starts = [2000 + 10 * int(i) for i in (spread(4, 10) if not streaming else range(4))]
        assert data.validation.input_ids[:, 0].tolist() == starts
        assert len(one_epoch(data)) == 40
        facts: Any = data.describe()["validation"]
        assert (facts["source"], facts["num_sequences"], facts["num_tokens"]) == (valid, 4, 40)
        for other in (train, copy, f"{tmp_path}/../{tmp_path.name}/train.txt"):
            with pytest.raises(SparsepassError, match="same source is given for training and for validation"):
                open_data(DataConfig(source=train, validation=other, **make), make_tokenizer())
    objects = [words(4, 100)]
    with pytest.raises(SparsepassError, match="same source"):
        open_data(DataConfig(context=10), make_tokenizer(), source=objects, validation=objects)
    data = open_data(DataConfig(context=10), make_tokenizer(), source=objects, validation=torch.ones(3, 10, dtype=torch.int32))
    assert data.validation is not None
    assert data.validation.input_ids.tolist() == [[1] * 10] * 3


# Every form


def rows_file(path: Path, first: int, count: int) -> Path:
    """A file of rows of 4 token ids, all of them ``first`` and more."""
    rows = [{"input_ids": list(range(first + 4 * i, first + 4 * i + 4))} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("share", "own", "theirs"), [(0.5, 10, 10), (0.25, 27, 9), (0.8, 2, 10)])
def test_a_source_is_mixed_in_with_its_share(tmp_path: Path, share: float, own: int, theirs: int) -> None:
    beside = str(rows_file(tmp_path / "sampled.jsonl", 1000, 10))
    config = DataConfig(context=4, validation=2, beside=beside, beside_share=share)
    data = open_data(config, source=torch.arange(119))  # 29 sequences and a part of one, which nobody sees
    assert data.validation is not None
    held = set(data.validation.input_ids.flatten().tolist())
    assert data.train.num_sequences is not None
    epochs = [data.train.take(data.train.num_sequences).input_ids for _ in range(2)]
    for ids in epochs:
        from_beside = ids[:, 0] >= 1000
        assert (int((~from_beside).sum()), int(from_beside.sum())) == (own, theirs)
        assert bool((ids.diff(dim=1) == 1).all()), "sequences lie within one source"
        assert bool((ids[:, 0] % 4 == 0).all())
        assert len(ids[:, 0].unique()) == len(ids)
        assert not held & set(ids.flatten().tolist())
    assert not torch.equal(*epochs)
    assert data.describe()["train"]["mixed_in"]["num_sequences"] == theirs  # type: ignore[index]


def test_a_mixture_is_resumed_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    file, source = rows_file(tmp_path / "sampled.jsonl", 1000, 10), torch.arange(120)
    config = DataConfig(context=4, validation=None, beside=str(file), max_tokens=48)
    data = open_data(config, source=source)
    assert data.train.num_sequences == 12
    data.train.take(5)
    state, expected = data.train.state(), data.train.take(9).input_ids
    again = open_data(config, source=source)
    again.train.restore(state)
    assert torch.equal(again.train.take(9).input_ids, expected)
    for changed in (dataclasses.replace(config, beside_share=0.25), dataclasses.replace(config, beside=None)):
        with pytest.raises(SparsepassError, match="is not what the checkpoint was made with"):
            open_data(changed, source=source).train.restore(state)
    rows_file(file, 2000, 10)
    with pytest.raises(SparsepassError, match="mixed in"):
        open_data(config, source=source).train.restore(state)


def test_what_cannot_be_mixed_in_is_refused(tmp_path: Path) -> None:
    file = str(rows_file(tmp_path / "a.jsonl", 1000, 10))
    for options, named in (
        ({"beside_share": 1.0}, "between 0 and 1"),
        ({"streaming": True}, "leave streaming"),
        ({"packing": False}, "packing"),
    ):
        with pytest.raises(SparsepassError, match=named):
            DataConfig(context=4, beside=file, **options)
    config = DataConfig(context=4, validation=None, beside=file)
    with pytest.raises(SparsepassError, match="is the training source itself"):
        open_data(config, source=file)
    with pytest.raises(SparsepassError, match="training and for validation"):
        open_data(config, source=torch.arange(40), validation=file)
    labelled = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
    with pytest.raises(SparsepassError, match="have to be the same"):
        open_data(config, source=labelled)
    with pytest.raises(SparsepassError, match="streamed"):
        open_data(config, source=datasets.Dataset.from_list([{"input_ids": [1, 2, 3, 4]}] * 8).to_iterable_dataset())


def test_every_form_gives_the_same_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents, tokens = texts([30, 12, 25, 40])
    data_set = datasets.Dataset.from_dict({"id": list(range(4)), "text": documents})
    for folder in ("texts", "rows", "saved"):
        (tmp_path / folder).mkdir()
    for index, document in enumerate(documents):
        (tmp_path / "texts" / f"{index}.txt").write_text(document)
    (tmp_path / "rows" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (tmp_path / "rows" / "validation.jsonl").write_text(json.dumps({"text": words(3000, 3100)}) + "\n")
    data_set.to_parquet(str(tmp_path / "data.parquet"))
    data_set.save_to_disk(str(tmp_path / "saved"))
    names = ["texts", "rows", "rows/train.jsonl", "data.parquet", "saved"]
    sources: list[Any] = [str(tmp_path / name) for name in names]
    sources += [tuple(str(tmp_path / "texts" / f"{index}.txt") for index in range(4)), f"{tmp_path}/rows::train"]
    sources += [documents, data_set, data_set.to_iterable_dataset(), Path(tmp_path / "data.parquet")]
    sources += [torch.tensor(tokens), torch.tensor(tokens)[: len(tokens) // 10 * 10].reshape(-1, 10), np.array(tokens)]
    sources += [[{"input_ids": tokens[:33]}, {"input_ids": tokens[33:]}]]
    sources += [datasets.Dataset.from_dict({"input_ids": [tokens[50:], [9], tokens[:50]]}).select([2, 0])]
    sources += [data_set.with_format("torch"), data_set.select([3, 0, 1, 2]).select([1, 2, 3, 0])]
    for source, streaming in itertools.product(sources, (False, True)):
        config = DataConfig(context=10, validation=None, streaming=streaming)
        data = open_data(config, make_tokenizer(), source=source)
        assert torch.cat(one_epoch(data)).tolist() == tokens[: len(tokens) // 10 * 10], source
        json.dumps(data.describe())
    data = open_data(
        DataConfig(source=f"{tmp_path}/rows", validation=f"{tmp_path}/rows::validation", context=10), make_tokenizer()
    )
    assert data.validation is not None
    assert int(data.validation.input_ids.min()) == EOS or int(data.validation.input_ids.min()) >= 3000


def test_data_sets_are_tokenized_once(tmp_path: Path) -> None:
    documents, _ = texts([30] * 10)
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    tokenizer = make_tokenizer()
    config = DataConfig(source=str(path), context=10)
    first = open_data(config, tokenizer)
    again = make_tokenizer()  # sets its count to 0
    again(["w4 w5", "w6"], padding=False, truncation=True, max_length=3)
    second = open_data(config, again)
    assert same(first.train.take(20), second.train.take(20))
    assert type(again).num_characters < 10
    other = make_tokenizer()
    other.eos_token = None
    ids = open_data(dataclasses.replace(config, validation=None), other)
    assert torch.equal(torch.cat(one_epoch(ids)), torch.arange(4, 304))


def test_a_hub_name_is_loaded_by_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    documents, tokens = texts([100])

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert (name, config, split) == ("someone/something", "config", "test")
        data = datasets.Dataset.from_dict({"text": documents})
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load)
    for streaming in (False, True):
        config = DataConfig(source="someone/something:config:test", context=10, validation=2, streaming=streaming)
        assert int(open_data(config, make_tokenizer()).train.take(8).input_ids.max()) == max(tokens)


def test_python_docs(byte_tokenizer: Any) -> None:
    for streaming in (False, True):
        config = DataConfig(source="python-docs", context=64, validation=10, streaming=streaming)
        data = open_data(config, byte_tokenizer, vocab_size=320, max_context=64)
        assert data.train.take(4).input_ids.shape == (4, 64)
    with pytest.raises(SparsepassError, match="same source"):
        open_data(DataConfig(source="python-docs", validation="python-docs"), byte_tokenizer)


# Rows that are kept apart


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_with_masked_prompts(streamed: bool) -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
        {"input_ids": [], "labels": [], "attention_mask": []},
        {"input_ids": [8, 9, 10, 11, 12, 13], "labels": [-100, -100, 10, 11, 12, 13], "attention_mask": [1] * 6},
        {"input_ids": [0, 14], "labels": [-100, 14], "attention_mask": [0, 1]},
    ]
    source: Any = datasets.Dataset.from_list(rows).to_iterable_dataset() if streamed else rows
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "a"  # id 3
    config = DataConfig(context=4, packing=False, shuffle=False, validation=None)
    data = open_data(config, tokenizer, source=source)
    batch = data.train.take(3)
    assert batch.labels is not None
    assert batch.attention_mask is not None
    assert batch.input_ids.tolist() == [[5, 6, 7, 3], [8, 9, 10, 11], [0, 14, 3, 3]]
    assert batch.labels.tolist() == [[-100, 6, 7, -100], [-100, -100, 10, 11], [-100, 14, -100, -100]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]]
    packed = open_data(DataConfig(context=4, shuffle=False, validation=None), tokenizer, source=source).train.take(2)
    assert packed.labels is not None
    assert packed.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert packed.labels.tolist() == [[-100, 6, 7, -100], [-100, 10, 11, 12]]
    assert packed.attention_mask is None
    assert data.train.num_tokens == 8
    facts: Any = data.describe()["train"]
    assert facts["rows"]["num_truncated"] * 4 == facts["rows"]["num_empty"] * 4 == facts["rows"]["num_read"]
    assert streamed or facts["rows"]["num_read"] == 4
    held_out = open_data(dataclasses.replace(config, validation=1), tokenizer, source=source).describe()["validation"]
    assert isinstance(held_out, dict)
    assert held_out["num_tokens"] == (3 if streamed else 4)


@pytest.mark.parametrize("streamed", [False, True])
def test_texts_kept_apart(streamed: bool) -> None:
    documents = ["w4 w5", "", "w6 w7 w8 w9 w10"]
    config = DataConfig(context=5, packing=False, shuffle=False, validation=None)
    source: Any = stream_of(documents) if streamed else documents
    batch = open_data(config, make_tokenizer(framed=True), source=source).train.take(2)
    assert batch.input_ids.tolist() == [[1, 4, 5, EOS, EOS], [1, 6, 7, 8, 9]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert batch.labels is None


# Mistakes


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "no source is given"),
        ("missing.txt", "training data file missing.txt does not exist"),
        ("./nowhere", "nowhere does not exist"),
        (Path("nowhere.jsonl"), "nowhere.jsonl does not exist"),
        ("", "empty string"),
        ("two words", "neither a file here nor the name"),
        ("nobody/nothing", r"could not be loaded as a hub data set.*HF_HUB_OFFLINE"),
        ([], "training data is empty"),
        ([""], "too short: it has 0 tokens"),
        (["w4 w5"], "it has 3 tokens, and one sequence of context 10 needs 10"),
        (["w4", 3], "item 1 of the list is of type int"),
        ([3], "item 0 of the list is of type int"),
        (3, "type int is not understood"),
        (iter(["w4"]), "IterableDataset.from_generator"),
        (datasets.Dataset.from_dict({"text": []}), "is empty: it has no rows"),
        (datasets.IterableDataset.from_generator(lambda: iter([])), "is empty: it has no rows"),
        (datasets.Dataset.from_dict({"body": ["x"], "id": [1]}), "has the columns body, id: neither input_ids.*'text'"),
        (datasets.Dataset.from_dict({"body": ["x"]}).to_iterable_dataset(), "has the columns body"),
        (datasets.Dataset.from_dict({"text": [1]}), "row 0: the text column holds int"),
        (datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": ["a"]})), r"choose one, such as data\['test'\]"),
        (stream_of(["w4 w5"]), "too short: it has 3 tokens"),
        (["w49 w60 " * 10], "holds the id 60, and the model's vocabulary has 50"),
        (stream_of(["w60 " * 20]), "holds the id 60"),
        (torch.full((1, 10), -1), "negative id -1"),
        (torch.rand(2, 10), "has to be integer token ids"),
        (torch.ones(2, 3, 4, dtype=torch.long), r"shape \[2, 3, 4\]"),
        (torch.full((1, 10), 2**40), "beyond 32 bits"),
        ([{"input_ids": [1] * 20, "labels": [50] * 20}], "holds the label 50.*below 50, or -100"),
        ([{"input_ids": [1] * 20, "labels": [1] * 19}], "20 input_ids and 19 labels"),
        ([{"input_ids": [1] * 20, "attention_mask": [2] * 20}], "only 0"),
        ([{"input_ids": [0.5] * 20}], "lists of whole numbers, and is"),
        ([{"input_ids": [1, None] * 20}], "holds null"),
        (datasets.Dataset.from_dict({"input_ids": [[0.5]]}).to_iterable_dataset(), "row 0: input_ids has to be a list"),
    ],
)
def test_bad_sources(source: Any, message: str) -> None:
    with pytest.raises(SparsepassError, match=message):
        open_data(DataConfig(context=10, validation=None), make_tokenizer(), source=source, vocab_size=50)


def test_bad_files(tmp_path: Path) -> None:
    for name, content, message in (
        ("empty.txt", b"", "is empty"),
        ("latin.txt", "é ".encode("latin-1") * 50, "not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "could not be read as jsonl"),
        ("bad.parquet", b"PAR1 nothing", "could not be read as parquet"),
        ("table.csv", b"a,b\n", "suffix '.csv'"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SparsepassError, match=message):
            open_data(DataConfig(source=str(tmp_path / name), context=4), make_tokenizer())
    (tmp_path / "good.txt").write_text(words(4, 50))
    good, latin, bad = (str(tmp_path / name) for name in ("good.txt", "latin.txt", "bad.jsonl"))
    for source, message in (
        ((good, bad), "files of one kind"),
        ((good, good), "same file twice"),
        ((good, latin), "not UTF-8"),
    ):
        with pytest.raises(SparsepassError, match=message):
            open_data(DataConfig(source=source, context=4), make_tokenizer())
    for streaming in (False, True):
        with pytest.raises(SparsepassError, match="one long text, and packing=False"):
            open_data(DataConfig(source=good, context=4, packing=False, streaming=streaming), make_tokenizer())
    (tmp_path / "folder").mkdir()
    with pytest.raises(SparsepassError, match="could not be loaded as a folder"):
        open_data(DataConfig(source=str(tmp_path / "folder"), context=4), make_tokenizer())


def test_a_streamed_file_that_is_cut_off(tmp_path: Path) -> None:
    lines = [json.dumps({"text": words(4, 20)}) for _ in range(8)]
    (tmp_path / "cut.jsonl").write_text("\n".join(lines)[:-9])
    config = DataConfig(source=str(tmp_path / "cut.jsonl"), context=4, streaming=True, validation=1)
    with pytest.raises(SparsepassError, match=r"could not be read on after \d+ rows: .*cut off"):
        open_data(config, make_tokenizer()).train.take(40)


@pytest.mark.parametrize("packing", [True, False])
def test_rows_without_text_are_told(tmp_path: Path, packing: bool) -> None:
    rows = [{"text": words(4, 20)}, {"title": "no text"}, {"text": ""}, {"text": words(30, 50)}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source=str(tmp_path / "rows.jsonl"), context=4, validation=1, packing=packing)
    data = open_data(config, make_tokenizer())
    assert data.notes == ["training data: 2 of 4 rows read hold no text or tokens, and are left out"]
    counts = data.describe()["train"]["rows"]  # type: ignore[index]
    assert {name: counts[name] for name in ("num_read", "num_empty")} == {"num_read": 4, "num_empty": 2}


def test_bad_settings() -> None:
    source = [words(4, 100)]
    for options, message in (
        ({"context": 0}, "context has to be at least 1"),
        ({"shuffle_buffer": 0}, "shuffle_buffer has to be"),
        ({"validation": 1.5}, "between 0 and 1, and 1.5"),
        ({"validation": 0}, "at least 1, and 0"),
        ({"validation": True}, "and True was given"),
        ({"validation": 97, "context": 1}, r"97 sequences are to be held out for validation, and 1 texts has 97"),
        ({"max_tokens": 5, "context": 10}, "less than one sequence of 10"),
        ({"context": 20}, "context is 20 tokens, and the model has positions for 16"),
    ):
        with pytest.raises(SparsepassError, match=message):
            open_data(DataConfig(**options), make_tokenizer(), source=source, max_context=16)
    for options, message in (
        ({"validation": 0.1}, "is streamed, so that nobody knows how much 0.1 of it is"),
        ({"validation": 9}, "has no more than 9"),
        ({"validation": 30}, "has no more than 9"),
    ):
        with pytest.raises(SparsepassError, match=message):
            open_data(DataConfig(context=10, **options), make_tokenizer(), source=stream_of(source))
    config = DataConfig(context=10, validation_limit=None)
    with pytest.raises(SparsepassError, match="set validation_limit"):
        open_data(config, make_tokenizer(), source=source, validation=stream_of([words(200, 300)]))
    with pytest.raises(SparsepassError, match="no room beside the tokenizer's 1 special tokens"):
        open_data(DataConfig(context=1), make_tokenizer(framed=True), source=source)
    for text in (source, stream_of(source)):
        with pytest.raises(SparsepassError, match=re.escape("no tokenizer to turn it into ids")):
            open_data(DataConfig(), source=text)
    assert DataConfig(source=["a.txt", "b.txt"]).source == ("a.txt", "b.txt")  # type: ignore[arg-type]


def test_a_changed_token_changes_the_fingerprint() -> None:
    ids = np.arange(100_000, dtype=np.int32)
    whole = TokenTable([TokenRows(columns={"input_ids": ids}, lengths=np.array([100_000]))]).fingerprint()
    halves = [TokenRows(columns={"input_ids": half}, lengths=np.array([50_000])) for half in np.split(ids, 2)]
    assert TokenTable(halves).read(49_999, 50_001)["input_ids"].tolist() == [49_999, 50_000]
    for place in (0, 4095, 4096, 50_000, 99_999):
        changed = ids.copy()
        changed[place] += 1
        assert TokenTable([TokenRows(columns={"input_ids": changed}, lengths=np.array([100_000]))]).fingerprint() != whole
