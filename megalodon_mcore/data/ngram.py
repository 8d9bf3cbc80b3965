"""How well counting alone predicts the data: the losses a trained model must beat."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from megalodon_mcore.data.metadata import PreparedData

_BLOCK = 1 << 20
_DENSE_PAIRS = 1 << 24


@dataclass(frozen=True)
class NgramLosses:
    """Cross-entropies in nats per token, and over how many tokens they were taken.

    They compare with the validation loss Megatron prints.
    """

    unigram: float
    bigram: float
    tokens: int


@dataclass(frozen=True)
class _Counts:
    """How often each token occurs, and each pair; a pair's key is context * vocab_size + token."""

    unigrams: np.ndarray
    keys: np.ndarray
    pairs: np.ndarray


def unigram_and_bigram_loss(
    train_ids_iter: Iterable[np.ndarray],
    valid_ids_iter: Iterable[np.ndarray],
    vocab_size: int,
    eod_id: int | None = None,
) -> NgramLosses:
    """Cross-entropy of validation documents under counts from training documents.

    Both models are smoothed by interpolation after Witten and Bell (1991), with nothing to tune.
    With c the training counts, N the number of training tokens, T of distinct ones, V the
    vocabulary size, and T(h) the number of distinct tokens seen after h:

        P(w)     = (c(w) + T / V) / (N + T)
        P(w | h) = (c(h w) + T(h) P(w)) / (c(h) + T(h)), or P(w) after an h never seen

    so every token has some probability, and contexts seen often rely on their own counts alone.
    Every token of every validation document is predicted. The first one is predicted from
    `eod_id`, as in the concatenated documents that a model trains on (and training documents
    count that pair too); if `eod_id` is None, the bigram model predicts it by P(w).

    Args:
        train_ids_iter: the token ids of each training document.
        valid_ids_iter: the token ids of each validation document.
        vocab_size: ids are below this.
        eod_id: the end-of-document token.
    """
    train = _count(train_ids_iter, vocab_size, eod_id)
    valid = _count(valid_ids_iter, vocab_size, eod_id)
    tokens = int(valid.unigrams.sum())
    if train.unigrams.sum() == 0 or tokens == 0:
        raise ValueError("n-gram losses need at least one training and one validation token")

    distinct = np.count_nonzero(train.unigrams)
    unigram = (train.unigrams + distinct / vocab_size) / (train.unigrams.sum() + distinct)
    unigram_nats = -np.log(unigram)

    contexts, followers = np.divmod(valid.keys, vocab_size)
    train_contexts = train.keys // vocab_size
    context_count = np.bincount(train_contexts, weights=train.pairs, minlength=vocab_size)
    context_types = np.bincount(train_contexts, minlength=vocab_size)
    seen = _look_up(train, valid.keys)
    mass = (context_count + context_types)[contexts]
    smoothed = seen + context_types[contexts] * unigram[followers]
    bigram = np.where(mass > 0, smoothed / np.maximum(mass, 1), unigram[followers])

    # Document beginnings without a context are in the unigram counts but in no pair.
    followed = np.bincount(followers, weights=valid.pairs, minlength=vocab_size)
    beginnings = valid.unigrams - followed
    bigram_total = -(valid.pairs * np.log(bigram)).sum() + (beginnings * unigram_nats).sum()
    return NgramLosses(
        unigram=float((valid.unigrams * unigram_nats).sum() / tokens),
        bigram=float(bigram_total / tokens),
        tokens=tokens,
    )


def ngram_losses_of_prefixes(
    train_prefixes: Iterable[str],
    valid_prefixes: Iterable[str],
    vocab_size: int,
    eod_id: int | None = None,
) -> NgramLosses:
    """`unigram_and_bigram_loss` of Megatron indexed datasets, named by their prefixes."""
    return unigram_and_bigram_loss(
        (ids for prefix in train_prefixes for ids in iterate_dataset(prefix)),
        (ids for prefix in valid_prefixes for ids in iterate_dataset(prefix)),
        vocab_size,
        eod_id,
    )


def ngram_losses_of_prepared_data(output_prefix: str | os.PathLike) -> NgramLosses:
    """The losses of the validation data that `prepare-data --split` wrote."""
    prepared = PreparedData.load(output_prefix)
    if not {"train", "valid"} <= prepared.datasets.keys():
        raise ValueError(
            f"{str(output_prefix)!r} has no validation dataset: prepare it with --split"
        )
    train, valid = prepared.datasets["train"], prepared.datasets["valid"]
    return ngram_losses_of_prefixes(
        [train.prefix], [valid.prefix], prepared.vocab_size, prepared.eod_id
    )


def iterate_dataset(prefix: str | os.PathLike) -> Iterator[np.ndarray]:
    """The token ids of each document of a Megatron indexed dataset."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(os.fspath(prefix))
    bounds = dataset.document_indices
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        if last > first:
            yield np.concatenate(dataset[int(first) : int(last)])


def _count(documents: Iterable[np.ndarray], vocab_size: int, eod_id: int | None) -> _Counts:
    unigrams = np.zeros(vocab_size, dtype=np.int64)
    dense = vocab_size**2 <= _DENSE_PAIRS
    table = np.zeros(vocab_size**2 if dense else 0, dtype=np.int64)
    keys, pairs = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for contexts, tokens in _blocks(documents, -1 if eod_id is None else eod_id):
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise ValueError(
                f"token id {tokens.max()} does not fit a vocabulary of {vocab_size}: "
                "the data was made with another tokenizer"
            )
        unigrams += np.bincount(tokens, minlength=vocab_size)
        new = (contexts * vocab_size + tokens)[contexts >= 0]
        if dense:
            table += np.bincount(new, minlength=len(table))
        else:
            new_keys, new_pairs = np.unique(new, return_counts=True)
            keys, places = np.unique(np.concatenate([keys, new_keys]), return_inverse=True)
            counted = np.bincount(places, weights=np.concatenate([pairs, new_pairs]))
            pairs = counted.astype(np.int64)
    if dense:
        keys = np.flatnonzero(table)
        pairs = table[keys]
    return _Counts(unigrams, keys, pairs)


def _blocks(
    documents: Iterable[np.ndarray], first_context: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(contexts, tokens) in arrays of about a million; the context is the token before."""
    contexts: list[np.ndarray] = []
    tokens: list[np.ndarray] = []
    size = 0
    for document in documents:
        context = first_context
        for start in range(0, len(document), _BLOCK):
            part = np.asarray(document[start : start + _BLOCK], dtype=np.int64)
            contexts += [np.array([context]), part[:-1]]
            tokens.append(part)
            context, size = int(part[-1]), size + len(part)
            if size >= _BLOCK:
                yield np.concatenate(contexts), np.concatenate(tokens)
                contexts, tokens, size = [], [], 0
    if tokens:
        yield np.concatenate(contexts), np.concatenate(tokens)


def _look_up(counts: _Counts, keys: np.ndarray) -> np.ndarray:
    """How often each pair of `keys` was counted."""
    if not len(counts.keys):
        return np.zeros(len(keys), dtype=np.int64)
    places = np.minimum(np.searchsorted(counts.keys, keys), len(counts.keys) - 1)
    return np.where(counts.keys[places] == keys, counts.pairs[places], 0)
