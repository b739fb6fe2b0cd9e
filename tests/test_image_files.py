"""images/decode.py: pixels of every mode and depth, files that cannot be decoded, formats that are not opened."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_helpers import folder_config, make_data, make_folder, stack, user_error_of
from PIL import EpsImagePlugin, Image
from quick import some

from config import UserError
from images.decode import FORMATS, open_image, to_rgb

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # Pillow's, on damage

GREY = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
WIDE = GREY.astype(np.uint16) * 257


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(content: bytes) -> np.ndarray:
    image = open_image(io.BytesIO(content))
    assert image.mode == "RGB"
    return np.asarray(image)


# --- Pixels -----------------------------------------------------------------------------------------------------------

BIG_ENDIAN = Image.frombytes("I;16B", (7, 9), WIDE.astype(">u2").tobytes())


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (Image.fromarray(WIDE), "PNG", {}),
        (Image.fromarray(WIDE), "TIFF", {}),
        (Image.fromarray(WIDE), "PPM", {}),
        (Image.fromarray(GREY.astype(np.uint16) << 8), "PNG", {}),
        (BIG_ENDIAN, "TIFF", {}),
        (Image.fromarray(255 - WIDE // 257 + 256 * (255 - WIDE // 257)), "TIFF", {"tiffinfo": {262: 0}}),  # 0 is white
        (Image.fromarray(WIDE.astype(np.int32)), "TIFF", {}),
        (Image.fromarray(GREY.astype(np.int32)), "TIFF", {}),
        (Image.fromarray((GREY / 255).astype(np.float32)), "TIFF", {}),
        (Image.fromarray(GREY.astype(np.float32)), "TIFF", {}),
        (Image.fromarray(GREY), "PNG", {}),
        (Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY[::-1].copy())]), "PNG", {}),
        (Image.merge("RGBA", [Image.fromarray(GREY)] * 3 + [Image.fromarray(GREY[::-1].copy())]), "PNG", {}),
        (Image.merge("CMYK", [Image.new("L", (7, 9))] * 3 + [Image.fromarray(255 - GREY)]), "TIFF", {}),
        (Image.fromarray(GREY).convert("P"), "PNG", {}),
        (Image.fromarray(GREY).convert("P"), "PNG", {"transparency": 3}),
        (Image.fromarray(GREY).convert("P"), "GIF", {"transparency": 3}),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_grey_levels_are_those_of_8_bits_whatever_holds_them(image, kind, options):
    pixels = read(encoded(image, kind, **options))
    assert np.array_equal(pixels, np.stack([GREY] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "LA", "La", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_mode_of_8_bits_is_converted_as_pillow_does(mode):
    channels = [GREY, GREY[::-1].copy(), GREY[:, ::-1].copy()]
    image = Image.merge("RGB", [Image.fromarray(channel) for channel in channels])
    image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode))
    expected = np.asarray(image.convert("RGB"))
    if mode in ("La", "RGBa"):
        image = image.convert(mode)
    assert np.array_equal(np.asarray(to_rgb(image)), expected)


def test_two_classes_that_differ_in_brightness_stay_apart_with_16_bits(tmp_path):
    means = {}
    for bits in (8, 16):
        for split in ("train", "val"):
            for name, level in (("dark", 60), ("light", 180)):
                folder = tmp_path / str(bits) / split / name
                folder.mkdir(parents=True)
                pixels = np.full((20, 20), level, dtype=np.uint8)
                for i in range(4):
                    Image.fromarray(pixels if bits == 8 else pixels.astype(np.uint16) * 257).save(folder / f"{i}.png")
        images, _ = stack(make_data(base=folder_config(tmp_path / str(bits)), batch_size=4).eval_batches())
        means[bits] = images.mean((1, 2, 3)).tolist()
    assert means[8] == means[16] and means[8][0] < means[8][-1]


@pytest.mark.parametrize(
    "pixels",
    [
        GREY.astype(np.int32) * 100_000,
        GREY.astype(np.int32) - 300,
        GREY.astype(np.float32) * 300,
        GREY.astype(np.float32) - 99,
        np.where(GREY > 99, np.nan, GREY).astype(np.float32),
    ],
)
def test_grey_levels_without_a_clear_range_are_refused_by_name(tmp_path, pixels):
    base = folder_config(make_folder(tmp_path))
    (tmp_path / "val/ant/1.png").unlink()
    Image.fromarray(pixels).save(tmp_path / "val/ant/1.tif")
    message = user_error_of(make_data(base=base, batch_size=4).eval_batches())
    assert message.startswith(f"{tmp_path}/val/ant/1.tif cannot be read (it")


# --- Files that cannot be decoded -------------------------------------------------------------------------------------


def png_with(kind: bytes, content: bytes) -> bytes:
    """A PNG with a further chunk after its pixels."""
    png = encoded(Image.fromarray(GREY), "PNG")
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    end = png.index(b"IEND") - 4
    return png[:end] + chunk + png[end:]


DAMAGED = {
    "an empty colour profile": png_with(b"iCCP", b""),
    "half a colour profile": png_with(b"iCCP", b"name\0\0\x78\x9c\x01"),
    "an empty chunk of sizes": png_with(b"pHYs", b""),
    "an empty transparency": png_with(b"cHRM", b"\0"),
    "a text that does not decompress": png_with(b"zTXt", b"key\0\0" + b"\x78\x9c\xff\xff"),
    "no number where a PPM has one": b"P6 9 x7 255\n" + bytes(189),
    "a GIF that ends early": encoded(Image.fromarray(GREY), "GIF")[:20],
    "a BMP that ends early": encoded(Image.fromarray(GREY), "BMP")[:16],
    "a TIFF without its tags": encoded(Image.fromarray(GREY), "TIFF")[:12],
    "a WEBP that ends early": encoded(Image.fromarray(GREY).convert("RGB"), "WEBP")[:40],
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.parametrize("timms", [False, True])
@pytest.mark.parametrize("pipeline", ["cpu", "gpu"])
def test_a_pipe_by_an_images_name_is_not_waited_for(tmp_path, timms, pipeline):
    base = [*folder_config(make_folder(tmp_path)), f"data.pipeline={pipeline}"]
    if timms:
        base += ["data.set=torch/image_folder", f"data.path={tmp_path}/train", "model.num_classes=2"]
    (tmp_path / "train/ant/0.png").unlink()
    os.mkfifo(tmp_path / "train/ant/0.png")
    for resident in (0, 0.2):
        data = make_data(f"data.resident={resident}", base=base, batch_size=4)
        assert "ant/0.png cannot be read (it is no regular file)" in user_error_of(data.train_batches(0))
        skipping = make_data(f"data.resident={resident}", "data.on_corrupt=skip", base=base, batch_size=4)
        assert stack(skipping.train_batches(0)) and skipping.corrupt


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_by_a_tar_files_name_is_not_waited_for(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        os.mkfifo(tmp_path / split / "ant.tar")
    with pytest.raises(UserError, match="it is no regular file"):
        make_data(base=folder_config(tmp_path), batch_size=4)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_file_is_an_unreadable_image_or_an_image(tmp_path, what, skip):
    """Never a traceback; an image where Pillow makes one of it."""
    base = folder_config(make_folder(tmp_path))
    path = tmp_path / "val/ant/1.png"
    path.write_bytes(DAMAGED[what])
    data = make_data(f"data.on_corrupt={'skip' if skip else 'error'}", base=base, batch_size=4)
    message = user_error_of(data.eval_batches())
    if skip:
        assert message == "no error" and data.corrupt <= 1
    else:
        assert message == "no error" or message.startswith(f"{path} cannot be read (")
        assert "\n" not in message


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes_of_every_format(tmp_path, kind):
    """Some 40 files a format with single bytes changed, after which they are shortened: read, or one sentence."""
    rng, whole = np.random.default_rng(1), encoded(Image.fromarray(np.stack([GREY] * 3, axis=-1)), kind)
    base = folder_config(make_folder(tmp_path))
    for i in range(40):
        content = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            content[place] = rng.integers(0, 256)
        (tmp_path / f"val/ant/{i}.png").write_bytes(content[: rng.integers(1, len(whole) + 40)])
    data = make_data("data.on_corrupt=skip", base=base, batch_size=8)
    assert user_error_of(data.eval_batches()) == "no error"
    assert data.corrupt > 5


@pytest.mark.parametrize(
    "error",
    [
        IndexError("list index out of range"),
        KeyError("mode"),
        TypeError("unsupported operand"),
        AttributeError("no attribute"),
        struct.error("unpack requires a buffer of 4 bytes"),
        zlib.error("Error -3"),
        OverflowError("too large"),
        ZeroDivisionError("division by zero"),
        MemoryError(),
        RecursionError("maximum recursion depth exceeded"),
        AssertionError(),
        NotImplementedError(),
        RuntimeError("two\nlines"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("workers", some([1, 0], every=2))
def test_whatever_a_decoder_raises_is_an_unreadable_image(tmp_path, monkeypatch, error, workers):
    base = folder_config(make_folder(tmp_path))
    bad, opened = tmp_path / "train/ant/2.png", Image.open

    def fail_for_one(source, *args, **kwargs):
        if getattr(source, "name", None) == str(bad):
            raise error
        return opened(source, *args, **kwargs)

    monkeypatch.setattr(Image, "open", fail_for_one)
    overrides = [f"data.num_workers={workers}"]
    message = user_error_of(make_data(*overrides, base=base, batch_size=4).train_batches(0))
    assert message.startswith(f"{bad} cannot be read (") and "\n" not in message
    data = make_data(*overrides, "data.on_corrupt=skip", base=base, batch_size=4)
    assert user_error_of(data.train_batches(0)) == "no error" and data.corrupt == 1


def test_an_error_of_the_transforms_is_no_unreadable_image(tmp_path, monkeypatch):
    data = make_data("data.on_corrupt=skip", base=folder_config(make_folder(tmp_path)), batch_size=4)

    def fail(image):
        raise IndexError("in a transform")

    monkeypatch.setattr(data.train_loader.dataset, "_transform", fail)
    with pytest.raises(IndexError, match="in a transform"):
        list(data.train_batches(0))


# --- Formats ----------------------------------------------------------------------------------------------------------


def fake_program(folder: Path, name: str) -> Path:
    """A program of that name, first on the path, that leaves a file when it is run."""
    program = folder / name
    program.write_text(f"#!/bin/sh\ntouch {folder}/ran\n")
    program.chmod(0o755)
    return folder / "ran"


@pytest.mark.parametrize("name", ["1.png", "1.jpg", "1.tif"])
def test_postscript_by_another_name_starts_nothing(tmp_path, monkeypatch, name):
    ran = fake_program(tmp_path, "gs")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    base = folder_config(make_folder(tmp_path / "set"))
    (tmp_path / "set/val/ant/1.png").unlink()
    path = tmp_path / "set/val/ant" / name
    path.write_bytes(encoded(Image.fromarray(GREY), "EPS"))
    message = user_error_of(make_data(base=base, batch_size=4).eval_batches())
    assert message.startswith(f"{path} cannot be read (EPS, which is none of JPEG, PNG, ")
    with pytest.raises(OSError, match="Ghostscript"):  # nor for a set that opens its images by itself
        Image.open(path).load()
    assert not EpsImagePlugin.has_ghostscript() and not ran.exists()


@pytest.mark.parametrize("kind", ["ICO", "JPEG2000", "SGI", "PCX", "TGA", "IM", "PDF"])
def test_formats_that_no_set_has_are_refused(tmp_path, kind):
    base = folder_config(make_folder(tmp_path))
    path = tmp_path / "val/ant/1.png"
    path.write_bytes(encoded(Image.fromarray(GREY), kind))
    message = user_error_of(make_data(base=base, batch_size=4).eval_batches())
    assert message.startswith(f"{path} cannot be read (") and ("none of JPEG" in message or "not an image" in message)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_of_sets_are_read_whatever_the_name_says(tmp_path, kind):
    base = folder_config(make_folder(tmp_path))
    (tmp_path / "val/ant/1.png").write_bytes(encoded(Image.fromarray(np.stack([GREY] * 3, axis=-1)), kind))
    assert user_error_of(make_data(base=base, batch_size=4).eval_batches()) == "no error"
