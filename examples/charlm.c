/* charlm.c - a character-level GPT whose FFNs are trained as several experts fused into
   one (ExFusion), merged into an ordinary dense model, and asked to write.

   Shows: a Transformer from the library's modules; training, evaluation on a full split,
          checkpoints and exact resuming; the merge and its proof; generation with a
          key/value cache.
   Runs:  seconds with --quick; the default task a minute or two on two cores.
   Build: cc -O2 -fopenmp -o build/charlm examples/charlm.c -lm   (-fopenmp: optional)
   Ends:  next    build/charlm sample runs/charlm */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"

#include "common.h"

typedef unsigned long long ull;

/* ---- the model -------------------------------------------------------------------- */

typedef struct gpt {
  size_t n_layers, n_heads, width, block, n_vocab, bias;
  double dropout;
  exf_model *model;
  exf_tensor *wte, *wpe;   /* (V,C), (T,C) */
  exf_block **blocks;      /* n_layers */
  exf_norm_layer *ln_f;
} gpt;

/* Makes the parameters from the sizes in g; fusion NULL: all FFNs dense. */
static void gpt_build(gpt *g, exf_ctx *ctx, const exf_fusion_desc *fusion) {
  exf_block_desc d;
  char name[48];
  size_t i;
  memset(&d, 0, sizeof d);
  d.width = g->width;
  d.n_heads = g->n_heads;
  d.causal = 1;
  d.bias = (int)g->bias;
  d.eps = 1e-5;
  d.dropout = g->dropout;
  d.init_std = 0.02;
  d.init_std_out = 0.02 / sqrt(2.0 * (double)g->n_layers);
  d.names = EXF_NAMES_GPT2;
  if (fusion) d.ffn.fusion = *fusion;
  g->model = exf_model_new(ctx);
  g->wte = exf_embedding_new(g->model, "transformer.wte", g->n_vocab, g->width, 0.02);
  g->wpe = exf_embedding_new(g->model, "transformer.wpe", g->block, g->width, 0.02);
  g->blocks = (exf_block **)memory(g->n_layers, sizeof *g->blocks);
  for (i = 0; i < g->n_layers; i++) {
    snprintf(name, sizeof name, "transformer.h.%u", (unsigned)i);
    g->blocks[i] = exf_block_new(g->model, name, &d);
  }
  g->ln_f = exf_layernorm_new(g->model, "transformer.ln_f", g->width, d.bias, d.eps);
  exf_param_alias(g->model, "lm_head.weight", "transformer.wte.weight");
  check(ctx);
}

static void gpt_free(gpt *g) {
  exf_model_free(g->model);
  free(g->blocks);
}

/* ids (B,T) -> logits (B,T,V) */
static exf_tensor *gpt_forward(exf_ctx *ctx, const gpt *g, const int32_t *ids, size_t b,
                               size_t t) {
  exf_tensor *x = exf_embedding(ctx, g->wte, ids, b, t);
  size_t i;
  x = exf_add(ctx, x, t == g->block ? g->wpe : exf_slice(ctx, g->wpe, 0, 0, t));
  x = exf_dropout(ctx, x, g->dropout);
  for (i = 0; i < g->n_layers; i++) x = exf_block_forward(ctx, g->blocks[i], x);
  return exf_linear(ctx, exf_norm_forward(ctx, g->ln_f, x), g->wte, NULL);
}

/* t new tokens behind those in kv -> logits (1,1,V) of the last */
static exf_tensor *gpt_next(exf_ctx *ctx, const gpt *g, const int32_t *ids, size_t t,
                            exf_kv *kv) {
  size_t i, at = exf_kv_length(kv);
  exf_tensor *x = exf_embedding(ctx, g->wte, ids, 1, t);
  x = exf_add(ctx, x, exf_slice(ctx, g->wpe, 0, at, at + t));
  for (i = 0; i < g->n_layers; i++) x = exf_block_cached(ctx, g->blocks[i], x, kv, i);
  exf_kv_advance(kv, t);
  x = exf_norm_forward(ctx, g->ln_f, exf_slice(ctx, x, 1, t - 1, t));
  return exf_linear(ctx, x, g->wte, NULL);
}

/* ---- evaluation ------------------------------------------------------------------- */

/* Mean loss over the consecutive windows of tokens, the remainder left out; the same of
   `merged` when there is one, and the largest difference between their logits. */
static merge_result evaluate(exf_ctx *ctx, const gpt *g, const gpt *merged,
                             const unsigned char *tokens, size_t n) {
  size_t block = g->block, n_windows = (n - 1) / block, w, b, i;
  size_t per = block < 1024 ? 1024 / block : 1;   /* windows at once */
  int32_t *x = (int32_t *)memory(per * block + 1, sizeof *x);
  int grad = exf_grad_set(ctx, 0);
  merge_result e = {0, 0, 0, 0, 0};
  for (w = 0; w < n_windows && exf_ctx_status(ctx) == EXF_OK; w += b) {
    exf_tensor *logits, *other;
    double loss;
    b = n_windows - w < per ? n_windows - w : per;
    for (i = 0; i <= b * block; i++) x[i] = tokens[w * block + i];
    logits = gpt_forward(ctx, g, x, b, block);
    loss = exf_item(exf_cross_entropy(ctx, logits, x + 1, 0));
    e.val_loss += (double)(b * block) * loss;
    if (merged) {
      other = gpt_forward(ctx, merged, x, b, block);
      loss = exf_item(exf_cross_entropy(ctx, other, x + 1, 0));
      e.val_loss_merged += (double)(b * block) * loss;
      if (logits && other) compare_logits(logits, other, &e.max_diff);
    }
    exf_rewind(ctx);
  }
  exf_grad_set(ctx, grad);
  check(ctx);
  free(x);
  e.n = n_windows * block;
  e.val_loss /= (double)e.n;
  e.val_loss_merged /= (double)e.n;
  return e;
}

/* ---- model files ------------------------------------------------------------------ */

/* Geometry and vocabulary (n = 0: none) of an open file with nanoGPT's names. heads: for
   files that do not say; 0 refuses them. */
static void geometry_read(const exf_st *st, const char *path, size_t heads, gpt *g,
                          vocabulary *v) {
  const exf_st_entry *wte = exf_st_find(st, "transformer.wte.weight");
  const exf_st_entry *wpe = exf_st_find(st, "transformer.wpe.weight");
  const char *vocab = exf_st_meta(st, "exf.vocab"), *value;
  char name[64];
  json j;
  memset(g, 0, sizeof *g);
  if (exf_st_find(st, "adamw.m.transformer.wte.weight"))
    fail(1, "%s is a checkpoint: give the model.safetensors beside it", path);
  if (!wte || !wpe || wte->n_dims != 2 || wpe->n_dims != 2 || wte->dim[0] < 1
      || wte->dim[0] > 256 || wte->dim[1] < 1 || wpe->dim[0] < 1
      || wpe->dim[1] != wte->dim[1])
    fail(1, "%s is not a character model: it needs transformer.wte.weight [V,C], V up to "
         "256, and transformer.wpe.weight [T,C]; see charlm info", path);
  g->n_vocab = wte->dim[0];
  g->width = wte->dim[1];
  g->block = wpe->dim[0];
  g->bias = exf_st_find(st, "transformer.ln_f.bias") != NULL;
  do snprintf(name, sizeof name, "transformer.h.%u.ln_1.weight", (unsigned)g->n_layers);
  while (exf_st_find(st, name) && ++g->n_layers < 1024);
  config_read(&j, st, path);
  g->n_heads = config_count(&j, "n_head", heads, path);
  if ((value = json_find(&j, "activation")) != NULL && strcmp(value, "gelu") != 0)
    fail(1, "%s: its activation is %.40s, charlm has gelu: convert it", path, value);
  json_free(&j);
  if (g->n_heads < 1 || g->n_heads > g->width || g->width % g->n_heads)
    fail(1, "%s: %s heads for width %s: its exf.config must hold n_head, a divisor of "
         "the width (to train, give --heads)", path, commas(g->n_heads),
         commas(g->width));
  v->n = 0;
  if (vocab && (!vocabulary_read(v, vocab) || v->n != g->n_vocab))
    fail(1, "%s: exf.vocab must list %d ascending byte values: write the file anew", path,
         (int)g->n_vocab);
}

/* The dense model of DIR|FILE, with its vocabulary; returns the path of the file. */
static char *open_model(exf_ctx *ctx, const char *place, gpt *g, vocabulary *v) {
  char *path = model_path(place);
  exf_st *st = open_tensors(ctx, path);
  geometry_read(st, path, 0, g, v);
  gpt_build(g, ctx, NULL);
  exf_model_load(g->model, st);
  check_load(ctx, path);
  exf_st_close(st);
  return path;
}

/* ---- train ------------------------------------------------------------------------ */

typedef struct charlm {
  run r;
  const char *data, *init;
  uint64_t block, bias;
  int order;
  gpt g;
  vocabulary vocab;
  dataset set;
  int32_t *x, *y;            /* (batch,block) tokens and their successors */
} charlm;

/* The character task of nanoGPT's README on a CPU. */
static void train_defaults(charlm *c) {
  const double big = 1073741824.0;
  const settings s = {"runs/charlm", "", EXF_MB, 0, EXF_UP_DEFAULT, 0, 4, 0.95, 4, 4, 128,
                      12, 1, 0, 100, 250, 250, 1e-3, 1e-4, 0.1, 0.9, 0.99, 1, 1, 0, 0, 0,
                      0, 0};
  const flag own[] = {
    {"data", 's', FLAG_DATA, &c->data, 0, 0, NULL,
     "any text or binary file; none: the text of exfusion.h", 0, NULL},
    {"block", 'u', FLAG_TRAINING, &c->block, 1, big, NULL, "context length", 0, NULL},
    {"steps", 'u', FLAG_TRAINING, &c->r.steps, 0, 4e9, NULL, "updates", 0, NULL},
    {"bias", 'u', FLAG_TRAINING, &c->bias, 0, 1, NULL, "1: biases everywhere", 0, NULL},
    {"order", 'c', FLAG_TRAINING, &c->order, 0, 0, "shuffle|sequential",
     "windows of the batches", 0, NULL},
    {"init", 's', FLAG_TRAINING, &c->init, 0, 0, NULL,
     "start from a dense model, DIR|FILE, and upcycle it", 0, NULL}};
  const int n = (int)(sizeof own / sizeof own[0]);
  memset(c, 0, sizeof *c);
  c->r.s = s;
  c->r.task = "charlm";
  c->r.list_key = "exf.vocab";
  c->r.steps = 2000;
  c->r.loss = NAN;
  c->data = c->init = "";
  c->block = 64;
  memcpy(c->r.flags, own, sizeof own);
  c->r.n_flags = n + settings_flags(&c->r.s, c->r.flags + n);
}

/* Geometry from the flags, or from the file of --init, which is returned open, with its
   path, to be freed. */
static exf_st *train_geometry(charlm *c, char **path) {
  settings *s = &c->r.s;
  gpt *g = &c->g;
  exf_st *st = NULL;
  const char *config;
  int n = c->r.n_flags;
  if (*c->init && !s->resume) {
    *path = model_path(c->init);
    st = open_tensors(c->r.ctx, *path);
    geometry_read(st, *path, (size_t)s->heads, g, &c->vocab);
    config = exf_st_meta(st, "exf.config");
    if (!config || !strstr(config, "\"n_head\""))
      log_line(&s->quiet, "notice: the file does not say n_head: --heads is taken");
    flag_agree(c->r.flags, n, "layers", g->n_layers, *path);
    flag_agree(c->r.flags, n, "heads", g->n_heads, *path);
    flag_agree(c->r.flags, n, "width", g->width, *path);
    flag_agree(c->r.flags, n, "block", g->block, *path);
    flag_agree(c->r.flags, n, "bias", g->bias, *path);
  }
  if (s->width % s->heads)
    fail(2, "--heads %s does not divide --width %s: every head takes an equal part",
         commas(s->heads), commas(s->width));
  g->n_layers = (size_t)s->layers;
  g->n_heads = (size_t)s->heads;
  g->width = (size_t)s->width;
  g->block = (size_t)c->block;
  g->bias = (size_t)c->bias;
  g->dropout = s->dropout;
  return st;
}

/* Reads the data; of a resumed run they must be the same, of --init fit the model. */
static void train_data(charlm *c, const char *self) {
  text mine = {NULL, 0, 0};
  run *r = &c->r;
  if (r->s.resume && !vocabulary_read(&c->vocab, r->list.s))
    fail(1, "the checkpoint's exf.vocab is no list of bytes: start a new run");
  if (!*c->data) {
    char *found = default_data(self);
    flag_set(flag_find(r->flags, r->n_flags, "data"), found, "");
    free(found);
  }
  if (r->s.resume) flag_recorded(flag_find(r->flags, r->n_flags, "data"), r->s.out);
  dataset_read(&c->set, c->data, &c->vocab, c->g.n_vocab);
  text_add(&mine, "{\"bytes\":%llu,\"fnv1a\":\"%016llx\"}", (ull)c->set.n,
           (ull)c->set.hash);
  run_data(r, &mine, c->data, "--data");
  dataset_encode(&c->set, c->data, &c->vocab);
  dataset_check(c->set.n_train, c->g.block, "training", c->data);
  dataset_check(c->set.n - c->set.n_train, c->g.block, "validation", c->data);
  c->g.n_vocab = c->vocab.n;
  r->list.n = 0;
  vocabulary_write(&c->vocab, &r->list);
  text_add(&r->geometry, "{\"n_layer\":%llu,\"n_head\":%llu,\"n_embd\":%llu,"
           "\"block_size\":%llu,\"vocab_size\":%llu,\"bias\":%s,\"activation\":\"gelu\"}",
           (ull)c->g.n_layers, (ull)c->g.n_heads, (ull)c->g.width, (ull)c->g.block,
           (ull)c->g.n_vocab, c->bias ? "true" : "false");
}

/* Micro-batch `micro` of the run. shuffle: windows start anywhere, as in nanoGPT. */
static void train_batch(charlm *c, uint64_t micro) {
  const settings *s = &c->r.s;
  size_t block = c->g.block, n = c->set.n_train, j, t, at;
  uint64_t row = micro % s->accum * s->batch;
  uint32_t stream = exf_rng_stream("data"), step = (uint32_t)(micro / s->accum);
  for (j = 0; j < s->batch; j++) {
    if (c->order) at = (size_t)((micro * s->batch + j) % n * (block % n) % n);
    else at = (size_t)(exf_rng_uniform(s->seed, stream, step, row + j)
                       * (double)(n - block));
    for (t = 0; t < block; t++) {
      c->x[j * block + t] = c->set.tokens[(at + t) % n];
      c->y[j * block + t] = c->set.tokens[(at + t + 1) % n];
    }
  }
}

static exf_tensor *train_loss(void *user, uint64_t micro) {
  charlm *c = (charlm *)user;
  exf_tensor *logits;
  train_batch(c, micro);
  logits = gpt_forward(c->r.ctx, &c->g, c->x, (size_t)c->r.s.batch, c->g.block);
  return exf_cross_entropy(c->r.ctx, logits, c->y, 0);
}

static merge_result evaluate_validation(const charlm *c, const gpt *merged) {
  return evaluate(c->r.ctx, &c->g, merged, c->set.tokens + c->set.n_train,
                  c->set.n - c->set.n_train);
}

static double train_validate(void *user, text *note) {
  (void)note;
  return evaluate_validation((const charlm *)user, NULL).val_loss;
}

/* Checks the merged file against the model in memory, and tells the result. */
static void train_finish(charlm *c, const char *self) {
  run *r = &c->r;
  merge_result m;
  gpt merged;
  vocabulary v;
  run_save_results(r);
  free(open_model(r->ctx, r->s.out, &merged, &v));
  m = evaluate_validation(c, &merged);
  gpt_free(&merged);
  if (r->s.ffn == EXF_MB && r->s.routed) {
    exf_routing_set(r->ctx, 1);              /* the routers instead of the banks */
    m.gap = m.val_loss - evaluate_validation(c, NULL).val_loss;
    exf_routing_set(r->ctx, 0);
  }
  run_finish(r, &m, NULL, "nats per character", self, "sample");
}

static int train(int argc, char **argv) {
  static const char *const quick[] = {"layers", "2", "heads", "2", "width", "32", "block",
    "32", "batch", "8", "steps", "200", "warmup", "20", "lr", "0.004", "min-lr", "0.0004",
    "eval-every", "100", "save-every", "100"};
  charlm c;
  run *r = &c.r;
  exf_st *st;
  exf_fusion_desc fusion;
  text model = {NULL, 0, 0}, data = {NULL, 0, 0};
  char *init = NULL;
  int code = 0;
  train_defaults(&c);
  run_flags(r, argc, argv, quick, (int)(sizeof quick / sizeof *quick / 2),
            "charlm train [flags]");
  if (run_is_finished(r)) {
    run_free(r);
    return 0;
  }
  run_context(r);
  st = train_geometry(&c, &init);
  train_data(&c, argv[0]);
  fusion = settings_fusion(&r->s);
  gpt_build(&c.g, r->ctx, st || r->s.ffn == EXF_DENSE ? NULL : &fusion);
  r->model = c.g.model;
  r->user = &c;
  r->micro_loss = train_loss;
  r->validate = train_validate;
  if (st) exf_model_load(c.g.model, st);
  if (st) check_load(r->ctx, init);
  if (st && r->s.ffn != EXF_DENSE) exf_model_upcycle(c.g.model, &fusion);
  check(r->ctx);
  exf_st_close(st);
  free(init);
  c.x = (int32_t *)memory((size_t)r->s.batch * c.g.block, sizeof *c.x);
  c.y = (int32_t *)memory((size_t)r->s.batch * c.g.block, sizeof *c.y);
  r->per_step = (size_t)(r->s.batch * r->s.accum) * c.g.block;
  run_begin(r);
  text_add(&model, "GPT, layers %s, heads %s, width %s, block %s", commas(c.g.n_layers),
           commas(c.g.n_heads), commas(c.g.width), commas(c.g.block));
  text_add(&data, "%s: %s bytes, %d different; the last tenth validates", c.data,
           commas(c.set.n), (int)c.vocab.n);
  run_announce(r, model.s, data.s);
  stop_install();
  run_loop(r);
  if (r->step < r->steps) code = run_interrupted(r, argv[0]);
  else train_finish(&c, argv[0]);
  text_free(&model);
  text_free(&data);
  free(c.x);
  free(c.y);
  free(c.set.tokens);
  exf_optim_free(r->optim);
  gpt_free(&c.g);
  exf_ctx_free(r->ctx);
  run_free(r);
  return code;
}

/* ---- sample ----------------------------------------------------------------------- */

typedef struct sampling {
  double temperature, top_p;
  uint64_t top_k, seed, n;
} sampling;

/* Draw `index` of a token from softmax(logits / temperature), of which only the top_k
   likeliest, and of these the fewest that hold top_p of the probability, can come. */
static int32_t choose(const exf_tensor *logits, const sampling *s, uint64_t index) {
  size_t i, j, n = 0, kept = s->top_k && s->top_k < logits->size ? (size_t)s->top_k
                                                                 : logits->size;
  int32_t order[256] = {0};
  double p[256], total = 0, mass = 0, draw;
  for (i = 0; i < logits->size; i++) {    /* by falling logit, then rising token */
    for (j = i; j > 0 && logits->data[order[j - 1]] < logits->data[i]; j--)
      order[j] = order[j - 1];
    order[j] = (int32_t)i;
  }
  if (!(s->temperature > 0)) return order[0];
  for (i = 0; i < kept; i++) {
    double d = (double)logits->data[order[i]] - (double)logits->data[order[0]];
    p[i] = exp(d / s->temperature);
    total += p[i];
  }
  while (n < kept && (n == 0 || mass < s->top_p * total)) mass += p[n++];
  draw = mass * exf_rng_uniform(s->seed, exf_rng_stream("sample"), 0, index);
  for (i = 0; i + 1 < n && draw >= p[i]; i++) draw -= p[i];
  return order[i];
}

/* Writes n characters. When the context is full, its last half is kept and the cache
   filled anew, since positions are absolute. */
static void generate(exf_ctx *ctx, const gpt *g, const vocabulary *v, const char *path,
                     const char *prompt, const sampling *s) {
  int32_t *context = (int32_t *)memory(g->block, sizeof *context);
  size_t n = prompt_tokens(prompt, v, g->block, context), done = 0, half, k;
  exf_kv *kv = exf_kv_new(ctx, g->n_layers, g->block, g->width);
  uint64_t i;
  exf_grad_set(ctx, 0);
  put_bytes(prompt, strlen(prompt));
  for (i = 0; i < s->n; i++) {
    exf_tensor *logits = gpt_next(ctx, g, context + done, n - done, kv);
    double sum = 0;
    int32_t token;
    check(ctx);
    for (k = 0; k < logits->size; k++) sum += (double)logits->data[k];
    check_finite(sum, path);
    token = choose(logits, s, i);
    exf_rewind(ctx);
    put_bytes(&v->byte[token], 1);
    done = n;
    if (n == g->block) {
      half = g->block > 1 ? g->block / 2 - (g->block > 3) : 0;
      memmove(context, context + n - half, half * sizeof *context);
      exf_kv_reset(kv);
      done = 0;
      n = half;
    }
    context[n++] = token;
  }
  put_bytes("\n", 1);
  exf_kv_free(kv);
  free(context);
}

static int sample(int argc, char **argv) {
  const char *place = NULL, *prompt = "";
  sampling s = {0.8, 1, 0, 1, 500};
  flag flags[] = {
    {"prompt", 's', FLAG_ONCE, &prompt, 0, 0, NULL, "the text to continue", 0, NULL},
    {"n", 'u', FLAG_ONCE, &s.n, 0, 1e15, NULL, "characters to write", 0, NULL},
    {"temperature", 'x', FLAG_ONCE, &s.temperature, 0, 1e6, NULL, "0: the likeliest", 0,
     NULL},
    {"top-k", 'u', FLAG_ONCE, &s.top_k, 0, 1e9, NULL, "draw from the K likeliest; 0: all",
     0, NULL},
    {"top-p", 'x', FLAG_ONCE, &s.top_p, 0, 1, NULL,
     "draw from the likeliest that hold this share", 0, NULL},
    {"seed", 'u', FLAG_ONCE, &s.seed, 0, 1.8e19, NULL, "of the draws", 0, NULL}};
  const char *usage = "charlm sample DIR|FILE [flags]";
  exf_ctx *ctx;
  gpt g;
  vocabulary v;
  char *path;
  flags_parse(flags, 6, argc, argv, &place, usage);
  if (!place) fail(2, "no model named: usage: %s", usage);
  ctx = exf_ctx_new(NULL);
  check(ctx);
  path = open_model(ctx, place, &g, &v);
  if (v.n == 0)
    fail(1, "%s has no exf.vocab, the list of its characters: train --init with it and "
         "--steps 0 gives it one", path);
  generate(ctx, &g, &v, path, prompt, &s);
  free(path);
  gpt_free(&g);
  exf_ctx_free(ctx);
  flags_free(flags, 6);
  return 0;
}

/* ---- eval, main ------------------------------------------------------------------- */

static int eval(int argc, char **argv) {
  const char *place = NULL, *data = "", *usage = "charlm eval DIR|FILE [flags]";
  int split = 0;
  flag flags[] = {
    {"data", 's', FLAG_ONCE, &data, 0, 0, NULL, "none: what the model was trained on",
     0, NULL},
    {"split", 'c', FLAG_ONCE, &split, 0, 0, "val|train|all", "part of it", 0, NULL}};
  exf_ctx *ctx;
  gpt g;
  vocabulary v;
  dataset d;
  merge_result e;
  char *path, *found = NULL, name[48];
  size_t begin, n;
  flags_parse(flags, 2, argc, argv, &place, usage);
  if (!place) fail(2, "no model named: usage: %s", usage);
  ctx = exf_ctx_new(NULL);
  check(ctx);
  path = open_model(ctx, place, &g, &v);
  flag_of_run(&flags[0], path);
  if (!*data) data = found = default_data(argv[0]);
  else flag_recorded(&flags[0], place);
  dataset_read(&d, data, &v, g.n_vocab);
  dataset_encode(&d, data, &v);
  begin = split == 0 ? d.n_train : 0;
  n = split == 1 ? d.n_train : d.n - begin;
  dataset_check(n, g.block, split == 0 ? "validation" : "chosen", data);
  e = evaluate(ctx, &g, NULL, d.tokens + begin, n);
  check_finite(e.val_loss, path);
  choice_name(flags[1].choices, split, name);
  printf("%s_loss %.9g   nats per character (%.4f bits), %s characters of ", name,
         e.val_loss, e.val_loss / log(2), commas(e.n));
  print_plain(data);
  printf("\n");
  gpt_free(&g);
  exf_ctx_free(ctx);
  flags_free(flags, 2);
  free(d.tokens);
  free(path);
  free(found);
  return 0;
}

int main(int argc, char **argv) {
  static const command list[] = {{"train", train}, {"sample", sample}, {"eval", eval},
                                 {"info", command_info}};
  return command_run("charlm", list, 4, argc, argv);
}
