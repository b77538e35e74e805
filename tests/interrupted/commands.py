"""Every command that writes, on tiny models, and what stands at its place before."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from tests.export.cli.commands import run
from tests.export.tiny import WORDS, save_tiny_llama


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command that writes.

    Attributes:
        arguments: As a shell would give them. ``{base}`` is the folder of models and texts, ``{here}`` the one it writes into.
        results: Names in ``{here}`` of what it writes.
        before: Names in ``{base}`` of folders or files that stand there before, by their names in ``{here}``.
        code: How it ends when nothing stops it.
    """

    arguments: str
    results: tuple[str, ...] = ("out",)
    before: Mapping[str, str] | None = None
    code: int = 0

    def given(self, base: Path, here: Path) -> list[str]:
        """The arguments for those folders."""
        return [word.format(base=base, here=here) for word in self.arguments.split()]

    def prepare(self, base: Path, here: Path) -> None:
        """Make the folder that it writes into, with what stands there before."""
        here.mkdir()
        for name, source in (self.before or {}).items():
            copy: Callable[[Path, Path], object] = shutil.copytree if (base / source).is_dir() else shutil.copyfile
            copy(base / source, here / name)


_TRAIN = (
    "--set train.max_steps=6 --set train.batch_size=4 --set train.checkpoint_every=2 --set data.context=16 "
    "--set sample=null --set data.validation=4 --config smollm2-cpu --data {base}/text.txt"
)
_TEXTS = "--calibration {base}/text.txt --eval-text {base}/held.txt --num-sequences 4 --context 16 --eval-context 16"
COMMANDS: Mapping[str, Command] = {
    "prune": Command(arguments="prune {base}/model -o {here}/out --no-validate"),
    "prune --force": Command(
        arguments="prune {base}/model -o {here}/out --passes nm_sparsify{{pattern=1:4}} --no-validate --force",
        before={"out": "program"},
    ),
    **{
        f"export {target}": Command(arguments=f"export {{base}}/program -t {target} -o {{here}}/out")
        for target in ("hf", "onnx", "packed")
    },
    **{
        f"export {target} --force": Command(
            arguments=f"export {{base}}/slorb -t {target} -o {{here}}/out --force", before={"out": target}
        )
        for target in ("hf", "onnx", "packed")
    },
    "export torch": Command(arguments="export {base}/program -t torch -o {here}/out --dtype bfloat16"),
    "unpack": Command(arguments="unpack {base}/packed -o {here}/out"),
    "masks": Command(arguments="masks {base}/program -o {here}/masks.safetensors", results=("masks.safetensors",)),
    "masks --force": Command(
        arguments="masks {base}/slorb -o {here}/masks.safetensors --force",
        results=("masks.safetensors",),
        before={"masks.safetensors": "masks.safetensors"},
    ),
    "sample": Command(
        arguments="sample {base}/model -o {here}/text.jsonl --tokens 96 --length 16 --seed 1", results=("text.jsonl",)
    ),
    "criteria": Command(
        arguments=f"criteria {{base}}/model {_TEXTS} --criteria magnitude -o {{here}}/table.md --json-file {{here}}/table.json",
        results=("table.md", "table.json"),
    ),
    "retrain": Command(arguments=f"retrain {{base}}/program -o {{here}}/out {_TRAIN}"),
    "retrain --force": Command(
        arguments=f"retrain {{base}}/program -o {{here}}/out {_TRAIN} --force", before={"out": "program"}
    ),
    "run": Command(
        arguments="run {base}/recipe.yaml -o {here}/out",
        results=(
            "out/pruned",
            "out/retrained",
            "out/packed",
            "out/stages.json",
        ),  # a folder for each stage
    ),
    "report": Command(arguments="report {here}/out", before={"out": "program"}),
    "verify --report": Command(arguments="verify {here}/out --report {here}/out", before={"out": "program"}),
    "verify --renew": Command(arguments="verify {here}/out --renew", before={"out": "edited"}),
    "plan --report": Command(arguments="plan {base}/model --gpu h100 --seq 16 --new-tokens 8 --report {here}/out", code=1),
    "bench": Command(
        arguments="bench {here}/out --against {base}/model --batch 1 --prompt-tokens 4 --new-tokens 4 --prefill-tokens 8 "
        "--repeats 1 --no-memory",
        before={"out": "packed"},
    ),
}


def make_base(base: Path) -> Path:
    """Write the models, programs and texts that the commands read."""
    base.mkdir()
    save_tiny_llama(base / "model")
    (base / "text.txt").write_text(WORDS * 60)
    (base / "held.txt").write_text(WORDS * 9)
    made = (
        ("prune", base / "model", "-o", base / "program", "--no-validate"),
        ("prune", base / "model", "-o", base / "slorb", "--passes", "nm_sparsify,slorb{k=8}", "--no-validate"),
        *(("export", base / "program", "-t", target, "-o", base / target) for target in ("hf", "onnx", "packed")),
        ("masks", base / "program", "-o", base / "masks.safetensors"),
    )
    for arguments in made:
        result = run(*arguments)
        assert result.exit_code == 0, result.output
    shutil.copytree(base / "hf", base / "edited")
    (base / "edited" / "README.md").write_text("An edit.\n")
    recipe = {
        "model": str(base / "model"),
        "prune": {"passes": "nm_sparsify"},
        "retrain": {
            "train": {"max_steps": 4, "batch_size": 4, "checkpoint_every": 2},
            "data": {"source": str(base / "text.txt"), "context": 16, "validation": 4},
        },
        "export": [{"target": "packed"}],
        "measure": {
            "bench": {
                "batches": [1],
                "prompt_tokens": 4,
                "new_tokens": 4,
                "prefill_tokens": 8,
                "repeats": 1,
                "memory": False,
            }
        },
    }
    (base / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return base
