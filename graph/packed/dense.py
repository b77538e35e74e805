"""Layers that stay dense beside packed ones: an output head, and the embedding that shares its weight.

Tensor shapes: O out, I in, V rows of an embedding, D features.
"""

from collections.abc import Callable
from typing import Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsepass.graph.native import TORCH, best_path
from sparsepass.graph.packed.laid_out import Form, LaidOut, product
from sparsepass.graph.packed.layout import Values, quantize_rows
from sparsepass.graph.packed.operator import is_seen, packed_linear, refuse_training, without_gradient
from sparsepass.graph.support import SparsepassError

Layer = TypeVar("Layer", bound=nn.Module)
_KINDS: dict[torch.dtype, Values] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}


class DenseLinear(nn.Module):
    """``y = x W^T + b`` with a dense weight, by the kernels of packed layers, for inference.

    The weight may be another layer's too: ``head.weight = embedding.weight`` copies nothing. Of int8 each row has a scale.

    Args:
        in_features: Any number.
        out_features: Any number.
        dtype: Of the weight: bfloat16, float16 or int8.
        bias: Whether there is one.
        device: Where the tensors are made.

    Shapes: x ``[..., I]`` of bfloat16, float16 or float32 gives ``[..., O]`` of the same type; `weight` ``[O, I]``, `scales`
    ``[O, 1]`` of int8.

    Raises:
        SparsepassError: If x does not fit; in training mode with gradients; when a gradient is asked for.

    Exactness: as `PackedLinear`.

    Example:
        >>> embedding = Int8Embedding.from_weight(torch.eye(8), dtype=torch.float32)
        >>> head = DenseLinear.tied_to(embedding)
        >>> head(embedding(torch.tensor([3]))).argmax()
        tensor(3)
    """

    weight: nn.Parameter
    scales: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dtype not in _KINDS:
            raise SparsepassError(f"a dense layer beside packed ones has a weight of bfloat16, float16 or int8, not {dtype}")
        self.in_features, self.out_features = in_features, out_features
        self.weight = _frozen(torch.zeros(out_features, in_features, dtype=dtype, device=device))
        is_int8 = dtype == torch.int8
        scales = torch.ones(out_features, 1, dtype=torch.bfloat16, device=device) if is_int8 else None
        self.register_parameter("scales", None if scales is None else _frozen(scales))
        zeros = torch.zeros(out_features, dtype=torch.bfloat16 if is_int8 else dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else _frozen(zeros))
        self._ready: LaidOut | None = None

    @classmethod
    def tied_to(cls, embedding: "nn.Embedding | Int8Embedding", *, bias: Tensor | None = None) -> Self:
        """A layer with the weight of an embedding, shared and not copied.

        Args:
            embedding: With a weight of bfloat16, float16 or int8.
            bias: ``[V]``.
        """
        weight = embedding.weight
        assert isinstance(weight, nn.Parameter)
        layer = cls(weight.shape[1], weight.shape[0], dtype=weight.dtype, device="meta")
        layer.weight = weight
        if isinstance(embedding, Int8Embedding):
            layer.scales = embedding.scales
        layer.bias = None if bias is None else _frozen(bias.detach())
        return layer

    @classmethod
    def from_weight(cls, weight_OI: Tensor, *, dtype: torch.dtype = torch.bfloat16, bias: Tensor | None = None) -> Self:
        """A layer with a weight of its own; for int8 it is rounded, with the largest magnitude of a row as its end."""
        layer = cls(weight_OI.shape[1], weight_OI.shape[0], dtype=dtype, device="meta")
        if dtype == torch.int8:
            numbers, scales = quantize_rows(weight_OI)
            layer.weight, layer.scales = _frozen(numbers), _frozen(scales)
        else:
            layer.weight = _frozen(weight_OI.detach().to(dtype))
        layer.bias = None if bias is None else _frozen(bias.detach())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """The product.

        Shapes: x ``[..., I]``, the result ``[..., O]``.
        """
        if self._parameters["weight"].dtype not in _KINDS:  # type: ignore[union-attr]
            return functional.linear(x, self.weight, self.bias)  # `float()` made it another layer
        if is_seen(x):
            return packed_linear(x, self.weight, None, self.scales, None, self._float_bias(), self._form(TORCH))
        if x.requires_grad and torch.is_grad_enabled():
            if self.training:
                refuse_training()
            with torch.no_grad():
                y = product(self._prepared(), x)
            return without_gradient(x, y)
        return product(self._prepared(), x)

    def extra_repr(self) -> str:
        """What `repr` tells."""
        return f"{self.in_features}, {self.out_features}, dtype={self.weight.dtype}, bias={self.bias is not None}"

    def _prepared(self) -> LaidOut:
        parameters = self._parameters
        ready, weight, scales = self._ready, parameters["weight"], parameters["scales"]
        assert weight is not None
        # The weight is shared, so that others may have moved it.
        if ready is None or ready.data is not weight or ready.scales is not scales or ready.address != weight.data_ptr():
            if weight.device.type == "meta":
                raise SparsepassError("this layer has no weights yet: it was made on the device meta; load them first")
            if not weight.is_contiguous():
                weight.data = weight.data.contiguous()
            path = best_path(_KINDS[weight.dtype]) if weight.device.type == "cpu" else TORCH
            self._ready = ready = LaidOut(self._form(path), weight, scales=scales, bias=self._float_bias())
        return ready

    def _form(self, path: str) -> Form:
        return Form(values=_KINDS[self.weight.dtype], path=path, rows=self.out_features, columns=self.in_features, dense=True)

    def _float_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return _move(self, fn, recurse, keep=self.weight.dtype == torch.int8)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_ready": None}


class Int8Embedding(nn.Module):
    """An embedding whose rows are bytes with a scale each, for inference.

    Args:
        num_embeddings: Rows.
        embedding_dim: Features.
        dtype: Of the result; `half()` and `to(dtype)` change it, and leave the bytes alone.
        device: Where the tensors are made.

    Shapes: ids ``[...]`` of integers, the result ``[..., D]``; `weight` ``[V, D]`` int8, `scales` ``[V, 1]`` bfloat16.

    Exactness: bytes times scales in float32, rounded to `dtype`.

    Example:
        >>> Int8Embedding.from_weight(torch.tensor([[0.5, -1.0], [2.0, 0.0]]), dtype=torch.float32)(torch.tensor([1]))
        tensor([[1.9995, 0.0000]])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype
        self.weight = _frozen(torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8, device=device))
        self.scales = _frozen(torch.ones(num_embeddings, 1, dtype=torch.bfloat16, device=device))

    @classmethod
    def from_weight(cls, weight_VD: Tensor, *, dtype: torch.dtype | None = None) -> Self:
        """An embedding with rounded rows.

        Args:
            weight_VD: The weight.
            dtype: Of the result; by default the weight's.
        """
        layer = cls(*weight_VD.shape, dtype=dtype or weight_VD.dtype, device="meta")
        numbers, scales = quantize_rows(weight_VD)
        layer.weight, layer.scales = _frozen(numbers), _frozen(scales)
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of some tokens.

        Shapes: ids ``[...]``, the result ``[..., D]``.
        """
        return (self.weight[ids].float() * self.scales[ids].float()).to(self.dtype)

    def extra_repr(self) -> str:
        """What `repr` tells."""
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return _move(self, fn, recurse, keep=True)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _move(layer: Layer, fn: Callable[[Tensor], Tensor], recurse: bool, *, keep: bool) -> Layer:
    """Move or cast the tensors of a layer; `keep` leaves their types, which are part of what they say."""

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return tensor.to(result.device) if keep and result.dtype != tensor.dtype else result

    return nn.Module._apply(layer, moved, recurse)  # type: ignore[no-any-return]
