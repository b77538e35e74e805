"""What loading returns: the model, what came beside it, and where it came from."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from sparsepass.graph.program import Program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["folder", "hub", "gguf", "program", "memory"]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with what came beside it.

    Args:
        model: The model in eval mode, of its own class; a Program if a saved program was named.
        tokenizer: Its tokenizer, if it has one.
        processor: Its image processor, feature extractor or whole processor, if it has one.
        source: What the user named.
        kind: Where it came from.
        provenance: JSON-ready facts for the report: class, dtype, parameters, files, versions, notes.
    """

    model: nn.Module
    tokenizer: "PreTrainedTokenizerBase | None"
    processor: Any
    source: str
    kind: Kind
    provenance: Mapping[str, object]

    @property
    def program(self) -> Program | None:
        """The model, if it is a Program."""
        return self.model if isinstance(self.model, Program) else None


def origin_of(name: str, kind: Kind) -> dict[str, object]:
    """What the report says of where a model came from, and of the versions that loaded it."""
    return {
        "source": name,
        "kind": kind,
        "versions": {package: metadata.version(package) for package in ("torch", "transformers")},
    }
