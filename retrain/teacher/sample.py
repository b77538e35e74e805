"""Text that a model writes itself, to distil from where there is no text, or only a narrow one.

Tensor shape legend: B batch, P tokens of a prompt, T tokens.
"""

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from sparsepass.graph.limits import position_limit
from sparsepass.graph.soft_masks import noise_key
from sparsepass.graph.support import (
    Inputs,
    SparsepassError,
    check_place,
    item_progress,
    lock_now,
    parse_json,
    replaced_file,
    shows_progress,
)
from sparsepass.graph.texts import tokenizing
from sparsepass.retrain.teacher.online import fingerprint

SAMPLED: Final = "sampled-{}.jsonl"
_LONGEST_ROW: Final = 1 << 26


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How much text a model writes, and how; the ``sample`` section of a recipe.

    Attributes:
        num_tokens: Tokens in all; rounded up to whole sequences.
        length: Tokens of a sequence.
        start: What each sequence starts from; None for the token that begins a document, or else the one that ends it.
        batch_size: Sequences at once.
        temperature: Of the distribution; 1 samples what the model was trained to say.
        seed: Of the draws.

    Raises:
        SparsepassError: If a value is out of range.
    """

    num_tokens: int
    length: int = 512
    start: str | None = None
    batch_size: int = 32
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_tokens", 2), ("length", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise SparsepassError(f"sample: {name} has to be at least {least}, and {getattr(self, name)} was given")
        if not self.temperature > 0:
            raise SparsepassError(f"sample: temperature has to be above 0, and {self.temperature} was given")

    def file_name(self, model: str = "") -> str:
        """A name for what one model writes by these settings, so that the same is found again.

        Args:
            model: Says which model, where several write into one folder.
        """
        asked = json.dumps([model, asdict(self)])
        return SAMPLED.format(hashlib.sha256(asked.encode()).hexdigest()[:8])


@torch.no_grad()
def sample(model: nn.Module, prompts_BP: Tensor, length: int, *, temperature: float = 1.0, seed: int = 0) -> Tensor:
    """Let a causal language model go on from prompts, each token drawn from its own distribution.

    The end of a document stops nothing: the model goes on behind it, as in the text it was trained on.

    Args:
        model: A transformers model with ``generate``.
        prompts_BP: Token ids, of one length.
        length: T, tokens of a sequence, prompt included.
        temperature: Of the distribution; 1 samples what the model was trained to say.
        seed: Of the draws. The random state of the process stays as it is.

    Returns:
        Token ids ``[B, T]``, on the model's device.

    Raises:
        SparsepassError: If the model generates no text, or the sequences are no longer than their prompts or longer than the
            model's context.

    Source: data-free distillation, LLM-QAT, arXiv 2305.17888, section 3.1.
    """
    from transformers import GenerationConfig

    generate = getattr(model, "generate", None)
    if not callable(generate):
        raise SparsepassError(f"{type(model).__name__} has no generate(); sampling needs a transformers model for generation")
    count = length - prompts_BP.shape[1]
    if count < 1 or not temperature > 0:
        raise SparsepassError(
            f"sequences of {length} tokens from prompts of {prompts_BP.shape[1]}, at temperature {temperature}: the length has "
            "to be above the prompt's, and the temperature above 0"
        )
    limit = position_limit(getattr(model, "config", None))
    if limit is not None and length > limit:
        raise SparsepassError(f"sequences of {length} tokens are longer than the model's context of {limit}; shorten them")
    inputs = prompts_BP.to(next(model.parameters()).device)
    settings = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=count, pad_token_id=0
    )
    own = getattr(model, "generation_config", None)
    # `generate` takes what a configuration leaves open from the model's own: where to stop, penalties, cut-offs.
    model.generation_config = GenerationConfig()  # type: ignore[assignment]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            found: Tensor = generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=settings)
    finally:
        model.generation_config = own  # type: ignore[assignment]
    return found


def sample_to_file(
    model: nn.Module,
    tokenizer: Any,
    out: str | Path,
    config: SampleConfig,
    *,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Write sampled sequences to a .jsonl file, rows of ``input_ids`` and ``text``, that training takes as a source.

    Interrupted, it goes on where it stopped when it is started again with the same settings: batches are drawn from seeds of
    their own, and those that are done lie beside the file, as ``NAME.partial``.

    Args:
        model: A transformers model with ``generate``.
        tokenizer: Its tokenizer.
        out: The file.
        config: How much, and how.
        force: Whether a file that stands there is replaced.
        progress: Whether to show how far it is, with the time left.

    Returns:
        The file.

    Raises:
        SparsepassError: If the file is there, its name does not end in .jsonl, what a sequence starts from is no token, or an
            interrupted file of other settings lies beside it.
    """
    path = check_file(out, force=force)
    prompt = _prompt(tokenizer, config.start)
    count, batch_size = -(-config.num_tokens // config.length), config.batch_size
    facts = {name: getattr(config, name) for name in ("length", "batch_size", "temperature", "seed")}
    facts |= {"prompt": prompt, "model": fingerprint(model.parameters())}
    with _kept_apart(path, force=force) as beside:
        done = _rows_done(beside, facts, force=force)
        with (
            beside.open("a" if done else "w", encoding="utf-8") as file,
            item_progress(shows_progress(progress), "sampling", count, done=done) as advance,
        ):
            if not done:
                file.write(json.dumps(facts) + "\n")
            for first in range(done - done % batch_size, count, batch_size):
                prompts = torch.tensor([prompt] * batch_size)
                seed = noise_key(config.seed, first, 0)
                ids = sample(model, prompts, config.length, temperature=config.temperature, seed=seed)
                for row in ids[max(done - first, 0) : count - first].tolist():
                    with tokenizing(tokenizer):
                        text = tokenizer.decode(row)
                    file.write(json.dumps({"input_ids": row, "text": text}) + "\n")
                    advance("")
                file.flush()
        with (
            replaced_file(path) as finished,
            beside.open(encoding="utf-8") as rows,
            finished.open("w", encoding="utf-8") as file,
        ):
            file.writelines(itertools.islice(rows, 1, 1 + count))
        beside.unlink()
    return path


@contextmanager
def _kept_apart(path: Path, *, force: bool) -> Iterator[Path]:
    """Give the file beside a place in which a run keeps its rows, while no other run writes them.

    Its rows stay for the next run when this one is interrupted; where there are none yet, it goes.

    Raises:
        SparsepassError: If another run writes it, or has finished the file meanwhile.
    """
    beside = _beside(path)
    hidden = path.with_name(f".{beside.name}")  # as it was called before
    if hidden.is_file() and not hidden.is_symlink() and not beside.exists():
        hidden.replace(beside)
    if beside.is_symlink() or (beside.exists() and (not beside.is_file() or beside.stat().st_nlink > 1)):
        raise SparsepassError(f"{beside} is a link, or has another name too, and would be written to; remove it")
    while True:
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            with suppress(OSError):  # a file system without locks
                if lock_now(descriptor) is None:
                    raise SparsepassError(f"another run writes {path} at the moment; wait for it, or choose another file")
            if beside.exists() and os.path.samestat(os.fstat(descriptor), beside.stat()):
                check_file(path, force=force)
                try:
                    yield beside
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                        raise
                    raise SparsepassError(
                        f"there is no room for {path}; its rows so far are kept in {beside}: free some space, and start it "
                        "again with the same settings to go on"
                    ) from error
                finally:
                    if beside.exists() and beside.stat().st_size == 0:
                        beside.unlink()
                return
        finally:
            os.close(descriptor)


def check_file(out: str | Path, *, force: bool = False, inputs: Inputs = ()) -> Path:
    """Make sure that a file can be written, before anything is computed.

    Args:
        out: The file.
        force: Whether a file of sampled text that stands there is replaced.
        inputs: See `check_free`.

    Raises:
        SparsepassError: If its name does not end in .jsonl, its folder is not there, or it is there and not to be replaced.
    """
    path = Path(out)
    if path.suffix != ".jsonl":
        raise SparsepassError(
            f"sampled text is written as rows of token ids and text: name a file that ends in .jsonl, not {path}"
        )
    _remove_what_is_done(path)
    check_place(path, force=force, inputs=inputs, is_ours=_is_sampled)
    return path


def _beside(path: Path) -> Path:
    """Where a run keeps its rows."""
    return path.with_name(f"{path.name}.partial")


def _remove_what_is_done(path: Path) -> None:
    """Remove the rows beside a file that holds them all: a run was killed between the two."""
    beside = _beside(path)
    if beside.is_symlink() or not (beside.is_file() and path.is_file()):
        return
    with beside.open("rb") as rows, path.open("rb") as file, suppress(OSError):
        if (
            lock_now(rows.fileno()) is not None
            and rows.readline()
            and all(a == b for a, b in itertools.zip_longest(rows, file))
        ):
            beside.unlink()


def _is_sampled(path: Path) -> bool:
    """Whether a file begins as one that was written here: with a row of token ids and text, and nothing else."""
    try:
        with path.open(encoding="utf-8") as file:
            row = json.loads(file.readline(_LONGEST_ROW))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and row.keys() == {"input_ids", "text"}


def _prompt(tokenizer: Any, start: str | None) -> list[int]:
    if start is not None:
        with tokenizing(tokenizer, start):
            ids: list[int] = tokenizer(start, add_special_tokens=False).input_ids
        if not ids:
            raise SparsepassError(f"sequences are to start from {start!r}, which the tokenizer makes no token of")
        return ids
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [int(token)]
    raise SparsepassError("the tokenizer has no token that begins or ends a document; say what sequences start from: start=...")


def _rows_done(beside: Path, facts: dict[str, Any], *, force: bool) -> int:
    """Whole rows of an interrupted file; a row that was cut off goes."""
    if not beside.is_file():
        return 0
    with beside.open("rb+") as file:
        content_end = ends = 0
        for line in file:
            content_end += len(line)
            ends = content_end if line.endswith(b"\n") else ends
        file.truncate(ends)
    with beside.open("rb") as file:
        first, rows = file.readline(), sum(1 for _ in file)
    if not first:
        return 0
    before = parse_json(first, f"line 1 of {beside}", advice="delete that file to begin anew")
    if not isinstance(before, dict):
        before = {}
    differing = [name for name in facts if before.get(name) != facts[name]]
    if not differing:
        return rows
    if force:
        return 0
    raise SparsepassError(
        f"{beside} holds {rows} sequences of an interrupted run with another {', '.join(differing)}; start it with the same "
        "settings to go on, or delete that file (or pass force=True) to begin anew"
    )
