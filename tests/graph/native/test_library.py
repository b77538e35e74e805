"""Finding, loading and choosing compiled kernels."""

import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsepass import SparsepassError
from sparsepass.graph.native import KINDS, PATHS, VARIABLE, available_paths, best_path, library
from sparsepass.graph.packed import PackedLinear, pack, unpack

COMPILED = pytest.mark.skipif(not library.library_file().is_file(), reason="no library was compiled: there is no C++ compiler")
WEIGHT = torch.tensor([[0, 1.0, 2.0, 0, 0, 3.0, 0, 4.0]])


def _forget() -> None:
    library.kernels.cache_clear()
    library.find_kernels.cache_clear()


@pytest.fixture
def _no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(library, "library_file", lambda: tmp_path / "libsparsepass.so")
    _forget()
    yield
    _forget()


def product(weight: Tensor = WEIGHT) -> Tensor:
    y: Tensor = PackedLinear.from_packed(pack(weight)).lay_out()(torch.ones(1, 8))
    return y


@pytest.mark.usefixtures("_no_library")
def test_without_a_library_everything_works_and_that_is_said_once(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.warns(UserWarning, match=r"were not compiled .*many times slower.*Install a C\+\+ compiler"):
        assert best_path("bf16") == "torch"
    assert product().item() == 10
    assert torch.equal(unpack(pack(WEIGHT)).float(), WEIGHT)
    assert not [each for each in recwarn if "compiled" in str(each.message)]


@pytest.mark.usefixtures("_no_library")
def test_whoever_asks_for_torch_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    assert product().item() == 10


@COMPILED
@pytest.mark.parametrize("kind", KINDS)
def test_the_fastest_path_is_taken_and_any_can_be_asked_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    have = available_paths(kind)
    assert have[-2:] == ("generic", "torch")
    assert best_path(kind) == have[0]
    for path in have:
        monkeypatch.setenv(VARIABLE, path)
        assert best_path(kind) == path
    assert product().item() == 10


def test_a_path_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "avx51")
    with pytest.raises(SparsepassError, match="SPARSEPASS_KERNEL is 'avx51', which names no kernel; did you mean 'avx512'"):
        best_path("bf16")


def test_a_path_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "avx512")
    monkeypatch.setattr(library, "available_paths", lambda _: ("generic", "torch"))
    with pytest.raises(SparsepassError, match="avx512, and there is no such kernel for bf16 here: generic, torch"):
        best_path("bf16")


def test_files_that_are_no_library_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "libsparsepass.so"
    with pytest.raises(SparsepassError, match="were not compiled"):
        library.load(file)
    file.write_bytes(b"no library")
    with pytest.raises(SparsepassError, match="cannot be loaded"):
        library.load(file)


@COMPILED
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "VERSION", 99)
    with pytest.raises(SparsepassError, match="are of version 3, and this sparsepass needs 99"):
        library.load(library.library_file())


@COMPILED
def test_numbers_are_those_of_the_interface() -> None:
    text = library.library_file().with_name("interface.h").read_text(encoding="utf-8")
    for kind, number in KINDS.items():
        assert f"k{kind.capitalize()} = {number}" in text
    for path, number in PATHS.items():
        assert path == "torch" or f"k{path.capitalize()} = {number}" in text
    fields = text.partition("struct SparsepassWeight {")[2].partition("};")[0]
    found = [name.strip("* ,;") for line in fields.splitlines() for name in line.partition("//")[0].split()[1:] if name]
    found = [name for name in found if name not in ("void", "uint16_t", "float", "")]
    assert found == [name for name, *_ in library.NativeWeight._fields_]
    assert set(library._FUNCTIONS) == set(re.findall(r"^\w+ sparsepass_(\w+)\(", text, re.MULTILINE))


@COMPILED
@pytest.mark.skipif(sys.platform != "linux", reason="torch brings its own OpenMP runtime on Linux only")
def test_threads_are_those_of_torch() -> None:
    entry = library.openmp()
    if entry is None:
        pytest.skip("this torch brings no libgomp")
    assert entry.value
    (file,) = (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")
    assert ctypes.cast(ctypes.CDLL(str(file)).GOMP_parallel, ctypes.c_void_p).value == entry.value


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    weight.view(512, 128, 4)[..., 2:] = 0
    x = torch.randn(3, 512)
    try:
        results = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(PackedLinear.from_packed(pack(weight)).lay_out()(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_room_is_entered_without_torch() -> None:
    """The kernels know addresses, not tensors."""
    code = "import sys, sparsepass; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
