"""Which package builds, what a machine without one or without a GPU is told, and that every call exists in each of them."""

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.export.targets.tensorrt.record_signatures import CALLS, DATA, members, overloads

from sparsepass.export.targets.tensorrt import packages as tensorrt_packages
from sparsepass.export.targets.tensorrt.build import CHILD
from sparsepass.export.targets.tensorrt.lower import AHEAD_OF_TIME, resolve_targets
from sparsepass.export.targets.tensorrt.packages import RUNTIMES, Gpu, Installed, abilities, choose, find, gpus
from sparsepass.export.targets.tensorrt.target import TensorRT
from sparsepass.graph import SparsepassError

ADA = (Gpu(name="GeForce RTX 4090", sm=89),)
TURING = (Gpu(name="Tesla T4", sm=75),)

# What `record_signatures` read in the wheels of libraries that cannot be imported here. TensorRT-RTX is asked itself.
RECORDED = json.loads(DATA.read_text(encoding="utf-8"))
TENSORRT = [name for name in RECORDED if name.startswith("tensorrt ")]
ONLY_RTX = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    there = {module for row in RUNTIMES.values() if row.name not in missing for module in row.modules[:1]}
    monkeypatch.setattr(tensorrt_packages, "_is_there", lambda module: module in there)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_missing_package_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *RUNTIMES)
    assert find(name) is None
    with pytest.raises(SparsepassError) as caught:
        choose(name, ADA)
    said = str(caught.value)
    assert said.startswith(f'{name} is not installed; pip install "sparsepass[{name}]"')
    for row in RUNTIMES.values():
        assert f"- {row.name} is not installed ({row.install})" in said


def test_nothing_installed_suggests_what_works_here(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *RUNTIMES)
    with pytest.raises(
        SparsepassError, match=r'pip install "sparsepass\[tensorrt-rtx\]" \(in a checkout: .*\)\nOn this machine \(no GPU\)'
    ):
        choose(None, ())
    with pytest.raises(
        SparsepassError,
        match=r'pip install "sparsepass\[tensorrt\]" \(in a checkout: .*\)\nOn this machine \(GeForce RTX 4090, SM89\)',
    ):
        choose(None, ADA)


def test_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch)
    assert choose(None, ADA).runtime.name == "tensorrt"
    assert choose(None, ()).runtime.name == "tensorrt-rtx"
    assert choose("torch-tensorrt", ADA).module == "torch_tensorrt"
    without(monkeypatch, "tensorrt")
    assert choose(None, ADA).runtime.name == "tensorrt-rtx"


def test_a_machine_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch-tensorrt")
    with pytest.raises(SparsepassError, match="builds on a GPU only, and none is here"):
        choose("tensorrt", ())
    said = "\n".join(abilities(()))
    assert "it cannot build here, for want of a GPU; elsewhere it times dense and sparse tactics" in said
    assert "outputs, times and the kernels that were taken stay unknown" in said
    without(monkeypatch, "tensorrt-rtx")
    with pytest.raises(SparsepassError, match="no TensorRT that can build here"):
        choose(None, ())


def test_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SparsepassError, match="known are tensorrt, tensorrt-rtx, torch-tensorrt"):
        find("trt")


def test_gpus_are_asked_from_the_driver() -> None:
    found = gpus()
    assert all(gpu.sm >= 50 and gpu.name for gpu in found)


def installed(name: str) -> Installed:
    return Installed(runtime=RUNTIMES[name], module=RUNTIMES[name].modules[0], version="0")


def test_targets_of_each_package() -> None:
    rtx, standard = installed("tensorrt-rtx"), installed("tensorrt")
    assert resolve_targets(TensorRT(), rtx, ()) == AHEAD_OF_TIME
    assert resolve_targets(TensorRT(), rtx, ADA) == (89,)
    assert resolve_targets(TensorRT(sm=(86,)), rtx, ADA) == (86,)
    assert resolve_targets(TensorRT(sm=(89,)), standard, ADA) == ()
    with pytest.raises(SparsepassError, match="GeForce RTX 4090 \\(SM89\\), and --sm asks for SM86"):
        resolve_targets(TensorRT(sm=(86,)), standard, ADA)
    for package in (rtx, standard):
        with pytest.raises(SparsepassError, match="SM75 \\(Turing\\) has no 2:4 kernels"):
            resolve_targets(TensorRT(), package, TURING)


def test_every_extra_is_there() -> None:
    text = (Path(__file__).parents[4] / "pyproject.toml").read_text(encoding="utf-8")
    for row in RUNTIMES.values():
        assert re.search(rf"^{row.extra} = \[", text, re.MULTILINE)


def names_called(path: Path) -> set[str]:
    """Attributes of TensorRT's objects that a module uses: those reached from names that hold such an object."""
    holders = {"trt"}
    if path == CHILD:
        holders |= {"builder", "network", "parser", "config", "made", "cache", "engine", "tensor", "error"}
    kept = {"_runtime", "_engine", "_context"}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            value: Any = node.value
            while isinstance(value, ast.Attribute | ast.Call) and getattr(value, "attr", "") not in kept:
                value = value.value if isinstance(value, ast.Attribute) else value.func
            if getattr(value, "id", "") in holders or getattr(value, "attr", "") in kept:
                found.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("_call", "getattr"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str) and a.value}
    return found - {"__members__", "__version__", "__init__", "errors", "log_tells_more", "unknown", "write_bytes"}


RUN = CHILD.with_name("verify.py")


@pytest.mark.parametrize(("path", "fewest"), [(CHILD, 25), (RUN, 12)])
def test_every_name_that_is_used_is_in_each_library(path: Path, fewest: int) -> None:
    """What a release adds, such as `node_operator` of an error, is asked for with a way out."""
    used = names_called(path)
    assert len(used) > fewest
    assert len(TENSORRT) == 2
    for name in TENSORRT:
        assert used - ONLY_RTX - set(RECORDED[name]["names"].split()) == set(), name
    assert used - set(members(rtx_module())) == set()
    if path == CHILD:
        assert used >= ONLY_RTX
        assert not ONLY_RTX & set(RECORDED[TENSORRT[-1]]["names"].split())


def test_every_method_that_is_called_has_its_arguments_checked() -> None:
    """`CALLS` is complete."""
    called = {
        node.func.attr
        for path in (CHILD, RUN)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names_called(path)
    }
    made = {"Builder", "OnnxParser", "Runtime", "Logger"}
    without_arguments = {"serialize", "desc", "node_name", "node_operator"}
    assert called - made - without_arguments - ONLY_RTX - {name.split(".")[1] for name in CALLS} == set()


def rtx_module() -> Any:
    found = find("tensorrt-rtx")
    if found is None:
        pytest.skip("tensorrt-rtx is to be had for Linux and Windows on x86-64 only")
    return importlib.import_module(found.module)


def can_be_called(overloads_of_it: list[list[str]], arguments: tuple[str, ...]) -> bool:
    """Whether an overload takes these by position, in this order, and has a default for all others."""
    number = len(arguments)
    return any(
        tuple(name.removesuffix("=") for name in names[:number]) == arguments and all(n.endswith("=") for n in names[number:])
        for names in overloads_of_it
    )


def test_calls_that_do_not_fit_are_told() -> None:
    assert can_be_called([["a", "b"], ["a", "b", "c"]], ("a", "b"))
    assert can_be_called([["a", "b="]], ("a",))
    assert not can_be_called([["a", "b"]], ("a",))
    assert not can_be_called([["b", "a"]], ("a", "b"))
    assert not can_be_called([], ())


@pytest.mark.parametrize("method", CALLS)
def test_arguments_are_those_of_each_library(method: str) -> None:
    for name in TENSORRT:
        assert can_be_called(RECORDED[name]["calls"][method], CALLS[method]), name
    assert can_be_called(overloads(rtx_module(), method), CALLS[method])


def test_targets_are_told_to_tensorrt_rtx_in_its_order() -> None:
    assert overloads(rtx_module(), "IBuilderConfig.set_compute_capability") == [["compute_capability", "index"]]
