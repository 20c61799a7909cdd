/* tests/test_vit_golden.c - the ViT of examples/vit.h beside PyTorch: logits, loss and
   every gradient, from the numbers of tests/golden/make_golden_vit.py. What could be
   swapped by mistake is swapped here on purpose, and must then not agree. */
#define _POSIX_C_SOURCE 200809L
#ifndef TEST_LINKED    /* the Makefile links the implementation in */
#define EXFUSION_IMPLEMENTATION
#endif
#include "../exfusion.h"

#include "test.h"
#include "../examples/common.h"
#include "../examples/images.h"
#include "../examples/vit.h"

#define BATCH 4
#define EXPERTS 3
#define CLOSE 1e-5     /* of a tensor's norm */

typedef enum swap {
  SWAP_NOTHING, SWAP_GELU, SWAP_EPS, SWAP_CLASS_ROW, SWAP_CHANNELS_LAST,
  SWAP_PATCHES_BY_COLUMN, SWAP_NORMALISATION, SWAP_SMOOTHING, N_SWAPS
} swap;

typedef struct golden {
  exf_ctx *ctx;
  exf_st *st;
  vit g;
  exf_tensor *logits, *loss;
} golden;

static void numbers(golden *t, const char *name, exf_real *out, size_t n) {
  const exf_st_entry *e = exf_st_find(t->st, name);
  if (!e) printf("  the fixture has no %s\n", name);
  if (CHECK(e != NULL)) CHECK(exf_st_read(t->ctx, e, out, n) == EXF_OK);
}

/* ||a - want|| / ||want||; want is the tensor of that name in the fixture. */
static double distance(golden *t, const char *name, const exf_real *a, size_t n) {
  exf_real *want = memory(n, sizeof *want);
  double wrong = 0, square = 0;
  numbers(t, name, want, n);
  for (size_t i = 0; i < n; i++) {
    double d = (double)a[i] - (double)want[i];
    wrong += d * d;
    square += (double)want[i] * (double)want[i];
  }
  free(want);
  CHECK(square > 0);
  return sqrt(wrong / square);
}

/* The parameters and banks, by way of a checkpoint in memory. */
static void load_fixture(golden *t, int banks) {
  static char names[64][64];
  exf_st_item items[64];
  exf_real *values[64];
  unsigned char *data = NULL;
  size_t n = exf_model_n_params(t->g.model), bytes = 0;
  size_t all = n + (banks ? exf_model_n_ffns(t->g.model) : 0);
  if (!CHECK(all <= 64)) return;
  for (size_t i = 0; i < all; i++) {
    size_t size = EXPERTS;
    items[i].shape = exf_shape1(EXPERTS);
    if (i < n) {
      exf_param *p = exf_model_param(t->g.model, i);
      snprintf(names[i], sizeof names[i], "%s", p->name);
      items[i].shape = p->tensor.shape;
      size = p->tensor.size;
    } else {
      snprintf(names[i], sizeof names[i], "%s.bank",
               exf_model_ffn(t->g.model, i - n)->name);
    }
    values[i] = memory(size, sizeof(exf_real));
    numbers(t, names[i], values[i], size);
    items[i].name = names[i];
    items[i].data = values[i];
  }
  exf_st_save_memory(t->ctx, items, all, NULL, 0, &data, &bytes);
  exf_st *st = exf_st_open_memory(t->ctx, data, bytes, NULL);
  CHECK(exf_checkpoint_load_st(t->g.model, NULL, st) == EXF_OK);
  exf_st_close(st);
  exf_st_free_memory(t->ctx, data);
  for (size_t i = 0; i < all; i++) free(values[i]);
}

/* Row 0 of the positions goes to the end, as if the class token stood there. */
static void move_class_row(vit *g) {
  size_t d = g->width, n = g->pos->size;
  exf_real row[64];
  memcpy(row, g->pos->data, d * sizeof *row);
  memmove(g->pos->data, g->pos->data + d, (n - d) * sizeof *row);
  memcpy(g->pos->data + n - d, row, d * sizeof *row);
}

/* (patches, channels, side, side) with channels last, or with the patches transposed */
static void reorder(const vit *g, exf_real *x, swap s) {
  size_t c = g->channels, a = g->patch * g->patch, side = g->size / g->patch;
  size_t n = side * side * c * a;
  exf_real *old = memory(n, sizeof *old);
  memcpy(old, x, n * sizeof *x);
  for (size_t i = 0; i < side * side; i++)
    for (size_t j = 0; j < c; j++)
      for (size_t k = 0; k < a; k++)
        if (s == SWAP_CHANNELS_LAST)
          x[(i * a + k) * c + j] = old[(i * c + j) * a + k];
        else
          x[((i % side * side + i / side) * c + j) * a + k] = old[(i * c + j) * a + k];
  free(old);
}

/* Builds the model of a fixture, with one thing swapped, and runs it forward. */
static golden golden_run(const char *file, exf_isa isa, swap s) {
  const int banks = strstr(file, "mb") != NULL;
  const exf_fusion_desc fusion = {.variant = EXF_MB, .n_experts = EXPERTS};
  exf_real pixels[BATCH * 432], labels_read[BATCH], moments[6];
  unsigned char bytes[432];
  int32_t labels[BATCH];
  golden t = {.ctx = exf_ctx_new(&(exf_desc){.isa = isa}),
              .g = {.n_layers = 2, .n_heads = 2, .width = 8, .size = 12, .patch = 4,
                    .channels = 3, .n_classes = 5, .eps = s == SWAP_EPS ? 1e-5 : 1e-6,
                    .act = s == SWAP_GELU ? EXF_GELU_TANH : EXF_GELU}};
  t.st = exf_st_open(t.ctx, file, NULL);
  if (!CHECK(t.st != NULL)) return t;
  numbers(&t, "pixels", pixels, BATCH * 432);
  numbers(&t, "labels", labels_read, BATCH);
  numbers(&t, "mean", moments, 3);
  numbers(&t, "std", moments + 3, 3);
  for (size_t i = 0; i < 3; i++) {
    t.g.mean[i] = s == SWAP_NORMALISATION ? 0.5 : (double)moments[i];
    t.g.std[i] = s == SWAP_NORMALISATION ? 0.25 : (double)moments[3 + i];
  }
  vit_build(&t.g, t.ctx, banks ? &fusion : NULL);
  load_fixture(&t, banks);
  if (s == SWAP_CLASS_ROW) move_class_row(&t.g);
  exf_tensor *x = vit_input(t.ctx, &t.g, BATCH);
  for (size_t i = 0; x && i < BATCH; i++) {
    for (size_t k = 0; k < 432; k++) bytes[k] = (unsigned char)pixels[i * 432 + k];
    vit_picture(&t.g, bytes, 0, 0, 0, x, i);
    if (s == SWAP_CHANNELS_LAST || s == SWAP_PATCHES_BY_COLUMN)
      reorder(&t.g, x->data + i * 432, s);
    labels[i] = (int32_t)labels_read[i];
  }
  exf_training_set(t.ctx, 1);
  t.logits = vit_forward(t.ctx, &t.g, x);
  t.loss = exf_cross_entropy(t.ctx, t.logits, labels, s == SWAP_SMOOTHING ? 0 : 0.1);
  return t;
}

static void golden_end(golden *t) {
  exf_st_close(t->st);
  vit_free(&t->g);
  exf_ctx_free(t->ctx);
}

static void check_gradients(golden *t) {
  size_t n = exf_model_n_params(t->g.model);
  for (size_t i = 0; i < n; i++) {
    exf_param *p = exf_model_param(t->g.model, i);
    exf_real *grad = memory(p->tensor.size, sizeof *grad);
    char name[72];
    CHECK(exf_expert_grad(p, grad) == EXF_OK);
    snprintf(name, sizeof name, "grad.%s", p->name);
    double d = distance(t, name, grad, p->tensor.size);
    if (!CHECK(d <= CLOSE)) printf("  %s: %.3g of its norm\n", name, d);
    free(grad);
  }
  CHECK(n >= 29);
}

/* Forward, loss and gradients, on the fast kernels and on the reference. */
static void agrees(const char *file) {
  static const exf_isa isas[] = {EXF_ISA_AUTO, EXF_ISA_REF};
  for (size_t i = 0; i < 2; i++) {
    golden t = golden_run(file, isas[i], SWAP_NOTHING);
    if (!CHECK(t.logits != NULL && t.loss != NULL)) return;
    CHECK(distance(&t, "logits", t.logits->data, t.logits->size) <= CLOSE);
    exf_real loss = t.loss->data[0];
    CHECK(distance(&t, "loss", &loss, 1) <= CLOSE);
    CHECK(exf_backward(t.ctx, t.loss) == EXF_OK);
    check_gradients(&t);
    CHECK_OK(t.ctx);
    golden_end(&t);
  }
}

TEST(dense_agrees_with_pytorch) { agrees("tests/golden/vit-dense.safetensors"); }
TEST(mb_agrees_with_pytorch) { agrees("tests/golden/vit-mb.safetensors"); }

/* Each mistake takes the logits (smoothing: the loss) at least three tolerances away. */
TEST(swapped_parts_do_not_agree) {
  for (int s = SWAP_NOTHING; s < N_SWAPS; s++) {
    golden t = golden_run("tests/golden/vit-dense.safetensors", EXF_ISA_AUTO, (swap)s);
    if (!CHECK(t.logits != NULL && t.loss != NULL)) return;
    exf_real loss = t.loss->data[0];
    double d = s == SWAP_SMOOTHING ? distance(&t, "loss", &loss, 1)
      : distance(&t, "logits", t.logits->data, t.logits->size);
    if (!CHECK(s == SWAP_NOTHING ? d <= CLOSE : d > 3 * CLOSE))
      printf("  swap %d: distance %.3g\n", s, d);
    golden_end(&t);
  }
}

/* timm: K D + K of the head, 2 D of the norm, 12 D^2 + 13 D per block, ... */
TEST(parameters_by_the_formula_of_timm) {
  static const size_t sizes[][6] = {   /* D, layers, patch, channels, size, classes */
    {192, 12, 16, 3, 224, 1000}, {64, 4, 4, 1, 28, 10}, {96, 4, 7, 1, 28, 10}};
  static const size_t counts[] = {5717416, 0, 0};
  for (size_t i = 0; i < 3; i++) {
    size_t d = sizes[i][0], p = sizes[i][2], c = sizes[i][3], k = sizes[i][5];
    size_t np = (sizes[i][4] / p) * (sizes[i][4] / p);
    size_t want = d + (np + 1) * d + d * c * p * p + d
                  + sizes[i][1] * (12 * d * d + 13 * d) + 2 * d + k * d + k;
    exf_ctx *ctx = exf_ctx_new(NULL);
    vit g = {.width = d, .n_layers = sizes[i][1], .n_heads = i == 0 ? 3 : 4, .patch = p,
             .channels = c, .size = sizes[i][4], .n_classes = k, .eps = 1e-6,
             .std = {1, 1, 1}};
    vit_build(&g, ctx, NULL);
    CHECK(exf_model_count(g.model) == want);
    if (counts[i]) CHECK(want == counts[i]);
    vit_free(&g);
    exf_ctx_free(ctx);
  }
}

/* With drop-path on, evaluation does not see it, training does. */
TEST(drop_path_grows_with_depth) {
  golden t = golden_run("tests/golden/vit-dense.safetensors", EXF_ISA_AUTO, SWAP_NOTHING);
  vit g = t.g;
  g.n_layers = 3;
  g.drop_path = 0.4;
  vit_build(&g, t.ctx, NULL);
  for (size_t i = 0; i < 3; i++)
    CHECK_NEAR(g.blocks[i]->drop_path, 0.2 * (double)i, 1e-12);
  vit_free(&g);
  golden_end(&t);
}

int main(void) {
  program_name = "test_vit_golden";
  RUN(dense_agrees_with_pytorch);
  RUN(mb_agrees_with_pytorch);
  RUN(swapped_parts_do_not_agree);
  RUN(parameters_by_the_formula_of_timm);
  RUN(drop_path_grows_with_depth);
  TEST_MAIN_END;
}
