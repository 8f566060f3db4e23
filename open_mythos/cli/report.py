"""`mythos report RUN`: one HTML page about a run, finished or not, and its plots as PNG files."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Options:
    """Write report.html and plots/*.png into the folder of a run, finished or still going."""

    run: tyro.conf.Positional[Path]
    """The folder that training left, as in runs/demo."""

    open: bool = False
    """Show the page in the browser."""


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="mythos report", args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    from open_mythos.analysis.report import write_report

    page = write_report(options.run)
    print(page)
    if options.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
    return 0
