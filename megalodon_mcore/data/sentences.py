"""Splitting documents into sentences with NLTK's Punkt, as Megatron's preprocessing tool does."""

from collections.abc import Callable, Iterable
from typing import Protocol

SentenceSplitter = Callable[[str], list[str]]

_BLOCK = 1_000_000
"""Punkt sees at most this many characters at once, as in Megatron's tool."""


class Punkt(Protocol):
    """The part of `nltk.tokenize.punkt.PunktSentenceTokenizer` that is used."""

    def span_tokenize(self, text: str) -> Iterable[tuple[int, int]]:
        """Where each sentence starts and stops."""


class PunktSplitter:
    """Splits text into sentences.

    Args:
        language: which of NLTK's installed models to use.
        keep_newlines: keep the white space between sentences (at the end of the first one);
            otherwise it is dropped, as Megatron's tool does unless told --keep-newlines.
        punkt: a trained `nltk.tokenize.punkt.PunktSentenceTokenizer` to use instead of the
            installed model.
    """

    def __init__(
        self, language: str = "english", keep_newlines: bool = False, punkt: Punkt | None = None
    ) -> None:
        self.punkt = _installed_punkt(language) if punkt is None else punkt
        self.keep_newlines = keep_newlines

    def __call__(self, text: str) -> list[str]:
        sentences: list[str] = []
        for first in range(0, len(text), _BLOCK):
            block = text[first : first + _BLOCK]
            spans = list(self.punkt.span_tokenize(block))
            if self.keep_newlines and spans:
                starts = [0, *(start for start, _ in spans[1:])]
                spans = list(zip(starts, [*starts[1:], len(block)], strict=True))
            elif self.keep_newlines:
                spans = [(0, len(block))]
            sentences += [block[start:stop] for start, stop in spans]
        return sentences


def _installed_punkt(language: str) -> Punkt:
    try:
        from nltk.tokenize.punkt import PunktTokenizer
    except ImportError as error:
        raise ValueError("--split-sentences needs NLTK: pip install 'nltk>=3.9'") from error
    try:
        return PunktTokenizer(language)
    except (LookupError, ValueError) as error:
        raise ValueError(
            f"--split-sentences with --language {language!r}: NLTK has no sentence model of that "
            "name here; get all of them with: python -m nltk.downloader punkt_tab"
        ) from error
