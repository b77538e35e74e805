"""The model card of a plain checkpoint: where it comes from, how to load it, and what stays dense."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path

import yaml

from sparsepass.export.targets.hf.adapter import ADAPTER_FOLDER, branched
from sparsepass.export.targets.hf.integers import IntegerLayer
from sparsepass.graph.load import card_facts
from sparsepass.graph.program import Program

_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForImageTextToText": "image-text-to-text",
}


def hf_card(
    program: Program, folder: Path, loads_with: str, dtype: str, integers: tuple[IntegerLayer, ...], *, is_read_by_4: bool
) -> str:
    """The content of README.md.

    Args:
        program: What was lowered.
        folder: With what came with the model's source.
        loads_with: The Auto class that loads it.
        dtype: Of its weights.
        integers: Layers that are stored as integers.
        is_read_by_4: Whether transformers 4 reads its configuration, too.
    """
    report = program.report()
    patterns = Counter(state.pattern for state in program.sparse.values())
    weights = ", ".join(f"{number} weights {pattern}" for pattern, number in patterns.items())
    said = [
        f"Made by sparsepass. {report.num_sparse} of {len(report.sites)} linear layers are sparse ({weights}; N:M along the",
        "input features of each layer); the zeros are in the weights.",
    ]
    if not patterns:
        said = [f"Made by sparsepass. None of its {len(report.sites)} linear layers is sparse."]
    branches = branched(program)
    skipped = Counter(report.skipped().values())
    lines = [
        *front_matter(loads_with, patterns, folder),
        f"# {(program.origin.model_class or '').removeprefix('transformers.')}, {'N:M sparse' if patterns else 'dense'}",
        "",
        *said,
        f"Type of the weights: {dtype}.",
        "",
        "Recipe (takes a dense model to this one, with the same calibration data):",
        "",
        "```",
        program.recipe or "(no pass was applied)",
        "```",
        "",
        *(["Layers left dense:", "", *(f"- {n}: {reason}" for reason, n in skipped.most_common()), ""] if patterns else []),
        "## Loading",
        "",
        *([] if is_read_by_4 else ["Needs transformers >= 5: older versions would read another position embedding.", ""]),
        "```python",
        f"from transformers import {loads_with}",
        "",
        f'model = {loads_with}.from_pretrained("PATH/OF/THIS/FOLDER")',
        "```",
        "",
    ]
    if integers:
        lines += [
            f"{told_integers(integers)}, by compressed-tensors: `pip install compressed-tensors` first. A",
            "weight that was dropped has the number that stands for 0.",
            "",
        ]
    if branches:
        k = sorted({state.branch.k for state in branches.values() if state.branch is not None})
        lines += [
            f"That alone is the model **without** its SLoRB branches ({len(branches)} layers, k = {', '.join(map(str, k))}),",
            "and less accurate than what was measured. With them:",
            "",
            "```python",
            "from peft import PeftModel",
            "",
            f'model = PeftModel.from_pretrained(model, "PATH/OF/THIS/FOLDER/{ADAPTER_FOLDER}")',
            "```",
            "",
            "**Do not merge the adapter** (`merge_and_unload` and the like): it would fill the zeros, and the weights would",
            "no longer be N:M. Any other LoRA merged into these weights does the same.",
            "",
        ]
    lines += [
        "Fine-tuning without a mask fills the zeros again: mask the weights while training, or train an adapter and keep it",
        "apart.",
        "",
    ]
    return "\n".join(lines)


def front_matter(loads_with: str, patterns: Collection[str], folder: Path) -> list[str]:
    """The lines that the hub reads at the top of a model card. Licence and base model are those of the source's card.

    Args:
        loads_with: The Auto class that loads the model.
        patterns: Its patterns.
        folder: The model's, with what came with its source; see `sparsepass.graph.load.card_facts`.

    Example:
        >>> front_matter("AutoModel", ["2:4"], Path("some/folder"))
        ['---', 'library_name: transformers', 'tags:', '- sparsepass', '- sparse', '- "2:4"', '---', '']
    """
    facts = yaml.safe_dump(found, allow_unicode=True).splitlines() if (found := card_facts(folder)) else []
    pipeline = [f"pipeline_tag: {_PIPELINES[loads_with]}"] if loads_with in _PIPELINES else []
    tags = ["tags:", "- sparsepass", *(["- sparse"] if patterns else []), *(f'- "{pattern}"' for pattern in patterns)]
    return ["---", *facts, "library_name: transformers", *pipeline, *tags, "---", ""]


def told_integers(integers: tuple[IntegerLayer, ...]) -> str:
    """How many layers are stored as integers, and of how many bits, in words."""
    kinds = " and ".join(sorted({layer.numbers for layer in integers}))
    return f"{len(integers)} layers are stored as {kinds}"
