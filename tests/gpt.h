/* tests/gpt.h - the small GPT of tiny_gpt.h in a context of its own, for runs that are
   compared with each other or with PyTorch. Include after exfusion.h and test.h. */
#ifndef GPT_H
#define GPT_H

#include "tiny_gpt.h"

typedef struct gpt_desc {
  size_t layers, heads, width, block, vocab;
  int bias;
  exf_act act;
  exf_fusion_desc fusion;
} gpt_desc;

typedef struct gpt {
  exf_ctx *ctx;
  exf_model *model;
  gpt_desc desc;
  tiny_gpt net;
} gpt;

/* 2 layers, 2 heads, width 16, block 8, vocabulary 11: the size of the golden runs. */
static TEST_UNUSED gpt_desc gpt_desc_small(int bias) {
  gpt_desc desc;
  memset(&desc, 0, sizeof desc);
  desc.layers = 2;
  desc.heads = 2;
  desc.width = 16;
  desc.block = 8;
  desc.vocab = 11;
  desc.bias = bias;
  return desc;
}

/* N experts of one variant; the rest are defaults. N = 0: an ordinary dense FFN. */
static TEST_UNUSED exf_fusion_desc gpt_fusion(exf_variant variant, size_t n) {
  exf_fusion_desc fusion;
  memset(&fusion, 0, sizeof fusion);
  fusion.variant = n ? variant : EXF_DENSE;
  fusion.n_experts = n;
  return fusion;
}

/* A model in a context of its own. Returns 0 and prints the error when it fails. */
static TEST_UNUSED int gpt_new(gpt *g, const gpt_desc *desc, exf_isa isa) {
  exf_desc ctx_desc;
  tiny_desc d;
  memset(g, 0, sizeof *g);
  memset(&ctx_desc, 0, sizeof ctx_desc);
  memset(&d, 0, sizeof d);
  ctx_desc.seed = 7;
  ctx_desc.n_threads = 2;
  ctx_desc.isa = isa;
  d.layers = desc->layers;
  d.heads = desc->heads;
  d.width = desc->width;
  d.block = desc->block;
  d.vocab = desc->vocab;
  d.bias = desc->bias;
  d.init_std = 0.2;
  d.act = desc->act;
  d.fusion = desc->fusion;
  g->desc = *desc;
  g->ctx = exf_ctx_new(&ctx_desc);
  g->net = tiny_new(g->ctx, &d);
  g->model = g->net.model;
  if (exf_ctx_status(g->ctx) != EXF_OK) printf("  error: %s\n", exf_error(g->ctx));
  return g->ctx != NULL && exf_ctx_status(g->ctx) == EXF_OK;
}

static TEST_UNUSED void gpt_free(gpt *g) {
  exf_model_free(g->model);
  exf_ctx_free(g->ctx);
}

/* ids (rows, block) -> logits (rows, block, V) */
static TEST_UNUSED exf_tensor *gpt_logits(const gpt *g, const int32_t *ids, size_t rows) {
  return tiny_logits(g->ctx, &g->net, ids, rows, g->desc.block);
}

/* Adds the gradient of scale times the mean loss over tokens (rows, block + 1), where
   every token is the target of the one before it. Returns the loss, not scaled. */
static TEST_UNUSED double gpt_backward(gpt *g, const int32_t *tokens, size_t rows,
                                       double scale) {
  int32_t ids[512], targets[512];
  size_t r, t, block = g->desc.block;
  exf_tensor *loss;
  double value;
  if (!CHECK(rows * block <= 512)) return 0.0;
  for (r = 0; r < rows; r++) {
    for (t = 0; t < block; t++) {
      ids[r * block + t] = tokens[r * (block + 1) + t];
      targets[r * block + t] = tokens[r * (block + 1) + t + 1];
    }
  }
  exf_training_set(g->ctx, 1);
  loss = exf_cross_entropy(g->ctx, gpt_logits(g, ids, rows), targets, 0.0);
  value = exf_item(loss);
  exf_backward(g->ctx, scale == 1.0 ? loss : exf_scale(g->ctx, loss, scale));
  exf_rewind(g->ctx);
  return value;
}

/* Evaluation logits (rows, block, V) of ids, copied to out. */
static TEST_UNUSED void gpt_evaluate(gpt *g, const int32_t *ids, size_t rows,
                                     exf_real *out) {
  size_t n = rows * g->desc.block * g->desc.vocab;
  exf_tensor *logits;
  int grad = exf_grad_set(g->ctx, 0);
  exf_training_set(g->ctx, 0);
  logits = gpt_logits(g, ids, rows);
  if (CHECK(logits != NULL && logits->size == n))
    memcpy(out, logits->data, n * sizeof *out);
  exf_rewind(g->ctx);
  exf_grad_set(g->ctx, grad);
}

/* The same tokens (n) in every program that asks for the same step. */
static TEST_UNUSED void gpt_tokens(const gpt *g, uint32_t step, int32_t *tokens,
                                   size_t n) {
  size_t i;
  for (i = 0; i < n; i++)
    tokens[i] = (int32_t)(exf_rng_u32(1234, 99, step, i) % (uint32_t)g->desc.vocab);
}

#endif /* GPT_H */
