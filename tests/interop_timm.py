"""Trains a small ViT, merges it, and has timm's VisionTransformer read the file.

    python3 tests/interop_timm.py build/vit

Passes when timm accepts every tensor by name and shape, has as many parameters, and finds
the loss and accuracy on the test pictures that vit reports."""
import json
import os
import shutil
import struct
import subprocess
import sys

try:
    import numpy
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer
except ImportError as missing:
    print("skipped interop_timm: %s" % missing)
    print("0 passed, 0 failed")
    sys.exit(0)

FOLDER = os.path.join("build", "interop-timm")
SIDE, CLASSES = 12, 3


def idx(name, array):
    with open(os.path.join(FOLDER, name), "wb") as f:
        f.write(struct.pack(">HBB", 0, 8, array.ndim))
        f.write(struct.pack(">%dI" % array.ndim, *array.shape))
        f.write(array.tobytes())


def pictures(rng, n):
    """Noise with a bright stripe where the class says, some labels wrong."""
    labels = rng.randint(0, CLASSES, n).astype(numpy.uint8)
    pixels = rng.randint(0, 120, (n, SIDE, SIDE)).astype(numpy.uint8)
    for i, label in enumerate(labels):
        pixels[i, 3 * label + 1] += 60
    labels[::7] = (labels[::7] + 1) % CLASSES
    return pixels, labels


shutil.rmtree(FOLDER, ignore_errors=True)
os.makedirs(FOLDER)
rng = numpy.random.RandomState(1)
for part, n in (("train", 400), ("t10k", 100)):
    pixels, labels = pictures(rng, n)
    idx(part + "-images-idx3-ubyte", pixels)
    idx(part + "-labels-idx1-ubyte", labels)
out = os.path.join(FOLDER, "run")
subprocess.run([sys.argv[1], "train", "--data", FOLDER, "--classes", str(CLASSES),
                "--out", out, "--patch", "4", "--width", "24", "--heads", "3",
                "--layers", "2", "--steps", "60", "--lr", "3e-3", "--quiet"], check=True)
with open(os.path.join(out, "summary.json")) as f:
    ours = json.load(f)
path = os.path.join(out, "model.safetensors")
with safe_open(path, framework="pt") as f:
    sizes = json.loads(f.metadata()["exf.config"])
model = VisionTransformer(
    img_size=sizes["img_size"], patch_size=sizes["patch_size"],
    in_chans=sizes["in_chans"], num_classes=sizes["num_classes"],
    embed_dim=sizes["embed_dim"], depth=sizes["depth"], num_heads=sizes["num_heads"],
    mlp_ratio=sizes["mlp_ratio"])
model.load_state_dict(load_file(path), strict=True)
x = torch.from_numpy(pixels.astype(numpy.float32))[:, None] / 255
x = (x - float(sizes["mean"])) / float(sizes["std"])
y = torch.from_numpy(labels.astype(numpy.int64))
with torch.no_grad():
    logits = model.eval()(x)
loss = torch.nn.functional.cross_entropy(logits, y).item()
accuracy = (logits.argmax(1) == y).float().mean().item()
print("test loss %.7f, timm %.7f; accuracy %.4f, timm %.4f" %
      (ours["test_loss_merged"], loss, ours["test_accuracy_merged"], accuracy))
ok = abs(loss - ours["test_loss_merged"]) < 1e-5 * loss
ok = ok and abs(accuracy - ours["test_accuracy_merged"]) < 1e-6 and accuracy > 0.5
ok = ok and sum(p.numel() for p in model.parameters()) == ours["params_merged"]
print("1 passed, 0 failed" if ok else "0 passed, 1 failed")
sys.exit(0 if ok else 1)
