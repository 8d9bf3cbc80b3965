"""Prepared data must be what Megatron reads, and hold exactly the text that went in."""

import gzip
import json
import multiprocessing
import os
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nltk.tokenize.punkt import PunktSentenceTokenizer

import ngram
from megalodon_mcore.__main__ import main
from megalodon_mcore.data import (
    encoders,
    output_files,
    prepare,
    sources,
)
from megalodon_mcore.data.byte_tokenizer import (
    END_OF_DOCUMENT_ID,
    VOCAB_SIZE,
    encode_bytes,
    write_byte_tokenizer,
)
from megalodon_mcore.data.end_token import tokenize_prompt
from megalodon_mcore.data.megatron_split import split_bounds, working_split
from megalodon_mcore.data.metadata import PreparedData, metadata_path
from megalodon_mcore.data.sentences import PunktSplitter
from megalodon_mcore.data.splitting import parse_split, plan_split

AWKWARD_TEXTS = [
    "plain words, with 'quotes' and n't .",
    "  leading, trailing  \n\n\ttabs\r\n",
    "caf\u00e9 \u65e5\u672c \U0001f600 e\u0301 \u00a0 \ufeff",
    "<|endoftext|> spelled out",
    "".join(map(chr, range(0x180))),
]

STORY = (
    "The whale dived. It came up again near the boat. Dr. Smith saw it first! "
    "Nobody else did? The sea was calm. "
)


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))
    return path


def _prepare(*args, **options):
    return prepare.prepare_data(*args, progress=False, **options)


def _documents(prefix):
    return [ids.tolist() for ids in ngram.iterate_dataset(prefix)]


def _texts(prefix):
    return [bytes(i for i in ids if i != END_OF_DOCUMENT_ID).decode() for ids in _documents(prefix)]


@pytest.fixture
def corpus(tmp_path):
    """Two hundred small files and what they hold."""
    rng = np.random.RandomState(0)
    texts = [f"{i}: " + STORY * rng.randint(1, 9) for i in range(200)]
    for i, text in enumerate(texts):
        _write(tmp_path / "corpus" / f"{i:03}.txt", text)
    return tmp_path / "corpus", texts


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_byte_tokenizer_gives_bytes_and_comes_back(tmp_path, text):
    from transformers import AutoTokenizer

    folder = write_byte_tokenizer(tmp_path / "bytes")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode()) == encode_bytes(text).tolist()
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == VOCAB_SIZE and tokenizer.eos_token_id == END_OF_DOCUMENT_ID
    assert tokenizer.decode([END_OF_DOCUMENT_ID]) == tokenizer.eos_token


def test_byte_tokenizer_is_megatrons_and_reused(tmp_path):
    folder = write_byte_tokenizer(tmp_path / "deep" / "bytes")
    before = (folder / "tokenizer.json").stat()
    assert write_byte_tokenizer(folder) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before.st_mtime_ns
    assert [path.name for path in folder.parent.iterdir()] == ["bytes"]

    choice = encoders.TokenizerChoice("HuggingFaceTokenizer", folder)
    tokenizer = encoders.build_megatron_tokenizer(choice)
    assert (tokenizer.vocab_size, tokenizer.eod) == (VOCAB_SIZE, END_OF_DOCUMENT_ID)
    for text in AWKWARD_TEXTS:
        assert tokenizer.tokenize(text) == list(text.encode())
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text

    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(FileExistsError, match="is not this byte tokenizer"):
        write_byte_tokenizer(folder)


def test_documents_of_text_files(tmp_path):
    text = "one\ntwo\n\n \t\n\nthree\r\nfour"
    path = _write(tmp_path / "a.txt", text)

    def read(rule, **options):
        found = sources.find_files([path])
        return [d.text for d in sources.iterate_documents(found, rule, **options)]

    assert read("file") == [text]
    assert read("line") == ["one", "two", " \t", "three", "four"]
    assert read("paragraph") == ["one\ntwo", "three\r\nfour"]
    assert read("file", max_bytes=9) == [text[:9]]
    assert read("line", max_bytes=8) == ["one", "two"]
    assert read("line", max_bytes=5) == ["one"]  # two bytes may not hold a character
    with pytest.raises(ValueError, match="--documents 'page'"):
        read("page")


def test_max_bytes_never_cuts_a_character(tmp_path):
    path = _write(tmp_path / "a.txt", "\u65e5" * 10)
    found = sources.find_files([path])
    for limit in range(3, 31):
        (document,) = sources.iterate_documents(found, max_bytes=limit)
        assert document.text == "\u65e5" * (limit // 3)


def test_folders_are_sorted_and_skip_what_is_not_text(tmp_path):
    _write(tmp_path / "b.txt", "B")
    _write(tmp_path / "a" / "z.md", "Z")
    _write(tmp_path / "a" / "c.jsonl", '{"text": "J1"}\n\n{"text": "J2"}\n')
    _write(tmp_path / ".git" / "hidden.txt", "no")
    _write(tmp_path / "settings.json", "{}")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin1"))
    skipped = []
    found = sources.find_files([tmp_path])
    texts = [d.text for d in sources.iterate_documents(found, on_skip=skipped.append)]
    assert texts == ["B", "J1", "J2", "Z"]
    assert [path.name for path in skipped] == ["latin.txt"]

    with pytest.raises(ValueError, match=r"latin.txt: not UTF-8 text \(byte 3"):
        list(sources.iterate_documents(sources.find_files([tmp_path / "latin.txt"])))
    with pytest.raises(FileNotFoundError, match="'nowhere' does not exist"):
        sources.find_files(["nowhere"])
    with pytest.raises(ValueError, match="no file ending in .csv"):
        sources.find_files([tmp_path], [".csv"])


def test_json_lines(tmp_path):
    good = tmp_path / "good.jsonl.gz"
    with gzip.open(good, "wt", encoding="utf-8") as stream:
        stream.write('{"body": "caf\\u00e9"}\n{"body": "second\\n"}\n')
    found = sources.find_files([good])
    read = [(d.text, d.origin) for d in sources.iterate_documents(found, json_key="body")]
    assert read == [("caf\u00e9", f"{good}:1"), ("second\n", f"{good}:2")]

    for line, message in [
        ('{"text": ', r"bad.json, line 2: not JSON .*one complete JSON object a line"),
        ('{"body": "x"}', r"bad.json, line 2: no text under the key 'text' \(found: 'body'\)"),
        ('["x"]', r"bad.json, line 2: no text under the key 'text'"),
        ('{"text": 3}', r"bad.json, line 2: no text under the key 'text'"),
        ('{"text": "\\ud800"}', r"bad.json, line 2: the text holds half a surrogate pair"),
    ]:
        bad = _write(tmp_path / "bad.json", '{"text": "fine"}\n' + line + "\n")
        with pytest.raises(ValueError, match=message):
            list(sources.iterate_documents(sources.find_files([bad])))


def test_a_byte_order_mark_is_no_text(tmp_path):
    marked = b"\xef\xbb\xbf"
    text = "one\n\ntwo \ufeff"
    path = _write(tmp_path / "a.txt", "\ufeff" + text)
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(marked + b'{"text": "one"}\n')
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))

    def read(path, rule="file", **options):
        found = sources.find_files([path])
        return [d.text for d in sources.iterate_documents(found, rule, **options)]

    assert read(path) == [text] and read(path, max_bytes=4) == ["one\n"]
    assert read(path, "line") == ["one", "two \ufeff"] == read(path, "paragraph")
    assert read(lines) == read(packed) == ["one"]
    assert read(_write(tmp_path / "empty.txt", "\ufeff")) == []
    prepared = _prepare([path], tmp_path / "d", append_eod=False)
    assert _documents(prepared.datasets["all"].prefix) == [list(text.encode())]
    wide = tmp_path / "wide.txt"
    wide.write_bytes(text.encode("utf-16"))
    with pytest.raises(ValueError, match="wide.txt: not UTF-8 text .* iconv -f utf-16 -t utf-8"):
        read(wide)


def test_python_stdlib_sources():
    files = sources.python_stdlib_sources()
    assert files == [file.path for file in sources.find_files([sources.PYTHON_STDLIB])]
    assert {"argparse.py", "dataclasses.py"} <= {file.name for file in files}
    assert not any("site-packages" in file.parts or "test" in file.parts for file in files)
    assert 3e6 < sum(file.stat().st_size for file in files) < 3e7


def test_one_dataset_in_megatrons_naming(tmp_path, corpus):
    folder, texts = corpus
    prepared = _prepare([folder], tmp_path / "out" / "books")
    prefix = str(tmp_path / "out" / "books_text_document")
    assert prepared == PreparedData.load(tmp_path / "out" / "books")
    assert prepared.datasets["all"].prefix == prefix
    assert _documents(prefix) == [[*text.encode(), END_OF_DOCUMENT_ID] for text in texts]
    info = prepared.datasets["all"]
    assert (info.documents, info.sequences) == (200, 200)
    assert info.bytes == sum(map(len, texts)) == info.tokens - 200
    assert prepared.dtype == "uint16"
    assert prepared.megatron_arguments() == [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        str(tmp_path / "out" / "byte_tokenizer"),
        "--data-path",
        prefix,
        "--split",
        "900,50,50",
    ]
    without = _prepare([folder], tmp_path / "plain", append_eod=False)
    assert _documents(without.datasets["all"].prefix) == [list(text.encode()) for text in texts]
    assert without.datasets["all"].tokens == without.datasets["all"].bytes


def test_prepared_data_can_be_moved(tmp_path, corpus):
    _prepare([corpus[0]], tmp_path / "old" / "d", split="8,1,1")
    (tmp_path / "old").rename(tmp_path / "new")
    moved = PreparedData.load(tmp_path / "new" / "d")
    assert moved.tokenizer_model == str(tmp_path / "new" / "byte_tokenizer")
    assert _documents(moved.datasets["valid"].prefix)


def test_split_deals_out_every_document_once(tmp_path, corpus):
    folder, texts = corpus
    prepared = _prepare([folder], tmp_path / "d", split="0.8,0.1,0.1")
    assert list(prepared.datasets) == ["train", "valid", "test"] and prepared.cut_documents == 0
    dealt = {name: _texts(info.prefix) for name, info in prepared.datasets.items()}
    assert sorted(sum(dealt.values(), [])) == sorted(texts)
    assert dealt["train"] == [text for text in texts if text in dealt["train"]]
    total = sum(info.bytes for info in prepared.datasets.values())
    assert total == sum(map(len, texts))
    for name, share in [("train", 0.8), ("valid", 0.1), ("test", 0.1)]:
        assert prepared.datasets[name].bytes == sum(map(len, dealt[name]))
        assert abs(prepared.datasets[name].bytes / total - share) < 0.02
    again = _prepare([folder], tmp_path / "e", split="80,10,10")
    assert _texts(again.datasets["valid"].prefix) == dealt["valid"]
    other = _prepare([folder], tmp_path / "f", split="80,10,10", seed=1)
    assert _texts(other.datasets["valid"].prefix) != dealt["valid"]


def test_split_cuts_a_lone_document_by_position(tmp_path):
    text = STORY * 20
    prepared = _prepare([_write(tmp_path / "a.txt", text)], tmp_path / "d", split="0.8,0.1,0.1")
    pieces = {name: _texts(info.prefix) for name, info in prepared.datasets.items()}
    assert "".join(pieces["train"] + pieces["valid"] + pieces["test"]) == text
    assert prepared.cut_documents == 1
    assert [info.bytes for info in prepared.datasets.values()] == [
        len(piece) for (piece,) in pieces.values()
    ]
    two = _prepare([tmp_path / "a.txt"], tmp_path / "e", split="3,1")
    assert list(two.datasets) == ["train", "valid"]
    with pytest.raises(ValueError, match="too few to give the valid data any"):
        _prepare([_write(tmp_path / "b.txt", "x")], tmp_path / "g", split="0.9,0.05,0.05")


def test_plan_split_shares():
    shares = parse_split("90,5,5")
    assert shares == [0.9, 0.05, 0.05] and parse_split("1") == [1, 0, 0]
    rng = np.random.RandomState(1)
    for count in (1, 2, 3, 10, 1000):
        lengths = (rng.pareto(1.1, count) * 1000 + 100).astype(int)
        splits = plan_split(lengths, shares, seed=count)
        covered = np.zeros(lengths.sum(), dtype=int)
        offsets = np.cumsum(lengths) - lengths
        for pieces, share in zip(splits, shares, strict=True):
            for piece in pieces:
                covered[offsets[piece.document] :][piece.start : piece.stop] += 1
            assert sum(p.stop - p.start for p in pieces) >= share / 2 * lengths.sum() - 1
        assert (covered == 1).all()
    for bad in ("0,1", "a", "1,-1", "1,1,1,1", "", "nan"):
        with pytest.raises(ValueError, match="--split"):
            parse_split(bad)


def test_printed_split_leaves_no_part_empty(tmp_path):
    for count in (*range(1, 3000), 12_345, 1_000_001):
        bounds = split_bounds(working_split(count), count)
        there = [bound for bound in bounds if bound is not None]
        assert len(there) == min(count, 3)
        assert all(start < stop for start, stop in there)
        assert [start for start, _ in there] + [count] == [0, *(stop for _, stop in there)]
    assert [working_split(count) for count in (1, 2, 3, 9, 200)] == [
        *("1,0,0", "1,1,0", "1,1,1", "7,1,1", "900,50,50")
    ]
    source = _write(tmp_path / "a.txt", "one\ntwo\nthree")
    prepared = _prepare([source], tmp_path / "d", documents="line")
    assert prepared.megatron_arguments()[-2:] == ["--split", "1,1,1"]
    prepared = _prepare([source], tmp_path / "e")
    assert prepared.megatron_arguments()[-2:] == ["--split", "1,0,0"]


def _gpt_config(prepared, blend, **options):
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    choice = encoders.TokenizerChoice(prepared.tokenizer_type, Path(prepared.tokenizer_model))
    return GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        tokenizer=encoders.build_megatron_tokenizer(choice),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **blend,
        **options,
    )


@pytest.mark.filterwarnings("ignore")
def test_megatron_reads_splits_and_blends(tmp_path, corpus):
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset

    folder, texts = corpus
    stories = _prepare([folder], tmp_path / "stories", split="0.8,0.1,0.1")
    digits = _prepare(
        [_write(tmp_path / "digits.txt", "0123456789" * 3000)], tmp_path / "digits", split="8,1,1"
    )

    def path(data, name):
        return data.datasets[name].prefix

    blend = {
        "blend_per_split": [
            ([path(stories, "train"), path(digits, "train")], [0.75, 0.25]),
            ([path(stories, "valid")], None),
            ([path(stories, "test")], None),
        ]
    }
    config = _gpt_config(stories, blend)
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [200, 8, 8], lambda: True, config)
    train, valid, test = builder.build()
    decode = config.tokenizer.detokenize
    stream = "<|endoftext|>".join(["", *texts, ""])
    from_digits = 0
    for sample in (train[i] for i in range(200)):
        text = decode(sample["tokens"].tolist())
        assert sample["labels"][:-1].tolist() == sample["tokens"][1:].tolist()
        parts = text.split("<|endoftext|>")
        if all(part in "0123456789" * 8 for part in parts):
            from_digits += 1
        else:
            assert all(part in stream for part in parts)
    assert from_digits == 50
    held_out = set(_texts(path(stories, "valid")))
    parts = decode(valid[0]["tokens"].tolist()).split("<|endoftext|>")
    assert all(any(part in text for text in held_out) for part in parts)
    assert len(test) >= 8

    single = _prepare([folder], tmp_path / "single")
    config = _gpt_config(
        single, {"blend": ([path(single, "all")], None)}, split=single.megatron_arguments()[-1]
    )
    built = BlendedMegatronDatasetBuilder(GPTDataset, [100, 5, 5], lambda: True, config).build()
    assert all(dataset is not None and len(dataset) >= 5 for dataset in built)


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory):
    """A Hugging Face BPE tokenizer with its own beginning- and end-of-text tokens."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([STORY] * 50, 320, special_tokens=["<s>", "</s>"], min_frequency=2)
    trained._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def test_hugging_face_tokenizer_ids_are_megatrons(tmp_path, corpus, bpe_folder):
    folder, texts = corpus
    prepared = _prepare([folder], tmp_path / "d", tokenizer=str(bpe_folder))
    choice = encoders.TokenizerChoice(prepared.tokenizer_type, Path(prepared.tokenizer_model))
    tokenizer = encoders.build_megatron_tokenizer(choice)
    assert prepared.tokenizer_type == "HuggingFaceTokenizer" and not prepared.byte_level
    assert (prepared.vocab_size, prepared.eod_id) == (tokenizer.vocab_size, tokenizer.eod)
    expected = [[*tokenizer.tokenize(text), tokenizer.eod] for text in texts]
    assert expected[0][0] == 0 and expected[0][-1] == 1  # <s> at the front, </s> at the end
    assert _documents(prepared.datasets["all"].prefix) == expected
    by_file = _prepare([folder], tmp_path / "e", tokenizer=str(bpe_folder / "tokenizer.json"))
    assert by_file.tokenizer_model == prepared.tokenizer_model


def test_documents_end_in_one_end_token_and_prompts_in_none(tmp_path, bpe_folder):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast.from_pretrained(bpe_folder)
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    plain.save_pretrained(tmp_path / "both")
    ids = plain("The whale", add_special_tokens=False).input_ids
    assert plain("The whale").input_ids == [0, *ids, 1]

    texts = ["The whale", "The whale</s>", "The whale</s></s>"]
    source = _write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": t}) for t in texts))
    for name in ("both", bpe_folder):
        prepared = _prepare(
            [source], tmp_path / "d", tokenizer=str(tmp_path / name), overwrite=True
        )
        assert _documents(prepared.datasets["all"].prefix) == [[0, *ids, 1]] * 3
        choice = encoders.TokenizerChoice(prepared.tokenizer_type, Path(prepared.tokenizer_model))
        tokenizer = encoders.build_megatron_tokenizer(choice)
        assert tokenize_prompt(tokenizer, "The whale") == [0, *ids]
        assert tokenize_prompt(tokenizer, "The whale</s>") == [0, *ids, 1]
        assert tokenize_prompt(tokenizer, "") == []

    numbers = SimpleNamespace(tokenize=lambda text: list(map(int, text.split())), eod=127)
    assert tokenize_prompt(numbers, "1 127") == [1, 127]  # as Megatron's NullTokenizer

    halves = _prepare(
        [_write(tmp_path / "b.txt", "The whale|The whale")],
        tmp_path / "s",
        tokenizer=str(tmp_path / "both"),
        split_sentences=True,
        sentence_splitter=lambda text: text.split("|"),
    )
    assert _documents(halves.datasets["all"].prefix) == [[0, *ids, 0, *ids, 1]]


def test_sentencepiece_ids_are_megatrons(tmp_path, corpus):
    import sentencepiece

    folder, texts = corpus
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    prepared = _prepare([folder], tmp_path / "d", tokenizer=str(tmp_path / "sp.model"))
    assert prepared.tokenizer_type == "GPTSentencePieceTokenizer"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    assert prepared.eod_id == processor.eos_id()
    assert prepared.vocab_size == processor.vocab_size()
    assert _documents(prepared.datasets["all"].prefix) == [
        [*processor.encode(text), processor.eos_id()] for text in texts
    ]


def test_tokenizer_errors(tmp_path, corpus, bpe_folder):
    folder, _ = corpus
    with pytest.raises(ValueError, match="--tokenizer 'gpt2': give the word byte"):
        _prepare([folder], tmp_path / "d", tokenizer="gpt2")
    with pytest.raises(ValueError, match="has no tokenizer_config.json"):
        _prepare([folder], tmp_path / "d", tokenizer=str(folder))
    (tmp_path / "x.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot load it"):
        _prepare([folder], tmp_path / "d", tokenizer=str(tmp_path / "x.model"))

    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((bpe_folder / "tokenizer.json").read_bytes())
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match="no end-of-sequence token .* --no-append-eod"):
        _prepare([folder], tmp_path / "d", tokenizer=str(bare))
    prepared = _prepare([folder], tmp_path / "d", tokenizer=str(bare), append_eod=False)
    assert prepared.eod_id is None

    damaged = write_byte_tokenizer(tmp_path / "damaged") / "tokenizer.json"
    values = json.loads(damaged.read_text())
    values["model"]["vocab"]["e"] = 2**31
    damaged.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="makes the token 2147483648, although it has 25[78]; "):
        _prepare([folder], tmp_path / "e", tokenizer=str(damaged.parent))


def test_sentences_become_sequences(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    punkt = PunktSentenceTokenizer(STORY * 10 + "Dr. Jones met Dr. Brown. Dr. Who left. " * 10)
    texts = [STORY, "One. Two.\n\nThree."]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in [*texts, "  "])
    source = _write(tmp_path / "a.jsonl", lines)
    for keep in (False, True):
        splitter = PunktSplitter(punkt=punkt, keep_newlines=keep)
        prepared = _prepare(
            [source],
            tmp_path / f"d{keep}",
            split_sentences=True,
            sentence_splitter=splitter,
            append_eod=False,
        )
        info = prepared.datasets["all"]
        assert info.prefix.endswith("_text_sentence") and info.documents == 2 + keep
        dataset = IndexedDataset(info.prefix)
        bounds = dataset.document_indices
        for place, text in enumerate(texts):
            sentences = [
                bytes(s.tolist()).decode() for s in dataset[bounds[place] : bounds[place + 1]]
            ]
            if keep:
                assert "".join(sentences) == text
                sentences = [sentence.rstrip() for sentence in sentences]
            assert sentences == punkt.tokenize(text) and len(sentences) >= 3
    split = _prepare(
        [source],
        tmp_path / "s",
        split_sentences=True,
        sentence_splitter=PunktSplitter(punkt=punkt),
        split="0.5,0.5",
    )
    assert sum(info.sequences for info in split.datasets.values()) >= 8
    assert sum(info.tokens for info in split.datasets.values()) == sum(
        len("".join(punkt.tokenize(text))) + 1 for text in texts
    )


def test_missing_sentence_model_names_the_download(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    with pytest.raises(ValueError, match="python -m nltk.downloader punkt_tab"):
        _prepare([corpus[0]], tmp_path / "d", split_sentences=True)


def test_output_does_not_depend_on_workers(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(encoders, "_BATCH_CHARACTERS", 500)
    for workers in (1, 3):
        _prepare([corpus[0]], tmp_path / str(workers) / "d", split="8,1,1", workers=workers)
    first, second = sorted((tmp_path / "1").glob("d_*")), sorted((tmp_path / "3").glob("d_*"))
    assert [file.name for file in first] == [file.name for file in second]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    bad = _write(tmp_path / "bad.jsonl", '{"text": "x"}\n' * 2000 + "{\n")
    with pytest.raises(ValueError, match="line 2001"):
        _prepare([bad], tmp_path / "d", workers=2)


def test_overwrite_replaces_what_the_earlier_run_wrote(tmp_path, corpus):
    folder, _ = corpus
    _prepare([folder], tmp_path / "d", split="8,1,1")
    files = set(tmp_path.glob("d_*"))
    with pytest.raises(FileExistsError, match="exists; choose another prefix, or pass --overwrite"):
        _prepare([folder], tmp_path / "d")
    _prepare([folder], tmp_path / "d", split="8,1,1", overwrite=True)
    assert set(tmp_path.glob("d_*")) == files
    _prepare([folder], tmp_path / "d", overwrite=True)
    names = {path.name for path in tmp_path.glob("d_*")}
    assert names == {"d_text_document.bin", "d_text_document.idx", "d_meta.json"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("where", ["tokenizing", "dealing out"])
def test_failed_run_leaves_nothing(tmp_path, corpus, monkeypatch, error, where):
    name, after = ("__call__", 100) if where == "tokenizing" else ("add", 290)
    owner = encoders.Encoder if where == "tokenizing" else prepare.IndexedWriter
    original, calls = getattr(owner, name), []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == after:
            raise error("in the middle")
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(error):
            _prepare([corpus[0]], tmp_path / "d", split="8,1,1")
    assert {path.name for path in tmp_path.iterdir()} == {"byte_tokenizer", "corpus"}
    assert _prepare([corpus[0]], tmp_path / "d", split="8,1,1").datasets["train"].documents


def _run_killed_before_the_indices_are_in_place(folder, prefix):
    rename = os.rename

    def dying(source, target):
        if str(source).endswith(".idx"):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.rename = dying
    _prepare([folder], prefix, split="8,1,1")


def test_killed_run_looks_unfinished_and_can_be_repeated(tmp_path, corpus):
    prefix = tmp_path / "d"
    process = multiprocessing.get_context("fork").Process(
        target=_run_killed_before_the_indices_are_in_place, args=(corpus[0], prefix)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not list(tmp_path.glob("d_*.idx")) and not metadata_path(prefix).exists()
    with pytest.raises(FileNotFoundError, match="no prepared data"):
        PreparedData.load(prefix)
    with pytest.raises(FileExistsError, match="--overwrite"):
        _prepare([corpus[0]], prefix, split="8,1,1")
    _prepare([corpus[0]], prefix, split="8,1,1", overwrite=True)
    assert not (tmp_path / "d.unfinished").exists()


def test_two_runs_cannot_write_one_prefix(tmp_path, corpus):
    with output_files.unfinished_folder(tmp_path / "d"):
        with pytest.raises(ValueError, match="d.unfinished, in which another process is at work"):
            _prepare([corpus[0]], tmp_path / "d")


def test_command_line(tmp_path, corpus, capsys):
    prefix = tmp_path / "d"
    words = ["prepare-data", str(corpus[0]), "--output-prefix", str(prefix)]
    words += ["--split", "0.8,0.1,0.1"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert shlex.join(PreparedData.load(prefix).megatron_arguments()) in out
    assert "tokenizing" in err
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    for wrong in (["--workers", "0"], ["--split", "x"], ["--max-bytes", "0"]):
        assert main([*words, "--overwrite", *wrong]) == 2
        assert wrong[0] in capsys.readouterr().err
    assert PreparedData.load(prefix).datasets["train"].documents  # still there


def _naive_losses(train, valid, vocab_size, eod_id):
    """The docstring's formulas, one token at a time."""
    unigrams, pairs = [0] * vocab_size, {}
    for document in train:
        context = eod_id
        for token in document:
            unigrams[token] += 1
            if context is not None:
                pairs.setdefault(context, []).append(token)
            context = token
    total, distinct = sum(unigrams), sum(count > 0 for count in unigrams)
    nats, count = np.zeros(2), 0
    for document in valid:
        context = eod_id
        for token in document:
            p_uni = (unigrams[token] + distinct / vocab_size) / (total + distinct)
            after = pairs.get(context, [])
            p_bi = p_uni
            if after:
                p_bi = (after.count(token) + len(set(after)) * p_uni) / (
                    len(after) + len(set(after))
                )
            nats -= np.log([p_uni, p_bi])
            count += 1
            context = token
    return nats / count


@pytest.mark.parametrize("eod_id", [None, 6])
@pytest.mark.parametrize("dense", [True, False])
def test_ngram_losses_equal_a_naive_loop(monkeypatch, eod_id, dense):
    monkeypatch.setattr(ngram, "_BLOCK", 16)
    if not dense:
        monkeypatch.setattr(ngram, "_DENSE_PAIRS", 0)
    rng = np.random.RandomState(3)
    train = [rng.randint(0, 5, size).astype(np.uint16) for size in (1, 40, 7, 0, 16, 33)]
    valid = [rng.randint(0, 7, size).astype(np.uint16) for size in (20, 1, 17)]
    losses = ngram.unigram_and_bigram_loss(iter(train), iter(valid), 7, eod_id)
    expected = _naive_losses([d.tolist() for d in train], [d.tolist() for d in valid], 7, eod_id)
    np.testing.assert_allclose([losses.unigram, losses.bigram], expected, rtol=1e-12)
    assert losses.tokens == 38
    with pytest.raises(ValueError, match="does not fit a vocabulary of 5"):
        ngram.unigram_and_bigram_loss(iter(train), iter(valid), 5, None)


def test_bigram_probabilities_sum_to_one():
    train = [np.array([0, 1, 2, 1, 0, 0, 3])]
    for context in range(5):
        total = 0.0
        for token in range(5):
            both = [np.array([context, token])]
            losses = ngram.unigram_and_bigram_loss(train, both, 5)
            first = ngram.unigram_and_bigram_loss(train, [np.array([context])], 5)
            total += np.exp(-(2 * losses.bigram - first.unigram))
        assert total == pytest.approx(1)


def test_ngram_losses_of_prepared_data(tmp_path, corpus):
    prepared = _prepare([corpus[0]], tmp_path / "d", split="8,1,1")
    losses = ngram.ngram_losses_of_prepared_data(tmp_path / "d")
    documents = {name: _documents(info.prefix) for name, info in prepared.datasets.items()}
    expected = _naive_losses(
        documents["train"], documents["valid"][:4], VOCAB_SIZE, END_OF_DOCUMENT_ID
    )
    some = ngram.unigram_and_bigram_loss(
        map(np.array, documents["train"]),
        map(np.array, documents["valid"][:4]),
        VOCAB_SIZE,
        END_OF_DOCUMENT_ID,
    )
    np.testing.assert_allclose([some.unigram, some.bigram], expected)
    assert losses.bigram < losses.unigram < np.log(VOCAB_SIZE)
    assert losses.tokens == prepared.datasets["valid"].tokens
