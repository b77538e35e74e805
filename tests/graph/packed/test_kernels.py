"""Each kernel that this machine has, against the definition in float64."""

import pytest
import torch
from tests.graph.packed.weights import KINDS, TYPES, expected, force, packed_weight, rounded, tolerance
from torch import nn

from sparsepass import SparsepassError
from sparsepass.graph.native import PATHS
from sparsepass.graph.packed import DenseLinear, PackedLinear, Values, pack, unpack

GROUPS: dict[str, tuple[int, ...]] = {
    "bf16": (0,),
    "fp16": (0,),
    "int8": (0, 16, 32, 64, 128, 256),
    "int4": (0, 16, 32, 64, 128, 384),
}
ON_EACH_PATH = pytest.mark.parametrize("path", PATHS)
OF_EACH_KIND = pytest.mark.parametrize("values", KINDS)


def close(found: torch.Tensor, wanted: torch.Tensor, share: float = 1.0) -> None:
    assert found.shape == wanted.shape
    assert float((found.double() - wanted).abs().max()) <= share * tolerance(found.dtype) * max(1.0, float(wanted.abs().max()))


@pytest.mark.numerics
@ON_EACH_PATH
@OF_EACH_KIND
@pytest.mark.parametrize("columns", [8, 64, 72, 576, 2048])
def test_products_are_those_of_the_unpacked_weight(
    values: Values, path: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(path, values, monkeypatch)
    for rows in (1, 7, 33):
        for group_size in GROUPS[values]:
            packed = packed_weight(rows, columns, values, group_size)
            layer = PackedLinear.from_packed(packed).lay_out()
            assert layer.path == path
            for tokens in (1, 2, 3, 5, 8, 11, 16, 17, 64, 65):
                for dtype in TYPES if tokens in (1, 5, 17, 65) else (torch.float32,):
                    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
                    close(layer(x), expected(packed, x, path), 2.0)


@pytest.mark.numerics
@ON_EACH_PATH
@OF_EACH_KIND
@pytest.mark.parametrize("columns", [4096 + 40, 8192 + 8, 2 * 8192 + 136])
def test_products_of_rows_in_panels(values: Values, path: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rows are cut, and the last panel may be filled up."""
    force(path, values, monkeypatch)
    for rows in (1, 33, 70):
        for group_size in GROUPS[values]:
            packed = packed_weight(rows, columns, values, group_size)
            layer = PackedLinear.from_packed(packed).lay_out()
            for tokens in (1, 4, 9):
                x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
                close(layer(x), expected(packed, x, path), 2.0)
    again = layer.packed()
    assert torch.equal(again.kept.view(torch.uint8), packed.kept.view(torch.uint8))
    assert torch.equal(again.codes, packed.codes)


@pytest.mark.numerics
@ON_EACH_PATH
@OF_EACH_KIND
def test_bias_and_branch_are_added(values: Values, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(path, values, monkeypatch)
    packed = packed_weight(33, 576, values)
    bias, branch = torch.randn(33), torch.randn(33, 36)
    for dtype in TYPES:
        for tokens in (1, 6, 20):
            x = torch.randn(tokens, 576, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            layer = PackedLinear.from_packed(packed, bias=bias, slorb_weight=branch).lay_out()
            assert layer.slorb_weight is not None
            sums = x.double().unflatten(-1, (36, 16)).sum(-1)
            wanted = expected(packed, x, path) + sums @ layer.slorb_weight.double().T + bias.double()
            # The kernels round the sums of the branch to 16 bits, too.
            close(layer(x), wanted, 2.0 if dtype != torch.float32 else 800.0)
            bare = PackedLinear.from_packed(packed, bias=bias).lay_out()
            close(bare(x), expected(packed, x, path) + bias.double(), 2.0)


@pytest.mark.numerics
@ON_EACH_PATH
@OF_EACH_KIND
@pytest.mark.parametrize("tokens", [130, 1041])
def test_many_tokens_meet_rows_in_panels_and_a_branch(
    values: Values, path: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(path, values, monkeypatch)
    packed = packed_weight(170, 4224, values)
    x = torch.randn(tokens, 4224, generator=torch.Generator().manual_seed(0)).bfloat16()
    bias, branch = torch.randn(170), torch.randn(170, 264)
    layer = PackedLinear.from_packed(packed, bias=bias, slorb_weight=branch).lay_out()
    assert layer.slorb_weight is not None
    sums = x.double().unflatten(-1, (264, 16)).sum(-1)
    wanted = expected(packed, x, path) + sums @ layer.slorb_weight.double().T + bias.double()
    close(layer(x), wanted, 2.0)
    close(PackedLinear.from_packed(packed).lay_out()(x), expected(packed, x, path), 2.0)


@pytest.mark.numerics
@ON_EACH_PATH
@OF_EACH_KIND
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(259, 4232, 70), (515, 600, 130), (289, 8328, 66)])
def test_many_tokens_meet_more_rows_than_are_taken_at_once(
    values: Values, path: str, rows: int, columns: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(path, values, monkeypatch)
    packed = packed_weight(rows, columns, values)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    close(PackedLinear.from_packed(packed).lay_out()(x), expected(packed, x, path), 2.0)


@ON_EACH_PATH
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("group_size", [0, 16, 64, 128])
def test_sums_of_integers_are_exact(values: Values, group_size: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(path, values, monkeypatch)
    generator = torch.Generator().manual_seed(1)
    most = 128 if values == "int8" else 8
    weight = packed_weight(33, 640, "bf16")
    whole = (unpack(weight) != 0) * torch.randint(-most, most, (33, 640), generator=generator)
    scales = torch.ones(33, -(-640 // group_size) if group_size else 1)
    packed = pack(whole.float(), values=values, group_size=group_size, scales=scales)
    if values == "int8":
        packed.kept[packed.kept == -127] = -128  # as a file of others may have it
    # Whole numbers with 127 among each 128 columns have the scale 1.
    x = torch.randint(-126, 127, (16, 640), generator=generator).float()
    x[:, ::128] = 127.0
    wanted = x.double() @ unpack(packed).double().T
    assert torch.equal(PackedLinear.from_packed(packed).lay_out()(x).double(), wanted)


@ON_EACH_PATH
@OF_EACH_KIND
def test_strides_and_leading_axes_do_not_matter(values: Values, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(path, values, monkeypatch)
    layer = PackedLinear.from_packed(packed_weight(7, 64, values)).lay_out()
    for tokens in (3, 24):
        wide = torch.randn(2, tokens, 128)
        for x in (
            wide[..., :64],
            wide[..., ::2],
            wide.transpose(0, 1)[..., 64:],
            wide[0, :, 3:67],
            wide[:1, :1, :64].expand(5, tokens, 64),
        ):
            if path != "torch" and x.numel() // 64 <= 16:
                assert torch.equal(layer(x), layer(x.contiguous()))
            close(layer(x), layer(x.contiguous()).double())  # torch's products take another order of summation
            assert layer(x).shape == (*x.shape[:-1], 7)
    assert layer(wide[0, 0, :64]).shape == (7,)
    assert layer(torch.zeros(2, 0, 64)).shape == (2, 0, 7)


@ON_EACH_PATH
@OF_EACH_KIND
def test_layouts_give_back_what_was_stored(values: Values, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(path, values, monkeypatch)
    for rows, columns in ((1, 8), (2, 24), (7, 72), (33, 576), (64, 1024), (5, 136), (67, 8328), (32, 20000)):
        packed = packed_weight(rows, columns, values)
        layer = PackedLinear.from_packed(packed).lay_out()
        again = layer.packed()
        assert torch.equal(again.kept.view(torch.uint8), packed.kept.view(torch.uint8))
        assert torch.equal(again.codes, packed.codes)


@OF_EACH_KIND
def test_torch_reads_what_any_processor_reads(values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of kept values, each followed by its codes."""
    data = {}
    for path in ("generic", "torch"):
        force(path, values, monkeypatch)
        data[path] = PackedLinear.from_packed(packed_weight(7, 72, values)).lay_out().data
    assert torch.equal(data["generic"], data["torch"])  # type: ignore[arg-type]


@ON_EACH_PATH
def test_zeros_and_values_that_are_not_finite_pass_through(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(path, "bf16", monkeypatch)
    layer = PackedLinear.from_packed(packed_weight(8, 64, "bf16")).lay_out()
    assert torch.equal(layer(torch.zeros(1, 64)), torch.zeros(1, 8))
    x = torch.zeros(2, 64)
    x[1] = torch.nan
    assert layer(x)[1].isnan().all()
    assert layer(x)[0].isfinite().all()


@ON_EACH_PATH
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 17, 127])
def test_integers_do_not_hide_what_is_not_finite(
    place: int, bad: float, values: Values, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(path, values, monkeypatch)
    layer = PackedLinear.from_packed(pack(torch.tensor([[1.0, 2, 0, 0] * 32]), values=values)).lay_out()
    x = torch.ones(2, 128)
    x[1, place] = bad
    assert not layer(x)[1].isfinite().any()
    assert not layer(x[1:])[0].isfinite().any()
    assert layer(x)[0].isfinite().all()


@ON_EACH_PATH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("columns", [8, 40, 576])
def test_dense_weights(dtype: torch.dtype, columns: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}[dtype]
    force(path, kind, monkeypatch)
    weight = torch.randn(33, columns, generator=torch.Generator().manual_seed(3))
    layer = DenseLinear.from_weight(weight, dtype=dtype, bias=torch.randn(33))
    assert layer.bias is not None
    known = layer.weight.double() if layer.scales is None else layer.weight.double() * layer.scales.double()
    for tokens in (1, 5, 16, 30):
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
        seen = x.double() if path == "torch" or tokens > 16 else rounded(x, kind)
        close(layer(x), seen @ known.T + layer.bias.double(), 2.0)


def test_what_does_not_fit_is_refused() -> None:
    layer = PackedLinear.from_packed(packed_weight(7, 64, "bf16"))
    with pytest.raises(SparsepassError, match=r"takes 64 features, and the input is \[2, 63\]"):
        layer(torch.zeros(2, 63))
    with pytest.raises(SparsepassError, match=r"torch.float64; cast it"):
        layer(torch.zeros(2, 64, dtype=torch.float64))
    with pytest.raises(SparsepassError, match="has no weights yet"):
        PackedLinear(64, 7, device="meta")(torch.zeros(2, 64))
    assert isinstance(layer, nn.Module)
