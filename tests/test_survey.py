"""What a folder of photos holds, quickly from headers and thoroughly from pixels."""

import pytest
from conftest import synthetic_photo
from PIL import Image

from fastnst.data import DataConfig
from fastnst.survey import survey


@pytest.fixture
def mixed(tmp_path):
    """Six photos: sound, small, gray by mode, gray by content, truncated, and no picture at all."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    synthetic_photo(0, 80, 70).save(folder / "a_sound.jpg")
    synthetic_photo(1, 80, 31).save(folder / "b_small.png")
    synthetic_photo(2, 80, 70).convert("L").save(folder / "c_gray.png")
    synthetic_photo(3, 80, 70).convert("L").convert("RGB").save(folder / "d_gray.jpg")
    whole = (folder / "a_sound.jpg").read_bytes()
    (folder / "e_truncated.jpg").write_bytes(whole[:-300])
    (folder / "f_text.jpg").write_text("no picture")
    return folder


def names(found: list[str]) -> list[str]:
    return [text.split("/")[-1][0] for text in (entry.split(": ")[0].split(" (")[0] for entry in found)]


def test_headers_tell_size_mode_and_what_is_no_picture(mixed):
    seen = survey(sorted(mixed.iterdir()), DataConfig(content=mixed, crop_size=32))
    assert (names(seen.unreadable), names(seen.small), names(seen.gray)) == (["f"], ["b"], ["c"])
    assert (seen.found, seen.looked_at) == (6, 6)


def test_decoding_tells_the_truncated_and_the_gray_in_color(mixed):
    done = []
    seen = survey(sorted(mixed.iterdir()), DataConfig(content=mixed, crop_size=32), thorough=True, report=done.append)
    assert (names(seen.unreadable), names(seen.small), names(seen.gray)) == (["e", "f"], ["b"], ["c", "d"])
    assert done == [1, 2, 3, 4, 5, 6]
    text = str(seen)
    assert "6 found, every one looked at" in text and "2 cannot be read and will be skipped:\n" in text
    assert [line.split(":")[0].strip() for line in text.splitlines()[2:4]] == [str(mixed / "e_truncated.jpg"), str(mixed / "f_text.jpg")]
    assert "1 are smaller than data.crop_size 32 and will be scaled up" in text and "b_small.png (80x31)" in text and "2 are gray" in text


def test_of_many_photos_some_headers_are_read(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    seen = survey([tmp_path / "a.png"] * 1501, DataConfig(content=tmp_path, crop_size=32))
    assert (seen.found, seen.looked_at) == (1501, 376)  # every fourth: 500 at most


def test_a_folder_without_a_readable_photo_is_refused(mixed):
    with pytest.raises(OSError, match="data.content: none of the 1 photos looked at below .*mixed can be read; the first: .*f_text.jpg"):
        survey([mixed / "f_text.jpg"], DataConfig(content=mixed))
