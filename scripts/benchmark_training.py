"""A training step as pytorch/examples publishes it against ours: photos a second, floor, and whether the losses agree."""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from fastnst import cli

EPILOG = """\
examples:
  fastnst benchmark --training
  fastnst benchmark --training --also lean
  OMP_NUM_THREADS=2 fastnst benchmark --training --content photos/ --loss-weights vgg16.pth --levers --json training.json

Network, loss network, photos, size and batch are the same on both sides. Each runs in a process of its own, with its own
allocator, and they take turns. The floor: what a step's arithmetic alone would take, at the highest rate of this machine.
The exit code is 1 where the losses of the same photos do not agree."""


def main(argv=None) -> int:
    p = cli.parser("benchmark --training", __doc__, EPILOG)
    p.add_argument("--config", default="pytorch_examples", metavar="FILE", help="network and loss to train (default: as pytorch/examples)")
    cli.add_set_flag(p, "override any key of the config")
    p.add_argument("--content", type=Path, metavar="FOLDER", help="folder of photos (default: 64 made up ones of 640x480)")
    p.add_argument("--loss-weights", default="random", metavar="FILE|random", help="weights of the loss network (default: random; the speed is the same)")
    p.add_argument("--size", type=cli.whole(16, 8192), default=256, metavar="PX", help="side of the photos (default: 256)")
    p.add_argument("--batch", type=cli.whole(1, 10_000), default=4, metavar="N", help="photos a step (default: 4)")
    p.add_argument("--repeats", type=cli.whole(1, 10_000), default=5, metavar="N", help="turns of each side (default: 5)")
    p.add_argument("--steps", type=cli.whole(1, 10_000), default=1, metavar="N", help="steps a turn (default: 1)")
    p.add_argument("--levers", action="store_true", help="measure each lever, a single change to the published step, too")
    p.add_argument("--also", action="append", default=[], metavar="CONFIG", help="measure ours with that config's network, and with its loss, too; may be repeated")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    args = p.parse_args(argv)

    from fastnst.benchmark_training import draw_photos, measure
    from fastnst.config import load_config
    from fastnst.files import check_output, write_text
    from fastnst.loss_network import load_loss_network
    from fastnst.published import Task
    from fastnst.runtime import resolve_device
    from fastnst.task import TrainConfig

    if args.json:
        check_output(args.json, [cli.find_config(args.config), args.loss_weights], overwrite=True, flag="--json")
    given = ["style.image=.", "data.content=."]
    config = load_config(TrainConfig, cli.find_config(args.config), [*given, *args.set, cli.path_override("loss.weights", args.loss_weights)])
    load_loss_network(config.loss, config.loss.layers, "--loss-weights")  # raises for weights that are not there; the processes that measure would each end in a traceback
    configs = {Path(name).stem: load_config(TrainConfig, cli.find_config(name), [*given, "loss.weights=random"]) for name in args.also}
    with tempfile.TemporaryDirectory() as folder:
        content = args.content or draw_photos(Path(folder) / "photos", 64)
        task = Task(config.network, config.loss, content, args.size, args.batch, str(resolve_device(args.device)))
        others = []
        for name, other in configs.items():
            lent = replace(task, network=other.network)
            loss = other.loss.model_copy(update={"strength": None})  # no speed depends on it
            others += [(f"ours, network of {name}", lent), (f"ours, network and loss of {name}", replace(lent, loss=loss))]
        report = measure(
            task, Path(folder) / "kept", args.repeats, args.steps, args.levers, others=others, say=lambda message: print(message, file=sys.stderr, flush=True)
        )
    print(report.as_markdown())
    if args.json:
        write_text(args.json, json.dumps(report.as_json(), indent=2, default=str) + "\n")
    for disagreement in report.disagreements:
        print(f"error: {disagreement}", file=sys.stderr)
    return 1 if report.disagreements else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
