import copy
import functools
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.families import BY_NAME, captured, tensors_of
from torch import Tensor, nn

from sparsepass.graph import CaptureError, Program, ProgramFormatError, SparsepassError, capture
from sparsepass.graph.saved import FORMAT_VERSION, PROGRAM_FILE, TENSORS_FILE
from sparsepass.graph.support import CHECKSUMS_FILE, write_checksums
from sparsepass.passes import apply_passes

PIPELINE = ["nm_sparsify", "slorb{k=4}"]


@functools.cache
def _sparse() -> Program:
    return apply_passes(captured("llama"), PIPELINE)


def sparse() -> Program:
    """A tiny Llama after both passes, with everything that a program can hold."""
    return copy.deepcopy(_sparse())


def roundtrip_deepcopy(program: Program, _: Path) -> Program:
    return copy.deepcopy(program)


def roundtrip_pickle(program: Program, _: Path) -> Program:
    return pickle.loads(pickle.dumps(program))  # type: ignore[no-any-return]


def roundtrip_folder(program: Program, folder: Path) -> Program:
    program.save(folder / "program")
    return Program.load(folder / "program")


ROUNDTRIPS = [roundtrip_deepcopy, roundtrip_pickle, roundtrip_folder]


def assert_same(a: Program, b: Program) -> None:
    """Everything a program holds, to the bit."""
    assert str(a.graph_module.graph) == str(b.graph_module.graph)
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        other = b.tensors()[name]
        assert torch.equal(tensor, other), name
        assert (type(tensor), tensor.dtype, tensor.requires_grad) == (type(other), other.dtype, other.requires_grad)
        assert tensor.data_ptr() != other.data_ptr() or tensor.numel() == 0
    for attribute in (
        "history",
        "sparse",
        "aliases",
        "origin",
        "dynamic_axes",
        "output_structure",
        "training",
        "recipe",
        "retraining",
    ):
        assert getattr(a, attribute) == getattr(b, attribute), attribute
    assert a.sites() == b.sites()
    assert str(a.report()) == str(b.report())
    assert a.example_inputs.keys() == b.example_inputs.keys()
    assert all(torch.equal(t, b.example_inputs[name]) for name, t in a.example_inputs.items())


def assert_same_outputs(a: nn.Module, b: nn.Module, name: str) -> None:
    inputs = BY_NAME[name].inputs(3, 5)
    pairs = list(zip(tensors_of(a(**inputs)), tensors_of(b(**inputs)), strict=True))
    assert pairs
    assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("roundtrip", ROUNDTRIPS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "whisper", "convnet"])
def test_copies_are_bit_equal(name: str, roundtrip: Callable[[Program, Path], Program], tmp_path: Path) -> None:
    program = captured(name)
    copied = roundtrip(program, tmp_path)
    assert_same(program, copied)
    assert_same_outputs(program, copied, name)


@pytest.mark.parametrize("roundtrip", ROUNDTRIPS)
def test_copies_keep_masks_branches_and_history(roundtrip: Callable[[Program, Path], Program], tmp_path: Path) -> None:
    program = sparse()
    assert len(program.history) == 2
    assert all(state.mask and state.branch for state in program.sparse.values())
    with torch.no_grad():
        for state in program.sparse.values():
            assert state.branch is not None
            program.tensor(state.branch.weight).normal_(generator=torch.Generator().manual_seed(1))
    program.train()
    program.tensor("model.norm.weight").requires_grad_(False)
    program.retraining = ({"settings": {"lr": 1e-3, "frozen": []}, "validations": [{"step": 0, "nll": 4.5}]}, {"num_steps": 3})
    copied = roundtrip(program, tmp_path)
    assert_same(program, copied)
    assert_same_outputs(program, copied, "llama")
    assert copied.recipe.startswith("nm_sparsify{")
    assert ",slorb{" in copied.recipe


def test_a_copy_shares_nothing_with_its_source() -> None:
    program = sparse()
    copied = copy.deepcopy(program)
    before = {name: t.detach().clone() for name, t in program.tensors().items()}
    with torch.no_grad():
        for tensor in copied.tensors().values():
            tensor.zero_()
    copied.sparse.clear()
    copied.graph_module.graph.erase_node(next(n for n in copied.graph_module.graph.nodes if not n.users and n.op != "output"))
    assert program.sparse
    assert all(torch.equal(t, before[name]) for name, t in program.tensors().items())
    program.graph_module.graph.lint()


def test_a_program_of_an_unknown_operator_is_copied_but_not_saved(tmp_path: Path) -> None:
    with torch.library._scoped_library("sparsepass_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        library.impl("twice", torch.empty_like, "Meta")

        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return torch.ops.sparsepass_test.twice(self.linear(x))  # type: ignore[no-any-return]

        model = Twice().eval()
        program = capture(model, torch.randn(2, 8))
        x = torch.randn(3, 8)
        assert torch.equal(copy.deepcopy(program)(x), model(x))
        with pytest.raises(ProgramFormatError, match=r"sparsepass_test.*it can be used in memory, but not saved"):
            program.save(tmp_path / "program")
        assert list(tmp_path.iterdir()) == []


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    flat = torch.randn(2 * 64)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    for layer, part in zip(model, flat.view(2, 8, 8), strict=True):
        layer.weight = nn.Parameter(part)
    program = capture(model, torch.randn(2, 8), inplace=True)
    assert_same(program, roundtrip_folder(program, tmp_path))


# --- the folder format ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "program"
    captured("convnet").save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved program of one's own to damage."""
    target = tmp_path / "program"
    target.mkdir()
    for file in saved.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / PROGRAM_FILE).read_text())
    change(document)
    (folder / PROGRAM_FILE).write_text(json.dumps(document))
    write_checksums(folder)  # as who means harm would


def first(document: dict[str, Any], op: str) -> dict[str, Any]:
    found: dict[str, Any] = next(node for node in document["graph"]["nodes"] if node["op"] == op)
    return found


def test_a_folder_holds_text_and_safetensors_and_nothing_else(folder: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == [PROGRAM_FILE, TENSORS_FILE, CHECKSUMS_FILE]
    assert json.loads((folder / PROGRAM_FILE).read_text())["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, "1", None])
def test_another_format_is_refused(folder: Path, version: Any) -> None:
    edit(folder, lambda document: document.update(format_version=version))
    with pytest.raises(ProgramFormatError, match=rf"program format {version!r}, .* reads up to {FORMAT_VERSION}; upgrade"):
        Program.load(folder)


def test_a_missing_folder_or_file_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ProgramFormatError, match=r"nowhere holds no program\.json.*check the path"):
        Program.load(tmp_path / "nowhere")
    (folder / TENSORS_FILE).unlink()
    with pytest.raises(ProgramFormatError, match=r"program\.safetensors is (missing|truncated or damaged).*copy the folder"):
        Program.load(folder)


@pytest.mark.parametrize("file", [PROGRAM_FILE, TENSORS_FILE])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_said(folder: Path, file: str, share: float) -> None:
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ProgramFormatError, match=rf"{file} (is (missing, truncated or |truncated or )?damaged|cannot be read)"):
        Program.load(folder)


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", b"[]", b'{"format_version": 1}', b"[" * 100_000, b'{"a": {}', b"null"])
def test_a_file_that_is_something_else_is_said(folder: Path, text: bytes) -> None:
    (folder / PROGRAM_FILE).write_bytes(text)
    with pytest.raises(ProgramFormatError):
        Program.load(folder)


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no graph": lambda d: d.pop("graph"),
    "no aliases": lambda d: d.pop("aliases"),
    "aliases that are a list": lambda d: d.update(aliases=["a"]),
    "an unknown field": lambda d: d["origin"].update(surprise=1),
    "a node that is missing": lambda d: d["graph"]["nodes"].pop(len(d["graph"]["nodes"]) // 2),
    "a stack that is missing": lambda d: first(d, "call_function").update(stack=10_000),
    "an argument of two kinds": lambda d: first(d, "call_function").update(args=[{"node": "x", "tuple": []}]),
    "an argument of no kind": lambda d: first(d, "call_function").update(args=[{"bytes": "x"}]),
    "a dtype that is none": lambda d: first(d, "call_function").update(kwargs={"dtype": {"dtype": "load"}}),
    "a tensor that is missing": lambda d: first(d, "get_attr").update(target="nowhere.weight"),
    "an output too many": lambda d: d.update(output_structure={"kind": "tuple", "items": ["tensor", "tensor"]}),
    "keys that do not fit": lambda d: d.update(output_structure={"kind": "dict", "keys": [], "items": ["tensor"]}),
    "no output": lambda d: d["graph"]["nodes"].pop(),
    "a node of an unknown kind": lambda d: first(d, "call_function").update(op="call_method", target="numpy"),
    "a module to be called": lambda d: first(d, "call_function").update(op="call_module", target="stem"),
    "an operator that is none": lambda d: first(d, "call_function").update(target="aten.no_such_operator.default"),
    "sparse state of another kind": lambda d: d.update(sparse={"mix.weight": {"pattern": "2:4"}}),
    "history of another kind": lambda d: d.update(history=[{"text": "nm_sparsify"}]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_description_is_said(folder: Path, damage: str) -> None:
    edit(folder, DAMAGES[damage])
    with pytest.raises(ProgramFormatError):
        Program.load(folder)


def test_tensors_of_another_program_are_said(folder: Path, tmp_path: Path) -> None:
    captured("vit").save(tmp_path / "other")
    (folder / TENSORS_FILE).write_bytes((tmp_path / "other" / TENSORS_FILE).read_bytes())
    with pytest.raises(ProgramFormatError, match="is no saved program: parameters: there is no tensor"):
        Program.load(folder)


def _call(target: str, document: dict[str, Any]) -> None:
    first(document, "call_function").update(target=target, args=["planted"])


PLANTED = "__import__('pathlib').Path('planted').touch()"
ATTACKS: dict[str, Callable[[dict[str, Any]], object]] = {
    **{
        f"target {target}": functools.partial(_call, target)
        for target in (
            "os.system",
            "torch.load",
            "builtins.eval",
            "builtins.getattr",
            "operator.attrgetter",
            "operator.methodcaller",
            "aten.__class__.__subclasses__",
            "aten.__getattr__.__call__",
            "aten.__init__.__globals__",
            "aten.save.default",
            "aten.from_file.default",
            "sparsepass.__class__.mro",
            "profiler._record_function_enter.default",
            "transformers.pipeline.default",
            "inductor.accumulate_grad_.default",
        )
    },
    "output class os.system": lambda d: d.update(
        output_structure={"kind": "os.system", "keys": ["command"], "items": ["tensor"]}
    ),
    "output class of transformers that is none": lambda d: d.update(
        output_structure={"kind": "transformers.AutoModel", "keys": ["config"], "items": ["tensor"]}
    ),
    "output function of transformers": lambda d: d.update(
        output_structure={"kind": "transformers.pipelines.pipeline", "keys": ["task"], "items": ["tensor"]}
    ),
    "output class hidden in a list": lambda d: d.update(
        output_structure={"kind": "list", "items": [{"kind": "os.system", "keys": ["command"], "items": ["tensor"]}]}
    ),
    # torch.fx compiles Python text in which these names stand.
    "code in the name of an input": lambda d: first(d, "placeholder").update(target=f"images={PLANTED}"),
    "a star as an input": lambda d: first(d, "placeholder").update(target="*images"),
    "a line in the name of an input": lambda d: first(d, "placeholder").update(target=f"images):\n    {PLANTED}\n#"),
    "code in a keyword": lambda d: first(d, "call_function").update(kwargs={f"a={PLANTED},b": 1}),
    "code in the name of a tensor": lambda d: first(d, "get_attr").update(target=f'a", {PLANTED}) or getattr(self, "stem'),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_file_cannot_make_it_run_code(folder: Path, attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    edit(folder, ATTACKS[attack])
    with pytest.raises(ProgramFormatError):
        Program.load(folder)
    assert not (folder.parent / "planted").exists()


def test_code_in_the_name_of_a_node_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    edit(
        folder,
        lambda d: d["graph"]["nodes"].insert(
            0, {"op": "call_function", "name": f"a = {PLANTED} #", "target": "aten.ones.default", "args": [[2]]}
        ),
    )
    with pytest.raises(ProgramFormatError, match="may not have a node named"):
        Program.load(folder)
    assert not (folder.parent / "planted").exists()


def test_code_in_the_name_of_a_tensor_of_the_file_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    name = f'a", {PLANTED}) or getattr(self, "b'
    tensors = safetensors.torch.load_file(folder / TENSORS_FILE)
    safetensors.torch.save_file({**tensors, name: torch.ones(2)}, folder / TENSORS_FILE)
    edit(folder, lambda d: first(d, "get_attr").update(target=name))
    with pytest.raises(ProgramFormatError, match="may not have a tensor named"):
        Program.load(folder)
    assert not (folder.parent / "planted").exists()


def test_a_pickle_in_the_place_of_the_tensors_is_not_read(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("a pickle was read",)

    (folder / TENSORS_FILE).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ProgramFormatError, match="damaged"):
        Program.load(folder)


# --- saving ---


def test_a_folder_that_is_not_empty_needs_force(tmp_path: Path) -> None:
    program, folder = captured("convnet"), tmp_path / "program"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(SparsepassError, match="not empty; choose another one, or pass force=True"):
        program.save(folder)
    with pytest.raises(SparsepassError, match="sparsepass did not write it"):
        program.save(folder, force=True)
    assert [file.name for file in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    program.save(folder)
    program.save(folder, force=True)
    assert_same(Program.load(folder), program)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(28, "No space left on device"), SparsepassError, "the disk is full"),
        (safetensors.SafetensorError("I/O error: No space left on device"), SparsepassError, "the disk is full"),
    ],
)
def test_an_interrupted_save_leaves_the_old_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[BaseException], message: str | None
) -> None:
    old, folder = captured("convnet"), tmp_path / "program"
    old.save(folder)

    def save_file(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(raised, match=message):
        captured("vit").save(folder, force=True)
    with pytest.raises(raised, match=message):
        captured("vit").save(tmp_path / "new")
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["program"]
    assert_same(Program.load(folder), old)


# --- being a module ---


def test_state_dicts_have_the_models_names() -> None:
    program, model = captured("qwen2"), BY_NAME["qwen2"].model()
    assert program.graph_module.state_dict().keys() >= model.state_dict().keys()
    assert [n for n, _ in program.graph_module.named_parameters()] == [n for n, _ in model.named_parameters()]
    sparse_names = {f"model.layers.0.mlp.up_proj.{name}" for name in ("weight", "mask", "slorb_weight")}
    assert sparse_names <= sparse().graph_module.state_dict().keys()


def test_a_state_dict_goes_from_one_program_to_another() -> None:
    source, target = sparse(), sparse()
    with torch.no_grad():
        for tensor in source.graph_module.parameters():
            tensor.add_(1)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_outputs(source, target, "llama")


def test_train_and_eval_set_the_flag_and_change_nothing() -> None:
    program = captured("llama")
    inputs = BY_NAME["llama"].inputs(2, 5)
    expected = program(**inputs).logits
    assert not program.training
    assert program.train() is program
    assert program.training
    assert torch.equal(program(**inputs).logits, expected)
    assert program.eval() is program
    assert not program.training


def test_training_the_program_leaves_the_model_alone_unless_inplace() -> None:
    for inplace in (False, True):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        before = copy.deepcopy(model.state_dict())
        program = apply_passes(model, "nm_sparsify", example_inputs=torch.randn(2, 8), inplace=inplace)
        optimizer = torch.optim.SGD(program.parameters(), lr=0.1)
        program(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        changed = [name for name, t in model.state_dict().items() if not torch.equal(t, before[name])]
        assert changed == (list(before) if inplace else [])


@pytest.mark.parametrize("convert", [lambda p: p.half(), lambda p: p.to(torch.bfloat16), lambda p: p.double()])
def test_another_dtype_is_refused_and_nothing_changes(convert: Callable[[Program], Program]) -> None:
    program = captured("llama")
    with pytest.raises(SparsepassError, match=r"keeps the dtype it was captured with \(torch\.float32, .*capture it again"):
        convert(program)
    assert {t.dtype for t in program.tensors().values()} == {torch.float32}
    assert_same_outputs(program, captured("llama"), "llama")


def test_the_same_dtype_is_no_conversion() -> None:
    program = captured("llama")
    assert program.float() is program
    assert program.to(torch.float32) is program


def test_moving_it_moves_masks_examples_and_the_graph(tmp_path: Path) -> None:
    program = sparse().to("meta")
    assert program.device.type == "meta"
    assert {t.device.type for t in program.tensors().values()} == {"meta"}
    assert {t.device.type for t in program.example_inputs.values()} == {"meta"}
    assert "device='cpu'" not in program.graph_module.code
    inputs = {name: t.to("meta") for name, t in BY_NAME["llama"].inputs(3, 5).items()}
    assert program(**inputs).logits.shape == (3, 5, 96)
    with pytest.raises(SparsepassError, match=r"no weights yet .*fill\(\) it before saving"):
        program.save(tmp_path / "program")
    assert list(tmp_path.iterdir()) == []


def test_it_takes_part_in_autograd_like_the_model() -> None:
    program, model = captured("llama"), BY_NAME["llama"].model()
    inputs = BY_NAME["llama"].inputs(2, 6)
    for module in (program, model):
        module(**inputs).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        found = program.tensor(name).grad
        assert found is not None
        assert parameter.grad is not None
        # the graph's backward pass adds in another order
        torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-6 * float(parameter.grad.abs().max()), msg=name)


def test_tensors_are_found_by_every_name() -> None:
    program = captured("llama")
    assert program.tensor("lm_head.weight") is program.tensor("model.embed_tokens.weight")
    program.set_tensor("lm_head.weight", torch.zeros(96, 32))
    assert isinstance(program.tensor("model.embed_tokens.weight"), nn.Parameter)
    assert not program.tensor("model.embed_tokens.weight").any()
    for name in ("nowhere", "model.layers.7.weight", "model.layers", "forward"):
        with pytest.raises(KeyError):
            program.tensor(name)


def test_a_plain_program_has_no_model() -> None:
    with pytest.raises(CaptureError, match=r"captured from a plain nn\.Module"):
        captured("convnet").to_model()
