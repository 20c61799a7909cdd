"""Golden numbers for tests/test_golden.c, from PyTorch in float64.

    python make_golden.py             writes the *.safetensors files beside this script
    python make_golden.py --float32   writes nothing: runs again in float32 and prints how
                                      far rounding alone takes every run from its float64
                                      numbers, beside the tolerances of the C test

Made with torch 2.13.0, numpy 2.4 and safetensors 0.8. The C test needs none of them.

The model is a GPT of 2 layers, 2 heads, width 16, block 8, vocabulary 11, with exact
GELU, LayerNorm eps 1e-5 and a tied head. Its FFNs are dense or hold N = 3 experts:

    dense, sw, dw-raw, dw-softmax, mb, mb-routed   each with biases, and -nobias without
    mb-accum, mb-routed-accum                      with biases and 2 micro-batches

Each run takes 20 steps of torch.optim.AdamW (betas 0.9 and 0.99, eps 1e-8, decay 0.1 on
matrices and embeddings only; 5 warm-up steps to 1e-3, cosine to 1e-4), clipped to the
fused norm 1.0, which some steps exceed and others do not. All runs start from the same
numbers; what a program would start at 1, 0 or 1/N is uneven here, so that no term of a
gradient is hidden by symmetry.

Files (matrices are [out, in], names are those of the library's checkpoints):
    init.safetensors   F32: tokens [20 steps, 2 micro-batches, 3 rows, 8 + 1], of which a
                       run without accumulation uses micro-batch 0, and every initial
                       value: of the dense FFN, of the experts, of all the weights
    <run>.safetensors  F64: loss [20] (mean over micro-batches), norm [20] (before
                       clipping); F32: delta.<name>, the final minus the initial value of
                       each parameter and bank
"""

import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

LAYERS, HEADS, WIDTH, BLOCK, VOCAB, BATCH, EXPERTS = 2, 2, 16, 8, 11, 3, 3
STEPS, WARMUP, LR, MIN_LR, DECAY, CLIP = 20, 5, 1e-3, 1e-4, 0.1, 1.0
MU, TAU, LN_EPS = 0.95, 1.0, 1e-5
FFN_TENSORS = ["c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"]


def initial_values():
    """Every value any run starts from, by name, already rounded to float32."""
    rng = np.random.RandomState(20260327)
    values = {}

    def normal(name, shape, std, mean=0.0):
        values[name] = (mean + std * rng.randn(*shape)).astype(np.float32)

    def norm_layer(name):
        normal(name + ".weight", [WIDTH], 0.1, 0.7)
        normal(name + ".bias", [WIDTH], 0.1)

    def linear(name, out, inp, std=0.2, sets=None):
        lead = [] if sets is None else [sets]
        normal(name + ".weight", lead + [out, inp], std)
        normal(name + ".bias", lead + [out], std / 2)

    normal("transformer.wte.weight", [VOCAB, WIDTH], 0.1)
    normal("transformer.wpe.weight", [BLOCK, WIDTH], 0.2)
    for i in range(LAYERS):
        block = f"transformer.h.{i}."
        norm_layer(block + "ln_1")
        linear(block + "attn.c_attn", 3 * WIDTH, WIDTH)
        linear(block + "attn.c_proj", WIDTH, WIDTH)
        norm_layer(block + "ln_2")
        linear(block + "mlp.c_fc", 4 * WIDTH, WIDTH)
        linear(block + "mlp.c_proj", WIDTH, 4 * WIDTH)
        std = 0.2 * math.sqrt(EXPERTS)
        linear(block + "mlp.experts.c_fc", 4 * WIDTH, WIDTH, std, EXPERTS)
        linear(block + "mlp.experts.c_proj", WIDTH, 4 * WIDTH, std, EXPERTS)
        linear(block + "mlp.router", EXPERTS, WIDTH)
        fusion = [[0.45, 0.30, 0.20], [0.25, 0.35, 0.50]][i]
        bank = [[0.40, 0.35, 0.25], [0.20, 0.45, 0.35]][i]
        values[block + "mlp.fusion.weight"] = np.array(fusion, np.float32)
        values[block + "mlp.bank"] = np.array(bank, np.float32)
    norm_layer("transformer.ln_f")
    tokens = rng.randint(0, VOCAB, [STEPS, 2, BATCH, BLOCK + 1])
    return values, tokens


def belongs(name, variant, biases):
    """Whether the model of this variant has the tensor."""
    if ".router." in name:
        return variant.startswith("mb")
    if name.endswith(".bank"):
        return variant.startswith("mb")
    if ".fusion." in name:
        return variant.startswith("dw")
    if name.endswith(".bias") and not biases:
        return False
    if ".mlp.experts." in name:
        return variant != "dense"
    if ".mlp." in name:
        return variant == "dense"
    return True


class Run:
    def __init__(self, variant, biases, micro_batches, dtype):
        values, self.tokens = initial_values()
        self.variant, self.micro_batches, self.dtype = variant, micro_batches, dtype
        self.params, self.banks = {}, {}
        for name, value in values.items():
            if belongs(name, variant, biases):
                tensor = torch.tensor(value, dtype=dtype)
                if name.endswith(".bank"):
                    self.banks[name] = tensor
                else:
                    self.params[name] = tensor.requires_grad_()
        self.initial = {k: v.detach().clone() for k, v in self.state().items()}
        self.fused = {}    # FFN name -> list over micro-batches of its fused tensors
        self.weights = {}  # FFN name -> list over micro-batches of a (fusion weights)
        self.routed = {}   # FFN name -> list over micro-batches of r (router output)

    def state(self):
        return {**self.params, **self.banks}

    # ---- forward ----

    def linear(self, x, name):
        return F.linear(x, self.params[name + ".weight"], self.params.get(name + ".bias"))

    def layernorm(self, x, name):
        return F.layer_norm(x, [WIDTH], self.params[name + ".weight"],
                            self.params.get(name + ".bias"), LN_EPS)

    def attention(self, x, name):
        rows, length, _ = x.shape
        q, k, v = [part.view(rows, length, HEADS, WIDTH // HEADS).transpose(1, 2)
                   for part in self.linear(x, name + ".c_attn").split(WIDTH, dim=2)]
        scores = q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        y = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return self.linear(y.transpose(1, 2).reshape(rows, length, WIDTH),
                           name + ".c_proj")

    def fusion_weights(self, x, name):
        """a of one FFN, for this forward pass."""
        if self.variant == "sw":
            return torch.full([EXPERTS], 1.0 / EXPERTS, dtype=self.dtype)
        if self.variant == "dw-raw":
            return self.params[name + ".fusion.weight"]
        if self.variant == "dw-softmax":
            return (self.params[name + ".fusion.weight"] / TAU).softmax(0)
        u = x.detach().mean(dim=(0, 1))
        r = (self.linear(u, name + ".router") / TAU).softmax(0)
        self.routed[name].append(r.detach())
        if self.variant == "mb-routed":
            return r
        return MU * self.banks[name + ".bank"] + (1 - MU) * r

    def ffn(self, x, name):
        if self.variant == "dense":
            return self.linear(F.gelu(self.linear(x, name + ".c_fc")), name + ".c_proj")
        a = self.fusion_weights(x, name)
        th = {}
        for key in FFN_TENSORS:
            experts = self.params.get(name + ".experts." + key)
            if experts is not None:
                th[key] = torch.tensordot(a, experts, dims=1)
                th[key].retain_grad()
        self.weights[name].append(a.detach())
        self.fused[name].append(th)
        h = F.gelu(F.linear(x, th["c_fc.weight"], th.get("c_fc.bias")))
        return F.linear(h, th["c_proj.weight"], th.get("c_proj.bias"))

    def loss(self, tokens):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        wte = self.params["transformer.wte.weight"]
        x = F.embedding(inputs, wte) + self.params["transformer.wpe.weight"]
        for i in range(LAYERS):
            block = f"transformer.h.{i}."
            x = x + self.attention(self.layernorm(x, block + "ln_1"), block + "attn")
            x = x + self.ffn(self.layernorm(x, block + "ln_2"), block + "mlp")
        logits = self.layernorm(x, "transformer.ln_f") @ wte.T
        return F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))

    # ---- one optimizer step ----

    def gradients(self, step):
        """Leaves the gradients in .grad; returns (mean loss, fused norm)."""
        ffns = [] if self.variant == "dense" else \
            [f"transformer.h.{i}.mlp" for i in range(LAYERS)]
        for store in (self.fused, self.weights, self.routed):
            store.update({name: [] for name in ffns})
        total = 0.0
        for k in range(self.micro_batches):
            tokens = torch.tensor(self.tokens[step, k])
            loss = self.loss(tokens) / self.micro_batches
            loss.backward()
            total += loss.item()

        # The norm counts every trained tensor once, an FFN by its fused gradient G.
        square = sum(p.grad.square().sum() for name, p in self.params.items()
                     if ".experts." not in name)
        for name in ffns:
            a_mean = torch.stack(self.weights[name]).mean(0)
            for key in self.fused[name][0]:
                g = sum(th[key].grad for th in self.fused[name])
                square = square + g.square().sum()
                # Experts receive mean(a)_i sum_k G_k: what autograd has just found when
                # there is one micro-batch or a does not change between them.
                experts = self.params[f"{name}.experts.{key}"]
                virtual = torch.tensordot(a_mean, g, dims=0)
                if self.micro_batches == 1:
                    assert torch.allclose(virtual, experts.grad, rtol=1e-4, atol=1e-7)
                experts.grad = virtual
        return total, math.sqrt(square.item())

    def update_banks(self):
        for name, bank in self.banks.items():
            ffn = name.removesuffix(".bank")
            if self.variant == "mb-routed":
                r_mean = torch.stack(self.routed[ffn]).mean(0)
                self.banks[name] = MU * bank + (1 - MU) * r_mean
            else:
                self.banks[name] = torch.stack(self.weights[ffn]).mean(0)

    def train(self):
        decayed, plain = [], []
        for name, p in self.params.items():
            matrix = name.endswith(".weight") and ".ln_" not in name \
                and ".fusion." not in name and ".router." not in name
            (decayed if matrix else plain).append(p)
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": DECAY},
             {"params": plain, "weight_decay": 0.0}], lr=LR, betas=(0.9, 0.99), eps=1e-8)
        losses, norms = [], []
        for step in range(STEPS):
            loss, norm = self.gradients(step)
            losses.append(loss)
            norms.append(norm)
            scale = min(1.0, CLIP / (norm + 1e-6))
            for p in self.params.values():
                p.grad *= scale
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            optimizer.step()
            self.update_banks()
            optimizer.zero_grad()
        delta = {k: (v.detach() - self.initial[k]).double().numpy()
                 for k, v in self.state().items()}
        return np.array(losses), np.array(norms), delta


def learning_rate(step):
    if step < WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    phase = math.pi * (step - WARMUP) / max(1, STEPS - WARMUP)
    return MIN_LR + (LR - MIN_LR) / 2 * (1 + math.cos(phase))


VARIANTS = ["dense", "sw", "dw-raw", "dw-softmax", "mb", "mb-routed"]
RUNS = {}  # name -> variant, biases, micro-batches
for _variant in VARIANTS:
    RUNS[_variant] = (_variant, True, 1)
    RUNS[_variant + "-nobias"] = (_variant, False, 1)
RUNS["mb-accum"] = ("mb", True, 2)
RUNS["mb-routed-accum"] = ("mb-routed", True, 2)


def write_all(folder):
    values, tokens = initial_values()
    save_file({**values, "tokens": tokens.astype(np.float32)},
              os.path.join(folder, "init.safetensors"))
    for name, (variant, biases, micro_batches) in RUNS.items():
        losses, norms, delta = Run(variant, biases, micro_batches, torch.float64).train()
        tensors = {"delta." + k: v.astype(np.float32) for k, v in delta.items()}
        tensors.update({"loss": losses, "norm": norms})
        save_file(tensors, os.path.join(folder, name + ".safetensors"))
        print(f"{name:20s} loss {losses[0]:.6f} -> {losses[-1]:.6f}   norm"
              f" {norms.min():.4f} .. {norms.max():.4f}, clipped"
              f" {(norms > CLIP).sum()} of {STEPS}   smallest move"
              f" {min(np.linalg.norm(d) for d in delta.values()):.2e}")


def compare_float32():
    print("float32 beside float64: loss (1e-5), norm (1e-6), worst parameter (1e-4)")
    for name, (variant, biases, micro_batches) in RUNS.items():
        exact = Run(variant, biases, micro_batches, torch.float64).train()
        single = Run(variant, biases, micro_batches, torch.float32).train()
        ratio = {}
        for key, d in exact[2].items():
            e = single[2][key]
            if key.endswith("c_attn.bias"):  # its middle third: see the C test
                ratio[key + " [K]"] = np.linalg.norm(e[WIDTH:2 * WIDTH])
                d, e = np.delete(d, slice(WIDTH, 2 * WIDTH)), \
                    np.delete(e, slice(WIDTH, 2 * WIDTH))
            ratio[key] = np.linalg.norm(e - d) / np.linalg.norm(d)
        worst = sorted(ratio, key=ratio.get)[-3:]
        print(f"{name:20s} {np.abs(single[0] - exact[0]).max():.1e}"
              f" {np.abs(single[1] / exact[1] - 1).max():.1e} "
              + "; ".join(f"{ratio[k]:.1e} {k.removeprefix('transformer.')}"
                          for k in reversed(worst)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["--float32"]:
        compare_float32()
    elif not sys.argv[1:]:
        write_all(os.path.dirname(os.path.abspath(__file__)))
    else:
        sys.exit(__doc__)
