/* tests/malicious.h - safetensors files that break one rule each, made in memory, with
   the rule and the status that a reader owes them. Rules and their numbers are those of
   the section safetensors of exfusion.h. Include after exfusion.h and test.h.

     malicious_each(visit, user);     calls visit for every file */
#ifndef MALICIOUS_H
#define MALICIOUS_H

#include <stdarg.h>
#include <stdlib.h>

typedef struct malicious {
  const unsigned char *data;     /* (n), a block of exactly that size */
  size_t n;
  exf_status status;
  const char *rule;              /* "V1" ... */
} malicious;

typedef struct malicious_run {
  void (*visit)(void *user, const malicious *file);
  void *user;
} malicious_run;

static void bad_bytes(const malicious_run *r, const char *rule, const void *data,
                      size_t n) {
  malicious m;
  unsigned char *copy = (unsigned char *)malloc(n ? n : 1);
  if (copy == NULL) exit(2);
  if (n) memcpy(copy, data, n);
  m.data = copy;
  m.n = n;
  m.rule = rule;
  m.status = strcmp(rule, "V18") == 0 ? EXF_LIMIT : EXF_FORMAT;
  r->visit(r->user, &m);
  free(copy);
}

/* A file of the header `json` (n bytes) and n_data bytes 0, 1, 2, ... */
static void bad_header(const malicious_run *r, const char *rule, const char *json,
                       size_t n, size_t n_data) {
  unsigned char *file = (unsigned char *)malloc(8 + n + n_data);
  size_t i;
  if (file == NULL) exit(2);
  for (i = 0; i < 8; i++) file[i] = (unsigned char)((uint64_t)n >> 8 * i & 255);
  memcpy(file + 8, json, n);
  for (i = 0; i < n_data; i++) file[8 + n + i] = (unsigned char)i;
  bad_bytes(r, rule, file, 8 + n + n_data);
  free(file);
}

#if defined(__GNUC__)
__attribute__((format(printf, 4, 5)))
#endif
static void bad(const malicious_run *r, const char *rule, size_t n_data,
                const char *format, ...) {
  static char json[1 << 14];
  va_list args;
  int n;
  va_start(args, format);
  n = vsnprintf(json, sizeof json, format, args);
  va_end(args);
  if (n < 0 || (size_t)n >= sizeof json) exit(2);
  bad_header(r, rule, json, (size_t)n, n_data);
}

#define LENGTH(array) (sizeof(array) / sizeof(array)[0])
/* A tensor "a" of U8 (4), which is sound; an empty one; frames for one changed member. */
#define GOOD "\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}"
#define EMPTY(name) \
  "{\"" name "\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}"
#define A_DTYPE(d) "{\"a\":{\"dtype\":" d ",\"shape\":[4],\"data_offsets\":[0,4]}}"
#define A_SHAPE(s) "{\"a\":{\"dtype\":\"U8\",\"shape\":" s ",\"data_offsets\":[0,4]}}"
#define A_SPAN(o) "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":" o "}}"

static void bad_v1(const malicious_run *r) {
  static const uint64_t lengths[] = {
    11, 12, 127, 128, 255, 256, 32767, 65536, 99999999, 100000000, 100000001,
    0x7ffffff8, 0x7fffffff, 0x80000000, 0xfffffff8, 0xffffffff, 0x100000000,
    0x7ffffffffffffff8, 0x7fffffffffffffff, 0x8000000000000000, 0xfffffffffffffff0,
    0xfffffffffffffff7, 0xfffffffffffffff8, 0xfffffffffffffffe, 0xffffffffffffffff};
  static const char *const others[] = {
    "version https://git-lfs.github.com/spec/v1\n", "PK\003\004rest of an archive",
    "\200\002\212\012rest of a pickle", "<!DOCTYPE html><html>", "<html><body>not found",
    "GGUF\003 a file of another format", "\037\213\010 compressed data",
    "\223NUMPY\001 an array", "{\"metadata\":{\"total_size\":1}}"};
  unsigned char file[18];
  size_t i, k;
  memset(file, ' ', sizeof file);
  for (i = 0; i < 8; i++) bad_bytes(r, "V1", file, i);
  for (i = 0; i < LENGTH(lengths); i++) {
    for (k = 0; k < 8; k++) file[k] = (unsigned char)(lengths[i] >> 8 * k & 255);
    memcpy(file + 8, "{        }", 10);
    bad_bytes(r, "V1", file, sizeof file);
  }
  for (i = 0; i < LENGTH(others); i++) bad_bytes(r, "V1", others[i], strlen(others[i]));
}

static const char *const bad_sequences[] = {
  "\x80", "\xff", "\xc3", "\xc0\x80", "\xc1\xbf", "\xe0\x9f\xbf", "\xed\xa0\x80",
  "\xed\xbf\xbf", "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80", "\xf5\x80\x80\x80",
  "\xe2\x82", "\xf0\x9f\x98", "\xe2\x28\xa1", "\xf0\x9f\x98\x28", "\xfe", "\xf8\x88\x80",
  "\\ud800", "\\udc00", "\\udfff", "\\ud800\\u0041", "\\ud83d\\ud83d", "\\udbff x"};

static void bad_v3(const malicious_run *r) {
  size_t i;
  for (i = 0; i < LENGTH(bad_sequences); i++) {
    const char *s = bad_sequences[i];
    bad(r, "V3", 0, EMPTY("%s"), s);
    bad(r, "V3", 0, "{\"__metadata__\":{\"%s\":\"v\"}}", s);
    bad(r, "V3", 4, "{\"__metadata__\":{\"k\":\"%s\"}," GOOD "}", s);
  }
  bad(r, "V3", 0, "{}\x80");
}

/* Every place where a sound header may be cut off. */
static void bad_cuts(const malicious_run *r) {
  static const char json[] =
    "{\"__metadata__\":{\"k\":\"\\u00e9v\"}, \"a\" : {\"dtype\":\"F32\",\"shape\":[1,2],"
    "\"data_offsets\":[0,8]}}";
  size_t n;
  for (n = 0; n < sizeof json - 1; n++) {
    char last = n ? json[n - 1] : ' ';
    int in_array = 0;
    size_t i;
    for (i = 0; i < n; i++) in_array = json[i] == '[' ? 1 : json[i] == ']' ? 0 : in_array;
    bad_header(r, in_array && (last == '[' || last == ',') ? "V10" : "V4", json, n, 8);
  }
}

static void bad_v4(const malicious_run *r) {
  static const char *const texts[] = {
    "\xef\xbb\xbf{}", "x{}", "{}x", "{}{}", "{},", "{,}", "{" GOOD ",}", "{" GOOD " " GOOD
    "}", "{'a':1}", "{a:1}", "{\"a\" {}}", "{\"a\"=1}", "{\"a\":}", "{\"a\"}", "{:}",
    "{\"a\",1}", "}", "/* */{}", "{}//", "{" GOOD "]", "{\"a\":'b'}", "{\"a\":TRUE}",
    "{\"__metadata__\":{,}}", "{\"__metadata__\":{\"k\" \"v\"}}",
    "{\"__metadata__\":{\"k\":\"v\",}}", "{\"__metadata__\":{\"k\":\"v\"\"l\":\"w\"}}",
    "{\"__metadata__\":NULL}", A_SHAPE("[4;1]"), A_SHAPE("[4 1]"), A_SPAN("[0 4]"),
    A_SPAN("[0:4]"),
    A_DTYPE("'U8'"), A_DTYPE("U8")};
  static const char *const escapes[] = {"\\x41", "\\a", "\\0", "\\U0041", "\\u12", "\\u",
    "\\u12g4", "\\u+123", "\\'", "\\u 041", "\\\x7f"};
  static const char nul[] = "{}\0\0\0\0\0", before[] = "\0{}", inside[] = "{\"a\0b\":1}";
  size_t i;
  int c;
  for (i = 0; i < LENGTH(texts); i++) bad(r, "V4", 4, "%s", texts[i]);
  for (i = 0; i < LENGTH(escapes); i++) {
    bad(r, "V4", 0, EMPTY("%s"),
        escapes[i]);
    bad(r, "V4", 0, "{\"__metadata__\":{\"k\":\"%s\"}}", escapes[i]);
  }
  for (c = 1; c < 32; c++)
    bad(r, "V4", 0, EMPTY("a%cb"),
        c);
  for (c = 1; c < 32; c++)   /* no blanks */
    if (c != '\t' && c != '\n' && c != '\r') bad(r, "V4", 0, "{%c}", c);
  bad_header(r, "V4", nul, sizeof nul - 1, 0);
  bad_header(r, "V4", before, sizeof before - 1, 0);
  bad_header(r, "V4", inside, sizeof inside - 1, 0);
}

static void bad_v5(const malicious_run *r) {
  static const char *const texts[] = {
    "[]", "\"text\"", "1", "true", "null", "-1", "[{}]", "[[[[[[[[", "{\"a\":[]}",
    "{\"a\":1}", "{\"a\":null}", "{\"a\":\"b\"}", "{\"a\":true}", "{\"__metadata__\":[]}",
    "{\"__metadata__\":\"x\"}", "{\"__metadata__\":1}", "{\"__metadata__\":false}",
    "{\"__metadata__\":nul}", "{\"__metadata__\":nulL}", A_DTYPE("1"),
    A_DTYPE("[\"U8\"]"), A_DTYPE("{}"), A_DTYPE("null"), A_DTYPE("true"),
    A_SHAPE("4"), A_SHAPE("\"4\""), A_SHAPE("{}"), A_SHAPE("null"), A_SHAPE("-4"),
    A_SPAN("4"), A_SPAN("\"0,4\""), A_SPAN("{\"begin\":0}"), A_SPAN("null"),
    A_SPAN("true")};
  char deep[2000];
  size_t i;
  for (i = 0; i < LENGTH(texts); i++) bad(r, "V5", 4, "%s", texts[i]);
  memset(deep, '[', sizeof deep);
  bad_header(r, "V5", deep, sizeof deep, 0);
  memcpy(deep, "{\"a\":", 5);
  bad_header(r, "V5", deep, sizeof deep, 0);
}

static void bad_v6(const malicious_run *r) {
  static const char *const texts[] = {
    "{" GOOD "," GOOD "}",
    "{" GOOD ",\"\\u0061\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[4,4]}}",
    "{\"\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
    "\"\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[4,4]}}",
    "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}",
    "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"shape\":[4],\"data_offsets\":[0,4]}}",
    "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4],"
    "\"data_offsets\":[0,4]}}",
    "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4],"
    "\"\\u0073hape\":[4]}}",
    "{\"__metadata__\":{\"k\":\"v\",\"k\":\"v\"}," GOOD "}",
    "{\"__metadata__\":{\"k\":\"v\",\"\\u006b\":\"w\"}," GOOD "}",
    "{\"__metadata__\":{\"\\n\":\"v\",\"\\u000a\":\"w\"}," GOOD "}",
    "{\"__metadata__\":{\"/\":\"v\",\"\\/\":\"w\"}," GOOD "}",
    "{\"__metadata__\":{}," GOOD ",\"__metadata__\":{}}",
    "{\"__metadata__\":null," GOOD ",\"\\u005f_metadata__\":{}}"};
  size_t i;
  for (i = 0; i < LENGTH(texts); i++) bad(r, "V6", 4, "%s", texts[i]);
}

static void bad_v7_v8(const malicious_run *r) {
  static const char *const values[] = {"1", "-1", "1.5", "true", "false", "null", "[]",
                                       "{}", "[\"v\"]", "{\"k\":\"v\"}", "v", "'v'"};
  size_t i;
  bad(r, "V7", 0, EMPTY("\\u0000"));
  bad(r, "V7", 0, EMPTY("a\\u0000"));
  bad(r, "V7", 4, A_DTYPE("\"U8\\u0000\""));
  bad(r, "V7", 4, "{\"a\":{\"dtype\\u0000\":\"U8\"}}");
  bad(r, "V7", 4, "{\"__metadata__\":{\"\\u0000\":\"v\"}," GOOD "}");
  bad(r, "V7", 4, "{\"__metadata__\":{\"k\":\"v\\u0000w\"}," GOOD "}");
  bad(r, "V7", 4, "{\"__metadata__\\u0000\":{}," GOOD "}");
  for (i = 0; i < LENGTH(values); i++) {
    bad(r, "V8", 4, "{\"__metadata__\":{\"k\":%s}," GOOD "}", values[i]);
    bad(r, "V8", 4, "{\"__metadata__\":{\"j\":\"v\",\"k\":%s}," GOOD "}", values[i]);
  }
}

static void bad_v9(const malicious_run *r) {
  static const char *const member[] = {"\"dtype\":\"U8\"", "\"shape\":[4]",
                                       "\"data_offsets\":[0,4]"};
  static const char *const extra[] = {"dtypes", "Dtype", "", "shape ", "strides",
    "offset", "data_offset", "DATA_OFFSETS", "__metadata__", "\\u0073hapes"};
  size_t i;
  for (i = 0; i < 7; i++)   /* the subset of members that is there */
    bad(r, "V9", 4, "{\"a\":{%s%s%s%s%s}}", i & 1 ? member[0] : "",
        (i & 1) && (i & 6) ? "," : "", i & 2 ? member[1] : "",
        (i & 4) && (i & 2) ? "," : "", i & 4 ? member[2] : "");
  for (i = 0; i < LENGTH(extra); i++)
    bad(r, "V9", 4, "{\"a\":{\"%s\":\"x\",%s,%s,%s}}", extra[i], member[0], member[1],
        member[2]);
}

static void bad_v10_v12(const malicious_run *r) {
  static const char *const integers[] = {
    "-1", "+4", "04", "00", "4.0", "4.", ".4", "4e0", "4E0", "-0", "\"4\"", "null",
    "true", "[4]", "{}", "0x4 ", "281474976710656", "4294967296000000000",
    "9223372036854775808",
    "18446744073709551615", "18446744073709551616", "18446744073709551620",
    "340282366920938463463374607431768211460", "NaN", "-", ""};
  static const char *const spans[] = {"[]", "[0]", "[0,2,4]", "[0,0,4]", "[4,0]", "[1,0]",
    "[281474976710655,0]", "[0,4,4]", "[0,4,0,4]"};
  size_t i;
  bad(r, "V10", 4, A_SHAPE("[4"));   /* and the next member in the array */
  for (i = 0; i < LENGTH(integers); i++) {
    const char *v = integers[i], *rule = "V10";
    if (strcmp(v, "0x4 ") == 0) rule = "V4";   /* a zero, and then what is no comma */
    bad(r, rule, 4, A_SHAPE("[2,%s]"), v);
    bad(r, rule, 4, A_SPAN("[0,%s]"), v);
    bad(r, rule, 4, A_SPAN("[%s,4]"), *v ? v : " ");
  }
  for (i = 0; i < LENGTH(spans); i++)
    bad(r, "V12", 4, A_SPAN("%s"), spans[i]);
}

static const struct {
  const char *name;
  unsigned bits;
} dtypes[] = {
  {"BOOL", 8}, {"U8", 8}, {"I8", 8}, {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8},
  {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16}, {"U16", 16}, {"F16", 16},
  {"BF16", 16}, {"I32", 32}, {"U32", 32}, {"F32", 32}, {"C64", 64}, {"F64", 64},
  {"I64", 64}, {"U64", 64}, {"F4", 4}, {"F6_E2M3", 6}, {"F6_E3M2", 6}};

static void bad_v11(const malicious_run *r) {
  static const char *const names[] = {
    "", " ", "F32 ", " F32", "f32", "F31", "F33", "F3", "F322", "float32", "FLOAT", "U4",
    "I4", "F8", "F8_E4M3FN", "BF32", "F128", "C128", "STRING", "NULL", "U128", "\\u0046",
    "F32\\n", "BOOLEAN", "F6", "\xc3\xa9"};
  size_t i;
  for (i = 0; i < LENGTH(names); i++)
    bad(r, "V11", 4, "{\"a\":{\"dtype\":\"%s\",\"shape\":[1],\"data_offsets\":[0,4]}}",
        names[i]);
}

static void bad_v13_v14(const malicious_run *r) {
  static const char *const shapes[] = {
    "[4294967296,4294967296]", "[65536,65536,65536,65536]", "[281474976710655,65538]",
    "[281474976710655,281474976710655]", "[0,4294967296,4294967296]",
    "[4294967296,0,4294967296]", "[4294967296,4294967296,0]", "[2147483648,8589934592]",
    "[281474976710655,281474976710655,281474976710655,281474976710655]",
    "[2,2147483648,4294967296]"};
  size_t i, k;
  for (i = 0; i < LENGTH(shapes); i++)
    for (k = 0; k < 2; k++)
      bad(r, "V13", 4, "{\"a\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[0,%d]}}",
          k ? "F64" : "U8", shapes[i], k ? 0 : 4);
  for (i = 0; i < LENGTH(dtypes); i++) {   /* bits that wrap to 0 */
    if (dtypes[i].bits < 8) continue;
    bad(r, "V13", 0, "{\"a\":{\"dtype\":\"%s\",\"shape\":[2147483648,%lu],"
        "\"data_offsets\":[0,0]}}", dtypes[i].name,
        8589934592ul / (unsigned long)dtypes[i].bits);
  }
  for (i = 1; i < 8; i += 2) bad(r, "V13", 4, "{\"a\":{\"dtype\":\"F4\",\"shape\":[%d],"
                                 "\"data_offsets\":[0,4]}}", (int)i);
  for (i = 1; i < 8; i++)
    if (i % 4) bad(r, "V13", 4, "{\"a\":{\"dtype\":\"F6_E2M3\",\"shape\":[%d],"
                   "\"data_offsets\":[0,4]}}", (int)i);
  for (i = 0; i < LENGTH(dtypes); i++)   /* a byte more or less than 8 elements need */
    for (k = 0; k < 2; k++)
      bad(r, "V14", 64, "{\"a\":{\"dtype\":\"%s\",\"shape\":[8],"
          "\"data_offsets\":[0,%u]}}", dtypes[i].name,
          dtypes[i].bits + (k ? 1u : (unsigned)-1));
  bad(r, "V14", 4, A_SHAPE("[0]"));
  bad(r, "V14", 4, A_SHAPE("[4,0]"));
  bad(r, "V14", 4, A_SHAPE("[]"));
  bad(r, "V14", 4, A_SHAPE("[281474976710655]"));
  bad(r, "V14", 4, A_SPAN("[0,281474976710655]"));
  bad(r, "V14", 0, A_SPAN("[0,0]"));
}

static void bad_v15_v16(const malicious_run *r) {
  static const int spans[][4] = {
    {0, 4, 5, 9}, {0, 4, 3, 7}, {0, 4, 0, 4}, {1, 5, 5, 9}, {4, 8, 8, 12}, {0, 4, 2, 6},
    {8, 12, 0, 4}, {4, 8, 9, 13}, {1, 5, 9, 13}};
  size_t i;
  for (i = 0; i < LENGTH(spans); i++)
    bad(r, "V15", 16, "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[%d,%d]},"
        "\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[%d,%d]}}", spans[i][0],
        spans[i][1], spans[i][2], spans[i][3]);
  bad(r, "V15", 8, "{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[4,4]},"
      "\"b\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]}}");
  bad(r, "V15", 4, "{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[1,1]}}");
  bad(r, "V15", 4, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],"
      "\"data_offsets\":[281474976710651,281474976710655]}}");
  for (i = 0; i < 4; i++) bad(r, "V16", i, "{" GOOD "}");
  for (i = 5; i < 14; i++) bad(r, "V16", i, "{" GOOD "}");
  bad(r, "V16", 1, "{}");
  bad(r, "V16", 3, "{\"__metadata__\":{}}");
  bad(r, "V16", 100, "{\"a\":{\"dtype\":\"U8\",\"shape\":[281474976710655],"
      "\"data_offsets\":[0,281474976710655]}}");
  bad(r, "V16", 100, "{\"a\":{\"dtype\":\"F64\",\"shape\":[1073741824],"
      "\"data_offsets\":[0,8589934592]}}");
}

static void bad_v18(const malicious_run *r) {
  static char name[8193];
  size_t i;
  for (i = 17; i < 40; i += 11) {
    char shape[200] = "[1";
    size_t k;
    for (k = 1; k < i; k++) strcat(shape, ",1");
    bad(r, "V18", 1, "{\"a\":{\"dtype\":\"U8\",\"shape\":%s],\"data_offsets\":[0,1]}}",
        shape);
  }
  memset(name, 'n', sizeof name - 1);
  for (i = 4097; i < sizeof name; i += 2047)
    bad(r, "V18", 0, EMPTY("%.*s"),
        (int)i, name);
}

static TEST_UNUSED void malicious_each(void (*visit)(void *user, const malicious *file),
                                       void *user) {
  malicious_run r;
  r.visit = visit;
  r.user = user;
  bad_v1(&r);
  bad_v3(&r);
  bad_cuts(&r);
  bad_v4(&r);
  bad_v5(&r);
  bad_v6(&r);
  bad_v7_v8(&r);
  bad_v9(&r);
  bad_v10_v12(&r);
  bad_v11(&r);
  bad_v13_v14(&r);
  bad_v15_v16(&r);
  bad_v18(&r);
}

#endif /* MALICIOUS_H */
