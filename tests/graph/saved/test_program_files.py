"""A program file is data: each kind of thing that it may not hold is refused, with the file, the place and the reason."""

import copy
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from sparsepass import Program, apply_passes
from sparsepass.graph import ProgramFormatError, SparsepassError
from sparsepass.graph.saved import PROGRAM_FILE, TENSORS_FILE
from sparsepass.graph.support import CHECKSUMS_FILE

JSON = Any
X, MADE = {"node": "input_1"}, {"node": "made"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.layer(input)))  # type: ignore[no-any-return]


@functools.cache
def sound() -> tuple[Path, JSON]:
    """A folder with a small program, and its document."""
    place = Path(tempfile.mkdtemp(prefix="program-"), "sound")
    torch.manual_seed(0)
    apply_passes(Net().eval(), "nm_sparsify{criterion=magnitude}", example_inputs=torch.randn(2, 8)).save(place)
    return place, json.loads((place / PROGRAM_FILE).read_text())


def with_document(folder: Path, text: str | bytes | JSON, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    place = folder / "program"
    shutil.copytree(sound()[0], place)
    (place / CHECKSUMS_FILE).unlink()
    found = text if isinstance(text, str | bytes) else json.dumps(text)
    (place / PROGRAM_FILE).write_bytes(found if isinstance(found, bytes) else found.encode())
    if tensors is not None:
        safetensors.torch.save_file(safetensors.torch.load_file(place / TENSORS_FILE) | tensors, place / TENSORS_FILE)
    return place


def edited(change: Callable[[JSON], object]) -> JSON:
    document = copy.deepcopy(sound()[1])
    change(document)
    return document


def put(*path: Any, value: JSON) -> Callable[[JSON], object]:
    def change(document: JSON) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


def call(target: str, *args: JSON, name: str = "made", **kwargs: JSON) -> JSON:
    return {"name": name, "op": "call_function", "target": target, "args": list(args), "kwargs": kwargs}


def calls(*nodes: JSON) -> Callable[[JSON], object]:
    """Put nodes before the output, whose tensor becomes that of the last one."""

    def change(document: JSON) -> None:
        *rest, output = document["graph"]["nodes"]
        output["args"][0]["tuple"][0] = {"node": nodes[-1]["name"]}
        document["graph"]["nodes"] = [*rest, *nodes, output]

    return change


def first_state(document: JSON) -> JSON:
    return next(iter(document["sparse"].values()))


def refusal(place: Path) -> str:
    with pytest.raises(ProgramFormatError) as caught:
        Program.load(place)
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "cannot be read as JSON"),
        ("5", "program format None"),
        ("[" * 10_000, "nested deeper than 100 levels"),
        ('{"a":' * 10_000, "nested deeper than 100 levels"),
        ("[" * 101 + "]" * 101, "nested deeper than 100 levels"),
        ('{"format_version": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ('{"format_version": true}', "program format True"),
        ('{"format_version": 1e400}', "too large"),
        ('{"format_version": NaN}', "NaN, which is no number"),
        ('{"format_version": 2, "format_version": 2}', "the key 'format_version' is given twice"),
        (b"\xff\xfe", "byte 0 is no UTF-8"),
        ("\ufeff{}", "cannot be read as JSON"),
    ],
)
def test_what_is_no_json_is_refused(text: str | bytes, told: str, tmp_path: Path) -> None:
    assert told in refusal(with_document(tmp_path, text))


def nested(times: int) -> JSON:
    return {"kind": "list", "items": [nested(times - 1)]} if times else "tensor"


FIELDS: dict[str, tuple[Callable[[JSON], object], str]] = {
    "an unknown field": (put("evil", value=1), "evil: there is no such field"),
    "a missing field": (lambda d: d.pop("sparse"), "sparse: this field is missing"),
    "an unknown field of the origin": (put("origin", "evil", value=1), "origin.evil: there is no such field"),
    "a field of another type": (put("training", value="yes"), "training: input should be a valid boolean, got 'yes'"),
    "a version from the future": (put("format_version", value=3), "program format 3"),
    "a node of another kind": (put("graph", "nodes", 0, "op", value="call_method"), "graph.nodes.0.op: input should be"),
    "a node named as another": (lambda d: d["graph"]["nodes"].append(d["graph"]["nodes"][0]), "two nodes are named"),
    "a node with a word of Python": (put("graph", "nodes", 0, "name", value="class"), "node named 'class'"),
    "a node with a name of the text": (put("graph", "nodes", 0, "name", value="torch"), "node named 'torch'"),
    "a node that is code": (put("graph", "nodes", 0, "name", value="x)\n    import os\n"), "may not have a node named"),
    "a stack that is none": (put("graph", "nodes", 0, "stack", value=99), "stands in stack 99"),
    "a pattern that is none": (lambda d: first_state(d).update(pattern="x"), "pattern: string should match"),
    "a pattern of a thousand million": (
        lambda d: first_state(d).update(pattern="2:1000000000"),
        "pattern: string should match",
    ),
    "a mask that is none": (lambda d: first_state(d).update(mask=5), "mask: input should be a valid string"),
    "an axis that is none": (lambda d: first_state(d).update(axis=10**30), "axis: "),
    "a branch that is none": (lambda d: first_state(d).update(branch={"k": 0, "weight": "x"}), "branch.k: "),
    "an alias of an alias": (put("aliases", value={"a": "b", "b": "a"}), "aliases: a cannot be another name of b"),
    "an alias of a tensor": (put("aliases", value={"layer.weight": "last.weight"}), "layer.weight cannot be another name"),
    "a parameter that is none": (put("parameters", "nowhere", value=True), "parameters: there is no tensor nowhere"),
    "an axis of no input": (put("dynamic_axes", "nowhere", value=[0]), "dynamic_axes: there is no input nowhere"),
    "an axis beyond the input": (put("dynamic_axes", "input", value=[7]), "has no axis 7"),
    "a limit that is none": (put("limits", value=["__import__('os')"]), "is no condition on the sizes"),
    "a limit of no input": (put("limits", value=["nowhere[0] < 5"]), "nowhere"),
    "a limit that takes forever": (put("limits", value=["9**9**9**9 > input[0]"]), "is no condition on the sizes"),
    "a class that is none": (put("origin", "model_class", value="os.system"), "origin.model_class: string should match"),
    "an outcome that is none": (put("history", 0, "outcomes", value=[5]), "history.0.outcomes.0: "),
    "an output of another class": (
        put("output_structure", value={"kind": "os.PathLike", "keys": [], "items": []}),
        "os.PathLike",
    ),
    "an output without end": (
        lambda d: d.update(output_structure=nested(25)),
        "cannot be read",
    ),
    "an output with a key twice": (
        put("output_structure", value={"kind": "dict", "keys": ["a", "a"], "items": ["tensor", None]}),
        "whose keys do not fit",
    ),
    "an output with a key that is none": (
        put("output_structure", value={"kind": "dict", "keys": [[1]], "items": ["tensor"]}),
        "whose keys do not fit",
    ),
    "more nodes than its tensors explain": (
        calls(*(call("aten.relu.default", X, name=f"n{number}") for number in range(9000))),
        "nodes over",
    ),
    "no output": (lambda d: d["graph"]["nodes"].pop(), "ends with its output"),
    "an output that is a number": (put("graph", "nodes", -1, "args", value=[5]), "the output of a saved program is one list"),
}


@pytest.mark.parametrize("what", FIELDS)
def test_a_field_that_is_wrong_is_named(what: str, tmp_path: Path) -> None:
    change, told = FIELDS[what]
    assert told in refusal(with_document(tmp_path, edited(change)))


NAMES = [
    "class.weight",
    "forward",
    "graph",
    "a..b",
    "",
    "x.",
    ".x",
    "x\u2028y",
    "training",
    "_parameters.x",
    "\ufb01.weight",
    "a'b",
]


@pytest.mark.parametrize("name", [*NAMES, "layer", "layer.weight.x", "True.w", "lambda.w"])
def test_a_tensor_whose_name_is_none_is_refused(name: str, tmp_path: Path) -> None:
    assert "tensor" in refusal(with_document(tmp_path, sound()[1], {name: torch.ones(1)}))


OPERATORS: dict[str, tuple[Callable[[JSON], object], str]] = {
    "memory behind a tensor": (
        calls(call("aten._reshape_alias.default", X, [10_000], [1])),
        "may not call 'aten._reshape_alias",
    ),
    "memory behind it, by a view": (calls(call("aten.as_strided.default", X, [100], [1])), "reads entry 99 of 16"),
    "memory before it": (calls(call("aten.as_strided.default", X, [2], [-1])), "could leave its memory"),
    "memory of another tensor": (calls(call("aten.as_strided.default", X, [2], [1], 10**9)), "could leave its memory"),
    "a storage": (calls(call("aten.set_.source_Tensor", X, X)), "may not call 'aten.set_.source_Tensor'"),
    "a larger storage": (calls(call("aten.resize_.default", X, [10**6])), "may not call"),
    "a file": (calls(call("aten.from_file.default", "/etc/passwd")), "may not call"),
    "a result in a place": (calls(call("aten.add.out", X, X, out=X)), "may not call"),
    "a loop of Python": (calls(call("higher_order.cond.default", True)), "may not call"),
    "prims": (calls(call("prims.as_strided.default", X, [2], [1], 0)), "may not call"),
    "an operator of operator": (calls(call("operator.attrgetter", "x")), "may not call 'operator.attrgetter'"),
    "a list times a number": (calls(call("operator.mul", [0], 10**11)), "takes numbers"),
    "a text times a number": (calls(call("operator.mul", "x", 10**11)), "takes numbers"),
    "a power without end": (calls(call("operator.pow", 7, 10**11)), "raises to the power"),
    "a number without end": (calls(call("operator.mul", 2**62, 2**62)), "a number that is too large"),
    "a number that is no word": (calls(call("aten.add.Tensor", X, 10**39)), "is too large a number"),
    "an argument of another type": (calls(call("aten.add.Tensor", X, "x")), "its argument 'other' is a Tensor, got 'x'"),
    "an argument too many": (calls(call("aten.relu.default", X, X)), "it takes 1 arguments, got 2"),
    "an argument too few": (calls(call("aten.linear.default", X)), "its argument 'weight' is missing"),
    "a keyword that is none": (calls(call("aten.relu.default", X, inplace=True)), "it has no keyword 'inplace'"),
    "a node that comes later": (calls(call("aten.relu.default", {"node": "last"})), "no node before it has that name"),
    "a dtype that is none": (calls(call("aten.zeros.default", [1], dtype={"dtype": "load"})), "cannot be read"),
    "a layout that is none of ours": (
        calls(call("aten.zeros.default", [1], layout={"layout": "sparse_coo"})),
        "cannot be read",
    ),
    "a device that is none": (calls(call("aten.zeros.default", [1], device={"device": "evil:9"})), "cannot be read"),
    "a step backwards": (calls(call("aten.slice.Tensor", X, 1, 7, 0, -1)), "fails on its inputs"),
    "shapes that do not fit": (calls(call("aten.matmul.default", X, X)), "fails on its inputs"),
    "a window too large": (calls(call("aten.unfold.default", X, 1, 100, 1)), "fails on its inputs"),
    "a hundred axes": (calls(call("aten.view.default", X, [16, *[1] * 99])), "100 axes"),
    "an input that is written to": (calls(call("aten.fill_.Scalar", X, 1)), "it would change an input"),
    "a weight that is written to": (
        calls({"name": "w", "op": "get_attr", "target": "last.weight"}, call("aten.mul_.Scalar", {"node": "w"}, 2)),
        "it would change an input or a tensor of the file",
    ),
    "a weight that is written to by a view": (
        calls(
            {"name": "w", "op": "get_attr", "target": "last.weight"},
            call("aten.t.default", {"node": "w"}, name="v"),
            call("aten.zero_.default", {"node": "v"}),
        ),
        "it would change an input or a tensor of the file",
    ),
    "an output that is no tensor": (calls(call("operator.add", 1, 2)), "returns a int"),
    "17 terabytes": (calls(call("aten.zeros.default", [2**42])), "takes 17,592,186,044,416 bytes"),
    "a sequence of two thousand million": (calls(call("aten.arange.default", 2 * 10**9)), "takes 16,000,000,000 bytes"),
    "a view that is copied": (
        calls(call("aten.expand.default", {"node": "y"}, [10**5, 10**5]), call("aten.clone.default", MADE, name="z")),
        "no node before it",
    ),
    "a tensor repeated": (calls(call("aten.repeat.default", X, [10**5, 10**5])), "takes 640,000,000,000 bytes"),
    "each entry repeated": (calls(call("aten.repeat_interleave.self_int", X, 10**9)), "takes 64,000,000,000 bytes"),
    "a frame of zeros": (calls(call("aten.constant_pad_nd.default", X, [10**10, 0])), "bytes"),
    "a million pieces": (
        calls(call("aten.expand.default", X, [10**6, 2, 8]), call("aten.unbind.int", MADE, 0, name="z")),
        "it would give 1,000,000 tensors",
    ),
    "batches spread in a product": (
        calls(
            call("aten.ones.default", [60_000, 1, 1], name="a"),
            call("aten.ones.default", [1, 1, 1000], name="b"),
            call("aten.matmul.default", {"node": "a"}, {"node": "b"}, name="c"),
            call("aten.ones.default", [1, 1000, 1000], name="d"),
            call("aten.matmul.default", {"node": "c"}, {"node": "d"}, name="e"),
        ),
        "node e (aten.matmul.default) takes",
    ),
    "a product that takes hours": (
        calls(
            call("aten.ones.default", [8000, 8000], name="a"),
            *(call("aten.mm.default", {"node": "a"}, {"node": "a"}, name=f"p{i}") for i in range(3)),
        ),
        "operations, far more than",
    ),
    "a window that takes hours": (
        calls(
            call("aten.ones.default", [1, 4000, 4000], name="a"),
            call("aten.max_pool2d.default", {"node": "a"}, [2000, 2000], [1, 1], name="p"),
        ),
        "operations, far more than",
    ),
    "much at one time": (
        calls(
            *(call("aten.ones.default", [60_000_000], name=f"a{i}") for i in range(6)),
            call("aten.cat.default", [{"node": f"a{i}"} for i in range(6)], name="z"),
        ),
        "bytes",
    ),
}


@pytest.mark.parametrize("what", OPERATORS)
def test_a_call_that_no_program_makes_is_refused(what: str, tmp_path: Path) -> None:
    change, told = OPERATORS[what]
    assert told in refusal(with_document(tmp_path, edited(change)))


def test_an_index_that_is_out_of_range_is_refused_when_it_is_met(tmp_path: Path) -> None:
    ids = call("aten.full.default", [1], 10**6, name="ids", dtype={"dtype": "int64"})
    for target, args in {
        "aten.index_select.default": (X, 1, {"node": "ids"}),
        "aten.embedding.default": (X, {"node": "ids"}),
        "aten.index.Tensor": (X, [{"node": "ids"}]),
    }.items():
        folder = tmp_path / target
        folder.mkdir()
        program = Program.load(with_document(folder, edited(calls(ids, call(target, *args)))))
        with pytest.raises(SparsepassError, match="the program fails when it is run"):
            program(torch.ones(2, 8))


def test_what_is_made_without_values_is_made_of_zeros(tmp_path: Path) -> None:
    for number, node in enumerate(
        [
            call("aten.empty.memory_format", [1000], dtype={"dtype": "float32"}),
            call("aten.empty_like.default", X),
            call("aten.new_empty.default", X, [5]),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = Program.load(with_document(folder, edited(calls(node))))(torch.ones(2, 8))
        assert not found.any()


def growing(power: int) -> Callable[[JSON], object]:
    """A program that makes a tensor of as many entries as its input has rows, to a power."""
    size = call("aten.sym_size.int", X, 0, name="size")
    product = call("operator.pow", {"node": "size"}, power, name="product")
    return calls(size, product, call("aten.zeros.default", [{"node": "product"}]))


def test_what_grows_without_bound_is_refused_before_it_is_made(tmp_path: Path) -> None:
    program = Program.load(with_document(tmp_path, edited(growing(6))))
    program(torch.ones(3, 8))
    with pytest.raises(ProgramFormatError, match="takes 4,000,000,000,000 bytes, far more than"):
        program(torch.ones(100, 8))


def test_what_is_large_for_one_size_alone_is_refused_before_it_is_made(tmp_path: Path) -> None:
    size = call("aten.sym_size.int", X, 0, name="size")
    is_seven = call("operator.eq", {"node": "size"}, 7, name="is_seven")
    entries = call("operator.mul", {"node": "is_seven"}, 10**11, name="entries")
    change = calls(size, is_seven, entries, call("aten.zeros.default", [{"node": "entries"}]))
    program = Program.load(with_document(tmp_path, edited(change)))
    program(torch.ones(6, 8))
    with pytest.raises(ProgramFormatError, match="far more than"):
        copy.deepcopy(program)(torch.ones(7, 8))


def test_a_sound_program_is_read_and_runs_on_larger_inputs() -> None:
    program = Program.load(sound()[0])
    assert program(torch.ones(5000, 8)).shape == (5000, 4)
    assert program.guard is not None
    assert program.guard.cost.work > 0


def test_what_cannot_be_read_again_is_not_saved(tmp_path: Path) -> None:
    program = Program.load(sound()[0])
    program.origin = type(program.origin)(model_class="os.system")
    with pytest.raises(ProgramFormatError, match=r"this program cannot be saved: origin\.model_class"):
        program.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()
