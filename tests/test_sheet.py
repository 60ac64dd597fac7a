"""Where the pictures of a contact sheet lie."""

from PIL import Image

from fastnst.sheet import contact_sheet


def test_pictures_lie_in_rows_and_columns_each_scaled_to_the_height():
    red, blue = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (10, 10), "blue")
    sheet = contact_sheet([[red, blue], [None, red]], height=30)
    # 40x20 at 30 px high is 60 wide, 10x10 is 30; both columns are 60 wide, as the second holds a red one too; margins of 8.
    assert sheet.size == (8 + 60 + 8 + 60 + 8, 8 + 30 + 8 + 30 + 8)
    assert sheet.getpixel((8 + 30, 8 + 15)) == (255, 0, 0)
    assert sheet.getpixel((8 + 60 + 8 + 30, 8 + 15)) == (0, 0, 255)
    assert sheet.getpixel((8 + 30, 8 + 30 + 8 + 15)) not in ((255, 0, 0), (0, 0, 255))
    assert sheet.getpixel((8 + 60 + 8 + 30, 8 + 30 + 8 + 15)) == (255, 0, 0)


def test_labels_take_room_and_leave_ink():
    picture = Image.new("RGB", (20, 20), "white")
    plain, labelled = contact_sheet([[picture]]), contact_sheet([[picture]], ["wave"], ["photo"])
    assert labelled.width > plain.width and labelled.height > plain.height
    assert min(labelled.convert("L").crop((0, 0, labelled.width - plain.width, labelled.height)).getextrema()) < 100


def test_an_emblem_stands_below_a_row_s_label():
    white, green = Image.new("RGB", (20, 20), "white"), Image.new("RGB", (10, 5), (0, 255, 0))
    sheet = contact_sheet([[white], [white]], ["a", "b"], height=100, emblems=[None, green])
    # Half the height wide, 50x25, at a margin of 8 in the second row, 8 + 100 + 8 down; the label's line of 12 and a margin of 8 are above it: (100 - 25 - 8) // 2 + 12 + 8.
    found = [(x, y) for y in range(sheet.height) for x in range(sheet.width) if sheet.getpixel((x, y)) == (0, 255, 0)]
    top = 116 + 33 + 20
    assert (min(found), max(found)) == ((8, top), (8 + 49, top + 24)) and len(found) == 50 * 25


def test_a_marked_row_is_framed_in_red():
    sheet = contact_sheet([[Image.new("RGB", (20, 20), "white")]] * 2, ["a", "b"], marked_row=1)
    rows_with_red = {y for y in range(sheet.height) for x in range(sheet.width) if sheet.getpixel((x, y)) == (200, 40, 40)}
    assert min(rows_with_red) > 200 and max(rows_with_red) > 400
