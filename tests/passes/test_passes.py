"""The contract of every pass, over every family; and what each pass does."""

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from tests.families import BY_NAME, FAMILIES, captured, tensors_of
from torch import nn

from sparsepass import _plugins
from sparsepass.graph import PassError, Program, Site, SparsepassError, capture
from sparsepass.passes import (
    PASSES,
    Facts,
    Fold,
    GroupContext,
    Needs,
    NMSparsify,
    Pass,
    SiteGroup,
    SLoRB,
    apply_passes,
    parse_pipeline,
    pipeline_to_text,
)
from sparsepass.passes.base import matches
from sparsepass.passes.maths.pattern import NMPattern, is_nm, nm_mask

# What stands before a pass so that it has something to do, and its own options for models this small.
_BEFORE = {
    "fold_norms": "",
    "rotate": "",
    "permute_channels": "",
    "awq_scale": "",
    "fuse_siblings": "",
    "nm_sparsify": "",
    "slorb": "nm_sparsify",
    "learn_masks": "nm_sparsify",
    "fold": "nm_sparsify",
    "reconstruct": "",
    "quantize": "nm_sparsify",
    "quantize_embedding": "nm_sparsify,quantize",
}
_OPTIONS = {
    "slorb": "slorb{k=4}", "rotate": "rotate{steps=3}",
    "reconstruct": "nm_sparsify{criterion=magnitude},reconstruct{steps=2}",
}  # fmt: skip
_CALIBRATED = ("reconstruct", "awq_scale", "rotate")
# What these find to be best already, they leave as it is: no error, since it takes the work itself to know.
_FINDS_OUT = ("permute_channels",)
_NOTHING_TO_DO = {
    "fold_norms": ("bert", "convnet"),
    "rotate": ("convnet",),
    "fuse_siblings": ("phi3", "gpt2", "gpt_neox", "convnet"),
}
_NAMES = [family.name for family in FAMILIES]


def _same(a: Program, b: Program, name: str) -> bool:
    inputs = BY_NAME[name].inputs(3, 7)
    with torch.no_grad():
        return all(torch.equal(x, y) for x, y in zip(tensors_of(a(**inputs)), tensors_of(b(**inputs)), strict=True))


def _ready(name: str, pass_name: str) -> Program:
    program = captured(name)
    if pass_name == "fold_norms":  # gains of a new model are 1
        for tensor_name, tensor in program.tensors().items():
            if tensor.dim() == 1 and isinstance(tensor, nn.Parameter):
                program.write_tensor(tensor_name, tensor.detach() + 0.1 * torch.randn_like(tensor))
    return apply_passes(program, _BEFORE[pass_name], inplace=True) if _BEFORE[pass_name] else program


@pytest.mark.parametrize("family", _NAMES)
@pytest.mark.parametrize("name", list(PASSES))
def test_contract(name: str, family: str, tmp_path: Path) -> None:
    text = _OPTIONS.get(name, name)
    *others, item = parse_pipeline(text)
    assert parse_pipeline(pipeline_to_text([*others, item])) == (*others, item)
    calibration = BY_NAME[family].inputs(4, 8) if name in _CALIBRATED else None

    before = _ready(family, name)
    reference = copy.deepcopy(before)
    if family in _NOTHING_TO_DO.get(name, ()):
        with pytest.raises(PassError, match="no layer can be rewritten"):
            apply_passes(before, text, calibration=calibration)
        return
    program = apply_passes(before, text, calibration=calibration)
    assert _same(before, reference, family), "the given program was changed"
    assert before.history == reference.history

    record = program.history[-1]
    assert record.num_rewritten > 0
    assert {o.site for o in record.outcomes} == {s.name for s in program.report().sites}
    assert all(o.reason for o in record.outcomes if o.action == "skipped"), "every skipped site is explained"
    assert record.validation is not None
    assert parse_pipeline(record.text)[0].name == name
    if item.promise == "exact":
        assert record.validation["relative_error"] <= (1e-5 if item.prepares else 0)
        assert item.prepares or _same(program, before, family)

    # A second run rewrites nothing: it says why, and leaves the program as it was.
    again = copy.deepcopy(program)
    if name in _FINDS_OUT:
        apply_passes(again, text, calibration=calibration, inplace=True)
        assert again.history[:-1] == program.history
        assert again.history[-1].num_rewritten == 0
        assert all(outcome.reason for outcome in again.history[-1].outcomes)
    else:
        with pytest.raises(PassError):
            apply_passes(again, text, calibration=calibration, inplace=True)
        assert again.history == program.history
    assert _same(again, program, family)

    program.save(tmp_path / "program")
    for twin in (copy.deepcopy(program), pickle.loads(pickle.dumps(program)), Program.load(tmp_path / "program")):
        assert _same(twin, program, family)
        assert twin.history == program.history
        assert twin.sparse == program.sparse


@pytest.mark.parametrize("family", _NAMES)
def test_nm_sparsify_and_slorb_work_on_every_family(family: str) -> None:
    model = BY_NAME[family].model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = apply_passes(model, ["nm_sparsify", "slorb{k=4}"], example_inputs=BY_NAME[family].inputs(2, 8))
    report = program.report()
    sparse = {site.name for site in program.sites() if site.weight in program.sparse}
    assert sparse | report.skipped().keys() == {site.name for site in program.sites()}
    assert all(report.skipped().values())
    assert len(sparse) >= len(program.sites()) / 3
    for site in program.sites():
        if site.weight in program.sparse:
            state = program.sparse[site.weight]
            assert state.mask is not None
            folded = torch.ops.sparsepass.masked_weight(program.tensor(site.weight), program.tensor(state.mask))
            assert is_nm(folded, NMPattern.parse("2:4"), state.axis), site.name
            linear = site.layout in ("linear", "conv1d_hf")
            assert (state.branch is not None) == (linear and site.in_features % 4 == 0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the user's model was changed"
    assert "skipped" in str(report)


def test_magnitude_masks_are_the_largest_weights_and_the_rest_stays_behind_the_mask() -> None:
    program = captured("llama")
    dense = {name: tensor.clone() for name, tensor in program.tensors().items()}
    program = apply_passes(program, "nm_sparsify{pattern=1:4}")
    for weight, state in program.sparse.items():
        assert state.mask is not None
        assert torch.equal(program.tensor(state.mask), nm_mask(dense[weight].abs(), NMPattern.parse("1:4")))
        assert torch.equal(program.tensor(weight), dense[weight])


@pytest.mark.parametrize(
    ("passes", "has_text", "warned"),
    [("nm_sparsify", False, True), ("nm_sparsify{criterion=magnitude}", False, False), ("nm_sparsify", True, False)],
)
def test_magnitude_that_nobody_chose_is_warned_of(
    passes: str, has_text: bool, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = BY_NAME["llama"].model()
    apply_passes(model, passes, calibration=torch.arange(32).reshape(2, 16) if has_text else None)
    assert ("useless until it is retrained" in caplog.text) == warned


def test_sparsegpt_keeps_the_original_weights_behind_the_mask() -> None:
    dense = captured("llama")
    program = apply_passes(dense, "nm_sparsify", calibration=BY_NAME["llama"].inputs(4, 16))
    assert "criterion=sparsegpt" in program.recipe
    moved = 0
    for weight, state in program.sparse.items():
        assert state.mask is not None
        mask = program.tensor(state.mask)
        assert torch.equal(program.tensor(weight)[~mask], dense.tensor(weight)[~mask])
        moved += int((program.tensor(weight)[mask] != dense.tensor(weight)[mask]).sum())
    assert moved > 0


def test_least_squares_slorb_beats_the_mean_and_no_branch() -> None:
    batches = BY_NAME["llama"].inputs(8, 24)
    errors = {}
    for name, passes in {
        "none": ["nm_sparsify"],
        "mean": ["nm_sparsify", "slorb{k=4,init=mean}"],
        "least_squares": ["nm_sparsify", "slorb{k=4}"],
    }.items():
        program = apply_passes(captured("llama"), passes, calibration=batches)
        validation = program.history[-1].validation
        assert validation is not None
        errors[name] = validation["relative_error"]
    assert errors["least_squares"] < errors["none"]
    assert errors["least_squares"] < errors["mean"]


def test_a_sweep_measures_each_pass_by_itself() -> None:
    batches = BY_NAME["llama"].inputs(4, 16)
    program = apply_passes(captured("llama"), ["nm_sparsify", "slorb{k=4}"], calibration=batches)
    masked, boosted = (record.validation for record in program.history)
    assert masked is not None
    assert boosted is not None
    assert boosted["relative_error"] < masked["relative_error"]
    for site in program.sites():
        state = program.sparse.get(site.weight)
        if state is not None:
            assert state.branch is not None
            assert program.tensor(state.branch.weight).abs().max() > 0, "the branch is back after the measurement"


def test_trainable_projection_starts_as_the_fixed_one() -> None:
    fixed = apply_passes(captured("llama"), ["nm_sparsify", "slorb{k=4}"])
    free = apply_passes(captured("llama"), ["nm_sparsify", "slorb{k=4,projection=trainable}"])
    inputs = BY_NAME["llama"].inputs(2, 9)
    torch.testing.assert_close(free(**inputs).logits, fixed(**inputs).logits, rtol=1e-4, atol=1e-5)
    branch = free.sparse["model.layers.0.mlp.down_proj.weight"].branch
    assert branch is not None
    assert branch.projection is not None
    assert free.tensor(branch.projection).shape == (16, 64)


def test_siblings_share_one_projection() -> None:
    program = apply_passes(captured("llama"), ["nm_sparsify", "slorb{k=4}"])
    sums = [n for n in program.graph_module.graph.nodes if n.target is torch.ops.aten.unflatten.int]
    assert len(sums) == 2 * 4  # per layer: q/k/v, o, gate/up, down


@pytest.mark.parametrize(
    ("targets", "ignore", "sparse"),
    [
        ((), ("*.mlp.*",), 8),
        (("*.mlp.*",), (), 6),
        (("re:.*layers\\.0\\..*",), ("*.o_proj",), 6),
        (("Linear",), (), 14),
        (("model.layers.1.mlp.down_proj",), (), 1),
        (("model.layers.1.mlp.down_proj.weight",), (), 1),
    ],
)
def test_targets_and_ignore(targets: tuple[str, ...], ignore: tuple[str, ...], sparse: int) -> None:
    program = apply_passes(captured("llama"), [NMSparsify(targets=targets, ignore=ignore)])
    assert program.report().num_sparse == sparse
    assert len(program.report().skipped()) == len(program.sites()) - sparse


@pytest.mark.parametrize(("pattern", "number"), [("q_proj", 2), ("mlp.up_proj", 2), ("proj", 0), ("0", 0)])
def test_the_last_parts_of_a_path_are_a_name(pattern: str, number: int) -> None:
    program = apply_passes(captured("llama"), NMSparsify(ignore=("*.v_proj",)))
    assert sum(matches(pattern, site) for site in program.sites()) == number
    if number:
        left = apply_passes(captured("llama"), NMSparsify(ignore=(pattern,)))
        assert len(left.sparse) == 14 - number
        assert len(apply_passes(captured("llama"), NMSparsify(targets=(pattern,))).sparse) == number


def test_two_runs_with_targets_of_their_own() -> None:
    program = apply_passes(
        captured("llama"),
        ["nm_sparsify{targets=*.mlp.*,pattern=2:4}", "nm_sparsify{targets=*.self_attn.*,pattern=1:4}"],
    )
    assert {state.pattern for state in program.sparse.values()} == {"2:4", "1:4"}
    assert program.report().num_sparse == 14


def test_an_output_head_is_pruned_when_it_is_named() -> None:
    program = apply_passes(captured("qwen2"), [NMSparsify(targets=("lm_head",))])
    assert list(program.sparse) == ["lm_head.weight"]


def test_inplace_takes_the_tensors_over() -> None:
    model = BY_NAME["llama"].model()
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    program = apply_passes(model, "nm_sparsify", inplace=True)
    assert program.tensor("model.layers.0.mlp.up_proj.weight") is weight
    copied = apply_passes(BY_NAME["llama"].model(), "nm_sparsify")
    assert copied.tensor("model.layers.0.mlp.up_proj.weight") is not weight


def test_inplace_prunes_within_the_memory_of_one_model() -> None:
    family = BY_NAME["llama"]
    model, untouched = family.model(), family.model()
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    passes = "nm_sparsify{criterion=sparsegpt},fold"
    program = apply_passes(model, passes, calibration=family.inputs(4, 16), inplace=True)
    expected = apply_passes(untouched, passes, calibration=family.inputs(4, 16))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    for name in program.sparse:
        assert torch.equal(model.get_parameter(name), expected.tensor(name))
        assert is_nm(model.get_parameter(name), NMPattern(2, 4))
        assert not is_nm(untouched.get_parameter(name), NMPattern(2, 4))


def _odd() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("passes", "calibration", "told"),
    [
        ("slorb", None, "put nm_sparsify before it"),
        ("fold", None, "put nm_sparsify before it"),
        (["nm_sparsify", "fold", "slorb"], None, "put slorb before fold"),
        (["nm_sparsify", "nm_sparsify"], None, "already"),
        (["nm_sparsify", "slorb{k=4}", "slorb{k=4}"], None, "twice"),
        (["nm_sparsify", "fold", "fold"], None, "twice"),
        ("nm_sparsify{criterion=wanda}", None, "needs calibration data"),
        ("slorb{init=least_squares}", None, "needs calibration data"),
        ("nm_sparsify{criterion=wanda}", [], "empty"),
        ("nm_sparsify{criterion=wanda}", torch.zeros(4, dtype=torch.long), "shape"),
        ("nm_sparsify{criterion=wanda}", torch.full((2, 8), 10**6), "vocab"),
        ("reconstruct", torch.ones(4, 8, dtype=torch.long), "same call as nm_sparsify"),
        ("nm_sparsify,reconstruct", None, "needs calibration data"),
        ("nm_sparsify,fold,reconstruct", torch.ones(4, 8, dtype=torch.long), "put reconstruct before fold"),
        ("nm_sparsify,fold_norms,reconstruct", torch.ones(4, 8, dtype=torch.long), "put fold_norms before nm_sparsify"),
        ("nm_sparsify,awq_scale,reconstruct", torch.ones(4, 8, dtype=torch.long), "put awq_scale before nm_sparsify"),
        ("awq_scale", None, "needs calibration data"),
        ("rotate", None, "needs calibration data"),
        ("nm_sparsify,rotate", torch.ones(4, 8, dtype=torch.long), "makes masks; put rotate before nm_sparsify"),
        ("nm_sparsify,reconstruct,reconstruct", torch.ones(4, 8, dtype=torch.long), "twice"),
        ("nm_sparsify,reconstruct,slorb{k=4}", torch.ones(4, 8, dtype=torch.long), "put slorb before reconstruct"),
        ("nm_sparsify,reconstruct{batch_size=8}", torch.ones(4, 8, dtype=torch.long), "got 1 batch"),
        ("nm_sparsify{criterion=wanda},learn_masks,reconstruct", torch.ones(4, 8, dtype=torch.long), "leave one of the two"),
        ("nm_sparsify,reconstruct{lr=2}", None, "between 0 and 1"),
        ("nm_sparsify,reconstruct{steps=0}", None, "at least 1"),
        ("nm_sparsify,reconstruct{masks=soft}", None, "known: 'fixed', 'moving'"),
        (["nm_sparsify", "slorb{k=7}"], None, "not a multiple of k=7"),
        ("nm_sparsify{targets=model.layers.9}", None, "matches no layer"),
        ("nm_sparsify{pattern=2:5}", None, "not a multiple of 5"),
        ([], None, "empty"),
    ],
)
def test_bad_pipelines_are_refused_before_anything_changes(passes: str | list[str], calibration: object, told: str) -> None:
    program = captured("llama")
    before = copy.deepcopy(program)
    with pytest.raises(SparsepassError) as error:
        apply_passes(program, passes, calibration=calibration, inplace=False)
    assert told in str(error.value)
    assert _same(program, before, "llama")


def test_odd_features_are_skipped_with_a_reason_and_refused_when_named() -> None:
    program = apply_passes(_odd(), "nm_sparsify", example_inputs=torch.randn(2, 30))
    assert program.report().skipped()["0"] == "in_features 30 is not a multiple of 4"
    with pytest.raises(PassError, match="30 is not a multiple of 4"):
        apply_passes(_odd(), [NMSparsify(targets=("0",))], example_inputs=torch.randn(2, 30))


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        ("nm_sparsify{criterion=magnitude}", ""),
        ("nm_sparsify{criterion=magnitude,refine=2}", "in 2 groups: refine has no statistics"),
        ("nm_sparsify{criterion=wanda}", "in 2 groups: wanda has no statistics"),
    ],
)
def test_a_convolution_in_groups_takes_plain_magnitude(passes: str, told: str) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    images = torch.randn(4, 8, 4, 4)
    report = apply_passes(model, passes, calibration=[(images,)], example_inputs=images).report()
    assert told in report.skipped().get("0", "")
    assert ("0" in report.skipped()) == bool(told)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_bad_weights_name_the_layer(bad: float) -> None:
    model = _odd()
    with torch.no_grad():
        model.get_parameter("2.weight")[3, 1] = bad
    with pytest.raises(PassError, match=r"at 2: .*NaN or Inf"):
        apply_passes(model, "nm_sparsify", example_inputs=torch.randn(2, 30))


def test_least_squares_after_an_earlier_sparsegpt_run_is_refused() -> None:
    batches = BY_NAME["llama"].inputs(4, 16)
    program = apply_passes(captured("llama"), "nm_sparsify", calibration=batches)
    with pytest.raises(PassError, match="original weights"):
        apply_passes(program, "slorb{k=4}", calibration=batches)
    wanda = apply_passes(captured("llama"), "nm_sparsify{criterion=wanda}", calibration=batches)
    assert apply_passes(wanda, "slorb{k=4}", calibration=batches).history[-1].num_rewritten == 14


def test_too_few_tokens_raise_the_damping_and_say_so() -> None:
    ids = {"input_ids": torch.full((1, 2), 5)}
    program = apply_passes(captured("llama"), "nm_sparsify{damping=0.0}", calibration=ids, compute="float32")
    notes = [o.facts["note"] for o in program.history[0].outcomes if "note" in o.facts]
    assert notes
    assert "damping" in str(notes[0])


def test_fold_leaves_strict_weights_and_no_masks() -> None:
    program = apply_passes(captured("gpt2"), ["nm_sparsify", "fold"])
    for weight, state in program.sparse.items():
        assert state.mask is None
        assert is_nm(program.tensor(weight).detach(), NMPattern.parse("2:4"), state.axis)
        zeros = program.tensor(weight)[program.tensor(weight) == 0]
        assert not torch.signbit(zeros).any()
    assert not any(name.endswith("mask") for name in program.tensors())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Liar(Pass):
    """A pass that promises to be exact and is not."""

    name: ClassVar[str] = "liar"
    promise: ClassVar[Literal["exact", "approximate"]] = "exact"

    @property
    def needs(self) -> Needs:
        return "nothing"

    def check(self, program: Program, before: object) -> None:
        pass

    def refusal(self, site: Site, program: Program) -> str | None:
        return None

    def rewrite(self, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
        for site in group.sites:
            program.set_tensor(site.weight, program.tensor(site.weight).detach() * 1.5)
        return {}


def test_validation_catches_a_pass_that_breaks_its_promise() -> None:
    with pytest.raises(PassError, match="promises to be exact"):
        apply_passes(captured("llama"), [_Liar()])


def test_passes_of_other_packages_join_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name, value = "liar", "somewhere:Liar"

        def load(self) -> type[Pass]:
            return _Liar

    monkeypatch.setattr(_plugins, "entry_points", lambda group: [Entry()])
    assert parse_pipeline("liar") == (_Liar(),)
    monkeypatch.setattr(_Liar, "name", "fold")
    with pytest.raises(SparsepassError, match="taken"):
        parse_pipeline("fold")


def test_passes_are_frozen() -> None:
    for item in (NMSparsify(), SLoRB(), Fold()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            item.targets = ("x",)  # type: ignore[misc]


def test_a_captured_program_can_be_captured_no_more() -> None:
    with pytest.raises(SparsepassError, match="program already"):
        capture(captured("llama"))
