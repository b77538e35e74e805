"""A small network whose steps are drawn at random, to try on it what channel flow allows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def signed_norm() -> nn.LayerNorm:
    """A norm whose gains and biases differ in sign, too."""
    norm = nn.LayerNorm(8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def turned(x: Tensor, frequencies: Tensor) -> Tensor:
    """Channels i and i + 4 turned by an angle that grows with the position, as rotary embeddings do."""
    angles = torch.arange(x.shape[1], dtype=x.dtype).unsqueeze(-1) * frequencies.to(x.dtype)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class RandomNet(nn.Module):
    """Steps drawn by hypothesis, on values of 8 channels."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3 * len(steps)))
        self.norms = nn.ModuleList(signed_norm() for _ in steps)
        self.others = nn.ModuleList(signed_norm() for _ in steps)
        self.gains = nn.ParameterList(torch.randn(8) for _ in steps)
        self.heads = nn.ParameterList(torch.randn(2, 4) for _ in steps)
        self.register_buffer("fixed", torch.randn(8))
        self.square: Tensor
        self.register_buffer("square", torch.randn(8, 8))
        self.embedding = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for number, step in enumerate(self.steps):
            x = getattr(self, f"_{step}")(x, number, self.layers[3 * number : 3 * number + 3])
        return self.head(x)  # type: ignore[no-any-return]

    def _linear(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return layers[0](x)  # type: ignore[no-any-return]

    def _relu(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return torch.relu(layers[0](x))

    def _gated(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return layers[2](functional.silu(layers[0](x)) * layers[1](x))  # type: ignore[no-any-return]

    def _residual(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return x + layers[1](torch.tanh(layers[0](self.norms[number](x))))  # type: ignore[no-any-return]

    def _rms(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.gains[number])  # type: ignore[no-any-return]

    def _gain(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return x * self.gains[number]  # type: ignore[no-any-return]

    def _squared(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](x)
        return y * y  # type: ignore[no-any-return]

    def _fixed(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return layers[1](layers[0](x) * self.fixed)  # type: ignore[no-any-return]

    def _swapped(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        first, second = layers[0](x).chunk(2, -1)
        return torch.cat([second, -first], -1)

    def _picked(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](x)
        return y + y[..., :1]  # type: ignore[no-any-return]

    def _rolled(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](x)
        return y + y.flip(-1)  # type: ignore[no-any-return]

    def _parts(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](x)
        return torch.cat([torch.relu(y[..., :3]), torch.sigmoid(y[..., 3:])], -1)

    def _in_heads(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](x).view(*x.shape[:-1], 2, 4)
        y = y / (y.pow(2).sum(-1, keepdim=True) + 1) * self.heads[number]
        return layers[1](y.flatten(-2))  # type: ignore[no-any-return]

    def _head_softmax(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](x).view(*x.shape[:-1], 2, 4)
        return layers[1](torch.softmax(y, -1).flatten(-2))  # type: ignore[no-any-return]

    def _attention(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:-1], 2, 4).transpose(1, 2) for layer in layers)
        weights = torch.softmax(q @ k.transpose(-1, -2), -1)
        return x + (weights @ v).transpose(1, 2).flatten(-2)  # type: ignore[no-any-return]

    def _shared(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return layers[0](torch.relu(layers[0](x)))  # type: ignore[no-any-return]

    def _mean(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return x + layers[0](x).mean(1, keepdim=True)  # type: ignore[no-any-return]

    def _outer(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        first, second = layers[0](x)[..., :4], layers[1](x)[..., :2]
        return layers[2]((first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2))  # type: ignore[no-any-return]

    def _by_numbers(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return layers[1](layers[0](x) * (x @ self.square))  # type: ignore[no-any-return]

    def _scaled(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](x) * 0.5
        return layers[1](y * torch.sigmoid(layers[2](x)[..., :1]) - x.mean(-1, keepdim=True) * y)  # type: ignore[no-any-return]

    def _unit(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](x)
        return layers[1](y / torch.sqrt((y * y).sum(-1, keepdim=True) + 1))  # type: ignore[no-any-return]

    def _norm(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return layers[1](functional.layer_norm(layers[0](x), (8,)))  # type: ignore[no-any-return]

    def _centred(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](x)
        return layers[1](y - y.mean(-1, keepdim=True))  # type: ignore[no-any-return]

    def _cubed(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](x)
        return layers[1](y * (y.pow(2) * y).mean(-1, keepdim=True))  # type: ignore[no-any-return]

    def _halves(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        first, second = layers[0](x).chunk(2, -1)
        return layers[1](torch.cat([torch.relu(first) * second, second], -1))  # type: ignore[no-any-return]

    def _twice(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](x)[..., [0, 1, 1, 2, 3, 4, 5, 6]]
        return layers[1](layers[0](x) / (1 + y.pow(2).mean(-1, keepdim=True)))  # type: ignore[no-any-return]

    def _shared_heads(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        v = layers[0](x)[..., :4].unsqueeze(1)
        weights = torch.softmax(layers[1](x).view(*x.shape[:-1], 2, 4).transpose(1, 2) @ v.transpose(-1, -2), -1)
        return layers[2]((weights @ v).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def _pre_norm(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return x + layers[0](self.norms[number](x).flip(-1).unsqueeze(1).repeat(1, 2, 1, 1))[:, 1]  # type: ignore[no-any-return]

    def _norm_by_hand(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gains[number]
        return layers[0](y + self.norms[number].bias)  # type: ignore[no-any-return]

    def _norm_relu(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return layers[0](torch.relu(self.norms[number](x)))  # type: ignore[no-any-return]

    def _norm_maximum(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = self.norms[number](x)
        return layers[0](torch.maximum(y, y.roll(1, 1)))  # type: ignore[no-any-return]

    def _norm_scaled(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return layers[0](-self.norms[number](x) * 0.5)  # type: ignore[no-any-return]

    def _norm_masked(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        hidden = (torch.arange(x.shape[1]) % 2 == 0).unsqueeze(-1)
        return layers[0](self.norms[number](x).masked_fill(hidden, 0.0))  # type: ignore[no-any-return]

    def _norm_summed(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return x + layers[0](self.norms[number](x).sum(1, keepdim=True))  # type: ignore[no-any-return]

    def _bias_twice(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return layers[0](self.norms[number](x) + self.norms[number].bias)  # type: ignore[no-any-return]

    def _two_norms(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return layers[0](self.norms[number](x) + self.others[number](layers[1](x)))  # type: ignore[no-any-return]

    def _joined_norms(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](torch.cat([self.norms[number](x), self.others[number](layers[1](x))], 1))
        first, second = y.chunk(2, 1)
        return first + second  # type: ignore[no-any-return]

    def _turned(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return layers[1](turned(layers[0](x), torch.ones(8)))  # type: ignore[no-any-return]

    def _turned_apart(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return layers[1](turned(layers[0](x), torch.tensor([1.0, 0.5, 0.25, 0.125]).repeat(2)))  # type: ignore[no-any-return]

    def _einsum_heads(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)) for layer in layers)
        weights = torch.softmax(torch.einsum("bthd,bshd->bhts", q, k), -1)
        return x + (weights @ v.transpose(1, 2)).transpose(1, 2).flatten(-2)  # type: ignore[no-any-return]

    def _by_distance(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:-1], 2, 4).transpose(1, 2) for layer in layers)
        places = torch.arange(x.shape[1], dtype=x.dtype)
        slopes = torch.tensor([0.5, 0.25], dtype=x.dtype).view(2, 1, 1)
        weights = torch.softmax(q @ k.transpose(-1, -2) - (places - places.unsqueeze(1)).abs() * slopes, -1)
        return x + (weights @ v).transpose(1, 2).flatten(-2)  # type: ignore[no-any-return]

    def _head_gains(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](x).view(*x.shape[:-1], 2, 4) * self.heads[number][:, :1]
        return layers[1](y.flatten(-2))  # type: ignore[no-any-return]

    def _without_softmax(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:-1], 2, 4).transpose(1, 2) for layer in layers)
        return x + (q @ (k.transpose(-1, -2) @ v)).transpose(1, 2).flatten(-2)  # type: ignore[no-any-return]

    def _interleaved(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](x)
        return layers[1](torch.cat([functional.silu(y[..., 0::2]) * (y[..., 1::2] + 1), y[..., 1::2]], -1))  # type: ignore[no-any-return]

    def _grouped_alike(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](x).unflatten(-1, (4, 2)).amax(-1)
        return layers[1](torch.cat([y, y], -1))  # type: ignore[no-any-return]

    def _there_and_back(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        weight = layers[0].weight
        return torch.tanh(functional.linear(x, weight)) @ weight

    def _weight_in_parts(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        weight = layers[0].weight
        y = torch.cat([functional.linear(x, weight[:4]).relu(), torch.tanh(functional.linear(x, weight[4:]))], -1)
        return functional.linear(y[..., :4], layers[1].weight[:, :4]) + functional.linear(y[..., 4:], layers[1].weight[:, 4:])

    def _weights_joined(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        first, second = functional.linear(x, torch.cat([layers[0].weight, layers[1].weight])).chunk(2, -1)
        return layers[2](torch.tanh(first) * second)  # type: ignore[no-any-return]

    def _weight_scaled(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return layers[1](functional.linear(x, layers[0].weight * self.gains[number].unsqueeze(1)))  # type: ignore[no-any-return]

    def _weight_added(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        weight = layers[0].weight + layers[1].weight[:, :2] @ layers[2].weight[:2]
        return x + torch.tanh(functional.linear(x, weight))

    def _low_rank(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        low = functional.linear(x, layers[0].weight[:2])
        return x + functional.linear(low, layers[1].weight[:, :2]) + torch.tanh(layers[2](x))

    def _depthwise(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        kernel = layers[2].weight[:, :3].unsqueeze(1)
        y = functional.conv1d(layers[0](x).transpose(1, 2), kernel, padding=1, groups=8).transpose(1, 2)
        return layers[1](functional.silu(y))  # type: ignore[no-any-return]

    def _shifted(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](x)
        before = functional.pad(y[:, :-1], (0, 0, 1, 0))
        return layers[1](before * self.gains[number] + y * (1 - self.gains[number]))  # type: ignore[no-any-return]

    def _scanned(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y, step, seen = (layer(x) for layer in layers)
        decay = torch.exp(-functional.softplus(step).unsqueeze(-1) * self.heads[number].flatten()[:4].exp())
        state = torch.cumsum(decay * seen[..., None, :4] * y.unsqueeze(-1), 1)
        return (state * seen[..., None, 4:]).sum(-1) + y * self.gains[number]  # type: ignore[no-any-return]

    def _in_groups(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = functional.group_norm(layers[0](x).transpose(1, 2), 2, self.gains[number], self.heads[number].flatten())
        return layers[1](y.transpose(1, 2))  # type: ignore[no-any-return]

    def _mixed_experts(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        experts = torch.stack([layers[0].weight, layers[1].weight])
        shares = torch.softmax(layers[2](x)[..., :2], -1)
        return (torch.einsum("btd,efd->btef", x, experts).relu() * shares.unsqueeze(-1)).sum(-2)

    def _chosen_expert(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        experts = torch.stack([layers[0].weight, layers[1].weight])
        chosen = experts[layers[2](x)[..., :2].argmax(-1)]
        return x + (x.unsqueeze(-2) @ chosen).squeeze(-2)

    def _alpha(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return layers[0](torch.add(self.norms[number](x), self.others[number](layers[1](x)), alpha=3))  # type: ignore[no-any-return]

    def _largest_alone(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = layers[0](x)
        return layers[1](y * functional.one_hot(y.argmax(-1), 8).to(y.dtype))  # type: ignore[no-any-return]

    def _complex(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        y = torch.view_as_complex(layers[0](x).unflatten(-1, (4, 2)))
        angles = torch.arange(x.shape[1], dtype=x.dtype).unsqueeze(-1)
        return layers[1](torch.view_as_real(y * torch.polar(torch.ones_like(angles), angles)).flatten(-2))  # type: ignore[no-any-return]

    def _unknown(self, x: Tensor, number: int, layers: Sequence[nn.Linear]) -> Tensor:
        return x + torch.cumsum(layers[0](x), -1)


STEPS = sorted(name[1:] for name in vars(RandomNet) if name.startswith("_") and not name.startswith("__"))
