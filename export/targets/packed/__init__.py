"""The target `packed`: a Hugging Face folder whose 2:4 layers are stored without their zeros."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.targets.packed.lower import PackedArtifact as PackedArtifact, lower_packed as lower_packed
    from sparsepass.export.targets.packed.pattern import check_packed_folder as check_packed_folder
    from sparsepass.export.targets.packed.stored import is_packed_folder as is_packed_folder, stored_folder as stored_folder
    from sparsepass.export.targets.packed.target import Packed as Packed
    from sparsepass.export.targets.packed.unpack import unpack_folder as unpack_folder
else:
    from sparsepass._lazy import face

    __getattr__, __dir__, __all__ = face(__name__, __file__)
