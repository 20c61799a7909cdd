/* Any bytes as an IDX file, raw or gzip, where stb_image unpacks it, by the reader of
   the examples. It never ends the program: it succeeds, or gives one reason and holds
   nothing. */
#define _POSIX_C_SOURCE 200809L
#ifdef TEST_LINKED
#define EXF__IMPLEMENTED   /* charlm.c asks for the implementation */
#include "../../exfusion.h"
#elif !defined(FUZZ_REPLAY)
#define EXFUSION_IMPLEMENTATION
#include "../../exfusion.h"
#endif
#include "fuzz.h"

#include "program.h"

/* DEFLATE makes at most 1032 bytes of one. */
enum { MOST_FROM_ONE = 1032, GZIP_AROUND = 10 + 5 + 8 };

/* The same numbers, and no byte of them unread. */
static void idx_same(const idx *a, const idx *b) {
  size_t product = 1;
  for (size_t i = 0; i < (size_t)a->n_dims; i++) {
    MUST(a->dim[i] == b->dim[i]);
    product *= a->dim[i];
  }
  MUST(a->n_dims >= 1 && a->n_dims <= 8 && a->n_dims == b->n_dims);
  MUST(product == a->size && a->size == b->size);
  MUST(memcmp(a->data, b->data, a->size) == 0);
}

/* Checksum and size of n bytes at the end of a gzip file. */
static void gzip_end(uint8_t *end, const uint8_t *data, size_t n) {
  uint32_t crc = crc32_of(data, n);
  for (int i = 0; i < 4; i++) {
    end[i] = (uint8_t)(crc >> 8 * i);
    end[4 + i] = (uint8_t)(n >> 8 * i & 255);
  }
}

/* A raw file that is read reads the same when it is wrapped in gzip, as one stored block;
   with a checksum that is wrong it does not, nor with a size that is. */
static void idx_wrapped(const uint8_t *data, size_t n, const idx *x) {
  uint8_t *z = (uint8_t *)program_calloc(n + GZIP_AROUND, 1);
  idx y;
  why w = {""};
  z[0] = 0x1F, z[1] = 0x8B, z[2] = 8, z[10] = 1;
  for (int i = 0; i < 2; i++) {
    z[11 + i] = (uint8_t)(n >> 8 * i & 255);
    z[13 + i] = (uint8_t)(~n >> 8 * i & 255);
  }
  memcpy(z + 15, data, n);
  gzip_end(z + 15 + n, data, n);
#ifdef STB_IMAGE
  MUST(idx_decode(z, n + GZIP_AROUND, &y, &w));
  idx_same(x, &y);
  program_free(y.data);
  z[15 + n] ^= 1;
  MUST(!idx_decode(z, n + GZIP_AROUND, &y, &w) && strstr(w.s, "checksum") != NULL);
  z[15 + n] ^= 1;
  z[19 + n] ^= 1;
#else
  (void)x;
#endif
  MUST(!idx_decode(z, n + GZIP_AROUND, &y, &w) && y.data == NULL);
  program_free(z);
}

/* Memory: a raw file takes what it holds; gzip what its end promises, if so much can be
   in the file at all. */
static int fuzz_idx(const uint8_t *data, size_t n) {
  idx x;
  why w = {""};
  int packed = n >= 2 && data[0] == 0x1F && data[1] == 0x8B, ok;
  size_t begin;
  program_begin(0);
  ok = idx_decode(data, n, &x, &w);
  MUST(program_n == 0 && ok == (w.s[0] == '\0'));
  MUST(block_peak <= (packed ? MOST_FROM_ONE * (n + 1) : n));
  if (!ok) {
    fuzz_message(w.s);
    MUST(strncmp(w.s, "gzip: ", 6) == 0 || strncmp(w.s, "idx: ", 5) == 0);
    MUST(x.data == NULL && blocks == NULL);
    return 0;
  }
  begin = 4 + 4 * (size_t)x.n_dims;
  idx_same(&x, &x);
  MUST(block_peak == begin + x.size && block_bytes == block_peak);
  if (!packed) {
    MUST(n == begin + x.size && memcmp(x.data, data + begin, x.size) == 0);
    if (n < 65536) idx_wrapped(data, n, &x);
  }
  program_finish();
  return 0;
}

FUZZ_MAIN(idx)

#if defined(FUZZ_LIBFUZZER) && defined(STB_IMAGE)
size_t LLVMFuzzerMutate(uint8_t *data, size_t n, size_t max);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t n, size_t max, unsigned seed);

/* Mostly the end is put right again, or hardly a mutant would come past the checksum. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t n, size_t max, unsigned seed) {
  static unsigned char out[1 << 16];
  int made;
  n = LLVMFuzzerMutate(data, n, max);
  if (seed % 8 == 0 || n < 18 || data[0] != 0x1F || data[1] != 0x8B || data[3] != 0)
    return n;
  made = stbi_zlib_decode_noheader_buffer((char *)out, (int)sizeof out,
                                          (const char *)data + 10, (int)(n - 10));
  if (made >= 0) gzip_end(data + n - 8, out, (size_t)made);
  return n;
}
#endif
