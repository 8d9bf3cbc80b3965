"""Indexed datasets that are not whole are refused by name, before anything is built."""

from argparse import Namespace

import pytest

from megalodon_mcore.data.prepare import prepare_data
from megalodon_mcore.data.split_tokens import find_splits

DAMAGE = {
    "index cut short": (".idx", lambda data: data[:40]),
    "index of something else": (".idx", lambda data: b"text" * 20),
    "empty index": (".idx", lambda data: b""),
    "empty data": (".bin", lambda data: b""),
    "data cut short": (".bin", lambda data: data[:-7]),
}


def arguments(prefix):
    paths = ("data_args_path", "train_data_path", "valid_data_path", "test_data_path")
    paths += ("per_split_data_args_path",)
    return Namespace(
        mock_data=False,
        sft=False,
        data_path=[str(prefix)],
        split="1,1,1",
        **dict.fromkeys(paths),
    )


@pytest.mark.parametrize("damage", DAMAGE)
def test_is_refused(damage, tmp_path):
    for name in "abc":
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.txt").write_text(f"some text of {name}")
    prepare_data([tmp_path / "texts"], tmp_path / "data")
    prefix = tmp_path / "data_text_document"
    assert all(split.tokens[0] for split in find_splits(arguments(prefix)))
    end, change = DAMAGE[damage]
    file = prefix.with_suffix(end)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=f"--data-path names {prefix}, which cannot be read"):
        find_splits(arguments(prefix))
