"""An export where neither this package nor Megatron is installed, offline."""

import json
import os
import subprocess
import sys

import torch
from conversion_samples import build, convert, hf_folder

from megalodon_mcore.data.byte_tokenizer import encode_bytes

PROGRAM = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megalodon_mcore", "megatron"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
folder, text = sys.argv[1:]
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
tokens = tokenizer(text, return_tensors="pt")
with torch.no_grad():
    logits = model(**tokens).logits[0, -1]
generated = model.generate(**tokens, max_new_tokens=40, do_sample=False)
print(json.dumps({
    "ids": tokens["input_ids"][0].tolist(),
    "text": tokenizer.decode(tokens["input_ids"][0]),
    "logits": logits.tolist(),
    "length": generated.shape[1],
    "eos": model.generation_config.eos_token_id,
    "type": str(model.dtype),
}))
"""


def test_an_export_needs_torch_and_transformers_alone(tmp_path):
    start = hf_folder(tmp_path / "start", "one-head", tokenizer=True)
    assert convert("hf", "mcore", start, tmp_path / "mcore") == 0
    folder = tmp_path / "export"
    options = ("--max-shard-size", "20KB")
    assert convert("mcore", "hf", tmp_path / "mcore", folder, *options) == 0
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    text = "Naïve <|endoftext|> text"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), text],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ids"] == encode_bytes(text).tolist() and report["text"] == text
    with torch.no_grad():
        logits = build("one-head")(torch.tensor([report["ids"]])).logits[0, -1]
    assert torch.allclose(torch.tensor(report["logits"]), logits, atol=1e-5, rtol=0)
    assert len(report["ids"]) < report["length"] <= len(report["ids"]) + 40
    assert report["eos"] == 256 and report["type"] == "torch.float32"

    card = (folder / "README.md").read_text()
    count = sum(parameter.numel() for parameter in build("one-head").parameters())
    assert f"{count:,} parameters" in card and "AutoTokenizer" in card
    assert str(tmp_path) not in "".join(f.read_text() for f in folder.glob("*.json"))
