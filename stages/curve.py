"""curve.png: loss, explained variance, L0 and dead latents over the steps of a run."""

import io
import threading
from collections.abc import Sequence
from typing import Any

# heading, label of the axis, and what is drawn: key of a line, style, legend
PANELS = (
    ("Loss", "loss", (("loss", "-", "whole"), ("l2", "-", "reconstruction term"))),
    (
        "Explained variance",
        "explained variance",
        (
            ("explained_variance", "-", "training batch"),
            ("heldout_explained_variance", "o-", "held-out rows"),
        ),
    ),
    (
        "Active latents per row (L0)",
        "latents",
        (("l0", "-", "training batch"), ("heldout_l0", "o-", "held-out rows")),
    ),
    ("Dead latents", "latents", (("dead", "-", "by tokens since they fired"),)),
)


_DRAWING = threading.Lock()  # matplotlib is not made for threads, and SAEs of a sweep end together


def draw_curve(lines: Sequence[dict[str, Any]], title: str) -> bytes:
    """PNG of the lines of metrics.jsonl."""
    with _DRAWING:
        return _draw(lines, title)


def _draw(lines: Sequence[dict[str, Any]], title: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no global state, no display, and no figure that a long sweep forgets to close.
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (heading, label, series) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for key, style, legend in series:
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True), style, label=legend, linewidth=1, markersize=3
                )
        axes.set(title=heading, xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
        if axes.lines:
            axes.legend(loc="best")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
