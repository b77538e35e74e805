"""The examples of README.md and docs/*.md: each command line and snippet runs as it stands, in the order of its page.

A page finds what README.md's first commands leave: MODEL (a sharded bfloat16 Llama), texts, `pruned/` and `out/`.
"""

import re
import shlex
import shutil
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers as hf
from tests.export.cli.commands import run
from tests.export.cli.documentation import commands
from tests.export.targets.torch.torch_cpu import write_timings
from tests.export.tiny import WORDS, tiny_tokenizer

from sparsepass.export.cli.app import app, export_app

ROOT: Final = Path(__file__).parents[3]
PAGES: Final = {str(page.relative_to(ROOT)): page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
NOT_HERE: Final = {
    "accelerate launch": "starts several processes, each on a GPU",
    "make ": "this test is part of it",
    "python benchmarks/gpu_torch.py": "needs a GPU",
    "--tasks hellaswag,arc_easy": "the tasks come from the hub",
    "--target tensorrt": "builds engines for minutes; tests/export/targets/tensorrt does it",
    "TensorRT(": "the same",
    "open_tensorrt_session(": "needs a GPU and onnxruntime-gpu",
    "load_torch(": "needs a GPU",
}
"""Part of an example -> why no test runs it. An entry that no page has any more is an error."""
SMALLER: Final = {
    "HuggingFaceTB/SmolLM2-135M": "MODEL", "400_000": "8_192", "wanda,sparsegpt": "wanda",
    "slorb{k=64},quantize{group_size=64}": "slorb{k=16},quantize{group_size=16}",
}  # fmt: skip
"""Words of examples that are replaced: the model of the hub by the tiny one, many tokens by few, two criteria by one, wide
blocks by such as the tiny model's layers have."""
SHORTER: Final = {
    "bench": ("--batch", "1", "--repeats", "1", "--new-tokens", "2", "--prefill-tokens", "16", "--no-memory"),
    "eval": ("--max-tokens", "2000"),
    "retrain": (
        "--set",
        "train.max_tokens=1024",
        "--set",
        "train.batch_size=2",
        "--set",
        "train.micro_batch_size=2",
        "--set",
        "data.validation_limit=2",
    ),
    "run": ("--set", "eval.max_tokens=2000"),
    "sample": ("--tokens", "1000", "--length", "64"),
}
"""What is added, so that a command takes seconds."""
WITH_CALIBRATION: Final = ("--num-sequences", "4", "--context", "64")
FROM_RECIPE: Final = {"smollm2-cpu": ("--set", "sample.num_tokens=1024")}
"""A recipe whose teacher writes text: here it writes less."""
ANSWERS: Final = {"sparsepass plan": (0, 1), "--timings": (0, 3)}
"""Part of a line -> exit codes that are answers, too: 2:4 does not pay for so small a model; no kernel runs without a GPU."""
PROGRAMS: Final = ("sparsepass", "sparse-export", "accelerate", "python", "pip", "make")


@dataclass(frozen=True)
class Example:
    """A command line, a snippet, or a file that a page shows. Final."""

    language: str
    text: str

    @property
    def reason(self) -> str | None:
        """Why it is not run; None if it is."""
        return next((why for part, why in NOT_HERE.items() if part in self.text), None)


def examples(page: Path) -> Iterator[Example]:
    """The examples of a page, in order."""
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        if language:
            yield Example(language, text)
            continue
        for line in text.splitlines():
            command = re.sub(r"\s+#.*", "", line)
            if command.startswith(PROGRAMS) and command.split()[0] in PROGRAMS:
                yield Example("", command)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a page finds."""
    place = tmp_path_factory.mktemp("examples")
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(vocab_size=320, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **sizes)
    config.max_position_embeddings = 8192
    hf.LlamaForCausalLM(config).bfloat16().save_pretrained(place / "MODEL", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(place / "MODEL")
    assert (place / "MODEL/model.safetensors.index.json").is_file()
    for name in ("text", "train", "general", "code", "held-out"):
        (place / f"{name}.txt").write_text(f"{name}: {WORDS}\n" * 2000, encoding="utf-8")
    (place / "rows.jsonl").write_text(f'{{"text": "{WORDS}"}}\n' * 500, encoding="utf-8")
    prune = "{passes: nm_sparsify, calibration: text.txt, num_sequences: 4, context: 64}"
    recipe = f"model: MODEL\nout: recipe\nprune: {prune}\neval: {{text: held-out.txt}}\nexport: {{target: hf}}\n"
    (place / "recipe.yaml").write_text(recipe, encoding="utf-8")
    task = (ROOT / "tests/data/capitals.yaml").read_text(encoding="utf-8")
    (place / "tasks").mkdir()
    (place / "tasks/capitals.yaml").write_text(task.replace("sparsepass_capitals", "capitals"), encoding="utf-8")
    shutil.copy(ROOT / "tests/data/capitals.jsonl", place)
    write_timings(place / "torch_semi_structured.json", {(32, 32): {1: 0.5, 64: 1.5}})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run_command("sparsepass prune MODEL -o pruned/ --calibration text.txt")
        run_command("sparsepass prune MODEL -o quantized/ --passes nm_sparsify,quantize --calibration text.txt")
        run_command("sparsepass export pruned/ --target hf -o out/")
    return place


@pytest.fixture
def world(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> Path:
    """A folder of its own for each page, without what the page itself writes."""
    left_out = [name for name in ("pruned", "out") if f"-o {name}/" in PAGES[page].read_text(encoding="utf-8")]
    shutil.copytree(base, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*left_out))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run(page: str, world: Path) -> None:
    names: dict[str, Any] = {}
    for example in examples(PAGES[page]):
        if example.reason is None:
            run_example(example, names)


def run_example(example: Example, names: dict[str, Any]) -> None:
    text = example.text
    for word, smaller in SMALLER.items():
        text = text.replace(word, smaller)
    if example.language == "python":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries underneath
            exec(compile(text, "an example", "exec"), names)
    elif example.language == "yaml":
        title, _, content = text.partition("\n")
        Path(title.removeprefix("# ")).write_text(content, encoding="utf-8")
    elif example.language == "toml":
        tomllib.loads(text)
    else:
        assert example.language == "", f"nobody runs {example.language}"
        run_command(text)


def run_command(line: str) -> None:
    """Run a command line, with what makes it shorter; ``> FILE`` at its end writes a file."""
    line, _, file = line.partition(" > ")
    program, *words = shlex.split(line)
    name = "export" if program == "sparse-export" else words.pop(0)
    added = [*SHORTER.get(name, ()), *(option for word in words for option in FROM_RECIPE.get(word, ()))]
    if "--calibration" in words:
        added += WITH_CALIBRATION
    if "--tasks" in words or {"--list", "--example", "--cache-only"} & {*words}:
        added = added if "--cache-only" in words else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the command line shows none
        result = run(*words, *added, app=export_app) if program == "sparse-export" else run(name, *words, *added, app=app)
    allowed = next((codes for part, codes in ANSWERS.items() if part in line), (0,))
    assert result.exit_code in allowed, f"{line}\n{result.stderr}\n{result.stdout[-2000:]}"
    if file:
        text = result.stdout
        for word, smaller in SMALLER.items():
            text = text.replace(word, smaller)
        Path(file.strip()).write_text(text, encoding="utf-8")


def test_what_is_not_run_is_still_there() -> None:
    everything = [example for page in PAGES.values() for example in examples(page)]
    for part in NOT_HERE:
        assert any(part in example.text for example in everything), f"no page has an example with {part!r} any more"


def test_every_command_has_an_example() -> None:
    lines = [shlex.split(example.text) for page in PAGES.values() for example in examples(page) if not example.language]
    assert {words[1] for words in lines if words[0] == "sparsepass"} >= set(commands())


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_commands_within_sentences_have_options_that_exist(page: str) -> None:
    known = commands()
    for span in re.findall(r"`((?:sparsepass|sparse-export) [^`]+)`", (ROOT / page).read_text(encoding="utf-8")):
        program, *words = span.split()
        name = "export" if program == "sparse-export" else words[0]
        if name.isupper() or name.startswith("-"):
            continue
        assert name in known, f"{span}: there is no command {name}"
        flags = {flag for each in known[name].params for flag in (*each.opts, *each.secondary_opts)} | {"--help"}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= flags, span
