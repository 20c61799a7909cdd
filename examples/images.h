/* images.h - pictures as data: IDX files (raw or gzip), folders of PNG, JPEG, BMP and
   PNM, generated pictures; classes, splits, drawing as text.

   Include exfusion.h and common.h first. PNM is read here; PNG, JPEG, BMP and gzip are
   read by stb_image where STB_IMAGE names its header, which the Makefile looks for.
   Bytes from outside are decoded by functions that return 0 and fill a `why`: the rule
   that was broken, and the offset of the byte where it was. */
#ifndef EXF_EXAMPLES_IMAGES_H
#define EXF_EXAMPLES_IMAGES_H

#if HAVE_POSIX
#include <dirent.h>
#include <strings.h>
#endif

#define IMAGE_MAX_SIDE 8192       /* pixels of a picture in a file */
#define FASHION_DIR "/usr/share/datasets/fashion-mnist"

#ifdef STB_IMAGE
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_ONLY_BMP
#define STBI_NO_STDIO
#define STBI_NO_SIMD              /* the same pixels everywhere */
#define STBI_MAX_DIMENSIONS IMAGE_MAX_SIDE
#include STB_IMAGE
#define FASHION_FILE FASHION_DIR "/train-images-idx3-ubyte.gz"    /* Debian's package */
#else
#define FASHION_FILE FASHION_DIR "/train-images-idx3-ubyte"
#endif

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF      /* the same bits everywhere */
#endif

/* ---- gzip (RFC 1952) and IDX ------------------------------------------------------ */

typedef struct why { char s[200]; } why;

PRINTS(2, 3)
static inline int refuse(why *w, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(w->s, sizeof w->s, format, args);
  va_end(args);
  return 0;
}
/* Four bytes as a number: big-endian in IDX, little-endian in gzip. */
static inline uint32_t word32(const unsigned char *p, int big) {
  uint32_t word = 0;
  for (int i = 0; i < 4; i++) word |= (uint32_t)p[big ? 3 - i : i] << 8 * i;
  return word;
}

static inline uint32_t crc32_of(const unsigned char *data, size_t n) {
  uint32_t table[256], c = ~0u;
  for (uint32_t i = 0; i < 256; i++) {
    table[i] = i;
    for (int k = 0; k < 8; k++)
      table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xEDB88320u : 0);
  }
  for (size_t i = 0; i < n; i++) c = c >> 8 ^ table[(c ^ data[i]) & 255];
  return ~c;
}
/* All of a gzip file of one member, n_out bytes, to be freed. The size that ends the file
   bounds them, if a file of n bytes can hold so much: DEFLATE makes 1032 bytes of one at
   most. */
static inline int gunzip(const unsigned char *in, size_t n, unsigned char **out,
                         size_t *n_out, why *w) {
#ifdef STB_IMAGE
  if (n < 18 || in[0] != 0x1F || in[1] != 0x8B || in[2] != 8 || (in[3] & 0xE0))
    return refuse(w, "gzip: byte 0: the header of a gzip file is 1F 8B 08, and flags "
                  "below 20");
  size_t at = 10, size = word32(in + n - 4, 0);
  if (in[3] & 4) at += 2 + (size_t)(in[10] | in[11] << 8);         /* an extra field */
  for (int bit = 8; bit <= 16; bit *= 2)                           /* name, comment */
    if (in[3] & bit)
      while (at < n && in[at++] != 0) continue;
  if (in[3] & 2) at += 2;                                          /* a checksum */
  if (at > n - 8) return refuse(w, "gzip: the header does not end in the %s bytes of the "
                                "file", commas(n));
  if (size / 1032 > n || size > 0x7FFFFFFF || n > 0x7FFFFFFF)
    return refuse(w, "gzip: byte %s: the size, %s bytes, is more than the file can hold: "
                  "it is cut short or damaged", commas(n - 4), commas(size));
  *out = memory(size, 1);
  /* with the 8 bytes of the end, for stb_image reads ahead */
  int made = stbi_zlib_decode_noheader_buffer((char *)*out, (int)size,
                                              (const char *)in + at, (int)(n - at));
  *n_out = size;
  if (made >= 0 && (size_t)made == size && word32(in + n - 8, 0) == crc32_of(*out, size))
    return 1;
  free(*out);
  *out = NULL;
  return refuse(w, "gzip: the data are not the %s bytes with checksum %08X that the end "
                "of the file promises: it is cut short or damaged", commas(size),
                (unsigned)word32(in + n - 8, 0));
#else
  (void)in, (void)n, (void)out, (void)n_out;
  return refuse(w, "gzip: this build has no stb_image to unpack it");
#endif
}

typedef struct idx {
  int n_dims;
  size_t dim[8], size;            /* size: the product */
  unsigned char *data;            /* (dim), to be freed */
} idx;

/* The header in the first n bytes of a file of bytes. */
static inline int idx_header(const unsigned char *h, size_t n, idx *x, why *w) {
  if (n >= 4 && (h[0] || h[1]))
    return refuse(w, "idx: byte 0: two zero bytes begin an IDX file, not %02X %02X", h[0],
                  h[1]);
  if (n >= 4 && h[2] != 8)
    return refuse(w, "idx: byte 2: the numbers are of type %02X, only bytes (08) are "
                  "read here", h[2]);
  if (n >= 4 && (h[3] < 1 || h[3] > 8))
    return refuse(w, "idx: byte 3: %d axes, there must be 1 to 8", h[3]);
  x->n_dims = n < 4 ? 0 : h[3];
  x->size = 1;
  if (n < 4 + 4 * (size_t)x->n_dims)
    return refuse(w, "idx: the file ends at byte %s, in its header", commas(n));
  for (size_t i = 0; i < (size_t)x->n_dims; i++) {
    x->dim[i] = word32(h + 4 + 4 * i, 1);
    if (x->dim[i] && x->size > SIZE_MAX / 2 / x->dim[i])
      return refuse(w, "idx: byte %s: the product of the axes is too large",
                    commas(4 + 4 * i));
    x->size *= x->dim[i];
  }
  return 1;
}
/* A whole file, raw or gzip. No memory is taken for what the file cannot hold. */
static inline int idx_decode(const unsigned char *in, size_t n, idx *x, why *w) {
  unsigned char *all = NULL;
  memset(x, 0, sizeof *x);
  if (n >= 2 && in[0] == 0x1F && in[1] == 0x8B) {
    if (!gunzip(in, n, &all, &n, w)) return 0;
    in = all;
  }
  int ok = idx_header(in, n, x, w);
  size_t begin = 4 + 4 * (size_t)x->n_dims;
  if (ok && n - begin != x->size)
    ok = refuse(w, "idx: byte %s: the header promises %s numbers, %s bytes follow",
                commas(begin), commas(x->size), commas(n - begin));
  if (!ok) {
    free(all);
    return 0;
  }
  x->data = all ? all : memory(n, 1);
  memmove(x->data, in + begin, x->size);
  return 1;
}

/* ---- pictures from files ---------------------------------------------------------- */

typedef struct picture {
  size_t width, height;
  unsigned char *rgb;             /* (height,width,3), to be freed */
} picture;

/* Skips blanks and comments; returns the number that follows, or -1. Of bits (limit 1)
   each digit is one: there are no blanks between them. */
static inline long pnm_number(const unsigned char *in, size_t n, size_t *at, long limit) {
  long value = 0;
  for (; *at < n && (in[*at] == '#' || in[*at] <= ' '); ++*at)
    if (in[*at] == '#')
      while (*at + 1 < n && in[*at + 1] != '\n') ++*at;
  if (*at >= n || in[*at] < '0' || in[*at] > '9') return -1;
  do value = 10 * value + (in[(*at)++] - '0');
  while (limit > 1 && value <= limit && *at < n && in[*at] >= '0' && in[*at] <= '9');
  return value;
}
/* P1 to P6: bits, grey or colour, as text or bytes. */
static inline int pnm_decode(const unsigned char *in, size_t n, picture *out, why *w) {
  int kind = n > 1 && in[0] == 'P' ? in[1] - '0' : 0;
  size_t channels = kind == 3 || kind == 6 ? 3 : 1, at = 2;
  memset(out, 0, sizeof *out);
  if (kind < 1 || kind > 6)
    return refuse(w, "pnm: byte 0: a PNM file begins with P1 to P6");
  long width = pnm_number(in, n, &at, 65535), height = pnm_number(in, n, &at, 65535);
  long maximum = kind == 1 || kind == 4 ? 1 : pnm_number(in, n, &at, 65535);
  if (width < 1 || height < 1 || width > IMAGE_MAX_SIDE || height > IMAGE_MAX_SIDE)
    return refuse(w, "pnm: byte %s: width and height must be 1 to %d", commas(at),
                  IMAGE_MAX_SIDE);
  if (maximum < 1 || maximum > 65535)
    return refuse(w, "pnm: byte %s: the largest value must be 1 to 65535", commas(at));
  if (at < n && in[at] > ' ')
    return refuse(w, "pnm: byte %s: one blank must end the header", commas(at));
  at++;
  size_t wide = channels * (size_t)width, per_row = wide;    /* samples, bytes of a row */
  if (kind == 4) per_row = (wide + 7) / 8;
  if (maximum > 255 && kind > 4) per_row *= 2;
  if (at > n || per_row * (size_t)height > n - at)           /* as text, it needs more */
    return refuse(w, "pnm: the file ends at byte %s, before %ld x %ld pixels are "
                  "complete", commas(n), width, height);
  out->width = (size_t)width;
  out->height = (size_t)height;
  out->rgb = memory(out->width * out->height, 3);
  for (size_t y = 0; y < out->height; y++) {
    const unsigned char *row = in + at;                      /* of bytes */
    unsigned char *to = out->rgb + 3 * y * out->width;
    for (size_t i = 0; i < wide; i++) {
      long v = kind < 4 ? pnm_number(in, n, &at, maximum)
             : kind == 4 ? row[i / 8] >> (7 - i % 8) & 1
             : maximum < 256 ? row[i] : row[2 * i] << 8 | row[2 * i + 1];
      if (v < 0 || v > maximum) {
        free(out->rgb);
        memset(out, 0, sizeof *out);
        return refuse(w, "pnm: byte %s: %s", commas(at),
                      v < 0 ? "a number is missing" : "a value above the largest");
      }
      if (kind == 1 || kind == 4) v = 1 - v;                 /* 1 is black */
      v = (255 * v + maximum / 2) / maximum;
      if (channels == 3) to[i] = (unsigned char)v;
      else memset(to + 3 * i, (int)v, 3);
    }
    if (kind > 3) at += per_row;
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
  int width, height, channels;
  unsigned char *rgba = n > 0x7FFFFFFF ? NULL
    : stbi_load_from_memory(in, (int)n, &width, &height, &channels, 4);
  const char *reason = rgba ? "" : stbi_failure_reason();
  if (!reason || !*reason) reason = "the file is cut short or damaged";
  if (!rgba) return refuse(w, "%s (PNG, JPEG, BMP and PNM are read, sides up to %d)",
                           reason, IMAGE_MAX_SIDE);
  out->width = (size_t)width;
  out->height = (size_t)height;
  out->rgb = memory(out->width * out->height, 3);
  for (size_t i = 0; i < 3 * out->width * out->height; i++) {
    unsigned alpha = rgba[i / 3 * 4 + 3], value = rgba[i / 3 * 4 + i % 3];
    out->rgb[i] = (unsigned char)((value * alpha + 255 * (255 - alpha) + 127) / 255);
  }
  stbi_image_free(rgba);
  return 1;
#else
  return refuse(w, "not PNM: this build reads nothing else (for PNG, JPEG and BMP: make "
                "STB=FOLDER, where stb_image.h is)");
#endif
}

static inline int picture_read(const char *path, picture *p, why *w) {
  size_t n;
  unsigned char *data = file_bytes(path, &n);
  int ok = data ? picture_decode(data, n, p, w)
                : refuse(w, "it cannot be read (%s)", strerror(errno));
  free(data);
  return ok;
}
/* Weight (times a constant) of source pixel j of `in` for pixel i of `out`: a triangle as
   wide as one pixel of the coarser grid on each side of its centre. */
static inline int64_t resize_weight(size_t in, size_t out, size_t i, size_t j) {
  int64_t d = (int64_t)((2 * j + 1) * out) - (int64_t)((2 * i + 1) * in);
  int64_t reach = 2 * (int64_t)(in > out ? in : out);
  if (d < 0) d = -d;
  return d < reach ? reach - d : 0;
}
/* The source pixels outside of *first .. *end-1 have weight 0. */
static inline void resize_range(size_t in, size_t out, size_t i, size_t *first,
                                size_t *end) {
  size_t middle = (2 * i + 1) * in, reach = 2 * (in > out ? in : out);
  *first = middle > reach ? (middle - reach) / (2 * out) : 0;
  *end = (middle + reach) / (2 * out) + 1;
  if (*end > in) *end = in;
}
/* One channel (height,width), pixels `stride` apart, to (rows,columns): bilinear when it
   grows, an average when it shrinks, itself when it stays; in whole numbers. */
static inline void resize(const unsigned char *in, size_t height, size_t width,
                          size_t stride, unsigned char *out, size_t rows,
                          size_t columns) {
  for (size_t i = 0; rows == height && columns == width && i < rows * columns; i++)
    out[i] = in[i * stride];
  if (rows == height && columns == width) return;
  for (size_t y = 0; y < rows; y++)
    for (size_t x = 0; x < columns; x++) {
      size_t top, bottom, left, right;
      int64_t sum = 0, total = 0;
      resize_range(height, rows, y, &top, &bottom);
      resize_range(width, columns, x, &left, &right);
      for (size_t j = top; j < bottom; j++)
        for (size_t i = left; i < right; i++) {
          int64_t weight = resize_weight(height, rows, y, j)
                           * resize_weight(width, columns, x, i);
          total += weight;
          sum += weight * in[(j * width + i) * stride];
        }
      *out++ = (unsigned char)(total ? (sum + total / 2) / total : 0);
    }
}

static inline unsigned char grey_of(unsigned red, unsigned green, unsigned blue) {
  return (unsigned char)((299 * red + 587 * green + 114 * blue + 500) / 1000);
}
/* Resized to (channels,size,size); grey for one channel. Uses up the picture. */
static inline void picture_fit(picture *p, size_t channels, size_t size,
                               unsigned char *out) {
  for (size_t i = 0; channels == 1 && i < p->width * p->height; i++)
    p->rgb[i] = grey_of(p->rgb[3 * i], p->rgb[3 * i + 1], p->rgb[3 * i + 2]);
  for (size_t c = 0; c < channels; c++)
    resize(p->rgb + c, p->height, p->width, channels, out + c * size * size, size, size);
  free(p->rgb);
  memset(p, 0, sizeof *p);
}

/* ---- a set of pictures ------------------------------------------------------------ */

enum { SPLIT_TRAIN, SPLIT_VAL, SPLIT_TEST, N_SPLITS };
#define MAX_CLASSES 4096

typedef struct image_set {
  size_t n, capacity, channels, size, classes, skipped;
  unsigned char *pixels;          /* (n,channels,size,size) */
  int32_t *label;                 /* n */
  unsigned char *group;           /* n: the split it was found in */
  size_t *index[N_SPLITS], n_split[N_SPLITS];
  char *names[MAX_CLASSES];
  uint64_t hash;
  double mean[3], std[3];         /* of the training split, pixels from 0 to 1 */
} image_set;

static inline void image_set_free(image_set *s) {
  for (size_t i = 0; i < s->classes; i++) free(s->names[i]);
  for (size_t i = 0; i < N_SPLITS; i++) free(s->index[i]);
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
static inline unsigned char *image_add(image_set *s, size_t label, int group) {
  if (s->n == s->capacity) {
    size_t more = 2 * s->capacity + 1024;
    if (more > SIZE_MAX / 4 / image_bytes(s)) more = SIZE_MAX / 4 / image_bytes(s);
    s->pixels = realloc(s->pixels, more * image_bytes(s));
    s->label = realloc(s->label, more * sizeof *s->label);
    s->group = realloc(s->group, more);
    if (more <= s->n || !s->pixels || !s->label || !s->group)
      fail(1, "the pictures do not fit into memory: choose a smaller --size");
    s->capacity = more;
  }
  s->label[s->n] = (int32_t)label;
  s->group[s->n] = (unsigned char)group;
  return image_at(s, s->n++);
}

static inline void class_add(image_set *s, const char *name) {
  if (s->classes >= MAX_CLASSES)
    fail(1, "more than %d classes: that is the most vit handles", MAX_CLASSES);
  for (const char *c = name; *c; c++)
    if (is_control(*c))
      fail(1, "the class '%s' has a control character in its name: rename it", name);
  s->names[s->classes] = memory(strlen(name) + 1, 1);
  strcpy(s->names[s->classes++], name);
}

/* ["a","b"] in t, and back: 0 unless s is such a list of n. */
static inline void names_write(char *const *names, size_t n, text *t) {
  for (size_t i = 0; i < n; i++) {
    text_add(t, i ? ",\"" : "[\"");
    for (const char *c = names[i]; *c; c++)
      text_add(t, *c == '"' || *c == '\\' ? "\\%c" : "%c", *c);
    text_add(t, "\"");
  }
  text_add(t, "]");
}

static inline int names_read(image_set *set, const char *s, size_t n) {
  char *name = memory(strlen(s) + 1, 1);
  int ok = *s == '[';
  while (ok && set->classes < n) {
    size_t k = 0;
    s += 1 + strspn(s + 1, " \t\r\n");
    ok = *s++ == '"';
    for (; ok && *s != '"'; s++) {
      int escape = *s == '\\';
      s += escape;
      ok = !is_control(*s) && (!escape || strchr("\"\\/", *s));
      name[k++] = *s;
    }
    name[k] = 0;
    if (!ok) break;
    s += 1 + strspn(s + 1, " \t\r\n");
    ok = *s == (set->classes + 1 < n ? ',' : ']');
    class_add(set, name);
  }
  free(name);
  return ok && set->classes == n && s[1] == 0;
}

/* ---- IDX folders: MNIST, Fashion-MNIST -------------------------------------------- */

/* PART-KIND-ubyte in the folder, raw or .gz, and the path of the one that is there. */
static inline idx idx_read(const char *dir, const char *part, const char *kind,
                           int n_dims, const char **path) {
  char name[64];
  size_t n;
  idx x;
  why w = {""};
  snprintf(name, sizeof name, "%s-%s-ubyte.gz", part, kind);
  const char *packed = path_in(dir, name);
  name[strlen(name) - 3] = 0;
  *path = path_in(dir, name);
  if (!file_exists(*path)) *path = packed;
  if (!file_exists(*path))
    fail(1, "%s has no %s, raw or .gz: --data wants a folder with the four IDX files of "
         "an MNIST-like set", dir, name);
  unsigned char *data = read_file(*path, &n);
#ifndef STB_IMAGE
  if (n > 1 && data[0] == 0x1F && data[1] == 0x8B)
    fail(1, "%s is packed, and this build has no stb_image to unpack it: gunzip -k %s",
         *path, *path);
#endif
  if (!idx_decode(data, n, &x, &w)) fail(1, "%s: %s", *path, w.s);
  if (x.n_dims != n_dims)
    fail(1, "%s: byte 3: %d axes, %s", *path, x.n_dims, n_dims == 3
         ? "pictures have 3: count, rows, columns" : "labels have 1: their count");
  free(data);
  return x;
}

static inline void idx_part(image_set *s, const char *dir, const char *part, int group) {
  const char *images, *labels;
  idx x = idx_read(dir, part, "images-idx3", 3, &images);
  idx y = idx_read(dir, part, "labels-idx1", 1, &labels);
  if (x.dim[0] != y.dim[0])
    fail(1, "%s has %s pictures, %s has %s labels: they must be as many", images,
         commas(x.dim[0]), labels, commas(y.dim[0]));
  if (x.dim[0] < 1 || x.dim[1] < 1 || x.dim[2] < 1 || x.dim[1] > IMAGE_MAX_SIDE
      || x.dim[2] > IMAGE_MAX_SIDE)
    fail(1, "%s: byte 4: %s pictures of %s x %s: there must be some, of 1 to %d pixels",
         images, commas(x.dim[0]), commas(x.dim[1]), commas(x.dim[2]), IMAGE_MAX_SIDE);
  if (s->size == 0) s->size = x.dim[1];
  for (size_t i = 0; i < x.dim[0]; i++) {
    if (y.data[i] >= s->classes)
      fail(1, "%s: byte %s: label %d, but there are %s classes: mend the file or raise "
           "--classes", labels, commas(8 + i), y.data[i], commas(s->classes));
    resize(x.data + i * x.dim[1] * x.dim[2], x.dim[1], x.dim[2], 1,
           image_add(s, y.data[i], group), s->size, s->size);
  }
  free(x.data);
  free(y.data);
}

/* size 0: that of the files. Fashion-MNIST is known by its first labels. */
static inline void images_from_idx(image_set *s, const char *dir, size_t size,
                                   size_t classes) {
  static const char *const clothes[] = {"T-shirt/top", "Trouser", "Pullover", "Dress",
    "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"};
  static const int32_t first[] = {9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 0, 9, 5, 5, 7, 9};
  s->channels = 1;
  s->size = size;
  s->classes = classes;
  idx_part(s, dir, "train", SPLIT_TRAIN);
  idx_part(s, dir, "t10k", SPLIT_TEST);
  int fashion = classes == 10 && s->n >= 16 && memcmp(s->label, first, sizeof first) == 0;
  s->classes = 0;
  for (size_t i = 0; i < classes; i++) class_add(s, fashion ? clothes[i] : commas(i));
}

/* ---- folders of pictures ---------------------------------------------------------- */

#if HAVE_POSIX
static inline int is_visible(const struct dirent *e) { return e->d_name[0] != '.'; }

static inline int is_picture(const struct dirent *e) {
  static const char *const endings[] = {".png", ".jpg", ".jpeg", ".bmp", ".pnm", ".pgm",
                                        ".ppm", ".pbm"};
  const char *dot = strrchr(e->d_name, '.');
  for (size_t i = 0; is_visible(e) && dot && i < sizeof endings / sizeof *endings; i++)
    if (strcasecmp(dot, endings[i]) == 0) return 1;
  return 0;
}

/* The pictures of one split, a sub-folder per class; 0: there is no such folder. The
   first split names the classes, and each of them must have a picture there. Sorted by
   bytes: so does alphasort in the locale that a program begins with. */
static inline int folder_part(image_set *s, const char *path, int group, int skip_bad) {
  struct dirent **folders, **files;
  int n = scandir(path, &folders, is_visible, alphasort), first = s->classes == 0;
  if (n < 0 && (errno == ENOENT || errno == ENOTDIR)) return 0;
  if (n < 0) fail(1, "cannot open the folder %s (%s): give one that can be read", path,
                  strerror(errno));
  for (int c = 0; c < n; free(folders[c++])) {
    const char *name = folders[c]->d_name;
    char folder[MAX_PATH_BYTES];
    size_t label = 0, before = s->n;
    strcpy(folder, path_in(path, name));
    int m = scandir(folder, &files, is_picture, alphasort);
    if (m < 0 && (errno == ENOENT || errno == ENOTDIR)) continue;
    if (m < 0) fail(1, "cannot open the folder %s (%s): give one that can be read",
                    folder, strerror(errno));
    if (first) class_add(s, name);
    while (label < s->classes && strcmp(s->names[label], name) != 0) label++;
    if (label == s->classes)
      fail(1, "%s: there is no class of this name in train: rename the folder", folder);
    for (int i = 0; i < m; free(files[i++])) {
      const char *file = path_in(folder, files[i]->d_name);
      picture p = {0};
      why w = {""};
      if (picture_read(file, &p, &w))
        picture_fit(&p, 3, s->size, image_add(s, label, group));
      else if (skip_bad) s->skipped++;
      else fail(1, "%s: %s; --skip-bad leaves such files out", file, w.s);
    }
    free(files);
    if (s->n == before && first)
      fail(1, "%s: no picture that can be read: an empty class cannot be learnt", folder);
  }
  free(folders);
  if (s->classes < 2)
    fail(1, "%s: %s sub-folders: --images wants one per class, two at least", path,
         commas(s->classes));
  return 1;
}
#else
static inline int folder_part(image_set *s, const char *path, int group, int skip_bad) {
  (void)s, (void)group, (void)skip_bad;
  fail(1, "%s: folders are read on POSIX systems only: use IDX files", path);
}
#endif

/* One channel is enough when no pixel has a colour. */
static inline void images_drop_colour(image_set *s) {
  size_t plane = s->size * s->size;
  for (size_t i = 0; i < s->n; i++) {
    const unsigned char *p = image_at(s, i);
    if (memcmp(p, p + plane, plane) != 0 || memcmp(p, p + 2 * plane, plane) != 0) return;
  }
  for (size_t i = 1; i < s->n; i++)
    memmove(s->pixels + i * plane, s->pixels + 3 * i * plane, plane);
  s->channels = 1;
}

/* A sub-folder per class; or train/ and, if wanted, val/ and test/ that hold them. */
static inline void images_from_folder(image_set *s, const char *dir, size_t size,
                                      int skip_bad) {
  static const char *const parts[N_SPLITS] = {"train", "val", "test"};
  s->channels = 3;
  s->size = size ? size : 28;
  for (int i = 0; i < N_SPLITS; i++) {
    char part[MAX_PATH_BYTES];
    strcpy(part, path_in(dir, parts[i]));
    if (folder_part(s, part, i, skip_bad) || i > SPLIT_TRAIN) continue;
    if (folder_part(s, dir, i, skip_bad)) break;
    fail(1, "cannot open the folder %s (%s): give one that can be read", dir,
         strerror(errno));
  }
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
  double dx = s->x1 - s->x0, dy = s->y1 - s->y0;
  double t = ((x - s->x0) * dx + (y - s->y0) * dy) / (dx * dx + dy * dy);
  t = t < 0 ? 0 : t > 1 ? 1 : t;
  dx = x - s->x0 - t * dx;
  dy = y - s->y0 - t * dy;
  return sqrt(dx * dx + dy * dy);
}

/* Picture number `index` of a seed: position, scale, rotation, thickness, noise. */
static inline void draw_generated(uint64_t seed, uint32_t index, int class_, size_t size,
                                  unsigned char *out) {
  uint32_t stream = exf_rng_stream("pictures");
  double u[5], half = 0.5 * (double)size;
  for (size_t i = 0; i < 5; i++) u[i] = 2 * exf_rng_uniform(seed, stream, index, i) - 1;
  double scale = half * (0.062 + 0.018 * u[0]), thick = 1.4 + 0.5 * u[2];
  double s = 0.35 * u[1], c = sqrt(1 - s * s);      /* of the rotation */
  for (size_t i = 0; i < size * size; i++) {
    size_t x = i % size, y = i / size;
    double px = ((double)x + 0.5 - half * (1 + 0.15 * u[3])) / scale;
    double py = ((double)y + 0.5 - half * (1 + 0.15 * u[4])) / scale;
    double qx = c * px + s * py, qy = c * py - s * px, d = 1e9;
    if (class_ == 0) d = sqrt(qx * qx + qy * qy) - 6.5;               /* disc */
    if (class_ == 1) d = fabs(sqrt(qx * qx + qy * qy) - 7) - thick;   /* ring */
    for (size_t k = 0; k < sizeof strokes / sizeof *strokes; k++)
      if (strokes[k].class_ == class_)
        d = fmin(d, distance_to(&strokes[k], qx, qy) - thick);
    double value = 0.5 - d * scale;                 /* how much of the pixel is covered */
    value = 220 * (value < 0 ? 0 : value > 1 ? 1 : value);
    out[i] = (unsigned char)(value + 35 * exf_rng_uniform(seed, stream, index, 5 + i));
  }
}

static inline void images_generated(image_set *s, uint64_t seed, size_t size, size_t n) {
  static const char *const names[GENERATED_CLASSES] = {"disc", "ring", "square",
    "triangle", "cross", "A", "H", "T", "V", "W"};
  s->channels = 1;
  s->size = size ? size : 28;
  for (int i = 0; i < GENERATED_CLASSES; i++) class_add(s, names[i]);
  for (size_t i = 0; i < n; i++)
    draw_generated(seed, (uint32_t)i, (int)(i % GENERATED_CLASSES), s->size,
                   image_add(s, i % GENERATED_CLASSES, SPLIT_TRAIN));
}

/* ---- splits, and where pictures come from ------------------------------------------ */

/* Splits the set, by the seed: what has no validation or test pictures of its own gets a
   tenth of its training pictures for each, of the validation at most n_val. Then measures
   the pixels of what is left for training. */
static inline void images_split(image_set *s, uint64_t seed, size_t n_val,
                                const char *name) {
  size_t have[N_SPLITS] = {0, 0, 0}, *order = memory(s->n, sizeof *order);
  size_t plane = s->size * s->size;
  for (size_t i = 0; i < s->n; i++) have[s->group[i]]++;
  exf_rng_permutation(seed, exf_rng_stream("split"), 0, order, s->n);
  for (int g = SPLIT_TEST; g > SPLIT_TRAIN; g--) {    /* test first, then validation */
    size_t want = (have[SPLIT_TRAIN] + 9) / 10;
    if (g == SPLIT_VAL && want > n_val) want = n_val;
    for (size_t i = 0; have[g] == 0 && want > 0 && i < s->n; i++) {
      if (s->group[order[i]] != SPLIT_TRAIN) continue;
      s->group[order[i]] = (unsigned char)g;
      have[SPLIT_TRAIN]--;
      want--;
    }
  }
  free(order);
  for (int g = 0; g < N_SPLITS; g++) {
    s->index[g] = memory(s->n, sizeof *s->index[g]);
    for (size_t i = 0; i < s->n; i++)
      if (s->group[i] == g) s->index[g][s->n_split[g]++] = i;
    if (s->n_split[g] < 1) fail(1, "%s: %s pictures are too few for training, validation "
                                "and test: give more", name, commas(s->n));
  }
  for (size_t c = 0; c < s->channels; c++) {
    uint64_t sum = 0, square = 0;
    double count = 255.0 * (double)(s->n_split[SPLIT_TRAIN] * plane);
    for (size_t i = 0; i < s->n_split[SPLIT_TRAIN]; i++) {
      const unsigned char *p = image_at(s, s->index[SPLIT_TRAIN][i]) + c * plane;
      for (size_t k = 0; k < plane; k++) sum += p[k], square += (uint64_t)(p[k] * p[k]);
    }
    s->mean[c] = (double)sum / count;
    double variance = (double)square / count / 255.0 - s->mean[c] * s->mean[c];
    s->std[c] = variance > 1e-6 ? sqrt(variance) : 1;
  }
  s->hash = hash_bytes(s->pixels, s->n * image_bytes(s));
  for (size_t i = 0; i < s->n; i++)
    s->hash = (s->hash ^ (uint64_t)(s->label[i] + 1)) * 1099511628211u;
}

typedef struct source {
  const char *data, *images;
  uint64_t size, classes, val;
  int skip_bad;
} source;

/* Adds its flags, and sets what they say when they are not given. */
static inline void source_flags(source *s, flags *f) {
  const flag table[] = {
    {"data", 's', FLAG_FREE, &s->data, "", "folder of four IDX files, or the word "
     "generated; none: those of the model, else Fashion-MNIST if it is installed"},
    {"images", 's', FLAG_FREE, &s->images, "",
     "folder of pictures, a sub-folder per class"},
    {"skip-bad", 'b', FLAG_FIXED, &s->skip_bad, "false|true",
     "leave out pictures that cannot be read"},
    {"classes", 'u', FLAG_FIXED, &s->classes, "2 256", "of IDX files"},
    {"val", 'u', FLAG_FIXED, &s->val, "1 1073741824",
     "pictures held out for validation, a tenth at most"}, {0}};
  *s = (source){.data = "", .images = "", .size = FLAG_UNSET, .classes = 10, .val = 5000};
  flags_add(f, table);
}

/* One of --data and --images: what is given, else what the run at `place` recorded, if
   there is one, else what is there. */
static inline void source_choose(source *s, flags *f, const char *place) {
  int data_given = *flag_given(f, "data");
  if (*s->data && *s->images) {
    if (data_given && *flag_given(f, "images"))
      fail(2, "--data and --images: give one of them");
    *(data_given ? &s->images : &s->data) = "";
  }
  if (place && *s->images) flag_recorded(f, "images", place);
  else if (place && *s->data && strcmp(s->data, "generated") != 0)
    flag_recorded(f, "data", place);
  if (!*s->images && !*s->data)
    s->data = file_exists(FASHION_FILE) ? FASHION_DIR : "generated";
}

/* Reads and splits them. Returns what they are called. */
static inline const char *source_read(image_set *set, const source *s, uint64_t seed) {
  const char *name = *s->images ? s->images : s->data;
  size_t size = s->size == FLAG_UNSET ? 0 : (size_t)s->size;
  memset(set, 0, sizeof *set);
  if (*s->images) images_from_folder(set, name, size, s->skip_bad);
  else if (strcmp(name, "generated") == 0) images_generated(set, seed, size, 6000);
  else images_from_idx(set, name, size, (size_t)s->classes);
  images_split(set, seed, (size_t)s->val, name);
  return name;
}

/* ---- drawing ---------------------------------------------------------------------- */

/* A picture (channels,size,size) as 12 lines of 24 columns. */
static inline void draw_picture(const unsigned char *pixels, size_t channels,
                                size_t size) {
  static const char *const shade[5] = {" ", "\342\226\221", "\342\226\222",
                                       "\342\226\223", "\342\226\210"};
  size_t plane = channels == 3 ? size * size : 0;
  unsigned char cell[12 * 24], *grey = memory(size, size);
  for (size_t i = 0; i < size * size; i++)
    grey[i] = grey_of(pixels[i], pixels[plane + i], pixels[2 * plane + i]);
  resize(grey, size, size, 1, cell, 12, 24);
  for (size_t i = 0; i < 12 * 24; i++)
    printf("%s%s", shade[cell[i] * 5 / 256], i % 24 == 23 ? "\n" : "");
  free(grey);
}

/* Rows: what it is; columns: what the model took it for; of many classes nothing. */
static inline void print_confusion(const image_set *set, int split,
                                   const int32_t *guess) {
  size_t k = set->classes, count[12][12] = {{0}};
  if (k > 12) return;
  for (size_t i = 0; i < set->n_split[split]; i++)
    count[set->label[set->index[split][i]]][guess[i]]++;
  printf("%-12s", "is \\ taken");
  for (size_t j = 0; j < k; j++) printf(" %5.5s", set->names[j]);
  for (size_t i = 0; i < k; i++) {
    printf("\n%-12.12s", set->names[i]);
    for (size_t j = 0; j < k; j++) printf(" %5s", commas(count[i][j]));
  }
  printf("\n");
}

#endif /* EXF_EXAMPLES_IMAGES_H */
