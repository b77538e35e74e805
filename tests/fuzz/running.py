"""Runs cases of a kind in a forked child under limits, and keeps those that fail."""

import base64
import contextlib
import functools
import hashlib
import importlib
import json
import os
import pkgutil
import resource
import shutil
import signal
import tempfile
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
from tests.fuzz import kinds
from tests.fuzz.kind import Files, Kind

from sparsepass.graph import SparsepassError

CORPUS = Path(__file__).parent / "corpus"
SECONDS, BYTES = 60, 2 * 2**30
"""What one case may take."""


@functools.cache
def all_kinds() -> dict[str, Kind]:
    """Name -> kind, for every module in `tests.fuzz.kinds`."""
    modules = [importlib.import_module(f"{kinds.__name__}.{info.name}") for info in pkgutil.iter_modules(kinds.__path__)]
    return {module.KIND.name: module.KIND for module in modules}


@dataclass(kw_only=True)
class Outcome:
    """What became of some cases.

    Attributes:
        counts: How often the file was ``read`` and how often ``refused``.
        failures: What went wrong, and the files that did it.
    """

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, Files]] = field(default_factory=list)


@functools.cache
def sound_folder(name: str) -> Path:
    """A folder with a sound file of that kind, made once."""
    place = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    all_kinds()[name].sound(place)
    return place


@contextlib.contextmanager
def folder_with(name: str, files: Files) -> Iterator[Path]:
    """A copy of the sound folder in which some files are others."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch, "case")
        shutil.copytree(sound_folder(name), place)
        for file, content in files.items():
            (place / file).unlink(missing_ok=True)
            if content is not None:
                (place / file).write_bytes(content)
        yield place


def read_once(name: str, files: Files) -> str:
    """Read one case: ``read`` or ``refused``; anything but a refusal in words is raised."""
    with folder_with(name, files) as place:
        try:
            all_kinds()[name].read(place)
        except SparsepassError as error:
            words = str(error)
            if not words or "\n" in words:
                raise RuntimeError(f"a refusal is one line of words: {words!r}") from error
            return "refused"
    return "read"


def run_cases(name: str, seed: int, number: int) -> Outcome:
    """Read some damaged files in a child of ours. A child that dies is a failure of the case that it was at."""
    sound_folder(name)
    with tempfile.TemporaryDirectory() as folder:
        log, child = Path(folder, "log"), os.fork()
        if child == 0:
            status = 1
            try:
                _work(name, seed, number, log)
                status = 0
            except BaseException:  # noqa: BLE001  (the child ends here, whatever it was)
                traceback.print_exc()
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        return _outcome(log, os.waitstatus_to_exitcode(ended))


def _work(name: str, seed: int, number: int, log: Path) -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it kills, in the middle of native code too

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=number, deadline=None, database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(files=all_kinds()[name].damaged(sound_folder(name)))
    def case(files: Files) -> None:
        with log.open("a") as out:
            out.write(json.dumps({"files": packed(files)}) + "\n")
        signal.alarm(SECONDS)
        try:
            result = {"is": read_once(name, files)}
        except Exception:  # noqa: BLE001  (what comes is the finding)
            result = {"failed": traceback.format_exc()}
        signal.alarm(0)
        with log.open("a") as out:
            out.write(json.dumps(result) + "\n")

    case()


def _outcome(log: Path, status: int) -> Outcome:
    found = Outcome()
    files: Files | None = None
    for line in log.read_text().splitlines() if log.exists() else ():
        entry = json.loads(line)
        if "files" in entry:
            files = unpacked(entry["files"])
            continue
        assert files is not None
        if "failed" in entry:
            found.failures.append((entry["failed"], files))
        else:
            found.counts[entry["is"]] += 1
        files = None
    if status != 0:
        words = f"the child ended with {status}" + (f" (over {SECONDS} s)" if status == -signal.SIGALRM else "")
        found.failures.append((words, files or {}))
    return found


def packed(files: Files) -> dict[str, str | None]:
    """Files as JSON."""
    return {
        name: None if content is None else base64.b64encode(zlib.compress(content, 9)).decode()
        for name, content in files.items()
    }


def unpacked(files: dict[str, str | None]) -> Files:
    """Undo `packed`."""
    return {name: None if text is None else zlib.decompress(base64.b64decode(text)) for name, text in files.items()}


def keep(name: str, words: str, files: Files) -> Path:
    """Write a failure into the corpus, which the tests read again."""
    text = json.dumps({"kind": name, "words": words.strip().splitlines()[-1][:300], "files": packed(files)}, indent=1)
    CORPUS.mkdir(exist_ok=True)
    place = CORPUS / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    place.write_text(text + "\n")
    return place
