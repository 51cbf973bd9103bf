"""Runs side by side: what was trained, how well it answers, what it cost; one line a file of results/metrics/.

python util/compare_runs.py                                     every run, the best of each task first
python util/compare_runs.py --by lora_rank --columns accuracy metrics.nll timings.train
python util/compare_runs.py results/metrics/sst2_*.json --format markdown --out table.md

A column is one of the table's headings, a dotted path into the record (metrics.base.accuracy, rows.train), or the bare
name of a metric or a flag (nll, learning_rate; metrics come first).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bhpeft.compare import DEFAULT_COLUMNS, FORMATS, layout, make_table
from bhpeft.errors import Parser, run_main
from bhpeft.files import input_files, write_atomic
from bhpeft.results import read_metrics

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="records of runs, or folders of them (default: all of RESULTS_DIR/metrics/)",
    )
    defaults = ", ".join(DEFAULT_COLUMNS).replace("%", "%%")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME", help=f"columns (default: {defaults})")
    parser.add_argument("--by", metavar="NAME", help="sort by this column, ascending, and put it first")
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there (default: print it)")
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)

    files = input_files(args.files, args.results_dir / "metrics", ".json")
    records = [read_metrics(file) for file in files]  # all are read before anything is printed
    table = layout(make_table(records, args.columns, args.by), args.format)
    if args.out:
        write_atomic(args.out, table)
    else:
        print(table, end="")


if __name__ == "__main__":
    run_main(main)
