"""A pass of a staged network on an NVIDIA GPU: convolutions of cuDNN in the shapes that fill it, and all that lies between them in kernels of our own."""

from dataclasses import dataclass

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
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None


class NvidiaPass:
    """``network`` on ``device`` in ``dtype``; statistics of norms and the output are float32."""

    def __init__(self, network: StagedNetwork, device: torch.device, dtype: torch.dtype) -> None:
        self._config, self._device, self._dtype = network.info.network, device, dtype
        self._stages = [stage.by_pixel for stage in network.stages]
        self._arrays = [self._on_device(index, stage) for index, stage in enumerate(self._stages)]

    def _on_device(self, index: int, stage: Stage) -> _Arrays:
        raw, bias, norm_weight, norm_bias = (
            None if array is None else torch.from_numpy(array).to(self._device) for array in (stage.weight, stage.bias, stage.norm_weight, stage.norm_bias)
        )
        if index == 0:
            weight = wide.first_weight(raw, stage.stride)
            bias = None if bias is None else bias.repeat(weight.shape[0] // len(bias))
        elif index == len(self._stages) - 1:
            weight, bias = wide.last_weight(raw, stage.shuffle), wide.last_bias(bias, stage.shuffle)
        elif stage.transposed:
            weight = wide.around_corners(wide.upsampled_weight(raw, "transposed"))
            bias = None if bias is None else bias.repeat(4)
        elif stage.shuffle == 2:
            weight, bias = wide.by_place(raw), None if bias is None else wide.by_place(bias)
        else:
            weight = raw
        weight = weight.to(self._dtype).contiguous(memory_format=torch.channels_last)
        bias = bias if bias is None or index == len(self._stages) - 1 else bias.to(self._dtype)
        return _Arrays(weight, bias, norm_weight, norm_bias)

    @torch.inference_mode()
    def __call__(self, x: Tensor, pixels: str) -> Tensor:
        """``Engine.run`` for tensors on the device."""
        config, stages = self._config, self._stages
        height, width = x.shape[1:3] if pixels == "uint8" else x.shape[2:]
        missing = (config.missing(height), config.missing(width))
        head, last = stages[0], len(stages) - 1
        x, unlike = take(x, pixels, self._dtype, missing, config.start_padding, head.padding, head.padding_mode, head.value)
        even = config.padding in ("reflect", "replicate") and config.upsampling in ("nearest", "bilinear")  # one color stays one color, but for rounding
        unlike = unlike.amax(1) if even else None
        before, inset = x, 0  # the input of the stage before, and by how much it is padded
        for index, (stage, arrays) in enumerate(zip(stages, self._arrays)):
            cut = inset + stage.shave
            skip = before[:, :, cut : before.shape[2] - cut, cut : before.shape[3] - cut] if stage.skip else None
            before, inset = x, stage.padding
            x = F.conv2d(x, arrays.weight, None if index == last else arrays.bias, stride=stage.stride if 0 < index < last else 1)
            if index == last:
                return finish(x, arrays.bias, config.output, height, width, pixels)
            shuffle = 2 if stage.transposed else stage.shuffle
            if index == 0:
                shuffle = wide.PLACE // stage.stride
                x, shuffle = wide.cropped(x, shuffle, *(stage.size(side + less + 2 * config.start_padding) for side, less in zip((height, width), missing)))
            after = stages[index + 1]
            places = wide.PLACE // after.shuffle if index + 1 == last else 1
            x = self._between(x, arrays, stage, skip, after.padding, after.padding_mode, shuffle, places, int(stage.transposed), unlike)
        raise AssertionError("a network has a last stage")

    @staticmethod
    def _between(
        x: Tensor, arrays: _Arrays, stage: Stage, skip: Tensor | None, padding: int, mode: str, shuffle: int, places: int, margin: int, unlike: Tensor | None
    ) -> Tensor:
        if arrays.norm_weight is not None:
            return fused_norm(x, arrays.norm_weight, arrays.norm_bias, stage.relu, skip, padding, mode, shuffle, places, margin, unlike)
        x = wide.in_pixels(x, shuffle)  # batch norm's, folded into convolutions
        x = x[:, :, margin : x.shape[2] - margin, margin : x.shape[3] - margin]
        x = x.relu() if stage.relu else x
        x = x + skip if skip is not None else x
        x = F.pad(x, [padding] * 4, mode=mode) if padding else x
        return wide.in_places(x, places).contiguous(memory_format=torch.channels_last)
