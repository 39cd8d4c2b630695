"""Encoded image bytes to 14x14 patches.

A side is resized to the nearest multiple of 28 (bilinear), so that 2x2 patches pool into one visual token of 28x28
pixels. Patches come in block-major order: the four patches of a 2x2 block are four consecutive rows, blocks in raster
order, so pooling is a mean over runs of four:

    0 1 | 4 5
    2 3 | 6 7        (Seed1.5-VL section 2.1.1)

Shapes: N patches, I images, H W pixels, 588 = 14 * 14 * 3 (y, x, channel; channel last).
"""

import io
import re
from collections.abc import Sequence

import numpy as np
from PIL import ExifTags, Image

PATCH = 14
BLOCK = 2 * PATCH
PATCH_VALUES = PATCH * PATCH * 3
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
_OBJECT = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


class ImageError(ValueError):
    """An image cannot be used; the message is one sentence."""


def grid_hw(height_I, width_I, min_patches: int, max_patches: int) -> np.ndarray:
    """Patches down and across for images of these pixel sizes, int32 [I, 2].

    Each side goes to its nearest multiple of 28, at least 28. An image under min_patches or over max_patches is scaled
    with its aspect kept, as far as multiples of 28 allow; where both limits cannot hold, max_patches does.
    """
    height_I, width_I = np.asarray(height_I, np.int64), np.asarray(width_I, np.int64)
    most, least = max_patches // 4, -(-min_patches // 4)
    down_I = np.maximum((height_I + BLOCK // 2) // BLOCK, 1)
    across_I = np.maximum((width_I + BLOCK // 2) // BLOCK, 1)
    area_I = np.maximum(height_I * width_I, 1)

    up_I = np.sqrt(least / area_I)
    small_I = down_I * across_I < least
    down_I = np.where(small_I, np.maximum(np.ceil(height_I * up_I - 1e-9), 1).astype(np.int64), down_I)
    across_I = np.where(small_I, np.maximum(np.ceil(width_I * up_I - 1e-9), 1).astype(np.int64), across_I)

    shrink_I = np.sqrt(most / area_I)
    large_I = down_I * across_I > most
    down_I = np.where(large_I, np.maximum(np.floor(height_I * shrink_I + 1e-9), 1).astype(np.int64), down_I)
    across_I = np.where(large_I, np.maximum(np.floor(width_I * shrink_I + 1e-9), 1).astype(np.int64), across_I)
    down_I = np.minimum(down_I, most)
    across_I = np.minimum(across_I, most // down_I)
    return np.stack([2 * down_I, 2 * across_I], -1).astype(np.int32)


def resized_hw(height: int, width: int, min_patches: int, max_patches: int) -> tuple[int, int]:
    """Pixel size, multiples of 28, to which an image of this size is resized. See grid_hw."""
    down, across = grid_hw(height, width, min_patches, max_patches)
    return int(down) * PATCH, int(across) * PATCH


def visual_tokens(grid_hw_I2: np.ndarray) -> np.ndarray:
    """Visual tokens of each image, int32: a quarter of its patches."""
    return grid_hw_I2[..., 0] * grid_hw_I2[..., 1] // 4


def image_size(source: io.BufferedIOBase, max_pixels: int) -> tuple[int, int]:
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
            image = image.resize(size, Image.Resampling.BILINEAR, box)
        if orientation in _TURNS:
            image = image.transpose(_TURNS[orientation])
        return np.asarray(image)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"the {len(data)}-byte image cannot be decoded: {_short(error)}") from error


def to_patches(pixels_HW3: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear resize to height x width (multiples of 28), cut to uint8 [N, 588] in block-major order."""
    if height % BLOCK or width % BLOCK:
        raise ValueError(f"patches need sides that are multiples of {BLOCK}, got {height} x {width}")
    if pixels_HW3.shape[:2] != (height, width):
        resized = Image.fromarray(pixels_HW3).resize((width, height), Image.Resampling.BILINEAR)
        pixels_HW3 = np.asarray(resized)
    cut = pixels_HW3.reshape(height // BLOCK, 2, PATCH, width // BLOCK, 2, PATCH, 3)
    return cut.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, PATCH_VALUES)


def to_pixels(patches_N588: np.ndarray, down: int, across: int) -> np.ndarray:
    """The image of these patches, uint8 [H, W, 3]: what to_patches has cut."""
    blocks = patches_N588.reshape(down // 2, across // 2, 2, 2, PATCH, PATCH, 3)
    return blocks.transpose(0, 2, 4, 1, 3, 5, 6).reshape(down * PATCH, across * PATCH, 3)


def patch_positions(grid_hw_I2: np.ndarray | Sequence) -> np.ndarray:
    """(y, x) of every patch of every image, int32 [N, 2], in the order of to_patches."""
    grid_hw_I2 = np.asarray(grid_hw_I2, np.int64).reshape(-1, 2)
    patches_I = grid_hw_I2.prod(1)
    first_I = np.cumsum(patches_I) - patches_I
    within_N = np.arange(patches_I.sum()) - np.repeat(first_I, patches_I)
    across_N = np.repeat(grid_hw_I2[:, 1] // 2, patches_I)
    block_N, corner_N = within_N // 4, within_N % 4
    y_N = 2 * (block_N // across_N) + corner_N // 2
    x_N = 2 * (block_N % across_N) + corner_N % 2
    return np.stack([y_N, x_N], 1).astype(np.int32)


def _open(source: io.BufferedIOBase, max_pixels: int) -> tuple[Image.Image, int]:
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
