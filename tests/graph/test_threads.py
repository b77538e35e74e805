"""Two threads of one process that capture, prune or save at the same time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tests.families import BY_NAME

from sparsepass.graph import Program, capture
from sparsepass.passes import apply_passes


def test_two_threads_that_capture_and_prune_wait_for_each_other(tmp_path: Path) -> None:
    family = BY_NAME["gpt2"]
    models = [family.model() for _ in range(4)]
    inputs = family.inputs(2, 8)

    def work(number: int) -> torch.Tensor:
        captured = capture(models[number], inputs)
        program = apply_passes(captured, "nm_sparsify")
        program.hierarchy()
        program.to_model()
        program.save(tmp_path / str(number))
        return Program.load(tmp_path / str(number))(**inputs).logits  # type: ignore[no-any-return]

    with ThreadPoolExecutor(max_workers=4) as pool:
        found = list(pool.map(work, range(4)))
    assert all(torch.equal(logits, found[0]) for logits in found)
