"""A criterion is a function and a row of the table: pipelines, programs and the command line take it from there."""

from pathlib import Path

import pytest
import torch
from tests.layers import random
from torch import Tensor, nn

from sparsepass.export.stages import jobs_of
from sparsepass.graph import Program
from sparsepass.graph.program import masked_weight
from sparsepass.passes import apply_passes
from sparsepass.passes.criteria import CRITERIA
from sparsepass.passes.criteria.criterion import Criterion, CriterionOptions, Pruned, check_weight, keep_masked
from sparsepass.passes.maths import InputStatistics, NMPattern, nm_mask


def smallest(weight_OI: Tensor, statistics: InputStatistics | None, pattern: NMPattern, options: CriterionOptions) -> Pruned:
    """Keep what does least: the smallest weights, by the norms of their inputs."""
    assert statistics is not None
    check_weight(weight_OI)
    return keep_masked(weight_OI, nm_mask(-weight_OI.abs() * statistics.norms(), pattern))


def test_a_row_of_the_table_is_all_that_a_new_criterion_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Criterion(name="smallest", function=smallest, needs="norms", compensates=False, rows_are_independent=True)
    monkeypatch.setitem(CRITERIA, row.name, row)
    linear = nn.Linear(16, 8)
    x_BI = random(32, 16, dtype=torch.float32)
    model = nn.Sequential(linear, nn.ReLU(), nn.Linear(8, 4))
    program = apply_passes(model, "nm_sparsify{criterion=smallest}", calibration={"input": x_BI}, example_inputs=x_BI)
    program.save(tmp_path / "program")

    importance_OI = linear.weight.detach().abs() * x_BI.norm(dim=0)
    kept_OI = masked_weight(Program.load(tmp_path / "program"), "0.weight") != 0
    groups = importance_OI.unflatten(-1, (-1, 4))
    assert torch.equal(kept_OI, (groups <= groups.sort(-1).values[..., 1:2]).flatten(-2))
    assert torch.equal(masked_weight(program, "0.weight"), linear.weight * kept_OI)
    assert "criterion=smallest" in program.recipe
    assert "smallest" in [job.name for job in jobs_of()], "the table of `sparsepass criteria` has it, too"
