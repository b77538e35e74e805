"""What a model takes of memory: `python -m sparsepass.export.stages.bench_memory SETTINGS` prints it as JSON.

A process of its own measures one model. What it has loaded before does not count: torch, transformers, and what generating
needs.
"""

import gc
import json
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparsepass.export.stages.bench_runs import BenchShape, generate, run_once, shapes
from sparsepass.export.stages.settings import BenchSettings, ModelSource
from sparsepass.graph.support import INFINITIES, give_back_freed_memory, read_object


def measure_memory(source: ModelSource, settings: BenchSettings) -> dict[str, int | None]:
    """Load a model in this process, and measure by how much that makes it grow.

    Weights that lie in a mapped file are read once, so that they count as those do that were copied.

    Args:
        source: The model.
        settings: Where it runs.

    Returns:
        ``loaded_bytes``, ``running_bytes`` and ``loading_bytes``, of the GPU if it runs there; None where the system does not
        tell.
    """
    _warm_up(source)
    before = _resident_bytes()
    model: Any = source.load(settings.device).model
    if model.device.type == "cuda":
        loaded, loading = torch.cuda.memory_allocated(model.device), torch.cuda.max_memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        run_once(model, _shape(model, settings))
        running = torch.cuda.max_memory_allocated(model.device)
        return {"loaded_bytes": loaded, "running_bytes": running, "loading_bytes": loading}
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().contiguous().view(-1).view(torch.uint8)[::1024].sum()
    after, loading = _settled(), _peak_bytes()
    is_apart = _forget_peak()
    run_once(model, _shape(model, settings))
    found = {"loaded_bytes": after, "running_bytes": _peak_bytes() if is_apart else None, "loading_bytes": loading}
    return {name: None if before is None or value is None else value - before for name, value in found.items()}


def _shape(model: Any, settings: BenchSettings) -> BenchShape:
    """The prompt that prefill is timed on, and a token more; or the first forward pass."""
    found = shapes([model], settings)
    return next((replace(shape, new_tokens=2) for shape in found if shape.phase == "prefill"), found[0])


def _warm_up(source: ModelSource) -> None:
    """Load what any model needs: the code of its class, of generation, of matrix products."""
    import transformers

    small = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
    )
    model: Any = transformers.LlamaForCausalLM(small).eval()
    model.to(torch.bfloat16)
    ids_BT = torch.ones(1, 8, dtype=torch.long)
    generate(model, {"input_ids": ids_BT, "attention_mask": ids_BT}, 2)
    path = Path(source.source).expanduser() / "config.json"
    named = read_object(path, allowed=INFINITIES).get("architectures") if path.is_file() else None
    for name in named if isinstance(named, list) else ():
        getattr(transformers, str(name), None)
    _settled()


def _settled() -> int | None:
    """Resident memory, without what was freed."""
    gc.collect()
    give_back_freed_memory()
    return _resident_bytes()


def _resident_bytes() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except OSError:
        return None


def _forget_peak() -> bool:
    """Let the most that is resident count from now on; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    """The most that was ever resident. ``ru_maxrss`` is handed down by the process that started this one; VmHWM is not."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Read what to measure from the first argument, and print what was found."""
    asked = json.loads(sys.argv[1])
    settings = BenchSettings(**asked["settings"] | {"batches": tuple(asked["settings"]["batches"])})
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    print(json.dumps(measure_memory(ModelSource(**asked["source"]), settings)))


if __name__ == "__main__":
    main()
