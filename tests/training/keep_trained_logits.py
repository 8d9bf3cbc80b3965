"""Program: `megalodon-mcore pretrain`, then keeps the trained model's logits of fixed tokens.

    python keep_trained_logits.py LOGITS_FILE pretrain ARGUMENTS
"""

import gc
import sys

import torch
from training.fixed_tokens import full_logits

if __name__ == "__main__":
    from megalodon_mcore import __main__ as command_line

    command_line.main(sys.argv[2:])

    from megatron.core.models.gpt.gpt_model import GPTModel

    (model,) = (thing for thing in gc.get_objects() if isinstance(thing, GPTModel))
    torch.save(full_logits(model.eval()), sys.argv[1])
