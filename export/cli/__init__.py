"""The command line: one file for each command."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.cli.app import main as main, sparse_export as sparse_export
    from sparsepass.export.cli.demo import smollm2 as smollm2
else:
    from sparsepass._lazy import face

    __getattr__, __dir__, __all__ = face(__name__, __file__)
