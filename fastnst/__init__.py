"""Fast neural style transfer: train one network per style, apply it in a single forward pass.

Convention kept by the whole package: an image is an RGB float tensor ``(N, 3, H, W)`` in [0, 1].
"""

__version__ = "0.1.0"
__all__ = ["Stylizer"]


def __getattr__(name: str):
    """Import ``Stylizer`` on first use, so that ``import fastnst`` alone stays instant."""
    if name == "Stylizer":
        from fastnst.stylize import Stylizer

        return Stylizer
    raise AttributeError(f"module 'fastnst' has no attribute {name!r}")
