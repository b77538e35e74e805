"""Each command that writes, ended once; ``python -m tests.interrupted`` ends it at many places, in an hour."""

from pathlib import Path

import pytest
from tests.interrupted.commands import COMMANDS, make_base
from tests.interrupted.disks import NoDiskError
from tests.interrupted.ending import run_until
from tests.interrupted.trying import BrokenError, Place, Trial

_STATES = ("absent", "old", "whole")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("interrupted") / "base")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "criteria"])  # whose rows start processes of their own
def test_ended_in_the_middle(name: str, base: Path, tmp_path: Path) -> None:
    trial = Trial(COMMANDS[name], base, tmp_path / "here")
    number = list(COMMANDS).index(name)
    place = trial.places(30)[(7 * number + 11) % 30]
    assert trial.end_at(place) in _STATES


@pytest.mark.parametrize("name", ["prune --force", "export hf", "masks", "sample", "verify --report"])
def test_without_room(name: str, base: Path, tmp_path: Path) -> None:
    trial = Trial(COMMANDS[name], base, tmp_path / "here")
    small, large = trial.sizes(2)
    assert small.file_bytes == 0
    assert trial.end_at(small) in ("absent", "old")
    assert trial.end_at(large) in _STATES


@pytest.mark.parametrize("name", ["prune --force", "masks"])
def test_on_a_disk_that_is_full_or_read_only(name: str, base: Path, tmp_path: Path) -> None:
    trial = Trial(COMMANDS[name], base, tmp_path / "disk" / "here")
    read_only, full = trial.disks(1)
    assert (read_only.is_read_only, full.free_bytes) == (True, 0)
    try:
        assert [trial.end_at(read_only), trial.end_at(full)] == ["old" if COMMANDS[name].before else "absent"] * 2
    except NoDiskError as error:
        pytest.skip(str(error))


def test_a_step_of_a_child_is_where_it_ends(base: Path, tmp_path: Path) -> None:
    command = COMMANDS["masks"]
    whole = Trial(command, base, tmp_path / "here").reference
    assert whole.steps > 3
    (tmp_path / "there").mkdir()
    ended = run_until(command.given(base, tmp_path / "there"), tmp_path / "there", step=2)
    assert (ended.code, ended.steps) == (-9, 2)


def test_what_is_broken_is_found(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(COMMANDS["masks"], base, tmp_path / "here")
    steps = trial.reference.steps
    for module in ("places", "files"):
        monkeypatch.setattr(f"sparsepass.graph.support.{module}.sweep", lambda _: None)
    found = []
    for step in range(1, steps + 1):
        try:
            trial.end_at(Place(step=step))
        except BrokenError as error:
            found.append(str(error))
    assert any("after the second run" in words for words in found), found
