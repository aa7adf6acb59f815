"""The plots of a sweep, each an SVG element to put into a page; text stays text."""

import io
from collections.abc import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, ScalarFormatter

from headfold.export.studies.sweep_results import Point, SweepReport, pareto

INK, GRID, ACCENT, ORIGINAL = "#1f2933", "#dde3ea", "#c2410c", "#475569"
_COLOURS = ("#1d4ed8", "#0e7490", "#15803d", "#a16207", "#b91c1c", "#7e22ce", "#be185d", "#334155")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "headfold",  # the same report gives the same bytes
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 10.5,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def plots(report: SweepReport) -> dict[str, str]:
    """Name to SVG: `quality`, `curves`, `errors`, `speed`."""
    kinds: dict[str, Callable[[Axes, SweepReport], None]] = {
        "quality": _quality,
        "curves": _curves,
        "errors": _errors,
        "speed": _speed,
    }
    with matplotlib.rc_context(_STYLE):
        return {name: _svg(draw, report) for name, draw in kinds.items()}


def _svg(draw: Callable[[Axes, SweepReport], None], report: SweepReport) -> str:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    draw(figure.subplots(), report)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML declaration, which has no place inside a page


def colour(report: SweepReport, point: Point) -> str:
    """One colour per group count in all plots; the original is grey."""
    if point.kv_heads == report.original:
        return ORIGINAL
    return _COLOURS[report.points.index(point) % len(_COLOURS)]


def _label(point: Point, report: SweepReport) -> str:
    return f"{point.kv_heads} (original)" if point.kv_heads == report.original else f"{point.kv_heads}"


def _quality(axes: Axes, report: SweepReport) -> None:
    """Loss against cache size, before and after training, and the front."""
    front, new = pareto(report.points), [p for p in report.points if p.kv_heads != report.original]
    sizes = [point.kv_bytes_per_token for point in front]
    axes.step(
        sizes, [p.loss for p in front], where="post", color="#94a3b8", lw=1.2, zorder=1, label="best at this size"
    )
    for point in new:
        x = point.kv_bytes_per_token
        axes.annotate(
            "", (x, point.loss), (x, point.converted_loss), arrowprops={"arrowstyle": "->", "color": "#94a3b8"}
        )
    shades = [colour(report, p) for p in new]
    xs = [p.kv_bytes_per_token for p in new]
    before, after = [p.converted_loss for p in new], [p.loss for p in new]
    axes.scatter(xs, before, s=46, facecolors="white", edgecolors=shades, zorder=3, label="right after conversion")
    axes.scatter(xs, after, s=52, color=shades, zorder=3, label="after uptraining")
    paper = {p.kv_bytes_per_token: p.baseline_loss for p in new if p.baseline_loss is not None}
    if paper:
        label = "paper's recipe: mean, ce, 5 %"
        axes.scatter(list(paper), list(paper.values()), s=48, marker="x", color=INK, zorder=4, label=label)
    original = report.point(report.original)
    axes.scatter([original.kv_bytes_per_token], [original.loss], s=52, color=ORIGINAL, zorder=3, label="original")
    if report.choice.kv_heads is not None:
        chosen = report.point(report.choice.kv_heads)
        axes.scatter(
            [chosen.kv_bytes_per_token], [chosen.loss], s=230, facecolors="none", edgecolors=ACCENT, lw=2.2, zorder=5
        )
        axes.annotate(
            "chosen",
            (chosen.kv_bytes_per_token, chosen.loss),
            (13, 10),
            textcoords="offset points",
            color=ACCENT,
            weight="bold",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([p.kv_bytes_per_token for p in report.points])
    axes.set_xticklabels([f"{_bytes(p.kv_bytes_per_token)}\n{_heads(p)}" for p in report.points])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.set_xlabel("cache per token")
    axes.set_ylabel("validation loss, nats per token")
    axes.margins(x=0.12, y=0.12)
    axes.legend()


def _curves(axes: Axes, report: SweepReport) -> None:
    """Loss against the tokens trained on; what others reach as lines."""
    original = report.point(report.original)
    axes.axhline(original.loss, color=ORIGINAL, lw=1.4, label=f"original, {original.kv_heads} heads")
    if report.control_curve:
        axes.plot(
            *zip(*report.control_curve, strict=True), color=ORIGINAL, lw=1.4, ls=":", label="original, trained on"
        )
    for point in report.points:
        if not point.curve:
            continue
        shade = colour(report, point)
        axes.plot(*zip(*point.curve, strict=True), color=shade, marker="o", ms=3.5, label=_heads(point))
        if point.baseline_loss is not None:
            axes.axhline(point.baseline_loss, color=shade, lw=1.1, ls="--", label=f"mean@5 %, {_heads(point)}")
    axes.set_xlabel("tokens of uptraining")
    axes.set_ylabel("validation loss, nats per token")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axes.margins(x=0.02)
    assert axes.figure is not None
    axes.figure.legend(loc="outside lower center", ncols=3)  # inside it would cover lines


def _errors(axes: Axes, report: SweepReport) -> None:
    """Each layer's error right after conversion."""
    new = [p for p in report.points if p.kv_heads != report.original]
    axes.grid(False)
    if not new:
        axes.set_axis_off()
        return
    rows = [[max(error, 1e-9) for error in point.layer_errors] for point in new]
    values = [value for row in rows for value in row]
    low, high = min(values), max(values)
    norm = LogNorm(low, high) if high > low else None
    image = axes.imshow(rows, aspect="auto", cmap="YlOrRd", norm=norm)
    layers = len(rows[0])
    axes.set_yticks(range(len(new)), [_heads(p) for p in new])
    ticks = range(0, layers, max(layers // 12, 1))
    axes.set_xticks(list(ticks), [str(tick) for tick in ticks])
    axes.set_xlabel("layer")
    if layers * len(new) <= 48:  # numbers where there is room for them
        for row, errors in enumerate(rows):
            for layer, error in enumerate(errors):
                dark = norm is not None and float(norm(error)) > 0.6
                axes.text(
                    layer, row, f"{error:.2g}", ha="center", va="center", color="white" if dark else INK, fontsize=9
                )
    assert axes.figure is not None
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("squared error of attention's output, relative")
    bar.outline.set_visible(False)


def _speed(axes: Axes, report: SweepReport) -> None:
    """Time of a token against the group count, as figure 6 of Ainslie et al. 2023."""
    counts = [p.kv_heads for p in report.points]
    contexts = sorted({context for p in report.points for context in p.seconds_per_token})
    for index, context in enumerate(contexts):
        shade = matplotlib.colormaps["viridis"](0.15 + 0.65 * index / max(len(contexts) - 1, 1))
        times = [1e3 * p.seconds_per_token[context] for p in report.points]
        axes.plot(counts, times, marker="o", ms=4.5, color=shade, label=f"after {context:,} tokens")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [_label(p, report) for p in report.points])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("key/value heads")
    axes.set_ylabel("decode, milliseconds per token")
    axes.legend()


def _heads(point: Point) -> str:
    return f"{point.kv_heads} head{'s' if point.kv_heads > 1 else ''}"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.4g} {unit}"


def _count(value: float) -> str:
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.4g}{unit}"
    return f"{value:.0f}"
