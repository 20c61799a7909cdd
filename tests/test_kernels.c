/* The kernels behind the ops: our own exp, tanh, erf and log against libm's in double,
   and every fast kernel against its reference: bit for bit where the instruction set has
   fused multiply-add, to rounding on SSE2. Outputs lie between guard words. */
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"
#include "test.h"

#include <float.h>

#define GUARD 64

typedef struct arr {        /* n numbers between guards, at an odd address */
  exf_real *base, *x;
  size_t n;
} arr;

static uint32_t salt;
static arr arr_new(size_t n, double scale) {
  arr a;
  size_t i;
  a.n = n;
  a.base = (exf_real *)malloc((n + 2 * GUARD) * sizeof(exf_real));
  for (i = 0; i < n + 2 * GUARD; i++) a.base[i] = (exf_real)12345;
  a.x = a.base + GUARD - (salt % 3);
  salt++;
  for (i = 0; i < n; i++) a.x[i] = (exf_real)(scale * exf_rng_normal(41, salt, 0, i));
  return a;
}
static arr arr_copy(const arr *from) {
  arr a = arr_new(from->n, 0);
  if (from->n) memcpy(a.x, from->x, from->n * sizeof(exf_real));
  return a;
}
static void arr_free(arr *a) {
  const exf_real *p;
  int bad = 0;
  for (p = a->base; p < a->x; p++) bad += *p != (exf_real)12345;
  for (p = a->x + a->n; p < a->base + a->n + 2 * GUARD; p++) bad += *p != (exf_real)12345;
  CHECK(bad == 0);          /* nothing was written outside */
  free(a->base);
}

static const exf__kernels *K;      /* the fast table under test */
static const exf__kernels *const R = &exf__kernels_ref;

static int agree(const exf_real *a, const exf_real *b, size_t n) {
  double top = 1e-30;
  size_t i;
  if (K->isa != EXF_ISA_SSE2) {
    for (i = 0; i < n; i++)
      if (memcmp(&a[i], &b[i], sizeof *a) != 0 && !(isnan(a[i]) && isnan(b[i]))) {
        printf("  %s: element %lu of %lu is %.9g, the reference %.9g\n",
               exf_isa_name(K->isa), (unsigned long)i, (unsigned long)n, (double)a[i],
               (double)b[i]);
        return 0;
      }
    return 1;
  }
  for (i = 0; i < n; i++)
    if (isfinite(b[i])) top = fmax(top, fabs((double)b[i]));
  for (i = 0; i < n; i++)
    if (!(fabs((double)a[i] - (double)b[i]) <= 2e-4 * top + 1e-6)
        && memcmp(&a[i], &b[i], sizeof *a) != 0 && !(isnan(a[i]) && isnan(b[i]))) {
      printf("  sse2: element %lu is %.9g, the reference %.9g\n", (unsigned long)i,
             (double)a[i], (double)b[i]);
      return 0;
    }
  return 1;
}
/* Compares and frees. */
static void same(arr *a, arr *b) {
  CHECK(a->n == b->n && agree(a->x, b->x, a->n));
  arr_free(a);
  arr_free(b);
}

/* Work space of a kernel, from its own table. */
static void *scratch_of(size_t bytes, void **base) {
  *base = malloc(bytes + 128);
  return (void *)(((uintptr_t)*base + 63) & ~(uintptr_t)63);
}

/* ---- elementary functions -------------------------------------------------------- */

#ifndef EXF_DOUBLE
static float float_of(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

/* |got - want| in units of the last place of want */
static double ulps(float got, double want) {
  int e;
  if (isnan(want)) return isnan(got) ? 0 : 1e30;
  if (fabs(want) >= 3.4028235677973366e38)      /* rounds to infinity */
    return isinf(got) && (got > 0) == (want > 0) ? 0 : 1e30;
  if (isnan(got)) return 1e30;
  if (isinf(got)) got = got > 0 ? FLT_MAX : -FLT_MAX;
  frexp(want, &e);
  if (want == 0 || e < -125) e = -125;
  return fabs((double)got - want) / ldexp(1, e - 24);
}

static double worst_of(float (*f)(float), double (*g)(double), const char *name) {
  static const uint32_t edges[] = {
    0x00000000u, 0x80000000u, 0x00000001u, 0x80000001u, 0x007fffffu, 0x00800000u,
    0x7f7fffffu, 0xff7fffffu, 0x7f800000u, 0xff800000u, 0x7fc00000u, 0x42b17217u,
    0x42b17218u, 0xc2aeac50u, 0xc2cff1b5u, 0x3f800000u, 0xbf800000u, 0x42b0c0a5u};
  double worst = 0;
  float at = 0;
  uint64_t i;
  for (i = 0; i < ((uint64_t)1 << 32); i += 991) {
    float x = float_of((uint32_t)i);
    double u = ulps(f(x), g((double)x));
    if (u > worst) { worst = u; at = x; }
  }
  for (i = 0; i < sizeof edges / sizeof edges[0]; i++) {
    float x = float_of(edges[i]);
    double u = ulps(f(x), g((double)x));
    if (u > worst) { worst = u; at = x; }
  }
  printf("  %s: at most %.3f ulp, at %.9g\n", name, worst, (double)at);
  return worst;
}
TEST(exp_within_two_ulp) { CHECK(worst_of(exf__exp, exp, "exp") <= 2); }
TEST(tanh_within_two_ulp) { CHECK(worst_of(exf__tanh, tanh, "tanh") <= 2); }
TEST(erf_within_four_ulp) { CHECK(worst_of(exf__erf, erf, "erf") <= 4); }
TEST(log_within_two_ulp) { CHECK(worst_of(exf__log, log, "log") <= 2); }

/* The vector forms, on every float of the sample. */
TEST(vector_functions) {
  static const int ops[] = {EXF__U_EXP, EXF__U_TANH, EXF__U_RELU, EXF__U_GELU,
                            EXF__U_GELU_TANH, EXF__U_SILU};
  double (*const truth[2])(double) = {exp, tanh};
  enum { CHUNK = 4099 };
  static float x[CHUNK], y[CHUNK], z[CHUNK], d[CHUNK], one[CHUNK];
  size_t o, i;
  for (i = 0; i < CHUNK; i++) one[i] = 1;
  for (o = 0; o < 6; o++) {
    uint64_t at = 0;
    double worst = 0;
    size_t bad = 0, bad_grad = 0;
    while (at < ((uint64_t)1 << 32)) {
      for (i = 0; i < CHUNK; i++, at += 7919) x[i] = float_of((uint32_t)at);
      K->unary(ops[o], CHUNK, x, y);
      R->unary(ops[o], CHUNK, x, z);
      for (i = 0; i < CHUNK; i++) {
        if (o < 2) worst = fmax(worst, ulps(y[i], truth[o]((double)x[i])));
        if (K->isa != EXF_ISA_SSE2 && memcmp(&y[i], &z[i], 4) != 0
            && !(isnan(y[i]) && isnan(z[i]))) {
          if (bad++ == 0)
            printf("  %s: function %d of %.9g is %.9g, the reference %.9g\n",
                   exf_isa_name(K->isa), ops[o], (double)x[i], (double)y[i],
                   (double)z[i]);
        }
      }
      K->unary_grad(ops[o], CHUNK, x, one, y, 0, NULL);
      R->unary_grad(ops[o], CHUNK, x, one, d, 0, NULL);
      for (i = 0; i < CHUNK && K->isa != EXF_ISA_SSE2; i++)
        if (memcmp(&y[i], &d[i], 4) != 0 && !(isnan(y[i]) && isnan(d[i]))) {
          if (bad_grad++ == 0)
            printf("  %s: slope %d of %.9g is %.9g, the reference %.9g\n",
                   exf_isa_name(K->isa), ops[o], (double)x[i], (double)y[i],
                   (double)d[i]);
        }
    }
    CHECK(bad == 0);
    CHECK(bad_grad == 0);
    if (!CHECK(worst <= 2)) printf("  function %d: %.3f ulp\n", ops[o], worst);
  }
}
#endif

TEST(double_helpers) {
  double worst_log = 0, worst_cos = 0, worst_pow = 0;
  uint64_t i;
  for (i = 0; i < 200000; i++) {
    double u = exf_rng_uniform(1, 1, 1, i), x = u * ldexp(1, (int)(i % 200) - 100);
    double c = (u - 0.5) * (i % 2 ? 8 : 200000);
    double b = 0.5 + u / 2;
    uint64_t n = i % 3000;
    if (x > 0)
      worst_log = fmax(worst_log,
                       fabs(exf__log_d(x) - log(x)) / fmax(1e-3, fabs(log(x))));
    worst_cos = fmax(worst_cos, fabs(exf__cospi_d(c)
                     - cos(3.14159265358979323846 * fmod(fabs(c), 2))));
    if (pow(b, (double)n) > 1e-290)
      worst_pow = fmax(worst_pow, fabs(exf__pow_d(b, n) / pow(b, (double)n) - 1));
  }
  CHECK(worst_log < 1e-14);
  CHECK(worst_cos < 1e-14);
  CHECK(worst_pow < 1e-12);
  CHECK(exf__log_d(1) == 0 && exf__cospi_d(0) == 1 && exf__cospi_d(1) == -1);
  CHECK_NEAR(exf__cospi_d(0.5), 0, 1e-16);
  CHECK(exf__pow_d(0.3, 0) == 1 && exf__pow_d(0.3, 1) == 0.3);
}

/* ---- random numbers -------------------------------------------------------------- */

TEST(philox_known_answers) {
  /* The published vectors for counter 0 and key 0, and for all bits set. */
  static const uint32_t zero[4] = {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u};
  static const uint32_t ones[4] = {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu};
  uint32_t out[4];
  int i;
  exf__philox(0, 0, 0, 0, out);
  for (i = 0; i < 4; i++) CHECK(out[i] == zero[i]);
  exf__philox(~(uint64_t)0, ~(uint32_t)0, ~(uint32_t)0, ~(uint64_t)0, out);
  for (i = 0; i < 4; i++) CHECK(out[i] == ones[i]);
}
/* A seed means the same numbers in every version: a hash (FNV-1a) of 1000 normal draws. */
TEST(normal_draws_keep_their_bits) {
  uint64_t hash = 0xcbf29ce484222325u, bits, i;
  int k;
  if (FLT_EVAL_METHOD != 0) SKIP("intermediate results are wider than double");
  for (i = 0; i < 1000; i++) {
    double x = exf_rng_normal(1, 2, 3, i);
    memcpy(&bits, &x, sizeof bits);
    for (k = 0; k < 64; k += 8) hash = (hash ^ (bits >> k & 255)) * 0x100000001b3u;
  }
  if (!CHECK(hash == 0x521f8f2fbcdf6ea7u)) printf("  %016llx\n", (unsigned long long)hash);
}

/* ---- gemm ------------------------------------------------------------------------ */

static void gemm_case(size_t m, size_t n, size_t k, int f) {
  int ta = f & 1, tb = (f >> 1) & 1, acc = (f >> 2) & 1, bias = (f >> 3) & 1;
  size_t ar = ta ? 1 : k + 3, ac = ta ? m + 2 : 1;    /* leading dimensions with a gap */
  size_t br = tb ? 1 : n + 1, bc = tb ? k + 5 : 1, cr = n + 4;
  arr a = arr_new((m + 2) * (k + 3), 1), b = arr_new((n + 1) * (k + 5) + n, 1);
  arr bi = arr_new(n, 1), c = arr_new(m * cr, 1), d = arr_copy(&c);
  void *base_k, *base_r, *sk = scratch_of(K->scratch, &base_k);
  void *sr = scratch_of(R->scratch, &base_r);
  size_t i, j, split = m / 2, bad = 0;
  const exf_real *pb = bias ? bi.x : NULL;
  if (!acc) for (i = 0; i < m; i++) for (j = 0; j < n; j++) c.x[i * cr + j] = NAN;
  /* the fast one in two pieces of rows: no row depends on its neighbours */
  K->gemm(split, n, k, a.x, ar, ac, b.x, br, bc, c.x, cr, acc, pb, sk);
  K->gemm(m - split, n, k, a.x + split * ar, ar, ac, b.x, br, bc, c.x + split * cr, cr,
          acc, pb, sk);
  R->gemm(m, n, k, a.x, ar, ac, b.x, br, bc, d.x, cr, acc, pb, sr);
  for (i = 0; i < m; i++)
    if (!agree(c.x + i * cr, d.x + i * cr, n)) bad++;
  for (i = 0; i < m; i++)            /* the gap between rows is not C's */
    if (memcmp(c.x + i * cr + n, d.x + i * cr + n, 4 * sizeof(exf_real)) != 0) bad++;
  if (!CHECK(bad == 0))
    printf("  gemm %lu x %lu x %lu, flags %d\n", (unsigned long)m, (unsigned long)n,
           (unsigned long)k, f);
  free(base_k);
  free(base_r);
  arr_free(&a); arr_free(&b); arr_free(&bi); arr_free(&c); arr_free(&d);
}
TEST(gemm_equals_reference) {
  static const size_t size[][3] = {
    {1, 1, 1}, {1, 65, 128}, {1, 33, 7}, {2, 16, 0}, {5, 9, 3}, {7, 31, 40}, {8, 8, 8},
    {12, 32, 64}, {13, 33, 65}, {16, 65, 128}, {24, 48, 255}, {25, 50, 256},
    {30, 20, 257}, {64, 64, 32}, {48, 128, 96}, {97, 70, 513}, {40, 130, 31},
    {6, 16, 1}, {11, 15, 17}, {100, 3, 50}, {3, 200, 20}};
  size_t i;
  int f;
  for (i = 0; i < sizeof size / sizeof size[0]; i++)
    for (f = 0; f < 16; f++) gemm_case(size[i][0], size[i][1], size[i][2], f);
}
TEST(gemm_of_training_shapes) {
  gemm_case(192, 512, 128, 2);      /* linear */
  gemm_case(192, 128, 512, 10);
  gemm_case(512, 128, 192, 1);      /* dW */
  gemm_case(192, 65, 128, 2);       /* head */
}

/* ---- rows ------------------------------------------------------------------------ */

static const size_t lengths[] = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 47, 64, 100,
                                 128, 129, 255, 1000, 1024, 1025, 3001};
#define N_LENGTHS (sizeof lengths / sizeof lengths[0])

TEST(elementwise_equal_reference) {
  size_t l;
  int acc, op;
  for (l = 0; l < N_LENGTHS; l++) {
    size_t n = lengths[l];
    arr x = arr_new(n, 2), y = arr_new(n, 2), a, b, c, d, e;
    a = arr_new(n, 1);
    b = arr_copy(&a);
    K->add(n, x.x, y.x, a.x);
    R->add(n, x.x, y.x, b.x);
    same(&a, &b);
    for (acc = 0; acc < 2; acc++) {
      c = arr_new(n, 1);
      a = arr_copy(&c);
      b = arr_copy(&c);
      K->mul(n, x.x, y.x, a.x, acc);
      R->mul(n, x.x, y.x, b.x, acc);
      same(&a, &b);
      a = arr_copy(&c);
      b = arr_copy(&c);
      K->axpy(n, (exf_real)0.3, x.x, a.x, acc);
      R->axpy(n, (exf_real)0.3, x.x, b.x, acc);
      same(&a, &b);
      for (op = EXF__U_EXP; op <= EXF__U_SILU; op++) {
        a = arr_copy(&c);
        b = arr_copy(&c);
        K->unary(op, n, x.x, a.x);
        R->unary(op, n, x.x, b.x);
        same(&a, &b);
        a = arr_copy(&c);
        b = arr_copy(&c);
        d = arr_copy(&c);
        e = arr_copy(&c);
        K->unary_grad(op, n, x.x, y.x, a.x, acc, acc ? d.x : NULL);
        R->unary_grad(op, n, x.x, y.x, b.x, acc, acc ? e.x : NULL);
        same(&a, &b);
        same(&d, &e);
      }
      arr_free(&c);
    }
    arr_free(&x);
    arr_free(&y);
  }
}

TEST(rowwise_equal_reference) {
  size_t l, rows = 5;
  int acc, rms;
  for (l = 1; l < N_LENGTHS; l++) {
    size_t n = lengths[l], j;
    arr x = arr_new(rows * n, 2), dy = arr_new(rows * n, 1), w = arr_new(n, 1);
    arr b = arr_new(n, 1), start = arr_new(rows * n, 1), p, q, y, s, t, u, v;
    exf_real mean[5], rstd[5], m2[5], r2[5];
    if (n > 4) for (j = 0; j < n; j++) if (j % 3) x.x[n + j] = (exf_real)-INFINITY;
    for (j = 0; j < n; j++) x.x[2 * n + j] = (exf_real)-INFINITY;
    p = arr_copy(&start); q = arr_copy(&start);
    K->softmax(rows, n, x.x, p.x);
    R->softmax(rows, n, x.x, q.x);
    y = arr_copy(&q);
    same(&p, &q);
    for (acc = 0; acc < 2; acc++) {
      p = arr_copy(&start); q = arr_copy(&start);
      K->softmax_grad(rows, n, y.x, dy.x, p.x, acc);
      R->softmax_grad(rows, n, y.x, dy.x, q.x, acc);
      same(&p, &q);
    }
    arr_free(&y);
    p = arr_copy(&start); q = arr_copy(&start);
    K->log_softmax(rows, n, x.x, p.x);
    R->log_softmax(rows, n, x.x, q.x);
    y = arr_copy(&q);
    same(&p, &q);
    for (acc = 0; acc < 2; acc++) {
      p = arr_copy(&start); q = arr_copy(&start);
      K->log_softmax_grad(rows, n, y.x, dy.x, p.x, acc);
      R->log_softmax_grad(rows, n, y.x, dy.x, q.x, acc);
      same(&p, &q);
    }
    arr_free(&y);
    arr_free(&x);
    x = arr_new(rows * n, 2);
    for (rms = 0; rms < 2; rms++) {
      const exf_real *bias = rms ? NULL : b.x;
      memset(mean, 0, sizeof mean);
      memset(m2, 0, sizeof m2);
      p = arr_copy(&start); q = arr_copy(&start);
      K->layernorm(rows, n, x.x, w.x, bias, (exf_real)1e-5, rms, p.x, mean, rstd);
      R->layernorm(rows, n, x.x, w.x, bias, (exf_real)1e-5, rms, q.x, m2, r2);
      same(&p, &q);
      CHECK(agree(rstd, r2, rows) && (rms || agree(mean, m2, rows)));
      for (acc = 0; acc < 2; acc++) {
        size_t from = n / 3, cols = n - from;
        p = arr_copy(&start); q = arr_copy(&start);
        K->layernorm_grad(rows, n, x.x, w.x, m2, r2, rms, dy.x, p.x, acc);
        R->layernorm_grad(rows, n, x.x, w.x, m2, r2, rms, dy.x, q.x, acc);
        same(&p, &q);
        s = arr_copy(&w); t = arr_copy(&w); u = arr_copy(&b); v = arr_copy(&b);
        K->layernorm_grad_w(rows, cols, n, x.x + from, m2, r2, rms, dy.x + from,
                            s.x + from, rms ? NULL : u.x + from, acc, 1 - acc);
        R->layernorm_grad_w(rows, cols, n, x.x + from, m2, r2, rms, dy.x + from,
                            t.x + from, rms ? NULL : v.x + from, acc, 1 - acc);
        same(&s, &t);
        same(&u, &v);
        s = arr_copy(&w); t = arr_copy(&w);
        K->col_sum(rows, cols, n, x.x + from, s.x, acc);
        R->col_sum(rows, cols, n, x.x + from, t.x, acc);
        same(&s, &t);
      }
    }
    arr_free(&x); arr_free(&dy); arr_free(&w); arr_free(&b); arr_free(&start);
  }
}

TEST(cross_entropy_equals_reference) {
  static const int32_t labels[6] = {0, -1, 1, 0, -100, 1};
  size_t l, rows = 6;
  int acc, smooth;
  for (l = 2; l < N_LENGTHS; l++)
    for (smooth = 0; smooth < 2; smooth++) {
      size_t n = lengths[l];
      exf_real s = (exf_real)(smooth ? 0.1 : 0);
      arr x = arr_new(rows * n, 3), start = arr_new(rows * n, 1), p, q;
      arr la = arr_new(rows, 1), lb = arr_copy(&la), ea = arr_new(rows, 0);
      arr eb = arr_copy(&ea);
      K->cross_entropy(rows, n, x.x, labels, s, la.x, ea.x);
      R->cross_entropy(rows, n, x.x, labels, s, lb.x, eb.x);
      for (acc = 0; acc < 2; acc++) {
        p = arr_copy(&start); q = arr_copy(&start);
        K->cross_entropy_grad(rows, n, x.x, labels, eb.x, s, (exf_real)0.25, p.x, acc);
        R->cross_entropy_grad(rows, n, x.x, labels, eb.x, s, (exf_real)0.25, q.x, acc);
        same(&p, &q);
      }
      same(&la, &lb);
      same(&ea, &eb);
      arr_free(&x);
      arr_free(&start);
    }
}

/* ---- attention ------------------------------------------------------------------- */

/* Every score of query 0 is -inf, of finite factors. */
static void hide_all(exf_real *q, size_t d, exf_real *k, size_t tk, size_t stride) {
  size_t i, j;
  for (j = 0; j < d; j++) q[j] = -(exf_real)FLT_MAX;
  for (i = 0; i < tk; i++)
    for (j = 0; j < d; j++) k[i * stride + j] = k[i * stride + j] < 0 ? 2 : 3;
}

static void attention_case(size_t tq, size_t tk, size_t d, int causal, int hidden) {
  size_t qs = 3 * d + 1, vs = 2 * d + 3, os = d + 2, i, bad = 0;
  size_t bytes = exf__attention_scratch(K, tk), rb = exf__attention_scratch(R, tk);
  arr q = arr_new(tq * qs, 1), k = arr_new(tk * vs, 1), v = arr_new(tk * vs, 1);
  arr a = arr_new(tq * os, 0), b = arr_copy(&a);
  arr la = arr_new(2 * tq, 0), lb = arr_copy(&la);
  void *base_k, *base_r, *sk = scratch_of(bytes, &base_k), *sr = scratch_of(rb, &base_r);
  exf_real scale = (exf_real)(1 / sqrt((double)d));
  CHECK(bytes > 0 && rb > 0);
  if (hidden) hide_all(q.x, d, k.x, tk, vs);
  K->attention(tq, tk, d, q.x, qs, k.x, v.x, vs, scale, causal, a.x, os, la.x, sk);
  R->attention(tq, tk, d, q.x, qs, k.x, v.x, vs, scale, causal, b.x, os, lb.x, sr);
  for (i = 0; i < tq; i++) bad += !agree(a.x + i * os, b.x + i * os, d);
  CHECK(bad == 0);
  CHECK(agree(la.x, lb.x, 2 * tq));
  for (i = 0; hidden && i < d; i++) CHECK(a.x[i] == 0 && la.x[0] == 0 && la.x[tq] == 0);
  K->attention(tq, tk, d, q.x, qs, k.x, v.x, vs, scale, causal, a.x, os, NULL, sk);
  for (i = 0; i < tq; i++) bad += !agree(a.x + i * os, b.x + i * os, d);
  CHECK(bad == 0);
  free(base_k);
  free(base_r);
  arr_free(&q); arr_free(&k); arr_free(&v); arr_free(&a); arr_free(&b);
  arr_free(&la); arr_free(&lb);
}
static void attention_grad_case(size_t t, size_t d, int causal, int acc, int hidden) {
  size_t s = 3 * d + 2, os = d + 1, bad = 0, i;
  size_t bytes = exf__attention_scratch(K, t), rb = exf__attention_scratch(R, t);
  arr x = arr_new(t * s, 1), out = arr_new(t * os, 0), dout = arr_new(t * os, 1);
  arr stat = arr_new(2 * t, 0), a = arr_new(t * s, 1), b = arr_copy(&a);
  void *base_k, *base_r, *sk = scratch_of(bytes, &base_k), *sr = scratch_of(rb, &base_r);
  exf_real scale = (exf_real)(1 / sqrt((double)d));
  if (hidden) hide_all(x.x, d, x.x + d, t, s);
  R->attention(t, t, d, x.x, s, x.x + d, x.x + 2 * d, s, scale, causal, out.x, os, stat.x,
               sr);
  K->attention_grad(t, d, x.x, x.x + d, x.x + 2 * d, s, scale, causal, out.x, dout.x, os,
                    stat.x, a.x, a.x + d, a.x + 2 * d, s, acc, sk);
  R->attention_grad(t, d, x.x, x.x + d, x.x + 2 * d, s, scale, causal, out.x, dout.x, os,
                    stat.x, b.x, b.x + d, b.x + 2 * d, s, acc, sr);
  for (i = 0; i < t; i++) bad += !agree(a.x + i * s, b.x + i * s, 3 * d);
  for (i = 0; i < d && hidden && !acc; i++) bad += b.x[i] != 0 || !isfinite(b.x[d + i]);
  CHECK(bad == 0);
  free(base_k);
  free(base_r);
  arr_free(&x); arr_free(&out); arr_free(&dout); arr_free(&stat); arr_free(&a);
  arr_free(&b);
}
TEST(attention_equals_reference) {
  static const size_t t[] = {1, 2, 15, 31, 32, 33, 50, 64, 100, 130};
  static const size_t d[] = {1, 5, 16, 32, 33};
  size_t i, j;
  int causal;
  for (i = 0; i < sizeof t / sizeof t[0]; i++)
    for (j = 0; j < sizeof d / sizeof d[0]; j++)
      for (causal = 0; causal < 2; causal++) {
        attention_case(t[i], t[i], d[j], causal, 0);
        attention_case(1, t[i], d[j], causal, 0);
        attention_case((t[i] + 1) / 2, t[i], d[j], causal, 0);
        attention_case(t[i], t[i], d[j], causal, 1);
        attention_grad_case(t[i], d[j], causal, 0, 0);
        attention_grad_case(t[i], d[j], causal, 1, 0);
        attention_grad_case(t[i], d[j], causal, 0, 1);
      }
}

/* ---- experts and updates --------------------------------------------------------- */

TEST(expert_kernels_equal_reference) {
  size_t l, n;
  for (l = 0; l < N_LENGTHS; l++)
    for (n = 1; n <= 5; n++) {
      size_t size = lengths[l], stride = size + 3, i;
      arr e = arr_new(n * stride, 1), g = arr_new(size, 1), a = arr_new(n, 1);
      arr p = arr_new(size, 0), q = arr_copy(&p);
      double d1[5] = {1, 2, 3, 4, 5}, d2[5] = {1, 2, 3, 4, 5}, s1, s2;
      K->fuse(n, size, stride, a.x, e.x, p.x);
      R->fuse(n, size, stride, a.x, e.x, q.x);
      same(&p, &q);
      K->dots(n, size, stride, g.x, e.x, d1);
      R->dots(n, size, stride, g.x, e.x, d2);
      s1 = K->sumsq(size, g.x);
      s2 = R->sumsq(size, g.x);
      for (i = 0; i < n; i++)
        CHECK(K->isa == EXF_ISA_SSE2 ? fabs(d1[i] - d2[i]) < 1e-3 : d1[i] == d2[i]);
      CHECK(K->isa == EXF_ISA_SSE2 ? fabs(s1 - s2) <= 1e-5 * s2 : s1 == s2);
      arr_free(&e);
      arr_free(&g);
      arr_free(&a);
    }
}

TEST(adamw_equals_reference) {
  exf__adamw_args args;
  size_t l, n, i;
  int shared;
  memset(&args, 0, sizeof args);
  args.clip = (exf_real)0.7;
  args.decay = (exf_real)0.999;
  args.beta1 = (exf_real)0.9;
  args.one_minus_beta1 = (exf_real)0.1;
  args.beta2 = (exf_real)0.99;
  args.one_minus_beta2 = (exf_real)0.01;
  args.step = (exf_real)0.01;
  args.inv_sqrt_bias2 = (exf_real)3;
  args.eps = (exf_real)1e-8;
  for (l = 0; l < N_LENGTHS; l++)
    for (n = 1; n <= 4; n++)
      for (shared = 0; shared < 2; shared++) {
        size_t size = lengths[l], stride = size + 5, sets = shared ? 1 : n;
        arr p = arr_new(n * stride, 1), g = arr_new(size, 1), p2, m2, v2;
        arr m = arr_new(sets * stride, 0.1), v = arr_new(sets * stride, 0.01);
        arr s = arr_new(n, 1);
        for (i = 0; i < v.n; i++) v.x[i] = (exf_real)fabs((double)v.x[i]);
        p2 = arr_copy(&p);
        m2 = arr_copy(&m);
        v2 = arr_copy(&v);
        (shared ? K->adamw_shared : K->adamw)(n, size, stride, p.x, g.x, m.x, v.x, &args,
                                              s.x);
        (shared ? R->adamw_shared : R->adamw)(n, size, stride, p2.x, g.x, m2.x, v2.x,
                                              &args, s.x);
        same(&p, &p2);
        same(&m, &m2);
        same(&v, &v2);
        arr_free(&g);
        arr_free(&s);
      }
}

/* Each kernel test once per instruction set, under its name. */
static void each_isa(void (*test)(void), const char *name) {
  static const exf_isa isa[] = {EXF_ISA_SSE2, EXF_ISA_AVX2, EXF_ISA_AVX512, EXF_ISA_NEON};
  size_t i;
  for (i = 0; i < 4; i++) {
    char full[96];
    K = exf__kernels_for(isa[i]);
    if (K == NULL) continue;
    snprintf(full, sizeof full, "%s [%s]", name, exf_isa_name(isa[i]));
    test_run(test, full);
  }
}
#define EACH(name) each_isa(name, #name)

int main(void) {
  RUN(double_helpers);
  RUN(philox_known_answers);
  RUN(normal_draws_keep_their_bits);
#ifndef EXF_DOUBLE
  RUN(exp_within_two_ulp);
  RUN(tanh_within_two_ulp);
  RUN(erf_within_four_ulp);
  RUN(log_within_two_ulp);
  EACH(vector_functions);
#endif
  EACH(gemm_equals_reference);
  EACH(gemm_of_training_shapes);
  EACH(elementwise_equal_reference);
  EACH(rowwise_equal_reference);
  EACH(cross_entropy_equals_reference);
  EACH(attention_equals_reference);
  EACH(expert_kernels_equal_reference);
  EACH(adamw_equals_reference);
  TEST_MAIN_END;
}
