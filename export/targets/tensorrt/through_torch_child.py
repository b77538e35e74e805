"""The process that calls torch-tensorrt: it builds one engine from one exported program.

It is run by path and imports torch and torch-tensorrt only. An exception ends it, and the log that is its output tells which:
torch-tensorrt raises plain exceptions, at import too. `build.py` is the other side.
"""

import importlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch


def main(request_file: str, answer_file: str) -> None:
    """Build what the request asks for; the answer holds the facts."""
    # torch-tensorrt gives TensorRT's log to loggers without a handler, and Python drops what is below a warning then.
    logging.basicConfig(stream=sys.stdout, format="[%(levelname).1s] %(message)s")
    answer = build(json.loads(Path(request_file).read_text(encoding="utf-8")))
    partial = Path(answer_file + ".partial")
    partial.write_text(json.dumps(answer), encoding="utf-8")
    os.replace(partial, answer_file)


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Load the program, build, and write the engine."""
    torch_tensorrt = importlib.import_module("torch_tensorrt")
    program = torch.export.load(request["program"])
    assert program.example_inputs is not None
    inputs = [
        example if lengths is None else make_input(torch_tensorrt, name, lengths, example.dtype)
        for (name, lengths), example in zip(request["inputs"], program.example_inputs[0], strict=True)
    ]
    started = time.perf_counter()
    with torch_tensorrt.logging.debug():
        plan = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            program, arg_inputs=inputs, **request["arguments"]
        )
    seconds = time.perf_counter() - started
    target = Path(request["engine"])
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(plan)
    os.replace(partial, target)
    return {
        "version": str(torch_tensorrt.__version__),
        "num_layers": len(program.graph.nodes),
        "size_bytes": target.stat().st_size,
        "seconds": seconds,
        "inspection": None,
    }


def make_input(torch_tensorrt: Any, name: str, lengths: list[list[int]], dtype: torch.dtype) -> Any:
    """An input whose lengths vary, as torch-tensorrt takes it."""
    low, common, high = (tuple(shape) for shape in lengths)
    return torch_tensorrt.Input(min_shape=low, opt_shape=common, max_shape=high, dtype=dtype, name=name)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
