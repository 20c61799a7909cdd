/* bench.c - how fast the library is on this machine, and what the machine could do.

     build/bench [--threads N] [--isa NAME] [--rounds N] [--wall] [PART ...]
   parts: machine gemm ops step phases generate growth memory limit; none: all of them
     build/bench run NAME [VARIANT N]
   one line for one step in a process of its own: charlm, charlm8192, gpt384 or vit, or
   generate; VARIANT sw, dw or mb with N experts.

   Prints tables and writes build/bench.csv (table,case,measure,value). Times are medians
   of several rounds; what is compared alternates in one process, and ratios are medians
   over the rounds. One thread unless told otherwise. */
#define _POSIX_C_SOURCE 200809L
#define EXFUSION_IMPLEMENTATION
#include "../../exfusion.h"

#include <dlfcn.h>

#include "clock.h"
#include "net.h"

/* ---- OpenBLAS, where this machine has it ------------------------------------------ */

typedef void sgemm_fn(int order, int ta, int tb, int m, int n, int k, float alpha,
                      const float *a, int lda, const float *b, int ldb, float beta,
                      float *c, int ldc);
static sgemm_fn *openblas;

static void openblas_open(void) {
  static const char *const names[] = {"libopenblas.so.0", "libopenblas.so",
                                      "libopenblas.dylib"};
  void (*set_threads)(int);
  char *(*core)(void);
  void *lib = NULL, *f;
  size_t i;
  for (i = 0; i < 3 && !lib; i++) lib = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
  if (lib && (f = dlsym(lib, "openblas_set_num_threads")) != NULL) {
    memcpy(&set_threads, &f, sizeof f);
    set_threads(bench.threads);
    f = dlsym(lib, "cblas_sgemm");
    memcpy(&openblas, &f, sizeof f);
  }
  if (openblas && (f = dlsym(lib, "openblas_get_corename")) != NULL) {
    memcpy(&core, &f, sizeof f);
    printf("OpenBLAS   kernels for %s\n", core());
  } else if (!openblas) printf("OpenBLAS   not found: no column for it\n");
}

/* ---- matrix products -------------------------------------------------------------- */

typedef struct product {
  const char *role;
  size_t batch, m, n, k;
  int ta, tb;
  exf_ctx *ctx;
  exf_model *model;
  exf_tensor *a, *b;       /* (batch,m,k), (batch,k,n), transposed where ta, tb say so */
  exf_real *c;             /* OpenBLAS's result (batch,m,n) */
} product;

static double product_flops(const product *p) {
  return 2 * (double)(p->batch * p->m) * (double)p->n * (double)p->k;
}

static void product_ours(void *arg) {
  product *p = (product *)arg;
  exf_matmul(p->ctx, p->a, p->b, p->ta, p->tb);
  exf_rewind(p->ctx);
}

static void product_theirs(void *arg) {
  product *p = (product *)arg;
  const size_t m = p->m, n = p->n, k = p->k;
  size_t i;
  for (i = 0; i < p->batch; i++)
    openblas(101, p->ta ? 112 : 111, p->tb ? 112 : 111, (int)m, (int)n, (int)k, 1,
             (float *)p->a->data + i * m * k, (int)(p->ta ? m : k),
             (float *)p->b->data + i * k * n, (int)(p->tb ? k : n), 0,
             (float *)p->c + i * m * n, (int)n);
}

/* Both give the same numbers, or nothing is worth comparing. */
static void product_check(product *p) {
  exf_tensor *y = exf_matmul(p->ctx, p->a, p->b, p->ta, p->tb);
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
  memset(&d, 0, sizeof d);
  d.init_std = 1;
  p->ctx = new_context();
  exf_grad_set(p->ctx, 0);
  p->model = exf_model_new(p->ctx);
  d.shape = exf_shape3(p->batch, p->ta ? p->k : p->m, p->ta ? p->m : p->k);
  p->a = exf_param_new(p->model, "a", &d);
  d.shape = exf_shape3(p->batch, p->tb ? p->n : p->k, p->tb ? p->k : p->n);
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
    exf_isa_set(p->ctx, l[i].isa);
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
    {"forward", 1, rows, h, c, 0, 1, NULL, NULL, NULL, NULL, NULL},
    {"dx", 1, rows, c, h, 0, 0, NULL, NULL, NULL, NULL, NULL},
    {"dw", 1, h, c, rows, 1, 0, NULL, NULL, NULL, NULL, NULL},
    {"Q K^T", heads, block, block, d, 0, 1, NULL, NULL, NULL, NULL, NULL},
    {"P V", heads, block, d, block, 0, 0, NULL, NULL, NULL, NULL, NULL},
    {"head", 1, rows, 65, c, 0, 1, NULL, NULL, NULL, NULL, NULL}};
  memcpy(p, all, sizeof all);
  return 6;
}

static void bench_gemm(void) {
  static const size_t widths[] = {128, 256, 384, 768}, rows[] = {768, 2048};
  product cube = {"cube", 1, 1024, 1024, 1024, 0, 0, NULL, NULL, NULL, NULL, NULL};
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

/* ---- steps ------------------------------------------------------------------------ */

/* Alternates a and b, `rounds` times: one step to refill the caches, then `per` timed
   ones. Milliseconds of both and the ratio of b to a. */
static void net_pair(net *a, net *b, int rounds, int per, double *ms) {
  samples all[2] = {{0, {0}}, {0, {0}}}, ratio = {0, {0}};
  int r, i, k;
  for (r = 0; r < rounds; r++) {
    double m[2];
    for (k = 0; k < 2; k++) {
      net *g = k ? b : a;
      samples s = {0, {0}};
      net_step(g, NULL);
      for (i = 0; i < per; i++) {
        double t = net_step(g, NULL);
        sample_add(&s, t);
        sample_add(&all[k], t);
      }
      m[k] = median(&s);
    }
    sample_add(&ratio, m[1] / m[0]);
  }
  ms[0] = 1e3 * median(&all[0]);
  ms[1] = 1e3 * median(&all[1]);
  ms[2] = median(&ratio);
}

static void bench_step(void) {
  static const exf_variant variants[] = {EXF_SW, EXF_DW, EXF_MB};
  static const size_t experts[] = {2, 4, 8};
  int k;
  size_t v, e;
  printf("\nstep       ms; ratio to a dense step alternating with it\n");
  for (k = 0; k < N_NETS; k++) {
    net_desc d = nets[k];
    net *dense = net_new(&d), *g;
    double first = net_step(dense, NULL), ms[3] = {0, 0, 0};
    int per = first > 0.2 ? 1 : 3, rounds = first > 0.5 ? 3 : bench.rounds;
    int whole = k == CHARLM || k == VIT;
    char what[64];
    for (v = 0; v < 3; v++)
      for (e = 0; e < 3; e++) {
        if (!whole && experts[e] != 4 && !(k == CHARLM8192 && variants[v] == EXF_MB))
          continue;
        d.fusion = fusion_of(variants[v], experts[e]);
        g = net_new(&d);
        net_pair(dense, g, rounds, per, ms);
        net_free(g);
        printf("%-11s %5u tokens  dense %8.2f   %s %u %8.2f   %.3f x\n", d.name,
               (unsigned)net_tokens(&d), ms[0], exf_variant_name(variants[v]),
               (unsigned)experts[e], ms[1], ms[2]);
        fflush(stdout);
        snprintf(what, sizeof what, "%s %s %u", d.name, exf_variant_name(variants[v]),
                 (unsigned)experts[e]);
        record("step", what, "dense_ms", ms[0]);
        record("step", what, "ms", ms[1]);
        record("step", what, "ratio", ms[2]);
      }
    net_free(dense);
  }
}

/* ---- phases of a step ------------------------------------------------------------- */

enum {
  P_EMBED, P_NORM, P_ATT_LINEAR, P_ATT, P_FFN, P_ACT, P_RESIDUAL, P_ROUTER, P_FUSE,
  P_HEAD, P_LOSS, P_CLIP, P_OPTIM, N_PHASES
};
static const char *const phase_names[N_PHASES] = {
  "embedding", "layernorm", "attention's linears", "attention", "FFN's linears",
  "activation", "residual", "router", "fuse | dots", "head", "cross-entropy",
  "gradient norm", "optimizer"
};

static int phase_of(const exf__node *n) {
  const char *op = exf__op_name(n->op);
  const exf_tensor *w = n->n_in > 1 ? n->in[1] : NULL;
  const char *name = w && w->param ? w->param->name : "";
  if (strcmp(op, "fuse") == 0) return P_FUSE;
  if (strcmp(op, "attention") == 0) return P_ATT;
  if (strcmp(op, "cross_entropy") == 0) return P_LOSS;
  if (strcmp(op, "embedding") == 0) return P_EMBED;
  if (strcmp(op, "layernorm") == 0) return P_NORM;
  if (strstr(op, "gelu")) return P_ACT;
  if (strstr(name, "router") || n->out->size < 64 || strcmp(op, "mean") == 0)
    return P_ROUTER;
  if (strcmp(op, "linear") == 0) {
    if (strstr(name, "attn")) return P_ATT_LINEAR;
    if (strstr(name, "patch")) return P_EMBED;
    return strstr(name, "mlp") || !*name ? P_FFN : P_HEAD;
  }
  if (strcmp(op, "add") == 0 && !*name && w->size == n->in[0]->size) return P_RESIDUAL;
  return P_EMBED;
}

/* Multiply-adds of a node's matrix products, twice; of causal attention only the half
   that is needed. */
static double node_flops(const exf__node *n) {
  const exf_shape *s = &n->in[0]->shape;
  double size = (double)n->out->size;
  if (strcmp(exf__op_name(n->op), "linear") == 0)
    return 2 * size * (double)s->dim[s->n - 1];
  if (strcmp(exf__op_name(n->op), "attention") == 0)   /* qkv (B,T,3C) */
    return 4 * size * (double)s->dim[1] * (n->arg.i ? 0.5 : 1);
  return 0;
}

/* Bytes a node must touch: forward inputs and output, backward the same and gradients. */
static double node_bytes(const exf__node *n, int backward) {
  double in = 0, out = (double)n->out->size;
  int i;
  for (i = 0; i < n->n_in; i++) in += (double)n->in[i]->size;
  if (phase_of(n) == P_FUSE) return sizeof(exf_real) * (in + (backward ? 3 : 1) * out);
  return sizeof(exf_real) * (backward ? 2 * in + out : in + out);
}

typedef struct phase {
  double t[2], flops[2], bytes[2];     /* forward, backward */
} phase;

static void phase_add(phase *p, const exf__node *n, int backward, double t) {
  phase *q = &p[phase_of(n)];
  q->t[backward] += t;
  q->flops[backward] += node_flops(n) * (backward ? 2 : 1);
  q->bytes[backward] += node_bytes(n, backward);
}

/* Forward: the tape's ops once more, in order, each timed. */
static void phase_forward(exf_ctx *ctx, phase *p) {
  exf__node **list, *n;
  size_t count = 0, i;
  for (n = ctx->tape; n; n = n->prev) count++;
  list = (exf__node **)room(count, sizeof *list);
  for (i = count, n = ctx->tape; n; n = n->prev) list[--i] = n;
  for (i = 0; i < count; i++) {
    double start = now();
    exf__op(list[i]->op)->forward(ctx, list[i]);
    phase_add(p, list[i], 0, now() - start);
  }
  free(list);
}

/* As exf_backward walks the tape, each op timed. */
static void phase_backward(exf_ctx *ctx, exf_tensor *loss, phase *p) {
  exf__node *n;
  int acc;
  exf__grad(ctx, loss, &acc)[0] = 1;
  for (n = ctx->tape; n; n = n->prev) {
    double start = now();
    if (!n->out->gbuf) continue;
    exf__op(n->op)->backward(ctx, n);
    phase_add(p, n, 1, now() - start);
    exf__gbuf_drop(ctx, n->out);
  }
  ctx->tape = NULL;
}

static void phase_optim(net *g, phase *p) {
  double start = now(), square = 0;
  size_t i, j, k;
  for (i = 0; i < exf_model_n_params(g->model); i++) {
    const exf_param *q = exf_model_param(g->model, i);
    k = q->t.size / (q->role == EXF__EXPERTS ? q->t.shape.dim[0] : 1);
    if (q->t.grad) square += g->ctx->k->sumsq(k, q->t.grad);
    p[P_CLIP].bytes[0] += sizeof(exf_real) * (double)k;
    j = q->t.size;
    p[P_OPTIM].bytes[0] += sizeof(exf_real) * (double)(6 * j + k);
  }
  kept = (float)square;
  p[P_CLIP].t[0] += now() - start;
  start = now();
  exf_optim_step(g->optim, 1e-3, NULL);
  p[P_OPTIM].t[0] += now() - start - p[P_CLIP].t[0];
  exf_rewind(g->ctx);
}

static void phase_step(net *g, phase *p) {
  exf_tensor *loss;
  exf_step_begin(g->ctx, g->step++);
  exf_training_set(g->ctx, 1);
  loss = net_loss(g);
  must(g->ctx);
  phase_forward(g->ctx, p);
  phase_backward(g->ctx, loss, p);
  phase_optim(g, p);
  exf_training_set(g->ctx, 0);
}

static void phase_print(const char *what, const phase *p, const samples (*t)[2],
                        double step, double peak) {
  double sum = 0;
  const double *unit;
  char name[96];
  int i;
  printf("\nphases     %s: %.2f ms a step; registers made %.1f GFLOP/s between steps\n",
         what, 1e3 * step, peak);
  printf("%-20s%9s %9s %7s %15s %13s\n", "", "forward", "backward", "share", "GFLOP/s",
         "GB/s");
  for (i = 0; i < N_PHASES; i++) {
    double f = median(&t[i][0]), b = median(&t[i][1]);
    int gemm = p[i].flops[0] > 0 && i != P_EMBED && i != P_ROUTER;
    if (f + b == 0) continue;
    sum += f + b;
    printf("%-20s%9.3f %9.3f %6.1f%%", phase_names[i], 1e3 * f, 1e3 * b,
           100 * (f + b) / step);
    unit = gemm ? p[i].flops : p[i].bytes;
    printf("%*s %6.1f", gemm ? 1 : 17, "", 1e-9 * unit[0] / f);
    if (b > 0) printf(" %6.1f", 1e-9 * unit[1] / b);
    printf("\n");
    snprintf(name, sizeof name, "%s %s", what, phase_names[i]);
    record("phases", name, "forward_ms", 1e3 * f);
    record("phases", name, "backward_ms", 1e3 * b);
  }
  printf("%-20s%9.3f %9s %6.1f%%\n", "the rest", 1e3 * (step - sum), "",
         100 * (step - sum) / step);
}

/* Every phase of one step in its place; the median over rounds. */
static void phases_of(net_desc d, exf_fusion_desc fusion) {
  static samples t[N_PHASES][2];
  samples whole = {0, {0}}, peak = {0, {0}};
  char what[64];
  limits l[4];
  phase p[N_PHASES];
  net *g;
  int r, i, rounds, n_isas = limits_list(l);
  d.fusion = fusion;
  g = net_new(&d);
  rounds = net_step(g, NULL) > 0.3 ? 3 : 2 * bench.rounds + 1;
  memset(t, 0, sizeof t);
  for (r = 0; r < rounds; r++) {
    net_step(g, NULL);
    sample_add(&whole, net_step(g, NULL));
    memset(p, 0, sizeof p);
    phase_step(g, p);
    sample_add(&peak, n_isas ? limit_flops(&l[0]) : NAN);
    for (i = 0; i < 2 * N_PHASES; i++) sample_add(&t[i / 2][i % 2], p[i / 2].t[i % 2]);
  }
  snprintf(what, sizeof what, "%s %s %u", d.name, exf_variant_name(fusion.variant),
           (unsigned)fusion.n_experts);
  phase_print(what, p, (const samples (*)[2])t, median(&whole),
              median(&peak));
  net_free(g);
}

static void bench_phases(void) {
  phases_of(nets[CHARLM], fusion_of(EXF_DENSE, 1));
  phases_of(nets[CHARLM], fusion_of(EXF_MB, 4));
  phases_of(nets[CHARLM8192], fusion_of(EXF_DENSE, 1));
  phases_of(nets[GPT384], fusion_of(EXF_DENSE, 1));
  phases_of(nets[VIT], fusion_of(EXF_DENSE, 1));
}

/* ---- how far a step is from its matrix products ------------------------------------ */

static void bench_limit(void) {
  product cube = {"cube", 1, 1024, 1024, 1024, 0, 0, NULL, NULL, NULL, NULL, NULL};
  task cubes;
  int k, i;
  product_new(&cube);
  cubes = task_new(openblas ? product_theirs : product_ours, &cube, 0.1);
  printf("\nlimit      step / time of its matrix products at %s 1024-cubed rate\n",
         openblas ? "OpenBLAS's" : "our (no OpenBLAS)");
  for (k = 0; k < N_NETS; k++) {
    samples step = {0, {0}}, rate = {0, {0}}, ratio = {0, {0}};
    net *g = net_new(&nets[k]);
    net_step(g, NULL);
    for (i = 0; i < (k == GPT384 ? 3 : 2 * bench.rounds + 1); i++) {
      double t = task_sample(&cubes);
      net_step(g, NULL);
      sample_add(&step, net_step(g, NULL));
      t = (t + task_sample(&cubes)) / 2;
      sample_add(&rate, 1e-9 * product_flops(&cube) / t);
      sample_add(&ratio, step.at[i] / t * product_flops(&cube) / net_flops(&g->d));
    }
    printf("%-11s %8.2f ms  %7.2f GFLOP at %.1f GFLOP/s: %.2f x\n", g->d.name,
           1e3 * median(&step), 1e-9 * net_flops(&g->d), median(&rate), median(&ratio));
    record("limit", g->d.name, "ratio", median(&ratio));
    net_free(g);
  }
  product_free(&cube);
}

/* ---- main ------------------------------------------------------------------------- */

static const struct {
  const char *name;
  void (*run)(void);
} parts[] = {{"machine", NULL}, {"gemm", bench_gemm}, {"step", bench_step},
             {"phases", bench_phases}, {"limit", bench_limit}};
enum { N_PARTS = sizeof parts / sizeof *parts };

static int usage(const char *bad) {
  int i;
  fprintf(stderr, "bench: %s is no part; the parts are", bad);
  for (i = 0; i < N_PARTS; i++) fprintf(stderr, " %s", parts[i].name);
  fprintf(stderr, "\n");
  return 2;
}

static exf_isa isa_named(const char *name) {
  int i;
  for (i = EXF_ISA_AUTO; i <= EXF_ISA_NEON; i++)
    if (strcmp(name, exf_isa_name((exf_isa)i)) == 0) return (exf_isa)i;
  fprintf(stderr, "bench: --isa %s: auto, ref, sse2, avx2, avx512 or neon\n", name);
  exit(2);
}

int main(int argc, char **argv) {
  int i, k, wanted[N_PARTS] = {0}, any = 0;
  for (i = 1; i < argc; i++) {
    const char *value = i + 1 < argc ? argv[i + 1] : "";
    if (strcmp(argv[i], "--threads") == 0) bench.threads = atoi(value), i++;
    else if (strcmp(argv[i], "--rounds") == 0) bench.rounds = atoi(value), i++;
    else if (strcmp(argv[i], "--isa") == 0) bench.isa = isa_named(value), i++;
    else if (strcmp(argv[i], "--wall") == 0) bench.wall = 1;
    else {
      for (k = 0; k < N_PARTS && strcmp(argv[i], parts[k].name) != 0; k++) continue;
      if (k == N_PARTS) return usage(argv[i]);
      wanted[k] = any = 1;
    }
  }
  bench.csv = fopen("build/bench.csv", "w");
  if (bench.csv) fprintf(bench.csv, "table,case,measure,value\n");
  print_machine();
  openblas_open();
  for (k = 1; k < N_PARTS; k++)
    if (wanted[k] || !any) parts[k].run();
  if (bench.csv) fclose(bench.csv);
  return 0;
}
