"""A program in a wider type than the one that it was captured in: training and measuring need float32."""

from dataclasses import replace
from typing import Any, Final

import torch
from torch import fx

from sparsepass.graph.program import Program
from sparsepass.graph.support import SparsepassError

_HALVES: Final = (torch.bfloat16, torch.float16)


def widened(program: Program, dtype: torch.dtype) -> Program:
    """Let a program of 16-bit weights compute in float32 or float64: its tensors, and the casts that its graph holds.

    Args:
        program: Changed in place. Tensors that are not 16-bit (rotary frequencies, say) stay as they are.
        dtype: The type to compute in.

    Returns:
        The same program.

    Raises:
        SparsepassError: If the program's weights are of another type than 16-bit, or the wanted one is not wider.

    Exactness: the weights are bitwise those that they were. Outputs are those of the model in the wider type, to rounding.

    Example:
        >>> from sparsepass import capture
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4)).bfloat16()
        >>> program = widened(capture(model, torch.randn(2, 8, dtype=torch.bfloat16)), torch.float32)
        >>> program(torch.ones(1, 8)).dtype
        torch.float32
    """
    own = {p.dtype for p in program.graph_module.parameters() if p.dtype.is_floating_point} - {dtype}
    if not own:
        return program
    if not own <= {*_HALVES} or dtype not in (torch.float32, torch.float64):
        raise SparsepassError(
            f"a saved program is read in its own type ({', '.join(sorted(map(str, own)))}) or, from 16 bits, in a wider one, "
            f"and {dtype} was asked for: its graph holds the type in its casts; load the model so, and apply the passes again"
        )

    def swap(value: Any) -> Any:
        return dtype if value in own else value

    for node in program.graph_module.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), swap)
        node.meta.pop("val", None)  # a tensor of the old type
    program.graph_module.recompile()
    scales = {state.scales for state in program.quantized.values()}  # which are bfloat16, whatever the weights are
    for name, tensor in program.tensors().items():
        if tensor.dtype in own and name not in scales:
            program.set_tensor(name, tensor.detach().to(dtype))
    program.example_inputs = {
        name: tensor.to(dtype) if tensor.dtype in own else tensor for name, tensor in program.example_inputs.items()
    }
    if program.origin.config is not None and "dtype" in program.origin.config:
        config = {**program.origin.config, "dtype": str(dtype).removeprefix("torch.")}
        program.origin = replace(program.origin, config=config)
    return program
