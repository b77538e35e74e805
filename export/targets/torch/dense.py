"""A folder of the target torch as a dense model."""

from pathlib import Path

from torch import nn

from sparsepass.export.targets.hf import ADAPTER_FOLDER, load_plain, read_adapter
from sparsepass.export.targets.torch.record import Record
from sparsepass.graph.model import SLoRBLinear
from sparsepass.graph.support import SparsepassError, quiet_loading


def load_dense(folder: Path, record: Record) -> nn.Module:
    """The model as transformers loads it, with its SLoRB branches beside the layers."""
    with quiet_loading():
        model: nn.Module = load_plain(folder)
    branches = {layer.layer: layer for layer in record.layers if layer.k}
    tensors = read_adapter(folder / ADAPTER_FOLDER) if branches else {}
    for path, layer in branches.items():
        if path not in tensors:
            raise SparsepassError(f"{path} has a SLoRB branch, and {folder / ADAPTER_FOLDER} lacks it; export the model again")
        x_RI, s_OR = tensors[path]
        base = model.get_submodule(path)
        parent, _, name = path.rpartition(".")
        projection = x_RI if layer.projection == "trainable" else None
        branched = SLoRBLinear(base, s_OR, layer.k, projection, transposed=type(base).__name__ == "Conv1D")
        setattr(model.get_submodule(parent), name, branched)
    return model
