"""Pictures: where things are drawn, what they say in words, and the order of layers over depth."""

import math
import random
import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, strategies as st
from markupsafe import Markup

from sparsepass.export.report.charts import (
    Bar,
    Line,
    Picture,
    bar_chart,
    el,
    escaped,
    figure,
    grid_chart,
    line_chart,
    value_scale,
)
from sparsepass.export.report.depth import depth_grid
from sparsepass.export.report.layers import joined_names

FIGURES = st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=9)


def parsed(picture: Picture) -> ElementTree.Element:
    return ElementTree.fromstring(picture.file())


def shapes(picture: Picture, kind: str) -> list[dict[str, str]]:
    return [dict(found.attrib) for found in parsed(picture).iter() if found.tag.endswith(f"}}{kind}")]


def test_text_is_escaped_once_and_markup_is_not() -> None:
    made = el("p", "<b>", el("i", "&"), "x", None, 1, title='"', data_x=2, hidden=None)
    assert made == '<p title="&#34;" data-x="2">&lt;b&gt;<i>&amp;</i>x1</p>'
    assert escaped(made) is made
    assert isinstance(made, Markup)
    assert escaped("a\x00b\ud800") == "a\ufffdb\ufffd", "what neither HTML nor UTF-8 can hold"


@given(FIGURES, st.booleans(), st.booleans())
@example([1e-308, 10.0, 6e11], False, False)
def test_an_axis_holds_every_value(values: list[float], from_zero: bool, tight: bool) -> None:
    scale = value_scale(values, from_zero=from_zero, tight=tight)
    assert scale.low < scale.high
    for value in values:
        assert -1e-6 <= scale.place(value) <= 1 + 1e-6
    assert len(scale.ticks) <= 13
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks)


def test_a_wide_axis_is_logarithmic() -> None:
    scale = value_scale([3.0, 25.0, 900.0])
    assert scale.log
    assert (scale.low, scale.high) == (2.0, 1000.0) or (scale.low, scale.high) == (1.0, 1000.0)
    assert scale.place(math.sqrt(scale.low * scale.high)) == pytest.approx(0.5)
    assert not value_scale([3.0, 25.0]).log
    assert not value_scale([-3.0, 900.0]).log


def test_lines_break_where_nothing_was_measured() -> None:
    picture = line_chart(
        "T", [1, 2, 3, 4, 5], [Line(label="loss", values=[4.0, 3.0, None, None, 2.0])], x_label="tokens", y_label="y"
    )
    (line,) = [shape["d"] for shape in shapes(picture, "path") if shape["class"].startswith("l ")]
    assert line.count("M") == 2
    assert line.count("L") == 1
    assert len(shapes(picture, "circle")) == 3
    places = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", line)]
    assert places == sorted(places), "a smaller value is drawn further down"
    assert "loss: first 4, last 2, least 2, most 4" in picture.description


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar(label="a", parts=((1.0, "a"),), text="one"), Bar(label="b", parts=((3.0, "b"), (1.0, "n")), text="four")]
    drawn = shapes(bar_chart("T", bars), "rect")
    widths = [float(box["width"]) for box in drawn]
    assert widths == pytest.approx([widths[2], 3 * widths[2], widths[2]])
    assert float(drawn[2]["x"]) == pytest.approx(widths[1])


@pytest.mark.parametrize("count", [3, 200])
def test_a_grid_has_a_cell_a_layer(count: int) -> None:
    names = [f"h.{block}.{kind}" for block in range(count) for kind in ("up", "down")] + ["head"]
    values: dict[str, float | None] = {name: index / len(names) for index, name in enumerate(names)}
    values["head"] = None
    picture = grid_chart("T", depth_grid(names), values, label={names[0]: "<first>"})
    cells = [shape for shape in shapes(picture, "rect") if shape["class"] in ("fa", "hollow") and shape["height"] == "14"]
    if count == 3:
        assert len(cells) == 7
        assert "<first>" in "".join(parsed(picture).itertext())
    else:
        merged = [shape["d"] for shape in shapes(picture, "path")]
        assert sum(d.count("M") for d in merged) == len(names)
        assert len(picture.body) < 40_000
    assert f"{2 * count} of {2 * count + 1} layers" in picture.description


def test_layers_stand_by_kind_and_block() -> None:
    grid = depth_grid(["h.0.a.weight", "h.10.a.weight", "h.2.b.weight", "wte.weight"])
    assert (grid.kinds, grid.blocks) == (("a", "b", "wte"), ("0", "2", "10"))
    assert grid.cells({"h.10.a.weight": 0.3, "h.2.b.weight": math.nan, "other": 1.0}) == {(0, 2): 0.3}


def test_two_stacks_do_not_share_cells() -> None:
    grid = depth_grid(["encoder.block.0.layer.0.q", "decoder.block.0.layer.0.q", "decoder.block.0.layer.1.q"])
    assert grid.kinds == ("encoder.block.layer.0.q", "decoder.block.layer.0.q", "decoder.block.layer.1.q")
    assert len(set(grid.places.values())) == 3


def test_many_kinds_are_taken_together() -> None:
    names = [f"h.{block}.experts.{expert}.w1" for block in range(2) for expert in range(64)]
    grid = depth_grid(names)
    assert grid.kinds == ("experts.*.w1",)
    assert grid.cells({names[0]: 1.0, names[1]: 2.0}) == {(0, 0): 1.5}


def test_a_model_without_blocks_is_one_column() -> None:
    assert depth_grid(["first", "second"]).blocks == ("",)
    assert depth_grid(["0", "2"]).places == {"0": (0, 0), "2": (0, 1)}
    assert depth_grid([]).kinds == ()


def test_figures_on_an_axis_are_short() -> None:
    source = random.Random(0)
    for _ in range(200):
        value = source.uniform(-1, 1) * 10 ** source.randint(-9, 9)
        assert len(figure(value)) <= 9
        assert float(figure(value).replace(",", "")) == pytest.approx(value, rel=6e-3)


def test_names_with_more_digits_than_python_reads_are_names() -> None:
    name = f"h.{'9' * 5000}.up"
    assert name in depth_grid([name, "h.1.up"]).places
    assert joined_names([name, "h.1.up", "h.2.up"]) == f"{name}, h.1-2.up"
