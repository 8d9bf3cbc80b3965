"""A few steps of training with Megatron's own pieces, in the ranks of one layout."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from building import randomize
from distributed import checkpoints
from distributed.batches import micro_batches, number_of_micro_batches
from distributed.gradients import Shard, gradient_shards
from distributed.layouts import Layout, Model, build_chunk, configuration


@dataclass
class Run:
    """What one rank saw. Losses and norms are global and one per step."""

    losses: list[float]
    gradient_norms: list[float]
    first_gradients: list[Shard]


def save_randomized(model: Model, folder: Path) -> None:
    """Writes, from one process, the parameters that every layout starts from.

    They are numbers that bf16 has, so that a bf16 model starts from the same ones.
    """
    set_up(Layout())
    chunk = build_chunk(model, Layout(), configuration(model, Layout()))
    randomize(chunk)
    for parameter in chunk.parameters():
        parameter.data = parameter.data.bfloat16().float()
    checkpoints.save(folder, [chunk], None, step=0)


def train(
    model: Model,
    layout: Layout,
    start: Path,
    steps: int = 3,
    resume: bool = False,
    save: Path | None = None,
) -> Run:
    """Trains from a checkpoint's parameters or, resuming, from its optimizer's state as well."""
    set_up(layout)
    chunks = build_chunks(model, layout)
    optimizer = build_optimizer(model, layout, chunks)
    first = checkpoints.load(start, chunks, optimizer if resume else None)
    if not resume:
        optimizer.reload_model_params()
    run = Run([], [], [])
    for step in range(first, first + steps):
        losses = forward_backward(model, layout, chunks, optimizer, step)
        if step == first:
            run.first_gradients = gradient_shards(chunks)
        updated, gradient_norm, _ = optimizer.step()
        assert updated
        if layout.distributed_optimizer and step == first:
            for chunk in chunks:
                chunk.enable_forward_pre_hook()
        run.losses.append(mean_loss(losses))
        run.gradient_norms.append(float(gradient_norm))
    if save is not None:
        for chunk in chunks if layout.distributed_optimizer else []:
            chunk.disable_forward_pre_hook()
        checkpoints.save(save, chunks, optimizer, first + steps)
    return run


def set_up(layout: Layout) -> None:
    """Process groups and random states."""
    parallel_state.initialize_model_parallel(**layout.groups())
    torch.manual_seed(1234)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def build_chunks(model: Model, layout: Layout) -> list[nn.Module]:
    """The rank's stages, wrapped for data parallelism as Megatron's get_model does."""
    config = configuration(model, layout)
    stages = range(config.virtual_pipeline_model_parallel_size or 1)
    chunks = []
    for stage in stages:
        vp_stage = stage if len(stages) > 1 else None
        ends = {"ignore_virtual": False, "vp_stage": vp_stage}
        chunk = build_chunk(
            model,
            layout,
            config,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            vp_stage=vp_stage,
        )
        chunk.model_type = ModelType.encoder_or_decoder
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        chunks.append(Float16Module(config, chunk) if model.bf16 else chunk)
    overlap = layout.distributed_optimizer
    return [
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=overlap,
                overlap_param_gather=overlap,
                use_distributed_optimizer=layout.distributed_optimizer,
                bucket_size=layout.bucket_size,
            ),
            chunk,
            disable_bucketing=stage > 0,
        )
        for stage, chunk in enumerate(chunks)
    ]


def build_optimizer(model: Model, layout: Layout, chunks: list[nn.Module]) -> MegatronOptimizer:
    """The optimizer, and the hooks that Megatron's train() hangs on the configuration."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=model.optimizer,
            muon_tp_mode="duplicated",
            # Its usual "medium" rounds to bf16 on some CPUs.
            muon_fp32_matmul_prec="highest",
            lr=1e-3,
            weight_decay=0.1,
            clip_grad=model.clip_grad,
            bf16=model.bf16,
            params_dtype=torch.bfloat16 if model.bf16 else torch.float32,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=layout.distributed_optimizer,
        ),
        chunks,
    )
    config: TransformerConfig = get_model_config(chunks[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if layout.distributed_optimizer:
        hooks = [chunk.no_sync for chunk in chunks], [chunk.start_grad_sync for chunk in chunks]
        config.no_sync_func, config.grad_sync_func = (
            hook[0] if len(chunks) == 1 else hook for hook in hooks
        )
        for chunk in chunks:
            # Parameters are gathered from the first update on.
            chunk.disable_forward_pre_hook(param_sync=False)
    return optimizer


def forward_backward(
    model: Model,
    layout: Layout,
    chunks: list[nn.Module],
    optimizer: MegatronOptimizer,
    step: int,
) -> list[dict[str, Tensor]]:
    """One step up to its update; returns what the last stage reports of each micro-batch."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    return get_forward_backward_func()(
        forward_step_func=partial(forward_step, model),
        data_iterator=[micro_batches(model, layout, step) for _ in chunks],
        model=chunks,
        num_microbatches=number_of_micro_batches(model, layout),
        seq_length=model.sequence_length,
        micro_batch_size=model.micro_batch,
    )


def forward_step(model: Model, batches, chunk: nn.Module):
    """Token losses, and the function that sums them as megalodon_mcore.pretraining does."""
    batch = next(batches)
    packed = None
    if model.documents is not None:
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch["cu_seqlens"].squeeze(0),
            tokens_per_sample=model.sequence_length,
        )
    losses = chunk(batch["tokens"], None, None, labels=batch["labels"], packed_seq_params=packed)
    return losses, sum_losses


def sum_losses(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss = losses.float().sum()
    num_tokens = torch.tensor(losses.numel(), dtype=torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def mean_loss(reports: list[dict[str, Tensor]]) -> float:
    """The mean over the global batch, from the last stage's ranks to all."""
    total = sum((report["lm loss"].double() for report in reports), torch.zeros(2).double())
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(total, group=group)
    torch.distributed.broadcast(
        total,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return (total[0] / total[1]).item()
