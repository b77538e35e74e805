"""Records the signatures of libraries that cannot be imported here, from their wheels, into data/signatures.json.

    pip download --no-deps tensorrt-cu13-bindings==11.4.0.106 torch-tensorrt==2.13.0 onnxruntime-gpu==1.31.1
    python -m tests.export.targets.tensorrt.record_signatures *.whl

TensorRT's bindings link to libraries of which they call nothing at import but version numbers: with empty ones in their place
they can be imported, and pybind11 writes each signature into a docstring. torch-tensorrt is Python, and its source is read.
onnxruntime's provider takes options by name, and these are texts in its library. Needed: Linux, a C compiler, this Python.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Final

DATA: Final = Path(__file__).with_name("data") / "signatures.json"
CALLS: Final = {
    "Builder.__init__": ("logger",),
    "Builder.create_network": ("flags",),
    "Builder.create_builder_config": (),
    "Builder.create_optimization_profile": (),
    "Builder.build_serialized_network": ("network", "config"),
    "INetworkDefinition.get_input": ("index",),
    "OnnxParser.__init__": ("network", "logger"),
    "OnnxParser.parse_from_file": ("model",),
    "OnnxParser.get_error": ("index",),
    "IBuilderConfig.set_flag": ("flag",),
    "IBuilderConfig.add_optimization_profile": ("profile",),
    "IBuilderConfig.create_timing_cache": ("serialized_timing_cache",),
    "IBuilderConfig.set_timing_cache": ("cache", "ignore_mismatch"),
    "IOptimizationProfile.set_shape": ("input", "min", "opt", "max"),
    "Runtime.__init__": ("logger",),
    "Runtime.deserialize_cuda_engine": ("serialized_engine",),
    "ICudaEngine.create_execution_context": (),
    "ICudaEngine.create_engine_inspector": (),
    "ICudaEngine.get_tensor_name": ("index",),
    "ICudaEngine.get_tensor_mode": ("name",),
    "ICudaEngine.get_tensor_dtype": ("name",),
    "ICudaEngine.get_tensor_profile_shape": ("name", "profile_index"),
    "EngineInspector.get_engine_information": ("format",),
    "IExecutionContext.set_optimization_profile_async": ("profile_index", "stream_handle"),
    "IExecutionContext.set_input_shape": ("name", "shape"),
    "IExecutionContext.get_tensor_shape": ("name",),
    "IExecutionContext.set_tensor_address": ("name", "memory"),
    "IExecutionContext.execute_async_v3": ("stream_handle",),
}
"""Method -> the arguments that the backend gives it, in its order: the calls are positional."""


def overloads(module: Any, method: str) -> list[list[str]]:
    """Argument names of each overload of a method of a pybind11 module; those with a default end in ``=``."""
    owner, name = method.split(".")
    found = []
    for line in getattr(getattr(module, owner), name).__doc__.splitlines():
        match = re.match(rf"(?:\d+\. )?{name}\(self: [^,)]+(.*)\) -> ", line.strip())
        if match is not None:
            given = re.findall(r", (\w+): ([^,]+)", match[1])
            found.append([argument + ("=" if " = " in kind else "") for argument, kind in given])
    return found


def members(module: Any) -> list[str]:
    """Every name in a module and in its classes."""
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    return sorted({name for each in (module, *classes) for name in dir(each) if not name.startswith("_")})


def _tensorrt(folder: Path) -> dict[str, Any]:
    """In a process of its own, which finds the empty libraries."""
    needed = re.findall(
        rb"lib(?:nvinfer|nvonnxparser)\w*\.so\.\d+", (folder / "tensorrt_bindings" / "tensorrt.so").read_bytes()
    )
    functions = [f"{kind}_INTERNAL" for kind in ("createInferBuilder", "createInferRuntime", "createInferRefitter")]
    functions += ["createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"]
    functions += ["getBuilderPluginRegistry", "getPluginRegistry", "initLibNvInferPlugins", "getInferLibVersion", "getLogger"]
    (folder / "empty.c").write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in functions))
    for library in {name.decode() for name in needed}:
        command = ["cc", "-shared", "-fPIC", "-o", str(folder / library), f"-Wl,-soname,{library}", str(folder / "empty.c")]
        subprocess.run(command, check=True)
    code = (
        "import json, sys\n"
        "from tests.export.targets.tensorrt.record_signatures import CALLS, members, overloads\n"
        "import tensorrt_bindings as trt\n"
        "calls = {name: overloads(trt, name) for name in CALLS}\n"
        "json.dump({'calls': calls, 'names': ' '.join(members(trt))}, sys.stdout)\n"
    )
    root = Path(__file__).parents[4]
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{folder}:{root}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _torch_tensorrt(folder: Path) -> dict[str, Any]:
    def function(file: str, name: str) -> ast.FunctionDef:
        tree = ast.parse((folder / "torch_tensorrt" / file).read_text(encoding="utf-8"))
        return next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)

    convert = function("dynamo/_compiler.py", "convert_exported_program_to_serialized_trt_engine")
    # Input takes **kwargs, and reads those that it knows by name.
    source = ast.unparse(function("_Input.py", "__init__"))
    return {
        "convert": [argument.arg for argument in (*convert.args.args, *convert.args.kwonlyargs)],
        "Input": sorted({a or b for a, b in re.findall(r"'(\w+)' in kwargs|kwargs\['(\w+)'\]", source)}),
    }


def _onnxruntime(folder: Path) -> dict[str, Any]:
    library = (folder / "onnxruntime" / "capi" / "libonnxruntime_providers_tensorrt.so").read_bytes()
    texts = {text.decode() for text in re.findall(rb"(?<=\0)trt_[a-z0-9_]+(?=\0)", library)}
    linked = {text.decode() for text in re.findall(rb"libnvinfer\.so\.\d+", library)}
    return {"options": sorted(texts), "links_to": sorted(linked)}


def main(wheels: list[str]) -> None:
    """Record the wheels that are named, beside those that are there."""
    readers = {
        "tensorrt_cu13_bindings": ("tensorrt", _tensorrt),
        "torch_tensorrt": ("torch-tensorrt", _torch_tensorrt),
        "onnxruntime_gpu": ("onnxruntime-gpu", _onnxruntime),
    }
    document = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    for wheel in wheels:
        distribution, version = Path(wheel).name.split("-")[:2]
        name, read = readers[distribution]
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(wheel) as archive:
                members_of = [each for each in archive.namelist() if not each.endswith("providers_cuda.so")]
                archive.extractall(folder, members_of)
            document[f"{name} {version}"] = read(Path(folder))
    DATA.write_text(json.dumps(dict(sorted(document.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
