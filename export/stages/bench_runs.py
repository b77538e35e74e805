"""What is timed, and one run of it: generation token by token, or one forward pass."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from sparsepass.export.stages.settings import BenchSettings
from sparsepass.graph import SparsepassError
from sparsepass.graph.limits import position_limit


@final
@dataclass(frozen=True)
class BenchShape:
    """What a model is given.

    Attributes:
        phase: ``decode``, ``prefill`` or ``forward``.
        batch: Sequences at once.
        prompt_tokens: Tokens of each.
        new_tokens: Tokens to generate for each; 0 for a forward pass alone.
        num_words: Tokens to draw from.
    """

    phase: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    num_words: int


@final
@dataclass(frozen=True)
class BenchTimes:
    """Seconds of a run.

    Attributes:
        first_s: To the first token, or to the end of a forward pass.
        rest_s: From there to the last token.
    """

    first_s: float
    rest_s: float


def shapes(models: Sequence[nn.Module], settings: BenchSettings) -> list[BenchShape]:
    """What is measured, within the positions and the words that all models have.

    Args:
        models: Of transformers.
        settings: What was asked for.

    Raises:
        SparsepassError: If a model takes no text, some generate and others do not, or the tokens are too many.
    """
    odd = [type(model).__name__ for model in models if getattr(model, "main_input_name", "") != "input_ids"]
    if odd:
        raise SparsepassError(f"{odd[0]} takes no text, and a benchmark gives a model tokens; name a model that reads text")
    generating = {type(model).__name__: _generates(model) for model in models}
    if len({*generating.values()}) > 1:
        said = ", ".join(f"{name} {'does' if does else 'does not'}" for name, does in generating.items())
        raise SparsepassError(f"one model generates text and the other does not ({said}); name two of a kind")
    configs: list[Any] = [model.config for model in models]
    limit = min((size for config in configs if (size := position_limit(config)) is not None), default=None)
    words = min(config.get_text_config().vocab_size for config in configs)
    prefill = settings.prefill_tokens if limit is None else min(settings.prefill_tokens, limit - 1)
    if not all(generating.values()):
        return [BenchShape("forward", batch, prefill, 0, words) for batch in settings.batches]
    # The first new token is the prompt's; from the second on, they are decoded.
    decoded = settings.new_tokens + 1
    if limit is not None and settings.prompt_tokens + decoded > limit:
        raise SparsepassError(
            f"prompts of {settings.prompt_tokens} tokens and {decoded} new ones do not fit the {limit} positions of the model; "
            "lower prompt_tokens or new_tokens"
        )
    decoding = [BenchShape("decode", batch, settings.prompt_tokens, decoded, words) for batch in settings.batches]
    return [*decoding, BenchShape("prefill", 1, prefill, 1, words)]


def _generates(model: Any) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)())


@torch.no_grad()
def run_once(model: Any, shape: BenchShape) -> BenchTimes:
    """Run a model on random tokens: greedily, with a static cache where it has one, and without an early end.

    Args:
        model: Of transformers, in eval mode.
        shape: What it is given.
    """
    ids_BT = torch.randint(0, shape.num_words, (shape.batch, shape.prompt_tokens), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids_BT.to(model.device), "attention_mask": torch.ones_like(ids_BT).to(model.device)}
    stamps: list[float] = []

    def stamp() -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        stamps.append(time.perf_counter())

    def after_token(ids_BT: Tensor, scores: Any, **rest: Any) -> Tensor:
        del scores, rest
        stamp()
        return torch.zeros(ids_BT.shape[0], dtype=torch.bool, device=ids_BT.device)

    stamp()
    if shape.new_tokens:
        generate(model, inputs, shape.new_tokens, after_token)
    else:
        model(**inputs)
        stamp()
    return BenchTimes(first_s=stamps[1] - stamps[0], rest_s=stamps[-1] - stamps[1])


def generate(model: Any, inputs: dict[str, Tensor], new_tokens: int, after_token: Any = None) -> None:
    """Generate greedily, with a static cache where the model has one."""
    from transformers import StoppingCriteriaList

    model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        cache_implementation="static" if model._can_compile_fullgraph else None,
        stopping_criteria=StoppingCriteriaList([] if after_token is None else [after_token]),
        pad_token_id=0,
    )
