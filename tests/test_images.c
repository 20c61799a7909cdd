/* tests/test_images.c - the readers of examples/images.h: what is sound is read to the
   byte, what is hostile, cut or changed is refused with the rule and the offset; patches
   and splits.
     build/tests/test_images png DIR   writes DIR/CLASS/NUMBER.png, for tests/test_vit.sh
   gzip samples are from tests/golden/make_golden_vit.py. */
#define _POSIX_C_SOURCE 200809L
#ifndef TEST_LINKED    /* the Makefile links the implementation in */
#define EXFUSION_IMPLEMENTATION
#endif
#include "../exfusion.h"

#include "test.h"
#include "../examples/common.h"
#include "../examples/images.h"
#include "../examples/vit.h"

/* The bytes are refused as IDX, with this text. */
static void idx_refused(const void *bytes, size_t n, const char *part) {
  unsigned char *exact = memory(n, 1);                    /* so that overreads are seen */
  idx x;
  why w = {""};
  memcpy(exact, bytes, n);
  CHECK(!idx_decode(exact, n, &x, &w));
  CHECK_HAS(w.s, part);
  CHECK(x.data == NULL);
  free(exact);
}
#define IDX_REFUSED(literal, part) idx_refused(literal, sizeof literal - 1, part)

TEST(idx_raw) {
  static const char good[] = "\0\0\x08\x02\0\0\0\x02\0\0\0\x03" "abcdef";
  idx x;
  why w;
  if (!CHECK(idx_decode((const unsigned char *)good, sizeof good - 1, &x, &w))) return;
  CHECK(x.n_dims == 2 && x.dim[0] == 2 && x.dim[1] == 3);
  CHECK(memcmp(x.data, "abcdef", 6) == 0);
  free(x.data);
  IDX_REFUSED("", "byte 0");
  IDX_REFUSED("\0\0\x08", "ends at byte 3");
  IDX_REFUSED("\x89PNG", "byte 0: two zero bytes");
  IDX_REFUSED("\0\0\x0D\x01\0\0\0\0", "byte 2: the numbers are of type 0D");
  IDX_REFUSED("\0\0\x08\0", "byte 3: 0 axes");
  IDX_REFUSED("\0\0\x08\x09", "byte 3: 9 axes");
  IDX_REFUSED("\0\0\x08\x02\0\0\0\x02\0\0\0", "ends at byte 11");
  IDX_REFUSED("\0\0\x08\x01\0\0\0\x02" "a", "promises 2 numbers, 1 bytes follow");
  IDX_REFUSED("\0\0\x08\x01\0\0\0\x02" "abc", "promises 2 numbers, 3 bytes follow");
  IDX_REFUSED("\0\0\x08\x03\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF",
              "the product of the axes");
  IDX_REFUSED("\0\0\x08\x02\x80\0\0\0\x80\0\0\0", "bytes follow");
}

#ifdef STB_IMAGE
static const char *const samples[] = {"stored", "fixed", "dynamic"};

static unsigned char *sample_read(const char *kind, size_t *n) {
  char path[64];
  snprintf(path, sizeof path, "tests/golden/idx-%s.gz", kind);
  return read_file(path, n);
}

static int sample_right(const idx *x) {
  size_t wrong = 0;
  for (size_t i = 0; i < x->size; i++) wrong += x->data[i] != (i * i / 7 + i / 64) % 23;
  return x->n_dims == 3 && x->size == 40 * 8 * 8 && x->dim[0] == 40 && x->dim[1] == 8
         && x->dim[2] == 8 && wrong == 0;
}

TEST(gzip_blocks_of_every_kind) {
  for (size_t k = 0; k < 3; k++) {
    size_t n;
    unsigned char *data = sample_read(samples[k], &n);
    idx x;
    why w = {""};
    if (CHECK(idx_decode(data, n, &x, &w))) {
      CHECK(sample_right(&x));
      free(x.data);
    }
    CHECK_STR(w.s, "");
    free(data);
  }
}

/* Every part that a header may have: an extra field, a name, a comment, a checksum. */
TEST(gzip_headers_of_every_kind) {
  size_t n, at;
  unsigned char *data = sample_read("dynamic", &n), *in = memory(n + 32, 1);
  size_t body = 10 + strlen((const char *)data + 10) + 1;     /* the sample has a name */
  for (int bits = 0; bits < 32; bits++) {
    idx x;
    why w = {""};
    memcpy(in, data, 10);
    in[3] = (unsigned char)bits;
    at = 10;
    if (bits & 4) memcpy(in + at, "\3\0abc", 5), at += 5;
    if (bits & 8) memcpy(in + at, "name", 5), at += 5;
    if (bits & 16) memcpy(in + at, "comment", 8), at += 8;
    if (bits & 2) memcpy(in + at, "hc", 2), at += 2;
    memcpy(in + at, data + body, n - body);
    if (!CHECK(idx_decode(in, at + n - body, &x, &w))) continue;
    CHECK(sample_right(&x));
    free(x.data);
  }
  free(data);
  free(in);
}

/* Every shorter file, and one byte more. */
TEST(gzip_cut_anywhere) {
  for (size_t k = 0; k < 3; k++) {
    size_t n;
    unsigned char *data = sample_read(samples[k], &n);
    for (size_t cut = 0; cut < n; cut++)
      idx_refused(data, cut, cut < 2 ? "byte" : cut < 18 ? "gzip: byte 0" : "gzip");
    data[n] = 'x';
    idx_refused(data, n + 1, "gzip");
    free(data);
  }
}

/* A changed bit is refused wherever it stands, except where gzip gives it no meaning:
   time, system and name in the header, and what fills up the last byte of a block. */
TEST(gzip_changed_anywhere) {
  size_t accepted = 0, outside = 0;
  for (size_t k = 0; k < 3; k++) {
    size_t n;
    unsigned char *data = sample_read(samples[k], &n);
    for (size_t at = 0; at < n; at++) {
      for (int bit = 0; bit < 8; bit += k == 2 ? 1 : 5) {
        idx x;
        why w;
        data[at] ^= (unsigned char)(1 << bit);
        if (idx_decode(data, n, &x, &w)) {
          accepted++;
          CHECK(sample_right(&x));
          outside += at < 3 || at > 15;
          free(x.data);
        }
        data[at] ^= (unsigned char)(1 << bit);
      }
    }
    free(data);
  }
  CHECK(accepted > 0 && outside < 16);
}

/* A file with these blocks, whose end says this checksum and size. */
static void gzip_refused(const void *body, size_t n, uint32_t crc, uint32_t size,
                         const char *part) {
  unsigned char in[256] = {0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 255}, *out = NULL;
  size_t made;
  why w = {""};
  memcpy(in + 10, body, n);
  for (int i = 0; i < 4; i++) in[10 + n + (size_t)i] = (unsigned char)(crc >> 8 * i);
  for (int i = 0; i < 4; i++) in[14 + n + (size_t)i] = (unsigned char)(size >> 8 * i);
  CHECK(!gunzip(in, 10 + n + 8, &out, &made, &w) && out == NULL);
  CHECK_HAS(w.s, part);
}
#define GZIP_REFUSED(literal, size, part) \
  gzip_refused(literal, sizeof literal - 1, 0, size, part)

TEST(gzip_hostile) {
  static const char four[] = "\x01\x04\0\xFB\xFF" "abcd";
  uint32_t crc = crc32_of((const unsigned char *)"abcd", 4);
  CHECK(crc32_of((const unsigned char *)"123456789", 9) == 0xCBF43926u);
  gzip_refused(four, 9, crc, 3, "not the 3 bytes");
  gzip_refused(four, 9, crc, 5, "not the 5 bytes");
  gzip_refused(four, 9, crc + 1, 4, "checksum");
  gzip_refused(four, 9, crc, 0x7FFFFFFF, "more than the file can hold");
  gzip_refused(four, 9, crc, 0xFFFFFFFF, "more than the file can hold");
  GZIP_REFUSED("\x07", 4, "damaged");                   /* a block of kind 3 */
  GZIP_REFUSED("\x01\x04\0\xFA\xFF" "abcd", 4, "damaged");   /* no complement */
  GZIP_REFUSED("\x03\x02", 4, "damaged");               /* a copy of nothing */
  GZIP_REFUSED("\x05\xFC\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF", 4, "damaged");
  IDX_REFUSED("\x1F\x8B\x08\xFF\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "gzip: byte 0");
  IDX_REFUSED("\x1F\x8B\x08\x04\0\0\0\0\0\0\xFF\xFF\0\0\0\0\0\0\0", "does not end");
  /* sound gzip around an IDX file that promises 4 GB */
  IDX_REFUSED("\x1F\x8B\x08\0\0\0\0\0\0\0\x01\x08\0\xF7\xFF\0\0\x08\x01\xFF\xFF\xFF\xFF"
              "\x57\x54\xAA\x6A\x08\0\0\0", "promises 4,294,967,295 numbers, 0 bytes");
}
#else
TEST(gzip_needs_stb_image) {
  IDX_REFUSED("\x1F\x8B\x08\0\0\0\0\0\0\0\x01\0\0\xFF\xFF\0\0\0\0\0\0\0\0",
              "no stb_image");
}
#endif

/* ---- pictures -------------------------------------------------------------------- */

static void pnm_is(const char *bytes, size_t n, size_t width, size_t height,
                   const char *rgb) {
  picture p;
  why w = {""};
  if (!CHECK(picture_decode((const unsigned char *)bytes, n, &p, &w))) {
    printf("  %s\n", w.s);
    return;
  }
  CHECK(p.width == width && p.height == height);
  CHECK(memcmp(p.rgb, rgb, 3 * width * height) == 0);
  free(p.rgb);
}
#define PNM_IS(literal, width, height, rgb) \
  pnm_is(literal, sizeof literal - 1, width, height, rgb)

static void pnm_refused(const char *bytes, size_t n, const char *part) {
  unsigned char *exact = memory(n, 1);
  picture p;
  why w = {""};
  memcpy(exact, bytes, n);
  CHECK(!pnm_decode(exact, n, &p, &w) && p.rgb == NULL);
  CHECK_HAS(w.s, part);
  free(exact);
}
#define PNM_REFUSED(literal, part) pnm_refused(literal, sizeof literal - 1, part)

TEST(pnm_of_every_kind) {
  PNM_IS("P1\n# bits\n2 1\n10", 2, 1, "\0\0\0\xFF\xFF\xFF");
  PNM_IS("P2 2 1 10\n 0 10", 2, 1, "\0\0\0\xFF\xFF\xFF");
  PNM_IS("P3\n1 1\n255\n1 2 3\n", 1, 1, "\1\2\3");
  PNM_IS("P4\n2 2\n\x80\x40", 2, 2, "\0\0\0\xFF\xFF\xFF\xFF\xFF\xFF\0\0\0");
  PNM_IS("P5 1 2 255\nab", 1, 2, "aaabbb");
  PNM_IS("P5 1 1 65535\n\x80\x80", 1, 1, "\x80\x80\x80");
  PNM_IS("P5 1 1 9\n\5", 1, 1, "\216\216\216");               /* 141.7 */
  PNM_IS("P6 # c\n1 1 255\nxyz", 1, 1, "xyz");
}

TEST(pnm_refused_with_rule_and_offset) {
  PNM_REFUSED("", "byte 0");
  PNM_REFUSED("P7 1 1 255\n", "byte 0");
  PNM_REFUSED("P5", "width and height");
  PNM_REFUSED("P5 0 1 255\na", "byte 10: width and height");
  PNM_REFUSED("P5 1 -1 255\na", "byte 5: width and height");
  PNM_REFUSED("P5 99999999999999999999 1 255\na", "width and height");
  PNM_REFUSED("P5 8193 1 255\na", "1 to 8192");
  PNM_REFUSED("P5 1 1 0\na", "byte 8: the largest value");
  PNM_REFUSED("P5 1 1 65536\na", "the largest value");
  PNM_REFUSED("P5 2 2 255\nabc", "ends at byte 14");
  PNM_REFUSED("P6 8192 8192 65535\nabc", "ends at byte 22");
  PNM_REFUSED("P4 9 1\na", "ends at byte 8");
  PNM_REFUSED("P2 2 1 10\n0 11", "byte 14: a value above");
  PNM_REFUSED("P2 2 2 10\n0 1 2 x", "byte 16: a number is missing");
  PNM_REFUSED("P5 1 1 9\na", "a value above");
  PNM_REFUSED("P5 1 1 255xa", "byte 10: one blank");
  PNM_REFUSED("P1 2 1\n1x", "byte 8: a number is missing");
}

/* A PNG of one stored block, by the rules of its specification. */
static void png_chunk(text *t, const char *name, const unsigned char *data, size_t n) {
  unsigned char *all = memory(n + 12, 1);
  uint32_t crc;
  int k;
  for (k = 0; k < 4; k++) all[k] = (unsigned char)(n >> (24 - 8 * k));
  memcpy(all + 4, name, 4);
  if (n) memcpy(all + 8, data, n);
  crc = crc32_of(all + 4, n + 4);
  for (k = 0; k < 4; k++) all[8 + n + (size_t)k] = (unsigned char)(crc >> (24 - 8 * k));
  text_add(t, "%*s", (int)n + 12, "");
  memcpy(t->s + t->n - n - 12, all, n + 12);
  free(all);
}

static text png_write(const unsigned char *rgb, size_t width, size_t height) {
  unsigned char head[13] = {0, 0, (unsigned char)(width >> 8), (unsigned char)width, 0, 0,
                            (unsigned char)(height >> 8), (unsigned char)height, 8, 2};
  size_t n = height * (3 * width + 1), i;
  unsigned char *z = memory(n + 11, 1);
  uint32_t a = 1, b = 0;
  text t = {NULL, 0, 0};
  z[0] = 0x78;
  z[1] = z[2] = 1;
  z[3] = (unsigned char)n;
  z[4] = (unsigned char)(n >> 8);
  z[5] = (unsigned char)~z[3];
  z[6] = (unsigned char)~z[4];
  for (i = 0; i < height; i++)
    memcpy(z + 7 + i * (3 * width + 1) + 1, rgb + i * 3 * width, 3 * width);
  for (i = 0; i < n; i++) a = (a + z[7 + i]) % 65521, b = (b + a) % 65521;
  for (i = 0; i < 4; i++) z[7 + n + i] = (unsigned char)((b << 16 | a) >> (24 - 8 * i));
  text_add(&t, "\211PNG\r\n\032\n");
  png_chunk(&t, "IHDR", head, 13);
  png_chunk(&t, "IDAT", z, n + 11);
  png_chunk(&t, "IEND", NULL, 0);
  free(z);
  return t;
}

TEST(png_through_stb_image) {
#ifdef STB_IMAGE
  unsigned char rgb[5 * 3 * 3];
  size_t i;
  text t;
  picture p;
  why w = {""};
  for (i = 0; i < sizeof rgb; i++) rgb[i] = (unsigned char)(i * 37);
  t = png_write(rgb, 5, 3);
  pnm_is(t.s, t.n, 5, 3, (const char *)rgb);
  for (i = 0; i < t.n; i++) {
    char *exact = memory(i, 1);
    memcpy(exact, t.s, i);
    if (picture_decode((unsigned char *)exact, i, &p, &w)) free(p.rgb);
    else CHECK_HAS(w.s, "PNG, JPEG, BMP and PNM are read"), CHECK(w.s[0] != ' ');
    free(exact);
  }
  CHECK(!picture_decode((const unsigned char *)"GIF89a\1\0\1\0\0\0\0,", 14, &p, &w));
  text_free(&t);
#else
  picture p;
  why w = {""};
  CHECK(!picture_decode((const unsigned char *)"\211PNG", 4, &p, &w));
  CHECK_HAS(w.s, "make STB=");
#endif
}

TEST(resizing) {
  unsigned char in[16 * 16], out[64 * 64], flat[7 * 5];
  size_t i, k;
  long sum = 0, mean = 0;
  for (i = 0; i < 256; i++) in[i] = (unsigned char)(i * 91 % 251), sum += in[i];
  resize(in, 16, 16, 1, out, 16, 16);
  CHECK(memcmp(in, out, 256) == 0);                      /* the same size: the same */
  resize(in, 16, 16, 1, out, 1, 1);
  CHECK(out[0] > 80 && out[0] < 170);
  memset(flat, 93, sizeof flat);
  resize(flat, 7, 5, 1, out, 28, 28);
  for (i = k = 0; i < 28 * 28; i++) k += out[i] == 93;   /* weights sum to one */
  CHECK(k == 28 * 28);
  resize(in, 16, 16, 1, out, 32, 32);                    /* larger: the mean stays */
  for (i = 0; i < 32 * 32; i++) mean += out[i];
  CHECK_NEAR((double)mean / 1024, (double)sum / 256, 1.5);
  for (i = 0; i < 16; i++) in[i] = (unsigned char)(10 * i);
  resize(in, 1, 16, 1, out, 1, 4);                       /* a ramp stays a ramp */
  CHECK(out[1] == 55 && out[2] == 95);
}

/* ---- patches, augmentation, splits ------------------------------------------------ */

/* One picture as patches of 2 x 2, out (4 channels): a byte v as v / 255. */
static void patches(const unsigned char *pixels, size_t channels, int flip, long dx,
                    long dy, exf_real *out) {
  static vit g;
  exf_tensor x = {.data = out, .size = 16 * channels, .shape = {.n = 3, .dim = {1}}};
  g.size = 4;
  g.patch = 2;
  g.channels = channels;
  for (size_t c = 0; c < channels; c++)
    for (int v = 0; v < 256; v++) g.level[c][v] = (exf_real)(v / 255.0);
  vit_picture(&g, pixels, flip, dx, dy, &x, 0);
}

TEST(patches_follow_a_convolution) {
  unsigned char pixels[16];              /* 1 channel is enough for moves, 3 for order */
  unsigned char colour[3 * 16];
  exf_real out[48];
  for (int i = 0; i < 16; i++) pixels[i] = (unsigned char)(i + 1);
  for (int i = 0; i < 48; i++) colour[i] = (unsigned char)i;
  patches(pixels, 1, 0, 0, 0, out);
  CHECK_NEAR(255 * out[0], 1, 1e-4);
  CHECK_NEAR(255 * out[1], 2, 1e-4);
  CHECK_NEAR(255 * out[2], 5, 1e-4);
  CHECK_NEAR(255 * out[4], 3, 1e-4);     /* the second patch is to the right */
  CHECK_NEAR(255 * out[8], 9, 1e-4);
  patches(pixels, 1, 1, 0, 0, out);
  CHECK_NEAR(255 * out[0], 4, 1e-4);     /* mirrored */
  patches(pixels, 1, 0, 1, 0, out);
  CHECK(out[0] < 1e-9 && out[2] < 1e-9); /* right by one: black moves in */
  CHECK_NEAR(255 * out[1], 1, 1e-4);
  patches(pixels, 1, 0, 0, -1, out);
  CHECK_NEAR(255 * out[0], 5, 1e-4);     /* up by one */
  CHECK(out[14] < 1e-9 && out[15] < 1e-9);
  patches(pixels, 1, 1, 1, 0, out);
  CHECK_NEAR(255 * out[1], 4, 1e-4);     /* mirrored, then moved */
  patches(colour, 3, 0, 0, 0, out);
  for (int c = 0; c < 3; c++)
    for (int k = 0; k < 4; k++)
      CHECK_NEAR(255 * out[4 * c + k], 16 * c + k / 2 * 4 + k % 2, 1e-3);
}

TEST(splits) {
  image_set s, other;
  source from = {.data = "generated", .images = "", .size = 20, .val = 400};
  int32_t count[GENERATED_CLASSES] = {0};
  size_t total = 0;
  CHECK(source_read(&s, &from, 5) == from.data);
  source_read(&other, &from, 6);
  CHECK(s.n_split[SPLIT_TEST] == 600 && s.n_split[SPLIT_VAL] == 400);
  CHECK(s.hash != other.hash && s.mean[0] > 0.05 && s.std[0] > 0.1);
  for (int g = 0; g < N_SPLITS; g++) {
    total += s.n_split[g];
    for (size_t i = 0; i < s.n_split[g]; i++) {
      count[s.label[s.index[g][i]]]++;
      CHECK(s.group[s.index[g][i]] == g);
      CHECK(i == 0 || s.index[g][i] > s.index[g][i - 1]);
    }
  }
  CHECK(total == 6000 && count[0] == 600 && count[9] == 600);
  image_set_free(&s);
  image_set_free(&other);
}

/* Names of classes go into metadata, and come back. */
TEST(names_of_classes) {
  static const char *const good[] = {"[\"a\",\"b\"]", "[\"a\" , \"T\\/s \\\"x\\\\\"]"};
  static const char *const bad[] = {"", "[", "[]", "[\"a\"]", "[\"a\",]", "[\"a\",\"b\"",
    "[\"a\",\"b\"]x", "[\"a\",\"b\",\"c\"]", "[\"a\" \"b\"]", "[\"a\",\"b\\\"]",
    "[\"a\",\"b\\", "[\"a\",\"\\n\"]", "[\"a\",\"\\u0041\"]", "[\"a\",\"\n\"]",
    "x\"a\",\"b\"]"};
  for (size_t i = 0; i < 2 + sizeof bad / sizeof *bad; i++) {
    image_set one = {0}, two = {0};
    text t = {0};
    int ok = names_read(&one, i < 2 ? good[i] : bad[i - 2], 2);
    if (!CHECK(ok == (i < 2))) printf("  %s\n", i < 2 ? good[i] : bad[i - 2]);
    if (ok) {
      names_write(one.names, 2, &t);
      CHECK(names_read(&two, t.s, 2) && strcmp(one.names[1], two.names[1]) == 0);
      CHECK_STR(two.names[1], i ? "T/s \"x\\" : "b");
    }
    image_set_free(&one);
    image_set_free(&two);
    text_free(&t);
  }
}

static int write_pngs(const char *dir) {
  static const char *const names[] = {"disc", "ring", "square"};
  unsigned char grey[24 * 20], rgb[3 * 24 * 20], square[32 * 32];
  for (size_t c = 0; c < 3; c++) {
    char folder[MAX_PATH_BYTES];
    strcpy(folder, path_in(dir, names[c]));
    directory_make(folder);
    for (size_t i = 0; i < 60; i++) {
      char name[32];
      draw_generated(11, (uint32_t)(3 * i + c), (int)c, 32, square);
      resize(square, 32, 32, 1, grey, 20, 24);
      for (size_t k = 0; k < sizeof rgb; k++)
        rgb[k] = (unsigned char)(grey[k / 3] >> (k % 3));
      text t = png_write(rgb, 24, 20);
      snprintf(name, sizeof name, "%02u.png", (unsigned)i);
      FILE *file = fopen(path_in(folder, name), "wb");
      if (!file || fwrite(t.s, 1, t.n, file) != t.n || fclose(file) != 0) return 1;
      text_free(&t);
    }
  }
  return 0;
}

int main(int argc, char **argv) {
  program_name = "test_images";
  if (argc == 3 && strcmp(argv[1], "png") == 0) return write_pngs(argv[2]);
  RUN(idx_raw);
#ifdef STB_IMAGE
  RUN(gzip_blocks_of_every_kind);
  RUN(gzip_headers_of_every_kind);
  RUN(gzip_cut_anywhere);
  RUN(gzip_changed_anywhere);
  RUN(gzip_hostile);
#else
  RUN(gzip_needs_stb_image);
#endif
  RUN(pnm_of_every_kind);
  RUN(pnm_refused_with_rule_and_offset);
  RUN(png_through_stb_image);
  RUN(resizing);
  RUN(patches_follow_a_convolution);
  RUN(splits);
  RUN(names_of_classes);
  TEST_MAIN_END;
}
