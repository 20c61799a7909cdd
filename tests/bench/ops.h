/* tests/bench/ops.h - every op by itself, forward and backward, beside its bytes and
   FLOPs. Include after phases.h. */
#ifndef BENCH_OPS_H
#define BENCH_OPS_H

typedef struct replay {
  exf_ctx *ctx;
  exf_model *model;      /* or NULL: its gradients are dropped before each backward */
  exf__node *node;
} replay;

static void replay_forward(void *arg) {
  replay *r = (replay *)arg;
  r->node->op->forward(r->ctx, r->node);
}

static void replay_backward(void *arg) {
  replay *r = (replay *)arg;
  for (int i = 0; i < r->node->n_in; i++) {
    exf_tensor *in = r->node->in[i];
    if (!in->param) exf__gbuf_release(r->ctx, in->gbuf);
    in->gbuf = NULL;
  }
  if (r->model) exf_model_zero_grad(r->model);
  r->node->op->backward(r->ctx, r->node);
}

/* Time, bytes, GB/s; GFLOP/s of matrix products; and the time that the nearer of the two
   limits allows, as a share of its time. */
static void op_print(const char *name, const exf__node *n, int backward, double t) {
  double flops = 1e-9 * node_flops(n) * (backward ? 2 : 1);
  double bytes = 1e-9 * node_bytes(n, backward);
  double least = EXF__MAX(flops / bench.peak, bytes / bench.cache);
  char what[64];
  if (t < 1e-6) printf("  passed on");
  else {
    printf(" %8.3f ms %5.1f MB %6.1f GB/s", 1e3 * t, 1e3 * bytes, bytes / t);
    if (flops > 0) printf(" %6.3f GFLOP %5.1f GFLOP/s", flops, flops / t);
    else printf("%28s", "");
    printf(" %3.0f%%", 100 * least / t);
  }
  printf(backward ? "\n" : " |");
  snprintf(what, sizeof what, "%s %s", name, backward ? "backward" : "forward");
  record("ops", what, "ms", 1e3 * t);
  record("ops", what, "mb", 1e3 * bytes);
  record("ops", what, "gflop", flops);
}

/* Times the op that made y; rewinds. */
static void op_time(const char *name, exf_ctx *ctx, exf_model *model, exf__node *node) {
  replay r;
  size_t i;
  exf_tensor *y;
  must(ctx);
  r.ctx = ctx;
  r.model = model;
  r.node = node;
  y = node->out;
  printf("%-22s", name);
  op_print(name, node, 0, task_median(replay_forward, &r, 3e-3));
  y->gbuf = exf__gbuf_take(ctx, y->size);
  for (i = 0; i < y->size; i++) y->gbuf->data[i] = (exf_real)1e-3;
  op_print(name, node, 1, task_median(replay_backward, &r, 3e-3));
  must(ctx);
  exf_rewind(ctx);
  fflush(stdout);
}

/* Numbers in (0.25, 1.25), a leaf that wants its gradient */
static exf_tensor *leaf(exf_ctx *ctx, exf_shape shape) {
  exf_tensor *x = exf_grad_keep(ctx, exf_tensor_new(ctx, shape, NULL));
  size_t i;
  for (i = 0; x && i < x->size; i++)
    x->data[i] = EXF__R(0.25) + (exf_real)(i * 2654435761u % 1024) / 1024;
  return x;
}

enum { OP_ROWS = 2048, OP_WIDTH = 384, OP_HIDDEN = 4 * OP_WIDTH, OP_VOCAB = 65 };

static void ops_elementwise(exf_ctx *ctx) {
  static const struct {
    const char *name;
    exf_tensor *(*run)(exf_ctx *ctx, exf_tensor *x);
  } unary[] = {{"neg", exf_neg}, {"exp", exf_exp}, {"log", exf_log}, {"tanh", exf_tanh},
               {"sqrt", exf_sqrt}, {"square", exf_square}, {"relu", exf_relu},
               {"gelu", exf_gelu}, {"gelu_tanh", exf_gelu_tanh}, {"silu", exf_silu}};
  static const struct {
    const char *name;
    exf_tensor *(*run)(exf_ctx *ctx, exf_tensor *a, exf_tensor *b);
  } binary[] = {{"add", exf_add}, {"sub", exf_sub}, {"mul", exf_mul}, {"div", exf_div}};
  exf_shape big = exf_shape2(OP_ROWS, OP_HIDDEN), row = exf_shape1(OP_HIDDEN);
  char name[32];
  size_t i;
  for (i = 0; i < sizeof unary / sizeof *unary; i++)
    op_time(unary[i].name, ctx, NULL, unary[i].run(ctx, leaf(ctx, big))->node);
  op_time("scale", ctx, NULL, exf_scale(ctx, leaf(ctx, big), 3)->node);
  for (i = 0; i < sizeof binary / sizeof *binary; i++) {
    op_time(binary[i].name, ctx, NULL,
            binary[i].run(ctx, leaf(ctx, big), leaf(ctx, big))->node);
    snprintf(name, sizeof name, "%s of a row", binary[i].name);
    op_time(name, ctx, NULL, binary[i].run(ctx, leaf(ctx, big), leaf(ctx, row))->node);
  }
  op_time("dropout", ctx, NULL, exf_dropout(ctx, leaf(ctx, big), 0.1)->node);
  op_time("drop_path", ctx, NULL, exf_drop_path(ctx, leaf(ctx, big), 0.1)->node);
}

static void ops_rows(exf_ctx *ctx) {
  exf_shape x = exf_shape2(OP_ROWS, OP_WIDTH), w = exf_shape1(OP_WIDTH);
  exf_shape v = exf_shape2(OP_ROWS, OP_VOCAB);
  int32_t ids[OP_ROWS];
  int i;
  for (i = 0; i < OP_ROWS; i++) ids[i] = i * 37 % OP_VOCAB;
  op_time("softmax", ctx, NULL, exf_softmax(ctx, leaf(ctx, x))->node);
  op_time("log_softmax", ctx, NULL, exf_log_softmax(ctx, leaf(ctx, x))->node);
  op_time("layernorm", ctx, NULL,
          exf_layernorm(ctx, leaf(ctx, x), leaf(ctx, w), leaf(ctx, w), 1e-5)->node);
  op_time("rmsnorm", ctx, NULL,
          exf_rmsnorm(ctx, leaf(ctx, x), leaf(ctx, w), 1e-5)->node);
  op_time("cross_entropy", ctx, NULL,
          exf_cross_entropy(ctx, leaf(ctx, v), ids, 0)->node);
  x = exf_shape2(OP_VOCAB, OP_WIDTH);
  op_time("embedding", ctx, NULL,
          exf_embedding(ctx, leaf(ctx, x), ids, OP_ROWS, 0)->node);
}

static void ops_shapes(exf_ctx *ctx) {
  static const int axes[] = {0, 2, 1, 3};
  exf_shape x = exf_shape2(OP_ROWS, OP_WIDTH);
  exf_tensor *two[2];
  op_time("permute", ctx, NULL,
          exf_permute(ctx, leaf(ctx, exf_shape4(8, 256, 6, 64)), axes)->node);
  two[0] = leaf(ctx, x);
  two[1] = leaf(ctx, x);
  op_time("concat", ctx, NULL, exf_concat(ctx, two, 2, 1)->node);
  op_time("slice", ctx, NULL, exf_slice(ctx, leaf(ctx, x), 1, 64, 128)->node);
  op_time("sum", ctx, NULL, exf_sum(ctx, leaf(ctx, x), EXF_ALL_AXES, 0)->node);
  op_time("mean of columns", ctx, NULL,
          exf_mean(ctx, leaf(ctx, x), EXF_AXIS(0), 0)->node);
}

static void ops_products(exf_ctx *ctx) {
  const exf_attention_desc four = {4, 1, NULL}, six = {6, 1, NULL}, all = {4, 0, NULL};
  exf_shape x = exf_shape2(OP_ROWS, OP_WIDTH), h = exf_shape2(OP_ROWS, OP_HIDDEN);
  exf_tensor *w = leaf(ctx, exf_shape2(OP_HIDDEN, OP_WIDTH));
  op_time("matmul", ctx, NULL, exf_matmul(ctx, leaf(ctx, h), w, 0)->node);
  w = leaf(ctx, exf_shape2(OP_HIDDEN, OP_WIDTH));
  op_time("linear up", ctx, NULL,
          exf_linear(ctx, leaf(ctx, x), w, leaf(ctx, exf_shape1(OP_HIDDEN)))->node);
  w = leaf(ctx, exf_shape2(OP_WIDTH, OP_HIDDEN));
  op_time("linear down", ctx, NULL, exf_linear(ctx, leaf(ctx, h), w, NULL)->node);
  w = leaf(ctx, exf_shape2(OP_VOCAB, OP_WIDTH));
  op_time("linear head", ctx, NULL, exf_linear(ctx, leaf(ctx, x), w, NULL)->node);
  op_time("attention 12x64 d 32", ctx, NULL,
          exf_attention(ctx, leaf(ctx, exf_shape3(12, 64, 384)), &four)->node);
  op_time("attention 8x256 d 64", ctx, NULL,
          exf_attention(ctx, leaf(ctx, exf_shape3(8, 256, 1152)), &six)->node);
  op_time("attention 128x50 all", ctx, NULL,
          exf_attention(ctx, leaf(ctx, exf_shape3(128, 50, 192)), &all)->node);
}

/* The fuse of an FFN's first matrix: its backward pass is the dots, and a copy of G. */
static void ops_fuse(exf_ctx *ctx, size_t n_experts) {
  exf_model *model = exf_model_new(ctx);
  exf_ffn_desc d;
  exf__node *n;
  char name[32];
  memset(&d, 0, sizeof d);
  d.width = OP_WIDTH;
  d.fusion = fusion_of(EXF_DW, n_experts);
  exf_ffn_forward(ctx, exf_ffn_new(model, "f", &d), leaf(ctx, exf_shape2(1, OP_WIDTH)));
  must(ctx);
  for (n = ctx->tape; n && strcmp(n->op->name, "fuse") != 0;) n = n->prev;
  snprintf(name, sizeof name, "fuse of %u", (unsigned)n_experts);
  if (n) op_time(name, ctx, model, n);
  exf_model_free(model);
}

static void bench_ops(void) {
  exf_ctx *ctx = new_context();
  printf("\nops        forward | backward, %d rows of %d, elementwise of %d; last: share "
         "of the nearer limit,\n           %.0f GFLOP/s or reads of 4 MB at %.0f GB/s\n",
         OP_ROWS, OP_WIDTH, OP_HIDDEN, bench.peak, bench.cache);
  exf_training_set(ctx, 1);
  ops_products(ctx);
  ops_rows(ctx);
  ops_elementwise(ctx);
  ops_shapes(ctx);
  ops_fuse(ctx, 2);
  ops_fuse(ctx, 4);
  ops_fuse(ctx, 8);
  exf_ctx_free(ctx);
}

#endif /* BENCH_OPS_H */
