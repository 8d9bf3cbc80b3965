"""What Transformer Engine's linear modules compute and send, in torch, so that a CPU can run them.

Their own forward needs CUDA. This goes by the same attributes of the modules (as read in 2.20's
module/linear.py and module/layernorm_linear.py), in full precision.
"""

from contextlib import contextmanager
from unittest.mock import patch

from megatron.core import tensor_parallel
from torch.nn import functional as F


@contextmanager
def running_on_cpu(note=lambda module: None):
    """Transformer Engine's Linear and LayerNormLinear run so inside; `note` sees each that does."""
    from transformer_engine.pytorch import LayerNormLinear, Linear

    def linear_forward(self, x, is_first_microbatch=None):
        note(self)
        return project(self, x)

    def norm_linear_forward(self, x, is_first_microbatch=None):
        note(self)
        assert self.normalization == "LayerNorm"
        weight = self.layer_norm_weight.to(x.dtype) + self.zero_centered_gamma
        bias = self.layer_norm_bias.to(x.dtype)
        return project(self, F.layer_norm(x, weight.shape, weight, bias, self.eps))

    with (
        patch.object(Linear, "forward", linear_forward),
        patch.object(LayerNormLinear, "forward", norm_linear_forward),
    ):
        yield


def project(module, x):
    """The product of Linear and LayerNormLinear, with the communication around it."""
    assert x.dtype == module.weight.dtype
    assert not module.te_return_bias
    communicates = module.tp_size > 1
    assert module.tp_size == (module.tp_group.size() if module.tp_group is not None else 1)
    if communicates and module.parallel_mode == "column":
        if module.sequence_parallel:
            x = tensor_parallel.gather_from_sequence_parallel_region(x, group=module.tp_group)
        else:
            x = tensor_parallel.copy_to_tensor_model_parallel_region(x, group=module.tp_group)
    y = F.linear(x, module.weight)
    if communicates and module.parallel_mode == "row":
        if module.sequence_parallel:
            y = tensor_parallel.reduce_scatter_to_sequence_parallel_region(y, group=module.tp_group)
        else:
            y = tensor_parallel.reduce_from_tensor_model_parallel_region(y, group=module.tp_group)
    return y + module.bias if module.use_bias else y
