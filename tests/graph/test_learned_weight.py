"""The operator `learned_weight`: gradients, compilation, export, and what it refuses."""

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsepass.graph.ops import learned_weight
from sparsepass.graph.soft_masks import Draw, hard_mask, num_candidates, soft_weight

OPERATOR = torch.ops.sparsepass.learned_weight.default
# Weight's shape and N:M's axis, of each layout: linear, Conv1D, experts, transposed ones, convolution.
LAYOUTS = {
    "linear": ((6, 8), 1),
    "conv1d_hf": ((8, 6), 0),
    "experts": ((2, 3, 8), 2),
    "experts_t": ((2, 8, 3), 1),
    "conv2d": ((2, 8, 3, 2), 1),
}


def control(scale: float = 1.0, temperature: float = 0.0, key: int = 0) -> Tensor:
    return torch.tensor([scale, temperature, key], dtype=torch.float64)


def case(shape: tuple[int, ...] = (6, 8), axis: int = 1, n: int = 2, m: int = 4, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    *rows, length = weight.movedim(axis, -1).shape
    logits = torch.randn(*rows, num_candidates(n, m), length // m, generator=generator).to(dtype)
    return weight, hard_mask(logits, n, m).movedim(-1, axis).contiguous(), logits


class Learned(nn.Module):
    """A linear layer whose mask is being learned."""

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        weight, mask, logits = case(dtype=torch.float32)
        self.weight, self.logits = nn.Parameter(weight, requires_grad=False), nn.Parameter(logits)
        self.register_buffer("mask", mask)
        self.register_buffer("control", control(1.5, temperature, 77))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, learned_weight(self.weight, self.mask, self.logits, self.control, 2, 4, 1))


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    module.zero_grad()
    y = module(x)
    y.square().sum().backward()
    (grad,) = (parameter.grad for name, parameter in module.named_parameters() if name.endswith("logits"))
    assert grad is not None
    return y.detach(), grad.clone()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_gradients_check_numerically(layout: str, n: int, m: int) -> None:
    shape, axis = LAYOUTS[layout]
    weight, mask, logits = case(shape, axis, n, m)
    weight.requires_grad_()
    logits.requires_grad_()
    for how in (control(1.3, 0.8, 5), control()):

        def run(w: Tensor, pi: Tensor, how: Tensor = how) -> Tensor:
            return learned_weight(w, mask, pi, how, n, m, axis)  # type: ignore[no-any-return]

        assert torch.autograd.gradcheck(run, (weight, logits))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_soft_or_hard_along_the_axis_of_the_layout(layout: str, dtype: torch.dtype) -> None:
    shape, axis = LAYOUTS[layout]
    weight, mask, logits = case(shape, axis, dtype=dtype)
    hard = learned_weight(weight, mask, logits, control(), 2, 4, axis)
    assert torch.equal(hard, torch.where(mask, weight, 0))
    soft = learned_weight(weight, mask, logits, control(1.5, 0.5, 77), 2, 4, axis)
    moved = soft_weight(weight.movedim(axis, -1), logits, 2, 4, Draw(scale=1.5, temperature=0.5, key=77))
    assert torch.equal(soft, moved.movedim(-1, axis))
    assert soft.dtype == hard.dtype == dtype
    assert soft.is_contiguous()
    assert hard.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operator_passes_opcheck(layout: str) -> None:
    shape, axis = LAYOUTS[layout]
    weight, mask, logits = case(shape, axis, dtype=torch.float32)
    for how in (control(1.5, 0.5, 77), control()):
        torch.library.opcheck(OPERATOR, (weight.requires_grad_(), mask, logits.requires_grad_(), how, 2, 4, axis))
    turned = weight.detach().transpose(0, -1).contiguous().transpose(0, -1)
    torch.library.opcheck(OPERATOR, (turned, mask, logits.detach(), control(1.5, 0.5, 77), 2, 4, axis))
    torch.library.opcheck(
        OPERATOR, (turned, mask.transpose(0, -1).contiguous().transpose(0, -1), logits.detach(), control(), 2, 4, axis)
    )


def test_a_recomputation_draws_the_same_mask() -> None:
    module, x = Learned(), torch.randn(5, 8)
    expected, expected_grad = gradients(module, x)
    again = Learned()
    torch.manual_seed(9)  # nothing of it comes from torch's generators
    y: Any = checkpoint(again, x.requires_grad_(), use_reentrant=False, preserve_rng_state=False)
    y.square().sum().backward()
    assert torch.equal(y.detach(), expected)
    assert again.logits.grad is not None
    assert torch.equal(again.logits.grad, expected_grad)


def test_what_is_kept_for_the_backward_pass_is_no_new_tensor() -> None:
    module, kept = Learned(), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        learned_weight(module.weight, module.mask, module.logits, module.control, 2, 4, 1)
    own = {t.data_ptr() for t in (module.weight, module.mask, module.logits, module.control)}  # type: ignore[operator]
    assert {tensor.data_ptr() for tensor in kept} <= own


@pytest.mark.parametrize(
    ("backend", "temperature"),
    [
        ("aot_eager", 0.5),
        ("aot_eager", 0.0),
        pytest.param("inductor", 0.5, marks=pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")),
    ],
)
def test_compiled_equals_eager(backend: str, temperature: float) -> None:
    module, x = Learned(temperature), torch.randn(5, 8)
    expected, expected_grad = gradients(module, x)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    found, grad = gradients(compiled, x)  # type: ignore[arg-type]
    assert torch.allclose(found, expected)
    assert torch.allclose(grad, expected_grad)
    module.get_buffer("control")[2] = 78  # what is in the buffer is read at each call
    later, _ = gradients(compiled, x)  # type: ignore[arg-type]
    torch._dynamo.reset()
    assert torch.equal(later, found) == (temperature == 0)


def test_it_survives_export_again_and_again() -> None:
    module, x = Learned(), torch.randn(5, 8)
    expected, expected_grad = gradients(module, x)
    once = torch.export.export(module, (x,), strict=False).module()
    twice = torch.export.export(once, (x,), strict=False)
    assert OPERATOR in {node.target for node in twice.graph.nodes}
    assert {"weight", "mask", "logits", "control"} <= set(twice.state_dict)
    found, grad = gradients(twice.module(), x)
    assert torch.equal(found, expected)
    assert torch.equal(grad, expected_grad)


def test_what_does_not_fit_is_refused() -> None:
    weight, mask, logits = case()
    with pytest.raises(
        ValueError,
        match=r"expects logits of shape \(6, 6, 2\) for 2:4 along axis 1 of a weight of shape \(6, 8\), got \(6, 6, 1\)",
    ):
        learned_weight(weight, mask, logits[..., :1], control(), 2, 4, 1)
    with pytest.raises(ValueError, match=r"expects scale, temperature and key in control, got shape \(2,\)"):
        learned_weight(weight, mask, logits, control()[:2], 2, 4, 1)
    with pytest.raises(ValueError, match=r"expects a bool mask"):
        learned_weight(weight, mask.float(), logits, control(), 2, 4, 1)
