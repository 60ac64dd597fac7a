"""Crop number ``position`` is a pure function of seed and position; every photo is seen once an epoch."""

import json
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import synthetic_photo
from PIL import Image

from fastnst.config import ConfigError, validate_config
from fastnst.data import DataConfig, PhotoStream, crop, default_workers, keep_photos, list_photos, load_validation, prepare, training_batches


def config(folder, **options) -> DataConfig:
    return DataConfig(**{"content": folder, "crop_size": 32, "workers": 0} | options)


def stream(folder: Path, seed: int = 7, **options) -> PhotoStream:
    settings = config(folder, **options)
    return PhotoStream(list_photos(settings).train, settings, seed)


def crops(source: PhotoStream, start: int, batch_size: int, steps: int) -> torch.Tensor:
    with training_batches(source, start, batch_size, steps) as batches:
        return torch.cat([images for images, _ in batches])


@pytest.fixture
def grays(tmp_path) -> Path:
    """Nine photos of one gray level each, by which a crop tells its photo: 10, 20, ... 90."""
    folder = tmp_path / "grays"
    folder.mkdir()
    for index in range(1, 10):
        Image.new("RGB", (40, 36), (10 * index,) * 3).save(folder / f"{index}.png")
    return folder


def ramp(width: int = 256, height: int = 256) -> Image.Image:
    """Black on the left to white on the right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, width).round().astype(np.uint8), (height, 1))).convert("RGB")


def columns(image: Image.Image | torch.Tensor) -> np.ndarray:
    pixels = image[0] if isinstance(image, torch.Tensor) else np.asarray(image)[:, :, 0]
    return np.asarray(pixels)[16].astype(int)


def cut_from(image: Image.Image, *rest) -> torch.Tensor:
    return crop(torch.from_numpy(np.array(image)), *rest)


# The smallest square, in the upper left corner.
SMALLEST = SimpleNamespace(uniform=lambda low, high: low, random=lambda: 1.0)


def test_position_alone_determines_the_crop(photos):
    first, second = stream(photos), stream(photos)
    backwards = {position: second[position][0] for position in reversed(range(30))}
    assert all(torch.equal(first[position][0], backwards[position]) for position in range(30))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_crops(photos, workers):
    assert torch.equal(crops(stream(photos), 0, 3, 5), crops(stream(photos, workers=workers), 0, 3, 5))


def test_starting_later_continues_the_uninterrupted_stream(photos):
    whole = crops(stream(photos), 0, 4, 6)  # 24 crops: across two epochs
    assert torch.equal(crops(stream(photos), 12, 4, 3), whole[12:])


def test_batch_size_only_groups_the_stream(photos):
    assert torch.equal(crops(stream(photos), 0, 2, 6), crops(stream(photos), 0, 6, 2))


def test_no_steps_left_gives_no_batches(photos):
    with training_batches(stream(photos), 10, 2, 0) as batches:
        assert list(batches) == []


def test_batches_are_uint8_crops(photos):
    with training_batches(stream(photos), 0, 3, 1) as batches:
        images, unreadable = next(batches)
    assert (images.shape, images.dtype, unreadable) == ((3, 3, 32, 32), torch.uint8, [])


def test_another_seed_gives_other_crops(photos):
    assert not torch.equal(crops(stream(photos, seed=1), 0, 6, 1), crops(stream(photos, seed=2), 0, 6, 1))


def levels(source: PhotoStream, start: int, count: int) -> list[int]:
    return [int(source[position][0][0, 0, 0]) for position in range(start, start + count)]


def test_each_epoch_covers_every_photo_once_in_a_new_order(grays):
    source = stream(grays)
    epochs = [levels(source, 9 * epoch, 9) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(10, 100, 10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_without_shuffle_the_order_is_that_of_the_names(grays):
    assert levels(stream(grays, shuffle=False), 0, 12) == [*range(10, 100, 10), 10, 20, 30]


def test_unreadable_photo_is_replaced_and_named(grays):
    source = stream(grays, shuffle=False)
    (grays / "3.png").write_bytes(b"")
    assert levels(source, 2, 1) == [40]
    _, messages = source[2]
    assert len(messages) == 1 and "3.png" in messages[0] and "the file is empty" in messages[0]


def test_replacement_wraps_around_the_epoch(grays):
    source = stream(grays, shuffle=False)
    (grays / "9.png").write_text("not an image")
    assert levels(source, 8, 1) == [10]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_photos_are_reported_with_their_batch(grays, workers):
    source = stream(grays, shuffle=False, workers=workers)
    (grays / "2.png").unlink()
    with training_batches(source, 0, 3, 2) as batches:
        messages = [names for _, names in batches]
    assert [len(names) for names in messages] == [1, 0]
    assert "2.png" in messages[0][0]


def test_no_readable_photo_at_all_is_an_error(grays):
    source = stream(grays)
    for path in grays.iterdir():
        path.write_bytes(b"")
    with pytest.raises(OSError, match=r"none of the 9 photos can be read; the first: .*\.png: the file is empty"):
        with training_batches(source, 0, 2, 1) as batches:
            next(batches)


@pytest.mark.parametrize("mode", ["random", "center", "squash"])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (200, 20)])
def test_small_photos_are_scaled_up_not_padded(mode, size):
    image = cut_from(Image.new("RGB", size, (200, 100, 50)), config("x", crop=mode), random.Random(0))
    assert image.shape == (3, 32, 32)
    assert (image == torch.tensor([200, 100, 50]).view(3, 1, 1)).all()


def test_center_crop_takes_the_whole_short_side_from_the_middle():
    image = Image.new("RGB", (100, 50), "red")
    image.paste("green", (25, 0, 75, 50))
    cut = cut_from(image, config("x", crop="center"), random.Random(0))
    assert (cut[:, :, 2:30] == torch.tensor([0, 128, 0]).view(3, 1, 1)).all()  # the outer columns blend with the red
    assert cut[0][:, [0, -1]].max() < 64


def test_squash_keeps_the_whole_photo():
    values = columns(cut_from(ramp(400, 100), config("x", crop="squash", flip=False), random.Random(0)))
    assert values[0] < 10 and values[-1] > 245


def test_random_crop_takes_between_min_scale_and_the_whole_side():
    spans, starts = [], []
    for seed in range(60):
        values = columns(cut_from(ramp(), config("x", min_scale=0.5, flip=False), random.Random(seed)))
        spans.append((values[-1] - values[0]) / 255 * 32 / 31)  # 31 of 32 pixel distances lie between the outer centers
        starts.append(values[0])
    assert 0.47 < min(spans) < 0.6 and 0.9 < max(spans) < 1.03
    assert min(starts) < 20 and max(starts) > 80


def pillow_crop(image: Image.Image, settings: DataConfig, rng: random.Random) -> np.ndarray:
    """A random crop as Pillow cuts and scales it."""
    side = round(min(image.size) * rng.uniform(settings.min_scale, 1))
    left, top = round(rng.uniform(0, image.width - side)), round(rng.uniform(0, image.height - side))
    cut = image.resize((settings.crop_size, settings.crop_size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(cut).astype(int)


def test_a_crop_is_scaled_as_pillow_scales_it():
    photo, settings = synthetic_photo(4, 300, 200), config("x", flip=False, crop_size=64)
    for seed in range(5):
        ours = cut_from(photo, settings, random.Random(seed)).permute(1, 2, 0).numpy().astype(int)
        inside = np.abs(ours - pillow_crop(photo, settings, random.Random(seed)))[4:-4, 4:-4]  # at the edges Pillow sees beyond the box
        assert inside.max() <= 1


def test_min_scale_1_takes_the_whole_short_side():
    values = columns(cut_from(ramp(), config("x", min_scale=1, flip=False), random.Random(3)))
    assert values[0] < 10 and values[-1] > 245


@pytest.mark.parametrize("flip, mirrored", [(False, range(0, 1)), (True, range(30, 71))])
def test_flip_mirrors_half_of_the_crops(flip, mirrored):
    cuts = [columns(cut_from(ramp(64, 64), config("x", flip=flip), random.Random(seed))) for seed in range(100)]
    assert sum(bool(values[0] > values[-1]) for values in cuts) in mirrored


def test_validation_crop_is_central_and_never_mirrored():
    wide = ramp(96, 32)
    wanted = columns(wide)[32:64]
    assert np.abs(columns(cut_from(wide, config("x"), None)) - wanted).max() <= 1


def test_validation_photos_are_disjoint_from_training(photos):
    found = list_photos(config(photos, validation_photos=2))
    assert found.held_out
    assert len(found.validation) == 1  # a tenth of 12 at most
    assert not set(found.train) & set(found.validation)
    assert len(found.train) + len(found.validation) == 12


def test_validation_split_is_the_same_each_time(photos):
    assert list_photos(config(photos)) == list_photos(config(photos))


def test_too_few_photos_are_all_trained_on(grays):
    found = list_photos(config(grays, validation_photos=4))
    assert not found.held_out
    assert len(found.train) == 9 and len(found.validation) == 4


def test_validation_folder_leaves_the_training_photos_whole(photos, grays):
    found = list_photos(config(photos, validation=grays, validation_photos=3))
    assert found.held_out and len(found.train) == 12
    assert len(found.validation) == 3 and all(path.parent == grays for path in found.validation)


def test_validation_folder_inside_content_is_not_trained_on(photos):
    found = list_photos(config(photos, validation=photos / "more"))
    assert [path.name for path in found.validation] == ["photo_11.bmp"]
    assert not set(found.train) & set(found.validation)


def test_load_validation_skips_and_names_the_unreadable(grays):
    (grays / "2.png").write_bytes(b"")
    images, unreadable = load_validation(sorted(grays.iterdir())[:3], config(grays))
    assert images[:, 0, 0, 0].tolist() == [10, 30]
    assert images.dtype == torch.uint8
    assert len(unreadable) == 1 and "2.png" in unreadable[0]


def test_load_validation_without_a_readable_photo_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(OSError, match="none of the 1 validation photos can be read; the first: .*a.png"):
        load_validation([tmp_path / "a.png"], config(tmp_path))


def annotate(path: Path, names: list[str]) -> Path:
    path.write_text(json.dumps({"images": [{"id": i, "file_name": name} for i, name in enumerate(names)]}))
    return path


def test_annotations_choose_by_name_and_by_relative_path(photos, tmp_path):
    path = annotate(tmp_path / "coco.json", ["photo_00.jpg", "more/photo_11.bmp", "absent.jpg"])
    assert [photo.name for photo in list_photos(config(photos, annotations=path)).train] == ["photo_11.bmp", "photo_00.jpg"]


@pytest.mark.parametrize("text", ["[1, 2]", '{"annotations": []}', "not json", '{"images": [{"id": 3}]}', '{"images": 3}'])
def test_annotations_of_another_shape_are_named(photos, tmp_path, text):
    (tmp_path / "coco.json").write_text(text)
    with pytest.raises(ValueError, match=r"data\.annotations: .*coco\.json is not a COCO annotation file, need"):
        list_photos(config(photos, annotations=tmp_path / "coco.json"))


def test_missing_annotations_are_named(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.annotations: no file at .*coco\.json"):
        list_photos(config(photos, annotations=tmp_path / "coco.json"))


def test_annotations_of_other_photos_are_named(photos, tmp_path):
    path = annotate(tmp_path / "coco.json", ["x.jpg", "y.jpg"])
    with pytest.raises(ValueError, match=r"none of the 2 photos that .*coco\.json names lies below .*photos, where there are 12 others"):
        list_photos(config(photos, annotations=path))


@pytest.mark.parametrize("key", ["content", "validation"])
def test_missing_folder_names_key_and_folder(photos, tmp_path, key):
    folders = {"content": photos} | {key: tmp_path / "nowhere"}
    with pytest.raises(FileNotFoundError, match=rf"data\.{key}: no folder at .*nowhere; need a folder of photos"):
        list_photos(DataConfig(**folders))


def test_folder_without_photos_tells_what_is_there(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.zip").touch()
    with pytest.raises(ValueError, match=r"data\.content: no photos below .*; looked for \.jpg.*found 1 \.txt, 1 \.zip"):
        list_photos(config(tmp_path))


def test_reduced_decoding_still_holds_the_smallest_crop(tmp_path):
    blocks = np.random.default_rng(0).integers(0, 256, size=(60, 80, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((640, 480), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    source = stream(tmp_path, min_scale=0.2)  # the short side must keep 32 / 0.2 = 160 px: decoded at a half
    with Image.open(tmp_path / "a.jpg") as image:
        full = torch.from_numpy(np.array(image))
    prepared = prepare(tmp_path / "a.jpg", source.config)
    assert prepared.shape[0] == 160
    for rng in (None, SMALLEST):
        assert (crop(prepared, source.config, rng).int() - crop(full, source.config, rng).int()).abs().float().mean() < 6



def test_default_workers_leave_a_core(monkeypatch):
    for threads, workers in ((1, 1), (2, 1), (6, 5), (64, 8)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert default_workers() == workers


@pytest.mark.parametrize(
    "key, value", [("crop_size", 8), ("min_scale", 0), ("min_scale", 1e-320), ("min_scale", 1.1), ("workers", -1), ("crop", "corner"), ("validation_photos", 0)]
)
def test_impossible_data_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"{key}: got"):
        validate_config(DataConfig, {"content": "x", key: value})


# Keeping the prepared photos


def kept(source: PhotoStream, **options) -> PhotoStream:
    cache = keep_photos(source.photos, source.config.model_copy(update=options), passes=2)
    return PhotoStream(source.photos, source.config, source.seed, cache)


@pytest.mark.parametrize("mode", ["random", "center", "squash"])
@pytest.mark.parametrize("limit", [None, 15e-6], ids=["whole", "some"])
def test_crops_are_the_same_with_and_without_a_cache(photos, mode, limit):
    source = stream(photos, crop=mode, crop_size=24)
    cached = kept(source, cache_gb=limit)
    assert cached.cache.kept == len(source.photos) if limit is None else 0 < cached.cache.kept < len(source.photos)
    assert torch.equal(crops(source, 0, 5, 5), crops(cached, 0, 5, 5))
    assert torch.equal(crops(source, 10, 5, 3), crops(cached, 10, 5, 3))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_read_the_cache_and_need_no_photos(photos):
    source = stream(photos, workers=2)
    wanted = crops(source, 0, 4, 4)
    cached = kept(source)
    for photo in source.photos:
        photo.unlink()
    assert torch.equal(crops(cached, 0, 4, 4), wanted)


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "reading photos"]


def test_kept_squares_are_read_ahead_by_a_thread_and_are_the_same(photos):
    settings = {"crop": "center", "crop_size": 24}
    wanted = crops(stream(photos, **settings), 3, 4, 9)
    cached = kept(stream(photos, workers=None, **settings))
    with training_batches(cached, 3, 4, 9) as batches:
        found = [next(batches)[0]]
        assert len(reading()) == 1
        found += [images for images, _ in batches]
    assert torch.equal(torch.cat(found), wanted) and not reading()


def test_what_the_thread_meets_is_raised_and_it_ends_with_the_batches(photos, monkeypatch):
    cached = kept(stream(photos, workers=None, crop="center"))
    with training_batches(cached, 0, 2, 100) as batches:
        next(batches)
    assert not reading()  # it was not done
    monkeypatch.setattr(PhotoStream, "__getitem__", lambda *given: (None, ["gone.jpg: no such file"]))
    with pytest.raises(OSError, match="gone.jpg"), training_batches(cached, 0, 2, 3) as batches:
        next(batches)
    assert not reading()


def test_deleting_the_cache_changes_no_crop(photos):
    source = stream(photos)
    cached = kept(source)
    cached.cache.path.unlink()
    assert torch.equal(crops(cached, 0, 4, 4), crops(source, 0, 4, 4))


@pytest.mark.parametrize("mode, side", [("random", 64), ("center", 32), ("squash", 32)])
def test_a_prepared_photo_holds_what_the_largest_and_the_smallest_crop_need(tmp_path, mode, side):
    synthetic_photo(1, 200, 150).save(tmp_path / "large.png")
    synthetic_photo(2, 50, 40).save(tmp_path / "small.png")
    synthetic_photo(3, 100, 80).save(tmp_path / "like.png")
    settings = config(tmp_path, crop=mode)  # 32 / 0.5 = 64
    assert tuple(prepare(tmp_path / "large.png", settings).shape) == ((64, 85, 3) if mode == "random" else (side, side, 3))  # 200 x 64 / 150 = 85.3
    assert tuple(prepare(tmp_path / "like.png", settings).shape) == ((80, 100, 3) if mode == "random" else (side, side, 3))  # 64 / 80 > 0.75
    assert tuple(prepare(tmp_path / "small.png", settings).shape) == ((40, 50, 3) if mode == "random" else (side, side, 3))


def test_preparing_a_photo_changes_a_crop_little(tmp_path):
    photo = synthetic_photo(5, 384, 384)
    photo.save(tmp_path / "a.png")
    settings = config(tmp_path, crop_size=64)
    prepared = prepare(tmp_path / "a.png", settings)
    for rng in (None, SMALLEST):  # elsewhere a corner is moved by up to half a prepared pixel, too
        error = (cut_from(photo, settings, rng).float() - crop(prepared, settings, rng).float()).square().mean()
        assert 10 * torch.log10(255**2 / error) > 36


@pytest.mark.parametrize("passes, built", [(1.9, False), (2, True)])
def test_auto_builds_in_the_users_cache_folder_where_photos_are_seen_twice(photos, own_cache_folder, passes, built):
    said, source = [], stream(photos)
    cache = keep_photos(source.photos, source.config, passes, said.append)
    assert (cache is not None) == built == own_cache_folder.exists() == bool(said)
    if built:
        assert all(str(own_cache_folder) in message for message in said)
        assert "12 of 12 photos" not in said[-1] and "11 of 11 photos" in said[-1]  # one is held out
        assert keep_photos(source.photos, source.config, 0.1).path == cache.path  # what is there is used


def test_off_keeps_nothing(photos, own_cache_folder):
    source = stream(photos, cache="off")
    assert keep_photos(source.photos, source.config, 100) is None and not own_cache_folder.exists()


def test_a_cache_folder_that_cannot_be_written_is_named_or_done_without(photos, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    source, said = stream(photos, cache=tmp_path / "file"), []
    with pytest.raises(OSError, match=r"data\.cache: .*file.*give another folder, or off"):
        keep_photos(source.photos, source.config, 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep_photos(source.photos, stream(photos).config, 2, said.append) is None
    assert "going without" in said[-1]


def test_a_user_without_a_home_goes_without_a_cache(photos, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    source, said = stream(photos), []
    assert keep_photos(source.photos, source.config, 2, said.append) is None
    assert "no home folder" in said[-1] and "going without" in said[-1]


def test_unreadable_photos_are_replaced_and_named_as_without_a_cache(grays):
    (grays / "3.png").write_bytes(b"")
    source, said = stream(grays, shuffle=False), []
    cached = PhotoStream(source.photos, source.config, source.seed, keep_photos(source.photos, source.config, 2, said.append))
    assert list(cached.cache.unreadable) == [str(grays / "3.png")] and "8 of 9 photos, 1 cannot be read" in said[-1]
    assert levels(cached, 2, 1) == [40]
    assert cached[2][1] == source[2][1]
