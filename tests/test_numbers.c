/* Numbers that go wrong: NaN and infinity in inputs, weights and gradients stop training
   with a name and without an update, in every variant; rows of softmax and attention
   without a finite entry are defined; and sizes near 2^31, 2^32 and SIZE_MAX are refused
   before anything is computed from them. */
#ifdef TEST_LINKED
#include "../exfusion.h"
#else
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"
#endif
#include "test.h"

#include "heap.h"
#include "tiny_gpt.h"

/* ---- a training step that must not happen ---- */

typedef struct trainer {
  exf_ctx *ctx;
  tiny_gpt g;
  exf_optim *optim;
} trainer;

static trainer trainer_new(int variant) {
  trainer t;
  exf_desc desc;
  tiny_desc d = tiny_defaults();
  memset(&desc, 0, sizeof desc);
  desc.n_threads = 1;
  desc.seed = 3;
  d.layers = 1;
  d.fusion = tiny_variant(variant, variant ? 2 : 0);
  t.ctx = exf_ctx_new(&desc);
  t.g = tiny_new(t.ctx, &d);
  t.optim = tiny_adamw(t.g.model);
  tiny_train(t.ctx, &t.g, t.optim, 0, 2, 0.01);
  CHECK_OK(t.ctx);
  return t;
}

static void trainer_free(trainer *t) {
  exf_optim_free(t->optim);
  exf_model_free(t->g.model);
  exf_ctx_free(t->ctx);
}

/* Parameters, moments, banks and the count of updates, as a checkpoint's bytes. */
static size_t trainer_bytes(trainer *t, unsigned char *out, size_t room) {
  FILE *file;
  size_t n = 0;
  exf_checkpoint_save(t->g.model, t->optim, TEST_TMP "/numbers", NULL, 0);
  CHECK_OK(t->ctx);
  file = fopen(TEST_TMP "/numbers", "rb");
  if (file != NULL) {
    n = fread(out, 1, room, file);
    fclose(file);
  }
  remove(TEST_TMP "/numbers");
  return n;
}

static exf_real bad_number(int k) {
  return k == 0 ? (exf_real)NAN : k == 1 ? (exf_real)INFINITY : (exf_real)-INFINITY;
}

/* One step with a bad number in a weight: reported, named, and nothing moved but it. */
static void bad_weight(int variant, const char *name, int kind) {
  static unsigned char before[1 << 16], after[1 << 16];
  trainer t = trainer_new(variant);
  exf_param *p = exf_model_find(t.g.model, name);
  exf_tensor *w;
  size_t n;
  uint64_t updates = exf_optim_steps(t.optim);
  int failures = test_now.failures;
  if (!CHECK(p != NULL)) return;
  w = &p->tensor;
  w->data[1] = bad_number(kind);
  n = trainer_bytes(&t, before, sizeof before);
  tiny_train(t.ctx, &t.g, t.optim, 2, 1, 0.01);
  CHECK(exf_ctx_status(t.ctx) == EXF_NUMERIC);
  CHECK(exf_optim_steps(t.optim) == updates);
  CHECK(strlen(exf_error(t.ctx)) > 20 && strchr(exf_error(t.ctx), '\n') == NULL);
  exf_error_clear(t.ctx);
  exf_rewind(t.ctx);
  CHECK(n > 1000 && trainer_bytes(&t, after, sizeof after) == n
        && memcmp(before, after, n) == 0);
  w->data[1] = 0;                                   /* the rest of the model is sound */
  exf_model_zero_grad(t.g.model);
  tiny_train(t.ctx, &t.g, t.optim, 2, 1, 0.01);
  CHECK_OK(t.ctx);
  CHECK(exf_optim_steps(t.optim) == updates + 1);
  if (test_now.failures > failures)
    printf("  %s: %g in %s\n", tiny_variant_names[variant], (double)bad_number(kind),
           name);
  trainer_free(&t);
}

/* An infinity that a softmax takes for a mask (z or a router's logit of -inf: the expert
   has the weight 0) is no error: there, only what cannot be one is tried. */
TEST(a_bad_weight_stops_training_without_an_update) {
  int variant, kind;
  for (variant = 0; variant < TINY_N_VARIANTS; variant++)
    for (kind = 0; kind < 3; kind++) {
      bad_weight(variant, "transformer.wte.weight", kind);
      bad_weight(variant, variant ? "transformer.h.0.mlp.experts.c_fc.weight"
                                  : "transformer.h.0.mlp.c_fc.weight", kind);
      if (variant == 2 || (variant == 3 && kind < 2))
        bad_weight(variant, "transformer.h.0.mlp.fusion.weight", kind);
      if (variant >= 4 && kind == 0)
        bad_weight(variant, "transformer.h.0.mlp.router.weight", kind);
    }
}

/* ---- the message names the op ---- */

static exf_tensor *mul_self(exf_ctx *ctx, exf_tensor *x) { return exf_mul(ctx, x, x); }
static exf_tensor *div_zero(exf_ctx *ctx, exf_tensor *x) {
  return exf_div(ctx, x, exf_sub(ctx, x, x));
}
static exf_tensor *scale_up(exf_ctx *ctx, exf_tensor *x) {
  return exf_scale(ctx, x, 1e300);
}
static exf_tensor *matmul_self(exf_ctx *ctx, exf_tensor *x) {
  return exf_matmul(ctx, x, x, EXF_TRANSPOSE_B);
}
static exf_tensor *linear_self(exf_ctx *ctx, exf_tensor *x) {
  return exf_linear(ctx, x, x, NULL);
}

static const struct {
  const char *op;
  exf_tensor *(*run)(exf_ctx *ctx, exf_tensor *x);
  double value;
} bad_ops[] = {
  {"exp", exf_exp, 1000}, {"log", exf_log, -1}, {"log", exf_log, 0},
  {"sqrt", exf_sqrt, -1}, {"div", div_zero, 1},
#ifndef EXF_DOUBLE
  {"square", exf_square, 1e30}, {"mul", mul_self, 1e30}, {"scale", scale_up, 1},
  {"matmul", matmul_self, 1e30}, {"linear", linear_self, 1e30},
#endif
};

TEST(the_op_that_made_the_bad_number_is_named) {
  size_t i;
  for (i = 0; i < sizeof bad_ops / sizeof bad_ops[0]; i++) {
    exf_ctx *ctx = exf_ctx_new(NULL);
    exf_model *m = exf_model_new(ctx);
    exf_param_desc d;
    exf_tensor *w, *y;
    char text[40];
    memset(&d, 0, sizeof d);
    d.shape = exf_shape2(2, 2);
    d.init_value = bad_ops[i].value;
    w = exf_param_new(m, "w", &d);
    y = bad_ops[i].run(ctx, exf_neg(ctx, exf_neg(ctx, w)));
    y = exf_sum(ctx, exf_neg(ctx, y), EXF_ALL_AXES, 0);
    CHECK(exf_backward(ctx, y) == EXF_NUMERIC);
    snprintf(text, sizeof text, "came out of %s:", bad_ops[i].op);
    CHECK_ERR(ctx, EXF_NUMERIC, text);
    CHECK(w->grad == NULL);
    exf_model_free(m);
    exf_ctx_free(ctx);
  }
}

/* A finite loss with an infinite gradient, d sqrt(x)/dx at 0: the optimizer names the
   parameter and leaves all of them alone; the mean of a constant NaN is seen, too. */
TEST(a_bad_gradient_or_input_is_seen) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_model *m = exf_model_new(ctx);
  exf_param_desc d;
  exf_optim_desc o;
  exf_optim *optim;
  exf_tensor *a, *b, *x;
  exf_real nan = (exf_real)NAN;
  memset(&d, 0, sizeof d);
  memset(&o, 0, sizeof o);
  d.shape = exf_shape1(1);
  a = exf_param_new(m, "zero", &d);
  b = exf_param_new(m, "other", &d);
  optim = exf_optim_new(m, &o);
  CHECK(exf_backward(ctx, exf_sum(ctx, exf_add(ctx, exf_sqrt(ctx, a), b), EXF_ALL_AXES,
                                  0)) == EXF_OK);
  CHECK(exf_optim_step(optim, 1, NULL) == EXF_NUMERIC);
  CHECK_ERR(ctx, EXF_NUMERIC, "'zero'");
  CHECK(a->data[0] == 0 && b->data[0] == 0 && exf_optim_steps(optim) == 0);
  exf_rewind(ctx);
  x = exf_tensor_new(ctx, exf_shape1(1), &nan);
  CHECK(exf_backward(ctx, exf_sum(ctx, exf_mul(ctx, b, x), EXF_ALL_AXES, 0))
        == EXF_NUMERIC);
  CHECK_ERR(ctx, EXF_NUMERIC, "loss is nan");
  CHECK(b->data[0] == 0);
  exf_optim_free(optim);
  exf_model_free(m);
  exf_ctx_free(ctx);
}

/* ---- rows without a finite entry ---- */

TEST(a_masked_row_gives_zeros_and_no_gradient) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_model *m = exf_model_new(ctx);
  exf_param_desc d;
  exf_tensor *w, *y, *mask;
  exf_real values[10];
  int32_t labels[2] = {-1, 2};
  int i;
  memset(&d, 0, sizeof d);
  d.shape = exf_shape2(2, 5);
  d.init_std = 1;
  w = exf_param_new(m, "w", &d);
  for (i = 0; i < 10; i++) values[i] = i < 5 ? (exf_real)-INFINITY : 0;
  mask = exf_tensor_new(ctx, d.shape, values);
  y = exf_softmax(ctx, exf_add(ctx, w, mask));
  for (i = 0; y && i < 5; i++) CHECK(y->data[i] == 0 && y->data[5 + i] > 0);
  CHECK(exf_backward(ctx, exf_sum(ctx, exf_square(ctx, y), EXF_ALL_AXES, 0)) == EXF_OK);
  for (i = 0; w->grad && i < 5; i++) CHECK(w->grad[i] == 0 && isfinite(w->grad[5 + i]));
  exf_model_zero_grad(m);
  y = exf_cross_entropy(ctx, exf_add(ctx, w, mask), labels, 0);   /* the row is ignored */
  CHECK(isfinite(exf_item(y)));
  CHECK(exf_backward(ctx, y) == EXF_OK);
  for (i = 0; w->grad && i < 5; i++) CHECK(w->grad[i] == 0 && isfinite(w->grad[5 + i]));
  CHECK_OK(ctx);
  exf_model_free(m);
  exf_ctx_free(ctx);
}

/* All kernels agree on where softmax and log softmax of odd rows are NaN. */
TEST(infinite_rows_are_the_same_on_every_kernel) {
  static const exf_isa isas[] = {EXF_ISA_SSE2, EXF_ISA_AVX2, EXF_ISA_AVX512,
                                 EXF_ISA_NEON};
  enum { N = 37, ROWS = 5 };
  exf_real x[ROWS * N], want[2][ROWS * N];
  size_t i, k;
  for (i = 0; i < ROWS * N; i++) x[i] = (exf_real)(i % 7);
  for (i = 0; i < N; i++) x[i] = (exf_real)-INFINITY;
  x[N + 3] = (exf_real)INFINITY;
  x[2 * N + 9] = (exf_real)NAN;
  for (i = 0; i < N; i++) x[3 * N + i] = (exf_real)INFINITY;
  for (k = 0; k <= sizeof isas / sizeof isas[0]; k++) {
    exf_desc desc;
    exf_ctx *ctx;
    exf_tensor *t, *y[2];
    int z;
    memset(&desc, 0, sizeof desc);
    desc.isa = k == 0 ? EXF_ISA_REF : isas[k - 1];
    ctx = exf_ctx_new(&desc);
    if (exf_ctx_status(ctx) == EXF_ARG) {      /* not on this processor */
      CHECK(exf_ctx_desc(ctx).isa != desc.isa);
      exf_ctx_free(ctx);
      continue;
    }
    t = exf_tensor_new(ctx, exf_shape2(ROWS, N), x);
    y[0] = exf_softmax(ctx, t);
    y[1] = exf_log_softmax(ctx, t);
    if (!CHECK(y[0] && y[1])) break;
    for (z = 0; z < 2; z++)
      for (i = 0; i < ROWS * N; i++) {
        if (k == 0) want[z][i] = y[z]->data[i];
        CHECK(isnan(y[z]->data[i]) == isnan(want[z][i])
              && isinf(y[z]->data[i]) == isinf(want[z][i]));
        if (i < N) CHECK(y[z]->data[i] == 0);
        if (i >= 4 * N) CHECK(isfinite(y[z]->data[i]));
        if (i >= N && i < 4 * N && i % N == 9 && i / N == 2) CHECK(isnan(want[z][i]));
      }
    exf_ctx_free(ctx);
  }
}

/* ---- sizes ---- */

static const size_t sizes[] = {
  0, 1, 3, 65535, 65536, ((size_t)1 << 30) - 1, (size_t)1 << 30, ((size_t)1 << 31) - 1,
  (size_t)1 << 31, ((size_t)1 << 31) + 1, SIZE_MAX / 64, SIZE_MAX / 16 + 1, SIZE_MAX / 8,
  SIZE_MAX / 4, SIZE_MAX / 4 + 1, SIZE_MAX / 2, SIZE_MAX / 2 + 1, SIZE_MAX - 64,
  SIZE_MAX - 1, SIZE_MAX,
#if SIZE_MAX > 0xffffffffu
  (size_t)0xffffffffu, (size_t)0x100000000u, (size_t)0x100000001u, (size_t)1 << 33,
#endif
};
enum { N_SIZES = (int)(sizeof sizes / sizeof sizes[0]) };

/* Either it was made, or refused for its size, the memory it needs, or its shape. */
static int size_ok(exf_ctx *ctx, const void *made) {
  exf_status s = exf_ctx_status(ctx);
  int ok = made ? s == EXF_OK
                : s == EXF_SIZE || s == EXF_MEMORY || s == EXF_SHAPE || s == EXF_ARG;
  if (!ok) printf("  %s: %s\n", exf_status_name(s), exf_error(ctx));
  exf_error_clear(ctx);
  return ok;
}

static size_t product(size_t a, size_t b, size_t c) {   /* saturating */
  size_t n = b && a > SIZE_MAX / b ? SIZE_MAX : a * b;
  return c && n > SIZE_MAX / c ? SIZE_MAX : n * c;
}

/* Ops that compute a size from two sizes of empty or of small tensors. */
static void size_ops(exf_ctx *ctx, size_t a, size_t b) {
  exf_tensor *x = exf_tensor_new(ctx, exf_shape3(a, 0, b), NULL), *y, *pair[2];
  int32_t id = 0;
  CHECK(size_ok(ctx, x) && (x == NULL || x->size == 0));
  if (x == NULL) return;
  y = exf_reshape(ctx, x, exf_shape2(a, b));
  CHECK(size_ok(ctx, y) && (y == NULL || product(a, b, 1) == 0));
  pair[0] = pair[1] = x;
  CHECK(size_ok(ctx, exf_concat(ctx, pair, 2, 0)));
  CHECK(size_ok(ctx, exf_concat(ctx, pair, 2, 1)));
  CHECK(size_ok(ctx, exf_concat(ctx, pair, 2, 2)));
  CHECK(size_ok(ctx, exf_slice(ctx, x, 0, 0, b)));
  CHECK(size_ok(ctx, exf_slice(ctx, x, 1, 0, 0)));
  y = exf_sum(ctx, x, EXF_AXIS(1), 0);                    /* (a,b) of zeros */
  CHECK(size_ok(ctx, y) && (y == NULL || y->size == product(a, b, 1)));
  y = exf_matmul(ctx, exf_reshape(ctx, x, exf_shape2(a, 0)),
                 exf_tensor_new(ctx, exf_shape2(0, b), NULL), 0);
  CHECK(size_ok(ctx, y) && (y == NULL || y->size == product(a, b, 1)));
  x = exf_tensor_new(ctx, exf_shape2(1, 1), NULL);
  if (product(a, b ? b : 1, 1) != 1)
    CHECK(size_ok(ctx, a > 65536 || b > 65536 ? exf_embedding(ctx, x, NULL, a, b) : x));
  CHECK(size_ok(ctx, exf_embedding(ctx, x, &id, 1, 1)));
  if (a > 65536) CHECK(size_ok(ctx, exf_gather(ctx, x, NULL, a)));
  CHECK(size_ok(ctx, exf_full(ctx, exf_shape2(a, b), 1)));
}

TEST(large_sizes_are_refused_in_time) {
  exf_desc desc;
  exf_ctx *ctx;
  heap h;
  int i, j, k;
  memset(&h, 0, sizeof h);
  memset(&desc, 0, sizeof desc);
  h.limit = 1 << 22;
  heap_use(&h, &desc);
  desc.n_threads = 1;
  ctx = exf_ctx_new(&desc);
  for (i = 0; i < N_SIZES; i++)
    for (j = 0; j < N_SIZES; j++) {
      exf_kv *kv;
      for (k = 0; k < N_SIZES; k++) {
        exf_shape s = exf_shape3(sizes[i], sizes[j], sizes[k]);
        exf_tensor *x = exf_tensor_new(ctx, s, NULL);
        CHECK(size_ok(ctx, x));
        CHECK(x == NULL || x->size == product(sizes[i], sizes[j], sizes[k]));
        kv = exf_kv_new(ctx, sizes[i], sizes[j], sizes[k]);
        CHECK(size_ok(ctx, kv));
        CHECK(kv == NULL || product(sizes[i], sizes[j], sizes[k]) <= (1u << 22) / 8);
        exf_kv_free(kv);
        exf_rewind(ctx);
      }
      size_ops(ctx, sizes[i], sizes[j]);
      exf_rewind(ctx);
    }
  exf_ctx_free(ctx);
  CHECK(h.n_live == 0);
}

TEST(large_layers_are_refused_in_time) {
  const exf_linear_desc linear = {1, 0};
  exf_desc desc;
  exf_ctx *ctx;
  heap h;
  int i, j;
  memset(&h, 0, sizeof h);
  memset(&desc, 0, sizeof desc);
  h.limit = 1 << 18;
  heap_use(&h, &desc);
  desc.n_threads = 1;
  ctx = exf_ctx_new(&desc);
  for (i = 0; i < N_SIZES; i++)
    for (j = 0; j < N_SIZES; j++) {
      exf_model *m = exf_model_new(ctx);
      exf_ffn_desc f;
      exf_block_desc b;
      memset(&f, 0, sizeof f);
      memset(&b, 0, sizeof b);
      f.width = sizes[i];
      f.hidden = sizes[j];
      CHECK(size_ok(ctx, exf_ffn_new(m, "ffn", &f)));
      f.width = f.hidden = 3;
      f.fusion.variant = EXF_MB;
      f.fusion.n_experts = sizes[i];
      CHECK(size_ok(ctx, exf_ffn_new(m, "experts", &f)));
      b.width = sizes[i];
      b.n_heads = sizes[j];
      CHECK(size_ok(ctx, exf_block_new(m, "block", &b)));
      CHECK(size_ok(ctx, exf_linear_new(m, "linear", sizes[i], sizes[j], &linear)));
      CHECK(size_ok(ctx, exf_norm_new(m, "norm", sizes[i], NULL)));
      CHECK(exf_model_count(m) < (1u << 18) / 4);
      exf_model_free(m);
    }
  exf_ctx_free(ctx);
  CHECK(h.n_live == 0);
}

int main(void) {
  RUN(a_bad_weight_stops_training_without_an_update);
  RUN(the_op_that_made_the_bad_number_is_named);
  RUN(a_bad_gradient_or_input_is_seen);
  RUN(a_masked_row_gives_zeros_and_no_gradient);
  RUN(infinite_rows_are_the_same_on_every_kernel);
  RUN(large_sizes_are_refused_in_time);
  RUN(large_layers_are_refused_in_time);
  TEST_MAIN_END;
}
