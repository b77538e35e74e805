"""int4 2:4 against ggml's Q4_0 at one token, and what packed_models.py needs of llama.cpp.

    python benchmarks/packed_ggml.py --llama PYTHON [--repeats 20] [--out DIR]

PYTHON is that of an environment with llama-cpp-python, built from source so that ggml uses all that this processor has:

    python -m venv ENV && CMAKE_ARGS="-DGGML_NATIVE=ON" ENV/bin/pip install llama-cpp-python

Our kernel runs here, ggml's in a process of its own; they take turns, each on two threads, and the one that waits computes
nothing. ggml's products of all copies of a weight are one graph, so that its threads are started once, as in a model; ours are
woken for each product. Weights lie as they are stored ("CPU") and in ggml's own orders ("CPU_REPACK", which llama.cpp chooses
where it can). Writes packed_ggml.json and packed_ggml.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Threads of ours that wait actively would take ggml's processors. OpenMP reads this when torch is loaded.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from common import commit, machine
from packed import LLAMA_1B, LLAMA_8B, THREADS, Way, copies_of, packed_way, sparse_weight
from safetensors import safe_open
from torch import Tensor

from sparsepass.graph.native import available_paths, processor
from sparsepass.graph.packed import pack

WORKER = Path(__file__).parent / "peers" / "llama_cpp_worker.py"
SIZES = (128, 64, 32)
"""Columns that share a scale in our int4; ggml's Q4_0 has 32."""


class Llama:
    """A process with llama.cpp.

    Args:
        python: The Python that can import llama_cpp.
    """

    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen(
            [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, do: str, **rest: Any) -> dict[str, Any]:
        """Send a request, and wait for the answer.

        Raises:
            RuntimeError: If it could not be done.
        """
        into, out = self._process.stdin, self._process.stdout
        assert into is not None
        assert out is not None
        print(json.dumps({"do": do, **rest}), file=into, flush=True)
        line = out.readline()
        found: dict[str, Any] = json.loads(line) if line else {"error": f"it ended with {self._process.wait()}"}
        if "error" in found:
            raise RuntimeError(f"llama.cpp: {do}: {found['error']}")
        return found

    def close(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def can_import_llama(python: str) -> bool:
    """Whether that Python has llama-cpp-python."""
    try:
        done = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


def write_gguf(folder: Path, file: Path) -> None:
    """Write a plain folder of a Llama as GGUF: all matrices in Q4_0, embedding and output head too, and no vocabulary."""
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    beside = file.with_suffix(".partial")
    writer = gguf.GGUFWriter(beside, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    kind = gguf.GGMLQuantizationType.Q4_0
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118  (it is no dictionary)
            tensor, new = stored.get_tensor(name).float(), names.get_name(name, try_suffixes=(".weight",))
            for part, number in (("q_proj", heads), ("k_proj", key_heads)):
                tensor = _in_pairs(tensor, number) if f".{part}." in name else tensor
            if tensor.dim() == 2:
                writer.add_tensor(new, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
            else:
                writer.add_tensor(new, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    beside.replace(file)


def _rope_theta(config: dict[str, Any]) -> float:
    return float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])


def _in_pairs(weight_OI: Tensor, heads: int) -> Tensor:
    """llama.cpp turns neighbours by the rotary angle, transformers the two halves of a head."""
    return weight_OI.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def row_of(rows: int, columns: int, llama: Llama, buffers: list[str], repeats: int) -> dict[str, Any]:
    """One shape: each way takes its turn with all copies of the weight."""
    copies, x = copies_of(rows, columns), torch.randn(1, columns).to(torch.bfloat16)
    weight, path = sparse_weight(rows, columns), available_paths("int4")[0]
    ways: list[Way] = []
    for size in SIZES:
        packed = pack(weight, values="int4", group_size=size)
        ways.append(packed_way(packed, path, x, copies, f"int4 2:4, {size}, {path}"))
    theirs: dict[str, list[float]] = {}
    num_bytes = 0
    for buffer in buffers:
        try:
            llama.ask("products", rows=rows, columns=columns, copies=copies, threads=THREADS, buffer=buffer)
        except RuntimeError as error:
            print(f"{rows} x {columns}: {error}", flush=True)
            continue
        theirs[buffer] = []
    for repeat in range(-1, repeats):
        for way in ways:
            begin = time.perf_counter()
            for run in way.runs:
                run()
            if repeat >= 0:
                way.seconds.append((time.perf_counter() - begin) / copies)
        for buffer, seconds in theirs.items():
            said = llama.ask("product", buffer=buffer)
            num_bytes = said["num_bytes"]
            if repeat >= 0:
                seconds.append(said["seconds"])
    found = {way.name: {"ms": way.median * 1e3, "gb_s": way.speed, "num_bytes": way.num_bytes} for way in ways}
    for buffer, seconds in theirs.items():
        median = statistics.median(seconds)
        found[f"Q4_0, {buffer}"] = {"ms": median * 1e3, "gb_s": num_bytes / median / 1e9, "num_bytes": num_bytes}
    ours = min(way.median for way in ways) * 1e3
    rival = min((way["ms"] for name, way in found.items() if name.startswith("Q4_0")), default=float("nan"))
    return {"title": f"{rows} x {columns}", "ways": found, "ratio": rival / ours}


def page(report: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = report["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["ways"]))
    lines = [
        "# int4 2:4 against ggml's Q4_0, one token",
        "",
        f"Medians of {report['repeats']}, all ways of a row taking turns, {THREADS} threads, weights rotated. Ratio: time of "
        "the fastest Q4_0 by time of our fastest one. Q4_0 is dense, with a scale in 32 columns; ours is 2:4, with a scale in "
        "as many columns as its name says. The weights are not the same: this is about speed.",
        f"Machine: {report['processor']}; {report['machine']}. llama-cpp-python in a process of its own. "
        f"Commit {report['commit']}, {report['date']}.",
        "",
        "| | " + " | ".join(names) + " | ratio |",
        "|---" + "|---:" * (len(names) + 1) + "|",
    ]
    for row in rows:
        ways = [row["ways"].get(name) for name in names]
        cells = ["" if way is None else f"{way['ms']:.3f} ms, {way['gb_s']:.1f} GB/s" for way in ways]
        lines.append("| " + " | ".join([row["title"], *cells, f"**{row['ratio']:.2f}**"]) + " |")
    mean = statistics.geometric_mean([row["ratio"] for row in rows])
    return "\n".join([*lines, "", f"Geometric mean of the ratios **{mean:.2f}**.", ""])


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", required=True, metavar="PYTHON", help="the Python of an environment with llama-cpp-python")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--shapes", nargs="+", help="such as 2048x2048; by default those of Llama-1B and Llama-8B")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if not can_import_llama(args.llama):
        raise SystemExit(f"{args.llama} cannot import llama_cpp; see the head of this file")
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes] if args.shapes else [*LLAMA_1B, *LLAMA_8B]
    rows = []
    for out, into in shapes:
        llama = Llama(args.llama)  # its weights go with it
        rows.append(row_of(out, into, llama, llama.ask("buffers")["names"], args.repeats))
        llama.close()
        print(rows[-1]["title"], f"{rows[-1]['ratio']:.2f}", rows[-1]["ways"], flush=True)
    report = {
        "processor": processor(),
        "machine": machine("cpu"),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "repeats": args.repeats,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "packed_ggml.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "packed_ggml.md").write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
