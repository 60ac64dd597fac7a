"""Draw the project's own style image, `checkpoints/mosaic_sun/mosaic_sun.png`: a sun of glass tiles over water, made of numbers only."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def draw(side: int = 768, seed: int = 7) -> Image.Image:
    """Glass tiles along warped rings and waves: strong colours, dark leading, two stroke sizes. ``side`` in pixels."""
    rng = np.random.default_rng(seed)
    scale = 2  # drawn twice as large and reduced: smooth edges
    size = side * scale
    image = Image.new("RGB", (size, size), (18, 20, 34))
    brush = ImageDraw.Draw(image)
    sun = np.array([0.62, 0.36]) * size
    warm = np.array([[250, 196, 58], [244, 140, 38], [226, 84, 44], [196, 40, 62]])
    sky = np.array([[38, 88, 160], [24, 130, 168], [92, 60, 140], [222, 120, 96], [240, 186, 120]])
    sea = np.array([[14, 60, 110], [20, 120, 130], [60, 170, 160], [230, 210, 150]])
    horizon = 0.66 * size

    def tile(centre: np.ndarray, along: np.ndarray, length: float, width: float, colour: np.ndarray) -> None:
        across = np.array([-along[1], along[0]])
        corners = [centre + along * length * a / 2 + across * width * b / 2 for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        jitter = rng.normal(0, width * 0.07, (4, 2))
        shade = np.clip(colour + rng.normal(0, 14, 3) + rng.normal(0, 10), 0, 255).astype(int)
        brush.polygon([tuple(corner + shift) for corner, shift in zip(corners, jitter)], fill=tuple(int(value) for value in shade))

    step = size / 44
    radius = step * 0.8
    while radius < 1.3 * size:
        count = max(6, int(2 * np.pi * radius / (step * 1.5)))
        phase = rng.uniform(0, 6.28)
        for angle in phase + np.arange(count) * 2 * np.pi / count:
            bend = 1 + 0.05 * np.sin(5 * angle + radius / size * 9)
            centre = sun + radius * bend * np.array([np.cos(angle), np.sin(angle)])
            if not (-step < centre[0] < size + step and -step < centre[1] < horizon):
                continue
            along = np.array([-np.sin(angle), np.cos(angle)])
            if radius < 0.2 * size:
                colour = warm[min(3, int(radius / (0.2 * size) * 4 + rng.uniform(-0.4, 0.6)))]
            else:
                colour = sky[int(np.clip((radius / size - 0.2) * 5 + rng.normal(0, 0.8), 0, 4))][:]
            tile(centre, along, 2 * np.pi * radius / count * 0.9, step * 0.86, colour)
        radius += step

    row = horizon
    while row < size + step:
        depth = (row - horizon) / (size - horizon)
        width = step * (0.45 + 0.9 * depth)
        column = rng.uniform(-2, 0) * step
        while column < size + step:
            slope = 0.35 * np.cos(column / size * 11 + depth * 5)
            height = row + size * 0.018 * np.sin(column / size * 11 + depth * 5)
            glitter = np.exp(-(((column - sun[0]) / (0.1 * size)) ** 2)) > rng.uniform(0, 1.1)
            colour = warm[rng.integers(0, 3)] if glitter else sea[min(3, int(abs(rng.normal(0, 0.55 + depth)) * 1.5))]
            along = np.array([1.0, slope]) / np.hypot(1, slope)
            tile(np.array([column, height]), along, width * 2.3, width * 0.82, colour)
            column += width * 2.5
        row += width
    return image.resize((side, side), Image.Resampling.LANCZOS).filter(ImageFilter.UnsharpMask(2, 40))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "checkpoints" / "mosaic_sun" / "mosaic_sun.png")
    parser.add_argument("--side", type=int, default=768, help="pixels")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(args.side).save(args.output)
    print(args.output)
