"""No zero is lost on the way into a folder of integers, by whichever way they were rounded. ONNX: `onnx/test_integers.py`."""

from pathlib import Path

import pytest
from tests.export.targets.packed.packing import NO_KERNELS
from tests.export.targets.zeros import METHODS, rounded

from sparsepass.export.targets import HuggingFace, LoweringContext, Packed, Target, state_of
from sparsepass.graph import SparsepassError

pytestmark = pytest.mark.filterwarnings(NO_KERNELS)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_integers_and_their_zeros_are_the_programs(name: str, method: str, bits: int, symmetric: bool, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    program = rounded(name, method, bits, symmetric)
    targets: tuple[Target, ...] = (HuggingFace(), Packed())
    for target in targets:
        folder = tmp_path / target.name
        folder.mkdir()
        if target.name == "packed" and not symmetric:
            with pytest.raises(SparsepassError, match="no zero points"):
                target.lower(program, folder, LoweringContext())
            continue
        checks = target.verify(program, folder, target.lower(program, folder, LoweringContext()), LoweringContext())
        assert state_of(checks) == "held", checks
        assert {"pattern", "weights"} <= {check.name for check in checks if check.held}
