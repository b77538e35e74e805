"""Passes inside the real exporters of transformers."""

from pathlib import Path
from typing import Any

import onnx_ir
import onnxruntime
import pytest
import torch
import transformers
from tests.families import BY_NAME, captured
from torch import Tensor, nn

from sparsepass.export.pattern.check import check_pattern
from sparsepass.export.targets.exporter_quantizer import SparsePassQuantizer
from sparsepass.graph import PassError, Program, SparsepassError
from sparsepass.passes import apply_passes
from sparsepass.passes.maths.pattern import NMPattern, is_nm

pytest.importorskip("transformers.exporters.quantizers", reason="transformers before 5.20 has no such hook")
from transformers.exporters.configs import DynamoConfig, ExportFormat, OnnxConfig, OpenVINOConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.exporters.exporter_openvino import OpenVINOExporter

# torch 2.13 copies its own tree specs in a way that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")

PASSES = ["nm_sparsify", "slorb"]
TWO_FOUR = NMPattern.parse("2:4")


def exported(exporter: Any, config: Any, model: nn.Module, quantizer: SparsePassQuantizer) -> Any:
    inputs = BY_NAME["llama"].inputs(2, 8)
    shapes = {name: dict.fromkeys((0, 1), torch.export.Dim.AUTO) for name in inputs}
    return exporter().export(model, inputs, config(dynamic=True, dynamic_shapes=shapes, quantizer=quantizer)).program


def reference(name: str) -> Program:
    return apply_passes(captured(name), PASSES, inplace=True, validate=False)


@torch.no_grad()
def first_output(program: Any, name: str) -> Tensor:
    found = program(**BY_NAME[name].inputs(3, 6))
    return found["logits" if BY_NAME[name].generates else "last_hidden_state"]  # type: ignore[no-any-return]


def test_dynamo_export_runs_the_passes_and_leaves_the_model_alone() -> None:
    model = BY_NAME["llama"].model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    quantizer = SparsePassQuantizer(PASSES)
    program = exported(DynamoExporter, DynamoConfig, model, quantizer)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    torch.testing.assert_close(first_output(program.module(), "llama"), first_output(reference("llama"), "llama"))
    assert not [node for node in program.graph.nodes if "sparsepass" in str(node.target)]
    sparse = [name for name in program.state_dict if name.endswith("_proj.weight")]
    assert len(sparse) == 14
    assert all(is_nm(program.state_dict[name], TWO_FOUR) for name in sparse)
    (report,) = quantizer.reports
    assert report.num_sparse == 14
    assert [record.text.partition("{")[0] for record in report.history] == ["nm_sparsify", "slorb", "fold"]
    assert all(record.validation is not None for record in report.history)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_onnx_export_is_sparse_in_the_file_and_equal_in_onnxruntime(name: str, tmp_path: Path) -> None:
    quantizer = SparsePassQuantizer(PASSES)
    file = tmp_path / "model.onnx"
    onnx_ir.save(exported(OnnxExporter, OnnxConfig, BY_NAME[name].model(), quantizer), file)
    expected = reference(name)
    report = check_pattern(file, expected_sparse=list(expected.sparse))
    assert report.conforms, str(report)
    assert sum(entry.required for entry in report.entries) >= len(expected.sparse) == quantizer.reports[0].num_sparse
    feeds = {key: value.numpy() for key, value in BY_NAME[name].inputs(3, 6).items()}
    found = torch.from_numpy(onnxruntime.InferenceSession(file).run(None, feeds)[0])
    torch.testing.assert_close(found, first_output(expected, name), rtol=1e-4, atol=1e-5)


def test_openvino_export_is_sparse_and_equal() -> None:
    openvino = pytest.importorskip("openvino")
    model = exported(OpenVINOExporter, OpenVINOConfig, BY_NAME["llama"].model(), SparsePassQuantizer(PASSES))
    feeds = {key: value.numpy() for key, value in BY_NAME["llama"].inputs(3, 6).items()}
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled(feeds)["logits"])
    torch.testing.assert_close(found, first_output(reference("llama"), "llama"), rtol=1e-3, atol=1e-5)
    constants = [torch.from_numpy(op.data.copy()) for op in model.get_ops() if op.get_type_name() == "Constant"]
    weights = [t for t in constants if t.dim() == 2 and min(t.shape) >= 16 and t.shape[0] != 96]  # 96: the vocabulary
    assert len(weights) == 14
    assert all(is_nm(weight, TWO_FOUR) for weight in weights)


def for_generation(quantizer: SparsePassQuantizer, *, dynamic: bool, **settings: Any) -> list[Any]:
    """Weights of the prefill and the decode graph of a model of one layer."""
    family: Any = BY_NAME["llama"]
    config = transformers.LlamaConfig(**{**family.model().config.to_dict(), "num_hidden_layers": 1})
    model: Any = transformers.LlamaForCausalLM(config)
    exporter: Any = DynamoExporter
    generation: Any = transformers.GenerationConfig
    options = DynamoConfig(dynamic=dynamic, quantizer=quantizer)
    found = exporter().export_for_generation(
        model.eval(), family.inputs(2, 8), options, generation_config=generation(max_new_tokens=3, **settings)
    )
    assert list(found.components) == ["prefill", "decode"]
    return [component.program.state_dict for component in found.components.values()]


def test_prefill_and_decode_are_each_calibrated() -> None:
    samples = [BY_NAME["llama"].inputs(2, 8), BY_NAME["llama"].inputs(2, 12)]
    quantizer = SparsePassQuantizer("nm_sparsify{criterion=sparsegpt},slorb", calibration_dataset=samples)
    states = for_generation(quantizer, dynamic=True)
    assert [report.num_sparse for report in quantizer.reports] == [7, 7]
    for state in states:
        assert all(is_nm(t, TWO_FOUR) for key, t in state.items() if key.endswith("_proj.weight"))
    assert not torch.equal(*(state["model.layers.0.mlp.up_proj.weight"] for state in states))


def test_a_static_cache_is_written_and_so_not_measured() -> None:
    quantizer = SparsePassQuantizer(PASSES)
    states = for_generation(quantizer, dynamic=False, cache_implementation="static")
    assert [report.num_sparse for report in quantizer.reports] == [7, 7]
    assert all(record.validation is None for report in quantizer.reports for record in report.history)
    assert torch.equal(*(state["model.layers.0.mlp.up_proj.weight"] for state in states))


class Counting(nn.Module):
    """Writes into its input, as a model with a static cache does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        count.view(-1).add_(1)
        return torch.relu(self.linear(x)) * count


class Nested(nn.Module):
    """Takes a pair and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        hidden = torch.relu(self.linear(pair[0] + pair[1]))
        return {"hidden": hidden, "head": self.head(hidden)}


def quantized(model: nn.Module, quantizer: SparsePassQuantizer, **inputs: Any) -> Any:
    graph: Any = torch.export.export(model, (), kwargs=dict(inputs)).module()
    return quantizer.quantize(graph, inputs, ExportFormat.DYNAMO)


def test_a_graph_that_writes_into_its_inputs_is_not_calibrated() -> None:
    inputs = {"x": torch.randn(4, 16), "count": torch.zeros(1)}
    rewritten = quantized(Counting(), SparsePassQuantizer("nm_sparsify"), **inputs)
    assert is_nm(rewritten.linear.weight, TWO_FOUR)
    assert inputs["count"] == 0
    with pytest.raises(SparsepassError, match="static cache"):
        quantized(Counting(), SparsePassQuantizer("nm_sparsify{criterion=wanda}", calibration_dataset=[inputs]), **inputs)


def test_the_calling_convention_is_kept() -> None:
    model, pair = Nested(), (torch.randn(4, 16), torch.randn(4, 16))
    sample = {"pair": pair, "other": 1}  # what was not captured is left out, as transformers does
    quantizer = SparsePassQuantizer("nm_sparsify{criterion=wanda}", calibration_dataset=[sample])
    rewritten = quantized(model, quantizer, pair=pair)
    found = rewritten(pair=pair)
    assert list(found) == ["hidden", "head"]
    weight = rewritten.linear.weight
    assert is_nm(weight, TWO_FOUR)
    torch.testing.assert_close(found["hidden"], torch.relu((pair[0] + pair[1]) @ weight.T + model.linear.bias))
    assert torch.equal(rewritten.head.weight, model.head.weight)  # its result is an output, so it is left alone


def test_a_criterion_without_calibration_is_refused() -> None:
    with pytest.raises(SparsepassError, match=r"nm_sparsify needs calibration data.*calibration_dataset"):
        quantized(nn.Linear(16, 16), SparsePassQuantizer("nm_sparsify{criterion=wanda}"), input=torch.randn(2, 16))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"x": torch.randn(2, 16)}, r"lacks the inputs \['input'\]"),
        ({"input": (torch.randn(2, 16), torch.randn(2, 16))}, "holds 2 tensors where the exported model takes 1"),
    ],
)
def test_calibration_samples_of_another_structure_are_refused(sample: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsepassError, match=message):
        quantized(nn.Linear(16, 16), SparsePassQuantizer("nm_sparsify", calibration_dataset=[sample]), input=torch.randn(2, 16))


def test_a_wrong_pipeline_is_refused_before_anything_is_exported() -> None:
    with pytest.raises(SparsepassError, match="nm_sparsify"):
        SparsePassQuantizer(["nm_sparsfy"])
    with pytest.raises(PassError, match="slorb adds to sparse layers"):
        quantized(Nested(), SparsePassQuantizer("slorb"), pair=(torch.randn(4, 16), torch.randn(4, 16)))


def test_old_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsepass.export.targets.exporter_quantizer._HAS_HOOK", False)
    with pytest.raises(SparsepassError, match=r"need transformers 5\.20 or newer"):
        SparsePassQuantizer(PASSES)
