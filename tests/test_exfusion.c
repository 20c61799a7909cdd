/* The method: fusing, merging, upcycling, the memory bank, diagnostics and notices, for
   every variant, against plain loops where there is a formula. */
#ifndef TEST_LINKED    /* the Makefile links the implementation in */
#define EXFUSION_IMPLEMENTATION
#endif
#include "../exfusion.h"
#include "test.h"
#include "tiny_gpt.h"

#define MERGED TEST_TMP "/merged.safetensors"

typedef struct notices {
  int n;
  char text[4096];
} notices;
static void take_notice(void *user, const char *line) {
  notices *l = (notices *)user;
  l->n++;
  strncat(l->text, line, sizeof l->text - strlen(l->text) - 2);
  strcat(l->text, "\n");
}

static exf_ctx *new_ctx(uint64_t seed, notices *log) {
  exf_desc d;
  memset(&d, 0, sizeof d);
  d.seed = seed;
  d.n_threads = 2;
  if (log != NULL) {
    memset(log, 0, sizeof *log);
    d.log = take_notice;
    d.log_user = log;
  }
  return exf_ctx_new(&d);
}

/* Parameters of the dense model, by the formula. */
static size_t dense_count(const tiny_desc *d) {
  size_t C = d->width, F = d->hidden, b = d->bias ? 1 : 0;
  size_t matrices = d->act == EXF_SWIGLU ? 3 : 2;
  size_t ffn = matrices * C * F + b * (C + (matrices - 1) * F);
  size_t attn = 4 * C * C + b * 4 * C, norms = 2 * (C + b * C);
  return d->vocab * C + d->block * C + d->layers * (attn + ffn + norms) + C + b * C;
}

static exf_tensor *find(const exf_model *m, const char *name) {
  exf_param *p = exf_model_find(m, name);
  return p != NULL ? &p->tensor : NULL;
}

/* ---- merge ----------------------------------------------------------------------- */

static void check_merged_file(const tiny_desc *d, const exf_real *want, size_t n) {
  exf_ctx *ctx = new_ctx(77, NULL);
  tiny_desc dense = *d;
  tiny_gpt g;
  exf_st *st;
  exf_real *got;
  size_t i, k, m, elements = 0;
  dense.fusion = tiny_variant(0, 0);
  g = tiny_new(ctx, &dense);
  st = exf_st_open(ctx, MERGED, NULL);
  if (!CHECK(st != NULL)) return;
  for (i = 0; i < exf_st_count(st); i++) {
    const exf_st_entry *e = exf_st_get(st, i);
    size_t size = 1;
    CHECK(strstr(e->name, "expert") == NULL && strstr(e->name, "router") == NULL);
    CHECK(strstr(e->name, "bank") == NULL && strstr(e->name, "fusion") == NULL);
    CHECK_STR(e->dtype, "F32");
    for (k = 0; k < (size_t)e->n_dims; k++) size *= e->dim[k];
    elements += size;
  }
  CHECK(elements == dense_count(d) + d->vocab * d->width);   /* the tied name as well */
  CHECK(exf_st_find(st, "lm_head.weight") != NULL);
  CHECK(exf_st_find(st, "transformer.wte.weight") != NULL);
  CHECK(exf_model_load_st(g.model, st) == EXF_OK);
  exf_st_close(st);
  got = tiny_eval(ctx, &g, &m);
  CHECK(m == n && same_bits(got, want, n));
  CHECK_OK(ctx);
  free(got);
  exf_model_free(g.model);
  exf_ctx_free(ctx);
}

static void check_merge(int variant, int bias, exf_act act) {
  exf_ctx *ctx = new_ctx(1, NULL);
  tiny_desc d = tiny_defaults();
  exf_fusion_desc again = tiny_variant(1, 3);
  exf_optim *optim;
  exf_real *before, *same, *merged, *later, *up;
  size_t n, m, i;
  tiny_gpt g;
  d.bias = bias;
  d.act = act;
  d.fusion = tiny_variant(variant, 4);
  d.fusion.mu = 0.5;
  g = tiny_new(ctx, &d);
  CHECK(exf_model_count_merged(g.model) == dense_count(&d));
  optim = tiny_adamw(g.model);
  tiny_train(ctx, &g, optim, 0, 6, 1e-2);
  before = tiny_eval(ctx, &g, &n);
  CHECK(n > 0);
  CHECK(exf_model_save(g.model, MERGED, NULL, 0) == EXF_OK);
  same = tiny_eval(ctx, &g, &m);
  CHECK(same_bits(before, same, n));        /* saving left the model alone */
  check_merged_file(&d, before, n);

  /* merged in place; the optimizer is made anew */
  exf_optim_free(optim);
  CHECK(exf_model_merge(g.model) == EXF_OK);
  merged = tiny_eval(ctx, &g, &m);
  CHECK(m == n && same_bits(before, merged, n));
  CHECK(exf_model_count(g.model) == dense_count(&d));
  CHECK(exf_model_count_merged(g.model) == dense_count(&d));
  for (i = 0; i < exf_model_n_params(g.model); i++)
    CHECK(strstr(exf_model_param(g.model, i)->name, "expert") == NULL);
  for (i = 0; i < exf_model_n_ffns(g.model); i++)
    CHECK(exf_model_ffn(g.model, i)->fusion.variant == EXF_DENSE);

  /* trained on, upcycled again, trained on */
  optim = tiny_adamw(g.model);
  tiny_train(ctx, &g, optim, 6, 3, 1e-2);
  exf_optim_free(optim);
  later = tiny_eval(ctx, &g, &m);
  CHECK(m == n && max_diff(later, merged, n) > 1e-3);
  CHECK(exf_model_upcycle(g.model, &again) == EXF_OK);
  up = tiny_eval(ctx, &g, &m);
  CHECK(max_diff(later, up, n) < 1e-5);
  CHECK(exf_model_count(g.model) > dense_count(&d));
  CHECK(exf_model_count_merged(g.model) == dense_count(&d));
  optim = tiny_adamw(g.model);
  CHECK(tiny_train(ctx, &g, optim, 9, 3, 1e-2) > 0);
  exf_optim_free(optim);
  CHECK_OK(ctx);
  free(before); free(same); free(merged); free(later); free(up);
  exf_model_free(g.model);
  exf_ctx_free(ctx);
}
TEST(merge_changes_no_bit) {
  int v, bias;
  for (v = 0; v < TINY_N_VARIANTS; v++)
    for (bias = 0; bias < 2; bias++) check_merge(v, bias, EXF_GELU);
}
TEST(merge_changes_no_bit_with_swiglu) {
  int v;
  for (v = 0; v < TINY_N_VARIANTS; v++) check_merge(v, v & 1, EXF_SWIGLU);
}

/* An expert model loaded from a dense file must be made dense first; a merged model that
   is read back with another geometry names the tensor. */
TEST(merged_file_of_another_geometry_is_refused) {
  exf_ctx *ctx = new_ctx(1, NULL);
  tiny_desc d = tiny_defaults();
  tiny_gpt g = tiny_new(ctx, &d), h;
  exf_st *st;
  CHECK(exf_model_save(g.model, MERGED, NULL, 0) == EXF_OK);
  d.hidden += 1;
  h = tiny_new(ctx, &d);
  st = exf_st_open(ctx, MERGED, NULL);
  CHECK(st != NULL);
  CHECK(exf_model_load_st(h.model, st) == EXF_MISMATCH);
  CHECK_ERR(ctx, EXF_MISMATCH, "mlp");
  exf_st_close(st);
  exf_model_free(g.model);
  exf_model_free(h.model);
  exf_ctx_free(ctx);
}

/* A model that took its numbers from a file is a trained one: experts start from it. */
TEST(upcycling_keeps_what_was_loaded) {
  exf_ctx *ctx = new_ctx(1, NULL);
  tiny_desc d = tiny_defaults();
  tiny_gpt g = tiny_new(ctx, &d), h;
  exf_fusion_desc f = tiny_variant(4, 3);
  exf_optim *optim = tiny_adamw(g.model);
  exf_pair meta[2] = {{"note", "mine"}, {"format", "np"}};
  exf_real *want, *got;
  exf_st *st;
  size_t n, m;
  int i;
  tiny_train(ctx, &g, optim, 0, 3, 1e-2);
  want = tiny_eval(ctx, &g, &n);
  for (i = 0; i < 3; i++) {      /* a model, with a format of its own, a checkpoint */
    if (i == 2) exf_checkpoint_save(g.model, NULL, MERGED, NULL, 0);
    else exf_model_save(g.model, MERGED, meta, i == 0 ? 1 : 2);
    st = exf_st_open(ctx, MERGED, NULL);
    if (!CHECK(st != NULL)) return;
    CHECK_STR(exf_st_meta(st, "format"), i == 1 ? "np" : "pt");
    if (i < 2) CHECK_STR(exf_st_meta(st, "note"), "mine");
    h = tiny_new(ctx, &d);
    h.wte->data[0] += 1;
    CHECK((i == 2 ? exf_checkpoint_load_st(h.model, NULL, st)
                  : exf_model_load_st(h.model, st)) == EXF_OK);
    CHECK(exf_model_upcycle(h.model, &f) == EXF_OK);
    got = tiny_eval(ctx, &h, &m);
    CHECK(m == n && max_diff(want, got, n) < 1e-5);
    free(got);
    exf_st_close(st);
    exf_model_free(h.model);
  }
  CHECK_OK(ctx);
  free(want);
  exf_optim_free(optim);
  exf_model_free(g.model);
  exf_ctx_free(ctx);
}

/* ---- one FFN --------------------------------------------------------------------- */

typedef struct lone {
  exf_ctx *ctx;
  exf_model *model;
  exf_ffn *ffn;
} lone;

static lone lone_new(uint64_t seed, size_t width, size_t hidden, int bias,
                     exf_fusion_desc fusion) {
  exf_ffn_desc d;
  lone l;
  l.ctx = new_ctx(seed, NULL);
  l.model = exf_model_new(l.ctx);
  memset(&d, 0, sizeof d);
  d.width = width;
  d.hidden = hidden;
  d.bias = bias;
  d.fusion = fusion;
  l.ffn = exf_ffn_new(l.model, "mlp", &d);
  return l;
}
static void lone_free(lone *l) {
  CHECK_OK(l->ctx);
  exf_model_free(l->model);
  exf_ctx_free(l->ctx);
}
static exf_tensor *lone_input(lone *l, size_t rows, size_t width, uint32_t salt) {
  exf_tensor *x = exf_tensor_new(l->ctx, exf_shape2(rows, width), NULL);
  size_t i;
  for (i = 0; x != NULL && i < x->size; i++)
    x->data[i] = (exf_real)(0.3 + exf_rng_normal(21, salt, 0, i));
  return x;
}
/* sum of y times fixed numbers, backward */
static void lone_backward(lone *l, exf_tensor *y) {
  exf_tensor *c = lone_input(l, y ? y->shape.dim[0] : 1, y ? y->shape.dim[1] : 1, 900);
  exf_backward(l->ctx, exf_sum(l->ctx, exf_mul(l->ctx, y, c), EXF_ALL_AXES, 0));
}
static double deviation(const exf_real *x, size_t n) {
  double s = 0, q = 0;
  size_t i;
  for (i = 0; i < n; i++) {
    s += (double)x[i];
    q += (double)x[i] * (double)x[i];
  }
  return sqrt(q / (double)n - s / (double)n * (s / (double)n));
}
static exf_real *fused_copy(const exf_tensor *e, const double *a, size_t n_experts) {
  size_t i, j, n = e->size / n_experts;
  exf_real *out = (exf_real *)malloc(n * sizeof *out);
  for (j = 0; j < n; j++) {
    double v = 0;
    for (i = 0; i < n_experts; i++) v += a[i] * (double)e->data[i * n + j];
    out[j] = (exf_real)v;
  }
  return out;
}

/* Axes of more than 16 bits come out of a merge as they are. */
TEST(wide_layers_are_merged) {
  enum { WIDE = 70000 };
  lone l = lone_new(3, 1, WIDE, 0, tiny_variant(1, 2));
  exf_st *st;
  const exf_st_entry *up, *down;
  CHECK(exf_model_save(l.model, MERGED, NULL, 0) == EXF_OK);
  st = exf_st_open(l.ctx, MERGED, NULL);
  up = exf_st_find(st, "mlp.c_fc.weight");
  down = exf_st_find(st, "mlp.c_proj.weight");
  CHECK(up && up->n_dims == 2 && up->dim[0] == WIDE && up->dim[1] == 1);
  CHECK(down && down->n_dims == 2 && down->dim[0] == 1 && down->dim[1] == WIDE);
  exf_st_close(st);
  lone_free(&l);
}

#define W1 "mlp.c_fc.weight"
#define E1 "mlp.experts.c_fc.weight"
#define E2 "mlp.experts.c_proj.weight"
#define B1 "mlp.experts.c_fc.bias"
static const double quarter[4] = {0.25, 0.25, 0.25, 0.25};

TEST(upcycling_from_scratch) {
  exf_fusion_desc none, f = tiny_variant(1, 4);
  size_t n = 64 * 256;
  lone dense, l;
  exf_tensor *w, *e;
  exf_real *th;
  double std0;
  memset(&none, 0, sizeof none);
  dense = lone_new(3, 64, 256, 0, none);
  w = find(dense.model, W1);
  if (!CHECK(w != NULL && w->size == n)) return;
  std0 = deviation(w->data, n);
  CHECK_NEAR(std0, 1 / sqrt(64.0), 0.03 / sqrt(64.0));

  /* default: independent draws, the fused set has the dense distribution */
  l = lone_new(3, 64, 256, 0, f);
  CHECK(l.ffn->fusion.upcycle == EXF_UP_INDEPENDENT);
  e = find(l.model, E1);
  if (!CHECK(e != NULL && e->size == 4 * n)) return;
  CHECK(e->shape.n == 3 && e->shape.dim[0] == 4 && e->shape.dim[1] == 256
        && e->shape.dim[2] == 64);
  th = fused_copy(e, quarter, 4);
  CHECK_NEAR(deviation(th, n), std0, 0.04 * std0);
  CHECK_NEAR(deviation(e->data + n, n), 2 * std0, 0.04 * std0);
  free(th);
  lone_free(&l);

  f.upcycle = EXF_UP_INDEPENDENT_PLAIN;
  l = lone_new(3, 64, 256, 0, f);
  e = find(l.model, E1);
  th = fused_copy(e, quarter, 4);
  CHECK_NEAR(deviation(th, n), std0 / 2, 0.03 * std0);
  CHECK(same_bits(e->data, w->data, n));     /* expert 0: the dense FFN's streams */
  CHECK(!same_bits(e->data + n, w->data, n));
  free(th);
  lone_free(&l);

  f.upcycle = EXF_UP_COPY;
  l = lone_new(3, 64, 256, 0, f);
  e = find(l.model, E1);
  CHECK(same_bits(e->data, w->data, n) && same_bits(e->data + 3 * n, w->data, n));
  lone_free(&l);
  lone_free(&dense);
}

TEST(zerosum_keeps_the_function) {
  static const int variants[] = {1, 2, 3, 4, 5};
  size_t v, n, m;
  for (v = 0; v < 5; v++) {
    exf_ctx *ctx = new_ctx(4, NULL);
    tiny_desc d = tiny_defaults();
    exf_fusion_desc f = tiny_variant(variants[v], 4);
    exf_optim *optim;
    exf_real *before, *after, *th0, *th;
    exf_tensor *w, *e;
    double std0;
    tiny_gpt g;
    d.bias = 1;
    d.fusion = tiny_variant(0, 0);
    g = tiny_new(ctx, &d);
    optim = tiny_adamw(g.model);
    tiny_train(ctx, &g, optim, 0, 5, 1e-2);
    exf_optim_free(optim);
    before = tiny_eval(ctx, &g, &n);
    w = find(g.model, "transformer.h.1.mlp.c_fc.weight");
    if (!CHECK(w != NULL)) return;
    m = w->size;
    th0 = (exf_real *)malloc(m * sizeof *th0);
    memcpy(th0, w->data, m * sizeof *th0);
    CHECK(exf_model_upcycle(g.model, &f) == EXF_OK);
    CHECK(exf_model_ffn(g.model, 0)->fusion.upcycle == EXF_UP_ZEROSUM);
    after = tiny_eval(ctx, &g, &n);
    CHECK(max_diff(before, after, n) < 1e-5);
    e = find(g.model, "transformer.h.1.mlp.experts.c_fc.weight");
    if (!CHECK(e != NULL && e->size == 4 * m)) return;
    th = fused_copy(e, quarter, 4);
    CHECK(max_diff(th, th0, m) < 1e-6);
    /* and the experts really differ, by s e_i with e_i of the layer's deviation */
    std0 = deviation(th0, m);
    CHECK_NEAR(deviation(e->data, m),
               sqrt(std0 * std0 + 0.75 * d.init_std * d.init_std), 0.15 * d.init_std);
    CHECK_OK(ctx);
    free(before); free(after); free(th0); free(th);
    exf_model_free(g.model);
    exf_ctx_free(ctx);
  }
}

TEST(zerosum_spread_scales_the_differences) {
  double spread[4] = {1, 0.25, 0, EXF_ZERO}, d[4];
  int i;
  for (i = 0; i < 4; i++) {
    exf_fusion_desc f = tiny_variant(1, 4), none;
    double each[4];
    lone l;
    memset(&none, 0, sizeof none);
    l = lone_new(3, 16, 32, 1, none);
    f.upcycle = EXF_UP_ZEROSUM;
    f.spread = spread[i];
    CHECK(exf_ffn_upcycle(l.ffn, &f) == EXF_OK);
    exf_ffn_diagnose(l.ffn, NULL, NULL, each);
    d[i] = each[2];
    CHECK(i == 3 ? d[i] < 1e-7 : d[i] > 0.01);      /* spread 0: copies */
    lone_free(&l);
  }
  CHECK_NEAR(d[1] / d[0], 0.25, 1e-4);
  CHECK(d[2] == d[0]);
}

/* A fraction of hidden units is drawn afresh: row of W1, b1, column of W2 together. */
TEST(drop_redraws_whole_hidden_units) {
  size_t C = 8, H = 40, i, j, h;
  exf_fusion_desc f = tiny_variant(1, 3), none;
  exf_tensor *w1, *w2, *e1, *e2;
  exf_real *o1, *o2;
  lone l;
  memset(&none, 0, sizeof none);
  l = lone_new(3, C, H, 0, none);
  w1 = find(l.model, W1);
  w2 = find(l.model, "mlp.c_proj.weight");
  if (!CHECK(w1 != NULL && w2 != NULL)) return;
  o1 = (exf_real *)malloc(C * H * sizeof *o1);
  o2 = (exf_real *)malloc(C * H * sizeof *o2);
  memcpy(o1, w1->data, C * H * sizeof *o1);
  memcpy(o2, w2->data, C * H * sizeof *o2);
  f.upcycle = EXF_UP_DROP;
  f.drop = 0.25;
  CHECK(exf_ffn_upcycle(l.ffn, &f) == EXF_OK);
  e1 = find(l.model, E1);
  e2 = find(l.model, E2);
  if (!CHECK(e1 != NULL && e2 != NULL)) return;
  for (i = 0; i < 3; i++) {
    size_t fresh = 0;
    for (h = 0; h < H; h++) {
      const exf_real *row = e1->data + (i * H + h) * C;
      size_t changed1 = 0, changed2 = 0;
      for (j = 0; j < C; j++) {
        changed1 += row[j] != o1[h * C + j];
        changed2 += e2->data[(i * C + j) * H + h] != o2[j * H + h];
      }
      CHECK((changed1 == 0 && changed2 == 0) || (changed1 == C && changed2 == C));
      fresh += changed1 == C;
    }
    CHECK(fresh >= H / 10 && fresh <= H / 2);
  }
  CHECK(!same_bits(e1->data, e1->data + C * H, C * H));   /* other units in each */
  free(o1); free(o2);
  lone_free(&l);
}

TEST(copies_never_separate) {
  exf_ctx *ctx = new_ctx(4, NULL);
  tiny_desc d = tiny_defaults();
  exf_optim *optim;
  double each[4];
  tiny_gpt g;
  size_t i;
  d.fusion = tiny_variant(1, 4);
  d.fusion.upcycle = EXF_UP_COPY;
  g = tiny_new(ctx, &d);
  optim = tiny_adamw(g.model);
  tiny_train(ctx, &g, optim, 0, 10, 1e-2);
  for (i = 0; i < exf_model_n_ffns(g.model); i++) {
    size_t k;
    exf_ffn_diagnose(exf_model_ffn(g.model, i), NULL, NULL, each);
    for (k = 0; k < 4; k++) CHECK(each[k] >= 0 && each[k] < 1e-6);
  }
  CHECK(exf_model_n_ffns(g.model) == 2);
  CHECK_OK(ctx);
  exf_optim_free(optim);
  exf_model_free(g.model);
  exf_ctx_free(ctx);
}

/* ---- virtual gradients ----------------------------------------------------------- */

/* exf_expert_grad of an FFN against the op fuse on plain parameters, and a_i G. */
TEST(expert_gradients_are_a_times_G) {
  size_t C = 6, H = 9, N = 3, i, j;
  exf_fusion_desc f = tiny_variant(2, 3);
  exf_param_desc p;
  exf_tensor *a, *e1, *e2, *pa, *p1, *p2, *x, *y;
  exf_real *g1, *g2;
  lone l = lone_new(3, C, H, 0, f);
  memset(&p, 0, sizeof p);
  a = find(l.model, "mlp.fusion.weight");
  e1 = find(l.model, E1);
  e2 = find(l.model, E2);
  if (!CHECK(a != NULL && e1 != NULL && e2 != NULL)) return;
  p.shape = exf_shape1(N);
  pa = exf_param_new(l.model, "plain.a", &p);
  p.shape = exf_shape3(N, H, C);
  p1 = exf_param_new(l.model, "plain.1", &p);
  p.shape = exf_shape3(N, C, H);
  p2 = exf_param_new(l.model, "plain.2", &p);
  if (!CHECK(pa != NULL && p1 != NULL && p2 != NULL)) return;
  for (i = 0; i < N; i++) a->data[i] = (exf_real)(0.2 + 0.3 * (double)i);
  memcpy(pa->data, a->data, N * sizeof *a->data);
  memcpy(p1->data, e1->data, e1->size * sizeof *e1->data);
  memcpy(p2->data, e2->data, e2->size * sizeof *e2->data);

  lone_backward(&l, exf_ffn_forward(l.ctx, l.ffn, lone_input(&l, 5, C, 1)));
  exf_rewind(l.ctx);
  x = lone_input(&l, 5, C, 1);
  y = exf_linear(l.ctx, x, exf_fuse(l.ctx, pa, p1), NULL);
  y = exf_linear(l.ctx, exf_gelu(l.ctx, y), exf_fuse(l.ctx, pa, p2), NULL);
  lone_backward(&l, y);
  exf_rewind(l.ctx);

  g1 = (exf_real *)malloc(e1->size * sizeof *g1);
  g2 = (exf_real *)malloc(e2->size * sizeof *g2);
  CHECK(exf_expert_grad(exf_model_find(l.model, E1), g1) == EXF_OK);
  CHECK(exf_expert_grad(exf_model_find(l.model, E2), g2) == EXF_OK);
  if (!CHECK(p1->grad != NULL && p2->grad != NULL && pa->grad != NULL)) return;
  if (!CHECK(e1->grad != NULL && a->grad != NULL)) return;
  CHECK(max_diff(g1, p1->grad, e1->size) < 1e-5);
  CHECK(max_diff(g2, p2->grad, e2->size) < 1e-5);
  CHECK(max_diff(a->grad, pa->grad, N) < 2e-5);
  CHECK(deviation(g1, e1->size) > 1e-2);
  for (i = 0; i < N; i++)
    for (j = 0; j < H * C; j++)
      CHECK_NEAR(g1[i * H * C + j], a->data[i] * e1->grad[j], 1e-7);
  /* of an ordinary parameter: its own gradient */
  CHECK(exf_expert_grad(exf_model_find(l.model, "plain.1"), g1) == EXF_OK);
  CHECK(same_bits(g1, p1->grad, p1->size));
  /* none gathered */
  exf_model_zero_grad(l.model);
  CHECK(exf_expert_grad(exf_model_find(l.model, E1), g1) == EXF_STATE);
  CHECK_ERR(l.ctx, EXF_STATE, "experts.c_fc.weight");
  /* experts gather G alone: no other op may write to it */
  CHECK(exf_square(l.ctx, e1) == NULL);
  CHECK_ERR(l.ctx, EXF_ARG, "only exf_fuse");
  CHECK(exf_fuse(l.ctx, a, e1) != NULL);
  CHECK(exf_square(l.ctx, exf_detach(l.ctx, e1)) != NULL);
  free(g1); free(g2);
  lone_free(&l);
}

/* Raw weights under gradient flow conserve a_i^2 - ||th_i||^2. */
TEST(raw_weights_conserve_their_invariant) {
  size_t C = 6, H = 9, N = 3, i, j, s;
  lone l = lone_new(3, C, H, 1, tiny_variant(2, 3));
  exf_tensor *part[5];
  exf_optim_desc o;
  exf_optim *optim;
  double start[3], moved = 0, drift = 0;
  memset(&o, 0, sizeof o);
  o.kind = EXF_SGD;
  optim = exf_optim_new(l.model, &o);
  part[0] = find(l.model, E1);
  part[1] = find(l.model, E2);
  part[2] = find(l.model, B1);
  part[3] = find(l.model, "mlp.experts.c_proj.bias");
  part[4] = find(l.model, "mlp.fusion.weight");
  for (i = 0; i < 5; i++) if (!CHECK(part[i] != NULL)) return;
  for (s = 0; s <= 200; s++) {
    exf_tensor *y;
    for (i = 0; i < N; i++) {
      double a = (double)part[4]->data[i], q = 0, *now;
      size_t k;
      for (k = 0; k < 4; k++)
        for (j = 0; j < part[k]->size / N; j++) {
          double v = (double)part[k]->data[i * (part[k]->size / N) + j];
          q += v * v;
        }
      now = &start[i];
      if (s == 0) *now = a * a - q;
      if (s == 200) {
        drift = fmax(drift, fabs(a * a - q - *now));
        moved = fmax(moved, fabs(a * a - 1.0 / 9));
      }
    }
    exf_step_begin(l.ctx, s);
    y = exf_ffn_forward(l.ctx, l.ffn, lone_input(&l, 20, C, 1));
    exf_backward(l.ctx, exf_mean(l.ctx, exf_square(l.ctx, exf_sub(l.ctx, y,
                 lone_input(&l, 20, C, 2))), EXF_ALL_AXES, 0));
    exf_optim_step(optim, 1e-2, NULL);
    exf_rewind(l.ctx);
  }
  CHECK(moved > 1e-3);
  CHECK(drift < 0.02 * moved);
  exf_optim_free(optim);
  lone_free(&l);
}

/* ---- memory bank ----------------------------------------------------------------- */

static void bank_of(const lone *l, double *bank) {
  exf_ffn_diagnose(l->ffn, bank, NULL, NULL);
}

/* r = softmax(R mean(x) + c) */
static void router_by_hand(const lone *l, const exf_tensor *x, size_t N, double *r) {
  const exf_tensor *R = find(l->model, "mlp.router.weight");
  const exf_tensor *c = find(l->model, "mlp.router.bias");
  size_t C = x->shape.dim[1], rows = x->shape.dim[0], i, j, t;
  double top = -1e300, sum = 0;
  for (i = 0; i < N; i++) {
    r[i] = (double)c->data[i];
    for (j = 0; j < C; j++) {
      double u = 0;
      for (t = 0; t < rows; t++) u += (double)x->data[t * C + j] / (double)rows;
      r[i] += (double)R->data[i * C + j] * u;
    }
    top = fmax(top, r[i]);
  }
  for (i = 0; i < N; i++) sum += r[i] = exp(r[i] - top);
  for (i = 0; i < N; i++) r[i] /= sum;
}

static void check_bank(int routed, size_t accum, double mu) {
  size_t C = 6, N = 3, s, k, i;
  exf_fusion_desc f = tiny_variant(4, 3);
  exf_optim_desc o;
  exf_optim *optim;
  double want[3] = {1.0 / 3, 1.0 / 3, 1.0 / 3}, got[3];
  exf_tensor *R;
  lone l;
  f.routed = routed;
  f.mu = mu;
  l = lone_new(3, C, 9, 1, f);
  if (mu <= 0) mu = mu == EXF_ZERO ? 0 : 0.95;
  CHECK_NEAR(l.ffn->fusion.mu, mu, 1e-12);
  memset(&o, 0, sizeof o);
  o.kind = EXF_SGD;
  optim = exf_optim_new(l.model, &o);
  R = find(l.model, "mlp.router.weight");
  if (!CHECK(R != NULL && R->shape.dim[0] == N && R->shape.dim[1] == C)) return;
  for (i = 0; i < R->size; i++) R->data[i] *= 40;   /* a router that has opinions */
  bank_of(&l, got);
  for (i = 0; i < N; i++) CHECK_NEAR(got[i], want[i], 1e-7);
  for (s = 0; s < 4; s++) {
    double mean[3] = {0, 0, 0}, r[3], seen[3];
    exf_step_begin(l.ctx, s);
    exf_training_set(l.ctx, 1);
    for (k = 0; k < accum; k++) {
      exf_tensor *x = lone_input(&l, 7, C, (uint32_t)(10 + s * 10 + k));
      router_by_hand(&l, x, N, r);
      for (i = 0; i < N; i++) mean[i] += r[i] / (double)accum;
      lone_backward(&l, exf_ffn_forward(l.ctx, l.ffn, x));
      exf_ffn_diagnose(l.ffn, got, seen, NULL);
      for (i = 0; i < N; i++) {
        CHECK_NEAR(seen[i], r[i], 1e-5);
        CHECK_NEAR(got[i], want[i], 1e-6);        /* not before the optimizer's step */
      }
      exf_rewind(l.ctx);
    }
    exf_training_set(l.ctx, 0);
    exf_ffn_forward(l.ctx, l.ffn, lone_input(&l, 7, C, 500));  /* evaluation */
    exf_rewind(l.ctx);
    CHECK(exf_optim_step(optim, 1e-3, NULL) == EXF_OK);
    for (i = 0; i < N; i++) want[i] = mu * want[i] + (1 - mu) * mean[i];
    bank_of(&l, got);
    for (i = 0; i < N; i++) CHECK_NEAR(got[i], want[i], 2e-6);
  }
  CHECK(fabs(want[0] - 1.0 / 3) > 1e-3);
  /* evaluation never moves it */
  for (s = 0; s < 3; s++) exf_ffn_forward(l.ctx, l.ffn, lone_input(&l, 7, C, 501));
  exf_rewind(l.ctx);
  bank_of(&l, got);
  for (i = 0; i < N; i++) CHECK_NEAR(got[i], want[i], 2e-6);
  exf_optim_free(optim);
  lone_free(&l);
}
TEST(bank_follows_its_rule) {
  check_bank(0, 1, 0);
  check_bank(0, 1, 0.6);
  check_bank(0, 1, EXF_ZERO);
}
TEST(bank_follows_its_rule_with_accumulation) {
  check_bank(0, 3, 0.6);
  check_bank(1, 3, 0.6);
}
TEST(bank_of_routed_records) {
  check_bank(1, 1, 0);
  check_bank(1, 1, 0.6);
}

/* The forward pass of training uses a = mu M + (1 - mu) r, routed a = r, evaluation M. */
TEST(training_and_evaluation_weights_of_mb) {
  int routed;
  for (routed = 0; routed < 2; routed++) {
    size_t C = 6, H = 9, N = 3, i, j;
    exf_fusion_desc f = tiny_variant(4, 3);
    double a[3], r[3], eval[3] = {1.0 / 3, 1.0 / 3, 1.0 / 3};
    int training;
    lone l;
    exf_tensor *R;
    f.routed = routed;
    f.mu = 0.6;
    l = lone_new(3, C, H, 0, f);
    R = find(l.model, "mlp.router.weight");
    if (!CHECK(R != NULL)) return;
    for (i = 0; i < R->size; i++) R->data[i] *= 40;
    for (training = 0; training < 2; training++) {
      exf_tensor *x = lone_input(&l, 7, C, 3), *y, *z;
      exf_real *th1, *th2;
      router_by_hand(&l, x, N, r);
      for (i = 0; i < N; i++)
        a[i] = !training ? eval[i] : routed ? r[i] : 0.6 / 3 + 0.4 * r[i];
      exf_training_set(l.ctx, training);
      y = exf_ffn_forward(l.ctx, l.ffn, x);
      th1 = fused_copy(find(l.model, E1), a, N);
      th2 = fused_copy(find(l.model, E2), a, N);
      z = exf_linear(l.ctx, x, exf_tensor_new(l.ctx, exf_shape2(H, C), th1), NULL);
      z = exf_linear(l.ctx, exf_gelu(l.ctx, z),
                     exf_tensor_new(l.ctx, exf_shape2(C, H), th2), NULL);
      if (!CHECK(y != NULL && z != NULL)) return;
      for (j = 0; j < y->size; j++) CHECK_NEAR(y->data[j], z->data[j], 1e-5);
      free(th1); free(th2);
      exf_rewind(l.ctx);
    }
    CHECK(fabs(r[0] - 1.0 / 3) > 0.02);
    lone_free(&l);
  }
}

/* Frozen experts: the router still learns, and the bank follows it. */
TEST(bank_of_frozen_experts_moves) {
  exf_fusion_desc f = tiny_variant(4, 3);
  exf_optim_desc o;
  exf_optim *optim;
  double before[3], after[3];
  exf_real kept[3 * 9 * 6];
  exf_tensor *e;
  exf_param *p;
  lone l;
  f.mu = 0.5;
  l = lone_new(3, 6, 9, 0, f);
  memset(&o, 0, sizeof o);
  optim = exf_optim_new(l.model, &o);
  p = exf_model_find(l.model, E1);
  e = find(l.model, E1);
  if (!CHECK(p != NULL && e != NULL && e->size == 3 * 9 * 6)) return;
  memcpy(kept, e->data, sizeof kept);
  exf_param_freeze(p, 1);
  exf_param_freeze(exf_model_find(l.model, E2), 1);
  bank_of(&l, before);
  exf_training_set(l.ctx, 1);
  exf_step_begin(l.ctx, 0);
  lone_backward(&l, exf_ffn_forward(l.ctx, l.ffn, lone_input(&l, 7, 6, 3)));
  exf_rewind(l.ctx);
  CHECK(exf_optim_step(optim, 0.1, NULL) == EXF_OK);
  bank_of(&l, after);
  CHECK(fabs(after[0] - before[0]) > 1e-4);
  CHECK(same_bits(kept, e->data, e->size));
  exf_optim_free(optim);
  lone_free(&l);
}

/* ---- diagnostics and notices ----------------------------------------------------- */

TEST(diagnostics_by_hand) {
  int v;
  for (v = 0; v < TINY_N_VARIANTS; v++) {
    size_t N = 4, C = 6, H = 9, i, j, k;
    double w[4] = {0, 0, 0, 0}, r[4], d[4], n_eff, sum = 0, square = 0;
    lone l = lone_new(3, C, H, 1, tiny_variant(v, N));
    exf_tensor *part[4];
    if (v == 0) {
      CHECK(exf_ffn_diagnose(l.ffn, NULL, NULL, NULL) == 1);
      lone_free(&l);
      continue;
    }
    part[0] = find(l.model, E1);
    part[1] = find(l.model, E2);
    part[2] = find(l.model, B1);
    part[3] = find(l.model, "mlp.experts.c_proj.bias");
    for (i = 0; i < 4; i++) if (!CHECK(part[i] != NULL)) return;
    if (v == 2) {       /* free weights, of both signs */
      exf_tensor *a = find(l.model, "mlp.fusion.weight");
      if (!CHECK(a != NULL)) return;
      a->data[0] = (exf_real)-0.5;
      a->data[3] = 1;
    }
    exf_training_set(l.ctx, 1);
    exf_ffn_forward(l.ctx, l.ffn, lone_input(&l, 5, C, 1));
    exf_rewind(l.ctx);
    n_eff = exf_ffn_diagnose(l.ffn, w, r, d);
    for (i = 0; i < N; i++) {
      sum += fabs(w[i]);
      square += w[i] * w[i];
    }
    CHECK_NEAR(n_eff, sum * sum / square, 1e-9);
    CHECK(v == 2 ? n_eff < 4 : fabs(n_eff - 4) < 1e-6);
    if (v != 2) CHECK_NEAR(sum, 1, 1e-6);
    if (v >= 4) CHECK_NEAR(r[0] + r[1] + r[2] + r[3], 1, 1e-6);
    for (i = 0; i < N; i++) {
      double above = 0, below = 0;
      for (k = 0; k < 4; k++) {
        size_t n = part[k]->size / N;
        for (j = 0; j < n; j++) {
          double th = 0, e;
          size_t q;
          for (q = 0; q < N; q++) th += w[q] * (double)part[k]->data[q * n + j];
          e = (double)part[k]->data[i * n + j] - th;
          above += e * e;
          below += th * th;
        }
      }
      CHECK_NEAR(d[i], sqrt(above / below), 1e-5 * sqrt(above / below));
      CHECK(d[i] > 0.1);
    }
    lone_free(&l);
  }
}

TEST(predicted_decay_of_differences) {
  exf_schedule s;
  double product = 1;
  uint64_t t;
  memset(&s, 0, sizeof s);
  s.lr = 1e-3;
  s.min_lr = 1e-4;
  s.warmup = 100;
  s.steps = 2000;
  for (t = 0; t < 2000; t++) product *= 1 - exf_schedule_lr(&s, t) * 0.1;
  CHECK_NEAR(exf_expert_decay(&s, 0.1), product, 1e-12);
  CHECK_NEAR(product, 0.90, 0.01);      /* the figure of the character model */
}

static int notices_of(int variant, size_t N, exf_upcycle up, exf_optim_kind kind,
                      notices *log) {
  exf_ctx *ctx = new_ctx(1, log);
  tiny_desc d = tiny_defaults();
  exf_optim_desc o;
  exf_optim *optim;
  tiny_gpt g;
  int n;
  memset(&o, 0, sizeof o);
  o.kind = kind;
  d.fusion = tiny_variant(variant, N);
  d.fusion.upcycle = up;
  g = tiny_new(ctx, &d);
  optim = exf_optim_new(g.model, &o);
  log->n = 0;
  log->text[0] = 0;
  n = exf_notices(g.model, optim);
  CHECK_OK(ctx);
  CHECK(n == log->n);
  exf_optim_free(optim);
  exf_model_free(g.model);
  exf_ctx_free(ctx);
  return n;
}
TEST(notices_fire) {
  notices log;
  CHECK(notices_of(4, 1, EXF_UP_DEFAULT, EXF_ADAMW, &log) >= 1);
  CHECK_HAS(log.text, "one expert");
  CHECK(notices_of(3, 1, EXF_UP_COPY, EXF_ADAMW, &log) == 1);   /* which says it all */
  CHECK_HAS(log.text, "one expert");
  CHECK(notices_of(3, 4, EXF_UP_COPY, EXF_ADAMW, &log) >= 1);
  CHECK_HAS(log.text, "cop");
  CHECK_HAS(log.text, "notice: transformer.h.0.mlp (2 of 2 FFNs): ");
  CHECK(notices_of(1, 4, EXF_UP_DEFAULT, EXF_ADAMW, &log) >= 1);
  CHECK_HAS(log.text, "sw");
  CHECK_HAS(log.text, "Adam");
}
TEST(notices_stay_silent) {
  notices log;
  CHECK(notices_of(0, 0, EXF_UP_DEFAULT, EXF_ADAMW, &log) == 0);
  CHECK(notices_of(2, 4, EXF_UP_DEFAULT, EXF_ADAMW, &log) == 0);
  CHECK(notices_of(3, 4, EXF_UP_DEFAULT, EXF_ADAMW, &log) == 0);
}

/* ---- refusals -------------------------------------------------------------------- */

TEST(wrong_descriptors_are_refused) {
  exf_fusion_desc f = tiny_variant(1, 4), none;
  exf_ffn_desc d;
  lone l;
  int i;
  memset(&none, 0, sizeof none);
  memset(&d, 0, sizeof d);
  l = lone_new(3, 6, 9, 0, none);
  f.variant = (exf_variant)17;
  CHECK(exf_ffn_upcycle(l.ffn, &f) == EXF_ARG);
  CHECK_ERR(l.ctx, EXF_ARG, "variant");
  f = tiny_variant(1, 4);
  for (i = 0; i < 3; i++) {      /* below zero there is EXF_ZERO alone */
    f.mu = i == 0 ? -0.5 : 0;
    f.spread = i == 1 ? -2 : 0;
    f.drop = i == 2 ? -0.1 : 0;
    CHECK(exf_ffn_upcycle(l.ffn, &f) == EXF_ARG);
    CHECK_ERR(l.ctx, EXF_ARG, i == 0 ? "mu -0.5" : i == 1 ? "spread -2" : "drop -0.1");
  }
  f.drop = 0;
  CHECK(exf_ffn_upcycle(l.ffn, &f) == EXF_OK);
  CHECK(exf_ffn_upcycle(l.ffn, &f) == EXF_STATE);      /* merge first */
  CHECK_ERR(l.ctx, EXF_STATE, "merge");
  CHECK(exf_ffn_merge(l.ffn) == EXF_OK);
  CHECK(exf_ffn_merge(l.ffn) == EXF_OK);               /* a dense FFN: nothing */
  f.n_experts = (size_t)-1 / 4;
  CHECK(exf_ffn_upcycle(l.ffn, &f) != EXF_OK);
  CHECK(exf_ctx_status(l.ctx) == EXF_SIZE || exf_ctx_status(l.ctx) == EXF_MEMORY
        || exf_ctx_status(l.ctx) == EXF_ARG);
  exf_error_clear(l.ctx);
  /* and the FFN is still what it was */
  CHECK(exf_ffn_forward(l.ctx, l.ffn, lone_input(&l, 2, 6, 1)) != NULL);
  exf_rewind(l.ctx);
  CHECK(exf_ffn_new(l.model, "second", &d) == NULL);   /* no width */
  CHECK_ERR(l.ctx, EXF_ARG, "width");
  CHECK(exf_param_alias(l.model, "", W1) == EXF_ARG);
  CHECK_ERR(l.ctx, EXF_ARG, "empty");
  lone_free(&l);
}

TEST(enums_have_names) {
#define NAME(name, text) text,
  static const char *const act[] = {EXF_ACT_LIST(NAME)};
  static const char *const up[] = {EXF_UPCYCLE_LIST(NAME)};
  static const char *const variant[] = {"dense", "sw", "dw", "mb", "rule", "?"};
#undef NAME
  int i;
  CHECK(sizeof act / sizeof *act == EXF_N_ACTS && EXF_N_ACTS == 5);
  CHECK(sizeof up / sizeof *up == EXF_N_UPCYCLES && EXF_N_UPCYCLES == 6);
  CHECK_STR(act[EXF_GELU_TANH], "gelu_tanh");
  CHECK_STR(act[EXF_SWIGLU], "swiglu");
  CHECK_STR(up[EXF_UP_DEFAULT], "default");
  CHECK_STR(up[EXF_UP_INDEPENDENT_PLAIN], "independent-plain");
  CHECK_STR(up[EXF_UP_DROP], "drop");
  for (i = 0; i < 6; i++) CHECK_STR(exf_variant_name((exf_variant)i), variant[i]);
}

/* The router is the first to see an input of another width. */
TEST(input_of_another_width_is_refused) {
  lone l = lone_new(3, 6, 9, 0, tiny_variant(4, 3));
  exf_training_set(l.ctx, 1);
  CHECK(exf_ffn_forward(l.ctx, l.ffn, lone_input(&l, 2, 5, 1)) == NULL);
  CHECK_ERR(l.ctx, EXF_SHAPE, "ffn: 'mlp' takes (..,6), not (2,5)");
  CHECK(exf_ffn_forward(l.ctx, l.ffn, exf_tensor_new(l.ctx, exf_shape0(), NULL)) == NULL);
  CHECK_ERR(l.ctx, EXF_SHAPE, "not ()");
  lone_free(&l);
}

/* Names that fit until a part, or "experts", is added: nothing is left of the attempt. */
TEST(names_that_grow_too_long_are_refused) {
  exf_fusion_desc f = tiny_variant(1, 2), none;
  exf_block_desc b;
  exf_ffn_desc d;
  exf_ffn *ffn;
  lone l;
  char name[300];
  size_t length, had, refused = 0;
  memset(&none, 0, sizeof none);
  memset(&b, 0, sizeof b);
  memset(&d, 0, sizeof d);
  b.width = d.width = 2;
  b.n_heads = 1;
  l = lone_new(3, 2, 2, 0, none);
  for (length = 230; length < 260; length++) {
    memset(name, 'x', length);
    name[length] = '\0';
    had = exf_model_n_params(l.model);
    if (exf_block_new(l.model, name, &b) == NULL) {
      CHECK_ERR(l.ctx, EXF_ARG, "is longer than 255 bytes");
      CHECK(exf_model_n_params(l.model) == had);
      refused++;
    }
    name[0] = 'y';
    had = exf_model_n_params(l.model);
    ffn = exf_ffn_new(l.model, name, &d);
    if (ffn == NULL) {
      CHECK_ERR(l.ctx, EXF_ARG, "is longer than 255 bytes");
      CHECK(exf_model_n_params(l.model) == had);
    } else if (exf_ffn_upcycle(ffn, &f) != EXF_OK) {
      CHECK_ERR(l.ctx, EXF_ARG, "is longer than 255 bytes");
      CHECK(exf_model_n_params(l.model) == had + 2);
      CHECK(ffn->fusion.variant == EXF_DENSE);
      refused++;
    }
  }
  CHECK(refused > 10);
  lone_free(&l);
}

int main(void) {
  RUN(merge_changes_no_bit);
  RUN(merge_changes_no_bit_with_swiglu);
  RUN(merged_file_of_another_geometry_is_refused);
  RUN(upcycling_keeps_what_was_loaded);
  RUN(wide_layers_are_merged);
  RUN(upcycling_from_scratch);
  RUN(zerosum_keeps_the_function);
  RUN(zerosum_spread_scales_the_differences);
  RUN(drop_redraws_whole_hidden_units);
  RUN(copies_never_separate);
  RUN(expert_gradients_are_a_times_G);
  RUN(raw_weights_conserve_their_invariant);
  RUN(bank_follows_its_rule);
  RUN(bank_follows_its_rule_with_accumulation);
  RUN(bank_of_routed_records);
  RUN(training_and_evaluation_weights_of_mb);
  RUN(bank_of_frozen_experts_moves);
  RUN(diagnostics_by_hand);
  RUN(predicted_decay_of_differences);
  RUN(notices_fire);
  RUN(notices_stay_silent);
  RUN(wrong_descriptors_are_refused);
  RUN(enums_have_names);
  RUN(input_of_another_width_is_refused);
  RUN(names_that_grow_too_long_are_refused);
  TEST_MAIN_END;
}
