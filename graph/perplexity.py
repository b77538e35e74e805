"""The one perplexity: every figure this project states comes from this function.

Shape legend: B windows, T tokens of a window, N scored tokens, V vocabulary.
"""

import contextlib
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  # its name everywhere
from torch import Tensor, nn

from sparsepass.graph.admission import check_has_values, named_outputs
from sparsepass.graph.limits import position_limit
from sparsepass.graph.load import parse_dtype
from sparsepass.graph.placement import home_of, placed
from sparsepass.graph.program import Program
from sparsepass.graph.support import SparsepassError, evaluating, find_device, path_named
from sparsepass.graph.texts import Text, check_text_file, first_ids, tokenizing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOSS_CHUNK_TOKENS = 256
_BATCH_TOKENS = 2048


class HasLogits(Protocol):
    """What a causal language model returns, as far as perplexity reads it."""

    @property
    def logits(self) -> Tensor:
        """Scores of the next token, [B, T, V]."""


class CausalLM(Protocol):
    """What perplexity needs of a model: called with ids (and a mask, where it takes one), it returns logits."""

    def __call__(self, *, input_ids: Tensor) -> HasLogits:
        """Score every next token of [B, T] ids."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A perplexity with all it depends on.

    Args:
        value: ``exp(nll_mean)``.
        nll_mean: Mean negative log-likelihood of the scored tokens, in nats.
        num_tokens: Tokens scored.
        context: Tokens in a full window.
        stride: Text tokens by which the window moves on.
        bos: Whether every window begins with the beginning-of-text token.
        dtype: Arithmetic of the model, such as "float32" or "bfloat16 autocast".
        seconds: Time it took.
    """

    value: float
    nll_mean: float
    num_tokens: int
    context: int
    stride: int
    bos: bool
    dtype: str
    seconds: float

    def __str__(self) -> str:
        bos = "with BOS" if self.bos else "no BOS"
        return (
            f"perplexity {self.value:.4f} ({self.num_tokens} tokens scored, context {self.context}, stride "
            f"{self.stride}, {bos}, {self.dtype}, {self.seconds:.1f} s)"
        )


@dataclass(frozen=True, kw_only=True)
class _Window:
    """One call of the model: its ids, and the position of the first one that is scored."""

    ids: Tensor
    first_scored: int


def perplexity(
    model: "CausalLM | nn.Module",
    text: "Text | Tensor",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    context: int = 512,
    stride: int | None = None,
    bos: bool | None = None,
    dtype: "torch.dtype | str | None" = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    text_column: str | None = None,
    device: "torch.device | str | None" = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measure the perplexity of a causal language model on a text.

    The text is tokenized as one, without special tokens, and cut into windows of ``context`` tokens (a shorter one at
    the end). Each token that has a token before it in its window is scored once. With ``stride`` smaller than
    ``context`` windows overlap, and of each but the first only the tokens that no window before it scored count, so
    that every token is seen with at least ``context - stride`` tokens before it, as Hugging Face's documentation
    describes. Figures compare only at the same context, stride, BOS and tokenizer.

    Shapes: ids are [T] or [1, T].

    Args:
        model: A Hugging Face causal LM, a Program, or anything called as ``model(input_ids=...)`` that returns an
            object with ``logits``. It is left in the mode it was in.
        text: The text itself, the Path of a UTF-8 text file or of one with rows (.jsonl, .parquet), or token ids. The texts
            of rows are joined with a blank line between them.
        tokenizer: Needed unless ids are given.
        context: Tokens in a window, the BOS token included.
        stride: Tokens by which the window moves on; None means windows that do not overlap.
        bos: Whether each window begins with the BOS token (which is never scored). None means: if the tokenizer itself
            puts it before a text; never for ids.
        dtype: None to compute as the model is; bfloat16 or float16 to run a float32 model under ``torch.autocast``.
        batch_size: Windows in a call; None for as many as have about 2048 tokens. It does not change the result.
        max_tokens: Use only so many tokens from the beginning of the text; no more of it is read than they need.
        text_column: The column of a file with rows that holds text; by default ``text``, or else chats in ``messages``.
        device: Where to compute, see `find_device`; by default where the model is. Weights that the device has no room for
            stay, and move there one by one.
        progress: Called with the windows done and the windows in all.

    Returns:
        The perplexity and what it depends on.

    Raises:
        SparsepassError: If the model is not a causal LM, the text is empty, missing or too short, ids are out of range,
            the context is larger than the model's positions, or logits are not finite.

    Exactness: the loss is computed in float32 from the model's logits and summed in float64; of a batch's logits only
    256 tokens at a time are held in float32. Batch size changes it by the model's own rounding only (below 1e-5 in
    float32).

    Example:
        >>> from types import SimpleNamespace
        >>> def uniform(*, input_ids):
        ...     return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 8))
        >>> result = perplexity(uniform, torch.arange(8), context=4)
        >>> round(result.value, 4), result.num_tokens
        (8.0, 6)
    """
    started = time.perf_counter()
    place = None if device is None else find_device(device)
    if isinstance(model, nn.Module):
        check_has_values(model)
    config = _config(model)
    check_settings(context=context, stride=stride, batch_size=batch_size, max_tokens=max_tokens)
    _check_context(config, context)
    if config.get("is_encoder_decoder"):
        raise SparsepassError(
            f"{_name(model)} is an encoder-decoder, and perplexity is of causal language models; evaluate it on its own task"
        )
    ids_T = _ids(text, tokenizer, max_tokens, text_column)
    bos_id = _bos_id(bos, tokenizer, config, is_text=not isinstance(text, Tensor))
    _check_ids(ids_T, config, with_bos=bos_id is not None)
    num_text = context - (bos_id is not None)
    step = num_text if stride is None else min(stride, num_text)
    windows = list(_windows(ids_T, num_text=num_text, step=step, bos_id=bos_id))
    rows = batch_size or max(1, _BATCH_TOKENS // context)

    place = place or (home_of(model) if isinstance(model, nn.Module) else torch.device("cpu"))
    arithmetic, autocast = _arithmetic(model, dtype, place)
    call = _caller(model)
    nll_sum, num_scored, num_done = 0.0, 0, 0
    with contextlib.ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(placed(model, place))
            stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(autocast)
        _check_causal(model, call, windows[0].ids[None].to(place))
        for batch in _batches(windows, rows):
            ids_BT = torch.stack([window.ids for window in batch]).to(place)
            nll_sum += _nll_sum(call(ids_BT), ids_BT, batch[0].first_scored, num_done)
            num_scored += len(batch) * (ids_BT.shape[1] - batch[0].first_scored)
            num_done += len(batch)
            if progress is not None:
                progress(num_done, len(windows))
    nll_mean = nll_sum / num_scored
    return Perplexity(
        value=perplexity_of(nll_mean),
        nll_mean=nll_mean,
        num_tokens=num_scored,
        context=context,
        stride=step,
        bos=bos_id is not None,
        dtype=arithmetic,
        seconds=time.perf_counter() - started,
    )


def perplexity_of(nll_mean: float) -> float:
    """Return the perplexity that a mean loss of so many nats per token is; infinite where a float does not hold it.

    Example:
        >>> perplexity_of(0.0), perplexity_of(800.0)
        (1.0, inf)
    """
    return math.exp(nll_mean) if nll_mean < 700 else math.inf


def _windows(ids_T: Tensor, *, num_text: int, step: int, bos_id: int | None) -> Iterator[_Window]:
    num_tokens, scored_to = len(ids_T), 0
    for begin in range(0, num_tokens, step):
        end = min(begin + num_text, num_tokens)
        piece_T = ids_T[begin:end]
        first = max(scored_to - begin, 0 if bos_id is not None else 1)
        if bos_id is not None:
            piece_T = torch.cat([torch.tensor([bos_id]), piece_T])
            first += 1
        if first < len(piece_T):
            yield _Window(ids=piece_T, first_scored=first)
        scored_to = end
        if end == num_tokens:
            return


def _batches(windows: list[_Window], rows: int) -> Iterator[list[_Window]]:
    for _, group in itertools.groupby(windows, key=lambda window: (len(window.ids), window.first_scored)):
        same = list(group)
        for start in range(0, len(same), rows):
            yield same[start : start + rows]


def _nll_sum(logits_BTV: Tensor, ids_BT: Tensor, first_scored: int, num_done: int) -> float:
    total = torch.zeros((), dtype=torch.float64)
    for row, (logits_TV, ids_T) in enumerate(zip(logits_BTV, ids_BT, strict=True)):
        scores_NV, targets_N = logits_TV[first_scored - 1 : -1], ids_T[first_scored:]
        for start in range(0, len(targets_N), _LOSS_CHUNK_TOKENS):
            part = slice(start, start + _LOSS_CHUNK_TOKENS)
            scores = scores_NV[part]
            # float64 logits stay so: a reference in float64 is to be had by loading the model so.
            wide = scores if scores.dtype == torch.float64 else scores.float()
            nll_N = F.cross_entropy(wide, targets_N[part], reduction="none")
            if not bool(torch.isfinite(nll_N).all()):
                raise SparsepassError(
                    f"the model's logits give a likelihood that is not finite (window {num_done + row}, within tokens "
                    f"{start} to {start + len(nll_N)} of those scored): NaN or Inf in weights or activations; check "
                    "the weights, or compute in float32"
                )
            total += nll_N.double().sum().cpu()
    return float(total)


def _caller(model: "CausalLM | nn.Module") -> Callable[[Tensor], Tensor]:
    names, takes_any = _parameters(model)
    if "input_ids" not in names and not takes_any:
        raise SparsepassError(
            f"{_name(model)} takes no input_ids (it takes {', '.join(sorted(names - {'kwargs'})) or 'nothing'}), so it is "
            "not a causal language model; perplexity is of those only"
        )
    with_mask = "attention_mask" in names or takes_any
    extra = {"use_cache": False} if "use_cache" in names else {}

    def call(ids_BT: Tensor) -> Tensor:
        kwargs: dict[str, Any] = {"attention_mask": torch.ones_like(ids_BT)} if with_mask else {}
        with named_outputs(model):
            output: Any = model(input_ids=ids_BT, **kwargs, **extra)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids_BT.shape:
            came = f"logits of shape {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(output).__name__}"
            raise SparsepassError(
                f"{_name(model)} is not a causal language model: expected logits of shape [batch, tokens, "
                f"vocabulary], came {came} for ids of shape {list(ids_BT.shape)}; load it with a language-model head "
                "(task text-generation)"
            )
        return logits

    return call


def _parameters(model: "CausalLM | nn.Module") -> tuple[set[str], bool]:
    if isinstance(model, Program):
        return set(model.input_names), False
    from transformers import PreTrainedModel

    parameters = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    # A wrapper that passes everything on tells nothing; a model of transformers names what it takes, **kwargs or not.
    return set(parameters), takes_any and "input_ids" not in parameters and not isinstance(model, PreTrainedModel)


def _check_causal(model: "CausalLM | nn.Module", call: Callable[[Tensor], Tensor], ids_BT: Tensor) -> None:
    """Change the last token: the scores before it must not change. Class names tell too little: BERT has LM heads."""
    before = call(ids_BT)
    changed_BT = ids_BT.clone()
    changed_BT[:, -1] = (changed_BT[:, -1] + 1) % before.shape[-1]
    earlier, after = before[:, :-1].float(), call(changed_BT)[:, :-1].float()
    # Mixture-of-experts models regroup their tokens, which rounds differently; what looks ahead differs far more.
    tolerance = (1e-5 if before.dtype in (torch.float32, torch.float64) else 3e-2) * float(earlier.abs().amax())
    difference = float((earlier - after).abs().amax())
    if difference > tolerance:
        raise SparsepassError(
            f"{_name(model)} is not a causal language model: changing the last token changed the scores before it by "
            f"{difference:.3g}, so it sees what it is to predict; perplexity has no meaning for it"
        )


def _ids(
    text: "Text | Tensor", tokenizer: "PreTrainedTokenizerBase | None", max_tokens: int | None, column: str | None
) -> Tensor:
    if isinstance(text, Tensor):
        ids_T = text[0] if text.dim() == 2 and text.shape[0] == 1 else text
        if ids_T.dim() != 1 or ids_T.dtype.is_floating_point or ids_T.dtype in (torch.bool, torch.complex64):
            raise SparsepassError(
                f"token ids have to be integers of shape [tokens] or [1, tokens], and are {text.dtype} of shape "
                f"{list(text.shape)}; join several texts into one row, or measure each"
            )
        return ids_T.cpu().long()[:max_tokens]
    if isinstance(text, str) and "\n" not in text and (there := path_named(text)) is not None and there.is_file():
        raise SparsepassError(
            f"text {text!r} is the name of a file, and a string is taken as the text itself; pass pathlib.Path({text!r})"
        )
    for each in text if isinstance(text, tuple) else (text,):
        if isinstance(each, Path):
            check_text_file(each, "evaluation text", column=column)
    if isinstance(text, str) and not text.strip():
        raise SparsepassError("evaluation text is empty; give some text of at least two tokens")
    if tokenizer is None:
        raise SparsepassError(
            "evaluation text needs a tokenizer, and none lies beside the model; put its files there, or in Python pass "
            "tokenizer=..., or token ids"
        )
    return torch.tensor(first_ids(text, tokenizer, max_tokens, what="evaluation text", column=column), dtype=torch.long)


def _bos_id(
    bos: bool | None, tokenizer: "PreTrainedTokenizerBase | None", config: Mapping[str, Any], *, is_text: bool
) -> int | None:
    if bos is None:
        if not is_text or tokenizer is None or tokenizer.bos_token_id is None:
            return None
        with tokenizing(tokenizer):
            first = list(tokenizer("a", verbose=False)["input_ids"])[:1]
        return int(tokenizer.bos_token_id) if first == [tokenizer.bos_token_id] else None
    if not bos:
        return None
    bos_id = tokenizer.bos_token_id if tokenizer is not None else config.get("bos_token_id")
    if not isinstance(bos_id, int):
        raise SparsepassError(
            f"bos=True, and {'the tokenizer' if tokenizer is not None else 'the configuration'} has no BOS token; use bos=False"
        )
    return bos_id


def check_settings(*, context: int, stride: int | None, batch_size: int | None, max_tokens: int | None) -> None:
    """Raise unless the numbers can be those of a perplexity, of whatever model.

    Raises:
        SparsepassError: If one is out of range.
    """
    if context < 2:
        raise SparsepassError(f"context has to be at least 2 tokens (one to predict from, one to score), and is {context}")
    if stride is not None and not 1 <= stride <= context:
        raise SparsepassError(f"stride has to lie between 1 and the context of {context}, and is {stride}")
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise SparsepassError(f"{name} has to be at least 1, and is {value}")


def _check_context(config: Mapping[str, Any], context: int) -> None:
    limit = position_limit(config)
    if limit is not None and context > limit:
        raise SparsepassError(f"context of {context} tokens is more than the model's {limit} positions; choose {limit} or less")


def _check_ids(ids_T: Tensor, config: Mapping[str, Any], *, with_bos: bool) -> None:
    if len(ids_T) + with_bos < 2:
        raise SparsepassError(f"evaluation text has {len(ids_T)} tokens; at least {2 - with_bos} are needed to score one")
    vocab_size = config.get("vocab_size")
    low, high = int(ids_T.min()), int(ids_T.max())
    if low < 0 or (isinstance(vocab_size, int) and high >= vocab_size):
        raise SparsepassError(
            f"token ids from {low} to {high} are outside the model's vocabulary of {vocab_size}; is the tokenizer the model's?"
        )


def _config(model: "CausalLM | nn.Module") -> Mapping[str, Any]:
    from transformers import PretrainedConfig

    config: object = model.origin.config if isinstance(model, Program) else getattr(model, "config", None)
    if isinstance(config, PretrainedConfig):
        return config.get_text_config().to_dict() | {"is_encoder_decoder": config.is_encoder_decoder}
    if isinstance(config, Mapping):
        nested = config.get("text_config")
        return {**config, **nested} if isinstance(nested, Mapping) else config
    return {}


def _arithmetic(
    model: "CausalLM | nn.Module", dtype: "torch.dtype | str | None", device: torch.device
) -> tuple[str, AbstractContextManager[object]]:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    weights = (p.dtype for p in parameters if p.dtype.is_floating_point)
    own = next(weights, torch.float32)
    wanted = own if dtype is None else parse_dtype(dtype)
    if wanted == own:
        return str(own).removeprefix("torch."), nullcontext()
    if own != torch.float32 or wanted not in (torch.bfloat16, torch.float16):
        raise SparsepassError(
            f"the model's weights are {own} and dtype {wanted} was asked for; only a float32 model can be run in "
            f"bfloat16 or float16 (by autocast): load the model with dtype={str(wanted).removeprefix('torch.')} instead"
        )
    return f"{str(wanted).removeprefix('torch.')} autocast", torch.autocast(device.type, dtype=wanted)


def _name(model: object) -> str:
    if isinstance(model, Program):
        return f"the program of {model.origin.model_class or 'a plain module'}"
    return type(model).__name__ if isinstance(model, nn.Module) else "the model"
