"""A frozen linear layer by oneDNN gives what torch's own gives, forward and backward, and leaves all others alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from bhpeft import frozen_linear
from bhpeft.frozen_linear import LEAST_TOKENS, FrozenConv1D, FrozenLinear, use_onednn

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this torch has no oneDNN",
)


class Calls(TorchDispatchMode):
    """Names of the operations that run."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.names: list[str] = []
        return super().__enter__()

    @property
    def onednn(self) -> int:
        return sum(name.startswith("mkldnn::") for name in self.names)


@pytest.fixture(autouse=True)
def not_intel(monkeypatch):
    monkeypatch.setattr(frozen_linear, "onednn_is_faster", lambda: True)


def pair(kind: type, bias: bool = True) -> tuple[nn.Module, nn.Module]:
    """A stock layer with frozen random weights, 24 -> 40, and the same by oneDNN."""
    torch.manual_seed(0)
    stock = nn.Linear(24, 40, bias=bias) if kind is FrozenLinear else Conv1D(40, 24)
    for parameter in stock.requires_grad_(False).parameters():
        nn.init.normal_(parameter)
    ours = copy.deepcopy(stock)
    use_onednn(ours)
    assert type(ours) is kind
    return stock, ours


@pytest.mark.parametrize("shape", [(LEAST_TOKENS, 24), (3, 7, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize(("kind", "bias"), [(FrozenLinear, True), (FrozenLinear, False), (FrozenConv1D, True)])
def test_values_and_gradients_are_those_of_the_stock_layer(kind, bias, shape):
    stock, ours = pair(kind, bias)
    x = torch.randn(shape, requires_grad=True)
    found = []
    for layer in (stock, ours):
        with Calls() as calls:
            y = layer(x)
            (once,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
            (twice,) = torch.autograd.grad(once.pow(2).sum(), x)
        found.append((y, once, twice, calls.onednn))
    *expected, none = found[0]
    *values, count = found[1]
    assert (none, count > 2) == (0, True)  # both ways really ran
    for value, right in zip(values, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-5 * right.abs().max().item())


def test_input_that_is_not_contiguous():
    stock, ours = pair(FrozenLinear)
    x = torch.randn(24, 5, 12).transpose(0, 2)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [FrozenLinear, FrozenConv1D])
def test_what_is_not_its_own_is_left_to_torch(kind):
    stock, ours = pair(kind)
    few = torch.randn(LEAST_TOKENS - 1, 24)
    many = torch.randn(2 * LEAST_TOKENS, 24)
    with Calls() as calls:
        assert torch.equal(ours(few), stock(few))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours(many), stock(many))
        assert torch.equal(ours.double()(many.double()), stock.double()(many.double()))
    assert calls.onednn == 0


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_that_is_trained_gets_its_gradient(name):
    stock, ours = pair(FrozenLinear)
    x, gradients = torch.randn(16, 24), []
    for layer in (stock, ours):
        parameter = getattr(layer, name).requires_grad_(True)
        gradients += torch.autograd.grad(layer(x).pow(2).sum(), parameter)
    assert torch.equal(*gradients)


def test_only_frozen_fp32_layers_that_are_no_subclass_are_exchanged(monkeypatch):
    class Own(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4).bfloat16(), Conv1D(4, 4), nn.LayerNorm(4)])
    kinds = [FrozenLinear, Own, nn.Linear, FrozenConv1D, nn.LayerNorm]
    monkeypatch.setattr(frozen_linear, "onednn_is_faster", lambda: False)
    use_onednn(model)
    assert [type(layer) for layer in model] == [nn.Linear, Own, nn.Linear, Conv1D, nn.LayerNorm]
    monkeypatch.setattr(frozen_linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(frozen_linear, "is_deepspeed_zero3_enabled", lambda: True)
    use_onednn(model)
    assert type(model[0]) is nn.Linear
    monkeypatch.setattr(frozen_linear, "is_deepspeed_zero3_enabled", lambda: False)
    use_onednn(model)
    assert [type(layer) for layer in model] == kinds


@pytest.mark.parametrize("kind", ["bert", "gpt2", "gpt_neox"])
def test_a_whole_model_computes_the_same(kind):
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    stock = auto.from_config(AutoConfig.for_model(kind, intermediate_size=64, **shape)).eval().requires_grad_(False)
    ours = copy.deepcopy(stock)
    use_onednn(ours)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ids, found = torch.randint(1, 50, (3, 9)), []
    for model in (stock, ours):
        embedded = model.get_input_embeddings()(ids).requires_grad_(True)
        with Calls() as calls:
            logits = model(inputs_embeds=embedded, attention_mask=torch.ones_like(ids)).logits
            (gradient,) = torch.autograd.grad(logits.pow(2).sum(), embedded)
        found.append((logits, gradient, calls.onednn))
    assert found[0][2] == 0 < found[1][2]
    for value, right in zip(found[1][:2], found[0][:2], strict=True):
        torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5 * max(1, right.abs().max().item()))


def test_a_compiled_model_takes_the_stock_product():
    stock, ours = pair(FrozenLinear)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x = torch.randn(16, 24)
    assert torch.equal(torch.compile(ours, backend=backend)(x), stock(x))
    assert seen and not any("mkldnn" in name or "_Product" in name for name in seen)
