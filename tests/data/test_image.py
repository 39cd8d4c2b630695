import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import ExifTags, Image

from tandem.data.media.image import ImageError, decode_image, image_size, to_patches
from tandem.data.vision import VisionSpec

VISION = VisionSpec()


def cut(image, height, width):
    """The image at this size, a multiple of patches, in patches."""
    return to_patches(image, (height // 14, width // 14), VISION)


def saved(image, kind, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    "size, limits, expected",
    [
        ((28, 28), (4, 1024), (28, 28)),
        ((1, 1), (4, 1024), (28, 28)),
        ((41, 43), (4, 1024), (28, 56)),  # 42 is half way
        ((100, 300), (4, 1024), (112, 308)),
        ((2000, 1000), (4, 256), (308, 140)),  # scaled down, aspect kept as far as the grid allows
        ((30, 60), (64, 1024), (84, 168)),  # scaled up
        ((10, 100000), (4, 256), (28, 1792)),  # an extreme strip still obeys the limit
        ((100, 100), (100, 100), (140, 140)),
    ],
)
def test_resized_size(size, limits, expected):
    vision = VisionSpec(*limits)
    assert vision.pixels_hw(vision.views(*size)) == expected


def test_grids_keep_both_limits_for_any_size():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(0, 9, (4000, 2))).astype(int)
    vision = VisionSpec(16, 400)
    grid = vision.views(sizes[:, 0], sizes[:, 1])
    patches = grid.prod(1)
    assert (grid % 2 == 0).all() and grid.min() >= 2
    assert patches.max() <= 400 and patches.min() >= 16
    assert grid[7].tolist() == vision.views(*sizes[7]).tolist()
    moderate = (sizes.max(1) / sizes.min(1) < 3) & (patches > 64)
    ratio = (grid[:, 0] / grid[:, 1]) / (sizes[:, 0] / sizes[:, 1])
    assert (abs(np.log(ratio[moderate])) < np.log(1.5)).all()


def test_patches_are_block_major_so_that_pooling_is_a_mean_over_four_rows():
    image = pixels(56, 84)
    patches = cut(image, 56, 84)
    positions = VISION.positions([[4, 6]])
    assert patches.shape == (24, 588) and patches.dtype == np.uint8
    for row, (y, x) in zip(patches, positions, strict=True):
        assert np.array_equal(row.reshape(14, 14, 3), image[14 * y : 14 * y + 14, 14 * x : 14 * x + 14])
    pooled = patches.reshape(-1, 4, 588).mean((1, 2)).reshape(2, 3)
    assert np.allclose(pooled, image.reshape(2, 28, 3, 28, 3).mean((1, 3, 4)))


def test_positions_of_many_images_are_those_of_each():
    grids = np.array([[2, 2], [4, 6], [2, 8]])
    together = VISION.positions(grids)
    assert np.array_equal(together, np.concatenate([VISION.positions([grid]) for grid in grids]))
    assert together.dtype == np.int32 and VISION.tokens(grids).tolist() == [1, 6, 4]
    assert VISION.positions(np.zeros((0, 2))).shape == (0, 2)


def test_resize_is_bilinear():
    image = pixels(30, 50)
    expected = np.asarray(Image.fromarray(image).resize((56, 28), Image.Resampling.BILINEAR))
    assert np.array_equal(cut(image, 28, 56), cut(expected, 28, 56))
    with pytest.raises(ValueError, match="multiples of 28"):
        VISION.cut(image)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_seen_in_the_header(kind, orientation):
    image = Image.fromarray(np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 50, np.ones((16, 16), np.uint8)))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    data = saved(image.convert("RGB"), kind, exif=exif, **options)
    grid = np.asarray(image)
    upright = {
        1: grid,
        2: grid[:, ::-1],
        3: grid[::-1, ::-1],
        4: grid[::-1],
        5: grid.T,
        6: np.rot90(grid, -1),
        7: grid[::-1, ::-1].T,
        8: np.rot90(grid),
    }[orientation]
    shown = decode_image(data, 10_000)
    assert image_size(io.BytesIO(data), 10_000) == shown.shape[:2] == upright.shape
    assert abs(shown[..., 0].astype(int) - upright).max() <= (4 if kind == "JPEG" else 0)


def test_colour_rules():
    clear_red = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert decode_image(saved(clear_red, "PNG"), 100)[0, 0].tolist() == [255, 127, 127]
    palette = Image.fromarray(pixels(8, 8)).quantize(4)
    shown = decode_image(saved(palette, "PNG"), 100)
    assert np.array_equal(shown, np.asarray(palette.convert("RGB")))
    palette_clear = decode_image(saved(palette, "PNG", transparency=palette.getpixel((0, 0))), 100)
    assert palette_clear[0, 0].tolist() == [255, 255, 255]
    deep = Image.fromarray(np.array([[0, 0x1234, 0xFFFF]], np.uint16))
    assert decode_image(saved(deep, "PNG"), 100)[0, :, 0].tolist() == [0, 0x12, 0xFF]
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert decode_image(saved(cmyk, "TIFF"), 100)[0, 0].tolist() == [255, 0, 0]
    assert decode_image(saved(Image.new("L", (4, 4), 9), "BMP"), 100).shape == (4, 4, 3)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    moving = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(moving, 100)[0, 0].tolist() == [255, 0, 0]
    with pytest.raises(ImageError, match="32-bit samples"):
        decode_image(saved(Image.new("F", (4, 4)), "TIFF"), 100)


def bomb(width, height) -> bytes:
    """A PNG header that declares this size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + (struct.pack(">I", 10) + b"IDAT" + zlib.compress(b"")[:10].ljust(10, b"\0") + b"\0\0\0\0")
    )


def test_the_pixel_limit_is_checked_on_the_header_and_never_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for width, height in ((50_000, 50_000), (12_000, 9_000)):
            with pytest.raises(ImageError, match=f"declares {width} x {height} pixels; the limit is 1000000 pixels"):
                decode_image(bomb(width, height), 1_000_000)
    whole = saved(Image.fromarray(pixels(10, 10)), "PNG")
    assert decode_image(whole, 100).shape == (10, 10, 3)
    with pytest.raises(ImageError, match="the limit is 99 pixels"):
        image_size(io.BytesIO(whole), 99)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_images_raise_one_sentence(kind):
    data = saved(Image.fromarray(pixels(64, 64)), kind)
    with pytest.raises(ImageError) as raised:
        decode_image(data[: len(data) // 2], 10_000)
    assert "\n" not in str(raised.value)
    for junk in (b"", b"not an image", data[:7]):
        with pytest.raises(ImageError, match="header is not that of a readable image") as raised:
            image_size(io.BytesIO(junk), 10_000)
        assert "0x" not in str(raised.value)  # a place in memory: another one in every run


def test_formats_outside_the_list_are_refused():
    with pytest.raises(ImageError, match="PNG, JPEG, WEBP, GIF, BMP, TIFF"):
        decode_image(saved(Image.fromarray(pixels(8, 8)), "PPM"), 1000)


def photographs():
    """RGB photographs of several sizes, odd ones included."""
    names = ("astronaut.png", "chelsea.png", "motorcycle_left.png", "grass.png", "rocket.jpg")
    return [np.asarray(Image.open(Path(skimage.data.__file__).parent / name).convert("RGB")) for name in names]


@pytest.mark.parametrize("target", [(28, 28), (56, 84), (84, 112), (112, 168), (196, 196)])
def test_jpegs_decoded_at_a_fraction_of_their_size_differ_little(target):
    """Mean absolute difference below 1 of 256 levels on photographs, and no pixel off by more than 12."""
    for image in photographs():
        data = saved(Image.fromarray(image), "JPEG", quality=90)
        whole = cut(decode_image(data, 1 << 20), *target).astype(int)
        drafted = cut(decode_image(data, 1 << 20, target), *target)
        difference = abs(drafted - whole)
        assert difference.mean() < 1 and difference.max() <= 12
        if min(image.shape[0] // target[0], image.shape[1] // target[1]) < 4:  # no half is twice the target
            assert not difference.any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_target_size_is_that_of_the_image_as_shown(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = Image.fromarray(photographs()[2])
    for kind in ("PNG", "JPEG"):
        data = saved(image, kind, exif=exif)
        whole = cut(decode_image(data, 1 << 20), 84, 56).astype(int)
        resized = decode_image(data, 1 << 20, (84, 56))
        assert resized.shape == (84, 56, 3)
        difference = abs(cut(resized, 84, 56) - whole)
        if kind == "PNG":  # a quarter turn swaps the two passes of the resize, between which it rounds
            assert difference.max() <= (orientation >= 5)
        assert difference.mean() < 1


@pytest.mark.parametrize(("height", "width"), [(28, 28), (56, 140)])
def test_patches_go_back_to_pixels(height, width):
    pixels_HW3 = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    patches_NP = cut(pixels_HW3, height, width)
    assert np.array_equal(VISION.to_pixels(patches_NP, (height // 14, width // 14)), pixels_HW3)
