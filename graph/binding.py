"""Arguments of a call, bound to the inputs of a program as the model's forward would bind them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError

FLAGS_WITHOUT_EFFECT = {
    "use_cache": False,
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
}


def bound_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any], *, names: Sequence[str], order: Sequence[str]
) -> dict[str, Any]:
    """The value of each input, in the order of the names.

    A missing attention mask means all ones and missing token type ids all zeros, as in the models themselves.

    Args:
        args: Arguments by place.
        kwargs: Arguments by name. Flags that ask for what is done anyway may be among them.
        names: Names of the inputs.
        order: Names of the parameters of the model's forward.

    Raises:
        SparsepassError: If one is missing, is no input, or is no tensor.

    Example:
        >>> bound_arguments([torch.ones(1, 2)], {"use_cache": False}, names=["x"], order=["x", "use_cache"])
        {'x': tensor([[1., 1.]])}
    """
    if len(args) > len(order):
        raise SparsepassError(f"the program takes {len(order)} arguments ({', '.join(names)}), got {len(args)}")
    given = dict(zip(order, args, strict=False)) | dict(kwargs)
    for name, value in given.items():
        if name in names and not isinstance(value, Tensor | None):
            raise SparsepassError(f"the program's input {name!r} is a tensor, got a {type(value).__name__}")
        if name in names or value is None:
            continue
        if name in FLAGS_WITHOUT_EFFECT and value == FLAGS_WITHOUT_EFFECT[name]:
            continue
        raise SparsepassError(
            f"the program has no input {name!r} (it has {', '.join(names)}); capture the model again with {name} "
            "among example_inputs" + (", or compute the loss from the logits" if name == "labels" else "")
        )
    return {name: _default(name, given, names) if given.get(name) is None else given[name] for name in names}


def _default(name: str, given: Mapping[str, Any], names: Sequence[str]) -> Tensor:
    source = given.get(name.replace("attention_mask", "input_ids").replace("token_type_ids", "input_ids"))
    if isinstance(source, Tensor) and name.endswith("attention_mask"):
        return torch.ones_like(source)
    if isinstance(source, Tensor) and name == "token_type_ids":
        return torch.zeros_like(source)
    raise SparsepassError(f"the program needs the input {name!r}, which was not given; it takes {tuple(names)}")
