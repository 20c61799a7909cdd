/* gpt.c - a small GPT learns a text, byte by byte, and writes more of it. Copy this file.

   Shows: the whole program around exfusion.h: data, model, training loop, evaluation,
          merge, generation. Each FFN is four experts fused into one by a memory bank.
   Runs:  half a minute on one core, and ends near 1.8 nats per byte of Shakespeare.
   Build: cc examples/gpt.c -o gpt -lm                     (-fopenmp: all processors)
   Use:   ./gpt shakespeare.txt
   Ends:  with the text it wrote. */
#if defined(__GNUC__) && !defined(__clang__) && !defined(__OPTIMIZE__)
#pragma GCC optimize ("O2")        /* -O0 is ten times slower: other compilers need -O2 */
#endif
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VOCAB = 256, WIDTH = 64, HEADS = 4, LAYERS = 2, BLOCK = 64, BATCH = 16 };
enum { STEPS = 1500, EVAL_EVERY = 100, EVAL_BATCH = 160, WRITE = 500 };

typedef struct gpt {
  exf_model *model;
  exf_tensor *wte, *wpe;           /* (V,C), (T,C) */
  exf_block *blocks[LAYERS];
  exf_norm_layer *norm;
} gpt;

/* Ends the program after an error. A context keeps its first one: ask once per step. */
static void check(int ok, const char *what, const char *why) {
  if (ok) return;
  fprintf(stderr, "gpt: %s: %s\n", what, why);
  exit(1);
}

static gpt gpt_new(exf_ctx *ctx) {
  gpt g = {.model = exf_model_new(ctx)};
  exf_block_desc block = {.width = WIDTH, .n_heads = HEADS, .causal = 1, .init_std = 0.06,
                          .ffn.fusion = {.variant = EXF_MB, .n_experts = 4}};
  g.wte = exf_embedding_new(g.model, "wte", VOCAB, WIDTH, 0.1);
  g.wpe = exf_embedding_new(g.model, "wpe", BLOCK, WIDTH, 0.1);
  for (int i = 0; i < LAYERS; i++) {
    char name[16];
    snprintf(name, sizeof name, "h.%d", i);
    g.blocks[i] = exf_block_new(g.model, name, &block);
  }
  g.norm = exf_norm_new(g.model, "norm", WIDTH, NULL);
  return g;
}

/* ids (B,T) -> logits (B,T,V) */
static exf_tensor *gpt_forward(exf_ctx *ctx, const gpt *g, const int32_t *ids, size_t b,
                               size_t t) {
  exf_tensor *x = exf_embedding(ctx, g->wte, ids, b, t);                   /* (B,T,C) */
  x = exf_add(ctx, x, exf_slice(ctx, g->wpe, 0, 0, t));
  for (int i = 0; i < LAYERS; i++) x = exf_block_forward(ctx, g->blocks[i], x, NULL);
  return exf_linear(ctx, exf_norm_forward(ctx, g->norm, x), g->wte, NULL);
}

/* The loss on b random windows of a text: each byte is to be told from those before. */
static exf_tensor *gpt_loss(exf_ctx *ctx, const gpt *g, const unsigned char *text,
                            size_t n, size_t b, uint32_t step) {
  static int32_t x[EVAL_BATCH * BLOCK], y[EVAL_BATCH * BLOCK];
  for (size_t i = 0; i < b * BLOCK; i++) {
    double u = exf_rng_uniform(1, exf_rng_stream("data"), step, i / BLOCK);
    size_t at = (size_t)(u * (double)(n - BLOCK)) + i % BLOCK;
    x[i] = text[at];
    y[i] = text[at + 1];
  }
  return exf_cross_entropy(ctx, gpt_forward(ctx, g, x, b, BLOCK), y, 0);
}

int main(int argc, char **argv) {
  static unsigned char text[1 << 24];      /* of a longer file, the beginning */
  if (argc != 2) {
    fprintf(stderr, "usage: %s TEXTFILE\n", argv[0]);
    return 2;
  }
  FILE *file = fopen(argv[1], "rb");
  size_t n = file ? fread(text, 1, sizeof text, file) : 0, n_train = n - n / 10;
  check(file && !ferror(file), argv[1], strerror(errno));
  check(n / 10 > BLOCK, argv[1], "fewer than 1,000 bytes: give more text");
  fclose(file);

  exf_ctx *ctx = exf_ctx_new(&(exf_desc){.seed = 1});
  check(ctx != NULL, "exfusion.h", "out of memory");
  gpt g = gpt_new(ctx);
  exf_optim *optim = exf_optim_new(g.model, &(exf_optim_desc){
    .beta2 = 0.99, .weight_decay = 0.1, .clip = 1});
  const exf_schedule cosine = {.lr = 1e-2, .warmup = 50, .steps = STEPS};

  for (uint32_t step = 0; step < STEPS; step++) {
    exf_step_begin(ctx, step);
    exf_training_set(ctx, 1);
    exf_tensor *loss = gpt_loss(ctx, &g, text, n_train, BATCH, step);
    double train_loss = exf_item(loss);
    exf_backward(ctx, loss);
    exf_optim_step(optim, exf_schedule_lr(&cosine, step), NULL);
    exf_rewind(ctx);                       /* here ends what the ops have made */
    exf_training_set(ctx, 0);
    check(exf_ctx_status(ctx) == EXF_OK, "exfusion.h", exf_error(ctx));

    if ((step + 1) % EVAL_EVERY != 0) continue;
    exf_grad_set(ctx, 0);                  /* on the last tenth of the text: */
    loss = gpt_loss(ctx, &g, text + n_train, n - n_train, EVAL_BATCH, 0);
    printf("step %4d   train %.3f   validation %.3f\n", (int)step + 1, train_loss,
           exf_item(loss));
    fflush(stdout);
    exf_rewind(ctx);
    exf_grad_set(ctx, 1);
  }

  printf("%d numbers, ", (int)exf_model_count(g.model));
  exf_optim_free(optim);
  exf_model_merge(g.model);                /* for good: an ordinary dense GPT */
  printf("%d when merged\n\n", (int)exf_model_count(g.model));

  int32_t out[WRITE + 1] = {'\n'};
  exf_grad_set(ctx, 0);
  for (size_t i = 1; i <= WRITE; i++) {    /* charlm.c keeps what attention has seen */
    size_t t = i < BLOCK ? i : BLOCK;
    exf_tensor *logits = gpt_forward(ctx, &g, out + i - t, 1, t);
    out[i] = exf_sample(ctx, logits, &(exf_sample_desc){.temperature = 0.8}, i);
    exf_rewind(ctx);
    check(exf_ctx_status(ctx) == EXF_OK, "exfusion.h", exf_error(ctx));
    putchar(out[i]);
  }
  check(printf("\n") == 1 && fflush(stdout) == 0, "stdout", strerror(errno));
  exf_model_free(g.model);
  exf_ctx_free(ctx);
  return 0;
}
