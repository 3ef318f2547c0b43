"""sweep.png: L0 against explained variance on held-out rows, a line for each architecture and store."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

_MARKS = "osD^vP*X"


def draw_sweep(runs: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG of the runs of sweep.json. SAEs that differ in their seeds alone are points of one line,
    which goes through their means."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines = _lines(runs)
    for number, (label, by_k) in enumerate(lines.items()):
        colour, mark = f"C{number % 10}", _MARKS[number // 10 % len(_MARKS)]
        means = sorted(_mean(points) for points in by_k.values())
        axes.plot(*zip(*means, strict=True), "-", color=colour, linewidth=1)
        points = [point for points in by_k.values() for point in points]
        axes.plot(*zip(*points, strict=True), mark, color=colour, markersize=4, label=label)
    axes.set(xlabel="active latents per row (L0)", ylabel="explained variance")
    axes.set_title("Held-out rows, unmasked")
    axes.grid(alpha=0.3)
    l0 = [x for by_k in lines.values() for points in by_k.values() for x, _ in points]
    if l0 and min(l0) > 0:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        aims = sorted({aim for by_k in lines.values() for aim in by_k if isinstance(aim, int)})
        if 1 < len(aims) < 10:
            axes.set_xticks(aims)
    if lines:
        axes.legend(loc="best", fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def _lines(
    runs: Sequence[Mapping[str, Any]],
) -> dict[str, dict[Any, list[tuple[float, float]]]]:
    """Label -> what was aimed at (k) -> measured L0 and explained variance of each seed."""
    ended = [run for run in runs if run["summary"] is not None]
    with_d_sae = len({run["summary"]["d_sae"] for run in ended}) > 1
    found: dict[str, dict[Any, list[tuple[float, float]]]] = {}
    for run in ended:
        summary = run["summary"]
        point = summary["l0"], summary["explained_variance"]
        if None in point:
            continue
        label = f"{summary['arch']}, {_name(run['store'])}"
        label += f", d_sae {summary['d_sae']}" if with_d_sae else ""
        # Runs without a k are points of their own, in the order of their L0.
        aim = run["run"] if summary["k"] is None else summary["k"]
        found.setdefault(label, {}).setdefault(aim, []).append(point)
    return found


def _name(store: str) -> str:
    return store.rpartition("/")[2].removesuffix(".zarr")


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    xs, ys = zip(*points, strict=True)
    return sum(xs) / len(xs), sum(ys) / len(ys)
