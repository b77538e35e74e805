"""A teacher cache: its manifest and a shard."""

from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import save_file
from tests.fuzz.kind import Files, Kind
from tests.fuzz.mutations import damaged_json, damaged_safetensors

from sparsepass.retrain.teacher.cached import MANIFEST_FILE, CachedTeacher, CacheManifest, sequence_hash

_SHARD = "shard-00000.safetensors"


def write(place: Path) -> None:
    """Two sequences of four tokens, three logits kept."""
    ids_BT = torch.arange(8).view(2, 4)
    tensors = {
        "hash": torch.tensor([sequence_hash(ids_T) for ids_T in ids_BT]),
        "index": torch.arange(3).expand(2, 4, 3).to(torch.uint16).contiguous(),
        "value": torch.zeros(2, 4, 3, dtype=torch.float16),
        "tail_0": torch.full((2, 4), -1.0),
    }
    save_file(tensors, place / _SHARD)
    shards = ((_SHARD, 2, (place / _SHARD).stat().st_size),)
    manifest = CacheManifest(teacher="x", vocab_size=16, k=3, temperatures=(2.0,), context=4, num_sequences=2, shards=shards)
    manifest.write(place)


def damaged(place: Path) -> SearchStrategy[Files]:
    """Either file."""
    manifest: SearchStrategy[Files] = damaged_json((place / MANIFEST_FILE).read_bytes()).map(
        lambda found: {MANIFEST_FILE: found}
    )
    shard: SearchStrategy[Files] = damaged_safetensors((place / _SHARD).read_bytes()).map(lambda found: {_SHARD: found})
    return st.one_of(manifest, manifest, shard)


def read(place: Path) -> object:
    """Look up both sequences."""
    teacher = CachedTeacher(place, temperature=2.0, vocab_size=16)
    targets = teacher.targets(torch.arange(8).view(2, 4), sequence_indices_B=torch.tensor([0, 1]))
    return targets.rows(torch.arange(8))


KIND = Kind(name="teacher_cache", sound=write, damaged=damaged, read=read)
