/* Everything that may fail, fails: the k-th call of the allocator and of the file hooks,
   k = 1, 2, ... until none does, once and for ever, in whatever a program does with the
   library. The failing call reports; what was there before is there still, byte for byte;
   the same call, made again, then gives what it gives where nothing ever failed; and all
   memory comes back. */
#define EXF_NO_SIMD
#define EXF__CHUNK(held) ((held) * 0)   /* every request of the step arena is a site */
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"

#include "test.h"

#include "disk.h"
#include "heap.h"
#include "tiny_gpt.h"

/* ---- a program: context, model, optimizer, average, files ---- */

enum { HAS_OPTIM = 1, HAS_TRAINED = 2, HAS_FILES = 4, HAS_EMA = 8, DENSE_ONLY = 16,
       HAS_NOTHING = 32, STARTS_DENSE = 64 };

typedef struct world {
  heap heap;
  disk disk;
  exf_files files;
  exf_ctx *ctx;
  tiny_gpt g;
  exf_optim *optim;
  exf_ema *ema;
  int variant, failed;
  exf_real out[64];              /* what an action computed */
} world;

typedef struct action {
  const char *name;
  int has;
  int (*run)(world *w);          /* 0 when something failed */
} action;

/* 0 dense, 1 sw, 2 dw raw, 3 dw softmax, 4 mb, 5 mb attached, 6 mb routed attached */
static tiny_desc small_desc(int variant) {
  tiny_desc d = tiny_defaults();
  d.layers = 2;
  d.width = 4;
  d.hidden = 6;
  d.block = 3;
  d.vocab = 5;
  d.bias = 1;
  d.dropout = 0.1;
  d.act = variant == 2 ? EXF_SWIGLU : EXF_GELU;
  d.fusion = tiny_variant(variant, variant ? 2 : 0);
  if (variant == 3) d.fusion.tau = 0.5;
  return d;
}

static int build(world *w) {
  exf_desc desc;
  tiny_desc d = small_desc(w->variant);
  memset(&desc, 0, sizeof desc);
  desc.n_threads = 1;
  desc.seed = 7;
  desc.files = &w->files;
  heap_use(&w->heap, &desc);
  if (w->ctx == NULL) w->ctx = exf_ctx_new(&desc);
  w->g = tiny_new(w->ctx, &d);
  return exf_ctx_status(w->ctx) == EXF_OK;
}

static int ok(const world *w) { return exf_ctx_status(w->ctx) == EXF_OK; }

static void world_make(world *w, int variant, int has) {
  memset(w, 0, sizeof *w);
  w->files = disk_hooks(&w->disk);
  w->variant = has & STARTS_DENSE ? 0 : variant;
  if (has & HAS_NOTHING) return;
  build(w);
  w->variant = variant;
  if (has & (HAS_OPTIM | HAS_TRAINED)) w->optim = tiny_adamw(w->g.model);
  if (has & HAS_TRAINED) tiny_train(w->ctx, &w->g, w->optim, 0, 1, 0.05);
  if (!(has & HAS_OPTIM)) {
    exf_optim_free(w->optim);
    w->optim = NULL;
  }
  if (has & HAS_FILES) {
    exf_checkpoint_save(w->g.model, w->optim, "checkpoint", NULL, 0);
    exf_model_save(w->g.model, "model", NULL, 0);
    exf_rewind(w->ctx);
  }
  if ((has & HAS_FILES) && w->optim)   /* move on from what is in the files */
    tiny_train(w->ctx, &w->g, w->optim, 1, 1, 0.05);
  if (has & HAS_EMA) w->ema = exf_ema_new(w->g.model, 0.5);
  exf_rewind(w->ctx);
  CHECK_OK(w->ctx);
}

static void world_free(world *w) {
  exf_ema_free(w->ema);
  exf_optim_free(w->optim);
  exf_model_free(w->g.model);
  exf_ctx_free(w->ctx);
  CHECK(w->heap.n_live == 0 && w->heap.bytes == 0 && w->heap.n_bad == 0);
  CHECK(w->disk.n_open == 0 && w->disk.n_bad == 0);
  disk_free(&w->disk);
}

enum { STATE_ROOM = 1 << 15 };

static void join(disk_bytes *all, const void *data, size_t n) {
  if (all->n + n > STATE_ROOM) exit(2);
  if (n) memcpy(all->data + all->n, data, n);
  all->n += n;
}

static void join_tensor(disk_bytes *all, const exf_tensor *t) {
  join(all, t->data, t->size * sizeof(exf_real));
}

/* All that the program holds, as bytes: parameters, moments, banks, updates made, the
   average, its files, and what was computed. */
static disk_bytes state(world *w) {
  disk_bytes all, file;
  const exf__buffer *b;
  size_t i;
  all.data = (unsigned char *)malloc(STATE_ROOM);
  all.n = 0;
  if (all.data == NULL) exit(2);
  for (i = 0; i < exf_model_n_params(w->g.model); i++) {
    const exf_param *p = exf_model_param(w->g.model, i);
    join(&all, p->name, strlen(p->name) + 1);
    join_tensor(&all, &p->tensor);
    join(&all, &p->has_grad, sizeof p->has_grad);
    join(&all, &p->trained, sizeof p->trained);
  }
  for (i = 0; i < exf_model_n_ffns(w->g.model); i++) {
    const exf_ffn *f = exf_model_ffn(w->g.model, i);
    join(&all, &f->fusion, sizeof f->fusion);
    join(&all, &f->state->n_upcycles, sizeof f->state->n_upcycles);
  }
  for (b = w->g.model ? w->g.model->buffers : NULL; b; b = b->next)
    if (b->saved) join_tensor(&all, &b->tensor);
  if (w->optim) join(&all, &w->optim->t, sizeof w->optim->t);
  for (i = 0; w->optim && i < w->optim->n; i++) {
    const exf__moments *s = &w->optim->slot[i];
    size_t bytes = exf__shape_size(&s->shape) * sizeof(exf_real);
    join(&all, s->m, bytes);
    join(&all, s->v, bytes);
  }
  for (i = 0; w->ema && i < w->ema->averages->n_params; i++)
    join_tensor(&all, &w->ema->averages->params[i]->tensor);
  for (i = 0; i < 2; i++) {
    file = disk_file(&w->disk, i ? "model" : "checkpoint");
    join(&all, file.data, file.n);
  }
  join(&all, w->out, sizeof w->out);
  return all;
}

/* ---- what a program does ---- */

static int make_optim(world *w) {
  w->optim = tiny_adamw(w->g.model);
  return w->optim != NULL;
}

static int train(world *w) {
  tiny_train(w->ctx, &w->g, w->optim, 2, 1, 0.05);
  return ok(w);
}

static int evaluate(world *w) {
  int32_t ids[6] = {0, 1, 2, 3, 4, 0};
  int grad = exf_grad_set(w->ctx, 0);
  exf_tensor *y = tiny_logits(w->ctx, &w->g, ids, 2, 3);
  if (y) memcpy(w->out, y->data, y->size * sizeof(exf_real));
  exf_rewind(w->ctx);
  exf_grad_set(w->ctx, grad);
  return y != NULL;
}

/* Three tokens through the cache, one of them alone. */
static int generate(world *w) {
  static const int32_t ids[3] = {3, 1, 4}, pos[3] = {0, 1, 2};
  int grad = exf_grad_set(w->ctx, 0), good = 0;
  exf_kv *kv = exf_kv_new(w->ctx, 2, 3, 4);
  size_t at, n, i;
  for (at = 0; kv && at < 3; at += n) {
    exf_tensor *x;
    n = at ? 1 : 2;
    x = exf_add(w->ctx, exf_embedding(w->ctx, w->g.wte, ids + at, 1, n),
                exf_embedding(w->ctx, w->g.wpe, pos + at, n, 0));
    for (i = 0; i < 2; i++) x = exf_block_forward(w->ctx, w->g.block[i], x, kv);
    x = exf_linear(w->ctx, exf_norm_forward(w->ctx, w->g.ln_f, x), w->g.wte, NULL);
    good = x != NULL;
    if (!good) break;
    memcpy(w->out + 5 * at, x->data, x->size * sizeof(exf_real));
    exf_rewind(w->ctx);
  }
  exf_kv_free(kv);
  exf_grad_set(w->ctx, grad);
  return good && ok(w);
}

static int upcycle(world *w) {
  tiny_desc d = small_desc(w->variant ? w->variant : 1);
  return exf_model_upcycle(w->g.model, &d.fusion) == EXF_OK;
}

static int upcycle_drop(world *w) {
  tiny_desc d = small_desc(w->variant ? w->variant : 1);
  d.fusion.upcycle = EXF_UP_DROP;
  return exf_model_upcycle(w->g.model, &d.fusion) == EXF_OK;
}

/* A rule with a parameter and a buffer: a = parameter + buffer. */
static void rule_init(exf_ctx *ctx, exf_ffn *f, const exf_fusion_desc *fusion) {
  (void)ctx;
  exf_param_desc d;
  memset(&d, 0, sizeof d);
  d.shape = exf_shape1(fusion->n_experts);
  d.init_value = 0.25;
  exf_ffn_param(f, "own", &d);
  d.buffer = 1;
  exf_ffn_param(f, "constant", &d);
}
static exf_tensor *rule_weights(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x,
                                int training) {
  (void)x;
  (void)training;
  return exf_add(ctx, exf_ffn_tensor(f, "own"), exf_ffn_tensor(f, "constant"));
}
static const exf_rule own_rule = {
  "own", NULL, rule_init, rule_weights, NULL, NULL, NULL
};

static int upcycle_rule(world *w) {
  exf_fusion_desc f = tiny_variant(0, 2);
  f.rule = &own_rule;
  return exf_model_upcycle(w->g.model, &f) == EXF_OK;
}

static int merge(world *w) { return exf_model_merge(w->g.model) == EXF_OK; }

static int save_model(world *w) {
  return exf_model_save(w->g.model, "model", NULL, 0) == EXF_OK;
}

static int save_checkpoint(world *w) {
  exf_pair meta;
  meta.key = "note";
  meta.value = "new";
  return exf_checkpoint_save(w->g.model, w->optim, "checkpoint", &meta, 1) == EXF_OK;
}

static int save_memory(world *w) {
  exf_st_item item;
  unsigned char *data;
  size_t bytes;
  int good;
  item.name = "wte";
  item.shape = w->g.wte->shape;
  item.data = w->g.wte->data;
  good = exf_st_save_memory(w->ctx, &item, 1, NULL, 0, &data, &bytes) == EXF_OK;
  exf_st_free_memory(w->ctx, data);
  return good;
}

static int load_model(world *w) {
  return exf_model_load(w->g.model, "model") == EXF_OK;
}

static int load_checkpoint(world *w) {
  return exf_checkpoint_load(w->g.model, w->optim, "checkpoint") == EXF_OK;
}

static int make_ema(world *w) {
  w->ema = exf_ema_new(w->g.model, 0.5);
  return w->ema != NULL;
}

static int update_ema(world *w) { return exf_ema_update(w->ema) == EXF_OK; }

/* Layers join a model that is there already. */
static int grow_block(world *w) {
  exf_block_desc b;
  tiny_desc d = small_desc(w->variant);
  memset(&b, 0, sizeof b);
  b.width = 4;
  b.n_heads = 2;
  b.bias = 1;
  b.ffn.act = d.act;
  b.ffn.fusion = d.fusion;
  return exf_block_new(w->g.model, "more", &b) != NULL;
}

static int grow_layers(world *w) {
  const exf_linear_desc d = {1, 0};
  return exf_linear_new(w->g.model, "linear", 3, 2, &d) != NULL;
}

static int grow_norm(world *w) {
  const exf_norm_desc d = {0, 1, 0};
  return exf_norm_new(w->g.model, "norm", 3, &d) != NULL;
}

static int grow_table(world *w) {
  return exf_embedding_new(w->g.model, "table", 3, 2, 0.1) != NULL;
}

static int grow_alias(world *w) {
  return exf_param_alias(w->g.model, "alias", "transformer.wpe.weight") == EXF_OK;
}

static int diagnose(world *w) {
  double a[2] = {0, 0}, r[2] = {0, 0}, d[2] = {0, 0};
  double n = exf_ffn_diagnose(w->g.block[1]->ffn, a, r, d);
  w->out[0] = (exf_real)(n + a[0] + d[1]);
  exf_rewind(w->ctx);
  return ok(w);
}

static const action actions[] = {
  {"build", HAS_NOTHING, build},
  {"grow a block", 0, grow_block},
  {"grow a layer", DENSE_ONLY, grow_layers},
  {"grow a norm", DENSE_ONLY, grow_norm},
  {"grow a table", DENSE_ONLY, grow_table},
  {"grow an alias", DENSE_ONLY, grow_alias},
  {"make an optimizer", 0, make_optim},
  {"train", HAS_OPTIM, train},
  {"evaluate", 0, evaluate},
  {"generate", 0, generate},
  {"upcycle", HAS_TRAINED | STARTS_DENSE, upcycle},
  {"upcycle by drop", HAS_TRAINED | STARTS_DENSE, upcycle_drop},
  {"upcycle by a rule", HAS_TRAINED | STARTS_DENSE, upcycle_rule},
  {"merge", HAS_TRAINED, merge},
  {"diagnose", HAS_TRAINED, diagnose},
  {"make an average", HAS_TRAINED, make_ema},
  {"update an average", HAS_OPTIM | HAS_TRAINED | HAS_EMA, update_ema},
  {"save a model", HAS_OPTIM | HAS_TRAINED | HAS_FILES, save_model},
  {"save a checkpoint", HAS_OPTIM | HAS_TRAINED | HAS_FILES, save_checkpoint},
  {"save to memory", DENSE_ONLY, save_memory},
  {"load a model", HAS_OPTIM | HAS_TRAINED | HAS_FILES | DENSE_ONLY, load_model},
  {"load a checkpoint", HAS_OPTIM | HAS_TRAINED | HAS_FILES, load_checkpoint},
};
enum { N_ACTIONS = (int)(sizeof actions / sizeof actions[0]) };

/* ---- the allocator ---- */

static size_t n_alloc_sites, n_file_sites;

/* The state after an action that nothing disturbed. */
static disk_bytes undisturbed(const action *a, int variant) {
  world w;
  disk_bytes after;
  world_make(&w, variant, a->has);
  if (!CHECK(a->run(&w))) printf("  %s: %s\n", a->name, exf_error(w.ctx));
  after = state(&w);
  world_free(&w);
  return after;
}

/* What a program does about a failure: what was being built goes, the error too. */
static void recover(world *w, const action *a) {
  if (a->has & HAS_NOTHING) {
    exf_model_free(w->g.model);
    memset(&w->g, 0, sizeof w->g);
  }
  exf_error_clear(w->ctx);
  exf_rewind(w->ctx);
  exf_model_zero_grad(w->g.model);
  memset(w->out, 0, sizeof w->out);
}

/* 0 when the action has fewer than k calls of the allocator. */
static int fail_alloc(const action *a, int variant, size_t k, int for_ever,
                      disk_bytes expected) {
  world w;
  disk_bytes before, now;
  int good, fired;
  world_make(&w, variant, a->has);
  before = state(&w);
  heap_arm(&w.heap, k, for_ever);
  good = a->run(&w);
  fired = w.heap.failed;
  heap_arm(&w.heap, 0, 0);
  if (fired) {
    CHECK(!good);
    CHECK(exf_ctx_status(w.ctx) == EXF_MEMORY);
    CHECK_HAS(exf_error(w.ctx), "memory: the ");
    recover(&w, a);
    now = state(&w);
    CHECK(disk_same(before, now));
    free(now.data);
    good = a->run(&w);
  }
  if (!CHECK(good)) printf("  %s\n", exf_error(w.ctx));
  if (ok(&w)) {
    now = state(&w);
    CHECK(disk_same(now, expected));
    free(now.data);
  }
  free(before.data);
  world_free(&w);
  return fired;
}

TEST(every_allocation_may_fail) {
  int i, variant, for_ever, before;
  for (i = 0; i < N_ACTIONS; i++) {
    for (variant = 0; variant < TINY_N_VARIANTS; variant++) {
      disk_bytes expected;
      if ((actions[i].has & DENSE_ONLY) && variant > 0) break;
      if (variant == 5) continue;   /* attached: in 6 as well */
      expected = undisturbed(&actions[i], variant);
      for (for_ever = 0; for_ever < 2; for_ever++) {
        size_t k = 1;
        before = test_now.failures;
        while (fail_alloc(&actions[i], variant, k, for_ever, expected)
               && test_now.failures == before)
          k++;
        n_alloc_sites += k - 1;
        if (test_now.failures > before)
          printf("  %s, %s: call %d\n", actions[i].name, tiny_variant_names[variant],
                 (int)k);
      }
      free(expected.data);
    }
  }
  CHECK(n_alloc_sites > 1000);
}

/* ---- the file hooks ---- */

/* Reading and saving: what is saved, under which name, and whether it is a load. */
typedef struct file_action {
  const char *name, *path;
  int loads;
  int (*run)(world *w);
} file_action;

static int save_items(world *w) {
  exf_st_item item;
  item.name = "wte";
  item.shape = w->g.wte->shape;
  item.data = w->g.wte->data;
  return exf_st_save(w->ctx, "items", &item, 1, NULL, 0) == EXF_OK;
}

static int save_text(world *w) {
  return exf_file_save(w->ctx, "text", "new text", 8) == EXF_OK;
}

static const file_action file_actions[] = {
  {"save a checkpoint", "checkpoint", 0, save_checkpoint},
  {"save a model", "model", 0, save_model},
  {"save tensors", "items", 0, save_items},
  {"save a file", "text", 0, save_text},
  {"load a checkpoint", "checkpoint", 1, load_checkpoint},
};
enum { N_FILE_ACTIONS = (int)(sizeof file_actions / sizeof file_actions[0]) };

/* Faults that are none of the caller's business: a short transfer is carried on, and a
   file that was only read may fail to close. */
static int is_harmless(const file_action *a, int call, disk_fault fault) {
  if (call == DISK_READ || call == DISK_WRITE) return fault == DISK_SHORT;
  return a->loads && call == DISK_CLOSE;
}

/* The message names the file and the cause. */
static void check_message(const world *w, const file_action *a, disk_fault fault) {
  const char *message = exf_error(w->ctx);
  int read = w->disk.failed == DISK_READ;
  CHECK(exf_ctx_status(w->ctx) == EXF_IO);
  CHECK_HAS(message, a->path);
  if (fault != DISK_NOTHING) CHECK_HAS(message, strerror(ENOSPC));
  else CHECK_HAS(message, read ? "bytes are missing" : strerror(ENOSPC));
  CHECK(strchr(message, '\n') == NULL);
}

/* After a failed save: the old file, or, when only its folder could not be flushed, the
   new one. The temporary file stays behind only where nothing can be removed. */
static void check_files(const world *w, const file_action *a, disk_bytes old,
                        disk_bytes fresh, int for_ever) {
  disk_bytes now = disk_file(&w->disk, a->path);
  char temp[DISK_NAME + 8];
  snprintf(temp, sizeof temp, "%s.tmp", a->path);
  if (w->disk.failed == DISK_SYNC_DIR) CHECK(disk_same(now, fresh));
  else CHECK(old.data ? disk_same(now, old) : now.data == NULL);
  if (!for_ever) CHECK(disk_find(&w->disk, temp) < 0);
  CHECK(w->disk.n_open == 0 && w->disk.n_bad == 0);
}

static disk_bytes kept(const disk *d, const char *name) {
  disk_bytes b = disk_file(d, name);
  return b.data ? disk_copy(b.data, b.n) : b;
}

/* 0 when the action has fewer than k calls of the file hooks. */
static int fail_file(const file_action *a, size_t k, int for_ever, disk_fault fault,
                     int exists, disk_bytes fresh) {
  world w;
  disk_bytes old, before, now;
  int good, fired;
  world_make(&w, 4, HAS_OPTIM | HAS_TRAINED | HAS_FILES);
  if (exists && !a->loads) disk_put(&w.disk, a->path, disk_file(&w.disk, "model"));
  if (!exists) disk_unbind(&w.disk, a->path);
  old = kept(&w.disk, a->path);
  before = state(&w);
  disk_arm(&w.disk, k, for_ever, fault);
  good = a->run(&w);
  fired = w.disk.failed >= 0;
  w.disk.fail_at = 0;
  w.disk.next_fails = 0;
  if (fired && is_harmless(a, w.disk.failed, fault)) {
    CHECK(good);
  } else if (fired) {
    CHECK(!good);
    check_message(&w, a, fault);
    check_files(&w, a, old, fresh, for_ever);
    exf_error_clear(w.ctx);
    if (w.disk.failed == DISK_SYNC_DIR) disk_put(&w.disk, a->path, old);
    if (!old.data) disk_unbind(&w.disk, a->path);
    exf_rewind(w.ctx);
    now = state(&w);
    CHECK(disk_same(before, now));
    free(now.data);
    good = a->run(&w);
  }
  CHECK(good);
  now = disk_file(&w.disk, a->path);
  CHECK(disk_same(now, a->loads ? old : fresh));
  CHECK(disk_find(&w.disk, "checkpoint.tmp") < 0 && disk_find(&w.disk, "text.tmp") < 0);
  free(old.data);
  free(before.data);
  world_free(&w);
  return fired;
}

TEST(every_file_operation_may_fail) {
  int i, mode, for_ever, fault, exists;
  for (i = 0; i < N_FILE_ACTIONS; i++) {
    const file_action *a = &file_actions[i];
    disk_bytes fresh;
    world w;
    world_make(&w, 4, HAS_OPTIM | HAS_TRAINED | HAS_FILES);
    CHECK(a->run(&w));
    fresh = kept(&w.disk, a->path);
    world_free(&w);
    for (mode = 0; mode < 16; mode++) {
      size_t k = 1;
      int before = test_now.failures;
      for_ever = mode & 1;
      exists = (mode >> 1) & 1;
      fault = mode >> 2;
      if (a->loads && !exists) continue;
      if (fault == DISK_SHORT && for_ever) {   /* nothing but short transfers */
        CHECK(fail_file(a, 1, 1, DISK_ERROR, exists, fresh));
        continue;
      }
      while (fail_file(a, k, for_ever, (disk_fault)fault, exists, fresh)
             && test_now.failures == before)
        k++;
      n_file_sites += k - 1;
      if (test_now.failures > before)
        printf("  %s: call %d, fault %d, for ever %d, exists %d\n", a->name, (int)k,
               fault, for_ever, exists);
    }
    free(fresh.data);
  }
  CHECK(n_file_sites > 100);
}

int main(void) {
  RUN(every_allocation_may_fail);
  RUN(every_file_operation_may_fail);
  printf("%d allocations and %d file operations failed, once and for ever\n",
         (int)n_alloc_sites, (int)n_file_sites);
  TEST_MAIN_END;
}
