from pathlib import Path

import pytest
import torch
import transformers as hf
from tests.families import BY_NAME

from sparsepass.graph import Program, SparsepassError, capture
from sparsepass.graph.integers import integers_of
from sparsepass.graph.load import load_model
from sparsepass.graph.rounding import Rounded
from sparsepass.graph.widening import widened
from sparsepass.passes import apply_passes


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_computes_what_the_model_does_in_the_wider_type(name: str, dtype: torch.dtype) -> None:
    model = BY_NAME[name].model().to(dtype)
    program = apply_passes(model, "nm_sparsify,slorb{k=16}")
    wanted = program.to_model().float()
    found = widened(program, torch.float32)
    assert {p.dtype for p in found.graph_module.parameters()} == {torch.float32}
    with torch.no_grad():
        expected = wanted(**found.example_inputs).logits
        torch.testing.assert_close(found(**found.example_inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert found.to_model().dtype == torch.float32


def test_a_saved_program_is_read_in_float32_and_saved_so(tmp_path: Path) -> None:
    model = BY_NAME["llama"].model().bfloat16()
    apply_passes(model, "nm_sparsify").save(tmp_path / "half")
    loaded = load_model(tmp_path / "half", dtype="float32").program
    assert loaded is not None
    loaded.save(tmp_path / "whole")
    again = Program.load(tmp_path / "whole")
    assert again.origin.config is not None
    assert again.origin.config["dtype"] == "float32"
    inputs = loaded.example_inputs
    assert torch.equal(again(**inputs).logits, loaded(**inputs).logits)
    assert again.report().num_sparse == loaded.report().num_sparse


def test_only_wider_types_are_taken() -> None:
    program = capture(
        hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    )
    assert widened(program, torch.float32) is program
    with pytest.raises(SparsepassError, match="wider one, and torch\\.bfloat16 was asked for"):
        widened(program, torch.bfloat16)


def assert_same(now: Rounded | None, expected: Rounded | None) -> None:
    assert now is not None
    assert expected is not None
    assert torch.equal(now.numbers_OI, expected.numbers_OI)
    assert torch.equal(now.scales_OG, expected.scales_OG)


def test_integers_and_scales_stay_as_they_are(tmp_path: Path) -> None:
    program = apply_passes(BY_NAME["llama"].model().bfloat16(), "nm_sparsify,quantize{group_size=16},quantize_embedding")
    before = {name: integers_of(program, name) for name in program.quantized}
    program.save(tmp_path / "half")
    found = load_model(tmp_path / "half", dtype="float32").program
    assert found is not None
    for name, expected in before.items():
        assert_same(integers_of(found, name), expected)
    with torch.no_grad():  # in bfloat16 a value on the grid is rounded once more
        torch.testing.assert_close(
            found(**found.example_inputs).logits, program(**program.example_inputs).logits.float(), rtol=5e-2, atol=5e-2
        )


def test_casts_of_a_quantized_program_keep_its_integers() -> None:
    """`Program.float()` has nothing to do; `graph_module.float()`, below it, leaves scales that hold what they held."""
    program = apply_passes(BY_NAME["llama"].model(), "nm_sparsify,quantize{group_size=16}", validate=False)
    before = {name: integers_of(program, name) for name in program.quantized}
    with torch.no_grad():
        wanted = program(**program.example_inputs).logits

    def check() -> None:
        with torch.no_grad():
            assert torch.equal(program(**program.example_inputs).logits, wanted)
        for name, expected in before.items():
            assert_same(integers_of(program, name), expected)

    scales = [state.scales for state in program.quantized.values()]
    program.float()
    assert {program.tensor(name).dtype for name in scales} == {torch.bfloat16}
    check()
    program.graph_module.float()
    assert {program.tensor(name).dtype for name in scales} == {torch.float32}
    check()
    with pytest.raises(SparsepassError, match=r"keeps the dtype it was captured with \(torch.float32, "):
        program.half()
    program.graph_module.half()
    with pytest.raises(ValueError, match="cast the model to float16 before it is quantized, not after"):
        program(**program.example_inputs)
