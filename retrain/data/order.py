"""In which order sequences are visited: integer arithmetic only, so the same on every machine and in every version."""

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return splitmix64's mix of each value; one value goes to one value.

    Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators (2014), with Stafford's constants.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """Return 0..count-1 in an order that the key chooses.

    Args:
        count: How many.
        key: Numbers such as seed and epoch; another key gives another order.

    Exactness: bitwise, whatever the versions of Python and numpy.

    Example:
        >>> permutation(8, 0, 1).tolist()
        [4, 1, 7, 5, 0, 6, 3, 2]
    """
    state = np.zeros(1, dtype=np.uint64)
    for number in key:
        state = _mix(state + _GAMMA + np.asarray([number & (2**64 - 1)], dtype=np.uint64))
    return np.argsort(_mix(state + np.arange(1, count + 1, dtype=np.uint64) * _GAMMA), kind="stable")


def spread(count: int, total: int) -> NDArray[np.int64]:
    """Return ``count`` places spread evenly over ``total``: the middle of each of ``count`` equal parts.

    Example:
        >>> spread(3, 12).tolist()
        [2, 6, 10]
    """
    return (2 * np.arange(count, dtype=np.int64) + 1) * total // (2 * count)
