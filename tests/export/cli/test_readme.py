"""The command lines and snippets of README.md, as they stand and in order, on a sharded bfloat16 Llama."""

import re
import shlex
import warnings
from pathlib import Path
from typing import Final

import pytest
import torch
import transformers as hf
from tests.export.cli.commands import run
from tests.export.tiny import WORDS, tiny_tokenizer

from sparsepass.export.cli.app import app, export_app

README: Final = Path(__file__).parents[3] / "README.md"
_BLOCK: Final = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHORTER: Final = {
    "retrain": ("--set", "train.max_tokens=2048", "--set", "data.validation_limit=2"),
    "sample": ("--tokens", "2000", "--length", "64"),
    "bench": ("--batch", "1", "--repeats", "1", "--new-tokens", "2", "--prefill-tokens", "16"),
    "prune": ("--num-sequences", "4"),
    "eval": ("--max-tokens", "2000"),
}
"""What is added so that a command takes seconds."""
FAR: Final = ("smollm2-cpu",)
"""Recipes that let the teacher write for half an hour: here it writes less."""
ANSWERS: Final = {"plan": (0, 1), "sparse-export": (0, 3)}
"""Exit codes that are answers too: 2:4 does not pay for so small a model, and bfloat16 is not run on every machine."""


def blocks() -> list[tuple[str, str]]:
    """Language and text of each block of code."""
    return _BLOCK.findall(README.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README takes for granted: a model and texts, by the names that it calls them."""
    place = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(vocab_size=320, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **sizes)
    config.max_position_embeddings = 1024
    hf.LlamaForCausalLM(config).bfloat16().save_pretrained(place / "MODEL", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(place / "MODEL")
    assert (place / "MODEL/model.safetensors.index.json").is_file()
    for name in ("text", "general", "code", "held-out"):
        (place / f"{name}.txt").write_text(f"{name}: {WORDS}\n" * 2000, encoding="utf-8")
    prune = "{passes: nm_sparsify, calibration: text.txt, num_sequences: 4}"
    recipe = f"model: MODEL\nout: recipe\nprune: {prune}\nexport: {{target: hf}}\n"
    (place / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return place


def lines() -> list[str]:
    """Every command line of ours, without its comment."""
    plain = [text for language, text in blocks() if not language]
    found = [line.split(" #")[0].strip() for text in plain for line in text.splitlines()]
    return [line for line in found if line.startswith(("sparsepass ", "sparse-export "))]


def test_the_readme_has_commands() -> None:
    names = {shlex.split(line)[1] for line in lines() if line.startswith("sparsepass ")}
    assert {"prune", "retrain", "sample", "run", "export", "eval", "bench", "compare", "verify", "plan", "report"} <= names


def test_every_command_line_does_what_it_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for line in lines():
        program, *words = shlex.split(line)
        name = words[0] if program == "sparsepass" else program
        added = [*SHORTER.get(name, ())]
        if any(recipe in words for recipe in FAR):
            added += ["--set", "sample.num_tokens=2048"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries underneath: the command line shows none
            result = run(*words, *added, app=export_app if program == "sparse-export" else app)
        assert result.exit_code in ANSWERS.get(name, (0,)), f"{line}\n{result.stderr}\n{result.stdout[-2000:]}"


def test_every_snippet_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for language, text in blocks():
        if language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(text.replace("HuggingFaceTB/SmolLM2-135M", "MODEL"), "README.md", "exec"), {})
