"""Run as a program: prints what providers settle on or refuse as one line of JSON."""

import json
import os

from megalodon_mcore import cpu

if __name__ == "__main__":
    cpu.install()
    from megalodon_mcore.bridge import MegalodonModelProvider

    os.environ["MEGALODON_CONFIG"] = "chunk_size=64,cema_ndim=4"
    values = {"seq_length": 128, "vocab_size": 64, "gradient_accumulation_fusion": False}
    provider = MegalodonModelProvider.of("200m", megalodon_z_dim=128, **values)
    provider.megalodon_chunk_size = 32
    provider.finalize()
    found = {
        name: getattr(provider, f"megalodon_{name}")
        for name in ("chunk_size", "cema_ndim", "z_dim", "norm_num_groups")
    }
    refused = {}
    for name, value in (
        ("kv_channels", 8),
        ("qk_layernorm", True),
        ("num_query_groups", 3),
        ("mtp_num_layers", 1),
    ):
        wrong = MegalodonModelProvider.of("200m", **values)
        setattr(wrong, name, value)
        try:
            wrong.finalize()
        except ValueError as error:
            refused[name] = str(error)
    print(json.dumps({"found": found, "refused": refused}))
