"""Run every causal language model of transformers, tiny, through capture, hf and onnx; each in a process of its own.

    python -m tests.architectures.run                      # what has no result yet; stop and go on as you like
    python -m tests.architectures.run --only gpt2,bloom    # some of them, again
    python -m tests.architectures.run --parts capture,hf   # without ONNX, which takes the most time

It writes benchmarks/results/architectures.json after each model, and docs/architectures.md at the end. On one core it takes
about an hour.
"""

import argparse
import gc
import json
import logging
import multiprocessing
import resource
import subprocess
import tempfile
import time
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tests.architectures import documentation
from tests.architectures.check import PARTS, check
from tests.architectures.tiny import causal_language_models

import sparsepass.export
import sparsepass.passes  # noqa: F401 -- imported once here, so that each child has it

_SECONDS, _BYTES = 240, 10 << 30
_ENDED = "ended"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, with commas between them")
    parser.add_argument("--parts", default=",".join(PARTS), help="of capture,hf,onnx")
    parser.add_argument("--seconds", type=int, default=_SECONDS, help="processor time for one model")
    parser.add_argument("--results", type=Path, default=documentation.RESULTS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    models, parts = causal_language_models(), tuple(options.parts.split(","))
    wanted = options.only.split(",") if options.only else list(models)
    with tempfile.TemporaryDirectory() as folder:  # what a first export loads and keeps, the children inherit
        list(check("llama", Path(folder), {}))
    for kind in wanted:
        rows = json.loads(options.results.read_text()) if options.results.is_file() else {}
        old = rows.get(kind, {})
        if not options.only and all(part in old for part in parts if old.get("capture", {}).get("state") == "held"):
            continue
        row = _in_a_process(kind, parts, options.seconds)
        kept = {part: old[part] for part in PARTS if part in old and part not in row and row["capture"]["state"] == "held"}
        rows[kind] = {"class": models[kind]} | kept | row | _facts()
        lines = [f"{json.dumps(kind)}: {json.dumps(rows[kind])}" for kind in sorted(rows)]
        options.results.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(kind, {part: row[part]["state"] for part in PARTS if part in row}, row["seconds"], flush=True)
    if options.results == documentation.RESULTS:
        documentation.PAGE.write_text(documentation.page(), encoding="utf-8")


def _facts() -> dict[str, Any]:
    said = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True).stdout
    packages = {name: version(name) for name in ("torch", "transformers", "onnxruntime")}
    return {"commit": said.strip(), "date": datetime.now(UTC).strftime("%Y-%m-%d"), "versions": packages}


def _in_a_process(kind: str, parts: tuple[str, ...], seconds: int) -> dict[str, Any]:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_child, args=(kind, Path(folder), parts, seconds))
        process.start()
        process.join(20 * seconds)
        if process.is_alive():
            process.kill()
            process.join()
        row: dict[str, Any] = json.loads((Path(folder) / "row.json").read_text())
        for part in PARTS:
            if row.get(part, {}).get("state") == _ENDED:
                row[part]["said"] = row.pop("error", f"the process ended ({process.exitcode}) or took too long")
    return row | {"seconds": round(time.perf_counter() - started)}


def _child(kind: str, folder: Path, parts: tuple[str, ...], seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    gc.disable()
    row: dict[str, Any] = {"capture": {"state": _ENDED}}
    try:
        for _ in check(kind, folder, row, parts):
            (folder / "row.json").write_text(json.dumps(row))
    except Exception as error:  # noqa: BLE001 -- the row says what it was
        row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    (folder / "row.json").write_text(json.dumps(row))


if __name__ == "__main__":
    main()
