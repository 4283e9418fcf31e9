"""What calibration measured: each layer's error against its number of keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsifiner.svg import write_svg

_SIZE = (8.0, 4.0)  # inches


def write_calibration(file: Path, report: Mapping[str, Any]) -> None:
    """Draws the errors of single layers, and the keys that each layer had and has.

    Args:
        file: an SVG; it is replaced.
        report: what was measured and chosen, as `Calibration.to_dict` gives it.
    """
    # matplotlib takes a second to import
    from matplotlib import colormaps  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=_SIZE, layout="constrained")
    curves, bars = figure.subplots(1, 2)
    layers = range(len(report["budgets"]))
    for layer in layers:
        colour = colormaps["viridis"](layer / max(1, len(layers) - 1))
        errors = [max(error, 1e-7) for error in report["layer_errors"][layer]]
        curves.plot(report["lengths"], errors, ".-", color=colour, label=str(layer))
    curves.set_xscale("log", base=2)
    curves.set_yscale("log")
    curves.set_xlabel("listed keys of one sparse layer, all others dense")
    curves.set_ylabel("KL of the logits" if report["match"] == "logits" else "distance of patch tokens")
    curves.legend(title="layer", fontsize=6, title_fontsize=7, ncols=2)
    for name, shift, label, fill in (
        ("budgets_before", -0.2, "before", "#bbbbbb"),
        ("budgets", 0.2, "calibrated", "#2e86de"),
    ):
        bars.bar([layer + shift for layer in layers], report[name], 0.4, label=label, color=fill)
    bars.set_xlabel("layer")
    bars.set_ylabel("listed keys")
    bars.legend(fontsize=7)
    bars.set_title(f"error {report['error_before']:.3g} before, {report['error']:.3g} now", fontsize=9)
    write_svg(file, figure)
