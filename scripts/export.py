"""Write a model as an ONNX file, for other programs and for machines without torch. Needs fastnst[onnxruntime]."""

import sys
from pathlib import Path

from fastnst import cli

EPILOG = """\
examples:
  fastnst export --style wave --output wave.onnx
  fastnst stylize --model wave.onnx --input photo.jpg --output out.jpg      # needs no torch

The file takes any number of pictures of any size: input `pixels`, output `stylized`, opset 17.
`--pixels uint8`: (N, H, W, 3) RGB of 0..255, in and out; `--pixels float`: (N, 3, H, W) RGB in [0, 1]. It ends by running the file and comparing it with torch."""


def main(argv=None) -> int:
    p = cli.parser("export", __doc__, EPILOG, device=False)
    cli.add_model_flags(p)
    p.add_argument("--output", required=True, type=Path, metavar="FILE", help="the .onnx file to write")
    p.add_argument("--pixels", choices=("uint8", "float"), default="uint8", help="what goes in and comes out (default: uint8)")
    p.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    args = p.parse_args(argv)

    from fastnst.engine import is_installed

    if not is_installed("onnxruntime"):
        raise ValueError("export writes with onnx and checks with onnxruntime; install them with: pip install 'fastnst[onnxruntime]'")

    from fastnst.export import export

    found = export(args.model or cli.find_style(args.style), args.output, args.pixels, args.overwrite)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    for parity in found:
        print(f"  {parity.width}x{parity.height}: differs from torch by at most {parity.difference:.2g} of 255; {parity.onnx_ms:.0f} ms, torch {parity.torch_ms:.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
