/* tests/test_algebra.c - what the algebra of the method says, always in double: the
   claims hold to rounding, and the tolerances say so. */
#ifndef EXF_DOUBLE
#define EXF_DOUBLE
#endif
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"

#include "test.h"
#include "gpt.h"

#define N 3            /* experts */
#define BATCH 4
#define TOKENS (BATCH * 9)
#define LOGITS (2 * 8 * 11)
#define DECAY 0.1

/* ---- common ------------------------------------------------------------------ */

/* A small GPT of which no parameter stands at a symmetric start. */
static int start(gpt *g, exf_fusion_desc fusion, int perturb_experts) {
  gpt_desc desc = gpt_desc_small(1);
  size_t i, j;
  desc.fusion = fusion;
  if (!CHECK(gpt_new(g, &desc, EXF_ISA_AUTO))) return 0;
  for (i = 0; i < exf_model_n_params(g->model); i++) {
    exf_param *p = exf_model_param(g->model, i);
    exf_tensor *t = &p->tensor;
    const char *name = p->name;
    if (strstr(name, ".fusion.") || (!perturb_experts && strstr(name, ".mlp.")))
      continue;
    for (j = 0; j < t->size; j++)
      t->data[j] += 0.1 * exf_rng_normal(5, exf_rng_stream(name), 0, j);
  }
  return 1;
}

static double batch_backward(gpt *g, uint32_t step) {
  int32_t tokens[TOKENS];
  exf_step_begin(g->ctx, step);
  gpt_tokens(g, step, tokens, TOKENS);
  return gpt_backward(g, tokens, BATCH, 1.0);
}

static exf_optim *adamw(exf_model *model, double eps, double clip) {
  exf_optim_desc desc;
  memset(&desc, 0, sizeof desc);
  desc.beta2 = 0.99;
  desc.eps = eps;
  desc.weight_decay = DECAY;
  desc.clip = clip;
  return exf_optim_new(model, &desc);
}

static exf_schedule schedule_of(uint64_t steps) {
  exf_schedule schedule;
  memset(&schedule, 0, sizeof schedule);
  schedule.lr = 1e-2;
  schedule.min_lr = 1e-3;
  schedule.warmup = 5;
  schedule.steps = steps;
  return schedule;
}

/* The expert set that answers to a dense parameter of an FFN, else the parameter of the
   same name. */
static exf_tensor *counterpart(gpt *experts, const char *name) {
  const char *mlp = strstr(name, ".mlp.");
  exf_param *p;
  char key[96];
  if (mlp)
    snprintf(key, sizeof key, "%.*s.mlp.experts.%s", (int)(mlp - name), name, mlp + 5);
  else
    snprintf(key, sizeof key, "%s", name);
  p = exf_model_find(experts->model, key);
  return CHECK(p != NULL) ? &p->tensor : NULL;
}

/* Number j of it, an FFN's being the mean of its experts. */
static double mean_value(const exf_tensor *t, size_t size, size_t j) {
  size_t i, n = t->size / size;
  double sum = 0.0;
  for (i = 0; i < n; i++) sum += t->data[i * size + j];
  return sum / (double)n;
}

static void copy_mean(gpt *dense, gpt *experts) {
  size_t i, j;
  for (i = 0; i < exf_model_n_params(dense->model); i++) {
    exf_param *p = exf_model_param(dense->model, i);
    exf_tensor *a = &p->tensor, *b = counterpart(experts, p->name);
    for (j = 0; b && j < a->size; j++) a->data[j] = mean_value(b, a->size, j);
  }
}

/* Largest difference between the dense model and the mean of the experts. */
static double distance(gpt *dense, gpt *experts) {
  double d, worst = 0.0;
  size_t i, j, compared = 0;
  for (i = 0; i < exf_model_n_params(dense->model); i++) {
    exf_param *p = exf_model_param(dense->model, i);
    exf_tensor *a = &p->tensor, *b = counterpart(experts, p->name);
    for (j = 0; b && j < a->size; j++, compared++) {
      d = fabs(a->data[j] - mean_value(b, a->size, j));
      if (!(d <= worst)) worst = d;
    }
  }
  CHECK(compared == exf_model_count(dense->model));
  return worst;
}

/* ---- section 5.1: the scale divided out -------------------------------------- */

/* Dense AdamW written out here, since eps differs between tensors; m and v hold as many
   numbers as the model. */
static double plain_adamw(gpt *g, double lr, double eps, double eps_ffn, double clip,
                          int t, double *m, double *v) {
  size_t i, j, k = 0;
  double square = 0.0, scale, norm;
  for (i = 0; i < exf_model_n_params(g->model); i++) {
    exf_tensor *p = &exf_model_param(g->model, i)->tensor;
    if (!CHECK(p->grad != NULL)) return 0.0;
    for (j = 0; j < p->size; j++) square += p->grad[j] * p->grad[j];
  }
  norm = sqrt(square);
  scale = clip / (norm + 1e-6);
  if (scale > 1.0) scale = 1.0;
  for (i = 0; i < exf_model_n_params(g->model); i++) {
    exf_param *param = exf_model_param(g->model, i);
    exf_tensor *p = &param->tensor;
    double e = strstr(param->name, ".mlp.") ? eps_ffn : eps;
    double wd = param->decay ? DECAY : 0.0;
    for (j = 0; j < p->size; j++, k++) {
      double gradient = scale * p->grad[j];
      m[k] = 0.9 * m[k] + 0.1 * gradient;
      v[k] = 0.99 * v[k] + 0.01 * gradient * gradient;
      p->data[j] *= 1.0 - lr * wd;
      p->data[j] -= lr * m[k] / (1.0 - pow(0.9, t))
                    / (sqrt(v[k] / (1.0 - pow(0.99, t))) + e);
    }
  }
  exf_model_zero_grad(g->model);
  return norm;
}

/* 50 steps of sw under the library's AdamW beside dense ones from the experts' mean. An
   eps this large decides much of every step. */
static double sw_adamw_distance(double eps_factor) {
  static double m[16384], v[16384];
  const double eps = 1e-3, clip = 0.8;
  exf_schedule schedule = schedule_of(50);
  double norm = 0.0, norm_dense, loss, loss_dense, lr, worst = 0.0, d;
  exf_optim *optim;
  gpt sw, dense;
  int t, clipped = 0;
  if (!start(&sw, gpt_fusion(EXF_SW, N), 1)) return 1.0;
  if (!start(&dense, gpt_fusion(EXF_DENSE, 0), 1)) return 1.0;
  if (!CHECK(exf_model_count(dense.model) <= 16384)) return 1.0;
  copy_mean(&dense, &sw);
  memset(m, 0, sizeof m);
  memset(v, 0, sizeof v);
  optim = adamw(sw.model, eps, clip);
  for (t = 1; t <= 50; t++) {
    lr = exf_schedule_lr(&schedule, (uint64_t)t - 1);
    loss = batch_backward(&sw, (uint32_t)t);
    exf_optim_step(optim, lr, &norm);
    loss_dense = batch_backward(&dense, (uint32_t)t);
    norm_dense = plain_adamw(&dense, lr, eps, eps_factor * eps, clip, t, m, v);
    d = fabs(loss - loss_dense) + fabs(norm - norm_dense);
    if (!(d <= worst)) worst = d;
    clipped += norm > clip;
  }
  CHECK(clipped > 0 && clipped < 50);
  d = distance(&dense, &sw);
  if (!(d <= worst)) worst = d;
  CHECK_OK(sw.ctx);
  CHECK_OK(dense.ctx);
  exf_optim_free(optim);
  gpt_free(&sw);
  gpt_free(&dense);
  return worst;
}

TEST(sw_under_adamw_is_dense_with_n_eps) {
  CHECK_NEAR(sw_adamw_distance(N), 0.0, 1e-12);
  CHECK(sw_adamw_distance(1.0) > 1e-6);
}

static int select_ffn_matrix(const exf_param *param, void *user) {
  (void)user;
  return strstr(param->name, ".mlp.") != NULL && param->decay;
}

static int select_ffn_bias(const exf_param *param, void *user) {
  (void)user;
  return strstr(param->name, ".mlp.") != NULL && !param->decay;
}

/* 50 steps of SGD with coupled decay; the dense FFNs take lr / N and factor x decay. */
static double sw_sgd_distance(double factor, double momentum, int nesterov) {
  exf_optim_desc desc;
  exf_optim *optim, *optim_dense;
  double norm = 0.0, norm_dense = 0.0, worst = 0.0, d;
  uint32_t step;
  gpt sw, dense;
  memset(&desc, 0, sizeof desc);
  desc.kind = EXF_SGD;
  desc.momentum = momentum;
  desc.nesterov = nesterov;
  desc.weight_decay = DECAY;
  desc.clip = 0.8;
  if (!start(&sw, gpt_fusion(EXF_SW, N), 1)) return 1.0;
  if (!start(&dense, gpt_fusion(EXF_DENSE, 0), 1)) return 1.0;
  copy_mean(&dense, &sw);
  optim = exf_optim_new(sw.model, &desc);
  optim_dense = exf_optim_new(dense.model, &desc);
  exf_optim_group(optim_dense, select_ffn_matrix, NULL, 1.0 / N, factor * DECAY);
  exf_optim_group(optim_dense, select_ffn_bias, NULL, 1.0 / N, 0.0);
  for (step = 0; step < 50; step++) {
    batch_backward(&sw, step);
    exf_optim_step(optim, 0.05, &norm);
    batch_backward(&dense, step);
    exf_optim_step(optim_dense, 0.05, &norm_dense);
    d = fabs(norm - norm_dense);
    if (!(d <= worst)) worst = d;
  }
  d = distance(&dense, &sw);
  if (!(d <= worst)) worst = d;
  CHECK_OK(sw.ctx);
  CHECK_OK(dense.ctx);
  exf_optim_free(optim);
  exf_optim_free(optim_dense);
  gpt_free(&sw);
  gpt_free(&dense);
  return worst;
}

TEST(sw_under_sgd_is_dense_at_lr_over_n) {
  CHECK_NEAR(sw_sgd_distance(N, 0.0, 0), 0.0, 1e-12);
  CHECK_NEAR(sw_sgd_distance(N, 0.9, 0), 0.0, 1e-12);
  CHECK_NEAR(sw_sgd_distance(N, 0.9, 1), 0.0, 1e-12);
  CHECK(sw_sgd_distance(1.0, 0.0, 0) > 1e-6);
}

/* ---- sections 5.2 and 5.3: differences between experts ----------------------- */

/* Largest |e_i - e_0| of all expert sets, bit for bit when it is zero. */
static double spread_of_experts(gpt *g) {
  size_t i, j, n, sets = 0;
  double d, worst = 0.0;
  for (i = 0; i < exf_model_n_params(g->model); i++) {
    exf_param *p = exf_model_param(g->model, i);
    exf_tensor *t = &p->tensor;
    if (!strstr(p->name, ".experts.")) continue;
    n = t->size / t->shape.dim[0];
    sets++;
    for (j = n; j < t->size; j++) {
      d = fabs(t->data[j] - t->data[j % n]);
      if (!(d <= worst)) worst = d;
    }
  }
  CHECK(sets == 8);
  return worst;
}

/* 20 steps of AdamW; counts the steps after which the copies differ. */
static void copies(exf_variant variant, int softmax) {
  exf_fusion_desc fusion = gpt_fusion(variant, N);
  exf_tensor *set;
  exf_optim *optim;
  uint32_t step;
  double before;
  gpt g;
  fusion.dw_softmax = softmax;
  fusion.upcycle = EXF_UP_COPY;
  if (!start(&g, fusion, 0)) return;
  optim = adamw(g.model, 1e-8, 1.0);
  set = &exf_model_find(g.model, "transformer.h.0.mlp.experts.c_fc.weight")->tensor;
  before = set->data[0];
  for (step = 0; step < 20; step++) {
    CHECK(spread_of_experts(&g) == 0.0);
    batch_backward(&g, step);
    exf_optim_step(optim, 1e-2, NULL);
  }
  CHECK(spread_of_experts(&g) == 0.0);
  CHECK(fabs(set->data[0] - before) > 1e-3);
  CHECK_OK(g.ctx);
  exf_optim_free(optim);
  gpt_free(&g);
}

TEST(copies_stay_identical) {
  copies(EXF_SW, 0);
  copies(EXF_DW, 0);
  copies(EXF_DW, 1);
}

/* Differences from the mean of every expert set, one after the other. */
static size_t differences(gpt *g, double *out, int *decays, size_t room) {
  size_t i, j, n, k = 0;
  for (i = 0; i < exf_model_n_params(g->model); i++) {
    exf_param *p = exf_model_param(g->model, i);
    exf_tensor *t = &p->tensor;
    if (!strstr(p->name, ".experts.")) continue;
    n = t->size / t->shape.dim[0];
    if (!CHECK(k + t->size <= room)) return 0;
    for (j = 0; j < t->size; j++, k++) {
      out[k] = t->data[j] - mean_value(t, n, j % n);
      decays[k] = p->decay;
    }
  }
  return k;
}

TEST(differences_shrink_by_the_predicted_factor) {
  static double first[16384], last[16384];
  static int decays[16384];
  exf_schedule schedule = schedule_of(40);
  double factor = exf_expert_decay(&schedule, DECAY), by_hand = 1.0, lr;
  size_t k, n, n_plain = 0;
  exf_optim *optim;
  uint32_t step;
  gpt g;
  if (!start(&g, gpt_fusion(EXF_SW, N), 1)) return;
  optim = adamw(g.model, 1e-8, 1.0);
  n = differences(&g, first, decays, 16384);
  for (step = 0; step < 40; step++) {
    lr = exf_schedule_lr(&schedule, step);
    by_hand *= 1.0 - lr * DECAY;
    batch_backward(&g, step);
    exf_optim_step(optim, lr, NULL);
  }
  CHECK(differences(&g, last, decays, 16384) == n && n > 0);
  CHECK_NEAR(factor, by_hand, 1e-14);
  CHECK(factor < 0.99 && factor > 0.9);
  for (k = 0; k < n; k++) {
    n_plain += !decays[k];
    CHECK_NEAR(last[k], decays[k] ? factor * first[k] : first[k], 1e-13);
  }
  CHECK(n_plain == 2 * N * (64 + 16));
  CHECK(exf_ffn_diagnose(exf_model_ffn(g.model, 0), NULL, NULL, NULL) > 2.999);
  CHECK_OK(g.ctx);
  exf_optim_free(optim);
  gpt_free(&g);
}

/* ---- section 3: zerosum ------------------------------------------------------ */

static void zerosum(exf_variant variant, int softmax, int routed) {
  static double before[LOGITS], after[LOGITS];
  exf_fusion_desc fusion = gpt_fusion(variant, 4);
  double diversity[4], largest = 0.0;
  int32_t ids[2 * 8];
  exf_param *p;
  exf_tensor *t;
  size_t i;
  gpt g;
  fusion.dw_softmax = softmax;
  fusion.routed = routed;
  fusion.upcycle = EXF_UP_ZEROSUM;
  if (!start(&g, gpt_fusion(EXF_DENSE, 0), 1)) return;
  gpt_tokens(&g, 1000, ids, 2 * 8);
  gpt_evaluate(&g, ids, 2, before);
  CHECK(exf_model_upcycle(g.model, &fusion) == EXF_OK);
  p = exf_model_find(g.model, "transformer.h.1.mlp.experts.c_proj.weight");
  if (!CHECK(p != NULL)) return;
  t = &p->tensor;
  CHECK(t->shape.n == 3 && t->shape.dim[0] == 4 && t->shape.dim[1] == 16
        && t->shape.dim[2] == 64);
  gpt_evaluate(&g, ids, 2, after);
  for (i = 0; i < LOGITS; i++) {
    CHECK_NEAR(after[i], before[i], 1e-12);
    if (fabs(after[i]) > largest) largest = fabs(after[i]);
  }
  CHECK(largest > 0.1);
  for (i = 0; i < exf_model_n_ffns(g.model); i++) {
    CHECK_NEAR(exf_ffn_diagnose(exf_model_ffn(g.model, i), NULL, NULL, diversity), 4.0,
               1e-12);
    CHECK(diversity[0] > 0.1 && diversity[1] > 0.1 && diversity[2] > 0.1
          && diversity[3] > 0.1);
  }
  CHECK_OK(g.ctx);
  gpt_free(&g);
}

TEST(zerosum_preserves_logits) {
  zerosum(EXF_SW, 0, 0);
  zerosum(EXF_DW, 0, 0);
  zerosum(EXF_DW, 1, 0);
  zerosum(EXF_MB, 0, 0);
  zerosum(EXF_MB, 0, 1);
}

/* ---- section 5.4: raw weights ------------------------------------------------ */

/* a_i^2 - ||th_i||^2 over the tensors of FFN f. */
static double invariant(gpt *g, size_t f, size_t expert) {
  static const char *const tensors[] = {"c_fc.weight", "c_fc.bias", "c_proj.weight",
                                        "c_proj.bias"};
  const char *ffn = exf_model_ffn(g->model, f)->name;
  double value, a[N];
  size_t k, j, n;
  exf_param *p;
  exf_tensor *t;
  char name[96];
  exf_ffn_diagnose(exf_model_ffn(g->model, f), a, NULL, NULL);
  value = a[expert] * a[expert];
  for (k = 0; k < 4; k++) {
    snprintf(name, sizeof name, "%s.experts.%s", ffn, tensors[k]);
    p = exf_model_find(g->model, name);
    if (!CHECK(p != NULL)) return 0.0;
    t = &p->tensor;
    n = t->size / N;
    for (j = 0; j < n; j++)
      value -= t->data[expert * n + j] * t->data[expert * n + j];
  }
  return value;
}

/* Plain SGD without decay and clipping, on one batch. Returns the largest drift of the
   invariant, and in moved the smallest change of an a_i^2. */
static double raw_drift(double lr, int steps, double *moved) {
  double first[2][N], weights[2][N], a[N], d, worst = 0.0;
  exf_optim_desc desc;
  exf_optim *optim;
  size_t f, i;
  int s;
  gpt g;
  memset(&desc, 0, sizeof desc);
  desc.kind = EXF_SGD;
  *moved = 0.0;
  if (!start(&g, gpt_fusion(EXF_DW, N), 1)) return 1.0;
  optim = exf_optim_new(g.model, &desc);
  for (f = 0; f < 2; f++) {
    exf_ffn_diagnose(exf_model_ffn(g.model, f), weights[f], NULL, NULL);
    for (i = 0; i < N; i++) first[f][i] = invariant(&g, f, i);
  }
  for (s = 0; s < steps; s++) {
    batch_backward(&g, 0);
    exf_optim_step(optim, lr, NULL);
  }
  *moved = 1e9;
  for (f = 0; f < 2; f++) {
    exf_ffn_diagnose(exf_model_ffn(g.model, f), a, NULL, NULL);
    for (i = 0; i < N; i++) {
      d = fabs(a[i] * a[i] - weights[f][i] * weights[f][i]);
      if (d < *moved) *moved = d;
      d = fabs(invariant(&g, f, i) - first[f][i]);
      if (!(d <= worst)) worst = d;
    }
  }
  CHECK_OK(g.ctx);
  exf_optim_free(optim);
  gpt_free(&g);
  return worst;
}

TEST(raw_weights_conserve_their_invariant) {
  double moved, half, drift = raw_drift(1e-3, 40, &moved);
  CHECK(moved > 1e-5);
  CHECK_NEAR(drift, 0.0, 0.2 * moved);
  half = raw_drift(5e-4, 80, &moved);
  CHECK_NEAR(drift / half, 2.0, 0.05);
}

/* ---- section 5.5: norms ------------------------------------------------------ */

/* sum of squares of a gradient: of an expert set by G (counted once) or, materialised,
   by every a_i G */
static double gradient_square(exf_param *p, int materialise) {
  static double g[16384];
  exf_tensor *t = &p->tensor;
  size_t j, n = t->size;
  double sum = 0.0;
  if (!CHECK(t->grad != NULL && t->size <= 16384)) return 0.0;
  if (strstr(p->name, ".experts.") && !materialise) n /= N;
  if (materialise) CHECK(exf_expert_grad(p, g) == EXF_OK);
  for (j = 0; j < n; j++)
    sum += materialise ? g[j] * g[j] : t->grad[j] * t->grad[j];
  return sum;
}

static void norms(int expert_norm) {
  exf_optim_desc desc;
  double norm = 0.0, square = 0.0, other = 0.0;
  exf_optim *optim;
  size_t i;
  gpt g;
  memset(&desc, 0, sizeof desc);
  desc.expert_norm = expert_norm;
  if (!start(&g, gpt_fusion(EXF_DW, N), 1)) return;
  optim = exf_optim_new(g.model, &desc);
  batch_backward(&g, 0);
  for (i = 0; i < exf_model_n_params(g.model); i++) {
    square += gradient_square(exf_model_param(g.model, i), expert_norm);
    other += gradient_square(exf_model_param(g.model, i), !expert_norm);
  }
  exf_optim_step(optim, 1e-3, &norm);
  CHECK_NEAR(norm * norm, square, 1e-13 * square);
  CHECK(fabs(square - other) > 0.1 * square);
  CHECK_OK(g.ctx);
  exf_optim_free(optim);
  gpt_free(&g);
}

TEST(norm_counts_an_ffn_by_its_fused_gradient) { norms(0); }
TEST(expert_norm_counts_every_expert) { norms(1); }

/* ---- section 2: accumulation ------------------------------------------------- */

/* 10 steps on one batch of 4 rows, or on 2 + 2 rows. */
static double accumulation_distance(exf_variant variant) {
  exf_optim *optim[2];
  gpt g[2];
  int32_t tokens[TOKENS];
  double norm[2] = {0.0, 0.0}, d, worst = 0.0, moved = 0.0, before;
  size_t i, j, k;
  uint32_t step;
  for (k = 0; k < 2; k++) {
    if (!start(&g[k], gpt_fusion(variant, variant == EXF_DENSE ? 0 : N), 1)) return 1.0;
    optim[k] = adamw(g[k].model, 1e-4, 1.0);
  }
  before = exf_model_param(g[0].model, 0)->tensor.data[0];
  for (step = 0; step < 10; step++) {
    gpt_tokens(&g[0], step, tokens, TOKENS);
    for (k = 0; k < 2; k++) exf_step_begin(g[k].ctx, step);
    gpt_backward(&g[0], tokens, BATCH, 1.0);
    gpt_backward(&g[1], tokens, BATCH / 2, 0.5);
    gpt_backward(&g[1], tokens + TOKENS / 2, BATCH / 2, 0.5);
    for (k = 0; k < 2; k++) exf_optim_step(optim[k], 1e-2, &norm[k]);
    d = fabs(norm[0] - norm[1]);
    if (!(d <= worst)) worst = d;
  }
  for (i = 0; i < exf_model_n_params(g[0].model); i++) {
    exf_tensor *a = &exf_model_param(g[0].model, i)->tensor;
    exf_tensor *b = &exf_model_param(g[1].model, i)->tensor;
    for (j = 0; j < a->size; j++) {
      d = fabs(a->data[j] - b->data[j]);
      if (!(d <= worst)) worst = d;
    }
    if (i == 0) moved = fabs(a->data[0] - before);
  }
  CHECK(moved > 1e-3);
  for (k = 0; k < 2; k++) {
    CHECK_OK(g[k].ctx);
    exf_optim_free(optim[k]);
    gpt_free(&g[k]);
  }
  return worst;
}

TEST(accumulation_equals_one_batch) {
  CHECK_NEAR(accumulation_distance(EXF_DENSE), 0.0, 1e-12);
  CHECK_NEAR(accumulation_distance(EXF_SW), 0.0, 1e-12);
  CHECK_NEAR(accumulation_distance(EXF_DW), 0.0, 1e-12);
}

/* ---- fewer numbers in training ----------------------------------------------- */

/* Merges both models: norm of the difference over the norm of what g holds. */
static double merged_distance(gpt *g, gpt *other) {
  double square = 0.0, change = 0.0, d;
  size_t i, j;
  exf_model_merge(g->model);
  exf_model_merge(other->model);
  CHECK(exf_model_n_params(g->model) == exf_model_n_params(other->model));
  for (i = 0; i < exf_model_n_params(g->model); i++) {
    exf_tensor *a = &exf_model_param(g->model, i)->tensor;
    exf_tensor *b = &exf_model_param(other->model, i)->tensor;
    for (j = 0; CHECK(a->size == b->size) && j < a->size; j++) {
      d = a->data[j] - b->data[j];
      change += d * d;
      square += a->data[j] * a->data[j];
    }
  }
  CHECK(square > 0.0);
  return sqrt(change / square);
}

/* The same training with every expert's own moments, and with shared ones. 50 steps in
   which eps matters and some clip by the norm over experts. */
static double thrifty_distance(exf_fusion_desc fusion, exf_optim_desc desc) {
  exf_optim_desc thrifty_desc = desc;
  exf_optim *optim, *optim_thrifty;
  double norm = 0.0, norm_thrifty = 0.0, d, worst = 0.0;
  gpt g, thrifty;
  uint32_t step;
  thrifty_desc.shared_moments = 1;
  if (!start(&g, fusion, 0) || !start(&thrifty, fusion, 0)) return 1.0;
  optim = exf_optim_new(g.model, &desc);
  optim_thrifty = exf_optim_new(thrifty.model, &thrifty_desc);
  CHECK(exf_ctx_stats(thrifty.ctx).bytes < exf_ctx_stats(g.ctx).bytes);
  for (step = 0; step < 50; step++) {
    double loss = batch_backward(&g, step);
    exf_optim_step(optim, 1e-2, &norm);
    d = fabs(loss - batch_backward(&thrifty, step));
    exf_optim_step(optim_thrifty, 1e-2, &norm_thrifty);
    d += fabs(norm - norm_thrifty);
    if (fusion.variant == EXF_SW && !(d <= worst)) worst = d;
  }
  CHECK_OK(g.ctx);
  CHECK_OK(thrifty.ctx);
  exf_optim_free(optim);
  exf_optim_free(optim_thrifty);
  d = merged_distance(&g, &thrifty);
  if (!(d <= worst)) worst = d;
  gpt_free(&g);
  gpt_free(&thrifty);
  return worst;
}

static exf_optim_desc thrifty_optim(void) {
  exf_optim_desc desc;
  memset(&desc, 0, sizeof desc);
  desc.beta2 = 0.99;
  desc.eps = 1e-3;
  desc.weight_decay = DECAY;
  desc.clip = 0.8;
  desc.expert_norm = 1;
  return desc;
}

TEST(shared_moments_are_exact_for_sw) {
  CHECK_NEAR(thrifty_distance(gpt_fusion(EXF_SW, N), thrifty_optim()), 0.0, 1e-12);
}

/* What the approximation costs where weights change: of the length of all parameters. */
TEST(shared_moments_come_close_for_dw_and_mb) {
  exf_optim_desc desc = thrifty_optim();
  double dw, mb;
  desc.eps = 1e-8;
  dw = thrifty_distance(gpt_fusion(EXF_DW, N), desc);
  mb = thrifty_distance(gpt_fusion(EXF_MB, N), desc);
  printf("  50 steps with shared moments deviate by %.1e (dw), %.1e (mb)\n", dw, mb);
  CHECK(dw > 0.0 && dw < 0.05);
  CHECK(mb > 0.0 && mb < 0.05);
}

/* What one thread does at once, several do in pieces. */
TEST(updates_in_pieces_are_those_of_the_whole) {
  enum { SIZE = 40, ALL = 3 * SIZE };
  static const size_t cut[4] = {0, 16, 32, SIZE};
  static const exf_real scale[3] = {1, -1, 1};
  exf_real x[2][3][ALL], g[SIZE];      /* whole or in pieces; p, m, v */
  int kind, k, pieces;
  for (kind = 0; kind < 3; kind++) {   /* SGD, AdamW, AdamW with shared moments */
    for (k = 0; k < ALL * 3; k++)
      x[0][k / ALL][k % ALL] = x[1][k / ALL][k % ALL] =
          exf_rng_uniform(1, 1, 1, (uint64_t)k);
    for (k = 0; k < SIZE; k++) g[k] = exf_rng_normal(1, 1, 2, (uint64_t)k);
    for (pieces = 0; pieces < 2; pieces++) {
      exf__update u;
      exf__kernel *update = kind == 0 ? exf__sgd
                            : kind == 1 ? exf__kernels_for(EXF_ISA_REF)->adamw
                                        : exf__kernels_for(EXF_ISA_REF)->adamw_shared;
      memset(&u, 0, sizeof u);
      u.adam.n_experts = 3;
      u.adam.stride = SIZE;
      u.adam.p = x[pieces][0];
      u.adam.m = x[pieces][1];
      u.adam.v = x[pieces][2];
      u.adam.g = g;
      u.adam.scale = scale;
      u.adam.clip = u.adam.decay = u.adam.inv_sqrt_bias2 = 1;
      u.adam.beta1 = u.adam.one_minus_beta1 = u.adam.beta2 = 0.5;
      u.adam.one_minus_beta2 = u.adam.step = u.adam.eps = 0.5;
      u.lr = u.momentum = 0.5;
      if (!pieces) update(&u, 0, SIZE, NULL);
      for (k = 0; pieces && k < 3; k++) update(&u, cut[k], cut[k + 1], NULL);
    }
    CHECK(memcmp(x[0], x[1], sizeof x[0]) == 0);
    CHECK(x[0][0][ALL - 1] != exf_rng_uniform(1, 1, 1, ALL - 1));
  }
}

/* In this build files hold F64, and every bit of it. */
TEST(doubles_survive_a_file) {
  static const exf_real x[4] = {1.0 / 3, -1e300, 4.9e-324, 0.1};
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_st_item item;
  exf_st *st;
  exf_real y[4];
  unsigned char *data;
  size_t bytes;
  item.name = "x";
  item.shape = exf_shape1(4);
  item.data = x;
  CHECK(exf_st_save_memory(ctx, &item, 1, NULL, 0, &data, &bytes) == EXF_OK);
  st = exf_st_open_memory(ctx, data, bytes, NULL);
  if (CHECK(exf_st_find(st, "x") != NULL)) {
    CHECK_STR(exf_st_find(st, "x")->dtype, "F64");
    CHECK(exf_st_read(ctx, exf_st_find(st, "x"), y, 4) == EXF_OK);
    CHECK(memcmp(x, y, sizeof x) == 0);
  }
  exf_st_close(st);
  exf_st_free_memory(ctx, data);
  exf_ctx_free(ctx);
}

int main(void) {
  RUN(sw_under_adamw_is_dense_with_n_eps);
  RUN(sw_under_sgd_is_dense_at_lr_over_n);
  RUN(copies_stay_identical);
  RUN(differences_shrink_by_the_predicted_factor);
  RUN(zerosum_preserves_logits);
  RUN(raw_weights_conserve_their_invariant);
  RUN(norm_counts_an_ffn_by_its_fused_gradient);
  RUN(expert_norm_counts_every_expert);
  RUN(accumulation_equals_one_batch);
  RUN(shared_moments_are_exact_for_sw);
  RUN(shared_moments_come_close_for_dw_and_mb);
  RUN(updates_in_pieces_are_those_of_the_whole);
  RUN(doubles_survive_a_file);
  TEST_MAIN_END;
}
