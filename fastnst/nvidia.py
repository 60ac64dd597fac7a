"""A pass of a staged network on an NVIDIA GPU: convolutions of cuDNN in the shapes that fill it, and all that lies between them in kernels of our own."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst import wide
from fastnst.fused_norm import fused_norm
from fastnst.fused_pixels import finish, take
from fastnst.stages import Stage, StagedNetwork


@dataclass(frozen=True)
class _Arrays:
    weight: Tensor  # as `wide` has it
    plain: Tensor  # of the first stage, for widths that it does not take
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None


class NvidiaPass:
    """``network`` on ``device`` in ``dtype``; statistics of norms and the output are float32."""

    def __init__(self, network: StagedNetwork, device: torch.device, dtype: torch.dtype) -> None:
        self._network, self._device, self._dtype = network, device, dtype
        self._arrays = [self._on_device(index, stage) for index, stage in enumerate(network.stages)]

    def _on_device(self, index: int, stage: Stage) -> _Arrays:
        raw, bias, norm_weight, norm_bias = (
            None if array is None else torch.from_numpy(array).to(self._device) for array in (stage.weight, stage.bias, stage.norm_weight, stage.norm_bias)
        )
        if index == 0:
            weight = wide.first_weight(raw, stage.stride)
        elif index == len(self._network.stages) - 1:
            if stage.stride == 2:  # four pixels' kernels are one, moved, and their biases one
                raw, bias = raw.unflatten(0, (3, 4))[:, 0, :, :-1, :-1], bias[::4]
            weight, bias = wide.last_weight(raw, 3 - stage.stride), wide.last_bias(bias, 3 - stage.stride)
        elif stage.transposed:
            weight = wide.upsampled_weight(raw, "transposed")
            bias = None if bias is None else bias.repeat(4)
        elif stage.shuffle == 2:
            weight, bias = wide.by_place(raw), None if bias is None else wide.by_place(bias)
        else:
            weight = raw
        weight, raw = (each.to(self._dtype).contiguous(memory_format=torch.channels_last) for each in (weight, raw))
        bias = bias if bias is None or index == len(self._network.stages) - 1 else bias.to(self._dtype)
        return _Arrays(weight, raw, bias, norm_weight, norm_bias)

    @torch.inference_mode()
    def __call__(self, x: Tensor, pixels: str) -> Tensor:
        """``Engine.run`` for tensors on the device."""
        config, stages = self._network.info.network, self._network.stages
        height, width = x.shape[1:3] if pixels == "uint8" else x.shape[2:]
        missing = tuple(max(config.smallest_side - side, -side % config.multiple) for side in (height, width))
        head, last = stages[0], len(stages) - 1
        x = take(x, pixels, self._dtype, missing, config.start_padding, head.padding, head.padding_mode, head.value)
        before, inset = x, 0  # the input of the stage before, and by how much it is padded
        for index, (stage, arrays) in enumerate(zip(stages, self._arrays)):
            if index == last:
                x = wide.last(x, arrays.weight, 3 - stage.stride)
                return finish(x, arrays.bias, config.output, height, width, pixels)
            cut = inset + stage.shave
            skip = before[:, :, cut : before.shape[2] - cut, cut : before.shape[3] - cut] if stage.skip else None
            before, inset = x, stage.padding
            if index == 0:
                x = wide.first(x, arrays.plain, arrays.weight, stage.stride)
                x = x if arrays.bias is None else x + arrays.bias[:, None, None]
            else:
                x = F.conv2d(x, arrays.weight, arrays.bias, stride=stage.stride)
            after = stages[index + 1]
            x = self._between(x, arrays, stage, skip, after.padding, after.padding_mode)
        raise AssertionError("a network has a last stage")

    @staticmethod
    def _between(x: Tensor, arrays: _Arrays, stage: Stage, skip: Tensor | None, padding: int, mode: str) -> Tensor:
        shuffle = 2 if stage.transposed else stage.shuffle
        if arrays.norm_weight is not None:
            return fused_norm(x, arrays.norm_weight, arrays.norm_bias, stage.relu, skip, padding, mode, shuffle)
        if shuffle == 2:  # batch norm's, folded into convolutions
            x = wide.in_pixels(x, 2)
        x = x.relu() if stage.relu else x
        x = x + skip if skip is not None else x
        return (F.pad(x, [padding] * 4, mode=mode) if padding else x).contiguous(memory_format=torch.channels_last)


