"""Distances of known size: the painting itself, the photo itself, and the units in between."""

import pytest
import torch
from conftest import synthetic_photo

from fastnst.image import to_tensor
from fastnst.judges import JUDGE_LAYERS, load_judge
from fastnst.loss_network import LossNetworkConfig


@pytest.mark.parametrize("network", sorted(JUDGE_LAYERS))
def test_each_judge_has_0_for_the_target_and_1_for_its_unit(network):
    judge = load_judge(LossNetworkConfig(network=network, weights="embedded" if network == "vgg19_slim" else "random"))
    photo, painting = to_tensor(synthetic_photo(1, 64, 64)), to_tensor(synthetic_photo(2, 64, 64))
    assert judge.name == network
    assert judge.distances(photo, painting, photo) == pytest.approx({"style": 1, "content": 0}, abs=1e-5)
    assert judge.distances(photo, painting, painting)["style"] == pytest.approx(0, abs=1e-6)
    moved = photo.roll((32, 32), dims=(2, 3))
    assert judge.distances(photo, painting, moved)["content"] == pytest.approx(1, rel=1e-4)


def test_style_falls_and_content_grows_on_the_way_from_photo_to_painting():
    judge = load_judge(LossNetworkConfig(network="vgg19_slim"))
    photo, painting = to_tensor(synthetic_photo(1, 64, 64)), to_tensor(synthetic_photo(2, 64, 64))
    style, content = zip(*(judge.distances(photo, painting, torch.lerp(photo, painting, share)).values() for share in (0, 0.3, 0.7, 1)))
    assert list(style) == sorted(style, reverse=True) and list(content) == sorted(content)


def test_a_judge_without_its_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--judge squeezenet1_0: no file at .*none.pth"):
        load_judge(LossNetworkConfig(network="squeezenet1_0", weights=str(tmp_path / "none.pth")))
