"""Folders: saved with their files of code, loaded where nothing of this package exists."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import SHAPES, build
from mixed_models import build_mixed
from safetensors.torch import load_file

from megalodon_mcore import hf

# Runs in a Python that cannot import the package; prints what the test looks at as JSON.
LOADER = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megalodon_mcore", "megatron"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
folder, device_map = sys.argv[1:]
import torch
from transformers import AutoConfig, AutoModelForCausalLM

def load(**options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)

tokens = torch.arange(30)[None]
model = load(device_map=device_map) if device_map != "none" else load()
narrow = load(dtype=torch.bfloat16)
model.save_pretrained(folder + "/again")
from_again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
with torch.no_grad():
    logits = model(tokens).logits[0, -1]
    report = {
        "module": type(model).__module__,
        "config": type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__,
        "logits": logits.tolist(),
        "same again": torch.equal(from_again(tokens).logits[0, -1], logits),
        "bf16 logits": narrow(tokens).logits[0, -1].tolist(),
        "bf16": sorted(n for n, p in narrow.named_parameters() if p.dtype == torch.bfloat16),
        "float32": sorted(n for n, p in narrow.named_parameters() if p.dtype == torch.float32),
        "generated": narrow.generate(tokens, max_new_tokens=20, do_sample=False).shape[1],
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
    }
print(json.dumps(report))
"""
FLOAT32 = ("cema", "norm", "query_key", "rescale", "router_bias")
PARTS = ("block", "cache", "configuration", "layers", "modeling", "packing")
CODE = tuple(f"{part}_megalodon.py" for part in PARTS)


def load_elsewhere(folder, tmp_path, device_map="none"):
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(folder), device_map],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["swiglu-heads-rescale", "tied-scaled-four-heads", "M*ME"])
def test_a_saved_folder_loads_where_this_package_is_not_installed(name, tmp_path):
    model = build(name) if name in SHAPES else build_mixed(name)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", *CODE} <= names
    assert {n for n in names if n.startswith("model.")} == {"model.safetensors"}
    for file in CODE:
        assert (folder / file).read_text() == (Path(hf.__file__).parent / file).read_text()
    saved = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in saved) is not name.startswith("tied")
    assert saved.keys() == dict(model.named_parameters()).keys()

    try:
        import accelerate  # noqa: F401

        device_map = "auto" if name.startswith("tied") else "cpu"
    except ImportError:
        device_map = "none"
    report = load_elsewhere(folder, tmp_path, device_map)
    assert report["module"].startswith("transformers_modules.")
    assert report["config"] == "MegalodonConfig"
    assert report["tied"] is name.startswith("tied")
    with torch.no_grad():
        logits = model(torch.arange(30)[None]).logits[0, -1]
    assert torch.allclose(torch.tensor(report["logits"]), logits, atol=1e-5 * logits.abs().max())
    narrow = torch.tensor(report["bf16 logits"])
    assert (narrow - logits).abs().max() < 0.1 * logits.abs().max()
    assert report["same again"] and report["generated"] == 50

    everything = dict(model.named_parameters()).keys()
    kept = {n for n in everything if any(part in n for part in FLOAT32)}
    assert set(report["float32"]) == kept
    assert set(report["bf16"]) == everything - kept


@pytest.mark.parametrize("cast", ["to", "bfloat16", "half"])
def test_casting_keeps_the_same_parameters_in_float32(cast):
    model = build()
    expected = {n: p.clone() for n, p in model.named_parameters()}
    model = model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    for name, parameter in model.named_parameters():
        if any(part in name for part in FLOAT32):
            assert parameter.dtype == torch.float32 and torch.equal(parameter, expected[name])
        else:
            assert parameter.dtype in (torch.bfloat16, torch.float16)
    assert model(torch.arange(30)[None]).logits.isfinite().all()
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}
    assert {p.dtype for p in model.float().parameters()} == {torch.float32}


def test_the_files_need_torch_transformers_and_the_standard_library_alone():
    import ast

    imported = set()
    for file in CODE:
        tree = ast.parse((Path(hf.__file__).parent / file).read_text())
        for node in tree.body:
            if isinstance(node, ast.Try):
                assert [handler.type.id for handler in node.handlers] == ["ImportError"]
                node.body = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}
