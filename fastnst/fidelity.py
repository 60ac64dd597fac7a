"""How far pictures are from those of float32."""

from dataclasses import replace

import numpy as np

from fastnst.eight_bits import eight_bits
from fastnst.engine import TorchEngine
from fastnst.stages import StagedNetwork

_EQUAL = 99.0  # dB, where two pictures do not differ


def psnr(output: np.ndarray, reference: np.ndarray) -> float | None:
    """dB between pictures of 0..255; None where they are equal."""
    error = float(np.mean((output.astype(np.float64) - reference) ** 2))
    return float(10 * np.log10(255**2 / error)) if error else None


def int8_psnr(network: StagedNetwork, pictures: np.ndarray) -> float:
    """The lowest PSNR, in dB, of what 8-bit convolutions make of ``pictures``, ``(N, H, W, 3)`` uint8, one by one.

    Computed on the CPU in float32 with all numbers rounded as the engines that multiply 8-bit numbers round them, so that none need be
    installed; in all stages that may be in 8 bits, the most that any CPU is given. Raises ``ValueError`` without instance norm.
    """
    exact, rounded = TorchEngine(network, "cpu", "float32"), _Rounded(network)
    found = [psnr(rounded.run(picture), exact.run(picture)) for picture in pictures[:, None]]
    return min(_EQUAL if one is None else one for one in found)


class _Rounded(TorchEngine):
    """Computes in float32 what 8-bit numbers stand for."""

    def __init__(self, network: StagedNetwork) -> None:
        numbers = eight_bits(network, blocks_alone=False)
        stages = [stage if one is None else replace(stage, weight=one.rounded_weight()) for stage, one in zip(network.stages, numbers)]
        super().__init__(replace(network, stages=tuple(stages)), "cpu", "float32")
        self._numbers = {id(stage): one for stage, one in zip(stages, numbers)}

    def _convolve(self, stage, tensors, x):
        numbers = self._numbers[id(stage)]
        if numbers is not None:
            scale, zero = float(numbers.scale), int(numbers.zero)
            x = ((x / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)
        return super()._convolve(stage, tensors, x)
