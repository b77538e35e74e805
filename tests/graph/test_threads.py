"""Threads of one process that capture, prune, save and read at the same time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from sparsepass.graph import Program, capture
from sparsepass.passes import apply_passes


def test_threads_that_trace_wait_for_each_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval() for _ in range(4)]
    x = torch.randn(2, 8)

    def work(number: int) -> None:
        program = apply_passes(capture(models[number], x), "nm_sparsify")
        program.hierarchy()
        program.save(tmp_path / str(number))

    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(work, range(4)))
    for number, model in enumerate(models):
        alone = apply_passes(model, "nm_sparsify", example_inputs=x)
        assert torch.equal(Program.load(tmp_path / str(number))(x), alone(x))
