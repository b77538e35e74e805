"""Rounding weights: no zero is lost, the graph computes with what integers and scales say, and what spoils that is refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import BY_NAME, captured, tensors_of
from torch import Tensor, nn

from sparsepass.export.pattern import check_pattern
from sparsepass.graph import PassError, Program, ProgramFormatError, SparsepassError, capture
from sparsepass.graph.fusion import split_siblings
from sparsepass.graph.ops import rounded_rows
from sparsepass.graph.program import masked_weight
from sparsepass.graph.rewrite import detach_grid, finish, fold_grid
from sparsepass.graph.rounding import RoundingGrid, round_to_nearest
from sparsepass.graph.saved import PROGRAM_FILE
from sparsepass.graph.support import CHECKSUMS_FILE
from sparsepass.passes import Quantize, apply_passes

DOWN = "model.layers.0.mlp.down_proj.weight"
OPTIONS = [
    "", "{bits=8}", "{symmetric=false}", "{bits=8,symmetric=false,group_size=0}", "{group_size=16,clip=weights}",
    "{format=fp8}", "{format=fp8,group_size=16,clip=weights}",
]  # fmt: skip


def _outputs(program: Callable[..., Any], name: str) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(program(**BY_NAME[name].inputs(3, 7)))


def _numbers(program: Program, weight: str) -> Tensor:
    """The integers of a weight, in the layout of its rows."""
    state = program.quantized[weight]
    zeros = None if state.zero_points is None else program.tensor(state.zero_points)
    mask = program.sparse[weight].mask
    assert mask is not None
    behind = program.tensor(weight).detach() * program.tensor(mask)
    scales = program.tensor(state.scales)
    return rounded_rows(behind, scales, zeros, *state.call).numbers_OI.float()  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "convnet"])
def test_no_zero_is_lost_in_any_layout(family: str, options: str) -> None:
    masked = apply_passes(captured(family), "nm_sparsify")
    program = apply_passes(masked, f"quantize{options}")
    sites = {site.weight: site for site in program.sites()}
    assert program.quantized.keys() >= program.sparse.keys()
    for weight, sparse in program.sparse.items():
        site, grid = sites[weight], program.quantized[weight].grid
        assert sparse.mask is not None
        dropped_OI = ~site.to_matrix(program.tensor(sparse.mask))
        numbers_OI = _numbers(program, weight).view(dropped_OI.shape)
        state = program.quantized[weight]
        columns, size = dropped_OI.shape[-1], grid.group_size or dropped_OI.shape[-1]
        zero = torch.zeros(())
        if state.zero_points is not None:
            zero = program.tensor(state.zero_points).repeat_interleave(size, dim=-1)[..., :columns]
        assert not bool(((numbers_OI - zero) * dropped_OI).any()), "a dropped weight's integer is that of 0"
        assert torch.equal(program.tensor(weight), masked.tensor(weight)), "the weight itself stays behind the rounding"
    assert check_pattern(program, expected_sparse=list(program.sparse)).conforms


def test_the_graph_computes_with_what_integers_and_scales_say() -> None:
    program = apply_passes(captured("llama"), "nm_sparsify,quantize{group_size=16,symmetric=false}")
    by_hand = apply_passes(captured("llama"), "nm_sparsify,fold")
    for weight, state in program.quantized.items():
        rounded = round_to_nearest(by_hand.tensor(weight), RoundingGrid(group_size=16, symmetric=False))
        by_hand.write_tensor(weight, rounded.weight_OI)
        assert torch.equal(masked_weight(program, weight), rounded.weight_OI)
        assert torch.equal(program.tensor(state.scales), rounded.scales_OG)
    for found, expected in zip(_outputs(program, "llama"), _outputs(by_hand, "llama"), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("masks", ["keep", "choose"])
@pytest.mark.parametrize("number_format", ["int", "fp8"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "convnet"])
def test_joint_rounding_keeps_the_pattern_in_any_layout(family: str, number_format: str, masks: str) -> None:
    dense, inputs = captured(family), BY_NAME[family].inputs(8, 16)
    first = "nm_sparsify{criterion=magnitude}"
    options = f"format={number_format},method=joint,masks={masks}"
    program = apply_passes(dense, f"{first},quantize{{{options}}}", calibration=inputs)
    masked = apply_passes(dense, first)
    moved = 0
    for weight, sparse in program.sparse.items():
        if weight not in program.quantized:
            continue
        state = program.quantized[weight]
        scales, behind = program.tensor(state.scales), program.tensor(weight)
        assert sparse.mask is not None
        mask, before = program.tensor(sparse.mask), masked.tensor(f"{sparse.mask}")
        moved += int((mask != before).sum())
        assert torch.equal(masked_weight(program, weight)[mask], behind[mask]), "what is kept lies on the grid"
        assert torch.equal(behind[~mask], dense.tensor(weight)[~mask]), "what is dropped stays behind the mask"
        assert sparse.changed_by is not None
        assert scales.dtype == torch.bfloat16
    assert (moved > 0) == (masks == "choose")
    assert check_pattern(program, expected_sparse=list(program.sparse)).conforms


@pytest.mark.parametrize("grid", ["group_size=16", "format=fp8"])
def test_joint_rounding_moves_outputs_less(grid: str) -> None:
    inputs = BY_NAME["llama"].inputs(16, 24)
    start = apply_passes(captured("llama"), "nm_sparsify{criterion=sparsegpt}", calibration=inputs)
    error = {}
    for method in ("rtn", "joint"):
        found = apply_passes(start, f"quantize{{method={method},{grid}}}", calibration=inputs).history[-1].validation
        assert found is not None
        error[method] = found["relative_error"]
    assert error["joint"] < 0.9 * error["rtn"]


def test_joint_rounding_of_dense_and_of_folded_layers() -> None:
    inputs = BY_NAME["llama"].inputs(8, 16)
    dense = apply_passes(captured("llama"), "quantize{method=joint}", calibration=inputs)
    assert not bool((masked_weight(dense, DOWN).unflatten(1, (-1, 4)) == 0).sum(-1).ge(2).all())
    folded = apply_passes(captured("llama"), "nm_sparsify,fold,quantize{method=joint}", calibration=inputs)
    assert check_pattern(folded, expected_sparse=list(folded.sparse)).conforms


def test_an_expert_without_tokens_is_rounded_to_the_nearest() -> None:
    dense = captured("qwen3_moe")
    with torch.no_grad():
        for name, tensor in dense.tensors().items():
            if name.endswith("mlp.gate.weight"):
                tensor[0] = 0.0
                tensor[1:] *= 100
    inputs = {"input_ids": torch.full((1, 2), 7)}
    program = apply_passes(dense, "nm_sparsify{criterion=magnitude},quantize{method=joint,masks=choose}", calibration=inputs)
    notes = [str(o.facts.get("note", "")) for o in program.history[-1].outcomes]
    assert any("saw no calibration token and was rounded to the nearest" in note for note in notes)
    assert check_pattern(program, expected_sparse=list(program.sparse)).conforms


def test_a_pass_before_a_joint_one_is_not_measured_with_it() -> None:
    inputs = BY_NAME["llama"].inputs(4, 16)
    program = apply_passes(captured("llama"), "nm_sparsify,quantize{method=joint}", calibration=inputs)
    pruned, rounded = program.history
    assert pruned.validation is None
    assert rounded.validation is not None


def test_dense_layers_are_rounded_too_and_a_scale_a_row_is_coarser() -> None:
    errors = []
    for group_size in (16, 0):
        program = apply_passes(captured("gpt2"), Quantize(group_size=group_size))
        assert not program.sparse
        assert len(program.quantized) == 8
        validation = program.history[-1].validation
        assert validation is not None
        errors.append(validation["relative_error"])
    assert errors[0] < errors[1]


def test_the_report_says_what_is_quantized() -> None:
    report = apply_passes(captured("llama"), "nm_sparsify,quantize{targets=*.mlp.*}").report()
    assert "2:4 int4, groups of 64" in str(report).replace("\n", " ")
    assert "14 of 15 layers sparse, 6 quantized" in str(report)
    assert report.to_dict()["quantized"]["model.layers.0.mlp.down_proj"] == "int4, groups of 64"
    assert "quantized" not in apply_passes(captured("llama"), "nm_sparsify").report().to_dict()


def test_clipping_narrows_ranges_and_experts_have_statistics_of_their_own() -> None:
    inputs = BY_NAME["mixtral"].inputs(8, 16)
    scales, errors = {}, {}
    for clip in ("none", "weights", "outputs"):
        program = apply_passes(captured("mixtral"), f"quantize{{clip={clip},group_size=0}}", calibration=inputs)
        scales[clip] = torch.cat([program.tensor(state.scales).flatten() for state in program.quantized.values()])
        errors[clip] = sum(float(outcome.facts.get("relative_error", 0)) for outcome in program.history[-1].outcomes)
    assert errors["weights"] < errors["none"]
    assert bool((scales["outputs"] <= scales["none"]).all())
    assert bool((scales["outputs"] != scales["weights"]).any())


@pytest.mark.parametrize(
    ("passes", "calibrated", "told"),
    [
        ("quantize,quantize", False, "quantize stands in the pipeline twice"),
        ("quantize,nm_sparsify", False, "weights are pruned before they are rounded: quantize rounds weights; put nm_sparsify"),
        ("nm_sparsify,quantize,slorb{k=4}", False, "put slorb before quantize"),
        ("nm_sparsify,quantize,learn_masks", False, "put learn_masks before quantize"),
        ("nm_sparsify,learn_masks,quantize", False, "still moves, so train it first"),
        ("nm_sparsify,quantize,reconstruct{steps=1}", True, "put reconstruct before quantize"),
        ("nm_sparsify,reconstruct{steps=1},quantize{clip=outputs}", True, "put it into a call after reconstruct"),
        ("quantize,fold_norms", False, "put fold_norms before quantize"),
        ("quantize,awq_scale", True, "put awq_scale before quantize"),
        ("quantize,permute_channels", False, "put permute_channels before quantize"),
        ("quantize{clip=outputs}", False, "needs calibration data"),
        ("quantize{method=joint}", False, "needs calibration data"),
        (
            "quantize{method=joint,masks=choose}",
            True,
            "from the dense model's weights, so start from that, in the same call as",
        ),
        ("nm_sparsify,slorb{k=4},quantize{method=joint,masks=choose}", True, "masks=choose makes another mask"),
        ("nm_sparsify,awq_scale,quantize{method=joint,masks=choose}", True, "use masks=keep"),
        ("nm_sparsify,quantize{masks=choose}", False, "masks=choose is for method=joint"),
        ("nm_sparsify{criterion=wanda},quantize{method=joint},learn_masks", True, "put learn_masks before quantize"),
        ("quantize{method=joint,damping=-1}", True, "damping must be a finite fraction"),
        ("quantize{bits=3}", False, "8 or 4 bits, not to 3"),
        ("quantize{group_size=20}", False, "expects 16, 32, 64, 128, or 0"),
        ("quantize{clip=half}", False, "known: 'outputs', 'weights'"),
        ("quantize{format=fp8,bits=4}", False, "format=fp8 has 8 bits, not 4; leave bits out"),
        ("quantize{format=fp8,symmetric=false}", False, "symmetric=false is for integers"),
        ("quantize{format=fp4}", False, "format='fp4' is not known; did you mean 'fp8'"),
    ],
)
def test_wrong_orders_and_values_are_refused(passes: str, calibrated: bool, told: str) -> None:
    calibration = torch.ones(4, 8, dtype=torch.long) if calibrated else None
    with pytest.raises(SparsepassError) as error:
        apply_passes(captured("llama"), passes, calibration=calibration)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        (
            "nm_sparsify",
            "pruned before they are rounded: layers are quantized already; start from the program as it was before",
        ),
        ("nm_sparsify{targets=*.mlp.*}", "start from the program as it was before"),
        ("quantize", "weights are rounded once: layers are quantized already"),
        ("quantize{targets=*.mlp.*}", r"quantized already \(int4, groups of 64\)"),
        ("fold_norms", "scales were fitted to the weights as they are"),
        ("fold_norms{targets=*.layers.0.*}", "scales were fitted"),
        ("permute_channels{criterion=magnitude}", "tear the groups that share a scale"),
    ],
)
def test_a_quantized_program_is_not_pruned_or_prepared(passes: str, told: str) -> None:
    program = apply_passes(captured("llama"), "quantize")
    before = copy.deepcopy(program)
    with pytest.raises(PassError, match=told):
        apply_passes(program, passes, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(_outputs(program, "llama"), _outputs(before, "llama"), strict=True))
    assert program.history == before.history


def test_branches_stay_as_they_are_and_masks_fold_after_rounding() -> None:
    boosted = apply_passes(captured("llama"), "nm_sparsify,slorb{k=4}")
    program = apply_passes(boosted, "quantize,fold")
    branch = program.sparse[DOWN].branch
    assert branch is not None
    assert torch.equal(program.tensor(branch.weight), boosted.tensor(branch.weight))
    assert program.sparse[DOWN].mask is None
    assert torch.equal(masked_weight(program, DOWN), masked_weight(apply_passes(boosted, "quantize"), DOWN))


@pytest.mark.parametrize("first", ["quantize{symmetric=false}", "fuse_siblings"])
def test_fused_layers_are_quantized_and_taken_apart(first: str) -> None:
    then = "fuse_siblings" if first != "fuse_siblings" else "quantize{symmetric=false}"
    program = apply_passes(captured("llama"), f"nm_sparsify,{first},{then}")
    alone = apply_passes(captured("llama"), "nm_sparsify,quantize{symmetric=false}")
    assert any(weight in program.fused for weight in program.quantized)
    apart = split_siblings(program)
    assert apart.quantized == alone.quantized
    for name, tensor in alone.tensors().items():
        assert torch.equal(apart.tensor(name), tensor), name
    assert all(torch.equal(a, b) for a, b in zip(_outputs(apart, "llama"), _outputs(alone, "llama"), strict=True))


def test_layers_on_other_grids_are_not_fused() -> None:
    one = apply_passes(captured("llama"), "quantize{targets=q_proj}")
    program = apply_passes(one, "quantize{targets=k_proj,group_size=16},fuse_siblings")
    said = program.report().history[-1].outcomes
    told = {o.site.rpartition(".")[2]: o.reason for o in said if o.site.startswith("model.layers.0.self_attn")}
    assert "this layer is quantized (int4, groups of 64): that one is quantized (int4, groups of 16)" in told["q_proj"]


def test_grids_come_out_again() -> None:
    dense = captured("llama")
    program = apply_passes(dense, "quantize{symmetric=false}")
    folded = copy.deepcopy(program)
    for weight in list(program.quantized):
        fold_grid(folded, weight)
        detach_grid(program, weight)
    for each in (folded, program):
        finish(each)
        assert not each.quantized
        assert each.tensors().keys() == dense.tensors().keys()
    rounded = apply_passes(dense, "quantize{symmetric=false}")
    assert all(torch.equal(a, b) for a, b in zip(_outputs(folded, "llama"), _outputs(rounded, "llama"), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(_outputs(program, "llama"), _outputs(dense, "llama"), strict=True))


def test_its_model_has_the_rounded_weights() -> None:
    program = apply_passes(captured("llama"), "nm_sparsify,quantize")
    model = program.to_model()
    assert torch.equal(model.get_parameter(DOWN), masked_weight(program, DOWN))
    for found, expected in zip(_outputs(model, "llama"), _outputs(program, "llama"), strict=True):
        torch.testing.assert_close(found, expected)


def _state(document: Any) -> dict[str, Any]:
    found: dict[str, Any] = document["quantized"][DOWN]
    return found


def _call(document: Any) -> list[Any]:
    nodes = {node["name"]: node for node in document["graph"]["nodes"]}
    for node in nodes.values():
        if node["target"] == "sparsepass.quantized_weight.default" and "down_proj" in nodes[node["args"][1]["node"]]["target"]:
            args: list[Any] = node["args"]
            return args
    raise AssertionError


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: _state(d).update(bits=3), "quantized.*bits"),
        (lambda d: _state(d).update(scales="no.scales"), "its grid needs no.scales"),
        (lambda d: _state(d).update(group_size=32), "does not round it to its grid, uint4, groups of 32"),
        (lambda d: _state(d).update(zero_points=None), "does not round it to its grid, int4"),
        (lambda d: _state(d).update(format="fp4"), "quantized.*format"),
        (lambda d: _state(d).update(format="fp8"), "a grid of fp8 has 8 bits and no zero points"),
        (
            lambda d: _state(d).update(format="fp8", bits=8, zero_points=None),
            "does not round it to its grid, fp8, groups of 64",
        ),
        (lambda d: _call(d).append("fp4"), "does not round it to its grid"),
        (lambda d: d["quantized"].pop(DOWN), "the graph rounds it, and it is not said to be quantized"),
        (lambda d: _call(d).__setitem__(3, 8), "does not round it to its grid"),
        (lambda d: (_call(d).__setitem__(4, 5), _state(d).update(group_size=5)), "expects scales"),
    ],
)
def test_an_edited_file_is_refused(change: Callable[[Any], object], told: str, tmp_path: Path) -> None:
    apply_passes(captured("llama"), "nm_sparsify,quantize{symmetric=false}").save(tmp_path / "program")
    file = tmp_path / "program" / PROGRAM_FILE
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    (tmp_path / "program" / CHECKSUMS_FILE).unlink(missing_ok=True)
    with pytest.raises(ProgramFormatError, match=told):
        Program.load(tmp_path / "program")


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [("zero_points", 200, "beyond 15, so zeros are lost"), ("scales", float("nan"), "is not finite")],
)
def test_a_zero_that_a_file_would_lose_is_found(kind: str, value: float, told: str, tmp_path: Path) -> None:
    program = apply_passes(captured("llama"), "nm_sparsify,quantize{symmetric=false}")
    program.tensor(getattr(program.quantized[DOWN], kind))[1, 0] = value
    program.save(tmp_path / "program")
    with pytest.raises(ProgramFormatError, match=told):
        Program.load(tmp_path / "program")


def test_a_program_without_grids_is_written_as_before(tmp_path: Path) -> None:
    apply_passes(captured("llama"), "nm_sparsify").save(tmp_path / "program")
    assert "quantized" not in json.loads((tmp_path / "program" / PROGRAM_FILE).read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype).eval()
    program = apply_passes(capture(net, torch.randn(2, 48, dtype=dtype)), "nm_sparsify,quantize{group_size=32}")
    weight = masked_weight(program, "0.weight")
    assert weight.dtype == dtype
    assert program.tensor(program.quantized["0.weight"].scales).shape == (8, 2), "what is left over has a scale of its own"
    assert bool(((weight == 0).unflatten(1, (-1, 4)).sum(-1) >= 2).all())


def test_bad_weights_name_the_layer() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        net.get_parameter("0.weight")[3, 1] = float("inf")
    with pytest.raises(PassError, match=r"at 0: .*NaN or Inf"):
        apply_passes(net, "quantize", example_inputs=torch.randn(2, 8))


def test_a_convolution_in_groups_has_no_statistics() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    images = torch.randn(4, 8, 4, 4)
    program = apply_passes(net, "quantize{clip=outputs}", calibration=[(images,)], example_inputs=images)
    assert {o.site: o.reason for o in program.history[-1].outcomes}["0"].startswith("a convolution in 2 groups has no")
    assert "0.weight" in apply_passes(net, "quantize", example_inputs=images).quantized
