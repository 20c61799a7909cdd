/* tests/fuzz/fuzz.h - what the fuzz targets share. A target is a function

     int fuzz_NAME(const uint8_t *data, size_t n)

   that is called with any bytes and must return 0; what must hold is said with MUST,
   which ends the program. FUZZ_MAIN(NAME) makes it libFuzzer's target, and that of
   main.c; with FUZZ_REPLAY several targets go into one program. */
#ifndef FUZZ_H
#define FUZZ_H

#include "../test.h"

#include "../heap.h"

#define MUST(cond) \
  do { \
    if (!(cond)) { \
      fprintf(stderr, "%s:%d: must hold: %s\n", __FILE__, __LINE__, #cond); \
      abort(); \
    } \
  } while (0)

#ifdef FUZZ_REPLAY
#define FUZZ_MAIN(name)
#else
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
#define FUZZ_MAIN(name) \
  int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) { \
    return fuzz_##name(data, n); \
  }
#endif

/* One line, printable, not empty. */
static TEST_UNUSED void fuzz_message(const char *message) {
  size_t i;
  MUST(message[0] != '\0');
  for (i = 0; message[i]; i++)
    MUST((unsigned char)message[i] >= 0x20 && message[i] != 0x7f);
}

/* A context that lives as long as the program, on a heap of its own. */
static TEST_UNUSED exf_ctx *fuzz_ctx(heap *h, const exf_files *files) {
  exf_desc desc;
  memset(&desc, 0, sizeof desc);
  heap_use(h, &desc);
  desc.n_threads = 1;
  desc.files = files;
  return exf_ctx_new(&desc);
}

#endif /* FUZZ_H */
