import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from tests.graph.packed.weights import KINDS, force, packed_weight, sparse_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsepass import SparsepassError
from sparsepass.graph.native import PATHS
from sparsepass.graph.packed import PackedLinear, Values, pack, unpack


@pytest.fixture(autouse=True)
def _forget_compiled() -> None:
    torch._dynamo.reset()


OF_EACH_KIND = pytest.mark.parametrize("values", KINDS)


def layer_of(values: Values, *, rows: int = 33, trained: bool = False) -> PackedLinear:
    return PackedLinear.from_packed(
        packed_weight(rows, 576, values),
        bias=torch.randn(rows).bfloat16(),
        slorb_weight=torch.randn(rows, 36),
        slorb_projection=torch.randn(36, 576) if trained else None,
    ).eval()


def x_of(tokens: int = 3) -> Tensor:
    return torch.randn(1, tokens, 576, generator=torch.Generator().manual_seed(0))


@OF_EACH_KIND
@pytest.mark.parametrize("path", PATHS)
def test_the_state_dict_is_that_of_the_stored_state(values: Values, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(path, values, monkeypatch)
    layer = layer_of(values, trained=True)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert shapes["weight"] == (33, 144 if values == "int4" else 288)
    assert shapes["codes"] == (33, 72)
    y = layer(x_of())
    assert layer.is_laid_out
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert dict(layer.named_parameters()).keys() == stored.keys() - {"weight", "codes"}  # their memory is free
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, stored[name])
        assert tensor.dtype == stored[name].dtype
    other = PackedLinear(576, 33, values=values, bias=True, slorb_k=16, slorb_trained=True).eval()
    other.load_state_dict(stored)
    assert torch.equal(other(x_of()), y)
    zeros = PackedLinear(576, 33, values=values, bias=True, slorb_k=16, slorb_trained=True).eval()
    assert not zeros(x_of()).any()
    zeros.load_state_dict(layer.state_dict())
    assert zeros.is_laid_out
    assert torch.equal(zeros(x_of()), y)


@OF_EACH_KIND
def test_it_loads_from_the_meta_device(values: Values) -> None:
    layer = layer_of(values)
    with torch.device("meta"):
        empty = PackedLinear(576, 33, values=values, bias=True, slorb_k=16)
    assert {t.device.type for t in empty.state_dict().values()} == {"meta"}
    for name, tensor in layer.state_dict().items():  # as transformers does: one after the other
        empty.load_state_dict({name: tensor}, strict=False, assign=True)
    assert torch.equal(empty(x_of()), layer(x_of()))


def in_pickle(layer: PackedLinear) -> PackedLinear:
    copied = pickle.loads(pickle.dumps(layer))
    assert isinstance(copied, PackedLinear)
    return copied


def saved(layer: PackedLinear) -> PackedLinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copied = torch.load(file, weights_only=False)
    assert isinstance(copied, PackedLinear)
    return copied


@OF_EACH_KIND
@pytest.mark.parametrize("duplicate", [copy.deepcopy, in_pickle, saved])
@pytest.mark.parametrize("laid_out", [True, False])
def test_copies_are_as_the_original(values: Values, duplicate: Callable[[PackedLinear], PackedLinear], laid_out: bool) -> None:
    layer = layer_of(values)
    if laid_out:
        layer.lay_out()
    copied = duplicate(layer)
    assert copied.is_laid_out == laid_out
    assert torch.equal(copied(x_of()), layer(x_of()))
    assert copied.data is not None
    assert layer.data is not None
    assert copied.data.data_ptr() != layer.data.data_ptr()


@OF_EACH_KIND
def test_types_of_the_file_stay(values: Values) -> None:
    layer = layer_of(values)
    before = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    y = layer(x_of())
    for cast in (layer.half, layer.double, layer.bfloat16, lambda: layer.to(torch.float32), lambda: layer.to("cpu")):
        cast()
        assert layer.is_laid_out
        assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == before
        assert torch.equal(layer(x_of()), y)


def test_moved_away_it_is_stored_and_back_it_is_laid_out() -> None:
    layer = layer_of("bf16").lay_out()
    with torch.device("cpu"):
        away = copy.deepcopy(layer).to("meta")  # any other device
    assert not away.is_laid_out
    assert {t.device.type for t in away.state_dict().values()} == {"meta"}
    with pytest.raises(SparsepassError, match="no weights yet"):
        away(x_of())
    away.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(away(x_of()), layer(x_of()))


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_it_takes_the_place_of_a_dense_layer(kind: type[nn.Module]) -> None:
    dense = nn.Linear(64, 24) if kind is nn.Linear else Conv1D(24, 64)
    weight_OI = sparse_weight(24, 64).to(torch.bfloat16)
    assert isinstance(dense.weight, nn.Parameter)
    dense.weight.data = weight_OI if kind is nn.Linear else weight_OI.T.contiguous()
    dense.to(torch.bfloat16)
    layer = PackedLinear.from_linear(dense)
    x = torch.randn(2, 3, 64).bfloat16()
    torch.testing.assert_close(layer(x), dense(x))
    assert torch.equal(unpack(layer.packed()), weight_OI)


def test_training_is_refused() -> None:
    layer, x = layer_of("bf16"), x_of().requires_grad_()
    with pytest.raises(SparsepassError, match="packed layers are for inference"):
        layer(x).sum().backward()
    torch.testing.assert_close(layer(x).detach(), layer(x.detach()))
    layer.train()
    with pytest.raises(SparsepassError, match="prune or retrain the program"):
        layer(x)
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x)


@OF_EACH_KIND
@pytest.mark.parametrize("path", PATHS)
def test_damage_is_told_with_its_place(values: Values, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(path, values, monkeypatch)
    layer = layer_of(values)
    assert layer.codes is not None
    layer.codes[5, 7] = 0b01_01_01_00
    with pytest.raises(SparsepassError, match=r"model\.h\.3\.weight: the codes of row 5 near column (56|60) do not ascend"):
        layer.lay_out("model.h.3")
    layer = layer_of(values)
    layer.slorb_weight = nn.Parameter(torch.zeros(33, 35), requires_grad=False)
    with pytest.raises(SparsepassError, match=r"model\.h\.3\.slorb_weight has to be \[33, 36\]"):
        layer.lay_out("model.h.3")
    other = PackedLinear(576, 33, values="int8" if values != "int8" else "bf16", bias=True, slorb_k=16)
    with pytest.raises(RuntimeError, match=f"this layer of {other.values} takes"):
        other.load_state_dict(layer_of(values).state_dict(), strict=False)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SparsepassError, match="multiple of 8 columns"):
        PackedLinear(30, 8)
    with pytest.raises(SparsepassError, match="sums 7 features"):
        PackedLinear(32, 8, slorb_k=7)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("trained", [True, False])
def test_compilers_and_exporters_see_the_operator(path: str, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    force(path, "int8", monkeypatch)
    layer = layer_of("int8", trained=trained).lay_out()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(layer, (x_of(),), dynamic_shapes=({1: torch.export.Dim("tokens", max=64)},))
    assert "sparsepass.packed_linear" in str(exported.graph)
    for tokens in (1, 3, 20):
        with torch.no_grad():
            assert torch.equal(compiled(x_of(tokens)), layer(x_of(tokens)))
            assert torch.equal(exported.module()(x_of(tokens)), layer(x_of(tokens)))


def test_inductor_runs_it() -> None:
    layer = nn.Sequential(nn.LayerNorm(576), layer_of("bf16").lay_out(), nn.GELU())
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x_of()), layer(x_of()))


def test_a_stored_layer_is_seen_stored() -> None:
    layer = layer_of("bf16")
    with torch.no_grad():
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x_of())
        assert not layer.is_laid_out
        torch.testing.assert_close(y, layer(x_of()), atol=0.5, rtol=0.01)


def test_the_operator_keeps_the_rules_of_torch() -> None:
    layer = layer_of("int8").lay_out()
    ready = layer.laid_out()
    arguments = (x_of(), ready.data, None, ready.scales, ready.branch, ready.bias, ready.form.to_numbers())
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    with torch.no_grad():
        torch.library.opcheck(torch.ops.sparsepass.packed_linear.default, arguments, test_utils=checks)


def test_a_gradient_asked_of_the_operator_is_refused() -> None:
    ready = layer_of("bf16").laid_out()
    x = x_of().requires_grad_()
    y = torch.ops.sparsepass.packed_linear(x, ready.data, None, None, ready.branch, ready.bias, ready.form.to_numbers())
    with pytest.raises(SparsepassError, match="have no gradients"):
        y.sum().backward()


def test_one_call_by_the_public_names() -> None:
    import sparsepass

    weight = torch.tensor([[0, 1.0, 2.0, 0, 0, 3.0, 0, 4.0]])
    assert torch.equal(sparsepass.unpack(sparsepass.pack(weight, values="fp16")).float(), weight)
    assert pack is sparsepass.pack
