"""Training-free Gaussian LoRA: its mean is the LoRA's, its variance is the paper's, its sigma is the search's."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_bh_peft import base_of

import parameter_efficient_fine_tuning as trainer_script
from bhpeft.adapters import attach_adapter, posterior_samples
from bhpeft.adapters.bh_peft import gaussian_layers
from bhpeft.adapters.gaussian import GaussianLinear
from bhpeft.adapters.stock import lora_config
from bhpeft.adapters.training_free import (
    RANGE,
    check_sites,
    gaussian_form,
    largest_sigma,
    rescale_sigma,
    write_gaussian,
)
from bhpeft.arguments import AdapterArguments
from bhpeft.errors import InputError
from bhpeft.feature_distance import read_distance
from util import bayesianise as script


def matrices(rank: int = 4):
    torch.manual_seed(0)
    a, b = torch.randn(rank, 10), torch.randn(7, rank)
    b[:, 3] = b[:, 0] + b[:, 1]  # one direction too many: a singular value of 0
    return a, b


def test_the_mean_is_the_product_and_directions_that_are_not_there_have_no_noise():
    a, b = matrices()
    mean, up, inverse = gaussian_form(a, b)
    torch.testing.assert_close(up @ mean, b @ a)
    gram = up.T @ up
    torch.testing.assert_close(gram, torch.diag(gram.diag()), atol=1e-5, rtol=0)
    torch.testing.assert_close(inverse[:3] * gram.diag()[:3].sqrt(), torch.ones(3))
    assert inverse[3] == 0
    assert gaussian_form(a, torch.zeros_like(b))[2].tolist() == [0, 0, 0, 0]  # an untrained B


def test_the_variance_of_samples_is_that_of_the_full_matrix():
    a, b = matrices()
    mean, up, inverse = gaussian_form(a, b)
    sigma_q, samples = 0.3, 20_000
    layer = GaussianLinear(10, 4).eval()
    layer.mu.data, layer.g.data = mean, (sigma_q * inverse).sqrt()[:, None].expand_as(mean).clone()
    layer.eps = torch.randn(samples, 4, 10)
    x = torch.randn(10)
    with torch.no_grad():
        y = layer(x.expand(samples, 10)) @ up.T
    projection = torch.linalg.svd(b, full_matrices=False)[0][:, :3]
    expected = sigma_q**2 * (projection @ projection.T) * x.square().sum()  # sigma_q^2 |x|^2 U U^T
    torch.testing.assert_close(y.mean(0), b @ a @ x, atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(y.T), expected, atol=0.05 * expected.max().item(), rtol=0)


@pytest.fixture
def folders(tmp_path):
    """(model with a LoRA of stock peft that does something, its folder, the folder of its Gaussian form)."""
    model = base_of("bert")
    stock = get_peft_model(model, lora_config(AdapterArguments(lora_rank=4), model.config))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    stock.eval().save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    write_gaussian(tmp_path / "lora", tmp_path / "gaussian", 0.5)
    return stock, tmp_path / "lora", tmp_path / "gaussian"


def test_the_adapter_answers_as_the_lora_at_its_mean_and_as_sigma_goes_to_zero(folders):
    stock, lora, gaussian = folders
    model = attach_adapter(base_of("bert"), AdapterArguments(adapter_path=str(gaussian)), "base").eval()
    check_sites(model, lora)
    inputs = {"input_ids": torch.randint(3, 99, (3, 10), generator=torch.Generator().manual_seed(2))}
    with torch.no_grad():
        expected, plain = stock(**inputs).logits, stock.get_base_model()
        with stock.disable_adapter():
            assert (expected - plain(**inputs).logits).abs().max() > 1e-3  # the LoRA does something
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    spread = posterior_samples(model, inputs, 8, seed=0).std(0).mean()
    assert spread > 1e-3
    rescale_sigma(model, 1e-8)
    torch.testing.assert_close(posterior_samples(model, inputs, 3).mean(0), expected, atol=1e-5, rtol=1e-5)


def test_sigma_of_every_row_is_sigma_q_over_its_singular_value(folders):
    stock, _, gaussian = folders
    model = PeftModel.from_pretrained(base_of("bert"), gaussian)
    ups = [parameter for name, parameter in stock.named_parameters() if "lora_B" in name]
    for layer, up in zip(gaussian_layers(model), ups, strict=True):
        expected = 0.5 / torch.linalg.svdvals(up.detach())
        torch.testing.assert_close((layer.g.detach() ** 2).mean(1), expected, rtol=1e-4, atol=0)


def test_the_search_finds_the_border():
    assert largest_sigma(lambda sigma: sigma, 0.02, steps=20) == pytest.approx(0.02, rel=1e-4)
    assert largest_sigma(lambda sigma: 0.0, 0.0) == RANGE[1]
    assert largest_sigma(lambda sigma: 1.0, 0.0) == pytest.approx(RANGE[0])
    with pytest.raises(ZeroDivisionError):  # what cannot be computed is not taken for cheap
        largest_sigma(lambda sigma: 1 / math.floor(0.5), 0.0)
    assert 0.9 - 0.89 > 0.01  # by rounding: five of 500 rows are what is allowed
    assert largest_sigma(lambda sigma: 0.9 - (0.89 if sigma < 0.5 else 0.5), 0.01, steps=20) == pytest.approx(
        0.5, rel=1e-4
    )


def test_the_adapter_that_is_written_has_the_sigma_that_was_found_and_costs_what_it_may(
    tiny_encoder, labelled, tmp_path, capsys
):
    """The second path: the trainer answers the rows of the search under the same samples."""
    common = ["--base_model", tiny_encoder, "--results_dir", tmp_path, "--disable_tqdm", "true", "--feature_distance"]
    trained, gaussian = tmp_path / "lora", tmp_path / "gaussian"
    flags = ["--dataset_name", labelled, "--output_dir", trained, "--adapter_name", "lora", "--max_steps", 100]
    trainer_script.main([*map(str, [*common, "--run_name", "a", *flags, "--lr", 0.01, "--save_strategy", "no"])])
    capsys.readouterr()
    search = ["--rows", labelled, "--samples", 4, "--criterion", "nll", "--tolerance", 0.05]
    script.main([*map(str, [trained, gaussian, *search])])
    found = float(capsys.readouterr().out.rpartition("sigma_q = ")[2].partition(";")[0])
    assert RANGE[0] < found < RANGE[1]  # neither end: there was something to search

    stock, made = (load_file(folder / "adapter_model.safetensors") for folder in (trained, gaussian))
    firsts = [name for name in stock if name.endswith("lora_A.weight")]
    for name in firsts:
        mean, _, inverse = gaussian_form(stock[name], stock[name.replace("lora_A", "lora_B")])
        part = name.replace("lora_A.weight", "bh_parts.default.down")
        torch.testing.assert_close(made[f"{part}.mu"], mean)
        sigma = (found * inverse)[:, None].expand_as(mean)
        torch.testing.assert_close(made[f"{part}.g"].square(), sigma, rtol=1e-3, atol=0)
    assert firsts and read_distance(gaussian).mean == pytest.approx(read_distance(trained).mean)

    nll = {}
    for folder, more in ((trained, []), (gaussian, ["--posterior_samples", 4])):
        asked = ["--adapter_path", folder, "--do_train", "false", "--dataset_name", labelled, "--test_file", labelled]
        record = trainer_script.main([*map(str, [*common, *asked, "--run_name", folder.name, *more])])
        nll[folder.name] = record["metrics"]["nll"]
    assert nll["lora"] + 0.02 < nll["gaussian"] < nll["lora"] + 0.051


def test_what_is_no_plain_lora_is_refused(folders, tmp_path):
    _, lora, gaussian = folders
    with pytest.raises(InputError, match="BH_PEFT.*only a trained LoRA"):
        write_gaussian(gaussian, tmp_path / "again")
    with pytest.raises(InputError, match="not empty"):
        write_gaussian(lora, gaussian)
    config = lora / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_rslora": false', '"use_rslora": true'))
    with pytest.raises(InputError, match="use_rslora"):
        write_gaussian(lora, tmp_path / "scaled")
