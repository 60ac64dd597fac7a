"""The report for people: what stands in its tables, and that its pictures are drawn."""

import copy

import numpy as np
import pytest
from PIL import Image

from fastnst.report import curves, iterations, markdown, quartiles, sheet

JUDGED = {"style/vgg19_slim": [0.2, 0.4], "content/vgg19_slim": [0.5, 0.5], "ssim": [0.5, 0.7]}
JUDGED |= {"frame": [0.25, 0.35], "grid_2": [1 / 255, 3 / 255], "grid_4": [0, 0], "clipped": [0.01, 0.03]}
START = {"mean": [8, 4, 2], "quartiles": [[7, 8, 9], [3, 4, 5], [1, 2, 3]], "worth": [1.5, None], "worth_quartiles": [1.5, 12.3, None], "judged": JUDGED}
FINDINGS = {
    "machine": "abacus",
    "torch": "2",
    "iterations": 2,
    "photos": ["a.jpg", "b.jpg"],
    "unreadable": ["c.jpg: damaged"],
    "judges": ["vgg19_slim"],
    "models": {"wave": {"step": 1000, "parameters": 12345, "painting": "wave.jpg", "loss_network": "vgg19", "weights_from": "the recipe"}},
    "sizes": {
        "64": {
            "enlarged": 1,
            "photo": {name: JUDGED[name] for name in ("frame", "grid_2", "grid_4", "clipped")},
            "models": {
                "wave": {
                    "objective": [3.0, 5.0],
                    "judged": JUDGED | {"flicker": [2 / 255, 4 / 255], "noise_gain": [1.5, 2.5], "border": [0, 0]},
                    "optimizer": {"content": START, "noise": START},
                    "speed": {
                        "first_pass": 0.5,
                        "pass": 0.01,
                        "transfers": 0.001,
                        "optimizer": {"100": 50.0, "300": 150.0},
                        "optimizer_first": 1.5,
                        "optimizer_machine": "abacus",
                    },
                }
            },
        }
    },
}


def cells(text: str, start: str) -> list[str]:
    """Of the only table row that starts so."""
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_tables_hold_means_spreads_and_speed_ups():
    text = markdown(FINDINGS)
    worth, speed = [line for line in text.splitlines() if line.startswith("| 64 px | wave")]
    assert worth == "| 64 px | wave | 4 | 12 (1.5 to > 2) | 12 (1.5 to > 2) |"
    # 50 s against 10 ms are 5,000 times; both are scaled, as only two iterations were made.
    assert speed == "| 64 px | wave | 1.5 | 50 * | 150 * | 10 | 500 | 1 | 5,000 | 15,000 |"
    assert cells(text, "| wave | 4 | content") == ["wave", "4", "content", "8", "4", "2"]
    assert cells(text, "| wave | 0.300") == ["wave", "0.300", "0.500", "0.600", "3.00", "2.00", "0.00", "0.30", "2.00", "0.00", "2.00"]
    assert cells(text, "| the photo")[:5] == ["the photo", "1.000", "0.000", "1.000", "0.00"]
    assert cells(text, "| its L-BFGS, 2 from noise")[4:6] == ["-", "-"]  # a picture alone tells nothing of steadiness
    assert "c.jpg: damaged" in text and "enlarged: 1 at 64 px" in text
    for block in text.split("\n\n"):
        assert len({line.count("|") for line in block.splitlines() if line.startswith("|")}) <= 1  # as many cells in each row


def test_a_judge_that_the_model_was_trained_against_is_marked():
    found = copy.deepcopy(FINDINGS)
    assert " * " not in cells(markdown(found), "| wave | 0.3")[1]
    found["models"]["wave"]["loss_network"] = "vgg19_slim"
    assert cells(markdown(found), "| wave | 0.3")[1:3] == ["0.300 *", "0.500 *"]


def test_no_speed_up_is_told_across_machines():
    found = copy.deepcopy(FINDINGS)
    found["machine"] = "another"
    text = markdown(found)
    assert "| - | - |" in text and "5,000" not in text and "timed on abacus" in text


@pytest.mark.parametrize("beyond", [False, True])
def test_the_curves_are_drawn(tmp_path, beyond):
    found = copy.deepcopy(FINDINGS)
    found["sizes"]["64"]["models"]["wave"]["optimizer"]["noise"] = START | {"worth_quartiles": [None, None, None] if beyond else [1, 1, 1]}
    found["sizes"]["128"] = found["sizes"]["64"]
    curves(found, tmp_path / "curves.png")
    picture = Image.open(tmp_path / "curves.png")
    assert picture.width > 1.5 * picture.height  # two panels side by side
    assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_the_sheet_has_a_line_under_each_picture():
    red = Image.new("RGB", (40, 40), "red")
    drawn = sheet([[(red, "a"), (red, "worth much more than it looks")], [(red, "b")]], height=80)
    pixels = np.asarray(drawn.convert("RGB")).astype(int)
    is_red = (pixels == (255, 0, 0)).all(axis=2)
    assert is_red.sum() == 3 * 80 * 80
    below = pixels[np.flatnonzero(is_red.any(axis=1))[79] + 1 :][:24]  # the two lines' height under the first row
    assert (below.sum(axis=2) < 300).any()


def test_numbers_in_words_and_quartiles():
    assert [iterations(value, 500) for value in (None, float("inf"), 3.14159, 31.4159)] == ["> 500", "> 500", "3.1", "31"]
    assert quartiles([1, 2, 3, 4]) == [1.75, 2.5, 3.25] and quartiles([7]) == [7, 7, 7]
    assert quartiles([1, 2, 3, float("inf"), float("inf")]) == [2, 3, float("inf")]
