"""SLoRB branches inside zero points: which integers stand for 0 without them, in the metadata of an ONNX file.

Of a weight ``(q - (z - S/s)) s`` the file holds ``z - S/s``. What a mask drops is ``q = z``, so the 2:4 pattern is one of the
integers around z, which is written beside them. That S is the same for all weights of a block needs no proof: it is stored so.
"""

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from typing import Final

import numpy as np

from sparsepass.export.pattern.bits import Array, unpack_bits
from sparsepass.export.pattern.onnx.data import Problem

FOLDED: Final = "sparsepass.slorb_folded"
"""Key of the file's metadata."""
FOLDED_SAID: Final = "SLoRB folded into its zero points: dropped weights come out as the branch's number, not as 0"


def folded_note(zeros: Mapping[str, int | Array]) -> dict[str, str]:
    """Metadata of a file.

    Args:
        zeros: Weight -> the integer that stands for 0, or one for each block, packed as MatMulNBits has them.

    Example:
        >>> folded_note({"w": 8})
        {'sparsepass.slorb_folded': '{"w": 8}'}
    """
    if not zeros:
        return {}
    document = {name: zero if isinstance(zero, int) else _to_text(zero) for name, zero in zeros.items()}
    return {FOLDED: json.dumps(document)}


def folded_zeros(metadata: Mapping[str, str], name: str, num_out: int, num_blocks: int, bits: int) -> Array | None:
    """The integers of a weight that stand for 0 without its branch: one, or [out, blocks]; None if the file tells of none.

    Raises:
        Problem: If what it tells cannot be read, or does not fit the weight.
    """
    if FOLDED not in metadata:
        return None
    try:
        told = json.loads(metadata[FOLDED])[name]
    except KeyError:
        return None
    except (ValueError, TypeError) as error:
        raise Problem(f"the file's metadata {FOLDED} is damaged ({error})") from error
    if isinstance(told, int) and 0 <= told < 1 << bits:
        return np.array(told, np.uint8)
    try:
        packed = np.frombuffer(zlib.decompress(base64.b64decode(told, validate=True)), np.uint8)
        return unpack_bits(packed.reshape(num_out, -(-num_blocks * bits // 8)), bits)[:, :num_blocks]
    except (ValueError, TypeError, binascii.Error, zlib.error) as error:
        raise Problem(f"the file's metadata {FOLDED} does not fit the weight ({error})") from error


def _to_text(packed: Array) -> str:
    return base64.b64encode(zlib.compress(packed.tobytes())).decode("ascii")
