"""`plan` for this machine's processor: what is measured, what packed layers gain by bytes, and what they do not."""

from pathlib import Path

import pytest
from tests.export.plan.configs import TINY, saved_config

from sparsepass import Program, SparsepassError
from sparsepass.export.plan import forecast, processor
from sparsepass.export.plan.devices import DEVICES, RUNTIMES, Device, runtime_for
from sparsepass.export.plan.forecast import plan
from sparsepass.export.plan.model import load_for_plan
from sparsepass.graph import native

# 20 GB/s and 0.2e12 operations a second.
LAPTOP = Device(
    name="cpu", title="a laptop, 2 threads", architecture="processor", compute_capability="", half_tflops=0.2, int8_tops=0.2,
    fp8_tflops=None, bandwidth_gb_s=20, memory_gb=16, source="made up",
)  # fmt: skip
PACKED = RUNTIMES["packed"]


@pytest.fixture(autouse=True)
def _laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "this_processor", lambda: LAPTOP)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Program:
    wide = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    return load_for_plan(saved_config(tmp_path_factory.mktemp("llama"), "llama", TINY | wide, "LlamaForCausalLM"))


def test_decoding_by_hand(llama: Program) -> None:
    found = plan(llama, gpu="CPU", seqs=(64,), new_tokens=16)
    decode = found.points[0].decode
    assert decode is not None
    assert found.runtime is PACKED
    sizes = [(2048, 2048), (2048, 256), (2048, 256), (2048, 2048), (2048, 5632), (2048, 5632), (5632, 2048)]
    weights, moved = 2 * sum(a * b for a, b in sizes) * 2, 2 * sum(a + b for a, b in sizes) * 2
    assert decode.sparse_layers_s == pytest.approx((weights + moved) / 20e9)
    assert decode.planned_layers_s == pytest.approx((weights * 9 / 16 + moved) / 20e9)
    assert decode.head_s == pytest.approx((2048 * 320 + 2048 + 320) * 2 / 20e9)  # dense
    assert [item.layer.site.name for item in found.layers if item.decision == "dense"] == ["lm_head"]


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 16 / 9), ("fp16", 16 / 9), ("int8", 8 / 5), ("int4", 4.125 / 3.125)])
def test_each_type_gains_by_its_bytes(llama: Program, dtype: str, bound: float) -> None:
    decode = plan(llama, gpu="cpu", dtype=dtype, seqs=(64,)).points[0].decode
    assert decode is not None
    assert decode.sparse_layers_s / decode.planned_layers_s == pytest.approx(bound, rel=2e-3)


def test_prefill_gains_nothing(llama: Program) -> None:
    point = plan(llama, gpu="cpu", seqs=(17, 256)).points
    assert [each.prefill.speedup for each in point] == [1.0, 1.0]
    assert point[0].decode is not None
    assert point[0].decode.speedup > 1.5


def test_more_sequences_than_the_kernel_takes_gain_nothing(llama: Program) -> None:
    found = plan(llama, gpu="cpu", batches=(1, 16, 17), seqs=(64,))
    gains = [each.decode.speedup for each in found.points if each.decode is not None]
    assert gains[0] > 1.5
    assert gains[2] == 1.0
    assert {last for item in found.layers for _, last in item.pays_at} <= set(range(1, 17))


def test_what_is_said(llama: Program) -> None:
    found = plan(llama, gpu="cpu", seqs=(64,))
    notes = " ".join(found.notes)
    for words in (
        "measured here",
        "limits by bytes",
        "up to 16 tokens",
        "prefill takes as long",
        "embedding=int8",
        "files are as large",
    ):
        assert words in notes
    assert [row.dtype for row in found.memory] == ["bf16", "int8", "int4"]
    assert found.to_dict()["device"]["source"] == "made up"


def test_layers_are_those_of_the_target() -> None:
    """Codes of 8 columns fill a byte, and rows are any number."""
    assert PACKED.refusal(576, 7, "int4") is None
    assert "in_features 36 is not a multiple of 8" in str(PACKED.refusal(36, 64, "bf16"))
    assert not PACKED.takes_experts
    assert not PACKED.takes_convolutions


@pytest.mark.parametrize(
    ("gpu", "runtime", "message"),
    [
        ("cpu", "tensorrt-llm", "runtime tensorrt-llm does not run on a laptop, 2 threads; expected packed there"),
        ("a100", "packed", "runtime packed does not run on A100 80GB SXM; expected ideal, tensorrt-llm, torch there"),
    ],
)
def test_a_runtime_on_the_wrong_device(llama: Program, gpu: str, runtime: str, message: str) -> None:
    with pytest.raises(SparsepassError, match=message):
        plan(llama, gpu=gpu, runtime=runtime)


def test_types_that_packed_layers_lack(llama: Program) -> None:
    with pytest.raises(SparsepassError, match="packed layers on the processor have no fp8; take dtype=bf16"):
        plan(llama, gpu="cpu", dtype="fp8")


def test_without_a_runtime_each_device_has_its_own() -> None:
    assert (runtime_for(LAPTOP, None).name, runtime_for(DEVICES["h100"], None).name) == ("packed", "tensorrt-llm")


@pytest.mark.parametrize("with_library", [True, False])
def test_the_measurement(with_library: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(processor, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(processor, "_MATMUL", (8, 64, 64))
    if not with_library:
        monkeypatch.setattr(processor, "find_kernels", lambda: SparsepassError(f"{tmp_path} is missing"))
    found = processor.this_processor.__wrapped__()
    assert found.name == "cpu"
    assert found.title.startswith(native.processor())
    assert 0.01 < found.bandwidth_gb_s < 10000
    assert 0 < found.half_tflops == found.int8_tops < 1000
    assert found.memory_gb > 0.1
