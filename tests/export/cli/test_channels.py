"""The command channels: every group and every reason, in lines of a terminal and as JSON."""

import json
from pathlib import Path

import pytest
from tests.export.cli.commands import run
from tests.export.tiny import WORDS, save_tiny_llama
from tests.families import captured

from sparsepass.export.cli.channels import _together
from sparsepass.graph import Program
from sparsepass.graph.channels import channel_flow


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "t5"])
def test_all_that_was_found_is_in_the_json(name: str, tmp_path: Path) -> None:
    program = captured(name)
    program.save(tmp_path / "program")
    flow = channel_flow(program)
    found = json.loads(run("channels", tmp_path / "program", "--json").stdout)
    assert (found["command"], found["exit_code"]) == ("channels", 0)
    assert [(each["order"], each["num_channels"]) for each in found["permutations"]] == [
        (group.order, group.num_channels) for group in flow.permutations
    ]
    assert [(each["num_channels"], each["keeps_mean"]) for each in found["rotations"]] == [
        (group.num_channels, group.keeps_mean) for group in flow.rotations
    ]
    assert [[place["tensor"] for place in each["even_gains"]] for each in found["rotations"]] == [
        [place.tensor for place in group.gains] for group in flow.rotations
    ]
    places = [group.places for group in flow.permutations] + [group.places for group in flow.scalings]
    places += [group.places for group in flow.rotations] + [group.places for group in flow.removals]
    entries = [each for kind in ("permutations", "scalings", "rotations", "removals") for each in found[kind]]
    for each, its in zip(entries, places, strict=True):
        for key, reads in (("made_by", False), ("read_by", True)):
            told = [(place["tensor"], tuple(place["axes"])) for place in each[key]]
            assert told == [(place.tensor, place.axes) for place in its if place.reads == reads]
    reasons_of = {
        "not_permuted": flow.refused, "not_scaled": flow.unscaled, "not_rotated": flow.unmixed, "not_removed": flow.kept,
    }  # fmt: skip
    for key, reasons in reasons_of.items():
        assert {(each["tensor"], tuple(each["axes"])): each["reason"] for each in found[key]} == dict(reasons)


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert", "whisper"])
def test_the_text_fits_80_columns_and_names_every_reason(name: str, tmp_path: Path) -> None:
    program = captured(name)
    program.save(tmp_path / "program")
    text = run("channels", tmp_path / "program").stdout
    assert max(len(line) for line in text.splitlines()) <= 80
    words = " ".join(text.split())
    flow = channel_flow(program)
    for reason in {*flow.refused.values(), *flow.unscaled.values(), *flow.unmixed.values(), *flow.kept.values()}:
        kind = reason.split(" (")[0]
        assert " ".join(kind.split()) in words, kind


def test_groups_that_differ_in_numbers_only_are_one_entry(tmp_path: Path) -> None:
    captured("llama").save(tmp_path / "program")
    lines = run("channels", tmp_path / "program").stdout.splitlines()
    start = lines.index("  8 channels, any order within a block, 4 groups")
    assert lines[start + 1 : start + 3] == [
        "    made by model.layers.0-1.self_attn.v_proj.weight[0]",
        "    read by model.layers.0-1.self_attn.o_proj.weight[1]",
    ]
    assert "Channels that can carry no factor" in lines


def test_ranges_mean_exactly_what_they_stand_for() -> None:
    assert _together(["a.0.b[0]", "a.1.b[0]", "a.3.b[0]"]) == ["a.0-1,3.b[0]"]
    assert _together(["a.0.b.1", "a.1.b.0"]) == ["a.0.b.1", "a.1.b.0"]
    assert _together(["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"]) == ["a.0-1.b.0-1"]
    assert _together(["a[0]", "a[1]"]) == ["a[0]", "a[1]"]


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    result = run("channels", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


def test_channels_are_permuted_before_pruning(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "tiny")
    (tmp_path / "words.txt").write_text(f"{WORDS}\n" * 400, encoding="utf-8")
    calibration = ["--calibration", tmp_path / "words.txt", "--num-sequences", 4, "--context", 16]
    passes = "permute_channels{criterion=wanda,method=greedy},nm_sparsify{criterion=wanda}"
    assert run("prune", tmp_path / "tiny", "-o", tmp_path / "out", "--passes", passes, *calibration).exit_code == 0
    first, second = Program.load(tmp_path / "out").history
    assert (first.text.split("{")[0], second.text.split("{")[0]) == ("permute_channels", "nm_sparsify")
    assert all("kept_after" in each.facts for each in first.outcomes if each.action == "rewritten")
