"""Make a trained LoRA Gaussian without training it again (Shi et al. 2025), so that it can say how sure it is.

    python util/bayesianise.py adapters/RUN adapters/RUN-gaussian --rows validation.csv
    python parameter_efficient_fine_tuning.py --adapter_path adapters/RUN-gaussian --do_train false \
        --dataset_name train.csv --test_file test.csv --posterior_samples 10

Its A becomes A' ~ N(mean, (sigma_q / d)^2), d the singular values of B; sigma_q is the largest that costs no more than
--tolerance of accuracy (or nats of NLL) on rows that it was not trained on and is not tested on.
"""

import logging
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bhpeft.errors import InputError, Parser, run_main


def quieten() -> None:
    """Silence what libraries say that no user can act on; to be called before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder of a LoRA trained for classification")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help="held-out rows with labels")
    parser.add_argument("--text_column", default="text_input")
    parser.add_argument("--label_column", default="text_label")
    parser.add_argument("--base_model", help="hub id or folder (default: the one the adapter names)")
    parser.add_argument("--criterion", choices=["accuracy", "nll"], default="accuracy", help="default: accuracy")
    parser.add_argument("--tolerance", type=float, help="how much worse it may get (default: 0.01)")
    parser.add_argument("--samples", type=int, default=10, help="of the posterior (default: 10)")
    parser.add_argument("--max_rows", type=int, default=500, help="most rows that are asked (default: 500)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.samples < 2 or args.max_rows < 1:
        raise InputError("--samples must be 2 or more, and --max_rows 1 or more")
    if args.tolerance is not None and not args.tolerance >= 0:
        raise InputError(f"--tolerance {args.tolerance}: must be 0 or more")

    from bhpeft.adapter_files import check_adapter_folder

    check_adapter_folder(args.adapter)
    quieten()
    from bhpeft.bayesianise import bayesianise  # torch: not before the flags are known to be right

    columns = (args.text_column, args.label_column)
    searched = (args.criterion, args.tolerance, args.samples, args.max_rows, args.seed, columns)
    found = bayesianise(
        args.adapter, args.out, args.rows, args.base_model, *searched, say=lambda line: print(line, flush=True)
    )
    print(f"sigma_q = {found:.4g}; written: {args.out}")


if __name__ == "__main__":
    run_main(main)
