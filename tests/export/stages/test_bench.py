"""`bench`: figures are there and plausible, they go into the report, and what cannot be measured is refused in words."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tests.export.cli.commands import run
from tests.export.tiny import save_tiny_llama
from tests.families import BY_NAME

from sparsepass.export.report import ReportDocument, SpeedSection, find_report, new_report, plain_json
from sparsepass.export.stages import bench_memory, bench_runs
from sparsepass.export.stages.benching import bench, measure_speed
from sparsepass.export.stages.exporting import export
from sparsepass.export.stages.settings import BenchSettings, ModelSource
from sparsepass.graph import SparsepassError
from sparsepass.graph.native import TORCH, best_path
from sparsepass.passes import apply_passes

SMALL: Any = {"batches": (1, 2), "prompt_tokens": 4, "new_tokens": 3, "prefill_tokens": 8, "repeats": 2}
TIMES = BenchSettings(**SMALL, memory=False)
OPTIONS = ("--batch", "1,2", "--prompt-tokens", 4, "--new-tokens", 3, "--prefill-tokens", 8, "--repeats", 2, "--no-memory")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture
def packed(dense: Path, tmp_path: Path) -> Path:
    export(dense, "packed", tmp_path / "packed", passes="nm_sparsify", verify=False, validate=False, progress=False)
    return tmp_path / "packed"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    model: Any = BY_NAME["bert"].model()
    model.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_two_models_are_measured_side_by_side(packed: Path, dense: Path) -> None:
    found = bench(packed, str(dense), settings=TIMES, progress=False)
    assert [(p.phase, p.batch, p.prompt_tokens, p.new_tokens) for p in found.points] == [
        ("decode", 1, 4, 4),
        ("decode", 2, 4, 4),
        ("prefill", 1, 8, 1),
    ]
    for point in found.points:
        assert len(point.rates) == 2
        assert all(rate > 0 for rate in point.rates)
        assert point.gain == pytest.approx(point.rates[0] / point.rates[1])
    ours, other = found.sides
    assert (ours.name, ours.num_packed, ours.num_dense) == ("packed", 14, 1)
    assert ours.kernels == {best_path("bf16"): 14}
    assert ours.runs_packed is (best_path("bf16") != TORCH)
    assert sum(ours.dense.values()) == 1
    assert (other.name, other.num_packed, other.num_dense, other.kernels, other.dense) == ("dense", 0, 15, {}, {})
    assert other.disk_bytes == (dense / "model.safetensors").stat().st_size
    assert 0 < ours.disk_bytes < other.disk_bytes
    assert found.main is found.points[0]
    assert (found.threads, found.repeats, found.device) == (torch.get_num_threads(), 2, "cpu")
    read = ReportDocument.parse(new_report() | {"speed": plain_json(found)}).speed
    assert isinstance(read, SpeedSection)
    assert plain_json(read) == plain_json(found)


def test_models_take_turns_and_the_first_run_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    models, ran = [BY_NAME["llama"].model(), BY_NAME["llama"].model()], []

    def timed(model: Any, shape: bench_runs.BenchShape) -> bench_runs.BenchTimes:
        ran.append((models.index(model), shape.phase, shape.batch))
        took = [9.0, 2.0, 4.0, 1.0][len([each for each in ran if each == ran[-1]]) - 1]
        return bench_runs.BenchTimes(first_s=took, rest_s=2 * took)

    monkeypatch.setattr(sys.modules[bench.__module__], "run_once", timed)
    points = measure_speed(models, settings=BenchSettings(**SMALL | {"repeats": 3, "batches": (2,)}), progress=False)
    assert [index for index, _, _ in ran] == [0, 1] * 8
    decode, prefill = (point.results[0] for point in points)
    assert decode.first_token_s == 2
    assert decode.new_tokens_per_second == 2 * 3 / 4
    assert decode.prompt_tokens_per_second == 2 * 4 / 2
    assert decode.spread == (8 - 2) / 4
    assert prefill.prompt_tokens_per_second == 8 / 2
    assert prefill.new_tokens_per_second is None


def test_a_model_that_does_not_generate_runs_forward(encoder: Path) -> None:
    found = bench(encoder, settings=TIMES, progress=False)
    assert [(point.phase, point.batch, point.new_tokens) for point in found.points] == [("forward", 1, 0), ("forward", 2, 0)]
    assert all(point.rates[0] > 0 and point.gain is None for point in found.points)
    assert found.points[0].results[0].first_token_s is None


@pytest.mark.parametrize("name", ["gpt2", "t5", "gemma3"])
def test_other_families_generate(name: str) -> None:
    points = measure_speed([BY_NAME[name].model()], settings=TIMES, progress=False)
    assert [point.phase for point in points] == ["decode", "decode", "prefill"]
    assert all(point.rates[0] > 0 for point in points)


def test_threads_are_as_asked_and_come_back(dense: Path) -> None:
    before = torch.get_num_threads()
    found = bench(dense, settings=BenchSettings(**SMALL, memory=False, threads=before + 1), progress=False)
    assert (found.threads, torch.get_num_threads()) == (before + 1, before)


def test_memory_is_about_that_of_the_weights(tmp_path: Path) -> None:
    config = hf.LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8, vocab_size=8192
    )
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (side,) = bench(tmp_path / "model", settings=BenchSettings(**SMALL), progress=False).sides
    assert side.loaded_bytes is not None
    assert 0.95 < side.loaded_bytes / side.disk_bytes < 1.2
    assert side.loading_bytes is not None
    assert side.loading_bytes > 0.95 * side.disk_bytes
    assert side.running_bytes is None or side.running_bytes > 0.95 * side.disk_bytes


def test_memory_is_measured_the_same_in_this_process(dense: Path) -> None:
    found = bench_memory.measure_memory(ModelSource(source=str(dense)), TIMES)
    assert set(found) == {"loaded_bytes", "running_bytes", "loading_bytes"}


def test_a_process_that_fails_is_told(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[bench.__module__], "_MEMORY", "sparsepass.no_such_module")
    with pytest.raises(SparsepassError, match=r"its process ended with 1.*no_such_module.*memory=False"):
        bench(dense, settings=BenchSettings(**SMALL), progress=False)


def test_what_cannot_be_measured_is_refused(dense: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(SparsepassError, match="does not exist"):
        bench(tmp_path / "nowhere", settings=TIMES)
    with pytest.raises(SparsepassError, match=r"BertModel does not.*two of a kind"):
        bench(dense, encoder, settings=TIMES)
    with pytest.raises(SparsepassError, match=r"do not fit the 64 positions.*lower"):
        bench(dense, settings=BenchSettings(prompt_tokens=60, new_tokens=4))
    with pytest.raises(SparsepassError, match="takes no text"):
        measure_speed([BY_NAME["vit"].model()])
    apply_passes(BY_NAME["llama"].model(), "nm_sparsify", validate=False).save(tmp_path / "program")
    with pytest.raises(SparsepassError, match=r"saved program.*--target packed"):
        bench(tmp_path / "program", settings=TIMES)
    with pytest.raises(SparsepassError, match="repeats of a benchmark is 0"):
        BenchSettings(repeats=0)
    with pytest.raises(SparsepassError, match="batches of a benchmark is 0"):
        BenchSettings(batches=(4, 0))


def test_the_command_writes_into_the_report_of_the_folder(packed: Path, dense: Path) -> None:
    done = run("bench", packed, "--against", dense, *OPTIONS)
    assert done.exit_code == 0
    said = " ".join(done.stdout.split())
    for part in ("decoding, batch 2: tokens", "prefill of 8 tokens", "size on disk", "times dense", "14 of 15 linear layers"):
        assert part in said
    document = find_report(packed)
    assert document is not None
    assert [run["stage"] for run in document["runs"]] == ["export", "bench"]
    gain = SpeedSection.model_validate(document["speed"]).points[0].gain
    word = "no" if best_path("bf16") == TORCH else "yes"
    assert f"{word}, {gain:.2f} times as fast as dense" in " ".join(run("report", packed).stdout.split())
    for name in ("report.md", "report.html"):
        page = (packed / name).read_text(encoding="utf-8")
        assert f"{word.capitalize()}: packed: 14 of 15" in page
        assert f"tokens a second, {gain:.2f} times dense" in page


def _files(folder: Path) -> Sequence[tuple[str, int]]:
    return sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())


def test_the_command_leaves_alone_what_is_no_report_of_ours(dense: Path, packed: Path, tmp_path: Path) -> None:
    before = _files(dense), _files(packed)
    printed = run("bench", dense, *OPTIONS, "--json", "--report", tmp_path / "new").stdout
    assert json.loads(printed)["sides"][0]["name"] == "dense"
    written = (find_report(tmp_path / "new") or {})["speed"]
    assert {key: json.loads(printed)[key] for key in written} == written
    assert run("bench", packed, *OPTIONS, "--no-report").exit_code == 0
    assert (_files(dense), _files(packed)) == before


def test_the_command_says_what_is_wrong(tmp_path: Path, dense: Path) -> None:
    assert run("bench", tmp_path / "nowhere").exit_code == 2
    done = run("bench", dense, "--batch", "one")
    assert done.exit_code == 2
    assert "--batch expects whole numbers" in " ".join(done.stderr.split())
