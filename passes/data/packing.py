"""Text as calibration sequences: joined, or taken from places spread evenly over a long text."""

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

import torch

from sparsepass.graph.support import SparsepassError
from sparsepass.passes.data.sources import special_frame
from sparsepass.passes.data.texts import text_between

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@final
@dataclass(frozen=True)
class Packer:
    """Makes full sequences of text, each framed by the special tokens that the tokenizer itself puts around a text.

    Args:
        tokenizer: Turns text into ids.
        context: Tokens of a sequence.
        num_sequences: At most so many are used; None takes all there are.
        seed: Chooses where in a text the sequences lie.
    """

    tokenizer: "PreTrainedTokenizerBase"
    context: int
    num_sequences: int | None
    seed: int

    def join(self, texts: Iterator[str]) -> Iterator[list[int]]:
        """Join texts (a blank line between) into full sequences, tokenizing one text at a time.

        Raises:
            SparsepassError: If there is not enough for one sequence.
        """
        waiting: list[int] = []
        num_body, num_made = self._num_body, 0
        for text in texts:
            waiting.extend(self._tokens(text + "\n\n"))
            start = 0
            while len(waiting) - start >= num_body:
                yield self._framed(waiting[start : start + num_body])
                start += num_body
                num_made += 1
            del waiting[:start]
        if num_made == 0:
            raise self._too_short(len(waiting))

    def spread(self, data: bytes | mmap.mmap, what: str) -> Iterator[list[int]]:
        """Take sequences spread evenly over a text; of a long one only the parts that are used are tokenized.

        Args:
            data: UTF-8.
            what: For messages.

        Raises:
            SparsepassError: If the text is not UTF-8 or not enough for one sequence.
        """
        sequences = self._spots(data, what)
        if sequences is None:
            ids = self._tokens(text_between(data, 0, len(data), what))
            num_full = len(ids) // self._num_body
            if num_full == 0:
                raise self._too_short(len(ids))
            num_taken = min(num_full, self.num_sequences or num_full)
            starts = [index * num_full // num_taken * self._num_body for index in range(num_taken)]
            sequences = (ids[start : start + self._num_body] for start in starts)
        for sequence in sequences:
            yield self._framed(sequence)

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        before, after = special_frame(self.tokenizer)
        if len(before) + len(after) >= self.context:
            raise SparsepassError(
                f"context of {self.context} tokens leaves no room beside the tokenizer's {len(before) + len(after)} "
                "special tokens; choose a larger context"
            )
        return before, after

    @property
    def _num_body(self) -> int:
        """Tokens of the text in a sequence."""
        before, after = self._frame
        return self.context - len(before) - len(after)

    def _framed(self, ids: list[int]) -> list[int]:
        before, after = self._frame
        return [*before, *ids, *after]

    def _tokens(self, text: str) -> list[int]:
        # verbose=False: a text longer than the model's context is what is meant here, and not worth a warning.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _too_short(self, num_tokens: int) -> SparsepassError:
        return SparsepassError(
            f"calibration text is too short: it has {num_tokens} tokens, and one sequence of context {self.context} "
            f"needs {self._num_body}; give more text or a smaller context"
        )

    def _spots(self, data: bytes | mmap.mmap, what: str) -> Iterator[list[int]] | None:
        """Take one sequence from each of ``num_sequences`` equal parts of the text; None if a part may be too short."""
        if self.num_sequences is None:
            return None
        middle, num_body = len(data) // 2, self._num_body
        sample = text_between(data, max(0, middle - 8192), middle + 8192, what)
        bytes_per_token = len(sample.encode()) / max(1, len(self._tokens(sample)))
        # Half as much again as expected: texts are not even, and the sample is small.
        num_bytes = math.ceil(num_body * bytes_per_token * 1.5) + 64
        part = len(data) // self.num_sequences
        if part < 2 * num_bytes:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        offsets = torch.randint(part - num_bytes, (self.num_sequences,), generator=generator).tolist()

        def read() -> Iterator[list[int]]:
            for index, offset in enumerate(offsets):
                start, end = index * part + offset, (index + 1) * part
                for stop in (start + num_bytes, end):
                    ids = self._tokens(text_between(data, start, stop, what))
                    if len(ids) > num_body:  # more than needed: the last token may be a word cut in two
                        break
                else:
                    # An unusually dense stretch: begin at the part's start, and go as far as it takes.
                    ids = self._tokens(text_between(data, index * part, min(len(data), end + num_bytes), what))
                if len(ids) >= num_body:
                    yield ids[:num_body]

        return read()
