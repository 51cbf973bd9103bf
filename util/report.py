"""All runs in one page: settings, figures with intervals, curves, samples, and which run is better and how surely.

python util/report.py                             every run of results/ -> results/report.html and results/report.md
python util/report.py lora bh-peft                these runs alone

The page stands alone: it loads nothing, works offline, in the dark, on a phone and on paper. Two runs that answered
the same test rows are compared by a paired bootstrap and, for labels, by McNemar's test. Files that cannot be read are
named and left out. The same results give the same files but for the time stamp.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bhpeft.errors import Parser, run_main

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names of runs (default: all)")
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)

    from bhpeft.html_report import write_report  # matplotlib and Jinja2: not before the flags are known to be right

    files, warnings = write_report(args.results_dir, args.runs)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print("written: " + ", ".join(map(str, files)))


if __name__ == "__main__":
    run_main(main)
