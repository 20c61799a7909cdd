/* Calls a fuzz target with files: a corpus, what a fuzzer found, or standard input. For
   AFL++, and wherever libFuzzer is not.
     NAME FILE...     each file; without any, standard input */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static int run(FILE *file, const char *name) {
  size_t n = 0, room = 1 << 16, got;
  uint8_t *data = (uint8_t *)malloc(room), *exact;
  if (file == NULL || data == NULL) {
    fprintf(stderr, "fuzz: %s cannot be read\n", name);
    return 2;
  }
  while ((got = fread(data + n, 1, room - n, file)) > 0) {
    n += got;
    if (n == room) data = (uint8_t *)realloc(data, room *= 2);
    if (data == NULL) return 2;
  }
  exact = (uint8_t *)malloc(n ? n : 1);   /* a sanitizer sees one byte too many */
  if (exact == NULL) return 2;
  for (got = 0; got < n; got++) exact[got] = data[got];
  free(data);
  LLVMFuzzerTestOneInput(exact, n);
  free(exact);
  return 0;
}

int main(int argc, char **argv) {
  int i, status = 0;
  if (argc < 2) return run(stdin, "standard input");
  for (i = 1; i < argc && status == 0; i++) {
    FILE *file = fopen(argv[i], "rb");
    status = run(file, argv[i]);
    if (file != NULL) fclose(file);
  }
  if (status == 0) printf("%d inputs\n", argc - 1);
  return status;
}
