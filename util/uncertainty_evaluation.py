"""What a model's uncertainty is worth: calibration, and whether the rows it is least sure of are those it gets wrong.

python util/uncertainty_evaluation.py                           every run of results/predictions/ but free text
python util/uncertainty_evaluation.py results/predictions/RUN.csv --ood results/predictions/OTHER.csv
python util/uncertainty_evaluation.py a.csv b.csv --uncertainty entropy mutual_information --out_dir plots

From the predictions alone; no model is loaded. One table a file, 95 % intervals in brackets (Wilson for shares, else
percentile bootstrap over rows):

  accuracy               of the column `prediction`, as are AURC, AUROC and rejection. A prediction that is no label
                         ("(irregular)", "tie") is wrong, however probable the right label was.
  NLL, Brier, ECE        of the probabilities, that is of the likeliest label, which need not be the prediction read
                         off a generated text. Beside the ECE stands what it would stay below by chance if calibrated.
  AURC                   mean share of wrong answers over all coverages, the surest rows first; lower is better
  AUROC of errors        chance that a wrong answer is less sure than a right one; 0.5 says nothing
  accuracy without 10 %  of what is left once the least sure tenth is rejected
  AUROC of out-of-domain rows    with --ood, or where RUN.ood.csv lies beside RUN.csv (the trainer's
                         --ood_dataset_name): chance that such a row is less sure than one of the file

Rows of equal uncertainty count in random order, in expectation. Measures: one_minus_max_prob, entropy, and those of
posterior samples that the file has (expected_entropy, mutual_information, variance, kl_to_mean, max_prob_sd); any
other column of numbers by name. Predictions of numbers (no prob_ columns): RMSE, and for each of sd, total_sd,
epistemic_sd and prediction_sd the rows inside Gaussian intervals, CRPS and NLL; epistemic_sd and prediction_sd leave
the noise of the labels out, so that their intervals are too narrow even where they are right about the weights.

Written to OUT_DIR: uncertainty_figures.csv, and reliability, rejection and risk_coverage (numbers: intervals) as .csv,
.png and .svg; of several files each into its own folder, and rejection_of_runs beside them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bhpeft import uncertainty_report as report
from bhpeft.errors import InputError, Parser, run_main
from bhpeft.files import input_files
from bhpeft.results import OOD_SUFFIX

RESULTS = Path(__file__).resolve().parents[1] / "results"
LEVELS = [i / 20 for i in range(1, 20)]  # of the intervals that are drawn


def ood_file(file: Path) -> Path:
    """Where the trainer writes a run's answers to rows of another domain."""
    return file.with_name(file.name.removesuffix(".csv") + OOD_SUFFIX)


def write(predictions: report.Predictions, figures: list, curves: dict, folder: Path, args) -> list[str]:
    """Write one file's CSV files and plots; return the names of the curves."""
    report.write_figures(folder / "uncertainty_figures.csv", figures)
    if not predictions.labels:
        if not predictions.measures:
            return []
        curves = report.interval_curve(predictions, LEVELS)
        report.write_intervals(folder / "intervals.csv", curves)
        if not args.no_plots:
            report.draw_intervals(folder / "intervals", predictions, curves)
        return ["intervals"]
    report.write_reliability(folder / "reliability.csv", predictions, args.bins)
    report.write_rejection(folder / "rejection.csv", curves, args.reject)
    report.write_risk_coverage(folder / "risk_coverage.csv", predictions)
    if not args.no_plots:
        report.draw_reliability(folder / "reliability", predictions, args.bins)
        report.draw_rejection(folder / "rejection", predictions, curves, args.reject)
        report.draw_risk_coverage(folder / "risk_coverage", predictions)
    return ["reliability", "rejection", "risk_coverage"]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="predictions, or folders of them (default: all of RESULTS_DIR/predictions/)",
    )
    parser.add_argument("--uncertainty", nargs="+", default=[], metavar="NAME", help="measures (default: all known)")
    parser.add_argument("--ood", nargs="+", type=Path, default=[], metavar="FILE",
                        help="predictions of out-of-domain rows by the same model, one file for each FILE in its order"
    )  # fmt: skip
    parser.add_argument("--bins", type=int, default=15, help="of the ECE (default: 15)")
    parser.add_argument("--reject", nargs="+", type=float, default=list(range(0, 100, 10)), metavar="PERCENT",
                        help="points of the rejection curve (default: 0 10 ... 90)")  # fmt: skip
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--out_dir", type=Path, metavar="DIR", help="default: RESULTS_DIR/plots/RUN")
    parser.add_argument("--no_plots", action="store_true", help="write the CSV files only")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)

    if not 1 <= args.bins <= 1000:
        raise InputError(f"--bins {args.bins}: give 1 to 1000.")
    if not all(0 <= percent < 100 for percent in args.reject):
        raise InputError("--reject takes percents from 0 to below 100.")
    args.reject = [percent / 100 for percent in dict.fromkeys(args.reject)]
    files = input_files(args.files, args.results_dir / "predictions", ".csv")
    named = set(map(Path, args.files))
    outside = {ood_file(file) for file in files}  # of a folder's files these belong to their runs
    files = [file for file in files if file in named or file not in outside]
    everything = []  # all are read before anything is printed
    for file in files:
        try:
            everything.append(report.read_uncertainty(file, args.uncertainty))
        except report.FreeText:
            if file in named or len(files) == 1:
                raise
            print(f"{file}: free text, which has no uncertainty here: left out", file=sys.stderr)
    if not everything:
        raise InputError(f"{files[0].parent}: free text alone; name a folder with predictions of labels or of numbers.")
    files = [predictions.path for predictions in everything]
    stems = [file.stem for file in files]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise InputError(f"two files are called {twice}; rename one, as what is written bears their names.")
    if args.ood and len(args.ood) != len(files):
        raise InputError(f"--ood names {len(args.ood)} files for {len(files)}; give one for each, in their order.")

    beside = args.ood or [ood_file(file) if ood_file(file).is_file() else None for file in files]
    oods = [
        report.read_measures(file, list(predictions.measures), bool(predictions.labels)) if file else None
        for file, predictions in zip(beside, everything, strict=True)
    ]
    parent = args.out_dir or args.results_dir / "plots"
    runs: dict[str, dict] = {}
    for i, predictions in enumerate(everything):
        curves: dict = {}
        if predictions.labels:
            figures, curves = report.label_uncertainty(predictions, args.bins, args.reject)
            runs[predictions.path.stem] = curves
        else:
            figures = report.number_uncertainty(predictions)
        if oods[i]:
            figures += report.ood_auroc(predictions.measures, oods[i])
        folder = args.out_dir if args.out_dir and len(files) == 1 else parent / predictions.path.stem
        written = write(predictions, figures, curves, folder, args)
        names = ", ".join(["uncertainty_figures", *written])
        print(f"{report.text_table(predictions, figures, args.bins)}\n\nwritten to {folder}: {names}\n", flush=True)
    if len(runs) > 1 and not args.no_plots:
        report.draw_rejections(parent / "rejection_of_runs", runs, args.reject)
        print(f"written to {parent}: rejection_of_runs")


if __name__ == "__main__":
    run_main(main)
