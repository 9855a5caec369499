"""Data parallelism: DistributedDataParallel around a model, and batch normalisation over all processes."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from fastmnist.errors import ConfigError
from fastmnist.system.processes import average, world_size


def distribute(model: nn.Module, device: torch.device, *, compress: bool) -> nn.Module:
    """The model as DistributedDataParallel, which averages gradients; the model itself in a single process.

    Buffers are not broadcast at each step: those of process 0 count (see `take_buffers_of_first`). static_graph stays
    off: with it the first steps add gradients in another order, so that a resumed run would end with other bits.

    Args:
        compress: send gradients as bfloat16.
    """
    if world_size() == 1:
        return model
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    unsynced = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # its older name
    options: dict[str, Any] = {unsynced: False}
    parallel = DistributedDataParallel(
        model,
        device_ids=None if device.type == "cpu" else [device],
        gradient_as_bucket_view=True,
        **options,
    )
    if compress:
        parallel.register_comm_hook(None, bf16_compress_hook)
    return parallel


def take_buffers_of_first(model: nn.Module) -> None:
    """Gives all processes the running statistics of process 0, so that they evaluate the model that it saves."""
    if world_size() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with the statistics of all processes' batches, on any device.

    torch.nn.SyncBatchNorm computes the same, on GPUs alone. All processes must have batches of the same size.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Any shape that begins with (B, C)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, ...) to the same, normalised by the statistics of the B * world_size images of a step."""
        if not self.training or world_size() == 1:
            return super().forward(images)
        others = [axis for axis in range(images.ndim) if axis != 1]
        values = images.to(torch.promote_types(images.dtype, torch.float32))
        mean = _Mean.apply(values.mean(others, keepdim=True))
        centred = values - mean
        variance = _Mean.apply(centred.square().mean(others, keepdim=True))
        with torch.no_grad():
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            count = world_size() * images[:, 0].numel()
            momentum = cast(float, self.momentum)
            cast(torch.Tensor, self.running_mean).lerp_(mean.flatten(), momentum)
            cast(torch.Tensor, self.running_var).lerp_(variance.flatten() * (count / (count - 1)), momentum)
        scale = torch.rsqrt(variance + self.eps) * self.weight.view(mean.shape)
        return (centred * scale + self.bias.view(mean.shape)).to(images.dtype)


class _Mean(torch.autograd.Function):
    """The mean over all processes; its gradient is the mean of theirs."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        mean = value.clone()
        average(mean)
        return mean

    backward = forward


def share_batch_norm(model: nn.Module) -> None:
    """Turns every batch normalisation of `model` into a SharedBatchNorm, in place; names and shapes of weights stay.

    Raises:
        ConfigError: there is none, or one without weights or a constant momentum.
    """
    found = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not found:
        raise ConfigError("--sync-batchnorm has no effect: the model has no batch normalisation; leave it out")
    for module in found:
        if not module.affine or module.momentum is None or not module.track_running_stats:
            raise ConfigError(f"--sync-batchnorm does not know a batch normalisation such as {module}; leave it out")
        module.__class__ = SharedBatchNorm
