/* Hundreds of safetensors files that break one rule each: every one is refused with that
   rule's number and status, in little memory, and leaves nothing behind.
     test_malicious --write FOLDER     writes them, to start a fuzzer from */
#ifdef TEST_LINKED
#include "../exfusion.h"
#else
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"
#endif
#include "test.h"

#include "heap.h"
#include "malicious.h"

enum { N_RULES = 22, MEMORY = 2 << 20 };

typedef struct audit {
  heap heap;
  exf_ctx *ctx;
  const char *folder;
  size_t files, largest;
  int of_rule[N_RULES];
} audit;

static void write_file(audit *a, const malicious *m) {
  char path[512];
  snprintf(path, sizeof path, "%s/%04d-%s.safetensors", a->folder, (int)a->files,
           m->rule);
  exf_file_save(a->ctx, path, m->data, m->n);
}

static void visit(void *user, const malicious *m) {
  audit *a = (audit *)user;
  size_t held = a->heap.bytes, trailing = 0;
  int before = test_now.failures;
  char rule[32];
  exf_st *st;
  a->files++;
  a->of_rule[atoi(m->rule + 1)]++;
  if (a->folder) {
    write_file(a, m);
    return;
  }
  snprintf(rule, sizeof rule, "rule %s:", m->rule);
  heap_arm(&a->heap, 0, 0);
  st = exf_st_open_memory(a->ctx, m->data, m->n, NULL);
  CHECK(st == NULL);
  CHECK(a->heap.bytes == held && a->heap.peak < MEMORY);
  if (a->heap.peak - held > a->largest) a->largest = a->heap.peak - held;
  CHECK_ERR(a->ctx, m->status, rule);
  exf_st_close(st);
  st = exf_st_open_memory(a->ctx, m->data, m->n, &trailing);   /* excuses V16 alone */
  CHECK(st == NULL || (strcmp(m->rule, "V16") == 0 && trailing > 0));
  exf_error_clear(a->ctx);
  exf_st_close(st);
  if (test_now.failures > before)
    printf("  file %d, %s: %.*s\n", (int)a->files, m->rule,
           (int)(m->n > 8 ? m->n - 8 : 0), m->n > 8 ? (const char *)m->data + 8 : "");
}

/* Text that looks like a great many tensors, axes and pairs: the bound holds for it, too,
   and only a file larger than the constant shows it. */
TEST(memory_is_bounded_in_any_text) {
  static const char *const parts[] = {":", "[0,0,", "{:", "\"\":\"\",", ":[0],",
                                      "\"\":{"};
  enum { BYTES = 3 << 20, N_PARTS = (int)(sizeof parts / sizeof parts[0]) };
  unsigned char *file = (unsigned char *)malloc(8 + BYTES);
  heap h;
  exf_desc desc;
  exf_ctx *ctx;
  size_t held, i, k, n;
  memset(&h, 0, sizeof h);
  memset(&desc, 0, sizeof desc);
  heap_use(&h, &desc);
  desc.n_threads = 1;
  ctx = exf_ctx_new(&desc);
  held = h.bytes;
  for (k = 0; file && k < N_PARTS * N_PARTS; k++) {
    const char *head = "{\"__metadata__\":{";
    for (i = 0; i < 8; i++) file[i] = (unsigned char)((uint64_t)BYTES >> 8 * i & 255);
    memset(file + 8, ' ', BYTES);
    memcpy(file + 8, head, strlen(head));
    for (n = 8 + strlen(head); n + 16 < BYTES / 2; n += strlen(parts[k % N_PARTS]))
      memcpy(file + n, parts[k % N_PARTS], strlen(parts[k % N_PARTS]));
    file[n++] = '}';
    for (; n + 16 < 8 + BYTES; n += strlen(parts[k / N_PARTS]))
      memcpy(file + n, parts[k / N_PARTS], strlen(parts[k / N_PARTS]));
    heap_arm(&h, 0, 0);
    CHECK(exf_st_open_memory(ctx, file, 8 + BYTES, NULL) == NULL);
    CHECK(h.peak - held <= 4 * (size_t)BYTES + 4096 && h.bytes == held);
    exf_error_clear(ctx);
  }
  free(file);
  exf_ctx_free(ctx);
}

/* Sound files at the edge: every hexadecimal digit in an escape, and many tensors whose
   text is as short as text can be for its 16 axes. */
TEST(sound_files_at_the_edge_are_read) {
  enum { TENSORS = 60, ROOM = 16384 };
  static const char digits[] = "0123456789abcdefABCDEF";
  static const char names[TENSORS + 1] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz01234567";
  char *text = (char *)malloc(ROOM), want[sizeof digits];
  heap h;
  exf_desc desc;
  exf_ctx *ctx;
  exf_st *st;
  size_t n = 8, i, k;
  memset(&h, 0, sizeof h);
  memset(&desc, 0, sizeof desc);
  heap_use(&h, &desc);
  desc.n_threads = 1;
  ctx = exf_ctx_new(&desc);
  if (!text) exit(2);
  n += (size_t)snprintf(text + n, ROOM - n, "{\"__metadata__\":{\"k\":\"");
  for (i = 0; digits[i]; i++) {
    n += (size_t)snprintf(text + n, ROOM - n, "\\u004%c", digits[i]);
    want[i] = (char)(0x40 + (i < 16 ? i : i - 6));
  }
  want[i] = '\0';
  n += (size_t)snprintf(text + n, ROOM - n, "\"}");
  for (i = 0; i < TENSORS; i++) {
    n += (size_t)snprintf(text + n, ROOM - n, ",\"%c\":{\"dtype\":\"U8\",\"shape\":[",
                          names[i]);
    for (k = 0; k < 16; k++) n += (size_t)snprintf(text + n, ROOM - n, k ? ",0" : "0");
    n += (size_t)snprintf(text + n, ROOM - n, "],\"data_offsets\":[0,0]}");
  }
  text[n++] = '}';
  for (i = 0; i < 8; i++) text[i] = (char)((uint64_t)(n - 8) >> 8 * i & 255);
  st = exf_st_open_memory(ctx, text, n, NULL);
  if (CHECK(st != NULL)) CHECK_STR(exf_st_meta(st, "k"), want);
  else printf("  %s\n", exf_error(ctx));
  CHECK(exf_st_count(st) == TENSORS);
  for (i = 0; i < exf_st_count(st); i++) {
    const exf_st_entry *e = exf_st_get(st, i);
    CHECK(e->n_dims == 16 && e->dim[0] == 0 && e->dim[15] == 0);
  }
  exf_st_close(st);
  exf_ctx_free(ctx);
  CHECK(h.n_live == 0 && h.n_bad == 0);
  free(text);
}

/* The byte that a message names is the one that is wrong. */
TEST(messages_name_the_byte) {
  static const struct { const char *header, *message; } bad[] = {
    {"{\"ab\tc\":1}", "header byte 4: a control character"},
    {"{\"ab\\qc\":1}", "header byte 4: an escape that JSON does not have"},
    {"{\"ab\\ud800\":1}", "header byte 4: an escape is half a surrogate pair"},
    {"{\"a\":1}", "header byte 5"},
    {"{}x", "header byte 2 is 0x78"},
    {"{\"a\xff\"}", "header byte 3 is not UTF-8"}};
  exf_ctx *ctx = exf_ctx_new(NULL);
  size_t i;
  for (i = 0; i < LENGTH(bad); i++) {
    unsigned char file[64] = {0};
    size_t n = strlen(bad[i].header);
    file[0] = (unsigned char)n;
    memcpy(file + 8, bad[i].header, n);
    CHECK(exf_st_open_memory(ctx, file, 8 + n, NULL) == NULL);
    CHECK_ERR(ctx, EXF_FORMAT, bad[i].message);
  }
  exf_ctx_free(ctx);
}

static audit each(const char *folder) {
  static audit a;
  exf_desc desc;
  memset(&a, 0, sizeof a);
  memset(&desc, 0, sizeof desc);
  heap_use(&a.heap, &desc);
  desc.n_threads = 1;
  a.folder = folder;
  a.ctx = exf_ctx_new(&desc);
  malicious_each(visit, &a);
  if (folder && exf_ctx_status(a.ctx) != EXF_OK) printf("%s\n", exf_error(a.ctx));
  exf_ctx_free(a.ctx);
  return a;
}

TEST(every_malicious_file_is_refused_by_its_rule) {
  static const int rules[] = {1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18};
  audit a = each(NULL);
  size_t i;
  CHECK(a.files >= 300);
  for (i = 0; i < LENGTH(rules); i++) CHECK(a.of_rule[rules[i]] >= 3);
  CHECK(a.heap.n_live == 0 && a.heap.n_bad == 0);
  printf("%d malicious files, at most %d bytes of memory for one\n", (int)a.files,
         (int)a.largest);
}

int main(int argc, char **argv) {
  if (argc == 3 && strcmp(argv[1], "--write") == 0) return each(argv[2]).files == 0;
  RUN(every_malicious_file_is_refused_by_its_rule);
  RUN(memory_is_bounded_in_any_text);
  RUN(messages_name_the_byte);
  RUN(sound_files_at_the_edge_are_read);
  TEST_MAIN_END;
}
