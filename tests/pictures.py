"""Small real pictures in every format and mode, from Pillow's writers and, for what these cannot write, from those below.

Everything is made anew from fixed numbers, so that the same names mean the same bytes as long as the libraries do.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin, features

#: Not multiples of anything, so that blocks, tiles and rows end in the middle.
WIDTH, HEIGHT = 43, 29


def drawn(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> Image.Image:
    """Return a smooth picture with some noise, as photographs are."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 255 / width, y * 255 / height, (3 * x + 5 * y) % 256], axis=2)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8))


def translucent(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Return a picture with every degree of transparency."""
    image = drawn(width, height)
    alpha = np.resize(np.arange(256, dtype=np.uint8), (height, width))
    image.putalpha(Image.fromarray(alpha))
    return image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the file that Pillow writes."""
    into = io.BytesIO()
    image.save(into, kind, **options)
    return into.getvalue()


def exif(orientation: int) -> bytes:
    """Return EXIF data with an orientation."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


# --- PNG --------------------------------------------------------------------------------------------------------------

SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Adam7: first column and row, and the steps between them.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    samples: NDArray[Any],
    colour: int,
    *,
    bits: int = 8,
    interlaced: bool = False,
    before: bytes = b"",
    after: bytes = b"",
    most: int = 1 << 16,
) -> bytes:
    """Return a PNG of samples (height, width, channels) with chunks ``before`` and ``after`` its pixels."""
    height, width = samples.shape[:2]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced)))
    parts = [samples[y::rows, x::columns] for x, y, columns, rows in _PASSES] if interlaced else [samples]
    raw = b"".join(b"\0" + _png_row(row, bits) for part in parts if part.size for row in part)
    packed = zlib.compress(raw)
    pixels = b"".join(chunk(b"IDAT", packed[at : at + most]) for at in range(0, len(packed), most))
    return SIGNATURE + head + before + pixels + after + chunk(b"IEND", b"")


def _png_row(row: NDArray[Any], bits: int) -> bytes:
    if bits == 16:
        return row.astype(">u2").tobytes()
    if bits == 8:
        return row.astype(np.uint8).tobytes()
    each = np.unpackbits(row.astype(np.uint8).reshape(-1, 1), axis=1)[:, 8 - bits :]
    return np.packbits(each).tobytes()


def deep(channels: int) -> NDArray[np.uint16]:
    """Return samples of 16 bits, (height, width, channels)."""
    return np.random.default_rng(1).integers(0, 65536, (HEIGHT, WIDTH, channels)).astype(np.uint16)


def _pngs() -> Iterator[tuple[str, bytes]]:
    flat = np.random.default_rng(2).integers(0, 256, (HEIGHT, WIDTH, 4))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield mode, encoded(translucent().convert(mode), "PNG")
    for bits in (1, 2, 4):
        yield f"grey of {bits} bits", png(flat[:, :, :1] >> 8 - bits, 0, bits=bits)
        yield f"palette of {bits} bits", encoded(drawn().convert("P", palette=1, colors=2**bits), "PNG", bits=bits)
    for name, channels, colour in (("grey", 1, 0), ("grey and alpha", 2, 4), ("RGB", 3, 2), ("RGBA", 4, 6)):
        yield f"16-bit {name}", png(deep(channels), colour, bits=16)
        yield f"interlaced {name}", png(flat[:, :, :channels], colour, interlaced=True)
    key = int(deep(1)[3, 4, 0])
    yield "16-bit grey, transparent", png(deep(1), 0, bits=16, before=chunk(b"tRNS", struct.pack(">H", key)))
    yield "interlaced 16-bit grey", png(deep(1), 0, bits=16, interlaced=True)
    few = drawn().convert("P", palette=1, colors=16)
    yield "palette, one transparent", encoded(few, "PNG", transparency=3)
    yield "palette, all translucent", encoded(few, "PNG", transparency=bytes(range(0, 256, 16)))
    grey = Image.fromarray((np.asarray(drawn().convert("L")) // 32 * 32).astype(np.uint8))
    yield "grey, transparent", encoded(grey, "PNG", transparency=64)
    yield "one bit, transparent", encoded(drawn().convert("1"), "PNG", transparency=0)
    solid = Image.new("RGB", (WIDTH, HEIGHT), (9, 8, 7))
    solid.paste((200, 100, 50), (5, 5, 20, 20))
    yield "RGB, transparent", encoded(solid, "PNG", transparency=(200, 100, 50))
    frames = [drawn(seed=number) for number in range(3)]
    yield "animated", encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    yield (
        "animated, with another picture",
        encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True),
    )
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "some words " * 20, zip=True)
    info.add_itxt("Title", "größer", "de", "Titel", zip=True)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield "text and profile", encoded(drawn(), "PNG", pnginfo=info, icc_profile=profile, dpi=(72, 72))
    late = chunk(b"eXIf", exif(6)[6:])
    yield "orientation behind the pixels", png(flat[:, :, :3], 2, after=late)
    yield "many chunks", png(flat[:, :, :3], 2, most=100)


# --- JPEG -------------------------------------------------------------------------------------------------------------


def _jpegs() -> Iterator[tuple[str, bytes]]:
    image, cmyk = drawn(), drawn().convert("CMYK")
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        yield subsampling, encoded(image, "JPEG", subsampling=subsampling, quality=83)
    yield "grey", encoded(image.convert("L"), "JPEG")
    yield "progressive", encoded(image, "JPEG", progressive=True)
    yield "progressive grey", encoded(image.convert("L"), "JPEG", progressive=True)
    yield "progressive CMYK", encoded(cmyk, "JPEG", progressive=True)
    yield "restarts", encoded(image, "JPEG", restart_marker_blocks=1, optimize=True)
    yield "RGB", encoded(image, "JPEG", keep_rgb=True)
    plain = encoded(cmyk, "JPEG")
    yield "CMYK", plain
    # The last byte of Adobe's segment says how four channels are coded: 0 as they are, 2 as YCCK.
    at = plain.index(b"Adobe") + 11
    assert plain[at] == 0
    yield "YCCK", plain[:at] + b"\2" + plain[at + 1 :]
    start = plain.index(b"\xff\xee")
    yield "CMYK, not Adobe's", plain[:start] + plain[start + 16 :]
    yield "comment and profile", encoded(image, "JPEG", comment=b"words", icc_profile=bytes(300), dpi=(72, 72))
    yield "two pictures", encoded(image, "MPO", save_all=True, append_images=[drawn(seed=1)])


# --- BMP --------------------------------------------------------------------------------------------------------------


def bmp(
    bits: int,
    rows: Sequence[bytes] | bytes,
    *,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    header: int = 40,
    compression: int = 0,
    masks: Sequence[int] = (),
    palette: bytes = b"",
    top_down: bool = False,
) -> bytes:
    """Return a BMP of ``rows`` as they lie in the file, each padded here, or of coded pixels."""
    pixels = rows if isinstance(rows, bytes) else b"".join(row + bytes(-len(row) % 4) for row in rows)
    width, height = size
    if header == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        tall = -height if top_down else height
        colours = len(palette) // 4
        info = struct.pack("<IiiHHIIiiII", header, width, tall, 1, bits, compression, len(pixels), 0, 0, colours, 0)
        coded = b"".join(struct.pack("<I", mask) for mask in masks)
        info += coded if header == 40 else coded.ljust(header - 40, b"\0")
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + info + palette + pixels


def _bmps() -> Iterator[tuple[str, bytes]]:
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield mode, encoded(translucent().convert(mode), "BMP")
    rgb = np.asarray(drawn())
    bgr = [row[:, ::-1].tobytes() for row in rgb]
    yield "OS/2", bmp(24, bgr[::-1], header=12)
    yield "top down", bmp(24, bgr, top_down=True)
    wide = rgb.astype(np.uint16)
    five = (wide[:, :, 0] >> 3 << 10 | wide[:, :, 1] >> 3 << 5 | wide[:, :, 2] >> 3).astype("<u2")
    six = (wide[:, :, 0] >> 3 << 11 | wide[:, :, 1] >> 2 << 5 | wide[:, :, 2] >> 3).astype("<u2")
    yield "5 bits a channel", bmp(16, [row.tobytes() for row in five[::-1]])
    yield (
        "5, 6 and 5 bits",
        bmp(16, [row.tobytes() for row in six[::-1]], compression=3, masks=(0xF800, 0x7E0, 0x1F)),
    )
    four = np.asarray(translucent())[::-1, :, [2, 1, 0, 3]]
    yield "32 bits without alpha", bmp(32, [row.tobytes() for row in four])
    for version, header in ((3, 56), (4, 108), (5, 124)):
        masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        yield (
            f"alpha in version {version}",
            bmp(32, [row.tobytes() for row in four], header=header, compression=3, masks=masks),
        )
    palette = np.random.default_rng(3).integers(0, 256, (16, 4)).astype(np.uint8)
    palette[:, 3] = 0
    yield (
        "4 bits",
        bmp(
            4,
            [
                row.tobytes()
                for row in np.random.default_rng(4).integers(0, 256, (HEIGHT, (WIDTH + 1) // 2)).astype(np.uint8)
            ],
            palette=palette.tobytes(),
        ),
    )
    eight, nibbles = run_lengths()
    yield "run lengths of 8 bits", bmp(8, eight, compression=1, palette=palette.tobytes())
    yield "run lengths of 4 bits", bmp(4, nibbles, compression=2, palette=palette.tobytes())


def run_lengths() -> tuple[bytes, bytes]:
    """Return rows of runs and of single pixels, coded with 8 bits a pixel and with 4."""
    eight, four = b"", b""
    for row in range(HEIGHT):
        eight += bytes([10, row % 16, 0, 3, 1, 2, 3, 0, WIDTH - 13, 15 - row % 16, 0, 0])
        four += bytes([10, row % 16 * 17, 0, 3, 0x12, 0x30, WIDTH - 13, 0xA5, 0, 0])
    return eight + b"\0\1", four + b"\0\1"


# --- TIFF -------------------------------------------------------------------------------------------------------------

_SIZES = {"B": 1, "H": 2, "I": 4, "Q": 8}


def tiff(
    samples: NDArray[Any],
    *,
    photometric: int,
    order: str = "<",
    big: bool = False,
    rows: int = 8,
    tile: tuple[int, int] | None = None,
    planar: bool = False,
    deflated: bool = False,
    tags: Sequence[tuple[int, str, tuple[int, ...]]] = (),
) -> bytes:
    """Return a TIFF of samples (height, width, channels) of 8 or 16 bits, in strips of ``rows`` or in tiles."""
    height, width, channels = samples.shape
    samples = samples.astype(f"{order}u{samples.dtype.itemsize}")
    planes = [samples[:, :, channel : channel + 1] for channel in range(channels)] if planar else [samples]
    high, wide = tile or (rows, width)
    cut = [
        plane[top : top + high, left : left + wide]
        for plane in planes
        for top in range(0, height, high)
        for left in range(0, width, wide)
    ]
    if tile:
        cut = [np.pad(part, ((0, high - part.shape[0]), (0, wide - part.shape[1]), (0, 0))) for part in cut]
    coded = [zlib.compress(part.tobytes()) if deflated else part.tobytes() for part in cut]
    entries = {
        256: ("I", (width,)),
        257: ("I", (height,)),
        258: ("H", (8 * samples.dtype.itemsize,) * channels),
        259: ("H", (8 if deflated else 1,)),
        262: ("H", (photometric,)),
        277: ("H", (channels,)),
        284: ("H", (2 if planar else 1,)),
        325 if tile else 279: ("I", tuple(map(len, coded))),
        **({322: ("I", (wide,)), 323: ("I", (high,))} if tile else {278: ("I", (rows,))}),
        **{number: (code, values) for number, code, values in tags},
    }
    at, offsets = 16, []
    for part in coded:
        offsets.append(at)
        at += len(part)
    entries.setdefault(324 if tile else 273, ("I", tuple(offsets)))
    head = (b"II" if order == "<" else b"MM") + struct.pack(
        order + "HHHQ" if big else order + "HI8x", *((43, 8, 0, at) if big else (42, at))
    )
    return head + b"".join(coded) + _directory(entries, at, order, big=big)


def _directory(entries: dict[int, tuple[str, tuple[int, ...]]], at: int, order: str, *, big: bool) -> bytes:
    word, step, types = ("Q", 20, {"B": 1, "H": 3, "I": 4, "Q": 16}) if big else ("I", 12, {"B": 1, "H": 3, "I": 4})
    inline = 8 if big else 4
    count = struct.pack(order + ("Q" if big else "H"), len(entries))
    beyond = at + len(count) + step * len(entries) + inline
    listed, values = count, b""
    for number in sorted(entries):
        code, numbers = entries[number]
        packed = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        where = (
            packed.ljust(inline, b"\0") if len(packed) <= inline else struct.pack(order + word, beyond + len(values))
        )
        listed += struct.pack(order + "HH" + word, number, types[code], len(numbers)) + where
        values += packed if len(packed) > inline else b""
    return listed + bytes(inline) + values


def _tiffs() -> Iterator[tuple[str, bytes]]:
    image = drawn()
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I", "F"):
        converted = (
            image.convert("L").convert(mode)
            if mode in {"I", "F"}
            else translucent().convert("RGB" if mode == "LAB" else mode)
        )
        if mode == "LAB":
            converted = ImageCms.profileToProfile(
                converted, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
            )
        yield mode, encoded(converted, "TIFF")
    for compression in ("tiff_lzw", "packbits", "jpeg", "tiff_adobe_deflate", "tiff_deflate", "lzma", "zstd"):
        yield compression, encoded(image, "TIFF", compression=compression)
    for compression in ("group3", "group4", "tiff_ccitt"):
        yield compression, encoded(image.convert("1"), "TIFF", compression=compression)
    rgb, deeper = np.asarray(image), deep(3)
    yield "strips", tiff(rgb, photometric=2)
    yield "strips, big-endian", tiff(rgb, photometric=2, order=">")
    yield "BigTIFF", tiff(rgb, photometric=2, big=True)
    yield "tiles", tiff(rgb, photometric=2, tile=(16, 16))
    yield "deflated tiles", tiff(rgb, photometric=2, tile=(16, 16), deflated=True)
    yield "separate channels", tiff(rgb, photometric=2, planar=True)
    yield "separate channels, deflated", tiff(rgb, photometric=2, planar=True, deflated=True)
    yield "16-bit RGB", tiff(deeper, photometric=2)
    yield "16-bit RGB, big-endian, deflated", tiff(deeper, photometric=2, order=">", deflated=True)
    yield "16-bit grey", tiff(deeper[:, :, :1], photometric=1)
    yield "16-bit grey, big-endian", tiff(deeper[:, :, :1], photometric=1, order=">")
    yield "white is 0", tiff(rgb[:, :, :1], photometric=0)
    yield "alpha", tiff(np.asarray(translucent()), photometric=2, tags=[(338, "H", (2,))])
    pages = [drawn(seed=number) for number in (1, 2)]
    yield "pages", encoded(image, "TIFF", save_all=True, append_images=pages, compression="tiff_lzw")


# --- GIF, WebP, AVIF --------------------------------------------------------------------------------------------------


def gif_of_a_frame(screen: tuple[int, int], box: tuple[int, int, int, int], *, before: bytes = b"") -> bytes:
    """Return a GIF with one frame of colour 1 in ``box`` (left, top, width, height), of at most 100 pixels."""
    pixels = box[2] * box[3]
    codes = (
        [4] + [code for _ in range(pixels) for code in (1, 4)] + [5]
    )  # cleared after each, so that codes keep 3 bits
    bits = sum(code << 3 * number for number, code in enumerate(codes))
    data = bits.to_bytes((3 * len(codes) + 7) // 8, "little")
    blocks = b"".join(bytes([len(data[at : at + 255])]) + data[at : at + 255] for at in range(0, len(data), 255))
    palette = bytes([0, 0, 0, 200, 100, 50, 1, 1, 1, 2, 2, 2])
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x81, 0, 0) + palette
    return head + before + b"\x2c" + struct.pack("<HHHHB", *box, 0) + b"\2" + blocks + b"\0;"


def _gifs() -> Iterator[tuple[str, bytes]]:
    few = drawn().convert("P", palette=1, colors=32)
    frames = [drawn(seed=number) for number in range(3)]
    yield "palette", encoded(few, "GIF", interlace=0)
    yield "interlaced", encoded(few, "GIF", interlace=1)
    yield "grey", encoded(drawn().convert("L"), "GIF")
    yield "transparent", encoded(few, "GIF", transparency=5)
    yield "animated", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], comment=b"words")
    yield "a frame in a screen", gif_of_a_frame((WIDTH, HEIGHT), (3, 4, 9, 8))
    yield "a frame out of its screen", gif_of_a_frame((5, 5), (3, 4, 9, 8), before=b"\x21\xfe\3abc\0")


def _webps() -> Iterator[tuple[str, bytes]]:
    frames = [drawn(seed=number) for number in range(3)]
    for name, image in (("RGB", drawn()), ("RGBA", translucent())):
        for lossless in (False, True):
            yield f"{'lossless ' if lossless else ''}{name}", encoded(image, "WEBP", lossless=lossless)
    yield "animated", encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    yield (
        "animated, transparent",
        encoded(translucent(), "WEBP", save_all=True, append_images=frames[1:], lossless=True),
    )
    yield "with metadata", encoded(drawn(), "WEBP", exif=exif(1), icc_profile=bytes(200), xmp=b"<x/>")


def box(kind: bytes, *content: bytes) -> bytes:
    """Return a box of the ISO base media file format."""
    return struct.pack(">I4s", 8 + sum(map(len, content)), kind) + b"".join(content)


def _within(data: bytes, *path: bytes) -> bytes:
    """Return the first box at a path of kinds, whole."""
    at, end = 0, len(data)
    for number, kind in enumerate(path):
        while data[at + 4 : at + 8] != kind:
            at += int.from_bytes(data[at : at + 4], "big")
            assert at < end
        end = at + int.from_bytes(data[at : at + 4], "big")
        if number < len(path) - 1:
            at += 12 if kind == b"meta" else 8
    return data[at:end]


def avif_grid(cell: bytes, side: int, rows: int, columns: int, size: tuple[int, int]) -> bytes:
    """Return an AVIF of ``size`` whose pixels are those of one AVIF of ``side`` by ``side``, side by side."""
    coded = _within(cell, b"mdat")[8:]
    cells = range(2, 2 + rows * columns)
    grid = struct.pack(">BBBBII", 0, 1, rows - 1, columns - 1, *size)
    entries = [(1, b"grid"), *((number, b"av01") for number in cells)]
    infos = [box(b"infe", b"\2\0\0\0" + struct.pack(">HH4s", number, 0, kind) + b"\0") for number, kind in entries]
    uses = struct.pack(f">HH{len(cells)}H", 1, len(cells), *cells)
    kept = [_within(cell, b"meta", b"iprp", b"ipco", kind) for kind in (b"pixi", b"av1C")]
    sizes = [box(b"ispe", bytes(4) + struct.pack(">II", *each)) for each in (size, (side, side))]
    uses_of = [struct.pack(">HB", 1, 2) + b"\1\3", *(struct.pack(">HB", number, 3) + b"\2\3\x84" for number in cells)]

    def whole(at: int) -> bytes:
        """Return everything before the coded pixels, where these begin at ``at``."""
        places = [(1, at, len(grid)), *((number, at + len(grid), len(coded)) for number in cells)]
        listed = b"".join(struct.pack(">HHHII", number, 0, 1, *place) for number, *place in places)
        return box(b"ftyp", b"avif", bytes(4), b"avifmif1miaf") + box(
            b"meta",
            bytes(4),
            box(b"hdlr", bytes(8), b"pict", bytes(13)),
            box(b"pitm", bytes(4), b"\0\1"),
            box(b"iloc", bytes(4), b"\x44\0", struct.pack(">H", len(places)), listed),
            box(b"iinf", bytes(4), struct.pack(">H", len(infos)), *infos),
            box(b"iref", bytes(4), box(b"dimg", uses)),
            box(
                b"iprp",
                box(b"ipco", *sizes, *kept),
                box(b"ipma", bytes(4), struct.pack(">I", len(uses_of)), *uses_of),
            ),
        )

    return whole(len(whole(0)) + 8) + box(b"mdat", grid, coded)


def _avifs() -> Iterator[tuple[str, bytes]]:
    frames = [drawn(seed=number) for number in range(3)]
    yield "RGB", encoded(drawn(), "AVIF", max_threads=1)
    yield "4:4:4", encoded(drawn(), "AVIF", subsampling="4:4:4", quality=90, max_threads=1)
    yield "RGBA", encoded(translucent(), "AVIF", max_threads=1)
    yield "grey", encoded(drawn().convert("L"), "AVIF", max_threads=1)
    yield "animated", encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:], max_threads=1)
    cell = encoded(drawn(64, 64), "AVIF", subsampling="4:4:4", max_threads=1)
    yield "grid", avif_grid(cell, 64, 1, 1, (WIDTH, HEIGHT))


_MAKERS = {"JPEG": _jpegs, "PNG": _pngs, "GIF": _gifs, "WEBP": _webps, "BMP": _bmps, "TIFF": _tiffs}


@cache
def samples() -> dict[tuple[str, str], bytes]:
    """Return files by format and what they are of it."""
    makers = _MAKERS | ({"AVIF": _avifs} if features.check("avif") else {})
    found = {(kind, name): data for kind, maker in makers.items() for name, data in maker()}
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        for orientation in range(1, 9) if kind in makers else ():
            found[kind, f"orientation {orientation}"] = encoded(drawn(), kind, exif=exif(orientation), **options)
    return found


#: What is no picture that is read, by what it is.
FOREIGN = {
    "nothing": b"",
    "text": b"hello, this is text",
    "HTML": b"<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>",
    "SVG": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "PDF": b"%PDF-1.7\n1 0 obj\n<< >>\nendobj\n",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\n",
    "EPS with a preview": b"\xc5\xd0\xd3\xc6"
    + struct.pack("<IIIIIIH", 30, 60, 0, 0, 0, 0, 0xFFFF)
    + b"%!PS-Adobe-3.0\n",
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(18) + b"\1\0\x09\0\0\3" + bytes(12),
    "EMF": b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(60),
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(20),
    "ICO": b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + struct.pack("<II", 64, 22) + bytes(64),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40),
    "HEIC as mif1": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(40),
    "MP4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(40),
    "WAV": b"RIFF\x24\0\0\0WAVEfmt " + bytes(28),
    "ZIP": b"PK\3\4\x14\0\0\0\0\0" + bytes(30),
    "ELF": b"\x7fELF\2\1\1" + bytes(57),
    "gzip": b"\x1f\x8b\x08\0" + bytes(20),
    "QOI": b"qoif" + struct.pack(">II", 9, 9) + b"\3\0" + bytes(20),
    "DDS": b"DDS " + struct.pack("<I", 124) + bytes(120),
    "TGA": bytes([0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 9, 0, 24, 0]) + bytes(243),
    "PPM": b"P6 9 9 255\n" + bytes(243),
    "zeros": bytes(1000),
}
