"""Any picture file comes in as upright sRGB in [0, 1]; what goes out is rounded and whole."""

import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import synthetic_photo
from PIL import Image, ImageCms, features

from fastnst.config import ConfigError, validate_config
from fastnst.image import load_image, save_image
from fastnst.picture import ImageSize, _can_read_heif, check_writable, count_kinds, find_images, open_rgb, save_picture


def pixels(path) -> np.ndarray:
    return np.asarray(open_rgb(path)[0])


def solid(color, mode: str = "RGB", size=(8, 6)) -> Image.Image:
    return Image.new(mode, size, color)


def icc_profile(space: bytes, **tags: bytes) -> bytes:
    """A minimal version 2 display profile (ICC.1:2001-04)."""
    tags = {"wtpt": icc_xyz(0.9642, 1.0, 0.8249), "cprt": b"text\0\0\0\0none\0\0\0\0"} | tags
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name.encode(), offset + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s12s4s", offset + len(body), b"lcms", 0x02100000, b"mntr", space, b"XYZ ", b"\0" * 12, b"acsp")
    header = header.ljust(68, b"\0") + icc_xyz(0.9642, 1.0, 0.8249)[8:]
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def icc_xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(value * 65536) for value in (x, y, z)))


def icc_gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def rgb_profile(red, green, blue) -> bytes:
    gamma = icc_gamma(2.2)
    return icc_profile(b"RGB ", rXYZ=icc_xyz(*red), gXYZ=icc_xyz(*green), bXYZ=icc_xyz(*blue), rTRC=gamma, gTRC=gamma, bTRC=gamma)


# Primaries relative to D50, as the published profiles store them.
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
LINEAR_GRAY = icc_profile(b"GRAY", kTRC=icc_gamma(1.0))

STORED = [[1, 2], [3, 4], [5, 6]]
UPRIGHT = {
    1: STORED,
    2: [[2, 1], [4, 3], [6, 5]],  # mirrored left to right
    3: [[6, 5], [4, 3], [2, 1]],  # turned by 180 degrees
    4: [[5, 6], [3, 4], [1, 2]],  # mirrored top to bottom
    5: [[1, 3, 5], [2, 4, 6]],  # transposed
    6: [[5, 3, 1], [6, 4, 2]],  # to be turned clockwise
    7: [[6, 4, 2], [5, 3, 1]],  # transposed along the other diagonal
    8: [[2, 4, 6], [1, 3, 5]],  # to be turned counterclockwise
}


@pytest.mark.parametrize("suffix", [".heic", pytest.param(".avif", marks=pytest.mark.skipif(not features.check("avif"), reason="AVIF comes with Pillow 11.3"))])
def test_photos_of_phones_are_read_upright_and_in_srgb(tmp_path, suffix):
    if suffix == ".heic":
        pytest.importorskip("pillow_heif", reason="needs pillow-heif: pip install 'fastnst[heic]'").register_heif_opener()
    photo = Image.new("RGB", (64, 48), (200, 0, 0))
    photo.paste((0, 0, 200), (0, 0, 32, 48))  # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter: what is on the left goes to the top
    photo.save(tmp_path / f"photo{suffix}", quality=95, exif=exif.tobytes(), icc_profile=rgb_profile(*DISPLAY_P3))
    found = pixels(tmp_path / f"photo{suffix}").astype(int)
    assert found.shape == (64, 48, 3)
    # 200/255 to the power of 2.2 is 0.586; Display P3's red of that is 1.2249 x 0.586 = 0.718 of sRGB's, a level of 220; its blue 1.0982 x 0.586, 209
    assert np.abs(found[50, 24] - (220, 0, 0)).max() <= 6
    assert np.abs(found[14, 24] - (0, 0, 209)).max() <= 6
    assert find_images(tmp_path) == [tmp_path / f"photo{suffix}"]


def test_a_photo_of_a_phone_is_known_by_how_it_begins(tmp_path):
    """In a process of its own: Pillow knows the plugin in this one by now."""
    pytest.importorskip("pillow_heif", reason="needs pillow-heif: pip install 'fastnst[heic]'").register_heif_opener()
    solid((200, 0, 0), size=(64, 48)).save(tmp_path / "a.heic")
    (tmp_path / "a.heic").rename(tmp_path / "a.jpg")  # as many are sent on
    script = "import sys; from fastnst.picture import open_rgb; print(open_rgb(sys.argv[1])[0].size)"
    for hide, code, told in (("", 0, "(64, 48)"), ("import sys; sys.modules['pillow_heif'] = None; ", 1, "a.jpg: HEIC photos need pillow-heif")):
        ended = subprocess.run([sys.executable, "-c", hide + script, str(tmp_path / "a.jpg")], capture_output=True, text=True)
        assert ended.returncode == code and told in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    "error, told", [(MemoryError(), "not enough memory to decode it"), (OSError("points to\nposition 379\n"), r"damaged or unsupported image \(points to position 379\)")]
)
def test_what_decoders_raise_is_one_line(tmp_path, monkeypatch, error, told):
    solid(0).save(tmp_path / "a.png")

    def fails(*_):
        raise error

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(OSError, match=rf"a\.png: {told}$"):
        open_rgb(tmp_path / "a.png")


def test_a_photo_of_a_phone_tells_what_reads_it(tmp_path, monkeypatch):
    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(bytes(100))  # which the plugin, of which another test may have told Pillow, does not take for its own
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    _can_read_heif.cache_clear()
    with pytest.raises(OSError, match=r"IMG_1.HEIC: HEIC photos need pillow-heif: pip install 'fastnst\[heic\]', or convert"):
        open_rgb(path)
    _can_read_heif.cache_clear()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_is_applied_once(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.array(STORED, dtype=np.uint8) * 40).save(path, exif=exif)
    assert (pixels(path)[..., 0] // 40).tolist() == UPRIGHT[orientation]


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_alpha_is_set_apart_and_colors_are_not_premultiplied(tmp_path, name):
    picture = Image.merge("RGBA", [*solid((200, 100, 50)).split(), solid(128, "L")])
    picture.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    image, alpha = open_rgb(tmp_path / name)
    assert (image.mode, image.getpixel((3, 3))) == ("RGB", (200, 100, 50))
    assert (alpha.mode, alpha.getpixel((3, 3)), alpha.size) == ("L", 128, image.size)


def test_opaque_alpha_counts_as_none(tmp_path):
    solid((1, 2, 3, 255), "RGBA").save(tmp_path / "a.png")
    assert open_rgb(tmp_path / "a.png")[1] is None


def test_gray_with_alpha(tmp_path):
    solid((90, 30), "LA").save(tmp_path / "a.png")
    image, alpha = open_rgb(tmp_path / "a.png")
    assert (image.getpixel((0, 0)), alpha.getpixel((0, 0))) == ((90, 90, 90), 30)


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_palette_with_a_transparent_color(tmp_path, name):
    picture = Image.new("P", (4, 2), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / name, transparency=0)
    image, alpha = open_rgb(tmp_path / name)
    assert image.getpixel((3, 1)) == (10, 200, 30)
    assert [alpha.getpixel(at) for at in ((0, 0), (3, 1))] == [0, 255]


@pytest.mark.parametrize("mode, color, transparent, expected", [("RGB", (9, 8, 7), (9, 8, 7), (9, 8, 7)), ("L", 70, 70, (70, 70, 70))])
def test_a_single_transparent_color_becomes_alpha(tmp_path, mode, color, transparent, expected):
    solid(color, mode).save(tmp_path / "a.png", transparency=transparent)
    image, alpha = open_rgb(tmp_path / "a.png")
    assert image.getpixel((0, 0)) == expected
    assert alpha.getpixel((0, 0)) == 0


def test_animated_gif_gives_its_first_frame(tmp_path):
    solid((255, 0, 0)).save(tmp_path / "a.gif", save_all=True, append_images=[solid((0, 0, 255))])
    assert pixels(tmp_path / "a.gif")[0, 0].tolist() == [255, 0, 0]


def test_cmyk_jpeg(tmp_path):
    solid((0, 255, 255, 0), "CMYK").save(tmp_path / "a.jpg", quality=100)  # full magenta and yellow: red
    red, green, blue = pixels(tmp_path / "a.jpg")[3, 3]
    assert red > 240 and green < 15 and blue < 15


# 257 = 65535 / 255; 25828 / 257 = 100.498, 25829 / 257 = 100.502
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_gray_is_scaled_and_rounded(tmp_path, suffix):
    Image.fromarray(np.array([[0, 257, 25828, 25829, 65535]], dtype=np.uint16)).save(tmp_path / f"a{suffix}")
    assert pixels(tmp_path / f"a{suffix}")[0, :, 1].tolist() == [0, 1, 100, 101, 255]


def test_16_bit_gray_with_a_transparent_level(tmp_path):
    Image.fromarray(np.array([[257, 25700]], dtype=np.uint16)).save(tmp_path / "a.png", transparency=257)
    assert pixels(tmp_path / "a.png")[0, :, 0].tolist() == [1, 100]


@pytest.mark.parametrize("values, expected", [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 100.0, 255.0], [0, 100, 255]), ([float("nan"), 0.5, 1.0], [0, 128, 255])])
def test_float_tiff_in_either_range(tmp_path, values, expected):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "a.tif")
    assert pixels(tmp_path / "a.tif")[0, :, 0].tolist() == expected


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_1_bit(tmp_path, suffix):
    picture = solid(0, "1")
    picture.putpixel((2, 1), 1)
    picture.save(tmp_path / f"a{suffix}")
    assert pixels(tmp_path / f"a{suffix}")[1, 1:4].tolist() == [[0] * 3, [255] * 3, [0] * 3]


def test_wide_gamut_profile_makes_colors_more_saturated_in_srgb(tmp_path):
    solid((200, 100, 100)).save(tmp_path / "a.png", icc_profile=rgb_profile(*DISPLAY_P3))
    red, green, blue = pixels(tmp_path / "a.png")[0, 0]
    # (200, 100, 100) in Display P3 lies at about (212, 95, 97) in sRGB.
    assert 207 <= red <= 217 and 89 <= green < 100 and 90 <= blue < 100


def test_profile_with_swapped_primaries_swaps_the_colors(tmp_path):
    red, green, blue = SRGB
    solid((220, 30, 30)).save(tmp_path / "a.png", icc_profile=rgb_profile(green, red, blue))
    assert np.abs(pixels(tmp_path / "a.png")[0, 0].astype(int) - [30, 220, 30]).max() <= 6


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_profile_is_applied_to_every_kind_of_color(tmp_path, mode):
    red, green, blue = SRGB
    solid((220, 30, 30)).convert(mode).save(tmp_path / "a.png", icc_profile=rgb_profile(green, red, blue))
    assert pixels(tmp_path / "a.png")[0, 0, 1] > 200


def test_srgb_profile_changes_nothing(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    solid((12, 120, 230)).save(tmp_path / "a.png", icc_profile=profile)
    assert np.abs(pixels(tmp_path / "a.png")[0, 0].astype(int) - [12, 120, 230]).max() <= 1


@pytest.mark.parametrize("mode, color", [("L", 55), ("LA", (55, 128)), ("I;16", 55 * 257)])
def test_gray_profile_is_applied(tmp_path, mode, color):
    # Linear 55 / 255 = 0.2157 is 1.055 * 0.2157 ** (1 / 2.4) - 0.055 = 0.5020 in sRGB: 128.
    solid(color, mode).save(tmp_path / "a.png", icc_profile=LINEAR_GRAY)
    assert np.abs(pixels(tmp_path / "a.png")[0, 0].astype(int) - 128).max() <= 2


@pytest.mark.parametrize(
    "mode, color, profile", [("RGB", (10, 120, 230), LINEAR_GRAY), ("RGB", (10, 120, 230), b"nonsense"), ("L", 70, rgb_profile(*SRGB))]
)
def test_unfit_profile_leaves_the_colors_as_they_are(tmp_path, mode, color, profile):
    solid(color, mode).save(tmp_path / "a.png", icc_profile=profile)
    assert pixels(tmp_path / "a.png")[0, 0].tolist() == (list(color) if mode == "RGB" else [color] * 3)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".bmp"])
def test_truncated_file_is_named(tmp_path, suffix):
    path = tmp_path / f"broken{suffix}"
    synthetic_photo(1).save(path)
    path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(OSError, match=f"broken\\{suffix}: "):
        open_rgb(path)


@pytest.mark.parametrize(
    "data, reason", [(b"", "the file is empty"), (b"hello, world\n" * 20, "not an image that can be read"), (b"\xff\xd8\xff", "")]
)
def test_no_picture_at_all_is_named(tmp_path, data, reason):
    path = tmp_path / "notes.jpg"
    path.write_bytes(data)
    with pytest.raises(OSError, match=f"notes\\.jpg: .*{reason}"):
        open_rgb(path)


def png_header(width: int, height: int) -> bytes:
    """What says the size of a picture, and no pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)


def test_a_picture_of_too_many_pixels_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**28)  # as commands set it
    (tmp_path / "a.png").write_bytes(png_header(30_000, 20_000))
    with pytest.raises(OSError, match=r"a\.png: more than 536 megapixels; make it smaller$"):
        open_rgb(tmp_path / "a.png")


@pytest.mark.parametrize("height", [9_500, 23_000])  # 95 and 230 megapixels: Pillow warns of the one and refuses the other
def test_commands_open_large_pictures_without_a_warning(tmp_path, height):
    (tmp_path / "a.png").write_bytes(png_header(10_000, height))
    looking = f"from fastnst.cli import run; from PIL import Image; run(lambda _: print(Image.open({str(tmp_path / 'a.png')!r}).size))"
    done = subprocess.run([sys.executable, "-c", looking], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"(10000, {height})\n", "")


def test_who_imports_us_keeps_pillow_s_limit():
    looking = "from PIL import Image; before = Image.MAX_IMAGE_PIXELS; import fastnst.stylize, fastnst.cli; print(before == Image.MAX_IMAGE_PIXELS)"
    assert subprocess.run([sys.executable, "-c", looking], capture_output=True, text=True).stdout == "True\n"


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image file at .*gone.png"):
        open_rgb(tmp_path / "gone.png")


def test_folder_is_named(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder, need an image file"):
        open_rgb(tmp_path)


def test_at_least_decodes_a_jpeg_smaller_but_not_too_small(tmp_path):
    synthetic_photo(1, 400, 300).save(tmp_path / "a.jpg")
    assert open_rgb(tmp_path / "a.jpg", at_least=100)[0].size == (200, 150)  # a quarter would be 75 px high
    assert open_rgb(tmp_path / "a.jpg")[0].size == (400, 300)


def test_uppercase_suffix_is_written(tmp_path):
    save_image(torch.zeros(1, 3, 4, 4), tmp_path / "A.JPG")
    assert pixels(tmp_path / "A.JPG").max() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of a file's size")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tif"])
def test_a_disk_that_gets_full_leaves_no_half_of_a_picture(tmp_path, suffix):
    """The system writes what fits and calls that no error before the next byte; Pillow, by itself, asks for no next one."""
    import resource

    path, limits = tmp_path / f"a{suffix}", resource.getrlimit(resource.RLIMIT_FSIZE)
    save_picture(synthetic_photo(0, 80, 64), path)
    size = path.stat().st_size
    path.write_text("before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, limits[1]))
    try:
        with pytest.raises(OSError, match=f"cannot write {path}"):
            save_picture(synthetic_photo(0, 80, 64), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "before" and os.listdir(tmp_path) == [path.name]


def test_jpeg_keeps_full_chroma_resolution(tmp_path):
    stripes = torch.zeros(1, 3, 16, 16)
    stripes[:, 0, :, ::2] = 1
    stripes[:, 2, :, 1::2] = 1  # columns red, blue, red, ...: halved chroma would make them purple
    save_image(stripes, tmp_path / "a.jpg")
    assert (load_image(tmp_path / "a.jpg") - stripes).abs().mean() < 0.1


def test_quality_changes_the_size(tmp_path):
    for quality in (30, 95):
        save_picture(synthetic_photo(3), tmp_path / f"{quality}.jpg", quality=quality)
    assert (tmp_path / "30.jpg").stat().st_size < (tmp_path / "95.jpg").stat().st_size / 2


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_alpha_is_kept_where_the_format_has_it(tmp_path, suffix):
    save_picture(solid((51, 51, 51)), tmp_path / f"a{suffix}", alpha=solid(102, "L"))
    _, alpha = open_rgb(tmp_path / f"a{suffix}")
    assert alpha.getpixel((1, 1)) == 102  # 0.4 * 255


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
def test_transparent_is_white_where_the_format_has_no_alpha(tmp_path, suffix):
    alpha = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 8, axis=1).repeat(16, axis=0))
    save_picture(solid((0, 0, 0), size=(16, 16)), tmp_path / f"a{suffix}", alpha)
    result = pixels(tmp_path / f"a{suffix}")
    assert result[:, :7].min() > 242 and result[:, 9:].max() < 13


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_image(torch.zeros(1, 3, 4, 4), path)
    before = path.read_bytes()

    def half_a_save(self, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half_a_save)
    with pytest.raises(OSError, match="cannot write .*a.png: No space left"):
        save_image(torch.ones(1, 3, 4, 4), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("suffix, width", [(".webp", 16400), (".jpg", 65600)])
def test_picture_too_large_for_its_format_is_named(tmp_path, suffix, width):
    with pytest.raises(OSError, match=f"big\\{suffix}: {width}x1 pixels cannot be written as {suffix[1:]}"):
        save_image(torch.zeros(1, 3, 1, width), tmp_path / f"big{suffix}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name, got", [("a.gif", r"\.gif"), ("a.txt", r"\.txt"), ("a", "a file without suffix")])
def test_suffix_that_cannot_be_written_is_refused(tmp_path, name, got):
    with pytest.raises(ValueError, match=rf"cannot write {got}; use one of \.jpg"):
        check_writable(tmp_path / name)
    with pytest.raises(ValueError, match="cannot write"):
        save_image(torch.zeros(1, 3, 4, 4), tmp_path / name)


@pytest.mark.parametrize(
    "size, before, after",
    [
        (ImageSize(), (30, 40), (30, 40)),
        (ImageSize(long_side=20), (30, 40), (15, 20)),
        (ImageSize(short_side=60), (30, 40), (60, 80)),
        (ImageSize(long_side=512), (333, 500), (341, 512)),  # 333 * 512 / 500 = 340.99
        (ImageSize(long_side=10), (1, 1000), (1, 10)),  # never 0 px
    ],
)
def test_image_size(size, before, after):
    assert size.of(*before) == after


def test_both_sides_are_refused():
    with pytest.raises(ConfigError, match="long_side 4 and short_side 5; give one"):
        validate_config(ImageSize, {"long_side": 4, "short_side": 5})


def test_find_images_goes_deep_sorts_and_passes_over_the_rest(tmp_path):
    for name in ("b.PNG", "a.jpg", "sub/c.webp", "notes.txt", ".hidden.png", ".cache/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == ["a.jpg", "b.PNG", "sub/c.webp"]


def test_find_images_survives_a_link_to_a_folder_above(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").touch()
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    assert len(find_images(tmp_path)) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes in folders")
def test_find_images_passes_over_pipes_but_not_broken_links(tmp_path):
    (tmp_path / "a.jpg").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, target in (("b.jpg", "a.jpg"), ("broken.jpg", "gone.jpg"), ("to_pipe.jpg", "pipe.jpg")):
        (tmp_path / name).symlink_to(target)
    assert [path.name for path in find_images(tmp_path)] == ["a.jpg", "b.jpg", "broken.jpg"]


@pytest.fixture
def forbidden(tmp_path, monkeypatch):
    """``sub``, a folder beside ``a.jpg``, and ``b.jpg``, a file, without permission: to root, too."""
    for name in ("a.jpg", "b.jpg", "sub/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        synthetic_photo(1).save(tmp_path / name)

    def unless_forbidden(act):
        def attempt(path, *args, **kwargs):
            if str(path).endswith(("sub", "b.jpg")):
                raise PermissionError(13, "Permission denied", str(path))
            return act(path, *args, **kwargs)

        return attempt

    monkeypatch.setattr(os, "scandir", unless_forbidden(os.scandir))
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).endswith("sub"))
    monkeypatch.setattr("fastnst.picture.open", unless_forbidden(open), raising=False)
    return tmp_path


def test_what_may_not_be_read_is_found_and_named(forbidden):
    found = find_images(forbidden)
    assert [path.name for path in found] == ["a.jpg", "b.jpg", "sub"]
    with pytest.raises(PermissionError, match=r"b\.jpg: no permission to read it"):
        open_rgb(found[1])
    for act in (open_rgb, find_images):
        with pytest.raises(PermissionError, match="sub: no permission to look into the folder"):
            act(found[2])


def test_count_kinds(tmp_path):
    assert count_kinds(tmp_path) == "no files"
    for name in ("a.txt", "b.TXT", "c.json", "README"):
        (tmp_path / name).touch()
    assert count_kinds(tmp_path) == "2 .txt, 1 .json, 1 without suffix"
