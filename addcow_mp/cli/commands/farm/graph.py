"""``addcow farm graph``: which file backs which, as text, JSON, for graphviz, or as a picture.

Text and picture have the same rows. They are printed one by one and no function here is recursive:
a chain may have any depth, and a base any number of overlays. rich.tree would draw the same lines,
but takes 1.5 s for 10,000 overlays of one base, and time and memory with the square of the depth.

Names of files may contain any byte. Each form escapes them in its own way: control characters and
line breaks are written out, quotes and backslashes are escaped for graphviz, and characters that
XML forbids are replaced.

The summary in JSON counts the files that have a mark. A missing backing file is not counted: its
overlays have the mark.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from addcow_mp.cli.commands.farm import ls
from addcow_mp.cli.jsontext import print_document, print_line
from addcow_mp.cli.listing import explain
from addcow_mp.cli.messages import one_line
from addcow_mp.cli.options import Opening, Places, Quiet, Share
from addcow_mp.farm.file_graph import FileGraph, file_graph
from addcow_mp.farm.marks import Mark, Node, NodeKind
from addcow_mp.units import human_size

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element


class Drawing(StrEnum):
    """The forms of a graph."""

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
    """Draw which file backs which, what is missing, and what no overlay names.

    Exit status: 0 all examined, 1 something could not be examined.
    """
    access = opening.access(share=share, exclude=places.exclude)
    graph = file_graph(places.listed(), access)
    _DRAWERS[output](graph)
    explain(graph.places, [node.path for node in graph.nodes], quiet=quiet)
    raise typer.Exit(graph.exit_code)


#: Colours that are distinct on white, in the spelling of SVG and graphviz.
_COLOURS = {
    Mark.DAMAGED: "#c00000",
    Mark.UNEXAMINED: "#806000",
    Mark.MISSING_IMAGE: "#c00000",
    Mark.MISSING_BACKING: "#c00000",
    Mark.CYCLE: "#a000a0",
    Mark.SHARED_IMAGE: "#c00000",
    Mark.FOREIGN_TWIN: "#b00020",
    Mark.OTHER_DATA_FILE: "#b00020",
    Mark.BASE_CHANGED: "#c06000",
    Mark.LENT: "#0060c0",
    Mark.LENT_FOR_READING: "#0060c0",
    Mark.NOT_EXAMINED: "#806000",
    Mark.UNNAMED: "#707070",
}
_PLAIN = "#202020"
_ELBOW = {"fill": "none", "stroke": "#909090", "shape-rendering": "crispEdges"}


class _Line(NamedTuple):
    """A line of the tree; ``node`` is None where it shows no file."""

    depth: int
    is_last: bool
    words: str
    marks: tuple[Mark, ...] = ()
    node: Node | None = None


def _lines(graph: FileGraph) -> Iterator[_Line]:
    for row in graph.rows():
        if row.again:
            yield _Line(row.depth, row.is_last, f"comes back to {row.node.path}", (Mark.CYCLE,))
        else:
            yield _line_of(row.node, row.depth, is_last=row.is_last)
    yield from _group("Not examined:", graph.of_kind(NodeKind.NOT_EXAMINED))
    yield from _group("Named by no overlay:", graph.of_kind(NodeKind.UNNAMED))


def _group(heading: str, nodes: list[Node]) -> Iterator[_Line]:
    """Files below a heading; nothing if there are none."""
    if nodes:
        yield _Line(0, True, heading)
    for node in nodes:
        yield _line_of(node, 1, is_last=node is nodes[-1])


def _line_of(node: Node, depth: int, *, is_last: bool) -> _Line:
    return _Line(depth, is_last, _words(node), node.marks, node)


def _words(node: Node) -> str:
    """Path, virtual size, allocated share or format, and why it is not examined."""
    what = _share(node) if node.member is not None else node.format or ""
    size = "" if node.kind is NodeKind.NOT_EXAMINED and node.virtual_size is None else _size(node)
    return "  ".join(filter(None, (node.path, size, what, node.problem)))


def _size(node: Node) -> str:
    return "?" if node.virtual_size is None else human_size(node.virtual_size)


def _share(node: Node) -> str:
    percent = None if node.member is None else node.member.percent_allocated
    return "? local" if percent is None else f"{percent:.1f}% local"


def _draw_text(graph: FileGraph) -> None:
    """Print a tree, one line a file."""
    follows: list[bool] = []  # whether siblings follow, for each level
    for line in _lines(graph):
        del follows[line.depth :]
        follows.append(not line.is_last)
        branches = "".join("│   " if more else "    " for more in follows[1:-1])
        if line.depth:
            branches += "└── " if line.is_last else "├── "
        marks = f"  [{', '.join(line.marks)}]" if line.marks else ""
        print(f"{branches}{one_line(line.words)}{marks}")


# JSON


def _draw_json(graph: FileGraph) -> None:
    """Print images, other files and a summary as one document."""
    images, files = graph.of_kind(NodeKind.OVERLAY), graph.files
    counts = {str(mark): graph.count(mark) for mark in Mark}
    document = {
        "images": [_image(node, graph) for node in images],
        "files": [_file(node, graph) for node in files],
        "summary": {"images": len(images), "files": len(files), **counts},
    }
    print_document(document)


def _draw_jsonl(graph: FileGraph) -> None:
    """Print a line for each image, and for each file that is not examined."""
    for node in graph.of_kind(NodeKind.OVERLAY):
        print_line(_image(node, graph))
    for node in graph.files:
        if Mark.NOT_EXAMINED in node.marks:
            print_line(_file(node, graph))


def _image(node: Node, graph: FileGraph) -> dict[str, object]:
    """The keys of `farm ls`, and those of the graph."""
    assert node.member is not None  # noqa: S101 - every overlay has one
    named = node.member.named
    return {
        **ls.describe(node.member),
        "image": named.image_name,
        "full-image-filename": named.image_path or named.image_name,
        # The header may be readable although the overlay cannot be examined.
        "backing-filename": named.backing_name,
        "full-backing-filename": _full_backing(node),
        "overlays": [one.path for one in graph.overlays(node)],
        "marks": node.marks,
    }


def _full_backing(node: Node) -> str | None:
    named = None if node.member is None else node.member.named
    return None if named is None else named.backing_path or named.backing_name


def _file(node: Node, graph: FileGraph) -> dict[str, object]:
    problem = node.problem if node.member is None else node.member.problem
    known = {
        "format": node.format,
        "virtual-size": node.virtual_size,
        "full-backing-filename": None if node.backing is None else _full_backing(node),
    }
    return {
        "filename": node.path,
        "kind": node.kind,
        **{key: value for key, value in known.items() if value is not None},
        "overlays": [one.path for one in graph.overlays(node)],
        "marks": node.marks,
        **({} if problem is None else {"problem": str(problem)}),
    }


# Graphviz


def _draw_dot(graph: FileGraph) -> None:
    """Print a digraph with an edge from each overlay to its backing file."""
    print("digraph farm {")
    print("    rankdir=RL;")
    print('    node [shape=box, fontname="monospace"];')
    for node in graph.nodes:
        print(f"    {_identifier(node)} [{_attributes(node)}];")
    for node in graph.nodes:
        below = graph.graph.below(node)
        if below is not None:
            style = _DASHED if below.kind is NodeKind.MISSING else ""
            print(f"    {_identifier(node)} -> {_identifier(below)}{style};")
    print("}")


_DASHED = f' [style=dashed, color="{_COLOURS[Mark.MISSING_BACKING]}"]'


def _identifier(node: Node) -> str:
    """The path as an identifier: different paths have different ones."""
    return f'"{_without_controls(_escaped(node.path))}"'


def _attributes(node: Node) -> str:
    details = _words(node).removeprefix(node.path).lstrip()
    rows = [node.path, details, *(f"[{mark}]" for mark in node.marks)]
    label = "\\n".join(_escaped(_without_controls(row)) for row in rows)
    colour = _colour(node.marks)
    dashed = ", style=dashed" if node.kind is NodeKind.MISSING else ""
    return f'label="{label}", color="{colour}", fontcolor="{colour}"{dashed}'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _without_controls(text: str) -> str:
    """``text`` with escapes for line breaks, control characters and undecodable bytes."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


#: Line breaks of all kinds, control characters, and the characters for undecodable bytes.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")


def _colour(marks: tuple[Mark, ...]) -> str:
    """The colour of the worst mark."""
    return _COLOURS[marks[0]] if marks else _PLAIN


# SVG

#: Names may begin or end with blanks and contain several in a row. Each viewer knows one of these.
_KEEP_BLANKS = {"xml:space": "preserve", "style": "white-space: pre"}

_ROW, _INDENT, _MARGIN = 20, 20, 10
_FONT, _CHARACTER = 12, 7.3  # the width of common monospaced faces, for the size of the page


def _draw_svg(graph: FileGraph) -> None:
    """Print a picture of the tree, a row for each line, with details as tooltips."""
    from xml.etree import ElementTree as ET

    page = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg"})
    ET.SubElement(page, "title").text = "Which file backs which"
    ET.SubElement(page, "rect", {"width": "100%", "height": "100%", "fill": "white"})
    width = 0.0
    parents: list[int] = []  # the row of the line above, for each level
    for number, line in enumerate(_lines(graph)):
        del parents[line.depth :]
        width = max(width, _draw_row(page, line, number, parents))
        parents.append(number)
    right, bottom = round(width) + _MARGIN, 2 * _MARGIN + _ROW * (len(page) - 2)
    page.attrib |= {
        "width": str(right),
        "height": str(bottom),
        "viewBox": f"0 0 {right} {bottom}",
    }
    # Characters that are not ASCII become references: the bytes are right in every locale.
    sys.stdout.write(ET.tostring(page, "us-ascii", xml_declaration=True).decode("ascii"))
    print()


def _draw_row(page: Element, line: _Line, number: int, parents: list[int]) -> float:
    """Draw one line of the tree; returns the position of its right end."""
    from xml.etree.ElementTree import SubElement

    row = SubElement(page, "g")
    x, y = _MARGIN + line.depth * _INDENT, _middle(number)
    if line.node is not None:
        SubElement(row, "title").text = _in_xml("\n".join(map(one_line, _details(line.node))))
    if parents:
        elbow = f"M {x - _INDENT / 2:g} {_middle(parents[-1]) + _FONT / 2:g} V {y:g} H {x - 2}"
        SubElement(row, "path", {**_ELBOW, "d": elbow})
    place = {"x": str(x), "y": f"{y + _FONT / 3:g}", "fill": _colour(line.marks), **_KEEP_BLANKS}
    text = SubElement(row, "text", {**place, "font-family": "monospace", "font-size": str(_FONT)})
    text.text = _in_xml(one_line(line.words))
    for mark in line.marks:
        span = SubElement(text, "tspan", {"fill": _COLOURS[mark], "font-weight": "bold"})
        span.text = f" [{mark}]"
    return x + _CHARACTER * len("".join(text.itertext()))


def _middle(number: int) -> float:
    return _MARGIN + _ROW * (number + 0.5)


def _details(node: Node) -> Iterator[str]:
    """The lines of the tooltip."""
    member = node.member
    keys: dict[str, object] = {
        "kind": node.kind,
        "format": node.format,
        "virtual size": _size(node),
        "local": None if member is None else _share(node).removesuffix(" local"),
        "image file": None if member is None else member.named.image_name,
        "backing file": None if member is None else member.named.backing_name,
        "marks": ", ".join(node.marks) or None,
    }
    yield node.path
    yield from (f"{key}: {value}" for key, value in keys.items() if value is not None)
    for problem in (None if member is None else member.problem, node.problem):
        yield from () if problem is None else (str(problem),)


def _in_xml(text: str) -> str:
    """``text`` with a replacement character for each that XML forbids."""
    return _FORBIDDEN.sub("\ufffd", text)


_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


_DRAWERS: dict[Drawing, Callable[[FileGraph], None]] = {
    Drawing.human: _draw_text,
    Drawing.json: _draw_json,
    Drawing.jsonl: _draw_jsonl,
    Drawing.dot: _draw_dot,
    Drawing.svg: _draw_svg,
}
