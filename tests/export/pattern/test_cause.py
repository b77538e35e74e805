"""Faults planted as they happen: a merged adapter, training without the mask, the wrong axis, and what the check says."""

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from typer.testing import CliRunner

from sparsepass.export.cli import app as cli
from sparsepass.export.pattern import PatternReport, check_pattern
from sparsepass.export.pattern.cause import low_rank

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def prune_(model: Any) -> Any:
    """Magnitude 2:4 along the last axis, in place, of all projections."""
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight").rpartition(".")[2] in KINDS:
            groups = parameter.data.reshape(parameter.shape[0], -1, 4)
            groups.scatter_(-1, groups.abs().argsort(-1)[..., :2], 0.0)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return prune_(hf.LlamaForCausalLM(config))


def check(model: Any) -> PatternReport:
    return check_pattern(model.state_dict(), ignore=["lm_head"])


def kinds_of(report: PatternReport) -> dict[str, str]:
    return {entry.weight: entry.cause.kind for entry in report.failures if entry.cause is not None}


def test_the_pruned_model_conforms(model: Any) -> None:
    report = check(model)
    assert report.conforms
    assert (report.causes, report.advice()) == ((), "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_lora_adapter_is_named(model: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """peft's own merge, of an adapter that has been trained a little so that it is not zero."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    adapted: Any = peft.get_peft_model(copy.deepcopy(model).to(dtype), config)
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=3e-4)
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)

    report = check_pattern(tmp_path, ignore=["lm_head"])

    expected = {f"model.layers.{i}.self_attn.{kind}.weight" for i in range(2) for kind in ("q_proj", "v_proj")}
    assert kinds_of(report) == dict.fromkeys(expected, "merged adapter")
    assert {entry.weight for entry in report.failures} == expected
    first = next(entry for entry in report.failures if entry.cause is not None)
    assert first.cause is not None
    assert first.cause.kind == "merged adapter"
    assert "form a matrix of rank 4 or less: likely a LoRA adapter was merged into it" in first.cause.text
    advice = report.advice()
    assert "all in q_proj, v_proj; the other layers conform" in advice
    assert "keep the adapter beside them" in advice
    said = CliRunner().invoke(cli.app, ["verify", str(tmp_path), "--ignore", "lm_head"])
    assert said.exit_code == 1
    assert "likely a LoRA adapter was merged" in said.output.replace("\n", " ")


def test_an_adapter_that_is_not_merged_leaves_the_weights_as_they_are(model: Any, tmp_path: Path) -> None:
    import peft

    adapted: Any = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    adapted.unload().save_pretrained(tmp_path)
    assert check_pattern(tmp_path, ignore=["lm_head"]).conforms


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_training_without_the_mask_is_named(model: Any, optimizer: str) -> None:
    trained = copy.deepcopy(model)
    options = {"AdamW": {"lr": 1e-4}, "SGD": {"lr": 1e-3}}[optimizer]
    step = getattr(torch.optim, optimizer)(trained.parameters(), **options)
    # More tokens than the matrices have ranks: the gradient of SGD's step has full rank, too.
    ids = torch.randint(0, 64, (16, 32), generator=torch.Generator().manual_seed(0))
    trained(input_ids=ids, labels=ids).loss.backward()
    step.step()

    report = check(trained)

    assert len(report.failures) == 14
    assert set(kinds_of(report).values()) == {"trained without mask"}
    (cause, found), *others = report.causes
    assert (len(found), others) == (14, [])
    assert "likely fine-tuned without its mask" in cause.text
    assert "sparsepass retrain" in cause.advice


def test_the_wrong_axis_is_named(model: Any) -> None:
    turned = copy.deepcopy(model)
    for parameter in (module.weight for module in turned.modules() if isinstance(module, torch.nn.Linear)):
        parameter.data = parameter.data.new_tensor(np.random.default_rng(0).uniform(0.5, 1, parameter.shape))
        groups = parameter.data.T.contiguous().reshape(parameter.shape[1], -1, 4)
        groups.scatter_(-1, torch.rand(groups.shape, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :2], 0.0)
        parameter.data = groups.reshape(parameter.shape[1], -1).T.contiguous()
    report = check(turned)
    assert set(kinds_of(report).values()) == {"wrong axis"}
    assert "groups were made along axis 0 and the product sums over axis 1" in report.advice()
    assert "Prune the dense weights again along the axis of K" in report.advice()


def planted(model: Any, kind: str) -> torch.Tensor:
    weight: torch.Tensor = model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    generator = torch.Generator().manual_seed(0)
    if kind == "not in groups":
        return weight[:, torch.randperm(weight.shape[1], generator=generator)]
    if kind == "single values":
        weight[3, :4] = 1.0
        return weight
    assert kind == "dense"
    return torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("not in groups", "channels were permuted"),
        ("single values", "single values were changed after pruning"),
        ("dense", "it looks never pruned"),
    ],
)
def test_other_causes(model: Any, kind: str, said: str, tmp_path: Path) -> None:
    save_file({"a.up_proj.weight": planted(model, kind).contiguous()}, tmp_path / "model.safetensors")
    report = check_pattern(tmp_path)
    assert list(kinds_of(report).values()) == [kind]
    assert said in report.advice()
    assert report.to_dict()["causes"][0]["weights"] == ["a.up_proj.weight"]
    assert said.split(" ", maxsplit=1)[0] in str(report)


def test_dense_weights_of_any_shape_are_never_called_filled() -> None:
    """Heavy tails and flat ones: the median ratio stays far above the bound."""
    rng = np.random.default_rng(0)
    draws: dict[str, Any] = {
        "normal": rng.standard_normal,
        "uniform": rng.random,
        "cauchy": lambda size: rng.standard_cauchy(size),
    }
    for (name, draw), shape in itertools.product(draws.items(), [(8, 8), (64, 64), (300, 512), (3, 16, 32)]):
        weight = torch.from_numpy(np.asarray(draw(shape)).astype(np.float32))
        entry = check_pattern({"experts.up_proj": weight} if len(shape) == 3 else {"a.weight": weight}).entries[0]
        assert entry.cause is not None
        assert entry.cause.kind == "dense", (name, shape)


@pytest.mark.parametrize("rank", [1, 4, 8, 16])
def test_the_rank_that_is_found_is_the_least_that_is_tried(rank: int) -> None:
    rng = np.random.default_rng(rank)
    whole = rng.standard_normal((256, rank)) @ rng.standard_normal((rank, 256)) * 1e-4
    known = rng.random((256, 64, 4)).argsort(-1).reshape(256, 256) < 2
    assert low_rank(np.where(known, whole, 7.0), known) == max(rank, 4)
    assert low_rank(np.where(known, np.sign(rng.standard_normal((256, 256))), 7.0), known) is None
