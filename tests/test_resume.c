/* Resuming: a run that was stopped after any step, in the middle of an epoch, and goes on
   with another number of threads, ends with the bits of a run that was not. First by the
   library, then by charlm itself, which is stopped by a signal. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#ifdef TEST_LINKED
#define EXF__IMPLEMENTED  /* charlm.c asks for it, but it is linked in */
#endif
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"

#include "test.h"
#include "tiny_gpt.h"

#define STEPS 50
#define FOLDER TEST_TMP "/resume"

/* charlm, its main renamed: step_begins raises the signal after stop_after steps. */
static uint64_t stop_after;
static void step_begins(exf_ctx *ctx, uint64_t step);
int charlm_main(int argc, char **argv);
#define exf_step_begin step_begins
#define main charlm_main
#include "../examples/charlm.c"
#undef main
#undef exf_step_begin

static void step_begins(exf_ctx *ctx, uint64_t step) {
  exf_step_begin(ctx, step);
  if (step + 1 == stop_after) raise(SIGINT);
}

/* ---- by the library --------------------------------------------------------------- */

#define CHECKPOINT FOLDER "/library.safetensors"

typedef struct trained {
  exf_ctx *ctx;
  tiny_gpt g;
  exf_optim *optim;
  double loss[STEPS];
} trained;

static void trained_new(trained *t, const tiny_desc *d, int threads) {
  t->ctx = exf_ctx_new(&(exf_desc){.seed = 5, .n_threads = threads});
  t->g = tiny_new(t->ctx, d);
  t->optim = tiny_adamw(t->g.model);
}

static void trained_free(trained *t) {
  exf_optim_free(t->optim);
  exf_model_free(t->g.model);
  exf_ctx_free(t->ctx);
}

static void trained_run(trained *t, uint64_t from, uint64_t to) {
  for (; from < to; from++)
    t->loss[from] = tiny_train(t->ctx, &t->g, t->optim, from, 1, 1e-2);
}

/* All bytes of the checkpoint this run would leave. */
static char *trained_bytes(trained *t, size_t *n) {
  CHECK(exf_checkpoint_save(t->g.model, t->optim, CHECKPOINT, NULL, 0) == EXF_OK);
  return (char *)read_file(CHECKPOINT, n);
}

/* Stopped after k = 1, 1 + every, ...; parameters, moments, banks and losses. */
static void check_library(const tiny_desc *d, uint64_t steps, uint64_t every) {
  trained whole, first, second;
  size_t n, m;
  char *want, *got;
  trained_new(&whole, d, 1);
  trained_run(&whole, 0, steps);
  want = trained_bytes(&whole, &n);
  trained_new(&first, d, 1);
  trained_run(&first, 0, 1);
  for (uint64_t k = 1; k < steps; k += every) {
    CHECK(exf_checkpoint_save(first.g.model, first.optim, CHECKPOINT, NULL, 0) == EXF_OK);
    trained_new(&second, d, 1 + (int)(k % 3));
    CHECK(exf_checkpoint_load(second.g.model, second.optim, CHECKPOINT) == EXF_OK);
    trained_run(&second, k, steps);
    got = trained_bytes(&second, &m);
    CHECK(n == m && memcmp(want, got, n) == 0);
    CHECK(memcmp(whole.loss + k, second.loss + k, (steps - k) * sizeof(double)) == 0);
    CHECK_OK(second.ctx);
    free(got);
    trained_free(&second);
    trained_run(&first, k, k + every < steps ? k + every : steps);
  }
  CHECK(whole.loss[steps - 1] < whole.loss[0]);
  free(want);
  trained_free(&whole);
  trained_free(&first);
}

TEST(the_library_resumes_after_every_step) {
  tiny_desc d = tiny_defaults();
  d.layers = 1;
  d.width = 8;
  d.hidden = 12;
  d.block = 6;
  d.bias = 1;
  d.dropout = 0.1;
  for (int v = 0; v < TINY_N_VARIANTS; v++) {
    d.fusion = tiny_variant(v, 3);
    check_library(&d, STEPS, v == 4 || v == 6 ? 1 : 7);
  }
}

/* Wide enough for the work to be split. */
TEST(threads_change_no_bit_of_a_resumed_run) {
  tiny_desc d = tiny_defaults();
  d.layers = 1;
  d.width = 64;
  d.hidden = 288;
  d.block = 32;
  d.fusion = tiny_variant(4, 2);
  check_library(&d, 4, 1);
}

/* ---- by the program --------------------------------------------------------------- */

static int run_charlm(uint64_t stop, const char *out, const char *const *words, int n) {
  char *argv[48];
  int argc = 0;
  argv[argc++] = (char *)"charlm";
  argv[argc++] = (char *)"train";
  argv[argc++] = (char *)"--quiet";
  argv[argc++] = (char *)"--out";
  argv[argc++] = (char *)out;
  for (int i = 0; i < n; i++) argv[argc++] = (char *)words[i];
  argv[argc] = NULL;
  stop_after = stop;
  stop_signal = 0;
  return charlm_main(argc, argv);
}

static size_t run_rows(const char *folder) {
  size_t n, rows = 0;
  char *log = (char *)read_file(path_in(folder, "log.csv"), &n);
  for (char *p = log; p < log + n; p++) rows += *p == '\n';
  free(log);
  return rows - 1;
}

/* The file of a run; of log.csv the columns that do not depend on the clock. */
static char *run_file(const char *folder, const char *name, size_t *n) {
  char *data = (char *)read_file(path_in(folder, name), n);
  if (strcmp(name, "log.csv") == 0) {
    size_t kept = 0;
    int column = 0;
    for (size_t i = 0; i < *n; i++) {
      if (data[i] == ',') column++;
      if (data[i] == '\n') column = 0;
      if (column < 5) data[kept++] = data[i];
    }
    *n = kept;
  }
  return data;
}

static void check_same_run(const char *one, const char *two) {
  static const char *const names[] = {"model.safetensors", "checkpoint.safetensors",
                                      "log.csv", "weights.csv"};
  for (int i = 0; i < 4; i++) {
    size_t n, m;
    char *a = run_file(one, names[i], &n), *b = run_file(two, names[i], &m);
    if (!CHECK(n > 0 && n == m && memcmp(a, b, n) == 0))
      printf("  %s/%s differs\n", two, names[i]);
    free(a);
    free(b);
  }
}

#define TRAIN \
  "--data", FOLDER "/text", "--layers", "1", "--heads", "2", "--width", "8", "--block", \
  "8", "--batch", "2", "--steps", "50", "--warmup", "5", "--save-every", "0", "--lr", \
  "0.01", "--experts", "3", "--threads", "1"

/* Stopped after every number of steps, then resumed to the end. */
static void check_charlm(const char *const *words, int n) {
  static const char *const more[3][3] = {{"--resume", "--threads", "1"},
                                         {"--resume", "--threads", "2"},
                                         {"--resume", "--threads", "3"}};
  CHECK(run_charlm(0, FOLDER "/whole", words, n) == 0);
  for (uint64_t k = 1; k < STEPS; k++) {
    CHECK(run_charlm(k, FOLDER "/parts", words, n) == 128 + SIGINT);
    CHECK(run_rows(FOLDER "/parts") == k);
    CHECK(run_charlm(0, FOLDER "/parts", more[k % 3], 3) == 0);
    check_same_run(FOLDER "/whole", FOLDER "/parts");
  }
}

TEST(charlm_resumes) {
  static const char *const shuffle[] = {TRAIN, "--ffn", "mb", "--dropout", "0.1",
                                        "--eval-every", "20"};
  check_charlm(shuffle, (int)(sizeof shuffle / sizeof *shuffle));
}

/* An epoch of 12 batches of two windows: stops fall into the middle of one. */
TEST(charlm_resumes_in_the_middle_of_an_epoch) {
  static const char *const order[] = {TRAIN, "--ffn", "dw", "--order", "sequential",
                                      "--accum", "2", "--eval-every", "0"};
  check_charlm(order, (int)(sizeof order / sizeof *order));
}

int main(void) {
  text words = {0};
  exf_ctx *ctx = exf_ctx_new(NULL);
  directory_make(FOLDER);
  for (int i = 0; i < 25; i++) text_add(&words, "%d is %s.\n", i, i % 2 ? "odd" : "even");
  exf_file_save(ctx, FOLDER "/text", words.s, words.n);
  text_free(&words);
  exf_ctx_free(ctx);
  RUN(the_library_resumes_after_every_step);
  RUN(threads_change_no_bit_of_a_resumed_run);
  RUN(charlm_resumes);
  RUN(charlm_resumes_in_the_middle_of_an_epoch);
  TEST_MAIN_END;
}
