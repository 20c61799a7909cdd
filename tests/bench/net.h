/* tests/bench/net.h - the models that are timed: a GPT and a vision Transformer, and one
   training step of them. Include after clock.h. */
#ifndef BENCH_NET_H
#define BENCH_NET_H

#define MAX_LAYERS 12
typedef struct net_desc {
  const char *name;
  int vit;
  size_t layers, heads, width, block, batch, vocab;   /* vit: block = 1 + patches */
  exf_fusion_desc fusion;
} net_desc;

enum { SIDE = 28, PATCH = 4, N_PATCHES = (SIDE / PATCH) * (SIDE / PATCH) };

#define DENSE {0}
/* The steps of the tables. */
static const net_desc nets[] = {
  {"charlm", 0, 4, 4, 128, 64, 12, 65, DENSE},
  {"charlm8192", 0, 4, 4, 128, 64, 128, 65, DENSE},
  {"gpt384", 0, 6, 6, 384, 256, 8, 65, DENSE},
  {"vit", 1, 4, 4, 64, 1 + N_PATCHES, 128, 10, DENSE}};
enum { CHARLM, CHARLM8192, GPT384, VIT, N_NETS };

typedef struct net {
  net_desc d;
  exf_ctx *ctx;
  exf_model *model;
  exf_optim *optim;
  exf_tensor *wte, *wpe, *cls;        /* (V,C), (T,C), (C) */
  exf_linear_layer *patch, *head;     /* vit */
  exf_block *block[MAX_LAYERS];
  exf_norm_layer *ln_f;
  int32_t *ids, *labels;              /* (B,T) */
  exf_real *image;                    /* (B,49,16) */
  uint64_t step;
} net;

static void *room(size_t n, size_t size) {
  void *p = calloc(n ? n : 1, size);
  if (p) return p;
  fprintf(stderr, "bench: out of memory\n");
  exit(1);
}

static void must(const exf_ctx *ctx) {
  if (exf_ctx_status(ctx) == EXF_OK) return;
  fprintf(stderr, "bench: %s\n", exf_error(ctx));
  exit(1);
}

static exf_fusion_desc fusion_of(exf_variant variant, size_t n) {
  exf_fusion_desc f;
  memset(&f, 0, sizeof f);
  f.variant = variant;
  f.n_experts = n;
  return f;
}

static exf_ctx *new_context(void) {
  exf_desc d;
  exf_ctx *ctx;
  memset(&d, 0, sizeof d);
  d.seed = 1;
  d.n_threads = bench.threads;
  d.isa = bench.isa;
  ctx = exf_ctx_new(&d);
  must(ctx);
  return ctx;
}

static void net_data(net *g) {
  size_t i, n = g->d.batch * g->d.block;
  g->ids = (int32_t *)room(n, sizeof(int32_t));
  g->labels = (int32_t *)room(n, sizeof(int32_t));
  for (i = 0; i < n; i++) {
    g->ids[i] = (int32_t)(exf_rng_u32(1, 2, 0, i) % g->d.vocab);
    g->labels[i] = (int32_t)(exf_rng_u32(1, 3, 0, i) % g->d.vocab);
  }
  if (!g->d.vit) return;
  g->image = (exf_real *)room(g->d.batch * SIDE * SIDE, sizeof(exf_real));
  for (i = 0; i < g->d.batch * SIDE * SIDE; i++)
    g->image[i] = (exf_real)exf_rng_uniform(1, 4, 0, i);
}

static net *net_new(const net_desc *desc) {
  net *g = (net *)room(1, sizeof *g);
  const exf_linear_desc linear = {1, 0.02};
  exf_norm_desc norm = {0, 0, 0};
  exf_block_desc b;
  exf_optim_desc o;
  exf_param_desc p;
  char name[48];
  size_t i;
  memset(&b, 0, sizeof b);
  memset(&o, 0, sizeof o);
  memset(&p, 0, sizeof p);
  g->d = *desc;
  g->ctx = new_context();
  g->model = exf_model_new(g->ctx);
  b.width = p.shape.dim[0] = g->d.width;
  b.n_heads = g->d.heads;
  b.causal = !g->d.vit;
  b.bias = norm.bias = g->d.vit;
  b.init_std_out = 0.02 / sqrt(2.0 * (double)g->d.layers);
  b.ffn.fusion = g->d.fusion;
  p.shape.n = 1;
  p.init_std = 0.02;
  if (g->d.vit) {
    g->patch = exf_linear_new(g->model, "patch", PATCH * PATCH, g->d.width, &linear);
    g->cls = exf_param_new(g->model, "cls", &p);
    g->head = exf_linear_new(g->model, "head", g->d.width, g->d.vocab, &linear);
  } else g->wte = exf_embedding_new(g->model, "wte", g->d.vocab, g->d.width, 0.02);
  g->wpe = exf_embedding_new(g->model, "wpe", g->d.block, g->d.width, 0.02);
  for (i = 0; i < g->d.layers; i++) {
    snprintf(name, sizeof name, "h.%u", (unsigned)i);
    g->block[i] = exf_block_new(g->model, name, &b);
  }
  g->ln_f = exf_norm_new(g->model, "ln_f", g->d.width, &norm);
  o.beta2 = 0.99;
  o.weight_decay = 0.1;
  o.clip = 1;
  g->optim = exf_optim_new(g->model, &o);
  net_data(g);
  must(g->ctx);
  return g;
}

static void net_free(net *g) {
  exf_optim_free(g->optim);
  exf_model_free(g->model);
  exf_ctx_free(g->ctx);
  free(g->ids);
  free(g->labels);
  free(g->image);
  free(g);
}

static exf_tensor *net_loss(net *g) {
  exf_ctx *ctx = g->ctx;
  size_t i, b = g->d.batch;
  exf_tensor *x, *part[2];
  if (g->d.vit) {
    x = exf_tensor_new(ctx, exf_shape3(b, N_PATCHES, PATCH * PATCH), g->image);
    part[0] = exf_add(ctx, exf_tensor_new(ctx, exf_shape3(b, 1, 1), NULL), g->cls);
    part[1] = exf_linear_forward(ctx, g->patch, x);
    x = exf_concat(ctx, part, 2, 1);
  } else x = exf_embedding(ctx, g->wte, g->ids, b, g->d.block);
  x = exf_add(ctx, x, g->wpe);
  for (i = 0; i < g->d.layers; i++) x = exf_block_forward(ctx, g->block[i], x, NULL);
  if (g->d.vit) x = exf_slice(ctx, x, 1, 0, 1);
  x = exf_norm_forward(ctx, g->ln_f, x);
  x = g->d.vit ? exf_linear_forward(ctx, g->head, x) : exf_linear(ctx, x, g->wte, NULL);
  return exf_cross_entropy(ctx, x, g->labels, 0);
}

/* One update, in seconds; parts (3), which may be NULL: forward, backward, optimizer. */
static double net_step(net *g, double *parts) {
  double t[4];
  exf_tensor *loss;
  t[0] = now();
  exf_step_begin(g->ctx, g->step++);
  exf_training_set(g->ctx, 1);
  loss = net_loss(g);
  kept = (float)exf_item(loss);
  t[1] = now();
  exf_backward(g->ctx, loss);
  exf_rewind(g->ctx);
  t[2] = now();
  exf_optim_step(g->optim, 1e-3, NULL);
  t[3] = now();
  exf_training_set(g->ctx, 0);
  must(g->ctx);
  if (parts) {
    parts[0] = t[1] - t[0];
    parts[1] = t[2] - t[1];
    parts[2] = t[3] - t[2];
  }
  return t[3] - t[0];
}

static size_t net_tokens(const net_desc *d) { return d->batch * d->block; }

/* FLOPs of a step's matrix products: 6 per token and matrix entry, and the six of the
   attention, forward and backward, as if nothing were masked. */
static double net_flops(const net_desc *d) {
  double c = (double)d->width, t = (double)net_tokens(d), l = (double)d->layers, ends;
  ends = d->vit ? (double)(d->batch * N_PATCHES) * 4 * PATCH * PATCH * c
                    + 6 * (double)(d->batch * d->vocab) * c
                : 6 * t * c * (double)d->vocab;
  return 72 * t * l * c * c + 12 * t * l * c * (double)d->block + ends;
}

#endif /* BENCH_NET_H */
