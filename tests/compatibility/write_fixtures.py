"""Writes the files that later versions have to read: run once, with the code whose files are to be kept readable.

    python -m tests.compatibility.write_fixtures

Everything is written from inside one folder, by relative names. Times, and what tells one machine from another, are replaced.
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import pytest
import safetensors.torch
import torch
import transformers as hf
import yaml
from tests.compatibility.command_line import FIXTURES, run
from tests.compatibility.surface import surface
from tokenizers import Tokenizer, models, pre_tokenizers

from sparsepass.graph import Program, capture
from sparsepass.passes import PASSES, apply_passes, parse_pipeline, pipeline_to_text

HERE: Final = Path(__file__).parent
TEXT: Final = "the quick brown fox jumps over the lazy dog while a model counts words . "
_SPECIAL: Final[dict[str, Any]] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA: Final[dict[str, Any]] = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True, **_SPECIAL,
}  # fmt: skip
_RECIPE: Final[dict[str, Any]] = {
    "model": "model",
    "out": "out",
    "prune": {"passes": "nm_sparsify,slorb{k=8}", "calibration": "words.txt", "num_sequences": 2, "context": 16},
    "retrain": {
        "train": {
            "max_steps": 6, "batch_size": 4, "lr": 1e-2, "min_lr": 1e-3, "decay": 1e-2, "mask_interval": 2,
            "validate_every": 3, "checkpoint_every": 3, "dtype": "float32",
        },
        "data": {"source": "words.txt", "context": 16, "validation": 4},
    },
    "eval": {"text": "words.txt", "context": 16, "max_tokens": 64},
    "export": [{"target": "hf"}, {"target": "onnx"}],
}  # fmt: skip
_PIPELINES: Final = (
    "nm_sparsify{criterion=magnitude}",
    'nm_sparsify{pattern=4:8,criterion=wanda,targets=["*q_proj"],ignore=["re:.*lm_head"]},slorb{k=8,projection=trainable},fold',
    "nm_sparsify{criterion=sparsegpt,compensate=false},learn_masks{alpha=5}",
    "nm_sparsify{criterion=ria},reconstruct",
    "nm_sparsify{criterion=alps}",
    "nm_sparsify{criterion=proxsparse}",
    'nm_sparsify{masks="masks.safetensors",any_model=true}',
)
_CALIBRATION: Final = ("--calibration", "words.txt", "--num-sequences", 2, "--context", 16)
_MACHINE: Final = {"system": "Linux", "processor": "a processor", "cores": 2, "memory_bytes": 1 << 34, "accelerators": []}


def main() -> None:
    """Write the fixtures and the surface anew."""
    place = Path(tempfile.mkdtemp())
    os.chdir(place)
    torch.manual_seed(0)
    _save_model(Path("model"), hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA)))
    Path("words.txt").write_text(TEXT * 40, encoding="utf-8")
    Path("recipe.yaml").write_text(yaml.safe_dump(_RECIPE, sort_keys=False), encoding="utf-8")
    _command("run", "recipe.yaml")
    _command("prune", "model", "-o", "plain", "--passes", "nm_sparsify{criterion=wanda}", *_CALIBRATION)
    _command("masks", "plain", "-o", "masks.safetensors", "--about", "words")
    _command("verify", "out/pruned", "--report", "verified")
    _command(
        "plan",
        "model",
        "--gpu",
        "rtx4090",
        "--batch",
        "1,8",
        "--seq",
        16,
        "--new-tokens",
        16,
        "--report",
        "planned",
        allowed=(0, 1),
    )
    cache = ("--teacher-cache", "cache", "--set", "teacher_k=8", "--cache-only")
    _command("retrain", "out/pruned", "-o", "unused", "-c", "recipe.yaml", *cache)
    _sample()
    measured = ("--eval-text", "words.txt", "--eval-context", 16, "--max-tokens", 64, "--criteria", "magnitude")
    _command("criteria", "model", *_CALIBRATION, *measured, "--work", "criteria", "--json", "criteria.json")
    wide = hf.LlamaConfig(**{**_LLAMA, "hidden_size": 64, "intermediate_size": 64})
    _save_model(Path("wide"), hf.LlamaForCausalLM(wide))
    _command("export", "wide", "-t", "torch", "-o", "torch", "--dtype", "bfloat16", "--no-measure")
    _command("export", "out/pruned", "-t", "tensorrt", "-o", "tensorrt", "--runtime", "tensorrt-rtx")
    for path in [*Path("tensorrt").glob("*.engine"), *Path("tensorrt").glob("*.gz"), Path("tensorrt/model.onnx")]:
        path.unlink()
    _programs()
    texts = {text: pipeline_to_text(parse_pipeline(text)) for text in (*sorted(PASSES), *_PIPELINES)}
    Path("pipelines.json").write_text(json.dumps(texts, indent=1) + "\n", encoding="utf-8")
    _clean(place)
    shutil.rmtree(FIXTURES, ignore_errors=True)
    shutil.copytree(place, FIXTURES)
    shutil.rmtree(place)
    text = json.dumps(surface(), indent=1, sort_keys=True)
    (HERE / "surface.json").write_text(text + "\n", encoding="utf-8")


def _command(*arguments: object, allowed: tuple[int, ...] = (0,)) -> None:
    done = run(*arguments)
    if done.code not in allowed:
        raise SystemExit(f"{arguments}: {done.code}\n{done.output}\n{done.errors}")


def _save_model(folder: Path, model: Any) -> None:
    words = ["<pad>", "<s>", "</s>", "<unk>", *sorted(set(TEXT.split()))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    model.save_pretrained(folder)
    hf.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names).save_pretrained(folder)


def _sample() -> None:
    """A finished file, and one that was interrupted after two of four rows."""
    options = ("--tokens", 64, "--length", 16, "--batch-size", 2)
    _command("sample", "model", "-o", "sampled.jsonl", *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("sample", "model", "-o", "interrupted.jsonl", *options).code
    beside = Path(".interrupted.jsonl.partial")
    beside.write_text("".join(beside.read_text(encoding="utf-8").splitlines(keepends=True)[:3]), encoding="utf-8")


def _programs() -> None:
    ids = torch.randint(3, 24, (2, 8), generator=torch.Generator().manual_seed(1))
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA))
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=32, **_SPECIAL))
    mixtral = hf.MixtralForCausalLM(hf.MixtralConfig(**_LLAMA, num_local_experts=2, num_experts_per_tok=1))
    plan: tuple[tuple[str, Any, str], ...] = (
        ("learned", gpt2, "nm_sparsify{criterion=wanda},learn_masks{alpha=5}"),
        ("folded", llama, "nm_sparsify{criterion=magnitude},slorb{k=8,init=mean},fold"),
        ("mixtral", mixtral, "nm_sparsify{criterion=magnitude}"),
    )
    saved = {}
    for name, model, passes in plan:
        program = capture(model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        program = apply_passes(program, passes, calibration=ids if "wanda" in passes else None, progress=False)
        program.save(Path("programs", name))
        saved[f"programs/{name}"] = program
    saved |= {folder: Program.load(folder) for folder in ("out/pruned", "out/retrained")}
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        tensors |= {name: program(**_inputs(tensors)).logits for name, program in saved.items()}
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, "outputs.safetensors")


def _inputs(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of a program among stored tensors."""
    return {name: tensors[name] for name in ("input_ids", "attention_mask")}


def _clean(place: Path) -> None:
    """Leave out the pages, which are rendered anew, and what no test reads; and see that nothing names this machine."""
    for name in ("plain", "wide", "unused", "unused.run", "out/retrained.run/checkpoints/step-00000006"):
        shutil.rmtree(name, ignore_errors=True)
    for path in [*place.rglob("report.html"), *place.rglob("report.md"), *place.rglob("*.finished")]:
        path.unlink()
    for path in list(place.rglob("figures")):
        shutil.rmtree(path)
    for path in place.rglob("report.json"):
        document = json.loads(path.read_text(encoding="utf-8"))
        for number, entry in enumerate(document["runs"]):
            entry.update(created="2026-01-01T00:00:00+00:00", seconds=1.0 + number, machine=_MACHINE)
        path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    for path in [*place.glob("programs/*/program.json"), Path("out/retrained/program.json")]:
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")), separators=(",", ":")), encoding="utf-8")
    for path in place.rglob("*"):
        if path.is_file() and (found := re.search(rb"(?<![\w.])/(tmp|home|work|root|usr|var)/[^\"'\s]*", path.read_bytes())):
            raise SystemExit(f"{path.relative_to(place)} names {found[0]!r}")


if __name__ == "__main__":
    main()
