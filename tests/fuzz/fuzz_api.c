/* Any bytes as a program: calls of the public functions with random shapes, NULLs and
   misuse. Nothing may crash, whatever fails says so in one line, and all memory comes
   back. What the manual calls undetected (tensors kept beyond their life, pointers to
   less memory than their shape says) is not done. */
#ifdef TEST_LINKED
#include "../../exfusion.h"
#elif !defined(FUZZ_REPLAY)
#define EXFUSION_IMPLEMENTATION
#define EXF__CHUNK(held) ((held) * 0)   /* every request of the step arena is a block */
#include "../../exfusion.h"
#endif
#include "fuzz.h"

#include "../disk.h"

enum { N_TENSORS = 12, N_LAYERS = 4, MAX_CALLS = 48, MEMORY_LIMIT = 1 << 22 };

typedef struct api {
  const uint8_t *at, *end;
  heap heap;
  disk disk;
  exf_ctx *ctx;
  exf_model *model, *other;
  exf_optim *optim;
  exf_ema *ema;
  exf_kv *kv;
  exf_tensor *x[N_TENSORS];          /* results, until the next rewind */
  int n_x;
  exf_tensor *own[N_TENSORS];        /* parameters outside FFNs, until the end */
  int n_own;
  exf_linear_layer *linear[N_LAYERS];
  exf_norm_layer *norm[N_LAYERS];
  exf_ffn *ffn[N_LAYERS];
  exf_attn_layer *attn[N_LAYERS];
  exf_block *block[N_LAYERS];
  int n_names;
} api;

/* ---- draws ---- */

static unsigned draw(api *a, unsigned n) {
  return a->at < a->end ? *a->at++ % n : 0;
}

/* Mostly small; now and then of a size that must be refused. */
static size_t draw_size(api *a) {
  static const size_t large[] = {
    17, 40, 3000, (size_t)1 << 31, ((size_t)1 << 31) - 1, SIZE_MAX / 8 + 1,
    SIZE_MAX / 4, SIZE_MAX / 2 + 1, SIZE_MAX - 63, SIZE_MAX};
  static const size_t small[] = {1, 2, 3, 4, 5, 6, 8, 0};
  unsigned r = draw(a, 64);
  return r < 56 ? small[r % 8] : large[draw(a, 10)];
}

static double draw_number(api *a) {
  static const double values[] = {0, 0, 0, 1, 0.5, 0.1, 1e-5, 2, -1, -0.5, 1e30, -1e300};
  unsigned r = draw(a, 14);
  return r < 12 ? values[r] : r == 12 ? (double)NAN : (double)INFINITY;
}

static exf_shape draw_shape(api *a) {
  exf_shape s = exf_shape0();
  int i, n = (int)draw(a, 8);
  s.n = n == 7 ? (int)draw(a, 2) * 1000 - 1 : n;     /* also -1 and 999 axes */
  for (i = 0; i < n && i < EXF_MAX_DIMS; i++) s.dim[i] = draw_size(a);
  return s;
}

static exf_tensor *draw_tensor(api *a) {
  unsigned r = draw(a, 2 * N_TENSORS + 1);
  if (r == 2 * N_TENSORS) return NULL;
  if (r < N_TENSORS) return a->n_x ? a->x[r % (unsigned)a->n_x] : NULL;
  return a->n_own ? a->own[r % (unsigned)a->n_own] : NULL;
}

#define DRAW_LAYER(a, kind) (draw(a, 16) == 0 ? NULL : (a)->kind[draw(a, N_LAYERS)])

static void keep(api *a, exf_tensor *x) {
  if (x == NULL) return;
  a->x[a->n_x < N_TENSORS ? a->n_x++ : (int)draw(a, N_TENSORS)] = x;
}

static void keep_own(api *a, exf_tensor *x) {
  if (x != NULL && a->n_own < N_TENSORS) a->own[a->n_own++] = x;
}

/* A name: fresh, taken, empty, long, or NULL. */
static const char *draw_name(api *a, char *out) {
  unsigned r = draw(a, 16);
  if (r == 0) return NULL;
  if (r == 1) return "";
  if (r == 2) {
    memset(out, 'n', 299);
    out[299] = '\0';
    return out;
  }
  if (r > 4) a->n_names++;
  snprintf(out, 32, "n%d", a->n_names);
  return out;
}

/* ---- rules: of each kind one, and what must be refused ---- */

static void rule_init(exf_ctx *ctx, exf_ffn *f, const exf_fusion_desc *fusion) {
  (void)ctx;
  exf_param_desc d;
  memset(&d, 0, sizeof d);
  d.shape = exf_shape1(fusion->n_experts);
  exf_ffn_param(f, "own", &d);
  d.buffer = 1;
  exf_ffn_param(f, "constant", &d);
}

static exf_tensor *rule_weights(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x,
                                int training) {
  exf_tensor *a = exf_softmax(ctx, exf_add(ctx, exf_ffn_tensor(f, "own"),
                                           exf_ffn_tensor(f, "constant")));
  (void)x;
  return training ? exf_dropout(ctx, a, 0.5) : a;
}

static exf_tensor *rule_scalar(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x,
                               int training) {
  (void)f;
  (void)x;
  return training ? exf_full(ctx, exf_shape0(), 1) : NULL;
}

static void rule_step(exf_ffn *f, const exf_real *mean) {
  exf_tensor *t = exf_ffn_tensor(f, "constant");
  size_t i;
  MUST(mean != NULL);
  for (i = 0; t != NULL && i < t->size; i++) t->data[i] = mean[i];
}

static exf_tensor *rule_fuse(exf_ctx *ctx, const exf_ffn *f, exf_part part,
                             int training) {
  (void)training;
  return exf_mean(ctx, &f->part[part]->tensor, EXF_AXIS(0), 0);
}

static exf_tensor *rule_forward(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x,
                                int training) {
  exf_tensor *th[EXF_N_PARTS];
  int k;
  for (k = 0; k < EXF_N_PARTS; k++)
    th[k] = f->part[k] ? rule_fuse(ctx, f, (exf_part)k, training) : NULL;
  return exf_scale(ctx, exf_ffn_apply(ctx, f, x, th), 2);
}

static const exf_rule rules[] = {
  {"weights", NULL, rule_init, rule_weights, NULL, NULL, rule_step},
  {"fuse", NULL, rule_init, NULL, rule_fuse, NULL, NULL},
  {"forward", NULL, rule_init, NULL, NULL, rule_forward, NULL},
  {"mean", NULL, NULL, NULL, NULL, NULL, NULL},
  {"scalar", NULL, NULL, rule_scalar, NULL, NULL, NULL},
  {"two", NULL, NULL, rule_weights, rule_fuse, NULL, NULL},
  {NULL, NULL, NULL, rule_weights, NULL, NULL, NULL}};
enum { N_RULES = (int)(sizeof rules / sizeof rules[0]) };

static exf_fusion_desc draw_fusion(api *a) {
  exf_fusion_desc f;
  memset(&f, 0, sizeof f);
  f.variant = (exf_variant)draw(a, 6);
  if (draw(a, 3) == 0) {
    f.rule = &rules[draw(a, N_RULES)];
    f.variant = draw(a, 8) ? EXF_RULE : f.variant;
  }
  f.n_experts = draw(a, 8) ? draw(a, 4) : draw_size(a);
  f.dw_softmax = (int)draw(a, 2);
  f.routed = (int)draw(a, 2);
  f.attach = (int)draw(a, 2);
  f.mu = draw_number(a);
  f.tau = draw_number(a);
  f.upcycle = (exf_upcycle)draw(a, 8);
  f.spread = draw_number(a);
  f.drop = draw_number(a);
  return f;
}

static exf_ffn_desc draw_ffn(api *a) {
  exf_ffn_desc d;
  memset(&d, 0, sizeof d);
  d.width = draw_size(a);
  d.hidden = draw_size(a);
  d.act = (exf_act)draw(a, 6);
  d.bias = (int)draw(a, 2);
  d.init_std = draw_number(a);
  d.init_std_out = draw_number(a);
  d.up = draw(a, 8) ? NULL : draw(a, 2) ? "c_proj" : "";
  d.fusion = draw_fusion(a);
  return d;
}

/* ---- tensors and ops ---- */

static void call_new(api *a) {
  static const exf_real values[16] = {1, -1, 0.5, 3, 0, 2, -2, 1e-3f, 1e30f, 4, 5, 6, 7,
                                      8, 9, 10};
  exf_real special[4] = {(exf_real)NAN, (exf_real)INFINITY, (exf_real)-INFINITY, 1};
  exf_shape s = draw_shape(a);
  unsigned r = draw(a, 8);
  if (r < 5) s = exf_shape2(draw(a, 5), draw(a, 4));    /* at most 12 numbers */
  if (r == 5) s = exf_shape1(draw(a, 5));               /* at most 4 */
  keep(a, exf_tensor_new(draw(a, 32) ? a->ctx : NULL, s,
                         r < 5 ? values : r == 5 ? special : NULL));
}

static void call_unary(api *a) {
  static exf_tensor *(*const ops[])(exf_ctx *, exf_tensor *) = {
    exf_neg, exf_exp, exf_log, exf_tanh, exf_sqrt, exf_square, exf_relu, exf_gelu,
    exf_gelu_tanh, exf_silu, exf_abs, exf_sigmoid, exf_softmax, exf_log_softmax,
    exf_detach, exf_grad_keep};
  exf_tensor *x = draw_tensor(a);
  keep(a, ops[draw(a, sizeof ops / sizeof ops[0])](a->ctx, x));
}

static void call_binary(api *a) {
  static exf_tensor *(*const ops[])(exf_ctx *, exf_tensor *, exf_tensor *) = {
    exf_add, exf_sub, exf_mul, exf_div, exf_fuse};
  exf_tensor *x = draw_tensor(a), *y = draw_tensor(a);
  keep(a, ops[draw(a, sizeof ops / sizeof ops[0])](a->ctx, x, y));
}

static void call_product(api *a) {
  exf_tensor *x = draw_tensor(a), *w = draw_tensor(a), *b = draw_tensor(a);
  switch (draw(a, 3)) {
    case 0: keep(a, exf_linear(a->ctx, x, w, draw(a, 2) ? b : NULL)); break;
    case 1: keep(a, exf_matmul(a->ctx, x, w, (int)draw(a, 16) % 5)); break;
    default: keep(a, exf_where(a->ctx, x, w, b)); break;
  }
}

static void call_norm(api *a) {
  exf_tensor *x = draw_tensor(a), *w = draw_tensor(a), *b = draw_tensor(a);
  double eps = draw_number(a);
  if (draw(a, 2)) keep(a, exf_layernorm(a->ctx, x, w, draw(a, 2) ? b : NULL, eps));
  else keep(a, exf_rmsnorm(a->ctx, x, w, eps));
}

static void call_scaled(api *a) {
  exf_tensor *x = draw_tensor(a);
  double s = draw_number(a);
  switch (draw(a, 5)) {
    case 0: keep(a, exf_scale(a->ctx, x, s)); break;
    case 3: keep(a, exf_clamp(a->ctx, x, s, draw_number(a))); break;
    case 4: keep(a, exf_full(draw(a, 32) ? a->ctx : NULL, draw_shape(a), s)); break;
    case 1: keep(a, exf_dropout(a->ctx, x, s)); break;
    default: keep(a, exf_drop_path(a->ctx, x, s)); break;
  }
}

static void call_shape(api *a) {
  exf_tensor *x = draw_tensor(a), *xs[EXF_MAX_INPUTS + 1];
  int axes[EXF_MAX_DIMS], i, n = (int)draw(a, EXF_MAX_INPUTS + 2);
  size_t begin, end;
  for (i = 0; i < EXF_MAX_DIMS; i++) axes[i] = (int)draw(a, 4) - (draw(a, 16) == 0);
  for (i = 0; i <= EXF_MAX_INPUTS; i++) xs[i] = draw(a, 3) ? x : draw_tensor(a);
  begin = draw_size(a);
  end = draw_size(a);
  switch (draw(a, 4)) {
    case 0: keep(a, exf_reshape(a->ctx, x, draw_shape(a))); break;
    case 1: keep(a, exf_permute(a->ctx, x, draw(a, 16) ? axes : NULL)); break;
    case 2: keep(a, exf_concat(a->ctx, draw(a, 16) ? xs : NULL, n, axes[0])); break;
    default: keep(a, exf_slice(a->ctx, x, axes[1], begin, end)); break;
  }
}

static void call_sum(api *a) {
  exf_tensor *x = draw_tensor(a);
  unsigned axes = draw(a, 4) ? draw(a, 80) : EXF_ALL_AXES;
  int to_keep = draw(a, 2) ? EXF_KEEP : 0;
  switch (draw(a, 3)) {
    case 0: keep(a, exf_sum(a->ctx, x, axes, to_keep)); break;
    case 1: keep(a, exf_mean(a->ctx, x, axes, to_keep)); break;
    default: keep(a, exf_max(a->ctx, x, axes, to_keep)); break;
  }
}

/* Indices that come back are inside of their rows. */
static void call_choose(api *a) {
  const exf_tensor *x = draw_tensor(a);
  size_t i, n = x && x->shape.n > 0 ? x->shape.dim[x->shape.n - 1] : 0;
  exf_sample_desc d;
  const int32_t *at;
  int32_t id;
  memset(&d, 0, sizeof d);
  d.temperature = draw_number(a);
  d.top_k = draw_size(a);
  d.top_p = draw_number(a);
  d.seed = draw(a, 4);
  if (draw(a, 2)) {
    id = exf_sample(a->ctx, x, draw(a, 8) ? &d : NULL, draw(a, 100));
    MUST(id == -1 || (id >= 0 && (size_t)id < n));
    return;
  }
  at = exf_argmax(draw(a, 32) ? a->ctx : NULL, x);
  for (i = 0; at != NULL && n > 0 && i < x->size / n; i++)
    MUST(at[i] >= 0 && (size_t)at[i] < n);
}

/* Ids and labels: as many as the call reads, some out of range. */
static void call_lookup(api *a) {
  int32_t ids[64];
  exf_tensor *x = draw_tensor(a);
  size_t i, n0 = draw(a, 8), n1 = draw(a, 8), rows = 1;
  double smoothing = draw_number(a);
  for (i = 0; i < 64; i++) ids[i] = (int32_t)draw(a, 6) - (draw(a, 32) == 0 ? 2 : 0);
  if (draw(a, 16) == 0) ids[0] = draw(a, 2) ? INT32_MAX : INT32_MIN;
  if (draw(a, 2)) {
    keep(a, exf_embedding(a->ctx, x, draw(a, 16) ? ids : NULL, n0, n1));
    return;
  }
  if (draw(a, 3) == 0) {
    keep(a, exf_gather(a->ctx, x, draw(a, 16) ? ids : NULL, n0));
    return;
  }
  for (i = 0; x != NULL && i + 1 < (size_t)x->shape.n; i++) rows *= x->shape.dim[i];
  if (x == NULL || (rows <= 64 && x->size <= 4096))
    keep(a, exf_cross_entropy(a->ctx, x, draw(a, 16) ? ids : NULL, smoothing));
}

static void double_forward(void *user, const exf_tensor *const *in, exf_real *out) {
  size_t i;
  (void)user;
  for (i = 0; i < in[0]->size; i++) out[i] = 2 * in[0]->data[i];
}

static void double_backward(void *user, const exf_tensor *const *in,
                            const exf_tensor *out, const exf_real *dout,
                            exf_real *const *din) {
  size_t i;
  (void)user;
  (void)in;
  for (i = 0; din[0] != NULL && i < out->size; i++) din[0][i] += 2 * dout[i];
}

static void call_custom(api *a) {
  exf_custom_desc d;
  exf_tensor *x = draw_tensor(a), *in[EXF_MAX_INPUTS];
  int i;
  memset(&d, 0, sizeof d);
  for (i = 0; i < EXF_MAX_INPUTS; i++) in[i] = x;
  d.name = draw(a, 8) ? "double" : NULL;
  d.forward = draw(a, 8) ? double_forward : NULL;
  d.backward = draw(a, 8) ? double_backward : NULL;
  if (x != NULL) d.out = x->shape;
  keep(a, exf_custom(a->ctx, draw(a, 16) ? &d : NULL, draw(a, 16) ? in : NULL,
                     (int)(draw(a, 16) ? 1 : draw(a, 12) - 1u)));
}

static void call_attention(api *a) {
  exf_tensor *x = draw_tensor(a);
  exf_attention_desc d;
  d.n_heads = draw_size(a);
  d.causal = (int)draw(a, 2);
  d.cache = draw(a, 2) ? a->kv : NULL;
  keep(a, exf_attention(a->ctx, x, draw(a, 8) ? &d : NULL));
}

static void call_backward(api *a) {
  exf_tensor *x = draw_tensor(a);
  if (draw(a, 4)) x = exf_mean(a->ctx, x, EXF_ALL_AXES, 0);
  exf_backward(a->ctx, x);
  if (draw(a, 4) == 0) exf_backward(a->ctx, x);
  (void)exf_item(x);
}

static void call_rewind(api *a) {
  exf_rewind(draw(a, 16) ? a->ctx : NULL);
  exf_rewind(a->ctx);
  a->n_x = 0;
}

/* ---- models ---- */

static void call_layer(api *a) {
  char buffer[300];
  const char *name = draw_name(a, buffer);
  exf_model *m = draw(a, 16) ? a->model : NULL;
  size_t in = draw_size(a), out = draw_size(a), k = draw(a, N_LAYERS);
  double std = draw_number(a);
  int bias = (int)draw(a, 2), given = draw(a, 8) > 0;
  exf_linear_desc ld;
  exf_norm_desc nd;
  exf_param_desc d;
  memset(&d, 0, sizeof d);
  d.shape = draw_shape(a);
  d.init_std = std;
  d.decay = d.buffer = bias;
  ld.bias = nd.bias = bias;
  ld.init_std = nd.eps = std;
  nd.rms = (int)draw(a, 2);
  switch (draw(a, 5)) {
    case 0: a->linear[k] = exf_linear_new(m, name, in, out, given ? &ld : NULL); break;
    case 1:
    case 2: a->norm[k] = exf_norm_new(m, name, in, given ? &nd : NULL); break;
    case 3: keep_own(a, exf_embedding_new(m, name, in, out, std)); break;
    default: keep_own(a, exf_param_new(m, name, given ? &d : NULL)); break;
  }
}

static void call_module(api *a) {
  char buffer[300];
  const char *name = draw_name(a, buffer);
  exf_model *m = draw(a, 16) ? a->model : NULL;
  exf_block_desc b;
  exf_attn_desc at;
  size_t k = draw(a, N_LAYERS);
  memset(&b, 0, sizeof b);
  b.ffn = draw_ffn(a);
  b.width = draw_size(a);
  b.n_heads = draw_size(a);
  b.causal = (int)draw(a, 2);
  b.bias = (int)draw(a, 2);
  b.eps = draw_number(a);
  b.dropout = draw_number(a);
  b.drop_path = draw_number(a);
  b.names = (exf_names)draw(a, 3);
  at.width = b.width;
  at.n_heads = b.n_heads;
  at.causal = b.causal;
  at.bias = b.bias;
  at.init_std = at.init_std_out = b.eps;
  switch (draw(a, 3)) {
    case 0: a->ffn[k] = exf_ffn_new(m, name, draw(a, 16) ? &b.ffn : NULL); break;
    case 1:
      a->attn[k] = exf_attn_new(m, name, draw(a, 16) ? "proj" : NULL,
                                draw(a, 16) ? &at : NULL);
      break;
    default: a->block[k] = exf_block_new(m, name, draw(a, 16) ? &b : NULL); break;
  }
}

static void call_forward(api *a) {
  exf_tensor *x = draw_tensor(a), *th[EXF_N_PARTS];
  exf_kv *cache = draw(a, 2) ? a->kv : NULL;
  const exf_ffn *f = DRAW_LAYER(a, ffn);
  int i;
  switch (draw(a, 6)) {
    case 0: keep(a, exf_linear_forward(a->ctx, DRAW_LAYER(a, linear), x)); break;
    case 1: keep(a, exf_norm_forward(a->ctx, DRAW_LAYER(a, norm), x)); break;
    case 2: keep(a, exf_ffn_forward(a->ctx, f, x)); break;
    case 3: keep(a, exf_attn_forward(a->ctx, DRAW_LAYER(a, attn), x, cache)); break;
    case 4: keep(a, exf_block_forward(a->ctx, DRAW_LAYER(a, block), x, cache)); break;
    default:
      for (i = 0; i < EXF_N_PARTS; i++)
        th[i] = f && f->part[i] ? &f->part[i]->tensor : draw(a, 8) ? NULL : x;
      keep(a, exf_ffn_apply(a->ctx, f, x, draw(a, 16) ? th : NULL));
      break;
  }
}

/* Ends the life of expert tensors: what may point to them is let go. */
static void call_change(api *a) {
  exf_fusion_desc f = draw_fusion(a);
  exf_ffn *ffn = DRAW_LAYER(a, ffn);
  exf_model *m = draw(a, 16) ? a->model : NULL;
  const exf_fusion_desc *d = draw(a, 16) ? &f : NULL;
  call_rewind(a);
  switch (draw(a, 4)) {
    case 0: exf_ffn_upcycle(ffn, d); break;
    case 1: exf_ffn_merge(ffn); break;
    case 2: exf_model_upcycle(m, d); break;
    default: exf_model_merge(m); break;
  }
}

static exf_param *draw_param(api *a) {
  size_t n = exf_model_n_params(a->model);
  return exf_model_param(a->model, n && draw(a, 16) ? draw(a, 200) % n : n);
}

static void call_param(api *a) {
  static exf_real out[1 << 16];
  char buffer[300], buffer2[300];
  exf_param *p = draw_param(a);
  exf_tensor *t = p ? &p->tensor : NULL;
  const char *alias = draw_name(a, buffer), *name = draw_name(a, buffer2);
  size_t n = t && t->size <= 1 << 16 && draw(a, 8) ? t->size : 1;
  switch (draw(a, 7)) {
    case 0: exf_param_freeze(p, (int)draw(a, 2)); break;
    case 1: exf_param_alias(draw(a, 16) ? a->model : NULL, alias, name); break;
    case 2:
      if (t == NULL || t->size <= 1 << 16) exf_expert_grad(p, out);
      break;
    case 3: exf_model_zero_grad(draw(a, 16) ? a->model : NULL); break;
    case 4:
      (void)exf_ffn_tensor(DRAW_LAYER(a, ffn), name);
      (void)exf_ffn_param(DRAW_LAYER(a, ffn), name, NULL);
      (void)exf_model_find(a->model, name);
      (void)exf_model_count(a->model);
      (void)exf_model_count_merged(a->model);
      (void)exf_model_find(NULL, NULL);
      break;
    case 5: exf_param_set(p, draw(a, 8) ? out : NULL, n); break;
    default:
      if (t != NULL && t->size > 0 && draw(a, 4) == 0) t->data[0] = (exf_real)NAN;
      break;
  }
}

static void call_diagnose(api *a) {
  double w[64], r[64], d[64];
  exf_ffn *f = DRAW_LAYER(a, ffn);
  if (f != NULL && f->fusion.n_experts > 64) return;
  exf_ffn_diagnose(f, draw(a, 2) ? w : NULL, draw(a, 2) ? r : NULL,
                   draw(a, 2) ? d : NULL);
  (void)exf_model_ffn(a->model, draw(a, 4));
  (void)exf_model_n_ffns(a->model);
  (void)exf_notices(a->model, a->optim);
}

/* ---- training ---- */

static int every_other(const exf_param *p, void *user) {
  (void)user;
  return (int)(strlen(p->name) % 2);
}

static void call_optim(api *a) {
  exf_optim_desc d;
  double norm;
  memset(&d, 0, sizeof d);
  d.kind = (exf_optim_kind)draw(a, 3);
  d.beta1 = draw_number(a);
  d.beta2 = draw_number(a);
  d.eps = draw_number(a);
  d.weight_decay = draw_number(a);
  d.shared_moments = (int)draw(a, 2);
  d.momentum = draw_number(a);
  d.nesterov = (int)draw(a, 2);
  d.clip = draw_number(a);
  d.expert_norm = (int)draw(a, 2);
  d.allow_nonfinite = draw(a, 8) == 0;
  switch (draw(a, 5)) {
    case 0:
      exf_optim_free(a->optim);
      a->optim = exf_optim_new(draw(a, 16) ? a->model : NULL, draw(a, 16) ? &d : NULL);
      break;
    case 1: exf_optim_group(a->optim, draw(a, 8) ? every_other : NULL, NULL,
                            draw_number(a), draw_number(a));
      break;
    default: exf_optim_step(a->optim, draw_number(a), draw(a, 2) ? &norm : NULL); break;
  }
  (void)exf_optim_steps(a->optim);
}

static void call_ema(api *a) {
  switch (draw(a, 4)) {
    case 0:
      exf_ema_free(a->ema);
      a->ema = exf_ema_new(draw(a, 16) ? a->model : NULL, draw_number(a));
      break;
    case 1: exf_ema_update(a->ema); break;
    case 2: exf_ema_copy_from(a->ema, draw(a, 4) ? a->other : NULL); break;
    default: exf_ema_copy_to(a->ema, draw(a, 4) ? a->other : NULL); break;
  }
}

static void call_kv(api *a) {
  switch (draw(a, 3)) {
    case 0:
      exf_kv_free(a->kv);
      a->kv = exf_kv_new(a->ctx, draw_size(a), draw_size(a), draw_size(a));
      break;
    case 1: exf_kv_reset(a->kv); break;
    default: (void)exf_kv_length(a->kv); break;
  }
}

static void call_mode(api *a) {
  exf_ctx *c = draw(a, 16) ? a->ctx : NULL;
  int on = (int)draw(a, 2);
  switch (draw(a, 5)) {
    case 0: exf_training_set(c, on); break;
    case 1: exf_grad_set(c, on); break;
    case 2: exf_routing_set(c, on); break;
    case 3: exf_step_begin(c, draw_size(a)); break;
    default:
      MUST(exf_isa_name(exf_ctx_desc(c).isa) != NULL);
      MUST(exf_isa_name((exf_isa)draw(a, 8)) != NULL);
      (void)exf_ctx_stats(c).bytes;
      break;
  }
}

static void call_plain(api *a) {
  exf_schedule s;
  uint64_t key = draw_size(a);
  s.kind = (exf_schedule_kind)draw(a, 4);
  s.lr = draw_number(a);
  s.min_lr = draw_number(a);
  s.warmup = draw_size(a);
  s.steps = draw(a, 256);
  (void)exf_expert_decay(draw(a, 16) ? &s : NULL, draw_number(a));
  s.steps = draw_size(a);
  (void)exf_schedule_lr(draw(a, 16) ? &s : NULL, key);
  MUST(exf_variant_name((exf_variant)draw(a, 6)) != NULL);
  MUST(exf_status_name((exf_status)(draw(a, 16) - 2u)) != NULL);
  MUST(exf_rng_uniform(key, exf_rng_stream("s"), draw(a, 2), key) < 1);
  MUST(isfinite(exf_rng_normal(key, draw(a, 4), draw(a, 2), key)));
  exf_fail(draw(a, 16) ? a->ctx : NULL, draw(a, 4) ? EXF_OK : EXF_ARG, "%s", "said");
}

static exf_tensor *first_square(exf_ctx *ctx, void *user) {
  exf_param *p = exf_model_param((exf_model *)user, 0);
  return exf_mean(ctx, exf_square(ctx, p ? &p->tensor : NULL), EXF_ALL_AXES, 0);
}

static void call_gradcheck(api *a) {
  exf_gradcheck_report report;
  exf_model *m = draw(a, 16) ? a->model : NULL;
  double h = draw_number(a);
  call_rewind(a);
  if (exf_model_count(a->model) <= 64)
    exf_gradcheck(m, draw(a, 16) ? first_square : NULL, a->model, h,
                  draw(a, 16) ? &report : NULL);
}

/* ---- files ---- */

static void call_save(api *a) {
  exf_pair meta[2] = {{"k", "v"}, {"k", NULL}};
  const char *path = draw(a, 16) ? "file" : draw(a, 2) ? "" : NULL;
  size_t n = draw(a, 8) ? 0 : draw(a, 3);
  exf_model *m = draw(a, 16) ? a->model : NULL;
  exf_st_item item;
  exf_tensor *x = draw_tensor(a);
  unsigned char *data = NULL;
  size_t bytes;
  memset(&item, 0, sizeof item);
  item.name = draw(a, 4) ? "item" : NULL;
  item.shape = x ? x->shape : draw_shape(a);
  item.data = x ? x->data : NULL;
  disk_arm(&a->disk, draw(a, 8) ? 0 : draw(a, 8), (int)draw(a, 2),
           (disk_fault)draw(a, 4));
  switch (draw(a, 5)) {
    case 0: exf_model_save(m, path, draw(a, 16) ? meta : NULL, n); break;
    case 1: exf_checkpoint_save(m, a->optim, path, meta, n); break;
    case 2: exf_file_save(a->ctx, path, draw(a, 16) ? "text" : NULL, draw(a, 5)); break;
    case 3: exf_st_save(a->ctx, path, draw(a, 16) ? &item : NULL, 1, NULL, 0); break;
    default:
      exf_st_save_memory(a->ctx, &item, draw(a, 2), meta, n, draw(a, 16) ? &data : NULL,
                         &bytes);
      exf_st_free_memory(a->ctx, data);
      break;
  }
  a->disk.fail_at = 0;
  a->disk.next_fails = 0;
}

static void call_load(api *a) {
  const char *path = draw(a, 16) ? "file" : NULL;
  exf_st *st = exf_st_open(a->ctx, path, NULL);
  exf_model *m = draw(a, 2) ? a->model : a->other;
  exf_optim *o = m == a->model ? a->optim : NULL;
  exf_real out[4];
  exf_st_read(a->ctx, exf_st_get(st, draw(a, 3)), draw(a, 8) ? out : NULL, draw(a, 5));
  if (draw(a, 2)) exf_error_clear(a->ctx);
  switch (draw(a, 4)) {
    case 0: exf_model_load(m, path); break;
    case 1: exf_model_load_st(m, st); break;
    case 2: exf_checkpoint_load(m, o, path); break;
    default: exf_checkpoint_load_st(m, o, st); break;
  }
  exf_st_close(st);
}

/* ---- the program ---- */

typedef void (*call)(api *a);

static const call calls[] = {
  call_new, call_new, call_unary, call_binary, call_product, call_norm, call_scaled,
  call_shape, call_sum, call_choose, call_lookup, call_custom, call_attention,
  call_backward, call_rewind, call_layer, call_module, call_forward, call_forward,
  call_change, call_param, call_diagnose, call_optim, call_ema, call_kv, call_mode,
  call_save, call_load, call_plain, call_gradcheck};

static void end(api *a) {
  exf_kv_free(a->kv);
  exf_ema_free(a->ema);
  exf_optim_free(a->optim);
  exf_model_free(a->model);
  exf_model_free(a->other);
  exf_ctx_free(a->ctx);
  MUST(a->heap.n_live == 0 && a->heap.bytes == 0 && a->heap.n_bad == 0);
  MUST(a->disk.n_open == 0 && a->disk.n_bad == 0);
  disk_free(&a->disk);
}

/* Of any instruction set; that there is none is an error, but leaves a context. */
static exf_ctx *context(api *a, const exf_files *files) {
  exf_desc d;
  exf_ctx *ctx;
  memset(&d, 0, sizeof d);
  heap_use(&a->heap, &d);
  d.n_threads = 1;
  d.files = files;
  d.isa = (exf_isa)draw(a, 8);
  ctx = exf_ctx_new(&d);
  MUST(ctx != NULL);
  if (exf_ctx_status(ctx) != EXF_OK) fuzz_message(exf_error(ctx));
  exf_error_clear(ctx);
  return ctx;
}

static int fuzz_api(const uint8_t *data, size_t n) {
  static api a;
  exf_files files;
  int i;
  memset(&a, 0, sizeof a);
  files = disk_hooks(&a.disk);
  a.at = data;
  a.end = data + n;
  a.heap.limit = MEMORY_LIMIT;
  a.ctx = context(&a, &files);
  a.model = exf_model_new(a.ctx);
  a.other = exf_model_new(a.ctx);
  heap_arm(&a.heap, draw(&a, 4) ? 0 : draw(&a, 200), (int)draw(&a, 2));
  for (i = 0; i < MAX_CALLS && a.at < a.end; i++) {
    calls[draw(&a, sizeof calls / sizeof calls[0])](&a);
    if (exf_ctx_status(a.ctx) != EXF_OK) {
      fuzz_message(exf_error(a.ctx));
      if (draw(&a, 8)) exf_error_clear(a.ctx);
    }
  }
  end(&a);
  return 0;
}

FUZZ_MAIN(api)
