"""Pictures as SVG: lines, bars, and a grid over depth. Colours come from classes, so that a page has them light and dark."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from markupsafe import Markup, escape

from sparsepass.export.report.depth import DepthGrid

WIDTH: Final = 440
_LETTER: Final = 6.9
"""Width of a letter in a picture, roughly: its font is 12 units high."""
_MAX_TITLES: Final = 400
"""So many cells of a grid have a tooltip each; in a larger one, cells of one shade are one shape, so that pages stay small."""
_SHADES: Final = 16

STYLE: Final = (
    ".pic{--a:#2b62c9;--b:#c25e0a;--c:#1c7c4a;--d:#8a4fb5;--ink:#1c1d21;--soft:#5c616b;--line:#dfe1e6;--none:#9aa0aa;--halo:#fff;"
    "font:12px system-ui,-apple-system,'Segoe UI',Roboto,'Liberation Sans',Arial,sans-serif}"
    "@media screen and (prefers-color-scheme:dark){.pic{--a:#7fabff;--b:#f0a35a;--c:#5ccb90;--d:#cf9df0;--ink:#e7e8ea;"
    "--soft:#a5abb6;--line:#363b44;--none:#6d7480;--halo:#1b1e24}}"
    ".pic text{fill:var(--soft)}.pic .ink{fill:var(--ink)}.pic .axis{stroke:var(--line);fill:none}"
    ".pic .l{fill:none;stroke-width:1.8;stroke-linejoin:round}.pic .la{stroke:var(--a)}.pic .lb{stroke:var(--b)}"
    ".pic .lc{stroke:var(--c)}.pic .ld{stroke:var(--d)}.pic .ln{stroke:var(--none)}"
    ".pic .fa{fill:var(--a)}.pic .fb{fill:var(--b)}.pic .fc{fill:var(--c)}.pic .fd{fill:var(--d)}.pic .fn{fill:var(--none)}"
    ".pic .halo{paint-order:stroke;stroke:var(--halo);stroke-width:4px}"
    ".pic .hollow{fill:none;stroke:var(--none);stroke-dasharray:2 2}.pic .ref{stroke:var(--soft);stroke-dasharray:4 3}"
)
"""Style of all pictures. Tones: a, b, c, d, and n for what is not known."""
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


@final
@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture.

    Attributes:
        title: What it shows.
        description: The same in words, with its main figures, for those who do not see it.
        body: What is inside the svg element.
        width: Of the drawing, in its own units.
        height: Of the drawing.
        is_fluid: Whether it may be scaled to the page; a wide grid is scrolled instead.
    """

    title: str
    description: str
    body: Markup
    width: int
    height: int
    is_fluid: bool = True

    def svg(self) -> Markup:
        """The picture inside a page that has `STYLE`."""
        size = {} if self.is_fluid else {"width": self.width, "height": self.height}
        about = el("title", self.title), el("desc", self.description)
        return el("svg", *about, self.body, viewBox=f"0 0 {self.width} {self.height}", class_="pic", role="img", **size)

    def file(self) -> str:
        """The picture as a file of its own."""
        inside = el("title", self.title), el("desc", self.description), el("style", Markup(STYLE)), self.body
        size = {"viewBox": f"0 0 {self.width} {self.height}", "width": self.width, "height": self.height}
        return el("svg", *inside, xmlns="http://www.w3.org/2000/svg", **size, class_="pic", role="img") + "\n"


@final
@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart.

    Attributes:
        values: One a place on the horizontal axis; None leaves a gap.
        label: For the legend; empty for none.
        tone: See `STYLE`.
    """

    values: Sequence[float | None]
    label: str = ""
    tone: str = "a"


@final
@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar.

    Attributes:
        label: Stands above it.
        parts: Values and tones of its parts, from the left.
        text: Stands at its end.
    """

    label: str
    parts: tuple[tuple[float, str], ...]
    text: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Scale:
    """An axis: values between two ends, on a straight or a logarithmic scale."""

    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = ()

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        if self.log:
            return (math.log(max(value, self.low)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


def line_chart(
    title: str,
    x: Sequence[float],
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    from_zero: bool = False,
    marked: tuple[float, float, str] | None = None,
) -> Picture:
    """Lines over one horizontal axis; the vertical one is logarithmic where values differ more than tenfold.

    Args:
        title: What is shown.
        x: Places on the horizontal axis, rising.
        lines: What is drawn.
        x_label: Unit of the horizontal axis.
        y_label: Unit of the vertical axis.
        from_zero: Whether the vertical axis begins at zero.
        marked: A point to mark, and what is said of it.
    """
    left, right, top, bottom, height = 52, WIDTH - 12, 34, 196, 232
    known = [value for line in lines for value in line.values if value is not None]
    vertical = value_scale(known, from_zero=from_zero)
    across = value_scale(x, tight=True)

    def at(value_x: float, value_y: float) -> tuple[float, float]:
        return left + across.place(value_x) * (right - left), bottom - vertical.place(value_y) * (bottom - top)

    labels = [(line.label, line.tone) for line in lines if line.label]
    parts = [_legend(labels, left, 18) if labels else el("text", y_label, x=4, y=18)]
    for tick in vertical.ticks:
        _, y = at(x[0], tick)
        parts += [el("path", class_="axis", d=f"M{left} {y:.1f}H{right}"), _text(figure(tick), left - 6, y + 4, "end")]
    for tick in across.ticks:
        place, _ = at(tick, vertical.low)
        parts.append(_text(figure(tick), place, bottom + 16, "middle"))
    parts.append(_text(x_label, (left + right) / 2, bottom + 32, "middle"))
    for line in lines:
        points = zip(x, line.values, strict=True)
        parts += _line(line, [at(place, value) if value is not None else None for place, value in points])
    if marked is not None:
        spot_x, spot_y = at(marked[0], marked[1])
        end = spot_x > (left + right) / 2
        parts.append(el("circle", cx=f"{spot_x:.1f}", cy=f"{spot_y:.1f}", r=5.5, class_="l lb"))
        parts.append(el("text", marked[2], x=f"{spot_x + (-9 if end else 9):.1f}", y=f"{max(spot_y - 8, top + 8):.1f}",
                        text_anchor="end" if end else "start", class_="ink halo"))  # fmt: skip
    told = "; ".join(_told(line, y_label) for line in lines if any(value is not None for value in line.values))
    return Picture(title=title, description=f"Over {x_label}. {told}.", body=join(parts), width=WIDTH, height=height)


def bar_chart(
    title: str, bars: Sequence[Bar], *, legend: Sequence[tuple[str, str]] = (), reference: tuple[float, str] | None = None
) -> Picture:
    """Bars from the left, one below the other, each under its label.

    Args:
        title: What is shown.
        bars: What is drawn.
        legend: Labels and tones of the parts.
        reference: A value that is drawn as a line through all bars, and its label.
    """
    top, step, space = 26 if legend or reference else 6, 36, 96
    longest = max([sum(value for value, _ in bar.parts) for bar in bars] + [reference[0] if reference else 0.0] + [1e-30])
    room = WIDTH - space
    parts, ends = [_legend(legend, 0, 14)] if legend else [], []
    for row, bar in enumerate(bars):
        y, place = top + row * step, 0.0
        parts.append(el("text", _cut(bar.label, 64), x=0, y=y + 11, class_="ink"))
        for value, tone in bar.parts:
            length = max(value / longest * room, 1.0) if value else 0.0
            if length:
                parts.append(_box(place, y + 16, length, 12, f"f{tone}"))
            place += length
        ends.append(el("text", bar.text, x=f"{place + 6:.1f}", y=y + 26, class_="halo"))
    height = top + len(bars) * step + 4
    if reference is not None:
        place = reference[0] / longest * room
        parts.append(el("path", class_="axis ref", d=f"M{place:.1f} {top - 6}V{height}"))
        parts.append(_text(reference[1], place, top - 10, "middle" if place > 40 else "start"))
    parts += ends
    told = "; ".join(f"{bar.label}: {bar.text}" for bar in bars)
    return Picture(title=title, description=f"{told}.", body=join(parts), width=WIDTH, height=height)


def grid_chart(
    title: str,
    grid: DepthGrid,
    values: Mapping[str, float | None],
    *,
    label: Mapping[str, str],
    tone: str = "a",
    tones: Mapping[str, str] | None = None,
    high: float | None = None,
    legend: Sequence[tuple[str, str]] = (),
    unit: str = "",
) -> Picture:
    """A cell for each layer: rows are kinds of layers, columns the blocks, from the model's first to its last.

    Args:
        title: What is shown.
        grid: Where the layers stand.
        values: Layer -> value, which is the shade; None draws an empty cell.
        label: Layer -> what its tooltip says.
        tone: Of all cells.
        tones: Layer -> tone, where they differ.
        high: Value of the darkest shade, the lightest being that of 0; by default the largest value.
        legend: Labels and tones, in place of the ramp of shades.
        unit: What the ramp's figures are followed by.
    """
    names = [_cut(kind, 30) for kind in grid.kinds]
    left = 14 + int(_LETTER * max(map(len, names)))
    size = max(6, min(22, 620 // len(grid.blocks)))
    top, height = 24, 15
    width = max(left + size * len(grid.blocks) + 12, left + 210)
    cells = grid.cells(values)
    highest = high if high is not None else max(cells.values(), default=0.0)
    at = {place: name for name, place in reversed(list(grid.places.items()))}
    detailed = len(at) <= _MAX_TITLES
    shapes: dict[tuple[str, float | None], list[str]] = {}
    parts = [_text(kind, left - 6, top + row * height + 11, "end") for row, kind in enumerate(names)]
    for place, name in at.items():
        value = cells.get(place)
        shade = None if value is None else _shade(value, highest)
        kind = "hollow" if shade is None else f"f{(tones or {}).get(name, tone)}"
        x, y, w, h = left + place[1] * size, top + place[0] * height, size - 1, height - 1
        if detailed:
            hint = el("title", f"{name}: {label.get(name, '')}")
            parts.append(el("rect", hint, x=x, y=y, width=w, height=h, class_=kind, fill_opacity=shade))
        else:
            shapes.setdefault((kind, shade), []).append(f"M{x} {y}h{w}v{h}h-{w}z")
    parts += [el("path", d="".join(each), class_=kind, fill_opacity=shade) for (kind, shade), each in shapes.items()]
    bottom = top + len(names) * height
    for column in range(0, len(grid.blocks), math.ceil(26 / size)):
        parts.append(_text(grid.blocks[column], left + (column + 0.5) * size, bottom + 14, "middle"))
    if len(grid.blocks) > 1:
        parts.append(_text("block", left - 6, bottom + 14, "end"))
    parts.append(_legend(legend, left, 12) if legend else _ramp(left, highest, tone, unit))
    told = f"{len(cells)} of {len(at)} layers have a value"
    if cells and not legend:
        told += f", from {figure(min(cells.values()))}{unit} to {figure(max(cells.values()))}{unit}"
    return Picture(title=title, description=f"{told}.", body=join(parts), width=int(width), height=bottom + 22, is_fluid=False)


def value_scale(values: Iterable[float], *, from_zero: bool = False, tight: bool = False) -> Scale:
    """An axis for values: a logarithmic one where all are positive and the largest is more than ten times the smallest.

    Args:
        values: What has to fit.
        from_zero: Whether it begins at zero.
        tight: Whether it ends where the values end.

    Example:
        >>> value_scale([0.0, 3.0, 9.5]).ticks
        (0.0, 2.0, 4.0, 6.0, 8.0, 10.0)
        >>> value_scale([1.0, 400.0]).ticks
        (1.0, 10.0, 100.0, 1000.0)
    """
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    if not tight and not from_zero and low > 0 and high > 10 * low:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = [m * 10.0**e for e in exponents for m in ((1, 2, 5) if len(exponents) <= 3 else (1,))]
        below = max((tick for tick in every if tick <= low), default=every[0])
        above = min((tick for tick in every if tick >= high), default=every[-1])
        ticks = [tick for tick in every if below <= tick <= above]
        return Scale(low=below, high=above, log=True, ticks=tuple(ticks[:: max(1, len(ticks) // 6)]))
    if from_zero:
        low = min(low, 0.0)
    if high - low < 1e-12 * max(abs(high), 1e-300):
        span = abs(high) * 0.5 or 1.0
        low, high = (low, high + span) if tight or from_zero else (low - span, high + span)
    step = _nice((high - low) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(index * step, 12) if step >= 1e-9 else index * step for index in range(first, last + 1)]
    if tight:
        return Scale(low=low, high=high, ticks=tuple(tick for tick in ticks if low <= tick <= high))
    return Scale(low=ticks[0], high=ticks[-1], ticks=tuple(ticks))


def figure(value: float) -> str:
    """A figure on an axis.

    Example:
        >>> [figure(value) for value in (0.0, 0.0004, 0.25, 1234.0, 1e6)]
        ['0', '4e-4', '0.25', '1,234', '1e6']
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e3 <= abs(value) < 1e5:
        return f"{value:,.0f}"
    if 1e-3 <= abs(value) < 1e3:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def printable(text: str) -> str:
    """Replace the characters that neither HTML, XML nor UTF-8 can hold."""
    return _UNPRINTABLE.sub("\ufffd", text)


def escaped(value: object) -> Markup:
    """Make any text safe as content and inside quoted attributes.

    Example:
        >>> escaped("<b>")
        Markup('&lt;b&gt;')
        >>> escaped(escaped("<"))
        Markup('&lt;')
    """
    return value if isinstance(value, Markup) else escape(printable(str(value)))


def join(parts: Iterable[object]) -> Markup:
    """Put parts one after the other; None is left out."""
    return Markup("").join(escaped(part) for part in parts if part is not None)


def el(tag: str, *content: object, **attributes: Any) -> Markup:
    """Make an element.

    Args:
        tag: Its name.
        content: Texts and elements; None is left out.
        attributes: A trailing underscore is dropped and others become hyphens; None leaves one out.

    Example:
        >>> el("text", "1 < 2", x=3, class_="ink", fill_opacity=None)
        Markup('<text x="3" class="ink">1 &lt; 2</text>')
    """
    opened = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escaped(value)}"' for name, value in attributes.items() if value is not None
    )
    return Markup(f"<{tag}{opened}>{join(content)}</{tag}>")


def _line(line: Line, points: Sequence[tuple[float, float] | None]) -> list[Markup]:
    path, known, alone = "", [], []
    for before, point, after in zip((None, *points), points, (*points[1:], None), strict=False):
        if point is not None:
            path += f"{'M' if before is None else 'L'}{point[0]:.1f} {point[1]:.1f}"
            known.append(point)
            if before is None and after is None:
                alone.append(point)
    dots = known if len(known) <= 16 else alone
    drawn = [el("path", class_=f"l l{line.tone}", d=path)] if path else []
    return drawn + [el("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.4, class_=f"f{line.tone}") for x, y in dots]


def _told(line: Line, unit: str) -> str:
    known = [value for value in line.values if value is not None]
    name = line.label or unit
    return f"{name}: first {figure(known[0])}, last {figure(known[-1])}, least {figure(min(known))}, most {figure(max(known))}"


def _legend(entries: Sequence[tuple[str, str]], x: float, y: float) -> Markup:
    parts = []
    for label, tone in entries:
        parts += [_box(x, y - 9, 10, 10, f"f{tone}"), _text(label, x + 15, y)]
        x += 15 + _LETTER * len(label) + 14
    return join(parts)


def _box(x: float, y: float, width: float, height: float, tone: str, shade: float | None = None) -> Markup:
    return el("rect", x=f"{x:.1f}", y=y, width=f"{width:.1f}", height=height, class_=tone, fill_opacity=shade)


def _text(text: str, x: float, y: float, anchor: str | None = None) -> Markup:
    return el("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _nice(step: float) -> float:
    exponent = math.floor(math.log10(step))
    return float(min((m for m in (1, 2, 5, 10) if m * 10.0**exponent >= step * 0.999), default=10)) * 10.0**exponent


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"


def _ramp(x: float, high: float, tone: str, unit: str) -> Markup:
    first = f"0{unit}"
    start = x + _LETTER * len(first) + 6
    boxes = [_box(start + 9 * step, 4, 9, 10, f"f{tone}", _shade(step / 8 * high, high)) for step in range(9)]
    return join([_text(first, x, 13), *boxes, _text(f"{figure(high)}{unit}", start + 87, 13)])


def _shade(value: float, high: float) -> float:
    share = value / high if high > 0 else 1.0
    return round(0.08 + 0.92 * round(min(max(share, 0.0), 1.0) * _SHADES) / _SHADES, 3)
