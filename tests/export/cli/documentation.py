"""The tables of options in docs/cli.md, made from the commands: `python -m tests.export.cli.documentation` writes them anew."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from typer.main import get_command

from sparsepass.export.cli.app import app
from sparsepass.export.report import markdown_table

FILE: Final = Path(__file__).parents[3] / "docs" / "cli.md"
HEADINGS: Final = ("option", "meaning")
_SECTION: Final = re.compile(r"^## `sparsepass (\w+)`\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_TABLE: Final = re.compile(r"^\| option \| meaning \|\n(?:\|.*\n)+", re.MULTILINE)


def commands() -> dict[str, Any]:
    """Name -> command, as click has them."""
    found: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    return found


def whole() -> str:
    """docs/cli.md as it should be: what was written by hand, with the tables of options."""
    return _SECTION.sub(lambda found: _TABLE.sub(lambda _: _table(found[1]), found[0]), FILE.read_text(encoding="utf-8"))


def _table(command: str) -> str:
    return markdown_table(HEADINGS, list(_rows(command))) + "\n"


def _rows(command: str) -> Iterator[tuple[str, str]]:
    for each in commands()[command].params:
        if each.param_type_name == "option" and each.name != "help":
            flags = ", ".join(f"`{flag}`" for flag in [*each.opts, *each.secondary_opts])
            said = each.help.removesuffix("[required]").strip()
            shown = "" if each.default in (None, False, (), 0) or not each.show_default else f" Default: `{each.default}`."
            yield flags, said + (" Required." if each.required else shown)


if __name__ == "__main__":
    FILE.write_text(whole(), encoding="utf-8")
