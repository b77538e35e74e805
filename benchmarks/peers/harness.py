"""What every worker does in the same way: load, time, measure memory, check 2:4, save.

A worker is `main(tool, prune)`. `prune` gets the loaded model, the calibration ids `[sequences, context]` and the
settings, and returns the pruned state dict. The clock and the memory mark run around that one call. This file needs
nothing but torch, transformers and safetensors, which all tools share.
"""

import argparse
import ctypes
import ctypes.util
import gc
import hashlib
import importlib.metadata
import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

State = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    criterion: str
    batch_size: int
    refine: int


def rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def reset_peak() -> str:
    """Starts a new peak, so that loading the model does not count. Returns how the peak will be read."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return "ru_maxrss of the whole process"
    return "VmHWM since the model was loaded"


def peak_rss_bytes(method: str) -> int:
    if method.startswith("VmHWM"):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back_free_memory() -> None:
    """Without this, memory that loading freed but the allocator kept would hide part of the increase."""
    gc.collect()
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def linear_weights(model: torch.nn.Module) -> list[str]:
    """The layers everyone is asked to prune: each nn.Linear but the output head."""
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    ]


def is_2_of_4(weight_OI: torch.Tensor) -> bool:
    num_out, num_in = weight_OI.shape
    if num_in % 4:
        return False
    return bool(((weight_OI.reshape(num_out, -1, 4) != 0).sum(-1) <= 2).all())


def load(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # Weights may still be views of the mapped file, whose pages count or not as they are touched: make them ordinary
    # memory, for every tool alike.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def save_state(state: State, path: Path) -> str:
    """Writes each storage once (a tied head is left out) and returns a digest of the values."""
    seen: set[int] = set()
    kept: State = {}
    for name in sorted(state):
        tensor = state[name].detach()
        if name.endswith("lm_head.weight") or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        kept[name] = tensor.contiguous()
    save_file(kept, path)
    digest = hashlib.sha256()
    for name, tensor in kept.items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def main(tool: str, packages: tuple[str, ...], prune: Callable[[PreTrainedModel, torch.Tensor, Settings], State]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--criterion", required=True)
    parser.add_argument("--every", type=int, default=1, help="take each sequence in so many")
    parser.add_argument("--refine", type=int, default=0, help="steps that move the kept weights; sparsepass only")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ids_BT = load_file(args.tokens)["calibration"][:: args.every]
    model = load(args.model)
    names = linear_weights(model)
    give_back_free_memory()
    loaded_bytes = rss_bytes()
    method = reset_peak()
    load_average = os.getloadavg()[0]

    cpu_start, wall_start = time.process_time(), time.perf_counter()
    state = prune(model, ids_BT, Settings(criterion=args.criterion, batch_size=args.batch_size, refine=args.refine))
    wall_s, cpu_s = time.perf_counter() - wall_start, time.process_time() - cpu_start

    peak_bytes = peak_rss_bytes(method)
    pruned = sorted(name for name in names if is_2_of_4(state[name]))
    num_zeros = sum(int((state[name] == 0).sum()) for name in pruned)
    num_entries = sum(state[name].numel() for name in pruned)
    record = {
        "tool": tool,
        "criterion": args.criterion,
        "num_sequences": len(ids_BT),
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "rss_loaded_bytes": loaded_bytes,
        "rss_peak_bytes": peak_bytes,
        "rss_increase_bytes": peak_bytes - loaded_bytes,
        "peak_method": method,
        "load_average_before": load_average,
        "num_linear": len(names),
        "num_2_of_4": len(pruned),
        "pruned": pruned,
        "zeros_fraction": num_zeros / max(num_entries, 1),
        "num_threads": torch.get_num_threads(),
        "batch_size": args.batch_size,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)},
        "weights_sha256": save_state(state, args.weights),
    }
    args.record.write_text(json.dumps(record, indent=1))
