"""The packed layers of a folder as they lie in its files, one at a time: for verification and for unpacking."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, final

from torch import Tensor

from sparsepass.export.pattern import safetensors_files
from sparsepass.graph.packed import PackedWeight
from sparsepass.graph.packed_folder import PackedSettings, is_packed
from sparsepass.graph.support import INFINITIES, SparsepassError, check_inside, open_tensors, read_object

PARTS = ("codes", "scales", "slorb_weight", "slorb_projection")
"""What stands beside the ``weight`` of a packed layer."""


@final
class StoredFolder:
    """Tensors of a packed folder, read when they are asked for.

    Args:
        folder: Such a folder.
        settings: What its configuration says.
        files: Name of a tensor -> the file that holds it, opened.
    """

    def __init__(self, folder: Path, settings: PackedSettings, files: dict[str, Any]) -> None:
        self.folder, self.settings, self._files = folder, settings, files

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._files)

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the files.

        Raises:
            SparsepassError: If no file holds it.
        """
        if name not in self._files:
            raise SparsepassError(f"{name} is missing in the files of {self.folder}; copy the folder again, or export it again")
        found: Tensor = self._files[name].get_tensor(name)
        return found

    def packed(self, layer: str) -> PackedWeight:
        """The weight of a layer by its name in the files. Its sizes are told by its tensors, and not checked."""
        kept, codes = self.tensor(f"{layer}.weight"), self.tensor(f"{layer}.codes")
        scales = self.tensor(f"{layer}.scales") if f"{layer}.scales" in self else None
        return PackedWeight(
            values=self.settings.values,
            shape=(kept.shape[0], codes.shape[-1] * 8),
            kept=kept,
            codes=codes,
            scales=scales,
            group_size=self.settings.group_size,
        )


def is_packed_folder(folder: str | Path) -> bool:
    """Whether the configuration of a folder says that it is packed.

    Example:
        >>> is_packed_folder("no/such/folder")
        False
    """
    path = Path(folder) / "config.json"
    return path.is_file() and is_packed(read_object(path, allowed=INFINITIES).get("quantization_config"))


@contextmanager
def stored_folder(folder: Path) -> Iterator[StoredFolder]:
    """Open a packed folder.

    Raises:
        SparsepassError: If it is none, or a file of it cannot be read.
    """
    path = folder / "config.json"
    check_inside(folder)
    advice = "expected a folder of the target packed"
    document = read_object(path, allowed=INFINITIES, advice=advice).get("quantization_config")
    if not is_packed(document):
        raise SparsepassError(f"{folder} is no packed folder; write one with sparse-export --target packed")
    assert isinstance(document, dict)
    settings = PackedSettings.from_dict(document)
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for file in safetensors_files(folder):
            opened = stack.enter_context(open_tensors(file, advice="copy the folder again"))
            files |= dict.fromkeys(opened.keys(), opened)
        yield StoredFolder(folder, settings, files)
