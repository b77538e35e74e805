"""Packed 2:4 weights against dense ones on this processor: one token, 16 tokens, prefill, masks.

    python benchmarks/packed.py [--only PART ...] [--repeats 30] [--out DIR]

All ways of a row take turns in one process, on two threads, with weights rotated so that none stays in the cache; times are
medians. Own dense kernels stand beside torch's, because torch's are far from what memory gives: a weak yardstick proves
nothing. "read" is a sum over as many bytes as the dense weight has. Needs a C++ compiler for the yardsticks. Writes packed.json
and packed.md.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from common import commit, machine
from torch import Tensor
from torch.nn import functional

from sparsepass.graph.native import KINDS, available_paths, kernels, openmp, processor
from sparsepass.graph.packed import Form, LaidOut, PackedWeight, lay_out, pack, product
from sparsepass.graph.packed.laid_out import TYPES
from sparsepass.passes.maths import NMPattern, keep_largest_of_groups, nm_mask
from sparsepass.passes.maths.pattern import _largest_by_words

THREADS = 2
ROTATED_BYTES = 300e6
"""All copies of a weight together: many times the last cache of a desktop processor."""
LEAST_SECONDS = 0.01
"""What takes microseconds is repeated hundreds of times: whoever else uses the machine takes some of them away."""
LLAMA_1B = [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)]
LLAMA_8B = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
LARGE_8B = [(4096, 4096), (14336, 4096), (4096, 14336)]
PATHS = {"avx2": 1, "avx512": 2}
TWO_FOUR = NMPattern(2, 4)


@dataclass
class Way:
    """One way to do the same.

    Attributes:
        name: What it is called in the table.
        runs: One function for each copy of the weight.
        num_bytes: Bytes of one copy.
        seconds: What each repeat took.
    """

    name: str
    runs: list[Callable[[], object]]
    num_bytes: int
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def speed(self) -> float:
        """GB/s."""
        return self.num_bytes / self.median / 1e9


def take_turns(ways: list[Way], repeats: int) -> list[Way]:
    """Time all ways, one after the other in each repeat; at least so often that each takes `LEAST_SECONDS`."""
    repeat, spent = -2, 0.0
    while repeat < repeats or spent < LEAST_SECONDS:
        least = float("inf")
        for way in ways:
            run = way.runs[repeat % len(way.runs)]
            begin = time.perf_counter()
            run()
            seconds = time.perf_counter() - begin
            least = min(least, seconds)
            if repeat >= 0:
                way.seconds.append(seconds)
        spent += least if repeat >= 0 else 0
        repeat += 1
    return ways


def yardsticks() -> ctypes.CDLL:
    """Compile and load the yardsticks of benchmarks/native."""
    source = Path(__file__).parent / "native" / "dense.cpp"
    target = Path(tempfile.mkdtemp()) / "yardsticks.so"
    flags = ["-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-w"]
    subprocess.run(["c++", *flags, str(source), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.yardstick_int4_bytes.restype = c_int64
    library.yardstick_linear.argtypes = [c_int, c_int, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int]
    library.yardstick_use_openmp(openmp())
    return library


def copies_of(rows: int, columns: int) -> int:
    """How many copies of a weight are rotated; as many for packed ones as for dense ones."""
    return max(3, int(ROTATED_BYTES / (rows * columns * 2)))


def roomy(data: Tensor) -> Tensor:
    """A copy in huge pages, as a packed layer's buffer lies."""
    page = 2 << 20
    library = kernels()
    assert library is not None
    room = torch.empty(data.nbytes + page, dtype=torch.uint8)
    start = -room.data_ptr() % page
    found = room[start : start + data.nbytes]
    library.huge_pages(room.data_ptr(), room.nbytes)
    return found.copy_(data.contiguous().view(torch.uint8).flatten()).view(data.dtype).view(data.shape)


def sparse_weight(rows: int, columns: int) -> Tensor:
    """A random 2:4 weight, bf16."""
    weight_OI = torch.randn(rows, columns)
    return (weight_OI * keep_largest_of_groups(weight_OI.abs(), TWO_FOUR)).to(torch.bfloat16)


def packed_way(packed: PackedWeight, path: str, x: Tensor, copies: int, name: str) -> Way:
    """The kernel of a path."""
    rows, columns = packed.shape
    form = Form(values=packed.values, path=path, rows=rows, columns=columns, group_size=packed.group_size)
    data = lay_out(packed, path)
    weights = [LaidOut(form, roomy(data), scales=packed.scales) for _ in range(copies)]
    return Way(name, runs_of(weights, x), data.nbytes + (0 if packed.scales is None else packed.scales.nbytes))


def runs_of(weights: list[LaidOut], x: Tensor) -> list[Callable[[], object]]:
    """The product with each weight: the kernel is called as directly as a yardstick where it takes all tokens."""
    y = torch.empty(*x.shape[:-1], weights[0].form.rows, dtype=x.dtype)
    tokens, columns, library = y.numel() // y.shape[-1], x.shape[-1], kernels()
    assert library is not None
    if tokens > weights[0].most_tokens:
        return [lambda w=w: product(w, x) for w in weights]

    def run(weight: LaidOut) -> None:
        library.linear(weight.pointer, TYPES[x.dtype], x.data_ptr(), columns, tokens, y.data_ptr(), THREADS)

    run(weights[0])
    assert torch.equal(y, product(weights[0], x))
    return [lambda w=w: run(w) for w in weights]


def own_dense_way(weight: Tensor, path: str, x: Tensor, copies: int) -> Way:
    """The library's dense kernel of a path, for bf16, or for int8 with a scale a row; the weight lies as torch has it."""
    rows, columns = weight.shape
    is_int8 = weight.dtype == torch.int8
    form = Form(values="int8" if is_int8 else "bf16", path=path, rows=rows, columns=columns, dense=True)
    scales = torch.ones(rows, 1, dtype=torch.bfloat16) if is_int8 else None
    weights = [LaidOut(form, roomy(weight), scales=scales) for _ in range(copies)]
    return Way(f"own dense, {path}", runs_of(weights, x), weight.nbytes)


def yardstick_way(library: ctypes.CDLL, path: str, weight: Tensor, x: Tensor, copies: int) -> Way:
    """The same kernel with the weight laid out for it, as a packed one is; int4 has a scale in 32 columns."""
    rows, columns = weight.shape
    kind = {torch.bfloat16: "bf16", torch.int8: "int8", torch.uint8: "int4"}[weight.dtype]
    sizes, expected = (c_int64(rows), c_int64(columns)), weight.float()
    if kind == "int4":
        numbers, scales = (weight.to(torch.int16) - 8).to(torch.int8), torch.rand(rows, columns // 32).half()
        expected = numbers.float() * scales.float().repeat_interleave(32, dim=1)
        data = torch.empty(library.yardstick_int4_bytes(c_int(PATHS[path]), *sizes), dtype=torch.uint8)
        pointers = [c_void_p(t.data_ptr()) for t in (numbers, scales)]
        library.yardstick_int4_lay_out(c_int(PATHS[path]), *pointers, *sizes, c_void_p(data.data_ptr()))
    else:
        data, scales = torch.empty(weight.nbytes, dtype=torch.uint8), torch.ones(rows, dtype=torch.bfloat16)
        places = c_void_p(weight.data_ptr()), *sizes, c_void_p(data.data_ptr())
        library.yardstick_lay_out(c_int64(weight.element_size()), *places)
    weights = [roomy(data) for _ in range(copies)]
    y = torch.empty(1, rows, dtype=torch.bfloat16)

    def run(weight: Tensor) -> None:
        places = weight.data_ptr(), scales.data_ptr(), rows, columns, x.data_ptr(), y.data_ptr()
        library.yardstick_linear(PATHS[path], KINDS[kind], *places, THREADS)

    run(weights[0])
    expected = x.float() @ expected.T
    assert (y - expected).norm() < 0.02 * expected.norm(), f"the yardstick {kind}, {path} is wrong"
    return Way(f"dense {kind} laid out, {path}", [lambda w=w: run(w) for w in weights], data.nbytes)


def torch_bf16_way(weight: Tensor, x: Tensor, copies: int) -> Way:
    """torch's linear."""
    weights = [roomy(weight) for _ in range(copies)]
    return Way("torch dense", [lambda w=w: functional.linear(x, w) for w in weights], weight.nbytes)


def torch_int8_way(rows: int, columns: int, x: Tensor, copies: int) -> Way:
    """torch's product with int8 weights and a scale a row."""
    weights = [torch.randint(-127, 128, (rows, columns), dtype=torch.int8) for _ in range(copies)]
    scales = torch.ones(rows, dtype=torch.bfloat16)
    return Way("torch dense int8", [lambda w=w: torch._weight_int8pack_mm(x, w, scales) for w in weights], rows * columns)


def read_way(num_bytes: int, copies: int) -> Way:
    """Reads bytes, and does little else."""
    buffers, library = [roomy(torch.ones(num_bytes, dtype=torch.uint8)) for _ in range(copies)], kernels()
    assert library is not None
    return Way("read", [lambda b=b: library.read(b.data_ptr(), num_bytes, THREADS) for b in buffers], num_bytes)


def row_of(title: str, ours: list[Way], others: list[Way], read: Way | None = None) -> dict[str, Any]:
    """What a table has of one shape: our fastest way against their fastest one."""
    best, rival = min(ours, key=lambda way: way.median), min(others, key=lambda way: way.median)
    return {
        "title": title,
        "ours": best.name,
        "rival": rival.name,
        "ratio": rival.median / best.median,
        "read_gb_s": None if read is None else read.speed,
        "ways": {
            way.name: {"ms": way.median * 1e3, "gb_s": way.speed, "num_bytes": way.num_bytes}
            for way in (*ours, *others, *([] if read is None else [read]))
        },
    }


def at_one_token(paths: list[str], repeats: int, library: ctypes.CDLL, name: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """bf16, int8 and int4 at one token, on the Llama shapes."""
    for kind in ("bf16", "int8", "int4"):
        rows: list[dict[str, Any]] = []
        for number, (out, into) in enumerate([*LLAMA_1B, *LLAMA_8B]):
            copies, x = copies_of(out, into), torch.randn(1, into).to(torch.bfloat16)
            weight = sparse_weight(out, into)
            ours: list[Way] = []
            others: list[Way] = []
            sizes = (0,) if kind == "bf16" else (0, 64) if kind == "int8" else (128, 64, 32)
            for size in sizes:
                packed = pack(weight, values=kind, group_size=size)  # type: ignore[arg-type]
                said = {0: "" if kind == "bf16" else ", row"}.get(size, f", {size}")
                ours += [packed_way(packed, path, x, copies, f"packed{said}, {path}") for path in paths]
            if kind == "bf16":
                dense, others = weight, [torch_bf16_way(weight, x, copies)]
            elif kind == "int8":
                dense = torch.randint(-127, 128, (out, into), dtype=torch.int8)
                others = [torch_int8_way(out, into, x, copies)]
            else:
                dense, others = torch.randint(0, 16, (out, into), dtype=torch.uint8), []
            if kind != "int4":
                others += [own_dense_way(dense, path, x, copies) for path in paths]
            others += [yardstick_way(library, path, dense, x, copies) for path in paths]
            read = read_way(others[-1].num_bytes, copies)
            take_turns([*ours, *others, read], repeats)
            of = "1B" if number < len(LLAMA_1B) else "8B"
            rows.append(row_of(f"{of}, {out} x {into}", ours, others, read))
            print(name, kind, said_of(rows[-1]), flush=True)
        yield f"{kind}, one token, {name}", rows


def more_tokens(
    repeats: int, *, tokens: tuple[int, ...], kinds: tuple[str, ...] = ("bf16",)
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """More tokens, by the way that a layer takes, against torch's dense product of bf16."""
    for number, kind in ((number, kind) for number in tokens for kind in kinds):
        rows = []
        for out, into in ((2048, 2048), (8192, 2048), (2048, 8192), (4096, 4096), (14336, 4096)):
            copies, x = copies_of(out, into), torch.randn(number, into).to(torch.bfloat16)
            weight = sparse_weight(out, into)
            packed = pack(weight, values=kind, group_size=0 if kind == "bf16" else 64)  # type: ignore[arg-type]
            ours = [packed_way(packed, available_paths(kind)[0], x, copies, "packed")]
            others = [torch_bf16_way(weight, x, copies)]
            take_turns([*ours, *others], repeats)
            rows.append(row_of(f"{out} x {into}", ours, others))
            print(kind, number, "tokens", said_of(rows[-1]), flush=True)
        yield f"{kind}, {number} tokens", rows


def masks(repeats: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The 2:4 mask of scores: the library's, torch's comparisons of before, and topk."""
    rows = []
    for kind, dtype in (("magnitude", torch.float32), ("magnitude", torch.bfloat16), ("Wanda", torch.float32)):
        weight_OI = torch.randn(4096, 4096).to(dtype)
        norms_I = torch.rand(4096)
        score_OI = weight_OI.abs() if kind == "magnitude" else weight_OI.abs() * norms_I
        num_bytes = score_OI.nbytes
        assert torch.equal(nm_mask(score_OI, TWO_FOUR), by_torch(score_OI, TWO_FOUR)), "the masks differ"
        ours = [Way("library", [lambda s=score_OI: keep_largest_of_groups(s, TWO_FOUR)], num_bytes)]
        others = [
            Way("torch, comparing", [lambda s=score_OI: by_torch(s, TWO_FOUR)], num_bytes),
            Way("torch, topk", [lambda s=score_OI: by_topk(s)], num_bytes),
        ]
        take_turns([*ours, *others], repeats)
        rows.append(row_of(f"{kind}, {str(dtype).removeprefix('torch.')}, 4096 x 4096", ours, others))
        print("masks", said_of(rows[-1]), flush=True)
    yield "2:4 masks", rows


def by_torch(score_OI: Tensor, pattern: NMPattern) -> Tensor:
    """What the library does where it is not compiled."""
    return _largest_by_words(score_OI.flatten(), pattern).view(score_OI.shape)


def by_topk(score_OI: Tensor) -> Tensor:
    """The two largest scores of each four, ties in any order."""
    groups_OG4 = score_OI.unflatten(-1, (-1, 4))
    mask_OG4 = torch.zeros_like(groups_OG4, dtype=torch.bool)
    return mask_OG4.scatter_(-1, groups_OG4.topk(2, dim=-1).indices, True).flatten(-2)


def said_of(row: dict[str, Any]) -> str:
    """A row in one line."""
    ways = ", ".join(f"{name} {way['ms']:.3f} ms ({way['gb_s']:.1f} GB/s)" for name, way in row["ways"].items())
    return f"{row['title']}: {row['ratio']:.2f} ({ways})"


def page(report: dict[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [
        "# Packed 2:4 weights on a processor",
        "",
        f"Medians of {report['repeats']} runs or more (hundreds of short ones), all ways of a row taking turns, {THREADS} "
        f"threads, weights rotated (at least {ROTATED_BYTES / 1e6:.0f} MB of dense weights). Ratio: time of the fastest "
        "other way by time of our fastest one.",
        f"Machine: {report['processor']}; {report['machine']}. Commit {report['commit']}, {report['date']}.",
        "",
    ]
    for title, rows in report["parts"].items():
        mean = statistics.geometric_mean([row["ratio"] for row in rows])
        lines += [
            f"## {title}",
            "",
            f"Geometric mean of the ratios **{mean:.2f}**, smallest {min(r['ratio'] for r in rows):.2f}.",
            "",
        ]
        names = list(rows[0]["ways"])
        lines += ["| | " + " | ".join(names) + " | ratio |", "|---" + "|---:" * (len(names) + 1) + "|"]
        for row in rows:
            cells = [f"{row['ways'][name]['ms']:.3f} ms, {row['ways'][name]['gb_s']:.1f} GB/s" for name in names]
            lines.append("| " + " | ".join([row["title"], *cells, f"**{row['ratio']:.2f}**"]) + " |")
        shares = [
            max(w["gb_s"] for n, w in row["ways"].items() if n.startswith(("own dense", "dense "))) / row["read_gb_s"]
            for row in rows
            if row["read_gb_s"]
        ]
        if shares:
            said = f"{min(shares):.0%} to {max(shares):.0%}"
            lines += ["", f"The fastest own dense kernel reads {said} of what merely reading does."]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("token", "avx2", "few", "prefill", "masks")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    if kernels() is None:
        raise SystemExit("the kernels are not compiled: install sparsepass with a C++ compiler")
    library = yardsticks()
    native = [path for path in available_paths("bf16") if path in PATHS and path in available_paths("int4")]
    made = {
        "token": lambda: at_one_token(native, args.repeats, library, "all kernels"),
        "avx2": lambda: at_one_token(["avx2"], args.repeats, library, "AVX2 alone"),
        "few": lambda: more_tokens(args.repeats, tokens=(4, 16)),
        "prefill": lambda: more_tokens(max(20, args.repeats // 2), tokens=(512,), kinds=("bf16", "int8", "int4")),
        "masks": lambda: masks(args.repeats),
    }
    report: dict[str, Any] = {
        "processor": processor(),
        "machine": machine("cpu"),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "repeats": args.repeats,
        "parts": {title: rows for name in args.only for title, rows in made[name]()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "packed.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "packed.md").write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
