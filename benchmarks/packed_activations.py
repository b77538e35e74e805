"""What rounding activations to bytes costs, as the integer kernels do it: SmolLM2-135M-Instruct, perplexity.

    python benchmarks/packed_activations.py [--max-tokens 8192] [--eval-text FILE] [--out DIR]

The weights are those of int8 and int4 packed layers (SparseGPT 2:4, rounded to nearest), multiplied by torch; the inputs of
these layers are left as they are, or rounded with one scale a token, one for each 128 features (what the kernels do), or one
for each 32 (as ggml does). Writes packed_activations.json and .md.
"""

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import commit, machine
from torch import Tensor, nn

from sparsepass import apply_passes
from sparsepass.export.cli import smollm2
from sparsepass.export.stages import Evaluation
from sparsepass.graph.load import load_model
from sparsepass.graph.packed import pack, unpack
from sparsepass.passes.data import PYTHON_DOCS, default_text

SIZES = {"as they are": None, "one scale a token": 0, "one for each 128 features": 128, "one for each 32 features": 32}
KINDS = {"bf16": 0, "int8": 64, "int4": 64}


def rounded(x: Tensor, size: int) -> Tensor:
    """Inputs as signed bytes times a scale for each group of features; 0 for one scale a token."""
    groups = x.float().unflatten(-1, (-1, size or x.shape[-1])) if x.shape[-1] % (size or 1) == 0 else None
    if groups is None:  # the last group is short
        padded = nn.functional.pad(x.float(), (0, -x.shape[-1] % size))
        return rounded(padded, size)[..., : x.shape[-1]].to(x.dtype)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale.where(scale > 0, 1.0)).round() * scale).flatten(-2).to(x.dtype)


def hook(size: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Rounds what a layer is given."""
    return lambda _module, given: (rounded(given[0], size), *given[1:])


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--eval-text", default=PYTHON_DOCS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    loaded = load_model(smollm2(), dtype="float32")
    evaluation = Evaluation(text=args.eval_text, context=512, max_tokens=args.max_tokens)
    program = apply_passes(
        loaded.model,
        "nm_sparsify{criterion=sparsegpt},fold",
        calibration=default_text("calibration"),
        tokenizer=loaded.tokenizer,
        num_sequences=16,
        context=512,
        validate=False,
    )
    rows: list[dict[str, Any]] = []
    for values, group_size in KINDS.items():
        model = program.to_model()
        layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and f"{name}.weight" in program.sparse]
        for layer in layers:
            layer.weight.data = unpack(pack(layer.weight.data, values=values, group_size=group_size)).float()  # type: ignore[arg-type]
        for said, size in SIZES.items():
            if values == "bf16" and size is not None:
                continue
            hooks = [layer.register_forward_pre_hook(hook(size)) for layer in layers] if size is not None else []
            found = evaluation.measure(model, loaded.tokenizer)
            for each in hooks:
                each.remove()
            rows.append({"values": values, "group_size": group_size, "inputs": said, "perplexity": found.value})
            print(rows[-1], flush=True)
    report = {"rows": rows, "num_tokens": found.num_tokens, "commit": commit(), "machine": machine("cpu")}
    lines = [
        "# What rounding activations costs",
        "",
        f"SmolLM2-135M-Instruct, SparseGPT 2:4 calibrated on 16 x 512 tokens of Python's documentation, {found.num_tokens} "
        f"tokens of {Path(args.eval_text).name}, context 512.",
        f"Commit {report['commit']}, {datetime.now(UTC).date().isoformat()}.",
        "",
        "| weights | inputs | perplexity |",
        "|---|---|---:|",
        *(f"| {row['values']}, groups of {row['group_size']} | {row['inputs']} | {row['perplexity']:.2f} |" for row in rows),
        "",
    ]
    (args.out / "packed_activations.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "packed_activations.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
