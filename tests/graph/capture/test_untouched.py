"""A model's whole state before and after it is captured."""

from typing import Any

import pytest
import torch
import transformers as hf
from tests.families import BY_NAME, FAMILIES
from torch import Tensor, nn

from sparsepass.graph import capture
from sparsepass.graph.support import CaptureError


def state(value: Any, seen: set[int] | None = None) -> Any:
    """Everything that can be reached from a module: kinds, identities and values."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        return type(value).__name__, id(value), value.requires_grad, value.detach().clone().tolist()
    if id(value) in seen or isinstance(value, str | int | float | type(None) | type | torch.dtype):
        return value if isinstance(value, str | int | float | type(None)) else str(value)
    seen.add(id(value))
    if isinstance(value, dict):
        return {str(key): state(item, seen) for key, item in value.items()}
    if isinstance(value, set):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [state(item, seen) for item in value]
    if isinstance(value, nn.Module) or type(value).__module__.startswith(("transformers.", "tests.", __name__)):
        return type(value).__name__, id(value), state(vars(value), seen)
    return type(value).__name__


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_capture_changes_nothing(name: str) -> None:
    family = BY_NAME[name]
    model = family.model()
    model.train()
    before = state(model)
    capture(model, family.inputs(2, 8))
    assert state(model) == before


class Note:
    """A user's own object beside a module."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []


class Careless(nn.Module):
    """Leaves traces wherever it can."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.note, self.calls, self.cached = nn.Linear(4, 4), Note(), 0, None
        self.tables: dict[str, list[Tensor]] = {"a": []}
        self.register_buffer("count", torch.zeros(()))
        self.plain = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        self.calls += 1
        self.cached = y.detach()  # type: ignore[assignment]
        self.fresh = y * 2
        self.linear.fresh = y
        self.note.seen.append(y)
        self.tables["a"].append(y)
        self.tables["b"] = [y]
        self.count += 1
        return y


def test_nothing_of_what_a_careless_model_leaves_stays() -> None:
    model = Careless()
    before = state(model)
    program = capture(model, torch.randn(2, 4))
    assert state(model) == before
    x = torch.randn(3, 4)
    assert torch.equal(program(x), model.linear(x))


def test_a_capture_that_fails_leaves_nothing_either() -> None:
    class Failing(Careless):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(x.sum())

    model = Failing()
    before = state(model)
    with pytest.raises(CaptureError):
        capture(model, torch.randn(2, 4))
    assert state(model) == before


def longrope() -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}
    config = hf.Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, original_max_position_embeddings=16, pad_token_id=0,
        rope_parameters={**rope, "original_max_position_embeddings": 16},
    )  # fmt: skip
    return hf.Phi3ForCausalLM(config).eval()


def test_rotary_frequencies_that_the_first_run_makes_are_real() -> None:
    model, twin = longrope(), longrope()
    ids = torch.randint(3, 64, (2, 40))
    with torch.no_grad():
        right = twin(ids, use_cache=False).logits
        program = capture(model)
        assert torch.equal(model(ids, use_cache=False).logits, right)
        torch.testing.assert_close(program(ids).logits, right)
    assert all(type(value) is Tensor for value in vars(model.model.rotary_emb).values() if isinstance(value, Tensor))


@pytest.mark.parametrize("wrap", ["compile", "compile in place", "compiled layer", "data parallel"])
def test_what_others_put_around_a_model_is_taken_off(wrap: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    x = torch.randn(3, 4)
    expected = plain(x)
    model: Any = plain
    if wrap == "compile":
        model = torch.compile(plain)
    elif wrap == "compile in place":
        plain.compile()
    elif wrap == "compiled layer":
        plain[1] = torch.compile(plain[1])  # type: ignore[assignment]
    else:
        model = nn.DataParallel(plain)
    inside = plain[1]
    program = capture(model, torch.randn(2, 4))
    assert torch.equal(program(x), expected)
    assert set(program.tensors()) == {"0.weight", "0.bias", "1.0.weight", "1.0.bias"}
    assert plain[1] is inside
    assert (plain._compiled_call_impl is not None) == (wrap == "compile in place")


def test_outputs_are_named_whatever_the_configuration_says() -> None:
    config = hf.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    config.return_dict = False
    model = hf.LlamaForCausalLM(config)
    assert capture(model).output_names == ("logits",)
    assert config.return_dict is False


def test_a_graph_is_not_printed_before_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(CaptureError, match="control flow"):
        capture(Branching(), torch.randn(2, 4))
    assert capfd.readouterr() == ("", "")
