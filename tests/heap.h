/* tests/heap.h - an allocator that counts, fails when asked to, and has a limit.

     heap h = {0};
     exf_desc desc = ...; heap_use(&h, &desc);
     h.fail_at = 3;             the third call from now on returns NULL
     h.for_ever = 1;            ... and so does every later one

   Fresh memory is full of ones (NaN as a number), freed memory is overwritten: what reads
   either shows it. Include after exfusion.h and test.h. */
#ifndef HEAP_H
#define HEAP_H

#include <stdlib.h>

typedef struct heap {
  size_t n_live, bytes;         /* blocks and bytes held now */
  size_t peak;                  /* most bytes held since heap_arm */
  size_t limit;                 /* more than this is refused; 0: no limit */
  size_t calls, fail_at;        /* since heap_arm; 0: none fails */
  int for_ever;
  int failed;                   /* a call was refused since heap_arm */
  int n_bad;                    /* blocks freed that are not the heap's */
} heap;

typedef union heap_head {
  struct { size_t bytes, mark; } of;
  double align[2];
} heap_head;

#define HEAP_MARK ((size_t)0x5afeb10c)

static TEST_UNUSED void heap_arm(heap *h, size_t fail_at, int for_ever) {
  h->calls = 0;
  h->fail_at = fail_at;
  h->for_ever = for_ever;
  h->failed = 0;
  h->peak = h->bytes;
}

static TEST_UNUSED void *heap_alloc(void *user, size_t bytes) {
  heap *h = (heap *)user;
  heap_head *head;
  h->calls++;
  if (h->fail_at != 0
      && (h->calls == h->fail_at || (h->for_ever && h->calls > h->fail_at))) {
    h->failed = 1;
    return NULL;
  }
  if (bytes > SIZE_MAX - sizeof *head || (h->limit && bytes > h->limit - h->bytes))
    return NULL;
  head = (heap_head *)malloc(sizeof *head + bytes);
  if (head == NULL) return NULL;
  head->of.bytes = bytes;
  head->of.mark = HEAP_MARK;
  memset(head + 1, 0xff, bytes);
  h->n_live++;
  h->bytes += bytes;
  if (h->bytes > h->peak) h->peak = h->bytes;
  return head + 1;
}

static TEST_UNUSED void heap_free(void *user, void *block) {
  heap *h = (heap *)user;
  heap_head *head = (heap_head *)block - 1;
  if (head->of.mark != HEAP_MARK) {
    h->n_bad++;
    return;
  }
  h->n_live--;
  h->bytes -= head->of.bytes;
  memset(head, 0xdd, sizeof *head + head->of.bytes);
  free(head);
}

static TEST_UNUSED void heap_use(heap *h, exf_desc *desc) {
  desc->alloc = heap_alloc;
  desc->free = heap_free;
  desc->alloc_user = h;
}

#endif /* HEAP_H */
