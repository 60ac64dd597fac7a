"""torch as an engine: any device that it has, an NVIDIA GPU in the fastest way."""

import warnings
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst.fused import on_device, warn_of
from fastnst.grain import with_grain
from fastnst.recording import Recording
from fastnst.runtime import WORTH_COMPILING, cpu_precision, free_memory, in_one_line, is_out_of_memory, keep_freed_memory, outlive_fork, resolve_device
from fastnst.stages import EPSILON, PIXEL_SHIFT, Stage, StagedNetwork, less_flat, minds_ground


class TorchEngine:
    """torch, on any device that it has; statistics of norms and the output are float32 in every precision."""

    name = "torch"

    def __init__(self, network: StagedNetwork, device: str = "auto", precision: str = "auto") -> None:
        self.network = network
        self._device = resolve_device(device)
        self.device = str(self._device)
        if self._device.type == "cpu":
            precision = cpu_precision(self.name, ("float32", "bfloat16"), precision)
            keep_freed_memory()
        elif precision == "int8":
            raise ValueError("--precision int8 is there on a CPU with --engine openvino only; use --precision auto")
        elif precision == "auto":
            precision = "float16" if self._device.type == "cuda" else "float32"
        self.precision = precision
        self._dtype = getattr(torch, precision)
        self.batch = 1 if self._device.type == "cpu" else 16
        self._layout = torch.channels_last if self._device.type == "cuda" else torch.contiguous_format
        self._last: tuple[Any, ...] = ()  # kind and shape of the last pictures
        self._in_a_row = 0  # pictures of that kind and shape
        self._so_far = 0  # pictures of all kinds
        self._recording: Recording | None = None  # a pass over them
        self._fast: Any = None  # a `NvidiaPass`; False where it failed

    def needed_memory(self, count, height, width):
        return count * height * width * self.network.stages[0].channels * (17 if self.precision == "float32" else 10)

    def free_memory(self) -> int:
        if self._device.type != "cuda":
            return free_memory()
        held = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)  # by torch, for what comes next
        return torch.cuda.mem_get_info(self._device)[0] + held

    @cached_property
    def _stages(self) -> list[dict[str, Tensor | None]]:
        """The stages' arrays on the device."""
        found = []
        for stage in less_flat(self.network):
            arrays = {name: getattr(stage, name) for name in ("weight", "bias", "norm_weight", "norm_bias")}
            tensors = {name: None if array is None else torch.from_numpy(array).to(self._device, self._dtype) for name, array in arrays.items()}
            tensors["weight"] = tensors["weight"].contiguous(memory_format=self._layout)
            found.append(tensors)
        return found

    def run(self, pictures: np.ndarray, pixels: str = "uint8", grain: float = 0.0) -> np.ndarray:
        x = torch.from_numpy(np.require(pictures, requirements=["C", "W"]))  # torch warns of what is read-only
        if self._device.type != "cuda":
            return self.run_tensor(x.to(self._device), pixels, grain).cpu().numpy()
        stylized = self.run_tensor(x.pin_memory().to(self._device, non_blocking=True), pixels, grain).to("cpu", non_blocking=True)  # pinned, too
        torch.cuda.current_stream(self._device).synchronize()
        return stylized.numpy()  # pinned memory, which torch keeps for the next picture once this one is gone

    def run_tensor(self, x: Tensor, pixels: str, grain: float = 0.0) -> Tensor:
        """``run`` for tensors on the device of the engine."""
        this = (pixels, x.shape, grain)
        if this != self._last:
            self._last, self._in_a_row, self._recording = this, 0, None  # the memory of a recorded pass is for the new ones
        self._in_a_row += 1
        self._so_far += 1
        with torch.inference_mode():
            if self._device.type == "cuda" and self._in_a_row == WORTH_COMPILING:
                self._recording = self._record(x, pixels, grain)
            if self._recording is None:
                x = _with_grain(x, pixels, grain)
                return self.compute_fast(x, pixels) if self._device.type == "cuda" and self._so_far > WORTH_COMPILING else self.compute(x, pixels)
            stylized = self._recording(x)
        return stylized.clone()  # which the next pass overwrites

    def _record(self, x: Tensor, pixels: str, grain: float) -> Recording | None:
        """A pass over pictures like ``x``, as fast as this machine can; None where it can do nothing about it."""
        try:
            return Recording(lambda given: self.compute_fast(_with_grain(given, pixels, grain), pixels), x, tried_out=self.precision != "float32")
        except Exception as error:  # libraries raise many kinds; it goes without, and is not tried again
            if not is_out_of_memory(error):
                warnings.warn(f"a CUDA graph failed, going on slower without ({in_one_line(error)})", stacklevel=2)
        return None

    def compute_fast(self, x: Tensor, pixels: str) -> Tensor:
        """``compute`` on an NVIDIA GPU, where the first pass takes some seconds of Triton's compiling; where that fails it goes on without, saying so."""
        if self._fast is not False:
            try:
                from fastnst.nvidia import NvidiaPass

                self._fast = self._fast or NvidiaPass(self.network, self._device, self._dtype)
                with on_device(self._device):
                    return self._fast(x, pixels)
            except Exception as error:  # compilers raise many kinds
                if is_out_of_memory(error):
                    raise
                self._fast = False
                warn_of(error)
        return self.compute(x, pixels)

    def compute(self, x: Tensor, pixels: str) -> Tensor:
        """A pass in torch's own steps, neither counted nor recorded."""
        config = self.network.info.network
        outlive_fork()
        with torch.inference_mode():
            x = x.permute(0, 3, 1, 2).float() if pixels == "uint8" else x * 255
            x = (x - (PIXEL_SHIFT if minds_ground(self.network) else x.mean(dim=(2, 3), keepdim=True).round())).to(self._dtype)  # whole numbers are exact
            height, width = x.shape[-2:]
            missing = [config.missing(width), config.missing(height)]
            if any(missing):
                x = F.pad(x, (0, missing[0], 0, missing[1]), mode="replicate")
            if config.start_padding:
                x = F.pad(x, [config.start_padding] * 4, mode="reflect")
            x = self._pad(0, x).contiguous(memory_format=self._layout)
            before: tuple[Tensor, int] = (x, 0)  # the input of the stage before, and by how much it is padded
            for stage, tensors, following in zip(self.network.stages, self._stages, [*self.network.stages[1:], None]):
                skip = (before[0], before[1] + stage.shave) if stage.skip else None
                before, x = (x, stage.padding), self._convolve(stage, tensors, x)
                padding = (following.padding, following.padding_mode) if following else (0, "constant")
                x = _norm(x, tensors["norm_weight"], tensors["norm_bias"], stage.relu, skip, *padding)
            x = x[..., :height, :width].float()
            if config.output == "tanh":
                x = 127.5 + 150 * torch.tanh(x)
            elif config.output == "sigmoid":
                x = 255 * torch.sigmoid(x)
            x = x.clamp_(0, 255)
            return x.round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous() if pixels == "uint8" else x / 255

    def _pad(self, index: int, x: Tensor, above: int | None = None, below: int | None = None) -> Tensor:
        """A tensor as a stage's convolution takes it."""
        stage = self.network.stages[index]
        if not stage.padding:
            return x
        sides = [stage.padding if side is None else side for side in (above, below)]
        return F.pad(x, [stage.padding] * 2 + sides, mode=stage.padding_mode, **({"value": stage.value} if stage.padding_mode == "constant" else {}))

    def _convolve(self, stage: Stage, tensors: dict[str, Tensor | None], x: Tensor) -> Tensor:
        """Of what is padded already."""
        if stage.transposed:
            return F.conv_transpose2d(x, tensors["weight"], tensors["bias"], stride=2, padding=1 + 2 * stage.padding)
        x = F.conv2d(x, tensors["weight"], tensors["bias"], stride=stage.stride)
        return F.pixel_shuffle(x, stage.shuffle) if stage.shuffle > 1 else x

    def stage(self, index, rows, gain, shift, above, below, statistics):
        self._last, self._recording = (), None  # whose memory nothing else may use
        outlive_fork()
        with torch.inference_mode():
            x = torch.from_numpy(rows).to(self._device)
            if gain is not None:
                gain, shift = (torch.from_numpy(array).to(self._device)[:, None, None] for array in (gain, shift))
                x = x * gain + shift
                x = x.relu_() if self.network.stages[index - 1].relu else x
            x = self._convolve(self.network.stages[index], self._stages[index], self._pad(index, x.to(self._dtype), above, below)).float()
            if not statistics:
                return (x.cpu().numpy(),)
            variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            return x.cpu().numpy(), mean.cpu().numpy(), variance.cpu().numpy()


def _with_grain(x: Tensor, pixels: str, grain: float) -> Tensor:
    """What ``run`` takes, with its grain."""
    if not grain:
        return x
    if pixels == "float":
        return with_grain(x * 255, grain) / 255
    return with_grain(x.permute(0, 3, 1, 2).float(), grain).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, relu: bool, skip: tuple[Tensor, int] | None, padding: int, mode: str) -> Tensor:
    """Norm, ReLU, sum with what is ``skip``, padding, step by step; without a ``weight`` there is no norm."""
    if weight is not None:
        x = F.instance_norm(x, weight=weight, bias=bias, eps=EPSILON)
    if relu:
        x = x.relu_()
    if skip:
        other, inset = skip
        x = x.add_(other[..., inset : other.shape[2] - inset, inset : other.shape[3] - inset])
    return F.pad(x, [padding] * 4, mode=mode) if padding else x
