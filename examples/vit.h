/* vit.h - the Vision Transformer of vit.c: timm's names, layouts and defaults. Include
   exfusion.h, common.h and images.h first. */
#ifndef EXF_EXAMPLES_VIT_H
#define EXF_EXAMPLES_VIT_H

/* ---- the model -------------------------------------------------------------------- */

typedef struct vit {
  size_t n_layers, n_heads, width, size, patch, channels, n_classes;
  double dropout, drop_path, eps, mean[3], std[3];
  exf_act act;
  exf_real level[3][256];            /* what the byte v becomes: (v / 255 - mean) / std */
  exf_model *model;
  exf_tensor *cls, *pos;             /* (1,1,D), (1,Np+1,D): row 0 is the class token's */
  exf_tensor *proj, *proj_bias;      /* (D,Cin,P,P), (D) */
  exf_block **blocks;                /* n_layers */
  exf_norm_layer *norm;
  exf_linear_layer *head;
} vit;

static inline size_t vit_patches(const vit *g) {
  return (g->size / g->patch) * (g->size / g->patch);
}

/* Makes the parameters from the sizes in g; fusion NULL: all FFNs dense. As in timm, the
   class token and the positions do not decay. The draws are wider than timm's 0.02, which
   is meant for wide models and long runs: every matrix keeps the size of what passes, and
   positions are as large as the pictures from the start. */
static inline void vit_build(vit *g, exf_ctx *ctx, const exf_fusion_desc *fusion) {
  size_t d = g->width, p = g->patch, fan_in = g->channels * p * p;
  exf_block_desc b = {.width = d, .n_heads = g->n_heads, .bias = 1, .eps = g->eps,
                      .dropout = g->dropout, .init_std = 1 / sqrt((double)d),
                      .init_std_out = 0.5 / sqrt((double)d), .names = EXF_NAMES_TIMM,
                      .ffn = {.act = g->act}};
  const exf_param_desc
    cls = {.shape = exf_shape3(1, 1, d), .init_std = 0.5},
    pos = {.shape = exf_shape3(1, vit_patches(g) + 1, d), .init_std = 0.5},
    proj = {.shape = exf_shape4(d, g->channels, p, p), .decay = 1,
            .init_std = 1 / sqrt(3.0 * (double)fan_in)},
    bias = {.shape = exf_shape1(d)};
  if (g->n_layers < 1) fail(1, "a ViT without blocks: it needs one at least");
  if (fusion) b.ffn.fusion = *fusion;
  g->model = exf_model_new(ctx);
  g->cls = exf_param_new(g->model, "cls_token", &cls);
  g->pos = exf_param_new(g->model, "pos_embed", &pos);
  g->proj = exf_param_new(g->model, "patch_embed.proj.weight", &proj);
  g->proj_bias = exf_param_new(g->model, "patch_embed.proj.bias", &bias);
  g->blocks = memory(g->n_layers, sizeof *g->blocks);
  for (size_t i = 0; i < g->n_layers; i++) {
    char name[32];
    snprintf(name, sizeof name, "blocks.%u", (unsigned)i);
    b.drop_path = g->n_layers > 1
      ? g->drop_path * (double)i / (double)(g->n_layers - 1) : g->drop_path;
    g->blocks[i] = exf_block_new(g->model, name, &b);
  }
  g->norm = exf_norm_new(g->model, "norm", d, &(exf_norm_desc){.bias = 1, .eps = g->eps});
  g->head = exf_linear_new(g->model, "head", d, g->n_classes,
                           &(exf_linear_desc){.bias = 1, .init_std = 0.02});
  for (size_t c = 0; c < g->channels; c++)
    for (int v = 0; v < 256; v++)
      g->level[c][v] = (exf_real)((v / 255.0 - g->mean[c]) / g->std[c]);
  check(ctx);
}

static inline void vit_free(vit *g) {
  exf_model_free(g->model);
  free(g->blocks);
}

/* The last block: only the class token (B,1,D) is read behind it, so only that passes its
   projection and FFN, and only that is what its router sees. */
static inline exf_tensor *vit_last_block(exf_ctx *ctx, const exf_block *b,
                                         exf_tensor *x) {
  const exf_attention_desc heads = {.n_heads = b->attn->n_heads};
  exf_tensor *y = exf_norm_forward(ctx, b->norm1, x);
  y = exf_attention(ctx, exf_linear_forward(ctx, b->attn->qkv, y), &heads);
  y = exf_linear_forward(ctx, b->attn->proj, exf_slice(ctx, y, 1, 0, 1));
  y = exf_drop_path(ctx, exf_dropout(ctx, y, b->dropout), b->drop_path);
  x = exf_add(ctx, exf_slice(ctx, x, 1, 0, 1), y);
  y = exf_ffn_forward(ctx, b->ffn, exf_norm_forward(ctx, b->norm2, x));
  y = exf_drop_path(ctx, exf_dropout(ctx, y, b->dropout), b->drop_path);
  return exf_add(ctx, x, y);
}

/* patches (B,Np,Cin P P) -> logits (B,K) */
static inline exf_tensor *vit_forward(exf_ctx *ctx, const vit *g, exf_tensor *patches) {
  size_t d = g->width, b = patches ? patches->shape.dim[0] : 1, last = g->n_layers - 1;
  exf_tensor *w, *x, *tokens[2];
  w = exf_reshape(ctx, g->proj, exf_shape2(d, g->channels * g->patch * g->patch));
  tokens[0] = exf_add(ctx, g->cls, exf_tensor_new(ctx, exf_shape3(b, 1, d), NULL));
  tokens[1] = exf_linear(ctx, patches, w, g->proj_bias);       /* (B,Np,D) */
  x = exf_add(ctx, exf_concat(ctx, tokens, 2, 1), g->pos);     /* (B,Np+1,D) */
  x = exf_dropout(ctx, x, g->dropout);
  for (size_t i = 0; i < last; i++) x = exf_block_forward(ctx, g->blocks[i], x, NULL);
  x = exf_norm_forward(ctx, g->norm, vit_last_block(ctx, g->blocks[last], x));
  return exf_linear_forward(ctx, g->head, exf_reshape(ctx, x, exf_shape2(b, d)));
}

/* Room for n pictures as patches (n,Np,Cin P P); NULL after an error. */
static inline exf_tensor *vit_input(exf_ctx *ctx, const vit *g, size_t n) {
  size_t per = g->channels * g->patch * g->patch;
  return exf_tensor_new(ctx, exf_shape3(n, vit_patches(g), per), NULL);
}

/* Makes a picture (channels,size,size) number i of a vit_input: patches by rows, in each
   channel, row, column, as a convolution's weight wants them. It is first mirrored (flip)
   and moved right and down by dx, dy, with black moving in. */
static inline void vit_picture(const vit *g, const unsigned char *pixels, int flip,
                               long dx, long dy, exf_tensor *x, size_t i) {
  long size = (long)g->size, patch = (long)g->patch;
  exf_real *out = x->data + i * (x->size / x->shape.dim[0]);
  for (long top = -dy; top < size - dy; top += patch)
    for (long left = -dx; left < size - dx; left += patch)
      for (size_t c = 0; c < g->channels; c++) {
        const unsigned char *plane = pixels + c * g->size * g->size;
        for (long sy = top; sy < top + patch; sy++)
          for (long column = left; column < left + patch; column++) {
            long sx = flip ? size - 1 - column : column;
            int inside = sx >= 0 && sy >= 0 && sx < size && sy < size;
            *out++ = g->level[c][inside ? plane[sy * size + sx] : 0];
          }
      }
}

/* ---- evaluation ------------------------------------------------------------------- */

typedef struct score {
  merge_result m;                     /* val_loss is the loss of whatever split */
  double accuracy, accuracy_merged;   /* fractions of 1 */
  int32_t *guess;                     /* (n), or NULL: nobody wants to know */
} score;

/* Adds what the logits (B,K) say of these labels to loss and accuracy; the guesses go to
   guess, unless it is NULL. */
static inline void judge(exf_ctx *ctx, exf_tensor *logits, const int32_t *labels,
                         double *loss, double *accuracy, int32_t *guess) {
  exf_tensor *logp = exf_log_softmax(ctx, logits);
  const int32_t *best = exf_argmax(ctx, logp);
  for (size_t i = 0; best && i < logp->shape.dim[0]; i++) {
    *loss -= (double)logp->data[i * logp->shape.dim[1] + (size_t)labels[i]];
    *accuracy += best[i] == labels[i];
    if (guess) guess[i] = best[i];
  }
}

/* Loss and accuracy on a split; the same of `merged` when there is one, and the largest
   difference between their logits. keep: the guesses as well, to be freed. */
static inline score evaluate(exf_ctx *ctx, const vit *g, const vit *merged,
                             const image_set *set, int split, int keep) {
  size_t n = set->n_split[split], b;
  int32_t labels[256] = {0};
  int grad = exf_grad_set(ctx, 0);
  score e = {.m.n = n};
  if (keep) e.guess = memory(n, sizeof *e.guess);
  for (size_t at = 0; at < n && exf_ctx_status(ctx) == EXF_OK; at += b) {
    b = n - at < 256 ? n - at : 256;
    exf_tensor *x = vit_input(ctx, g, b), *logits, *other;
    for (size_t i = 0; x && i < b; i++) {
      size_t k = set->index[split][at + i];
      labels[i] = set->label[k];
      vit_picture(g, image_at(set, k), 0, 0, 0, x, i);
    }
    logits = vit_forward(ctx, g, x);
    judge(ctx, logits, labels, &e.m.val_loss, &e.accuracy, keep ? e.guess + at : NULL);
    if (merged) {
      other = vit_forward(ctx, merged, x);
      judge(ctx, other, labels, &e.m.val_loss_merged, &e.accuracy_merged, NULL);
      compare_logits(logits, other, &e.m.max_diff);
    }
    exf_rewind(ctx);
  }
  exf_grad_set(ctx, grad);
  check(ctx);
  e.m.val_loss /= (double)n;
  e.m.val_loss_merged /= (double)n;
  e.accuracy /= (double)n;
  e.accuracy_merged /= (double)n;
  return e;
}

/* ---- model files ------------------------------------------------------------------ */

/* Pixel mean and deviation as flat JSON, "mean":"0.28 0.3","std":"0.2 0.2", one number
   per channel, and back: 0 unless there are as many. */
static inline void pixels_write(const vit *g, text *t) {
  for (int k = 0; k < 2; k++) {
    text_add(t, k ? "\",\"std\":\"" : "\"mean\":\"");
    for (size_t c = 0; c < g->channels; c++) {
      if (c) text_add(t, " ");
      text_number(t, k ? g->std[c] : g->mean[c]);
    }
  }
  text_add(t, "\"");
}

static inline int pixels_read(vit *g, const char *json) {
  for (int k = 0; k < 2; k++) {
    const char *s = json_find(json, k ? "std" : "mean");
    for (size_t c = 0; c < g->channels; c++) {
      char *end = NULL;
      double x = s ? strtod(s, &end) : 0;
      if (end == s || !(fabs(x) < 1e6) || (k && !(x > 0))) return 0;
      *(k ? &g->std[c] : &g->mean[c]) = x;
      s = end;
    }
    if (*s) return 0;
  }
  return 1;
}

/* The geometry as flat JSON, for exf.config. */
static inline void vit_geometry(const vit *g, text *t) {
  text_add(t, "{\"img_size\":%llu,\"patch_size\":%llu,\"in_chans\":%llu,"
           "\"embed_dim\":%llu,\"depth\":%llu,\"num_heads\":%llu,\"mlp_ratio\":4,"
           "\"num_classes\":%llu,\"activation\":\"gelu\",", (ull)g->size, (ull)g->patch,
           (ull)g->channels, (ull)g->width, (ull)g->n_layers, (ull)g->n_heads,
           (ull)g->n_classes);
  pixels_write(g, t);
  text_add(t, "}");
}

/* Sizes of an open file with timm's names, and of its metadata pixel mean and deviation
   (std[0] = 0: none). heads: for files that do not say; 0 refuses them. */
static inline void geometry_read(const exf_st *st, const char *path, size_t heads,
                                 vit *g) {
  const exf_st_entry *pos = exf_st_find(st, "pos_embed");
  const exf_st_entry *proj = exf_st_find(st, "patch_embed.proj.weight");
  const exf_st_entry *head = exf_st_find(st, "head.weight");
  const exf_st_entry *fc1 = exf_st_find(st, "blocks.0.mlp.fc1.weight");
  size_t side = 0;
  char name[64];
  if (exf_st_find(st, "adamw.m.pos_embed"))
    fail(1, "%s is a checkpoint: give the model.safetensors beside it", path);
  if (pos && pos->n_dims == 3)
    while ((side + 1) * (side + 1) < pos->dim[1] && side < IMAGE_MAX_SIDE) side++;
  if (side < 1 || side * side + 1 != pos->dim[1] || !proj || proj->n_dims != 4
      || proj->dim[2] != proj->dim[3] || proj->dim[2] > IMAGE_MAX_SIDE || proj->dim[0] < 1
      || (proj->dim[1] != 1 && proj->dim[1] != 3) || !head || head->n_dims != 2
      || head->dim[0] < 1 || head->dim[0] > MAX_CLASSES || !fc1 || fc1->n_dims != 2
      || fc1->dim[0] != 4 * proj->dim[0])
    fail(1, "%s is not a ViT of this kind: it needs pos_embed [1,side^2+1,D], "
         "patch_embed.proj.weight [D,1 or 3,P,P], head.weight and FFNs of width 4 D; see "
         "vit info", path);
  *g = (vit){.patch = proj->dim[2], .size = side * proj->dim[2], .channels = proj->dim[1],
             .width = proj->dim[0], .n_classes = head->dim[0], .eps = 1e-6};
  do snprintf(name, sizeof name, "blocks.%u.norm1.weight", (unsigned)g->n_layers);
  while (exf_st_find(st, name) && ++g->n_layers < 1024);
  const char *config = config_read(st, path), *act = json_find(config, "activation");
  if (act && strcmp(act, "gelu") != 0)
    fail(1, "%s: its activation is %.40s, vit has gelu: convert it", path, act);
  g->n_heads = config_count(config, "num_heads", heads, path);
  if (!pixels_read(g, config)) g->std[0] = 0;
  if (g->n_layers < 1 || g->n_heads < 1 || g->n_heads > g->width || g->width % g->n_heads)
    fail(1, "%s: %s blocks, %s heads for width %s: its exf.config must hold num_heads, a "
         "divisor of the width (to train, give --heads)", path, commas(g->n_layers),
         commas(g->n_heads), commas(g->width));
}

/* Ends the program unless the pictures are such as the model wants. */
static inline void vit_check_set(const vit *g, const image_set *set, const char *name) {
  if (set->classes != g->n_classes || set->channels != g->channels)
    fail(1, "%s has %s classes and %s channels, the model %s and %s: give data like "
         "those it was made for", name, commas(set->classes), commas(set->channels),
         commas(g->n_classes), commas(g->channels));
}

/* The dense model of DIR|FILE; the names of its classes, if it has some, and the seed of
   its run go to *names and *seed, if wanted. Returns the path of the file. */
static inline const char *open_model(exf_ctx *ctx, const char *place, vit *g,
                                     image_set *names, uint64_t *seed) {
  const char *path = model_path(place);
  exf_st *st = open_tensors(ctx, path);
  const char *labels = exf_st_meta(st, "exf.labels"), *s = exf_st_meta(st, "exf.seed");
  geometry_read(st, path, 0, g);
  if (!(g->std[0] > 0))
    fail(1, "%s: its exf.config has no pixel mean and std: train --init with it and "
         "--steps 0 gives it them", path);
  vit_build(g, ctx, NULL);
  exf_model_load(g->model, path);
  check(ctx);
  if (seed) *seed = s ? strtoull(s, NULL, 10) : 1;
  if (names) memset(names, 0, sizeof *names);
  if (names && labels && !names_read(names, labels, g->n_classes))
    fail(1, "%s: exf.labels must list %s names: write the file anew", path,
         commas(g->n_classes));
  exf_st_close(st);
  return path;
}

#endif /* EXF_EXAMPLES_VIT_H */
