"""The same damaged files to this reader and to the reference package.

    python3 tests/differential_safetensors.py LIBRARY CORPUS [FILES]

LIBRARY is tests/differential.c as a shared object, CORPUS a folder of files to start from.
What this reader accepts the reference must accept, with the same names, types, shapes and
bytes. What it refuses and the reference accepts must break one of the rules of STRICTER,
each of which is stricter on purpose."""
import collections
import ctypes
import glob
import json
import os
import random
import re
import struct
import sys

try:
    import safetensors
except ImportError as missing:
    print("skipped differential_safetensors: %s" % missing)
    print("0 passed, 0 failed")
    sys.exit(0)

# Rule of the section safetensors of exfusion.h -> why it is stricter.
STRICTER = {
    "V6": "a key twice: the reference keeps the last one, in silence",
    "V7": "U+0000 in a string: C would cut the name short",
    "V9": "members besides dtype, shape, data_offsets: the format's schema forbids them",
    "V10": "integers above 2^48 - 1, the limit of the format's schema",
    "V13": "an overflow beside a zero: the reference multiplies from the left",
    "V18": "limits of this library: 16 axes, names of 4096 bytes",
}
NUMBERS = ["0", "1", "2", "3", "4", "5", "8", "16", "255", "256", "-1", "01", "1.0", "1e1",
           "4294967296", "281474976710655", "281474976710656", "18446744073709551615",
           "18446744073709551616", "9223372036854775807", "null", "true", '"4"', "[]", ""]
DTYPES = ["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ",
          "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64",
          "I64", "U64", "F4", "F6_E2M3", "F6_E3M2", "F31", "f32", ""]
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|\d+|[\[\]{}:,]|\s+|.', re.DOTALL)


def file_of(header, data):
    return struct.pack("<Q", len(header)) + header + data


def split(raw):
    n = struct.unpack("<Q", raw[:8])[0] if len(raw) >= 8 else 0
    return (raw[8:8 + n], raw[8 + n:]) if n <= len(raw) else (raw[8:], b"")


def sound(rng):
    """A file without fault, of a few tensors."""
    parts, at = [], 0
    for i in range(rng.randrange(5)):
        shape = [rng.choice([0, 1, 2, 3, 4]) for _ in range(rng.randrange(4))]
        dtype, width = rng.choice([("F32", 4), ("U8", 1), ("F16", 2), ("F64", 8)])
        size = width
        for axis in shape:
            size *= axis
        parts.append('"%s":{"dtype":"%s","shape":%s,"data_offsets":[%d,%d]}' % (
            rng.choice(["a", "b.c", "\u00e9", "\\n", "\\u0041"]) + str(i), dtype,
            str(shape).replace(" ", ""), at, at + size))
        at += size
    rng.shuffle(parts)
    if rng.random() < 0.4:
        parts.insert(0, '"__metadata__":{"format":"pt","k":"v"}')
    return file_of(("{" + ",".join(parts) + "}").encode(), rng.randbytes(at))


def mutate_tokens(rng, header, other):
    tokens = TOKEN.findall(header) or [b"{}"]
    at = rng.randrange(len(tokens))
    kind = rng.randrange(7)
    if kind == 0:
        numbers = [i for i, t in enumerate(tokens) if t.isdigit()] or [at]
        tokens[rng.choice(numbers)] = rng.choice(NUMBERS).encode()
    elif kind == 1:
        strings = [i for i, t in enumerate(tokens) if t[:1] == b'"'] or [at]
        new = rng.choice(DTYPES + ["shape", "dtype", "data_offsets", "__metadata__", "a0",
                                   "x", "\\u0000", "\\ud800", "\\ud83d\\ude00", "\u00e9"])
        tokens[rng.choice(strings)] = ('"%s"' % new).encode()
    elif kind == 2:
        del tokens[at]
    elif kind == 3:
        tokens.insert(at, rng.choice(tokens))
    elif kind == 4:
        tokens.insert(at, rng.choice([b" ", b"\n", b"\t", b"\r", b"\0", b"\x0b", b"\xa0"]))
    elif kind == 5:
        end = min(len(tokens), at + rng.randrange(1, 20))
        into = rng.randrange(len(tokens))
        tokens[into:into] = tokens[at:end]
    else:
        others = TOKEN.findall(other) or [b"{}"]
        start = rng.randrange(len(others))
        tokens[at:at + rng.randrange(8)] = others[start:start + rng.randrange(12)]
    return b"".join(tokens)


def mutate(rng, raw, other):
    header, data = split(raw)
    for _ in range(rng.randrange(1, 4)):
        kind = rng.random()
        if kind < 0.7:
            header = mutate_tokens(rng, header, split(other)[0])
        elif kind < 0.8 and header:
            at = rng.randrange(len(header))
            header = header[:at] + bytes([rng.randrange(256)]) + header[at + 1:]
        elif kind < 0.9:
            data = data[:rng.randrange(len(data) + 1)] if data else b"\1"
        else:
            data += rng.randbytes(rng.randrange(9))
    raw = file_of(header, data)
    if rng.random() < 0.05:
        raw = rng.randbytes(8) + raw[8:]
    return raw[:rng.randrange(len(raw) + 1)] if rng.random() < 0.03 else raw


def twice(raw):
    """Is a key there twice? Then the reference never sees what the first one says."""
    found = []

    def look(pairs):
        keys = [key for key, _ in pairs]
        found.append(len(set(keys)) < len(keys))
        return {}
    json.loads(split(raw)[0].decode(), object_pairs_hook=look)
    return any(found)


def theirs(raw):
    """In the form of differential.c; None when it is refused."""
    try:
        tensors = safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return None
    out = []
    for name, t in sorted((name.encode(), t) for name, t in tensors):
        dims = "".join("%d " % d for d in t["shape"])
        text = "%d %s%d " % (len(t["shape"]), dims, len(t["data"]))
        out.append(name + b"\0" + t["dtype"].encode() + b"\0" + text.encode()
                   + bytes(t["data"]))
    return b"".join(out)


def main():
    library = ctypes.CDLL(os.path.abspath(sys.argv[1]))
    library.differential.restype = ctypes.c_long
    library.differential.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p,
                                     ctypes.c_size_t]
    corpus = []
    for path in sorted(glob.glob(os.path.join(sys.argv[2], "*"))):
        with open(path, "rb") as f:
            corpus.append(f.read())
    files = int(sys.argv[3]) if len(sys.argv) > 3 else 100000
    rng = random.Random(5)
    room = 1 << 20
    out = ctypes.create_string_buffer(room)
    both = neither = bad = 0
    stricter, messages = collections.Counter(), {}
    for i in range(files):
        if i < len(corpus):
            raw = corpus[i]
        elif i % 20 == 0:
            raw = sound(rng)
        else:
            other = corpus[rng.randrange(len(corpus))]
            raw = mutate(rng, sound(rng) if i % 3 else rng.choice(corpus), other)
        n = library.differential(raw, len(raw), out, room)
        mine = None if n < 0 else out.raw[:n]
        reference = theirs(raw)
        rule = re.search(r"rule (V\d+):", out.value.decode()).group(1) if n < 0 else ""
        if mine is None and reference is None:
            neither += 1
        elif mine is None and (rule in STRICTER or twice(raw)):
            rule = rule if rule in STRICTER else "V6"
            stricter[rule] += 1
            messages.setdefault(rule, out.value.decode())
        elif mine == reference:
            both += 1
        else:
            bad += 1
            if bad <= 10:
                print("  differs: %r\n    %s\n    %r" % (
                    raw, out.value.decode("latin-1")[:200] if n < 0 else mine, reference))
    print("%d files: both accept %d, with the same bytes; both refuse %d"
          % (files, both, neither))
    for rule in sorted(stricter, key=lambda r: int(r[1:])):
        print("  %6d stricter by %s, %s" % (stricter[rule], rule, STRICTER[rule]))
    ok = bad == 0 and both > files // 50 and neither > 0
    print("1 passed, 0 failed" if ok else "%d passed, 1 failed: %d differ" % (0, bad))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
