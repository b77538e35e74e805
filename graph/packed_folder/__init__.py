"""A packed folder: what its configuration says, and how transformers loads it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.graph.packed_folder.install import is_packed_module as is_packed_module, num_parameters as num_parameters
    from sparsepass.graph.packed_folder.names import (
        find_layer as find_layer,
        is_conv1d as is_conv1d,
        linear_layers as linear_layers,
        stored_names as stored_names,
    )
    from sparsepass.graph.packed_folder.quantizer import register_quantizer as register_quantizer
    from sparsepass.graph.packed_folder.settings import (
        FOR_INFERENCE as FOR_INFERENCE,
        INTEGERS as INTEGERS,
        QUANT_METHOD as QUANT_METHOD,
        BranchSettings as BranchSettings,
        PackedSettings as PackedSettings,
        Values as Values,
        is_packed as is_packed,
    )
else:
    from sparsepass._lazy import face

    __getattr__, __dir__, __all__ = face(__name__, __file__)
