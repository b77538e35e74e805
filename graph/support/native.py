"""Names of files that libraries in other languages can open."""

import functools
import hashlib
import os
import tempfile
from pathlib import Path


def native_path(path: str | Path) -> Path:
    r"""The path itself or, where its bytes are no UTF-8, another name of the same file or folder.

    A file system takes any bytes for a name, and Python passes them on. Libraries written in Rust and C++ (safetensors,
    tokenizers, onnx) take UTF-8 only. The other name is a symbolic link in a folder of this process that goes with it.

    Args:
        path: Of something that is there.

    Example:
        >>> native_path("model").name, is_utf8("caf\udce9")
        ('model', False)
    """
    found = Path(path)
    if is_utf8(str(found)):
        return found
    return _linked(os.getpid(), found.absolute())


def is_utf8(name: str) -> bool:
    """Whether a name is made of characters: bytes that are none are lone surrogates in Python's names."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_utf8(name: str) -> str:
    r"""A name with a question mark for each byte that is no character.

    Example:
        >>> as_utf8("caf\udce9")
        'caf?'
    """
    return name.encode(errors="replace").decode()


@functools.cache
def _linked(process: int, path: Path) -> Path:
    place = Path(_links(process).name, f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}{as_utf8(path.suffix)}")
    place.symlink_to(path, target_is_directory=path.is_dir())
    return place


@functools.cache
def _links(process: int) -> "tempfile.TemporaryDirectory[str]":
    """The folder of links of a process: a fork has another one."""
    return tempfile.TemporaryDirectory(prefix=f"sparsepass-names-{process}-")
