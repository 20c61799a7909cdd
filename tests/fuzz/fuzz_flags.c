/* Any bytes as a run.json, as a command line, as a vocabulary, as a row of numbers and as
   a list of classes, by the parsers of the examples. They end the program when the input
   is bad: here they come back, and must have said why in one line. */
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

static const char *const targets_usage = "charlm train [FLAGS]";

/* What has been read can be written, and read again, to the same. */
static void read_settings(const char *given, int agree) {
  static charlm c;
  text one = {NULL, 0, 0}, two = {NULL, 0, 0};
  const unsigned scopes = ~(1u << FLAG_ONCE);
  train_defaults(&c);
  flags_read(c.r.flags, c.r.n_flags, given, "run.json", scopes, agree);
  flags_write(c.r.flags, c.r.n_flags, scopes, 1, &one);
  train_defaults(&c);
  flags_read(c.r.flags, c.r.n_flags, one.s, "run.json", scopes, 0);
  flags_write(c.r.flags, c.r.n_flags, scopes, 1, &two);
  MUST(strcmp(one.s, two.s) == 0);
}

/* Words are separated by line ends. */
static void read_words(char *given) {
  static charlm c;
  char *argv[64];
  int argc = 2;
  argv[0] = argv[1] = given;
  while (*given && argc < 63) {
    char *end = strchr(given, '\n');
    argv[argc++] = given;
    if (end == NULL) break;
    *end = '\0';
    given = end + 1;
  }
  argv[argc] = NULL;
  train_defaults(&c);
  flags_parse(c.r.flags, c.r.n_flags, argc, argv, NULL, targets_usage);
}

static void read_list(const char *given) {
  vocabulary v;
  text t = {NULL, 0, 0};
  memset(&v, 0, sizeof v);
  if (!vocabulary_read(&v, given)) return;
  MUST(v.n >= 1 && v.n <= 256);
  vocabulary_write(&v, &t);
  MUST(t.n <= strlen(given));
}

static void read_row(const char *given) {
  int k;
  for (k = 0; k < 8; k++) (void)csv_field(given, k);
}

/* As many names as the first byte says, to a list that reads as the same. */
static void read_names(const char *given) {
  static image_set one, two;
  text t = {NULL, 0, 0};
  size_t i, n = 1 + (size_t)(unsigned char)*given % 4;
  memset(&one, 0, sizeof one);
  memset(&two, 0, sizeof two);
  if (*given == '\0' || !names_read(&one, given + 1, n)) return;
  MUST(one.classes == n);
  names_write(one.names, n, &t);
  MUST(names_read(&two, t.s, n));
  for (i = 0; i < n; i++) MUST(strcmp(one.names[i], two.names[i]) == 0);
}

static int fuzz_flags(const uint8_t *data, size_t n) {
  char *volatile given = NULL;
  if (n == 0) return 0;
  program_begin(1);
  given = (char *)program_calloc(n, 1);     /* exactly as long as the text */
  memcpy(given, data + 1, n - 1);
  if (setjmp(program_end) == 0) {
    switch (data[0] % 6) {                   /* '0' is 0 */
      case 0: read_settings(given, 0); break;
      case 1: read_settings(given, 1); break;
      case 2: read_words(given); break;
      case 3: read_list(given); break;
      case 4: read_row(given); break;
      default: read_names(given); break;
    }
  } else {
    program_error();
  }
  MUST(block_peak <= 64 * n + 65536);
  program_finish();
  return 0;
}

FUZZ_MAIN(flags)
