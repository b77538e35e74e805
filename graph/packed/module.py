"""A linear layer whose 2:4 weight is packed.

Tensor shapes: O out, I in, K kept values of a row (I / 2), G groups of columns that share a scale, R sums of k columns.
"""

from collections.abc import Callable
from threading import RLock
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsepass.graph.native import TORCH, best_path
from sparsepass.graph.packed.laid_out import Form, LaidOut, lay_out, product, store
from sparsepass.graph.packed.layout import FLOATS, PackedWeight, Values, check_form, check_sizes, pack, stored_form
from sparsepass.graph.packed.operator import is_seen, packed_linear, refuse_training, without_gradient
from sparsepass.graph.support import SparsepassError


class GroupOfLayers(Protocol):
    """What a layer knows of the group in which it is computed."""

    def result(self, member: "PackedLinear", x: Tensor) -> Tensor | None:
        """The result of one of the layers; None if it has to compute alone."""

    def forget(self) -> None:
        """One of the layers was moved or loaded."""


_ZEROS = 0x44  # codes of two groups that keep their first two places
_LOCK = RLock()


class PackedLinear(nn.Module):
    """``y = x W^T + b`` with a 2:4 weight that is kept without its zeros, for inference.

    It is in one of two states. *Stored*, it has the tensors of a checkpoint (below). *Laid out*, it has in place of `weight`
    and `codes` one buffer, `data`, in the order in which this processor's kernel reads it. The state dict is that of the stored
    state in both. Run on the processor, a stored layer is laid out first; `lay_out` does it beforehand.

    A branch of SLoRB, ``S (X x)``, is added by the kernel too where X sums every `slorb_k` features. A trained X runs by torch.

    Args:
        in_features: A multiple of 8.
        out_features: Any number.
        values: Kind of the values.
        group_size: Columns that share a scale, see `pack`.
        bias: Whether there is one.
        slorb_k: Input features that a SLoRB branch sums into one; 0 for no branch.
        slorb_trained: Whether X was trained, and is stored.
        device: Where the tensors are made; on ``meta`` they are made without memory.

    Shapes: x ``[..., I]`` of bfloat16, float16 or float32 gives ``[..., O]`` of the same type. Stored are `weight` ``[O, K]``
    (int4: ``[O, K / 2]``) and `codes` ``[O, K / 4]`` as in `PackedWeight`, `scales` ``[O, G]`` of integers, `bias` ``[O]``,
    `slorb_weight` ``[O, R]`` and `slorb_projection` ``[R, I]``.

    Raises:
        SparsepassError: If sizes do not fit; in training mode with gradients; when a gradient is asked for.

    Exactness: the kernels round x to the weight's kind: to bfloat16 or fp16, or to bytes with a scale for each 128 features.

    Example:
        >>> layer = PackedLinear.from_packed(pack(torch.tensor([[0, 3.0, 0, 4, 5, 0, 0, 6]])))
        >>> layer(torch.ones(1, 8))
        tensor([[18.]])
        >>> sorted(layer.state_dict())
        ['codes', 'weight']
    """

    weight: nn.Parameter | None
    codes: nn.Parameter | None
    scales: nn.Parameter | None
    bias: nn.Parameter | None
    slorb_weight: nn.Parameter | None
    slorb_projection: nn.Parameter | None
    data: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        values: Values = "bf16",
        group_size: int = 0,
        bias: bool = False,
        slorb_k: int = 0,
        slorb_trained: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_form(values, in_features, group_size, "a packed layer")
        if slorb_k and in_features % slorb_k:
            raise SparsepassError(f"a SLoRB branch sums {slorb_k} features, and {in_features} features are no multiple of it")
        self.in_features, self.out_features = in_features, out_features
        self.values, self.group_size = values, group_size
        self.slorb_k, self.slorb_trained = slorb_k, slorb_trained
        form = stored_form(values, out_features, in_features, group_size)
        zero = 0x88 if values == "int4" else 0
        self._own("weight", torch.full(form["kept"][0], zero, dtype=form["kept"][1], device=device))
        self._own("codes", torch.full(form["codes"][0], _ZEROS, dtype=torch.uint8, device=device))
        self._own("scales", torch.ones(form["scales"][0], dtype=torch.bfloat16, device=device) if "scales" in form else None)
        self._own("bias", torch.zeros(out_features, dtype=self.small_type, device=device) if bias else None)
        sums = in_features // slorb_k if slorb_k else 0
        trained = slorb_trained and slorb_k
        self._own("slorb_weight", torch.zeros(out_features, sums, dtype=self.small_type, device=device) if sums else None)
        self._own("slorb_projection", torch.zeros(sums, in_features, dtype=self.small_type, device=device) if trained else None)
        self.register_buffer("data", None, persistent=False)
        self.siblings: GroupOfLayers | None = None
        self._form: Form | None = None
        self._ready: LaidOut | None = None

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        *,
        bias: Tensor | None = None,
        slorb_weight: Tensor | None = None,
        slorb_projection: Tensor | None = None,
    ) -> Self:
        """A layer with a packed weight.

        Args:
            packed: The weight.
            bias: ``[O]``.
            slorb_weight: S of a SLoRB branch, ``[O, R]``.
            slorb_projection: X, ``[R, I]``, if it was trained.
        """
        rows, columns = packed.shape
        layer = cls(
            columns,
            rows,
            values=packed.values,
            group_size=packed.group_size,
            bias=bias is not None,
            slorb_k=0 if slorb_weight is None else columns // slorb_weight.shape[1],
            slorb_trained=slorb_projection is not None,
            device="meta",
        )
        given = {"weight": packed.kept, "codes": packed.codes, "scales": packed.scales, "bias": bias}
        given |= {"slorb_weight": slorb_weight, "slorb_projection": slorb_projection}
        for name, tensor in given.items():
            if tensor is not None:
                layer._own(name, tensor.detach().to(layer.small_type if name.startswith("slorb") else tensor.dtype))
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Module, *, values: Values = "bf16", group_size: int = 0) -> Self:
        """A layer in place of a dense one, an `nn.Linear` or GPT-2's Conv1D, whose weight is 2:4.

        Raises:
            SparsepassError: If its weight is not 2:4 along the input features.
        """
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        weight_OI = weight if isinstance(linear, nn.Linear) else weight.T
        return cls.from_packed(pack(weight_OI, values=values, group_size=group_size), bias=bias)

    @property
    def small_type(self) -> torch.dtype:
        """What a branch and a bias are stored as: fp16 beside values of fp16, else bfloat16."""
        return FLOATS.get(self.values, torch.bfloat16)

    @property
    def is_laid_out(self) -> bool:
        """Whether it is in the form of a kernel."""
        return self._buffers["data"] is not None

    @property
    def path(self) -> str | None:
        """The kernel that it is laid out for; None if it is stored."""
        return self._form.path if self._form is not None else None

    def packed(self) -> PackedWeight:
        """The weight as it is stored; a copy, if the layer is laid out."""
        if self._form is not None and self.data is not None:
            kept, codes = store(self._form, self.data)
        else:
            assert self.weight is not None
            assert self.codes is not None
            kept, codes = self.weight.data, self.codes.data
        return PackedWeight(
            values=self.values,
            shape=(self.out_features, self.in_features),
            kept=kept,
            codes=codes,
            scales=None if self.scales is None else self.scales.data,
            group_size=self.group_size,
        )

    def lay_out(self, name: str = "a packed layer") -> Self:
        """Bring the weight into the form of this processor's kernel, in place of the stored one.

        Args:
            name: Full name of the layer, for messages.

        Returns:
            The layer itself.

        Raises:
            SparsepassError: If the weight is damaged, or not in the processor's memory.
        """
        with _LOCK:
            if self.is_laid_out:
                return self
            self._check_sizes(name)
            path = best_path(self.values)
            data = lay_out(self.packed(), path, f"{name}.weight")
            self._form = self._form_for(path)
            if self.slorb_weight is not None:
                self.slorb_weight.data = self.slorb_weight.data.to(self.small_type).contiguous()
            self._own("weight", None)
            self._own("codes", None)
            self._buffers["data"] = data
        return self

    def to_stored(self) -> Self:
        """Go back to the stored form.

        Returns:
            The layer itself.
        """
        with _LOCK:
            if self.is_laid_out:
                packed = self.packed()
                self._own("weight", packed.kept)
                self._own("codes", packed.codes)
                self._buffers["data"] = self._form = None
                self._forget_addresses()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The product.

        Shapes: x ``[..., I]``, the result ``[..., O]``.
        """
        if is_seen(x):
            y = self._by_operator(x)
        elif x.requires_grad and torch.is_grad_enabled():
            if self.training:
                refuse_training()
            with torch.no_grad():
                y = self._with_trained_branch(self._by_kernel(x), x)
            return without_gradient(x, y)
        else:
            y = self._by_kernel(x)
        return self._with_trained_branch(y, x) if self.slorb_trained else y

    def extra_repr(self) -> str:
        """What `repr` tells."""
        parts = [f"{self.in_features}, {self.out_features}, values={self.values}"]
        parts += [f"group_size={self.group_size}"] if self.group_size else []
        parts += [f"slorb_k={self.slorb_k}"] if self.slorb_k else []
        return ", ".join([*parts, f"bias={self.bias is not None}", f"kernel={self.path or 'not laid out'}"])

    def laid_out(self) -> LaidOut:
        """The weight in memory, with all that its product needs; a weight on the processor is laid out first.

        Raises:
            SparsepassError: If there is no weight yet.
        """
        ready = self._ready
        if ready is None or ready.data is not self._buffers["data"]:
            ready = self._prepared()
        return ready

    def _by_kernel(self, x: Tensor) -> Tensor:
        if self.siblings is not None and (y := self.siblings.result(self, x)) is not None:
            return y
        return product(self.laid_out(), x)

    def _by_operator(self, x: Tensor) -> Tensor:
        """What a compiler or an exporter sees; a layer that is not laid out stays so."""
        data, form = self.data, self._form
        if data is None or form is None:
            data, form = self.weight, self._form_for(TORCH)
        assert data is not None
        return packed_linear(x, data, self.codes, self.scales, self._branch(), self._float_bias(), form)

    def _prepared(self) -> LaidOut:
        """The weight with addresses for the kernel."""
        device = self.codes.device if self.codes is not None else torch.device("cpu")
        if device.type == "meta":
            raise SparsepassError("this packed layer has no weights yet: it was made on the device meta; load them first")
        if device.type == "cpu":
            self.lay_out()
        with _LOCK:
            scales = None if self.scales is None else self.scales.data
            rest: dict[str, Any] = {"scales": scales, "branch": self._branch(), "bias": self._float_bias()}
            if self.data is not None and self._form is not None:
                self._ready = LaidOut(self._form, self.data, **rest)
                return self._ready
            assert self.weight is not None
            return LaidOut(self._form_for(TORCH), self.weight.data, codes=self.codes, **rest)

    def _branch(self) -> Tensor | None:
        """The branch that the kernel adds."""
        if self.slorb_weight is None or self.slorb_trained:
            return None
        return self.slorb_weight.to(self.small_type).contiguous()

    def _float_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.float()

    def _with_trained_branch(self, y: Tensor, x: Tensor) -> Tensor:
        if self.slorb_projection is None or self.slorb_weight is None:
            return y
        sums_R = functional.linear(x, self.slorb_projection.to(x.dtype))
        return y + functional.linear(sums_R, self.slorb_weight.to(x.dtype))

    def _form_for(self, path: str) -> Form:
        return Form(
            values=self.values,
            path=path,
            rows=self.out_features,
            columns=self.in_features,
            group_size=self.group_size,
            k=0 if self.slorb_trained else self.slorb_k,
        )

    def _check_sizes(self, name: str) -> None:
        assert self.codes is not None
        if self.codes.device.type != "cpu":
            raise SparsepassError(f"{name} is on the device {self.codes.device}, and its kernels run on the processor; move it")
        check_sizes(self.packed(), f"{name}.weight")
        sums = self.in_features // self.slorb_k if self.slorb_k else 0
        for part, shape in (
            ("bias", (self.out_features,)),
            ("slorb_weight", (self.out_features, sums)),
            ("slorb_projection", (sums, self.in_features)),
        ):
            found = self._parameters[part]
            if found is not None and (tuple(found.shape) != shape or not found.is_floating_point()):
                raise SparsepassError(
                    f"{name}.{part} has to be {list(shape)} of a floating type, and is {list(found.shape)} of {found.dtype}"
                )

    def _forget_addresses(self) -> None:
        self._ready = None
        if self.siblings is not None:
            self.siblings.forget()

    def _own(self, name: str, tensor: Tensor | None) -> None:
        """Keep a parameter that is never trained."""
        self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    # What nn.Module does with tensors: move, save, load, copy.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            # Packed values and their scales are numbers of the file: `half()` and `to(dtype)` are about activations.
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        before = self._device()
        after = fn(torch.empty(0, dtype=torch.uint8, device=before)).device
        if after != before:
            self.to_stored()
        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        self._forget_addresses()
        if after != before and after.type == "cpu" and before.type != "meta":
            self.lay_out()
        return self

    def _device(self) -> torch.device:
        return next(t.device for t in (self._buffers["data"], self._parameters["codes"]) if t is not None)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_laid_out:
            packed = self.packed()
            destination[f"{prefix}weight"], destination[f"{prefix}codes"] = packed.kept, packed.codes
        if self.siblings is not None:
            # They are parts of their group's tensor, which a file shall not take for one tensor under several names.
            for name in self._parameters.keys() & {"scales", "slorb_weight"}:
                if (tensor := destination.get(f"{prefix}{name}")) is not None:
                    destination[f"{prefix}{name}"] = tensor.clone()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *lists: list[str]
    ) -> None:
        was_laid_out = self.is_laid_out
        self.to_stored()
        for name in ("weight", "codes", "scales"):
            given, own = state_dict.get(f"{prefix}{name}"), self._parameters[name]
            if given is not None and own is not None and given.dtype != own.dtype:
                lists[2].append(f"{prefix}{name} is {given.dtype}, and this layer of {self.values} takes {own.dtype}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        if was_laid_out and not lists[2]:
            self.lay_out(prefix.removesuffix("."))

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_ready": None, "_form": None}
        if self.is_laid_out:
            # The layout is this processor's own.
            packed = self.packed()
            weight, codes = (nn.Parameter(each, requires_grad=False) for each in (packed.kept, packed.codes))
            state["_parameters"] = {**self._parameters, "weight": weight, "codes": codes}
            state["_buffers"] = {**self._buffers, "data": None}
            state["_lay_out"] = True
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        was_laid_out = state.pop("_lay_out", False)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if was_laid_out:
            self.lay_out()
