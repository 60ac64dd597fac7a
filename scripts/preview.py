"""See how a painting will come out before training: a sheet over strengths (rows) and style sizes (columns), in minutes."""

import sys
from pathlib import Path

from fastnst import cli

EPILOG = """\
examples:
  fastnst preview --style painting.jpg --output sheet.jpg
  fastnst preview --style painting.jpg --output sheet.jpg --pick 2,1 --write configs/picked.yaml
  fastnst train --config configs/picked.yaml --content photos/

Each cell is a picture optimized under the loss that training would use, without the grid, spectrum and stability terms,
which only networks need. --pick counts from 1 and only writes."""


def main(argv=None) -> int:
    p = cli.parser("preview", __doc__, EPILOG)
    p.add_argument("--style", required=True, type=Path, metavar="PAINTING", help="the painting, a picture file")
    p.add_argument("--content", nargs="+", type=Path, default=[], metavar="PHOTO", help="photos to try it on (default: one of scikit-image's: pip install 'fastnst[evaluate]')")
    p.add_argument("--output", required=True, type=Path, metavar="FILE", help="the sheet to write")
    p.add_argument("--config", default="own", metavar="FILE", help="the training config to start from (default: own)")
    cli.add_set_flag(p, "override any key of that config")
    p.add_argument("--strengths", nargs="+", type=cli.number(0, 10), default=[2, 5, 8], metavar="0-10", help="rows (default: 2 5 8)")
    p.add_argument("--style-sizes", nargs="+", type=cli.whole(1, 65_535), default=[192, 384, 768], metavar="PX", help="columns: long side of the painting (default: 192 384 768)")
    p.add_argument("--side", type=cli.whole(16, 8192), default=160, metavar="PX", help="short side of the photos; the painting is scaled along (default: 160)")
    p.add_argument("--steps", type=cli.whole(1, 10**6), default=60, metavar="N", help="L-BFGS iterations a cell (default: 60)")
    p.add_argument("--pick", metavar="ROW,COLUMN", help="the cell to write as a training config, counted from 1; with --write")
    p.add_argument("--write", type=Path, metavar="FILE", help="where to write it")
    p.add_argument("--overwrite", action="store_true", help="replace files that exist")
    args = p.parse_args(argv)
    if bool(args.pick) != bool(args.write):
        p.error("--pick and --write go together")

    from fastnst.config import load_config, validate_config
    from fastnst.files import check_output
    from fastnst.task import TrainConfig

    path = cli.find_config(args.config)
    if args.pick:
        try:
            row, column = (int(part) - 1 for part in args.pick.split(","))
            strength, long_side = args.strengths[row], args.style_sizes[column]
            if row < 0 or column < 0:
                raise IndexError
        except (ValueError, IndexError):
            p.error(f"--pick: got {args.pick}, need ROW,COLUMN from 1,1 to {len(args.strengths)},{len(args.style_sizes)}")
        check_output(args.write, [args.style, *args.content, path, args.output], args.overwrite, "--write")
        return _write(path, args, strength, long_side, TrainConfig)

    from fastnst.image import load_image, to_pil
    from fastnst.loss_network import load_loss_network
    from fastnst.optimize import DescentConfig, OptimizeConfig, optimize_image
    from fastnst.picture import ImageSize, check_writable, open_rgb, save_picture
    from fastnst.runtime import keep_freed_memory, resolve_device
    from fastnst.sheet import contact_sheet

    check_writable(args.output)
    check_output(args.output, [args.style, *args.content], args.overwrite)
    config = load_config(TrainConfig, path, [cli.path_override("style.image", args.style), "data.content=.", *args.set])
    device = resolve_device(args.device)
    keep_freed_memory()
    contents = [load_image(photo).to(device) for photo in args.content] or [load_image(cli.example_photo("chelsea")).to(device)]
    style = load_image(args.style).to(device)
    loss_network = load_loss_network(config.loss, config.loss.layers).to(device)
    content_size, style_sizes = ImageSize(short_side=args.side), []
    _check_size(loss_network, contents[0], content_size, f"--side {args.side}")
    for long_side in args.style_sizes:
        flags = f"--style-sizes {long_side} at --side {args.side}"
        style_sizes.append(validate_config(ImageSize, {"long_side": round(long_side * args.side / config.data.crop_size)}, source=flags))
        _check_size(loss_network, style, style_sizes[-1], flags)
    rows = []
    steps = len(args.strengths) * len(args.style_sizes) * len(contents) * args.steps
    with cli.progress_bar(steps) as bar:
        for strength in args.strengths:
            row = []
            for style_size in style_sizes:
                cell = OptimizeConfig(
                    content=content_size,
                    style=style_size,
                    loss=config.loss.for_pictures.model_copy(update={"strength": strength}),
                    optimize=DescentConfig(steps=args.steps, log_every=args.steps, clamp=True),
                )
                pictures = [to_pil(optimize_image(content, style, loss_network, cell)) for content in contents]
                bar.update(args.steps * len(contents))
                row.append(_side_by_side(pictures))
            rows.append(row)
    sheet = contact_sheet(
        [[open_rgb(args.style)[0], *[None] * (len(args.style_sizes) - 1)], *rows],
        ["painting", *(f"{index}: strength {strength:g}" for index, strength in enumerate(args.strengths, 1))],
        [f"{index}: style {size} px" for index, size in enumerate(args.style_sizes, 1)],
        height=args.side + 60,
    )
    save_picture(sheet, args.output, quality=92)
    print(f"{args.output}\nPick a cell: the same command with --pick ROW,COLUMN --write configs/picked.yaml")
    return 0


def _write(path, args, strength, long_side, model) -> int:
    import yaml

    from fastnst.config import parse_config, parse_data
    from fastnst.files import write_text

    picked = [cli.path_override("style.image", args.style), f"style.long_side={long_side}", f"loss.strength={strength}"]
    data = parse_data(model, path.read_text(encoding="utf-8"), picked, source=str(path))
    data["style"].pop("short_side", None)
    text = f"# {args.style.name}: row {args.pick.replace(',', ', column ')} of {args.output.name}, on top of {path.name}.\n{yaml.safe_dump(data, sort_keys=False)}"
    parse_config(model, text, ["data.content=.", *args.set], source=str(path))
    write_text(args.write, text)
    print(f"{args.write}\nTrain it: fastnst train --config {cli.quoted(args.write)} --content PHOTOS/" + "".join(f" --set {cli.quoted(change)}" for change in args.set))
    return 0


def _check_size(loss_network, picture, size, flags) -> None:
    """Raise ``ValueError`` naming the ``flags`` where ``picture`` is too small for the loss network at that size: ahead of the first cell."""
    try:
        loss_network(picture.new_zeros(1, 3, *size.of(*picture.shape[-2:])))
    except ValueError as error:
        raise ValueError(f"{flags}: {error}") from error


def _side_by_side(pictures):
    from PIL import Image

    joined = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
    for index, picture in enumerate(pictures):
        joined.paste(picture, (sum(other.width for other in pictures[:index]), 0))
    return joined


if __name__ == "__main__":
    sys.exit(cli.run(main))
