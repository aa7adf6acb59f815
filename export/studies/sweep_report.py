"""A sweep as files: report.json, and report.html, one page that needs no network."""

import json
from functools import partial
from pathlib import Path

import jinja2
from rich.console import Console
from rich.table import Table

from headfold.export.publishing import publish_file
from headfold.export.studies.sweep_plots import colour, plots
from headfold.export.studies.sweep_results import SweepReport

JSON, HTML = "report.json", "report.html"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def write_report(report: SweepReport, directory: Path) -> Path:
    """Write both files, each complete or not at all; returns the page's path."""
    contents = {JSON: json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n", HTML: render_html(report)}
    for name, text in contents.items():
        publish_file(directory / name, partial(Path.write_text, data=text, encoding="utf-8"))
    return directory / HTML


def render_html(report: SweepReport) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("headfold.export.studies"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"size": size, "percent": lambda share: f"{100 * share:+.1f} %"}
    colours = {point.kv_heads: colour(report, point) for point in report.points}
    shown = {"report": report, "plots": plots(report), "colours": colours, "original": report.point(report.original)}
    return environment.get_template("sweep.html.j2").render(shown)


def render_table(report: SweepReport, console: Console) -> None:
    """The points as a table on a terminal, and the choice."""
    contexts = sorted(report.points[0].seconds_per_token)
    table = Table(box=None, pad_edge=False, caption="KV bytes and ms of decoding per token; losses in nats per token")
    for name in ("heads", "KV bytes", "converted", "uptrained"):
        table.add_column(name, justify="right")
    for context in contexts:
        table.add_column(f"ms @{context}", justify="right")
    for point in report.points:
        mark = "*" if point.kv_heads == report.choice.kv_heads else " "
        cells = (
            f"{mark} {point.kv_heads}",
            f"{point.kv_bytes_per_token:,}",
            f"{point.converted_loss:.4f}",
            f"{point.loss:.4f}",
        )
        table.add_row(*cells, *(f"{1e3 * point.seconds_per_token[context]:.2f}" for context in contexts))
    console.print(table)
    console.print(report.choice.reason, markup=False)


def size(count: float) -> str:
    """Bytes with a unit, four digits."""
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:.4g} {unit}"
