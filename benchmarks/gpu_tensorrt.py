"""One route of the proof on a GPU; `gpu_tensorrt.sh` sets up the environments and runs all of them.

    python benchmarks/gpu_tensorrt.py engines --runtime tensorrt --out OUT/tensorrt
    python benchmarks/gpu_tensorrt.py sessions --folder OUT/tensorrt --out OUT/onnxruntime.json
    python benchmarks/gpu_tensorrt.py summary --out OUT

`engines` exports SmolLM2-135M (or --model) and verifies it: engine, evidence, equivalence and times stand in its report.
`sessions` opens the same graphs in onnxruntime's TensorRT provider, with and without its sparsity option, compares the
outputs with the program's samples, and times both (not with bfloat16). `summary` prints what all routes found.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from sparsepass.export.cli import smollm2
from sparsepass.export.report import read_report
from sparsepass.export.stages import SAMPLES_FILE, export, listen
from sparsepass.export.targets.tensorrt import PROVIDER, TensorRT, open_tensorrt_session, read_configuration
from sparsepass.graph.equivalence import OnnxFile, default_rtol, difference, output_name

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def engines(arguments: argparse.Namespace) -> bool:
    target = TensorRT(runtime=arguments.runtime, dtype=arguments.dtype)
    with listen(print):
        result = export(arguments.model or smollm2(), target, arguments.out, passes="nm_sparsify", force=True)
    for check in result.report["verification"]["checks"]:
        print(f"{check['name']}: {check['held']}: {check['summary']}")
    return result.held is not False


def sessions(arguments: argparse.Namespace) -> bool:
    if arguments.dtype == "bfloat16":
        document: dict[str, Any] = {"not_run": "numpy, which feeds onnxruntime here, has no bfloat16; take float16"}
        Path(arguments.out).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(document["not_run"])
        return True
    folder = Path(arguments.folder)
    name = next(name for name in ("prefill", "model") if (folder / f"{name}.engine").is_file())
    samples = safetensors.torch.load_file(folder / SAMPLES_FILE)
    given = {key.removeprefix("inputs/"): t for key, t in samples.items() if key.startswith("inputs/")}
    expected = {key.removeprefix("outputs/"): t for key, t in samples.items() if key.startswith("outputs/")}
    graph, _ = read_configuration(folder, name)
    feeds = {key: t.numpy() for key, t in OnnxFile(graph).feeds(given).items()}
    sparse = open_tensorrt_session(folder, name)
    outputs = [output_name(value.name) for value in sparse.get_outputs()]
    got = {key: torch.from_numpy(value) for key, value in zip(outputs, sparse.run(None, feeds), strict=True)}
    common = [key for key in expected if key in got]
    found = difference({key: expected[key] for key in common}, {key: got[key] for key in common})
    dense = _dense_session(folder, name)
    document = {
        "engine": name,
        "compared": common,
        "relative_error": found.relative_error,
        "allowed": default_rtol(_DTYPES[arguments.dtype]),
        "sparse_ms": _time_ms(sparse, feeds),
        "dense_ms": _time_ms(dense, feeds),
        "shapes": {key: list(array.shape) for key, array in feeds.items()},
    }
    Path(arguments.out).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))
    return bool(common) and document["relative_error"] <= document["allowed"]


def _dense_session(folder: Path, name: str) -> Any:
    import onnxruntime

    graph, providers = read_configuration(folder, name)
    dense = {"trt_sparsity_enable": "False", "trt_engine_cache_path": str(folder / "onnxruntime-cache" / f"{name}-dense")}
    changed = [(each, options | dense if each == PROVIDER else options) for each, options in providers]
    return onnxruntime.InferenceSession(str(graph), providers=changed)


def _time_ms(session: Any, feeds: dict[str, Any], repeats: int = 50) -> float:
    """Median of whole calls, transfers included: that is what a user of the provider gets."""
    for _ in range(10):
        session.run(None, feeds)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        session.run(None, feeds)
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)


def summary(arguments: argparse.Namespace) -> bool:
    out = Path(arguments.out)
    print(f"# TensorRT on a GPU\n\n```\n{(out / 'gpu.txt').read_text().strip()}\n```")
    for route in ("tensorrt", "torch-tensorrt"):
        if not (out / route / "report.json").is_file():
            print(f"\n## {route}\n\nFailed; see {route}.log.")
            continue
        report = read_report(out / route)
        section = report["sparsity"]
        print(f"\n## {route} {section['runtime_version']}\n")
        for check in report["verification"]["checks"]:
            print(f"- {check['name']}: {check['held']}: {check['summary']}")
        print(f"- states: {json.dumps(section['counts']['total'])}")
        for engine in section["engines"]:
            print(
                f"- {engine['name']}: {engine['num_eligible']} layers eligible, {engine['num_chosen']} run sparse, by the log"
            )
        for name, measured in (section["measured"] or {}).items():
            print(f"- {name}: {measured['break_even']}")
    sessions_file = out / "onnxruntime.json"
    print("\n## onnxruntime\n")
    print(f"```\n{sessions_file.read_text()}```" if sessions_file.is_file() else "Failed; see onnxruntime.log.")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("engines", "sessions", "summary"))
    parser.add_argument("--out", required=True)
    parser.add_argument("--runtime")
    parser.add_argument("--folder")
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float16", choices=sorted(_DTYPES))
    arguments = parser.parse_args()
    held = {"engines": engines, "sessions": sessions, "summary": summary}[arguments.what](arguments)
    raise SystemExit(0 if held else 1)


if __name__ == "__main__":
    main()
