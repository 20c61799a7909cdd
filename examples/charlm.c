/* charlm.c - a character-level GPT whose FFNs are trained as several experts fused into
   one (ExFusion), merged into an ordinary dense model, and asked to write.

   Shows: after gpt.c, what a whole program needs: evaluation on a full split, gradient
          accumulation, checkpoints and exact resuming, upcycling of a trained model, the
          merge and its proof, generation with a key/value cache. Begin with `train`.
   Runs:  seconds with --quick; the default task a minute or two on two cores.
   Build: cc -O2 -fopenmp -o build/charlm examples/charlm.c -lm   (-fopenmp: optional)
   Ends:  next    build/charlm sample runs/charlm */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"

#include "common.h"

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
  exf_block_desc d = {.width = g->width, .n_heads = g->n_heads, .causal = 1,
    .bias = (int)g->bias, .dropout = g->dropout,
    .init_std_out = 0.02 / sqrt(2.0 * (double)g->n_layers)};
  if (fusion) d.ffn.fusion = *fusion;
  g->model = exf_model_new(ctx);
  g->wte = exf_embedding_new(g->model, "transformer.wte", g->n_vocab, g->width, 0.02);
  g->wpe = exf_embedding_new(g->model, "transformer.wpe", g->block, g->width, 0.02);
  g->blocks = memory(g->n_layers, sizeof *g->blocks);
  for (size_t i = 0; i < g->n_layers; i++) {
    char name[48];
    snprintf(name, sizeof name, "transformer.h.%u", (unsigned)i);
    g->blocks[i] = exf_block_new(g->model, name, &d);
  }
  g->ln_f = exf_norm_new(g->model, "transformer.ln_f", g->width,
                         &(exf_norm_desc){.bias = d.bias});
  exf_param_alias(g->model, "lm_head.weight", "transformer.wte.weight");
  check(ctx);
}
/* ids (B,T) -> logits (B,T,V). cache: NULL, or the B = 1 ids follow those seen by it */
static exf_tensor *gpt_forward(exf_ctx *ctx, const gpt *g, const int32_t *ids, size_t b,
                               size_t t, exf_kv *cache) {
  size_t at = cache ? exf_kv_length(cache) : 0;
  exf_tensor *x = exf_embedding(ctx, g->wte, ids, b, t);
  x = exf_add(ctx, x, t == g->block ? g->wpe : exf_slice(ctx, g->wpe, 0, at, at + t));
  x = exf_dropout(ctx, x, g->dropout);
  for (size_t i = 0; i < g->n_layers; i++)
    x = exf_block_forward(ctx, g->blocks[i], x, cache);
  return exf_linear(ctx, exf_norm_forward(ctx, g->ln_f, x), g->wte, NULL);
}
/* Mean loss over the consecutive windows of n tokens, the remainder left out; the same of
   `merged` when there is one, and the largest difference between their logits. */
static merge_result evaluate(exf_ctx *ctx, const gpt *g, const gpt *merged,
                             const unsigned char *tokens, size_t n) {
  size_t block = g->block, n_windows = (n - 1) / block, b;
  size_t per = block < 1024 ? 1024 / block : 1;      /* windows at once */
  int32_t *x = memory(per * block + 1, sizeof *x);
  int grad = exf_grad_set(ctx, 0);
  merge_result e = {.n = n_windows * block};
  for (size_t w = 0; w < n_windows && exf_ctx_status(ctx) == EXF_OK; w += b) {
    b = n_windows - w < per ? n_windows - w : per;
    for (size_t i = 0; i <= b * block; i++) x[i] = tokens[w * block + i];
    double count = (double)(b * block);
    exf_tensor *logits = gpt_forward(ctx, g, x, b, block, NULL);
    e.val_loss += count * exf_item(exf_cross_entropy(ctx, logits, x + 1, 0));
    if (merged) {
      exf_tensor *other = gpt_forward(ctx, merged, x, b, block, NULL);
      e.val_loss_merged += count * exf_item(exf_cross_entropy(ctx, other, x + 1, 0));
      compare_logits(logits, other, &e.max_diff);
    }
    exf_rewind(ctx);
  }
  exf_grad_set(ctx, grad);
  check(ctx);
  free(x);
  e.val_loss /= (double)e.n;
  e.val_loss_merged /= (double)e.n;
  return e;
}

/* ---- text as data: every byte that occurs is a token ------------------------------ */
typedef struct vocabulary {
  size_t n;
  unsigned char byte[256];   /* of a token, ascending */
  int token[256];            /* of a byte, or -1 */
} vocabulary;

typedef struct dataset {
  unsigned char *tokens;     /* n; the first n_train of them train */
  size_t n, n_train;
  uint64_t hash;             /* of the file */
} dataset;

static void vocabulary_add(vocabulary *v, int byte) {
  if (v->n == 0) memset(v->token, -1, sizeof v->token);
  v->token[byte] = (int)v->n;
  v->byte[v->n++] = (unsigned char)byte;
}
/* [10,32,33], as metadata keep it */
static void vocabulary_write(const vocabulary *v, text *t) {
  for (size_t i = 0; i < v->n; i++) text_add(t, "%s%d", i ? "," : "[", v->byte[i]);
  text_add(t, "]");
}
/* Returns 0 unless s lists ascending byte values. */
static int vocabulary_read(vocabulary *v, const char *s) {
  v->n = 0;
  if (*s != '[') return 0;
  do {
    char *end;
    long b = strtol(++s, &end, 10);
    if (end == s || b < 0 || b > 255 || (v->n && b <= v->byte[v->n - 1])) return 0;
    vocabulary_add(v, (int)b);
    s = end + strspn(end, " ");
  } while (*s == ',');
  return s[0] == ']' && s[1] == 0;
}
/* Reads a file as tokens; the validation split holds one window and its targets at least.
   An empty vocabulary becomes that of the bytes. */
static void dataset_read(dataset *d, const char *path, vocabulary *v, size_t block) {
  d->tokens = read_file(path, &d->n);
  d->n_train = d->n / 10 * 9 + d->n % 10 * 9 / 10;
  d->hash = hash_bytes(d->tokens, d->n);
  if (d->n == 0) fail(1, "%s is empty: give a file with text", path);
  if (d->n - d->n_train < block + 1)
    fail(1, "%s: %s bytes validate, fewer than --block %s and one more: give more text",
         path, commas(d->n - d->n_train), commas(block));
  for (int byte = 0, all = v->n == 0; all && byte < 256; byte++)
    if (memchr(d->tokens, byte, d->n)) vocabulary_add(v, byte);
  for (size_t i = 0; i < d->n; i++) {
    int token = v->token[d->tokens[i]];
    if (token < 0)
      fail(1, "%s: byte %s, of code %d, is not in the model's vocabulary of %d", path,
           commas(i), d->tokens[i], (int)v->n);
    d->tokens[i] = (unsigned char)token;
  }
}

/* ---- model files ------------------------------------------------------------------ */
/* Sizes, from the tensors (nanoGPT's names), and vocabulary (n = 0: none) of an open
   model. heads: for files that do not say, as nanoGPT's own; 0 refuses them. */
static void geometry_read(const exf_st *st, const char *path, size_t heads, gpt *g,
                          vocabulary *v) {
  const exf_st_entry *wte = exf_st_find(st, "transformer.wte.weight");
  const exf_st_entry *wpe = exf_st_find(st, "transformer.wpe.weight");
  const char *vocab = exf_st_meta(st, "exf.vocab"), *config = config_read(st, path);
  const char *act = json_find(config, "activation");
  char name[64];
  if (exf_st_find(st, "adamw.m.transformer.wte.weight"))
    fail(1, "%s is a checkpoint: give the model.safetensors beside it", path);
  v->n = 0;
  if (!wte || !wpe || wte->n_dims != 2 || wpe->n_dims != 2 || wte->dim[0] > 256
      || (vocab && (!vocabulary_read(v, vocab) || wte->dim[0] != v->n)))
    fail(1, "%s is not a character model: it needs transformer.wte.weight [V,C], "
         "transformer.wpe.weight [T,C], and exf.vocab with V byte values", path);
  if (act && strcmp(act, "gelu") != 0)
    fail(1, "%s: its activation is %.40s, charlm has gelu: convert it", path, act);
  *g = (gpt){.n_vocab = wte->dim[0], .width = wte->dim[1], .block = wpe->dim[0],
    .n_heads = config_count(config, "n_head", heads, path),
    .bias = exf_st_find(st, "transformer.ln_f.bias") != NULL};
  do snprintf(name, sizeof name, "transformer.h.%u.ln_1.weight", (unsigned)g->n_layers);
  while (exf_st_find(st, name) && ++g->n_layers < 1024);
  if (g->n_heads < 1)
    fail(1, "%s does not say its attention heads: train --init with --heads", path);
}
/* The dense model of DIR|FILE, with its vocabulary; returns the path of the file. */
static const char *open_model(exf_ctx *ctx, const char *place, gpt *g, vocabulary *v) {
  const char *path = model_path(place);
  exf_st *st = open_tensors(ctx, path);
  geometry_read(st, path, 0, g, v);
  if (v->n == 0)
    fail(1, "%s has no exf.vocab: train --init with it and --steps 0 adds it", path);
  exf_st_close(st);
  gpt_build(g, ctx, NULL);
  exf_model_load(g->model, path);
  check(ctx);
  return path;
}

/* ---- train ------------------------------------------------------------------------ */
typedef struct charlm {
  run r;
  const char *data;
  uint64_t block, bias;
  int order;
  gpt g;
  vocabulary vocab;
  dataset set;
} charlm;
/* The character task of nanoGPT's README on a CPU. */
static void train_defaults(charlm *c) {
  const flag own[] = {
    {"data", 's', FLAG_FREE, &c->data, "", "any text or binary file"},
    {"block", 'u', FLAG_FIXED, &c->block, "1 1073741824", "context length"},
    {"steps", 'u', FLAG_FIXED, &c->r.steps, "0 4e9", "updates"},
    {"bias", 'u', FLAG_FIXED, &c->bias, "0 1", "1: biases everywhere"},
    {"order", 'c', FLAG_FIXED, &c->order, "shuffle|sequential", "windows of the batches"},
    {0}};
  *c = (charlm){.data = "exfusion.h", .block = 64, .r = {.task = "charlm",
    .list_key = "exf.vocab", .out = "runs/charlm", .config = "", .init = "",
    .ffn = EXF_MB, .experts = 4, .mu = 0.95, .layers = 4, .heads = 4, .width = 128,
    .batch = 12, .accum = 1, .steps = 2000, .warmup = 100, .eval_every = 250,
    .save_every = 250, .lr = 1e-3, .min_lr = 1e-4, .weight_decay = 0.1, .beta1 = 0.9,
    .beta2 = 0.99, .clip = 1, .seed = 1}};
  flags_add(&c->r.f, own);
  run_flags_add(&c->r);
}
/* The sizes: those of the flags, or of the file of --init, with which given flags must
   agree. Then the data: of a resumed run the same, of --init such as fit the model. */
static void train_data(charlm *c) {
  run *r = &c->r;
  gpt *g = &c->g;
  text mine = {0};
  if (*r->init && !r->resume) {
    const char *path = model_path(r->init);
    exf_st *st = open_tensors(r->ctx, path);
    char sizes[128];
    geometry_read(st, path, *flag_given(&r->f, "heads") ? (size_t)r->heads : 0, g,
                  &c->vocab);
    exf_st_close(st);
    snprintf(sizes, sizeof sizes, "layers %u\nheads %u\nwidth %u\nblock %u\nbias %u",
             (unsigned)g->n_layers, (unsigned)g->n_heads, (unsigned)g->width,
             (unsigned)g->block, (unsigned)g->bias);
    flags_read(&r->f, sizes, path, FLAGS_AGREE);
  }
  if (r->width % r->heads)
    fail(2, "--heads %s does not divide --width %s: every head takes an equal part",
         commas(r->heads), commas(r->width));
  if (r->resume) vocabulary_read(&c->vocab, r->list.s);
  if (r->resume) flag_recorded(&r->f, "data", r->out);
  dataset_read(&c->set, c->data, &c->vocab, (size_t)c->block);
  if (g->n_vocab && g->n_vocab != c->vocab.n)
    fail(2, "--data %s has %d different bytes, the model a vocabulary of %d: give the "
         "text it was made for", c->data, (int)c->vocab.n, (int)g->n_vocab);
  *g = (gpt){.n_layers = (size_t)r->layers, .n_heads = (size_t)r->heads,
    .width = (size_t)r->width, .block = (size_t)c->block, .bias = (size_t)c->bias,
    .n_vocab = c->vocab.n, .dropout = r->dropout};
  text_add(&mine, "{\"bytes\":%llu,\"fnv1a\":\"%016llx\"}", (ull)c->set.n,
           (ull)c->set.hash);
  run_data(r, &mine, c->data, "--data");
  r->list.n = 0;                     /* as the checkpoint had it */
  vocabulary_write(&c->vocab, &r->list);
  text_add(&r->geometry, "{\"n_layer\":%llu,\"n_head\":%llu,\"n_embd\":%llu,"
           "\"block_size\":%llu,\"vocab_size\":%llu,\"bias\":%s,\"activation\":\"gelu\"}",
           (ull)g->n_layers, (ull)g->n_heads, (ull)g->width, (ull)g->block,
           (ull)g->n_vocab, c->bias ? "true" : "false");
}
/* Micro-batch `micro` of the run: x (B,T), and y, the tokens that follow. shuffle:
   windows start anywhere, as in nanoGPT. */
static void train_batch(const charlm *c, uint64_t micro, int32_t *x, int32_t *y) {
  const run *r = &c->r;
  size_t block = c->g.block, n = c->set.n_train, at;
  uint64_t row = micro % r->accum * r->batch;
  uint32_t stream = exf_rng_stream("data"), step = (uint32_t)(micro / r->accum);
  for (size_t j = 0; j < r->batch; j++) {
    if (c->order) at = (size_t)((micro * r->batch + j) % n * (block % n) % n);
    else at = (size_t)(exf_rng_uniform(r->seed, stream, step, row + j)
                       * (double)(n - block));
    for (size_t t = 0; t < block; t++) {
      x[j * block + t] = c->set.tokens[(at + t) % n];
      y[j * block + t] = c->set.tokens[(at + t + 1) % n];
    }
  }
}

static int train(int argc, char **argv) {
  charlm c;
  run *r = &c.r;
  gpt *g = &c.g, merged;
  int code = 0;

  /* Flags, data, and the model: a new one, or that of --init, upcycled. */
  train_defaults(&c);
  run_flags(r, argc, argv, "layers 2\nheads 2\nwidth 32\nblock 32\nbatch 8\nsteps 200\n"
            "warmup 20\nlr 0.004\nmin-lr 0.0004\neval-every 100\nsave-every 100\n",
            "charlm train [flags]");
  if (run_is_finished(r)) {
    run_free(r);
    return 0;
  }
  run_context(r);
  exf_ctx *ctx = r->ctx;
  train_data(&c);
  const exf_fusion_desc fusion = run_fusion(r);
  const int load = *r->init && !r->resume;
  gpt_build(g, ctx, load ? NULL : &fusion);
  r->model = g->model;
  if (load) exf_model_load(g->model, model_path(r->init));
  if (load && r->ffn != EXF_DENSE) exf_model_upcycle(g->model, &fusion);
  const size_t batch = (size_t)r->batch, n = batch * g->block;
  const unsigned char *val = c.set.tokens + c.set.n_train;
  const size_t n_val = c.set.n - c.set.n_train;
  int32_t *x = memory(n, sizeof *x), *y = memory(n, sizeof *y);
  r->per_step = n * (size_t)r->accum;
  run_begin(r);
  char model[128];
  text data = {0};
  snprintf(model, sizeof model, "GPT, layers %u, heads %u, width %u, block %u",
           (unsigned)g->n_layers, (unsigned)g->n_heads, (unsigned)g->width,
           (unsigned)g->block);
  text_add(&data, "%s: %s bytes, %d different; the last tenth validates", c.data,
           commas(c.set.n), (int)c.vocab.n);
  run_announce(r, model, data.s);
  text_free(&data);
  stop_install();

  while (r->step < r->steps && !stop_signal) {
    double start = seconds(), norm = 0, val_loss = NAN;

    /* One update: the gradients of all micro-batches add up. */
    r->loss = 0;
    exf_step_begin(ctx, r->step);
    exf_training_set(ctx, 1);
    for (uint64_t k = 0; k < r->accum; k++) {
      train_batch(&c, r->step * r->accum + k, x, y);
      exf_tensor *logits = gpt_forward(ctx, g, x, batch, g->block, NULL);
      exf_tensor *loss = exf_cross_entropy(ctx, logits, y, 0);
      r->loss += exf_item(loss) / (double)r->accum;
      exf_backward(ctx, exf_scale(ctx, loss, 1 / (double)r->accum));
      exf_rewind(ctx);
    }
    exf_training_set(ctx, 0);
    exf_optim_step(r->optim, exf_schedule_lr(&r->schedule, r->step), &norm);
    run_check(r, 0);
    double spent = seconds() - start;
    r->step++;

    /* Evaluate, tell, save. */
    if (run_due(r, r->eval_every)) {
      val_loss = evaluate(ctx, g, NULL, val, n_val).val_loss;
      run_check(r, val_loss);
    }
    run_log(r, norm, spent, val_loss, "");
    if (r->step < r->steps && run_due(r, r->save_every)) {
      run_save_results(r);
      run_save_checkpoint(r);
    }
  }
  free(x);
  free(y);

  if (r->steps == 0) run_check(r, evaluate(ctx, g, NULL, val, n_val).val_loss);
  run_save_results(r);
  if (r->step < r->steps) {
    run_save_checkpoint(r);
    code = run_stopped(r, argv[0]);
  } else {
    /* The merged file, read back, against the model in memory. */
    open_model(ctx, r->out, &merged, &c.vocab);
    merge_result m = evaluate(ctx, g, &merged, val, n_val);
    exf_model_free(merged.model);
    free(merged.blocks);
    if (r->ffn == EXF_MB && r->routed) {
      exf_routing_set(ctx, 1);              /* the routers instead of the banks */
      m.gap = m.val_loss - evaluate(ctx, g, NULL, val, n_val).val_loss;
      exf_routing_set(ctx, 0);
    }
    run_finish(r, &m, NULL, "nats per character", argv[0], "sample");
  }
  free(g->blocks);
  free(c.set.tokens);
  run_free(r);
  return code;
}

/* ---- sample ----------------------------------------------------------------------- */
/* The prompt as tokens, the last `block` of them; a line end (10) when it is empty. */
static size_t prompt_tokens(const char *prompt, const vocabulary *v, size_t block,
                            int32_t *tokens) {
  size_t n = strlen(prompt), skip = n > block ? n - block : 0;
  for (size_t i = 0; i < n; i++) {
    int token = v->token[(unsigned char)prompt[i]];
    if (token < 0)
      fail(1, "--prompt: byte %d, of code %d, is not in the model's vocabulary of %d",
           (int)i, (unsigned char)prompt[i], (int)v->n);
    if (i >= skip) tokens[i - skip] = token;
  }
  if (n == 0) tokens[0] = v->token[10] < 0 ? 0 : v->token[10];
  return n == 0 ? 1 : n - skip;
}
/* When the context is full, its last half goes on: positions are absolute. */
static void generate(exf_ctx *ctx, const gpt *g, const vocabulary *v, const char *path,
                     const char *prompt, const exf_sample_desc *how, uint64_t n_wanted) {
  int32_t *context = memory(g->block, sizeof *context);
  size_t n = prompt_tokens(prompt, v, g->block, context), done = 0;
  exf_kv *kv = exf_kv_new(ctx, g->n_layers, g->block, g->width);
  exf_grad_set(ctx, 0);
  printf("%s", prompt);
  for (uint64_t i = 0; i < n_wanted; i++) {
    exf_tensor *logits = gpt_forward(ctx, g, context + done, 1, n - done, kv);
    int32_t token = exf_sample(ctx, logits, how, i);
    if (token < 0) fail(1, "%s: %s", path, exf_error(ctx));
    exf_rewind(ctx);
    putchar(v->byte[token]);
    stdout_check();
    done = n;
    if (n == g->block) {
      size_t half = g->block > 1 ? g->block / 2 - (g->block > 3) : 0;
      memmove(context, context + n - half, half * sizeof *context);
      exf_kv_reset(kv);
      done = 0;
      n = half;
    }
    context[n++] = token;
  }
  printf("\n");
  exf_kv_free(kv);
  free(context);
}

static int sample(int argc, char **argv) {
  const char *place, *prompt = "";
  double temperature = 0.8, top_p = 1;
  uint64_t top_k = 0, seed = 1, n = 500;
  const flag table[] = {
    {"prompt", 's', FLAG_ONCE, &prompt, "", "the text to continue"},
    {"n", 'u', FLAG_ONCE, &n, "0 1e15", "characters to write"},
    {"temperature", 'x', FLAG_ONCE, &temperature, "0 1e6", "0: the likeliest"},
    {"top-k", 'u', FLAG_ONCE, &top_k, "0 1e9", "draw from the K likeliest; 0: all"},
    {"top-p", 'x', FLAG_ONCE, &top_p, "0 1", "from the likeliest that hold this share"},
    {"seed", 'u', FLAG_ONCE, &seed, "0 1.8e19", "of the draws"},
    {0}};
  flags f;
  gpt g;
  vocabulary v;
  exf_ctx *ctx = command_begin(&f, table, argc, argv, &place,
                               "charlm sample DIR|FILE [flags]");
  const char *path = open_model(ctx, place, &g, &v);
  generate(ctx, &g, &v, path, prompt, &(exf_sample_desc){.seed = seed,
    .temperature = temperature > 0 ? temperature : EXF_ZERO, .top_k = (size_t)top_k,
    .top_p = fmax(top_p, 1e-9)}, n);
  exf_model_free(g.model);
  free(g.blocks);
  exf_ctx_free(ctx);
  flags_free(&f);
  return 0;
}

/* ---- eval, main ------------------------------------------------------------------- */
static int eval(int argc, char **argv) {
  const char *place, *data = "exfusion.h";
  int split = 0;
  const flag table[] = {
    {"data", 's', FLAG_ONCE, &data, "", "if not given, what the model was trained on"},
    {"split", 'c', FLAG_ONCE, &split, "val|train|all", "part of it"}, {0}};
  flags f;
  gpt g;
  vocabulary v;
  dataset d;
  exf_ctx *ctx = command_begin(&f, table, argc, argv, &place,
                               "charlm eval DIR|FILE [flags]");
  const char *path = open_model(ctx, place, &g, &v);
  flags_of_run(&f, path);
  flag_recorded(&f, "data", place);
  dataset_read(&d, data, &v, g.block);
  size_t begin = split == 0 ? d.n_train : 0, n = split == 1 ? d.n_train : d.n - begin;
  merge_result e = evaluate(ctx, &g, NULL, d.tokens + begin, n);
  check_finite(e.val_loss, path);
  printf("%s_loss %.9g   nats per character (%.4f bits), %s characters",
         choice_name("val|train|all", split), e.val_loss, e.val_loss / log(2),
         commas(e.n));
  print_line(" of ", data);
  exf_model_free(g.model);
  free(g.blocks);
  exf_ctx_free(ctx);
  flags_free(&f);
  free(d.tokens);
  return 0;
}

int main(int argc, char **argv) {
  static const command list[] = {{"train", train}, {"sample", sample}, {"eval", eval},
                                 {"info", command_info}};
  return command_run("charlm", list, 4, argc, argv);
}
