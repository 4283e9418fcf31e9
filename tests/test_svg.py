"""Pictures of the same measurements are the same file."""

from matplotlib.figure import Figure

from sparsifiner.svg import svg_of, write_svg


def draw():
    figure = Figure(figsize=(2, 2))
    figure.add_subplot().plot([0, 1, 2], [0, 4, 1], "o-")  # markers and clips get names
    return figure


def test_equal_figures_give_equal_files(tmp_path):
    assert svg_of(draw()) == svg_of(draw())
    write_svg(tmp_path / "a.svg", draw())
    text = (tmp_path / "a.svg").read_text()
    assert text == svg_of(draw())
    assert "<dc:date>" not in text
