"""Pictures as SVG: the same measurements give the same file."""

import io
from pathlib import Path
from typing import Any

from sparsifiner.files import write_aside


def svg_of(figure: Any) -> str:
    """A matplotlib figure as SVG, without a date and with names of its parts that do not depend on chance."""
    # matplotlib takes a second to import
    from matplotlib import rc_context  # noqa: PLC0415

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "sparsifiner"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def write_svg(file: Path, figure: Any) -> None:
    """Writes a matplotlib figure to a file, which is replaced at once."""
    text = svg_of(figure)
    write_aside(file, lambda aside: aside.write_text(text))
