"""Run as a program: prints the bounds of documents that each form of Bridge's batches gives."""

import json

import torch

from megalodon_mcore import cpu

if __name__ == "__main__":
    cpu.install()
    from megatron.bridge.training.utils.packed_seq_utils import get_packed_seq_params

    from megalodon_mcore.parallel.documents import Documents

    def tensor(*values):
        return torch.tensor(values, dtype=torch.int32)

    class Group:
        size = staticmethod(lambda: 1)

    old = {"cu_seqlens": tensor(0, 4, 12, -1, -1)[None], "max_seqlen": tensor(8)}
    forms = {
        "plain": {"cu_seqlens_q": tensor(0, 4, 12)[None], "max_seqlen_q": tensor(8)},
        "padded": {
            "cu_seqlens_q": tensor(0, 3, 10)[None],
            "cu_seqlens_q_padded": tensor(0, 4, 12)[None],
            "max_seqlen_q": tensor(8),
        },
        "old": old | {"cu_seqlens_argmin": tensor(3)},
        "old without argmin": old,
    }
    found = {}
    for name, batch in forms.items():
        documents = Documents()
        documents.set(get_packed_seq_params(batch), Group())
        found[name] = documents.bounds(16, 1)
    print(json.dumps(found))
