/* tests/test_golden.c - the library beside PyTorch, and what must agree bit for bit.
   Reads the numbers that tests/golden/make_golden.py wrote, from the root of the
   project; that script says what the runs are. */
#ifndef TEST_LINKED    /* the Makefile links the implementation in */
#define EXFUSION_IMPLEMENTATION
#endif
#include "../exfusion.h"

#include "test.h"
#include "gpt.h"

#define STEPS 20
#define BATCH 3
#define EXPERTS 3
#define BIGGEST 4096   /* numbers of the largest tensor: 3 x 64 x 16 */

/* In double what remains is the rounding of the fixtures' deltas to float32. */
#ifdef EXF_DOUBLE
#define TOL_LOSS 1e-12
#define TOL_NORM 1e-12
#define TOL_MOVE 1e-6
#define TOL_ZERO 1e-14
#else
#define TOL_LOSS 1e-5
#define TOL_NORM 1e-6
#define TOL_MOVE 1e-4
#define TOL_ZERO 1e-6
#endif

/* ---- fixtures ---------------------------------------------------------------- */

static exf_st *fixture_open(exf_ctx *ctx, const char *name) {
  char path[128];
  exf_st *st;
  snprintf(path, sizeof path, "tests/golden/%s.safetensors", name);
  st = exf_st_open(ctx, path, NULL);
  if (!st) printf("  %s\n", exf_error(ctx));
  return st;
}

/* Number i of an F64 tensor, whatever the precision of the library. */
static double fixture_f64(const exf_st *st, const char *name, size_t i) {
  const exf_st_entry *entry = exf_st_find(st, name);
  uint64_t bits = 0;
  double value;
  size_t k;
  if (!CHECK(entry != NULL) || !CHECK(entry->bytes >= 8 * (i + 1))) return 0.0;
  for (k = 8; k-- > 0;) bits = bits << 8 | entry->data[8 * i + k];
  memcpy(&value, &bits, sizeof value);
  return value;
}

static int fixture_read(exf_ctx *ctx, const exf_st *st, const char *name, exf_real *out,
                        size_t n) {
  const exf_st_entry *entry = exf_st_find(st, name);
  if (!entry) printf("  the fixture has no %s\n", name);
  return CHECK(entry != NULL && n <= BIGGEST)
         && CHECK(exf_st_read(ctx, entry, out, n) == EXF_OK);
}

static void bank_name(const gpt *g, size_t i, char *out, size_t size) {
  snprintf(out, size, "%s.bank", exf_model_ffn(g->model, i)->name);
}

/* Every parameter and bank from the initial values, by way of a checkpoint in memory
   that holds just those of this model. */
static int load_initial(gpt *g, const exf_st *init, int banks) {
  static exf_real values[64][BIGGEST];
  static char names[64][64];
  exf_st_item items[64];
  size_t i, n = exf_model_n_params(g->model), bytes = 0, all;
  unsigned char *data = NULL;
  exf_st *st;
  int ok = 1;
  all = n + (banks ? exf_model_n_ffns(g->model) : 0);
  if (!CHECK(n > 0 && all <= 64)) return 0;
  for (i = 0; i < all; i++) {
    if (i < n) {
      exf_param *p = exf_model_param(g->model, i);
      snprintf(names[i], sizeof names[i], "%s", p->name);
      items[i].shape = p->tensor.shape;
    } else {
      bank_name(g, i - n, names[i], sizeof names[i]);
      items[i].shape = exf_shape1(EXPERTS);
    }
    items[i].name = names[i];
    items[i].data = values[i];
    ok = ok && fixture_read(g->ctx, init, names[i], values[i],
                            i < n ? exf_model_param(g->model, i)->tensor.size
                                  : EXPERTS);
  }
  if (!ok) return 0;
  exf_st_save_memory(g->ctx, items, all, NULL, 0, &data, &bytes);
  st = exf_st_open_memory(g->ctx, data, bytes, NULL);
  exf_st_free_memory(g->ctx, data);
  if (exf_checkpoint_load_st(g->model, NULL, st) != EXF_OK)
    ok = CHECK(0 && "the checkpoint of initial values loads");
  exf_st_close(st);
  for (i = 0; i < n; i++) {
    exf_tensor *t = &exf_model_param(g->model, i)->tensor;
    ok = CHECK(memcmp(t->data, values[i], t->size * sizeof(exf_real)) == 0) && ok;
  }
  return ok;
}

/* ---- golden runs ------------------------------------------------------------- */

/* The key bias adds the same number to all scores of a row, which softmax takes away: its
   gradient is zero, and AdamW makes steps of whatever rounding leaves of it. Returns its
   first element in c_attn.bias, or n for any other tensor. */
static size_t key_bias(const char *name, size_t n) {
  size_t length = strlen(name), tail = strlen("c_attn.bias");
  return length > tail && strcmp(name + length - tail, "c_attn.bias") == 0 ? n / 3 : n;
}

static void check_key_gradients(gpt *g) {
  size_t i, j;
  for (i = 0; i < exf_model_n_params(g->model); i++) {
    exf_param *p = exf_model_param(g->model, i);
    exf_tensor *t = &p->tensor;
    size_t first = key_bias(p->name, t->size);
    if (first == t->size) continue;
    if (!CHECK(t->grad != NULL)) return;
    for (j = first; j < 2 * first; j++) CHECK_NEAR(t->grad[j], 0, TOL_ZERO);
  }
}

/* ||(now - start) - delta|| / ||delta|| of one tensor against the fixture. */
static void check_moved(gpt *g, const exf_st *init, const exf_st *run, const char *name,
                        const double *now, size_t n) {
  static exf_real start[BIGGEST], delta[BIGGEST];
  char key[96];
  size_t i, first = key_bias(name, n);
  double d, wrong = 0.0, moved = 0.0;
  snprintf(key, sizeof key, "delta.%s", name);
  if (!fixture_read(g->ctx, init, name, start, n)) return;
  if (!fixture_read(g->ctx, run, key, delta, n)) return;
  for (i = 0; i < n; i++) {
    if (i >= first && i < 2 * first) continue;
    d = now[i] - (double)start[i] - (double)delta[i];
    wrong += d * d;
    moved += (double)delta[i] * (double)delta[i];
  }
  CHECK(moved > 0.0);
  if (!CHECK(sqrt(wrong) <= TOL_MOVE * sqrt(moved)))
    printf("  %s: %.3g of the distance it moved\n", name, sqrt(wrong / moved));
}

/* Compares all that the run's file holds, beside its losses and norms. */
static void check_final(gpt *g, const exf_st *init, const exf_st *run, int banks) {
  static double now[BIGGEST];
  size_t i, j, compared = 0;
  char name[64];
  for (i = 0; i < exf_model_n_params(g->model); i++, compared++) {
    exf_param *p = exf_model_param(g->model, i);
    exf_tensor *t = &p->tensor;
    if (!CHECK(t->size <= BIGGEST)) return;
    for (j = 0; j < t->size; j++) now[j] = (double)t->data[j];
    check_moved(g, init, run, p->name, now, t->size);
  }
  for (i = 0; banks && i < exf_model_n_ffns(g->model); i++, compared++) {
    exf_ffn_diagnose(exf_model_ffn(g->model, i), now, NULL, NULL);
    bank_name(g, i, name, sizeof name);
    check_moved(g, init, run, name, now, EXPERTS);
  }
  CHECK(compared > 0 && compared + 2 == exf_st_count(run));
}

static exf_optim *golden_optim(exf_model *model) {
  exf_optim_desc desc;
  memset(&desc, 0, sizeof desc);
  desc.beta1 = 0.9;
  desc.beta2 = 0.99;
  desc.weight_decay = 0.1;
  desc.clip = 1.0;
  return exf_optim_new(model, &desc);
}

static double golden_lr(uint64_t step) {
  exf_schedule schedule;
  memset(&schedule, 0, sizeof schedule);
  schedule.kind = EXF_SCHEDULE_COSINE;
  schedule.lr = 1e-3;
  schedule.min_lr = 1e-4;
  schedule.warmup = 5;
  schedule.steps = STEPS;
  return exf_schedule_lr(&schedule, step);
}

static void golden_steps(gpt *g, exf_optim *optim, const exf_st *init, const exf_st *run,
                         size_t micro) {
  static exf_real numbers[BIGGEST];
  int32_t tokens[BATCH * 9];
  size_t step, k, i, n = BATCH * 9, clipped = 0;
  double loss, norm = 0.0, want;
  if (!fixture_read(g->ctx, init, "tokens", numbers, STEPS * 2 * n)) return;
  for (step = 0; step < STEPS; step++) {
    exf_step_begin(g->ctx, step);
    for (k = 0, loss = 0.0; k < micro; k++) {
      for (i = 0; i < n; i++) tokens[i] = (int32_t)numbers[(2 * step + k) * n + i];
      loss += gpt_backward(g, tokens, BATCH, 1.0 / (double)micro) / (double)micro;
    }
    check_key_gradients(g);
    exf_optim_step(optim, golden_lr(step), &norm);
    CHECK_NEAR(loss, fixture_f64(run, "loss", step), TOL_LOSS);
    want = fixture_f64(run, "norm", step);
    CHECK_NEAR(norm / want, 1.0, TOL_NORM);
    clipped += want > 1.0;
  }
  CHECK(clipped > 0 && clipped < STEPS);
}

static void golden_run(const char *name, exf_fusion_desc fusion, int bias, size_t micro) {
  static const exf_isa isas[] = {EXF_ISA_AUTO, EXF_ISA_REF};
  int banks = fusion.variant == EXF_MB;
  size_t i;
  for (i = 0; i < sizeof isas / sizeof isas[0]; i++) {
    gpt_desc desc = gpt_desc_small(bias);
    exf_st *init, *run;
    exf_optim *optim;
    gpt g;
    desc.fusion = fusion;
    if (!CHECK(gpt_new(&g, &desc, isas[i]))) return;
    init = fixture_open(g.ctx, "init");
    run = fixture_open(g.ctx, name);
    if (CHECK(init && run) && load_initial(&g, init, banks)) {
      optim = golden_optim(g.model);
      golden_steps(&g, optim, init, run, micro);
      check_final(&g, init, run, banks);
      exf_optim_free(optim);
    }
    CHECK_OK(g.ctx);
    exf_st_close(init);
    exf_st_close(run);
    gpt_free(&g);
  }
}

typedef enum kind { DENSE, SW, DW_RAW, DW_SOFTMAX, MB, MB_ROUTED, N_KINDS } kind;

static exf_fusion_desc kind_fusion(int k, size_t n) {
  static const exf_variant variants[] = {EXF_DENSE, EXF_SW, EXF_DW,
                                         EXF_DW,    EXF_MB, EXF_MB};
  exf_fusion_desc fusion = gpt_fusion(variants[k], k == DENSE ? 0 : n);
  fusion.dw_softmax = k == DW_SOFTMAX;
  fusion.routed = k == MB_ROUTED;
  return fusion;
}

#define GOLDEN(test, file, k, bias, micro) \
  TEST(test) { golden_run(file, kind_fusion(k, EXPERTS), bias, micro); }
GOLDEN(golden_dense, "dense", DENSE, 1, 1)
GOLDEN(golden_dense_nobias, "dense-nobias", DENSE, 0, 1)
GOLDEN(golden_sw, "sw", SW, 1, 1)
GOLDEN(golden_sw_nobias, "sw-nobias", SW, 0, 1)
GOLDEN(golden_dw_raw, "dw-raw", DW_RAW, 1, 1)
GOLDEN(golden_dw_raw_nobias, "dw-raw-nobias", DW_RAW, 0, 1)
GOLDEN(golden_dw_softmax, "dw-softmax", DW_SOFTMAX, 1, 1)
GOLDEN(golden_dw_softmax_nobias, "dw-softmax-nobias", DW_SOFTMAX, 0, 1)
GOLDEN(golden_mb, "mb", MB, 1, 1)
GOLDEN(golden_mb_nobias, "mb-nobias", MB, 0, 1)
GOLDEN(golden_mb_routed, "mb-routed", MB_ROUTED, 1, 1)
GOLDEN(golden_mb_routed_nobias, "mb-routed-nobias", MB_ROUTED, 0, 1)
GOLDEN(golden_mb_accumulated, "mb-accum", MB, 1, 2)
GOLDEN(golden_mb_routed_accumulated, "mb-routed-accum", MB_ROUTED, 1, 2)

/* ---- bit for bit ------------------------------------------------------------- */

/* One step on tokens of its own; returns the loss. */
static double train_step(gpt *g, exf_optim *optim, uint32_t step, double *norm) {
  int32_t tokens[BATCH * 9];
  double loss;
  exf_step_begin(g->ctx, step);
  gpt_tokens(g, step, tokens, BATCH * 9);
  loss = gpt_backward(g, tokens, BATCH, 1.0);
  exf_optim_step(optim, golden_lr(step), norm);
  return loss;
}

/* Parameters of the model with one expert against those of the dense one. Returns how
   many numbers differ. */
static size_t compare_one_expert(gpt *dense, gpt *one) {
  size_t i, j, differ = 0;
  for (i = 0; i < exf_model_n_params(dense->model); i++) {
    exf_param *p = exf_model_param(dense->model, i), *q;
    exf_tensor *a = &p->tensor, *b;
    const char *name = p->name, *mlp = strstr(name, ".mlp.");
    char key[96];
    if (mlp)
      snprintf(key, sizeof key, "%.*s.mlp.experts.%s", (int)(mlp - name), name, mlp + 5);
    else
      snprintf(key, sizeof key, "%s", name);
    q = exf_model_find(one->model, key);
    if (!CHECK(q != NULL)) return (size_t)-1;
    b = &q->tensor;
    if (!CHECK(a->size == b->size && a->size > 0)) return (size_t)-1;
    for (j = 0; j < a->size; j++)
      differ += memcmp(a->data + j, b->data + j, sizeof *a->data) != 0;
  }
  return differ;
}

static void one_expert(int k, int bias) {
  gpt_desc desc = gpt_desc_small(bias);
  gpt dense, one;
  exf_optim *optim, *optim_one;
  double loss, loss_one, norm = 0.0, norm_one = 0.0, first = 0.0;
  uint32_t step;
  if (!CHECK(gpt_new(&dense, &desc, EXF_ISA_AUTO))) return;
  desc.fusion = kind_fusion(k, 1);
  if (!CHECK(gpt_new(&one, &desc, EXF_ISA_AUTO))) return;
  CHECK(compare_one_expert(&dense, &one) == 0);
  optim = golden_optim(dense.model);
  optim_one = golden_optim(one.model);
  for (step = 0; step < STEPS; step++) {
    loss = train_step(&dense, optim, step, &norm);
    loss_one = train_step(&one, optim_one, step, &norm_one);
    CHECK(memcmp(&loss, &loss_one, sizeof loss) == 0);
    CHECK(memcmp(&norm, &norm_one, sizeof norm) == 0);
    if (step == 0) first = loss;
  }
  CHECK(loss < first || loss > first);
  CHECK(norm > 0.0);
  CHECK(compare_one_expert(&dense, &one) == 0);
  CHECK_OK(dense.ctx);
  CHECK_OK(one.ctx);
  exf_optim_free(optim);
  exf_optim_free(optim_one);
  gpt_free(&dense);
  gpt_free(&one);
}

TEST(one_expert_sw_is_dense_bit_for_bit) {
  one_expert(SW, 1);
  one_expert(SW, 0);
}
TEST(one_expert_dw_softmax_is_dense_bit_for_bit) {
  one_expert(DW_SOFTMAX, 1);
  one_expert(DW_SOFTMAX, 0);
}
TEST(one_expert_mb_is_dense_bit_for_bit) {
  one_expert(MB, 1);
  one_expert(MB, 0);
}

static void check_names_dense(const gpt *g) {
  static const char *const words[] = {"expert", "router", "fusion", "bank"};
  size_t i, w;
  for (i = 0; i < exf_model_n_params(g->model); i++)
    for (w = 0; w < sizeof words / sizeof words[0]; w++)
      CHECK(strstr(exf_model_param(g->model, i)->name, words[w]) == NULL);
}

/* Evaluation logits before and after the merge of a trained model. */
static void merge_keeps_bits(int k, exf_act act, int bias) {
  static exf_real fresh[2 * 8 * 11], before[2 * 8 * 11], after[2 * 8 * 11];
  gpt_desc desc = gpt_desc_small(bias);
  int32_t ids[2 * 8];
  exf_optim *optim;
  size_t i, count, dense_count;
  uint32_t step;
  gpt g;
  desc.act = act;
  if (!CHECK(gpt_new(&g, &desc, EXF_ISA_AUTO))) return;
  dense_count = exf_model_count(g.model);
  gpt_free(&g);
  desc.fusion = kind_fusion(k, EXPERTS);
  desc.fusion.tau = bias ? 0 : 0.3;   /* the default, and one that is no power of 2 */
  if (!CHECK(gpt_new(&g, &desc, EXF_ISA_AUTO))) return;
  gpt_tokens(&g, 1000, ids, 2 * 8);
  gpt_evaluate(&g, ids, 2, fresh);
  optim = golden_optim(g.model);
  for (step = 0; step < 10; step++) train_step(&g, optim, step, NULL);
  exf_optim_free(optim);
  gpt_evaluate(&g, ids, 2, before);
  count = exf_model_count_merged(g.model);
  CHECK((exf_model_count(g.model) > count) == (k != DENSE));
  CHECK(exf_model_merge(g.model) == EXF_OK);
  CHECK(count == dense_count && exf_model_count(g.model) == dense_count);
  check_names_dense(&g);
  gpt_evaluate(&g, ids, 2, after);
  CHECK(memcmp(fresh, before, sizeof before) != 0);
  CHECK(memcmp(before, after, sizeof before) == 0);
  for (i = 0; i < sizeof after / sizeof after[0]; i++) CHECK(after[i] - after[i] == 0);
  CHECK_OK(g.ctx);
  gpt_free(&g);
}

#define MERGE(test, k) \
  TEST(test) { \
    merge_keeps_bits(k, EXF_GELU, 1); \
    merge_keeps_bits(k, EXF_GELU, 0); \
    merge_keeps_bits(k, EXF_SWIGLU, 1); \
  }
MERGE(merge_keeps_logits_dense, DENSE)
MERGE(merge_keeps_logits_sw, SW)
MERGE(merge_keeps_logits_dw_raw, DW_RAW)
MERGE(merge_keeps_logits_dw_softmax, DW_SOFTMAX)
MERGE(merge_keeps_logits_mb, MB)
MERGE(merge_keeps_logits_mb_routed, MB_ROUTED)

int main(void) {
  RUN(golden_dense);
  RUN(golden_dense_nobias);
  RUN(golden_sw);
  RUN(golden_sw_nobias);
  RUN(golden_dw_raw);
  RUN(golden_dw_raw_nobias);
  RUN(golden_dw_softmax);
  RUN(golden_dw_softmax_nobias);
  RUN(golden_mb);
  RUN(golden_mb_nobias);
  RUN(golden_mb_routed);
  RUN(golden_mb_routed_nobias);
  RUN(golden_mb_accumulated);
  RUN(golden_mb_routed_accumulated);
  RUN(one_expert_sw_is_dense_bit_for_bit);
  RUN(one_expert_dw_softmax_is_dense_bit_for_bit);
  RUN(one_expert_mb_is_dense_bit_for_bit);
  RUN(merge_keeps_logits_dense);
  RUN(merge_keeps_logits_sw);
  RUN(merge_keeps_logits_dw_raw);
  RUN(merge_keeps_logits_dw_softmax);
  RUN(merge_keeps_logits_mb);
  RUN(merge_keeps_logits_mb_routed);
  TEST_MAIN_END;
}
