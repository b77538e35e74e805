"""The process that measures one row of the table of criteria. `criteria.py` is the other side."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sparsepass.export.stages.criteria import CriteriaSettings, Job
from sparsepass.export.stages.preparing import PYTHON_DOCS, Evaluation
from sparsepass.graph import SparsepassError
from sparsepass.graph.load import load_model, parse_dtype
from sparsepass.graph.support import write_text
from sparsepass.passes import apply_passes, parse_pipeline
from sparsepass.passes.data import default_text


def main(request: str, out: Path) -> int:
    """Measure what the request asks for and write the row, or what went wrong."""
    asked = json.loads(request)
    settings, job = CriteriaSettings(**asked["settings"]), Job(**asked["job"])
    try:
        row = measure(settings, job)
    except SparsepassError as error:
        out.with_suffix(".error").write_text(str(error), encoding="utf-8")
        return 2
    write_text(out, json.dumps(row, indent=1) + "\n")
    return 0


def measure(settings: CriteriaSettings, job: Job) -> dict[str, Any]:
    """One row: the passes applied, and the perplexity of what they made."""
    loaded = load_model(
        settings.model,
        dtype=None if settings.dtype is None else parse_dtype(settings.dtype),
        gguf_file=settings.gguf_file,
        revision=settings.revision,
    )
    model: torch.nn.Module = loaded.model
    facts: dict[str, Any] = {"passes": "", "num_sparse": 0, "relative_error": None, "kl": None, "calibration": None}
    seconds = 0.0
    if job.passes:
        pipeline = parse_pipeline(job.passes)
        started = time.perf_counter()
        model = program = apply_passes(
            loaded.model,
            pipeline,
            calibration=default_text("calibration") if settings.calibration == PYTHON_DOCS else settings.calibration,
            tokenizer=loaded.tokenizer,
            num_sequences=settings.num_sequences,
            context=settings.context,
            seed=settings.seed,
            compute=settings.compute,  # type: ignore[arg-type]
            inplace=True,
        )
        seconds = time.perf_counter() - started
        facts |= {"passes": program.recipe, "num_sparse": program.report().num_sparse}
        facts["calibration"] = next((dict(record.calibration) for record in program.history if record.calibration), None)
        if program.history[-1].validation is not None:
            facts |= {name: program.history[-1].validation[name] for name in ("relative_error", "kl")}
    peak_bytes = _peak_bytes()
    evaluation = Evaluation(text=settings.eval_text, context=settings.eval_context, max_tokens=settings.max_tokens)
    found = evaluation.measure(model, loaded.tokenizer)
    return {
        "name": job.name,
        **facts,
        "perplexity": found.value,
        "num_tokens": found.num_tokens,
        "eval_dtype": found.dtype,
        "seconds": seconds,
        "eval_seconds": found.seconds,
        "peak_bytes": peak_bytes,
        "threads": torch.get_num_threads(),
    }


def _peak_bytes() -> int:
    """The most memory this process has held so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
