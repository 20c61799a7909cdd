/* Context, errors, memory, tape, determinism, generation and resuming. */
#ifndef TEST_LINKED    /* the Makefile links the implementation in */
#define EXFUSION_IMPLEMENTATION
#endif
#include "../exfusion.h"
#include "test.h"
#include "tiny_gpt.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define HAVE_THREADS 1
#else
#define HAVE_THREADS 0
#endif

static exf_ctx *new_ctx(int threads, exf_isa isa) {
  exf_desc d;
  memset(&d, 0, sizeof d);
  d.seed = 1;
  d.n_threads = threads;
  d.isa = isa;
  return exf_ctx_new(&d);
}

/* ---- errors ---------------------------------------------------------------------- */

TEST(first_error_is_kept) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_tensor *a = exf_tensor_new(ctx, exf_shape2(2, 3), NULL);
  exf_tensor *b = exf_tensor_new(ctx, exf_shape2(4, 5), NULL), *c;
  CHECK(exf_ctx_status(ctx) == EXF_OK);
  CHECK_STR(exf_error(ctx), "");
  c = exf_matmul(ctx, a, b, 0);
  CHECK(c == NULL);
  CHECK(exf_ctx_status(ctx) == EXF_SHAPE);
  CHECK_HAS(exf_error(ctx), "matmul");
  /* NULL in, NULL out; nothing later overwrites the message; nothing crashes */
  CHECK(exf_relu(ctx, c) == NULL);
  CHECK(exf_add(ctx, c, a) == NULL);
  CHECK(exf_dropout(ctx, c, 0.1) == NULL);
  CHECK(exf_detach(ctx, c) == NULL);
  CHECK(exf_reshape(ctx, c, exf_shape1(3)) == NULL);
  CHECK(exf_attention(ctx, c, NULL) == NULL);
  CHECK(exf_where(ctx, c, a, a) == NULL);
  CHECK(exf_gather(ctx, c, NULL, 1) == NULL);
  CHECK(exf_argmax(ctx, c) == NULL);
  CHECK(exf_sample(ctx, a, NULL, 0) == -1);
  CHECK(exf_slice(ctx, c, 0, 0, 1) == NULL);
  CHECK(exf_concat(ctx, &c, 1, 0) == NULL);
  CHECK(exf_fail(ctx, EXF_IO, "later %d", 7) == EXF_IO);
  CHECK(exf_backward(ctx, c) != EXF_OK);
  CHECK(isnan(exf_item(c)));
  CHECK_ERR(ctx, EXF_SHAPE, "matmul");
  CHECK(exf_ctx_status(ctx) == EXF_OK);
  CHECK_STR(exf_error(ctx), "");
  CHECK(exf_relu(ctx, a) != NULL);
  exf_ctx_free(ctx);
  exf_ctx_free(NULL);
}

TEST(status_names) {
  int i, n = 0;
  CHECK_STR(exf_status_name(EXF_OK), "EXF_OK");
  CHECK_STR(exf_status_name(EXF_MISMATCH), "EXF_MISMATCH");
  for (i = 0; i < (int)EXF_N_STATUS; i++)
    n += strncmp(exf_status_name((exf_status)i), "EXF_", 4) == 0;
  CHECK(n == (int)EXF_N_STATUS);
}

#define T2(a, b) exf_tensor_new(ctx, exf_shape2(a, b), NULL)
#define T1(a) exf_tensor_new(ctx, exf_shape1(a), NULL)
#define REFUSED(call, op, shape_a, shape_b) \
  do { \
    CHECK((call) == NULL); \
    CHECK_HAS(exf_error(ctx), op); \
    CHECK_HAS(exf_error(ctx), shape_a); \
    CHECK_HAS(exf_error(ctx), shape_b); \
    CHECK(strchr(exf_error(ctx), '\n') == NULL); \
    CHECK(exf_ctx_status(ctx) == EXF_SHAPE); \
    exf_error_clear(ctx); \
  } while (0)

TEST(shape_errors_name_op_and_shapes) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  int32_t id = 9;
  int axes[2] = {1, 1};
  exf_attention_desc heads;
  exf_tensor *x[2];
  REFUSED(exf_add(ctx, T2(2, 3), T2(2, 4)), "add", "(2,3)", "(2,4)");
  REFUSED(exf_sub(ctx, T2(2, 3), T1(2)), "sub", "(2,3)", "(2)");
  REFUSED(exf_mul(ctx, T2(2, 3), T2(3, 2)), "mul", "(2,3)", "(3,2)");
  REFUSED(exf_div(ctx, T2(2, 3), T2(3, 2)), "div", "(2,3)", "(3,2)");
  REFUSED(exf_matmul(ctx, T2(2, 3), T2(2, 3), 0), "matmul", "(2,3)", "(2,3)");
  REFUSED(exf_matmul(ctx, T2(2, 3), T2(4, 3), EXF_TRANSPOSE_A | EXF_TRANSPOSE_B), "matmul",
          "(2,3)", "(4,3)");
  REFUSED(exf_matmul(ctx, exf_tensor_new(ctx, exf_shape3(2, 3, 4), NULL),
                     exf_tensor_new(ctx, exf_shape3(3, 4, 5), NULL), 0),
          "matmul", "(2,3,4)", "(3,4,5)");
  REFUSED(exf_matmul(ctx, T1(3), T2(3, 2), 0), "matmul", "(3)", "(3,2)");
  REFUSED(exf_linear(ctx, T2(2, 3), T2(5, 4), NULL), "linear", "(2,3)", "(5,4)");
  REFUSED(exf_linear(ctx, T2(2, 3), T2(5, 3), T1(4)), "linear", "(2,3)", "(5,3)");
  REFUSED(exf_layernorm(ctx, T2(2, 3), T1(4), NULL, 1e-5), "layernorm", "(2,3)", "(4)");
  REFUSED(exf_layernorm(ctx, T2(2, 3), T1(3), T1(2), 1e-5), "layernorm", "(2,3)", "(3)");
  REFUSED(exf_rmsnorm(ctx, T2(2, 3), T1(4), 1e-5), "rmsnorm", "(2,3)", "(4)");
  REFUSED(exf_reshape(ctx, T2(2, 3), exf_shape2(4, 2)), "reshape", "(2,3)", "(4,2)");
  REFUSED(exf_permute(ctx, T2(2, 3), axes), "permute", "(2,3)", "");
  REFUSED(exf_slice(ctx, T2(2, 3), 1, 2, 4), "slice", "(2,3)", "4");
  REFUSED(exf_slice(ctx, T2(2, 3), 2, 0, 1), "slice", "(2,3)", "2");
  memset(&heads, 0, sizeof heads);
  heads.n_heads = 2;
  REFUSED(exf_attention(ctx, exf_tensor_new(ctx, exf_shape3(1, 2, 9), NULL), &heads),
          "attention", "3", "2");
  REFUSED(exf_attention(ctx, T2(2, 9), NULL), "attention", "(2,9)", "");
  REFUSED(exf_where(ctx, T2(2, 3), T2(2, 3), T2(3, 3)), "where", "(2,3)", "(3,3)");
  REFUSED(exf_max(ctx, T2(2, 0), EXF_ALL_AXES, 0), "max", "(2,0)", "");
  REFUSED(exf_gather(ctx, exf_tensor_new(ctx, exf_shape0(), NULL), &id, 1), "gather", "()",
          "");
  REFUSED(exf_fuse(ctx, T1(3), T2(2, 5)), "fuse", "(3)", "(2,5)");
  REFUSED(exf_softmax(ctx, exf_tensor_new(ctx, exf_shape0(), NULL)), "softmax", "()", "");
  x[0] = T2(2, 3);
  x[1] = T2(3, 4);
  REFUSED(exf_concat(ctx, x, 2, 0), "concat", "(2,3)", "(3,4)");
  CHECK(exf_embedding(ctx, T2(4, 3), &id, 1, 0) == NULL);
  CHECK_HAS(exf_error(ctx), "9");
  CHECK(exf_ctx_status(ctx) != EXF_OK);
  exf_error_clear(ctx);
  CHECK(exf_cross_entropy(ctx, T2(1, 3), &id, 0) == NULL);
  CHECK_HAS(exf_error(ctx), "9");
  CHECK(exf_ctx_status(ctx) != EXF_OK);
  exf_error_clear(ctx);
  CHECK(exf_backward(ctx, T1(3)) != EXF_OK);
  CHECK_HAS(exf_error(ctx), "backward");
  CHECK_HAS(exf_error(ctx), "(3)");
  exf_error_clear(ctx);
  CHECK(exf_dropout(ctx, T1(3), 1.5) == NULL);
  CHECK_ERR(ctx, EXF_ARG, "dropout");
  CHECK(exf_cross_entropy(ctx, T2(1, 3), &id, -0.5) == NULL);
  CHECK_ERR(ctx, EXF_ARG, "smoothing");
  exf_ctx_free(ctx);
}

TEST(sizes_that_overflow_are_refused) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_model *m = exf_model_new(ctx);
  exf_param_desc d;
  size_t big = (size_t)-1;
  exf_tensor *z;
  int32_t id = 0;
  memset(&d, 0, sizeof d);
  CHECK(exf_tensor_new(ctx, exf_shape2(big / 2, 4), NULL) == NULL);
  CHECK_ERR(ctx, EXF_SIZE, "does not fit");
  CHECK(exf_tensor_new(ctx, exf_shape1(big / sizeof(exf_real) + 1), NULL) == NULL);
  CHECK_ERR(ctx, EXF_SIZE, "");
  /* a product that wraps to 0, and one hidden behind a zero */
  CHECK(exf_tensor_new(ctx, exf_shape2(big / 2 + 1, 2), NULL) == NULL);
  CHECK_ERR(ctx, EXF_SIZE, "");
  CHECK(exf_tensor_new(ctx, exf_shape3(big, big, 0), NULL) == NULL);
  CHECK_ERR(ctx, EXF_SIZE, "");
  d.shape = exf_shape3(big / 8, 3, 7);
  CHECK(exf_param_new(m, "huge", &d) == NULL);
  CHECK_ERR(ctx, EXF_SIZE, "");
  CHECK(exf_model_n_params(m) == 0);
  /* broadcasting small tensors to a huge one */
  z = exf_add(ctx, exf_reshape(ctx, T1(1u << 22), exf_shape3(1u << 22, 1, 1)),
              exf_reshape(ctx, T1(1u << 22), exf_shape3(1, 1u << 22, 1)));
  CHECK(z == NULL);
  CHECK(exf_ctx_status(ctx) == EXF_SIZE || exf_ctx_status(ctx) == EXF_MEMORY);
  exf_error_clear(ctx);
  /* more integers than can be counted */
  CHECK(exf_embedding(ctx, T2(4, 3), &id, big, 2) == NULL);
  CHECK_ERR(ctx, EXF_SIZE, "embedding");
  /* zero sizes are legal */
  z = exf_tensor_new(ctx, exf_shape2(0, 3), NULL);
  CHECK(z != NULL && z->size == 0);
  z = exf_sum(ctx, exf_square(ctx, z), EXF_ALL_AXES, 0);
  CHECK(exf_item(z) == 0);
  CHECK_OK(ctx);
  exf_model_free(m);
  exf_ctx_free(ctx);
}

TEST(nan_loss_names_the_op) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_model *m = exf_model_new(ctx);
  exf_param_desc d;
  exf_tensor *w, *l;
  memset(&d, 0, sizeof d);
  d.shape = exf_shape1(3);
  d.init_value = -1;
  w = exf_param_new(m, "w", &d);
  l = exf_sum(ctx, exf_tanh(ctx, exf_log(ctx, w)), EXF_ALL_AXES, 0);
  CHECK(exf_backward(ctx, l) == EXF_NUMERIC);
  CHECK_ERR(ctx, EXF_NUMERIC, "log");
  CHECK(w->grad == NULL);
  exf_rewind(ctx);
  w->data[1] = (exf_real)NAN;
  l = exf_sum(ctx, exf_square(ctx, w), EXF_ALL_AXES, 0);
  CHECK(exf_backward(ctx, l) == EXF_NUMERIC);
  CHECK_ERR(ctx, EXF_NUMERIC, "w");
  exf_model_free(m);
  exf_ctx_free(ctx);
}

/* ---- memory ---------------------------------------------------------------------- */

typedef struct heap {
  long fail_at, n;           /* the n-th call returns NULL when n == fail_at */
  long live;
} heap;
static void *heap_alloc(void *user, size_t bytes) {
  heap *h = (heap *)user;
  void *p;
  if (++h->n == h->fail_at) return NULL;
  p = malloc(bytes);
  if (p != NULL) h->live++;
  return p;
}
static void heap_free(void *user, void *p) {
  heap *h = (heap *)user;
  if (p != NULL) h->live--;
  free(p);
}

/* Context, model, a training step, a merge, both kinds of save, a load. 1 on success. */
static int everything(heap *h, int variant) {
  exf_desc d;
  tiny_desc t = tiny_defaults();
  exf_optim *optim = NULL;
  exf_ema *ema = NULL;
  exf_ctx *ctx;
  tiny_gpt g;
  int ok;
  memset(&d, 0, sizeof d);
  d.alloc = heap_alloc;
  d.free = heap_free;
  d.alloc_user = h;
  d.n_threads = 2;
  ctx = exf_ctx_new(&d);
  if (ctx == NULL) return 0;
  t.fusion = tiny_variant(variant, 3);
  t.bias = 1;
  t.dropout = 0.1;
  g = tiny_new(ctx, &t);
  optim = tiny_adamw(g.model);
  ema = exf_ema_new(g.model, 0.9);
  tiny_train(ctx, &g, optim, 0, 2, 1e-3);
  exf_ema_update(ema);
  exf_checkpoint_save(g.model, optim, TEST_TMP "/fault.checkpoint", NULL, 0);
  exf_model_save(g.model, TEST_TMP "/fault.model", NULL, 0);
  if (exf_ctx_status(ctx) == EXF_OK)
    exf_checkpoint_load(g.model, optim, TEST_TMP "/fault.checkpoint");
  exf_ema_free(ema);
  exf_optim_free(optim);
  exf_model_merge(g.model);
  ok = exf_ctx_status(ctx) == EXF_OK;
  if (!ok && exf_ctx_status(ctx) != EXF_MEMORY)
    printf("  allocation %ld: %s\n", h->fail_at, exf_error(ctx));
  if (!ok) CHECK(exf_ctx_status(ctx) == EXF_MEMORY);
  exf_model_free(g.model);
  exf_ctx_free(ctx);
  return ok;
}
static void check_faults(int variant) {
  heap h;
  long k;
  int ok = 0;
  for (k = 1; k < 5000 && !ok; k++) {
    memset(&h, 0, sizeof h);
    h.fail_at = k;
    ok = everything(&h, variant);
    if (!CHECK(h.live == 0)) {
      printf("  allocation %ld failed and %ld blocks leaked\n", k, h.live);
      break;
    }
  }
  CHECK(ok);
  CHECK(k > 50);
}
TEST(every_failed_allocation_is_survived) {
  check_faults(0);
  check_faults(2);
  check_faults(4);
}

TEST(nothing_is_allocated_after_the_second_step) {
  int v;
  for (v = 0; v < TINY_N_VARIANTS; v++) {
    exf_ctx *ctx = new_ctx(2, EXF_ISA_AUTO);
    tiny_desc d = tiny_defaults();
    exf_optim *optim;
    exf_ema *ema;
    size_t allocs, bytes;
    tiny_gpt g;
    uint64_t s;
    d.fusion = tiny_variant(v, 3);
    d.dropout = 0.1;
    d.bias = 1;
    g = tiny_new(ctx, &d);
    optim = tiny_adamw(g.model);
    ema = exf_ema_new(g.model, 0.9);
    for (s = 0; s < 2; s++) {
      tiny_train(ctx, &g, optim, s, 1, 1e-3);
      exf_ema_update(ema);
    }
    allocs = exf_ctx_stats(ctx).n_allocs;
    bytes = exf_ctx_stats(ctx).bytes;
    CHECK(allocs > 10);
    for (s = 2; s < 10; s++) {
      tiny_train(ctx, &g, optim, s, 1, 1e-3);
      exf_ema_update(ema);
      CHECK(exf_ctx_stats(ctx).n_allocs == allocs);
      CHECK(exf_ctx_stats(ctx).bytes == bytes);
    }
    CHECK(exf_ctx_stats(ctx).arena_peak > 0);
    CHECK(exf_ctx_stats(ctx).bytes_peak >= bytes);
    CHECK(exf_ctx_stats(ctx).n_ops > 100);
    CHECK_OK(ctx);
    exf_ema_free(ema);
    exf_optim_free(optim);
    exf_model_free(g.model);
    exf_ctx_free(ctx);
  }
}

/* ---- determinism ----------------------------------------------------------------- */

/* Large enough that its products, attention and updates are split over threads. */
static tiny_desc big_desc(int variant) {
  tiny_desc d = tiny_defaults();
  d.width = 96;
  d.hidden = 384;
  d.heads = 3;
  d.block = 48;
  d.vocab = 67;
  d.bias = 1;
  d.dropout = 0.1;
  d.init_std = 0.05;
  d.fusion = tiny_variant(variant, 3);
  return d;
}

typedef struct trained {
  exf_ctx *ctx;
  tiny_gpt g;
  exf_optim *optim;
  double loss;
  exf_real *eval;
  size_t n_eval;
} trained;
static trained train_big(int threads, exf_isa isa, int variant) {
  tiny_desc d = big_desc(variant);
  trained t;
  t.ctx = new_ctx(threads, isa);
  t.g = tiny_new(t.ctx, &d);
  t.optim = tiny_adamw(t.g.model);
  t.loss = tiny_train(t.ctx, &t.g, t.optim, 0, 4, 3e-3);
  t.eval = tiny_eval(t.ctx, &t.g, &t.n_eval);
  CHECK_OK(t.ctx);
  return t;
}
static void trained_free(trained *t) {
  free(t->eval);
  exf_optim_free(t->optim);
  exf_model_free(t->g.model);
  exf_ctx_free(t->ctx);
}
static void check_same(const trained *a, const trained *b) {
  CHECK(a->loss == b->loss && a->loss > 0);
  CHECK(a->n_eval == b->n_eval && same_bits(a->eval, b->eval, a->n_eval));
  CHECK(same_params(a->g.model, b->g.model));
}

TEST(same_bits_on_any_number_of_threads) {
  static const int threads[3] = {2, 3, 8};
  int v, i;
  for (v = 0; v <= 4; v += 2) {
    trained one = train_big(1, EXF_ISA_AUTO, v);
    for (i = 0; i < 3; i++) {
      trained t = train_big(threads[i], EXF_ISA_AUTO, v);
      CHECK(exf_ctx_desc(t.ctx).n_threads == threads[i]);
      check_same(&one, &t);
      trained_free(&t);
    }
    trained_free(&one);
  }
}

static int has_isa(exf_isa isa) {
  exf_ctx *ctx = new_ctx(1, isa);
  int has = exf_ctx_status(ctx) == EXF_OK;
  exf_ctx_free(ctx);
  return has;
}

TEST(same_bits_on_every_isa_with_fma) {
  static const exf_isa isa[3] = {EXF_ISA_AVX2, EXF_ISA_AVX512, EXF_ISA_NEON};
  int v, i, seen = 0;
  for (v = 0; v <= 4; v += 4) {
    trained ref = train_big(1, EXF_ISA_REF, v);
    CHECK(exf_ctx_desc(ref.ctx).isa == EXF_ISA_REF);
    for (i = 0; i < 3; i++) {
      trained t;
      if (!has_isa(isa[i])) continue;
      seen++;
      t = train_big(2, isa[i], v);
      CHECK(exf_ctx_desc(t.ctx).isa == isa[i]);
      check_same(&ref, &t);
      trained_free(&t);
    }
    trained_free(&ref);
  }
  if (!seen) SKIP("this processor has no instruction set with FMA");
}

/* The one without FMA rounds differently, and trains the same. */
TEST(sse2_agrees_to_rounding) {
  trained a, b;
  if (!has_isa(EXF_ISA_SSE2)) SKIP("no SSE2");
  a = train_big(1, EXF_ISA_REF, 4);
  b = train_big(1, EXF_ISA_SSE2, 4);
  CHECK_NEAR(a.loss, b.loss, 1e-5);
  CHECK(max_diff(a.eval, b.eval, a.n_eval) < 1e-3);
  trained_free(&a);
  trained_free(&b);
}

/* Evaluation, logging, and other contexts do not disturb training. */
TEST(evaluation_does_not_disturb_training) {
  tiny_desc d = tiny_defaults();
  exf_ctx *ctx[2];
  exf_optim *optim[2];
  tiny_gpt g[2];
  uint64_t s;
  int i;
  d.fusion = tiny_variant(4, 3);
  d.dropout = 0.2;
  for (i = 0; i < 2; i++) {
    ctx[i] = new_ctx(1, EXF_ISA_AUTO);
    g[i] = tiny_new(ctx[i], &d);
    optim[i] = tiny_adamw(g[i].model);
  }
  for (s = 0; s < 5; s++)
    for (i = 0; i < 2; i++) {
      size_t n;
      tiny_train(ctx[i], &g[i], optim[i], s, 1, 1e-2);
      if (i == 1) free(tiny_eval(ctx[1], &g[1], &n));
      if (i == 1 && s == 2)
        CHECK(exf_model_save(g[1].model, TEST_TMP "/aside", NULL, 0) == EXF_OK);
    }
  CHECK(same_params(g[0].model, g[1].model));
  for (i = 0; i < 2; i++) {
    CHECK_OK(ctx[i]);
    exf_optim_free(optim[i]);
    exf_model_free(g[i].model);
    exf_ctx_free(ctx[i]);
  }
}

TEST(isa_that_is_missing_is_refused) {
  int seen = 0;
  for (int i = EXF_ISA_REF; i <= EXF_ISA_NEON; i++) {
    exf_ctx *ctx = new_ctx(1, (exf_isa)i);
    if (exf_ctx_status(ctx) == EXF_OK) {            /* what one asks for is what one gets */
      CHECK(exf_ctx_desc(ctx).isa == (exf_isa)i);
    } else {                                        /* and else what there is */
      CHECK(exf_ctx_desc(ctx).isa != (exf_isa)i);
      CHECK_ERR(ctx, EXF_ARG, exf_isa_name((exf_isa)i));
      CHECK(exf_relu(ctx, exf_ones(ctx, exf_shape1(3))) != NULL);
      seen++;
    }
    exf_ctx_free(ctx);
  }
  CHECK(seen > 0);                 /* no processor is both an x86 and an ARM */
  exf_ctx *ctx = new_ctx(1, (exf_isa)99);
  CHECK_ERR(ctx, EXF_ARG, "isa: ? is not available");
  exf_ctx_free(ctx);
  CHECK_STR(exf_isa_name(EXF_ISA_AVX512), "avx512");
}

/* ---- random numbers -------------------------------------------------------------- */

TEST(random_numbers_have_their_moments) {
  double s = 0, q = 0, k = 0, u = 0, lo = 1, hi = 0;
  size_t i, n = 200000, same = 0;
  for (i = 0; i < n; i++) {
    double x = exf_rng_normal(1, 2, 3, i), y = exf_rng_uniform(1, 2, 4, i);
    s += x;
    q += x * x;
    k += x * x * x * x;
    u += y;
    lo = y < lo ? y : lo;
    hi = y > hi ? y : hi;
    same += exf_rng_u32(1, 2, 3, i) == exf_rng_u32(1, 3, 3, i);
    same += exf_rng_u32(1, 2, 3, i) == exf_rng_u32(2, 2, 3, i);
    same += exf_rng_u32(1, 2, 3, i) == exf_rng_u32(1, 2, 4, i);
  }
  CHECK_NEAR(s / (double)n, 0, 0.01);
  CHECK_NEAR(q / (double)n, 1, 0.02);
  CHECK_NEAR(k / (double)n, 3, 0.1);
  CHECK_NEAR(u / (double)n, 0.5, 0.005);
  CHECK(lo >= 0 && lo < 1e-3 && hi < 1 && hi > 0.999);
  CHECK(same < 10);
  CHECK(exf_rng_stream("a.weight") != exf_rng_stream("b.weight"));
}

/* ---- tape ------------------------------------------------------------------------ */

TEST(no_grad_scope_records_nothing) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_model *m = exf_model_new(ctx);
  exf_param_desc d;
  exf_tensor *w, *y;
  memset(&d, 0, sizeof d);
  d.shape = exf_shape1(3);
  d.init_value = 2;
  w = exf_param_new(m, "w", &d);
  CHECK(exf_grad_set(ctx, 0) == 1);
  y = exf_sum(ctx, exf_square(ctx, w), EXF_ALL_AXES, 0);
  CHECK(exf_item(y) == 12);
  CHECK(y != NULL && y->node == NULL);
  CHECK(exf_backward(ctx, y) != EXF_OK);
  exf_error_clear(ctx);
  CHECK(w->grad == NULL);
  CHECK(exf_grad_set(ctx, 1) == 0);
  y = exf_sum(ctx, exf_square(ctx, w), EXF_ALL_AXES, 0);
  CHECK(exf_backward(ctx, y) == EXF_OK);
  CHECK(w->grad != NULL && w->grad[1] == 4);
  /* gathered until used up */
  exf_rewind(ctx);
  CHECK(exf_backward(ctx, exf_sum(ctx, w, EXF_ALL_AXES, 0)) == EXF_OK);
  CHECK(w->grad != NULL && w->grad[1] == 5);
  exf_model_zero_grad(m);
  exf_rewind(ctx);
  CHECK(exf_backward(ctx, exf_sum(ctx, w, EXF_ALL_AXES, 0)) == EXF_OK);
  CHECK(w->grad != NULL && w->grad[1] == 1);
  CHECK_OK(ctx);
  exf_model_free(m);
  exf_ctx_free(ctx);
}

TEST(detach_is_a_constant) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_real v[3] = {1, 2, 3};
  exf_tensor *x = exf_grad_keep(ctx, exf_tensor_new(ctx, exf_shape1(3), v));
  exf_tensor *h, *h2, *k;
  h = exf_scale(ctx, x, 2);
  k = exf_grad_keep(ctx, exf_square(ctx, h));
  h2 = exf_mul(ctx, h, exf_detach(ctx, h));
  CHECK(exf_backward(ctx, exf_sum(ctx, exf_add(ctx, h2, k), EXF_ALL_AXES, 0)) == EXF_OK);
  if (CHECK(x != NULL && x->grad != NULL)) {
    /* d/dx of 2x [2x] + 4x^2 = 4x + 8x */
    CHECK(x->grad[0] == 12 && x->grad[1] == 24 && x->grad[2] == 36);
  }
  if (CHECK(k != NULL && k->grad != NULL)) CHECK(k->grad[0] == 1 && k->grad[2] == 1);
  CHECK(h != NULL && h->grad == NULL);
  CHECK_OK(ctx);
  exf_ctx_free(ctx);
}

/* ---- generation ------------------------------------------------------------------ */

static void check_cache(size_t width, size_t heads, size_t T, size_t first, int variant) {
  exf_ctx *ctx = new_ctx(2, EXF_ISA_AUTO);
  tiny_desc d = tiny_defaults();
  int32_t ids[64], labels[64];
  exf_real *full;
  exf_tensor *y;
  exf_kv *kv;
  tiny_gpt g;
  size_t at, i, n, bad = 0;
  d.width = width;
  d.heads = heads;
  d.hidden = 2 * width;
  d.block = T;
  d.bias = 1;
  d.init_std = 0.2;
  d.fusion = tiny_variant(variant, 3);
  g = tiny_new(ctx, &d);
  tiny_batch(&g, 5, 1, T, ids, labels);
  exf_grad_set(ctx, 0);
  y = tiny_logits(ctx, &g, ids, 1, T);
  if (!CHECK(y != NULL)) return;
  n = y->size / T;
  full = (exf_real *)malloc(y->size * sizeof *full);
  memcpy(full, y->data, y->size * sizeof *full);
  exf_rewind(ctx);
  kv = exf_kv_new(ctx, d.layers, T, width);
  for (at = 0; at < T;) {
    size_t t = at == 0 ? first : 1;
    exf_tensor *x = exf_add(ctx, exf_embedding(ctx, g.wte, ids + at, 1, t),
                            exf_slice(ctx, g.wpe, 0, at, at + t));
    for (i = 0; i < d.layers; i++) x = exf_block_forward(ctx, g.block[i], x, kv);
    y = exf_linear(ctx, exf_norm_forward(ctx, g.ln_f, x), g.wte, NULL);
    if (!CHECK(y != NULL && y->size == t * n)) break;
    if (!same_bits(y->data, full + at * n, t * n)) bad++;
    at += t;
    CHECK(exf_kv_length(kv) == at);
    exf_rewind(ctx);
  }
  CHECK(bad == 0);
  /* full: an error, not a write past the end */
  y = exf_block_forward(ctx, g.block[0], exf_embedding(ctx, g.wte, ids, 1, 1), kv);
  CHECK(y == NULL);
  CHECK_ERR(ctx, EXF_SHAPE, "room for t positions after");
  exf_kv_reset(kv);
  CHECK(exf_kv_length(kv) == 0);
  free(full);
  exf_kv_free(kv);
  exf_model_free(g.model);
  exf_ctx_free(ctx);
}
TEST(cached_generation_equals_the_full_forward) {
  check_cache(16, 2, 12, 5, 0);
  check_cache(24, 3, 40, 1, 4);
  check_cache(64, 4, 50, 33, 2);
}

/* ---- sharing --------------------------------------------------------------------- */

typedef struct reader {
  const tiny_gpt *g;
  exf_real *out[3];
  size_t n;
  int ok;
} reader;
static void *read_shared(void *arg) {
  reader *r = (reader *)arg;
  exf_ctx *ctx = new_ctx(1, EXF_ISA_AUTO);
  int i;
  for (i = 0; i < 3; i++) r->out[i] = tiny_eval(ctx, r->g, &r->n);
  r->ok = exf_ctx_status(ctx) == EXF_OK;
  exf_ctx_free(ctx);
  return NULL;
}
TEST(merged_model_is_shared_by_contexts) {
  exf_ctx *ctx = new_ctx(1, EXF_ISA_AUTO);
  tiny_desc d = tiny_defaults();
  exf_optim *optim;
  reader r[4];
  exf_real *want;
  tiny_gpt g;
  size_t n;
  int i, k;
#if HAVE_THREADS
  pthread_t thread[4];
#endif
  d.fusion = tiny_variant(4, 3);
  g = tiny_new(ctx, &d);
  optim = tiny_adamw(g.model);
  tiny_train(ctx, &g, optim, 0, 3, 1e-2);
  exf_optim_free(optim);
  CHECK(exf_model_merge(g.model) == EXF_OK);
  want = tiny_eval(ctx, &g, &n);
  memset(r, 0, sizeof r);
  for (i = 0; i < 4; i++) {
    r[i].g = &g;
#if HAVE_THREADS
    if (pthread_create(&thread[i], NULL, read_shared, &r[i]) != 0) return;
#else
    read_shared(&r[i]);
#endif
  }
  for (i = 0; i < 4; i++) {
#if HAVE_THREADS
    pthread_join(thread[i], NULL);
#endif
    CHECK(r[i].ok && r[i].n == n);
    for (k = 0; k < 3; k++) {
      CHECK(same_bits(r[i].out[k], want, n));
      free(r[i].out[k]);
    }
  }
  free(want);
  exf_model_free(g.model);
  exf_ctx_free(ctx);
}

/* Everything a step writes is in its context: trainings in several threads at once end
   like the same trainings one after the other. */
typedef struct trainer {
  int variant;
  char path[64];
  exf_ctx *ctx;
  tiny_gpt g;
} trainer;
static void *train_alone(void *arg) {
  trainer *t = (trainer *)arg;
  tiny_desc d = tiny_defaults();
  exf_optim *optim;
  d.dropout = 0.1;
  d.fusion = tiny_variant(t->variant, 3);
  t->ctx = new_ctx(1, EXF_ISA_AUTO);
  t->g = tiny_new(t->ctx, &d);
  optim = tiny_adamw(t->g.model);
  tiny_train(t->ctx, &t->g, optim, 0, 4, 1e-2);
  exf_checkpoint_save(t->g.model, optim, t->path, NULL, 0);
  exf_checkpoint_load(t->g.model, optim, t->path);
  tiny_train(t->ctx, &t->g, optim, 4, 4, 1e-2);
  exf_optim_free(optim);
  exf_model_merge(t->g.model);
  return NULL;
}
TEST(contexts_train_at_once) {
  trainer t[4];
  int i;
#if HAVE_THREADS
  pthread_t thread[2];
#endif
  for (i = 0; i < 4; i++) {      /* 0 and 1 at once; 2 and 3 the same, in order */
    t[i].variant = i % 2 ? 6 : 4;
    snprintf(t[i].path, sizeof t[i].path, TEST_TMP "/core.at-once.%d", i);
#if HAVE_THREADS
    if (i < 2) {
      if (!CHECK(pthread_create(&thread[i], NULL, train_alone, &t[i]) == 0)) return;
      continue;
    }
#endif
    train_alone(&t[i]);
  }
#if HAVE_THREADS
  for (i = 0; i < 2; i++) pthread_join(thread[i], NULL);
#endif
  for (i = 0; i < 2; i++) CHECK(same_params(t[i].g.model, t[i + 2].g.model));
  for (i = 0; i < 4; i++) {
    CHECK_OK(t[i].ctx);
    exf_model_free(t[i].g.model);
    exf_ctx_free(t[i].ctx);
  }
}

/* ---- resuming -------------------------------------------------------------------- */

#define CHECKPOINT TEST_TMP "/core.checkpoint"

static void check_resume(int variant, int sgd) {
  tiny_desc d = tiny_defaults();
  exf_ctx *a = new_ctx(1, EXF_ISA_AUTO), *b;
  exf_pair meta[2] = {{"task", "test"}, {"step", "5"}};
  exf_optim_desc o;
  exf_optim *oa, *ob;
  exf_st *st;
  tiny_gpt ga, gb;
  exf_real *ea, *eb;
  size_t n, m;
  double la, lb;
  memset(&o, 0, sizeof o);
  o.kind = sgd ? EXF_SGD : EXF_ADAMW;
  o.momentum = 0.9;
  d.bias = 1;
  d.dropout = 0.1;
  d.fusion = tiny_variant(variant, 3);
  ga = tiny_new(a, &d);
  oa = exf_optim_new(ga.model, &o);
  tiny_train(a, &ga, oa, 0, 5, 1e-2);
  CHECK(exf_checkpoint_save(ga.model, oa, CHECKPOINT, meta, 2) == EXF_OK);
  la = tiny_train(a, &ga, oa, 5, 5, 1e-2);

  b = new_ctx(2, EXF_ISA_AUTO);
  gb = tiny_new(b, &d);
  ob = exf_optim_new(gb.model, &o);
  tiny_train(b, &gb, ob, 40, 2, 1e-2);       /* all of this is replaced */
  st = exf_st_open(b, CHECKPOINT, NULL);
  if (CHECK(st != NULL)) {
    CHECK(exf_st_meta(st, "task") != NULL);
    CHECK_STR(exf_st_meta(st, "task"), "test");
    CHECK(exf_checkpoint_load_st(gb.model, ob, st) == EXF_OK);
    exf_st_close(st);
  }
  CHECK(exf_optim_steps(ob) == 5);
  lb = tiny_train(b, &gb, ob, 5, 5, 1e-2);
  CHECK(la == lb && la > 0);
  CHECK(same_params(ga.model, gb.model));
  ea = tiny_eval(a, &ga, &n);      /* uses the banks */
  eb = tiny_eval(b, &gb, &m);
  CHECK(n == m && same_bits(ea, eb, n));
  CHECK_OK(a);
  CHECK_OK(b);
  free(ea);
  free(eb);
  exf_optim_free(oa);
  exf_optim_free(ob);
  exf_model_free(ga.model);
  exf_model_free(gb.model);
  exf_ctx_free(a);
  exf_ctx_free(b);
}
TEST(checkpoints_continue_bit_for_bit) {
  int v;
  for (v = 0; v < TINY_N_VARIANTS; v++) check_resume(v, 0);
  check_resume(0, 1);
  check_resume(4, 1);
}

/* All or nothing, and the message says what does not fit. */
TEST(checkpoint_of_another_model_is_refused) {
  tiny_desc d = tiny_defaults();
  exf_ctx *ctx = new_ctx(1, EXF_ISA_AUTO);
  exf_optim *o, *p;
  exf_real *before, *after;
  tiny_gpt g, h;
  size_t n;
  d.fusion = tiny_variant(4, 3);
  g = tiny_new(ctx, &d);
  o = tiny_adamw(g.model);
  tiny_train(ctx, &g, o, 0, 1, 1e-2);
  CHECK(exf_checkpoint_save(g.model, o, CHECKPOINT, NULL, 0) == EXF_OK);
  d.fusion = tiny_variant(4, 4);
  h = tiny_new(ctx, &d);
  p = tiny_adamw(h.model);
  before = tiny_eval(ctx, &h, &n);
  CHECK(exf_checkpoint_load(h.model, p, CHECKPOINT) == EXF_MISMATCH);
  CHECK_ERR(ctx, EXF_MISMATCH, "x mb 3', the model's");
  after = tiny_eval(ctx, &h, &n);
  CHECK(same_bits(before, after, n));
  CHECK(exf_optim_steps(p) == 0);
  free(before);
  free(after);
  exf_optim_free(o);
  exf_optim_free(p);
  exf_model_free(g.model);
  exf_model_free(h.model);
  exf_ctx_free(ctx);
}

int main(void) {
  RUN(first_error_is_kept);
  RUN(status_names);
  RUN(shape_errors_name_op_and_shapes);
  RUN(sizes_that_overflow_are_refused);
  RUN(nan_loss_names_the_op);
  RUN(every_failed_allocation_is_survived);
  RUN(nothing_is_allocated_after_the_second_step);
  RUN(same_bits_on_any_number_of_threads);
  RUN(same_bits_on_every_isa_with_fma);
  RUN(sse2_agrees_to_rounding);
  RUN(evaluation_does_not_disturb_training);
  RUN(isa_that_is_missing_is_refused);
  RUN(random_numbers_have_their_moments);
  RUN(no_grad_scope_records_nothing);
  RUN(detach_is_a_constant);
  RUN(cached_generation_equals_the_full_forward);
  RUN(merged_model_is_shared_by_contexts);
  RUN(contexts_train_at_once);
  RUN(checkpoints_continue_bit_for_bit);
  RUN(checkpoint_of_another_model_is_refused);
  TEST_MAIN_END;
}
