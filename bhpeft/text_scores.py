"""Figures of generated texts beside expected ones, with 95 % intervals; sacrebleu is imported where it is used.

    perplexity    exp(-sum log p / tokens), over tokens of expected replies and their ends; prompts and padding never
    BLEU, chrF    of the corpus; Papineni et al. 2002 and Popovic 2015, as Post 2018 (arXiv 1804.08771) fixes them
    distinct-n    different n-grams / n-grams of all answers; Li et al. 2016, arXiv 1510.03055
    interval      percentile bootstrap over groups: the replies of one conversation are drawn together

distinct-n has no interval: drawing with repetition repeats answers, which lowers it by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bhpeft.uncertainty import bootstrap_interval

RESAMPLES = 1000


def perplexity(log_p: np.ndarray, tokens: np.ndarray) -> float:
    """exp(-sum log_p / sum tokens) of (N,) log-likelihoods in nats and (N,) numbers of tokens."""
    return float(np.exp(-np.sum(log_p) / np.sum(tokens)))


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams of the texts; NaN where there is none."""
    words = [text.split() for text in texts]
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def text_figures(
    outputs: Sequence[str],
    references: Sequence[str],
    log_p: np.ndarray,
    tokens: np.ndarray,
    groups: Sequence[str] | None = None,
    generated: bool = True,
) -> dict:
    """All figures of N answers.

    Args:
        outputs, references: N texts each.
        log_p: (N,) log-likelihood of each expected answer behind its prompt, end-of-sequence included, in nats.
        tokens: (N,) their numbers of tokens.
        groups: what each row is drawn together with in the intervals (default: each alone).
        generated: without it there are no outputs, and perplexity alone is given.

    Returns:
        `perplexity`; `bleu` and `chrf` (0 - 100), `bleu_signature` and `chrf_signature`; `distinct_1`, `distinct_2`;
        `exact_match`; `mean_words`. Those but distinct-n and exact match with `NAME_interval_95`.
    """
    from sacrebleu.metrics import BLEU, CHRF

    log_p, tokens = np.asarray(log_p, dtype=float), np.asarray(tokens)
    groups = list(range(len(tokens))) if groups is None else groups
    figures: dict = {"perplexity": perplexity(log_p, tokens)}
    figures |= _interval("perplexity", groups, np.stack([log_p, tokens], 1), lambda s: np.exp(-s[:, 0] / s[:, 1]))
    if not generated:
        return figures
    outputs, references = list(outputs), list(references)
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        figures[name] = float(metric.corpus_score(outputs, [references]).score)
        figures[f"{name}_signature"] = str(metric.get_signature())
        # What sacrebleu's own bootstrap sums and scores; it draws rows alone.
        counts = np.array(metric._extract_corpus_statistics(outputs, [references]))
        score = metric._compute_score_from_stats
        figures |= _interval(name, groups, counts, lambda s, score=score: [score(row.tolist()).score for row in s])
    words = np.array([len(text.split()) for text in outputs])
    figures |= {f"distinct_{n}": distinct(outputs, n) for n in (1, 2)}
    same = [" ".join(a.split()) == " ".join(b.split()) for a, b in zip(outputs, references, strict=True)]
    figures |= {"exact_match": float(np.mean(same)), "mean_words": float(words.mean())}
    pairs = np.stack([words, np.ones_like(words)], 1)
    return figures | _interval("mean_words", groups, pairs, lambda s: s[:, 0] / s[:, 1])


def _interval(name: str, groups: Sequence, rows: np.ndarray, score) -> dict[str, list[float]]:
    """The interval of a figure that follows from sums over rows.

    Args:
        rows: (N, K) what is summed.
        score: (B, K) sums to B figures.
    """
    places = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    sums = np.zeros((len(places), rows.shape[1]))
    np.add.at(sums, [places[group] for group in groups], rows)
    if len(sums) < 2:
        return {}
    low, high = bootstrap_interval(lambda counts, s: np.asarray(score(counts @ s)), [sums], RESAMPLES, by_counts=True)
    return {f"{name}_interval_95": [float(low), float(high)]}
