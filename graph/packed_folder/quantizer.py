"""Packed folders as transformers loads them: a configuration and a quantizer for its registry.

This file is imported while transformers itself is (see `sparsepass/_registration.py`), so it takes from transformers only what
is there by then, and what does the work is imported when a model is loaded.
"""

from typing import TYPE_CHECKING, Any, final

from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer as add_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsepass.graph.packed_folder.settings import QUANT_METHOD, PackedSettings
from sparsepass.graph.support import SparsepassError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@final
class PackedConfig(QuantizationConfigMixin):
    """The entry ``quantization_config`` of a packed folder, for transformers.

    Args:
        document: What stands in config.json; see `PackedSettings`.
    """

    def __init__(self, **document: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.settings = PackedSettings.from_dict(document)

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json."""
        return self.settings.to_dict()

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


@final
class PackedQuantizer(HfQuantizer):
    """Loads and saves packed folders. It packs nothing itself: `sparse-export --target packed` does.

    1. Before the weights are read, each packed layer's module takes the place of the dense one, on the meta device.
    2. Afterwards its tensors are checked and laid out for the processor, layer by layer.
    """

    requires_calibration = True

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._installed: dict[str, str] = {}
        self._types: dict[str, torch.dtype] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to spread a packed model over devices: its layers know no offloading.

        Raises:
            SparsepassError: If a device map names the disk or several devices.
        """
        device_map = kwargs.get("device_map")
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        if len(places) > 1 or "disk" in places:
            raise SparsepassError(
                f"a packed model lies on one device, and device_map names {', '.join(sorted(map(str, places)))}; leave it out, "
                "or name one device"
            )

    def param_needs_quantization(self, model: "PreTrainedModel", param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor is of a packed layer. transformers leaves the check of its shape to us then."""
        from sparsepass.graph.packed_folder.install import is_packed_module

        del kwargs
        return is_packed_module(model.get_submodule(param_name.rpartition(".")[0]))

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        from sparsepass.graph.packed_folder.install import install

        del kwargs
        self._installed = install(model, self._settings)
        if not hasattr(HfQuantizer, "get_new_dtype"):
            # transformers before 5.20 (seen in 5.17) reads renamed tensors of a quantized model in the type of the file.
            self._types = {name: parameter.dtype for name, parameter in model.named_parameters()}
        return model

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        from sparsepass.graph.packed_folder.install import cast_dense, settle

        del kwargs
        cast_dense(model, self._types)
        settle(model, self._settings, self._installed)
        return model

    def _dequantize(self, model: "PreTrainedModel", dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
        raise SparsepassError(
            "a packed model is unpacked as a folder, without both forms in memory: `sparsepass unpack FOLDER -o OUT`"
        )

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[Any, dict[str, Any]]:
        """What is saved: scales that are shared, as the bytes beside them are, are stored once."""
        state = model.state_dict()
        for name in model.all_tied_weights_keys:
            if name.endswith(".scales"):
                state.pop(name, None)
        return state, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Yes: what was stored comes back bit for bit."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: a packed weight takes no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes: the layers are operators that torch.compile knows."""
        return True

    @property
    def _settings(self) -> PackedSettings:
        config = self.quantization_config
        assert isinstance(config, PackedConfig)
        return config.settings


def register_quantizer() -> None:
    """Make packed folders known to transformers. A second call does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(PackedConfig)
        add_quantizer(QUANT_METHOD)(PackedQuantizer)
