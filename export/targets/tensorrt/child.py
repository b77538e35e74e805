"""The process that calls TensorRT: it builds one engine from one ONNX file and tells what happened in a JSON file.

It is run by path, with the standard library and the runtime's own package only. So it starts at once, and a native crash
ends nothing else. `build.py` is the other side. Standard output gets what the native libraries print and what the builder
logs, in one order.
"""

import importlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

_LETTERS = {"INTERNAL_ERROR": "F", "ERROR": "E", "WARNING": "W", "INFO": "I", "VERBOSE": "V"}


class BuildRefusedError(Exception):
    """What TensorRT or this script refuses, in words for the user.

    Args:
        reason: Those words.
        log_tells_more: Whether TensorRT refused, so that its log says more.
    """

    def __init__(self, reason: str, *, log_tells_more: bool = False) -> None:
        super().__init__(reason)
        self.log_tells_more = log_tells_more


_PARSING = re.compile(r"^Parsing node: (.*) \[(\w+)\]")


def main(request_file: str, answer_file: str) -> None:
    """Build what the request asks for; the answer holds the facts, or an error for the user."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    try:
        answer = build(importlib.import_module(request["module"]), request)
    except BuildRefusedError as error:
        answer = {"error": str(error), "log_tells_more": error.log_tells_more}
    except ImportError as error:
        answer = {"error": f"{request['module']} cannot be imported: {error}", "log_tells_more": False}
    partial = Path(answer_file + ".partial")
    partial.write_text(json.dumps(answer), encoding="utf-8")
    os.replace(partial, answer_file)


def build(trt: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Parse, configure, build and write one engine."""
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    _parse(parser, request["onnx"], logger)
    config = builder.create_builder_config()
    _configure(trt, config, request)
    for profile in request["profiles"]:
        config.add_optimization_profile(make_profile(builder, network, profile))
    cache = _use_timing_cache(config, request["timing_cache"])
    started = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = _last_error(logger) or "the builder returned no engine, and its log gives no reason"
        raise BuildRefusedError(reason, log_tells_more=True)
    seconds = time.perf_counter() - started
    target = Path(request["engine"])
    partial = target.with_name(target.name + ".partial")
    with partial.open("wb") as file:
        file.write(plan)
    os.replace(partial, target)
    if cache is not None:
        _save_timing_cache(cache, Path(request["timing_cache"]))
    return {
        "version": str(getattr(trt, "__version__", "unknown")),
        "num_layers": network.num_layers,
        "size_bytes": target.stat().st_size,
        "seconds": seconds,
        "inspection": _inspect(trt, logger, target) if request["inspect"] else None,
    }


def make_logger(trt: Any) -> Any:
    """A logger that prints every line with a letter for its severity, and keeps the errors."""

    class PrintingLogger(trt.ILogger):  # type: ignore[misc]
        """Prints what TensorRT logs."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.last_parsed = ""

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT, from any thread."""
            name = str(severity).rpartition(".")[2]
            if name in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(message)
            if message.startswith("Parsing node:"):
                self.last_parsed = message
            sys.stdout.write(f"[{_LETTERS.get(name, 'I')}] {message}\n")
            sys.stdout.flush()  # the next line may be the last one

    return PrintingLogger()


def make_profile(builder: Any, network: Any, profile: dict[str, Any]) -> Any:
    """One optimization profile; shapes of inputs that a profile does not name must be fixed."""
    made = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        fixed = [int(n) for n in tensor.shape]
        if tensor.name in profile["shapes"]:
            low, common, high = (tuple(shape) for shape in profile["shapes"][tensor.name])
            made.set_shape(tensor.name, low, common, high)
        elif -1 in fixed:
            raise BuildRefusedError(
                f"input {tensor.name} has the shape {fixed}, and profile {profile['name']} gives no lengths for it; name its "
                "axes with --profile"
            )
    return made


def _parse(parser: Any, path: str, logger: Any) -> None:
    if parser.parse_from_file(path):
        return
    said = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node, operator = (_call(error, name) for name in ("node_name", "node_operator"))
        if not node and (last := _PARSING.search(logger.last_parsed)):  # some errors do not say where they are
            node, operator = last.groups()
        reason = ", ".join(filter(None, (_call(error, name) for name in ("desc", "func"))))
        said.append(f"it does not take the operator {operator or 'unknown'} at node {node or 'unknown'} ({reason})")
    raise BuildRefusedError(
        f"TensorRT cannot read {Path(path).name}: {'; '.join(said[:3]) or 'it gives no reason'}; leave that part out of the "
        "model, or use the onnx target",
        log_tells_more=True,
    )


def _call(error: Any, name: str) -> str:
    method = getattr(error, name, None)  # node_operator is missing before TensorRT 10
    return str(method()) if method is not None else ""


def _configure(trt: Any, config: Any, request: dict[str, Any]) -> None:
    if request["sparse"]:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request["hardware_compatible"]:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    wanted = request["capabilities"]
    if not wanted:
        return
    if not hasattr(trt, "ComputeCapability"):
        raise BuildRefusedError(
            f"{request['module']} builds for the GPU it runs on, and cannot be told SM{wanted[0]}; leave --sm out, or use "
            "tensorrt-rtx"
        )
    known = dict(trt.ComputeCapability.__members__)
    missing = [f"SM{number}" for number in wanted if f"SM{number}" not in known]
    if missing:
        names = ", ".join(name for name in known if name.startswith("SM"))
        raise BuildRefusedError(
            f"{request['module']} {trt.__version__} cannot build ahead for {', '.join(missing)}; it knows {names}"
        )
    config.num_compute_capabilities = len(wanted)
    for index, number in enumerate(wanted):
        if not config.set_compute_capability(known[f"SM{number}"], index):
            raise BuildRefusedError(f"the builder refuses SM{number}; leave it out of --sm")


def _use_timing_cache(config: Any, path: str | None) -> Any:
    if path is None:
        return None
    place = Path(path)
    cache = config.create_timing_cache(place.read_bytes() if place.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise BuildRefusedError(
            f"the timing cache {place} is of another TensorRT or GPU, or damaged; delete it or name another"
        )
    return cache


def _save_timing_cache(cache: Any, path: Path) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(cache.serialize())
    os.replace(partial, path)


def _inspect(trt: Any, logger: Any, path: Path) -> Any:
    """What the engine inspector tells of each layer, or why it tells nothing."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        return {"error": _last_error(logger) or "the engine cannot be loaded here"}
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        return json.loads(text)
    except ValueError as error:
        return {"error": f"the inspector's answer is no JSON ({error})"}


def _last_error(logger: Any) -> str:
    return "; ".join(logger.errors[-2:])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
