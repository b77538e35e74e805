"""Sizes at which layers are measured, and how they are written."""

Shapes = tuple[tuple[int, int], ...]
"""Batch and sequence of each size."""


def check_shapes(shapes: Shapes) -> None:
    """Refuse sizes without a token.

    Raises:
        SparsepassError: If there is one.
    """
    if any(batch < 1 or sequence < 1 for batch, sequence in shapes):
        from sparsepass.graph.support import SparsepassError

        raise SparsepassError(f"shapes are pairs of batch and sequence, each at least 1; got {shapes}")


def parse_shapes(text: str) -> Shapes:
    """Read sizes, batch times sequence: ``1x512,8x4096``.

    Raises:
        SparsepassError: If it cannot be read.

    Example:
        >>> parse_shapes("1x512, 8x4096")
        ((1, 512), (8, 4096))
    """
    found = []
    for item in text.split(","):
        batch, _, sequence = item.strip().lower().partition("x")
        if not (batch.isdecimal() and sequence.isdecimal()):
            from sparsepass.graph.support import SparsepassError

            raise SparsepassError(
                f"--measure-shapes {item.strip()!r} cannot be read; expected BATCHxSEQUENCE, such as 1x512 or 8x4096, "
                "separated by commas"
            )
        found.append((int(batch), int(sequence)))
    return tuple(dict.fromkeys(found))
