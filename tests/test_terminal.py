"""Words from outside reach no medium as commands: the terminal, Markdown, HTML."""

import io
from pathlib import Path

import pytest
import torch
from rich.table import Table
from torch import nn
from typer.testing import CliRunner

from sparsepass import apply_passes
from sparsepass._terminal import Terminal, for_terminal, one_line
from sparsepass.export.cli.app import app
from sparsepass.export.report import markdown_table
from sparsepass.export.report.pages import code_in_markdown, in_markdown

HOSTILE = "[/b][red]\x1b[2J\x07\u202e`|<script>alert(1)</script>](javascript:x)\udcff"
COMMANDS = "\x1b\x07\u202e\udcff"


def test_the_terminal_gets_words() -> None:
    shown = io.StringIO()
    console = Terminal(file=shown, width=400)
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    console.print(HOSTILE, table)
    assert not set(COMMANDS) & set(shown.getvalue())
    assert shown.getvalue().count("[/b][red]\\x1b[2J\\x07\\u202e`|<script>alert(1)</script>](javascript:x)\\xff") == 4
    assert for_terminal("a\tb\nc") == "a\tb\nc"
    assert one_line("a\tb\nc") == "a\\tb\\nc"


def test_the_terminal_keeps_its_own_colours() -> None:
    shown = io.StringIO()
    Terminal(file=shown, force_terminal=True, color_system="standard").print("a\x1b", style="red")
    assert shown.getvalue() == "\x1b[31ma\\x1b\x1b[0m\n"


def test_markdown_gets_words() -> None:
    assert in_markdown(HOSTILE) == ("[/b][red]\\x1b[2J\\x07\\u202e`|&lt;script>alert(1)&lt;/script>]\\(javascript:x)\\xff")
    assert in_markdown("a\n# b\n```") == "a # b \\`\\`\\`"
    assert code_in_markdown("a`b``c") == "``` a`b``c ```"
    assert markdown_table(["a"], [["x|y\nz"]]).splitlines()[2] == "| x\\|y z |"


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("[/b][red]<b>|`", nn.Linear(8, 8))
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._modules["[/b][red]<b>|`"](x)  # type: ignore[misc]
        return self.head(found)  # type: ignore[no-any-return]


def test_a_layer_with_the_name_of_markup_is_reported_by_its_name() -> None:
    program = apply_passes(_Named(), ["nm_sparsify{criterion=magnitude}"], example_inputs=torch.randn(2, 8))
    assert "[/b][red]<b>|`" in str(program.report())


@pytest.mark.parametrize(
    "command", ["verify", "report", "masks", "eval", "plan", "channels", "prune", "compare", "export", "unpack", "bench"]
)
def test_every_command_tells_of_a_hostile_path_in_words(command: str, tmp_path: Path) -> None:
    place = f"{tmp_path}/[/b]\x1b[2J\u202e"
    further = {"compare": [place], "prune": ["-o", f"{tmp_path}/o"], "export": ["-t", "hf", "-o", f"{tmp_path}/o"]}
    further |= {"plan": ["--gpu", "h100"], "unpack": ["-o", f"{tmp_path}/o"], "eval": ["--text", "python-docs"]}
    found = CliRunner().invoke(app, [command, place, *further.get(command, [])])
    assert found.exit_code == 2, found.output
    assert not set(COMMANDS) & set(found.output)
    assert "[/b]" in found.output.replace("\n", "")


def test_a_damaged_file_with_a_hostile_name_is_told_in_words(tmp_path: Path) -> None:
    for content in (b"", b"{", b"\xff"):
        place = tmp_path / "[b]\x1b[2Jx.safetensors"
        place.write_bytes(content)
        found = CliRunner().invoke(app, ["verify", str(place)])
        assert found.exit_code == 2
        assert "[b]\\x1b[2Jx.safetensors" in found.output.replace("\n", "")
        assert not set(COMMANDS) & set(found.output)
