"""``addcow farm graph``: which file backs which, as text, JSON, for graphviz, or as a picture.

Text and picture are the same lines, from the same rows of the forest. Lines are drawn as they
come, and nothing here calls itself: a chain may be of any depth, and a base have any number of
overlays. Names of files may contain anything. Each form spells them in its own way: what would
break a line or steer a terminal is written out, quotes and backslashes are escaped for graphviz,
characters that XML has no words for are replaced.

In the summary of JSON a mark counts the files that have it. A backing file that is missing is
not one of them: it is told by the overlays over it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from addcow_mp.cli.messages import one_line
from addcow_mp.cli.options import Opening, Places, Quiet, Share
from addcow_mp.cli.reasons import explain
from addcow_mp.farm.graph import Graph, Mark, Node, NodeKind, farm_graph
from addcow_mp.units import human_size

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element


class Drawing(StrEnum):
    """How a graph is drawn."""

    human = "human"
    json = "json"
    jsonl = "jsonl"
    dot = "dot"
    svg = "svg"


def command(
    *,
    places: Places,
    output: Annotated[Drawing, typer.Option("--output", help="how to draw")] = Drawing.human,
    quiet: Quiet = False,
    share: Share = False,
    opening: Opening,
) -> None:
    """Draw which file backs which, what is missing, and what no overlay names."""
    access = opening.access(share=share, exclude=places.exclude)
    drawn = farm_graph(places.listed(), access)
    DRAWERS[output](drawn)
    explain(drawn.places, [node.path for node in drawn.nodes], quiet=quiet)
    raise typer.Exit(0 if drawn.is_whole else 1)


UNNAMED_HEADING = "Named by no overlay:"
UNEXAMINED_HEADING = "Not examined:"

#: Colours that are told apart on white, in the words of SVG and of graphviz.
_COLOURS = {
    Mark.DAMAGED: "#c00000",
    Mark.UNEXAMINED: "#806000",
    Mark.MISSING_IMAGE: "#c00000",
    Mark.MISSING_BACKING: "#c00000",
    Mark.CYCLE: "#a000a0",
    Mark.SHARED_IMAGE: "#c00000",
    Mark.BASE_CHANGED: "#c06000",
    Mark.NOT_EXAMINED: "#806000",
    Mark.UNNAMED: "#707070",
}
_PLAIN = "#202020"
_ELBOW = {"fill": "none", "stroke": "#909090", "shape-rendering": "crispEdges"}


class Line(NamedTuple):
    """A line of the tree; ``node`` is None where it is not the line of a file."""

    depth: int
    last: bool
    words: str
    marks: list[Mark]
    node: Node | None


def _lines(graph: Graph) -> Iterator[Line]:
    for row in graph.rows():
        if row.again:
            told = f"comes back to {row.node.path}"
            yield Line(row.depth, row.last, told, [Mark.CYCLE], None)
        else:
            yield Line(row.depth, row.last, _words(row.node), row.node.marks, row.node)
    yield from _group(UNEXAMINED_HEADING, graph.unexamined)
    yield from _group(UNNAMED_HEADING, graph.unnamed)


def _group(heading: str, nodes: list[Node]) -> Iterator[Line]:
    """Files beneath a heading; nothing where there are none."""
    if nodes:
        yield Line(0, True, heading, [], None)
    for node in nodes:
        yield Line(1, node is nodes[-1], _words(node), node.marks, node)


def _words(node: Node) -> str:
    """Path, virtual size, how much is local or else the format, and why it is not examined."""
    what = _share(node) if node.member is not None else node.format or ""
    size = "" if node.kind is NodeKind.NOT_EXAMINED and node.virtual_size is None else _size(node)
    return "  ".join(filter(None, (node.path, size, what, node.problem)))


def _size(node: Node) -> str:
    return "?" if node.virtual_size is None else human_size(node.virtual_size)


def _share(node: Node) -> str:
    percent = None if node.member is None else node.member.percent_local
    return "? local" if percent is None else f"{percent:.1f}% local"


# Text


def draw_text(graph: Graph) -> None:
    """Print a tree, one line a file."""
    more: list[bool] = []  # whether siblings follow, for each level above and for this one
    for line in _lines(graph):
        del more[line.depth :]
        more.append(not line.last)
        marks = f"  [{', '.join(line.marks)}]" if line.marks else ""
        print(f"{_branches(more)}{one_line(line.words)}{marks}")


def _branches(more: list[bool]) -> str:
    if len(more) == 1:
        return ""
    above = ("│   " if follows else "    " for follows in more[1:-1])
    return "".join(above) + ("├── " if more[-1] else "└── ")


# JSON


def draw_json(graph: Graph) -> None:
    """Print images, other files and a summary as one document."""
    from addcow_mp.cli.jsontext import print_document

    document = {
        "images": [_image(node) for node in graph.images],
        "files": [_file(node) for node in graph.files],
        "summary": _summary(graph),
    }
    print_document(document)


def draw_jsonl(graph: Graph) -> None:
    """Print a line for each image, and for each file that is not examined."""
    from addcow_mp.cli.jsontext import print_line

    for node in graph.images:
        print_line(_image(node))
    for node in graph.files:
        if Mark.NOT_EXAMINED in node.marked:
            print_line(_file(node))


def _image(node: Node) -> dict[str, object]:
    """The keys of `farm ls`, and those of the graph."""
    from addcow_mp.cli.commands.farm.ls import describe

    assert node.member is not None  # noqa: S101 - every overlay has one
    return {
        **describe(node.member),
        "image": node.said.image,
        "full-image-filename": node.full_image,
        # Also of overlays that cannot be examined, as far as their headers say it.
        "backing-filename": node.said.backing,
        "full-backing-filename": node.full_backing,
        "overlays": [one.path for one in node.overlays],
        "marks": node.marks,
    }


def _file(node: Node) -> dict[str, object]:
    problem = node.problem if node.member is None else node.member.problem
    return {
        "filename": node.path,
        "kind": node.kind,
        **({} if node.format is None else {"format": node.format}),
        **({} if node.virtual_size is None else {"virtual-size": node.virtual_size}),
        **({} if node.backing is None else {"full-backing-filename": node.full_backing}),
        "overlays": [one.path for one in node.overlays],
        "marks": node.marks,
        **({} if problem is None else {"problem": str(problem)}),
    }


def _summary(graph: Graph) -> dict[str, int]:
    counts = {str(mark): graph.count(mark) for mark in Mark}
    return {"images": len(graph.images), "files": len(graph.files), **counts}


# Graphviz


def draw_dot(graph: Graph) -> None:
    """Print a digraph with an edge from each overlay to its backing file."""
    print("digraph farm {")
    print("    rankdir=RL;")
    print('    node [shape=box, fontname="monospace"];')
    for node in graph.nodes:
        print(f"    {_name(node)} [{_attributes(node)}];")
    for node in graph.nodes:
        if node.backing is not None:
            print(f"    {_name(node)} -> {_name(node.backing)}{_edge(node.backing)};")
    print("}")


def _name(node: Node) -> str:
    """The path, as an identifier: different for different paths, whatever is in them."""
    return f'"{_spelt_out(_escaped(node.path))}"'


def _attributes(node: Node) -> str:
    details = _words(node).removeprefix(node.path).lstrip()
    rows = [node.path, details, *(f"[{mark}]" for mark in node.marks)]
    label = "\\n".join(_escaped(_spelt_out(row)) for row in rows)
    colour = _colour(node.marks)
    dashed = ", style=dashed" if node.kind is NodeKind.MISSING else ""
    return f'label="{label}", color="{colour}", fontcolor="{colour}"{dashed}'


def _edge(backing: Node) -> str:
    if backing.kind is not NodeKind.MISSING:
        return ""
    return f' [style=dashed, color="{_COLOURS[Mark.MISSING_BACKING]}"]'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _spelt_out(text: str) -> str:
    """``text`` with every line break, control character and undecodable byte written out."""
    return _UNPRINTABLE.sub(_spelling, text)


def _spelling(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


#: Line breaks of any kind, control characters, and what undecodable bytes are turned into.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")


def _colour(marks: list[Mark]) -> str:
    """That of the gravest mark."""
    return _COLOURS[marks[0]] if marks else _PLAIN


# SVG

#: Names may begin with blanks, end with them, and have several in a row. Viewers know one or the
#: other of these two.
_KEEP_BLANKS = {"xml:space": "preserve", "style": "white-space: pre"}

_ROW, _INDENT, _MARGIN = 20, 20, 10
_FONT, _CHARACTER = 12, 7.3  # the width is that of common monospaced faces, for the page's size


def draw_svg(graph: Graph) -> None:
    """Print a picture of the tree, a row for each line, with details as tooltips."""
    from xml.etree import ElementTree as ET

    page = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg"})
    ET.SubElement(page, "title").text = "Who backs whom"
    ET.SubElement(page, "rect", {"width": "100%", "height": "100%", "fill": "white"})
    width = 0.0
    parents: list[int] = []  # the row of the line above, for each level
    for number, line in enumerate(_lines(graph)):
        del parents[line.depth :]
        width = max(width, _draw_row(page, line, number, parents))
        parents.append(number)
    _set_size(page, width, len(page) - 2)
    # References stand for all that is not ASCII: whatever the locale, the bytes are right.
    sys.stdout.write(ET.tostring(page, "us-ascii", xml_declaration=True).decode("ascii"))
    print()


def _draw_row(page: Element, line: Line, number: int, parents: list[int]) -> float:
    """Draw one line of the tree; returns where it ends at the right."""
    from xml.etree.ElementTree import SubElement

    row = SubElement(page, "g")
    x, y = _MARGIN + line.depth * _INDENT, _middle(number)
    if line.node is not None:
        SubElement(row, "title").text = _in_xml("\n".join(_details(line.node)))
    if parents:
        elbow = f"M {x - _INDENT / 2:g} {_middle(parents[-1]) + _FONT / 2:g} V {y:g} H {x - 2}"
        SubElement(row, "path", {**_ELBOW, "d": elbow})
    place = {"x": str(x), "y": f"{y + _FONT / 3:g}", "fill": _colour(line.marks), **_KEEP_BLANKS}
    text = SubElement(row, "text", {**place, "font-family": "monospace", "font-size": str(_FONT)})
    text.text = _in_xml(one_line(line.words))
    for mark in line.marks:
        told = SubElement(text, "tspan", {"fill": _COLOURS[mark], "font-weight": "bold"})
        told.text = f" [{mark}]"
    return x + _CHARACTER * len("".join(text.itertext()))


def _middle(number: int) -> float:
    return _MARGIN + _ROW * (number + 0.5)


def _set_size(page: Element, width: float, rows: int) -> None:
    right, bottom = round(width) + _MARGIN, 2 * _MARGIN + _ROW * rows
    page.set("width", str(right))
    page.set("height", str(bottom))
    page.set("viewBox", f"0 0 {right} {bottom}")


def _details(node: Node) -> Iterator[str]:
    """What the tooltip says, a line each."""
    yield one_line(node.path)
    yield f"kind: {node.kind}"
    if node.format is not None:
        yield f"format: {node.format}"
    yield f"virtual size: {_size(node)}"
    if node.member is not None:
        yield f"local: {_share(node).removesuffix(' local')}"
    for what, name in (("image file", node.said.image), ("backing file", node.said.backing)):
        if name is not None:
            yield f"{what}: {one_line(name)}"
    if node.marks:
        yield f"marks: {', '.join(node.marks)}"
    if node.member is not None and node.member.problem is not None:
        yield one_line(str(node.member.problem))
    if node.problem is not None:
        yield one_line(node.problem)


def _in_xml(text: str) -> str:
    """``text`` with a replacement character for each that XML forbids."""
    return _FORBIDDEN.sub("\ufffd", text)


_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


#: How to draw, by the word for it on the command line.
DRAWERS: dict[str, Callable[[Graph], None]] = {
    "human": draw_text,
    "json": draw_json,
    "jsonl": draw_jsonl,
    "dot": draw_dot,
    "svg": draw_svg,
}
