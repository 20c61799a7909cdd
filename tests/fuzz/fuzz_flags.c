/* Any bytes as a run.txt, as a command line, as a vocabulary, as an exf.config and as a
   list of classes, by the parsers of the examples. They end the program when the input
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

/* What has been read can be written, and read again, to the same; what was given stays as
   it was, and nothing that a checkpoint could say reaches flags that it does not keep. */
static void read_settings(const char *given, int how) {
  static charlm c;
  text one = {0}, two = {0};
  train_defaults(&c);
  *flag_given(&c.r.f, "width") = 1;
  flags_read(&c.r.f, given, "run.txt", how);
  MUST(c.r.width == 128);
  if (how == FLAGS_AGREE) MUST(strcmp(c.r.out, "runs/charlm") == 0 && c.r.quiet == 0);
  MUST(c.r.layers >= 1 && c.r.layers <= 1024 && c.r.lr >= 0 && c.r.lr <= 1e6);
  MUST(c.r.ffn >= 0 && c.r.ffn <= 3 && c.r.routed >= 0 && c.r.routed <= 1);
  flags_write(&c.r.f, FLAG_FREE, &one);
  train_defaults(&c);
  flags_read(&c.r.f, one.s, "run.txt", FLAGS_TAKE);
  flags_write(&c.r.f, FLAG_FREE, &two);
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
  flags_parse(&c.r.f, argc, argv, NULL, targets_usage);
}

static void read_list(const char *given) {
  vocabulary v;
  text t = {0};
  memset(&v, 0, sizeof v);
  if (!vocabulary_read(&v, given)) return;
  MUST(v.n >= 1 && v.n <= 256);
  vocabulary_write(&v, &t);
  MUST(t.n <= strlen(given));
}

static void read_config(const char *given) {
  const char *act = json_find(given, "activation");
  MUST(act == NULL || strlen(act) < 256);
  MUST(config_count(given, "n_head", 7, "model") < 1000000000);
}

/* As many names as the first byte says, to a list that reads as the same. */
static void read_names(const char *given) {
  static image_set one, two;
  text t = {0};
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
      case 0: read_settings(given, FLAGS_TAKE); break;
      case 1: read_settings(given, FLAGS_CONFIG + (unsigned char)*given % 3); break;
      case 2: read_words(given); break;
      case 3: read_list(given); break;
      case 4: read_config(given); break;
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
