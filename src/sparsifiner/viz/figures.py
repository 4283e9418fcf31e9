"""Scalable pictures of key lists over the image."""

import base64
import io
from collections.abc import Iterable
from html import escape

from PIL import Image

_SIDE = 320  # px on the page
_QUERY_COLOUR = "#e4572e"
_KEY_COLOUR = "#2e86de"
_WINDOW_COLOUR = "#888888"


def key_list_svg(
    image: Image.Image,
    keys: Iterable[int],
    grid: tuple[int, int],
    query: tuple[int, int],
    *,
    tile: int = 1,
    window: int | None = None,
) -> str:
    """Draws which keys a query patch attends to, over its image.

    The query is outlined in red with its tile, listed keys are blue, the summary windows a grey grid.

    Args:
        image: the picture that the model saw, of any size.
        keys: patches that the query attends to one by one, row-major, as `Connectivity.patches_of` gives
            them.
        grid: patches along height and width.
        query: row and column of the patch.
        tile: side in patches of the tiles that share a list.
        window: side in patches of the summary windows, None for none.

    Returns:
        An SVG element.
    """
    (height, width), (y, x) = grid, query
    cells = [divmod(key, width) for key in keys]
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
    if window is not None:
        parts += [
            f'<rect x="{left}" y="{top}" width="{window}" height="{window}" fill="none" '
            f'stroke="{_WINDOW_COLOUR}" stroke-width=".04"/>'
            for top in range(0, height, window)
            for left in range(0, width, window)
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
