/* The power is cut at any moment of a save. A recorded save is replayed on a worse disk
   than any real one: of what was not flushed each sector may or may not have reached the
   device, files are longer or shorter than written, holes hold what was there before, and
   names are moved in any order until their folder is flushed. What is found afterwards
   must be the old file or the new one, whole; the new one once the save has returned; and
   the next save works and cleans up.
     test_power [STATES]     at least so many states (2000 by default) */
#ifdef TEST_LINKED
#include "../exfusion.h"
#else
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"
#endif
#include "test.h"

#include "disk.h"
#include "tiny_gpt.h"

enum { SECTOR = 512, MAX_FILE = 1 << 16, MAX_VERSIONS = 8, MAX_OPS = 1000,
       EXHAUSTIVE_BITS = 10 };

static size_t wanted_states = 2000;

/* ---- a recorded series of saves of one path ---- */

typedef struct recording {
  disk d;
  exf_ctx *ctx;
  tiny_gpt g;
  exf_optim *optim;
  const char *path;                  /* of the file being saved */
  disk_bytes base[DISK_INODES];      /* what was there, flushed, before the first save */
  char base_name[DISK_NAMES][DISK_NAME];
  int base_inode[DISK_NAMES], n_base;
  disk_bytes version[MAX_VERSIONS];  /* data NULL: no file */
  size_t done[MAX_VERSIONS];         /* operations made when its save returned */
  int n_versions;
} recording;

typedef int (*save_function)(recording *r, int version);

static int save_checkpoint(recording *r, int version) {
  exf_pair meta;
  char text[16];
  snprintf(text, sizeof text, "%d", version);
  meta.key = "version";
  meta.value = text;
  return exf_checkpoint_save(r->g.model, r->optim, r->path, &meta, 1) == EXF_OK;
}

static int save_model(recording *r, int version) {
  (void)version;
  return exf_model_save(r->g.model, r->path, NULL, 0) == EXF_OK;
}

/* Three sectors: few enough for every subset. */
static int save_small(recording *r, int version) {
  exf_real data[256];
  exf_st_item item;
  size_t i;
  for (i = 0; i < 256; i++) data[i] = (exf_real)(version * 1000 + (int)i);
  item.name = "small";
  item.shape = exf_shape1(256);
  item.data = data;
  return exf_st_save(r->ctx, r->path, &item, 1, NULL, 0) == EXF_OK;
}

static void start(recording *r) {
  tiny_desc model = tiny_defaults();
  exf_desc desc;
  exf_files hooks;
  memset(r, 0, sizeof *r);
  memset(&desc, 0, sizeof desc);
  hooks = disk_hooks(&r->d);
  desc.files = &hooks;
  desc.n_threads = 1;
  model.layers = 1;
  model.width = 8;
  model.fusion = tiny_variant(4, 2);
  r->path = "file";
  r->ctx = exf_ctx_new(&desc);
  r->g = tiny_new(r->ctx, &model);
  r->optim = tiny_adamw(r->g.model);
}

static void remember(recording *r) {
  disk_bytes now = disk_file(&r->d, r->path);
  if (now.data) now = disk_copy(now.data, now.n);
  r->version[r->n_versions] = now;
  r->done[r->n_versions++] = r->d.n_ops;
}

/* stale: a temporary file of an earlier crash is in the way. */
static void record(recording *r, save_function save, int n_saves, int exists, int stale) {
  static const unsigned char rubbish[3 * SECTOR] = {8, 0, 0, 0, 0, 0, 0, 0, '{', '}'};
  int i;
  start(r);
  if (exists) CHECK(save(r, 0));
  if (stale) {
    disk_bytes b = {NULL, sizeof rubbish};
    b = disk_copy(rubbish, sizeof rubbish);
    disk_put(&r->d, "file.tmp", b);
    free(b.data);
  }
  remember(r);
  r->n_base = r->d.n_inodes;
  for (i = 0; i < r->n_base; i++)
    r->base[i] = disk_copy(r->d.inode[i].data, r->d.inode[i].n);
  for (i = 0; i < DISK_NAMES; i++) {
    strcpy(r->base_name[i], r->d.name[i].name);
    r->base_inode[i] = r->d.name[i].inode;
  }
  r->d.recording = 1;
  for (i = 1; i <= n_saves; i++) {
    tiny_train(r->ctx, &r->g, r->optim, (uint64_t)i, 1, 0.01);
    CHECK(save(r, i));
    remember(r);
    CHECK(!disk_same(r->version[i], r->version[i - 1]));
  }
  CHECK_OK(r->ctx);
}

static void record_free(recording *r) {
  int i;
  for (i = 0; i < r->n_base; i++) free(r->base[i].data);
  for (i = 0; i < r->n_versions; i++) free(r->version[i].data);
  exf_optim_free(r->optim);
  exf_model_free(r->g.model);
  exf_ctx_free(r->ctx);
  disk_free(&r->d);
}

/* ---- what the device may hold ---- */

/* Where the bits of a state come from: a number that counts through all of them, or
   draws, in which mostly everything or mostly nothing was written. */
typedef struct chooser {
  int all, used;
  uint64_t pattern, draw;
} chooser;

static int choose(chooser *c) {
  c->used++;
  if (c->all) return (int)(c->used > 64 ? 0 : c->pattern >> (c->used - 1) & 1);
  return exf_rng_uniform(5, 0, (uint32_t)c->used, c->draw)
         < exf_rng_uniform(5, 1, 0, c->draw);
}

static size_t last_before(const disk *d, size_t n, disk_call call, int inode) {
  size_t i;
  for (i = n; i-- > 0;)
    if (d->op[i].call == call && d->op[i].inode == inode) return i;
  return 0;
}

/* Bytes [at, at + n) reach the device; what a file had not reached before is rubbish. */
static void land(unsigned char *file, size_t *size, size_t at, const unsigned char *data,
                 size_t n) {
  if (at + n > MAX_FILE) exit(2);
  if (at > *size) memset(file + *size, 0xee, at - *size);
  memcpy(file + at, data, n);
  if (at + n > *size) *size = at + n;
}

/* The file behind an inode after n operations. */
static disk_bytes wreck(const recording *r, size_t n, int inode, chooser *c) {
  static unsigned char file[MAX_FILE];
  size_t flushed = last_before(&r->d, n, DISK_SYNC, inode), size = 0, end = 0, i, at, k;
  int loose = 0;
  if (inode < r->n_base) land(file, &size, 0, r->base[inode].data, r->base[inode].n);
  for (i = 0; i < n; i++) {
    const disk_op *op = &r->d.op[i];
    if (op->inode != inode) continue;
    if (op->call == DISK_OPEN && (i < flushed || choose(c))) size = 0;
    if (op->call != DISK_WRITE) continue;
    loose |= i >= flushed;
    for (at = 0; at < op->data.n; at += k) {
      k = SECTOR - (op->at + at) % SECTOR;
      if (k > op->data.n - at) k = op->data.n - at;
      if (i < flushed || choose(c))
        land(file, &size, op->at + at, op->data.data + at, k);
    }
    end = op->at + op->data.n;
  }
  if (loose && choose(c) && size < end) land(file, &size, end, file, 0);
  if (loose && choose(c)) size = size / 2 / SECTOR * SECTOR;
  return disk_copy(file, size);
}

/* The disk after a power cut behind n operations. */
static void crash(const recording *r, size_t n, chooser *c, disk *out) {
  size_t flushed = last_before(&r->d, n, DISK_SYNC_DIR, -1), i;
  int k;
  for (k = 0; k < r->d.n_inodes; k++) {
    out->inode[k] = wreck(r, n, k, c);
    out->n_inodes++;
  }
  for (k = 0; k < DISK_NAMES; k++)
    if (r->base_name[k][0] != '\0') disk_bind(out, r->base_name[k], r->base_inode[k]);
  for (i = 0; i < n; i++) {
    const disk_op *op = &r->d.op[i];
    int sure = i < flushed;
    if (op->call == DISK_OPEN && (sure || choose(c))) disk_bind(out, op->name, op->inode);
    if (op->call == DISK_REMOVE && (sure || choose(c))) disk_unbind(out, op->name);
    if (op->call == DISK_RENAME) {
      int appears = sure || choose(c), goes = sure || choose(c);
      if (appears) disk_bind(out, op->to, op->inode);
      if (appears && goes) disk_unbind(out, op->name);
    }
  }
}

/* ---- what is found afterwards ---- */

/* The version that the file is, or -1: neither old nor new. */
static int version_of(const recording *r, size_t n, const disk *d) {
  disk_bytes found = disk_file(d, r->path);
  int v, oldest = 0, newest = 0;
  for (v = 0; v < r->n_versions; v++)
    if (r->done[v] <= n) oldest = v;
  newest = oldest + 1 < r->n_versions ? oldest + 1 : oldest;
  for (v = newest; v >= oldest; v--)
    if (found.data ? disk_same(found, r->version[v]) : r->version[v].data == NULL)
      return v;
  return -1;
}

/* A program starts again: it loads what is there, and saves. */
static int restart(recording *r, save_function save) {
  int good = 1;
  if (disk_file(&r->d, r->path).data) {
    exf_st *st = exf_st_open(r->ctx, r->path, NULL);
    good = st != NULL && exf_st_count(st) > 0;
    if (good && save == save_checkpoint)
      good = exf_checkpoint_load(r->g.model, r->optim, r->path) == EXF_OK;
    exf_st_close(st);
  }
  good = good && save(r, 1) && disk_n_files(&r->d) == 1 && r->d.n_open == 0;
  if (!good) printf("  %s\n", exf_error(r->ctx));
  exf_error_clear(r->ctx);
  exf_rewind(r->ctx);
  return good;
}

typedef struct tally {
  size_t states, bad, old, fresh, distinct;
} tally;
static tally total;

static uint64_t seen[1 << 20];

/* Is it the first disk of this content? */
static int is_new(const disk *d) {
  uint64_t h = 1469598103934665603u;
  size_t i, at;
  int k;
  for (k = 0; k < DISK_NAMES; k++) {
    disk_bytes b;
    if (d->name[k].name[0] == '\0') continue;
    b = d->inode[d->name[k].inode];
    for (i = 0; d->name[k].name[i]; i++)
      h = (h ^ (unsigned char)d->name[k].name[i]) * 1099511628211u;
    for (i = 0; i < b.n; i++) h = (h ^ b.data[i]) * 1099511628211u;
    h = (h ^ b.n) * 1099511628211u;
  }
  for (at = h % (1 << 20); seen[at] != 0 && seen[at] != h; at = (at + 1) % (1 << 20))
    continue;
  if (seen[at] == h) return 0;
  seen[at] = h;
  return 1;
}

/* reader: another program, on the disk of the state. */
static void visit(const recording *r, recording *reader, size_t n, chooser *c,
                  save_function save, tally *t) {
  int v;
  disk_free(&reader->d);
  disk_hooks(&reader->d);
  c->used = 0;
  crash(r, n, c, &reader->d);
  v = version_of(r, n, &reader->d);
  t->states++;
  t->distinct += (size_t)is_new(&reader->d);
  t->old += v == 0;
  t->fresh += v > 0;
  if (v < 0 || !restart(reader, save)) t->bad++;
}

/* Every prefix with every state, where these are few; else draws, until `want` states
   have been seen. */
static tally visit_all(const recording *r, save_function save, size_t want) {
  static uint64_t draw = 1;
  tally t = {0, 0, 0, 0, 0};
  recording reader;
  int large[MAX_OPS], n_large = 0;
  size_t n, i;
  if (r->d.n_ops >= MAX_OPS) exit(2);
  start(&reader);
  for (n = 0; n <= r->d.n_ops; n++) {
    chooser c = {1, 0, 0, 0};
    visit(r, &reader, n, &c, save, &t);
    if (c.used > EXHAUSTIVE_BITS) large[n_large++] = (int)n;
    else
      for (i = (size_t)1 << c.used; --i > 0;) {
        c.pattern = i;
        visit(r, &reader, n, &c, save, &t);
      }
  }
  for (i = 0; n_large > 0 && t.states < want; i++) {
    chooser c = {0, 0, 0, 0};
    c.draw = draw++;
    visit(r, &reader, (size_t)large[i % (size_t)n_large], &c, save, &t);
  }
  record_free(&reader);
  return t;
}

typedef struct scenario {
  const char *name;
  save_function save;
  int n_saves, exists, stale;
} scenario;

static const scenario scenarios[] = {
  {"a small file", save_small, 2, 1, 1},
  {"a checkpoint over another", save_checkpoint, 1, 1, 0},
  {"the first checkpoint", save_checkpoint, 1, 0, 0},
  {"a checkpoint, after a crash", save_checkpoint, 1, 1, 1},
  {"three checkpoints", save_checkpoint, 3, 1, 0},
  {"a model", save_model, 1, 1, 0},
};
enum { N_SCENARIOS = (int)(sizeof scenarios / sizeof scenarios[0]) };

TEST(a_power_cut_leaves_the_old_file_or_the_new) {
  int i;
  for (i = 0; i < N_SCENARIOS; i++) {
    const scenario *s = &scenarios[i];
    recording r;
    tally t;
    record(&r, s->save, s->n_saves, s->exists, s->stale);
    t = visit_all(&r, s->save,
                  (wanted_states - total.states) / (size_t)(N_SCENARIOS - i));
    if (!CHECK(t.bad == 0))
      printf("  %s: %d of %d\n", s->name, (int)t.bad, (int)t.states);
    CHECK(t.old > 0 && t.fresh > 0);
    total.states += t.states;
    total.distinct += t.distinct;
    record_free(&r);
  }
  CHECK(total.states >= wanted_states && total.distinct > wanted_states / 20);
}

/* The replay tells a careful save from a careless one: without its flush a file is found
   that is neither; without the flush of its folder a save that returned is lost. */
TEST(a_careless_save_is_caught) {
  static const disk_call forgotten[2] = {DISK_SYNC, DISK_SYNC_DIR};
  int k;
  for (k = 0; k < 2; k++) {
    recording r;
    size_t i, n = 0;
    record(&r, save_small, 2, 1, 0);
    for (i = 0; i < r.d.n_ops; i++)
      if (r.d.op[i].call == forgotten[k]) {
        r.d.op[i].call = DISK_CALLS;
        n++;
      }
    CHECK(n == 2);
    CHECK(visit_all(&r, save_small, 1000).bad > 0);
    record_free(&r);
  }
}

int main(int argc, char **argv) {
  if (argc > 1) wanted_states = (size_t)strtoul(argv[1], NULL, 10);
  RUN(a_power_cut_leaves_the_old_file_or_the_new);
  RUN(a_careless_save_is_caught);
  printf("%d states after a power cut, %d of them different\n", (int)total.states,
         (int)total.distinct);
  TEST_MAIN_END;
}
