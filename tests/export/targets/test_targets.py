"""Targets: as text and back, with their options on the command line and in recipes, and those of other packages."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.tiny import save_tiny_llama
from torch import nn
from typer.testing import CliRunner

from sparsepass._docs import attribute_docs
from sparsepass.export import export, read_report
from sparsepass.export.cli.app import app
from sparsepass.export.stages.recipe import recipe_of
from sparsepass.export.targets import TARGETS, HuggingFace, Onnx, SemiStructured, Target, TensorRT, parse_target, target_to_text
from sparsepass.export.targets.tensorrt import EngineOptions
from sparsepass.export.targets.torch import SemiStructuredOptions
from sparsepass.graph import Program, SparsepassError, capture

TARGETS_WITH_OPTIONS: tuple[Target, ...] = (
    *(kind() for kind in TARGETS.values()),
    Onnx(opset=18, task="text-generation", dtype="float16"),
    HuggingFace(dtype="bfloat16"),
    TensorRT(
        sm=(80, 86), profiles=("decode.batch=1:8:32", "batch=1"), timing_cache=Path("a cache, with {signs}"), sparse=False
    ),
    TensorRT(runtime="tensorrt-rtx", timeout_s=60.5, hardware_compatible=True, one_engine=True, measure=False),
    SemiStructured(shapes=((1, 512), (8, 2048)), compiled=True, sparse_only=True),
    SemiStructured(timings=Path("times.json"), measure=False),
)

TOY = '''
from dataclasses import dataclass
from typing import ClassVar

from sparsepass.export.targets import Check, Lowered, Target, option


@dataclass(frozen=True, kw_only=True)
class Names(Target):
    """A list of the sparse weights.

    Attributes:
        ending: Ending of the file.
        columns: Widths. May be
            repeated.
    """

    name: ClassVar[str] = "names"
    description: ClassVar[str] = "the names of the sparse weights"

    ending: str = "txt"
    columns: tuple[int, ...] = option((), flag="column")
    shout: bool = option(False, "In capitals.")

    def check_here(self):
        pass

    def lower(self, program, folder, context):
        text = "\\n".join([*program.sparse, f"columns {self.columns}"])
        (folder / f"names.{self.ending}").write_text(text.upper() if self.shout else text)
        context.save_companions(folder)
        return Lowered(dtype=self.dtype or "float32", expected_sparse={})

    def verify(self, program, folder, lowered, context):
        stands = (folder / f"names.{self.ending}").is_file()
        return (Check(name="names", held=stands, summary="the file is there"),)
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip leaves of a package that adds a target."""
    place = tmp_path_factory.mktemp("site")
    (place / "toy_target.py").write_text(TOY)
    about = place / "toy_target-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-target\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[sparsepass.targets]\nnames = toy_target:Names\n")
    return place


@pytest.fixture
def installed(package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(package)
    yield
    sys.modules.pop("toy_target", None)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 16))


@pytest.mark.parametrize("target", TARGETS_WITH_OPTIONS, ids=target_to_text)
def test_a_target_round_trips_through_text(target: Target) -> None:
    assert parse_target(target_to_text(target)) == target
    assert parse_target(target) is target
    assert pickle.loads(pickle.dumps(target)) == copy.deepcopy(target) == target
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.dtype = "float64"  # type: ignore[misc]


@pytest.mark.parametrize("name", TARGETS)
def test_every_option_of_a_target_is_documented(name: str) -> None:
    assert set(attribute_docs(TARGETS[name])) == set(TARGETS[name].options())


def test_text_says_what_differs_from_the_defaults() -> None:
    assert target_to_text(TensorRT()) == "tensorrt"
    assert target_to_text(Onnx(opset=18)) == "onnx{opset=18}"
    assert parse_target("tensorrt{sm=86}") == parse_target('tensorrt{sm="8.6"}') == TensorRT(sm=(86,))
    assert parse_target("torch{shapes=1x512,dtype=bf16}") == SemiStructured(shapes=((1, 512),), dtype="bfloat16")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("onxx", "unknown target 'onxx'; did you mean 'onnx'"),
        ("onnx{opst=18}", "target onnx has no option 'opst'; did you mean 'opset'"),
        ("onnx{opset=x}", "target onnx: opset expects int or none, got 'x'"),
        ("onnx{opset=18", "a '}' is missing"),
        ("onnx,hf", "expected one target"),
        ("", "expected one target"),
        ("tensorrt{sm=75}", "SM75 .Turing. has no 2:4 kernels"),
        ("tensorrt{runtime=trt}", "unknown runtime 'trt'"),
        ("torch{shapes=[[1]]}", "shapes expects"),
    ],
)
def test_mistakes_are_told(text: str, said: str) -> None:
    with pytest.raises(SparsepassError, match=said):
        parse_target(text)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("onnx", {"opset": 18}, "'onnx{opset=18}'"),
        ("onnx", {"dtype": torch.float16, "task": None}, "'onnx{dtype=float16}'"),
        ("onnx", {"task": "text-generation"}, "'onnx{task=text-generation}'"),
        ("tensorrt", {"engine": EngineOptions(sm=(86,)), "dtype": "float16"}, r"'tensorrt{dtype=float16,sm=\[86\]}'"),
        ("torch", {"semi_structured": SemiStructuredOptions(sparse_only=True)}, "'torch{sparse_only=true}'"),
        ("hf", {"dtype": "bf16"}, r"HuggingFace\(...\)"),
    ],
)
def test_old_keywords_are_taken_with_a_warning(
    name: str, old: dict[str, Any], new: str, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Target] = []
    monkeypatch.setattr("sparsepass.export.stages.exporting._write", lambda _, target, *args, **options: taken.append(target))
    with pytest.warns(DeprecationWarning, match=new):
        export(program, name, tmp_path / "out", **old)
    if new.startswith("'"):
        assert taken == [parse_target(new.strip("'").replace("\\", ""))]


def test_a_keyword_that_never_was_is_no_option(program: Program, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="opest"):
        export(program, "onnx", tmp_path / "out", opest=18)  # type: ignore[call-arg]


def test_a_recipe_takes_the_options_of_a_target() -> None:
    def target(**section: Any) -> Target:
        settings = {"model": "m", "out": "o", "prune": {}, "export": section}
        return recipe_of(settings, "r.yaml").export[0].target

    assert target(target="onnx", opset=18) == target(target="onnx{opset=18}") == Onnx(opset=18)
    assert target(target="tensorrt", sm=[86], dtype="bf16") == TensorRT(sm=(86,), dtype="bfloat16")
    assert target(target="tensorrt", engine={"sm": [86]}, dtype="bf16") == TensorRT(sm=(86,), dtype="bfloat16")
    assert target(target="torch", semi_structured=None) == SemiStructured()
    with pytest.raises(SparsepassError, match=r"r\.yaml: export: the target hf has no option sm"):
        target(target="hf", sm=[86])
    with pytest.raises(SparsepassError, match="did you mean 'opset'"):
        target(target="onnx", opst=18)


@pytest.mark.usefixtures("installed")
def test_a_target_of_another_package_is_used_in_python(program: Program, tmp_path: Path) -> None:
    result = export(program, "names{ending=md,columns=[3,4],shout=true}", tmp_path / "out", passes="nm_sparsify")
    assert result.held is True
    assert (tmp_path / "out" / "names.md").read_text() == "0.WEIGHT\nCOLUMNS (3, 4)"
    assert result.report["artifact"]["target"] == "names"
    with pytest.raises(SparsepassError, match="did you mean 'ending'"):
        parse_target("names{endin=x}")
    section = {"model": "m", "out": "o", "prune": {}, "export": {"target": "names", "shout": True}}
    assert target_to_text(recipe_of(section, "r.yaml").export[0].target) == "names{shout=true}"


def test_a_target_of_another_package_is_used_on_the_command_line(package: Path, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "tiny")
    paths = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sparsepass", "export", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": paths, "COLUMNS": "200"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    told = run("--help").stdout
    assert "Widths. May be repeated." in told  # of the docstring
    assert "In capitals." in told  # of the field
    out = tmp_path / "out"
    done = run(tmp_path / "tiny", "--target", "names{ending=md}", "-o", out, "--column", 3, "--column", 4, "--shout")
    assert done.returncode == 0, done.stderr
    assert "MODEL.LAYERS.0.MLP.UP_PROJ.WEIGHT" in (out / "names.md").read_text()
    assert (out / "names.md").read_text().endswith("COLUMNS (3, 4)")
    assert (out / "tokenizer.json").is_file()
    assert read_report(out)["verification"]["held"] is True
    refused = run(tmp_path / "tiny", "--target", "hf", "-o", tmp_path / "hf", "--shout")
    assert refused.returncode == 2
    assert "the target hf has no option shout" in refused.stderr


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("toy_target:Nothing", "cannot be loaded"),
        ("nowhere:Names", "cannot be loaded"),
        ("toy_target:dataclass", "is no Target class"),
    ],
)
def test_a_broken_package_is_named(entry: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_target.py").write_text(TOY)
    (tmp_path / "broken-1.0.dist-info").mkdir()
    (tmp_path / "broken-1.0.dist-info" / "entry_points.txt").write_text(f"[sparsepass.targets]\nbroken = {entry}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SparsepassError, match=f"the entry point broken .{entry}. {said}.*mend or remove its package"):
        parse_target("onnx")
    sys.modules.pop("toy_target", None)


def test_options_stand_with_the_target_or_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Target] = []

    def stop(_: Any, target: Target, *args: Any, **options: Any) -> None:
        taken.append(target)
        raise SparsepassError("stopped")

    monkeypatch.setattr("sparsepass.export.stages.export", stop)
    for arguments in (
        ["-t", "onnx{opset=18}"],
        ["-t", "onnx", "--opset", "18"],
        ["-t", "tensorrt{one_engine=true}", "--sm", "80,8.6", "--profile", "batch=1", "--no-sparse", "--timeout", "60"],
        ["-t", "torch", "--measure-shapes", "1x512", "--no-measure", "--dtype", "bf16"],
    ):
        assert CliRunner().invoke(app, ["export", "m", "-o", str(tmp_path / "out"), *arguments]).exit_code == 2
    assert taken == [
        Onnx(opset=18),
        Onnx(opset=18),
        TensorRT(one_engine=True, sm=(80, 86), profiles=("batch=1",), sparse=False, timeout_s=60.0),
        SemiStructured(shapes=((1, 512),), measure=False, dtype="bfloat16"),
    ]
