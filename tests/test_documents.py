"""Where documents start: what bounds may be, and what a rank has of a row cut by documents."""

from itertools import pairwise

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from building import build, randomize
from megalodon_mcore.parallel.documents import Documents, document_bounds, partitioned_indices
from megalodon_mcore.parallel.sequence_layout import sequence_layout


class Group:
    """As much of a process group as is asked for its size."""

    def __init__(self, size):
        self.size = lambda: size


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def packed(*values, **fields):
    values = int32(*values) if values else None
    return PackedSeqParams(qkv_format="thd", **{"cu_seqlens_q": values} | fields)


def documents(params, cp_size=1):
    found = Documents()
    found.set(params, Group(cp_size))
    return found


def test_rows_are_documents_where_nothing_is_packed():
    assert documents(None).bounds(12, 3) == (0, 12)
    assert not documents(None).packed


TAKEN = {
    "one document": (int32(0, 12), (0, 12)),
    "several": (int32(0, 3, 4, 12), (0, 3, 4, 12)),
    "the length repeats at the end": (int32(0, 3, 12, 12, 12), (0, 3, 12)),
    "an empty document": (int32(0, 3, 3, 12), (0, 3, 12)),
    "a tail is one more document": (int32(0, 3, 7), (0, 3, 7, 12)),
    "an empty tail that repeats": (int32(0, 3, 3, 3), (0, 3, 12)),
    "nothing but a start": (int32(0), (0, 12)),
    "[1, n]": (int32(0, 3, 12)[None], (0, 3, 12)),
    "int64": (int32(0, 3, 12).long(), (0, 3, 12)),
}


@pytest.mark.parametrize("name", TAKEN)
def test_bounds_that_are_taken(name):
    given, expected = TAKEN[name]
    found = documents(packed(cu_seqlens_q=given))
    assert found.packed
    assert found.bounds(12, 1) == expected


def test_padded_bounds_come_before_those_without_padding():
    padded = packed(0, 3, 9, cu_seqlens_q_padded=int32(0, 4, 12))
    assert documents(padded).bounds(12, 1) == (0, 4, 12)
    assert documents(packed(cu_seqlens_q_padded=int32(0, 4, 12))).bounds(12, 1) == (0, 4, 12)


REFUSED = {
    "none": (None, "cu_seqlens_q and cu_seqlens_q_padded are None; one of them must hold"),
    "empty": (int32(), r"cu_seqlens is \[\]; it must start at 0"),
    "another start": (int32(1, 12), r"cu_seqlens is \[1, 12\]; it must start at 0 and never fall"),
    "a sentinel": (int32(0, 5, 12, -1, -1), r"\[0, 5, 12, -1, -1\]; it must start at 0"),
    "falling": (int32(0, 7, 5, 12), "it must start at 0 and never fall"),
    "long": (int32(*range(9), 3), r"\[0, 1, 2, 3, 4, 5, 6, 7, ...\]; it must start at 0"),
    "float": (torch.tensor([0.0, 12.0]), "cu_seqlens is torch.float32 of shape .2,.; it must be"),
    "bool": (torch.tensor([False, True]), "cu_seqlens is torch.bool of shape"),
    "scalar": (torch.tensor(0), r"cu_seqlens is torch.int64 of shape \(\); it must be"),
    "rows": (int32(0, 6, 0, 6).view(2, 2), r"of shape \(2, 2\); .* of shape \[n\] or \[1, n\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_bounds_are_named(name):
    given, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        documents(packed(cu_seqlens_q=given))


@pytest.mark.parametrize(("length", "batch"), [(11, 1), (12, 2)])
def test_bounds_beyond_the_row_are_named(length, batch):
    sentence = f"cu_seqlens ends at 12; for {length} positions in {batch} rows it must end at"
    with pytest.raises(ValueError, match=sentence):
        documents(packed(0, 12)).bounds(length, batch)


@pytest.mark.parametrize(
    ("fields", "size"), [(dict(local_cp_size=1), 1), (dict(cp_group=Group(4)), 4)]
)
def test_other_ranks_than_the_models_are_refused(fields, size):
    with pytest.raises(ValueError, match=f"cut over {size} ranks of its own .* is 2; leave out"):
        documents(packed(0, 12, **fields), cp_size=2)
    own = Group(2)
    found = Documents()
    found.set(packed(0, 12, local_cp_size=2, cp_group=own), own)
    assert found.bounds(12, 1) == (0, 12)


PARTITIONS = {
    (None, "contiguous"): "contiguous",
    (None, "document_zigzag"): "document_zigzag",
    ("zigzag", "zigzag"): "zigzag",
    ("zigzag", "document_zigzag"): "document_zigzag",
    ("zigzag", "contiguous"): "document_zigzag",
    ("contiguous", "zigzag"): "contiguous",
}


@pytest.mark.parametrize(("mode", "usual"), PARTITIONS)
def test_a_partition_mode_is_honoured(mode, usual):
    """As PackedSeqParams has it on Megatron-LM's dev branch."""
    given = packed(0, 4, 12)
    given.cp_partition_mode = mode
    assert documents(given).order(usual) == PARTITIONS[mode, usual]


def test_an_unknown_partition_mode_is_refused():
    given = packed(0, 4, 12)
    given.cp_partition_mode = "two_chunk"
    with pytest.raises(ValueError, match="cp_partition_mode is 'two_chunk'; Megalodon takes cont"):
        documents(given)


def test_plain_rows_may_come_with_a_partition_mode_alone():
    given = PackedSeqParams(qkv_format="sbhd")
    given.cp_partition_mode = "contiguous"
    found = documents(given)
    assert not found.packed
    assert found.bounds(12, 3) == (0, 12)
    assert found.order("zigzag") == "contiguous"


def test_rows_that_were_put_together_are_counted():
    assert documents(packed(0, 5, 12)).rows(12, 1) == 1
    assert documents(packed(0, 5, 12, tokens_per_sample=4)).rows(12, 1) == 3
    assert documents(packed(0, 5, 12, tokens_per_sample=4)).rows(4, 3) == 3
    assert documents(packed(0, 5, 12, tokens_per_sample=5)).rows(12, 1) == 1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_rank_has_the_n_th_and_the_n_th_last_part_of_every_document(size):
    bounds = [0, 2 * size, 2 * size, 8 * size, 10 * size]
    length = 14 * size
    held = []
    for rank in range(size):
        indices = partitioned_indices(int32(*bounds), length, size, rank)
        assert indices.dtype == torch.int32
        expected = []
        for start, stop in pairwise([*bounds, length]):
            parts = list(torch.arange(start, stop).chunk(2 * size)) if stop > start else []
            expected += [parts[rank], parts[-1 - rank]] if parts else []
        assert torch.equal(indices, torch.cat(expected).int())
        held.append(indices)
    assert torch.cat(held).sort()[0].tolist() == list(range(length))


@pytest.mark.parametrize(
    ("bounds", "length", "sentence"),
    [
        ((0, 3, 12), 12, "3 positions can't be cut into 4 equal parts"),
        ((0, 4, 12), 14, "2 positions can't be cut into 4 equal parts"),
        ((0, 4, 16), 12, "cu_seqlens ends at 16, but the row has 12 tokens"),
        ((4, 12), 12, "must start at 0"),
    ],
)
def test_documents_that_cannot_be_cut_are_named(bounds, length, sentence):
    with pytest.raises(ValueError, match=sentence):
        partitioned_indices(int32(*bounds), length, 2, 0)


def test_document_zigzag_of_layers_names_what_cannot_be_cut():
    with pytest.raises(ValueError, match="3 positions can't be cut into 4 equal parts"):
        sequence_layout("document_zigzag", 2, 1, document_bounds(int32(0, 3, 12)))


def test_megatron_cuts_conversations_without_transformer_engine(megatron):
    from megatron.core import parallel_state, utils

    import megalodon_mcore.spec  # noqa: F401

    bounds = int32(0, 4, 12)
    indices = utils.tex.thd_get_partitioned_indices(bounds, 12, 2, 1)
    assert torch.equal(indices, partitioned_indices(bounds, 12, 2, 1))
    group = parallel_state.get_context_parallel_group()
    tokens = torch.arange(12)[None]
    batch = {"tokens": tokens, "cu_seqlens": bounds[None], "cu_seqlens_padded": None}
    cut = utils.get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    assert torch.equal(cut["tokens"], tokens)


def test_a_packed_row_has_the_losses_of_its_documents_alone(megatron):
    model, _ = build(own=dict(chunk_size=8, norm_num_groups=4), heads=2)
    randomize(model)
    bounds, length = (0, 3, 4, 20), 29
    tokens, labels = torch.randint(64, (2, 1, length))
    losses = model(tokens, None, None, labels=labels, packed_seq_params=packed(*bounds))
    alone = [
        model(tokens[:, start:stop], None, None, labels=labels[:, start:stop])
        for start, stop in pairwise((*bounds, length))
    ]
    assert torch.allclose(losses, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)
    sums = torch.stack([each.sum() for each in alone])
    assert losses.mean().item() == pytest.approx((sums.sum() / length).item(), rel=1e-6)


def test_no_target_is_another_documents_first_token():
    from megalodon_mcore.pretraining import mask_across_documents

    mask = torch.ones(2, 6)
    mask[0, 0] = 0
    sample = {
        "loss_mask": mask,
        "tokens": torch.tensor([[1, 2, 9, 1, 1, 1], [1, 9, 1, 1, 1, 9]]),
        "cu_seqlens": int32(0, 3, 6, 6, 6, 6, 6, 0, 2, 5, 6, 6, 6, 6).view(2, 7),
    }
    found = mask_across_documents(sample, end=9)
    assert found.tolist() == [[0, 1, 0, 1, 1, 1], [1, 0, 1, 1, 0, 0]]
    # Without an end token nothing is known of what follows the row.
    assert mask_across_documents(sample, end=None).tolist()[1] == [1, 0, 1, 1, 0, 1]
    assert mask.sum() == 11


@pytest.mark.transformer_engine
@pytest.mark.skipif(not torch.version.cuda or not torch.cuda.is_available(), reason="needs a GPU")
def test_indices_are_those_of_transformer_engine():
    tex = pytest.importorskip("transformer_engine_torch")
    bounds = int32(0, 8, 40, 64).cuda()
    for rank in range(4):
        theirs = tex.thd_get_partitioned_indices(bounds, 64, 4, rank)
        assert torch.equal(partitioned_indices(bounds, 64, 4, rank), theirs)
