"""Curves of a sweep: a panel a benchmark, its metric over n, with the 95 % interval of its items as a band."""

from collections import defaultdict
from pathlib import Path

from d2lora import plan

_COLOURS = {"sft": "#0072b2", "dpo": "#d55e00", "orpo": "#009e73"}  # Okabe-Ito: told apart by everyone
_MARKS = {"sft": "o", "dpo": "s", "orpo": "^"}


def curves(rows: list[dict], file: Path) -> Path | None:
    """Draw result rows (report.result_rows) to a PNG; None if no curve has two sizes n."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, dict[tuple, list[dict]]] = defaultdict(lambda: defaultdict(list))
    metrics: dict[str, str] = {}
    for row in rows:
        if row["metric"] and metrics.setdefault(row["benchmark"], row["metric"]) == row["metric"] and row["n"] != "all":
            panels[row["benchmark"]][row["method"], row["m"]].append(row)
    panels = {b: p for b, p in panels.items() if any(len({r["n"] for r in line}) > 1 for line in p.values())}  # type: ignore[assignment]
    if not panels:
        return None
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    for axis, (benchmark, lines) in zip(axes[0], panels.items(), strict=True):
        for (method, m), points in lines.items():
            _curve(axis, method, m, sorted(points, key=lambda r: r["n"]))
        axis.set(title=benchmark, xlabel="task samples n", ylabel=f"{metrics[benchmark]} in %")
        axis.set_xticks(sorted({r["n"] for line in lines.values() for r in line}))
        axis.tick_params(axis="x", labelrotation=45)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return file


def _curve(axis, method: str, m: int | str, points: list[dict]) -> None:
    x, y = [p["n"] for p in points], [100 * p["value"] for p in points]
    half = [196 * p["stderr"] for p in points]
    name = f"{method.upper()} " + ("LoRA" if m == 0 else f"D2LoRA({plan.amount(m)}, n)")
    style = {"color": _COLOURS[method], "marker": _MARKS[method], "markersize": 4}
    axis.plot(x, y, linestyle="--" if m == 0 else "-", label=name, **style)
    low, high = ([v + sign * h for v, h in zip(y, half, strict=True)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=_COLOURS[method], alpha=0.08, linewidth=0)
