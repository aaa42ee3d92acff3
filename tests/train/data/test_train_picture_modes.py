"""A picture of any mode, depth, orientation and colour space becomes the RGB picture that a viewer shows."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw, features
from transformers.image_utils import load_image

from vgpo_train.data import PictureError, Sample
from vgpo_train.data.pictures import open_picture

RANDOM = np.random.default_rng(0)
COLOURS = Image.fromarray(RANDOM.integers(0, 256, (12, 10, 3), dtype=np.uint8))
DEEP = RANDOM.integers(0, 65536, (6, 5), dtype=np.uint16)
FRACTIONS = RANDOM.random((6, 5)).astype(np.float32)
SRGB = ImageCms.createProfile("sRGB")


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def seen(data: bytes) -> np.ndarray:
    """Returns what the driver makes of a file, (height, width, 3) or a plane where all three are equal."""
    pixels = np.asarray(open_picture(data)).astype(int)
    return pixels[..., 0] if (pixels == pixels[..., :1]).all() else pixels


def png(depth: int, kind: int, size: tuple[int, int], data: bytes, **chunks: bytes) -> bytes:
    """Returns a PNG that Pillow itself would not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0))]
    parts += [chunk(name.encode(), content) for name, content in chunks.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")])


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *[("1", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGB", "PNG"), ("P", "GIF"), ("RGB", "WEBP"), ("RGB", "BMP")],
        *[("L", "JPEG"), ("RGB", "JPEG"), ("YCbCr", "JPEG"), ("RGB", "JPEG2000"), ("RGB", "ICO"), ("RGB", "PPM")],
        # The CMYK of a JPEG is stored inverted, as Adobe's programs do.
        *[("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("LAB", "TIFF"), ("P", "TIFF"), ("RGB", "TGA")],
    ],
)
def test_plain_pictures_are_what_transformers_loads(mode: str, kind: str) -> None:
    picture = COLOURS.convert(mode) if mode != "LAB" else _lab(COLOURS)
    data = encoded(picture, kind)
    expected = np.asarray(load_image(Image.open(io.BytesIO(data))))
    assert np.array_equal(np.asarray(open_picture(data)), expected)


def _lab(picture: Image.Image) -> Image.Image:
    return ImageCms.profileToProfile(picture, SRGB, ImageCms.createProfile("LAB"), outputMode="LAB")


def _square(mode: str) -> tuple[Image.Image, dict[str, Any]]:
    """Returns a black square on a transparent ground, and how to save it."""
    if mode.endswith("by colour"):
        picture = Image.new("L", (56, 56), 7)
        ImageDraw.Draw(picture).rectangle((20, 20, 35, 35), fill=0)
        mode = mode.split()[0]
        return picture.convert(mode), {"transparency": (7, 7, 7) if mode == "RGB" else 7}
    picture = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    ImageDraw.Draw(picture).rectangle((20, 20, 35, 35), fill=(0, 0, 0, 255))
    return picture.convert(mode), {}


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *[(mode, "PNG") for mode in ("RGBA", "LA", "P", "P by colour", "L by colour", "RGB by colour")],
        *[("RGBA", "WEBP"), ("LA", "WEBP"), ("RGBA", "TIFF"), ("LA", "TIFF"), ("RGBA", "GIF"), ("P by colour", "GIF")],
    ],
)
def test_what_is_transparent_is_white(mode: str, kind: str) -> None:
    picture, options = _square(mode)
    options |= {"lossless": True} if kind == "WEBP" else {}
    values = np.full((56, 56), 255)
    values[20:36, 20:36] = 0
    assert np.array_equal(seen(encoded(picture, kind, **options)), values)


def test_what_is_half_transparent_is_half_white() -> None:
    assert seen(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG"))[0, 0] == 127


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "RGBX", "HSV", "LAB"])
def test_modes_that_few_files_have(mode: str) -> None:
    from vgpo_train.data.pictures import _rgb

    grey = Image.new("RGBA", (4, 4), (90, 90, 90, 255))
    picture = {
        "RGBa": lambda: grey.convert("RGBa"),
        "La": lambda: grey.convert("LA").convert("La"),
        "PA": lambda: grey.convert("P").convert("PA"),
        "RGBX": lambda: grey.convert("RGB").convert("RGBX"),
        "HSV": lambda: grey.convert("RGB").convert("HSV"),
        "LAB": lambda: _lab(grey.convert("RGB")),
    }[mode]()
    assert picture.mode == mode
    # A palette and LAB round.
    assert np.abs(np.asarray(_rgb(picture)).astype(int) - 90).max() <= 1


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(DEEP), "PNG"),
        encoded(Image.fromarray(DEEP), "TIFF"),
        encoded(Image.fromarray(DEEP.astype(">u2")), "TIFF"),
        encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
        encoded(Image.fromarray(DEEP), "JPEG2000"),
        b"P5 5 6 65535\n" + DEEP.astype(">u2").tobytes(),
    ],
    ids=["png", "tiff", "tiff of big-endian", "tiff of 32 bits", "jpeg 2000", "pgm"],
)
def test_sixteen_bits_are_scaled_not_clipped(data: bytes) -> None:
    assert np.array_equal(seen(data), np.rint(DEEP / 257))


def test_deep_grey_knows_white_is_zero_and_what_is_transparent() -> None:
    data = bytearray(encoded(Image.fromarray(DEEP), "TIFF"))
    entry = data.find(struct.pack("<HH", 262, 3))
    data[entry + 8 : entry + 10] = struct.pack("<H", 0)
    assert np.array_equal(seen(bytes(data)), 255 - np.rint(DEEP / 257))
    two = png(16, 0, (2, 1), b"\0" + struct.pack(">2H", 300, 25700), tRNS=struct.pack(">H", 300))
    assert seen(two).tolist() == [[255, 100]]


@pytest.mark.parametrize("top", [1, 255])
def test_floats_are_fractions_or_bytes(top: int) -> None:
    data = encoded(Image.fromarray(FRACTIONS * np.float32(top)), "TIFF")
    assert np.abs(seen(data) - FRACTIONS * 255).max() <= 0.51


def test_floats_a_little_above_1_are_fractions_and_unclear_ones_are_refused() -> None:
    # Resampling overshoots.
    assert seen(encoded(Image.fromarray(np.float32([[0, 0.5, 1.01]])), "TIFF")).tolist() == [[0, 128, 255]]
    with pytest.raises(ValueError, match="floats up to 3 as grey values; expected them to go from 0 to 1 or to 255"):
        seen(encoded(Image.fromarray(np.float32([[0, 1, 3]])), "TIFF"))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(4, 0, (2, 1), b"\0\x3f", tRNS=b"\0\3"), [255, 255]),
        (png(2, 0, (2, 1), b"\0\x40", tRNS=b"\0\1"), [255, 0]),
        (png(1, 0, (2, 1), b"\0\x40", tRNS=b"\0\0"), [255, 255]),
        (png(16, 2, (2, 1), b"\0" + b"\5\0" * 3 + b"\7\0" * 3, tRNS=b"\5\0" * 3), [255, 7]),
        (png(16, 4, (2, 1), b"\0" + struct.pack(">4H", 300, 0, 2570, 65535)), [255, 10]),
        (png(4, 3, (2, 1), b"\0\x01", PLTE=b"\x09" * 3 + b"\x05" * 3, tRNS=b"\0"), [255, 5]),
    ],
    ids=["4 bits", "2 bits", "1 bit", "16 bits a colour", "16 bits with alpha", "palette of 4 bits"],
)
def test_depths_of_png(data: bytes, expected: list[int]) -> None:
    assert seen(data).tolist() == [expected]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(COLOURS, kind, exif=exif)
    picture = open_picture(data)
    assert picture.size == ((12, 10) if orientation >= 5 else (10, 12))
    assert np.array_equal(np.asarray(picture), np.asarray(load_image(Image.open(io.BytesIO(data)))))
    assert not picture.getexif(), "no second turn further on"


def test_exif_that_cannot_be_read_is_ignored() -> None:
    data = encoded(COLOURS, "JPEG", exif=b"Exif\0\0rubbish")
    assert np.array_equal(seen(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(seen(data), np.asarray(frames[0]))


def test_a_colour_profile_is_applied() -> None:
    profile = bytearray(ImageCms.ImageCmsProfile(SRGB).tobytes())
    red, green = profile.find(b"rXYZ"), profile.find(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"  # its first channel is green
    for mode in ("RGB", "RGBA", "P"):
        picture = Image.new("RGB", (4, 4), (255, 0, 0)).convert(mode)
        assert seen(encoded(picture, "PNG", icc_profile=bytes(profile)))[0, 0].tolist() == [0, 255, 0], mode


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_profile_that_does_not_fit_is_ignored(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    plain = seen(encoded(COLOURS.convert(mode), kind))
    for profile in (ImageCms.ImageCmsProfile(SRGB).tobytes(), b"rubbish" * 30):
        assert np.array_equal(seen(encoded(COLOURS.convert(mode), kind, icc_profile=profile)), plain)


def _with_nan() -> np.ndarray:
    values = FRACTIONS.copy()
    values[1, 1] = np.nan
    return values


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (encoded(COLOURS, "PNG")[:60], "truncated"),
        (encoded(COLOURS, "JPEG")[:-30], "truncated"),
        (b"<?xml version='1.0'?><svg></svg>", "it is an SVG drawing; convert it"),
        (b"no picture at all", "its format is none that Pillow knows"),
        (b"P5 100000 100000 255\n", "exceeds limit of"),
        (encoded(Image.fromarray(_with_nan()), "TIFF"), "grey values that are not finite"),
        (encoded(Image.fromarray(FRACTIONS - 2), "TIFF"), "grey values from -.*; expected 0 to 1 in mode F"),
        (encoded(Image.fromarray(FRACTIONS * 900), "TIFF"), "grey values from .*; expected 0 to 255 in mode F"),
        (encoded(Image.fromarray(DEEP.astype(np.int32) * 9), "TIFF"), "grey values .*; expected 0 to 65535 in mode I"),
    ],
    ids=["empty", "cut png", "cut jpeg", "svg", "text", "bomb", "nan", "negative", "large float", "large integer"],
)
def test_what_cannot_be_seen_is_refused_with_its_id(data: bytes, message: str) -> None:
    with pytest.raises(
        PictureError, match=rf"rows, line 3: id 'x9': cannot read image of {len(data)} bytes: .*{message}"
    ):
        Sample("x9", "p", "a", (data,), source="rows, line 3").open_images()


def test_the_gamma_of_a_png_is_applied() -> None:
    def chunks(gamma: int, **others: bytes) -> dict[str, bytes]:
        return {**others, "gAMA": struct.pack(">I", gamma)}

    light = np.array([0.0, 0.25, 1.0])
    stored = bytes([0, *np.rint(255 * light).astype(int)])
    linear = png(8, 2, (1, 1), stored, **chunks(100_000))
    assert np.abs(seen(linear)[0, 0] - 255 * light ** (1 / 2.2)).max() <= 1
    for usual in (chunks(45_455), chunks(100_000, sRGB=b"\0"), chunks(0)):
        assert seen(png(8, 2, (1, 1), stored, **usual))[0, 0].tolist() == list(stored[1:])
    transparent = png(8, 6, (1, 1), bytes([0, 64, 64, 64, 0]), **chunks(100_000))
    assert seen(transparent)[0, 0] == 255
    deep = png(16, 0, (1, 1), struct.pack(">BH", 0, 16384), **chunks(100_000))
    assert abs(seen(deep)[0, 0] - 255 * 0.25 ** (1 / 2.2)) <= 1
