"""Bad input: one clear sentence, exit status 2, nothing left behind, the input untouched."""

import errno
import json
import pickle
import shutil

import pytest
import torch
from conversion_samples import contents, convert, hf_folder
from safetensors.torch import load_file, save_file

from megalodon_mcore import tensor_digest
from megalodon_mcore.conversion import safetensors_file, torch_dist_writer, torch_file

NAME = "swiglu-two-heads-rescale"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model in every format, by the format."""
    folder = tmp_path_factory.mktemp("good")
    hf_folder(folder / "hf", NAME)
    assert convert("hf", "mcore", folder / "hf", folder / "mcore") == 0
    assert convert("hf", "released", folder / "hf", folder / "released") == 0
    return {name: folder / name for name in ("hf", "mcore", "released")}


def refused(source, target, given, capsys, *options):
    """The sentence with which it is refused."""
    made, before = given.parent / "made", contents(given)
    capsys.readouterr()
    assert convert(source, target, given, made, *options) == 2
    assert not made.exists() and contents(given) == before
    assert not list(given.parent.glob(".made*"))
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("megalodon-mcore convert: ")
    return said


class Code:
    """What a pickle would run."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def data_files(source):
    return {
        "hf": "model.safetensors",
        "mcore": "release/__0_0.distcp",
        "released": "consolidated.pth",
    }[source]


@pytest.mark.parametrize("source", ["hf", "mcore", "released"])
@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_truncated(good, source, kept, tmp_path, capsys):
    given = shutil.copytree(good[source], tmp_path / "given")
    file = given / data_files(source)
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    target = "mcore" if source == "hf" else "hf"
    said = refused(source, target, given, capsys)
    assert file.name in said and ("damaged" in said or "truncated" in said)


def change_tensors(given, source, change):
    """Applies change(tensors by name) to a Hugging Face or a released checkpoint."""
    file = given / data_files(source)
    tensors = dict(load_file(file)) if source == "hf" else torch.load(file)
    change(tensors)
    if source == "hf":
        save_file(tensors, file, {"format": "pt"})
    else:
        torch.save(tensors, file)


WZ = {"hf": "model.layers.1.wz.weight", "released": "layers.1.mega.wz.weight"}


@pytest.mark.parametrize("source", ["hf", "released"])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("missing", "has no"),
        ("extra", "knows nothing"),
        ("shape", "has shape [8, 31]"),
        ("nan", "NaN or infinite"),
        ("infinite", "NaN or infinite"),
        ("integers", "floating point"),
    ],
)
def test_wrong_tensors(good, source, fault, expected, tmp_path, capsys):
    given = shutil.copytree(good[source], tmp_path / "given")

    def change(tensors):
        tensor = tensors[WZ[source]].clone()
        if fault == "missing":
            del tensors[WZ[source]]
            return
        if fault == "extra":
            tensors[WZ[source].replace("wz", "wq")] = tensor.clone()
        elif fault == "shape":
            tensor = tensor[:, :-1].contiguous()
        elif fault == "integers":
            tensor = tensor.long()
        else:
            tensor[3, 4] = {"nan": float("nan"), "infinite": -float("inf")}[fault]
        tensors[WZ[source]] = tensor

    change_tensors(given, source, change)
    said = refused(source, "mcore", given, capsys)
    assert expected in said and str(given) in said
    assert ".wq." in said if fault == "extra" else ".wz." in said


@pytest.mark.parametrize(
    ("source", "file", "values", "expected"),
    [
        ("hf", "config.json", {"hidden_size": 64}, "shape"),
        ("hf", "config.json", {"num_hidden_layers": 3}, "has no model.layers.2."),
        ("hf", "config.json", {"num_hidden_layers": 1}, "knows nothing"),
        ("hf", "config.json", {"swiglu": False}, "knows nothing"),
        ("hf", "config.json", {"num_attention_heads": 3}, "multiple"),
        ("hf", "config.json", {"hidden_size": "32"}, "hidden_size"),
        ("hf", "config.json", {"dtype": "int8"}, "dtype"),
        ("hf", "config.json", {"model_type": "llama"}, "is not"),
        ("released", "config.json", {"model": {}}, "does not say"),
        ("released", "config.json", {"model": 3}, "has no model"),
        ("released", "consolidate_config.json", {"model_parallel_size": 2}, "is missing"),
        ("released", "consolidate_config.json", {"dtype": "fp8"}, "dtype"),
        ("released", "consolidate_config.json", {"dtype": {}}, "has dtype {}"),
        ("hf", "config.json", {"dtype": ["float32"]}, "has dtype ['float32']"),
        ("hf", "config.json", {"num_hidden_layers": 10**6}, "num_layers is 1000000"),
        ("hf", "config.json", {"eos_token_id": []}, "has eos_token_id []"),
        ("hf", "config.json", {"hidden_dropout": "0.1"}, "hidden_dropout is 0.1"),
        ("hf", "config.json", {"attention_dropout": []}, "attention_dropout is []"),
        ("hf", "config.json", {"vocab_size": 10**30}, "vocab_size is 1000000"),
    ],
)
def test_a_configuration_that_lies(good, source, file, values, expected, tmp_path, capsys):
    given = shutil.copytree(good[source], tmp_path / "given")
    path = given / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    said = refused(source, "mcore", given, capsys)
    assert expected in said and str(given) in said


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("rope_base", 500.0, "rope.freqs"), ("share_emb", True, "ties"), ("num_heads", 4, "rope")],
)
def test_a_released_configuration_that_its_weights_contradict(
    good, name, value, expected, tmp_path, capsys
):
    given = shutil.copytree(good["released"], tmp_path / "given")
    values = json.loads((given / "config.json").read_text())
    values["model"][name] = value
    (given / "config.json").write_text(json.dumps(values))
    assert expected in refused("released", "hf", given, capsys)


@pytest.mark.parametrize("error", [IndexError(), EOFError(), TypeError("odd\nlines"), KeyError(3)])
def test_whatever_torch_says_of_a_file_is_one_sentence(good, error, tmp_path, capsys, monkeypatch):
    given = shutil.copytree(good["released"], tmp_path / "given")

    def load(*args, **options):
        raise error

    monkeypatch.setattr(torch, "load", load)
    assert "consolidated.pth is damaged: " in refused("released", "hf", given, capsys)


def test_an_index_that_names_no_files(good, tmp_path, capsys):
    given = shutil.copytree(good["hf"], tmp_path / "given")
    index = {"weight_map": {"lm_head.weight": {"a": 1}}}
    (given / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names {'a': 1}, no file beside it" in refused("hf", "mcore", given, capsys)


def test_a_tokenizer_of_another_kind_asks_nothing(good, tmp_path, capsys):
    """What may run code is refused; nobody is asked on standard input."""
    given = shutil.copytree(good["hf"], tmp_path / "given")
    (given / "tokenizer_config.json").write_text('{"tokenizer_class": "Unknown"}')
    assert "does not load: " in refused("hf", "mcore", given, capsys)


def test_no_json(good, tmp_path, capsys):
    given = shutil.copytree(good["hf"], tmp_path / "given")
    (given / "config.json").write_text('{"hidden_size": ')
    assert "no JSON" in refused("hf", "mcore", given, capsys)
    (given / "config.json").unlink()
    assert "config.json is missing" in refused("hf", "mcore", given, capsys)


@pytest.mark.parametrize("source", ["mcore", "mcore-object", "released", "hf"])
def test_code_in_a_pickle_does_not_run(good, source, tmp_path, capsys):
    kind = source.partition("-")[0]
    given = shutil.copytree(good[kind], tmp_path / "given")
    mark = tmp_path / "ran"
    if source == "mcore":
        (given / "release" / ".metadata").write_bytes(pickle.dumps(Code(mark)))
    elif source == "mcore-object":
        torch.save({"args": Code(mark)}, given / "release" / "common.pt")
    elif source == "released":
        torch.save({"embed.weight": Code(mark)}, given / "consolidated.pth")
    else:
        (given / "model.safetensors").unlink()
        torch.save({"lm_head.weight": Code(mark)}, given / "pytorch_model.bin")
    said = refused(kind, "released" if kind == "hf" else "hf", given, capsys)
    assert "nothing of it was run" in said
    assert not mark.exists()


@pytest.mark.parametrize("target", ["hf", "mcore", "released"])
def test_a_full_disk(good, target, tmp_path, capsys, monkeypatch):
    given = shutil.copytree(good["hf"], tmp_path / "given")
    written, full = [], 20

    def write(tensor):
        written.append(tensor)
        if len(written) > full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return tensor_digest.raw_bytes(tensor)

    monkeypatch.setattr(safetensors_file, "raw_bytes", write)
    monkeypatch.setattr(torch_file, "raw_bytes", write)
    save = torch.save

    def save_until_full(value, file, **options):
        if target == "mcore":
            write(torch.zeros(1))
        return save(value, file, **options)

    monkeypatch.setattr(torch_dist_writer.torch, "save", save_until_full)
    assert "the disk is full" in refused("hf", target, given, capsys)
    # It went on no further.
    assert len(written) == full + 1


def test_an_existing_folder(good, tmp_path, capsys):
    made = tmp_path / "made"
    assert convert("hf", "mcore", good["hf"], made) == 0
    before = contents(made)
    assert convert("hf", "released", good["hf"], made) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert contents(made) == before
    # One that fails leaves the old one.
    assert convert("hf", "released", good["released"], made, "--overwrite") == 2
    assert contents(made) == before
    assert convert("hf", "released", good["hf"], made, "--overwrite") == 0
    assert (made / "consolidated.pth").is_file() and not (made / "release").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"made"}


def test_overwrite_replaces_checkpoints_alone(good, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    assert convert("hf", "mcore", good["hf"], tmp_path / "notes", "--overwrite") == 2
    assert "is no checkpoint" in capsys.readouterr().err
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"
    for made in (good["hf"], good["hf"] / "inside", good["hf"].parent):
        assert convert("hf", "mcore", good["hf"], made, "--overwrite") == 2
        assert "overlap" in capsys.readouterr().err


def test_what_is_no_checkpoint(good, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no finished checkpoint" in refused("mcore", "hf", tmp_path / "empty", capsys)
    unfinished = shutil.copytree(good["mcore"], tmp_path / "unfinished")
    (unfinished / "release" / ".metadata").unlink()
    assert "no save was finished" in refused("mcore", "hf", unfinished, capsys)
    assert "iter_0000007" in refused("mcore", "hf", unfinished, capsys, "--iteration", 7)


@pytest.mark.parametrize("rank", ["mp_rank_00", "mp_rank_01_003"])
def test_another_format_of_megatrons_is_named(tmp_path, rank, capsys):
    folder = tmp_path / "given"
    (folder / "iter_0000004" / rank).mkdir(parents=True)
    torch.save({"args": None}, folder / "iter_0000004" / rank / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("4")
    said = refused("mcore", "hf", folder, capsys)
    assert "is of --ckpt-format torch and convert reads torch_dist" in said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--max-shard-size", "huge"), "--max-shard-size"),
        (("--max-shard-size", "0"), "--max-shard-size"),
        (("--vocab-size", "10"), "--vocab-size"),
        (("--tokenizer", "nowhere"), "nowhere"),
        (("--model-parallel-size", "4"), "--model-parallel-size is 4, which goes with --to rel"),
        (
            ("--make-vocab-size-divisible-by", "7"),
            "--make-vocab-size-divisible-by is 7, which goes with --to mcore alone",
        ),
    ],
)
def test_wrong_arguments(good, options, expected, tmp_path, capsys):
    given = shutil.copytree(good["hf"], tmp_path / "given")
    assert expected in refused("hf", "hf", given, capsys, *options)


@pytest.mark.parametrize(
    ("target", "option", "value"),
    [
        ("released", "--model-parallel-size", 3),
        ("released", "--model-parallel-size", 0),
        ("mcore", "--make-vocab-size-divisible-by", 0),
    ],
)
def test_sizes_that_do_not_fit(good, target, option, value, tmp_path, capsys):
    given = shutil.copytree(good["hf"], tmp_path / "given")
    assert option in refused("hf", target, given, capsys, option, value)
