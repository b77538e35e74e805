import contextlib
import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tests.families import BY_NAME, FAMILIES, captured, tensors_of
from torch import Tensor, nn

from sparsepass.graph import CaptureError, Program, SparsepassError, capture
from sparsepass.graph.capture.examples import example_inputs_for
from sparsepass.graph.capture.exporter import program_from_graph_module, run_exporter

SHAPES = ((2, 8), (1, 5), (3, 1), (2, 13))
NAMES = [family.name for family in FAMILIES]


@functools.cache
def model_of(name: str) -> nn.Module:
    return BY_NAME[name].model()


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    config = getattr(model, "config", None)
    return model(**inputs, **({"use_cache": False} if getattr(config, "use_cache", False) else {}))


def assert_bit_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    assert pairs
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


class Plain(nn.Module):
    """A linear layer whose outputs are put into the shape that a test asks for."""

    def __init__(self, shape: str = "tensor") -> None:
        super().__init__()
        self.first, self.second, self.shape = nn.Linear(8, 8), nn.Linear(8, 4), shape

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        h = self.first(x) if scale is None else self.first(x) * scale
        y = self.second(h.relu())
        shapes = {
            "tensor": y,
            "tuple": (y, h),
            "list": [y, h],
            "dict": {"y": y, "h": h},
            "nested": {"y": (y, [None, h, {"deep": h + 1}]), "none": None},
        }
        return shapes[self.shape]


class Branches(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that an error has to name
            return self.linear(x)  # type: ignore[no-any-return]
        return x


class Constants(nn.Module):
    """Tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.attribute = torch.arange(8.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.attribute + torch.tensor([0.5, -1.5]).repeat(4)  # type: ignore[no-any-return]


class Shared(nn.Module):
    """A buffer and a parameter with two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight
        one = torch.ones(8)
        self.register_buffer("one", one)
        self.register_buffer("two", one, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() * self.one) * self.two  # type: ignore[no-any-return]


class OwnLlama(hf.LlamaForCausalLM):
    """A user's own class."""


def tiny_llama(kind: type = hf.LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    config: Any = copy.deepcopy(model_of("llama").config)
    config.tie_word_embeddings = False
    return kind(config).eval()


@pytest.mark.parametrize("batch_and_length", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_program_is_bit_equal_to_the_model(name: str, batch_and_length: tuple[int, int]) -> None:
    inputs = BY_NAME[name].inputs(*batch_and_length)
    assert_bit_equal(run(captured(name), inputs), run(model_of(name), inputs))


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_every_tensor_of_the_model_as_its_own_copy(name: str) -> None:
    program, model = captured(name), model_of(name)
    for key, tensor in model.state_dict().items():
        assert torch.equal(program.tensor(key), tensor)
    parameters = dict(model.named_parameters())
    assert {n for n, _ in program.graph_module.named_parameters()} == set(parameters)
    assert not {t.data_ptr() for t in program.tensors().values()} & {t.data_ptr() for t in parameters.values()}
    with torch.no_grad():
        for tensor in program.tensors().values():
            tensor.zero_()
    assert all(bool(p.any()) for n, p in parameters.items() if n.endswith("_proj.weight"))


@pytest.mark.parametrize(
    ("name", "aliases"),
    [
        ("llama", {"lm_head.weight": "model.embed_tokens.weight"}),
        ("whisper", {"proj_out.weight": "model.decoder.embed_tokens.weight"}),
        ("mistral", {}),
    ],
)
def test_ties_are_recorded(name: str, aliases: dict[str, str]) -> None:
    assert captured(name).aliases == aliases


@pytest.mark.parametrize("name", NAMES)
def test_batch_and_sequence_are_dynamic(name: str) -> None:
    program = captured(name)
    for key, axes in program.dynamic_axes.items():
        expected = {"input_features": (0,), "pixel_values": (0,), "images": (0, 2, 3)}.get(key, (0, 1))
        assert axes == expected, key


@pytest.fixture(scope="module")
def untouched() -> tuple[Any, dict[str, Any], Program]:
    """A model in training mode before and after capture."""
    model = tiny_llama()
    model.train()
    model.model.layers[0].eval()  # a mixture that must come back
    before = snapshot(model)
    program = capture(model)
    return model, before, program


def snapshot(model: nn.Module) -> dict[str, Any]:
    registries = (hf.modeling_utils.ALL_ATTENTION_FUNCTIONS, hf.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)
    return {
        "state": {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()},
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "forwards": [(id(type(m)), id(type(m).forward)) for m in model.modules()],
        "config": model.config.to_dict(),  # type: ignore[operator, union-attr]
        "registries": [{key: r[key] for key in r} for r in registries],
        "gradients": [p.requires_grad for p in model.parameters()],
    }


def test_capture_leaves_the_model_as_it_was(untouched: tuple[Any, dict[str, Any], Program]) -> None:
    model, before, _ = untouched
    after = snapshot(model)
    states = before.pop("state"), after.pop("state")
    assert after == before
    assert states[0].keys() == states[1].keys()
    for name, (identity, tensor) in states[0].items():
        assert states[1][name][0] == identity
        assert torch.equal(states[1][name][1], tensor)
    assert model.config.use_cache is True


def test_a_model_in_training_mode_is_captured_in_evaluation_mode(
    untouched: tuple[Any, dict[str, Any], Program],
) -> None:
    model, _, program = untouched
    inputs = BY_NAME["llama"].inputs(2, 6)
    assert not program.training
    assert_bit_equal(run(program, inputs), run(copy.deepcopy(model).eval(), inputs))


def test_the_model_still_works_after_capture(untouched: tuple[Any, dict[str, Any], Program]) -> None:
    model = copy.deepcopy(untouched[0]).eval()
    ids = torch.arange(3, 9).unsqueeze(0)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert made.shape == (1, 9)
    model(input_ids=ids, labels=ids).loss.backward()


def test_it_is_called_like_the_model() -> None:
    program = captured("llama")
    ids = BY_NAME["llama"].inputs(2, 7)["input_ids"]
    mask = torch.ones_like(ids)
    expected = program(input_ids=ids, attention_mask=mask)
    assert_bit_equal(program(ids, mask), expected)
    assert_bit_equal(program(ids), expected)  # a missing mask is all ones, as in the model
    assert_bit_equal(program(ids, use_cache=False, return_dict=True, output_attentions=False, labels=None), expected)
    assert expected["logits"] is expected[0]


def test_a_left_padded_batch_gives_the_models_result() -> None:
    inputs = BY_NAME["llama"].inputs(2, 7)
    inputs["attention_mask"][0, :3] = 0
    assert_bit_equal(run(captured("llama"), inputs), run(model_of("llama"), inputs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.ones(2, 8, dtype=torch.long)}, r"no input 'labels'.*or compute the loss from the logits"),
        ({"output_hidden_states": True}, r"no input 'output_hidden_states' \(it has input_ids, attention_mask\)"),
        ({"use_cache": True}, r"no input 'use_cache'"),
        ({"input_ids": None}, r"needs the input 'input_ids', which was not given"),
        ({"input_ids": [[1, 2]]}, r"input 'input_ids' is a tensor, got a list"),
        ({"input_ids": torch.ones(8, dtype=torch.long)}, r"'input_ids' has shape \[any, any\], got \[8\]"),
    ],
)
def test_an_argument_that_the_program_cannot_take_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsepassError, match=message):
        captured("llama")(**{"input_ids": torch.ones(2, 8, dtype=torch.long), **arguments})


def test_too_many_arguments_are_refused() -> None:
    with pytest.raises(SparsepassError, match=r"takes 2 arguments \(x\), got 3"):
        capture(Plain(), torch.randn(2, 8))(*[torch.randn(2, 8)] * 3)


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ("tensor", ("output",)),
        ("tuple", ("0", "1")),
        ("list", ("0", "1")),
        ("dict", ("y", "h")),
        ("nested", ("y.0", "y.1.1", "y.1.2.deep")),
    ],
)
def test_a_plain_module_returns_what_it_returned(shape: str, names: tuple[str, ...]) -> None:
    model = Plain(shape).eval()
    program = capture(model, torch.randn(2, 8))
    assert program.output_names == names
    x = torch.randn(5, 8)
    with torch.no_grad():
        found, expected = program(x), model(x)
    flat_found, spec_found = torch.utils._pytree.tree_flatten(found)
    flat_expected, spec_expected = torch.utils._pytree.tree_flatten(expected)
    assert spec_found == spec_expected
    assert all(torch.equal(a, b) for a, b in zip(flat_found, flat_expected, strict=True) if a is not None)


@pytest.mark.parametrize("given", ["tensor", "tuple", "list", "dict", "optional"])
def test_example_inputs_come_in_many_forms(given: str) -> None:
    x, scale = torch.randn(2, 8), torch.rand(2, 1)
    forms: dict[str, Any] = {"tensor": x, "tuple": (x,), "list": [x, None], "dict": {"x": x}, "optional": (x, scale)}
    model = Plain().eval()
    program = capture(model, forms[given])
    inputs = (torch.randn(3, 8), torch.rand(3, 1)) if given == "optional" else (torch.randn(3, 8),)
    assert torch.equal(program(*inputs), model(*inputs))


def test_constants_of_a_module_are_part_of_the_program() -> None:
    model, x = Constants(), torch.randn(3, 8)
    program = copy.deepcopy(capture(model, torch.randn(2, 8)))
    assert torch.equal(program(x), model(x))
    assert {"linear.weight", "linear.bias", "attribute"} <= set(program.tensors())


def test_a_module_without_parameters_is_captured() -> None:
    program = capture(nn.Sequential(nn.ReLU()), torch.randn(2, 8))
    assert program.device == torch.device("cpu")
    assert program.sites() == ()
    assert torch.equal(program(-torch.ones(3, 8)), torch.zeros(3, 8))


def test_buffers_and_parameters_with_two_names() -> None:
    model, x = Shared(), torch.randn(3, 8)
    program = capture(model, torch.randn(2, 8))
    assert program.aliases == {"b.weight": "a.weight", "two": "one"}
    assert program.tensor("b.weight") is program.tensor("a.weight")
    assert torch.equal(program(x), model(x))


def test_inplace_takes_the_models_own_tensors() -> None:
    model = Plain()
    program = capture(model, torch.randn(2, 8), inplace=True)
    for name, parameter in model.named_parameters():
        assert program.tensor(name) is parameter


def test_frozen_parameters_stay_frozen() -> None:
    model = Plain()
    model.first.requires_grad_(False)
    program = capture(model, torch.randn(2, 8))
    assert {n: t.requires_grad for n, t in program.tensors().items()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


def test_dynamic_axes_are_those_asked_for() -> None:
    model = Plain().eval()
    free = capture(model, torch.randn(2, 6, 8), dynamic_axes={"x": (0, 1)})
    fixed = capture(model, torch.randn(2, 6, 8), dynamic_axes={})
    assert (free.dynamic_axes, fixed.dynamic_axes) == ({"x": (0, 1)}, {"x": ()})
    x = torch.randn(3, 5, 8)
    assert torch.equal(free(x), model(x))
    with pytest.raises(SparsepassError, match=r"'x' has shape \[2, 6, 8\], got \[3, 5, 8\]; capture the model again"):
        fixed(x)


def test_an_example_with_a_batch_of_one_fixes_the_batch_and_says_so() -> None:
    program = capture(Plain(), torch.randn(1, 8))
    assert program.dynamic_axes == {"x": ()}
    with pytest.raises(SparsepassError, match=r"\[1, 8\], got \[2, 8\].*at least 2 along each axis that varies"):
        program(torch.randn(2, 8))


class FixedLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions


def test_an_axis_that_the_model_fixes_is_not_called_dynamic() -> None:
    program = capture(FixedLength(), torch.randn(2, 6, 8))
    assert program.dynamic_axes == {"x": (0,)}
    with pytest.raises(SparsepassError, match=r"'x' has shape \[any, 6, 8\], got \[2, 1, 8\]"):
        program(torch.randn(2, 1, 8))  # it would broadcast in silence


def test_example_inputs_are_made_from_the_configuration() -> None:
    for name, keys in {
        "llama": ["input_ids", "attention_mask"],
        "vit": ["pixel_values"],
        "whisper": ["input_features", "decoder_input_ids"],
        "t5": ["input_ids", "attention_mask", "decoder_input_ids"],
    }.items():
        model = model_of(name)
        first, second = example_inputs_for(model), example_inputs_for(model)
        assert list(first) == keys
        assert all(torch.equal(first[key], second[key]) for key in keys)
        run(model, first)


def test_a_vision_model_that_names_no_image_size_gets_the_usual_one() -> None:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    with torch.device("meta"):
        model = hf.ResNetForImageClassification(config)
    assert example_inputs_for(model)["pixel_values"].shape == (2, 3, 224, 224)


def test_a_users_own_transformers_class_is_captured_but_not_built_again() -> None:
    model = tiny_llama(OwnLlama)
    program = capture(model)
    inputs = BY_NAME["llama"].inputs(3, 5)
    assert_bit_equal(run(program, inputs), run(model, inputs))
    assert program.origin.model_class is None
    with pytest.raises(CaptureError, match=r"code outside transformers.*use program\.hierarchy\(\)"):
        program.to_model()


def test_the_exporters_own_graph_becomes_a_program() -> None:
    model = Plain("dict").eval()
    exported = torch.export.export(model, (torch.randn(2, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    program = program_from_graph_module(exported.module(), {"x": torch.randn(2, 8)})
    x = torch.randn(4, 8)
    expected = model(x)
    assert all(torch.equal(a, b) for a, b in zip(program(x), (expected["y"], expected["h"]), strict=True))
    with pytest.raises(CaptureError, match=r"inputs \['x'\] need a tensor each"):
        program_from_graph_module(exported.module(), {})


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.linear(x)  # type: ignore[no-any-return]


def test_control_flow_on_values_is_refused_with_its_place() -> None:
    source = Path(__file__)
    line = next(i for i, text in enumerate(source.read_text().splitlines(), 1) if "the line that an error has" in text)
    with pytest.raises(
        CaptureError, match=rf"Branches cannot be captured \(at .*{source.name}, line {line}, in forward\)"
    ) as e:
        capture(Branches(), torch.randn(2, 8))
    assert "torch.where" in str(e.value)


def test_an_input_that_forward_does_not_take_is_named() -> None:
    with pytest.raises(CaptureError, match=r"Plain cannot be captured.*other"):
        capture(Plain(), {"x": torch.randn(2, 8), "other": torch.randn(2, 8)})


def test_a_failed_capture_leaves_mode_and_configuration() -> None:
    model = tiny_llama()
    model.train()
    with pytest.raises(CaptureError):
        capture(model, {"input_ids": torch.randn(2, 8)})  # ids that are no integers
    assert all(m.training for m in model.modules())
    assert model.config.use_cache is True


def test_autocast_inside_the_model_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"nested graph.*outside of torch\.autocast"):
        capture(Nested(), torch.randn(2, 8))


def test_a_model_wrapped_by_peft_is_refused() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(CaptureError, match=r"wrapped by PEFT: merge the adapter first \(model = model\.merge_and_unload"):
        capture(wrapped)
    with pytest.raises(CaptureError, match="wrapped by PEFT"):
        capture(wrapped.base_model.model)


class Quantized(Tensor):
    """Stands for the tensor subclasses of torchao and others."""


def test_tensors_that_are_not_plain_are_refused() -> None:
    model = Plain()
    model.first.weight = nn.Parameter(torch.randn(8, 8).as_subclass(Quantized))
    with pytest.raises(CaptureError, match=r"first\.weight is a Quantized.*already quantized, sparse or sharded"):
        capture(model, torch.randn(2, 8))
    model = Plain()
    model.first.weight = nn.Parameter(torch.eye(8).to_sparse())
    with pytest.raises(CaptureError, match=r"first\.weight is already a sparse tensor \(torch\.sparse_coo\)"):
        capture(model, torch.randn(2, 8))
    quantized = tiny_llama()
    quantized.is_quantized = True
    with pytest.raises(CaptureError, match="already quantized: prune the original"):
        capture(quantized)


def test_parts_without_values_are_refused() -> None:
    model = Plain()
    model.second.to("meta")
    with pytest.raises(CaptureError, match=r"2 tensors without values: second\.weight is on the meta device; load it with its"):
        capture(model, torch.randn(2, 8))


def test_a_lazy_model_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"weight has no shape yet: run the model once"):
        capture(nn.LazyLinear(4), torch.randn(2, 8))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "example_inputs is empty"),
        ((), "example_inputs is empty"),
        (torch.randn(0, 8), r"'x' is empty \(shape \(0, 8\)\)"),
        ({"x": torch.randn(2, 0)}, r"'x' is empty \(shape \(2, 0\)\)"),
        ({"x": [1.0, 2.0]}, r"'x' is a list \(\[1\.0, 2\.0\]\); a program's inputs are tensors"),
        ({"x": torch.randn(2, 8), "scale": True}, r"'scale' is a bool \(True\)"),
        (5, "not a int"),
        ([torch.randn(2, 8)] * 3, r"takes 2 arguments \(x, scale\), got 3"),
        (None, "Plain is no transformers model, so its inputs are not known"),
    ],
)
def test_example_inputs_that_cannot_be_are_refused(given: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(Plain(), given)


def test_an_axis_of_an_unknown_input_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"dynamic_axes names \['y'\], but the inputs are \['x'\]"):
        capture(Plain(), torch.randn(2, 8), dynamic_axes={"y": (0,)})


def test_a_program_or_something_else_is_no_model() -> None:
    with pytest.raises(CaptureError, match="this is a program already"):
        capture(captured("convnet"))
    with pytest.raises(CaptureError, match=r"expected an nn\.Module, got str; load the checkpoint first"):
        capture("model")  # type: ignore[arg-type]


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.return_types.max((x.sum(1), x.sum(1).long()))


class Counting(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x + 1, x.shape[0]


def test_an_output_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(CaptureError, match="returns a SymInt among its outputs, and a program returns tensors"):
        capture(Counting(), torch.randn(2, 8))


def test_an_output_of_an_unknown_class_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"the model returns a .*max.*wrap the model so that it returns tensors"):
        capture(Odd(), torch.randn(2, 8))


def test_an_outer_product_stays_in_float32_under_autocast() -> None:
    class Rotary(nn.Module):
        """As rotary embeddings of older transformers are: autocast is switched off where it is on, and not where it is not."""

        def forward(self, positions: Tensor) -> Tensor:
            frequencies = torch.tensor([1.0, 0.1])[None, :, None]
            with torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else contextlib.nullcontext():
                return (frequencies.expand(positions.shape[0], -1, 1) @ positions[:, None, :].float()).cos()

    positions = torch.arange(600).repeat(2, 1)
    model = Rotary()
    program = capture(model, positions[:, :8])
    expected = model(positions)
    assert torch.equal(program(positions), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(positions), expected)
        assert torch.equal(program(positions), expected)


def test_other_products_stay_what_they_are() -> None:
    class Products(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(1, 2) @ x + torch.ones(3, 2) @ x[:, :2, :3]

    program = capture(Products(), torch.randn(2, 2, 3), dynamic_axes={"x": (0, 1)})
    targets = [node.target for node in program.graph_module.graph.nodes]
    assert targets.count(torch.ops.aten.matmul.default) == 2
    x = torch.randn(2, 2, 3)
    assert torch.equal(program(x), Products()(x))


def test_exporters_of_older_transformers_are_called_their_way() -> None:
    class Older:
        def export(self, model: nn.Module, inputs: dict[str, Tensor], config: Any) -> Any:
            return model, inputs, config

    class Newer:
        def export_program(self, model: nn.Module, inputs: dict[str, Tensor], config: Any) -> Any:
            return (model, inputs, config), "metadata"

    model, inputs = nn.ReLU(), {"input": torch.ones(1)}
    for exporter in (Older(), Newer()):
        found = run_exporter(exporter, model, inputs, "settings")
        assert found == (model, inputs, "settings")
        assert found[1] is not inputs
