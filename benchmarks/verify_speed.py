"""How fast is `sparsepass verify`, by the time of merely reading the file, and by polygraphy's time?

    python benchmarks/verify_speed.py [--parameters 5e8] [--layers 24] [--only ROW ...] [--polygraphy-layers N] [--out DIR]

Writes files of that many parameters (2:4, random places) into a temporary folder, times them one by one, and deletes
each before the next. Every time is wall-clock in seconds, with a process of its own for each command, so imports are in
it. "read" reads the same files from end to end into one buffer. "cold" is after the files' pages were dropped from memory
(posix_fadvise), "warm" is right after. Writes verify_speed.json and verify_speed.md.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from common import POLYGRAPHY, commit
from onnx import TensorProto, helper
from safetensors.torch import save_file

READ = """
import sys
buffer = bytearray(1 << 23)
for name in sys.argv[1:]:
    with open(name, "rb", 0) as file:
        while file.readinto(buffer):
            pass
"""
CHECK = """
import sys, time
from sparsepass.export.pattern.check import check_pattern
begin = time.perf_counter()
report = check_pattern(sys.argv[1])
print(time.perf_counter() - begin)
sys.exit(report.exit_code)
"""
START = "import sparsepass.export.pattern.check"
VERIFY = "from sparsepass.export.cli.app import main; main()"
KINDS = {
    "ONNX float32": (np.float32, TensorProto.FLOAT),
    "ONNX float16": (np.float16, TensorProto.FLOAT16),
    "ONNX bfloat16": (ml_dtypes.bfloat16, TensorProto.BFLOAT16),
}


def sparse_matrix(num_in: int, num_out: int, axis: int, seed: int) -> Any:
    """A float32 matrix [in, out], 2:4 along `axis`."""
    rng = np.random.default_rng(seed)
    values = rng.random((num_in, num_out), np.float32) + np.float32(0.5)
    first = rng.integers(0, 6, (num_in // 4, num_out) if axis == 0 else (num_in, num_out // 4))
    pairs = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]], np.float32)[first]
    mask = pairs.transpose(0, 2, 1) if axis == 0 else pairs
    return values * mask.reshape(num_in, num_out)


def write_onnx(folder: Path, kind: str, width: int, num_layers: int) -> list[Path]:
    """A chain of MatMuls and of Gemms with transB, in turn, with one data file beside it."""
    dtype, proto_type = KINDS[kind]
    nodes, tensors, current = [], [], "x"
    with open(folder / "model.data", "wb") as data:
        for i in range(num_layers):
            flipped = i % 2
            matrix = sparse_matrix(width, width, flipped, i).astype(dtype)
            tensor = onnx.TensorProto(name=f"layers.{i}.weight", data_type=proto_type, dims=[width, width])
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": "model.data", "offset": str(data.tell()), "length": str(matrix.nbytes)}
            tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in place.items())
            tensors.append(tensor)
            data.write(matrix.tobytes())
            nodes.append(
                helper.make_node("Gemm", [current, tensor.name], [f"y{i}"], transB=1)
                if flipped
                else helper.make_node("MatMul", [current, tensor.name], [f"y{i}"])
            )
            current = f"y{i}"
    info = [helper.make_tensor_value_info(name, proto_type, ["t", width]) for name in ("x", current)]
    graph = helper.make_graph(nodes, "chain", info[:1], info[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return [folder / "model.onnx", folder / "model.data"]


def write_safetensors(folder: Path, kind: str, width: int, num_layers: int) -> list[Path]:
    dtype = torch.bfloat16 if kind.endswith("bfloat16") else torch.float32
    tensors = {
        f"layers.{i}.proj.weight": torch.from_numpy(sparse_matrix(width, width, 1, i)).to(dtype) for i in range(num_layers)
    }
    save_file(tensors, folder / "model.safetensors")
    return [folder / "model.safetensors"]


def drop(paths: list[Path]) -> None:
    """Drop the files' pages from memory, so that they are read from the disk again."""
    for path in paths:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(code: str, *arguments: object) -> tuple[float, str]:
    """Seconds that a Python program takes, and what it printed."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments} failed: {done.stdout}{done.stderr}")
    return time.perf_counter() - begin, done.stdout + done.stderr


def measure(paths: list[Path]) -> dict[str, Any]:
    source = paths[0]
    row: dict[str, Any] = {"bytes": sum(path.stat().st_size for path in paths)}
    for state in ("cold", "warm"):
        for name, run in (
            ("read", lambda: timed(READ, *paths)[0]),
            ("check", lambda: float(timed(CHECK, source)[1].split()[-1])),
            ("verify", lambda: timed(VERIFY, "verify", source)[0]),
        ):
            times = []
            for _ in range(1 if state == "cold" else 3):
                if state == "cold":
                    drop(paths)
                times.append(run())
            row[f"{name}_{state}_s"] = round(min(times), 3)
    row["start_s"] = round(min(timed(START)[0] for _ in range(3)), 3)
    return row


def measure_polygraphy(source: Path, num_layers: int) -> dict[str, Any]:
    """Polygraphy's time; of a file with fewer matrices where the whole takes too long."""
    idle, _ = timed(POLYGRAPHY, "--version")
    seconds, said = timed(POLYGRAPHY, "inspect", "sparsity", source)
    found = said.count("Found sparse tensor")
    if found != num_layers:
        raise SystemExit(f"polygraphy found {found} sparse tensors of {num_layers}:\n{said}")
    return {"polygraphy_s": round(seconds, 3), "polygraphy_start_s": round(idle, 3), "polygraphy_layers": num_layers}


def table(document: dict[str, Any]) -> str:
    size = document["num_parameters"] / 1e9
    lines = [
        "# Speed of `sparsepass verify`",
        "",
        f"{document['machine']}; commit {document['commit']}; {document['date']}. {size:.2f} billion parameters "
        f"in {document['num_layers']} matrices, 2:4. Seconds of wall-clock time; warm: best of three.",
        "",
        "| file | GB | read cold | check cold | read warm | check warm | `verify` warm | polygraphy | times `verify` |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in document["rows"].items():
        other = ratio = ""
        if "polygraphy_s" in row:
            start, layers = row["polygraphy_start_s"], row["polygraphy_layers"]
            # It goes through the tensors one by one, so its time for all of them follows from that for some.
            total = start + (row["polygraphy_s"] - start) * document["num_layers"] / layers
            other = f"{total:.0f}" + ("" if layers == document["num_layers"] else f" (from {layers} matrices)")
            ratio = f"{total / row['verify_warm_s']:.0f}"
        cells = [row[f"{what}_{state}_s"] for state in ("cold", "warm") for what in ("read", "check")]
        shown = " | ".join(f"{cell:.2f}" for cell in (*cells, row["verify_warm_s"]))
        lines.append(f"| {name} | {row['bytes'] / 1e9:.2f} | {shown} | {other} | {ratio} |")
    start = min(row["start_s"] for row in document["rows"].values())
    lines += [
        "",
        f"read: the file from end to end into a buffer. check: `check_pattern` alone. `verify`: the whole command, of which "
        f"about {start:.1f} s are the start of Python and imports (torch, onnx).",
        "",
        "Made by `python benchmarks/verify_speed.py`; raw figures in verify_speed.json.",
        "",
    ]
    return "\n".join(lines)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=5e8)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--only", nargs="*", help="rows such as 'ONNX float32', added to a run of the same commit")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--scratch", type=Path, help="where to write the files; by default the system's temporary folder")
    parser.add_argument("--polygraphy-layers", type=int, help="matrices in the file that polygraphy gets; by default all")
    args = parser.parse_args()
    width = round((args.parameters / args.layers) ** 0.5 / 64) * 64
    writers: dict[str, Callable[[Path, str, int, int], list[Path]]] = {
        **dict.fromkeys(KINDS, write_onnx),
        "safetensors float32": write_safetensors,
        "safetensors bfloat16": write_safetensors,
    }
    document: dict[str, Any] = {
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnx": onnx.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "num_parameters": width * width * args.layers,
        "num_layers": args.layers,
        "rows": {},
    }
    for name, write in writers.items():
        if args.only and name not in args.only:
            continue
        folder = Path(tempfile.mkdtemp(dir=args.scratch))
        try:
            paths = write(folder, name, width, args.layers)
            row = measure(paths)
            # The one that polygraphy reads right is the one to compare with; bf16 and safetensors it cannot read.
            num_layers = args.layers if args.polygraphy_layers is None else args.polygraphy_layers
            if name == "ONNX float32" and num_layers:
                some = paths[0] if num_layers == args.layers else write(folder, name, width, num_layers)[0]
                row |= measure_polygraphy(some, num_layers)
        finally:
            shutil.rmtree(folder)
        document["rows"][name] = row
        print(name, row, flush=True)
    if args.only and (args.out / "verify_speed.json").exists():
        before = json.loads((args.out / "verify_speed.json").read_text())
        if {k: v for k, v in before.items() if k != "rows"} == {k: v for k, v in document.items() if k != "rows"}:
            document["rows"] = before["rows"] | document["rows"]
    (args.out / "verify_speed.json").write_text(json.dumps(document, indent=1) + "\n")
    (args.out / "verify_speed.md").write_text(table(document))


if __name__ == "__main__":
    main()
