"""Turn a finished training run into a style to ship: a small model, a preview, the config and its figures. Needs fastnst[evaluate], whose photos it shows."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

from fastnst import cli

EPILOG = """\
examples:
  fastnst publish --run-dir runs/mine --output checkpoints/mine --validation held_out/

With --output checkpoints/NAME of this repository, `stylize --style NAME` finds it.
The model is stored in half precision, after checking that no pixel of three photos changes by more than 1 of 255.
Where anything fails, nothing is written."""


def main(argv=None) -> int:
    p = cli.parser("publish", __doc__, EPILOG)
    p.add_argument("--run-dir", required=True, type=Path, metavar="FOLDER", help="a finished run of `fastnst train`")
    p.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="the style's folder; its name is the style's")
    p.add_argument("--validation", type=Path, metavar="FOLDER", help="photos to measure on (default: those that the run held out)")
    p.add_argument("--photos", type=cli.whole(1, 100_000), default=16, metavar="N", help="how many of them (default: 16)")
    p.add_argument("--thumbnail", action="store_true", help="keep the painting's thumbnail in the model")
    p.add_argument("--overwrite", action="store_true", help="replace a style that exists")
    args = p.parse_args(argv)

    import numpy as np
    import torch
    import yaml
    from PIL import Image

    from fastnst.checkpoint import STATE_NAME, load_model, load_training_state, save_model
    from fastnst.config import load_config
    from fastnst.contender import METRICS_NAME, note_weights
    from fastnst.data import list_photos, load_validation
    from fastnst.files import atomic_write, check_output
    from fastnst.grain import GRAIN, add_grain
    from fastnst.image import load_image, to_pil, to_tensor
    from fastnst.loss_network import load_loss_network
    from fastnst.losses import LossConfig, PerceptualLoss
    from fastnst.model import MODEL_NAME
    from fastnst.picture import open_rgb
    from fastnst.run import CONFIG_NAME
    from fastnst.runtime import keep_freed_memory, resolve_device
    from fastnst.sheet import contact_sheet
    from fastnst.task import TrainConfig, validate
    from fastnst.yardstick import machine

    config = load_config(TrainConfig, args.run_dir / CONFIG_NAME)
    names = (MODEL_NAME, CONFIG_NAME, METRICS_NAME, "preview.jpg")
    for name in names:
        check_output(args.output / name, [*(args.run_dir / own for own in (MODEL_NAME, CONFIG_NAME, STATE_NAME)), config.style.image], args.overwrite)
    device = resolve_device(args.device)
    keep_freed_memory()
    state = load_training_state(args.run_dir / STATE_NAME)
    network, info = load_model(args.run_dir / MODEL_NAME)
    loss_config = LossConfig(**state["loss"]) if state.get("loss") else config.loss
    style = load_image(config.style.image, config.style).to(device)
    loss = PerceptualLoss(load_loss_network(config.loss, config.loss.layers).to(device), loss_config, style)
    data = config.data.model_copy(update={"validation": args.validation or config.data.validation, "validation_photos": args.photos})
    found = list_photos(data)
    held_out, _ = load_validation(found.validation, data)

    photos = [open_rgb(cli.example_photo(name))[0] for name in ("astronaut", "chelsea", "coffee")]
    with ExitStack() as files:  # all are written and checked before the first takes its place; the model does so last
        written = {name: files.enter_context(atomic_write(args.output / name)) for name in names}
        save_model(written[MODEL_NAME], network, info.step, info.recipe, info.thumbnail if args.thumbnail else None, half=True)
        shipped, _ = load_model(written[MODEL_NAME])
        stylized, differences = [], []
        with torch.inference_mode():
            for photo in photos:
                photo.thumbnail((512, 512), Image.Resampling.LANCZOS)
                given = np.array(photo)
                add_grain(given, GRAIN)  # as `stylize` does
                before, after = (net.to(device)(to_tensor(Image.fromarray(given)).to(device)).clamp(0, 1) for net in (network, shipped))
                differences.append((before - after).abs().max())
                stylized.append(to_pil(after))
        largest = float(torch.stack(differences).max())
        if not largest <= 1 / 255:
            told = f"half precision would change a pixel by {largest * 255:.3g} of 255, more than 1: not written"
            raise ArithmeticError(f"{args.output}: {told}; ship {args.run_dir / MODEL_NAME} instead, which is in full precision")
        measured, _ = validate(shipped.to(device), loss, held_out, config.train.batch_size)
        metrics = {
            "steps": info.step,
            "photos_seen": info.step * config.train.batch_size,
            "held_out_photos": len(held_out) if found.held_out else 0,
            "objective": {name.removeprefix("validation/"): round(value, 6) for name, value in measured.items() if not name.startswith("validation_look")},
            "look": {name.removeprefix("validation_look/"): round(value, 4) for name, value in measured.items() if name.startswith("validation_look")},
            "raw_weights": note_weights(loss_config),
            "half_precision_largest_difference": round(largest, 6),
            "machine": machine(device),
        }
        contact_sheet([photos, stylized], height=320).save(written["preview.jpg"], quality=88)
        written[CONFIG_NAME].write_text(yaml.safe_dump(info.recipe, sort_keys=False), encoding="utf-8")
        written[METRICS_NAME].write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    print(f"{args.output}: {(args.output / MODEL_NAME).stat().st_size / 1e6:.2f} MB, half precision changes a pixel by at most {largest * 255:.2f} of 255")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
