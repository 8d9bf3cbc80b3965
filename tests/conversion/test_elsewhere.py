"""An export where nothing but torch, transformers and safetensors is installed, offline."""

import json
import subprocess

import pytest
import torch
from conversion_samples import build, convert, hf_folder
from fresh_environment import make_environment

from megalodon_mcore.data.byte_tokenizer import encode_bytes

PROGRAM = """
import json, socket, sys
from importlib.metadata import distributions
from importlib.util import find_spec

folder, text = sys.argv[1:]
try:
    socket.create_connection(("127.0.0.1", 9))
except OSError as error:
    network = str(error)
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
tokens = tokenizer(text, return_tensors="pt")
with torch.no_grad():
    logits = model(**tokens).logits[0, -1]
generated = model.generate(**tokens, max_new_tokens=40, do_sample=False)
print(json.dumps({
    "installed": [own.metadata["Name"] for own in distributions()],
    "found": [n for n in ("megalodon_mcore", "megatron", "accelerate", "jax") if find_spec(n)],
    "network": network,
    "ids": tokens["input_ids"][0].tolist(),
    "text": tokenizer.decode(tokens["input_ids"][0]),
    "logits": logits.tolist(),
    "generated": generated[0].tolist(),
    "eos": model.generation_config.eos_token_id,
    "type": str(model.dtype),
}))
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Of a Megatron checkpoint, in several shards."""
    folder = tmp_path_factory.mktemp("export")
    start = hf_folder(folder / "start", "one-head", tokenizer=True)
    assert convert("hf", "mcore", start, folder / "mcore") == 0
    options = ("--max-shard-size", "20KB")
    assert convert("mcore", "hf", folder / "mcore", folder / "export", *options) == 0
    return folder / "export"


@pytest.mark.slow
def test_an_export_needs_torch_transformers_and_safetensors_alone(export, tmp_path):
    names = ("torch", "transformers", "safetensors")
    python, required = make_environment(tmp_path / "environment", names)
    assert set(names) < set(required) and "megatron-core" not in required
    text = "Naïve <|endoftext|> text"
    done = subprocess.run(
        [python, "-c", PROGRAM, str(export), text],
        cwd=tmp_path,
        env={
            "HOME": str(tmp_path / "home"),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["installed"]) == len(required) and not report["found"]
    assert "no network" in report["network"]
    assert report["ids"] == encode_bytes(text).tolist() and report["text"] == text
    model, tokens = build("one-head"), torch.tensor([report["ids"]])
    with torch.no_grad():
        logits = model(tokens).logits[0, -1]
    assert torch.allclose(torch.tensor(report["logits"]), logits, atol=1e-5, rtol=0)
    assert report["eos"] == 256 and report["type"] == "torch.float32"
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 256
    expected = model.generate(tokens, max_new_tokens=40, do_sample=False)[0].tolist()
    assert report["generated"] == expected and len(expected) > len(report["ids"])


def test_the_model_card_and_paths(export):
    card = (export / "README.md").read_text()
    count = sum(parameter.numel() for parameter in build("one-head").parameters())
    assert f"{count:,} parameters" in card and "AutoTokenizer" in card
    assert str(export.parent) not in "".join(f.read_text() for f in export.glob("*.json"))
