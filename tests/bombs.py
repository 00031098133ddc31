"""Small pictures that mean to take much, by what their headers, frames and tiles say."""

import struct
import zlib

import numpy as np
from PIL import Image
from tests.pictures import SIGNATURE, chunk, drawn, encoded, tiff

#: Pixels of a side: beyond the limit of a service that is started without one.
HUGE = 65_000


def packed_zeros(length):
    """Return ``length`` zeros, compressed; made in pieces."""
    packer, piece = zlib.compressobj(1), bytes(1 << 20)
    parts = [packer.compress(piece) for _ in range(length >> 20)]
    return b"".join([*parts, packer.compress(bytes(length & (1 << 20) - 1)), packer.flush()])


def png_of_zeros(side, *, before=b""):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = packed_zeros(min((1 + 3 * side) * side, 500 << 20))
    return SIGNATURE + chunk(b"IHDR", header) + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_of(side):
    """Return a JPEG that announces a size and has little behind it."""
    data = encoded(drawn(16, 16), "JPEG", subsampling="4:4:4")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", side, side) + data[at + 4 :]


def webp_canvas(side, frame=None):
    """Return a WebP with a large canvas and a small picture in it."""
    small = encoded(drawn(16, 16), "WEBP") if frame is None else frame
    canvas = struct.pack("<I", side - 1)[:3]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas * 2
    body += b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    one = bytes(6) + struct.pack("<I", 15)[:3] * 2 + bytes(4) + small[12:]
    body += b"ANMF" + struct.pack("<I", len(one)) + one
    return b"RIFF" + struct.pack("<I", len(body)) + body


def avif_of(size):
    """Return an AVIF whose properties announce a size that its coded picture does not have."""
    data = encoded(drawn(64, 64), "AVIF", max_threads=1)
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", *size) + data[at + 8 :]


def tiff_of(side, **tags):
    data = zlib.compress(bytes(1000))
    named = {"width": 256, "length": 257, "rows": 278}
    listed = [
        (named[name], "I", (value,)) for name, value in {"width": side, "length": side, "rows": side, **tags}.items()
    ]
    return tiff(np.frombuffer(data, np.uint8).reshape(1, -1, 1), photometric=1, tags=[*listed, (259, "H", (8,))])


def tiled(side):
    edges = [(322, "I", (side,)), (323, "I", (side,))]
    return tiff(np.zeros((16, 16, 3), np.uint8), photometric=2, tile=(16, 16), deflated=True, tags=edges)


def same_tags(count, length):
    """Return a TIFF with so many tags, all of which name the same bytes."""
    data = tiff(np.zeros((16, 16, 3), np.uint8), photometric=2)
    (at,) = struct.unpack_from("<I", data, 4)
    (own,) = struct.unpack_from("<H", data, at)
    entries = data[at + 2 : at + 2 + 12 * own]
    more = b"".join(struct.pack("<HHII", 40_000 + number, 1, length, 8) for number in range(count))
    return (
        data[:4]
        + struct.pack("<I", len(data) + length)
        + data[8:]
        + bytes(length)
        + struct.pack("<H", own + count)
        + entries
        + more
        + bytes(4)
    )


def frames(count):
    """Return a GIF of so many frames as large as its screen."""
    still = [Image.new("P", (2000, 2000), number % 2) for number in range(3)]
    data = encoded(still[0], "GIF", save_all=True, append_images=still[1:])
    second = data.rindex(b"\x21\xf9")
    return data[:-1] + data[second:-1] * count + b";"
