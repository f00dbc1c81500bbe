"""The pictures of a report as one image file, drawn by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loratools.page.parts import Chart, Figure, Heatmap, Tree, groups
from loratools.page.svg import DECADES
from loratools_formats.disk.errors import MissingDependencyError, OptionError, printable
from loratools_formats.disk.publish import publish_file

KINDS = ("png", "svg", "pdf")


def check_plot(path: Path) -> None:
    """Refuse what cannot be drawn before anything is computed.

    Raises:
        OptionError: the name does not end in a kind of picture.
        MissingDependencyError: matplotlib is not installed.
    """
    if path.suffix.lower()[1:] not in KINDS:
        names = " or ".join(f".{kind}" for kind in KINDS)
        raise OptionError("no such kind of picture", got=path.name, expected=f"a name in {names}")
    if not _has_matplotlib():
        raise MissingDependencyError(
            "pictures need matplotlib", hint="pip install 'loratools[report]'"
        )


def _has_matplotlib() -> bool:
    try:
        return find_spec("matplotlib") is not None
    except ValueError:  # a module that was put there without a description of where it is from
        return False


def plot(title: str, figures: Sequence[Figure], path: Path, *, overwrite: bool) -> None:
    """Draw pictures below each other into one file, whole or not at all.

    Raises:
        OptionError: the name does not end in a kind of picture, or there is nothing to draw.
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    check_plot(path)
    if not figures:
        raise OptionError("the report has no picture", got=title)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    heights = [_height(figure) for figure in figures]
    # Dates and random ids would make two runs differ; names with $ are no formulas.
    fixed: Any = {"svg.hashsalt": "loratools", "text.parse_math": False, "svg.fonttype": "none"}
    with rc_context(fixed):
        drawing = Drawing(figsize=(10.0, sum(heights) + 0.5), layout="constrained")
        FigureCanvasAgg(drawing)
        drawing.suptitle(_text(title, 80))
        places = drawing.subplots(
            len(figures), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        for place, figure in zip(places[:, 0], figures, strict=True):
            _draw(place, figure)
        kind = path.suffix.lower()[1:]
        dated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
        with publish_file(path, overwrite=overwrite) as temporary:
            drawing.savefig(os.fspath(temporary), format=kind, dpi=120, metadata=dated)


def _height(figure: Figure) -> float:
    """Return inches."""
    if isinstance(figure, Chart):
        return 4.0
    rows = len(figure.rows) if isinstance(figure, Heatmap) else len(figure.names)
    return min(1.2 + 0.3 * rows, 24.0)


def _draw(place: Any, figure: Figure) -> None:
    place.set_title(_text(figure.caption, 110), fontsize=9, loc="left")
    if isinstance(figure, Chart):
        _draw_chart(place, figure)
    elif isinstance(figure, Heatmap):
        _draw_heatmap(place, figure)
    else:
        _draw_tree(place, figure)


def _draw_chart(place: Any, figure: Chart) -> None:
    named = groups(figure.lines)
    seen: set[str] = set()
    for line in figure.lines:
        label = None if line.group in seen or len(named) < 2 else _text(line.group, 50)
        seen.add(line.group)
        place.plot(
            [x for x, _ in line.points],
            [y for _, y in line.points],
            color=f"C{named.index(line.group) % 10}",
            linewidth=1.0,
            alpha=0.8,
            label=label,
        )
    largest = max((y for line in figure.lines for _, y in line.points), default=0.0)
    if figure.log_y and largest > 0.0:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        place.set_yscale("log")
        place.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        place.yaxis.set_minor_formatter(NullFormatter())
        place.set_ylim(largest * 10.0**-DECADES, largest * 1.3)
    place.set_xlabel(_text(figure.x, 80))
    place.set_ylabel(_text(figure.y, 80))
    place.grid(alpha=0.3)
    if len(named) > 1:
        place.legend(fontsize=7, ncols=2)


def _draw_heatmap(place: Any, figure: Heatmap) -> None:
    values = [[float("nan") if v is None else v for v in row] for row in figure.values]
    signed = any(v is not None and v < 0.0 for row in figure.values for v in row)
    low = -figure.largest if signed else 0.0
    image = place.imshow(
        values,
        aspect="auto",
        cmap="RdBu_r" if signed else "Blues",
        vmin=low,
        vmax=figure.largest or 1.0,
    )
    place.set_yticks(range(len(figure.rows)), [_text(n, 40) for n in figure.rows], fontsize=7)
    step = max(1, len(figure.columns) // 40)
    shown = range(0, len(figure.columns), step)
    place.set_xticks(shown, [_text(figure.columns[i], 24) for i in shown], fontsize=7, rotation=90)
    place.set_xlabel(_text(figure.across, 80))
    place.figure.colorbar(image, ax=place)


def _draw_tree(place: Any, figure: Tree) -> None:
    most = max((merge[2] for merge in figure.merges), default=1.0) or 1.0
    for x1, y1, x2, y2, x in figure.places():
        place.plot([x1 * most, x * most, x * most, x2 * most], [y1, y1, y2, y2], color="C0")
    names = [_text(figure.names[leaf], 40) for leaf in figure.order]
    place.set_yticks(range(len(names)), names, fontsize=7)
    place.invert_yaxis()
    place.set_xlabel("distance")


def _text(text: str, limit: int) -> str:
    return printable(text, limit)
