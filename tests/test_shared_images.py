"""images.py: every kind of file a user may have, and where its pixels end up."""

import builtins
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.data.images import find_images, grey_if_grey, image_size, read_image, read_pixels, to_square
from shared.runtime import InputError

RAMP = np.add.outer(np.arange(40), np.arange(30) * 6).astype(np.uint8)  # (40, 30), 0 to 213


def read(picture, path):
    if isinstance(picture, Image.Image):
        picture.save(path)
    else:
        np.save(path, picture)
    pixels = read_image(path)
    assert pixels.dtype == np.float32 and np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1
    return pixels


def why_not(path):
    with pytest.raises(InputError) as error:
        read_image(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what can be read ---


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.tif", "a.tiff", "a.bmp"])
def test_eight_bits_are_divided_by_255(name):
    np.testing.assert_array_equal(read(Image.fromarray(RAMP), name), RAMP.astype(np.float32) / 255)


def test_jpeg():
    np.testing.assert_allclose(read(Image.fromarray(RAMP), "a.jpg"), RAMP / 255, atol=0.03)


def stretched(pixels):
    low, high = np.percentile(pixels, (0.5, 99.5))
    return np.clip((pixels - low) / (high - low), 0, 1)


@pytest.mark.parametrize(
    "name, picture",
    [
        ("a.png", Image.fromarray(RAMP.astype(np.uint16) * 257)),
        ("a.tif", Image.fromarray(RAMP.astype(np.uint16) * 16 + 1000)),
        ("b.tif", Image.fromarray(RAMP.astype(np.int32) * 1000)),
        ("c.tif", Image.fromarray(RAMP.astype(np.float32) * 7 - 300)),
        ("a.npy", RAMP.astype(np.uint16) * 11),
        ("b.npy", RAMP.astype(np.int64) - 500),
        ("c.npy", RAMP.astype(np.float16)),
        ("d.npy", RAMP.astype(np.float64) * 1e6),
        ("e.npy", RAMP.astype(">u2")),
        ("f.npy", np.asfortranarray(RAMP.astype(np.float32)) * 2),
    ],
)
def test_deeper_pixels_are_stretched_between_their_percentiles(name, picture):
    np.testing.assert_allclose(read(picture, name), stretched(RAMP.astype(float)), atol=2e-6)


def test_floats_between_0_and_1_are_taken_as_they_are():
    np.testing.assert_allclose(read(RAMP / 512, "a.npy"), RAMP / 512, atol=1e-7)
    assert read(RAMP, "b.npy").max() == np.float32(213 / 255)


@pytest.mark.parametrize("shape", [(40, 30), (1, 40, 30), (40, 30, 1)])
def test_shapes_of_arrays(shape):
    np.testing.assert_array_equal(read(RAMP.reshape(shape), "a.npy"), RAMP.astype(np.float32) / 255)


@pytest.mark.parametrize(
    "mode, name",
    [("RGB", "a.png"), ("RGBA", "a.png"), ("LA", "a.png"), ("RGB", "a.tif"), ("RGBA", "a.tif"), ("LA", "a.tif")],
)
def test_grey_films_saved_in_colour_are_grey(mode, name):
    np.testing.assert_array_equal(read(Image.fromarray(RAMP).convert(mode), name), RAMP.astype(np.float32) / 255)


def colour():
    return np.stack([RAMP, RAMP[::-1], np.full_like(RAMP, 77)], axis=2)


@pytest.mark.parametrize("name, mode", [("a.png", "RGB"), ("b.png", "RGBA"), ("a.npy", None)])
def test_colour(name, mode):
    picture = Image.fromarray(colour()).convert(mode) if mode else colour()
    np.testing.assert_array_equal(read(picture, name), colour().astype(np.float32) / 255)


def test_palette_cmyk_and_black_and_white():
    palette = Image.fromarray((RAMP > 100).astype(np.uint8)).convert("P")
    palette.putpalette([10, 10, 10, 200, 100, 0] + [0] * 762)
    np.testing.assert_array_equal(
        read(palette, "p.png"), np.where((RAMP > 100)[..., None], (200, 100, 0), (10, 10, 10)).astype(np.float32) / 255
    )
    cmyk = read(Image.fromarray(RAMP).convert("RGB").convert("CMYK"), "c.tif")
    np.testing.assert_array_equal(cmyk, RAMP.astype(np.float32) / 255)
    np.testing.assert_array_equal(read(Image.fromarray(RAMP > 100), "b.png"), (RAMP > 100).astype(np.float32))


def tiff_by_hand(pixels, photometric):
    """A TIFF of one strip of grey pixels; photometric 0: white is zero."""
    (height, width), bits, form = pixels.shape, 8 * pixels.itemsize, 3 if pixels.dtype.kind == "f" else 1
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 0)]
    tags += [(277, 3, 1), (278, 3, height), (279, 4, pixels.nbytes), (339, 3, form)]
    start = 8 + 2 + 12 * len(tags) + 4
    fields = b"".join(struct.pack("<HHII", tag, kind, 1, start if tag == 273 else v) for tag, kind, v in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + fields + bytes(4) + pixels.tobytes()


@pytest.mark.parametrize("kind, top", [("u1", 255), ("<u2", 65535), ("<f4", 1), ("<f4", 4000)])
def test_white_is_zero_is_no_negative(kind, top):
    film = (RAMP * (top / 255)).astype(kind)
    Path("black.tif").write_bytes(tiff_by_hand(film, 1))
    Path("white.tif").write_bytes(tiff_by_hand((top - film).astype(kind), 0))
    np.testing.assert_allclose(read_image("white.tif"), read_image("black.tif"), atol=1e-4)
    with Image.open("white.tif") as image:
        np.testing.assert_array_equal(read_image(image), read_image("white.tif"))


def test_orientation_of_exif_is_followed():
    for name in ("a.jpg", "a.png", "a.tif"):
        exif = Image.Exif()
        exif[274] = 6  # turn right to see it
        Image.fromarray(RAMP).save(name, exif=exif)
        assert read_image(name).shape == (30, 40) and image_size(name) == (40, 30)
        np.testing.assert_allclose(read_image(name), np.rot90(RAMP, -1) / 255, atol=0.03)


def test_what_is_transparent_becomes_black():
    alpha = np.full_like(RAMP, 255)
    alpha[:20] = 0
    for picture in (np.dstack([RAMP, alpha]), np.dstack([RAMP, RAMP, RAMP, alpha])):
        pixels = read(Image.fromarray(picture), "a.png")
        assert (pixels[:20] == 0).all()
        np.testing.assert_array_equal(pixels[20:], RAMP[20:] / np.float32(255))
    keyed = Image.fromarray(np.maximum(RAMP, 9))
    keyed.save("key.png", transparency=9)
    assert (
        read_image("key.png").min() == 0 and (read_image("key.png")[RAMP > 9] == RAMP[RAMP > 9] / np.float32(255)).all()
    )
    palette = Image.fromarray((RAMP > 100).astype(np.uint8)).convert("P")
    palette.putpalette([200, 200, 200, 90, 90, 90] + [0] * 762)
    palette.save("p.png", transparency=0)
    np.testing.assert_array_equal(read_image("p.png"), np.where(RAMP > 100, np.float32(90 / 255), 0))
    Image.fromarray(np.dstack([RAMP, 0 * RAMP])).save("gone.png")
    assert why_not("gone.png") == "the image is transparent all over"


@pytest.mark.parametrize(
    "source",
    [
        RAMP,
        RAMP.astype(np.uint16) * 257,
        (RAMP / 255).astype(np.float32),
        RAMP.astype(np.uint16) * 16,
        np.repeat(RAMP[..., None], 3, axis=2),
        Image.fromarray(RAMP),
        Image.fromarray(RAMP.astype(np.uint16) * 257),
        Image.fromarray(RAMP.astype(np.int32) * 257),
        Image.fromarray((RAMP / 255).astype(np.float32)),
        Image.fromarray(RAMP).convert("RGBA"),
    ],
)
def test_arrays_and_pillow_images_are_read_as_files_are(source):
    """Also in training: a 16-bit film that Image.convert("RGB") makes white, a float one that it makes black."""
    pixels = read_pixels(source)
    assert pixels.dtype == np.uint8 and pixels.shape == RAMP.shape
    deep = isinstance(source, Image.Image) and source.mode.startswith("I") or getattr(source, "dtype", 0) == np.uint16
    expected = stretched(RAMP.astype(float)) * 255 if deep else RAMP
    assert np.abs(pixels - expected).max() <= 1
    name = "a.tif" if isinstance(source, Image.Image) else "a.npy"
    np.testing.assert_array_equal(pixels, np.rint(read(source, name) * 255))
    np.testing.assert_array_equal(pixels, read_pixels(Path(name)))


def test_rounding_over_the_edge_is_no_reason_to_stretch():
    pixels = np.linspace(-2e-4, 1.0002, 400).reshape(20, 20)
    np.testing.assert_allclose(read_image(pixels), np.clip(pixels, 0, 1), atol=1e-7)


def test_one_grey_level_is_no_failure():
    assert (read(np.full((20, 20), 5000), "a.npy") == 0).all() and (
        read(Image.new("L", (20, 20), 51), "a.png") == np.float32(0.2)
    ).all()


def test_grey_if_grey():
    assert grey_if_grey(np.repeat(RAMP[..., None], 3, axis=2)).shape == (40, 30) and grey_if_grey(colour()).shape == (
        40,
        30,
        3,
    )


# --- what cannot ---


def test_files_that_are_no_images():
    Path("text.png").write_text("this is no image")
    Path("empty.jpg").touch()
    Path("page.html.jpeg").write_text("<html></html>")
    assert why_not("text.png") == why_not("page.html.jpeg") == "the file is not an image, or is damaged or cut short"
    assert why_not("empty.jpg") == "the file is empty" and why_not("gone.png") == "the file does not exist"
    Path("folder.png").mkdir()
    assert why_not("folder.png") == "this is a folder"
    Path("loop.png").symlink_to("loop.png")
    Path("pipe.png").unlink(missing_ok=True)
    os.mkfifo("pipe.png")
    assert "cannot be opened" in why_not("loop.png") and why_not("pipe.png") == "this is no regular file"
    assert "cannot be opened" in why_not("a" * 300 + ".png") and "cannot be opened" in why_not("a\0.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp"])
def test_files_cut_short(name):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60), dtype=np.uint8)
    Image.fromarray(noise).save(name)
    content = Path(name).read_bytes()
    for share in (0.1, 0.5, 0.8):
        Path(name).write_bytes(content[: int(len(content) * share)])
        assert "damaged or cut short" in why_not(name)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about odd tags before it gives up
def test_damaged_bytes_end_in_pixels_or_in_a_sentence():
    rng = np.random.default_rng(0)
    for name in ("a.png", "a.jpg", "a.tif", "a.npy"):
        buffer = io.BytesIO()
        (
            np.save(buffer, RAMP)
            if name == "a.npy"
            else Image.fromarray(RAMP).save(buffer, {"png": "PNG", "jpg": "JPEG", "tif": "TIFF"}[name[2:]])
        )
        refused = 0
        for _ in range(60):
            content = bytearray(buffer.getvalue())
            for place in rng.integers(0, min(len(content), 160), 3):
                content[place] = rng.integers(256)
            Path(name).write_bytes(content)
            try:
                assert np.isfinite(read_image(name)).all()
            except InputError:
                refused += 1
        assert refused > 5, name


def test_arrays_that_are_no_images():
    for name, array, message in [
        ("nan.npy", np.where(RAMP == 7, np.nan, RAMP), "NaN or infinite"),
        ("inf.npy", np.where(RAMP == 7, np.inf, RAMP), "NaN or infinite"),
        ("huge.npy", RAMP * 1e39, "NaN or infinite"),  # finite as 64 bit, not as 32
        ("words.npy", np.array([["a"] * 20] * 20), "must hold numbers"),
        ("complex.npy", RAMP * 1j, "must hold numbers"),
        ("truth.npy", RAMP > 3, "must hold numbers"),
        ("volume.npy", np.zeros((20, 20, 20)), "(20, 20, 20)"),
        ("channels.npy", np.zeros((20, 20, 4)), "(20, 20, 4)"),
        ("first.npy", np.zeros((3, 20, 20)), "(3, 20, 20)"),
        ("number.npy", np.float32(3), "()"),
        ("line.npy", np.zeros(50), "(50,)"),
        ("none.npy", np.zeros((0, 20)), "too small"),
    ]:
        np.save(name, array)
        assert message in why_not(name), name
    np.savez("archive.npz", a=RAMP)
    Path("archive.npz").rename("archive.npy")
    assert "npz archive" in why_not("archive.npy")
    Path("header.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", 20) + b"{'descr': (((       \n")
    assert "damaged" in why_not("header.npy")


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("trap-was-run"),)


def test_pickled_arrays_are_never_unpickled():
    np.save("trap.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    assert "holds Python objects" in why_not("trap.npy")
    assert not Path("trap-was-run").exists()
    np.load("trap.npy", allow_pickle=True)  # the trap works
    assert Path("trap-was-run").exists()


@pytest.mark.parametrize("size", [(1, 1), (15, 200), (200, 15)])
def test_images_that_are_too_small(size):
    Image.new("L", size).save("a.png")
    assert f"too small: {size[0]}x{size[1]} pixels, at least 16x16" in why_not("a.png")


def test_a_picture_with_too_many_pixels(monkeypatch):
    for limit in (500, 1000):  # Pillow refuses twice the limit, and only warns below that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        Image.new("L", (40, 40)).save("a.png")
        np.save("a.npy", np.zeros((40, 40)))
        assert "too many pixels" in why_not("a.png") and "too many pixels" in why_not("a.npy")
        assert "too many pixels" in why_not(Image.new("L", (40, 40)))


def test_sizes_are_those_of_the_pixels():
    Image.fromarray(RAMP).save("a.jpg")
    np.save("a.npy", RAMP)
    write_dicom("a")
    assert image_size("a.jpg") == image_size("a.npy") == image_size("a") == (30, 40)
    Path("b.png").write_text("no image")
    for name, message in (("b.png", "damaged or cut short"), ("gone.png", "does not exist")):
        with pytest.raises(InputError, match=message):
            image_size(name)


def test_images_that_are_too_long_and_narrow():
    Image.new("L", (10000, 16)).save("a.png")
    assert "too long and narrow: 10000x16 pixels" in why_not("a.png")
    assert read_image(Image.new("L", (320, 16))).shape == (16, 320)


# --- DICOM ---


def test_dicom_without_pydicom(monkeypatch):
    original = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "pydicom":
            raise ModuleNotFoundError("No module named 'pydicom'", name="pydicom")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    Path("a.dcm").write_bytes(b"anything")
    assert why_not("a.dcm") == "DICOM needs pydicom 3: pip install pydicom, or save the image as PNG"


def write_dicom(path, preamble=True, pixels=None, photometric="MONOCHROME2", **values):
    """A film of 12 bits in 16, with whatever else it is to say."""
    pytest.importorskip("pydicom", reason="reading DICOM needs pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    pixels = RAMP.astype(np.uint16) * 16 if pixels is None else pixels
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    film = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    film.SOPClassUID, film.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    film.Modality, film.SamplesPerPixel, film.PhotometricInterpretation = "CR", 1, photometric
    film.Rows, film.Columns = pixels.shape[-2:]
    film.BitsAllocated = 8 * pixels.itemsize
    film.BitsStored = 12 if film.BitsAllocated == 16 else 8
    film.HighBit, film.PixelRepresentation = film.BitsStored - 1, 0
    film.PixelData = pixels.tobytes()
    for name, value in values.items():
        setattr(film, name, value)
    film.save_as(path, enforce_file_format=True)
    if not preamble:  # the bare elements: no DICM, no group 2
        content = Path(path).read_bytes()
        length = struct.unpack("<I", content[140:144])[0]
        Path(path).write_bytes(content[144 + length :])


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_dicom(photometric):
    write_dicom("a.dcm", photometric=photometric)
    expected = stretched(RAMP.astype(float))
    expected = expected if photometric == "MONOCHROME2" else 1 - expected
    np.testing.assert_allclose(read_image("a.dcm"), expected, atol=0.01)
    Path("b.dcm").write_bytes(b"no DICOM at all")
    assert "the DICOM file cannot be read" in why_not("b.dcm")


@pytest.mark.parametrize("name", ["IM000001", "1.2.840.113619.2.5", "nopreamble.dcm", "nopreamble", "wrong.png"])
def test_dicom_is_known_by_its_content(name):
    write_dicom("plain.dcm")
    write_dicom(name, preamble="nopreamble" not in name)
    np.testing.assert_array_equal(read_image(name), read_image("plain.dcm"))


def test_dicom_is_shown_as_its_window_says():
    ramp = RAMP.astype(float) * 16
    write_dicom("a.dcm", WindowCenter=1000, WindowWidth=801)
    np.testing.assert_allclose(read_image("a.dcm"), np.clip((ramp - 999.5) / 800 + 0.5, 0, 1), atol=1e-5)
    write_dicom("b.dcm", WindowCenter=["1000", "20"], WindowWidth=["801", "20"], photometric="MONOCHROME1")
    np.testing.assert_allclose(read_image("b.dcm"), 1 - read_image("a.dcm"), atol=1e-5)
    write_dicom("c.dcm", WindowCenter=1000, WindowWidth=800, VOILUTFunction="LINEAR_EXACT")
    np.testing.assert_allclose(read_image("c.dcm"), np.clip((ramp - 1000) / 800 + 0.5, 0, 1), atol=1e-5)
    write_dicom("d.dcm", WindowCenter=1000, WindowWidth=800, VOILUTFunction="SIGMOID")
    np.testing.assert_allclose(read_image("d.dcm"), 1 / (1 + np.exp(-4 * (ramp - 1000) / 800)), atol=1e-5)
    write_dicom("e.dcm", WindowCenter=0, WindowWidth=801, RescaleSlope=1, RescaleIntercept=-1000)
    np.testing.assert_allclose(read_image("e.dcm"), np.clip((ramp - 999.5) / 800 + 0.5, 0, 1), atol=1e-5)
    from pydicom.dataset import Dataset

    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 16], np.arange(65535, -1, -16).astype("<u2").tobytes()
    for more in ({}, {"RescaleSlope": 1, "RescaleIntercept": 0}):
        write_dicom("t.dcm", VOILUTSequence=[table], WindowCenter=1000, WindowWidth=800, **more)
        np.testing.assert_allclose(read_image("t.dcm"), 1 - ramp * 16 / 65535, atol=1e-4)  # the table goes first
    write_dicom("f.dcm", pixels=RAMP)
    np.testing.assert_array_equal(read_image("f.dcm"), RAMP / np.float32(255))


def test_dicom_of_rarer_kinds():
    write_dicom("signed.dcm", pixels=(RAMP.astype(np.int16) - 128).astype(np.int8), PixelRepresentation=1)
    np.testing.assert_allclose(read_image("signed.dcm"), stretched(RAMP.astype(float)), atol=0.01)
    write_dicom("turned.dcm", pixels=RAMP, RescaleSlope=-1, RescaleIntercept=255)
    np.testing.assert_allclose(read_image("turned.dcm"), 1 - RAMP / 255, atol=1e-5)
    write_dicom("width.dcm", WindowWidth=300)  # says nothing without its centre
    np.testing.assert_allclose(read_image("width.dcm"), stretched(RAMP.astype(float)), atol=0.01)
    padded = RAMP.astype(np.uint16) * 8 + 100
    padded[0, :6] = range(6)
    write_dicom("range.dcm", pixels=padded, photometric="MONOCHROME1", PixelPaddingValue=5, PixelPaddingRangeLimit=0)
    assert (read_image("range.dcm")[0, :6] == 0).all()
    color = np.repeat(RAMP.astype(np.uint16)[..., None] * 16, 3, axis=2)
    write_dicom("color.dcm", pixels=color[:, :, 0])
    import pydicom
    from pydicom.uid import ExplicitVRBigEndian

    film = pydicom.dcmread("color.dcm")
    film.SamplesPerPixel, film.PhotometricInterpretation, film.PlanarConfiguration = 3, "RGB", 0
    film.PixelData = color.tobytes()
    film.save_as("color.dcm")
    np.testing.assert_array_equal(read_image("color.dcm"), RAMP / np.float32(255))
    write_dicom("big.dcm")
    film = pydicom.dcmread("big.dcm")
    film.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    film.PixelData = (RAMP.astype(np.uint16) * 16).astype(">u2").tobytes()
    pydicom.dcmwrite("big.dcm", film, implicit_vr=False, little_endian=False, enforce_file_format=True)
    content = Path("big.dcm").read_bytes()
    Path("bare").write_bytes(content[144 + struct.unpack("<I", content[140:144])[0] :])
    write_dicom("plain.dcm")
    for name in ("big.dcm", "bare"):
        np.testing.assert_array_equal(read_image(name), read_image("plain.dcm"))


@pytest.mark.parametrize("suffix", ["dcm", "npy", "txt"])
def test_the_content_says_what_a_file_is(suffix):
    Image.fromarray(RAMP).save("film.png")
    Path("film.png").rename(f"film.{suffix}")
    np.testing.assert_array_equal(read_image(f"film.{suffix}"), RAMP / np.float32(255))


def test_dicom_that_is_not_one_film():
    write_dicom("many.dcm", pixels=np.stack([RAMP, RAMP]), NumberOfFrames=2)
    assert "holds 2 pictures" in why_not("many.dcm")
    write_dicom("none.dcm")
    import pydicom

    film = pydicom.dcmread("none.dcm")
    del film.PixelData, film.Rows
    film.save_as("none.dcm")
    assert "it holds no pixels" in why_not("none.dcm")
    padded = RAMP.astype(np.uint16) * 16 + 100
    padded[:3] = 0
    write_dicom("padded.dcm", pixels=padded, photometric="MONOCHROME1", PixelPaddingValue=0)
    pixels = read_image("padded.dcm")
    assert (pixels[:3] == 0).all()
    np.testing.assert_allclose(pixels[3:], 1 - stretched(padded[3:]), atol=1e-5)


@pytest.mark.parametrize("suffix", ["tif", "gif", "png", "webp"])
def test_a_file_of_several_pictures_is_refused_and_previews_are_not(suffix):
    film = Image.fromarray(RAMP)
    film.save(f"two.{suffix}", save_all=True, append_images=[Image.fromarray(255 - RAMP)], lossless=True)
    assert "holds 2 pictures" in why_not(f"two.{suffix}")
    film.save("preview.tif", save_all=True, append_images=[film.resize((20, 16))])
    np.testing.assert_array_equal(read_image("preview.tif"), RAMP / np.float32(255))


# --- which files ---


def test_find_images(capsys):
    for name in ("b.png", "a.JPG", "deep/c.npy", "deep/d.dcm", "notes.txt", "deep/.hidden.txt"):
        Path("films", name).parent.mkdir(parents=True, exist_ok=True)
        Path("films", name).write_text("x")
    names = ["films/a.JPG", "films/b.png", "films/deep/c.npy", "films/deep/d.dcm"]
    assert [str(p) for p in find_images(["films"])] == names
    assert "films: 4 images; passed over: 2 (.hidden.txt, notes.txt)" in capsys.readouterr().out
    some = ["films/*.png", "films/b.png", "./films/b.png", "gone.png"]
    assert [str(p) for p in find_images(some)] == ["films/b.png", "gone.png"]  # each once
    assert [str(p) for p in find_images(["films/**/*.npy"])] == ["films/deep/c.npy"]
    assert [str(p) for p in find_images(["films/notes.txt"])] == ["films/notes.txt"]  # named by hand: tried
    assert [str(p) for p in find_images(["film*"])] == names  # a folder, as if the shell had found it


def test_a_path_is_a_path_before_it_is_a_pattern():
    Path("films[1]").mkdir()
    for name in ("films[1]/a.png", "100%[1].png", "a[1].png", "a1.png", "b*.png", "b2.png"):
        Path(name).write_text("x")
    assert [str(p) for p in find_images(["films[1]"])] == ["films[1]/a.png"]
    for name in ("100%[1].png", "a[1].png", "b*.png"):
        assert [str(p) for p in find_images([name])] == [name]
    Path("a[1].png").unlink()
    assert [str(p) for p in find_images(["a[1].png"])] == ["a1.png"]


def test_a_folder_means_its_images_no_more_and_no_less(capsys):
    Path("cd/x.png").mkdir(parents=True)
    write_dicom("cd/IM000001")
    write_dicom("cd/IM000002", preamble=False)
    write_dicom("cd/DICOMDIR")
    import pydicom

    index = pydicom.dcmread("cd/DICOMDIR")
    del index.PixelData, index.Rows
    index.save_as("cd/DICOMDIR")
    index.save_as("cd/report.dcm")  # a structured report: DICOM, and no picture
    Image.fromarray(RAMP).save("cd/film", "PNG")
    Image.fromarray(RAMP).save("cd/._film.png")
    Image.fromarray(RAMP).save("cd/film.webp")
    for name in ("cd/.git/a.png", "cd/__MACOSX/a.png"):
        Path(name).parent.mkdir()
        Image.fromarray(RAMP).save(name)
    Path("cd/broken.png").write_text("x")
    Path("cd/loop.png").symlink_to("loop.png")
    Path("cd/up").symlink_to("..")
    Path("cd/README").write_text("How to read the films")
    found = [p.name for p in find_images(["cd"])]
    assert found == ["IM000001", "IM000002", "broken.png", "film", "film.webp"]
    assert "cd: 5 images; passed over: 8 (._film.png, .git, DICOMDIR, ...)" in capsys.readouterr().out
    Path("cd", os.fsdecode(b"caf\xe9.txt")).write_text("x")
    find_images(["cd"])  # prints


def test_find_images_refuses_what_has_none(capsys):
    Path("empty.png").mkdir()
    with pytest.raises(InputError, match="there is no image in empty.png"):
        find_images(["empty.png"])
    with pytest.raises(InputError, match="no file matches"):
        find_images(["empty/*.png"])
    assert find_images(["empty.png", "gone.png"]) == [Path("gone.png")]  # one of several does not end the batch
    assert "passed over: there is no image in empty.png" in capsys.readouterr().out


# --- to the square the network sees ---


@pytest.mark.parametrize("shape, place", [((56, 56), (14, 40)), ((56, 112), (14, 28 + 40)), ((100, 56), (22 + 14, 40))])
def test_a_bright_dot_stays_in_its_place(shape, place):
    pixels = np.zeros(shape, np.float32)
    pixels[place[0] : place[0] + 2, place[1] : place[1] + 2] = (
        1  # rows 14-15, columns 40-41 of the central square of 56
    )
    square = to_square(pixels, 28, 1)
    assert square.shape == (1, 28, 28) and square.dtype == np.uint8
    assert np.unravel_index(square.argmax(), square.shape) == (0, 7, 20)


def test_what_lies_outside_of_the_central_square_is_gone():
    pixels = np.zeros((40, 100), np.float32)
    pixels[:, :29] = pixels[:, 71:] = 1
    assert to_square(pixels, 20, 1).max() == 0


def test_images_of_the_right_size_are_unchanged():
    np.testing.assert_array_equal(to_square(RAMP[:28, :28].astype(np.float32) / 255, 28, 1)[0], RAMP[:28, :28])


def test_shrinking_averages():
    board = (np.indices((224, 224)).sum(0) % 2).astype(np.float32)
    assert (
        abs(to_square(board, 28, 1).astype(int) - 127.5).max() <= 2.5
    )  # without an antialiasing filter it would be 0 or 255


def test_grey_and_colour():
    grey, coloured = RAMP[:28, :28].astype(np.float32) / 255, colour()[:28, :28].astype(np.float32) / 255
    three = to_square(grey, 28, 3)
    assert three.shape == (3, 28, 28) and (three[0] == three[1]).all() and (three[1] == three[2]).all()
    np.testing.assert_array_equal(to_square(coloured, 28, 3), colour()[:28, :28].transpose(2, 0, 1))
    luma = colour()[:28, :28] @ [0.299, 0.587, 0.114]
    assert np.abs(to_square(coloured, 28, 1)[0] - luma).max() <= 0.51


def test_overshoot_of_the_filter_is_cut_off():
    edge = np.zeros((64, 64), np.float32)
    edge[:, 32:] = 1
    square = to_square(edge, 28, 1)
    assert square.min() == 0 and square.max() == 255
