"""What is installed: a wheel holds every file of the tree, and a checkout without symbolic links says what to do."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.installed import kernels_of

ROOT = Path(__file__).parents[1]
LIBRARIES = {f"graph/native/libsparsepass.{ending}" for ending in ("so", "dylib")}  # compiled, where there is a compiler
FOLDERS = ("graph", "passes", "retrain", "export")
_LEFT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "demo-out", "benchmarks", "tests")


def tree() -> set[str]:
    """The files that an installation needs, as paths below the package."""
    own = {path.name for path in (ROOT / "src" / "sparsepass").iterdir() if path.is_file()}
    files = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
    return own | {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts} - LIBRARIES


def test_a_wheel_holds_every_file_of_the_tree_and_no_other(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    shutil.copytree(ROOT, tmp_path / "tree", symlinks=True, ignore=_LEFT)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(tmp_path / "tree")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("sparsepass/")}
    compiled = {f"sparsepass/{name}" for name in LIBRARIES} & names
    assert names - compiled == {f"sparsepass/{name}" for name in tree()}
    # The library knows neither Python nor torch, and a wheel without it runs anywhere.
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")
    assert (platform == "any") == (not compiled)
    if shutil.which("g++") and sys.platform == "linux":
        assert compiled, done.stderr
        assert "bf16: " in kernels_of(wheel)


def test_without_a_compiler_it_is_installed_all_the_same(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    shutil.copytree(ROOT, tmp_path / "tree", symlinks=True, ignore=_LEFT)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        env={**os.environ, "CXX": str(tmp_path / "no-compiler")},
        cwd=tmp_path / "tree",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the kernels for packed weights were not compiled" in done.stderr
    assert not list((tmp_path / "tree" / "build").rglob("libsparsepass.*"))


@pytest.mark.parametrize("left", ["text files", "nothing"])
def test_a_package_without_its_folders_says_what_to_do(left: str, tmp_path: Path) -> None:
    package = tmp_path / "sparsepass"
    package.mkdir()
    for path in (ROOT / "src" / "sparsepass").iterdir():
        if path.is_file():
            shutil.copy(path, package)
        elif path.is_symlink() and left == "text files":
            (package / path.name).write_text(os.readlink(path), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", "import sparsepass"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "git config core.symlinks true" in done.stderr
