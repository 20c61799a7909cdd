/* What the reader makes of a file, for differential_safetensors.py. */
#define EXF_STATIC
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"

long differential(const unsigned char *data, size_t n, unsigned char *out, size_t room);

static unsigned char *put(unsigned char *at, const void *data, size_t n) {
  if (n) memcpy(at, data, n);
  return at + n;
}

/* Tensors by name as "name\0dtype\0n_dims dim ... bytes " and the bytes, to out; returns
   their length. A refused file: -1, and the message in out. */
long differential(const unsigned char *data, size_t n, unsigned char *out, size_t room) {
  static exf_ctx *ctx;
  unsigned char *at = out;
  char text[32];
  exf_st *st;
  size_t i;
  int k;
  if (ctx == NULL) ctx = exf_ctx_new(NULL);
  st = exf_st_open_memory(ctx, data, n, NULL);
  if (st == NULL) {
    snprintf((char *)out, room, "%s", exf_error(ctx));
    exf_error_clear(ctx);
    return -1;
  }
  for (i = 0; i < exf_st_count(st); i++) {
    const exf_st_entry *e = exf_st_get(st, i);
    if ((size_t)(at - out) + strlen(e->name) + e->bytes + 800 > room) break;
    at = put(at, e->name, strlen(e->name) + 1);
    at = put(at, e->dtype, strlen(e->dtype) + 1);
    at = put(at, text, (size_t)snprintf(text, sizeof text, "%d ", e->n_dims));
    for (k = 0; k < e->n_dims; k++)
      at = put(at, text, (size_t)snprintf(text, sizeof text, "%llu ",
                                          (unsigned long long)e->dim[k]));
    at = put(at, text, (size_t)snprintf(text, sizeof text, "%llu ",
                                        (unsigned long long)e->bytes));
    at = put(at, e->data, e->bytes);
  }
  exf_st_close(st);
  return (long)(at - out);
}
