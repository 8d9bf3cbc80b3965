"""Builds small models for tests."""

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.layers.submodules import LINEAR_LAYERS
from megalodon_mcore.spec import MegalodonSpec

EPS = 1e-5

LISTED = {
    "200m": 220_627_968,
    "1.3b": 1_342_832_640,
    "1.3b-pg19": 1_327_628_288,
    "7.1b": 7_117_381_632,
    "7.3b": 7_385_817_088,
    "7b-paper": 7_385_817_088,
}
"""Parameters of the named sizes with a vocabulary of 32,000."""


def swiglu_heads_rescale(chunk_size) -> dict:
    """Options of `build` that differ from the default in all that changes a block's equations."""
    own = dict(
        chunk_size=chunk_size,
        z_dim=8,
        value_dim=24,
        cema_ndim=3,
        norm_num_groups=4,
        rescale_nffn=True,
    )
    return dict(own=own, heads=2, swiglu=True)


def transformer_config(
    num_layers=2, hidden_size=32, heads=1, ffn=48, swiglu=False, **options
) -> TransformerConfig:
    values = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "ffn_hidden_size": ffn,
        "gated_linear_unit": swiglu,
        "activation_func": torch.nn.functional.silu,
        "layernorm_epsilon": EPS,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "add_bias_linear": False,
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "pipeline_dtype": torch.float32,
    }
    return TransformerConfig(**(values | options))


def build(
    own=None,
    vocab_size=64,
    tied=False,
    rotary_base=10_000,
    emulated_fp8=None,
    emulated_fp8_layers=LINEAR_LAYERS,
    **options,
):
    """A GPTModel handed a MegalodonSpec straight, and its MegalodonConfig.

    own: values that Megatron has no argument for; options: see transformer_config.
    """
    config = transformer_config(**options)
    megalodon = megalodon_config(
        config, tied=tied, vocab_size=vocab_size, rotary_base=rotary_base, **(own or {})
    )
    spec = MegalodonSpec(
        megalodon, emulated_fp8=emulated_fp8, emulated_fp8_layers=emulated_fp8_layers
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=vocab_size,
        max_sequence_length=1024,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="none",
        rotary_base=rotary_base,
    )
    return model, megalodon


def build_hybrid(
    pattern,
    own=None,
    positions="none",
    vocab_size=64,
    num_heads=2,
    normalization="RMSNorm",
    rotary_percent=1.0,
    **options,
):
    """A HybridModel of a pattern's layers, and the MegalodonConfig of its blocks.

    num_heads: of the blocks; `heads` is attention's number.
    """
    layers, *predicting = pattern.split("/")
    config = transformer_config(
        num_layers=len(layers),
        mtp_num_layers=len(predicting) or None,
        swiglu=True,
        normalization=normalization,
        **options,
    )
    megalodon = megalodon_config(
        config, vocab_size=vocab_size, **{"num_heads": num_heads} | (own or {})
    )
    model = HybridModel(
        config=config,
        hybrid_stack_spec=MegalodonSpec(settled=megalodon),
        vocab_size=vocab_size,
        max_sequence_length=1024,
        hybrid_layer_pattern=pattern,
        position_embedding_type=positions,
        rotary_percent=rotary_percent,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return model, megalodon


def megalodon_config(config: TransformerConfig, **values) -> MegalodonConfig:
    """The MegalodonConfig of a model with Megatron's configuration and these values."""
    shape = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "ffn_hidden_size": config.ffn_hidden_size,
        "swiglu": config.gated_linear_unit,
        "norm_eps": config.layernorm_epsilon,
    }
    return MegalodonConfig(**(shape | values))


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Moves every parameter off its (often zero) start, so that each one matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise.to(parameter.dtype))
