"""Checkpoints from and to other formats, tensor by tensor: `megalodon-mcore convert`."""
