"""The builder's child process: time limit, native crashes, refusals, and nothing half-written."""

import os
import sys
import time
from pathlib import Path

import pytest
from tests.export.targets.tensorrt.fake import FAKE

from sparsepass.export.targets.tensorrt.build import BuildError, BuildRequest, build_engine, run_child
from sparsepass.export.targets.tensorrt.profiles import Shapes


@pytest.fixture
def request_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "RequestFor":
    return RequestFor(tmp_path, monkeypatch)


class RequestFor:
    """Makes the request for a build whose builder does what a line of Python says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        monkeypatch.setenv("PYTHONPATH", str(folder))

    def __call__(self, build: str, **changes: object) -> BuildRequest:
        (self._folder / "faketrt.py").write_text(f"{FAKE}\n\ndef build():\n    {build}\n")
        fields: dict[str, object] = {
            "module": "faketrt",
            "onnx": self._folder / "model.onnx",
            "engine": self._folder / "model.engine",
            "log": self._folder / "model.log",
            "profiles": (Shapes(name="model", shapes={}),),
        }
        return BuildRequest(**(fields | changes))  # type: ignore[arg-type]


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name not in ("faketrt.py", "__pycache__", "model.log")}


def test_an_engine_appears_whole(request_for: RequestFor, tmp_path: Path) -> None:
    built = build_engine(request_for("return b'engine'"), timeout_s=60)
    assert (built.version, built.num_layers, built.size_bytes, built.inspection) == ("0.0", 3, 6, None)
    assert (tmp_path / "model.engine").read_bytes() == b"engine"
    assert left(tmp_path) == {"model.engine"}
    assert "[I] flag SPARSE_WEIGHTS" in (tmp_path / "model.log").read_text()


def test_the_flag_is_set_only_if_asked_for(request_for: RequestFor, tmp_path: Path) -> None:
    build_engine(request_for("return b'engine'", sparse=False), timeout_s=60)
    assert "SPARSE_WEIGHTS" not in (tmp_path / "model.log").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_a_native_crash_is_an_error_message(request_for: RequestFor, tmp_path: Path) -> None:
    request = request_for("print('last words', flush=True); import ctypes; ctypes.string_at(0)")
    with pytest.raises(BuildError, match="crashed with SIGSEGV") as caught:
        build_engine(request, timeout_s=60)
    said = str(caught.value)
    assert "model.engine cannot be built" in said
    assert "[I] building\n  last words" in said, "the log's last lines, in order"
    assert left(tmp_path) == set()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_a_child_that_is_killed_hints_at_memory(request_for: RequestFor) -> None:
    with pytest.raises(BuildError, match="SIGKILL; the machine may be out of memory"):
        build_engine(request_for("os.kill(os.getpid(), 9)"), timeout_s=60)


def test_a_build_that_takes_too_long_is_ended(request_for: RequestFor, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    request = request_for(f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    started = time.monotonic()
    with pytest.raises(BuildError, match=r"(?s)not built within 3 s.*--timeout.*  \[I\] building"):
        build_engine(request, timeout_s=3)
    assert time.monotonic() - started < 60
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert left(tmp_path) == {"pid"}


def test_a_builder_that_returns_nothing_tells_why(request_for: RequestFor, tmp_path: Path) -> None:
    request = request_for("LOG.log(Severity.ERROR, 'no tactic for node_7'); return None")
    with pytest.raises(BuildError, match="no tactic for node_7"):
        build_engine(request, timeout_s=60)
    assert left(tmp_path) == set()


def test_an_exception_in_the_child_is_shown(request_for: RequestFor) -> None:
    with pytest.raises(BuildError, match=r"(?s)exit code 1 .*RuntimeError: odd"):
        build_engine(request_for("raise RuntimeError('odd')"), timeout_s=60)


def test_a_module_that_cannot_be_imported_is_named(request_for: RequestFor) -> None:
    with pytest.raises(BuildError, match="no_such_tensorrt cannot be imported"):
        build_engine(request_for("pass", module="no_such_tensorrt"), timeout_s=60)


def test_targets_need_a_builder_that_takes_them(request_for: RequestFor) -> None:
    with pytest.raises(BuildError, match="builds for the GPU it runs on, and cannot be told SM86"):
        build_engine(request_for("return b''", capabilities=(86,)), timeout_s=60)


def test_measured_times_are_kept(request_for: RequestFor, tmp_path: Path) -> None:
    cache = tmp_path / "times"
    build_engine(request_for("return b'engine'", timing_cache=cache), timeout_s=60)
    assert cache.read_bytes() == b"times"
    cache.write_bytes(b"damaged")
    with pytest.raises(BuildError, match=r"the timing cache .*times is of another TensorRT or GPU, or damaged; delete it"):
        build_engine(request_for("return b'engine'", timing_cache=cache), timeout_s=60)
    assert cache.read_bytes() == b"damaged", "it is the user's to delete"


def test_a_child_without_a_word(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"ended with exit code 3 .*\nIts log is empty"):
        run_child([sys.executable, "-c", "raise SystemExit(3)"], {}, log=tmp_path / "log", timeout_s=60, what="x")
