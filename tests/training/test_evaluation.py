"""Data and evaluation: what works by default, and what is refused before the first step."""

import re
from argparse import Namespace

import pytest

from megalodon_mcore import evaluation, gpu_arguments, pretraining
from megalodon_mcore.data.prepare import prepare_data
from megalodon_mcore.data.split_tokens import find_splits
from training.runs import MODEL, PRETRAIN, SCHEDULE, launch, scalars, side_by_side, train

TRAIN = (*PRETRAIN, *MODEL, *SCHEDULE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prefixes of 1, 20 and 40 documents, and of one of three tokens."""
    folder = tmp_path_factory.mktemp("data")
    prefixes = {}
    for name, lines in (
        ("one", ["the whale dived " * 40]),
        ("twenty", [f"{number} whales dived" for number in range(20)]),
        ("forty", [f"{number} whales dived near the boat " * 4 for number in range(40)]),
        ("tiny", ["ab"]),
    ):
        (folder / f"{name}.txt").write_text("\n".join(lines))
        prepared = prepare_data(
            [folder / f"{name}.txt"], folder / name, documents="line", progress=False
        )
        prefixes[name] = prepared
    return prefixes


def arguments(data, **changes):
    """Megatron's validated arguments, as far as the data and evaluation go."""
    values = dict(
        **dict(mock_data=False, data_path=None, data_args_path=None, split=None, rank=0),
        **dict(train_data_path=None, valid_data_path=None, test_data_path=None),
        **dict(per_split_data_args_path=None, dataloader_type="single", skip_train=False),
        **dict(dataloader_fast_cache_load=False, seq_length=48, data_parallel_size=1),
        **dict(train_iters=4, train_samples=None, global_batch_size=4, micro_batch_size=2),
        **dict(eval_iters=1, eval_interval=2, start_eval_at_iter=None),
        **dict(eval_global_batch_size=4, eval_micro_batch_size=2),
        **dict(full_validation=False, multiple_validation_sets=False, validation_set_names=None),
        **dict(log_interval=1, tensorboard_log_interval=1, sft=False),
    )
    assert changes.keys() <= values.keys()
    for name, value in changes.items():
        if name.endswith("data_path") and value is not None:
            changes[name] = [
                data[word].datasets["all"].prefix if word in data else word for word in value
            ]
    return Namespace(**(values | changes))


WORKS = {
    "whole": dict(data_path=["forty"], split="900,50,50"),
    "train alone": dict(data_path=["one"], split="1,0,0", eval_iters=0),
    "no test": dict(data_path=["twenty"], split="9,1"),
    "blend": dict(data_path=["1", "forty", "2", "twenty"], split="8,1,1"),
    "apart": dict(train_data_path=["forty"], valid_data_path=["tiny"]),
    "unweighted": dict(data_path=["twenty", "forty", "one"], split="1,0,0", eval_iters=0),
    "sets": dict(
        train_data_path=["forty"],
        valid_data_path=["one", "forty", "twenty"],
        full_validation=True,
        multiple_validation_sets=True,
        validation_set_names=["a", "b", "c"],
    ),
    "one set of two": dict(
        train_data_path=["one"], valid_data_path=["tiny", "forty", "one"], full_validation=True
    ),
    "mock": dict(mock_data=True),
}
REFUSED = {
    "one document": (
        dict(data_path=["one"], split="900,50,50"),
        "--split is 900,50,50, which leaves the validation data none of the 1 sequences of .*one_te"
        "xt_document; take --split 1,0,0.",
    ),
    "twenty documents": (
        dict(data_path=["twenty"], split="99,1,0"),
        "--split is 99,1,0, which leaves the validation data none of the 20 .*--split 900,50,50.",
    ),
    "Megatron's own default": (
        dict(data_path=["twenty"], split="969, 30, 1"),
        "--split is 969, 30, 1, which leaves the test data none of the 20 sequences",
    ),
    "no evaluation": (dict(data_path=["one"], split="9,1", eval_iters=0), "the validation data"),
    "in a blend": (
        dict(data_path=["1", "forty", "1", "one"], split="8,1,1"),
        "none of the 1 sequences of .*one_text_document; take --split 1,0,0",
    ),
    "missing": (dict(data_path=["/no/where"], split="1"), "--data-path names /no/where, but /no/w"),
    "no data": ({}, "Neither --data-path nor --train-data-path is given"),
    "split twice": (
        dict(train_data_path=["one"], split="9,1", eval_iters=0),
        "--split is 9,1, but --train-data-path and",
    ),
    "no training data": (
        dict(data_path=["twenty"], split="0,1,1"),
        "--split is 0,1,1, which leaves no training data",
    ),
    "test without validation": (
        dict(data_path=["forty"], split="8,0,2"),
        "--eval-iters is 1, but --split is 8,0,2, which leaves no validation data; give it some, or"
        " take --eval-iters 0.",
    ),
    "sets in part": (
        dict(mock_data=True, multiple_validation_sets=True),
        "--multiple-validation-sets is set, .*; add --full-validation.",
    ),
    "names": (
        dict(mock_data=True, validation_set_names=["a"]),
        "--validation-set-names is a, but there is one set without --multiple-validation-sets",
    ),
    "too many names": (
        WORKS["sets"] | dict(validation_set_names=["a", "b"]),
        "--validation-set-names has 2 names and there are 3 validation sets",
    ),
    "whole and weighted": (
        dict(data_path=["1", "forty", "1", "twenty"], split="8,1,1", full_validation=True),
        "--data-path has weights, but --full-validation takes every sample once",
    ),
    "whole and endless": (
        dict(mock_data=True, full_validation=True),
        "--full-validation is set, but --mock-data is made as long as",
    ),
    "whole and short": (
        dict(train_data_path=["one"], valid_data_path=["tiny"], full_validation=True),
        "--full-validation takes samples of --seq-length 48 .*tiny_text_document has 3 tokens",
    ),
    "one of several sets short": (
        WORKS["sets"]
        | dict(valid_data_path=["one", "tiny", "forty"], validation_set_names=["a", "b", "c"]),
        "tiny_text_document has 3 tokens of validation data",
    ),
    "several without weights": (
        dict(data_path=["one", "tiny", "forty"], split="1", eval_iters=0, train_iters=1000),
        "--data-path has several datasets without weights, .*: [0-9]+ of training data, but 4000",
    ),
    "evaluation without weights": (
        dict(train_data_path=["one"], valid_data_path=["one", "tiny", "twenty"], eval_iters=9),
        "--valid-data-path has several datasets .* of validation data, but 108 are needed",
    ),
}


@pytest.fixture(autouse=True)
def untouched_megatron(monkeypatch):
    from megatron.training import training

    monkeypatch.setattr(training, "evaluate_and_print_results", training.evaluate_and_print_results)


@pytest.mark.parametrize("name", WORKS)
def test_data_that_works_passes(data, name):
    evaluation.prepare(arguments(data, **WORKS[name]))


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_fails_is_refused_by_name(data, name):
    changes, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence) as refusal:
        evaluation.prepare(arguments(data, **changes))
    assert re.fullmatch(r"[^\n]*[;,:] [^\n]*\.", str(refusal.value))


def test_tokens_are_counted_split_by_split(data):
    args = arguments(data, data_path=["forty"], split="900,50,50")
    whole = find_splits(arguments(data, data_path=["forty"], split="1"))[0].tokens[0]
    counts = [split.tokens[0] for split in find_splits(args)]
    assert sum(counts) == whole == data["forty"].datasets["all"].tokens
    assert counts[1] == sum(len(f"{n} whales dived near the boat ") * 4 + 1 for n in (36, 37))


def test_without_validation_data_nothing_is_evaluated_and_a_line_says_so(data, capsys):
    args = arguments(data, data_path=["one"], split="100,0,0", eval_iters=5, full_validation=True)
    evaluation.prepare(args)
    assert args.eval_iters == 0 and not args.full_validation
    assert "--split is 100,0,0, which leaves no validation data, so that" in capsys.readouterr().out


def test_evaluations_are_as_many_as_megatron_makes():
    args = arguments({}, mock_data=True, train_iters=10, eval_interval=2, eval_iters=3)
    for first, evaluations in ((None, 6), (4, 5), (5, 4), (11, 1)):
        args.start_eval_at_iter = first
        # What get_train_valid_test_num_samples has for it.
        theirs = max(0, 6 - (first or 0) // 2)
        _, built, test = evaluation.samples_to_build(args, [40, theirs * 12, 12])
        assert built >= evaluations * 12 and test == 12
    assert evaluation.samples_to_build(args, [40, None, 0]) == [40, None, 1]


@pytest.mark.parametrize("name", gpu_arguments.NEED_A_GPU)
def test_what_measures_a_gpu_needs_one(monkeypatch, name):
    args = Namespace(**{name: True}, use_pytorch_profiler=False)
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is set, which .* is none; "):
        gpu_arguments.check_gpu_arguments(args)
    if name == "profile":
        gpu_arguments.check_gpu_arguments(Namespace(profile=True, use_pytorch_profiler=True))
    monkeypatch.setattr(gpu_arguments, "count_gpus", lambda: 1)
    gpu_arguments.check_gpu_arguments(args)


def validation_losses(output):
    found = re.findall(r"validation(\S*) loss at (.*?) \| lm loss value: (\S+)", output)
    return {(where, which): float(value) for which, where, value in found}


def test_printed_arguments_train_and_evaluate(data, tmp_path):
    """One document trains alone; evaluation of all of a set has its every sample, and no interval
    means once, after training."""

    def run(name, *more):
        words = (*data[name].megatron_arguments(), *SCHEDULE[:-4], *more)
        folder = tmp_path / f"{name}{len(more)}"
        return train(folder, *MODEL, *words).output

    alone, whole, last, refused = side_by_side(
        lambda: run("one", "--eval-iters", "1", "--eval-interval", "2"),
        lambda: run("forty", "--eval-iters", "1", "--eval-interval", "4", "--full-validation"),
        lambda: run("forty", "--eval-iters", "1"),
        lambda: launch(*TRAIN, *data["one"].megatron_arguments(), "--log-straggler"),
    )
    assert validation_losses(alone) == {} and "so that nothing is evaluated." in alone
    losses = validation_losses(whole)
    assert list(losses) == [
        ("iteration 4", ""),
        ("iteration 6 on validation set", ""),
        ("iteration 6 on test set", ""),
    ]
    samples = (find_splits(arguments(data, **WORKS["whole"]))[1].tokens[0] - 1) // 48
    assert f"Evaluating iter {samples}/{samples}" in whole
    assert "Evaluating on 4 samples" in whole  # the test set's
    assert {where for where, _ in validation_losses(last)} == {
        "iteration 6 on validation set",
        "iteration 6 on test set",
    }
    assert refused.returncode and "iteration        1" not in refused.stdout
    assert "pretrain: --log-straggler is set, which reads GPUs'" in refused.stdout


@pytest.mark.slow
def test_full_validation_is_the_same_in_every_layout(data, tmp_path):
    common = (*data["forty"].megatron_arguments(), *SCHEDULE[:-4], "--full-validation")
    common += ("--num-layers", "3", "--eval-iters", "1", "--make-vocab-size-divisible-by")

    def run(vocabulary_multiple, *more, processes=1):
        words = (*PRETRAIN, *MODEL, *common, vocabulary_multiple, *more)
        result = launch(*words, processes=processes)
        assert result.returncode == 0, result.stdout[-8000:]
        return validation_losses(result.stdout)

    one = run("256", "--save", str(tmp_path / "saved"), "--save-interval", "100")
    load = ("--load", str(tmp_path / "saved"))
    tensor, stages = side_by_side(
        lambda: run("128", *load, "--tensor-model-parallel-size", "2", processes=2),
        lambda: run("256", *load, "--pipeline-model-parallel-size", "3", processes=3),
    )
    assert len(one) == 2
    assert tensor == pytest.approx(one, rel=1e-5) and stages == pytest.approx(one, rel=1e-5)


def test_tensorboard_keeps_what_comes_after_the_last_step(tmp_path, monkeypatch):
    from megatron.training import global_vars
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path, flush_secs=1000)
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", writer)
    for step in range(50):
        writer.add_scalar("lm loss", step / 2, step)
    pretraining.close_tensorboard()
    assert scalars(tmp_path, "lm loss") == {step: step / 2 for step in range(50)}
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", None)
    pretraining.close_tensorboard()
