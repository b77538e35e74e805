"""The command `plan` and its page: what a reader sees, the JSON, exit codes."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tests.export.plan.configs import TINY, saved_config
from typer.testing import CliRunner, Result

from sparsepass import Program, parse_pipeline
from sparsepass.export.cli import app as cli
from sparsepass.export.plan.forecast import plan
from sparsepass.export.plan.model import load_for_plan
from sparsepass.export.plan.pages import layer_rows, page, ranges


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli.app, ["plan", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wide = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 4}
    return saved_config(
        tmp_path_factory.mktemp("model"), "llama", TINY | wide | {"max_position_embeddings": 4096}, "LlamaForCausalLM"
    )


@pytest.fixture(scope="module")
def program(folder: Path) -> Program:
    return load_for_plan(folder)


def printed(program: Program, width: int = 150, *, every_layer: bool = False, **options: object) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(page(plan(program, **options), every_layer=every_layer), highlight=False)  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_page_says_it_at_a_glance(program: Program) -> None:
    text = printed(program, gpu="h100", runtime="ideal", batches=(1, 16), seqs=(512, 2048), slorb_k=16)
    at = [text.index(part) for part in ("Predicted time", "Why not more", "Weights in memory", "Layers (times", "Recommended")]
    assert at == sorted(at)
    assert "on H100 80GB SXM, runtime ideal, bf16 weights, SLoRB k=16 (fixed)" in text
    assert "SLoRB: with the branches prefill gains" in text
    assert "--passes 'nm_sparsify" in text
    assert "layers of model.layers.*" in text
    assert "self_attn.q_proj, .o_proj" in text
    assert "1 dense: output head" in text


def test_no_number_and_no_name_is_broken_in_80_columns(program: Program) -> None:
    text = printed(program, 80, gpu="h100", batches=(1, 16), seqs=(512,))
    layers = text[text.index("Layers (times") :].splitlines()
    assert max(map(len, layers[:14])) <= 80
    assert [line for line in layers if line.startswith("self_attn.q_proj")]
    assert all(line.split()[-1] in ("always", "never", "tokens") for line in layers if " > " in line)


def test_layers_of_one_shape_are_one_row(program: Program) -> None:
    found = plan(program, gpu="h100", runtime="ideal")
    rows = layer_rows(found.layers)
    assert [(row.count, row.first.matmul.out_features, row.first.matmul.in_features) for row in rows] == [
        (4, 2048, 2048),
        (4, 512, 2048),
        (4, 8192, 2048),
        (2, 2048, 8192),
        (1, 320, 2048),
    ]
    assert rows[0].names == ("model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.o_proj")
    every = printed(program, width=300, gpu="h100", every_layer=True)
    assert "model.layers.1.mlp.up_proj" in every.replace("\n", "")


def test_nothing_to_gain_is_said(program: Program) -> None:
    text = printed(program, gpu="a100", runtime="torch")
    assert "Recommended: prune nothing for speed at these sizes" in text
    assert "if all 2:4" in text
    assert "no layer is planned 2:4" in text


def test_a_model_that_fits_only_as_planned(program: Program) -> None:
    assert "no, needs" in printed(program, gpu="rtx4090", runtime="ideal", batches=(100000,), seqs=(2048,))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ((), "never"),
        (((1, None),), "always"),
        (((1, 12), (300, None)), "1-12 and 300+ tokens"),
        (((5, 9),), "5-9 tokens"),
    ],
)
def test_ranges(found: tuple[tuple[int, int | None], ...], words: str) -> None:
    assert ranges(found) == words


def test_the_command_prints_json(folder: Path) -> None:
    result = run(
        folder, "--gpu", "A100", "--batch", "1,8", "--batch", 32, "--seq", 256, "--slorb", 32, "--runtime", "ideal", "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(p["batch"], p["seq"], p["new_tokens"]) for p in found["points"]] == [(1, 256, 128), (8, 256, 128), (32, 256, 128)]
    assert found["device"]["name"] == "a100"
    assert [item.name for item in parse_pipeline(found["passes"])] == ["nm_sparsify", "slorb"]
    layer = found["layers"][0]
    assert layer["name"] == "model.layers.0.self_attn.q_proj"
    assert layer["decode"]["dense_s"] > layer["decode"]["sparse_s"] > 0
    assert layer["branch_k"] == 32
    point = found["points"][0]
    assert point["decode"]["speedup"] == pytest.approx(point["decode"]["dense_s"] / point["decode"]["planned_s"])


def test_exit_codes(folder: Path, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sparsepass.export.plan.forecast.load_for_plan",
        lambda source, **_: program if source == str(folder) else load_for_plan(source),
    )
    assert run(folder, "--gpu", "h100").exit_code == 0
    assert run(folder, "--gpu", "h100", "--runtime", "torch").exit_code == 1
    for wrong, message in (
        (("--gpu", "V100"), "Volta"),
        (("--gpu", "h100", "--batch", "0"), "at least 1, got 0"),
        (("--gpu", "h100", "--batch", "many"), "--batch expects whole numbers"),
        (("--gpu", "h100", "--projection", "odd"), "--projection expects"),
    ):
        result = run(folder, *wrong)
        assert result.exit_code == 2
        assert message in result.output.replace("\n", " ")
    result = run(folder / "nowhere", "--gpu", "h100")
    assert (result.exit_code, "does not exist" in result.output.replace("\n", " ")) == (2, True)
