/* Fusion rules from outside: what is written here with the public functions alone must
   work like sw, dw and mb with block, gradients, optimizer, merge, files, diagnosis. */
#ifndef TEST_LINKED    /* the Makefile links the implementation in */
#define EXFUSION_IMPLEMENTATION
#endif
#include "../exfusion.h"
#include "test.h"
#include "tiny_gpt.h"
#include "heap.h"

#define FILE_MERGED TEST_TMP "/rules.safetensors"
#define FILE_CHECKPOINT TEST_TMP "/rules-checkpoint.safetensors"
#ifdef EXF_DOUBLE
#define TOL 1e-8
#else
#define TOL 5e-3
#endif

/* ---- the rules ------------------------------------------------------------------- */

/* Expert dropout: each expert is left out of a step with probability p. */
static exf_tensor *dropout_weights(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x,
                                   int training) {
  size_t n = f->fusion.n_experts;
  (void)x;
  (void)training;
  return exf_dropout(ctx, exf_full(ctx, exf_shape1(n), 1.0 / (double)n), 0.3);
}
static const exf_rule dropout = {
  "dropout", NULL, NULL, dropout_weights, NULL, NULL, NULL
};

/* Weights per output row: a (N,h,1) for W1 (N,h,C), (N,h) for b1 (N,h) ... */
static const char *const row_names[EXF_N_PARTS] = {
  "rows.w1", "rows.b1", "rows.w2", "rows.b2", "rows.wg", "rows.bg"
};
static void rows_init(exf_ctx *ctx, exf_ffn *f, const exf_fusion_desc *fusion) {
  (void)ctx;
  for (int k = 0; k < EXF_N_PARTS; k++) {
    exf_param_desc d;
    if (f->part[k] == NULL) continue;
    memset(&d, 0, sizeof d);
    d.shape = exf_shape3(fusion->n_experts, f->part[k]->tensor.shape.dim[0], 1);
    d.shape.n = f->part[k]->tensor.shape.n + 1;
    d.init_value = 1.0 / (double)fusion->n_experts;
    exf_ffn_param(f, row_names[k], &d);
  }
}
static exf_tensor *rows_fuse(exf_ctx *ctx, const exf_ffn *f, exf_part part,
                             int training) {
  exf_tensor *a = exf_ffn_tensor(f, row_names[part]);
  (void)training;
  return exf_sum(ctx, exf_mul(ctx, a, &f->part[part]->tensor), EXF_AXIS(0), 0);
}
static const exf_rule rows = {"rows", NULL, rows_init, NULL, rows_fuse, NULL, NULL};

/* A sparse mixture: the router picks one expert for every row of x and scales its output
   by the probability. The rows are sorted by expert, and put back. */
enum { MOST_ROWS = 256 };
static void mixture_init(exf_ctx *ctx, exf_ffn *f, const exf_fusion_desc *fusion) {
  (void)ctx;
  exf_param_desc d;
  memset(&d, 0, sizeof d);
  d.shape = exf_shape2(fusion->n_experts, f->desc.width);
  d.init_std = 1;
  exf_ffn_param(f, "gate", &d);
}
static exf_tensor *mixture_forward(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x,
                                   int training) {
  exf_tensor *th[EXF_N_PARTS], *out[16], *p, *y;
  int32_t row[MOST_ROWS], place[MOST_ROWS];
  size_t n = f->fusion.n_experts, c = f->desc.width, used = 0, count = 0;
  const int32_t *best;
  int parts = 0;
  (void)training;
  if (x == NULL || n > 16 || x->size / c > MOST_ROWS) return NULL;
  y = exf_reshape(ctx, x, exf_shape2(x->size / c, c));
  p = exf_softmax(ctx, exf_linear(ctx, y, exf_ffn_tensor(f, "gate"), NULL));
  best = exf_argmax(ctx, p);
  if (best == NULL) return NULL;
  exf_tensor *one = exf_tensor_new(ctx, p->shape, NULL);
  for (size_t i = 0; i < n; i++) {
    size_t begin = used;
    for (size_t r = 0; r < x->size / c; r++) {
      if (best[r] != (int32_t)i) continue;
      if (one != NULL) one->data[r * n + i] = 1;
      place[r] = (int32_t)used;
      row[used++] = (int32_t)r;
    }
    if (used == begin) continue;
    for (int k = 0; k < EXF_N_PARTS; k++) {
      th[k] = NULL;
      if (f->part[k] == NULL) continue;
      exf_shape s = f->part[k]->tensor.shape;
      th[k] = exf_slice(ctx, &f->part[k]->tensor, 0, i, i + 1);
      th[k] = exf_reshape(ctx, th[k], exf_shape_make(s.n - 1, s.dim[1], s.dim[2], 0, 0));
    }
    out[count++] = exf_ffn_apply(ctx, f, exf_gather(ctx, y, row + begin, used - begin),
                                 th);
  }
  parts = (int)count;
  y = exf_gather(ctx, exf_concat(ctx, out, parts, 0), place, used);
  y = exf_mul(ctx, y, exf_sum(ctx, exf_mul(ctx, p, one), EXF_AXIS(1), EXF_KEEP));
  return exf_reshape(ctx, y, x->shape);
}
static const exf_rule mixture = {
  "mixture", NULL, mixture_init, NULL, NULL, mixture_forward, NULL
};

/* dw and mb again, as anybody may write them. */
static void my_dw_init(exf_ctx *ctx, exf_ffn *f, const exf_fusion_desc *fusion) {
  (void)ctx;
  exf_param_desc d;
  memset(&d, 0, sizeof d);
  d.shape = exf_shape1(fusion->n_experts);
  exf_ffn_param(f, "fusion.weight", &d);
}
static exf_tensor *my_dw_weights(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x,
                                 int training) {
  (void)x;
  (void)training;
  return exf_softmax(ctx, exf_ffn_tensor(f, "fusion.weight"));
}
static const exf_rule my_dw = {
  "my dw", NULL, my_dw_init, my_dw_weights, NULL, NULL, NULL
};

static void my_mb_init(exf_ctx *ctx, exf_ffn *f, const exf_fusion_desc *fusion) {
  (void)ctx;
  exf_param_desc d;
  memset(&d, 0, sizeof d);
  d.shape = exf_shape2(fusion->n_experts, f->desc.width);
  d.init_std = 0.02;
  exf_ffn_param(f, "router.weight", &d);
  d.shape = exf_shape1(fusion->n_experts);
  d.init_std = 0;
  exf_ffn_param(f, "router.bias", &d);
  d.init_value = 1.0 / (double)fusion->n_experts;
  d.buffer = 1;
  exf_ffn_param(f, "bank", &d);
}
static exf_tensor *my_mb_weights(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x,
                                 int training) {
  exf_tensor *bank = exf_ffn_tensor(f, "bank"), *r;
  if (!training) return bank;
  if (x == NULL) return NULL;
  x = exf_detach(ctx, exf_mean(ctx, x, EXF_AXIS(x->shape.n - 1) - 1u, 0));
  r = exf_softmax(ctx, exf_linear(ctx, x, exf_ffn_tensor(f, "router.weight"),
                                  exf_ffn_tensor(f, "router.bias")));
  return exf_add(ctx, r, exf_scale(ctx, exf_sub(ctx, bank, r), 0.95));
}
static void my_mb_step(exf_ffn *f, const exf_real *mean) {
  exf_tensor *bank = exf_ffn_tensor(f, "bank");
  memcpy(bank->data, mean, bank->size * sizeof *mean);
}
static const exf_rule my_mb = {
  "my mb", NULL, my_mb_init, my_mb_weights, NULL, NULL, my_mb_step
};

/* No function at all: 1/N. */
static const exf_rule plain = {"plain", NULL, NULL, NULL, NULL, NULL, NULL};

static const exf_rule *const all_rules[] = {&dropout, &rows, &mixture, &my_dw, &my_mb,
                                            &plain};
enum { N_RULES = 6 };

/* ---- models ---------------------------------------------------------------------- */

static exf_fusion_desc fusion_of(const exf_rule *rule, size_t n) {
  exf_fusion_desc f;
  memset(&f, 0, sizeof f);
  f.n_experts = n;
  f.rule = rule;
  return f;
}

static exf_ctx *new_ctx(uint64_t seed, heap *h) {
  exf_desc d;
  memset(&d, 0, sizeof d);
  d.seed = seed;
  d.n_threads = 2;
  if (h != NULL) heap_use(h, &d);
  return exf_ctx_new(&d);
}

static tiny_desc tiny_of(const exf_rule *rule, int bias, exf_act act) {
  tiny_desc d = tiny_defaults();
  d.bias = bias;
  d.act = act;
  d.fusion = fusion_of(rule, 3);
  if (rule == NULL) d.fusion = tiny_variant(0, 0);
  return d;
}

typedef struct lone {
  exf_ctx *ctx;
  exf_model *model;
  exf_ffn *ffn;
} lone;

static lone lone_new(const exf_rule *rule, exf_act act) {
  lone l;
  exf_ffn_desc d;
  memset(&d, 0, sizeof d);
  d.width = 4;
  d.hidden = 5;
  d.bias = 1;
  d.act = act;
  d.init_std = d.init_std_out = 0.5;
  if (rule != NULL) d.fusion = fusion_of(rule, 3);
  l.ctx = new_ctx(3, NULL);
  l.model = exf_model_new(l.ctx);
  l.ffn = exf_ffn_new(l.model, "mlp", &d);
  return l;
}
static void lone_free(lone *l) {
  CHECK_OK(l->ctx);
  exf_model_free(l->model);
  exf_ctx_free(l->ctx);
}
static exf_tensor *input(exf_ctx *ctx, uint32_t salt) {
  exf_tensor *x = exf_tensor_new(ctx, exf_shape3(2, 3, 4), NULL);
  for (size_t i = 0; x != NULL && i < x->size; i++)
    x->data[i] = (exf_real)exf_rng_normal(21, salt, 0, i);
  return x;
}
static exf_tensor *lone_loss(exf_ctx *ctx, void *user) {
  const exf_ffn *f = (const exf_ffn *)user;
  exf_tensor *y = exf_ffn_forward(ctx, f, input(ctx, 1));
  return exf_sum(ctx, exf_mul(ctx, y, input(ctx, 2)), EXF_ALL_AXES, 0);
}

/* ---- gradients ------------------------------------------------------------------- */

static void check_gradients(const exf_rule *rule, exf_act act, int training) {
  lone l = lone_new(rule, act);
  exf_gradcheck_report report;
  size_t n = exf_model_count(l.model);
  for (size_t i = 0; i < exf_model_n_params(l.model); i++) {
    exf_param *p = exf_model_param(l.model, i);
    int router = strstr(p->name, "router") != NULL;
    for (size_t j = 0; j < p->tensor.size; j++)       /* biases too; a decided router */
      if (p->init_std == 0 || router)
        p->tensor.data[j] += (exf_real)exf_rng_normal(4, (uint32_t)i, 0, j);
    if (!router || training) continue;
    exf_param_freeze(p, 1);                           /* evaluation asks the bank */
    n -= p->tensor.size;
  }
  exf_training_set(l.ctx, training);
  CHECK(exf_gradcheck(l.model, lone_loss, l.ffn, 0, &report) == EXF_OK);
  if (!CHECK(report.worst < TOL))
    printf("  %s: %g at %s\n", rule->name, report.worst, report.where);
  if (!CHECK(report.largest > 1e-4))
    printf("  %s: a gradient of at most %g\n", rule->name, report.largest);
  CHECK(report.n_checked == n);
  lone_free(&l);
}
TEST(gradients_are_right) {
  for (int r = 0; r < N_RULES; r++)
    for (int training = 0; training < 2; training++) {
      check_gradients(all_rules[r], EXF_GELU, training);
      check_gradients(all_rules[r], EXF_SWIGLU, training);
    }
}

/* The experts of rules with weights share one gradient, the others have one each. */
TEST(gradients_of_experts) {
  for (int r = 0; r < N_RULES; r++) {
    lone l = lone_new(all_rules[r], EXF_GELU);
    exf_param *e = exf_model_find(l.model, "mlp.experts.c_fc.weight");
    exf_real g[3 * 5 * 4], own[3 * 5 * 4];
    size_t one = 5 * 4;
    if (!CHECK(e != NULL && e->tensor.size == 3 * one)) return;
    exf_backward(l.ctx, lone_loss(l.ctx, l.ffn));
    exf_rewind(l.ctx);
    CHECK(exf_expert_grad(e, g) == EXF_OK);
    if (all_rules[r] == &rows || all_rules[r] == &mixture) {
      memcpy(own, e->tensor.grad, sizeof own);
      CHECK(same_bits(g, own, 3 * one));
    } else {
      for (size_t i = 0; i < 3 * one; i++)
        CHECK_NEAR(g[i], (double)e->tensor.grad[i % one] / 3, 1e-6);
    }
    lone_free(&l);
  }
}

/* What a rule's forward returns may be needed as it is, here by softmax's backward:
   the block's sum takes another place. */
static exf_tensor *soft_forward(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x,
                                int training) {
  (void)training;
  return exf_softmax(ctx, exf_matmul(ctx, x, exf_ffn_tensor(f, "w"), 0));
}
static void soft_init(exf_ctx *ctx, exf_ffn *f, const exf_fusion_desc *fusion) {
  (void)ctx;
  exf_param_desc d;
  (void)fusion;
  memset(&d, 0, sizeof d);
  d.shape = exf_shape2(4, 4);
  d.init_std = 0.5;
  exf_ffn_param(f, "w", &d);
}
static exf_tensor *block_loss(exf_ctx *ctx, void *user) {
  exf_tensor *y = exf_block_forward(ctx, (const exf_block *)user, input(ctx, 1), NULL);
  return exf_sum(ctx, exf_mul(ctx, y, input(ctx, 2)), EXF_ALL_AXES, 0);
}
TEST(block_leaves_what_forward_returns) {
  static const exf_rule rule = {"soft", NULL, soft_init, NULL, NULL, soft_forward, NULL};
  exf_ctx *ctx = new_ctx(3, NULL);
  exf_model *m = exf_model_new(ctx);
  exf_gradcheck_report report;
  exf_block_desc d;
  memset(&d, 0, sizeof d);
  d.width = 4;
  d.n_heads = 2;
  d.init_std = 0.3;
  d.ffn.fusion = fusion_of(&rule, 2);
  exf_block *b = exf_block_new(m, "b", &d);
  for (size_t i = 0; i < exf_model_n_params(m); i++)
    if (strstr(exf_model_param(m, i)->name, ".experts.") != NULL)   /* not used */
      exf_param_freeze(exf_model_param(m, i), 1);
  CHECK(exf_gradcheck(m, block_loss, b, 0, &report) == EXF_OK);
  if (!CHECK(report.worst < TOL)) printf("  %g at %s\n", report.worst, report.where);
  CHECK(report.largest > 1e-3);
  CHECK_OK(ctx);
  exf_model_free(m);
  exf_ctx_free(ctx);
}

/* ---- the same as ours -------------------------------------------------------------- */

/* dw and mb written outside train bit for bit like those inside; "plain" is sw. */
TEST(rules_from_outside_are_no_other_rules) {
  static const exf_rule *const mine[] = {&my_dw, &my_mb, &plain};
  static const int ours[] = {3, 4, 1};
  for (int r = 0; r < 3; r++) {
    exf_ctx *ctx = new_ctx(5, NULL);
    tiny_desc a = tiny_of(mine[r], 1, EXF_GELU), b = a;
    b.fusion = tiny_variant(ours[r], 3);
    tiny_gpt x = tiny_new(ctx, &a), y = tiny_new(ctx, &b);
    exf_optim *ox = tiny_adamw(x.model), *oy = tiny_adamw(y.model);
    tiny_train(ctx, &x, ox, 0, 6, 1e-2);
    tiny_train(ctx, &y, oy, 0, 6, 1e-2);
    CHECK(same_params(x.model, y.model));
    CHECK(exf_model_ffn(x.model, 0)->fusion.variant == EXF_RULE);
    CHECK(exf_model_ffn(x.model, 0)->fusion.rule == mine[r]);
    if (r == 1) {
      const exf_tensor *bx = exf_ffn_tensor(exf_model_ffn(x.model, 1), "bank");
      const exf_tensor *by = exf_ffn_tensor(exf_model_ffn(y.model, 1), "bank");
      CHECK(same_bits(bx->data, by->data, 3));
      CHECK(fabs((double)bx->data[0] - 1.0 / 3) > 1e-7);
    }
    size_t n, m;
    exf_real *ex = tiny_eval(ctx, &x, &n), *ey = tiny_eval(ctx, &y, &m);
    CHECK(n == m && same_bits(ex, ey, n));
    free(ex);
    free(ey);
    CHECK_OK(ctx);
    exf_optim_free(ox);
    exf_optim_free(oy);
    exf_model_free(x.model);
    exf_model_free(y.model);
    exf_ctx_free(ctx);
  }
}

/* ---- training, merging, files ------------------------------------------------------ */

static int is_mergeable(const exf_rule *rule) { return rule->forward == NULL; }

/* Merged into a file and in place: the logits of evaluation, bit for bit. Kept: the
   model's own tensors, loaded into another one. */
static void check_files(const exf_rule *rule, int bias, exf_act act) {
  exf_ctx *ctx = new_ctx(1, NULL);
  tiny_desc d = tiny_of(rule, bias, act), dense = tiny_of(NULL, bias, act);
  tiny_gpt g = tiny_new(ctx, &d), h, plain_gpt = tiny_new(ctx, &dense);
  exf_optim *optim = tiny_adamw(g.model);
  size_t n, m, dense_count = exf_model_count(plain_gpt.model);
  double first = tiny_train(ctx, &g, optim, 0, 1, 1e-2);
  double last = tiny_train(ctx, &g, optim, 1, 30, 1e-2);
  CHECK(last < first - 0.1);
  exf_real *before = tiny_eval(ctx, &g, &n), *after;
  exf_training_set(ctx, 1);                   /* saving and merging do not care */
  CHECK(exf_model_save(g.model, FILE_MERGED, NULL, 0) == EXF_OK);
  exf_training_set(ctx, 0);
  after = tiny_eval(ctx, &g, &m);
  CHECK(n == m && same_bits(before, after, n));
  free(after);
  exf_optim_free(optim);

  exf_st *st = exf_st_open(ctx, FILE_MERGED, NULL);
  size_t with_alias = exf_model_count_merged(g.model) + d.vocab * d.width, elements = 0;
  for (size_t i = 0; i < exf_st_count(st); i++) {
    const exf_st_entry *e = exf_st_get(st, i);
    size_t size = 1;
    for (int k = 0; k < e->n_dims; k++) size *= e->dim[k];
    elements += size;
    if (is_mergeable(rule)) CHECK(strstr(e->name, "expert") == NULL);
  }
  CHECK(elements == with_alias);
  exf_st_close(st);

  if (is_mergeable(rule)) {
    CHECK(exf_model_count_merged(g.model) == dense_count);
    exf_training_set(ctx, 1);
    CHECK(exf_model_merge(g.model) == EXF_OK);
    exf_training_set(ctx, 0);
    CHECK(exf_model_count(g.model) == dense_count);
    CHECK(exf_model_ffn(g.model, 0)->fusion.variant == EXF_DENSE);
    CHECK(exf_ffn_tensor(exf_model_ffn(g.model, 0), "bank") == NULL);
    h = plain_gpt;
  } else {
    CHECK(exf_model_count_merged(g.model) == exf_model_count(g.model));
    CHECK(exf_model_merge(g.model) == EXF_STATE);
    CHECK_ERR(ctx, EXF_STATE, "transformer.h.0.mlp: its rule 'mixture'");
    CHECK(exf_ffn_merge(exf_model_ffn(g.model, 1)) == EXF_STATE);
    CHECK_ERR(ctx, EXF_STATE, "exf_model_save keeps its experts");
    CHECK(exf_model_load(plain_gpt.model, FILE_MERGED) == EXF_MISMATCH);
    exf_error_clear(ctx);
    h = tiny_new(ctx, &d);
    h.wte->data[0] += 1;
  }
  after = tiny_eval(ctx, &g, &m);
  CHECK(n == m && same_bits(before, after, n));
  free(after);
  CHECK(exf_model_load(h.model, FILE_MERGED) == EXF_OK);
  after = tiny_eval(ctx, &h, &m);
  CHECK(n == m && same_bits(before, after, n));
  free(after);
  if (h.model != plain_gpt.model) exf_model_free(h.model);

  /* a merged model is upcycled again and keeps its function */
  if (is_mergeable(rule)) {
    CHECK(exf_model_upcycle(g.model, &d.fusion) == EXF_OK);
    CHECK(exf_model_ffn(g.model, 0)->fusion.upcycle == EXF_UP_ZEROSUM);
    after = tiny_eval(ctx, &g, &m);
    if (rule != &my_dw) CHECK(n == m && max_diff(before, after, n) < 1e-4);
    free(after);
  }
  free(before);
  CHECK_OK(ctx);
  exf_model_free(g.model);
  exf_model_free(plain_gpt.model);
  exf_ctx_free(ctx);
}
TEST(training_saving_merging) {
  for (int r = 0; r < N_RULES; r++) check_files(all_rules[r], r & 1, EXF_GELU);
  check_files(&rows, 1, EXF_SWIGLU);
  check_files(&mixture, 1, EXF_SWIGLU);
}

/* Stopped, saved, loaded and gone on: the same bits. */
TEST(checkpoints) {
  for (int r = 0; r < N_RULES; r++) {
    exf_ctx *ctx = new_ctx(1, NULL);
    tiny_desc d = tiny_of(all_rules[r], 1, EXF_GELU);
    tiny_gpt g = tiny_new(ctx, &d), h = tiny_new(ctx, &d);
    exf_optim *og = tiny_adamw(g.model), *oh = tiny_adamw(h.model);
    tiny_train(ctx, &g, og, 0, 4, 1e-2);
    CHECK(exf_checkpoint_save(g.model, og, FILE_CHECKPOINT, NULL, 0) == EXF_OK);
    tiny_train(ctx, &g, og, 4, 4, 1e-2);
    h.wte->data[0] += 1;
    CHECK(exf_checkpoint_load(h.model, oh, FILE_CHECKPOINT) == EXF_OK);
    tiny_train(ctx, &h, oh, 4, 4, 1e-2);
    CHECK(same_params(g.model, h.model));
    if (all_rules[r] == &my_mb)
      CHECK(same_bits(exf_ffn_tensor(exf_model_ffn(g.model, 0), "bank")->data,
                      exf_ffn_tensor(exf_model_ffn(h.model, 0), "bank")->data, 3));
    CHECK_OK(ctx);
    exf_optim_free(oh);
    exf_model_free(h.model);
    if (all_rules[r] == &plain || all_rules[r] == &dropout) {   /* another rule */
      d.fusion.rule = all_rules[r] == &plain ? &dropout : &plain;
      h = tiny_new(ctx, &d);
      CHECK(exf_checkpoint_load(h.model, NULL, FILE_CHECKPOINT) == EXF_MISMATCH);
      CHECK_ERR(ctx, EXF_MISMATCH, all_rules[r]->name);
      exf_model_free(h.model);
    }
    exf_optim_free(og);
    exf_model_free(g.model);
    exf_ctx_free(ctx);
  }
}

TEST(diagnosis) {
  for (int r = 0; r < N_RULES; r++) {
    lone l = lone_new(all_rules[r], EXF_GELU);
    double w[3], router[3], d[3];
    CHECK_NEAR(exf_ffn_diagnose(l.ffn, w, router, d), 3, 1e-5);
    for (int i = 0; i < 3; i++) {
      CHECK_NEAR(w[i], 1.0 / 3, 1e-6);
      CHECK(router[i] == w[i] && d[i] > 0.1);
    }
    lone_free(&l);
  }
}

/* ---- when a rule is called, and with what ------------------------------------------ */

typedef struct calls {
  int weights, with_x, training, step;
  double mean[3];
} calls;
static exf_tensor *calls_weights(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x,
                                 int training) {
  calls *c = (calls *)f->fusion.rule->user;
  c->weights++;
  c->with_x += x != NULL;
  c->training += training;
  if (!training) return NULL;                  /* 1/N */
  exf_tensor *a = exf_full(ctx, exf_shape1(3), 0.25);
  if (a != NULL) a->data[0] = (exf_real)c->weights;
  return a;
}
static void calls_step(exf_ffn *f, const exf_real *mean) {
  calls *c = (calls *)f->fusion.rule->user;
  c->step++;
  for (int i = 0; i < 3 && mean != NULL; i++) c->mean[i] = (double)mean[i];
}
TEST(calls_of_a_rule) {
  calls c;
  exf_rule rule = {"calls", &c, NULL, calls_weights, NULL, NULL, calls_step};
  lone l;
  memset(&c, 0, sizeof c);
  l = lone_new(&rule, EXF_GELU);
  exf_optim *optim = exf_optim_new(l.model, NULL);
  CHECK(c.weights == 0);
  exf_ffn_forward(l.ctx, l.ffn, input(l.ctx, 1));
  CHECK(c.weights == 1 && c.with_x == 0 && c.training == 0);   /* evaluation: no x */
  exf_routing_set(l.ctx, 1);
  exf_ffn_forward(l.ctx, l.ffn, input(l.ctx, 1));
  exf_routing_set(l.ctx, 0);
  CHECK(c.weights == 2 && c.with_x == 1 && c.training == 1);
  exf_rewind(l.ctx);
  CHECK(exf_optim_step(optim, 1e-3, NULL) == EXF_OK);
  CHECK(c.step == 0);                                          /* nothing went through */
  exf_training_set(l.ctx, 1);
  for (int k = 0; k < 2; k++) {                                /* weights 3 and 4 */
    exf_backward(l.ctx, lone_loss(l.ctx, l.ffn));
    exf_rewind(l.ctx);
  }
  CHECK(c.weights == 4 && c.with_x == 3 && c.step == 0);
  CHECK(exf_optim_step(optim, 1e-3, NULL) == EXF_OK);
  CHECK(c.step == 1 && c.mean[0] == 3.5 && c.mean[2] == 0.25);
  CHECK(exf_ffn_merge(l.ffn) == EXF_OK);
  CHECK(c.weights == 5 && c.with_x == 3 && c.training == 3);
  exf_optim_free(optim);
  lone_free(&l);
}

/* Rules that store the experts' gradients take their step without weights. */
TEST(step_of_a_rule_without_weights) {
  calls c;
  exf_rule rule = {"calls", &c, rows_init, NULL, rows_fuse, NULL, calls_step};
  lone l;
  memset(&c, 0, sizeof c);
  l = lone_new(&rule, EXF_GELU);
  exf_optim *optim = exf_optim_new(l.model, NULL);
  CHECK(exf_optim_step(optim, 1e-3, NULL) == EXF_OK);
  CHECK(c.step == 0);
  exf_backward(l.ctx, lone_loss(l.ctx, l.ffn));
  exf_rewind(l.ctx);
  CHECK(exf_optim_step(optim, 1e-3, NULL) == EXF_OK);
  CHECK(c.step == 1 && c.mean[0] == 0);
  exf_optim_free(optim);
  lone_free(&l);
}

/* ---- refusals ---------------------------------------------------------------------- */

static exf_tensor *too_many_weights(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x,
                                    int training) {
  (void)f;
  (void)x;
  (void)training;
  return exf_full(ctx, exf_shape1(4), 0.25);
}
static exf_tensor *no_fuse(exf_ctx *ctx, const exf_ffn *f, exf_part part, int training) {
  (void)training;
  return part == EXF_W1 ? NULL : exf_detach(ctx, &f->part[part]->tensor);
}
static exf_tensor *wrong_fuse(exf_ctx *ctx, const exf_ffn *f, exf_part part,
                              int training) {
  (void)training;
  return exf_detach(ctx, &f->part[part]->tensor);
}
static exf_tensor *bad_weights(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x,
                               int training) {
  (void)x;
  (void)training;
  exf_fail(ctx, EXF_NUMERIC, "%s: the rule gave up", f->name);
  return NULL;
}

static void check_upcycle_fails(const exf_fusion_desc *f, exf_status status,
                                const char *part) {
  lone l = lone_new(NULL, EXF_GELU);
  size_t n = exf_model_n_params(l.model), count = exf_model_count(l.model);
  CHECK(exf_ffn_upcycle(l.ffn, f) == status);
  CHECK_ERR(l.ctx, status, part);
  CHECK(exf_model_n_params(l.model) == n && exf_model_count(l.model) == count);
  CHECK(l.ffn->fusion.variant == EXF_DENSE);
  CHECK(exf_ffn_forward(l.ctx, l.ffn, input(l.ctx, 1)) != NULL);
  lone_free(&l);
}

TEST(wrong_rules_are_refused) {
  exf_rule rule = dropout;
  exf_fusion_desc f = fusion_of(&rule, 3);
  f.variant = EXF_SW;
  check_upcycle_fails(&f, EXF_ARG, "with a rule the variant must be EXF_RULE: dropout");
  f.variant = EXF_RULE;
  f.rule = NULL;
  check_upcycle_fails(&f, EXF_ARG, "the rule is NULL");
  f.rule = &rule;
  rule.fuse = rows_fuse;
  check_upcycle_fails(&f, EXF_ARG, "weights, fuse and forward at most: dropout");
  rule.weights = NULL;
  rule.forward = mixture_forward;
  check_upcycle_fails(&f, EXF_ARG, "a rule gives one of");
  rule = dropout;
  rule.name = "";
  check_upcycle_fails(&f, EXF_ARG, "no name");
  rule.name = NULL;
  check_upcycle_fails(&f, EXF_ARG, "no name");
}

TEST(wrong_results_are_refused) {
  exf_rule rule = {"wrong", NULL, NULL, NULL, NULL, NULL, NULL};
  for (int i = 0; i < 4; i++) {
    static const char *const message[] = {
      "ffn: 'mlp': the rule 'wrong' gives weights (4) for 3 experts",
      "the rule 'wrong' fuses experts to nothing, not (5,4)",
      "the rule 'wrong' fuses experts to (3,5,4), not (5,4)", "mlp: the rule gave up"};
    exf_status status = i < 3 ? EXF_SHAPE : EXF_NUMERIC;
    rule.weights = i == 0 ? too_many_weights : i == 3 ? bad_weights : NULL;
    rule.fuse = i == 1 ? no_fuse : i == 2 ? wrong_fuse : NULL;
    lone l = lone_new(&rule, EXF_GELU);
    size_t n = exf_model_n_params(l.model);
    CHECK(exf_ffn_forward(l.ctx, l.ffn, input(l.ctx, 1)) == NULL);
    CHECK_ERR(l.ctx, status, message[i]);
    CHECK(exf_ffn_merge(l.ffn) == status);
    CHECK_ERR(l.ctx, status, message[i]);
    CHECK(exf_model_save(l.model, FILE_MERGED, NULL, 0) == status);
    CHECK_ERR(l.ctx, status, message[i]);
    if (rule.weights != NULL) {
      double w[3] = {7, 7, 7};
      CHECK(exf_ffn_diagnose(l.ffn, w, NULL, NULL) == 0 && w[2] == 7);
      CHECK_ERR(l.ctx, status, message[i]);
    }
    CHECK(exf_model_n_params(l.model) == n && l.ffn->fusion.variant == EXF_RULE);
    lone_free(&l);
  }
}

/* ---- init -------------------------------------------------------------------------- */

/* What init does wrong. */
typedef struct odd {
  exf_ctx *ctx;
  int what;
} odd;
static void odd_init(exf_ctx *ctx, exf_ffn *f, const exf_fusion_desc *fusion) {
  (void)ctx;
  const odd *o = (const odd *)fusion->rule->user;
  exf_param_desc d;
  memset(&d, 0, sizeof d);
  d.shape = exf_shape1(fusion->n_experts);
  d.buffer = o->what % 2;
  CHECK(exf_ffn_param(f, "first", &d) != NULL);
  d.buffer = 0;
  if (o->what < 2) exf_fail(o->ctx, EXF_ARG, "%s: no such luck", f->name);
  if (o->what == 2 || o->what == 3) exf_ffn_param(f, "first", &d);
  if (o->what == 4) exf_ffn_param(f, "c_fc.weight", &d);
  if (o->what == 5) exf_ffn_param(f, NULL, &d);
  if (o->what == 6) exf_ffn_param(f, "experts.c_fc.weight", &d);
  d.shape = exf_shape2((size_t)-1, 4);
  if (o->what == 7) exf_ffn_param(f, "huge", &d);
}
TEST(init_that_fails_leaves_nothing) {
  static const char *const message[] = {
    "mlp: no such luck", "mlp: no such luck", "'mlp.first' is already taken",
    "'mlp.first' is that of a bank", "'mlp.c_fc.weight' is already taken", "is empty",
    "'mlp.experts.c_fc.weight' is already taken", "does not fit"};
  odd o;
  exf_rule rule = {"odd", &o, odd_init, NULL, NULL, NULL, NULL};
  exf_fusion_desc f = fusion_of(&rule, 3), sw = tiny_variant(1, 3);
  for (o.what = 0; o.what < 8; o.what++) {
    lone l = lone_new(NULL, EXF_GELU);
    exf_status status = o.what < 7 ? EXF_ARG : EXF_SIZE;
    size_t n = exf_model_n_params(l.model), held = exf_ctx_stats(l.ctx).bytes;
    o.ctx = l.ctx;
    CHECK(exf_ffn_upcycle(l.ffn, &f) == status);
    CHECK_ERR(l.ctx, status, message[o.what]);
    CHECK(exf_model_n_params(l.model) == n && l.ffn->fusion.variant == EXF_DENSE);
    CHECK(exf_ffn_tensor(l.ffn, "first") == NULL);
    CHECK(exf_ctx_stats(l.ctx).bytes <= held + 4096);     /* a longer array of pointers */
    CHECK(exf_ffn_upcycle(l.ffn, &sw) == EXF_OK);
    lone_free(&l);
  }
}

/* Outside of init there is nothing to be made. */
TEST(parameters_are_made_by_init_alone) {
  lone l = lone_new(&rows, EXF_GELU);
  exf_param_desc d;
  memset(&d, 0, sizeof d);
  CHECK(exf_ffn_param(l.ffn, "late", &d) == NULL);
  CHECK_ERR(l.ctx, EXF_STATE, "ffn_param: 'late' of mlp");
  CHECK(exf_ffn_param(NULL, "late", &d) == NULL);
  CHECK(exf_ffn_tensor(l.ffn, "late") == NULL && exf_ffn_tensor(l.ffn, NULL) == NULL);
  CHECK(exf_ffn_tensor(NULL, "rows.w1") == NULL);
  CHECK(exf_ffn_tensor(l.ffn, "rows.w1")->shape.n == 3);
  CHECK(exf_ffn_tensor(l.ffn, "experts.c_fc.bias")->shape.n == 2);
  lone_free(&l);
}

/* ---- all or nothing ---------------------------------------------------------------- */

static void check_names(const exf_model *m, char (*names)[64], size_t n) {
  if (!CHECK(exf_model_n_params(m) == n)) return;
  for (size_t i = 0; i < n; i++) CHECK_STR(exf_model_param(m, i)->name, names[i]);
}

/* Every allocation of a change fails in turn: the model is then what it was. */
static void check_change_without_memory(const exf_rule *rule, int merge) {
  heap h;
  char names[64][64];
  exf_fusion_desc f = fusion_of(rule, 3);
  tiny_desc d = tiny_of(merge ? rule : NULL, 1, EXF_GELU);
  size_t n, m, tries = 0;
  memset(&h, 0, sizeof h);
  exf_ctx *ctx = new_ctx(1, &h);
  tiny_gpt g = tiny_new(ctx, &d);
  exf_real *before = tiny_eval(ctx, &g, &m), *after;
  size_t params = exf_model_n_params(g.model), count = exf_model_count(g.model);
  if (!CHECK(params <= 64)) return;
  for (size_t i = 0; i < params; i++)
    snprintf(names[i], sizeof names[i], "%s", exf_model_param(g.model, i)->name);
  for (;; tries++) {
    size_t bytes = h.bytes;
    heap_arm(&h, tries + 1, (int)(tries & 1));
    exf_status status = merge ? exf_model_merge(g.model) : exf_model_upcycle(g.model, &f);
    int failed = h.failed;
    heap_arm(&h, 0, 0);
    if (!failed) {
      CHECK(status == EXF_OK);
      break;
    }
    CHECK(status == EXF_MEMORY);
    exf_error_clear(ctx);
    exf_rewind(ctx);
    check_names(g.model, names, params);
    CHECK(exf_model_count(g.model) == count);
    CHECK(exf_model_ffn(g.model, 0)->fusion.variant == (merge ? EXF_RULE : EXF_DENSE));
    CHECK(h.bytes <= bytes + 8192);         /* more room for pointers */
    after = tiny_eval(ctx, &g, &n);
    CHECK(n == m && same_bits(before, after, n));
    free(after);
    if (test_now.failures > 0) break;
  }
  CHECK(tries > 10);
  after = tiny_eval(ctx, &g, &n);
  if (merge) CHECK(n == m && same_bits(before, after, n));
  CHECK(exf_model_ffn(g.model, 1)->fusion.variant == (merge ? EXF_DENSE : EXF_RULE));
  free(after);
  free(before);
  CHECK_OK(ctx);
  exf_model_free(g.model);
  exf_ctx_free(ctx);
  CHECK(h.n_live == 0 && h.bytes == 0 && h.n_bad == 0);
}
TEST(changes_are_all_or_nothing) {
  for (int r = 0; r < N_RULES; r++) {
    check_change_without_memory(all_rules[r], 0);
    if (is_mergeable(all_rules[r])) check_change_without_memory(all_rules[r], 1);
  }
}

/* One FFN that cannot be merged keeps all others from it; each by itself can be. */
TEST(merging_a_mixed_model) {
  exf_ctx *ctx = new_ctx(1, NULL);
  tiny_desc d = tiny_of(NULL, 1, EXF_GELU);
  tiny_gpt g = tiny_new(ctx, &d);
  exf_fusion_desc f = fusion_of(&mixture, 3), mb = tiny_variant(4, 3);
  exf_ffn *first = exf_model_ffn(g.model, 0), *second = exf_model_ffn(g.model, 1);
  size_t n, m, dense = exf_model_count(g.model), params = exf_model_n_params(g.model);
  CHECK(exf_ffn_upcycle(first, &mb) == EXF_OK);
  CHECK(exf_ffn_upcycle(second, &f) == EXF_OK);
  CHECK(exf_model_n_params(g.model) == params + 2 + 1);
  exf_real *before = tiny_eval(ctx, &g, &n), *after;
  CHECK(exf_model_merge(g.model) == EXF_STATE);
  CHECK_ERR(ctx, EXF_STATE, "merge: transformer.h.1.mlp");
  CHECK(first->fusion.variant == EXF_MB && second->fusion.variant == EXF_RULE);
  CHECK(exf_ffn_tensor(first, "bank") != NULL);
  CHECK(exf_model_upcycle(g.model, &mb) == EXF_STATE);
  CHECK_ERR(ctx, EXF_STATE, "already has experts");
  CHECK(exf_ffn_merge(first) == EXF_OK);
  CHECK(exf_ffn_tensor(first, "bank") == NULL);
  CHECK(exf_model_n_params(g.model) == params + 1);
  after = tiny_eval(ctx, &g, &m);
  CHECK(n == m && same_bits(before, after, n));
  CHECK(exf_model_count_merged(g.model) == exf_model_count(g.model));
  CHECK(exf_model_count(g.model) > dense);
  free(before);
  free(after);
  CHECK_OK(ctx);
  exf_model_free(g.model);
  exf_ctx_free(ctx);
}

/* The rule's parameters stand right behind the parts, in order of creation. */
TEST(places_in_the_registry) {
  static const char *const want[] = {
    "mlp.experts.c_fc.weight", "mlp.experts.c_fc.bias", "mlp.experts.c_proj.weight",
    "mlp.experts.c_proj.bias", "mlp.router.weight", "mlp.router.bias", "behind"};
  lone l = lone_new(NULL, EXF_GELU);
  exf_param_desc d;
  exf_fusion_desc f = fusion_of(&my_mb, 3);
  memset(&d, 0, sizeof d);
  d.shape = exf_shape1(2);
  exf_param_new(l.model, "behind", &d);
  CHECK(exf_ffn_upcycle(l.ffn, &f) == EXF_OK);
  if (!CHECK(exf_model_n_params(l.model) == 7)) return;
  for (size_t i = 0; i < 7; i++) CHECK_STR(exf_model_param(l.model, i)->name, want[i]);
  CHECK(exf_ffn_merge(l.ffn) == EXF_OK);
  if (!CHECK(exf_model_n_params(l.model) == 5)) return;
  CHECK_STR(exf_model_param(l.model, 3)->name, "mlp.c_proj.bias");
  CHECK_STR(exf_model_param(l.model, 4)->name, "behind");
  lone_free(&l);
}

/* Each upcycling draws other experts, and what is frozen stays so. */
TEST(upcycling_again) {
  exf_fusion_desc f = fusion_of(&rows, 3);
  lone l = lone_new(NULL, EXF_GELU);
  exf_real first[3 * 5 * 4];
  f.upcycle = EXF_UP_INDEPENDENT;
  exf_param_freeze(exf_model_find(l.model, "mlp.c_fc.weight"), 1);
  for (int again = 0; again < 2; again++) {
    CHECK(exf_ffn_upcycle(l.ffn, &f) == EXF_OK);
    exf_param *e = exf_model_find(l.model, "mlp.experts.c_fc.weight");
    if (!CHECK(e != NULL && e->tensor.size == 3 * 5 * 4)) return;
    CHECK(e->frozen && !exf_model_find(l.model, "mlp.experts.c_proj.weight")->frozen);
    if (again) CHECK(!same_bits(first, e->tensor.data, 3 * 5 * 4));
    memcpy(first, e->tensor.data, sizeof first);
    CHECK(exf_ffn_merge(l.ffn) == EXF_OK);
    CHECK(exf_model_find(l.model, "mlp.c_fc.weight")->frozen);
    CHECK(!exf_model_find(l.model, "mlp.c_proj.weight")->frozen);
  }
  lone_free(&l);
}

/* A parameter of one's own under the name of what upcycling would make. */
TEST(names_that_are_taken) {
  static const char *const taken[] = {"mlp.experts.c_proj.bias", "mlp.bank"};
  for (int i = 0; i < 2; i++) {
    exf_fusion_desc f = tiny_variant(4, 3);
    lone l = lone_new(NULL, EXF_GELU);
    CHECK(exf_param_new(l.model, taken[i], NULL) != NULL);
    CHECK(exf_ffn_upcycle(l.ffn, &f) == EXF_ARG);
    CHECK_ERR(l.ctx, EXF_ARG, taken[i]);
    CHECK(exf_model_n_params(l.model) == 5 && l.ffn->fusion.variant == EXF_DENSE);
    lone_free(&l);
  }
}

int main(void) {
  RUN(gradients_are_right);
  RUN(gradients_of_experts);
  RUN(block_leaves_what_forward_returns);
  RUN(rules_from_outside_are_no_other_rules);
  RUN(training_saving_merging);
  RUN(checkpoints);
  RUN(diagnosis);
  RUN(calls_of_a_rule);
  RUN(step_of_a_rule_without_weights);
  RUN(wrong_rules_are_refused);
  RUN(wrong_results_are_refused);
  RUN(init_that_fails_leaves_nothing);
  RUN(parameters_are_made_by_init_alone);
  RUN(changes_are_all_or_nothing);
  RUN(merging_a_mixed_model);
  RUN(places_in_the_registry);
  RUN(upcycling_again);
  RUN(names_that_are_taken);
  TEST_MAIN_END;
}
