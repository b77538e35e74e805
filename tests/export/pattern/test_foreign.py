"""Files that others write: torch's two exporters, onnxruntime's quantizers and its two optimizers, on tiny models.

Each file is made twice: from a model that is 2:4 (every weight has to be found and to conform) and from the same model
with one projection left dense (exactly that one has to be found amiss).
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import transformers as hf

from sparsepass.export.pattern import PatternReport, check_pattern

ONE = "encoder.layer.1.intermediate.dense"
# q, k, v and o, up and down, of two layers.
NUM_WEIGHTS = 12

pytestmark = pytest.mark.filterwarnings("ignore")


class Wrapped(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def bert(dense: str = "") -> torch.nn.Module:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    config._attn_implementation = "eager"
    model = hf.BertModel(config, add_pooling_layer=False).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != dense:
            groups = module.weight.data.reshape(module.out_features, -1, 4)
            groups.scatter_(-1, groups.abs().argsort(-1)[..., :2], 0.0)
    return Wrapped(model)


@pytest.fixture(scope="module", params=["dynamo", "legacy"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of one exporter: "sparse", and "amiss" with one dense projection."""
    folder = tmp_path_factory.mktemp(request.param)
    ids = torch.randint(0, 64, (2, 8))
    paths = {}
    for name, dense in (("sparse", ""), ("amiss", ONE)):
        paths[name] = folder / f"{name}.onnx"
        options: dict[str, Any] = {"input_names": ["input_ids", "attention_mask"], "output_names": ["y"]}
        if request.param == "legacy":
            options["dynamic_axes"] = {"input_ids": {0: "b", 1: "t"}, "attention_mask": {0: "b", 1: "t"}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                bert(dense),
                (ids, torch.ones_like(ids)),
                str(paths[name]),
                dynamo=request.param == "dynamo",
                verbose=False,
                **options,
            )
    return paths


def as_it_is(source: Path, folder: Path) -> Path:
    return source


def dynamic_int8(kind: str, per_channel: bool) -> Callable[[Path, Path], Path]:
    def make(source: Path, folder: Path) -> Path:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        made = folder / "int8.onnx"
        quantize_dynamic(str(source), str(made), weight_type=getattr(QuantType, kind), per_channel=per_channel)
        return made

    return make


def static_qdq(source: Path, folder: Path) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            ids = torch.randint(0, 64, (2, 8)).numpy()
            self.left = [{"input_ids": ids, "attention_mask": ids * 0 + 1}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    made = folder / "qdq.onnx"
    options = {"weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True}
    quantize_static(str(source), str(made), Reader(), quant_format=QuantFormat.QDQ, **options)
    return made


def blockwise(form: str, symmetric: bool, bits: int = 4) -> Callable[[Path, Path], Path]:
    def make(source: Path, folder: Path) -> Path:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
        from onnxruntime.quantization.quant_utils import QuantFormat

        quantizer = MatMulNBitsQuantizer(
            onnx.load(str(source)), bits=bits, block_size=16, is_symmetric=symmetric, quant_format=getattr(QuantFormat, form)
        )
        quantizer.process()
        made = folder / "nbits.onnx"
        quantizer.model.save_model_to_file(str(made), False)
        return made

    return make


def bnb4(source: Path, folder: Path) -> Path:
    from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer

    quantizer = MatMulBnb4Quantizer(onnx.load(str(source)), 1, 16)  # NF4
    quantizer.process()
    made = folder / "bnb4.onnx"
    onnx.save(quantizer.model.model, made)
    return made


def session(level: str) -> Callable[[Path, Path], Path]:
    def make(source: Path, folder: Path) -> Path:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        # Beside its source: what is stored outside of the file stays in the source's data file.
        made = source.with_name(f"{source.stem}_{level}.onnx")
        options.optimized_model_filepath = str(made)
        options.log_severity_level = 4
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        return made

    return make


def fusing(source: Path, folder: Path) -> Path:
    from onnxruntime.transformers import optimizer

    made = optimizer.optimize_model(str(source), "bert", num_heads=4, hidden_size=32, opt_level=0)
    made.save_model_to_file(str(folder / "fused.onnx"))
    return folder / "fused.onnx"


MAKERS: dict[str, Callable[[Path, Path], Path]] = {
    "as exported": as_it_is,
    "dynamic int8": dynamic_int8("QInt8", False),
    "dynamic int8 per channel": dynamic_int8("QInt8", True),
    "dynamic uint8": dynamic_int8("QUInt8", False),
    "dynamic uint8 per channel": dynamic_int8("QUInt8", True),
    "static QDQ": static_qdq,
    "MatMulNBits": blockwise("QOperator", True),
    "MatMulNBits with zero points": blockwise("QOperator", False),
    "MatMulNBits of 8 bits": blockwise("QOperator", True, 8),
    "blockwise DequantizeLinear": blockwise("QDQ", True),
    "blockwise DequantizeLinear with zero points": blockwise("QDQ", False),
    "MatMulBnb4": bnb4,
    "session, basic": session("BASIC"),
    "session, extended": session("EXTENDED"),
    "session, all": session("ALL"),
    "transformer fusions": fusing,
}


def kinds(path: Path) -> set[str]:
    return {f"{node.domain}::{node.op_type}" for node in onnx.load(str(path), load_external_data=False).graph.node}


def covered(report: PatternReport) -> int:
    """Projections of the model that the report accounts for: fused attention holds three in one."""
    return sum(3 if entry.op in ("Attention", "QAttention") else 1 for entry in report.entries if entry.required)


@pytest.mark.parametrize("maker", list(MAKERS))
def test_weights_of_files_that_others_write(maker: str, exported: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "sparse").mkdir()
    (tmp_path / "amiss").mkdir()
    good = MAKERS[maker](exported["sparse"], tmp_path / "sparse")
    report = check_pattern(good)
    assert covered(report) == NUM_WEIGHTS, str(report)
    assert report.conforms, f"{report}\n{sorted(kinds(good))}"

    bad = check_pattern(MAKERS[maker](exported["amiss"], tmp_path / "amiss"))
    assert covered(bad) == NUM_WEIGHTS
    assert [entry.verdict for entry in bad.failures] == ["violates"], str(bad)
    assert bad.failures[0].num_groups == 64 * 32 // 4


def test_the_makers_make_what_they_are_named_for(exported: dict[str, Path], tmp_path: Path) -> None:
    """Otherwise the test above would test plain MatMuls over and over."""
    expected = {
        "dynamic int8": "::MatMulInteger",
        "static QDQ": "::DequantizeLinear",
        "MatMulNBits": "com.microsoft::MatMulNBits",
        "blockwise DequantizeLinear": "::DequantizeLinear",
        "MatMulBnb4": "com.microsoft::MatMulBnb4",
        "session, extended": "com.microsoft::FusedMatMul",
        "transformer fusions": "com.microsoft::SkipLayerNormalization",
    }
    for maker, op in expected.items():
        folder = tmp_path / maker.replace(" ", "_")
        folder.mkdir()
        assert op in kinds(MAKERS[maker](exported["sparse"], folder)), maker


def test_fused_attention_is_made_and_checked(tmp_path: Path, exported: dict[str, Path]) -> None:
    found = check_pattern(fusing(exported["sparse"], tmp_path))
    fused = [entry for entry in found.entries if entry.op == "Attention"]
    if "com.microsoft::Attention" in kinds(tmp_path / "fused.onnx"):
        assert [(entry.verdict, entry.shape, entry.axis) for entry in fused] == [("conforms", (32, 96), 0)] * 2
    else:
        assert not fused


class Vision(torch.nn.Module):
    """A patch embedding, a pointwise and a grouped convolution, and a transposed one; then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = torch.nn.Conv2d(4, 16, 4, stride=4)
        self.grouped = torch.nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.pointwise = torch.nn.Conv2d(16, 8, 1)
        self.up = torch.nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = torch.nn.Linear(8, 12)
        for module in (self.patch, self.grouped, self.pointwise):
            groups = module.weight.data.movedim(1, -1).reshape(*module.weight.shape[:1], *module.weight.shape[2:], -1, 4)
            groups.scatter_(-1, groups.abs().argsort(-1)[..., :2], 0.0)
            moved = groups.reshape(module.weight.shape[0], *module.weight.shape[2:], -1)
            module.weight.data = moved.movedim(-1, 1).contiguous()

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.up(self.pointwise(self.grouped(self.patch(x)).relu())).mean((2, 3)))


@pytest.mark.parametrize("level", ["", "EXTENDED", "ALL"])
def test_convolutions_and_their_fused_forms(level: str, tmp_path: Path) -> None:
    """At the last level onnxruntime reorders convolution weights for one processor: not checkable, and never passed over."""
    path = tmp_path / "vision.onnx"
    torch.manual_seed(0)
    torch.onnx.export(Vision().eval(), (torch.randn(1, 4, 32, 32),), str(path), dynamo=True, verbose=False)
    if level:
        path = session(level)(path, tmp_path)
    report = check_pattern(path)
    convolutions = [entry for entry in report.entries if "Conv" in entry.op and entry.op != "ConvTranspose"]
    assert len(convolutions) == 3
    reordered = {f"com.microsoft.nchwc::{op}" for op in ("Conv",)} & kinds(path)
    for entry in convolutions:
        assert entry.verdict == "conforms" or (reordered and "blocks made for one processor" in entry.reason), str(report)
    assert [entry.verdict for entry in report.entries if entry.op == "ConvTranspose"] == ["not checkable"]
    assert [entry.verdict for entry in report.failures if entry.shape == (8, 12) or entry.shape == (12, 8)] == ["violates"]
