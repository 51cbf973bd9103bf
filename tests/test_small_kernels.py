"""Small work in C equals torch's operations: values, every gradient and what is logged, of the same draws."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from bhpeft.adapters import small
from bhpeft.adapters.gaussian import GaussianLinear, LowRank, PointLinear
from bhpeft.adapters.prefix_attention import _alone, _drawn, _merged

pytestmark = pytest.mark.skipif(small.library() is None, reason="no C compiler")
KINDS = [torch.float32, torch.bfloat16]


def close(found, expected, kind, where=""):
    """Up to rounding: of float32, and where what comes in and goes out is bfloat16 of that, 1 in 256."""
    bound = (2e-6 if kind == torch.float32 else 1e-2) * expected.abs().max().item() + 1e-12
    assert found.shape == expected.shape and (found.float() - expected).abs().max().item() <= bound, where


def in_both(function, inputs, kind, monkeypatch):
    """What a function gives, and the gradients by its inputs, in C and by torch in float32, compared."""
    results, calls = [], []
    call = small._call
    monkeypatch.setattr(small, "_call", lambda name, *rest: (calls.append(name), call(name, *rest)))
    for in_c in (True, False):
        monkeypatch.setattr(small, "LARGEST", 2**21 if in_c else -1)
        before = len(calls)
        given = inputs if in_c else [tensor if tensor is None else tensor.float() for tensor in inputs]
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_c and kind == torch.bfloat16):
            outputs = function(*given)
        if in_c:
            assert outputs[0].dtype == kind
        loss = sum((o.float() * torch.randn(o.shape)).sum() for o in outputs if o.requires_grad)
        trained = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
        found = torch.autograd.grad(loss, trained)
        assert [by.dtype for by in found] == [tensor.dtype for tensor in trained]
        results.append([*outputs, *found])
        assert (len(calls) > before) == in_c  # each way was the one that was meant
    for i, (found, expected) in enumerate(zip(*results, strict=True)):
        close(found.detach(), expected.detach(), kind, i)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape, out", [((5, 48), 3), ((4, 19, 384), 4), ((3, 2, 7, 50), 13), ((2, 33, 16), 1)])
def test_a_gaussian_matrix_in_c_is_that_of_torch(shape, out, kind, monkeypatch):
    layer = GaussianLinear(shape[-1], out, prior_mu=0.1, prior_sigma=0.3, initial_sigma=0.2).train()
    squares = []

    def run(x, *_):
        y = layer(x)
        y.sum().backward(retain_graph=True)
        squares.append(layer.nll_gradient_square)
        return y, layer.kl, layer.mean_sigma, layer.kl_gradient_square

    for dtype in {torch.float32, kind}:
        x = torch.randn(shape).to(dtype).requires_grad_()
        in_both(run, [x, layer.mu, layer.g], kind, monkeypatch)
        close(*squares[-2:], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_examples_share_in_c(kind, monkeypatch):
    layer = GaussianLinear(24, 5).train()
    in_both(lambda x, *_: (layer(x, batch=3), layer.kl), [torch.randn(7, 24).requires_grad_(), layer.mu, layer.g], kind,
            monkeypatch)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relu, bias, onto", [(True, True, True), (False, False, True), (True, True, False)])
@pytest.mark.parametrize("inputs, outputs", [(4, 384), (3, 50)])
def test_an_up_matrix_in_c_is_that_of_torch(inputs, outputs, relu, bias, onto, kind, monkeypatch):
    up = PointLinear(inputs, outputs, bias=bias)
    if bias:
        torch.nn.init.normal_(up.bias)
    x = torch.randn(3, 21, inputs).to(kind).requires_grad_()
    base = torch.randn(3, 21, outputs).to(kind).requires_grad_() if onto else None

    def run(x, base, *_):
        return (up(x, relu=relu, scale=1.5, onto=base),)

    in_both(run, [x, base, up.weight, up.bias], kind, monkeypatch)


def test_a_low_rank_pair_adds_to_what_it_is_given(monkeypatch):
    pair = LowRank(GaussianLinear(32, 4), PointLinear(4, 64, bias=True), 2.0, relu=True).train()
    torch.nn.init.normal_(pair.up.bias)
    x, base = torch.randn(2, 5, 32), torch.randn(2, 5, 64)
    torch.manual_seed(0)
    alone = pair(x)
    torch.manual_seed(0)
    assert torch.allclose(pair(x, onto=base), base + alone, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (3, 171), (2, 8, 384)])
def test_gelu_in_c_is_that_of_torch(shape, kind, monkeypatch):
    torch.manual_seed(3)
    x = (3 * torch.randn(shape)).to(kind).requires_grad_()
    in_both(lambda x: (small.ShortGelu()(x),), [x], kind, monkeypatch)


def test_gelu_in_c_far_out_and_at_nothing():
    x = torch.tensor([-1e30, -20.0, -6.0, -0.0, 0.0, 1e-20, 6.0, 1e30, float("nan")], requires_grad=True)
    expected = torch.nn.functional.gelu(x)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    found = small.ShortGelu()(x)
    (own,) = torch.autograd.grad(found.sum(), x)
    assert torch.allclose(found, expected, atol=1e-7, equal_nan=True)
    assert torch.allclose(own, slope, atol=1e-6, equal_nan=True)


def test_a_base_takes_the_short_gelu_for_its_exact_ones_alone():
    model = torch.nn.ModuleList([ACT2FN["gelu"], ACT2FN["gelu_new"], ACT2FN["gelu_python"], torch.nn.GELU()])
    small.use_short_gelu(model)
    assert [type(module) is small.ShortGelu for module in model] == [True, False, False, False]


def attention(kind, heads=4, kv_heads=4, length=9, text=9, width=24, size=1.0):
    torch.manual_seed(1)
    query = torch.randn(3, length, heads, width).to(kind)
    key, value = (torch.randn(3, text, kv_heads, width).to(kind).requires_grad_() for _ in range(2))
    toward = query.float().mean(1).view(3, kv_heads, -1, width).mean(2)
    prefix_key = (size * toward[:, :, None] + torch.randn(3, kv_heads, 5, width)).to(kind).requires_grad_()
    prefix_value = torch.randn(3, kv_heads, 5, width).to(kind).requires_grad_()
    gate = torch.linspace(-0.5, 1.5, heads)
    return [query.requires_grad_(), key, value, prefix_key, prefix_value, gate.requires_grad_()]


def attend(mask=None, dropout=0.0, causal=False):
    module = torch.nn.Module().train()

    def run(query, key, value, *prefix):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return _merged(module, query, key, value, mask, prefix, None, dropout, causal)

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("heads, kv_heads, width", [(4, 4, 24), (4, 2, 32), (3, 1, 5)])
@pytest.mark.parametrize("masked", ["not", "causal", "bool", "added", "by head"])
def test_gated_attention_in_c_is_that_of_torch(masked, heads, kv_heads, width, dropout, kind, monkeypatch):
    seen = torch.ones(3, 1, 9, 9, dtype=torch.bool)
    seen[1:, ..., 6:], seen[2, ..., :2] = False, False
    mask = {
        "bool": seen,
        "added": torch.zeros(seen.shape, dtype=kind).masked_fill(~seen, torch.finfo(kind).min),
        "by head": torch.randn(1, heads, 9, 9).to(kind),
    }.get(masked)
    in_both(attend(mask, dropout, masked == "causal"), attention(kind, heads, kv_heads, width=width), kind, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", ["not", "bool", "added"])
def test_attention_without_a_prefix_in_c_is_torchs_own(masked, kind, monkeypatch):
    """Dropout so small that nothing is dropped: `torch.nn.functional` draws other numbers."""
    monkeypatch.setattr(small, "dropped_below", lambda dropout: (dropout, -(2**15)))
    seen = torch.ones(3, 1, 9, 9, dtype=torch.bool)
    seen[1:, ..., 6:] = False
    added = torch.zeros(seen.shape, dtype=kind).masked_fill(~seen, torch.finfo(kind).min)
    mask = {"bool": seen, "added": added}.get(masked)
    module = torch.nn.Module().train()
    module.is_causal = False
    query, key, value = (tensor.transpose(1, 2) for tensor in attention(kind)[:3])
    output, weights = _alone(module, query, key, value, mask, dropout=1e-9)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
    close(output.detach(), expected.detach(), kind)
    assert torch.allclose(weights.sum(-1), torch.ones(3, 4, 9), atol=1e-5)
    by = torch.randn(expected.shape)
    found, wanted = (torch.autograd.grad((o.float() * by).sum(), [query, key, value]) for o in (output, expected))
    for one, other in zip(found, wanted, strict=True):
        close(one, other, kind)


def test_what_is_dropped_of_attention_without_a_prefix_is_as_often_as_asked():
    query, key, value = (tensor.transpose(1, 2) for tensor in attention(torch.float32, length=200, text=200)[:3])
    module = torch.nn.Module().train()
    module.is_causal = False
    torch.manual_seed(0)
    output, _ = _alone(module, query, key, torch.ones_like(value), None, dropout=0.1)
    assert abs(output.mean().item() - 1) < 5e-3 and output.std().item() > 0.01


def test_attention_without_a_prefix_is_torchs_where_c_does_not_go():
    query, key, value = (tensor.transpose(1, 2) for tensor in attention(torch.float32)[:3])
    module = torch.nn.Module().train()
    assert _alone(module, query, key, value, None, dropout=0.1) is None  # causal, as far as it says
    module.is_causal = False
    assert _alone(module, query, key, value, None, dropout=0.0) is None
    assert _alone(module, query, key, value, None, dropout=0.1, is_causal=True) is None
    assert _alone(module, query.double(), key.double(), value.double(), None, dropout=0.1) is None
    assert _alone(module.eval(), query, key, value, None, dropout=0.1) is None


def test_one_query_over_a_longer_text_in_c(monkeypatch):
    in_both(attend(), attention(torch.float32, length=1, text=40), torch.float32, monkeypatch)


@pytest.mark.parametrize("size", [300.0, -300.0])
def test_gradients_stay_finite_in_c_where_one_side_takes_all(size):
    inputs = attention(torch.float32, size=size)
    out, _ = attend()(*inputs)
    assert out.isfinite().all()
    assert all(by.isfinite().all() for by in torch.autograd.grad(out.square().sum(), inputs))


def test_what_is_dropped_is_as_often_as_asked():
    """Values of 1 and a gate of 1 make each output the sum of what is left of the weights: 1 on average."""
    query, key, value, prefix_key, prefix_value, gate = attention(torch.float32, length=200, text=200)
    ones = torch.ones_like(value), torch.ones_like(prefix_value), torch.ones_like(gate)
    torch.manual_seed(0)
    out = attend(dropout=0.1)(query, key, ones[0], prefix_key, ones[1], ones[2])[0]
    assert abs(out.mean().item() - 1) < 5e-3
    share, drawn, least = _drawn(torch.empty(10, 10, 100, 1), 100, 0.1)
    assert abs(share - 0.1) < 1e-5 and abs((drawn < least).float().mean().item() - 0.1) < 2e-3


def test_dropout_of_16_bits_drops_as_often_and_keeps_the_mean():
    model = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Dropout(0.0)).train()
    small.use_short_dropout(model)
    x = torch.ones(1000, 1000, requires_grad=True)
    y = model(x)
    by_x = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(y.detach(), by_x) and len(y.unique()) == 2
    assert abs((y == 0).float().mean().item() - 0.1) < 1e-3 and abs(y.mean().item() - 1) < 1e-3
    torch.manual_seed(3)
    first = model(x)
    torch.manual_seed(3)
    assert torch.equal(first, model(x)) and not torch.equal(first, model(x))
    assert torch.equal(model.eval()(x), x)


def test_numbers_that_are_none_are_not_hidden():
    layer = GaussianLinear(32, 4).train()
    for kind in KINDS:
        x = torch.randn(2, 3, 32)
        x[1, 2, 5] = torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32)  # rounded as a number it is -0
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            y = layer(x)
        assert y[1, 2].isnan().all() and y[0].isfinite().all()
        y.sum().backward()
        assert layer.mu.grad.isnan().any()
    layer.mu.data[0, 0] = torch.nan
    layer(torch.randn(2, 3, 32))
    assert layer.kl.isnan()


def test_what_is_large_or_of_another_kind_stays_with_torch():
    weight = torch.nn.Parameter(torch.zeros(4, 32))

    def takes(x, weight=weight, size=64):
        return small.takes(size, x, weight, None)

    x = torch.zeros(2, 32)
    assert takes(x) and takes(x, size=small.LARGEST // torch.get_num_threads())
    assert not takes(x, size=small.LARGEST // torch.get_num_threads() + 1) and not takes(x, size=0)
    assert not takes(x.double()) and not takes(x, weight.bfloat16()) and not takes(x.to("meta"))
    assert not takes(x, weight.t()) and not takes(torch.nn.Parameter(x))
    with torch.no_grad():
        assert not takes(x)
    with FlopCounterMode(display=False):  # it sees torch's operations alone
        assert not takes(x)
    with FakeTensorMode():
        assert not takes(torch.zeros(2, 32), torch.zeros(4, 32))


PROGRAM = """
import logging
logging.basicConfig(level=logging.INFO)
import torch
from bhpeft.adapters import small
from bhpeft.adapters.gaussian import GaussianLinear
torch.manual_seed(0)
layer = GaussianLinear(32, 4).train()
y = layer(torch.randn(2, 3, 32))
y.sum().backward()
print(small.library() is not None, (y.sum() + layer.mu.grad.sum() + layer.g.grad.sum()).item())
"""


def started(folder, **variables):
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(folder), "PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)  # fmt: skip


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_results_are_those_of_torch(compiler, tmp_path):
    processes = started(tmp_path / "with"), started(tmp_path / "without", CC=compiler)
    (said, _), (without, noted) = (process.communicate() for process in processes)
    with_c, value = said.split()
    without_c, expected = without.split()
    assert (with_c, without_c) == ("True", "False") and "torch's operations take their place" in noted
    assert float(value) == pytest.approx(float(expected), rel=1e-5)


def test_processes_that_compile_at_once_all_have_it_and_leave_one_file(tmp_path):
    processes = [started(tmp_path) for _ in range(3)]
    found = {process.communicate()[0] for process in processes}
    assert len(found) == 1 and found.pop().startswith("True")
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
