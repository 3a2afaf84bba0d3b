"""The decode guard: any file becomes right pixels, or one reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fluid_core.data.decode import BadImage, DecodeOptions, DroppedImage, bucket_sizes, decode_image

OPTIONS = DecodeOptions(image_size=32)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def halves(width: int = 64, height: int = 64) -> Image.Image:
    """Red left, blue right."""
    array = np.zeros((height, width, 3), np.uint8)
    array[:, : width // 2, 0] = 255
    array[:, width // 2 :, 2] = 255
    return Image.fromarray(array)


def colours(data: bytes, options: DecodeOptions = OPTIONS) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pixels = decode_image(data, options).pixels_HW3
    assert pixels.dtype == np.uint8 and pixels.shape == (32, 32, 3)
    return tuple(int(v) for v in pixels[16, 4]), tuple(int(v) for v in pixels[16, 27])


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP"])
def test_plain_formats(format):
    left, right = colours(encoded(halves(), format, **({"lossless": True} if format == "WEBP" else {})))
    assert left == (255, 0, 0) and right == (0, 0, 255)


def test_centre_crop_and_record_of_it():
    image = decode_image(encoded(halves(128, 64), "PNG"), OPTIONS)
    assert (image.width, image.height, image.crop) == (128, 64, (32, 0, 96, 64))
    assert image.pixels_HW3[16, 2, 0] == 255 and image.pixels_HW3[16, 29, 2] == 255


def test_exif_rotation_turns_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    upright = decode_image(encoded(halves(96, 64).rotate(90, expand=True), "JPEG", exif=exif.tobytes(), quality=95), OPTIONS)
    assert (upright.width, upright.height) == (96, 64)
    assert upright.pixels_HW3[16, 4, 0] > 200 and upright.pixels_HW3[16, 27, 2] > 200


def test_a_rotated_tiff_is_turned_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_image(encoded(halves(64, 32), "TIFF", exif=exif), OPTIONS)
    assert (decoded.width, decoded.height) == (32, 64)
    assert tuple(decoded.pixels_HW3[4, 16]) == (255, 0, 0) and tuple(decoded.pixels_HW3[27, 16]) == (0, 0, 255)


def test_draft_gives_nearly_the_same_pixels():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((800, 600), Image.Resampling.BICUBIC)
    jpeg = decode_image(encoded(smooth, "JPEG", quality=95), OPTIONS)
    png = decode_image(encoded(smooth, "PNG"), OPTIONS)
    assert jpeg.crop == png.crop and (jpeg.width, jpeg.height) == (800, 600)
    assert np.abs(jpeg.pixels_HW3.astype(int) - png.pixels_HW3).mean() < 3


def test_cmyk_grey_and_palette():
    left, right = colours(encoded(halves().convert("CMYK"), "JPEG", quality=95))
    assert left[0] > 180 and left[2] < 90 and right[2] > 180 and right[0] < 90
    assert colours(encoded(halves().convert("L"), "PNG"))[0] == (76, 76, 76)
    assert colours(encoded(halves().convert("P", palette=Image.Palette.ADAPTIVE), "PNG"))[0] == (255, 0, 0)


def test_transparency_lies_over_white():
    image = halves().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    assert colours(encoded(image, "PNG"))[0] == (255, 255, 255)
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 255, 9, 9, 9])
    assert colours(encoded(palette, "PNG", transparency=1))[0] == (255, 255, 255)
    assert colours(encoded(image.convert("LA"), "PNG"))[0] == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped():
    array = np.full((64, 64), 32768, np.uint16)
    assert colours(encoded(Image.fromarray(array), "PNG"))[0] == (128, 128, 128)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (64, 64), c) for c in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        left = colours(data)[0]
        assert left[0] > 200 and left[2] < 60, format


def test_one_pixel():
    assert decode_image(encoded(Image.new("RGB", (1, 1), "red"), "PNG"), OPTIONS).pixels_HW3.shape == (32, 32, 3)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header declares a huge picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty_image"),
        (b"<html>404</html>", "not_an_image"),
        (bomb(20_000, 20_000), "decompression_bomb"),
        (bomb(11_000, 11_000), "decompression_bomb"),
        (encoded(halves(), "JPEG")[:-200], "truncated_image"),
        (encoded(halves(), "PNG")[:60], "truncated_image"),
        (encoded(halves(), "WEBP")[:-30], "corrupt_image"),
    ],
    ids=["no bytes", "html", "bomb", "small bomb", "cut jpeg", "cut png", "cut webp"],
)
def test_bad_images_have_a_reason(data, reason):
    with pytest.raises(BadImage) as caught:
        decode_image(data, OPTIONS)
    assert caught.value.reason == reason


def test_filters_on_size():
    with pytest.raises(DroppedImage, match="min_side"):
        decode_image(encoded(halves(64, 16), "PNG"), DecodeOptions(32, min_side=20))
    with pytest.raises(DroppedImage, match="max_aspect"):
        decode_image(encoded(halves(64, 16), "PNG"), DecodeOptions(32, max_aspect=3.0))


@pytest.mark.parametrize("side", [256, 512])
def test_buckets(side):
    buckets = bucket_sizes(side, 16)
    assert (side, side) in buckets and all(h % 16 == 0 and w % 16 == 0 and 0.8 < h * w / side**2 < 1.07 for h, w in buckets)
    assert all((w, h) in buckets for h, w in buckets)
    options = DecodeOptions(side, buckets=buckets)
    wide = decode_image(encoded(halves(600, 400), "PNG"), options).pixels_HW3.shape
    assert wide[1] > wide[0] and wide[:2] in buckets
    assert decode_image(encoded(halves(300, 300), "PNG"), options).pixels_HW3.shape == (side, side, 3)


WHOLE = {format: encoded(halves(), format) for format in ("JPEG", "PNG", "WEBP", "GIF")}


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8))
def test_mutated_images_never_crash(format, changes):
    data = bytearray(WHOLE[format])
    for position, value in changes:
        data[position % len(data)] = value
    try:
        assert decode_image(bytes(data), OPTIONS).pixels_HW3.shape == (32, 32, 3)
    except BadImage as error:
        assert error.reason
