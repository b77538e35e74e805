"""Tensors that a user brings as model inputs: named, checked and completed.

Shape legend: B sequences, T tokens of a sequence.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError, closest, first_line

Row: TypeAlias = dict[str, Tensor]

MASK = "attention_mask"
_PRIMARY_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values")
_ID_INPUTS = ("input_ids", "decoder_input_ids")
# What tokenizers and data sets put beside the inputs, and no forward pass without a loss reads.
_IGNORED = ("labels", "label", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "length")


@final
@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """The inputs that a program takes.

    Args:
        names: Their names, in the program's order.
        vocab_size: Token ids have to be below it, if given.
    """

    names: tuple[str, ...]
    vocab_size: int | None

    def rows(self, items: Iterable[object]) -> Iterator[Row]:
        """Check tensors, or dicts of them, and give each sequence by itself."""
        for index, item in enumerate(items):
            yield from _split(self.checked(self.named(item), f"item {index}"))

    def record_rows(self, records: Iterable[Mapping[str, object]]) -> Iterator[Row]:
        """Make rows of a data set into tensors; columns that are no inputs are left out."""
        for index, record in enumerate(records):
            where = f"row {index}"
            row = {
                name: _as_tensor(name, value, where)[None]
                for name, value in record.items()
                if value is not None and (name in self.names or name == MASK)
            }
            yield self.checked(row, where)

    def named(self, item: object) -> Mapping[str, object]:
        """Give names to what came without: a tensor, or a tuple of tensors in the order of the inputs."""
        if isinstance(item, Mapping):
            return item
        if isinstance(item, (list, tuple)):
            if item and isinstance(item[0], (Tensor, np.ndarray)):
                if len(item) > len(self.names):
                    raise SparsepassError(
                        f"calibration gives {len(item)} tensors at a time, and the program has only the inputs "
                        f"{', '.join(self.names)}; give dicts of tensors by name instead"
                    )
                if len(item) == 1:
                    return {self._primary(): item[0]}
                return dict(zip(self.names, item, strict=False))
            if item and isinstance(item[0], (int, float)):
                return {self._primary(): torch.as_tensor(item)[None]}
        if isinstance(item, (Tensor, np.ndarray)):
            return {self._primary(): item}
        raise SparsepassError(
            f"calibration gives an item of type {type(item).__name__}; expected a tensor, or a dict of tensors named "
            f"by the program's inputs ({', '.join(self.names)})"
        )

    def _primary(self) -> str:
        return next((name for name in _PRIMARY_INPUTS if name in self.names), self.names[0])

    def checked(self, item: Mapping[str, object], where: str) -> Row:
        """Check one batch and bring it into the order of the program's inputs; ``attention_mask`` stays if it came."""
        batch: Row = {}
        for name, value in item.items():
            if name not in self.names and name != MASK:
                if name in _IGNORED or (name == "token_type_ids" and not _as_tensor(name, value, where).any()):
                    continue
                near = closest(name, self.names)
                raise SparsepassError(
                    f"calibration {where} has {name!r}, which is not an input of the program; its inputs are "
                    f"{', '.join(self.names)}{f'; did you mean {near!r}?' if near else ''}"
                )
            batch[name] = self._checked_tensor(name, _as_tensor(name, value, where), where)
        if not batch:
            raise SparsepassError(
                f"calibration {where} has none of the program's inputs ({', '.join(self.names)}); it has "
                f"{', '.join(map(str, item)) or 'nothing'}"
            )
        self._fill(batch, where)
        self._check_mask(batch, where)
        order = [name for name in self.names if name in batch]
        lengths = {name: batch[name].shape[0] for name in order}
        if len(set(lengths.values())) > 1:
            raise SparsepassError(
                f"calibration {where} has inputs with different first dimensions {lengths}; every input has the batch first"
            )
        return {name: batch[name] for name in dict.fromkeys([*order, *batch])}

    def _checked_tensor(self, name: str, value: Tensor, where: str) -> Tensor:
        shape = list(value.shape)
        if name in _ID_INPUTS:
            if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype is torch.bool:
                raise SparsepassError(
                    f"calibration {where}: {name} has to hold integer token ids, and is {value.dtype} of shape {shape}"
                    + self._hint_for(value)
                )
            if value.dim() != 2:
                hint = "; give it a batch dimension with ids[None]" if value.dim() == 1 else self._hint_for(value)
                raise SparsepassError(
                    f"calibration {where}: {name} has to be of shape [batch, tokens], and is of shape {shape}{hint}"
                )
            if value.shape[1] == 0:
                raise SparsepassError(f"calibration {where}: {name} is of shape {shape} and so holds no tokens")
            if value.numel() and int(value.min()) < 0:
                raise SparsepassError(
                    f"calibration {where}: {name} holds the negative id {int(value.min())}; token ids count from 0 "
                    "(padding is told by attention_mask, not by -100)"
                )
            if self.vocab_size is not None and value.numel() and int(value.max()) >= self.vocab_size:
                raise SparsepassError(
                    f"calibration {where}: {name} holds the id {int(value.max())}, and the model's vocabulary has "
                    f"{self.vocab_size}; was another model's tokenizer used?"
                )
            return value.long()
        if name == "pixel_values" and (not value.dtype.is_floating_point or value.dim() not in (4, 5)):
            raise SparsepassError(
                f"calibration {where}: pixel_values has to be floating-point of shape [batch, channels, height, "
                f"width], and is {value.dtype} of shape {shape}; the model's image processor makes it so"
            )
        if value.dim() == 0:
            raise SparsepassError(f"calibration {where}: {name} is a single number; every input has the batch first")
        if value.dtype.is_floating_point and not bool(torch.isfinite(value).all()):
            raise SparsepassError(f"calibration {where}: {name} holds NaN or Inf")
        return value

    def _hint_for(self, value: Tensor) -> str:
        if value.dim() == 4:
            return f"; it looks like pixel values, but the program's inputs are {', '.join(self.names)}"
        return ""

    def _fill(self, batch: Row, where: str) -> None:
        ids_BT = batch.get("input_ids")
        for name in self.names:
            if name in batch:
                continue
            if ids_BT is not None and name == MASK:
                batch[name] = torch.ones_like(ids_BT)
            elif ids_BT is not None and name == "token_type_ids":
                batch[name] = torch.zeros_like(ids_BT)
            else:
                raise SparsepassError(
                    f"calibration {where} lacks the program's input {name!r}; it has {', '.join(batch)}. Give dicts "
                    f"with all of {', '.join(self.names)}"
                )

    def _check_mask(self, batch: Row, where: str) -> None:
        mask_BT, ids_BT = batch.get(MASK), batch.get("input_ids")
        if mask_BT is None or ids_BT is None:
            return
        if mask_BT.shape != ids_BT.shape:
            raise SparsepassError(
                f"calibration {where}: attention_mask is of shape {list(mask_BT.shape)} and input_ids of shape "
                f"{list(ids_BT.shape)}; they have to be equal"
            )
        if not bool(((mask_BT == 0) | (mask_BT == 1)).all()):
            raise SparsepassError(f"calibration {where}: attention_mask may hold only 0 (padding) and 1")
        if ids_BT.shape[0] and not bool(mask_BT.bool().any(dim=1).all()):
            raise SparsepassError(f"calibration {where}: a sequence is all padding (its attention_mask is all 0)")


def _split(batch: Row) -> Iterator[Row]:
    num_rows = next(iter(batch.values())).shape[0]
    for index in range(num_rows):
        yield {name: value[index : index + 1] for name, value in batch.items()}


def _as_tensor(name: str, value: object, where: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise SparsepassError(
            f"calibration {where}: {name} of type {type(value).__name__} is not a tensor and cannot be made one "
            f"({first_line(error)}); pad sequences to one length, with an attention_mask that says where"
        ) from error
