"""Opens a picture of any mode that Pillow reads as the RGB picture that a viewer shows."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

_ORIENTATION = ExifTags.Base.Orientation
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF
_KEY_SCALE = {"L;2": 85, "L;4": 17}  # Pillow scales such grey values of a PNG to 8 bits, but not the transparent one
_SRGB = ImageCms.createProfile("sRGB")
_GAMMA = 1 / 2.2  # of sRGB, as PNG writes it


def open_picture(source: Path | bytes) -> Image.Image:
    """Read the first frame of a picture as a viewer shows it: upright, in sRGB, on white.

    An ICC profile is applied, or else the gamma of a PNG. A profile that is broken or belongs to another mode is
    ignored, as are an unreadable EXIF block and a gamma outside 0.1 to 5.
    Grey values of more than 8 bits are scaled, not clipped: integers from 16 bits (12 if a TIFF has 12), floats
    from 0..1 (up to 1.5 are cut), or from 0..255 if one of them is 16 or more.

    Args:
        source: path of the file, or its bytes.

    Returns:
        An RGB picture without metadata.

    Raises:
        ValueError: empty, broken or truncated data, a format that Pillow does not know, no pixels, more pixels than
            Pillow allows, grey values that are not finite or outside their range.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            raw_mode = opened.tile[0].args if opened.format == "PNG" and opened.tile else None
            opened.load()
            _mend_key(opened, raw_mode)
            return _upright(_rgb(opened), _orientation(opened))
    except UnidentifiedImageError as error:
        raise ValueError(_unknown_format(source)) from error
    except Exception as error:  # each of Pillow's decoders has its own errors for broken files
        raise ValueError(str(error) or type(error).__name__) from error


def _unknown_format(source: Path | bytes) -> str:
    start = source[:1024] if isinstance(source, bytes) else source.read_bytes()[:1024]
    if not start:
        return "it is empty"
    if b"<svg" in start:
        return "it is an SVG drawing; convert it into pixels, such as PNG"
    return "its format is none that Pillow knows"


def _mend_key(image: Image.Image, raw_mode: Any) -> None:
    """Bring the colour that a PNG calls transparent to the 8 bits that Pillow has brought its pixels to."""
    key = image.info.get("transparency")
    if raw_mode in _KEY_SCALE and isinstance(key, int):
        image.info["transparency"] = key * _KEY_SCALE[raw_mode]
    elif raw_mode == "RGB;16B" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _rgb(image: Image.Image) -> Image.Image:
    """Return the colours in sRGB, with what is transparent on white."""
    if 0 in image.size:
        raise ValueError(f"it has no pixels, its size is {image.size[0]} x {image.size[1]}")
    colours, alpha = _grey(image) if image.mode == "F" or image.mode.startswith("I") else _colours(image)
    rgb = _with_gamma(_in_srgb(colours, image.info.get("icc_profile")), image.info)
    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    white = Image.new("RGBA", rgb.size, "white")
    return Image.alpha_composite(white, rgb).convert("RGB")


def _colours(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return a picture in a mode that profiles are made for, without alpha, and its alpha (L) or None."""
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())  # colours are stored multiplied by alpha
    alpha = None
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        image = image if image.mode in ("1", "L", "LA") else rgba
    if image.mode in ("1", "LA"):
        return image.convert("L"), alpha
    return (image if image.mode in ("L", "CMYK", "LAB") else image.convert("RGB")), alpha


def _grey(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return grey values of more than 8 bits as L, and their alpha or None."""
    values = np.asarray(image).astype(np.float32)
    tags = getattr(image, "tag_v2", {})
    if not np.isfinite(values).all():
        raise ValueError("it has grey values that are not finite")
    low, high = values.min(), values.max()
    top = 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    if image.mode == "F":
        top = _float_top(float(high))
        if top == 1:
            values, high = values.clip(max=1), min(high, 1)
    if low < 0 or high > top:
        raise ValueError(f"it has grey values from {low:g} to {high:g}; expected 0 to {top} in mode {image.mode}")
    grey = np.rint(values * (255 / top)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.fromarray(grey), alpha


def _float_top(high: float) -> int:
    """Return the value of white among grey values that are floats, by the largest of them."""
    if high <= 1.5:
        return 1
    if high < 16:  # nearly black of 255, or too bright of 1
        raise ValueError(f"it has floats up to {high:g} as grey values; expected them to go from 0 to 1 or to 255")
    return 255


def _in_srgb(colours: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(colours, source, _SRGB, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass  # as viewers do: the colours are then what the mode alone says
    return colours.convert("RGB")


def _with_gamma(rgb: Image.Image, info: dict[str, Any]) -> Image.Image:
    """Return the picture of a PNG that has a gamma but no profile in sRGB."""
    gamma = info.get("gamma")
    if not gamma or "srgb" in info or "icc_profile" in info or math.isclose(gamma, _GAMMA, rel_tol=0.05):
        return rgb
    if not 0.1 <= gamma <= 5:  # no camera and no screen has such a one: it is broken
        return rgb
    return rgb.point([round(255 * (value / 255) ** (_GAMMA / gamma)) for value in range(256)] * 3)


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # EXIF readers have as many errors as EXIF writers have bugs; the pixels are whole
        return None


def _upright(image: Image.Image, orientation: Any) -> Image.Image:
    """Return a picture turned as its orientation tag says, without metadata."""
    image.info.clear()
    if orientation in range(2, 9):
        image.getexif()[_ORIENTATION] = int(orientation)
        image = ImageOps.exif_transpose(image)
        image.info.clear()
    return image
