"""Opening whatever can be compared (modules, programs and files), running it, and what it returned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsepass.graph.equivalence.artifact import Artifact, CallNumbers, Inputs, ModuleArtifact, ProgramArtifact
from sparsepass.graph.equivalence.onnx_file import OnnxFile
from sparsepass.graph.program import Program
from sparsepass.graph.saved import PROGRAM_FILE
from sparsepass.graph.support import EquivalenceError, SparsepassError, check_inside, first_line


class Outputs(dict[str, Tensor]):
    """What an artifact returned: a mapping of flat output names to tensors. Final.

    Attributes:
        layers: Module path -> result of that layer, in the order in which layers finish; empty unless asked for. A
            later call of the same module is named ``path#1``.
    """

    def __init__(self, tensors: Mapping[str, Tensor], layers: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.layers = layers


def run(artifact: Any, inputs: Inputs, *, layers: bool = False) -> Outputs:
    """Run a model, a program or an ONNX file, and give its outputs flat names.

    Modules run in evaluation mode without gradients; models of transformers without a cache. Afterwards they are as
    they were. An ONNX decoder with a cache starts from an empty one. Inputs go to the artifact's device; floating
    inputs take its dtype.

    Args:
        artifact: An nn.Module, a Program, a Hierarchy, or the path of an ONNX file, of a folder holding ``model.onnx``
            (or one ONNX file of another name), or of a saved program.
        inputs: Name -> tensor; for modules that take positions, a tensor or a tuple will do.
        layers: Whether the results of layers are kept too (which needs memory for all of them).

    Returns:
        A mapping of output names, such as ``logits`` (``output`` for a bare tensor), to tensors.

    Raises:
        EquivalenceError: If it is none of these, or cannot be run with these inputs.

    Example:
        >>> import torch
        >>> outputs = run(torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.ones(2, 8), layers=True)
        >>> {name: tuple(t.shape) for name, t in outputs.items()}, list(outputs.layers)
        ({'output': (2, 4)}, ['0'])
    """
    opened = open_artifact(artifact)
    kept: dict[str, Tensor] = {}
    numbers = CallNumbers()

    def keep(path: str, value: Tensor) -> None:
        kept[numbers.name(path)] = value.detach().clone()  # later operators may work in place

    return Outputs(outputs_of(opened, inputs, keep if layers else None), kept)


def outputs_of(artifact: Artifact, inputs: Inputs, observe: Any) -> dict[str, Tensor]:
    """Run an opened artifact; errors of its own code are told as ours."""
    try:
        outputs = artifact.run(inputs, observe)
    except SparsepassError:
        raise
    except Exception as error:  # the code of any model runs here
        named = inputs.items() if isinstance(inputs, Mapping) else enumerate([inputs] if isinstance(inputs, Tensor) else inputs)
        given = ", ".join(f"{name} {list(t.shape)} {t.dtype}" for name, t in named if isinstance(t, Tensor))
        raise EquivalenceError(
            f"{artifact.description} cannot be run with these inputs ({given}): {type(error).__name__}: {first_line(error)}"
        ) from error
    if not outputs:
        raise EquivalenceError(f"{artifact.description} returns no tensors, so there is nothing to compare")
    return outputs


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
    check_inside(path)
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
