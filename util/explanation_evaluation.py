"""How good the models' explanations are: judge them one at a time, and figures of what people judged.

python util/explanation_evaluation.py                           every file of results/human_evaluation/
python util/explanation_evaluation.py results/human_evaluation/RUN.csv
python util/explanation_evaluation.py --annotate results/model_outputs/RUN.txt --annotator NAME [--web]
python util/explanation_evaluation.py --automatic               figures that no person gives, beside those

Two questions are asked of each answer: is the explanation factual, and does it justify the answer. Keys: y, n,
s (skip), b (back), q (quit). Every answer is saved at once to results/human_evaluation/RUN.NAME.csv, and the same
command goes on where it stopped; skipped rows come again then. Of several runs the names are not shown and the rows
are mixed.

Figures: shares of yes over the rows with both answers, overall (their mean), for all rows and for positive and negative
exemplars, with 95 % Wilson intervals (of rows: for the mean of two answers on each row that is on the safe side). Of
a run that several people judged: raw agreement, Cohen's kappa of each two, Krippendorff's alpha, and where they differ.
"""

import argparse
import sys
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bhpeft.agreement import cohen_kappa, disagreements, krippendorff_alpha, raw_agreement
from bhpeft.errors import InputError, Parser, run_main
from bhpeft.files import input_files
from bhpeft.metrics import exemplar_kind, explanation_intervals, explanation_scores
from bhpeft.results import HumanScore, read_human_evaluation, read_model_outputs, run_and_annotator

RESULTS = Path(__file__).resolve().parents[1] / "results"
LISTED = 20  # disagreements that are printed


def report(rows: list[HumanScore]) -> str:
    """Return a file's figures, one line a group of rows, as text."""
    kinds = (("", None), ("pos_", "pos"), ("neg_", "neg"))
    lines = []
    for prefix, kind in kinds:
        scores = explanation_scores(rows, kind)
        means = zip(scores._fields[:3], scores[:3], strict=True)
        lines.append(" ".join(f"{prefix}{name}={value}" for name, value in means))
    whole = explanation_scores(rows)
    lines.append(f"judged={whole.judged} not_judged={whole.not_judged}")
    for prefix, kind in kinds:
        ends = explanation_intervals(explanation_scores(rows, kind)).items()
        lines.append(" ".join(f"{prefix}{name}_wilson_95=({low:.4f}, {high:.4f})" for name, (low, high) in ends))
    if other := sum(exemplar_kind(row.query) is None for row in rows):
        lines.append(
            f"note: {other} of {len(rows)} queries begin with none of All, Not, Some, No: "
            "they count in the first line only"
        )
    return "\n".join(lines)


def agreement_report(run: str, people: dict[str, list[HumanScore]]) -> str:
    """Return what several people's judgements of one run have in common, as text."""
    texts = {row.index: row for rows in people.values() for row in rows}
    order = sorted(texts)
    lines = [f"agreement on {run}: {', '.join(people)}"]
    for question in ("factual", "justifies"):
        given = {name: {row.index: getattr(row, question) for row in rows} for name, rows in people.items()}
        values = {name: [known.get(index) for index in order] for name, known in given.items()}
        shared = sum(sum(value is not None for value in row) > 1 for row in zip(*values.values(), strict=True))
        alpha = krippendorff_alpha(list(values.values()))
        lines.append(f"{question}: rows_of_two_or_more={shared} krippendorff_alpha={alpha:.4f}")
        for a, b in combinations(values, 2):
            raw, kappa = raw_agreement(values[a], values[b]), cohen_kappa(values[a], values[b])
            lines.append(f"  {a} and {b}: raw_agreement={raw:.4f} cohen_kappa={kappa:.4f}")
        places = disagreements(values)
        for i in places[:LISTED]:
            said = ", ".join(f"{name} {value[i]}" for name, value in values.items() if value[i] is not None)
            row = texts[order[i]]
            lines.append(f"  differ on {row.index} ({said}): {' '.join(row.query.split())} - {_short(row.output)}")
        if len(places) > LISTED:
            lines.append(f"  ... and on {len(places) - LISTED} more")
    return "\n".join(lines)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:119] + "…"


def automatic_report(path: Path, outputs: list, people: dict[str, list[HumanScore]]) -> str:
    """Return the figures that no person gives, and how they go with people's, as text."""
    from bhpeft.explanation_metrics import METRICS, automatic_scores, human_correlations, mean

    found = automatic_scores(outputs)
    lines = [f"{path}: {len(outputs)} outputs, figures that no person gave"]
    for name, values in found.items():
        known = sum(value == value for value in values)
        lines.append(f"{name}={mean(values):.4f} over {known} ({METRICS[name]})")
    for person, rows in people.items():
        lines.append(f"rank correlation with the scores of {person} (95 % interval; -: one of them never varies)")
        for (metric, score), (rho, low, high, count) in human_correlations(outputs, rows).items():
            text = f"{rho:+.3f} ({low:+.3f} to {high:+.3f})" if rho == rho else "-"
            lines.append(f"  {metric:<11}{score:<11}{text} over {count}")
    return "\n".join(lines)


def annotate(args: argparse.Namespace) -> None:
    """Run a session in the terminal or the browser."""
    from bhpeft.annotation import Session

    if not args.annotator:
        raise InputError("--annotate: whose judgements are they? Give --annotator NAME.")
    files = input_files(args.annotate, args.annotate[0], ".txt")
    # Of outputs that lie elsewhere, judgements belong to this project's results.
    beside = files[0].resolve().parent.name == "model_outputs" and args.results_dir is None
    folder = None if beside else (args.results_dir or RESULTS) / "human_evaluation"
    session = Session(files, args.annotator, args.seed, folder)
    if not args.web:
        from bhpeft.annotation_terminal import annotate as in_terminal

        in_terminal(session)
        return
    from bhpeft.annotation_web import AnnotationServer

    with AnnotationServer(session, args.port) as server:
        print(f"open {server.url}\n(from this machine alone; q there or Ctrl-C here ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    print(f"{session.judged} of {session.total} judged", *(f"written: {file}" for file in session.files), sep="\n")


def outputs_of(run: str, beside: Path) -> Path:
    """The file of a run's outputs that belongs to a file of human evaluation."""
    return beside.resolve().parent.parent / "model_outputs" / f"{run}.txt"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="human evaluations, or folders of them (default: all of RESULTS_DIR/human_evaluation/)",
    )
    parser.add_argument("--annotate", nargs="+", type=Path, metavar="FILE", help="judge these files of outputs")
    parser.add_argument("--annotator", metavar="NAME", help="with --annotate: who judges")
    parser.add_argument("--web", action="store_true", help="with --annotate: in a browser on this machine")
    parser.add_argument("--port", type=int, default=0, help="with --web (default: a free one)")
    parser.add_argument("--seed", type=int, default=0, help="with --annotate: of the order of the rows (default: 0)")
    parser.add_argument("--automatic", action="store_true", help="also figures that no person gives, from the outputs")
    parser.add_argument("--results_dir", type=Path, metavar="DIR", help=f"default: {RESULTS.name}/ of this project")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.annotate:
        if args.files:
            raise InputError(f"{args.files[0]}: figures or --annotate, one at a time; leave one out.")
        annotate(args)
        return
    if args.annotator or args.web:
        raise InputError("--annotator, --web: only with --annotate FILE.")

    files = input_files(args.files, (args.results_dir or RESULTS) / "human_evaluation", ".csv")
    scores = [read_human_evaluation(file) for file in files]  # all are read before anything is printed
    reports = [f"{file}\n{report(rows)}" for file, rows in zip(files, scores, strict=True)]
    runs: dict[tuple[Path, str], dict[str, list[HumanScore]]] = {}
    for file, rows in zip(files, scores, strict=True):
        run, annotator = run_and_annotator(file)
        people = runs.setdefault((outputs_of(run, file), run), {})
        if any(row.factual is not None or row.justifies is not None for row in rows):
            people[annotator or "(no name)"] = rows
    reports += [agreement_report(run, people) for (_, run), people in runs.items() if len(people) > 1]
    if args.automatic:
        for (path, run), people in runs.items():
            if not path.exists():
                reports.append(f"{run}: its outputs are not there ({path}): no figures without a person")
                continue
            reports.append(automatic_report(path, read_model_outputs(path), people))
    print("\n\n".join(reports))


if __name__ == "__main__":
    run_main(main)
