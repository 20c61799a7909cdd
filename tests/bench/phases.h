/* tests/bench/phases.h - where the time of a step goes: its tape, op by op. Include after
   net.h. */
#ifndef BENCH_PHASES_H
#define BENCH_PHASES_H

enum {
  P_EMBED, P_NORM, P_ATT_LINEAR, P_ATT, P_UP, P_DOWN, P_RESIDUAL, P_ROUTER, P_FUSE,
  P_HEAD, P_LOSS, P_CLIP, P_OPTIM, N_PHASES
};
static const char *const phase_names[N_PHASES] = {
  "embedding", "layernorm", "attention's linears", "attention", "FFN, up",
  "FFN, act and down", "residual", "router", "fuse | dots", "head", "cross-entropy",
  "gradient norm", "optimizer"
};

static int phase_of(const exf__node *n) {
  const char *op = n->op->name;
  const exf_tensor *w = n->n_in > 1 ? n->in[1] : NULL;
  const char *name = w && w->param ? w->param->name : "";
  if (strcmp(op, "fuse") == 0) return P_FUSE;
  if (strcmp(op, "attention") == 0) return P_ATT;
  if (strcmp(op, "cross_entropy") == 0) return P_LOSS;
  if (strcmp(op, "embedding") == 0) return P_EMBED;
  if (strcmp(op, "layernorm") == 0) return P_NORM;
  if (strstr(name, "router") || n->out->size < 64 || strcmp(op, "mean") == 0)
    return P_ROUTER;
  if (strcmp(op, "linear") == 0) {
    if (strstr(name, "attn")) return P_ATT_LINEAR;
    if (strstr(name, "patch")) return P_EMBED;
    if (n->arg.activation.on) return P_DOWN;
    return strstr(name, "mlp") || !*name ? P_UP : P_HEAD;
  }
  if (strcmp(op, "add") == 0 && !*name && w->size == n->in[0]->size) return P_RESIDUAL;
  return P_EMBED;
}

/* Multiply-adds of a node's matrix products, twice; of causal attention only the half
   that is needed. */
static double node_flops(const exf__node *n) {
  const exf_shape *s = &n->in[0]->shape;
  const char *op = n->op->name;
  double size = (double)n->out->size;
  if (strcmp(op, "linear") == 0) return 2 * size * (double)s->dim[s->n - 1];
  if (strcmp(op, "matmul") == 0)
    return 2 * size * (double)s->dim[s->n - (n->arg.transposed.a ? 2 : 1)];
  if (strcmp(op, "attention") == 0)   /* qkv (B,T,3C) */
    return 4 * size * (double)s->dim[1] * (n->arg.attention.causal ? 0.5 : 1);
  return 0;
}

/* Bytes a node must touch: forward inputs and output; backward the output's gradient and
   those of the inputs, and the inputs (or the output in their place) unless the op is
   linear. A plain sum passes its gradient on. */
static double node_bytes(const exf__node *n, int backward) {
  static const char *const linear[] = {"add", "sub", "neg", "scale", "sum", "mean",
    "concat", "slice", "permute", "reshape", "dropout", "embedding"};
  const char *op = n->op->name;
  double in = 0, out = (double)n->out->size, reads = 1;
  int i;
  for (i = 0; i < n->n_in; i++) in += (double)n->in[i]->size;
  for (i = 0; i < (int)(sizeof linear / sizeof *linear); i++)
    if (strcmp(op, linear[i]) == 0) reads = 0;
  if (!backward && strcmp(op, "slice") == 0) in = out;
  if (phase_of(n) == P_FUSE) return sizeof(exf_real) * (in + (backward ? 3 : 1) * out);
  return sizeof(exf_real) * (out + in * (backward ? 1 + reads : 1));
}

typedef struct phase {
  double t[2], flops[2], bytes[2];     /* forward, backward */
} phase;

static void phase_add(phase *p, const exf__node *n, int backward, double t) {
  phase *q = &p[phase_of(n)];
  q->t[backward] += t;
  q->flops[backward] += node_flops(n) * (backward ? 2 : 1);
  q->bytes[backward] += node_bytes(n, backward);
}

/* Forward: the tape's ops once more, in order, each timed. */
static void phase_forward(exf_ctx *ctx, phase *p) {
  exf__node **list, *n;
  size_t count = 0, i;
  for (n = ctx->tape; n; n = n->prev) count++;
  list = (exf__node **)room(count, sizeof *list);
  for (i = count, n = ctx->tape; n; n = n->prev) list[--i] = n;
  for (i = 0; i < count; i++) {
    double start = now();
    list[i]->op->forward(ctx, list[i]);
    phase_add(p, list[i], 0, now() - start);
  }
  free(list);
}

/* As exf_backward walks the tape, each op timed. */
static void phase_backward(exf_ctx *ctx, exf_tensor *loss, phase *p) {
  exf__node *n;
  int acc;
  exf__grad(ctx, loss, &acc)[0] = 1;
  for (n = ctx->tape; n; n = n->prev) {
    double start = now();
    if (!n->out->gbuf) continue;
    n->op->backward(ctx, n);
    phase_add(p, n, 1, now() - start);
    exf__walked(ctx, n);
  }
  ctx->tape = NULL;
  ctx->n_tapes++;
}

static void phase_optim(net *g, phase *p) {
  double start = now(), square = 0;
  size_t i;
  for (i = 0; i < exf_model_n_params(g->model); i++) {
    const exf_param *q = exf_model_param(g->model, i);
    size_t n = q->tensor.size, k = n / (q->pool ? q->pool->n : 1);
    if (q->tensor.grad) square += exf__grad_square(g->optim, q);
    p[P_CLIP].bytes[0] += sizeof(exf_real) * (double)k;
    p[P_OPTIM].bytes[0] += sizeof(exf_real) * (double)(6 * n + k);
  }
  kept = (float)square;
  p[P_CLIP].t[0] += now() - start;
  start = now();
  exf_optim_step(g->optim, 1e-3, NULL);
  p[P_OPTIM].t[0] += now() - start - p[P_CLIP].t[0];
  exf_rewind(g->ctx);
}

static void phase_step(net *g, phase *p) {
  exf_tensor *loss;
  exf_step_begin(g->ctx, g->step++);
  exf_training_set(g->ctx, 1);
  loss = net_loss(g);
  must(g->ctx);
  phase_forward(g->ctx, p);
  phase_backward(g->ctx, loss, p);
  phase_optim(g, p);
  exf_training_set(g->ctx, 0);
}

static void phase_print(const char *what, const phase *p, const samples (*t)[2],
                        double step, double peak) {
  double sum = 0;
  const double *unit;
  char name[96];
  int i;
  printf("\nphases     %s: %.2f ms a step; registers made %.1f GFLOP/s between steps\n",
         what, 1e3 * step, peak);
  printf("%-20s%9s %9s %7s %15s %13s\n", "", "forward", "backward", "share", "GFLOP/s",
         "GB/s");
  for (i = 0; i < N_PHASES; i++) {
    double f = median(&t[i][0]), b = median(&t[i][1]);
    int gemm = p[i].flops[0] > 0 && i != P_EMBED && i != P_ROUTER;
    if (f + b == 0) continue;
    sum += f + b;
    printf("%-20s%9.3f %9.3f %6.1f%%", phase_names[i], 1e3 * f, 1e3 * b,
           100 * (f + b) / step);
    unit = gemm ? p[i].flops : p[i].bytes;
    printf("%*s %6.1f", gemm ? 1 : 17, "", 1e-9 * unit[0] / f);
    if (b > 0) printf(" %6.1f", 1e-9 * unit[1] / b);
    printf("\n");
    snprintf(name, sizeof name, "%s %s", what, phase_names[i]);
    record("phases", name, "forward_ms", 1e3 * f);
    record("phases", name, "backward_ms", 1e3 * b);
  }
  printf("%-20s%9.3f %9s %6.1f%%\n", "the rest", 1e3 * (step - sum), "",
         100 * (step - sum) / step);
}

/* Every phase of one step in its place; the median over rounds. */
static void phases_of(net_desc d, exf_fusion_desc fusion) {
  static samples t[N_PHASES][2];
  samples whole = {0, {0}}, peak = {0, {0}};
  char what[64];
  limits l[4];
  phase p[N_PHASES];
  net *g;
  int r, i, rounds, n_isas = limits_list(l);
  d.fusion = fusion;
  g = net_new(&d);
  rounds = net_step(g, NULL) > 0.3 ? 3 : 2 * bench.rounds + 1;
  memset(t, 0, sizeof t);
  for (r = 0; r < rounds; r++) {
    net_step(g, NULL);
    sample_add(&whole, net_step(g, NULL));
    memset(p, 0, sizeof p);
    phase_step(g, p);
    sample_add(&peak, n_isas ? limit_flops(&l[0]) : NAN);
    for (i = 0; i < 2 * N_PHASES; i++) sample_add(&t[i / 2][i % 2], p[i / 2].t[i % 2]);
  }
  snprintf(what, sizeof what, "%s %s %u", d.name, exf_variant_name(fusion.variant),
           (unsigned)fusion.n_experts);
  phase_print(what, p, (const samples (*)[2])t, median(&whole),
              median(&peak));
  net_free(g);
}

static void bench_phases(void) {
  phases_of(nets[CHARLM], fusion_of(EXF_DENSE, 1));
  phases_of(nets[CHARLM], fusion_of(EXF_MB, 4));
  phases_of(nets[CHARLM8192], fusion_of(EXF_DENSE, 1));
  phases_of(nets[GPT384], fusion_of(EXF_DENSE, 1));
  phases_of(nets[VIT], fusion_of(EXF_DENSE, 1));
}

#endif /* BENCH_PHASES_H */
