"""Writes reference.safetensors with the reference package, for test_safetensors.c.

    pip install safetensors numpy; python3 tests/golden/make_safetensors.py

The test builds the same tensors and compares its own file byte by byte. One metadata key
only: the reference leaves the order of more to chance."""
import os

import numpy
from safetensors.numpy import save

NAMES = [
    ("h.0.mlp.c_fc.weight", (6, 4)),
    ("h.10.bias", (3,)),
    ("h.2.bias", (5,)),
    ("scalar", ()),
    ("empty", (0, 4)),
    ("", (1,)),
    ("Z", (2, 1, 2)),
    ("quote\" slash\\ / tab\t line\n \b\f\r \x01\x1f \x7f", (2,)),
    ("na\u00efve \u65e5\u672c \U0001f600", (1, 2)),
]


def tensors():
    at = 0
    result = {}
    for name, shape in NAMES:
        n = int(numpy.prod(shape, dtype=int))
        values = (numpy.arange(at, at + n, dtype=numpy.float32) - 20) / 16
        result[name] = values.reshape(shape).astype(numpy.float32)
        at += n
    return result


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "reference.safetensors"), "wb") as f:
        f.write(save(tensors(), metadata={"format": "pt \"\u00e9\"\n"}))
