"""Families through ONNX: the file computes what the program computes, and says 2:4 where a runtime looks for it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tests.families import BY_NAME

from sparsepass.export.targets.onnx import OnnxArtifact, generate_greedy, lower_onnx, verify_onnx
from sparsepass.graph.program import Program
from sparsepass.passes import apply_passes

# Each is exported once, masks and SLoRB on it.
EVERY = tuple(BY_NAME)
PLAIN = ("bert", "vit", "convnet")


@dataclass(frozen=True, kw_only=True)
class Exported:
    program: Program
    folder: Path
    artifact: OnnxArtifact
    found: dict[str, Any]


Exporter = Callable[[str], Exported]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    done: dict[str, Exported] = {}

    def export(name: str) -> Exported:
        if name not in done:
            family = BY_NAME[name]
            passes = ["nm_sparsify", "slorb{k=8}"] if name != "convnet" else ["nm_sparsify"]
            program = apply_passes(family.model(), passes, example_inputs=family.inputs(2, 8), validate=False)
            folder = tmp_path_factory.mktemp(name)
            artifact = lower_onnx(program, folder)
            done[name] = Exported(
                program=program, folder=folder, artifact=artifact, found=verify_onnx(program, folder, artifact)
            )
        return done[name]

    return export


def only_graph(one: Exported) -> ir.Graph:
    return ir.load(one.folder / "model.onnx").graph


@pytest.mark.parametrize("name", EVERY)
def test_outputs_weights_and_pattern_are_kept(exported: Exporter, name: str) -> None:
    one = exported(name)
    assert one.found["holds"], json.dumps(one.found, indent=1)
    sparse = one.program.sparse
    assert sparse
    stored = {name: {(s.file, s.initializer) for s in found} for name, found in one.artifact.weights.items()}
    expected = {(file, name) for file, names in one.artifact.expected_sparse.items() for name in names}
    assert expected == set().union(*(stored[name] for name in sparse))
    assert all(found["num_negative_zeros"] == 0 for found in one.found["pattern"].values())
    if any(state.branch for state in sparse.values()):
        assert any(name.endswith("slorb_weight") for name in stored)


@pytest.mark.parametrize("name", EVERY)
def test_every_weight_stands_right_at_its_product(exported: Exporter, name: str) -> None:
    one = exported(name)
    for weight in one.program.sparse:
        for stored in one.artifact.weights[weight]:
            assert stored.op in ("MatMul", "Gemm", "Conv"), stored
    for graph in one.artifact.graphs:
        model = ir.load(one.folder / graph.file)
        initializers = set(model.graph.initializers)
        behind = {v.name for n in model.graph if n.op_type in ("Transpose", "Split") for v in n.inputs[:1] if v is not None}
        tied = set(one.program.origin.output_heads) | set(one.program.aliases.values())
        assert behind & initializers <= tied


@pytest.mark.parametrize("name", EVERY)
def test_axes_have_names(exported: Exporter, name: str) -> None:
    for graph in exported(name).artifact.graphs:
        axes = {axis for value in (*graph.inputs, *graph.outputs) for axis in value.axes if isinstance(axis, str)}
        known = {"batch", "sequence", "past_sequence", "total_sequence", "encoder_sequence", "height", "width"}
        assert axes <= known, axes


def test_a_decoder_is_one_graph_with_the_usual_names(exported: Exporter) -> None:
    one = exported("llama")
    (graph,) = one.artifact.graphs
    assert one.artifact.kind == "decoder-with-past"
    assert [(v.name, v.axes) for v in graph.inputs[:4]] == [
        ("input_ids", ("batch", "sequence")),
        ("attention_mask", ("batch", "total_sequence")),
        ("position_ids", ("batch", "sequence")),
        ("past_key_values.0.key", ("batch", 2, "past_sequence", 8)),
    ]
    assert [(v.name, v.axes) for v in graph.outputs[:2]] == [
        ("logits", ("batch", "sequence", 96)),
        ("present.0.key", ("batch", 2, "total_sequence", 8)),
    ]
    assert len(graph.inputs) == 3 + 4


def test_an_encoder_decoder_computes_its_cross_attention_keys_once(exported: Exporter) -> None:
    one = exported("whisper")
    assert one.artifact.kind == "encoder-decoder-with-past"
    encoder, decoder = one.artifact.graph("encoder"), one.artifact.graph("decoder")
    assert {"present.0.encoder.key", "last_hidden_state"} <= {v.name for v in encoder.outputs}
    assert {"past_key_values.0.encoder.key", "past_key_values.0.decoder.key"} <= {v.name for v in decoder.inputs}
    cross = "model.decoder.layers.0.encoder_attn.k_proj.weight"
    assert {s.file for s in one.artifact.weights[cross]} == {encoder.file}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_weights_are_stored_once_and_under_their_names(exported: Exporter, name: str) -> None:
    one = exported(name)
    sizes = {n: v.const_value.nbytes for n, v in only_graph(one).initializers.items() if v.const_value is not None}
    ours = {s.initializer for found in one.artifact.weights.values() for s in found}
    assert sum(sizes[n] for n in ours) == sum(one.program.tensor(n).nbytes for n in one.artifact.weights)
    assert ours == set(one.artifact.weights)
    assert sum(size for n, size in sizes.items() if n not in ours) < 4096, "a weight has been folded into a constant"


def test_experts_are_matrices_of_their_own(exported: Exporter) -> None:
    one = exported("mixtral")
    stored = one.artifact.weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert [(s.initializer, s.shape, s.op, s.axis) for s in stored] == [
        (f"model.layers.0.mlp.experts.gate_up_proj.{expert}", (32, 128), "MatMul", 0) for expert in range(4)
    ]
    # Counted by comparing: TensorRT-RTX has no scattering that adds.
    assert not [node for node in only_graph(one) if node.op_type == "ScatterElements" and "reduction" in node.attributes]


def test_siblings_share_one_segment_sum(exported: Exporter) -> None:
    graph = only_graph(exported("llama"))
    sums = [n for n in graph if n.op_type == "ReduceSum" and n.inputs[0] is not None and n.inputs[0].producer() is not None]
    segments = [n for n in sums if n.inputs[0].producer().op_type == "Reshape"]  # type: ignore[union-attr]
    assert len(segments) == 2 * 4  # of each layer: q, k and v; o; gate and up; down
    assert sorted(len(n.outputs[0].uses()) for n in segments) == [1, 1, 1, 1, 2, 2, 3, 3]


def test_the_tied_head_is_not_stored_twice(exported: Exporter) -> None:
    one = exported("llama")
    assert [s.op for s in one.artifact.weights["model.embed_tokens.weight"]] == ["Gather"]
    assert "lm_head.weight" not in only_graph(one).initializers


def test_no_trace_of_the_machine_is_left(exported: Exporter) -> None:
    data = (exported("bert").folder / "model.onnx").read_bytes()
    assert b".py" not in data
    assert ir.load(exported("bert").folder / "model.onnx").metadata_props["sparsepass.recipe"].startswith("nm_sparsify")


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mistral", "opt"])
def test_generates_what_the_model_generates(exported: Exporter, name: str) -> None:
    """Beyond the sliding window of 8, too, and with a padded prompt in the batch."""
    one = exported(name)
    ids = BY_NAME[name].inputs(3, 7)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    ids[1, :3] = 0
    expected = generated(one.program, 12, input_ids=ids, attention_mask=mask)
    got = generate_greedy(one.folder, ids, 12, attention_mask=mask)
    assert np.array_equal(got.tokens, expected)
    assert got.margins.shape == (3, 12)
    assert bool((got.margins >= 0).all())


@pytest.mark.parametrize("name", ["whisper", "t5"])
def test_encoder_decoders_generate_what_the_model_generates(exported: Exporter, name: str) -> None:
    one = exported(name)
    inputs = BY_NAME[name].inputs(2, 7)
    start = inputs.pop("decoder_input_ids")[:, :1]
    expected = generated(one.program, 12, **inputs, decoder_input_ids=start)
    assert np.array_equal(generate_greedy(one.folder, start, 12, encoder_inputs=inputs).tokens, expected)


def generated(program: Program, num_tokens: int, **inputs: torch.Tensor) -> Any:
    model: Any = program.to_model()
    settings = model.generation_config
    settings.eos_token_id, settings.suppress_tokens, settings.begin_suppress_tokens = None, None, None
    settings.max_length, settings.max_new_tokens, settings.do_sample, settings.num_beams = None, num_tokens, False, 1
    return model.generate(**inputs, generation_config=settings)[:, -num_tokens:].numpy()  # some return the prompt, too


def test_the_record_survives_json(exported: Exporter) -> None:
    artifact = exported("whisper").artifact
    assert OnnxArtifact.from_dict(json.loads(json.dumps(artifact.to_dict()))) == artifact
    assert artifact.size_bytes == sum(f.stat().st_size for f in exported("whisper").folder.iterdir())
