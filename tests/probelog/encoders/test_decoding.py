import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from probelog.encoders.decoding import MAX_PIXELS, UnreadableImageError, decode, looks_like_image, to_rgb
from tests.support.worlds.tiny_encoders import photo


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of a hundred bytes that claims billions of pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_give_their_pixels_back(kind):
    image = photo(17, 11)
    found = decode(encoded(image, kind))
    assert type(found) is Image.Image
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_come_close(kind):
    assert (
        np.abs(
            np.asarray(decode(encoded(photo(40, 30), kind))).astype(int) - np.asarray(photo(40, 30))
        ).mean()
        < 25
    )


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("L", (4, 4), 90), (90, 90, 90)),
        (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 65535, np.uint16)), (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)), (100, 100, 100)),
        (Image.fromarray(np.full((4, 4), 200, np.int32)), (200, 200, 200)),
        (Image.fromarray(np.full((4, 4), 257 * 100, np.int32)), (100, 100, 100)),
    ],
)
def test_every_mode_becomes_rgb(image, colour):
    found = to_rgb(image)
    assert found.mode == "RGB"
    assert found.getpixel((1, 2)) == colour


def test_palette_with_transparency_lies_on_white():
    image = photo(8, 8).quantize(4)
    data = encoded(image, transparency=image.getpixel((0, 0)))
    assert decode(data).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_jpeg():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = decode(encoded(image, "JPEG", quality=95)).getpixel((8, 8))
    assert red > 240
    assert green < 15
    assert blue < 15


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_once(form: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if form == "TIFF" else {"lossless": True} if form == "WEBP" else {}
    data = encoded(photo(20, 10), form, exif=exif if form == "TIFF" else exif.tobytes(), **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    upright = decode(data)
    assert upright.size == ((20, 10) if orientation < 5 else (10, 20))
    assert np.array_equal(np.asarray(upright), expected)
    assert ImageOps.exif_transpose(upright).size == upright.size  # nobody turns it again


def test_exif_that_cannot_be_read_turns_nothing():
    data = encoded(photo(20, 10), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\x01" * 30)
    assert decode(data).size == (20, 10)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((2, 2)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "large"),
    [
        (b"", False),
        (b"no image", False),
        (b"\x89PNG\r\n\x1a\n", False),
        (encoded(photo(64, 64), "JPEG")[:-400], False),
        (encoded(photo(64, 64), "PNG")[:-400], False),
        (encoded(photo(64, 64), "PPM"), False),
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), False),
        (encoded(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"), False),
        (bomb(), True),
        (bomb(8000, MAX_PIXELS // 8000 + 1), True),
        (encoded(Image.new("L", (1, 51))), True),
    ],
)
def test_what_cannot_be_used_is_refused(data, large):
    with pytest.raises(UnreadableImageError) as caught:
        decode(data)
    assert caught.value.too_large is large


def test_formats_are_recognised_by_their_first_bytes():
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        assert looks_like_image(encoded(photo(5, 5), kind)[:16])
    for head in (b"", b"PAR1", b"%!PS-Adobe", b"<svg", b"RIFF....WAVE"):
        assert not looks_like_image(head)
