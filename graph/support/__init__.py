"""What every other room uses: errors, files, progress, memory, arithmetic."""

from sparsepass.graph.support.contexts import (
    count_progress,
    counted,
    default_dtype,
    evaluating,
    item_progress,
    quiet_export,
    quiet_loading,
    shows_progress,
)
from sparsepass.graph.support.devices import AUTO, find_device, free_bytes
from sparsepass.graph.support.errors import CaptureError, EquivalenceError, PassError, ProgramFormatError, SparsepassError
from sparsepass.graph.support.files import (
    WEIGHTS_FILE,
    WEIGHTS_INDEX,
    check_free,
    check_place,
    check_writable,
    path_named,
    replaced_file,
    replaced_folder,
    weights_index,
    write_text,
)
from sparsepass.graph.support.machine import fast_low_precision, give_back_freed_memory, package_version
from sparsepass.graph.support.option_text import build, item_to_text, parse_items
from sparsepass.graph.support.words import closest, first_line, how_to_install, is_open, name_matches, nearest

__all__ = [
    "AUTO",
    "WEIGHTS_FILE",
    "WEIGHTS_INDEX",
    "CaptureError",
    "EquivalenceError",
    "PassError",
    "ProgramFormatError",
    "SparsepassError",
    "build",
    "check_free",
    "check_place",
    "check_writable",
    "closest",
    "count_progress",
    "counted",
    "default_dtype",
    "evaluating",
    "fast_low_precision",
    "find_device",
    "first_line",
    "free_bytes",
    "give_back_freed_memory",
    "how_to_install",
    "is_open",
    "item_progress",
    "item_to_text",
    "name_matches",
    "nearest",
    "package_version",
    "parse_items",
    "path_named",
    "quiet_export",
    "quiet_loading",
    "replaced_file",
    "replaced_folder",
    "shows_progress",
    "weights_index",
    "write_text",
]
