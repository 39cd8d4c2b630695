"""Encoded image bytes to pixels, and pixels to the patches of a grid (data/vision.py says which grid).

Shapes: N patches, P values of a patch, H W pixels.
"""

import io
import re
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

from tandem.data.vision import VisionSpec

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 1 << 27  # an index holds no image above this; a reader's limit may be lower

# Pillow's own limit is replaced by `max_pixels` below, which is checked on the header, before pixels are decoded.
Image.MAX_IMAGE_PIXELS = None

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_RESAMPLING = Image.Resampling[VisionSpec.INTERPOLATION.upper()]
_OBJECT = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


class ImageError(ValueError):
    """An image cannot be used; the message is one sentence."""


def image_size(source: BinaryIO, max_pixels: int) -> tuple[int, int]:
    """(height, width) as shown, EXIF orientation applied, from the header alone. Raises ImageError."""
    image, orientation = _open(source, max_pixels)
    width, height = image.size
    return (width, height) if orientation >= 5 else (height, width)


def decode_image(data: bytes, max_pixels: int, target_hw: tuple[int, int] | None = None) -> np.ndarray:
    """Decode to RGB pixels uint8 [H, W, 3] as shown; the first frame where there are several. Raises ImageError.

    Colour rules: transparency is composited on white, palettes are expanded, CMYK is converted without an ICC profile,
    16-bit samples keep their top byte; 32-bit samples are refused, having no agreed white.

    With target_hw the image is resized to it (bilinear), and a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where
    that is still at least twice the target on both sides: faster, and pixels differ from those of the whole image by
    less than one of 256 levels on average over a photograph.
    """
    image, orientation = _open(io.BytesIO(data), max_pixels)
    try:
        size, box = None, None
        if target_hw is not None:
            size = target_hw if orientation >= 5 else target_hw[::-1]
            draft = image.draft(None, (2 * size[0], 2 * size[1]))
            box = draft and draft[1]  # a scaled size is rounded up; the box is where the image ends
        image.load()
        image = _to_rgb(image)
        if size is not None and (size != image.size or box != (0, 0, *size)):
            image = image.resize(size, _RESAMPLING, box)
        if orientation in _TURNS:
            image = image.transpose(_TURNS[orientation])
        return np.asarray(image)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"the {len(data)}-byte image cannot be decoded: {_short(error)}") from error


def to_patches(pixels_HW3: np.ndarray, grid_hw: Sequence[int] | np.ndarray, vision: VisionSpec) -> np.ndarray:
    """Resize to the pixels of a grid, cut to uint8 [N, P] in the order of `VisionSpec.cut`."""
    height, width = vision.pixels_hw(grid_hw)
    if pixels_HW3.shape[:2] != (height, width):
        pixels_HW3 = np.asarray(Image.fromarray(pixels_HW3).resize((width, height), _RESAMPLING))
    return vision.cut(pixels_HW3)


def _open(source: BinaryIO, max_pixels: int) -> tuple[Image.Image, int]:
    """Parse the header. Returns the image, pixels not yet decoded, and the EXIF orientation still to be applied."""
    try:
        image = Image.open(source, formats=FORMATS)
        width, height = image.size
    except Exception as error:
        kinds = ", ".join(FORMATS)
        raise ImageError(f"the header is not that of a readable image ({kinds}): {_short(error)}") from error
    if width < 1 or height < 1 or width * height > max_pixels:
        raise ImageError(f"the image declares {width} x {height} pixels; the limit is {max_pixels} pixels in all")
    return image, _orientation(image)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8 from what precedes the pixels, so that index and decoder agree. Unreadable EXIF counts as 1.

    Pillow's TIFF reader turns the image itself; its PNG reader would decode all pixels to look for a late EXIF chunk,
    hence the base class's method.
    """
    if image.format == "TIFF":
        return 1
    try:
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return orientation if orientation in _TURNS else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ImageError(f"the image has 32-bit samples (mode {image.mode}), which have no agreed white")
    if image.mode in _SIXTEEN_BIT:
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _short(error: Exception) -> str:
    """One line that is the same in every run: Pillow names the file object, with its place in memory."""
    text = " ".join(_OBJECT.sub("", str(error)).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."
