"""What of a photo stays in its stylized picture: its colors, or a share of all of it. Numpy, or whatever does its arithmetic."""

from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

_LUMA = (0.299, 0.587, 0.114)  # of R, G, B (Rec. 601)
_ROWS = 64  # at once: a large picture's floats would take four times its memory


@dataclass(frozen=True)
class Blend:
    """``opacity`` of the stylized picture over the photo, 0 to 1; with ``keep_colors`` only its light and dark come through.

    As Gatys et al. 2016 ("Preserving color in neural artistic style transfer", luminance-only transfer): the photo's two channels of
    color stay. Raises ``ValueError`` for another opacity.
    """

    opacity: float = 1.0
    keep_colors: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.opacity, Real) or not 0 <= self.opacity <= 1:
            raise ValueError(f"opacity: got {self.opacity!r}, need a number from 0, the photo, to 1, the stylized picture")

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return bool(self.opacity < 1 or self.keep_colors)

    def __call__(self, photo: Any, stylized: Any) -> Any:
        """Floats ``(..., 3)``, arrays or tensors, of any range, which the result may leave where colors are kept."""
        change = stylized - photo
        if self.keep_colors:
            change = sum(weight * change[..., channel : channel + 1] for channel, weight in enumerate(_LUMA))
        return photo + self.opacity * change

    def tensors(self, photos: Any, stylized: Any) -> Any:
        """Tensors ``(N, 3, H, W)`` in [0, 1], both on one device -> the same."""
        return self(photos.permute(0, 2, 3, 1), stylized.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).clamp(0, 1).contiguous()

    def pictures(self, photos: np.ndarray, stylized: np.ndarray) -> np.ndarray:
        """uint8 ``(N, H, W, 3)``, both -> the same, in the place of ``stylized`` where that may be written to."""
        blended = np.require(stylized, requirements="W")
        for photo, picture in zip(photos, blended):
            for top in range(0, len(picture), _ROWS):
                rows = slice(top, top + _ROWS)
                picture[rows] = np.rint(np.clip(self(photo[rows].astype(np.float32), picture[rows].astype(np.float32)), 0, 255))
        return blended
