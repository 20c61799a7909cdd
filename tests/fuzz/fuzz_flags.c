/* Any bytes as a run.json, as a command line, as a vocabulary and as a table of numbers,
   by the parsers of the examples. They end the program when the input is bad: here they
   come back, and must have said why in one line. */
#define _POSIX_C_SOURCE 200809L
#ifdef TEST_LINKED
#define EXF__IMPLEMENTED   /* charlm.c asks for the implementation */
#include "../../exfusion.h"
#elif !defined(FUZZ_REPLAY)
#define EXFUSION_IMPLEMENTATION
#include "../../exfusion.h"
#endif
#include <setjmp.h>

#include "fuzz.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>
#endif
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <time.h>

/* ---- the program around the parsers: memory that comes back, errors that return ---- */

typedef struct piece {
  struct piece *next, *before;
  size_t bytes, pad;
} piece;

static piece *blocks;
static size_t block_bytes, block_peak;
static jmp_buf program_end;
static int program_code;
static char program_said[8192];
static size_t program_n;

static void *flags_calloc(size_t n, size_t size) {
  piece *b = (piece *)calloc(1, sizeof *b + n * size);
  MUST(b != NULL);
  b->bytes = n * size;
  b->next = blocks;
  if (blocks) blocks->before = b;
  blocks = b;
  block_bytes += b->bytes;
  if (block_bytes > block_peak) block_peak = block_bytes;
  return b + 1;
}

static void flags_free_block(void *p) {
  piece *b;
  if (p == NULL) return;
  b = (piece *)p - 1;
  if (b->before) b->before->next = b->next;
  else blocks = b->next;
  if (b->next) b->next->before = b->before;
  block_bytes -= b->bytes;
  free(b);
}

static void *flags_realloc(void *p, size_t n) {
  void *fresh = flags_calloc(n, 1);
  size_t old = p ? ((piece *)p - 1)->bytes : 0;
  if (p) memcpy(fresh, p, old < n ? old : n);
  flags_free_block(p);
  return fresh;
}

static void flags_vsay(const char *format, va_list args) {
  int n = vsnprintf(program_said + program_n, sizeof program_said - program_n, format,
                    args);
  MUST(n >= 0);
  program_n += (size_t)n;
  if (program_n >= sizeof program_said) program_n = sizeof program_said - 1;
}

static void flags_say(const char *format, ...) {
  va_list args;
  va_start(args, format);
  flags_vsay(format, args);
  va_end(args);
}

#if defined(__GNUC__)
__attribute__((noreturn))
#endif
static void flags_exit(int code) {
  program_code = code;
  longjmp(program_end, 1);
}

#define calloc(n, size) flags_calloc(n, size)
#define realloc(p, n) flags_realloc(p, n)
#define free(p) flags_free_block(p)
#define exit(code) flags_exit(code)
#define vfprintf(file, format, args) flags_vsay(format, args)
#define fprintf(file, ...) flags_say(__VA_ARGS__)
#define putc(c, file) flags_say("%c", c)
#define printf(...) flags_say(__VA_ARGS__)
int charlm_main(int argc, char **argv);
#define main charlm_main
#include "../../examples/charlm.c"
#undef main
#undef calloc
#undef realloc
#undef free
#undef exit
#undef vfprintf
#undef fprintf
#undef putc
#undef printf

/* ---- the target ---- */

static const char *const targets_usage = "charlm train [FLAGS]";

/* What has been read can be written, and read again, to the same. */
static void read_settings(const char *source, int agree) {
  static charlm c;
  text one = {NULL, 0, 0}, two = {NULL, 0, 0};
  const unsigned scopes = ~(1u << FLAG_ONCE);
  train_defaults(&c);
  flags_read(c.r.flags, c.r.n_flags, source, "run.json", scopes, agree);
  flags_write(c.r.flags, c.r.n_flags, scopes, 1, &one);
  train_defaults(&c);
  flags_read(c.r.flags, c.r.n_flags, one.s, "run.json", scopes, 0);
  flags_write(c.r.flags, c.r.n_flags, scopes, 1, &two);
  MUST(strcmp(one.s, two.s) == 0);
}

/* Words are separated by line ends. */
static void read_words(char *source) {
  static charlm c;
  char *argv[64];
  int argc = 2;
  argv[0] = argv[1] = source;
  while (*source && argc < 63) {
    char *end = strchr(source, '\n');
    argv[argc++] = source;
    if (end == NULL) break;
    *end = '\0';
    source = end + 1;
  }
  argv[argc] = NULL;
  train_defaults(&c);
  flags_parse(c.r.flags, c.r.n_flags, argc, argv, NULL, targets_usage);
}

static void read_list(const char *source) {
  vocabulary v;
  text t = {NULL, 0, 0};
  memset(&v, 0, sizeof v);
  if (!vocabulary_read(&v, source)) return;
  MUST(v.n >= 1 && v.n <= 256);
  vocabulary_write(&v, &t);
  MUST(t.n <= strlen(source));
}

static void read_row(const char *source) {
  int k;
  for (k = 0; k < 8; k++) (void)csv_field(source, k);
}

static int fuzz_flags(const uint8_t *data, size_t n) {
  char *volatile source = NULL;
  if (n == 0) return 0;
  block_peak = block_bytes;
  program_n = 0;
  program_code = -1;
  program_name = "charlm";
  source = (char *)flags_calloc(n, 1);     /* exactly as long as the text */
  memcpy(source, data + 1, n - 1);
  if (setjmp(program_end) == 0) {
    switch (data[0] % 5) {
      case 0: read_settings(source, 0); break;
      case 1: read_settings(source, 1); break;
      case 2: read_words(source); break;
      case 3: read_list(source); break;
      default: read_row(source); break;
    }
  } else if (program_code != 0) {
    MUST(program_code == 1 || program_code == 2);
    MUST(program_n > 8 && strncmp(program_said, "charlm: ", 8) == 0);
    if (program_said[program_n - 1] == '\n') program_said[program_n - 1] = '\0';
    fuzz_message(program_said);
  }
  MUST(block_peak <= 64 * n + 65536);
  while (blocks) flags_free_block(blocks + 1);
  return 0;
}

FUZZ_MAIN(flags)
