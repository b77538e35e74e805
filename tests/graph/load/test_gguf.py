"""GGUF files: parts of one that was split, and what transformers makes of one."""

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tests.graph.load.test_load import write_gguf

from sparsepass.export.plan.model import load_for_plan
from sparsepass.graph import CaptureError, SparsepassError, capture
from sparsepass.graph.admission import is_dequantized
from sparsepass.graph.load import check_gguf, check_model, load_model

PARTS = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")


def write_part(path: Path, number: int, *, architecture: str | None) -> None:
    """The header of one part, as llama-gguf-split writes it: the first has the facts of the model, the others have not."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), architecture or "llama")
    if architecture is None:
        del writer.kv_data[0]["general.architecture"]
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", len(PARTS))
    writer.add_int32("split.tensors.count", 1)
    writer.add_tensor("token_embd.weight", torch.zeros(8, 16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("enter", [load_model, check_model, load_for_plan])
def test_one_part_of_a_file_that_was_split_is_refused_in_words(enter: Any, number: int, tmp_path: Path) -> None:
    path = tmp_path / PARTS[number]
    write_part(path, number, architecture=None if number else "llama")
    with pytest.raises(SparsepassError, match=rf"part {number + 1} of 2 .* --merge m-00001-of-00002.gguf whole"):
        enter(path)


@pytest.mark.parametrize("enter", [load_model, check_model, load_for_plan])
def test_a_folder_with_all_parts_is_refused_in_words(enter: Any, tmp_path: Path) -> None:
    for number, name in enumerate(PARTS):
        write_part(tmp_path / name, number, architecture=None if number else "llama")
    with pytest.raises(SparsepassError, match=r"part 1 of 2 .* put the parts together first"):
        enter(tmp_path)


def test_a_file_that_names_no_architecture_makes_no_default_model(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    del writer.kv_data[0]["general.architecture"]
    writer.add_name("nothing")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    for enter in (load_model, load_for_plan):
        with pytest.raises(SparsepassError, match="does not say of which architecture"):
            enter(tmp_path / "m.gguf")


def test_every_cut_of_a_header_is_refused_in_words(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    check_gguf(tmp_path / "whole.gguf", "whole")
    content = (tmp_path / "whole.gguf").read_bytes()
    for length in range(0, 600, 7):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(SparsepassError, match=r"cut\.gguf"):
            check_gguf(tmp_path / "cut.gguf", "cut")


def test_a_model_that_transformers_dequantized_is_taken(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    model: Any = hf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    model.is_quantized = True  # as the newest transformers says of it
    model.config.quantization_config = {"quant_method": "gguf"}
    program = capture(model)
    assert "quantization_config" not in (program.origin.config or {})
    ids = torch.arange(3, 8)[None].repeat(2, 1)
    with torch.no_grad():
        assert torch.equal(program.to_model()(input_ids=ids).logits, model(input_ids=ids).logits)
    assert load_model(model).kind == "memory"


def test_blocks_are_asked_to_be_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels for them are there, transformers would leave the weights in their blocks."""
    if not hasattr(hf, "GgufConfig"):
        pytest.skip("this version of transformers always unpacks")
    asked: list[Any] = []
    original = hf.LlamaForCausalLM.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:
        asked.append(options["quantization_config"])
        return original(cls, *args, **options)

    monkeypatch.setattr(hf.LlamaForCausalLM, "from_pretrained", classmethod(from_pretrained))
    write_gguf(tmp_path / "m.gguf")
    load_model(tmp_path / "m.gguf")
    assert [settings.dequantize for settings in asked] == [True]


@pytest.mark.parametrize(
    ("method", "dtype", "taken"),
    [
        ("gguf", torch.bfloat16, True),
        ("mxfp4", torch.bfloat16, True),
        ("fp8", torch.float8_e4m3fn, False),
        ("gptq", torch.float16, False),
    ],
)
def test_what_is_quantized_still_is_refused(method: str, dtype: torch.dtype, taken: bool) -> None:
    config = hf.LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model: Any = hf.LlamaForCausalLM(config)
    model.config.quantization_config, model.is_quantized = {"quant_method": method}, True
    model.lm_head.weight.data = model.lm_head.weight.data.to(dtype)
    assert is_dequantized(model) is taken
    if not taken:
        with pytest.raises(CaptureError, match="already quantized"):
            capture(model)
        with pytest.raises(SparsepassError, match="already quantized"):
            load_model(model)


@pytest.mark.parametrize("length", [2**62, 2**63, 2**64 - 1])
def test_a_header_that_points_beyond_any_file_is_refused_in_words(length: int, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    array = struct.pack("<IIQ", 9, 0, length)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + struct.pack("<Q", 1) + b"x" + array)
    with pytest.raises(SparsepassError, match="its header cannot be read"):
        check_gguf(path, "m")
