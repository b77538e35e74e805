"""A teacher whose top-k logits lie on disk, and the layout of their folder.

A folder with `teacher_cache.json` (what was cached, of which teacher, for which data) and safetensors shards of whole
sequences. For each position a shard holds the k most probable tokens, their logits relative to the largest, and for each
temperature the log-probability of all others together. `write_teacher_cache` writes it.

Tensor shape legend: B batch, T tokens, N rows, X flattened positions, V vocabulary, K kept entries.
"""

import bisect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, final

import safetensors
import torch
from pydantic import TypeAdapter
from torch import Tensor

from sparsepass.graph.support import SparsepassError, check_as, check_tensors, native_path, read_by, read_object, write_text
from sparsepass.retrain.loss import TeacherTargets, TopKDistribution, log_probabilities
from sparsepass.retrain.teacher.online import Teacher

MANIFEST_FILE = "teacher_cache.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class CacheManifest:
    """What a teacher cache holds.

    Attributes:
        teacher: Fingerprint of the teacher's weights; see `OnlineTeacher.fingerprint`.
        vocab_size: Entries of the teacher's logits.
        k: Kept entries per position.
        temperatures: Those that the cache can be used at.
        context: Tokens per sequence.
        about: What the writer noted (names of model, tokenizer, data).
        num_sequences: Sequences there are, numbered from 0.
        data: Hash over the tokens of all of them, in order.
        complete: Whether the writer came to the end of its data.
        shards: File name, number of sequences and size in bytes of each shard, in order.
        format: Version of the layout.
    """

    teacher: str
    vocab_size: int
    k: int
    temperatures: tuple[float, ...]
    context: int
    about: Mapping[str, str] = field(default_factory=dict)
    num_sequences: int = 0
    data: str = ""
    complete: bool = False
    shards: tuple[tuple[str, int, int], ...] = ()
    format: int = _FORMAT

    @staticmethod
    def read(folder: str | Path) -> "CacheManifest":
        """Read the manifest of a cache.

        Raises:
            SparsepassError: There is none, or it is not one of ours, or of a newer format.
        """
        path = Path(folder) / MANIFEST_FILE
        if not path.is_file():
            raise SparsepassError(f"{folder} holds no {MANIFEST_FILE}; write it with write_teacher_cache")
        advice = "the cache is damaged: remove the folder and write it anew"
        document = read_object(path, advice=advice)
        version = document.get("format")
        if isinstance(version, int) and version > _FORMAT:
            raise SparsepassError(f"{path} has format {version}, this version reads {_FORMAT}; update sparsepass")
        found = check_as(TypeAdapter(CacheManifest), document, str(path), advice=advice)
        return replace(found, shards=tuple((Path(name).name, count, size) for name, count, size in found.shards))

    def write(self, folder: Path) -> None:
        """Write it beside its place and move it over."""
        write_text(folder / MANIFEST_FILE, json.dumps(asdict(self), indent=1) + "\n")


@final
class CachedTeacher(Teacher):
    """A teacher whose top-k logits were written by `write_teacher_cache`; reads the slices of a batch when they are needed.

    Args:
        folder: The cache; it may be unfinished, as long as only sequences that it holds are asked for.
        temperature: What the loss will use; must be one of the cache's.
        vocab_size: The student's; None leaves the check to the loss.

    Raises:
        SparsepassError: There is no cache, it is damaged, or it was made for another temperature or vocabulary.

    Example:
        >>> CachedTeacher("no_such_folder", temperature=2.0)
        Traceback (most recent call last):
        ...
        sparsepass.SparsepassError: no_such_folder holds no teacher_cache.json; write it with write_teacher_cache
    """

    def __init__(self, folder: str | Path, *, temperature: float, vocab_size: int | None = None) -> None:
        self.manifest = CacheManifest.read(folder)
        self._folder, self._temperature = Path(folder), float(temperature)
        if self._temperature not in self.manifest.temperatures:
            raise SparsepassError(
                f"the teacher cache {folder} holds temperatures {list(self.manifest.temperatures)}, the loss uses "
                f"{temperature}; use one of these, or write the cache anew"
            )
        if vocab_size not in (None, self.manifest.vocab_size):
            raise SparsepassError(
                f"the teacher cache {folder} is for a vocabulary of {self.manifest.vocab_size}, the student has {vocab_size}; "
                "distillation on logits needs one vocabulary"
            )
        self._shards = Shards(self._folder, self.manifest)

    def targets(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None, sequence_indices_B: Tensor | None = None
    ) -> "CachedTargets":
        """See `Teacher.targets`; needs the indices, and compares the tokens with those that were cached.

        Raises:
            SparsepassError: Indices are missing or not in the cache, the tokens are others, or padding is on the left.
        """
        if sequence_indices_B is None or sequence_indices_B.shape != input_ids_BT.shape[:1]:
            raise SparsepassError(
                f"a cached teacher needs the global index of each of the {len(input_ids_BT)} sequences, got "
                f"{None if sequence_indices_B is None else tuple(sequence_indices_B.shape)}"
            )
        if attention_mask_BT is not None and not attention_mask_BT[:, 0].all():
            raise SparsepassError("a cached teacher takes padding on the right only; set the tokenizer's padding_side to right")
        if input_ids_BT.shape[1] != self.manifest.context:
            raise SparsepassError(
                f"the teacher cache {self._folder} holds sequences of {self.manifest.context} tokens, the batch has "
                f"{input_ids_BT.shape[1]}; set the same context, or write the cache anew"
            )
        names = ("index", "value", f"tail_{self.manifest.temperatures.index(self._temperature)}")
        rows = []
        for index, ids_T in zip(sequence_indices_B.tolist(), input_ids_BT.cpu(), strict=True):
            found = self._shards.sequence(index, ("hash", *names))
            if int(found["hash"]) != sequence_hash(ids_T):
                raise SparsepassError(
                    f"sequence {index} has other tokens than the one cached under this index in {self._folder}; the cache "
                    "is of other data, another tokenizer or another order: write it anew with this run's data settings"
                )
            rows.append({name: found[name] for name in names})
        together = joined(torch.cat, rows)
        largest = int(together["index"].to(torch.int32).max())
        if largest >= self.manifest.vocab_size or any(together[name].isnan().any() for name in names[1:]):
            raise SparsepassError(
                f"the teacher cache {self._folder} is damaged: it holds NaN, or a token that is none of its "
                f"{self.manifest.vocab_size}; write it anew"
            )
        index_XK, value_XK, tail_X = (together[name].to(input_ids_BT.device) for name in names)
        return CachedTargets(index_XK, value_XK, tail_X, vocab_size=self.manifest.vocab_size, temperature=self._temperature)


def joined(join: Callable[[list[Tensor]], Tensor], parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join tensors of one name; without autocast, which on a processor knows no float16, as which the values are kept."""
    with torch.autocast("cpu", enabled=False):
        return {name: join([part[name] for part in parts]) for name in parts[0]}


@final
class CachedTargets(TeacherTargets):
    """A batch's slices of a cache.

    Args:
        index_XK: Tokens of the kept entries.
        value_XK: Their logits relative to the largest.
        tail_X: Log-probability of all others at ``temperature``.
        vocab_size: V.
        temperature: What the tails were taken at.
    """

    def __init__(self, index_XK: Tensor, value_XK: Tensor, tail_X: Tensor, *, vocab_size: int, temperature: float) -> None:
        # Indexing is not implemented for uint16 everywhere.
        self._index_XK, self._value_XK, self._tail_X = index_XK.to(torch.int32), value_XK, tail_X
        self._vocab_size, self._temperature = vocab_size, temperature

    def rows(self, rows_N: Tensor) -> TopKDistribution:
        """See `TeacherTargets.rows`."""
        log_p_NK = log_probabilities(self._value_XK[rows_N], self._temperature, torch.float32)
        tail_N = self._tail_X[rows_N]
        # The kept entries share what the tail leaves, so that rounding does not change the sum.
        kept_N1 = tail_N.expm1().neg_().clamp_min_(torch.finfo(torch.float32).tiny).log_().unsqueeze(-1)
        return TopKDistribution(
            self._index_XK[rows_N],
            log_p_NK.add_(kept_N1),
            tail_N,
            vocab_size=self._vocab_size,
            temperature=self._temperature,
        )


class Shards:
    """The files of a cache, opened (memory-mapped) when first needed."""

    def __init__(self, folder: Path, manifest: CacheManifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._starts = list(accumulate((count for _, count, _ in manifest.shards), initial=0))
        self._opened: dict[int, Any] = {}

    def sequence(self, index: int, names: Collection[str]) -> dict[str, Tensor]:
        """What is stored of one sequence under some names.

        Raises:
            SparsepassError: The sequence is not there, or its shard is damaged.
        """
        if not 0 <= index < self._starts[-1]:
            state = "complete" if self._manifest.complete else "unfinished, write_teacher_cache goes on where it stopped"
            raise SparsepassError(
                f"sequence {index} is not in the teacher cache {self._folder}, which holds {self._starts[-1]} ({state})"
            )
        shard = bisect.bisect_right(self._starts, index) - 1
        if shard not in self._opened:
            self._opened[shard] = self._open(*self._manifest.shards[shard])
        file, offset = self._opened[shard], index - self._starts[shard]
        return {name: file.get_slice(name)[offset : offset + 1].squeeze(0) for name in names}

    def _open(self, name: str, count: int, size: int) -> Any:
        path = self._folder / name
        there = path.stat().st_size if path.is_file() else None
        if there != size:
            raise SparsepassError(
                f"{path} {'is gone' if there is None else f'has {there} bytes'}, expected {size} bytes; write the cache anew"
            )
        advice = "write the cache anew"
        header = check_tensors(path, advice=advice)
        positions = [count, self._manifest.context]
        kept = {"index": [*positions, self._manifest.k], "value": [*positions, self._manifest.k]}
        tails = {f"tail_{number}": positions for number in range(len(self._manifest.temperatures))}
        for wanted, shape in ({"hash": [count]} | kept | tails).items():
            if wanted not in header or header[wanted]["shape"] != shape:
                raise SparsepassError(f"{path} does not hold {wanted} of {count} sequences; {advice}")
        with read_by("safetensors", path, safetensors.SafetensorError, OSError, advice=advice):
            return safetensors.safe_open(native_path(path), framework="pt")


def sequence_hash(ids_T: Tensor) -> int:
    """A 64-bit hash of a sequence's tokens, whatever their integer dtype.

    Example:
        >>> sequence_hash(torch.tensor([1, 2])) == sequence_hash(torch.tensor([1, 2], dtype=torch.int32))
        True
    """
    data = ids_T.detach().to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True)
