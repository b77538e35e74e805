"""sparsepass through its public function, capture and folding included in the time.

`inplace=True` because the other tools also work on the caller's model; the pruned weights are read from the program.
"""

import harness
import torch
from transformers import PreTrainedModel

from sparsepass.passes import Fold, NMSparsify, apply_passes


def prune(model: PreTrainedModel, ids_BT: torch.Tensor, settings: harness.Settings) -> harness.State:
    program = apply_passes(
        model,
        [NMSparsify(pattern="2:4", criterion=settings.criterion, refine=settings.refine), Fold()],
        calibration=ids_BT,
        batch_size=settings.batch_size,
        inplace=True,
        validate=False,
        progress=False,
    )
    return {name: program.tensor(name).detach() for name in dict(model.state_dict())}


if __name__ == "__main__":
    harness.main("sparsepass", ("sparsepass",), prune)
