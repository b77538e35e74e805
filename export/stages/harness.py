"""Tasks of the Language Model Evaluation Harness (the package ``lm-eval``) on a model in memory."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from sparsepass.graph.placement import fits, home_of, placed
from sparsepass.graph.program import Program
from sparsepass.graph.support import SparsepassError, evaluating, find_device, how_to_install

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def lm_eval_tasks(
    model: "PreTrainedModel | Program",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    include_path: "str | Path | None" = None,
    limit: int | None = None,
    batch_size: int = 1,
    num_fewshot: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Run lm-eval tasks.

    Args:
        model: A Hugging Face causal LM, or a Program, whose ``to_model()`` is evaluated.
        tokenizer: The model's tokenizer.
        tasks: Names of tasks, of lm-eval's own or from ``include_path``.
        include_path: A folder with task files (YAML) of your own. Relative data files in them are read from the working
            folder, as lm-eval does.
        limit: Use only so many documents of each task, for a trial; None for all.
        batch_size: Requests in a batch.
        num_fewshot: Examples before each question; None for what the task says.
        seed: Chooses the examples before a question.
        device: Where to compute, see `find_device`; by default where the model is. It has to have room for the whole model.

    Returns:
        JSON-ready facts: "results" by task (lm-eval's own metric names), "versions" and "num_samples" by task, and the
        settings "limit", "batch_size", "num_fewshot", "seed" and "lm_eval" (its version).

    Raises:
        SparsepassError: If lm-eval is missing, a task is unknown, or the tokenizer is missing.

    Example:
        >>> lm_eval_tasks(model, tokenizer, ["hellaswag"], limit=100)["results"]  # doctest: +SKIP
        {'hellaswag': {'acc,none': 0.43, ...}}
    """
    if tokenizer is None:
        raise SparsepassError("lm-eval tasks need the model's tokenizer; the model's folder has none")
    manager = check_tasks(tasks, include_path=include_path)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    hf_model = model.to_model() if isinstance(model, Program) else model
    place = home_of(hf_model) if device is None else find_device(device)
    if place != home_of(hf_model) and not fits(hf_model, place):
        raise SparsepassError(
            f"{place} has no room for the whole model, which lm-eval tasks need (perplexity does without); give device=cpu"
        )
    with _undisturbed(hf_model), placed(hf_model, place):
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=hf_model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return {
        "results": found["results"],
        "versions": found["versions"],
        "num_samples": found["n-samples"],
        "limit": limit,
        "batch_size": batch_size,
        "num_fewshot": num_fewshot,
        "seed": seed,
        "lm_eval": lm_eval.__version__,
    }


def check_tasks(tasks: Sequence[str], *, include_path: "str | Path | None" = None) -> Any:
    """Make sure that tasks can be run, before a model is loaded.

    Returns:
        lm-eval's manager of tasks.

    Raises:
        SparsepassError: If lm-eval is missing, or a task is unknown.
    """
    if util.find_spec("lm_eval") is None:
        raise SparsepassError(f"lm-eval tasks need the package lm-eval: {how_to_install('lm-eval')}")
    if not tasks:
        raise SparsepassError("no task was given; name at least one, such as hellaswag")
    if include_path is not None and not Path(include_path).is_dir():
        raise SparsepassError(f"include_path {include_path} is not a folder; expected one with lm-eval task files (YAML)")
    import lm_eval
    from lm_eval.tasks import TaskManager

    # lm-eval's own tasks are thousands of files to look through; that is left out where all tasks are the caller's.
    manager = TaskManager(include_path=include_path, include_defaults=False) if include_path is not None else None
    if manager is None or any(task not in manager.all_tasks for task in tasks):
        manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise SparsepassError(
            f"lm-eval {lm_eval.__version__} knows no task {', '.join(unknown)}; list its tasks with `lm-eval ls "
            "tasks`, or name the folder of your own with include_path"
        )
    return manager


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back what lm-eval changes: the model's modes, and the seeds it sets for the whole process."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), evaluating(model):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
