/* What a careless program does with the public functions: each is refused by name, or
   does what one would expect, and nothing is damaged. */
#ifndef TEST_LINKED    /* the Makefile links the implementation in */
#define EXFUSION_IMPLEMENTATION
#endif
#include "../exfusion.h"

#include <errno.h>

#include "test.h"
#include "tiny_gpt.h"

#define FILE_NAME TEST_TMP "/misuse.safetensors"

/* A context with a model of one parameter w (2,2) of ones. */
typedef struct lone {
  exf_ctx *ctx;
  exf_model *model;
  exf_tensor *w;
} lone;

static exf_tensor *ones(exf_model *model, const char *name, exf_shape shape) {
  exf_param_desc d;
  memset(&d, 0, sizeof d);
  d.shape = shape;
  d.init_value = 1;
  d.decay = 1;
  return exf_param_new(model, name, &d);
}

static lone lone_new(void) {
  lone l;
  l.ctx = exf_ctx_new(NULL);
  l.model = exf_model_new(l.ctx);
  l.w = ones(l.model, "w", exf_shape2(2, 2));
  return l;
}

static void lone_free(lone *l) {
  CHECK_OK(l->ctx);
  exf_model_free(l->model);
  exf_ctx_free(l->ctx);
}

static exf_optim *sgd(exf_model *model, double momentum) {
  exf_optim_desc d;
  memset(&d, 0, sizeof d);
  d.kind = EXF_SGD;
  d.momentum = momentum;
  return exf_optim_new(model, &d);
}

static exf_ffn *ffn_of(exf_model *model, const char *name, exf_variant variant) {
  exf_ffn_desc d;
  memset(&d, 0, sizeof d);
  d.width = 2;
  d.hidden = 3;
  d.fusion.variant = variant;
  return exf_ffn_new(model, name, &d);
}

static exf_tensor *sum_of(exf_ctx *ctx, exf_tensor *x) {
  return exf_sum(ctx, x, EXF_ALL_AXES, 0);
}

TEST(a_model_has_one_optimizer) {
  lone l = lone_new();
  exf_optim *o = tiny_adamw(l.model);
  CHECK(sgd(l.model, 0.9) == NULL);
  CHECK_ERR(l.ctx, EXF_STATE, "exf_optim_free it first");
  exf_backward(l.ctx, sum_of(l.ctx, l.w));
  CHECK(exf_optim_step(o, 0.1, NULL) == EXF_OK && exf_optim_steps(o) == 1);
  exf_optim_free(o);
  o = sgd(l.model, 0.9);
  CHECK(o != NULL);
  exf_optim_free(o);
  lone_free(&l);
}

/* Parameters that merging freed are still on the tape of a graph that nobody walks. */
TEST(an_open_graph_does_not_disturb_the_next) {
  lone l = lone_new();
  exf_ffn *f = ffn_of(l.model, "mlp", EXF_DW);
  exf_ffn_forward(l.ctx, f, l.w);
  CHECK(exf_model_merge(l.model) == EXF_OK);
  CHECK(exf_backward(l.ctx, sum_of(l.ctx, exf_ffn_forward(l.ctx, f, l.w))) == EXF_OK);
  lone_free(&l);
}

TEST(an_alias_survives_upcycling) {
  lone l = lone_new();
  exf_ffn *f = ffn_of(l.model, "mlp", EXF_DENSE);
  exf_fusion_desc sw = tiny_variant(1, 2);
  exf_st *st;
  CHECK(exf_param_alias(l.model, "tied", "mlp.c_fc.weight") == EXF_OK);
  CHECK(exf_ffn_upcycle(f, &sw) == EXF_OK);
  CHECK(exf_model_save(l.model, FILE_NAME, NULL, 0) == EXF_OK);
  CHECK(exf_ffn_merge(f) == EXF_OK);
  st = exf_st_open(l.ctx, FILE_NAME, NULL);
  CHECK(exf_st_find(st, "tied") != NULL);
  exf_st_close(st);
  CHECK(exf_model_load(l.model, FILE_NAME) == EXF_OK);
  lone_free(&l);
}

/* w (2,2) times no matrices, on either side and transposed: its gradient is zero. */
TEST(a_product_of_no_matrices_has_no_gradient) {
  int side;
  for (side = 0; side < 4; side++) {
    lone l = lone_new();
    exf_tensor *none = exf_tensor_new(l.ctx, exf_shape3(0, 2, 2), NULL), *y;
    size_t i;
    y = side & 1 ? exf_matmul(l.ctx, none, l.w, side / 2 * EXF_TRANSPOSE_A)
                 : exf_matmul(l.ctx, l.w, none, side / 2 * EXF_TRANSPOSE_A);
    CHECK(exf_backward(l.ctx, sum_of(l.ctx, y)) == EXF_OK);
    for (i = 0; i < 4; i++) CHECK(l.w->grad[i] == 0);
    lone_free(&l);
  }
}

static void copy_forward(void *user, const exf_tensor *const *in, exf_real *out) {
  (void)user;
  memcpy(out, in[0]->data, in[0]->size * sizeof *out);
}
static void copy_backward(void *user, const exf_tensor *const *in, const exf_tensor *out,
                          const exf_real *dout, exf_real *const *din) {
  size_t i;
  (void)out;
  for (i = 0; i < in[0]->size; i++) din[0][i] += dout[i];
  if (*(exf_ctx **)user) exf_fail(*(exf_ctx **)user, EXF_NUMERIC, "refused");
}

/* v is reached before the op that fails, w after it. */
TEST(a_failed_backward_leaves_no_gradient) {
  lone l = lone_new();
  exf_tensor *v = ones(l.model, "v", exf_shape2(2, 2));
  exf_ctx *fails = NULL;
  exf_custom_desc d;
  int i;
  memset(&d, 0, sizeof d);
  d.name = "mine";
  d.out = l.w->shape;
  d.forward = copy_forward;
  d.backward = copy_backward;
  d.user = &fails;
  for (i = 0; i < 3; i++) {
    exf_tensor *y = exf_custom(l.ctx, &d, &l.w, 1);
    fails = i == 1 ? l.ctx : NULL;
    exf_backward(l.ctx, sum_of(l.ctx, exf_mul(l.ctx, y, exf_scale(l.ctx, v, 5))));
    if (i == 1) {
      CHECK_ERR(l.ctx, EXF_NUMERIC, "refused");
      CHECK(exf_expert_grad(exf_model_find(l.model, "v"), v->data) == EXF_STATE);
      CHECK_ERR(l.ctx, EXF_STATE, "has no gradient");
    } else {
      CHECK(v->grad[0] == 5 && l.w->grad[0] == 5);   /* not 10: nothing was left */
    }
    exf_rewind(l.ctx);
  }
  l.w->data[0] = (exf_real)NAN;
  CHECK(exf_backward(l.ctx, sum_of(l.ctx, exf_custom(l.ctx, &d, &l.w, 1)))
        == EXF_NUMERIC);
  CHECK_ERR(l.ctx, EXF_NUMERIC, "came out of mine, from parameter w");
  lone_free(&l);
}

TEST(one_call_of_backward_per_tape) {
  lone l = lone_new();
  exf_tensor *trunk = exf_square(l.ctx, l.w);
  exf_tensor *one = sum_of(l.ctx, trunk), *two = sum_of(l.ctx, exf_square(l.ctx, trunk));
  CHECK(exf_backward(l.ctx, one) == EXF_OK);
  exf_square(l.ctx, l.w);
  CHECK(exf_backward(l.ctx, two) == EXF_STATE);
  CHECK_ERR(l.ctx, EXF_STATE, "the tape is used up");
  CHECK(exf_item(sum_of(l.ctx, exf_square(l.ctx, trunk))) == 4);   /* a value still */
  CHECK(exf_backward(l.ctx, sum_of(l.ctx, exf_square(l.ctx, trunk))) == EXF_STATE);
  CHECK_ERR(l.ctx, EXF_STATE, "input 0 of square comes from a graph");
  one = sum_of(l.ctx, l.w);
  exf_rewind(l.ctx);
  CHECK(exf_backward(l.ctx, one) == EXF_STATE);
  CHECK_ERR(l.ctx, EXF_STATE, "the tape is used up");
  lone_free(&l);
}

TEST(a_checkpoint_begins_without_gradients) {
  lone l = lone_new();
  exf_optim *o = sgd(l.model, 0.5);
  CHECK(exf_checkpoint_save(l.model, o, FILE_NAME, NULL, 0) == EXF_OK);
  exf_backward(l.ctx, sum_of(l.ctx, l.w));
  CHECK(exf_checkpoint_load(l.model, o, FILE_NAME) == EXF_OK);
  exf_backward(l.ctx, sum_of(l.ctx, l.w));
  CHECK(l.w->grad[0] == 1);
  CHECK(exf_checkpoint_load(l.model, NULL, FILE_NAME) == EXF_OK);   /* without moments */
  ones(l.model, "v", exf_shape1(1));
  CHECK(exf_checkpoint_load(l.model, NULL, FILE_NAME) == EXF_MISMATCH);
  CHECK_ERR(l.ctx, EXF_MISMATCH, "'v' is missing");
  exf_optim_free(o);
  lone_free(&l);
}

/* What is saved can be loaded; what could not be is refused before a file is touched. */
TEST(checkpoints_of_a_stale_or_foreign_optimizer_are_refused) {
  lone l = lone_new();
  exf_model *other = exf_model_new(l.ctx);
  exf_ffn *f = ffn_of(l.model, "mlp", EXF_DENSE);
  exf_optim *o = tiny_adamw(l.model);
  exf_fusion_desc sw = tiny_variant(1, 2);
  CHECK(exf_checkpoint_save(other, o, FILE_NAME, NULL, 0) == EXF_ARG);
  CHECK_ERR(l.ctx, EXF_ARG, "the optimizer is another model's");
  exf_ffn_upcycle(f, &sw);
  CHECK(exf_checkpoint_save(l.model, o, FILE_NAME, NULL, 0) == EXF_STATE);
  CHECK_ERR(l.ctx, EXF_STATE, "is newer than the optimizer");
  exf_optim_free(o);
  exf_model_free(other);
  lone_free(&l);
}

/* Raw and softmax have tensors of the same shapes, and so have sw and a rule without
   functions. */
TEST(checkpoints_of_another_fusion_are_refused) {
  exf_rule mean;
  int k;
  memset(&mean, 0, sizeof mean);
  mean.name = "mean";
  for (k = 0; k < 2; k++) {
    exf_fusion_desc a = tiny_variant(k ? 1 : 2, 4), b = tiny_variant(k ? 0 : 3, 4);
    lone l = lone_new(), m = lone_new();
    if (k) b.rule = &mean;
    exf_ffn_upcycle(ffn_of(l.model, "mlp", EXF_DENSE), &a);
    exf_ffn_upcycle(ffn_of(m.model, "mlp", EXF_DENSE), &b);
    CHECK(exf_checkpoint_save(l.model, NULL, FILE_NAME, NULL, 0) == EXF_OK);
    CHECK(exf_checkpoint_load(l.model, NULL, FILE_NAME) == EXF_OK);
    CHECK(exf_checkpoint_load(m.model, NULL, FILE_NAME) == EXF_MISMATCH);
    CHECK_ERR(m.ctx, EXF_MISMATCH,
              k ? "'1 x sw 4', the model's '1 x mean 4'"
                : "'1 x dw 4', the model's '1 x dw softmax 4'");
    lone_free(&l);
    lone_free(&m);
  }
}

/* FFNs in a row that are alike are told once. */
TEST(checkpoints_tell_the_fusion_of_every_ffn) {
  static const struct { exf_variant variant; size_t n; int softmax; } ffns[] = {
    {EXF_DW, 4, 0}, {EXF_DW, 4, 0}, {EXF_DW, 4, 1}, {EXF_DW, 3, 1}, {EXF_DENSE, 0, 0},
    {EXF_MB, 4, 1}, {EXF_MB, 4, 0}, {EXF_SW, 2, 0}, {EXF_SW, 3, 0}, {EXF_SW, 1, 0}};
  lone l = lone_new();
  exf_st *st;
  size_t i;
  for (i = 0; i < sizeof ffns / sizeof *ffns; i++) {
    char name[] = "mlp0";
    exf_ffn_desc d;
    memset(&d, 0, sizeof d);
    name[3] = (char)('0' + i);
    d.width = 2;
    d.fusion.variant = ffns[i].variant;
    d.fusion.n_experts = ffns[i].n;
    d.fusion.dw_softmax = ffns[i].softmax;
    exf_ffn_new(l.model, name, &d);
  }
  CHECK(exf_checkpoint_save(l.model, NULL, FILE_NAME, NULL, 0) == EXF_OK);
  st = exf_st_open(l.ctx, FILE_NAME, NULL);
  CHECK_STR(exf_st_meta(st, "exf.fusion"),
            "2 x dw 4, 1 x dw softmax 4, 1 x dw softmax 3, 1 x dense, 2 x mb 4, "
            "1 x sw 2, 1 x sw 3, 1 x sw 1");
  exf_st_close(st);
  lone_free(&l);
}

TEST(averages_count_as_training) {
  lone l = lone_new();
  exf_ffn *f = ffn_of(l.model, "mlp", EXF_DENSE);
  exf_fusion_desc mb = tiny_variant(4, 3);
  exf_ema *ema = exf_ema_new(l.model, 0.5);
  exf_real before[4];
  size_t i;
  CHECK(exf_ema_copy_to(ema, l.model) == EXF_OK);
  memcpy(before, exf_ffn_forward(l.ctx, f, l.w)->data, sizeof before);
  CHECK(exf_ffn_upcycle(f, &mb) == EXF_OK);
  for (i = 0; i < 4; i++)
    CHECK_NEAR(exf_ffn_forward(l.ctx, f, l.w)->data[i], before[i], 1e-5);
  exf_ema_free(ema);
  lone_free(&l);
}

static int every(const exf_param *p, void *user) {
  (void)user;
  return p != NULL;
}

TEST(numbers_out_of_range_are_refused) {
  const double bad[] = {(double)NAN, (double)INFINITY, -1};
  lone l = lone_new();
  exf_ffn *f = ffn_of(l.model, "mlp", EXF_DENSE);
  exf_optim *o = sgd(l.model, 0);
  exf_optim_desc od;
  exf_param_desc pd;
  exf_block_desc bd;
  exf_fusion_desc dense = tiny_variant(0, 0), mb = tiny_variant(4, 2);
  int i;
  exf_backward(l.ctx, sum_of(l.ctx, l.w));
  for (i = 0; i < 3; i++) {
    CHECK(exf_optim_step(o, bad[i], NULL) == EXF_ARG && l.w->data[0] == 1);
    CHECK_ERR(l.ctx, EXF_ARG, "learning rate");
    CHECK(exf_drop_path(l.ctx, l.w, bad[i]) == NULL);
    CHECK_ERR(l.ctx, EXF_ARG, "drop_path: probability");
    memset(&bd, 0, sizeof bd);
    bd.width = bd.n_heads = 1;
    bd.dropout = bad[i];
    CHECK(exf_block_new(l.model, "b", &bd) == NULL);
    CHECK_ERR(l.ctx, EXF_ARG, "block: probability");
  }
  for (i = 0; i < 3; i++) {
    CHECK(exf_optim_group(o, every, NULL, bad[i], 0) == EXF_ARG);
    CHECK_ERR(l.ctx, EXF_ARG, "optim_group");
    CHECK(exf_optim_group(o, every, NULL, 1, bad[i]) == EXF_ARG);
    CHECK_ERR(l.ctx, EXF_ARG, "optim_group");
  }
  exf_optim_free(o);
  for (i = 0; i < 2; i++) {
    memset(&od, 0, sizeof od);
    if (i) od.weight_decay = bad[1];
    else od.beta1 = bad[0];
    CHECK(exf_optim_new(l.model, &od) == NULL);
    CHECK_ERR(l.ctx, EXF_ARG, "optim: beta1");
    memset(&pd, 0, sizeof pd);
    pd.init_std = bad[i];
    CHECK(exf_param_new(l.model, "p", &pd) == NULL);
    CHECK_ERR(l.ctx, EXF_ARG, "init_std");
  }
  mb.spread = bad[0];
  CHECK(exf_ffn_upcycle(f, &mb) == EXF_ARG);
  CHECK_ERR(l.ctx, EXF_ARG, "spread");
  CHECK(exf_ffn_upcycle(f, &dense) == EXF_ARG);
  CHECK_ERR(l.ctx, EXF_ARG, "the variant is dense");
  for (i = 0; i < 3; i++) {      /* EXF_ZERO means zero; no other negative number does */
    mb = tiny_variant(4, 2);
    *(i == 0 ? &mb.mu : i == 1 ? &mb.drop : &mb.spread) = -0.5;
    CHECK(exf_ffn_upcycle(f, &mb) == EXF_ARG);
    CHECK_ERR(l.ctx, EXF_ARG, i == 0 ? "mu -0.5" : i == 1 ? "drop -0.5" : "spread -0.5");
  }
  CHECK(exf_model_n_params(l.model) == 3);
  lone_free(&l);
}

/* NULL, and all members zero, are the defaults wherever those can work. */
TEST(descriptors_may_be_missing) {
  lone l = lone_new();
  exf_linear_desc ld;
  exf_norm_desc nd;
  exf_param_desc pd;
  exf_attention_desc ad;
  exf_sample_desc sd;
  exf_optim_desc od;
  exf_optim *o;
  exf_norm_layer *n;
  exf_tensor *x;
  memset(&ld, 0, sizeof ld);
  memset(&nd, 0, sizeof nd);
  memset(&pd, 0, sizeof pd);
  memset(&ad, 0, sizeof ad);
  memset(&sd, 0, sizeof sd);
  memset(&od, 0, sizeof od);
  CHECK(exf_linear_new(l.model, "a", 2, 2, NULL)->bias == NULL);
  CHECK(exf_linear_new(l.model, "b", 2, 2, &ld)->bias == NULL);
  n = exf_norm_new(l.model, "c", 2, NULL);
  CHECK(n != NULL && n->bias == NULL && n->eps == 1e-5 && !n->rms);
  n = exf_norm_new(l.model, "d", 2, &nd);
  CHECK(n != NULL && n->bias == NULL && n->eps == 1e-5 && !n->rms);
  CHECK(exf_param_new(l.model, "e", NULL)->size == 1);
  CHECK(exf_param_new(l.model, "f", &pd)->data[0] == 0);
  x = exf_tensor_new(l.ctx, exf_shape3(1, 2, 3), NULL);
  CHECK(same_bits(exf_attention(l.ctx, x, NULL)->data,
                  exf_attention(l.ctx, x, &ad)->data, 2));
  CHECK(exf_sample(l.ctx, x, NULL, 5) == exf_sample(l.ctx, x, &sd, 5));
  o = exf_optim_new(l.model, NULL);
  CHECK(o != NULL);
  exf_optim_free(o);
  o = exf_optim_new(l.model, &od);
  CHECK(o != NULL);
  exf_optim_free(o);
  /* what has no default is asked for by name */
  CHECK(exf_ffn_new(l.model, "g", NULL) == NULL);
  CHECK_ERR(l.ctx, EXF_ARG, "ffn");
  CHECK(exf_attn_new(l.model, "h", "i", NULL) == NULL);
  CHECK_ERR(l.ctx, EXF_ARG, "att");
  CHECK(exf_block_new(l.model, "j", NULL) == NULL);
  CHECK_ERR(l.ctx, EXF_ARG, "block");
  lone_free(&l);
}

/* EXF_ZERO is a zero that is meant, where plain zero is the default. */
TEST(a_zero_may_be_meant) {
  lone l = lone_new();
  exf_ffn *f = ffn_of(l.model, "mlp", EXF_DENSE);
  exf_fusion_desc d = tiny_variant(4, 3);
  exf_sample_desc likeliest;
  const exf_real logits[] = {1, 3, 2, 3};
  exf_real *experts;
  size_t i;
  d.upcycle = EXF_UP_ZEROSUM;
  CHECK(exf_ffn_upcycle(f, &d) == EXF_OK);
  CHECK(f->fusion.mu == 0.95 && f->fusion.spread == 1 && f->fusion.tau == 1);
  CHECK(f->fusion.drop == 0.5 && f->fusion.n_experts == 3);
  CHECK(exf_ffn_merge(f) == EXF_OK);
  d.mu = d.spread = d.drop = EXF_ZERO;
  CHECK(exf_ffn_upcycle(f, &d) == EXF_OK);
  CHECK(f->fusion.mu == 0 && f->fusion.spread == 0 && f->fusion.drop == 0);
  experts = f->part[EXF_W1]->tensor.data;                 /* (3,3,2), without spread */
  for (i = 0; i < 6; i++)
    CHECK(experts[i] == experts[6 + i] && experts[i] == experts[12 + i]);
  memset(&likeliest, 0, sizeof likeliest);
  likeliest.temperature = EXF_ZERO;
  for (i = 0; i < 20; i++)
    CHECK(exf_sample(l.ctx, exf_tensor_new(l.ctx, exf_shape1(4), logits), &likeliest, i)
          == 1);
  lone_free(&l);
}

/* Sums along the last axes are blocks in double, as over all axes. */
TEST(long_means_are_exact) {
  size_t n = 3000000, i;
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_tensor *x = exf_tensor_new(ctx, exf_shape2(2, n), NULL), *y;
  for (i = 0; i < 2 * n; i++) x->data[i] = (exf_real)0.1;
  y = exf_mean(ctx, x, EXF_AXIS(1), 0);
  CHECK_NEAR(y->data[0], 0.1, 1e-7);
  CHECK_NEAR(y->data[1], 0.1, 1e-7);
  exf_ctx_free(ctx);
}

TEST(names_that_files_cannot_hold_are_refused) {
  static const struct { const char *name, *why; } bad[] = {
    {"", "empty"}, {"__metadata__", "reserved"}, {"adamw.m.w", "reserved"},
    {"sgd.m.w", "reserved"}, {"a\nb", "not printable"}, {"\xff", "not UTF-8"},
    {"w", "already taken"}, {"tied", "that of an alias"}, {"mlp.bank", "that of a bank"},
    {"mlp.c_fc.weight", "that of experts"}};
  lone l = lone_new();
  exf_ffn_desc d;
  size_t i;
  ffn_of(l.model, "mlp", EXF_MB);
  CHECK(exf_param_alias(l.model, "tied", "w") == EXF_OK);
  for (i = 0; i < sizeof bad / sizeof *bad; i++) {
    CHECK(ones(l.model, bad[i].name, exf_shape0()) == NULL);
    CHECK_ERR(l.ctx, EXF_ARG, bad[i].why);
    CHECK(exf_param_alias(l.model, bad[i].name, "w") == EXF_ARG);
    CHECK_ERR(l.ctx, EXF_ARG, bad[i].why);
  }
  CHECK(exf_param_alias(l.model, "more", "mlp.experts.c_fc.weight") == EXF_ARG);
  CHECK_ERR(l.ctx, EXF_ARG, "belongs to experts");
  memset(&d, 0, sizeof d);
  d.width = 2;
  d.up = "up";
  d.down = "down";
  d.fusion.variant = EXF_MB;
  CHECK(exf_ffn_new(l.model, "mlp", &d) == NULL);   /* a second mlp.router.weight */
  CHECK_ERR(l.ctx, EXF_ARG, "already taken");
  lone_free(&l);
}

TEST(large_gradients_are_finite) {
  lone l = lone_new();
  exf_optim *o = sgd(l.model, 0);
  double norm;
  exf_backward(l.ctx, exf_scale(l.ctx, sum_of(l.ctx, l.w), 1e25));
  CHECK(exf_optim_step(o, 0, &norm) == EXF_OK);
  CHECK_NEAR(norm / 2e25, 1, 1e-6);
  exf_optim_free(o);
  lone_free(&l);
}

TEST(frozen_parameters_do_not_count_in_the_norm) {
  lone l = lone_new();
  exf_tensor *v = ones(l.model, "v", exf_shape1(1));
  exf_optim *o = sgd(l.model, 0);
  double norm;
  exf_backward(l.ctx, exf_add(l.ctx, sum_of(l.ctx, l.w), sum_of(l.ctx, v)));
  exf_param_freeze(exf_model_find(l.model, "v"), 1);
  CHECK(exf_optim_step(o, 0.1, &norm) == EXF_OK);
  CHECK_NEAR(norm, 2, 1e-6);
  exf_optim_free(o);
  lone_free(&l);
}

static exf_tensor *loss_of_w(exf_ctx *ctx, void *user) {
  return sum_of(ctx, exf_relu(ctx, exf_scale(ctx, ((lone *)user)->w, -1)));
}

/* w is dead behind relu, v is not part of the loss: both gradients are zero and right. */
TEST(gradcheck_of_zero_gradients) {
  lone l = lone_new();
  exf_gradcheck_report r;
  ones(l.model, "v", exf_shape1(2));
  CHECK(exf_gradcheck(l.model, loss_of_w, &l, 0, &r) == EXF_OK);
  CHECK(r.worst == 0 && r.worst_relative == 0 && r.n_checked == 6);
  lone_free(&l);
}

TEST(caches_are_for_causal_blocks_and_their_room) {
  lone l = lone_new();
  exf_kv *kv = exf_kv_new(l.ctx, 1, 3, 2);
  exf_block_desc d;
  exf_block *b;
  int i;
  memset(&d, 0, sizeof d);
  d.width = 2;
  d.n_heads = 1;
  b = exf_block_new(l.model, "b", &d);
  exf_grad_set(l.ctx, 0);
  CHECK(exf_block_forward(l.ctx, b, exf_tensor_new(l.ctx, exf_shape3(1, 1, 2), NULL), kv)
        == NULL);
  CHECK_ERR(l.ctx, EXF_ARG, "causal");
  d.causal = 1;
  b = exf_block_new(l.model, "c", &d);
  for (i = 0; i < 2; i++) {               /* two positions, then no room for two more */
    exf_tensor *x = exf_tensor_new(l.ctx, exf_shape3(1, 2, 2), NULL);
    CHECK((exf_block_forward(l.ctx, b, x, kv) != NULL) == (i == 0));
    CHECK(exf_kv_length(kv) == 2);
  }
  CHECK_ERR(l.ctx, EXF_SHAPE, "room for t positions after 2 of 3");
  CHECK(exf_block_forward(l.ctx, b, exf_tensor_new(l.ctx, exf_shape3(1, 1, 2), NULL), kv)
        != NULL);
  CHECK(exf_kv_length(kv) == 3);
  exf_kv_free(kv);
  lone_free(&l);
}

TEST(activations_of_huge_numbers_have_gradients) {
  const exf_real x[] = {(exf_real)1e20, (exf_real)-1e20, (exf_real)3e38, (exf_real)2e13};
  exf_tensor *(*const op[])(exf_ctx *, exf_tensor *) = {exf_gelu, exf_gelu_tanh,
                                                        exf_silu};
  exf_ctx *ctx = exf_ctx_new(NULL);
  size_t i, k;
  for (k = 0; k < 3; k++) {
    exf_tensor *t = exf_grad_keep(ctx, exf_tensor_new(ctx, exf_shape1(4), x));
    CHECK(exf_backward(ctx, exf_mean(ctx, op[k](ctx, t), EXF_ALL_AXES, 0)) == EXF_OK);
    for (i = 0; i < 4; i++) CHECK(t->grad[i] == (exf_real)(i == 1 ? 0 : 0.25));
  }
  exf_ctx_free(ctx);
}

/* A cause that an earlier call left behind is not this one's. */
TEST(errno_from_before_does_not_matter) {
  lone l = lone_new();
  errno = EINTR;
  CHECK(exf_model_save(l.model, FILE_NAME, NULL, 0) == EXF_OK);
  errno = EINTR;
  CHECK(exf_model_load(l.model, FILE_NAME) == EXF_OK);
  lone_free(&l);
}

/* The moments of G, which the experts share, have the shape of one. */
TEST(shared_moments_are_saved_in_their_shape) {
  lone l = lone_new();
  exf_optim_desc d;
  exf_optim *o;
  exf_st *st;
  const exf_st_entry *e;
  memset(&d, 0, sizeof d);
  d.shared_moments = 1;
  ffn_of(l.model, "mlp", EXF_SW);
  o = exf_optim_new(l.model, &d);
  CHECK(exf_checkpoint_save(l.model, o, FILE_NAME, NULL, 0) == EXF_OK);
  st = exf_st_open(l.ctx, FILE_NAME, NULL);
  e = exf_st_find(st, "adamw.m.mlp.experts.c_fc.weight");
  CHECK(e != NULL && e->n_dims == 2 && e->dim[0] == 3 && e->dim[1] == 2);
  exf_st_close(st);
  exf_optim_free(o);
  lone_free(&l);
}

static exf_tensor *no_weights(exf_ctx *ctx, const exf_ffn *ffn, exf_tensor *x,
                              int training) {
  (void)ctx;
  (void)ffn;
  (void)x;
  (void)training;
  return NULL;
}

/* sw is plain SGD with a smaller rate, and dense AdamW: each is said of its own. */
TEST(notices_know_the_optimizer) {
  int adam;
  for (adam = 0; adam < 2; adam++) {
    lone l = lone_new();
    exf_optim *o;
    ffn_of(l.model, "mlp", EXF_SW);
    o = adam ? tiny_adamw(l.model) : sgd(l.model, 0);
    CHECK(exf_notices(l.model, o) == 1);
    exf_optim_free(o);
    lone_free(&l);
  }
  for (adam = 1; adam < 3; adam++) {      /* independent draws, of one expert and of two */
    lone l = lone_new();
    exf_fusion_desc f = tiny_variant(2, (size_t)adam);
    f.upcycle = EXF_UP_INDEPENDENT_PLAIN;
    exf_ffn_upcycle(ffn_of(l.model, "mlp", EXF_DENSE), &f);
    CHECK(exf_notices(l.model, NULL) == 1);
    lone_free(&l);
  }
}

/* Its own weights may be anything; a rule that gives none is sw under another name. */
TEST(notices_say_of_rules_what_is_true) {
  static const struct { size_t n; int weights; exf_upcycle up; int said; } cases[] = {
    {1, 0, EXF_UP_DEFAULT, 1}, {1, 1, EXF_UP_DEFAULT, 0}, {2, 0, EXF_UP_DEFAULT, 1},
    {2, 1, EXF_UP_DEFAULT, 0}, {2, 0, EXF_UP_COPY, 2}, {2, 1, EXF_UP_COPY, 1},
    {2, 0, EXF_UP_INDEPENDENT_PLAIN, 2}, {2, 1, EXF_UP_INDEPENDENT_PLAIN, 0}};
  size_t i;
  for (i = 0; i < sizeof cases / sizeof *cases; i++) {
    lone l = lone_new();
    exf_fusion_desc f = tiny_variant(0, cases[i].n);
    exf_rule rule;
    memset(&rule, 0, sizeof rule);
    rule.name = "mine";
    if (cases[i].weights) rule.weights = no_weights;
    f.rule = &rule;
    f.upcycle = cases[i].up;
    CHECK(exf_ffn_upcycle(ffn_of(l.model, "mlp", EXF_DENSE), &f) == EXF_OK);
    CHECK(exf_notices(l.model, NULL) == cases[i].said);
    lone_free(&l);
  }
}

TEST(long_schedules_are_summed_quickly) {
  exf_schedule s;
  double a, b;
  memset(&s, 0, sizeof s);
  s.lr = 1e-3;
  s.min_lr = 1e-4;
  s.warmup = 100;
  s.steps = 60000;
  a = exf_expert_decay(&s, 1e-2);
  s.lr /= 1000;
  s.min_lr /= 1000;
  s.warmup *= 1000;
  s.steps *= 1000;
  b = exf_expert_decay(&s, 1e-2);
  CHECK(a > 0.1 && a < 0.9);
  CHECK_NEAR(a, b, 1e-4);
}

int main(void) {
  RUN(a_model_has_one_optimizer);
  RUN(an_open_graph_does_not_disturb_the_next);
  RUN(an_alias_survives_upcycling);
  RUN(a_product_of_no_matrices_has_no_gradient);
  RUN(a_failed_backward_leaves_no_gradient);
  RUN(one_call_of_backward_per_tape);
  RUN(a_checkpoint_begins_without_gradients);
  RUN(checkpoints_of_a_stale_or_foreign_optimizer_are_refused);
  RUN(checkpoints_of_another_fusion_are_refused);
  RUN(checkpoints_tell_the_fusion_of_every_ffn);
  RUN(averages_count_as_training);
  RUN(numbers_out_of_range_are_refused);
  RUN(descriptors_may_be_missing);
  RUN(a_zero_may_be_meant);
  RUN(long_means_are_exact);
  RUN(names_that_files_cannot_hold_are_refused);
  RUN(large_gradients_are_finite);
  RUN(frozen_parameters_do_not_count_in_the_norm);
  RUN(gradcheck_of_zero_gradients);
  RUN(caches_are_for_causal_blocks_and_their_room);
  RUN(activations_of_huge_numbers_have_gradients);
  RUN(errno_from_before_does_not_matter);
  RUN(shared_moments_are_saved_in_their_shape);
  RUN(notices_know_the_optimizer);
  RUN(notices_say_of_rules_what_is_true);
  RUN(long_schedules_are_summed_quickly);
  TEST_MAIN_END;
}
