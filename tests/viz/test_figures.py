"""Pictures say what the lists say."""

from xml.etree import ElementTree

from PIL import Image

from sparsifiner.viz.figures import key_list_svg

IMAGE = Image.new("RGB", (8, 6), "white")
GRID = (3, 4)


def rectangles(svg, colour):
    tree = ElementTree.fromstring(svg)
    found = [e.attrib for e in tree if e.tag == "rect" and colour in (e.get("fill"), e.get("stroke"))]
    return [tuple(int(e[key]) for key in ("y", "x", "width")) for e in found]


def test_keys_tile_and_query_are_drawn_where_they_lie():
    svg = key_list_svg(IMAGE, [1, 7], GRID, (1, 3), tile=2)
    assert rectangles(svg, "#2e86de") == [(0, 1, 1), (1, 3, 1)]
    assert rectangles(svg, "#e4572e") == [(0, 2, 2), (1, 3, 1)]
    assert rectangles(key_list_svg(IMAGE, [], GRID, (2, 3)), "#2e86de") == []


def test_summary_windows_are_a_grid():
    assert len(rectangles(key_list_svg(IMAGE, [0], GRID, (0, 0), window=2), "#888888")) == 4
    assert rectangles(key_list_svg(IMAGE, [0], GRID, (0, 0)), "#888888") == []
