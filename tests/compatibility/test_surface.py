"""What could be imported, called and typed before can be still: names, parameters, options, defaults."""

import importlib
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
from tests.compatibility.command_line import FIXTURES, commands
from tests.compatibility.surface import PACKAGES, members, parameters

from sparsepass import Program, parse_pipeline, pipeline_to_text
from sparsepass.export import export

BEFORE = json.loads(Path(__file__).with_name("surface.json").read_text(encoding="utf-8"))
ON_PURPOSE = {("sparsepass.export", "Target")}  # a row of a table then, a class that targets come from now (see the changelog)
NAMES = [(package, name) for package in PACKAGES for name in BEFORE["packages"][package] if (package, name) not in ON_PURPOSE]


def lacking(before: dict[str, Any] | None, value: Any, where: str) -> list[str]:
    """Parameters of before that a call does not take any more, or that mean another default.

    What takes any keyword takes the old ones; whether it does right by them is shown where they are used.
    """
    now = parameters(value)
    if before is None or now is None:
        return []
    rest = {p.name for p in inspect.signature(value).parameters.values() if p.kind is p.VAR_KEYWORD}
    gone = [] if rest else [f"{where}: no parameter {name}" for name in before if name not in now]
    needed = [
        f"{where}: {name} is needed now"
        for name, default in now.items()
        if default is None and name not in before.keys() | rest
    ]
    needed += [f"{where}: {name} had a default" for name, d in before.items() if d and name in now and now[name] is None]
    other = [f"{where}: {name} was {d}, is {now[name]}" for name, d in before.items() if d and now.get(name) not in (None, d)]
    return gone + needed + other


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_offered(package: str) -> None:
    assert BEFORE["packages"][package].keys() <= set(getattr(importlib.import_module(package), "__all__", ()))


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_every_parameter_and_member_is_there(package: str, name: str) -> None:
    before, value = BEFORE["packages"][package][name], getattr(importlib.import_module(package), name)
    if before["kind"] == "table":
        assert set(before["keys"]) <= set(value)
        return
    found = lacking(before["parameters"], value, name)
    if before["kind"] == "class":
        now = members(value)
        found += [f"{name}.{member} is gone" for member in before["members"] if member not in now]
        methods = {member: of for member, of in before["members"].items() if of is not None and member in now}
        found += [said for member, of in methods.items() for said in lacking(of, getattr(value, member), f"{name}.{member}")]
    assert not found


@pytest.mark.parametrize("path", BEFORE["documented"])
def test_what_the_documentation_imported_is_there(path: str) -> None:
    """It may warn that the name has another home now."""
    module, _, name = path.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert hasattr(importlib.import_module(module), name)


NEW_DEFAULTS = {
    # May be repeated, for several files; a single one is what it was.
    ("sparse-export", "--calibration", "multiple"): (False, True),
    ("sparsepass criteria", "--calibration", "multiple"): (False, True),
    ("sparsepass export", "--calibration", "multiple"): (False, True),
    ("sparsepass prune", "--calibration", "multiple"): (False, True),
    ("sparsepass sensitivity", "--calibration", "multiple"): (False, True),
    # So may the texts of an evaluation.
    ("sparse-export", "--eval-text", "multiple"): (False, True),
    ("sparsepass compare", "--text", "multiple"): (False, True),
    ("sparsepass criteria", "--eval-text", "multiple"): (False, True),
    ("sparsepass eval", "--text", "multiple"): (False, True),
    ("sparsepass export", "--eval-text", "multiple"): (False, True),
    ("sparsepass prune", "--eval-text", "multiple"): (False, True),
    ("sparsepass retrain", "--eval-text", "multiple"): (False, True),
    # It prints, as that of every other command; with the name of a .json file behind it, it writes that, as before.
    ("sparsepass criteria", "--json", "is_flag"): (False, True),
    ("sparsepass criteria", "--json", "default"): ("None", "False"),
    # It is said as a word now: auto takes the GPU, where there is one.
    ("sparsepass sample", "--device", "default"): ("None", "'auto'"),
    # A quantized program has values of its own; it is bf16 as before for others.
    ("sparse-export", "--values", "default"): ("'bf16'", "None"),
    ("sparsepass export", "--values", "default"): ("'bf16'", "None"),
    # It depends on the device now, and is what it was on every device of before.
    ("sparsepass plan", "--runtime", "default"): ("'tensorrt-llm'", "None"),
}


@pytest.mark.parametrize("command", BEFORE["commands"])
def test_every_option_is_there_with_its_default(command: str) -> None:
    now = commands()
    assert command in now
    found = []
    for name, before in BEFORE["commands"][command].items():
        there = now[command].get(name)
        if there is None:
            found.append(f"{name} is gone")
        else:
            changed = {key: was for key, was in before.items() if there[key] != was}
            found += [
                f"{name}: {key} was {was}, is {there[key]}"
                for key, was in changed.items()
                if NEW_DEFAULTS.get((command, name, key)) != (was, there[key])
            ]
    assert not found


def test_no_new_argument_is_needed() -> None:
    now = commands()
    for command, before in BEFORE["commands"].items():
        assert {name for name, about in now[command].items() if about["required"]} <= before.keys(), command


@pytest.mark.parametrize(("text", "written"), json.loads((FIXTURES / "pipelines.json").read_text(encoding="utf-8")).items())
def test_a_pipeline_of_before_means_the_same(text: str, written: str) -> None:
    assert pipeline_to_text(parse_pipeline(text)) == written
    assert pipeline_to_text(parse_pipeline(written)) == written


def test_export_takes_its_keywords_of_before(tmp_path: Path) -> None:
    """Those that belong to a target may warn; they do what they did."""
    program = Program.load(FIXTURES / "out/pruned")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = export(program, "onnx", tmp_path / "onnx", dtype="float16", opset=18, task="text-generation", progress=False)
    assert found.held is True
    artifact = found.report["artifact"]
    assert artifact["dtype"] == "float16"
    assert {each.version for each in onnx.load(tmp_path / "onnx/model.onnx").opset_import if not each.domain} == {18}
