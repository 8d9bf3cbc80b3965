"""The README.md of an exported model."""

from __future__ import annotations

import dataclasses

import torch

from megalodon_mcore.conversion.model import OpenModel
from megalodon_mcore.conversion.tokenizers import NULL_TOKENIZER
from megalodon_mcore.parameters import number_of_values, parameters

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=100)[0]))
```"""

NOT_TEXT = """The model was trained on token numbers; the folder has no tokenizer.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
```"""

TOKENIZER_MODEL = """The tokenizer is the SentencePiece model `tokenizer.model`."""


MEMORY = {
    False: "It reads a text of any length in constant memory.",
    True: "Its attention layers (`*` of `layer_symbols`) keep keys and values of the whole text; "
    "the rest of its memory does not grow.",
}
"""By whether a model has attention layers."""


def model_card(model: OpenModel, dtype: torch.dtype) -> str:
    """Markdown: what the model is, its sizes, how to use it, how it was trained."""
    shape = model.config
    count = number_of_values(shape)
    size = sum(
        torch.Size(parameter.shape).numel() * model.written_dtype(parameter, dtype).itemsize
        for parameter in parameters(shape)
    )
    kind = model.tokenizer.kind if model.tokenizer else NULL_TOKENIZER
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- megalodon\n---",
        "# Megalodon",
        f"A [Megalodon](https://arxiv.org/abs/2404.08801) language model of {count:,} parameters "
        f"({size / 1e6:,.1f} MB, {str(dtype).removeprefix('torch.')}; CEMA, norms and the "
        "query/key affine in float32), trained with megalodon-mcore. "
        f"{MEMORY['*' in shape.symbols]}",
        "## Use",
        USE if kind == "HuggingFaceTokenizer" else NOT_TEXT,
    ]
    if kind not in ("HuggingFaceTokenizer", NULL_TOKENIZER):
        parts[-1] = f"{TOKENIZER_MODEL}\n\n{NOT_TEXT.partition(chr(10) * 2)[2]}"
    parts += [
        "Needs torch and transformers (5.4 or newer) alone.",
        "## Sizes",
        _table({name: z for name, z in dataclasses.asdict(shape).items() if shape.has(name)}),
    ]
    parts.append("## Training")
    parts.append(_table(model.training) if model.training else "Not known.")
    return "\n\n".join(parts) + "\n"


def _table(rows: dict[str, object]) -> str:
    lines = ["| | |", "| --- | --- |"]
    for name, value in rows.items():
        grouped = isinstance(value, int) and not isinstance(value, bool) and name != "seed"
        text = f"{value:,}" if grouped else str(value)
        lines.append(f"| {name.replace('_', ' ')} | {text} |")
    return "\n".join(lines)
