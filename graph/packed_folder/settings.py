"""What config.json of a packed folder says of its layers: the entry `quantization_config`.

1. The layers that are packed stand in groups: those of a group read one input, and run in one call.
2. Everything that cannot be read from the model's class and the tensors' shapes stands here, so that the modules are known
   before a tensor is read.
3. A layer is named as in the files, which is what stays: module paths change with the version of transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast, final, get_args

from sparsepass.graph.support import SparsepassError

QUANT_METHOD: Final = "sparsepass"
FORMAT_VERSION: Final = 1
Values = Literal["bf16", "fp16", "int8", "int4"]
INTEGERS: Final = ("int8", "int4")
FOR_INFERENCE: Final = (
    "packed folders are for inference, and cannot be rewritten or trained: start from the program that was exported, or from "
    "the plain folder that `sparsepass unpack FOLDER -o OUT` writes"
)
_ADVICE: Final = "the folder is damaged or was changed by hand: export the model again"


@final
@dataclass(frozen=True, kw_only=True)
class BranchSettings:
    """The SLoRB branch of a packed layer.

    Attributes:
        k: Input features summed into one.
        projection: Whether the projection is a tensor of its own (trained), or the fixed segment sum.
    """

    k: int
    projection: Literal["fixed", "trained"] = "fixed"


@final
@dataclass(frozen=True, kw_only=True)
class PackedSettings:
    """Which layers of a folder are packed, and how.

    Attributes:
        values: Kind of the kept values.
        group_size: Columns that share a scale; 0 for floating values.
        embedding: How embedding and head are kept: ``int8``, or None for as they are.
        groups: Names of the packed layers; ``.weight`` and ``.codes`` come after them. Layers that read one input stand in one
            group.
        branches: Layer -> SLoRB branch, for the layers that have one.
        transposed: Layers whose dense weight is stored [in, out] (GPT-2's Conv1D).
        embeddings: Embeddings (and heads) that are kept in int8.

    Example:
        >>> settings = PackedSettings(values="bf16", groups=(("a.q", "a.k"), ("a.o",)))
        >>> PackedSettings.from_dict(settings.to_dict()) == settings
        True
    """

    values: Values
    group_size: int = 0
    embedding: Literal["int8"] | None = None
    groups: tuple[tuple[str, ...], ...] = ()
    branches: Mapping[str, BranchSettings] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """All packed layers."""
        return tuple(layer for group in self.groups for layer in group)

    def to_dict(self) -> dict[str, Any]:
        """The entry ``quantization_config`` as JSON."""
        document: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "version": FORMAT_VERSION,
            "values": self.values,
            "group_size": self.group_size,
            "embedding": self.embedding,
            "layers": [list(group) for group in self.groups],
            "slorb": {layer: {"k": branch.k, "projection": branch.projection} for layer, branch in self.branches.items()},
        }
        optional = {"transposed": list(self.transposed), "embeddings": list(self.embeddings)}
        return document | {name: value for name, value in optional.items() if value}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "PackedSettings":
        """Read the entry ``quantization_config``.

        Raises:
            SparsepassError: If it is of a newer version, or cannot be read.
        """
        version = document.get("version")
        if not isinstance(version, int):
            raise SparsepassError(f"quantization_config has the version {version!r}, expected {FORMAT_VERSION}; {_ADVICE}")
        if version > FORMAT_VERSION:
            raise SparsepassError(
                f"quantization_config has version {version}, and this sparsepass reads up to {FORMAT_VERSION}; "
                "upgrade sparsepass"
            )
        values = document.get("values")
        if values not in get_args(Values):
            raise SparsepassError(
                f"quantization_config names the values {values!r}, expected one of {get_args(Values)}; {_ADVICE}"
            )
        try:
            return cls(
                values=cast(Values, values),
                group_size=int(document.get("group_size", 0)),
                embedding=document.get("embedding"),
                groups=tuple(tuple(map(str, group)) for group in document["layers"]),
                branches={layer: BranchSettings(**branch) for layer, branch in document.get("slorb", {}).items()},
                transposed=tuple(document.get("transposed", ())),
                embeddings=tuple(document.get("embeddings", ())),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise SparsepassError(f"quantization_config cannot be read ({error!r}); {_ADVICE}") from error


def is_packed(quantization_config: object) -> bool:
    """Whether an entry ``quantization_config`` is that of a packed folder.

    Example:
        >>> is_packed({"quant_method": "sparsepass"}), is_packed({"quant_method": "gptq"}), is_packed(None)
        (True, False, False)
    """
    if isinstance(quantization_config, Mapping):
        return quantization_config.get("quant_method") == QUANT_METHOD
    return getattr(quantization_config, "quant_method", None) == QUANT_METHOD
