/* tests/bench/products.h - matrix products, beside OpenBLAS's where this machine has it.
   Include after net.h. */
#ifndef BENCH_PRODUCTS_H
#define BENCH_PRODUCTS_H

#include <dlfcn.h>

typedef void sgemm_fn(int order, int ta, int tb, int m, int n, int k, float alpha,
                      const float *a, int lda, const float *b, int ldb, float beta,
                      float *c, int ldc);
static sgemm_fn *openblas;

/* Its name for the kernels it chose, or NULL */
static const char *openblas_core(void *lib) {
  char *(*core)(void);
  void *f = dlsym(lib, "openblas_get_corename");
  if (f == NULL) return NULL;
  memcpy(&core, &f, sizeof f);
  return core();
}

static void *openblas_load(void) {
  static const char *const names[] = {"libopenblas.so.0", "libopenblas.so",
                                      "libopenblas.dylib"};
  void *lib = NULL;
  size_t i;
  for (i = 0; i < 3 && !lib; i++) lib = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
  return lib;
}

static void openblas_open(void) {
  void (*set_threads)(int);
  void *lib = openblas_load(), *f;
  const char *core = lib ? openblas_core(lib) : NULL;
  limits l[4];
  if (core && strcmp(core, "Prescott") == 0 && limits_list(l) > 0
      && l[0].isa >= EXF_ISA_AVX2) {
    /* A processor younger than this OpenBLAS, which falls back to SSE: help it. */
    dlclose(lib);
    setenv("OPENBLAS_CORETYPE", l[0].isa == EXF_ISA_AVX2 ? "Haswell" : "SkylakeX", 0);
    lib = openblas_load();
    core = lib ? openblas_core(lib) : NULL;
  }
  if (lib && (f = dlsym(lib, "openblas_set_num_threads")) != NULL) {
    memcpy(&set_threads, &f, sizeof f);
    set_threads(bench.threads);
    f = dlsym(lib, "cblas_sgemm");
    memcpy(&openblas, &f, sizeof f);
  }
  if (!openblas) printf("OpenBLAS   not found: no column for it\n");
  else if (core) printf("OpenBLAS   kernels for %s\n", core);
}

typedef struct product {
  const char *role;
  size_t batch, m, n, k;
  int flags;               /* EXF_TRANSPOSE_A, _B */
  exf_ctx *ctx;
  exf_model *model;
  exf_tensor *a, *b;       /* (batch,m,k), (batch,k,n), transposed where flags say so */
  exf_real *c;             /* OpenBLAS's result (batch,m,n) */
} product;

static double product_flops(const product *p) {
  return 2 * (double)(p->batch * p->m) * (double)p->n * (double)p->k;
}

static void product_ours(void *arg) {
  product *p = (product *)arg;
  exf_matmul(p->ctx, p->a, p->b, p->flags);
  exf_rewind(p->ctx);
}

static void product_theirs(void *arg) {
  product *p = (product *)arg;
  const size_t m = p->m, n = p->n, k = p->k;
  int ta = p->flags & EXF_TRANSPOSE_A, tb = p->flags & EXF_TRANSPOSE_B;
  for (size_t i = 0; i < p->batch; i++)
    openblas(101, ta ? 112 : 111, tb ? 112 : 111, (int)m, (int)n, (int)k, 1,
             (float *)p->a->data + i * m * k, (int)(ta ? m : k),
             (float *)p->b->data + i * k * n, (int)(tb ? k : n), 0,
             (float *)p->c + i * m * n, (int)n);
}

/* Both give the same numbers, or nothing is worth comparing. */
static void product_check(product *p) {
  exf_tensor *y = exf_matmul(p->ctx, p->a, p->b, p->flags);
  double worst = 0;
  size_t i;
  must(p->ctx);
  product_theirs(p);
  for (i = 0; i < y->size; i++)
    worst = EXF__MAX(worst, fabs((double)y->data[i] - (double)p->c[i]));
  exf_rewind(p->ctx);
  if (worst < 1e-3 * sqrt((double)p->k)) return;
  fprintf(stderr, "bench: %s differs from OpenBLAS by %g\n", p->role, worst);
  exit(1);
}

static void product_new(product *p) {
  exf_param_desc d;
  int ta = p->flags & EXF_TRANSPOSE_A, tb = p->flags & EXF_TRANSPOSE_B;
  memset(&d, 0, sizeof d);
  d.init_std = 1;
  p->ctx = new_context();
  exf_grad_set(p->ctx, 0);
  p->model = exf_model_new(p->ctx);
  d.shape = exf_shape3(p->batch, ta ? p->k : p->m, ta ? p->m : p->k);
  p->a = exf_param_new(p->model, "a", &d);
  d.shape = exf_shape3(p->batch, tb ? p->n : p->k, tb ? p->k : p->n);
  p->b = exf_param_new(p->model, "b", &d);
  p->c = (exf_real *)room(p->batch * p->m * p->n, sizeof(exf_real));
  must(p->ctx);
  if (openblas) product_check(p);
}

static void product_free(product *p) {
  exf_model_free(p->model);
  exf_ctx_free(p->ctx);
  free(p->c);
}

/* Prints GFLOP/s per instruction set and OpenBLAS's, which alternates with the best one.
   Returns the ratio to OpenBLAS, or NAN. */
static double product_time(product *p, const limits *l, int n_isas) {
  samples ours = {0, {0}}, theirs = {0, {0}}, ratio = {0, {0}};
  double flops = 1e-9 * product_flops(p), rate;
  char what[96];
  task t, u;
  int i;
  product_new(p);
  snprintf(what, sizeof what, "%s %ux(%u %u %u)", p->role, (unsigned)p->batch,
           (unsigned)p->m, (unsigned)p->n, (unsigned)p->k);
  printf("%-9s %4u x (%4u,%4u,%4u)", p->role, (unsigned)p->batch, (unsigned)p->m,
         (unsigned)p->n, (unsigned)p->k);
  t = task_new(product_ours, p, 3e-3);
  u = openblas ? task_new(product_theirs, p, 3e-3) : t;
  for (i = 0; i < 2 * bench.rounds + 1; i++) {
    sample_add(&ours, task_sample(&t));
    if (!openblas) continue;
    sample_add(&theirs, task_sample(&u));
    sample_add(&ratio, theirs.at[i] / ours.at[i]);
  }
  for (i = 0; i < n_isas; i++) {
    p->ctx->k = exf__kernels_for(l[i].isa);
    rate = flops / (i == 0 ? median(&ours) : task_median(product_ours, p, 1e-3));
    record("gemm", what, exf_isa_name(l[i].isa), rate);
    printf(" %8.1f", rate);
  }
  if (openblas) {
    record("gemm", what, "openblas", flops / median(&theirs));
    record("gemm", what, "ratio", median(&ratio));
    printf(" %8.1f %6.2f x", flops / median(&theirs), median(&ratio));
  }
  printf("\n");
  fflush(stdout);
  product_free(p);
  return median(&ratio);
}

/* The six roles of training at width c and `rows` rows, or the three of its attention. */
static int product_list(product *p, size_t c, size_t rows) {
  size_t d = c == 128 ? 32 : 64, block = c <= 256 ? 64 : 256, h = 4 * c;
  size_t heads = rows / block * (c / d);
  const product all[] = {
    {"forward", 1, rows, h, c, EXF_TRANSPOSE_B, NULL, NULL, NULL, NULL, NULL},
    {"dx", 1, rows, c, h, 0, NULL, NULL, NULL, NULL, NULL},
    {"dw", 1, h, c, rows, EXF_TRANSPOSE_A, NULL, NULL, NULL, NULL, NULL},
    {"Q K^T", heads, block, block, d, EXF_TRANSPOSE_B, NULL, NULL, NULL, NULL, NULL},
    {"P V", heads, block, d, block, 0, NULL, NULL, NULL, NULL, NULL},
    {"head", 1, rows, 65, c, EXF_TRANSPOSE_B, NULL, NULL, NULL, NULL, NULL}};
  memcpy(p, all, sizeof all);
  return 6;
}

static void bench_gemm(void) {
  static const size_t widths[] = {128, 256, 384, 768}, rows[] = {768, 2048};
  product cube = {"cube", 1, 1024, 1024, 1024, 0, NULL, NULL, NULL, NULL, NULL};
  limits l[4];
  int n_isas = limits_list(l), n = 0, k, count;
  size_t i, j;
  double logs = 0, worst = 1e9, ratio;
  product p[6];
  printf("\ngemm       GFLOP/s; batch x (m,n,k)    ");
  for (k = 0; k < n_isas; k++) printf(" %8s", exf_isa_name(l[k].isa));
  printf(openblas ? " OpenBLAS  ours / OpenBLAS\n" : "\n");
  for (j = 0; j < 2; j++)
    for (i = 0; i < 4; i++) {
      printf("width %u, %u rows\n", (unsigned)widths[i], (unsigned)rows[j]);
      count = product_list(p, widths[i], rows[j]);
      for (k = 0; k < count; k++) {
        ratio = product_time(&p[k], l, j == 0 ? n_isas : 1);
        if (!(ratio == ratio)) continue;
        logs += log(ratio);
        worst = EXF__MIN(worst, ratio);
        n++;
      }
    }
  ratio = product_time(&cube, l, n_isas);
  if (!n) return;
  n++;
  logs += log(ratio);
  worst = EXF__MIN(worst, ratio);
  printf("ours / OpenBLAS: geometric mean %.2f, least %.2f, over %d shapes\n",
         exp(logs / n), worst, n);
  record("gemm", "all", "geometric mean", exp(logs / n));
  record("gemm", "all", "least", worst);
}

#endif /* BENCH_PRODUCTS_H */
