"""No argument of Megatron's parser is ignored: the census is whole, and refuses what it says."""

import sys
from argparse import ArgumentParser, Namespace

import pytest

import honoured_options
from megalodon_mcore import options, packed_data, pretrain_arguments


def parser():
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(ArgumentParser(allow_abbrev=False))


PLACES = {
    "Megatron": honoured_options.BY_MEGATRON,
    "Megalodon": honoured_options.BY_MEGALODON,
    "without effect": honoured_options.WITHOUT_EFFECT,
}
REFUSALS = options.refusals_of_pretrain()


def test_every_argument_has_one_place():
    """A missing name is new in Megatron: it belongs in options.py or honoured_options.py."""
    names = {action.dest for action in parser()._actions} - {"help"}
    for name in names:
        found = [place for place, placed in PLACES.items() if name in placed]
        found += ["refused"] * (options.reason_in(REFUSALS, name) is not None)
        assert len(found) == 1, (name, found)


def test_every_refused_argument_is_refused_by_the_name_it_is_written_with():
    known = parser()
    defaults = known.parse_args([])
    options.check_arguments(defaults, known, REFUSALS)
    for action in known._actions:
        if options.reason_in(REFUSALS, action.dest) is None:
            continue
        before = getattr(defaults, action.dest)
        setattr(defaults, action.dest, "another value")
        options_of_it = [z.option_strings[-1] for z in known._actions if z.dest == action.dest]
        with pytest.raises(ValueError, match=f"^({'|'.join(options_of_it)}) is another value.*"):
            options.check_arguments(defaults, known, REFUSALS)
        setattr(defaults, action.dest, before)


TINY = (
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "2"),
    *("--seq-length", "48", "--max-position-embeddings", "48", "--micro-batch-size", "2"),
    *("--train-iters", "4", "--lr", "1e-3", "--mock-data", "--tokenizer-type", "NullTokenizer"),
    *("--vocab-size", "127"),
)
REFUSED = [
    *("--squared-relu", "--openai-gelu", "--quick-geglu", "--add-qkv-bias", "--window-size 8,0"),
    *("--rotary-percent 0.5", "--kv-channels 8", "--apply-layernorm-1p", "--init-method-std 0.5"),
    *("--normalization LayerNorm", "--attention-output-gate", "--rotary-interleaved"),
    *("--apply-residual-connection-post-layernorm", "--hybrid-context-parallel"),
    *("--rampup-batch-size 2 2 8", "--freeze-all-layers", "--img-h 7"),
    *("--moe-router-topk 4", "--attention-backend fused", "--yaml-cfg file"),
]


@pytest.mark.parametrize("text", REFUSED)
def test_pretrain_refuses(text, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain", *TINY, *text.split()])
    with pytest.raises(SystemExit, match=f"pretrain: {text.split()[0]} is .*leave it out"):
        pretrain_arguments.parse_arguments()


@pytest.mark.parametrize("text", ["--reset-position-ids", "--reset-attention-mask"])
def test_masks_of_documents_are_refused_with_the_option_that_will_do(text, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain", *TINY, text])
    with pytest.raises(SystemExit, match=f"{text} is set.*--dataloader-inter-document-masking"):
        pretrain_arguments.parse_arguments()


def test_masks_of_documents_are_taken_where_documents_are_apart_anyway(stock_arguments):
    masks = ("--reset-position-ids", "--reset-attention-mask")
    options.check_megatron_arguments(stock_arguments(*masks, "--dataloader-inter-document-masking"))


TOGETHER = {
    "masking": ({"sft": True, "dataloader_inter_document_masking": True}, "is set with --sft, whi"),
    "mock": ({"sft": True, "mock_data": True}, "--mock-data is set with --sft, which reads conv"),
    "tokenizer": ({"sft": True, "tokenizer_type": "NullTokenizer"}, "--tokenizer-type is NullTok"),
    "masks": (
        {"sft": True, "create_attention_mask_in_dataloader": True},
        "--sft makes no attention masks; add --no-create-attention-mask-in-dataloader.",
    ),
    "fim": ({"sft": True, "fim_data": True}, "--fim-data is set with --sft, but"),
    "fim in documents": (
        {"dataloader_inter_document_masking": True, "fim_data": True},
        "--fim-data is set with --dataloader-inter-document-masking, but",
    ),
    "order": (
        {"dataloader_inter_document_masking": True},
        "--megalodon-sequence-order is document_zigzag, which cuts every document into 4 equal",
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_packed_data_that_does_not_go_together_is_refused(name):
    values = dict(
        **dict(sft=False, dataloader_inter_document_masking=False, fim_data=False),
        **dict(mock_data=False, tokenizer_type="SFTTokenizer", context_parallel_size=2),
        **dict(create_attention_mask_in_dataloader=False, megalodon_sequence_order=None),
    )
    changes, sentence = TOGETHER[name]
    packed_data.check(Namespace(**values | {"sft": True}), "document_zigzag")
    with pytest.raises(ValueError, match=sentence):
        packed_data.check(Namespace(**values | changes), "document_zigzag")


def test_stages_that_megatrons_script_leaves_without_documents_are_refused():
    values = dict(
        **dict(sft=False, dataloader_inter_document_masking=True, fim_data=False),
        **dict(context_parallel_size=1, pipeline_model_parallel_size=3),
        **dict(virtual_pipeline_model_parallel_size=None),
    )
    with pytest.raises(ValueError, match="--pipeline-model-parallel-size is 3, but Megatron's scr"):
        packed_data.check(Namespace(**values), "zigzag")
    packed_data.check(Namespace(**values, megalodon_sequence_order="zigzag"), "zigzag")


def test_shares_of_the_loss_that_weigh_unequally_are_told_once(caplog):
    values = dict(
        **dict(sft=False, dataloader_inter_document_masking=True, fim_data=False),
        **dict(context_parallel_size=2, eod_mask_loss=True, calculate_per_token_loss=False),
        **dict(pipeline_model_parallel_size=1, virtual_pipeline_model_parallel_size=None),
    )
    for _ in range(2):
        packed_data.check(Namespace(**values), "zigzag")
    (line,) = caplog.messages
    assert line.startswith("--eod-mask-loss masks tokens, and Megatron divides")
    packed_data.check(Namespace(**values | {"calculate_per_token_loss": True}), "zigzag")
    assert caplog.messages == [line]


@pytest.fixture
def stock_arguments(monkeypatch):
    """Arguments as Megatron's own script has parsed and validated them."""
    from megatron.training.arguments import parse_args, validate_args

    from megalodon_mcore import cpu

    stand_in = cpu.install()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)

    def parse(*given):
        fixed = ("--transformer-impl", "local", "--position-embedding-type", "none")
        fusions = ("--no-gradient-accumulation-fusion", "--no-persist-layer-norm")
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *TINY, *fixed, *fusions, *given])
        arguments = parse_args()
        validate_args(arguments)
        return arguments

    yield parse
    stand_in.undo()


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("--swiglu", "--bf16", "--normalization", "RMSNorm", "--disable-bias-linear"),
        ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
        ("--no-masked-softmax-fusion", "--no-bias-swiglu-fusion", "--no-rope-fusion"),
        ("--recompute-activations", "--untie-embeddings-and-output-weights"),
    ],
)
def test_megatrons_script_may_ask_for_what_it_does(given, stock_arguments):
    options.check_megatron_arguments(stock_arguments(*given))


@pytest.mark.parametrize(
    "option", ["--openai-gelu", "--rotary-interleaved", "--reset-position-ids"]
)
def test_megatrons_script_is_refused_what_it_does_not(option, stock_arguments):
    with pytest.raises(ValueError, match=option):
        options.check_megatron_arguments(stock_arguments(option))
