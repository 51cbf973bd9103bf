"""What an adapter has learned: tokens near its prompt, how much it changes each layer, where its posterior is narrow.

python util/interpret.py adapters/RUN [--base_model FOLDER] [--top 5]

  tuned prompt      the vocabulary's tokens whose embeddings are nearest (cosine) to each virtual token. They name a
                    direction, not a meaning: a prompt need not lie near any token, and low cosines say that it does not
  LoRA              |(alpha / r) B A|_F of each module, at the posterior mean where it is Gaussian
  Gaussian weights  median |mu| / sigma of each matrix, the share whose sign is known (above 1.96), and the KL to the
                    prior in nats: where it is large, the data have moved the weights away from the prior

From the adapter's files alone; of the base only the embeddings are read, and only for a prompt. Written to
results/plots/NAME/: interpret.png and interpret.csv.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bhpeft.errors import InputError, Parser, run_main
from bhpeft.files import write_atomic, write_rows

RESULTS = Path(__file__).resolve().parents[1] / "results"


def base_folder(given: str | None, config: dict) -> Path:
    """The folder of the base model: given, or as the adapter names it; a hub id is looked up in the local cache."""
    name = given or config.get("base_model_name_or_path")
    if not name:
        raise InputError("--base_model: the adapter does not name its base; give the base model's folder.")
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=config.get("revision"), local_files_only=True))
    except Exception as error:  # its errors have no class in common
        raise InputError(
            f"--base_model {name}: no such folder, and no such model in the local cache; give its folder."
        ) from error


def token_names(folder: Path, count: int) -> list[str]:
    """The vocabulary by id, by the base's tokenizer.json; "#id" without it."""
    names = [f"#{i}" for i in range(count)]
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        for word, i in tokenizer.get_vocab(with_added_tokens=True).items():
            if i < count:
                names[i] = tokenizer.decode([i], skip_special_tokens=False) or word
    return names


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder of the adapter")
    parser.add_argument("--base_model", metavar="FOLDER", help="folder or cached hub id (default: the adapter's)")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="near tokens that are shown (default: 5)")
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--no_plots", action="store_true", help="write the CSV file only")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.top < 1:
        raise InputError(f"--top {args.top}: must be at least 1.")

    from bhpeft import interpret
    from bhpeft.tensor_files import TensorFolder

    adapter = interpret.Adapter(args.adapter)
    prompt, updates, posteriors = adapter.prompt, adapter.updates(), adapter.posteriors()
    near = []
    if prompt is not None:
        folder = base_folder(args.base_model, adapter.config)
        embeddings = interpret.input_embeddings(TensorFolder(folder), prompt.shape[1])
        near = interpret.near_tokens(prompt, embeddings, token_names(folder, len(embeddings)), args.top)
    if not (near or updates or posteriors):
        kind = adapter.config.get("peft_type")
        raise InputError(f"{args.adapter}: peft_type {kind!r} has no prompt, LoRA or Gaussian weights to look at.")

    rows = []
    for token in near:
        shown = "  ".join(f"{word!r} {cosine:.3f}" for word, cosine in token.tokens)
        print(f"virtual token {token.place:>3}  norm {token.norm:7.3f}  near: {shown}")
        for word, cosine in token.tokens:
            rows.append(["prompt", "", token.place, word, "cosine", cosine])
    if updates:
        print(f"\n{'layer':>5}  {'LoRA update of':<40}{'rank':>5}  |update|")
    for update in updates:
        layer = "-" if update.layer is None else update.layer
        print(f"{layer:>5}  {update.module:<40}{update.rank:>5}  {update.norm:.4f}")
        rows.append(["lora", layer, update.module, "", "update_norm", update.norm])
    if posteriors:
        figures = "".join(f"{heading:>12}" for heading in ("|mu|/sigma", "sign known", "KL (nats)"))
        print(f"\n{'layer':>5}  {'site':<8}{'Gaussian matrix':<40}{figures}")
    for p in posteriors:
        layer, name = "-" if p.layer is None else p.layer, f"{p.module} {p.matrix}"
        print(f"{layer:>5}  {p.site:<8}{name:<40}{p.snr:>12.3f}{p.sure:>12.1%}{p.kl:>12.1f}")
        for figure in ("snr", "sure", "sigma", "kl"):
            rows.append([p.site, layer, name, "", figure, getattr(p, figure)])

    out = args.results_dir / "plots" / (args.adapter.resolve().name)
    write_rows(out / "interpret.csv", ["site", "layer", "place", "token", "figure", "value"], rows)
    print(f"\nwritten: {out / 'interpret.csv'}")
    if not args.no_plots:
        from bhpeft.interpret_plot import draw

        write_atomic(out / "interpret.png", draw(near, updates, posteriors))
        print(f"written: {out / 'interpret.png'}")


if __name__ == "__main__":
    run_main(main)
