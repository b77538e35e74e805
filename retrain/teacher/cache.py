"""The offline teacher of a run: its top-k logits are written to disk once, and the student trains from them without it.

Tensor shape legend: B batch, T tokens, N rows, V vocabulary, K kept entries.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sparsepass.graph.support import SparsepassError, item_progress, replaced_file, shows_progress, waiting_for
from sparsepass.retrain.config import RetrainConfig
from sparsepass.retrain.data import TrainingData
from sparsepass.retrain.loss import CHUNK_TOKENS, log_probabilities
from sparsepass.retrain.run import make_accelerator
from sparsepass.retrain.teacher.cached import MANIFEST_FILE, CachedTeacher, CacheManifest, Shards, joined, sequence_hash
from sparsepass.retrain.teacher.online import OnlineTeacher, online_teacher

_UINT16_TOKENS = 1 << 16


def offline_teacher(
    folder: str | Path,
    model: Callable[[], nn.Module],
    data: TrainingData,
    config: RetrainConfig,
    *,
    k: int = 64,
    about: Mapping[str, str] | None = None,
    progress: bool | None = None,
) -> CachedTeacher:
    """Return a teacher that reads its logits from a folder, and write them first where they are missing.

    They are written in the order in which the run takes its sequences, for as many as it takes: a sequence that the run sees
    in two epochs is written twice. Writing goes on where an interrupted call stopped; a longer run extends what is there.

    Args:
        folder: Where the cache stands or is to stand.
        model: Gives the dense model; called only if something is missing.
        data: The run's data, at its beginning; it is left there.
        config: The run's settings.
        k: Logits kept for each token.
        about: What must be the same for a cache to be used again, such as the names of model and data.
        progress: See `write_teacher_cache`.

    Raises:
        SparsepassError: If the cache is of something else, or is incomplete and several processes run, or the loss asks for
            more than logits.
    """
    if config.hidden_weight:
        raise SparsepassError("hidden_weight needs a teacher in memory: a cache holds its logits only")
    needed = config.num_steps(data.train.shape.context) * config.batch_size
    if not _is_there(Path(folder), needed, config.temperature, k, about):
        accelerator = make_accelerator((), None)
        if accelerator.num_processes > 1:
            raise SparsepassError(
                f"{folder} does not hold the teacher's logits for the {needed} sequences of this run, and one process has to "
                "write them: run the same command with --cache-only and without accelerate launch, then this one again"
            )
        start = data.train.state()
        config = config.resolve(accelerator.device)
        teacher = online_teacher(model(), config, accelerator, unpadded=data.unpadded).teacher
        assert isinstance(teacher, OnlineTeacher)
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            write_teacher_cache(
                folder,
                teacher,
                (data.train.take(1).input_ids[0] for _ in range(needed)),
                k=k,
                temperatures=(config.temperature,),
                num_sequences=needed,
                about=about,
                progress=progress,
            )
        data.train.restore(start)
    return CachedTeacher(folder, temperature=config.temperature)


def write_teacher_cache(
    folder: str | Path,
    teacher: OnlineTeacher,
    sequences: Iterable[Tensor],
    *,
    k: int = 64,
    temperatures: Sequence[float] = (2.0,),
    num_sequences: int | None = None,
    batch_size: int = 8,
    shard_sequences: int = 256,
    about: Mapping[str, str] | None = None,
    progress: bool | None = None,
) -> CacheManifest:
    """Run a teacher over data once and keep the k largest logits of each position.

    A run that was interrupted leaves a valid cache of all full shards; the same call goes on from there, and one with more data
    extends it. Sequences that are there already are only compared.

    Size: per token ``k * (2 + 2)`` bytes and 4 for each temperature (``k * (4 + 2)`` from 65537 tokens of vocabulary on): 260
    bytes at k=64 and the 49152 tokens of SmolLM2, 388 with the 128256 of Llama 3.

    Shapes: each sequence [T], the same T for all.

    Args:
        folder: Where the cache stands or is to stand.
        teacher: Runs under the autocast that is on.
        sequences: Tokens in the global order of the data. Padding, if any, is on the right, where a causal model does
            not see it.
        k: Entries kept per position; at most the vocabulary.
        temperatures: Those the cache is to be used at.
        num_sequences: How many to take at most; also what the time left is told from.
        batch_size: Sequences run at once.
        shard_sequences: Sequences per file.
        about: Notes to keep in the manifest, such as the names of model and tokenizer.
        progress: Whether to show progress with the time left; by default where standard error is a terminal.

    Returns:
        The manifest of what now is on disk.

    Raises:
        SparsepassError: An option is out of range, lengths differ, or the folder holds something else: a cache of another
            teacher, other data or settings, or other files.

    Exactness: logits relative to the largest are rounded to fp16; the tails are computed from the unrounded ones in fp32.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> class Body(nn.Embedding):
        ...     def forward(self, input_ids, attention_mask):
        ...         return super().forward(input_ids)
        >>> teacher = OnlineTeacher(Body(10, 4), nn.Linear(4, 10))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manifest = write_teacher_cache(folder, teacher, torch.arange(6).view(2, 3), k=4)
        >>> manifest.num_sequences, manifest.k, manifest.complete
        (2, 4, True)
    """
    if k < 1 or batch_size < 1 or shard_sequences < 1:
        raise SparsepassError(
            f"k, batch_size and shard_sequences must be at least 1, got {k}, {batch_size} and {shard_sequences}"
        )
    if not temperatures or not all(0 < t < float("inf") for t in temperatures):
        raise SparsepassError(f"temperatures must be positive, and at least one, got {list(temperatures)}")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with waiting_for(place):  # of two runs that want the same cache, the second finds it written
        writer = _Writer(
            place,
            teacher,
            wanted={
                "teacher": teacher.fingerprint(),
                "k": k,
                "temperatures": tuple(map(float, temperatures)),
                "about": dict(about or {}),
            },
            shard_sequences=shard_sequences,
        )
        items = islice(sequences, num_sequences)
        start = writer.skip(items)
        with item_progress(shows_progress(progress), "caching the teacher", num_sequences, done=start) as advance:
            while batch := list(islice(items, batch_size)):
                writer.add(batch)
                for _ in batch:
                    advance("")
        return writer.finish()


def top_k(logits_NV: Tensor, k: int, temperatures: Sequence[float]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The k largest logits of each row, and how much probability all others have.

    Returns:
        Tokens [N, K]; their logits relative to the largest [N, K]; for each temperature the log-probability of all other tokens
        [N], -inf if there are none.

    Example:
        >>> index, value, (tail,) = top_k(torch.tensor([[0.0, 1.0, 0.0]]), 1, [1.0])
        >>> index.tolist(), value.tolist(), round(tail.exp().item(), 4)
        ([[1]], [[0.0]], 0.4239)
    """
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    value_NK, index_NK = logits_NV.to(dtype).topk(k, dim=-1)
    tails = [log_probabilities(logits_NV, t, dtype).scatter_(-1, index_NK, -torch.inf).logsumexp(-1) for t in temperatures]
    return index_NK, value_NK - value_NK[:, :1], tails


class _Writer:
    """Turns batches into shards, and keeps the manifest true to what is on disk."""

    def __init__(self, folder: Path, teacher: OnlineTeacher, *, wanted: Mapping[str, Any], shard_sequences: int) -> None:
        self._folder, self._teacher, self._shard_sequences, self._wanted = folder, teacher, shard_sequences, wanted
        self._hash = blake2b(digest_size=16)
        self._waiting: list[dict[str, Tensor]] = []
        self._manifest: CacheManifest | None = None
        if (folder / MANIFEST_FILE).exists():
            self._manifest = CacheManifest.read(folder)
            self._check(self._wanted)
        elif any(folder.iterdir()):
            raise SparsepassError(f"{folder} is not empty and holds no teacher cache; choose another folder")

    def skip(self, items: Iterator[Tensor]) -> int:
        """Take the sequences that are on disk already, and check that they are the same."""
        if self._manifest is None:
            return 0
        shards = Shards(self._folder, self._manifest)
        count = 0
        for count, ids_T in enumerate(islice(items, self._manifest.num_sequences), 1):
            found = sequence_hash(ids_T)
            if found != int(shards.sequence(count - 1, ("hash",))["hash"]):
                raise SparsepassError(
                    f"sequence {count - 1} has other tokens than the one that {self._folder} holds under this index; the "
                    "cache is of other data: choose another folder"
                )
            self._hash.update(_bytes(found))
        return count

    def add(self, batch: Sequence[Tensor]) -> None:
        """Run the teacher over some sequences; write a shard when there are enough."""
        context = len(batch[0]) if self._manifest is None else self._manifest.context
        if wrong := [tuple(ids.shape) for ids in batch if ids.shape != (context,)]:
            raise SparsepassError(f"a cached sequence is {wrong[0]}, expected {(context,)}: all need the same number of tokens")
        ids_BT = torch.stack(list(batch))
        targets = self._teacher.targets(ids_BT.to(self._teacher.device))
        chunks = torch.arange(ids_BT.numel(), device=self._teacher.device).split(CHUNK_TOKENS)
        pieces = [self._chunk(targets.logits(rows_N), context) for rows_N in chunks]
        found = {name: tensor.unflatten(0, ids_BT.shape) for name, tensor in joined(torch.cat, pieces).items()}
        found["hash"] = torch.tensor([sequence_hash(ids_T) for ids_T in ids_BT])
        self._waiting += [{name: t[i] for name, t in found.items()} for i in range(len(ids_BT))]
        while len(self._waiting) >= self._shard_sequences:
            self._flush()

    def finish(self) -> CacheManifest:
        """Write what is left, and that the end was reached."""
        if self._waiting:
            self._flush()
        if self._manifest is None:
            raise SparsepassError("there are no sequences to cache; check the data")
        self._manifest = replace(self._manifest, complete=True)
        self._manifest.write(self._folder)
        return self._manifest

    def _chunk(self, logits_NV: Tensor, context: int) -> dict[str, Tensor]:
        vocab_size = logits_NV.shape[-1]
        k, temperatures = self._wanted["k"], self._wanted["temperatures"]
        if k > vocab_size:
            raise SparsepassError(f"k is {k}, but the teacher's vocabulary has {vocab_size} tokens; choose a smaller k")
        if self._manifest is None:
            self._manifest = CacheManifest(vocab_size=vocab_size, context=context, **self._wanted)
        self._check({"vocab_size": vocab_size})
        index_NK, value_NK, tails = top_k(logits_NV, k, temperatures)
        floor = torch.finfo(torch.float16).min
        return {
            "index": index_NK.to(torch.uint16 if vocab_size <= _UINT16_TOKENS else torch.int32).cpu(),
            "value": value_NK.clamp_min_(floor).to(torch.float16).cpu(),
        } | {f"tail_{i}": tail_N.float().cpu() for i, tail_N in enumerate(tails)}

    def _check(self, wanted: Mapping[str, Any]) -> None:
        there = self._manifest
        if wrong := [f"{n} is {getattr(there, n)} there, {v} here" for n, v in wanted.items() if getattr(there, n) != v]:
            raise SparsepassError(
                f"{self._folder} holds another teacher cache: {'; '.join(wrong)}; choose another folder, or the same settings "
                "(the fingerprint changes with the precision of the weights, too)"
            )

    def _flush(self) -> None:
        assert self._manifest is not None
        batch, self._waiting = self._waiting[: self._shard_sequences], self._waiting[self._shard_sequences :]
        tensors = joined(torch.stack, batch)
        path = self._folder / f"shard-{len(self._manifest.shards):05d}.safetensors"
        with replaced_file(path) as beside:
            safetensors.torch.save_file(tensors, beside)
        for value in tensors["hash"].tolist():
            self._hash.update(_bytes(value))
        self._manifest = replace(
            self._manifest,
            shards=(*self._manifest.shards, (path.name, len(batch), path.stat().st_size)),
            num_sequences=self._manifest.num_sequences + len(batch),
            data=self._hash.hexdigest(),
            complete=False,
        )
        self._manifest.write(self._folder)


def _is_there(folder: Path, needed: int, temperature: float, k: int, about: Mapping[str, str] | None) -> bool:
    """Whether a cache holds what the run needs, as far as its manifest tells; each batch is compared when it is read."""
    if not (folder / MANIFEST_FILE).is_file():
        return False
    found = CacheManifest.read(folder)
    same = found.k == k and temperature in found.temperatures and dict(found.about) == dict(about or {})
    return same and found.num_sequences >= needed


def _bytes(value: int) -> bytes:
    return value.to_bytes(8, "little", signed=True)
