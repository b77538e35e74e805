"""Commands run as in a shell, and the programs that they write compared."""

from pathlib import Path

import torch
import typer
from typer.testing import CliRunner, Result

from sparsepass.export.cli import app as cli
from sparsepass.graph import Program


def run(*arguments: object, app: typer.Typer = cli.app) -> Result:
    """Run a command of the command line; what it raises but for its exit is raised here."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def weights(folder: Path) -> dict[str, torch.Tensor]:
    program = Program.load(folder)
    return dict(program.named_parameters()) | {s.mask: program.tensor(s.mask) for s in program.sparse.values() if s.mask}


def same(a: Path, b: Path) -> bool:
    found, other = weights(a), weights(b)
    return found.keys() == other.keys() and all(torch.equal(found[name], other[name]) for name in found)
