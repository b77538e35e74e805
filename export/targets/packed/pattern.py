"""The pattern of a packed folder: its weights are unpacked one at a time and looked at as any other's."""

from pathlib import Path

from sparsepass.export.pattern import PatternEntry, PatternReport, check_pattern
from sparsepass.export.targets.packed.stored import stored_folder
from sparsepass.graph.packed import check, unpack

_PATTERN = "2:4"


def check_packed_folder(folder: str | Path, pattern: str = _PATTERN, *, ignore: tuple[str, ...] = ()) -> PatternReport:
    """Check that the packed weights of a folder are what a kernel reads, and 2:4 along their input features.

    Args:
        folder: A folder of the target packed.
        pattern: The pattern asked for.
        ignore: Weights to leave out; see `check_pattern`.

    Returns:
        The report. What is not packed is dense on purpose.

    Raises:
        SparsepassError: If the folder is no packed one, or tensors of it are missing or damaged.
    """
    entries: list[PatternEntry] = []
    unused = set(ignore)
    with stored_folder(Path(folder)) as stored:
        names = [f"{layer}.weight" for layer in stored.settings.layers]
        for layer, name in zip(stored.settings.layers, names, strict=True):
            packed = stored.packed(layer)
            check(packed, name)
            found = check_pattern({name: unpack(packed)}, pattern, ignore=ignore, expected_sparse=[name])
            entries += found.entries
            unused &= set(found.unused)
        tables = [f"{layer}.weight" for layer in stored.settings.embeddings]
        rest = {
            name: stored.tensor(name) for name in stored.names if name.endswith(".weight") and name not in {*names, *tables}
        }
        rest = {name: tensor for name, tensor in rest.items() if tensor.dim() > 1}
        if rest:
            found = check_pattern(rest, pattern, ignore=ignore, expected_sparse=[])
            entries += found.entries
            unused &= set(found.unused)
    return PatternReport(source=str(folder), pattern=pattern, entries=tuple(entries), stated=True, unused=tuple(sorted(unused)))
