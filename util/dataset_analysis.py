"""What a table of inputs and labels holds: lengths, duplicates, first words, and how much these give away.

python util/dataset_analysis.py                                 demo/data.csv
python util/dataset_analysis.py train.tsv dev.tsv --text_column sentence --label_column label
"""

import csv
import io
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from bhpeft.errors import InputError, Parser, run_main
from bhpeft.files import column_indices, input_files, read_rows, write_atomic
from bhpeft.metrics import expected_truth, first_word, first_word_baseline

ROOT = Path(__file__).resolve().parents[1]
COLUMNS, GENERICS = ("text_input", "text_label"), ("generic", "exemplar")
FOLDS = 5
Pairs = list[tuple[str, str]]


def read_pairs(path: Path, text_column: str | None, label_column: str | None) -> Pairs:
    """Return (input, label) of each row; a .tsv file is split at tabs and knows no quotes, as GLUE's."""
    if path.suffix.lower() not in (".csv", ".tsv"):
        raise InputError(f"{path}: this script reads .csv and .tsv; convert the file first")
    tsv = path.suffix.lower() == ".tsv"
    header, rows = read_rows(path, *("\t", csv.QUOTE_NONE) if tsv else (",", csv.QUOTE_MINIMAL))
    defaults = GENERICS if set(GENERICS) <= set(header) else COLUMNS
    text, label = column_indices(path, header, [text_column or defaults[0], label_column or defaults[1]])
    if not rows:
        raise InputError(f"{path}: a header and no rows; name a file that has rows.")
    return [(row[text], row[label]) for _, row in rows]


def lengths(pairs: Pairs) -> dict[str, np.ndarray]:
    """Return the characters and the words (split at white space) of every input and label."""
    return {
        f"{side} {unit}": np.array([size(pair[i]) for pair in pairs])
        for i, side in enumerate(("input", "label"))
        for unit, size in (("characters", len), ("words", lambda text: len(text.split())))
    }


def cross_validated(pairs: Pairs) -> float:
    """Return the first-word baseline on rows not learned from: the mean over FOLDS shuffled folds."""
    fold = np.random.default_rng(0).permutation(len(pairs)) % FOLDS
    accuracies = [
        first_word_baseline(
            [p for p, f in zip(pairs, fold, strict=True) if f != k],
            [p for p, f in zip(pairs, fold, strict=True) if f == k],
        )
        for k in range(FOLDS)
    ]
    return float(np.mean(accuracies))


def report(name: str, pairs: Pairs, top: int = 10) -> str:
    """Return a table's statistics as text; sd is the sample standard deviation."""
    lines = [name]
    repeated, repeated_inputs = len(pairs) - len(set(pairs)), len(pairs) - len({text for text, _ in pairs})
    lines.append(f"rows={len(pairs)} duplicate_rows={repeated} duplicate_inputs={repeated_inputs}")
    lines.append(f"{'':<18}{'count':>9}{'min':>7}{'mean':>10}{'median':>9}{'max':>7}{'sd':>10}")
    for what, n in lengths(pairs).items():
        sd = n.std(ddof=1) if len(n) > 1 else float("nan")
        lines.append(f"{what:<18}{len(n):>9}{n.min():>7}{n.mean():>10.2f}{np.median(n):>9.1f}{n.max():>7}{sd:>10.2f}")

    truths = [expected_truth(label) for _, label in pairs]
    table: dict[str, Counter] = {}
    for (text, _), truth in zip(pairs, truths, strict=True):
        table.setdefault(first_word(text), Counter())[truth] += 1
    lines.append(f"{'first word':<18}{'rows':>9}{'true':>7}{'false':>10}{'neither':>9}")
    words = sorted(table, key=lambda word: (-table[word].total(), word))
    for word in words[:top]:
        count = table[word]
        lines.append(
            f"{word[:17] or '(none)':<18}{count.total():>9}{count['true']:>7}{count['false']:>10}{count['tie']:>9}"
        )
    if words[top:]:
        lines.append(f"... and {len(words) - top} more first words")

    stated = [pair for pair, truth in zip(pairs, truths, strict=True) if truth != "tie"]
    if 2 * len(stated) < len(pairs):
        lines.append(f"first-word baseline: none, {len(stated)} of {len(pairs)} labels state true or false")
    else:
        unseen = cross_validated(stated) if len(stated) >= FOLDS else float("nan")
        lines.append(
            f"first-word baseline: in_sample={first_word_baseline(stated, stated):.4f} "
            f"cross_validated={unseen:.4f} "
            f"({FOLDS} folds, {len(stated)} of {len(pairs)} labels state true or false)"
        )
    return "\n".join(lines)


def draw(tables: dict[str, Pairs]) -> bytes:
    """Return a PNG of four histograms: characters and words of inputs and labels, one colour a file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # names of files are none
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    measured = [lengths(pairs) for pairs in tables.values()]
    for axis, what in zip(axes.flat, measured[0], strict=True):
        longest = max(int(table[what].max()) for table in measured)
        width = longest // 40 + 1  # whole numbers, and the same for every file
        bins = np.arange(0, longest + width + 1, width) - 0.5
        for name, table in zip(tables, measured, strict=True):
            axis.hist(table[what], bins=bins, alpha=0.6, label="/".join(Path(name).parts[-2:]))
        axis.set(xlabel=what, ylabel="rows")
    if len(tables) > 1:
        axes[0, 0].legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return png.getvalue()


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help=".csv or .tsv files, or folders of .csv files (default: demo/data.csv)",
    )
    parser.add_argument("--text_column", help="default: text_input, or generic where the file has it")
    parser.add_argument("--label_column", help="default: text_label, or exemplar where the file has it")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "results" / "plots",
        help="folder of the histogram (default: results/plots/)",
    )
    parser.add_argument("--no_plot", action="store_true", help="print only")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()

    files = input_files(args.files, ROOT / "demo" / "data.csv", ".csv")
    tables = {str(file): read_pairs(file, args.text_column, args.label_column) for file in files}
    reports = [report(name, pairs) for name, pairs in tables.items()]
    if len(tables) > 1:
        reports.append(report("combined", [pair for pairs in tables.values() for pair in pairs]))
    if not args.no_plot:
        target = args.out / ("lengths_" + "_".join(file.stem for file in files)[:100] + ".png")
        write_atomic(target, draw(tables))
        reports.append(f"histogram: {target}")
    print("\n\n".join(reports))


if __name__ == "__main__":
    run_main(main)
