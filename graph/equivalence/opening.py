"""Opening whatever can be compared: modules, programs and files."""

from pathlib import Path
from typing import Any

from torch import nn

from sparsepass.graph.equivalence.artifact import Artifact, ModuleArtifact, ProgramArtifact
from sparsepass.graph.equivalence.onnx_file import OnnxFile
from sparsepass.graph.program import Program
from sparsepass.graph.saved import PROGRAM_FILE
from sparsepass.graph.support import EquivalenceError


def open_artifact(source: Any) -> Artifact:
    """Take a module, a program, or the path of an ONNX file, of a folder holding one, or of a saved program.

    Raises:
        EquivalenceError: If it is none of these.
    """
    if isinstance(source, Artifact):
        return source
    if isinstance(source, Program):
        return ProgramArtifact(source)
    if isinstance(source, nn.Module):
        return ModuleArtifact(source)
    if isinstance(source, str | Path):
        return _open_path(Path(source))
    raise EquivalenceError(
        f"a {type(source).__name__} cannot be compared: expected an nn.Module, a Program, or the path of an ONNX file, "
        "of a folder holding model.onnx, or of a saved program; load a checkpoint first"
    )


def _open_path(path: Path) -> Artifact:
    if path.is_file() and path.name != PROGRAM_FILE:
        return OnnxFile(path)
    if path.is_file():
        path = path.parent
    if not path.is_dir():
        raise EquivalenceError(f"{path} does not exist; check the path")
    if (path / PROGRAM_FILE).is_file():
        return ProgramArtifact(Program.load(path))
    files = sorted(path.glob("*.onnx"))
    if (path / "model.onnx").is_file():
        files = [path / "model.onnx"]
    if len(files) != 1:
        found = f"several ONNX files ({', '.join(f.name for f in files)})" if files else "neither model.onnx"
        raise EquivalenceError(
            f"{path} holds {found}" + ("; name one of them" if files else f" nor {PROGRAM_FILE}; load the model first")
        )
    return OnnxFile(files[0])
