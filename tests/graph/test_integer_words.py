"""Integers in words, against the definition: integer i of a row begins at bit i * bits."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from sparsepass.graph.integer_words import from_words, steps_from_words, to_words


@settings(max_examples=40, derandomize=True)
@given(st.sampled_from([4, 8]), st.integers(1, 4), st.integers(1, 21), st.integers(0, 1000))
def test_words_hold_integers_from_the_lowest_bit_on(bits: int, rows: int, columns: int, seed: int) -> None:
    numbers = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    words = to_words(numbers, bits)
    assert words.shape == (rows, -(-columns * bits // 32))
    for row in range(rows):
        whole = sum((int(word) & 0xFFFFFFFF) << 32 * place for place, word in enumerate(words[row]))
        assert whole == sum(int(number) << bits * place for place, number in enumerate(numbers[row]))
    assert torch.equal(from_words(words, bits, columns), numbers)


def test_steps_are_integers_less_zero_points() -> None:
    numbers = torch.randint(0, 16, (6, 40), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (6, 5), dtype=torch.uint8)
    found = steps_from_words(to_words(numbers, 4), 40, to_words(zeros.T.contiguous(), 4).T.contiguous())
    assert torch.equal(found, numbers.short() - zeros.short().repeat_interleave(8, dim=1))
    assert torch.equal(steps_from_words(to_words(numbers, 4), 40, None), numbers.short() - 8)
    with pytest.raises(ValueError, match="hold no 50 integers"):
        steps_from_words(to_words(numbers, 4), 50, None)
