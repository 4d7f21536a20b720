"""
Image files of users -> arrays in 0..1. Pillow decodes PNG, JPEG and TIFF, NumPy .npy, pydicom DICOM where it is
installed.
"""

import glob
from pathlib import Path

import numpy as np
from PIL import Image

from shared.runtime import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".npy", ".dcm", ".dicom")
MIN_SIDE = 16  # pixels; below that nothing of a chest film is left


def find_images(patterns):
    """
    Files, folders (searched through) and glob patterns -> sorted list of paths. InputError when one of them has no
    image.
    """
    found = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            here = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
            if not here:
                raise InputError(f"there is no image in {path} (looked for {', '.join(SUFFIXES)})")
        else:
            here = [Path(p) for p in sorted(glob.glob(str(pattern), recursive=True))]
            if not here and any(c in str(pattern) for c in "*?["):
                raise InputError(f"no file matches {pattern}")
            here = here or [path]  # a missing file is reported with the others, in errors.csv
        found += here
    return list(dict.fromkeys(found))


def read_image(path):
    """
    -> float32 (H, W) grey or (H, W, 3) colour, in 0..1. InputError with one sentence for whatever cannot be used.

    8-bit pixels are divided by 255. Deeper ones (16-bit PNG and TIFF, float arrays, DICOM) say nothing about black and
    white, so their 0.5 and 99.5 percentiles become 0 and 1; arrays of floats that lie in 0..1 already are taken as they
    are.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("the file does not exist")
    if path.stat().st_size == 0:
        raise InputError("the file is empty")
    suffix = path.suffix.lower()
    if suffix == ".npy":
        pixels = read_npy(path)
    elif suffix in (".dcm", ".dicom"):
        pixels = read_dicom(path)
    else:
        pixels = read_picture(path)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise InputError(f"an image has the shape (H, W) or (H, W, 3), this one {pixels.shape}")
    if min(pixels.shape[:2]) < MIN_SIDE:
        raise InputError(
            f"the image is too small: {pixels.shape[1]}x{pixels.shape[0]} pixels, at least {MIN_SIDE}x{MIN_SIDE} are"
            " needed"
        )
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / 255
    with np.errstate(over="ignore"):
        pixels = pixels.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise InputError("the image has NaN or infinite pixels")
    return to_unit_range(pixels)


def to_unit_range(pixels):
    if pixels.min() >= 0 and 0 < pixels.max() <= 1:
        return pixels
    low, high = np.percentile(pixels, (0.5, 99.5)).astype(np.float32)
    return np.clip((pixels - low) / max(high - low, np.float32(1e-6)), 0, 1)


def read_picture(path):
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith(("I", "F")):  # 16 and 32 bit
                return np.asarray(image)
            if image.mode in ("1", "L", "LA", "La"):
                return np.asarray(image.convert("L"))
            return grey_if_grey(np.asarray(image.convert("RGB")))  # palettes, transparency and CMYK too
    except Image.DecompressionBombError as error:
        raise InputError("the image has too many pixels to be a radiograph; scale it down first") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for damaged files
        raise InputError("the file is not an image, or is damaged or cut short") from error


def read_npy(path):
    try:
        pixels = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds for damaged headers
        raise InputError("the .npy file is damaged, or holds Python objects") from error
    if not isinstance(pixels, np.ndarray):
        pixels.close()
        raise InputError("the file is an .npz archive; save the one array as .npy")
    if pixels.dtype.kind not in "uif":
        raise InputError(f"the array must hold numbers, not {pixels.dtype}")
    if pixels.ndim == 3 and pixels.shape[0] == 1:  # (1, H, W)
        pixels = pixels[0]
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return grey_if_grey(pixels)


def grey_if_grey(pixels):
    """A colour image with three equal channels is a grey one."""
    if (
        pixels.ndim == 3
        and pixels.shape[2] == 3
        and (pixels[..., 0] == pixels[..., 1]).all()
        and (pixels[..., 1] == pixels[..., 2]).all()
    ):
        return pixels[..., 0]
    return pixels


def read_dicom(path):
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError as error:
        raise InputError("DICOM needs pydicom 3: pip install pydicom, or save the image as PNG") from error
    try:
        dataset = pydicom.dcmread(path)
        pixels = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset).astype(np.float32)
    except Exception as error:  # pydicom raises many kinds for damaged and for compressed files
        raise InputError(
            f"the DICOM file cannot be read ({type(error).__name__}:"
            f" {str(error).splitlines()[0] if str(error) else ''})"
        ) from error
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":  # stored with white as zero
        pixels = pixels.max() - pixels
    return pixels


def to_square(pixels, size, channels):
    """
    float (H, W) or (H, W, 3) in 0..1 -> uint8 (channels, size, size): the central square, resized with an antialiased
    bicubic filter, which is how MedMNIST made its images. Grey to colour repeats the channel; colour to grey is ITU-R
    601 luma.
    """
    if pixels.ndim == 3 and channels == 1:
        pixels = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pixels = pixels[top : top + side, left : left + side]
    planes = [pixels] if pixels.ndim == 2 else [pixels[..., c] for c in range(3)]
    resized = [np.asarray(Image.fromarray(np.ascontiguousarray(p)).resize((size, size), Image.BICUBIC)) for p in planes]
    resized = np.clip(np.stack(resized) * 255, 0, 255).round().astype(np.uint8)
    return resized if len(resized) == channels else np.repeat(resized, channels, axis=0)
