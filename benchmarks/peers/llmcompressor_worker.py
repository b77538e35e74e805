"""llm-compressor as its documentation calls it: `oneshot` with one modifier, the defaults otherwise.

The calibration set is handed over as a DataLoader, which `oneshot` documents and uses as it is, so that its tokens
are the very ones the others get. The pipeline it picks by itself for these modifiers is the sequential one.
"""

import harness
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

MODIFIERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def prune(model: PreTrainedModel, ids_BT: torch.Tensor, settings: harness.Settings) -> harness.State:
    samples = [{"input_ids": ids_T, "attention_mask": torch.ones_like(ids_T)} for ids_T in ids_BT]
    modifier = MODIFIERS[settings.criterion](sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"])
    pruned = oneshot(
        model=model,
        dataset=DataLoader(samples, batch_size=settings.batch_size),
        recipe=[modifier],
        num_calibration_samples=len(samples),
        max_seq_length=ids_BT.shape[1],
    )
    return pruned.state_dict()


if __name__ == "__main__":
    harness.main("llm-compressor", ("llmcompressor", "compressed-tensors"), prune)
