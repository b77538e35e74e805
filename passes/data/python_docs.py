"""Text that is always there: Python's own documentation topics."""

import re
from typing import Literal

from sparsepass.graph.support import SparsepassError


def default_text(part: Literal["calibration", "evaluation"]) -> str:
    """Return text that is always there: Python's own documentation topics, in two disjoint parts.

    Of the topics in alphabetical order every third belongs to the evaluation part. Topics quote each other, so a
    paragraph that occurs in both parts is left out of the calibration part, and repeated paragraphs are kept once. The
    text follows the version of Python: compare figures only within one.

    Args:
        part: "calibration" or "evaluation".

    Returns:
        Plain text, some 200,000 characters for calibration and 170,000 for evaluation.

    Raises:
        SparsepassError: If ``part`` is neither, or this Python was built without its documentation topics.

    Example:
        >>> len(default_text("calibration")) > 100_000
        True
    """
    if part not in ("calibration", "evaluation"):
        raise SparsepassError(f"part has to be 'calibration' or 'evaluation', and {part!r} was given")
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise SparsepassError(
            "this Python comes without pydoc_data, its documentation topics; pass a text file of your own as "
            "calibration and evaluation text"
        ) from error
    names = sorted(topics)
    evaluation = {name for index, name in enumerate(names) if index % 3 == 2}
    seen = {_squeeze(text) for name in evaluation for text in _paragraphs(topics[name])} if part == "calibration" else set()
    kept: list[str] = []
    for name in names:
        if (name in evaluation) == (part == "evaluation"):
            for paragraph in _paragraphs(topics[name]):
                key = _squeeze(paragraph)
                if key not in seen:
                    seen.add(key)
                    kept.append(paragraph)
    return "\n\n".join(kept) + "\n"


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]


def _squeeze(text: str) -> str:
    return " ".join(text.split())
