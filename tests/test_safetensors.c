/* The safetensors reader against one hostile file per rule, the writer against the bytes
   of the reference package, and saving against every fault the file hooks can have.
     test_safetensors --write PATH     writes the reference's tensors, for
                                       interop_safetensors.py */
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"

#include "test.h"

static exf_ctx *ctx;
static const exf_real some_data[8] = {1, 2, 3, 4, 5, 6, 7, 8};

/* ---- files built in memory ---- */

/* A block of exactly the size of the file, so that a sanitizer sees one byte too many. */
typedef struct blob {
  unsigned char *data;
  size_t n;
} blob;

static blob blob_new(size_t n) {
  blob b;
  b.n = n;
  b.data = (unsigned char *)malloc(n > 0 ? n : 1);
  if (b.data == NULL) exit(2);
  memset(b.data, 0, n);
  return b;
}

static blob blob_raw(const void *data, size_t n) {
  blob b = blob_new(n);
  if (n > 0) memcpy(b.data, data, n);
  return b;
}

/* The length, a header of n_header bytes, and data bytes 0, 1, 2, ... */
static blob blob_file(const char *header, size_t n_header, size_t n_data) {
  blob b = blob_new(8 + n_header + n_data);
  size_t i;
  for (i = 0; i < 8; i++) b.data[i] = (unsigned char)((uint64_t)n_header >> 8 * i & 255);
  memcpy(b.data + 8, header, n_header);
  for (i = 0; i < n_data; i++) b.data[8 + n_header + i] = (unsigned char)i;
  return b;
}

static exf_st *open_json(const char *header, size_t n_data, size_t *trailing) {
  blob b = blob_file(header, strlen(header), n_data);
  exf_st *st = exf_st_open_memory(ctx, b.data, b.n, trailing);
  free(b.data);
  return st;
}

/* No memory is held after a refusal, and the message fits on one printable line. */
static void check_refused(blob b, exf_status status, const char *text) {
  size_t held = exf_ctx_stats(ctx).bytes, trailing = 77, i;
  exf_st *st = exf_st_open_memory(ctx, b.data, b.n, NULL);
  const char *message = exf_error(ctx);
  CHECK(st == NULL);
  CHECK(exf_ctx_stats(ctx).bytes == held);
  CHECK(strlen(message) < 500);
  for (i = 0; message[i] != '\0'; i++)
    if (message[i] < 0x20 || message[i] > 0x7e) break;
  CHECK(message[i] == '\0');
  CHECK_ERR(ctx, status, text);
  if (strstr(text, "trailing") == NULL && st == NULL) {
    st = exf_st_open_memory(ctx, b.data, b.n, &trailing);
    CHECK(st == NULL && trailing == 0);
    exf_error_clear(ctx);
  }
  exf_st_close(st);
  free(b.data);
}

static void check_json(const char *header, size_t n_data, exf_status status,
                       const char *text) {
  int before = test_now.failures;
  check_refused(blob_file(header, strlen(header), n_data), status, text);
  if (test_now.failures > before) printf("  header: %.120s\n", header);
}

static void check_accepted(const char *header, size_t n_data, size_t n_tensors) {
  exf_st *st = open_json(header, n_data, NULL);
  if (!CHECK(st != NULL)) printf("  %s\n  header: %.120s\n", exf_error(ctx), header);
  CHECK(exf_st_count(st) == n_tensors);
  exf_st_close(st);
  exf_error_clear(ctx);
}

#define U8(name, shape, offsets) \
  "\"" name "\":{\"dtype\":\"U8\",\"shape\":" shape ",\"data_offsets\":" offsets "}"
#define F32(name, shape, offsets) \
  "\"" name "\":{\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

/* ---- a file system in memory, with faults ---- */

enum { FS_FILES = 4 };
typedef enum fs_call {
  FS_OPEN, FS_SIZE, FS_READ, FS_WRITE, FS_SYNC, FS_CLOSE, FS_RENAME, FS_SYNC_DIR, FS_CALLS
} fs_call;

typedef struct fs_file {
  char name[32];                /* "" is a free place */
  unsigned char *data;
  size_t n, at;
} fs_file;

typedef struct fs {
  fs_file file[FS_FILES];
  int calls, fail_at;           /* the call of this number fails; 0: none */
  int failed;                   /* the fs_call that did, or -1 */
  int n_open, n_bad;            /* open handles; calls that should not have been made */
  size_t piece;                 /* most bytes of one read or write; 0: all */
  int64_t lie;                  /* added to every size, read and write count */
  int64_t fake_size;            /* 0: the true size */
  fs_call lie_in;
  int synced;                   /* 1: written bytes are flushed */
} fs;

static int fs_fails(fs *f, fs_call call) {
  if (++f->calls != f->fail_at) return 0;
  f->failed = (int)call;
  errno = ENOSPC;
  return 1;
}

static fs_file *fs_find(fs *f, const char *name) {
  int i;
  for (i = 0; i < FS_FILES; i++)
    if (strcmp(f->file[i].name, name) == 0) return &f->file[i];
  return NULL;
}

static void fs_drop(fs_file *file) {
  free(file->data);
  memset(file, 0, sizeof *file);
}

static void *fs_open(void *user, const char *path, int writing) {
  fs *f = (fs *)user;
  fs_file *file = fs_find(f, path);
  if (fs_fails(f, FS_OPEN)) return NULL;
  if (file == NULL && !writing) {
    errno = ENOENT;
    return NULL;
  }
  if (file == NULL) file = fs_find(f, "");
  if (file == NULL || strlen(path) >= sizeof file->name) return NULL;
  if (writing) {
    fs_drop(file);
    strcpy(file->name, path);
    f->synced = 0;
  }
  file->at = 0;
  f->n_open++;
  return file;
}

static int64_t fs_size(void *user, void *handle) {
  fs *f = (fs *)user;
  if (fs_fails(f, FS_SIZE)) return -1;
  if (f->fake_size != 0) return f->fake_size;
  return (int64_t)((fs_file *)handle)->n + (f->lie_in == FS_SIZE ? f->lie : 0);
}

static int64_t fs_read(void *user, void *handle, void *data, size_t bytes) {
  fs *f = (fs *)user;
  fs_file *file = (fs_file *)handle;
  if (fs_fails(f, FS_READ)) return -1;
  if (f->lie_in == FS_READ && f->lie != 0) return (int64_t)bytes + f->lie;
  if (f->piece > 0 && bytes > f->piece) bytes = f->piece;
  if (bytes > file->n - file->at) bytes = file->n - file->at;
  if (bytes > 0) memcpy(data, file->data + file->at, bytes);
  file->at += bytes;
  return (int64_t)bytes;
}

static int64_t fs_write(void *user, void *handle, const void *data, size_t bytes) {
  fs *f = (fs *)user;
  fs_file *file = (fs_file *)handle;
  unsigned char *grown;
  if (fs_fails(f, FS_WRITE)) return -1;
  if (f->lie_in == FS_WRITE && f->lie != 0)
    return f->lie < 0 ? 0 : (int64_t)bytes + f->lie;
  if (f->piece > 0 && bytes > f->piece) bytes = f->piece;
  grown = (unsigned char *)realloc(file->data, file->n + bytes + 1);
  if (grown == NULL) return -1;
  memcpy(grown + file->n, data, bytes);
  file->data = grown;
  file->n += bytes;
  return (int64_t)bytes;
}

static int fs_sync(void *user, void *handle) {
  (void)handle;
  if (fs_fails((fs *)user, FS_SYNC)) return -1;
  ((fs *)user)->synced = 1;
  return 0;
}

static int fs_close(void *user, void *handle) {
  (void)handle;
  ((fs *)user)->n_open--;
  return fs_fails((fs *)user, FS_CLOSE) ? -1 : 0;
}

static int fs_rename(void *user, const char *from, const char *to) {
  fs *f = (fs *)user;
  fs_file *a, *b;
  if (fs_fails(f, FS_RENAME)) return -1;
  a = fs_find(f, from);
  b = fs_find(f, to);
  if (a == NULL || !f->synced || f->n_open != 0) f->n_bad++;
  if (a == NULL) return -1;
  if (b != NULL) fs_drop(b);
  strcpy(a->name, to);
  return 0;
}

static int fs_remove(void *user, const char *path) {
  fs_file *file = fs_find((fs *)user, path);
  if (((fs *)user)->n_open != 0) ((fs *)user)->n_bad++;
  if (file == NULL) return -1;
  fs_drop(file);
  return 0;
}

static int fs_sync_dir(void *user, const char *path) {
  (void)path;
  return fs_fails((fs *)user, FS_SYNC_DIR) ? -1 : 0;
}

static exf_files fs_hooks(fs *f) {
  exf_files h;
  memset(f, 0, sizeof *f);
  f->failed = -1;
  h.user = f;
  h.open = fs_open;
  h.size = fs_size;
  h.read = fs_read;
  h.write = fs_write;
  h.sync = fs_sync;
  h.close = fs_close;
  h.rename = fs_rename;
  h.remove = fs_remove;
  h.sync_dir = fs_sync_dir;
  return h;
}

static exf_ctx *fs_ctx(fs *f) {
  exf_desc desc;
  exf_files hooks = fs_hooks(f);
  memset(&desc, 0, sizeof desc);
  desc.n_threads = 1;
  desc.files = &hooks;
  return exf_ctx_new(&desc);
}

static void fs_put(fs *f, const char *name, const void *data, size_t n) {
  fs_file *file = fs_find(f, name);
  if (file == NULL) file = fs_find(f, "");
  if (file == NULL) exit(2);
  fs_drop(file);
  strcpy(file->name, name);
  file->data = blob_raw(data, n).data;
  file->n = n;
}

static void fs_free(fs *f) {
  int i;
  for (i = 0; i < FS_FILES; i++) fs_drop(&f->file[i]);
}

/* ---- rules of the reader ---- */

TEST(v1_the_header_fits_into_the_file) {
  static const unsigned char huge[16] = {255, 255, 255, 255, 255, 255, 255, 255, '{'};
  static const unsigned char wraps[16] = {0xf8, 255, 255, 255, 255, 255, 255, 255, '{'};
  blob b;
  size_t n;
  for (n = 0; n < 8; n++) check_refused(blob_new(n), EXF_FORMAT, "rule V1");
  check_refused(blob_raw(huge, 16), EXF_FORMAT, "rule V1");
  check_refused(blob_raw(wraps, 16), EXF_FORMAT, "rule V1");
  b = blob_file("{}", 2, 0);
  b.data[0] = 3;
  check_refused(b, EXF_FORMAT, "rule V1");
  check_refused(blob_file("", 0, 0), EXF_FORMAT, "rule V4");
}

/* Sizes that only a file system can claim: nothing may be allocated for them. */
TEST(v2_memory_is_not_taken_on_the_word_of_a_header) {
  static const unsigned char over[16] = {0x01, 0xe1, 0xf5, 0x05, 0, 0, 0, 0, '{', '}'};
  static const char tensor[] = "{" U8("a", "[9000000000]", "[0,9000000000]") "}";
  blob b = blob_file(tensor, sizeof tensor - 1, 0);
  fs f;
  exf_ctx *c = fs_ctx(&f);
  fs_put(&f, "over", over, sizeof over);
  f.fake_size = (int64_t)1 << 30;
  CHECK(exf_st_open(c, "over", NULL) == NULL);
  CHECK_ERR(c, EXF_FORMAT, "over: safetensors rule V1: a header of 100000001 bytes");
  fs_put(&f, "cut", b.data, b.n);
  f.fake_size = 0;
  CHECK(exf_st_open(c, "cut", NULL) == NULL);
  CHECK_ERR(c, EXF_FORMAT, "cut: safetensors rule V16");
  CHECK(exf_ctx_stats(c).bytes_peak < 20000);
  CHECK(f.n_open == 0);
  fs_free(&f);
  free(b.data);
  exf_ctx_free(c);
}

static const char *const bad_utf8[] = {
  "\x80", "\xff", "\xc3", "\xc0\x80", "\xc1\xbf", "\xe0\x9f\xbf", "\xed\xa0\x80",
  "\xed\xbf\xbf", "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80", "\xf5\x80\x80\x80",
  "\xe2\x82", "\xf0\x9f\x98", "\xe2\x28\xa1", "\xf0\x9f\x98\x28", "\xfe", "\xf8\x88\x80",
};
static const char *const good_utf8[] = {
  "\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xed\x9f\xbf", "\xee\x80\x80", "\xef\xbf\xbf",
  "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf", "\x7f",
};
enum {
  N_BAD_UTF8 = (int)(sizeof bad_utf8 / sizeof bad_utf8[0]),
  N_GOOD_UTF8 = (int)(sizeof good_utf8 / sizeof good_utf8[0])
};

TEST(v3_the_header_is_utf8) {
  char header[160];
  int i;
  for (i = 0; i < N_BAD_UTF8; i++) {
    snprintf(header, sizeof header, "{" U8("%s", "[0]", "[0,0]") "}", bad_utf8[i]);
    check_json(header, 0, EXF_FORMAT, "rule V3");
    check_json(bad_utf8[i], 0, EXF_FORMAT, "rule V3");
  }
  for (i = 0; i < N_GOOD_UTF8; i++) {
    snprintf(header, sizeof header, "{" U8("%s", "[0]", "[0,0]") "}", good_utf8[i]);
    check_accepted(header, 0, 1);
  }
  check_json("{" U8("\\ud800", "[0]", "[0,0]") "}", 0, EXF_FORMAT, "rule V3");
  check_json("{" U8("\\udc00", "[0]", "[0,0]") "}", 0, EXF_FORMAT, "rule V3");
  check_json("{" U8("\\ud83d\\ud83d", "[0]", "[0,0]") "}", 0, EXF_FORMAT, "rule V3");
  check_json("{" U8("\\ud83dx", "[0]", "[0,0]") "}", 0, EXF_FORMAT, "rule V3");
  check_json("{\"\\ud83d\\", 0, EXF_FORMAT, "rule V3");
}

TEST(v4_the_json_is_strict) {
  static const char *const bad[] = {
    " ", "{", "}", "{}x", "{}{}", "{,}", "x", "{\"a\"}", "{\"a\":}", "{\"a", "{\"a\\",
    "{" U8("a", "[0]", "[0,0]"), "{" U8("a", "[0]", "[0,0]") ",}",
    "{" U8("a", "[0]", "[0,0]") " " U8("b", "[0]", "[0,0]") "}",
    "{" U8("a", "[1,]", "[0,1]") "", "{\"a\":{\"dtype\":\"U8\",}}",
    "{'a':1}", "{a:1}", "{1:2}", "{" U8("a\\x", "[0]", "[0,0]") "}",
    "{" U8("a\\u12g4", "[0]", "[0,0]") "}", "{\"\\u12",
    "{" U8("a\tb", "[0]", "[0,0]") "}",
    "{" U8("a\nb", "[0]", "[0,0]") "}", "\f{}", "{}\v", "\xef\xbb\xbf{}", "/**/{}",
    "{\"a\":{\"dtype\" \"U8\"}}", "{\"__metadata__\":{\"a\" \"b\"}}",
    "{\"__metadata__\":{,}}", "{\"__metadata__\":nul}", "{\"__metadata__\":{\"a\":\"b\"",
    "{" U8("a", "[0]", "[0,0") "}",
    "{:::::::::::::", "{\"a\":{::::::::",
  };
  size_t i;
  blob b;
  for (i = 0; i < sizeof bad / sizeof bad[0]; i++)
    if (strstr(bad[i], "[1,]") != NULL || strstr(bad[i], "nul}") != NULL)
      check_json(bad[i], 0, EXF_FORMAT, "rule V");
    else
      check_json(bad[i], 0, EXF_FORMAT, "rule V4");
  check_json("{\"a\":{", 0, EXF_FORMAT, "rule V4: the JSON header ends where '\"' is");
  b = blob_file("{}\0\0\0\0\0\0", 8, 0);
  check_refused(b, EXF_FORMAT, "rule V4: header byte 2 is 0x00");
  b = blob_file("\0\0{}\0\0\0\0", 8, 0);
  check_refused(b, EXF_FORMAT, "rule V4");
  check_accepted("{}", 0, 0);
  check_accepted(" \t\r\n{ } \t\r\n", 0, 0);
  check_accepted("\n{ \"a\" : { \"dtype\"\t:\"U8\", \"shape\": [ 1 , 2 ],\r\n"
                 "\"data_offsets\" :[ 0 , 2 ] } }  ", 2, 1);
}

TEST(v5_other_structures_are_refused_without_recursion) {
  static const char *const bad[] = {
    "[]", "\"a\"", "1", "null", "true", "{\"a\":1}", "{\"a\":null}", "{\"a\":[]}",
    "{\"a\":\"b\"}", "{\"a\":{\"dtype\":1}}", "{\"a\":{\"shape\":1}}",
    "{\"a\":{\"shape\":{}}}", "{\"a\":{\"data_offsets\":\"01\"}}",
    "{\"a\":{\"dtype\":null}}", "{\"__metadata__\":[]}", "{\"__metadata__\":\"x\"}",
  };
  const size_t deep = 3000000;
  size_t i;
  blob b = blob_file("", 0, deep);
  for (i = 0; i < sizeof bad / sizeof bad[0]; i++)
    check_json(bad[i], 0, EXF_FORMAT, "rule V5");
  memset(b.data + 8, '[', deep);
  for (i = 0; i < 8; i++) b.data[i] = (unsigned char)(deep >> 8 * i & 255);
  check_refused(b, EXF_FORMAT, "rule V5");
}

TEST(v6_no_key_stands_twice) {
  check_json("{" U8("a", "[1]", "[0,1]") "," U8("a", "[1]", "[1,2]") "}", 2, EXF_FORMAT,
             "rule V6: tensor 'a'");
  check_json("{" U8("a", "[0]", "[0,0]") "," U8("\\u0061", "[0]", "[0,0]") "}", 0,
             EXF_FORMAT, "rule V6");
  check_json("{" U8("b", "[0]", "[0,0]") "," U8("a", "[0]", "[0,0]") ","
             U8("c", "[0]", "[0,0]") "," U8("a", "[0]", "[0,0]") "}", 0, EXF_FORMAT,
             "rule V6: tensor 'a'");
  check_json("{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":"
             "[0,0]}}", 0, EXF_FORMAT, "rule V6");
  check_json("{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0],"
             "\"sh\\u0061pe\":[0]}}", 0, EXF_FORMAT, "rule V6");
  check_json("{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0],"
             "\"data_offsets\":[0,0]}}", 0, EXF_FORMAT, "rule V6");
  check_json("{\"__metadata__\":{\"k\":\"1\",\"j\":\"2\",\"k\":\"1\"}}", 0, EXF_FORMAT,
             "rule V6: metadata key 'k'");
  check_json("{\"__metadata__\":{},\"__meta\\u0064ata__\":{}}", 0, EXF_FORMAT, "rule V6");
  check_json("{\"__metadata__\":null,\"__metadata__\":{\"a\":\"b\"}}", 0, EXF_FORMAT,
             "rule V6");
}

TEST(v7_names_end_where_c_strings_end) {
  check_json("{" U8("a\\u0000b", "[0]", "[0,0]") "}", 0, EXF_FORMAT, "rule V7");
  check_json("{\"__metadata__\":{\"a\\u0000\":\"b\"}}", 0, EXF_FORMAT, "rule V7");
  check_json("{\"__metadata__\":{\"a\":\"\\u0000b\"}}", 0, EXF_FORMAT, "rule V7");
  check_accepted("{" U8("", "[0]", "[0,0]") "}", 0, 1);
  /* a tensor by the reserved name is read as metadata, and has no strings then */
  check_json("{" U8("__metadata__", "[0]", "[0,0]") "}", 0, EXF_FORMAT, "rule V8");
}

TEST(v8_metadata_values_are_strings) {
  exf_st *st;
  check_json("{\"__metadata__\":{\"a\":1}}", 0, EXF_FORMAT, "rule V8");
  check_json("{\"__metadata__\":{\"a\":{}}}", 0, EXF_FORMAT, "rule V8");
  check_json("{\"__metadata__\":{\"a\":null}}", 0, EXF_FORMAT, "rule V8");
  check_json("{\"__metadata__\":{\"a\":\"b\",\"c\":[\"d\"]}}", 0, EXF_FORMAT, "rule V8");
  check_accepted("{\"__metadata__\":null}", 0, 0);
  check_accepted("{\"__metadata__\":{}," U8("a", "[1]", "[0,1]") "}", 1, 1);
  st = open_json("{" U8("a", "[1]", "[0,1]") ",\"__metadata__\":{\"z}\":\"{\\\"}\","
                 "\"b\":\"\",\"\":\"e\",\"\\ud83d\\ude00\":\"\\u00e9\\u20ac\\b\"}}", 1,
                 NULL);
  CHECK_OK(ctx);
  if (CHECK(st != NULL)) {
    CHECK_STR(exf_st_meta(st, "z}"), "{\"}");
    CHECK_STR(exf_st_meta(st, "b"), "");
    CHECK_STR(exf_st_meta(st, ""), "e");
    CHECK_STR(exf_st_meta(st, "\xf0\x9f\x98\x80"), "\xc3\xa9\xe2\x82\xac\b");
    CHECK(exf_st_meta(st, "a") == NULL);
    CHECK(exf_st_meta(st, "zz") == NULL);
    CHECK(exf_st_meta(st, NULL) == NULL);
  }
  exf_st_close(st);
}

TEST(v9_a_tensor_has_exactly_its_three_members) {
  check_json("{\"a\":{}}", 0, EXF_FORMAT, "rule V9: tensor 'a': lacks the member dtype");
  check_json("{\"a\":{\"shape\":[0],\"data_offsets\":[0,0]}}", 0, EXF_FORMAT,
             "rule V9: tensor 'a': lacks the member dtype");
  check_json("{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,0]}}", 0, EXF_FORMAT,
             "rule V9: tensor 'a': lacks the member shape");
  check_json("{\"a\":{\"dtype\":\"U8\",\"shape\":[0]}}", 0, EXF_FORMAT,
             "rule V9: tensor 'a': lacks the member data_offsets");
  check_json("{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0],\"x\":1}}", 0,
             EXF_FORMAT, "rule V9");
  check_json("{\"a\":{\"Dtype\":\"U8\"}}", 0, EXF_FORMAT, "rule V9");
  check_accepted("{\"a\":{\"data_offsets\":[0,1],\"sh\\u0061pe\":[1],"
                 "\"dtype\":\"\\u00558\"}}", 1, 1);
}

TEST(v10_integers_are_plain_digits) {
  static const char *const bad[] = {
    "-1", "-0", "+1", "01", "00", "1.0", "1e0", "1E0", "0.0", "\"1\"", "[1]", "null",
    "281474976710656", "18446744073709551616", "18446744073709551617",
    "99999999999999999999999999999999999999999999", "", "0x1", "1.",
  };
  char header[256];
  size_t i;
  for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    const char *rule = strcmp(bad[i], "0x1") == 0 ? "rule V4" : "rule V10";
    snprintf(header, sizeof header, "{" U8("a", "[1,%s]", "[0,1]") "}", bad[i]);
    check_json(header, 1, EXF_FORMAT, rule);
    snprintf(header, sizeof header, "{" U8("a", "[1]", "[%s,1]") "}", bad[i]);
    check_json(header, 1, EXF_FORMAT, rule);
    snprintf(header, sizeof header, "{" U8("a", "[1]", "[0,%s]") "}", bad[i]);
    check_json(header, 1, EXF_FORMAT, rule);
  }
  check_json("{" U8("a", "[281474976710655]", "[0,281474976710655]") "}", 1, EXF_FORMAT,
             "rule V16");
}

TEST(v11_an_unknown_dtype_refuses_the_file) {
  static const char *const bad[] = {"", "f32", "F31", "F32 ", "F", "float32", "Q4_0",
                                    "F8_E4M3FN", "\\u00e9"};
  static const struct {
    const char *name;
    unsigned bits;
  } known[] = {
    {"BOOL", 8}, {"U8", 8}, {"I8", 8}, {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8},
    {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16}, {"U16", 16}, {"F16", 16},
    {"BF16", 16}, {"I32", 32}, {"U32", 32}, {"F32", 32}, {"C64", 64}, {"F64", 64},
    {"I64", 64}, {"U64", 64}, {"F4", 4}, {"F6_E2M3", 6}, {"F6_E3M2", 6},
  };
  char header[256];
  size_t i;
  for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    snprintf(header, sizeof header,
             "{\"a\":{\"dtype\":\"%s\",\"shape\":[0],\"data_offsets\":[0,0]}}", bad[i]);
    check_json(header, 0, EXF_FORMAT, "rule V11: tensor 'a': unknown dtype");
  }
  for (i = 0; i < sizeof known / sizeof known[0]; i++) {
    unsigned n = known[i].bits * 8 / 8;
    snprintf(header, sizeof header,
             "{\"a\":{\"dtype\":\"%s\",\"shape\":[2,4],\"data_offsets\":[0,%u]}}",
             known[i].name, n);
    check_accepted(header, n, 1);
    check_json(header, n - 1, EXF_FORMAT, "rule V16");
  }
}

TEST(v12_two_offsets_in_order) {
  check_json("{" U8("a", "[1]", "[]") "}", 1, EXF_FORMAT, "rule V12");
  check_json("{" U8("a", "[1]", "[0]") "}", 1, EXF_FORMAT, "rule V12");
  check_json("{" U8("a", "[1]", "[0,1,2]") "}", 1, EXF_FORMAT, "rule V12");
  check_json("{" U8("a", "[1]", "[1,0]") "}", 1, EXF_FORMAT, "rule V12");
}

TEST(v13_element_counts_do_not_overflow) {
  /* 2^32 * 2^32 wraps to 0: "empty" to a product that is not checked */
  check_json("{" F32("a", "[4294967296,4294967296]", "[0,0]") "}", 0, EXF_FORMAT,
             "rule V13: tensor 'a'");
  check_json("{" F32("a", "[4611686018427387904]", "[0,0]") "}", 0, EXF_FORMAT,
             "rule V10");
  /* 2^62 elements of 4 bytes wrap to 0 bytes */
  check_json("{" F32("a", "[2147483648,2147483648]", "[0,0]") "}", 0, EXF_FORMAT,
             "rule V13");
  check_json("{" F32("a", "[281474976710655,281474976710655]", "[0,4]") "}", 4,
             EXF_FORMAT, "rule V13");
  /* a zero before or after does not excuse the rest */
  check_json("{" F32("a", "[0,4294967296,4294967296]", "[0,0]") "}", 0, EXF_FORMAT,
             "rule V13");
  check_json("{" F32("a", "[4294967296,4294967296,0]", "[0,0]") "}", 0, EXF_FORMAT,
             "rule V13");
  check_json("{\"a\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,1]}}", 1,
             EXF_FORMAT, "rule V13: tensor 'a': 3 elements of F4 do not fill");
  check_json("{\"a\":{\"dtype\":\"F6_E2M3\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
             EXF_FORMAT, "rule V13");
}

TEST(v14_offsets_span_what_the_shape_needs) {
  check_json("{" F32("x", "[3]", "[0,8]") "}", 8, EXF_FORMAT,
             "memory: safetensors rule V14: tensor 'x': 3 elements of F32 need 12 bytes, "
             "data_offsets span 8");
  check_json("{" F32("x", "[2]", "[0,12]") "}", 12, EXF_FORMAT, "rule V14");
  check_json("{" F32("x", "[]", "[0,0]") "}", 0, EXF_FORMAT, "rule V14");
  check_json("{" F32("x", "[0]", "[0,4]") "}", 4, EXF_FORMAT, "rule V14");
}

TEST(v15_neither_hole_nor_overlap) {
  check_json("{" U8("a", "[1]", "[1,2]") "}", 2, EXF_FORMAT, "rule V15: tensor 'a'");
  check_json("{" U8("a", "[1]", "[0,1]") "," U8("b", "[1]", "[2,3]") "}", 3, EXF_FORMAT,
             "rule V15: tensor 'b': begins at 2, leaves a hole");
  check_json("{" U8("a", "[2]", "[0,2]") "," U8("b", "[2]", "[1,3]") "}", 3, EXF_FORMAT,
             "rule V15: tensor 'b': begins at 1, overlaps");
  check_json("{" U8("a", "[2]", "[0,2]") "," U8("b", "[2]", "[0,2]") "}", 2, EXF_FORMAT,
             "rule V15");
  check_json("{" U8("a", "[0]", "[1,1]") "," U8("b", "[2]", "[0,2]") "}", 2, EXF_FORMAT,
             "rule V15");
  /* any order in the JSON; empty tensors share an offset with others */
  check_accepted("{" U8("b", "[2]", "[1,3]") "," U8("a", "[1]", "[0,1]") ","
                 U8("c", "[1]", "[3,4]") "}", 4, 3);
  check_accepted("{" U8("b", "[2]", "[0,2]") "," U8("a", "[0]", "[0,0]") ","
                 U8("c", "[0]", "[2,2]") "," U8("d", "[1]", "[2,3]") ","
                 U8("e", "[0,3]", "[3,3]") "}", 3, 5);
}

TEST(v16_the_file_ends_with_the_last_tensor) {
  size_t trailing = 9;
  exf_st *st;
  check_json("{" U8("a", "[4]", "[0,4]") "}", 3, EXF_FORMAT, "rule V16");
  check_json("{" U8("a", "[4]", "[0,4]") "}", 6, EXF_FORMAT,
             "rule V16: 2 bytes after the last tensor: ask for them by trailing");
  check_json("{}", 1, EXF_FORMAT,
             "1 bytes after the last tensor: ask for them by trailing");
  st = open_json("{" U8("a", "[4]", "[0,4]") "}", 6, &trailing);
  CHECK(st != NULL && trailing == 2);
  CHECK(exf_st_find(st, "a") != NULL && exf_st_find(st, "a")->bytes == 4);
  exf_st_close(st);
  st = open_json("{" U8("a", "[4]", "[0,4]") "}", 4, &trailing);
  CHECK(st != NULL && trailing == 0);
  exf_st_close(st);
  st = open_json("{}", 5, &trailing);
  CHECK(st != NULL && trailing == 5);
  exf_st_close(st);
}

TEST(v17_scalars_empty_tensors_and_infinities_are_legal) {
  static const float odd[4] = {HUGE_VALF, -HUGE_VALF, -0.0f, 1};
  exf_real data[4], back[4];
  exf_st_item item;
  unsigned char *bytes;
  size_t n;
  exf_st *st;
  int i;
  check_accepted("{" F32("a", "[]", "[0,4]") "}", 4, 1);
  check_accepted("{" F32("a", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "[0,4]") "}", 4, 1);
  check_accepted("{" F32("a", "[0,0,3]", "[0,0]") "}", 0, 1);
  for (i = 0; i < 4; i++) data[i] = (exf_real)odd[i];
  data[3] = data[0] - data[0];
  item.name = "odd";
  item.shape = exf_shape2(2, 2);
  item.data = data;
  CHECK(exf_st_save_memory(ctx, &item, 1, NULL, 0, &bytes, &n) == EXF_OK);
  st = exf_st_open_memory(ctx, bytes, n, NULL);
  CHECK(exf_st_read(ctx, exf_st_get(st, 0), back, 4) == EXF_OK);
  CHECK(memcmp(back, data, sizeof data) == 0);
  exf_st_close(st);
  exf_st_free_memory(ctx, bytes);
}

TEST(v18_limits_have_their_own_status) {
  size_t n = 0, i, used = 1;
  blob b;
  char *name = (char *)malloc(5000), *header = (char *)malloc(6000);
  if (name == NULL || header == NULL) exit(2);
  check_json("{" F32("a", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "[0,4]") "}", 4,
             EXF_LIMIT, "rule V18: tensor 'a': more than 16 axes");
  memset(name, 'n', 4097);
  name[4097] = '\0';
  snprintf(header, 6000, "{" F32("%s", "[]", "[0,4]") "}", name);
  check_json(header, 4, EXF_LIMIT, "rule V18: tensor 'nnn");
  name[4096] = '\0';
  snprintf(header, 6000, "{" F32("%s", "[]", "[0,4]") "}", name);
  check_accepted(header, 4, 1);
  free(name);
  free(header);
  b = blob_new(64000000);
  b.data[8] = '{';
  for (i = 0; i <= 1000000; i++)
    used += (size_t)snprintf((char *)b.data + 8 + used, 80,
                             "%s" U8("%x", "[0]", "[0,0]"), i ? "," : "", (unsigned)i);
  b.data[8 + used++] = '}';
  for (i = 0; i < 8; i++) b.data[i] = (unsigned char)((uint64_t)used >> 8 * i & 255);
  n = 8 + used;
  CHECK(n <= b.n);
  b.n = n;
  check_refused(b, EXF_LIMIT, "rule V18: more than 1000000 tensors");
}

/* The densest files: tensors of the shortest description, and metadata alone. */
static double memory_ratio(const char *pattern, const char *close, int n) {
  exf_desc desc;
  exf_ctx *c;
  exf_st *st;
  exf_stats stats;
  blob b = blob_new((size_t)n * 90 + 90);
  size_t used = 0, before, i;
  int k;
  memset(&desc, 0, sizeof desc);
  desc.n_threads = 1;
  c = exf_ctx_new(&desc);
  before = exf_ctx_stats(c).bytes;
  for (k = 0; k < n; k++)
    used += (size_t)snprintf((char *)b.data + 8 + used, 90, pattern,
                             k > 0 ? "," : close[0] == '}' && close[1] == '}'
                                         ? "{\"__metadata__\":{" : "{", (unsigned)k);
  memcpy(b.data + 8 + used, close, strlen(close));
  used += strlen(close);
  for (i = 0; i < 8; i++) b.data[i] = (unsigned char)((uint64_t)used >> 8 * i & 255);
  st = exf_st_open_memory(c, b.data, 8 + used, NULL);
  CHECK(st != NULL);
  stats = exf_ctx_stats(c);
  exf_st_close(st);
  CHECK(exf_ctx_stats(c).bytes == before);
  exf_ctx_free(c);
  free(b.data);
  return (double)(stats.bytes_peak - before) / (double)(8 + used);
}

TEST(memory_is_bounded_by_the_size_of_the_file) {
  double tensors = memory_ratio("%s" U8("%x", "[0]", "[0,0]"), "}", 50000);
  double pairs = memory_ratio("%s\"%x\":\"\"", "}}", 50000);
  double axes = memory_ratio("%s" U8("%x", "[0,0,0,0,0,0,0,0,0,0,0,0,0,0]", "[0,0]"),
                             "}", 50000);
  CHECK(tensors > 1 && tensors < 4);
  CHECK(pairs > 1 && pairs < 4);
  CHECK(axes > 1 && axes < 4);
}

TEST(other_files_are_recognised) {
  static const struct {
    const char *bytes;
    size_t n;
    const char *text;
  } known[] = {
    {"version https://git-lfs.github.com/spec/v1\noid sha256:0", 54, "run git lfs pull"},
    {"PK\3\4\0\0\10\10\0\0\0\0\0\0", 14, "zip or PyTorch pickle"},
    {"\200\2\212\12l\374\234F\371 j\250P\31.", 14, "PyTorch pickle"},
    {"<!DOCTYPE html><html>", 21, "HTML page"},
    {"<html><head>", 12, "HTML page"},
    {"<h", 2, "HTML page"},
    {"GGUF\3\0\0\0\1\0\0\0", 12, "GGUF"},
    {"\037\213\10\0\377\377\377\377\0\3", 10, "gzip"},
    {"\223NUMPY\1\0v\0{'descr'", 18, "NumPy"},
    {"{\"metadata\":{\"total_size\":1}}", 28, "index of a sharded set"},
  };
  blob b;
  size_t i;
  for (i = 0; i < sizeof known / sizeof known[0]; i++) {
    b = blob_raw(known[i].bytes, known[i].n);
    check_refused(b, EXF_FORMAT, known[i].text);
    b = blob_raw(known[i].bytes, known[i].n);
    check_refused(b, EXF_FORMAT, "rule V1: this looks like ");
  }
  /* gzip without a time stamp claims a header of 559,903 bytes: a large file has that */
  b = blob_new(600000);
  memcpy(b.data, "\037\213\10\0\0\0\0\0\0\3", 10);
  b.data[20] = 0xff;
  check_refused(b, EXF_FORMAT, "this looks like gzip data");
}

TEST(hostile_names_do_not_reach_the_terminal) {
  char header[4200], name[2001];
  memset(name, 'x', 2000);
  name[2000] = '\0';
  memcpy(name, "\x1b[2J\xc2\x9b'\xe2\x80\xae", 10);
  name[0] = 'y'; /* an escape character cannot stand in JSON as it is */
  snprintf(header, sizeof header, "{" U8("\\u001b%s", "[2]", "[0,1]") "}", name);
  check_json(header, 1, EXF_FORMAT, "rule V14: tensor '\\x1by[2J\\xc2\\x9b\\x27\\xe2");
  check_json(header, 1, EXF_FORMAT, "need 2 bytes, data_offsets span 1");
  snprintf(header, sizeof header, "{\"a\":{\"dtype\":\"%s\"}}", name);
  check_json(header, 1, EXF_FORMAT, "rule V11");
  snprintf(header, sizeof header, "{\"__metadata__\":{\"%s\":\"\",\"%s\":\"\"}}", name,
           name);
  check_json(header, 1, EXF_FORMAT, "is there twice");
}

/* Cut files and changed bytes: refused or read, never a crash; a sanitizer sees more. */
TEST(damaged_files_are_survived) {
  static const exf_pair meta = {"format", "pt"};
  exf_st_item items[2];
  unsigned char *data;
  size_t n, i, bit, refused = 0;
  items[0].name = "w\"\xc3\xa9";
  items[0].shape = exf_shape2(2, 2);
  items[1].name = "b";
  items[1].shape = exf_shape1(3);
  items[0].data = items[1].data = some_data;
  CHECK(exf_st_save_memory(ctx, items, 2, &meta, 1, &data, &n) == EXF_OK);
  for (i = 0; i < n; i++) {
    blob b = blob_raw(data, i);
    CHECK(exf_st_open_memory(ctx, b.data, b.n, NULL) == NULL);
    CHECK(exf_ctx_status(ctx) == EXF_FORMAT);
    exf_error_clear(ctx);
    free(b.data);
  }
  for (i = 0; i < n; i++)
    for (bit = 0; bit < 8; bit++) {
      blob b = blob_raw(data, n);
      exf_st *st;
      b.data[i] = (unsigned char)(b.data[i] ^ 1u << bit);
      st = exf_st_open_memory(ctx, b.data, b.n, NULL);
      if (st == NULL) refused++;
      exf_st_close(st);
      exf_error_clear(ctx);
      free(b.data);
    }
  CHECK(refused > n && refused < 8 * n);
  exf_st_free_memory(ctx, data);
}

/* ---- entries and numbers ---- */

TEST(entries_are_sorted_and_found) {
  exf_st *st = open_json("{" U8("b", "[2]", "[0,2]") "," U8("", "[1]", "[2,3]") ","
                         U8("\\u00e9", "[1]", "[3,4]") "," U8("B", "[1,3]", "[4,7]") ","
                         U8("ba", "[0]", "[7,7]") "}", 7, NULL);
  static const char *const names[] = {"", "B", "b", "ba", "\xc3\xa9"};
  const exf_st_entry *e;
  size_t i;
  if (!CHECK(st != NULL)) return;
  CHECK(exf_st_count(st) == 5);
  for (i = 0; i < 5; i++) {
    e = exf_st_get(st, i);
    CHECK(e != NULL && strcmp(e->name, names[i]) == 0);
    CHECK(exf_st_find(st, names[i]) == e);
  }
  e = exf_st_find(st, "B");
  CHECK_STR(e->dtype, "U8");
  CHECK(e->n_dims == 2 && e->dim[0] == 1 && e->dim[1] == 3 && e->bytes == 3);
  CHECK(e->data[0] == 4 && e->data[2] == 6);
  CHECK(exf_st_find(st, "a") == NULL && exf_st_find(st, "bb") == NULL);
  CHECK(exf_st_find(st, NULL) == NULL && exf_st_get(st, 5) == NULL);
  CHECK(exf_st_count(NULL) == 0 && exf_st_get(NULL, 0) == NULL);
  CHECK(exf_st_find(NULL, "a") == NULL && exf_st_meta(NULL, "a") == NULL);
  CHECK(exf_st_meta(st, "format") == NULL);
  exf_st_close(st);
  exf_st_close(NULL);
}

TEST(many_tensors_in_hostile_order_are_sorted) {
  enum { N = 3000 };
  size_t used = 1, i, missing = 0;
  blob b = blob_new(N * 100 + N);
  exf_st *st;
  b.data[8] = '{';
  for (i = 0; i < N; i++) {
    unsigned k = (unsigned)(i * 1237 % N), at = (unsigned)(k * 7 % N);
    used += (size_t)snprintf((char *)b.data + 8 + used, 90,
                             "%s" U8("t%u", "[1]", "[%u,%u]"), i ? "," : "", k, at,
                             at + 1);
  }
  b.data[8 + used++] = '}';
  for (i = 0; i < 8; i++) b.data[i] = (unsigned char)((uint64_t)used >> 8 * i & 255);
  for (i = 0; i < N; i++) b.data[8 + used + i] = (unsigned char)(i % 251);
  /* k -> 7 k mod 3000 meets every offset once */
  st = exf_st_open_memory(ctx, b.data, 8 + used + N, NULL);
  if (!CHECK(st != NULL)) printf("  %s\n", exf_error(ctx));
  CHECK(exf_st_count(st) == N);
  for (i = 0; i < N; i++) {
    char name[16];
    const exf_st_entry *e;
    snprintf(name, sizeof name, "t%u", (unsigned)i);
    e = exf_st_find(st, name);
    if (e == NULL || e->data[0] != i * 7 % N % 251) missing++;
    e = exf_st_get(st, i);
    if (i > 0 && strcmp(exf_st_get(st, i - 1)->name, e->name) >= 0) missing++;
  }
  CHECK(missing == 0);
  exf_error_clear(ctx);
  exf_st_close(st);
  free(b.data);
}

/* A file with one byte, then n bytes of tensor "x" of that dtype: nothing is aligned. */
static exf_st *open_numbers(const char *dtype, size_t count, const unsigned char *bytes,
                            size_t n) {
  char header[200];
  size_t length = (size_t)snprintf(
      header, sizeof header,
      "{" U8("a", "[1]", "[0,1]") ",\"x\":{\"dtype\":\"%s\",\"shape\":[%u],"
      "\"data_offsets\":[1,%u]}}", dtype, (unsigned)count, (unsigned)n + 1);
  blob b = blob_file(header, length, n + 1);
  exf_st *st;
  memcpy(b.data + b.n - n, bytes, n);
  st = exf_st_open_memory(ctx, b.data, b.n, NULL);
  free(b.data);
  CHECK_OK(ctx);
  return st;
}

TEST(f32_and_f64_are_read_unaligned) {
  static const unsigned char f32[12] = {0, 0, 0x80, 0x3f, 0, 0, 0x28, 0xc1, 1, 0, 0, 0};
  static const unsigned char f64[24] = {0, 0, 0, 0, 0, 0, 0xf0, 0x3f,  /* 1 */
                                        0, 0, 0, 0, 0, 0, 0x25, 0xc0,  /* -10.5 */
                                        0, 0, 0, 0, 0, 0, 0xf0, 0x7f}; /* inf */
  exf_real x[3];
  exf_st *st = open_numbers("F32", 3, f32, sizeof f32);
  CHECK(exf_st_read(ctx, exf_st_find(st, "x"), x, 3) == EXF_OK);
  CHECK(x[0] == 1 && x[1] == EXF__R(-10.5) && x[2] == EXF__R(ldexp(1, -149)));
  exf_st_close(st);
  st = open_numbers("F64", 3, f64, sizeof f64);
  CHECK(exf_st_read(ctx, exf_st_find(st, "x"), x, 3) == EXF_OK);
  CHECK(x[0] == 1 && x[1] == EXF__R(-10.5) && isinf(x[2]) && x[2] > 0);
  exf_st_close(st);
}

/* Every one of the 65536 half floats, against its definition. */
TEST(f16_and_bf16_are_read_exactly) {
  unsigned char *bytes = (unsigned char *)malloc(131072);
  exf_real *x = (exf_real *)malloc(65536 * sizeof(exf_real));
  unsigned i;
  int wrong = 0;
  exf_st *st;
  if (bytes == NULL || x == NULL) exit(2);
  for (i = 0; i < 65536; i++) {
    bytes[2 * i] = (unsigned char)(i & 255);
    bytes[2 * i + 1] = (unsigned char)(i >> 8);
  }
  st = open_numbers("F16", 65536, bytes, 131072);
  CHECK(exf_st_read(ctx, exf_st_find(st, "x"), x, 65536) == EXF_OK);
  for (i = 0; i < 65536; i++) {
    int e = (int)(i >> 10 & 31), f = (int)(i & 1023);
    double v = e == 0 ? ldexp(f, -24) : ldexp(1024 + f, e - 25);
    if (i >> 15) v = -v;
    if (e == 31 && f != 0) wrong += !isnan(x[i]);
    else if (e == 31) wrong += !isinf(x[i]) || (x[i] < 0) != (i >> 15 == 1);
    else wrong += (double)x[i] != v || !signbit(x[i]) != !(i >> 15);
  }
  CHECK(wrong == 0);
  exf_st_close(st);
  st = open_numbers("BF16", 65536, bytes, 131072);
  CHECK(exf_st_read(ctx, exf_st_find(st, "x"), x, 65536) == EXF_OK);
  for (i = 0; i < 65536; i++) {
    int e = (int)(i >> 7 & 255), f = (int)(i & 127);
    double v = e == 0 ? ldexp(f, -133) : ldexp(128 + f, e - 134);
    if (i >> 15) v = -v;
    if (e == 255 && f != 0) wrong += !isnan(x[i]);
    else if (e == 255) wrong += !isinf(x[i]) || (x[i] < 0) != (i >> 15 == 1);
    else wrong += (double)x[i] != v;
  }
  CHECK(wrong == 0);
  exf_st_close(st);
  free(bytes);
  free(x);
}

TEST(reading_checks_its_arguments) {
  exf_st *st = open_json("{" F32("f", "[2]", "[0,8]") ",\"i\":{\"dtype\":\"I64\","
                         "\"shape\":[1],\"data_offsets\":[8,16]},"
                         F32("z", "[0]", "[16,16]") "}", 16, NULL);
  exf_real x[4] = {0, 0, 0, 0};
  CHECK(exf_st_read(ctx, exf_st_find(st, "i"), x, 1) == EXF_MISMATCH);
  CHECK_ERR(ctx, EXF_MISMATCH, "tensor 'i' is I64");
  CHECK(exf_st_read(ctx, exf_st_find(st, "f"), x, 3) == EXF_SHAPE);
  CHECK_ERR(ctx, EXF_SHAPE, "tensor 'f' has 2 elements, asked for 3");
  CHECK(exf_st_read(ctx, exf_st_find(st, "none"), x, 3) == EXF_ARG);
  CHECK_ERR(ctx, EXF_ARG, "NULL");
  CHECK(exf_st_read(ctx, exf_st_find(st, "f"), NULL, 2) == EXF_ARG);
  CHECK_ERR(ctx, EXF_ARG, "NULL");
  CHECK(exf_st_read(ctx, exf_st_find(st, "z"), NULL, 0) == EXF_OK);
  exf_st_close(st);
  CHECK(exf_st_open_memory(ctx, NULL, 4, NULL) == NULL);
  CHECK_ERR(ctx, EXF_ARG, "NULL");
  CHECK(exf_st_open_memory(ctx, NULL, 0, NULL) == NULL);
  CHECK_ERR(ctx, EXF_FORMAT, "rule V1");
  CHECK(exf_st_open(ctx, NULL, NULL) == NULL);
  CHECK_ERR(ctx, EXF_ARG, "path");
  CHECK(exf_st_open(ctx, "", NULL) == NULL);
  CHECK_ERR(ctx, EXF_ARG, "path");
}

/* ---- writer ---- */

/* The tensors of tests/golden/make_safetensors.py, in its order. */
enum { N_GOLDEN = 9 };
static const exf_pair golden_meta = {"format", "pt \"\xc3\xa9\"\n"};

static void golden_items(exf_st_item *items, exf_real *numbers) {
  static const struct {
    const char *name;
    int n;
    size_t dim[3];
  } known[N_GOLDEN] = {
    {"h.0.mlp.c_fc.weight", 2, {6, 4, 0}}, {"h.10.bias", 1, {3, 0, 0}},
    {"h.2.bias", 1, {5, 0, 0}}, {"scalar", 0, {0, 0, 0}}, {"empty", 2, {0, 4, 0}},
    {"", 1, {1, 0, 0}}, {"Z", 3, {2, 1, 2}},
    {"quote\" slash\\ / tab\t line\n \b\f\r \x01\x1f \x7f", 1, {2, 0, 0}},
    {"na\xc3\xafve \xe6\x97\xa5\xe6\x9c\xac \xf0\x9f\x98\x80", 2, {1, 2, 0}},
  };
  size_t at = 0, n, i;
  int d;
  for (i = 0; i < N_GOLDEN; i++) {
    items[i].name = known[i].name;
    items[i].shape = exf_shape0();
    items[i].shape.n = known[i].n;
    items[i].data = numbers + at;
    for (n = 1, d = 0; d < known[i].n; d++) {
      items[i].shape.dim[d] = known[i].dim[d];
      n *= known[i].dim[d];
    }
    for (; n > 0; n--, at++) numbers[at] = ((exf_real)at - 20) / 16;
  }
}

/* The file beside this source file. */
static blob golden_file(void) {
  static const char name[] = "golden/reference.safetensors";
  char path[1024] = __FILE__;
  char *slash = strrchr(path, '/');
  size_t at = slash != NULL ? (size_t)(slash - path) + 1 : 0;
  blob b = blob_new(4096);
  FILE *file;
  memcpy(path + at, name, sizeof name);
  file = fopen(path, "rb");
  b.n = file != NULL ? fread(b.data, 1, b.n, file) : 0;
  if (file != NULL) fclose(file);
  return b;
}

TEST(files_are_those_of_the_reference_byte_by_byte) {
  exf_st_item items[N_GOLDEN];
  exf_real numbers[64], back[64];
  blob b = golden_file();
  exf_st *st = exf_st_open_memory(ctx, b.data, b.n, NULL);
  unsigned char *data;
  size_t n, i;
  golden_items(items, numbers);
  CHECK(b.n > 100);
  CHECK_OK(ctx);
  CHECK(exf_st_count(st) == N_GOLDEN);
  CHECK_STR(exf_st_meta(st, "format"), golden_meta.value);
  for (i = 0; i < N_GOLDEN; i++) {
    const exf_st_entry *e = exf_st_find(st, items[i].name);
    if (!CHECK(e != NULL)) continue;
    n = e->bytes / 4;
    CHECK(e->n_dims == items[i].shape.n);
    CHECK(exf_st_read(ctx, e, back, n) == EXF_OK);
    CHECK(n == 0 || memcmp(back, items[i].data, n * sizeof(exf_real)) == 0);
  }
  exf_st_close(st);
  CHECK(exf_st_save_memory(ctx, items, N_GOLDEN, &golden_meta, 1, &data, &n) == EXF_OK);
  if (sizeof(exf_real) == 4) CHECK(n == b.n && memcmp(data, b.data, n) == 0);
  exf_st_free_memory(ctx, data);
  free(b.data);
}

TEST(writing_reading_and_writing_again_gives_the_same_bytes) {
  static const exf_pair meta[3] = {{"z", "1"}, {"format", "pt"}, {"a\n", "\xc3\xa9\""}};
  exf_st_item items[N_GOLDEN], again[N_GOLDEN];
  exf_pair back[3];
  exf_real numbers[64], copies[N_GOLDEN][32];
  unsigned char *one, *two;
  size_t n_one, n_two, i, d;
  exf_st *st;
  golden_items(items, numbers);
  CHECK(exf_st_save_memory(ctx, items, N_GOLDEN, meta, 3, &one, &n_one) == EXF_OK);
  CHECK(n_one > 8 && one[0] % 8 == 0);
  st = exf_st_open_memory(ctx, one, n_one, NULL);
  if (!CHECK(st != NULL)) return;
  for (i = 0; i < N_GOLDEN; i++) {
    const exf_st_entry *e = exf_st_get(st, i);
    again[i].name = e->name;
    again[i].shape = exf_shape0();
    again[i].shape.n = e->n_dims;
    for (d = 0; d < (size_t)e->n_dims; d++) again[i].shape.dim[d] = e->dim[d];
    again[i].data = copies[i];
    CHECK(exf_st_read(ctx, e, copies[i], e->bytes / sizeof(exf_real)) == EXF_OK);
  }
  for (i = 0; i < 3; i++) {
    back[i].key = meta[2 - i].key;
    back[i].value = exf_st_meta(st, back[i].key);
    CHECK_STR(back[i].value, meta[2 - i].value);
  }
  CHECK(exf_st_save_memory(ctx, again, N_GOLDEN, back, 3, &two, &n_two) == EXF_OK);
  CHECK(n_one == n_two && memcmp(one, two, n_one) == 0);
  exf_st_close(st);
  exf_st_free_memory(ctx, one);
  exf_st_free_memory(ctx, two);
}

TEST(empty_files_are_written_as_the_reference_does) {
  unsigned char *data;
  size_t n;
  CHECK(exf_st_save_memory(ctx, NULL, 0, NULL, 0, &data, &n) == EXF_OK);
  CHECK(n == 16 && memcmp(data, "\10\0\0\0\0\0\0\0{}      ", 16) == 0);
  exf_st_free_memory(ctx, data);
  CHECK(exf_st_save_memory(ctx, NULL, 0, &golden_meta, 1, &data, &n) == EXF_OK);
  CHECK(n > 16 && n % 8 == 0);
  exf_st_free_memory(ctx, data);
}

/* In memory and to a file alike: refused, nothing allocated stays, no file is begun. */
static void check_unwritten(const exf_st_item *items, size_t n, const exf_pair *meta,
                            size_t n_meta, exf_status status, const char *text) {
  fs f;
  exf_ctx *c = fs_ctx(&f);
  size_t held = exf_ctx_stats(c).bytes, bytes = 5;
  unsigned char *data = (unsigned char *)&f;
  CHECK(exf_st_save_memory(c, items, n, meta, n_meta, &data, &bytes) == status);
  CHECK(data == NULL && bytes == 0);
  CHECK_ERR(c, status, text);
  CHECK(exf_st_save(c, "f", items, n, meta, n_meta) == status);
  CHECK_ERR(c, status, text);
  CHECK(f.calls == 0);
  CHECK(exf_ctx_stats(c).bytes == held);
  fs_free(&f);
  exf_ctx_free(c);
}

TEST(the_writer_refuses_what_a_reader_would) {
  exf_st_item items[3];
  exf_pair meta[3] = {{"a", "1"}, {"b", "2"}, {"c", "3"}};
  const size_t big = 100000001;
  char *text = (char *)malloc(big);
  int i;
  if (text == NULL) exit(2);
  for (i = 0; i < 3; i++) {
    items[i].name = i == 0 ? "x" : i == 1 ? "y" : "x";
    items[i].shape = exf_shape1(2);
    items[i].data = some_data;
  }
  check_unwritten(items, 3, NULL, 0, EXF_ARG, "rule V6: tensor 'x'");
  items[2].name = "__metadata__";
  check_unwritten(items, 3, NULL, 0, EXF_ARG, "rule V7: tensor '__metadata__'");
  for (i = 0; i < N_BAD_UTF8; i++) {
    items[2].name = bad_utf8[i];
    check_unwritten(items, 3, NULL, 0, EXF_ARG, "rule V3");
    meta[1].value = bad_utf8[i];
    check_unwritten(items, 2, meta, 3, EXF_ARG, "rule V3: metadata key 'b'");
    meta[1].value = "2";
    meta[1].key = bad_utf8[i];
    check_unwritten(items, 2, meta, 3, EXF_ARG, "rule V3");
    meta[1].key = "b";
  }
  items[2].name = NULL;
  check_unwritten(items, 3, NULL, 0, EXF_ARG, "NULL");
  items[1].data = NULL;
  check_unwritten(items, 2, NULL, 0, EXF_ARG, "tensor 'y' has no data");
  items[1].data = some_data;
  items[1].shape.n = EXF_MAX_DIMS + 1;
  check_unwritten(items, 2, NULL, 0, EXF_SHAPE, "tensor 'y' has too many axes");
  items[1].shape = exf_shape2(SIZE_MAX / 2, 4);
  check_unwritten(items, 2, NULL, 0, EXF_SIZE, "rule V13: tensor 'y'");
  items[1].shape = exf_shape3(SIZE_MAX / 2, 0, 4);
  check_unwritten(items, 2, NULL, 0, EXF_SIZE, "rule V13: tensor 'y'");
  check_unwritten(NULL, 2, NULL, 0, EXF_ARG, "NULL");
  check_unwritten(items, 1, NULL, 1, EXF_ARG, "NULL");
  check_unwritten(items, 1000001, NULL, 0, EXF_LIMIT, "rule V18");
  meta[2].key = "a";
  check_unwritten(items, 1, meta, 3, EXF_ARG, "rule V6: metadata key 'a'");
  meta[2].key = NULL;
  check_unwritten(items, 1, meta, 3, EXF_ARG, "NULL");
  memset(text, 'x', big - 1);
  text[big - 1] = '\0';
  meta[2].key = "c";
  meta[2].value = text;
  check_unwritten(items, 1, meta, 3, EXF_LIMIT, "rule V1");
  text[4097] = '\0';
  items[0].name = text;
  check_unwritten(items, 1, NULL, 0, EXF_LIMIT, "rule V18");
  free(text);
}

/* ---- faults ---- */

static const char old_text[] = "what was there";

static exf_status save_something(exf_ctx *c, int which) {
  exf_st_item items[N_GOLDEN];
  exf_real numbers[64];
  golden_items(items, numbers);
  if (which == 0) return exf_st_save(c, "f", items, N_GOLDEN, &golden_meta, 1);
  return exf_file_save(c, "f", "a log\n", 6);
}

/* The call of every number fails once, until saving gets through. */
static void fault_sweep(int which, size_t piece) {
  int fail_at, seen[FS_CALLS] = {0};
  exf_status status = EXF_IO;
  for (fail_at = 1; status != EXF_OK && fail_at < 5000; fail_at++) {
    fs f;
    exf_ctx *c = fs_ctx(&f);
    size_t held = exf_ctx_stats(c).bytes;
    const fs_file *file;
    fs_put(&f, "f", old_text, sizeof old_text);
    f.fail_at = fail_at;
    f.piece = piece;
    status = save_something(c, which);
    file = fs_find(&f, "f");
    CHECK(f.n_open == 0 && f.n_bad == 0);
    CHECK(fs_find(&f, "f.tmp") == NULL);
    CHECK(exf_ctx_stats(c).bytes == held);
    if (CHECK(file != NULL) && status != EXF_OK && f.failed != FS_SYNC_DIR)
      CHECK(file->n == sizeof old_text && memcmp(file->data, old_text, file->n) == 0);
    else if (file != NULL)
      CHECK(file->n != sizeof old_text);
    if (status != EXF_OK) {
      CHECK(f.failed >= 0);
      seen[f.failed]++;
      CHECK_HAS(exf_error(c), strerror(ENOSPC));
      CHECK_ERR(c, EXF_IO, "f: cannot ");
    } else {
      CHECK(f.failed == -1);
      CHECK_OK(c);
    }
    fs_free(&f);
    exf_ctx_free(c);
  }
  CHECK(status == EXF_OK);
  CHECK(seen[FS_OPEN] == 1 && seen[FS_WRITE] >= 1 && seen[FS_SYNC] == 1);
  CHECK(seen[FS_CLOSE] == 1 && seen[FS_RENAME] == 1 && seen[FS_SYNC_DIR] == 1);
}

TEST(a_failed_save_leaves_the_old_file) {
  fault_sweep(0, 0);
  fault_sweep(1, 0);
  fault_sweep(0, 7);
  fault_sweep(1, 1);
}

/* Short writes and reads give the same file; odd counts are errors, not loops. */
TEST(short_writes_and_reads_are_carried_on) {
  exf_st_item items[N_GOLDEN];
  exf_real numbers[64];
  unsigned char *data;
  size_t n, piece;
  golden_items(items, numbers);
  CHECK(exf_st_save_memory(ctx, items, N_GOLDEN, &golden_meta, 1, &data, &n) == EXF_OK);
  for (piece = 1; piece < 40; piece += 6) {
    fs f;
    exf_ctx *c = fs_ctx(&f);
    exf_st *st;
    const fs_file *file;
    f.piece = piece;
    CHECK(save_something(c, 0) == EXF_OK);
    file = fs_find(&f, "f");
    CHECK(file != NULL && file->n == n && memcmp(file->data, data, n) == 0);
    st = exf_st_open(c, "f", NULL);
    CHECK_OK(c);
    CHECK(exf_st_count(st) == N_GOLDEN);
    exf_st_close(st);
    CHECK(f.n_open == 0);
    f.lie_in = FS_WRITE;
    f.lie = piece % 12 == 1 ? -1 : 1;
    CHECK(save_something(c, 0) == EXF_IO);
    CHECK_ERR(c, EXF_IO, "f: cannot write");
    CHECK(fs_find(&f, "f.tmp") == NULL && f.n_open == 0);
    file = fs_find(&f, "f");
    CHECK(file != NULL && file->n == n);
    f.lie_in = FS_READ;
    f.lie = 1;
    CHECK(exf_st_open(c, "f", NULL) == NULL);
    CHECK_ERR(c, EXF_IO, "f: cannot read: no cause given");
    fs_free(&f);
    exf_ctx_free(c);
  }
  exf_st_free_memory(ctx, data);
}

TEST(v21_a_read_that_fails_is_an_error) {
  exf_st *st = NULL;
  int fail_at, seen[FS_CALLS] = {0};
  int64_t lie;
  fs f;
  exf_ctx *c = fs_ctx(&f);
  size_t held;
  CHECK(save_something(c, 0) == EXF_OK);
  held = exf_ctx_stats(c).bytes;
  for (fail_at = 1; st == NULL && fail_at < 100; fail_at++) {
    f.calls = 0;
    f.fail_at = fail_at;
    f.failed = -1;
    f.piece = 100;
    st = exf_st_open(c, "f", NULL);
    CHECK(f.n_open == 0);
    if (st != NULL) break;
    CHECK(f.failed >= 0);
    if (f.failed >= 0) seen[f.failed]++;
    CHECK(exf_ctx_stats(c).bytes == held);
    CHECK_HAS(exf_error(c), strerror(ENOSPC));
    CHECK_ERR(c, EXF_IO, "f: cannot ");
  }
  CHECK(st != NULL && seen[FS_OPEN] == 1 && seen[FS_SIZE] == 1 && seen[FS_READ] > 5);
  exf_st_close(st);
  f.fail_at = 0;
  /* a file that shrinks after its size was asked */
  for (lie = 1; lie < 900; lie += 50) {
    fs_file *file = fs_find(&f, "f");
    size_t n = file->n;
    f.fake_size = (int64_t)n;
    file->n = (size_t)(lie > (int64_t)n ? 0 : (int64_t)n - lie);
    CHECK(exf_st_open(c, "f", NULL) == NULL);
    CHECK_ERR(c, EXF_IO, "f: file changed while reading");
    file->n = n;
  }
  CHECK(exf_ctx_stats(c).bytes == held);
  fs_free(&f);
  exf_ctx_free(c);
}

TEST(missing_hooks_are_named) {
  fs f;
  exf_desc desc;
  exf_files hooks = fs_hooks(&f);
  exf_ctx *c;
  memset(&desc, 0, sizeof desc);
  desc.n_threads = 1;
  desc.files = &hooks;
  hooks.size = NULL;
  hooks.sync_dir = NULL;
  c = exf_ctx_new(&desc);
  CHECK(exf_st_open(c, "f", NULL) == NULL);
  CHECK_ERR(c, EXF_ARG, "exf_desc.files");
  CHECK(exf_file_save(c, "f", "x", 1) == EXF_ARG);
  CHECK_ERR(c, EXF_ARG, "exf_desc.files");
  exf_ctx_free(c);
  hooks.open = NULL;
  c = exf_ctx_new(&desc);
  CHECK(exf_st_open(c, "f", NULL) == NULL);
  CHECK_ERR(c, EXF_IO, "f: built with EXF_NO_STDIO: give exf_desc.files");
  exf_ctx_free(c);
}

/* An allocator that refuses its n-th block. */
typedef struct stingy {
  int calls, fail_at, held;
} stingy;

static void *stingy_alloc(void *user, size_t bytes) {
  stingy *s = (stingy *)user;
  void *block;
  if (++s->calls == s->fail_at) return NULL;
  block = malloc(bytes);
  if (block != NULL) s->held++;
  return block;
}

static void stingy_free(void *user, void *block) {
  if (block != NULL) ((stingy *)user)->held--;
  free(block);
}

TEST(memory_that_runs_out_is_an_error) {
  static const char header[] = "{\"__metadata__\":{\"k\":\"v\"},"
                               F32("a", "[2]", "[0,8]") "}";
  blob b = blob_file(header, sizeof header - 1, 8);
  stingy s = {0, 0, 0};
  fs f;
  exf_files hooks = fs_hooks(&f);
  exf_desc desc;
  exf_ctx *c;
  int begun, held, k, which, refused = 0;
  memset(&desc, 0, sizeof desc);
  desc.n_threads = 1;
  desc.alloc = stingy_alloc;
  desc.free = stingy_free;
  desc.alloc_user = &s;
  desc.files = &hooks;
  c = exf_ctx_new(&desc);
  held = s.held;
  for (which = 0; which < 4; which++)
    for (k = 1; k < 30; k++) {
      exf_st *st = NULL;
      unsigned char *data = NULL;
      size_t n;
      int done;
      begun = s.calls;
      s.fail_at = begun + k;
      if (which == 0) {
        done = (st = exf_st_open_memory(c, b.data, b.n, NULL)) != NULL;
      } else if (which < 3) {
        done = save_something(c, which - 1) == EXF_OK;
      } else {
        exf_st_item item;
        item.name = "a";
        item.shape = exf_shape1(8);
        item.data = some_data;
        done = exf_st_save_memory(c, &item, 1, NULL, 0, &data, &n) == EXF_OK;
      }
      exf_st_close(st);
      exf_st_free_memory(c, data);
      CHECK(s.held == held);
      CHECK(f.n_open == 0 && fs_find(&f, "f.tmp") == NULL);
      if (done) break;
      refused++;
      CHECK_ERR(c, EXF_MEMORY, "");
    }
  CHECK(refused >= 8);
  s.fail_at = 0;
  exf_ctx_free(c);
  CHECK(s.held == 0);
  fs_free(&f);
  free(b.data);
}

/* ---- the operating system's files ---- */

static int exists(const char *path) {
  FILE *file = fopen(path, "rb");
  if (file != NULL) fclose(file);
  return file != NULL;
}

TEST(files_of_the_operating_system) {
  const char *path = "build/tmp/safetensors.out", *temp = "build/tmp/safetensors.out.tmp";
  exf_st_item items[N_GOLDEN];
  exf_real numbers[64];
  exf_st *st;
  if (exf_file_save(ctx, path, "x", 1) != EXF_OK) {
    CHECK_ERR(ctx, EXF_IO, "build/tmp/safetensors.out: cannot create");
    path = "safetensors.out";
    temp = "safetensors.out.tmp";
    CHECK(exf_file_save(ctx, path, "x", 1) == EXF_OK);
  }
  golden_items(items, numbers);
  CHECK(exists(path) && !exists(temp));
  CHECK(exf_st_open(ctx, path, NULL) == NULL);
  CHECK_ERR(ctx, EXF_FORMAT, "rule V1: 1 bytes, at least 8 are needed");
  CHECK(exf_st_save(ctx, path, items, N_GOLDEN, &golden_meta, 1) == EXF_OK);
  CHECK(!exists(temp));
  st = exf_st_open(ctx, path, NULL);
  CHECK_OK(ctx);
  CHECK(exf_st_count(st) == N_GOLDEN);
  exf_st_close(st);
  CHECK(exf_file_save(ctx, path, NULL, 0) == EXF_OK);
  CHECK(exf_st_open(ctx, path, NULL) == NULL);
  CHECK_ERR(ctx, EXF_FORMAT, "rule V1: 0 bytes");
  CHECK(exf_file_save(ctx, path, NULL, 1) == EXF_ARG);
  CHECK_ERR(ctx, EXF_ARG, "NULL");
  CHECK(ctx->files.remove(NULL, path) == 0 && !exists(path));
  CHECK(ctx->files.remove(NULL, path) == -1);
  CHECK(exf_st_open(ctx, path, NULL) == NULL);
  CHECK_ERR(ctx, EXF_IO, strerror(ENOENT));
  CHECK(exf_file_save(ctx, "no/such/folder/f", "x", 1) == EXF_IO);
  CHECK_ERR(ctx, EXF_IO, "no/such/folder/f: cannot create its temporary file");
  CHECK(exf_st_open(ctx, ".", NULL) == NULL);
  CHECK_ERR(ctx, EXF_IO, ".: cannot ");
  CHECK(exf_file_save(ctx, ".", "x", 1) == EXF_IO);    /* a folder is not replaced */
  CHECK_ERR(ctx, EXF_IO, ".: cannot be replaced by its temporary file");
  CHECK(!exists("..tmp"));
}

TEST(long_paths_are_shortened_in_messages) {
  static char path[5000];
  memset(path, 'x', sizeof path - 1);
  memcpy(path + sizeof path - 6, "/last", 5);
  CHECK(exf_st_open(ctx, path, NULL) == NULL);
  CHECK(strlen(exf_error(ctx)) < 200);
  CHECK(memcmp(exf_error(ctx), "...xxx", 6) == 0);
  CHECK_ERR(ctx, EXF_IO, "xxx/last: cannot open: ");
#ifndef _WIN32
  CHECK(ctx->files.sync_dir(NULL, path) == -1 && errno == ENAMETOOLONG);
  CHECK(ctx->files.sync_dir(NULL, "/file") == 0);
  CHECK(ctx->files.sync_dir(NULL, "file") == 0);
#endif
}

/* The room for axes is proved from the length of the text; were it not, this would be
   the end, and not a write past it. */
TEST(axes_never_leave_their_room) {
  exf__st_members members = {7, NULL, {2, 3}, {0, 6}};
  exf_st st;
  exf__st_tensor t;
  size_t room[2] = {77, 77};
  memset(&st, 0, sizeof st);
  memset(&t, 0, sizeof t);
  st.ctx = ctx;
  st.dim = room;
  st.dim_room = 1;
  t.entry.name = st.name = "a";
  t.entry.n_dims = 2;
  members.type = exf__st_type_of("U8");
  exf__st_extent(&st, &t, &members);
  CHECK(st.broken);
  CHECK_ERR(ctx, EXF_LIMIT, "rule V18: tensor 'a': too many axes in all");
  CHECK(room[0] == 2 && room[1] == 77);
}

/* ---- models ---- */

/* A model of w (2), also called v, takes nothing but that, and nothing by half. */
TEST(models_take_only_what_fits) {
  static const char *const files[][2] = {
    {"{}", "memory: tensor 'w' is missing"},
    {"{" F32("w", "[1,2]", "[0,8]") "}", "'w' is (1,2) in the file and (2) in the model"},
    {"{" F32("w", "[3]", "[0,12]") "}", "'w' is (3) in the file"},
    {"{" U8("w", "[2]", "[0,2]") "}", "'w' is of type U8; needs F32"},
    {"{" F32("v", "[2]", "[8,16]") "," F32("w", "[2]", "[0,8]") "}",
     "'w' and 'v' are one parameter"},
    {"{" F32("v", "[1]", "[8,12]") "," F32("w", "[2]", "[0,8]") "}",
     "'w' and 'v' are one parameter"},
    {"{" F32("w", "[2]", "[0,8]") "," F32("x", "[0]", "[8,8]") "}", "holds 'x'"},
    {"{" F32("adamw.m.w", "[2]", "[8,16]") "," F32("w", "[2]", "[0,8]") "}",
     "holds 'adamw.m.w'"}};
  static const char *const numbers[] = {
    "{\"w\":{\"dtype\":\"F64\",\"shape\":[2],\"data_offsets\":[0,16]}}",
    "{\"w\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0,4]}}",
    "{\"w\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[0,4]}}"};
  exf_model *model = exf_model_new(ctx);
  exf_param_desc d;
  exf_ffn_desc f;
  exf_real x[2];
  exf_tensor *w;
  exf_st *st;
  size_t i;
  memset(&d, 0, sizeof d);
  memset(&f, 0, sizeof f);
  d.shape = exf_shape1(2);
  d.init_value = 7;
  w = exf_param_new(model, "w", &d);
  CHECK(exf_param_alias(model, "v", "w") == EXF_OK);
  for (i = 0; i < sizeof files / sizeof files[0]; i++) {
    size_t trailing;
    st = open_json(files[i][0], 16, &trailing);
    CHECK(st != NULL && exf_model_load_st(model, st) == EXF_MISMATCH);
    CHECK_ERR(ctx, EXF_MISMATCH, files[i][1]);
    CHECK(w->data[0] == 7 && w->data[1] == 7);
    exf_st_close(st);
  }
  st = open_json("{" F32("w", "[2]", "[0,8]") "}", 8, NULL);
  CHECK(exf_model_load_st(model, st) == EXF_OK);
  CHECK(exf_st_read(ctx, exf_st_find(st, "w"), x, 2) == EXF_OK);
  CHECK(memcmp(x, w->data, sizeof x) == 0 && x[0] != x[1] && x[0] != 7);
  for (i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
    size_t trailing;
    exf_st *other = open_json(numbers[i], 16, &trailing);
    w->data[0] = w->data[1] = 7;
    CHECK(exf_model_load_st(model, other) == EXF_OK);
    CHECK_OK(ctx);
    exf_error_clear(ctx);
    CHECK(w->data[0] != 7 && w->data[1] != 7);
    exf_st_close(other);
  }
  f.width = 2;
  f.fusion.variant = EXF_SW;
  CHECK(exf_ffn_new(model, "ffn", &f) != NULL);
  CHECK(exf_model_load_st(model, st) == EXF_STATE);
  CHECK_ERR(ctx, EXF_STATE, "memory: 'ffn.experts.c_fc.weight' belongs to experts: load");
  exf_st_close(st);
  exf_model_free(model);
}

TEST(checkpoints_count_their_updates) {
  static const char *const counts[] = {
    "", "x", "1x", "-1", "1 ", "18446744073709551616", "99999999999999999999", "0",
    "18446744073709551609"};
  exf_model *model = exf_model_new(ctx);
  exf_param_desc d;
  exf_optim_desc o;
  exf_optim *optim;
  exf_st *st = open_json("{" F32("w", "[2]", "[0,8]") "}", 8, NULL);
  char json[200];
  int i;
  memset(&d, 0, sizeof d);
  memset(&o, 0, sizeof o);
  d.shape = exf_shape1(2);
  o.kind = EXF_SGD;
  exf_param_new(model, "w", &d);
  optim = exf_optim_new(model, &o);
  CHECK(exf_checkpoint_load_st(model, NULL, st) == EXF_OK);
  CHECK(exf_checkpoint_load_st(model, optim, st) == EXF_MISMATCH);
  CHECK_ERR(ctx, EXF_MISMATCH, "no update count");
  exf_st_close(st);
  for (i = 0; i < 9; i++) {
    snprintf(json, sizeof json, "{\"__metadata__\":{\"exf.updates\":\"%s\"},%s}",
             counts[i], F32("w", "[2]", "[0,8]"));
    st = open_json(json, 8, NULL);
    CHECK((exf_checkpoint_load_st(model, optim, st) == EXF_OK) == (i >= 7));
    if (i < 7) CHECK_ERR(ctx, EXF_MISMATCH, "no update count (exf.updates)");
    CHECK_OK(ctx);
    CHECK(exf_optim_steps(optim) == (i < 8 ? 0 : UINT64_MAX - 6));
    exf_st_close(st);
  }
  exf_optim_free(optim);
  exf_model_free(model);
}

/* Loading by path is loading an open file, and its errors begin with the path. */
TEST(models_are_loaded_by_path) {
  fs f;
  exf_ctx *c = fs_ctx(&f);
  exf_model *model = exf_model_new(c), *other = exf_model_new(c);
  exf_param_desc d;
  exf_optim *optim;
  exf_tensor *w, *v;
  memset(&d, 0, sizeof d);
  d.shape = exf_shape1(2);
  d.init_std = 1;
  w = exf_param_new(model, "w", &d);
  optim = exf_optim_new(model, NULL);
  d.shape = exf_shape1(3);
  v = exf_param_new(other, "w", &d);
  CHECK(exf_model_save(model, "m", NULL, 0) == EXF_OK);
  CHECK(exf_checkpoint_save(model, optim, "c", NULL, 0) == EXF_OK);
  w->data[0] = w->data[1] = 7;
  CHECK(exf_model_load(model, "m") == EXF_OK);
  CHECK(w->data[0] != 7 && w->data[1] != 7 && w->data[0] != w->data[1]);
  w->data[0] = w->data[1] = 7;
  CHECK(exf_checkpoint_load(model, optim, "c") == EXF_OK);
  CHECK(w->data[0] != 7 && w->data[1] != 7 && w->data[0] != w->data[1]);
  CHECK_OK(c);
  CHECK(f.n_open == 0);
  v->data[0] = 7;
  CHECK(exf_model_load(other, "m") == EXF_MISMATCH);
  CHECK_ERR(c, EXF_MISMATCH, "m: tensor 'w' is (2) in the file and (3) in the model");
  CHECK(exf_checkpoint_load(other, NULL, "c") == EXF_MISMATCH);
  CHECK_ERR(c, EXF_MISMATCH, "c: tensor 'w' is (2) in the file and (3) in the model");
  CHECK(exf_model_load(model, "c") == EXF_MISMATCH);
  CHECK_ERR(c, EXF_MISMATCH, "c: the file holds 'adamw.m.w', which the model does not");
  CHECK(exf_checkpoint_load(model, optim, "m") == EXF_MISMATCH);
  CHECK_ERR(c, EXF_MISMATCH, "m: the file has no update count (exf.updates)");
  CHECK(v->data[0] == 7 && f.n_open == 0);
  CHECK(exf_model_load(model, "none") == EXF_IO);
  CHECK_ERR(c, EXF_IO, "none: cannot open: ");
  CHECK(exf_checkpoint_load(model, optim, "none") == EXF_IO);
  CHECK_ERR(c, EXF_IO, "none: cannot open: ");
  CHECK(exf_model_load(model, NULL) == EXF_ARG);
  CHECK_ERR(c, EXF_ARG, "a file path is NULL");
  CHECK(exf_checkpoint_load(model, optim, "") == EXF_ARG);
  CHECK_ERR(c, EXF_ARG, "a file path is NULL or empty");
  CHECK(exf_model_load(NULL, "m") == EXF_ARG);
  CHECK(exf_model_load_st(model, NULL) == EXF_ARG);
  CHECK(exf_checkpoint_load(NULL, NULL, "c") == EXF_ARG);
  CHECK(exf_checkpoint_load_st(model, optim, NULL) == EXF_ARG);
  CHECK_OK(c);
  f.calls = 0;
  exf_fail(c, EXF_NUMERIC, "first");
  CHECK(exf_model_load(model, "m") == EXF_NUMERIC);
  CHECK(exf_checkpoint_load(model, optim, "c") == EXF_NUMERIC);
  CHECK(f.calls == 0);
  exf_optim_free(optim);
  exf_model_free(model);
  exf_model_free(other);
  fs_free(&f);
  exf_ctx_free(c);
}

static void init_scaled(exf_ctx *c, exf_ffn *ffn, const exf_fusion_desc *fusion) {
  exf_param_desc d;
  (void)c;
  memset(&d, 0, sizeof d);
  d.shape = exf_shape1(fusion->n_experts);
  d.init_value = 0.25;
  exf_ffn_param(ffn, "scale", &d);
  d.buffer = 1;
  exf_ffn_param(ffn, "seen", &d);
}

static exf_tensor *forward_scaled(exf_ctx *c, const exf_ffn *ffn, exf_tensor *x,
                                  int training) {
  (void)training;
  (void)ffn;
  return exf_scale(c, x, 2);
}

/* A rule's parameters and constants stand in checkpoints, its name in the metadata. What
   cannot be merged goes into model files as it is, but for the constants. */
TEST(rules_are_kept_in_files) {
  exf_rule rule;
  exf_ffn_desc d;
  fs f;
  exf_ctx *c = fs_ctx(&f);
  int merges;
  memset(&d, 0, sizeof d);
  d.width = 2;
  d.fusion.n_experts = 4;
  for (merges = 0; merges < 2; merges++) {
    exf_model *model = exf_model_new(c);
    exf_ffn *ffn;
    exf_tensor *scale, *seen;
    exf_st *st;
    memset(&rule, 0, sizeof rule);
    rule.name = "scaled";
    rule.init = init_scaled;
    rule.forward = merges ? NULL : forward_scaled;
    d.fusion.rule = &rule;
    ffn = exf_ffn_new(model, "f", &d);
    if (merges) exf_ffn_new(model, "g", &d);
    CHECK_OK(c);
    if (!CHECK(ffn != NULL)) return;
    scale = exf_ffn_tensor(ffn, "scale");
    seen = exf_ffn_tensor(ffn, "seen");
    if (!CHECK(scale != NULL && seen != NULL)) return;
    CHECK(exf_checkpoint_save(model, NULL, "c", NULL, 0) == EXF_OK);
    CHECK(exf_model_save(model, "m", NULL, 0) == EXF_OK);
    st = exf_st_open(c, "c", NULL);
    CHECK_STR(exf_st_meta(st, "exf.fusion"), merges ? "2 x scaled 4" : "1 x scaled 4");
    CHECK(exf_st_find(st, "f.scale") != NULL && exf_st_find(st, "f.seen") != NULL);
    exf_st_close(st);
    st = exf_st_open(c, "m", NULL);
    CHECK((exf_st_find(st, "f.scale") != NULL) == !merges);
    CHECK((exf_st_find(st, "f.experts.c_fc.weight") != NULL) == !merges);
    CHECK((exf_st_find(st, "f.c_fc.weight") != NULL) == merges);
    CHECK(exf_st_find(st, "f.seen") == NULL);
    exf_st_close(st);
    scale->data[3] = seen->data[3] = 7;
    CHECK(exf_checkpoint_load(model, NULL, "c") == EXF_OK);
    CHECK(scale->data[3] == EXF__R(0.25) && seen->data[3] == EXF__R(0.25));
    scale->data[3] = seen->data[3] = 7;
    CHECK(exf_model_load(model, "m") == (merges ? EXF_STATE : EXF_OK));
    if (merges) CHECK_ERR(c, EXF_STATE, "m: 'f.experts.c_fc.weight' belongs to experts");
    CHECK(scale->data[3] == (merges ? EXF__R(7) : EXF__R(0.25)) && seen->data[3] == 7);
    rule.name = "other";
    CHECK(exf_checkpoint_load(model, NULL, "c") == EXF_MISMATCH);
    CHECK_ERR(c, EXF_MISMATCH, merges ? "c: the checkpoint's FFNs are '2 x scaled 4', the"
                                        " model's '2 x other 4'"
                                      : "the model's '1 x other 4'");
    exf_model_free(model);
    exf_rewind(c);
  }
  fs_free(&f);
  exf_ctx_free(c);
}

static int write_golden(const char *path) {
  exf_st_item items[N_GOLDEN];
  exf_real numbers[64];
  golden_items(items, numbers);
  if (exf_st_save(ctx, path, items, N_GOLDEN, &golden_meta, 1) == EXF_OK) return 0;
  printf("%s\n", exf_error(ctx));
  return 1;
}

int main(int argc, char **argv) {
  exf_desc desc;
  memset(&desc, 0, sizeof desc);
  desc.n_threads = 1;
  ctx = exf_ctx_new(&desc);
  if (ctx == NULL) return 2;
  if (argc == 3 && strcmp(argv[1], "--write") == 0) {
    int failed = write_golden(argv[2]);
    exf_ctx_free(ctx);
    return failed;
  }
  RUN(v1_the_header_fits_into_the_file);
  RUN(v2_memory_is_not_taken_on_the_word_of_a_header);
  RUN(v3_the_header_is_utf8);
  RUN(v4_the_json_is_strict);
  RUN(v5_other_structures_are_refused_without_recursion);
  RUN(v6_no_key_stands_twice);
  RUN(v7_names_end_where_c_strings_end);
  RUN(v8_metadata_values_are_strings);
  RUN(v9_a_tensor_has_exactly_its_three_members);
  RUN(v10_integers_are_plain_digits);
  RUN(v11_an_unknown_dtype_refuses_the_file);
  RUN(v12_two_offsets_in_order);
  RUN(v13_element_counts_do_not_overflow);
  RUN(v14_offsets_span_what_the_shape_needs);
  RUN(v15_neither_hole_nor_overlap);
  RUN(v16_the_file_ends_with_the_last_tensor);
  RUN(v17_scalars_empty_tensors_and_infinities_are_legal);
  RUN(v18_limits_have_their_own_status);
  RUN(memory_is_bounded_by_the_size_of_the_file);
  RUN(other_files_are_recognised);
  RUN(hostile_names_do_not_reach_the_terminal);
  RUN(damaged_files_are_survived);
  RUN(entries_are_sorted_and_found);
  RUN(many_tensors_in_hostile_order_are_sorted);
  RUN(f32_and_f64_are_read_unaligned);
  RUN(f16_and_bf16_are_read_exactly);
  RUN(reading_checks_its_arguments);
  RUN(files_are_those_of_the_reference_byte_by_byte);
  RUN(writing_reading_and_writing_again_gives_the_same_bytes);
  RUN(empty_files_are_written_as_the_reference_does);
  RUN(the_writer_refuses_what_a_reader_would);
  RUN(a_failed_save_leaves_the_old_file);
  RUN(short_writes_and_reads_are_carried_on);
  RUN(v21_a_read_that_fails_is_an_error);
  RUN(missing_hooks_are_named);
  RUN(memory_that_runs_out_is_an_error);
  RUN(files_of_the_operating_system);
  RUN(long_paths_are_shortened_in_messages);
  RUN(axes_never_leave_their_room);
  RUN(models_take_only_what_fits);
  RUN(checkpoints_count_their_updates);
  RUN(models_are_loaded_by_path);
  RUN(rules_are_kept_in_files);
  exf_ctx_free(ctx);
  TEST_MAIN_END;
}
