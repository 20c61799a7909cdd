/* tests/tiny_gpt.h - a small GPT, as the tests need it, and one way to train it.
   The caller includes exfusion.h and test.h first. */
#ifndef TINY_GPT_H
#define TINY_GPT_H

#include <stdlib.h>

#define TINY_MAX_LAYERS 4
#ifndef TEST_TMP
#define TEST_TMP "build/tmp"   /* exists when `make test` runs the programs */
#endif

typedef struct tiny_desc {
  size_t layers, heads, width, hidden, block, vocab;
  int bias;
  double dropout, init_std;
  exf_act act;
  exf_fusion_desc fusion;
} tiny_desc;

typedef struct tiny_gpt {
  tiny_desc d;
  exf_model *model;
  exf_tensor *wte, *wpe;     /* (vocab,width), (block,width) */
  exf_block *block[TINY_MAX_LAYERS];
  exf_norm_layer *ln_f;
} tiny_gpt;

static TEST_UNUSED tiny_desc tiny_defaults(void) {
  tiny_desc d;
  memset(&d, 0, sizeof d);
  d.layers = 2;
  d.heads = 2;
  d.width = 16;
  d.hidden = 32;
  d.block = 8;
  d.vocab = 11;
  d.init_std = 0.1;
  return d;
}

static TEST_UNUSED tiny_gpt tiny_new(exf_ctx *ctx, const tiny_desc *desc) {
  tiny_gpt g;
  exf_block_desc b;
  exf_norm_desc norm = {0, 0, 0};
  char name[64];
  size_t i;
  memset(&g, 0, sizeof g);
  memset(&b, 0, sizeof b);
  g.d = *desc;
  g.model = exf_model_new(ctx);
  g.wte = exf_embedding_new(g.model, "transformer.wte", g.d.vocab, g.d.width,
                            g.d.init_std);
  g.wpe = exf_embedding_new(g.model, "transformer.wpe", g.d.block, g.d.width,
                            g.d.init_std);
  b.width = g.d.width;
  b.n_heads = g.d.heads;
  b.causal = 1;
  b.bias = g.d.bias;
  b.dropout = g.d.dropout;
  b.init_std = g.d.init_std;
  b.ffn.hidden = g.d.hidden;
  b.ffn.act = g.d.act;
  b.ffn.fusion = g.d.fusion;
  for (i = 0; i < g.d.layers; i++) {
    snprintf(name, sizeof name, "transformer.h.%d", (int)i);
    g.block[i] = exf_block_new(g.model, name, &b);
  }
  norm.bias = g.d.bias;
  g.ln_f = exf_norm_new(g.model, "transformer.ln_f", g.d.width, &norm);
  exf_param_alias(g.model, "lm_head.weight", "transformer.wte.weight");
  return g;
}

/* ids (B,T) -> logits (B,T,vocab) */
static TEST_UNUSED exf_tensor *tiny_logits(exf_ctx *ctx, const tiny_gpt *g,
                                           const int32_t *ids, size_t B, size_t T) {
  int32_t pos[64];
  exf_tensor *x;
  size_t i;
  for (i = 0; i < T && i < 64; i++) pos[i] = (int32_t)i;
  x = exf_add(ctx, exf_embedding(ctx, g->wte, ids, B, T),
              exf_embedding(ctx, g->wpe, pos, T, 0));
  x = exf_dropout(ctx, x, g->d.dropout);
  for (i = 0; i < g->d.layers; i++) x = exf_block_forward(ctx, g->block[i], x, NULL);
  x = exf_norm_forward(ctx, g->ln_f, x);
  return exf_linear(ctx, x, g->wte, NULL);
}

static TEST_UNUSED exf_tensor *tiny_loss(exf_ctx *ctx, const tiny_gpt *g,
                                         const int32_t *ids, const int32_t *labels,
                                         size_t B, size_t T) {
  return exf_cross_entropy(ctx, tiny_logits(ctx, g, ids, B, T), labels, 0);
}

/* Batch `step` of an endless text in which the next token follows from the last one most
   of the time: ids and labels (B,T). */
static TEST_UNUSED void tiny_batch(const tiny_gpt *g, uint64_t step, size_t B, size_t T,
                                   int32_t *ids, int32_t *labels) {
  size_t b, t;
  for (b = 0; b < B; b++) {
    uint64_t at = (step * B + b) * (T + 1);
    int32_t now = (int32_t)(exf_rng_u32(99, 1, 0, at) % g->d.vocab);
    for (t = 0; t < T; t++) {
      uint32_t r = exf_rng_u32(99, 1, 0, at + t + 1);
      ids[b * T + t] = now;
      now = (r & 3) ? (int32_t)(((size_t)now * 3 + 1) % g->d.vocab)
                    : (int32_t)(r % g->d.vocab);
      labels[b * T + t] = now;
    }
  }
}

static TEST_UNUSED exf_optim *tiny_adamw(exf_model *model) {
  exf_optim_desc o;
  memset(&o, 0, sizeof o);
  o.beta2 = 0.99;
  o.weight_decay = 0.1;
  o.clip = 1;
  return exf_optim_new(model, &o);
}

/* Steps from .. from + n - 1 of 4 windows of block tokens; the loss of the last. */
static TEST_UNUSED double tiny_train(exf_ctx *ctx, const tiny_gpt *g, exf_optim *optim,
                                     uint64_t from, uint64_t n, double lr) {
  int32_t ids[4 * 64], labels[4 * 64];
  double loss = -1;
  uint64_t s;
  int before = exf_training_set(ctx, 1);
  for (s = from; s < from + n; s++) {
    exf_tensor *l;
    exf_step_begin(ctx, s);
    tiny_batch(g, s, 4, g->d.block, ids, labels);
    l = tiny_loss(ctx, g, ids, labels, 4, g->d.block);
    loss = exf_item(l);
    exf_backward(ctx, l);
    exf_optim_step(optim, lr, NULL);
    exf_rewind(ctx);
  }
  exf_training_set(ctx, before);
  return loss;
}

/* Evaluation logits of one fixed batch of 2 windows, copied to a block to be freed. */
static TEST_UNUSED exf_real *tiny_eval(exf_ctx *ctx, const tiny_gpt *g, size_t *n) {
  int32_t ids[2 * 64], labels[2 * 64];
  exf_real *copy = NULL;
  exf_tensor *y;
  int train = exf_training_set(ctx, 0), grad = exf_grad_set(ctx, 0);
  tiny_batch(g, 1000, 2, g->d.block, ids, labels);
  y = tiny_logits(ctx, g, ids, 2, g->d.block);
  *n = 0;
  if (y != NULL) {
    copy = (exf_real *)malloc(y->size * sizeof *copy);
    if (copy != NULL) {
      memcpy(copy, y->data, y->size * sizeof *copy);
      *n = y->size;
    }
  }
  exf_rewind(ctx);
  exf_grad_set(ctx, grad);
  exf_training_set(ctx, train);
  return copy;
}

static TEST_UNUSED int same_bits(const exf_real *a, const exf_real *b, size_t n) {
  return a != NULL && b != NULL && n > 0 && memcmp(a, b, n * sizeof *a) == 0;
}

static TEST_UNUSED double max_diff(const exf_real *a, const exf_real *b, size_t n) {
  double worst = 0;
  size_t i;
  if (a == NULL || b == NULL || n == 0) return 1e300;
  for (i = 0; i < n; i++) {
    double d = fabs((double)a[i] - (double)b[i]);
    if (!(d <= worst)) worst = d;
  }
  return worst;
}

/* Every parameter of the one equals that of the other, bit for bit. */
static TEST_UNUSED int same_params(const exf_model *a, const exf_model *b) {
  size_t i, n = exf_model_n_params(a);
  if (n == 0 || n != exf_model_n_params(b)) return 0;
  for (i = 0; i < n; i++) {
    const exf_tensor *x = &exf_model_param(a, i)->tensor;
    const exf_tensor *y = &exf_model_param(b, i)->tensor;
    if (x->size != y->size || !same_bits(x->data, y->data, x->size)) {
      printf("  %s differs\n", exf_model_param(a, i)->name);
      return 0;
    }
  }
  return 1;
}

#define TINY_N_VARIANTS 7
/* 0 dense, 1 sw, 2 dw raw, 3 dw softmax, 4 mb, 5 mb attached, 6 mb routed attached */
static TEST_UNUSED const char *const tiny_variant_names[TINY_N_VARIANTS] = {
  "dense", "sw", "dw raw", "dw softmax", "mb", "mb attached", "mb routed attached"
};
static TEST_UNUSED exf_fusion_desc tiny_variant(int i, size_t n_experts) {
  exf_fusion_desc f;
  memset(&f, 0, sizeof f);
  f.n_experts = n_experts;
  f.variant = i == 0 ? EXF_DENSE : i == 1 ? EXF_SW : i <= 3 ? EXF_DW : EXF_MB;
  f.dw_softmax = i == 3;
  f.attach = i >= 5;
  f.routed = i == 6;
  return f;
}

#endif /* TINY_GPT_H */
