/* vit.c - a Vision Transformer (DeiT-like) whose FFNs are trained as several experts
   fused into one (ExFusion), merged into an ordinary dense model, and asked what it sees.

   Shows: a second architecture from the library's modules; pictures from IDX files,
          folders, or generated; augmentation by counter-based random numbers, so that a
          resumed run is the same run; accuracy before and after the merge.
   Runs:  a minute with --quick; minutes on Fashion-MNIST on two cores.
   Build: cc -O2 -fopenmp -o build/vit examples/vit.c -lm         (-fopenmp: optional;
          for PNG, JPEG and BMP: -DSTB_IMAGE='<stb/stb_image.h>')
   Ends:  next    build/vit eval runs/vit */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"

#include "common.h"
#include "images.h"
#include "vit.h"

typedef unsigned long long ull;

/* ---- train ------------------------------------------------------------------------ */

typedef struct trainer {
  run r;
  source from;
  const char *init;
  uint64_t patch, steps, augment, flip, shift;
  double epochs, smoothing, ema_decay;
  int order;
  vit g;
  lens view;
  image_set set;
  size_t *shuffled;                  /* the training pictures in the order of an epoch */
  uint64_t epoch;                    /* which one */
  exf_ema *ema;
  vit average;                       /* the dense model it is copied to */
  uint64_t ema_saved;                /* the step of the file, or FLAG_UNSET */
} trainer;

static void train_defaults(trainer *c) {
  const double big = 1073741824.0;
  const settings s = {"runs/vit", "", EXF_MB, 0, EXF_UP_DEFAULT, 0, 4, 0.95, 4, 4, 96,
                      64, 1, 0, FLAG_UNSET, 1000, 1000, 1e-3, 0, 0.05, 0.9, 0.99, 1, 1, 0,
                      0, 0, 0, 0};
  const flag own[] = {
    {"data", 's', FLAG_DATA, &c->from.data, 0, 0, NULL, "folder of four IDX files, or "
     "the word generated; none: Fashion-MNIST if it is installed", 0, NULL},
    {"images", 's', FLAG_DATA, &c->from.images, 0, 0, NULL,
     "folder of pictures, a sub-folder per class", 0, NULL},
    {"size", 'u', FLAG_TRAINING, &c->from.size, -1, IMAGE_MAX_SIDE, NULL,
     "side all are resized to; null or 0: the IDX file's, else 28", 0, NULL},
    {"skip-bad", 'b', FLAG_TRAINING, &c->from.skip_bad, 0, 0, NULL,
     "leave out pictures that cannot be read", 0, NULL},
    {"classes", 'u', FLAG_TRAINING, &c->from.classes, 2, 256, NULL, "of IDX files", 0,
     NULL},
    {"val", 'u', FLAG_TRAINING, &c->from.val, 1, big, NULL,
     "pictures held out for validation, a tenth at most", 0, NULL},
    {"patch", 'u', FLAG_TRAINING, &c->patch, 1, IMAGE_MAX_SIDE, NULL, "side of a patch",
     0, NULL},
    {"epochs", 'x', FLAG_TRAINING, &c->epochs, 0, 1e6, NULL,
     "times each picture is seen", 0, NULL},
    {"steps", 'u', FLAG_TRAINING, &c->steps, -1, 4e9, NULL, "updates; null: by --epochs",
     0, NULL},
    {"order", 'c', FLAG_TRAINING, &c->order, 0, 0, "shuffle|sequential",
     "of the pictures in an epoch", 0, NULL},
    {"augment", 'u', FLAG_TRAINING, &c->augment, 0, 1, NULL,
     "0: pictures as they are; 1: moved and mirrored at random", 0, NULL},
    {"flip", 'u', FLAG_TRAINING, &c->flip, 0, 1, NULL, "0: never mirrored", 0, NULL},
    {"shift", 'u', FLAG_TRAINING, &c->shift, 0, 1000, NULL, "pixels moved at most", 0,
     NULL},
    {"label-smoothing", 'x', FLAG_TRAINING, &c->smoothing, 0, 0.999, NULL,
     "share of the target spread over all classes", 0, NULL},
    {"drop-path", 'x', FLAG_TRAINING, &c->g.drop_path, 0, 0.999, NULL,
     "probability of skipping a branch in the last block, from 0 in the first", 0, NULL},
    {"ema", 'x', FLAG_TRAINING, &c->ema_decay, 0, 0.999999999, NULL,
     "decay of a moving average of the weights; 0: none", 0, NULL},
    {"init", 's', FLAG_TRAINING, &c->init, 0, 0, NULL,
     "start from a dense model, DIR|FILE, and upcycle it", 0, NULL}};
  const int n = (int)(sizeof own / sizeof own[0]);
  memset(c, 0, sizeof *c);
  c->r.s = s;
  c->r.task = "vit";
  c->r.list_key = "exf.labels";
  c->r.loss = NAN;
  c->from.data = c->from.images = c->init = "";
  c->from.size = c->steps = c->ema_saved = c->epoch = FLAG_UNSET;
  c->from.classes = 10;
  c->from.val = 5000;
  c->patch = 7;
  c->epochs = 20;
  c->augment = 1;
  c->flip = 1;
  c->shift = 1;
  memcpy(c->r.flags, own, sizeof own);
  c->r.n_flags = n + settings_flags(&c->r.s, c->r.flags + n);
  flag_find(c->r.flags, c->r.n_flags, "warmup")->low = -1;
  flag_find(c->r.flags, c->r.n_flags, "warmup")->help =
    "warm-up steps; null: a twentieth of the run";
}

static void two_sources(void) {
  fail(2, "--data and --images: give one of them");
}

/* What a run recorded must be where it says. */
static void source_recorded(const flag *data, const flag *images, const char *place) {
  const char *name = *(const char *const *)data->value;
  if (**(const char *const *)images->value) flag_recorded(images, place);
  else if (*name && strcmp(name, "generated") != 0) flag_recorded(data, place);
}

/* Finds and reads the pictures. Returns what they are called. */
static const char *train_source(trainer *c) {
  flag *data = flag_find(c->r.flags, c->r.n_flags, "data");
  flag *images = flag_find(c->r.flags, c->r.n_flags, "images");
  if (*c->from.images && *c->from.data) {
    if (data->given && images->given) two_sources();
    flag_set(data->given ? images : data, "", "");
  }
  if (!*c->from.images && !*c->from.data) flag_set(data, default_source(), "");
  if (c->r.s.resume) source_recorded(data, images, c->r.s.out);
  return source_read(&c->set, &c->from, c->r.s.seed);
}

/* Pixel mean and deviation: those of the run that is resumed, of the file of --init, or
   of the pictures. Then what identifies the data. */
static void train_pixels(trainer *c, const char *name) {
  run *r = &c->r;
  vit *g = &c->g;
  text mine = {NULL, 0, 0};
  json j;
  if (r->s.resume) {
    char *what = path_in(r->s.out, "checkpoint.safetensors: exf.data");
    json_read(&j, r->data.s, what);
    free(what);
    if (!numbers_read(&j, "mean", g->mean, g->channels)
        || !numbers_read(&j, "std", g->std, g->channels)) g->std[0] = 0;
    json_free(&j);
  }
  if (!(g->std[0] > 0)) {
    memcpy(g->mean, c->set.mean, sizeof g->mean);
    memcpy(g->std, c->set.std, sizeof g->std);
  }
  text_add(&mine, "{\"images\":%llu,\"fnv1a\":\"%016llx\",", (ull)c->set.n,
           (ull)c->set.hash);
  numbers_write(&mine, "mean", g->mean, g->channels);
  text_add(&mine, ",");
  numbers_write(&mine, "std", g->std, g->channels);
  text_add(&mine, "}");
  run_data(r, &mine, name, *c->from.images ? "--images" : "--data");
}

/* Data, and the sizes of the model: from data and flags, or from the file of --init,
   which is returned open, with its path, to be freed. */
static exf_st *train_data(trainer *c, char **path) {
  run *r = &c->r;
  vit *g = &c->g;
  const double drop_path = g->drop_path;
  const char *name;
  exf_st *st = NULL;
  if (*c->init && !r->s.resume) {
    *path = model_path(c->init);
    st = open_tensors(r->ctx, *path);
    geometry_read(st, *path, (size_t)r->s.heads, g);
    flag_agree(r->flags, r->n_flags, "layers", g->n_layers, *path);
    flag_agree(r->flags, r->n_flags, "heads", g->n_heads, *path);
    flag_agree(r->flags, r->n_flags, "width", g->width, *path);
    flag_agree(r->flags, r->n_flags, "patch", g->patch, *path);
    flag_agree(r->flags, r->n_flags, "size", g->size, *path);
  }
  name = train_source(c);
  if (st) vit_check_set(g, &c->set, name);
  g->n_layers = (size_t)r->s.layers;
  g->n_heads = (size_t)r->s.heads;
  g->width = (size_t)r->s.width;
  g->patch = (size_t)c->patch;
  g->size = c->set.size;
  g->channels = c->set.channels;
  g->n_classes = c->set.classes;
  g->dropout = r->s.dropout;
  g->drop_path = drop_path;
  g->eps = 1e-6;
  if (g->width % g->n_heads)
    fail(2, "--heads %s does not divide --width %s: every head takes an equal part",
         commas(g->n_heads), commas(g->width));
  if (g->size % g->patch)
    fail(2, "--patch %s does not divide the side %s of the pictures: patches tile them "
         "(--size changes it)", commas(g->patch), commas(g->size));
  train_pixels(c, name);
  return st;
}

/* What the merged model's metadata say; how long the run is. */
static void train_plan(trainer *c) {
  run *r = &c->r;
  const vit *g = &c->g;
  double per_step = (double)(r->s.batch * r->s.accum);
  double steps = ceil(c->epochs * (double)c->set.n_split[SPLIT_TRAIN] / per_step);
  r->list.n = 0;
  names_write(c->set.names, c->set.classes, &r->list);
  vit_geometry(g, &r->geometry);
  if (steps > 4e9) fail(2, "--epochs %g are more than 4e9 steps: take fewer", c->epochs);
  r->steps = c->steps == FLAG_UNSET ? (uint64_t)steps : c->steps;
  r->per_step = (size_t)per_step * (vit_patches(g) + 1);
  c->view = lens_new(g->channels, g->size, g->patch, g->mean, g->std);
  c->shuffled = (size_t *)memory(c->set.n_split[SPLIT_TRAIN], sizeof *c->shuffled);
}

/* Micro-batch `micro` of the run: pictures number micro batch .. of an endless row of
   epochs, each in an order of its own; all draws are functions of epoch and place. */
static exf_tensor *train_batch(trainer *c, uint64_t micro, int32_t *labels) {
  const settings *s = &c->r.s;
  size_t n = c->set.n_split[SPLIT_TRAIN], batch = (size_t)s->batch, j, i;
  exf_tensor *x = vit_input(c->r.ctx, &c->g, batch);
  uint32_t stream = exf_rng_stream("augment"), span = 2 * (uint32_t)c->shift + 1;
  for (j = 0; x && j < batch; j++) {
    uint64_t place = micro * s->batch + j, epoch = place / n;
    uint32_t draw = 0;
    long dx = 0, dy = 0;
    place %= n;
    if (epoch != c->epoch && !c->order)
      shuffle(c->shuffled, n, s->seed, "data", (uint32_t)epoch);
    c->epoch = epoch;
    i = c->set.index[SPLIT_TRAIN][c->order ? place : c->shuffled[place]];
    if (c->augment) {
      draw = exf_rng_u32(s->seed, stream, (uint32_t)epoch, place);
      dx = (long)((draw >> 1 & 0x7FFF) % span) - (long)c->shift;
      dy = (long)((draw >> 16) % span) - (long)c->shift;
    }
    labels[j] = c->set.label[i];
    lens_patches(&c->view, image_at(&c->set, i), c->flip && (draw & 1), dx, dy,
                 x->data + j * (x->size / batch));
  }
  return x;
}

static exf_tensor *train_loss(void *user, uint64_t micro) {
  trainer *c = (trainer *)user;
  int32_t *labels = (int32_t *)memory((size_t)c->r.s.batch, sizeof *labels);
  exf_tensor *loss = vit_forward(c->r.ctx, &c->g, train_batch(c, micro, labels));
  loss = exf_cross_entropy(c->r.ctx, loss, labels, c->smoothing);
  free(labels);
  return loss;
}

static double train_validate(void *user, text *note) {
  trainer *c = (trainer *)user;
  score e = evaluate(c->r.ctx, &c->g, NULL, &c->set, SPLIT_VAL, 0);
  text_add(note, ", %.2f %%", 100 * e.accuracy);
  return e.m.val_loss;
}

/* ---- the moving average: a file beside each checkpoint, named after its step ------- */

static char *ema_name(uint64_t step) {
  text t = {NULL, 0, 0};
  text_add(&t, "ema-%llu.safetensors", (ull)step);
  return t.s;
}

static void ema_begin(trainer *c) {
  run *r = &c->r;
  c->average = c->g;
  vit_build(&c->average, r->ctx, NULL);
  if (r->s.resume) {
    char *name = ema_name(r->step), *path = path_in(r->s.out, name);
    exf_st *st = open_tensors(r->ctx, path);
    exf_model_load(c->average.model, st);
    check_load(r->ctx, path);
    exf_st_close(st);
    free(path);
    free(name);
    c->ema_saved = r->step;
  }
  c->ema = exf_ema_new(r->model, c->ema_decay);
  if (r->s.resume) exf_ema_copy_from(c->ema, c->average.model);
  check(r->ctx);
}

static void ema_step(void *user) { exf_ema_update(((trainer *)user)->ema); }

static void ema_save(void *user) {
  trainer *c = (trainer *)user;
  char *name = ema_name(c->r.step);
  exf_ema_copy_to(c->ema, c->average.model);
  run_save_tensors(&c->r, c->average.model, name, 0);
  free(name);
}

static void ema_saved(void *user) {
  trainer *c = (trainer *)user;
  if (c->ema_saved != FLAG_UNSET && c->ema_saved != c->r.step) {
    char *name = ema_name(c->ema_saved), *path = path_in(c->r.s.out, name);
    remove(path);
    free(path);
    free(name);
  }
  c->ema_saved = c->r.step;
}

/* Removes all averages from the folder. */
static void ema_clear(void *user) {
#if HAVE_POSIX
  const trainer *c = (const trainer *)user;
  DIR *dir = opendir(c->r.s.out);
  struct dirent *entry;
  while (dir && (entry = readdir(dir)) != NULL) {
    ull step = 0;
    char *name, *path;
    if (sscanf(entry->d_name, "ema-%llu", &step) != 1) continue;
    name = ema_name(step);
    path = path_in(c->r.s.out, name);
    if (strcmp(entry->d_name, name) == 0) remove(path);
    free(path);
    free(name);
  }
  if (dir) closedir(dir);
#else
  (void)user;
#endif
}

/* ---- the end of a run ------------------------------------------------------------- */

/* Checks the merged file against the model in memory; then the test pictures, once. */
static void train_finish(trainer *c, const char *self) {
  run *r = &c->r;
  vit merged;
  score val, test, last;
  text more = {NULL, 0, 0};
  double ms = run_ms_per_step(r);
  run_save_results(r);
  free(open_model(r->ctx, r->s.out, &merged, NULL, NULL));
  val = evaluate(r->ctx, &c->g, &merged, &c->set, SPLIT_VAL, 0);
  if (r->s.ffn == EXF_MB && r->s.routed) {
    exf_routing_set(r->ctx, 1);                 /* the routers instead of the banks */
    last = evaluate(r->ctx, &c->g, NULL, &c->set, SPLIT_VAL, 0);
    val.m.gap = val.m.val_loss - last.m.val_loss;
    exf_routing_set(r->ctx, 0);
  }
  test = evaluate(r->ctx, &c->g, &merged, &c->set, SPLIT_TEST, 1);
  vit_free(&merged);
  text_add(&more, "{");
  summary_number(&more, "val_accuracy", val.accuracy);
  summary_number(&more, "val_accuracy_merged", val.accuracy_merged);
  summary_number(&more, "test_accuracy", test.accuracy);
  summary_number(&more, "test_accuracy_merged", test.accuracy_merged);
  summary_number(&more, "test_loss", test.m.val_loss);
  summary_number(&more, "test_loss_merged", test.m.val_loss_merged);
  memset(&last, 0, sizeof last);
  if (c->ema) {
    exf_ema_copy_to(c->ema, c->average.model);
    last = evaluate(r->ctx, &c->average, NULL, &c->set, SPLIT_VAL, 0);
    summary_number(&more, "val_accuracy_ema", last.accuracy);
    last = evaluate(r->ctx, &c->average, NULL, &c->set, SPLIT_TEST, 0);
    summary_number(&more, "test_accuracy_ema", last.accuracy);
  }
  summary_integer(&more, "classes", c->set.classes);
  summary_number(&more, "images_per_s",
                 ms > 0 ? 1e3 * (double)(r->s.batch * r->s.accum) / ms : 0);
  more.s[0] = ',';
  if (!r->s.quiet) {
    print_confusion(&c->set, SPLIT_TEST, test.guess);
    print_most_wrong(&c->set, SPLIT_TEST, test.guess, test.loss);
    printf("right   validation %.2f %%, merged %.2f %%; test %.2f %%, merged %.2f %%%s",
           100 * val.accuracy, 100 * val.accuracy_merged, 100 * test.accuracy,
           100 * test.accuracy_merged, c->ema ? "; " : "\n");
    if (c->ema) printf("average of weights: test %.2f %%\n", 100 * last.accuracy);
  }
  if (test.m.max_diff > val.m.max_diff) val.m.max_diff = test.m.max_diff;
  val.m.n += test.m.n;
  run_finish(r, &val.m, &more, "nats per picture", self, "eval");
  text_free(&more);
  free(test.guess);
  free(test.loss);
}

static void train_announce(const trainer *c) {
  const vit *g = &c->g;
  const image_set *set = &c->set;
  text model = {NULL, 0, 0}, data = {NULL, 0, 0};
  text_add(&model, "ViT, layers %s, heads %s, width %s, patch %s", commas(g->n_layers),
           commas(g->n_heads), commas(g->width), commas(g->patch));
  text_add(&data, "%s: %s x %s, %s classes; ",
           *c->from.images ? c->from.images : c->from.data, commas(g->size),
           commas(g->size), commas(g->n_classes));
  text_add(&data, "%s pictures train, %s validate, %s test",
           commas(set->n_split[SPLIT_TRAIN]), commas(set->n_split[SPLIT_VAL]),
           commas(set->n_split[SPLIT_TEST]));
  if (set->skipped) text_add(&data, "; %s could not be read", commas(set->skipped));
  run_announce(&c->r, model.s, data.s);
  text_free(&model);
  text_free(&data);
}

static void train_free(trainer *c) {
  if (c->ema) {
    exf_ema_free(c->ema);
    vit_free(&c->average);
  }
  free(c->shuffled);
  image_set_free(&c->set);
  exf_optim_free(c->r.optim);
  if (c->r.model) vit_free(&c->g);
  exf_ctx_free(c->r.ctx);
  run_free(&c->r);
}

static int train(int argc, char **argv) {
  static const char *const quick[] = {"data", "generated", "patch", "7", "width", "48",
    "layers", "2", "epochs", "12", "lr", "0.003", "flip", "0", "eval-every", "200"};
  trainer c;
  run *r = &c.r;
  exf_st *st;
  exf_fusion_desc fusion;
  char *init = NULL;
  int code = 0;
  train_defaults(&c);
  run_flags(r, argc, argv, quick, (int)(sizeof quick / sizeof *quick / 2),
            "vit train [flags]");
  run_context(r);
  st = train_data(&c, &init);
  train_plan(&c);
  if (run_is_finished(r)) {
    train_free(&c);
    return 0;
  }
  fusion = settings_fusion(&r->s);
  vit_build(&c.g, r->ctx, st || r->s.ffn == EXF_DENSE ? NULL : &fusion);
  r->model = c.g.model;
  r->user = &c;
  r->micro_loss = train_loss;
  r->validate = train_validate;
  r->clear = ema_clear;
  if (st) exf_model_load(c.g.model, st);
  if (st) check_load(r->ctx, init);
  if (st && r->s.ffn != EXF_DENSE) exf_model_upcycle(c.g.model, &fusion);
  check(r->ctx);
  exf_st_close(st);
  free(init);
  run_begin(r);
  if (c.ema_decay > 0) {
    ema_begin(&c);
    r->after_step = ema_step;
    r->before_checkpoint = ema_save;
    r->after_checkpoint = ema_saved;
  }
  train_announce(&c);
  stop_install();
  run_loop(r);
  if (r->step < r->steps) code = run_interrupted(r, argv[0]);
  else train_finish(&c, argv[0]);
  train_free(&c);
  return code;
}

/* ---- predict, eval, main ---------------------------------------------------------- */

static void predict_one(exf_ctx *ctx, const vit *g, const image_set *names,
                        const char *model, const char *path) {
  const lens view = lens_new(g->channels, g->size, g->patch, g->mean, g->std);
  unsigned char *pixels = (unsigned char *)memory(g->channels * g->size, g->size);
  const unsigned char *drawn = pixels;
  exf_tensor *x = vit_input(ctx, g, 1), *p;
  picture p_in;
  double sum = 0;
  size_t k, i, best;
  why w = {""};
  if (!picture_read(path, &p_in, &w)) fail(1, "%s: %s; give another picture", path, w.s);
  picture_fit(&p_in, g->channels, g->size, pixels);
  if (x) lens_patches(&view, pixels, 0, 0, 0, x->data);
  p = exf_softmax(ctx, vit_forward(ctx, g, x));         /* (1,K) */
  check(ctx);
  for (i = 0; i < g->n_classes; i++) sum += (double)p->data[i];
  check_finite(sum, model);
  print_plain(path);
  printf("\n");
  draw_pictures(&drawn, 1, g->channels, g->size);
  for (k = 0; k < 3 && k < g->n_classes; k++) {
    for (best = i = 0; i < g->n_classes; i++)
      if (p->data[i] > p->data[best]) best = i;
    printf("  %6.2f %%  ", 100 * (double)p->data[best]);
    print_plain(names->names[best]);
    printf("\n");
    p->data[best] = -1;
  }
  exf_rewind(ctx);
  free(pixels);
}

static int predict(int argc, char **argv) {
  const char *usage = "vit predict DIR|FILE IMAGE...";
  exf_ctx *ctx;
  vit g;
  image_set names;
  char *path;
  int i;
  for (i = 2; i < argc; i++)      /* ends with --help, or with an unknown flag */
    if (argv[i][0] == '-' && argv[i][1])
      flags_parse(NULL, 0, 3, argv + i - 2, NULL, usage);
  if (argc < 4) fail(2, "%s: usage: %s", argc < 3 ? "no model named" : "no picture named",
                     usage);
  ctx = exf_ctx_new(NULL);
  check(ctx);
  path = open_model(ctx, argv[2], &g, &names, NULL);
  exf_grad_set(ctx, 0);
  for (i = 3; i < argc; i++) predict_one(ctx, &g, &names, path, argv[i]);
  free(path);
  image_set_free(&names);
  vit_free(&g);
  exf_ctx_free(ctx);
  return 0;
}

static int eval(int argc, char **argv) {
  const char *place = NULL, *usage = "vit eval DIR|FILE [flags]", *from;
  int split = 0;
  source s = {"", "", 0, 10, 5000, 0};
  flag flags[] = {
    {"data", 's', FLAG_ONCE, &s.data, 0, 0, NULL, "none: what the model was trained on",
     0, NULL},
    {"images", 's', FLAG_ONCE, &s.images, 0, 0, NULL, "folder of pictures", 0, NULL},
    {"skip-bad", 'b', FLAG_ONCE, &s.skip_bad, 0, 0, NULL,
     "leave out pictures that cannot be read", 0, NULL},
    {"classes", 'u', FLAG_ONCE, &s.classes, 2, 256, NULL, "of IDX files", 0, NULL},
    {"val", 'u', FLAG_ONCE, &s.val, 1, 1e9, NULL, "pictures held out", 0, NULL},
    {"split", 'c', FLAG_ONCE, &split, 0, 0, "val|test|train", "part of it", 0, NULL}};
  static const int splits[] = {SPLIT_VAL, SPLIT_TEST, SPLIT_TRAIN};
  exf_ctx *ctx;
  vit g;
  image_set set, names;
  uint64_t seed;
  score e;
  char *path, name[48];
  int i;
  flags_parse(flags, 6, argc, argv, &place, usage);
  if (!place) fail(2, "no model named: usage: %s", usage);
  if (*s.data && *s.images) two_sources();
  ctx = exf_ctx_new(NULL);
  check(ctx);
  path = open_model(ctx, place, &g, &names, &seed);
  for (i = flags[0].given || flags[1].given ? 2 : 0; i < 5; i++)
    flag_of_run(&flags[i], path);
  source_recorded(&flags[0], &flags[1], place);
  if (!*s.data && !*s.images) s.data = default_source();
  s.size = g.size;
  from = source_read(&set, &s, seed);
  vit_check_set(&g, &set, from);
  e = evaluate(ctx, &g, NULL, &set, splits[split], 1);
  check_finite(e.m.val_loss, path);
  print_confusion(&set, splits[split], e.guess);
  choice_name("val|test|train", split, name);
  printf("%s_loss %.9g   %s_accuracy %.9g   %s pictures of ", name, e.m.val_loss, name,
         e.accuracy, commas(e.m.n));
  print_plain(from);
  printf("\n");
  free(e.guess);
  free(e.loss);
  image_set_free(&set);
  image_set_free(&names);
  vit_free(&g);
  exf_ctx_free(ctx);
  flags_free(flags, 6);
  free(path);
  return 0;
}

int main(int argc, char **argv) {
  static const command list[] = {{"train", train}, {"eval", eval}, {"predict", predict},
                                 {"info", command_info}};
  return command_run("vit", list, 4, argc, argv);
}
