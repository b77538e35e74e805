"""The layer that multiplies a semi-structured weight, and which layers of a model get one."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from tests.export.targets.torch.torch_cpu import emulated_kernels, pruned, tiny_gpt2, tiny_llama, two_four
from torch import Tensor, nn

from sparsepass.export.targets.torch.kernels import convert
from sparsepass.export.targets.torch.layer import SemiStructuredLinear, apply_record, matrix_of, survey
from sparsepass.export.targets.torch.record import LayerRecord, Record
from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.model import SLoRBLinear, to_model
from sparsepass.graph.records import SparseState


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with emulated_kernels(), torch.no_grad():
        yield


def layer(min_tokens: int = 0, *, bias: bool = True, k: int = 0) -> tuple[SemiStructuredLinear, nn.Module]:
    """A lowered layer of 64 to 32 features, and the dense one that it stands for."""
    base: nn.Module = nn.Linear(64, 32, bias=bias, dtype=torch.bfloat16)
    base.weight = nn.Parameter(two_four(32, 64))
    if k:
        base = SLoRBLinear(base, torch.randn(32, 64 // k, dtype=torch.bfloat16), k, None, transposed=False)
    assert isinstance(base.weight, Tensor)
    own = base.bias if isinstance(base.bias, Tensor) else None
    dense = base.weight.detach() if min_tokens else None
    packed = convert(base.weight.detach(), "cutlass")
    return SemiStructuredLinear(packed, own, dense_weight=dense, min_tokens=min_tokens, base=base), base


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [0, 16])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 64), (2, 5, 64), (2, 1, 9, 64)])
def test_it_computes_what_the_dense_layer_does(bias: bool, k: int, shape: tuple[int, ...]) -> None:
    lowered, dense = layer(bias=bias, k=k)
    x = torch.randn(shape, dtype=torch.bfloat16)
    torch.testing.assert_close(lowered(x), dense(x))


def test_it_takes_inputs_that_are_no_matrix_in_memory_and_empty_ones() -> None:
    lowered, dense = layer()
    x = torch.randn(64, 4, 6, dtype=torch.bfloat16).permute(1, 2, 0)
    torch.testing.assert_close(lowered(x), dense(x))
    for always in (lowered, layer(min_tokens=8)[0]):
        assert always(torch.empty(2, 0, 64, dtype=torch.bfloat16)).shape == (2, 0, 32)


def test_a_dense_kernel_runs_below_the_least_number_of_tokens() -> None:
    lowered, dense = layer(min_tokens=8)
    assert lowered.dense_weight is not None
    lowered.dense_weight = nn.Parameter(torch.zeros_like(lowered.dense_weight), requires_grad=False)
    few, many = torch.randn(1, 7, 64, dtype=torch.bfloat16), torch.randn(2, 4, 64, dtype=torch.bfloat16)
    assert lowered.bias is not None
    assert torch.equal(lowered(few), lowered.bias.expand(1, 7, 32)), "the zeroed dense weight was used"
    torch.testing.assert_close(lowered(many), dense(many))
    assert "dense below 8 tokens" in repr(lowered)
    assert "SparseSemiStructuredTensorCUTLASS" in repr(lowered)


@pytest.mark.parametrize(("min_tokens", "k"), [(0, 0), (8, 0), (8, 16)])
def test_it_compiles_without_a_graph_break(min_tokens: int, k: int) -> None:
    lowered, dense = layer(min_tokens=min_tokens, k=k)
    torch.compiler.reset()
    compiled = torch.compile(lowered, backend="aot_eager", fullgraph=True)
    for tokens in (4, 8, 12, 40):
        x = torch.randn(1, tokens, 64, dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(x), dense(x))


def test_only_linear_layers_have_a_matrix() -> None:
    assert matrix_of(nn.Embedding(4, 8)) is None
    assert matrix_of(nn.ReLU()) is None
    assert matrix_of(nn.Conv2d(4, 4, 1)) is None
    attention = nn.MultiheadAttention(8, 2)
    assert matrix_of(attention.out_proj) is None, "a subclass whose owner reads the weight itself"
    linear = matrix_of(nn.Linear(4, 8))
    assert linear is not None
    assert linear.shape == (8, 4)


def test_every_layer_has_a_state_and_a_reason() -> None:
    found = {each.layer: each for each in survey(pruned(tiny_llama, "nm_sparsify,slorb{k=16}"), torch.bfloat16)}
    assert len(found) == 2 * 7 + 1
    q_proj, head = found["model.layers.0.self_attn.q_proj"], found["lm_head"]
    assert (q_proj.state, q_proj.sparse, q_proj.eligible, q_proj.shape) == ("to be measured", True, True, (64, 64))
    assert (q_proj.k, q_proj.projection, q_proj.bias) == (16, "fixed", False)
    assert (head.state, head.sparse, head.eligible) == ("dense", False, False)
    assert head.reason.startswith("dense on purpose: output head")


def test_conv1d_is_surveyed_as_it_multiplies() -> None:
    found = {each.layer: each for each in survey(pruned(tiny_gpt2), torch.bfloat16)}
    assert found["transformer.h.0.attn.c_attn"].shape == (192, 64)
    assert all(each.bias for name, each in found.items() if name != "lm_head")


def also_sparse(model: Callable[[], nn.Module], weight: str) -> Program:
    """A program that says of one more weight that it is 2:4."""
    program = copy.copy(pruned(model))
    program.sparse = {**program.sparse, weight: SparseState(pattern="2:4", axis=1, mask=None)}
    return program


def test_what_cannot_be_lowered_says_why() -> None:
    def state(program: Program, layer: str, dtype: torch.dtype = torch.bfloat16) -> tuple[bool, str, str]:
        found = next(each for each in survey(program, dtype) if each.layer == layer)
        return found.eligible, found.state, found.reason

    gpt2 = pruned(tiny_gpt2)
    tied = gpt2.aliases.get("lm_head.weight", "lm_head.weight")
    assert state(also_sparse(tiny_gpt2, tied), "lm_head") == (
        False,
        "dense",
        "tied: transformer.wte.weight uses the same weight, which would have to be kept beside the packed one",
    )
    assert state(also_sparse(tiny_llama, "model.embed_tokens.weight"), "model.embed_tokens") == (
        False,
        "dense",
        "layer: model.embed_tokens.weight belongs to Embedding, and semi-structured tensors stand for linear layers only",
    )
    assert state(gpt2, "transformer.h.0.attn.c_attn", torch.float32) == (
        False,
        "dense",
        "shape rule: no 2:4 kernels for float32 (cusparselt); no 2:4 kernels for float32 (cutlass)",
    )


def lowered_everywhere(layers: tuple[LayerRecord, ...]) -> Record:
    found = tuple(replace(each, state="lowered", backend="cutlass") if each.eligible else each for each in layers)
    return Record(dtype="bfloat16", layers=found)


@pytest.mark.parametrize("passes", ["nm_sparsify", "nm_sparsify,slorb{k=16}"])
@pytest.mark.parametrize("family", [tiny_llama, tiny_gpt2])
def test_a_lowered_model_computes_what_the_dense_one_does(family: Callable[[], nn.Module], passes: str) -> None:
    program = pruned(family, passes)
    dense = to_model(program).to(torch.bfloat16)
    record = lowered_everywhere(survey(program, torch.bfloat16))
    lowered = apply_record(to_model(program).to(torch.bfloat16), record)
    num_lowered = sum(isinstance(module, SemiStructuredLinear) for module in lowered.modules())
    assert num_lowered == len(record.in_state("lowered")) == len(program.sparse) > 0
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(lowered(ids).logits, dense(ids).logits, rtol=3e-2, atol=3e-2)
    assert not any(parameter.requires_grad for parameter in lowered.parameters())


def test_layers_that_are_not_as_recorded_are_refused() -> None:
    program = pruned(tiny_llama)
    model, record = to_model(program).to(torch.bfloat16), lowered_everywhere(survey(program, torch.bfloat16))
    first = record.in_state("lowered")[0]
    for wrong in (replace(first, layer="model.layers.9.q"), replace(first, shape=(32, 64)), replace(first, layer="model.norm")):
        with pytest.raises(SparsepassError, match=f"the model has no linear layer {wrong.layer} of"):
            apply_record(model, replace(record, layers=(wrong,)))
    model.get_parameter(f"{first.layer}.weight")[0, :4] = 1
    with pytest.raises(SparsepassError, match=f"{first.layer}.weight is not 2:4"):
        apply_record(model, record)
