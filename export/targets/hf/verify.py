"""Verification of the target `hf`: load what was written with plain transformers (and peft), and check what was kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsepass.export.pattern import check_pattern, safetensors_files
from sparsepass.export.targets.hf.adapter import ADAPTER_FOLDER, branched, check_adapter, with_adapter
from sparsepass.export.targets.hf.integers import METHOD, PARTS, IntegerLayer, integer_tensors
from sparsepass.export.targets.hf.lower import auto_class, stored_weights
from sparsepass.graph.admission import in_float64, plain_settings
from sparsepass.graph.equivalence import difference
from sparsepass.graph.fusion import split_siblings
from sparsepass.graph.integer_words import steps_from_words
from sparsepass.graph.integers import integers_of
from sparsepass.graph.model import to_model
from sparsepass.graph.program import Program, masked_weight
from sparsepass.graph.support import load_tensors, package_version, quiet_loading
from sparsepass.passes.maths import NMPattern, num_violations

# Relative error of the outputs that is taken for rounding without a further look, by the checkpoint's dtype.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Some models amplify rounding a thousandfold. A larger error is rounding if, seen from a run of the checkpoint in a wider
# dtype, the program is at most this many times further away than the checkpoint's own run, and not absurdly far.
_ROUNDING_FACTOR, _WIDER = 4.0, {torch.float16: torch.float32, torch.bfloat16: torch.float32}
_LARGEST_ROUNDING = {torch.float16: 0.5, torch.bfloat16: 0.5}
_LARGEST_ROUNDING_OTHERWISE = 1e-2
_WITHOUT_PACKAGE = "compressed-tensors is not installed, so the folder was not loaded: pip install compressed-tensors"


def verify_hf(
    program: Program,
    folder: Path,
    inputs: Mapping[str, Tensor] | None = None,
    *,
    integers: Sequence[IntegerLayer] = (),
) -> dict[str, Any]:
    """Load a written checkpoint with plain transformers (and peft), and check what was kept.

    1. Every sparse weight is N:M on the right axis, in the files as they are on disk and in the model as it is loaded.
    2. Integers and scales in the files are the program's own, and each dropped weight's integer is that of 0. Every other
       loaded weight, and every tensor of the adapter, is the program's, bit by bit, after rounding to the
       checkpoint's dtype.
    3. The outputs (through the adapter, if there is one) equal the program's within a tolerance. A larger difference is
       accepted only if it is shown to be rounding: the checkpoint is run in a wider dtype too, and the program is about
       as near to that as the checkpoint's own run is. Without peft, the adapter is applied by the definition of LoRA,
       and the result says so.

    Args:
        program: What was lowered.
        folder: Where it was written.
        inputs: What to run; the program's example inputs if none are given.
        integers: The layers whose integers are stored. Without compressed-tensors they cannot be loaded here: then the files
            alone are checked, and ``not_loaded`` says so.

    Returns:
        Findings as JSON: ``holds``, ``failures`` (one sentence each), and the figures behind them.
    """
    program = split_siblings(program)
    given = {name: t.to(program.device) for name, t in (inputs or program.example_inputs).items()}
    missing = bool(integers) and package_version("compressed-tensors") is None
    with quiet_loading():
        model: Any = to_model(program) if missing else load_plain(folder).to(program.device)
    dtype, loaded_by = model.dtype, auto_class(type(model), model.config)
    failures: list[str] = []
    pattern = _check_files(program, model, folder)
    if not pattern["conforms"]:
        failures.append(f"the N:M pattern does not hold in the files: {pattern['summary']}")
    weights = _check_weights(program, model, {layer.path for layer in integers})
    weights["failures"] += _check_integers(program, folder, integers)
    weights["num_integers"] = len(integers)
    adapter = folder / ADAPTER_FOLDER
    runs, read_by = model, None
    if (adapter / "adapter_config.json").is_file():
        weights["failures"] += check_adapter(program, adapter, dtype)
        runs, read_by = with_adapter(model, adapter)
    elif branched(program):
        failures.append(f"the program has SLoRB branches, and {folder} holds no {ADAPTER_FOLDER}/ for them")
    failures += weights.pop("failures")
    outputs = check_outputs(program, runs, given, dtype)
    if not outputs["holds"] and not missing:
        failures.append(f"the outputs differ from the program's: {outputs['said']}")
    return {
        "holds": not failures,
        "failures": failures,
        "loaded_by": loaded_by,
        "dtype": str(dtype).removeprefix("torch."),
        "pattern": pattern,
        "weights": weights,
        "outputs": outputs,
        "adapter_read_by": read_by,
        "not_loaded": _WITHOUT_PACKAGE if missing else "",
        "versions": {name: package_version(name) for name in ("torch", "transformers", "safetensors", "peft", METHOD)},
    }


def load_plain(folder: Path) -> Any:
    """Load as a user would: by the Auto class that goes with the configuration, and nothing else."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    (architecture,) = config.architectures
    name = auto_class(getattr(transformers, architecture), config)
    return getattr(transformers, name).from_pretrained(folder, trust_remote_code=False).eval()


def _check_files(program: Program, model: Any, folder: Path) -> dict[str, Any]:
    stored = stored_weights(program, model, folder)
    report = check_pattern(folder, expected_sparse=stored.expected_sparse, axes=stored.axes)
    return {
        "conforms": report.conforms,
        "summary": report.summary(),
        "num_checked": sum(entry.required for entry in report.entries),
        "num_negative_zeros": report.num_negative_zeros,
        "fused_with_dense": list(stored.fused_with_dense),
        "failures": [entry.to_dict() for entry in report.failures],
    }


def _check_integers(program: Program, folder: Path, layers: Sequence[IntegerLayer]) -> list[str]:
    """What is wrong with the layers that are stored as integers or fp8, in the files."""
    stored: dict[str, Tensor] = {}
    names = {f"{layer.name}.{part}" for layer in layers for part in PARTS}
    for file in safetensors_files(folder) if layers else ():
        stored |= {name: tensor for name, tensor in load_tensors(file, advice="copy the folder again").items() if name in names}
    failures = []
    for layer in layers:
        own = integers_of(program, layer.weight)
        assert own is not None
        found = {part: stored.get(f"{layer.name}.{part}") for part in PARTS}
        scales, numbers = found["weight_scale"], found["weight" if layer.grid.format == "fp8" else "weight_packed"]
        if scales is None or numbers is None:
            failures.append(f"the loaded weight {layer.weight} is not in the files")
            continue
        steps_OI = numbers.float()
        if layer.grid.format == "int":
            steps_OI = steps_from_words(numbers, own.columns, found["weight_zero_point"])
        lost = int(((own.weight_OI == 0) & (steps_OI != 0)).sum())
        expected = integer_tensors(own, scales.dtype)
        same = all(
            tensor is not None and torch.equal(tensor, expected[part]) for part, tensor in found.items() if part in expected
        )
        if lost:
            failures.append(f"the loaded weight {layer.weight} has lost {lost} zeros")
        elif not same:
            failures.append(f"the loaded weight {layer.weight} does not have the program's own {layer.numbers} and scales")
    return failures


def _check_weights(program: Program, model: nn.Module, integers: set[str]) -> dict[str, Any]:
    failures, num_equal, violations = [], 0, 0
    for name, loaded in model.named_parameters():
        if name.rpartition(".")[0] in integers and not name.endswith(".bias"):
            continue
        own = program.aliases.get(name, name)
        expected = masked_weight(program, own)
        if torch.equal(loaded.detach(), expected.to(loaded.dtype)):
            num_equal += 1
        else:
            failures.append(f"the loaded weight {name} is not the program's")
        if own in program.sparse:
            state = program.sparse[own]
            broken = num_violations(loaded.detach(), NMPattern.parse(state.pattern), state.axis)
            violations += broken
            if broken:
                failures.append(f"the loaded weight {name} breaks {state.pattern} in {broken} groups")
    return {"num_equal": num_equal, "num_violations": violations, "failures": failures}


@torch.no_grad()
def check_outputs(program: Program, runs: nn.Module, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Compare the outputs of a loaded model with the program's. A large error is looked into: it may be rounding.

    Args:
        program: What was lowered.
        runs: The loaded model. If rounding is looked into, it comes out in a wider dtype.
        inputs: What both run.
        dtype: Of the loaded model.

    Returns:
        Findings as JSON: ``holds``, ``relative_error``, ``tolerance``, ``rounding`` (what was found when it was looked into),
        and ``said``: all of it in words.
    """
    expected = _flat_outputs(program, program(**inputs))
    with plain_settings(runs):  # as the program was captured: what a model does with a cache may be something else
        found = _flat_outputs(program, runs(**_cast(inputs, dtype)))
    measured = difference(expected, found)
    own = next(iter(expected.values())).dtype
    tolerance = max(_TOLERANCES.get(each, 1e-5) for each in (dtype, own))
    holds, rounding = measured.relative_error <= tolerance, None
    said = f"relative error {measured.relative_error:.2g} (allowed {tolerance:g})"
    if measured.unknown:
        holds, said = False, f"{said}, but {measured.unknown}"
    elif not holds:
        wide = _WIDER.get(dtype, torch.float64)
        wider = in_float64(runs) if wide is torch.float64 else runs.to(wide)
        exact = _flat_outputs(program, wider(**_cast(inputs, wide)))
        theirs, ours = (difference(exact, each).relative_error for each in (found, expected))
        rounding = {"computed_in": str(wide).removeprefix("torch."), "checkpoint": theirs, "program": ours}
        largest = _LARGEST_ROUNDING.get(dtype, _LARGEST_ROUNDING_OTHERWISE)
        holds = ours <= _ROUNDING_FACTOR * theirs and max(ours, theirs) <= largest
        seen = f"seen from a run in {rounding['computed_in']}, the program is {ours:.2g} away and the checkpoint {theirs:.2g}"
        said += f"; {'more is rounding only' if holds else 'it is not rounding'}: {seen}"
    return {**measured.to_dict(), "tolerance": tolerance, "rounding": rounding, "holds": holds, "said": said}


def _cast(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def _flat_outputs(program: Program, outputs: Any) -> dict[str, Tensor]:
    """The outputs that the program has, by flat name, out of a model's."""
    found = {}
    for name in program.output_names:
        value = outputs
        for part in name.split("."):
            if isinstance(value, Tensor):
                break
            value = value[int(part)] if part.isdigit() else value[part]
        found[name] = value
    return found
