"""NVIDIA ModelOpt as its guide calls it: `mts.sparsify(model, "sparsegpt", config)`, then `mts.export`.

The output head is left out by ModelOpt's own default rules. `export` bakes the masks into the weights and belongs to
the time, as folding does for the others.
"""

import harness
import modelopt.torch.sparsity as mts
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel


def prune(model: PreTrainedModel, ids_BT: torch.Tensor, settings: harness.Settings) -> harness.State:
    if settings.criterion != "sparsegpt":
        raise ValueError(f"ModelOpt has no criterion {settings.criterion!r}; use 'sparsegpt'.")
    config = {
        "data_loader": DataLoader(list(ids_BT), batch_size=settings.batch_size),
        "collect_func": lambda ids: ids,
    }
    with torch.no_grad():
        model = mts.sparsify(model, mode="sparsegpt", config=config)
        model = mts.export(model)
    return model.state_dict()


if __name__ == "__main__":
    harness.main("ModelOpt", ("nvidia-modelopt",), prune)
