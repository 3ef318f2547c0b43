"""curve.png: loss, explained variance, L0 and dead latents over the steps of a run."""

import io
from collections.abc import Sequence
from typing import Any

PANELS = (
    ("loss", "Loss", "loss", None),
    (
        "explained_variance",
        "Explained variance",
        "explained variance",
        "heldout_explained_variance",
    ),
    ("l0", "Active latents per row (L0)", "latents", "heldout_l0"),
    ("dead", "Dead latents", "latents", None),
)


def draw_curve(lines: Sequence[dict[str, Any]], title: str) -> bytes:
    """PNG of the lines of metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no global state, no display, and no figure that a long sweep forgets to close.
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (name, heading, label, heldout) in zip(
        figure.subplots(2, 2).flat, PANELS, strict=True
    ):
        for key, style, legend in ((name, "-", "training batch"), (heldout, "o-", "held-out rows")):
            points = [(n["step"], n[key]) for n in lines if key and n.get(key) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True), style, label=legend, linewidth=1, markersize=3
                )
        axes.set(title=heading, xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
        if heldout:
            axes.legend(loc="best")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
