"""What an adapter has learned, from its files alone: tokens near a tuned prompt, sizes of updates, narrow posteriors.

    near tokens    cos(p_i, E_v) of each virtual token p_i with every input embedding E_v of the base, in blocks of V
    update         |(alpha / r) B A|_F, as (alpha / r) sqrt(sum (B^T B) * (A A^T)): nothing larger than r x r is made;
                   of Gaussian matrices the means
    signal/noise   |mu| / sigma of each Gaussian weight, sigma = g^2: below 1 the sign of the weight is not known
    KL             of posterior and prior, in nats, as the loss counts it; see adapters/gaussian.py

NumPy only; no model is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bhpeft.adapter_files import adapter_weights
from bhpeft.errors import InputError
from bhpeft.files import read_json
from bhpeft.tensor_files import TensorFile, TensorFolder

BLOCK = 8192  # embeddings compared at a time
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared", "word_embedding")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])(?:\.[^.]+)?\.weight")
_PART = re.compile(
    r"(?P<module>.+)\.bh_parts\.(?:[^.]+\.)?(?P<matrix>down|up)\.(?P<tensor>mu|g|weight|bias|prior_mu|prior_sigma)"
)


@dataclass(frozen=True)
class Near:
    """One virtual token: its norm, and the tokens nearest to it with their cosines."""

    place: int
    norm: float
    tokens: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Update:
    """A LoRA update of one module: `norm` is |(alpha / r) B A|_F."""

    layer: int | None
    module: str
    rank: int
    norm: float


@dataclass(frozen=True)
class Posterior:
    """A Gaussian matrix.

    Attributes:
        layer: None where all layers share it.
        site: "prefix", "lora" or "adapter".
        module, matrix: where it is, and "down" or "up".
        weights: how many there are.
        snr: median of |mu| / sigma.
        sure: share of weights with |mu| / sigma above 1.96, whose sign is known in 95 % of the draws.
        sigma: mean of it.
        kl: to the prior, in nats; NaN where the file does not hold the prior.
    """

    layer: int | None
    site: str
    module: str
    matrix: str
    weights: int
    snr: float
    sure: float
    sigma: float
    kl: float


class Adapter:
    """An adapter's folder.

    Raises:
        InputError: it holds no adapter, or one that cannot be read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        file = self.folder / "adapter_config.json"
        if not file.is_file():
            raise InputError(f"{folder}: holds no adapter_config.json; give the adapter's folder.")
        self.config = read_json(file, "save the adapter again.")
        if not isinstance(self.config, dict):
            raise InputError(f"{file}: is no configuration; save the adapter again.")
        self.weights = TensorFile(adapter_weights(self.folder))

    @property
    def prompt(self) -> np.ndarray | None:
        """(P, width) embeddings of the virtual tokens, None where the adapter is no tuned prompt."""
        return self.weights["prompt_embeddings"] if "prompt_embeddings" in self.weights.names else None

    def updates(self) -> list[Update]:
        """The LoRA updates, stock or of BH-PEFT at the posterior mean, in order of depth."""
        pairs: dict[str, dict[str, str]] = {}
        scales: dict[str, float] = {}
        for name in self.weights.names:
            if found := _LORA.fullmatch(name):
                pairs.setdefault(found["module"], {})[found["matrix"]] = name
        for module, names in self._parts().items():
            if _site(module, names) == "lora":
                matrices = {"down": "A", "up": "B"}
                weights = {(m, t): n for (m, t), n in names.items() if t in ("mu", "weight")}
                pairs[module] = {matrices[m]: name for (m, _), name in weights.items()}
                scales[module] = _number(self.config, "lora_alpha", 1) / _number(self.config, "lora_rank", 1)
        updates = []
        for module, names in sorted(pairs.items(), key=lambda item: _depth(item[0])):
            if set(names) != {"A", "B"}:
                raise InputError(f"{self.weights.path}: {module} has half a LoRA; was saving cut short?")
            a, b = self.weights[names["A"]], self.weights[names["B"]]
            scale = scales.get(module, self._stock_scale(module, len(a)))
            updates.append(Update(_layer(module), _short(module), len(a), scale * product_norm(b, a)))
        return updates

    def _stock_scale(self, module: str, rank: int) -> float:
        patterns = self.config.get("alpha_pattern") or {}
        alpha = next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = _number(self.config, "lora_alpha", 1) if alpha is None else float(alpha)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def posteriors(self) -> list[Posterior]:
        """The Gaussian matrices, in order of depth."""
        found = []
        for module, names in sorted(self._parts().items(), key=lambda item: _depth(item[0])):
            for matrix in ("down", "up"):
                if (matrix, "mu") not in names or (matrix, "g") not in names:
                    continue
                mu = self.weights[names[matrix, "mu"]]
                sigma = np.square(self.weights[names[matrix, "g"]])
                ratio = np.abs(mu) / np.maximum(sigma, 1e-12)
                kl = math.nan
                if (matrix, "prior_mu") in names and (matrix, "prior_sigma") in names:
                    priors = (self.weights[names[matrix, part]] for part in ("prior_mu", "prior_sigma"))
                    kl = gaussian_kl(mu, sigma, *priors)
                site = _site(module, names)
                layer = _layer(module)
                figures = float(np.median(ratio)), float((ratio > 1.96).mean()), float(sigma.mean()), kl
                found.append(Posterior(layer, site, _short(module), matrix, mu.size, *figures))
        return found

    def _parts(self) -> dict[str, dict[tuple[str, str], str]]:
        """module -> (matrix, tensor) -> name; the shared prefix, which is saved under two names, once."""
        parts: dict[str, dict[tuple[str, str], str]] = {}
        for name in self.weights.names:
            if found := _PART.fullmatch(name):
                parts.setdefault(found["module"], {})[found["matrix"], found["tensor"]] = name
        sources = [module for module in parts if module.endswith("_source")]
        for extra in sorted(sources, key=lambda module: not module.endswith("bh_source"))[1:]:
            del parts[extra]
        return parts


def product_norm(b: np.ndarray, a: np.ndarray) -> float:
    """|B A|_F of (out, r) and (r, in)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def gaussian_kl(mu: np.ndarray, sigma: np.ndarray, prior_mu: np.ndarray, prior_sigma: np.ndarray) -> float:
    """KL(N(mu, sigma^2) || N(prior_mu, prior_sigma^2)) summed over all entries, in nats."""
    mu, sigma, prior_mu, prior_sigma = (x.astype(np.float64) for x in (mu, sigma, prior_mu, prior_sigma))
    ratio = np.square(np.maximum(sigma, 1e-12) / prior_sigma)
    return float(0.5 * (ratio + np.square((mu - prior_mu) / prior_sigma) - 1 - np.log(ratio)).sum())


def nearest(prompt: np.ndarray, embeddings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k embeddings of largest cosine with each of P vectors.

    Args:
        prompt: (P, width).
        embeddings: (V, width), read in blocks of rows; rows of zeros are as far as can be.

    Returns:
        (P, k) places and (P, k) cosines, the nearest first, the lower place first where they are equal.
    """
    unit = prompt.astype(np.float32) / np.maximum(np.linalg.norm(prompt, axis=1, keepdims=True), 1e-12)
    places = np.zeros((len(prompt), 0), dtype=np.int64)
    cosines = np.zeros((len(prompt), 0), dtype=np.float32)
    for start in range(0, len(embeddings), BLOCK):
        block = np.asarray(embeddings[start : start + BLOCK], dtype=np.float32)
        norms = np.linalg.norm(block, axis=1)
        found = np.where(norms > 0, (unit @ block.T) / np.maximum(norms, 1e-12), -1)
        cosines = np.concatenate([cosines, found], axis=1)
        places = np.concatenate([places, np.broadcast_to(np.arange(len(block)) + start, found.shape)], axis=1)
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        places, cosines = np.take_along_axis(places, best, 1), np.take_along_axis(cosines, best, 1)
    return places, cosines


def input_embeddings(base: TensorFolder, width: int) -> np.ndarray:
    """The base's (V, width) input embeddings.

    Raises:
        InputError: there are none of that width among its weights.
    """
    names = [
        name for name in base.names
        if name.endswith(".weight") and name.split(".")[-2] in EMBEDDINGS and base.shape(name)[-1] == width
    ]  # fmt: skip
    if not names:
        raise InputError(
            f"{base.folder}: no input embeddings of width {width} among its weights; give --base_model, the base that "
            "the adapter was trained on."
        )
    return base[min(names, key=len)]


def near_tokens(prompt: np.ndarray, embeddings: np.ndarray, words: Sequence[str], k: int = 5) -> list[Near]:
    """The tokens nearest to each virtual token; `words` name them by id."""
    places, cosines = nearest(prompt, embeddings, k)
    norms = np.linalg.norm(prompt.astype(np.float64), axis=1)
    return [
        Near(i, float(norms[i]), tuple((words[p], float(c)) for p, c in zip(places[i], cosines[i], strict=True)))
        for i in range(len(prompt))
    ]


# ---------------------------------------------------------------------------------------------- names


def _site(module: str, names: dict) -> str:
    if module.endswith(("bh_prefix", "_source")):
        return "prefix"
    return "adapter" if ("up", "bias") in names else "lora"  # only the parallel adapter's up has a bias


def _layer(module: str) -> int | None:
    number = re.search(r"\.(\d+)(\.|$)", module)
    return int(number[1]) if number else None


def _short(module: str) -> str:
    """The module's name within its layer."""
    module = module.removeprefix("base_model.").removeprefix("model.")
    return re.sub(r"^.*?\.\d+\.", "", module)


def _depth(module: str) -> tuple[str, ...]:
    return tuple(part.zfill(6) for part in module.split("."))


def _number(config: dict, name: str, otherwise: float) -> float:
    value = config.get(name, otherwise)
    return float(value) if isinstance(value, int | float) else float(otherwise)


def by_layer(posteriors: Sequence[Posterior]) -> Iterator[tuple[int | None, str, float, float]]:
    """(layer, site, mean over weights of the matrices' median |mu| / sigma, sum of KL), in order."""
    groups: dict[tuple, list[Posterior]] = {}
    for posterior in posteriors:
        groups.setdefault((posterior.layer, posterior.site), []).append(posterior)
    for layer, site in sorted(groups, key=lambda key: (-1 if key[0] is None else key[0], key[1])):
        group = groups[layer, site]
        weights = sum(p.weights for p in group)
        yield layer, site, sum(p.snr * p.weights for p in group) / weights, sum(p.kl for p in group)
