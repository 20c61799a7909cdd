/* What the fuzz targets of tests/fuzz meet without a fuzzer: the malicious files, whole
   and damaged, the inputs that once were findings, and some thousand random programs.
     test_fuzz --write FOLDER     writes the texts, to start a fuzzer from */
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

enum { RANDOM_PROGRAMS = 4000, RANDOM_TEXTS = 8000, ROUNDS = 8 };

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

TEST(random_programs_are_survived) {
  uint8_t data[300];
  uint32_t k;
  size_t i;
  n_inputs = 0;
  for (k = 0; k < RANDOM_PROGRAMS; k++) {
    size_t n = 20 + exf_rng_u32(12, 0, k, 0) % 280;
    for (i = 0; i < n; i++) data[i] = (uint8_t)exf_rng_u32(12, 1, k, i);
    damaged(fuzz_api, data, n, 0);
  }
  CHECK(n_inputs == RANDOM_PROGRAMS);
}

static const char *const texts[] = {
  "0{\"steps\": 5, \"lr\": 0.001, \"ffn\": \"mb\", \"out\": \"a\\u0041b\", "
  "\"quick\":true}",
  "1{\"width\": 128, \"heads\": 4, \"mu\": 0.95, \"data\": \"x\\n\", \"seed\": 18}",
  "2--steps=5\n--lr\n1e-3\n--ffn\nmb\n--routed\n--quick\n--out\nx", "2--help", "2-h",
  "2--ffn\nno such choice", "2--\33[2J", "0{\"\\n\": 1}",
  "0{\"out\":\"\\u001b[2J\"}", "0",
  "0{", "0{}", "0{\"lr\":nan}", "0{\"lr\":1e999}", "0{\"experts\":-1}", "3[10,32,33,65]",
  "3", "3[", "3[]", "3[1,2", "3[2,1]", "3[256]", "3[1,2]x", "3x1,2]", "41,2.5,,3e5,nan\n",
  "4", "41,2"};

TEST(texts_are_survived_damaged_too) {
  uint32_t k;
  size_t i, n = sizeof texts / sizeof texts[0];
  n_inputs = 0;
  for (k = 0; k < RANDOM_TEXTS; k++)
    damaged(fuzz_flags, (const uint8_t *)texts[k % n], strlen(texts[k % n]),
            k / (uint32_t)n);
  for (i = 0; i < n; i++) damaged(fuzz_flags, (const uint8_t *)texts[i], 1, 0);
  CHECK(n_inputs > RANDOM_TEXTS);
}

static int write_texts(const char *folder) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  char path[512];
  size_t i;
  int failed;
  for (i = 0; i < sizeof texts / sizeof texts[0]; i++) {
    snprintf(path, sizeof path, "%s/text%d", folder, (int)i);
    exf_file_save(ctx, path, texts[i], strlen(texts[i]));
  }
  failed = exf_ctx_status(ctx) != EXF_OK;
  exf_ctx_free(ctx);
  return failed;
}

int main(int argc, char **argv) {
  if (argc == 3 && strcmp(argv[1], "--write") == 0) return write_texts(argv[2]);
  RUN(malicious_files_are_survived_damaged_too);
  RUN(random_programs_are_survived);
  RUN(texts_are_survived_damaged_too);
  TEST_MAIN_END;
}
