/* vit.h - the Vision Transformer of vit.c: timm's names, layouts and defaults.

   Include exfusion.h, common.h and images.h first. */
#ifndef EXF_EXAMPLES_VIT_H
#define EXF_EXAMPLES_VIT_H

/* ---- the model -------------------------------------------------------------------- */

typedef struct vit {
  size_t n_layers, n_heads, width, size, patch, channels, n_classes;
  double dropout, drop_path, eps, mean[3], std[3];
  exf_act act;
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

static inline exf_tensor *vit_param(vit *g, const char *name, exf_shape shape, double std,
                                    int decay) {
  exf_param_desc d;
  memset(&d, 0, sizeof d);
  d.shape = shape;
  d.init_std = std;
  d.decay = decay;
  return exf_param_new(g->model, name, &d);
}

/* Makes the parameters from the sizes in g; fusion NULL: all FFNs dense. As in timm, the
   class token and the positions do not decay. The draws are wider than timm's 0.02, which
   is meant for wide models and long runs: every matrix keeps the size of what passes, and
   positions are as large as the pictures from the start. */
static inline void vit_build(vit *g, exf_ctx *ctx, const exf_fusion_desc *fusion) {
  size_t d = g->width, p = g->patch, fan_in = g->channels * p * p, i;
  exf_block_desc b;
  char name[32];
  memset(&b, 0, sizeof b);
  b.width = d;
  b.n_heads = g->n_heads;
  b.bias = 1;
  b.eps = g->eps;
  b.dropout = g->dropout;
  b.init_std = 1 / sqrt((double)d);
  b.init_std_out = 0.5 / sqrt((double)d);
  b.names = EXF_NAMES_TIMM;
  b.ffn.act = g->act;
  if (fusion) b.ffn.fusion = *fusion;
  g->model = exf_model_new(ctx);
  g->cls = vit_param(g, "cls_token", exf_shape3(1, 1, d), 0.5, 0);
  g->pos = vit_param(g, "pos_embed", exf_shape3(1, vit_patches(g) + 1, d), 0.5, 0);
  g->proj = vit_param(g, "patch_embed.proj.weight", exf_shape4(d, g->channels, p, p),
                      1 / sqrt(3.0 * (double)fan_in), 1);
  g->proj_bias = vit_param(g, "patch_embed.proj.bias", exf_shape1(d), 0, 0);
  if (g->n_layers < 1) fail(1, "a ViT without blocks: it needs one at least");
  g->blocks = (exf_block **)memory(g->n_layers, sizeof *g->blocks);
  for (i = 0; i < g->n_layers; i++) {
    snprintf(name, sizeof name, "blocks.%u", (unsigned)i);
    b.drop_path = g->n_layers > 1
      ? g->drop_path * (double)i / (double)(g->n_layers - 1) : g->drop_path;
    g->blocks[i] = exf_block_new(g->model, name, &b);
  }
  g->norm = exf_layernorm_new(g->model, "norm", d, 1, g->eps);
  g->head = exf_linear_new(g->model, "head", d, g->n_classes, 1, 0.02);
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
  exf_tensor *y = exf_norm_forward(ctx, b->norm1, x);
  y = exf_attention(ctx, exf_linear_forward(ctx, b->attn->qkv, y), b->attn->n_heads, 0);
  y = exf_linear_forward(ctx, b->attn->proj, exf_slice(ctx, y, 1, 0, 1));
  y = exf_drop_path(ctx, exf_dropout(ctx, y, b->dropout), b->drop_path);
  x = exf_add(ctx, exf_slice(ctx, x, 1, 0, 1), y);
  y = exf_ffn_forward(ctx, b->ffn, exf_norm_forward(ctx, b->norm2, x));
  y = exf_drop_path(ctx, exf_dropout(ctx, y, b->dropout), b->drop_path);
  return exf_add(ctx, x, y);
}

/* patches (B,Np,Cin P P) -> logits (B,K) */
static inline exf_tensor *vit_forward(exf_ctx *ctx, const vit *g, exf_tensor *patches) {
  size_t d = g->width, b = patches ? patches->shape.dim[0] : 1, i;
  exf_tensor *w, *x, *tokens[2];
  w = exf_reshape(ctx, g->proj, exf_shape2(d, g->channels * g->patch * g->patch));
  tokens[0] = exf_add(ctx, g->cls, exf_tensor_new(ctx, exf_shape3(b, 1, d), NULL));
  tokens[1] = exf_linear(ctx, patches, w, g->proj_bias);       /* (B,Np,D) */
  x = exf_add(ctx, exf_concat(ctx, tokens, 2, 1), g->pos);     /* (B,Np+1,D) */
  x = exf_dropout(ctx, x, g->dropout);
  for (i = 0; i + 1 < g->n_layers; i++) x = exf_block_forward(ctx, g->blocks[i], x);
  x = exf_norm_forward(ctx, g->norm, vit_last_block(ctx, g->blocks[i], x));
  return exf_linear_forward(ctx, g->head, exf_reshape(ctx, x, exf_shape2(b, d)));
}

/* Room for n pictures as patches; NULL after an error. */
static inline exf_tensor *vit_input(exf_ctx *ctx, const vit *g, size_t n) {
  size_t per = g->channels * g->patch * g->patch;
  return exf_tensor_new(ctx, exf_shape3(n, vit_patches(g), per), NULL);
}

/* ---- evaluation ------------------------------------------------------------------- */

typedef struct score {
  merge_result m;                     /* val_loss is the loss of whatever split */
  double accuracy, accuracy_merged;   /* fractions of 1 */
  int32_t *guess;                     /* (n), or NULL: nobody wants to know */
  double *loss;                       /* (n) */
} score;

/* Adds what the logits (B,K) say of these labels to loss and accuracy; the guesses and
   the losses of the pictures go to guess and each, unless they are NULL. */
static inline void judge(exf_ctx *ctx, exf_tensor *logits, const int32_t *labels,
                         double *loss, double *accuracy, int32_t *guess, double *each) {
  exf_tensor *logp = exf_log_softmax(ctx, logits);
  size_t i, k, classes, best;
  if (!logp) return;
  classes = logp->shape.dim[1];
  for (i = 0; i < logp->shape.dim[0]; i++) {
    const exf_real *row = logp->data + i * classes;
    for (best = 0, k = 1; k < classes; k++)
      if (row[k] > row[best]) best = k;
    *loss -= (double)row[labels[i]];
    *accuracy += best == (size_t)labels[i];
    if (guess) guess[i] = (int32_t)best;
    if (each) each[i] = -(double)row[labels[i]];
  }
}

/* Loss and accuracy on a split; the same of `merged` when there is one, and the largest
   difference between their logits. */
static inline score evaluate(exf_ctx *ctx, const vit *g, const vit *merged,
                             const image_set *set, int split, int keep) {
  size_t n = set->n_split[split], at, b, i, per;
  const lens view = lens_new(g->channels, g->size, g->patch, g->mean, g->std);
  int32_t labels[256] = {0};
  int grad = exf_grad_set(ctx, 0);
  score e;
  memset(&e, 0, sizeof e);
  if (keep) e.guess = (int32_t *)memory(n, sizeof *e.guess);
  if (keep) e.loss = (double *)memory(n, sizeof *e.loss);
  per = vit_patches(g) * g->channels * g->patch * g->patch;
  for (at = 0; at < n && exf_ctx_status(ctx) == EXF_OK; at += b) {
    exf_tensor *x, *logits, *other;
    b = n - at < 256 ? n - at : 256;
    x = vit_input(ctx, g, b);
    for (i = 0; x && i < b; i++) {
      size_t k = set->index[split][at + i];
      labels[i] = set->label[k];
      lens_patches(&view, image_at(set, k), 0, 0, 0, x->data + i * per);
    }
    logits = vit_forward(ctx, g, x);
    judge(ctx, logits, labels, &e.m.val_loss, &e.accuracy,
          keep ? e.guess + at : NULL, keep ? e.loss + at : NULL);
    if (merged) {
      other = vit_forward(ctx, merged, x);
      judge(ctx, other, labels, &e.m.val_loss_merged, &e.accuracy_merged, NULL, NULL);
      if (logits && other) compare_logits(logits, other, &e.m.max_diff);
    }
    exf_rewind(ctx);
  }
  exf_grad_set(ctx, grad);
  check(ctx);
  e.m.n = n;
  e.m.val_loss /= (double)n;
  e.m.val_loss_merged /= (double)n;
  e.accuracy /= (double)n;
  e.accuracy_merged /= (double)n;
  return e;
}

/* ---- model files ------------------------------------------------------------------ */

/* "mean":"0.28 0.3", one number per channel, and back: 0 unless there are n. */
static inline void numbers_write(text *t, const char *key, const double *x, size_t n) {
  size_t i;
  text_add(t, "\"%s\":\"", key);
  for (i = 0; i < n; i++) {
    if (i) text_add(t, " ");
    json_number(t, NULL, x[i]);
  }
  text_add(t, "\"");
}

static inline int numbers_read(const json *j, const char *key, double *x, size_t n) {
  const char *s = json_find(j, key);
  char *end;
  size_t i;
  for (i = 0; s && i < n; i++, s = end) {
    x[i] = strtod(s, &end);
    if (end == s || !(fabs(x[i]) < 1e6)) return 0;
  }
  return s && *s == 0;
}

/* The geometry as flat JSON, for exf.config. */
static inline void vit_geometry(const vit *g, text *t) {
  text_add(t, "{");
  json_integer(t, "img_size", g->size);
  text_add(t, ",");
  json_integer(t, "patch_size", g->patch);
  text_add(t, ",");
  json_integer(t, "in_chans", g->channels);
  text_add(t, ",");
  json_integer(t, "embed_dim", g->width);
  text_add(t, ",");
  json_integer(t, "depth", g->n_layers);
  text_add(t, ",");
  json_integer(t, "num_heads", g->n_heads);
  text_add(t, ",\"mlp_ratio\":4,");
  json_integer(t, "num_classes", g->n_classes);
  text_add(t, ",\"activation\":\"gelu\",");
  numbers_write(t, "mean", g->mean, g->channels);
  text_add(t, ",");
  numbers_write(t, "std", g->std, g->channels);
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
  const char *value;
  size_t side = 0, c;
  char name[64];
  json j;
  memset(g, 0, sizeof *g);
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
  g->patch = proj->dim[2];
  g->size = side * g->patch;
  g->channels = proj->dim[1];
  g->width = proj->dim[0];
  g->n_classes = head->dim[0];
  g->eps = 1e-6;
  do snprintf(name, sizeof name, "blocks.%u.norm1.weight", (unsigned)g->n_layers);
  while (exf_st_find(st, name) && ++g->n_layers < 1024);
  config_read(&j, st, path);
  g->n_heads = config_count(&j, "num_heads", heads, path);
  if ((value = json_find(&j, "activation")) != NULL && strcmp(value, "gelu") != 0)
    fail(1, "%s: its activation is %.40s, vit has gelu: convert it", path, value);
  if (!numbers_read(&j, "mean", g->mean, g->channels)
      || !numbers_read(&j, "std", g->std, g->channels)) g->std[0] = 0;
  for (c = 0; c < g->channels; c++)
    if (!(g->std[c] > 0)) g->std[0] = 0;
  json_free(&j);
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

/* The dense model of DIR|FILE and the names of its classes, in `names`, or NULL; returns
   the path of the file, and the seed of its run in *seed. */
static inline char *open_model(exf_ctx *ctx, const char *place, vit *g, image_set *names,
                               uint64_t *seed) {
  char *path = model_path(place), name[24];
  exf_st *st = open_tensors(ctx, path);
  const char *labels = exf_st_meta(st, "exf.labels"), *s = exf_st_meta(st, "exf.seed");
  size_t i;
  geometry_read(st, path, 0, g);
  if (!(g->std[0] > 0))
    fail(1, "%s: its exf.config has no pixel mean and std: train --init with it and "
         "--steps 0 gives it them", path);
  vit_build(g, ctx, NULL);
  exf_model_load(g->model, st);
  check_load(ctx, path);
  if (seed) *seed = s ? strtoull(s, NULL, 10) : 1;
  if (names) memset(names, 0, sizeof *names);
  if (names && labels && !names_read(names, labels, g->n_classes))
    fail(1, "%s: exf.labels must list %s names: write the file anew", path,
         commas(g->n_classes));
  for (i = 0; names && !labels && i < g->n_classes; i++) {
    snprintf(name, sizeof name, "%u", (unsigned)i);
    class_add(names, name);
  }
  exf_st_close(st);
  return path;
}

#endif /* EXF_EXAMPLES_VIT_H */
