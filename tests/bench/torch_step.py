"""The steps of bench.c in plain PyTorch: one line, ms of a step (median) and peak memory.

  python torch_step.py charlm|gpt384|vit|generate [--threads N] [--compile] [--cpu]
  python torch_step.py version

--cpu: processor time instead of the clock (one thread). From 1.13 on; what a newer
version has is used: scaled_dot_product_attention, fused AdamW, torch.compile.
generate: ms of a token, as nanoGPT's sample program does it: no key/value cache, the
context cropped to the block.
"""
import argparse
import inspect
import math
import os
import resource
import statistics
import time

CASES = {  # layers, heads, width, block, batch
    "charlm": (4, 4, 128, 64, 12),
    "charlm8192": (4, 4, 128, 64, 128),
    "gpt384": (6, 6, 384, 256, 8),
    "vit": (4, 4, 64, 50, 128),
    "generate": (4, 4, 128, 64, 1),
}
VOCAB, SIDE, PATCH, CLASSES = 65, 28, 4, 10

arguments = argparse.ArgumentParser()
arguments.add_argument("name", choices=list(CASES) + ["version"])
arguments.add_argument("--threads", type=int, default=1)
arguments.add_argument("--compile", action="store_true")
arguments.add_argument("--cpu", action="store_true")
arguments = arguments.parse_args()
# The BLAS below PyTorch may start threads of its own: it is told before it is loaded.
for variable in "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS":
    os.environ[variable] = str(arguments.threads)

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402


def peak_mb():
    try:
        with open("/proc/self/status") as f:
            for line in f:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Norm(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, width, heads, block, causal, bias):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)
        self.heads, self.causal = heads, causal
        mask = torch.tril(torch.ones(block, block)).view(1, 1, block, block)
        self.register_buffer("mask", mask)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2)
                   for y in self.qkv(x).split(c, dim=2))
        if hasattr(F, "scaled_dot_product_attention"):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            s = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            if self.causal:
                s = s.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
            y = F.softmax(s, dim=-1) @ v
        return self.proj(y.transpose(1, 2).contiguous().view(b, t, c))


class Block(nn.Module):
    def __init__(self, width, heads, block, causal, bias):
        super().__init__()
        self.norm1, self.norm2 = Norm(width, bias), Norm(width, bias)
        self.attn = Attention(width, heads, block, causal, bias)
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.down = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    """A GPT with a tied head, or with vit a vision Transformer."""

    def __init__(self, layers, heads, width, block, vit):
        super().__init__()
        self.vit, self.block = vit, block
        if vit:
            self.patch = nn.Linear(PATCH * PATCH, width)
            self.cls = nn.Parameter(torch.zeros(1, 1, width))
            self.head = nn.Linear(width, CLASSES)
        else:
            self.wte = nn.Embedding(VOCAB, width)
            self.head = nn.Linear(width, VOCAB, bias=False)
            self.head.weight = self.wte.weight
        self.wpe = nn.Embedding(block, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, block, not vit, vit) for _ in range(layers))
        self.norm = Norm(width, vit)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x, labels=None):
        if self.vit:
            x = self.patch(x)
            x = torch.cat((self.cls.expand(x.size(0), 1, -1), x), dim=1)
        else:
            x = self.wte(x)
        x = x + self.wpe(torch.arange(x.size(1)))
        for block in self.blocks:
            x = block(x)
        if self.vit:
            x = x[:, 0]
        elif labels is None:
            x = x[:, [-1]]
        logits = self.head(self.norm(x))
        if labels is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


def optimizer(net):
    matrices = [p for p in net.parameters() if p.dim() > 1]
    vectors = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1},
              {"params": vectors, "weight_decay": 0}]
    settings = dict(lr=1e-3, betas=(0.9, 0.99))
    if "fused" in inspect.signature(torch.optim.AdamW).parameters:
        try:
            return torch.optim.AdamW(groups, fused=True, **settings)
        except RuntimeError:
            pass  # fused on other devices only
    return torch.optim.AdamW(groups, **settings)


def train(name, clock, compiled):
    layers, heads, width, block, batch = CASES[name]
    vit = name == "vit"
    net = Net(layers, heads, width, block, vit)
    optim = optimizer(net)
    forward = torch.compile(net) if compiled else net
    if vit:
        x = torch.rand(batch, (SIDE // PATCH) ** 2, PATCH * PATCH)
        y = torch.randint(CLASSES, (batch,))
    else:
        x, y = torch.randint(VOCAB, (2, batch, block))

    def step():
        loss = forward(x, y)
        optim.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optim.step()
        return loss.item()

    for _ in range(3):
        step()
    times, start = [], clock()
    while len(times) < 3 or clock() - start < 3:
        t = clock()
        step()
        times.append(clock() - t)
    return statistics.median(times)


@torch.no_grad()
def generate(clock, compiled):
    layers, heads, width, block, _ = CASES["generate"]
    net = Net(layers, heads, width, block, False).eval()
    forward = torch.compile(net) if compiled else net
    ids = torch.zeros((1, 1), dtype=torch.long)

    def tokens(ids, n):
        for _ in range(n):
            logits = forward(ids[:, -block:])[:, -1, :] / 0.8
            v, _ = torch.topk(logits, min(200, logits.size(-1)))
            logits[logits < v[:, [-1]]] = -float("inf")
            p = F.softmax(logits, dim=-1)
            ids = torch.cat((ids, torch.multinomial(p, num_samples=1)), dim=1)
        return ids

    ids = tokens(ids, 100)
    start = clock()
    tokens(ids, 500)
    return (clock() - start) / 500


def main():
    a = arguments
    if a.name == "version":
        print(torch.__version__)
        return
    torch.set_num_threads(a.threads)
    torch.manual_seed(1)
    clock = time.process_time if a.cpu else time.perf_counter
    idle = peak_mb()
    s = (generate(clock, a.compile) if a.name == "generate"
         else train(a.name, clock, a.compile))
    print("ms=%.4f peak_mb=%.1f" % (1e3 * s, peak_mb() - idle))


main()
