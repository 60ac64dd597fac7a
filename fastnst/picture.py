"""Picture file <-> upright sRGB picture of 8 bits, without torch.

Guards the convention at the door: orientation applied, colour profile converted to sRGB, alpha set apart, 16 bits,
palette, gray and CMYK read right.
"""

import io
import os
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError, features
from pydantic import Field, model_validator

from fastnst.config import Config
from fastnst.files import atomic_write
from fastnst.runtime import in_one_line

WRITABLE = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_FROM_PHONES, _PHONES_BRANDS = (".heic", ".heif"), (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")  # by name, and as files begin
READABLE = (*WRITABLE, ".gif", ".avif", *_FROM_PHONES)
MOST_PIXELS = 2**29  # of a picture: 1.6 GB in 8 bits; strips take so many
_WITH_ALPHA = (".png", ".webp", ".tif", ".tiff")


class ImageSize(Config):
    """Scale so that the long or the short side has so many pixels; neither: the size it has."""

    long_side: int | None = Field(None, ge=1, le=65_535)
    short_side: int | None = Field(None, ge=1, le=65_535)

    @model_validator(mode="after")
    def _one_side(self):
        if self.long_side and self.short_side:
            raise ValueError(f"got long_side {self.long_side} and short_side {self.short_side}; give one and set the other to null")
        return self

    def of(self, height: int, width: int) -> tuple[int, int]:
        """The scaled ``(height, width)``, at least 1 px each."""
        side = self.long_side or self.short_side
        if not side:
            return height, width
        scale = side / (max if self.long_side else min)(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))


def take_large_pictures() -> None:
    """Let Pillow open pictures of up to ``MOST_PIXELS`` in this process, without a warning: for commands. Whoever serves strangers keeps Pillow's own limit, a third of that."""
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # it warns of more, and refuses twice as many
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_rgb(path: str | Path, at_least: int | None = None) -> tuple[Image.Image, Image.Image | None]:
    """Decode ``path`` to an upright sRGB image of mode RGB, and its alpha of mode L where it has one.

    ``at_least`` lets JPEGs be decoded at a reduced scale whose sides are still that long, where speed counts.
    Raises ``FileNotFoundError``, or ``OSError`` naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir() and not os.access(path, os.R_OK):
        raise PermissionError(f"{path}: no permission to look into the folder")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, need an image file")
    is_heif = path.suffix.lower() in _FROM_PHONES
    try:
        # A stream, as Pillow maps a named, uncompressed TIFF into memory and then turns it wrongly.
        with open(path, "rb") as file:
            begin = file.peek(12)
            is_heif |= begin[4:8] == b"ftyp" and begin[8:12] in _PHONES_BRANDS  # many are sent on as .jpg
            if is_heif:
                _can_read_heif()
            with Image.open(file) as image:
                if at_least:
                    image.draft("RGB", (at_least, at_least))
                image.load()
                image = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"no image file at {path}") from None
    except UnidentifiedImageError:
        raise OSError(f"{path}: {_why_unreadable(path, is_heif)}") from None
    except PermissionError:
        raise PermissionError(f"{path}: no permission to read it") from None
    except Image.DecompressionBombError:
        raise OSError(f"{path}: more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} megapixels; make it smaller") from None
    except MemoryError as error:
        raise OSError(f"{path}: not enough memory to decode it") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... for damaged files
        raise OSError(f"{path}: damaged or unsupported image ({in_one_line(error)})") from error
    try:
        return to_rgb(image)
    except Exception as error:
        raise OSError(f"{path}: cannot convert {image.mode} pixels to RGB ({error})") from error


def _why_unreadable(path: Path, is_heif: bool) -> str:
    if path.stat().st_size == 0:
        return "the file is empty"
    if is_heif and not _can_read_heif():
        return "HEIC photos need pillow-heif: pip install 'fastnst[heic]', or convert them to JPEG"
    if path.suffix.lower() == ".avif" and not features.check("avif"):
        return "AVIF needs Pillow 11.3 or newer, with its support"
    return f"not an image that can be read (kinds: {', '.join(suffix[1:] for suffix in READABLE)})"


@cache
def _can_read_heif() -> bool:
    """Whether Pillow's plugin for HEIC is here; Pillow has it from then on."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    Image.init()  # then Pillow asks its own AVIF first, and hands on what begins likewise
    register_heif_opener()
    return True


def to_rgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """An image of any mode -> sRGB of mode RGB, and its alpha of mode L where it has one; not turned."""
    profile = image.info.get("icc_profile")
    alpha = None
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode[:-1] + "A")
    if (image.mode != "LAB" and "A" in image.getbands()) or "transparency" in image.info:
        base = "L" if image.mode in ("LA", "La", "L") else "RGB"  # gray stays gray for a gray profile
        alpha = image.convert("RGBA").getchannel("A")  # also palettes and a single transparent colour
        image = image.convert("RGBA").convert(base)
        if alpha.getextrema() == (255, 255):
            alpha = None
    if profile:
        image = _to_srgb(image, profile)
    return image.convert("RGB"), alpha


def _to_8_bit(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image).astype(np.float64))  # NaN, where nothing was measured, is black, and hides the brightness of no other pixel
    top = 255.0 if image.mode == "F" and 1 < values.max(initial=0) <= 255 else 1.0 if image.mode == "F" and values.max(initial=0) <= 1 else 65535.0
    return Image.fromarray(np.clip(values * (255.0 / top) + 0.5, 0, 255).astype(np.uint8), "L")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode not in ("RGB", "CMYK", "L", "LAB"):
            image = image.convert("RGB")
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image  # a broken profile, or one for other channels (a gray profile on colour): the pixels as they are


def save_picture(picture: Image.Image, path: str | Path, alpha: Image.Image | None = None, quality: int = 95) -> None:
    """Write a picture of mode RGB, atomically, in the format of the suffix.

    ``alpha``: mode L, kept where the format has it; JPEG and BMP show white where it is transparent.
    Raises ``ValueError`` for a suffix that cannot be written.
    """
    path = Path(path)
    check_writable(path)
    suffix = path.suffix.lower()
    if alpha is not None and suffix in _WITH_ALPHA:
        picture = Image.merge("RGBA", (*picture.split(), alpha))
    elif alpha is not None:
        picture = Image.composite(picture, Image.new("RGB", picture.size, "white"), alpha)
    options = {"quality": quality} if suffix in (".jpg", ".jpeg", ".webp") else {}
    if suffix in (".jpg", ".jpeg"):
        options["subsampling"] = 0  # strokes of saturated colour bleed with halved chroma
    with atomic_write(path) as temporary:
        try:
            with io.BufferedWriter(_WithoutDescriptor(temporary, "wb")) as file:
                picture.save(file, **options)
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise OSError(f"{path}: {picture.width}x{picture.height} pixels cannot be written as {suffix[1:]} ({error})") from error


class _WithoutDescriptor(io.FileIO):
    """A file for Pillow, which takes what a full disk cut short for written where it writes by the descriptor itself: half a JPEG."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


def check_writable(path: Path) -> None:
    """Raise ``ValueError`` unless the suffix of ``path`` is that of a format we write."""
    if path.suffix.lower() not in WRITABLE:
        raise ValueError(f"{path}: cannot write {path.suffix or 'a file without suffix'}; use one of {', '.join(WRITABLE)}")


def find_images(folder: str | Path) -> list[Path]:
    """Every file below ``folder`` with an image suffix, sorted by name; hidden files and folders are passed over, and pipes, which nobody may be writing to.

    Broken links, and folders below that may not be looked into, are among them, so that opening them tells. Raises ``PermissionError`` where ``folder`` may not.
    """
    found, seen = [], set()

    def keep(error: OSError) -> None:
        if isinstance(error, PermissionError):
            if Path(error.filename) == Path(folder):
                raise PermissionError(f"{folder}: no permission to look into the folder")
            found.append(Path(error.filename))

    for root, folders, names in os.walk(folder, followlinks=True, onerror=keep):
        if os.path.realpath(root) in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders[:] = [name for name in folders if not name.startswith(".")]
        pictures = [Path(root, name) for name in names if not name.startswith(".") and name.lower().endswith(READABLE)]
        found += [path for path in pictures if os.path.isfile(path) or not os.path.exists(path)]
    return sorted(found)


def count_kinds(folder: str | Path) -> str:
    """What lies below ``folder``, for messages: ``"3 .txt, 1 .json"`` or ``"no files"``."""
    kinds: dict[str, int] = {}
    for _, _, names in os.walk(folder):
        for name in names:
            suffix = Path(name).suffix.lower() or "without suffix"
            kinds[suffix] = kinds.get(suffix, 0) + 1
    most_first = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in most_first[:8]) or "no files"
