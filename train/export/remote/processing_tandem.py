"""From images, videos and a conversation to the inputs of the model, as they were made in training.

    <image>   becomes   [SOI] v v v v [EOI]                       v stands for a visual token
    <video>   becomes   [0.0 second] [SOI] v v [EOI] [1.0 second] [SOI] v v [EOI] ...

A side of an image is resized to the nearest multiple of a block of merge x merge patches; each block becomes one visual
token.  The patches of a block lie next to each other.

Legend: N patches, P values of a patch (y, x, channel), I images and frames, H W pixels.
"""

import io
import math
import re
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin

TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112  # in EXIF
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


class TandemImageProcessor(BaseImageProcessor):
    """Images to normalised patches.

    min_patches, max_patches: of one image; one outside of them is scaled with its aspect kept.
    """

    model_input_names = ["pixel_values", "image_grid_hw"]

    def __init__(self, patch_size, merge, min_patches, max_patches, image_mean, image_std, **kwargs):
        super().__init__(**kwargs)
        self.patch_size, self.merge = patch_size, merge
        self.min_patches, self.max_patches = min_patches, max_patches
        self.image_mean, self.image_std = image_mean, image_std

    def preprocess(self, images, return_tensors="pt", **kwargs) -> BatchFeature:
        """pixel_values [N, P] and image_grid_hw [I, 2], patches down and across, of all images in order.

        images: paths, bytes of files, PIL images or RGB arrays [H, W, 3], one or any nesting of lists.
        """
        return self.packed([(opened(image), None) for image in flat(images)], return_tensors)

    def packed(self, images: list[tuple[Image.Image, int | None]], return_tensors="pt") -> BatchFeature:
        """The same for (opened image, most visual tokens of it or None)."""
        patches, grids = zip(*(self.patches_of(image, most) for image, most in images), strict=True)
        x_NP = torch.from_numpy(np.concatenate(patches)).float().unflatten(1, (-1, len(self.image_mean)))
        channels = zip(x_NP.unbind(-1), self.image_mean, self.image_std, strict=True)
        x_NP = torch.stack([x / (255 * std) - mean / std for x, mean, std in channels], dim=-1).flatten(1)
        data = {"pixel_values": x_NP, "image_grid_hw": torch.tensor(grids)}
        return BatchFeature(data, tensor_type=return_tensors)

    def patches_of(self, image: Image.Image, most_tokens: int | None) -> tuple[np.ndarray, tuple[int, int]]:
        """(uint8 [N, P], (down, across)) of one image."""
        orientation = orientation_of(image)
        height, width = image.size[::-1] if orientation < 5 else image.size
        grid = self.grid_of(height, width, most_tokens)
        pixels_HW3 = resized(image, orientation, (grid[0] * self.patch_size, grid[1] * self.patch_size))
        merge, patch = self.merge, self.patch_size
        cut = pixels_HW3.reshape(grid[0] // merge, merge, patch, grid[1] // merge, merge, patch, 3)
        return cut.transpose(0, 3, 1, 4, 2, 5, 6).reshape(grid[0] * grid[1], -1), grid

    def grid_of(self, height: int, width: int, most_tokens: int | None = None) -> tuple[int, int]:
        """Patches down and across of an image of these pixels."""
        block, least, most = self.patch_size * self.merge, -(-self.min_patches // self.merge**2), self.most_tokens
        most = most if most_tokens is None else min(most, most_tokens)
        down, across = max((height + block // 2) // block, 1), max((width + block // 2) // block, 1)
        area = max(height * width, 1)
        if down * across < least:
            up = math.sqrt(least / area)
            down, across = max(math.ceil(height * up - 1e-9), 1), max(math.ceil(width * up - 1e-9), 1)
        if down * across > most:
            shrink = math.sqrt(most / area)
            down, across = max(math.floor(height * shrink + 1e-9), 1), max(math.floor(width * shrink + 1e-9), 1)
        down = min(down, most)
        return self.merge * down, self.merge * min(across, most // down)

    @property
    def most_tokens(self) -> int:
        """Visual tokens of the largest image."""
        return self.max_patches // self.merge**2


class TandemProcessor(ProcessorMixin):
    """Conversations with images and videos to the inputs of the model.

    image_token, video_token: placeholders in a text.  before, after: text around an image or a frame.  fps: frames per
    second taken from a video; video_budget: most visual tokens of one; video_levels: most tokens of a frame, falling:
    the first with which all frames fit the budget counts, or else as many frames as fit the last.
    plain_tokens: special tokens that a message may spell.
    """

    def __init__(
        self,
        image_processor,
        tokenizer,
        image_token="<image>",
        video_token="<video>",
        before="",
        after="",
        plain_tokens=(),
        fps=1.0,
        video_budget=1,
        video_levels=(1,),
        chat_template=None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.video_token, self.before, self.after = image_token, video_token, before, after
        self.plain_tokens, self.fps = list(plain_tokens), fps
        self.video_budget, self.video_levels = video_budget, list(video_levels)

    def apply_chat_template(self, conversation, *args, **kwargs):
        """Like that of every processor.  Raises ValueError for a message that spells a special token."""
        several = isinstance(conversation[0], list | tuple) if len(conversation) else False
        allowed = {self.image_token, self.video_token, *self.plain_tokens}
        added = (token for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        special = [token.content for token in added if token.content not in allowed]
        for message in (message for chat in (conversation if several else [conversation]) for message in chat):
            content = message["content"]
            parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
            if spelled := [token for token in special if any(token in part for part in parts)]:
                raise ValueError(f"a message spells {spelled[0]}, which is a special token of this model")
        return super().apply_chat_template(conversation, *args, **kwargs)

    def __call__(self, images=None, text=None, videos=None, fps=None, return_tensors="pt", **kwargs) -> BatchFeature:
        """input_ids and attention_mask of one text or several, padded together, and what the image processor makes.

        text: with a placeholder for each image and video, as `apply_chat_template` renders it.  images: see the image
        processor.  videos: paths or bytes of files, or (frames, times in milliseconds), one or any nesting of lists.
        kwargs: of the tokenizer.  Raises ValueError where placeholders and media do not agree.
        """
        kwargs.pop("add_special_tokens", None)
        texts = [text] if isinstance(text, str) else list(text)
        waiting = {self.image_token: iter(flat(images)), self.video_token: iter(flat(videos))}
        views: list[tuple] = []
        texts = [self._expanded(one, waiting, views, self.fps if fps is None else fps) for one in texts]
        for placeholder, rest in waiting.items():
            if left := len(list(rest)):
                raise ValueError(f"{left} more media than {placeholder} placeholders in the text")
        kwargs = {"padding": len(texts) > 1, "add_special_tokens": False, **kwargs}
        data = dict(self.tokenizer(texts, return_tensors=return_tensors, **kwargs))
        data.pop("token_type_ids", None)
        return BatchFeature(data | (self.image_processor.packed(views, return_tensors) if views else {}))

    def _expanded(self, text: str, waiting: dict, views: list[tuple], fps: float) -> str:
        """The text with visual tokens for placeholders; appends what they stand for to views."""
        marks = "|".join(re.escape(mark) for mark in waiting)
        return re.sub(marks, lambda found: self._in_place_of(found[0], waiting[found[0]], views, fps), text)

    def _in_place_of(self, mark: str, media: Iterator, views: list[tuple], fps: float) -> str:
        try:
            medium = next(media)
        except StopIteration:
            raise ValueError(f"more {mark} placeholders in the text than media") from None
        if mark == self.image_token:
            return self._view(medium, None, views)
        frames, times_ms, level = self._sampled(medium, fps)
        stamps = [(int(time_ms) + 50) // 100 for time_ms in times_ms]
        return "".join(
            f"[{tenths // 10}.{tenths % 10} second]{self._view(frame, level, views)}"
            for frame, tenths in zip(frames, stamps, strict=True)
        )

    def _view(self, image, most_tokens: int | None, views: list[tuple]) -> str:
        image = opened(image)
        height, width = image.size[::-1] if orientation_of(image) < 5 else image.size
        down, across = self.image_processor.grid_of(height, width, most_tokens)
        views.append((image, most_tokens))
        return self.before + self.image_token * (down * across // self.image_processor.merge**2) + self.after

    def _sampled(self, video, fps: float) -> tuple:
        """(frames, times in milliseconds, most visual tokens of a frame) of a video."""
        if isinstance(video, tuple):
            frames, times_ms = video
            fitting = [level for level in self.video_levels if len(frames) * level <= self.video_budget]
            return frames, times_ms, fitting[0] if fitting else self.video_levels[-1]
        duration_ms = duration_of(video)
        count = max(1, math.ceil(duration_ms * fps / 1000 - 1e-6))
        for level in self.video_levels:
            if count * level <= self.video_budget:
                times_ms = [math.floor(frame * (1000 / fps) + 1e-6) for frame in range(count)]
                return frames_at(video, times_ms), times_ms, level
        count = max(1, self.video_budget // self.video_levels[-1])
        times_ms = [frame * duration_ms // count for frame in range(count)]
        return frames_at(video, times_ms), times_ms, self.video_levels[-1]


def flat(media) -> list:
    """One medium or any nesting of lists of them as one list; a tuple is a video."""
    if media is None:
        return []
    return [one for part in media for one in flat(part)] if isinstance(media, list) else [media]


# ---- images ----------------------------------------------------------------------------------------------------------


def opened(image) -> Image.Image:
    """An image from a path, a URL, bytes of a file or an array [H, W, 3]; of files the pixels are not decoded yet."""
    if isinstance(image, Image.Image):
        image.load()  # the caller's stays of its size: `resized` would have it decoded at a smaller one
        return image
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return load_image(image)
    if isinstance(image, bytes | bytearray):
        return Image.open(io.BytesIO(image))
    return Image.fromarray(np.asarray(image)) if hasattr(image, "__array__") else Image.open(image)


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 that is still to be applied; Pillow applies that of TIFF files itself."""
    if image.format == "TIFF":
        return 1
    try:
        found = Image.Image.getexif(image).get(ORIENTATION, 1)
    except Exception:  # unreadable EXIF
        return 1
    return found if found in TRANSPOSITIONS else 1


def resized(image: Image.Image, orientation: int, target_hw: tuple[int, int]) -> np.ndarray:
    """RGB pixels uint8 [H, W, 3] as shown, bilinear.

    A JPEG that is not decoded yet is decoded at 1/2, 1/4 or 1/8 of its size where that is at least twice the target on
    both sides, as in training.
    """
    size = target_hw if orientation >= 5 else target_hw[::-1]
    draft = image.draft(None, (2 * size[0], 2 * size[1]))
    box = draft[1] if draft else None
    image.load()
    image = to_rgb(image)
    if size != image.size or (box and box != (0, 0, *size)):
        image = image.resize(size, Image.Resampling.BILINEAR, box)
    if orientation in TRANSPOSITIONS:
        image = image.transpose(TRANSPOSITIONS[orientation])
    return np.asarray(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Transparency on white, palettes expanded, the top byte of 16-bit samples."""
    if image.mode in ("I", "F"):
        raise ValueError(f"the image has 32-bit samples (mode {image.mode}), which have no agreed white")
    if image.mode in SIXTEEN_BIT:
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- videos ----------------------------------------------------------------------------------------------------------


def container_of(video):
    """An opened file, from a path or bytes."""
    try:
        import av
    except ImportError as error:
        raise ImportError("video files are read by PyAV: pip install av, or give (frames, times)") from error
    return av.open(io.BytesIO(video) if isinstance(video, bytes | bytearray) else str(video))


def duration_of(video) -> int:
    """Milliseconds of the video track; of the whole file where the track does not tell."""
    with container_of(video) as container:
        stream = container.streams.video[0]
        if stream.duration is not None:
            return int(stream.duration * stream.time_base * 1000)
        parts = stream.metadata.get("DURATION", "").split(":")
        if len(parts) == 3:
            return int(1000 * sum(float(part) * scale for part, scale in zip(parts, (3600, 60, 1), strict=True)))
        return int((container.duration or 0) / 1000)


def frames_at(video, times_ms: list[int]) -> list[np.ndarray]:
    """The frames shown at ascending times, RGB [H, W, 3]: each the last that begins at or before its time."""
    shown: list[np.ndarray] = []
    with container_of(video) as container:
        stream = container.streams.video[0]
        start, last = stream.start_time, None
        for frame in container.decode(stream):
            pts = frame.pts if frame.pts is not None else frame.dts
            start = pts if start is None else min(start, pts)
            begins_ms = math.floor((pts - start) * float(1000 * stream.time_base) + 1e-6)
            while last is not None and len(shown) < len(times_ms) and times_ms[len(shown)] < begins_ms:
                shown.append(pixels_of(last))
            if len(shown) == len(times_ms):
                return shown
            last = frame
        shown += [pixels_of(last)] * (len(times_ms) - len(shown))
    return shown


def pixels_of(frame) -> np.ndarray:
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
