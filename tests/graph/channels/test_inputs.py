"""What inputs of the model decide is decided otherwise by other inputs: channel flow does not believe its example."""

from collections.abc import Callable

import pytest
import torch
from tests.graph.channels.trying import largest_error
from torch import Tensor, nn
from torch.nn import functional

from sparsepass.graph import capture
from sparsepass.graph.channels import ChannelFlow, channel_flow

EACH = torch.arange(8)


class Deciding(nn.Module):
    """Whole numbers that the caller gives, all 1 in the example, decide what becomes of a layer's channels."""

    def __init__(self, step: "Step") -> None:
        super().__init__()
        self.step = step
        self.first, self.second, self.third, self.last = (nn.Linear(8, 8) for _ in range(4))
        self.table = nn.Parameter(torch.randn(12, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        made = self.second(torch.tanh(self.first(x)))
        return self.head(torch.tanh(self.last(self.step(self, made, numbers))))  # type: ignore[no-any-return]


Step = Callable[[Deciding, Tensor, Tensor], Tensor]


def apart(numbers: Tensor) -> Tensor:
    """Which channels a token takes: all of them, where the number is 1."""
    return numbers.unsqueeze(-1) > EACH - 7


def chosen(numbers: Tensor) -> Tensor:
    """Which channels come where: each its own place, where the first number is 1."""
    return (numbers[0, 0] - 1 + EACH) % 8


def away(net: Deciding, y: Tensor, numbers: Tensor) -> Tensor:
    """Nothing but zeros, where the numbers are 1."""
    return (1 - numbers).unsqueeze(-1).to(y.dtype)


ADDING: dict[str, Step] = {
    "add": lambda net, y, n: y + away(net, y, n) * 3.0,
    "cat": lambda net, y, n: torch.cat([y, away(net, y, n).expand(-1, -1, 8)], 1),
    "index_put": lambda net, y, n: away(net, y, n).expand(-1, -1, 8).index_put((torch.tensor([0, 1]),), y[:2]),
}
"""Channels beside which something stands that is zero in the example."""
TELLING_APART: dict[str, Step] = {
    "mul": lambda net, y, n: y * apart(n),
    "where": lambda net, y, n: torch.where(apart(n), y, net.third(y)),
    "masked_fill": lambda net, y, n: y.masked_fill(~apart(n), 0.0),
    "one_hot": lambda net, y, n: y + net.third(y) * functional.one_hot(n.clamp(0, 7), 8).to(y.dtype),
    "gather": lambda net, y, n: y.gather(-1, (n.unsqueeze(-1) - 1 + EACH) % 8),
    "gather of tokens": lambda net, y, n: y.gather(1, ((n[:, :1, None] - 1) * EACH) % 4),
    "gather of rows": lambda net, y, n: y + net.table.gather(0, ((n[0, :1, None] - 1) * EACH) % 4),
    "index": lambda net, y, n: y[..., chosen(n)],
    "index_select": lambda net, y, n: y.index_select(-1, chosen(n)),
    "take_along_dim": lambda net, y, n: torch.take_along_dim(y, (n.unsqueeze(-1) - 1 + EACH) % 8, -1),
    "scatter": lambda net, y, n: y.scatter(-1, (n.unsqueeze(-1) - 1) % 8, 0.0),
    "matmul": lambda net, y, n: y @ functional.one_hot(chosen(n), 8).to(y.dtype),
}
"""Channels that are alike in the example only."""
ROWS: dict[str, Step] = {
    "rows": lambda net, y, n: y + net.table[n],
    "rows, selected": lambda net, y, n: y + net.table.index_select(0, n.flatten()).view(*n.shape, 8),
    "rows by position": lambda net, y, n: y + net.table[: n.shape[1]],
}
"""Rows of a table: all of them have the same channels, also those that the example does not take."""


def flow_and_error(step: Step) -> tuple[ChannelFlow, float]:
    """What is allowed, and what it changes on other inputs than the example."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    example = {"x": x, "numbers": torch.ones(3, 4, dtype=torch.int64)}
    program = capture(Deciding(step).double().eval(), example_inputs=example)
    flow = channel_flow(program)
    return flow, largest_error(program, flow, {"x": x, "numbers": torch.tensor([[2, 0, 5, 1], [0, 1, 7, 3], [4, 2, 1, 0]])})


@pytest.mark.parametrize("name", ADDING)
def test_zeros_of_an_example_are_no_zeros_of_the_graph(name: str) -> None:
    flow, error = flow_and_error(ADDING[name])
    assert error < 1e-9
    assert flow.scalings == ()


@pytest.mark.parametrize("name", TELLING_APART)
def test_channels_that_an_example_treats_alike(name: str) -> None:
    flow, error = flow_and_error(TELLING_APART[name])
    assert error < 1e-9
    made = {(place.tensor, place.axes) for group in flow.permutations for place in group.places}
    assert ("first.weight", (0,)) in made
    assert ("second.weight", (0,)) not in made
    assert flow.refused["second.weight", (0,)]


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_an_example_does_not_take(name: str) -> None:
    flow, error = flow_and_error(ROWS[name])
    assert error < 1e-9
    assert ("table", (1,)) in {(place.tensor, place.axes) for group in flow.permutations for place in group.places}


def test_channels_that_fixed_numbers_treat_alike() -> None:
    """Channels i and i + 4 take the same token, and may change places with each other alone."""
    flow, error = flow_and_error(lambda net, y, numbers: y.gather(1, (EACH % 4).expand(len(y), 1, 8)))
    assert error < 1e-9
    groups = [place for group in flow.permutations for place in group.places if place.tensor == "second.weight"]
    assert sorted(place.positions.flatten().tolist() for place in groups if place.axes == (0,)) == [
        [i, i + 4] for i in range(4)
    ]
