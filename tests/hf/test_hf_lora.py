"""Low-rank adapters (PEFT) on an export: trained, saved, merged, and back in Megatron's format."""

import peft
import pytest
import torch
from hf_models import build
from mixed_models import build_mixed
from transformers import AutoModelForCausalLM

from comparing import error
from conversion.conversion_samples import convert

PROJECTIONS = ["wz", "wv", "wr", "wh1", "wh2", "w1", "w2", "w3", "qkv", "proj"]


@pytest.mark.parametrize(
    "make", [build, lambda: build_mixed("*M-")], ids=["blocks", "other layers"]
)
def test_adapters_train_travel_and_merge(make, tmp_path):
    base = make()
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapters = peft.LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, adapters)
    tokens = torch.randint(64, (2, 40))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name

    model.eval()
    expected = logits_of(model, tokens)
    model.save_pretrained(tmp_path / "adapters")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapters").eval()
    assert torch.equal(logits_of(again, tokens), expected)
    made = again.generate(tokens, max_new_tokens=12, do_sample=False)
    for place in range(40, 52):
        whole = logits_of(again, made[:, :place])
        assert torch.equal(made[:, place], whole[:, -1].argmax(-1))

    merged = again.merge_and_unload()
    assert error(logits_of(merged, tokens), expected) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert convert("hf", "mcore", tmp_path / "merged", tmp_path / "mcore") == 0
    assert convert("mcore", "hf", tmp_path / "mcore", tmp_path / "back") == 0
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=True)
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, merged.get_parameter(name)), name


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits
