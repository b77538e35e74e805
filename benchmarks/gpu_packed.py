"""Packed 2:4 weights on a GPU: our kernels against cuBLAS, and whole-model decoding. At most ten minutes.

    python benchmarks/gpu_packed.py [--out benchmarks/results] [--seconds 540]
    python benchmarks/gpu_packed.py --rehearse      tiny shapes in Triton's interpreter, on a machine without a GPU

1. Layer shapes of Llama-3-8B, one token: bf16, int8 (a scale a row) and int4 (one in 128 columns), each in the way that was
   fastest, with the others' times beside it. Dense is torch's linear in bf16 (cuBLAS). Copies of a weight take turns, so that
   none is in the second-level cache, in a CUDA graph, so that no launch is waited for. Dense and packed take turns.
2. The same for 4, 16 and 512 tokens, bf16.
3. Decoding with a random Llama of 1B, one sequence, static cache, a CUDA graph: dense against packed, and the bytes on the GPU.

What does not fit into the seconds is left out, and the page says so. Exit code: 0 if all that was measured holds, else 1.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from common import commit
from torch import Tensor, nn

from sparsepass.graph import SparsepassError
from sparsepass.graph.packed.gpu import fastest, packed_linear_gpu
from sparsepass.graph.packed.gpu_ways import RUNS, GpuWeight, Way, gpu_refusal
from sparsepass.graph.packed.layout import Values, pack
from sparsepass.graph.support import first_line

REHEARSED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if REHEARSED else "cuda")
BF16 = torch.bfloat16
SHAPES = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}
KINDS: dict[Values, int] = {"bf16": 0, "int8": 0, "int4": 128}
MORE_TOKENS = (4, 16, 512)
ROTATED_BYTES, ROUNDS, LEAST_GAIN, NEW_TOKENS = 512 << 20, 15, 1.35, 128
LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
if REHEARSED:
    SHAPES = {"small": (8, 512)}
    ROTATED_BYTES, ROUNDS, NEW_TOKENS, MORE_TOKENS = 1, 1, 2, (2, 20)
    LLAMA = dict(zip(LLAMA, (32, 64, 1, 4, 2, 96), strict=True))


def two_four(rows: int, columns: int) -> Tensor:
    """A random 2:4 weight."""
    weight = torch.randn(rows, columns // 4, 4, device=DEVICE)
    weight.scatter_(-1, torch.rand_like(weight).argsort(-1)[..., :2], 0)
    return weight.view(rows, columns).to(BF16)


def stored(weight: Tensor, values: Values) -> GpuWeight:
    packed = pack(weight, values=values, group_size=KINDS[values])
    scales = None if packed.scales is None else packed.scales.to(BF16)
    return GpuWeight(values, packed.kept, packed.codes, scales, KINDS[values], None, 0, None)


def bytes_of(weight: GpuWeight) -> int:
    return sum(each.nbytes for each in (weight.kept, weight.codes, weight.scales) if each is not None)


def graph_of(run: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of some calls; without a GPU, the calls themselves."""
    if REHEARSED:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def time_us(run: Callable[[], Any]) -> float:
    if REHEARSED:
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return 1e3 * float(start_event.elapsed_time(end_event))


def in_turns(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median time of each in microseconds, taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(ROUNDS):
        for name, run in runs.items():
            found[name].append(time_us(run))
    return {name: statistics.median(each) for name, each in found.items()}


def copies_of(tensors: GpuWeight | Tensor, size: int) -> list[Any]:
    """Enough copies that those of one round are more than any second-level cache holds."""
    count = max(1, -(-ROTATED_BYTES // size))
    if isinstance(tensors, Tensor):
        return [tensors.clone() for _ in range(count)]
    return [GpuWeight(*(each.clone() if isinstance(each, Tensor) else each for each in tensors)) for _ in range(count)]


def measure_shape(name: str, tokens: int, kinds: Iterable[Values]) -> list[dict[str, Any]]:
    """Dense and packed layers of one shape: times of a call, of the fastest way and of the fastest of each name."""
    rows, columns = SHAPES[name]
    weight = two_four(rows, columns)
    x = torch.randn(tokens, columns, dtype=BF16, device=DEVICE)
    y = torch.empty(tokens, rows, dtype=BF16, device=DEVICE)
    dense = copies_of(weight, weight.nbytes)
    dense_run = graph_of(lambda: [nn.functional.linear(x, each) for each in dense])
    found = []
    for values in kinds:
        whole = stored(weight, values)
        packed = copies_of(whole, bytes_of(whole))
        best: dict[str, tuple[float, Way]] = {}

        def timer(call: Callable[[], Any], packed: list[Any] = packed, best: dict[str, Any] = best) -> float:
            way: Way = call.args[0]  # type: ignore[attr-defined]
            run = graph_of(lambda: [RUNS[way.name](way, x, each, y) for each in packed])
            run()
            took = statistics.median(time_us(run) for _ in range(1 if REHEARSED else 5)) / len(packed)
            best[way.name] = min(best.get(way.name, (took, way)), (took, way), key=lambda each: each[0])
            return took

        way = fastest(x, whole, timer=timer)
        run = graph_of(lambda packed=packed, way=way: [RUNS[way.name](way, x, each, y) for each in packed])  # type: ignore[misc]
        took = in_turns({"dense": dense_run, "packed": run})
        dense_us, packed_us = took["dense"] / len(dense), took["packed"] / len(packed)
        expected = x.float() @ stored_dense(whole).t()
        RUNS[way.name](way, x, whole, y)
        found.append(
            {
                "layer": name,
                "shape": [rows, columns],
                "tokens": tokens,
                "values": values,
                "dense_us": dense_us,
                "packed_us": packed_us,
                "gain": dense_us / packed_us,
                "dense_gb_s": weight.nbytes / dense_us / 1e3,
                "packed_gb_s": bytes_of(whole) / packed_us / 1e3,
                "way": named(way),
                "ways_us": {each: us for each, (us, _) in best.items()},
                "error": float((y.float() - expected).norm() / expected.norm()),
            }
        )
        print(f"{name} {values} {tokens}: {dense_us:.2f} us dense, {packed_us:.2f} us packed ({named(way)})", flush=True)
        del packed
    return found


def named(way: Way) -> str:
    """Its name, and what is not as it is by default."""
    usual = asdict(Way(name=way.name))
    return " ".join([way.name, *(f"{name}={value}" for name, value in asdict(way).items() if value != usual[name])])


def stored_dense(weight: GpuWeight) -> Tensor:
    """The weight with its zeros, by torch alone."""
    rows, columns = weight.shape
    shifts = 2 * torch.arange(4, device=DEVICE)
    codes = ((weight.codes[..., None].int() >> shifts) & 3).long().view(rows, -1, 2)
    kept = weight.kept
    if weight.values == "int4":
        kept = torch.stack((kept & 15, kept >> 4), dim=-1).flatten(1).float() - 8
    kept = kept.float()
    if weight.scales is not None:
        kept = kept * weight.scales.float().repeat_interleave((weight.group_size or columns) // 2, 1)[:, : columns // 2]
    return kept.new_zeros(rows, columns // 4, 4).scatter_(-1, codes, kept.view(rows, -1, 2)).view(rows, columns)


class Packed(nn.Module):
    """A linear layer that keeps its weight packed."""

    def __init__(self, weight: Tensor, values: Values) -> None:
        super().__init__()
        self.weight = stored(weight, values)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [..., in] -> [..., out]."""
        values, kept, codes, scales, group_size, branch, k, bias = self.weight
        return packed_linear_gpu(x, kept, codes, scales, group_size, values, branch, k, bias)


def allocated() -> int:
    return 0 if REHEARSED else torch.cuda.memory_allocated()


@torch.no_grad()
def decoding(kinds: Iterable[Values]) -> list[dict[str, Any]]:
    """Tokens a second of one sequence, and the bytes that a model adds on the GPU: dense, then packed in each kind."""
    config = transformers.LlamaConfig(**LLAMA, max_position_embeddings=1024, attn_implementation="sdpa")
    before = allocated()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(BF16).eval().to(DEVICE)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = two_four(*module.weight.shape) * module.weight.std() * 1.4
            weights[name] = module.weight.data
    found: list[dict[str, Any]] = []
    logits: dict[str, Tensor] = {}
    for values in ("dense", *kinds):
        if values != "dense":
            for name, weight in weights.items():
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, Packed(weight.to(DEVICE), values))
                weights[name] = weight.cpu()  # only the packed form stays on the GPU
        gc.collect()
        size = allocated() - before
        took, logits[values], launched = decode(model, config)
        error = float((logits[values] - logits["dense"]).norm() / logits["dense"].norm())
        facts = {"tokens_a_second": NEW_TOKENS / took, "bytes": size, "error": error, "launched": launched}
        found.append({"values": values, **facts})
        print(f"decoding {values}: {NEW_TOKENS / took:.1f} tokens a second, {size / 1e6:.0f} MB", flush=True)
    return found


def decode(model: nn.Module, config: Any) -> tuple[float, Tensor, str]:
    """Seconds for all new tokens, each fed back; the logits of the first; and how they were launched."""
    cache = transformers.StaticCache(config=config, max_cache_len=NEW_TOKENS + 64)
    token = torch.full((1, 1), 5, device=DEVICE)
    position = torch.zeros(1, dtype=torch.long, device=DEVICE)

    def step() -> Tensor:
        out = model(token, position_ids=position[None], cache_position=position, past_key_values=cache, use_cache=True)
        token.copy_(out.logits[:, -1:].argmax(-1))
        position.add_(1)
        return out.logits  # type: ignore[no-any-return]

    first = step().float().cpu()
    try:
        run, launched = graph_of(step), "one by one" if REHEARSED else "in a CUDA graph"
    except RuntimeError as error:  # transformers may wait for the GPU in between, which no graph can hold
        run, launched = step, f"one by one ({first_line(error)})"

    def restart() -> None:
        cache.reset()
        token.fill_(5)
        position.zero_()

    times = []
    for _ in range(1 if REHEARSED else 5):
        restart()
        times.append(time_us(lambda: [run() for _ in range(NEW_TOKENS)]))
    return statistics.median(times) / 1e6, first, launched


def judge(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Say of each claim whether it holds; None where nothing was measured."""
    kernels = document["kernels"]
    one = [each["gain"] for each in kernels if each["tokens"] == 1 and each["values"] == "bf16"]
    wrong = [each for each in kernels if each["error"] > 0.02]
    speeds = {each["values"]: each["tokens_a_second"] for each in document["decoding"]}
    slower = [values for values in speeds if values != "dense" and speeds[values] <= speeds["dense"]]
    if document["rehearsed"]:  # what an interpreter takes says nothing
        one, speeds, slower = [], {}, []
    mean = statistics.geometric_mean(one) if one else 0.0
    return {
        "products are right": {
            "held": not wrong if kernels else None,
            "said": f"largest relative error {max((each['error'] for each in kernels), default=0):.2g}",
        },
        f"bf16, one token: at least {LEAST_GAIN} times cuBLAS": {
            "held": mean >= LEAST_GAIN if one else None,
            "said": f"{mean:.2f} in the geometric mean, {min(one):.2f} at least" if one else "",
        },
        "decoding is faster than dense": {
            "held": not slower if speeds else None,
            "said": ", ".join(f"{values} {speed / speeds['dense']:.2f}" for values, speed in speeds.items()),
        },
    }


def render(document: Mapping[str, Any]) -> str:
    """The page for people."""
    lines = ["# Packed 2:4 weights on a GPU", ""]
    if document["rehearsed"]:
        lines += ["**A rehearsal on a processor, in Triton's interpreter, with tiny shapes: the times mean nothing.**", ""]
    lines += [f"{document['machine']}. `{document['command']}`, commit {document['commit']}, {document['seconds']:.0f} s.", ""]
    lines += ["| claim | holds | |", "|---|---|---|"]
    said = {True: "yes", False: "**no**", None: "not measured"}
    lines += [f"| {claim} | {said[v['held']]} | {v['said']} |" for claim, v in document["verdicts"].items()]
    lines += [
        "",
        "| layer | shape | tokens | values | dense us | packed us | gain | dense GB/s | packed GB/s | way | others, us |",
    ]
    lines += ["|---" * 11 + "|"]
    for row in document["kernels"]:
        others = ", ".join(f"{name} {us:.2f}" for name, us in row["ways_us"].items())
        facts = [row["layer"], "x".join(map(str, row["shape"])), str(row["tokens"]), row["values"]]
        facts += [f"{row[name]:.2f}" for name in ("dense_us", "packed_us", "gain")]
        facts += [f"{row[name]:.0f}" for name in ("dense_gb_s", "packed_gb_s")]
        lines.append("| " + " | ".join([*facts, row["way"], others]) + " |")
    lines += [
        "",
        "Decoding, one sequence, random Llama 1B:",
        "",
        "| values | tokens a second | MB on the GPU | logits off by | launched |",
    ]
    lines += ["|---|---|---|---|---|"]
    for row in document["decoding"]:
        facts = [f"{row['tokens_a_second']:.1f}", f"{row['bytes'] / 1e6:.0f}", f"{row['error']:.2g}", row["launched"]]
        lines.append("| " + " | ".join([row["values"], *facts]) + " |")
    lines += ["", *(f"- left out: {each}" for each in document["left_out"]), ""]
    return "\n".join(lines)


def machine() -> str:
    import triton

    place = "a processor" if REHEARSED else torch.cuda.get_device_name(DEVICE)
    return f"{place}, torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}"


def main(arguments: argparse.Namespace) -> int:
    if said := gpu_refusal(DEVICE):
        raise SparsepassError(said)
    start, made_of = time.perf_counter(), commit()  # before results lie in the tree
    document: dict[str, Any] = {"kernels": [], "decoding": [], "left_out": [], "rehearsed": REHEARSED}
    parts: dict[str, tuple[str, Callable[[], list[dict[str, Any]]]]] = {}
    for name in SHAPES:
        parts[f"{name}, one token"] = ("kernels", partial(measure_shape, name, 1, KINDS))
    parts["decoding"] = ("decoding", partial(decoding, KINDS))
    for tokens in MORE_TOKENS:
        for name in SHAPES:
            parts[f"{name}, {tokens} tokens"] = ("kernels", partial(measure_shape, name, tokens, ["bf16"]))
    for name, (place, run) in parts.items():
        if time.perf_counter() - start > arguments.seconds:
            document["left_out"].append(f"{name}: no time was left")
            continue
        document[place] += run()
        document |= {
            "machine": machine(),
            "command": " ".join(["python", *sys.argv]),
            "commit": made_of,
            "seconds": time.perf_counter() - start,
            "verdicts": judge(document),
        }
        write(arguments.out, document)  # after each part: what stops the script keeps what was found
    print(render(document))
    return 0 if all(v["held"] is not False for v in document["verdicts"].values()) or REHEARSED else 1


def write(folder: Path, document: Mapping[str, Any]) -> None:
    name = "gpu_packed_rehearsal" if document["rehearsed"] else "gpu_packed"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(render(document), encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seconds", type=float, default=480, help="no further part is begun after this many")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes in Triton's interpreter, on a processor")
    asked = parser.parse_args()
    if asked.rehearse and not REHEARSED:  # triton reads the flag when it is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    try:
        sys.exit(main(asked))
    except SparsepassError as error:
        sys.exit(f"Error: {error}")
