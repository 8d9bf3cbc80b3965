"""A model that trains in seconds on a CPU, to see that everything is in place."""

from megatron.bridge.recipes.common import _pretrain_common
from megatron.bridge.training.config import ConfigContainer

from megalodon_mcore.bridge.provider import MegalodonModelProvider


def megalodon_tiny_pretrain_config() -> ConfigContainer:
    """Two layers of width 64 on mock data in float32, for 20 batches of 8 sequences of 64 tokens.

    Chunks of 16, so that a sequence has several. Megatron's local layers, since Transformer
    Engine's compute on a GPU alone; nothing overlaps and no worker processes start, for on two
    cores both only cost time.
    """
    cfg = _pretrain_common()
    cfg.model = MegalodonModelProvider(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=2,
        ffn_hidden_size=96,
        gated_linear_unit=True,
        megalodon_chunk_size=16,
        vocab_size=128,
        seq_length=64,
        transformer_impl="local",
    )
    cfg.tokenizer.tokenizer_type = "NullTokenizer"
    cfg.tokenizer.vocab_size = 128
    cfg.dataset.seq_length = 64
    cfg.dataset.num_workers = 0
    cfg.dataset.persistent_workers = False
    cfg.train.train_iters = 20
    cfg.train.global_batch_size = 8
    cfg.train.micro_batch_size = 4
    cfg.train.manual_gc = False
    cfg.validation.eval_iters = 2
    cfg.validation.eval_interval = cfg.checkpoint.save_interval = 20
    cfg.checkpoint.dist_ckpt_optim_fully_reshardable = True
    cfg.optimizer.lr, cfg.optimizer.min_lr = 1e-2, 1e-3
    cfg.optimizer.bf16 = False
    cfg.scheduler.lr_warmup_iters = 2
    cfg.logger.log_interval = 1
    cfg.ddp.overlap_grad_reduce = cfg.ddp.overlap_param_gather = False
    cfg.ddp.average_in_collective = False
    cfg.mixed_precision = None
    return cfg
