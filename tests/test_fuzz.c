/* What the fuzz targets of tests/fuzz meet without a fuzzer: their seeds, whole and
   damaged, and some thousand random programs.
     test_fuzz --write FOLDER     writes what a fuzzer starts from, to FOLDER/TARGET */
#define _POSIX_C_SOURCE 200809L
#ifdef TEST_LINKED
#include "../exfusion.h"
#else
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"
#endif
#include "test.h"

#define FUZZ_REPLAY
#include "fuzz/fuzz_api.c"
#include "fuzz/fuzz_safetensors.c"
#include "malicious.h"

#include "fuzz/fuzz_flags.c"
#include "fuzz/fuzz_idx.c"
#include "fuzz/fuzz_pnm.c"
#include "fuzz/seeds.h"

enum { RANDOM_PROGRAMS = 4000, MAX_PROGRAM = 300, ROUNDS = 8 };

static size_t n_inputs;

/* A copy of exactly its size, some bytes of which are others. */
static void damaged(int (*target)(const uint8_t *data, size_t n), const uint8_t *data,
                    size_t n, uint32_t round) {
  uint8_t *copy = (uint8_t *)malloc(n ? n : 1);
  size_t i, changes = n && round ? 1 + round % 3 : 0;
  if (copy == NULL) exit(2);
  if (n) memcpy(copy, data, n);
  for (i = 0; i < changes; i++) {
    uint32_t r = exf_rng_u32(11, round, (uint32_t)n_inputs, i);
    copy[r % n] = (uint8_t)(r >> 24);
  }
  target(copy, n);
  n_inputs++;
  free(copy);
}

static void replay_file(void *user, const malicious *m) {
  uint32_t round;
  (void)user;
  for (round = 0; round < ROUNDS; round++)
    damaged(fuzz_safetensors, m->data, m->n, round);
}

TEST(malicious_files_are_survived_damaged_too) {
  n_inputs = 0;
  malicious_each(replay_file, NULL);
  CHECK(n_inputs > 300 * ROUNDS);
}

static size_t random_program(uint32_t k, uint8_t *data) {
  size_t i, n = 20 + exf_rng_u32(12, 0, k, 0) % (MAX_PROGRAM - 20);
  for (i = 0; i < n; i++) data[i] = (uint8_t)exf_rng_u32(12, 1, k, i);
  return n;
}

TEST(random_programs_are_survived) {
  uint8_t data[MAX_PROGRAM];
  uint32_t k;
  n_inputs = 0;
  for (k = 0; k < RANDOM_PROGRAMS; k++)
    damaged(fuzz_api, data, random_program(k, data), 0);
  CHECK(n_inputs == RANDOM_PROGRAMS);
}

/* Each of n seeds, whole and damaged, `rounds` times. */
static void replay_seeds(int (*target)(const uint8_t *data, size_t n), const seed *seeds,
                         size_t n, uint32_t rounds) {
  uint32_t round;
  size_t i;
  n_inputs = 0;
  for (round = 0; round < rounds; round++)
    for (i = 0; i < n; i++)
      damaged(target, (const uint8_t *)seeds[i].data, seeds[i].n, round);
  CHECK(n_inputs == n * rounds);
}

TEST(seeds_are_sound_or_not) {
  static const char *const names[] = {"[\"a\"]", " [\"a\"]", "[]", "[\"a\"", "[\"a\",]",
                                      "[\"\\u+041\"]", "[\"\\u 041\"]"};
  static image_set set;
  size_t i;
  why w;
  program_begin(0);
  for (i = 0; i < LENGTH(idx_seeds); i++) {
    idx x;
    const unsigned char *data = (const unsigned char *)idx_seeds[i].data;
    CHECK(idx_decode(data, idx_seeds[i].n, &x, &w) == (i < SOUND_IDX));
  }
  for (i = 0; i < LENGTH(pnm_seeds); i++) {
    picture p;
    const unsigned char *data = (const unsigned char *)pnm_seeds[i].data;
    CHECK(picture_decode(data, pnm_seeds[i].n, &p, &w) == (i < SOUND_PNM));
  }
  for (i = 0; i < LENGTH(names); i++) {
    memset(&set, 0, sizeof set);
    CHECK(names_read(&set, names[i], 1) == (i == 0));
  }
  program_finish();
}

TEST(texts_are_survived_damaged_too) {
  replay_seeds(fuzz_flags, text_seeds, LENGTH(text_seeds), 250);
}
TEST(idx_files_are_survived_damaged_too) {
  replay_seeds(fuzz_idx, idx_seeds, LENGTH(idx_seeds), 250);
}
TEST(pnm_files_are_survived_damaged_too) {
  replay_seeds(fuzz_pnm, pnm_seeds, LENGTH(pnm_seeds), 250);
}

/* FOLDER/safetensors/sound-model and sound-checkpoint: what the target's models load. */
static void write_sound(const char *folder) {
  reader *r = reader_get();
  char path[512];
  snprintf(path, sizeof path, "%s/sound-model", folder);
  exf_model_save(r->dense, path, NULL, 0);
  snprintf(path, sizeof path, "%s/sound-checkpoint", folder);
  exf_checkpoint_save(r->banked, r->optim, path, NULL, 0);
  CHECK_OK(r->ctx);
}

static void replay_path(const char *path) {
  static uint8_t data[8192];
  FILE *file = fopen(path, "rb");
  size_t n = file ? fread(data, 1, sizeof data, file) : 0;
  uint32_t round;
  if (file) fclose(file);
  CHECK(n > 100 && n < sizeof data);
  for (round = 0; round < 1000; round++) damaged(fuzz_safetensors, data, n, round);
  remove(path);
}

TEST(sound_files_are_survived_damaged_too) {
  write_sound(TEST_TMP);
  replay_path(TEST_TMP "/sound-model");
  replay_path(TEST_TMP "/sound-checkpoint");
}

/* ---- seeds for a fuzzer ---- */

static void write_seeds(exf_ctx *ctx, const char *folder, const char *name,
                        const seed *seeds, size_t n) {
  char path[512];
  size_t i;
  for (i = 0; i < n; i++) {
    snprintf(path, sizeof path, "%s/%s/%03d", folder, name, (int)i);
    exf_file_save(ctx, path, seeds[i].data, seeds[i].n);
  }
}

static int write_all(const char *folder) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  uint8_t data[MAX_PROGRAM];
  char path[512];
  uint32_t k;
  int failed;
  write_seeds(ctx, folder, "flags", text_seeds, LENGTH(text_seeds));
  write_seeds(ctx, folder, "idx", idx_seeds, LENGTH(idx_seeds));
  write_seeds(ctx, folder, "pnm", pnm_seeds, LENGTH(pnm_seeds));
  for (k = 0; k < RANDOM_PROGRAMS / 10; k++) {
    size_t n = random_program(k, data);
    snprintf(path, sizeof path, "%s/api/%03d", folder, (int)k);
    exf_file_save(ctx, path, data, n);
  }
  snprintf(path, sizeof path, "%s/safetensors", folder);
  write_sound(path);
  failed = exf_ctx_status(ctx) != EXF_OK || test_now.failures > 0;
  exf_ctx_free(ctx);
  return failed;
}

int main(int argc, char **argv) {
  if (argc == 3 && strcmp(argv[1], "--write") == 0) return write_all(argv[2]);
  RUN(malicious_files_are_survived_damaged_too);
  RUN(random_programs_are_survived);
  RUN(seeds_are_sound_or_not);
  RUN(texts_are_survived_damaged_too);
  RUN(idx_files_are_survived_damaged_too);
  RUN(pnm_files_are_survived_damaged_too);
  RUN(sound_files_are_survived_damaged_too);
  TEST_MAIN_END;
}
