"""Contact sheets: pictures in a labelled grid."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

_MARGIN, _INK, _PAPER, _MARK = 8, (40, 40, 40), (250, 250, 248), (200, 40, 40)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    height: int = 220,
    marked_row: int | None = None,
    emblems: Sequence[Image.Image | None] = (),
) -> Image.Image:
    """Lay out ``rows`` of mode-RGB pictures, each scaled to ``height`` pixels; ``None`` leaves a cell empty.

    A column is as wide as its widest picture; labels stand to the left and above, ``emblems``, small pictures, below those of rows; ``marked_row`` gets a red frame.
    """
    font = ImageFont.load_default(size=max(12, height // 14))
    scaled = [[None if cell is None else cell.resize((max(1, round(cell.width * height / cell.height)), height), Image.Resampling.LANCZOS) for cell in row] for row in rows]
    columns = max(len(row) for row in scaled)
    widths = [max((row[index].width for row in scaled if index < len(row) and row[index] is not None), default=0) for index in range(columns)]
    small = [emblem and ImageOps.contain(emblem, (height // 2, height // 2), Image.Resampling.LANCZOS) for emblem in emblems]
    words = [round(font.getlength(line)) for label in row_labels for line in label.split("\n")]
    beside = max([*words, *(emblem.width for emblem in small if emblem)], default=-2 * _MARGIN)
    left = beside + 3 * _MARGIN
    top = font.size * 2 + _MARGIN if column_labels else _MARGIN
    sheet = Image.new("RGB", (left + sum(widths) + _MARGIN * columns, top + (height + _MARGIN) * len(scaled)), _PAPER)
    ink = ImageDraw.Draw(sheet)
    for index, label in enumerate(column_labels):
        ink.text((left + sum(widths[:index]) + _MARGIN * index + widths[index] / 2, top / 2), label, _INK, font, anchor="mm")
    for number, row in enumerate(scaled):
        y = top + (height + _MARGIN) * number
        emblem = small[number] if number < len(small) else None
        middle = y + height // 2
        if emblem:
            middle = y + (height - emblem.height - _MARGIN) // 2
            sheet.paste(emblem, (_MARGIN, middle + font.size + _MARGIN))
        if number < len(row_labels):
            ink.multiline_text((_MARGIN, middle), row_labels[number], _MARK if number == marked_row else _INK, font, anchor="lm")
        for index, cell in enumerate(row):
            if cell is not None:
                sheet.paste(cell, (left + sum(widths[:index]) + _MARGIN * index + (widths[index] - cell.width) // 2, y))
        if number == marked_row:
            ink.rectangle((left - 3, y - 3, sheet.width - _MARGIN + 2, y + height + 2), outline=_MARK, width=3)
    return sheet
