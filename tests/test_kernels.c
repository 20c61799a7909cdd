/* The kernels behind the ops: our own exp, tanh, erf and log against libm's in double;
   the reference kernels against their formulas, computed here in double by plain loops;
   and every fast kernel against the reference: bit for bit where the instruction set has
   fused multiply-add, to rounding on SSE2. Outputs lie between guard words; fast kernels
   compute theirs in two pieces. */
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

/* Runs a kernel over [begin, end) in two pieces that meet anywhere, with work space. */
static void run_part(exf__kernel *kernel, const void *operands, size_t begin, size_t end,
                     size_t bytes) {
  size_t middle = begin + (end - begin) * (salt % 5) / 4;
  void *base = malloc(bytes + 128);
  void *scratch = (void *)(((uintptr_t)base + 63) & ~(uintptr_t)63);
  memset(base, 0x7f, bytes + 128);        /* work space holds anything: here 3.4e38 */
  kernel(operands, begin, middle, scratch);
  kernel(operands, middle, end, scratch);
  free(base);
}
static void run(exf__kernel *kernel, const void *operands, size_t n) {
  run_part(kernel, operands, 0, n, K->scratch);
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
  exf__elements e = {0, 0, 0, x, NULL, one, NULL, NULL};
  for (i = 0; i < CHUNK; i++) one[i] = 1;
  for (o = 0; o < 6; o++) {
    uint64_t at = 0;
    double worst = 0;
    size_t bad = 0, bad_grad = 0;
    while (at < ((uint64_t)1 << 32)) {
      for (i = 0; i < CHUNK; i++, at += 7919) x[i] = float_of((uint32_t)at);
      e.op = ops[o];
      e.y = y;
      K->unary(&e, 0, CHUNK, NULL);
      e.y = z;
      R->unary(&e, 0, CHUNK, NULL);
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
      e.y = NULL;
      e.dx = y;
      K->unary_grad(&e, 0, CHUNK, NULL);
      e.dx = d;
      R->unary_grad(&e, 0, CHUNK, NULL);
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

enum { TRANSPOSED_A = 1, TRANSPOSED_B = 2, ADDED = 4, WITH_BIAS = 8 };

/* Two matrices, of which each piece takes rows, columns, or whole ones; leading
   dimensions with a gap */
static exf__gemm gemm_operands(size_t m, size_t n, size_t k, int flags) {
  exf__gemm g;
  memset(&g, 0, sizeof g);
  g.m = m;
  g.n = n;
  g.k = k;
  g.a_row = flags & TRANSPOSED_A ? 1 : k + 3;
  g.a_col = flags & TRANSPOSED_A ? m + 2 : 1;
  g.b_row = flags & TRANSPOSED_B ? 1 : n + 1;
  g.b_col = flags & TRANSPOSED_B ? k + 5 : 1;
  g.c_row = n + 4;
  g.a_batch = (m + 2) * (k + 3);
  g.b_batch = (n + 1) * (k + 5) + n;
  g.c_batch = m * g.c_row;
  g.acc = flags & ADDED;
  return g;
}

static void gemm_case(size_t m, size_t n, size_t k, int flags, int split) {
  exf__gemm g = gemm_operands(m, n, k, flags);
  size_t count = split == EXF__BY_ROWS ? m : split == EXF__BY_COLUMNS ? n : 2;
  size_t batch = split == EXF__BY_MATRIX ? 2 : 1, bad = 0;
  arr a = arr_new(batch * g.a_batch, 1), b = arr_new(batch * g.b_batch, 1);
  arr bias = arr_new(n, 1), c = arr_new(batch * g.c_batch, 1), d = arr_copy(&c);
  g.split = split;
  g.a = a.x;
  g.b = b.x;
  g.bias = flags & WITH_BIAS ? bias.x : NULL;
  for (size_t i = 0; i < batch * m && !g.acc; i++)
    for (size_t j = 0; j < n; j++) c.x[i * g.c_row + j] = NAN;
  g.c = c.x;
  run(K->gemm, &g, count);
  g.c = d.x;
  R->gemm(&g, 0, count, NULL);
  for (size_t i = 0; i < batch * m; i++) {
    if (!agree(c.x + i * g.c_row, d.x + i * g.c_row, n)) bad++;
    /* the gap between rows is not C's */
    if (memcmp(c.x + i * g.c_row + n, d.x + i * g.c_row + n, 4 * sizeof(exf_real)) != 0)
      bad++;
  }
  if (!CHECK(bad == 0))
    printf("  gemm %zu x %zu x %zu, flags %d, split %d\n", m, n, k, flags, split);
  arr_free(&a); arr_free(&b); arr_free(&bias); arr_free(&c); arr_free(&d);
}
TEST(gemm_equals_reference) {
  static const size_t size[][3] = {
    {1, 1, 1}, {1, 65, 128}, {1, 33, 7}, {2, 16, 0}, {5, 9, 3}, {7, 31, 40}, {8, 8, 8},
    {12, 32, 64}, {13, 33, 65}, {16, 65, 128}, {24, 48, 255}, {25, 50, 256},
    {30, 20, 257}, {64, 64, 32}, {48, 128, 96}, {97, 70, 513}, {40, 130, 31},
    {6, 16, 1}, {11, 15, 17}, {100, 3, 50}, {3, 200, 20}, {1, 200, 530}};
  for (size_t i = 0; i < sizeof size / sizeof size[0]; i++)
    for (int f = 0; f < 16; f++)
      gemm_case(size[i][0], size[i][1], size[i][2], f, (f + (int)i) % 3);
}
TEST(gemm_of_training_shapes) {
  gemm_case(192, 512, 128, TRANSPOSED_B, EXF__BY_ROWS);             /* linear */
  gemm_case(192, 128, 512, TRANSPOSED_B | WITH_BIAS, EXF__BY_ROWS);
  gemm_case(512, 128, 192, TRANSPOSED_A, EXF__BY_ROWS);             /* dW */
  gemm_case(192, 65, 128, TRANSPOSED_B, EXF__BY_ROWS);              /* head */
  gemm_case(12, 512, 128, TRANSPOSED_B, EXF__BY_COLUMNS);
  gemm_case(300, 1100, 40, 0, EXF__BY_COLUMNS);
}
/* Rows of c with room for whole vectors may hold anything past column n, nothing else. */
TEST(padded_gemm_keeps_to_its_columns) {
  for (size_t n = 1; n <= 40; n++)
    for (size_t m = 1; m <= 33; m += 4) {
      exf__gemm g = gemm_operands(m, n, 21, TRANSPOSED_B);
      size_t room = (n + 15) / 16 * 16, bad = 0;
      arr a = arr_new(g.a_batch, 1), b = arr_new(g.b_batch, 1);
      arr c = arr_new(m * (room + 1), 1), d = arr_copy(&c);
      g.a = a.x;
      g.b = b.x;
      g.c_row = room + 1;
      g.padded = 1;
      g.c = c.x;
      run(K->gemm, &g, m);
      g.c = d.x;
      R->gemm(&g, 0, m, NULL);
      for (size_t i = 0; i < m; i++)
        bad += !agree(c.x + i * g.c_row, d.x + i * g.c_row, n)
               || c.x[i * g.c_row + room] != d.x[i * g.c_row + room];
      CHECK(bad == 0);
      arr_free(&a); arr_free(&b); arr_free(&c); arr_free(&d);
    }
}

/* ---- rows ------------------------------------------------------------------------ */

static const size_t lengths[] = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 47, 64, 100,
                                 128, 129, 255, 1000, 1024, 1025, 3001};
#define N_LENGTHS (sizeof lengths / sizeof lengths[0])

/* A kernel of both tables writes to *y, which begins as a copy of `start`: the same. */
static void both(exf__kernel *fast, exf__kernel *reference, const void *operands,
                 exf_real **y, const arr *start, size_t n) {
  arr a = arr_copy(start), b = arr_copy(start);
  *y = a.x;
  run(fast, operands, n);
  *y = b.x;
  reference(operands, 0, n, NULL);
  *y = NULL;
  same(&a, &b);
}
#define BOTH(name, operands, y, start, n) \
  both(K->name, R->name, &(operands), &(y), start, n)

TEST(elementwise_equal_reference) {
  for (size_t l = 0; l < N_LENGTHS; l++) {
    size_t n = lengths[l];
    arr x = arr_new(n, 2), b = arr_new(n, 2), start = arr_new(n, 1);
    for (int acc = 0; acc < 2; acc++) {
      exf__elements e = {0, acc, (exf_real)0.3, x.x, b.x, b.x, NULL, NULL};
      BOTH(add, e, e.y, &start, n);
      BOTH(mul, e, e.y, &start, n);
      BOTH(axpy, e, e.y, &start, n);
      for (e.op = EXF__U_EXP; e.op <= EXF__U_SILU; e.op++) {
        BOTH(unary, e, e.y, &start, n);
        BOTH(unary_grad, e, e.dx, &start, n);
        arr y = arr_new(n, 0), dx = arr_copy(&start), z = arr_new(n, 0);
        e.y = y.x;               /* backward that gives y as well */
        e.dx = dx.x;
        run(K->unary_grad, &e, n);
        e.y = z.x;
        R->unary(&e, 0, n, NULL);
        same(&y, &z);
        z = arr_copy(&start);
        e.y = NULL;
        e.dx = z.x;
        R->unary_grad(&e, 0, n, NULL);
        same(&dx, &z);
      }
      arr y = arr_copy(&x), z = arr_copy(&x), *in_place[2];
      in_place[0] = &y;          /* y may be x; dx may be dy */
      in_place[1] = &z;
      for (int k = 0; k < 2; k++) {
        exf__elements f = {EXF__U_GELU, 0, (exf_real)0.3, b.x, NULL, in_place[k]->x, NULL,
                           in_place[k]->x};
        run((k ? R : K)->unary_grad, &f, n);
        f.x = f.y = in_place[k]->x;
        run((k ? R : K)->axpy, &f, n);
      }
      same(&y, &z);
    }
    arr_free(&x); arr_free(&b); arr_free(&start);
  }
}

TEST(softmax_equals_reference) {
  const size_t rows = 5;
  for (size_t l = 1; l < N_LENGTHS; l++) {
    size_t n = lengths[l];
    arr x = arr_new(rows * n, 2), dy = arr_new(rows * n, 1);
    arr start = arr_new(rows * n, 1), y = arr_new(rows * n, 0);
    for (size_t j = 0; j < n && n > 4; j++)
      if (j % 3) x.x[n + j] = (exf_real)-INFINITY;
    for (size_t j = 0; j < n; j++) x.x[2 * n + j] = (exf_real)-INFINITY;
    for (int acc = 0; acc < 2; acc++) {
      exf__rows r;
      memset(&r, 0, sizeof r);
      r.n = n;
      r.acc = acc;
      r.x = x.x;
      r.dy = dy.x;
      BOTH(softmax, r, r.y, &start, rows);
      BOTH(log_softmax, r, r.y, &start, rows);
      r.y = y.x;
      R->softmax(&r, 0, rows, NULL);
      BOTH(softmax_grad, r, r.dx, &start, rows);
      R->log_softmax(&r, 0, rows, NULL);
      BOTH(log_softmax_grad, r, r.dx, &start, rows);
    }
    arr_free(&x); arr_free(&dy); arr_free(&start); arr_free(&y);
  }
}

TEST(norm_equals_reference) {
  enum { ROWS = 5 };
  for (size_t l = 1; l < N_LENGTHS; l++)
    for (int rms = 0; rms < 2; rms++) {
      size_t n = lengths[l], from = n / 3;
      arr x = arr_new(ROWS * n, 2), dy = arr_new(ROWS * n, 1), w = arr_new(n, 1);
      arr b = arr_new(n, 1), start = arr_new(ROWS * n, 1), p, q, s, t;
      exf_real mean[2][ROWS] = {{0}}, rstd[2][ROWS];
      exf__norm r;
      memset(&r, 0, sizeof r);
      r.rows = ROWS;
      r.n = n;
      r.rms = rms;
      r.eps = (exf_real)1e-5;
      r.x = x.x;
      r.w = w.x;
      r.b = rms ? NULL : b.x;
      r.dy = dy.x;
      p = arr_copy(&start);
      q = arr_copy(&start);
      for (int k = 0; k < 2; k++) {
        r.y = k ? q.x : p.x;
        r.mean = mean[k];
        r.rstd = rstd[k];
        run((k ? R : K)->norm, &r, ROWS);
      }
      same(&p, &q);
      CHECK(agree(rstd[0], rstd[1], ROWS) && (rms || agree(mean[0], mean[1], ROWS)));
      for (int acc = 0; acc < 2; acc++) {
        exf__columns c = {ROWS, n, 0, NULL, NULL};
        r.acc = r.acc_w = acc;
        r.acc_b = 1 - acc;
        BOTH(norm_grad, r, r.dx, &start, ROWS);
        p = arr_copy(&w);        /* dw and db, of columns from .. n-1 */
        q = arr_copy(&w);
        s = arr_copy(&b);
        t = arr_copy(&b);
        for (int k = 0; k < 2; k++) {
          r.dw = rms && acc ? NULL : k ? q.x : p.x;
          r.db = rms ? NULL : k ? t.x : s.x;
          run_part((k ? R : K)->norm_grad_w, &r, from, n, 0);
        }
        same(&p, &q);
        same(&s, &t);
        c.x = x.x;
        c.acc = acc;
        BOTH(column_sum, c, c.y, &w, n);
      }
      arr_free(&x); arr_free(&dy); arr_free(&w); arr_free(&b); arr_free(&start);
    }
}

TEST(cross_entropy_equals_reference) {
  static const int32_t labels[6] = {0, -1, 1, 0, -100, 1};
  const size_t rows = 6;
  for (size_t l = 2; l < N_LENGTHS; l++)
    for (int smooth = 0; smooth < 2; smooth++) {
      size_t n = lengths[l];
      arr x = arr_new(rows * n, 3), start = arr_new(rows * n, 1);
      arr la = arr_new(rows, 1), lb = arr_copy(&la), ea = arr_new(rows, 0);
      arr eb = arr_copy(&ea);
      exf__rows r;
      memset(&r, 0, sizeof r);
      r.n = n;
      r.x = x.x;
      r.labels = labels;
      r.smoothing = (exf_real)(smooth ? 0.1 : 0);
      r.g = (exf_real)0.25;
      r.loss = la.x;
      r.lse = ea.x;
      run(K->cross_entropy, &r, rows);
      r.loss = lb.x;
      r.lse = eb.x;
      R->cross_entropy(&r, 0, rows, NULL);
      for (r.acc = 0; r.acc < 2; r.acc++) BOTH(cross_entropy_grad, r, r.dx, &start, rows);
      same(&la, &lb);
      same(&ea, &eb);
      arr_free(&x);
      arr_free(&start);
    }
}

/* ---- attention ------------------------------------------------------------------- */

/* Every score of query 0 of a head is -inf, of finite factors. */
static void hide_all(exf_real *q, size_t d, exf_real *k, size_t tk, size_t stride) {
  for (size_t j = 0; j < d; j++) q[j] = -(exf_real)FLT_MAX;
  for (size_t i = 0; i < tk; i++)
    for (size_t j = 0; j < d; j++) k[i * stride + j] = k[i * stride + j] < 0 ? 2 : 3;
}

enum { SEQUENCES = 2, HEADS = 2, PAIRS = SEQUENCES * HEADS };

static exf__attention attention_operands(size_t tq, size_t tk, size_t d, int causal) {
  exf__attention a;
  memset(&a, 0, sizeof a);
  a.tq = tq;
  a.tk = tk;
  a.heads = HEADS;
  a.width = HEADS * d;
  a.causal = causal;
  a.scale = (exf_real)(1 / sqrt((double)d));
  return a;
}

/* The kernel with the tables of K and of the reference, its work space not a byte more */
static void attention_run(exf__kernel *kernel, exf__attention *a, const exf__kernels *k) {
  size_t bytes = exf__attention_scratch(k, a->tk);
  CHECK(bytes > 0);
  a->k = k;
  run_part(kernel, a, 0, PAIRS, bytes);
}

static void attention_case(size_t tq, size_t tk, size_t d, int causal, int hidden) {
  exf__attention h = attention_operands(tq, tk, d, causal);
  size_t c = h.width, bad = 0;
  arr q = arr_new(SEQUENCES * tq * (3 * c + 1), 1);
  arr kv = arr_new(SEQUENCES * tk * (2 * c + 3), 1);
  arr a = arr_new(SEQUENCES * tq * c, 0), b = arr_copy(&a), e = arr_copy(&a);
  arr la = arr_new(2 * PAIRS * tq, 0), lb = arr_copy(&la);
  h.q = q.x;
  h.q_stride = 3 * c + 1;
  h.key = kv.x;
  h.value = kv.x + c;
  h.kv_stride = 2 * c + 3;
  if (hidden) hide_all(q.x, d, kv.x, tk, h.kv_stride);
  h.out = a.x;
  h.stat = la.x;
  attention_run(exf__attention_forward, &h, K);
  h.out = b.x;
  h.stat = lb.x;
  attention_run(exf__attention_forward, &h, R);
  for (size_t i = 0; hidden && i < d; i++)
    bad += a.x[i] != 0 || la.x[0] != 0 || la.x[tq] != 0;
  h.out = e.x;
  h.stat = NULL;
  attention_run(exf__attention_forward, &h, K);
  CHECK(agree(e.x, b.x, e.n) && bad == 0);
  h.q += tq * h.q_stride;           /* the second sequence alone, its heads one by one */
  h.key += tk * h.kv_stride;
  h.value += tk * h.kv_stride;
  for (size_t i = 0; i < HEADS; i++)
    run_part(exf__attention_forward, &h, i, i + 1, exf__attention_scratch(K, tk));
  CHECK(agree(e.x, b.x + tq * c, tq * c));
  same(&a, &b);
  same(&la, &lb);
  arr_free(&q); arr_free(&kv); arr_free(&e);
}

static void attention_grad_case(size_t t, size_t d, int causal, int acc, int hidden) {
  exf__attention h = attention_operands(t, t, d, causal);
  size_t c = h.width, s = 3 * c + 2, bad = 0;
  arr x = arr_new(SEQUENCES * t * s, 1), out = arr_new(SEQUENCES * t * c, 0);
  arr dout = arr_new(SEQUENCES * t * c, 1), stat = arr_new(2 * PAIRS * t, 0);
  arr a = arr_new(SEQUENCES * t * s, 1), b = arr_copy(&a);
  h.q = x.x;
  h.key = x.x + c;
  h.value = x.x + 2 * c;
  h.q_stride = h.kv_stride = s;
  h.out = out.x;
  h.stat = stat.x;
  h.acc = acc;
  if (hidden) hide_all(x.x, d, x.x + c, t, s);
  attention_run(exf__attention_forward, &h, R);
  h.dout = dout.x;
  for (int k = 0; k < 2; k++) {
    h.dq = k ? b.x : a.x;
    h.dkey = h.dq + c;
    h.dvalue = h.dq + 2 * c;
    attention_run(exf__attention_backward, &h, k ? R : K);
  }
  for (size_t i = 0; i < d && hidden && !acc; i++)
    bad += b.x[i] != 0 || !isfinite(b.x[c + i]);
  CHECK(bad == 0);
  same(&a, &b);
  arr_free(&x); arr_free(&out); arr_free(&dout); arr_free(&stat);
}
TEST(attention_equals_reference) {
  static const size_t t[] = {1, 2, 15, 31, 32, 33, 50, 64, 100, 130};
  static const size_t d[] = {1, 5, 16, 32, 33};
  for (size_t i = 0; i < sizeof t / sizeof t[0]; i++)
    for (size_t j = 0; j < sizeof d / sizeof d[0]; j++)
      for (int causal = 0; causal < 2; causal++) {
        attention_case(t[i], t[i], d[j], causal, 0);
        attention_case(1, t[i], d[j], causal, 0);
        attention_case((t[i] + 1) / 2, t[i], d[j], causal, 0);
        attention_case(t[i], t[i], d[j], causal, 1);
        attention_grad_case(t[i], d[j], causal, 0, 0);
        attention_grad_case(t[i], d[j], causal, 1, 0);
        attention_grad_case(t[i], d[j], causal, 0, 1);
      }
}
TEST(attention_work_space_does_not_overflow) {
  CHECK(exf__attention_scratch(K, SIZE_MAX) == 0);
  CHECK(exf__attention_scratch(K, SIZE_MAX / (2 * EXF__QUERIES * sizeof(exf_real))) == 0);
  CHECK(exf__attention_scratch(K, 64) > K->scratch);
}

/* ---- experts and updates --------------------------------------------------------- */

TEST(expert_kernels_equal_reference) {
  for (size_t l = 0; l < N_LENGTHS; l++)
    for (size_t n = 1; n <= 5; n++) {
      size_t size = lengths[l], stride = size + 3;
      arr e = arr_new(n * stride, 1), g = arr_new(size, 1), a = arr_new(n, 1);
      arr start = arr_new(size, 0);
      double d1[5] = {1, 2, 3, 4, 5}, d2[5] = {1, 2, 3, 4, 5};
      exf__experts f = {n, size, stride, a.x, e.x, g.x, NULL, NULL};
      BOTH(fuse, f, f.out, &start, size);
      f.dots = d1;
      run(K->dots, &f, n);
      f.dots = d2;
      R->dots(&f, 0, n, NULL);
      for (size_t i = 0; i < n; i++)
        CHECK(K->isa == EXF_ISA_SSE2 ? fabs(d1[i] - d2[i]) < 1e-3 : d1[i] == d2[i]);
      arr_free(&e); arr_free(&g); arr_free(&a); arr_free(&start);
    }
}

static exf__adam adam_operands(size_t n, size_t stride) {
  exf__adam a;
  memset(&a, 0, sizeof a);
  a.n_experts = n;
  a.stride = stride;
  a.clip = (exf_real)0.7;
  a.decay = (exf_real)0.999;
  a.beta1 = (exf_real)0.9;
  a.one_minus_beta1 = (exf_real)0.1;
  a.beta2 = (exf_real)0.99;
  a.one_minus_beta2 = (exf_real)0.01;
  a.step = (exf_real)0.01;
  a.inv_sqrt_bias2 = (exf_real)3;
  a.eps = (exf_real)1e-8;
  return a;
}

TEST(adamw_equals_reference) {
  for (size_t l = 0; l < N_LENGTHS; l++)
    for (size_t n = 1; n <= 4; n++)
      for (int shared = 0; shared < 2; shared++) {
        size_t size = lengths[l], stride = size + 5, sets = shared ? 1 : n;
        exf__adam u = adam_operands(n, stride);
        arr p = arr_new(n * stride, 1), g = arr_new(size, 1), p2, m2, v2;
        arr m = arr_new(sets * stride, 0.1), v = arr_new(sets * stride, 0.01);
        arr s = arr_new(n, 1);
        for (size_t i = 0; i < v.n; i++) v.x[i] = (exf_real)fabs((double)v.x[i]);
        p2 = arr_copy(&p);
        m2 = arr_copy(&m);
        v2 = arr_copy(&v);
        u.g = g.x;
        u.scale = s.x;
        for (int k = 0; k < 2; k++) {
          const exf__kernels *table = k ? R : K;
          u.p = k ? p2.x : p.x;
          u.m = k ? m2.x : m.x;
          u.v = k ? v2.x : v.x;
          run(shared ? table->adamw_shared : table->adamw, &u, size);
        }
        same(&p, &p2);
        same(&m, &m2);
        same(&v, &v2);
        arr_free(&g);
        arr_free(&s);
      }
}

/* ---- the reference against formulas ----------------------------------------------- */

/* What the reference computed in x is what the formula says, in double. */
static void near_all(const char *what, const exf_real *x, const double *want, size_t n) {
  double tolerance = sizeof(exf_real) == 8 ? 1e-11 : 2e-5;
  size_t bad = 0;
  for (size_t i = 0; i < n; i++)
    if (!(fabs((double)x[i] - want[i]) <= tolerance * (1 + fabs(want[i]))) && bad++ == 0)
      printf("  %s: number %zu of %zu is %.9g, not %.9g\n", what, i, n, (double)x[i],
             want[i]);
  CHECK(bad == 0);
}

enum { TRUTH_ROWS = 3, TRUTH_N = 37, TRUTH = TRUTH_ROWS * TRUTH_N };
static exf_real tx[TRUTH], tdy[TRUTH], tw[TRUTH_N], tb[TRUTH_N], ty[TRUTH], tdx[TRUTH];
static double want[TRUTH], want2[TRUTH];

static void truth_data(void) {
  for (size_t i = 0; i < TRUTH; i++) {
    tx[i] = (exf_real)exf_rng_normal(5, 1, 0, i);
    tdy[i] = (exf_real)exf_rng_normal(5, 2, 0, i);
    ty[i] = tdx[i] = (exf_real)exf_rng_normal(5, 5, 0, i);
  }
  for (size_t j = 0; j < TRUTH_N; j++) {
    tw[j] = (exf_real)exf_rng_normal(5, 3, 0, j);
    tb[j] = (exf_real)exf_rng_normal(5, 4, 0, j);
  }
}

/* f of an op; its slope comes from differences */
static double truth_f(int op, double x) {
  switch (op) {
    case EXF__U_EXP: return exp(x);
    case EXF__U_TANH: return tanh(x);
    case EXF__U_RELU: return x > 0 ? x : 0;
    case EXF__U_GELU: return x * 0.5 * (1 + erf(x / sqrt(2.0)));
    case EXF__U_GELU_TANH:
      return 0.5 * x * (1 + tanh(sqrt(2 / 3.14159265358979323846)
                                 * (x + 0.044715 * x * x * x)));
    default: return x / (1 + exp(-x));
  }
}

TEST(reference_unary_formulas) {
  for (int acc = 0; acc < 2; acc++)
    for (int op = EXF__U_EXP; op <= EXF__U_SILU; op++) {
      exf__elements e = {op, acc, 0, tx, NULL, tdy, ty, tdx};
      truth_data();
      for (size_t i = 0; i < TRUTH; i++) {
        double x = (double)tx[i], h = 1e-5;
        double slope = (truth_f(op, x + h) - truth_f(op, x - h)) / (2 * h);
        if (op == EXF__U_RELU) slope = x > 0;
        want[i] = truth_f(op, x);
        want2[i] = (acc ? (double)tdx[i] : 0) + (double)tdy[i] * slope;
      }
      R->unary_grad(&e, 0, TRUTH, NULL);
      near_all("unary", ty, want, TRUTH);
      for (size_t i = 0; i < TRUTH; i++)         /* as near as differences are */
        CHECK_NEAR((double)tdx[i], want2[i], 2e-5 * (1 + fabs(want2[i])));
    }
}

TEST(reference_elementwise_formulas) {
  for (int acc = 0; acc < 2; acc++) {
    exf__elements e = {0, acc, (exf_real)0.75, tx, tdy, NULL, ty, NULL};
    truth_data();
    for (size_t i = 0; i < TRUTH; i++) want[i] = (double)tx[i] + (double)tdy[i];
    R->add(&e, 0, TRUTH, NULL);
    near_all("add", ty, want, TRUTH);
    truth_data();
    for (size_t i = 0; i < TRUTH; i++)
      want[i] = (acc ? (double)ty[i] : 0) + (double)tx[i] * (double)tdy[i];
    R->mul(&e, 0, TRUTH, NULL);
    near_all("mul", ty, want, TRUTH);
    truth_data();
    for (size_t i = 0; i < TRUTH; i++)
      want[i] = (acc ? (double)ty[i] : 0) + 0.75 * (double)tx[i];
    R->axpy(&e, 0, TRUTH, NULL);
    near_all("axpy", ty, want, TRUTH);
  }
}

TEST(reference_softmax_formulas) {
  for (int acc = 0; acc < 2; acc++) {
    exf__rows r;
    double p[TRUTH];
    memset(&r, 0, sizeof r);
    truth_data();
    r.n = TRUTH_N;
    r.acc = acc;
    r.x = tx;
    r.dy = tdy;
    r.y = ty;
    r.dx = tdx;
    for (size_t i = 0; i < TRUTH; i += TRUTH_N) {
      double sum = 0, dot = 0, total = 0;
      for (size_t j = i; j < i + TRUTH_N; j++) sum += exp((double)tx[j]);
      for (size_t j = i; j < i + TRUTH_N; j++) {
        p[j] = exp((double)tx[j]) / sum;
        dot += p[j] * (double)tdy[j];
        total += (double)tdy[j];
      }
      for (size_t j = i; j < i + TRUTH_N; j++) {
        double old = acc ? (double)tdx[j] : 0;
        want[j] = old + p[j] * ((double)tdy[j] - dot);
        want2[j] = old + (double)tdy[j] - p[j] * total;
      }
    }
    R->softmax(&r, 0, TRUTH_ROWS, NULL);
    near_all("softmax", ty, p, TRUTH);
    R->softmax_grad(&r, 0, TRUTH_ROWS, NULL);
    near_all("softmax_grad", tdx, want, TRUTH);
    truth_data();
    for (size_t i = 0; i < TRUTH; i++) want[i] = log(p[i]);
    R->log_softmax(&r, 0, TRUTH_ROWS, NULL);
    near_all("log_softmax", ty, want, TRUTH);
    R->log_softmax_grad(&r, 0, TRUTH_ROWS, NULL);
    near_all("log_softmax_grad", tdx, want2, TRUTH);
  }
}

TEST(reference_cross_entropy_formulas) {
  static const int32_t labels[TRUTH_ROWS] = {TRUTH_N - 1, -1, 0};
  for (int acc = 0; acc < 2; acc++) {
    exf_real loss[TRUTH_ROWS], lse[TRUTH_ROWS];
    double want_loss[TRUTH_ROWS] = {0}, s = 0.2;
    exf__rows r;
    memset(&r, 0, sizeof r);
    truth_data();
    r.n = TRUTH_N;
    r.acc = acc;
    r.x = tx;
    r.dx = tdx;
    r.labels = labels;
    r.smoothing = (exf_real)s;
    r.g = (exf_real)0.5;
    r.loss = loss;
    r.lse = lse;
    for (size_t i = 0; i < TRUTH_ROWS; i++) {
      double sum = 0;
      for (size_t j = 0; j < TRUTH_N; j++) sum += exp((double)tx[i * TRUTH_N + j]);
      for (size_t j = 0; j < TRUTH_N; j++) {
        double x = (double)tx[i * TRUTH_N + j], old = (double)tdx[i * TRUTH_N + j];
        double q = s / TRUTH_N + ((int32_t)j == labels[i] ? 1 - s : 0);
        int counts = labels[i] >= 0;
        if (counts) want_loss[i] -= q * (x - log(sum));
        want[i * TRUTH_N + j] = (acc ? old : 0) + (counts ? 0.5 * (exp(x) / sum - q) : 0);
      }
    }
    R->cross_entropy(&r, 0, TRUTH_ROWS, NULL);
    near_all("cross_entropy", loss, want_loss, TRUTH_ROWS);
    R->cross_entropy_grad(&r, 0, TRUTH_ROWS, NULL);
    near_all("cross_entropy_grad", tdx, want, TRUTH);
  }
}

TEST(reference_norm_formulas) {
  for (int rms = 0; rms < 2; rms++)
    for (int acc = 0; acc < 2; acc++) {
      exf_real mean[TRUTH_ROWS] = {0}, rstd[TRUTH_ROWS], dw[TRUTH_N], db[TRUTH_N];
      exf_real sums[TRUTH_N];
      double want_w[TRUTH_N], want_b[TRUTH_N], want_sum[TRUTH_N];
      exf__norm r;
      exf__columns c = {TRUTH_ROWS, TRUTH_N, 0, NULL, NULL};
      memset(&r, 0, sizeof r);
      truth_data();
      r.rows = TRUTH_ROWS;
      r.n = TRUTH_N;
      r.rms = rms;
      r.eps = (exf_real)1e-5;
      r.x = tx;
      r.w = tw;
      r.b = acc ? tb : NULL;
      r.dy = tdy;
      r.y = ty;
      r.mean = mean;
      r.rstd = rstd;
      r.dx = tdx;
      r.dw = dw;
      r.db = db;
      r.acc = r.acc_w = r.acc_b = c.acc = acc;
      c.x = tx;
      c.y = sums;
      for (size_t j = 0; j < TRUTH_N; j++) {
        dw[j] = db[j] = sums[j] = tb[j];
        want_w[j] = want_b[j] = want_sum[j] = acc ? (double)tb[j] : 0;
      }
      for (size_t i = 0; i < TRUTH_ROWS; i++) {
        const exf_real *x = tx + i * TRUTH_N, *dy = tdy + i * TRUTH_N;
        double mu = 0, var = 0, g1 = 0, g2 = 0, z[TRUTH_N], g[TRUTH_N], rs;
        for (size_t j = 0; j < TRUTH_N; j++) mu += rms ? 0 : (double)x[j] / TRUTH_N;
        for (size_t j = 0; j < TRUTH_N; j++)
          var += ((double)x[j] - mu) * ((double)x[j] - mu) / TRUTH_N;
        rs = 1 / sqrt(var + 1e-5);
        for (size_t j = 0; j < TRUTH_N; j++) {
          z[j] = ((double)x[j] - mu) * rs;
          g[j] = (double)dy[j] * (double)tw[j];
          g1 += rms ? 0 : g[j] / TRUTH_N;
          g2 += g[j] * z[j] / TRUTH_N;
          want[i * TRUTH_N + j] = z[j] * (double)tw[j] + (acc ? (double)tb[j] : 0);
          want_w[j] += (double)dy[j] * z[j];
          want_b[j] += (double)dy[j];
          want_sum[j] += (double)x[j];
        }
        for (size_t j = 0; j < TRUTH_N; j++)
          want2[i * TRUTH_N + j] = (acc ? (double)tdx[i * TRUTH_N + j] : 0)
                                   + rs * (g[j] - g1 - z[j] * g2);
      }
      R->norm(&r, 0, TRUTH_ROWS, NULL);
      R->norm_grad(&r, 0, TRUTH_ROWS, NULL);
      R->norm_grad_w(&r, 0, TRUTH_N, NULL);
      R->column_sum(&c, 0, TRUTH_N, NULL);
      near_all("norm", ty, want, TRUTH);
      near_all("norm_grad", tdx, want2, TRUTH);
      near_all("norm_grad_w, dw", dw, want_w, TRUTH_N);
      near_all("norm_grad_w, db", db, want_b, TRUTH_N);
      near_all("column_sum", sums, want_sum, TRUTH_N);
    }
}

TEST(reference_product_formulas) {
  enum { M = 4, N = 5, DEPTH = 300 };
  for (int f = 0; f < 16; f++) {
    exf__gemm g = gemm_operands(M, N, DEPTH, f);
    arr a = arr_new(g.a_batch, 1), b = arr_new(g.b_batch, 1), bias = arr_new(N, 1);
    arr c = arr_new(g.c_batch, 1);
    g.a = a.x;
    g.b = b.x;
    g.c = c.x;
    g.bias = f & WITH_BIAS ? bias.x : NULL;
    for (size_t i = 0; i < M; i++)
      for (size_t j = 0; j < N; j++) {
        double s = f & ADDED ? (double)c.x[i * g.c_row + j] : 0;
        for (size_t p = 0; p < DEPTH; p++)
          s += (double)a.x[f & TRANSPOSED_A ? p * (M + 2) + i : i * (DEPTH + 3) + p]
               * (double)b.x[f & TRANSPOSED_B ? j * (DEPTH + 5) + p : p * (N + 1) + j];
        want[i * N + j] = s + (f & WITH_BIAS ? (double)bias.x[j] : 0);
      }
    R->gemm(&g, 0, M, NULL);
    for (size_t i = 0; i < M; i++)
      near_all("gemm", c.x + i * g.c_row, want + i * N, N);
    arr_free(&a); arr_free(&b); arr_free(&bias); arr_free(&c);
  }
}

/* One head; dq, dk, dv by the chain rule over a whole (T,T) matrix */
TEST(reference_attention_formulas) {
  enum { T = 33, D = 3, WIDTH = 2 * D, STRIDE = 3 * WIDTH };
  static double p[T][T], ds[T][T];
  for (int causal = 0; causal < 2; causal++) {
    exf__attention h = attention_operands(T, T, D, causal);
    arr x = arr_new(T * STRIDE, 1), dx = arr_new(T * STRIDE, 0);
    arr out = arr_new(T * WIDTH, 0), dout = arr_new(T * WIDTH, 1);
    arr stat = arr_new(2 * 2 * T, 0);
    double y[T][D], dqkv[3][T][D];
    const exf_real *q = x.x + D, *k = q + WIDTH, *v = k + WIDTH, *dy = dout.x + D;
    memset(dqkv, 0, sizeof dqkv);
    h.q = x.x;
    h.key = x.x + WIDTH;
    h.value = x.x + 2 * WIDTH;
    h.q_stride = h.kv_stride = STRIDE;
    h.out = out.x;
    h.stat = stat.x;
    h.dout = dout.x;
    h.dq = dx.x;
    h.dkey = dx.x + WIDTH;
    h.dvalue = dx.x + 2 * WIDTH;
    for (size_t i = 0; i < T; i++) {     /* the second head */
      size_t seen = causal ? i + 1 : T;
      double sum = 0, dot = 0;
      for (size_t j = 0; j < seen; j++) {
        double s = 0;
        for (size_t c = 0; c < D; c++)
          s += (double)q[i * STRIDE + c] * (double)k[j * STRIDE + c];
        sum += p[i][j] = exp(s / sqrt((double)D));
      }
      for (size_t c = 0; c < D; c++) {
        y[i][c] = 0;
        for (size_t j = 0; j < seen; j++)
          y[i][c] += p[i][j] / sum * (double)v[j * STRIDE + c];
        dot += (double)dy[i * WIDTH + c] * y[i][c];
      }
      for (size_t j = 0; j < seen; j++) {
        double dp = 0;
        p[i][j] /= sum;
        for (size_t c = 0; c < D; c++)
          dp += (double)dy[i * WIDTH + c] * (double)v[j * STRIDE + c];
        ds[i][j] = p[i][j] * (dp - dot) / sqrt((double)D);
        for (size_t c = 0; c < D; c++) {
          dqkv[0][i][c] += ds[i][j] * (double)k[j * STRIDE + c];
          dqkv[1][j][c] += ds[i][j] * (double)q[i * STRIDE + c];
          dqkv[2][j][c] += p[i][j] * (double)dy[i * WIDTH + c];
        }
      }
    }
    h.k = R;
    void *scratch = malloc(exf__attention_scratch(R, T));
    exf__attention_forward(&h, 1, 2, scratch);
    exf__attention_backward(&h, 1, 2, scratch);
    free(scratch);
    for (size_t i = 0; i < T; i++) {
      near_all("attention", out.x + i * WIDTH + D, y[i], D);
      for (size_t part = 0; part < 3; part++)
        near_all("attention_grad", dx.x + i * STRIDE + part * WIDTH + D,
                 dqkv[part][i], D);
    }
    arr_free(&x); arr_free(&out); arr_free(&dx); arr_free(&dout); arr_free(&stat);
  }
}

TEST(reference_expert_formulas) {
  enum { N = 3, SIZE = TRUTH_N, STRIDE = SIZE + 2 };
  for (int shared = 0; shared < 2; shared++) {
    exf__adam u = adam_operands(N, STRIDE);
    size_t sets = shared ? 1 : N;
    arr p = arr_new(N * STRIDE, 1), g = arr_new(SIZE, 1), s = arr_new(N, 1);
    arr m = arr_new(sets * STRIDE, 0.1), v = arr_new(sets * STRIDE, 0.01);
    arr fused = arr_new(SIZE, 0);
    double dots[N] = {0}, want_dots[N] = {0}, want_p[N][SIZE];
    exf__experts e = {N, SIZE, STRIDE, s.x, p.x, g.x, fused.x, dots};
    for (size_t i = 0; i < v.n; i++) v.x[i] = (exf_real)fabs((double)v.x[i]);
    for (size_t j = 0; j < SIZE; j++) {
      want[j] = 0;
      for (size_t i = 0; i < N; i++) {
        size_t at = i * STRIDE + j, mv = shared ? j : at;
        double a = (double)s.x[i], x = (double)p.x[at];
        double grad = 0.7 * (double)g.x[j] * (shared ? 1 : a);
        double m1 = 0.9 * (double)m.x[mv] + 0.1 * grad;
        double v1 = 0.99 * (double)v.x[mv] + 0.01 * grad * grad;
        double step = 0.01 * m1 / (sqrt(v1) * 3 + 1e-8);
        want[j] += a * x;
        want_dots[i] += (double)g.x[j] * x;
        want_p[i][j] = 0.999 * x - step * (shared ? a : 1);
      }
    }
    R->fuse(&e, 0, SIZE, NULL);
    R->dots(&e, 0, N, NULL);
    near_all("fuse", fused.x, want, SIZE);
    for (size_t i = 0; i < N; i++)
      CHECK_NEAR(dots[i], want_dots[i], sizeof(exf_real) == 8 ? 1e-12 : 1e-5);
    u.p = p.x;
    u.m = m.x;
    u.v = v.x;
    u.g = g.x;
    u.scale = s.x;
    (shared ? R->adamw_shared : R->adamw)(&u, 0, SIZE, NULL);
    for (size_t i = 0; i < N; i++) near_all("adamw", p.x + i * STRIDE, want_p[i], SIZE);
    arr_free(&p); arr_free(&g); arr_free(&s); arr_free(&m); arr_free(&v);
    arr_free(&fused);
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
  K = R;
  RUN(reference_unary_formulas);
  RUN(reference_elementwise_formulas);
  RUN(reference_softmax_formulas);
  RUN(reference_cross_entropy_formulas);
  RUN(reference_norm_formulas);
  RUN(reference_product_formulas);
  RUN(reference_attention_formulas);
  RUN(reference_expert_formulas);
  EACH(gemm_equals_reference);
  EACH(gemm_of_training_shapes);
  EACH(padded_gemm_keeps_to_its_columns);
  EACH(elementwise_equal_reference);
  EACH(softmax_equals_reference);
  EACH(norm_equals_reference);
  EACH(cross_entropy_equals_reference);
  EACH(attention_equals_reference);
  EACH(attention_work_space_does_not_overflow);
  EACH(expert_kernels_equal_reference);
  EACH(adamw_equals_reference);
  TEST_MAIN_END;
}
