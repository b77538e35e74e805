"""The target torch: the folder, what a machine without a GPU is told, and that a lowered model computes the same."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.export.targets.torch.torch_cpu import CPU, GPU, emulated_kernels, pruned, tiny_gpt2, tiny_llama, write_timings
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sparsepass.export.cli.app import app
from sparsepass.export.pattern.check import check_pattern
from sparsepass.export.report.document import read_report
from sparsepass.export.stages.exporting import ExportResult, export
from sparsepass.export.targets.hf.verify import load_plain
from sparsepass.export.targets.torch import load, lower, verify
from sparsepass.export.targets.torch.layer import SemiStructuredLinear, load_dense
from sparsepass.export.targets.torch.load import load_torch, record_of
from sparsepass.export.targets.torch.record import RECORD_FILE, Record, read_record, write_record
from sparsepass.export.targets.torch.target import SemiStructured
from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.equivalence.comparison import compare

# Of the tiny Llama: q and o always, gate and up from 8 tokens on; k and v too slow, down not timed.
GAINS = {(64, 64): {1: 1.2, 64: 1.3}, (128, 64): {1: 0.5, 8: 1.1, 64: 1.5}, (32, 64): {1: 0.5, 64: 1.01}}
OTHERS = {(4096, 4096): {1: 0.5, 4096: 1.5}}
PASSES = "nm_sparsify,slorb{k=16}"
IDS = torch.arange(12).view(1, 12)


@pytest.fixture(scope="module")
def timings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_timings(tmp_path_factory.mktemp("times") / "times.json", GAINS | OTHERS)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, timings: Path) -> ExportResult:
    """By recorded times, with branches."""
    out = tmp_path_factory.mktemp("out") / "llama"
    return export(pruned(tiny_llama, PASSES), SemiStructured(timings=timings, dtype="bfloat16"), out)


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """As a machine without a GPU writes it."""
    out = tmp_path_factory.mktemp("out") / "llama"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return export(pruned(tiny_llama), "torch{dtype=bfloat16}", out)


@pytest.fixture
def _kernels() -> Iterator[None]:
    with emulated_kernels(), torch.no_grad():
        yield


def copied(result: ExportResult, to: Path) -> Path:
    return Path(shutil.copytree(result.folder, to / "copy"))


def states(record: Record) -> dict[str, tuple[str, int]]:
    """State and least tokens by the last part of a layer's name; all layers of a name have to agree."""
    found = {(each.layer.rpartition(".")[2], (each.state, each.min_tokens)) for each in record.layers}
    assert len(found) == len(dict(found))
    return dict(found)


def test_without_a_gpu_the_folder_says_what_is_left_to_do(waiting: ExportResult) -> None:
    assert waiting.held is True
    checks = {check["name"]: check for check in waiting.report["verification"]["checks"]}
    assert {name: check["held"] for name, check in checks.items()} == {
        "pattern": True,
        "weights": True,
        "outputs": True,
        "packing": True,
        "kernels": None,
    }
    assert checks["packing"]["summary"] == "14 weights come back bit for bit out of torch's packed form"
    assert "no GPU here" in checks["kernels"]["summary"]
    assert "which layers they run is measured there" in checks["kernels"]["summary"]
    notes = waiting.report["artifact"]["notes"]
    assert "0 layers lowered, 14 to be measured on a GPU, 1 dense" in notes
    assert any(note.startswith("no GPU is here: ") and "--timings" in note for note in notes)
    assert read_record(waiting.folder).measured is None
    sparsity = waiting.report["sparsity"]
    assert sparsity["counts"]["total"]["ran_sparse"] == {"yes": 0, "no": 0, "unknown": 14}
    assert (sparsity["gpus"], sparsity["measured"]) == ([], None)


def test_recorded_times_choose_layer_by_layer(written: ExportResult) -> None:
    assert written.state == "not_checked", "kernels that did not run are not held"
    assert states(read_record(written.folder)) == {
        "q_proj": ("lowered", 0),
        "o_proj": ("lowered", 0),
        "gate_proj": ("lowered", 8),
        "up_proj": ("lowered", 8),
        "k_proj": ("dense", 0),
        "v_proj": ("dense", 0),
        "down_proj": ("dense", 0),
        "lm_head": ("dense", 0),
    }


def test_the_report_tells_of_each_layer_what_it_runs_and_why(written: ExportResult) -> None:
    section = read_report(written.folder)["sparsity"]
    layers = {layer["layer"].removeprefix("model.layers.0."): layer for layer in section["layers"]}
    said = {name: (layers[name]["ran_sparse"], layers[name]["reason"]) for name in layers}
    assert said["mlp.up_proj"] == (
        "yes",
        "cutlass: sparse is faster from 8 tokens at once on (1.10x there), and slower below (0.50x at 1); runs dense below 8 "
        "tokens at once",
    )
    assert said["self_attn.k_proj"] == (
        "no",
        "dense kernel faster: cutlass: sparse is faster from 64 tokens at once on (1.01x there), and slower below (0.50x at 1)"
        "; it has to be 1.02x at least, also at all larger sizes",
    )
    assert said["mlp.down_proj"] == ("no", "no time of 64x128 without a bias was recorded")
    assert said["lm_head"][0] == "no"
    assert said["lm_head"][1].startswith("dense on purpose: ")
    assert (layers["mlp.up_proj"]["dense_ms"], layers["mlp.up_proj"]["sparse_ms"]) == (1.5, 1.0)
    assert section["counts"]["total"]["chosen"] == {"yes": 8, "no": 6, "unknown": 0}
    assert section["measured"]["128x64, cutlass"]["break_even"].startswith("sparse is faster from 8 tokens")
    assert set(section["measured"]) == {f"{o}x{i}, cutlass" for o, i in GAINS}, "of this model's shapes only"
    assert section["gpus"] == ["emulated (SM80)"]
    page = (written.folder / "report.md").read_text()
    assert "Built by torch" in page
    assert "no time of 64x128" in page


def test_the_folder_is_a_plain_checkpoint(written: ExportResult) -> None:
    plain = AutoModelForCausalLM.from_pretrained(written.folder)
    assert plain.dtype == torch.bfloat16
    assert {path.suffix for path in written.folder.rglob("*") if path.is_file()} <= {
        ".json",
        ".md",
        ".html",
        ".safetensors",
        ".txt",
    }
    expected = written.report["artifact"]["expected_sparse"][""]
    assert check_pattern(written.folder, expected_sparse=expected).conforms


@pytest.mark.usefixtures("_kernels")
def test_a_loaded_model_computes_the_same_generates_and_compiles(
    written: ExportResult, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "sparsepass.export.targets.torch"):
        model = load_torch(written.folder, device=CPU)
    assert [each.getMessage() for each in caplog.records if each.name.startswith("sparsepass")] == [
        "packing the chosen weights"
    ]
    lowered = [path for path, module in model.named_modules() if isinstance(module, SemiStructuredLinear)]
    assert len(lowered) == 8
    assert record_of(model).summary() == "8 layers lowered, 0 to be measured on a GPU, 7 dense"
    dense = load_dense(written.folder, read_record(written.folder)).eval()
    assert not compare(dense, model, {"input_ids": IDS}, layers=False).failures()
    assert not torch.allclose(load_plain(written.folder)(IDS).logits, model(IDS).logits), "the branches are there"
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 15)  # type: ignore[operator]
    mlp = model.get_submodule("model.layers.0.mlp")
    torch.compiler.reset()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    for tokens in (2, 12):
        x = torch.randn(1, tokens, 64, dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(x), mlp(x))


@pytest.mark.usefixtures("_kernels")
def test_what_waits_is_measured_on_loading_and_remembered(
    waiting: ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(waiting, tmp_path)
    monkeypatch.setattr(
        "sparsepass.export.targets.torch.measure.time_ms", lambda call: float(type(call()).__name__ == "x") + 1.0
    )
    with pytest.warns(UserWarning, match="no layer of .* was lowered, the model runs dense: dense kernel faster"):
        model = load_torch(folder, device=CPU)
    assert {each.state for each in record_of(model).layers} == {"dense"}
    assert read_record(folder).measured is None, "nothing is written unless asked"

    gains = iter(lambda: 1.0, None)
    order: list[float] = []

    def faster(_: Any) -> float:  # dense and sparse are timed in turn
        order.append(next(gains))
        return 2.0 if len(order) % 2 else 1.0

    monkeypatch.setattr("sparsepass.export.targets.torch.measure.time_ms", faster)
    options = SemiStructured(shapes=((1, 4),))
    model = load_torch(folder, device=CPU, options=options, remember=True)
    assert len(order) == 2 * 3 * 4, "dense and sparse, three rounds, four shapes"
    assert len(record_of(model).in_state("lowered")) == 14
    assert read_record(folder) == record_of(model)
    assert read_record(folder).measured is not None
    monkeypatch.setattr("sparsepass.export.targets.torch.measure.time_ms", lambda _: pytest.fail("measured again"))
    load_torch(folder, device=CPU)


@pytest.mark.usefixtures("_kernels")
def test_another_gpu_and_a_missing_library_are_told(
    written: ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "check_device", lambda _: replace(GPU, name="another"))
    with pytest.warns(UserWarning, match=r"measured on emulated \(SM80\).* and this is another .*measure=True"):
        load_torch(written.folder, device=CPU)
    monkeypatch.setattr(load, "check_device", lambda _: GPU)
    monkeypatch.setattr(load, "probe", lambda *_: {"cutlass": "no kernel image", "cusparselt": ""})
    with pytest.raises(SparsepassError, match=r"measured with cutlass, which cannot be used here \(no kernel image\)"):
        load_torch(written.folder, device=CPU)


@pytest.mark.usefixtures("_kernels")
def test_damaged_folders_are_refused(written: ExportResult, tmp_path: Path) -> None:
    folder = copied(written, tmp_path)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0] += 1
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SparsepassError, match=r"layers.1.mlp.up_proj.weight is not 2:4 .*export the model again"):
        load_torch(folder, device=CPU)
    found = CliRunner().invoke(app, ["verify", str(folder)])
    assert found.exit_code == 1
    adapter = folder / "adapter" / "adapter_model.safetensors"
    branches = {name: t for name, t in safetensors.torch.load_file(adapter).items() if "layers.0.mlp.up_proj" not in name}
    safetensors.torch.save_file(branches, adapter)
    with pytest.raises(SparsepassError, match=r"layers.0.mlp.up_proj has a SLoRB branch, and .*adapter lacks it"):
        load_torch(folder, device=CPU)
    (folder / RECORD_FILE).write_text("{}")
    found = CliRunner().invoke(app, ["verify", str(folder)])
    assert found.exit_code == 2
    assert "is damaged" in found.output


def test_a_folder_loads_on_a_gpu_only(written: ExportResult) -> None:
    with pytest.raises(SparsepassError, match="the device given is cpu"):
        load_torch(written.folder, device="cpu")
    with pytest.raises(SparsepassError, match="was not loaded by load_torch"):
        record_of(torch.nn.Linear(2, 2))


def test_verify_shows_what_is_lowered(written: ExportResult) -> None:
    found = CliRunner().invoke(app, ["verify", str(written.folder)])
    assert found.exit_code == 0
    assert "torch's 2:4 kernels: 8 layers lowered, 0 to be measured on a GPU, 7 dense" in found.output
    document = json.loads(CliRunner().invoke(app, ["verify", str(written.folder), "--json"]).output)
    assert document["torch_semi_structured"] == read_record(written.folder).to_dict()


def test_eval_and_compare_take_the_folder_as_plain_transformers_does(waiting: ExportResult) -> None:
    found = CliRunner().invoke(app, ["compare", str(waiting.folder), str(waiting.folder), "--exact"])
    assert found.exit_code == 0, found.output


@pytest.mark.usefixtures("_kernels")
def test_on_a_gpu_the_kernels_are_measured_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for the GPU, and CUTLASS's emulated kernels for faster ones."""
    for module in (lower, verify):
        monkeypatch.setattr(module, "gpu_is_here", lambda: True)
        monkeypatch.setattr(module, "_GPU", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "emulated")
    turn: list[int] = []

    def faster(_: Any) -> float:
        turn.append(0)
        return 2.0 if len(turn) % 2 else 1.0

    monkeypatch.setattr("sparsepass.export.targets.torch.measure.time_ms", faster)
    program = pruned(tiny_gpt2)
    artifact = lower.write_torch(program, tmp_path, dtype=torch.bfloat16)
    assert artifact.record.measured is not None
    assert {point.sequence for point in artifact.record.measured.times[0].points} <= {1, 16}, "within 32 positions"
    assert len(artifact.record.in_state("lowered")) == len(program.sparse) > 0
    assert "cusparselt was not tried: cuSPARSELt is not there: this build of torch comes without it" in artifact.notes
    packing, kernels = verify.verify_torch(program, tmp_path, artifact.record)
    assert packing.held is kernels.held is True
    assert kernels.summary.startswith("4 lowered layers on emulated: relative error ")

    monkeypatch.setattr(SemiStructuredLinear, "forward", lambda self, x: x.new_ones((*x.shape[:-1], self.out_features)))
    assert verify.verify_torch(program, tmp_path, artifact.record)[1].held is False, "other outputs are seen"


def refused(program: Program, tmp_path: Path, said: str, **options: Any) -> None:
    with pytest.raises(SparsepassError, match=said):
        export(program, SemiStructured(**options), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*")), "nothing is left"


def test_what_has_no_kernels_is_refused_by_name(tmp_path: Path, timings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = pruned(tiny_gpt2)
    refused(program, tmp_path, "the weights are float32, and torch has no 2:4 kernels for it: lower them as bfloat16")
    other = pruned(tiny_gpt2, "nm_sparsify{pattern=4:8}")
    refused(other, tmp_path, r"is 4:8, and 3 more are not 2:4: torch has sparse kernels for 2:4 only", dtype="bfloat16")
    refused(program, tmp_path, "are for bfloat16, and the weights are float16", dtype="float16", timings=timings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    refused(program, tmp_path, "Tesla T4 is SM75 and has no 2:4 kernels: they need Ampere", dtype="bfloat16")


def test_a_dense_program_is_refused(tmp_path: Path) -> None:
    from tests.export.targets.torch.torch_cpu import _dense

    refused(_dense(tiny_gpt2), tmp_path, "no weight of this program is sparse", dtype="bfloat16")


@pytest.mark.parametrize(
    ("target_name", "option", "said"),
    [
        ("onnx", "--sparse-only", "the target onnx has no option --sparse-only"),
        ("torch", "--one-engine", "the target torch has no option --one-engine"),
        ("torch", "--measure-shapes=5", "expected BATCHxSEQUENCE"),
        ("tensorrt", "--compiled", "the target tensorrt has no option compiled"),
    ],
)
def test_options_of_one_target_are_refused_by_others(target_name: str, option: str, said: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["export", "m", "--target", target_name, "-o", str(tmp_path / "out"), option])
    assert found.exit_code == 2
    assert said in found.output


def test_the_command_line_takes_recorded_times(tmp_path: Path, timings: Path) -> None:
    source = tmp_path / "program"
    pruned(tiny_llama).save(source)
    arguments = ["export", str(source), "-t", "torch", "-o", str(tmp_path / "out"), "--dtype", "bfloat16", "--sparse-only"]
    found = CliRunner().invoke(app, [*arguments, "--timings", str(timings)])
    assert found.exit_code == 3, found.output  # without a GPU the kernels are not checked
    assert states(read_record(tmp_path / "out"))["up_proj"] == ("dense", 0), "--sparse-only keeps no dense weight beside"
    assert states(read_record(tmp_path / "out"))["q_proj"] == ("lowered", 0)
    found = CliRunner().invoke(app, [*arguments, "--force", "--no-measure", "--no-verify", "--allow-unchecked"])
    assert found.exit_code == 0, found.output
    assert read_record(tmp_path / "out").measured is None
    assert "measuring was switched off" in (tmp_path / "out" / "report.md").read_text()


def test_a_recipe_takes_the_options(tmp_path: Path) -> None:
    from sparsepass.export.stages.recipe import read_recipe

    path = tmp_path / "r.yaml"
    text = "model: m\nout: o\nprune: {}\nexport: {target: %s, semi_structured: {shapes: [[1, 512]], timings: %s}}\n"
    path.write_text(text % ("torch", "null"))
    (section,) = read_recipe(path).export
    assert section.target == SemiStructured(shapes=((1, 512),))
    path.write_text(text % ("hf", "null"))
    with pytest.raises(SparsepassError, match="the target hf has no option semi_structured"):
        read_recipe(path)


@pytest.mark.gpu
def test_real_kernels_compute_the_same(tmp_path: Path) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs an NVIDIA GPU from Ampere on")
    result = export(pruned(tiny_llama, PASSES), "torch{dtype=bfloat16}", tmp_path / "out")
    assert result.held is True
    record = read_record(tmp_path / "out")
    assert record.measured is not None
    backend = next(name for name, why in record.measured.backends.items() if not why)
    always = replace(
        record, layers=tuple(replace(e, state="lowered", backend=backend) if e.eligible else e for e in record.layers)
    )
    write_record(always, tmp_path / "out")
    dense = load_dense(tmp_path / "out", record).eval().cuda()
    assert not compare(dense, load_torch(tmp_path / "out"), {"input_ids": IDS}, layers=False).failures()
