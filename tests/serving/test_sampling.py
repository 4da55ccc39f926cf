"""Sampling against transformers' own logits processors, on random logits."""

from __future__ import annotations

import numpy as np
import pytest

from tpimpi.serving.logprobs import logprob_of
from tpimpi.serving.sampling import Additions, distribution, make_sampler

VOCAB = 5000


def random_logits(seed: int, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, vocab).astype(np.float32)


def oracle(logits: np.ndarray, history: list[int], **options: float) -> np.ndarray:
    """Probabilities [vocab] by transformers' processors, in the order in which `generate` applies them."""
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.from_numpy(logits.copy())[None]
    ids = torch.tensor([history], dtype=torch.long)
    for option, name in {
        "repetition_penalty": "RepetitionPenaltyLogitsProcessor",
        "temperature": "TemperatureLogitsWarper",
        "top_k": "TopKLogitsWarper",
        "top_p": "TopPLogitsWarper",
        "min_p": "MinPLogitsWarper",
    }.items():
        if option in options:
            scores = getattr(processors, name)(options[option])(ids, scores)
    return scores[0].double().softmax(-1).numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 10 * VOCAB},
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"top_p": 0.999, "temperature": 5.0},  # most of the vocabulary stays
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"repetition_penalty": 1.2, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_distribution_is_that_of_transformers(options: dict[str, float], seed: int) -> None:
    logits = random_logits(seed)
    history = np.random.default_rng(seed + 100).integers(0, VOCAB, 300).tolist() * 2  # a penalty counts once
    history.append(int(logits.argmax()))
    found = distribution(logits, history, **{"temperature": 1.0, **options})
    expected = oracle(logits, history, **options)
    assert (found > 0).sum() == (expected > 0).sum()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_ties_at_the_border() -> None:
    logits = np.array([1, 2, 2, 2, 0], np.float32)
    # top-k keeps all that equal the k-th, as transformers does; top-p the fewest, lowest ids first
    np.testing.assert_allclose(distribution(logits, [], temperature=1.0, top_k=2), oracle(logits, [], top_k=2))
    kept = distribution(np.zeros(10, np.float32), [], temperature=1.0, top_p=0.35)
    np.testing.assert_allclose(kept, [0.25] * 4 + [0] * 6)


def test_greedy_takes_the_lowest_of_equals() -> None:
    greedy = make_sampler(top_k=3, seed=1)
    assert greedy(np.array([0, 5, 1, 5], np.float32), []) == 1
    assert distribution(np.array([0, 5, 1, 5], np.float32), []).tolist() == [0, 1, 0, 0]
    assert make_sampler(repetition_penalty=2.0)(np.array([0, 5, 1, 4], np.float32), [1, 1, 99, -1]) == 3


def test_draws_follow_the_distribution_and_the_seed() -> None:
    logits = random_logits(5, 50)
    options = {"temperature": 1.5, "top_k": 20, "top_p": 0.9}
    first, again, other = (make_sampler(**options, seed=seed) for seed in (7, 7, 8))
    draws = [first(logits, []) for _ in range(20000)]
    assert draws[:500] == [again(logits, []) for _ in range(500)]
    assert draws[:500] != [other(logits, []) for _ in range(500)]
    expected = distribution(logits, [], **options)
    np.testing.assert_allclose(np.bincount(draws, minlength=50) / len(draws), expected, atol=0.02)
    assert set(draws) <= set(np.flatnonzero(expected))


def test_no_seed_differs_from_call_to_call() -> None:
    logits = np.zeros(1000, np.float32)
    one, two = make_sampler(temperature=1.0), make_sampler(temperature=1.0)
    assert [one(logits, []) for _ in range(10)] != [two(logits, []) for _ in range(10)]


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    logits = random_logits(9)
    found = distribution(logits, [], temperature=temperature, top_p=0.9999)
    assert np.isfinite(found).all() and found.sum() == pytest.approx(1)
    if temperature < 1:
        assert make_sampler(temperature=temperature, seed=0)(logits, []) == logits.argmax()


def test_masked_tokens_are_never_drawn() -> None:
    logits = np.full(100, -np.inf, np.float32)
    logits[[3, 97]] = 1
    sample = make_sampler(temperature=2.0, top_k=50, top_p=0.99, min_p=0.01, repetition_penalty=1.1, seed=0)
    assert {sample(logits, [0, 3]) for _ in range(200)} == {3, 97}


def test_logits_are_not_changed() -> None:
    logits = random_logits(1)
    before = logits.copy()
    make_sampler(temperature=0.5, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=2.0, seed=0)(logits, [1, 2])
    make_sampler(repetition_penalty=2.0)(logits, [1, 2])
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 2),
        ("min_p", float("nan")),
        ("repetition_penalty", 0),
        ("repetition_penalty", -2),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
        ("seed", 0.5),
    ],
)
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{option.replace('_', '-')} is {value}, must be ") as caught:
        make_sampler(**{option: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"repetition_penalty": 1.5}], ids=str)
def test_broken_logits(bad: float, options: dict[str, float]) -> None:
    logits = random_logits(2)
    logits[77] = bad
    with pytest.raises(ValueError, match=r"largest logit is (nan|inf), must be finite"):
        make_sampler(**options)(logits, [5])
    with pytest.raises(ValueError, match="largest logit is -inf"):
        make_sampler(**options)(np.full(9, -np.inf, np.float32), [5])


def test_penalties_and_bias_are_added_as_openai_says() -> None:
    """Its documentation: mu[j] - c[j] * frequency - (c[j] > 0) * presence, and the bias."""
    logits = np.array([1.0, 2.0, 3.0, 4.0, -1.0], np.float32)
    prompt, answer = [4, 4, 3], [2, 2, 3, 9, -1]
    additions = Additions(frequency=0.5, presence=0.25, bias={0: 4.0, 4: -100.0, 99: 1.0}, start=len(prompt))
    counts = np.array([0, 0, 2, 1, 0])
    expected = logits - counts * 0.5 - (counts > 0) * 0.25 + np.array([4, 0, 0, 0, -100])
    weights = np.exp(expected - expected.max())
    found = distribution(logits, [*prompt, *answer], temperature=1.0, additions=additions)
    np.testing.assert_allclose(found, weights / weights.sum(), rtol=1e-12)
    assert make_sampler(additions=additions)(logits, [*prompt, *answer]) == expected.argmax() == 0
    assert logits.tolist() == [1, 2, 3, 4, -1]
    for wrong in (Additions(frequency=2.1), Additions(presence=float("nan")), Additions(bias={1: 101.0})):
        with pytest.raises(ValueError, match=r"must be from -(2|100) to"):
            make_sampler(additions=wrong)


def test_log_probabilities_are_those_of_the_logits() -> None:
    torch = pytest.importorskip("torch")
    logits = random_logits(0, 300)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), 0)
    found = logprob_of(logits, 7, 4)
    best = torch.topk(expected, 4)
    assert found.logprob == pytest.approx(float(expected[7]), abs=1e-12)
    assert [token for token, _ in found.likeliest] == best.indices.tolist()
    np.testing.assert_allclose([value for _, value in found.likeliest], best.values.numpy(), rtol=1e-12)
    assert logprob_of(logits, 7, 0).likeliest == [] and len(logprob_of(logits, 7, 999).likeliest) == 300
