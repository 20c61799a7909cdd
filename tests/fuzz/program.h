/* tests/fuzz/program.h - the examples' code inside a target: its memory is counted and
   comes back, what it prints is kept, and an error, which ends a program, returns.

     program_begin(1);
     if (setjmp(program_end) == 0) ... else program_error();
     program_finish();

   After program_begin(0) the program must not end. Include after fuzz.h. */
#ifndef FUZZ_PROGRAM_H
#define FUZZ_PROGRAM_H

#include <setjmp.h>

#if defined(__unix__) || defined(__APPLE__)
#include <dirent.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>
#endif
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <time.h>

typedef struct piece {
  struct piece *next, *before;
  size_t bytes, pad;
} piece;

static piece *blocks;
static size_t block_bytes, block_peak;
static jmp_buf program_end;
static int program_code, program_may_end;
static char program_said[8192];
static size_t program_n;

static void *program_calloc(size_t n, size_t size) {
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

static void program_free(void *p) {
  piece *b;
  if (p == NULL) return;
  b = (piece *)p - 1;
  if (b->before) b->before->next = b->next;
  else blocks = b->next;
  if (b->next) b->next->before = b->before;
  block_bytes -= b->bytes;
  free(b);
}

static void *program_realloc(void *p, size_t n) {
  void *fresh = program_calloc(n, 1);
  size_t old = p ? ((piece *)p - 1)->bytes : 0;
  if (p) memcpy(fresh, p, old < n ? old : n);
  program_free(p);
  return fresh;
}

static void program_vsay(const char *format, va_list args) {
  int n = vsnprintf(program_said + program_n, sizeof program_said - program_n, format,
                    args);
  MUST(n >= 0);
  program_n += (size_t)n;
  if (program_n >= sizeof program_said) program_n = sizeof program_said - 1;
}

static void program_say(const char *format, ...) {
  va_list args;
  va_start(args, format);
  program_vsay(format, args);
  va_end(args);
}

#if defined(__GNUC__)
__attribute__((noreturn))
#endif
static void program_exit(int code) {
  MUST(program_may_end);
  program_code = code;
  longjmp(program_end, 1);
}

#define malloc(n) program_calloc(n, 1)     /* stb_image's */
#define calloc(n, size) program_calloc(n, size)
#define realloc(p, n) program_realloc(p, n)
#define free(p) program_free(p)
#define exit(code) program_exit(code)
#define vfprintf(file, format, args) program_vsay(format, args)
#define fprintf(file, ...) program_say(__VA_ARGS__)
#define putc(c, file) program_say("%c", c)
#define printf(...) program_say(__VA_ARGS__)
int charlm_main(int argc, char **argv);
#define main charlm_main
#include "../../examples/charlm.c"
#undef main
#include "../../examples/images.h"
#undef malloc
#undef calloc
#undef realloc
#undef free
#undef exit
#undef vfprintf
#undef fprintf
#undef putc
#undef printf

static TEST_UNUSED void program_begin(int may_end) {
  block_peak = block_bytes;
  program_n = 0;
  program_code = -1;
  program_may_end = may_end;
  program_name = "charlm";
}

/* It has ended: with 0 (help), or with 1 or 2 and one line. */
static TEST_UNUSED void program_error(void) {
  if (program_code == 0) return;
  MUST(program_code == 1 || program_code == 2);
  MUST(program_n > 8 && strncmp(program_said, "charlm: ", 8) == 0);
  if (program_said[program_n - 1] == '\n') program_said[program_n - 1] = '\0';
  fuzz_message(program_said);
}

static TEST_UNUSED void program_finish(void) {
  while (blocks) program_free(blocks + 1);
}

#endif /* FUZZ_PROGRAM_H */
