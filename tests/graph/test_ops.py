import shutil

import pytest
import torch
from torch import Tensor, nn

from sparsepass.graph.ops import masked_weight, where_kept

pytestmark = pytest.mark.numerics

OPERATOR = torch.ops.sparsepass.masked_weight.default
QUANTIZED = torch.ops.sparsepass.quantized_weight.default


class Masked(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 8, generator=generator).to(dtype))
        self.register_buffer("mask", torch.rand(6, 8, generator=generator) > 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, masked_weight(self.weight, self.mask))


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    module.zero_grad()
    y = module(x)
    y.square().sum().backward()
    (weight,) = module.parameters()
    assert weight.grad is not None
    return y.detach(), weight.grad.clone()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_what_is_kept_is_bit_for_bit_a_where(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, 1.5, -1.5, float("nan"), -float("nan"), 1e-6, -448.0]).to(dtype)
    weight, mask = special.repeat(2, 3).T, torch.rand(24, 2, generator=torch.Generator().manual_seed(0)) > 0.5
    found = where_kept(weight, mask)
    expected = torch.where(mask, weight, torch.zeros((), dtype=dtype))
    assert found.dtype == dtype
    assert found.contiguous().view(torch.uint8).tolist() == expected.contiguous().view(torch.uint8).tolist()
    assert found.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 8), (3, 4, 8), (4, 2, 3, 3)])
def test_it_is_a_where_in_every_dtype_and_rank(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, mask = torch.randn(shape).to(dtype), torch.rand(shape) > 0.5
    result = masked_weight(weight, mask)
    assert result.dtype == dtype
    assert torch.equal(result, torch.where(mask, weight, torch.zeros_like(weight)))


def test_what_stands_behind_the_mask_becomes_plus_zero_whatever_it_is() -> None:
    weight = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf"), -1.0, -0.0])
    mask = torch.tensor([False, False, False, False, False, True])
    result = masked_weight(weight, mask)
    assert torch.equal(result, torch.zeros(6))
    assert torch.signbit(result).tolist() == [False, False, False, False, False, True]  # what is kept is kept to the bit


def test_the_gradient_goes_straight_through_to_masked_entries() -> None:
    module, x = Masked(), torch.randn(5, 8)
    y, grad = gradients(module, x)
    dense = (2 * y).t() @ x
    assert torch.equal(grad, dense)
    assert bool((grad[~module.mask] != 0).all())  # type: ignore[operator]


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "channels_last"])
def test_the_operator_passes_opcheck(strides: str) -> None:
    weight = torch.randn(4, 6, 2, 3)
    if strides == "transposed":
        weight = weight.transpose(0, 1)
    if strides == "channels_last":
        weight = weight.to(memory_format=torch.channels_last)
    mask = torch.rand(weight.shape) > 0.5
    torch.library.opcheck(OPERATOR, (weight.requires_grad_(), mask))
    torch.library.opcheck(OPERATOR, (weight.detach().bfloat16(), mask))


@pytest.mark.parametrize("mask", [torch.ones(2, 4), torch.ones(2, 4, dtype=torch.uint8)])
def test_a_mask_that_is_not_bool_is_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expects a bool mask, got torch\.\w+; convert it with mask\.bool\(\)"):
        masked_weight(torch.ones(2, 4), mask)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shaped like the weight \(2, 4\), got \(4,\)"):
        masked_weight(torch.ones(2, 4), torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")),
    ],
)
def test_compiled_equals_eager(backend: str) -> None:
    module, x = Masked(), torch.randn(5, 8)
    expected, expected_grad = gradients(module, x)
    torch._dynamo.reset()
    found, grad = gradients(torch.compile(module, backend=backend, fullgraph=True), x)  # type: ignore[arg-type]
    torch._dynamo.reset()
    assert torch.equal(found, expected)
    assert torch.equal(grad, expected_grad)


def test_it_survives_export_again_and_again() -> None:
    module, x = Masked(), torch.randn(5, 8)
    expected, expected_grad = gradients(module, x)
    once = torch.export.export(module, (x,), strict=False).module()
    twice = torch.export.export(once, (x,), strict=False)
    assert OPERATOR in {node.target for node in twice.graph.nodes}
    assert {"weight", "mask"} <= set(twice.state_dict)
    found, grad = gradients(twice.module(), x)
    assert torch.equal(found, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "axis", "scales_shape"), [((6, 8), 1, (6, 2)), ((8, 6), 0, (6, 2)), ((3, 8, 6), 1, (3, 6, 2))]
)
def test_rounding_is_that_of_each_group(
    shape: tuple[int, ...], axis: int, scales_shape: tuple[int, ...], symmetric: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    scales = (torch.rand(scales_shape, generator=generator) / 4 + 0.1).bfloat16()
    zeros = None if symmetric else torch.randint(0, 16, scales_shape, generator=generator, dtype=torch.uint8)
    found = QUANTIZED(weight, scales, zeros, 4, 4, axis).movedim(axis, -1)
    low, high = (-8, 7) if symmetric else (0, 15)
    for place in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        group = (*place[:-1], place[-1] // 4)
        step, zero = float(scales[group]), 0 if zeros is None else int(zeros[group])
        number = min(high, max(low, round(float(weight.movedim(axis, -1)[tuple(place)].float() / step)) + zero))
        assert float(found[tuple(place)]) == float(torch.tensor((number - zero) * step, dtype=dtype))


@pytest.mark.parametrize("zeros", [None, torch.zeros(6, 2, dtype=torch.uint8)])
def test_rounding_passes_the_gradient_straight_through(zeros: Tensor | None) -> None:
    weight = torch.randn(6, 8, requires_grad=True)
    scales = torch.full((6, 2), 0.01).bfloat16()  # most of the weights are clipped
    upstream = torch.randn(6, 8)
    QUANTIZED(weight, scales, zeros, 4, 4, 1).backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)
    torch.library.opcheck(QUANTIZED, (weight.detach(), scales, zeros, 4, 4, 1))


def test_rounding_to_fp8_is_that_of_torch() -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scales = torch.full((6, 2), 0.004).bfloat16()
    found = QUANTIZED(weight, scales, None, 8, 4, 1, "fp8")
    steps = scales.float().repeat_interleave(4, dim=1)
    assert torch.equal(found, (weight / steps).clamp(-448, 448).to(torch.float8_e4m3fn).float() * steps)
    found.backward(torch.ones(6, 8))
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(6, 8))
    torch.library.opcheck(QUANTIZED, (weight.detach(), scales, None, 8, 4, 1, "fp8"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bits": 3}, "8 or 4 bits"),
        ({"group_size": -1}, "8 or 4 bits"),
        ({"scales": torch.ones(6, 2, dtype=torch.int32)}, "scales of bfloat16"),
        ({"scales": torch.ones(6, 2).half()}, "scales of a grid are bfloat16, and these were cast to float16"),
        ({"weight": torch.ones(6, 8, dtype=torch.int8)}, "floating-point weight"),
        ({"scales": torch.ones(2).bfloat16()}, "scales of 2 axes"),
        ({"axis": 2}, "an axis of the weight"),
        ({"axis": -1}, "an axis of the weight"),
        ({"weight": torch.ones(6, 0)}, "an axis of the weight"),
        ({"scales": torch.ones(6, 3).bfloat16()}, r"expects scales \(6, 2\)"),
        ({"zero_points": torch.ones(6, 3, dtype=torch.uint8)}, r"zero points like the scales, \(6, 2\) of uint8"),
        ({"zero_points": torch.ones(6, 2)}, "of uint8"),
        ({"format": "fp4"}, "the format int or fp8"),
        ({"format": "fp8"}, "of fp8 8 bits"),
        ({"format": "fp8", "bits": 8, "zero_points": torch.ones(6, 2, dtype=torch.uint8)}, "no zero points"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_grid_that_does_not_fit_is_refused(changes: dict[str, object], told: str, device: str) -> None:
    given: dict[str, object] = {"weight": torch.ones(6, 8), "scales": torch.ones(6, 2).bfloat16(), "zero_points": None}
    given |= {"bits": 4, "group_size": 4, "axis": 1, **changes}
    moved = [value.to(device) if isinstance(value, Tensor) else value for value in given.values()]
    with pytest.raises(ValueError, match=told):
        QUANTIZED(*moved)
