"""The container: intact chunks are read exactly, and damaged ones are reported."""

import contextlib
import importlib.util
import io
import json
import os
import struct
import threading
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musigma.coding import container
from musigma.coding import reader as reading
from musigma.coding.container import (
    BITS_BACK,
    EXCEPTION,
    KINDS,
    PACKED,
    RAW,
    RECORDS,
    Chunk,
    Writer,
)
from musigma.coding.errors import (
    CodingError,
    DamagedFile,
    LimitExceeded,
    Limits,
    NumericsDiffer,
    UnknownVersion,
    WrongModel,
)
from musigma.coding.reader import Reader

FUZZ = Path(__file__).parent.parent / "benchmarks" / "fuzz_coding.py"
HEADER = {"a": 1, "model": {"sha256": "ab"}}
MODEL = b"not a model"


def exceptions(*rows):
    return np.array(list(rows), EXCEPTION)


def chunks(*counts, kind=BITS_BACK, seed=0):
    rng = np.random.default_rng(seed)
    out, first = [], 0
    for index, count in enumerate(counts):
        model = kind in (BITS_BACK, RECORDS)
        out.append(
            Chunk(
                index=index,
                first=first,
                count=count,
                kind=kind,
                raw=count * 10,
                schedule=(1,) * min(count, 2) + (count - 2,) * (count > 2) if model else (),
                exceptions=exceptions((0, index, 2, 1)) if index % 2 else exceptions(),
                side=b"names" * index,
                payload=rng.bytes(10 + index),
            )
        )
        first += count
    return out


def written(parts, header=HEADER, model=None, **options):
    file = io.BytesIO()
    with Writer(file, header, model, **options) as writer:
        for part in parts:
            writer.write(part)
    return file.getvalue()


def reader(data, **limits):
    return Reader(io.BytesIO(data), Limits(**limits))


def same(a, b):
    names = ("index", "first", "count", "kind", "raw", "side", "payload")
    assert [getattr(a, n) for n in names] == [getattr(b, n) for n in names]
    assert tuple(a.schedule) == tuple(b.schedule)
    np.testing.assert_array_equal(a.exceptions, b.exceptions, strict=True)


def kept(data, parts, header=HEADER, model=MODEL):
    """Indices of the chunks that are read, and are exact; None if the file is refused."""
    try:
        found = reader(data)
    except CodingError:
        return None
    assert found.header == header
    if found.model_size:
        with contextlib.suppress(DamagedFile):
            assert found.model() == model
    indices = set()
    for place, entry in enumerate(found.entries):
        try:
            chunk = found.read(place)
        except CodingError:
            continue
        same(chunk, parts[entry.index])
        indices.add(entry.index)
    for first, stop in found.lost:
        assert not any(e.first < stop and first < e.first + e.count for e in found.entries)
    return indices


PARTS = chunks(1, 3, 2)
WHOLE = written(PARTS, model=MODEL)
ENTRIES = reader(WHOLE).entries
BODY = ENTRIES[0].offset
FOOTER = ENTRIES[-1].end
SEED = zlib.crc32(WHOLE[: BODY - len(MODEL) - 4])


def piece(place, data=WHOLE):
    entry = reader(data).entries[place]
    return data[entry.offset : entry.end]


# -- round trips

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
).filter(lambda value: layout_depth(value) <= 7)  # fmt: skip


def layout_depth(value):
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(layout_depth, inner), default=0) if isinstance(value, (dict, list)) else 0


@st.composite
def any_chunks(draw):
    out, first = [], 0
    for index in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(list(KINDS)))
        model = kind in (BITS_BACK, RECORDS)
        sizes = draw(st.lists(st.integers(1, 256), min_size=1, max_size=5))
        rows = draw(
            st.lists(
                st.tuples(
                    st.integers(0, 2**32 - 1),
                    st.integers(0, 2**32 - 1),
                    st.integers(0, 2**32 - 1),
                    st.integers(0, 1),
                ),
                max_size=3,
            )
        )
        chunk = Chunk(
            index=index,
            first=first,
            count=sum(sizes),
            kind=kind,
            raw=draw(st.integers(0, 1 << 28)),
            schedule=sizes if model else [],
            exceptions=exceptions(*rows),
            side=draw(st.binary(max_size=50)),
            payload=draw(st.binary(max_size=50)),
        )
        out.append(chunk)
        first += chunk.count
    return out


@settings(deadline=None, max_examples=60)
@given(any_chunks(), st.dictionaries(st.text(), json_values), st.none() | st.binary(min_size=1))
def test_round_trip(parts, header, model):
    data = written(parts, header, model)
    found = reader(data)
    assert found.header == header
    assert (found.rescanned, found.lost, found.ended) == (False, (), True)
    assert found.images == sum(part.count for part in parts)
    assert found.model_size == len(model or b"")
    if model:
        assert found.model() == model
    assert len(found) == len(parts)
    for mine, part in zip(found, parts, strict=True):
        same(mine, part)
    for place in reversed(range(len(parts))):
        same(found.read(place), parts[place])
    assert data == written(list(found), found.header, model)


class Narrow(io.RawIOBase):
    """Reads and writes seven bytes at a time."""

    def __init__(self, data=b""):
        self.inner = io.BytesIO(data)

    def writable(self):
        return True

    def write(self, data):
        return self.inner.write(bytes(data[:7]))

    def read(self, size=-1):
        return self.inner.read(min(size, 7))

    def seek(self, offset, whence=0):
        return self.inner.seek(offset, whence)


def test_files_with_short_reads_and_writes():
    file = Narrow()
    with Writer(file, HEADER, MODEL) as writer:
        for part in PARTS:
            writer.write(part)
    assert writer.close() == len(WHOLE)
    assert file.inner.getvalue() == WHOLE
    for mine, part in zip(Reader(Narrow(WHOLE)), PARTS, strict=True):
        same(mine, part)


def test_a_pipe():
    end, begin = os.pipe()
    got = []
    with open(end, "rb") as source:
        thread = threading.Thread(target=lambda: got.append(source.read()))
        thread.start()
        with open(begin, "wb", buffering=0) as file, Writer(file, HEADER, MODEL) as writer:
            sizes = [writer.write(part) for part in PARTS]
        thread.join()
    assert got == [WHOLE]
    assert sizes == [entry.size for entry in ENTRIES]


def test_a_write_that_fails_leaves_no_footer():
    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() > ENTRIES[1].offset:
                raise OSError("full")
            return super().write(data)

    file = Full()
    writer = Writer(file, HEADER, MODEL)
    writer.write(PARTS[0])
    with pytest.raises(OSError, match="full"):
        writer.write(PARTS[1])
    with pytest.raises(ValueError, match="write it again"):
        writer.close()
    with pytest.raises(ValueError, match="failed"):
        writer.write(PARTS[1])
    assert kept(file.getvalue(), PARTS) == {0}


def test_a_block_that_raises_leaves_no_footer():
    file = io.BytesIO()
    with contextlib.suppress(KeyError), Writer(file, HEADER) as writer:
        writer.write(PARTS[0])
        raise KeyError
    found = Reader(file)
    assert (len(found), found.rescanned, found.ended) == (1, True, False)


def test_bytes_of_the_format():
    """A file written by hand from the description of the format."""
    text = b'{"a":1}'
    start = b"\x89MUS\r\n\x1a\n" + struct.pack("<BBHI", 1, 0, 0, len(text)) + text
    seed = zlib.crc32(start)
    front = bytes([1]) + struct.pack("<4I", 7, 8, 9, 1)
    digest = container.body_digest(front, b"xyz")
    head = b"MUSC" + struct.pack("<IIIIIIIIQQ", 0, 0, 2, 2, 1, 1, 0, 0, 50, 3) + digest
    head += struct.pack("<I", zlib.crc32(head, seed))
    data = start + struct.pack("<I", seed) + head + front + b"xyz"
    chunk = Chunk(
        **dict(index=0, first=0, count=2, kind=BITS_BACK, raw=50, schedule=[2]),
        **dict(exceptions=exceptions((7, 8, 9, 1)), payload=b"xyz"),
    )
    ours = written([chunk], {"a": 1})
    assert ours[: len(data)] == data
    same(reader(data).read(0), chunk)
    assert len(ours) - len(data) == 56 + 32 + 16


# -- invalid input of the writer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": 1}, "order"),
        ({"first": 1}, "order"),
        ({"count": 0}, "at least one"),
        ({"raw": -1}, "size in bytes"),
        ({"kind": 4}, "kind"),
        ({"kind": RAW}, "none if no model"),
        ({"schedule": [1]}, "sum"),
        ({"schedule": []}, "sum"),
        ({"schedule": [0, 3]}, "1 to 256"),
        ({"schedule": [257], "count": 257}, "1 to 256"),
        ({"exceptions": np.zeros((1, 3), int)}, "dtype"),
        ({"payload": np.zeros(3, "u4")}, "tobytes"),
        ({"side": "text"}, "expected bytes"),
    ],
)
def test_invalid_chunks_are_refused(change, message):
    fields = {"index": 0, "first": 0, "count": 3, "kind": RECORDS, "raw": 3, "schedule": [1, 2]}
    file = io.BytesIO()
    writer = Writer(file, HEADER)
    with pytest.raises(ValueError, match=message):
        writer.write(Chunk(**fields | change))
    writer.write(Chunk(**fields))
    writer.close()
    assert len(Reader(file)) == 1
    with pytest.raises(ValueError, match="closed"):
        writer.write(Chunk(**fields | {"index": 1, "first": 3}))


@pytest.mark.parametrize(
    "header",
    [
        [1],
        {1: 2},
        {"a": float("nan")},
        {"a": float("inf")},
        {"a": b"bytes"},
        {"a": {1: 2}},
        {"a": [[[[[[[[1]]]]]]]]},
        {"a": 10**5000},
    ],
)
def test_invalid_headers_are_refused(header):
    with pytest.raises(ValueError, match="header"):
        Writer(io.BytesIO(), header)


LIMITED = [
    ("header", 3),
    ("embedded", 3),
    ("chunks", 2),
    ("images", 5),
    ("chunk_images", 2),
    ("chunk_raw", 29),
    ("payload", 11),
    ("exceptions", 0),
    ("side", 9),
    ("total", 59),
]


@pytest.mark.parametrize(("name", "value"), LIMITED)
def test_limits(name, value):
    with pytest.raises(LimitExceeded, match=f"{name}="):
        written(PARTS, model=MODEL, limits=Limits(**{name: value}))
    with pytest.raises(LimitExceeded, match=f"{name}="):
        reader(WHOLE, **{name: value})
    if name not in ("header", "embedded", "chunks"):
        with pytest.raises(LimitExceeded, match=f"{name}="):
            reader(WHOLE[:FOOTER], **{name: value})
    with pytest.raises(CodingError):
        reader(WHOLE, depth=1)


def test_the_limit_of_chunks_holds_for_a_damaged_file():
    damaged = bytearray(WHOLE)
    damaged[reader(WHOLE).entries[0].offset + 4] ^= 1
    with pytest.raises(LimitExceeded, match="chunks="):
        reader(bytes(damaged), chunks=len(PARTS) - 1)


def test_exit_codes():
    classes = (CodingError, DamagedFile, WrongModel, NumericsDiffer, LimitExceeded, UnknownVersion)
    assert [c.exit_code for c in classes] == [2, 3, 4, 5, 6, 7]
    assert all(issubclass(c, CodingError) and issubclass(c, ValueError) for c in classes)


# -- damage


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_byte_changed(mask):
    """A changed byte loses only its own chunk."""
    for place in range(len(WHOLE)):
        data = bytearray(WHOLE)
        data[place] ^= mask
        got = kept(bytes(data), PARTS)
        if place < BODY - len(MODEL):
            assert got is None, place
            continue
        hit = {e.index for e in ENTRIES if e.offset <= place < e.end}
        assert got == {0, 1, 2} - hit, place
        found = reader(bytes(data))
        assert found.rescanned == (place >= FOOTER or any(
            e.offset <= place < e.offset + container.HEAD.size for e in ENTRIES
        ))  # fmt: skip
        if place < BODY:
            with pytest.raises(DamagedFile, match="digest"):
                found.model()


def test_damage_is_named():
    data = bytearray(WHOLE)
    data[ENTRIES[1].end - 1] ^= 1
    with pytest.raises(
        DamagedFile, match=rf"chunk 1 \(images 1 to 3, at byte {ENTRIES[1].offset}"
    ):
        reader(bytes(data)).read(1)
    data[ENTRIES[1].offset] ^= 1
    found = reader(bytes(data))
    assert (found.lost, found.images, found.ended) == (((1, 4),), 6, True)
    found = reader(bytes(data[:FOOTER]))
    assert (found.lost, found.images, found.ended) == (((1, 4),), 6, False)
    found = reader(bytes(data[: FOOTER - 1]))  # the last chunk's header is there
    assert (found.lost, found.images, found.ended) == (((1, 6),), 6, False)


def test_every_truncation():
    """A truncated file yields all chunks before its end."""
    for length in range(len(WHOLE)):
        got = kept(WHOLE[:length], PARTS)
        if length < BODY:
            assert got is None, length
        else:
            assert got == {e.index for e in ENTRIES if e.end <= length}, length
    for length in range(BODY):  # the front is gone
        assert kept(WHOLE[length + 1 :], PARTS) is None


def test_bytes_removed_and_inserted_anywhere():
    """Every chunk that is whole is read."""
    for place in range(BODY, len(WHOLE)):
        for data in (WHOLE[:place] + WHOLE[place + 5 :], WHOLE[:place] + b"MUSC?" + WHOLE[place:]):
            got = kept(data, PARTS)
            assert got == {e.index for e in ENTRIES if piece(e.index) in data}, place


@pytest.mark.parametrize("footer", [WHOLE[FOOTER:], b""])
def test_chunks_in_another_place(footer):
    a, b, c = map(piece, range(3))
    start = WHOLE[:BODY]
    for body in (
        b + a + c,
        c + b + a,
        a + a + b + c,
        a + b + c + b,
        a + b"junk" + b + c,
        a + b + c,
    ):
        assert kept(start + body + footer, PARTS) == {0, 1, 2}
        assert kept(start + body + footer + b"MUSF, and what more", PARTS) == {
            0,
            1,
            2,
        }
    bad = a[:-1] + b"?"
    for body in (bad + a + b + c, a + bad + b + c, b + bad + c + a):
        assert kept(start + body + footer, PARTS) == {0, 1, 2}
    assert reader(start + a + c + footer).lost == ((1, 4),)
    assert kept(WHOLE + WHOLE, PARTS) == {0, 1, 2}
    assert kept(start + footer, PARTS) == set()


def test_chunks_of_other_files():
    """Those with another header are never read; with the same header, the footer decides."""
    other = written(chunks(1, 3, 2, seed=1), {"a": 2})
    start, mine, footer = WHOLE[:BODY], WHOLE[BODY:FOOTER], WHOLE[FOOTER:]
    assert kept(start + piece(0, other) + mine[len(piece(0)) :] + footer, PARTS) == {1, 2}
    assert kept(start + mine + other[reader(other).entries[-1].end :], PARTS) == {0, 1, 2}
    twin = written(chunks(1, 3, 2, seed=1), HEADER, MODEL)
    assert twin[:BODY] == start
    assert kept(start + piece(0, twin) + mine[len(piece(0)) :] + footer, PARTS) == {1, 2}
    found = reader(start + mine + twin[FOOTER:])
    assert found.rescanned
    assert not found.ended
    assert kept(start + mine + twin[FOOTER:], PARTS) == {0, 1, 2}
    # two different chunks 0 and no footer: neither is read
    assert kept(start + piece(0, twin) + mine, PARTS) == {1, 2}


def test_a_file_within_a_chunk():
    """Chunks in a payload are not read, even with the same header."""
    twin = written(chunks(1, 3, 2, seed=1))
    parts = [*chunks(1, 3), Chunk(index=2, first=4, count=1, kind=RAW, raw=9, payload=twin)]
    parts.append(Chunk(index=3, first=5, count=1, kind=PACKED, raw=9, payload=b"MUSCMUSF" * 99))
    data = written(parts)
    entries = reader(data).entries
    for cut in (len(data), entries[-1].end, entries[2].end, entries[2].end + 10):
        assert kept(data[:cut], parts) == {e.index for e in entries if e.end <= cut}
    broken = bytearray(data)
    broken[entries[3].offset] ^= 1
    assert kept(bytes(broken), parts) == {0, 1, 2}
    broken = broken[: entries[3].end]  # the outer chunk is the last, without a footer
    assert kept(bytes(broken), parts) == {0, 1, 2}


def test_blocks_with_their_own_checksums_cannot_change_places():
    """A CRC around the blocks of a PNG would not detect it."""
    blocks = [b + struct.pack("<I", zlib.crc32(b)) for b in (b"IDATone.", b"IDATtwo.")]
    part = Chunk(index=0, first=0, count=1, kind=PACKED, raw=9, payload=b"".join(blocks))
    data = written([part])
    assert zlib.crc32(part.payload) == zlib.crc32(b"".join(blocks[::-1]))
    assert kept(data.replace(part.payload, b"".join(blocks[::-1])), [part]) == set()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\x89MU", "truncated"),
        (WHOLE[:15], "truncated"),
        (WHOLE.replace(b"\r\n", b"\n"), "line ends"),
        (WHOLE.replace(b"\n", b"\r\n"), "line ends"),
        (WHOLE.decode("latin1").encode(), "as text"),
        (WHOLE.decode(errors="replace").encode(), "as text"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"PK\x03\x04", "zip"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"\x40" + b"\0" * 7 + b'{"__metadata__"', "safetensors"),
        (b"\0" * 100, "not a .mus file"),
    ],
)
def test_other_files(data, message):
    with pytest.raises(DamagedFile, match=message):
        reader(data)


# -- forged files: all checksums are right


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_coding", FUZZ)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": 1}',
        b'{"b":1,"a":2}',
        b'{"a":1,"a":2}',
        b'{"a":1.0e0}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',
        b'{"a":"\xc3\xa9"}',
        b'{"a":"\xff"}',
        b'{"a":' + b"[" * 8 + b"]" * 8 + b"}",
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' + b"9" * 5000 + b"}",
        b"[]",
        b"1",
        b"",
        b"{",
    ],
)
def test_headers_that_are_not_canonical(text, fuzz):
    data = bytearray(written([], {}))
    data[12:18] = struct.pack("<I", len(text)) + text
    with pytest.raises(DamagedFile, match="canonical"):
        reader(fuzz.repair(data))


def test_versions(fuzz):
    for place, value in ((8, 0), (8, 2), (8, 255), (10, 5), (11, 1)):
        data = bytearray(WHOLE)
        data[place] = value
        with pytest.raises(UnknownVersion, match=r"upgrade"):
            reader(fuzz.repair(data))
    data = bytearray(WHOLE)
    data[9] = 7  # a later minor version announces additions by flags and kinds
    assert kept(fuzz.repair(data), PARTS) == {0, 1, 2}
    data = bytearray(WHOLE)
    data[ENTRIES[1].offset + 16] = 9
    data[FOOTER + 56 + 32 + 24] = 9
    found = reader(fuzz.repair(data))
    assert not found.rescanned
    same(found.read(0), PARTS[0])
    with pytest.raises(UnknownVersion, match="kind 9"):
        found.read(1)


HEAD_FIELDS = {"index": 4, "first": 8, "count": 12, "batches": 20, "exceptions": 24}
HEAD_FIELDS |= {"side": 28, "inflated": 32, "raw": 36, "payload": 44}


@pytest.mark.parametrize("name", HEAD_FIELDS)
@pytest.mark.parametrize("value", [0, 1, 2, 255, 1 << 20, (1 << 32) - 1])
def test_lengths_that_lie(name, value, fuzz):
    """A `CodingError`, or the other chunks; and no memory is allocated for missing bytes."""
    data = bytearray(WHOLE)
    at = ENTRIES[1].offset + HEAD_FIELDS[name]
    data[at : at + 4] = struct.pack("<I", value)
    if name in ("raw", "payload"):
        data[at + 4 : at + 8] = struct.pack("<I", value)
    for forged in (fuzz.repair(data), fuzz.repair(data[:FOOTER])):
        tracemalloc.start()
        try:
            found = reader(forged)
            for place, entry in enumerate(found.entries):
                if entry.index != 1:
                    same(found.read(place), PARTS[entry.index])
                else:
                    assert entry.count >= 1
                    assert entry.first >= entry.index
                    with contextlib.suppress(DamagedFile):
                        chunk = found.read(place)
                        assert sum(chunk.schedule) == chunk.count == entry.count
                        assert name != "inflated" or len(chunk.side) == value
        except LimitExceeded:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 1 << 19


@pytest.mark.parametrize("field", [(12, 4), (BODY - len(MODEL) - 44, 8), (FOOTER + 4, 4)])
def test_large_lengths_of_other_parts(field, fuzz):
    place, size = field
    for value in (len(WHOLE), 1 << 31, (1 << 8 * size) - 1):
        data = bytearray(WHOLE)
        data[place : place + size] = value.to_bytes(size, "little")
        tracemalloc.start()
        got = kept(fuzz.repair(data), PARTS)
        assert tracemalloc.get_traced_memory()[1] < 1 << 19
        tracemalloc.stop()
        assert got == ({0, 1, 2} if place > BODY else None)


def test_a_bomb_in_the_side(fuzz):
    """64 MiB of zeros in 64 KiB, declared to be less."""
    bomb = zlib.compress(bytes(1 << 26), 9)
    part = Chunk(index=0, first=0, count=1, kind=RAW, raw=1, payload=bomb)
    data = bytearray(written([part]))
    head = reader(bytes(data)).entries[0].offset
    for said in (len(bomb), 1 << 24):
        data[head + 28 : head + 36] = struct.pack("<II", len(bomb), said)
        data[head + 44 : head + 52] = struct.pack("<Q", 0)
        found = reader(fuzz.repair(data))
        tracemalloc.start()
        with pytest.raises(DamagedFile, match="agree"):
            found.read(0)
        assert tracemalloc.get_traced_memory()[1] < 3 * said + (1 << 20)
        tracemalloc.stop()
    data[head + 32 : head + 36] = struct.pack(
        "<I", 9
    )  # no side grows that much when it is deflated
    assert reader(fuzz.repair(data)).lost == ((0, 1),)
    data[head + 32 : head + 36] = struct.pack("<I", (1 << 24) + 1)
    with pytest.raises(LimitExceeded, match="side="):
        reader(fuzz.repair(data))


def test_a_rescan_is_linear(fuzz):
    """Many headers that each claim the rest of the file, and many that are none."""
    start = written([], {})[:-72]
    head = written([Chunk(index=0, first=0, count=1, kind=RAW, raw=1)], {})[len(start) :][:64]
    hostile = []
    for number in range(1000):
        claims = bytearray(head)
        claims[44:52] = struct.pack("<Q", (1000 - number) * 64)
        hostile.append(bytes(claims))
    data = fuzz.repair(start + b"".join(hostile) + b"?" * 100)
    source = reading.Source(io.BytesIO(data), Limits())
    source.seed = zlib.crc32(data[: len(start) - 4])
    read = []
    at = source.at
    source.at = lambda offset, size: (read.append(size), at(offset, size))[1]
    reading.find(source, len(start))
    assert sum(read) < 5 * len(data)
    with pytest.raises(LimitExceeded, match="apparent chunks"):
        reader(start + b"MUSC" * 5000, chunks=1000)


@pytest.mark.parametrize("window", [4, 5, 63, 64, 65, 100, 300])
def test_a_rescan_finds_chunks_across_its_windows(window, monkeypatch):
    monkeypatch.setattr(reading, "WINDOW", window)
    for noise in range(12):
        data = WHOLE[:BODY] + b"?" * noise + WHOLE[BODY:FOOTER]
        assert kept(data, PARTS) == {0, 1, 2}
        assert kept(data + WHOLE[FOOTER:] + b"?", PARTS) == {0, 1, 2}


def test_a_footer_must_agree_with_the_file(fuzz):
    """Its checksum is right, but it is that of another place or of other headers."""
    tail = struct.pack("<Q", FOOTER + 4) + WHOLE[-8:]
    found = reader(fuzz.repair(WHOLE[:FOOTER] + b"junk" + WHOLE[FOOTER:-16] + tail))
    assert (found.rescanned, len(found)) == (True, 3)
    data = bytearray(WHOLE)
    data[FOOTER + 30] ^= 1  # in the digest of all headers
    data[-8:-4] = struct.pack("<I", zlib.crc32(data[FOOTER:-8], SEED))
    found = reader(bytes(data))
    assert (found.rescanned, len(found)) == (True, 3)


def test_a_file_that_shrinks():
    file = io.BytesIO(WHOLE)
    found = Reader(file)
    file.truncate(ENTRIES[2].offset + 80)
    same(found.read(1), PARTS[1])
    with pytest.raises(DamagedFile, match="do not change it"):
        found.read(2)


def test_no_model():
    found = reader(written([]))
    assert (found.model_size, len(found), found.images) == (0, 0, 0)
    with pytest.raises(CodingError, match="no model"):
        found.model()
    with pytest.raises(ValueError, match="model"):
        Writer(io.BytesIO(), {}, b"")


def test_many_changes(fuzz):
    """A few inputs of benchmarks/fuzz_coding.py."""
    tally = fuzz.fuzz(fuzz.TARGETS["container"](), 3000, seed=1)
    assert not tally.failed, tally.report()
    assert {"read", "part of it read", "DamagedFile", "LimitExceeded"} <= set(tally.outcomes)
    assert json.dumps(tally.outcomes)
