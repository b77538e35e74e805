"""Draws docs/architecture.svg: the rooms of the code and the imports between them, read off the code itself.

    python docs/draw_architecture.py            # writes the picture
    python docs/draw_architecture.py --check    # exits with 1 if the committed picture is not that of the code

A room is a sub-package, or a file that lies in one of the four folders itself. Each room stands above all that it imports;
an arrow that ran back up would be a circle, and then nothing is drawn. graph/program.py, hierarchy.py, model.py, fusion.py and
rewrite.py import each other on purpose (a program gives its hierarchy, its model and its layers apart, imported when asked for)
and are drawn as one.
"""

import sys
from html import escape
from pathlib import Path

import grimp

PICTURE = Path(__file__).with_name("architecture.svg")
FOLDERS = ("export", "retrain", "passes", "graph")
_WIDTH, _HEIGHT, _GAP, _MARGIN, _ROW = 118, 34, 16, 24, 84
_ONE = tuple(f"sparsepass.graph.{name}" for name in ("program", "hierarchy", "model", "fusion", "rewrite"))
_TONES = {"graph": "#4c78a8", "passes": "#54a24b", "retrain": "#e8963e", "export": "#b279a2"}


def room_of(module: str) -> str | None:
    """The room of a module; the face of a folder is one too. None for what lies outside the four."""
    _, *parts = module.split(".")
    if not parts or parts[0] not in FOLDERS:
        return None
    if module in _ONE:
        return "graph.program"
    return ".".join(parts[: 3 if parts[:2] == ["export", "targets"] else 2])


def arrows() -> dict[str, set[str]]:
    """Room -> the rooms that it imports."""
    graph = grimp.build_graph("sparsepass", cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in sorted(graph.modules):
        room = room_of(module)
        if room is None:
            continue
        used = {room_of(other) for other in graph.find_modules_directly_imported_by(module)} - {None, room}
        found.setdefault(room, set()).update(other for other in used if other is not None)
    return found


def floors(found: dict[str, set[str]]) -> dict[str, int]:
    """Room -> its floor; a room stands one above the highest that it imports.

    Raises:
        ValueError: If rooms import each other in a circle.
    """
    floor: dict[str, int] = {}

    def place(room: str, path: tuple[str, ...]) -> int:
        if room in path:
            raise ValueError("a circle of rooms: " + " -> ".join([*path[path.index(room) :], room]))
        if room not in floor:
            floor[room] = 1 + max((place(other, (*path, room)) for other in found.get(room, ())), default=0)
        return floor[room]

    for room in sorted(found):
        place(room, ())
    return floor


def draw(found: dict[str, set[str]]) -> str:
    """The picture as SVG. Arrows that a longer way implies are left out."""
    floor = floors(found)
    rows = {
        level: sorted((room for room in floor if floor[room] == level), key=_order) for level in sorted(set(floor.values()))
    }
    widest = max(len(row) for row in rows.values()) * (_WIDTH + _GAP)
    height = 2 * _MARGIN + max(rows) * _ROW
    places = {}
    for level, row in rows.items():
        left = _MARGIN + (widest - len(row) * (_WIDTH + _GAP)) / 2
        for index, room in enumerate(row):
            places[room] = (left + index * (_WIDTH + _GAP), height - _MARGIN - level * _ROW)
    lines = []
    for room, used in sorted(found.items()):
        tone = _TONES[room.split(".")[0]]
        for other in sorted(used - _implied(found, room)):
            (x1, y1), (x2, y2) = places[room], places[other]
            start, end = (x1 + _WIDTH / 2, y1 + _HEIGHT), (x2 + _WIDTH / 2, y2)
            bend = (end[1] - start[1]) / 2
            lines.append(
                f'<path d="M{start[0]:.0f} {start[1]:.0f}C{start[0]:.0f} {start[1] + bend:.0f} '
                f'{end[0]:.0f} {end[1] - bend:.0f} {end[0]:.0f} {end[1]:.0f}" stroke="{tone}" marker-end="url(#tip)"/>'
            )
    for room, (x, y) in sorted(places.items()):
        folder, _, inner = room.partition(".")
        lines.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{_WIDTH}" height="{_HEIGHT}" rx="5" fill="{_TONES[folder]}"/>')
        name = f"{folder}/{inner.replace('.', '/')}"
        lines.append(f'<text x="{x + _WIDTH / 2:.0f}" y="{y + 21:.0f}">{escape(name)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {widest + 2 * _MARGIN:.0f} {height:.0f}" '
        'font-family="sans-serif">\n'
        '<defs><marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0L6 3L0 6z" fill="#666"/></marker></defs>\n'
        '<rect width="100%" height="100%" fill="#fff"/>\n'
        '<g fill="none" stroke-width="1.2" stroke-opacity="0.55">\n'
        + "\n".join(line for line in lines if line.startswith("<path"))
        + '\n</g>\n<g font-size="11" text-anchor="middle">\n'
        + "\n".join(line.replace("<text ", '<text fill="#fff" ') for line in lines if not line.startswith("<path"))
        + "\n</g>\n</svg>\n"
    )


def _implied(found: dict[str, set[str]], room: str) -> set[str]:
    reached: set[str] = set()
    waiting = [further for other in found[room] for further in found.get(other, ())]
    while waiting:
        other = waiting.pop()
        if other not in reached:
            reached.add(other)
            waiting += found.get(other, ())
    return reached


def _order(room: str) -> tuple[int, str]:
    return FOLDERS[::-1].index(room.split(".")[0]), room


def main() -> int:
    """Write the picture, or compare it with the committed one."""
    picture = draw(arrows())
    if "--check" in sys.argv[1:]:
        same = PICTURE.is_file() and PICTURE.read_text(encoding="utf-8") == picture
        print("the picture is that of the code" if same else f"run python {Path(__file__).parent.name}/{Path(__file__).name}")
        return 0 if same else 1
    PICTURE.write_text(picture, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
