"""How sure a Bayesian adapter is of each token that was generated.

With p_s the distribution of token t behind the tokens before it, under weights s = 1 .. S drawn from the posterior, and
H the entropy in nats:

    entropy              H_t = H(mean_s p_s)                        all uncertainty: the language's and the weights'
    mutual information   I_t = H(mean_s p_s) - mean_s H(p_s)        the weights' part; between 0 and log S

Houlsby et al. 2011 (arXiv 1112.5745), token by token as in Malinin and Gales 2021 (arXiv 2002.07650). The tokens are
those of the answer as it was generated, at the posterior's mean; one forward pass a sample goes over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bhpeft.adapters.bh_peft import gaussian_layers
from bhpeft.adapters.posterior import posterior_noise


@dataclass
class TokenUncertainty:
    """`entropy` and `mutual_information` of T tokens, in nats, under `samples` weights; `vocabulary` is V."""

    entropy: list[float]
    mutual_information: list[float]
    samples: int
    vocabulary: int


@torch.no_grad()
def token_uncertainty(
    model: nn.Module, prompt_ids: Sequence[int], answer_ids: Sequence[int], samples: int = 8, seed: int = 0
) -> TokenUncertainty:
    """The uncertainty of each token of an answer behind its prompt.

    Args:
        model: with Gaussian weights, in evaluation mode.
        samples: S, 2 or more; the weights depend on the seed alone.

    Raises:
        ValueError: the model has no Gaussian weights, or is in training mode.
    """
    ids = torch.tensor([[*prompt_ids, *answer_ids]], device=next(model.parameters()).device)
    count = len(answer_ids)
    mean, expected = None, torch.zeros(count)
    with posterior_noise(model, samples, seed) as noise:
        layers = gaussian_layers(model)
        for s in range(samples):  # one at a time: S vocabularies of a whole answer need not be held at once
            for layer, eps in zip(layers, noise, strict=True):
                layer.eps = eps[s : s + 1]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -count - 1 : -1]
            p = logits.float().softmax(-1).cpu()
            expected += torch.special.entr(p).sum(-1) / samples
            mean = p / samples if mean is None else mean + p / samples
    entropy = torch.special.entr(mean).sum(-1)
    information = (entropy - expected).clamp(min=0)  # rounding may go below
    return TokenUncertainty(entropy.tolist(), information.tolist(), samples, mean.shape[-1])
