"""The house rules that a machine can check: lint, format, types, imports, tables without gaps, documentation that is true."""

import ast
import dataclasses
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest
from tests.export.cli import documentation

from sparsepass.export import TARGETS
from sparsepass.passes.criteria.table import CRITERIA
from sparsepass.passes.table import PASSES

ROOT = Path(__file__).parents[1]
ORDER = ("graph", "passes", "retrain", "export")
SOURCES = {folder: sorted((ROOT / folder).rglob("*.py")) for folder in ORDER}


def tool(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_lint() -> None:
    tool("ruff", "check")


def test_format() -> None:
    tool("ruff", "format", "--check")


def test_types() -> None:
    tool("mypy")


def test_no_ten_lines_stand_twice() -> None:
    tool("pylint", *ORDER)


def test_imports_keep_their_contracts() -> None:
    """Layers of the four folders and of the rooms in export/, and no circle; see pyproject.toml."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_rooms_are_entered_by_their_faces() -> None:
    graph = grimp.build_graph("sparsepass", cache_dir=None)
    rooms = {module for module in graph.modules if module.count(".") >= 2 and graph.find_children(module)}
    rooms.discard("sparsepass.export.targets")  # each target is a room of its own
    found = []
    for module in graph.modules - {"sparsepass"}:
        for used in graph.find_modules_directly_imported_by(module):
            around = [room for room in rooms if used.startswith(f"{room}.") and not f"{module}.".startswith(f"{room}.")]
            found += [f"{module} imports {used}; import from {min(around)}"] if around else []
    assert not found, "\n".join(sorted(found))


def test_the_picture_of_the_architecture_is_that_of_the_code() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "draw_architecture.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", [*ORDER, "src"])
def test_files_and_functions_are_short(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py") if folder != "src" else (ROOT / folder / "sparsepass").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 450, f"{path} is longer than 450 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
                assert length <= 80, f"the body of {node.name} in {path} is longer than 80 lines"


@pytest.mark.parametrize("folder", ORDER)
def test_every_module_tells_what_it_is(folder: str) -> None:
    for path in SOURCES[folder]:
        assert path.read_text(encoding="utf-8").startswith('"""'), f"{path} has no docstring"


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_has_a_file_and_its_documentation(name: str) -> None:
    assert (ROOT / "passes" / f"{name}.py").is_file()
    text = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    assert f"## `{name}`" in text
    for field in dataclasses.fields(PASSES[name]):
        assert f"| `{field.name}` |" in text, f"docs/passes.md does not tell of {name}'s {field.name}"


def test_no_two_classes_bear_one_name() -> None:
    homes: dict[str, list[str]] = {}
    for path in (path for folder in ORDER for path in SOURCES[folder]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name.lstrip("_"), []).append(str(path.relative_to(ROOT)))
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


def test_every_pass_file_is_in_the_table() -> None:
    for path in SOURCES["passes"]:
        if re.search(r"^class \w+\(Pass\)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert path.stem in PASSES, f"{path} defines a pass that the table lacks"


def test_every_criterion_has_a_file_and_its_documentation() -> None:
    text = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    files = {path.stem for path in (ROOT / "passes" / "criteria").glob("*.py")} - {
        "__init__",
        "table",
        "criterion",
        "joint",
        "refinement",
    }
    assert files == set(CRITERIA)
    for name in CRITERIA:
        assert f"| `{name}` |" in text


def test_every_target_has_a_file_a_test_and_its_documentation() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name in TARGETS:
        assert (ROOT / "export" / "targets" / name).is_dir()
        assert list((ROOT / "tests" / "export" / "targets" / name).glob("test_*.py")), f"no test of the target {name}"
        assert f"| `{name}` |" in text


def test_every_command_is_documented_with_its_options() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for command in documentation.commands():
        section = text.partition(f"## `sparsepass {command}`\n")[2].partition("\n## ")[0]
        assert "| option | meaning |" in section, f"docs/cli.md does not tell of {command}"
    assert text == documentation.whole(), "docs/cli.md is old: python -m tests.export.cli.documentation"


def test_no_loading_runs_or_asks_for_code_that_came_with_a_model() -> None:
    """Where trust_remote_code is not said, transformers asks on standard input, and runs the code on a yes."""
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in itertools.chain(*SOURCES.values())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
        and ast.unparse(node.func.value) != "PeftModel"
        and "trust_remote_code" not in {keyword.arg for keyword in node.keywords}
    ]
    assert not silent


def test_no_file_names_a_machine() -> None:
    found = []
    for path in tracked():
        if path.suffix in (".py", ".md", ".toml", ".yml", ".yaml", ".json", ".txt", ".sh", "") and path != Path(__file__):
            text = path.read_text(encoding="utf-8", errors="ignore")
            found += [f"{path}: {place}" for place in re.findall(r"(?<![\w.$}])/(?:work|farm|root|home)/[\w.]+", text)]
    assert not found


def test_the_changelog_knows_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_readme_is_true_about_names() -> None:
    """Every name that the README's Python uses is there."""

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for package, names in re.findall(r"^from (sparsepass[\w.]*) import (.+)$", text, re.MULTILINE):
        for name in names.split(","):
            assert name.strip() in sys.modules[package].__all__


def test_links_in_the_documentation_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_what_is_installed_is_installable_from_a_checkout_too() -> None:
    """`pip install sparsepass` works from an index alone, so the way from a checkout stands beside it (how_to_install)."""
    named = re.compile(r"pip install [\"'\\]*sparsepass")
    for path in itertools.chain(*SOURCES.values()):
        for line in path.read_text(encoding="utf-8").splitlines():
            if path.name != "words.py" and named.search(line):
                assert "pip install -e" in line, f"{path}: {line.strip()} (how_to_install says both)"
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for index, line in enumerate(lines):
            if named.search(line):
                assert "pip install -e" in "\n".join(lines[max(index - 6, 0) : index + 7]), f"{path.name}:{index + 1}"
