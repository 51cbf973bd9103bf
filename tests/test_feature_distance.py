"""The distance to the training rows in the frozen base's features: its equation, its file, and runs that use it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sklearn.metrics import roc_auc_score
from transformers import GPT2Config, GPT2LMHeadModel

import parameter_efficient_fine_tuning as trainer_script
from bhpeft.errors import InputError
from bhpeft.feature_distance import COLUMN, FILE, ROWS, chosen, fit_distance, mean_features, read_distance
from bhpeft.results import read_predictions


def rows_of(n: int, width: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)) @ np.diag(np.arange(1, width + 1)) + 3


def test_with_all_axes_it_is_the_mahalanobis_distance():
    """K = H - 1: what is left over is one axis, with a variance of its own."""
    train, asked = rows_of(400), rows_of(50, seed=1) + 5
    off = asked - train.mean(0)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", off, np.linalg.inv(np.cov(train.T)), off))
    assert fit_distance(train, axes=5).of(asked) == pytest.approx(expected, rel=1e-9)


def test_with_fewer_axes_it_is_that_under_the_covariance_of_probabilistic_pca():
    train, asked = rows_of(400), rows_of(50, seed=1)
    values, vectors = np.linalg.eigh(np.cov(train.T))
    values[:4] = values[:4].mean()  # the two largest stay, the rest is one
    covariance = vectors @ np.diag(values) @ vectors.T
    off = asked - train.mean(0)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", off, np.linalg.inv(covariance), off))
    assert fit_distance(train, axes=2).of(asked) == pytest.approx(expected, rel=1e-9)


def test_rows_like_the_training_rows_are_about_the_root_of_the_width_away():
    assert fit_distance(rows_of(2000)).of(rows_of(2000, seed=1)).mean() == pytest.approx(np.sqrt(6), rel=0.1)


def test_few_rows_of_many_features_make_a_distance():
    train = rows_of(12, 40)
    found = fit_distance(train)
    assert found.axes.shape == (3, 40) and np.isfinite(found.of(train)).all() and (found.of(train + 50) > 5).all()
    with pytest.raises(ValueError, match="needs 8"):
        fit_distance(train[:7])
    with pytest.raises(ValueError, match="all the same"):
        fit_distance(np.ones((9, 4)))


def test_it_is_read_as_it_was_written_and_a_broken_file_is_refused(tmp_path):
    assert read_distance(tmp_path) is None
    made = fit_distance(rows_of(100))
    made.save(tmp_path)
    asked = rows_of(5, seed=2)
    assert read_distance(tmp_path).of(asked) == pytest.approx(made.of(asked), rel=1e-5)
    tensors = load_file(tmp_path / FILE)
    for broken in (
        {name: tensor for name, tensor in tensors.items() if name != "rest"},
        {**tensors, "variances": -tensors["variances"]},
        {**tensors, "mean": tensors["mean"][:-1]},
    ):
        save_file(broken, tmp_path / FILE)
        with pytest.raises(InputError, match="train the adapter again"):
            read_distance(tmp_path)


def test_rows_are_drawn_by_the_seed_in_their_order():
    rows = list(range(3 * ROWS))
    some = chosen(rows, 1)
    assert len(set(some)) == ROWS and some == sorted(some) == chosen(rows, 1) != chosen(rows, 2)
    assert chosen(rows[:10], 0) == rows[:10]


def test_features_are_means_over_tokens_whatever_the_padding():
    class Model:
        def __call__(self, input_ids, attention_mask, output_hidden_states):
            hidden = torch.stack([input_ids, input_ids**2], -1).float()
            return type("Output", (), {"hidden_states": [None, hidden]})()

    inputs = {"input_ids": torch.tensor([[1, 2, 9], [3, 9, 9]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert mean_features(Model(), inputs).tolist() == [[1.5, 2.5], [3.0, 9.0]]
    left = {"input_ids": inputs["input_ids"].flip(1), "attention_mask": inputs["attention_mask"].flip(1)}
    assert mean_features(Model(), left).tolist() == [[1.5, 2.5], [3.0, 9.0]]


def test_a_row_of_absolute_positions_has_the_same_features_whatever_it_is_padded_with():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=50)).eval()
    text = torch.randint(50, (1, 5))
    alone = mean_features(model, {"input_ids": text, "attention_mask": torch.ones_like(text)})
    padding = torch.zeros(1, 20, dtype=torch.long)
    for parts in ((padding, text), (text, padding)):  # a language model's rows are padded on the left
        mask = torch.cat([torch.full_like(part, part is text) for part in parts], 1)
        padded = mean_features(model, {"input_ids": torch.cat(parts, 1), "attention_mask": mask})
        assert torch.allclose(padded, alone, atol=1e-5)


def test_a_run_writes_it_and_a_test_of_the_adapter_repeats_it(tiny_encoder, labelled, tmp_path):
    """Trained with the flag and tested with it: the same column, for it is the base's; without a file: refused."""
    folder, results = tmp_path / "adapter", tmp_path / "results"
    other = tmp_path / "other.csv"
    other.write_text("text_input\n" + "".join(f"xyz {i} qqq {i * i}\n" for i in range(20)))
    common = [
        "--base_model",
        tiny_encoder,
        "--dataset_name",
        labelled,
        "--results_dir",
        results,
        "--disable_tqdm",
        "true",
    ]
    common += ["--ood_dataset_name", other, "--feature_distance", "true"]

    def run(name: str, *flags) -> tuple[dict, list[float], list[float]]:
        record = trainer_script.main(list(map(str, [*common, "--run_name", name, *flags])))
        parts = [read_predictions(results / f"predictions/{name}{end}") for end in (".csv", ".ood.csv")]
        return record, *(part[COLUMN].tolist() for part in parts)

    train = (
        "--adapter_name",
        "bh-peft",
        "--max_steps",
        3,
        "--lr",
        0.1,
        "--save_strategy",
        "no",
        "--output_dir",
        folder,
    )
    record, inside, outside = run("trained", *train)
    assert min(inside) > 0 and np.median(outside) > np.median(inside)
    figure = record["metrics"]["ood"][f"auroc_{COLUMN}"]
    assert (
        figure == pytest.approx(roc_auc_score([0] * len(inside) + [1] * len(outside), inside + outside))
        and figure > 0.8
    )

    tested = ("--adapter_path", folder, "--do_train", "false", "--max_test_samples", len(inside))
    _, _, again = run("tested", *tested)
    assert again == pytest.approx(outside, rel=1e-3)
    (folder / FILE).unlink()
    with pytest.raises(InputError, match="train the adapter with this flag"):
        run("refused", *tested)
