"""The tensorrt target: real engines of tiny models, built by tensorrt-rtx without a GPU; and what it refuses."""

import gzip
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.export.targets.tensorrt.fake import FAKE
from tests.families import BY_NAME
from torch import Tensor, nn

from sparsepass.export.pattern.check import check_pattern
from sparsepass.export.report.document import read_report
from sparsepass.export.stages.exporting import export
from sparsepass.export.targets.evidence import check_two_four
from sparsepass.export.targets.tensorrt import child as tensorrt_child, lower as tensorrt
from sparsepass.export.targets.tensorrt.build import BuildError
from sparsepass.export.targets.tensorrt.lower import ENGINES_FILE, lower_tensorrt
from sparsepass.export.targets.tensorrt.packages import RUNTIMES, Installed, find
from sparsepass.export.targets.tensorrt.session import CONFIGURATION_FILE
from sparsepass.export.targets.tensorrt.target import TensorRT
from sparsepass.export.targets.tensorrt.verify import TensorrtArtifact
from sparsepass.graph import Program, SparsepassError
from sparsepass.passes import NMSparsify, apply_passes

pytestmark = pytest.mark.skipif(
    find("tensorrt-rtx") is None and (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="tensorrt-rtx is to be had for x86-64 only",
)
RTX = TensorRT(runtime="tensorrt-rtx", sm=(86,))


@pytest.fixture(scope="module", autouse=True)
def _no_gpu() -> Iterator[None]:
    """What is tested here is the same with and without a GPU in the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt, "gpus", lambda: ())
        yield


def two_layers(dtype: torch.dtype = torch.float16, pattern: str = "2:4") -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 16)).to(dtype)
    return apply_passes(model, [NMSparsify(pattern=pattern)], example_inputs=torch.randn(2, 64).to(dtype), validate=False)


@pytest.fixture(scope="module")
def program() -> Program:
    return two_layers()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TensorrtArtifact]:
    family = BY_NAME["llama"]
    program = apply_passes(family.model(), ["nm_sparsify"], example_inputs=family.inputs(2, 8), validate=False)
    folder = tmp_path_factory.mktemp("llama")
    return folder, lower_tensorrt(program, folder, TensorRT(runtime="tensorrt-rtx", dtype="float16"))


def test_a_language_model_is_two_engines_for_every_target(llama: tuple[Path, TensorrtArtifact]) -> None:
    folder, artifact = llama
    assert [(engine.name, engine.targets) for engine in artifact.engines] == [
        ("prefill", (80, 86, 89, 120)),
        ("decode", (80, 86, 89, 120)),
    ]
    for engine in artifact.engines:
        path = folder / engine.file
        assert path.stat().st_size == engine.size_bytes > 100_000
        assert engine.num_layers > 100
        assert engine.flag_requested
    decode = artifact.engines[1].profiles["decode"]
    assert decode["sequence"] == (1, 1, 1)
    assert decode["past_sequence"] == (1, 32, 63), "from the model's own limit of 64 tokens"


def test_the_log_is_kept_whole(llama: tuple[Path, TensorrtArtifact]) -> None:
    folder, artifact = llama
    for engine in artifact.engines:
        text = gzip.decompress((folder / engine.log).read_bytes()).decode()
        assert text.index("Input filename:") < text.index("Adding 1 engine(s) to plan file"), "from its first line to the end"
        assert "past_key_values.0.key" in text
    assert not list(folder.glob("*.log"))


def test_each_weight_of_each_engine_has_its_row(llama: tuple[Path, TensorrtArtifact]) -> None:
    folder, artifact = llama
    meant = [layer for layer in artifact.layers if layer.conforms == "yes"]
    assert {layer.engine for layer in meant} == {"prefill", "decode"}
    assert len(meant) == 2 * 14
    assert {(x.flag_requested, x.eligible, x.chosen, x.ran_sparse) for x in meant} == {("yes", "unknown", "unknown", "unknown")}
    assert all(layer.reason.startswith("no GPU here") for layer in meant)
    weights = artifact.onnx.expected_sparse["model.onnx"]
    assert check_pattern(folder / "model.onnx", expected_sparse=weights).conforms
    assert {layer.weight for layer in meant} == set(weights)


def test_what_stands_beside_the_engines(llama: tuple[Path, TensorrtArtifact]) -> None:
    folder, _ = llama
    engines = json.loads((folder / ENGINES_FILE).read_text())
    assert [engine["name"] for engine in engines["engines"]] == ["prefill", "decode"]
    sessions = json.loads((folder / CONFIGURATION_FILE).read_text())
    assert sessions["decode"]["providers"][0][1]["trt_sparsity_enable"] == "True"
    assert "past_key_values.0.key:1x2x1x8" in sessions["decode"]["providers"][0][1]["trt_profile_min_shapes"]


def test_notes_tell_what_was_not_shown(llama: tuple[Path, TensorrtArtifact]) -> None:
    said = "\n".join(llama[1].notes)
    assert "that its engines run sparse is not shown by this build" in said
    assert 'pip install "sparsepass[tensorrt]"' in said


@pytest.mark.parametrize("name", ["whisper", "gpt2"])
def test_other_families(name: str, tmp_path: Path) -> None:
    family = BY_NAME[name]
    program = apply_passes(family.model(), ["nm_sparsify", "slorb{k=8}"], example_inputs=family.inputs(2, 8), validate=False)
    artifact = lower_tensorrt(program, tmp_path, replace(RTX, dtype="float16"))
    names = ["encoder", "prefill", "decode"] if name == "whisper" else ["prefill", "decode"]
    assert [engine.name for engine in artifact.engines] == names
    together = TensorRT(runtime="tensorrt-rtx", sm=(86,), one_engine=True, dtype="float16")
    (tmp_path / "one").mkdir()
    artifact = lower_tensorrt(program, tmp_path / "one", together)
    assert set(artifact.engines[-1].profiles) == {"prefill", "decode"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_precision_is_the_models(dtype: torch.dtype, tmp_path: Path) -> None:
    artifact = lower_tensorrt(two_layers(dtype), tmp_path, RTX)
    assert artifact.onnx.dtype == str(dtype).removeprefix("torch.")
    kind = {torch.bfloat16: "BF16", torch.float32: "FLOAT"}[dtype]
    log = gzip.decompress((tmp_path / "model.log.gz").read_bytes()).decode()
    assert f"[{kind}]" in log
    assert "[HALF]" not in log
    ran = {layer.ran_sparse for layer in artifact.layers if layer.conforms == "yes"}
    assert ran == ({"no"} if dtype == torch.float32 else {"unknown"})
    if dtype == torch.float32:
        assert artifact.layers[0].reason.startswith("dtype: float32")


def test_the_flag_the_timing_cache_and_hardware_compatibility(program: Program, tmp_path: Path) -> None:
    cache = tmp_path / "times.cache"
    options = TensorRT(
        runtime="tensorrt-rtx",
        sm=(80, 120),
        timing_cache=cache,
        hardware_compatible=True,
        sparse=False,
        profiles=("batch=1:4:16",),
    )
    out = tmp_path / "out"
    out.mkdir()
    artifact = lower_tensorrt(program, out, options)
    assert cache.stat().st_size > 0
    (engine,) = artifact.engines
    assert (engine.targets, dict(engine.profiles), engine.flag_requested) == (
        (80, 120),
        {"model": {"batch": (1, 4, 16)}},
        False,
    )
    assert {layer.ran_sparse for layer in artifact.layers} == {"no"}
    lower_tensorrt(program, out, options)


def test_a_target_that_the_builder_does_not_know(program: Program, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"cannot build ahead for SM90; it knows .*SM86"):
        lower_tensorrt(program, tmp_path, TensorRT(runtime="tensorrt-rtx", sm=(90,)))


@pytest.mark.parametrize("pattern", ["1:4", "4:8"])
def test_other_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(
        SparsepassError, match=f"0.weight is {pattern}, and 1 more are not 2:4: TensorRT has sparse kernels for 2:4"
    ):
        check_two_four(two_layers(pattern=pattern), "TensorRT", "use the onnx target")


class Determinants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(self.mix(x))  # type: ignore[no-any-return]


def test_an_operator_that_tensorrt_does_not_have_is_named(tmp_path: Path) -> None:
    program = apply_passes(Determinants(), ["nm_sparsify"], example_inputs=torch.randn(2, 8, 8), validate=False)
    with pytest.raises(BuildError, match=r"does not take the operator Det at node \w+ .*use the onnx target") as caught:
        export(program, RTX, tmp_path / "out")
    assert "The log ends with:" in str(caught.value)
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_a_parsers_error_without_a_place_takes_it_from_the_log() -> None:
    said = {"node_name": "", "node_operator": "", "desc": "Unsupported reduction type", "func": "importScatterElements"}
    error = SimpleNamespace(**{name: lambda text=text: text for name, text in said.items()})
    parser = SimpleNamespace(parse_from_file=lambda path: False, num_errors=1, get_error=lambda index: error)
    logger = SimpleNamespace(last_parsed="Parsing node: node_scatter_add [ScatterElements]")
    with pytest.raises(
        tensorrt_child.BuildRefusedError,
        match=r"operator ScatterElements at node node_scatter_add \(Unsupported",
    ):
        tensorrt_child._parse(parser, "model.onnx", logger)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_a_crash_leaves_nothing_half_written(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "fake"
    place.mkdir()
    crash = "import ctypes; ctypes.string_at(0)"
    (place / "faketrt.py").write_text(
        f"{FAKE}\n\ndef build():\n    {crash}\n".replace("num_inputs, num_layers = 0, 3", "num_inputs = 0")
    )
    monkeypatch.setenv("PYTHONPATH", str(place))
    fake = Installed(runtime=RUNTIMES["tensorrt-rtx"], module="faketrt", version="0")
    monkeypatch.setattr(tensorrt, "choose", lambda name, gpus: fake)
    monkeypatch.setattr(tensorrt, "resolve_targets", lambda *_: ())
    with pytest.raises(BuildError, match="crashed with SIGSEGV"):
        export(program, RTX, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["fake"]


def test_export_verifies_and_reports(program: Program, tmp_path: Path) -> None:
    result = export(program, RTX, tmp_path / "out")
    assert result.state == "not_checked", "engines that did not run are not held"
    checks = {check["name"]: check for check in result.report["verification"]["checks"]}
    assert checks["engines"]["held"] is True
    assert checks["engine outputs"]["held"] is None
    assert checks["engine outputs"]["summary"].startswith("not run: no GPU here")
    assert checks["sparse kernels"]["held"] is None
    section = read_report(tmp_path / "out")["sparsity"]
    assert section["runtime"] == "tensorrt-rtx"
    assert section["counts"]["total"]["conforms"] == {"yes": 2, "no": 0, "unknown": 0}
    page = (tmp_path / "out" / "report.md").read_text()
    assert "## Was the sparsity used?\n\nBuilt by tensorrt-rtx" in page
    assert "| 0.weight | model | 32x64 | yes | yes | unknown | unknown | unknown | no GPU here" in page


def test_an_engine_that_was_cut_off_does_not_hold(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = tensorrt.lower_tensorrt

    def cut(*args: Any, **kwargs: Any) -> TensorrtArtifact:
        artifact = lower(*args, **kwargs)
        path = args[1] / "model.engine"
        path.write_bytes(path.read_bytes()[:-1])
        return artifact

    monkeypatch.setattr(tensorrt, "lower_tensorrt", cut)
    result = export(program, RTX, tmp_path / "out")
    assert result.held is False
    assert result.failures == ("engines: missing or cut off: model.engine",)


def test_the_command_line(tmp_path: Path) -> None:
    from tests.export.tiny import save_tiny_llama
    from typer.testing import CliRunner

    from sparsepass.export.cli.app import app

    model = save_tiny_llama(tmp_path / "model")
    command = ["export", str(model), "--target", "tensorrt", "-o", str(tmp_path / "out"), "--no-validate", "--no-verify"]
    found = CliRunner().invoke(app, [*command, "--sm", "75"])
    assert found.exit_code == 2
    assert "SM75 (Turing) has no 2:4 kernels" in found.output
    options = [
        "--sm",
        "89",
        "--one-engine",
        "--profile",
        "batch=1,prefill.sequence=1:8:32",
        "--timeout",
        "600",
        "--dtype",
        "float16",
    ]
    found = CliRunner().invoke(app, [*command, *options])
    assert found.exit_code == 0, found.output
    (engine,) = json.loads((tmp_path / "out" / ENGINES_FILE).read_text())["engines"]
    assert engine["targets"] == [89]
    assert engine["profiles"]["prefill"]["sequence"] == [1, 8, 32]
    assert engine["profiles"]["decode"]["batch"] == [1, 1, 1]


def test_other_targets_take_no_engine_options(program: Program, tmp_path: Path) -> None:
    with pytest.raises(SparsepassError, match="the target onnx has no option engine"):
        export(program, "onnx", tmp_path / "out", engine=RTX)
