/* tests/bench/clock.h - time, medians, the table of results, and what the machine can do.
   The caller includes exfusion.h with its implementation first. */
#ifndef BENCH_CLOCK_H
#define BENCH_CLOCK_H

#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

static struct {
  int threads, rounds, wall;
  exf_isa isa;
  FILE *csv;
  double peak;           /* GFLOP/s of one thread, from registers */
  double cache, memory;  /* GB/s of reading 4 MB and 256 MB */
} bench = {1, 5, 0, EXF_ISA_AUTO, NULL, 0, 0, 0};

/* Seconds. One thread is timed by the processor time it used, which leaves out the turns
   of other programs; more threads, or --wall, by the clock on the wall. */
static double now(void) {
  struct timespec t;
  int wall = bench.wall || bench.threads > 1;
  clock_gettime(wall ? CLOCK_MONOTONIC : CLOCK_PROCESS_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- samples */

#define MAX_SAMPLES 512
typedef struct samples {
  int n;
  double at[MAX_SAMPLES];
} samples;

static void sample_add(samples *s, double x) {
  if (s->n < MAX_SAMPLES) s->at[s->n++] = x;
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(const samples *s) {
  double sorted[MAX_SAMPLES];
  if (s->n == 0) return NAN;
  memcpy(sorted, s->at, (size_t)s->n * sizeof *sorted);
  qsort(sorted, (size_t)s->n, sizeof *sorted, ascending);
  return (sorted[(s->n - 1) / 2] + sorted[s->n / 2]) / 2;
}

/* ---- one timed call */

typedef struct task {
  void (*run)(void *arg);
  void *arg;
  int repeats;           /* calls of one sample, which lasts some milliseconds */
} task;

static double task_sample(const task *t) {
  double start = now();
  int i;
  for (i = 0; i < t->repeats; i++) t->run(t->arg);
  return (now() - start) / t->repeats;
}

/* Warms up and chooses the repeats. */
static task task_new(void (*run)(void *arg), void *arg, double least) {
  task t;
  t.run = run;
  t.arg = arg;
  t.repeats = 1;
  run(arg);
  while (t.repeats < 1 << 20) {
    double s = task_sample(&t);
    if (s * t.repeats >= least) break;
    t.repeats = s * t.repeats < least / 16 ? t.repeats * 8
                                           : (int)(least / s) + 1;
  }
  return t;
}

static double task_median(void (*run)(void *arg), void *arg, double least) {
  task t = task_new(run, arg, least);
  samples s = {0, {0}};
  int i;
  for (i = 0; i < bench.rounds; i++) sample_add(&s, task_sample(&t));
  return median(&s);
}

/* ---- results: printed by the caller, kept here */

static void record(const char *table, const char *what, const char *measure, double x) {
  if (bench.csv) fprintf(bench.csv, "%s,%s,%s,%.6g\n", table, what, measure, x);
}

/* Most memory this process has held, in MB. Linux hands getrusage's figure down through
   exec, so its own account comes first. */
static double peak_memory(void) {
  struct rusage u;
  char line[128];
  double kb = 0;
  FILE *f = fopen("/proc/self/status", "r");
  while (f && kb == 0 && fgets(line, sizeof line, f))
    if (sscanf(line, "VmHWM: %lf kB", &kb) != 1) kb = 0;
  if (f) fclose(f);
  if (kb > 0) return kb / 1024;
  getrusage(RUSAGE_SELF, &u);
#ifdef __APPLE__
  return (double)u.ru_maxrss / 1048576;
#else
  return (double)u.ru_maxrss / 1024;
#endif
}

/* ---- the limits: multiply-adds from registers, reads of a large block */

#if EXF__X86 && !defined(EXF_DOUBLE)
#define LIMITS(isa, features, W, V, SET, LOAD, FMA)                                      \
  __attribute__((target(features))) static float flops_##isa(size_t n) {                 \
    V s[12], x = SET(0.999f), y = SET(1e-3f);                                            \
    float out[W];                                                                        \
    int i;                                                                               \
    for (i = 0; i < 12; i++) s[i] = SET((float)i);                                       \
    for (; n; n--) {                                                                     \
      EXF__UNROLL                                                                        \
      for (i = 0; i < 12; i++) s[i] = FMA(s[i], x, y);                                   \
    }                                                                                    \
    for (i = 1; i < 12; i++) s[0] = s[0] + s[i];                                         \
    memcpy(out, &s[0], sizeof out);                                                      \
    return out[0];                                                                       \
  }                                                                                      \
  __attribute__((target(features))) static float read_##isa(const float *p, size_t n) {  \
    V s[8];                                                                              \
    float out[W];                                                                        \
    int i;                                                                               \
    for (i = 0; i < 8; i++) s[i] = SET(0.0f);                                            \
    for (; n >= 8 * W; n -= 8 * W, p += 8 * W) {                                         \
      EXF__UNROLL                                                                        \
      for (i = 0; i < 8; i++) s[i] = s[i] + LOAD(p + i * W);                             \
    }                                                                                    \
    for (i = 1; i < 8; i++) s[0] = s[0] + s[i];                                          \
    memcpy(out, &s[0], sizeof out);                                                      \
    return out[0];                                                                       \
  }
#define MUL_ADD(a, b, c) ((a) * (b) + (c))
LIMITS(sse2, "sse2", 4, __m128, _mm_set1_ps, _mm_loadu_ps, MUL_ADD)
LIMITS(avx2, "avx2,fma", 8, __m256, _mm256_set1_ps, _mm256_loadu_ps, _mm256_fmadd_ps)
LIMITS(avx512, "avx512f", 16, __m512, _mm512_set1_ps, _mm512_loadu_ps, _mm512_fmadd_ps)
#endif

typedef struct limits {
  exf_isa isa;
  size_t lanes;
  float (*flops)(size_t n);
  float (*read)(const float *p, size_t n);
} limits;

/* The instruction sets of this processor, the best first; returns how many. flops and
   read are NULL where there is no such loop. */
static int limits_list(limits *out) {
  static const limits all[] = {
#if EXF__X86 && !defined(EXF_DOUBLE)
    {EXF_ISA_AVX512, 16, flops_avx512, read_avx512},
    {EXF_ISA_AVX2, 8, flops_avx2, read_avx2},
    {EXF_ISA_SSE2, 4, flops_sse2, read_sse2},
#endif
    {EXF_ISA_NEON, 4, NULL, NULL}};
  int n = 0;
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    if (exf__kernels_for(all[i].isa)) out[n++] = all[i];
  return n;
}

static volatile float kept;   /* so that no loop is dropped */

static double limit_flops(const limits *l) {
  const size_t n = 400000;
  double best = 0, start;
  int i;
  if (!l->flops) return NAN;
  for (i = 0; i < 5; i++) {
    start = now();
    kept = l->flops(n);
    best = EXF__MAX(best, 24e-9 * (double)(n * l->lanes) / (now() - start));
  }
  return best;
}

/* GB/s of reading `bytes` again and again; the best of a few passes */
static double limit_read(const limits *l, size_t bytes) {
  size_t n = bytes / sizeof(float), passes = ((size_t)64 << 20) / bytes + 1, p;
  float *block = (float *)malloc(bytes);
  double best = 0, start;
  int i;
  if (!l->read || !block) return NAN;
  for (p = 0; p < n; p++) block[p] = 1;
  for (i = 0; i < 6; i++) {
    start = now();
    for (p = 0; p < passes; p++) kept = l->read(block, n);
    best = EXF__MAX(best, 1e-9 * (double)(passes * bytes) / (now() - start));
  }
  free(block);
  return best;
}

static void print_machine(void) {
  char line[256], *value = NULL;
  limits l[4];
  double read[3];
  int i, n = limits_list(l);
  FILE *f = fopen("/proc/cpuinfo", "r");
  while (f && !value && fgets(line, sizeof line, f))
    if (strncmp(line, "model name", 10) == 0 && (value = strchr(line, ':')) != NULL)
      value[strcspn(value, "\n")] = 0;
  if (f) fclose(f);
  printf("machine    %s, %ld processors; %d thread%s here, timed by %s\n",
         value ? value + 2 : "?", sysconf(_SC_NPROCESSORS_ONLN), bench.threads,
         bench.threads == 1 ? "" : "s",
         bench.wall || bench.threads > 1 ? "the clock" : "its processor time");
#ifdef __clang__
  printf("compiler   clang %s\n", __clang_version__);
#else
  printf("compiler   gcc %s\n", __VERSION__);
#endif
  for (i = 0; i < n; i++) {
    double flops = limit_flops(&l[i]);
    printf("%-10s %.1f GFLOP/s, one thread\n", exf_isa_name(l[i].isa), flops);
    record("machine", exf_isa_name(l[i].isa), "gflops", flops);
    if (i == 0) bench.peak = flops;
  }
  if (n == 0) return;
  read[0] = limit_read(&l[0], (size_t)256 << 10);
  read[1] = bench.cache = limit_read(&l[0], (size_t)4 << 20);
  read[2] = bench.memory = limit_read(&l[0], (size_t)256 << 20);
  printf("reads      %.1f GB/s of 256 KB, %.1f of 4 MB, %.1f of 256 MB\n", read[0],
         read[1], read[2]);
  record("machine", "256 KB", "gb_per_s", read[0]);
  record("machine", "4 MB", "gb_per_s", read[1]);
  record("machine", "256 MB", "gb_per_s", read[2]);
}

#endif /* BENCH_CLOCK_H */
