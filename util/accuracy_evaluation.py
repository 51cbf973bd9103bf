"""How often the models' answers are right: whole, negative and positive exemplars, with intervals.

python util/accuracy_evaluation.py                              every file of results/model_outputs/
python util/accuracy_evaluation.py results/model_outputs/RUN.txt --full
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bhpeft.errors import Parser, run_main
from bhpeft.files import input_files
from bhpeft.metrics import AccuracyCounts, accuracy_counts, exemplar_kind, expected_truth, wilson_interval
from bhpeft.results import ModelOutput, read_model_outputs

RESULTS = Path(__file__).resolve().parents[1] / "results"


def report(outputs: list[ModelOutput], full: bool) -> str:
    """Return a file's figures, one line a group of rows, as text."""

    def line(prefix: str, counts: AccuracyCounts) -> str:
        return " ".join(f"{prefix}{name}={value}" for name, value in counts._asdict().items())

    counts = accuracy_counts(outputs, full)
    low, high = wilson_interval(counts.correct, counts.total)
    first = accuracy_counts(outputs, strict=True)
    lines = [
        line("", counts),
        line("neg_", accuracy_counts(outputs, full, "neg")),
        line("pos_", accuracy_counts(outputs, full, "pos")),
        f"accuracy_wilson_95=({low:.4f}, {high:.4f}) first_word_accuracy={first.accuracy} "
        f"first_word_irregular={first.tie}",
    ]
    if other := sum(exemplar_kind(row.query) is None for row in outputs):
        lines.append(
            f"note: {other} of {counts.total} queries begin with none of All, Not, Some, No: "
            "they count in the first line only"
        )
    if unknown := sum(expected_truth(row.expected) == "tie" for row in outputs):
        lines.append(
            f"note: {unknown} of {counts.total} expected outputs state neither true nor false: "
            "no answer to them is correct"
        )
    return "\n".join(lines)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="files of blocks, or folders of them (default: all of RESULTS_DIR/model_outputs/)",
    )
    parser.add_argument("--full", action="store_true", help="keep whole outputs, not their first sentence")
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()

    files = input_files(args.files, args.results_dir / "model_outputs", ".txt")
    outputs = [read_model_outputs(file) for file in files]  # all are read before anything is printed
    reports = (f"{file}\n{report(rows, args.full)}" for file, rows in zip(files, outputs, strict=True))
    print("\n\n".join(reports))


if __name__ == "__main__":
    run_main(main)
