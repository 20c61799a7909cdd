/* exfusion.h - version 0.1.0 - Transformers with ExFusion FFNs, in one C file

   Tensors, reverse-mode autodiff, Transformer modules, optimizers and safetensors, to
   train FFNs as N experts fused into one (ExFusion) and to merge them into an ordinary
   dense model.

   LICENCE: MIT-0 or public domain, whichever you prefer. The file LICENSE holds both
   texts. There is no warranty.

   ---- DO THIS ---------------------------------------------------------- >>do_this

   In ONE C or C++ file, before the include (everywhere else the include alone):

    #define EXFUSION_IMPLEMENTATION
    #include "exfusion.h"

   and compile with

       cc -O2 program.c -lm               one thread
       cc -O2 -fopenmp program.c -lm      all processors, the same results

   C99 or C++11 and later; libc and libm are all it needs. No -march flag: the fast
   kernels are chosen when a context is made. The smallest complete program:

    #include <stdio.h>
    #define EXFUSION_IMPLEMENTATION
    #include "exfusion.h"

    int main(void) {
      const exf_real numbers[] = {1, 2, 3};
      exf_ctx *ctx = exf_ctx_new(NULL);
      exf_tensor *x = exf_tensor_new(ctx, exf_shape1(3), numbers);
      exf_tensor *loss;
      exf_grad_keep(ctx, x);                      // a leaf that wants a gradient
      loss = exf_sum(ctx, exf_square(ctx, x), EXF_ALL_AXES, 0);
      exf_backward(ctx, loss);                    // dL/dx = 2 x
      if (exf_ctx_status(ctx) != EXF_OK) {        // one check for everything above
        fprintf(stderr, "%s\n", exf_error(ctx));
        return 1;
      }
      printf("L = %g\n", exf_item(loss));         // -> L = 14
      printf("dL/dx = %g %g %g\n",                // -> dL/dx = 2 4 6
             x->grad[0], x->grad[1], x->grad[2]);
      exf_ctx_free(ctx);
      return 0;
    }

   ---- WHAT IT DOES NOT DO ---------------------------------------------- >>does_not

   - No sparse mixture of experts: tokens are not routed, experts are not skipped. One
     fused FFN runs.
   - No promise of better models. What sw, dw and mb reduce to is said in >>algebra.
   - No GPU, no distributed training, no arithmetic below float: F16 and BF16 are read
     from files and converted.
   - No second derivatives, no graph compiler, no strided views: every tensor is
     contiguous, and exf_permute and exf_slice copy.
   - No convolution, recurrence, rotary positions, grouped queries, or attention mask
     other than causal.
   - No tokenizer and no models: examples/charlm.c and vit.c build a GPT and a Vision
     Transformer from the modules.
   - No export to other frameworks' folders: it reads and writes single safetensors files.
   - No exit, abort, print, environment variable or mutable global, ever.
   - No fast kernels on compilers other than GCC and Clang: they get the reference ones.

   ---- CONTENTS --------------------------------------------------------- >>contents

   Search for a tag to go there.

   A. Manual           >>do_this >>does_not >>contents >>tour >>method >>algebra
                       >>lifetimes >>errors >>threads >>options >>format >>add_op
   B. Public API       >>api
        basics         >>status >>context >>rng >>tensor >>ops >>grad
        models         >>model >>modules >>exfusion >>block
        training       >>optim >>io
   C. Implementation   >>impl, each section uses only those above it
        ground         >>platform >>kernels >>fast >>memory >>random
        tensors, tape  >>tensor_impl >>tape >>table
        ops            >>elementwise >>matmul >>row_ops >>lookup >>shape_ops >>sums
                       >>attention >>fuse >>custom >>backward >>op_api
        models         >>model_impl >>gradcheck >>layers
        ExFusion       >>exfusion_impl >>ffn >>upcycle >>diagnose >>block_impl
        optimizers     >>optim_impl >>schedule >>merged
        files          >>files >>safetensors >>st-writer >>checkpoint

   ---- TEN-MINUTE TOUR -------------------------------------------------- >>tour

   Tensor -> loss -> backward -> step -> save. A line is fitted, saved and read back:

    #include <stdio.h>
    #include <string.h>
    #define EXFUSION_IMPLEMENTATION
    #include "exfusion.h"

    int main(void) {
      exf_ctx *ctx = exf_ctx_new(NULL);
      exf_model *model = exf_model_new(ctx);      // owns parameters and layers
      exf_linear_layer *line = exf_linear_new(model, "line", 1, 1, 1, 0);
      exf_optim_desc adamw;
      exf_optim *optim;
      exf_st *file;
      exf_real x[8], y[8], w = 0;
      int i;
      memset(&adamw, 0, sizeof adamw);            // zero means default, everywhere
      optim = exf_optim_new(model, &adamw);
      for (i = 0; i < 8; i++) {
        x[i] = (exf_real)i / 4;
        y[i] = 3 * x[i] - 1;
      }
      for (i = 0; i < 1000; i++) {
        exf_tensor *in = exf_tensor_new(ctx, exf_shape2(8, 1), x);      // (8,1)
        exf_tensor *want = exf_tensor_new(ctx, exf_shape2(8, 1), y);    // (8,1)
        exf_tensor *out = exf_linear_forward(ctx, line, in);            // (8,1)
        exf_tensor *error = exf_square(ctx, exf_sub(ctx, out, want));
        exf_backward(ctx, exf_mean(ctx, error, EXF_ALL_AXES, 0));
        exf_optim_step(optim, 0.05, NULL);
        exf_rewind(ctx);                          // ends the life of in, want, out ...
      }
      exf_model_save(model, "line.safetensors", NULL, 0);
      file = exf_st_open(ctx, "line.safetensors", NULL);
      if (file) exf_st_read(ctx, exf_st_find(file, "line.weight"), &w, 1);
      if (exf_ctx_status(ctx) != EXF_OK) {
        fprintf(stderr, "%s\n", exf_error(ctx));
        return 1;
      }
      printf("y = %.2f x - 1\n", w);              // -> y = 3.00 x - 1
      exf_st_close(file);
      exf_optim_free(optim);
      exf_model_free(model);
      exf_ctx_free(ctx);
      return 0;
    }

   A language model of one Transformer block, its FFN four experts with a memory bank,
   learns a cycle of tokens and is merged:

    #include <stdio.h>
    #include <string.h>
    #define EXFUSION_IMPLEMENTATION
    #include "exfusion.h"

    enum { V = 7, C = 32, B = 4, T = 8 };         // tokens, width, batch, positions

    typedef struct gpt {
      exf_tensor *wte, *wpe;                      // (V,C), (T,C)
      exf_block *block;
    } gpt;

    // ids (B,T) -> (B,T,V)
    static exf_tensor *logits(exf_ctx *ctx, const gpt *g, const int32_t *ids) {
      exf_tensor *x = exf_add(ctx, exf_embedding(ctx, g->wte, ids, B, T), g->wpe);
      x = exf_block_forward(ctx, g->block, x);    // (B,T,C)
      return exf_linear(ctx, x, g->wte, NULL);    // the head is the embedding again
    }

    int main(void) {
      exf_ctx *ctx = exf_ctx_new(NULL);
      exf_model *model = exf_model_new(ctx);
      exf_block_desc block;
      exf_optim_desc adamw;
      exf_optim *optim;
      exf_tensor *y;
      exf_real fused[B * T * V];
      int32_t ids[B * T], next[B * T];
      double a[4] = {0, 0, 0, 0}, loss = 0;
      int i, step, n_train, same;
      gpt g;
      memset(&block, 0, sizeof block);
      memset(&adamw, 0, sizeof adamw);
      block.width = C;
      block.n_heads = 4;
      block.causal = 1;
      block.ffn.fusion.variant = EXF_MB;          // 4 experts and mu 0.95 by default
      g.wte = exf_embedding_new(model, "wte", V, C, 0.02);
      g.wpe = exf_embedding_new(model, "wpe", T, C, 0.02);
      g.block = exf_block_new(model, "h.0", &block);
      adamw.weight_decay = 0.1;
      adamw.clip = 1;
      optim = exf_optim_new(model, &adamw);

      exf_training_set(ctx, 1);                   // routers are asked, banks follow
      for (step = 0; step < 150; step++) {
        exf_step_begin(ctx, (uint64_t)step);      // keys dropout, if there is any
        for (i = 0; i < B * T; i++) {             // 0 3 6 2 5 1 4 0 ..., from anywhere
          ids[i] = i % T ? next[i - 1] : (step + i / T) % V;
          next[i] = (ids[i] + 3) % V;
        }
        y = exf_cross_entropy(ctx, logits(ctx, &g, ids), next, 0);
        loss = exf_item(y);
        exf_backward(ctx, y);
        exf_optim_step(optim, 5e-3, NULL);        // experts, router; then M <- a
        exf_rewind(ctx);
      }
      exf_training_set(ctx, 0);                   // evaluation fuses with the bank M
      printf("learnt: %d\n", loss < 0.05);        // -> learnt: 1

      exf_grad_set(ctx, 0);                       // no-grad: inference without a tape
      y = logits(ctx, &g, ids);
      if (y) memcpy(fused, y->data, sizeof fused);
      exf_rewind(ctx);
      n_train = (int)exf_model_count(model);
      exf_ffn_diagnose(g.block->ffn, a, NULL, NULL);          // the merge's weights
      printf("sum of a: %.3f\n", a[0] + a[1] + a[2] + a[3]);  // -> sum of a: 1.000

      exf_optim_free(optim);                      // its moments are the experts'
      exf_model_merge(model);                     // for good: an ordinary dense FFN
      y = logits(ctx, &g, ids);
      same = y && memcmp(fused, y->data, sizeof fused) == 0;
      printf("same bits: %d\n", same);            // -> same bits: 1
      printf("parameters: %d, merged %d\n",       // -> parameters: 37540, merged 12832
             n_train, (int)exf_model_count(model));
      if (exf_ctx_status(ctx) != EXF_OK) fprintf(stderr, "%s\n", exf_error(ctx));
      exf_model_free(model);
      exf_ctx_free(ctx);
      return 0;
    }

   From here: examples/hello.c, then examples/charlm.c and vit.c, whole training programs
   with checkpoints, exact resuming, generation and pictures; >>api has every function and
   its formula.

   ---- THE METHOD ------------------------------------------------------- >>method

   ExFusion: "Efficient Transformer Training via Multi-Experts Fusion", Ruan, Dong, Qu,
   Zhu, Liu, Fu, Cheng, Xiang, arXiv 2603.27965, 2026. Each FFN holds N experts; in every
   step their parameters are combined by weights into one FFN of the original size, and
   that one runs; after training they are merged for good.

   What is whose. From the paper: N experts per FFN, the single fused FFN, the merge, and
   the names static weights (sw), dynamic weights (dw) and memory bank (mb). Ours: all
   formulas of dw, router, bank, upcycling, clipping and accumulation below. They were
   written from the abstract, figures and headings, and may differ from the authors' code.

   Rows x (T,d), T = batch x positions; W1 (h,d), b1 (h), W2 (d,h), b2 (d). Expert i is a
   full set th_i of them (SwiGLU: Wg, bg too); the weights a (N) are one vector per FFN.

       fuse      th = sum_i a_i th_i              the shapes of the dense FFN
       forward   y = act(x W1^T + b1) W2^T + b2   one dense pass, on th
       backward  G = dL/dth                       as for a dense FFN
                 dL/da_i = sum over the tensors of <G, th_i>
                 dL/dth_i = a_i G                 rank one over experts, never stored:
                                                  one G and N numbers (exf_expert_grad)
       merge     th* = sum_i a_i th_i, once       the FFN is then dense

   The merge identity: evaluation and merge run the same fuse kernel with the same
   weights, so merged logits equal evaluation logits bit for bit; the merged model has the
   dense parameter count and no expert tensor. Fusing parameters is not averaging the
   experts' outputs: two matrices and an activation give cross terms.

       variant         a in training                       a in evaluation and merge
       EXF_SW          1/N                                 1/N
       EXF_DW raw      learnable, 1/N at the start         a
       EXF_DW softmax  softmax(z / tau), z learnable       softmax(z / tau)
       EXF_MB          mu M + (1 - mu) r, then M <- a      the bank M (N)
       EXF_MB routed   r; M <- mu M + (1 - mu) r           the bank M

       u = mean over all rows of the FFN's input           (d), a constant unless attach
       r = softmax((R u + c) / tau)                        R (N,d), c (N), the router
       dL/dl_i = (1 - mu) r_i / tau <G, th_i - sum_j r_j th_j>,  l = R u + c
                                                           routed: without (1 - mu)

   M starts at 1/N and moves once per exf_optim_step, never in evaluation. As a = M after
   the update, mb has no merge gap; routed has one, and exf_routing_set measures it. With
   K micro-batches all see the same M; the router's gradient is exact, experts get the
   mean weight times the sum of the K gradients (exact for sw and dw, an approximation
   for mb), and then M <- the mean weights. z, a, R, c and M take no weight decay.

   In a causal language model the mean over rows sees later positions and other sequences
   of the batch. mb's weights leak a few bits per step of them into training, none after
   the merge: judge a model by its merged loss, never by its training loss.

   Upcycling, th_0 -> experts (exf_ffn_upcycle, exf_model_upcycle):
       zerosum            th_0 + s (e_i - mean e), e_i fresh draws. The fused set is th_0
                          to rounding: the default for a trained or loaded th_0
       independent        fresh draws times sqrt(N): the fused set has the dense init's
                          distribution; the default from scratch
       independent-plain  fresh draws: the fused set starts 1/sqrt(N) smaller
       copy               N copies, which never separate
       drop               copies; a share of hidden units (row of W1, b1, column of W2)
                          drawn afresh per expert
   One can merge at any step, go on training dense, and upcycle again.

   Cost: training holds N times the FFN parameters and N times their optimizer moments;
   the merged model is exactly dense. One pair of moments per FFN is left by
   exf_optim_desc.shared_moments, one set of everything by exf_fusion_desc.lean (sw).
   Beside the FFN's 3 P T multiply-adds (P parameters) fuse and <G, th_i> take 2 N P,
   2N/(3T) of it. They are bound by memory: per dense FFN parameter fuse moves N+1
   floats, the dots N+1, AdamW 6N+1, with shared moments 2N+5.

   ---- WHAT THE ALGEBRA SAYS -------------------------------------------- >>algebra

   1. Adam divides the scale out. For constant positive a every expert takes the same
      step whatever a_i is, up to eps, which acts as eps / a_i. So sw under AdamW is dense
      AdamW from the experts' mean with N eps, for ever; under SGD it is dense SGD at lr/N
      with N times the coupled decay. sw is a control, not a gain; the mean alone, which
      exf_fusion_desc.lean stores, trains the same.
   2. Differences between experts only shrink, by prod_t (1 - lr_t wd), unless a changes
      quickly. exf_expert_decay predicts the factor: 0.90 for charlm's defaults.
   3. Identical copies with equal weights get identical gradients and stay identical.
   4. Raw dw also learns a free scale, sum_i a_i, which under Adam acts as a larger
      learning rate. At a small rate that looks like a gain of the method. The fair
      controls are dense with one learned scalar per FFN (dw raw, N = 1) and dense with
      its rate tuned, which takes the gain back. Compare tuned runs, over seeds.
      Under gradient flow raw weights conserve a_i^2 - ||th_i||^2.
   5. Clipping must see the fused norm, each FFN by its G. Over all experts' gradients an
      FFN counts as ||a|| ||G||: sqrt(N) less with sw (exf_optim_desc.expert_norm).
   6. mb's mean routing makes r nearly constant from batch to batch.
   7. N = 1: sw, dw softmax and mb are dense bit for bit; dw raw adds a learned scalar.
   exf_notices says which of these a configuration runs into. Related: the keys' third of
   an attention bias (c_attn.bias) has gradient zero, as softmax does not see a shift of
   all scores of a row. Only rounding noise moves it: leave it out of comparisons.

   ---- LIFETIMES -------------------------------------------------------- >>lifetimes

   Step: what ops and exf_tensor_new return, with the gradients of such tensors, lives
   until exf_rewind, which hands the same memory to the next step. Reading such a pointer
   later is not detected. After the second step of equal shapes nothing is allocated.
   Model: parameters, their gradients and layers live until exf_model_free. A parameter's
   gradient counts from exf_backward to exf_optim_step, which uses it up; further
   backward passes before that add to it (gradient accumulation). exf_backward uses up
   the tape, and with it every graph recorded so far: one call per forward pass.
   Upcycling and merging an FFN end the life of its parameters: every exf_param and
   exf_tensor pointer to them, their gradients and moments, and graphs that hold them:
   call exf_rewind first. exf_ffn, exf_block and all other parameters stay. Make the
   optimizer anew: all its moments restart at zero. An exf_ema goes on, as it averages
   dense shapes.
   Ids and labels are copied. An exf_custom_desc's user data must live until backward.
   Free optimizers, averages and caches before their model, everything before its context.

   ---- ERRORS ----------------------------------------------------------- >>errors

   A context keeps the first error, and nothing is computed after it. A failed call
   returns NULL or a status; NULL given to an op is passed on, and exf_item(NULL) is NaN.
   So build, run, and check once per step. The message is one line that names the thing,
   the rule and often the remedy:

    #include <stdio.h>
    #define EXFUSION_IMPLEMENTATION
    #include "exfusion.h"

    int main(void) {
      exf_ctx *ctx = exf_ctx_new(NULL);
      exf_tensor *a = exf_tensor_new(ctx, exf_shape2(2, 3), NULL);
      exf_tensor *b = exf_matmul(ctx, a, a, 0, 0);        // (2,3) (2,3): refused
      exf_tensor *c = exf_softmax(ctx, exf_add(ctx, b, a));
      printf("%d\n", c == NULL);                          // -> 1
      printf("%s\n", exf_status_name(exf_ctx_status(ctx)));  // -> EXF_SHAPE
      // -> matmul: (2,3) and (2,3): the inner axes differ
      printf("%s\n", exf_error(ctx));
      exf_error_clear(ctx);                               // and it can be used again
      exf_rewind(ctx);
      exf_ctx_free(ctx);
      return 0;
    }

   A loss that is not finite is EXF_NUMERIC and names the op it came from; gradients that
   are not finite are EXF_NUMERIC in exf_optim_step, and nothing was updated. Memory that
   runs out is EXF_MEMORY. Saving leaves the old file or the new one. Loading checks all
   names and shapes before it changes a number.

   ---- THREADS AND DETERMINISM ------------------------------------------ >>threads

   One context per thread; inside, OpenMP splits large ops over exf_desc.n_threads, unless
   that turns out slower than one thread, as on a busy machine. What is split is always an
   output, never a sum, and sums have a fixed order. So the bits do not depend on the
   number of threads, and not on AVX2, AVX-512, NEON or the reference kernels. SSE2,
   which has no fused multiply-add, EXF_DOUBLE, 32-bit x86 by GCC without -msse2
   -mfpmath=sse, and Clang with -ffp-contract=fast have bits of their own.
   exp, log, tanh and erf are ours; from libm only sqrt reaches a weight.
   Random numbers are a function of (seed, stream, step, index), with streams named after
   parameters: evaluation, logging, resuming and threads cannot disturb training.
   A merged or dense model is read-only in evaluation: several threads may run it at once,
   each with its own context, exf_grad_set(ctx, 0) and training mode off. So may an
   unmerged one, while no thread trains it, merges it or upcycles it.

   ---- OPTIONS ---------------------------------------------------------- >>options

   Define before the include. "All": the same in every file that includes the header;
   "one": only where EXFUSION_IMPLEMENTATION is.

   macro                    default        effect                                  where
   EXFUSION_IMPLEMENTATION  -              compiles the library here               one
   EXF_STATIC               -              all functions static                    one
   EXF_API                  extern         before every function (dllexport ...)   all
   EXF_DOUBLE               float          exf_real is double; reference kernels,  all
                                           files in F64: for checking gradients
   EXF_NO_SIMD              fast kernels   reference kernels only                  one
   EXF_NO_OPENMP            as compiler    one thread, even with -fopenmp          one
   EXF_NO_STDIO             system's files no file functions: give exf_desc.files  one
   EXF_ALLOW_FAST_MATH      refused        accepts -ffast-math; bits are not       one
                                           reproducible then
   EXF_HEADER_NAME          "exfusion.h"   the name of this file, which includes   one
                                           itself for each instruction set

   ---- FILE FORMAT ------------------------------------------------------ >>format

   safetensors: 8 bytes N, unsigned little-endian; N bytes of JSON, padded with blanks
   to a multiple of 8; then the numbers, row-major, little-endian, without gaps.

       {"__metadata__":{"format":"pt"},"line.bias":{"dtype":"F32","shape":[1],
        "data_offsets":[0,4]},"line.weight":{"dtype":"F32","shape":[1,1], ...

   Metadata keys and, within a type, tensors are sorted, so equal models give equal files.
   Every reading rule stands in >>safetensors.
   exf_model_save writes the merged, dense model: parameters under their names, aliases
   (a tied lm_head.weight) as tensors of their own. exf_checkpoint_save writes what
   training needs; with F the name of an FFN (transformer.h.0.mlp) and the layer c_fc:

       NAME                           parameters outside FFNs, each once
       adamw.m.NAME, adamw.v.NAME     moments (sgd.m.NAME: momentum); shared: without N
       F.experts.c_fc.weight          [N,h,d]; .bias [N,h]; c_proj likewise
       F.fusion.weight                [N]   dw: a, or z
       F.router.weight, .bias         [N,d], [N]   mb
       F.bank                         [N]   mb: M
       metadata exf.updates           updates made, for Adam's bias correction
       metadata exf.fusion            the FFNs, in order: 12 x dw softmax 4, 1 x dense

   Other metadata are the program's. charlm writes exf.version, exf.task, exf.seed,
   exf.step, exf.vocab (a JSON list of byte values) and exf.config: in a model its
   geometry (n_layer, n_head, n_embd, block_size, vocab_size, bias, activation) as a JSON
   text, in a checkpoint the flags of the run, with exf.data, size and hash of the data.

   ---- HOW TO ADD AN OP ------------------------------------------------- >>add_op

   For research exf_custom may be enough. An op of the library takes six steps:
   1. A row X(FOO, "foo") in EXF__OPS, >>table. Enum, name and dispatch expand from it.
   2. exf__FOO_shape(ctx, n, out): checks n->in[i]->shape and n->arg; writes *out and
      returns 1, or returns exf__bad_shape(ctx, n, "the rule").
   3. exf__FOO_forward(ctx, n): fills all of n->out->data. What backward cannot cheaply
      recompute goes to n->saved, from exf__arena.
   4. exf__FOO_backward(ctx, n), beside it: for each input, g = exf__grad(ctx, n->in[i],
      &acc); NULL means not wanted; acc means add to g, otherwise overwrite it. The
      gradient of the result is exf__dout(n).
   5. exf_foo: declared in >>ops with its formula, defined in >>op_api through exf__run1,
      exf__run2, or exf__run with the op's scalars in exf__args.
   6. recipe_FOO in tests/test_ops.c: P makes parameters, W adds a result to the loss. The
      tests do not compile without it. */
/* ==== B. PUBLIC API ======================================================== >>api */
#ifndef EXFUSION_H
#define EXFUSION_H

#define EXF_VERSION_MAJOR 0
#define EXF_VERSION_MINOR 1
#define EXF_VERSION_PATCH 0
#define EXF_VERSION "0.1.0"

#include <stddef.h>
#include <stdint.h>

#ifndef EXF_API
#if defined(EXF_STATIC) && defined(__GNUC__)
#define EXF_API static __attribute__((unused))
#elif defined(EXF_STATIC)
#define EXF_API static
#else
#define EXF_API extern
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Every number of a tensor. EXF_DOUBLE turns the whole library to double. */
#ifdef EXF_DOUBLE
typedef double exf_real;
#else
typedef float exf_real;
#endif

/* ---- status ------------------------------------------------------- >>status */

/* What went wrong. A context keeps the FIRST error; the message of exf_error names
   the thing, the rule and what to do, in one line. */
#define EXF_STATUS_LIST(X)                                                              \
  X(OK,       "no error")                                                               \
  X(ARG,      "an argument is out of its range")                                        \
  X(SHAPE,    "shapes that do not fit together")                                        \
  X(SIZE,     "a size that does not fit into size_t")                                   \
  X(MEMORY,   "the allocator returned NULL")                                            \
  X(STATE,    "a call in the wrong order")                                              \
  X(NUMERIC,  "a NaN or an infinity")                                                   \
  X(IO,       "a file could not be opened, read, written or renamed")                   \
  X(FORMAT,   "a file breaks a rule of its format")                                     \
  X(LIMIT,    "a file is legal but larger than this library reads")                     \
  X(MISMATCH, "a sound file that belongs to another model")
typedef enum exf_status {
#define EXF__X(name, text) EXF_##name,
  EXF_STATUS_LIST(EXF__X)
#undef EXF__X
  EXF_N_STATUS
} exf_status;
EXF_API const char *exf_status_name(exf_status status); /* "EXF_SHAPE" ... */

/* ---- context ----------------------------------------------------- >>context */

/* Instruction sets of the fast kernels. EXF_ISA_REF are the plain loops that specify
   them; all but SSE2 (which has no fused multiply-add) give the same bits. */
typedef enum exf_isa {
  EXF_ISA_AUTO, EXF_ISA_REF, EXF_ISA_SSE2, EXF_ISA_AVX2, EXF_ISA_AVX512, EXF_ISA_NEON
} exf_isa;

/* File access, replaceable to sandbox the library or to inject faults. Functions return
   0 (or a count) on success and a negative number on failure, and may leave a cause in
   errno. A handle is whatever open returns; NULL is failure. */
typedef struct exf_files {
  void *user;
  void *(*open)(void *user, const char *path, int write); /* write: create or truncate */
  int64_t (*size)(void *user, void *file);
  int64_t (*read)(void *user, void *file, void *data, size_t bytes);  /* may be short */
  int64_t (*write)(void *user, void *file, const void *data, size_t bytes);
  int (*sync)(void *user, void *file);                     /* flush to the device */
  int (*close)(void *user, void *file);                    /* always frees the handle */
  int (*rename)(void *user, const char *from, const char *to); /* atomic, replaces */
  int (*remove)(void *user, const char *path);
  int (*sync_dir)(void *user, const char *path); /* the folder that holds path */
} exf_files;

/* All members zero is a good context. */
typedef struct exf_desc {
  uint64_t seed;     /* key of every random number */
  int n_threads;     /* OpenMP threads; 0: as many as there are processors */
  exf_isa isa;       /* EXF_ISA_AUTO: the best this processor has */
  void *(*alloc)(void *user, size_t bytes);     /* both are given, or neither: */
  void (*free)(void *user, void *block);        /* then malloc and free */
  void *alloc_user;
  void (*log)(void *user, const char *line);    /* receives notices; NULL: none */
  void *log_user;
  const exf_files *files;                       /* NULL: the operating system's */
} exf_desc;

typedef struct exf_ctx exf_ctx;

typedef struct exf_stats {
  size_t n_allocs;       /* calls of the allocator so far */
  size_t bytes;          /* held now */
  size_t bytes_peak;
  size_t arena_peak;     /* most bytes one step has used */
  size_t n_ops;          /* ops run so far */
} exf_stats;

/* One context per thread: it holds the error, the tape, the step arena and the random
   state. NULL desc means all defaults; returns NULL when memory runs out. */
EXF_API exf_ctx *exf_ctx_new(const exf_desc *desc);
EXF_API void exf_ctx_free(exf_ctx *ctx);          /* NULL is fine; free models first */
EXF_API exf_status exf_ctx_status(const exf_ctx *ctx); /* of the first error, or EXF_OK */
EXF_API const char *exf_error(const exf_ctx *ctx);     /* its message, or "" */
EXF_API void exf_error_clear(exf_ctx *ctx);
EXF_API exf_status exf_fail(exf_ctx *ctx, exf_status status, const char *format, ...);
EXF_API exf_stats exf_ctx_stats(const exf_ctx *ctx);
EXF_API exf_status exf_isa_set(exf_ctx *ctx, exf_isa isa); /* EXF_ARG: not on this CPU */
EXF_API exf_isa exf_isa_get(const exf_ctx *ctx);
EXF_API const char *exf_isa_name(exf_isa isa);    /* "avx2" ... */
EXF_API int exf_threads_get(const exf_ctx *ctx);
EXF_API uint64_t exf_seed_get(const exf_ctx *ctx);

/* Training mode: dropout is active and memory-bank FFNs ask their router. Off at first.
   Returns what it was. */
EXF_API int exf_training_set(exf_ctx *ctx, int on);
/* Recording on the tape; off is the no-grad scope (inference without a tape). On at
   first. Returns what it was, to be given back at the end of the scope. */
EXF_API int exf_grad_set(exf_ctx *ctx, int on);
/* Evaluation asks the routers too, instead of the banks (to measure the merge gap of
   routed FFNs). Off at first. Returns what it was. */
EXF_API int exf_routing_set(exf_ctx *ctx, int on);
/* Optimizer step `step` begins: random draws are keyed by (seed, stream, step, index). */
EXF_API void exf_step_begin(exf_ctx *ctx, uint64_t step);
/* Ends the life of every tensor made by an op or by exf_tensor_new, and empties the
   tape. Parameters and their gradients stay. */
EXF_API void exf_rewind(exf_ctx *ctx);

/* ---- random numbers ------------------------------------------------- >>rng */

/* Counter-based (Philox4x32-10): a pure function of its arguments. */
EXF_API uint32_t exf_rng_u32(uint64_t seed, uint32_t stream, uint32_t step,
                             uint64_t index);
EXF_API double exf_rng_uniform(uint64_t seed, uint32_t stream, uint32_t step,
                               uint64_t index);               /* in [0, 1) */
EXF_API double exf_rng_normal(uint64_t seed, uint32_t stream, uint32_t step,
                              uint64_t index);                /* mean 0, deviation 1 */
EXF_API uint32_t exf_rng_stream(const char *name); /* a stream number by name */

/* ---- tensors -------------------------------------------------------- >>tensor */

#define EXF_MAX_DIMS 6
typedef struct exf_shape {
  int n;                     /* number of axes; 0 is a scalar */
  size_t dim[EXF_MAX_DIMS];
} exf_shape;
EXF_API exf_shape exf_shape0(void);
EXF_API exf_shape exf_shape1(size_t a);
EXF_API exf_shape exf_shape2(size_t a, size_t b);
EXF_API exf_shape exf_shape3(size_t a, size_t b, size_t c);
EXF_API exf_shape exf_shape4(size_t a, size_t b, size_t c, size_t d);
EXF_API exf_shape exf_shape5(size_t a, size_t b, size_t c, size_t d, size_t e);

/* Row-major and contiguous, always. Made by exf_tensor_new, by ops (both live until
   exf_rewind) or inside a parameter (lives as long as its model). */
typedef struct exf_tensor {
  exf_real *data;            /* (shape) */
  exf_real *grad;            /* (shape) after exf_backward; of the experts of an FFN: G
                                (shape without the first axis). To be read: several
                                tensors may share it. A parameter's counts until
                                exf_optim_step or exf_model_zero_grad */
  exf_shape shape;
  size_t size;               /* number of elements */
  unsigned flags;            /* private, as all below */
  struct exf__node *node;    /* the op that made it; NULL for a leaf */
  struct exf__gbuf *gbuf;    /* where its gradient is being gathered */
  struct exf_param *param;   /* the parameter it belongs to, or NULL */
} exf_tensor;

/* A constant leaf of the given shape: a copy of data, or zeros for NULL. */
EXF_API exf_tensor *exf_tensor_new(exf_ctx *ctx, exf_shape shape, const exf_real *data);
/* Asks for the gradient of a leaf, or keeps that of an op's result (which backward
   otherwise drops as soon as it is used up). Call before exf_backward. Returns x. */
EXF_API exf_tensor *exf_grad_keep(exf_ctx *ctx, exf_tensor *x);
/* The one number of a tensor of size 1; NaN when x is NULL. */
EXF_API double exf_item(const exf_tensor *x);

/* ---- ops --------------------------------------------------------------- >>ops */
/* Each checks its shapes, computes at once, and records itself when an input needs a
   gradient. NULL in, NULL out, and the context keeps the first error: build a whole
   model and check once. */

/* Elementwise with NumPy's broadcasting. */
EXF_API exf_tensor *exf_add(exf_ctx *ctx, exf_tensor *a, exf_tensor *b);  /* a + b */
EXF_API exf_tensor *exf_sub(exf_ctx *ctx, exf_tensor *a, exf_tensor *b);  /* a - b */
EXF_API exf_tensor *exf_mul(exf_ctx *ctx, exf_tensor *a, exf_tensor *b);  /* a * b */
EXF_API exf_tensor *exf_div(exf_ctx *ctx, exf_tensor *a, exf_tensor *b);  /* a / b */
EXF_API exf_tensor *exf_scale(exf_ctx *ctx, exf_tensor *x, double s);     /* s x */
EXF_API exf_tensor *exf_neg(exf_ctx *ctx, exf_tensor *x);                 /* -x */
EXF_API exf_tensor *exf_exp(exf_ctx *ctx, exf_tensor *x);
EXF_API exf_tensor *exf_log(exf_ctx *ctx, exf_tensor *x);
EXF_API exf_tensor *exf_tanh(exf_ctx *ctx, exf_tensor *x);
EXF_API exf_tensor *exf_sqrt(exf_ctx *ctx, exf_tensor *x);
EXF_API exf_tensor *exf_square(exf_ctx *ctx, exf_tensor *x);
EXF_API exf_tensor *exf_relu(exf_ctx *ctx, exf_tensor *x);       /* max(x, 0) */
EXF_API exf_tensor *exf_gelu(exf_ctx *ctx, exf_tensor *x);       /* x Phi(x), by erf */
EXF_API exf_tensor *exf_gelu_tanh(exf_ctx *ctx, exf_tensor *x);  /* GPT-2's form */
EXF_API exf_tensor *exf_silu(exf_ctx *ctx, exf_tensor *x);       /* x / (1 + exp(-x)) */

/* a (..,m,k) b (..,k,n) -> (..,m,n); ta, tb: that side is given transposed. The leading
   axes are equal, or one side has none. */
EXF_API exf_tensor *exf_matmul(exf_ctx *ctx, exf_tensor *a, exf_tensor *b, int ta,
                               int tb);
/* x (..,in), w (out,in), b (out) or NULL -> x w^T + b (..,out) */
EXF_API exf_tensor *exf_linear(exf_ctx *ctx, exf_tensor *x, exf_tensor *w,
                               exf_tensor *b);

/* Over the last axis. A row without a finite entry (all -inf) gives zeros. */
EXF_API exf_tensor *exf_softmax(exf_ctx *ctx, exf_tensor *x);
EXF_API exf_tensor *exf_log_softmax(exf_ctx *ctx, exf_tensor *x);
/* (x - mean) / sqrt(var + eps) w + b over the last axis; w, b (last); b may be NULL */
EXF_API exf_tensor *exf_layernorm(exf_ctx *ctx, exf_tensor *x, exf_tensor *w,
                                  exf_tensor *b, double eps);
/* x / sqrt(mean x^2 + eps) w over the last axis; w (last) */
EXF_API exf_tensor *exf_rmsnorm(exf_ctx *ctx, exf_tensor *x, exf_tensor *w, double eps);

/* Rows of table (V,C) by ids (n0,n1), copied -> (n0,n1,C); n1 = 0: ids (n0) -> (n0,C),
   so that an empty batch of rows is (0,n1) */
EXF_API exf_tensor *exf_embedding(exf_ctx *ctx, exf_tensor *table, const int32_t *ids,
                                  size_t n0, size_t n1);
/* Training mode: zero with probability p, else x / (1 - p). Evaluation: x itself. */
EXF_API exf_tensor *exf_dropout(exf_ctx *ctx, exf_tensor *x, double p);
/* The same for whole samples, the first axis (stochastic depth, Huang et al. 2016). */
EXF_API exf_tensor *exf_drop_path(exf_ctx *ctx, exf_tensor *x, double p);

EXF_API exf_tensor *exf_reshape(exf_ctx *ctx, exf_tensor *x, exf_shape s); /* a view */
EXF_API exf_tensor *exf_permute(exf_ctx *ctx, exf_tensor *x, const int *axes);
EXF_API exf_tensor *exf_concat(exf_ctx *ctx, exf_tensor *const *x, int n, int axis);
EXF_API exf_tensor *exf_slice(exf_ctx *ctx, exf_tensor *x, int axis, size_t begin,
                              size_t end);
#define EXF_AXIS(i) (1u << (i))
#define EXF_ALL_AXES (~0u)
/* Over the axes whose bits are set; they vanish, or stay with size 1 (keep). */
EXF_API exf_tensor *exf_sum(exf_ctx *ctx, exf_tensor *x, unsigned axes, int keep);
EXF_API exf_tensor *exf_mean(exf_ctx *ctx, exf_tensor *x, unsigned axes, int keep);

/* Mean over the rows with label >= 0 of -sum_v q_v log softmax(logits)_v, with
   q = (1 - s) onehot(label) + s / V, s = label_smoothing. logits (..,V), one label per
   row, copied; negative labels are ignored; none left gives 0. -> scalar */
EXF_API exf_tensor *exf_cross_entropy(exf_ctx *ctx, exf_tensor *logits,
                                      const int32_t *labels, double label_smoothing);
/* Multi-head self-attention. qkv (B,T,3C) = [Q | K | V], head h = columns
   h C/H .. (h+1) C/H - 1 of each -> softmax(Q K^T / sqrt(C/H)) V, heads side by side
   (B,T,C). causal: position t sees 0..t. Keeps two numbers per row for backward, never a
   (T,T) matrix. */
EXF_API exf_tensor *exf_attention(exf_ctx *ctx, exf_tensor *qkv, size_t n_heads,
                                  int causal);
/* th = sum_i a_i E_i: a (N), E (N, ..) -> (..). When E is the expert set of an FFN its
   gradient stays virtual (rank one: a_i G), see exf_expert_grad. */
EXF_API exf_tensor *exf_fuse(exf_ctx *ctx, exf_tensor *a, exf_tensor *experts);

EXF_API exf_tensor *exf_detach(exf_ctx *ctx, exf_tensor *x); /* a view, a constant */

/* An op of your own. forward fills out (shape out). backward ADDS to din[i] (shape of
   input i), which is NULL for an input that needs no gradient. */
typedef struct exf_custom_desc {
  const char *name;
  exf_shape out;
  void (*forward)(void *user, const exf_tensor *const *in, exf_real *out);
  void (*backward)(void *user, const exf_tensor *const *in, const exf_tensor *out,
                   const exf_real *dout, exf_real *const *din);
  void *user;
} exf_custom_desc;
#define EXF_MAX_INPUTS 8
EXF_API exf_tensor *exf_custom(exf_ctx *ctx, const exf_custom_desc *desc,
                               exf_tensor *const *in, int n);

/* ---- gradients -------------------------------------------------------- >>grad */

/* Gradients of a scalar: added to what the parameters already hold (gradient
   accumulation). A loss that is NaN or infinite is EXF_NUMERIC and names the op it came
   from. Uses up the tape, with all other graphs on it. A failure on the way drops all
   gradients the models had gathered: begin the accumulation again. */
EXF_API exf_status exf_backward(exf_ctx *ctx, exf_tensor *loss);

/* ---- models: registries of parameters -------------------------------- >>model */

typedef struct exf_model exf_model;
typedef struct exf_param exf_param;

typedef struct exf_param_desc {
  exf_shape shape;
  double init_std;      /* normal with this deviation; 0: the constant init_value */
  double init_value;
  int decay;            /* weight decay applies (matrices and embeddings) */
} exf_param_desc;

EXF_API exf_model *exf_model_new(exf_ctx *ctx);
EXF_API void exf_model_free(exf_model *model);
EXF_API exf_ctx *exf_model_ctx(const exf_model *model);
/* A named parameter, initialised from the stream of its name. The tensor lives as long
   as the model (that of an FFN: until it is upcycled or merged). */
EXF_API exf_tensor *exf_param_new(exf_model *model, const char *name,
                                  const exf_param_desc *desc);
/* A second name under which merged files also hold a parameter (a tied head). */
EXF_API exf_status exf_param_alias(exf_model *model, const char *alias,
                                   const char *name);
EXF_API size_t exf_model_n_params(const exf_model *model);       /* tensors */
EXF_API exf_param *exf_model_param(const exf_model *model, size_t i);
EXF_API exf_param *exf_model_find(const exf_model *model, const char *name);
EXF_API const char *exf_param_name(const exf_param *param);
/* The experts of an FFN (N, ..) are for exf_fuse, or to be detached: other ops refuse
   them while gradients are on. */
EXF_API exf_tensor *exf_param_tensor(exf_param *param);
EXF_API int exf_param_decays(const exf_param *param);
EXF_API void exf_param_freeze(exf_param *param, int frozen); /* no gradient, no update */
/* Numbers, frozen ones too: of the model as it is (experts, weights and router included,
   banks not), and of the merged, dense model. */
EXF_API size_t exf_model_count(const exf_model *model);
EXF_API size_t exf_model_count_merged(const exf_model *model);
EXF_API void exf_model_zero_grad(exf_model *model);  /* drops gathered gradients */
/* The gradient of all experts (N, ..), a_i G, written to out; of any other parameter
   its plain gradient. EXF_STATE when there is none. */
EXF_API exf_status exf_expert_grad(exf_param *param, exf_real *out);

typedef struct exf_gradcheck_report {
  double worst;              /* max |analytic - numeric| / max |numeric|, per tensor */
  double worst_relative;     /* |analytic - numeric| / max(|g|, a thousandth of max) */
  double largest;            /* the smallest over tensors of max |numeric| */
  size_t n_checked;
  char where[128];           /* parameter and index of the worst */
} exf_gradcheck_report;
/* Compares backward with four-point central differences of width h (0: 1e-3, or 1e-2 in
   float) for every number of every parameter. loss builds the graph and returns a
   scalar; it is called again and again, between rewinds. */
EXF_API exf_status exf_gradcheck(exf_model *model,
                                 exf_tensor *(*loss)(exf_ctx *ctx, void *user),
                                 void *user, double h, exf_gradcheck_report *report);

/* ---- modules --------------------------------------------------------- >>modules */
/* Layers own parameters named "<name>.weight" and so on, and live as long as their
   model. Where a descriptor's member is zero the default in its comment holds. */

typedef struct exf_linear_layer {
  exf_tensor *weight;   /* (out,in) */
  exf_tensor *bias;     /* (out) or NULL */
} exf_linear_layer;
/* init_std 0: 1/sqrt(in) */
EXF_API exf_linear_layer *exf_linear_new(exf_model *model, const char *name, size_t in,
                                         size_t out, int bias, double init_std);
EXF_API exf_tensor *exf_linear_forward(exf_ctx *ctx, const exf_linear_layer *layer,
                                       exf_tensor *x);

typedef struct exf_norm_layer {
  exf_tensor *weight, *bias;  /* (width), bias may be NULL */
  double eps;
  int rms;
} exf_norm_layer;
EXF_API exf_norm_layer *exf_layernorm_new(exf_model *model, const char *name,
                                          size_t width, int bias, double eps);
EXF_API exf_norm_layer *exf_rmsnorm_new(exf_model *model, const char *name, size_t width,
                                        double eps);
EXF_API exf_tensor *exf_norm_forward(exf_ctx *ctx, const exf_norm_layer *layer,
                                     exf_tensor *x);

/* "<name>.weight" (n,width) */
EXF_API exf_tensor *exf_embedding_new(exf_model *model, const char *name, size_t n,
                                      size_t width, double init_std);

/* ---- ExFusion ------------------------------------------------------- >>exfusion */

typedef enum exf_variant { EXF_DENSE, EXF_SW, EXF_DW, EXF_MB } exf_variant;
typedef enum exf_upcycle {
  EXF_UP_DEFAULT,            /* independent from scratch, else zerosum */
  EXF_UP_ZEROSUM,            /* th_0 + s (e_i - mean e): function preserving */
  EXF_UP_INDEPENDENT,        /* fresh draws times sqrt(N) */
  EXF_UP_INDEPENDENT_PLAIN,  /* fresh draws */
  EXF_UP_COPY,               /* N copies: they never separate */
  EXF_UP_DROP                /* copies; a fraction of hidden units drawn afresh */
} exf_upcycle;
typedef struct exf_fusion_desc {
  exf_variant variant;
  size_t n_experts;          /* N; 0: 4 */
  size_t lean;               /* sw: 1: only the experts' mean is stored and trained, with
                                1/N of its gradient: exact, see >>algebra. Resolved:
                                lean is N, and n_experts, what is stored, is 1 */
  int dw_softmax;            /* dw: a = softmax(z / tau) instead of a itself */
  int routed;                /* mb: the forward pass uses the router alone */
  int attach;                /* mb: let the router's gradient reach x as well */
  double mu;                 /* mb: bank momentum; 0: 0.95; negative: 0 */
  double tau;                /* temperature; 0: 1 */
  exf_upcycle upcycle;
  double spread;             /* zerosum: s; 0: 1 */
  double drop;               /* drop: the fraction; 0: 0.5 */
} exf_fusion_desc;

typedef enum exf_act {
  EXF_GELU, EXF_GELU_TANH, EXF_RELU, EXF_SILU,
  EXF_SWIGLU /* silu(x Wg^T + bg) * (x W1^T + b1): a third matrix */
} exf_act;
EXF_API const char *exf_variant_name(exf_variant v);
EXF_API const char *exf_upcycle_name(exf_upcycle u);
EXF_API const char *exf_act_name(exf_act a);

typedef struct exf_ffn_desc {
  size_t width, hidden;       /* C; hidden 0: 4 C */
  exf_act act;
  int bias;
  double init_std;            /* of W1 (and Wg); 0: 1/sqrt(width) */
  double init_std_out;        /* of W2; 0: 1/sqrt(hidden) */
  const char *up, *down, *gate; /* names; NULL: "c_fc", "c_proj", "c_gate" */
  exf_fusion_desc fusion;     /* all zero: an ordinary dense FFN */
} exf_ffn_desc;

typedef struct exf_ffn exf_ffn;
EXF_API exf_ffn *exf_ffn_new(exf_model *model, const char *name,
                             const exf_ffn_desc *desc);
/* x (..,C) -> act(x W1^T + b1) W2^T + b2 (..,C) on the fused parameters */
EXF_API exf_tensor *exf_ffn_forward(exf_ctx *ctx, const exf_ffn *ffn, exf_tensor *x);
/* To sw, dw or mb; of dense FFNs: one with experts is to be merged first. */
EXF_API exf_status exf_ffn_upcycle(exf_ffn *ffn, const exf_fusion_desc *desc);
EXF_API exf_status exf_ffn_merge(exf_ffn *ffn);     /* for good; a dense FFN: nothing */
EXF_API exf_status exf_model_upcycle(exf_model *model, const exf_fusion_desc *desc);
EXF_API exf_status exf_model_merge(exf_model *model);
EXF_API size_t exf_model_n_ffns(const exf_model *model);
EXF_API exf_ffn *exf_model_ffn(const exf_model *model, size_t i);
EXF_API const char *exf_ffn_name(const exf_ffn *ffn);
EXF_API exf_fusion_desc exf_ffn_fusion(const exf_ffn *ffn); /* resolved defaults */
/* What is known of an FFN's fusion; each output (N) may be NULL. weights: those of
   evaluation and merge. router: the last training output r (mb). diversity:
   ||th_i - th|| / ||th||. Returns the effective number of experts
   (sum |a|)^2 / sum a^2; 1 for a dense FFN. */
EXF_API double exf_ffn_diagnose(const exf_ffn *ffn, double *weights, double *router,
                                double *diversity);

/* ---- attention layer, block, generation ----------------------------- >>block */

typedef struct exf_attn_layer {
  exf_linear_layer *qkv, *proj;  /* (3C,C), (C,C) */
  size_t n_heads;
  int causal;
} exf_attn_layer;
typedef enum exf_names { EXF_NAMES_GPT2, EXF_NAMES_TIMM } exf_names;

typedef struct exf_block_desc {
  size_t width, n_heads;
  int causal, bias;
  double eps;            /* LayerNorm; 0: 1e-5 */
  double dropout;        /* after attention's and the FFN's projection */
  double drop_path;      /* of both residual branches, per sample */
  double init_std;       /* 0: 0.02 */
  double init_std_out;   /* residual projections; 0: init_std */
  exf_names names;       /* ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj, or
                            norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2 */
  exf_ffn_desc ffn;      /* width, bias, init and names are taken from the block */
} exf_block_desc;
typedef struct exf_block {
  exf_norm_layer *norm1, *norm2;
  exf_attn_layer *attn;
  exf_ffn *ffn;
  double dropout, drop_path;
} exf_block;
EXF_API exf_attn_layer *exf_attn_new(exf_model *model, const char *qkv_name,
                                     const char *proj_name, size_t width,
                                     size_t n_heads, int causal, int bias,
                                     double init_std, double init_std_out);
EXF_API exf_tensor *exf_attn_forward(exf_ctx *ctx, const exf_attn_layer *layer,
                                     exf_tensor *x);
EXF_API exf_block *exf_block_new(exf_model *model, const char *name,
                                 const exf_block_desc *desc);
/* x = x + attn(norm1(x)); x = x + ffn(norm2(x)) : (B,T,C) -> (B,T,C) */
EXF_API exf_tensor *exf_block_forward(exf_ctx *ctx, const exf_block *block,
                                      exf_tensor *x);

/* Keys and values of the positions seen so far, for generation: one sequence, no-grad. */
typedef struct exf_kv exf_kv;
EXF_API exf_kv *exf_kv_new(exf_ctx *ctx, size_t n_layers, size_t capacity, size_t width);
EXF_API void exf_kv_free(exf_kv *kv);
EXF_API void exf_kv_reset(exf_kv *kv);
EXF_API size_t exf_kv_length(const exf_kv *kv);
/* qkv (1,t,3C) of t new positions, stored as positions length .. length+t-1 of layer
   -> their causal attention over all positions (1,t,C) */
EXF_API exf_tensor *exf_attention_cached(exf_ctx *ctx, exf_tensor *qkv, size_t n_heads,
                                         exf_kv *kv, size_t layer);
EXF_API exf_tensor *exf_block_cached(exf_ctx *ctx, const exf_block *block, exf_tensor *x,
                                     exf_kv *kv, size_t layer);
EXF_API void exf_kv_advance(exf_kv *kv, size_t t);  /* after the last layer, by its t */

/* ---- optimizers ------------------------------------------------------ >>optim */

typedef enum exf_optim_kind { EXF_ADAMW, EXF_SGD } exf_optim_kind;
typedef struct exf_optim_desc {
  exf_optim_kind kind;
  double beta1, beta2;   /* AdamW; 0: 0.9, 0.999; negative: 0 */
  double eps;            /* AdamW; 0: 1e-8, added outside the root */
  double momentum;       /* SGD */
  int nesterov;          /* SGD */
  double weight_decay;   /* on parameters that decay; AdamW: decoupled, SGD: coupled */
  double clip;           /* global norm; 0: no clipping */
  int expert_norm;       /* clip by the norm over all experts' gradients, ||a|| ||G|| for
                            an FFN, instead of the fused norm */
  int shared_moments;    /* AdamW: the N experts of an FFN share the moments of its G and
                            all take its step: (N+3) P numbers instead of 3 N P. Exact
                            for sw; for weights that change an approximation */
  int allow_nonfinite;   /* step even with NaN or infinity in the gradients */
} exf_optim_desc;
typedef struct exf_optim exf_optim;
/* Allocates the moments: a model has one optimizer at a time. Free it and make it anew
   after upcycling or merging; free it before the model. */
EXF_API exf_optim *exf_optim_new(exf_model *model, const exf_optim_desc *desc);
EXF_API void exf_optim_free(exf_optim *optim);
/* Parameters for which select returns nonzero take lr times lr_scale and this decay; a
   later group overrides an earlier one. */
EXF_API exf_status exf_optim_group(exf_optim *optim,
                                   int (*select)(const exf_param *param, void *user),
                                   void *user, double lr_scale, double weight_decay);
/* Norm -> clip by min(1, clip/(norm + 1e-6)) -> update -> banks M <- a. Uses up the
   gradients. norm: before clipping, without frozen parameters; may be NULL. Non-finite
   gradients: EXF_NUMERIC, nothing is changed. */
EXF_API exf_status exf_optim_step(exf_optim *optim, double lr, double *norm);
EXF_API uint64_t exf_optim_steps(const exf_optim *optim);    /* updates made */

typedef enum exf_schedule_kind {
  EXF_SCHEDULE_COSINE, EXF_SCHEDULE_LINEAR, EXF_SCHEDULE_CONSTANT
} exf_schedule_kind;
typedef struct exf_schedule {
  exf_schedule_kind kind;
  double lr, min_lr;
  uint64_t warmup, steps;
} exf_schedule;
/* lr (s+1)/(warmup+1) for s < warmup, then down to min_lr at s = steps */
EXF_API double exf_schedule_lr(const exf_schedule *schedule, uint64_t step);
/* prod_t (1 - lr_t wd): what AdamW leaves of the differences between experts */
EXF_API double exf_expert_decay(const exf_schedule *schedule, double weight_decay);
/* Notices of configurations that reduce to something simpler (N = 1, copies, sw under
   Adam ...), one line each through the context's log. Returns how many. */
EXF_API int exf_notices(const exf_model *model, const exf_optim *optim);

/* Exponential moving average of the fused, dense-shaped parameters. */
typedef struct exf_ema exf_ema;
EXF_API exf_ema *exf_ema_new(exf_model *model, double decay);
EXF_API void exf_ema_free(exf_ema *ema);
EXF_API exf_status exf_ema_update(exf_ema *ema);  /* e <- decay e + (1 - decay) th */
EXF_API exf_status exf_ema_copy_to(const exf_ema *ema, exf_model *dense);
EXF_API exf_status exf_ema_copy_from(exf_ema *ema, const exf_model *dense); /* resuming */

/* ---- safetensors and checkpoints ------------------------------------------ >>io */

typedef struct exf_pair { const char *key, *value; } exf_pair;   /* UTF-8 metadata */

typedef struct exf_st exf_st;     /* an open, fully validated safetensors file */
typedef struct exf_st_entry {
  const char *name;
  const char *dtype;              /* "F32" ... as in the file */
  int n_dims;
  const size_t *dim;              /* (n_dims), at most 16 */
  size_t bytes;
  const unsigned char *data;      /* little-endian, possibly unaligned */
} exf_st_entry;
/* Reads and checks every rule; NULL on failure. trailing (may be NULL: refuse): receives
   the number of bytes after the last tensor, which are then tolerated. */
EXF_API exf_st *exf_st_open(exf_ctx *ctx, const char *path, size_t *trailing);
EXF_API exf_st *exf_st_open_memory(exf_ctx *ctx, const void *data, size_t bytes,
                                   size_t *trailing);             /* copies data */
EXF_API void exf_st_close(exf_st *st);
EXF_API size_t exf_st_count(const exf_st *st);
/* By ascending name. */
EXF_API const exf_st_entry *exf_st_get(const exf_st *st, size_t i);
EXF_API const exf_st_entry *exf_st_find(const exf_st *st, const char *name); /* or NULL */
EXF_API const char *exf_st_meta(const exf_st *st, const char *key);  /* or NULL */
/* Converts F32, F64, F16, BF16 to exf_real; n must be the element count. */
EXF_API exf_status exf_st_read(exf_ctx *ctx, const exf_st_entry *entry, exf_real *out,
                               size_t n);
typedef struct exf_st_item {      /* one tensor to be written: F32, in EXF_DOUBLE F64 */
  const char *name;
  exf_shape shape;
  const exf_real *data;           /* (shape) */
} exf_st_item;
/* Temporary file in the same folder, flush, sync, rename, sync folder: path holds the
   old file or the new one, never a part. Byte-identical to the reference writer. */
EXF_API exf_status exf_st_save(exf_ctx *ctx, const char *path, const exf_st_item *items,
                               size_t n, const exf_pair *meta, size_t n_meta);
/* The same bytes into a block to be freed by exf_st_free_memory. */
EXF_API exf_status exf_st_save_memory(exf_ctx *ctx, const exf_st_item *items, size_t n,
                                      const exf_pair *meta, size_t n_meta,
                                      unsigned char **data, size_t *bytes);
EXF_API void exf_st_free_memory(exf_ctx *ctx, unsigned char *data);
/* Any file by the way of all savers: written to path.tmp, flushed, renamed. */
EXF_API exf_status exf_file_save(exf_ctx *ctx, const char *path, const void *data,
                                 size_t bytes);

/* The merged, dense model, fused on the way out: the model itself is unchanged. */
EXF_API exf_status exf_model_save(exf_model *model, const char *path,
                                  const exf_pair *meta, size_t n_meta);
/* Into a model whose FFNs are dense; every parameter must be there, and nothing else. */
EXF_API exf_status exf_model_load(exf_model *model, const exf_st *st);
/* Everything training needs: parameters, moments, banks, update count; meta is yours
   (geometry, step, data position). Loading is all or nothing. */
EXF_API exf_status exf_checkpoint_save(exf_model *model, const exf_optim *optim,
                                       const char *path, const exf_pair *meta,
                                       size_t n_meta);
EXF_API exf_status exf_checkpoint_load(exf_model *model, exf_optim *optim,
                                       const exf_st *st);

#ifdef __cplusplus
}
#endif
#endif /* EXFUSION_H */
/* ==== C. IMPLEMENTATION ================================================= >>impl */
#ifdef EXFUSION_IMPLEMENTATION
#if !defined(EXF__IMPLEMENTED) || defined(EXF__INSTANCE)
#ifndef EXF__INSTANCE
#define EXF__IMPLEMENTED

/* ---- platform ---------------------------------------------------- >>platform */

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if (defined(__FAST_MATH__) || (defined(_MSC_VER) && defined(_M_FP_FAST)))               \
    && !defined(EXF_ALLOW_FAST_MATH)
#error "exfusion.h: fast-math changes results (define EXF_ALLOW_FAST_MATH to accept)"
#endif

#ifdef __cplusplus
#define EXF__RESTRICT
extern "C" {
#else
#define EXF__RESTRICT restrict
#endif

/* The compiler may not contract a*b+c: where a fused multiply-add is meant, it is
   written, so that bits depend neither on the compiler nor on its flags. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#if __FLT_EVAL_METHOD__ == 1 /* s390x: -std=c99 would compute floats in double */
#pragma GCC optimize("excess-precision=fast")
#endif
#endif

#if !defined(EXF_NO_OPENMP) && defined(_OPENMP)
#include <omp.h>
#define EXF__OPENMP 1
#else
#define EXF__OPENMP 0
#endif

/* Fast kernels need vector types and per-function targets: GCC and Clang have them. */
#if !defined(EXF_NO_SIMD) && !defined(EXF_DOUBLE) && defined(__GNUC__)                   \
    && !defined(__TINYC__)
#if defined(__x86_64__) || (defined(__i386__) && defined(__SSE2__))
#include <immintrin.h>
#define EXF__X86 1
#elif defined(__aarch64__)
#include <arm_neon.h>
#define EXF__ARM 1
#endif
#endif
#ifndef EXF__X86
#define EXF__X86 0
#endif
#ifndef EXF__ARM
#define EXF__ARM 0
#endif

/* One rounding for a*b+c, in float; in double the reference loops need no fixed bits.
   Where the compiler has no instruction for it, libm's fmaf may be wrong in the last bit
   (that of mingw-w64 is): then it is ours. */
#ifdef EXF_DOUBLE
#define EXF__FMA(a, b, c) ((a) * (b) + (c))
#define EXF__SQRT(x) sqrt(x)
#define EXF__FABS(x) fabs(x)
#else
#ifdef __FP_FAST_FMAF
#define EXF__FMA(a, b, c) fmaf((a), (b), (c))
#else
#define EXF__FMA(a, b, c) exf__fma((a), (b), (c))
/* The product is exact in double; the sum s is rounded to odd, by its error e (Knuth's
   two-sum), so that rounding it again to float is right (Boldo, Melquiond). */
static float exf__fma(float a, float b, float c) {
  double p = (double)a * (double)b, s = p + (double)c, t = s - p;
  double e = (p - (s - t)) + ((double)c - t);
  uint64_t bits;
  memcpy(&bits, &s, sizeof bits);
  if (!(bits & 1) && (e > 0 || e < 0)) {
    bits += (e > 0) == (s > 0) ? 1 : UINT64_MAX;
    memcpy(&s, &bits, sizeof s);
  }
  return (float)s;
}
#endif
#define EXF__SQRT(x) sqrtf(x)
#define EXF__FABS(x) fabsf(x)
#endif
#define EXF__R(x) ((exf_real)(x))
#define EXF__MIN(a, b) ((a) < (b) ? (a) : (b))
#define EXF__MAX(a, b) ((a) > (b) ? (a) : (b))

/* Sums over a contiguous run use this many lanes (element i in lane i mod 16, then a
   tree 8, 4, 2, 1), on every instruction set. */
#define EXF__LANES 16
/* Matrix products sum over k in blocks of this length, added up in order. */
#define EXF__KC 256
/* Long sums (norms, dots) are made of lane sums over blocks of this length, added up in
   double. */
#define EXF__SUM_BLOCK 1024
/* Attention works on this many queries at a time: whole vectors, on every instruction
   set. */
#define EXF__ATT 32

/* Checked sizes: 0 when the result does not fit. Nothing else sizes an allocation. */
static int exf__mul_size(size_t a, size_t b, size_t *out) {
  if (b != 0 && a > SIZE_MAX / b) return 0;
  *out = a * b;
  return 1;
}

static int exf__add_size(size_t a, size_t b, size_t *out) {
  if (a > SIZE_MAX - b) return 0;
  *out = a + b;
  return 1;
}
#endif /* EXF__INSTANCE */

/* ---- reference kernels -------------------------------------------- >>kernels */

#ifndef EXF__INSTANCE

/* The table below is everything that computes. Each function runs on one thread; callers
   split rows, columns or ranges. The reference functions are the specification: every
   instruction set with fused multiply-add gives exactly their bits. acc means: add to
   the output instead of overwriting it (which then is never read). */

typedef enum exf__unary_op {
  EXF__U_EXP, EXF__U_TANH, EXF__U_RELU, EXF__U_GELU, EXF__U_GELU_TANH, EXF__U_SILU
} exf__unary_op;

typedef struct exf__adamw_args {  /* rounded once, from double */
  exf_real clip;                  /* factor on every gradient */
  exf_real decay;                 /* 1 - lr * weight decay */
  exf_real beta1, one_minus_beta1, beta2, one_minus_beta2;
  exf_real step;                  /* lr / (1 - beta1^t) */
  exf_real inv_sqrt_bias2;        /* 1 / sqrt(1 - beta2^t) */
  exf_real eps;
} exf__adamw_args;

/* C(i,j) = [C(i,j) +] sum_k a(i,k) b(k,j) [+ bias(j)], element (i,k) of a at
   a[i a_row + k a_col], likewise b; rows of c are contiguous. */
typedef void exf__gemm_fn(size_t m, size_t n, size_t k, const exf_real *a, size_t a_row,
                          size_t a_col, const exf_real *b, size_t b_row, size_t b_col,
                          exf_real *c, size_t c_row, int acc, const exf_real *bias,
                          void *scratch);
/* Attention takes EXF__ATT queries at a time and keeps their scores transposed,
   s (nk, EXF__ATT): a column is a query, and its softmax needs no sum across a vector.
   Columns from `rows` on hold anything. */
/* s = K Q^T, k (nk,d), q (rows,d) */
typedef void exf__att_scores_fn(size_t nk, size_t rows, size_t d, const exf_real *k,
                                size_t k_stride, const exf_real *q, size_t q_stride,
                                exf_real *s, void *scratch);
/* Query i sees the first len + i causal keys. In: s = K Q^T. Out: s = exp(scale s - m), 0
   where unseen; m (rows) the maxima, inv (rows) 1 / sum (0 when nothing is finite). */
typedef void exf__att_softmax_fn(size_t nk, size_t rows, size_t len, int causal,
                                 exf_real scale, exf_real *s, exf_real *m,
                                 exf_real *inv);
/* In: s = K Q^T, dp = V dO^T, D (rows) = <dout, out> by query.
   Out: s = P = exp(scale s - m) inv, dp = dS = scale P (dP - D). */
typedef void exf__att_softmax_grad_fn(size_t nk, size_t rows, size_t len, int causal,
                                      exf_real scale, const exf_real *m,
                                      const exf_real *inv, const exf_real *D,
                                      exf_real *s, exf_real *dp);

/* y = s x, with acc y += s x; y may be x */
typedef void exf__axpy_fn(size_t n, exf_real s, const exf_real *x, exf_real *y, int acc);
/* out (n_experts) += <g, e_i>, e_i at e + i stride */
typedef void exf__dots_fn(size_t n_experts, size_t size, size_t stride,
                          const exf_real *g, const exf_real *e, double *out);

/* p (n_experts, size), expert i at p + i stride; g (size) */
typedef void exf__adamw_fn(size_t n_experts, size_t size, size_t stride, exf_real *p,
                           const exf_real *g, exf_real *m, exf_real *v,
                           const exf__adamw_args *args, const exf_real *scale);

typedef struct exf__kernels {
  exf_isa isa;
  size_t scratch;   /* bytes of work space gemm needs, 64-byte aligned */
  exf__gemm_fn *gemm;
  void (*unary)(int op, size_t n, const exf_real *x, exf_real *y);
  /* dx = [dx +] dy f'(x), dx may be dy; and y = f(x), when y is not NULL */
  void (*unary_grad)(int op, size_t n, const exf_real *x, const exf_real *dy,
                     exf_real *dx, int acc, exf_real *y);
  void (*add)(size_t n, const exf_real *a, const exf_real *b, exf_real *y);
  void (*mul)(size_t n, const exf_real *a, const exf_real *b, exf_real *y, int acc);
  exf__axpy_fn *axpy;
  void (*col_sum)(size_t rows, size_t n, size_t row_stride, const exf_real *x,
                  exf_real *y, int acc);
  void (*layernorm)(size_t rows, size_t n, const exf_real *x, const exf_real *w,
                    const exf_real *b, exf_real eps, int rms, exf_real *y,
                    exf_real *mean, exf_real *rstd);
  void (*layernorm_grad)(size_t rows, size_t n, const exf_real *x, const exf_real *w,
                         const exf_real *mean, const exf_real *rstd, int rms,
                         const exf_real *dy, exf_real *dx, int acc);
  void (*layernorm_grad_w)(size_t rows, size_t n, size_t stride, const exf_real *x,
                           const exf_real *mean, const exf_real *rstd, int rms,
                           const exf_real *dy, exf_real *dw, exf_real *db, int acc_w,
                           int acc_b);
  void (*softmax)(size_t rows, size_t n, const exf_real *x, exf_real *y);
  void (*softmax_grad)(size_t rows, size_t n, const exf_real *y, const exf_real *dy,
                       exf_real *dx, int acc);
  void (*log_softmax)(size_t rows, size_t n, const exf_real *x, exf_real *y);
  void (*log_softmax_grad)(size_t rows, size_t n, const exf_real *y, const exf_real *dy,
                           exf_real *dx, int acc);
  void (*cross_entropy)(size_t rows, size_t n, const exf_real *x, const int32_t *labels,
                        exf_real smoothing, exf_real *row_loss, exf_real *lse);
  void (*cross_entropy_grad)(size_t rows, size_t n, const exf_real *x,
                             const int32_t *labels, const exf_real *lse,
                             exf_real smoothing, exf_real g, exf_real *dx, int acc);
  void (*attention)(size_t tq, size_t tk, size_t d, const exf_real *q, size_t q_stride,
                    const exf_real *k, const exf_real *v, size_t kv_stride,
                    exf_real scale, int causal, exf_real *out, size_t out_stride,
                    exf_real *stat, void *scratch);
  void (*attention_grad)(size_t t, size_t d, const exf_real *q, const exf_real *k,
                         const exf_real *v, size_t stride, exf_real scale, int causal,
                         const exf_real *out, const exf_real *dout, size_t out_stride,
                         const exf_real *stat, exf_real *dq, exf_real *dk, exf_real *dv,
                         size_t d_stride, int acc, void *scratch);
  void (*fuse)(size_t n_experts, size_t size, size_t stride, const exf_real *a,
               const exf_real *e, exf_real *out);
  exf__dots_fn *dots;
  double (*sumsq)(size_t n, const exf_real *x);
  exf__adamw_fn *adamw, *adamw_shared;
} exf__kernels;

/* Double precision without libm, for schedules and normal draws: the same bits on every
   system. Errors around 1e-15. */

/* log x = e ln 2 + 2 artanh f, f = (m-1)/(m+1), x = m 2^e, m in [1/sqrt 2, sqrt 2);
   x positive and normal */
static double exf__log_d(double x) {
  uint64_t bits;
  int64_t e;
  static const double inverse[] = {1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13,
                                   1.0 / 11, 1.0 / 9,  1.0 / 7,  1.0 / 5,  1.0 / 3};
  double m, f, f2, s = 0;
  int k;
  memcpy(&bits, &x, sizeof bits);
  e = (int64_t)(bits >> 52) - 1023;
  bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
  memcpy(&m, &bits, sizeof m);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    e++;
  }
  f = (m - 1) / (m + 1);
  f2 = f * f;
  for (k = 0; k < 10; k++) s = (s + inverse[k]) * f2;
  s = 2 * f + 2 * f * s;
  return (double)e * 0.693147180369123816490 +
         (s + (double)e * 1.90821492927058770002e-10); /* ln 2 in two parts */
}

/* cos(pi x), |x| < 2^20: exact reduction to [0, 1/4], then Taylor */
static double exf__cospi_d(double x) {
  double sign = 1, y, t, s;
  int k, use_sin;
  x = x < 0 ? -x : x;
  x -= 2 * (double)(int64_t)(x / 2);
  if (x > 1) x = 2 - x;
  if (x > 0.5) {
    x = 1 - x;
    sign = -1;
  }
  use_sin = x > 0.25;
  y = 3.14159265358979323846 * (use_sin ? 0.5 - x : x);
  t = -y * y;
  s = 1;
  for (k = use_sin ? 19 : 18; k > 1; k -= 2) s = 1 + s * t / (k * (k - 1));
  return sign * (use_sin ? y * s : s);
}

static double exf__pow_d(double b, uint64_t n) {
  double p = 1;
  for (; n; n >>= 1, b *= b)
    if (n & 1) p *= b;
  return p;
}

/* Elementary functions. In double they are libm's; in float our own, because libm
   differs between systems. Largest errors over all floats, in ulp: exp 0.93, tanh
   1.97, erf 3.2, log 0.51. */
#ifdef EXF_DOUBLE
#define exf__exp(x) exp(x)
#define exf__tanh(x) tanh(x)
#define exf__erf(x) erf(x)
#define exf__log(x) log(x)
#else
/* Adding 1.5 2^23 rounds to an integer and leaves it in the low bits. */
#define EXF__MAGIC 12582912.0f
#define EXF__MAGIC_BITS 0x4b400000u
#define EXF__LOG2E 1.44269502f
#define EXF__LN2_HI 0.693145752f      /* 15 bits: n EXF__LN2_HI is exact */
#define EXF__LN2_LO 1.42860677e-6f
/* e^r = 1 + r + r^2 (E0 + r (E1 + ...)), |r| <= ln(2)/2, to 5e-9 */
#define EXF__E0 0.5f
#define EXF__E1 0.166665435f
#define EXF__E2 0.0416664109f
#define EXF__E3 0.0083665764f
#define EXF__E4 0.00139399897f
/* erf x = 1 - e^-t, t = x (Q0 + x (Q1 + ...)), 0 <= x <= 4, to 5e-8 */
#define EXF__Q0 1.12837923f
#define EXF__Q1 0.636615038f
#define EXF__Q2 0.102832176f
#define EXF__Q3 -0.0194005407f
#define EXF__Q4 0.000370690803f
#define EXF__Q5 0.00107108697f
#define EXF__Q6 -0.000275149039f
#define EXF__Q7 9.44864769e-06f
#define EXF__Q8 3.63750451e-06f

/* x = n ln 2 + r, |r| <= ln(2)/2; *p = (e^r - 1 - r) / r^2. Returns n. |x| < 2^20. */
static int exf__reduce(float x, float *r, float *p) {
  float n = EXF__FMA(x, EXF__LOG2E, EXF__MAGIC) - EXF__MAGIC, s;
  *r = EXF__FMA(n, -EXF__LN2_LO, EXF__FMA(n, -EXF__LN2_HI, x));
  s = EXF__FMA(EXF__E4, *r, EXF__E3);
  s = EXF__FMA(s, *r, EXF__E2);
  s = EXF__FMA(s, *r, EXF__E1);
  *p = EXF__FMA(s, *r, EXF__E0);
  return (int)n;
}

static float exf__pow2(int n) {  /* -126 <= n <= 127 */
  uint32_t bits = (uint32_t)(n + 127) << 23;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

static float exf__exp(float x) {
  float r, p;
  int n;
  if (!(x == x)) return x;
  x = EXF__MAX(EXF__MIN(x, 89.0f), -104.0f);
  n = exf__reduce(x, &r, &p);
  p = EXF__FMA(EXF__FMA(p, r, 1.0f), r, 1.0f);
  /* two factors: the result may be infinite or subnormal */
  return p * exf__pow2(n >> 1) * exf__pow2(n - (n >> 1));
}

/* e^x - 1 for -20 <= x <= 20: 2^n (e^r - 1) + (2^n - 1) */
static float exf__expm1(float x) {
  float r, p, s;
  s = exf__pow2(exf__reduce(x, &r, &p));
  return EXF__FMA(s, EXF__FMA(r * r, p, r), s - 1.0f);
}

/* t = tanh |x| = -u / d, d = u + 2, u = e^-2|x| - 1; then one correction by the residual
   -u - t d, which takes back the roundings of d (by e) and of t; 1 / d = (1 + t) / 2. */
static float exf__tanh(float x) {
  float u, d, t, e, r;
  if (!(x == x)) return x;
  u = exf__expm1(-2.0f * EXF__MIN(fabsf(x), 9.5f));
  d = u + 2.0f;
  e = u - (d - 2.0f);
  t = -u / d;
  r = EXF__FMA(-t, e, EXF__FMA(-t, d, -u));
  return copysignf(EXF__FMA(r, EXF__FMA(0.5f, t, 0.5f), t), x);
}

static float exf__erf(float x) {
  float y, q;
  if (!(x == x)) return x;
  y = EXF__MIN(fabsf(x), 4.0f);
  q = EXF__FMA(EXF__Q8, y, EXF__Q7);
  q = EXF__FMA(q, y, EXF__Q6);
  q = EXF__FMA(q, y, EXF__Q5);
  q = EXF__FMA(q, y, EXF__Q4);
  q = EXF__FMA(q, y, EXF__Q3);
  q = EXF__FMA(q, y, EXF__Q2);
  q = EXF__FMA(q, y, EXF__Q1);
  q = EXF__FMA(q, y, EXF__Q0);
  return copysignf(exf__expm1(-(q * y)), x);
}

static float exf__log(float x) {
  if (!(x > 0.0f)) return x == 0.0f ? -HUGE_VALF : sqrtf(x); /* NaN */
  return x == HUGE_VALF ? x : (float)exf__log_d((double)x);
}
#endif

/* The 16-lane tree; destroys l. */
static exf_real exf__lane_sum(exf_real *l) {
  size_t w, j;
  for (w = EXF__LANES / 2; w; w /= 2)
    for (j = 0; j < w; j++) l[j] += l[j + w];
  return l[0];
}

/* <a, b> in lanes */
static exf_real exf__ref_dot(size_t n, const exf_real *a, const exf_real *b) {
  exf_real l[EXF__LANES] = {0};
  size_t i;
  for (i = 0; i < n; i++)
    l[i % EXF__LANES] = EXF__FMA(a[i], b[i], l[i % EXF__LANES]);
  return exf__lane_sum(l);
}

/* Within a block of EXF__KC: s = fma(a, b, s) from 0 in order of k; blocks are added to
   c in order, then the bias. */
static void exf__gemm_ref(size_t m, size_t n, size_t k, const exf_real *a, size_t a_row,
                          size_t a_col, const exf_real *b, size_t b_row, size_t b_col,
                          exf_real *c, size_t c_row, int acc, const exf_real *bias,
                          void *scratch) {
  size_t i, j, p, p0;
  (void)scratch;
  for (i = 0; i < m; i++)
    for (j = 0; j < n; j++) {
      exf_real y = acc ? c[i * c_row + j] : 0;
      for (p0 = 0; p0 < k; p0 += EXF__KC) {
        exf_real s = 0;
        for (p = p0; p < EXF__MIN(k, p0 + EXF__KC); p++)
          s = EXF__FMA(a[i * a_row + p * a_col], b[p * b_row + j * b_col], s);
        y = p0 == 0 && !acc ? s : y + s;
      }
      c[i * c_row + j] = bias ? y + bias[j] : y;
    }
}

#define EXF__INV_SQRT2 EXF__R(0.70710678118654752)
#define EXF__INV_SQRT_2PI EXF__R(0.39894228040143268)
#define EXF__GELU_A EXF__R(0.79788456080286536)   /* sqrt(2/pi) */
#define EXF__GELU_B EXF__R(0.035677408136300125)  /* 0.044715 sqrt(2/pi) */
#define EXF__GELU_FAR EXF__R(1e6)  /* where u is times 0, and is not to be infinite */

static exf_real exf__f_ref(int op, exf_real x) {
  exf_real h = EXF__R(0.5) * x;
  switch (op) {
    case EXF__U_EXP: return exf__exp(x);
    case EXF__U_TANH: return exf__tanh(x);
    case EXF__U_RELU: return x < 0 ? 0 : x;
    case EXF__U_GELU: return EXF__FMA(h, exf__erf(x * EXF__INV_SQRT2), h);
    case EXF__U_GELU_TANH: /* h (1 + tanh(A x + B x^3)) */
      return EXF__FMA(h, exf__tanh(x * EXF__FMA(EXF__GELU_B, x * x, EXF__GELU_A)), h);
    default: return x / (1 + exf__exp(-x));
  }
}

static exf_real exf__df_ref(int op, exf_real x) {
  exf_real t, u, one = 1, half = EXF__R(0.5);
  switch (op) {
    case EXF__U_EXP: return exf__exp(x);
    case EXF__U_TANH:
      t = exf__tanh(x);
      return EXF__FMA(-t, t, one);
    case EXF__U_RELU: return x > 0 ? one : 0;
    case EXF__U_GELU: /* Phi(x) + x phi(x) */
      t = EXF__FMA(half, exf__erf(x * EXF__INV_SQRT2), half);
      u = exf__exp(-half * x * x) * EXF__INV_SQRT_2PI;
      return EXF__FMA(x, u, t);
    case EXF__U_GELU_TANH: /* (1 + t)/2 + x/2 (1 - t^2) (A + 3 B x^2) */
      t = exf__tanh(x * EXF__FMA(EXF__GELU_B, x * x, EXF__GELU_A));
      x = x > EXF__GELU_FAR ? EXF__GELU_FAR : x < -EXF__GELU_FAR ? -EXF__GELU_FAR : x;
      u = half * x * EXF__FMA(3 * EXF__GELU_B, x * x, EXF__GELU_A);
      return EXF__FMA(u, EXF__FMA(-t, t, one), EXF__FMA(half, t, half));
    default: /* s (1 + x (1 - s)), s = 1 / (1 + exp -x) */
      t = one / (one + exf__exp(-x));
      return t * EXF__FMA(x, one - t, one);
  }
}

static void exf__unary_ref(int op, size_t n, const exf_real *x, exf_real *y) {
  size_t i;
  for (i = 0; i < n; i++) y[i] = exf__f_ref(op, x[i]);
}

static void exf__unary_grad_ref(int op, size_t n, const exf_real *x, const exf_real *dy,
                                exf_real *dx, int acc, exf_real *y) {
  size_t i;
  for (i = 0; i < n; i++) {
    exf_real f = exf__df_ref(op, x[i]);
    dx[i] = acc ? EXF__FMA(dy[i], f, dx[i]) : dy[i] * f;
    if (y) y[i] = exf__f_ref(op, x[i]);
  }
}

static void exf__add_ref(size_t n, const exf_real *a, const exf_real *b, exf_real *y) {
  size_t i;
  for (i = 0; i < n; i++) y[i] = a[i] + b[i];
}

static void exf__mul_ref(size_t n, const exf_real *a, const exf_real *b, exf_real *y,
                         int acc) {
  size_t i;
  for (i = 0; i < n; i++) y[i] = acc ? EXF__FMA(a[i], b[i], y[i]) : a[i] * b[i];
}

static void exf__axpy_ref(size_t n, exf_real s, const exf_real *x, exf_real *y,
                          int acc) {
  size_t i;
  for (i = 0; i < n; i++) y[i] = acc ? EXF__FMA(s, x[i], y[i]) : s * x[i];
}

static void exf__col_sum_ref(size_t rows, size_t n, size_t row_stride, const exf_real *x,
                             exf_real *y, int acc) {
  size_t i, j;
  for (j = 0; j < n; j++) {
    exf_real s = 0;
    for (i = 0; i < rows; i++) s += x[i * row_stride + j];
    y[j] = acc ? y[j] + s : s;
  }
}

/* y = (x - mean) rstd w + b, rstd = 1 / sqrt(mean (x - mean)^2 + eps); rms: mean is 0 */
static void exf__layernorm_ref(size_t rows, size_t n, const exf_real *x,
                               const exf_real *w, const exf_real *b, exf_real eps,
                               int rms, exf_real *y, exf_real *mean, exf_real *rstd) {
  size_t i, j;
  for (i = 0; i < rows; i++, x += n, y += n) {
    exf_real l[EXF__LANES] = {0}, mu = 0, rs;
    if (!rms) {
      for (j = 0; j < n; j++) l[j % EXF__LANES] += x[j];
      mean[i] = mu = exf__lane_sum(l) / (exf_real)n;
      for (j = 0; j < EXF__LANES; j++) l[j] = 0;
    }
    for (j = 0; j < n; j++)
      l[j % EXF__LANES] = EXF__FMA(x[j] - mu, x[j] - mu, l[j % EXF__LANES]);
    rstd[i] = rs = 1 / EXF__SQRT(exf__lane_sum(l) / (exf_real)n + eps);
    for (j = 0; j < n; j++) {
      exf_real z = (x[j] - mu) * rs;
      y[j] = b ? EXF__FMA(z, w[j], b[j]) : z * w[j];
    }
  }
}

/* g = dy w, z = (x - mean) rstd: dx = rstd (g - mean g - z mean(g z)); rms: without
   the term mean g */
static void exf__layernorm_grad_ref(size_t rows, size_t n, const exf_real *x,
                                    const exf_real *w, const exf_real *mean,
                                    const exf_real *rstd, int rms, const exf_real *dy,
                                    exf_real *dx, int acc) {
  size_t i, j;
  for (i = 0; i < rows; i++, x += n, dy += n, dx += n) {
    exf_real l1[EXF__LANES] = {0}, l2[EXF__LANES] = {0}, g1, g2;
    exf_real mu = rms ? 0 : mean[i], rs = rstd[i];
    for (j = 0; j < n; j++) {
      exf_real g = dy[j] * w[j], z = (x[j] - mu) * rs;
      l1[j % EXF__LANES] += g;
      l2[j % EXF__LANES] = EXF__FMA(g, z, l2[j % EXF__LANES]);
    }
    g1 = rms ? 0 : exf__lane_sum(l1) / (exf_real)n;
    g2 = exf__lane_sum(l2) / (exf_real)n;
    for (j = 0; j < n; j++) {
      exf_real g = dy[j] * w[j], z = (x[j] - mu) * rs;
      exf_real d = rs * EXF__FMA(-z, g2, g - g1);
      dx[j] = acc ? dx[j] + d : d;
    }
  }
}

/* dw = sum over rows of dy z, db = sum over rows of dy; columns 0 .. n-1 */
static void exf__layernorm_grad_w_ref(size_t rows, size_t n, size_t stride,
                                      const exf_real *x, const exf_real *mean,
                                      const exf_real *rstd, int rms, const exf_real *dy,
                                      exf_real *dw, exf_real *db, int acc_w,
                                      int acc_b) {
  size_t i, j;
  for (j = 0; j < n; j++) {
    exf_real sw = 0, sb = 0;
    for (i = 0; i < rows; i++) {
      exf_real z = (x[i * stride + j] - (rms ? 0 : mean[i])) * rstd[i];
      sw = EXF__FMA(dy[i * stride + j], z, sw);
      sb += dy[i * stride + j];
    }
    if (dw) dw[j] = acc_w ? dw[j] + sw : sw;
    if (db) db[j] = acc_b ? db[j] + sb : sb;
  }
}

/* The largest entry, or 0 when that is -inf: then every exp(x - max) is 0 and so is the
   sum. Skips NaN, which the sum will not. */
static exf_real exf__ref_max(size_t n, const exf_real *x) {
  exf_real m = EXF__R(-HUGE_VAL);
  size_t j;
  for (j = 0; j < n; j++) m = x[j] > m ? x[j] : m;
  return m == EXF__R(-HUGE_VAL) ? 0 : m;
}

/* y = exp(x - m) -> sum of y; y may be x, or NULL */
static exf_real exf__ref_exp_sum(size_t n, const exf_real *x, exf_real m, exf_real *y) {
  exf_real l[EXF__LANES] = {0};
  size_t j;
  for (j = 0; j < n; j++) {
    exf_real e = exf__exp(x[j] - m);
    l[j % EXF__LANES] += e;
    if (y) y[j] = e;
  }
  return exf__lane_sum(l);
}

static void exf__softmax_ref(size_t rows, size_t n, const exf_real *x, exf_real *y) {
  size_t i, j;
  for (i = 0; i < rows; i++, x += n, y += n) {
    exf_real s = exf__ref_exp_sum(n, x, exf__ref_max(n, x), y);
    s = s == 0 ? 0 : 1 / s;
    for (j = 0; j < n; j++) y[j] *= s;
  }
}

/* dx = y (dy - <y, dy>) */
static void exf__softmax_grad_ref(size_t rows, size_t n, const exf_real *y,
                                  const exf_real *dy, exf_real *dx, int acc) {
  size_t i, j;
  for (i = 0; i < rows; i++, y += n, dy += n, dx += n) {
    exf_real s = exf__ref_dot(n, y, dy);
    for (j = 0; j < n; j++)
      dx[j] = acc ? EXF__FMA(y[j], dy[j] - s, dx[j]) : y[j] * (dy[j] - s);
  }
}

static void exf__log_softmax_ref(size_t rows, size_t n, const exf_real *x, exf_real *y) {
  size_t i, j;
  for (i = 0; i < rows; i++, x += n, y += n) {
    exf_real m = exf__ref_max(n, x), s = exf__ref_exp_sum(n, x, m, NULL);
    exf_real lse = m + exf__log(s);
    for (j = 0; j < n; j++) y[j] = s == 0 ? 0 : x[j] - lse;
  }
}

/* dx = dy - e^y sum dy. Two zeros in a row of log-probabilities: a row without a finite
   entry. */
static void exf__log_softmax_grad_ref(size_t rows, size_t n, const exf_real *y,
                                      const exf_real *dy, exf_real *dx, int acc) {
  size_t i, j;
  for (i = 0; i < rows; i++, y += n, dy += n, dx += n) {
    exf_real l[EXF__LANES] = {0}, s;
    int empty = n > 1 && y[0] == 0 && y[1] == 0;
    for (j = 0; j < n; j++) l[j % EXF__LANES] += dy[j];
    s = exf__lane_sum(l);
    for (j = 0; j < n; j++) {
      exf_real d = empty ? 0 : EXF__FMA(-exf__exp(y[j]), s, dy[j]);
      dx[j] = acc ? dx[j] + d : d;
    }
  }
}

/* Row loss, m the maximum: log sum exp(x - m) - (1-s) (x_label - m) - s/n sum (x - m);
   lse = m + log sum exp(x - m). 0 for a negative label. */
static void exf__cross_entropy_ref(size_t rows, size_t n, const exf_real *x,
                                   const int32_t *labels, exf_real smoothing,
                                   exf_real *row_loss, exf_real *lse) {
  size_t i, j;
  for (i = 0; i < rows; i++, x += n) {
    exf_real l[EXF__LANES] = {0}, m, s;
    row_loss[i] = lse[i] = 0;
    if (labels[i] < 0) continue;
    m = exf__ref_max(n, x);
    s = exf__log(exf__ref_exp_sum(n, x, m, NULL));
    lse[i] = m + s;
    s -= (1 - smoothing) * (x[labels[i]] - m);
    if (smoothing != 0) {
      for (j = 0; j < n; j++) l[j % EXF__LANES] += x[j] - m;
      s -= smoothing / (exf_real)n * exf__lane_sum(l);
    }
    row_loss[i] = s;
  }
}

/* dx = g (softmax - q), q = smoothing / n, more by 1 - smoothing at the label */
static void exf__cross_entropy_grad_ref(size_t rows, size_t n, const exf_real *x,
                                        const int32_t *labels, const exf_real *lse,
                                        exf_real smoothing, exf_real g, exf_real *dx,
                                        int acc) {
  size_t i, j;
  exf_real q0 = smoothing / (exf_real)n, q1 = q0 + (1 - smoothing);
  for (i = 0; i < rows; i++, x += n, dx += n)
    for (j = 0; j < n; j++) {
      exf_real q = labels[i] >= 0 && j == (size_t)labels[i] ? q1 : q0;
      exf_real d = labels[i] < 0 ? 0 : g * (exf__exp(x[j] - lse[i]) - q);
      dx[j] = acc ? dx[j] + d : d;
    }
}

static void exf__att_scores_ref(size_t nk, size_t rows, size_t d, const exf_real *k,
                                size_t k_stride, const exf_real *q, size_t q_stride,
                                exf_real *s, void *scratch) {
  exf__gemm_ref(nk, rows, d, k, k_stride, 1, q, 1, q_stride, s, EXF__ATT, 0, NULL,
                scratch);
}

static void exf__att_softmax_ref(size_t nk, size_t rows, size_t len, int causal,
                                 exf_real scale, exf_real *s, exf_real *m,
                                 exf_real *inv) {
  size_t i, j;
  for (i = 0; i < rows; i++, s++) {
    exf_real top = EXF__R(-HUGE_VAL), sum = 0;
    size_t seen = causal ? len + i : nk;
    for (j = 0; j < nk; j++) {
      exf_real x = s[j * EXF__ATT] * scale;
      s[j * EXF__ATT] = x = j < seen ? x : EXF__R(-HUGE_VAL);
      top = x > top ? x : top;
    }
    if (top == EXF__R(-HUGE_VAL)) top = 0;
    for (j = 0; j < nk; j++) sum += s[j * EXF__ATT] = exf__exp(s[j * EXF__ATT] - top);
    m[i] = top;
    inv[i] = sum == 0 ? 0 : 1 / sum;
  }
}

static void exf__att_softmax_grad_ref(size_t nk, size_t rows, size_t len, int causal,
                                      exf_real scale, const exf_real *m,
                                      const exf_real *inv, const exf_real *D,
                                      exf_real *s, exf_real *dp) {
  size_t i, j, at;
  for (j = 0; j < nk; j++)
    for (i = 0; i < rows; i++) {
      at = j * EXF__ATT + i;
      s[at] = causal && j >= len + i ? 0 : exf__exp(scale * s[at] - m[i]) * inv[i];
      dp[at] = scale * (s[at] * (dp[at] - D[i]));
    }
}

/* Attention is made of these and of matrix products. Scratch: that of gemm, then one or
   two blocks of scores and D. */
static size_t exf__attention_scratch(const exf__kernels *k, size_t t) {
  size_t bytes;
  if (!exf__add_size(t, 1, &bytes) ||
      !exf__mul_size(bytes, 2 * EXF__ATT * sizeof(exf_real), &bytes) ||
      !exf__add_size(bytes, k->scratch, &bytes))
    return 0;
  return bytes;
}

/* stat (2,tq): the rows m and inv of all queries */
static void exf__attention(exf__gemm_fn *gemm, exf__att_scores_fn *scores,
                           exf__att_softmax_fn *softmax, exf__axpy_fn *axpy,
                           size_t gemm_scratch, size_t tq, size_t tk, size_t d,
                           const exf_real *q, size_t q_stride,
                           const exf_real *k, const exf_real *v, size_t kv_stride,
                           exf_real scale, int causal, exf_real *out,
                           size_t out_stride, exf_real *stat, void *scratch) {
  exf_real *s = (exf_real *)(void *)((unsigned char *)scratch + gemm_scratch);
  exf_real here[2 * EXF__ATT], *m = here, *inv = here + EXF__ATT;
  size_t i, r, rows, len, nk;
  for (i = 0; i < tq; i += rows) {
    rows = EXF__MIN((size_t)EXF__ATT, tq - i);
    len = tk - tq + i + 1;                    /* keys of the first row, when causal */
    nk = causal ? len + rows - 1 : tk;
    if (stat) {
      m = stat + i;
      inv = m + tq;
    }
    scores(nk, rows, d, k, kv_stride, q + i * q_stride, q_stride, s, scratch);
    softmax(nk, rows, len, causal, scale, s, m, inv);
    gemm(rows, d, nk, s, 1, EXF__ATT, v, kv_stride, 1, out + i * out_stride, out_stride,
         0, NULL, scratch);
    for (r = 0; r < rows; r++) {
      exf_real *row = out + (i + r) * out_stride;
      axpy(d, inv[r], row, row, 0);
    }
  }
}

/* From the last block of queries, which sees all keys, to the first, so that it may
   overwrite dk and dv, to which the others add. */
static void exf__attention_grad(exf__gemm_fn *gemm, exf__att_scores_fn *scores,
                                exf__att_softmax_grad_fn *softmax_grad,
                                exf__dots_fn *dots, size_t gemm_scratch, size_t t,
                                size_t d, const exf_real *q, const exf_real *k,
                                const exf_real *v, size_t stride, exf_real scale,
                                int causal, const exf_real *out,
                                const exf_real *dout, size_t out_stride,
                                const exf_real *stat, exf_real *dq, exf_real *dk,
                                exf_real *dv, size_t d_stride, int acc,
                                void *scratch) {
  exf_real *D = (exf_real *)(void *)((unsigned char *)scratch + gemm_scratch);
  exf_real *s = D + EXF__ATT, *dp = s + EXF__ATT * t;
  size_t i = (t + EXF__ATT - 1) / EXF__ATT * EXF__ATT, r, rows, nk;
  while (i) {
    const exf_real *qi, *doi;
    int acc_kv = acc || i < t;
    i -= EXF__ATT;
    qi = q + i * stride;
    doi = dout + i * out_stride;
    rows = EXF__MIN((size_t)EXF__ATT, t - i);
    nk = causal ? i + rows : t;
    scores(nk, rows, d, k, stride, qi, stride, s, scratch);
    scores(nk, rows, d, v, stride, doi, out_stride, dp, scratch);
    for (r = 0; r < rows; r++) {
      double sum = 0;
      dots(1, d, 0, doi + r * out_stride, out + (i + r) * out_stride, &sum);
      D[r] = EXF__R(sum);
    }
    softmax_grad(nk, rows, i + 1, causal, scale, stat + i, stat + t + i, D, s, dp);
    gemm(rows, d, nk, dp, 1, EXF__ATT, k, stride, 1, dq + i * d_stride, d_stride, acc,
         NULL, scratch);
    gemm(nk, d, rows, dp, EXF__ATT, 1, qi, stride, 1, dk, d_stride, acc_kv, NULL,
         scratch);
    gemm(nk, d, rows, s, EXF__ATT, 1, doi, out_stride, 1, dv, d_stride, acc_kv, NULL,
         scratch);
  }
}

/* The table entries of one instruction set. */
#define EXF__ATTENTION(isa, bytes)                                                      \
  static void exf__attention_##isa(                                                     \
      size_t tq, size_t tk, size_t d, const exf_real *q, size_t q_stride,               \
      const exf_real *k, const exf_real *v, size_t kv_stride, exf_real scale,           \
      int causal, exf_real *out, size_t out_stride, exf_real *stat, void *scratch) {    \
    exf__attention(exf__gemm_##isa, exf__att_scores_##isa, exf__att_softmax_##isa,      \
                   exf__axpy_##isa, bytes, tq, tk, d, q, q_stride, k, v, kv_stride,     \
                   scale, causal, out, out_stride, stat, scratch);                      \
  }                                                                                     \
  static void exf__attention_grad_##isa(                                                \
      size_t t, size_t d, const exf_real *q, const exf_real *k, const exf_real *v,      \
      size_t stride, exf_real scale, int causal, const exf_real *out,                   \
      const exf_real *dout, size_t out_stride, const exf_real *stat, exf_real *dq,      \
      exf_real *dk, exf_real *dv, size_t d_stride, int acc, void *scratch) {            \
    exf__attention_grad(exf__gemm_##isa, exf__att_scores_##isa,                         \
                        exf__att_softmax_grad_##isa, exf__dots_##isa, bytes, t, d, q, k,\
                        v, stride, scale, causal, out, dout, out_stride, stat, dq, dk,  \
                        dv, d_stride, acc, scratch);                                    \
  }

/* out = sum_i a_i e_i, i ascending */
static void exf__fuse_ref(size_t n_experts, size_t size, size_t stride,
                          const exf_real *a, const exf_real *e, exf_real *out) {
  size_t i, j;
  for (j = 0; j < size; j++) {
    exf_real s = a[0] * e[j];
    for (i = 1; i < n_experts; i++) s = EXF__FMA(a[i], e[i * stride + j], s);
    out[j] = s;
  }
}

/* out_i += <g, e_i>: lane sums of blocks, added up in double */
static void exf__dots_ref(size_t n_experts, size_t size, size_t stride,
                          const exf_real *g, const exf_real *e, double *out) {
  size_t i, j;
  for (i = 0; i < n_experts; i++)
    for (j = 0; j < size; j += EXF__SUM_BLOCK)
      out[i] += (double)exf__ref_dot(EXF__MIN(size - j, (size_t)EXF__SUM_BLOCK), g + j,
                                     e + i * stride + j);
}

static double exf__sumsq_ref(size_t n, const exf_real *x) {
  double s = 0;
  exf__dots_ref(1, n, 0, x, x, &s);
  return s;
}

/* AdamW of expert i with gradient gscale_i clip g. By blocks, so that g stays in the
   cache while the experts pass. */
static void exf__adamw_ref(size_t n_experts, size_t size, size_t stride, exf_real *p,
                           const exf_real *g, exf_real *m, exf_real *v,
                           const exf__adamw_args *args, const exf_real *gscale) {
  size_t i, j, j0, k;
  for (j0 = 0; j0 < size; j0 += EXF__SUM_BLOCK)
    for (i = 0; i < n_experts; i++)
      for (j = j0; j < EXF__MIN(size, j0 + EXF__SUM_BLOCK); j++) {
        exf_real ge = gscale[i] * (args->clip * g[j]);
        k = i * stride + j;
        m[k] = EXF__FMA(args->beta1, m[k], args->one_minus_beta1 * ge);
        v[k] = EXF__FMA(args->beta2, v[k], args->one_minus_beta2 * (ge * ge));
        p[k] = p[k] * args->decay -
               args->step * m[k] / (EXF__SQRT(v[k]) * args->inv_sqrt_bias2 + args->eps);
      }
}

EXF__ATTENTION(ref, 0)

/* The same with one m and v (size) of g itself: every expert takes their step, by the
   sign of its weight. */
static void exf__adamw_shared_ref(size_t n_experts, size_t size, size_t stride,
                                  exf_real *p, const exf_real *g, exf_real *m,
                                  exf_real *v, const exf__adamw_args *args,
                                  const exf_real *sign) {
  size_t i, j;
  for (j = 0; j < size; j++) {
    exf_real gc = args->clip * g[j], step;
    m[j] = EXF__FMA(args->beta1, m[j], args->one_minus_beta1 * gc);
    v[j] = EXF__FMA(args->beta2, v[j], args->one_minus_beta2 * (gc * gc));
    step = args->step * m[j] / (EXF__SQRT(v[j]) * args->inv_sqrt_bias2 + args->eps);
    for (i = 0; i < n_experts; i++)
      p[i * stride + j] = p[i * stride + j] * args->decay - sign[i] * step;
  }
}

#define EXF__TABLE(ISA, isa, bytes)                                                     \
  {                                                                                     \
    EXF_ISA_##ISA, bytes, exf__gemm_##isa, exf__unary_##isa, exf__unary_grad_##isa,     \
        exf__add_##isa, exf__mul_##isa, exf__axpy_##isa, exf__col_sum_##isa,            \
        exf__layernorm_##isa, exf__layernorm_grad_##isa, exf__layernorm_grad_w_##isa,   \
        exf__softmax_##isa, exf__softmax_grad_##isa, exf__log_softmax_##isa,            \
        exf__log_softmax_grad_##isa, exf__cross_entropy_##isa,                          \
        exf__cross_entropy_grad_##isa, exf__attention_##isa, exf__attention_grad_##isa, \
        exf__fuse_##isa, exf__dots_##isa, exf__sumsq_##isa, exf__adamw_##isa,           \
        exf__adamw_shared_##isa                                                         \
  }

static const exf__kernels exf__kernels_ref = EXF__TABLE(REF, ref, 0);

#endif /* EXF__INSTANCE */

/* ---- fast kernels --------------------------------------------------->>fast */

/* One body, compiled once per instruction set: the header includes itself with
   EXF__INSTANCE set, and all of it but this body is skipped. Vectors have the native
   width EXF__W; functions carry their target, so no compiler flag is needed. A name's
   counterpart in the reference kernels holds its formula. */

#ifdef EXF__INSTANCE
#if EXF__INSTANCE == 4
/* The plain forms of some intrinsics make GCC 12 warn of uninitialized values. */
#define EXF__ALL ((__mmask16)0xffff)
#define EXF__F(name) exf__##name##_avx512
#define EXF__TARGET __attribute__((target("avx512f")))
#define EXF__W 16
#define EXF__MR 12
#define EXF__COLS 768                  /* the second cache holds 1 MB or more */
#define EXF__ROWS EXF__MR
#define EXF__PACK_A SIZE_MAX
#define EXF__V __m512
#define EXF__SET(x) _mm512_set1_ps(x)
#define EXF__LOAD(p) _mm512_loadu_ps(p)
#define EXF__STORE(p, v) _mm512_storeu_ps(p, v)
#define EXF__FMAV(a, b, c) _mm512_fmadd_ps(a, b, c)
#define EXF__MAXV(a, b) _mm512_maskz_max_ps(EXF__ALL, a, b)
#define EXF__MINV(a, b) _mm512_maskz_min_ps(EXF__ALL, a, b)
#define EXF__SQRTV(a) _mm512_maskz_sqrt_ps(EXF__ALL, a)
#define EXF__LO(a, b) _mm512_maskz_unpacklo_ps(EXF__ALL, a, b)
#define EXF__HI(a, b) _mm512_maskz_unpackhi_ps(EXF__ALL, a, b)
#define EXF__LL(a, b) _mm512_shuffle_ps(a, b, 0x44)
#define EXF__HH(a, b) _mm512_shuffle_ps(a, b, 0xee)
#elif EXF__INSTANCE == 3
#define EXF__F(name) exf__##name##_avx2
#define EXF__TARGET __attribute__((target("avx2,fma")))
#define EXF__W 8
#define EXF__MR 6
#define EXF__V __m256
#define EXF__SET(x) _mm256_set1_ps(x)
#define EXF__LOAD(p) _mm256_loadu_ps(p)
#define EXF__STORE(p, v) _mm256_storeu_ps(p, v)
#define EXF__FMAV(a, b, c) _mm256_fmadd_ps(a, b, c)
#define EXF__MAXV(a, b) _mm256_max_ps(a, b)
#define EXF__MINV(a, b) _mm256_min_ps(a, b)
#define EXF__SQRTV(a) _mm256_sqrt_ps(a)
#define EXF__LO(a, b) _mm256_unpacklo_ps(a, b)
#define EXF__HI(a, b) _mm256_unpackhi_ps(a, b)
#define EXF__LL(a, b) _mm256_shuffle_ps(a, b, 0x44)
#define EXF__HH(a, b) _mm256_shuffle_ps(a, b, 0xee)
#elif EXF__INSTANCE == 2
#define EXF__F(name) exf__##name##_sse2
#define EXF__TARGET __attribute__((target("sse2")))
#define EXF__W 4
#define EXF__MR 4
#define EXF__V __m128
#define EXF__SET(x) _mm_set1_ps(x)
#define EXF__LOAD(p) _mm_loadu_ps(p)
#define EXF__STORE(p, v) _mm_storeu_ps(p, v)
#define EXF__FMAV(a, b, c) ((__m128)((a) * (b) + (c)))
#define EXF__MAXV(a, b) _mm_max_ps(a, b)
#define EXF__MINV(a, b) _mm_min_ps(a, b)
#define EXF__SQRTV(a) _mm_sqrt_ps(a)
#define EXF__LO(a, b) _mm_unpacklo_ps(a, b)
#define EXF__HI(a, b) _mm_unpackhi_ps(a, b)
#define EXF__LL(a, b) _mm_movelh_ps(a, b)
#define EXF__HH(a, b) _mm_movehl_ps(b, a)
#else
#define EXF__F(name) exf__##name##_neon
#define EXF__TARGET
#define EXF__W 4
#define EXF__MR 8
#define EXF__V float32x4_t
#define EXF__SET(x) vdupq_n_f32(x)
#define EXF__LOAD(p) vld1q_f32(p)
#define EXF__STORE(p, v) vst1q_f32(p, v)
#define EXF__FMAV(a, b, c) vfmaq_f32(c, a, b)
#define EXF__MAXV(a, b) vbslq_f32(vcgtq_f32(a, b), a, b)
#define EXF__MINV(a, b) vbslq_f32(vcltq_f32(a, b), a, b)
#define EXF__SQRTV(a) vsqrtq_f32(a)
#define EXF__LO(a, b) vzip1q_f32(a, b)
#define EXF__HI(a, b) vzip2q_f32(a, b)
#define EXF__LL(a, b) vcombine_f32(vget_low_f32(a), vget_low_f32(b))
#define EXF__HH(a, b) vcombine_f32(vget_high_f32(a), vget_high_f32(b))
#endif
#ifndef EXF__COLS
#define EXF__COLS EXF__NC              /* columns of a block of b */
#define EXF__ROWS EXF__MC              /* rows of a that each panel of b passes over */
#define EXF__PACK_A 256  /* above so many columns, contiguous rows of a are packed */
#endif
#define EXF__INLINE EXF__TARGET static inline __attribute__((always_inline))
#define EXF__NV (EXF__LANES / EXF__W)  /* vectors that make up the 16 lanes */
#define EXF__NR (2 * EXF__W)           /* columns of a tile */
#define EXF__SPILL ((EXF__MR + EXF__W - 1) / EXF__W * EXF__W) /* EXF__MR, whole vectors */
#define EXF__VI EXF__F(vi)
#define EXF__VU EXF__F(vu)
typedef int32_t EXF__VI __attribute__((vector_size(EXF__W * 4)));
typedef uint32_t EXF__VU __attribute__((vector_size(EXF__W * 4)));

/* Part vectors: 0 < n < EXF__W entries; lanes(p, s): 4 floats at p, p + s, ... side by
   side; fold: the tree over 16 lanes, sums or maxima. */
#if EXF__INSTANCE == 4
EXF__INLINE EXF__V EXF__F(load_n)(const float *p, size_t n, float fill) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)((1u << n) - 1u), p);
}
EXF__INLINE void EXF__F(store_n)(float *p, size_t n, EXF__V v) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1u), v);
}
EXF__INLINE EXF__V EXF__F(lanes)(const float *p, size_t s) {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + s), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 2 * s), 2);
  return _mm512_insertf32x4(v, _mm_loadu_ps(p + 3 * s), 3);
}
#elif EXF__INSTANCE == 3
EXF__INLINE __m256i EXF__F(mask)(size_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
EXF__INLINE EXF__V EXF__F(load_n)(const float *p, size_t n, float fill) {
  __m256i k = EXF__F(mask)(n);
  return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, k),
                          _mm256_castsi256_ps(k));
}
EXF__INLINE void EXF__F(store_n)(float *p, size_t n, EXF__V v) {
  _mm256_maskstore_ps(p, EXF__F(mask)(n), v);
}
EXF__INLINE EXF__V EXF__F(lanes)(const float *p, size_t s) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)),
                              _mm_loadu_ps(p + s), 1);
}
#else
EXF__INLINE EXF__V EXF__F(load_n)(const float *p, size_t n, float fill) {
  float t[4];
  t[0] = p[0];
  t[1] = n > 1 ? p[1] : fill;
  t[2] = n > 2 ? p[2] : fill;
  t[3] = fill;
  return EXF__LOAD(t);
}
EXF__INLINE void EXF__F(store_n)(float *p, size_t n, EXF__V v) {
  float t[4];
  EXF__STORE(t, v);
  p[0] = t[0];
  if (n > 1) p[1] = t[1];
  if (n > 2) p[2] = t[2];
}
EXF__INLINE EXF__V EXF__F(lanes)(const float *p, size_t s) {
  (void)s;
  return EXF__LOAD(p);
}
#endif

#if EXF__INSTANCE == 5
EXF__INLINE float EXF__F(fold)(const EXF__V *l, int max) {
  float32x4_t q, a = l[0], b = l[1];
  float32x2_t h;
  a = max ? EXF__MAXV(a, l[2]) : a + l[2];
  b = max ? EXF__MAXV(b, l[3]) : b + l[3];
  q = max ? EXF__MAXV(a, b) : a + b;
  h = max ? vmax_f32(vget_low_f32(q), vget_high_f32(q))
          : vget_low_f32(q) + vget_high_f32(q);
  return max ? vget_lane_f32(vmax_f32(h, vrev64_f32(h)), 0)
             : vget_lane_f32(h, 0) + vget_lane_f32(h, 1);
}
#else
#define EXF__FOLD(bits, a, b) \
  (max ? _mm##bits##max_ps(a, b) : _mm##bits##add_ps(a, b))
EXF__INLINE float EXF__F(fold)(const EXF__V *l, int max) {
  __m128 q, r;
#if EXF__INSTANCE == 4
  __m512d u = _mm512_castps_pd(l[0]);
  __m256 h = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, u, 0));
  h = EXF__FOLD(256_, h, _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, u, 1)));
#elif EXF__INSTANCE == 3
  __m256 h = EXF__FOLD(256_, l[0], l[1]);
#endif
#if EXF__INSTANCE == 2
  q = EXF__FOLD(_, l[0], l[2]);
  r = EXF__FOLD(_, l[1], l[3]);
  q = EXF__FOLD(_, q, r);
#else
  q = _mm256_castps256_ps128(h);
  q = EXF__FOLD(_, q, _mm256_extractf128_ps(h, 1));
#endif
  q = EXF__FOLD(_, q, _mm_movehl_ps(q, q));
  r = _mm_shuffle_ps(q, q, 1);
  return _mm_cvtss_f32(EXF__FOLD(_, q, r));
}
#undef EXF__FOLD
#endif

/* Vector i of a run of n, past the end: fill; put stores what is inside. */
EXF__INLINE EXF__V EXF__F(get)(const float *p, size_t i, size_t n, float fill) {
  if (i + EXF__W <= n) return EXF__LOAD(p + i);
  return i < n ? EXF__F(load_n)(p + i, n - i, fill) : EXF__SET(fill);
}
EXF__INLINE void EXF__F(put)(float *p, size_t i, size_t n, EXF__V v) {
  if (i + EXF__W <= n) EXF__STORE(p + i, v);
  else if (i < n) EXF__F(store_n)(p + i, n - i, v);
}
/* Over a run in steps of 16 lanes: i the index, v the accumulator it belongs to */
#define EXF__EACH(i, v, n)                  \
  for (i = 0; i < (n); i += EXF__LANES)     \
    EXF__UNROLL                             \
    for (v = 0; v < EXF__NV; v++)
#define EXF__AT (i + v * EXF__W)
EXF__INLINE void EXF__F(clear)(EXF__V *l, float x) {
  size_t v;
  EXF__UNROLL
  for (v = 0; v < EXF__NV; v++) l[v] = EXF__SET(x);
}

/* ---- matrix product */

/* A tile of mr x (nv EXF__W) of C stays in registers while k runs; of the columns, cols
   are real. The rows of a are reached from three pointers, which spares registers. */
EXF__INLINE void EXF__F(tile)(const int mr, const int nv, size_t k, const float *a,
                              size_t a_row, size_t a_col, const float *b, size_t b_row,
                              float *c, size_t c_row, size_t cols, int acc,
                              const float *bias) {
  EXF__V s[EXF__MR][2];
  const float *a4 = a + 4 * (mr > 4 ? a_row : 0), *a8 = a + 8 * (mr > 8 ? a_row : 0);
  int i, v;
  EXF__UNROLL
  for (i = 0; i < mr; i++) {
    s[i][0] = s[i][1] = EXF__SET(0.0f);
    __builtin_prefetch(c + (size_t)i * c_row, 1);
  }
  for (; k; k--) {
    EXF__V b0 = EXF__LOAD(b), b1 = nv > 1 ? EXF__LOAD(b + EXF__W) : b0;
    EXF__UNROLL
    for (i = 0; i < mr; i++) {
      const float *row = i < 4 ? a : i < 8 ? a4 : a8;
      EXF__V x = EXF__SET(row[(size_t)(i % 4) * a_row]);
      s[i][0] = EXF__FMAV(x, b0, s[i][0]);
      if (nv > 1) s[i][1] = EXF__FMAV(x, b1, s[i][1]);
    }
    a += a_col, a4 += a_col, a8 += a_col;
    b += b_row;
  }
  if (cols == (size_t)nv * EXF__W) {
    if (acc) {
      EXF__UNROLL
      for (i = 0; i < mr; i++) {
        s[i][0] = EXF__LOAD(c + (size_t)i * c_row) + s[i][0];
        if (nv > 1) s[i][1] = EXF__LOAD(c + (size_t)i * c_row + EXF__W) + s[i][1];
      }
    }
    if (bias) {
      EXF__V b0 = EXF__LOAD(bias), b1 = nv > 1 ? EXF__LOAD(bias + EXF__W) : b0;
      EXF__UNROLL
      for (i = 0; i < mr; i++) s[i][0] += b0, s[i][1] += b1;
    }
    EXF__UNROLL
    for (i = 0; i < mr; i++) {
      EXF__STORE(c + (size_t)i * c_row, s[i][0]);
      if (nv > 1) EXF__STORE(c + (size_t)i * c_row + EXF__W, s[i][1]);
    }
  } else {
    float t[EXF__MR][EXF__NR];
    EXF__UNROLL
    for (i = 0; i < mr; i++) {
      EXF__STORE(t[i], s[i][0]);
      EXF__STORE(t[i] + EXF__W, s[i][1]);
    }
    for (i = 0; i < mr; i++, c += c_row)
      for (v = 0; v < nv; v++) {
        size_t j = (size_t)v * EXF__W;
        EXF__V y = EXF__LOAD(t[i] + j);
        if (acc) y = EXF__F(get)(c, j, cols, 0) + y;
        if (bias) y += EXF__F(get)(bias, j, cols, 0);
        EXF__F(put)(c, j, cols, y);
      }
  }
}

/* Four rows of k of EXF__W columns of b, whose columns are contiguous and b_col apart:
   4 x 4 transpositions in registers */
EXF__INLINE void EXF__F(transpose)(const float *b, size_t b_col, EXF__V *r) {
  EXF__V r0 = EXF__F(lanes)(b, 4 * b_col), r1 = EXF__F(lanes)(b + b_col, 4 * b_col);
  EXF__V r2 = EXF__F(lanes)(b + 2 * b_col, 4 * b_col);
  EXF__V r3 = EXF__F(lanes)(b + 3 * b_col, 4 * b_col);
  EXF__V t0 = EXF__LO(r0, r1), t1 = EXF__LO(r2, r3);
  EXF__V t2 = EXF__HI(r0, r1), t3 = EXF__HI(r2, r3);
  r[0] = EXF__LL(t0, t1), r[1] = EXF__HH(t0, t1);
  r[2] = EXF__LL(t2, t3), r[3] = EXF__HH(t2, t3);
}

/* b (k,n) -> panels (k, EXF__NR) one after the other */
EXF__TARGET static void EXF__F(pack_b)(size_t k, size_t n, const float *b, size_t b_row,
                                       size_t b_col, float *out) {
  size_t j, p, p0, i, w;
  if (b_col == 1) {
    for (p0 = 0; p0 < k; p0 += EXF__PACK)
      for (j = 0; j < n; j += EXF__W)
        for (p = p0; p < EXF__MIN(k, p0 + EXF__PACK); p++)
          EXF__STORE(out + j / EXF__NR * EXF__NR * k + p * EXF__NR + j % EXF__NR,
                     EXF__F(get)(b + p * b_row, j, n, 0));
    return;
  }
  for (j = 0; j < n; j += EXF__W, b += EXF__W * b_col) {
    float *o = out + j / EXF__NR * EXF__NR * k + j % EXF__NR;
    w = EXF__MIN(n - j, (size_t)EXF__W);
    p = 0;
    if (b_row == 1 && w == EXF__W)
      for (; p + 4 <= k; p += 4) {
        EXF__V r[4];
        EXF__F(transpose)(b + p, b_col, r);
        EXF__UNROLL
        for (i = 0; i < 4; i++) EXF__STORE(o + (p + i) * EXF__NR, r[i]);
      }
    for (; p < k; p++)
      for (i = 0; i < EXF__W; i++)
        o[p * EXF__NR + i] = i < w ? b[p * b_row + i * b_col] : 0.0f;
  }
}

/* Rows of the next tile, of m that are left */
EXF__INLINE size_t EXF__F(height)(size_t m) {
  return m >= EXF__MR ? EXF__MR : m >= 8 && EXF__MR > 8 ? 8 : m >= 4 ? 4 : m >= 2 ? 2 : 1;
}

/* a (m,k), m <= EXF__MC -> strips (k,height) one after the other. Stores are whole
   vectors and overlap: what one spills behind its row of a strip the next overwrites. */
EXF__TARGET static void EXF__F(pack_a)(size_t m, size_t k, const float *a, size_t a_row,
                                       size_t a_col, float *out) {
  size_t i, p, p0, r, w, mr, chunk = a_row == 1 ? (size_t)EXF__PACK : k;
  for (p0 = 0; p0 < k; p0 += chunk)
    for (i = 0; i < m; i += mr) {
      const float *ai = a + i * a_row;
      float *o = out + i * k;
      size_t end = EXF__MIN(k, p0 + chunk), whole = p0;
      mr = EXF__F(height)(m - i);
      if (mr == EXF__MR && m - i >= EXF__SPILL) whole = end < k ? end : end - 1;
      p = p0;
      if (a_row == 1)
        for (; p < whole; p++)
          for (w = 0; w < EXF__MR; w += EXF__W)
            EXF__STORE(o + p * EXF__MR + w, EXF__LOAD(ai + p * a_col + w));
      else if (a_col == 1)
        for (; p + 4 <= whole; p += 4) {
          EXF__V t[EXF__SPILL / EXF__W][4];
          for (w = 0; w < EXF__SPILL / EXF__W; w++)
            EXF__F(transpose)(ai + w * EXF__W * a_row + p, a_row, t[w]);
          for (r = 0; r < 4; r++)
            for (w = 0; w < EXF__SPILL / EXF__W; w++)
              EXF__STORE(o + (p + r) * EXF__MR + w * EXF__W, t[w][r]);
        }
      for (; p < end; p++)
        for (r = 0; r < mr; r++) o[p * mr + r] = ai[r * a_row + p * a_col];
    }
}

/* nv vectors of columns of C: tiles from top to bottom, over a in place or, with a_row 0,
   packed. next (2): what will be packed next, or NULL */
EXF__INLINE void EXF__F(panel)(const int nv, size_t m, size_t k, const float *a,
                               size_t a_row, size_t a_col, const float *b, size_t b_row,
                               float *c, size_t c_row, size_t cols, int acc,
                               const float *bias, exf__ahead *next) {
  size_t i, mr, step = a_row ? a_row : k, row = a_row ? a_row : 1;
  for (i = 0; i < m; i += mr, a += mr * step, c += mr * c_row) {
    mr = EXF__F(height)(m - i);
    if (next) {
      exf__ahead_fetch(&next[0]);
      exf__ahead_fetch(&next[1]);
    }
    switch (mr) {
#define EXF__X(rows)                                                                  \
  case rows:                                                                          \
    EXF__F(tile)(rows, nv, k, a, row, a_row ? a_col : rows, b, b_row, c, c_row, cols, \
                 acc, bias);                                                          \
    break;
      EXF__X(EXF__MR)
#if EXF__MR > 8
      EXF__X(8)
#endif
#if EXF__MR > 4
      EXF__X(4)
#endif
      EXF__X(2)
      EXF__X(1)
      default: break;
#undef EXF__X
    }
  }
}

/* nv vectors of one row of C, columns of b contiguous (y = W x, of a generating model):
   nothing is packed, b streams through the transposition. */
EXF__INLINE void EXF__F(gemv)(const int nv, size_t k, const float *a, size_t a_col,
                              const float *b, size_t b_col, float *c, int acc,
                              const float *bias) {
  EXF__V s[4], y[4], r[4];
  size_t p, p0, end, i, q;
  int v;
  EXF__UNROLL
  for (v = 0; v < nv; v++) y[v] = EXF__SET(0.0f); /* for GCC's warning at -Os */
  for (p0 = 0; p0 < k; p0 = end) {
    end = EXF__MIN(k, p0 + EXF__KC);
    EXF__UNROLL
    for (v = 0; v < nv; v++) s[v] = EXF__SET(0.0f);
    for (p = p0; p + 16 <= end; p += 16) { /* a cache line of each column at once */
      EXF__UNROLL
      for (v = 0; v < nv; v++)
        for (q = p; q < p + 16; q += 4) {
          EXF__F(transpose)(b + (size_t)v * EXF__W * b_col + q, b_col, r);
          EXF__UNROLL
          for (i = 0; i < 4; i++)
            s[v] = EXF__FMAV(EXF__SET(a[(q + i) * a_col]), r[i], s[v]);
        }
    }
    for (; p < end; p++) {
      EXF__UNROLL
      for (v = 0; v < nv; v++) {
        float t[EXF__W];
        for (i = 0; i < EXF__W; i++) t[i] = b[((size_t)v * EXF__W + i) * b_col + p];
        s[v] = EXF__FMAV(EXF__SET(a[p * a_col]), EXF__LOAD(t), s[v]);
      }
    }
    EXF__UNROLL
    for (v = 0; v < nv; v++) {
      if (p0 > 0) s[v] = y[v] + s[v];
      else if (acc) s[v] = EXF__LOAD(c + v * EXF__W) + s[v];
      y[v] = s[v];
    }
  }
  EXF__UNROLL
  for (v = 0; v < nv; v++)
    EXF__STORE(c + v * EXF__W,
               bias ? (EXF__V)(y[v] + EXF__LOAD(bias + v * EXF__W)) : y[v]);
}

/* For a block of b (EXF__KC, EXF__NC) and one of a (EXF__MC, EXF__KC), which rests in the
   second cache: panel after panel of b, in the first cache, passes over all strips of a
   (the order of Goto and van de Geijn, "Anatomy of high-performance matrix
   multiplication", 2008). With AVX-512 strip after strip of a is in the first cache, and
   the panels pass: C is walked along its rows, which gains a tenth. Scratch: both blocks,
   packed. Where packing would not pay they are read in place: b under few rows, a under
   few columns. While a block is multiplied what follows it along k is fetched: a weight
   gradient over 6,400 rows, which come from memory, gains a sixth. */
EXF__TARGET static void EXF__F(gemm)(size_t m, size_t n, size_t k, const float *a,
                                     size_t a_row, size_t a_col, const float *b,
                                     size_t b_row, size_t b_col, float *c, size_t c_row,
                                     int acc, const float *bias, void *scratch) {
  float *pb = (float *)scratch, *pa = pb + EXF__KC * EXF__NC;
  exf__ahead next[2];
  size_t i, j, jj, r, rows, p, mc, kc, nc, nc_max = m <= EXF__MR ? EXF__NR : EXF__COLS;
  size_t blocks = m / (EXF__MC + 1) + 1; /* of a, of equal height in whole strips */
  size_t mc_max = ((m + blocks - 1) / blocks + EXF__MR - 1) / EXF__MR * EXF__MR;
  if (k == 0) {
    exf__gemm_ref(m, n, k, a, a_row, a_col, b, b_row, b_col, c, c_row, acc, bias, NULL);
    return;
  }
  j = 0;
  if (m == 1 && b_row == 1) {
    for (; j + 4 * EXF__W <= n; j += 4 * EXF__W)
      EXF__F(gemv)(4, k, a, a_col, b + j * b_col, b_col, c + j, acc, bias ? bias + j : 0);
    for (; j + EXF__W <= n; j += EXF__W)
      EXF__F(gemv)(1, k, a, a_col, b + j * b_col, b_col, c + j, acc, bias ? bias + j : 0);
  }
  for (; j < n; j += nc) {
    nc = EXF__MIN(n - j, nc_max);
    for (p = 0; p < k; p += kc) {
      const float *bb = b + p * b_row + j * b_col;
      int acc_p = acc || p > 0, direct, pack;
      size_t bs, step;
      kc = EXF__MIN(k - p, (size_t)EXF__KC);
      direct = b_col == 1 && m <= EXF__DIRECT && nc % EXF__W == 0;
      bs = direct ? b_row : (size_t)EXF__NR;
      step = direct ? 1 : kc;
      pack = nc > (a_col == 1 ? (size_t)EXF__PACK_A : (size_t)EXF__NR);
      if (!direct) {
        EXF__F(pack_b)(kc, nc, bb, b_row, b_col, pb);
        bb = pb;
      }
      for (i = 0; i < m; i += mc) {
        const float *aa = a + i * a_row + p * a_col;
        float *cc = c + i * c_row + j;
        mc = EXF__MIN(m - i, pack ? mc_max : (size_t)EXF__MR);
        if (pack) {
          size_t tiles = (mc + EXF__MR - 1) / EXF__MR * ((nc + EXF__NR - 1) / EXF__NR);
          size_t i1 = i + mc < m ? i + mc : 0, p1 = i1 ? p : p + kc;
          size_t m1 = EXF__MIN(m - i1, mc_max), k1 = EXF__MIN(k - p1, kc);
          exf__ahead_set(&next[0], k1 ? a + i1 * a_row + p1 * a_col : a, m1, k1, a_row,
                         a_col, tiles);
          exf__ahead_set(&next[1], k1 ? b + p1 * b_row + j * b_col : b, i1 ? 0 : k1, nc,
                         b_row, b_col, tiles);
          EXF__F(pack_a)(mc, kc, aa, a_row, a_col, pa);
          aa = pa;
        }
        for (r = 0; r < mc; r += rows) {
          const float *ar = aa + r * (pack ? kc : a_row);
          rows = EXF__MIN(mc - r, (size_t)EXF__ROWS);
          for (jj = 0; jj < nc; jj += EXF__NR) {
            const float *bias_j = bias && p + kc == k ? bias + j + jj : NULL;
            size_t cols = EXF__MIN(nc - jj, (size_t)EXF__NR);
            if (cols > EXF__W)
              EXF__F(panel)(2, rows, kc, ar, pack ? 0 : a_row, a_col, bb + jj * step, bs,
                            cc + r * c_row + jj, c_row, cols, acc_p, bias_j,
                            pack ? next : NULL);
            else
              EXF__F(panel)(1, rows, kc, ar, pack ? 0 : a_row, a_col, bb + jj * step, bs,
                            cc + r * c_row + jj, c_row, cols, acc_p, bias_j,
                            pack ? next : NULL);
          }
        }
      }
    }
  }
}

/* ---- elementary functions */

EXF__INLINE EXF__V EXF__F(abs)(EXF__V x) { return (EXF__V)((EXF__VU)x & 0x7fffffffu); }

EXF__INLINE EXF__V EXF__F(copysign)(EXF__V y, EXF__V x) {
  return (EXF__V)(((EXF__VU)y & 0x7fffffffu) | ((EXF__VU)x & 0x80000000u));
}

/* 2^n for n in (-127, 128) */
EXF__INLINE EXF__V EXF__F(pow2)(EXF__VI n) {
  return (EXF__V)(((EXF__VU)n + 127u) << 23);
}

EXF__INLINE EXF__VI EXF__F(reduce)(EXF__V x, EXF__V *r, EXF__V *p) {
  EXF__V t = EXF__FMAV(x, EXF__SET(EXF__LOG2E), EXF__SET(EXF__MAGIC)), s;
  EXF__V n = t - EXF__SET(EXF__MAGIC);
  *r = EXF__FMAV(n, EXF__SET(-EXF__LN2_HI), x);
  *r = EXF__FMAV(n, EXF__SET(-EXF__LN2_LO), *r);
  s = EXF__FMAV(EXF__SET(EXF__E4), *r, EXF__SET(EXF__E3));
  s = EXF__FMAV(s, *r, EXF__SET(EXF__E2));
  s = EXF__FMAV(s, *r, EXF__SET(EXF__E1));
  *p = EXF__FMAV(s, *r, EXF__SET(EXF__E0));
  return (EXF__VI)((EXF__VU)t - EXF__MAGIC_BITS);
}

EXF__INLINE EXF__V EXF__F(exp)(EXF__V x) {
  EXF__V r, p;
  EXF__VI n, h;
  x = EXF__MAXV(EXF__SET(-104.0f), EXF__MINV(EXF__SET(89.0f), x)); /* keeps NaN */
  n = EXF__F(reduce)(x, &r, &p);
  p = EXF__FMAV(EXF__FMAV(p, r, EXF__SET(1.0f)), r, EXF__SET(1.0f));
  /* 0 by its bits: a product that underflows costs some processors 150 cycles. */
  p = (EXF__V)((EXF__VU)p & ~(EXF__VU)(x == EXF__SET(-104.0f)));
  h = n >> 1;
  return p * EXF__F(pow2)(h) * EXF__F(pow2)(n - h);
}

EXF__INLINE EXF__V EXF__F(expm1)(EXF__V x) {
  EXF__V r, p, s = EXF__F(pow2)(EXF__F(reduce)(x, &r, &p));
  return EXF__FMAV(s, EXF__FMAV(r * r, p, r), s - EXF__SET(1.0f));
}

/* -u - t d, exact: without a fused multiply-add the product is put together from halves
   of 12 bits (Dekker), whose products are exact */
EXF__INLINE EXF__V EXF__F(residual)(EXF__V t, EXF__V d, EXF__V u) {
#if EXF__INSTANCE == 2
  EXF__V p = t * d, c = EXF__SET(4097.0f) * t, th = c - (c - t), tl = t - th, dh, dl;
  c = EXF__SET(4097.0f) * d;
  dh = c - (c - d);
  dl = d - dh;
  return (-u - p) - (((th * dh - p) + th * dl + tl * dh) + tl * dl);
#else
  return EXF__FMAV(-t, d, -u);
#endif
}

EXF__INLINE EXF__V EXF__F(tanh)(EXF__V x) {
  EXF__V u = EXF__SET(-2.0f) * EXF__MINV(EXF__SET(9.5f), EXF__F(abs)(x)), d, e, t;
  u = EXF__F(expm1)(u);
  d = u + EXF__SET(2.0f);
  e = u - (d - EXF__SET(2.0f));
  t = -u / d;
  e = EXF__FMAV(-t, e, EXF__F(residual)(t, d, u));
  t = EXF__FMAV(e, EXF__FMAV(EXF__SET(0.5f), t, EXF__SET(0.5f)), t);
  return EXF__F(copysign)(t, x);
}

EXF__INLINE EXF__V EXF__F(erf)(EXF__V x) {
  EXF__V y = EXF__MINV(EXF__SET(4.0f), EXF__F(abs)(x)), q;
  q = EXF__FMAV(EXF__SET(EXF__Q8), y, EXF__SET(EXF__Q7));
  q = EXF__FMAV(q, y, EXF__SET(EXF__Q6));
  q = EXF__FMAV(q, y, EXF__SET(EXF__Q5));
  q = EXF__FMAV(q, y, EXF__SET(EXF__Q4));
  q = EXF__FMAV(q, y, EXF__SET(EXF__Q3));
  q = EXF__FMAV(q, y, EXF__SET(EXF__Q2));
  q = EXF__FMAV(q, y, EXF__SET(EXF__Q1));
  q = EXF__FMAV(q, y, EXF__SET(EXF__Q0));
  return EXF__F(copysign)(EXF__F(expm1)(-(q * y)), x);
}

/* ---- elementwise */

EXF__INLINE EXF__V EXF__F(f)(const int op, EXF__V x) {
  EXF__V h = EXF__SET(0.5f) * x, one = EXF__SET(1.0f);
  switch (op) {
    case EXF__U_EXP: return EXF__F(exp)(x);
    case EXF__U_TANH: return EXF__F(tanh)(x);
    case EXF__U_RELU: return EXF__MAXV(EXF__SET(0.0f), x);
    case EXF__U_GELU:
      return EXF__FMAV(h, EXF__F(erf)(x * EXF__SET(EXF__INV_SQRT2)), h);
    case EXF__U_GELU_TANH:
      x = x * EXF__FMAV(EXF__SET(EXF__GELU_B), x * x, EXF__SET(EXF__GELU_A));
      return EXF__FMAV(h, EXF__F(tanh)(x), h);
    default: return x / (one + EXF__F(exp)(-x));
  }
}

EXF__INLINE EXF__V EXF__F(df)(const int op, EXF__V x) {
  EXF__V t, u, one = EXF__SET(1.0f), half = EXF__SET(0.5f);
  switch (op) {
    case EXF__U_EXP: return EXF__F(exp)(x);
    case EXF__U_TANH:
      t = EXF__F(tanh)(x);
      return EXF__FMAV(-t, t, one);
    case EXF__U_RELU: return (EXF__V)((EXF__VU)(x > EXF__SET(0.0f)) & (EXF__VU)one);
    case EXF__U_GELU:
      t = EXF__FMAV(half, EXF__F(erf)(x * EXF__SET(EXF__INV_SQRT2)), half);
      u = EXF__F(exp)(-half * x * x) * EXF__SET(EXF__INV_SQRT_2PI);
      return EXF__FMAV(x, u, t);
    case EXF__U_GELU_TANH:
      t = x * EXF__FMAV(EXF__SET(EXF__GELU_B), x * x, EXF__SET(EXF__GELU_A));
      t = EXF__F(tanh)(t);
      x = EXF__MAXV(EXF__SET(-EXF__GELU_FAR), EXF__MINV(EXF__SET(EXF__GELU_FAR), x));
      u = half * x *
          EXF__FMAV(EXF__SET(3 * EXF__GELU_B), x * x, EXF__SET(EXF__GELU_A));
      return EXF__FMAV(u, EXF__FMAV(-t, t, one), EXF__FMAV(half, t, half));
    default:
      t = one / (one + EXF__F(exp)(-x));
      return t * EXF__FMAV(x, one - t, one);
  }
}

/* One loop per op: the switch is decided when compiling. */
#define EXF__OPS(X) X(EXP) X(TANH) X(RELU) X(GELU) X(GELU_TANH) X(SILU)

EXF__TARGET static void EXF__F(unary)(int op, size_t n, const float *x, float *y) {
  size_t i;
  switch (op) {
#define EXF__X(name)                                                                   \
  case EXF__U_##name:                                                                  \
    for (i = 0; i < n; i += EXF__W)                                                    \
      EXF__F(put)(y, i, n, EXF__F(f)(EXF__U_##name, EXF__F(get)(x, i, n, 0)));         \
    break;
    EXF__OPS(EXF__X)
#undef EXF__X
    default: break;
  }
}

/* f and f' of a vector share what they have in common: y costs little more than its
   store. */
EXF__TARGET static void EXF__F(unary_grad)(int op, size_t n, const float *x,
                                           const float *dy, float *dx, int acc,
                                           float *y) {
  size_t i;
  switch (op) {
#define EXF__X(name)                                                                   \
  case EXF__U_##name:                                                                  \
    for (i = 0; i < n; i += EXF__W) {                                                  \
      EXF__V xv = EXF__F(get)(x, i, n, 0), d = EXF__F(get)(dy, i, n, 0);               \
      EXF__V f = EXF__F(df)(EXF__U_##name, xv);                                        \
      f = acc ? EXF__FMAV(d, f, EXF__F(get)(dx, i, n, 0)) : (EXF__V)(d * f);           \
      EXF__F(put)(dx, i, n, f);                                                        \
      if (y) EXF__F(put)(y, i, n, EXF__F(f)(EXF__U_##name, xv));                       \
    }                                                                                  \
    break;
    EXF__OPS(EXF__X)
#undef EXF__X
    default: break;
  }
}
#undef EXF__OPS

EXF__TARGET static void EXF__F(add)(size_t n, const float *a, const float *b, float *y) {
  size_t i;
  for (i = 0; i < n; i += EXF__W)
    EXF__F(put)(y, i, n, EXF__F(get)(a, i, n, 0) + EXF__F(get)(b, i, n, 0));
}

EXF__TARGET static void EXF__F(mul)(size_t n, const float *a, const float *b, float *y,
                                    int acc) {
  size_t i;
  for (i = 0; i < n; i += EXF__W) {
    EXF__V p = EXF__F(get)(a, i, n, 0), q = EXF__F(get)(b, i, n, 0);
    p = acc ? EXF__FMAV(p, q, EXF__F(get)(y, i, n, 0)) : (EXF__V)(p * q);
    EXF__F(put)(y, i, n, p);
  }
}

EXF__TARGET static void EXF__F(axpy)(size_t n, float s, const float *x, float *y,
                                     int acc) {
  EXF__V sv = EXF__SET(s);
  size_t i;
  for (i = 0; i < n; i += EXF__W) {
    EXF__V p = EXF__F(get)(x, i, n, 0);
    p = acc ? EXF__FMAV(sv, p, EXF__F(get)(y, i, n, 0)) : (EXF__V)(sv * p);
    EXF__F(put)(y, i, n, p);
  }
}

/* y [+]= s */
EXF__INLINE void EXF__F(give)(float *y, size_t j, size_t n, EXF__V s, int acc) {
  EXF__F(put)(y, j, n, acc ? (EXF__V)(EXF__F(get)(y, j, n, 0) + s) : s);
}

/* ---- rows and columns; 4 vectors of columns at a time, so that loads fill lines */

EXF__TARGET static void EXF__F(col_sum)(size_t rows, size_t n, size_t row_stride,
                                        const float *x, float *y, int acc) {
  size_t i, j, v;
  for (j = 0; j < n; j += 4 * EXF__W) {
    EXF__V s[4];
    EXF__UNROLL
    for (v = 0; v < 4; v++) s[v] = EXF__SET(0.0f);
    for (i = 0; i < rows; i++) {
      EXF__UNROLL
      for (v = 0; v < 4; v++)
        s[v] += EXF__F(get)(x + i * row_stride, j + v * EXF__W, n, 0);
    }
    EXF__UNROLL
    for (v = 0; v < 4; v++) EXF__F(give)(y, j + v * EXF__W, n, s[v], acc);
  }
}

EXF__TARGET static void EXF__F(layernorm)(size_t rows, size_t n, const float *x,
                                          const float *w, const float *b, float eps,
                                          int rms, float *y, float *mean, float *rstd) {
  size_t r, i, v;
  for (r = 0; r < rows; r++, x += n, y += n) {
    EXF__V l[EXF__NV], mv, rv;
    float mu = 0, rs;
    if (!rms) {
      EXF__F(clear)(l, 0);
      EXF__EACH(i, v, n) l[v] += EXF__F(get)(x, EXF__AT, n, 0);
      mean[r] = mu = EXF__F(fold)(l, 0) / (float)n;
    }
    mv = EXF__SET(mu);
    EXF__F(clear)(l, 0);
    EXF__EACH(i, v, n) {
      EXF__V d = EXF__F(get)(x, EXF__AT, n, mu) - mv;
      l[v] = EXF__FMAV(d, d, l[v]);
    }
    rstd[r] = rs = 1.0f / EXF__SQRT(EXF__F(fold)(l, 0) / (float)n + eps);
    rv = EXF__SET(rs);
    for (i = 0; i < n; i += EXF__W) {
      EXF__V z = (EXF__F(get)(x, i, n, 0) - mv) * rv, g = EXF__F(get)(w, i, n, 0);
      z = b ? EXF__FMAV(z, g, EXF__F(get)(b, i, n, 0)) : (EXF__V)(z * g);
      EXF__F(put)(y, i, n, z);
    }
  }
}

EXF__TARGET static void EXF__F(layernorm_grad)(size_t rows, size_t n, const float *x,
                                               const float *w, const float *mean,
                                               const float *rstd, int rms,
                                               const float *dy, float *dx, int acc) {
  size_t r, i, v;
  for (r = 0; r < rows; r++, x += n, dy += n, dx += n) {
    EXF__V l1[EXF__NV], l2[EXF__NV], g1, g2;
    EXF__V mv = EXF__SET(rms ? 0.0f : mean[r]), rv = EXF__SET(rstd[r]);
    EXF__F(clear)(l1, 0);
    EXF__F(clear)(l2, 0);
    EXF__EACH(i, v, n) {
      EXF__V g = EXF__F(get)(dy, EXF__AT, n, 0) * EXF__F(get)(w, EXF__AT, n, 0);
      EXF__V z = (EXF__F(get)(x, EXF__AT, n, 0) - mv) * rv;
      l1[v] += g;
      l2[v] = EXF__FMAV(g, z, l2[v]);
    }
    g1 = EXF__SET(rms ? 0.0f : EXF__F(fold)(l1, 0) / (float)n);
    g2 = EXF__SET(EXF__F(fold)(l2, 0) / (float)n);
    for (i = 0; i < n; i += EXF__W) {
      EXF__V g = EXF__F(get)(dy, i, n, 0) * EXF__F(get)(w, i, n, 0);
      EXF__V z = (EXF__F(get)(x, i, n, 0) - mv) * rv;
      EXF__F(give)(dx, i, n, rv * EXF__FMAV(-z, g2, g - g1), acc);
    }
  }
}

EXF__TARGET static void EXF__F(layernorm_grad_w)(size_t rows, size_t n, size_t stride,
                                                 const float *x, const float *mean,
                                                 const float *rstd, int rms,
                                                 const float *dy, float *dw, float *db,
                                                 int acc_w, int acc_b) {
  size_t i, j, v;
  for (j = 0; j < n; j += 4 * EXF__W) {
    EXF__V sw[4], sb[4];
    EXF__UNROLL
    for (v = 0; v < 4; v++) sw[v] = sb[v] = EXF__SET(0.0f);
    for (i = 0; i < rows; i++) {
      EXF__V mv = EXF__SET(rms ? 0.0f : mean[i]), rv = EXF__SET(rstd[i]);
      EXF__UNROLL
      for (v = 0; v < 4; v++) {
        EXF__V g = EXF__F(get)(dy + i * stride, j + v * EXF__W, n, 0);
        EXF__V z = (EXF__F(get)(x + i * stride, j + v * EXF__W, n, 0) - mv) * rv;
        sw[v] = EXF__FMAV(g, z, sw[v]);
        sb[v] += g;
      }
    }
    EXF__UNROLL
    for (v = 0; v < 4; v++) {
      if (dw) EXF__F(give)(dw, j + v * EXF__W, n, sw[v], acc_w);
      if (db) EXF__F(give)(db, j + v * EXF__W, n, sb[v], acc_b);
    }
  }
}

EXF__INLINE float EXF__F(dot)(size_t n, const float *a, const float *b) {
  EXF__V l[EXF__NV];
  size_t i, v;
  EXF__F(clear)(l, 0);
  EXF__EACH(i, v, n)
  l[v] = EXF__FMAV(EXF__F(get)(a, EXF__AT, n, 0), EXF__F(get)(b, EXF__AT, n, 0), l[v]);
  return EXF__F(fold)(l, 0);
}

EXF__INLINE float EXF__F(max)(size_t n, const float *x) {
  EXF__V l[EXF__NV];
  size_t i, v;
  float m;
  EXF__F(clear)(l, -HUGE_VALF);
  EXF__EACH(i, v, n)
  l[v] = EXF__MAXV(EXF__F(get)(x, EXF__AT, n, -HUGE_VALF), l[v]);
  m = EXF__F(fold)(l, 1);
  return m == -HUGE_VALF ? 0 : m;
}

EXF__INLINE float EXF__F(exp_sum)(size_t n, const float *x, float m, float *y) {
  EXF__V l[EXF__NV];
  size_t i, v;
  EXF__F(clear)(l, 0);
  EXF__EACH(i, v, n) {
    EXF__V e = EXF__F(exp)(EXF__F(get)(x, EXF__AT, n, -HUGE_VALF) - EXF__SET(m));
    l[v] += e;
    if (y) EXF__F(put)(y, EXF__AT, n, e);
  }
  return EXF__F(fold)(l, 0);
}

EXF__TARGET static void EXF__F(softmax)(size_t rows, size_t n, const float *x,
                                        float *y) {
  size_t r, i;
  for (r = 0; r < rows; r++, x += n, y += n) {
    float s = EXF__F(exp_sum)(n, x, EXF__F(max)(n, x), y);
    s = s == 0 ? 0 : 1 / s;
    for (i = 0; i < n; i += EXF__W)
      EXF__F(put)(y, i, n, EXF__F(get)(y, i, n, 0) * EXF__SET(s));
  }
}

EXF__TARGET static void EXF__F(softmax_grad)(size_t rows, size_t n, const float *y,
                                             const float *dy, float *dx, int acc) {
  size_t r, i;
  for (r = 0; r < rows; r++, y += n, dy += n, dx += n) {
    EXF__V s = EXF__SET(EXF__F(dot)(n, y, dy));
    for (i = 0; i < n; i += EXF__W) {
      EXF__V p = EXF__F(get)(y, i, n, 0), d = EXF__F(get)(dy, i, n, 0) - s;
      d = acc ? EXF__FMAV(p, d, EXF__F(get)(dx, i, n, 0)) : (EXF__V)(p * d);
      EXF__F(put)(dx, i, n, d);
    }
  }
}

EXF__TARGET static void EXF__F(log_softmax)(size_t rows, size_t n, const float *x,
                                            float *y) {
  size_t r, i;
  for (r = 0; r < rows; r++, x += n, y += n) {
    float m = EXF__F(max)(n, x), s = EXF__F(exp_sum)(n, x, m, NULL);
    EXF__V lse = EXF__SET(m + exf__log(s)), zero = EXF__SET(0.0f);
    for (i = 0; i < n; i += EXF__W)
      EXF__F(put)(y, i, n, s == 0 ? zero : (EXF__V)(EXF__F(get)(x, i, n, 0) - lse));
  }
}

EXF__TARGET static void EXF__F(log_softmax_grad)(size_t rows, size_t n, const float *y,
                                                 const float *dy, float *dx, int acc) {
  size_t r, i, v;
  for (r = 0; r < rows; r++, y += n, dy += n, dx += n) {
    EXF__V l[EXF__NV], s;
    int empty = n > 1 && y[0] == 0 && y[1] == 0;
    EXF__F(clear)(l, 0);
    EXF__EACH(i, v, n) l[v] += EXF__F(get)(dy, EXF__AT, n, 0);
    s = EXF__SET(EXF__F(fold)(l, 0));
    for (i = 0; i < n; i += EXF__W) {
      EXF__V e = EXF__F(exp)(EXF__F(get)(y, i, n, 0));
      e = EXF__FMAV(-e, s, EXF__F(get)(dy, i, n, 0));
      EXF__F(give)(dx, i, n, empty ? EXF__SET(0.0f) : e, acc);
    }
  }
}

EXF__TARGET static void EXF__F(cross_entropy)(size_t rows, size_t n, const float *x,
                                              const int32_t *labels, float smoothing,
                                              float *row_loss, float *lse) {
  size_t r, i, v;
  for (r = 0; r < rows; r++, x += n) {
    EXF__V l[EXF__NV];
    float m, s;
    row_loss[r] = lse[r] = 0;
    if (labels[r] < 0) continue;
    m = EXF__F(max)(n, x);
    s = exf__log(EXF__F(exp_sum)(n, x, m, NULL));
    lse[r] = m + s;
    s -= (1 - smoothing) * (x[labels[r]] - m);
    if (smoothing != 0) {
      EXF__F(clear)(l, 0);
      EXF__EACH(i, v, n) l[v] += EXF__F(get)(x, EXF__AT, n, m) - EXF__SET(m);
      s -= smoothing / (float)n * EXF__F(fold)(l, 0);
    }
    row_loss[r] = s;
  }
}

/* The whole row with q = smoothing / n, then the label's entry once more. */
EXF__TARGET static void EXF__F(cross_entropy_grad)(size_t rows, size_t n, const float *x,
                                                   const int32_t *labels,
                                                   const float *lse, float smoothing,
                                                   float g, float *dx, int acc) {
  size_t r, i;
  float q0 = smoothing / (float)n, q1 = q0 + (1 - smoothing);
  for (r = 0; r < rows; r++, x += n, dx += n) {
    float old, d;
    if (labels[r] < 0) {
      for (i = 0; i < n; i++) dx[i] = acc ? dx[i] + 0.0f : 0.0f;
      continue;
    }
    old = acc ? dx[labels[r]] : 0.0f;
    for (i = 0; i < n; i += EXF__W) {
      EXF__V e = EXF__F(exp)(EXF__F(get)(x, i, n, 0) - EXF__SET(lse[r]));
      EXF__F(give)(dx, i, n, EXF__SET(g) * (e - EXF__SET(q0)), acc);
    }
    d = g * (exf__exp(x[labels[r]] - lse[r]) - q1);
    dx[labels[r]] = acc ? old + d : d;
  }
}

/* x, with fill in the lanes i .. i + EXF__W - 1 that are below first */
EXF__INLINE EXF__V EXF__F(hide)(EXF__V x, size_t i, size_t first, float fill) {
  EXF__V lane = EXF__LOAD(exf__iota) + EXF__SET((float)i);
  EXF__VU hidden = (EXF__VU)(lane < EXF__SET((float)first));
  return (EXF__V)(((EXF__VU)x & ~hidden) | ((EXF__VU)EXF__SET(fill) & hidden));
}

/* Strips of keys pass over whole vectors of queries, zeros past the last. A product that
   may not touch the columns past it costs twice as much for a tail of two. */
EXF__TARGET static void EXF__F(att_scores)(size_t nk, size_t rows, size_t d,
                                           const float *k, size_t k_stride,
                                           const float *q, size_t q_stride, float *s,
                                           void *scratch) {
  float *pq = (float *)scratch;
  size_t i, j, p, mr, kc;
  for (p = 0; p < d; p += kc, k += kc) {
    kc = EXF__MIN(d - p, (size_t)EXF__KC);
    EXF__F(pack_b)(kc, rows, q + p, 1, q_stride, pq);
    for (i = 0; i < nk; i += mr) {
      const float *ki = k + i * k_stride;
      float *si = s + i * EXF__ATT;
      mr = EXF__MIN(nk - i, (size_t)EXF__MR);
      for (j = 0; j < rows; j += EXF__NR)
        if (rows - j > EXF__W)
          EXF__F(panel)(2, mr, kc, ki, k_stride, 1, pq + j * kc, EXF__NR, si + j,
                        EXF__ATT, EXF__NR, p > 0, NULL, NULL);
        else
          EXF__F(panel)(1, mr, kc, ki, k_stride, 1, pq + j * kc, EXF__NR, si + j,
                        EXF__ATT, EXF__W, p > 0, NULL, NULL);
    }
  }
}

EXF__TARGET static void EXF__F(att_softmax)(size_t nk, size_t rows, size_t len,
                                            int causal, float scale, float *s, float *m,
                                            float *inv) {
  size_t i, j, seen = causal ? EXF__MIN(len, nk) : nk;  /* by every query */
  EXF__V sv = EXF__SET(scale), low = EXF__SET(-HUGE_VALF), one = EXF__SET(1.0f);
  for (i = 0; i < rows; i += EXF__W, s += EXF__W) {
    EXF__V top = low, sum = EXF__SET(0.0f);
    for (j = 0; j < nk; j++) {
      EXF__V x = EXF__LOAD(s + j * EXF__ATT) * sv;
      if (j >= seen) x = EXF__F(hide)(x, i, j - seen + 1, -HUGE_VALF);
      top = EXF__MAXV(x, top);
      EXF__STORE(s + j * EXF__ATT, x);
    }
    top = (EXF__V)((EXF__VU)top & ~(EXF__VU)(top == low));
    for (j = 0; j < nk; j++) {
      EXF__V e = EXF__F(exp)(EXF__LOAD(s + j * EXF__ATT) - top);
      sum += e;
      EXF__STORE(s + j * EXF__ATT, e);
    }
    EXF__F(put)(m, i, rows, top);
    sum = (EXF__V)((EXF__VU)(one / sum) & ~(EXF__VU)(sum == EXF__SET(0.0f)));
    EXF__F(put)(inv, i, rows, sum);
  }
}

EXF__TARGET static void EXF__F(att_softmax_grad)(size_t nk, size_t rows, size_t len,
                                                 int causal, float scale, const float *m,
                                                 const float *inv, const float *D,
                                                 float *s, float *dp) {
  size_t i, j, seen = causal ? EXF__MIN(len, nk) : nk;
  EXF__V sv = EXF__SET(scale);
  for (i = 0; i < rows; i += EXF__W, s += EXF__W, dp += EXF__W) {
    EXF__V mv = EXF__F(get)(m, i, rows, 0), iv = EXF__F(get)(inv, i, rows, 0);
    EXF__V Dv = EXF__F(get)(D, i, rows, 0);
    for (j = 0; j < nk; j++) {
      EXF__V p = sv * EXF__LOAD(s + j * EXF__ATT) - mv;
      EXF__V d = EXF__LOAD(dp + j * EXF__ATT) - Dv;
      p = EXF__F(exp)(p) * iv;
      if (j >= seen) p = EXF__F(hide)(p, i, j - seen + 1, 0);
      EXF__STORE(s + j * EXF__ATT, p);
      EXF__STORE(dp + j * EXF__ATT, sv * (p * d));
    }
  }
}

/* ---- experts and the optimizer */

EXF__TARGET static void EXF__F(fuse)(size_t n_experts, size_t size, size_t stride,
                                     const float *a, const float *e, float *out) {
  size_t i, j;
  for (j = 0; j < size; j += EXF__W) {
    EXF__V s = EXF__SET(a[0]) * EXF__F(get)(e, j, size, 0);
    for (i = 1; i < n_experts; i++)
      s = EXF__FMAV(EXF__SET(a[i]), EXF__F(get)(e + i * stride, j, size, 0), s);
    EXF__F(put)(out, j, size, s);
  }
}

EXF__TARGET static void EXF__F(dots)(size_t n_experts, size_t size, size_t stride,
                                     const float *g, const float *e, double *out) {
  size_t i, j;
  for (j = 0; j < size; j += EXF__SUM_BLOCK)
    for (i = 0; i < n_experts; i++)
      out[i] += (double)EXF__F(dot)(EXF__MIN(size - j, (size_t)EXF__SUM_BLOCK), g + j,
                                    e + i * stride + j);
}

EXF__TARGET static double EXF__F(sumsq)(size_t n, const float *x) {
  double s = 0;
  EXF__F(dots)(1, n, 0, x, x, &s);
  return s;
}

/* m and v of a vector of gradients, and the step they ask for */
EXF__INLINE EXF__V EXF__F(adam)(EXF__V g, float *m, float *v, size_t j, size_t n,
                                const exf__adamw_args *args) {
  EXF__V b1 = EXF__SET(args->beta1), c1 = EXF__SET(args->one_minus_beta1);
  EXF__V b2 = EXF__SET(args->beta2), c2 = EXF__SET(args->one_minus_beta2);
  EXF__V mm = EXF__FMAV(b1, EXF__F(get)(m, j, n, 0), c1 * g);
  EXF__V vv = EXF__FMAV(b2, EXF__F(get)(v, j, n, 0), c2 * (g * g));
  EXF__F(put)(m, j, n, mm);
  EXF__F(put)(v, j, n, vv);
  return EXF__SET(args->step) * mm /
         (EXF__SQRTV(vv) * EXF__SET(args->inv_sqrt_bias2) + EXF__SET(args->eps));
}

EXF__TARGET static void EXF__F(adamw)(size_t n_experts, size_t size, size_t stride,
                                      float *p, const float *g, float *m, float *v,
                                      const exf__adamw_args *args,
                                      const float *gscale) {
  EXF__V clip = EXF__SET(args->clip), decay = EXF__SET(args->decay);
  size_t i, j, j0;
  for (j0 = 0; j0 < size; j0 += EXF__ADAM_BLOCK)
    for (i = 0; i < n_experts; i++) {
      float *pi = p + i * stride, *mi = m + i * stride, *vi = v + i * stride;
      EXF__V gs = EXF__SET(gscale[i]);
      size_t end = EXF__MIN(size, j0 + EXF__ADAM_BLOCK);
      for (j = j0; j < end; j += EXF__W) {
        EXF__V ge = gs * (clip * EXF__F(get)(g, j, end, 0));
        EXF__V pp = EXF__F(get)(pi, j, end, 0) * decay;
        EXF__F(put)(pi, j, end, pp - EXF__F(adam)(ge, mi, vi, j, end, args));
      }
    }
}

EXF__TARGET static void EXF__F(adamw_shared)(size_t n_experts, size_t size,
                                             size_t stride, float *p, const float *g,
                                             float *m, float *v,
                                             const exf__adamw_args *args,
                                             const float *sign) {
  EXF__V clip = EXF__SET(args->clip), decay = EXF__SET(args->decay), step;
  size_t i, j;
  for (j = 0; j < size; j += EXF__W) {
    step = EXF__F(adam)(clip * EXF__F(get)(g, j, size, 0), m, v, j, size, args);
    for (i = 0; i < n_experts; i++) {
      float *pi = p + i * stride;
      EXF__V pp = EXF__F(get)(pi, j, size, 0) * decay;
      EXF__F(put)(pi, j, size, pp - EXF__SET(sign[i]) * step);
    }
  }
}

#undef EXF__ALL
#undef EXF__F
#undef EXF__TARGET
#undef EXF__INLINE
#undef EXF__W
#undef EXF__MR
#undef EXF__NV
#undef EXF__NR
#undef EXF__COLS
#undef EXF__ROWS
#undef EXF__PACK_A
#undef EXF__SPILL
#undef EXF__V
#undef EXF__VI
#undef EXF__VU
#undef EXF__SET
#undef EXF__LOAD
#undef EXF__STORE
#undef EXF__FMAV
#undef EXF__MAXV
#undef EXF__MINV
#undef EXF__SQRTV
#undef EXF__LO
#undef EXF__HI
#undef EXF__LL
#undef EXF__HH
#undef EXF__EACH
#undef EXF__AT
#endif /* EXF__INSTANCE */

#ifndef EXF__INSTANCE
#if EXF__X86 || EXF__ARM

#ifndef EXF_HEADER_NAME
#define EXF_HEADER_NAME "exfusion.h"
#endif

/* Blocks of the matrix product: EXF__KC x EXF__NC of b, EXF__MC x EXF__KC of a, with room
   for the last spill */
#define EXF__NC 1024
#define EXF__MC 264
#define EXF__GEMM_SCRATCH ((EXF__KC * (EXF__NC + EXF__MC) + 16) * sizeof(float))
#define EXF__PACK 8      /* packing goes along so many of the k rows at once */
#define EXF__ADAM_BLOCK 4096  /* of G, in the first cache from expert to expert */
#define EXF__DIRECT 96  /* up to this many rows, b is not packed if it need not be */
#if defined(__clang__)
#define EXF__UNROLL
#else
#define EXF__UNROLL _Pragma("GCC unroll 16")
#endif

/* A block of a matrix on its way to the cache: n lines at a time */
typedef struct exf__ahead {
  const float *at;                 /* the row: width floats, stride to the next */
  size_t rows, width, stride, j, n;
} exf__ahead;

/* A block (rows,cols), nothing when it has no rows, in `times` fetches */
static void exf__ahead_set(exf__ahead *h, const float *at, size_t rows, size_t cols,
                           size_t row, size_t col, size_t times) {
  h->at = at;
  h->rows = col == 1 ? rows : cols;
  h->width = col == 1 ? cols : rows;
  h->stride = col == 1 ? row : col;
  h->j = 0;
  if (rows == 0 || cols == 0 || (row != 1 && col != 1)) h->rows = 0;
  h->n = (h->rows * ((h->width + 15) / 16) + times - 1) / times;
}

static inline void exf__ahead_fetch(exf__ahead *h) {
  size_t i;
  for (i = 0; i < h->n && h->rows; i++) {
    __builtin_prefetch(h->at + h->j);
    h->j += 16;
    if (h->j < h->width) continue;
    h->j = 0;
    h->at += h->stride;
    h->rows--;
  }
}

static const float exf__iota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

#if EXF__X86
#define EXF__INSTANCE 2
#include EXF_HEADER_NAME
#undef EXF__INSTANCE
EXF__ATTENTION(sse2, EXF__GEMM_SCRATCH)
static const exf__kernels exf__kernels_sse2 = EXF__TABLE(SSE2, sse2, EXF__GEMM_SCRATCH);
#define EXF__INSTANCE 3
#include EXF_HEADER_NAME
#undef EXF__INSTANCE
EXF__ATTENTION(avx2, EXF__GEMM_SCRATCH)
static const exf__kernels exf__kernels_avx2 = EXF__TABLE(AVX2, avx2, EXF__GEMM_SCRATCH);
#define EXF__INSTANCE 4
#include EXF_HEADER_NAME
#undef EXF__INSTANCE
EXF__ATTENTION(avx512, EXF__GEMM_SCRATCH)
static const exf__kernels exf__kernels_avx512 =
    EXF__TABLE(AVX512, avx512, EXF__GEMM_SCRATCH);
#else
#define EXF__INSTANCE 5
#include EXF_HEADER_NAME
#undef EXF__INSTANCE
EXF__ATTENTION(neon, EXF__GEMM_SCRATCH)
static const exf__kernels exf__kernels_neon = EXF__TABLE(NEON, neon, EXF__GEMM_SCRATCH);
#endif

#endif /* EXF__X86 || EXF__ARM */

/* NULL when this build or this processor (or its system) lacks the instruction set. */
static const exf__kernels *exf__kernels_for(exf_isa isa) {
#if EXF__X86
  __builtin_cpu_init();
  if (isa == EXF_ISA_SSE2 && __builtin_cpu_supports("sse2")) return &exf__kernels_sse2;
  if (isa == EXF_ISA_AVX2 && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma"))
    return &exf__kernels_avx2;
  if (isa == EXF_ISA_AVX512 && __builtin_cpu_supports("avx512f"))
    return &exf__kernels_avx512;
#elif EXF__ARM
  if (isa == EXF_ISA_NEON) return &exf__kernels_neon;
#endif
  return isa == EXF_ISA_REF ? &exf__kernels_ref : NULL;
}

static const exf__kernels *exf__kernels_best(void) {
  static const exf_isa order[] = {EXF_ISA_AVX512, EXF_ISA_AVX2, EXF_ISA_SSE2,
                                  EXF_ISA_NEON};
  size_t i;
  for (i = 0; i < sizeof order / sizeof *order; i++)
    if (exf__kernels_for(order[i])) return exf__kernels_for(order[i]);
  return &exf__kernels_ref;
}

#endif /* EXF__INSTANCE */

#ifndef EXF__INSTANCE

/* ---- context, memory, errors ------------------------------------------ >>memory */

/* Two lifetimes: blocks that live until freed (parameters, moments, caches) and the
   step arena, a chain of chunks that exf_rewind empties without giving anything back:
   from the second step on nothing is allocated. Every block starts on a cache line. */
#define EXF__ALIGN 64
/* Bytes of a new chunk when the arena holds so many; a test may want every request to be
   one. */
#ifndef EXF__CHUNK
#define EXF__CHUNK(held) EXF__MAX((size_t)1 << 20, (held) / 4)
#endif

typedef struct exf__block {     /* stands in front of every block */
  void *base;                   /* what the allocator returned */
  size_t bytes;                 /* as asked of the allocator */
} exf__block;

typedef struct exf__chunk {
  struct exf__chunk *next;
  size_t size, used;            /* bytes of data */
  unsigned char *data;
} exf__chunk;

typedef struct exf__gbuf {      /* a gradient being gathered, possibly for two tensors */
  exf_real *data;
  size_t n;
  int refs;
  struct exf__gbuf *next;       /* in the list of free ones */
} exf__gbuf;

static const exf_files *exf__files_default(void);   /* section files */

typedef struct exf__pace {      /* how fast one kind of job is split and not */
  uintptr_t job;
  double rate[2];               /* seconds for a unit of work: one thread, a team */
  unsigned left, wait;          /* turns until the other way is tried; the last wait */
  int team;                     /* the better way */
} exf__pace;
#define EXF__N_PACES 16

struct exf_ctx {
  exf_desc desc;
  exf_files files;
  const struct exf__kernels *k;
  int n_threads;
  exf_status status;
  char message[512];
  int training, grad_on, routing;
  uint32_t step;                /* keys the random draws, with the count of calls */
  uint32_t n_dropouts;
  exf__chunk *first, *chunk;    /* the arena, and the chunk being filled */
  size_t arena_bytes;           /* held by all chunks */
  size_t arena_used;
  struct exf__node *tape;       /* the op recorded last */
  uint64_t n_tapes;             /* used up or rewound so far */
  exf__gbuf *free_gbufs;
  void **scratch;               /* (n_threads) work space of the kernels */
  size_t scratch_bytes;         /* of each */
  exf__pace paces[EXF__N_PACES];
  exf_stats stats;
};

static void *exf__malloc(void *user, size_t bytes) {
  (void)user;
  return malloc(bytes);
}

static void exf__mfree(void *user, void *block) {
  (void)user;
  free(block);
}

EXF_API const char *exf_status_name(exf_status status) {
  static const char *const names[] = {
#define EXF__X(name, text) "EXF_" #name,
      EXF_STATUS_LIST(EXF__X)
#undef EXF__X
  };
  return (unsigned)status < (unsigned)EXF_N_STATUS ? names[status] : "EXF_?";
}

EXF_API exf_status exf_fail(exf_ctx *ctx, exf_status status, const char *format, ...) {
  va_list args;
  if (!ctx || ctx->status != EXF_OK || status == EXF_OK) return status;
  ctx->status = status;
  va_start(args, format);
  vsnprintf(ctx->message, sizeof ctx->message, format, args);
  va_end(args);
  return status;
}

static void exf__notice(exf_ctx *ctx, const char *format, ...) {
  char line[512];
  va_list args;
  if (!ctx->desc.log) return;
  va_start(args, format);
  vsnprintf(line, sizeof line, format, args);
  va_end(args);
  ctx->desc.log(ctx->desc.log_user, line);
}

static void *exf__alloc(exf_ctx *ctx, size_t bytes) {
  size_t total;
  unsigned char *base, *data;
  exf__block *head;
  if (!exf__add_size(bytes, EXF__ALIGN + sizeof(exf__block), &total)) {
    exf_fail(ctx, EXF_SIZE, "memory: %zu bytes do not fit into size_t", bytes);
    return NULL;
  }
  base = (unsigned char *)ctx->desc.alloc(ctx->desc.alloc_user, total);
  if (!base) {
    exf_fail(ctx, EXF_MEMORY, "memory: the allocator refused %zu bytes: free some, or "
             "use a smaller model or batch", bytes);
    return NULL;
  }
  data = base + sizeof(exf__block);
  data += (EXF__ALIGN - (uintptr_t)data % EXF__ALIGN) % EXF__ALIGN;
  head = (exf__block *)(void *)(data - sizeof(exf__block));
  head->base = base;
  head->bytes = total;
  ctx->stats.n_allocs++;
  ctx->stats.bytes += total;
  ctx->stats.bytes_peak = EXF__MAX(ctx->stats.bytes_peak, ctx->stats.bytes);
  return data;
}

static void exf__free(exf_ctx *ctx, void *data) {
  exf__block *head;
  if (!data) return;
  head = (exf__block *)(void *)((unsigned char *)data - sizeof(exf__block));
  ctx->stats.bytes -= head->bytes;
  ctx->desc.free(ctx->desc.alloc_user, head->base);
}

static void *exf__alloc_n(exf_ctx *ctx, size_t n, size_t size) {
  size_t bytes;
  if (!exf__mul_size(n, size, &bytes)) {
    exf_fail(ctx, EXF_SIZE, "memory: %zu x %zu bytes do not fit into size_t", n, size);
    return NULL;
  }
  return exf__alloc(ctx, bytes);
}

static void *exf__calloc_n(exf_ctx *ctx, size_t n, size_t size) {
  void *data = exf__alloc_n(ctx, n, size);
  if (data && n && size) memset(data, 0, n * size);
  return data;
}

/* n elements of the step arena; not cleared. */
static void *exf__arena(exf_ctx *ctx, size_t n, size_t size) {
  size_t bytes, want;
  exf__chunk *c;
  if (!ctx || ctx->status != EXF_OK) return NULL;
  if (!exf__mul_size(n, size, &bytes) || bytes > SIZE_MAX - 2 * EXF__ALIGN) {
    exf_fail(ctx, EXF_SIZE, "memory: %zu x %zu bytes do not fit into size_t", n, size);
    return NULL;
  }
  bytes = (bytes + EXF__ALIGN - 1) / EXF__ALIGN * EXF__ALIGN;
  while (ctx->chunk && bytes > ctx->chunk->size - ctx->chunk->used && ctx->chunk->next) {
    ctx->chunk = ctx->chunk->next;
    ctx->chunk->used = 0;
  }
  if (!ctx->chunk || bytes > ctx->chunk->size - ctx->chunk->used) {
    want = EXF__MAX(bytes, EXF__CHUNK(ctx->arena_bytes));
    c = (exf__chunk *)exf__alloc(ctx, sizeof(exf__chunk));
    if (!c) return NULL;
    c->data = (unsigned char *)exf__alloc(ctx, want);
    if (!c->data) {
      exf__free(ctx, c);
      return NULL;
    }
    c->next = NULL;
    c->size = want;
    c->used = 0;
    ctx->arena_bytes += want;
    if (ctx->chunk) ctx->chunk->next = c;
    else ctx->first = c;
    ctx->chunk = c;
  }
  ctx->chunk->used += bytes;
  ctx->arena_used += bytes;
  ctx->stats.arena_peak = EXF__MAX(ctx->stats.arena_peak, ctx->arena_used);
  return ctx->chunk->data + (ctx->chunk->used - bytes);
}

EXF_API void exf_rewind(exf_ctx *ctx) {
  if (!ctx) return;
  ctx->chunk = ctx->first;
  if (ctx->chunk) ctx->chunk->used = 0;
  ctx->arena_used = 0;
  ctx->tape = NULL;
  ctx->n_tapes++;
  ctx->free_gbufs = NULL;
}

EXF_API exf_isa exf_isa_get(const exf_ctx *ctx) {
  return ctx ? ctx->k->isa : EXF_ISA_AUTO;
}

EXF_API const char *exf_isa_name(exf_isa isa) {
  static const char *const names[] = {"auto", "ref", "sse2", "avx2", "avx512", "neon"};
  return (unsigned)isa < 6u ? names[isa] : "?";
}

EXF_API exf_status exf_isa_set(exf_ctx *ctx, exf_isa isa) {
  const exf__kernels *k = isa == EXF_ISA_AUTO ? exf__kernels_best()
                                              : exf__kernels_for(isa);
  if (!ctx) return EXF_ARG;
  if (!k)
    return exf_fail(ctx, EXF_ARG, "isa: %s is not available on this processor or in "
                    "this build: use auto or ref", exf_isa_name(isa));
  ctx->k = k;
  return EXF_OK;
}

EXF_API exf_ctx *exf_ctx_new(const exf_desc *desc) {
  exf_desc d;
  exf_ctx *ctx;
  memset(&d, 0, sizeof d);
  if (desc) d = *desc;
  if (!d.alloc || !d.free) {
    d.alloc = exf__malloc;
    d.free = exf__mfree;
  }
  ctx = (exf_ctx *)d.alloc(d.alloc_user, sizeof(exf_ctx));
  if (!ctx) return NULL;
  memset(ctx, 0, sizeof *ctx);
  ctx->desc = d;
  ctx->grad_on = 1;
  ctx->n_threads = d.n_threads;
#if EXF__OPENMP
  if (ctx->n_threads <= 0) ctx->n_threads = omp_get_num_procs();
#endif
  ctx->n_threads = EXF__MIN(EXF__MAX(ctx->n_threads, 1), 256);
  if (d.files) ctx->files = *d.files;
  else if (exf__files_default()) ctx->files = *exf__files_default();
  ctx->k = exf__kernels_best();
  ctx->stats.n_allocs = 1;
  ctx->stats.bytes = ctx->stats.bytes_peak = sizeof(exf_ctx);
  exf_isa_set(ctx, d.isa);
  ctx->scratch = (void **)exf__calloc_n(ctx, (size_t)ctx->n_threads, sizeof(void *));
  if (!ctx->scratch) {
    exf_ctx_free(ctx);
    return NULL;
  }
  return ctx;
}

EXF_API void exf_ctx_free(exf_ctx *ctx) {
  exf__chunk *c, *next;
  int i;
  if (!ctx) return;
  for (c = ctx->first; c; c = next) {
    next = c->next;
    exf__free(ctx, c->data);
    exf__free(ctx, c);
  }
  for (i = 0; ctx->scratch && i < ctx->n_threads; i++) exf__free(ctx, ctx->scratch[i]);
  exf__free(ctx, ctx->scratch);
  ctx->desc.free(ctx->desc.alloc_user, ctx);
}

EXF_API exf_status exf_ctx_status(const exf_ctx *ctx) {
  return ctx ? ctx->status : EXF_MEMORY;
}

EXF_API const char *exf_error(const exf_ctx *ctx) {
  return ctx ? ctx->message : "memory: the context could not be allocated";
}

EXF_API void exf_error_clear(exf_ctx *ctx) {
  if (!ctx) return;
  ctx->status = EXF_OK;
  ctx->message[0] = 0;
}

EXF_API exf_stats exf_ctx_stats(const exf_ctx *ctx) {
  static const exf_stats none = {0, 0, 0, 0, 0};
  return ctx ? ctx->stats : none;
}

EXF_API int exf_threads_get(const exf_ctx *ctx) { return ctx ? ctx->n_threads : 0; }
EXF_API uint64_t exf_seed_get(const exf_ctx *ctx) { return ctx ? ctx->desc.seed : 0; }

EXF_API int exf_training_set(exf_ctx *ctx, int on) {
  int was = ctx && ctx->training;
  if (ctx) ctx->training = on != 0;
  return was;
}

EXF_API int exf_grad_set(exf_ctx *ctx, int on) {
  int was = ctx && ctx->grad_on;
  if (ctx) ctx->grad_on = on != 0;
  return was;
}

EXF_API int exf_routing_set(exf_ctx *ctx, int on) {
  int was = ctx && ctx->routing;
  if (ctx) ctx->routing = on != 0;
  return was;
}

EXF_API void exf_step_begin(exf_ctx *ctx, uint64_t step) {
  if (!ctx) return;
  ctx->step = (uint32_t)step;
  ctx->n_dropouts = 0;
}

/* Runs job over [0, n) in pieces that begin at multiples of grain, one per thread: what
   is split is always the output, so the bits do not depend on the number of threads.
   work: roughly the operations in all; little work stays on one thread. bytes: scratch
   that each piece receives. */
typedef void exf__job(void *arg, size_t begin, size_t end, void *scratch);

#define EXF__THREAD_WORK 2e6

/* A team waits for its slowest thread, and on a busy machine one may not be running at
   all: then one thread is many times faster. So both ways are timed, job by job: the
   better one is taken, the other tried again after 16 to 1024 turns. */
#if EXF__OPENMP
static exf__pace *exf__pace_of(exf_ctx *ctx, exf__job *job) {
  union { exf__job *job; uintptr_t bits; } key;
  exf__pace *p;
  size_t i;
  key.job = job;
  for (i = 0; i < EXF__N_PACES; i++) {
    p = &ctx->paces[(key.bits / 16 + i) % EXF__N_PACES];
    if (p->job == 0) p->team = 1;
    if (p->job == 0 || p->job == key.bits) break;
  }
  p->job = key.bits;
  return p;
}

static int exf__pace_team(exf__pace *p) { return p->left == 0 ? !p->team : p->team; }

/* rate: seconds for each unit of work, this time */
static void exf__pace_update(exf__pace *p, int team, double rate) {
  double *r = &p->rate[team], other = p->rate[!team];
  *r = team == p->team && *r > 0 ? 0.75 * *r + 0.25 * rate : rate;
  if (team == p->team && !(other > 0 && *r > 1.5 * other)) {
    p->left--;
    return;
  }
  p->wait = EXF__MIN(2 * EXF__MAX(p->wait, 8u), 1024u);
  if (team == p->team || *r < other) {
    p->team = team == p->team ? !team : team;
    p->wait = 16;
  }
  p->left = p->wait;
}
#endif

static void exf__parallel(exf_ctx *ctx, size_t n, size_t grain, double work,
                          size_t bytes, exf__job *job, void *arg) {
  int t, i, n_threads = ctx->n_threads;
  size_t pieces = (n + grain - 1) / grain;
#if EXF__OPENMP
  exf__pace *pace = NULL;
  double start = 0;
#endif
  if (n == 0) return;
  if (work < EXF__THREAD_WORK || !EXF__OPENMP) n_threads = 1;
  if ((size_t)n_threads > pieces) n_threads = (int)pieces;
#if EXF__OPENMP
  if (n_threads > 1) {
    pace = exf__pace_of(ctx, job);
    if (!exf__pace_team(pace)) n_threads = 1;
    start = omp_get_wtime();
  }
#endif
  if (bytes > ctx->scratch_bytes) {
    for (i = 0; i < ctx->n_threads; i++) {
      exf__free(ctx, ctx->scratch[i]);
      ctx->scratch[i] = NULL;
    }
    ctx->scratch_bytes = bytes;
  }
  for (i = 0; bytes && i < n_threads; i++)
    if (!ctx->scratch[i] && !(ctx->scratch[i] = exf__alloc(ctx, ctx->scratch_bytes)))
      return;
#if EXF__OPENMP
#pragma omp parallel for schedule(static, 1) num_threads(n_threads) if (n_threads > 1)
#endif
  for (t = 0; t < n_threads; t++) {
    size_t begin = pieces * (size_t)t / (size_t)n_threads * grain;
    size_t end = pieces * ((size_t)t + 1) / (size_t)n_threads * grain;
    if (end > n) end = n;
    if (begin < end) job(arg, begin, end, ctx->scratch[t]);
  }
#if EXF__OPENMP
  if (pace) exf__pace_update(pace, n_threads > 1, (omp_get_wtime() - start) / work);
#endif
}

/* ---- random numbers --------------------------------------------------- >>random */

/* Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as
   1, 2, 3", 2011): ten rounds of multiply and xor turn a counter into four numbers. */
static void exf__philox(uint64_t seed, uint32_t stream, uint32_t step, uint64_t block,
                        uint32_t out[4]) {
  uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = step, c3 = stream;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  int round;
  for (round = 0; round < 10; round++) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

EXF_API uint32_t exf_rng_u32(uint64_t seed, uint32_t stream, uint32_t step,
                             uint64_t index) {
  uint32_t r[4];
  exf__philox(seed, stream, step, index >> 2, r);
  return r[index & 3];
}

EXF_API double exf_rng_uniform(uint64_t seed, uint32_t stream, uint32_t step,
                               uint64_t index) {
  uint32_t r[4];
  exf__philox(seed, stream, step, index, r);
  return (double)((((uint64_t)r[0] << 32) | r[1]) >> 11) / 9007199254740992.0; /* 2^53 */
}

/* Box and Muller: sqrt(-2 log u) cos(2 pi v), u in (0,1], v in [0,1) */
EXF_API double exf_rng_normal(uint64_t seed, uint32_t stream, uint32_t step,
                              uint64_t index) {
  uint32_t r[4];
  double u, v;
  exf__philox(seed, stream, step, index, r);
  u = ((double)((((uint64_t)r[0] << 32) | r[1]) >> 11) + 1) / 9007199254740992.0;
  v = (double)((((uint64_t)r[2] << 32) | r[3]) >> 11) / 9007199254740992.0;
  return sqrt(-2 * exf__log_d(u)) * exf__cospi_d(2 * v);
}

/* FNV-1a */
EXF_API uint32_t exf_rng_stream(const char *name) {
  uint32_t h = 2166136261u;
  for (; *name; name++) h = (h ^ (uint32_t)(unsigned char)*name) * 16777619u;
  return h;
}

/* ---- tensors ------------------------------------------------------ >>tensor_impl */

enum {
  EXF__NEEDS = 1,   /* a gradient with respect to this tensor is wanted */
  EXF__KEEP = 2     /* its gradient outlives backward */
};

struct exf_param {
  char *name;
  exf_tensor t;               /* experts: (N, ..) */
  exf_real *m, *v;            /* moments (moments), or NULL */
  exf_shape moments;          /* that of t; shared by experts: without N */
  int decay, frozen;
  int has_grad;               /* t.grad holds something: add to it */
  double init_std, init_value;
  int role;                   /* EXF__PLAIN, EXF__EXPERTS, EXF__FUSION (a, z, R, c) */
  struct exf_ffn *ffn;        /* whose experts these are, or NULL */
  char *dense_name;           /* experts: the name of the merged parameter */
  double *a_sum;              /* experts: (N), sum of the weights a of all backward
                                 passes since the last update */
  size_t n_backwards;
  double lr_scale, weight_decay;   /* set by the optimizer's groups */
  exf_model *model;
};

EXF_API exf_shape exf_shape0(void) {
  exf_shape s;
  memset(&s, 0, sizeof s);
  return s;
}

static exf_shape exf__shape(int n, size_t a, size_t b, size_t c, size_t d, size_t e) {
  exf_shape s = exf_shape0();
  s.n = n;
  s.dim[0] = a;
  s.dim[1] = b;
  s.dim[2] = c;
  s.dim[3] = d;
  s.dim[4] = e;
  return s;
}

EXF_API exf_shape exf_shape1(size_t a) { return exf__shape(1, a, 0, 0, 0, 0); }
EXF_API exf_shape exf_shape2(size_t a, size_t b) { return exf__shape(2, a, b, 0, 0, 0); }
EXF_API exf_shape exf_shape3(size_t a, size_t b, size_t c) {
  return exf__shape(3, a, b, c, 0, 0);
}
EXF_API exf_shape exf_shape4(size_t a, size_t b, size_t c, size_t d) {
  return exf__shape(4, a, b, c, d, 0);
}
EXF_API exf_shape exf_shape5(size_t a, size_t b, size_t c, size_t d, size_t e) {
  return exf__shape(5, a, b, c, d, e);
}

/* "(2,3)" for messages */
typedef struct exf__shape_text { char s[160]; } exf__shape_text;

static exf__shape_text exf__show(const exf_shape *s) {
  exf__shape_text t;
  size_t used = 1;
  int i;
  t.s[0] = '(';
  for (i = 0; i < s->n && i < EXF_MAX_DIMS; i++)
    used += (size_t)snprintf(t.s + used, sizeof t.s - used, i ? ",%zu" : "%zu",
                             s->dim[i]);
  snprintf(t.s + used, sizeof t.s - used, ")");
  return t;
}

static int exf__same(const exf_shape *a, const exf_shape *b) {
  return a->n == b->n && memcmp(a->dim, b->dim, (size_t)a->n * sizeof(size_t)) == 0;
}

/* Number of elements, of the axes begin .. end-1. Sizes of existing tensors only. */
static size_t exf__count(const exf_shape *s, int begin, int end) {
  size_t n = 1;
  int i;
  for (i = begin; i < end; i++) n *= s->dim[i];
  return n;
}

/* x as (rows,n); 0 when the last axis does not exist or is empty. */
static int exf__last(const exf_tensor *x, size_t *rows, size_t *n) {
  *rows = *n = 0;
  if (x->shape.n < 1) return 0;
  *n = x->shape.dim[x->shape.n - 1];
  *rows = exf__count(&x->shape, 0, x->shape.n - 1);
  return *n > 0;
}

/* Checks a shape and fills in the size; unused dims become 0. */
static int exf__tensor_init(exf_ctx *ctx, exf_tensor *t, const exf_shape *shape) {
  size_t size = 1, bytes;
  int i, zero = 0;
  memset(t, 0, sizeof *t);
  if (shape->n < 0 || shape->n > EXF_MAX_DIMS) {
    exf_fail(ctx, EXF_SHAPE, "tensor: %d axes, the limit is %d", shape->n, EXF_MAX_DIMS);
    return 0;
  }
  for (i = 0; i < shape->n; i++) zero |= shape->dim[i] == 0;
  t->shape.n = shape->n;
  for (i = 0; i < shape->n; i++) {
    t->shape.dim[i] = shape->dim[i];
    if (!exf__mul_size(size, EXF__MAX(shape->dim[i], 1), &size)) break;
  }
  if (i < shape->n || !exf__mul_size(size, sizeof(exf_real), &bytes)
      || bytes > SIZE_MAX / 4) {
    exf_fail(ctx, EXF_SIZE, "tensor: shape %s does not fit into size_t",
             exf__show(shape).s);
    return 0;
  }
  t->size = zero ? 0 : size;
  return 1;
}

static exf_tensor *exf__tensor(exf_ctx *ctx, const exf_shape *shape, exf_real *view) {
  exf_tensor *t = (exf_tensor *)exf__arena(ctx, 1, sizeof *t);
  if (!t || !exf__tensor_init(ctx, t, shape)) return NULL;
  t->data = view ? view : (exf_real *)exf__arena(ctx, t->size, sizeof(exf_real));
  return t->data ? t : NULL;
}

EXF_API exf_tensor *exf_tensor_new(exf_ctx *ctx, exf_shape shape, const exf_real *data) {
  exf_tensor *t = exf__tensor(ctx, &shape, NULL);
  if (!t) return NULL;
  if (data && t->size) memcpy(t->data, data, t->size * sizeof(exf_real));
  else if (t->size) memset(t->data, 0, t->size * sizeof(exf_real));
  return t;
}

EXF_API exf_tensor *exf_grad_keep(exf_ctx *ctx, exf_tensor *x) {
  if (!ctx || !x || x->param) return x;
  x->flags |= EXF__KEEP;
  if (!x->node && ctx->grad_on) x->flags |= EXF__NEEDS;
  return x;
}

EXF_API double exf_item(const exf_tensor *x) {
  return x && x->size == 1 ? (double)x->data[0] : (double)NAN;
}

/* ---- tape -------------------------------------------------------------- >>tape */

/* Scalars of an op; each op says which it uses. */
typedef struct exf__args {
  double s;                    /* a factor, a probability, eps */
  int i, j;                    /* flags, axes */
  size_t a, b;
  exf_shape shape;
  int perm[EXF_MAX_DIMS];
  const int32_t *ids;
  exf_custom_desc custom;
} exf__args;

/* One executed op. Recorded ones hang together from the last to the first: that list is
   the tape. */
typedef struct exf__node {
  int op, n_in;
  exf_tensor *in[EXF_MAX_INPUTS];
  exf_tensor *out;
  struct exf__node *prev;
  uint64_t tape;               /* n_tapes when it was recorded */
  int walked;                  /* by exf_backward */
  exf__args arg;
  void *saved;                 /* what forward leaves for backward */
} exf__node;

static const exf_real *exf__dout(const exf__node *node) { return node->out->gbuf->data; }

/* Gradient buffers are counted: an op that passes its gradient on unchanged (add,
   reshape) shares the buffer, and whoever adds to a shared one first copies it. A buffer
   goes back to the list when the op whose result it belongs to has been walked. Ops that
   need room for a while take it from there, too. */
static exf__gbuf *exf__gbuf_take(exf_ctx *ctx, size_t n) {
  exf__gbuf **link, *g;
  for (link = &ctx->free_gbufs; *link; link = &(*link)->next)
    if ((*link)->n == n) {
      g = *link;
      *link = g->next;
      g->refs = 1;
      return g;
    }
  g = (exf__gbuf *)exf__arena(ctx, 1, sizeof *g);
  if (!g || !(g->data = (exf_real *)exf__arena(ctx, n, sizeof(exf_real)))) return NULL;
  g->n = n;
  g->refs = 1;
  g->next = NULL;
  return g;
}

static void exf__gbuf_give(exf_ctx *ctx, exf__gbuf *g) {
  if (!g || --g->refs > 0) return;
  g->next = ctx->free_gbufs;
  ctx->free_gbufs = g;
}

static void exf__gbuf_drop(exf_ctx *ctx, exf_tensor *t) {
  exf__gbuf_give(ctx, t->gbuf);
  t->gbuf = NULL;
}

/* Where a parameter gathers: (shape), experts of an FFN (shape without N). */
static exf_real *exf__param_grad(exf_ctx *ctx, exf_param *p, int *acc) {
  size_t n = p->ffn ? p->t.size / p->t.shape.dim[0] : p->t.size;
  (void)ctx;
  if (!p->t.grad)
    p->t.grad = (exf_real *)exf__alloc_n(exf_model_ctx(p->model), n, sizeof(exf_real));
  *acc = p->has_grad;
  if (p->t.grad) p->has_grad = 1;
  return p->t.grad;
}

/* Where the gradient of t is to be written, or NULL when nobody wants it. *acc: add to
   what is there; else overwrite, so that nothing ever needs to be cleared. */
static exf_real *exf__grad(exf_ctx *ctx, exf_tensor *t, int *acc) {
  exf__gbuf *old;
  *acc = 0;
  if (!(t->flags & EXF__NEEDS)) return NULL;
  if (t->param) return exf__param_grad(ctx, t->param, acc);
  if (!t->gbuf) {
    t->gbuf = exf__gbuf_take(ctx, t->size);
    return t->gbuf ? t->gbuf->data : NULL;
  }
  *acc = 1;
  if (t->gbuf->refs > 1) {
    old = t->gbuf;
    t->gbuf = exf__gbuf_take(ctx, t->size);
    if (!t->gbuf) return NULL;
    memcpy(t->gbuf->data, old->data, t->size * sizeof(exf_real));
    old->refs--;
  }
  return t->gbuf->data;
}

/* The gradient of t grows by s times that of out (same size). */
static void exf__grad_pass(exf_ctx *ctx, exf_tensor *t, exf_tensor *out, double s) {
  int acc;
  exf_real *g;
  if (!(t->flags & EXF__NEEDS)) return;
  if (s == 1.0 && !t->param && !t->gbuf) {
    t->gbuf = out->gbuf;
    t->gbuf->refs++;
    return;
  }
  g = exf__grad(ctx, t, &acc);
  if (g) ctx->k->axpy(t->size, EXF__R(s), out->gbuf->data, g, acc);
}

/* ---- the op table ------------------------------------------------------- >>table */

/* name in enums, name in messages. Every row has a function exf__<NAME>_shape that checks
   the inputs and gives the output shape, exf__<NAME>_forward and exf__<NAME>_backward;
   the gradient tests demand a recipe for every row. */
#define EXF__OPS(X)                                                                      \
  X(ADD, "add") X(SUB, "sub") X(MUL, "mul") X(DIV, "div")                                \
  X(SCALE, "scale") X(NEG, "neg") X(EXP, "exp") X(LOG, "log") X(TANH, "tanh")            \
  X(SQRT, "sqrt") X(SQUARE, "square") X(RELU, "relu") X(GELU, "gelu")                    \
  X(GELU_TANH, "gelu_tanh") X(SILU, "silu")                                              \
  X(MATMUL, "matmul") X(LINEAR, "linear")                                                \
  X(SOFTMAX, "softmax") X(LOG_SOFTMAX, "log_softmax")                                    \
  X(LAYERNORM, "layernorm") X(RMSNORM, "rmsnorm")                                        \
  X(EMBEDDING, "embedding") X(DROPOUT, "dropout")                                        \
  X(RESHAPE, "reshape") X(PERMUTE, "permute") X(CONCAT, "concat") X(SLICE, "slice")      \
  X(SUM, "sum") X(MEAN, "mean")                                                          \
  X(CROSS_ENTROPY, "cross_entropy") X(ATTENTION, "attention") X(FUSE, "fuse")            \
  X(CUSTOM, "custom")

enum {
#define EXF__X(NAME, text) EXF__OP_##NAME,
  EXF__OPS(EXF__X)
#undef EXF__X
  EXF__N_OPS
};

static const char *exf__op_name(int op) {
  static const char *const names[] = {
#define EXF__X(NAME, text) text,
      EXF__OPS(EXF__X)
#undef EXF__X
  };
  return names[op];
}

/* The shape rule fails with op name, shapes and a hint. */
static int exf__bad_shape(exf_ctx *ctx, const exf__node *n, const char *hint) {
  const exf_shape *a = &n->in[0]->shape, *b = n->n_in > 1 ? &n->in[1]->shape : NULL;
  exf_fail(ctx, EXF_SHAPE, "%s: %s%s%s: %s", exf__op_name(n->op), exf__show(a).s,
           b ? " and " : "", b ? exf__show(b).s : "", hint);
  return 0;
}

/* ---- ops: elementwise ------------------------------------------------ >>elementwise */

/* NumPy's rule: align at the last axis; sizes are equal or one of them is 1. */
static int exf__broadcast_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  const exf_shape *a = &n->in[0]->shape, *b = &n->in[1]->shape;
  int i;
  *out = exf_shape0();
  out->n = EXF__MAX(a->n, b->n);
  for (i = 1; i <= out->n; i++) {
    size_t da = i <= a->n ? a->dim[a->n - i] : 1, db = i <= b->n ? b->dim[b->n - i] : 1;
    if (da != db && da != 1 && db != 1)
      return exf__bad_shape(ctx, n, "axes must be equal or 1, from the last one on");
    out->dim[out->n - i] = da == 1 ? db : da;
  }
  return 1;
}
#define exf__ADD_shape exf__broadcast_shape
#define exf__SUB_shape exf__broadcast_shape
#define exf__MUL_shape exf__broadcast_shape
#define exf__DIV_shape exf__broadcast_shape

/* Offset of row r (all axes of out but the last) in a tensor of shape s that is
   broadcast to out; *step is its stride along the last axis. */
static size_t exf__row_offset(const exf_shape *out, const exf_shape *s, size_t r,
                              size_t *step) {
  size_t offset = 0, stride = 1, index;
  int i, k;
  *step = s->n && s->dim[s->n - 1] != 1;
  if (s->n) stride = s->dim[s->n - 1];
  for (i = 2; i <= out->n; i++) {
    index = r % out->dim[out->n - i];
    r /= out->dim[out->n - i];
    k = s->n - i;
    if (k < 0) break;
    if (s->dim[k] != 1) offset += index * stride;
    stride *= s->dim[k];
  }
  return offset;
}

static exf_real exf__binary_value(int op, exf_real a, exf_real b) {
  switch (op) {
    case EXF__OP_ADD: return a + b;
    case EXF__OP_SUB: return a - b;
    case EXF__OP_MUL: return a * b;
    default: return a / b;
  }
}

static void exf__binary_forward(exf_ctx *ctx, exf__node *n) {
  const exf_tensor *a = n->in[0], *b = n->in[1];
  exf_tensor *y = n->out;
  size_t cols = y->shape.n ? y->shape.dim[y->shape.n - 1] : 1, r, j, sa, sb;
  int same = exf__same(&a->shape, &b->shape);
  if (y->size == 0) return;
  if (same && n->op == EXF__OP_ADD) {
    ctx->k->add(y->size, a->data, b->data, y->data);
    return;
  }
  if (same && n->op == EXF__OP_MUL) {
    ctx->k->mul(y->size, a->data, b->data, y->data, 0);
    return;
  }
  for (r = 0; r < y->size / cols; r++) {
    const exf_real *pa = a->data + exf__row_offset(&y->shape, &a->shape, r, &sa);
    const exf_real *pb = b->data + exf__row_offset(&y->shape, &b->shape, r, &sb);
    exf_real *py = y->data + r * cols;
    if (n->op == EXF__OP_ADD && sa && sb) ctx->k->add(cols, pa, pb, py);
    else
      for (j = 0; j < cols; j++)
        py[j] = exf__binary_value(n->op, pa[j * sa], pb[j * sb]);
  }
}

/* d(a/b)/da = 1/b, d(a/b)/db = -(a/b)/b */
static exf_real exf__binary_slope(int op, int side, exf_real a, exf_real b) {
  switch (op) {
    case EXF__OP_ADD: return 1;
    case EXF__OP_SUB: return EXF__R(side ? -1 : 1);
    case EXF__OP_MUL: return side ? a : b;
    default: return side ? -(a / b) / b : 1 / b;
  }
}

static void exf__binary_backward(exf_ctx *ctx, exf__node *n) {
  exf_tensor *y = n->out;
  const exf_tensor *a = n->in[0], *b = n->in[1];
  size_t cols = y->shape.n ? y->shape.dim[y->shape.n - 1] : 1, r, j, sa, sb, sg;
  int side, acc;
  if (y->size == 0) return;
  for (side = 0; side < 2; side++) {
    exf_tensor *t = n->in[side];
    exf_real *g;
    if (!(t->flags & EXF__NEEDS)) continue;
    if (exf__same(&t->shape, &y->shape)
        && (n->op == EXF__OP_ADD || n->op == EXF__OP_SUB)) {
      exf__grad_pass(ctx, t, y, n->op == EXF__OP_SUB && side ? -1.0 : 1.0);
      continue;
    }
    g = exf__grad(ctx, t, &acc);
    if (!g) return;
    if (n->op == EXF__OP_MUL && exf__same(&a->shape, &b->shape)) {
      ctx->k->mul(y->size, exf__dout(n), n->in[1 - side]->data, g, acc);
      continue;
    }
    if (!acc) memset(g, 0, t->size * sizeof(exf_real));
    for (r = 0; r < y->size / cols; r++) {
      const exf_real *pa = a->data + exf__row_offset(&y->shape, &a->shape, r, &sa);
      const exf_real *pb = b->data + exf__row_offset(&y->shape, &b->shape, r, &sb);
      const exf_real *dy = exf__dout(n) + r * cols;
      exf_real *pg = g + exf__row_offset(&y->shape, &t->shape, r, &sg);
      for (j = 0; j < cols; j++)
        pg[j * sg] += dy[j] * exf__binary_slope(n->op, side, pa[j * sa], pb[j * sb]);
    }
  }
}
#define exf__ADD_forward exf__binary_forward
#define exf__SUB_forward exf__binary_forward
#define exf__MUL_forward exf__binary_forward
#define exf__DIV_forward exf__binary_forward
#define exf__ADD_backward exf__binary_backward
#define exf__SUB_backward exf__binary_backward
#define exf__MUL_backward exf__binary_backward
#define exf__DIV_backward exf__binary_backward

static int exf__same_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  (void)ctx;
  *out = n->in[0]->shape;
  return 1;
}
#define exf__SCALE_shape exf__same_shape
#define exf__NEG_shape exf__same_shape
#define exf__EXP_shape exf__same_shape
#define exf__LOG_shape exf__same_shape
#define exf__TANH_shape exf__same_shape
#define exf__SQRT_shape exf__same_shape
#define exf__SQUARE_shape exf__same_shape
#define exf__RELU_shape exf__same_shape
#define exf__GELU_shape exf__same_shape
#define exf__GELU_TANH_shape exf__same_shape
#define exf__SILU_shape exf__same_shape

/* y = s x */
static void exf__SCALE_forward(exf_ctx *ctx, exf__node *n) {
  ctx->k->axpy(n->out->size, EXF__R(n->arg.s), n->in[0]->data, n->out->data, 0);
}

static void exf__SCALE_backward(exf_ctx *ctx, exf__node *n) {
  exf__grad_pass(ctx, n->in[0], n->out, n->arg.s);
}

static void exf__NEG_forward(exf_ctx *ctx, exf__node *n) {
  ctx->k->axpy(n->out->size, EXF__R(-1), n->in[0]->data, n->out->data, 0);
}

static void exf__NEG_backward(exf_ctx *ctx, exf__node *n) {
  exf__grad_pass(ctx, n->in[0], n->out, -1.0);
}

/* log, sqrt, square: plain loops. dx += dy / x, dy / (2 y), 2 x dy */
static void exf__plain_forward(exf_ctx *ctx, exf__node *n) {
  const exf_real *x = n->in[0]->data;
  exf_real *y = n->out->data;
  size_t i, size = n->out->size;
  (void)ctx;
  if (n->op == EXF__OP_LOG) for (i = 0; i < size; i++) y[i] = exf__log(x[i]);
  else if (n->op == EXF__OP_SQRT) for (i = 0; i < size; i++) y[i] = EXF__SQRT(x[i]);
  else for (i = 0; i < size; i++) y[i] = x[i] * x[i];
}

static void exf__plain_backward(exf_ctx *ctx, exf__node *n) {
  const exf_real *x = n->in[0]->data, *y = n->out->data, *dy = exf__dout(n);
  size_t i, size = n->out->size;
  int acc;
  exf_real d, *dx = exf__grad(ctx, n->in[0], &acc);
  for (i = 0; dx && i < size; i++) {
    if (n->op == EXF__OP_LOG) d = dy[i] / x[i];
    else if (n->op == EXF__OP_SQRT) d = dy[i] / (2 * y[i]);
    else d = 2 * x[i] * dy[i];
    dx[i] = acc ? dx[i] + d : d;
  }
}
#define exf__LOG_forward exf__plain_forward
#define exf__SQRT_forward exf__plain_forward
#define exf__SQUARE_forward exf__plain_forward
#define exf__LOG_backward exf__plain_backward
#define exf__SQRT_backward exf__plain_backward
#define exf__SQUARE_backward exf__plain_backward

/* exp, tanh and the activations: kernels over ranges; backward recomputes from x. */
typedef struct exf__unary_work {
  const exf__kernels *k;
  int kind, acc;
  const exf_real *x, *dy;
  exf_real *y, *dx;
} exf__unary_work;

static int exf__unary_kind(int op) {
  switch (op) {
    case EXF__OP_EXP: return EXF__U_EXP;
    case EXF__OP_TANH: return EXF__U_TANH;
    case EXF__OP_RELU: return EXF__U_RELU;
    case EXF__OP_GELU: return EXF__U_GELU;
    case EXF__OP_GELU_TANH: return EXF__U_GELU_TANH;
    default: return EXF__U_SILU;
  }
}

static void exf__unary_job(void *arg, size_t begin, size_t end, void *scratch) {
  const exf__unary_work *w = (const exf__unary_work *)arg;
  (void)scratch;
  if (w->dx)
    w->k->unary_grad(w->kind, end - begin, w->x + begin, w->dy + begin, w->dx + begin,
                     w->acc, w->y ? w->y + begin : NULL);
  else w->k->unary(w->kind, end - begin, w->x + begin, w->y + begin);
}

/* y = f(x), dx = [dx +] dy f'(x): what is not NULL of the two */
static void exf__unary_run(exf_ctx *ctx, int kind, size_t n, const exf_real *x,
                           exf_real *y, const exf_real *dy, exf_real *dx, int acc) {
  exf__unary_work w;
  w.k = ctx->k;
  w.kind = kind;
  w.acc = acc;
  w.x = x;
  w.dy = dy;
  w.y = y;
  w.dx = dx;
  exf__parallel(ctx, n, 256, 16.0 * (double)n, 0, exf__unary_job, &w);
}

static void exf__unary_forward(exf_ctx *ctx, exf__node *n) {
  exf__unary_run(ctx, exf__unary_kind(n->op), n->out->size, n->in[0]->data, n->out->data,
                 NULL, NULL, 0);
}

static void exf__unary_backward(exf_ctx *ctx, exf__node *n) {
  int acc;
  exf_real *dx = exf__grad(ctx, n->in[0], &acc);
  if (dx)
    exf__unary_run(ctx, exf__unary_kind(n->op), n->out->size, n->in[0]->data, NULL,
                   exf__dout(n), dx, acc);
}
#define exf__EXP_forward exf__unary_forward
#define exf__TANH_forward exf__unary_forward
#define exf__RELU_forward exf__unary_forward
#define exf__GELU_forward exf__unary_forward
#define exf__GELU_TANH_forward exf__unary_forward
#define exf__SILU_forward exf__unary_forward
#define exf__EXP_backward exf__unary_backward
#define exf__TANH_backward exf__unary_backward
#define exf__RELU_backward exf__unary_backward
#define exf__GELU_backward exf__unary_backward
#define exf__GELU_TANH_backward exf__unary_backward
#define exf__SILU_backward exf__unary_backward

/* ---- ops: matrix products ---------------------------------------------- >>matmul */

typedef struct exf__gemm_work {   /* one product, or a batch of them */
  const exf__kernels *k;
  size_t m, n, depth;
  const exf_real *a, *b, *bias;
  exf_real *c;
  size_t a_row, a_col, b_row, b_col, c_row;
  size_t a_batch, b_batch, c_batch;
  int acc, by_column;
} exf__gemm_work;

static void exf__gemm_job(void *arg, size_t begin, size_t end, void *scratch) {
  const exf__gemm_work *w = (const exf__gemm_work *)arg;
  if (w->by_column)
    w->k->gemm(w->m, end - begin, w->depth, w->a, w->a_row, w->a_col,
               w->b + begin * w->b_col, w->b_row, w->b_col, w->c + begin, w->c_row,
               w->acc, w->bias ? w->bias + begin : NULL, scratch);
  else
    w->k->gemm(end - begin, w->n, w->depth, w->a + begin * w->a_row, w->a_row, w->a_col,
               w->b, w->b_row, w->b_col, w->c + begin * w->c_row, w->c_row, w->acc,
               w->bias, scratch);
}

static void exf__gemm_batch_job(void *arg, size_t begin, size_t end, void *scratch) {
  const exf__gemm_work *w = (const exf__gemm_work *)arg;
  size_t i;
  for (i = begin; i < end; i++)
    w->k->gemm(w->m, w->n, w->depth, w->a + i * w->a_batch, w->a_row, w->a_col,
               w->b + i * w->b_batch, w->b_row, w->b_col, w->c + i * w->c_batch,
               w->c_row, w->acc, w->bias, scratch);
}

/* C (m,n) = [C +] A B [+ bias], split over the longer side of C */
static void exf__gemm(exf_ctx *ctx, size_t m, size_t n, size_t depth, const exf_real *a,
                      size_t a_row, size_t a_col, const exf_real *b, size_t b_row,
                      size_t b_col, exf_real *c, int acc, const exf_real *bias) {
  exf__gemm_work w;
  memset(&w, 0, sizeof w);
  w.k = ctx->k;
  w.m = m;
  w.n = n;
  w.depth = depth;
  w.a = a;
  w.b = b;
  w.bias = bias;
  w.c = c;
  w.a_row = a_row;
  w.a_col = a_col;
  w.b_row = b_row;
  w.b_col = b_col;
  w.c_row = n;
  w.acc = acc;
  w.by_column = n > m;
  if (m && n)
    exf__parallel(ctx, w.by_column ? n : m, w.by_column ? 32 : 12,
                  2.0 * (double)m * (double)n * (double)depth, ctx->k->scratch,
                  exf__gemm_job, &w);
}

/* The sizes of op(a) (batch,m,k) op(b) (batch,k,n) and their strides. */
typedef struct exf__mm {
  size_t m, n, k, batch;
  size_t a_row, a_col, b_row, b_col;
  size_t a_batch, b_batch;      /* 0: that side is shared by the whole batch */
} exf__mm;

static exf__mm exf__mm_sizes(const exf__node *n) {
  const exf_shape *a = &n->in[0]->shape, *b = &n->in[1]->shape;
  int ta = n->arg.i, tb = n->arg.j;
  exf__mm s;
  size_t rows = a->dim[a->n - 2], cols = a->dim[a->n - 1];
  s.m = ta ? cols : rows;
  s.k = ta ? rows : cols;
  s.n = tb ? b->dim[b->n - 2] : b->dim[b->n - 1];
  s.a_row = ta ? 1 : s.k;
  s.a_col = ta ? s.m : 1;
  s.b_row = tb ? 1 : s.n;
  s.b_col = tb ? s.k : 1;
  s.batch = exf__count(a->n >= b->n ? a : b, 0, EXF__MAX(a->n, b->n) - 2);
  s.a_batch = a->n > 2 ? s.m * s.k : 0;
  s.b_batch = b->n > 2 ? s.k * s.n : 0;
  if (!s.b_batch && !ta && s.a_batch) {   /* (batch,m,k) times one matrix: more rows */
    s.m *= s.batch;
    s.batch = 1;
  }
  return s;
}

static int exf__MATMUL_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  const exf_shape *a = &n->in[0]->shape, *b = &n->in[1]->shape;
  const exf_shape *big = a->n >= b->n ? a : b;
  size_t ka, kb;
  if (a->n < 2 || b->n < 2)
    return exf__bad_shape(ctx, n, "both sides need at least two axes");
  if (a->n > 2 && b->n > 2
      && (a->n != b->n || exf__count(a, 0, a->n - 2) != exf__count(b, 0, b->n - 2)
          || memcmp(a->dim, b->dim, (size_t)(a->n - 2) * sizeof(size_t)) != 0))
    return exf__bad_shape(ctx, n, "leading axes must be equal, or one side has none");
  ka = n->arg.i ? a->dim[a->n - 2] : a->dim[a->n - 1];
  kb = n->arg.j ? b->dim[b->n - 1] : b->dim[b->n - 2];
  if (ka != kb) return exf__bad_shape(ctx, n, "the inner axes differ");
  *out = *big;
  out->dim[big->n - 2] = n->arg.i ? a->dim[a->n - 1] : a->dim[a->n - 2];
  out->dim[big->n - 1] = n->arg.j ? b->dim[b->n - 2] : b->dim[b->n - 1];
  return 1;
}

/* batch products C_i (m,n) = [C_i +] A_i B_i; without c_batch all add up in one C */
static void exf__gemm_batch(exf_ctx *ctx, size_t batch, exf__gemm_work *w) {
  size_t i;
  double work = 2.0 * (double)w->m * (double)w->n * (double)w->depth;
  w->k = ctx->k;
  w->c_row = w->n;
  if (!w->m || !w->n) return;
  if (batch == 0 && !w->c_batch && !w->acc) memset(w->c, 0, w->m * w->n * sizeof *w->c);
  if (batch == 1 || !w->c_batch) {
    for (i = 0; i < batch; i++)
      exf__gemm(ctx, w->m, w->n, w->depth, w->a + i * w->a_batch, w->a_row, w->a_col,
                w->b + i * w->b_batch, w->b_row, w->b_col, w->c, w->acc || i > 0,
                w->bias);
  } else {
    exf__parallel(ctx, batch, 1, work * (double)batch, ctx->k->scratch,
                  exf__gemm_batch_job, w);
  }
}

static void exf__MATMUL_forward(exf_ctx *ctx, exf__node *n) {
  exf__mm s = exf__mm_sizes(n);
  exf__gemm_work w;
  memset(&w, 0, sizeof w);
  w.m = s.m; w.n = s.n; w.depth = s.k;
  w.a = n->in[0]->data; w.a_row = s.a_row; w.a_col = s.a_col; w.a_batch = s.a_batch;
  w.b = n->in[1]->data; w.b_row = s.b_row; w.b_col = s.b_col; w.b_batch = s.b_batch;
  w.c = n->out->data; w.c_batch = s.m * s.n;
  exf__gemm_batch(ctx, s.batch, &w);
}

/* C = A B: dA = dC B^T, dB = A^T dC; for a side given transposed, the transpose of
   these: dA^T = B dC^T, dB^T = dC^T A */
static void exf__MATMUL_backward(exf_ctx *ctx, exf__node *n) {
  exf__mm s = exf__mm_sizes(n);
  const exf_real *dc = exf__dout(n), *a = n->in[0]->data, *b = n->in[1]->data;
  exf__gemm_work w;
  memset(&w, 0, sizeof w);
  w.c = exf__grad(ctx, n->in[0], &w.acc);
  if (w.c) {
    int t = n->arg.i;
    w.m = t ? s.k : s.m; w.n = t ? s.m : s.k; w.depth = s.n;
    w.c_batch = s.a_batch;
    if (t) {
      w.a = b; w.a_row = s.b_row; w.a_col = s.b_col; w.a_batch = s.b_batch;
      w.b = dc; w.b_row = 1; w.b_col = s.n; w.b_batch = s.m * s.n;
    } else {
      w.a = dc; w.a_row = s.n; w.a_col = 1; w.a_batch = s.m * s.n;
      w.b = b; w.b_row = s.b_col; w.b_col = s.b_row; w.b_batch = s.b_batch;
    }
    exf__gemm_batch(ctx, s.batch, &w);
  }
  w.c = exf__grad(ctx, n->in[1], &w.acc);
  if (w.c) {
    int t = n->arg.j;
    w.m = t ? s.n : s.k; w.n = t ? s.k : s.n; w.depth = s.m;
    w.c_batch = s.b_batch;
    if (t) {
      w.a = dc; w.a_row = 1; w.a_col = s.n; w.a_batch = s.m * s.n;
      w.b = a; w.b_row = s.a_row; w.b_col = s.a_col; w.b_batch = s.a_batch;
    } else {
      w.a = a; w.a_row = s.a_col; w.a_col = s.a_row; w.a_batch = s.a_batch;
      w.b = dc; w.b_row = s.n; w.b_col = 1; w.b_batch = s.m * s.n;
    }
    exf__gemm_batch(ctx, s.batch, &w);
  }
}

static int exf__LINEAR_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  const exf_shape *x = &n->in[0]->shape, *w = &n->in[1]->shape;
  if (x->n < 1 || w->n != 2 || x->dim[x->n - 1] != w->dim[1])
    return exf__bad_shape(ctx, n, "x (..,in) and w (out,in): last axes differ");
  if (n->n_in > 2 && (n->in[2]->shape.n != 1 || n->in[2]->shape.dim[0] != w->dim[0]))
    return exf__bad_shape(ctx, n, "the bias must be (out)");
  *out = *x;
  out->dim[x->n - 1] = w->dim[0];
  return 1;
}

/* Y (rows,out) = f(X) (rows,in) W^T + b; f is nothing for arg.i 0, else the function
   arg.i - 1, whose values are not kept: backward has them for the price of a store. */
static void exf__LINEAR_forward(exf_ctx *ctx, exf__node *n) {
  size_t in = n->in[1]->shape.dim[1], out = n->in[1]->shape.dim[0];
  size_t rows = out ? n->out->size / out : 0, size = n->in[0]->size;
  const exf_real *x = n->in[0]->data;
  exf__gbuf *h = NULL;
  if (n->arg.i) {
    if (!(h = exf__gbuf_take(ctx, size))) return;
    exf__unary_run(ctx, n->arg.i - 1, size, x, h->data, NULL, NULL, 0);
    x = h->data;
  }
  exf__gemm(ctx, rows, out, in, x, in, 1, n->in[1]->data, 1, in, n->out->data, 0,
            n->n_in > 2 ? n->in[2]->data : NULL);
  exf__gbuf_give(ctx, h);
}

typedef struct exf__colsum_work {
  const exf__kernels *k;
  size_t rows, stride;
  const exf_real *x;
  exf_real *y;
  int acc;
} exf__colsum_work;

static void exf__colsum_job(void *arg, size_t begin, size_t end, void *scratch) {
  const exf__colsum_work *w = (const exf__colsum_work *)arg;
  (void)scratch;
  w->k->col_sum(w->rows, end - begin, w->stride, w->x + begin, w->y + begin, w->acc);
}

/* y (n) = [y +] sum over the rows of x (rows,n) */
static void exf__colsum(exf_ctx *ctx, size_t rows, size_t n, const exf_real *x,
                        exf_real *y, int acc) {
  exf__colsum_work w;
  w.k = ctx->k;
  w.rows = rows;
  w.stride = n;
  w.x = x;
  w.y = y;
  w.acc = acc;
  exf__parallel(ctx, n, 64, (double)rows * (double)n, 0, exf__colsum_job, &w);
}

/* With H = f(X): dH = dY W, dX = dH f'(X), dW = dY^T H, db = column sums of dY */
static void exf__LINEAR_backward(exf_ctx *ctx, exf__node *n) {
  size_t in = n->in[1]->shape.dim[1], out = n->in[1]->shape.dim[0];
  size_t rows = out ? n->out->size / out : 0, size = n->in[0]->size;
  const exf_real *dy = exf__dout(n), *x = n->in[0]->data;
  int acc, acc_w, f = n->arg.i - 1;
  exf_real *dx = exf__grad(ctx, n->in[0], &acc), *g;
  exf_real *dw = exf__grad(ctx, n->in[1], &acc_w);
  exf__gbuf *h = NULL, *dh = NULL;
  if (f >= 0 && dw && !(h = exf__gbuf_take(ctx, size))) return;
  if (f >= 0 && dx && acc && !(dh = exf__gbuf_take(ctx, size))) return;
  if (dx)
    exf__gemm(ctx, rows, in, out, dy, out, 1, n->in[1]->data, in, 1, dh ? dh->data : dx,
              acc && !dh, NULL);
  if (f >= 0 && (dx || h))
    exf__unary_run(ctx, f, size, x, h ? h->data : NULL, dh ? dh->data : dx, dx, acc);
  if (dw)
    exf__gemm(ctx, out, in, rows, dy, 1, out, h ? h->data : x, in, 1, dw, acc_w, NULL);
  if (n->n_in > 2 && (g = exf__grad(ctx, n->in[2], &acc)) != NULL)
    exf__colsum(ctx, rows, out, dy, g, acc);
  exf__gbuf_give(ctx, h);
  exf__gbuf_give(ctx, dh);
}

/* ---- ops: rows -------------------------------------------------------- >>row_ops */

typedef struct exf__row_work {    /* softmax, norms and cross-entropy, by rows */
  const exf__kernels *k;
  int op, backward, acc;
  size_t n;
  const exf_real *x, *y, *w, *b, *dy;
  exf_real *out, *mean, *rstd;    /* mean, rstd (rows); cross-entropy: loss, lse */
  const int32_t *labels;
  exf_real s, g;
} exf__row_work;

static void exf__row_job(void *arg, size_t r, size_t end, void *scratch) {
  const exf__row_work *w = (const exf__row_work *)arg;
  const exf__kernels *k = w->k;
  size_t rows = end - r, n = w->n;
  int rms = w->op == EXF__OP_RMSNORM;
  (void)scratch;
  switch (w->op) {
    case EXF__OP_SOFTMAX:
      if (w->backward)
        k->softmax_grad(rows, n, w->y + r * n, w->dy + r * n, w->out + r * n, w->acc);
      else k->softmax(rows, n, w->x + r * n, w->out + r * n);
      break;
    case EXF__OP_LOG_SOFTMAX:
      if (w->backward)
        k->log_softmax_grad(rows, n, w->y + r * n, w->dy + r * n, w->out + r * n, w->acc);
      else k->log_softmax(rows, n, w->x + r * n, w->out + r * n);
      break;
    case EXF__OP_CROSS_ENTROPY:
      if (w->backward)
        k->cross_entropy_grad(rows, n, w->x + r * n, w->labels + r, w->rstd + r, w->s,
                              w->g, w->out + r * n, w->acc);
      else
        k->cross_entropy(rows, n, w->x + r * n, w->labels + r, w->s, w->mean + r,
                         w->rstd + r);
      break;
    default:
      if (w->backward)
        k->layernorm_grad(rows, n, w->x + r * n, w->w, w->mean + r, w->rstd + r, rms,
                          w->dy + r * n, w->out + r * n, w->acc);
      else
        k->layernorm(rows, n, w->x + r * n, w->w, w->b, w->s, rms, w->out + r * n,
                     w->mean + r, w->rstd + r);
  }
}

static void exf__rows_run(exf_ctx *ctx, size_t rows, exf__row_work *w, int op) {
  w->k = ctx->k;
  w->op = op;
  exf__parallel(ctx, rows, 4, 8.0 * (double)rows * (double)w->n, 0, exf__row_job, w);
}

static int exf__row_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  size_t rows, cols;
  if (!exf__last(n->in[0], &rows, &cols))
    return exf__bad_shape(ctx, n, "the last axis must exist and not be empty");
  *out = n->in[0]->shape;
  return 1;
}
#define exf__SOFTMAX_shape exf__row_shape
#define exf__LOG_SOFTMAX_shape exf__row_shape

static void exf__softmax_forward(exf_ctx *ctx, exf__node *n) {
  exf__row_work w;
  size_t rows;
  memset(&w, 0, sizeof w);
  exf__last(n->in[0], &rows, &w.n);
  w.x = n->in[0]->data;
  w.out = n->out->data;
  exf__rows_run(ctx, rows, &w, n->op);
}

/* softmax: dx = y (dy - <y, dy>); log-softmax: dx = dy - exp(y) sum dy */
static void exf__softmax_backward(exf_ctx *ctx, exf__node *n) {
  exf__row_work w;
  size_t rows;
  memset(&w, 0, sizeof w);
  exf__last(n->in[0], &rows, &w.n);
  w.y = n->out->data;
  w.dy = exf__dout(n);
  w.backward = 1;
  w.out = exf__grad(ctx, n->in[0], &w.acc);
  if (w.out) exf__rows_run(ctx, rows, &w, n->op);
}
#define exf__SOFTMAX_forward exf__softmax_forward
#define exf__SOFTMAX_backward exf__softmax_backward
#define exf__LOG_SOFTMAX_forward exf__softmax_forward
#define exf__LOG_SOFTMAX_backward exf__softmax_backward

static int exf__norm_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  size_t rows, cols;
  int i;
  if (!exf__last(n->in[0], &rows, &cols))
    return exf__bad_shape(ctx, n, "the last axis must exist and not be empty");
  for (i = 1; i < n->n_in; i++)
    if (n->in[i]->shape.n != 1 || n->in[i]->shape.dim[0] != cols)
      return exf__bad_shape(ctx, n, "weight and bias must be (last axis)");
  *out = n->in[0]->shape;
  return 1;
}
#define exf__LAYERNORM_shape exf__norm_shape
#define exf__RMSNORM_shape exf__norm_shape

static void exf__norm_op_forward(exf_ctx *ctx, exf__node *n) {
  exf__row_work w;
  size_t rows;
  memset(&w, 0, sizeof w);
  exf__last(n->in[0], &rows, &w.n);
  w.mean = (exf_real *)exf__arena(ctx, 2 * rows, sizeof(exf_real));
  if (!w.mean) return;
  w.rstd = w.mean + rows;
  n->saved = w.mean;
  w.x = n->in[0]->data;
  w.w = n->in[1]->data;
  w.b = n->n_in > 2 ? n->in[2]->data : NULL;
  w.s = EXF__R(n->arg.s);
  w.out = n->out->data;
  exf__rows_run(ctx, rows, &w, n->op);
}

typedef struct exf__norm_w_work {
  const exf__kernels *k;
  size_t rows, stride;
  int rms, acc_w, acc_b;
  const exf_real *x, *mean, *rstd, *dy;
  exf_real *dw, *db;
} exf__norm_w_work;

static void exf__norm_w_job(void *arg, size_t begin, size_t end, void *scratch) {
  const exf__norm_w_work *w = (const exf__norm_w_work *)arg;
  (void)scratch;
  w->k->layernorm_grad_w(w->rows, end - begin, w->stride, w->x + begin, w->mean, w->rstd,
                         w->rms, w->dy + begin, w->dw ? w->dw + begin : NULL,
                         w->db ? w->db + begin : NULL, w->acc_w, w->acc_b);
}

/* With h = dy w and xh the normalised x: dx = rstd (h - mean h - xh mean(h xh)), the
   mean h absent in rmsnorm; dw = sum dy xh, db = sum dy over the rows. */
static void exf__norm_op_backward(exf_ctx *ctx, exf__node *n) {
  exf__row_work w;
  exf__norm_w_work v;
  size_t rows;
  memset(&w, 0, sizeof w);
  memset(&v, 0, sizeof v);
  exf__last(n->in[0], &rows, &w.n);
  v.dw = exf__grad(ctx, n->in[1], &v.acc_w);
  if (n->n_in > 2) v.db = exf__grad(ctx, n->in[2], &v.acc_b);
  v.k = ctx->k;
  v.rows = rows;
  v.stride = w.n;
  v.rms = n->op == EXF__OP_RMSNORM;
  v.x = w.x = n->in[0]->data;
  w.mean = (exf_real *)n->saved;
  w.rstd = w.mean + rows;
  v.mean = w.mean;
  v.rstd = w.rstd;
  v.dy = w.dy = exf__dout(n);
  if (v.dw || v.db)
    exf__parallel(ctx, w.n, 64, 4.0 * (double)rows * (double)w.n, 0, exf__norm_w_job, &v);
  w.w = n->in[1]->data;
  w.backward = 1;
  w.out = exf__grad(ctx, n->in[0], &w.acc);
  if (w.out) exf__rows_run(ctx, rows, &w, n->op);
}
#define exf__LAYERNORM_forward exf__norm_op_forward
#define exf__LAYERNORM_backward exf__norm_op_backward
#define exf__RMSNORM_forward exf__norm_op_forward
#define exf__RMSNORM_backward exf__norm_op_backward

/* A copy of n integers in the arena, each checked to lie below limit (and, unless
   negatives mean "ignore", not below 0). */
static const int32_t *exf__copy_ids(exf_ctx *ctx, int op, const int32_t *ids, size_t n,
                                    size_t limit, int negatives) {
  int32_t *copy;
  size_t i;
  if (!ids) {
    exf_fail(ctx, EXF_ARG, "%s: the integers are NULL: give one per row",
             exf__op_name(op));
    return NULL;
  }
  for (i = 0; i < n; i++)
    if ((ids[i] < 0 && !negatives) || (ids[i] >= 0 && (size_t)ids[i] >= limit)) {
      exf_fail(ctx, EXF_ARG, "%s: integer %ld at index %zu is outside 0..%zu",
               exf__op_name(op), (long)ids[i], i, limit ? limit - 1 : 0);
      return NULL;
    }
  copy = (int32_t *)exf__arena(ctx, n, sizeof(int32_t));
  if (copy && n) memcpy(copy, ids, n * sizeof(int32_t));
  return copy;
}

static int exf__CROSS_ENTROPY_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  size_t rows, classes;
  if (!exf__last(n->in[0], &rows, &classes))
    return exf__bad_shape(ctx, n, "logits must be (..,V)");
  n->arg.ids = exf__copy_ids(ctx, n->op, n->arg.ids, rows, classes, 1);
  *out = exf_shape0();
  return n->arg.ids != NULL;
}

static void exf__CROSS_ENTROPY_forward(exf_ctx *ctx, exf__node *n) {
  exf__row_work w;
  size_t rows, i, used = 0;
  double sum = 0;
  memset(&w, 0, sizeof w);
  exf__last(n->in[0], &rows, &w.n);
  w.mean = (exf_real *)exf__arena(ctx, 2 * rows, sizeof(exf_real));
  if (!w.mean) return;
  w.rstd = w.mean + rows;
  n->saved = w.rstd;
  w.x = n->in[0]->data;
  w.labels = n->arg.ids;
  w.s = EXF__R(n->arg.s);
  exf__rows_run(ctx, rows, &w, n->op);
  for (i = 0; i < rows; i++) {
    used += n->arg.ids[i] >= 0;
    sum += (double)w.mean[i];
  }
  n->arg.a = used;
  n->out->data[0] = EXF__R(used ? sum / (double)used : 0);
}

/* dlogits = g/n (softmax(logits) - q), recomputed from the log-sum-exp of each row */
static void exf__CROSS_ENTROPY_backward(exf_ctx *ctx, exf__node *n) {
  exf__row_work w;
  size_t rows;
  memset(&w, 0, sizeof w);
  exf__last(n->in[0], &rows, &w.n);
  w.x = n->in[0]->data;
  w.labels = n->arg.ids;
  w.rstd = (exf_real *)n->saved;
  w.s = EXF__R(n->arg.s);
  w.g = n->arg.a ? exf__dout(n)[0] / (exf_real)n->arg.a : 0;
  w.backward = 1;
  w.out = exf__grad(ctx, n->in[0], &w.acc);
  if (w.out) exf__rows_run(ctx, rows, &w, n->op);
}

/* ---- ops: lookup, dropout --------------------------------------------- >>lookup */

static int exf__EMBEDDING_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  const exf_shape *w = &n->in[0]->shape;
  size_t count;
  if (w->n != 2) return exf__bad_shape(ctx, n, "the table must be (V,C)");
  if (!exf__mul_size(n->arg.a, n->arg.b ? n->arg.b : 1, &count)) {
    exf_fail(ctx, EXF_SIZE, "embedding: %zu x %zu integers do not fit into size_t",
             n->arg.a, n->arg.b);
    return 0;
  }
  n->arg.ids = exf__copy_ids(ctx, n->op, n->arg.ids, count, w->dim[0], 0);
  *out = n->arg.b ? exf_shape3(n->arg.a, n->arg.b, w->dim[1])
                  : exf_shape2(n->arg.a, w->dim[1]);
  return n->arg.ids != NULL;
}

static void exf__EMBEDDING_forward(exf_ctx *ctx, exf__node *n) {
  size_t c = n->in[0]->shape.dim[1], i, rows = c ? n->out->size / c : 0;
  (void)ctx;
  for (i = 0; i < rows; i++)
    memcpy(n->out->data + i * c, n->in[0]->data + (size_t)n->arg.ids[i] * c,
           c * sizeof(exf_real));
}

/* dtable[ids[i]] += dy[i], in the order of the rows */
static void exf__EMBEDDING_backward(exf_ctx *ctx, exf__node *n) {
  size_t c = n->in[0]->shape.dim[1], i, rows = c ? n->out->size / c : 0;
  const exf_real *dy = exf__dout(n);
  int acc;
  exf_real *g = exf__grad(ctx, n->in[0], &acc);
  if (!g) return;
  if (!acc) memset(g, 0, n->in[0]->size * sizeof(exf_real));
  for (i = 0; i < rows; i++)
    ctx->k->axpy(c, 1, dy + i * c, g + (size_t)n->arg.ids[i] * c, 1);
}

/* The mask is a function of (seed, call within the step, step, index): never stored. */
static void exf__dropout_apply(exf_ctx *ctx, exf__node *n, const exf_real *x, exf_real *y,
                               int acc) {
  uint32_t r[4];
  size_t i;
  exf_real s = EXF__R(1 / (1 - n->arg.s)), v;
  double limit = n->arg.s * 4294967296.0;
  for (i = 0; i < n->out->size; i++) {
    if (i % 4 == 0)
      exf__philox(ctx->desc.seed, 0xD0000000u + (uint32_t)n->arg.a, (uint32_t)n->arg.b,
                  i / 4, r);
    v = (double)r[i % 4] < limit ? 0 : s * x[i];
    y[i] = acc ? y[i] + v : v;
  }
}

#define exf__DROPOUT_shape exf__same_shape
static void exf__DROPOUT_forward(exf_ctx *ctx, exf__node *n) {
  n->arg.a = ctx->n_dropouts++;
  n->arg.b = ctx->step;
  exf__dropout_apply(ctx, n, n->in[0]->data, n->out->data, 0);
}

static void exf__DROPOUT_backward(exf_ctx *ctx, exf__node *n) {
  int acc;
  exf_real *g = exf__grad(ctx, n->in[0], &acc);
  if (g) exf__dropout_apply(ctx, n, exf__dout(n), g, acc);
}

/* ---- ops: shape -------------------------------------------------------- >>shape_ops */

static int exf__RESHAPE_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  exf_tensor t;
  if (!exf__tensor_init(ctx, &t, &n->arg.shape)) return 0;
  if (t.size != n->in[0]->size) {
    exf_fail(ctx, EXF_SHAPE, "reshape: %s has %zu elements, %s has %zu",
             exf__show(&n->in[0]->shape).s, n->in[0]->size, exf__show(&t.shape).s,
             t.size);
    return 0;
  }
  *out = t.shape;
  return 1;
}

static void exf__RESHAPE_forward(exf_ctx *ctx, exf__node *n) {
  (void)ctx;   /* a view: run() gave it the data of its input */
  (void)n;
}

static void exf__RESHAPE_backward(exf_ctx *ctx, exf__node *n) {
  exf__grad_pass(ctx, n->in[0], n->out, 1.0);
}

static int exf__PERMUTE_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  const exf_shape *x = &n->in[0]->shape;
  unsigned seen = 0;
  int i;
  *out = *x;
  for (i = 0; i < x->n; i++) {
    int p = n->arg.perm[i];
    if (p < 0 || p >= x->n || (seen & EXF_AXIS(p)))
      return exf__bad_shape(ctx, n, "axes must be a permutation of 0..n-1");
    seen |= EXF_AXIS(p);
    out->dim[i] = x->dim[p];
  }
  return 1;
}

/* y[i_0, ..] = x[..] with axis k of y being axis perm[k] of x; gather: y from x, else x
   from y (added when acc) */
static void exf__permute_copy(const exf__node *n, const exf_real *from, exf_real *to,
                              int gather, int acc) {
  const exf_shape *x = &n->in[0]->shape, *y = &n->out->shape;
  size_t stride[EXF_MAX_DIMS], i, rest, offset;
  int k;
  for (k = 0; k < y->n; k++) stride[k] = exf__count(x, n->arg.perm[k] + 1, x->n);
  for (i = 0; i < n->out->size; i++) {
    offset = 0;
    rest = i;
    for (k = y->n - 1; k >= 0; k--) {
      offset += rest % y->dim[k] * stride[k];
      rest /= y->dim[k];
    }
    if (gather) to[i] = from[offset];
    else to[offset] = acc ? to[offset] + from[i] : from[i];
  }
}

static void exf__PERMUTE_forward(exf_ctx *ctx, exf__node *n) {
  (void)ctx;
  exf__permute_copy(n, n->in[0]->data, n->out->data, 1, 0);
}

static void exf__PERMUTE_backward(exf_ctx *ctx, exf__node *n) {
  int acc;
  exf_real *g = exf__grad(ctx, n->in[0], &acc);
  if (g) exf__permute_copy(n, exf__dout(n), g, 0, acc);
}

static int exf__CONCAT_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  int axis = n->arg.i, i, k;
  *out = n->in[0]->shape;
  if (axis < 0 || axis >= out->n) return exf__bad_shape(ctx, n, "there is no such axis");
  for (i = 1; i < n->n_in; i++) {
    const exf_shape *s = &n->in[i]->shape;
    int fits = s->n == out->n;
    for (k = 0; fits && k < out->n; k++) fits = k == axis || s->dim[k] == out->dim[k];
    if (!fits) return exf__bad_shape(ctx, n, "all axes but the joined one must be equal");
    out->dim[axis] += s->dim[axis];   /* fits: a tensor's bytes end at SIZE_MAX / 4 */
  }
  return 1;
}

/* Moves a block of `cols` columns between a (rows,cols) part and columns at.. of a
   (rows,total) whole. Of no columns there may be 2^63 rows. */
static void exf__columns(size_t rows, size_t cols, size_t total, size_t at,
                         const exf_real *from, exf_real *to, int to_whole, int acc) {
  size_t r, j;
  for (r = 0; cols && r < rows; r++) {
    const exf_real *f = from + (to_whole ? r * cols : r * total + at);
    exf_real *t = to + (to_whole ? r * total + at : r * cols);
    for (j = 0; j < cols; j++) t[j] = acc ? t[j] + f[j] : f[j];
  }
}

static void exf__CONCAT_forward(exf_ctx *ctx, exf__node *n) {
  int axis = n->arg.i, i;
  size_t rows = exf__count(&n->out->shape, 0, axis), at = 0, cols;
  size_t total = exf__count(&n->out->shape, axis, n->out->shape.n);
  (void)ctx;
  for (i = 0; i < n->n_in; i++, at += cols) {
    cols = exf__count(&n->in[i]->shape, axis, n->in[i]->shape.n);
    exf__columns(rows, cols, total, at, n->in[i]->data, n->out->data, 1, 0);
  }
}

static void exf__CONCAT_backward(exf_ctx *ctx, exf__node *n) {
  int axis = n->arg.i, i, acc;
  size_t rows = exf__count(&n->out->shape, 0, axis), at = 0, cols;
  size_t total = exf__count(&n->out->shape, axis, n->out->shape.n);
  exf_real *g;
  for (i = 0; i < n->n_in; i++, at += cols) {
    cols = exf__count(&n->in[i]->shape, axis, n->in[i]->shape.n);
    g = exf__grad(ctx, n->in[i], &acc);
    if (g) exf__columns(rows, cols, total, at, exf__dout(n), g, 0, acc);
  }
}

static int exf__SLICE_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  *out = n->in[0]->shape;
  if (n->arg.i < 0 || n->arg.i >= out->n || n->arg.a > n->arg.b
      || n->arg.b > out->dim[n->arg.i]) {
    exf_fail(ctx, EXF_SHAPE, "slice: %zu..%zu of axis %d of %s: must lie within it",
             n->arg.a, n->arg.b, n->arg.i, exf__show(out).s);
    return 0;
  }
  out->dim[n->arg.i] = n->arg.b - n->arg.a;
  return 1;
}

static void exf__SLICE_forward(exf_ctx *ctx, exf__node *n) {
  int axis = n->arg.i;
  const exf_shape *x = &n->in[0]->shape;
  size_t rows = exf__count(x, 0, axis), total = exf__count(x, axis, x->n);
  size_t unit = exf__count(x, axis + 1, x->n);
  (void)ctx;
  exf__columns(rows, (n->arg.b - n->arg.a) * unit, total, n->arg.a * unit,
               n->in[0]->data, n->out->data, 0, 0);
}

static void exf__SLICE_backward(exf_ctx *ctx, exf__node *n) {
  int axis = n->arg.i, acc;
  const exf_shape *x = &n->in[0]->shape;
  size_t rows = exf__count(x, 0, axis), total = exf__count(x, axis, x->n);
  size_t unit = exf__count(x, axis + 1, x->n);
  exf_real *g = exf__grad(ctx, n->in[0], &acc);
  if (!g) return;
  if (!acc) memset(g, 0, n->in[0]->size * sizeof(exf_real));
  exf__columns(rows, (n->arg.b - n->arg.a) * unit, total, n->arg.a * unit, exf__dout(n),
               g, 1, 1);
}

/* ---- ops: sums ----------------------------------------------------------- >>sums */

static unsigned exf__axes(const exf__node *n) {
  return (unsigned)n->arg.a & (EXF_AXIS(n->in[0]->shape.n) - 1u);
}

static int exf__SUM_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  const exf_shape *x = &n->in[0]->shape;
  unsigned axes = exf__axes(n);
  int i;
  if (n->arg.a != (size_t)EXF_ALL_AXES && axes != n->arg.a)
    return exf__bad_shape(ctx, n, "an axis that does not exist");
  *out = exf_shape0();
  for (i = 0; i < x->n; i++)
    if (!(axes & EXF_AXIS(i))) out->dim[out->n++] = x->dim[i];
    else if (n->arg.i) out->dim[out->n++] = 1;
  return 1;
}
#define exf__MEAN_shape exf__SUM_shape

/* Sum over a contiguous run: lanes over blocks, blocks in double. */
static double exf__sum_run(const exf_real *x, size_t n) {
  double total = 0;
  size_t b, i;
  int l, half;
  for (b = 0; b < n; b += EXF__SUM_BLOCK) {
    size_t end = EXF__MIN(n, b + EXF__SUM_BLOCK);
    exf_real lane[EXF__LANES] = {0};
    for (i = b; i < end; i++) lane[(i - b) % EXF__LANES] += x[i];
    for (half = EXF__LANES / 2; half; half /= 2)
      for (l = 0; l < half; l++) lane[l] += lane[l + half];
    total += (double)lane[0];
  }
  return total;
}

/* For every element of x in order: the element of out it belongs to. */
typedef struct exf__reduce_walk {
  size_t stride[EXF_MAX_DIMS];     /* of out, 0 along summed axes */
  const exf_shape *x;
} exf__reduce_walk;

static exf__reduce_walk exf__reduce_start(const exf__node *n) {
  exf__reduce_walk w;
  unsigned axes = exf__axes(n);
  size_t stride = 1;
  int i;
  w.x = &n->in[0]->shape;
  for (i = w.x->n - 1; i >= 0; i--) {
    w.stride[i] = axes & EXF_AXIS(i) ? 0 : stride;
    if (w.stride[i]) stride *= w.x->dim[i];
  }
  return w;
}

static size_t exf__reduce_at(const exf__reduce_walk *w, size_t i) {
  size_t offset = 0;
  int k;
  for (k = w->x->n - 1; k >= 0; k--) {
    offset += i % w->x->dim[k] * w->stride[k];
    i /= w->x->dim[k];
  }
  return offset;
}

static double exf__reduce_scale(const exf__node *n) {
  size_t count = n->out->size ? n->in[0]->size / n->out->size : 0;
  return n->op == EXF__OP_MEAN && count ? 1.0 / (double)count : 1.0;
}

/* Axes 0..k-1, the leading ones: column sums (returns k); else 0. */
static int exf__leading_axes(const exf__node *n) {
  unsigned axes = exf__axes(n);
  int k = 0;
  while (axes & EXF_AXIS(k)) k++;
  return axes == EXF_AXIS(k) - 1u && k < n->in[0]->shape.n ? k : 0;
}

/* Whether the summed axes are the last ones: runs of x */
static int exf__trailing_axes(const exf__node *n) {
  unsigned kept = (EXF_AXIS(n->in[0]->shape.n) - 1u) & ~exf__axes(n);
  return (kept & (kept + 1u)) == 0;
}

static void exf__sum_forward(exf_ctx *ctx, exf__node *n) {
  const exf_tensor *x = n->in[0];
  exf_tensor *y = n->out;
  exf__reduce_walk w = exf__reduce_start(n);
  double s = exf__reduce_scale(n);
  size_t i;
  if (y->size && exf__trailing_axes(n)) {
    size_t run = x->size / y->size;
    for (i = 0; i < y->size; i++)
      y->data[i] = EXF__R(s * exf__sum_run(x->data + i * run, run));
    return;
  }
  if (x->size && exf__leading_axes(n)) {
    exf__colsum(ctx, x->size / y->size, y->size, x->data, y->data, 0);
  } else {
    if (y->size) memset(y->data, 0, y->size * sizeof(exf_real));
    for (i = 0; i < x->size; i++) y->data[exf__reduce_at(&w, i)] += x->data[i];
  }
  for (i = 0; s != 1.0 && i < y->size; i++) y->data[i] *= EXF__R(s);
}

/* dx = dy, repeated along the summed axes (times 1/count for the mean) */
static void exf__sum_backward(exf_ctx *ctx, exf__node *n) {
  exf__reduce_walk w = exf__reduce_start(n);
  exf_real s = EXF__R(exf__reduce_scale(n)), v;
  const exf_real *dy = exf__dout(n);
  int acc;
  exf_real *dx = exf__grad(ctx, n->in[0], &acc);
  size_t i;
  for (i = 0; dx && i < n->in[0]->size; i++) {
    v = s * dy[exf__reduce_at(&w, i)];
    dx[i] = acc ? dx[i] + v : v;
  }
}
#define exf__SUM_forward exf__sum_forward
#define exf__SUM_backward exf__sum_backward
#define exf__MEAN_forward exf__sum_forward
#define exf__MEAN_backward exf__sum_backward

/* ---- ops: attention ------------------------------------------------- >>attention */

typedef struct exf__att_work {
  const exf__kernels *k;
  size_t t, c, heads;
  int causal, acc;
  exf_real scale;
  const exf_real *qkv, *dout;
  exf_real *out, *stat, *dqkv;
} exf__att_work;

static int exf__ATTENTION_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  const exf_shape *x = &n->in[0]->shape;
  size_t heads = n->arg.a;
  if (x->n != 3 || x->dim[2] % 3 != 0 || x->dim[2] == 0)
    return exf__bad_shape(ctx, n, "qkv must be (B,T,3C)");
  if (heads == 0 || x->dim[2] / 3 % heads != 0) {
    exf_fail(ctx, EXF_SHAPE, "attention: width %zu is not divisible by %zu heads",
             x->dim[2] / 3, heads);
    return 0;
  }
  *out = exf_shape3(x->dim[0], x->dim[1], x->dim[2] / 3);
  return 1;
}

/* One (sequence, head) after the other; stat (B,H,2,T) */
static void exf__att_job(void *arg, size_t begin, size_t end, void *scratch) {
  const exf__att_work *w = (const exf__att_work *)arg;
  size_t i, d = w->c / w->heads, s = 3 * w->c;
  for (i = begin; i < end; i++) {
    size_t at = i % w->heads * d, row = i / w->heads * w->t;
    const exf_real *q = w->qkv + row * s + at;
    exf_real *out = w->out + row * w->c + at, *stat = w->stat + 2 * i * w->t;
    if (w->dout) {
      exf_real *dq = w->dqkv + row * s + at;
      w->k->attention_grad(w->t, d, q, q + w->c, q + 2 * w->c, s, w->scale, w->causal,
                           out, w->dout + row * w->c + at, w->c, stat, dq, dq + w->c,
                           dq + 2 * w->c, s, w->acc, scratch);
    } else {
      w->k->attention(w->t, w->t, d, q, s, q + w->c, q + 2 * w->c, s, w->scale,
                      w->causal, out, w->c, stat, scratch);
    }
  }
}

static void exf__att_run(exf_ctx *ctx, exf__node *n, exf__att_work *w) {
  const exf_shape *x = &n->in[0]->shape;
  size_t d, bytes;
  w->k = ctx->k;
  w->t = x->dim[1];
  w->c = x->dim[2] / 3;
  w->heads = n->arg.a;
  w->causal = n->arg.i;
  d = w->c / w->heads;
  w->scale = EXF__R(1) / EXF__SQRT((exf_real)d);
  w->qkv = n->in[0]->data;
  w->out = n->out->data;
  w->stat = (exf_real *)n->saved;
  bytes = exf__attention_scratch(ctx->k, w->t);
  if (bytes == 0) {
    exf_fail(ctx, EXF_SIZE, "attention: %zu positions do not fit into memory", w->t);
    return;
  }
  exf__parallel(ctx, x->dim[0] * w->heads, 1,
                8.0 * (double)x->dim[0] * (double)w->t * (double)w->t * (double)w->c,
                bytes, exf__att_job, w);
}

static void exf__ATTENTION_forward(exf_ctx *ctx, exf__node *n) {
  const exf_shape *x = &n->in[0]->shape;
  exf__att_work w;
  memset(&w, 0, sizeof w);
  n->saved = exf__arena(ctx, x->dim[0] * n->arg.a * x->dim[1], 2 * sizeof(exf_real));
  if (n->saved && n->out->size) exf__att_run(ctx, n, &w);
}

static void exf__ATTENTION_backward(exf_ctx *ctx, exf__node *n) {
  exf__att_work w;
  memset(&w, 0, sizeof w);
  w.dout = exf__dout(n);
  w.dqkv = exf__grad(ctx, n->in[0], &w.acc);
  if (w.dqkv && n->out->size) exf__att_run(ctx, n, &w);
}

/* ---- ops: fuse ----------------------------------------------------------- >>fuse */

typedef struct exf__fuse_work {
  const exf__kernels *k;
  size_t n, p;                   /* experts, numbers of one expert */
  const exf_real *a, *e;
  exf_real *out;
} exf__fuse_work;

typedef struct exf__dots_work {
  const exf__kernels *k;
  size_t p;
  const exf_real *g, *e;         /* G (p), experts (N,p) */
  double *out;                   /* (N) */
} exf__dots_work;

static void exf__fuse_job(void *arg, size_t begin, size_t end, void *scratch) {
  const exf__fuse_work *w = (const exf__fuse_work *)arg;
  (void)scratch;
  w->k->fuse(w->n, end - begin, w->p, w->a, w->e + begin, w->out + begin);
}

/* out (P) = sum_i a_i E_i, E (N,P). Training, evaluation and merge all come here, so
   that they agree bit for bit. */
static void exf__fuse_into(exf_ctx *ctx, size_t n, size_t p, const exf_real *a,
                           const exf_real *e, exf_real *out) {
  exf__fuse_work w;
  w.k = ctx->k;
  w.n = n;
  w.p = p;
  w.a = a;
  w.e = e;
  w.out = out;
  exf__parallel(ctx, p, 1024, (double)n * (double)p, 0, exf__fuse_job, &w);
}

static int exf__FUSE_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  const exf_shape *a = &n->in[0]->shape, *e = &n->in[1]->shape;
  int i;
  if (a->n != 1 || e->n < 1 || a->dim[0] != e->dim[0] || a->dim[0] == 0)
    return exf__bad_shape(ctx, n, "needs weights (N) and experts (N,..), N >= 1");
  *out = exf_shape0();
  out->n = e->n - 1;
  for (i = 0; i < out->n; i++) out->dim[i] = e->dim[i + 1];
  return 1;
}

static void exf__FUSE_forward(exf_ctx *ctx, exf__node *n) {
  exf__fuse_into(ctx, n->in[0]->size, n->out->size, n->in[0]->data, n->in[1]->data,
                 n->out->data);
}

static void exf__dots_job(void *arg, size_t begin, size_t end, void *scratch) {
  const exf__dots_work *w = (const exf__dots_work *)arg;
  (void)scratch;
  w->k->dots(end - begin, w->p, w->p, w->g, w->e + begin * w->p, w->out + begin);
}

/* G = dL/dth (P): da_i = <G, E_i>, dE_i = a_i G. The experts of an FFN gather G and the
   sum of the weights instead: the rank-one form the optimizer understands. */
static void exf__FUSE_backward(exf_ctx *ctx, exf__node *n) {
  exf_tensor *a = n->in[0], *e = n->in[1];
  size_t count = a->size, p = n->out->size, i;
  const exf_real *g = exf__dout(n);
  exf_real *ga, *ge;
  exf__dots_work w;
  int acc;
  if ((ga = exf__grad(ctx, a, &acc)) != NULL) {
    w.k = ctx->k;
    w.p = p;
    w.g = g;
    w.e = e->data;
    w.out = (double *)exf__arena(ctx, count, sizeof(double));
    if (!w.out) return;
    memset(w.out, 0, count * sizeof(double));
    exf__parallel(ctx, count, 1, 2.0 * (double)count * (double)p, 0, exf__dots_job, &w);
    for (i = 0; i < count; i++) ga[i] = EXF__R(w.out[i] + (acc ? (double)ga[i] : 0.0));
  }
  if (e->param && e->param->ffn) {
    for (i = 0; i < count; i++) e->param->a_sum[i] += (double)a->data[i];
    e->param->n_backwards++;
  }
  if ((ge = exf__grad(ctx, e, &acc)) == NULL) return;
  if (e->param && e->param->ffn) ctx->k->axpy(p, 1, g, ge, acc);
  else for (i = 0; i < count; i++) ctx->k->axpy(p, a->data[i], g, ge + i * p, acc);
}

/* ---- ops: custom ------------------------------------------------------- >>custom */

static int exf__CUSTOM_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  (void)ctx;
  *out = n->arg.custom.out;
  return 1;
}

static void exf__CUSTOM_forward(exf_ctx *ctx, exf__node *n) {
  const exf_tensor *in[EXF_MAX_INPUTS];
  int i;
  (void)ctx;
  for (i = 0; i < n->n_in; i++) in[i] = n->in[i];
  n->arg.custom.forward(n->arg.custom.user, in, n->out->data);
}

static void exf__CUSTOM_backward(exf_ctx *ctx, exf__node *n) {
  const exf_tensor *in[EXF_MAX_INPUTS];
  exf_real *din[EXF_MAX_INPUTS];
  int i, acc;
  for (i = 0; i < n->n_in; i++) {
    in[i] = n->in[i];
    din[i] = exf__grad(ctx, n->in[i], &acc);
    if (din[i] && !acc) memset(din[i], 0, n->in[i]->size * sizeof(exf_real));
  }
  if (ctx->status == EXF_OK)
    n->arg.custom.backward(n->arg.custom.user, in, n->out, exf__dout(n), din);
}

/* ---- running and walking the tape -------------------------------------- >>backward */

typedef struct exf__op_row {
  int (*shape)(exf_ctx *ctx, exf__node *n, exf_shape *out);
  void (*forward)(exf_ctx *ctx, exf__node *n);
  void (*backward)(exf_ctx *ctx, exf__node *n);
} exf__op_row;

static const exf__op_row *exf__op(int op) {
  static const exf__op_row rows[] = {
#define EXF__X(NAME, text) {exf__##NAME##_shape, exf__##NAME##_forward,                  \
                            exf__##NAME##_backward},
      EXF__OPS(EXF__X)
#undef EXF__X
  };
  return &rows[op];
}

/* Every op passes here: check, allocate, compute, record. */
static exf_tensor *exf__run(exf_ctx *ctx, int op, exf_tensor *const *in, int n_in,
                            const exf__args *arg) {
  exf__node *node;
  exf_shape shape;
  exf_real *view = NULL;
  int i, needs = 0;
  if (!ctx || ctx->status != EXF_OK) return NULL;
  for (i = 0; i < n_in; i++) {
    if (!in[i]) {
      exf_fail(ctx, EXF_ARG, "%s: input %d is NULL", exf__op_name(op), i);
      return NULL;
    }
    if (!(in[i]->flags & EXF__NEEDS)) continue;
    needs = 1;
    if (!in[i]->param || !in[i]->param->ffn || (op == EXF__OP_FUSE && i == 1)) continue;
    if (!ctx->grad_on) continue;     /* the experts of an FFN gather one gradient, G */
    exf_fail(ctx, EXF_ARG, "%s: input %d, '%.60s', holds an FFN's experts: only exf_fuse "
             "takes their gradient; use exf_detach", exf__op_name(op), i,
             in[i]->param->name);
    return NULL;
  }
  node = (exf__node *)exf__arena(ctx, 1, sizeof *node);
  if (!node) return NULL;
  node->op = op;
  node->n_in = n_in;
  for (i = 0; i < n_in; i++) node->in[i] = in[i];
  node->saved = NULL;
  node->arg = *arg;
  if (!exf__op(op)->shape(ctx, node, &shape)) return NULL;
  if (op == EXF__OP_RESHAPE) view = in[0]->data;
  if (op == EXF__OP_ADD && arg->i) view = in[1]->data;
  node->out = exf__tensor(ctx, &shape, view);
  if (!node->out) return NULL;
  exf__op(op)->forward(ctx, node);
  if (ctx->status != EXF_OK) return NULL;
  ctx->stats.n_ops++;
  if (needs && ctx->grad_on) {
    node->out->flags |= EXF__NEEDS;
    node->out->node = node;
    node->prev = ctx->tape;
    node->tape = ctx->n_tapes;
    node->walked = 0;
    ctx->tape = node;
  }
  return node->out;
}

static int exf__finite(const exf_real *x, size_t n) {
  size_t i;
  for (i = 0; i < n; i++)
    if (!(x[i] - x[i] == 0)) return 0;
  return 1;
}

static const char *exf__node_name(const exf__node *n) {
  const char *own = n->op == EXF__OP_CUSTOM ? n->arg.custom.name : NULL;
  return own ? own : exf__op_name(n->op);
}

/* The loss is not finite: the first op that made something not finite of finite inputs,
   or whose input was bad to begin with. */
static void exf__blame(exf_ctx *ctx, const exf_tensor *loss) {
  const exf__node *n, *guilty = NULL;
  const char *name = NULL;
  int i;
  for (n = ctx->tape; n; n = n->prev)
    if (!exf__finite(n->out->data, n->out->size)) guilty = n;
  for (i = 0; guilty && i < guilty->n_in; i++)
    if (guilty->in[i]->param
        && !exf__finite(guilty->in[i]->data, guilty->in[i]->size))
      name = guilty->in[i]->param->name;
  exf_fail(ctx, EXF_NUMERIC, "backward: the loss is %g; the first bad number came out of "
           "%s%s%s: lower the learning rate, clip, or check the input",
           (double)loss->data[0], guilty ? exf__node_name(guilty) : "the input",
           name ? ", from parameter " : "", name ? name : "");
}

/* An input made before an earlier backward has no tape left to carry its gradient on. */
static int exf__walkable(exf_ctx *ctx, const exf__node *n) {
  int i;
  for (i = 0; i < n->n_in; i++)
    if (n->in[i]->node && n->in[i]->node->tape != n->tape
        && (n->in[i]->flags & EXF__NEEDS)) {
      exf_fail(ctx, EXF_STATE, "backward: input %d of %s comes from a graph that an "
               "earlier call used up: run it again, or use exf_detach", i,
               exf__node_name(n));
      return 0;
    }
  return 1;
}

/* Leaves show their gradients; that of the result is given back. */
static void exf__walked(exf_ctx *ctx, exf__node *n) {
  int i;
  n->walked = 1;
  for (i = 0; i < n->n_in; i++)
    if (!n->in[i]->node && !n->in[i]->param && n->in[i]->gbuf)
      n->in[i]->grad = n->in[i]->gbuf->data;
  if (n->out->flags & EXF__KEEP) n->out->grad = n->out->gbuf->data;
  else exf__gbuf_drop(ctx, n->out);
}

/* A walk that failed leaves gradients that are not whole: models drop all of theirs. */
static void exf__walk_undo(exf__node *tape) {
  int i;
  for (; tape; tape = tape->prev)
    for (i = 0; tape->walked && i < tape->n_in; i++)
      if (tape->in[i]->param) exf_model_zero_grad(tape->in[i]->param->model);
}

EXF_API exf_status exf_backward(exf_ctx *ctx, exf_tensor *loss) {
  exf__node *n;
  exf_real *seed;
  int acc;
  if (!ctx || ctx->status != EXF_OK) return exf_ctx_status(ctx);
  if (!loss || loss->size != 1)
    return exf_fail(ctx, EXF_SHAPE, "backward: the loss must be a scalar, not %s",
                    loss ? exf__show(&loss->shape).s : "NULL");
  if (!(loss->flags & EXF__NEEDS))
    return exf_fail(ctx, EXF_STATE, "backward: the loss depends on no parameter, or was "
                    "made in a no-grad scope");
  if (loss->node && loss->node->tape != ctx->n_tapes)
    return exf_fail(ctx, EXF_STATE, "backward: the tape is used up: a call ends all "
                    "graphs recorded before it; add losses up, or run forward again");
  if (!exf__finite(loss->data, 1)) {
    exf__blame(ctx, loss);
    return ctx->status;
  }
  if (!(seed = exf__grad(ctx, loss, &acc))) return ctx->status;
  seed[0] = acc ? seed[0] + 1 : 1;
  if (!loss->node && !loss->param) loss->grad = seed;
  for (n = ctx->tape; n && ctx->status == EXF_OK; n = n->prev) {
    if (!n->out->gbuf) continue;
    if (exf__walkable(ctx, n)) exf__op(n->op)->backward(ctx, n);
    exf__walked(ctx, n);
  }
  if (ctx->status != EXF_OK) exf__walk_undo(ctx->tape);
  ctx->tape = NULL;
  ctx->n_tapes++;
  return ctx->status;
}

/* ---- ops: the public functions ------------------------------------------ >>op_api */

static exf_tensor *exf__run1(exf_ctx *ctx, int op, exf_tensor *x, double s) {
  exf__args a;
  memset(&a, 0, sizeof a);
  a.s = s;
  return exf__run(ctx, op, &x, 1, &a);
}

static exf_tensor *exf__run2(exf_ctx *ctx, int op, exf_tensor *x, exf_tensor *y, int i,
                             int j) {
  exf__args a;
  exf_tensor *in[2];
  memset(&a, 0, sizeof a);
  a.i = i;
  a.j = j;
  in[0] = x;
  in[1] = y;
  return exf__run(ctx, op, in, 2, &a);
}

EXF_API exf_tensor *exf_add(exf_ctx *ctx, exf_tensor *a, exf_tensor *b) {
  return exf__run2(ctx, EXF__OP_ADD, a, b, 0, 0);
}
/* a + b of equal shapes, written over b, which nothing may read any more */
static exf_tensor *exf__add_over(exf_ctx *ctx, exf_tensor *a, exf_tensor *b) {
  return exf__run2(ctx, EXF__OP_ADD, a, b, 1, 0);
}
EXF_API exf_tensor *exf_sub(exf_ctx *ctx, exf_tensor *a, exf_tensor *b) {
  return exf__run2(ctx, EXF__OP_SUB, a, b, 0, 0);
}
EXF_API exf_tensor *exf_mul(exf_ctx *ctx, exf_tensor *a, exf_tensor *b) {
  return exf__run2(ctx, EXF__OP_MUL, a, b, 0, 0);
}
EXF_API exf_tensor *exf_div(exf_ctx *ctx, exf_tensor *a, exf_tensor *b) {
  return exf__run2(ctx, EXF__OP_DIV, a, b, 0, 0);
}
EXF_API exf_tensor *exf_scale(exf_ctx *ctx, exf_tensor *x, double s) {
  return exf__run1(ctx, EXF__OP_SCALE, x, s);
}
EXF_API exf_tensor *exf_neg(exf_ctx *ctx, exf_tensor *x) {
  return exf__run1(ctx, EXF__OP_NEG, x, 0);
}
EXF_API exf_tensor *exf_exp(exf_ctx *ctx, exf_tensor *x) {
  return exf__run1(ctx, EXF__OP_EXP, x, 0);
}
EXF_API exf_tensor *exf_log(exf_ctx *ctx, exf_tensor *x) {
  return exf__run1(ctx, EXF__OP_LOG, x, 0);
}
EXF_API exf_tensor *exf_tanh(exf_ctx *ctx, exf_tensor *x) {
  return exf__run1(ctx, EXF__OP_TANH, x, 0);
}
EXF_API exf_tensor *exf_sqrt(exf_ctx *ctx, exf_tensor *x) {
  return exf__run1(ctx, EXF__OP_SQRT, x, 0);
}
EXF_API exf_tensor *exf_square(exf_ctx *ctx, exf_tensor *x) {
  return exf__run1(ctx, EXF__OP_SQUARE, x, 0);
}
EXF_API exf_tensor *exf_relu(exf_ctx *ctx, exf_tensor *x) {
  return exf__run1(ctx, EXF__OP_RELU, x, 0);
}
EXF_API exf_tensor *exf_gelu(exf_ctx *ctx, exf_tensor *x) {
  return exf__run1(ctx, EXF__OP_GELU, x, 0);
}
EXF_API exf_tensor *exf_gelu_tanh(exf_ctx *ctx, exf_tensor *x) {
  return exf__run1(ctx, EXF__OP_GELU_TANH, x, 0);
}
EXF_API exf_tensor *exf_silu(exf_ctx *ctx, exf_tensor *x) {
  return exf__run1(ctx, EXF__OP_SILU, x, 0);
}
EXF_API exf_tensor *exf_softmax(exf_ctx *ctx, exf_tensor *x) {
  return exf__run1(ctx, EXF__OP_SOFTMAX, x, 0);
}
EXF_API exf_tensor *exf_log_softmax(exf_ctx *ctx, exf_tensor *x) {
  return exf__run1(ctx, EXF__OP_LOG_SOFTMAX, x, 0);
}
EXF_API exf_tensor *exf_matmul(exf_ctx *ctx, exf_tensor *a, exf_tensor *b, int ta,
                               int tb) {
  return exf__run2(ctx, EXF__OP_MATMUL, a, b, ta != 0, tb != 0);
}
EXF_API exf_tensor *exf_fuse(exf_ctx *ctx, exf_tensor *a, exf_tensor *experts) {
  return exf__run2(ctx, EXF__OP_FUSE, a, experts, 0, 0);
}

static exf_tensor *exf__run3(exf_ctx *ctx, int op, exf_tensor *x, exf_tensor *w,
                             exf_tensor *b, double s, int i) {
  exf__args a;
  exf_tensor *in[3];
  memset(&a, 0, sizeof a);
  a.s = s;
  a.i = i;
  in[0] = x;
  in[1] = w;
  in[2] = b;
  return exf__run(ctx, op, in, b ? 3 : 2, &a);
}

EXF_API exf_tensor *exf_linear(exf_ctx *ctx, exf_tensor *x, exf_tensor *w,
                               exf_tensor *b) {
  return exf__run3(ctx, EXF__OP_LINEAR, x, w, b, 0, 0);
}
EXF_API exf_tensor *exf_layernorm(exf_ctx *ctx, exf_tensor *x, exf_tensor *w,
                                  exf_tensor *b, double eps) {
  return exf__run3(ctx, EXF__OP_LAYERNORM, x, w, b, eps, 0);
}
EXF_API exf_tensor *exf_rmsnorm(exf_ctx *ctx, exf_tensor *x, exf_tensor *w, double eps) {
  return exf__run3(ctx, EXF__OP_RMSNORM, x, w, NULL, eps, 0);
}

EXF_API exf_tensor *exf_embedding(exf_ctx *ctx, exf_tensor *table, const int32_t *ids,
                                  size_t n0, size_t n1) {
  exf__args a;
  memset(&a, 0, sizeof a);
  a.ids = ids;
  a.a = n0;
  a.b = n1;
  return exf__run(ctx, EXF__OP_EMBEDDING, &table, 1, &a);
}

static int exf__is_drop(exf_ctx *ctx, const char *what, double p) {
  if (!(p >= 0 && p < 1))
    exf_fail(ctx, EXF_ARG, "%s: probability %g must lie in [0, 1)", what, p);
  return p >= 0 && p < 1;
}

EXF_API exf_tensor *exf_dropout(exf_ctx *ctx, exf_tensor *x, double p) {
  if (!exf__is_drop(ctx, "dropout", p)) return NULL;
  if (p == 0 || !ctx || !ctx->training) return x;
  return exf__run1(ctx, EXF__OP_DROPOUT, x, p);
}

/* x times a dropped-out column of ones (B,1,..,1) */
EXF_API exf_tensor *exf_drop_path(exf_ctx *ctx, exf_tensor *x, double p) {
  exf_tensor *ones;
  exf_shape s = exf_shape0();
  int i;
  if (!exf__is_drop(ctx, "drop_path", p)) return NULL;
  if (!ctx || !x || p == 0 || !ctx->training) return x;
  for (s.n = x->shape.n, i = 0; i < s.n; i++) s.dim[i] = i ? 1 : x->shape.dim[0];
  ones = exf_tensor_new(ctx, s, NULL);
  for (i = 0; ones && (size_t)i < ones->size; i++) ones->data[i] = 1;
  return exf_mul(ctx, x, exf_dropout(ctx, ones, p));
}

EXF_API exf_tensor *exf_reshape(exf_ctx *ctx, exf_tensor *x, exf_shape s) {
  exf__args a;
  memset(&a, 0, sizeof a);
  a.shape = s;
  return exf__run(ctx, EXF__OP_RESHAPE, &x, 1, &a);
}

EXF_API exf_tensor *exf_permute(exf_ctx *ctx, exf_tensor *x, const int *axes) {
  exf__args a;
  memset(&a, 0, sizeof a);
  if (x && axes) memcpy(a.perm, axes, (size_t)x->shape.n * sizeof(int));
  return exf__run(ctx, EXF__OP_PERMUTE, &x, 1, &a);
}

EXF_API exf_tensor *exf_concat(exf_ctx *ctx, exf_tensor *const *x, int n, int axis) {
  exf__args a;
  memset(&a, 0, sizeof a);
  a.i = axis;
  if (!x || n < 1 || n > EXF_MAX_INPUTS) {
    exf_fail(ctx, EXF_ARG, "concat: %d tensors, must be 1..%d", x ? n : 0,
             EXF_MAX_INPUTS);
    return NULL;
  }
  return exf__run(ctx, EXF__OP_CONCAT, x, n, &a);
}

EXF_API exf_tensor *exf_slice(exf_ctx *ctx, exf_tensor *x, int axis, size_t begin,
                              size_t end) {
  exf__args a;
  memset(&a, 0, sizeof a);
  a.i = axis;
  a.a = begin;
  a.b = end;
  return exf__run(ctx, EXF__OP_SLICE, &x, 1, &a);
}

static exf_tensor *exf__run_sum(exf_ctx *ctx, int op, exf_tensor *x, unsigned axes,
                                int keep) {
  exf__args a;
  memset(&a, 0, sizeof a);
  a.a = axes;
  a.i = keep;
  return exf__run(ctx, op, &x, 1, &a);
}

EXF_API exf_tensor *exf_sum(exf_ctx *ctx, exf_tensor *x, unsigned axes, int keep) {
  return exf__run_sum(ctx, EXF__OP_SUM, x, axes, keep);
}
EXF_API exf_tensor *exf_mean(exf_ctx *ctx, exf_tensor *x, unsigned axes, int keep) {
  return exf__run_sum(ctx, EXF__OP_MEAN, x, axes, keep);
}

EXF_API exf_tensor *exf_cross_entropy(exf_ctx *ctx, exf_tensor *logits,
                                      const int32_t *labels, double label_smoothing) {
  exf__args a;
  memset(&a, 0, sizeof a);
  a.ids = labels;
  a.s = label_smoothing;
  if (!(label_smoothing >= 0 && label_smoothing <= 1)) {
    exf_fail(ctx, EXF_ARG, "cross_entropy: smoothing %g must lie in [0, 1]",
             label_smoothing);
    return NULL;
  }
  return exf__run(ctx, EXF__OP_CROSS_ENTROPY, &logits, 1, &a);
}

EXF_API exf_tensor *exf_attention(exf_ctx *ctx, exf_tensor *qkv, size_t n_heads,
                                  int causal) {
  exf__args a;
  memset(&a, 0, sizeof a);
  a.a = n_heads;
  a.i = causal != 0;
  return exf__run(ctx, EXF__OP_ATTENTION, &qkv, 1, &a);
}

EXF_API exf_tensor *exf_detach(exf_ctx *ctx, exf_tensor *x) {
  return x ? exf__tensor(ctx, &x->shape, x->data) : NULL;
}

EXF_API exf_tensor *exf_custom(exf_ctx *ctx, const exf_custom_desc *desc,
                               exf_tensor *const *in, int n) {
  exf__args a;
  memset(&a, 0, sizeof a);
  if (!desc || !desc->forward || !desc->backward || !in || n < 1
      || n > EXF_MAX_INPUTS) {
    exf_fail(ctx, EXF_ARG, "custom: needs forward, backward and 1..%d inputs",
             EXF_MAX_INPUTS);
    return NULL;
  }
  a.custom = *desc;
  return exf__run(ctx, EXF__OP_CUSTOM, in, n, &a);
}

/* ---- models ------------------------------------------------------- >>model_impl */

enum { EXF__PLAIN, EXF__EXPERTS, EXF__FUSION };   /* exf__role of a parameter */

typedef struct exf__owned {        /* a block that goes with the model */
  struct exf__owned *next;
} exf__owned;

typedef struct exf__alias {
  struct exf__alias *next;
  char *name, *target;         /* the target by name: upcycling makes it anew */
} exf__alias;

struct exf_model {
  exf_ctx *ctx;
  exf_param **params;              /* (n_params) in the order of creation */
  size_t n_params, room;
  exf_ffn **ffns;
  size_t n_ffns, ffn_room;
  exf__owned *owned;
  exf__alias *aliases;
  exf_optim *optim;                /* whose moments the parameters hold, or NULL */
};

typedef char exf__name[256];

static int exf__join(exf_ctx *ctx, exf__name out, const char *a, const char *b) {
  int n;
  if (!a) {
    exf_fail(ctx, EXF_ARG, "name: it is NULL");
    return 0;
  }
  n = snprintf(out, sizeof(exf__name), *a ? "%s.%s" : "%s%s", a, b);
  if (n > 0 && (size_t)n < sizeof(exf__name)) return 1;
  exf_fail(ctx, EXF_ARG, "name: '%.60s...' is longer than %d bytes", a,
           (int)sizeof(exf__name) - 1);
  return 0;
}

static char *exf__strdup(exf_ctx *ctx, const char *s) {
  size_t n = strlen(s) + 1;
  char *copy = (char *)exf__alloc(ctx, n);
  if (copy) memcpy(copy, s, n);
  return copy;
}

/* Cleared memory that is freed with the model. */
static void *exf__model_alloc(exf_model *model, size_t bytes) {
  exf__owned *o;
  if (!model || model->ctx->status != EXF_OK) return NULL;
  o = (exf__owned *)exf__calloc_n(model->ctx, 1, EXF__ALIGN + bytes);
  if (!o) return NULL;
  o->next = model->owned;
  model->owned = o;
  return (unsigned char *)o + EXF__ALIGN;
}

/* Makes room for more pointers in a growing array of n. */
static int exf__grow(exf_ctx *ctx, void *array, size_t n, size_t more, size_t *room) {
  void **old = *(void ***)array, **fresh;
  size_t want = 2 * n + more + 16;
  if (more <= *room - n) return 1;
  fresh = (void **)exf__alloc_n(ctx, want, sizeof(void *));
  if (!fresh) return 0;
  if (n) memcpy(fresh, old, n * sizeof(void *));
  exf__free(ctx, old);
  *(void ***)array = fresh;
  *room = want;
  return 1;
}

EXF_API exf_model *exf_model_new(exf_ctx *ctx) {
  exf_model *m;
  if (!ctx || ctx->status != EXF_OK) return NULL;
  m = (exf_model *)exf__calloc_n(ctx, 1, sizeof *m);
  if (m) m->ctx = ctx;
  return m;
}

static void exf__param_free(exf_ctx *ctx, exf_param *p) {
  if (!p) return;
  exf__free(ctx, p->t.data);
  exf__free(ctx, p->t.grad);
  exf__free(ctx, p->m);
  exf__free(ctx, p->v);
  exf__free(ctx, p->a_sum);
  exf__free(ctx, p->dense_name);
  exf__free(ctx, p->name);
  exf__free(ctx, p);
}

EXF_API exf_ctx *exf_model_ctx(const exf_model *model) {
  return model ? model->ctx : NULL;
}

/* A parameter outside the registry, values not set. */
static exf_param *exf__param_make(exf_model *model, const char *name,
                                  const exf_param_desc *desc) {
  exf_ctx *ctx = model->ctx;
  exf_param *p;
  if (!(desc->init_std - desc->init_std == 0)) {
    exf_fail(ctx, EXF_ARG, "param: '%.80s': init_std %g must be finite", name,
             desc->init_std);
    return NULL;
  }
  p = (exf_param *)exf__calloc_n(ctx, 1, sizeof *p);
  if (!p) return NULL;
  if (!exf__tensor_init(ctx, &p->t, &desc->shape)
      || !(p->t.data = (exf_real *)exf__alloc_n(ctx, p->t.size, sizeof(exf_real)))
      || !(p->name = exf__strdup(ctx, name))) {
    exf__param_free(ctx, p);
    return NULL;
  }
  p->t.param = p;
  p->t.flags = EXF__NEEDS;
  p->model = model;
  p->decay = desc->decay;
  p->init_std = desc->init_std;
  p->init_value = desc->init_value;
  p->lr_scale = 1;
  p->weight_decay = -1;
  return p;
}

/* Draws number `draw` (0 for a dense parameter) into out: the init distribution of p,
   from the stream of its dense name, times scale. */
static void exf__param_draw(const exf_param *p, const char *dense_name, uint32_t draw,
                            double scale, exf_real *out, size_t n) {
  uint64_t seed = p->model->ctx->desc.seed;
  uint32_t stream = exf_rng_stream(dense_name);
  size_t i;
  for (i = 0; i < n; i++)
    out[i] = EXF__R(p->init_std != 0
                        ? scale * p->init_std
                              * exf_rng_normal(seed, stream, draw, i)
                        : p->init_value);
}

static int exf__param_insert(exf_model *model, exf_param *p, size_t at) {
  if (!exf__grow(model->ctx, &model->params, model->n_params, 1, &model->room)) return 0;
  memmove(model->params + at + 1, model->params + at,
          (model->n_params - at) * sizeof(exf_param *));
  model->params[at] = p;
  model->n_params++;
  return 1;
}

/* A constructor that fails leaves the model as it found it: whatever has been added
   since the mark goes. */
typedef struct exf__mark {
  size_t n_params, n_ffns;
  exf__owned *owned;
} exf__mark;

static exf__mark exf__model_mark(const exf_model *model) {
  exf__mark mark = {0, 0, NULL};
  if (!model) return mark;
  mark.n_params = model->n_params;
  mark.n_ffns = model->n_ffns;
  mark.owned = model->owned;
  return mark;
}

static void exf__ffn_release(exf_ffn *f);

static void *exf__model_undo(exf_model *model, const exf__mark *mark) {
  if (!model) return NULL;
  while (model->n_params > mark->n_params)
    exf__param_free(model->ctx, model->params[--model->n_params]);
  while (model->n_ffns > mark->n_ffns) exf__ffn_release(model->ffns[--model->n_ffns]);
  while (model->owned != mark->owned) {
    exf__owned *o = model->owned;
    model->owned = o->next;
    exf__free(model->ctx, o);
  }
  return NULL;
}

static size_t exf__utf8_valid(const char *text, size_t n);
static int exf__is_moment(const char *name);
static int exf__is_bank(const exf_ffn *f, const char *name);

/* Why a file could not hold the name beside what it holds already; NULL: it can. */
static const char *exf__name_clash(const exf_model *model, const char *name) {
  const exf__alias *a;
  size_t i;
  if (!name || !*name) return "empty";
  for (i = 0; name[i]; i++)
    if ((unsigned char)name[i] < 32) return "not printable";
  if (exf__utf8_valid(name, i) < i) return "not UTF-8";
  if (exf__is_moment(name) || strcmp(name, "__metadata__") == 0) return "reserved";
  for (i = 0; i < model->n_params; i++) {
    const exf_param *p = model->params[i];
    if (strcmp(p->name, name) == 0) return "already taken";
    if (p->dense_name && strcmp(p->dense_name, name) == 0) return "that of experts";
  }
  for (a = model->aliases; a; a = a->next)
    if (strcmp(a->name, name) == 0) return "that of an alias";
  for (i = 0; i < model->n_ffns; i++)
    if (exf__is_bank(model->ffns[i], name)) return "that of a bank";
  return NULL;
}

static int exf__name_free(exf_model *model, const char *what, const char *name) {
  const char *clash = exf__name_clash(model, name);
  if (clash) exf_fail(model->ctx, EXF_ARG, "%s: the name '%.80s' is %s", what,
                      name && strcmp(clash, "not printable") != 0 ? name : "", clash);
  return clash == NULL;
}

EXF_API exf_tensor *exf_param_new(exf_model *model, const char *name,
                                  const exf_param_desc *desc) {
  exf_param *p;
  if (!model || model->ctx->status != EXF_OK) return NULL;
  if (!desc) {
    exf_fail(model->ctx, EXF_ARG, "param: the descriptor is NULL");
    return NULL;
  }
  if (!exf__name_free(model, "param", name)) return NULL;
  p = exf__param_make(model, name, desc);
  if (!p) return NULL;
  exf__param_draw(p, name, 0, 1, p->t.data, p->t.size);
  if (!exf__param_insert(model, p, model->n_params)) {
    exf__param_free(model->ctx, p);
    return NULL;
  }
  return &p->t;
}

EXF_API exf_status exf_param_alias(exf_model *model, const char *alias,
                                   const char *name) {
  exf__mark mark = exf__model_mark(model);
  exf__alias *a;
  exf_param *p;
  if (!model) return EXF_ARG;
  p = exf_model_find(model, name);
  if (!p || p->role != EXF__PLAIN)
    return exf_fail(model->ctx, EXF_ARG, p ? "alias: '%s' belongs to experts"
                                           : "alias: no parameter '%s'",
                    name ? name : "");
  if (!exf__name_free(model, "alias", alias)) return model->ctx->status;
  a = (exf__alias *)exf__model_alloc(model, sizeof *a);
  if (!a) return model->ctx->status;
  a->name = (char *)exf__model_alloc(model, strlen(alias) + 1);
  a->target = (char *)exf__model_alloc(model, strlen(name) + 1);
  if (!a->name || !a->target) {
    exf__model_undo(model, &mark);
    return model->ctx->status;
  }
  memcpy(a->name, alias, strlen(alias) + 1);
  memcpy(a->target, name, strlen(name) + 1);
  a->next = model->aliases;
  model->aliases = a;
  return EXF_OK;
}

EXF_API size_t exf_model_n_params(const exf_model *model) {
  return model ? model->n_params : 0;
}

EXF_API exf_param *exf_model_param(const exf_model *model, size_t i) {
  return model && i < model->n_params ? model->params[i] : NULL;
}

EXF_API exf_param *exf_model_find(const exf_model *model, const char *name) {
  size_t i;
  for (i = 0; model && name && i < model->n_params; i++)
    if (strcmp(model->params[i]->name, name) == 0) return model->params[i];
  return NULL;
}

EXF_API const char *exf_param_name(const exf_param *p) { return p ? p->name : ""; }
EXF_API exf_tensor *exf_param_tensor(exf_param *p) { return p ? &p->t : NULL; }
EXF_API int exf_param_decays(const exf_param *p) { return p && p->decay; }

EXF_API void exf_param_freeze(exf_param *p, int frozen) {
  if (!p) return;
  p->frozen = frozen != 0;
  p->t.flags = frozen ? 0u : (unsigned)EXF__NEEDS;
}

EXF_API size_t exf_model_count(const exf_model *model) {
  size_t i, n = 0;
  for (i = 0; model && i < model->n_params; i++) n += model->params[i]->t.size;
  return n;
}

EXF_API size_t exf_model_count_merged(const exf_model *model) {
  size_t i, n = 0;
  for (i = 0; model && i < model->n_params; i++) {
    const exf_param *p = model->params[i];
    if (p->role == EXF__EXPERTS) n += p->t.size / p->t.shape.dim[0];
    else if (p->role == EXF__PLAIN) n += p->t.size;
  }
  return n;
}

static void exf__param_zero_grad(exf_param *p) {
  p->has_grad = 0;
  p->n_backwards = 0;
  if (p->a_sum) memset(p->a_sum, 0, p->t.shape.dim[0] * sizeof(double));
}

EXF_API void exf_model_zero_grad(exf_model *model) {
  size_t i;
  for (i = 0; model && i < model->n_params; i++) exf__param_zero_grad(model->params[i]);
}

/* ---- gradient check ------------------------------------------------- >>gradcheck */

static double exf__loss_at(exf_model *model, exf_real *x, double at,
                           exf_tensor *(*loss)(exf_ctx *, void *), void *user) {
  exf_real kept = *x;
  double f;
  model->ctx->n_dropouts = 0;
  *x = EXF__R(at);
  f = exf_item(loss(model->ctx, user));
  *x = kept;
  exf_rewind(model->ctx);
  return f;
}

/* f'(x) = (f(x-2h) - 8 f(x-h) + 8 f(x+h) - f(x+2h)) / 12h + O(h^4), for every number of
   one parameter against grad */
static void exf__gradcheck_param(exf_model *model, exf_param *p, const exf_real *grad,
                                 exf_real *numeric, double h,
                                 exf_tensor *(*loss)(exf_ctx *, void *), void *user,
                                 exf_gradcheck_report *report) {
  double largest = 0, diff, relative;
  size_t i;
  for (i = 0; i < p->t.size; i++) {
    exf_real *x = &p->t.data[i];
    double x0 = (double)*x;
    double f1 = exf__loss_at(model, x, x0 - 2 * h, loss, user);
    double f2 = exf__loss_at(model, x, x0 - h, loss, user);
    double f3 = exf__loss_at(model, x, x0 + h, loss, user);
    double f4 = exf__loss_at(model, x, x0 + 2 * h, loss, user);
    numeric[i] = EXF__R((f1 - 8 * f2 + 8 * f3 - f4) / (12 * h));
    largest = EXF__MAX(largest, fabs((double)numeric[i]));
  }
  report->largest = report->n_checked ? EXF__MIN(report->largest, largest) : largest;
  for (i = 0; i < p->t.size; i++) {
    diff = fabs((double)grad[i] - (double)numeric[i]);
    if (diff != diff) diff = HUGE_VAL;   /* a NaN is the worst of all */
    relative = diff == 0 ? 0
                         : diff / EXF__MAX(fabs((double)numeric[i]), largest / 1000);
    if (diff != 0) diff /= largest;      /* of a gradient of zeros: infinite */
    if (!(relative <= report->worst_relative)) report->worst_relative = relative;
    if (!(diff <= report->worst)) {
      report->worst = diff;
      snprintf(report->where, sizeof report->where, "%.100s[%zu]", p->name, i);
    }
    report->n_checked++;
  }
}

EXF_API exf_status exf_gradcheck(exf_model *model,
                                 exf_tensor *(*loss)(exf_ctx *ctx, void *user),
                                 void *user, double h, exf_gradcheck_report *report) {
  exf_ctx *ctx = exf_model_ctx(model);
  size_t i;
  exf_real *grad;
  int was;
  if (!ctx) return EXF_ARG;
  if (!loss || !report)
    return exf_fail(ctx, EXF_ARG, "exf_gradcheck: the loss or the report is NULL");
  memset(report, 0, sizeof *report);
  if (h == 0) h = sizeof(exf_real) == 8 ? 1e-3 : 1e-2;
  exf_model_zero_grad(model);
  exf_rewind(ctx);
  ctx->n_dropouts = 0;
  if (exf_backward(ctx, loss(ctx, user)) != EXF_OK) return ctx->status;
  exf_rewind(ctx);
  was = exf_grad_set(ctx, 0);
  for (i = 0; i < model->n_params && ctx->status == EXF_OK; i++) {
    exf_param *p = model->params[i];
    if (p->frozen || !p->t.size) continue;
    grad = (exf_real *)exf__calloc_n(ctx, p->t.size, 2 * sizeof(exf_real));
    if (grad && (!p->has_grad || exf_expert_grad(p, grad) == EXF_OK))
      exf__gradcheck_param(model, p, grad, grad + p->t.size, h, loss, user, report);
    exf__free(ctx, grad);
  }
  exf_grad_set(ctx, was);
  exf_model_zero_grad(model);
  return ctx->status;
}

/* ---- layers ----------------------------------------------------------- >>layers */

/* Parameter "<name>.<part>". */
static exf_tensor *exf__layer_param(exf_model *model, const char *name, const char *part,
                                    exf_shape shape, double std, double value,
                                    int decay) {
  exf_param_desc d;
  exf__name full;
  if (!model || !exf__join(model->ctx, full, name, part)) return NULL;
  memset(&d, 0, sizeof d);
  d.shape = shape;
  d.init_std = std;
  d.init_value = value;
  d.decay = decay;
  return exf_param_new(model, full, &d);
}

EXF_API exf_linear_layer *exf_linear_new(exf_model *model, const char *name, size_t in,
                                         size_t out, int bias, double init_std) {
  exf__mark mark = exf__model_mark(model);
  exf_linear_layer *l = (exf_linear_layer *)exf__model_alloc(model, sizeof *l);
  if (!l) return NULL;
  if (init_std == 0 && in) init_std = 1 / sqrt((double)in);
  l->weight = exf__layer_param(model, name, "weight", exf_shape2(out, in), init_std, 0,
                               1);
  if (bias) l->bias = exf__layer_param(model, name, "bias", exf_shape1(out), 0, 0, 0);
  if (model->ctx->status == EXF_OK) return l;
  return (exf_linear_layer *)exf__model_undo(model, &mark);
}

EXF_API exf_tensor *exf_linear_forward(exf_ctx *ctx, const exf_linear_layer *layer,
                                       exf_tensor *x) {
  return layer ? exf_linear(ctx, x, layer->weight, layer->bias) : NULL;
}

static exf_norm_layer *exf__norm_new(exf_model *model, const char *name, size_t width,
                                     int bias, double eps, int rms) {
  exf__mark mark = exf__model_mark(model);
  exf_norm_layer *l = (exf_norm_layer *)exf__model_alloc(model, sizeof *l);
  if (!l) return NULL;
  l->eps = eps;
  l->rms = rms;
  l->weight = exf__layer_param(model, name, "weight", exf_shape1(width), 0, 1, 0);
  if (bias) l->bias = exf__layer_param(model, name, "bias", exf_shape1(width), 0, 0, 0);
  if (model->ctx->status == EXF_OK) return l;
  return (exf_norm_layer *)exf__model_undo(model, &mark);
}

EXF_API exf_norm_layer *exf_layernorm_new(exf_model *model, const char *name,
                                          size_t width, int bias, double eps) {
  return exf__norm_new(model, name, width, bias, eps, 0);
}

EXF_API exf_norm_layer *exf_rmsnorm_new(exf_model *model, const char *name, size_t width,
                                        double eps) {
  return exf__norm_new(model, name, width, 0, eps, 1);
}

EXF_API exf_tensor *exf_norm_forward(exf_ctx *ctx, const exf_norm_layer *layer,
                                     exf_tensor *x) {
  if (!layer) return NULL;
  return layer->rms ? exf_rmsnorm(ctx, x, layer->weight, layer->eps)
                    : exf_layernorm(ctx, x, layer->weight, layer->bias, layer->eps);
}

EXF_API exf_tensor *exf_embedding_new(exf_model *model, const char *name, size_t n,
                                      size_t width, double init_std) {
  return exf__layer_param(model, name, "weight", exf_shape2(n, width), init_std, 0, 1);
}

/* ---- ExFusion ------------------------------------------------- >>exfusion_impl */

/* An FFN is dense, or holds N experts for each of its tensors and the weights that fuse
   them. In every step

     th = sum_i a_i th_i                      one op `fuse` per tensor, weights shared
     y  = act(x W1^T + b1) W2^T + b2          one dense FFN pass on th

   and backward gives G = dL/dth as for a dense FFN, dL/da_i = sum over the tensors of
   <G, th_i>, and dL/dth_i = a_i G, which is never written down: the experts keep G and
   the sum of a, and the optimizer multiplies. Only where a comes from differs:

     sw   a = 1/N
     dw   a learnable, itself or as softmax(z / tau)
     mb   r = softmax((R u + c) / tau), u = mean over all rows of x
          a = mu M + (1 - mu) r, and M <- a after the step     (routed: a = r)
          in evaluation a = M

   ExFusion (arXiv 2603.27965) fixes the three variants and the single fused FFN; the
   formulas of router, bank and upcycling are this library's reading of it. */

enum { EXF__W1, EXF__B1, EXF__W2, EXF__B2, EXF__WG, EXF__BG, EXF__N_PARTS };

struct exf_ffn {
  exf_model *model;
  char *name;
  exf_ffn_desc desc;
  exf_fusion_desc fusion;            /* resolved; EXF_DENSE when dense */
  exf_param *part[EXF__N_PARTS];     /* dense (..) or experts (N,..); NULL if absent */
  exf_param *weight;                 /* dw: a or z (N) */
  exf_param *router, *router_bias;   /* mb: R (N,C), c (N) */
  exf_tensor bank;                   /* mb: M; sw: the constant 1/N; (N) */
  exf_real *routed;                  /* mb: the last r (N) */
  int trained;                       /* the dense parameters are not a fresh init */
  uint32_t n_upcycles;               /* so far: each draws other numbers */
};

EXF_API const char *exf_variant_name(exf_variant v) {
  static const char *const names[] = {"dense", "sw", "dw", "mb"};
  return (unsigned)v < 4u ? names[v] : "?";
}

EXF_API const char *exf_upcycle_name(exf_upcycle u) {
  static const char *const names[] = {"default", "zerosum", "independent",
                                      "independent-plain", "copy", "drop"};
  return (unsigned)u < 6u ? names[u] : "?";
}

EXF_API const char *exf_act_name(exf_act a) {
  static const char *const names[] = {"gelu", "gelu_tanh", "relu", "silu", "swiglu"};
  return (unsigned)a < 5u ? names[a] : "?";
}

/* Fills in the defaults; 0 and an error when a value is out of range. */
static int exf__fusion_resolve(exf_ctx *ctx, exf_fusion_desc *d, int from_scratch) {
  if (d->n_experts == 0) d->n_experts = 4;
  if (d->mu == 0) d->mu = 0.95;
  if (d->mu < 0) d->mu = 0;
  if (d->tau == 0) d->tau = 1;
  if (d->spread == 0) d->spread = 1;
  if (d->drop == 0) d->drop = 0.5;
  d->lean = d->lean && d->variant == EXF_SW ? EXF__MAX(d->lean, d->n_experts) : 0;
  if (d->lean) d->n_experts = d->lean;
  if (d->upcycle == EXF_UP_DEFAULT)
    d->upcycle = from_scratch ? EXF_UP_INDEPENDENT : EXF_UP_ZEROSUM;
  if ((unsigned)d->variant > EXF_MB || (unsigned)d->upcycle > EXF_UP_DROP)
    exf_fail(ctx, EXF_ARG, "ffn: unknown variant or upcycling mode");
  else if (!(d->mu <= 1) || !(d->tau > 0) || !(d->drop <= 1) || !(d->drop >= 0)
           || !(d->spread - d->spread == 0))
    exf_fail(ctx, EXF_ARG, "ffn: mu %g must lie in [0,1], tau %g be positive, drop %g "
             "lie in [0,1], spread %g be finite", d->mu, d->tau, d->drop, d->spread);
  return ctx->status == EXF_OK;
}

static exf_param *exf__ffn_part(exf_ffn *f, const char *layer, const char *what,
                                exf_shape shape, double std) {
  exf__name name;
  exf_tensor *t;
  if (!exf__join(f->model->ctx, name, f->name, layer)) return NULL;
  t = exf__layer_param(f->model, name, what, shape, std, 0, shape.n > 1);
  return t ? t->param : NULL;
}

static exf_ffn *exf__ffn_make(exf_model *model, const char *name,
                              const exf_ffn_desc *desc) {
  exf_ffn *f = (exf_ffn *)exf__model_alloc(model, sizeof *f);
  exf_ffn_desc d;
  size_t c, h;
  if (f && (!name || !desc))
    exf_fail(model->ctx, EXF_ARG, "ffn: the name or the descriptor is NULL");
  if (!f || !name || !desc
      || !(f->name = (char *)exf__model_alloc(model, strlen(name) + 1)))
    return NULL;
  memcpy(f->name, name, strlen(name) + 1);
  d = *desc;
  if (d.hidden == 0 && !exf__mul_size(4, d.width, &d.hidden)) d.hidden = SIZE_MAX;
  c = d.width;
  h = d.hidden;
  if (!d.up) d.up = "c_fc";
  if (!d.down) d.down = "c_proj";
  if (!d.gate) d.gate = "c_gate";
  if (d.init_std == 0 && c) d.init_std = 1 / sqrt((double)c);
  if (d.init_std_out == 0 && h) d.init_std_out = 1 / sqrt((double)h);
  f->model = model;
  f->desc = d;
  if (c == 0 || (unsigned)d.act > EXF_SWIGLU) {
    exf_fail(model->ctx, EXF_ARG, "ffn: '%s': the width must be positive and the "
             "activation known", name);
    return NULL;
  }
  if (d.act == EXF_SWIGLU) {
    f->part[EXF__WG] = exf__ffn_part(f, d.gate, "weight", exf_shape2(h, c), d.init_std);
    if (d.bias) f->part[EXF__BG] = exf__ffn_part(f, d.gate, "bias", exf_shape1(h), 0);
  }
  f->part[EXF__W1] = exf__ffn_part(f, d.up, "weight", exf_shape2(h, c), d.init_std);
  if (d.bias) f->part[EXF__B1] = exf__ffn_part(f, d.up, "bias", exf_shape1(h), 0);
  f->part[EXF__W2] = exf__ffn_part(f, d.down, "weight", exf_shape2(c, h), d.init_std_out);
  if (d.bias) f->part[EXF__B2] = exf__ffn_part(f, d.down, "bias", exf_shape1(c), 0);
  if (model->ctx->status != EXF_OK
      || !exf__grow(model->ctx, &model->ffns, model->n_ffns, 1, &model->ffn_room))
    return NULL;
  model->ffns[model->n_ffns++] = f;
  if (d.fusion.variant != EXF_DENSE && exf_ffn_upcycle(f, &d.fusion) != EXF_OK)
    return NULL;
  return f;
}

EXF_API exf_ffn *exf_ffn_new(exf_model *model, const char *name,
                             const exf_ffn_desc *desc) {
  exf__mark mark = exf__model_mark(model);
  exf_ffn *f = exf__ffn_make(model, name, desc);
  return f ? f : (exf_ffn *)exf__model_undo(model, &mark);
}

static void exf__ffn_release(exf_ffn *f) {
  exf__free(f->model->ctx, f->bank.data);
  exf__free(f->model->ctx, f->routed);
}

/* ---- weights and forward ------------------------------------------------- >>ffn */

/* r = softmax((R u + c) / tau), u (C) = mean over all rows of x */
static exf_tensor *exf__ffn_route(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x) {
  exf_tensor *u, *l, *r;
  if (!x) return NULL;
  if (x->shape.n < 1 || x->shape.dim[x->shape.n - 1] != f->desc.width) {
    exf_fail(ctx, EXF_SHAPE, "ffn: '%s' takes (..,%zu), not %s", f->name, f->desc.width,
             exf__show(&x->shape).s);
    return NULL;
  }
  u = exf_mean(ctx, x, EXF_AXIS(x->shape.n - 1) - 1u, 0);
  if (!f->fusion.attach) u = exf_detach(ctx, u);
  l = exf_linear(ctx, u, &f->router->t, &f->router_bias->t);
  if (f->fusion.tau != 1) l = exf_scale(ctx, l, 1 / f->fusion.tau);
  r = exf_softmax(ctx, l);
  if (r && ctx->training) memcpy(f->routed, r->data, r->size * sizeof(exf_real));
  return r;
}

/* The weights a (N) of this pass. The bank's share is written r + mu (M - r), which is
   exactly 1 for one expert. */
static exf_tensor *exf__ffn_weights(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x) {
  exf_tensor *r, *bank = (exf_tensor *)(uintptr_t)&f->bank;
  if (f->fusion.variant == EXF_DW) {
    if (!f->fusion.dw_softmax) return &f->weight->t;
    r = &f->weight->t;
    if (f->fusion.tau != 1) r = exf_scale(ctx, r, 1 / f->fusion.tau);
    return exf_softmax(ctx, r);
  }
  if (f->fusion.variant == EXF_SW || !(ctx->training || ctx->routing)) return bank;
  r = exf__ffn_route(ctx, f, x);
  if (f->fusion.routed) return r;
  return exf_add(ctx, r, exf_scale(ctx, exf_sub(ctx, bank, r), f->fusion.mu));
}

EXF_API exf_tensor *exf_ffn_forward(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x) {
  static const int unary[] = {EXF__U_GELU, EXF__U_GELU_TANH, EXF__U_RELU, EXF__U_SILU};
  exf_tensor *th[EXF__N_PARTS], *a, *h;
  int i;
  if (!f) return NULL;
  a = f->fusion.variant == EXF_DENSE ? NULL : exf__ffn_weights(ctx, f, x);
  if (f->fusion.variant != EXF_DENSE && !a) return NULL;
  for (i = 0; i < EXF__N_PARTS; i++) {
    th[i] = f->part[i] ? &f->part[i]->t : NULL;
    if (th[i] && a && !(th[i] = exf_fuse(ctx, a, th[i]))) return NULL;
  }
  h = exf_linear(ctx, x, th[EXF__W1], th[EXF__B1]);
  if (f->desc.act != EXF_SWIGLU)
    return exf__run3(ctx, EXF__OP_LINEAR, h, th[EXF__W2], th[EXF__B2], 0,
                     1 + unary[f->desc.act]);
  h = exf_mul(ctx, exf_silu(ctx, exf_linear(ctx, x, th[EXF__WG], th[EXF__BG])), h);
  return exf_linear(ctx, h, th[EXF__W2], th[EXF__B2]);
}

/* The weights of evaluation and merge, by the same kernels as the ops. out (N) */
static void exf__ffn_merge_weights(const exf_ffn *f, exf_real *out) {
  size_t n = f->fusion.n_experts;
  const exf__kernels *k = f->model->ctx->k;
  if (f->fusion.variant != EXF_DW) {
    memcpy(out, f->bank.data, n * sizeof(exf_real));
    return;
  }
  memcpy(out, f->weight->t.data, n * sizeof(exf_real));
  if (!f->fusion.dw_softmax) return;
  if (f->fusion.tau != 1)
    k->axpy(n, EXF__R(1 / f->fusion.tau), f->weight->t.data, out, 0);
  k->softmax(1, n, out, out);
}

/* ---- upcycling and merging --------------------------------------------- >>upcycle */

/* What upcycling or merging is about to put in place of an FFN's parameters: everything
   is made first, then put in its place by moves that cannot fail. */
typedef struct exf__ffn_change {
  int made;                          /* 0: this FFN stays as it is */
  exf_fusion_desc fusion;            /* resolved; EXF_DENSE: a merge */
  exf_param *part[EXF__N_PARTS];
  exf_param *weight, *router, *router_bias;
  exf_real *bank, *routed;
} exf__ffn_change;

static void exf__change_free(exf_ctx *ctx, exf__ffn_change *c) {
  int i;
  for (i = 0; i < EXF__N_PARTS; i++) exf__param_free(ctx, c->part[i]);
  exf__param_free(ctx, c->weight);
  exf__param_free(ctx, c->router);
  exf__param_free(ctx, c->router_bias);
  exf__free(ctx, c->bank);
  exf__free(ctx, c->routed);
}

static size_t exf__param_index(const exf_model *model, const exf_param *p) {
  size_t i = 0;
  while (i < model->n_params && model->params[i] != p) i++;
  return i;
}

static void exf__param_drop(exf_model *model, exf_param *p) {
  size_t i = exf__param_index(model, p);
  if (!p || i == model->n_params) return;
  memmove(model->params + i, model->params + i + 1,
          (model->n_params - i - 1) * sizeof(exf_param *));
  model->n_params--;
}

/* Exchanges the FFN's parameters with those of c, in their places in the registry; the
   weight and router come right behind. Room was made before. */
static void exf__change_apply(exf_ffn *f, exf__ffn_change *c) {
  exf_model *m = f->model;
  exf__ffn_change old;
  size_t i, last = 0, at;
  int k;
  memset(&old, 0, sizeof old);
  exf__param_drop(m, f->weight);
  exf__param_drop(m, f->router);
  exf__param_drop(m, f->router_bias);
  for (k = 0; k < EXF__N_PARTS; k++) {
    if (!f->part[k]) continue;
    at = exf__param_index(m, f->part[k]);
    m->params[at] = c->part[k];
    last = EXF__MAX(last, at + 1);
    old.part[k] = f->part[k];
    f->part[k] = c->part[k];
  }
  old.weight = f->weight;
  old.router = f->router;
  old.router_bias = f->router_bias;
  old.bank = f->bank.data;
  old.routed = f->routed;
  f->weight = c->weight;
  f->router = c->router;
  f->router_bias = c->router_bias;
  f->bank.data = c->bank;
  f->routed = c->routed;
  for (i = 0; i < 3; i++) {
    exf_param *p = i == 0 ? f->weight : i == 1 ? f->router : f->router_bias;
    if (p) exf__param_insert(m, p, last++);
  }
  f->fusion = c->fusion;
  if (c->fusion.variant == EXF_DENSE) {
    f->trained = 1;
  } else {
    f->n_upcycles++;
    f->bank.shape = exf_shape1(c->fusion.n_experts);
    f->bank.size = c->fusion.n_experts;
  }
  exf__change_free(m->ctx, &old);
}

static int exf__is_bank(const exf_ffn *f, const char *name) {
  size_t n = strlen(f->name);
  return f->fusion.variant == EXF_MB && strncmp(name, f->name, n) == 0
         && strcmp(name + n, ".bank") == 0;
}

/* "<ffn>.<what>" */
static exf_param *exf__fusion_param(exf_ffn *f, const char *what, exf_shape shape,
                                    double std, double value) {
  exf__name name;
  exf_param_desc d;
  exf_param *p;
  if (!exf__join(f->model->ctx, name, f->name, what)
      || !exf__name_free(f->model, "ffn", name))
    return NULL;
  memset(&d, 0, sizeof d);
  d.shape = shape;
  d.init_std = std;
  d.init_value = value;
  p = exf__param_make(f->model, name, &d);
  if (!p) return NULL;
  p->role = EXF__FUSION;
  exf__param_draw(p, name, 0, 1, p->t.data, p->t.size);
  return p;
}

/* th_0 + s (e_i - mean e): e_i the draws already in E (N,P), th0 (P) */
static void exf__zerosum(exf_real *e, const exf_real *th0, size_t n, size_t p, double s) {
  size_t i, j;
  for (j = 0; j < p; j++) {
    double mean = 0;
    for (i = 0; i < n; i++) mean += (double)e[i * p + j];
    mean /= (double)n;
    for (i = 0; i < n; i++)
      e[i * p + j] = EXF__R((double)th0[j] + s * ((double)e[i * p + j] - mean));
  }
}

/* drop: which of the h hidden units of an expert are drawn afresh: the first count of a
   random order (unit[j] = 1). */
static void exf__drop_units(const exf_ffn *f, double fraction, uint32_t draw,
                            size_t *order, unsigned char *unit) {
  size_t h = f->desc.hidden, j, k, count = (size_t)(fraction * (double)h);
  uint32_t stream = exf_rng_stream(f->name);
  for (j = 0; j < h; j++) order[j] = j;
  memset(unit, 0, h);
  for (j = 0; j < count; j++) {
    double u = exf_rng_uniform(f->model->ctx->desc.seed, stream, draw, j);
    size_t pick = j + (size_t)(u * (double)(h - j));
    k = order[j];
    order[j] = order[pick];
    order[pick] = k;
    unit[order[j]] = 1;
  }
}

/* Keeps the fresh draws in e (P) of the chosen units, copies the rest from th0. */
static void exf__drop_mix(const exf_ffn *f, int part, const unsigned char *unit,
                          const exf_real *th0, exf_real *e, size_t p) {
  size_t h = f->desc.hidden, j, cols = p / h;
  for (j = 0; j < p; j++) {
    int fresh = part == EXF__W2 ? unit[j % h] : part == EXF__B2 ? 0 : unit[j / cols];
    if (!fresh) e[j] = th0[j];
  }
}

/* The number of the first expert's draws. A fresh independent expert 0 draws what a dense
   FFN draws (number 0); where th_0 stays part of the experts the draws must be others. */
static uint32_t exf__first_draw(const exf_ffn *f, const exf_fusion_desc *d) {
  int keeps = d->upcycle == EXF_UP_ZEROSUM || d->upcycle == EXF_UP_DROP;
  return (f->n_upcycles + (keeps ? 1u : 0u)) << 16;
}

/* Expert values (N,P) of one part by the upcycling mode. */
static int exf__upcycle_fill(const exf_ffn *f, const exf_fusion_desc *d, int part,
                             exf_param *e) {
  exf_ctx *ctx = f->model->ctx;
  const exf_param *th0 = f->part[part];
  size_t n = d->n_experts, p = th0->t.size, h = f->desc.hidden, i;
  double scale = d->upcycle == EXF_UP_INDEPENDENT ? sqrt((double)n) : 1;
  size_t *order = NULL;
  unsigned char *unit = NULL;
  uint32_t draw = exf__first_draw(f, d);
  if (d->upcycle == EXF_UP_DROP) {
    order = (size_t *)exf__alloc_n(ctx, h, sizeof(size_t));
    unit = (unsigned char *)exf__alloc_n(ctx, h, 1);
  }
  for (i = 0; i < n && ctx->status == EXF_OK; i++) {
    exf_real *out = e->t.data + i * p;
    if (d->upcycle == EXF_UP_COPY) {
      memcpy(out, th0->t.data, p * sizeof(exf_real));
      continue;
    }
    exf__param_draw(th0, th0->name, draw + (uint32_t)i, scale, out, p);
    if (d->upcycle == EXF_UP_DROP) {
      exf__drop_units(f, d->drop, draw + (uint32_t)i, order, unit);
      exf__drop_mix(f, part, unit, th0->t.data, out, p);
    }
  }
  if (d->upcycle == EXF_UP_ZEROSUM) exf__zerosum(e->t.data, th0->t.data, n, p, d->spread);
  exf__free(ctx, order);
  exf__free(ctx, unit);
  return ctx->status == EXF_OK;
}

/* "<ffn>.c_fc.weight" -> "<ffn>.experts.c_fc.weight" (N,..) */
static exf_param *exf__expert_param(exf_ffn *f, const exf_fusion_desc *d, int part) {
  exf_ctx *ctx = f->model->ctx;
  const exf_param *th0 = f->part[part];
  exf__name tail, name;
  exf_param_desc pd;
  exf_param *p;
  int i;
  if (!exf__join(ctx, tail, "experts", th0->name + strlen(f->name) + (*f->name ? 1 : 0))
      || !exf__join(ctx, name, f->name, tail))
    return NULL;
  memset(&pd, 0, sizeof pd);
  pd.shape.n = th0->t.shape.n + 1;
  pd.shape.dim[0] = d->n_experts;
  for (i = 1; i < pd.shape.n; i++) pd.shape.dim[i] = th0->t.shape.dim[i - 1];
  pd.init_std = th0->init_std;
  pd.init_value = th0->init_value;
  pd.decay = th0->decay;
  p = exf__param_make(f->model, name, &pd);
  if (!p) return NULL;
  p->role = EXF__EXPERTS;
  p->ffn = f;
  exf_param_freeze(p, th0->frozen);
  p->dense_name = exf__strdup(ctx, th0->name);
  p->a_sum = (double *)exf__calloc_n(ctx, d->n_experts, sizeof(double));
  if (p->dense_name && p->a_sum && exf__upcycle_fill(f, d, part, p)) return p;
  exf__param_free(ctx, p);
  return NULL;
}

/* lean: the mean of the experts p takes their place, as one. */
static void exf__lean(exf_ctx *ctx, exf_param *p) {
  size_t i, n = p->t.shape.dim[0], size = p->t.size / n;
  exf_real *a = (exf_real *)exf__alloc_n(ctx, n, sizeof(exf_real));
  exf_real *mean = (exf_real *)exf__alloc_n(ctx, size, sizeof(exf_real));
  if (a && mean) {
    for (i = 0; i < n; i++) a[i] = EXF__R(1.0 / (double)n);
    exf__fuse_into(ctx, n, size, a, p->t.data, mean);
    exf__free(ctx, p->t.data);
    p->t.data = mean;
    p->t.size = size;
    p->t.shape.dim[0] = 1;
  } else {
    exf__free(ctx, mean);
  }
  exf__free(ctx, a);
}

static void exf__upcycle_make(exf_ffn *f, const exf_fusion_desc *desc,
                              exf__ffn_change *c) {
  exf_ctx *ctx = f->model->ctx;
  exf_fusion_desc *d = &c->fusion;
  exf_shape shape;
  size_t i, n;
  int k;
  *d = *desc;
  if (f->fusion.variant != EXF_DENSE) {
    exf_fail(ctx, EXF_STATE, "upcycle: %s already has experts: merge it first", f->name);
    return;
  }
  if (!exf__fusion_resolve(ctx, d, !f->trained)) return;
  for (k = 0; k < EXF__N_PARTS && ctx->status == EXF_OK; k++)
    if (f->part[k] && (c->part[k] = exf__expert_param(f, d, k)) != NULL && d->lean)
      exf__lean(ctx, c->part[k]);
  if (d->lean) d->n_experts = 1;
  n = d->n_experts;
  shape = exf_shape1(n);
  c->bank = (exf_real *)exf__calloc_n(ctx, n, sizeof(exf_real));
  c->routed = (exf_real *)exf__calloc_n(ctx, n, sizeof(exf_real));
  for (i = 0; c->bank && c->routed && i < n; i++)
    c->bank[i] = c->routed[i] = EXF__R(1.0 / (double)n);
  if (d->variant == EXF_DW)
    c->weight = exf__fusion_param(f, "fusion.weight", shape, 0,
                                  d->dw_softmax ? 0 : 1.0 / (double)n);
  if (d->variant == EXF_MB) {
    c->router = exf__fusion_param(f, "router.weight", exf_shape2(n, f->desc.width), 0.02,
                                  0);
    c->router_bias = exf__fusion_param(f, "router.bias", shape, 0, 0);
  }
  c->made = 1;
}

static void exf__merge_make(exf_ffn *f, exf__ffn_change *c) {
  exf_ctx *ctx = f->model->ctx;
  exf_real *a;
  int k;
  if (f->fusion.variant == EXF_DENSE) return;
  a = (exf_real *)exf__alloc_n(ctx, f->fusion.n_experts, sizeof(exf_real));
  if (a) exf__ffn_merge_weights(f, a);
  for (k = 0; k < EXF__N_PARTS && ctx->status == EXF_OK; k++) {
    const exf_param *e = f->part[k];
    exf_param_desc d;
    if (!e) continue;
    memset(&d, 0, sizeof d);
    d.shape = e->t.shape;
    d.shape.n--;
    memmove(d.shape.dim, e->t.shape.dim + 1, (size_t)d.shape.n * sizeof(size_t));
    d.init_std = e->init_std;
    d.init_value = e->init_value;
    d.decay = e->decay;
    c->part[k] = exf__param_make(f->model, e->dense_name, &d);
    if (!c->part[k]) break;
    exf_param_freeze(c->part[k], e->frozen);
    exf__fuse_into(ctx, f->fusion.n_experts, c->part[k]->t.size, a, e->t.data,
                   c->part[k]->t.data);
  }
  exf__free(ctx, a);
  c->made = 1;
}

/* Upcycles n FFNs of a model, or merges them (EXF_DENSE): all of them or none. */
static exf_status exf__ffns_change(exf_model *m, exf_ffn *const *ffns, size_t n,
                                   const exf_fusion_desc *desc) {
  exf_ctx *ctx = m->ctx;
  exf__ffn_change *c;
  size_t i;
  if (ctx->status != EXF_OK) return ctx->status;
  c = (exf__ffn_change *)exf__calloc_n(ctx, n, sizeof *c);
  if (!c) return ctx->status;
  for (i = 0; i < n && ctx->status == EXF_OK; i++) {
    if (desc->variant == EXF_DENSE) exf__merge_make(ffns[i], &c[i]);
    else exf__upcycle_make(ffns[i], desc, &c[i]);
  }
  if (ctx->status == EXF_OK) exf__grow(ctx, &m->params, m->n_params, 3 * n, &m->room);
  for (i = 0; i < n; i++) {
    if (ctx->status != EXF_OK) exf__change_free(ctx, &c[i]);
    else if (c[i].made) exf__change_apply(ffns[i], &c[i]);
  }
  exf__free(ctx, c);
  return ctx->status;
}

static exf_status exf__upcycle(exf_model *m, exf_ffn *const *ffns, size_t n,
                               const exf_fusion_desc *desc) {
  if (m->ctx->status != EXF_OK) return m->ctx->status;
  if (!desc) return exf_fail(m->ctx, EXF_ARG, "upcycle: the descriptor is NULL");
  if (desc->variant == EXF_DENSE)
    return exf_fail(m->ctx, EXF_ARG, "upcycle: the variant is dense: choose sw, dw or "
                    "mb, or merge");
  return exf__ffns_change(m, ffns, n, desc);
}

EXF_API exf_status exf_ffn_upcycle(exf_ffn *f, const exf_fusion_desc *desc) {
  return f ? exf__upcycle(f->model, &f, 1, desc) : EXF_ARG;
}

EXF_API exf_status exf_ffn_merge(exf_ffn *f) {
  const exf_fusion_desc dense = exf_ffn_fusion(NULL);
  return f ? exf__ffns_change(f->model, &f, 1, &dense) : EXF_ARG;
}

EXF_API exf_status exf_model_upcycle(exf_model *model, const exf_fusion_desc *desc) {
  return model ? exf__upcycle(model, model->ffns, model->n_ffns, desc) : EXF_ARG;
}

EXF_API exf_status exf_model_merge(exf_model *model) {
  const exf_fusion_desc dense = exf_ffn_fusion(NULL);
  return model ? exf__ffns_change(model, model->ffns, model->n_ffns, &dense) : EXF_ARG;
}

EXF_API size_t exf_model_n_ffns(const exf_model *model) {
  return model ? model->n_ffns : 0;
}
EXF_API exf_ffn *exf_model_ffn(const exf_model *model, size_t i) {
  return model && i < model->n_ffns ? model->ffns[i] : NULL;
}
EXF_API const char *exf_ffn_name(const exf_ffn *ffn) { return ffn ? ffn->name : ""; }

EXF_API exf_fusion_desc exf_ffn_fusion(const exf_ffn *ffn) {
  exf_fusion_desc none;
  memset(&none, 0, sizeof none);
  return ffn ? ffn->fusion : none;
}

EXF_API void exf_model_free(exf_model *model) {
  const exf__mark nothing = {0, 0, NULL};
  exf_ctx *ctx;
  if (!model) return;
  ctx = model->ctx;
  exf__model_undo(model, &nothing);
  exf__free(ctx, model->params);
  exf__free(ctx, model->ffns);
  exf__free(ctx, model);
}

/* ---- gradients of experts, diagnostics --------------------------------- >>diagnose */

/* abar_i: the mean of a_i over the backward passes since the last update. Of a lean set
   1/N, the weight of each expert that it stands for. */
static exf_real exf__mean_weight(const exf_param *p, size_t i) {
  double n = p->ffn->fusion.lean ? (double)p->ffn->fusion.lean : 1;
  return EXF__R(p->n_backwards ? p->a_sum[i] / ((double)p->n_backwards * n) : 0);
}

EXF_API exf_status exf_expert_grad(exf_param *p, exf_real *out) {
  exf_ctx *ctx;
  size_t i, n;
  if (!p || !out) return EXF_ARG;
  ctx = p->model->ctx;
  if (!p->has_grad)
    return exf_fail(ctx, EXF_STATE, "expert_grad: '%s' has no gradient: call "
                    "exf_backward first", p->name);
  if (p->role != EXF__EXPERTS) {
    memcpy(out, p->t.grad, p->t.size * sizeof(exf_real));
    return EXF_OK;
  }
  n = p->t.size / p->t.shape.dim[0];
  for (i = 0; i < p->t.shape.dim[0]; i++)
    ctx->k->axpy(n, exf__mean_weight(p, i), p->t.grad, out + i * n, 0);
  return EXF_OK;
}

EXF_API double exf_ffn_diagnose(const exf_ffn *f, double *weights, double *router,
                                double *diversity) {
  size_t n, i, j;
  double sum = 0, squares = 0, norm = 0;
  exf_ctx *ctx;
  exf_real *a;
  int k;
  if (!f || f->fusion.variant == EXF_DENSE) return 1;
  ctx = f->model->ctx;
  n = f->fusion.n_experts;
  a = (exf_real *)exf__arena(ctx, n, sizeof(exf_real));
  if (!a) return 0;
  exf__ffn_merge_weights(f, a);
  for (i = 0; i < n; i++) {
    sum += fabs((double)a[i]);
    squares += (double)a[i] * (double)a[i];
    if (weights) weights[i] = (double)a[i];
    if (router) router[i] = (double)f->routed[i];
    if (diversity) diversity[i] = 0;
  }
  for (k = 0; diversity && k < EXF__N_PARTS; k++) {
    const exf_param *e = f->part[k];
    size_t p = e ? e->t.size / n : 0;
    for (j = 0; j < p; j++) {
      double th = 0;
      for (i = 0; i < n; i++) th += (double)a[i] * (double)e->t.data[i * p + j];
      norm += th * th;
      for (i = 0; i < n; i++) {
        double d = (double)e->t.data[i * p + j] - th;
        diversity[i] += d * d;
      }
    }
  }
  for (i = 0; diversity && i < n; i++)
    diversity[i] = norm > 0 ? sqrt(diversity[i] / norm) : 0;
  return squares > 0 ? sum * sum / squares : 0;
}

/* ---- attention layer, block, cache ------------------------------------ >>block_impl */

EXF_API exf_attn_layer *exf_attn_new(exf_model *model, const char *qkv_name,
                                     const char *proj_name, size_t width,
                                     size_t n_heads, int causal, int bias,
                                     double init_std, double init_std_out) {
  exf__mark mark = exf__model_mark(model);
  exf_attn_layer *l = (exf_attn_layer *)exf__model_alloc(model, sizeof *l);
  size_t three;
  if (!l) return NULL;
  if (n_heads == 0 || width % n_heads != 0 || !exf__mul_size(3, width, &three)) {
    exf_fail(model->ctx, EXF_ARG, "attention: width %zu is not divisible by %zu heads",
             width, n_heads);
    return (exf_attn_layer *)exf__model_undo(model, &mark);
  }
  l->n_heads = n_heads;
  l->causal = causal;
  l->qkv = exf_linear_new(model, qkv_name, width, three, bias, init_std);
  l->proj = exf_linear_new(model, proj_name, width, width, bias, init_std_out);
  return l->proj ? l : (exf_attn_layer *)exf__model_undo(model, &mark);
}

EXF_API exf_tensor *exf_attn_forward(exf_ctx *ctx, const exf_attn_layer *l,
                                     exf_tensor *x) {
  exf_tensor *y;
  if (!l) return NULL;
  y = exf_attention(ctx, exf_linear_forward(ctx, l->qkv, x), l->n_heads, l->causal);
  return exf_linear_forward(ctx, l->proj, y);
}

static exf_block *exf__block_make(exf_model *model, const char *name,
                                  const exf_block_desc *desc) {
  static const char *const parts[2][6] = {
      {"ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "c_fc", "c_proj"},
      {"norm1", "attn.qkv", "attn.proj", "norm2", "fc1", "fc2"}};
  const char *const *part = parts[desc->names == EXF_NAMES_TIMM];
  exf_block *b = (exf_block *)exf__model_alloc(model, sizeof *b);
  exf_ffn_desc f = desc->ffn;
  exf__name full, full2;
  double eps = desc->eps != 0 ? desc->eps : 1e-5;
  double std = desc->init_std != 0 ? desc->init_std : 0.02;
  double std_out = desc->init_std_out != 0 ? desc->init_std_out : std;
  if (!b) return NULL;
  if (!exf__is_drop(model->ctx, "block", desc->dropout)
      || !exf__is_drop(model->ctx, "block", desc->drop_path))
    return NULL;
  b->dropout = desc->dropout;
  b->drop_path = desc->drop_path;
  if (!exf__join(model->ctx, full, name, part[0])) return NULL;
  b->norm1 = exf_layernorm_new(model, full, desc->width, desc->bias, eps);
  if (!exf__join(model->ctx, full, name, part[1])
      || !exf__join(model->ctx, full2, name, part[2]))
    return NULL;
  b->attn = exf_attn_new(model, full, full2, desc->width, desc->n_heads, desc->causal,
                         desc->bias, std, std_out);
  if (!exf__join(model->ctx, full, name, part[3])) return NULL;
  b->norm2 = exf_layernorm_new(model, full, desc->width, desc->bias, eps);
  f.width = desc->width;
  f.bias = desc->bias;
  f.init_std = std;
  f.init_std_out = std_out;
  f.up = part[4];
  f.down = part[5];
  if (!exf__join(model->ctx, full, name, "mlp")) return NULL;
  b->ffn = exf_ffn_new(model, full, &f);
  return b->ffn && model->ctx->status == EXF_OK ? b : NULL;
}

EXF_API exf_block *exf_block_new(exf_model *model, const char *name,
                                 const exf_block_desc *desc) {
  exf__mark mark = exf__model_mark(model);
  exf_block *b;
  if (!model || model->ctx->status != EXF_OK) return NULL;
  if (!desc) {
    exf_fail(model->ctx, EXF_ARG, "block: the descriptor is NULL");
    return NULL;
  }
  b = exf__block_make(model, name, desc);
  return b ? b : (exf_block *)exf__model_undo(model, &mark);
}

/* x + drop_path(dropout(y)). The sum takes the place of y, an op's result that nothing
   else reads, backward included. */
static exf_tensor *exf__residual(exf_ctx *ctx, const exf_block *b, exf_tensor *x,
                                 exf_tensor *y) {
  y = exf_drop_path(ctx, exf_dropout(ctx, y, b->dropout), b->drop_path);
  return x && y && exf__same(&x->shape, &y->shape) ? exf__add_over(ctx, x, y)
                                                   : exf_add(ctx, x, y);
}

EXF_API exf_tensor *exf_block_forward(exf_ctx *ctx, const exf_block *b, exf_tensor *x) {
  exf_tensor *y;
  if (!b) return NULL;
  y = exf_attn_forward(ctx, b->attn, exf_norm_forward(ctx, b->norm1, x));
  x = exf__residual(ctx, b, x, y);
  y = exf_ffn_forward(ctx, b->ffn, exf_norm_forward(ctx, b->norm2, x));
  return exf__residual(ctx, b, x, y);
}

struct exf_kv {
  exf_ctx *ctx;
  size_t n_layers, capacity, width, length;
  exf_real *data;               /* (n_layers, 2, capacity, width): keys, values */
};

EXF_API exf_kv *exf_kv_new(exf_ctx *ctx, size_t n_layers, size_t capacity,
                           size_t width) {
  exf_kv *kv;
  size_t rows, all;
  if (!ctx || ctx->status != EXF_OK) return NULL;
  if (!exf__mul_size(n_layers, 2, &rows) || !exf__mul_size(rows, capacity, &rows)
      || !exf__mul_size(rows, width, &all) || all == 0) {
    exf_fail(ctx, EXF_SIZE, "kv: %zu layers x %zu positions x %zu do not make a cache",
             n_layers, capacity, width);
    return NULL;
  }
  kv = (exf_kv *)exf__calloc_n(ctx, 1, sizeof *kv);
  if (!kv) return NULL;
  kv->ctx = ctx;
  kv->n_layers = n_layers;
  kv->capacity = capacity;
  kv->width = width;
  kv->data = (exf_real *)exf__alloc_n(ctx, all, sizeof(exf_real));
  if (kv->data) return kv;
  exf__free(ctx, kv);
  return NULL;
}

EXF_API void exf_kv_free(exf_kv *kv) {
  if (!kv) return;
  exf__free(kv->ctx, kv->data);
  exf__free(kv->ctx, kv);
}

EXF_API void exf_kv_reset(exf_kv *kv) {
  if (kv) kv->length = 0;
}

EXF_API size_t exf_kv_length(const exf_kv *kv) { return kv ? kv->length : 0; }

EXF_API void exf_kv_advance(exf_kv *kv, size_t t) {
  if (!kv) return;
  if (t <= kv->capacity - kv->length) kv->length += t;
  else exf_fail(kv->ctx, EXF_ARG, "kv_advance: %zu positions after %zu of %zu", t,
                kv->length, kv->capacity);
}

typedef struct exf__cached_work {
  const exf__kernels *k;
  size_t t, total, d, c;
  const exf_real *qkv, *keys, *values;
  exf_real *out;
} exf__cached_work;

static void exf__cached_job(void *arg, size_t begin, size_t end, void *scratch) {
  const exf__cached_work *w = (const exf__cached_work *)arg;
  size_t h;
  for (h = begin; h < end; h++)
    w->k->attention(w->t, w->total, w->d, w->qkv + h * w->d, 3 * w->c,
                    w->keys + h * w->d, w->values + h * w->d, w->c,
                    EXF__R(1) / EXF__SQRT((exf_real)w->d), 1, w->out + h * w->d, w->c,
                    NULL, scratch);
}

EXF_API exf_tensor *exf_attention_cached(exf_ctx *ctx, exf_tensor *qkv, size_t n_heads,
                                         exf_kv *kv, size_t layer) {
  exf__cached_work w;
  exf_tensor *y;
  exf_shape shape;
  exf_real *keys, *values;
  size_t i, c, bytes;
  if (!ctx || !qkv || ctx->status != EXF_OK) return NULL;
  if (!kv) {
    exf_fail(ctx, EXF_ARG, "attention_cached: the cache is NULL");
    return NULL;
  }
  c = kv->width;
  if (qkv->shape.n != 3 || qkv->shape.dim[0] != 1 || qkv->shape.dim[2] != 3 * c
      || n_heads == 0 || c % n_heads != 0 || layer >= kv->n_layers
      || qkv->shape.dim[1] > kv->capacity - kv->length || (qkv->flags & EXF__NEEDS)) {
    exf_fail(ctx, EXF_SHAPE, "attention_cached: qkv %s, layer %zu, %zu heads: needs "
             "(1,t,%zu) in a no-grad scope and room for t positions after %zu of %zu",
             exf__show(&qkv->shape).s, layer, n_heads, 3 * c, kv->length, kv->capacity);
    return NULL;
  }
  memset(&w, 0, sizeof w);
  w.k = ctx->k;
  w.t = qkv->shape.dim[1];
  w.total = kv->length + w.t;
  w.c = c;
  w.d = c / n_heads;
  shape = exf_shape3(1, w.t, c);
  keys = kv->data + layer * 2 * kv->capacity * c;
  values = keys + kv->capacity * c;
  y = exf__tensor(ctx, &shape, NULL);
  bytes = exf__attention_scratch(ctx->k, w.total);
  if (!y || !bytes) return NULL;
  for (i = 0; i < w.t; i++) {
    const exf_real *row = qkv->data + i * 3 * c;
    memcpy(keys + (kv->length + i) * c, row + c, c * sizeof(exf_real));
    memcpy(values + (kv->length + i) * c, row + 2 * c, c * sizeof(exf_real));
  }
  w.qkv = qkv->data;
  w.keys = keys;
  w.values = values;
  w.out = y->data;
  exf__parallel(ctx, n_heads, 1, 4.0 * (double)w.t * (double)w.total * (double)c, bytes,
                exf__cached_job, &w);
  return ctx->status == EXF_OK ? y : NULL;
}

EXF_API exf_tensor *exf_block_cached(exf_ctx *ctx, const exf_block *b, exf_tensor *x,
                                     exf_kv *kv, size_t layer) {
  exf_tensor *y;
  if (!b) return NULL;
  if (!b->attn->causal) {
    exf_fail(ctx, EXF_ARG, "block_cached: the block's attention is not causal: a cache "
             "would hide later positions");
    return NULL;
  }
  y = exf_linear_forward(ctx, b->attn->qkv, exf_norm_forward(ctx, b->norm1, x));
  y = exf_attention_cached(ctx, y, b->attn->n_heads, kv, layer);
  x = exf_add(ctx, x, exf_linear_forward(ctx, b->attn->proj, y));
  y = exf_ffn_forward(ctx, b->ffn, exf_norm_forward(ctx, b->norm2, x));
  return exf_add(ctx, x, y);
}

/* ---- optimizers ------------------------------------------------------ >>optim_impl */

struct exf_optim {
  exf_model *model;
  exf_optim_desc desc;
  uint64_t t;                    /* updates made */
};

/* Moments the algorithm keeps: AdamW m and v, SGD with momentum m. */
static int exf__optim_moments(const exf_optim_desc *d) {
  return d->kind == EXF_ADAMW ? 2 : d->momentum != 0 ? 1 : 0;
}

/* (N,..) -> (..) */
static exf_shape exf__one_expert(const exf_shape *s) {
  exf_shape one = exf_shape0();
  one.n = s->n - 1;
  memcpy(one.dim, s->dim + 1, (size_t)one.n * sizeof(size_t));
  return one;
}

/* Cleared moments for every parameter in place of what it has; all are made before the
   first is exchanged. */
static int exf__moments_new(exf_model *model, int moments, int shared) {
  exf_ctx *ctx = model->ctx;
  size_t n = model->n_params, i, size;
  exf_real **fresh = (exf_real **)exf__calloc_n(ctx, n, 2 * sizeof *fresh);
  for (i = 0; i < 2 * n && ctx->status == EXF_OK; i++) {   /* (n, 2): m, v */
    exf_param *p = model->params[i / 2];
    size = shared && p->role == EXF__EXPERTS ? p->t.size / p->t.shape.dim[0] : p->t.size;
    if ((int)(i % 2) < moments)
      fresh[i] = (exf_real *)exf__calloc_n(ctx, size, sizeof(exf_real));
  }
  for (i = 0; fresh && i < 2 * n; i++) {
    exf_param *p = model->params[i / 2];
    exf_real **old = i % 2 ? &p->v : &p->m;
    exf__free(ctx, ctx->status == EXF_OK ? *old : fresh[i]);
    if (ctx->status != EXF_OK) continue;
    *old = fresh[i];
    p->moments = shared && p->role == EXF__EXPERTS ? exf__one_expert(&p->t.shape)
                                                   : p->t.shape;
  }
  exf__free(ctx, fresh);
  return ctx->status == EXF_OK;
}

static int exf__is_size(double x) { return x >= 0 && x - x == 0; }  /* and finite */

/* 0 and an error when upcycling or merging made p after the optimizer. */
static int exf__optim_knows(const exf_optim *o, const exf_param *p) {
  if (p->weight_decay >= 0 && (exf__optim_moments(&o->desc) == 0 || p->m)) return 1;
  exf_fail(o->model->ctx, EXF_STATE, "optim: '%s' is newer than the optimizer: make the "
           "optimizer anew after upcycling or merging", p->name);
  return 0;
}

EXF_API exf_optim *exf_optim_new(exf_model *model, const exf_optim_desc *desc) {
  exf_ctx *ctx;
  exf_optim *o;
  exf_optim_desc d;
  size_t i;
  if (!model || model->ctx->status != EXF_OK) return NULL;
  ctx = model->ctx;
  if (!desc) {
    exf_fail(ctx, EXF_ARG, "optim: the descriptor is NULL");
    return NULL;
  }
  d = *desc;
  if (d.beta1 == 0) d.beta1 = 0.9;
  if (d.beta2 == 0) d.beta2 = 0.999;
  if (d.eps == 0) d.eps = 1e-8;
  if (d.beta1 < 0) d.beta1 = 0;
  if (d.beta2 < 0) d.beta2 = 0;
  if (!(d.beta1 < 1) || !(d.beta2 < 1) || !(d.eps > 0) || !(d.momentum >= 0)
      || !(d.momentum < 1) || !exf__is_size(d.weight_decay) || !(d.clip >= 0)) {
    exf_fail(ctx, EXF_ARG, "optim: beta1 %g, beta2 %g and momentum %g must lie in [0,1), "
             "eps %g be positive, weight decay %g and clip %g not negative, the decay "
             "finite", d.beta1, d.beta2, d.momentum, d.eps, d.weight_decay, d.clip);
    return NULL;
  }
  if (d.shared_moments && d.kind != EXF_ADAMW) {
    exf_fail(ctx, EXF_ARG, "optim: shared_moments are for AdamW: SGD has none to "
             "spare");
    return NULL;
  }
  if (model->optim) {
    exf_fail(ctx, EXF_STATE, "optim: the model has an optimizer, which holds its "
             "moments: exf_optim_free it first");
    return NULL;
  }
  o = (exf_optim *)exf__calloc_n(ctx, 1, sizeof *o);
  if (!o || !exf__moments_new(model, exf__optim_moments(&d), d.shared_moments)) {
    exf__free(ctx, o);
    return NULL;
  }
  o->model = model;
  o->desc = d;
  model->optim = o;
  for (i = 0; i < model->n_params; i++) {
    exf_param *p = model->params[i];
    p->lr_scale = 1;
    p->weight_decay = p->decay ? d.weight_decay : 0;
  }
  return o;
}

EXF_API void exf_optim_free(exf_optim *o) {
  size_t i;
  if (!o) return;
  for (i = 0; i < o->model->n_params; i++) {
    exf_param *p = o->model->params[i];
    exf__free(o->model->ctx, p->m);
    exf__free(o->model->ctx, p->v);
    p->m = p->v = NULL;
  }
  o->model->optim = NULL;
  exf__free(o->model->ctx, o);
}

EXF_API uint64_t exf_optim_steps(const exf_optim *o) { return o ? o->t : 0; }

EXF_API exf_status exf_optim_group(exf_optim *o,
                                   int (*select)(const exf_param *param, void *user),
                                   void *user, double lr_scale, double weight_decay) {
  size_t i;
  if (!o) return EXF_ARG;
  if (!select || !exf__is_size(lr_scale) || !exf__is_size(weight_decay))
    return exf_fail(o->model->ctx, EXF_ARG, "optim_group: needs a predicate, lr_scale %g "
                    "and weight decay %g finite and not negative", lr_scale,
                    weight_decay);
  for (i = 0; i < o->model->n_params; i++) {
    exf_param *p = o->model->params[i];
    if (!select(p, user)) continue;
    p->lr_scale = lr_scale;
    p->weight_decay = weight_decay;
  }
  return EXF_OK;
}

/* N of an expert set, stored or lean */
static double exf__set_size(const exf_param *p) {
  size_t lean = p->ffn->fusion.lean;
  return (double)(lean ? lean : p->t.shape.dim[0]);
}

/* Squared norm of a parameter's gradient: experts count their fused G once, or as
   ||a||^2 ||G||^2 when the norm over all experts is asked for. */
static double exf__grad_square(const exf_optim *o, const exf_param *p) {
  const exf_ctx *ctx = o->model->ctx;
  size_t n = p->role == EXF__EXPERTS ? p->t.size / p->t.shape.dim[0] : p->t.size, i;
  double square = ctx->k->sumsq(n, p->t.grad), weights = 0;
  if (!exf__is_size(square))         /* above 1e19 a square may overflow in float */
    for (square = 0, i = 0; i < n; i++)
      square += (double)p->t.grad[i] * (double)p->t.grad[i];
  if (p->role != EXF__EXPERTS || !o->desc.expert_norm) return square;
  for (i = 0; i < p->t.shape.dim[0]; i++) {
    double a = (double)exf__mean_weight(p, i);
    weights += a * a;
  }
  if (p->ffn->fusion.lean) weights *= (double)p->ffn->fusion.lean;
  return square * weights;
}

typedef struct exf__update {
  const exf__kernels *k;
  exf_param *p;
  size_t n_experts, stride;       /* 1 and 0 for a parameter that is not an expert set */
  const exf_real *scale;          /* (n_experts): abar, or its signs; else {1} */
  int shared;                     /* moments of G, shared by the experts */
  exf__adamw_args adamw;
  double lr, decay, momentum;     /* SGD, decay coupled */
  int nesterov;
} exf__update;

/* SGD: g = a_i G + wd p; m = momentum m + g; p -= lr (nesterov ? g + momentum m : m) */
static void exf__sgd(const exf__update *u, size_t at, size_t n) {
  size_t i, j;
  const exf_real lr = EXF__R(u->lr), wd = EXF__R(u->decay), mu = EXF__R(u->momentum);
  for (i = 0; i < u->n_experts; i++) {
    exf_real *p = u->p->t.data + i * u->stride + at;
    exf_real *m = u->p->m ? u->p->m + i * u->stride + at : NULL;
    const exf_real *grad = u->p->t.grad + at;
    exf_real scale = u->scale[i] * u->adamw.clip;
    for (j = 0; j < n; j++) {
      exf_real g = scale * grad[j] + wd * p[j];
      if (m) {
        m[j] = mu * m[j] + g;
        g = u->nesterov ? g + mu * m[j] : m[j];
      }
      p[j] -= lr * g;
    }
  }
}

static void exf__update_job(void *arg, size_t begin, size_t end, void *scratch) {
  const exf__update *u = (const exf__update *)arg;
  exf_param *p = u->p;
  (void)scratch;
  if (u->shared)
    u->k->adamw_shared(u->n_experts, end - begin, u->stride, p->t.data + begin,
                       p->t.grad + begin, p->m + begin, p->v + begin, &u->adamw,
                       u->scale);
  else if (p->v)
    u->k->adamw(u->n_experts, end - begin, u->stride, p->t.data + begin,
                p->t.grad + begin, p->m + begin, p->v + begin, &u->adamw, u->scale);
  else exf__sgd(u, begin, end - begin);
}

/* torch.optim.AdamW and SGD. For experts every N-th of p, m and v meets a_i G; with
   shared moments, those of G, the step of expert i would be sgn(a_i) m / (sqrt v + eps /
   |a_i|), and 1/N is taken for |a_i|. scale: room for a number per expert. Cannot fail:
   an update is whole or not made. */
static void exf__optim_update(exf_optim *o, exf_param *p, double lr, double clip,
                              exf_real *scale) {
  exf_ctx *ctx = o->model->ctx;
  const exf_optim_desc *d = &o->desc;
  exf__update u;
  size_t i, size = p->t.size;
  double eps = d->eps;
  memset(&u, 0, sizeof u);
  u.n_experts = 1;
  scale[0] = 1;
  if (p->role == EXF__EXPERTS) {
    u.n_experts = p->t.shape.dim[0];
    u.stride = size = p->t.size / u.n_experts;
    u.shared = d->shared_moments;
    eps *= u.shared ? exf__set_size(p) : 1;
    for (i = 0; i < u.n_experts; i++) {
      scale[i] = exf__mean_weight(p, i);
      if (u.shared) scale[i] = EXF__R((scale[i] > 0) - (scale[i] < 0));
    }
  }
  lr *= p->lr_scale;
  u.k = ctx->k;
  u.p = p;
  u.scale = scale;
  u.lr = lr;
  u.decay = p->weight_decay;
  u.momentum = d->momentum;
  u.nesterov = d->nesterov;
  u.adamw.clip = EXF__R(clip);
  u.adamw.decay = EXF__R(1 - lr * p->weight_decay);
  u.adamw.beta1 = EXF__R(d->beta1);
  u.adamw.beta2 = EXF__R(d->beta2);
  u.adamw.one_minus_beta1 = EXF__R(1 - d->beta1);
  u.adamw.one_minus_beta2 = EXF__R(1 - d->beta2);
  u.adamw.step = EXF__R(lr / (1 - exf__pow_d(d->beta1, o->t)));
  u.adamw.inv_sqrt_bias2 = EXF__R(1 / sqrt(1 - exf__pow_d(d->beta2, o->t)));
  u.adamw.eps = EXF__R(eps);
  exf__parallel(ctx, size, EXF__SUM_BLOCK, 10.0 * (double)size * (double)u.n_experts, 0,
                exf__update_job, &u);
}

/* M <- abar; routed: M <- mu M + (1 - mu) abar, with abar the mean of r. Nothing when no
   backward pass went through this FFN. */
static void exf__bank_update(exf_ffn *f) {
  const exf_param *p = NULL;
  size_t i;
  int k;
  f->trained = 1;
  for (k = 0; k < EXF__N_PARTS; k++)
    if (f->part[k] && f->part[k]->n_backwards) p = f->part[k];
  if (f->fusion.variant != EXF_MB || !p) return;
  for (i = 0; i < f->fusion.n_experts; i++) {
    exf_real a = exf__mean_weight(p, i), *m = &f->bank.data[i];
    *m = f->fusion.routed ? a + EXF__R(f->fusion.mu) * (*m - a) : a;
  }
}

EXF_API exf_status exf_optim_step(exf_optim *o, double lr, double *norm) {
  exf_ctx *ctx;
  exf_model *m;
  double square = 0, part, clip = 1;
  const exf_param *bad = NULL;
  exf_real *scale;
  size_t i, most = 1;
  if (!o) return EXF_ARG;
  m = o->model;
  ctx = m->ctx;
  if (ctx->status != EXF_OK) return ctx->status;
  if (!exf__is_size(lr))
    return exf_fail(ctx, EXF_ARG, "optim: learning rate %g must be finite and not "
                    "negative", lr);
  for (i = 0; i < m->n_ffns; i++) most = EXF__MAX(most, m->ffns[i]->fusion.n_experts);
  scale = (exf_real *)exf__arena(ctx, most, sizeof(exf_real));
  if (!scale) return ctx->status;
  for (i = 0; i < m->n_params; i++) {
    exf_param *p = m->params[i];
    if (!p->has_grad || p->frozen) continue;
    if (!exf__optim_knows(o, p)) return ctx->status;
    part = exf__grad_square(o, p);
    if (!bad && !(part - part == 0)) bad = p;
    square += part;
  }
  if (norm) *norm = sqrt(square);
  if (bad && !o->desc.allow_nonfinite) {
    exf_model_zero_grad(m);
    return exf_fail(ctx, EXF_NUMERIC, "optim: the gradient of '%s' is not finite; "
                    "nothing was updated: lower the learning rate or check the input",
                    bad->name);
  }
  if (o->desc.clip > 0) clip = EXF__MIN(1, o->desc.clip / (sqrt(square) + 1e-6));
  o->t++;
  for (i = 0; i < m->n_params; i++)
    if (m->params[i]->has_grad && !m->params[i]->frozen)
      exf__optim_update(o, m->params[i], lr, clip, scale);
  for (i = 0; i < m->n_ffns; i++) exf__bank_update(m->ffns[i]);
  exf_model_zero_grad(m);
  return ctx->status;
}

/* ---- schedules and notices ---------------------------------------------- >>schedule */

EXF_API double exf_schedule_lr(const exf_schedule *s, uint64_t step) {
  double span, x;
  if (!s) return 0;
  if (step < s->warmup) return s->lr * (double)(step + 1) / (double)(s->warmup + 1);
  if (s->kind == EXF_SCHEDULE_CONSTANT) return s->lr;
  span = s->steps > s->warmup ? (double)(s->steps - s->warmup) : 1;
  x = EXF__MIN((double)(step - s->warmup) / span, 1);
  if (s->kind == EXF_SCHEDULE_LINEAR) return s->lr + (s->min_lr - s->lr) * x;
  return s->min_lr + (s->lr - s->min_lr) / 2 * (1 + exf__cospi_d(x));
}

EXF_API double exf_expert_decay(const exf_schedule *s, double weight_decay) {
  double left = 1;
  uint64_t t, every = s ? s->steps / 65536 + 1 : 1;   /* long schedules are sampled */
  for (t = 0; s && t < s->steps; t += every)
    left *= exf__pow_d(1 - exf_schedule_lr(s, t) * weight_decay,
                       EXF__MIN(every, s->steps - t));
  return left;
}

enum { EXF__NOTE_ONE, EXF__NOTE_COPY, EXF__NOTE_SW_ADAM, EXF__NOTE_SW_SGD,
       EXF__NOTE_PLAIN, EXF__N_NOTES };

static int exf__note_holds(const exf_ffn *f, int note, int adam) {
  const exf_fusion_desc *d = &f->fusion;
  size_t n = d->lean ? d->lean : d->n_experts;
  if (d->variant == EXF_DENSE) return 0;
  switch (note) {
    case EXF__NOTE_ONE: return n == 1;
    case EXF__NOTE_COPY: return n > 1 && d->upcycle == EXF_UP_COPY;
    case EXF__NOTE_SW_ADAM: return n > 1 && d->variant == EXF_SW && adam;
    case EXF__NOTE_SW_SGD: return n > 1 && d->variant == EXF_SW && !adam;
    default: return n > 1 && d->upcycle == EXF_UP_INDEPENDENT_PLAIN;
  }
}

EXF_API int exf_notices(const exf_model *model, const exf_optim *optim) {
  static const char *const texts[EXF__N_NOTES] = {
      "N = 1: one expert is a dense FFN (dw raw: plus one learned scalar)",
      "identical copies with equal weights receive identical gradients and stay "
      "identical: dense training in disguise; use zerosum or drop",
      "sw under AdamW is dense AdamW from the experts' mean with N times eps: expect "
      "dense results",
      "sw under SGD is dense SGD at lr/N with N times the coupled decay",
      "experts drawn without rescaling: the fused FFN starts 1/sqrt(N) smaller"};
  int note, said = 0;
  size_t i, n;
  const char *first;
  for (note = 0; model && note < EXF__N_NOTES; note++) {
    for (i = n = 0, first = ""; i < model->n_ffns; i++)
      if (exf__note_holds(model->ffns[i], note, !optim || optim->desc.kind == EXF_ADAMW)
          && n++ == 0)
        first = model->ffns[i]->name;
    if (n == 0) continue;
    exf__notice(model->ctx, "notice: %s (%zu of %zu FFNs): %s", first, n, model->n_ffns,
             texts[note]);
    said++;
  }
  return said;
}

/* ---- the merged view: what a dense model would hold ----------------------- >>merged */

/* The dense-shaped parameters of a model: plain ones as they are, experts fused, fusion
   parameters left out. All of it in the step arena; NULL on failure. */
static exf_st_item *exf__merged(exf_model *model, size_t *n) {
  exf_ctx *ctx = model->ctx;
  exf_st_item *items =
      (exf_st_item *)exf__arena(ctx, model->n_params, sizeof(exf_st_item));
  size_t i, size, n_experts;
  exf_real *a, *th;
  *n = 0;
  for (i = 0; items && i < model->n_params; i++) {
    const exf_param *p = model->params[i];
    exf_st_item *item = &items[*n];
    if (p->role == EXF__FUSION) continue;
    item->name = p->name;
    item->shape = p->t.shape;
    item->data = p->t.data;
    if (p->role == EXF__EXPERTS) {
      n_experts = p->t.shape.dim[0];
      size = p->t.size / n_experts;
      a = (exf_real *)exf__arena(ctx, n_experts, sizeof(exf_real));
      th = (exf_real *)exf__arena(ctx, size, sizeof(exf_real));
      if (!a || !th) return NULL;
      exf__ffn_merge_weights(p->ffn, a);
      exf__fuse_into(ctx, n_experts, size, a, p->t.data, th);
      item->name = p->dense_name;
      item->shape.n--;
      memmove(item->shape.dim, p->t.shape.dim + 1,
              (size_t)item->shape.n * sizeof(size_t));
      item->data = th;
    }
    (*n)++;
  }
  return ctx->status == EXF_OK ? items : NULL;
}

static size_t exf__shape_size(const exf_shape *s) { return exf__count(s, 0, s->n); }

typedef struct exf__average {
  char *name;
  exf_shape shape;
  exf_real *data;                /* (shape) */
} exf__average;

struct exf_ema {
  exf_model *model;
  double decay;
  size_t n;
  exf__average *avg;             /* (n) in the order of the merged view */
};

EXF_API void exf_ema_free(exf_ema *e) {
  size_t i;
  if (!e) return;
  for (i = 0; i < e->n; i++) {
    exf__free(e->model->ctx, e->avg[i].name);
    exf__free(e->model->ctx, e->avg[i].data);
  }
  exf__free(e->model->ctx, e->avg);
  exf__free(e->model->ctx, e);
}

EXF_API exf_ema *exf_ema_new(exf_model *model, double decay) {
  exf_ctx *ctx;
  exf_ema *e;
  exf_st_item *now;
  size_t i, n, size;
  if (!model || model->ctx->status != EXF_OK) return NULL;
  ctx = model->ctx;
  if (!(decay >= 0 && decay < 1)) {
    exf_fail(ctx, EXF_ARG, "ema: decay %g must lie in [0, 1)", decay);
    return NULL;
  }
  now = exf__merged(model, &n);
  e = (exf_ema *)exf__calloc_n(ctx, 1, sizeof *e);
  if (e) {
    e->model = model;
    e->decay = decay;
    e->avg = (exf__average *)exf__calloc_n(ctx, n, sizeof *e->avg);
  }
  for (i = 0; now && e && e->avg && i < n; i++) {
    size = exf__shape_size(&now[i].shape);
    e->avg[i].shape = now[i].shape;
    e->avg[i].name = exf__strdup(ctx, now[i].name);
    e->avg[i].data = (exf_real *)exf__alloc_n(ctx, size, sizeof(exf_real));
    if (e->avg[i].data) memcpy(e->avg[i].data, now[i].data, size * sizeof(exf_real));
    e->n = i + 1;
  }
  if (ctx->status == EXF_OK) return e;
  exf_ema_free(e);
  return NULL;
}

EXF_API exf_status exf_ema_update(exf_ema *e) {
  exf_ctx *ctx;
  exf_st_item *now;
  size_t i, j, n, size;
  if (!e) return EXF_ARG;
  ctx = e->model->ctx;
  if (ctx->status != EXF_OK) return ctx->status;
  now = exf__merged(e->model, &n);
  if (!now) return ctx->status;
  for (i = 0; i < n; i++)   /* a name keeps its dense shape */
    if (i >= e->n || strcmp(now[i].name, e->avg[i].name) != 0)
      return exf_fail(ctx, EXF_STATE, "ema: the parameters of the model changed at '%s'",
                      now[i].name);
  for (i = 0; i < n; i++) {
    exf_real *avg = e->avg[i].data;
    size = exf__shape_size(&now[i].shape);
    for (j = 0; j < size; j++)
      avg[j] = EXF__R(e->decay * (double)avg[j]
                      + (1 - e->decay) * (double)now[i].data[j]);
  }
  return EXF_OK;
}

/* Between the averages and a dense model, in either direction; all or nothing. */
static exf_status exf__ema_copy(const exf_ema *e, const exf_model *dense, int to_model) {
  exf_param *p;
  size_t i;
  if (!e || !dense) return EXF_ARG;
  for (i = 0; i < e->n; i++) {
    p = exf_model_find(dense, e->avg[i].name);
    if (!p || !exf__same(&p->t.shape, &e->avg[i].shape))
      return exf_fail(dense->ctx, EXF_MISMATCH, "ema: the model has no '%s' of shape %s",
                      e->avg[i].name, exf__show(&e->avg[i].shape).s);
  }
  for (i = 0; i < e->n; i++) {
    exf_real *avg = e->avg[i].data;
    p = exf_model_find(dense, e->avg[i].name);
    memcpy(to_model ? p->t.data : avg, to_model ? avg : p->t.data,
           p->t.size * sizeof(exf_real));
  }
  return EXF_OK;
}

EXF_API exf_status exf_ema_copy_to(const exf_ema *e, exf_model *dense) {
  exf_status status = exf__ema_copy(e, dense, 1);
  size_t i;
  for (i = 0; status == EXF_OK && i < dense->n_ffns; i++) dense->ffns[i]->trained = 1;
  return status;
}
EXF_API exf_status exf_ema_copy_from(exf_ema *e, const exf_model *dense) {
  return exf__ema_copy(e, dense, 0);
}
/* ---- files ------------------------------------------------------------ >>files */

#ifndef EXF_NO_STDIO
#include <fcntl.h>
#include <sys/stat.h>
#ifdef _WIN32
#include <io.h>
__declspec(dllimport) int __stdcall MoveFileExA(const char *from, const char *to,
                                                unsigned long flags);
#else
#include <unistd.h>
#endif

/* Most bytes handed to one system call: several take no more than an int. */
#define EXF__IO_MAX ((size_t)1 << 30)

/* A handle is the descriptor plus one, as NULL means failure. */
static void *exf__fd_handle(int fd) {
  return fd < 0 ? NULL : (void *)((intptr_t)fd + 1);
}

static int exf__fd(void *file) { return (int)((intptr_t)file - 1); }

static int exf__os_remove(void *user, const char *path) {
  (void)user;
  return remove(path) == 0 ? 0 : -1;
}

#ifdef _WIN32

static void *exf__os_open(void *user, const char *path, int writing) {
  (void)user;
  if (!writing) return exf__fd_handle(_open(path, _O_RDONLY | _O_BINARY));
  return exf__fd_handle(_open(path, _O_WRONLY | _O_CREAT | _O_TRUNC | _O_BINARY,
                              _S_IREAD | _S_IWRITE));
}

static int64_t exf__os_size(void *user, void *file) {
  (void)user;
  return (int64_t)_filelengthi64(exf__fd(file));
}

static int64_t exf__os_read(void *user, void *file, void *data, size_t bytes) {
  (void)user;
  return _read(exf__fd(file), data, (unsigned)EXF__MIN(bytes, EXF__IO_MAX));
}

static int64_t exf__os_write(void *user, void *file, const void *data, size_t bytes) {
  (void)user;
  return _write(exf__fd(file), data, (unsigned)EXF__MIN(bytes, EXF__IO_MAX));
}

static int exf__os_sync(void *user, void *file) {
  (void)user;
  return _commit(exf__fd(file)) == 0 ? 0 : -1;
}

static int exf__os_close(void *user, void *file) {
  (void)user;
  return _close(exf__fd(file)) == 0 ? 0 : -1;
}

static int exf__os_rename(void *user, const char *from, const char *to) {
  (void)user;
  /* 1: replace what is there; 8: return when it is on the device */
  if (MoveFileExA(from, to, 1 | 8)) return 0;
  errno = EACCES;
  return -1;
}

/* Folders have no flush of their own here: the rename above waits for the device. */
static int exf__os_sync_dir(void *user, const char *path) {
  (void)user;
  (void)path;
  return 0;
}

#else /* POSIX */

static int exf__os_open_fd(const char *path, int flags) {
  int fd;
#ifdef O_CLOEXEC
  flags |= O_CLOEXEC;
#endif
  do {
    fd = open(path, flags, 0666);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

static void *exf__os_open(void *user, const char *path, int writing) {
  (void)user;
  return exf__fd_handle(
      exf__os_open_fd(path, writing ? O_WRONLY | O_CREAT | O_TRUNC : O_RDONLY));
}

/* Only a regular file has a size that a later read can be held to. */
static int64_t exf__os_size(void *user, void *file) {
  struct stat info;
  (void)user;
  if (fstat(exf__fd(file), &info) != 0) return -1;
  if (S_ISREG(info.st_mode)) return (int64_t)info.st_size;
  errno = S_ISDIR(info.st_mode) ? EISDIR : EINVAL;
  return -1;
}

static int64_t exf__os_read(void *user, void *file, void *data, size_t bytes) {
  int64_t n;
  (void)user;
  do {
    n = (int64_t)read(exf__fd(file), data, EXF__MIN(bytes, EXF__IO_MAX));
  } while (n < 0 && errno == EINTR);
  return n;
}

static int64_t exf__os_write(void *user, void *file, const void *data, size_t bytes) {
  int64_t n;
  (void)user;
  do {
    n = (int64_t)write(exf__fd(file), data, EXF__MIN(bytes, EXF__IO_MAX));
  } while (n < 0 && errno == EINTR);
  return n;
}

static int exf__os_sync(void *user, void *file) {
  int r;
  (void)user;
#ifdef F_FULLFSYNC /* where fsync stops at the drive's own cache */
  if (fcntl(exf__fd(file), F_FULLFSYNC) == 0) return 0;
#endif
  do {
    r = fsync(exf__fd(file));
  } while (r != 0 && errno == EINTR);
  return r == 0 ? 0 : -1;
}

/* An interrupted close has freed the descriptor: trying again could close another's. */
static int exf__os_close(void *user, void *file) {
  (void)user;
  return close(exf__fd(file)) == 0 || errno == EINTR ? 0 : -1;
}

static int exf__os_rename(void *user, const char *from, const char *to) {
  (void)user;
  return rename(from, to) == 0 ? 0 : -1;
}

/* File systems that cannot flush a folder say EINVAL: there is nothing to wait for. */
static int exf__os_sync_dir(void *user, const char *path) {
  char folder[4096];
  const char *slash = strrchr(path, '/');
  size_t n = slash == NULL ? 0 : slash == path ? 1 : (size_t)(slash - path);
  int fd, r, cause;
  if (n >= sizeof folder) {
    errno = ENAMETOOLONG;
    return -1;
  }
  memcpy(folder, path, n);
  if (n == 0) folder[n++] = '.';
  folder[n] = '\0';
  fd = exf__os_open_fd(folder, O_RDONLY);
  if (fd < 0) return -1;
  r = exf__os_sync(user, exf__fd_handle(fd));
  cause = errno;
  close(fd);
  errno = cause;
  return r == 0 || cause == EINVAL ? 0 : -1;
}

#endif

static const exf_files *exf__files_default(void) {
  static const exf_files hooks = {
      NULL,         exf__os_open,  exf__os_size,   exf__os_read,   exf__os_write,
      exf__os_sync, exf__os_close, exf__os_rename, exf__os_remove, exf__os_sync_dir};
  return &hooks;
}

#else /* EXF_NO_STDIO */

static const exf_files *exf__files_default(void) { return NULL; }

#endif

/* Bytes of a path or name in a message, its end included. */
#define EXF__IO_LABEL 160

/* Copies text for a message: printable ASCII as it is, all else as \xNN, and shortened
   at the end (names) or at the start (paths). Text of a file may be hostile. */
static void exf__io_label(char *out, const char *text, int is_path) {
  static const char hex[] = "0123456789abcdef";
  size_t room = EXF__IO_LABEL - 8, n = 0, len = strlen(text), i = 0;
  if (is_path && len > room / 2) {
    i = len - room / 2;
    memcpy(out, "...", 3);
    n = 3;
  }
  for (; i < len && n < room; i++) {
    unsigned char c = (unsigned char)text[i];
    if (c >= 0x20 && c < 0x7f && c != '\'' && (c != '\\' || is_path)) {
      out[n++] = (char)c;
    } else {
      out[n++] = '\\';
      out[n++] = 'x';
      out[n++] = hex[c >> 4];
      out[n++] = hex[c & 15];
    }
  }
  if (i < len) {
    memcpy(out + n, "...", 3);
    n += 3;
  }
  out[n] = '\0';
}

/* cause: errno as it was right after the call that failed; 0 when the call left none */
static exf_status exf__io_fail(exf_ctx *ctx, const char *label, const char *what,
                               int cause) {
  return exf_fail(ctx, EXF_IO, "%s: cannot %s: %s", label, what,
                  cause != 0 ? strerror(cause) : "no cause given");
}

/* Checks the path and the hooks that reading or saving needs, and fills in the label. */
static exf_status exf__io_begin(exf_ctx *ctx, const char *path, int saving, char *label) {
  const exf_files *f = &ctx->files;
  if (path == NULL || path[0] == '\0')
    return exf_fail(ctx, EXF_ARG, "a file path is NULL or empty: give a path");
  exf__io_label(label, path, 1);
  if (f->open == NULL)
    return exf_fail(ctx, EXF_IO, "%s: built with EXF_NO_STDIO: give exf_desc.files",
                    label);
  if (f->close == NULL || (!saving && (f->size == NULL || f->read == NULL))
      || (saving && (f->write == NULL || f->sync == NULL || f->rename == NULL
                     || f->remove == NULL || f->sync_dir == NULL)))
    return exf_fail(ctx, EXF_ARG, "%s: a hook of exf_desc.files is NULL: give them all",
                    label);
  return EXF_OK;
}

/* A file being saved: begin, put ..., end. One writer at a time per path. */
typedef struct exf__save {
  exf_ctx *ctx;
  const char *path;
  char *temp;                 /* path and ".tmp": the same folder, so rename is atomic */
  void *file;
  char label[EXF__IO_LABEL];
} exf__save;

static exf_status exf__save_begin(exf__save *s, exf_ctx *ctx, const char *path) {
  exf_status status = exf__io_begin(ctx, path, 1, s->label);
  size_t len;
  if (status != EXF_OK) return status;
  len = strlen(path);
  s->ctx = ctx;
  s->path = path;
  s->temp = (char *)exf__alloc(ctx, len + sizeof ".tmp");
  if (s->temp == NULL) return EXF_MEMORY;
  memcpy(s->temp, path, len);
  memcpy(s->temp + len, ".tmp", sizeof ".tmp");
  errno = 0;
  s->file = ctx->files.open(ctx->files.user, s->temp, 1);
  if (s->file != NULL) return EXF_OK;
  status = exf__io_fail(ctx, s->label, "create its temporary file (.tmp)", errno);
  exf__free(ctx, s->temp);
  return status;
}

static exf_status exf__save_put(exf__save *s, const void *data, size_t bytes) {
  const exf_files *f = &s->ctx->files;
  const unsigned char *at = (const unsigned char *)data;
  while (bytes > 0) {
    int64_t n;
    errno = 0;
    n = f->write(f->user, s->file, at, bytes);
    if (n <= 0 || (uint64_t)n > bytes)
      return exf__io_fail(s->ctx, s->label, "write (what was there is unchanged)", errno);
    at += n;
    bytes -= (size_t)n;
  }
  return EXF_OK;
}

/* status: of the puts. Makes the file current, or removes every trace of it. */
static exf_status exf__save_end(exf__save *s, exf_status status) {
  const exf_files *f = &s->ctx->files;
  errno = 0;
  if (status == EXF_OK && f->sync(f->user, s->file) != 0)
    status = exf__io_fail(s->ctx, s->label, "flush (what was there is unchanged)", errno);
  errno = 0;
  if (f->close(f->user, s->file) != 0 && status == EXF_OK)
    status = exf__io_fail(s->ctx, s->label, "close (what was there is unchanged)", errno);
  errno = 0;
  if (status == EXF_OK && f->rename(f->user, s->temp, s->path) != 0)
    status = exf__io_fail(s->ctx, s->label,
                          "be replaced by its temporary file (.tmp)", errno);
  if (status != EXF_OK) {
    (void)f->remove(f->user, s->temp);
  } else {
    errno = 0;
    if (f->sync_dir(f->user, s->path) != 0)
      status = exf__io_fail(s->ctx, s->label,
                            "flush its folder (the new file is in place, but may not"
                            " survive a power cut)", errno);
  }
  exf__free(s->ctx, s->temp);
  return status;
}

EXF_API exf_status exf_file_save(exf_ctx *ctx, const char *path, const void *data,
                                 size_t bytes) {
  exf__save s;
  exf_status status;
  if (ctx == NULL) return EXF_ARG;
  if (data == NULL && bytes > 0)
    return exf_fail(ctx, EXF_ARG, "exf_file_save: data is NULL, but bytes is not 0");
  status = exf__save_begin(&s, ctx, path);
  if (status != EXF_OK) return status;
  return exf__save_end(&s, exf__save_put(&s, data, bytes));
}

/* ---- safetensors ------------------------------------------------- >>safetensors */

/* 8 bytes N, unsigned little-endian; N bytes of JSON, in UTF-8; the data buffer, to the
   end of the file. The JSON is {"name":{"dtype":"F32","shape":[2,3],"data_offsets":
   [begin,end]},...}, offsets from the start of the buffer, and may hold "__metadata__":
   {"key":"value",...}. Tensors are row-major, little-endian, and fill the buffer without
   hole or overlap. The reader checks before it trusts, and names the rule in its message:
    V1  at least 8 bytes; N <= 100,000,000 and within the file
    V2  memory is bounded by the size of the file: below 4 times it, plus a constant
    V3  the header is valid UTF-8, escapes included
    V4  strict JSON, blanks allowed around the object
    V5  only the structure above: nothing nests deeper, and no parser recurses
    V6  no key twice in one object, compared after unescaping
    V7  no U+0000 in a string; "__metadata__" is no tensor
    V8  metadata values are strings; metadata null is no metadata
    V9  exactly the members dtype, shape, data_offsets
    V10 integers are plain digits, at most 2^48 - 1
    V11 a known dtype
    V12 two data_offsets, begin <= end
    V13 elements and bits fit into 64 bits (zeros in the shape left out), whole bytes
    V14 data_offsets span what dtype and shape need
    V15 tensors in order of (begin, end) follow each other from 0 on
    V16 the last one ends where the file ends; trailing bytes are an opt-in
    V17 zero-size tensors, scalars, NaN and infinities are legal
    V18 our limits (EXF_LIMIT): axes, tensors and name length, as below
    V19 no way around the checks: opening is checking
    V20 data is copied out byte by byte, never read through a cast pointer
    V21 read, not mapped: a file that shrinks is an error, never a signal */
#define EXF__ST_MAX_HEADER 100000000u
#define EXF__ST_MAX_INTEGER (((uint64_t)1 << 48) - 1)
#define EXF__ST_MAX_AXES 16
#define EXF__ST_MAX_TENSORS 1000000u
#define EXF__ST_MAX_NAME 4096u
/* Bytes of the shortest tensor, "":{"dtype":"U8","shape":[],"data_offsets":[0,1]}, with
   its comma: the colons of two of them are at least as far apart. */
#define EXF__ST_MIN_TENSOR 50u

typedef struct exf__st_rec {
  exf_st_entry entry;
  uint64_t begin;
} exf__st_rec;

struct exf_st {
  exf_ctx *ctx;
  char *header;           /* unescaped in place: names and metadata point into it */
  exf__st_rec *rec;       /* (n) in the order of the file */
  exf__st_rec **order;    /* (n) by ascending name */
  size_t n;
  size_t *dim;            /* (n_dims) of all tensors, one behind the other */
  size_t n_dims, dim_room;
  exf_pair *meta;         /* (n_meta) by ascending key */
  size_t n_meta;
  unsigned char *data;
};

/* A file being read: where it comes from, and the parser's position in the header. */
typedef struct exf__st_in {
  exf_ctx *ctx;
  void *file;                    /* NULL: memory */
  const unsigned char *memory;   /* what is left of it */
  unsigned char first[8];
  char *header;                  /* (n) */
  size_t n, at;
  int has_meta;
  const char *meta;              /* its pairs, see exf__st_metadata */
  exf_st *st;
  char label[EXF__IO_LABEL];
} exf__st_in;

/* What else a file may be, from its first bytes; NULL when nothing fits. */
static const char *exf__st_sniff(const unsigned char *first) {
  static const struct {
    size_t n;
    const char *bytes, *text;
  } known[] = {
    {8, "version ", "a Git LFS pointer, not the file itself: run git lfs pull"},
    {4, "PK\003\004", "a zip or PyTorch pickle archive: convert it first"},
    {4, "\200\002\212\012", "a PyTorch pickle: convert it first"},
    {2, "<!", "an HTML page: the download failed"},
    {2, "<h", "an HTML page: the download failed"},
    {4, "GGUF", "a GGUF file: convert it first"},
    {3, "\037\213\010", "gzip data: decompress it first"},
    {6, "\223NUMPY", "a NumPy array: convert it first"},
    {2, "{\"", "JSON without tensors, as the index of a sharded set: give a shard"},
  };
  size_t i;
  for (i = 0; i < sizeof known / sizeof known[0]; i++)
    if (memcmp(first, known[i].bytes, known[i].n) == 0) return known[i].text;
  return NULL;
}

/* Reports a broken rule, of a tensor unless its name is NULL. Returns 0, as the parser's
   functions do on failure. */
static int exf__st_fail(exf__st_in *in, exf_status status, const char *rule,
                        const char *tensor, const char *format, ...) {
  char text[256], name[EXF__IO_LABEL];
  const char *sniffed = NULL;
  va_list args;
  /* foreign bytes break the rules on size, encoding and syntax first */
  if (strcmp(rule, "V1") == 0 || strcmp(rule, "V3") == 0 || strcmp(rule, "V4") == 0)
    sniffed = exf__st_sniff(in->first);
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (sniffed != NULL) {
    exf_fail(in->ctx, status, "%s: safetensors rule %s: this looks like %s", in->label,
             rule, sniffed);
  } else if (tensor != NULL) {
    exf__io_label(name, tensor, 0);
    exf_fail(in->ctx, status, "%s: safetensors rule %s: tensor '%s': %s", in->label,
             rule, name, text);
  } else {
    exf_fail(in->ctx, status, "%s: safetensors rule %s: %s", in->label, rule, text);
  }
  return 0;
}

/* Heap sort: in place, and n log n for hostile orders too. Elements of up to
   sizeof(exf_pair) bytes. */
typedef int (*exf__compare)(const void *a, const void *b);

static void exf__sort_swap(char *a, char *b, size_t size) {
  char t[sizeof(exf_pair)];
  memcpy(t, a, size);
  memcpy(a, b, size);
  memcpy(b, t, size);
}

static void exf__sort_sift(char *base, size_t root, size_t n, size_t size,
                           exf__compare compare) {
  for (;;) {
    size_t child = 2 * root + 1;
    if (child >= n) return;
    if (child + 1 < n && compare(base + child * size, base + (child + 1) * size) < 0)
      child++;
    if (compare(base + root * size, base + child * size) >= 0) return;
    exf__sort_swap(base + root * size, base + child * size, size);
    root = child;
  }
}

static void exf__sort(void *elements, size_t n, size_t size, exf__compare compare) {
  char *base = (char *)elements;
  size_t i;
  for (i = 1; i < n; i++)  /* most files are in order */
    if (compare(base + (i - 1) * size, base + i * size) > 0) break;
  if (i >= n) return;
  for (i = n / 2; i-- > 0;) exf__sort_sift(base, i, n, size, compare);
  for (i = n; i-- > 1;) {
    exf__sort_swap(base, base + i * size, size);
    exf__sort_sift(base, 0, i, size, compare);
  }
}

static int exf__by_key(const void *a, const void *b) {
  return strcmp(((const exf_pair *)a)->key, ((const exf_pair *)b)->key);
}

static int exf__by_name(const void *a, const void *b) {
  const exf__st_rec *x = *(exf__st_rec *const *)a, *y = *(exf__st_rec *const *)b;
  return strcmp(x->entry.name, y->entry.name);
}

static int exf__by_offset(const void *a, const void *b) {
  const exf__st_rec *x = *(exf__st_rec *const *)a, *y = *(exf__st_rec *const *)b;
  if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
  if (x->entry.bytes != y->entry.bytes) return x->entry.bytes < y->entry.bytes ? -1 : 1;
  return 0;
}

/* The number of bytes before the first that is no UTF-8; n when all are. Overlong forms,
   surrogates and code points above U+10FFFF are none. */
static size_t exf__utf8_valid(const char *text, size_t n) {
  const unsigned char *s = (const unsigned char *)text;
  size_t i = 0;
  while (i < n) {
    unsigned c = s[i], low = 0x80, high = 0xbf;
    size_t more, k;
    if (c < 0x80) {
      i++;
      continue;
    }
    if (c < 0xc2 || c > 0xf4) return i;
    more = c < 0xe0 ? 1 : c < 0xf0 ? 2 : 3;
    if (c == 0xe0) low = 0xa0;
    if (c == 0xed) high = 0x9f;
    if (c == 0xf0) low = 0x90;
    if (c == 0xf4) high = 0x8f;
    if (more > n - i - 1) return i;
    if (s[i + 1] < low || s[i + 1] > high) return i;
    for (k = 2; k <= more; k++)
      if ((s[i + k] & 0xc0) != 0x80) return i;
    i += more + 1;
  }
  return n;
}

/* The next byte that is not blank; '\0' at the end. */
static char exf__st_peek(exf__st_in *in) {
  while (in->at < in->n && in->header[in->at] != '\0'
         && strchr(" \t\n\r", in->header[in->at]) != NULL)
    in->at++;
  return in->at < in->n ? in->header[in->at] : '\0';
}

static int exf__st_eat(exf__st_in *in, char c) {
  if (exf__st_peek(in) != c) return 0;
  in->at++;
  return 1;
}

static int exf__st_need(exf__st_in *in, char c) {
  if (exf__st_eat(in, c)) return 1;
  if (in->at == in->n)
    return exf__st_fail(in, EXF_FORMAT, "V4", NULL,
                        "the JSON header ends where '%c' is expected", c);
  return exf__st_fail(in, EXF_FORMAT, "V4", NULL,
                      "header byte %llu is 0x%02x, expected '%c'",
                      (unsigned long long)in->at,
                      (unsigned)(unsigned char)in->header[in->at], c);
}

/* Steps into a value that begins with c. Another kind of value is sound JSON in a place
   where the format has none. */
static int exf__st_value(exf__st_in *in, char c, const char *what) {
  char next = exf__st_peek(in);
  if (next != '\0' && next != c && strchr("{[\"-0123456789tfn", next) != NULL)
    return exf__st_fail(in, EXF_FORMAT, "V5", NULL, "header byte %llu: %s must be %s",
                        (unsigned long long)in->at, what,
                        c == '{' ? "an object" : c == '[' ? "an array" : "a string");
  return exf__st_need(in, c);
}

/* Four hexadecimal digits of an escape; -1 when they are not there. */
static long exf__st_hex4(exf__st_in *in) {
  long v = 0;
  int i;
  for (i = 0; i < 4; i++) {
    char c = in->at < in->n ? in->header[in->at++] : ' ';
    int digit = c >= '0' && c <= '9'   ? c - '0'
                : c >= 'a' && c <= 'f' ? c - 'a' + 10
                : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                       : -1;
    if (digit < 0) return -1;
    v = v * 16 + digit;
  }
  return v;
}

static char *exf__utf8_put(char *put, unsigned long code) {
  if (code < 0x80) {
    *put++ = (char)code;
    return put;
  }
  if (code < 0x800) {
    *put++ = (char)(0xc0 | code >> 6);
  } else {
    if (code < 0x10000) {
      *put++ = (char)(0xe0 | code >> 12);
    } else {
      *put++ = (char)(0xf0 | code >> 18);
      *put++ = (char)(0x80 | (code >> 12 & 0x3f));
    }
    *put++ = (char)(0x80 | (code >> 6 & 0x3f));
  }
  *put++ = (char)(0x80 | (code & 0x3f));
  return put;
}

/* What follows a backslash, written to put, which moves on. */
static int exf__st_escape(exf__st_in *in, char **put) {
  const unsigned long long backslash = in->at - 1;
  static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
  char c = in->at < in->n ? in->header[in->at++] : '\0';
  const char *simple = c != '\0' ? strchr(from, c) : NULL;
  long code, low;
  if (simple != NULL) {
    *(*put)++ = to[simple - from];
    return 1;
  }
  code = c == 'u' ? exf__st_hex4(in) : -1;
  if (code < 0)
    return exf__st_fail(in, EXF_FORMAT, "V4", NULL,
                        "header byte %llu: an escape that JSON does not have", backslash);
  if (code == 0)
    return exf__st_fail(in, EXF_FORMAT, "V7", NULL,
                        "header byte %llu: U+0000 in a string would cut it short",
                        backslash);
  if (code >= 0xd800 && code < 0xe000) {
    low = -1;
    if (code < 0xdc00 && in->n - in->at >= 6 && in->header[in->at] == '\\'
        && in->header[in->at + 1] == 'u') {
      in->at += 2;
      low = exf__st_hex4(in);
    }
    if (low < 0xdc00 || low > 0xdfff)
      return exf__st_fail(in, EXF_FORMAT, "V3", NULL,
                          "header byte %llu: an escape is half a surrogate pair",
                          backslash);
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  }
  *put = exf__utf8_put(*put, (unsigned long)code);
  return 1;
}

/* A string, unescaped where it stands and ended by NUL: no escape is shorter than what
   it means, and the closing quote makes room. what: NULL for a key. */
static char *exf__st_string(exf__st_in *in, const char *what) {
  char *start, *put;
  if (!(what != NULL ? exf__st_value(in, '"', what) : exf__st_need(in, '"'))) return NULL;
  start = put = in->header + in->at;
  while (in->at < in->n) {
    char c = in->header[in->at++];
    if (c == '"') {
      *put = '\0';
      return start;
    }
    if ((unsigned char)c < 0x20) {
      exf__st_fail(in, EXF_FORMAT, "V4", NULL,
                   "header byte %llu: a control character in a string",
                   (unsigned long long)(in->at - 1));
      return NULL;
    }
    if (c != '\\') *put++ = c;
    else if (!exf__st_escape(in, &put)) return NULL;
  }
  exf__st_fail(in, EXF_FORMAT, "V4", NULL, "the JSON header ends inside a string");
  return NULL;
}

static int exf__st_integer(exf__st_in *in, const char *tensor, uint64_t *out) {
  char c = exf__st_peek(in);
  uint64_t v = 0;
  size_t start = in->at;
  while (c >= '0' && c <= '9') {
    v = v * 10 + (uint64_t)(c - '0');
    if (v > EXF__ST_MAX_INTEGER)
      return exf__st_fail(in, EXF_FORMAT, "V10", tensor, "an integer above 2^48 - 1");
    in->at++;
    c = in->at < in->n ? in->header[in->at] : '\0';
  }
  if (in->at == start || (in->header[start] == '0' && in->at - start > 1) || c == '.'
      || c == 'e' || c == 'E')
    return exf__st_fail(in, EXF_FORMAT, "V10", tensor,
                        "header byte %llu: shape and data_offsets hold integers in"
                        " plain digits only", (unsigned long long)start);
  *out = v;
  return 1;
}

/* An array of at most max integers; their number in *n. */
static int exf__st_array(exf__st_in *in, const char *tensor, const char *what,
                         uint64_t *out, int max, int *n) {
  *n = 0;
  if (!exf__st_value(in, '[', what)) return 0;
  if (exf__st_eat(in, ']')) return 1;
  do {
    if (*n == max) {
      if (max == 2)
        return exf__st_fail(in, EXF_FORMAT, "V12", tensor,
                            "data_offsets has more than two entries");
      return exf__st_fail(in, EXF_LIMIT, "V18", tensor, "more than %d axes", max);
    }
    if (!exf__st_integer(in, tensor, &out[*n])) return 0;
    ++*n;
  } while (exf__st_eat(in, ','));
  return exf__st_need(in, ']');
}

/* The name as a constant and the bits of one element; NULL for an unknown dtype. */
static const char *exf__st_dtype(const char *name, unsigned *bits) {
  static const struct {
    const char *name;
    unsigned bits;
  } known[] = {
    {"BOOL", 8}, {"U8", 8}, {"I8", 8}, {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8},
    {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16}, {"U16", 16}, {"F16", 16},
    {"BF16", 16}, {"I32", 32}, {"U32", 32}, {"F32", 32}, {"C64", 64}, {"F64", 64},
    {"I64", 64}, {"U64", 64}, {"F4", 4}, {"F6_E2M3", 6}, {"F6_E3M2", 6},
  };
  size_t i;
  for (i = 0; i < sizeof known / sizeof known[0]; i++)
    if (strcmp(name, known[i].name) == 0) {
      *bits = known[i].bits;
      return known[i].name;
    }
  return NULL;
}

/* Rules V12 to V14, of one tensor. Zeros in the shape do not excuse the other numbers
   from the check against overflow. */
static int exf__st_extent(exf__st_in *in, exf__st_rec *r, unsigned bits,
                          const uint64_t *dim, const uint64_t *span) {
  const char *name = r->entry.name;
  exf_st *st = in->st;
  uint64_t n = 1, bytes;
  int i, empty = 0;
  if (span[0] > span[1])
    return exf__st_fail(in, EXF_FORMAT, "V12", name,
                        "data_offsets end at %llu, before their begin %llu",
                        (unsigned long long)span[1], (unsigned long long)span[0]);
  r->entry.dim = st->dim + st->n_dims;
  for (i = 0; i < r->entry.n_dims; i++) {
    if (st->n_dims == st->dim_room)
      return exf__st_fail(in, EXF_LIMIT, "V18", name, "too many axes in all");
#if SIZE_MAX < UINT64_MAX
    if (dim[i] > SIZE_MAX)
      return exf__st_fail(in, EXF_SIZE, "V13", name, "axis %d is too long here", i);
#endif
    st->dim[st->n_dims++] = (size_t)dim[i];
    if (dim[i] == 0) {
      empty = 1;
    } else {
      if (n > UINT64_MAX / dim[i])
        return exf__st_fail(in, EXF_FORMAT, "V13", name,
                            "the number of elements overflows");
      n *= dim[i];
    }
  }
  if (n > UINT64_MAX / bits)
    return exf__st_fail(in, EXF_FORMAT, "V13", name, "the number of bits overflows");
  if (empty) n = 0;
  if (n * bits % 8 != 0)
    return exf__st_fail(in, EXF_FORMAT, "V13", name,
                        "%llu elements of %s do not fill whole bytes",
                        (unsigned long long)n, r->entry.dtype);
  bytes = n * bits / 8;
  if (span[1] - span[0] != bytes)
    return exf__st_fail(in, EXF_FORMAT, "V14", name,
                        "%llu elements of %s need %llu bytes, data_offsets span %llu",
                        (unsigned long long)n, r->entry.dtype, (unsigned long long)bytes,
                        (unsigned long long)(span[1] - span[0]));
#if SIZE_MAX < UINT64_MAX
  if (bytes > SIZE_MAX)
    return exf__st_fail(in, EXF_SIZE, "V13", name, "too large for this machine");
#endif
  r->begin = span[0];
  r->entry.bytes = (size_t)bytes;
  return 1;
}

static int exf__st_member(exf__st_in *in, exf__st_rec *r, unsigned *seen, unsigned *bits,
                          uint64_t *dim, uint64_t *span) {
  const char *name = r->entry.name, *key = exf__st_string(in, NULL), *dtype;
  unsigned which;
  int n;
  if (key == NULL) return 0;
  which = strcmp(key, "dtype") == 0          ? 1u
          : strcmp(key, "shape") == 0        ? 2u
          : strcmp(key, "data_offsets") == 0 ? 4u
                                             : 0u;
  if (which == 0)
    return exf__st_fail(in, EXF_FORMAT, "V9", name,
                        "has a member besides dtype, shape and data_offsets");
  if (*seen & which)
    return exf__st_fail(in, EXF_FORMAT, "V6", name, "has the member %s twice", key);
  *seen |= which;
  if (!exf__st_need(in, ':')) return 0;
  if (which == 2) return exf__st_array(in, name, key, dim, EXF__ST_MAX_AXES,
                                       &r->entry.n_dims);
  if (which == 4) {
    if (!exf__st_array(in, name, key, span, 2, &n)) return 0;
    return n == 2 || exf__st_fail(in, EXF_FORMAT, "V12", name,
                                  "data_offsets needs two entries, has %d", n);
  }
  dtype = exf__st_string(in, key);
  if (dtype == NULL) return 0;
  r->entry.dtype = exf__st_dtype(dtype, bits);
  if (r->entry.dtype == NULL) {
    char label[EXF__IO_LABEL];
    exf__io_label(label, dtype, 0);
    return exf__st_fail(in, EXF_FORMAT, "V11", name, "unknown dtype '%s'", label);
  }
  return 1;
}

static int exf__st_tensor(exf__st_in *in, const char *name) {
  exf__st_rec *r = &in->st->rec[in->st->n];
  uint64_t dim[EXF__ST_MAX_AXES] = {0}, span[2] = {0, 0};
  unsigned seen = 0, bits = 8;
  memset(r, 0, sizeof *r);
  r->entry.name = name;
  if (strlen(name) > EXF__ST_MAX_NAME)
    return exf__st_fail(in, EXF_LIMIT, "V18", name, "a name of more than %u bytes",
                        EXF__ST_MAX_NAME);
  if (!exf__st_value(in, '{', "a tensor")) return 0;
  if (!exf__st_eat(in, '}')) {
    do {
      if (!exf__st_member(in, r, &seen, &bits, dim, span)) return 0;
    } while (exf__st_eat(in, ','));
    if (!exf__st_need(in, '}')) return 0;
  }
  if (seen != 7)
    return exf__st_fail(in, EXF_FORMAT, "V9", name, "lacks the member %s",
                        !(seen & 1)   ? "dtype"
                        : !(seen & 2) ? "shape"
                                      : "data_offsets");
  in->st->order[in->st->n++] = r;
  return exf__st_extent(in, r, bits, dim, span);
}

/* At least the tensors of the header, up to where it breaks a rule: colons outside the
   objects in it, as far apart as those of sound tensors are (one pair, metadata, may be
   shorter). So the text bounds the memory, whatever is in it. */
static size_t exf__st_count(const exf__st_in *in) {
  size_t i, depth = 0, pairs = 0, last = 0;
  int quoted = 0;
  for (i = in->at; i < in->n; i++) {
    char c = in->header[i];
    if (quoted) {
      if (c == '\\') i++;
      else if (c == '"') quoted = 0;
    } else if (c == '"') {
      quoted = 1;
    } else if (c == '{' || c == '[') {
      depth++;
    } else if (c == '}' || c == ']') {
      if (depth <= 1) break;
      depth--;
    } else if (c == ':' && depth == 1 && (!pairs || i - last >= EXF__ST_MIN_TENSOR)) {
      pairs++;
      last = i;
    }
  }
  return pairs + 1;
}

/* Pairs are moved together where they stand, as key, NUL, value, NUL: memory for them is
   only taken when the whole header is sound. */
static int exf__st_metadata(exf__st_in *in) {
  char *put;
  if (in->has_meta)
    return exf__st_fail(in, EXF_FORMAT, "V6", NULL, "__metadata__ is there twice");
  in->has_meta = 1;
  if (exf__st_peek(in) == 'n' && in->n - in->at >= 4
      && memcmp(in->header + in->at, "null", 4) == 0) {
    in->at += 4;
    return 1;
  }
  if (!exf__st_value(in, '{', "__metadata__")) return 0;
  in->meta = put = in->header + in->at;
  if (exf__st_eat(in, '}')) return 1;
  do {
    const char *text = exf__st_string(in, NULL);
    if (text == NULL || !exf__st_need(in, ':')) return 0;
    memmove(put, text, strlen(text) + 1);
    put += strlen(put) + 1;
    if (exf__st_peek(in) != '"' && in->at < in->n)
      return exf__st_fail(in, EXF_FORMAT, "V8", NULL,
                          "header byte %llu: a metadata value is not a string",
                          (unsigned long long)in->at);
    text = exf__st_string(in, NULL);
    if (text == NULL) return 0;
    memmove(put, text, strlen(text) + 1);
    put += strlen(put) + 1;
    in->st->n_meta++;
  } while (exf__st_eat(in, ','));
  return exf__st_need(in, '}');
}

static int exf__st_index_metadata(exf__st_in *in) {
  exf_st *st = in->st;
  const char *text = in->meta;
  size_t i;
  st->meta = (exf_pair *)exf__alloc_n(in->ctx, st->n_meta, sizeof(exf_pair));
  if (st->meta == NULL) return 0;
  for (i = 0; i < st->n_meta; i++) {
    st->meta[i].key = text;
    text += strlen(text) + 1;
    st->meta[i].value = text;
    text += strlen(text) + 1;
  }
  exf__sort(st->meta, st->n_meta, sizeof(exf_pair), exf__by_key);
  for (i = 1; i < st->n_meta; i++)
    if (strcmp(st->meta[i - 1].key, st->meta[i].key) == 0) {
      char label[EXF__IO_LABEL];
      exf__io_label(label, st->meta[i].key, 0);
      return exf__st_fail(in, EXF_FORMAT, "V6", NULL, "metadata key '%s' is there twice",
                          label);
    }
  return 1;
}

/* Memory for max tensors. A tensor with axes is two bytes longer for each but the first:
   that bounds the axes of all tensors together. */
static int exf__st_room(exf__st_in *in, size_t max) {
  exf_st *st = in->st;
  size_t text = in->n + EXF__ST_MIN_TENSOR, least = (EXF__ST_MIN_TENSOR - 2) * max;
  st->dim_room = EXF__MIN(EXF__ST_MAX_AXES * max, text > least ? (text - least) / 2 : 0);
  st->dim_room += EXF__ST_MAX_AXES;
  st->rec = (exf__st_rec *)exf__alloc_n(in->ctx, max, sizeof *st->rec);
  st->order = (exf__st_rec **)exf__alloc_n(in->ctx, max, sizeof *st->order);
  st->dim = (size_t *)exf__alloc_n(in->ctx, st->dim_room, sizeof *st->dim);
  return st->rec != NULL && st->order != NULL && st->dim != NULL;
}

/* The whole header, rules V3 to V14. */
static int exf__st_header(exf__st_in *in) {
  exf_st *st = in->st;
  size_t valid = exf__utf8_valid(in->header, in->n), max;
  if (valid < in->n)
    return exf__st_fail(in, EXF_FORMAT, "V3", NULL, "header byte %llu is not UTF-8",
                        (unsigned long long)valid);
  exf__st_peek(in);
  max = exf__st_count(in);
  if (max > EXF__ST_MAX_TENSORS) max = EXF__ST_MAX_TENSORS;
  if (!exf__st_room(in, max)) return 0;
  if (!exf__st_value(in, '{', "the header")) return 0;
  if (!exf__st_eat(in, '}')) {
    do {
      const char *key = exf__st_string(in, NULL);
      if (key == NULL || !exf__st_need(in, ':')) return 0;
      if (strcmp(key, "__metadata__") == 0) {
        if (!exf__st_metadata(in)) return 0;
      } else if (st->n == max) {
        return exf__st_fail(in, EXF_LIMIT, "V18", NULL, "more than %llu tensors",
                            (unsigned long long)max);
      } else if (!exf__st_tensor(in, key)) {
        return 0;
      }
    } while (exf__st_eat(in, ','));
    if (!exf__st_need(in, '}')) return 0;
  }
  exf__st_peek(in);
  if (in->at < in->n)
    return exf__st_fail(in, EXF_FORMAT, "V4", NULL,
                        "header byte %llu is 0x%02x, after the end of the JSON: only"
                        " blanks may pad it", (unsigned long long)in->at,
                        (unsigned)(unsigned char)in->header[in->at]);
  return exf__st_index_metadata(in);
}

/* Rules V6, V15 and V16, of all tensors together; *used: bytes they take up. */
static int exf__st_layout(exf__st_in *in, size_t buffer, size_t *trailing, size_t *used) {
  exf_st *st = in->st;
  uint64_t end = 0;
  size_t i;
  exf__sort(st->order, st->n, sizeof *st->order, exf__by_name);
  for (i = 1; i < st->n; i++)
    if (strcmp(st->order[i - 1]->entry.name, st->order[i]->entry.name) == 0)
      return exf__st_fail(in, EXF_FORMAT, "V6", st->order[i]->entry.name,
                          "is there twice");
  exf__sort(st->order, st->n, sizeof *st->order, exf__by_offset);
  for (i = 0; i < st->n; i++) {
    const exf__st_rec *r = st->order[i];
    if (r->begin != end)
      return exf__st_fail(in, EXF_FORMAT, "V15", r->entry.name,
                          "begins at %llu, %s %llu where the tensor before it ends",
                          (unsigned long long)r->begin,
                          r->begin > end ? "leaves a hole after" : "overlaps",
                          (unsigned long long)end);
    end += (uint64_t)r->entry.bytes;
  }
  exf__sort(st->order, st->n, sizeof *st->order, exf__by_name);
  if (end > buffer)
    return exf__st_fail(in, EXF_FORMAT, "V16", NULL,
                        "the tensors need %llu bytes, the file holds %llu: it is cut"
                        " short", (unsigned long long)end, (unsigned long long)buffer);
  if (end < buffer && trailing == NULL)
    return exf__st_fail(in, EXF_FORMAT, "V16", NULL,
                        "%llu bytes after the last tensor: ask for them by trailing,"
                        " if they are meant to be there",
                        (unsigned long long)(buffer - end));
  *used = (size_t)end;
  if (trailing != NULL) *trailing = buffer - *used;
  return 1;
}

static int exf__st_get_bytes(exf__st_in *in, void *out, size_t bytes) {
  const exf_files *f = &in->ctx->files;
  unsigned char *put = (unsigned char *)out;
  if (in->file == NULL) {
    if (bytes == 0) return 1; /* the memory may be NULL */
    memcpy(put, in->memory, bytes);
    in->memory += bytes;
    return 1;
  }
  while (bytes > 0) {
    int64_t n;
    errno = 0;
    n = f->read(f->user, in->file, put, bytes);
    if (n < 0 || (uint64_t)n > bytes) {
      exf__io_fail(in->ctx, in->label, "read", errno);
      return 0;
    }
    if (n == 0) {
      exf_fail(in->ctx, EXF_IO, "%s: file changed while reading: %llu bytes are missing",
               in->label, (unsigned long long)bytes);
      return 0;
    }
    put += n;
    bytes -= (size_t)n;
  }
  return 1;
}

/* Rule V1, and the header's length in in->n. */
static int exf__st_length(exf__st_in *in, size_t size) {
  uint64_t n = 0;
  int i;
  memset(in->first, 0, 8);
  if (!exf__st_get_bytes(in, in->first, EXF__MIN(size, 8))) return 0;
  if (size < 8)
    return exf__st_fail(in, EXF_FORMAT, "V1", NULL,
                        "%llu bytes, at least 8 are needed", (unsigned long long)size);
  for (i = 8; i-- > 0;) n = n << 8 | in->first[i];
  if (n > size - 8)
    return exf__st_fail(in, EXF_FORMAT, "V1", NULL,
                        "a header of %llu bytes does not fit into a file of %llu: it is"
                        " cut short, or no safetensors file", (unsigned long long)n,
                        (unsigned long long)size);
  if (n > EXF__ST_MAX_HEADER)
    return exf__st_fail(in, EXF_FORMAT, "V1", NULL,
                        "a header of %llu bytes, the format allows 100000000",
                        (unsigned long long)n);
  in->n = (size_t)n;
  return 1;
}

/* size: of the whole file. The data is not allocated before the header is proved. */
static exf_st *exf__st_load(exf__st_in *in, size_t size, size_t *trailing) {
  exf_st *st;
  size_t used = 0, i;
  if (!exf__st_length(in, size)) return NULL;
  st = (exf_st *)exf__alloc(in->ctx, sizeof *st);
  if (st == NULL) return NULL;
  memset(st, 0, sizeof *st);
  st->ctx = in->ctx;
  in->st = st;
  in->header = st->header = (char *)exf__alloc(in->ctx, in->n);
  if (st->header != NULL && exf__st_get_bytes(in, st->header, in->n)
      && exf__st_header(in)
      && exf__st_layout(in, size - 8 - in->n, trailing, &used)) {
    st->data = (unsigned char *)exf__alloc(in->ctx, used);
    if (st->data != NULL && exf__st_get_bytes(in, st->data, used)) {
      for (i = 0; i < st->n; i++)
        st->rec[i].entry.data = st->data + (size_t)st->rec[i].begin;
      return st;
    }
  }
  if (trailing != NULL) *trailing = 0;
  exf_st_close(st);
  return NULL;
}

EXF_API exf_st *exf_st_open(exf_ctx *ctx, const char *path, size_t *trailing) {
  exf__st_in in;
  exf_st *st = NULL;
  int64_t size;
  if (trailing != NULL) *trailing = 0;
  if (ctx == NULL) return NULL;
  memset(&in, 0, sizeof in);
  in.ctx = ctx;
  if (exf__io_begin(ctx, path, 0, in.label) != EXF_OK) return NULL;
  errno = 0;
  in.file = ctx->files.open(ctx->files.user, path, 0);
  if (in.file == NULL) {
    exf__io_fail(ctx, in.label, "open", errno);
    return NULL;
  }
  errno = 0;
  size = ctx->files.size(ctx->files.user, in.file);
  if (size < 0) {
    exf__io_fail(ctx, in.label, "get its size", errno);
#if SIZE_MAX < UINT64_MAX
  } else if ((uint64_t)size > SIZE_MAX) {
    exf_fail(ctx, EXF_SIZE, "%s: a file too large for the memory of this machine",
             in.label);
#endif
  } else {
    st = exf__st_load(&in, (size_t)size, trailing);
  }
  (void)ctx->files.close(ctx->files.user, in.file); /* nothing was written */
  return st;
}

EXF_API exf_st *exf_st_open_memory(exf_ctx *ctx, const void *data, size_t bytes,
                                   size_t *trailing) {
  exf__st_in in;
  if (trailing != NULL) *trailing = 0;
  if (ctx == NULL) return NULL;
  if (data == NULL && bytes > 0) {
    exf_fail(ctx, EXF_ARG, "exf_st_open_memory: data is NULL, but bytes is not 0");
    return NULL;
  }
  memset(&in, 0, sizeof in);
  in.ctx = ctx;
  in.memory = (const unsigned char *)data;
  memcpy(in.label, "memory", sizeof "memory");
  return exf__st_load(&in, bytes, trailing);
}

EXF_API void exf_st_close(exf_st *st) {
  if (st == NULL) return;
  exf__free(st->ctx, st->header);
  exf__free(st->ctx, st->rec);
  exf__free(st->ctx, st->order);
  exf__free(st->ctx, st->dim);
  exf__free(st->ctx, st->meta);
  exf__free(st->ctx, st->data);
  exf__free(st->ctx, st);
}

EXF_API size_t exf_st_count(const exf_st *st) { return st == NULL ? 0 : st->n; }

EXF_API const exf_st_entry *exf_st_get(const exf_st *st, size_t i) {
  return st == NULL || i >= st->n ? NULL : &st->order[i]->entry;
}

EXF_API const exf_st_entry *exf_st_find(const exf_st *st, const char *name) {
  size_t low = 0, high = exf_st_count(st);
  while (low < high && name != NULL) {
    size_t middle = low + (high - low) / 2;
    int order = strcmp(name, st->order[middle]->entry.name);
    if (order == 0) return &st->order[middle]->entry;
    if (order < 0) high = middle;
    else low = middle + 1;
  }
  return NULL;
}

EXF_API const char *exf_st_meta(const exf_st *st, const char *key) {
  size_t low = 0, high = st == NULL ? 0 : st->n_meta;
  while (low < high && key != NULL) {
    size_t middle = low + (high - low) / 2;
    int order = strcmp(key, st->meta[middle].key);
    if (order == 0) return st->meta[middle].value;
    if (order < 0) high = middle;
    else low = middle + 1;
  }
  return NULL;
}

static uint32_t exf__load_le(const unsigned char *p, int bytes) {
  uint32_t v = 0;
  while (bytes-- > 0) v = v << 8 | p[bytes];
  return v;
}

static exf_real exf__from_f32(const unsigned char *p) {
  uint32_t bits = (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16
                  | (uint32_t)p[3] << 24;
  float x;
  memcpy(&x, &bits, 4);
  return EXF__R(x);
}

/* Numbers beyond the range of exf_real become infinite. */
static exf_real exf__from_f64(const unsigned char *p) {
  uint64_t bits = (uint64_t)exf__load_le(p + 4, 4) << 32 | exf__load_le(p, 4);
  double x;
  memcpy(&x, &bits, 8);
  return EXF__R(x);
}

static exf_real exf__from_bf16(const unsigned char *p) {
  uint32_t bits = exf__load_le(p, 2) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return EXF__R(x);
}

/* 1 sign, 5 exponent (bias 15) and 10 fraction bits -> 1, 8 (bias 127), 23 */
static exf_real exf__from_f16(const unsigned char *p) {
  uint32_t h = exf__load_le(p, 2), e = h >> 10 & 31, f = h & 0x3ff, bits;
  float x;
  if (e == 0) {
    x = (float)f * (1.0f / 16777216.0f); /* f 2^-24, exact */
    memcpy(&bits, &x, 4);
  } else {
    bits = (e == 31 ? 255u : e + 112u) << 23 | f << 13;
  }
  bits |= (h & 0x8000u) << 16;
  memcpy(&x, &bits, 4);
  return EXF__R(x);
}

EXF_API exf_status exf_st_read(exf_ctx *ctx, const exf_st_entry *entry, exf_real *out,
                               size_t n) {
  static const struct {
    const char *dtype;
    size_t width;
    exf_real (*convert)(const unsigned char *p);
  } known[] = {
    {"F32", 4, exf__from_f32}, {"F64", 8, exf__from_f64},
    {"F16", 2, exf__from_f16}, {"BF16", 2, exf__from_bf16},
  };
  char name[EXF__IO_LABEL];
  size_t i, k;
  if (ctx == NULL) return EXF_ARG;
  if (entry == NULL || (out == NULL && n > 0))
    return exf_fail(ctx, EXF_ARG, "exf_st_read: the entry or out is NULL");
  exf__io_label(name, entry->name, 0);
  for (k = 0; k < sizeof known / sizeof known[0]; k++) {
    if (strcmp(entry->dtype, known[k].dtype) != 0) continue;
    if (n != entry->bytes / known[k].width)
      return exf_fail(ctx, EXF_SHAPE,
                      "exf_st_read: tensor '%s' has %llu elements, asked for %llu", name,
                      (unsigned long long)(entry->bytes / known[k].width),
                      (unsigned long long)n);
    if (k == 0)
      for (i = 0; i < n; i++) out[i] = exf__from_f32(entry->data + 4 * i);
    else
      for (i = 0; i < n; i++) out[i] = known[k].convert(entry->data + known[k].width * i);
    return EXF_OK;
  }
  return exf_fail(ctx, EXF_MISMATCH,
                  "exf_st_read: tensor '%s' is %s: convert it to F32, F64, F16 or BF16",
                  name, entry->dtype);
}

/* ---- writing ----------------------------------------------------- >>st-writer */

/* Compact JSON, metadata first (keys sorted), tensors by name, padded with spaces to a
   multiple of 8; data from 0 on. The reference writer makes the same bytes, but leaves
   the order of two or more metadata keys to chance. F32; with EXF_DOUBLE, F64. */
#ifdef EXF_DOUBLE
#define EXF__ST_DTYPE "F64"
#else
#define EXF__ST_DTYPE "F32"
#endif

typedef struct exf__st_plan {
  exf_ctx *ctx;
  const char *label;
  const exf_st_item **item;    /* (n) by ascending name */
  size_t n;
  exf_pair *meta;              /* (n_meta) by ascending key */
  size_t n_meta;
  unsigned char *header;       /* (header_bytes) its length, the JSON and the padding */
  size_t header_bytes, data_bytes;   /* their sum fits */
} exf__st_plan;

/* Text being measured (out NULL) or written. Measuring stops above the header's limit. */
typedef struct exf__json {
  char *out;
  size_t n;
} exf__json;

static void exf__json_char(exf__json *t, char c) {
  if (t->out != NULL) t->out[t->n] = c;
  if (t->n <= EXF__ST_MAX_HEADER) t->n++;
}

static void exf__json_plain(exf__json *t, const char *s) {
  for (; *s != '\0'; s++) exf__json_char(t, *s);
}

static void exf__json_number(exf__json *t, size_t v) {
  char digits[32];
  snprintf(digits, sizeof digits, "%llu", (unsigned long long)v);
  exf__json_plain(t, digits);
}

static void exf__json_string(exf__json *t, const char *s) {
  static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
  exf__json_char(t, '"');
  for (; *s != '\0'; s++) {
    const char *simple = strchr(from, *s);
    if (simple != NULL) {
      exf__json_char(t, '\\');
      exf__json_char(t, to[simple - from]);
    } else if ((unsigned char)*s < 0x20) {
      char escape[8];
      snprintf(escape, sizeof escape, "\\u%04x", (unsigned)(unsigned char)*s);
      exf__json_plain(t, escape);
    } else {
      exf__json_char(t, *s);
    }
  }
  exf__json_char(t, '"');
}

static int exf__st_fits(uint64_t n) { return n <= EXF__ST_MAX_INTEGER; }

/* The number of elements, checked as in rule V13. */
static int exf__st_size(const exf_shape *shape, size_t *n) {
  size_t product = 1;
  int i, empty = 0;
  for (i = 0; i < shape->n; i++) {
    if (!exf__st_fits(shape->dim[i])) return 0;
    if (shape->dim[i] == 0) empty = 1;
    else if (!exf__mul_size(product, shape->dim[i], &product)) return 0;
  }
  if (product > SIZE_MAX / 64) return 0;
  *n = empty ? 0 : product;
  return 1;
}

static void exf__st_json(const exf__st_plan *p, exf__json *t) {
  size_t i, at = 0, n = 0;
  int d;
  exf__json_char(t, '{');
  if (p->n_meta > 0) exf__json_plain(t, "\"__metadata__\":{");
  for (i = 0; i < p->n_meta; i++) {
    if (i > 0) exf__json_char(t, ',');
    exf__json_string(t, p->meta[i].key);
    exf__json_char(t, ':');
    exf__json_string(t, p->meta[i].value);
  }
  if (p->n_meta > 0) exf__json_plain(t, p->n > 0 ? "}," : "}");
  for (i = 0; i < p->n; i++) {
    const exf_shape *shape = &p->item[i]->shape;
    if (i > 0) exf__json_char(t, ',');
    exf__json_string(t, p->item[i]->name);
    exf__json_plain(t, ":{\"dtype\":\"" EXF__ST_DTYPE "\",\"shape\":[");
    for (d = 0; d < shape->n; d++) {
      if (d > 0) exf__json_char(t, ',');
      exf__json_number(t, shape->dim[d]);
    }
    exf__json_plain(t, "],\"data_offsets\":[");
    exf__json_number(t, at);
    exf__json_char(t, ',');
    if (exf__st_size(shape, &n)) at += n * sizeof(exf_real);
    exf__json_number(t, at);
    exf__json_plain(t, "]}");
  }
  exf__json_char(t, '}');
  while (t->n % 8 != 0 && t->n <= EXF__ST_MAX_HEADER) exf__json_char(t, ' ');
}

static exf_status exf__st_refuse(const exf__st_plan *p, exf_status status,
                                 const char *rule, const char *kind, const char *name,
                                 const char *text) {
  char label[EXF__IO_LABEL];
  exf__io_label(label, name, 0);
  return exf_fail(p->ctx, status, "%s: safetensors rule %s: %s '%s' %s", p->label, rule,
                  kind, label, text);
}

static exf_status exf__st_check_item(exf__st_plan *p, const exf_st_item *item) {
  const char *name = item->name;
  size_t n;
  if (name == NULL)
    return exf_fail(p->ctx, EXF_ARG, "%s: a tensor name is NULL", p->label);
  if (strcmp(name, "__metadata__") == 0)
    return exf__st_refuse(p, EXF_ARG, "V7", "tensor", name, "has a reserved name");
  if (exf__utf8_valid(name, strlen(name)) < strlen(name))
    return exf__st_refuse(p, EXF_ARG, "V3", "tensor", name, "has a name that is not"
                          " UTF-8");
  if (strlen(name) > EXF__ST_MAX_NAME)
    return exf__st_refuse(p, EXF_LIMIT, "V18", "tensor", name, "has too long a name");
  if (item->shape.n < 0 || item->shape.n > EXF_MAX_DIMS)
    return exf__st_refuse(p, EXF_SHAPE, "V18", "tensor", name, "has too many axes");
  if (!exf__st_size(&item->shape, &n)
      || !exf__add_size(p->data_bytes, n * sizeof(exf_real), &p->data_bytes)
      || !exf__st_fits(p->data_bytes) || p->data_bytes > SIZE_MAX / 2)
    return exf__st_refuse(p, EXF_SIZE, "V13", "tensor", name, "makes the file too large");
  if (item->data == NULL && n > 0)
    return exf__st_refuse(p, EXF_ARG, "V13", "tensor", name, "has no data");
  return EXF_OK;
}

static exf_status exf__st_check_pair(const exf__st_plan *p, const exf_pair *pair) {
  if (pair->key == NULL || pair->value == NULL)
    return exf_fail(p->ctx, EXF_ARG, "%s: a metadata key or value is NULL", p->label);
  if (exf__utf8_valid(pair->key, strlen(pair->key)) < strlen(pair->key)
      || exf__utf8_valid(pair->value, strlen(pair->value)) < strlen(pair->value))
    return exf__st_refuse(p, EXF_ARG, "V3", "metadata key", pair->key,
                          "or its value is not UTF-8");
  return EXF_OK;
}

static int exf__by_item_name(const void *a, const void *b) {
  const exf_st_item *x = *(const exf_st_item *const *)a;
  const exf_st_item *y = *(const exf_st_item *const *)b;
  return strcmp(x->name, y->name);
}

/* Fills in the sorted items and pairs, all of them checked. */
static exf_status exf__st_gather(exf__st_plan *p, const exf_st_item *items,
                                 const exf_pair *meta) {
  exf_status status = EXF_OK;
  size_t i;
  for (i = 0; i < p->n && status == EXF_OK; i++) {
    status = exf__st_check_item(p, &items[i]);
    p->item[i] = &items[i];
  }
  for (i = 0; i < p->n_meta && status == EXF_OK; i++) {
    status = exf__st_check_pair(p, &meta[i]);
    p->meta[i] = meta[i];
  }
  if (status != EXF_OK) return status;
  exf__sort(p->item, p->n, sizeof *p->item, exf__by_item_name);
  for (i = 1; i < p->n; i++)
    if (strcmp(p->item[i - 1]->name, p->item[i]->name) == 0)
      return exf__st_refuse(p, EXF_ARG, "V6", "tensor", p->item[i]->name,
                            "is there twice");
  exf__sort(p->meta, p->n_meta, sizeof *p->meta, exf__by_key);
  for (i = 1; i < p->n_meta; i++)
    if (strcmp(p->meta[i - 1].key, p->meta[i].key) == 0)
      return exf__st_refuse(p, EXF_ARG, "V6", "metadata key", p->meta[i].key,
                            "is there twice");
  return EXF_OK;
}

static void exf__st_plan_free(exf__st_plan *p) {
  exf__free(p->ctx, (void *)p->item);
  exf__free(p->ctx, p->meta);
  exf__free(p->ctx, p->header);
}

/* Checks everything and builds the header; on failure nothing is left to be freed. */
static exf_status exf__st_plan_make(exf__st_plan *p, exf_ctx *ctx, const char *label,
                                    const exf_st_item *items, size_t n,
                                    const exf_pair *meta, size_t n_meta) {
  exf_status status;
  exf__json text = {NULL, 0};
  size_t i;
  memset(p, 0, sizeof *p);
  p->ctx = ctx;
  p->label = label;
  p->n = n;
  p->n_meta = n_meta;
  if ((items == NULL && n > 0) || (meta == NULL && n_meta > 0))
    return exf_fail(ctx, EXF_ARG, "%s: items or meta is NULL, their number is not 0",
                    label);
  if (n > EXF__ST_MAX_TENSORS)
    return exf_fail(ctx, EXF_LIMIT, "%s: safetensors rule V18: more than %u tensors",
                    label, EXF__ST_MAX_TENSORS);
  p->item = (const exf_st_item **)exf__alloc_n(ctx, n, sizeof *p->item);
  p->meta = (exf_pair *)exf__alloc_n(ctx, n_meta, sizeof *p->meta);
  status = p->item != NULL && p->meta != NULL ? exf__st_gather(p, items, meta)
                                              : EXF_MEMORY;
  if (status == EXF_OK) {
    exf__st_json(p, &text);
    if (text.n > EXF__ST_MAX_HEADER)
      status = exf_fail(ctx, EXF_LIMIT, "%s: safetensors rule V1: the header would be"
                        " larger than 100000000 bytes: shorten metadata or names", label);
  }
  if (status == EXF_OK) {
    p->header_bytes = 8 + text.n;
    p->header = (unsigned char *)exf__alloc(ctx, p->header_bytes);
    if (p->header == NULL) status = EXF_MEMORY;
  }
  if (status == EXF_OK) {
    for (i = 0; i < 8; i++)
      p->header[i] = (unsigned char)((uint64_t)text.n >> 8 * i & 255);
    text.out = (char *)p->header + 8;
    text.n = 0;
    exf__st_json(p, &text);
  } else {
    exf__st_plan_free(p);
  }
  return status;
}

/* Where the bytes of a file go: a file being saved, or memory that has room for all. */
typedef struct exf__sink {
  exf__save *save;
  unsigned char *memory;
} exf__sink;

static exf_status exf__sink_put(exf__sink *sink, const void *data, size_t bytes) {
  if (sink->save != NULL) return exf__save_put(sink->save, data, bytes);
  memcpy(sink->memory, data, bytes);
  sink->memory += bytes;
  return EXF_OK;
}

/* Little-endian, on any machine. */
static void exf__store_le(unsigned char *p, exf_real x) {
  size_t i;
#ifdef EXF_DOUBLE
  uint64_t bits;
#else
  uint32_t bits;
#endif
  memcpy(&bits, &x, sizeof bits);
  for (i = 0; i < sizeof bits; i++) p[i] = (unsigned char)(bits >> 8 * i & 255);
}

static exf_status exf__st_stream(const exf__st_plan *p, exf__sink *sink) {
  unsigned char piece[16384];
  const size_t per_piece = sizeof piece / sizeof(exf_real);
  exf_status status = exf__sink_put(sink, p->header, p->header_bytes);
  size_t i, k, at, n = 0;
  for (i = 0; i < p->n; i++) {
    const exf_real *data = p->item[i]->data;
    if (!exf__st_size(&p->item[i]->shape, &n)) n = 0;
    for (at = 0; at < n && status == EXF_OK; at += k) {
      for (k = 0; k < per_piece && at + k < n; k++)
        exf__store_le(piece + k * sizeof(exf_real), data[at + k]);
      status = exf__sink_put(sink, piece, k * sizeof(exf_real));
    }
  }
  return status;
}

EXF_API exf_status exf_st_save(exf_ctx *ctx, const char *path, const exf_st_item *items,
                               size_t n, const exf_pair *meta, size_t n_meta) {
  exf__st_plan plan;
  exf__save save;
  exf__sink sink;
  exf_status status;
  if (ctx == NULL) return EXF_ARG;
  status = exf__io_begin(ctx, path, 1, save.label);
  if (status != EXF_OK) return status;
  status = exf__st_plan_make(&plan, ctx, save.label, items, n, meta, n_meta);
  if (status != EXF_OK) return status;
  status = exf__save_begin(&save, ctx, path);
  if (status == EXF_OK) {
    sink.save = &save;
    sink.memory = NULL;
    status = exf__save_end(&save, exf__st_stream(&plan, &sink));
  }
  exf__st_plan_free(&plan);
  return status;
}

EXF_API exf_status exf_st_save_memory(exf_ctx *ctx, const exf_st_item *items, size_t n,
                                      const exf_pair *meta, size_t n_meta,
                                      unsigned char **data, size_t *bytes) {
  exf__st_plan plan;
  exf__sink sink;
  exf_status status;
  if (ctx == NULL) return EXF_ARG;
  if (data == NULL || bytes == NULL)
    return exf_fail(ctx, EXF_ARG, "exf_st_save_memory: data or bytes is NULL");
  *data = NULL;
  *bytes = 0;
  status = exf__st_plan_make(&plan, ctx, "memory", items, n, meta, n_meta);
  if (status != EXF_OK) return status;
  sink.save = NULL;
  sink.memory = (unsigned char *)exf__alloc(ctx, plan.header_bytes + plan.data_bytes);
  if (sink.memory == NULL) {
    status = EXF_MEMORY;
  } else {
    *data = sink.memory;
    *bytes = plan.header_bytes + plan.data_bytes;
    status = exf__st_stream(&plan, &sink);
  }
  exf__st_plan_free(&plan);
  return status;
}

EXF_API void exf_st_free_memory(exf_ctx *ctx, unsigned char *data) {
  if (ctx != NULL) exf__free(ctx, data);
}

/* ---- models and checkpoints in files --------------------------------- >>checkpoint */

/* User metadata with the members this library adds: "format" always, and extra. */
static exf_pair *exf__meta_join(exf_ctx *ctx, const exf_pair *meta, size_t n_meta,
                                const exf_pair *extra, size_t n_extra, size_t *n) {
  exf_pair *all;
  size_t i;
  *n = 0;
  if (!meta && n_meta) {
    exf_fail(ctx, EXF_ARG, "save: meta is NULL, its number is not 0");
    return NULL;
  }
  all = (exf_pair *)exf__alloc_n(ctx, n_meta + 1 + n_extra, sizeof *all);
  if (!all) return NULL;
  for (i = 0; i < n_meta; i++) all[(*n)++] = meta[i];
  for (i = 0; i < n_meta; i++)
    if (meta[i].key && strcmp(meta[i].key, "format") == 0) break;
  if (i == n_meta) {
    all[*n].key = "format";
    all[(*n)++].value = "pt";
  }
  for (i = 0; i < n_extra; i++) all[(*n)++] = extra[i];
  return all;
}

EXF_API exf_status exf_model_save(exf_model *model, const char *path,
                                  const exf_pair *meta, size_t n_meta) {
  exf_ctx *ctx;
  exf__alias *a;
  exf_st_item *items, *all;
  exf_pair *pairs;
  size_t n, k, i, n_aliases = 0, n_pairs;
  if (!model) return EXF_ARG;
  ctx = model->ctx;
  if (ctx->status != EXF_OK) return ctx->status;
  for (a = model->aliases; a; a = a->next) n_aliases++;
  items = exf__merged(model, &n);
  if (!items) return ctx->status;
  all = (exf_st_item *)exf__alloc_n(ctx, n + n_aliases, sizeof *all);
  pairs = exf__meta_join(ctx, meta, n_meta, NULL, 0, &n_pairs);
  if (all && pairs) {
    memcpy(all, items, n * sizeof *all);
    for (k = n, a = model->aliases; a; a = a->next)
      for (i = 0; i < n; i++)
        if (strcmp(items[i].name, a->target) == 0) {
          all[k] = items[i];
          all[k++].name = a->name;
        }
    exf_st_save(ctx, path, all, k, pairs, n_pairs);
  }
  exf__free(ctx, pairs);
  exf__free(ctx, all);
  return ctx->status;
}

/* What a file is expected to hold: pairs of name and destination. */
typedef struct exf__slot {
  char *name;                  /* owned */
  const exf_shape *shape;
  exf_real *data;
  const exf_st_entry *entry;
} exf__slot;

typedef struct exf__slots {
  exf_ctx *ctx;
  exf__slot *slot;
  size_t n;
} exf__slots;

static int exf__slots_start(exf__slots *s, exf_ctx *ctx, size_t room) {
  s->ctx = ctx;
  s->n = 0;
  s->slot = (exf__slot *)exf__calloc_n(ctx, room + 1, sizeof(exf__slot));
  return s->slot != NULL;
}

static void exf__slots_add(exf__slots *s, const char *prefix, const char *name,
                           const char *suffix, const exf_shape *shape, exf_real *data) {
  size_t size = strlen(prefix) + strlen(name) + strlen(suffix) + 1;
  char *full = (char *)exf__alloc(s->ctx, size);
  if (!full) return;
  snprintf(full, size, "%s%s%s", prefix, name, suffix);
  s->slot[s->n].name = full;
  s->slot[s->n].shape = shape;
  s->slot[s->n++].data = data;
}

static void exf__slots_free(exf__slots *s) {
  size_t i;
  for (i = 0; s->slot && i < s->n; i++) exf__free(s->ctx, s->slot[i].name);
  exf__free(s->ctx, s->slot);
}

static exf_status exf__slot_match(exf__slots *s, exf__slot *slot, const exf_st *st) {
  const exf_st_entry *e = exf_st_find(st, slot->name);
  exf_shape have = exf_shape0();
  int i;
  if (!e)
    return exf_fail(s->ctx, EXF_MISMATCH, "load: tensor '%s' is missing from the file: "
                    "is it of another configuration?", slot->name);
  have.n = EXF__MIN(e->n_dims, EXF_MAX_DIMS);
  for (i = 0; i < have.n; i++) have.dim[i] = e->dim[i];
  if (e->n_dims != slot->shape->n || !exf__same(&have, slot->shape))
    return exf_fail(s->ctx, EXF_MISMATCH, "load: tensor '%s' is %s in the file and %s in "
                    "the model", slot->name, exf__show(&have).s,
                    exf__show(slot->shape).s);
  if (strcmp(e->dtype, "F32") != 0 && strcmp(e->dtype, "F64") != 0
      && strcmp(e->dtype, "F16") != 0 && strcmp(e->dtype, "BF16") != 0)
    return exf_fail(s->ctx, EXF_MISMATCH, "load: tensor '%s' is of type %s; needs F32, "
                    "F64, F16 or BF16", slot->name, e->dtype);
  slot->entry = e;
  return EXF_OK;
}

static int exf__name_order(const void *a, const void *b) {
  return strcmp(((const exf__slot *)a)->name, ((const exf__slot *)b)->name);
}

static int exf__is_moment(const char *name) {
  return strncmp(name, "adamw.", 6) == 0 || strncmp(name, "sgd.m.", 6) == 0;
}

/* All names, shapes and types are checked before the first number is taken over. Other
   tensors in the file are refused, but for moments where they are not wanted. */
static exf_status exf__slots_load(exf__slots *s, const exf_st *st, int skip_moments) {
  exf_ctx *ctx = s->ctx;
  size_t i, k;
  for (i = 0; i < s->n && ctx->status == EXF_OK; i++)
    exf__slot_match(s, &s->slot[i], st);
  if (ctx->status != EXF_OK) return ctx->status;
  qsort(s->slot, s->n, sizeof *s->slot, exf__name_order);
  for (i = k = 0; i < st->n; i++) {
    const exf_st_entry *e = &st->order[i]->entry;
    if (k < s->n && s->slot[k].entry == e) k++;
    else if (!skip_moments || !exf__is_moment(e->name))
      return exf_fail(ctx, EXF_MISMATCH, "load: the file holds '%.80s', which the model "
                      "does not have", e->name);
  }
  for (i = 0; i < s->n; i++)
    if (s->slot[i].data)
      exf_st_read(ctx, s->slot[i].entry, s->slot[i].data,
                  exf__shape_size(s->slot[i].shape));
  return ctx->status;
}

EXF_API exf_status exf_model_load(exf_model *model, const exf_st *st) {
  exf_ctx *ctx;
  exf__slots s;
  exf__alias *a;
  size_t i, n_aliases = 0;
  if (!model || !st) return EXF_ARG;
  ctx = model->ctx;
  if (ctx->status != EXF_OK) return ctx->status;
  for (a = model->aliases; a; a = a->next) n_aliases++;
  if (!exf__slots_start(&s, ctx, model->n_params + n_aliases)) return ctx->status;
  for (i = 0; i < model->n_params; i++) {
    exf_param *p = model->params[i];
    if (p->role != EXF__PLAIN)
      exf_fail(ctx, EXF_STATE, "load: '%s' belongs to experts: load into a dense model, "
               "then upcycle", p->name);
    exf__slots_add(&s, "", p->name, "", &p->t.shape, p->t.data);
  }
  for (a = model->aliases; a && ctx->status == EXF_OK; a = a->next) {
    const exf_st_entry *one = exf_st_find(st, a->target);
    const exf_st_entry *two = exf_st_find(st, a->name);
    const exf_param *p = exf_model_find(model, a->target);
    if (!two || !p) continue;
    if (one && (one->bytes != two->bytes
                || memcmp(one->data, two->data, one->bytes) != 0))
      exf_fail(ctx, EXF_MISMATCH, "load: '%s' and '%s' are one parameter and must be "
               "equal", a->target, a->name);
    exf__slots_add(&s, "", a->name, "", &p->t.shape, NULL);
  }
  if (ctx->status == EXF_OK) exf__slots_load(&s, st, 0);
  exf__slots_free(&s);
  for (i = 0; ctx->status == EXF_OK && i < model->n_ffns; i++)
    model->ffns[i]->trained = 1;
  return ctx->status;
}

/* Everything a checkpoint holds: parameters, moments, banks. */
static int exf__checkpoint_slots(exf__slots *s, exf_model *model, const exf_optim *o) {
  int moments = o != NULL;
  size_t i;
  s->slot = NULL;
  if (moments && o->model != model) {
    exf_fail(model->ctx, EXF_ARG, "checkpoint: the optimizer is another model's");
    return 0;
  }
  for (i = 0; moments && i < model->n_params; i++)
    if (!exf__optim_knows(o, model->params[i])) return 0;
  if (!exf__slots_start(s, model->ctx, 3 * model->n_params + model->n_ffns)) return 0;
  for (i = 0; i < model->n_params; i++) {
    exf_param *p = model->params[i];
    exf__slots_add(s, "", p->name, "", &p->t.shape, p->t.data);
    if (moments && p->m)
      exf__slots_add(s, p->v ? "adamw.m." : "sgd.m.", p->name, "", &p->moments, p->m);
    if (moments && p->v) exf__slots_add(s, "adamw.v.", p->name, "", &p->moments, p->v);
  }
  for (i = 0; i < model->n_ffns; i++) {
    exf_ffn *f = model->ffns[i];
    if (f->fusion.variant == EXF_MB)
      exf__slots_add(s, "", f->name, ".bank", &f->bank.shape, f->bank.data);
  }
  return model->ctx->status == EXF_OK;
}

#define EXF__UPDATES "exf.updates"
#define EXF__FUSION_KEY "exf.fusion"

/* What tensors do not tell of the FFNs: "12 x dw softmax 4, 1 x dense". The caller frees
   it. */
static char *exf__fusion_text(const exf_model *m) {
  size_t room = 80 * m->n_ffns + 1, at = 0, i, next;
  char *text = (char *)exf__alloc(m->ctx, room);
  if (!text) return NULL;
  text[0] = '\0';
  for (i = 0; i < m->n_ffns; i = next) {
    const exf_fusion_desc *a = &m->ffns[i]->fusion, *b;
    for (next = i + 1; next < m->n_ffns; next++) {
      b = &m->ffns[next]->fusion;
      if (a->variant != b->variant || a->n_experts != b->n_experts || a->lean != b->lean
          || (a->variant == EXF_DW && a->dw_softmax != b->dw_softmax))
        break;
    }
    at += (size_t)snprintf(text + at, room - at, "%s%zu x %s", i ? ", " : "", next - i,
                           exf_variant_name(a->variant));
    if (a->variant == EXF_DENSE) continue;
    at += (size_t)snprintf(text + at, room - at, "%s%s %zu",
                           a->variant == EXF_DW && a->dw_softmax ? " softmax" : "",
                           a->lean ? " lean" : "", a->lean ? a->lean : a->n_experts);
  }
  return text;
}

EXF_API exf_status exf_checkpoint_save(exf_model *model, const exf_optim *optim,
                                       const char *path, const exf_pair *meta,
                                       size_t n_meta) {
  exf_ctx *ctx;
  exf__slots s;
  exf_st_item *items;
  exf_pair *pairs, extra[2];
  char updates[32], *fusion;
  size_t i, n_pairs;
  if (!model) return EXF_ARG;
  ctx = model->ctx;
  if (ctx->status != EXF_OK) return ctx->status;
  snprintf(updates, sizeof updates, "%llu", (unsigned long long)exf_optim_steps(optim));
  fusion = exf__fusion_text(model);
  extra[0].key = EXF__FUSION_KEY;
  extra[0].value = fusion;
  extra[1].key = EXF__UPDATES;
  extra[1].value = updates;
  if (exf__checkpoint_slots(&s, model, optim)) {
    items = (exf_st_item *)exf__alloc_n(ctx, s.n, sizeof *items);
    pairs = exf__meta_join(ctx, meta, n_meta, extra, optim ? 2 : 1, &n_pairs);
    for (i = 0; items && i < s.n; i++) {
      items[i].name = s.slot[i].name;
      items[i].shape = *s.slot[i].shape;
      items[i].data = s.slot[i].data;
    }
    if (items && pairs) exf_st_save(ctx, path, items, s.n, pairs, n_pairs);
    exf__free(ctx, items);
    exf__free(ctx, pairs);
  }
  exf__free(ctx, fusion);
  exf__slots_free(&s);
  return ctx->status;
}

static int exf__parse_u64(const char *s, uint64_t *out) {
  uint64_t v = 0;
  if (!s || !*s) return 0;
  for (; *s; s++) {
    if (*s < '0' || *s > '9' || v > (UINT64_MAX - 9) / 10) return 0;
    v = v * 10 + (uint64_t)(*s - '0');
  }
  *out = v;
  return 1;
}

EXF_API exf_status exf_checkpoint_load(exf_model *model, exf_optim *optim,
                                       const exf_st *st) {
  exf_ctx *ctx;
  exf__slots s;
  uint64_t updates = 0;
  const char *stored;
  char *fusion;
  size_t i;
  if (!model || !st) return EXF_ARG;
  ctx = model->ctx;
  if (ctx->status != EXF_OK) return ctx->status;
  if (optim && !exf__parse_u64(exf_st_meta(st, EXF__UPDATES), &updates))
    return exf_fail(ctx, EXF_MISMATCH, "load: the file has no update count (%s): it is "
                    "not a training checkpoint", EXF__UPDATES);
  stored = exf_st_meta(st, EXF__FUSION_KEY);
  fusion = exf__fusion_text(model);
  if (fusion && stored && strcmp(stored, fusion) != 0)
    exf_fail(ctx, EXF_MISMATCH, "load: the checkpoint's FFNs are '%.80s', the model's "
             "'%.80s'", stored, fusion);
  exf__free(ctx, fusion);
  if (ctx->status != EXF_OK) return ctx->status;
  if (exf__checkpoint_slots(&s, model, optim)
      && exf__slots_load(&s, st, !optim) == EXF_OK && optim)
    optim->t = updates;
  exf__slots_free(&s);
  if (ctx->status == EXF_OK) exf_model_zero_grad(model);
  for (i = 0; ctx->status == EXF_OK && i < model->n_ffns; i++)
    model->ffns[i]->trained = 1;
  return ctx->status;
}

/* ---- end ------------------------------------------------------------------------- */

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

#ifdef __cplusplus
}
#endif
#endif /* EXF__INSTANCE */
#endif /* EXF__IMPLEMENTED */
#endif /* EXFUSION_IMPLEMENTATION */

/* ==== D. LICENCE AND RELEASES ==============================================

   exfusion.h and everything beside it is available under two licences: choose whichever
   you prefer.

   ------------------------------------------------------------------------------
   ALTERNATIVE A - MIT No Attribution (MIT-0)

   Copyright (c) the exfusion.h authors

   Permission is hereby granted, free of charge, to any person obtaining a copy of this
   software and associated documentation files (the "Software"), to deal in the Software
   without restriction, including without limitation the rights to use, copy, modify,
   merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
   permit persons to whom the Software is furnished to do so.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,
   INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A
   PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT
   HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
   CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR
   THE USE OR OTHER DEALINGS IN THE SOFTWARE.

   ------------------------------------------------------------------------------
   ALTERNATIVE B - Public Domain (www.unlicense.org)

   This is free and unencumbered software released into the public domain.

   Anyone is free to copy, modify, publish, use, compile, sell, or distribute this
   software, either in source code form or as a compiled binary, for any purpose,
   commercial or non-commercial, and by any means.

   In jurisdictions that recognize copyright laws, the author or authors of this
   software dedicate any and all copyright interest in the software to the public
   domain. We make this dedication for the benefit of the public at large and to the
   detriment of our heirs and successors. We intend this dedication to be an overt act of
   relinquishment in perpetuity of all present and future rights to this software under
   copyright law.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,
   INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A
   PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS BE LIABLE FOR ANY
   CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE,
   ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN
   THE SOFTWARE.

   For more information, please refer to <https://unlicense.org>

   0.1.0  2026-11  tensors, tape, modules, ExFusion FFNs, optimizers, safetensors */
