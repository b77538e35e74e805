"""Verification of the target `packed`: the files, the layers as they run, and the outputs.

Tensor shape legend: O out features, I in features, T tokens.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from sparsepass.export.targets.contract import Check
from sparsepass.export.targets.hf import check_outputs, load_plain
from sparsepass.export.targets.packed.own import own_table
from sparsepass.export.targets.packed.stored import StoredFolder, stored_folder
from sparsepass.export.targets.packed.survey import LayerChoice, matrix_of
from sparsepass.graph.fusion import split_siblings
from sparsepass.graph.integers import integers_of
from sparsepass.graph.packed import FLOATS, PackedLinear, PackedWeight, check, unpack
from sparsepass.graph.packed_folder import INTEGERS, is_packed_module
from sparsepass.graph.program import Program, masked_weight
from sparsepass.graph.support import SparsepassError, quiet_loading

if TYPE_CHECKING:
    from sparsepass.export.targets.packed.lower import PackedArtifact

_TOKENS: Final = 3
_LAYER_TOLERANCES: Final = {"bf16": 2e-2, "fp16": 5e-3, "int8": 3e-2, "int4": 3e-2}
"""Relative error of a layer's outputs: the kernels round activations to the kind of the values, integers to a byte."""


def verify_packed(program: Program, folder: Path, artifact: "PackedArtifact") -> tuple[Check, ...]:
    """Check a packed folder against the program.

    1. ``pattern``: sizes, types and codes of each packed weight are such that it is 2:4 once it is unpacked.
    2. ``weights``: unpacked, each is bit for bit the program's after rounding to a floating type. The program's own integers
       and scales are what they are there; integers that were made here are within half a step of their scale. Everything that
       is not packed is the program's, bit for bit, when the folder is loaded.
    3. ``layers``: each packed layer of the loaded model gives what its unpacked weight gives.
    4. ``outputs``: the loaded model's are the program's, within the tolerance of the type. For integers, how far rounding moved
       them is told, and they have to be finite.

    Args:
        program: What was lowered.
        folder: Where it was written.
        artifact: What `lower_packed` returned.
    """
    program = split_siblings(program)
    with stored_folder(folder) as stored:
        pattern, weights = _check_files(program, stored, artifact)
    with quiet_loading():
        model = load_plain(folder)
    packed = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    missing = [layer.layer for layer in artifact.packed if layer.layer not in packed]
    weights += [f"{layer} is not packed in the loaded model" for layer in missing]
    others, num_equal = _check_dense(program, model)
    weights += others
    layers, worst = _check_layers(packed)
    number = len(artifact.packed)
    return (
        Check(
            name="pattern",
            held=not pattern,
            summary="; ".join(pattern[:5]) or f"the {number} packed weights are 2:4 along their input features",
            details={"num_packed": number, "failures": pattern},
        ),
        Check(
            name="weights",
            held=not weights,
            summary="; ".join(weights[:5]) or _told_of_weights(artifact, num_equal),
            details={"num_packed": number, "num_equal": num_equal, "failures": weights},
        ),
        Check(
            name="layers",
            held=not layers,
            summary="; ".join(layers[:5])
            or f"{len(packed)} packed layers give what their unpacked weights give: relative error {worst:.2g} at most "
            f"(allowed {_LAYER_TOLERANCES[artifact.settings.values]:g})",
            details={"largest_relative_error": worst, "failures": layers},
        ),
        _outputs(program, model, artifact),
    )


def _told_of_weights(artifact: "PackedArtifact", num_equal: int) -> str:
    values, number = artifact.settings.values, len(artifact.packed)
    if artifact.own:
        return f"{number} packed weights are the program's own {values}, zeros included; {num_equal} others are bit for bit its"
    if artifact.errors:
        return (
            f"{number} packed weights are the program's, rounded to {values} (relative error "
            f"{max(artifact.errors.values()):.2g} at most); {num_equal} others are bit for bit the program's"
        )
    return f"{number} packed weights, unpacked, and {num_equal} others are bit for bit the program's"


def _check_files(program: Program, stored: StoredFolder, artifact: "PackedArtifact") -> tuple[list[str], list[str]]:
    """What is wrong with the pattern, and with the values, of the packed weights in the files."""
    pattern, weights = [], []
    for layer in artifact.packed:
        try:
            packed = stored.packed(layer.name)
            check(packed, f"{layer.name}.weight")
        except SparsepassError as error:
            pattern.append(str(error))
            continue
        if packed.shape != layer.shape:
            pattern.append(f"{layer.name} is {packed.shape} in the files, and {layer.shape} in the program")
        elif said := _difference(program, layer, packed):
            weights.append(said)
    by_name = {name: path for path, name in artifact.tables.items()}
    for name in stored.settings.embeddings:
        own = own_table(program, by_name[name])
        if own is not None and not all(
            map(torch.equal, own, (stored.tensor(f"{name}.weight"), stored.tensor(f"{name}.scales")))
        ):
            weights.append(f"{name} does not hold the program's own integers and scales")
    return pattern, weights


def _difference(program: Program, layer: LayerChoice, packed: PackedWeight) -> str:
    expected_OI = matrix_of(program, layer)
    found_OI = unpack(packed)
    own = integers_of(program, layer.weight)
    if own is not None:
        lost = int(((own.weight_OI == 0) & (found_OI != 0)).sum())
        if lost:
            return f"{layer.name} has lost {lost} zeros"
        same = packed.scales is not None and torch.equal(packed.scales, own.scales_OG) and torch.equal(found_OI, own.weight_OI)
        return "" if same else f"{layer.name} does not hold the program's own integers and scales"
    if packed.scales is None:
        same = torch.equal(found_OI, expected_OI.to(FLOATS[packed.values]))
        return "" if same else f"{layer.name}, unpacked, is not the program's"
    columns = expected_OI.shape[1]
    steps_OI = packed.scales.float().repeat_interleave(packed.group_size or columns, dim=1)[:, :columns]
    off_OI = (found_OI - expected_OI.float()).abs() > steps_OI * 0.5001 + 1e-12
    return f"{layer.name}, unpacked, is off by more than half a step at {int(off_OI.sum())} places" if off_OI.any() else ""


def _check_dense(program: Program, model: nn.Module) -> tuple[list[str], int]:
    """What is wrong with the parameters that are not packed, and how many are right."""
    failures, num_equal = [], 0
    inside = {f"{path}." for path, module in model.named_modules() if is_packed_module(module)}
    for name, loaded in model.named_parameters():
        if f"{name.rpartition('.')[0]}." in inside:
            continue
        if torch.equal(loaded.detach(), masked_weight(program, program.aliases.get(name, name)).to(loaded.dtype)):
            num_equal += 1
        else:
            failures.append(f"the loaded weight {name} is not the program's")
    return failures, num_equal


@torch.no_grad()
def _check_layers(packed: dict[str, PackedLinear]) -> tuple[list[str], float]:
    """What is wrong with what the packed layers compute, and the largest error."""
    failures, worst = [], 0.0
    generator = torch.Generator().manual_seed(0)
    for path, layer in packed.items():
        tolerance = _LAYER_TOLERANCES[layer.values]
        x_TI = torch.randn(_TOKENS, layer.in_features, generator=generator)
        expected_TO = _by_definition(layer, x_TI)
        found_TO = layer(x_TI.to(layer.scales.device if layer.scales is not None else "cpu"))
        error = float((found_TO.cpu() - expected_TO).norm() / expected_TO.norm().clamp(min=1e-12))
        worst = max(worst, error)
        if not error <= tolerance:
            failures.append(
                f"{path} gives another result than its unpacked weight: relative error {error:.3g}, allowed {tolerance:g}"
            )
    return failures, worst


def _by_definition(layer: PackedLinear, x_TI: Tensor) -> Tensor:
    y_TO = x_TI @ unpack(layer.packed(), torch.float32).t()
    if layer.slorb_weight is not None:
        projection = layer.slorb_projection
        sums_TR = x_TI.unflatten(-1, (-1, layer.slorb_k)).sum(-1) if projection is None else x_TI @ projection.float().t()
        y_TO += sums_TR @ layer.slorb_weight.float().t()
    return y_TO if layer.bias is None else y_TO + layer.bias.float()


def _outputs(program: Program, model: nn.Module, artifact: "PackedArtifact") -> Check:
    inputs = {name: t.to(program.device) for name, t in program.example_inputs.items()}
    found = check_outputs(program, model, inputs, getattr(torch, artifact.dtype))
    error = found["relative_error"]
    if artifact.settings.values in INTEGERS or artifact.settings.embedding:
        what = f"rounding to {artifact.settings.values}" if not artifact.own else "rounding activations to bytes"
        moved = f"{what} moved the outputs by {error:.2g} of their size"
        unknown = any(one["num_nan"] or one["num_infinite"] for one in found["outputs"].values())
        said = f"loaded by {artifact.auto_class}: {found['said'] if unknown else moved}"
        held = error < float("inf") and not unknown
        return Check(name="outputs", held=bool(held), summary=said, details=found | {"tolerance": None})
    said = f"loaded by {artifact.auto_class}: {found['said']}"
    return Check(name="outputs", held=found["holds"], summary=said, details=found)
