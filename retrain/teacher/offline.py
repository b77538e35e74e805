"""The offline teacher of a run: its top-k logits written once for the run's own sequences, then trained from without it."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsepass.graph.support import SparsepassError
from sparsepass.retrain.config import RetrainConfig
from sparsepass.retrain.data import TrainingData
from sparsepass.retrain.run import make_accelerator
from sparsepass.retrain.teacher.cache import write_teacher_cache
from sparsepass.retrain.teacher.cached import MANIFEST_FILE, CachedTeacher, CacheManifest
from sparsepass.retrain.teacher.contract import OnlineTeacher
from sparsepass.retrain.teacher.online import online_teacher


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
                _sequences(data, needed),
                k=k,
                temperatures=(config.temperature,),
                num_sequences=needed,
                about=about,
                progress=progress,
            )
        data.train.restore(start)
    return CachedTeacher(folder, temperature=config.temperature)


def _sequences(data: TrainingData, count: int) -> Iterator[Tensor]:
    for _ in range(count):
        yield data.train.take(1).input_ids[0]


def _is_there(folder: Path, needed: int, temperature: float, k: int, about: Mapping[str, str] | None) -> bool:
    """Whether a cache holds what the run needs, as far as its manifest tells; each batch is compared when it is read."""
    if not (folder / MANIFEST_FILE).is_file():
        return False
    found = CacheManifest.read(folder)
    same = found.k == k and temperature in found.temperatures and dict(found.about) == dict(about or {})
    return same and found.num_sequences >= needed
