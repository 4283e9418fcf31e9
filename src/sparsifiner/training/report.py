"""The report of a training run: its curves in one page."""

import html
import importlib.resources
from pathlib import Path
from string import Template
from typing import Any

from sparsifiner.files import write_aside
from sparsifiner.svg import svg_of

_SIZE = (5.2, 3.0)  # inches
_TITLES = {
    "loss": "loss",
    "classify": "cross entropy",
    "distil": "KL to the teacher",
    "token": "token error",
    "reconstruct": "attention reconstruction",
    "self_reconstruct": "reconstruction of the own attention",
    "lr": "learning rate",
    "images_per_second": "images/s",
    "top1": "validation top-1, %",
    "mask_recall": "attention mass on the listed keys",
}


def write_training_report(file: Path, records: list[dict[str, Any]]) -> None:
    """Writes report.html: a table of the validations and one curve per measurement, stage by stage.

    Args:
        file: where to write; it is replaced.
        records: measurements of a run, as in metrics.jsonl.
    """
    template = importlib.resources.files("sparsifiner.training").joinpath("report.html").read_text()
    stages = list(dict.fromkeys((record["stage_index"], record["stage"]) for record in records))
    sections = []
    for index, name in stages:
        own = [record for record in records if record["stage_index"] == index]
        figures = "".join(f"<figure>{svg}</figure>" for svg in _curves(own))
        sections.append(f'<h2>Stage {index + 1}: {html.escape(name)}</h2><div class="row">{figures}</div>')
    page = Template(template).substitute(table=_validation_table(records), stages="".join(sections))
    write_aside(file, lambda aside: aside.write_text(page))


def _curves(records: list[dict[str, Any]]) -> list[str]:
    """One SVG per quantity; validation draws the weights and their average into one."""
    names = [name for name in _TITLES if any(name in record for record in records)]
    return [_curve(name, records) for name in names]


def _curve(name: str, records: list[dict[str, Any]]) -> str:
    # matplotlib takes a second to import, and only reports need it
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    for key, label in ((name, "weights"), (f"{name}_ema", "their average")):
        points = [(record["epoch"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None, label=label)
    if len(axes.lines) > 1:
        axes.legend()
    axes.set_title(_TITLES[name], fontsize=10)
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    svg = svg_of(figure)
    return svg[svg.index("<svg") :]  # without the declarations that only a file of its own has


def _validation_table(records: list[dict[str, Any]]) -> str:
    rows = [record for record in records if record["kind"] == "validation"]
    columns = ["top1", "top1_ema", "mask_recall"]
    shown = [column for column in columns if any(column in row for row in rows)]
    titles = {"top1": "top-1 %", "top1_ema": "top-1 % of the average", "mask_recall": "mask recall"}
    head = "".join(f"<th>{title}</th>" for title in ("stage", "epoch", *(titles[name] for name in shown)))
    body = ""
    for row in rows:
        cells = [f"{row[name]:.4g}" if name in row else "" for name in shown]
        cells = [html.escape(row["stage"]), f"{row['epoch']:g}", *cells]
        body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"
