"""Sampling: which tokens stay in the draw, how often each is drawn, and what is refused."""

import math

import pytest
import torch

from megalodon_mcore.sampling import Sampler


def naive_probabilities(logits: list[float], temperature=1.0, top_k=0, top_p=1.0) -> list[float]:
    """The distribution to draw from, by a loop in Python's own floats."""
    weights = [math.exp((value - max(logits)) / temperature) for value in logits]
    by_likelihood = sorted(range(len(logits)), key=lambda token: -logits[token])
    allowed = by_likelihood[: top_k or len(logits)]
    mass = sum(weights[token] for token in allowed)
    kept, reached = [], 0.0
    for token in allowed:
        if reached >= top_p:
            break
        kept.append(token)
        reached += weights[token] / mass
    total = sum(weights[token] for token in kept)
    return [weights[t] / total if t in kept else 0.0 for t in range(len(logits))]


@pytest.fixture
def drawn_from(monkeypatch):
    """Returns the distributions that a sampler hands to torch.multinomial."""
    multinomial = torch.multinomial

    def distributions(sampler, logits):
        seen = []

        def recording(probabilities, *arguments, **options):
            seen.append(probabilities)
            return multinomial(probabilities, *arguments, **options)

        monkeypatch.setattr(torch, "multinomial", recording)
        tokens = sampler(logits)
        assert tokens.shape == logits.shape[:1] and tokens.dtype == torch.int64
        return seen[0]

    return distributions


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(temperature=0.5),
        dict(temperature=5.0),
        dict(top_k=1),
        dict(top_k=5),
        dict(top_k=19),
        dict(top_k=20),
        dict(top_k=1000),
        dict(top_p=1e-6),
        dict(top_p=0.3),
        dict(top_p=0.9),
        dict(top_p=0.999),
        dict(temperature=0.7, top_k=6, top_p=0.8),
        dict(temperature=2.0, top_k=12, top_p=0.95),
    ],
    ids=str,
)
def test_draws_from_exactly_the_right_tokens(drawn_from, options):
    logits = 2 * torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    actual = drawn_from(Sampler(**options), logits)
    expected = torch.tensor([naive_probabilities(row.tolist(), **options) for row in logits])
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(logits, before)


def test_draws_as_often_as_the_probabilities_say():
    row = torch.randn(12, generator=torch.Generator().manual_seed(1))
    draws = 20_000
    options = dict(temperature=0.8, top_k=8, top_p=0.9)
    tokens = Sampler(**options)(row.expand(draws, -1), torch.Generator().manual_seed(2))
    counts = torch.bincount(tokens, minlength=12)
    for count, probability in zip(
        counts, naive_probabilities(row.tolist(), **options), strict=True
    ):
        deviation = math.sqrt(draws * probability * (1 - probability))
        assert abs(count - draws * probability) <= 4 * deviation


def test_temperature_zero_takes_the_likeliest_token_whatever_else():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(3))
    for sampler in (Sampler(0.0), Sampler(0.0, top_k=3), Sampler(0.0, top_p=0.1)):
        assert torch.equal(sampler(logits), logits.argmax(dim=-1))
    for likeliest in (
        Sampler(top_k=1),
        Sampler(top_p=1e-6),
        Sampler(temperature=1e-4),
        Sampler(1e-320),
    ):
        assert torch.equal(likeliest(logits), logits.argmax(dim=-1))


def test_same_seed_same_tokens():
    logits = torch.zeros(200, 50)

    def tokens(seed):
        return Sampler()(logits, torch.Generator().manual_seed(seed))

    assert torch.equal(tokens(5), tokens(5))
    assert not torch.equal(tokens(5), tokens(6))
    # A generator of its own: torch's global one neither matters nor moves.
    torch.manual_seed(0)
    first, state = tokens(5), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(tokens(5), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-0.5), "--temperature is -0.5; it takes 0 or more."),
        (dict(top_k=-1), "--top-k is -1; it takes 0 (all tokens) or more."),
        (dict(top_p=0.0), "--top-p is 0.0; it takes a number above 0 up to 1."),
        (dict(top_p=1.5), "--top-p is 1.5; it takes a number above 0 up to 1."),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(ValueError) as raised:
        Sampler(**options)
    assert str(raised.value) == message
