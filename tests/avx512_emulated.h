/* tests/avx512_emulated.h - the AVX-512 kernels on a machine without AVX-512: included
   before exfusion.h (cc -include), it puts plain C in the place of the few intrinsics the
   header uses, and AVX2 in the place of the target. Slow; the same bits. */
#ifndef AVX512_EMULATED_H
#define AVX512_EMULATED_H
#include <immintrin.h>
#include <math.h>
#include <string.h>

typedef float e512 __attribute__((vector_size(64), aligned(64)));
typedef double e512d __attribute__((vector_size(64), aligned(64)));
#define E512 static inline __attribute__((always_inline, target("avx2,fma")))
#define E512_MAP(expression)              \
  e512 r;                                 \
  int i;                                  \
  for (i = 0; i < 16; i++) r[i] = expression; \
  return r;

E512 e512 e512_set1(float x) { E512_MAP(x) }
E512 e512 e512_load(const float *p) { e512 r; memcpy(&r, p, sizeof r); return r; }
E512 void e512_store(float *p, e512 v) { memcpy(p, &v, sizeof v); }
E512 e512 e512_fma(e512 a, e512 b, e512 c) {
  __m256 x[2], y[2], z[2];
  memcpy(x, &a, sizeof a);
  memcpy(y, &b, sizeof b);
  memcpy(z, &c, sizeof c);
  z[0] = _mm256_fmadd_ps(x[0], y[0], z[0]);
  z[1] = _mm256_fmadd_ps(x[1], y[1], z[1]);
  memcpy(&c, z, sizeof c);
  return c;
}
/* As the instructions: the second one when either is not a number. */
E512 e512 e512_max(e512 a, e512 b) { E512_MAP(a[i] > b[i] ? a[i] : b[i]) }
E512 e512 e512_min(e512 a, e512 b) { E512_MAP(a[i] < b[i] ? a[i] : b[i]) }
E512 e512 e512_sqrt(e512 a) { E512_MAP(sqrtf(a[i])) }
E512 e512 e512_unpack(e512 a, e512 b, int at) {
  E512_MAP((i % 2 ? b : a)[i / 4 * 4 + at + i % 4 / 2])
}
E512 e512 e512_shuffle(e512 a, e512 b, int at) {
  E512_MAP((i % 4 < 2 ? a : b)[i / 4 * 4 + at + i % 2])
}
E512 e512 e512_load_n(e512 fill, unsigned k, const float *p) {
  E512_MAP(k >> i & 1 ? p[i] : fill[i])
}
E512 void e512_store_n(float *p, unsigned k, e512 v) {
  int i;
  for (i = 0; i < 16; i++)
    if (k >> i & 1) p[i] = v[i];
}
E512 e512 e512_insert(e512 a, __m128 b, int at) {
  memcpy((char *)&a + 16 * at, &b, sizeof b);
  return a;
}
E512 __m256d e512_half(e512d a, int at) {
  __m256d r;
  memcpy(&r, (char *)&a + 32 * at, sizeof r);
  return r;
}

#define __m512 e512
#define __m512d e512d
#define _mm512_set1_ps e512_set1
#define _mm512_loadu_ps(p) e512_load(p)
#define _mm512_storeu_ps(p, v) e512_store(p, v)
#define _mm512_fmadd_ps e512_fma
#define _mm512_maskz_max_ps(k, a, b) e512_max(a, b)
#define _mm512_maskz_min_ps(k, a, b) e512_min(a, b)
#define _mm512_maskz_sqrt_ps(k, a) e512_sqrt(a)
#define _mm512_maskz_unpacklo_ps(k, a, b) e512_unpack(a, b, 0)
#define _mm512_maskz_unpackhi_ps(k, a, b) e512_unpack(a, b, 2)
#define _mm512_shuffle_ps(a, b, at) e512_shuffle(a, b, (at) == 0x44 ? 0 : 2)
#define _mm512_mask_loadu_ps e512_load_n
#define _mm512_mask_storeu_ps e512_store_n
#define _mm512_castps128_ps512(a) e512_insert(e512_set1(0), a, 0)
#define _mm512_insertf32x4 e512_insert
#define _mm512_castps_pd(a) ((e512d)(a))
#define _mm512_maskz_extractf64x4_pd(k, a, at) e512_half(a, at)
#define target(name) target("avx2,fma")
#define __builtin_cpu_supports(name) 1

#endif /* AVX512_EMULATED_H */
