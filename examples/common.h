/* common.h - what charlm and vit share: errors, texts, files, flags, and the folder of a
   training run. The training itself stands in the programs, in their function `train`.
   Define _POSIX_C_SOURCE 200809L and include exfusion.h first. An error ends an example:
   `fail` prints one line, "program: what, rule, what to do", and exits with 1, or with 2
   when the command line is wrong. */
#ifndef EXF_EXAMPLES_COMMON_H
#define EXF_EXAMPLES_COMMON_H

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef _WIN32
#define HAVE_POSIX 0
#define mkdir(path, mode) mkdir(path)
#else
#define HAVE_POSIX 1
#include <sys/resource.h>
#endif
#ifndef __GNUC__
#define __attribute__(x)
#endif
#define PRINTS(text, first) __attribute__((format(printf, text, first)))
typedef unsigned long long ull;

/* ---- errors and memory ------------------------------------------------------------ */
static const char *program_name = "example";   /* main sets it */
static int progress_drawn;                      /* a progress bar is on this line */

static inline void progress_clear(void) {
  if (progress_drawn) fprintf(stderr, "\r\033[K");
  progress_drawn = 0;
}
/* What a terminal could obey. */
static inline int is_control(char c) { return (unsigned char)c < 32 || c == 127; }

__attribute__((noreturn, format(printf, 2, 3)))
static inline void fail(int code, const char *format, ...) {
  char line[4096];
  va_list args;
  progress_clear();
  fflush(stdout);
  va_start(args, format);
  vsnprintf(line, sizeof line, format, args);
  va_end(args);
  for (char *c = line; *c; c++)   /* what it quotes may hold anything: one line */
    if (is_control(*c)) *c = '?';
  fprintf(stderr, "%s: %s\n", program_name, line);
  exit(code);
}
/* Ends the program unless all that was printed has arrived. */
static inline void stdout_check(void) {
  if (fflush(stdout) != 0 || ferror(stdout))
    fail(1, "cannot write to stdout: free the disk, or mend the pipe");
}
/* Zeroed memory for n things of `size` bytes. */
static inline void *memory(size_t n, size_t size) {
  void *block = calloc(n ? n : 1, size ? size : 1);
  if (!block) fail(1, "out of memory: make model or batch smaller");
  return block;
}
/* Ends the program when the context holds an error. */
static inline void check(const exf_ctx *ctx) {
  if (!ctx) fail(1, "out of memory: close other programs");
  if (exf_ctx_status(ctx) != EXF_OK) fail(1, "%s", exf_error(ctx));
}
/* Ends the program unless x, a loss or a sum of outputs of this model, is finite. */
static inline void check_finite(double x, const char *model) {
  if (!(fabs(x) < HUGE_VAL)) fail(1, "%s: results are not finite: take another", model);
}

/* ---- texts ------------------------------------------------------------------------ */
typedef struct text {
  char *s;              /* zero-terminated, or NULL when nothing was ever added */
  size_t n, capacity;
} text;

static inline void text_free(text *t) { free(t->s), *t = (text){0}; }

PRINTS(2, 3)
static inline void text_add(text *t, const char *format, ...) {
  va_list args;
  va_start(args, format);
  size_t need = t->n + (size_t)vsnprintf(NULL, 0, format, args) + 1;
  va_end(args);
  if (need > t->capacity && (t->s = realloc(t->s, t->capacity = 2 * need)) == NULL)
    fail(1, "out of memory: close other programs");
  va_start(args, format);
  t->n += (size_t)vsnprintf(t->s + t->n, t->capacity - t->n, format, args);
  va_end(args);
}
/* The shortest digits that read back as the same double; null for what is no number. */
static inline void text_number(text *t, double value) {
  char s[40] = "nan";
  for (int d = 15; d < 18 && fabs(value) < HUGE_VAL && strtod(s, NULL) != value; d++)
    snprintf(s, sizeof s, "%.*g", d, value);
  text_add(t, "%s", *s == 'n' ? "null" : s);
}
/* 1234567 as "1,234,567"; each of four calls in a row has its own buffer. */
static inline const char *commas(uint64_t n) {
  static char buffers[4][32];
  static int next;
  char *at = buffers[next = (next + 1) % 4] + 31;
  for (int k = 1; n > 0 || k == 1; k++, n /= 10) {
    *--at = (char)('0' + n % 10);
    if (k % 3 == 0 && n > 9) *--at = ',';
  }
  return at;
}
/* A name may hold anything: control characters become '?'. */
static inline void print_plain(const char *s) {
  for (; *s; s++) putchar(is_control(*s) ? '?' : *s);
}
static inline void print_line(const char *label, const char *s) {
  printf("%s", label), print_plain(s), printf("\n");
}
/* The same, as a word of a command to be pasted into a shell. */
static inline void print_word(const char *s) {
  const char *quote = *s && !s[strcspn(s, " \t\n!\"#$&'()*;<>?[\\]^`{|}~")] ? "" : "'";
  printf("%s", quote);
  for (; *s; s++) printf(*s == '\'' ? "'\\''" : "%c", is_control(*s) ? '?' : *s);
  printf("%s", quote);
}

/* ---- files ------------------------------------------------------------------------ */
#define MAX_PATH_BYTES 4096
/* "dir/name"; each of eight calls in a row has its own buffer. */
static inline const char *path_in(const char *dir, const char *name) {
  static char buffers[8][MAX_PATH_BYTES];
  static int next;
  char *out = buffers[next = (next + 1) % 8];
  const char *slash = *dir && dir[strlen(dir) - 1] == '/' ? "" : "/";
  if (snprintf(out, MAX_PATH_BYTES, "%s%s%s", dir, slash, name) >= MAX_PATH_BYTES)
    fail(1, "the name %.60s... is too long: choose a shorter one", dir);
  return out;
}
/* Whether it can be opened: a file, or a folder. */
static inline int file_exists(const char *path) {
  FILE *file = fopen(path, "rb");
  if (file) fclose(file);
  return file != NULL;
}
/* A file and a zero byte, to be freed; NULL, with the cause in errno, on failure. */
static inline unsigned char *file_bytes(const char *path, size_t *n) {
  struct stat status;
  FILE *file = stat(path, &status) == 0 ? fopen(path, "rb") : NULL;
  if (!file) return NULL;
  unsigned char *data = memory((size_t)status.st_size + 1, 1);
  *n = fread(data, 1, (size_t)status.st_size, file);
  int cause = ferror(file) ? errno : 0;
  fclose(file);
  if (cause) free(data), data = NULL;
  errno = cause;
  return data;
}
/* The same; ends the program when it cannot be read. */
static inline unsigned char *read_file(const char *path, size_t *n) {
  unsigned char *data = file_bytes(path, n);
  if (!data) fail(1, "cannot read %s (%s): give another file", path, strerror(errno));
  return data;
}
/* A safetensors file. */
static inline exf_st *open_tensors(exf_ctx *ctx, const char *path) {
  exf_st *st = exf_st_open(ctx, path, NULL);
  check(ctx);
  return st;
}
/* FNV-1a, to recognise a data file. */
static inline uint64_t hash_bytes(const unsigned char *data, size_t n) {
  uint64_t hash = 14695981039346656037u;
  for (size_t i = 0; i < n; i++) hash = (hash ^ data[i]) * 1099511628211u;
  return hash;
}
/* Makes the folder with its parents, and tries whether it can be written. */
static inline void directory_make(const char *path) {
  char copy[MAX_PATH_BYTES];
  strcpy(copy, path_in(path, ""));
  for (char *c = copy; (c = strchr(c + 1, '/')) != NULL; *c = '/') {
    *c = 0;
    if (mkdir(copy, 0777) != 0 && errno != EEXIST)
      fail(1, "cannot make %s (%s): choose another --out", copy, strerror(errno));
  }
  const char *name = path_in(path, "probe.tmp");
  FILE *probe = fopen(name, "wb");
  if (!probe) fail(1, "cannot write %s (%s): see --out", name, strerror(errno));
  fclose(probe);
  remove(name);
}

/* ---- flags ------------------------------------------------------------------------ */
/* Kept nowhere; in run.txt; in the checkpoint, too, and a resumed run must agree. */
enum { FLAG_ONCE, FLAG_FREE, FLAG_FIXED };
typedef struct flag {
  const char *name;
  char kind;            /* u whole, n whole or null, x real, s text, c choice, b switch */
  int keep;
  void *value;          /* uint64_t, uint64_t, double, const char *, int (index), int */
  const char *range;    /* "LOW HIGH" of u, n, x; "a|b|c" of c; "false|true" of b */
  const char *help;
} flag;
#define FLAG_UNSET UINT64_MAX    /* null */
typedef struct flags {
  flag list[64];
  int n, given[64];      /* by the user, on the command line or by --config */
  char *source[4];       /* what was read, once in each way: texts point into it */
} flags;
/* Adds the rows of a table up to one without a name. */
static inline void flags_add(flags *f, const flag *table) {
  for (; table->name; table++) f->list[f->n++] = *table;
}
static inline void flags_free(flags *f) {
  for (int i = 0; i < 4; i++) free(f->source[i]);
}
/* How many letters a and b share at their beginnings and ends. */
static inline size_t alike(const char *a, const char *b) {
  size_t n = 0, m = 0, na = strlen(a), nb = strlen(b);
  while (a[n] && a[n] == b[n]) n++;
  while (m < na && m < nb && a[na - m - 1] == b[nb - m - 1]) m++;
  return n + m;
}
/* The flag of that name, with dashes or without. If there is none: with from, "" or
   "FILE: ", the program ends, naming what is near; without, NULL. */
static inline flag *flag_find(flags *f, const char *typed, const char *from) {
  const char *name = typed + strspn(typed, "-"), *near = "";
  for (int i = 0; i < f->n; i++) {
    if (strcmp(f->list[i].name, name) == 0) return &f->list[i];
    if (alike(name, f->list[i].name) > alike(name, near)) near = f->list[i].name;
  }
  if (!from) return NULL;
  if (alike(name, near) < 2) fail(2, "%sunknown flag %s: see --help", from, typed);
  fail(2, "%sunknown flag %s: did you mean --%s? (see --help)", from, typed, near);
}
static inline int *flag_given(flags *f, const char *name) {
  return &f->given[flag_find(f, name, "") - f->list];
}
/* Number `index` of "a|b|c", until the next call; NULL when there is none. */
static inline const char *choice_name(const char *choices, int index) {
  static char name[48];
  for (; index > 0; index--, choices++)
    if ((choices = strchr(choices, '|')) == NULL) return NULL;
  snprintf(name, sizeof name, "%.*s", (int)strcspn(choices, "|"), choices);
  return name;
}
/* The index of value in "a|b|c"; ends the program if it is none of them. */
static inline int choice_find(const char *choices, const char *value, const char *from,
                              const char *what) {
  const char *name;
  for (int i = 0; (name = choice_name(choices, i)) != NULL; i++)
    if (strcmp(name, value) == 0) return i;
  fail(2, "%s%s '%s' is unknown: the choices are %s", from, what, value, choices);
}
/* Sets a flag from text, which stays where it is. from: as for flag_find. */
static inline void flag_set(flag *f, const char *value, const char *from) {
  const int real = f->kind == 'x';
  char dashed[56], *end;
  double low = 0, high = 0;
  snprintf(dashed, sizeof dashed, "--%s", f->name);
  if (f->kind == 'c' || f->kind == 'b') {
    *(int *)f->value = choice_find(f->range, value, from, dashed);
  } else if (f->kind == 's') {
    if (f->keep != FLAG_ONCE && value[strcspn(value, "\r\n")])
      fail(2, "%s%s is not one line, as run.txt needs it: rename it", from, dashed);
    *(const char **)f->value = value;
  } else if (f->kind == 'n' && strcmp(value, "null") == 0) {
    *(uint64_t *)f->value = FLAG_UNSET;
  } else {
    sscanf(f->range, "%lf %lf", &low, &high);
    errno = 0;
    ull u = real ? 0 : strtoull(value, &end, 10);
    double x = real ? strtod(value, &end) : errno ? HUGE_VAL : (double)u;
    if (!*value || value[strspn(value, real ? "+-.0123456789eE" : "0123456789")] || *end
        || !(x >= low && x <= high))
      fail(2, "%s%s takes a %snumber from %.10g to %.10g, not '%s': see --help", from,
           dashed, real ? "" : "whole ", low, high, value);
    if (real) *(double *)f->value = x;
    else *(uint64_t *)f->value = u;
  }
}
/* Adds the value as flag_set reads it. */
static inline void flag_value(const flag *f, text *t) {
  if (f->kind == 's') text_add(t, "%s", *(const char **)f->value);
  else if (f->kind == 'x') text_number(t, *(double *)f->value);
  else if (f->kind == 'c' || f->kind == 'b')
    text_add(t, "%s", choice_name(f->range, *(int *)f->value));
  else if (*(uint64_t *)f->value == FLAG_UNSET) text_add(t, "null");
  else text_add(t, "%llu", (ull)*(uint64_t *)f->value);
}
/* Reads argv[2..]; one bare word may go to *word. --help ends the program. */
static inline void flags_parse(flags *f, int argc, char **argv, const char **word,
                               const char *usage) {
  for (int i = 2; i < argc; i++) {
    const char *a = argv[i], *equals = strchr(a, '=');
    char typed[96];
    if (strcmp(a, "--help") == 0 || strcmp(a, "-h") == 0) {
      printf("usage: %s\n\n", usage);
      for (flag *g = f->list; g < f->list + f->n; g++) {
        text value = {0};
        flag_value(g, &value);
        printf("  %s%-15s %s (%s%sdefault %s)\n", g->name[1] ? "--" : "-", g->name,
               g->help, g->range, *g->range ? "; " : "", value.n ? value.s : "none");
        text_free(&value);
      }
      stdout_check();
      exit(0);
    }
    if (a[0] != '-' || !a[1]) {
      if (!word || *word) fail(2, "unexpected argument '%s': usage: %s", a, usage);
      *word = a;
      continue;
    }
    snprintf(typed, sizeof typed, "%.*s", (int)strcspn(a, "="), a);
    flag *found = flag_find(f, typed, "");
    f->given[found - f->list] = 1;
    if (equals) flag_set(found, equals + 1, "");
    else if (found->kind == 'b') flag_set(found, "true", "");
    else if (i + 1 < argc) flag_set(found, argv[++i], "");
    else fail(2, "%s needs a value: %s", typed, found->help);
  }
}
/* Adds a line "width 128" for each flag that is kept so, or better. */
static inline void flags_write(const flags *f, int keep, text *t) {
  for (const flag *a = f->list; a < f->list + f->n; a++) {
    if (a->keep < keep) continue;
    text_add(t, "%s ", a->name);
    flag_value(a, t);
    text_add(t, "\n");
  }
}
/* Reads such lines, of source or of the file `what`; given flags stay. CONFIG: the rest
   become given. AGREE: takes FLAG_FIXED, given must be equal. KNOWN: skips others. */
enum { FLAGS_TAKE, FLAGS_CONFIG, FLAGS_AGREE, FLAGS_KNOWN };
static inline void flags_read(flags *f, const char *source, const char *what, int how) {
  char from[512], seen[64] = {0}, *next, *line;
  size_t n = source ? strlen(source) : 0;
  line = source ? strcpy(memory(n + 1, 1), source) : (char *)read_file(what, &n);
  f->source[how] = line;
  snprintf(from, sizeof from, "%s: ", what);
  if (strlen(line) < n)
    fail(1, "%sbyte %s is zero: give a text", from, commas(strlen(line)));
  if (*line == '{') fail(1, "%sJSON, of version 0.1.0: lines are wanted", from);
  for (; line; line = next) {                         /* NOLINT: f->source holds it */
    if ((next = strchr(line, '\n')) != NULL) *next++ = 0;
    line[strcspn(line, "\r")] = 0;
    if (*line == '#' || !*line) continue;
    char *value = line + strcspn(line, " ");
    if (*value) *value++ = 0;
    flag *a = flag_find(f, line, how == FLAGS_KNOWN ? NULL : from);
    if (!a || (how == FLAGS_AGREE && a->keep != FLAG_FIXED)) continue;
    int *given = &f->given[a - f->list];
    if (seen[a - f->list]++) fail(1, "%s%s stands there twice", from, line);
    if (*given && how != FLAGS_AGREE) continue;
    text mine = {0}, theirs = {0};
    flag_value(a, &mine);
    flag_set(a, value, from);
    flag_value(a, &theirs);
    if (*given && strcmp(mine.s, theirs.s) != 0)
      fail(2, "--%s is %s but %s in %s: leave it away", line, mine.s, theirs.s, what);
    if (how == FLAGS_CONFIG) *given = 1;
    text_free(&mine);
    text_free(&theirs);
  }
}
/* Takes what the run of this model recorded, as far as it is in the table. */
static inline void flags_of_run(flags *f, const char *model) {
  const char *slash = strrchr(model, '/');
  char path[MAX_PATH_BYTES];
  snprintf(path, sizeof path, "%.*srun.txt", slash ? (int)(slash - model) + 1 : 0, model);
  if (file_exists(path)) flags_read(f, NULL, path, FLAGS_KNOWN);
}
/* Recorded data may have a name relative to where the run was started. */
static inline void flag_recorded(flags *f, const char *name, const char *run) {
  const char *path = *(const char **)flag_find(f, name, "")->value;
  if (*flag_given(f, name) || file_exists(path)) return;
  fail(1, "cannot open %s (%s), the data of %s: say with --%s where they are", path,
       strerror(errno), run, name);
}

/* ---- time and signals ------------------------------------------------------------- */
static inline double seconds(void) {
#if HAVE_POSIX
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#else
  return (double)clock() / CLOCKS_PER_SEC;
#endif
}

static volatile sig_atomic_t stop_signal;   /* the signal that asked for an end, or 0 */

/* The first Ctrl-C sets stop_signal, the second ends the program. */
static inline void stop_handler(int s) { stop_signal = s, signal(s, SIG_DFL); }
static inline void stop_install(void) {
  signal(SIGINT, stop_handler), signal(SIGTERM, stop_handler);
}
static inline void log_line(void *quiet, const char *line) {
  progress_clear();
  if (!*(const int *)quiet) fprintf(stderr, "%s\n", line);
}

/* ---- a training run and its folder ------------------------------------------------ */
/* What does not depend on the model. The program sets task, list_key, defaults, and adds
   its flags; then come run_flags, run_context, data, model, run_begin, the training. */
typedef struct run {
  const char *task, *list_key;    /* "charlm", "exf.vocab" */
  const char *out, *config, *init;
  int ffn, dw, upcycle, routed, isa, resume, quick, quiet;
  uint64_t experts, layers, heads, width, batch, accum;
  uint64_t steps, warmup, eval_every, save_every, seed, threads;
  double mu, dropout, lr, min_lr, weight_decay, beta1, beta2, clip;
  flags f;                        /* all above, and those of the program */
  text list, geometry, data;      /* values of metadata: list_key, exf.config, exf.data */
  exf_ctx *ctx;
  exf_model *model;
  exf_optim *optim;
  exf_schedule schedule;
  uint64_t step, first;           /* steps done; done before this start */
  size_t per_step;                /* tokens in a step */
  double started, elapsed;        /* clock at the start; seconds before it */
  double spent, loss;             /* in the steps of this start; of the last step */
  int owns;                       /* the files in the folder are of this run */
  text log, weights;              /* log.csv, weights.csv */
} run;
/* Adds the flags every training program has. */
static inline void run_flags_add(run *r) {
  const flag table[] = {
    {"out", 's', FLAG_FREE, &r->out, "", "folder of the results; "
     "weights.csv thins long runs to about 1,000 rows per FFN"},
    {"config", 's', FLAG_ONCE, &r->config, "", "read flags from a run.txt"},
    {"init", 's', FLAG_FIXED, &r->init, "", "upcycle a trained dense model, DIR|FILE"},
    {"ffn", 'c', FLAG_FIXED, &r->ffn, "dense|sw|dw|mb", "where fusion weights come from"},
    {"experts", 'u', FLAG_FIXED, &r->experts, "1 65536", "experts per FFN"},
    {"dw", 'c', FLAG_FIXED, &r->dw, "raw|softmax", "weights of dw"},
    {"upcycle", 'c', FLAG_FIXED, &r->upcycle, "default|zerosum|independent|"
     "independent-plain|copy|drop", "default: independent from scratch, else zerosum"},
    {"mu", 'x', FLAG_FIXED, &r->mu, "0 1", "momentum of the memory bank"},
    {"routed", 'b', FLAG_FIXED, &r->routed, "false|true", "mb: by the router alone"},
    {"layers", 'u', FLAG_FIXED, &r->layers, "1 1024", "blocks"},
    {"heads", 'u', FLAG_FIXED, &r->heads, "1 1073741824", "attention heads"},
    {"width", 'u', FLAG_FIXED, &r->width, "1 1073741824", "numbers per position"},
    {"batch", 'u', FLAG_FIXED, &r->batch, "1 1073741824", "samples per micro-batch"},
    {"accum", 'u', FLAG_FIXED, &r->accum, "1 1073741824", "micro-batches per step"},
    {"dropout", 'x', FLAG_FIXED, &r->dropout, "0 0.999", "dropout probability"},
    {"lr", 'x', FLAG_FIXED, &r->lr, "0 1e6", "learning rate"},
    {"min-lr", 'x', FLAG_FIXED, &r->min_lr, "0 1e6", "its end (cosine)"},
    {"warmup", 'n', FLAG_FIXED, &r->warmup, "0 4e9", "steps; null: a 20th of the run"},
    {"weight-decay", 'x', FLAG_FIXED, &r->weight_decay, "0 1e6", "of matrices"},
    {"beta1", 'x', FLAG_FIXED, &r->beta1, "0 0.999999", "AdamW"},
    {"beta2", 'x', FLAG_FIXED, &r->beta2, "0 0.999999", "AdamW"},
    {"clip", 'x', FLAG_FIXED, &r->clip, "0 1e9", "largest gradient norm; 0: no clipping"},
    {"seed", 'u', FLAG_FIXED, &r->seed, "0 1.8e19", "of every random number"},
    {"eval-every", 'u', FLAG_FREE, &r->eval_every, "0 4e9", "steps; 0: at the end only"},
    {"save-every", 'u', FLAG_FREE, &r->save_every, "0 4e9", "steps; 0: at the end only"},
    {"threads", 'u', FLAG_FREE, &r->threads, "0 4096", "0: one per processor"},
    {"isa", 'c', FLAG_FREE, &r->isa, "auto|ref|sse2|avx2|avx512|neon", "instruction set"},
    {"quick", 'b', FLAG_FIXED, &r->quick, "false|true", "a version of seconds"},
    {"resume", 'b', FLAG_ONCE, &r->resume, "false|true", "go on from --out's checkpoint"},
    {"quiet", 'b', FLAG_ONCE, &r->quiet, "false|true", "print errors only"}, {0}};
  flags_add(&r->f, table);
}
/* Resolves the flags: those given, then --config, then those of the run to be resumed, or
   `quick`, lines of flags, for --quick, then the defaults. */
static inline void run_flags(run *r, int argc, char **argv, const char *quick,
                             const char *usage) {
  flags_parse(&r->f, argc, argv, NULL, usage);
  if (*r->config) flags_read(&r->f, NULL, r->config, FLAGS_CONFIG);
  if (!*r->out) fail(2, "--out is empty: name a folder");
  if (!r->resume && r->quick) flags_read(&r->f, quick, "--quick", FLAGS_TAKE);
  if (!r->resume) return;
  const char *keys[] = {"exf.task", "exf.config", "exf.step", "exf.data", r->list_key};
  const char *path = path_in(r->out, "checkpoint.safetensors"), *value[5];
  const char *settings = path_in(r->out, "run.txt");
  if (!file_exists(path)) fail(1, "no %s, so nothing to resume: see --out", path);
  *flag_given(&r->f, "out") = 1;     /* the folder may have moved */
  if (file_exists(settings)) flags_read(&r->f, NULL, settings, FLAGS_TAKE);
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_st *st = open_tensors(ctx, path);
  for (int i = 0; i < 5; i++)
    if ((value[i] = exf_st_meta(st, keys[i])) == NULL || strcmp(value[0], r->task) != 0)
      fail(1, "%s: it lacks %s of a %s run: start a new run", path, keys[i], r->task);
  flags_read(&r->f, value[1], path, FLAGS_AGREE);
  r->step = r->first = strtoull(value[2], NULL, 10);
  text_add(&r->data, "%s", value[3]);
  text_add(&r->list, "%s", value[4]);
  exf_st_close(st);
  exf_ctx_free(ctx);
}
/* Whether a resumed run has nothing left to do, which it says. */
static inline int run_is_finished(const run *r) {
  if (!r->resume || r->step < r->steps) return 0;
  if (!r->quiet) print_line("nothing is left to do in ", r->out);
  return 1;
}
/* isa is recorded as it was given, so that a run may go on on another processor. */
static inline void run_context(run *r) {
  r->ctx = exf_ctx_new(&(exf_desc){.seed = r->seed, .n_threads = (int)r->threads,
    .isa = (exf_isa)r->isa, .log = log_line, .log_user = &r->quiet});
  if (r->ctx && exf_ctx_status(r->ctx) == EXF_ARG)
    fail(2, "--isa %s is not available on this processor or in this build: use auto",
         exf_isa_name((exf_isa)r->isa));
  check(r->ctx);
  r->threads = (uint64_t)exf_ctx_desc(r->ctx).n_threads;
}
/* Takes over `mine`, which identifies the data; of a resumed run it must be the same. */
static inline void run_data(run *r, text *mine, const char *name, const char *dashed) {
  if (r->resume && strcmp(mine->s, r->data.s) != 0)
    fail(1, "%s is not the data of the checkpoint: give those with %s", name, dashed);
  text_free(&r->data);
  r->data = *mine;
}
static inline exf_fusion_desc run_fusion(const run *r) {
  return (exf_fusion_desc){.variant = (exf_variant)r->ffn, .routed = r->routed,
    .n_experts = (size_t)r->experts, .dw_softmax = r->dw,
    .mu = r->mu > 0 ? r->mu : EXF_ZERO, .upcycle = (exf_upcycle)r->upcycle};
}
/* Ends the program when saving failed; every file is then whole. */
static inline void run_check_save(const run *r) {
  if (*exf_error(r->ctx))
    fail(1, "saving after step %s: %s", commas(r->step), exf_error(r->ctx));
}
static inline void run_save_text(run *r, const char *name, text *t) {
  exf_file_save(r->ctx, path_in(r->out, name), t->s, t->n);
  run_check_save(r);
}
/* A merged model or the checkpoint, whose exf.config has the geometry or the flags. name
   NULL: only has the library check the metadata. */
static inline void run_save_tensors(run *r, exf_model *model, const char *name,
                                    int checkpoint) {
  char seed[24], step[24];
  unsigned char *bytes = NULL;
  size_t n;
  text config = {0};
  snprintf(seed, sizeof seed, "%llu", (ull)r->seed);
  snprintf(step, sizeof step, "%llu", (ull)r->step);
  flags_write(&r->f, FLAG_FIXED, &config);
  const exf_pair meta[] = {{"format", "pt"}, {"exf.version", EXF_VERSION},
    {"exf.task", r->task}, {"exf.seed", seed}, {"exf.step", step},
    {r->list_key, r->list.s}, {"exf.config", checkpoint ? config.s : r->geometry.s},
    {"exf.data", r->data.s}};
  const char *path = path_in(r->out, name ? name : "");
  if (!name) exf_st_save_memory(r->ctx, NULL, 0, meta, 8, &bytes, &n);
  else if (checkpoint) exf_checkpoint_save(model, r->optim, path, meta, 8);
  else exf_model_save(model, path, meta, 7);
  exf_st_free_memory(r->ctx, bytes);
  text_free(&config);
  run_check_save(r);
}
/* Begins a table, with the file's rows before step `end` if it has this header. */
static inline void table_begin(const char *path, const char *header, uint64_t end,
                               text *out) {
  size_t n;
  text_add(out, "%s\n", header);
  if (end == 0 || !file_exists(path)) return;
  char *data = (char *)read_file(path, &n), *line = data + out->n, *next;
  if (strncmp(data, out->s, out->n) == 0)
    for (; (next = strchr(line, '\n')) && strtoull(line, NULL, 10) < end; line = next + 1)
      text_add(out, "%.*s\n", (int)(next - line), line);
  free(data);
}
/* One row per FFN, now and then: its fusion weights after r->step updates. */
static inline void run_log_weights(run *r) {
  if (r->step % (1 + r->steps / 1000) != 0 && r->step != r->steps) return;
  size_t n = r->ffn == EXF_DENSE ? 1 : (size_t)r->experts;
  double *w = memory(n, sizeof *w);
  w[0] = 1;                                 /* of a dense FFN */
  for (size_t i = 0; i < exf_model_n_ffns(r->model); i++) {
    exf_ffn_diagnose(exf_model_ffn(r->model, i), w, NULL, NULL);
    text_add(&r->weights, "%llu,%llu", (ull)r->step, (ull)i);
    for (size_t k = 0; k < n; k++) text_add(&r->weights, ",%.9g", w[k]);
    text_add(&r->weights, "\n");
  }
  free(w);
}
/* Begins or continues the folder, the optimizer and the tables. */
static inline void run_begin(run *r) {
  text header = {0};
  directory_make(r->out);
  run_save_tensors(r, r->model, NULL, 1);
  r->optim = exf_optim_new(r->model, &(exf_optim_desc){.clip = r->clip,
    .beta1 = r->beta1 > 0 ? r->beta1 : EXF_ZERO, .weight_decay = r->weight_decay,
    .beta2 = r->beta2 > 0 ? r->beta2 : EXF_ZERO});
  r->schedule = (exf_schedule){.lr = r->lr, .min_lr = r->min_lr, .steps = r->steps,
    .warmup = r->warmup == FLAG_UNSET ? r->steps / 20 : r->warmup};
  r->owns = r->resume;
  if (r->resume)
    exf_checkpoint_load(r->model, r->optim, path_in(r->out, "checkpoint.safetensors"));
  check(r->ctx);
  table_begin(path_in(r->out, "log.csv"), "step,train_loss,val_loss,lr,grad_norm,"
              "tokens_per_s,elapsed_s", r->step, &r->log);
  text_add(&header, "step,ffn");
  for (uint64_t i = 0; i < (r->ffn == EXF_DENSE ? 1 : r->experts); i++)
    text_add(&header, ",w%llu", (ull)i);
  table_begin(path_in(r->out, "weights.csv"), header.s, r->resume ? r->step + 1 : 0,
              &r->weights);
  text_free(&header);
  r->elapsed = strtod(strrchr(r->log.s, ',') + 1, NULL);   /* the last column */
  r->loss = NAN;
  if (!r->resume) run_log_weights(r);
  r->started = seconds();
}
/* What is about to be trained; what the method's algebra already knows of it. */
static inline void run_announce(const run *r, const char *model, const char *data) {
  if (r->quiet) return;
  printf("model   %s; FFNs: %s", model, exf_variant_name((exf_variant)r->ffn));
  if (r->ffn) printf(", %s experts fused into one", commas(r->experts));
  print_line("\ndata    ", data);
  printf("params  %s while training, %s merged\nrun     ",
         commas(exf_model_count(r->model)), commas(exf_model_count_merged(r->model)));
  if (r->first) printf("resumed after step %s of ", commas(r->first));
  printf("%s steps, seed %llu, %s, %d threads", commas(r->steps), (ull)r->seed,
         exf_isa_name(exf_ctx_desc(r->ctx).isa), (int)r->threads);
  double left = exf_expert_decay(&r->schedule, r->weight_decay);
  if (r->ffn && left >= 0 && left <= 1)
    printf("; weight decay will leave %.3g of the experts' differences", left);
  printf("\n");
  fflush(stdout);
  if (!r->resume) exf_notices(r->model, r->optim);
}
/* Whether it is time for what is done every so many steps, and at the end. */
static inline int run_due(const run *r, uint64_t every) {
  return r->step == r->steps || (every && r->step % every == 0);
}
/* train:  37%|######          | 740/2000 [00:21<00:36, 34.9 it/s, loss=2.01] */
static inline void run_progress(const run *r) {
  static double last;
  double now = seconds(), spent = now - r->started;
  int terminal = isatty(2), part = (int)(100 * r->step / r->steps);
  if (now - fmax(last, r->started) < (terminal ? 0.1 : 10)) return;
  last = now;
  double rate = (double)(r->step - r->first) / spent;
  double left = fmin((double)(r->steps - r->step) / rate, 3.5e6);
  fprintf(stderr, "%strain: %3d%%|%-16.*s| %llu/%llu [%02d:%02d<%02d:%02d, %.1f it/s, "
          "loss=%.3f]%s", terminal ? "\r" : "", part, part * 16 / 100, "################",
          (ull)r->step, (ull)r->steps, (int)spent / 60, (int)spent % 60, (int)left / 60,
          (int)left % 60, rate, r->loss, terminal ? "\033[K" : "\n");
  fflush(stderr);
  progress_drawn = terminal;
}
/* Logs the step just counted. spent: seconds. val_loss: NAN where it was not measured;
   note: what is to be printed behind it. */
static inline void run_log(run *r, double norm, double spent, double val_loss,
                           const char *note) {
  char val[32] = "";
  if (val_loss == val_loss) snprintf(val, sizeof val, "%.9g", val_loss);
  r->spent += spent;
  text_add(&r->log, "%llu,%.9g,%s,%.9g,%.9g,%.9g,%.9g\n", (ull)r->step - 1, r->loss, val,
           exf_schedule_lr(&r->schedule, r->step - 1), norm,
           (double)r->per_step / fmax(spent, 1e-9), r->elapsed + seconds() - r->started);
  run_log_weights(r);
  if (r->quiet) return;
  run_progress(r);
  if (!*val) return;
  progress_clear();
  printf("step %6llu   train %.4f   validation %.4f%s   %.1f ms\n", (ull)r->step, r->loss,
         val_loss, note, 1e3 * spent);
  fflush(stdout);
}
/* Ends the program when a step failed, or a validation loss is not finite. */
static inline void run_check(const run *r, double loss) {
  const char *why = exf_error(r->ctx);
  if (!*why && !(fabs(loss) < HUGE_VAL))
    why = "the validation loss is not finite: take a smaller --lr, or another --init";
  if (*why) fail(1, "step %s: %s%s%s", commas(r->step), why,
                 r->owns ? "; the last checkpoint is kept: " : "",
                 r->owns ? path_in(r->out, "checkpoint.safetensors") : "");
}
/* All but summary.json and the checkpoint. First the files of another run are removed,
   its checkpoint before all: without it nothing is resumed. Its model is replaced. */
static inline void run_save_results(run *r) {
  const char *const names[] = {"checkpoint.safetensors", "run.txt", "run.json", "log.csv",
                               "weights.csv", "summary.json"};
  text settings = {0};
  for (int i = r->owns ? 5 : 0; i < 6; i++)
    if (remove(path_in(r->out, names[i])) != 0 && errno != ENOENT)
      fail(1, "cannot remove %s: choose another --out", path_in(r->out, names[i]));
  r->owns = 1;
  run_save_tensors(r, r->model, "model.safetensors", 0);
  run_save_text(r, "log.csv", &r->log);
  run_save_text(r, "weights.csv", &r->weights);
  flags_write(&r->f, FLAG_FREE, &settings);
  run_save_text(r, "run.txt", &settings);
  text_free(&settings);
}
/* It comes last: with a checkpoint of the last step a run is finished. */
static inline void run_save_checkpoint(run *r) {
  run_save_tensors(r, r->model, "checkpoint.safetensors", 1);
}
/* A run that was stopped, and saved, says how to go on; returns its exit status. */
static inline int run_stopped(const run *r, const char *self) {
  if (r->quiet) return 128 + (int)stop_signal;
  printf("stopped after step %s of %s; to continue:\n        ", commas(r->step),
         commas(r->steps));
  print_word(self);
  printf(" train --out ");
  print_word(r->out);
  printf(" --resume\n");
  return 128 + (int)stop_signal;
}
/* What the merge did, on the validation data. */
typedef struct merge_result {
  double val_loss, val_loss_merged;  /* of the model in memory, of the file */
  double max_diff;                   /* largest difference between their logits */
  double gap;                        /* routed: loss with bank minus with router */
  size_t n;                          /* positions or images compared */
} merge_result;
/* Raises *worst to the largest |a - b|; a NaN stays. */
static inline void compare_logits(const exf_tensor *a, const exf_tensor *b,
                                  double *worst) {
  for (size_t i = 0; a && b && i < a->size; i++) {
    double d = fabs((double)a->data[i] - (double)b->data[i]);
    if (*worst >= 0 && !(d <= *worst)) *worst = d;
  }
}
/* Adds a number to summary.json. */
static inline void summary_add(text *t, const char *key, double value) {
  text_add(t, ",\n  \"%s\": ", key);
  text_number(t, value);
}
/* Writes summary.json, with the program's members in `more`, and the checkpoint; tells
   the results. unit: of the loss. next: the command to go on with. */
static inline void run_finish(run *r, const merge_result *m, const text *more,
                              const char *unit, const char *self, const char *next) {
  const char *const keys[] = {"threads", "experts", "steps", "params_train",
    "params_merged", "train_loss", "val_loss", "val_loss_merged", "merge_max_abs_diff",
    "merge_gap", "ms_per_step", "tokens_per_s", "peak_rss_bytes"};
  size_t trained = exf_model_count(r->model), merged = exf_model_count_merged(r->model);
  double ms = r->spent > 0 ? 1e3 * r->spent / (double)(r->step - r->first) : 0;
  double peak = (double)exf_ctx_stats(r->ctx).bytes_peak;
#if HAVE_POSIX && !defined(__APPLE__)      /* which counts bytes, not 1024 of them */
  struct rusage usage;
  if (getrusage(RUSAGE_SELF, &usage) == 0) peak = 1024 * (double)usage.ru_maxrss;
#endif
  const double values[] = {(double)r->threads, r->ffn ? (double)r->experts : 1,
    (double)r->steps, (double)trained, (double)merged, r->loss, m->val_loss,
    m->val_loss_merged, m->max_diff, m->gap, ms,
    ms > 0 ? 1e3 * (double)r->per_step / ms : 0, peak};
  text t = {0};
  text_add(&t, "{\n  \"task\": \"%s\",\n  \"ffn\": \"%s\",\n  \"isa\": \"%s\",\n"
           "  \"seed\": %llu", r->task, exf_variant_name((exf_variant)r->ffn),
           exf_isa_name(exf_ctx_desc(r->ctx).isa), (ull)r->seed);
  for (int i = 0; i < 13; i++) summary_add(&t, keys[i], values[i]);
  text_add(&t, "%s\n}\n", more ? more->s : "");
  run_save_text(r, "summary.json", &t);
  text_free(&t);
  run_save_checkpoint(r);
  if (r->quiet) return;
  printf("done    %s steps in %.1f s, %.1f ms each; peak memory %.0f MB\n",
         commas(r->steps), r->elapsed + seconds() - r->started, ms, peak / 1e6);
  printf("params  %s while training -> %s merged into an ordinary dense model\n",
         commas(trained), commas(merged));
  printf("loss    train %.4f, validation %.4f, merged %.4f %s\n", r->loss, m->val_loss,
         m->val_loss_merged, unit);
  printf("merge   largest difference between logits before and after (%s compared): %g\n",
         commas(m->n), m->max_diff);
  if (m->gap < 0 || m->gap > 0)
    printf("gap     %.6f: loss with the bank minus loss with the router\n", m->gap);
  printf("files   ");
  print_plain(r->out);
  printf(": model.safetensors (dense), checkpoint.safetensors, log.csv,\n"
         "        weights.csv, summary.json, run.txt\nnext    ");
  print_word(self);
  printf(" %s ", next);
  print_word(r->out);
  printf("\n");
}
/* Frees everything, the model as well. */
static inline void run_free(run *r) {
  text *const texts[] = {&r->list, &r->geometry, &r->data, &r->log, &r->weights};
  exf_optim_free(r->optim);
  exf_model_free(r->model);
  exf_ctx_free(r->ctx);
  flags_free(&r->f);
  for (int i = 0; i < 5; i++) text_free(texts[i]);
}

/* ---- model files and commands ----------------------------------------------------- */
/* DIR/model.safetensors, or the file itself; until the next call. */
static inline const char *model_path(const char *place) {
  static char path[MAX_PATH_BYTES];
  const char *inside = path_in(place, "model.safetensors");
  if (!*place) fail(2, "an empty name: name a run's folder or a model file");
  snprintf(path, sizeof path, "%s", file_exists(inside) ? inside : place);
  if (!file_exists(path)) fail(1, "cannot open %s (%s): name a run's folder or a model "
                               "file", path, strerror(errno));
  return path;
}
/* The number or the text of "key" in flat JSON, until the next call; NULL: not there. */
static inline const char *json_find(const char *json, const char *key) {
  static char value[256];
  snprintf(value, sizeof value, "\"%s\"", key);
  const char *at = strstr(json, value);
  if (!at) return NULL;
  at += strlen(value);
  at += strspn(at, " :\"");
  snprintf(value, sizeof value, "%.*s", (int)strcspn(at, "\",}"), at);
  return value;
}
/* The exf.config of an open file; "{}" when it has none. */
static inline const char *config_read(const exf_st *st, const char *path) {
  const char *config = exf_st_meta(st, "exf.config");
  if (config && (*config != '{' || config[strlen(config) - 1] != '}'))
    fail(1, "%s: exf.config is not a flat JSON object: write the file anew", path);
  return config ? config : "{}";
}
/* A whole number of it, or `otherwise` when it is not there. */
static inline size_t config_count(const char *config, const char *key, size_t otherwise,
                                  const char *path) {
  const char *value = json_find(config, key);
  size_t n = value ? strlen(value) : 0;
  if (value && (n < 1 || n > 9 || strspn(value, "0123456789") < n))
    fail(1, "%s: exf.config has %.40s for %s: it must be a whole number below 1e9", path,
         value, key);
  return value ? strtoul(value, NULL, 10) : otherwise;
}
/* A command on a model, *place, DIR|FILE, begins; returns a context. */
static inline exf_ctx *command_begin(flags *f, const flag *table, int argc, char **argv,
                                     const char **place, const char *usage) {
  *f = (flags){.n = 0};
  *place = NULL;
  flags_add(f, table);
  flags_parse(f, argc, argv, place, usage);
  if (!*place) fail(2, "no model named: usage: %s", usage);
  exf_ctx *ctx = exf_ctx_new(NULL);
  check(ctx);
  return ctx;
}
/* Names, shapes, count and metadata of a safetensors file. */
static inline int command_info(int argc, char **argv) {
  static const char *const keys[] = {"format", "exf.version", "exf.task", "exf.config",
    "exf.step", "exf.seed", "exf.data", "exf.vocab", "exf.labels"};
  const char *place, *value;
  flags f;
  size_t total = 0, n;
  exf_ctx *ctx = command_begin(&f, &(flag){0}, argc, argv, &place, "info DIR|FILE");
  exf_st *st = open_tensors(ctx, model_path(place));
  for (size_t i = 0; i < exf_st_count(st); i++, total += n) {
    const exf_st_entry *e = exf_st_get(st, i);
    printf("%-5s [", e->dtype);
    n = 1;
    for (int k = 0; k < e->n_dims; n *= e->dim[k++])
      printf("%s%llu", k ? "," : "", (ull)e->dim[k]);
    print_line("] ", e->name);
  }
  printf("%s tensors, %s numbers\n", commas(exf_st_count(st)), commas(total));
  for (int i = 0; i < 9; i++) {
    if ((value = exf_st_meta(st, keys[i])) == NULL) continue;
    printf("%s", keys[i]);
    print_line(": ", value);
  }
  exf_st_close(st);
  exf_ctx_free(ctx);
  return 0;
}

typedef struct command {
  const char *name;
  int (*run)(int argc, char **argv);
} command;
/* main of a program whose first argument names one of n commands. */
static inline int command_run(const char *program, const command *list, int n, int argc,
                              char **argv) {
  char names[64] = "", usage[192];
  int code = 0;
  program_name = program;
  for (int i = 0; i < n; i++) strcat(strcat(names, i ? "|" : ""), list[i].name);
  snprintf(usage, sizeof usage, "usage: %s %s ...  (%s %s --help lists the flags of %s, "
           "and so on)", program, names, program, list[0].name, list[0].name);
  if (argc < 2) fail(2, "no command: %s", usage);
  if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) puts(usage);
  else code = list[choice_find(names, argv[1], "", "the command")].run(argc, argv);
  stdout_check();
  return code;
}

#endif /* EXF_EXAMPLES_COMMON_H */
