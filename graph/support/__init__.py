"""What every other room uses: errors, files, progress, memory, arithmetic."""

from sparsepass.graph.support.checksums import (
    CHECKSUMS_FILE,
    ChecksumWarning,
    FileChange,
    changed_files,
    checksums_follow,
    file_sha256,
    write_checksums,
)
from sparsepass.graph.support.contexts import (
    count_progress,
    counted,
    default_dtype,
    evaluating,
    item_progress,
    one_at_a_time,
    quiet_export,
    quiet_loading,
    shows_progress,
)
from sparsepass.graph.support.devices import AUTO, find_device, free_bytes
from sparsepass.graph.support.errors import CaptureError, EquivalenceError, PassError, ProgramFormatError, SparsepassError
from sparsepass.graph.support.files import (
    WEIGHTS_FILE,
    WEIGHTS_INDEX,
    replaced_file,
    replaced_folder,
    weights_entry,
    weights_files,
    write_text,
)
from sparsepass.graph.support.inside import check_inside, file_inside
from sparsepass.graph.support.machine import fast_low_precision, give_back_freed_memory, package_version
from sparsepass.graph.support.option_text import build, item_to_text, parse_items
from sparsepass.graph.support.places import Inputs, check_apart, check_free, check_place, check_writable, path_named
from sparsepass.graph.support.temporaries import alone_in, lock_now, remove_if_dead, waiting_for
from sparsepass.graph.support.words import closest, first_line, how_to_install, is_open, name_matches, nearest

__all__ = [
    "AUTO",
    "CHECKSUMS_FILE",
    "WEIGHTS_FILE",
    "WEIGHTS_INDEX",
    "CaptureError",
    "ChecksumWarning",
    "EquivalenceError",
    "FileChange",
    "Inputs",
    "PassError",
    "ProgramFormatError",
    "SparsepassError",
    "alone_in",
    "build",
    "changed_files",
    "check_apart",
    "check_free",
    "check_inside",
    "check_place",
    "check_writable",
    "checksums_follow",
    "closest",
    "count_progress",
    "counted",
    "default_dtype",
    "evaluating",
    "fast_low_precision",
    "file_inside",
    "file_sha256",
    "find_device",
    "first_line",
    "free_bytes",
    "give_back_freed_memory",
    "how_to_install",
    "is_open",
    "item_progress",
    "item_to_text",
    "lock_now",
    "name_matches",
    "nearest",
    "one_at_a_time",
    "package_version",
    "parse_items",
    "path_named",
    "quiet_export",
    "quiet_loading",
    "remove_if_dead",
    "replaced_file",
    "replaced_folder",
    "shows_progress",
    "waiting_for",
    "weights_entry",
    "weights_files",
    "write_checksums",
    "write_text",
]
