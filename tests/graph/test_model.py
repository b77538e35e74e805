"""to_model: from a program back to the model's own class."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.architectures.tiny import tiny_model
from tests.families import BY_NAME, FAMILIES, captured, tensors_of
from torch import nn

from sparsepass.graph import CaptureError, Program, capture
from sparsepass.graph.model import SLoRBLinear
from sparsepass.passes import SLoRB, apply_passes
from sparsepass.passes.maths.pattern import NMPattern, is_nm

HF_FAMILIES = [family.name for family in FAMILIES if family.name != "convnet"]
GENERATING = [family.name for family in FAMILIES if family.generates]
TWO_FOUR = NMPattern.parse("2:4")


def rewritten(name: str, *passes: Any) -> Program:
    return apply_passes(captured(name), passes, inplace=True, validate=False)


def outputs(model: nn.Module, name: str) -> list[torch.Tensor]:
    """What the program was captured with: a cache comes back from the model and not from the program."""
    inputs = BY_NAME[name].inputs(3, 6)
    with torch.no_grad():
        if isinstance(model, Program) or not BY_NAME[name].generates:
            return tensors_of(model(**inputs))
        return tensors_of(model(**inputs, use_cache=False))


@pytest.mark.parametrize("name", HF_FAMILIES)
def test_masks_are_folded_and_outputs_are_bit_equal(name: str) -> None:
    program = rewritten(name, "nm_sparsify")
    model = program.to_model()
    assert type(model) is type(BY_NAME[name].model())
    assert not model.training
    for found, expected in zip(outputs(model, name), outputs(program, name), strict=True):
        assert torch.equal(found, expected)
    parameters = dict(model.named_parameters())
    for weight, state in program.sparse.items():
        assert is_nm(parameters[weight], TWO_FOUR, state.axis)
        assert state.mask is not None
    assert not [name for name in model.state_dict() if "mask" in name]


@pytest.mark.parametrize("name", HF_FAMILIES)
def test_branches_are_attached(name: str) -> None:
    program = rewritten(name, "nm_sparsify", "slorb")
    with torch.no_grad():
        for state in program.sparse.values():
            if state.branch is not None:
                program.tensor(state.branch.weight).add_(0.05)
    model = program.to_model()
    for found, expected in zip(outputs(model, name), outputs(program, name), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    layers = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, SLoRBLinear)}
    assert layers == {weight for weight, state in program.sparse.items() if state.branch is not None}


@pytest.mark.parametrize("name", GENERATING)
def test_generation_of_an_unmodified_program_is_the_models(name: str) -> None:
    original: Any = BY_NAME[name].model()
    model: Any = captured(name).to_model()
    inputs = BY_NAME[name].inputs(2, 6)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **settings), original.generate(**inputs, **settings))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_with_branches_follows_the_programs_own_logits(name: str) -> None:
    program = rewritten(name, "nm_sparsify", "slorb")
    model: Any = program.to_model()
    ids = BY_NAME[name].inputs(1, 6)["input_ids"]
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=-1)
    expected = ids
    with torch.no_grad():
        for _ in range(5):
            following = program(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, following], dim=1)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "whisper", "vit"])
def test_a_saved_model_loads_as_it_was(name: str, tmp_path: Path) -> None:
    model: Any = rewritten(name, "nm_sparsify", "fold").to_model()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for found, expected in zip(outputs(loaded, name), outputs(model, name), strict=True):
        assert torch.equal(found, expected)
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "whisper", "t5"])
def test_ties_are_kept(name: str) -> None:
    def ties(model: nn.Module) -> set[frozenset[str]]:
        groups: dict[int, set[str]] = {}
        for key, tensor in model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(tensor), set()).add(key)
        return {frozenset(group) for group in groups.values() if len(group) > 1}

    expected = ties(BY_NAME[name].model())
    assert expected
    assert ties(rewritten(name, "nm_sparsify").to_model()) == expected


def test_the_model_has_tensors_of_its_own() -> None:
    program = rewritten("llama", "nm_sparsify", "slorb")
    before = {name: t.clone() for name, t in program.tensors().items()}
    model = program.to_model()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    assert all(torch.equal(before[name], t) for name, t in program.tensors().items())


def test_the_model_trains() -> None:
    model = rewritten("llama", "nm_sparsify", SLoRB(k=8, projection="trainable")).to_model()
    inputs = BY_NAME["llama"].inputs(2, 6)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_dtype_and_settings_come_along() -> None:
    original: Any = BY_NAME["llama"].model().to(torch.bfloat16)
    original.generation_config.max_new_tokens = 3
    model: Any = capture(original).to_model()
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.generation_config.max_new_tokens == 3
    inputs = BY_NAME["llama"].inputs(2, 6)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, original(**inputs).logits)
    assert torch.get_default_dtype() == torch.float32


def test_a_plain_module_says_what_to_do_instead() -> None:
    with pytest.raises(CaptureError, match=r"plain nn.Module.*program.hierarchy\(\)"):
        captured("convnet").to_model()


@pytest.mark.skipif(not hasattr(transformers, "SarvamMoEConfig"), reason="transformers is older than the model")
def test_a_class_that_several_types_share_keeps_the_type_of_its_configuration(tmp_path: Path) -> None:
    """The names of stored weights go by the type: SarvamMoE's are not those of Glm4Moe, whose class it has."""
    model: Any = tiny_model("sarvam_moe")
    program = apply_passes(model, ["nm_sparsify{criterion=magnitude}"], validate=False)
    program.save(tmp_path / "program")
    again: Any = Program.load(tmp_path / "program").to_model()
    assert type(again) is type(model)
    assert again.config.model_type == "sarvam_moe"
    assert again.config.to_dict() == model.config.to_dict()
