"""Make a deep ensemble of several runs: the mean of their probabilities, and how far they disagree.

    python util/combine_predictions.py results/predictions/a.csv results/predictions/b.csv ... \
        --out results/predictions/ensemble.csv

The files answer the same rows (by id, with the same labels); the K members are treated as samples of one model
(Lakshminarayanan et al. 2017). What is written has the columns of a run with posterior samples, and
util/uncertainty_evaluation.py reads it. From the predictions alone; no model is loaded.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bhpeft.combine import combine
from bhpeft.errors import InputError, Parser, run_main


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="predictions of one member each")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="predictions of the ensemble")
    parser.add_argument("--overwrite", action="store_true", help="replace the file --out")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.out.resolve() in [file.resolve() for file in args.files]:
        raise InputError(f"--out {args.out}: is one of the files that are read; choose another name.")
    if args.out.exists() and not args.overwrite:
        raise InputError(f"{args.out} exists; choose another --out or pass --overwrite.")
    combine(args.files, args.out)
    print(f"{len(args.files)} members; written: {args.out}")


if __name__ == "__main__":
    run_main(main)
