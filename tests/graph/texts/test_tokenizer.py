"""Tokenizers whose files are damaged: told when they are loaded, or at the first text that shows it."""

import base64
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import transformers
from tests.export.tiny import save_tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers

from sparsepass.graph import SparsepassError
from sparsepass.graph.load import load_model, tokenizer_in
from sparsepass.graph.texts import first_ids, panics_unseen, tokenizing


def changed(folder: Path, **parts: Any) -> Path:
    """A tiny checkpoint with other parts in its tokenizer.json."""
    save_tiny_llama(folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    return folder


def table_of(size: int) -> dict[str, str]:
    """A table of characters that is too short: its reader goes past the end at the first byte of at least ``size``."""
    table = struct.pack("<I", 4 * size) + bytes(4 * size) + b"x"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


@pytest.mark.parametrize(
    ("parts", "place"),
    [
        ({"normalizer": [[""]]}, r"normalizer is list"),
        ({"decoder": ["a"]}, r"decoder is list"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, ["a"]]}},
            r"normalizer\.normalizers\[1\] is list",
        ),
    ],
)
def test_a_list_is_no_part(tmp_path: Path, parts: dict[str, Any], place: str) -> None:
    with pytest.raises(SparsepassError, match=rf"tokenizer\.json: {place}, expected an object"):
        load_model(changed(tmp_path, **parts))


@pytest.mark.parametrize("table", [{"type": "Precompiled", "precompiled_charsmap": ""}, table_of(4)])
def test_a_panic_is_told_on_load(tmp_path: Path, capfd: pytest.CaptureFixture[str], table: dict[str, str]) -> None:
    with pytest.raises(SparsepassError, match=r"tokenizer.*PanicException"):
        load_model(changed(tmp_path, normalizer=table))
    assert "panicked" not in capfd.readouterr().err


def test_a_panic_is_told_at_a_text(tmp_path: Path) -> None:
    tokenizer = load_model(changed(tmp_path, normalizer=table_of(0xF1))).tokenizer
    assert tokenizer is not None
    assert first_ids("the fox", tokenizer, None, what="text")
    with pytest.raises(SparsepassError, match=rf"the tokenizer of {tmp_path} fails: PanicException: index out of bounds"):
        first_ids("the fox \U000f0000", tokenizer, None, what="text")


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 0, "b": 1}),
        models.Unigram([("a", 0.0), ("b", 0.0), ("▁", 0.0), (" ", 0.0)]),
        models.BPE({"a": 0, "b": 1}, []),
    ],
)
def test_odd_characters_need_not_be_known(tmp_path: Path, model: Any) -> None:
    core = Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path)
    assert tokenizer_in(tmp_path, "known") is not None


def test_half_a_character_is_a_fault_of_the_text(tmp_path: Path) -> None:
    tokenizer = load_model(changed(tmp_path)).tokenizer
    assert tokenizer is not None
    with pytest.raises(SparsepassError, match=r"the text holds half of a character \(\\ud800"):
        first_ids("a \ud800 b", tokenizer, None, what="text")


def test_what_is_no_panic_is_seen(capfd: pytest.CaptureFixture[str]) -> None:
    with panics_unseen(), panics_unseen():
        os.write(2, b"a warning")
    os.write(2, b", then more")
    assert capfd.readouterr().err == "a warning, then more"


def test_words_of_pages_are_taken_with_their_places(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "fox"]))
    transformers.LayoutLMv2Tokenizer(str(vocabulary)).save_pretrained(tmp_path / "page")
    assert type(tokenizer_in(tmp_path / "page", "page")).__name__.startswith("LayoutLMv2")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SparsepassError])
def test_what_is_no_fault_of_its_files_stays(error: type[BaseException]) -> None:
    with pytest.raises(error), tokenizing(None):
        raise error
