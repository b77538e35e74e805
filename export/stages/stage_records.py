"""A stage of a recipe, and ``stages.json``: which stages ran, with which settings, and what came of them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Any,
    Final,
    NotRequired,  # pydantic takes no other before Python 3.12
)

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from sparsepass.export.targets import State
from sparsepass.graph.support import NON_FINITE, check_as, read_object, write_text

STAGES_FILE: Final = "stages.json"
"""In a recipe's folder: stage -> its settings, whether it is done, and what verification came to."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        name: ``prune``, ``retrain``, ``eval``, ``export.`` and the target, or ``measure``.
        folder: Where its output goes.
        settings: All that its output depends on, as JSON.
        after: Fingerprint of the stages before it; empty for the first one.
        run: Runs it; returns what verification came to, None where nothing is verified.
        shared: Whether all processes take part.
        adds: Whether it adds to the folder of a stage before it, and has none of its own.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    after: str
    run: Callable[[], State | None]
    shared: bool = False
    adds: bool = False

    @property
    def fingerprint(self) -> str:
        """Tells this stage, with these settings and after these stages, from all others."""
        text = json.dumps([self.name, self.settings, self.after], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def is_done(stage: Stage, known: Mapping[str, Any]) -> bool:
    """Whether what ``stages.json`` holds of a stage is this stage, done."""
    return bool(known) and known["done"] and known["fingerprint"] == stage.fingerprint and stage.folder.is_dir()


def changes(stage: Stage, known: Mapping[str, Any]) -> list[str]:
    """What is different from when a stage was begun, for people; empty if it can be gone on with."""
    if not known:
        return []
    if known["done"] and not stage.adds and not stage.folder.is_dir():
        return [f"{stage.folder} is gone"]
    return [f"{stage.name}: {line}" for line in _differences(known["settings"], json.loads(json.dumps(stage.settings)))]


def recorded_state(record: Mapping[str, Any]) -> State | None:
    """What verification came to; records of the time before there were three states say whether it held."""
    if "state" in record:
        state: State | None = record["state"]
        return state
    return {True: "held", False: "did_not_hold"}.get(record["held"])  # type: ignore[return-value]


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        return [
            line
            for name in names
            for line in _differences(old.get(name), new.get(name), f"{path}.{name}" if path else str(name))
        ]
    return [] if old == new else [f"{path} was {json.dumps(old)}, is {json.dumps(new)}"]


class _StageRecord(TypedDict):
    """What is kept of a stage; stages that failed have no state."""

    done: bool
    state: NotRequired[str | None]
    seconds: NotRequired[float]
    fingerprint: str
    settings: dict[str, Any]


_RECORDS: Final = TypeAdapter(dict[str, _StageRecord])


def read_records(out: Path) -> dict[str, Any]:
    """Read what is known of a recipe's stages: name -> record; empty where nothing was begun.

    Raises:
        SparsepassError: If the file is damaged.
    """
    path = out / STAGES_FILE
    if not path.exists():
        return {}
    advice = "it is damaged: remove it, and run with --force to begin anew"
    found = read_object(path, allowed=NON_FINITE, advice=advice)
    check_as(_RECORDS, found, str(path), advice=advice)
    return found


def record_stage(out: Path, stage: Stage, *, done: bool, state: State | None = None, seconds: float = 0.0) -> None:
    """Write down that a stage was begun, or is done."""
    record = {
        "done": done, "state": state, "seconds": seconds, "fingerprint": stage.fingerprint, "settings": stage.settings,
    }  # fmt: skip
    _store(out, read_records(out) | {stage.name: record})


def forget_stage(out: Path, name: str) -> None:
    """Write down that a stage has to be run."""
    _store(out, {known: record for known, record in read_records(out).items() if known != name})


def _store(out: Path, records: Mapping[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / STAGES_FILE, json.dumps(records, indent=1) + "\n")
