"""Convolutions of 8-bit numbers: what the numbers stand for, found without any picture. Numpy only."""

from dataclasses import dataclass

import numpy as np

from fastnst.stages import EPSILON, Stage, StagedNetwork

_DEVIATIONS = 12.0
_FLOAT_BLOCKS = 2


@dataclass(frozen=True)
class EightBits:
    """What the 8-bit numbers of a convolution stand for: ``q`` of its input for ``scale * (q - zero)``, those of its ``weight`` for themselves
    times ``weight_scales``, one for each output channel, which lie along ``axis``."""

    scale: np.float32
    zero: np.uint8
    weight: np.ndarray
    weight_scales: np.ndarray
    axis: int


def eight_bits(network: StagedNetwork, blocks_alone: bool) -> list[EightBits | None]:
    """For each stage; None for those left in floats: all before the third residual block and, with ``blocks_alone``, all behind the last.

    What is rounded early, the stages behind it make larger, in photos with flat areas most: 8 bits in all blocks gave 50 to 52 dB on the whole,
    but 42 to 44 for one photo of ten; from the third block on it is 52 to 53, and 47 at least. Behind the blocks they save no time beside
    bfloat16, and take more memory; beside float32 they do save time. Raises ``ValueError`` where there are other norms than instance norms, or no such block.
    """
    config = network.info.network
    stem = 2 if config.stem == "half" else 3
    begin = stem + 2 * min(_FLOAT_BLOCKS, config.residual_blocks)
    end = stem + 2 * config.residual_blocks if blocks_alone else len(network.stages)
    spans = _input_ranges(network)
    if begin == end:
        raise ValueError(f"--precision int8 is for networks of more than {_FLOAT_BLOCKS} residual blocks, got {config.residual_blocks}; use --precision auto")
    return [_eight_bits(stage, *spans[index - 1]) if begin <= index < end else None for index, stage in enumerate(network.stages)]


def _input_ranges(network: StagedNetwork) -> list[tuple[float, float]]:
    """Between what the input of each stage but the first lies, but for rare outliers: what 8 bits are to span.

    An instance norm leaves channels of known mean and deviation: ``norm_bias`` and ``norm_weight``; sums of blocks add up, taken as
    independent. Twelve deviations: with eight the shipped styles' pictures are 1 dB closer on the whole, but where a photo has outliers
    they are off by up to 34 levels instead of 15. A few things on a plain ground, such as a line of text or a moon, lie 25 to 50 deviations off,
    and are cut off: 33 to 45 dB, which is why ``auto`` is not int8.
    """
    ranges, outputs = [], []
    for stage in network.stages[:-1]:
        if stage.norm_weight is None:
            raise ValueError("--precision int8 needs a network with instance norm; use --precision auto")
        mean, deviation = stage.norm_bias, np.abs(stage.norm_weight)
        if stage.skip:
            before, spread = outputs[-2]
            mean, deviation = mean + before, np.sqrt(deviation**2 + spread**2)
        low = 0.0 if stage.relu else float((mean - _DEVIATIONS * deviation).min())
        ranges.append((low, max(float((mean + _DEVIATIONS * deviation).max()), low + EPSILON)))
        outputs.append((np.maximum(mean, 0) if stage.relu else mean, deviation))
    return ranges


def _eight_bits(stage: Stage, low: float, high: float) -> EightBits:
    """The input's of all channels together, the weight's of each output channel apart."""
    axis = 1 if stage.transposed else 0
    largest = np.abs(stage.weight).max(axis=tuple(other for other in range(4) if other != axis), keepdims=True)
    scales = np.maximum(largest / 127, 1e-12).astype(np.float32)
    zero = np.uint8(np.clip(round(-255 * low / (high - low)), 0, 255))
    return EightBits(np.float32((high - low) / 255), zero, np.round(stage.weight / scales).astype(np.int8), scales.ravel(), axis)
