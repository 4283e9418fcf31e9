"""Scalable pictures of key lists over the image."""

import base64
import io
from html import escape

from PIL import Image

from sparsifiner.tracing import LayerTrace

_SIDE = 320  # px on the page
_QUERY_COLOUR = "#e4572e"
_KEY_COLOUR = "#2e86de"
_WINDOW_COLOUR = "#888888"


def key_list_svg(image: Image.Image, trace: LayerTrace, query: tuple[int, int], head: int) -> str:
    """Draws which keys a query patch attends to, over its image.

    The query is outlined in red with its tile, listed keys are blue, the summary windows a grey grid.

    Args:
        image: the picture that the model saw, of any size.
        trace: what one layer did; the first image of its batch is drawn.
        query: row and column of the patch.
        head: attention head.

    Returns:
        An SVG element.

    Raises:
        ValueError: the query lies outside the grid, or patches were dropped before the layer.
    """
    connectivity = trace.connectivity
    if connectivity.grid is None:
        raise ValueError(
            f"the layer saw a {connectivity.layout}, others were dropped before; draw a layer that saw all"
        )
    layout, (height, width), tile = connectivity.layout, connectivity.grid, connectivity.tile
    y, x = query
    if not (0 <= y < height and 0 <= x < width):
        raise ValueError(f"query={query} lies outside the grid of {height}x{width} patches")
    row = (y // tile) * layout.square_grid(tile)[1] + x // tile
    listed = [key for key in connectivity.indices[0, head, row].tolist() if key >= connectivity.prefix]
    cells = [divmod(key - connectivity.prefix, width) for key in listed]
    unit = f"{_SIDE}px"
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{unit}" height="{_SIDE * height // width}px" '
        f'role="img" aria-label="{escape(f"keys of the patch at row {y}, column {x}")}">',
        f'<image href="{_as_data_uri(image)}" width="{width}" height="{height}" '
        'preserveAspectRatio="none" style="image-rendering:pixelated"/>',
    ]
    parts += [
        f'<rect x="{left}" y="{top}" width="1" height="1" fill="{_KEY_COLOUR}" fill-opacity=".55"/>'
        for top, left in cells
    ]
    if trace.summary is not None:
        side = layout.extent(trace.summary)
        parts += [
            f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" '
            f'stroke="{_WINDOW_COLOUR}" stroke-width=".04"/>'
            for top in range(0, height, side)
            for left in range(0, width, side)
        ]
    parts.append(_outline(y // tile * tile, x // tile * tile, tile, 0.08))
    parts.append(_outline(y, x, 1, 0.2))
    parts.append("</svg>")
    return "".join(parts)


def _outline(top: int, left: int, side: int, stroke: float) -> str:
    return (
        f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" '
        f'stroke="{_QUERY_COLOUR}" stroke-width="{stroke}"/>'
    )


def _as_data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
