/* common.h - what the example programs share: errors, growing text, files, flat JSON,
   flags from a table, the settings of a training run, progress, time and memory.

   Include exfusion.h first, and before it define what POSIX asks for:
       #define _POSIX_C_SOURCE 200809L
   An example is a program, so here an error ends it: `fail` prints one line, "program:
   what, rule, what to do", and exits with 1, or with 2 when the command line is wrong. */
#ifndef EXF_EXAMPLES_COMMON_H
#define EXF_EXAMPLES_COMMON_H

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__unix__) || defined(__APPLE__)
#define HAVE_POSIX 1
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>
#else
#define HAVE_POSIX 0
#ifdef _WIN32
#include <direct.h>
#endif
#endif

#if defined(__GNUC__)
#define PRINTS(text, first) __attribute__((format(printf, text, first)))
#define NEVER_RETURNS __attribute__((noreturn))
#else
#define PRINTS(text, first)
#define NEVER_RETURNS
#endif

/* ---- errors and memory ------------------------------------------------------------ */

static const char *program_name = "example";   /* main sets it */
static int progress_drawn;                      /* a progress bar is on this line */

static inline void progress_clear(void) {
  if (progress_drawn) fprintf(stderr, "\r\033[K");
  progress_drawn = 0;
}

/* What a terminal could obey. */
static inline int is_control(char c) { return (unsigned char)c < 32 || c == 127; }

NEVER_RETURNS PRINTS(2, 3)
static inline void fail(int code, const char *format, ...) {
  char line[4096], *c;
  va_list args;
  progress_clear();
  fflush(stdout);
  va_start(args, format);
  vsnprintf(line, sizeof line, format, args);
  va_end(args);
  for (c = line; *c; c++)   /* what it quotes may hold anything: one line, no escapes */
    if (is_control(*c)) *c = '?';
  fprintf(stderr, "%s: %s\n", program_name, line);
  exit(code);
}

/* Ends the program unless all that was printed has arrived. */
static inline void stdout_check(void) {
  errno = 0;
  if (fflush(stdout) == 0 && !ferror(stdout)) return;
  fail(1, "cannot write to stdout (%s): free the disk, or mend the pipe",
       errno ? strerror(errno) : "an earlier write failed");
}

/* Zeroed memory for n things of `size` bytes. */
static inline void *memory(size_t n, size_t size) {
  void *block = calloc(n ? n : 1, size ? size : 1);
  if (!block) fail(1, "out of memory (%.0f MB wanted): make model or batch smaller",
                   (double)n * (double)size / 1e6);
  return block;
}

/* Ends the program when the context holds an error. */
static inline void check(const exf_ctx *ctx) {
  if (!ctx) fail(1, "out of memory: close other programs");
  if (exf_ctx_status(ctx) != EXF_OK) fail(1, "%s", exf_error(ctx));
}

/* The same after a load, whose message does not name the file. */
static inline void check_load(const exf_ctx *ctx, const char *path) {
  if (exf_ctx_status(ctx) != EXF_OK) fail(1, "%s: %s", path, exf_error(ctx));
}

/* isfinite is a macro that makes some compilers warn. */
static inline int is_finite(double x) { return x - x == 0; }

/* Ends the program unless x, a loss or a sum of outputs of this model, is finite. */
static inline void check_finite(double x, const char *model) {
  if (!is_finite(x))
    fail(1, "%s: what the model computes is not finite, its weights are damaged or have "
         "diverged: take another model", model);
}

/* ---- growing text ----------------------------------------------------------------- */

typedef struct text {
  char *s;              /* zero-terminated, or NULL when empty */
  size_t n, capacity;
} text;

PRINTS(2, 3)
static inline void text_add(text *t, const char *format, ...) {
  va_list args;
  int n;
  size_t need;
  va_start(args, format);
  n = vsnprintf(NULL, 0, format, args);
  va_end(args);
  need = t->n + (size_t)(n < 0 ? 0 : n) + 1;
  if (need > t->capacity) {
    char *bigger = (char *)realloc(t->s, 2 * need + 64);
    if (!bigger) fail(1, "out of memory: close other programs");
    t->s = bigger;
    t->capacity = 2 * need + 64;
  }
  va_start(args, format);
  vsnprintf(t->s + t->n, t->capacity - t->n, format, args);
  va_end(args);
  t->n = need - 1;
}

static inline int text_same(const text *a, const text *b) {
  return a->n == b->n && (a->n == 0 || memcmp(a->s, b->s, a->n) == 0);
}

static inline void text_free(text *t) {
  free(t->s);
  memset(t, 0, sizeof *t);
}

/* 1234567 as "1,234,567"; each of four calls in a row has its own buffer. */
static inline const char *commas(uint64_t n) {
  static char buffers[4][32];
  static int next;
  char digits[24], *out = buffers[next = (next + 1) % 4];
  int len = snprintf(digits, sizeof digits, "%llu", (unsigned long long)n), i, k = 0;
  for (i = 0; i < len; i++) {
    if (i > 0 && (len - i) % 3 == 0) out[k++] = ',';
    out[k++] = digits[i];
  }
  out[k] = 0;
  return out;
}

/* The length of the UTF-8 character, and its code; 0 when there is none. */
static inline size_t utf8_next(const char *at, uint32_t *code) {
  const unsigned char *s = (const unsigned char *)at;
  size_t n = *s < 0x80 ? 1 : *s < 0xE0 ? 2 : *s < 0xF0 ? 3 : 4, i;
  if (*s == 0 || (*s >= 0x80 && *s < 0xC2) || *s > 0xF4
      || (*s == 0xE0 && s[1] < 0xA0) || (*s == 0xED && s[1] > 0x9F)
      || (*s == 0xF0 && s[1] < 0x90) || (*s == 0xF4 && s[1] > 0x8F)) return 0;
  *code = n == 1 ? *s : *s & (0x7Fu >> n);
  for (i = 1; i < n; i++) {
    if ((s[i] & 0xC0) != 0x80) return 0;
    *code = *code << 6 | (s[i] & 0x3Fu);
  }
  return n;
}

/* Stored texts go into metadata, which are UTF-8. */
static inline int is_utf8(const char *s) {
  uint32_t code;
  size_t n;
  for (; *s; s += n)
    if ((n = utf8_next(s, &code)) == 0) return 0;
  return 1;
}

/* A name may hold anything: control characters become '?'. */
static inline void print_plain(const char *s) {
  for (; *s; s++) putchar(is_control(*s) ? '?' : *s);
}

/* A word of a command to be pasted into a shell. */
static inline void print_word(const char *s) {
  size_t bare = strspn(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
                          "_./+:=@%,-");
  if (*s && !s[bare]) {
    print_plain(s);
    return;
  }
  putchar('\'');
  for (; *s; s++) {
    if (*s == '\'') printf("'\\''");
    else putchar(is_control(*s) ? '?' : *s);
  }
  putchar('\'');
}

/* ---- files ------------------------------------------------------------------------ */

/* "dir/name", to be freed. */
static inline char *path_in(const char *dir, const char *name) {
  text t = {NULL, 0, 0};
  size_t n = strlen(dir);
  text_add(&t, "%s%s%s", dir, n > 0 && dir[n - 1] == '/' ? "" : "/", name);
  return t.s;
}

static inline int file_exists(const char *path) {
  FILE *file = fopen(path, "rb");
  if (file) fclose(file);
  return file != NULL;
}

static inline int is_directory(const char *path) {
#if HAVE_POSIX
  struct stat status;
  return stat(path, &status) == 0 && S_ISDIR(status.st_mode);
#else
  return !file_exists(path);
#endif
}

/* A whole file, with a zero byte behind it, to be freed; NULL, with the cause in errno,
   when it cannot be opened or read. */
static inline unsigned char *file_bytes(const char *path, size_t *n) {
  FILE *file = fopen(path, "rb");
  size_t capacity = 1 << 16, got;
  unsigned char *data;
  int cause;
  if (!file) return NULL;
  data = (unsigned char *)memory(capacity + 1, 1);
  *n = 0;
  while ((got = fread(data + *n, 1, capacity - *n, file)) > 0) {
    *n += got;
    if (*n == capacity) {
      unsigned char *bigger = capacity < SIZE_MAX / 4
        ? (unsigned char *)realloc(data, 2 * capacity + 1) : NULL;
      if (!bigger) fail(1, "%s does not fit into memory: give a smaller file", path);
      data = bigger;
      capacity *= 2;
    }
  }
  cause = errno;
  if (ferror(file)) {
    free(data);
    data = NULL;
  } else {
    data[*n] = 0;
  }
  fclose(file);
  errno = cause;
  return data;
}

/* The same; ends the program when it cannot be read. */
static inline unsigned char *read_file(const char *path, size_t *n) {
  unsigned char *data = file_bytes(path, n);
  if (!data) fail(1, "cannot read %s (%s): give a file that can be read", path,
                  strerror(errno));
  return data;
}

/* A file of text, to be freed: no zero byte hides the rest of it. */
static inline char *read_text(const char *path) {
  size_t n;
  char *data = (char *)read_file(path, &n);
  if (strlen(data) < n)
    fail(1, "%s: byte %s is zero, which no text holds: write the file anew", path,
         commas(strlen(data)));
  return data;
}

/* A safetensors file. */
static inline exf_st *open_tensors(exf_ctx *ctx, const char *path) {
  exf_st *st = exf_st_open(ctx, path, NULL);
  check(ctx);
  return st;
}

/* To stdout, at once. */
static inline void put_bytes(const void *bytes, size_t n) {
  fwrite(bytes, 1, n, stdout);
  stdout_check();
}

/* FNV-1a, to recognise a data file. */
static inline uint64_t hash_bytes(const unsigned char *data, size_t n) {
  uint64_t hash = 14695981039346656037u;
  size_t i;
  for (i = 0; i < n; i++) hash = (hash ^ data[i]) * 1099511628211u;
  return hash;
}

/* Makes the folder with its parents, and tries whether it can be written. */
static inline void directory_make(const char *path) {
  char *copy = path_in(path, ""), *c;
  FILE *probe;
  for (c = copy + 1; *c; c++) {
    if (*c != '/') continue;
    *c = 0;
#if HAVE_POSIX
    if (mkdir(copy, 0777) != 0 && errno != EEXIST) {
      int cause = errno;                       /* is_directory changes it */
      if (!is_directory(copy))
        fail(1, "cannot make the folder %s (%s): choose another --out", copy,
             strerror(cause));
    }
#elif defined(_WIN32)
    (void)_mkdir(copy);
#endif
    *c = '/';
  }
  free(copy);
  copy = path_in(path, "probe.tmp");
  probe = fopen(copy, "wb");
  if (!probe) fail(1, "cannot write into the folder %s (%s): choose another --out", path,
                   strerror(errno));
  fclose(probe);
  remove(copy);
  free(copy);
}

/* ---- text as data: every byte that occurs is a token ------------------------------ */

typedef struct vocabulary {
  size_t n;
  unsigned char byte[256];   /* of a token, ascending */
  int token[256];            /* of a byte, or -1 */
} vocabulary;

typedef struct dataset {
  unsigned char *tokens;     /* n; the first n_train of them train */
  size_t n, n_train;
  uint64_t hash;             /* of the file */
} dataset;

static inline void vocabulary_index(vocabulary *v) {
  int i;
  for (i = 0; i < 256; i++) v->token[i] = -1;
  for (i = 0; i < (int)v->n; i++) v->token[v->byte[i]] = i;
}

/* [10,32,33], as metadata keep it */
static inline void vocabulary_write(const vocabulary *v, text *t) {
  size_t i;
  for (i = 0; i < v->n; i++) text_add(t, "%s%d", i ? "," : "[", v->byte[i]);
  text_add(t, "]");
}

/* Returns 0 unless s lists ascending byte values. */
static inline int vocabulary_read(vocabulary *v, const char *s) {
  char *end;
  v->n = 0;
  if (*s != '[') return 0;
  do {
    long b = strtol(++s, &end, 10);
    if (end == s || b < 0 || b > 255 || (v->n && b <= v->byte[v->n - 1])) return 0;
    v->byte[v->n++] = (unsigned char)b;
    s = end + strspn(end, " ");
  } while (*s == ',');
  vocabulary_index(v);
  return s[0] == ']' && s[1] == 0;
}

/* Reads the bytes of path; an empty vocabulary becomes theirs, and must then be as large
   as `expected`, unless that is 0. */
static inline void dataset_read(dataset *d, const char *path, vocabulary *v,
                                size_t expected) {
  size_t i, count[256] = {0};
  d->tokens = read_file(path, &d->n);
  if (d->n == 0) fail(1, "%s is empty: give a file with text", path);
  d->n_train = d->n / 10 * 9 + d->n % 10 * 9 / 10;
  d->hash = hash_bytes(d->tokens, d->n);
  if (v->n > 0) return;
  for (i = 0; i < d->n; i++) count[d->tokens[i]]++;
  for (i = 0; i < 256; i++)
    if (count[i]) v->byte[v->n++] = (unsigned char)i;
  vocabulary_index(v);
  if (expected && v->n != expected)
    fail(2, "--data %s has %d different bytes, but the model a vocabulary of %d and no "
         "list of it: give the text it was made for", path, (int)v->n, (int)expected);
}

/* Turns bytes into tokens. */
static inline void dataset_encode(dataset *d, const char *path, const vocabulary *v) {
  size_t i;
  for (i = 0; i < d->n; i++) {
    int token = v->token[d->tokens[i]];
    if (token < 0) fail(1, "%s: the character of code %d at position %s is not in the "
                        "model's vocabulary of %d: give text like that it was trained on",
                        path, d->tokens[i], commas(i), (int)v->n);
    d->tokens[i] = (unsigned char)token;
  }
}

/* Names the character that byte `at` of the prompt belongs to. */
NEVER_RETURNS
static inline void prompt_refuse(const char *prompt, size_t at, const vocabulary *v) {
  uint32_t code = 0;
  size_t first = at, n;
  while (first > 0 && (prompt[first] & 0xC0) == 0x80) first--;
  n = utf8_next(prompt + first, &code);
  if (first + n <= at) code = (unsigned char)prompt[at];
  if (first + n <= at || code < 33 || (code > 126 && code < 161)) n = 0;
  fail(1, "--prompt: the character %.*s%sof code %u is not in the model's vocabulary of "
       "%d: leave it away", (int)n, prompt + first, n ? " " : "", (unsigned)code,
       (int)v->n);
}

/* The prompt as tokens, the last `block` of them; a line end (10) when it is empty. */
static inline size_t prompt_tokens(const char *prompt, const vocabulary *v,
                                   size_t block, int32_t *tokens) {
  size_t n = strlen(prompt), i, skip = n > block ? n - block : 0;
  for (i = 0; i < n; i++) {
    unsigned char byte = (unsigned char)prompt[i];
    if (v->token[byte] < 0) prompt_refuse(prompt, i, v);
    if (i >= skip) tokens[i - skip] = v->token[byte];
  }
  if (n == 0) tokens[0] = v->token[10] < 0 ? 0 : v->token[10];
  return n == 0 ? 1 : n - skip;
}

/* The split must hold one window and its targets. */
static inline void dataset_check(size_t n, size_t block, const char *split,
                                 const char *path) {
  if (n < block + 1)
    fail(1, "%s: the %s split has %s bytes, --block %s needs one more than its length: "
         "give more text or a smaller --block", path, split, commas(n), commas(block));
}

/* The text of exfusion.h, here or beside the program, for runs without --data. */
static inline char *default_data(const char *self) {
  static const char *const places[] = {"", "../", "../include/"};
  const char *slash = strrchr(self, '/');
  text t = {NULL, 0, 0};
  int i;
  text_add(&t, "exfusion.h");
  for (i = 0; i < 3 && !file_exists(t.s); i++) {
    t.n = 0;
    text_add(&t, "%.*s%sexfusion.h", slash ? (int)(slash - self) + 1 : 0, self,
             places[i]);
  }
  if (!file_exists(t.s))
    fail(1, "no --data, and exfusion.h is not to be found: give --data FILE");
  return t.s;
}

/* ---- flat JSON: one object of texts, numbers and booleans ------------------------- */

/* "key":"value" with what JSON wants escaped; key NULL: the value alone. */
static inline void json_text(text *t, const char *key, const char *value) {
  if (key) text_add(t, "\"%s\":", key);
  text_add(t, "\"");
  for (; *value; value++) {
    unsigned char c = (unsigned char)*value;
    if (c == '"' || c == '\\') text_add(t, "\\%c", c);
    else if (c < 32) text_add(t, "\\u%04x", c);
    else text_add(t, "%c", c);
  }
  text_add(t, "\"");
}

/* The shortest digits that read back as the same double; null for what is no number. */
static inline void json_number(text *t, const char *key, double value) {
  int digits = 15;
  char s[40];
  if (key) text_add(t, "\"%s\":", key);
  if (!(fabs(value) <= 1.7e308)) {
    text_add(t, "null");
    return;
  }
  do snprintf(s, sizeof s, "%.*g", digits, value);
  while (++digits <= 17 && (strtod(s, NULL) < value || strtod(s, NULL) > value));
  text_add(t, "%s", s);
}

static inline void json_integer(text *t, const char *key, uint64_t value) {
  text_add(t, "%s%s%s%llu", key ? "\"" : "", key ? key : "", key ? "\":" : "",
           (unsigned long long)value);
}

typedef struct json {
  char *buffer;
  struct { const char *key, *value; } field[64];  /* both unescaped */
  int n;
} json;

static inline void json_free(json *j) {
  free(j->buffer);
  memset(j, 0, sizeof *j);
}

static inline const char *json_find(const json *j, const char *key) {
  int i;
  for (i = 0; i < j->n; i++)
    if (strcmp(j->field[i].key, key) == 0) return j->field[i].value;
  return NULL;
}

static inline char *json_space(char *s) {
  while (*s == ' ' || *s == '\t' || *s == '\n' || *s == '\r') s++;
  return s;
}

/* Unescapes the string that starts at s in place and returns what follows it, or NULL;
   \u is understood below 128, which is all json_text writes. */
static inline char *json_string(char *s) {
  static const char plain[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
  char *out = s;
  const char *found;
  if (*s++ != '"') return NULL;
  while (*s != '"') {
    if ((unsigned char)*s < 32) return NULL;
    if (*s != '\\') {
      *out++ = *s++;
    } else if (s[1] == 'u') {
      char hex[5] = {0, 0, 0, 0, 0};
      long code;
      strncpy(hex, s + 2, 4);
      code = strtol(hex, NULL, 16);
      if (strspn(hex, "0123456789abcdefABCDEF") != 4 || code < 1 || code > 127)
        return NULL;
      *out++ = (char)code;
      s += 6;
    } else {
      found = s[1] ? strchr(plain, s[1]) : NULL;
      if (!found) return NULL;
      *out++ = meant[found - plain];
      s += 2;
    }
  }
  *out = 0;
  return s + 1;
}

/* One member "key": value; returns what follows it, or NULL. */
static inline char *json_member(json *j, char *s) {
  char *key = s, *value, *end;
  if ((s = json_string(s)) == NULL) return NULL;
  s = json_space(s);
  if (*s != ':' || j->n == 64 || json_find(j, key)) return NULL;
  value = s = json_space(s + 1);
  if (*s == '"') {
    s = json_string(s);
  } else {
    size_t n = strspn(s, "+-.0123456789eEaflnrstu");  /* numbers, true, false, null */
    if (n == 0) return NULL;
    end = json_space(s + n);
    if (*end != ',' && *end != '}') return NULL;
    memmove(s - 1, s, n);                             /* room for the final zero */
    value = s - 1;
    s[n - 1] = 0;
    s = end;
  }
  j->field[j->n].key = key;
  j->field[j->n++].value = value;
  return s ? json_space(s) : NULL;
}

/* Reads a flat object; `what` names it in the error. */
static inline void json_read(json *j, const char *source, const char *what) {
  size_t n = strlen(source);
  char *s;
  memset(j, 0, sizeof *j);
  j->buffer = (char *)memory(n + 1, 1);
  memcpy(j->buffer, source, n);
  s = json_space(j->buffer);
  s = *s == '{' ? json_space(s + 1) : NULL;
  if (s && *s != '}') {
    s = json_member(j, s);
    while (s && *s == ',') s = json_member(j, json_space(s + 1));
  }
  if (!s || *s != '}' || *json_space(s + 1) != 0)
    fail(1, "%s is not a flat JSON object: texts, numbers, true and false only, "
         "no key twice", what);
}

/* ---- flags ------------------------------------------------------------------------ */

/* Who stores a flag, and whether a resumed run may differ in it. */
enum {
  FLAG_TRAINING,  /* in run.json and checkpoint; must agree */
  FLAG_DATA,      /* the same, but it is the content that must agree */
  FLAG_RUNNING,   /* in run.json; free */
  FLAG_PLACE,     /* in run.json; not taken from there when resuming */
  FLAG_ONCE       /* of this command only */
};
#define FLAG_UNSET UINT64_MAX   /* of a whole number with low < 0; null in JSON */
typedef struct flag {
  const char *name;     /* without dashes; a single letter takes one dash */
  char kind;            /* u whole number, x number, s text, b switch, c choice */
  int scope;
  void *value;          /* uint64_t, double, const char *, int, int */
  double low, high;     /* of a number */
  const char *choices;  /* "a|b|c" of a choice; the value is the index */
  const char *help;
  int given;            /* by the user: 1 on the command line, 2 by --config */
  char *owned;          /* the text behind a const char * value */
} flag;

static inline size_t edit_distance(const char *a, const char *b) {
  size_t row[33], i, j, n = strlen(b), diagonal, above;
  if (n > 32) n = 32;
  for (j = 0; j <= n; j++) row[j] = j;
  for (i = 0; a[i]; i++) {
    diagonal = row[0];
    row[0] = i + 1;
    for (j = 1; j <= n; j++) {
      above = row[j];
      row[j] = diagonal + (a[i] != b[j - 1]);
      if (above + 1 < row[j]) row[j] = above + 1;
      if (row[j - 1] + 1 < row[j]) row[j] = row[j - 1] + 1;
      diagonal = above;
    }
  }
  return row[n];
}

/* Number `index` of "a|b|c" in name (48 bytes); 0 when there is none. */
static inline int choice_name(const char *choices, int index, char *name) {
  size_t n;
  while (index-- > 0) {
    choices = strchr(choices, '|');
    if (!choices) return 0;
    choices++;
  }
  n = strcspn(choices, "|");
  if (n > 47) n = 47;
  memcpy(name, choices, n);
  name[n] = 0;
  return 1;
}

/* The index of value in "a|b|c"; ends the program, naming the nearest, if absent. */
static inline int choice_find(const char *choices, const char *value, const char *what) {
  char name[48], nearest[48] = "";
  size_t best = (size_t)-1, d;
  int i;
  for (i = 0; choice_name(choices, i, name); i++) {
    if (strcmp(name, value) == 0) return i;
    d = edit_distance(value, name);
    if (d < best) strcpy(nearest, name);
    if (d < best) best = d;
  }
  fail(2, "%s '%s' is unknown: the choices are %s; did you mean %s?", what, value,
       choices, nearest);
}

static inline const char *flag_dashes(const char *name) { return name[1] ? "--" : "-"; }

static inline void flag_bad(const flag *f, const char *value, const char *from) {
  char wanted[96];
  if (f->kind == 'b') snprintf(wanted, sizeof wanted, "true or false");
  else snprintf(wanted, sizeof wanted, "a %snumber from %.10g to %.10g",
                f->kind == 'u' ? "whole " : "",
                f->kind == 'u' && f->low < 0 ? 0 : f->low, f->high);
  fail(2, "%s%s%s takes %s, not '%s': see --help", from, flag_dashes(f->name), f->name,
       wanted, value);
}

/* Sets a flag from text. from: "" or the file it comes from with ": " behind it. */
static inline void flag_set(flag *f, const char *value, const char *from) {
  char *end = NULL, what[600];
  errno = 0;
  if (f->kind == 'u' && f->low < 0 && strcmp(value, "null") == 0) {
    *(uint64_t *)f->value = FLAG_UNSET;
  } else if (f->kind == 'u') {
    unsigned long long u = strtoull(value, &end, 10);
    if (value[0] < '0' || value[0] > '9' || *end || errno || (double)u < f->low
        || (double)u > f->high) flag_bad(f, value, from);
    *(uint64_t *)f->value = u;
  } else if (f->kind == 'x') {
    double x = strtod(value, &end);
    if (!*value || strspn(value, "+-.0123456789eE") != strlen(value) || *end
        || !(x >= f->low && x <= f->high)) flag_bad(f, value, from);
    *(double *)f->value = x;
  } else if (f->kind == 'b') {
    int on = strcmp(value, "true") == 0 || strcmp(value, "1") == 0;
    if (!on && strcmp(value, "false") != 0 && strcmp(value, "0") != 0)
      flag_bad(f, value, from);
    *(int *)f->value = on;
  } else if (f->kind == 'c') {
    snprintf(what, sizeof what, "%s%s%s", from, flag_dashes(f->name), f->name);
    *(int *)f->value = choice_find(f->choices, value, what);
  } else {
    char *copy = (char *)memory(strlen(value) + 1, 1);
    if (f->scope != FLAG_ONCE && !is_utf8(value))
      fail(2, "%s--%s is not UTF-8, which metadata need: rename the file", from, f->name);
    strcpy(copy, value);
    free(f->owned);
    f->owned = copy;
    *(const char **)f->value = copy;
  }
}

/* The value as JSON. */
static inline void flag_json(const flag *f, text *t) {
  char name[48];
  if (f->kind == 'u' && f->low < 0 && *(uint64_t *)f->value == FLAG_UNSET)
    text_add(t, "null");
  else if (f->kind == 'u') json_integer(t, NULL, *(uint64_t *)f->value);
  else if (f->kind == 'x') json_number(t, NULL, *(double *)f->value);
  else if (f->kind == 'b') text_add(t, *(int *)f->value ? "true" : "false");
  else if (f->kind == 's') json_text(t, NULL, *(const char **)f->value);
  else if (choice_name(f->choices, *(int *)f->value, name)) json_text(t, NULL, name);
}

static inline flag *flag_find(flag *flags, int n, const char *name) {
  int i;
  for (i = 0; i < n; i++)
    if (strcmp(flags[i].name, name) == 0) return &flags[i];
  return NULL;
}

/* The flag of that name; ends the program, naming what is near, if absent. typed: the
   name as the user wrote it. from: as for flag_set. */
static inline flag *flag_expect(flag *flags, int n, const char *name, const char *typed,
                                const char *from) {
  flag *f = flag_find(flags, n, name);
  size_t best = strlen(name);
  const char *nearest = NULL;
  int i;
  if (f) return f;
  if (n == 0) fail(2, "%sunknown flag %s: there are none here", from, typed);
  for (i = 0; i < n; i++) {
    size_t d = edit_distance(name, flags[i].name);
    if (d < best) nearest = flags[i].name;
    if (d < best) best = d;
  }
  if (!nearest) fail(2, "%sunknown flag %s: --help lists all", from, typed);
  fail(2, "%sunknown flag %s: did you mean %s%s? (--help lists all)", from, typed,
       flag_dashes(nearest), nearest);
}

static inline void flags_help(const flag *flags, int n, const char *usage) {
  static const char *const kinds = "uxsbc", *const values[] = {"N", "X", "S", "", ""};
  int i;
  printf("usage: %s\n\n", usage);
  for (i = 0; i < n; i++) {
    const flag *f = &flags[i];
    text name = {NULL, 0, 0}, value = {NULL, 0, 0};
    text_add(&name, "%s%s %s", flag_dashes(f->name), f->name,
             f->kind == 'c' ? f->choices : values[strchr(kinds, f->kind) - kinds]);
    flag_json(f, &value);
    printf("  %-22s %s", name.s, name.n > 22 ? "\n                         " : "");
    printf(f->kind == 'b' ? "%s\n" : "%s (default %s)\n", f->help, value.s);
    text_free(&name);
    text_free(&value);
  }
}

/* Reads argv[2..]; at most one bare word goes to *word (NULL: none is wanted). --help
   prints the table and ends the program. */
static inline void flags_parse(flag *flags, int n, int argc, char **argv,
                               const char **word, const char *usage) {
  int i;
  for (i = 2; i < argc; i++) {
    const char *a = argv[i], *equals = strchr(a, '=');
    size_t dashes = strspn(a, "-");
    char name[48], typed[96];
    size_t len = equals ? (size_t)(equals - a) : strlen(a);
    flag *f;
    if (strcmp(a, "--help") == 0 || strcmp(a, "-h") == 0) {
      flags_help(flags, n, usage);
      stdout_check();
      exit(0);
    }
    if (dashes == 0 || !a[1]) {
      if (!word || *word) fail(2, "unexpected argument '%s': usage: %s", a, usage);
      *word = a;
      continue;
    }
    if (dashes > len) dashes = len;
    snprintf(name, sizeof name, "%.*s", (int)(len - dashes), a + dashes);
    snprintf(typed, sizeof typed, "%.*s", (int)len, a);
    f = flag_expect(flags, n, name, typed, "");
    if (dashes != strlen(flag_dashes(name)))
      fail(2, "unknown flag %s: did you mean %s%s?", typed, flag_dashes(name), name);
    f->given = 1;
    if (equals) flag_set(f, equals + 1, "");
    else if (f->kind == 'b') *(int *)f->value = 1;
    else if (i + 1 < argc) flag_set(f, argv[++i], "");
    else fail(2, "%s%s needs a value: %s", flag_dashes(name), name, f->help);
  }
}

/* The flags of the scopes whose bits are set, as a flat object. */
static inline void flags_write(const flag *flags, int n, unsigned scopes, int lines,
                               text *t) {
  int i, first = 1;
  text_add(t, "{");
  for (i = 0; i < n; i++) {
    if (!(scopes & 1u << flags[i].scope)) continue;
    text_add(t, "%s%s\"%s\":%s", first ? "" : ",", lines ? "\n  " : "", flags[i].name,
             lines ? " " : "");
    flag_json(&flags[i], t);
    first = 0;
  }
  text_add(t, lines ? "\n}\n" : "}");
}

/* Takes flags of the scopes whose bits are set from JSON, except those given. agree:
   given ones must have the stored value; else they go before it and those taken count as
   given. Flags of other scopes are skipped. */
static inline void flags_read(flag *flags, int n, const char *source, const char *what,
                              unsigned scopes, int agree) {
  json j;
  char from[512];
  int i;
  json_read(&j, source, what);
  snprintf(from, sizeof from, "%s: ", what);
  for (i = 0; i < j.n; i++) {
    flag *f = flag_expect(flags, n, j.field[i].key, j.field[i].key, from);
    text mine = {NULL, 0, 0}, theirs = {NULL, 0, 0};
    if (!(scopes & 1u << f->scope)) continue;
    if (f->given && (!agree || f->scope != FLAG_TRAINING)) continue;
    flag_json(f, &mine);
    flag_set(f, j.field[i].value, from);
    flag_json(f, &theirs);
    if (f->given && !text_same(&mine, &theirs))
      fail(2, "--%s is %s here but %s in %s: leave the flag away, or start a new run",
           f->name, mine.s, theirs.s, what);
    if (!agree) f->given = 2;
    text_free(&mine);
    text_free(&theirs);
  }
  json_free(&j);
}

/* A u flag that must agree with what the file says, or takes its value. */
static inline void flag_agree(flag *flags, int n, const char *name, size_t value,
                              const char *path) {
  flag *f = flag_find(flags, n, name);
  uint64_t *mine = (uint64_t *)f->value;
  if (f->given && *mine != value)
    fail(2, "--%s is %s but %s in %s: leave the flag away", name, commas((size_t)*mine),
         commas(value), path);
  *mine = value;
}

/* Data that a run recorded may have a name relative to where it was started. run: its
   folder or its model. */
static inline void flag_recorded(const flag *f, const char *run) {
  const char *path = *(const char *const *)f->value;
  if (f->given || file_exists(path) || is_directory(path)) return;
  fail(1, "cannot open %s (%s), the data that %s recorded: say with --%s where they are",
       path, strerror(errno), run, f->name);
}

static inline void flags_free(flag *flags, int n) {
  int i;
  for (i = 0; i < n; i++) free(flags[i].owned);
}

/* ---- settings every training program has ------------------------------------------ */

typedef struct settings {
  const char *out, *config;
  int ffn, dw, upcycle, routed;                          /* ExFusion */
  uint64_t experts;
  double mu;
  uint64_t layers, heads, width, batch, accum;           /* model and batch */
  double dropout;
  uint64_t warmup, eval_every, save_every;               /* training */
  double lr, min_lr, weight_decay, beta1, beta2, clip;
  uint64_t seed, threads;
  int isa, resume, quick, quiet;
} settings;

#define SETTINGS_MAX_FLAGS 32
/* Writes the flags that set s, each with the value that is in s as its default. */
static inline int settings_flags(settings *s, flag *flags) {
  const double big = 1073741824.0;
  const flag table[] = {
    {"out", 's', FLAG_PLACE, &s->out, 0, 0, NULL,
     "folder of the results; weights.csv thins long runs to about 1,000 rows per FFN", 0,
     NULL},
    {"config", 's', FLAG_ONCE, &s->config, 0, 0, NULL,
     "read flags from a run.json; those given here go before", 0, NULL},
    {"ffn", 'c', FLAG_TRAINING, &s->ffn, 0, 0, "dense|sw|dw|mb",
     "fusion weights: none, static, dynamic, memory bank", 0, NULL},
    {"experts", 'u', FLAG_TRAINING, &s->experts, 1, 65536, NULL, "experts per FFN", 0,
     NULL},
    {"dw", 'c', FLAG_TRAINING, &s->dw, 0, 0, "raw|softmax", "weights of dw", 0, NULL},
    {"upcycle", 'c', FLAG_TRAINING, &s->upcycle, 0, 0,
     "default|zerosum|independent|independent-plain|copy|drop",
     "where experts come from; default: independent from scratch, else zerosum", 0, NULL},
    {"mu", 'x', FLAG_TRAINING, &s->mu, 0, 1, NULL, "momentum of the memory bank", 0,
     NULL},
    {"routed", 'b', FLAG_TRAINING, &s->routed, 0, 0, NULL,
     "mb: train with the router alone, the bank only records", 0, NULL},
    {"layers", 'u', FLAG_TRAINING, &s->layers, 1, 1024, NULL, "blocks", 0, NULL},
    {"heads", 'u', FLAG_TRAINING, &s->heads, 1, big, NULL, "attention heads", 0, NULL},
    {"width", 'u', FLAG_TRAINING, &s->width, 1, big, NULL, "numbers per position", 0,
     NULL},
    {"batch", 'u', FLAG_TRAINING, &s->batch, 1, big, NULL, "samples per micro-batch", 0,
     NULL},
    {"accum", 'u', FLAG_TRAINING, &s->accum, 1, big, NULL, "micro-batches per step", 0,
     NULL},
    {"dropout", 'x', FLAG_TRAINING, &s->dropout, 0, 0.999, NULL, "dropout probability", 0,
     NULL},
    {"lr", 'x', FLAG_TRAINING, &s->lr, 0, 1e6, NULL, "learning rate", 0, NULL},
    {"min-lr", 'x', FLAG_TRAINING, &s->min_lr, 0, 1e6, NULL, "its end (cosine)", 0, NULL},
    {"warmup", 'u', FLAG_TRAINING, &s->warmup, 0, 4e9, NULL, "warm-up steps", 0, NULL},
    {"weight-decay", 'x', FLAG_TRAINING, &s->weight_decay, 0, 1e6, NULL,
     "decay of matrices and embeddings", 0, NULL},
    {"beta1", 'x', FLAG_TRAINING, &s->beta1, 0, 0.999999, NULL, "AdamW", 0, NULL},
    {"beta2", 'x', FLAG_TRAINING, &s->beta2, 0, 0.999999, NULL, "AdamW", 0, NULL},
    {"clip", 'x', FLAG_TRAINING, &s->clip, 0, 1e9, NULL,
     "largest gradient norm; 0: no clipping", 0, NULL},
    {"seed", 'u', FLAG_TRAINING, &s->seed, 0, 1.8e19, NULL, "of every random number", 0,
     NULL},
    {"eval-every", 'u', FLAG_RUNNING, &s->eval_every, 0, 4e9, NULL,
     "steps between evaluations; 0: at the end only", 0, NULL},
    {"save-every", 'u', FLAG_RUNNING, &s->save_every, 0, 4e9, NULL,
     "steps between checkpoints; 0: at the end only", 0, NULL},
    {"threads", 'u', FLAG_RUNNING, &s->threads, 0, 4096, NULL,
     "0: as many as there are processors", 0, NULL},
    {"isa", 'c', FLAG_RUNNING, &s->isa, 0, 0, "auto|ref|sse2|avx2|avx512|neon",
     "instruction set", 0, NULL},
    {"quick", 'b', FLAG_TRAINING, &s->quick, 0, 0, NULL, "a version of seconds", 0, NULL},
    {"resume", 'b', FLAG_ONCE, &s->resume, 0, 0, NULL,
     "continue from the checkpoint in --out", 0, NULL},
    {"quiet", 'b', FLAG_ONCE, &s->quiet, 0, 0, NULL, "print errors only", 0, NULL}};
  memcpy(flags, table, sizeof table);
  return (int)(sizeof table / sizeof table[0]);
}

static inline exf_fusion_desc settings_fusion(const settings *s) {
  exf_fusion_desc f;
  memset(&f, 0, sizeof f);
  f.variant = (exf_variant)s->ffn;
  f.n_experts = (size_t)s->experts;
  f.dw_softmax = s->dw;
  f.routed = s->routed;
  f.mu = s->mu > 0 ? s->mu : -1;
  f.upcycle = (exf_upcycle)s->upcycle;
  return f;
}

static inline exf_optim *settings_optim(const settings *s, exf_model *model) {
  exf_optim_desc d;
  memset(&d, 0, sizeof d);
  d.beta1 = s->beta1 > 0 ? s->beta1 : -1;
  d.beta2 = s->beta2 > 0 ? s->beta2 : -1;
  d.weight_decay = s->weight_decay;
  d.clip = s->clip;
  return exf_optim_new(model, &d);
}

/* A warm-up that is unset takes a twentieth of the run. */
static inline exf_schedule settings_schedule(const settings *s, uint64_t steps) {
  exf_schedule schedule;
  schedule.kind = EXF_SCHEDULE_COSINE;
  schedule.lr = s->lr;
  schedule.min_lr = s->min_lr;
  schedule.warmup = s->warmup == FLAG_UNSET ? steps / 20 : s->warmup;
  schedule.steps = steps;
  return schedule;
}

static inline void log_line(void *user, const char *line) {
  if (*(const int *)user) return;
  progress_clear();
  fprintf(stderr, "%s\n", line);
}

/* ---- tables of numbers ------------------------------------------------------------ */

/* The header, and of the file the rows whose first field is below `end`, up to the first
   that is not in order of steps or is cut off. Returns the rows. */
static inline size_t csv_keep(const char *path, const char *header, uint64_t end,
                              text *out) {
  size_t n, rows = 0;
  char *data, *line, *next;
  unsigned long long step, last = 0;
  out->n = 0;
  text_add(out, "%s\n", header);
  if (!file_exists(path)) return 0;
  data = (char *)read_file(path, &n);
  line = strchr(data, '\n');
  if (line && (size_t)(line - data) == strlen(header)
      && strncmp(data, header, strlen(header)) == 0) {
    for (line++; (next = strchr(line, '\n')) != NULL; line = next + 1) {
      if (sscanf(line, "%llu,", &step) != 1 || step >= end || step < last) break;
      text_add(out, "%.*s\n", (int)(next - line), line);
      last = step;
      rows++;
    }
  }
  free(data);
  return rows;
}

/* Field k of a row as a number; 0 when it is empty or absent. */
static inline double csv_field(const char *row, int k) {
  while (k-- > 0) {
    row += strcspn(row, ",\n");
    if (*row++ != ',') return 0;
  }
  return *row == ',' || *row == '\n' ? 0 : strtod(row, NULL);
}

static inline int compare_doubles(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* Sorts x. */
static inline double median(double *x, size_t n) {
  if (n == 0) return 0;
  qsort(x, n, sizeof *x, compare_doubles);
  return n % 2 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}

/* ---- time, memory, signals, progress ---------------------------------------------- */

static inline double seconds(void) {
#if HAVE_POSIX
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#else
  return (double)clock() / CLOCKS_PER_SEC;
#endif
}

/* The most memory the program has held, as the operating system sees it; elsewhere, as
   the library does. */
static inline size_t peak_bytes(const exf_ctx *ctx) {
#if HAVE_POSIX
  struct rusage usage;
  if (getrusage(RUSAGE_SELF, &usage) == 0 && usage.ru_maxrss > 0) {
#ifdef __APPLE__
    return (size_t)usage.ru_maxrss;
#else
    return (size_t)usage.ru_maxrss * 1024;
#endif
  }
#endif
  return exf_ctx_stats(ctx).bytes_peak;
}

static volatile sig_atomic_t stop_signal;   /* the signal that asked for an end, or 0 */

static inline void stop_handler(int number) { stop_signal = number; }

/* The first Ctrl-C sets stop_signal, the second ends the program. */
static inline void stop_install(void) {
#if HAVE_POSIX
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = stop_handler;
  action.sa_flags = (int)(SA_RESTART | SA_RESETHAND);
  sigaction(SIGINT, &action, NULL);
  sigaction(SIGTERM, &action, NULL);
#else
  signal(SIGINT, stop_handler);
#endif
}

typedef struct progress {
  const char *label;
  uint64_t first, total;   /* steps done before the start; steps in all */
  double start, last;
  int terminal, quiet;
} progress;

static inline progress progress_start(const char *label, uint64_t first, uint64_t total,
                                      int quiet) {
  progress p;
  p.label = label;
  p.first = first;
  p.total = total;
  p.start = p.last = seconds();
  p.quiet = quiet;
#if HAVE_POSIX
  p.terminal = isatty(2);
#else
  p.terminal = 0;
#endif
  return p;
}

static inline void progress_clock(char *out, size_t n, double s) {
  unsigned t = s < 0 ? 0 : s > 3.5e6 ? 3500000u : (unsigned)s;
  if (t >= 3600) snprintf(out, n, "%u:%02u:%02u", t / 3600, t / 60 % 60, t % 60);
  else snprintf(out, n, "%02u:%02u", t / 60, t % 60);
}

/* train:  37%|######          | 740/2000 [00:21<00:36, 34.9 it/s, loss=2.01]
   at most ten times a second on a terminal, every ten seconds elsewhere. */
static inline void progress_show(progress *p, uint64_t done, const char *note) {
  double now = seconds(), spent = now - p->start, rate, part;
  char bar[17], gone[24], left[24];
  int i;
  if (p->quiet || now - p->last < (p->terminal ? 0.1 : 10)) return;
  p->last = now;
  rate = spent > 0 ? (double)(done - p->first) / spent : 0;
  part = p->total ? (double)done / (double)p->total : 1;
  for (i = 0; i < 16; i++) bar[i] = part * 16 >= i + 1 ? '#' : ' ';
  bar[16] = 0;
  progress_clock(gone, sizeof gone, spent);
  progress_clock(left, sizeof left, rate > 0 ? (double)(p->total - done) / rate : 0);
  fprintf(stderr, "%s%s: %3d%%|%s| %llu/%llu [%s<%s, %.1f it/s, %s]%s",
          p->terminal ? "\r" : "", p->label, (int)(part * 100), bar,
          (unsigned long long)done, (unsigned long long)p->total, gone, left, rate, note,
          p->terminal ? "\033[K" : "\n");
  fflush(stderr);
  progress_drawn = p->terminal;
}

/* ---- a training run and its folder ------------------------------------------------ */

#define RUN_MAX_FLAGS 56
#define LOG_HEADER "step,train_loss,val_loss,lr,grad_norm,tokens_per_s,elapsed_s"

/* The part of a training program that does not depend on the model. */
typedef struct run {
  settings s;
  flag flags[RUN_MAX_FLAGS];
  int n_flags;
  const char *task;        /* "charlm" */
  const char *list_key;    /* metadata key and value of the vocabulary or labels */
  text list;
  text geometry, data;     /* flat JSON: of the merged model; size and hash of the data */
  exf_ctx *ctx;
  exf_model *model;
  exf_optim *optim;
  exf_schedule schedule;
  uint64_t steps, step, first;   /* of the whole run, done, done before this start */
  size_t per_step;               /* tokens or images in a step */
  double started, elapsed;       /* clock at the start; seconds before it */
  double loss;                   /* of the last step */
  int owns;                      /* the files in the folder are of this run */
  text log, weights;             /* log.csv, weights.csv */
  progress bar;
  void *user;                    /* of the calls */
  exf_tensor *(*micro_loss)(void *user, uint64_t micro);  /* of micro-batch `micro` */
  double (*validate)(void *user, text *note);             /* validation loss, and words */
  void (*after_step)(void *user);                         /* may be NULL */
  void (*before_checkpoint)(void *user);                  /* is saved; may be NULL */
  void (*after_checkpoint)(void *user);
  void (*clear)(void *user);     /* removes another run's own files; may be NULL */
} run;

static inline void run_free(run *r) {
  flags_free(r->flags, r->n_flags);
  text_free(&r->list);
  text_free(&r->geometry);
  text_free(&r->data);
  text_free(&r->log);
  text_free(&r->weights);
}

/* Makes the context; threads become what they are resolved to. isa stays, so that a run
   may go on on another processor. */
static inline void run_context(run *r) {
  settings *s = &r->s;
  exf_desc desc;
  memset(&desc, 0, sizeof desc);
  desc.seed = s->seed;
  desc.n_threads = (int)s->threads;
  desc.log = log_line;
  desc.log_user = &s->quiet;
  r->ctx = exf_ctx_new(&desc);
  check(r->ctx);
  if (s->isa && exf_isa_set(r->ctx, (exf_isa)s->isa) != EXF_OK) {
    int given = flag_find(r->flags, r->n_flags, "isa")->given;
    char *path = path_in(s->out, "run.json");
    fail(2, "%s%s--isa %s is not available on this processor or in this build: use "
         "--isa auto", given == 1 ? "" : given == 2 ? s->config : path,
         given == 1 ? "" : ": ", exf_isa_name((exf_isa)s->isa));
  }
  s->threads = (uint64_t)exf_threads_get(r->ctx);
}

/* Takes the flags, step, list and data of the checkpoint in --out; the rest of
   resuming is exf_checkpoint_load in run_begin. Flags given must agree. */
static inline void run_resume(run *r) {
  char *path = path_in(r->s.out, "checkpoint.safetensors"), *end = NULL;
  char *json_path = path_in(r->s.out, "run.json");
  exf_ctx *ctx = exf_ctx_new(NULL);
  const char *task, *config, *list, *step, *data;
  exf_st *st;
  check(ctx);
  if (!file_exists(path))
    fail(1, "there is no %s, so nothing to resume: leave --resume away", path);
  st = open_tensors(ctx, path);
  task = exf_st_meta(st, "exf.task");
  config = exf_st_meta(st, "exf.config");
  list = exf_st_meta(st, r->list_key);
  step = exf_st_meta(st, "exf.step");
  data = exf_st_meta(st, "exf.data");
  if (!task || strcmp(task, r->task) != 0 || !config || !list || !step || !data)
    fail(1, "%s: a checkpoint of %s has the metadata exf.task %s, exf.config, exf.step, "
         "exf.data and %s: start a new run", path, r->task, r->task, r->list_key);
  flags_read(r->flags, r->n_flags, config, path,
             1u << FLAG_TRAINING | 1u << FLAG_DATA, 1);
  text_add(&r->list, "%s", list);
  text_add(&r->data, "%s", data);
  r->step = r->first = strtoull(step, &end, 10);
  if (*end) fail(1, "%s: exf.step '%.40s' is no number: start a new run", path, step);
  exf_st_close(st);
  exf_ctx_free(ctx);
  if (file_exists(json_path)) {
    char *source = read_text(json_path);
    flags_read(r->flags, r->n_flags, source, json_path, 1u << FLAG_RUNNING, 1);
    free(source);
  }
  free(json_path);
  free(path);
}

/* Resolves the flags: those given, then --config, then the checkpoint of --resume, then
   --quick, then the defaults. quick: pairs of name and value. */
static inline void run_flags(run *r, int argc, char **argv, const char *const *quick,
                             int n_quick, const char *usage) {
  int i;
  flags_parse(r->flags, r->n_flags, argc, argv, NULL, usage);
  if (*r->s.config) {
    char *source = read_text(r->s.config);
    flags_read(r->flags, r->n_flags, source, r->s.config, ~(1u << FLAG_ONCE), 0);
    free(source);
  }
  if (!*r->s.out) fail(2, "--out is empty: name a folder");
  if (r->s.resume) {
    run_resume(r);
    return;
  }
  for (i = 0; r->s.quick && i < n_quick; i++) {
    flag *f = flag_find(r->flags, r->n_flags, quick[2 * i]);
    if (!f->given) flag_set(f, quick[2 * i + 1], "");
  }
}

/* Whether a resumed run has nothing left to do, which it says. */
static inline int run_is_finished(const run *r) {
  if (!r->s.resume || r->step < r->steps) return 0;
  if (r->step > r->steps)
    fail(1, "the checkpoint in %s is of step %s of a run of %s: start a new run",
         r->s.out, commas((size_t)r->step), commas((size_t)r->steps));
  if (r->s.quiet) return 1;
  print_plain(r->s.out);
  printf(" is finished: nothing to resume\n");
  return 1;
}

/* Takes over `mine`, what identifies the data; of a resumed run they must be the same. */
static inline void run_data(run *r, text *mine, const char *name, const char *dashed) {
  if (r->s.resume && strcmp(mine->s, r->data.s) != 0)
    fail(1, "%s is not the data of the checkpoint (%s, there %s): give that with %s",
         name, mine->s, r->data.s, dashed);
  text_free(&r->data);
  r->data = *mine;
  memset(mine, 0, sizeof *mine);
}

/* One row per FFN, now and then: the weights after r->step updates. */
static inline void run_log_weights(run *r) {
  uint64_t every = 1 + r->steps / 1000;
  size_t n = r->s.ffn == EXF_DENSE ? 1 : (size_t)r->s.experts, i, k;
  double *w;
  if (r->step % every != 0 && r->step != r->steps) return;
  w = (double *)memory(n, sizeof *w);
  for (i = 0; i < exf_model_n_ffns(r->model); i++) {
    w[0] = 1;
    if (r->s.ffn != EXF_DENSE)
      exf_ffn_diagnose(exf_model_ffn(r->model, i), w, NULL, NULL);
    text_add(&r->weights, "%llu,%llu", (unsigned long long)r->step,
             (unsigned long long)i);
    for (k = 0; k < n; k++) text_add(&r->weights, ",%.9g", w[k]);
    text_add(&r->weights, "\n");
  }
  free(w);
}

/* Begins or continues the folder, the optimizer and the tables. */
static inline void run_begin(run *r) {
  text header = {NULL, 0, 0};
  char *log = path_in(r->s.out, "log.csv"), *weights = path_in(r->s.out, "weights.csv");
  uint64_t i, n = r->s.ffn == EXF_DENSE ? 1 : r->s.experts;
  size_t rows;
  directory_make(r->s.out);
  r->optim = settings_optim(&r->s, r->model);
  r->schedule = settings_schedule(&r->s, r->steps);
  check(r->ctx);
  text_add(&header, "step,ffn");
  for (i = 0; i < n; i++) text_add(&header, ",w%llu", (unsigned long long)i);
  if (r->s.resume) {
    char *path = path_in(r->s.out, "checkpoint.safetensors");
    exf_st *st = open_tensors(r->ctx, path);
    exf_checkpoint_load(r->model, r->optim, st);
    check_load(r->ctx, path);
    exf_st_close(st);
    free(path);
    r->owns = 1;
  }
  rows = csv_keep(log, LOG_HEADER, r->step, &r->log);
  csv_keep(weights, header.s, r->s.resume ? r->step + 1 : 0, &r->weights);
  if (rows < r->step)
    log_line(&r->s.quiet, "notice: log.csv lacks rows before the checkpoint");
  if (rows > 0) {
    const char *last = r->log.s + r->log.n - 1;
    while (last[-1] != '\n') last--;
    r->loss = csv_field(last, 1);
    r->elapsed = csv_field(last, 6);
  }
  if (!r->s.resume) run_log_weights(r);
  r->started = seconds();
  r->bar = progress_start("train", r->step, r->steps, r->s.quiet);
  text_free(&header);
  free(log);
  free(weights);
}

/* Row s of log.csv; val_loss NAN: not measured. spent: seconds of the step. */
static inline void run_log(run *r, uint64_t s, double val_loss, double norm,
                           double spent) {
  char val[32] = "";
  double rate = (double)r->per_step / (spent > 1e-9 ? spent : 1e-9);
  if (val_loss == val_loss) snprintf(val, sizeof val, "%.9g", val_loss);
  text_add(&r->log, "%llu,%.9g,%s,%.9g,%.9g,%.9g,%.9g\n", (unsigned long long)s, r->loss,
           val, exf_schedule_lr(&r->schedule, s), norm, rate,
           r->elapsed + seconds() - r->started);
}

/* The median time of a step, from the log, so that it counts steps before a resume. */
static inline double run_ms_per_step(const run *r) {
  double *ms = (double *)memory((size_t)r->steps, sizeof *ms), result;
  const char *row = strchr(r->log.s, '\n') + 1;
  size_t n = 0;
  for (; *row; row = strchr(row, '\n') + 1) {
    double rate = csv_field(row, 5);
    if (rate > 0 && n < r->steps) ms[n++] = 1e3 * (double)r->per_step / rate;
  }
  result = median(ms, n);
  free(ms);
  return result;
}

static inline void run_save_text(run *r, const char *name, const text *t) {
  char *path = path_in(r->s.out, name);
  exf_file_save(r->ctx, path, t->s, t->n);
  free(path);
}

/* A merged model or the checkpoint: the same metadata but for exf.config, which is the
   model's geometry or the flags of the run. */
static inline void run_save_tensors(run *r, exf_model *model, const char *name,
                                    int checkpoint) {
  char *path = path_in(r->s.out, name);
  char seed[24], step[24];
  text config = {NULL, 0, 0};
  exf_pair meta[8];
  size_t n = 0;
  snprintf(seed, sizeof seed, "%llu", (unsigned long long)r->s.seed);
  snprintf(step, sizeof step, "%llu", (unsigned long long)r->step);
  flags_write(r->flags, r->n_flags, 1u << FLAG_TRAINING | 1u << FLAG_DATA, 0, &config);
  meta[n].key = "format", meta[n++].value = "pt";
  meta[n].key = "exf.version", meta[n++].value = EXF_VERSION;
  meta[n].key = "exf.task", meta[n++].value = r->task;
  meta[n].key = "exf.seed", meta[n++].value = seed;
  meta[n].key = "exf.step", meta[n++].value = step;
  meta[n].key = r->list_key, meta[n++].value = r->list.s;
  meta[n].key = "exf.config", meta[n++].value = checkpoint ? config.s : r->geometry.s;
  if (checkpoint) meta[n].key = "exf.data", meta[n++].value = r->data.s;
  if (checkpoint) exf_checkpoint_save(model, r->optim, path, meta, n);
  else exf_model_save(model, path, meta, n);
  text_free(&config);
  free(path);
}

/* Ends the program when saving failed; every file is then whole. */
static inline void run_check_save(const run *r) {
  if (exf_ctx_status(r->ctx) != EXF_OK)
    fail(1, "saving after step %s: %s", commas(r->step), exf_error(r->ctx));
}

/* Removes the files of another run: the checkpoint first, for without it nothing is
   resumed, whatever happens before this run has one. The model stays until this run's
   takes its place. */
static inline void run_clear(const run *r) {
  static const char *const names[] = {"checkpoint.safetensors", "summary.json",
                                      "run.json", "log.csv", "weights.csv"};
  size_t i;
  for (i = 0; i < sizeof names / sizeof names[0]; i++) {
    char *path = path_in(r->s.out, names[i]);
    if (remove(path) != 0 && errno != ENOENT)
      fail(1, "cannot remove %s (%s), which is another run's: choose another --out", path,
           strerror(errno));
    free(path);
  }
  if (r->clear) r->clear(r->user);
}

/* Writes all but summary.json and the checkpoint. */
static inline void run_save_results(run *r) {
  text t = {NULL, 0, 0};
  if (!r->owns) run_clear(r);
  r->owns = 1;
  run_save_tensors(r, r->model, "model.safetensors", 0);
  run_check_save(r);
  run_save_text(r, "log.csv", &r->log);
  run_save_text(r, "weights.csv", &r->weights);
  flags_write(r->flags, r->n_flags, ~(1u << FLAG_ONCE), 1, &t);
  run_save_text(r, "run.json", &t);
  run_check_save(r);
  text_free(&t);
}

/* The checkpoint comes last: where it stands, all that belongs before it stands too, and
   a run whose checkpoint is of the last step is finished. */
static inline void run_save_checkpoint(run *r) {
  if (r->before_checkpoint) r->before_checkpoint(r->user);
  run_save_tensors(r, r->model, "checkpoint.safetensors", 1);
  run_check_save(r);
  if (r->after_checkpoint) r->after_checkpoint(r->user);
}

/* In the middle of a run; a summary is then of an end whose checkpoint was not saved. */
static inline void run_save(run *r) {
  char *summary = path_in(r->s.out, "summary.json");
  run_save_results(r);
  remove(summary);
  free(summary);
  run_save_checkpoint(r);
}

/* Ends the program after a step that failed. */
static inline void run_stop(const run *r, const char *why) {
  char *path = path_in(r->s.out, "checkpoint.safetensors");
  fail(1, "step %s: %s%s%s", commas(r->step), why,
       r->owns ? "; the last checkpoint is kept: " : "", r->owns ? path : "");
}

/* The validation loss, which must be finite. */
static inline double run_validate(const run *r, text *words) {
  double loss = r->validate(r->user, words);
  if (!is_finite(loss))
    run_stop(r, "the validation loss is not finite: take a smaller --lr, or another "
             "--init");
  return loss;
}

/* One update. r->loss is that before it; norm is that before clipping. */
static inline void run_step(run *r, double *norm) {
  uint64_t k, accum = r->s.accum;
  exf_ctx *ctx = r->ctx;
  r->loss = 0;
  exf_step_begin(ctx, r->step);
  exf_training_set(ctx, 1);
  for (k = 0; k < accum && exf_ctx_status(ctx) == EXF_OK; k++) {
    exf_tensor *loss = r->micro_loss(r->user, r->step * accum + k);
    r->loss += exf_item(loss) / (double)accum;
    if (accum > 1) loss = exf_scale(ctx, loss, 1.0 / (double)accum);
    exf_backward(ctx, loss);
    exf_rewind(ctx);
  }
  exf_training_set(ctx, 0);
  exf_optim_step(r->optim, exf_schedule_lr(&r->schedule, r->step), norm);
  if (exf_ctx_status(ctx) != EXF_OK) run_stop(r, exf_error(ctx));
  if (r->after_step) r->after_step(r->user);
}

/* Trains up to the last step, or to a signal. */
static inline void run_loop(run *r) {
  char note[32];
  text words = {NULL, 0, 0};
  while (r->step < r->steps && !stop_signal) {
    double start = seconds(), spent, norm = 0, val_loss = NAN;
    uint64_t s = r->step;
    run_step(r, &norm);
    spent = seconds() - start;
    r->step++;
    words.n = 0;
    if (r->step == r->steps || (r->s.eval_every && r->step % r->s.eval_every == 0))
      val_loss = run_validate(r, &words);
    run_log(r, s, val_loss, norm, spent);
    run_log_weights(r);
    snprintf(note, sizeof note, "loss=%.3f", r->loss);
    progress_show(&r->bar, r->step, note);
    if (val_loss == val_loss && !r->s.quiet) {
      progress_clear();
      printf("step %6llu   train %.4f   validation %.4f%s   %.1f ms\n",
             (unsigned long long)r->step, r->loss, val_loss, words.n ? words.s : "",
             1e3 * spent);
      fflush(stdout);
    }
    if (r->step < r->steps && r->s.save_every && r->step % r->s.save_every == 0)
      run_save(r);
  }
  if (r->steps == 0) run_validate(r, &words);
  progress_clear();
  text_free(&words);
}

/* What is about to be trained; what the method's algebra already knows of it. */
static inline void run_announce(const run *r, const char *model, const char *data) {
  double left = -1;        /* of the experts' differences; outside [0, 1]: unknown */
  char name[48];
  if (r->s.quiet) return;
  choice_name("dense|sw|dw|mb", r->s.ffn, name);
  printf("model   %s; FFNs: %s", model, name);
  if (r->s.ffn != EXF_DENSE)
    printf(", %s expert%s fused into one", commas((size_t)r->s.experts),
           r->s.experts > 1 ? "s" : "");
  printf("\ndata    ");
  print_plain(data);
  printf("\nparams  %s while training, %s merged\nrun     ",
         commas(exf_model_count(r->model)), commas(exf_model_count_merged(r->model)));
  if (r->first) printf("resumed after step %s of ", commas((size_t)r->first));
  printf("%s steps, seed %llu, %s, %d thread%s", commas((size_t)r->steps),
         (unsigned long long)r->s.seed, exf_isa_name(exf_isa_get(r->ctx)),
         (int)r->s.threads, r->s.threads > 1 ? "s" : "");
  if (r->s.ffn != EXF_DENSE && r->s.experts > 1)
    left = exf_expert_decay(&r->schedule, r->s.weight_decay);
  if (left >= 0 && left <= 1)
    printf("; weight decay will leave %.3g of the experts' differences", left);
  printf("\n");
  fflush(stdout);
  if (!r->s.resume) exf_notices(r->model, r->optim);
}

/* What the merge did, on the validation data. */
typedef struct merge_result {
  double val_loss, val_loss_merged;  /* of the model in memory, of the file */
  double max_diff;                   /* largest difference between their logits */
  double gap;                        /* routed: loss with bank minus with router */
  size_t n;                          /* positions or images compared */
} merge_result;

/* Raises *worst to the largest |a - b|; a NaN stays. */
static inline void compare_logits(const exf_tensor *a, const exf_tensor *b,
                                  double *worst) {
  size_t i;
  for (i = 0; i < a->size; i++) {
    double d = fabs((double)a->data[i] - (double)b->data[i]);
    if (*worst >= 0 && !(d <= *worst)) *worst = d;
  }
}

static inline void summary_number(text *t, const char *key, double value) {
  text_add(t, "%s\n  ", t->n > 1 ? "," : "");
  json_number(t, key, value);
}

static inline void summary_integer(text *t, const char *key, uint64_t value) {
  text_add(t, "%s\n  ", t->n > 1 ? "," : "");
  json_integer(t, key, value);
}

static inline void summary_text(text *t, const char *key, const char *value) {
  text_add(t, "%s\n  ", t->n > 1 ? "," : "");
  json_text(t, key, value);
}

/* Writes summary.json: what every task has, then the task's own members in `more`. */
static inline void run_summary(run *r, const merge_result *m, const text *more) {
  char name[48];
  double ms = run_ms_per_step(r);
  text t = {NULL, 0, 0};
  choice_name("dense|sw|dw|mb", r->s.ffn, name);
  text_add(&t, "{");
  summary_text(&t, "task", r->task);
  summary_text(&t, "ffn", name);
  summary_integer(&t, "experts", r->s.ffn == EXF_DENSE ? 1 : r->s.experts);
  summary_integer(&t, "steps", r->steps);
  summary_integer(&t, "seed", r->s.seed);
  summary_integer(&t, "params_train", exf_model_count(r->model));
  summary_integer(&t, "params_merged", exf_model_count_merged(r->model));
  summary_number(&t, "train_loss", r->loss);
  summary_number(&t, "val_loss", m->val_loss);
  summary_number(&t, "val_loss_merged", m->val_loss_merged);
  summary_number(&t, "merge_max_abs_diff", m->max_diff);
  summary_number(&t, "merge_gap", m->gap);
  summary_number(&t, "ms_per_step", ms);
  summary_number(&t, "tokens_per_s", ms > 0 ? 1e3 * (double)r->per_step / ms : 0);
  summary_integer(&t, "peak_rss_bytes", peak_bytes(r->ctx));
  summary_text(&t, "isa", exf_isa_name(exf_isa_get(r->ctx)));
  summary_integer(&t, "threads", r->s.threads);
  text_add(&t, "%s\n}\n", more && more->n ? more->s : "");
  run_save_text(r, "summary.json", &t);
  text_free(&t);
}

/* Writes the summary and, last, the checkpoint; tells the results. unit: of the loss.
   next: the command of this program to go on with. */
static inline void run_finish(run *r, const merge_result *m, const text *more,
                              const char *unit, const char *self, const char *next) {
  run_summary(r, m, more);
  run_save_checkpoint(r);
  if (r->s.quiet) return;
  printf("done    %s steps in %.1f s, %.1f ms each; peak memory %s MB\n",
         commas((size_t)r->steps), r->elapsed + seconds() - r->started,
         run_ms_per_step(r), commas(peak_bytes(r->ctx) / 1000000));
  printf("params  %s while training -> %s merged into an ordinary dense model\n",
         commas(exf_model_count(r->model)), commas(exf_model_count_merged(r->model)));
  printf("loss    ");
  if (r->step > 0) printf("train %.4f, ", r->loss);
  printf("validation %.4f, merged %.4f %s\n", m->val_loss, m->val_loss_merged, unit);
  printf("merge   largest difference between logits before and after (%s compared): %g\n",
         commas(m->n), m->max_diff);
  if (m->gap < 0 || m->gap > 0)
    printf("gap     %.6f: loss with the bank minus loss with the router\n", m->gap);
  printf("files   ");
  print_plain(r->s.out);
  printf(": model.safetensors (dense), checkpoint.safetensors, log.csv,\n"
         "        weights.csv, summary.json, run.json\nnext    ");
  print_word(self);
  printf(" %s ", next);
  print_word(r->s.out);
  printf("\n");
}

/* A run that was stopped says how to go on, and exits as the shell expects. */
static inline int run_interrupted(run *r, const char *self) {
  run_save(r);
  if (r->s.quiet) return 128 + (int)stop_signal;
  printf("stopped after step %s of %s; to continue:\n        ", commas((size_t)r->step),
         commas((size_t)r->steps));
  print_word(self);
  printf(" train --out ");
  print_word(r->s.out);
  printf(" --resume\n");
  return 128 + (int)stop_signal;
}

/* ---- model files ------------------------------------------------------------------ */

/* DIR/model.safetensors, or the file itself; to be freed. */
static inline char *model_path(const char *place) {
  text path = {NULL, 0, 0};
  if (!*place) fail(2, "DIR|FILE is empty: name a run's folder or a model file");
  if (is_directory(place)) path.s = path_in(place, "model.safetensors");
  else text_add(&path, "%s", place);
  if (!file_exists(path.s))
    fail(1, "cannot open %s (%s): name a run's folder or a model file", path.s,
         strerror(errno));
  return path.s;
}

/* Gives a flag that was not given its value in the run whose model is at this path. */
static inline void flag_of_run(flag *f, const char *model) {
  const char *slash = strrchr(model, '/'), *value;
  text path = {NULL, 0, 0};
  text_add(&path, "%.*srun.json", slash ? (int)(slash - model) + 1 : 0, model);
  if (!f->given && file_exists(path.s)) {
    char *source = read_text(path.s);
    json j;
    json_read(&j, source, path.s);
    value = json_find(&j, f->name);
    text_add(&path, ": ");
    if (value) flag_set(f, value, path.s);
    json_free(&j);
    free(source);
  }
  text_free(&path);
}

/* The exf.config of an open file, or an empty object. */
static inline void config_read(json *j, const exf_st *st, const char *path) {
  const char *config = exf_st_meta(st, "exf.config");
  text what = {NULL, 0, 0};
  text_add(&what, "%s: exf.config", path);
  json_read(j, config ? config : "{}", what.s);
  text_free(&what);
}

/* A whole number of exf.config, or `otherwise` when it is not there. */
static inline size_t config_count(const json *j, const char *key, size_t otherwise,
                                  const char *path) {
  const char *value = json_find(j, key);
  size_t n = value ? strlen(value) : 0;
  if (!value) return otherwise;
  if (n < 1 || n > 9 || strspn(value, "0123456789") < n)
    fail(1, "%s: exf.config has %.40s for %s: it must be a whole number below 1e9", path,
         value, key);
  return strtoul(value, NULL, 10);
}

/* ---- looking into a file ---------------------------------------------------------- */

/* Names, shapes, count and metadata of a safetensors file. */
static inline void print_info(const char *path) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  static const char *const keys[] = {"format", "exf.version", "exf.task", "exf.config",
    "exf.step", "exf.seed", "exf.data", "exf.vocab", "exf.labels"};
  exf_st *st;
  size_t i, total = 0;
  int k;
  check(ctx);
  st = open_tensors(ctx, path);
  for (i = 0; i < exf_st_count(st); i++) {
    const exf_st_entry *e = exf_st_get(st, i);
    size_t n = 1;
    printf("%-5s [", e->dtype);
    for (k = 0; k < e->n_dims; k++) {
      printf("%s%llu", k ? "," : "", (unsigned long long)e->dim[k]);
      n *= e->dim[k];
    }
    printf("] ");
    print_plain(e->name);
    printf("\n");
    total += n;
  }
  printf("%s tensors, %s numbers\n", commas(exf_st_count(st)), commas(total));
  for (i = 0; i < sizeof keys / sizeof keys[0]; i++) {
    if (!exf_st_meta(st, keys[i])) continue;
    printf("%s: ", keys[i]);
    print_plain(exf_st_meta(st, keys[i]));
    printf("\n");
  }
  exf_st_close(st);
  exf_ctx_free(ctx);
}

typedef struct command {
  const char *name;
  int (*run)(int argc, char **argv);
} command;

static inline int command_info(int argc, char **argv) {
  const char *place = NULL;
  char usage[64], *path;
  snprintf(usage, sizeof usage, "%s info DIR|FILE", program_name);
  flags_parse(NULL, 0, argc, argv, &place, usage);
  if (!place) fail(2, "no file named: usage: %s", usage);
  path = model_path(place);
  print_info(path);
  free(path);
  return 0;
}

/* main of a program whose first argument names one of n commands, the first of which is
   the one with most flags. */
static inline int command_run(const char *program, const command *list, int n, int argc,
                              char **argv) {
  char names[64] = "", usage[192];
  int i, code = 0;
  program_name = program;
  for (i = 0; i < n; i++) {
    if (i) strcat(names, "|");
    strcat(names, list[i].name);
  }
  snprintf(usage, sizeof usage, "usage: %s %s ...  (%s %s --help lists the flags of %s, "
           "and so on)", program, names, program, list[0].name, list[0].name);
  if (argc < 2) fail(2, "no command: %s", usage);
  if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) puts(usage);
  else code = list[choice_find(names, argv[1], "the command")].run(argc, argv);
  stdout_check();
  return code;
}

#endif /* EXF_EXAMPLES_COMMON_H */
