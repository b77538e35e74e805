"""A checkpoint of transformers: configuration, generation settings, tokenizer, an index and weights."""

from pathlib import Path

import transformers as hf
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from tests.export.tiny import save_tiny_llama
from tests.fuzz.kind import Files, Kind
from tests.fuzz.mutations import damaged_json, damaged_safetensors

from sparsepass.graph.load import load_model
from sparsepass.graph.texts import first_ids


def write(place: Path) -> None:
    """A tiny Llama in several files."""
    save_tiny_llama(place)
    model = hf.LlamaForCausalLM.from_pretrained(place)
    (place / "model.safetensors").unlink()
    model.save_pretrained(place, max_shard_size="60KB")


def damaged(place: Path) -> SearchStrategy[Files]:
    """One of the files."""
    strategies: list[SearchStrategy[Files]] = []
    for path in sorted(place.iterdir()):
        make = damaged_safetensors if path.suffix == ".safetensors" else damaged_json
        if path.suffix in (".safetensors", ".json"):
            strategies.append(make(path.read_bytes()).map(lambda found, name=path.name: {name: found}))  # type: ignore[misc]
    return st.one_of(strategies)


def read(place: Path) -> object:
    """Load it, and tokenize a text."""
    loaded = load_model(place)
    return None if loaded.tokenizer is None else first_ids("the fox [/b] \x1b", loaded.tokenizer, None, what="text")


KIND = Kind(name="checkpoint", sound=write, damaged=damaged, read=read)
