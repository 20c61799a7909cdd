/* golden_hash.c - one number for all bits of training. Every variant trains 50 steps, is
   stopped and resumed in the middle, merged, saved and loaded; what is printed is the
   SHA-256 of all weights, moments and logits. tests/matrix.sh compares it over compilers
   and processors.
     golden_hash [ISA] [threads=N] [locale=NAME] [ftz] [each]
   ISA: ref, sse2, avx2, avx512, neon; none: the best. ftz: as in a host program that
   flushes subnormal numbers to zero. each: a line for every run as well. The last line
   is the hash and the instruction set. */
#ifndef TEST_LINKED
#define EXFUSION_IMPLEMENTATION
#endif
#include "../exfusion.h"

#include "test.h"
#ifndef TEST_TMP
#define TEST_TMP "."
#endif
#include "tiny_gpt.h"

#include <locale.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#define STEPS 50
#define PATH TEST_TMP "/golden_hash.safetensors"

/* ---- SHA-256, FIPS 180-4 ---------------------------------------------------------- */

typedef struct sha256 {
  uint32_t h[8];
  unsigned char block[64];
  uint64_t n;                /* bytes so far */
} sha256;

static const uint32_t sha_start[8] = {
  0x6a09e667u, 0xbb67ae85u, 0x3c6ef372u, 0xa54ff53au,
  0x510e527fu, 0x9b05688cu, 0x1f83d9abu, 0x5be0cd19u
};
static const uint32_t sha_round[64] = {
  0x428a2f98u, 0x71374491u, 0xb5c0fbcfu, 0xe9b5dba5u, 0x3956c25bu, 0x59f111f1u,
  0x923f82a4u, 0xab1c5ed5u, 0xd807aa98u, 0x12835b01u, 0x243185beu, 0x550c7dc3u,
  0x72be5d74u, 0x80deb1feu, 0x9bdc06a7u, 0xc19bf174u, 0xe49b69c1u, 0xefbe4786u,
  0x0fc19dc6u, 0x240ca1ccu, 0x2de92c6fu, 0x4a7484aau, 0x5cb0a9dcu, 0x76f988dau,
  0x983e5152u, 0xa831c66du, 0xb00327c8u, 0xbf597fc7u, 0xc6e00bf3u, 0xd5a79147u,
  0x06ca6351u, 0x14292967u, 0x27b70a85u, 0x2e1b2138u, 0x4d2c6dfcu, 0x53380d13u,
  0x650a7354u, 0x766a0abbu, 0x81c2c92eu, 0x92722c85u, 0xa2bfe8a1u, 0xa81a664bu,
  0xc24b8b70u, 0xc76c51a3u, 0xd192e819u, 0xd6990624u, 0xf40e3585u, 0x106aa070u,
  0x19a4c116u, 0x1e376c08u, 0x2748774cu, 0x34b0bcb5u, 0x391c0cb3u, 0x4ed8aa4au,
  0x5b9cca4fu, 0x682e6ff3u, 0x748f82eeu, 0x78a5636fu, 0x84c87814u, 0x8cc70208u,
  0x90befffau, 0xa4506cebu, 0xbef9a3f7u, 0xc67178f2u
};

#define ROTR(x, n) ((x) >> (n) | (x) << (32 - (n)))

static void sha_block(uint32_t *state, const unsigned char *p) {
  uint32_t w[64], h[8];
  int i;
  for (i = 0; i < 16; i++, p += 4)
    w[i] = (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
  for (; i < 64; i++)
    w[i] = w[i - 16] + w[i - 7]
           + (ROTR(w[i - 15], 7) ^ ROTR(w[i - 15], 18) ^ w[i - 15] >> 3)
           + (ROTR(w[i - 2], 17) ^ ROTR(w[i - 2], 19) ^ w[i - 2] >> 10);
  memcpy(h, state, sizeof h);
  for (i = 0; i < 64; i++) {
    uint32_t a = h[0], e = h[4], t1, t2;
    t1 = h[7] + (ROTR(e, 6) ^ ROTR(e, 11) ^ ROTR(e, 25)) + ((e & h[5]) ^ (~e & h[6]))
         + sha_round[i] + w[i];
    t2 = (ROTR(a, 2) ^ ROTR(a, 13) ^ ROTR(a, 22))
         + ((a & h[1]) ^ (a & h[2]) ^ (h[1] & h[2]));
    memmove(h + 1, h, 7 * sizeof *h);
    h[4] += t1;
    h[0] = t1 + t2;
  }
  for (i = 0; i < 8; i++) state[i] += h[i];
}

static void sha_add(sha256 *s, const void *data, size_t n) {
  const unsigned char *p = (const unsigned char *)data;
  for (; n; n--) {
    s->block[s->n++ % 64] = *p++;
    if (s->n % 64 == 0) sha_block(s->h, s->block);
  }
}

static void sha_new(sha256 *s) {
  memcpy(s->h, sha_start, sizeof s->h);
  s->n = 0;
}

/* The hash as 64 hexadecimal digits. */
static void sha_text(sha256 s, char *out) {
  uint64_t bits = s.n * 8;
  unsigned char one = 0x80, zero = 0;
  int i;
  sha_add(&s, &one, 1);
  while (s.n % 64 != 56) sha_add(&s, &zero, 1);
  for (i = 56; i >= 0; i -= 8) {
    unsigned char byte = (unsigned char)(bits >> i & 255);
    sha_add(&s, &byte, 1);
  }
  for (i = 0; i < 8; i++) snprintf(out + 8 * i, 9, "%08lx", (unsigned long)s.h[i]);
}

/* The published answers for "" and "abc". */
TEST(sha256_is_right) {
  sha256 s;
  char text[65];
  sha_new(&s);
  sha_text(s, text);
  CHECK_STR(text, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  sha_add(&s, "abc", 3);
  sha_text(s, text);
  CHECK_STR(text, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

/* ---- files ------------------------------------------------------------------------ */

#ifdef EXF_NO_STDIO
/* As a program without the system's files would do it: by hooks, here onto stdio. */
static void *file_open(void *user, const char *path, int write) {
  (void)user;
  return (void *)fopen(path, write ? "wb" : "rb");
}
static int64_t file_size(void *user, void *file) {
  long n;
  (void)user;
  if (fseek((FILE *)file, 0, SEEK_END) != 0) return -1;
  n = ftell((FILE *)file);
  rewind((FILE *)file);
  return (int64_t)n;
}
static int64_t file_read(void *user, void *file, void *data, size_t bytes) {
  (void)user;
  return (int64_t)fread(data, 1, bytes, (FILE *)file);
}
static int64_t file_write(void *user, void *file, const void *data, size_t bytes) {
  (void)user;
  return (int64_t)fwrite(data, 1, bytes, (FILE *)file);
}
static int file_sync(void *user, void *file) {
  (void)user;
  return fflush((FILE *)file);
}
static int file_close(void *user, void *file) {
  (void)user;
  return fclose((FILE *)file);
}
static int file_rename(void *user, const char *from, const char *to) {
  (void)user;
  remove(to);
  return rename(from, to);
}
static int file_remove(void *user, const char *path) {
  (void)user;
  return remove(path);
}
static int file_sync_dir(void *user, const char *path) {
  (void)user;
  (void)path;
  return 0;
}
static const exf_files file_hooks = {
  NULL, file_open, file_size, file_read, file_write, file_sync, file_close, file_rename,
  file_remove, file_sync_dir
};
#endif

/* ---- runs ------------------------------------------------------------------------- */

static exf_isa option_isa;
static int option_threads, option_each;
static sha256 all;           /* of all runs */
static char isa_name[16];

static exf_ctx *new_ctx(void) {
  exf_desc desc;
  exf_ctx *ctx;
  memset(&desc, 0, sizeof desc);
  desc.seed = 20;
  desc.isa = option_isa;
  desc.n_threads = option_threads;
#ifdef EXF_NO_STDIO
  desc.files = &file_hooks;
#endif
  ctx = exf_ctx_new(&desc);
  if (CHECK(ctx != NULL)) snprintf(isa_name, sizeof isa_name, "%s",
                                   exf_isa_name(exf_ctx_desc(ctx).isa));
  return ctx;
}

/* Names and numbers, little-endian on every machine, of the file at PATH. */
static void hash_file(exf_ctx *ctx, sha256 *s) {
  exf_st *st = exf_st_open(ctx, PATH, NULL);
  size_t i;
  CHECK(exf_st_count(st) > 0);
  for (i = 0; i < exf_st_count(st); i++) {
    const exf_st_entry *e = exf_st_get(st, i);
    sha_add(s, e->name, strlen(e->name) + 1);
    sha_add(s, e->data, e->bytes);
  }
  exf_st_close(st);
}

/* One run: a model, its optimizer, the first loss and the mean of the last five. */
typedef struct training {
  exf_ctx *ctx;
  tiny_gpt g;
  exf_optim *optim;
  double first, last;
} training;

static void training_new(training *t, const tiny_desc *d) {
  memset(t, 0, sizeof *t);
  t->ctx = new_ctx();
  t->g = tiny_new(t->ctx, d);
  t->optim = tiny_adamw(t->g.model);
}

static void training_free(training *t) {
  exf_optim_free(t->optim);
  exf_model_free(t->g.model);
  exf_ctx_free(t->ctx);
}

static void training_run(training *t, uint64_t from, uint64_t to, uint64_t steps) {
  exf_schedule schedule = {EXF_SCHEDULE_COSINE, 2e-2, 2e-3, 5, 0};
  uint64_t s;
  schedule.steps = steps;
  for (s = from; s < to; s++) {
    double loss = tiny_train(t->ctx, &t->g, t->optim, s, 1,
                             exf_schedule_lr(&schedule, s));
    if (s == 0) t->first = loss;
    if (s + 5 >= steps) t->last += loss / 5;
  }
}

static void check_run(const char *name, const tiny_desc *d, uint64_t steps) {
  training whole, half;
  tiny_desc dense = *d;
  exf_real *fused, *merged, *loaded;
  exf_st *st;
  size_t n, n2, n3;
  sha256 mine;
  char text[65];
  sha_new(&mine);
  training_new(&whole, d);
  training_run(&whole, 0, steps / 2, steps);
  exf_checkpoint_save(whole.g.model, whole.optim, PATH, NULL, 0);
  training_run(&whole, steps / 2, steps, steps);
  training_new(&half, d);    /* resumed in the middle: the same bits at the end */
  st = exf_st_open(half.ctx, PATH, NULL);
  exf_checkpoint_load_st(half.g.model, half.optim, st);
  exf_st_close(st);
  training_run(&half, steps / 2, steps, steps);
  CHECK(same_params(whole.g.model, half.g.model));
  CHECK_OK(half.ctx);
  training_free(&half);
  if (steps == STEPS && !CHECK(whole.last < whole.first - 0.2))
    printf("  %s: loss %g, then %g\n", name, whole.first, whole.last);

  exf_checkpoint_save(whole.g.model, whole.optim, PATH, NULL, 0);
  hash_file(whole.ctx, &mine);
  fused = tiny_eval(whole.ctx, &whole.g, &n);
  exf_model_save(whole.g.model, PATH, NULL, 0);
  hash_file(whole.ctx, &mine);
  exf_optim_free(whole.optim);
  whole.optim = NULL;
  CHECK(exf_model_merge(whole.g.model) == EXF_OK);
  merged = tiny_eval(whole.ctx, &whole.g, &n2);
  memset(&dense.fusion, 0, sizeof dense.fusion);
  training_new(&half, &dense);
  st = exf_st_open(half.ctx, PATH, NULL);
  CHECK(exf_model_load_st(half.g.model, st) == EXF_OK);
  exf_st_close(st);
  loaded = tiny_eval(half.ctx, &half.g, &n3);
  CHECK(n == n2 && same_bits(fused, merged, n));
  CHECK(n == n3 && same_bits(fused, loaded, n));
  CHECK_OK(whole.ctx);
  CHECK_OK(half.ctx);
  training_free(&half);
  training_free(&whole);
  free(fused);
  free(merged);
  free(loaded);
  CHECK(remove(PATH) == 0);
  sha_text(mine, text);
  sha_add(&all, text, 64);
  if (option_each) printf("%s  %s\n", text, name);
}

/* Every variant with another activation; sizes that fill no vector. */
TEST(variants_train_resume_and_merge) {
  tiny_desc d = tiny_defaults();
  int i;
  d.layers = 1;
  d.width = 12;
  d.hidden = 20;
  d.block = 7;
  d.dropout = 0.05;
  for (i = 0; i < TINY_N_VARIANTS; i++) {
    d.act = (exf_act)(i % 5);
    d.bias = i % 2;
    d.fusion = tiny_variant(i, 3);
    check_run(tiny_variant_names[i], &d, STEPS);
  }
}

/* Large enough for threads, blocked sums and several blocks of attention. */
TEST(a_wide_model_does) {
  tiny_desc d = tiny_defaults();
  d.layers = 1;
  d.width = 64;
  d.hidden = 288;
  d.block = 40;
  d.bias = 1;
  d.fusion = tiny_variant(4, 2);
  check_run("wide mb", &d, 2);
}

/* Sizes are printed right, and no number reads a locale. */
TEST(messages_are_whole) {
  exf_ctx *ctx = new_ctx();
  exf_tensor *a = exf_tensor_new(ctx, exf_shape2(2, 3), NULL);
  CHECK(exf_matmul(ctx, a, a, 0) == NULL);
  CHECK_ERR(ctx, EXF_SHAPE, "(2,3) and (2,3)");
  exf_tensor_new(ctx, exf_shape2((size_t)-1, 3), NULL);
  CHECK(exf_ctx_status(ctx) == EXF_SIZE);
  exf_ctx_free(ctx);
}

static int flush_subnormals(void) {
#if defined(__SSE__)
  _mm_setcsr(_mm_getcsr() | 0x8040u);
  return 1;
#else
  return 0;
#endif
}

static int isa_available(exf_isa isa) {
  exf_desc desc;
  exf_ctx *ctx;
  int ok;
  memset(&desc, 0, sizeof desc);
  desc.isa = isa;
  ctx = exf_ctx_new(&desc);
  ok = exf_ctx_status(ctx) == EXF_OK;
  exf_ctx_free(ctx);
  option_isa = isa;
  return ok;
}

static int option_read(const char *arg) {
  int isa;
  if (strncmp(arg, "threads=", 8) == 0) option_threads = atoi(arg + 8);
  else if (strncmp(arg, "locale=", 7) == 0)
    return setlocale(LC_ALL, arg + 7) != NULL && localeconv()->decimal_point[0] == ',';
  else if (strcmp(arg, "ftz") == 0) return flush_subnormals();
  else if (strcmp(arg, "each") == 0) option_each = 1;
  else {
    for (isa = EXF_ISA_REF; isa <= EXF_ISA_NEON; isa++)
      if (strcmp(arg, exf_isa_name((exf_isa)isa)) == 0)
        return isa_available((exf_isa)isa);
    return 0;
  }
  return 1;
}

int main(int argc, char **argv) {
  char text[65];
  int i;
  for (i = 1; i < argc; i++)
    if (!option_read(argv[i])) {
      fprintf(stderr, "golden_hash: %s is not to be had here\n", argv[i]);
      return 2;
    }
  sha_new(&all);
  RUN(sha256_is_right);
  RUN(variants_train_resume_and_merge);
  RUN(a_wide_model_does);
  RUN(messages_are_whole);
  if (test_now.failed) TEST_MAIN_END;
  sha_text(all, text);
  printf("%s %s\n", text, isa_name);
  return 0;
}
