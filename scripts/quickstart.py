"""From nothing to a contact sheet: apply the shipped styles to three photos, train a small style of one's own, apply it too."""

import argparse
import sys
import time
from pathlib import Path

from fastnst import cli

PHOTOS = ("astronaut", "chelsea", "coffee")


def main(argv=None) -> int:
    p = argparse.ArgumentParser(prog="quickstart", description=__doc__)
    p.add_argument("--style", type=Path, help="your painting (default: the project's own, mosaic_sun)")
    p.add_argument("--output", type=Path, default=Path("quickstart"), metavar="FOLDER", help="where everything goes (default: quickstart)")
    args = p.parse_args(argv)
    style = args.style or cli.shipped_folder("checkpoints") / "mosaic_sun" / "mosaic_sun.png"
    if not style.is_file():
        raise FileNotFoundError(f"--style (STYLE=...): no picture at {style}")

    from fastnst.scripts import train
    from PIL import Image

    from fastnst.image import to_pil, to_tensor
    from fastnst.model import MODEL_NAME
    from fastnst.picture import open_rgb, save_picture
    from fastnst.runtime import keep_freed_memory
    from fastnst.sheet import contact_sheet
    from fastnst.stylize import Stylizer

    began = time.monotonic()
    keep_freed_memory()
    photos = []
    (args.output / "photos").mkdir(parents=True, exist_ok=True)
    for name in PHOTOS:
        photo, _ = open_rgb(cli.example_photo(name))
        photo.thumbnail((512, 512), Image.Resampling.LANCZOS)
        photo.save(args.output / "photos" / f"{name}.jpg", quality=95)
        photos.append(photo)

    run_dir = args.output / style.stem
    print(f"1. Training a small style from {style} on {len(photos)} photos; TensorBoard: tensorboard --logdir {args.output}", flush=True)
    code = train.main(["--config", "quickstart", "--content", str(args.output / "photos"), "--style", str(style), "--run-dir", str(run_dir)])
    if code:
        return code

    print("2. Applying it, and the styles that come with the project", flush=True)
    models = {**cli.shipped_styles(), f"{run_dir.name}\n(just trained)": run_dir / MODEL_NAME}
    styles = [None, *models]
    rows = [photos]
    for name in styles[1:]:
        stylizer = Stylizer.from_file(models[name])
        rows.append([to_pil(stylizer(to_tensor(photo))) for photo in photos])
    paintings = [model.with_name(f"{model.parent.name}.png") for model in [*models.values()][:-1]] + [style]  # those of others are not the project's to show
    emblems = [None, *(open_rgb(painting)[0] if painting.is_file() else None for painting in paintings)]
    sheet = contact_sheet(rows, ["photo", *models], PHOTOS, marked_row=len(rows) - 1, emblems=emblems)
    path = args.output / "contact_sheet.jpg"
    save_picture(sheet, path, quality=92)
    model = run_dir / MODEL_NAME
    first = next(iter(cli.shipped_styles()), None)
    apply = f"fastnst stylize --style {first} --input MY_PHOTO.jpg --output out.jpg" if first else f"fastnst stylize --model {model} --input MY_PHOTO.jpg --output out.jpg"
    again = "python scripts\\quickstart.py --style MY_PAINTING.jpg" if sys.platform == "win32" else "STYLE=MY_PAINTING.jpg ./scripts/quickstart.sh"
    print(f"""
Done in {time.monotonic() - began:.0f} s. Look at {path}
The model: {model}   Its curves: tensorboard --logdir {args.output}

Next, with your own pictures (the commands are in {Path(sys.executable).parent}):
  {apply}
  {again}
  fastnst train --config own --content MY_PHOTOS/ --style MY_PAINTING.jpg --run-dir checkpoints/mine""")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
