"""A document's tokens and the bytes behind each, of every kind of tokenizer."""

import io

import pytest

from megalodon_mcore.conversion.model import Tokenizer
from megalodon_mcore.conversion.text import TextTokenizer
from megalodon_mcore.conversion.tokenizers import NULL_TOKENIZER, open_tokenizer
from megalodon_mcore.data.byte_tokenizer import write_byte_tokenizer
from megalodon_mcore.scoring import text_tokens
from megalodon_mcore.scoring.text_tokens import DocumentTokenizer

TEXTS = ["plain words, and some more", "Ünïcödé 漢字 😀 e\u0301", "  spaces \n\n\t around  "]


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    return open_tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("byte") / "own"))


def byte_pairs(folder):
    """A byte-level BPE with merges, that begins each text with <s>."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS * 20, vocab_size=300, special_tokens=["<s>", "</s>"])
    trained._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return open_tokenizer(folder)


def sentencepiece_model(path):
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 50),
        model_writer=written,
        vocab_size=60,
        hard_vocab_limit=False,
        byte_fallback=False,
        minloglevel=2,
    )
    path.write_bytes(written.getvalue())
    return open_tokenizer(path)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_counted_once(text, tmp_path, byte_tokenizer):
    size = len(text.encode())
    pairs, pieces = byte_pairs(tmp_path / "bpe"), sentencepiece_model(tmp_path / "own.model")
    for tokenizer in (byte_tokenizer, pairs, pieces):
        ids, sizes = DocumentTokenizer(tokenizer, 1000)(text, "here")
        assert sizes.sum() == size and (sizes >= 0).all() and len(ids) == len(sizes)
        expected = TextTokenizer(tokenizer).tokenize(text)
        assert ids.tolist() == (expected[1:-1] if tokenizer is pairs else expected)
        if tokenizer is byte_tokenizer:
            assert set(sizes.tolist()) == {1}


def test_bytes_of_a_token_are_those_of_its_text(tmp_path):
    tokenizer = byte_pairs(tmp_path / "bpe")
    ids, sizes = DocumentTokenizer(tokenizer, 1000)(TEXTS[0], "here")
    text = TextTokenizer(tokenizer)
    assert len(ids) < len(TEXTS[0])
    assert [len(text.detokenize([token])) for token in ids] == sizes.tolist()


def test_the_byte_tokenizers_short_cut_gives_its_own_tokens(byte_tokenizer, monkeypatch):
    short = DocumentTokenizer(byte_tokenizer, 257)
    monkeypatch.setattr(text_tokens, "_is_byte_tokenizer", lambda *arguments: False)
    whole = DocumentTokenizer(byte_tokenizer, 257)
    assert short._encode != whole._encode
    for text in ("words <|endoftext|> and more", "plain"):
        (ids, sizes), (other_ids, other_sizes) = short(text, "here"), whole(text, "here")
        assert ids.tolist() == other_ids.tolist() and sizes.tolist() == other_sizes.tolist()


def test_numbers_are_tokens():
    numbers = DocumentTokenizer(Tokenizer(NULL_TOKENIZER, (), 0), 100)
    ids, sizes = numbers("12 7  99\n", "here")
    assert ids.tolist() == [12, 7, 99] and sizes.tolist() == [2, 2, 5]
    with pytest.raises(ValueError, match="here has token 100; the model has 100 of them"):
        numbers("1 100", "here")
    with pytest.raises(ValueError, match="a tokenizer of numbers, and the text is none"):
        numbers("one", "here")
