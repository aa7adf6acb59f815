"""A parity report as a table for people."""

from rich.console import Console
from rich.table import Table

from headfold.export.parity.report import ParityReport


def render(report: ParityReport, console: Console) -> None:
    """Print the report as a table, and the verdict under it."""
    table = Table(title=f"Parity with PyTorch ({report.precision.arithmetic})", title_justify="left")
    for column in ("check", "max error", "allowed", "mean error", "cosine", "KL", "top-1", ""):
        table.add_column(column, justify="left" if column in {"check", ""} else "right")
    for c in report.checks:
        verdict = "[green]ok[/green]" if c.passed else "[red]FAILED[/red]"
        name = f"{c.name} ({c.note})" if c.note else c.name
        cosine = "" if c.cosine is None else f"{c.cosine:.7f}"
        kl = "" if c.kl is None else f"{c.kl:.1e}"
        top1 = "" if c.top1 is None else f"{c.top1:.0%}"
        table.add_row(name, f"{c.max_error:.1e}", f"{c.limit:.1e}", f"{c.mean_error:.1e}", cosine, kl, top1, verdict)
    console.print(table)
    console.print(f"oracle: {report.oracle}")
    if report.first_bad_layer is not None:
        console.print(f"first bad layer: {report.first_bad_layer}")
    console.print("all within tolerance" if report.passed else "out of tolerance")
