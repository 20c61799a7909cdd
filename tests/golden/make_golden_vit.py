"""Golden numbers for tests/test_vit_golden.c and tests/test_images.c.

    python make_golden_vit.py        writes vit-*.safetensors and idx-*.gz beside itself

Made with torch 2.13.0, numpy 2.4 and safetensors 0.8, in float64. The C tests need none
of them.

The model is a ViT of 2 layers, 2 heads, width 8, patch 4 on pictures of 3 x 12 x 12 with
5 classes, written out from plain PyTorch functions with timm's names: convolution of the
normalised pixels, class token in front, learned positions, pre-norm blocks with exact
GELU and LayerNorm eps 1e-6, head on the class token; label smoothing 0.1. Its numbers are
small enough for the eps to be seen. Its FFNs are dense, or hold 3 experts with a memory
bank; the last FFN sees the class tokens only.

vit-dense, vit-mb: every parameter (and bank) under its name; pixels [4,3,12,12] 0 to 255,
labels [4], mean [3], std [3]; logits [4,5], loss [1] (F64); grad.<name> of each
parameter.
idx-stored, idx-fixed, idx-dynamic: an IDX file of 40 pictures of 8 x 8, byte i being
(i * i / 7 + i / 64) mod 23, in gzip with blocks of each kind.
"""

import os
import struct
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

LAYERS, HEADS, WIDTH, SIZE, PATCH, CLASSES, BATCH, EXPERTS = 2, 2, 8, 12, 4, 5, 4, 3
MU, EPS, SMOOTHING = 0.95, 1e-6, 0.1
MEAN, STD = [0.45, 0.30, 0.60], [0.25, 0.20, 0.35]
FFN_TENSORS = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
FOLDER = os.path.dirname(os.path.abspath(__file__))


def initial_values(experts):
    rng = np.random.RandomState(20260328)
    values = {}

    def normal(name, shape, std=0.2, mean=0.0):
        values[name] = (mean + std * rng.randn(*shape)).astype(np.float32)

    normal("cls_token", [1, 1, WIDTH], 0.1)
    normal("pos_embed", [1, (SIZE // PATCH) ** 2 + 1, WIDTH], 0.1)
    normal("patch_embed.proj.weight", [WIDTH, 3, PATCH, PATCH], 0.02)
    normal("patch_embed.proj.bias", [WIDTH], 0.05)
    for i in range(LAYERS):
        block = f"blocks.{i}."
        for norm in ("norm1", "norm2"):
            normal(block + norm + ".weight", [WIDTH], 0.1, 0.7)
            normal(block + norm + ".bias", [WIDTH], 0.1)
        for name, out in (("attn.qkv", 3 * WIDTH), ("attn.proj", WIDTH)):
            normal(block + name + ".weight", [out, WIDTH])
            normal(block + name + ".bias", [out], 0.1)
        lead = [EXPERTS] if experts else []
        prefix = block + ("mlp.experts." if experts else "mlp.")
        for name, out, inp in (("fc1", 4 * WIDTH, WIDTH), ("fc2", WIDTH, 4 * WIDTH)):
            normal(prefix + name + ".weight", lead + [out, inp])
            normal(prefix + name + ".bias", lead + [out], 0.1)
        if experts:
            normal(block + "mlp.router.weight", [EXPERTS, WIDTH])
            normal(block + "mlp.router.bias", [EXPERTS])
            bank = [[0.40, 0.35, 0.25], [0.20, 0.45, 0.35]][i]
            values[block + "mlp.bank"] = np.array(bank, np.float32)
    normal("norm.weight", [WIDTH], 0.1, 0.7)
    normal("norm.bias", [WIDTH], 0.1)
    normal("head.weight", [CLASSES, WIDTH], 0.5)
    normal("head.bias", [CLASSES], 0.1)
    pixels = rng.randint(0, 256, [BATCH, 3, SIZE, SIZE])
    labels = rng.randint(0, CLASSES, [BATCH])
    return values, pixels, labels


class Vit:
    def __init__(self, experts):
        values, self.pixels, self.labels = initial_values(experts)
        self.experts, self.values, self.p = experts, values, {}
        for name, value in values.items():
            tensor = torch.tensor(value, dtype=torch.float64)
            self.p[name] = tensor if name.endswith(".bank") else tensor.requires_grad_()

    def linear(self, x, name):
        return F.linear(x, self.p[name + ".weight"], self.p[name + ".bias"])

    def norm(self, x, name):
        return F.layer_norm(x, [WIDTH], self.p[name + ".weight"], self.p[name + ".bias"],
                            EPS)

    def attention(self, x, name):
        rows, length, _ = x.shape
        q, k, v = [part.view(rows, length, HEADS, WIDTH // HEADS).transpose(1, 2)
                   for part in self.linear(x, name + ".qkv").split(WIDTH, dim=2)]
        y = F.scaled_dot_product_attention(q, k, v)
        return self.linear(y.transpose(1, 2).reshape(rows, length, WIDTH), name + ".proj")

    def ffn(self, x, name):
        if not self.experts:
            return self.linear(F.gelu(self.linear(x, name + ".fc1")), name + ".fc2")
        u = x.detach().mean(dim=(0, 1))
        r = self.linear(u, name + ".router").softmax(0)
        a = MU * self.p[name + ".bank"] + (1 - MU) * r
        w1, b1, w2, b2 = [torch.tensordot(a, self.p[f"{name}.experts.{key}"], dims=1)
                          for key in FFN_TENSORS]
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    def logits(self):
        mean, std = torch.tensor([MEAN, STD], dtype=torch.float64).view(2, 1, 3, 1, 1)
        x = (torch.tensor(self.pixels).double() / 255 - mean) / std
        proj = "patch_embed.proj."
        x = F.conv2d(x, self.p[proj + "weight"], self.p[proj + "bias"], stride=PATCH)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.p["cls_token"].expand(BATCH, 1, WIDTH), x], dim=1)
        x = x + self.p["pos_embed"]
        for i in range(LAYERS):
            block = f"blocks.{i}."
            x = x + self.attention(self.norm(x, block + "norm1"), block + "attn")
            if i == LAYERS - 1:
                x = x[:, :1]
            x = x + self.ffn(self.norm(x, block + "norm2"), block + "mlp")
        return self.linear(self.norm(x[:, 0], "norm"), "head")

    def write(self, path):
        logits = self.logits()
        loss = F.cross_entropy(logits, torch.tensor(self.labels),
                               label_smoothing=SMOOTHING)
        loss.backward()
        tensors = dict(self.values)
        for name, p in self.p.items():
            if p.requires_grad:
                tensors["grad." + name] = p.grad.numpy().astype(np.float32)
        tensors.update({"pixels": self.pixels.astype(np.float32),
                        "labels": self.labels.astype(np.float32),
                        "mean": np.array(MEAN),
                        "std": np.array(STD),
                        "logits": logits.detach().numpy(),
                        "loss": np.array([loss.item()])})
        save_file(tensors, path)
        print(f"{os.path.basename(path)}: loss {loss.item():.6f}, {len(tensors)} tensors")


def write_gzip(path, data, level, strategy):
    pack = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
    with open(path, "wb") as f:
        f.write(b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"name\0")
        f.write(pack.compress(data) + pack.flush())
        f.write(struct.pack("<II", zlib.crc32(data), len(data)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    Vit(False).write(os.path.join(FOLDER, "vit-dense.safetensors"))
    Vit(True).write(os.path.join(FOLDER, "vit-mb.safetensors"))
    data = struct.pack(">IIII", 0x803, 40, 8, 8)
    data += bytes((i * i // 7 + i // 64) % 23 for i in range(40 * 64))
    write_gzip(os.path.join(FOLDER, "idx-stored.gz"), data, 0, zlib.Z_DEFAULT_STRATEGY)
    write_gzip(os.path.join(FOLDER, "idx-fixed.gz"), data, 9, zlib.Z_FIXED)
    write_gzip(os.path.join(FOLDER, "idx-dynamic.gz"), data, 9, zlib.Z_DEFAULT_STRATEGY)
