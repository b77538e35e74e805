"""Engines, profiles and options: what is built, over which lengths, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from sparsepass.export.targets.onnx.artifact import OnnxArtifact, OnnxGraph, OnnxValue
from sparsepass.export.targets.tensorrt.options import parse_sm
from sparsepass.export.targets.tensorrt.profiles import Profile, plan_engines, shapes
from sparsepass.export.targets.tensorrt.target import TensorRT
from sparsepass.graph import SparsepassError


def graph(role: Any, file: str, **inputs: tuple[str | int, ...]) -> OnnxGraph:
    values = tuple(OnnxValue(name=name, dtype="int64", axes=axes) for name, axes in inputs.items())
    return OnnxGraph(file=file, role=role, inputs=values, outputs=(), num_nodes=1)


def artifact(kind: Any, *graphs: OnnxGraph) -> OnnxArtifact:
    return OnnxArtifact(kind=kind, dtype="float16", opset=20, files={}, graphs=graphs, weights={}, expected_sparse={})


DECODER = artifact(
    "decoder-with-past",
    graph(
        "model",
        "model.onnx",
        input_ids=("batch", "sequence"),
        attention_mask=("batch", "total_sequence"),
        past=("batch", 2, "past_sequence", 8),
    ),
)
ENCODER = artifact("forward", graph("model", "model.onnx", input_ids=("batch", "sequence")))
IMAGES = artifact("forward", graph("model", "model.onnx", images=("batch", 3, "height", "width")))
TWO = artifact(
    "encoder-decoder-with-past",
    graph("encoder", "encoder_model.onnx", input_ids=("batch", "encoder_sequence")),
    graph("decoder", "decoder_model.onnx", input_ids=("batch", "sequence"), past=("batch", "past_sequence")),
)
CONFIG = {"max_position_embeddings": 256}


def test_a_decoder_is_prefill_and_decode() -> None:
    prefill, decode = plan_engines(DECODER, TensorRT(), config=CONFIG)
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert shapes(prefill.graph, prefill.profiles[0]).shapes == {
        "input_ids": ((1, 1), (1, 64), (8, 256)),
        "attention_mask": ((1, 1), (1, 64), (8, 256)),
        "past": ((1, 2, 0, 8), (1, 2, 0, 8), (8, 2, 0, 8)),
    }
    assert shapes(decode.graph, decode.profiles[0]).shapes == {
        "input_ids": ((1, 1), (1, 1), (8, 1)),
        "attention_mask": ((1, 2), (1, 129), (8, 256)),
        "past": ((1, 2, 1, 8), (1, 2, 128, 8), (8, 2, 255, 8)),
    }


def test_or_one_engine_with_two_profiles() -> None:
    (plan,) = plan_engines(DECODER, TensorRT(one_engine=True), config=CONFIG)
    assert (plan.name, [profile.name for profile in plan.profiles]) == ("model", ["prefill", "decode"])


def test_an_encoder_is_one_engine() -> None:
    (plan,) = plan_engines(ENCODER, TensorRT(), config=CONFIG)
    assert (plan.name, dict(plan.profiles[0].ranges)) == ("model", {"batch": (1, 1, 8), "sequence": (1, 64, 256)})


def test_an_encoder_decoder_is_three() -> None:
    plans = plan_engines(TWO, TensorRT(), config={})
    assert [plan.name for plan in plans] == ["encoder", "prefill", "decode"]
    assert plans[0].profiles[0].ranges["encoder_sequence"] == (1, 512, 2048)
    together = plan_engines(TWO, TensorRT(one_engine=True), config={})
    assert [plan.name for plan in together] == ["encoder", "decoder"]


def test_lengths_from_the_command_line_go_first() -> None:
    options = TensorRT(profiles=("batch=4,sequence=1:32:128", "decode.past_sequence=16:64:512"))
    prefill, decode = plan_engines(DECODER, options, config=CONFIG)
    assert prefill.profiles[0].ranges == {"batch": (4, 4, 4), "sequence": (1, 32, 128), "past_sequence": (0, 0, 0)}
    assert decode.profiles[0].ranges["past_sequence"] == (16, 64, 512)


def test_an_axis_that_nothing_bounds_takes_the_example_or_is_asked_for() -> None:
    (plan,) = plan_engines(IMAGES, TensorRT(), examples={"images": (2, 3, 224, 160)})
    assert plan.profiles[0].ranges == {"batch": (1, 1, 8), "height": (224, 224, 224), "width": (160, 160, 160)}
    with pytest.raises(SparsepassError, match="give --profile height=MIN:COMMON:MAX"):
        plan_engines(IMAGES, TensorRT())
    (plan,) = plan_engines(IMAGES, TensorRT(profiles=("height=32:64:128", "width=64")))
    assert plan.profiles[0].ranges["height"] == (32, 64, 128)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("decoder.batch=1", "names the engine 'decoder', and there are prefill, decode"),
        ("tokens=1:2:3", "names the axis 'tokens', and those that vary are batch, past_sequence, sequence"),
    ],
)
def test_lengths_for_what_is_not_there_are_refused(text: str, said: str) -> None:
    with pytest.raises(SparsepassError, match=said):
        plan_engines(DECODER, TensorRT(profiles=(text,)), config=CONFIG)


@pytest.mark.parametrize("text", ["batch", "batch=", "batch=1:2", "batch=a:b:c", "batch=1:2:3:4", "a.b.c=1"])
def test_lengths_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(SparsepassError, match="cannot be read; expected AXIS=N or AXIS=MIN:COMMON:MAX"):
        TensorRT(profiles=(text,))
    with pytest.raises(SparsepassError, match="MIN <= COMMON <= MAX"):
        TensorRT(profiles=("batch=4:2:8",))


def test_an_axis_may_be_a_sum() -> None:
    value = graph("model", "m", mask=("batch", "sequence + past_sequence"))
    profile = Profile(name="model", ranges={"batch": (1, 1, 1), "sequence": (1, 2, 3), "past_sequence": (0, 4, 5)})
    assert shapes(value, profile).shapes == {"mask": ((1, 1), (1, 6), (1, 8))}


@pytest.mark.parametrize(("text", "family"), [("75", "SM75 \\(Turing\\)"), ("80,sm_61", "SM61 \\(Pascal\\)"), ("7.0", "SM70")])
def test_targets_below_ampere_are_refused_by_name(text: str, family: str) -> None:
    with pytest.raises(SparsepassError, match=f"{family}.*need Ampere \\(SM80\\) or newer"):
        parse_sm(text)


def test_targets() -> None:
    assert parse_sm("80, sm_86,8.9,120,80,10.0") == (80, 86, 89, 120, 100)
    with pytest.raises(SparsepassError, match="'ampere' is no compute capability"):
        parse_sm("ampere")


@pytest.mark.parametrize(
    ("changes", "said"), [({"runtime": "trt"}, "unknown runtime 'trt'"), ({"timeout_s": 0}, "positive number of seconds")]
)
def test_other_options_that_cannot_be_used(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SparsepassError, match=said):
        TensorRT(**changes)


def test_the_command_line_sets_what_was_given() -> None:
    from sparsepass.export.cli.export import chosen_target

    nothing: dict[str, Any] = dict.fromkeys(("runtime", "sm", "profiles", "timeout_s", "timing_cache"))
    nothing |= dict.fromkeys(("hardware_compatible", "one_engine", "sparse", "measure"), False)
    assert chosen_target("tensorrt", nothing) == TensorRT()
    found = chosen_target("tensorrt{one_engine=true}", nothing | {"sm": "86", "timing_cache": "cache", "sparse": True})
    assert found == TensorRT(sm=(86,), timing_cache=Path("cache"), one_engine=True, sparse=False)


def test_profiles_end_where_the_program_does() -> None:
    limits = ("input_ids[1] <= 30", "input_ids[1] % 4 == 0", "input_ids[0] >= 2", "input_ids[1] == mask[1]")
    (plan,) = plan_engines(ENCODER, TensorRT(), config=CONFIG, limits=limits)
    assert dict(plan.profiles[0].ranges) == {"batch": (2, 2, 8), "sequence": (4, 28, 28)}
    (plan,) = plan_engines(ENCODER, TensorRT(profiles=("sequence=4:8:16",)), config=CONFIG, limits=limits)
    assert plan.profiles[0].ranges["sequence"] == (4, 8, 16)
    said = r"lengths 1:32:64 of the axis 'sequence' are beyond .* \(input_ids\[1\] <= 30, input_ids\[1\] % 4 == 0"
    with pytest.raises(SparsepassError, match=said):
        plan_engines(ENCODER, TensorRT(profiles=("sequence=1:32:64",)), config=CONFIG, limits=limits)
    with pytest.raises(SparsepassError, match="beyond those for which the graph holds"):
        plan_engines(ENCODER, TensorRT(), config=CONFIG, limits=("input_ids[1] >= 300",))
    # The limits of a plain program are not those of a graph with a cache.
    assert plan_engines(DECODER, TensorRT(), config=CONFIG, limits=limits) == plan_engines(DECODER, TensorRT(), config=CONFIG)
