"""A base for modules whose parameters stay float32 when the model is cast to bf16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer import module as megatron_module
from torch import Tensor, nn

from megalodon_mcore.muon import mark_no_matrix

# Megatron-LM's main asks for this mark where it casts a model; 0.19 has none.
mark_keep_in_fp32 = getattr(megatron_module, "mark_keep_in_fp32", lambda tensor: tensor)


class Float32Module(nn.Module):
    """Ignores the change of dtype in `.to()`, `.bfloat16()` and the like, follows all else.

    Megatron's Float16Module casts every parameter; CEMA's decays and the norms' weights lose too
    much by that. Megatron's DDP buffers and optimizers sort parameters by dtype, so they take it.
    """

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module does it, which also does so where a parameter is assigned."""
        super().register_parameter(name, param)
        self._mark_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        super()._apply(keep_dtype, recurse)
        # Where it cannot change a parameter in place, torch makes another one, without attributes.
        self._mark_parameters()
        return self

    def _mark_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            mark_no_matrix(mark_keep_in_fp32(parameter))


def float32_parameter(shape: tuple[int, ...], device: torch.device | None) -> nn.Parameter:
    """A float32 parameter of zeros."""
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
