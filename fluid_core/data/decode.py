"""Decoding inside a guard: source bytes to upright RGB pixels of the wanted size, or the reason why not.

Everything that a codec may raise is caught here, the size is checked from the header before any pixel is decoded, and JPEGs
much larger than needed are decoded at a half, a quarter or an eighth (`Image.draft`), which the codec does for free.
"""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

Pixels = NDArray[np.uint8]


class BadImage(Exception):
    """The image cannot be decoded (quarantine), with a reason code and a detail."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class DroppedImage(Exception):
    """The image is sound, and a filter does not want it."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class DecodeOptions:
    image_size: int
    max_pixels: int = 100_000_000
    min_side: int = 1
    max_aspect: float | None = None
    buckets: tuple[tuple[int, int], ...] = ()
    """(height, width) in pixels; empty: the square centre crop."""


@dataclass(frozen=True)
class DecodedImage:
    pixels_HW3: Pixels
    width: int
    height: int
    """Of the upright source."""
    crop: tuple[int, int, int, int]
    """left, top, right, bottom in the upright source."""


def decode_image(data: bytes, options: DecodeOptions) -> DecodedImage:
    """Decode, turn upright, flatten to RGB over white, crop and resize (Lanczos).

    Raises:
        BadImage, DroppedImage
    """
    if not data:
        raise BadImage("empty_image", "no bytes")
    try:
        image = _open(data, options)
        # Pillow turns a TIFF upright by itself.
        orientation = 1 if image.format == "TIFF" else image.getexif().get(0x0112, 1)
        width, height = (image.height, image.width) if orientation in (5, 6, 7, 8) else (image.width, image.height)
        crop, size = _crop(width, height, options)
        if image.format == "JPEG":
            image.draft(None, _draft_size(image.size, (crop[2] - crop[0], crop[3] - crop[1]), size))
        image.load()
        if orientation != 1:
            image = ImageOps.exif_transpose(image)
        rgb = to_rgb(image)
        scale_x, scale_y = rgb.width / width, rgb.height / height
        box = (crop[0] * scale_x, crop[1] * scale_y, crop[2] * scale_x, crop[3] * scale_y)
        if rgb.size != (size[1], size[0]) or box != (0, 0, *rgb.size):
            rgb = rgb.resize((size[1], size[0]), Image.Resampling.LANCZOS, box=box)
        return DecodedImage(np.asarray(rgb), width, height, crop)
    except (BadImage, DroppedImage):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("decompression_bomb", str(error)) from None
    except MemoryError:
        raise BadImage("decompression_bomb", "decoding ran out of memory") from None
    except Exception as error:  # codecs raise OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError, ...
        reason = "truncated_image" if "truncated" in str(error).lower() else "corrupt_image"
        raise BadImage(reason, f"{type(error).__name__}: {error}"[:200]) from None


def _open(data: bytes, options: DecodeOptions) -> Image.Image:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "somebody switched Pillow to accept truncated images"
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        raise BadImage("not_an_image", f"starts with {data[:16]!r}") from None
    if image.width * image.height > options.max_pixels:
        raise BadImage("decompression_bomb", f"declares {image.width}x{image.height} pixels, the limit is {options.max_pixels}")
    # An animation opens at its first frame; n_frames would read the whole file.
    if min(image.size) < options.min_side:
        raise DroppedImage("min_side")
    if options.max_aspect is not None and max(image.size) > options.max_aspect * min(image.size):
        raise DroppedImage("max_aspect")
    return image


def _crop(width: int, height: int, options: DecodeOptions) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """(the largest centred box of the target's shape, the target's (height, width))."""
    size = (options.image_size, options.image_size)
    if options.buckets:
        aspect = np.log(width / height)
        size = min(options.buckets, key=lambda hw: (abs(np.log(hw[1] / hw[0]) - aspect), hw))
    wanted = size[1] / size[0]
    crop_width = min(width, max(1, round(height * wanted)))
    crop_height = min(height, max(1, round(width / wanted)))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return (left, top, left + crop_width, top + crop_height), size


def _draft_size(stored: tuple[int, int], crop: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size at which the crop still has the target's pixels; draft() never goes below what it is asked for."""
    factor = max(1, min(crop[0] // size[1], crop[1] // size[0]))
    return -(-stored[0] // factor), -(-stored[1] // factor)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: transparency over white, 16-bit and float scaled to 8 bits (Pillow's own conversion clips them)."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        peak = 65535.0 if image.mode != "F" or values.max(initial=0) > 1.0 else 1.0
        return Image.fromarray(np.clip(values * (255.0 / peak) + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        white.alpha_composite(rgba)
        return white.convert("RGB")
    return image.convert("RGB")


def bucket_sizes(image_size: int, stride: int, max_aspect: float = 2.0) -> tuple[tuple[int, int], ...]:
    """Aspect-ratio buckets (height, width): multiples of `stride`, about image_size^2 pixels, aspect up to `max_aspect`."""
    area = image_size * image_size
    found: set[tuple[int, int]] = {(image_size, image_size)}
    for width in range(stride, int(image_size * max_aspect**0.5) + stride + 1, stride):
        height = max(stride, round(area / width / stride) * stride)
        if max(width, height) / min(width, height) <= max_aspect and height * width <= area * 1.06:
            found.add((height, width))
            found.add((width, height))
    return tuple(sorted(found))
