/* tests/gpt.h - the small GPT that several tests train.
   Include after exfusion.h and test.h. Names and op order are those of nanoGPT. */
#ifndef GPT_H
#define GPT_H

#define GPT_MAX_LAYERS 4
#define GPT_MAX_BLOCK 64

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
  exf_tensor *wte, *wpe;       /* (V,C) (T,C) */
  exf_block *blocks[GPT_MAX_LAYERS];
  exf_norm_layer *norm;
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
  exf_block_desc block;
  char name[64];
  size_t i;
  memset(g, 0, sizeof *g);
  memset(&ctx_desc, 0, sizeof ctx_desc);
  memset(&block, 0, sizeof block);
  ctx_desc.seed = 7;
  ctx_desc.n_threads = 2;
  ctx_desc.isa = isa;
  g->desc = *desc;
  g->ctx = exf_ctx_new(&ctx_desc);
  g->model = exf_model_new(g->ctx);
  g->wte = exf_embedding_new(g->model, "transformer.wte", desc->vocab, desc->width, 0.1);
  g->wpe = exf_embedding_new(g->model, "transformer.wpe", desc->block, desc->width, 0.2);
  exf_param_alias(g->model, "lm_head.weight", "transformer.wte.weight");
  block.width = desc->width;
  block.n_heads = desc->heads;
  block.causal = 1;
  block.bias = desc->bias;
  block.init_std = 0.2;
  block.ffn.act = desc->act;
  block.ffn.fusion = desc->fusion;
  for (i = 0; i < desc->layers; i++) {
    snprintf(name, sizeof name, "transformer.h.%d", (int)i);
    g->blocks[i] = exf_block_new(g->model, name, &block);
  }
  g->norm = exf_layernorm_new(g->model, "transformer.ln_f", desc->width, desc->bias,
                              1e-5);
  if (exf_ctx_status(g->ctx) != EXF_OK) printf("  error: %s\n", exf_error(g->ctx));
  return g->ctx != NULL && exf_ctx_status(g->ctx) == EXF_OK;
}

static TEST_UNUSED void gpt_free(gpt *g) {
  exf_model_free(g->model);
  exf_ctx_free(g->ctx);
}

/* ids (rows, block) -> logits (rows, block, V) */
static TEST_UNUSED exf_tensor *gpt_logits(const gpt *g, const int32_t *ids, size_t rows) {
  int32_t positions[GPT_MAX_BLOCK];
  exf_tensor *x;
  size_t i;
  for (i = 0; i < g->desc.block; i++) positions[i] = (int32_t)i;
  x = exf_add(g->ctx, exf_embedding(g->ctx, g->wte, ids, rows, g->desc.block),
              exf_embedding(g->ctx, g->wpe, positions, g->desc.block, 0));
  for (i = 0; i < g->desc.layers; i++) x = exf_block_forward(g->ctx, g->blocks[i], x);
  x = exf_norm_forward(g->ctx, g->norm, x);
  return exf_linear(g->ctx, x, g->wte, NULL);
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
