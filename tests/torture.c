/* A child saves checkpoints in a loop and is killed at random moments. Each time, what is
   left loads as one checkpoint, whole, none that was complete is lost, and the next save
   removes the temporary file that the child left behind. POSIX only.
     torture [KILLS]     2000 by default */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifdef TEST_LINKED
#include "../exfusion.h"
#else
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"
#endif
#include "test.h"

#include "tiny_gpt.h"

#define FOLDER TEST_TMP "/torture"
#define FILE_NAME FOLDER "/checkpoint"

typedef struct trainer {
  exf_ctx *ctx;
  tiny_gpt g;
  exf_optim *optim;
} trainer;

static trainer trainer_new(void) {
  trainer t;
  exf_desc desc;
  tiny_desc d = tiny_defaults();
  memset(&desc, 0, sizeof desc);
  desc.n_threads = 1;
  d.fusion = tiny_variant(4, 2);
  t.ctx = exf_ctx_new(&desc);
  t.g = tiny_new(t.ctx, &d);
  t.optim = tiny_adamw(t.g.model);
  return t;
}

static void trainer_free(trainer *t) {
  exf_optim_free(t->optim);
  exf_model_free(t->g.model);
  exf_ctx_free(t->ctx);
}

/* What number i of parameter k holds in a version. */
static exf_real value(long version, size_t k, size_t i) {
  return (exf_real)((version * 7 + (long)(k * 131 + i)) % 1000003);
}

static int save(trainer *t, long version) {
  exf_pair meta;
  char text[32];
  size_t k, i;
  for (k = 0; k < exf_model_n_params(t->g.model); k++) {
    exf_tensor *x = &exf_model_param(t->g.model, k)->tensor;
    for (i = 0; i < x->size; i++) x->data[i] = value(version, k, i);
  }
  snprintf(text, sizeof text, "%ld", version);
  meta.key = "version";
  meta.value = text;
  return exf_checkpoint_save(t->g.model, t->optim, FILE_NAME, &meta, 1) == EXF_OK;
}

/* The version in the file; -1 when it does not load or is not all of one version. */
static long load(trainer *t) {
  exf_st *st = exf_st_open(t->ctx, FILE_NAME, NULL);
  const char *text = exf_st_meta(st, "version");
  long version = text ? strtol(text, NULL, 10) : -1;
  size_t k, i;
  if (exf_checkpoint_load_st(t->g.model, t->optim, st) != EXF_OK) version = -1;
  exf_st_close(st);
  for (k = 0; version >= 0 && k < exf_model_n_params(t->g.model); k++) {
    const exf_tensor *x = &exf_model_param(t->g.model, k)->tensor;
    for (i = 0; i < x->size; i++)
      if (memcmp(&x->data[i], &(exf_real){value(version, k, i)}, sizeof(exf_real)) != 0)
        return -1;
  }
  return version;
}

/* Reports each version that is complete through the pipe, until it is killed. */
static void child(int pipe_end) {
  trainer t = trainer_new();
  long version = load(&t);
  while (save(&t, version + 1)) {
    version++;
    if (write(pipe_end, &version, sizeof version) != (ssize_t)sizeof version) break;
  }
  _exit(1);
}

/* The last version that the child reported. */
static long reported(int pipe_end, long version) {
  long next;
  while (read(pipe_end, &next, sizeof next) == (ssize_t)sizeof next) version = next;
  return version;
}

static int leftover(void) { return access(FILE_NAME ".tmp", F_OK) == 0; }

typedef struct counts {
  int kills, during_save, lost, unloadable, not_cleaned;
  long saves;
} counts;

static int one_kill(trainer *t, int k, counts *c) {
  struct timespec wait;
  int ends[2], status;
  long version = load(t), found;
  pid_t pid;
  if (pipe(ends) != 0) return 0;
  pid = fork();
  if (pid < 0) return 0;
  if (pid == 0) {
    close(ends[0]);
    child(ends[1]);
  }
  close(ends[1]);
  wait.tv_sec = 0;
  wait.tv_nsec = (long)(exf_rng_uniform(1, 2, 0, (uint64_t)k) * 1.5e7);
  nanosleep(&wait, NULL);
  kill(pid, SIGKILL);
  if (waitpid(pid, &status, 0) != pid || !WIFSIGNALED(status)) return 0;
  version = reported(ends[0], version);
  close(ends[0]);
  found = load(t);
  c->kills++;
  c->during_save += leftover();
  c->unloadable += found < 0;
  c->lost += found != version && found != version + 1;
  c->saves = found;
  exf_error_clear(t->ctx);
  if (!save(t, found + 1) || leftover()) c->not_cleaned++;
  exf_rewind(t->ctx);
  return 1;
}

int main(int argc, char **argv) {
  int wanted = argc > 1 ? atoi(argv[1]) : 2000, k;
  counts c;
  trainer t = trainer_new();
  memset(&c, 0, sizeof c);
  mkdir("build", 0777);
  mkdir(TEST_TMP, 0777);
  mkdir(FOLDER, 0777);
  if (!save(&t, 0)) {
    fprintf(stderr, "torture: %s\n", exf_error(t.ctx));
    return 2;
  }
  for (k = 0; k < wanted; k++)
    if (!one_kill(&t, k, &c)) {
      fprintf(stderr, "torture: the child could not be run or ended by itself\n");
      return 2;
    }
  trainer_free(&t);
  printf("%d kills, %d of them in the middle of a save, in %ld saves\n", c.kills,
         c.during_save, c.saves);
  printf("%d unloadable, %d complete saves lost, %d temporary files left\n", c.unloadable,
         c.lost, c.not_cleaned);
  return c.unloadable || c.lost || c.not_cleaned || c.during_save == 0;
}
