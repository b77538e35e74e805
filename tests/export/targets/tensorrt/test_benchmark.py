"""The scripts of the proof on a GPU, rehearsed without one: they have to run at the first try where a GPU is."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime
import pytest
import torch
from tests.families import BY_NAME
from torch import nn

from sparsepass.export.stages.exporting import export, write_samples
from sparsepass.export.targets.tensorrt import lower as tensorrt
from sparsepass.export.targets.tensorrt.packages import find
from sparsepass.export.targets.tensorrt.profiles import plan_engines
from sparsepass.export.targets.tensorrt.session import CONFIGURATION_FILE, session_configuration
from sparsepass.export.targets.tensorrt.target import TensorRT

SCRIPTS = Path(__file__).parents[4] / "benchmarks"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_tensorrt", SCRIPTS / "gpu_tensorrt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_the_processor(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Sessions of the TensorRT provider are opened on the processor; the options that they were given are kept."""
    opened: list[dict[str, str]] = []
    real = onnxruntime.InferenceSession

    def session(graph: str, providers: list[Any]) -> Any:
        opened.append(providers[0][1])
        return real(graph, providers=["CPUExecutionProvider"])

    def open_session(folder: Path, name: str) -> Any:
        graph, providers = script.read_configuration(folder, name)
        return session(str(graph), providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(script, "open_tensorrt_session", open_session)
    return opened


def test_sessions_run_the_prompt_and_time_dense_against_sparse(
    script: ModuleType, on_the_processor: list[dict[str, str]], tmp_path: Path
) -> None:
    from sparsepass.export.targets.onnx.lower import lower_onnx
    from sparsepass.graph import capture

    family = BY_NAME["llama"]
    program = capture(family.model(), family.inputs(2, 8))
    artifact = lower_onnx(program, tmp_path, dtype="float16")
    plans = plan_engines(artifact, TensorRT(), config=program.origin.config)
    (tmp_path / CONFIGURATION_FILE).write_text(json.dumps(session_configuration(plans, dtype="float16")))
    (tmp_path / "prefill.engine").touch()
    write_samples(program, tmp_path / script.SAMPLES_FILE)
    out = tmp_path / "onnxruntime.json"
    assert script.sessions(argparse.Namespace(folder=tmp_path, out=out, dtype="float16"))
    found = json.loads(out.read_text())
    assert found["engine"] == "prefill"
    assert "logits" in found["compared"]
    assert found["relative_error"] <= found["allowed"]
    assert min(found["sparse_ms"], found["dense_ms"]) > 0
    sparse, dense = on_the_processor
    assert (sparse["trt_sparsity_enable"], dense["trt_sparsity_enable"]) == ("True", "False")
    assert sparse["trt_engine_cache_path"] != dense["trt_engine_cache_path"], "else the dense session reads the sparse engine"


@pytest.mark.skipif(find("tensorrt-rtx") is None, reason="tensorrt-rtx is to be had for x86-64 only")
def test_the_summary_tells_of_each_route_also_of_those_that_failed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tensorrt, "gpus", lambda: ())
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).half()
    options = TensorRT(runtime="tensorrt-rtx", sm=(86,))
    example = torch.randn(2, 16).half()
    export(model, options, tmp_path / "tensorrt", passes="nm_sparsify", example_inputs=example)
    (tmp_path / "gpu.txt").write_text("RTX A5000, 8.6, 999\n")
    capsys.readouterr()
    assert script.summary(argparse.Namespace(out=tmp_path))
    said = capsys.readouterr().out
    assert "RTX A5000, 8.6, 999" in said
    assert "- engines: True: 1 whole as the builder made them: model.engine" in said
    assert '- states: {"conforms": {"yes": 1,' in said
    assert "## torch-tensorrt\n\nFailed; see torch-tensorrt.log." in said
    assert said.rstrip().endswith("Failed; see onnxruntime.log.")


@pytest.mark.skipif(sys.platform == "win32", reason="a script for bash")
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--help",), 0, "OUT/summary.md tells what came of it."),
        (("--out",), 2, "Unknown option --out; see --help."),
        ((), 2, "No NVIDIA GPU here: nvidia-smi is missing or finds none."),
    ],
)
def test_the_shell_script_tells_what_it_needs(arguments: tuple[str, ...], code: int, said: str, tmp_path: Path) -> None:
    missing = tmp_path / "nvidia-smi"
    missing.write_text("#!/bin/sh\nexit 9\n")
    missing.chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPTS / "gpu_tensorrt.sh"), *arguments],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["nvidia-smi"], "nothing is installed or written"
