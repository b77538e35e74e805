"""A pass is held to what it states of itself, whoever wrote it. A program knows who changed its weights, wherever it goes."""

import copy
import dataclasses
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from tests.families import BY_NAME, captured

from sparsepass import _plugins
from sparsepass.graph import PassError, Program, Site
from sparsepass.graph.rewrite import attach_mask
from sparsepass.graph.saved import PROGRAM_FILE
from sparsepass.graph.support import write_checksums
from sparsepass.passes import Condition, Facts, GroupContext, Needs, Pass, SiteGroup, apply_passes

BATCHES = BY_NAME["llama"].inputs(4, 16)
DOWN = "model.layers.0.mlp.down_proj.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EveryOther(Pass):
    """A pass of another package: it keeps every other weight, times a factor."""

    name: ClassVar[str] = "every_other"
    promise: ClassVar[Literal["exact", "approximate"]] = "approximate"

    factor: float = 1.0
    reads_norms: bool = False
    keeps: int = 2
    attaches: bool = True

    @property
    def needs(self) -> Needs:
        return "norms" if self.reads_norms else "nothing"

    @property
    def provides(self) -> Mapping[Condition, str]:
        changed = {Condition.CHANGED: "write every_other{factor=1.0}"} if self.factor != 1 else {}
        return {Condition.MASKED: ""} | changed

    def refusal(self, site: Site, program: Program) -> str | None:
        return "not linear" if site.layout != "linear" else None

    def rewrite(self, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
        for site in group.sites:
            row = (torch.arange(site.in_features) % 4 < self.keeps).flip(0)
            program.write_tensor(site.weight, program.tensor(site.weight).detach() * self.factor)
            if self.attaches:
                attach_mask(program, site, row.expand(site.shape).contiguous(), "2:4")
        return {}

    def ensures(self, site: Site, program: Program) -> str | None:
        state = program.sparse[site.weight]
        assert state.mask is not None
        kept = int(program.tensor(state.mask).sum())
        return None if 2 * kept == program.tensor(site.weight).numel() else f"{kept} weights are kept, and not one half"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name, value = "every_other", "somewhere:EveryOther"

        def load(self) -> type[Pass]:
            return _EveryOther

    monkeypatch.setattr(_plugins, "entry_points", lambda group: [Entry()] if group == "sparsepass.passes" else [])


@pytest.mark.usefixtures("installed")
def test_slorb_works_after_masks_of_another_package() -> None:
    program = apply_passes(captured("llama"), "every_other,slorb{k=4}")
    assert program.history[-1].num_rewritten == 14
    fitted = apply_passes(apply_passes(captured("llama"), "every_other"), "slorb{k=4}", calibration=BATCHES)
    assert "init=least_squares" in fitted.recipe
    folded = apply_passes(program, "fold")
    assert all(state.mask is None and state.branch is not None for state in folded.sparse.values())


@pytest.mark.usefixtures("installed")
def test_the_originals_of_another_package_are_known_in_the_same_run() -> None:
    """Least squares fit what was lost: scaled by 0.5, the branch must be fitted to the whole weight."""
    half = apply_passes(captured("llama"), "every_other{factor=0.5,reads_norms=true},slorb{k=4}", calibration=BATCHES)
    whole = apply_passes(captured("llama"), "every_other{reads_norms=true},slorb{k=4}", calibration=BATCHES)
    assert {state.changed_by for state in whole.sparse.values()} == {None}
    assert {str(state.changed_by).partition("{")[0] for state in half.sparse.values()} == {"every_other"}
    first = "model.layers.0.self_attn.q_proj"
    error = {p: next(float(o.facts["relative_error"]) for o in p.history[1].outcomes if o.site == first) for p in (half, whole)}
    assert error[half] > error[whole]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("first", "then", "calibrated", "told"),
    [
        ("", "every_other{factor=0.5},learn_masks", False, r"every_other changes them; write every_other\{factor=1.0\}"),
        (
            "every_other{factor=0.5}",
            "learn_masks",
            False,
            r"every_other\{.* has changed them in an earlier run; .*factor=1.0\}",
        ),
        ("every_other{factor=0.5}", "slorb{k=4}", True, "has changed them in an earlier run; .* both passes in one call"),
        ("", "every_other{factor=0.5},slorb{k=4}", True, "needs the original weight, which every_other.* has changed"),
        ("", "every_other,nm_sparsify", False, "made sparse already"),
        ("", "slorb", False, "put nm_sparsify or every_other before it"),
        ("", "reconstruct", True, "same call as nm_sparsify or every_other"),
        ("nm_sparsify,fold", "fold", False, "this has been done already; leave fold out"),
        ("nm_sparsify,slorb{k=4}", "slorb{k=4}", False, "layers have branches already; leave slorb out"),
        ("nm_sparsify,fold", "slorb{k=4}", False, "have been folded already"),
    ],
)
def test_the_order_is_told_by_conditions(first: str, then: str, calibrated: bool, told: str) -> None:
    program = apply_passes(captured("llama"), first) if first else captured("llama")
    with pytest.raises(PassError, match=told):
        apply_passes(program, then, calibration=BATCHES if calibrated else None)


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (_EveryOther(keeps=1), r"every_other .* promises: 512 weights are kept, and not one half"),
        (_EveryOther(attaches=False), r"every_other .* promises: the layer is not masked"),
    ],
)
def test_a_broken_promise_is_refused_by_name(item: Pass, told: str) -> None:
    with pytest.raises(PassError, match=told):
        apply_passes(captured("llama"), [dataclasses.replace(item, targets=("model.layers.0.mlp.down_proj",))])


def test_nm_sparsify_ensures_its_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsepass.passes import nm_sparsify

    def everything(program: Program, site: Site, mask: torch.Tensor, pattern: str) -> None:
        attach_mask(program, site, torch.ones_like(mask), pattern)

    monkeypatch.setattr(nm_sparsify, "attach_mask", everything)
    with pytest.raises(PassError, match=r"nm_sparsify .* groups of the weight are not 2:4; this is a defect of the pass"):
        apply_passes(captured("llama"), "nm_sparsify")


_CHANGES = {
    "nm_sparsify{criterion=magnitude}": False,
    "nm_sparsify{criterion=wanda}": False,
    "nm_sparsify{criterion=sparsegpt}": True,
    "nm_sparsify{criterion=sparsegpt,compensate=false}": False,
    "nm_sparsify{criterion=wanda,refine=2}": True,
    "nm_sparsify{criterion=magnitude},reconstruct{steps=4}": True,
    "nm_sparsify{criterion=magnitude},slorb{k=4}": False,
    "nm_sparsify{criterion=sparsegpt},fold": True,
    "nm_sparsify{criterion=magnitude},fold": False,
}


@pytest.mark.parametrize("text", list(_CHANGES))
def test_who_changed_a_weight_is_state_of_the_program(text: str, tmp_path: Path) -> None:
    dense = captured("llama")
    program = apply_passes(dense, text, calibration=BATCHES, compute="float32")
    for weight, state in program.sparse.items():
        if state.mask is not None:
            assert (state.changed_by is None) == torch.equal(program.tensor(weight), dense.tensor(weight))
    assert any(state.changed_by is not None for state in program.sparse.values()) == _CHANGES[text]
    program.save(tmp_path / "program")
    for twin in (Program.load(tmp_path / "program"), copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
        assert twin.sparse == program.sparse
    # A file of format 1 does not say it; its history does.
    file = tmp_path / "program" / PROGRAM_FILE
    document = json.loads(file.read_text(encoding="utf-8"))
    for state in document["sparse"].values():
        del state["changed_by"]
    file.write_text(json.dumps(document | {"format_version": 1}), encoding="utf-8")
    write_checksums(file.parent)
    old = Program.load(tmp_path / "program")
    assert any(state.changed_by is not None for state in old.sparse.values()) == _CHANGES[text]
    assert DOWN in old.sparse


@pytest.mark.parametrize(("method", "changed"), [("ast", {"retrain"}), ("maskllm", {None})])
def test_training_of_format_1_counts(method: str, changed: set[str | None], tmp_path: Path) -> None:
    program = apply_passes(captured("llama"), "nm_sparsify{criterion=magnitude}")
    program.save(tmp_path / "program")
    file = tmp_path / "program" / PROGRAM_FILE
    document = json.loads(file.read_text(encoding="utf-8"))
    document |= {"format_version": 1, "retraining": [{"settings": {"method": method}}]}
    file.write_text(json.dumps(document), encoding="utf-8")
    write_checksums(file.parent)
    assert {state.changed_by for state in Program.load(tmp_path / "program").sparse.values()} == changed
