"""Reads a file that the library wrote with the reference package, and writes it back.

    python3 tests/interop_safetensors.py build/tests/test_safetensors

Passes when every value and the metadata arrive and the reference makes the same bytes."""
import os
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden"))
try:
    import numpy
    from safetensors import safe_open
    from safetensors.numpy import save
except ImportError as missing:
    print("skipped interop_safetensors: %s" % missing)
    print("0 passed, 0 failed")
    sys.exit(0)
from make_safetensors import tensors

path = os.path.join("build", "interop.safetensors")
os.makedirs("build", exist_ok=True)
subprocess.run([sys.argv[1], "--write", path], check=True)
expected = tensors()
with safe_open(path, framework="numpy") as f:
    metadata = f.metadata()
    found = {name: f.get_tensor(name) for name in f.keys()}
ok = sorted(found) == sorted(expected) and len(found) > 0
for name in expected:
    ok = ok and name in found and found[name].dtype == numpy.float32
    ok = ok and found[name].shape == expected[name].shape
    ok = ok and found[name].tobytes() == expected[name].tobytes()
with open(path, "rb") as f:
    ok = ok and f.read() == save(found, metadata=metadata)
os.remove(path)
print("1 passed, 0 failed" if ok else "0 passed, 1 failed")
sys.exit(0 if ok else 1)
