/* vit.c - a Vision Transformer (DeiT-like) whose FFNs are trained as several experts
   fused into one (ExFusion), merged into an ordinary dense model, and asked what it sees.

   Shows: a second architecture from the library's modules; pictures from IDX files,
          folders, or generated; augmentation by counter-based random numbers, so that a
          resumed run is the same run; accuracy before and after the merge.
   Runs:  a minute with --quick; minutes on Fashion-MNIST on two cores.
   Build: cc -O2 -fopenmp -o build/vit examples/vit.c -lm         (-fopenmp: optional;
          for PNG, JPEG, BMP and gzip: -DSTB_IMAGE='<stb/stb_image.h>')
   Ends:  next    build/vit eval runs/vit */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"

#include "common.h"
#include "images.h"
#include "vit.h"

/* ---- train ------------------------------------------------------------------------ */

typedef struct trainer {
  run r;
  source from;
  uint64_t patch, steps, augment, flip, shift;
  double epochs, smoothing, ema_decay, drop_path;
  int order;
  vit g;
  image_set set;
  size_t *shuffled;                  /* the training pictures in the order of an epoch */
  uint64_t epoch;                    /* which one */
  exf_ema *ema;
  vit average;                       /* the dense model it is copied to */
} trainer;

static void train_flags(trainer *c, int argc, char **argv) {
  const flag table[] = {
    {"size", 'n', FLAG_FIXED, &c->from.size, "0 8192",
     "side all are resized to; null or 0: the IDX file's, else 28"},
    {"patch", 'u', FLAG_FIXED, &c->patch, "1 8192", "side of a patch"},
    {"epochs", 'x', FLAG_FIXED, &c->epochs, "0 1e6", "times each picture is seen"},
    {"steps", 'n', FLAG_FIXED, &c->steps, "0 4e9", "updates; null: by --epochs"},
    {"order", 'c', FLAG_FIXED, &c->order, "shuffle|sequential",
     "of the pictures in an epoch"},
    {"augment", 'u', FLAG_FIXED, &c->augment, "0 1",
     "0: pictures as they are; 1: moved and mirrored at random"},
    {"flip", 'u', FLAG_FIXED, &c->flip, "0 1", "0: never mirrored"},
    {"shift", 'u', FLAG_FIXED, &c->shift, "0 1000", "pixels moved at most"},
    {"label-smoothing", 'x', FLAG_FIXED, &c->smoothing, "0 0.999",
     "share of the target spread over all classes"},
    {"drop-path", 'x', FLAG_FIXED, &c->drop_path, "0 0.999",
     "probability of skipping a branch in the last block, from 0 in the first"},
    {"ema", 'x', FLAG_FIXED, &c->ema_decay, "0 0.999999999",
     "decay of a moving average of the weights; 0: none"}, {0}};
  *c = (trainer){.patch = 7, .epochs = 20, .steps = FLAG_UNSET, .epoch = FLAG_UNSET,
    .augment = 1, .flip = 1, .shift = 1, .r = {.task = "vit", .list_key = "exf.labels",
    .out = "runs/vit", .config = "", .init = "", .ffn = EXF_MB, .experts = 4, .mu = 0.95,
    .layers = 4, .heads = 4, .width = 96, .batch = 64, .accum = 1, .warmup = FLAG_UNSET,
    .eval_every = 1000, .save_every = 1000, .lr = 1e-3, .weight_decay = 0.05,
    .beta1 = 0.9, .beta2 = 0.99, .clip = 1, .seed = 1}};
  source_flags(&c->from, &c->r.f);
  flags_add(&c->r.f, table);
  run_flags_add(&c->r);
  run_flags(&c->r, argc, argv, "data generated\npatch 7\nwidth 48\nlayers 2\nepochs 12\n"
            "lr 0.003\nflip 0\neval-every 200\n", "vit train [flags]");
}

/* Reads the pictures; decides the sizes of the model, which must be those of the file of
   --init, its pixel mean and deviation, and the length of the run. */
static void train_data(trainer *c) {
  run *r = &c->r;
  vit *g = &c->g, init = {0};
  text mine = {0};
  char sizes[128];
  if (*r->init && !r->resume) {
    const char *path = model_path(r->init);
    exf_st *st = open_tensors(r->ctx, path);
    geometry_read(st, path, (size_t)r->heads, &init);
    snprintf(sizes, sizeof sizes, "layers %u\nheads %u\nwidth %u\npatch %u\nsize %u\n",
             (unsigned)init.n_layers, (unsigned)init.n_heads, (unsigned)init.width,
             (unsigned)init.patch, (unsigned)init.size);
    flags_read(&r->f, sizes, path, FLAGS_AGREE);
    exf_st_close(st);
  }
  source_choose(&c->from, &r->f, r->resume ? r->out : NULL);
  const char *name = source_read(&c->set, &c->from, r->seed);
  if (init.width) vit_check_set(&init, &c->set, name);
  if (r->width % r->heads)
    fail(2, "--heads %s does not divide --width %s: every head takes an equal part",
         commas(r->heads), commas(r->width));
  if (c->set.size % c->patch)
    fail(2, "--patch %s does not divide the side %s of the pictures: see also --size",
         commas(c->patch), commas(c->set.size));
  *g = (vit){.n_layers = (size_t)r->layers, .n_heads = (size_t)r->heads,
             .width = (size_t)r->width, .patch = (size_t)c->patch, .size = c->set.size,
             .channels = c->set.channels, .n_classes = c->set.classes,
             .dropout = r->dropout, .drop_path = c->drop_path, .eps = 1e-6};
  if (!r->resume || !pixels_read(g, r->data.s)) {
    memcpy(g->mean, init.std[0] > 0 ? init.mean : c->set.mean, sizeof g->mean);
    memcpy(g->std, init.std[0] > 0 ? init.std : c->set.std, sizeof g->std);
  }
  text_add(&mine, "{\"images\":%llu,\"fnv1a\":\"%016llx\",", (ull)c->set.n,
           (ull)c->set.hash);
  pixels_write(g, &mine);
  text_add(&mine, "}");
  run_data(r, &mine, name, *c->from.images ? "--images" : "--data");
  r->list.n = 0;                     /* as the checkpoint had it */
  names_write(c->set.names, c->set.classes, &r->list);
  vit_geometry(g, &r->geometry);
  size_t n = c->set.n_split[SPLIT_TRAIN], batch = (size_t)(r->batch * r->accum);
  double steps = ceil(c->epochs * (double)n / (double)batch);
  if (steps > 4e9) fail(2, "--epochs %g are more than 4e9 steps: take fewer", c->epochs);
  r->steps = c->steps == FLAG_UNSET ? (uint64_t)steps : c->steps;
  r->per_step = batch * (vit_patches(g) + 1);
  c->shuffled = memory(n, sizeof *c->shuffled);
}

/* The moving average stands beside the checkpoint of that step. */
static const char *ema_name(uint64_t step) {
  static char name[48];
  snprintf(name, sizeof name, "ema-%llu.safetensors", (ull)step);
  return name;
}

/* The model, from scratch or from --init, and the moving average of its weights. */
static void train_model(trainer *c) {
  run *r = &c->r;
  const exf_fusion_desc fusion = run_fusion(r);
  const int load = *r->init && !r->resume;
  vit_build(&c->g, r->ctx, load || r->ffn == EXF_DENSE ? NULL : &fusion);
  r->model = c->g.model;
  if (load) exf_model_load(r->model, model_path(r->init));
  if (load && r->ffn != EXF_DENSE) exf_model_upcycle(r->model, &fusion);
  check(r->ctx);
  if (c->ema_decay > 0) {
    c->average = c->g;
    vit_build(&c->average, r->ctx, NULL);
    c->ema = exf_ema_new(r->model, c->ema_decay);
    if (r->resume) exf_model_load(c->average.model, path_in(r->out, ema_name(r->step)));
    if (r->resume) exf_ema_copy_from(c->ema, c->average.model);
    check(r->ctx);
  }
}

static void train_announce(const trainer *c) {
  const size_t *n = c->set.n_split;
  char model[128];
  text data = {0};
  snprintf(model, sizeof model, "ViT, layers %u, heads %u, width %u, patch %u",
           (unsigned)c->g.n_layers, (unsigned)c->g.n_heads, (unsigned)c->g.width,
           (unsigned)c->g.patch);
  text_add(&data, "%s: %u x %u, %u classes; %s pictures train, %s validate, %s test",
           *c->from.images ? c->from.images : c->from.data, (unsigned)c->g.size,
           (unsigned)c->g.size, (unsigned)c->g.n_classes, commas(n[SPLIT_TRAIN]),
           commas(n[SPLIT_VAL]), commas(n[SPLIT_TEST]));
  if (c->set.skipped) text_add(&data, "; %s could not be read", commas(c->set.skipped));
  run_announce(&c->r, model, data.s);
  text_free(&data);
}

/* Micro-batch `micro` of the run: pictures number micro B .. of an endless row of epochs,
   each in an order of its own; all draws are functions of epoch and place.
   -> (B,Np,Cin P P), and their labels (B) */
static exf_tensor *train_batch(trainer *c, uint64_t micro, int32_t *labels) {
  const run *r = &c->r;
  size_t n = c->set.n_split[SPLIT_TRAIN], batch = (size_t)r->batch;
  exf_tensor *x = vit_input(r->ctx, &c->g, batch);
  uint32_t stream = exf_rng_stream("augment"), span = 2 * (uint32_t)c->shift + 1;
  for (size_t j = 0; x && j < batch; j++) {
    uint64_t epoch = (micro * r->batch + j) / n, place = (micro * r->batch + j) % n;
    uint32_t draw = 0;
    long dx = 0, dy = 0;
    if (epoch != c->epoch && !c->order)
      exf_rng_permutation(r->seed, exf_rng_stream("data"), (uint32_t)epoch, c->shuffled,
                          n);
    c->epoch = epoch;
    size_t i = c->set.index[SPLIT_TRAIN][c->order ? place : c->shuffled[place]];
    if (c->augment) {
      draw = exf_rng_u32(r->seed, stream, (uint32_t)epoch, place);
      dx = (long)((draw >> 1 & 0x7FFF) % span) - (long)c->shift;
      dy = (long)((draw >> 16) % span) - (long)c->shift;
    }
    labels[j] = c->set.label[i];
    vit_picture(&c->g, image_at(&c->set, i), c->flip && (draw & 1), dx, dy, x, j);
  }
  return x;
}

/* All but the checkpoint: the merged model, the tables, the moving average. */
static void train_save(trainer *c) {
  run_save_results(&c->r);
  if (!c->ema) return;
  exf_ema_copy_to(c->ema, c->average.model);
  run_save_tensors(&c->r, c->average.model, ema_name(c->r.step), 0);
  run_check_save(&c->r);
}

/* Behind a checkpoint averages of other steps, and of other runs, are of no use. */
static void train_clear(const trainer *c) {
#if HAVE_POSIX
  DIR *dir = opendir(c->r.out);
  struct dirent *entry;
  ull step;
  while (dir && (entry = readdir(dir)) != NULL)
    if (sscanf(entry->d_name, "ema-%llu", &step) == 1 && (!c->ema || step != c->r.step)
        && strcmp(entry->d_name, ema_name(step)) == 0)
      remove(path_in(c->r.out, entry->d_name));
  if (dir) closedir(dir);
#else
  (void)c;
#endif
}

/* Evaluates the merged file beside the model in memory; then the test pictures, once. */
static void train_finish(trainer *c, const char *self) {
  run *r = &c->r;
  vit merged;
  text more = {0};
  double steps = (double)(r->step - r->first), average = 0;
  open_model(r->ctx, r->out, &merged, NULL, NULL);
  score val = evaluate(r->ctx, &c->g, &merged, &c->set, SPLIT_VAL, 0);
  score test = evaluate(r->ctx, &c->g, &merged, &c->set, SPLIT_TEST, 1);
  vit_free(&merged);
  if (r->ffn == EXF_MB && r->routed) {
    exf_routing_set(r->ctx, 1);                 /* the routers instead of the banks */
    val.m.gap = val.m.val_loss
                - evaluate(r->ctx, &c->g, NULL, &c->set, SPLIT_VAL, 0).m.val_loss;
    exf_routing_set(r->ctx, 0);
  }
  summary_add(&more, "val_accuracy", val.accuracy);
  summary_add(&more, "val_accuracy_merged", val.accuracy_merged);
  summary_add(&more, "test_accuracy", test.accuracy);
  summary_add(&more, "test_accuracy_merged", test.accuracy_merged);
  summary_add(&more, "test_loss", test.m.val_loss);
  summary_add(&more, "test_loss_merged", test.m.val_loss_merged);
  if (c->ema) {
    average = evaluate(r->ctx, &c->average, NULL, &c->set, SPLIT_TEST, 0).accuracy;
    summary_add(&more, "val_accuracy_ema",
                evaluate(r->ctx, &c->average, NULL, &c->set, SPLIT_VAL, 0).accuracy);
    summary_add(&more, "test_accuracy_ema", average);
  }
  summary_add(&more, "classes", (double)c->set.classes);
  summary_add(&more, "images_per_s", r->spent > 0
              ? steps * (double)(r->batch * r->accum) / r->spent : 0);
  if (!r->quiet) {
    print_confusion(&c->set, SPLIT_TEST, test.guess);
    printf("right   validation %.2f %%, merged %.2f %%; test %.2f %%, merged %.2f %%%s",
           100 * val.accuracy, 100 * val.accuracy_merged, 100 * test.accuracy,
           100 * test.accuracy_merged, c->ema ? "; " : "\n");
    if (c->ema) printf("average of weights: test %.2f %%\n", 100 * average);
  }
  if (test.m.max_diff > val.m.max_diff) val.m.max_diff = test.m.max_diff;
  val.m.n += test.m.n;
  run_finish(r, &val.m, &more, "nats per picture", self, "eval");
  text_free(&more);
  free(test.guess);
}

static void train_free(trainer *c) {
  exf_ema_free(c->ema);
  if (c->ema) vit_free(&c->average);
  free(c->g.blocks);
  image_set_free(&c->set);
  free(c->shuffled);
  run_free(&c->r);                   /* the model as well */
}

/* The whole training: batch, forward, loss, backward, update; evaluation and saving when
   they are due. */
static int train(int argc, char **argv) {
  trainer c;
  run *r = &c.r;
  int code = 0;
  train_flags(&c, argc, argv);
  run_context(r);
  train_data(&c);
  if (run_is_finished(r)) {
    train_free(&c);
    return 0;
  }
  train_model(&c);
  run_begin(r);
  train_announce(&c);
  stop_install();
  exf_ctx *ctx = r->ctx;
  int32_t *labels = memory((size_t)r->batch, sizeof *labels);
  while (r->step < r->steps && !stop_signal) {
    double start = seconds(), norm = 0, val_loss = NAN;
    char note[32] = "";
    r->loss = 0;
    exf_step_begin(ctx, r->step);
    exf_training_set(ctx, 1);
    for (uint64_t k = 0; k < r->accum; k++) {
      exf_tensor *x = train_batch(&c, r->step * r->accum + k, labels);
      exf_tensor *logits = vit_forward(ctx, &c.g, x);                /* (B,K) */
      exf_tensor *loss = exf_cross_entropy(ctx, logits, labels, c.smoothing);
      r->loss += exf_item(loss) / (double)r->accum;
      exf_backward(ctx, exf_scale(ctx, loss, 1 / (double)r->accum));
      exf_rewind(ctx);
    }
    exf_training_set(ctx, 0);
    exf_optim_step(r->optim, exf_schedule_lr(&r->schedule, r->step), &norm);
    if (c.ema) exf_ema_update(c.ema);
    run_check(r, r->loss);
    double spent = seconds() - start;
    r->step++;
    if (run_due(r, r->eval_every)) {
      score e = evaluate(ctx, &c.g, NULL, &c.set, SPLIT_VAL, 0);
      run_check(r, val_loss = e.m.val_loss);
      snprintf(note, sizeof note, ", %.2f %%", 100 * e.accuracy);
    }
    run_log(r, norm, spent, val_loss, note);
    if (r->step < r->steps && run_due(r, r->save_every)) {
      train_save(&c);
      run_save_checkpoint(r);
      train_clear(&c);
    }
  }
  free(labels);
  if (r->steps == 0)
    run_check(r, evaluate(ctx, &c.g, NULL, &c.set, SPLIT_VAL, 0).m.val_loss);
  train_save(&c);
  if (r->step == r->steps) train_finish(&c, argv[0]);
  else run_save_checkpoint(r), code = run_stopped(r, argv[0]);
  train_clear(&c);
  train_free(&c);
  return code;
}

/* ---- predict, eval, main ---------------------------------------------------------- */

/* The likeliest three classes of one picture. */
static void predict_one(exf_ctx *ctx, const vit *g, const image_set *names,
                        const char *model, const char *path) {
  unsigned char *pixels = memory(g->channels * g->size, g->size);
  exf_tensor *x = vit_input(ctx, g, 1);
  picture p = {0};
  double sum = 0;
  why w = {""};
  if (!picture_read(path, &p, &w)) fail(1, "%s: %s; give another picture", path, w.s);
  picture_fit(&p, g->channels, g->size, pixels);
  if (x) vit_picture(g, pixels, 0, 0, 0, x, 0);
  exf_tensor *share = exf_softmax(ctx, vit_forward(ctx, g, x));         /* (1,K) */
  check(ctx);
  for (size_t i = 0; i < g->n_classes; i++) sum += (double)share->data[i];
  check_finite(sum, model);
  print_plain(path);
  printf("\n");
  draw_picture(pixels, g->channels, g->size);
  for (size_t k = 0; k < 3 && k < g->n_classes; k++) {
    const int32_t best = *exf_argmax(ctx, share);
    printf("  %6.2f %%  ", 100 * (double)share->data[best]);
    if (names->classes) print_plain(names->names[best]);
    else printf("%d", (int)best);
    printf("\n");
    share->data[best] = -1;
  }
  exf_rewind(ctx);
  free(pixels);
}

static int predict(int argc, char **argv) {
  const char *usage = "vit predict DIR|FILE IMAGE...";
  flags none = {.n = 0};
  vit g;
  image_set names;
  for (int i = 2; i < argc; i++)      /* ends with --help, or with an unknown flag */
    if (argv[i][0] == '-' && argv[i][1]) flags_parse(&none, 3, argv + i - 2, NULL, usage);
  if (argc < 4) fail(2, "%s: usage: %s", argc < 3 ? "no model named" : "no picture named",
                     usage);
  exf_ctx *ctx = exf_ctx_new(NULL);
  check(ctx);
  const char *path = open_model(ctx, argv[2], &g, &names, NULL);
  exf_grad_set(ctx, 0);
  for (int i = 3; i < argc; i++) predict_one(ctx, &g, &names, path, argv[i]);
  image_set_free(&names);
  vit_free(&g);
  exf_ctx_free(ctx);
  return 0;
}

static int eval(int argc, char **argv) {
  static const char *const splits = "train|val|test";
  const char *place = NULL, *usage = "vit eval DIR|FILE [flags]";
  int split = SPLIT_VAL;
  source s;
  flags f = {.n = 0};
  const flag part[] = {{"split", 'c', FLAG_ONCE, &split, splits, "part of it"}, {0}};
  vit g;
  image_set set;
  uint64_t seed;
  source_flags(&s, &f);
  flags_add(&f, part);
  flags_parse(&f, argc, argv, &place, usage);
  if (!place) fail(2, "no model named: usage: %s", usage);
  exf_ctx *ctx = exf_ctx_new(NULL);
  check(ctx);
  const char *path = open_model(ctx, place, &g, NULL, &seed);
  flags_of_run(&f, path);
  source_choose(&s, &f, place);
  s.size = g.size;
  const char *from = source_read(&set, &s, seed);
  vit_check_set(&g, &set, from);
  score e = evaluate(ctx, &g, NULL, &set, split, 1);
  check_finite(e.m.val_loss, path);
  print_confusion(&set, split, e.guess);
  const char *name = choice_name(splits, split);
  printf("%s_loss %.9g   %s_accuracy %.9g   %s pictures of ", name, e.m.val_loss, name,
         e.accuracy, commas(e.m.n));
  print_plain(from);
  printf("\n");
  free(e.guess);
  image_set_free(&set);
  vit_free(&g);
  exf_ctx_free(ctx);
  flags_free(&f);
  return 0;
}

int main(int argc, char **argv) {
  static const command list[] = {{"train", train}, {"eval", eval}, {"predict", predict},
                                 {"info", command_info}};
  return command_run("vit", list, 4, argc, argv);
}
