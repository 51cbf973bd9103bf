"""How good the models' explanations are by the scores people gave them: factual, justifies, and both.

python util/explanation_evaluation.py                           every file of results/human_evaluation/
python util/explanation_evaluation.py results/human_evaluation/RUN.csv
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bhpeft.errors import run_main
from bhpeft.files import input_files
from bhpeft.metrics import exemplar_kind, explanation_scores
from bhpeft.results import HumanScore, read_human_evaluation

RESULTS = Path(__file__).resolve().parents[1] / "results"


def report(rows: list[HumanScore]) -> str:
    """Return a file's figures, one line a group of rows, as text."""
    lines = []
    for prefix, kind in (("", None), ("pos_", "pos"), ("neg_", "neg")):
        scores = explanation_scores(rows, kind)
        means = zip(scores._fields[:3], scores[:3], strict=True)
        lines.append(" ".join(f"{prefix}{name}={value}" for name, value in means))
    whole = explanation_scores(rows)
    lines.append(f"judged={whole.judged} not_judged={whole.not_judged}")
    if other := sum(exemplar_kind(row.query) is None for row in rows):
        lines.append(
            f"note: {other} of {len(rows)} queries begin with none of All, Not, Some, No: "
            "they count in the first line only"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="human evaluations, or folders of them (default: all of RESULTS_DIR/human_evaluation/)",
    )
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()

    files = input_files(args.files, args.results_dir / "human_evaluation", ".csv")
    scores = [read_human_evaluation(file) for file in files]  # all are read before anything is printed
    reports = (f"{file}\n{report(rows)}" for file, rows in zip(files, scores, strict=True))
    print("\n\n".join(reports))


if __name__ == "__main__":
    run_main(main)
