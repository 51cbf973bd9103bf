"""Give an adapter to those who do not have this project: as stock LoRA, or merged into its base model.

python util/export_adapter.py ADAPTER --to lora OUT       BH-PEFT with LoRA alone, at the posterior mean, for stock peft
python util/export_adapter.py ADAPTER --to merged OUT     LoRA, QLoRA or the above, as a plain transformers model
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
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # that the base has no head: the adapter brings it
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # peft imports DeepSpeed, which remarks on a machine without a GPU
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # optional CPU kernels that are not installed
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft still asks for it


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter, with adapter_config.json")
    parser.add_argument("--to", required=True, choices=["lora", "merged"], help="what to write")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--base_model", help="merged: hub id or folder (default: the one the adapter names)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="merged: of the base as loaded and of the merged weights (default: float32)",
    )
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.to == "lora" and (args.base_model or args.dtype):
        raise InputError("--base_model and --dtype: only with --to merged; the export takes the adapter's files alone")

    from bhpeft.adapter_files import check_adapter_folder

    check_adapter_folder(args.adapter)
    quieten()
    from bhpeft.adapters.export import export_lora, merge_adapter  # torch: not before the flags are known to be right
    from bhpeft.tasks.card import TaskCard

    card = TaskCard.read(args.adapter)
    if args.to == "lora":
        modules = export_lora(args.adapter, args.out, args.overwrite)
        if card is not None:
            card.write(args.out)
        print(f"stock LoRA on {len(modules)} modules, at the posterior mean; the deviations stay with the original")
    else:
        labels = card.labels if card is not None and card.head and card.task_type == "classification" else ()
        dtype = args.dtype or "float32"
        notes = merge_adapter(args.adapter, args.out, args.base_model, dtype, args.overwrite, labels)
        print("\n".join(notes))
        if card is not None and card.task_type == "regression":
            mean, deviation = card.target_mean, card.target_deviation
            print(f"note: the model answers with (y - {mean:g}) / {deviation:g}, as its numbers were standardised")
    print(f"saved: {args.out}")


if __name__ == "__main__":
    run_main(main)
