"""`bench`: how fast a model decodes and reads a prompt, and what it takes of memory and disk, alone or beside another one."""

import gc
import json
import logging
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path, PurePath
from typing import Any, Final

import torch
from torch import nn

from sparsepass.export.report import RateEntry, SideEntry, SpeedPointEntry, SpeedSection, find_report
from sparsepass.export.stages.bench_runs import BenchShape, BenchTimes, run_once, shapes
from sparsepass.export.stages.settings import BenchSettings, ModelSource
from sparsepass.graph import SparsepassError
from sparsepass.graph.load import LoadedModel
from sparsepass.graph.native import TORCH, processor
from sparsepass.graph.packed import DenseLinear, PackedLinear, gpu_refusal
from sparsepass.graph.packed_folder import linear_layers
from sparsepass.graph.support import find_device, give_back_freed_memory, item_progress, shows_progress

_LOG = logging.getLogger(__name__)
_MEMORY: Final = "sparsepass.export.stages.bench_memory"
_GPU: Final = "triton"
_ZEROS: Final = "2:4, stored with its zeros"


def bench(
    source: ModelSource | str | Path,
    against: ModelSource | str | Path | None = None,
    *,
    settings: BenchSettings | None = None,
    progress: bool | None = None,
) -> SpeedSection:
    """Measure a model, and another one beside it.

    The models take turns in one process. Memory is measured in a process of its own for each, so that neither counts the
    other's.

    Args:
        source: What to measure: a packed folder, or what else `load_model` takes.
        against: What to compare it with.
        settings: What is measured.
        progress: Whether to show progress; by default where standard error is a terminal.

    Returns:
        The section ``speed`` of the report.

    Raises:
        SparsepassError: If a model cannot be loaded, takes no text, is a saved program, or both differ in kind; or the device
            cannot be used.

    Example:
        >>> bench("packed", "dense").main.gain  # doctest: +SKIP
        1.4
    """
    chosen = settings or BenchSettings()
    given = [source] if against is None else [source, against]
    named = [each if isinstance(each, ModelSource) else ModelSource(source=str(each)) for each in given]
    find_device(chosen.device)
    for each in named:
        each.check()
    with _threads(chosen.threads):
        loaded = [_load(each, chosen.device) for each in named]
        points = measure_speed([each.model for each in loaded], settings=chosen, progress=progress)
        sides = [_side(each, name) for each, name in zip(loaded, _names(named), strict=True)]
        threads = torch.get_num_threads()
        del loaded
        gc.collect()
        give_back_freed_memory()
        if chosen.memory:
            sides = [
                side.model_copy(update=_memory(each, replace(chosen, threads=threads)))
                for side, each in zip(sides, named, strict=True)
            ]
    is_gpu = torch.device(chosen.device).type == "cuda"
    return SpeedSection(
        sides=sides,
        points=points,
        device=torch.cuda.get_device_name(chosen.device) if is_gpu else chosen.device,
        processor=processor(),
        threads=threads,
        repeats=chosen.repeats,
    )


def measure_speed(
    models: Sequence[nn.Module], *, settings: BenchSettings | None = None, progress: bool | None = None
) -> list[SpeedPointEntry]:
    """Time models that are in memory, taking turns.

    Args:
        models: One or more, of transformers, on the device that is named.
        settings: What is measured.
        progress: Whether to show progress; by default where standard error is a terminal.

    Returns:
        A measurement of prefill and one of decoding for each batch size; of forward passes, for models that do not generate.

    Raises:
        SparsepassError: If a model takes no text, or some generate and others do not.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> small = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
        >>> settings = BenchSettings(batches=(1,), new_tokens=2, prefill_tokens=8, repeats=1)
        >>> found = measure_speed([LlamaForCausalLM(small).eval()], settings=settings)
        >>> [point.phase for point in found], found[0].rates[0] > 0
        (['decode', 'prefill'], True)
    """
    chosen = settings or BenchSettings()
    wanted = shapes(models, chosen)
    total = len(wanted) * len(models) * (chosen.repeats + 1)
    points = []
    _LOG.info("measuring times, %d runs", total)
    with item_progress(shows_progress(progress), "bench", total) as advance:
        for shape in wanted:
            times = _take_turns(models, shape, chosen.repeats, advance)
            points.append(
                SpeedPointEntry(
                    phase=shape.phase,
                    batch=shape.batch,
                    prompt_tokens=shape.prompt_tokens,
                    new_tokens=shape.new_tokens,
                    results=[_rates(shape, each) for each in times],
                )
            )
    return points


def _take_turns(
    models: Sequence[nn.Module], shape: BenchShape, repeats: int, advance: Callable[[str], None]
) -> list[list[BenchTimes]]:
    """What each model took, without its first run."""
    times: list[list[BenchTimes]] = [[] for _ in models]
    for repeat in range(repeats + 1):
        for model, found in zip(models, times, strict=True):
            took = run_once(model, shape)
            if repeat:
                found.append(took)
            advance(f"{shape.phase}, batch {shape.batch}")
    return times


def _rates(shape: BenchShape, times: Sequence[BenchTimes]) -> RateEntry:
    first = statistics.median(each.first_s for each in times)
    decoding = shape.new_tokens - 1
    found = [each.rest_s for each in times] if decoding > 0 else [each.first_s for each in times]
    middle = statistics.median(found)
    return RateEntry(
        prompt_tokens_per_second=shape.batch * shape.prompt_tokens / first,
        first_token_s=first if shape.new_tokens else None,
        new_tokens_per_second=shape.batch * decoding / middle if decoding > 0 else None,
        spread=(max(found) - min(found)) / middle,
    )


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load(source: ModelSource, device: str) -> LoadedModel:
    loaded = source.load(device)
    if loaded.kind == "program":
        raise SparsepassError(
            f"{source.source} is a saved program, which is run to be checked and rewritten, not to be fast; write it as a "
            f"folder first: sparsepass export {source.source} --target packed -o OUT (or --target hf)"
        )
    return loaded


def _names(sources: Sequence[ModelSource]) -> list[str]:
    """Short names; the whole ones where these are the same."""
    short = [PurePath(each.source).name or each.source for each in sources]
    return short if len({*short}) == len(short) else [each.source for each in sources]


def _side(loaded: LoadedModel, name: str) -> SideEntry:
    model: Any = loaded.model
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    dense = [*linear_layers(model), *(path for path, module in model.named_modules() if isinstance(module, DenseLinear))]
    files = loaded.provenance.get("files")
    sizes = {str(file): int(size) for file, size in files.items()} if isinstance(files, Mapping) else {}
    return SideEntry(
        name=name,
        source=loaded.source,
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        num_packed=len(packed),
        num_dense=len(dense),
        kernels=dict(Counter(_kernel(layer, model.device) for layer in packed)),
        dense=_reasons(Path(loaded.source).expanduser(), is_packed=bool(packed)),
        disk_bytes=sum(size for file, size in sizes.items() if file.endswith((".safetensors", ".gguf"))),
    )


def _kernel(layer: PackedLinear, device: torch.device) -> str:
    """What multiplies a packed layer. On a GPU the fastest way for each number of tokens is measured, ours among them."""
    return _GPU if device.type == "cuda" and not gpu_refusal(device) else layer.path or TORCH


def _reasons(folder: Path, *, is_packed: bool) -> dict[str, int]:
    """Why layers run dense -> how many, as far as the report of a folder tells."""
    document = find_report(folder) if folder.is_dir() else None
    if document is None:
        return {}
    if is_packed:
        told = ((document.get("artifact") or {}).get("details") or {}).get("dense") or {}
        return dict(Counter(map(str, told.values())).most_common())
    passes = document.get("passes") or {}
    if not passes.get("num_sparse"):
        return {}
    zeros = dict.fromkeys(passes.get("layers") or {}, _ZEROS)
    return dict(Counter([*zeros.values(), *map(str, (passes.get("skipped") or {}).values())]).most_common())


def _memory(source: ModelSource, settings: BenchSettings) -> dict[str, int | None]:
    """What a model takes of memory, in a process of its own."""
    _LOG.info("measuring memory of %s", source.source)
    asked = json.dumps({"source": asdict(source), "settings": asdict(settings)})
    done = subprocess.run([sys.executable, "-m", _MEMORY, asked], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise SparsepassError(
            f"memory of {source.source} could not be measured: its process ended with {done.returncode} ({last}); free some "
            "memory, or measure times alone (memory=False)"
        )
    found: dict[str, int | None] = json.loads(done.stdout.splitlines()[-1])
    return found
