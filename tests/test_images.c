/* tests/test_images.c - the readers of examples/images.h: what is sound is read to the
   byte, what is hostile, cut or changed is refused with the rule and the offset.
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

static const char *const samples[] = {"stored", "fixed", "dynamic"};

static unsigned char *sample_read(const char *kind, size_t *n) {
  char path[64];
  snprintf(path, sizeof path, "tests/golden/idx-%s.gz", kind);
  return read_file(path, n);
}

static int sample_right(const idx *x) {
  size_t i, wrong = 0;
  for (i = 0; i < x->size; i++) wrong += x->data[i] != (i * i / 7 + i / 64) % 23;
  return x->n_dims == 3 && x->size == 40 * 8 * 8 && x->dim[0] == 40 && x->dim[1] == 8
         && x->dim[2] == 8 && wrong == 0;
}

/* The bytes are refused as IDX, with this text. */
static void idx_refused(const void *bytes, size_t n, const char *part) {
  unsigned char *exact = (unsigned char *)memory(n, 1);   /* so that overreads are seen */
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

TEST(gzip_blocks_of_every_kind) {
  size_t k, n;
  for (k = 0; k < 3; k++) {
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

/* Every shorter file, and one byte more. */
TEST(gzip_cut_anywhere) {
  size_t k, n, cut;
  for (k = 0; k < 3; k++) {
    unsigned char *data = sample_read(samples[k], &n);
    for (cut = 0; cut < n; cut++)
      idx_refused(data, cut, cut < 2 ? "byte" : cut < 18 ? "gzip: byte 0" : "gzip");
    data[n] = 'x';
    idx_refused(data, n + 1, "must follow and end the file");
    free(data);
  }
}

/* A changed bit is refused wherever it stands, except where gzip gives it no meaning:
   time, system and name in the header, and what fills up the last byte of a block. */
TEST(gzip_changed_anywhere) {
  size_t k, n, at, accepted = 0, outside = 0;
  int bit;
  for (k = 0; k < 3; k++) {
    unsigned char *data = sample_read(samples[k], &n);
    for (at = 0; at < n; at++) {
      for (bit = 0; bit < 8; bit += k == 2 ? 1 : 5) {
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

static void gzip_refused(const void *body, size_t n, size_t n_out, const char *part) {
  unsigned char in[256] = {0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 255}, out[64];
  size_t made;
  why w = {""};
  memcpy(in + 10, body, n);
  CHECK(!gunzip(in, 10 + n + 8, out, n_out, 0, &made, &w));
  CHECK_HAS(w.s, part);
}
#define GZIP_REFUSED(literal, n_out, part) \
  gzip_refused(literal, sizeof literal - 1, n_out, part)

TEST(prefix_codes) {
  static const unsigned char lengths[][4] = {
    {1, 2, 3, 3}, {0, 1, 0, 0}, {0, 0, 0, 0}, {2, 2, 2, 2}, {1, 1, 1, 0}, {1, 2, 0, 0},
    {2, 2, 2, 0}, {1, 2, 2, 3}};
  static const int good[] = {1, 1, 1, 1, 0, 0, 0, 0};
  huffman h;
  size_t i;
  for (i = 0; i < 8; i++) CHECK(huffman_build(&h, lengths[i], 4) == good[i]);
}

TEST(gzip_hostile) {
  /* 4 GiB of zeros promised by a file of a few bytes */
  unsigned char bomb[64] = {0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 255};
  static const unsigned char body[] = {1, 8, 0, 0xF7, 0xFF, 0, 0, 8, 1, 255, 255, 255,
                                       255};
  memcpy(bomb + 10, body, sizeof body);
  idx_refused(bomb, 10 + sizeof body + 8, "more than");
  GZIP_REFUSED("\x07", 4, "unknown kind 3");
  GZIP_REFUSED("\x01\x04\0\xFA\xFF" "abcd", 4, "complement");
  GZIP_REFUSED("\x01\x05\0\xFA\xFF" "abcde", 4, "longer than the 4 bytes");
  GZIP_REFUSED("\x01\x03\0\xFC\xFF" "abc", 4, "end after 3 bytes");
  GZIP_REFUSED("\x03\x02", 4, "before the start");      /* a copy of nothing */
  GZIP_REFUSED("\x05\xFC\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF", 4, "no prefix code");
  IDX_REFUSED("\x1F\x8B\x08\xFF\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "gzip: byte 0");
  IDX_REFUSED("\x1F\x8B\x08\x04\0\0\0\0\0\0\xFF\xFF\0\0\0\0\0\0\0", "does not end");
}

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
  unsigned char *exact = (unsigned char *)memory(n, 1);
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
  unsigned char *all = (unsigned char *)memory(n + 12, 1);
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
  unsigned char *z = (unsigned char *)memory(n + 11, 1);
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
    char *exact = (char *)memory(i, 1);
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

TEST(patches_follow_a_convolution) {
  unsigned char pixels[2 * 16];          /* 1 channel is enough for moves, 3 for order */
  unsigned char colour[3 * 16];
  const double zero[3] = {0, 0, 0}, one[3] = {1, 1, 1}, half[3] = {0.5, 0.5, 0.5};
  exf_real out[48];
  lens l = lens_new(1, 4, 2, zero, one);
  int i, c, k;
  for (i = 0; i < 16; i++) pixels[i] = (unsigned char)(i + 1);
  for (i = 0; i < 48; i++) colour[i] = (unsigned char)i;
  lens_patches(&l, pixels, 0, 0, 0, out);
  CHECK_NEAR(255 * out[0], 1, 1e-4);
  CHECK_NEAR(255 * out[1], 2, 1e-4);
  CHECK_NEAR(255 * out[2], 5, 1e-4);
  CHECK_NEAR(255 * out[4], 3, 1e-4);     /* the second patch is to the right */
  CHECK_NEAR(255 * out[8], 9, 1e-4);
  lens_patches(&l, pixels, 1, 0, 0, out);
  CHECK_NEAR(255 * out[0], 4, 1e-4);     /* mirrored */
  lens_patches(&l, pixels, 0, 1, 0, out);
  CHECK(out[0] < 1e-9 && out[2] < 1e-9); /* right by one: black moves in */
  CHECK_NEAR(255 * out[1], 1, 1e-4);
  lens_patches(&l, pixels, 0, 0, -1, out);
  CHECK_NEAR(255 * out[0], 5, 1e-4);     /* up by one */
  CHECK(out[14] < 1e-9 && out[15] < 1e-9);
  lens_patches(&l, pixels, 1, 1, 0, out);
  CHECK_NEAR(255 * out[1], 4, 1e-4);     /* mirrored, then moved */
  l = lens_new(3, 4, 2, zero, half);
  lens_patches(&l, colour, 0, 0, 0, out);
  for (c = 0; c < 3; c++)
    for (k = 0; k < 4; k++)
      CHECK_NEAR(127.5 * out[4 * c + k], 16 * c + k / 2 * 4 + k % 2, 1e-3);
}

TEST(splits_and_shuffles) {
  image_set s, other;
  size_t order[100], again[100], seen[100] = {0}, i, k, g, total = 0, moved = 0;
  int32_t count[GENERATED_CLASSES] = {0};
  shuffle(order, 100, 7, "data", 3);
  shuffle(again, 100, 7, "data", 3);
  CHECK(memcmp(order, again, sizeof order) == 0);
  shuffle(again, 100, 7, "data", 4);
  for (i = 0; i < 100; i++) seen[order[i]]++, moved += order[i] != again[i];
  for (i = k = 0; i < 100; i++) k += seen[i] == 1;
  CHECK(k == 100 && moved > 80);
  images_generated(&s, 5, 20, 300);
  images_split(&s, 5, 20, "generated");
  images_generated(&other, 6, 20, 300);
  images_split(&other, 6, 20, "generated");
  CHECK(s.n_split[SPLIT_TEST] == 30 && s.n_split[SPLIT_VAL] == 20);
  CHECK(s.hash != other.hash && s.mean[0] > 0.05 && s.std[0] > 0.1);
  memset(order, 0, sizeof order);
  for (g = 0; g < N_SPLITS; g++)
    for (i = 0, total += s.n_split[g]; i < s.n_split[g]; i++)
      count[s.label[s.index[g][i]]]++, CHECK(s.group[s.index[g][i]] == g);
  CHECK(total == 300 && count[0] == 30 && count[9] == 30);
  image_set_free(&s);
  image_set_free(&other);
}

static int write_pngs(const char *dir) {
  static const char *const names[] = {"disc", "ring", "square"};
  unsigned char grey[24 * 20], rgb[3 * 24 * 20], square[32 * 32];
  size_t i, c, k;
  for (c = 0; c < 3; c++) {
    char *folder = path_in(dir, names[c]);
    directory_make(folder);
    for (i = 0; i < 60; i++) {
      char name[32], *path;
      text t;
      FILE *file;
      draw_generated(11, (uint32_t)(3 * i + c), (int)c, 32, square);
      resize(square, 32, 32, 1, grey, 20, 24);
      for (k = 0; k < sizeof rgb; k++) rgb[k] = (unsigned char)(grey[k / 3] >> (k % 3));
      t = png_write(rgb, 24, 20);
      snprintf(name, sizeof name, "%02u.png", (unsigned)i);
      path = path_in(folder, name);
      file = fopen(path, "wb");
      if (!file || fwrite(t.s, 1, t.n, file) != t.n || fclose(file) != 0) return 1;
      free(path);
      text_free(&t);
    }
    free(folder);
  }
  return 0;
}

int main(int argc, char **argv) {
  program_name = "test_images";
  if (argc == 3 && strcmp(argv[1], "png") == 0) return write_pngs(argv[2]);
  RUN(idx_raw);
  RUN(gzip_blocks_of_every_kind);
  RUN(gzip_cut_anywhere);
  RUN(gzip_changed_anywhere);
  RUN(prefix_codes);
  RUN(gzip_hostile);
  RUN(pnm_of_every_kind);
  RUN(pnm_refused_with_rule_and_offset);
  RUN(png_through_stb_image);
  RUN(resizing);
  RUN(patches_follow_a_convolution);
  RUN(splits_and_shuffles);
  TEST_MAIN_END;
}
