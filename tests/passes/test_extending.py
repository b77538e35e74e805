"""The two examples of docs/extending.md, installed as a package of another author, and what is refused."""

import importlib
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from tests.families import captured

from sparsepass.graph import Program, ProgramFormatError, SparsepassError, capture
from sparsepass.graph.program import masked_weight
from sparsepass.passes import apply_passes, parse_pipeline
from sparsepass.passes.criteria import CRITERIA, criteria_table

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
IDS = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages; what is in it is installed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def installed(site: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (site / "two_examples").mkdir()
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if name := re.match(r"# (two_examples/\w+\.py)\n", block):
            (site / name[1]).write_text(block, encoding="utf-8")
    (toml,) = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    install(site, tomllib.loads(toml)["project"]["entry-points"])


def install(site: Path, groups: dict[str, dict[str, str]]) -> None:
    about = site / "two_examples-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: two_examples\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in named.items()) for group, named in groups.items()
    ]
    (about / "entry_points.txt").write_text("\n".join(lines))
    for name in [name for name in sys.modules if name.partition(".")[0] == "two_examples"]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.mark.usefixtures("installed")
def test_the_examples_of_the_page_work_by_name() -> None:
    text = "nm_sparsify{criterion=balanced},round_weights{bits=6}"
    program = apply_passes(captured("llama"), text, calibration=IDS)
    assert "criterion=balanced" in program.recipe
    assert "round_weights{bits=6}" in program.recipe
    name = next(iter(program.sparse))
    assert {len(row.unique()) <= 2**6 for row in masked_weight(program, name)} == {True}
    assert {str(state.changed_by).partition("{")[0] for state in program.sparse.values()} == {"round_weights"}
    assert parse_pipeline(program.recipe) == parse_pipeline(program.recipe)


@pytest.mark.usefixtures("installed")
def test_a_program_that_calls_the_operator_of_the_page_is_saved_and_read(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 4))
    program = capture(net, torch.randn(2, 8))
    row = importlib.import_module("two_examples.operators").ROW
    graph = program.graph_module.graph
    (weight,) = [node for node in graph.nodes if node.target == "0.weight"]
    program.set_tensor("step", torch.tensor(0.5))
    with graph.inserting_after(weight):
        step = graph.get_attr("step")
    with graph.inserting_after(step):
        rounded = graph.call_function(torch.ops.two_examples.rounded.default, (weight, step))
    weight.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)
    program.graph_module.recompile()
    assert row.targets == ("two_examples.rounded.default",)
    program.save(tmp_path / "program")
    x = torch.randn(3, 8)
    assert torch.equal(Program.load(tmp_path / "program")(x), program(x))
    for folder in tmp_path.glob("*.dist-info"):
        shutil.rmtree(folder)
    with pytest.raises(ProgramFormatError, match=r"may not call 'two_examples\.rounded\.default'"):
        Program.load(tmp_path / "program")


@pytest.mark.usefixtures("installed")
def test_the_table_of_criteria_has_it() -> None:
    from sparsepass.export.stages import jobs_of

    assert "balanced" in [job.name for job in jobs_of()]
    with pytest.raises(SparsepassError, match="unknown criterion 'balancd'; did you mean 'balanced'"):
        apply_passes(captured("llama"), "nm_sparsify{criterion=balancd}")


@pytest.mark.parametrize(
    ("value", "code", "said"),
    [
        ("two_examples:ROW", "", "cannot be loaded"),
        ("two_examples:ROW", "ROW = dict", "is no Criterion; mend or remove its package"),
        (
            "two_examples:ROW",
            "from sparsepass.passes.criteria import CRITERIA\nROW = CRITERIA['wanda']",
            "takes the name 'wanda', which is taken",
        ),
    ],
)
def test_what_is_no_criterion_is_told(value: str, code: str, said: str, site: Path) -> None:
    (site / "two_examples.py").write_text(code, encoding="utf-8")
    install(site, {"sparsepass.criteria": {"mine": value}})
    with pytest.raises(SparsepassError, match=said):
        criteria_table()
    assert parse_pipeline("nm_sparsify{criterion=wanda}"), "those that come along work all the same"
    assert "mine" not in CRITERIA
