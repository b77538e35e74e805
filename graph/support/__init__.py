"""What every other room uses: errors, files, progress, memory, arithmetic."""

from sparsepass._docs import attribute_docs
from sparsepass.graph.support.errors import CaptureError, EquivalenceError, PassError, ProgramFormatError, SparsepassError
from sparsepass.graph.support.files import check_free, replaced_file, replaced_folder, write_text
from sparsepass.graph.support.memory import give_back_freed_memory
from sparsepass.graph.support.names import is_open, name_matches
from sparsepass.graph.support.option_text import build, item_to_text, parse_items
from sparsepass.graph.support.precision import fast_low_precision
from sparsepass.graph.support.progress import item_progress, shows_progress
from sparsepass.graph.support.quiet import quiet_export, quiet_loading
from sparsepass.graph.support.words import closest, first_line, nearest

__all__ = [
    "CaptureError",
    "EquivalenceError",
    "PassError",
    "ProgramFormatError",
    "SparsepassError",
    "attribute_docs",
    "build",
    "check_free",
    "closest",
    "fast_low_precision",
    "first_line",
    "give_back_freed_memory",
    "is_open",
    "item_progress",
    "item_to_text",
    "name_matches",
    "nearest",
    "parse_items",
    "quiet_export",
    "quiet_loading",
    "replaced_file",
    "replaced_folder",
    "shows_progress",
    "write_text",
]
