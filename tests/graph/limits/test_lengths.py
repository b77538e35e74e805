"""Limits of input sizes: found in a trace, kept as text, refused in words, and dropped where the model agrees beyond them."""

import copy
import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from sparsepass.graph import Program, SparsepassError, capture
from sparsepass.graph.capture.exporter import program_from_graph_module
from sparsepass.graph.limits.sizes import holds, limits_of
from sparsepass.graph.support import CaptureError, ProgramFormatError


class Asking(nn.Module):
    """A layer that asks how long its input is."""

    def __init__(self, question: Any) -> None:
        super().__init__()
        self.linear, self.question = nn.Linear(4, 4), question

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * 2 if self.question(x) else y  # type: ignore[no-any-return]


QUESTIONS: dict[str, tuple[Any, str]] = {
    "longer": (lambda x: x.shape[1] > 8, "1 to 8"),
    "shorter": (lambda x: x.shape[1] < 6, "6 to 255"),
    "between": (lambda x: not 5 <= x.shape[1] <= 11, "5 to 11"),
    "odd": (lambda x: x.shape[1] % 2 == 1, "2, 4, 6, 8, ..."),
    "one length": (lambda x: x.shape[1] == 13, "1 to 12, 14 to 255"),
    "one token": (lambda x: x.shape[1] == 1, "2 to 255"),
    "one row": (lambda x: x.shape[0] == 1, "2 to 255"),
    "more rows": (lambda x: x.shape[0] > 3, "1 to 3"),
}


def refuses(program: nn.Module, x: Tensor) -> bool:
    try:
        program(x)
    except SparsepassError:
        return True
    return False


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_program_is_right_or_refuses(name: str, tmp_path: Path) -> None:
    question, allowed = QUESTIONS[name]
    torch.manual_seed(0)
    model = Asking(question).eval()
    program = capture(model, torch.randn(2, 8, 4))
    program.save(tmp_path / "program")
    again = [program, Program.load(tmp_path / "program"), copy.deepcopy(program), pickle.loads(pickle.dumps(program))]
    said = set()
    for batch in (1, 2, 3, 4, 5):
        for length in range(1, 30):
            x = torch.randn(batch, length, 4)
            for each in again:
                try:
                    assert torch.equal(each(x), model(x)), (batch, length)
                except SparsepassError as refusal:
                    said.add(str(refusal))
    assert any(f"the graph holds for {allowed} there" in words for words in said)
    beyond = next(size for size in ((2, 13), (2, 1), (2, 9), (4, 8), (1, 8)) if refuses(program, torch.randn(*size, 4)))
    assert refuses(program.hierarchy(), torch.randn(*beyond, 4))
    assert torch.equal(program(torch.ones(2, 8, 4)), model(torch.ones(2, 8, 4)))


def test_a_question_without_effect_is_no_limit() -> None:
    class Chunks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            whole = x[:, : x.shape[1] // 4 * 4]
            return torch.cat([whole.reshape(x.shape[0], -1, 4, x.shape[2]).flatten(1, 2), x[:, whole.shape[1] :]], 1)

    program = capture(Chunks(), torch.randn(2, 10, 4))
    for length in (5, 8, 11, 16, 40):
        x = torch.randn(2, length, 4)
        assert torch.equal(program(x), x)
    assert all("x[1]" in limit and "!=" not in limit for limit in program.limits), program.limits


def test_somebody_elses_graph_keeps_its_limits() -> None:
    model = Asking(lambda x: x.shape[1] > 8)
    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    exported = torch.export.export(model, (torch.randn(2, 8, 4),), dynamic_shapes=shapes, strict=False)
    program = program_from_graph_module(exported.module(), {"x": torch.randn(2, 8, 4)})
    assert "x[1] <= 8" in program.limits
    with pytest.raises(SparsepassError, match=r"'x' has size 9 along axis 1, and the graph holds for 1 to 8"):
        program(torch.randn(2, 9, 4))


def test_masks_are_as_long_as_their_tokens() -> None:
    config = hf.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    program = capture(hf.LlamaForCausalLM(config))
    with pytest.raises(SparsepassError, match=r"size 5 along axis 1 and 'input_ids' has size 4 along axis 1"):
        program(torch.ones(2, 4, dtype=torch.long), torch.ones(2, 5, dtype=torch.long))


def test_an_example_of_ours_grows_past_a_window() -> None:
    settings: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = hf.DogeForCausalLM(hf.DogeConfig(**settings, **heads, keep_window_size=8)).eval()
    program = capture(model)
    assert program.example_inputs["input_ids"].shape == (2, 37)
    for length in (5, 9, 37, 60):
        ids = torch.randint(3, 64, (2, length))
        if length < 9:
            with pytest.raises(SparsepassError, match="holds for 9 to"):
                program(ids)
        else:
            torch.testing.assert_close(program(ids).logits, model(ids).logits)


class Fixed(nn.Module):
    """Another batch gives another result when it is traced: a constant of the example stays in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if torch.compiler.is_compiling() else x


def test_a_model_that_behaves_otherwise_when_traced_is_refused() -> None:
    with pytest.raises(CaptureError, match="differs from Fixed on its own example inputs"):
        capture(Fixed(), torch.randn(2, 8))


def test_a_model_that_draws_random_numbers_is_captured() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    assert capture(Noise(), torch.randn(2, 8)).limits == ()


@pytest.mark.parametrize(
    "text", ["__import__('os')", "x", "x[0]", "x.y[0] <= 1", "(lambda: 1)() == 1", "x[y[0]] == 1", "x[0] = 1", "max(*x) == 1"]
)
def test_limits_are_read_and_never_executed(text: str) -> None:
    if text == "x[0]":
        assert holds(text, {"x": (1,)})
        return
    with pytest.raises(ProgramFormatError, match="no condition on the sizes"):
        holds(text, {"x": (1, 2), "y": (0,)})


def test_a_graph_of_fixed_sizes_has_none() -> None:
    exported = torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),))
    assert limits_of(node for node in exported.graph.nodes if node.op == "placeholder") == ()


class Chunks(nn.Module):
    """Adds another number where there is more than one chunk of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) + (0 if (x.shape[1] + 63) // 64 == 1 else 1)


def test_what_changes_beyond_the_positions_of_a_model_is_noticed_if_it_runs_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.import_module("sparsepass.graph.capture.faithful"), "position_limit", lambda config: 64)
    model = Chunks().eval()
    program = capture(model, torch.randn(2, 8, 4))
    assert torch.equal(program(x := torch.randn(2, 64, 4)), model(x))
    with pytest.raises(ValueError, match="the graph holds for 1 to 64"):
        program(torch.randn(2, 65, 4))


class FilledChunks(nn.Module):
    """Works on chunks of 16 tokens one after the other, the last of which is filled up."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        filled = nn.functional.pad(x, (0, 0, 0, (16 - x.shape[1] % 16) % 16))
        state, found = torch.zeros_like(x[:, 0]), []
        for chunk in range(filled.shape[1] // 16):
            state = state + self.linear(filled[:, 16 * chunk : 16 * chunk + 16]).sum(1)
            found.append(state[:, None].expand(-1, 16, -1))
        return torch.cat(found, 1)[:, : x.shape[1]]


def test_one_chunk_is_a_range() -> None:
    program = capture(FilledChunks(), torch.randn(2, 8, 4))
    assert program.limits == ("x[1] <= 16",)
    with pytest.raises(SparsepassError, match=r"holds for 1 to 16 there \(x\[1\] <= 16\)"):
        program(torch.randn(2, 17, 4))


def test_of_a_model_that_works_in_chunks_the_shortest_example_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("sparsepass.graph.capture.exporter")  # the room's face has a function of that name
    monkeypatch.setattr(module, "example_inputs_for", lambda model, tokens: torch.randn(2, tokens, 4))
    program = capture(FilledChunks())
    assert (program.example_inputs["x"].shape, program.limits) == ((2, 8, 4), ("x[1] <= 16",))
