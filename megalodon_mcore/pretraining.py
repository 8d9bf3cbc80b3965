"""Trains Megalodon in Megatron's own loop, from the megatron-core wheel alone.

The repository's root scripts are not in the wheel; this module stands where pretrain_gpt.py does:
it gives Megatron's `pretrain` a batch, a loss and datasets.
"""

from __future__ import annotations

import functools
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalodon_mcore import checkpoint_errors, checkpoint_tokenizer, missing_kernels, packed_data
from megalodon_mcore.argument_values import (
    in_one_sentence,
    read_sequences_per_dataset,
)
from megalodon_mcore.packed_data import FIM_TOKENS
from megalodon_mcore.parallel.sequence_layout import DOCUMENT_ZIGZAG
from megalodon_mcore.pretrain_arguments import (
    check_model,
    check_run,
    model_config_from_arguments,
    parse_arguments,
)

SEQUENCE_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
BATCH_KEYS = (*SEQUENCE_KEYS, "attention_mask")
DOCUMENT_KEYS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")


def main(argv: list[str]) -> None:
    """Runs `pretrain` with these command-line arguments, on the GPU or, without one, the CPU.

    Raises:
        SystemExit: the arguments are wrong (2) or Megatron exits by itself.
    """
    missing_kernels.say_on_a_gpu()
    set_up(argv)
    run()


def set_up(argv: list[str]) -> None:
    """Makes this process one that Megatron can begin in, with these arguments."""
    from megalodon_mcore import child_processes, cpu

    child_processes.end_with_parent()
    cpu.install()
    prepare_megatron()
    stand_alone_environment()
    # Megatron reads its arguments from here and nowhere else.
    sys.argv = [sys.argv[0], *argv]


def prepare_megatron() -> None:
    """Keeps Megatron from compiling the dataset helpers that its wheel ships compiled."""
    from megatron.core.datasets import utils as dataset_utils

    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        return
    dataset_utils.compile_helpers = lambda: None


def stand_alone_environment() -> None:
    """Gives torch.distributed what torchrun would, for a single process started without it."""
    if "RANK" in os.environ:
        return
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        # Any that is free when it is needed.
        "MASTER_PORT": "0",
    }.items():
        os.environ.setdefault(name, value)


def run() -> None:
    """Parses sys.argv as Megatron does and trains."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megalodon_mcore import megatron_fixes

    try:
        args = parse_arguments()
        check_run(args)
        with in_one_sentence():
            model_config = model_config_from_arguments(args)
    except ValueError as error:
        raise SystemExit(f"megalodon-mcore pretrain: {error}") from None
    check_model(model_config)
    # It may be that the spec was imported first.
    megatron_fixes.write_trackers_whole()
    keep_tokenizer(args)
    checkpoint_errors.load_in_one_sentence(training, lambda *_, **__: args)
    if args.save:
        training.save_checkpoint_and_time = after_tensorboard(training.save_checkpoint_and_time)
    else:
        training.save_checkpoint_and_time = say_why_training_ends
    datasets_provider.is_distributed = True
    try:
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
            get_embedding_ranks=get_embedding_ranks,
        )
    except checkpoint_errors.CheckpointError as error:
        raise SystemExit(f"megalodon-mcore pretrain: {error}") from None
    finally:
        close_tensorboard()


def after_tensorboard(save: Callable) -> Callable:
    """Megatron's saving, once TensorBoard has written all steps of the checkpoint.

    Else a run that is killed would go on after steps of which nothing was ever written.
    """
    from megatron.training import get_tensorboard_writer

    @functools.wraps(save)
    def flush_and_save(*arguments: Any, **options: Any) -> Any:
        if (writer := get_tensorboard_writer()) is not None:
            writer.flush()
        return save(*arguments, **options)

    return flush_and_save


def close_tensorboard() -> None:
    """Writes what TensorBoard was told after the last step, which Megatron leaves to a thread."""
    from megatron.training import get_tensorboard_writer

    if (writer := get_tensorboard_writer()) is not None:
        writer.close()


def say_why_training_ends(iteration: int, *_: Any, **__: Any) -> None:
    """Stands for saving where there is no --save: Megatron then saves only after a bad loss.

    Raises:
        SystemExit: always.
    """
    raise SystemExit(
        f"megalodon-mcore pretrain: the loss of iteration {iteration + 1} was no finite number, "
        "as said above; a lower --lr or --clip-grad may help, and with --save the state would be "
        "kept."
    )


def keep_tokenizer(args: Namespace) -> None:
    """Puts the tokenizer beside the checkpoints that this run saves."""
    tokenizer = Path(str(args.tokenizer_model))
    if args.save and os.environ["RANK"] == "0" and args.tokenizer_model and tokenizer.exists():
        checkpoint_tokenizer.keep_with_checkpoints(Path(args.save), tokenizer)


def forward_step(data_iterator: Iterator, model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Megatron's forward step: token losses [batch, length] and the function that sums them."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args, get_timers

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    args = get_args()
    batch = get_batch(
        data_iterator,
        get_attr_wrapped_model(model, "vp_stage"),
        args.micro_batch_size if model.training else args.eval_micro_batch_size,
    )
    timers("batch-generator").stop()
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed_sequence_parameters(batch, args),
    )
    return losses, partial(sum_losses, batch["loss_mask"])


def get_batch(
    data_iterator: Iterator, vp_stage: int | None, micro_batch_size: int
) -> dict[str, Any]:
    """The next micro-batch on the stages that need it; tensors are [batch, length].

    Packed rows are put together into one, [1, batch * length], and every stage gets its bounds.
    """
    from megatron.core import mpu
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
    from megatron.core.utils import (
        flatten_batch_for_packed_sequences,
        get_batch_on_this_cp_rank,
        get_batch_on_this_tp_rank,
    )
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    args = get_args()
    is_packed = packed_data.is_packed(args)
    predicts = mtp_on_this_rank(
        args.pipeline_model_parallel_layout, args.mtp_num_layers, False, vp_stage
    )
    is_at_an_end = is_first_or_last_pipeline_stage(vp_stage) or predicts
    if not (is_at_an_end or is_packed):
        return dict.fromkeys(BATCH_KEYS)
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        if is_packed:
            sample = sample | {"loss_mask": mask_across_documents(sample, end_of_document(args))}
        batch = {
            key: sample[key].cuda(non_blocking=True) if sample.get(key) is not None else None
            for key in (*BATCH_KEYS, *DOCUMENT_KEYS)
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=is_packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=predicts,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if not is_at_an_end:
        return batch | dict.fromkeys(BATCH_KEYS)
    cp_group = mpu.get_context_parallel_group()
    if args.megalodon_sequence_order == "contiguous":
        return contiguous_share(batch, cp_group.rank(), cp_group.size())
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=cp_group,
        use_per_sequence_balancing=args.megalodon_sequence_order != DOCUMENT_ZIGZAG,
    )


def mask_across_documents(sample: dict[str, Tensor], end: int | None) -> Tensor:
    """The loss mask [batch, length] without the targets that are another document's first token.

    Args:
        sample: packed rows, whose cu_seqlens [batch, length + 1] repeat the length at the end.
        end: the token that ends documents, by which one is known to end with its row.
    """
    mask, bounds = sample["loss_mask"].clone(), sample["cu_seqlens"]
    rows, places = torch.nonzero((bounds > 0) & (bounds < mask.shape[1]), as_tuple=True)
    mask[rows, bounds[rows, places].long() - 1] = 0
    if end is not None:
        mask[:, -1] *= sample["tokens"][:, -1] != end
    return mask


def end_of_document(args: Namespace) -> int | None:
    """The token that Megatron's datasets find the end of a document by; none of conversations."""
    from megatron.training import get_tokenizer

    return None if args.packs_conversations else get_tokenizer().eod


def packed_sequence_parameters(batch: dict[str, Any], args: Namespace) -> Any | None:
    """Megatron's PackedSeqParams of a micro-batch, or None where rows are documents."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.training.training import update_seqlen_stats_from_cu_seqlens

    if batch.get("cu_seqlens") is None:
        return None
    bounds = batch["cu_seqlens"].squeeze(0)
    # By these Megatron counts the operations that --log-throughput reports.
    update_seqlen_stats_from_cu_seqlens(bounds)
    # What GPTModel makes with --position-embedding-type rope, used or not, is this long.
    longest = int(batch["max_seqlen"])
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=args.seq_length,
    )
    if hasattr(packed, "cp_partition_mode"):
        # In Megatron-LM's dev branch. The model has the order already, and it is one of three.
        packed.cp_partition_mode = None
    return packed


def contiguous_share(
    batch: dict[str, Tensor | None], rank: int, size: int
) -> dict[str, Tensor | None]:
    """The rank-th of `size` equal parts of [batch, length] tensors, and of queries in a mask."""
    return {
        key: value.chunk(size, dim=2 if key == "attention_mask" else 1)[rank].contiguous()
        if isinstance(value, Tensor) and key in BATCH_KEYS
        else value
        for key, value in batch.items()
    }


def sum_losses(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The summed loss, the number of tokens in it, and both for the log."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    num_tokens = mask.sum().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for is_bad, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=is_bad,
                message=f"the loss of this micro-batch is {name}",
                tolerance=0.0,
                fatal=True,
            )
    report = torch.cat([loss.detach().view(1), num_tokens.detach().view(1).float()])
    return loss * weight_among_shares(num_tokens), num_tokens, {"lm loss": report}


def weight_among_shares(num_tokens: Tensor) -> Tensor | float:
    """The factor that makes the mean of context-parallel ranks' mean losses that over all tokens.

    Megatron divides each rank's loss by that rank's tokens, of which masks may leave fewer on one
    than on another; with --calculate-per-token-loss it divides by everybody's.
    """
    from megatron.core import mpu
    from megatron.training import get_args

    size = mpu.get_context_parallel_world_size()
    if size == 1 or get_args().calculate_per_token_loss:
        return 1.0
    everybodys = num_tokens.clone()
    torch.distributed.all_reduce(everybodys, group=mpu.get_context_parallel_group())
    return num_tokens.clamp(min=1) * size / everybodys.clamp(min=1)


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> Sequence[Any]:
    """Megatron's GPT datasets for train, validation and test."""
    from megatron.core import mpu
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args
    from megatron.training.utils import (
        get_blend_and_blend_per_split,
        is_first_or_last_pipeline_stage,
    )

    from megalodon_mcore.evaluation import samples_to_build

    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    kind, kind_of_config, own_values = dataset_kind(args)
    config = kind_of_config(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.validation_sets_apart,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=read_sequences_per_dataset(args.per_dataset_sequences_path),
        inter_document_masking=args.dataloader_inter_document_masking,
        **own_values,
    )

    def is_needed_here() -> bool:
        stage = packed_data.is_packed(args) or is_first_or_last_pipeline_stage(vp_stage)
        return mpu.get_tensor_model_parallel_rank() == 0 and stage

    return BlendedMegatronDatasetBuilder(
        kind,
        samples_to_build(args, num_samples),
        is_needed_here,
        config,
    ).build()


def dataset_kind(args: Namespace) -> tuple[type, type, dict[str, Any]]:
    """Megatron's dataset, its configuration and the values that the latter has of its own."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
    from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
    from megatron.training.datasets.sft_dataset import SFTDataset

    from megalodon_mcore import megatron_fixes

    if args.sft:
        megatron_fixes.count_conversations()
        return SFTDataset, GPTDatasetConfig, {}
    if not args.fim_data:
        return MockGPTDataset if args.mock_data else GPTDataset, GPTDatasetConfig, {}
    tokens = {name: getattr(args, f"fim_{name}_token") for name in FIM_TOKENS}
    values = ("rate", "spm_rate", "split_sample", "fragment_rate", "no_prefix")
    values = {f"fim_{name}": getattr(args, f"fim_{name}") for name in values}
    return GPTFIMDataset, GPTFIMDatasetConfig, values | {"fim_extra_tokens": tokens}


def get_embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """The pipeline ranks that hold the embedding: the first, and the last where it is tied or
    predicts further tokens."""
    from megatron.training import get_args

    args = get_args()
    only_first = args.untie_embeddings_and_output_weights and not args.mtp_num_layers
    if len(pp_ranks) == 1 or only_first:
        return [pp_ranks[0]]
    return [pp_ranks[0], pp_ranks[-1]]
