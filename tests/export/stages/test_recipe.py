"""Recipes: checked as a whole before anything runs; those that come along parse, and each trains a tiny model for two steps."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.export.tiny import WORDS, save_tiny_llama
from tests.retrain.runs import exports_once

from sparsepass.export.report.document import read_report
from sparsepass.export.stages.measuring import MeasureSection
from sparsepass.export.stages.recipe import PruneSection, RetrainSection, read_recipe, read_retrain_section, recipe_of
from sparsepass.export.stages.retraining import retrain_program
from sparsepass.export.stages.run import stages_of
from sparsepass.export.stages.settings import BenchSettings, Calibration, ModelSource
from sparsepass.export.stages.yaml_settings import example_text, override, parse_settings, read_recipe_text, recipe_names
from sparsepass.graph import SparsepassError
from sparsepass.passes import Reconstruct, parse_pipeline
from sparsepass.retrain.config import RetrainConfig
from sparsepass.retrain.data import DataConfig
from sparsepass.retrain.teacher.sample import SampleConfig

PAPER = ("gpt2-paper", "opt-paper", "llama2-7b-paper")
# What a tiny model and a tiny text cannot have as the recipe has it. All else is run as it stands.
STEP = {"max_steps": 1}
SMALL: dict[str, Any] = {"max_steps": 2, "max_tokens": None, "batch_size": 4, "micro_batch_size": 2, "compile": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("recipes")
    save_tiny_llama(place / "tiny")
    (place / "words.txt").write_text(WORDS * 60)
    with exports_once():
        yield place


def plain(**changes: Any) -> dict[str, Any]:
    """A recipe of plain values that is right, with changes."""
    train = {"max_steps": 2, "batch_size": 4}
    settings = {
        "model": "some/model",
        "out": "out",
        "prune": {"passes": "nm_sparsify"},
        "retrain": {"train": train, "data": {"source": "python-docs"}},
        "eval": {"text": "python-docs"},
        "export": {"target": "onnx"},
    }
    return settings | changes


def sampling(beside: str | None = None, **sample: Any) -> dict[str, Any]:
    """A change of a recipe: its teacher writes text."""
    train, data = plain()["retrain"]["train"], {"source": "python-docs", "beside": beside}
    return {"retrain": {"train": train, "data": data, "sample": sample or None}}


def pruning(passes: str, target: str) -> dict[str, Any]:
    """A change of a recipe: it only prunes, and exports."""
    return {"prune": {"passes": passes}, "retrain": None, "export": {"target": target}}


def measuring(**bench: Any) -> dict[str, Any]:
    """A change of a recipe: it exports packed, and times that."""
    return {"export": {"target": "packed"}, "measure": {"bench": bench}}


def test_the_recipes_that_come_along() -> None:
    others = {"smollm2-cpu", "smollm2-gpu", "smollm2-maskllm-cpu", "smollm2-maskllm-gpu", "smollm2-small"}
    assert set(recipe_names()) == {*PAPER, *others}


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_reads_and_knows_its_stages(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.retrain is not None
    assert [stage.name for stage in stages_of(recipe)][:3] == ["prune", "retrain", "eval"]
    assert "accelerate launch" in read_recipe_text(name) or name not in PAPER


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_trains_a_tiny_model(name: str, place: Path, tmp_path: Path) -> None:
    from sparsepass.export.stages.preparing import prepare, write_program

    recipe = read_recipe(name)
    assert recipe.prune is not None
    assert recipe.retrain is not None
    calibration = Calibration(
        data=str(place / "words.txt") if recipe.prune.calibration.data else None, num_sequences=4, context=16
    )
    model = ModelSource(source=str(place / "tiny"), dtype=recipe.dtype)
    prepared = prepare(model, passes=recipe.prune.passes, calibration=calibration, validate=False)
    write_program(prepared, tmp_path / "pruned")
    data = dataclasses.replace(recipe.retrain.data, source=str(place / "words.txt"), validation=4, context=16)
    train = dataclasses.replace(recipe.retrain.train, **SMALL)
    sample = recipe.retrain.sample and dataclasses.replace(recipe.retrain.sample, num_tokens=512, length=16, start="the")
    section = dataclasses.replace(recipe.retrain, train=train, data=data, sample=sample)
    report = retrain_program(tmp_path / "pruned", section, tmp_path / "out", progress=False)
    (found,) = report["retraining"]["runs"]
    assert found["num_steps"] == 2
    kept = dataclasses.asdict(recipe.retrain.train.resolve("cpu"))  # auto is recorded as what it was
    assert {k: v for k, v in found["settings"].items() if k not in SMALL} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in kept.items() if k not in SMALL
    }
    assert read_report(tmp_path / "out") == report


def test_the_cpu_recipe_counts_what_reconstruct_trains_on() -> None:
    recipe = read_recipe("smollm2-cpu")
    assert recipe.prune is not None
    assert recipe.prune.calibration.context is not None
    assert recipe.retrain is not None
    (before,) = [one for one in parse_pipeline(recipe.prune.passes) if isinstance(one, Reconstruct)]
    assert (
        before.steps * before.batch_size * recipe.prune.calibration.context + (recipe.retrain.train.max_tokens or 0) == 400_000
    )


@pytest.mark.parametrize(
    ("name", "num_sequences", "context", "steps", "lr", "floor", "warmup", "decay", "decay_steps", "weight_decay", "kd"),
    [
        ("gpt2-paper", 128, 1024, 40_000, 2e-4, 2e-5, 2000, 1e-4, 10_000, 0.1, 0.67),
        ("opt-paper", 128, 1024, 40_000, 2e-4, 2e-5, 2000, 1e-4, 10_000, 0.1, 0.67),
        ("llama2-7b-paper", 128, 4096, 15_000, 2e-5, 2e-6, 500, 6e-5, 3000, 0.0, 1 / 3),
    ],
)
def test_the_papers_settings(
    name: str,
    num_sequences: int,
    context: int,
    steps: int,
    lr: float,
    floor: float,
    warmup: float,
    decay: float,
    decay_steps: float,
    weight_decay: float,
    kd: float,
) -> None:
    """The table of AST, arXiv 2407.20584."""
    recipe = read_recipe(name)
    assert recipe.retrain is not None
    train = recipe.retrain.train
    assert recipe.retrain.data.context == context
    assert (train.batch_size, train.num_steps(context), train.lr, train.min_lr) == (num_sequences, steps, lr, floor)
    assert (train.warmup, train.decay, train.decay_warmup, train.weight_decay) == (warmup, decay, decay_steps, weight_decay)
    assert (train.betas, train.eps, train.clip_grad_norm, train.mask_interval) == ((0.9, 0.95), 1e-8, 1.0, 10)
    assert (train.method, train.temperature, train.behind) == ("ast", 2.0, "original")
    assert train.kd_weight == pytest.approx(kd, abs=1e-3)
    assert train.batch_size % (8 * (train.micro_batch_size or 1)) == 0, "8 GPUs share a step"
    assert recipe.prune is not None
    assert recipe.prune.passes == "nm_sparsify{criterion=magnitude}"


def test_the_example_is_a_recipe() -> None:
    recipe = recipe_of(parse_settings(example_text(), "the example"), "the example")
    assert [stage.name for stage in stages_of(recipe)] == [
        "prune",
        "retrain",
        "eval",
        "export.onnx",
        "export.packed",
        "measure",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modle": "x"}, "did you mean 'model'"),
        ({"model": None}, "model is missing"),
        ({"out": ""}, "out is missing"),
        ({"model": {"source": "x", "revison": "y"}}, "did you mean 'revision'"),
        ({"prune": {"pases": "nm_sparsify"}}, "did you mean 'passes'"),
        ({"prune": {"passes": "nm_sparsfy"}}, "prune.passes: "),
        ({"prune": {"passes": "nm_sparsify{pattern=0:4}"}}, "0:4"),
        ({"prune": {"calibration": "nowhere.txt"}}, "prune.calibration file nowhere.txt does not exist"),
        (
            {"prune": {"calibration": ["python-docs.txt", "nowhere.txt"]}},
            "prune.calibration file python-docs.txt does not exist",
        ),
        ({"prune": {"num_sequences": "many"}}, "num_sequences"),
        ({"retrain": {"trian": {}}}, "did you mean 'train'"),
        ({"retrain": {"train": {"max_steps": 1, "lrr": 1}, "data": {"source": "python-docs"}}}, "did you mean 'lr'"),
        ({"retrain": {"train": {"max_steps": 1}, "data": {"sorce": "python-docs"}}}, "did you mean 'source'"),
        ({"retrain": {"train": {"max_steps": 1}, "data": {}}}, "there is no source"),
        (
            {"retrain": {"train": {"learning_rate": 1}, "data": {}}},
            "as transformers' Trainer calls it; here it is lr",
        ),
        ({"retrain": {"train": {"warmup_ratio": 0.1}, "data": {}}}, "here it is warmup"),
        ({"retrain": {"train": {"max_steps": 1}, "data": {"source": "a.txt"}}}, "file a.txt does not exist"),
        ({"retrain": {"train": {}, "data": {"source": "python-docs"}}}, "give max_steps or max_tokens"),
        (
            {"prune": {"passes": "nm_sparsify,quantize"}, "retrain": {"train": STEP, "data": {"source": "python-docs"}}},
            "set train.quantize: true",
        ),
        (
            {"retrain": {"train": STEP | {"quantize": True}, "data": {"source": "python-docs"}}},
            "apply the pass quantize first",
        ),
        (sampling(num_tokns=64), "did you mean 'num_tokens'"),
        (sampling(length=16), "num_tokens"),
        (sampling(num_tokens=1), "num_tokens has to be at least 2"),
        (sampling(num_tokens=64, temperature=0.0), "temperature has to be above 0"),
        (sampling(beside="python-docs", num_tokens=64), "leave one out"),
        (sampling(beside="nowhere.txt"), "data.beside file nowhere.txt does not exist"),
        ({"retrain": {"train": 3, "data": {"source": "python-docs"}}}, "settings of the form"),
        ({"retrain": {"train": {"max_steps": 1}, "data": {"source": "python-docs"}, "teacher_dtype": "int9"}}, "int9"),
        ({"eval": {"text": "nowhere.txt"}}, "nowhere.txt does not exist"),
        ({"export": {"target": "onxx"}}, "did you mean 'onnx'"),
        ({"export": [{"target": "hf"}, {"target": "hf"}]}, "twice"),
        ({"export": {"target": "hf", "opset": 18}}, "has no option opset"),
        (pruning("nm_sparsify,quantize{symmetric=false}", "packed"), "export: packed layers have no zero points"),
        (pruning("nm_sparsify,slorb,quantize", "hf"), "export: the target hf keeps SLoRB branches as an adapter"),
        (pruning("nm_sparsify,quantize{bits=8}", "tensorrt"), "8 bits have one scale a row"),
        ({"export": {"target": "tensorrt", "engine": {"runtme": "x"}}}, "did you mean 'runtime'"),
        ({"measure": {}}, "r.yaml: measure: the target packed is not exported (onnx is); add it to export"),
        ({"measure": {"target": "onnx"}}, "the target onnx writes none; set bench: null"),
        ({"measure": {"target": "onnx", "bench": None, "size": False}}, "neither bench nor size is wanted"),
        ({"measure": {"target": "onnx"}, "export": []}, "is not exported (nothing is)"),
        ({"measure": {"targt": "onnx"}}, "did you mean 'target'"),
        (measuring(batchs=[1]), "did you mean 'batches'"),
        (measuring(batches=[0]), "batches of a benchmark is 0; expected at least 1"),
        (measuring(repeats="many"), "repeats"),
        ({"measure": {"bench": 3}, "export": {"target": "packed"}}, "settings of the form"),
        ({"measure": {"dtype": "int9"}, "export": {"target": "packed"}}, "int9"),
        (
            {
                "prune": {"passes": "nm_sparsify,quantize"},
                "retrain": None,
                "export": {"target": "hf"},
                "measure": {"target": "hf"},
            },
            "writes none of integers",
        ),
        (
            {"model": {"source": "some/model", "revision": "v1"}, **measuring()},
            "counted from a configuration of the hub's default",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(changes: dict[str, Any], said: str) -> None:
    recipe_of(plain(), "r.yaml")
    with pytest.raises(SparsepassError) as error:
        recipe_of(plain(**changes), "r.yaml")
    assert said in str(error.value)


def test_the_dense_model_that_is_measured(place: Path, tmp_path: Path) -> None:
    """By default the recipe's, as it is stored and not as it is trained; a saved program is none."""
    from sparsepass.export.stages.preparing import prepare, write_program

    measured = {"export": {"target": "packed"}, "measure": {"bench": {"batches": [1, 2]}, "size": False}}
    recipe = recipe_of(plain(model={"source": "some/model", "revision": "v1"}, **measured), "r.yaml")
    assert recipe.measure is not None
    assert recipe.measure.bench == BenchSettings(batches=(1, 2))
    assert recipe.dtype == "float32"
    assert recipe.measure.dense(recipe.model) == ModelSource(source="some/model", revision="v1")
    write_program(prepare(str(place / "tiny"), passes="nm_sparsify", validate=False), tmp_path / "program")
    saved = plain(model=str(tmp_path / "program"), **measuring())
    del saved["prune"]
    with pytest.raises(SparsepassError, match="name the dense model that it is compared with"):
        recipe_of(saved, "r.yaml")
    saved["measure"] = {"against": "other/model", "dtype": "bfloat16"}
    named = recipe_of(saved, "r.yaml").measure
    assert named is not None
    assert named.dense(recipe.model) == ModelSource(source="other/model", dtype="bfloat16")


def test_prune_alone_has_its_defaults_and_without_it_the_model_has_to_be_a_program(place: Path, tmp_path: Path) -> None:
    assert recipe_of(plain(prune=None), "r.yaml").prune == PruneSection()
    settings = plain(model=str(place / "tiny"))
    del settings["prune"]
    with pytest.raises(SparsepassError, match="is no saved program"):
        recipe_of(settings, "r.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [", "r.yaml, line 1"),
        ("a: 1\na: 2\n", "line 2: 'a' is given twice"),
        ("- a\n", "of the form `name: value`"),
        ("", "of the form `name: value`"),
    ],
)
def test_what_is_no_recipe_is_said(text: str, said: str) -> None:
    with pytest.raises(SparsepassError, match=r"r\.yaml") as error:
        parse_settings(text, "r.yaml")
    assert said in str(error.value)


def test_single_values_are_set_over_a_file() -> None:
    found = override(plain(), ["retrain.train.lr=1.0e-3", "export=[{target: hf}, {target: onnx}]", "prune.calibration=null"])
    recipe = recipe_of(found, "r.yaml")
    assert recipe.retrain is not None
    assert recipe.retrain.train.lr == 1e-3
    assert [one.target.name for one in recipe.export] == ["hf", "onnx"]
    assert plain()["retrain"]["train"] == {"max_steps": 2, "batch_size": 4}
    with pytest.raises(SparsepassError, match="expected name=value"):
        override(plain(), ["retrain.train.lr"])
    with pytest.raises(SparsepassError, match="no settings below it"):
        override(plain(), ["model.source.x=1"])


def test_retrain_takes_a_recipe_or_its_two_parts(tmp_path: Path) -> None:
    (tmp_path / "parts.yaml").write_text("train: {max_steps: 3}\ndata: {source: python-docs}\n")
    assert read_retrain_section(str(tmp_path / "parts.yaml"), [], {}).train == RetrainConfig(max_steps=3)
    found = read_retrain_section("smollm2-cpu", ["train.max_tokens=4096"], {"teacher": "x"}, source=["python-docs"])
    recipe = read_recipe("smollm2-cpu")
    assert recipe.retrain is not None
    assert found.train == dataclasses.replace(recipe.retrain.train, max_tokens=4096)
    assert (found.teacher, found.data.source) == ("x", ("python-docs",))


@pytest.mark.parametrize(
    ("kind", "page"),
    [
        *((kind, "retrain") for kind in (RetrainConfig, DataConfig, RetrainSection, SampleConfig)),
        (MeasureSection, "cli"),
    ],
)
def test_the_documentation_has_every_setting_with_its_default(kind: type, page: str) -> None:
    text = (Path(__file__).parents[3] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(kind):
        value = list(field.default) if isinstance(field.default, tuple) else field.default
        shown = value if isinstance(value, str) else json.dumps(value) if field.default is not dataclasses.MISSING else ""
        default = f"`{shown}`" if shown else ""
        assert f"| `{field.name}` | {default} |" in text, f"docs/{page}.md does not tell of {field.name} and {default}"


def test_the_documentation_has_every_recipe() -> None:
    text = (Path(__file__).parents[3] / "docs" / "retrain.md").read_text(encoding="utf-8")
    for name in recipe_names():
        assert f"| `{name}` |" in text
