"""Fusing siblings: outputs stay, everything beside the weights follows, and what cannot be fused says why."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import BY_NAME, captured, tensors_of
from torch import Tensor, nn

from sparsepass.graph import PassError, Program, ProgramFormatError, capture, compare
from sparsepass.graph.fusion import split_siblings
from sparsepass.graph.program import masked_weight
from sparsepass.passes import apply_passes
from sparsepass.passes.fuse_siblings import siblings
from sparsepass.passes.masks import pack_program

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
QKV, GATE_UP = f"{ATTENTION}.q_proj_k_proj_v_proj", f"{MLP}.gate_proj_up_proj"
BEFORE = ["", "nm_sparsify", "nm_sparsify,slorb{k=4}", "nm_sparsify,fold", "nm_sparsify,learn_masks"]


@torch.no_grad()
def error(before: Callable[..., Any], after: Callable[..., Any], name: str) -> float:
    inputs = BY_NAME[name].inputs(3, 8 if name == "whisper" else 7)
    pairs = zip(tensors_of(before(**inputs)), tensors_of(after(**inputs)), strict=True)
    return max(float((a - b).norm() / a.norm()) for a, b in pairs if a.is_floating_point())


def ready(name: str, passes: str) -> Program:
    program = captured(name)
    return apply_passes(program, passes, validate=False) if passes else program


def reasons(program: Program) -> dict[str, str]:
    return {outcome.site: outcome.reason for outcome in program.history[-1].outcomes}


def of_block(program: Program, block: str) -> list[str]:
    return [site.name.removeprefix(block) for site in program.sites() if site.name.startswith(block)]


@pytest.mark.parametrize("passes", BEFORE)
def test_a_llama_block_goes_from_seven_layers_to_four_and_back(passes: str, tmp_path: Path) -> None:
    before = ready("llama", passes)
    assert len(of_block(before, "model.layers.0.")) == 7
    after = apply_passes(before, "fuse_siblings")
    assert of_block(after, "model.layers.0.") == [
        "self_attn.q_proj_k_proj_v_proj", "self_attn.o_proj", "mlp.gate_proj_up_proj", "mlp.down_proj",
    ]  # fmt: skip
    assert error(before, after, "llama") < 1e-6
    validation = after.history[-1].validation
    assert validation is not None
    assert validation["relative_error"] < 1e-6
    assert after.tensor(f"{QKV}.weight").shape == (32 + 16 + 16, 32)
    assert before.sparse.keys() == before.report().sparse.keys() == after.report().sparse.keys()

    after.save(tmp_path / "program")
    for fused in (after, copy.deepcopy(after), Program.load(tmp_path / "program")):
        assert fused.fused == after.fused
        assert error(after, fused, "llama") == 0
        apart = split_siblings(fused)
        assert not apart.fused
        assert apart.sparse == before.sparse
        assert [site.name for site in apart.sites()] == [site.name for site in before.sites()]
        assert apart.tensors().keys() == before.tensors().keys()
        for name, tensor in before.tensors().items():
            assert torch.equal(apart.tensors()[name], tensor), name
        assert error(before, apart, "llama") < 1e-6
    assert split_siblings(before) is before


@pytest.mark.parametrize("passes", BEFORE[1:3])
def test_its_model_is_the_model_of_the_program_before(passes: str) -> None:
    before = ready("llama", passes)
    one, other = (program.to_model().state_dict() for program in (before, apply_passes(before, "fuse_siblings")))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


FUSED = {
    "opt": {"q_proj", "k_proj", "v_proj"},
    "bert": {"query", "key", "value"},
    "vit": {"q_proj", "k_proj", "v_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj"},
    "qwen3_moe": {"q_proj", "k_proj", "v_proj"},
    "t5": {"q", "k", "v"},
    "whisper": {"q_proj", "v_proj"},
}


@pytest.mark.parametrize("name", FUSED)
def test_other_families(name: str) -> None:
    before = ready(name, "nm_sparsify")
    after = apply_passes(before, "fuse_siblings")
    assert error(before, after, name) < 1e-6
    done = {outcome.site.rpartition(".")[2] for outcome in after.history[-1].outcomes if outcome.action == "rewritten"}
    assert done == FUSED[name]
    for parts in after.fused.values():  # cross-attention of all decoder layers reads one input
        assert len({part.name.rpartition(".")[0] for part in parts}) == 1
    weights = {name: masked_weight(before, name) for name in before.sparse}
    apart = split_siblings(after)
    assert all(torch.equal(masked_weight(apart, name), weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("name", "told"),
    [("gpt2", r"stored \[in, out\]"), ("phi3", "no other layer"), ("gpt_neox", "no other layer that can be fused")],
)
def test_what_is_fused_by_its_makers_has_no_siblings(name: str, told: str) -> None:
    with pytest.raises(PassError, match=rf"no layer can be rewritten .*{told}"):
        apply_passes(captured(name), "fuse_siblings")


def test_experts_and_routers_are_left_with_the_reason() -> None:
    found = reasons(apply_passes(captured("mixtral"), "fuse_siblings"))
    told = " ".join(reason for site, reason in found.items() if "self_attn" not in site)
    assert "experts: their weights are one tensor" in told
    assert "router" in told
    whisper = reasons(apply_passes(captured("whisper"), "fuse_siblings"))
    assert "but this layer has no bias: that one has a bias" in whisper["model.encoder.layers.0.self_attn.k_proj"]


def test_what_is_frozen_is_not_fused_with_what_is_trained() -> None:
    before = captured("llama")
    before.tensor(f"{ATTENTION}.q_proj.weight").requires_grad_(False)
    for name in ("gate_proj", "up_proj"):
        before.tensor(f"{MLP}.{name}.weight").requires_grad_(False)
    after = apply_passes(before, "fuse_siblings")
    assert reasons(after)[f"{ATTENTION}.q_proj"].endswith("read the same input, but this layer is frozen: that one is trained")
    assert not after.tensor(f"{GATE_UP}.weight").requires_grad
    apart = split_siblings(after)
    for name, tensor in before.tensors().items():
        assert apart.tensor(name).requires_grad == tensor.requires_grad, name


class Three(nn.Module):
    """Three layers that read one input."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, n, dtype=dtype) for n in (8, 4, 12))
        self.head = nn.Linear(24, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x).sigmoid(), self.b(x).exp(), self.c(x).relu()], -1).tanh())  # type: ignore[no-any-return]


def three(net: nn.Module | None = None, *runs: str) -> Program:
    torch.manual_seed(0)
    net = net or Three()
    x = torch.randn(4, 16, dtype=next(net.parameters()).dtype)
    before = capture(net, x)
    for passes in runs:
        before = apply_passes(before, passes, validate=False)
    after = apply_passes(before, "fuse_siblings") if not any("fuse" in passes for passes in runs) else before
    with torch.no_grad():
        assert torch.allclose((capture(net, x) if after is before else before)(x), after(x), rtol=1e-5)
    return after


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        (["nm_sparsify{ignore=c}"], "a, b read the same input, but this layer is dense: that one is 2:4"),
        (
            ["nm_sparsify{targets=c,pattern=1:4}", "nm_sparsify{ignore=c}"],
            "this layer is 1:4 behind a mask: that one is 2:4 behind a mask",
        ),
        (["nm_sparsify,slorb{k=4,ignore=c}"], "has no SLoRB branch: that one has a SLoRB branch with k=4"),
        (
            ["nm_sparsify,slorb{k=4,targets=c}", "slorb{k=8,ignore=c}"],
            "has a SLoRB branch with k=4: that one has a SLoRB branch with k=8",
        ),
        (["nm_sparsify,fold{ignore=c}"], "2:4 behind a mask: that one is 2:4 folded"),
        (
            ["nm_sparsify,slorb{k=4,targets=c,projection=trainable}", "slorb{k=4,ignore=c}"],
            "projection of its SLoRB branch is trained",
        ),
        (["fuse_siblings{ignore=c}"], "ignored by 'c'"),
        (['fuse_siblings{targets=["a","b"]}'], "not among the targets"),
    ],
)
def test_layers_of_another_kind_are_left_and_their_siblings_fused(runs: list[str], told: str) -> None:
    program = three(None, *runs)
    assert [tuple(part.name for part in parts) for parts in program.fused.values()] == [("a", "b")]
    assert told in reasons(program)["c"]


class Odd(nn.Module):
    """Siblings that cannot be fused, each for a reason of its own, beside two that can."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 8, bias=kind != "bias")
        self.d, self.head = nn.Linear(16, 8), nn.Linear(8, 3)
        if kind == "tied":
            self.d.weight = self.c.weight
        if kind == "shared bias":
            self.d.bias = self.c.bias

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        first = self.a(y).sigmoid() * self.b(y)
        if self.kind == "input changed":
            y[..., 0] = 2
        c = self.c(y)
        if self.kind == "result changed":
            c.view(-1).add_(1)
        if self.kind == "read twice":
            c = c + self.c.weight.sum()
        if self.kind in ("tied", "shared bias"):
            c = c * self.d(x.tanh())
        return self.head(first.tanh() * c)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("bias", "has no bias: that one has a bias"),
        ("tied", "tied to d.weight"),
        ("shared bias", "its bias is computed, or not its own"),
        ("input changed", "reads it after 1 changes in place: that one reads it after 0 changes in place"),
        ("result changed", "its result is changed in place"),
        ("read twice", "something else than one linear layer reads its weight"),
    ],
)
def test_odd_layers_say_why(kind: str, told: str) -> None:
    x = torch.randn(4, 16)
    before = capture(Odd(kind), x)
    after = apply_passes(before, "fuse_siblings")
    assert [tuple(part.name for part in parts) for parts in after.fused.values()] == [("a", "b")]
    assert told in reasons(after)["c"]
    with torch.no_grad():
        assert torch.allclose(before(x), after(x), rtol=1e-5)


def test_other_dtypes() -> None:
    class Mixed(Three):
        def forward(self, x: Tensor) -> Tensor:
            c = self.c.weight.float() if self.c.weight.dtype == torch.float16 else self.c.weight
            return self.head(torch.cat([self.a(x), self.b(x), nn.functional.linear(x, c)], -1).tanh())  # type: ignore[no-any-return]

    net = Mixed()
    net.c.half()
    program = three(net)
    assert list(program.fused) == ["a_b.weight"]
    wide = three(Three(torch.float64))
    validation = wide.history[-1].validation
    assert validation is not None
    assert validation["relative_error"] < 1e-9


class Reshaping(nn.Module):
    """Reads parts as shapes that rows of a wider result cannot be viewed as."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 8, bias=False), nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.a(x).view(x.shape[0], -1).sum(-1)
        more: Tensor = self.b(x).transpose(0, 1).transpose(0, 1).view(-1, 2).sum()
        return rows + more


def test_views_of_a_part_that_would_not_do_become_copies() -> None:
    x = torch.randn(3, 5, 16)
    before = capture(Reshaping(), x)
    after = apply_passes(before, "fuse_siblings")
    assert list(after.fused) == ["a_b.weight"]
    with torch.no_grad():
        assert torch.allclose(before(x), after(x), rtol=1e-5)


class Parallel(nn.Module):
    """Attention and MLP that read one norm, in modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 16))
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y) + self.mlp(y)  # type: ignore[no-any-return]


@torch.no_grad()
def test_layers_of_several_modules_are_fused_and_the_module_tree_is_whole() -> None:
    x = torch.randn(2, 3, 16)
    before = capture(Parallel(), x)
    after = apply_passes(before, "fuse_siblings")
    assert list(after.fused) == ["attention_0_mlp_0.weight"]
    for program in (after, split_siblings(after)):
        tree = program.hierarchy()
        assert torch.equal(tree(x), program(x))
        assert torch.allclose(before(x), program(x), rtol=1e-5, atol=1e-6)
    assert {name.split(".")[1] for name, _ in tree.named_modules() if "." in name} == {"norm", "attention", "mlp"}


def test_later_passes_work_on_the_fused_layers_and_speak_of_the_layers() -> None:
    inputs = BY_NAME["llama"].inputs(4, 16)
    one = apply_passes(captured("llama"), "fuse_siblings,nm_sparsify{criterion=wanda},slorb{k=4,init=mean}", calibration=inputs)
    other = apply_passes(captured("llama"), "nm_sparsify{criterion=wanda},slorb{k=4,init=mean}", calibration=inputs)
    assert one.sparse[f"{QKV}.weight"].branch is not None
    apart = split_siblings(one)
    assert apart.sparse == other.sparse
    for weight in other.sparse:
        assert torch.equal(masked_weight(apart, weight), masked_weight(other, weight))
    assert {o.site for o in one.history[-1].outcomes} == {o.site for o in other.history[-1].outcomes}
    report = one.report()
    assert report.num_sparse == 14
    assert f"{ATTENTION}.k_proj" in str(report)
    assert QKV not in report.skipped()
    assert pack_program(apply_passes(captured("llama"), "fuse_siblings,nm_sparsify")).masks.keys() == other.sparse.keys()


@pytest.mark.parametrize("option", ["targets", "ignore"])
def test_a_pattern_that_means_some_of_the_fused_layers_is_refused(option: str) -> None:
    program = apply_passes(captured("llama"), "fuse_siblings")
    with pytest.raises(
        PassError, match=r"q_proj is fused with .*k_proj, .*v_proj; name all of them, or put nm_sparsify before"
    ):
        apply_passes(program, f"nm_sparsify{{{option}=q_proj}}")
    whole = apply_passes(program, 'nm_sparsify{targets=["q_proj","k_proj","v_proj"]}')
    assert {outcome.site.rpartition(".")[2] for outcome in whole.history[-1].outcomes if outcome.action == "rewritten"} == {
        "q_proj", "k_proj", "v_proj",
    }  # fmt: skip
    assert apply_passes(program, f"nm_sparsify{{targets={QKV}}}").sparse.keys() == {f"{QKV}.weight"}


def test_norms_are_folded_into_fused_layers() -> None:
    program = captured("llama")
    for name, tensor in program.tensors().items():
        if tensor.dim() == 1 and isinstance(tensor, nn.Parameter):
            program.write_tensor(name, tensor.detach() + 0.3 * torch.randn_like(tensor))
    after = apply_passes(program, "fuse_siblings,fold_norms")
    assert error(program, after, "llama") < 1e-5
    assert bool((after.tensor("model.layers.0.input_layernorm.weight") == 1).all())


def test_a_comparison_finds_the_layers_by_their_names() -> None:
    model = BY_NAME["llama"].model()
    program = apply_passes(model, 'fuse_siblings,nm_sparsify{targets=["gate_proj","up_proj"]}')
    found = compare(model, program, BY_NAME["llama"].inputs(2, 8))
    layers = {layer.name for layer in found.layers}
    assert {f"{ATTENTION}.k_proj", f"{MLP}.up_proj"} <= layers
    assert found.first_divergence == f"{MLP}.gate_proj"


def test_groups_are_told_without_fusing() -> None:
    program = captured("whisper")
    first = "model.encoder.layers.0.self_attn"
    assert siblings(program)[0] == (f"{first}.q_proj.weight", f"{first}.v_proj.weight")
    assert set(siblings(program, as_modules=True)[0]) == {f"{first}.{name}_proj.weight" for name in "qkv"}


def _edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "program.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda parts: parts[0].update(rows=parts[0]["rows"] + 1), "no such weight"),
        (lambda parts: (parts[0].update(rows=16), parts[1].update(rows=32)), "cut the result into its parts"),
        (lambda parts: parts[0].update(weight=parts[1]["weight"]), "there is one of that name"),
        (lambda parts: parts[0].update(weight="lm_head.weight.x"), "there is one of that name"),
        (lambda parts: parts[0].update(weight="forward"), "forward"),
        (lambda parts: parts[0].update(bias="model.layers.0.x"), "some of its parts have a bias"),
        (lambda parts: parts[0].update(extra=1), "there is no such field"),
        (lambda parts: parts.pop(), "no such weight"),
        (lambda parts: parts[0].update(levels=[["a"]]), "levels"),
    ],
)
def test_an_edited_file_is_refused(change: Callable[[list[dict[str, Any]]], object], told: str, tmp_path: Path) -> None:
    apply_passes(captured("llama"), "fuse_siblings").save(tmp_path / "program")
    _edited(tmp_path / "program", lambda document: change(document["fused"][f"{QKV}.weight"]))
    with pytest.raises(ProgramFormatError, match=told):
        Program.load(tmp_path / "program")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda document: document["aliases"].update({"other.weight": f"{QKV}.weight"}), "tied to another"),
        (lambda document: document["sparse"].pop(f"{QKV}.weight"), "does not apply its mask and its branch, and nothing else"),
        (lambda document: document["sparse"][f"{QKV}.weight"].update(branch=None), "does not apply its mask and its branch"),
    ],
)
def test_an_edited_file_with_masks_is_refused(change: Callable[[dict[str, Any]], object], told: str, tmp_path: Path) -> None:
    apply_passes(captured("llama"), "nm_sparsify,slorb{k=4},fuse_siblings", validate=False).save(tmp_path / "program")
    _edited(tmp_path / "program", change)
    with pytest.raises(ProgramFormatError, match=told):
        Program.load(tmp_path / "program")


def test_a_program_without_fused_layers_is_written_as_before(tmp_path: Path) -> None:
    captured("llama").save(tmp_path / "program")
    assert "fused" not in json.loads((tmp_path / "program" / "program.json").read_text())
