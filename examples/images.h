/* images.h - pictures as data: IDX files (raw or gzip), folders of PNG, JPEG, BMP and
   PNM, generated pictures; splits, augmentation, batches of patches, drawing as text.

   Include exfusion.h and common.h first. PNM is read here; PNG, JPEG and BMP are read by
   stb_image where STB_IMAGE names its header, which the Makefile looks for.
   Bytes from outside are decoded by functions that return 0 and fill a `why`: the rule
   that was broken, and the offset of the byte where it was. */
#ifndef EXF_EXAMPLES_IMAGES_H
#define EXF_EXAMPLES_IMAGES_H

#if HAVE_POSIX
#include <dirent.h>
#endif

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF      /* the same bits everywhere */
#endif

#define IMAGE_MAX_SIDE 8192       /* pixels of a picture in a file */
#define FASHION_DIR "/usr/share/datasets/fashion-mnist"

#ifdef STB_IMAGE
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_ONLY_BMP
#define STBI_NO_GIF
#define STBI_NO_STDIO
#define STBI_NO_SIMD              /* the same pixels everywhere */
#define STBI_MAX_DIMENSIONS IMAGE_MAX_SIDE
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wundef"
#pragma GCC diagnostic ignored "-Wpedantic"
#pragma GCC diagnostic ignored "-Wextra"
#pragma GCC diagnostic ignored "-Wmissing-prototypes"
#endif
#include STB_IMAGE
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#endif

/* ---- reasons ---------------------------------------------------------------------- */

typedef struct why { char s[200]; } why;

PRINTS(2, 3)
static inline int refuse(why *w, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(w->s, sizeof w->s, format, args);
  va_end(args);
  return 0;
}

/* ---- gzip (RFC 1952) and DEFLATE (RFC 1951) --------------------------------------- */

typedef struct inflater {
  const unsigned char *in;
  size_t n, at;            /* bytes of input; the next one */
  uint64_t hold;           /* bits taken from it, the first lowest */
  int held;
  unsigned char *out;
  size_t capacity, made;
  int partial;             /* a full `out` ends the work, instead of being an error */
  why *w;
} inflater;

#define HUFFMAN_FAST 10
typedef struct huffman {
  uint16_t fast[1 << HUFFMAN_FAST];  /* length << 12 | symbol / 0: longer; symbol < 512 */
  uint16_t count[16], symbol[288];   /* codes per length; symbols in order of codes */
} huffman;

/* At least `bits` bits in hold, zeros behind the end of the input. */
static inline void bits_fill(inflater *z, int bits) {
  while (z->held < bits) {
    uint64_t byte = z->at < z->n ? z->in[z->at] : 0;
    z->at++;
    z->hold |= byte << z->held;
    z->held += 8;
  }
}

static inline uint32_t bits_take(inflater *z, int bits) {
  uint32_t value;
  bits_fill(z, bits);
  value = (uint32_t)(z->hold & ((1u << bits) - 1u));
  z->hold >>= bits;
  z->held -= bits;
  return value;
}

/* The byte that the next bit is in. */
static inline size_t bits_offset(const inflater *z) {
  return z->at - (size_t)(z->held / 8);
}

static inline int bits_overrun(inflater *z) {
  if (bits_offset(z) <= z->n) return 0;
  refuse(z->w, "gzip: the data end at byte %s, in the middle of a block", commas(z->n));
  return 1;
}

/* Canonical codes from their lengths. Returns 0 when the lengths are no prefix code; one
   that leaves bit patterns unused must have a single symbol at most. */
static inline int huffman_build(huffman *h, const unsigned char *length, int n) {
  int i, len, left = 1, codes = 0;
  uint16_t offset[16], next[16];
  uint32_t code = 0;
  memset(h, 0, sizeof *h);
  for (i = 0; i < n; i++) h->count[length[i]]++;
  codes = n - h->count[0];
  h->count[0] = 0;
  for (len = 1, offset[1] = 0; len < 16; len++) {
    left = 2 * left - h->count[len];
    if (left < 0) return 0;
    code = (code + h->count[len - 1]) << 1;
    next[len] = (uint16_t)code;
    if (len < 15) offset[len + 1] = (uint16_t)(offset[len] + h->count[len]);
  }
  if (left > 0 && codes > 1) return 0;
  for (i = 0; i < n; i++) {
    uint32_t bits, reversed = 0;
    if ((len = length[i]) == 0) continue;
    h->symbol[offset[len]++] = (uint16_t)i;
    bits = next[len]++;
    if (len > HUFFMAN_FAST) continue;
    for (int k = 0; k < len; k++) reversed |= (bits >> k & 1u) << (len - 1 - k);
    for (; reversed < 1u << HUFFMAN_FAST; reversed += 1u << len)
      h->fast[reversed] = (uint16_t)(len << 12 | i);
  }
  return 1;
}

/* The next symbol, or -1 for bits that are no code. */
static inline int huffman_symbol(inflater *z, const huffman *h) {
  int code = 0, first = 0, index = 0, len;
  uint16_t entry;
  bits_fill(z, 15);
  entry = h->fast[z->hold & ((1u << HUFFMAN_FAST) - 1u)];
  if (entry) {
    z->hold >>= entry >> 12;
    z->held -= entry >> 12;
    return entry & 0x1FF;
  }
  for (len = 1; len < 16; len++) {
    code |= (int)bits_take(z, 1);
    if (code - h->count[len] < first) return h->symbol[index + code - first];
    index += h->count[len];
    first = (first + h->count[len]) << 1;
    code <<= 1;
  }
  return -1;
}

/* Room for k more bytes; with `partial` as many as fit. Returns 0 on an error. */
static inline int inflate_room(inflater *z, size_t *k) {
  size_t left = z->capacity - z->made;
  if (*k <= left) return 1;
  *k = left;
  if (z->partial) return 1;
  return refuse(z->w, "gzip: byte %s: the data are longer than the %s bytes that the "
                "header inside promises", commas(bits_offset(z)), commas(z->capacity));
}

static inline int inflate_stored(inflater *z) {
  uint32_t length, check;
  size_t k;
  bits_take(z, z->held & 7);
  length = bits_take(z, 16);
  check = bits_take(z, 16);
  if (bits_overrun(z)) return 0;
  if (length != (check ^ 0xFFFFu))
    return refuse(z->w, "gzip: byte %s: the length of a stored block and its complement "
                  "differ", commas(bits_offset(z) - 4));
  z->at -= (size_t)(z->held / 8);
  z->hold = 0;
  z->held = 0;
  k = length;
  if (!inflate_room(z, &k)) return 0;
  if (k > z->n - z->at)
    return refuse(z->w, "gzip: the data end at byte %s, in the middle of a stored block",
                  commas(z->n));
  memcpy(z->out + z->made, z->in + z->at, k);
  z->made += k;
  z->at += k;
  return 1;
}

static inline int inflate_lengths(inflater *z, huffman *literal, huffman *distance) {
  static const unsigned char order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3,
                                          13, 2, 14, 1, 15};
  unsigned char length[320] = {0};
  int n_literal = (int)bits_take(z, 5) + 257, n_distance = (int)bits_take(z, 5) + 1;
  int n_code = (int)bits_take(z, 4) + 4, i = 0, s, repeat;
  for (; i < n_code; i++) length[order[i]] = (unsigned char)bits_take(z, 3);
  if (!huffman_build(literal, length, 19) || n_literal > 286)
    return refuse(z->w, "gzip: byte %s: the code lengths of a block are no prefix code",
                  commas(bits_offset(z)));
  memset(length, 0, sizeof length);
  for (i = 0; i < n_literal + n_distance;) {
    s = huffman_symbol(z, literal);
    if (bits_overrun(z)) return 0;
    if (s < 0 || (s == 16 && i == 0))
      return refuse(z->w, "gzip: byte %s: a code length that means nothing",
                    commas(bits_offset(z)));
    if (s < 16) {
      length[i++] = (unsigned char)s;
      continue;
    }
    repeat = s == 16 ? 3 + (int)bits_take(z, 2)
             : s == 17 ? 3 + (int)bits_take(z, 3) : 11 + (int)bits_take(z, 7);
    if (i + repeat > n_literal + n_distance)
      return refuse(z->w, "gzip: byte %s: more code lengths than announced",
                    commas(bits_offset(z)));
    for (s = s == 16 ? length[i - 1] : 0; repeat > 0; repeat--)
      length[i++] = (unsigned char)s;
  }
  if (length[256] == 0 || !huffman_build(literal, length, n_literal)
      || !huffman_build(distance, length + n_literal, n_distance))
    return refuse(z->w, "gzip: byte %s: the code lengths of a block are no prefix code",
                  commas(bits_offset(z)));
  return 1;
}

/* Literals and copies up to the end of the block. */
static inline int inflate_codes(inflater *z, const huffman *literal,
                                const huffman *distance) {
  static const uint16_t len_base[29] = {3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23,
    27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
  static const unsigned char len_extra[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
    2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
  while (z->made < z->capacity || !z->partial) {
    int s = huffman_symbol(z, literal), d;
    size_t k = 1, back;
    if (bits_overrun(z)) return 0;
    if (s < 0 || s > 285)
      return refuse(z->w, "gzip: byte %s: bits that are no code", commas(bits_offset(z)));
    if (s < 256) {
      if (!inflate_room(z, &k)) return 0;
      z->out[z->made++] = (unsigned char)s;
      continue;
    }
    if (s == 256) return 1;
    k = len_base[s - 257] + bits_take(z, len_extra[s - 257]);
    d = huffman_symbol(z, distance);
    if (d < 0 || d > 29)
      return refuse(z->w, "gzip: byte %s: a distance that is no code",
                    commas(bits_offset(z)));
    back = d < 2 ? (size_t)d + 1
                 : ((size_t)(2 + (d & 1)) << (d / 2 - 1)) + 1 + bits_take(z, d / 2 - 1);
    if (bits_overrun(z)) return 0;
    if (back > z->made)
      return refuse(z->w, "gzip: byte %s: a copy from before the start of the data",
                    commas(bits_offset(z)));
    if (!inflate_room(z, &k)) return 0;
    for (; k > 0; k--, z->made++) z->out[z->made] = z->out[z->made - back];
  }
  return 1;
}

static inline int inflate_blocks(inflater *z) {
  huffman literal, distance;
  int last = 0, fixed = 0;      /* the tables hold the fixed codes */
  while (!last && (z->made < z->capacity || !z->partial)) {
    uint32_t kind;
    last = (int)bits_take(z, 1);
    kind = bits_take(z, 2);
    if (bits_overrun(z)) return 0;
    if (kind == 3)
      return refuse(z->w, "gzip: byte %s: a block of the unknown kind 3",
                    commas(bits_offset(z)));
    if (kind == 0) {
      if (!inflate_stored(z)) return 0;
      continue;
    }
    if (kind == 1 && !fixed) {
      unsigned char length[320];
      memset(length, 8, 288);
      memset(length + 144, 9, 112);
      memset(length + 256, 7, 24);
      memset(length + 288, 5, 32);
      huffman_build(&literal, length, 288);
      huffman_build(&distance, length + 288, 32);
    } else if (kind == 2 && !inflate_lengths(z, &literal, &distance)) {
      return 0;
    }
    fixed = kind == 1;
    if (!inflate_codes(z, &literal, &distance)) return 0;
  }
  return 1;
}

static inline uint32_t crc32_of(const unsigned char *data, size_t n) {
  static uint32_t table[256];
  uint32_t c, k;
  size_t i;
  for (i = 0; !table[255] && i < 256; i++) {
    for (c = (uint32_t)i, k = 0; k < 8; k++) c = c >> 1 ^ (c & 1 ? 0xEDB88320u : 0);
    table[i] = c;
  }
  for (c = ~0u, i = 0; i < n; i++) c = c >> 8 ^ table[(c ^ data[i]) & 255];
  return ~c;
}

static inline uint32_t little32(const unsigned char *p) {
  return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16
         | (uint32_t)p[3] << 24;
}

static inline uint32_t big32(const unsigned char *p) {
  return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8
         | (uint32_t)p[3];
}

/* Exactly n_out bytes from one gzip member that is all of `in`, checked by its CRC; with
   `partial` the first ones, up to n_out: *made says how many. */
static inline int gunzip(const unsigned char *in, size_t n, unsigned char *out,
                         size_t n_out, int partial, size_t *made, why *w) {
  inflater z = {in, n, 10, 0, 0, out, n_out, 0, partial, w};
  int flags;
  *made = 0;
  if (n < 18 || in[0] != 0x1F || in[1] != 0x8B || in[2] != 8 || (in[3] & 0xE0))
    return refuse(w, "gzip: byte 0: the header of a gzip file is 1F 8B 08, and flags "
                  "below 20");
  flags = in[3];
  if (flags & 4) z.at += 2 + (size_t)(in[10] | in[11] << 8);
  for (int k = 8; k <= 16; k *= 2) {                     /* name, comment */
    while ((flags & k) && z.at < n && in[z.at] != 0) z.at++;
    if (flags & k) z.at++;
  }
  if (flags & 2) z.at += 2;
  if (z.at > n) return refuse(w, "gzip: the header does not end in the %s bytes of the "
                              "file", commas(n));
  if (!inflate_blocks(&z)) return 0;
  *made = z.made;
  if (partial) return 1;
  z.at = bits_offset(&z);
  if (z.made != n_out)
    return refuse(w, "gzip: byte %s: the data end after %s bytes, the header inside "
                  "promises %s", commas(z.at), commas(z.made), commas(n_out));
  if (n < z.at || n - z.at != 8)
    return refuse(w, "gzip: byte %s: 8 bytes of checksum and size must follow and end "
                  "the file of %s", commas(z.at), commas(n));
  if (little32(in + z.at) != crc32_of(out, n_out))
    return refuse(w, "gzip: byte %s: the checksum is wrong: the file is damaged",
                  commas(z.at));
  if (little32(in + z.at + 4) != (uint32_t)n_out)
    return refuse(w, "gzip: byte %s: the size at the end is wrong", commas(z.at + 4));
  return 1;
}

/* ---- IDX -------------------------------------------------------------------------- */

typedef struct idx {
  int n_dims;
  size_t dim[8], size;            /* size: the product */
  unsigned char *data;            /* (dim), to be freed */
} idx;

/* The header in the first n bytes of a file of bytes. */
static inline int idx_header(const unsigned char *h, size_t n, idx *x, why *w) {
  size_t i;
  memset(x, 0, sizeof *x);
  if (n < 4) return refuse(w, "idx: the file ends at byte %s: its header has 4 bytes and "
                           "4 per axis", commas(n));
  if (h[0] || h[1])
    return refuse(w, "idx: byte 0: two zero bytes begin an IDX file, not %02X %02X", h[0],
                  h[1]);
  if (h[2] != 8) return refuse(w, "idx: byte 2: the numbers are of type %02X, only bytes "
                               "(08) are read here", h[2]);
  if (h[3] < 1 || h[3] > 8)
    return refuse(w, "idx: byte 3: %d axes, there must be 1 to 8", h[3]);
  x->n_dims = h[3];
  x->size = 1;
  if (n < 4 + 4 * (size_t)x->n_dims)
    return refuse(w, "idx: the file ends at byte %s, in the header of %d bytes",
                  commas(n), 4 + 4 * x->n_dims);
  for (i = 0; i < (size_t)x->n_dims; i++) {
    x->dim[i] = big32(h + 4 + 4 * i);
    if (x->dim[i] && x->size > SIZE_MAX / 2 / x->dim[i])
      return refuse(w, "idx: byte %s: the product of the axes is too large",
                    commas(4 + 4 * i));
    x->size *= x->dim[i];
  }
  return 1;
}

/* A whole file, raw or gzip. No memory is taken for what the file cannot hold. */
static inline int idx_decode(const unsigned char *in, size_t n, idx *x, why *w) {
  unsigned char head[36], *all;
  size_t begin, made = 0;
  int packed = n >= 2 && in[0] == 0x1F && in[1] == 0x8B;
  memset(x, 0, sizeof *x);
  if (packed && !gunzip(in, n, head, sizeof head, 1, &made, w)) return 0;
  if (!idx_header(packed ? head : in, packed ? made : n, x, w)) return 0;
  begin = 4 + 4 * (size_t)x->n_dims;
  if (!packed && n - begin != x->size)
    return refuse(w, "idx: byte %s: the header promises %s numbers, %s bytes follow",
                  commas(begin), commas(x->size), commas(n - begin));
  if (packed && x->size / 1032 > n)
    return refuse(w, "idx: the header promises %s numbers, more than %s bytes of gzip "
                  "can hold", commas(x->size), commas(n));
  all = (unsigned char *)memory(begin + x->size, 1);
  if (!packed) {
    memcpy(all, in, n);
  } else if (!gunzip(in, n, all, begin + x->size, 0, &made, w)) {
    free(all);
    return 0;
  }
  memmove(all, all + begin, x->size);
  x->data = all;
  return 1;
}

/* ---- pictures from files ---------------------------------------------------------- */

typedef struct picture {
  size_t width, height;
  unsigned char *rgb;             /* (height,width,3), to be freed */
} picture;

typedef struct pnm_source {
  const unsigned char *in;
  size_t n, at;
} pnm_source;

/* Skips blanks and comments; returns the number that follows, or -1. */
static inline long pnm_number(pnm_source *p) {
  long value = 0;
  while (p->at < p->n && (p->in[p->at] == '#' || p->in[p->at] <= ' ')) {
    if (p->in[p->at] == '#')
      while (p->at < p->n && p->in[p->at] != '\n') p->at++;
    else p->at++;
  }
  if (p->at >= p->n || p->in[p->at] < '0' || p->in[p->at] > '9') return -1;
  while (p->at < p->n && p->in[p->at] >= '0' && p->in[p->at] <= '9' && value < 1000000)
    value = 10 * value + (p->in[p->at++] - '0');
  return value;
}

/* Sample number i of a row that starts at byte `row`; of text, the next. -1: none. */
static inline long pnm_sample(pnm_source *p, int kind, long maximum, size_t row,
                              size_t i) {
  if (kind == 4) return 1 - (p->in[row + i / 8] >> (7 - i % 8) & 1);
  if (kind == 5 || kind == 6)
    return maximum < 256 ? p->in[row + i]
                         : p->in[row + 2 * i] << 8 | p->in[row + 2 * i + 1];
  if (kind != 1) return pnm_number(p);
  while (p->at < p->n && p->in[p->at] <= ' ') p->at++;
  if (p->at >= p->n || p->in[p->at] < '0' || p->in[p->at] > '1') return -1;
  return 1 - (p->in[p->at++] - '0');
}

/* P1 to P6: bits, grey or colour, as text or bytes. */
static inline int pnm_decode(const unsigned char *in, size_t n, picture *out, why *w) {
  pnm_source p = {in, n, 2};
  int kind = n > 1 && in[0] == 'P' ? in[1] - '0' : 0;
  size_t channels = kind == 3 || kind == 6 ? 3 : 1, x, y, per_row, row;
  long width, height, maximum = 1;
  memset(out, 0, sizeof *out);
  if (kind < 1 || kind > 6)
    return refuse(w, "pnm: byte 0: a PNM file begins with P1 to P6");
  width = pnm_number(&p);
  height = pnm_number(&p);
  if (kind != 1 && kind != 4) maximum = pnm_number(&p);
  if (width < 1 || height < 1 || width > IMAGE_MAX_SIDE || height > IMAGE_MAX_SIDE)
    return refuse(w, "pnm: byte %s: width and height must be 1 to %d", commas(p.at),
                  IMAGE_MAX_SIDE);
  if (maximum < 1 || maximum > 65535)
    return refuse(w, "pnm: byte %s: the largest value must be 1 to 65535", commas(p.at));
  if (p.at < n && in[p.at] > ' ')
    return refuse(w, "pnm: byte %s: one blank must end the header", commas(p.at));
  p.at++;
  per_row = channels * (size_t)width * (maximum < 256 ? 1 : 2);
  if (kind == 4) per_row = ((size_t)width + 7) / 8;
  if (p.at > n || (kind < 4 ? channels * (size_t)(width * height)
                            : per_row * (size_t)height) > n - p.at)
    return refuse(w, "pnm: the file ends at byte %s, before %ld x %ld pixels are "
                  "complete", commas(n), width, height);
  out->width = (size_t)width;
  out->height = (size_t)height;
  out->rgb = (unsigned char *)memory(out->width * out->height, 3);
  for (y = 0, row = p.at; y < out->height; y++, row += per_row) {
    for (x = 0; x < channels * out->width; x++) {
      unsigned char *to = out->rgb + 3 * y * out->width;
      long v = pnm_sample(&p, kind, maximum, row, x);
      if (v < 0 || v > maximum) {
        free(out->rgb);
        memset(out, 0, sizeof *out);
        return refuse(w, "pnm: byte %s: %s", commas(kind < 4 ? p.at : row),
                      v < 0 ? "a number is missing" : "a value above the largest");
      }
      v = (255 * v + maximum / 2) / maximum;
      if (channels == 3) to[x] = (unsigned char)v;
      else memset(to + 3 * x, (int)v, 3);
    }
  }
  return 1;
}

/* Any picture this build can read; what is transparent shows white. */
static inline int picture_decode(const unsigned char *in, size_t n, picture *out,
                                 why *w) {
  if (n > 1 && in[0] == 'P' && in[1] >= '1' && in[1] <= '6')
    return pnm_decode(in, n, out, w);
  memset(out, 0, sizeof *out);
#ifdef STB_IMAGE
  {
    int width, height, channels;
    size_t i, c;
    unsigned char *rgba = n > 0x7FFFFFFF ? NULL
      : stbi_load_from_memory(in, (int)n, &width, &height, &channels, 4);
    const char *reason = n > 0x7FFFFFFF ? "too large" : stbi_failure_reason();
    if (!rgba) return refuse(w, "%s (PNG, JPEG, BMP and PNM are read, sides up to %d)",
                             reason && *reason ? reason
                                               : "the file is cut short or damaged",
                             IMAGE_MAX_SIDE);
    out->width = (size_t)width;
    out->height = (size_t)height;
    out->rgb = (unsigned char *)memory(out->width * out->height, 3);
    for (i = 0; i < out->width * out->height; i++)
      for (c = 0; c < 3; c++) {
        unsigned alpha = rgba[4 * i + 3];
        unsigned mixed = rgba[4 * i + c] * alpha + 255u * (255u - alpha);
        out->rgb[3 * i + c] = (unsigned char)((mixed + 127u) / 255u);
      }
    stbi_image_free(rgba);
    return 1;
  }
#else
  return refuse(w, "not PNM: this build reads nothing else (for PNG, JPEG and BMP: make "
                "STB=FOLDER, where stb_image.h is)");
#endif
}

/* Weights (times a constant) of source pixels first .. last for pixel i of `out`: a
   triangle as wide as one pixel of the coarser grid on each side of its centre. */
typedef struct taps { size_t first, last; } taps;
static inline int64_t tap_weight(size_t in, size_t out, size_t i, size_t j) {
  int64_t d = (int64_t)((2 * j + 1) * out) - (int64_t)((2 * i + 1) * in);
  int64_t reach = 2 * (int64_t)(in > out ? in : out);
  return d < 0 ? (reach + d > 0 ? reach + d : 0) : (reach > d ? reach - d : 0);
}
static inline taps taps_of(size_t in, size_t out, size_t i) {
  taps t;
  size_t middle = (2 * i + 1) * in / (2 * out);
  for (t.first = middle; t.first > 0 && tap_weight(in, out, i, t.first - 1) > 0;)
    t.first--;
  for (t.last = middle; t.last + 1 < in && tap_weight(in, out, i, t.last + 1) > 0;)
    t.last++;
  return t;
}

/* One channel (height,width), pixels `stride` apart, to (rows,columns): bilinear when it
   grows, an average when it shrinks, itself when it stays; in whole numbers. */
static inline void resize(const unsigned char *in, size_t height, size_t width,
                          size_t stride, unsigned char *out, size_t rows,
                          size_t columns) {
  size_t y, x, j, i;
  if (rows == height && columns == width) {
    for (i = 0; i < height * width; i++) out[i] = in[i * stride];
    return;
  }
  for (y = 0; y < rows; y++) {
    taps v = taps_of(height, rows, y);
    for (x = 0; x < columns; x++) {
      taps h = taps_of(width, columns, x);
      int64_t sum = 0, total = 0, wy, weight;
      for (j = v.first; j <= v.last; j++) {
        wy = tap_weight(height, rows, y, j);
        for (i = h.first; i <= h.last; i++) {
          weight = wy * tap_weight(width, columns, x, i);
          total += weight;
          sum += weight * in[(j * width + i) * stride];
        }
      }
      out[y * columns + x] = (unsigned char)((sum + total / 2) / total);
    }
  }
}

static inline unsigned char grey_of(const unsigned char *rgb) {
  return (unsigned char)((299u * rgb[0] + 587u * rgb[1] + 114u * rgb[2] + 500u) / 1000u);
}

/* Resized to (channels,size,size); grey for one channel. Uses up the picture. */
static inline void picture_fit(picture *p, size_t channels, size_t size,
                               unsigned char *out) {
  size_t i, c, n = p->width * p->height;
  for (i = 0; channels == 1 && i < n; i++) p->rgb[i] = grey_of(p->rgb + 3 * i);
  for (c = 0; c < channels; c++)
    resize(p->rgb + c, p->height, p->width, channels, out + c * size * size, size, size);
  free(p->rgb);
  memset(p, 0, sizeof *p);
}

static inline int picture_read(const char *path, picture *p, why *w) {
  size_t n;
  unsigned char *data = file_bytes(path, &n);
  int ok;
  memset(p, 0, sizeof *p);
  ok = data ? picture_decode(data, n, p, w)
            : refuse(w, "it cannot be read (%s)", strerror(errno));
  free(data);
  return ok;
}

/* ---- a set of pictures ------------------------------------------------------------ */

enum { SPLIT_TRAIN, SPLIT_VAL, SPLIT_TEST, N_SPLITS };

typedef struct image_set {
  size_t n, capacity, channels, size, classes, skipped;
  unsigned char *pixels;          /* (n,channels,size,size) */
  int32_t *label;                 /* n */
  unsigned char *group;           /* n: the split it was found in */
  size_t *index[N_SPLITS], n_split[N_SPLITS];
  char *names[4096];              /* of the classes */
  uint64_t hash;
  double mean[3], std[3];         /* of the training split, pixels from 0 to 1 */
} image_set;
#define MAX_CLASSES (sizeof ((image_set *)NULL)->names / sizeof(char *))

static inline void image_set_free(image_set *s) {
  size_t i;
  for (i = 0; i < s->classes; i++) free(s->names[i]);
  for (i = 0; i < N_SPLITS; i++) free(s->index[i]);
  free(s->pixels);
  free(s->label);
  free(s->group);
}

static inline size_t image_bytes(const image_set *s) {
  return s->channels * s->size * s->size;
}

static inline unsigned char *image_at(const image_set *s, size_t i) {
  return s->pixels + i * image_bytes(s);
}

/* Room for one more; returns where its pixels belong. */
static inline unsigned char *image_add(image_set *s, int32_t label, int group) {
  if (s->n == s->capacity) {
    size_t more = 2 * s->capacity + 1024;
    if (more > SIZE_MAX / 4 / image_bytes(s)) fail(1, "the pictures do not fit into "
                                                   "memory: choose a smaller --size");
    s->pixels = (unsigned char *)realloc(s->pixels, more * image_bytes(s));
    s->label = (int32_t *)realloc(s->label, more * sizeof *s->label);
    s->group = (unsigned char *)realloc(s->group, more);
    if (!s->pixels || !s->label || !s->group)
      fail(1, "the pictures do not fit into memory: choose a smaller --size");
    s->capacity = more;
  }
  s->label[s->n] = label;
  s->group[s->n] = (unsigned char)group;
  return image_at(s, s->n++);
}

static inline void class_add(image_set *s, const char *name) {
  const char *c;
  if (s->classes >= MAX_CLASSES)
    fail(1, "more than %d classes: that is the most vit handles", (int)MAX_CLASSES);
  if (!is_utf8(name))
    fail(1, "the class '%s' has a name that is not UTF-8: rename its folder", name);
  for (c = name; *c; c++)
    if ((unsigned char)*c < 32 || *c == 127)
      fail(1, "the class '%s' has a control character in its name: rename it", name);
  s->names[s->classes] = (char *)memory(strlen(name) + 1, 1);
  strcpy(s->names[s->classes++], name);
}

/* ---- IDX folders: MNIST, Fashion-MNIST -------------------------------------------- */

/* DIR/name or DIR/name.gz; NULL when neither is there. */
static inline char *idx_path(const char *dir, const char *name) {
  text t = {NULL, 0, 0};
  text_add(&t, "%s%s%s", dir, *dir && dir[strlen(dir) - 1] == '/' ? "" : "/", name);
  if (file_exists(t.s)) return t.s;
  text_add(&t, ".gz");
  if (file_exists(t.s)) return t.s;
  text_free(&t);
  return NULL;
}

static inline idx idx_read(const char *dir, const char *name, int n_dims, text *path) {
  char *found = idx_path(dir, name);
  unsigned char *data;
  size_t n;
  idx x;
  why w = {""};
  if (!found)
    fail(1, "%s has no %s, raw or .gz: --data wants a folder with the four IDX files of "
         "an MNIST-like set", dir, name);
  data = read_file(found, &n);
  if (!idx_decode(data, n, &x, &w)) fail(1, "%s: %s", found, w.s);
  if (x.n_dims != n_dims)
    fail(1, "%s: byte 3: %d axes, %s", found, x.n_dims, n_dims == 3
         ? "pictures have 3: count, rows, columns" : "labels have 1: their count");
  free(data);
  path->n = 0;
  text_add(path, "%s", found);
  free(found);
  return x;
}

static inline void idx_part(image_set *s, const char *dir, const char *part, int group) {
  text images = {NULL, 0, 0}, labels = {NULL, 0, 0}, name = {NULL, 0, 0};
  idx x, y;
  size_t i;
  text_add(&name, "%s-images-idx3-ubyte", part);
  x = idx_read(dir, name.s, 3, &images);
  name.n = 0;
  text_add(&name, "%s-labels-idx1-ubyte", part);
  y = idx_read(dir, name.s, 1, &labels);
  if (x.dim[0] != y.dim[0])
    fail(1, "%s has %s pictures, %s has %s labels: they must be as many", images.s,
         commas(x.dim[0]), labels.s, commas(y.dim[0]));
  if (x.dim[0] < 1 || x.dim[1] < 1 || x.dim[2] < 1 || x.dim[1] > IMAGE_MAX_SIDE
      || x.dim[2] > IMAGE_MAX_SIDE)
    fail(1, "%s: byte 4: %s pictures of %s x %s: there must be some, of 1 to %d pixels",
         images.s, commas(x.dim[0]), commas(x.dim[1]), commas(x.dim[2]), IMAGE_MAX_SIDE);
  if (s->size == 0) s->size = x.dim[1];
  for (i = 0; i < x.dim[0]; i++) {
    if (y.data[i] >= s->classes)
      fail(1, "%s: byte %s: label %d, but there are %s classes: mend the file or raise "
           "--classes", labels.s, commas(8 + i), y.data[i], commas(s->classes));
    resize(x.data + i * x.dim[1] * x.dim[2], x.dim[1], x.dim[2], 1,
           image_add(s, y.data[i], group), s->size, s->size);
  }
  free(x.data);
  free(y.data);
  text_free(&images);
  text_free(&labels);
  text_free(&name);
}

/* size 0: that of the files. Fashion-MNIST is known by its first labels. */
static inline void images_from_idx(image_set *s, const char *dir, size_t size,
                                   size_t classes) {
  static const char *const clothes[] = {"T-shirt/top", "Trouser", "Pullover", "Dress",
    "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"};
  static const int32_t first[] = {9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 0, 9, 5, 5, 7, 9};
  char name[24];
  size_t i;
  int fashion;
  memset(s, 0, sizeof *s);
  s->channels = 1;
  s->size = size;
  s->classes = classes;
  idx_part(s, dir, "train", SPLIT_TRAIN);
  idx_part(s, dir, "t10k", SPLIT_TEST);
  fashion = classes == 10 && s->n >= 16 && memcmp(s->label, first, sizeof first) == 0;
  s->classes = 0;
  for (i = 0; i < classes; i++) {
    snprintf(name, sizeof name, "%u", (unsigned)i);
    class_add(s, fashion ? clothes[i] : name);
  }
}

/* ---- folders of pictures ---------------------------------------------------------- */

typedef struct listing { char **name; size_t n; } listing;

static inline int compare_names(const void *a, const void *b) {
  return strcmp(*(char *const *)a, *(char *const *)b);    /* as unsigned bytes */
}

static inline int is_picture_name(const char *name) {
  static const char *const endings[] = {".png", ".jpg", ".jpeg", ".bmp", ".pnm", ".pgm",
                                        ".ppm", ".pbm"};
  size_t i, k, n = strlen(name);
  for (i = 0; i < sizeof endings / sizeof endings[0]; i++) {
    size_t m = strlen(endings[i]);
    for (k = 0; n > m && k < m; k++) {
      char c = name[n - m + k];
      if ((c >= 'A' && c <= 'Z' ? c + 32 : c) != endings[i][k]) break;
    }
    if (n > m && k == m) return 1;
  }
  return 0;
}

/* Sub-folders, or picture files, without those that begin with a dot; sorted by bytes. */
static inline listing list_folder(const char *path, int folders) {
  listing l = {NULL, 0};
#if HAVE_POSIX
  DIR *dir = opendir(path);
  struct dirent *entry;
  if (!dir) fail(1, "cannot open the folder %s (%s): give one that can be read", path,
                 strerror(errno));
  while ((entry = readdir(dir)) != NULL) {
    char *full = path_in(path, entry->d_name), **grown;
    int wanted = entry->d_name[0] != '.' && is_directory(full) == folders
                 && (folders || is_picture_name(entry->d_name));
    free(full);
    if (!wanted) continue;
    grown = (char **)realloc(l.name, (l.n + 1) * sizeof *l.name);
    if (!grown) fail(1, "out of memory: close other programs");
    l.name = grown;
    l.name[l.n] = (char *)memory(strlen(entry->d_name) + 1, 1);
    strcpy(l.name[l.n++], entry->d_name);
  }
  closedir(dir);
  if (l.n) qsort(l.name, l.n, sizeof *l.name, compare_names);
#else
  (void)folders;
  fail(1, "%s: folders are read on POSIX systems only: use IDX files", path);
#endif
  return l;
}

static inline void listing_free(listing *l) {
  size_t i;
  for (i = 0; i < l->n; i++) free(l->name[i]);
  free(l->name);
}

static inline size_t class_find(const image_set *s, const char *name) {
  size_t i = 0;
  while (i < s->classes && strcmp(s->names[i], name) != 0) i++;
  return i;
}

/* The pictures of one split: a sub-folder per class. The first split names the classes,
   and each of them must have a picture there. */
static inline void folder_part(image_set *s, const char *path, int group, int skip_bad) {
  listing classes = list_folder(path, 1), files;
  size_t c, i, label, before;
  int first = s->classes == 0;
  for (c = 0; first && c < classes.n; c++) class_add(s, classes.name[c]);
  if (s->classes < 2)
    fail(1, "%s: %s sub-folders: --images wants one per class, two at least", path,
         commas(s->classes));
  for (c = 0; c < classes.n; c++) {
    char *folder = path_in(path, classes.name[c]);
    label = class_find(s, classes.name[c]);
    if (label == s->classes)
      fail(1, "%s: there is no class of this name in train: rename the folder", folder);
    files = list_folder(folder, 0);
    before = s->n;
    for (i = 0; i < files.n; i++) {
      char *file = path_in(folder, files.name[i]);
      picture p;
      why w = {""};
      if (picture_read(file, &p, &w))
        picture_fit(&p, 3, s->size, image_add(s, (int32_t)label, group));
      else if (skip_bad) s->skipped++;
      else fail(1, "%s: %s; --skip-bad leaves such files out", file, w.s);
      free(file);
    }
    if (s->n == before && first)
      fail(1, "%s: no picture that can be read: an empty class cannot be learnt", folder);
    listing_free(&files);
    free(folder);
  }
  listing_free(&classes);
}

/* One channel is enough when no pixel has a colour. */
static inline void images_drop_colour(image_set *s) {
  size_t plane = s->size * s->size, i, k;
  for (i = 0; i < s->n; i++) {
    const unsigned char *p = image_at(s, i);
    if (memcmp(p, p + plane, plane) != 0 || memcmp(p, p + 2 * plane, plane) != 0) return;
  }
  for (i = 1; i < s->n; i++)
    for (k = 0; k < plane; k++) s->pixels[i * plane + k] = s->pixels[3 * i * plane + k];
  s->channels = 1;
}

/* A sub-folder per class; or train/ and, if wanted, val/ and test/ that hold them. */
static inline void images_from_folder(image_set *s, const char *dir, size_t size,
                                      int skip_bad) {
  static const char *const parts[N_SPLITS] = {"train", "val", "test"};
  char *part[N_SPLITS];
  int i;
  memset(s, 0, sizeof *s);
  s->channels = 3;
  s->size = size ? size : 28;
  for (i = 0; i < N_SPLITS; i++) part[i] = path_in(dir, parts[i]);
  if (!is_directory(part[0])) {
    folder_part(s, dir, SPLIT_TRAIN, skip_bad);
  } else {
    for (i = 0; i < N_SPLITS; i++)
      if (is_directory(part[i])) folder_part(s, part[i], i, skip_bad);
  }
  for (i = 0; i < N_SPLITS; i++) free(part[i]);
  images_drop_colour(s);
}

/* ---- generated pictures ----------------------------------------------------------- */

/* Classes 2 to 9, in a square from -10 to 10; disc and ring have none. */
typedef struct stroke { signed char class_, x0, y0, x1, y1; } stroke;
static const stroke strokes[] = {
  {2, -7, -7, 7, -7}, {2, 7, -7, 7, 7}, {2, 7, 7, -7, 7}, {2, -7, 7, -7, -7},
  {3, 0, -8, 8, 7}, {3, 8, 7, -8, 7}, {3, -8, 7, 0, -8},
  {4, -8, 0, 8, 0}, {4, 0, -8, 0, 8},
  {5, -6, 8, 0, -8}, {5, 0, -8, 6, 8}, {5, -3, 2, 3, 2},
  {6, -6, -8, -6, 8}, {6, 6, -8, 6, 8}, {6, -6, 0, 6, 0},
  {7, -7, -8, 7, -8}, {7, 0, -8, 0, 8},
  {8, -6, -8, 0, 8}, {8, 0, 8, 6, -8},
  {9, -8, -8, -4, 8}, {9, -4, 8, 0, -4}, {9, 0, -4, 4, 8}, {9, 4, 8, 8, -8}
};
#define GENERATED_CLASSES 10

static inline double distance_to(const stroke *s, double x, double y) {
  double dx = s->x1 - s->x0, dy = s->y1 - s->y0, t;
  t = ((x - s->x0) * dx + (y - s->y0) * dy) / (dx * dx + dy * dy);
  t = t < 0 ? 0 : t > 1 ? 1 : t;
  dx = x - s->x0 - t * dx;
  dy = y - s->y0 - t * dy;
  return sqrt(dx * dx + dy * dy);
}

/* Picture number `index` of a seed: position, scale, rotation, thickness, noise. */
static inline void draw_generated(uint64_t seed, uint32_t index, int class_, size_t size,
                                  unsigned char *out) {
  uint32_t stream = exf_rng_stream("pictures");
  double u[5], scale, s, c, thick, half = 0.5 * (double)size, value;
  size_t i, k, y, x;
  for (i = 0; i < 5; i++) u[i] = 2 * exf_rng_uniform(seed, stream, index, i) - 1;
  scale = half * (0.062 + 0.018 * u[0]);
  s = 0.35 * u[1];                                  /* the rotation's sine */
  c = sqrt(1 - s * s);
  thick = 1.4 + 0.5 * u[2];
  for (y = 0; y < size; y++) {
    for (x = 0; x < size; x++) {
      double px = ((double)x + 0.5 - half * (1 + 0.15 * u[3])) / scale;
      double py = ((double)y + 0.5 - half * (1 + 0.15 * u[4])) / scale;
      double qx = c * px + s * py, qy = c * py - s * px, d = 1e9;
      if (class_ == 0) d = sqrt(qx * qx + qy * qy) - 6.5;               /* disc */
      if (class_ == 1) d = fabs(sqrt(qx * qx + qy * qy) - 7) - thick;   /* ring */
      for (k = 0; k < sizeof strokes / sizeof strokes[0]; k++)
        if (strokes[k].class_ == class_ && distance_to(&strokes[k], qx, qy) - thick < d)
          d = distance_to(&strokes[k], qx, qy) - thick;
      value = 0.5 - d * scale;                      /* how much of the pixel is covered */
      value = 220 * (value < 0 ? 0 : value > 1 ? 1 : value);
      value += 35 * exf_rng_uniform(seed, stream, index, 5 + y * size + x);
      out[y * size + x] = (unsigned char)value;
    }
  }
}

static inline void images_generated(image_set *s, uint64_t seed, size_t size, size_t n) {
  static const char *const names[GENERATED_CLASSES] = {"disc", "ring", "square",
    "triangle", "cross", "A", "H", "T", "V", "W"};
  size_t i;
  memset(s, 0, sizeof *s);
  s->channels = 1;
  s->size = size ? size : 28;
  for (i = 0; i < GENERATED_CLASSES; i++) class_add(s, names[i]);
  for (i = 0; i < n; i++)
    draw_generated(seed, (uint32_t)i, (int)(i % GENERATED_CLASSES), s->size,
                   image_add(s, (int32_t)(i % GENERATED_CLASSES), SPLIT_TRAIN));
}

/* ["a","b"] in t, and back: 0 unless s is such a list of n. */
static inline void names_write(char *const *names, size_t n, text *t) {
  size_t i;
  text_add(t, "[");
  for (i = 0; i < n; i++) {
    if (i) text_add(t, ",");
    json_text(t, NULL, names[i]);
  }
  text_add(t, "]");
}

static inline int names_read(image_set *set, const char *source, size_t n) {
  char *copy = (char *)memory(strlen(source) + 1, 1), *s = copy, *name;
  int ok = *source == '[';
  strcpy(copy, source);
  while (ok && set->classes < n) {
    name = s = json_space(s + 1);
    s = json_string(s);
    ok = s && is_utf8(name);
    if (!ok) break;
    s = json_space(s);
    ok = *s == (set->classes + 1 < n ? ',' : ']');
    class_add(set, name);
  }
  ok = ok && s[1] == 0;
  free(copy);
  return ok;
}

/* ---- splits ----------------------------------------------------------------------- */

/* A permutation of 0 .. n-1, a function of (seed, stream, step). */
static inline void shuffle(size_t *order, size_t n, uint64_t seed, const char *stream,
                           uint32_t step) {
  uint32_t key = exf_rng_stream(stream);
  size_t i, j, t;
  for (i = 0; i < n; i++) order[i] = i;
  for (i = n; i > 1; i--) {
    j = (size_t)(exf_rng_uniform(seed, key, step, i) * (double)i);
    t = order[i - 1];
    order[i - 1] = order[j];
    order[j] = t;
  }
}

/* Splits the set, by the seed: what has no validation or test pictures of its own gets a
   tenth of its training pictures for each, of the validation at most n_val. Then
   measures the pixels of what is left for training. */
static inline void images_split(image_set *s, uint64_t seed, size_t n_val,
                                const char *name) {
  size_t have[N_SPLITS] = {0, 0, 0}, i, k, c, plane = s->size * s->size, *order;
  int g;
  for (i = 0; i < s->n; i++) have[s->group[i]]++;
  order = (size_t *)memory(s->n, sizeof *order);
  shuffle(order, s->n, seed, "split", 0);
  for (k = N_SPLITS - 1; k > 0; k--) {              /* test first, then validation */
    size_t want = (have[SPLIT_TRAIN] + 9) / 10;
    if (k == SPLIT_VAL && want > n_val) want = n_val;
    for (i = 0; have[k] == 0 && want > 0 && i < s->n; i++) {
      if (s->group[order[i]] != SPLIT_TRAIN) continue;
      s->group[order[i]] = (unsigned char)k;
      have[SPLIT_TRAIN]--;
      want--;
    }
  }
  for (g = 0; g < N_SPLITS; g++) {
    s->index[g] = (size_t *)memory(s->n, sizeof *s->index[g]);
    for (i = 0; i < s->n; i++)
      if (s->group[i] == g) s->index[g][s->n_split[g]++] = i;
    if (s->n_split[g] < 1) fail(1, "%s: %s pictures are too few for training, validation "
                                "and test: give more", name, commas(s->n));
  }
  free(order);
  for (c = 0; c < s->channels; c++) {
    uint64_t sum = 0, square = 0;
    double count = 255.0 * (double)(s->n_split[SPLIT_TRAIN] * plane), mean, variance;
    for (i = 0; i < s->n_split[SPLIT_TRAIN]; i++) {
      const unsigned char *p = image_at(s, s->index[SPLIT_TRAIN][i]) + c * plane;
      for (k = 0; k < plane; k++) sum += p[k], square += (uint64_t)(p[k] * p[k]);
    }
    s->mean[c] = mean = (double)sum / count;
    variance = (double)square / count / 255.0;
    variance -= mean * mean;
    s->std[c] = variance > 1e-6 ? sqrt(variance) : 1;
  }
  s->hash = hash_bytes(s->pixels, s->n * image_bytes(s));
  for (i = 0; i < s->n; i++)
    s->hash = (s->hash ^ (uint64_t)(s->label[i] + 1)) * 1099511628211u;
}

/* ---- where pictures come from ----------------------------------------------------- */

typedef struct source {
  const char *data, *images;
  uint64_t size, classes, val;
  int skip_bad;
} source;

/* Where pictures come from, when nobody says. */
static inline const char *default_source(void) {
  char *found = idx_path(FASHION_DIR, "train-images-idx3-ubyte");
  const char *data = found ? FASHION_DIR : "generated";
  free(found);
  return data;
}

/* Reads and splits them. Returns what they are called. */
static inline const char *source_read(image_set *set, const source *s, uint64_t seed) {
  const char *name = *s->images ? s->images : s->data;
  size_t size = s->size == FLAG_UNSET ? 0 : (size_t)s->size;
  if (*s->images) images_from_folder(set, name, size, s->skip_bad);
  else if (strcmp(name, "generated") == 0) images_generated(set, seed, size, 6000);
  else images_from_idx(set, name, size, (size_t)s->classes);
  images_split(set, seed, (size_t)s->val, name);
  return name;
}

/* ---- batches ---------------------------------------------------------------------- */

/* What is added to a picture, and how bytes become numbers: (v / 255 - mean) / std. */
typedef struct lens {
  size_t channels, size, patch;
  exf_real value[3][256];
} lens;

static inline lens lens_new(size_t channels, size_t size, size_t patch,
                            const double *mean, const double *std) {
  lens l;
  size_t c;
  int v;
  memset(&l, 0, sizeof l);
  l.channels = channels;
  l.size = size;
  l.patch = patch;
  for (c = 0; c < channels; c++)
    for (v = 0; v < 256; v++)
      l.value[c][v] = (exf_real)((v / 255.0 - mean[c]) / std[c]);
  return l;
}

/* A picture (channels,size,size) as patches (patches, channels patch patch): patches by
   rows, in each channel, row, column, as a convolution's weight wants them. It is first
   mirrored (flip) and moved right and down by dx, dy, with black moving in. */
static inline void lens_patches(const lens *l, const unsigned char *pixels, int flip,
                                long dx, long dy, exf_real *out) {
  long size = (long)l->size, patch = (long)l->patch, py, px, y, x, sx, sy;
  size_t c;
  for (py = 0; py < size; py += patch)
    for (px = 0; px < size; px += patch)
      for (c = 0; c < l->channels; c++) {
        const unsigned char *plane = pixels + c * l->size * l->size;
        for (y = py; y < py + patch; y++)
          for (x = px, sy = y - dy; x < px + patch; x++) {
            sx = x - dx;
            if (flip) sx = size - 1 - sx;
            *out++ = l->value[c][sx < 0 || sy < 0 || sx >= size || sy >= size
                                   ? 0 : plane[sy * size + sx]];
          }
      }
}

/* ---- drawing ---------------------------------------------------------------------- */

#define DRAW_COLUMNS 24
/* n pictures (channels,size,size) side by side, each 24 columns wide, 12 lines high. */
static inline void draw_pictures(const unsigned char *const *pixels, size_t n,
                                 size_t channels, size_t size) {
  static const char *const shade[5] = {" ", "\342\226\221", "\342\226\222",
                                       "\342\226\223", "\342\226\210"};
  unsigned char cell[8][DRAW_COLUMNS * DRAW_COLUMNS / 2];
  unsigned char *grey = (unsigned char *)memory(size * size, 1);
  size_t i, k, y, x;
  if (n > 8) n = 8;
  for (k = 0; k < n; k++) {
    for (i = 0; i < size * size; i++) {
      unsigned char rgb[3];
      rgb[0] = pixels[k][i];
      rgb[1] = pixels[k][channels == 3 ? size * size + i : i];
      rgb[2] = pixels[k][channels == 3 ? 2 * size * size + i : i];
      grey[i] = grey_of(rgb);
    }
    resize(grey, size, size, 1, cell[k], DRAW_COLUMNS / 2, DRAW_COLUMNS);
  }
  for (y = 0; y < DRAW_COLUMNS / 2; y++) {
    for (k = 0; k < n; k++) {
      if (k) printf("  ");
      for (x = 0; x < DRAW_COLUMNS; x++)
        printf("%s", shade[cell[k][y * DRAW_COLUMNS + x] * 5 / 256]);
    }
    printf("\n");
  }
  free(grey);
}

/* Rows: what it is; columns: what the model took it for. Of many classes, the most
   frequent mistakes. */
static inline void print_confusion(const image_set *set, int split,
                                   const int32_t *guess) {
  size_t k = set->classes, i, j, shown, best, n = set->n_split[split];
  size_t *count = (size_t *)memory(k * k, sizeof *count);
  for (i = 0; i < n; i++)
    count[(size_t)set->label[set->index[split][i]] * k + (size_t)guess[i]]++;
  if (k <= 12) {
    printf("%-12s", "is \\ taken");
    for (j = 0; j < k; j++) printf(" %5.5s", set->names[j]);
    for (i = 0; i < k; i++) {
      printf("\n%-12.12s", set->names[i]);
      for (j = 0; j < k; j++) printf(" %5s", commas(count[i * k + j]));
    }
    printf("\n");
  }
  for (shown = 0; k > 12 && shown < 10; shown++) {
    for (best = 1, i = 0; i < k * k; i++)          /* entry 1 is off the diagonal */
      if (i / k != i % k && count[i] > count[best]) best = i;
    if (count[best] == 0) break;
    printf("%s taken for %s: %s\n", set->names[best / k], set->names[best % k],
           commas(count[best]));
    count[best] = 0;
  }
  free(count);
}

/* Draws the pictures that are taken for something else with the largest losses. */
static inline void print_most_wrong(const image_set *set, int split, const int32_t *guess,
                                    const double *loss) {
  const unsigned char *pixels[5];
  size_t n = set->n_split[split], worst[5] = {0}, k, i, j, row;
  for (k = 0; k < 5; k++) {
    size_t best = n;
    for (i = 0; i < n; i++) {
      int32_t is = set->label[set->index[split][i]];
      for (j = 0; j < k && worst[j] != i; j++) continue;
      if (j == k && guess[i] != is && (best == n || loss[i] > loss[best]))
        best = i;
    }
    if (best == n) break;
    worst[k] = best;
    pixels[k] = image_at(set, set->index[split][best]);
  }
  for (row = 0; row < k; row += 3) {
    for (j = row; j < k && j < row + 3; j++) {
      char title[64];
      snprintf(title, sizeof title, "%.11s, not %.8s",
               set->names[set->label[set->index[split][worst[j]]]],
               set->names[guess[worst[j]]]);
      printf("%s%-24.24s", j > row ? "  " : "", title);
    }
    printf("\n");
    draw_pictures(pixels + row, j - row, set->channels, set->size);
  }
}

#endif /* EXF_EXAMPLES_IMAGES_H */
