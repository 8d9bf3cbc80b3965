"""The common ground of the paper-size recipes: the paper's optimizer, schedule and batch."""

from __future__ import annotations

from megatron.bridge.recipes.common import _pretrain_common
from megatron.bridge.recipes.utils.environment_utils import COMMON_RECIPE_ENV_VARS
from megatron.bridge.recipes.utils.optimizer_utils import (
    distributed_fused_adam_with_cosine_annealing,
)
from megatron.bridge.training.config import ConfigContainer

from megalodon_mcore.bridge.provider import MegalodonModelProvider
from megalodon_mcore.config import MegalodonConfig

VOCAB_SIZE = 32_000
"""The paper's tokenizer is Llama 2's."""

TOKENS_PER_BATCH = 2**22
"""The paper's 4M."""

TRAINING_TOKENS = 2 * 10**12
"""The tokens that the paper trains its 7B on."""


def paper_config(
    model: MegalodonConfig | str,
    seq_length: int,
    *,
    micro_batch_size: int = 1,
    tp: int = 1,
    cp: int = 1,
    ep: int = 1,
    selective_recompute: bool = False,
) -> ConfigContainer:
    """Pretraining of a model as the paper pretrains its 7B, in bf16 with float32 gradients.

    From the paper: AdamW (0.9, 0.95), weight decay 0.1, gradients clipped at norm 1, peak rate
    3.5e-4 with cosine decay, 4M tokens a batch, 2T tokens, no dropout. Of the warm-up (2,000
    batches) and the last rate (a tenth of the peak) the numbers are Llama 2's (arXiv 2307.09288),
    with which the paper compares itself on the same data.

    Data is Megatron's mock data and the tokenizer none until `dataset.blend` and `tokenizer` are
    set. Checkpoints go to nemo_experiments/ in the working directory; a run that finds one there
    goes on from it.

    Args:
        model: a configuration, or a size's name.
        seq_length: tokens of a sequence.
        micro_batch_size: sequences that a rank computes at once.
        tp: tensor-parallel ranks, with sequence parallelism where there are several.
        cp: context-parallel ranks.
        ep: ranks that have different experts.
        selective_recompute: compute attention and FFN again in backward instead of keeping them.
    """
    cfg = _pretrain_common()
    cfg.model = MegalodonModelProvider.of(
        model,
        vocab_size=VOCAB_SIZE,
        seq_length=seq_length,
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        transformer_impl="transformer_engine",
    )
    if selective_recompute:
        cfg.model.recompute_granularity = "selective"
        cfg.model.recompute_modules = ["core_attn", "mlp"]

    cfg.tokenizer.tokenizer_type = "NullTokenizer"
    cfg.tokenizer.vocab_size = VOCAB_SIZE
    cfg.dataset.seq_length = seq_length

    cfg.optimizer, cfg.scheduler = distributed_fused_adam_with_cosine_annealing(
        lr_warmup_iters=2000,
        lr_decay_iters=None,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_lr=3.5e-4,
        min_lr=3.5e-5,
        weight_decay=0.1,
        # The scheduler's weight decay is what the optimizer gets.
        start_weight_decay=0.1,
        end_weight_decay=0.1,
        clip_grad=1.0,
    )
    cfg.train.micro_batch_size = micro_batch_size
    cfg.train.global_batch_size = TOKENS_PER_BATCH // seq_length
    cfg.train.train_iters = -(-TRAINING_TOKENS // TOKENS_PER_BATCH)
    cfg.validation.eval_interval = cfg.checkpoint.save_interval = 2000
    # So that a run can go on with another layout.
    cfg.checkpoint.dist_ckpt_optim_fully_reshardable = True
    cfg.mixed_precision = "bf16_mixed"
    cfg.env_vars = dict(COMMON_RECIPE_ENV_VARS)
    if tp > 1:
        # Orders communication before the computation that it overlaps.
        cfg.env_vars["CUDA_DEVICE_MAX_CONNECTIONS"] = 1
    return cfg
