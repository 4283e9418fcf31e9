"""Pictures say what the lists say."""

from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.tracing import LayerTrace
from sparsifiner.viz.figures import key_list_svg

IMAGE = Image.new("RGB", (8, 6), "white")


def make_trace(summary=None):
    indices = torch.tensor([[0, 1], [2, 8], [3, 12], [5, -1]], dtype=torch.int32)
    return LayerTrace(Connectivity(indices.expand(1, 1, 4, 2), (3, 4), 2, 1), summary, dense=False)


def rectangles(svg, colour):
    tree = ElementTree.fromstring(svg)
    found = [e.attrib for e in tree if e.tag == "rect" and colour in (e.get("fill"), e.get("stroke"))]
    return [tuple(int(e[key]) for key in ("y", "x", "width")) for e in found]


def test_listed_keys_tile_and_query_are_drawn_where_they_lie():
    svg = key_list_svg(IMAGE, make_trace(), (1, 3), head=0)
    assert rectangles(svg, "#2e86de") == [(0, 1, 1), (1, 3, 1)]  # tokens 2 and 8 after one prefix token
    assert rectangles(svg, "#e4572e") == [(0, 2, 2), (1, 3, 1)]
    # prefix keys and empty slots have no place
    assert rectangles(key_list_svg(IMAGE, make_trace(), (0, 0), head=0), "#2e86de") == [(0, 0, 1)]
    assert rectangles(key_list_svg(IMAGE, make_trace(), (2, 3), head=0), "#2e86de") == [(1, 0, 1)]


def test_summary_windows_are_a_grid():
    assert len(rectangles(key_list_svg(IMAGE, make_trace(summary=2), (0, 0), 0), "#888888")) == 4


def test_query_outside_the_grid_is_named():
    with pytest.raises(ValueError, match=r"query=\(3, 0\) lies outside the grid of 3x4"):
        key_list_svg(IMAGE, make_trace(), (3, 0), head=0)


def test_lists_along_a_curve_have_no_place_in_the_picture():
    lists = Connectivity(torch.zeros(1, 1, 2, 1, dtype=torch.int32), tile=2, prefix=1, survivors=5)
    with pytest.raises(ValueError, match="saw a curve of 5 patches, others were dropped before; draw"):
        key_list_svg(IMAGE, LayerTrace(lists, None, dense=False), (0, 0), head=0)
