/* bench.c - how fast the library is on this machine, and what the machine could do.

     build/bench [--threads N] [--isa NAME] [--rounds N] [--wall] [PART ...]
   parts: machine gemm ops step limit phases generate growth memory; none: all
     build/bench [...] run NAME [VARIANT N]
   one line for one step in a process of its own: charlm, charlm8192, gpt384 or vit, or
   generate; VARIANT sw, dw or mb with N experts.

   Prints tables and writes build/bench.csv (table,case,measure,value). Times are medians
   of several rounds; what is compared alternates in one process, and ratios are medians
   over the rounds. One thread unless told otherwise. */
#define _POSIX_C_SOURCE 200809L
#define EXFUSION_IMPLEMENTATION
#include "../../exfusion.h"

#include "clock.h"
#include "net.h"
#include "products.h"
#include "phases.h"
#include "ops.h"

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
    int per = first > 0.1 ? 1 : 3, rounds = first > 0.5 ? 3 : bench.rounds;
    int whole = k == CHARLM || k == VIT;
    char what[64];
    for (v = 0; v < 3; v++)
      for (e = 0; e < 3; e++) {
        if (!whole && experts[e] != 4 && !(k == CHARLM8192 && variants[v] == EXF_MB))
          continue;
        if (k == GPT384 && variants[v] != EXF_MB) continue;
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

/* ---- how far a step is from its matrix products ------------------------------------ */

static void bench_limit(void) {
  product cube = {"cube", 1, 1024, 1024, 1024, 0, NULL, NULL, NULL, NULL, NULL};
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

/* ---- generation ------------------------------------------------------------------- */

/* t new tokens behind those in kv -> logits (1,1,V) of the last */
static exf_tensor *generate_next(net *g, const int32_t *ids, size_t t, exf_kv *kv) {
  exf_ctx *ctx = g->ctx;
  size_t i, at = exf_kv_length(kv);
  exf_tensor *x = exf_embedding(ctx, g->wte, ids, 1, t);
  x = exf_add(ctx, x, exf_slice(ctx, g->wpe, 0, at, at + t));
  for (i = 0; i < g->d.layers; i++) x = exf_block_forward(ctx, g->block[i], x, kv);
  x = exf_norm_forward(ctx, g->ln_f, exf_slice(ctx, x, 1, t - 1, t));
  return exf_linear(ctx, x, g->wte, NULL);
}

/* A draw from softmax(logits). */
static int32_t generate_draw(exf_ctx *ctx, exf_tensor *logits, uint64_t index) {
  exf_tensor *p = exf_softmax(ctx, logits);
  double u = exf_rng_uniform(1, 5, 0, index);
  size_t i;
  must(ctx);
  for (i = 0; i + 1 < p->size && u >= (double)p->data[i]; i++) u -= (double)p->data[i];
  return (int32_t)i;
}

/* Tokens a second of n tokens. When the context is full its last `kept_half` tokens are
   kept and the cache is filled anew; 0: it starts from one token. */
static double generate_rate(net *g, size_t n, size_t kept_half) {
  size_t block = g->d.block, have = 1, done = 0, i;
  int32_t *ids = (int32_t *)room(block + 1, sizeof *ids);
  exf_kv *kv = exf_kv_new(g->ctx, g->d.layers, block, g->d.width);
  double start = now();
  exf_grad_set(g->ctx, 0);
  for (i = 0; i < n; i++) {
    exf_tensor *logits = generate_next(g, ids + done, have - done, kv);
    int32_t next = generate_draw(g->ctx, logits, i);
    exf_rewind(g->ctx);
    done = have;
    if (have == block) {
      memmove(ids, ids + block - kept_half, kept_half * sizeof *ids);
      exf_kv_reset(kv);
      have = kept_half;
      done = 0;
    }
    ids[have++] = next;
  }
  exf_grad_set(g->ctx, 1);
  exf_kv_free(kv);
  free(ids);
  return (double)n / (now() - start);
}

/* Bytes of weights a token reads: all but the positions; the head is the embedding. */
static size_t generate_bytes(const net *g) {
  return (exf_model_count(g->model) - g->wpe->size) * sizeof(exf_real);
}

static void bench_generate(void) {
  static const int which[] = {CHARLM, GPT384};
  limits l[4];
  int n_isas = limits_list(l), i, r;
  printf("\ngenerate   tokens a second; share of what reading the weights once allows\n");
  for (i = 0; i < 2; i++) {
    net *g = net_new(&nets[which[i]]);
    samples rate = {0, {0}}, read = {0, {0}}, halves = {0, {0}};
    size_t bytes = generate_bytes(g), n = i ? 256 : 1024;
    double far;
    generate_rate(g, n / 4, 0);
    for (r = 0; r < bench.rounds; r++) {
      sample_add(&rate, generate_rate(g, n, 0));
      sample_add(&halves, generate_rate(g, n, g->d.block / 2 - 1));
      sample_add(&read, n_isas ? limit_read(&l[0], bytes) : NAN);
    }
    far = median(&rate) * (double)bytes / (1e9 * bench.memory);
    printf("%-11s %8.0f (%8.0f with refilled contexts)   %.1f MB, read at %.1f GB/s: "
           "%.0f %%; at %.1f GB/s: %.0f %%\n", g->d.name, median(&rate), median(&halves),
           1e-6 * (double)bytes, median(&read),
           1e-7 * median(&rate) * (double)bytes / median(&read), bench.memory, 100 * far);
    record("generate", g->d.name, "tokens_per_s", median(&rate));
    record("generate", g->d.name, "tokens_per_s_refilled", median(&halves));
    record("generate", g->d.name, "share_of_read_of_its_size", 1e-9 * median(&rate)
           * (double)bytes / median(&read));
    record("generate", g->d.name, "share_of_read_of_256_mb", far);
    net_free(g);
  }
}

/* ---- growth ----------------------------------------------------------------------- */

#define MAX_GROWTH 8

/* The line a + b x with the least relative squares; returns the largest |y/line - 1|. */
static double fit_line(int n, const double *x, const double *y, double *a, double *b) {
  double s = 0, sx = 0, sxx = 0, sy = 0, sxy = 0, worst = 0;
  int i;
  for (i = 0; i < n; i++) {
    double w = 1 / (y[i] * y[i]);
    s += w;
    sx += w * x[i];
    sxx += w * x[i] * x[i];
    sy += w * y[i];
    sxy += w * x[i] * y[i];
  }
  *b = (s * sxy - sx * sy) / (s * sxx - sx * sx);
  *a = (sy - *b * sx) / s;
  for (i = 0; i < n; i++) worst = EXF__MAX(worst, fabs(y[i] / (*a + *b * x[i]) - 1));
  return worst;
}

/* All nets in turn, round after round. */
static void growth_of(const char *what, const net_desc *d, const double *x, int n,
                      int fit) {
  samples s[MAX_GROWTH];
  net *g[MAX_GROWTH];
  double y[MAX_GROWTH], a, b, worst;
  char name[64];
  int i, r, k;
  memset(s, 0, sizeof s);
  for (i = 0; i < n; i++) g[i] = net_new(&d[i]);
  for (r = 0; r < bench.rounds; r++)
    for (i = 0; i < n; i++)
      for (k = 0; k < 3; k++) {
        double t = net_step(g[i], NULL);
        if (k) sample_add(&s[i], t);
      }
  printf("%s\n", what);
  for (i = 0; i < n; i++) {
    y[i] = 1e3 * median(&s[i]);
    printf("  %8g %9.2f ms %8.1f GFLOP/s\n", x[i], y[i], 1e-6 * net_flops(&d[i]) / y[i]);
    snprintf(name, sizeof name, "%s %g", what, x[i]);
    record("growth", name, "ms", y[i]);
    net_free(g[i]);
  }
  if (!fit) return;
  worst = fit_line(n, x, y, &a, &b);
  printf("  line %.2f + %.4f x ms; largest deviation %.1f %%\n", a, b, 100 * worst);
  record("growth", what, "largest_deviation", worst);
}

static void bench_growth(void) {
  static const size_t batches[] = {6, 12, 24, 48, 96}, experts[] = {1, 2, 4, 6, 8},
                      widths[] = {64, 128, 192, 256, 384};
  net_desc d[3][5];
  double x[3][5];
  int i;
  for (i = 0; i < 5; i++) {
    d[0][i] = d[1][i] = d[2][i] = nets[CHARLM];
    d[0][i].batch = batches[i];
    d[1][i].fusion = fusion_of(EXF_MB, experts[i]);
    d[2][i].width = widths[i];
    x[0][i] = (double)net_tokens(&d[0][i]);
    x[1][i] = (double)experts[i];
    x[2][i] = (double)widths[i];
  }
  printf("\ngrowth     of the charlm step\n");
  growth_of("tokens", d[0], x[0], 5, 1);
  growth_of("experts (mb)", d[1], x[1], 5, 1);
  growth_of("width", d[2], x[2], 5, 0);
}

/* ---- one step in a process of its own, memory ------------------------------------- */

static int run_usage(void) {
  fprintf(stderr, "bench: run charlm|charlm8192|gpt384|vit|generate [sw|dw|mb N]\n");
  return 2;
}

/* argv: NAME [VARIANT N]. Steps for three seconds, at least three; generate: ms of a
   token. */
static int run_one(int argc, char **argv) {
  samples s = {0, {0}};
  net_desc d = nets[CHARLM];
  double idle, start;
  int k, v, generating = argc > 0 && strcmp(argv[0], "generate") == 0;
  net *g;
  for (k = 0; k < N_NETS && (argc < 1 || strcmp(argv[0], nets[k].name) != 0); k++)
    continue;
  if (k == N_NETS && !generating) return run_usage();
  if (!generating) d = nets[k];
  for (v = EXF_SW; argc >= 3 && v <= EXF_MB; v++)
    if (strcmp(argv[1], exf_variant_name((exf_variant)v)) == 0)
      d.fusion = fusion_of((exf_variant)v, (size_t)atoi(argv[2]));
  if (argc != 1 && (argc != 3 || d.fusion.n_experts == 0)) return run_usage();
  idle = peak_memory();
  g = net_new(&d);
  if (generating) {
    generate_rate(g, 200, d.block / 2 - 1);
    start = generate_rate(g, 5000, d.block / 2 - 1);
    printf("ms=%.4f peak_mb=%.1f\n", 1e3 / start, peak_memory() - idle);
  } else {
    net_step(g, NULL);
    for (start = now(); s.n < 3 || now() - start < 3;) sample_add(&s, net_step(g, NULL));
    printf("ms=%.3f peak_mb=%.1f\n", 1e3 * median(&s), peak_memory() - idle);
  }
  net_free(g);
  return 0;
}

static const char *self;   /* argv[0] */

static void bench_memory(void) {
  static const char *const cases[] = {"charlm", "charlm mb 4", "gpt384", "gpt384 sw 4",
                                      "gpt384 mb 4", "vit"};
  char command[512];
  double ms, mb;
  size_t i;
  printf("\nmemory     MB above an idle process, at most\n");
  for (i = 0; i < sizeof cases / sizeof *cases; i++) {
    FILE *f;
    snprintf(command, sizeof command, "'%s' --threads %d run %s", self, bench.threads,
             cases[i]);
    f = popen(command, "r");
    if (f && fscanf(f, "ms=%lf peak_mb=%lf", &ms, &mb) == 2) {
      printf("%-12s %8.1f MB\n", cases[i], mb);
      record("memory", cases[i], "mb_above_idle", mb);
    }
    if (f) pclose(f);
  }
}

/* ---- main ------------------------------------------------------------------------- */

static const struct {
  const char *name;
  void (*run)(void);
} parts[] = {{"machine", NULL}, {"gemm", bench_gemm}, {"ops", bench_ops},
             {"step", bench_step},
             {"limit", bench_limit}, {"phases", bench_phases},
             {"generate", bench_generate}, {"growth", bench_growth},
             {"memory", bench_memory}};
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
  self = argv[0];
  for (i = 1; i < argc; i++) {
    const char *value = i + 1 < argc ? argv[i + 1] : "";
    if (strcmp(argv[i], "--threads") == 0) bench.threads = atoi(value), i++;
    else if (strcmp(argv[i], "--rounds") == 0) bench.rounds = atoi(value), i++;
    else if (strcmp(argv[i], "--isa") == 0) bench.isa = isa_named(value), i++;
    else if (strcmp(argv[i], "--wall") == 0) bench.wall = 1;
    else if (strcmp(argv[i], "run") == 0) return run_one(argc - i - 1, argv + i + 1);
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
