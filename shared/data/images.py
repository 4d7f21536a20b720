"""
Images of users -> arrays: files, NumPy arrays and Pillow images alike, in training, evaluation and inference. What a
proper viewer of the format shows is what comes out, or InputError says why not. Pillow decodes pictures, NumPy .npy,
pydicom DICOM where it is installed; what a file is shows in its first bytes, not in its name.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import glob
import os
import re
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from shared.runtime import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".npy", ".dcm", ".dicom")
# How files of .npy, PNG, JPEG, TIFF, GIF, WebP and JPEG 2000 begin; DICOM, also without its preamble: a first element
# of group 2 or 8, with its type or with a length below 64 KiB.
NPY = b"\x93NUMPY"
PICTURE = re.compile(rb"\x93NUMPY|\x89PNG|\xff\xd8\xff|II[*+]\0|MM\0[*+]|GIF8|RIFF....WEBP|\0\0\0\x0cjP", re.DOTALL)
DICOM = re.compile(rb".{128}DICM|[\x02\x08]\0(..[A-Z]{2}|.\0..\0\0)|\0[\x02\x08]..[A-Z]{2}", re.DOTALL)
PADDING = ("PixelPaddingValue", "PixelPaddingRangeLimit")  # the values of what lies outside of a film
MIN_SIDE = 16  # pixels; below that nothing of a chest film is left
MAX_RATIO = 20  # of the longer to the shorter side; a film of a whole leg or spine has 4

# --------------------------------------------------------------------------------------------------------- which files


def find_images(patterns):
    """
    Files, folders (searched through) and glob patterns -> list of paths, each once. A path that exists is that path,
    whatever brackets are in its name. A folder means its images: files with a usual suffix, and those that begin
    as an image file does; how many others were passed over is printed. InputError when a pattern
    matches nothing, or when there is no image at all.
    """
    found, empty = [], []
    for pattern in map(str, patterns):
        hits = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not hits and any(c in pattern for c in "*?["):
            raise InputError(f"no file matches {pattern}")
        for path in hits or [pattern]:  # a missing file is reported with the others, in errors.csv
            here = images_below(path) if os.path.isdir(path) else [Path(path)]
            found += here
            if not here:
                empty.append(f"there is no image in {path} (looked for {', '.join(SUFFIXES)}, and into the files)")
    if empty and not found:
        raise InputError(empty[0])
    for sentence in empty:
        print(f"passed over: {sentence}")
    return list({os.path.abspath(path): path for path in found}.values())


def images_below(folder):
    """The images of a folder and of those in it, sorted; how many files were passed over is printed."""
    images, others = [], []
    for place, folders, names in os.walk(folder, onerror=lambda error: others.append(error.filename)):
        skipped = [name for name in folders if name[0] == "." or name == "__MACOSX" or Path(place, name).is_symlink()]
        folders[:] = [name for name in folders if name not in skipped]
        others.extend(skipped)
        for name in names:
            (images if is_image(Path(place, name)) else others).append(Path(place, name))
    if others:
        names = sorted(os.path.basename(path) for path in others)
        some = ", ".join(names[:3] + ["..."] * (len(names) > 3))
        line = f"{folder}: {len(images)} images; passed over: {len(names)} ({some})"
        print(os.fsencode(line).decode("utf-8", "replace"))  # names that are not UTF-8 can be opened, but not printed
    return sorted(images)


def is_image(path):
    """
    Whether a file found in a folder is taken for an image. Broken files with the suffix of one are: they get a row in
    errors.csv. Hidden files (such as "._film.png" of macOS) and DICOM without pixels (DICOMDIR) are not.
    """
    usual = path.suffix.lower() in SUFFIXES
    if path.name.startswith(".") or not path.is_file():
        return False
    try:
        head = first_bytes(path)
        if not DICOM.match(head):
            return usual or PICTURE.match(head) is not None
        import pydicom

        return "Rows" in pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=["Rows"])
    except InputError:
        return usual
    except Exception:  # no pydicom, or a damaged file: read_image says so
        return path.name.upper() != "DICOMDIR"


def first_bytes(path):
    """The first 132 bytes of a file; InputError, with the reason, when it is not a file that can be read."""
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind):
            raise InputError("this is a folder" if stat.S_ISDIR(kind) else "this is no regular file")
        with open(path, "rb") as file:
            head = file.read(132)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError("the file does not exist") from error
    except (OSError, ValueError) as error:  # no permission, a loop of links, a name too long or with a NUL
        raise InputError(f"the file cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    if not head:
        raise InputError("the file is empty")
    return head


# ------------------------------------------------------------------------------------------------------------- reading


def read_pixels(source):
    """read_image, rounded -> uint8 (H, W) grey or (H, W, 3) colour."""
    return np.rint(read_image(source) * 255).astype(np.uint8)


def read_image(source):
    """
    Path, array (H, W), (1, H, W), (H, W, 1) or (H, W, 3), or Pillow image -> float32 (H, W) grey or (H, W, 3) colour,
    in 0..1. InputError with one sentence for whatever cannot be used.

    8-bit pixels are divided by 255. Deeper ones (16-bit PNG and TIFF, float arrays, DICOM without a window) say nothing
    about black and white, so their 0.5 and 99.5 percentiles become 0 and 1; floats that lie in 0..1 already are taken
    as they are. Films stored with white as zero are turned round, orientations of EXIF are followed, and what is
    transparent becomes black, as is the surround of a film.
    """
    if isinstance(source, (str, os.PathLike)):
        head = first_bytes(source)
        suffix = "" if PICTURE.match(head) else Path(source).suffix.lower()  # a PNG may be called film.dcm
        if head.startswith(NPY) or suffix == ".npy":
            pixels = read_npy(source)
        elif DICOM.match(head) or suffix in (".dcm", ".dicom"):
            pixels = read_dicom(source)
        else:
            pixels = read_picture(source)
    else:
        pixels = read_picture(source) if isinstance(source, Image.Image) else as_image(np.asarray(source))
    check_size(*pixels.shape[1::-1])
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / 255
    with np.errstate(over="ignore"):
        pixels = pixels.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise InputError("the image has NaN or infinite pixels")
    return to_unit_range(pixels)


def image_size(path):
    """(width, height) of what read_image gives, from the head of the file where Pillow can tell; its InputError."""
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                turned = image.format != "TIFF" and image.getexif().get(274, 1) > 4  # of a TIFF, Pillow turns the size
                return image.size[::-1] if turned else image.size
    except Exception:  # DICOM, .npy, and whatever read_image has a sentence for
        height, width = read_image(path).shape[:2]
        return width, height


def check_size(width, height):
    size = f"{width}x{height} pixels"
    if min(width, height) < MIN_SIDE:
        raise InputError(f"the image is too small: {size}, at least {MIN_SIDE}x{MIN_SIDE} are needed")
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise InputError(f"the image has too many pixels to be a radiograph ({size}); scale it down first")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise InputError(f"the image is too long and narrow: {size}, one side more than {MAX_RATIO} times the other")


def to_unit_range(pixels):
    if pixels.min() >= -1e-3 and 0 < pixels.max() <= 1 + 1e-3:  # resampling goes a little over the edge
        return np.clip(pixels, 0, 1)
    return stretched(pixels, pixels)


def stretched(pixels, shown):
    """The 0.5 and 99.5 percentiles of `shown` become 0 and 1."""
    low, high = np.percentile(shown, (0.5, 99.5)).astype(np.float32)
    return np.clip((pixels - low) / max(high - low, np.float32(1e-6)), 0, 1)


def read_picture(source):
    """A file or a Pillow image -> uint8 (H, W) or (H, W, 3), or the numbers of a deeper one as they are."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size refuses those too
            if isinstance(source, Image.Image):
                return pixels_of(source)
            with open(source, "rb") as file, Image.open(file) as image:  # by path, Pillow scrambles turned grey TIFFs
                check_pages(image)
                return pixels_of(image)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError("the image has too many pixels to be a radiograph; scale it down first") from error
    except Exception as error:  # Pillow raises many kinds for damaged files, of which OSError is the usual one
        raise InputError("the file is not an image, or is damaged or cut short") from error


def check_pages(image):
    """One picture is meant: smaller ones beside it are previews, and so is whatever a camera's MPO file holds."""
    if image.format == "MPO" or getattr(image, "n_frames", 1) == 1:
        return
    size = image.size
    for number in range(1, image.n_frames):
        image.seek(number)
        if image.size == size:
            raise InputError(f"the file holds {image.n_frames} pictures; save the one that is meant as PNG")
    image.seek(0)


def pixels_of(image):
    check_size(*image.size)  # before anything is decoded
    white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0  # a tag of TIFF that Pillow minds up to 8 bits only
    image.load()  # turns a TIFF round by itself
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 and 32 bit
        pixels = np.asarray(image)
        return (1 if 0 <= pixels.min() <= pixels.max() <= 1 else pixels.max()) - pixels if white_is_zero else pixels
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if not image.getchannel("A").getbbox():
            raise InputError("the image is transparent all over")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    return grey_if_grey(np.asarray(image.convert("RGB")))  # palettes and CMYK too


def read_npy(path):
    try:
        pixels = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds for damaged headers
        raise InputError("the .npy file is damaged, or holds Python objects") from error
    if not isinstance(pixels, np.ndarray):
        pixels.close()
        raise InputError("the file is an .npz archive; save the one array as .npy")
    return as_image(pixels)


def as_image(pixels):
    """An array of numbers -> (H, W) or (H, W, 3)."""
    if pixels.dtype.kind not in "uif":
        raise InputError(f"the array must hold numbers, not {pixels.dtype}")
    if pixels.ndim == 3 and pixels.shape[0] == 1:  # (1, H, W)
        pixels = pixels[0]
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise InputError(f"an image has the shape (H, W) or (H, W, 3), this one {pixels.shape}")
    return grey_if_grey(pixels)


def grey_if_grey(pixels):
    """A colour image with three equal channels is a grey one."""
    return pixels[..., 0] if pixels.ndim == 3 and (pixels == pixels[..., :1]).all() else pixels


def read_dicom(path):
    """The pixels as the file says they are shown: its window or table, black as zero; without one, as they are."""
    try:
        import pydicom
        from pydicom.pixels import apply_color_lut
        from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
    except ImportError as error:
        raise InputError("DICOM needs pydicom 3: pip install pydicom, or save the image as PNG") from error
    try:
        film = pydicom.dcmread(path, force=True)  # files without a preamble too
        if "Rows" not in film:
            raise InputError("the DICOM file cannot be read: it holds no pixels")
        if int(film.get("NumberOfFrames") or 1) > 1:
            raise InputError(f"the DICOM file holds {film.NumberOfFrames} pictures; save the one that is meant as PNG")
        check_size(film.Columns, film.Rows)
        if "TransferSyntaxUID" not in film.file_meta:
            implicit, little = film.original_encoding
            explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            film.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
        pixels, bits = film.pixel_array, film.BitsStored
        if film.PhotometricInterpretation == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, film)
            bits = 8 * pixels.itemsize
        if pixels.ndim == 3:  # colour: YCbCr is RGB by now
            return as_image((pixels >> max(0, bits - 8)).astype(np.uint8))
        return windowed(film, pixels)
    except InputError:
        raise
    except Exception as error:  # pydicom raises many kinds for damaged and for compressed files
        reason = str(error).splitlines()[0] if str(error) else ""
        raise InputError(f"the DICOM file cannot be read ({type(error).__name__}: {reason})") from error


def windowed(film, stored):
    """Stored values (H, W) of a grey film -> float32 in 0..1: by its table, by its window, or between percentiles."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = apply_modality_lut(stored, film)
    window = [film.get(name) for name in ("WindowCenter", "WindowWidth")]
    center, width = (0, 0) if None in window else (float(np.atleast_1d(value)[0]) for value in window)
    function = film.get("VOILUTFunction") or "LINEAR"
    low, high = sorted(film.get(name, film.get("PixelPaddingValue", np.nan)) for name in PADDING)
    padding = (stored >= low) & (stored <= high)
    if film.get("VOILUTSequence"):
        values = apply_voi(values.astype(np.int64), film) / (2 ** film.VOILUTSequence[0].LUTDescriptor[2] - 1)
    elif width > 0 and function == "SIGMOID":
        values = 1 / (1 + np.exp(-4 * (values - center) / width))
    elif width > 0 and function == "LINEAR_EXACT":
        values = (values - center) / width + 0.5
    elif width > 1:  # DICOM PS3.3, C.11.2.1.2
        values = (values - (center - 0.5)) / (width - 1) + 0.5
    elif film.BitsStored == 8 and 0 <= values.min() <= values.max() <= 255:
        values = values / 255
    else:
        values = stretched(values, values if padding.all() else values[~padding])
    values = np.clip(values, 0, 1).astype(np.float32)
    if film.PhotometricInterpretation == "MONOCHROME1":  # stored with white as zero
        values = 1 - values
    values[padding] = 0  # what lies outside of the film
    return values


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
