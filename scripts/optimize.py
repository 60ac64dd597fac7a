"""The reference: optimize the pixels of a single picture towards a photo's content and a painting's style."""

import json
import sys
from pathlib import Path

from fastnst import cli

EPILOG = """\
examples:
  fastnst optimize --config gatys --content photo.jpg --style wave.jpg --output out.png
  fastnst optimize --config multiscale --content photo.jpg --style wave.jpg --output out.png --set content.long_side=384

Beside OUT.png stands the folder OUT.run with the config, the history as JSON, TensorBoard events and, with
optimize.save_every, intermediate images."""


def main(argv=None) -> int:
    p = cli.parser("optimize", __doc__, EPILOG)
    cli.add_config_flags(p, "gatys, gatys_adam, rmse, multiscale: VGG-19, 548 MB at first use; squeezenet: 5 MB")
    p.add_argument("--content", required=True, metavar="PHOTO", help="the photo")
    p.add_argument("--style", required=True, metavar="PAINTING", help="the painting")
    p.add_argument("--output", required=True, type=Path, metavar="FILE", help="the picture to write; the suffix chooses the format")
    p.add_argument("--keep-colors", action="store_true", help="the photo's colors stay, the painting's light, dark and strokes come in")
    p.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    args = p.parse_args(argv)

    from torch.utils.tensorboard import SummaryWriter

    from fastnst.blend import Blend
    from fastnst.config import load_config, to_yaml
    from fastnst.files import check_output, write_text
    from fastnst.image import load_image, resize, save_image
    from fastnst.loss_network import load_loss_network
    from fastnst.optimize import OptimizeConfig, optimize_image
    from fastnst.picture import check_writable
    from fastnst.run import CONFIG_NAME
    from fastnst.runtime import StopRequest, keep_freed_memory, resolve_device

    config = load_config(OptimizeConfig, cli.find_config(args.config), args.set)
    check_writable(args.output)
    run_dir = args.output.with_suffix(".run")
    for result in (args.output, run_dir / "history.json"):
        check_output(result, (args.content, args.style), args.overwrite)
    stale = [*run_dir.glob("events.out.tfevents.*"), *run_dir.glob("step_*.png")]
    for left in stale:
        check_output(left, (args.content, args.style), overwrite=True)
    device = resolve_device(args.device)
    keep_freed_memory()
    content, style = (load_image(source).to(device) for source in (args.content, args.style))
    loss_network = load_loss_network(config.loss, config.loss.layers).to(device)
    history = []
    for left in stale:
        left.unlink()
    write_text(run_dir / CONFIG_NAME, to_yaml(config))
    with StopRequest() as stop, SummaryWriter(str(run_dir)) as board, cli.Bar() as bar:

        def report(progress):
            bar.to(progress.step, progress.steps, f"objective {progress.losses['loss/total']:.5g}" if progress.losses else None)
            if progress.losses:
                history.append({"step": progress.step, "seconds": round(progress.seconds, 3), **progress.losses})
                for name, value in progress.losses.items():
                    board.add_scalar(name, value, progress.step)
            if progress.image is not None:
                board.add_image("image", progress.image[0], progress.step)
                if progress.step < progress.steps and not stop():
                    save_image(progress.image, run_dir / f"step_{progress.step:06d}.png")

        image = optimize_image(content, style, loss_network, config, report, stop)
    if args.keep_colors:
        image = Blend(keep_colors=True).tensors(resize(content, tuple(image.shape[-2:])), image)
    save_image(image, args.output)
    write_text(run_dir / "history.json", json.dumps(history, indent=1))
    first, last = history[0]["loss/total"], history[-1]["loss/total"]
    print(f"{'stopped' if stop() else 'done'} at step {history[-1]['step']:,}: objective {first:.5g} -> {last:.5g} in {history[-1]['seconds']:.1f} s\n{args.output}")
    return stop.exit_code


if __name__ == "__main__":
    sys.exit(cli.run(main))
