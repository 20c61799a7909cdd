/* tests/disk.h - a file system in memory behind exf_files: it fails when asked to, and it
   records what is done to it, so that a test can cut the power at any moment.

     disk d;
     exf_files hooks = disk_hooks(&d);
     disk_arm(&d, 3, 1);        the third call from now on fails, and all later ones

   Names point to files (inodes), as on a real disk: a rename moves the name. Include
   after exfusion.h and test.h. */
#ifndef DISK_H
#define DISK_H

#include <errno.h>
#include <stdlib.h>

typedef enum disk_call {
  DISK_OPEN, DISK_SIZE, DISK_READ, DISK_WRITE, DISK_SYNC, DISK_CLOSE, DISK_RENAME,
  DISK_REMOVE, DISK_SYNC_DIR, DISK_CALLS
} disk_call;

enum { DISK_NAMES = 8, DISK_INODES = 64, DISK_HANDLES = 4, DISK_NAME = 40 };

/* How the chosen call goes wrong: an error with errno; a transfer of one byte, which is
   legal; a transfer of nothing; half a transfer, and an error at the next call. */
typedef enum disk_fault { DISK_ERROR, DISK_SHORT, DISK_NOTHING, DISK_HALF } disk_fault;

/* Of one call: in order; wrong in the way of the chosen fault; an error. */
typedef enum disk_fate { DISK_FINE, DISK_FAULTY, DISK_REFUSED } disk_fate;

typedef struct disk_bytes {
  unsigned char *data;
  size_t n;
} disk_bytes;

/* One recorded operation. open: name, inode (created or emptied); write: inode, at, data;
   rename: name -> to; remove: name. */
typedef struct disk_op {
  disk_call call;
  int inode;
  char name[DISK_NAME], to[DISK_NAME];
  size_t at;
  disk_bytes data;
} disk_op;

typedef struct disk {
  disk_bytes inode[DISK_INODES];
  size_t room[DISK_INODES];     /* bytes that writing may fill; 0: as many as are there */
  int n_inodes;
  struct {
    char name[DISK_NAME];       /* "" is a free place */
    int inode;
  } name[DISK_NAMES];
  struct {
    int inode, writing;         /* inode -1 is a free place */
    size_t at;
  } handle[DISK_HANDLES];
  int n_open, n_bad;            /* open handles; calls that should not have been made */
  size_t calls, fail_at;
  int for_ever;
  disk_fault fault;
  int cause;                    /* errno of a failing call */
  int failed;                   /* the disk_call that went wrong first, or -1 */
  int next_fails;
  disk_op *op;                  /* (n_ops) when recording is on */
  size_t n_ops, op_room;
  int recording;
} disk;

static TEST_UNUSED void disk_arm(disk *d, size_t fail_at, int for_ever,
                                 disk_fault fault) {
  d->calls = 0;
  d->fail_at = fail_at;
  d->for_ever = for_ever;
  d->fault = fault;
  d->failed = -1;
  d->next_fails = 0;
}

static disk_bytes disk_copy(const unsigned char *data, size_t n) {
  disk_bytes b;
  b.n = n;
  b.data = (unsigned char *)malloc(n ? n : 1);
  if (b.data == NULL) exit(2);
  if (n) memcpy(b.data, data, n);
  return b;
}

static TEST_UNUSED int disk_same(disk_bytes a, disk_bytes b) {
  if (a.data == NULL || b.data == NULL || a.n != b.n) return 0;
  return memcmp(a.data, b.data, a.n) == 0;
}

static int disk_find(const disk *d, const char *name) {
  int i;
  for (i = 0; i < DISK_NAMES; i++)
    if (strcmp(d->name[i].name, name) == 0) return i;
  return -1;
}

/* The bytes of a file; data is NULL when there is none. They stay the disk's. */
static TEST_UNUSED disk_bytes disk_file(const disk *d, const char *name) {
  disk_bytes none = {NULL, 0};
  int at = disk_find(d, name);
  return at < 0 ? none : d->inode[d->name[at].inode];
}

static TEST_UNUSED int disk_n_files(const disk *d) {
  int i, n = 0;
  for (i = 0; i < DISK_NAMES; i++) n += d->name[i].name[0] != '\0';
  return n;
}

static void disk_bind(disk *d, const char *name, int inode) {
  int at = disk_find(d, name);
  if (at < 0) at = disk_find(d, "");
  if (at < 0 || strlen(name) >= DISK_NAME) exit(2);
  strcpy(d->name[at].name, name);
  d->name[at].inode = inode;
}

static void disk_unbind(disk *d, const char *name) {
  int at = disk_find(d, name);
  if (at >= 0) d->name[at].name[0] = '\0';
}

/* Has it a name or a handle? A recorded disk never gives an inode a second life. */
static int disk_used(const disk *d, int inode) {
  int i;
  for (i = 0; i < DISK_NAMES; i++)
    if (d->name[i].name[0] != '\0' && d->name[i].inode == inode) return 1;
  for (i = 0; i < DISK_HANDLES; i++)
    if (d->handle[i].inode == inode) return 1;
  return d->recording;
}

static int disk_inode_new(disk *d) {
  int i;
  for (i = 0; i < d->n_inodes; i++)
    if (!disk_used(d, i)) {
      d->inode[i].n = 0;
      return i;
    }
  if (d->n_inodes == DISK_INODES) exit(2);
  d->inode[d->n_inodes] = disk_copy(NULL, 0);
  return d->n_inodes++;
}

static TEST_UNUSED void disk_put(disk *d, const char *name, disk_bytes bytes) {
  int inode = disk_inode_new(d);
  free(d->inode[inode].data);
  d->inode[inode] = disk_copy(bytes.data, bytes.n);
  d->room[inode] = 0;
  disk_bind(d, name, inode);
}

static disk_op *disk_log(disk *d, disk_call call, int inode) {
  static disk_op nowhere;
  disk_op *op;
  if (!d->recording) return &nowhere;
  if (d->n_ops == d->op_room) {
    d->op_room = 2 * d->op_room + 16;
    d->op = (disk_op *)realloc(d->op, d->op_room * sizeof *d->op);
    if (d->op == NULL) exit(2);
  }
  op = &d->op[d->n_ops++];
  memset(op, 0, sizeof *op);
  op->call = call;
  op->inode = inode;
  return op;
}

/* Does this call go wrong? An error leaves its cause. */
static disk_fate disk_fails(disk *d, disk_call call) {
  disk_fate fate = d->next_fails ? DISK_REFUSED : DISK_FINE;
  d->next_fails = 0;
  d->calls++;
  if (fate == DISK_FINE && d->fail_at
      && (d->calls == d->fail_at || (d->for_ever && d->calls > d->fail_at)))
    fate = DISK_FAULTY;
  if (fate == DISK_FINE) return fate;
  if (d->failed < 0) d->failed = (int)call;
  errno = d->cause;
  return fate;
}

/* The bytes that a transfer of n makes when it goes wrong; negative: the error. */
static int64_t disk_transfer(disk *d, disk_fate fate, size_t n) {
  if (fate == DISK_REFUSED || d->fault == DISK_ERROR) return -1;
  if (d->fault == DISK_NOTHING) return 0;
  if (d->fault == DISK_SHORT) return n ? 1 : 0;
  d->next_fails = 1;
  return (int64_t)(n / 2);
}

static int disk_handle(const disk *d, const void *file) {
  int i;
  for (i = 0; i < DISK_HANDLES; i++)
    if (file == (const void *)&d->handle[i] && d->handle[i].inode >= 0) return i;
  return -1;
}

static void *disk_open(void *user, const char *path, int writing) {
  disk *d = (disk *)user;
  int at = disk_find(d, path), inode, i;
  if (disk_fails(d, DISK_OPEN)) return NULL;
  if (at < 0 && !writing) {
    errno = ENOENT;
    return NULL;
  }
  for (i = 0; i < DISK_HANDLES && d->handle[i].inode >= 0; i++) continue;
  if (i == DISK_HANDLES) return NULL;
  inode = at < 0 ? disk_inode_new(d) : d->name[at].inode;
  if (at < 0) disk_bind(d, path, inode);
  if (writing) {
    d->inode[inode].n = 0;
    strcpy(disk_log(d, DISK_OPEN, inode)->name, path);
  }
  d->handle[i].inode = inode;
  d->handle[i].writing = writing;
  d->handle[i].at = 0;
  d->n_open++;
  return &d->handle[i];
}

static int64_t disk_size(void *user, void *file) {
  disk *d = (disk *)user;
  int h = disk_handle(d, file);
  if (disk_fails(d, DISK_SIZE)) return -1;
  return h < 0 ? -1 : (int64_t)d->inode[d->handle[h].inode].n;
}

static int64_t disk_read(void *user, void *file, void *data, size_t bytes) {
  disk *d = (disk *)user;
  int h = disk_handle(d, file);
  disk_fate fate = disk_fails(d, DISK_READ);
  const disk_bytes *inode;
  int64_t n = (int64_t)bytes;
  if (h < 0) return -1;
  inode = &d->inode[d->handle[h].inode];
  if (fate != DISK_FINE && (n = disk_transfer(d, fate, bytes)) < 0) return -1;
  if ((size_t)n > inode->n - d->handle[h].at) n = (int64_t)(inode->n - d->handle[h].at);
  if (n > 0) memcpy(data, inode->data + d->handle[h].at, (size_t)n);
  d->handle[h].at += (size_t)n;
  return n;
}

static int64_t disk_write(void *user, void *file, const void *data, size_t bytes) {
  disk *d = (disk *)user;
  int h = disk_handle(d, file);
  disk_bytes *inode;
  size_t *room;
  disk_fate fate = disk_fails(d, DISK_WRITE);
  disk_op *op;
  int64_t n = (int64_t)bytes;
  if (h < 0) return -1;
  inode = &d->inode[d->handle[h].inode];
  if (fate != DISK_FINE && (n = disk_transfer(d, fate, bytes)) <= 0) return n;
  room = &d->room[d->handle[h].inode];
  if (inode->n + (size_t)n > *room) {     /* a file may grow by a byte at a time */
    *room = 2 * (inode->n + (size_t)n);
    inode->data = (unsigned char *)realloc(inode->data, *room);
    if (inode->data == NULL) exit(2);
  }
  memcpy(inode->data + inode->n, data, (size_t)n);
  op = disk_log(d, DISK_WRITE, d->handle[h].inode);
  op->at = inode->n;
  if (d->recording) op->data = disk_copy((const unsigned char *)data, (size_t)n);
  inode->n += (size_t)n;
  return n;
}

static int disk_sync(void *user, void *file) {
  disk *d = (disk *)user;
  int h = disk_handle(d, file);
  if (disk_fails(d, DISK_SYNC) || h < 0) return -1;
  disk_log(d, DISK_SYNC, d->handle[h].inode);
  return 0;
}

static int disk_close(void *user, void *file) {
  disk *d = (disk *)user;
  int h = disk_handle(d, file);
  if (h < 0) {
    d->n_bad++;
    return -1;
  }
  d->handle[h].inode = -1;
  d->n_open--;
  return disk_fails(d, DISK_CLOSE) ? -1 : 0;
}

static int disk_rename(void *user, const char *from, const char *to) {
  disk *d = (disk *)user;
  int at = disk_find(d, from);
  disk_op *op;
  if (disk_fails(d, DISK_RENAME)) return -1;
  if (at < 0 || d->n_open != 0) d->n_bad++;
  if (at < 0) return -1;
  op = disk_log(d, DISK_RENAME, d->name[at].inode);
  strcpy(op->name, from);
  strcpy(op->to, to);
  disk_bind(d, to, d->name[at].inode);
  disk_unbind(d, from);
  return 0;
}

static int disk_remove(void *user, const char *path) {
  disk *d = (disk *)user;
  if (disk_fails(d, DISK_REMOVE)) return -1;
  if (d->n_open != 0) d->n_bad++;
  if (disk_find(d, path) < 0) {
    errno = ENOENT;
    return -1;
  }
  strcpy(disk_log(d, DISK_REMOVE, -1)->name, path);
  disk_unbind(d, path);
  return 0;
}

static int disk_sync_dir(void *user, const char *path) {
  disk *d = (disk *)user;
  (void)path;
  if (disk_fails(d, DISK_SYNC_DIR)) return -1;
  disk_log(d, DISK_SYNC_DIR, -1);
  return 0;
}

static TEST_UNUSED exf_files disk_hooks(disk *d) {
  exf_files h;
  int i;
  memset(d, 0, sizeof *d);
  for (i = 0; i < DISK_HANDLES; i++) d->handle[i].inode = -1;
  d->failed = -1;
  d->cause = ENOSPC;
  h.user = d;
  h.open = disk_open;
  h.size = disk_size;
  h.read = disk_read;
  h.write = disk_write;
  h.sync = disk_sync;
  h.close = disk_close;
  h.rename = disk_rename;
  h.remove = disk_remove;
  h.sync_dir = disk_sync_dir;
  return h;
}

static TEST_UNUSED void disk_free(disk *d) {
  size_t i;
  int k;
  for (k = 0; k < d->n_inodes; k++) free(d->inode[k].data);
  for (i = 0; i < d->n_ops; i++) free(d->op[i].data.data);
  free(d->op);
  memset(d, 0, sizeof *d);
}

#endif /* DISK_H */
