/* Any bytes as a picture, PNM, by the reader of the examples. It never ends the program:
   it succeeds, or gives one reason and holds nothing. */
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

/* Bits are black or white, grey is three times the same, and bytes up to 255 are
   themselves. */
static void pnm_pixels(const picture *p, int kind) {
  size_t n = p->width * p->height;
  MUST(p->width >= 1 && p->width <= IMAGE_MAX_SIDE);
  MUST(p->height >= 1 && p->height <= IMAGE_MAX_SIDE);
  for (size_t i = 0; i < n; i++) {
    const unsigned char *c = p->rgb + 3 * i;
    if (kind != 3 && kind != 6) MUST(c[0] == c[1] && c[0] == c[2]);
    if (kind == 1 || kind == 4) MUST(c[0] == 0 || c[0] == 255);
  }
}

/* Written as the plainest file, P6 of bytes, it reads as the same. */
static void pnm_again(const picture *p) {
  size_t bytes = 3 * p->width * p->height, n;
  unsigned char *file = (unsigned char *)program_calloc(bytes + 32, 1);
  picture q;
  why w;
  n = (size_t)snprintf((char *)file, 32, "P6 %d %d 255\n", (int)p->width,
                       (int)p->height);
  memcpy(file + n, p->rgb, bytes);
  MUST(pnm_decode(file, n + bytes, &q, &w));
  MUST(q.width == p->width && q.height == p->height);
  MUST(memcmp(q.rgb, p->rgb, bytes) == 0);
  MUST(!pnm_decode(file, n + bytes - 1, &q, &w) && q.rgb == NULL);
}

/* Resized, its pixels stay between the least and the largest. */
static void pnm_fit(picture *p, size_t size) {
  unsigned char out[3 * 12 * 12], least = 255, largest = 0;
  size_t n = 3 * p->width * p->height;
  for (size_t i = 0; i < n; i++) {
    if (p->rgb[i] < least) least = p->rgb[i];
    if (p->rgb[i] > largest) largest = p->rgb[i];
  }
  picture_fit(p, 3, size, out);
  for (size_t i = 0; i < 3 * size * size; i++) MUST(out[i] >= least && out[i] <= largest);
}

/* Memory: three bytes per pixel, so at most three times the file; 24 times where eight
   pixels share a byte. */
static int fuzz_pnm(const uint8_t *data, size_t n) {
  picture p;
  why w = {""};
  int ok, kind;
  program_begin(0);
  ok = pnm_decode(data, n, &p, &w);
  kind = n > 1 && data[0] == 'P' ? data[1] - '0' : 0;
  MUST(program_n == 0 && ok == (w.s[0] == '\0'));
  MUST(block_peak <= (kind == 4 ? 24 : 3) * n);
  if (!ok) {
    fuzz_message(w.s);
    MUST(p.rgb == NULL && blocks == NULL);
    return 0;
  }
  MUST(block_bytes == 3 * p.width * p.height);
  pnm_pixels(&p, kind);
  pnm_again(&p);
  pnm_fit(&p, 1 + n % 12);
  program_finish();
  return 0;
}

FUZZ_MAIN(pnm)
