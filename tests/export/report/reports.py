"""Made-up contents of reports: one with every section, and the record of a training run."""

from typing import Any

from sparsepass.export.report.document import new_report, plain_json, run_record
from sparsepass.export.report.pages import render_html, render_markdown
from sparsepass.export.report.schema import ReportDocument
from sparsepass.export.report.view import Answer, report_view, summary


def full_report() -> dict[str, Any]:
    outcomes = [
        {"site": "a", "weight": "a.weight", "shape": [4, 8], "action": "rewritten", "reason": "", "facts": {"x": 0.25}},
        {"site": "b", "weight": "b.weight", "shape": [4, 7], "action": "skipped", "reason": "7 | 4", "facts": {}},
    ]
    record = {
        "text": "nm_sparsify{pattern=2:4}",
        "promise": "approximate",
        "outcomes": outcomes,
        "validation": {"against": "x", "inputs": "example inputs", "max_error": 1.0, "relative_error": 0.5, "kl": 0.1},
        "calibration": {"source": "text.txt", "num_sequences": 4, "num_tokens": 128},
        "seconds": 1.5,
    }
    figures = {"nll_mean": 1.0, "num_tokens": 99, "context": 8, "stride": 8, "bos": False, "dtype": "float32"}
    return new_report() | {
        "recipe": "nm_sparsify{pattern=2:4}",
        "runs": plain_json([run_record("export", command="sparse-export m", seconds=3.0)]),
        "model": {
            "source": "m",
            "kind": "folder",
            "class": "C",
            "dtype": "float32",
            "num_parameters": 60,
            "notes": ["n"],
        },
        "passes": {"num_sites": 2, "num_sparse": 1, "skipped": {"b": "7 | 4"}, "passes": [record]},
        "accuracy": {
            "text": "eval.txt",
            "measurements": [
                {"name": "dense", "perplexity": 10.0, "seconds": 1.0, **figures},
                {"name": "2:4", "perplexity": 15.0, "seconds": 1.0, **figures},
            ],
        },
        "artifact": {
            "target": "onnx",
            "dtype": "float32",
            "files": {"model.onnx": 1234567},
            "size_bytes": 1234567,
            "expected_sparse": {"model.onnx": {"a.weight": "2:4"}},
            "notes": [],
            "details": {},
        },
        "sparsity": {
            "runtime": "tensorrt",
            "runtime_version": "11.4",
            "gpus": ["L40S (SM89)"],
            "engines": [
                {
                    "name": "decode",
                    "file": "decode.engine",
                    "targets": [89],
                    "size_bytes": 1000,
                    "flag_requested": True,
                    "num_eligible": 1,
                    "num_chosen": None,
                }
            ],
            "layers": [
                dict.fromkeys(("conforms", "flag_requested", "eligible", "chosen", "ran_sparse"), "yes")
                | {"engine": "decode", "layer": "n", "weight": "a.weight", "shape": [4, 8], "reason": "a sparse tactic"}
            ],
            "counts": {"total": {}, "engines": {"decode": {"chosen": {"yes": 1, "no": 0, "unknown": 2}}}},
            "measured": {
                "decode": {
                    "points": [{"batch": 1, "sequence": 64, "past": 0, "dense_ms": 3.0, "sparse_ms": 2.0}],
                    "break_even": "sparse is faster everywhere",
                }
            },
        },
        "verification": {
            "held": False,
            "checks": [
                {"name": "pattern", "held": True, "summary": "2:4 holds", "details": {}},
                {"name": "outputs", "held": False, "summary": "they differ", "details": {}},
                {"name": "other", "held": None, "summary": "cannot be run here", "details": {}},
            ],
        },
        "samples": {"file": "s.safetensors", "inputs": {"x": {"shape": [2, 8], "dtype": "float32"}}, "outputs": {}},
    }


def lines(count: int, **changes: Any) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl as a run writes them."""
    return [
        {
            "step": step, "tokens": 64 * step, "loss": 4 - step / count, "kl": 1.0, "ce": 3.0, "grad_norm": 0.5, "lr": 1e-3,
            "decay": 0.0, "flip_rate": 0.01 if step % 10 == 0 else 0.0, "flips_since_first": step / 10_000, "seconds": 0.1,
            "tokens_per_second": 640.0, "memory_bytes": 1 << 20,
        } | changes
        for step in range(1, count + 1)
    ]  # fmt: skip


def record(count: int = 40, **changes: Any) -> dict[str, Any]:
    """A run's entry of `Program.retraining`."""
    found = [{"step": s, "nll": 3.0, "perplexity": 20.0 - s / 10, "kl": 1.0 - s / 100, "num_tokens": 9} for s in (0, 20, 40)]
    return {
        "settings": {"method": "ast", "lr": 1e-3},
        "num_steps": count,
        "num_tokens": 64 * count,
        "seconds": 4.0,
        "step_of_weights": 20,
        "teacher": {"kind": "model", "class": "Llama", "source": "some/model"},
        "data": {"train": {"source": "a.txt", "epochs": 1.5}, "validation": None},
        "validations": found,
        "flips_since_first": 0.004,
        "flips_since_first_by_layer": {f"layers.{i}.{kind}.weight": 0.001 * i for i in range(3) for kind in ("up", "down")},
    } | changes


def html_page(document: dict[str, Any]) -> str:
    return render_html(report_view(ReportDocument.parse(document)))


def markdown_page(document: dict[str, Any]) -> str:
    return render_markdown(report_view(ReportDocument.parse(document)))


def answers(document: dict[str, Any]) -> list[Answer]:
    return summary(ReportDocument.parse(document))
