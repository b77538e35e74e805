"""torch-tensorrt's route, against a stand-in with the library's own signature (2.13), since it needs a CUDA build of torch."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from tests.export.targets.tensorrt.record_signatures import DATA
from tests.families import BY_NAME
from torch import nn

from sparsepass.export.targets.onnx.lower import lower_onnx
from sparsepass.export.targets.tensorrt.build import BuildError, arguments, build_torch_engine, exported_program
from sparsepass.export.targets.tensorrt.lower import lower_tensorrt
from sparsepass.export.targets.tensorrt.packages import Gpu
from sparsepass.export.targets.tensorrt.profiles import EnginePlan, plan_engines
from sparsepass.export.targets.tensorrt.target import TensorRT
from sparsepass.graph import Program, SparsepassError, capture
from sparsepass.passes import apply_passes

# The arguments are some of those that `record_signatures` read in the wheel of 2.13.0; a test compares them.
FAKE = """
import contextlib, json, logging, types
import torch

__version__ = "2.13.0"


class Input:
    def __init__(self, shape=None, *, min_shape=None, opt_shape=None, max_shape=None, dtype=None, format=None, name=""):
        self.seen = [list(min_shape), list(opt_shape), list(max_shape), str(dtype), name]


# As in torch_tensorrt/logging.py: what TensorRT logs goes to a logger that has no handler, at levels below a warning.
_LOGGER = logging.getLogger("torch_tensorrt [TensorRT Conversion Context]")


@contextlib.contextmanager
def _debug():
    _LOGGER.setLevel("DEBUG")
    yield


_log, logging = _LOGGER.info, types.SimpleNamespace(debug=_debug)


def convert(
    exported_program, inputs=None, *, arg_inputs=None, kwarg_inputs=None, device=None, disable_tf32=False,
    assume_dynamic_shape_support=False, sparse_weights=False, engine_capability=None, num_avg_timing_iters=1,
    workspace_size=0, truncate_double=False, require_full_compilation=False, min_block_size=5, torch_executed_ops=None,
    version_compatible=False, optimization_level=None, dryrun=False, hardware_compatible=False, timing_cache_path="",
    cache_built_engines=False, reuse_cached_engines=False, immutable_weights=True,
):
    assert isinstance(exported_program, torch.export.ExportedProgram)
    _log("(Sparsity) Found 4 layer(s) eligible to use sparse tactics")
    _LOGGER.debug("Tactic: 0x1 Time: 0.1")
    seen = [each.seen if isinstance(each, Input) else list(each.shape) for each in arg_inputs]
    return json.dumps({"inputs": seen, "sparse": sparse_weights, "full": require_full_compilation}).encode()


dynamo = types.SimpleNamespace(convert_exported_program_to_serialized_trt_engine=convert)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "fake"
    place.mkdir()
    (place / "torch_tensorrt.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(place))
    out = tmp_path / "out"
    out.mkdir()
    return out


@pytest.fixture(scope="module")
def bert() -> Program:
    family = BY_NAME["bert"]
    return apply_passes(family.model(), ["nm_sparsify"], example_inputs=family.inputs(2, 8), validate=False)


@pytest.fixture(scope="module")
def plan(bert: Program, tmp_path_factory: pytest.TempPathFactory) -> EnginePlan:
    artifact = lower_onnx(bert, tmp_path_factory.mktemp("onnx"))
    return plan_engines(artifact, TensorRT(), config=bert.origin.config)[0]


def test_the_flag_is_asked_for() -> None:
    assert arguments(TensorRT())["sparse_weights"] is True
    assert arguments(TensorRT(sparse=False))["sparse_weights"] is False
    assert arguments(TensorRT(timing_cache=Path("x")))["timing_cache_path"] == "x"
    assert "enabled_precisions" not in arguments(TensorRT()), "gone since 2.13: the model's dtypes decide"


def test_arguments_are_those_of_the_library() -> None:
    recorded = json.loads(DATA.read_text(encoding="utf-8"))["torch-tensorrt 2.13.0"]
    everything = TensorRT(timing_cache=Path("x"), hardware_compatible=True)
    assert {"arg_inputs", *arguments(everything)} <= set(recorded["convert"])
    defined = {node.name: node for node in ast.walk(ast.parse(FAKE)) if isinstance(node, ast.FunctionDef)}
    for name, known in (("convert", recorded["convert"]), ("__init__", ["self", *recorded["Input"]])):
        given = defined[name].args
        assert {each.arg for each in (*given.args, *given.kwonlyargs)} <= set(known), name


def test_an_engine_is_built_from_the_program_itself(fake: Path, bert: Program, plan: EnginePlan) -> None:
    engine = fake / "model.engine"
    built = build_torch_engine(bert, plan, engine, fake / "model.log", TensorRT(), torch.float32)
    assert (built.version, built.size_bytes) == ("2.13.0", engine.stat().st_size)
    text = engine.read_text()
    assert '"sparse": true' in text
    assert '"full": true' in text
    assert '[[1, 1], [1, 16], [8, 64], "torch.int64", "input_ids"]' in text
    assert sorted(path.name for path in fake.iterdir()) == ["model.engine", "model.log"]
    log = (fake / "model.log").read_text()
    assert "[I] (Sparsity) Found 4 layer(s)" in log
    assert "[D] Tactic: 0x1" in log, "TensorRT's most verbose lines hold the names and times"


def test_the_target_takes_it(fake: Path, bert: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsepass.export.targets.tensorrt.lower.gpus", lambda: (Gpu(name="L40S", sm=89),))
    monkeypatch.setattr("sparsepass.export.targets.tensorrt.packages._is_there", lambda module: module == "torch_tensorrt")
    found = lower_tensorrt(bert, fake, TensorRT(runtime="torch-tensorrt"))
    assert [engine.name for engine in found.engines] == ["model"]
    assert found.engines[0].num_eligible == 4
    assert {layer.ran_sparse for layer in found.layers if layer.conforms == "yes"} == {"no"}, "float32 has no sparse kernels"


def test_quantized_weights_are_floating_point(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsepass.export.targets.tensorrt.lower.gpus", lambda: (Gpu(name="L40S", sm=89),))
    monkeypatch.setattr("sparsepass.export.targets.tensorrt.packages._is_there", lambda module: module == "torch_tensorrt")
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    text = "nm_sparsify{criterion=magnitude},quantize{group_size=16,symmetric=false}"
    program = apply_passes(model, text, example_inputs=torch.randn(2, 32), validate=False)
    found = lower_tensorrt(program, fake, TensorRT(runtime="torch-tensorrt"))
    assert {one.form for stored in found.onnx.weights.values() for one in stored} == {"floats"}
    assert any(note.startswith("torch-tensorrt builds from the program's own graph, in which it") for note in found.notes)


def test_a_library_that_cannot_be_imported_is_an_error_message(fake: Path, bert: Program, plan: EnginePlan) -> None:
    (fake.parent / "fake" / "torch_tensorrt.py").write_text(
        "raise Exception('make sure tensorrt lib is in the LD_LIBRARY_PATH')"
    )
    with pytest.raises(BuildError, match=r"(?s)exit code 1 .*make sure tensorrt lib is in the LD_LIBRARY_PATH"):
        build_torch_engine(bert, plan, fake / "model.engine", fake / "log", TensorRT(), torch.float32)
    assert not (fake / "model.engine").exists()
    assert not (fake / "model.pt2").exists()


def test_axes_vary_in_the_exported_program(bert: Program) -> None:
    exported = exported_program(bert, {"input_ids": ((1, 1), (1, 8), (4, 16)), "attention_mask": ((1, 1), (1, 8), (4, 16))})
    inputs = {name: torch.cat([t, t[:1]]) for name, t in bert.example_inputs.items()}
    flat = [inputs[name] for name in bert.input_names]
    assert torch.equal(exported.module()(*flat)[0], bert.graph_module(*flat)[0])


def test_a_cache_is_refused(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsepass.export.targets.tensorrt.lower.gpus", lambda: (Gpu(name="L40S", sm=89),))
    monkeypatch.setattr("sparsepass.export.targets.tensorrt.packages._is_there", lambda module: module == "torch_tensorrt")
    program = capture(nn.Sequential(nn.Linear(8, 8)), torch.ones(2, 8))
    options = TensorRT(runtime="torch-tensorrt", task="text-generation-with-past")
    with pytest.raises(SparsepassError, match=re.escape("--task text-generation-with-past asks for one")):
        lower_tensorrt(program, fake, options)
