import copy
import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from tests.families import BY_NAME, FAMILIES, captured, tensors_of
from torch import Tensor, nn

from sparsepass.graph import CaptureError, Program
from sparsepass.graph.hierarchy import Hierarchy
from sparsepass.graph.ops import ASSERTIONS
from sparsepass.passes import apply_passes

NAMES = [family.name for family in FAMILIES]


@functools.cache
def _rewritten(name: str) -> Program:
    pipeline = "nm_sparsify{targets=re:body|mix}" if name == "convnet" else "nm_sparsify,slorb{k=4}"
    program = apply_passes(captured(name), pipeline, validate=False)
    with torch.no_grad():
        for state in program.sparse.values():
            if state.branch is not None:
                program.tensor(state.branch.weight).normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return program


def rewritten(name: str) -> Program:
    return copy.deepcopy(_rewritten(name))


def loss_and_gradients(module: nn.Module, tensors: Mapping[str, Tensor], inputs: dict[str, Tensor]) -> tuple[Any, ...]:
    for tensor in tensors.values():
        tensor.grad = None
    outputs = tensors_of(module(**inputs))
    sum(output.float().square().mean() for output in outputs).backward()  # type: ignore[union-attr]
    gradients = {name: None if t.grad is None else t.grad.clone() for name, t in tensors.items()}
    return [output.detach() for output in outputs], gradients


def assert_same(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    assert len(a[0]) == len(b[0]) > 0
    assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    assert a[1].keys() == b[1].keys()
    assert any(gradient is not None for gradient in a[1].values())
    for name, gradient in a[1].items():
        other = b[1][name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.equal(gradient, other), name


@pytest.mark.parametrize(
    ("name", "stage"),
    [*((name, "rewritten") for name in NAMES), *((name, "captured") for name in ("llama", "gpt2", "mixtral", "whisper"))],
)
def test_results_and_gradients_are_bit_equal_to_the_flat_graphs(name: str, stage: str) -> None:
    program = captured(name) if stage == "captured" else rewritten(name)
    tree = program.hierarchy()
    parameters = dict(program.graph_module.named_parameters())
    inputs = BY_NAME[name].inputs(3, 5)
    assert_same(loss_and_gradients(tree, parameters, inputs), loss_and_gradients(program, parameters, inputs))
    check_names_and_tensors(program, tree.tree)  # type: ignore[arg-type]


def check_names_and_tensors(program: Program, tree: nn.Module) -> None:
    """The tree's parameters and buffers are the program's own objects, under the same names."""
    found = dict(tree.named_parameters(remove_duplicate=False)) | dict(tree.named_buffers(remove_duplicate=False))
    for name, tensor in program.tensors().items():
        assert found.get(name, tensor) is tensor
    read = {str(node.target) for node in program.graph_module.graph.nodes if node.op == "get_attr" and node.users}
    assert read <= found.keys()
    assert {program.aliases.get(n, n) for n in found} <= program.tensors().keys()


@pytest.mark.parametrize(
    ("name", "path", "children"),
    [
        ("llama", "model.layers.0.self_attn", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("llama", "model.layers.1.mlp", {"gate_proj", "up_proj", "down_proj", "act_fn"}),
        ("gpt2", "transformer.h.1.attn", {"c_attn", "c_proj", "resid_dropout"}),
        ("bert", "encoder.layer.0", {"attention", "intermediate", "output"}),
        ("whisper", "model.decoder.layers.1.encoder_attn", {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("mixtral", "model.layers.0.mlp", {"gate", "experts"}),
    ],
)
@pytest.mark.parametrize("stage", ["captured", "rewritten"])
def test_the_models_layers_are_modules_again(name: str, path: str, children: set[str], stage: str) -> None:
    program = captured(name) if stage == "captured" else rewritten(name)
    tree = program.hierarchy().tree
    assert isinstance(tree, nn.Module)
    layer = tree.get_submodule(path)
    assert {child for child, _ in layer.named_children()} == children


def test_a_layer_computes_its_own_part_only() -> None:
    """Rewritten operations stand in the layer they belong to: cut a layer out, and its masks and branches go with it."""
    tree = rewritten("llama").hierarchy().tree
    assert isinstance(tree, nn.Module)
    for index in (0, 1):
        layer = tree.get_submodule(f"model.layers.{index}.self_attn.q_proj")
        assert {n for n, _ in layer.named_parameters()} == {"weight", "slorb_weight"}
        assert {n for n, _ in layer.named_buffers()} == {"mask"}
    foreign = [n for n, _ in tree.named_children() if n not in ("model", "lm_head")]
    assert foreign == []


def test_training_the_hierarchy_trains_the_program() -> None:
    program = rewritten("llama")
    other = copy.deepcopy(program)
    tree = program.hierarchy()
    inputs = BY_NAME["llama"].inputs(4, 8)
    for module in (tree, other):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(**inputs).logits.square().mean().backward()
            optimizer.step()
    start = rewritten("llama")
    for name, tensor in program.tensors().items():
        assert torch.equal(tensor, other.tensor(name)), name
    assert not torch.equal(
        program.tensor("model.layers.0.mlp.up_proj.weight"), start.tensor("model.layers.0.mlp.up_proj.weight")
    )
    assert torch.equal(program(**inputs).logits, tree(**inputs).logits)
    assert torch.equal(program.to_model()(**inputs).logits.argmax(-1), tree(**inputs).logits.argmax(-1))


class Checkpointed(nn.Module):
    """A layer whose activations are computed again in the backward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        def run(*inner: Any, **named: Any) -> Any:
            self.calls += 1
            return self.layer(*inner, **named)

        return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False, **kwargs)


def test_checkpointing_a_layer_changes_nothing() -> None:
    program = rewritten("llama")
    parameters = dict(program.graph_module.named_parameters())
    inputs = BY_NAME["llama"].inputs(3, 5)
    tree = program.hierarchy()
    expected = loss_and_gradients(tree, parameters, inputs)
    assert isinstance(tree.tree, nn.Module)
    layers = tree.tree.get_submodule("model.layers")
    wrapped = []
    for name, layer in list(layers.named_children()):
        wrapped.append(Checkpointed(layer))
        setattr(layers, name, wrapped[-1])
    assert_same(loss_and_gradients(tree, parameters, inputs), expected)
    assert [layer.calls for layer in wrapped] == [2, 2]


def test_it_is_called_like_the_program() -> None:
    program = captured("llama")
    exported = torch.export.export(program.graph_module, tuple(program.example_inputs.values()), strict=False)
    assert {node.target for node in exported.graph.nodes} & ASSERTIONS, "torch writes none, so there is nothing to drop"
    tree = program.hierarchy()
    ids = BY_NAME["llama"].inputs(2, 6)["input_ids"]
    expected = program(ids)
    found = tree(ids, use_cache=False)
    assert type(found) is type(expected)
    assert torch.equal(found.logits, expected.logits)
    with pytest.raises(ValueError, match="no input 'labels'"):
        tree(ids, labels=ids)


def test_train_and_eval_reach_every_module() -> None:
    program = captured("llama")
    program.train()
    tree = program.hierarchy()
    assert isinstance(tree, Hierarchy)
    assert all(m.training for m in tree.modules())
    assert not any(m.training for m in tree.eval().modules())
    assert program.training


def test_the_program_and_its_graph_are_as_before() -> None:
    program = rewritten("gpt2")
    text, tensors = str(program.graph_module.graph), program.tensors()
    program.hierarchy()
    assert str(program.graph_module.graph) == text
    assert {n: id(t) for n, t in program.tensors().items()} == {n: id(t) for n, t in tensors.items()}


def test_a_graph_that_cannot_be_exported_again_is_said() -> None:
    program = captured("convnet")
    program.example_inputs = {"images": torch.randn(2, 5, 8, 8)}
    with pytest.raises(CaptureError, match="cannot be exported again, so it has no hierarchy"):
        program.hierarchy()


@pytest.mark.parametrize("name", ["llama", "mixtral", "convnet"])
def test_no_copy_of_a_weight_is_kept(name: str) -> None:
    program = rewritten(name)
    tree = program.hierarchy()
    assert isinstance(tree, Hierarchy)
    own = {tensor.untyped_storage().data_ptr() for tensor in program.tensors().values()}
    codes = [code for module in tree.modules() if isinstance(code := module.__dict__.get("graph_module"), nn.Module)]
    held = {
        tensor.untyped_storage().data_ptr()
        for module in (tree, *codes)
        for tensor in [*module.parameters(), *module.buffers()]
        if tensor.dim()
    }
    assert codes
    assert held <= own


def test_the_tree_asserts_nothing_of_dtypes_and_runs_under_autocast() -> None:
    program = captured("llama")
    exported = torch.export.export(program.graph_module, tuple(program.example_inputs.values()), strict=False)
    assert {node.target for node in exported.graph.nodes} & ASSERTIONS, "torch writes none, so there is nothing to drop"
    tree = program.hierarchy()
    targets = {node.target for module in tree.modules() for node in getattr(getattr(module, "graph", None), "nodes", ())}
    assert not targets & ASSERTIONS
    inputs = BY_NAME["llama"].inputs(3, 7)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(tree(**inputs).logits, program(**inputs).logits)
