/* Any bytes as a safetensors file, opened, looked through, and loaded into a model as
   parameters and as a checkpoint. */
#ifdef TEST_LINKED
#include "../../exfusion.h"
#elif !defined(FUZZ_REPLAY)
#define EXFUSION_IMPLEMENTATION
#include "../../exfusion.h"
#endif
#include "fuzz.h"

#include "../tiny_gpt.h"

typedef struct reader {
  heap heap;
  exf_ctx *ctx;
  exf_model *dense, *banked;
  exf_optim *optim;
} reader;

/* The smallest models: one linear layer, and a memory bank of two experts. */
static reader *reader_get(void) {
  static reader r;
  exf_optim_desc adamw;
  exf_ffn_desc ffn;
  exf_linear_desc linear;
  if (r.ctx != NULL) return &r;
  memset(&ffn, 0, sizeof ffn);
  memset(&linear, 0, sizeof linear);
  memset(&adamw, 0, sizeof adamw);
  ffn.width = 1;
  ffn.hidden = 1;
  ffn.fusion = tiny_variant(4, 2);
  r.ctx = fuzz_ctx(&r.heap, NULL);
  r.dense = exf_model_new(r.ctx);
  linear.bias = 1;
  exf_linear_new(r.dense, "l", 1, 2, &linear);
  exf_param_alias(r.dense, "k", "l.weight");
  r.banked = exf_model_new(r.ctx);
  exf_ffn_new(r.banked, "f", &ffn);
  r.optim = exf_optim_new(r.banked, &adamw);
  exf_tensor_new(r.ctx, exf_shape0(), NULL);   /* the step arena is there from now on */
  exf_rewind(r.ctx);
  MUST(exf_ctx_status(r.ctx) == EXF_OK);
  return &r;
}

static size_t element_bytes(const char *dtype) {
  if (strcmp(dtype, "F64") == 0) return 8;
  if (strcmp(dtype, "F32") == 0) return 4;
  return strcmp(dtype, "F16") == 0 || strcmp(dtype, "BF16") == 0 ? 2 : 0;
}

static void read_entry(exf_ctx *ctx, const exf_st_entry *e) {
  size_t width = element_bytes(e->dtype), n = width ? e->bytes / width : 0;
  exf_real *out = (exf_real *)malloc(n * sizeof *out + 1);
  exf_status status;
  MUST(out != NULL);
  status = exf_st_read(ctx, e, out, n);
  MUST(status == (width ? EXF_OK : EXF_MISMATCH));
  exf_error_clear(ctx);
  free(out);
}

/* Names ascend, are found, and the tensors fill the file. */
static void look_through(exf_ctx *ctx, const exf_st *st, size_t n, size_t header,
                         size_t trailing) {
  size_t i, count = exf_st_count(st), bytes = 0, k, touched = 0;
  for (i = 0; i < count; i++) {
    const exf_st_entry *e = exf_st_get(st, i);
    MUST(e != NULL && exf_st_find(st, e->name) == e);
    MUST(i == 0 || strcmp(exf_st_get(st, i - 1)->name, e->name) < 0);
    MUST(e->n_dims >= 0 && e->n_dims <= 16);
    for (k = 0; k < e->bytes; k++) touched += e->data[k];
    bytes += e->bytes;
    read_entry(ctx, e);
  }
  MUST(8 + header + bytes + trailing == n && touched <= 255 * n);
  MUST(exf_st_get(st, count) == NULL && exf_st_find(st, NULL) == NULL);
  (void)exf_st_meta(st, "format");
}

static uint64_t model_hash(const exf_model *model) {
  uint64_t h = 14695981039346656037u;
  size_t i, k;
  for (i = 0; i < exf_model_n_params(model); i++) {
    const exf_tensor *t = &exf_model_param(model, i)->tensor;
    const unsigned char *p = (const unsigned char *)t->data;
    for (k = 0; k < t->size * sizeof(exf_real); k++) h = (h ^ p[k]) * 1099511628211u;
  }
  return h;
}

/* Loads, or says that the file is of another model and changes nothing. */
static void load(reader *r, const exf_st *st) {
  uint64_t before = model_hash(r->dense);
  exf_status status = exf_model_load_st(r->dense, st);
  MUST(status == EXF_OK || (status == EXF_MISMATCH && model_hash(r->dense) == before));
  if (status != EXF_OK) fuzz_message(exf_error(r->ctx));
  exf_error_clear(r->ctx);
  before = model_hash(r->banked);
  status = exf_checkpoint_load_st(r->banked, r->optim, st);
  MUST(status == EXF_OK || (status == EXF_MISMATCH && model_hash(r->banked) == before));
  exf_error_clear(r->ctx);
  exf_rewind(r->ctx);
}

static int fuzz_safetensors(const uint8_t *data, size_t n) {
  reader *r = reader_get();
  size_t held = r->heap.bytes, trailing = 0, header = 0, i;
  exf_st *st, *lenient;
  heap_arm(&r->heap, 0, 0);
  st = exf_st_open_memory(r->ctx, data, n, NULL);
  MUST((st != NULL) == (exf_ctx_status(r->ctx) == EXF_OK));
  MUST(r->heap.peak - held <= 4 * n + (1 << 20));
  if (st == NULL) {
    exf_status status = exf_ctx_status(r->ctx);
    MUST(status == EXF_FORMAT || status == EXF_LIMIT);
    MUST(strstr(exf_error(r->ctx), "safetensors rule V") != NULL);
    fuzz_message(exf_error(r->ctx));
    exf_error_clear(r->ctx);
  } else {
    for (i = 8; i-- > 0;) header = header << 8 | data[i];
    look_through(r->ctx, st, n, header, 0);
    load(r, st);
    MUST(r->heap.peak - held <= 4 * n + (1 << 20));
  }
  lenient = exf_st_open_memory(r->ctx, data, n, &trailing);
  MUST(st == NULL || (lenient != NULL && trailing == 0));
  if (lenient != NULL) {
    for (header = 0, i = 8; i-- > 0;) header = header << 8 | data[i];
    look_through(r->ctx, lenient, n, header, trailing);
  }
  exf_error_clear(r->ctx);
  exf_st_close(lenient);
  exf_st_close(st);
  MUST(r->heap.bytes == held && r->heap.n_bad == 0);
  return 0;
}

FUZZ_MAIN(safetensors)

#ifdef FUZZ_LIBFUZZER
size_t LLVMFuzzerMutate(uint8_t *data, size_t n, size_t max);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t n, size_t max, unsigned seed);

/* Mostly the length is put right again, or hardly a mutant would come past rule V1. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t n, size_t max, unsigned seed) {
  size_t i, end;
  n = LLVMFuzzerMutate(data, n, max);
  for (end = n; end > 8 && data[end - 1] != '}'; end--) continue;
  if (seed % 8 != 0 && end > 8)
    for (i = 0; i < 8; i++) data[i] = (uint8_t)((uint64_t)(end - 8) >> 8 * i & 255);
  return n;
}
#endif
