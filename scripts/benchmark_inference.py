"""Apply a model in every way that is installed, beside the published way: speed, memory and the pictures compared."""

import sys
from pathlib import Path

from fastnst import cli

EPILOG = """\
examples:
  fastnst benchmark --inference --style wave
  fastnst benchmark --inference --model model.safetensors --sizes 512 1920x1080 --engines auto torch:float32 --output speed"""


def main(argv=None) -> int:
    p = cli.parser("benchmark --inference", __doc__, EPILOG)
    cli.add_model_flags(p)
    p.add_argument("--photo", type=Path, metavar="PHOTO", help="what to stylize (default: a photo that scikit-image carries)")
    p.add_argument("--sizes", nargs="+", metavar="N|WxH", help="default: 256 512 1024, on a GPU also 1920x1080 3840x2160")
    p.add_argument("--engines", nargs="+", metavar="ENGINE:PRECISION", help="default: all that are installed")
    p.add_argument("--rounds", type=cli.whole(1, 10_000), default=5, metavar="N", help="alternating passes of each way (default: 5)")
    p.add_argument("--fresh", nargs="*", default=["512", "2048"], metavar="N|WxH", help="sizes to measure in processes of their own (default: 512 2048; none: --fresh)")
    p.add_argument("--output", type=Path, metavar="NAME", help="write NAME.md and NAME.json, too")
    args = p.parse_args(argv)

    import torch

    from fastnst.benchmark_inference import default_engines, measure, measure_fresh_processes, to_json, to_markdown
    from fastnst.files import write_text
    from fastnst.runtime import resolve_device

    resolve_device(args.device)  # raises where it is not there
    model = args.model or cli.find_style(args.style)
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    sizes = [size_of(p, text) for text in args.sizes or ["256", "512", "1024", *(["1920x1080", "3840x2160"] if on_gpu else [])]]
    photo = args.photo or cli.example_photo("astronaut")
    engines = args.engines or default_engines(args.device)
    with cli.Bar("pass") as bar:
        rows = measure(model, photo, sizes, engines, args.device, args.rounds, lambda progress: bar.to(progress.done, progress.total, progress.message))
    fresh = measure_fresh_processes(model, photo, [size_of(p, text) for text in args.fresh])
    table = to_markdown(rows, fresh)
    print(table)
    if args.output:
        for suffix, text in ((".md", table), (".json", to_json(rows, fresh))):
            write_text(args.output.with_name(args.output.name + suffix), text)
    return 0


def size_of(p, text) -> tuple[int, int]:
    """``512`` or ``1920x1080`` -> width and height."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        p.error(f"got size {text}, need N or WIDTHxHEIGHT")
    return int(parts[0]), int(parts[-1])


if __name__ == "__main__":
    sys.exit(cli.run(main))
