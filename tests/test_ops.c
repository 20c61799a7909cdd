/* Every op of the op table: gradients against central differences, values against plain
   loops written here. Built with EXF_DOUBLE, where the bars are tight, and once more in
   float, where the same recipes exercise the fast kernels on each instruction set. */
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"
#include "test.h"
#include "tiny_gpt.h"

#ifdef EXF_DOUBLE
#define BAR 1e-7            /* of the tensor's largest gradient */
#define BAR_RELATIVE 1e-5   /* of max(|g|, a thousandth of the largest) */
#define VALUE 1e-13
#else
#define BAR 1e-2
#define BAR_RELATIVE 1e30   /* float differences cannot see small gradients */
#define VALUE 2e-6
#endif

/* ---- recipes --------------------------------------------------------------------- */

#define MAX_PARAMS 64
typedef struct recipe recipe;
struct recipe {
  exf_model *model;
  exf_tensor *param[MAX_PARAMS];
  int n, next;             /* made so far; handed out in this call */
  exf_tensor *loss;        /* gathered in this call */
  uint32_t salt;
  exf_tensor *(*build)(exf_ctx *ctx, void *self);
  void (*body)(exf_ctx *ctx, recipe *r);
};

/* The next parameter of the recipe: made in the first call, the same one later. Values
   are uniform between lo and hi. */
static exf_tensor *P(recipe *r, exf_shape s, double lo, double hi) {
  exf_param_desc d;
  exf_tensor *t;
  char name[32];
  size_t i;
  int k = r->next++;
  if (k < r->n) return r->param[k];
  if (k >= MAX_PARAMS) return NULL;
  memset(&d, 0, sizeof d);
  d.shape = s;
  snprintf(name, sizeof name, "p%d", k);
  t = exf_param_new(r->model, name, &d);
  if (t == NULL) return NULL;
  for (i = 0; i < t->size; i++)
    t->data[i] = (exf_real)(lo + (hi - lo) * exf_rng_uniform(5, 2, (uint32_t)k, i));
  r->param[r->n++] = t;
  return t;
}

/* Loss += sum of y times fixed random numbers, so that no gradient is degenerate. */
static void W(exf_ctx *ctx, recipe *r, exf_tensor *y) {
  exf_tensor *c, *l;
  size_t i;
  if (y == NULL) { r->loss = NULL; return; }
  c = exf_tensor_new(ctx, y->shape, NULL);
  if (c == NULL) { r->loss = NULL; return; }
  r->salt++;
  for (i = 0; i < c->size; i++)
    c->data[i] = (exf_real)(0.2 + 0.8 * exf_rng_uniform(6, r->salt, 0, i)
                            * (exf_rng_u32(7, r->salt, 0, i) & 1 ? 1 : -1));
  l = exf_sum(ctx, exf_mul(ctx, y, c), EXF_ALL_AXES, 0);
  r->loss = r->salt == 1 ? l : exf_add(ctx, r->loss, l);
}

static exf_tensor *recipe_build(exf_ctx *ctx, void *self) {
  recipe *r = (recipe *)self;
  r->next = 0;
  r->salt = 0;
  r->loss = NULL;
  exf_step_begin(ctx, 3);   /* the same dropout in every call */
  r->body(ctx, r);
  return r->loss;
}

static exf_shape shape5(size_t a, size_t b, size_t c, size_t d, size_t e) {
  exf_shape s = exf_shape4(a, b, c, d);
  s.n = 5;
  s.dim[4] = e;
  return s;
}

static exf_tensor *attention(exf_ctx *ctx, exf_tensor *qkv, size_t n_heads, int causal,
                             exf_kv *cache) {
  exf_attention_desc d;
  memset(&d, 0, sizeof d);
  d.n_heads = n_heads;
  d.causal = causal;
  d.cache = cache;
  return exf_attention(ctx, qkv, &d);
}

typedef exf_tensor *(*binary_op)(exf_ctx *ctx, exf_tensor *a, exf_tensor *b);
typedef exf_tensor *(*unary_op)(exf_ctx *ctx, exf_tensor *x);

/* Both sides broadcast, one, none, and the same tensor on both sides. */
static void binary(exf_ctx *ctx, recipe *r, binary_op op) {
  exf_tensor *a;
  exf_shape s = exf_shape3(2, 3, 4);
  W(ctx, r, op(ctx, P(r, s, 0.5, 2), P(r, s, 0.5, 2)));
  W(ctx, r, op(ctx, P(r, exf_shape3(2, 3, 4), 0.5, 2), P(r, exf_shape1(4), 0.5, 2)));
  W(ctx, r, op(ctx, P(r, exf_shape1(4), 0.5, 2), P(r, exf_shape3(2, 3, 4), 0.5, 2)));
  W(ctx, r, op(ctx, P(r, exf_shape2(3, 1), 0.5, 2), P(r, exf_shape3(2, 1, 4), 0.5, 2)));
  W(ctx, r, op(ctx, P(r, exf_shape0(), 0.5, 2), P(r, exf_shape2(2, 3), 0.5, 2)));
  W(ctx, r, op(ctx, P(r, exf_shape2(2, 3), 0.5, 2), P(r, exf_shape0(), 0.5, 2)));
  W(ctx, r, op(ctx, P(r, shape5(2, 1, 3, 1, 2), 0.5, 2),
               P(r, exf_shape4(2, 1, 3, 1), 0.5, 2)));
  W(ctx, r, op(ctx, P(r, exf_shape2(5, 37), 0.5, 2), P(r, exf_shape2(5, 1), 0.5, 2)));
  a = P(r, exf_shape2(2, 3), 0.5, 2);
  W(ctx, r, op(ctx, a, a));
  W(ctx, r, op(ctx, exf_square(ctx, a), a));
}

static void unary(exf_ctx *ctx, recipe *r, unary_op op, double lo, double hi) {
  exf_tensor *a = P(r, exf_shape3(2, 3, 7), lo, hi), *y = op(ctx, a);
  W(ctx, r, y);
  W(ctx, r, exf_mul(ctx, y, y));     /* the result is used twice */
  W(ctx, r, op(ctx, P(r, exf_shape0(), lo, hi)));
  W(ctx, r, op(ctx, P(r, exf_shape1(37), lo, hi)));
}

static exf_tensor *scale_some(exf_ctx *ctx, exf_tensor *x) {
  return exf_scale(ctx, x, -1.75);
}

static void recipe_add(exf_ctx *ctx, recipe *r) { binary(ctx, r, exf_add); }
static void recipe_sub(exf_ctx *ctx, recipe *r) { binary(ctx, r, exf_sub); }
static void recipe_mul(exf_ctx *ctx, recipe *r) { binary(ctx, r, exf_mul); }
static void recipe_div(exf_ctx *ctx, recipe *r) { binary(ctx, r, exf_div); }
static void recipe_scale(exf_ctx *ctx, recipe *r) { unary(ctx, r, scale_some, -2, 2); }
static void recipe_neg(exf_ctx *ctx, recipe *r) { unary(ctx, r, exf_neg, -2, 2); }
static void recipe_exp(exf_ctx *ctx, recipe *r) { unary(ctx, r, exf_exp, -2, 1); }
static void recipe_log(exf_ctx *ctx, recipe *r) { unary(ctx, r, exf_log, 0.5, 3); }
static void recipe_tanh(exf_ctx *ctx, recipe *r) { unary(ctx, r, exf_tanh, -2, 2); }
static void recipe_sqrt(exf_ctx *ctx, recipe *r) { unary(ctx, r, exf_sqrt, 0.5, 3); }
static void recipe_square(exf_ctx *ctx, recipe *r) { unary(ctx, r, exf_square, -2, 2); }
static void recipe_gelu(exf_ctx *ctx, recipe *r) { unary(ctx, r, exf_gelu, -3, 3); }
static void recipe_gelu_tanh(exf_ctx *ctx, recipe *r) {
  unary(ctx, r, exf_gelu_tanh, -3, 3);
}
static void recipe_silu(exf_ctx *ctx, recipe *r) { unary(ctx, r, exf_silu, -3, 3); }

static void recipe_sigmoid(exf_ctx *ctx, recipe *r) { unary(ctx, r, exf_sigmoid, -3, 3); }

static void recipe_add_over(exf_ctx *ctx, recipe *r) {
  exf_tensor *a = P(r, exf_shape2(3, 7), -1, 1), *b = P(r, exf_shape2(3, 7), -1, 1);
  exf_tensor *y = exf__add_over(ctx, a, exf_tanh(ctx, b));
  W(ctx, r, y);
  W(ctx, r, exf__add_over(ctx, exf_square(ctx, y), exf_tanh(ctx, a)));
}

/* All of one shape, each side repeated, the mask too, and one tensor on both sides. */
static void recipe_where(exf_ctx *ctx, recipe *r) {
  static const exf_real bits[] = {1, 0, 0, -2, 1, 0, 1, 1, 0, 0, 0, 5,
                                  0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 0, 1};
  exf_shape s = exf_shape3(2, 3, 4);
  exf_tensor *whole = exf_tensor_new(ctx, s, bits), *a = P(r, s, -1, 1);
  exf_tensor *column = exf_tensor_new(ctx, exf_shape2(3, 1), bits);
  W(ctx, r, exf_where(ctx, whole, a, P(r, s, -1, 1)));
  W(ctx, r, exf_where(ctx, whole, P(r, exf_shape1(4), -1, 1), a));
  W(ctx, r, exf_where(ctx, whole, a, P(r, exf_shape2(3, 1), -1, 1)));
  W(ctx, r, exf_where(ctx, column, a, P(r, exf_shape0(), -1, 1)));
  W(ctx, r, exf_where(ctx, column, P(r, exf_shape1(4), -1, 1),
                      P(r, exf_shape3(2, 1, 1), -1, 1)));
  W(ctx, r, exf_where(ctx, whole, a, exf_square(ctx, a)));
  W(ctx, r, exf_where(ctx, a, P(r, s, -1, 1), a));         /* the mask itself gets none */
}

/* Both sides of the kink, and nothing near it. */
static void recipe_abs(exf_ctx *ctx, recipe *r) {
  exf_tensor *a = P(r, exf_shape2(3, 7), 0.1, 2), *both[2];
  both[0] = a;
  both[1] = exf_neg(ctx, exf_square(ctx, a));
  W(ctx, r, exf_abs(ctx, exf_concat(ctx, both, 2, 0)));
  W(ctx, r, exf_abs(ctx, a));
}

/* Within, above and below. */
static void recipe_clamp(exf_ctx *ctx, recipe *r) {
  exf_tensor *a = P(r, exf_shape2(3, 7), 0.1, 0.9), *all[3], *y;
  all[0] = a;
  all[1] = exf_add(ctx, a, exf_ones(ctx, exf_shape0()));
  all[2] = exf_sub(ctx, a, exf_ones(ctx, exf_shape0()));
  y = exf_clamp(ctx, exf_concat(ctx, all, 3, 0), 0, 1);
  W(ctx, r, y);
  W(ctx, r, exf_mul(ctx, y, y));
  W(ctx, r, exf_clamp(ctx, a, -INFINITY, INFINITY));
}

/* Both sides of the kink, and nothing near it. */
static void recipe_relu(exf_ctx *ctx, recipe *r) {
  exf_tensor *a = P(r, exf_shape2(3, 7), 0.1, 2), *b = P(r, exf_shape2(3, 7), 0.1, 2);
  exf_tensor *n = exf_neg(ctx, b), *both[2];
  both[0] = a;
  both[1] = exf_mul(ctx, n, a);
  W(ctx, r, exf_relu(ctx, a));
  W(ctx, r, exf_relu(ctx, exf_concat(ctx, both, 2, 0)));
  W(ctx, r, exf_add(ctx, exf_relu(ctx, n), b));
}

static void recipe_matmul(exf_ctx *ctx, recipe *r) {
  for (int f = 0; f < 4; f++) {        /* f: the flags */
    int ta = f & EXF_TRANSPOSE_A, tb = f & EXF_TRANSPOSE_B;
    exf_shape a2 = ta ? exf_shape2(4, 3) : exf_shape2(3, 4);
    exf_shape b2 = tb ? exf_shape2(5, 4) : exf_shape2(4, 5);
    exf_shape a3 = exf_shape3(2, a2.dim[0], a2.dim[1]);
    exf_shape b3 = exf_shape3(2, b2.dim[0], b2.dim[1]);
    exf_shape a4 = exf_shape4(2, 2, a2.dim[0], a2.dim[1]);
    exf_shape b4 = exf_shape4(2, 2, b2.dim[0], b2.dim[1]);
    W(ctx, r, exf_matmul(ctx, P(r, a2, -1, 1), P(r, b2, -1, 1), f));
    W(ctx, r, exf_matmul(ctx, P(r, a3, -1, 1), P(r, b3, -1, 1), f));
    W(ctx, r, exf_matmul(ctx, P(r, a3, -1, 1), P(r, b2, -1, 1), f));
    W(ctx, r, exf_matmul(ctx, P(r, a2, -1, 1), P(r, b3, -1, 1), f));
    W(ctx, r, exf_matmul(ctx, P(r, a4, -1, 1), P(r, b4, -1, 1), f));
  }
  {
    exf_tensor *s = P(r, exf_shape2(3, 3), -1, 1);
    W(ctx, r, exf_matmul(ctx, s, s, EXF_TRANSPOSE_B));   /* one tensor on both sides */
    W(ctx, r, exf_matmul(ctx, P(r, exf_shape2(1, 9), -1, 1),
                         P(r, exf_shape2(9, 1), -1, 1), 0));
  }
}

static void recipe_linear(exf_ctx *ctx, recipe *r) {
  exf_tensor *x = P(r, exf_shape3(2, 3, 4), -1, 1), *w = P(r, exf_shape2(5, 4), -1, 1);
  exf_tensor *sq = P(r, exf_shape2(4, 4), -1, 1), *b = P(r, exf_shape1(4), -1, 1), *y;
  W(ctx, r, exf_linear(ctx, x, w, NULL));
  W(ctx, r, exf_linear(ctx, x, w, P(r, exf_shape1(5), -1, 1)));
  W(ctx, r, exf_linear(ctx, P(r, exf_shape2(3, 4), -1, 1), w, NULL));
  y = exf_linear(ctx, exf_tanh(ctx, exf_linear(ctx, x, sq, b)), sq, b); /* w, b twice */
  W(ctx, r, y);
  W(ctx, r, exf__linear_of(ctx, y, EXF__U_GELU, w, NULL));
  W(ctx, r, y);                                      /* the first gradient y receives */
  W(ctx, r, exf_linear(ctx, P(r, exf_shape2(1, 4), -1, 1), sq, b));
}

static void rows(exf_ctx *ctx, recipe *r, unary_op op) {
  W(ctx, r, op(ctx, P(r, exf_shape3(2, 3, 5), -2, 2)));
  W(ctx, r, op(ctx, P(r, exf_shape1(7), -2, 2)));
  W(ctx, r, op(ctx, P(r, exf_shape2(2, 37), -2, 2)));
}
static void recipe_softmax(exf_ctx *ctx, recipe *r) { rows(ctx, r, exf_softmax); }
static void recipe_log_softmax(exf_ctx *ctx, recipe *r) { rows(ctx, r, exf_log_softmax); }

static void recipe_layernorm(exf_ctx *ctx, recipe *r) {
  exf_tensor *x = P(r, exf_shape3(2, 3, 5), -2, 2), *w = P(r, exf_shape1(5), 0.5, 2);
  W(ctx, r, exf_layernorm(ctx, x, w, NULL, 1e-5));
  W(ctx, r, exf_layernorm(ctx, x, w, P(r, exf_shape1(5), -1, 1), 1e-2));
  W(ctx, r, exf_layernorm(ctx, P(r, exf_shape2(40, 3), -2, 2),
                          P(r, exf_shape1(3), 0.5, 2), P(r, exf_shape1(3), -1, 1), 1e-3));
  W(ctx, r, exf_layernorm(ctx, P(r, exf_shape2(2, 37), -2, 2),
                          P(r, exf_shape1(37), 0.5, 2), NULL, 1e-5));
}

static void recipe_rmsnorm(exf_ctx *ctx, recipe *r) {
  exf_tensor *x = P(r, exf_shape3(2, 3, 5), -2, 2), *w = P(r, exf_shape1(5), 0.5, 2);
  W(ctx, r, exf_rmsnorm(ctx, x, w, 1e-5));
  W(ctx, r, exf_rmsnorm(ctx, P(r, exf_shape2(2, 37), -2, 2),
                        P(r, exf_shape1(37), 0.5, 2), 1e-2));
}

static void recipe_embedding(exf_ctx *ctx, recipe *r) {
  static const int32_t ids[8] = {3, 0, 3, 3, 1, 0, 4, 1};
  exf_tensor *t = P(r, exf_shape2(5, 3), -1, 1);
  W(ctx, r, exf_embedding(ctx, t, ids, 2, 4));
  W(ctx, r, exf_embedding(ctx, t, ids + 2, 5, 0));
}

/* Rows of any shape: once, repeatedly, and not at all. */
static void recipe_gather(exf_ctx *ctx, recipe *r) {
  static const int32_t ids[7] = {3, 0, 3, 3, 1, 0, 2};
  exf_tensor *x = P(r, exf_shape3(5, 2, 3), -1, 1);
  W(ctx, r, exf_gather(ctx, x, ids, 7));
  W(ctx, r, exf_square(ctx, exf_gather(ctx, x, ids + 3, 2)));
  W(ctx, r, exf_gather(ctx, P(r, exf_shape1(4), -1, 1), ids, 7));
  W(ctx, r, exf_gather(ctx, exf_tanh(ctx, P(r, exf_shape2(4, 3), -1, 1)), ids, 7));
}

static void recipe_dropout(exf_ctx *ctx, recipe *r) {
  exf_tensor *x = P(r, exf_shape3(2, 10, 5), -1, 1), *y;
  int before = exf_training_set(ctx, 1);
  y = exf_dropout(ctx, x, 0.4);
  W(ctx, r, y);
  W(ctx, r, exf_dropout(ctx, exf_tanh(ctx, x), 0.1));
  W(ctx, r, exf_dropout(ctx, x, 0));
  exf_training_set(ctx, 0);
  W(ctx, r, exf_dropout(ctx, x, 0.4));
  exf_training_set(ctx, before);
}

/* A view's gradient joins what reaches the tensor directly. */
static void recipe_reshape(exf_ctx *ctx, recipe *r) {
  exf_tensor *x = P(r, exf_shape2(4, 6), -1, 1), *h = exf_tanh(ctx, x);
  W(ctx, r, exf_reshape(ctx, x, exf_shape3(2, 3, 4)));
  W(ctx, r, exf_square(ctx, exf_reshape(ctx, h, exf_shape1(24))));
  W(ctx, r, h);
  W(ctx, r, exf_mul(ctx, exf_reshape(ctx, h, exf_shape2(6, 4)),
                    exf_reshape(ctx, exf_reshape(ctx, h, exf_shape1(24)),
                                exf_shape2(6, 4))));
  W(ctx, r, exf_reshape(ctx, P(r, exf_shape0(), -1, 1), exf_shape2(1, 1)));
}

static void recipe_permute(exf_ctx *ctx, recipe *r) {
  static const int three[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2},
                                  {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
  static const int five[5] = {3, 0, 4, 1, 2}, two[2] = {1, 0};
  exf_tensor *x = P(r, exf_shape3(2, 3, 4), -1, 1);
  int i;
  for (i = 0; i < 6; i++) W(ctx, r, exf_permute(ctx, x, three[i]));
  W(ctx, r, exf_permute(ctx, P(r, shape5(2, 1, 3, 2, 2), -1, 1), five));
  W(ctx, r, exf_permute(ctx, P(r, exf_shape2(3, 19), -1, 1), two));
}

static void recipe_concat(exf_ctx *ctx, recipe *r) {
  int axis;
  for (axis = 0; axis < 3; axis++) {
    exf_shape s = exf_shape3(2, 3, 2), u = s;
    exf_tensor *x[3];
    u.dim[axis] = 4;
    x[0] = P(r, s, -1, 1);
    x[1] = P(r, u, -1, 1);
    x[2] = x[0];
    W(ctx, r, exf_concat(ctx, x, 3, axis));
    W(ctx, r, exf_concat(ctx, x, 2, axis));
    W(ctx, r, exf_concat(ctx, x, 1, axis));
  }
}

static void recipe_slice(exf_ctx *ctx, recipe *r) {
  exf_tensor *x = P(r, exf_shape3(3, 4, 5), -1, 1);
  int axis;
  for (axis = 0; axis < 3; axis++) {
    size_t n = x ? x->shape.dim[axis] : 0;
    W(ctx, r, exf_slice(ctx, x, axis, 1, 3));
    W(ctx, r, exf_slice(ctx, x, axis, 0, 1));
    W(ctx, r, exf_slice(ctx, x, axis, 2, n));
    W(ctx, r, exf_slice(ctx, x, axis, 0, n));
  }
}

static void reduce(exf_ctx *ctx, recipe *r, double most,
                   exf_tensor *(*op)(exf_ctx *, exf_tensor *, unsigned, int)) {
  exf_tensor *x = P(r, exf_shape3(3, 2, 4), -most, most);
  unsigned axes;
  for (axes = 1; axes < 8; axes++) {
    W(ctx, r, op(ctx, x, axes, 0));
    W(ctx, r, exf_square(ctx, op(ctx, x, axes, 1)));
  }
  W(ctx, r, op(ctx, x, EXF_ALL_AXES, 0));
  W(ctx, r, op(ctx, exf_square(ctx, x), EXF_ALL_AXES, 1));
  W(ctx, r, op(ctx, P(r, exf_shape2(2, 37), -most, most), EXF_AXIS(1), 0));
}
static void recipe_sum(exf_ctx *ctx, recipe *r) { reduce(ctx, r, 1, exf_sum); }
static void recipe_mean(exf_ctx *ctx, recipe *r) { reduce(ctx, r, 1, exf_mean); }

/* Numbers far from each other, in no order: no difference changes which is largest. */
static exf_tensor *spaced_max(exf_ctx *ctx, exf_tensor *x, unsigned axes, int keep) {
  exf_tensor *far = exf_tensor_new(ctx, x->shape, NULL);
  for (size_t i = 0; far && i < far->size; i++)
    far->data[i] = (exf_real)(0.15 * (double)(i * 7 % 37) - 2.7);
  return exf_max(ctx, exf_add(ctx, x, far), axes, keep);
}
static void recipe_max(exf_ctx *ctx, recipe *r) { reduce(ctx, r, 0.05, spaced_max); }

static void recipe_cross_entropy(exf_ctx *ctx, recipe *r) {
  static const int32_t labels[6] = {3, -1, 0, 6, -100, 3};
  static const int32_t none[6] = {-1, -1, -1, -1, -1, -1};
  exf_tensor *x = P(r, exf_shape2(6, 7), -2, 2), *y = P(r, exf_shape3(2, 3, 7), -2, 2);
  W(ctx, r, exf_cross_entropy(ctx, x, labels, 0));
  W(ctx, r, exf_cross_entropy(ctx, x, labels, 0.1));
  W(ctx, r, exf_cross_entropy(ctx, y, labels, 0.3));
  W(ctx, r, exf_cross_entropy(ctx, exf_tanh(ctx, y), labels, 0));
  W(ctx, r, exf_cross_entropy(ctx, x, none, 0.1));
  W(ctx, r, exf_cross_entropy(ctx, P(r, exf_shape2(2, 37), -2, 2), labels + 2, 0.1));
}

static void recipe_attention(exf_ctx *ctx, recipe *r) {
  size_t heads;
  int causal;
  exf_tensor *x = P(r, exf_shape3(2, 5, 18), -1.5, 1.5);
  exf_tensor *tall = P(r, exf_shape3(1, 35, 6), -1.5, 1.5);
  for (causal = 0; causal < 2; causal++) {
    for (heads = 1; heads <= 3; heads++)
      W(ctx, r, attention(ctx, x, heads, causal, NULL));
    W(ctx, r, attention(ctx, tall, 1, causal, NULL));     /* more than one query block */
    W(ctx, r, attention(ctx, exf_tanh(ctx, x), 6, causal, NULL));
  }
  W(ctx, r, attention(ctx, P(r, exf_shape3(2, 1, 6), -1, 1), 2, 1, NULL));
  W(ctx, r, exf_attention(ctx, x, NULL));               /* one head, not causal */
}

static void recipe_fuse(exf_ctx *ctx, recipe *r) {
  exf_tensor *a = P(r, exf_shape1(3), -1, 1), *e = P(r, exf_shape3(3, 2, 5), -1, 1);
  exf_tensor *y = exf_fuse(ctx, a, e);
  W(ctx, r, y);
  W(ctx, r, exf_square(ctx, y));
  W(ctx, r, exf_fuse(ctx, exf_softmax(ctx, a), P(r, exf_shape2(3, 37), -1, 1)));
  W(ctx, r, exf_fuse(ctx, P(r, exf_shape1(1), -1, 1), P(r, exf_shape2(1, 4), -1, 1)));
}

/* y_i = x_i^2 w_i + s x_i, s from the user pointer */
static void custom_forward(void *user, const exf_tensor *const *in, exf_real *out) {
  exf_real s = *(const exf_real *)user;
  size_t i;
  for (i = 0; i < in[0]->size; i++) {
    exf_real x = in[0]->data[i];
    out[i] = x * x * in[1]->data[i] + s * x;
  }
}
static void custom_backward(void *user, const exf_tensor *const *in,
                            const exf_tensor *out, const exf_real *dout,
                            exf_real *const *din) {
  exf_real s = *(const exf_real *)user;
  size_t i;
  for (i = 0; i < out->size; i++) {
    exf_real x = in[0]->data[i], w = in[1]->data[i];
    if (din[0] != NULL) din[0][i] += (2 * x * w + s) * dout[i];
    if (din[1] != NULL) din[1][i] += x * x * dout[i];
  }
}
static void recipe_custom(exf_ctx *ctx, recipe *r) {
  static exf_real factor = (exf_real)1.5;
  exf_custom_desc d;
  exf_tensor *in[2], *x = P(r, exf_shape2(3, 4), -1, 1);
  exf_real w[12];
  int i;
  for (i = 0; i < 12; i++) w[i] = (exf_real)(0.1 * i - 0.5);
  memset(&d, 0, sizeof d);
  d.name = "square_and_scale";
  d.out = exf_shape2(3, 4);
  d.forward = custom_forward;
  d.backward = custom_backward;
  d.user = &factor;
  in[0] = x;
  in[1] = P(r, exf_shape2(3, 4), -1, 1);
  W(ctx, r, exf_custom(ctx, &d, in, 2));
  in[1] = exf_tensor_new(ctx, d.out, w);   /* needs no gradient */
  W(ctx, r, exf_custom(ctx, &d, in, 2));
  in[1] = x;
  W(ctx, r, exf_custom(ctx, &d, in, 2));
}

/* ---- the op table: an op without a recipe does not compile ----------------------- */

typedef struct row {
  const char *name;
  void (*body)(exf_ctx *ctx, recipe *r);
} row;
#define ROW(name) {#name, recipe_##name},
static const row table[] = {EXF__OPS(ROW)};
#undef ROW
#define N_OPS (sizeof table / sizeof table[0])

static void report(const char *name, const exf_gradcheck_report *g) {
  if (!(g->worst <= BAR) || !(g->worst_relative <= BAR_RELATIVE) || !(g->largest > 0))
    printf("  %s: worst %.3g, relative %.3g at %s, largest %.3g, %lu numbers\n", name,
           g->worst, g->worst_relative, g->where, g->largest,
           (unsigned long)g->n_checked);
}

static void check_recipe(const row *op, exf_isa isa) {
  exf_gradcheck_report g;
  exf_desc desc;
  exf_ctx *ctx;
  recipe r;
  int grad;
  memset(&desc, 0, sizeof desc);
  memset(&r, 0, sizeof r);
  memset(&g, 0, sizeof g);
  desc.isa = isa;
  desc.n_threads = 2;
  ctx = exf_ctx_new(&desc);
  r.model = exf_model_new(ctx);
  r.body = op->body;
  grad = exf_grad_set(ctx, 0);
  recipe_build(ctx, &r);      /* makes the parameters */
  exf_rewind(ctx);
  exf_grad_set(ctx, grad);
  CHECK_OK(ctx);
  if (CHECK(exf_gradcheck(r.model, recipe_build, &r, 0, &g) == EXF_OK)) {
    report(op->name, &g);
    CHECK(g.worst <= BAR);
    CHECK(g.worst_relative <= BAR_RELATIVE);
    CHECK(g.largest > 0);
    CHECK(g.n_checked == exf_model_count(r.model));
  } else {
    printf("  %s: %s\n", op->name, exf_error(ctx));
  }
  exf_model_free(r.model);
  exf_ctx_free(ctx);
}

/* The instruction sets of this machine, the reference first. */
static int isas(exf_isa *out) {
  static const exf_isa all[] = {EXF_ISA_REF, EXF_ISA_SSE2, EXF_ISA_AVX2, EXF_ISA_AVX512,
                                EXF_ISA_NEON};
  int n = 0;
  for (int i = 0; i < 5; i++) {
    exf_desc d;
    memset(&d, 0, sizeof d);
    d.isa = all[i];
    exf_ctx *ctx = exf_ctx_new(&d);
    if (exf_ctx_status(ctx) == EXF_OK) out[n++] = all[i];
    exf_ctx_free(ctx);
  }
  return n;
}

static const row *current;
static void gradient_of_op(void) {
  exf_isa list[8];
  int i, n = isas(list);
  for (i = 0; i < n; i++) check_recipe(current, list[i]);
}

/* ---- gradients of whole models --------------------------------------------------- */

typedef struct whole {
  tiny_gpt gpt;
  int32_t ids[16], labels[16];
} whole;

static exf_tensor *whole_loss(exf_ctx *ctx, void *user) {
  whole *w = (whole *)user;
  exf_step_begin(ctx, 3);
  return tiny_loss(ctx, &w->gpt, w->ids, w->labels, 2, 4);
}

/* Four-point differences of width 1e-4: at 1e-3 the curvature of LayerNorm over six
   numbers shows (an error that falls sixteenfold with every halving). */
#define WIDTH 1e-4

#define EXF__X(name, text) text,
static const char *const act_names[] = {EXF_ACT_LIST(EXF__X)};
#undef EXF__X

static void check_whole(int variant, int bias, exf_act act, double dropout, double h) {
  exf_gradcheck_report g;
  tiny_desc d = tiny_defaults();
  exf_ctx *ctx = exf_ctx_new(NULL);
  whole w;
  char name[64];
  size_t i, j;
  d.width = 6;
  d.hidden = 7;
  d.vocab = 5;
  d.block = 4;
  d.bias = bias;
  d.init_std = 0.5;
  d.act = act;
  d.dropout = dropout;
  d.fusion = tiny_variant(variant, 3);
  d.fusion.mu = 0.5;
  memset(&w, 0, sizeof w);
  memset(&g, 0, sizeof g);
  w.gpt = tiny_new(ctx, &d);
  tiny_batch(&w.gpt, 0, 2, 4, w.ids, w.labels);
  w.labels[3] = -1;
  /* biases, norms and the router away from their plain starts */
  for (i = 0; i < exf_model_n_params(w.gpt.model); i++) {
    exf_tensor *t = &exf_model_param(w.gpt.model, i)->tensor;
    for (j = 0; j < t->size; j++)
      t->data[j] += (exf_real)(0.25 * exf_rng_normal(8, (uint32_t)i, 0, j));
  }
  exf_training_set(ctx, 1);
  snprintf(name, sizeof name, "%s, bias %d, %s, dropout %g", tiny_variant_names[variant],
           bias, act_names[act], dropout);
  if (CHECK(exf_gradcheck(w.gpt.model, whole_loss, &w, h, &g) == EXF_OK)) {
    report(name, &g);
    CHECK(g.worst <= BAR);
    CHECK(g.worst_relative <= BAR_RELATIVE);
    CHECK(g.largest > 0);
    CHECK(g.n_checked == exf_model_count(w.gpt.model));
  } else {
    printf("  %s: %s\n", name, exf_error(ctx));
  }
  exf_model_free(w.gpt.model);
  exf_ctx_free(ctx);
}

/* The sum passes one block of gradient to both sides; then a alone gets more. */
TEST(gradient_shared_by_two_inputs_is_not_changed_for_both) {
  static const exf_real c[3] = {2, 3, 5};
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_tensor *a = exf_grad_keep(ctx, exf_tensor_new(ctx, exf_shape1(3), c));
  exf_tensor *b = exf_grad_keep(ctx, exf_tensor_new(ctx, exf_shape1(3), c));
  exf_tensor *w = exf_mul(ctx, a, exf_tensor_new(ctx, exf_shape1(3), c));
  exf_tensor *z = exf_add(ctx, a, b);
  int i;
  CHECK(exf_backward(ctx, exf_sum(ctx, exf_add(ctx, w, z), 1, 0)) == EXF_OK);
  for (i = 0; i < 3 && CHECK(a->grad && b->grad); i++)
    CHECK(a->grad[i] == 1 + c[i] && b->grad[i] == 1);
  exf_ctx_free(ctx);
}

#ifdef EXF_DOUBLE
/* Plain mb detaches the router's input, which differences cannot see: variant 4 is left
   out, 5 and 6 have it attached. */
TEST(gradient_of_whole_gpt_with_each_variant) {
  int v, bias;
  for (v = 0; v < TINY_N_VARIANTS; v++)
    for (bias = 0; bias < 2; bias++)
      if (v != 4) check_whole(v, bias, EXF_GELU, 0, WIDTH);
}
TEST(gradient_of_whole_gpt_with_each_activation) {
  int v;
  for (v = 0; v <= 6; v += 3) {    /* dense, dw softmax, mb routed */
    check_whole(v, 1, EXF_GELU_TANH, 0, WIDTH);
    check_whole(v, 1, EXF_SILU, 0, WIDTH);
    check_whole(v, 1, EXF_SWIGLU, 0, WIDTH);
    check_whole(v, 0, EXF_SWIGLU, 0, WIDTH);
    check_whole(v, 1, EXF_RELU, 0, 1e-5);  /* narrow: no kink between the four points */
  }
}
TEST(gradient_of_whole_gpt_with_dropout) {
  check_whole(0, 1, EXF_GELU, 0.2, WIDTH);
  check_whole(2, 0, EXF_GELU, 0.2, WIDTH);
}

/* With the router's input detached, everything but what lies before the last FFN's router
   keeps its exact gradient: a model of one FFN whose input is no parameter. */
typedef struct lone {
  exf_ffn *ffn;
  exf_real x[15];
} lone;
static exf_tensor *lone_loss(exf_ctx *ctx, void *user) {
  lone *l = (lone *)user;
  exf_tensor *x = exf_tensor_new(ctx, exf_shape2(3, 5), l->x);
  return exf_sum(ctx, exf_square(ctx, exf_ffn_forward(ctx, l->ffn, x)), EXF_ALL_AXES, 0);
}
TEST(gradient_of_detached_memory_bank_ffn) {
  int routed;
  for (routed = 0; routed < 2; routed++) {
    exf_ctx *ctx = exf_ctx_new(NULL);
    exf_model *m = exf_model_new(ctx);
    exf_gradcheck_report g;
    exf_ffn_desc d;
    lone l;
    size_t i;
    memset(&d, 0, sizeof d);
    d.width = 5;
    d.hidden = 6;
    d.bias = 1;
    d.fusion.variant = EXF_MB;
    d.fusion.n_experts = 3;
    d.fusion.routed = routed;
    l.ffn = exf_ffn_new(m, "ffn", &d);
    for (i = 0; i < 15; i++) l.x[i] = (exf_real)exf_rng_normal(4, 0, 0, i);
    exf_training_set(ctx, 1);
    memset(&g, 0, sizeof g);
    CHECK(exf_gradcheck(m, lone_loss, &l, 0, &g) == EXF_OK);
    report("lone ffn", &g);
    CHECK(g.worst <= BAR);
    CHECK(g.worst_relative <= BAR_RELATIVE);
    CHECK(g.largest > 0);
    CHECK_OK(ctx);
    exf_model_free(m);
    exf_ctx_free(ctx);
  }
}
#endif

/* gradcheck itself must be able to fail: a custom op with a wrong backward. */
static void wrong_backward(void *user, const exf_tensor *const *in, const exf_tensor *out,
                           const exf_real *dout, exf_real *const *din) {
  size_t i;
  (void)user;
  (void)in;
  for (i = 0; i < out->size; i++)
    if (din[0] != NULL) din[0][i] += (exf_real)1.1 * dout[i];
}
static void same_forward(void *user, const exf_tensor *const *in, exf_real *out) {
  (void)user;
  memcpy(out, in[0]->data, in[0]->size * sizeof *out);
}
static void recipe_wrong(exf_ctx *ctx, recipe *r) {
  exf_custom_desc d;
  exf_tensor *in[1];
  memset(&d, 0, sizeof d);
  d.name = "wrong";
  d.out = exf_shape1(4);
  d.forward = same_forward;
  d.backward = wrong_backward;
  in[0] = P(r, d.out, -1, 1);
  W(ctx, r, exf_custom(ctx, &d, in, 1));
}
TEST(gradcheck_sees_a_wrong_backward) {
  exf_gradcheck_report g;
  exf_ctx *ctx = exf_ctx_new(NULL);
  recipe r;
  memset(&r, 0, sizeof r);
  memset(&g, 0, sizeof g);
  r.model = exf_model_new(ctx);
  r.body = recipe_wrong;
  recipe_build(ctx, &r);
  exf_rewind(ctx);
  CHECK(exf_gradcheck(r.model, recipe_build, &r, 0, &g) == EXF_OK);
  CHECK(g.worst > 0.05);
  CHECK(g.worst_relative > 0.05);
  CHECK(strstr(g.where, "p0") != NULL);
  CHECK(exf_gradcheck(NULL, recipe_build, &r, 0, &g) == EXF_ARG);
  CHECK(exf_gradcheck(r.model, recipe_build, &r, 0, NULL) == EXF_ARG);
  CHECK_ERR(ctx, EXF_ARG, "report is NULL");
  exf_model_free(r.model);
  exf_ctx_free(ctx);
}

static void nan_backward(void *user, const exf_tensor *const *in, const exf_tensor *out,
                         const exf_real *dout, exf_real *const *din) {
  size_t i;
  (void)user;
  (void)in;
  for (i = 0; i < out->size; i++)
    if (din[0] != NULL) din[0][i] += i == 1 ? (exf_real)NAN : dout[i];
}
static void recipe_nan(exf_ctx *ctx, recipe *r) {
  exf_custom_desc d;
  exf_tensor *in[1];
  memset(&d, 0, sizeof d);
  d.name = "nan";
  d.out = exf_shape1(4);
  d.forward = same_forward;
  d.backward = nan_backward;
  in[0] = P(r, d.out, -1, 1);
  W(ctx, r, exf_custom(ctx, &d, in, 1));
  W(ctx, r, exf_square(ctx, P(r, d.out, -1, 1)));   /* and sound numbers after it */
}
TEST(gradcheck_sees_a_nan) {
  exf_gradcheck_report g;
  exf_ctx *ctx = exf_ctx_new(NULL);
  recipe r;
  memset(&r, 0, sizeof r);
  memset(&g, 0, sizeof g);
  r.model = exf_model_new(ctx);
  r.body = recipe_nan;
  recipe_build(ctx, &r);
  exf_rewind(ctx);
  if (exf_gradcheck(r.model, recipe_build, &r, 0, &g) == EXF_OK) {
    CHECK(!(g.worst <= 1));
    CHECK(!(g.worst_relative <= 1));
  } else {
    CHECK(exf_ctx_status(ctx) == EXF_NUMERIC);
  }
  exf_model_free(r.model);
  exf_ctx_free(ctx);
}

/* ---- values against plain loops -------------------------------------------------- */

static exf_tensor *noise(exf_ctx *ctx, exf_shape s, uint32_t salt, double scale) {
  exf_tensor *t = exf_tensor_new(ctx, s, NULL);
  size_t i;
  for (i = 0; t != NULL && i < t->size; i++)
    t->data[i] = (exf_real)(scale * exf_rng_normal(11, salt, 0, i));
  return t;
}

/* One context per instruction set for a value test. */
static void on_each_isa(void (*test)(exf_ctx *ctx)) {
  exf_isa list[8];
  int i, n = isas(list);
  for (i = 0; i < n; i++) {
    exf_desc d;
    exf_ctx *ctx;
    memset(&d, 0, sizeof d);
    d.isa = list[i];
    d.n_threads = 2;
    ctx = exf_ctx_new(&d);
    test(ctx);
    CHECK_OK(ctx);
    exf_ctx_free(ctx);
  }
}

static void matmul_case(exf_ctx *ctx, size_t B, size_t m, size_t n, size_t k, int flags,
                        int batched_b) {
  int ta = flags & EXF_TRANSPOSE_A, tb = flags & EXF_TRANSPOSE_B;
  exf_tensor *a = noise(ctx, ta ? exf_shape3(B, k, m) : exf_shape3(B, m, k), 1, 1);
  exf_tensor *b = batched_b
    ? noise(ctx, tb ? exf_shape3(B, n, k) : exf_shape3(B, k, n), 2, 1)
    : noise(ctx, tb ? exf_shape2(n, k) : exf_shape2(k, n), 2, 1);
  exf_tensor *c = exf_matmul(ctx, a, b, flags);
  size_t s, i, j, l, bad = 0;
  if (!CHECK(c != NULL)) return;
  CHECK(c->shape.n == 3 && c->shape.dim[0] == B && c->shape.dim[1] == m
        && c->shape.dim[2] == n);
  for (s = 0; s < B; s++)
    for (i = 0; i < m; i++)
      for (j = 0; j < n; j++) {
        const exf_real *as = a->data + s * m * k;
        const exf_real *bs = b->data + (batched_b ? s * n * k : 0);
        double sum = 0, size = 0, got = (double)c->data[(s * m + i) * n + j];
        for (l = 0; l < k; l++) {
          double t = (double)as[ta ? l * m + i : i * k + l]
                   * (double)bs[tb ? j * k + l : l * n + j];
          sum += t;
          size += fabs(t);
        }
        if (!(fabs(got - sum) <= VALUE * (size + 1e-30))) bad++;
      }
  CHECK(bad == 0);
  exf_rewind(ctx);
}
static void matmul_values_in(exf_ctx *ctx) {
  static const size_t size[][3] = {{1, 1, 1}, {1, 65, 128}, {3, 4, 5}, {13, 33, 7},
                                   {48, 65, 128}, {64, 64, 32}, {31, 17, 300},
                                   {130, 70, 520}, {5, 1, 9}};
  size_t i;
  int f;
  for (i = 0; i < sizeof size / sizeof size[0]; i++)
    for (f = 0; f < 8; f++)
      matmul_case(ctx, f & 4 ? 1 : 2, size[i][0], size[i][1], size[i][2], f & 3,
                  f & 4 ? 0 : 1);
}
TEST(matmul_values) { on_each_isa(matmul_values_in); }

static void linear_values_in(exf_ctx *ctx) {
  exf_tensor *x = noise(ctx, exf_shape3(2, 9, 31), 1, 1);
  exf_tensor *w = noise(ctx, exf_shape2(18, 31), 2, 1);
  exf_tensor *b = noise(ctx, exf_shape1(18), 3, 1);
  exf_tensor *y = exf_linear(ctx, x, w, b);
  size_t r, j, l;
  if (!CHECK(y != NULL)) return;
  CHECK(y->shape.n == 3 && y->shape.dim[0] == 2 && y->shape.dim[1] == 9
        && y->shape.dim[2] == 18);
  for (r = 0; r < 18; r++)
    for (j = 0; j < 18; j++) {
      double s = (double)b->data[j];
      for (l = 0; l < 31; l++)
        s += (double)x->data[r * 31 + l] * (double)w->data[j * 31 + l];
      CHECK_NEAR(y->data[r * 18 + j], s, 20 * VALUE);
    }
  exf_rewind(ctx);
}
TEST(linear_values) { on_each_isa(linear_values_in); }

/* y, dx and dw of f(x) W^T in one op and in two. keep: 1 x, 2 w has a gradient; 4: x has
   another one already. */
static void linear_of_function(exf_ctx *ctx, int keep, int f, exf_real *out) {
  static exf_tensor *(*const functions[])(exf_ctx *, exf_tensor *) = {
    exf_gelu, exf_gelu_tanh, exf_relu, exf_silu};
  static const exf__unary_op kinds[] = {EXF__U_GELU, EXF__U_GELU_TANH, EXF__U_RELU,
                                        EXF__U_SILU};
  exf_tensor *x = noise(ctx, exf_shape2(27, 31), 1, 1), *y;
  exf_tensor *w = noise(ctx, exf_shape2(18, 31), 2, 1);
  exf_tensor *weights = noise(ctx, exf_shape2(27, 18), 3, 1), *loss;
  if (keep & 1) exf_grad_keep(ctx, x);
  if (keep & 2) exf_grad_keep(ctx, w);
  if (f < 4) y = exf_linear(ctx, functions[f](ctx, x), w, NULL);
  else y = exf__linear_of(ctx, x, kinds[f - 4], w, NULL);
  loss = exf_sum(ctx, exf_mul(ctx, y, weights), EXF_ALL_AXES, 0);
  if (keep & 4)
    loss = exf_add(ctx, loss, exf_sum(ctx, exf_mul(ctx, x, x), EXF_ALL_AXES, 0));
  if (!CHECK(exf_backward(ctx, loss) == EXF_OK)) return;
  memcpy(out, y->data, y->size * sizeof *out);
  out += y->size;
  if (keep & 1) memcpy(out, x->grad, x->size * sizeof *out);
  out += x->size;
  if (keep & 2) memcpy(out, w->grad, w->size * sizeof *out);
  exf_rewind(ctx);
}

static void linear_of_function_in(exf_ctx *ctx) {
  static exf_real two[27 * 18 + 27 * 31 + 18 * 31], one[27 * 18 + 27 * 31 + 18 * 31];
  static const int keeps[] = {1, 2, 3, 5, 7};
  int i, f;
  for (f = 0; f < 4; f++)
    for (i = 0; i < 5; i++) {
      memset(one, 0, sizeof one);
      memset(two, 0, sizeof two);
      linear_of_function(ctx, keeps[i], f, two);
      linear_of_function(ctx, keeps[i], f + 4, one);
      CHECK(memcmp(one, two, sizeof one) == 0 && one[0] != 0);
    }
}
TEST(linear_of_a_function_is_both_ops) { on_each_isa(linear_of_function_in); }

static void softmax_values_in(exf_ctx *ctx) {
  static const size_t width[] = {1, 2, 15, 16, 17, 65, 300};
  size_t c, i, j;
  for (c = 0; c < sizeof width / sizeof width[0]; c++) {
    size_t n = width[c];
    exf_tensor *x = noise(ctx, exf_shape2(5, n), 1, 3);
    exf_tensor *y = exf_softmax(ctx, x), *z = exf_log_softmax(ctx, x);
    if (!CHECK(y != NULL && z != NULL)) return;
    for (i = 0; i < 5; i++) {
      const exf_real *row_x = x->data + i * n;
      double m = -1e300, s = 0;
      for (j = 0; j < n; j++) m = m > (double)row_x[j] ? m : (double)row_x[j];
      for (j = 0; j < n; j++) s += exp((double)row_x[j] - m);
      for (j = 0; j < n; j++) {
        CHECK_NEAR(y->data[i * n + j], exp((double)row_x[j] - m) / s, VALUE);
        CHECK_NEAR(z->data[i * n + j], (double)row_x[j] - m - log(s), 20 * VALUE);
      }
    }
    exf_rewind(ctx);
  }
}
TEST(softmax_values) { on_each_isa(softmax_values_in); }

static void softmax_edges_in(exf_ctx *ctx) {
  static const size_t n = 19;
  exf_tensor *x = noise(ctx, exf_shape2(3, n), 1, 1), *y;
  size_t j;
  double s = 0;
  for (j = 0; j < n; j++) x->data[j] = (exf_real)-INFINITY;       /* no finite entry */
  for (j = 0; j < n; j++) if (j != 7) x->data[n + j] = (exf_real)-INFINITY;
  for (j = 0; j < n; j++) x->data[2 * n + j] += (exf_real)5000;     /* large numbers */
  y = exf_softmax(ctx, x);
  if (!CHECK(y != NULL)) return;
  for (j = 0; j < n; j++) {
    CHECK(y->data[j] == 0);
    CHECK(y->data[n + j] == (exf_real)(j == 7));
    s += (double)y->data[2 * n + j];
  }
  CHECK_NEAR(s, 1, 10 * VALUE);
  exf_rewind(ctx);
}
TEST(softmax_of_infinite_rows) { on_each_isa(softmax_edges_in); }

static void norm_values_in(exf_ctx *ctx) {
  static const size_t width[] = {1, 3, 16, 17, 96, 128, 333};
  size_t c, i, j;
  for (c = 0; c < sizeof width / sizeof width[0]; c++) {
    size_t n = width[c];
    double eps = 1e-3;
    exf_tensor *x = noise(ctx, exf_shape3(2, 2, n), 1, 2);
    exf_tensor *w = noise(ctx, exf_shape1(n), 2, 1), *b = noise(ctx, exf_shape1(n), 3, 1);
    exf_tensor *y = exf_layernorm(ctx, x, w, b, eps);
    exf_tensor *p = exf_layernorm(ctx, x, w, NULL, eps), *q = exf_rmsnorm(ctx, x, w, eps);
    if (!CHECK(y != NULL && p != NULL && q != NULL)) return;
    for (i = 0; i < 4; i++) {
      const exf_real *row_x = x->data + i * n;
      double mean = 0, var = 0, square = 0;
      for (j = 0; j < n; j++) mean += (double)row_x[j] / (double)n;
      for (j = 0; j < n; j++) {
        double d = (double)row_x[j] - mean;
        var += d * d / (double)n;
        square += (double)row_x[j] * (double)row_x[j] / (double)n;
      }
      for (j = 0; j < n; j++) {
        double v = ((double)row_x[j] - mean) / sqrt(var + eps) * (double)w->data[j];
        CHECK_NEAR(p->data[i * n + j], v, 20 * VALUE);
        CHECK_NEAR(y->data[i * n + j], v + (double)b->data[j], 20 * VALUE);
        CHECK_NEAR(q->data[i * n + j],
                   (double)row_x[j] / sqrt(square + eps) * (double)w->data[j],
                   20 * VALUE);
      }
    }
    exf_rewind(ctx);
  }
}
TEST(norm_values) { on_each_isa(norm_values_in); }

static void cross_entropy_case(exf_ctx *ctx, size_t V, double smooth) {
  static const int32_t labels[6] = {1, -1, 0, 1, -7, 0};
  exf_tensor *x = noise(ctx, exf_shape3(2, 3, V), 1, 2);
  exf_tensor *l = exf_cross_entropy(ctx, x, labels, smooth);
  double total = 0;
  size_t i, j;
  for (i = 0; i < 6; i++) {
    const exf_real *z = x->data + i * V;
    double m = -1e300, s = 0;
    if (labels[i] < 0) continue;
    for (j = 0; j < V; j++) m = m > (double)z[j] ? m : (double)z[j];
    for (j = 0; j < V; j++) s += exp((double)z[j] - m);
    for (j = 0; j < V; j++) {
      double q = (1 - smooth) * (j == (size_t)labels[i]) + smooth / (double)V;
      total -= q * ((double)z[j] - m - log(s));
    }
  }
  CHECK_NEAR(exf_item(l), total / 4, 20 * VALUE);
  exf_rewind(ctx);
}
static void cross_entropy_values_in(exf_ctx *ctx) {
  static const int32_t none[2] = {-1, -1};
  cross_entropy_case(ctx, 2, 0);
  cross_entropy_case(ctx, 10, 0);
  cross_entropy_case(ctx, 10, 0.1);
  cross_entropy_case(ctx, 65, 0.25);
  CHECK(exf_item(exf_cross_entropy(ctx, noise(ctx, exf_shape2(2, 3), 1, 1), none, 0))
        == 0);
  exf_rewind(ctx);
}
TEST(cross_entropy_values) { on_each_isa(cross_entropy_values_in); }

static void attention_case(exf_ctx *ctx, size_t B, size_t T, size_t C, size_t H,
                           int causal) {
  exf_tensor *x = noise(ctx, exf_shape3(B, T, 3 * C), 1, 1);
  exf_tensor *y = attention(ctx, x, H, causal, NULL);
  size_t b, h, t, s, j, d = C / H, bad = 0;
  double p[128];
  if (!CHECK(y != NULL)) return;
  CHECK(y->shape.n == 3 && y->shape.dim[1] == T && y->shape.dim[2] == C);
  for (b = 0; b < B; b++)
    for (h = 0; h < H; h++)
      for (t = 0; t < T; t++) {
        const exf_real *q = x->data + (b * T + t) * 3 * C + h * d;
        size_t seen = causal ? t + 1 : T;
        double sum = 0;
        for (s = 0; s < seen; s++) {
          const exf_real *k = x->data + (b * T + s) * 3 * C + C + h * d;
          double dot = 0;
          for (j = 0; j < d; j++) dot += (double)q[j] * (double)k[j];
          p[s] = exp(dot / sqrt((double)d));
          sum += p[s];
        }
        for (j = 0; j < d; j++) {
          double v = 0;
          for (s = 0; s < seen; s++)
            v += p[s] / sum * (double)x->data[(b * T + s) * 3 * C + 2 * C + h * d + j];
          v -= (double)y->data[(b * T + t) * C + h * d + j];
          if (!(fabs(v) <= 10 * VALUE)) bad++;
        }
      }
  CHECK(bad == 0);
  exf_rewind(ctx);
}
static void attention_values_in(exf_ctx *ctx) {
  int causal;
  for (causal = 0; causal < 2; causal++) {
    attention_case(ctx, 2, 5, 6, 3, causal);
    attention_case(ctx, 1, 1, 4, 1, causal);
    attention_case(ctx, 2, 33, 12, 2, causal);
    attention_case(ctx, 1, 64, 64, 2, causal);
    attention_case(ctx, 1, 100, 10, 1, causal);
  }
}
TEST(attention_values) { on_each_isa(attention_values_in); }

/* ---- attention with a cache ------------------------------------------------------ */

/* Two layers, positions in passes of these lengths: the bits of the whole sequence. */
static void cache_case(exf_ctx *ctx, size_t C, size_t H, const size_t *lengths, int n) {
  size_t T = 0, at = 0, bad = 0;
  exf_tensor *x[2], *full[2], *y;
  exf_kv *kv;
  for (int i = 0; i < n; i++) T += lengths[i];
  kv = exf_kv_new(ctx, 2, T, C);
  for (int l = 0; l < 2; l++) {
    x[l] = noise(ctx, exf_shape3(1, T, 3 * C), (uint32_t)l, 1);
    full[l] = attention(ctx, x[l], H, 1, NULL);
  }
  for (int i = 0; i < n; i++) {
    CHECK(exf_kv_length(kv) == at);
    for (int l = 0; l < 2; l++) {
      y = attention(ctx, exf_slice(ctx, x[l], 1, at, at + lengths[i]), H, 1, kv);
      if (!CHECK(y != NULL && y->size == lengths[i] * C)) return;
      CHECK(exf_kv_length(kv) == at + (l ? lengths[i] : 0));
      if (y->size && memcmp(y->data, full[l]->data + at * C, y->size * sizeof *y->data))
        bad++;
    }
    at += lengths[i];
  }
  CHECK(bad == 0 && at == T);
  exf_kv_free(kv);
  exf_rewind(ctx);
}
static void cache_values_in(exf_ctx *ctx) {
  static const size_t ones[5] = {1, 1, 1, 1, 1}, some[4] = {33, 1, 0, 70}, all[1] = {64};
  cache_case(ctx, 6, 3, ones, 5);
  cache_case(ctx, 64, 4, some, 4);
  cache_case(ctx, 10, 1, all, 1);
}
TEST(attention_with_a_cache_equals_the_whole) { on_each_isa(cache_values_in); }

#define QKV(b, t, c) exf_tensor_new(ctx, exf_shape3(b, t, 3 * (c)), NULL)
TEST(caches_refuse_what_does_not_fit) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_kv *kv = exf_kv_new(ctx, 2, 5, 4);
  exf_tensor *leaf;
  CHECK(attention(ctx, QKV(1, 1, 4), 2, 0, kv) == NULL);
  CHECK_ERR(ctx, EXF_ARG, "not causal: a cache would hide later positions");
  CHECK(attention(ctx, QKV(2, 1, 4), 2, 1, kv) == NULL);
  CHECK_ERR(ctx, EXF_SHAPE, "attention: qkv (2,1,12)");
  CHECK(attention(ctx, QKV(1, 1, 8), 2, 1, kv) == NULL);
  CHECK_ERR(ctx, EXF_SHAPE, "the cache needs (1,t,12)");
  CHECK(attention(ctx, QKV(1, 6, 4), 2, 1, kv) == NULL);
  CHECK_ERR(ctx, EXF_SHAPE, "room for t positions after 0 of 5");
  CHECK(attention(ctx, QKV(1, 1, 4), 3, 1, kv) == NULL);
  CHECK_ERR(ctx, EXF_SHAPE, "width 4 is not divisible by 3 heads");
  leaf = exf_grad_keep(ctx, QKV(1, 1, 4));
  CHECK(attention(ctx, leaf, 2, 1, kv) == NULL);
  CHECK_ERR(ctx, EXF_SHAPE, "in a no-grad scope");
  exf_grad_set(ctx, 0);
  CHECK(attention(ctx, leaf, 2, 1, kv) != NULL);
  exf_grad_set(ctx, 1);
  CHECK(exf_kv_length(kv) == 0);                     /* one of two layers */
  CHECK(attention(ctx, QKV(1, 2, 4), 2, 1, kv) == NULL);
  CHECK_ERR(ctx, EXF_STATE, "2 new positions in layer 1, but 1");
  CHECK(attention(ctx, QKV(1, 1, 4), 2, 1, kv) != NULL);
  CHECK(exf_kv_length(kv) == 1);
  CHECK(attention(ctx, QKV(1, 2, 4), 2, 1, kv) != NULL);     /* a pass given up */
  exf_kv_reset(kv);
  CHECK(exf_kv_length(kv) == 0);
  for (int l = 0; l < 2; l++) CHECK(attention(ctx, QKV(1, 5, 4), 2, 1, kv) != NULL);
  CHECK(exf_kv_length(kv) == 5);
  CHECK(attention(ctx, QKV(1, 1, 4), 2, 1, kv) == NULL);
  CHECK_ERR(ctx, EXF_SHAPE, "after 5 of 5");
  exf_kv_free(kv);
  CHECK(exf_kv_new(ctx, 0, 5, 4) == NULL);
  CHECK_ERR(ctx, EXF_SIZE, "do not make a cache");
  CHECK(exf_kv_new(ctx, 2, (size_t)-1, 4) == NULL);
  CHECK_ERR(ctx, EXF_SIZE, "do not make a cache");
  exf_kv_free(NULL);
  exf_kv_reset(NULL);
  CHECK(exf_kv_length(NULL) == 0);
  exf_ctx_free(ctx);
}

/* ---- sampling -------------------------------------------------------------------- */

/* The same choice by plain loops, in double. */
static int32_t choose(const exf_real *logits, size_t size, const exf_sample_desc *s,
                      uint64_t index) {
  int32_t order[256] = {0};
  double p[256], total = 0, mass = 0, draw;
  size_t n = 0, kept = s->top_k && s->top_k < size ? s->top_k : size, i;
  for (i = 0; i < size; i++) {    /* by falling logit, then rising token */
    size_t j = i;
    for (; j > 0 && logits[order[j - 1]] < logits[i]; j--) order[j] = order[j - 1];
    order[j] = (int32_t)i;
  }
  if (!(s->temperature > 0)) return order[0];
  for (i = 0; i < kept; i++) {
    double d = (double)logits[order[i]] - (double)logits[order[0]];
    p[i] = exp(d / s->temperature);
    total += p[i];
  }
  while (n < kept && (n == 0 || mass < s->top_p * total)) mass += p[n++];
  draw = mass * exf_rng_uniform(s->seed, exf_rng_stream("sample"), 0, index);
  for (i = 0; i + 1 < n && draw >= p[i]; i++) draw -= p[i];
  return order[i];
}
TEST(samples_are_those_of_plain_loops) {
  static const double temperatures[] = {0.3, 0.8, 1, 2, EXF_ZERO};
  static const double shares[] = {0.1, 0.5, 0.9, 1};
  static const size_t counts[] = {0, 1, 5, 65, 300};
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_tensor *x = noise(ctx, exf_shape3(2, 3, 65), 1, 2);
  exf_real *last = x->data + 5 * 65;
  size_t bad = 0, seen = 0, drawn[65] = {0};
  last[7] = last[8] = last[50];             /* equal ones */
  last[20] = (exf_real)-INFINITY;
  for (int t = 0; t < 5; t++)
    for (int k = 0; k < 5; k++)
      for (int q = 0; q < 4; q++)
        for (uint64_t i = 0; i < 50; i++) {
          exf_sample_desc d = {temperatures[t], counts[k], shares[q], 9};
          int32_t token = exf_sample(ctx, x, &d, i);
          bad += token != choose(last, 65, &d, i);
          if (CHECK(token >= 0 && token < 65)) drawn[token]++;
        }
  CHECK(bad == 0);
  for (int i = 0; i < 65; i++) seen += drawn[i] > 0;
  CHECK(seen > 20 && drawn[20] == 0);
  CHECK_OK(ctx);
  exf_ctx_free(ctx);
}

/* Each token comes as often as its probability says; the defaults are T = 1, all. */
TEST(samples_follow_the_distribution) {
  static const exf_real p[4] = {(exf_real)0.1, (exf_real)0.4, (exf_real)0.3,
                                (exf_real)0.2};
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_tensor *x = exf_log(ctx, exf_tensor_new(ctx, exf_shape1(4), p));
  double n[4] = {0}, m[4] = {0};
  exf_sample_desc d;
  memset(&d, 0, sizeof d);
  d.top_p = 0.6;
  for (uint64_t i = 0; i < 20000; i++) {
    n[exf_sample(ctx, x, NULL, i)]++;
    m[exf_sample(ctx, x, &d, i)]++;
    exf_rewind(ctx);
    x = exf_log(ctx, exf_tensor_new(ctx, exf_shape1(4), p));
  }
  for (int i = 0; i < 4; i++) CHECK_NEAR(n[i] / 20000, p[i], 0.015);
  CHECK(m[0] == 0 && m[3] == 0);
  CHECK_NEAR(m[1] / 20000, 4.0 / 7, 0.015);
  d.seed = 1;
  d.top_p = 0;
  CHECK(exf_sample(ctx, x, &d, 3) == exf_sample(ctx, x, &d, 3));
  CHECK_OK(ctx);
  exf_ctx_free(ctx);
}

static void refuse_sample(exf_ctx *ctx, double temperature, double top_p,
                          const char *part) {
  exf_tensor *x = exf_ones(ctx, exf_shape1(4));
  exf_sample_desc d;
  memset(&d, 0, sizeof d);
  d.temperature = temperature;
  d.top_p = top_p;
  CHECK(exf_sample(ctx, x, &d, 0) == -1);
  CHECK_ERR(ctx, EXF_ARG, part);
}
TEST(samples_of_nonsense_are_refused) {
  static const exf_real bad[][3] = {
    {1, (exf_real)NAN, 2}, {1, (exf_real)INFINITY, 2},
    {(exf_real)-INFINITY, (exf_real)-INFINITY, (exf_real)-INFINITY}};
  static const char *const why[] = {"nan", "is inf", "is -inf"};
  exf_ctx *ctx = exf_ctx_new(NULL);
  refuse_sample(ctx, -0.5, 0, "sample: temperature -0.5");
  refuse_sample(ctx, NAN, 0, "sample: temperature");
  refuse_sample(ctx, INFINITY, 0, "sample: temperature");
  refuse_sample(ctx, 1, -1, "sample: top_p -1");
  refuse_sample(ctx, 1, 1.5, "sample: top_p 1.5");
  refuse_sample(ctx, EXF_ZERO, NAN, "sample: top_p");
  for (int i = 0; i < 3; i++) {
    CHECK(exf_sample(ctx, exf_tensor_new(ctx, exf_shape1(3), bad[i]), NULL, 0) == -1);
    CHECK_ERR(ctx, EXF_NUMERIC, why[i]);
  }
  CHECK(exf_sample(ctx, NULL, NULL, 0) == -1);
  CHECK_ERR(ctx, EXF_SHAPE, "sample: logits NULL");
  CHECK(exf_sample(ctx, exf_ones(ctx, exf_shape0()), NULL, 0) == -1);
  CHECK_ERR(ctx, EXF_SHAPE, "sample: logits ()");
  CHECK(exf_sample(ctx, exf_ones(ctx, exf_shape2(0, 3)), NULL, 0) == -1);
  CHECK_ERR(ctx, EXF_SHAPE, "sample: logits (0,3)");
  CHECK(exf_sample(NULL, NULL, NULL, 0) == -1);
  exf_ctx_free(ctx);
}

/* Where element i of a tensor of shape so comes from, in one of shape s that is repeated
   to fill it. */
static size_t source(size_t i, exf_shape so, exf_shape s) {
  size_t at = 0, step = 1;
  for (int k = 1; k <= so.n; k++) {     /* from the last axis to the first */
    size_t index = i % so.dim[so.n - k];
    i /= so.dim[so.n - k];
    if (k > s.n) continue;
    if (s.dim[s.n - k] != 1) at += index * step;
    step *= s.dim[s.n - k];
  }
  return at;
}

static void broadcast_case(exf_ctx *ctx, exf_shape sa, exf_shape sb, exf_shape so) {
  exf_tensor *a = noise(ctx, sa, 1, 1), *b = noise(ctx, sb, 2, 1), *y[4];
  size_t bad = 0;
  y[0] = exf_add(ctx, a, b);
  y[1] = exf_sub(ctx, a, b);
  y[2] = exf_mul(ctx, a, b);
  y[3] = exf_div(ctx, a, b);
  for (int f = 0; f < 4; f++) {
    if (!CHECK(y[f] != NULL)) return;
    CHECK(y[f]->shape.n == so.n);
    for (int k = 0; k < so.n; k++) CHECK(y[f]->shape.dim[k] == so.dim[k]);
    for (size_t i = 0; i < y[f]->size; i++) {
      exf_real u = a->data[source(i, so, sa)], v = b->data[source(i, so, sb)];
      exf_real want = f == 0 ? u + v : f == 1 ? u - v : f == 2 ? u * v : u / v;
      if (y[f]->data[i] != want) bad++;
    }
  }
  CHECK(bad == 0);
  exf_rewind(ctx);
}
static void broadcast_values_in(exf_ctx *ctx) {
  exf_shape s234 = exf_shape3(2, 3, 4);
  broadcast_case(ctx, s234, s234, s234);
  broadcast_case(ctx, s234, exf_shape1(4), s234);
  broadcast_case(ctx, exf_shape1(4), s234, s234);
  broadcast_case(ctx, s234, exf_shape0(), s234);
  broadcast_case(ctx, exf_shape0(), s234, s234);
  broadcast_case(ctx, exf_shape0(), exf_shape0(), exf_shape0());
  broadcast_case(ctx, exf_shape2(3, 1), exf_shape3(2, 1, 4), s234);
  broadcast_case(ctx, exf_shape3(2, 3, 1), exf_shape2(1, 4), s234);
  broadcast_case(ctx, shape5(2, 1, 3, 1, 5), exf_shape4(4, 1, 6, 1),
                 shape5(2, 4, 3, 6, 5));
  broadcast_case(ctx, exf_shape2(70, 33), exf_shape2(70, 1), exf_shape2(70, 33));
}
TEST(broadcasting_is_numpys) { on_each_isa(broadcast_values_in); }

/* Gradients of a product with a repeated side, in double: g_k = sum of dy times the other
   number, over all copies of k. Large enough for several threads. */
static void broadcast_gradient_case(exf_ctx *ctx, exf_shape sa, exf_shape sb) {
  exf_tensor *a = exf_grad_keep(ctx, noise(ctx, sa, 1, 1)), *y, *w;
  exf_tensor *b = exf_grad_keep(ctx, noise(ctx, sb, 2, 1));
  y = exf_mul(ctx, a, b);
  if (!CHECK(y != NULL)) return;
  w = noise(ctx, y->shape, 3, 1);
  CHECK(exf_backward(ctx, exf_sum(ctx, exf_mul(ctx, y, w), EXF_ALL_AXES, 0)) == EXF_OK);
  for (int side = 0; side < 2; side++) {
    exf_tensor *t = side ? b : a, *other = side ? a : b;
    double *sum = (double *)calloc(2 * t->size, sizeof *sum), *size = sum + t->size;
    size_t bad = 0;
    for (size_t i = 0; i < y->size; i++) {
      size_t at = source(i, y->shape, t->shape);
      double d = (double)w->data[i]
                 * (double)other->data[source(i, y->shape, other->shape)];
      sum[at] += d;
      size[at] += fabs(d);
    }
    for (size_t i = 0; i < t->size; i++)
      if (!(fabs((double)t->grad[i] - sum[i]) <= 100 * VALUE * size[i])) bad++;
    CHECK(bad == 0);
    free(sum);
  }
  exf_rewind(ctx);
}
static void broadcast_gradients_in(exf_ctx *ctx) {
  broadcast_gradient_case(ctx, exf_shape2(600, 700), exf_shape2(600, 700));
  broadcast_gradient_case(ctx, exf_shape2(600, 700), exf_shape1(700));
  broadcast_gradient_case(ctx, exf_shape2(600, 1), exf_shape2(600, 700));
  broadcast_gradient_case(ctx, exf_shape3(20, 1, 30), exf_shape3(20, 40, 1));
  broadcast_gradient_case(ctx, exf_shape0(), exf_shape1(1025));
  broadcast_gradient_case(ctx, exf_shape1(1025), exf_shape1(1025));
}
TEST(broadcast_gradients) { on_each_isa(broadcast_gradients_in); }

static void where_case(exf_ctx *ctx, exf_shape sm, exf_shape sa, exf_shape sb,
                       exf_shape so) {
  exf_tensor *m = noise(ctx, sm, 1, 1), *a = noise(ctx, sa, 2, 1), *y;
  exf_tensor *b = noise(ctx, sb, 3, 1);
  size_t bad = 0;
  for (size_t i = 0; i < m->size; i++) m->data[i] = m->data[i] > 0 ? m->data[i] : 0;
  if (m->size > 1) m->data[m->size - 1] = (exf_real)NAN;      /* not 0 */
  y = exf_where(ctx, m, a, b);
  if (!CHECK(y != NULL && y->shape.n == so.n)) return;
  for (int k = 0; k < so.n; k++) CHECK(y->shape.dim[k] == so.dim[k]);
  for (size_t i = 0; i < y->size; i++)
    if (y->data[i] != (m->data[source(i, so, sm)] != 0 ? a->data[source(i, so, sa)]
                                                       : b->data[source(i, so, sb)]))
      bad++;
  CHECK(bad == 0);
  exf_rewind(ctx);
}
static void where_values_in(exf_ctx *ctx) {
  exf_shape s = exf_shape3(20, 30, 40), one = exf_shape0();
  exf_tensor *x, *y, *z;
  where_case(ctx, s, s, s, s);
  where_case(ctx, exf_shape2(30, 1), exf_shape1(40), exf_shape3(20, 1, 1), s);
  where_case(ctx, one, s, one, s);
  where_case(ctx, s, one, one, s);
  where_case(ctx, exf_shape2(600, 700), exf_shape2(600, 700), exf_shape1(700),
             exf_shape2(600, 700));
  /* a masked fill, with a gradient for what stays alone */
  x = exf_grad_keep(ctx, noise(ctx, exf_shape1(10), 1, 1));
  y = exf_tensor_new(ctx, exf_shape1(10), NULL);
  for (size_t i = 0; i < 10; i++) y->data[i] = (exf_real)(i % 3 == 0);
  z = exf_where(ctx, exf_grad_keep(ctx, y), exf_full(ctx, one, -9), x);
  CHECK(exf_backward(ctx, exf_sum(ctx, z, EXF_ALL_AXES, 0)) == EXF_OK);
  CHECK(y->grad == NULL);
  for (size_t i = 0; i < 10; i++) {
    CHECK(z->data[i] == (i % 3 == 0 ? (exf_real)-9 : x->data[i]));
    CHECK(x->grad[i] == (exf_real)(i % 3 != 0));
  }
  exf_rewind(ctx);
  x = noise(ctx, exf_shape1(3), 1, 1);
  CHECK(exf_where(ctx, x, noise(ctx, exf_shape2(2, 3), 1, 1),
                  noise(ctx, exf_shape2(3, 3), 1, 1)) == NULL);
  CHECK_ERR(ctx, EXF_SHAPE, "where: (2,3) and (3,3): axes must be equal or 1");
  CHECK(exf_where(ctx, x, x, NULL) == NULL);
  CHECK_ERR(ctx, EXF_ARG, "where: input 2 is NULL");
}
TEST(where_values) { on_each_isa(where_values_in); }

static void activation_values_in(exf_ctx *ctx) {
  exf_tensor *x = noise(ctx, exf_shape1(1003), 1, 2), *y[8];
  size_t i;
  int f;
  y[0] = exf_relu(ctx, x);
  y[1] = exf_gelu(ctx, x);
  y[2] = exf_gelu_tanh(ctx, x);
  y[3] = exf_silu(ctx, x);
  y[4] = exf_exp(ctx, x);
  y[5] = exf_tanh(ctx, x);
  y[6] = exf_log(ctx, y[4]);
  y[7] = exf_sqrt(ctx, y[4]);
  for (f = 0; f < 8; f++) if (!CHECK(y[f] != NULL)) return;
  for (i = 0; i < x->size; i++) {
    double v = (double)x->data[i], e = (double)y[4]->data[i];
    double inner = sqrt(2 / 3.14159265358979323846) * (v + 0.044715 * v * v * v);
    double tol = VALUE * (1 + fabs(v));
    CHECK((double)y[0]->data[i] == (v > 0 ? v : 0));
    CHECK_NEAR(y[1]->data[i], 0.5 * v * (1 + erf(v / sqrt(2.0))), tol);
    CHECK_NEAR(y[2]->data[i], 0.5 * v * (1 + tanh(inner)), tol);
    CHECK_NEAR(y[3]->data[i], v / (1 + exp(-v)), tol);
    CHECK_NEAR(y[4]->data[i], exp(v), VALUE * exp(v));
    CHECK_NEAR(y[5]->data[i], tanh(v), VALUE);
    CHECK_NEAR(y[6]->data[i], log(e), tol);
    CHECK_NEAR(y[7]->data[i], sqrt(e), VALUE * sqrt(e));
  }
  exf_rewind(ctx);
}
TEST(activation_values) { on_each_isa(activation_values_in); }

/* Of one thread or more, and of what is no number. */
static void plain_values_in(exf_ctx *ctx) {
  exf_tensor *x = noise(ctx, exf_shape2(300, 701), 1, 2), *y[4];
  static const exf_real odd[] = {(exf_real)NAN, (exf_real)INFINITY, (exf_real)-INFINITY,
                                 (exf_real)-0.0, 0, -1, 2, 3};
  size_t bad = 0;
  memcpy(x->data, odd, sizeof odd);
  y[0] = exf_abs(ctx, exf_grad_keep(ctx, x));
  y[1] = exf_clamp(ctx, x, -1, 2);
  y[2] = exf_sigmoid(ctx, x);
  y[3] = exf_clamp(ctx, x, 0.5, 0.5);
  for (int f = 0; f < 4; f++) if (!CHECK(y[f] != NULL)) return;
  for (size_t i = 1; i < x->size; i++) {
    double v = (double)x->data[i];
    if ((double)y[0]->data[i] != fabs(v)) bad++;
    if ((double)y[1]->data[i] != (v < -1 ? -1 : v > 2 ? 2 : v)) bad++;
    if (y[3]->data[i] != (exf_real)0.5) bad++;
    if (!(fabs((double)y[2]->data[i] - 1 / (1 + exp(-v))) <= 2 * VALUE)) bad++;
  }
  CHECK(bad == 0);
  for (int f = 0; f < 4; f++) CHECK(y[f]->data[0] != y[f]->data[0]);
  CHECK(exf_backward(ctx, exf_sum(ctx, exf_slice(ctx, exf_add(ctx, y[0], y[1]), 1, 3, 8),
                                  EXF_ALL_AXES, 0)) == EXF_OK);
  /* slopes of |x|: 0 at both zeros; of clamp: 1 at the bounds */
  CHECK(x->grad[3] == 1 && x->grad[4] == 1 && x->grad[5] == 0 && x->grad[6] == 2
        && x->grad[7] == 1);
  exf_rewind(ctx);
  CHECK(exf_clamp(ctx, noise(ctx, exf_shape1(3), 1, 1), 1, 0) == NULL);
  CHECK_ERR(ctx, EXF_ARG, "clamp: from 1 to 0");
  CHECK(exf_clamp(ctx, noise(ctx, exf_shape1(3), 1, 1), NAN, 0) == NULL);
  CHECK_ERR(ctx, EXF_ARG, "clamp");
  CHECK(exf_clamp(ctx, noise(ctx, exf_shape1(3), 1, 1), 0, NAN) == NULL);
  CHECK_ERR(ctx, EXF_ARG, "clamp");
}
TEST(abs_clamp_sigmoid_values) { on_each_isa(plain_values_in); }

static void max_case(exf_ctx *ctx, exf_shape s, unsigned axes, int keep) {
  exf_tensor *x = exf_grad_keep(ctx, noise(ctx, s, axes, 1)), *y, *w;
  exf_shape kept = s;
  size_t bad = 0, *at;
  for (size_t i = 0; i < x->size; i++)     /* many are equal, some are no numbers */
    x->data[i] = i % 31 == 7 ? (exf_real)NAN : (exf_real)floor(3 * (double)x->data[i]);
  for (int k = 0; k < s.n; k++) if (axes & EXF_AXIS(k)) kept.dim[k] = 1;
  y = exf_max(ctx, x, axes, keep);
  if (!CHECK(y != NULL)) return;
  at = (size_t *)malloc((y->size + 1) * sizeof *at);
  for (size_t i = 0; i < y->size; i++) at[i] = (size_t)-1;
  for (size_t i = 0; i < x->size; i++) {
    size_t o = source(i, s, kept);
    if (at[o] == (size_t)-1) at[o] = i;
    else if (!isnan(x->data[at[o]])
             && (isnan(x->data[i]) || x->data[i] > x->data[at[o]])) at[o] = i;
  }
  for (size_t i = 0; i < y->size; i++)
    if (y->data[i] != x->data[at[i]] && !isnan(y->data[i] + x->data[at[i]])) bad++;
  w = noise(ctx, y->shape, 3, 1);
  y = exf_where(ctx, exf_sub(ctx, y, y), w, exf_mul(ctx, y, w));   /* NaN: none */
  CHECK(exf_backward(ctx, exf_sum(ctx, y, EXF_ALL_AXES, 0)) == EXF_OK);
  for (size_t i = 0; i < x->size; i++) {
    size_t o = source(i, s, kept);
    exf_real want = at[o] == i && !isnan(x->data[i]) ? w->data[o] : 0;
    if (x->grad[i] != want && !isnan(x->grad[i])) bad++;
  }
  CHECK(bad == 0);
  free(at);
  exf_rewind(ctx);
}
static void max_values_in(exf_ctx *ctx) {
  static const exf_real rows[] = {1, 3, 3, (exf_real)NAN, 9, (exf_real)NAN,
                                  (exf_real)-INFINITY, (exf_real)-INFINITY,
                                  (exf_real)-INFINITY, 0, (exf_real)-0.0, 0};
  exf_tensor *x;
  const int32_t *at;
  for (unsigned axes = 0; axes < 8; axes++) {
    max_case(ctx, exf_shape3(4, 5, 6), axes, axes & 1);
    max_case(ctx, exf_shape3(1, 300, 2), axes, 0);
  }
  max_case(ctx, exf_shape0(), 0, 0);
  max_case(ctx, exf_shape2(0, 3), EXF_AXIS(1), 0);
  CHECK(exf_max(ctx, exf_tensor_new(ctx, exf_shape2(0, 3), NULL), EXF_AXIS(0), 0)
        == NULL);
  CHECK_ERR(ctx, EXF_SHAPE, "max: (0,3): an empty axis has no maximum");
  CHECK(exf_max(ctx, exf_tensor_new(ctx, exf_shape2(2, 3), NULL), EXF_AXIS(2), 0)
        == NULL);
  CHECK_ERR(ctx, EXF_SHAPE, "max: (2,3): an axis that does not exist");
  x = exf_tensor_new(ctx, exf_shape3(2, 2, 3), rows);
  at = exf_argmax(ctx, x);
  if (CHECK(at != NULL)) CHECK(at[0] == 1 && at[1] == 0 && at[2] == 0 && at[3] == 0);
  CHECK(exf_argmax(ctx, exf_tensor_new(ctx, exf_shape0(), NULL)) == NULL);
  CHECK_ERR(ctx, EXF_SHAPE, "argmax: ()");
  CHECK(exf_argmax(ctx, exf_tensor_new(ctx, exf_shape2(3, 0), NULL)) == NULL);
  CHECK_ERR(ctx, EXF_SHAPE, "argmax: (3,0)");
  CHECK(exf_argmax(ctx, NULL) == NULL);
  exf_rewind(ctx);
}
TEST(max_and_argmax_values) { on_each_isa(max_values_in); }

static void gather_values_in(exf_ctx *ctx) {
  static const int32_t ids[5] = {2, 0, 2, 2, 1}, bad[2] = {1, 4}, less[1] = {-1};
  exf_tensor *x = noise(ctx, exf_shape3(4, 3, 5), 1, 1), *y;
  y = exf_gather(ctx, x, ids, 5);
  if (!CHECK(y && y->shape.n == 3 && y->size == 75 && y->shape.dim[0] == 5)) return;
  for (size_t i = 0; i < 5; i++)
    for (size_t j = 0; j < 15; j++)
      CHECK(y->data[i * 15 + j] == x->data[(size_t)ids[i] * 15 + j]);
  y = exf_gather(ctx, noise(ctx, exf_shape1(3), 2, 1), ids, 0);
  CHECK(y && y->size == 0 && y->shape.n == 1);
  CHECK(exf_gather(ctx, x, bad, 2) == NULL);
  CHECK_ERR(ctx, EXF_ARG, "gather: integer 4 at index 1 is outside 0..3");
  CHECK(exf_gather(ctx, x, less, 1) == NULL);
  CHECK_ERR(ctx, EXF_ARG, "gather: integer -1 at index 0 is outside 0..3");
  CHECK(exf_gather(ctx, x, NULL, 1) == NULL);
  CHECK_ERR(ctx, EXF_ARG, "gather: the integers are NULL");
  CHECK(exf_gather(ctx, exf_ones(ctx, exf_shape0()), ids, 1) == NULL);
  CHECK_ERR(ctx, EXF_SHAPE, "gather: ()");
  exf_rewind(ctx);
}
TEST(gather_values) { on_each_isa(gather_values_in); }

static void layout_values_in(exf_ctx *ctx) {
  static const int axes[3] = {2, 0, 1};
  static const int32_t ids[4] = {2, 0, 2, 1};
  exf_tensor *x = noise(ctx, exf_shape3(2, 3, 4), 1, 1), *p = exf_permute(ctx, x, axes);
  exf_tensor *s = exf_slice(ctx, x, 1, 1, 3), *in[2], *c, *e, *u, *m;
  size_t i, j, k;
  in[0] = x;
  in[1] = s;
  c = exf_concat(ctx, in, 2, 1);
  e = exf_embedding(ctx, exf_reshape(ctx, x, exf_shape2(3, 8)), ids, 2, 2);
  u = exf_sum(ctx, x, EXF_AXIS(0) | EXF_AXIS(2), 1);
  m = exf_mean(ctx, x, EXF_AXIS(1), 0);
  if (!CHECK(p != NULL && s != NULL && c != NULL && e != NULL && u && m)) return;
  CHECK(p->shape.dim[0] == 4 && p->shape.dim[1] == 2 && p->shape.dim[2] == 3);
  CHECK(c->shape.dim[1] == 5 && s->shape.dim[1] == 2);
  CHECK(u->shape.n == 3 && u->shape.dim[0] == 1 && u->shape.dim[1] == 3
        && u->shape.dim[2] == 1);
  CHECK(m->shape.n == 2 && m->shape.dim[0] == 2 && m->shape.dim[1] == 4);
  for (i = 0; i < 2; i++)
    for (j = 0; j < 3; j++)
      for (k = 0; k < 4; k++) {
        exf_real v = x->data[(i * 3 + j) * 4 + k];
        CHECK(p->data[(k * 2 + i) * 3 + j] == v);
        CHECK(c->data[(i * 5 + j) * 4 + k] == v);
        if (j > 0) CHECK(s->data[(i * 2 + j - 1) * 4 + k] == v);
        if (j > 0) CHECK(c->data[(i * 5 + 2 + j) * 4 + k] == v);
      }
  for (j = 0; j < 3; j++) {
    double sum = 0;
    for (i = 0; i < 2; i++)
      for (k = 0; k < 4; k++) sum += (double)x->data[(i * 3 + j) * 4 + k];
    CHECK_NEAR(u->data[j], sum, 10 * VALUE);
  }
  for (i = 0; i < 2; i++)
    for (k = 0; k < 4; k++) {
      double sum = 0;
      for (j = 0; j < 3; j++) sum += (double)x->data[(i * 3 + j) * 4 + k] / 3;
      CHECK_NEAR(m->data[i * 4 + k], sum, 10 * VALUE);
    }
  for (i = 0; i < 4; i++)
    for (k = 0; k < 8; k++)
      CHECK(e->data[i * 8 + k] == x->data[(size_t)ids[i] * 8 + k]);
  exf_rewind(ctx);
}
TEST(layout_and_reduction_values) { on_each_isa(layout_values_in); }

static void fuse_values_in(exf_ctx *ctx) {
  exf_tensor *a = noise(ctx, exf_shape1(3), 1, 1);
  exf_tensor *e = noise(ctx, exf_shape3(3, 7, 5), 2, 1);
  exf_tensor *y = exf_fuse(ctx, a, e);
  size_t i, j;
  if (!CHECK(y != NULL)) return;
  CHECK(y->shape.n == 2 && y->shape.dim[0] == 7 && y->shape.dim[1] == 5);
  for (j = 0; j < 35; j++) {
    double v = 0;
    for (i = 0; i < 3; i++) v += (double)a->data[i] * (double)e->data[i * 35 + j];
    CHECK_NEAR(y->data[j], v, 10 * VALUE);
  }
  exf_rewind(ctx);
}
TEST(fuse_values) { on_each_isa(fuse_values_in); }

/* Dropout keeps about 1 - p, scales what it keeps, and is another one at another step. */
TEST(dropout_values) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_tensor *x, *y, *z, *again;
  size_t i, kept = 0, differ = 0, same = 0, n = 10000;
  exf_training_set(ctx, 1);
  exf_step_begin(ctx, 1);
  x = noise(ctx, exf_shape1(n), 1, 1);
  y = exf_dropout(ctx, x, 0.25);
  z = exf_dropout(ctx, x, 0.25);       /* a second place in the graph: another mask */
  exf_step_begin(ctx, 1);
  again = exf_dropout(ctx, x, 0.25);
  if (!CHECK(x && y && z && again)) return;
  for (i = 0; i < n; i++) {
    if (y->data[i] != 0) {
      kept++;
      CHECK_NEAR(y->data[i], (double)x->data[i] / 0.75,
                 1e-6 * fabs((double)x->data[i]) + 1e-30);
    }
    differ += (y->data[i] != 0) != (z->data[i] != 0);
    same += y->data[i] == again->data[i];
  }
  CHECK_NEAR((double)kept / (double)n, 0.75, 0.02);
  CHECK(differ > n / 5);
  CHECK(same == n);
  exf_training_set(ctx, 0);
  y = exf_dropout(ctx, x, 0.25);
  CHECK(y != NULL && memcmp(y->data, x->data, n * sizeof *x->data) == 0);
  CHECK_OK(ctx);
  exf_ctx_free(ctx);
}

/* Whole samples go or stay. */
TEST(drop_path_values) {
  enum { SAMPLES = 3000, REST = 6 };
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_tensor *x = noise(ctx, exf_shape3(SAMPLES, 2, 3), 1, 1), *y;
  size_t i, j, kept = 0;
  CHECK(exf_drop_path(ctx, x, 0.25) == x);     /* evaluation */
  exf_training_set(ctx, 1);
  CHECK(exf_drop_path(ctx, x, 0) == x);
  y = exf_drop_path(ctx, x, 0.25);
  if (!CHECK(x && y && y->size == x->size)) return;
  for (i = 0; i < SAMPLES; i++) {
    int stays = y->data[i * REST] != 0;
    kept += (size_t)stays;
    for (j = i * REST; j < (i + 1) * REST; j++)
      CHECK_NEAR(y->data[j], stays ? (double)x->data[j] / 0.75 : 0, 1e-5);
  }
  CHECK_NEAR((double)kept / SAMPLES, 0.75, 0.04);
  CHECK(exf_drop_path(ctx, x, 1.5) == NULL);
  CHECK_ERR(ctx, EXF_ARG, "drop_path");
  exf_ctx_free(ctx);
}

int main(void) {
  size_t i;
  for (i = 0; i < N_OPS; i++) {
    char name[64];
    current = &table[i];
    snprintf(name, sizeof name, "gradient_of_%s", table[i].name);
    test_run(gradient_of_op, name);
  }
  RUN(gradcheck_sees_a_wrong_backward);
  RUN(gradient_shared_by_two_inputs_is_not_changed_for_both);
  RUN(gradcheck_sees_a_nan);
#ifdef EXF_DOUBLE
  RUN(gradient_of_whole_gpt_with_each_variant);
  RUN(gradient_of_whole_gpt_with_each_activation);
  RUN(gradient_of_whole_gpt_with_dropout);
  RUN(gradient_of_detached_memory_bank_ffn);
#else
  (void)check_whole;
#endif
  RUN(matmul_values);
  RUN(linear_values);
  RUN(linear_of_a_function_is_both_ops);
  RUN(softmax_values);
  RUN(softmax_of_infinite_rows);
  RUN(norm_values);
  RUN(cross_entropy_values);
  RUN(attention_values);
  RUN(attention_with_a_cache_equals_the_whole);
  RUN(caches_refuse_what_does_not_fit);
  RUN(samples_are_those_of_plain_loops);
  RUN(samples_follow_the_distribution);
  RUN(samples_of_nonsense_are_refused);
  RUN(broadcasting_is_numpys);
  RUN(broadcast_gradients);
  RUN(where_values);
  RUN(activation_values);
  RUN(abs_clamp_sigmoid_values);
  RUN(max_and_argmax_values);
  RUN(gather_values);
  RUN(layout_and_reduction_values);
  RUN(fuse_values);
  RUN(dropout_values);
  RUN(drop_path_values);
  TEST_MAIN_END;
}
