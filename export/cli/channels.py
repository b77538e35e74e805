"""The command `channels`."""

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Final

from sparsepass.export.cli import support
from sparsepass.export.cli.output import print_json, print_text

if TYPE_CHECKING:
    from sparsepass.graph.channels import ChannelFlow, ChannelPlace, RotationGroup

_WIDTH: Final = 80
_MEANING: Final = {
    "free": "any order",
    "within blocks": "any order within a block",
    "pairs": "any order, each channel with its several positions",
}


def channels_command(
    model: support.ModelWithoutWeights,
    gguf_file: support.GgufFile = None,
    as_json: support.AsJson = False,
) -> None:
    """Print where the channels of MODEL are made, who reads them, and what can be done to them without any effect.

    Groups of channels that can change places (the pass permute_channels uses them), that can carry a factor (fold_norms does),
    that an orthogonal matrix can mix (rotate does) and that can be taken out where they are zero, and for all others the reason
    why not. Found in the graph, for any architecture. An axis of a tensor is written as
    weight[axis]. Groups whose names differ in numbers only are one entry; --json has each by itself.

    Exit code: 0 done, 2 wrong usage or unreadable input.
    """
    from sparsepass.export.plan import load_for_plan
    from sparsepass.graph.channels import channel_flow

    flow = channel_flow(load_for_plan(model, gguf_file=gguf_file))
    if as_json:
        print_json("channels", _as_json(flow))
    else:
        print_text("\n".join(_text(flow)))


def _as_json(flow: "ChannelFlow") -> dict[str, Any]:
    def places(found: "Sequence[ChannelPlace]") -> dict[str, Any]:
        return {
            key: [{"tensor": place.tensor, "axes": list(place.axes)} for place in found if place.reads == reads]
            for key, reads in (("made_by", False), ("read_by", True))
        }

    def reasons(found: "Mapping[tuple[str, tuple[int, ...]], str]") -> list[dict[str, Any]]:
        return [{"tensor": name, "axes": list(axes), "reason": reason} for (name, axes), reason in found.items()]

    return {
        "permutations": [
            {"order": group.order, "num_channels": group.num_channels} | places(group.places) for group in flow.permutations
        ],
        "scalings": [{"num_factors": group.num_factors} | places(group.places) for group in flow.scalings],
        "rotations": [
            {
                "num_channels": group.num_channels,
                "keeps_mean": group.keeps_mean,
                "even_gains": [{"tensor": place.tensor, "axes": list(place.axes)} for place in group.gains],
            }
            | places(group.places)
            for group in flow.rotations
        ],
        "removals": [{"num_channels": group.num_channels} | places(group.places) for group in flow.removals],
        "not_permuted": reasons(flow.refused),
        "not_scaled": reasons(flow.unscaled),
        "not_rotated": reasons(flow.unmixed),
        "not_removed": reasons(flow.kept),
    }


def _text(flow: "ChannelFlow") -> Iterator[str]:
    yield "Channels that can change places"
    yield from _groups((f"{g.num_channels} channels, {_MEANING[g.order]}", g.places, ()) for g in flow.permutations)
    yield "\nChannels that stay in their places"
    yield from _reasons(flow.refused)
    yield "\nChannels that can carry a factor"
    yield from _groups((f"{g.num_factors} factors", g.places, ()) for g in flow.scalings)
    yield "\nChannels that can carry no factor"
    yield from _reasons(flow.unscaled)
    yield "\nChannels that an orthogonal matrix can mix"
    yield from _groups((f"{g.num_channels} channels{_condition(g)}", g.places, g.gains) for g in flow.rotations)
    yield "\nChannels that are not mixed"
    yield from _reasons(flow.unmixed)
    yield "\nChannels that can be taken out where they are zero"
    yield from _groups((f"{g.num_channels} channels", g.places, ()) for g in flow.removals)
    yield "\nChannels that are not taken out"
    yield from _reasons(flow.kept)


def _condition(group: "RotationGroup") -> str:
    """What has to hold of gains and of the matrix."""
    keeping = ", keeping their mean" if group.keeps_mean else ""
    return keeping + (", where gains are one number each" if group.gains else "")


def _groups(found: "Iterable[tuple[str, Sequence[ChannelPlace], Sequence[ChannelPlace]]]") -> Iterator[str]:
    """An entry for each kind of group: those whose names differ in numbers only."""
    kinds: dict[tuple[Any, ...], list[tuple[Sequence[ChannelPlace], Sequence[ChannelPlace]]]] = {}
    for title, places, gains in found:
        alike = tuple(dict.fromkeys((_template(place.tensor), place.axes, place.reads) for place in (*places, *gains)))
        kinds.setdefault((title, alike), []).append((places, gains))
    for (title, _), groups in kinds.items():
        yield f"  {title}" + (f", {len(groups)} groups" if len(groups) > 1 else "")
        made, read = ([place for places, _ in groups for place in places if place.reads == reads] for reads in (False, True))
        for word, its in (("made by", made), ("read by", read), ("gains", [place for _, gains in groups for place in gains])):
            yield from _wrapped(f"    {word} ", _together(_name(place.tensor, place.axes) for place in its))
    if not kinds:
        yield "  none"


def _reasons(found: "Mapping[tuple[str, tuple[int, ...]], str]") -> Iterator[str]:
    kinds: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for (tensor, axes), reason in found.items():
        name = _name(tensor, axes)
        kinds.setdefault((_template(name), _template(reason)), []).append((name, reason))
    for its in kinds.values():
        yield from _wrapped("  ", _together([name for name, _ in its]))
        yield from _wrapped("    ", _together([reason for _, reason in its]))
    if not kinds:
        yield "  none"


def _name(tensor: str, axes: Sequence[int]) -> str:
    return f"{tensor}[{','.join(map(str, axes))}]"


_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=[.)\[]|$)")
"""A part of a path that is a number."""


def _template(text: str) -> str:
    return _NUMBER.sub("*", text)


def _together(texts: Iterable[str]) -> list[str]:
    """Texts that differ in numbers only, as one text with ranges, where it means exactly these.

    >>> _together(["h.0.a", "h.1.a", "h.2.a", "b"])
    ['h.0-2.a', 'b']
    """
    by_template: dict[str, list[str]] = {}
    for text in dict.fromkeys(texts):
        by_template.setdefault(_template(text), []).append(text)
    made = []
    for alike in by_template.values():
        numbers = [sorted({int(number) for number in column}) for column in zip(*map(_NUMBER.findall, alike), strict=True)]
        if prod(map(len, numbers)) == len(alike):
            between = zip(_NUMBER.split(alike[0]), [*map(_ranges, numbers), ""], strict=True)
            made.append("".join(part + ranges for part, ranges in between))
        else:
            made += alike
    return made


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers, neighbours as ranges.

    >>> _ranges([0, 1, 2, 5])
    '0-2,5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _wrapped(lead: str, texts: Sequence[str]) -> list[str]:
    """Texts behind a word, in lines that fit 80 columns; names of tensors are broken only where they are longer than that."""
    indent = " " * len(lead)
    return textwrap.wrap(", ".join(texts), _WIDTH, initial_indent=lead, subsequent_indent=indent, break_on_hyphens=False)
