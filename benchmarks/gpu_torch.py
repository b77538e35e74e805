"""The proof that the target torch needs a GPU for: its kernels compute the same, and no layer gets slower.

    python benchmarks/gpu_torch.py [--out benchmarks/results] [--dtype bfloat16] [--mode eager] [--no-models]

For the layer shapes of SmolLM2-135M and Llama-3-8B it packs weights with each back end that works on this GPU, reads them back
and multiplies with them; times dense against 2:4 over batch and sequence, as called one by one and compiled; chooses by these
times as the target does; and times what was chosen anew against dense. Then it exports, loads, generates and compiles small
models of these widths. Writes gpu_torch.json and gpu_torch-compiled.json, both of which `sparse-export --timings` takes, and
gpu_torch.md. Exit code: 0 if all that was asked for holds, else 1.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsepass.export.stages import export
from sparsepass.export.targets.torch import (
    MIN_GAIN,
    TO_BE_MEASURED,
    LayerRecord,
    Measured,
    SemiStructured,
    SemiStructuredLinear,
    Timing,
    check_device,
    choose,
    dense_layer,
    load_dense,
    load_torch,
    measure_layers,
    probe,
    random_two_four,
    read_record,
    record_of,
    refusal,
    semi_structured,
    time_layers,
    time_ms,
)
from sparsepass.graph import SparsepassError
from sparsepass.graph.equivalence import compare, default_rtol

DEVICE = torch.device("cuda")
SMALL, LARGE = "SmolLM2-135M", "Llama-3-8B"
SHAPES = {
    SMALL: {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)},
    LARGE: {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)},
}
SIZES = tuple((batch, sequence) for batch in (1, 8) for sequence in (1, 16, 128, 512, 2048, 4096))
TOKENS = (1, 7, 8, 33, 512)
PREFILLS = ((1, 512), (1, 4096), (8, 512))
LARGEST_SLOWDOWN, LEAST_GAIN, MANY_TOKENS, RECHECK_ROUNDS = 1.02, 1.15, 4096, 9
MODELS = {
    SMALL: {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    LARGE: {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
}


def records() -> tuple[LayerRecord, ...]:
    return tuple(
        LayerRecord(
            layer=f"{model}: {name}",
            shape=shape,
            bias=False,
            sparse=True,
            eligible=True,
            state="to be measured",
            reason=TO_BE_MEASURED,
        )
        for model, shapes in SHAPES.items()
        for name, shape in shapes.items()
    )


@torch.no_grad()
def correctness(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Each shape and back end: bit for bit back, products within rounding, or nearly as close to float32's as dense ones."""
    usable = [name for name, why in probe(dtype, DEVICE).items() if not why]
    found = []
    for record in records():
        for backend in (name for name in usable if not refusal(record.shape, dtype, name)):
            weight = random_two_four(record.shape, dtype, DEVICE)
            row: dict[str, Any] = {"layer": record.layer, "backend": backend, "failure": ""}
            try:
                layer = SemiStructuredLinear(semi_structured(record.layer, weight, backend), None)
                torch.compiler.reset()
                compiled = torch.compile(layer, fullgraph=True, dynamic=True)
                errors = {"sparse": 0.0, "compiled": 0.0, "dense": 0.0}
                for tokens in TOKENS:
                    x = torch.randn(1, tokens, record.shape[1], dtype=dtype, device=DEVICE)
                    exact = x.float() @ weight.float().t()
                    runs = {"sparse": layer, "compiled": compiled, "dense": dense_layer(weight, None)}
                    for name, run in runs.items():
                        error = float((run(x).float() - exact).norm() / exact.norm())
                        errors[name] = max(errors[name], error)
                allowed = max(2 * errors["dense"], default_rtol(dtype))
                if max(errors.values()) > allowed:
                    row["failure"] = f"a product is off by more than {allowed:.2g}"
                row |= errors
            except (SparsepassError, RuntimeError) as error:
                row["failure"] = str(error).splitlines()[0]
            found.append(row)
    return found


def timings(dtype: torch.dtype, *, compiled: bool) -> tuple[Measured, list[dict[str, Any]]]:
    """Measure, choose as the target does, and time what was chosen anew against dense."""
    measured = measure_layers(records(), SIZES, dtype, DEVICE, compiled=compiled)
    rows = []
    for layer in choose(records(), measured):
        print(f"{layer.layer}: {layer.state}: {layer.reason}")
        again = recheck(layer, dtype, compiled=compiled) if layer.state == "lowered" else []
        rows.append({**dataclasses.asdict(layer), "chosen_against_dense": again})
    return measured, rows


def recheck(layer: LayerRecord, dtype: torch.dtype, *, compiled: bool) -> list[dict[str, Any]]:
    weight = random_two_four(layer.shape, dtype, DEVICE)
    assert layer.backend is not None
    chosen = SemiStructuredLinear(
        semi_structured(layer.layer, weight, layer.backend),
        None,
        dense_weight=weight if layer.min_tokens else None,
        min_tokens=layer.min_tokens,
    )
    layers: dict[str, nn.Module] = {"dense_ms": dense_layer(weight, None), "chosen_ms": chosen}
    found = []
    for batch, sequence in SIZES:
        x = torch.randn(batch, sequence, layer.shape[1], dtype=dtype, device=DEVICE)
        ms = time_layers(layers, x, compiled=compiled, timer=time_ms, rounds=RECHECK_ROUNDS)
        found.append({"batch": batch, "sequence": sequence, **ms, "gain": ms["dense_ms"] / ms["chosen_ms"]})
    return found


def whole_model(name: str, dtype: str, num_layers: int) -> dict[str, Any]:
    """Export, load, generate and compile a model of these widths with random weights, and time its prefill."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1024, num_hidden_layers=num_layers, max_position_embeddings=4096, torch_dtype=dtype, **MODELS[name]
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        result = export(
            model,
            SemiStructured(shapes=SIZES, dtype=dtype),
            Path(place) / "out",
            passes="nm_sparsify",
            validate=False,
        )
        lowered = load_torch(result.folder, device=DEVICE)
        dense = load_dense(result.folder, read_record(result.folder)).eval().to(DEVICE)
        ids = torch.randint(3, 1000, (1, 256), device=DEVICE)
        found = compare(dense, lowered, {"input_ids": ids}, layers=False)
        torch.compiler.reset()
        compiled = torch.compile(lowered)(ids, use_cache=False).logits
        expected = dense(ids, use_cache=False).logits
        error = float((compiled - expected).float().norm() / expected.float().norm())
        new = lowered.generate(ids[:, :16], max_new_tokens=8, do_sample=False).shape[1] - 16  # type: ignore[operator]
        prefill = {}
        for batch, sequence in PREFILLS:
            prompt = torch.randint(3, 1000, (batch, sequence), device=DEVICE)
            prefill[f"{batch}x{sequence}"] = {
                "dense_ms": time_ms(lambda prompt=prompt: dense(prompt, use_cache=False)),  # type: ignore[misc]
                "lowered_ms": time_ms(lambda prompt=prompt: lowered(prompt, use_cache=False)),  # type: ignore[misc]
            }
    failures = list(found.failures())
    failures += [] if error <= found.tolerance else [f"compiled: relative error {error:.2g}, allowed {found.tolerance:g}"]
    failures += [] if new == 8 else [f"generate gave {new} tokens instead of 8"]
    failures += list(result.failures)
    summary = record_of(lowered).summary()
    return {"model": f"{name}, {num_layers} layers", "layers": summary, "failures": failures, "prefill": prefill}


def judge(
    checked: Iterable[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]], models: Iterable[Mapping[str, Any]] = ()
) -> dict[str, dict[str, Any]]:
    """Say of each claim whether it holds, with the figure that decides. A layer that is left dense runs what it ran before.

    Args:
        checked: What `correctness` found.
        rows: What `timings` found.
        models: What `whole_model` found.
    """
    checked, rows = list(checked), list(rows)
    failures = [f"{row['layer']} {row['backend']}: {row['failure']}" for row in checked if row["failure"]]
    failures += [f"{each['model']}: {failure}" for each in models for failure in each["failures"]]
    points = [(row["layer"], point) for row in rows for point in row["chosen_against_dense"]]
    slowest = min(points, key=lambda each: each[1]["gain"], default=None)
    large = [each for each in points if each[0].startswith(LARGE) and each[1]["batch"] * each[1]["sequence"] >= MANY_TOKENS]
    fastest = max(large, key=lambda each: each[1]["gain"], default=None)
    return {
        "the kernels compute the same": {
            "held": bool(checked) and not failures,
            "said": "; ".join(failures) or (f"{len(checked)} shapes and back ends" if checked else "no back end works here"),
        },
        "no layer slower than dense by more than 2%": {
            "held": slowest is None or 1 / slowest[1]["gain"] <= LARGEST_SLOWDOWN,
            "said": _said(slowest) if slowest else "every layer is left dense",
        },
        "a Llama-8B shape at 4096 tokens or more at least 1.15 times faster": {
            "held": fastest is not None and fastest[1]["gain"] >= LEAST_GAIN,
            "said": _said(fastest) if fastest else f"no layer of {LARGE} is lowered",
        },
    }


def _said(each: tuple[str, Mapping[str, Any]]) -> str:
    return f"{each[0]}, {each[1]['batch']} x {each[1]['sequence']} tokens: {each[1]['gain']:.3f} times as fast as dense"


def render(documents: Iterable[Mapping[str, Any]]) -> str:
    """The page for people."""
    lines = ["# torch's 2:4 kernels on a GPU", ""]
    for document in documents:
        measured = document["measured"]
        mode = "compiled" if measured["compiled"] else "called one by one"
        lines += [f"## {measured['name']} (SM{measured['sm']}), torch {measured['torch']}, {measured['dtype']}, {mode}", ""]
        lines += [f"`{document['command']}`, commit {document['commit']}.", ""]
        lines += [f"- {name} cannot be used: {why}" for name, why in measured["backends"].items() if why]
        lines += ["| claim | holds | |", "|---|---|---|"]
        lines += [
            f"| {claim} | {'yes' if v['held'] else '**no**'} | {v['said']} |" for claim, v in document["verdicts"].items()
        ]
        lines += ["", "| layer | shape | choice | why |", "|---|---|---|---|"]
        for row in document["layers"]:
            start = f", from {row['min_tokens']} tokens on" if row["min_tokens"] else ""
            choice = f"{row['backend']}{start}" if row["backend"] else "dense"
            lines.append(f"| {row['layer']} | {'x'.join(map(str, row['shape']))} | {choice} | {row['reason']} |")
        lines += ["", f"Times in ms, dense / cuSPARSELt / CUTLASS; the least gain that counts is {MIN_GAIN:g}.", ""]
        sizes = [f"{batch}x{sequence}" for batch, sequence in SIZES]
        lines += ["| shape | " + " | ".join(sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
        for times in measured["times"]:
            cells = [_cell(Timing(**point)) for point in times["points"]]
            lines.append(f"| {'x'.join(map(str, times['shape']))} | " + " | ".join(cells) + " |")
        lines.append("")
        for model in document["models"]:
            lines.append(f"- {model['model']}: {model['layers']}; " + "; ".join(model["failures"] or ["outputs agree"]))
            for size, ms in model["prefill"].items():
                lines.append(f"  - prefill {size}: {ms['dense_ms']:.2f} ms dense, {ms['lowered_ms']:.2f} ms lowered")
        lines.append("")
    return "\n".join(lines)


def _cell(timing: Timing) -> str:
    others = [timing.sparse_ms.get(name) for name in ("cusparselt", "cutlass")]
    return " / ".join("-" if ms is None else f"{ms:.3g}" for ms in (timing.dense_ms, *others))


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main(arguments: argparse.Namespace) -> int:
    print(check_device(DEVICE))
    dtype = getattr(torch, arguments.dtype)
    checked = correctness(dtype)
    models = [] if arguments.no_models else [whole_model(SMALL, arguments.dtype, 30), whole_model(LARGE, arguments.dtype, 2)]
    documents = {}
    for mode in ("eager", "compiled") if arguments.mode == "both" else (arguments.mode,):
        measured, rows = timings(dtype, compiled=mode == "compiled")
        documents["gpu_torch.json" if mode == "eager" else "gpu_torch-compiled.json"] = {
            "command": " ".join(["python", *sys.argv]),
            "commit": _commit(),
            "verdicts": judge(checked, rows, models),
            "measured": measured.to_dict(),
            "layers": rows,
            "correctness": checked,
            "models": models,
        }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, document in documents.items():
        (arguments.out / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    page = render(documents.values())
    (arguments.out / "gpu_torch.md").write_text(page, encoding="utf-8")
    print(page)
    return 0 if all(v["held"] for document in documents.values() for v in document["verdicts"].values()) else 1


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--mode", default="both", choices=("eager", "compiled", "both"))
    parser.add_argument("--no-models", action="store_true")
    try:
        sys.exit(main(parser.parse_args()))
    except SparsepassError as error:
        sys.exit(f"Error: {error}")
