"""What of a photo stays in its stylized picture: its colors, a share of all of it, what a mask leaves out. Numpy, or whatever does its arithmetic."""

from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastnst.picture import open_rgb

_LUMA = (0.299, 0.587, 0.114)  # of R, G, B (Rec. 601)
_ROWS = 64  # at once: a large picture's floats would take four times its memory


@dataclass(frozen=True, eq=False)
class Blend:
    """``opacity`` of the stylized picture over the photo, 0 to 1; with ``keep_colors`` only its light and dark come through.

    As Gatys et al. 2016 ("Preserving color in neural artistic style transfer", luminance-only transfer): the photo's two channels of
    color stay. ``mask``, uint8 ``(H, W)``, is scaled to each photo: 255 takes the style, 0 leaves the photo as it is. Raises ``ValueError`` for another opacity or mask.
    """

    opacity: float = 1.0
    keep_colors: bool = False
    mask: np.ndarray | None = None
    _scaled: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, init=False, repr=False)  # to the size of the last photo

    def __post_init__(self) -> None:
        if not isinstance(self.opacity, Real) or not 0 <= self.opacity <= 1:
            raise ValueError(f"opacity: got {self.opacity!r}, need a number from 0, the photo, to 1, the stylized picture")
        if self.mask is not None and (not isinstance(self.mask, np.ndarray) or self.mask.dtype != np.uint8 or self.mask.ndim != 2 or not self.mask.size):
            raise ValueError(f"mask: got {getattr(self.mask, 'dtype', type(self.mask).__name__)} of shape {np.shape(self.mask)}, need a numpy array of uint8, (H, W)")
        if self.mask is not None:
            object.__setattr__(self, "mask", self.mask.copy())  # what is scaled of it is kept

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return bool(self.opacity < 1 or self.keep_colors or self.mask is not None)

    def __call__(self, photo: Any, stylized: Any, share: Any = 1.0) -> Any:
        """Floats ``(..., 3)``, arrays or tensors, of any range, which the result may leave where colors are kept. ``share``: the mask there, ``(..., 1)`` of 0 to 1."""
        change = stylized - photo
        if self.keep_colors:
            change = sum(weight * change[..., channel : channel + 1] for channel, weight in enumerate(_LUMA))
        return photo + self.opacity * share * change

    def tensors(self, photos: Any, stylized: Any) -> Any:
        """Tensors ``(N, 3, H, W)`` in [0, 1], both on one device -> the same."""
        share = 1.0 if self.mask is None else photos.new_tensor(self._mask_of(*photos.shape[2:]).astype(np.float32) / 255)[..., None]
        return self(photos.permute(0, 2, 3, 1), stylized.permute(0, 2, 3, 1), share).permute(0, 3, 1, 2).clamp(0, 1).contiguous()

    def pictures(self, photos: np.ndarray, stylized: np.ndarray) -> np.ndarray:
        """uint8 ``(N, H, W, 3)``, both -> the same, in the place of ``stylized`` where that may be written to."""
        blended = np.require(stylized, requirements="W")
        mask = None if self.mask is None else self._mask_of(*photos.shape[1:3])
        for photo, picture in zip(photos, blended):
            for top in range(0, len(picture), _ROWS):
                rows = slice(top, top + _ROWS)
                share = 1.0 if mask is None else mask[rows, :, None].astype(np.float32) / 255
                picture[rows] = np.rint(np.clip(self(photo[rows].astype(np.float32), picture[rows].astype(np.float32), share), 0, 255))
        return blended

    def _mask_of(self, height: int, width: int) -> np.ndarray:
        scaled = self._scaled.get((height, width))  # the frames of a video are of one size
        if scaled is None:
            scaled = np.asarray(Image.fromarray(self.mask).resize((width, height), Image.Resampling.BILINEAR))
            self._scaled.clear()
            self._scaled[height, width] = scaled
        return scaled


def read_mask(path: str | Path) -> np.ndarray:
    """``Blend.mask`` of a picture file: its alpha where it has one, so that what is opaque takes the style, else how light it is. Raises as ``open_rgb``."""
    picture, alpha = open_rgb(path)
    return np.asarray(picture.convert("L") if alpha is None else alpha)
