"""A checkpoint's weights and masks as a program, for a new run with other settings."""

import copy
from pathlib import Path

import torch

from sparsepass.graph import Program, SparsepassError
from sparsepass.retrain.grids import grid_tensors, quantized_sites
from sparsepass.retrain.run import CHECKPOINTS, Checkpoints, step_of
from sparsepass.retrain.student import masked_sites


def program_of_checkpoint(program: Program, place: str | Path, *, inplace: bool = False) -> tuple[Program, str]:
    """Put the weights and masks of a run's checkpoint into the program that the run started from.

    For a run that ended in a loss that is not finite, or that should go on with another learning rate: resuming takes the same
    settings only. Moments, schedule and place in the data are left behind.

    Args:
        program: What the run was started with.
        place: The run folder, of which the newest intact checkpoint is taken, or one checkpoint (``.../step-00000120``).
        inplace: Whether the program itself is changed.

    Returns:
        The program as it was at that step, and a sentence on where it is from.

    Raises:
        SparsepassError: If there is no intact checkpoint, it is of another program, or it is one of CAST's, whose weights are
            no program before their scales are folded in. The program is unchanged then.
    """
    folder = Path(place)
    step = step_of(folder)
    if step is not None:
        folder = folder.parent
    elif (folder / CHECKPOINTS).is_dir():
        folder = folder / CHECKPOINTS
    checkpoints = Checkpoints(folder)
    newest = checkpoints.newest()
    if newest is None:
        raise SparsepassError(f"{place} holds no checkpoint; name a run folder (OUT.run), or a folder step-... in it")
    if newest.state()["settings"]["method"] == "cast":
        raise SparsepassError(
            f"{place} is a run of method cast, whose weights are no program before their scales are folded in at its end; "
            "start it anew"
        )
    found = program if inplace else copy.deepcopy(program)
    stored = newest.tensor_names()
    weights = {f"weights/{name}": tensor.detach() for name, tensor in found.tensors().items()}
    into = {key: tensor for key, tensor in weights.items() if key in stored}
    into |= {f"masks/{name}": found.tensor(mask) for name, (_, _, mask) in masked_sites(found).items()}
    into |= grid_tensors(quantized_sites(found, found.tensor))
    of_this = {"recipe": found.recipe, "sparse_weights": {name: list(found.tensor(name).shape) for name in found.sparse}}
    with torch.no_grad():
        restored = checkpoints.restore("newest" if step is None else step, into, expected=of_this, partial=True)
    return found, "; ".join([*restored.notes, f"weights and masks are those of {restored.path}"])
