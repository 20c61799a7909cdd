/* Optimizers, clipping, schedules and the moving average against formulas written out
   here. Built in float and in double; in double the agreement is to rounding. */
#ifndef TEST_LINKED    /* the Makefile links the implementation in */
#define EXFUSION_IMPLEMENTATION
#endif
#include "../exfusion.h"
#include "test.h"
#include "tiny_gpt.h"

#ifdef EXF_DOUBLE
#define NEAR 1e-13
#else
#define NEAR 3e-6
#endif

#define N_W 6
#define N_B 3

/* Loss = sum(c_t w) + sum(w^2) / 2 + sum(d_t b), so that the gradient is w + c_t and d_t,
   with c_t and d_t fixed per step. */
typedef struct toy {
  exf_ctx *ctx;
  exf_model *model;
  exf_tensor *w, *b;             /* w decays, b does not */
  double W[N_W + N_B], M[N_W + N_B], V[N_W + N_B], G[N_W + N_B];
} toy;

static toy toy_new(void) {
  exf_param_desc d;
  toy t;
  size_t i;
  memset(&t, 0, sizeof t);
  memset(&d, 0, sizeof d);
  t.ctx = exf_ctx_new(NULL);
  t.model = exf_model_new(t.ctx);
  d.shape = exf_shape2(2, 3);
  d.init_std = 1;
  d.decay = 1;
  t.w = exf_param_new(t.model, "layer.weight", &d);
  d.shape = exf_shape1(3);
  d.decay = 0;
  t.b = exf_param_new(t.model, "layer.bias", &d);
  for (i = 0; i < N_W; i++) t.W[i] = (double)t.w->data[i];
  for (i = 0; i < N_B; i++) t.W[N_W + i] = (double)t.b->data[i];
  return t;
}
static void toy_free(toy *t) {
  CHECK_OK(t->ctx);
  exf_model_free(t->model);
  exf_ctx_free(t->ctx);
}

/* Gradients by hand into G, by the library into the parameters. */
static void toy_backward(toy *t, uint32_t step, double scale) {
  exf_real c[N_W + N_B];
  exf_ctx *ctx = t->ctx;
  exf_tensor *l;
  size_t i;
  for (i = 0; i < N_W + N_B; i++) {
    c[i] = (exf_real)(scale * exf_rng_normal(31, 1, step, i));
    t->G[i] = (double)c[i] + (i < N_W ? t->W[i] : 0);
  }
  l = exf_sum(ctx, exf_mul(ctx, t->w, exf_tensor_new(ctx, exf_shape2(2, 3), c)),
              EXF_ALL_AXES, 0);
  l = exf_add(ctx, l, exf_scale(ctx, exf_sum(ctx, exf_square(ctx, t->w), EXF_ALL_AXES, 0),
                                0.5));
  l = exf_add(ctx, l, exf_sum(ctx, exf_mul(ctx, t->b,
              exf_tensor_new(ctx, exf_shape1(3), c + N_W)), EXF_ALL_AXES, 0));
  exf_backward(ctx, l);
  exf_rewind(ctx);
}
static void toy_compare(const toy *t, double tol) {
  size_t i;
  for (i = 0; i < N_W; i++) CHECK_NEAR(t->w->data[i], t->W[i], tol);
  for (i = 0; i < N_B; i++) CHECK_NEAR(t->b->data[i], t->W[N_W + i], tol);
}
static double toy_norm(const toy *t) {
  double s = 0;
  size_t i;
  for (i = 0; i < N_W + N_B; i++) s += t->G[i] * t->G[i];
  return sqrt(s);
}

/* torch.optim.AdamW, written out */
static void adamw_by_hand(toy *t, int step, double lr, const double *wd,
                          const double *lr_scale, double b1, double b2, double eps,
                          double clip) {
  size_t i;
  for (i = 0; i < N_W + N_B; i++) {
    int group = i >= N_W;
    double l = lr * lr_scale[group], g = t->G[i] * clip;
    t->W[i] *= 1 - l * wd[group];
    t->M[i] = b1 * t->M[i] + (1 - b1) * g;
    t->V[i] = b2 * t->V[i] + (1 - b2) * g * g;
    t->W[i] -= l * (t->M[i] / (1 - pow(b1, step)))
             / (sqrt(t->V[i] / (1 - pow(b2, step))) + eps);
  }
}

static const double one_each[2] = {1, 1};

/* desc may be NULL. */
static void check_adamw(const exf_optim_desc *desc) {
  exf_optim_desc o;
  toy t = toy_new();
  exf_optim *optim = exf_optim_new(t.model, desc);
  double decay[2] = {0, 0}, b1, b2, eps;
  int s;
  memset(&o, 0, sizeof o);
  if (desc) o = *desc;
  b1 = o.beta1;
  b2 = o.beta2;
  eps = o.eps;
  decay[0] = o.weight_decay;
  if (b1 == 0) b1 = 0.9;
  if (b2 == 0) b2 = 0.999;
  if (b1 == EXF_ZERO) b1 = 0;
  if (b2 == EXF_ZERO) b2 = 0;
  if (eps == 0) eps = 1e-8;
  for (s = 1; s <= 25; s++) {
    double norm = -1, lr = 0.01 + 0.001 * s;
    toy_backward(&t, (uint32_t)s, 1);
    CHECK(exf_optim_step(optim, lr, &norm) == EXF_OK);
    CHECK_NEAR(norm, toy_norm(&t), NEAR * toy_norm(&t));
    adamw_by_hand(&t, s, lr, decay, one_each, b1, b2, eps, 1);
    CHECK(exf_optim_steps(optim) == (uint64_t)s);
  }
  toy_compare(&t, NEAR);
  exf_optim_free(optim);
  toy_free(&t);
}
TEST(adamw_by_formula) {
  static const double betas[][4] = {   /* beta1, beta2, eps, decay */
    {0, 0, 0, 0}, {0.9, 0.99, 0, 0.1}, {0.5, 0.95, 1e-3, 0.5}, {EXF_ZERO, 0.9, 0, 0.1},
    {EXF_ZERO, EXF_ZERO, 1e-2, 0}};
  exf_optim_desc o;
  size_t i;
  check_adamw(NULL);
  for (i = 0; i < sizeof betas / sizeof *betas; i++) {
    memset(&o, 0, sizeof o);
    o.beta1 = betas[i][0];
    o.beta2 = betas[i][1];
    o.eps = betas[i][2];
    o.weight_decay = betas[i][3];
    check_adamw(&o);
  }
}

static void check_sgd(double momentum, int nesterov, double wd) {
  exf_optim_desc o;
  exf_optim *optim;
  toy t = toy_new();
  size_t i;
  int s;
  memset(&o, 0, sizeof o);
  o.kind = EXF_SGD;
  o.momentum = momentum;
  o.nesterov = nesterov;
  o.weight_decay = wd;
  optim = exf_optim_new(t.model, &o);
  for (s = 1; s <= 25; s++) {
    toy_backward(&t, (uint32_t)s, 1);
    CHECK(exf_optim_step(optim, 0.03, NULL) == EXF_OK);
    for (i = 0; i < N_W + N_B; i++) {
      double g = t.G[i] + (i < N_W ? wd * t.W[i] : 0);   /* coupled decay */
      t.M[i] = s == 1 ? g : momentum * t.M[i] + g;       /* as torch.optim.SGD */
      t.W[i] -= 0.03 * (momentum == 0 ? g : nesterov ? g + momentum * t.M[i] : t.M[i]);
    }
  }
  toy_compare(&t, NEAR);
  exf_optim_free(optim);
  toy_free(&t);
}
TEST(sgd_by_formula) {
  check_sgd(0, 0, 0);
  check_sgd(0, 0, 0.1);
  check_sgd(0.9, 0, 0);
  check_sgd(0.9, 0, 0.1);
  check_sgd(0.9, 1, 0.1);
}

static int select_bias(const exf_param *p, void *user) {
  (*(int *)user)++;
  return strstr(p->name, ".bias") != NULL;
}
static int select_all(const exf_param *p, void *user) {
  (void)user;
  return p != NULL;
}
TEST(groups_by_predicate) {
  exf_optim_desc o;
  exf_optim *optim;
  toy t = toy_new();
  double decay[2] = {0.1, 0.7}, scale[2] = {0.5, 0.25};
  int s, asked = 0;
  memset(&o, 0, sizeof o);
  o.weight_decay = 0.3;
  optim = exf_optim_new(t.model, &o);
  /* a later group overrides an earlier one */
  CHECK(exf_optim_group(optim, select_all, NULL, 0.5, 0.1) == EXF_OK);
  CHECK(exf_optim_group(optim, select_bias, &asked, 0.25, 0.7) == EXF_OK);
  for (s = 1; s <= 10; s++) {
    toy_backward(&t, (uint32_t)s, 1);
    CHECK(exf_optim_step(optim, 0.02, NULL) == EXF_OK);
    adamw_by_hand(&t, s, 0.02, decay, scale, 0.9, 0.999, 1e-8, 1);
  }
  CHECK(asked >= 2);
  toy_compare(&t, NEAR);
  exf_optim_free(optim);
  toy_free(&t);
}

TEST(clipping_by_global_norm) {
  exf_optim_desc o;
  exf_optim *optim;
  toy t = toy_new();
  double decay[2] = {0, 0};
  int s, clipped = 0, kept = 0;
  memset(&o, 0, sizeof o);
  o.clip = 6;
  o.eps = 1e-2;       /* so that the scale of a gradient matters to AdamW */
  optim = exf_optim_new(t.model, &o);
  for (s = 1; s <= 20; s++) {
    double norm = -1, want, scale;
    toy_backward(&t, (uint32_t)s, s % 2 ? 10 : 0.01);
    CHECK(exf_optim_step(optim, 0.01, &norm) == EXF_OK);
    want = toy_norm(&t);
    CHECK_NEAR(norm, want, NEAR * want);
    scale = 6 / (want + 1e-6);
    if (scale < 1) clipped++;
    else kept++;
    adamw_by_hand(&t, s, 0.01, decay, one_each, 0.9, 0.999, 1e-2, scale < 1 ? scale : 1);
  }
  CHECK(clipped > 0 && kept > 0);
  toy_compare(&t, NEAR);
  exf_optim_free(optim);
  toy_free(&t);
}

/* The fused norm counts G of each expert tensor once; the expert norm ||a|| ||G||. */
TEST(fused_norm_and_expert_norm) {
  int expert;
  for (expert = 0; expert < 2; expert++) {
    exf_ctx *ctx = exf_ctx_new(NULL);
    tiny_desc d = tiny_defaults();
    int32_t ids[32], labels[32];
    exf_optim_desc o;
    exf_optim *optim;
    double want = 0, norm = -1;
    tiny_gpt g;
    size_t i, j, n_experts = 0;
    d.fusion = tiny_variant(2, 3);
    g = tiny_new(ctx, &d);
    memset(&o, 0, sizeof o);
    o.kind = EXF_SGD;
    o.expert_norm = expert;
    optim = exf_optim_new(g.model, &o);
    tiny_batch(&g, 0, 4, 8, ids, labels);
    exf_backward(ctx, tiny_loss(ctx, &g, ids, labels, 4, 8));
    exf_rewind(ctx);
    for (i = 0; i < exf_model_n_params(g.model); i++) {
      const exf_param *p = exf_model_param(g.model, i);
      const exf_tensor *t = &p->tensor;
      int is_expert = strstr(p->name, ".experts.") != NULL;
      size_t n = is_expert ? t->size / 3 : t->size;
      if (!CHECK(t->grad != NULL)) continue;
      n_experts += is_expert ? 1 : 0;
      for (j = 0; j < n; j++) {
        double v = (double)t->grad[j];
        want += v * v * (is_expert && expert ? 3 * (1.0 / 9) : 1);  /* a_i = 1/3 */
      }
    }
    CHECK(n_experts == 4);
    CHECK(exf_optim_step(optim, 0.1, &norm) == EXF_OK);
    CHECK_NEAR(norm, sqrt(want), 2 * NEAR * sqrt(want));
    CHECK_OK(ctx);
    exf_optim_free(optim);
    exf_model_free(g.model);
    exf_ctx_free(ctx);
  }
}

/* sqrt at 0 has an infinite gradient and a finite value. */
static void infinite_gradient(toy *t) {
  t->b->data[1] = 0;
  exf_backward(t->ctx, exf_sum(t->ctx, exf_add(t->ctx, exf_sum(t->ctx, exf_sqrt(t->ctx,
               exf_square(t->ctx, exf_sqrt(t->ctx, t->b))), EXF_ALL_AXES, 0),
               exf_sum(t->ctx, t->w, EXF_ALL_AXES, 0)), EXF_ALL_AXES, 0));
  exf_rewind(t->ctx);
}
TEST(nonfinite_gradients_are_refused) {
  exf_optim_desc o;
  exf_optim *optim;
  toy t = toy_new();
  exf_real w[N_W], b[N_B];
  double decay[2] = {0, 0}, norm = 0;
  size_t i;
  int s;
  memset(&o, 0, sizeof o);
  o.clip = 1;
  optim = exf_optim_new(t.model, &o);
  for (i = 0; i < N_B; i++) {
    t.b->data[i] = (exf_real)(1 + (double)i);
    t.W[N_W + i] = (double)t.b->data[i];
  }
  for (s = 1; s <= 2; s++) {
    double n;
    toy_backward(&t, (uint32_t)s, 1);
    CHECK(exf_optim_step(optim, 0.01, &n) == EXF_OK);
    adamw_by_hand(&t, s, 0.01, decay, one_each, 0.9, 0.999, 1e-8,
                  fmin(1, 1 / (toy_norm(&t) + 1e-6)));
  }
  infinite_gradient(&t);
  t.W[N_W + 1] = 0;
  memcpy(w, t.w->data, sizeof w);
  memcpy(b, t.b->data, sizeof b);
  CHECK(exf_optim_step(optim, 0.01, &norm) == EXF_NUMERIC);
  CHECK(!(norm <= 1e300));
  CHECK(memcmp(w, t.w->data, sizeof w) == 0 && memcmp(b, t.b->data, sizeof b) == 0);
  CHECK(exf_optim_steps(optim) == 2);
  CHECK_ERR(t.ctx, EXF_NUMERIC, "gradient");
  /* the moments are untouched as well: the next step is that of the formula */
  exf_model_zero_grad(t.model);
  toy_backward(&t, 3, 1);
  CHECK(exf_optim_step(optim, 0.01, NULL) == EXF_OK);
  adamw_by_hand(&t, 3, 0.01, decay, one_each, 0.9, 0.999, 1e-8,
                fmin(1, 1 / (toy_norm(&t) + 1e-6)));
  toy_compare(&t, NEAR);
  exf_optim_free(optim);
  toy_free(&t);
}
TEST(nonfinite_gradients_on_request) {
  exf_optim_desc o;
  exf_optim *optim;
  toy t = toy_new();
  size_t i;
  memset(&o, 0, sizeof o);
  o.allow_nonfinite = 1;
  optim = exf_optim_new(t.model, &o);
  for (i = 0; i < N_B; i++) t.b->data[i] = 1;
  infinite_gradient(&t);
  CHECK(exf_optim_step(optim, 0.01, NULL) == EXF_OK);
  CHECK(exf_optim_steps(optim) == 1);
  exf_optim_free(optim);
  toy_free(&t);
}

TEST(schedules_by_formula) {
  static const uint64_t warm[] = {0, 1, 10, 60}, steps[] = {50, 50, 50, 50};
  const double pi = 3.14159265358979323846;
  size_t k;
  for (k = 0; k < 4; k++) {
    exf_schedule c, l, f;
    uint64_t s, w = warm[k], n = steps[k], m;
    memset(&c, 0, sizeof c);
    c.lr = 3e-3;
    c.min_lr = 2e-4;
    c.warmup = w;
    c.steps = n;
    l = f = c;
    c.kind = EXF_SCHEDULE_COSINE;
    l.kind = EXF_SCHEDULE_LINEAR;
    f.kind = EXF_SCHEDULE_CONSTANT;
    for (s = 0; s < n; s++) {
      double up = 3e-3 * (double)(s + 1) / (double)(w + 1);
      double at = s < w ? 0 : (double)(s - w) / (double)(n > w ? n - w : 1);
      CHECK_NEAR(exf_schedule_lr(&c, s),
                 s < w ? up : 2e-4 + 2.8e-3 / 2 * (1 + cos(pi * at)), 1e-15);
      CHECK_NEAR(exf_schedule_lr(&l, s), s < w ? up : 3e-3 - 2.8e-3 * at, 1e-15);
      CHECK_NEAR(exf_schedule_lr(&f, s), s < w ? up : 3e-3, 1e-15);
    }
    m = n > w ? n : w;
    if (n > w) CHECK_NEAR(exf_schedule_lr(&c, m), 2e-4, 1e-15);
  }
}

/* ---- models ---------------------------------------------------------------------- */

static exf_tensor *tensor_of(const exf_model *model, const char *name) {
  exf_param *p = exf_model_find(model, name);
  return p ? &p->tensor : NULL;
}

TEST(average_of_the_fused_parameters) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  tiny_desc d = tiny_defaults(), plain;
  exf_optim *optim;
  exf_ema *ema, *again;
  exf_param_desc more;
  tiny_gpt g, dense;
  exf_tensor *e, *w, *a, *out, *out_w;
  double want[32 * 16], wte[11 * 16];
  exf_real first[32 * 16];
  size_t i, j, n = 32 * 16;
  int s;
  d.fusion = tiny_variant(2, 3);
  g = tiny_new(ctx, &d);
  plain = d;
  plain.fusion = tiny_variant(0, 0);
  dense = tiny_new(ctx, &plain);
  optim = tiny_adamw(g.model);
  e = tensor_of(g.model, "transformer.h.1.mlp.experts.c_fc.weight");
  a = tensor_of(g.model, "transformer.h.1.mlp.fusion.weight");
  w = g.wte;
  if (!CHECK(e != NULL && a != NULL && e->size == 3 * n && w->size == 11 * 16)) return;
  ema = exf_ema_new(g.model, 0.8);
  for (s = -1; s < 5; s++) {
    if (s >= 0) {
      tiny_train(ctx, &g, optim, (uint64_t)s, 1, 1e-2);
      CHECK(exf_ema_update(ema) == EXF_OK);
    }
    for (j = 0; j < n; j++) {
      double th = 0;
      for (i = 0; i < 3; i++) th += (double)a->data[i] * (double)e->data[i * n + j];
      want[j] = s < 0 ? th : 0.8 * want[j] + 0.2 * th;
    }
    for (j = 0; j < 11 * 16; j++)
      wte[j] = s < 0 ? (double)w->data[j] : 0.8 * wte[j] + 0.2 * (double)w->data[j];
  }
  CHECK(exf_ema_copy_to(ema, dense.model) == EXF_OK);
  out = tensor_of(dense.model, "transformer.h.1.mlp.c_fc.weight");
  out_w = dense.wte;
  if (!CHECK(out != NULL && out->size == n)) return;
  for (j = 0; j < n; j++) CHECK_NEAR(out->data[j], want[j], NEAR);
  for (j = 0; j < 11 * 16; j++) CHECK_NEAR(out_w->data[j], wte[j], NEAR);
  again = exf_ema_new(g.model, 0.8);             /* resumes from what was copied out */
  CHECK(exf_ema_copy_from(again, dense.model) == EXF_OK);
  CHECK(exf_ema_update(ema) == EXF_OK && exf_ema_update(again) == EXF_OK);
  CHECK(exf_ema_copy_to(ema, dense.model) == EXF_OK);
  for (j = 0; j < n; j++) first[j] = out->data[j];
  CHECK(exf_ema_copy_to(again, dense.model) == EXF_OK);
  for (j = 0; j < n; j++) CHECK(memcmp(&first[j], &out->data[j], sizeof *first) == 0);
  CHECK_OK(ctx);
  memset(&more, 0, sizeof more);                 /* a parameter it has not seen */
  more.shape = exf_shape1(2);
  CHECK(exf_param_new(g.model, "more", &more) != NULL);
  CHECK(exf_ema_update(ema) == EXF_STATE);
  CHECK_ERR(ctx, EXF_STATE, "ema: the parameters of the model changed at 'more'");
  exf_ema_free(again);
  exf_ema_free(ema);
  exf_optim_free(optim);
  exf_model_free(g.model);
  exf_model_free(dense.model);
  exf_ctx_free(ctx);
}

TEST(frozen_parameters_stay) {
  toy t = toy_new();
  exf_real w[N_W], b[N_B];
  exf_optim *optim = tiny_adamw(t.model);
  exf_param *p = exf_model_find(t.model, "layer.weight");
  int s;
  memcpy(w, t.w->data, sizeof w);
  memcpy(b, t.b->data, sizeof b);
  exf_param_freeze(p, 1);
  for (s = 1; s <= 3; s++) {
    double norm, want = 0;
    size_t i;
    toy_backward(&t, (uint32_t)s, 1);
    CHECK(exf_optim_step(optim, 0.01, &norm) == EXF_OK);
    for (i = N_W; i < N_W + N_B; i++) want += t.G[i] * t.G[i];
    CHECK_NEAR(norm, sqrt(want), NEAR * sqrt(want));   /* they do not count */
  }
  CHECK(memcmp(w, t.w->data, sizeof w) == 0);
  CHECK(memcmp(b, t.b->data, sizeof b) != 0);
  exf_param_freeze(p, 0);
  toy_backward(&t, 4, 1);
  CHECK(exf_optim_step(optim, 0.01, NULL) == EXF_OK);
  CHECK(memcmp(w, t.w->data, sizeof w) != 0);
  exf_optim_free(optim);
  toy_free(&t);
}

TEST(optimizers_that_do_not_fit_are_refused) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  tiny_desc d = tiny_defaults();
  tiny_gpt g = tiny_new(ctx, &d);
  exf_fusion_desc f = tiny_variant(2, 3);
  exf_optim_desc o;
  exf_optim *optim = tiny_adamw(g.model);
  exf_real *before, *after;
  size_t n;
  memset(&o, 0, sizeof o);
  o.kind = EXF_SGD;
  o.shared_moments = 1;
  CHECK(exf_optim_new(g.model, &o) == NULL);
  CHECK_ERR(ctx, EXF_ARG, "shared_moments");
  /* made before the experts were: it has no moments for them */
  CHECK(exf_model_upcycle(g.model, &f) == EXF_OK);
  before = tiny_eval(ctx, &g, &n);
  tiny_train(ctx, &g, optim, 0, 1, 0.1);
  CHECK_ERR(ctx, EXF_STATE, "is newer than the optimizer");
  exf_rewind(ctx);
  after = tiny_eval(ctx, &g, &n);
  CHECK(same_bits(before, after, n) && exf_optim_steps(optim) == 0);
  free(before);
  free(after);
  exf_optim_free(optim);
  exf_model_free(g.model);
  exf_ctx_free(ctx);
}

/* EXF_ZERO is the only number below zero that means something, and only for betas. */
TEST(numbers_below_zero_are_refused) {
  const double bad[] = {-0.5, -2, -1e-9, (double)NAN, 1};
  toy t = toy_new();
  exf_optim_desc o;
  size_t i, k;
  for (i = 0; i < sizeof bad / sizeof *bad; i++)
    for (k = 0; k < 2; k++) {
      memset(&o, 0, sizeof o);
      if (k) o.beta2 = bad[i];
      else o.beta1 = bad[i];
      CHECK(exf_optim_new(t.model, &o) == NULL);
      CHECK_ERR(t.ctx, EXF_ARG, k ? "beta2" : "beta1");
    }
  for (k = 0; k < 4; k++) {
    memset(&o, 0, sizeof o);
    *(k == 0 ? &o.eps : k == 1 ? &o.momentum : k == 2 ? &o.weight_decay : &o.clip) =
        EXF_ZERO;
    CHECK(exf_optim_new(t.model, &o) == NULL);
    CHECK_ERR(t.ctx, EXF_ARG, "weight decay");
  }
  toy_free(&t);
}

/* What was there when the optimizer was made goes on, wherever it stands now; what is
   newer is refused as soon as it has a gradient, and merging does not bring it back. */
TEST(parameters_are_known_by_identity) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_model *m = exf_model_new(ctx);
  exf_ffn_desc d;
  exf_fusion_desc dw = tiny_variant(2, 2);
  exf_param_desc pd;
  exf_optim *optim;
  exf_ffn *f;
  exf_tensor *last;
  memset(&d, 0, sizeof d);
  memset(&pd, 0, sizeof pd);
  d.width = 2;
  pd.shape = exf_shape1(1);
  pd.init_value = 1;
  f = exf_ffn_new(m, "mlp", &d);
  last = exf_param_new(m, "last", &pd);
  optim = exf_optim_new(m, NULL);
  CHECK(exf_ffn_upcycle(f, &dw) == EXF_OK);    /* "last" moves by one place */
  CHECK(exf_optim_group(optim, select_all, NULL, 0.5, 0) == EXF_OK);
  exf_backward(ctx, exf_sum(ctx, last, EXF_ALL_AXES, 0));
  CHECK(exf_optim_step(optim, 0.1, NULL) == EXF_OK && exf_optim_steps(optim) == 1);
  CHECK_NEAR(last->data[0], 0.95, 1e-6);       /* the group's half rate */
  CHECK(exf_ffn_merge(f) == EXF_OK);
  exf_backward(ctx, exf_sum(ctx, exf_ffn_forward(ctx, f, exf_tensor_new(ctx,
               exf_shape2(1, 2), NULL)), EXF_ALL_AXES, 0));
  CHECK(exf_optim_step(optim, 0.1, NULL) == EXF_STATE);
  CHECK_ERR(ctx, EXF_STATE, "'mlp.c_fc.weight' is newer than the optimizer");
  CHECK_NEAR(last->data[0], 0.95, 1e-6);
  exf_optim_free(optim);
  CHECK_OK(ctx);
  exf_model_free(m);
  exf_ctx_free(ctx);
}

/* Two halves with half the loss each give the gradient of the whole batch. */
TEST(accumulation_equals_the_big_batch) {
  int v;
  for (v = 0; v <= 3; v++) {
    exf_ctx *ctx = exf_ctx_new(NULL);
    tiny_desc d = tiny_defaults();
    int32_t ids[32], labels[32];
    exf_optim_desc o;
    exf_optim *o1, *o2;
    double n1, n2;
    tiny_gpt g, h;
    size_t i;
    int s;
    d.bias = 1;
    d.fusion = tiny_variant(v, 3);
    g = tiny_new(ctx, &d);
    h = tiny_new(ctx, &d);
    CHECK(same_params(g.model, h.model));
    memset(&o, 0, sizeof o);
    o.kind = EXF_SGD;
    o1 = exf_optim_new(g.model, &o);
    o2 = exf_optim_new(h.model, &o);
    exf_training_set(ctx, 1);
    for (s = 0; s < 3; s++) {
      exf_step_begin(ctx, (uint64_t)s);
      tiny_batch(&g, (uint64_t)s, 4, 8, ids, labels);
      exf_backward(ctx, tiny_loss(ctx, &g, ids, labels, 4, 8));
      exf_rewind(ctx);
      CHECK(exf_optim_step(o1, 0.1, &n1) == EXF_OK);
      exf_step_begin(ctx, (uint64_t)s);
      for (i = 0; i < 2; i++) {
        exf_backward(ctx, exf_scale(ctx, tiny_loss(ctx, &h, ids + 16 * i, labels + 16 * i,
                                                   2, 8), 0.5));
        exf_rewind(ctx);
      }
      CHECK(exf_optim_step(o2, 0.1, &n2) == EXF_OK);
      CHECK(n1 > 0);
      CHECK_NEAR(n1, n2, 10 * NEAR * n1);
    }
    for (i = 0; i < exf_model_n_params(g.model); i++) {
      exf_tensor *x = &exf_model_param(g.model, i)->tensor;
      exf_tensor *y = &exf_model_param(h.model, i)->tensor;
      CHECK(max_diff(x->data, y->data, x->size) < NEAR);
    }
    CHECK_OK(ctx);
    exf_optim_free(o1);
    exf_optim_free(o2);
    exf_model_free(g.model);
    exf_model_free(h.model);
    exf_ctx_free(ctx);
  }
}

/* A step without a gradient, and of a parameter the loss never met. */
TEST(parameters_without_gradient_stay) {
  toy t = toy_new();
  exf_optim *optim = tiny_adamw(t.model);
  exf_real b[N_B];
  memcpy(b, t.b->data, sizeof b);
  exf_backward(t.ctx, exf_sum(t.ctx, t.w, EXF_ALL_AXES, 0));
  exf_rewind(t.ctx);
  CHECK(exf_optim_step(optim, 0.01, NULL) == EXF_OK);
  CHECK(memcmp(b, t.b->data, sizeof b) == 0);
  CHECK(t.w->grad == NULL || exf_optim_steps(optim) == 1);
  exf_optim_free(optim);
  toy_free(&t);
}

int main(void) {
  RUN(adamw_by_formula);
  RUN(sgd_by_formula);
  RUN(groups_by_predicate);
  RUN(clipping_by_global_norm);
  RUN(fused_norm_and_expert_norm);
  RUN(nonfinite_gradients_are_refused);
  RUN(nonfinite_gradients_on_request);
  RUN(schedules_by_formula);
  RUN(average_of_the_fused_parameters);
  RUN(frozen_parameters_stay);
  RUN(accumulation_equals_the_big_batch);
  RUN(parameters_without_gradient_stay);
  RUN(optimizers_that_do_not_fit_are_refused);
  RUN(numbers_below_zero_are_refused);
  RUN(parameters_are_known_by_identity);
  TEST_MAIN_END;
}
