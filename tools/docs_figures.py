"""How the figures of the site's notebooks are drawn and described: `register` runs before a notebook's first cell.

A figure's alternative text is what a reader who cannot see it would be told first: its titles, what its axes are, and
its legend. A comment `#| alt: ...` in the cell that shows it says something better.
"""

from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from matplotlib.figure import Figure

DPI = 160


def alternative(figure: Figure) -> str:
    said = [figure.get_suptitle()]
    for axes in figure.axes:
        said += [axes.get_title(), axes.get_title("left"), axes.get_title("right")]
        labels = (("across", axes.get_xlabel()), ("up", axes.get_ylabel()))
        said += [f"{way}: {label}" for way, label in labels if label]
        legend = axes.get_legend()
        said += ["legend: " + ", ".join(text.get_text() for text in legend.get_texts())] if legend else []
    said = [" ".join(line.split()).rstrip(".") for line in said]
    return ". ".join(dict.fromkeys(line for line in said if line))


def register(shell: InteractiveShell) -> None:
    """Show each figure that ends a cell as a PNG, with `alt` and its width in `inches` in the output's metadata."""
    select_figure_formats(shell, {"png"}, bbox_inches="tight", dpi=DPI)
    formatter = shell.display_formatter.formatters["image/png"]
    draw = formatter.lookup_by_type(Figure)

    def show(figure: Figure) -> tuple:
        titled = figure.axes and any(axes.get_title(loc) for axes in figure.axes for loc in ("left", "center", "right"))
        alt = alternative(figure) if titled or figure.get_suptitle() else ""
        return draw(figure), {"alt": alt, "inches": float(figure.get_figwidth())}

    formatter.for_type(Figure, show)
