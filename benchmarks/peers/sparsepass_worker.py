"""sparsepass through its public function, capture and folding included in the time.

`inplace=True` because the other tools also work on the caller's model.
"""

import harness
import torch
from transformers import PreTrainedModel

from sparsepass.passes import NMSparsify, apply_passes


def prune(model: PreTrainedModel, ids_BT: torch.Tensor, settings: harness.Settings) -> harness.State:
    program = apply_passes(
        model,
        [NMSparsify(pattern="2:4", criterion=settings.criterion)],
        calibration=ids_BT,
        inplace=True,
        validate=False,
    )
    return program.to_model().state_dict()


if __name__ == "__main__":
    harness.main("sparsepass", ("sparsepass",), prune)
