"""One trained model in every format computes the same logits; the judge is float64."""

import pytest
import torch
from conversion_samples import convert

import straight_line
from comparing import error
from megalodon_mcore.conversion.mcore_checkpoint import open_mcore
from megalodon_mcore.conversion.released import open_released
from megalodon_mcore.parameters import parameters
from training.runs import DATA, MODEL, SCHEDULE, generate, save_to, train

TIED = tuple(z for z in MODEL if z != "--untie-embeddings-and-output-weights")
PADDING = ("--make-vocab-size-divisible-by", "64")
CASES = {
    "one-process": ((*MODEL, "--swiglu", "--megalodon-rescale-nffn"), 1),
    "tp2-pp2-cp2": (
        (
            *(*TIED, "--swiglu", "--megalodon-rescale-nffn", "--megalodon-scale-embedding"),
            *("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
            *("--context-parallel-size", "2", "--sequence-parallel"),
        ),
        8,
    ),
    "tp4-shared-heads-bf16": (
        (*MODEL, "--bf16", "--tensor-model-parallel-size", "4", "--megalodon-num-heads", "1"),
        4,
    ),
}
TOLERANCE = 1e-5
"""Largest difference over the largest logit, of float32 from float64."""


@pytest.fixture(
    scope="module",
    params=[z if z == "one-process" else pytest.param(z, marks=pytest.mark.slow) for z in CASES],
)
def formats(request, tmp_path_factory):
    """A trained checkpoint's folder by format. Of a bf16 one, the float32 model of its weights."""
    arguments, processes = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    train(
        folder / "run",
        *(*arguments, *DATA, *SCHEDULE, *PADDING, *save_to(folder / "trained")),
        processes=processes,
    )
    made = {name: folder / name for name in ("mcore", "hf", "released", "from-released", "bf16")}
    wide = ("--dtype", "float32")
    assert convert("mcore", "hf", folder / "trained", made["hf"], *wide) == 0
    assert convert("mcore", "released", folder / "trained", made["released"], *wide) == 0
    assert convert("hf", "mcore", made["hf"], made["mcore"], *PADDING) == 0
    assert convert("released", "mcore", made["released"], made["from-released"]) == 0
    assert convert("hf", "released", made["hf"], made["bf16"], "--dtype", "bf16") == 0
    return {"trained": folder / "trained"} | made


def tokens_of(vocab_size):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (2, 75), generator=generator)


def by_equations(checkpoint):
    """float64 logits [2, 75, V] from the equations, of weights read from a Megatron checkpoint."""
    model = open_mcore(checkpoint)
    shape, joined = model.config, {}
    for parameter in parameters(shape):
        joined.setdefault(parameter.mcore, []).append(parameter)
    state = {
        name: torch.cat([model.read(part) for part in parts], parts[0].row.part.axis)
        if parts[0].row.part
        else model.read(parts[0])
        for name, parts in joined.items()
    }
    return straight_line.model(
        tokens_of(shape.vocab_size),
        {name: tensor.double() for name, tensor in state.items()},
        shape,
    )


def by_megatron(model, vocab_size):
    with torch.no_grad():
        return model(tokens_of(vocab_size), None, None)[..., :vocab_size]


def by_transformers(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        return model(tokens_of(model.config.vocab_size)).logits


def by_megalodon_jax(folder):
    """Through megalodon-jax's own loader of released checkpoints."""
    jax = pytest.importorskip("jax")
    megalodon_jax = pytest.importorskip("megalodon_jax")
    import numpy as np
    from megalodon_jax.convert import load_upstream_checkpoint

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
    shape = open_released(folder).config
    config = megalodon_jax.MegalodonConfig(
        vocab_size=shape.vocab_size,
        model_dim=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        z_dim=shape.z_dim,
        value_dim=shape.value_dim,
        ffn_hidden_dim=shape.ffn_hidden_size,
        cema_ndim=shape.cema_ndim,
        chunk_size=shape.chunk_size,
        norm_num_groups=shape.norm_num_groups,
        norm_eps=shape.norm_eps,
        rope_base=shape.rotary_base,
        swiglu=shape.swiglu,
        rescale_nffn=shape.rescale_nffn,
        scale_emb=shape.scale_embedding,
        share_emb=shape.tied,
    )
    judge = load_upstream_checkpoint(folder, config, key=jax.random.PRNGKey(0))
    logits, _ = judge(tokens_of(shape.vocab_size).numpy())
    return torch.from_numpy(np.array(logits))


def test_logits_agree(formats, load_model):
    expected = by_equations(formats["trained"])
    assert torch.equal(by_equations(formats["mcore"]), expected)
    assert torch.equal(by_equations(formats["from-released"]), expected)
    found = {
        "transformers": by_transformers(formats["hf"]),
        "megalodon-jax": by_megalodon_jax(formats["released"]),
        "Megatron": by_megatron(load_model(formats["mcore"]).model, expected.shape[-1]),
    }
    errors = {name: error(logits, expected) for name, logits in found.items()}
    assert max(errors.values()) < TOLERANCE, errors
    # The trained model is not a fresh one: it has learned which tokens there are.
    assert expected.abs().max() > 1


def test_bf16_is_near(formats):
    expected = by_equations(formats["trained"])
    assert 0 < error(by_megalodon_jax(formats["bf16"]), expected) < 0.1


def test_greedy_generation_is_the_same_over_chunk_boundaries(formats):
    from transformers import AutoModelForCausalLM

    # Chunks have 16 positions; the prompt and what follows are in five of them.
    prompt = list(range(3, 24))
    options = ("--tokens", "50", "--temperature", "0", "--ignore-end")
    done = generate(formats["mcore"], "--prompt", " ".join(map(str, prompt)), *options)
    assert done.returncode == 0, done.stdout[-4000:]
    model = AutoModelForCausalLM.from_pretrained(formats["hf"], trust_remote_code=True)
    model.generation_config.eos_token_id = None
    made = model.generate(torch.tensor([prompt]), max_new_tokens=50, do_sample=False)
    assert done.stdout.splitlines()[-1].split() == [str(token) for token in made[0].tolist()]
