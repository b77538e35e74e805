"""The model card of a packed folder: what to install, how to load it, how to unpack it, and what stays dense."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from sparsepass.export.targets.hf import front_matter
from sparsepass.export.targets.packed.survey import LayerChoice
from sparsepass.graph.packed_folder import PackedSettings
from sparsepass.graph.program import Program


def card(
    program: Program,
    settings: PackedSettings,
    layers: Iterable[LayerChoice],
    folder: Path,
    loads_with: str,
    errors: Mapping[str, float],
) -> str:
    """The content of README.md.

    Args:
        program: What was lowered.
        settings: How its layers are packed.
        layers: What became of each.
        folder: With what came with the model's source.
        loads_with: The Auto class that loads it.
        errors: Relative errors of the rounded weights.
    """
    listed = list(layers)
    dense = Counter(layer.reason for layer in listed if layer.reason)
    scales = "" if not settings.group_size else f", one scale for {settings.group_size} input features"
    rounding = f" Rounding moved a weight by {max(errors.values()):.2g} of its size at most." if errors else ""
    lines = [
        *front_matter(loads_with, ["2:4"], folder),
        f"# {(program.origin.model_class or '').removeprefix('transformers.')}, 2:4 sparse and packed",
        "",
        f"Made by sparsepass. {len(settings.layers)} of {len(listed)} linear layers are stored without their zeros:",
        f"the kept values as {settings.values}{scales}, and two bits for the place of each.{rounding}",
        "",
        "## Loading",
        "",
        "```",
        "pip install sparsepass   # in a checkout of it: pip install -e .",
        "```",
        "",
        "```python",
        "import sparsepass  # makes the folder known to transformers",
        f"from transformers import {loads_with}",
        "",
        f'model = {loads_with}.from_pretrained("PATH/OF/THIS/FOLDER")',
        "```",
        "",
        "Without `import sparsepass`, transformers stops at weights of another size than it expects. For a program that knows",
        "nothing of sparsepass, write the plain folder, with its zeros:",
        "",
        "```",
        "sparsepass unpack PATH/OF/THIS/FOLDER -o OUT",
        "```",
        "",
        "The model is for inference. To train it or to prune it further, start from the program, or from the plain folder.",
        "",
        "Recipe (takes a dense model to this one, with the same calibration data):",
        "",
        "```",
        program.recipe or "(no pass was applied)",
        "```",
        "",
    ]
    if dense:
        lines += ["Layers that stay dense:", "", *(f"- {number}: {reason}" for reason, number in dense.most_common()), ""]
    return "\n".join(lines)
