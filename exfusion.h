/* exfusion.h - version 0.2.0 - Transformers with ExFusion FFNs, in one C file

   Tensors, reverse-mode autodiff, Transformer modules, optimizers and safetensors, to
   train FFNs as N experts fused into one (ExFusion) and to merge them into an ordinary
   dense model.

   LICENCE: MIT-0 or public domain, whichever you prefer (LICENSE has both). No warranty.

   ---- DO THIS ---------------------------------------------------------- >>do_this
   In ONE C or C++ file, before the include (everywhere else the include alone):

    #define EXFUSION_IMPLEMENTATION
    #include "exfusion.h"

   and compile with `cc -O2 program.c -lm`, or with -fopenmp as well: all processors, the
   same results. C99 or C++11 and later; libc and libm are all it needs. No -march flag:
   the fast kernels are chosen when a context is made. The smallest complete program:

    #include <stdio.h>
    #define EXFUSION_IMPLEMENTATION
    #include "exfusion.h"

    int main(void) {
      const exf_real numbers[] = {1, 2, 3};
      exf_ctx *ctx = exf_ctx_new(NULL);
      exf_tensor *x = exf_tensor_new(ctx, exf_shape1(3), numbers);
      exf_grad_keep(ctx, x);                      // a leaf that wants a gradient
      exf_tensor *loss = exf_sum(ctx, exf_square(ctx, x), EXF_ALL_AXES, 0);
      exf_backward(ctx, loss);                    // dL/dx = 2 x
      if (exf_ctx_status(ctx) != EXF_OK) {        // one check for everything above
        fprintf(stderr, "%s\n", exf_error(ctx));
        return 1;
      }
      printf("L = %g\n", exf_item(loss));         // -> L = 14
      printf("dL/dx = %g %g %g\n",                // -> dL/dx = 2 4 6
             x->grad[0], x->grad[1], x->grad[2]);
      exf_ctx_free(ctx);
    }

   Settings are descriptors, in which zero means the default, as NULL does for the whole.
   C writes &(exf_optim_desc){.clip = 1} where one is used, C++11 a variable before it:
   exf_optim_desc adamw = {}; adamw.clip = 1;

   ---- WHAT IT DOES NOT DO ---------------------------------------------- >>does_not
   - No sparse mixture of experts: tokens are not routed, experts are not skipped. One
     fused FFN runs. (A rule of yours may do otherwise: >>rules.)
   - No promise of better models. What sw, dw and mb reduce to is said in >>algebra.
   - No GPU, no distributed training, no arithmetic below float: F16 and BF16 are read
     from files and converted.
   - No second derivatives, no graph compiler, no strided views: every tensor is
     contiguous, and exf_permute and exf_slice copy.
   - No convolution, recurrence, rotary positions, grouped queries, or attention mask
     other than causal.
   - No tokenizer and no models: examples/gpt.c, charlm.c and vit.c build a GPT and a
     Vision Transformer from the modules.
   - No export to other frameworks' folders: it reads and writes single safetensors files.
   - No exit, abort, print, environment variable or mutable global, ever.
   - No fast kernels on compilers other than GCC and Clang: they get the reference ones.

   ---- CONTENTS --------------------------------------------------------- >>contents
   Search for a tag to go there.
   A. Manual           >>do_this >>does_not >>contents >>tour >>rules >>method >>algebra
                       >>lifetimes >>errors >>threads >>options >>format >>add_op >>was_is
   B. Public API       >>api
        basics         >>status >>context >>rng >>tensor >>ops >>grad
        models         >>model >>modules >>exfusion >>block
        training       >>optim >>io
   C. Implementation   >>impl, each section uses only those above it
        kernels        >>platform >>kernels >>fast >>bodies
        ground         >>system >>memory >>threads_impl >>random >>text
        tensors, tape  >>tensor_impl >>model_impl >>tape >>backward
        ops            >>elementwise >>matmul >>row_ops >>lookup >>shape_ops >>sums
                       >>attention >>fuse >>custom >>table
        models         >>gradcheck >>layers
        ExFusion       >>exfusion_impl >>ffn >>upcycle >>diagnose >>block_impl
        optimizers     >>optim_impl >>schedule >>ema_impl
        files          >>save >>safetensors >>st-writer >>checkpoint

   ---- TEN-MINUTE TOUR -------------------------------------------------- >>tour
   Tensor -> loss -> backward -> step -> save. A line is fitted, saved and read back:

    #include <stdio.h>
    #define EXFUSION_IMPLEMENTATION
    #include "exfusion.h"

    int main(void) {
      exf_ctx *ctx = exf_ctx_new(NULL);
      exf_model *model = exf_model_new(ctx);      // owns parameters and layers
      exf_linear_desc desc = {1, 0};              // with a bias. This is C++, too
      exf_linear_layer *line = exf_linear_new(model, "line", 1, 1, &desc);
      exf_optim *optim = exf_optim_new(model, NULL);                    // AdamW
      exf_real x[8], y[8];
      for (int i = 0; i < 8; i++) {
        x[i] = (exf_real)i / 4;
        y[i] = 3 * x[i] - 1;
      }
      for (int step = 0; step < 1000; step++) {
        exf_tensor *in = exf_tensor_new(ctx, exf_shape2(8, 1), x);      // (8,1)
        exf_tensor *want = exf_tensor_new(ctx, exf_shape2(8, 1), y);    // (8,1)
        exf_tensor *out = exf_linear_forward(ctx, line, in);            // (8,1)
        exf_tensor *error = exf_square(ctx, exf_sub(ctx, out, want));
        exf_backward(ctx, exf_mean(ctx, error, EXF_ALL_AXES, 0));
        exf_optim_step(optim, 0.05, NULL);
        exf_rewind(ctx);                          // ends the life of in, want, out ...
      }
      exf_model_save(model, "line.safetensors", NULL, 0);
      exf_model_load(model, "line.safetensors");  // or into another of the same names
      fputs(exf_error(ctx), stderr);              // "" when nothing went wrong
      if (line) printf("y = %.2f x - 1\n", line->weight->data[0]);  // -> y = 3.00 x - 1
      exf_optim_free(optim);
      exf_model_free(model);
      exf_ctx_free(ctx);
    }

   A language model of one Transformer block, its FFN four experts with a memory bank,
   learns a cycle of tokens and is merged:

    #include <stdio.h>
    #include <string.h>
    #define EXFUSION_IMPLEMENTATION
    #include "exfusion.h"

    enum { V = 7, C = 32, B = 4, T = 8 };         // tokens, width, batch, positions

    typedef struct gpt { exf_tensor *wte, *wpe; exf_block *block; } gpt;

    // ids (B,T) -> (B,T,V), with wte (V,C) and wpe (T,C)
    static exf_tensor *logits(exf_ctx *ctx, const gpt *g, const int32_t *ids) {
      exf_tensor *x = exf_add(ctx, exf_embedding(ctx, g->wte, ids, B, T), g->wpe);
      x = exf_block_forward(ctx, g->block, x, NULL);        // (B,T,C)
      return exf_linear(ctx, x, g->wte, NULL);    // the head is the embedding again
    }

    int main(void) {
      exf_ctx *ctx = exf_ctx_new(NULL);
      exf_model *model = exf_model_new(ctx);
      gpt g;
      g.wte = exf_embedding_new(model, "wte", V, C, 0.02);
      g.wpe = exf_embedding_new(model, "wpe", T, C, 0.02);
      g.block = exf_block_new(model, "h.0", &(exf_block_desc){
        .width = C, .n_heads = 4, .causal = 1,
        .ffn.fusion.variant = EXF_MB});           // 4 experts and mu 0.95 by default
      exf_optim *optim = exf_optim_new(model, &(exf_optim_desc){
        .weight_decay = 0.1, .clip = 1});
      int32_t ids[B * T], next[B * T];
      double loss = 0;
      exf_training_set(ctx, 1);                   // routers are asked, banks follow
      for (int step = 0; step < 150; step++) {
        exf_step_begin(ctx, (uint64_t)step);      // keys dropout, if there is any
        for (int i = 0; i < B * T; i++) {         // 0 3 6 2 5 1 4 0 ..., from anywhere
          ids[i] = i % T ? next[i - 1] : (step + i / T) % V;
          next[i] = (ids[i] + 3) % V;
        }
        exf_tensor *y = exf_cross_entropy(ctx, logits(ctx, &g, ids), next, 0);
        loss = exf_item(y);
        exf_backward(ctx, y);
        exf_optim_step(optim, 5e-3, NULL);        // experts, router; then M <- a
        exf_rewind(ctx);
      }
      exf_training_set(ctx, 0);                   // evaluation fuses with the bank M
      printf("learnt: %d\n", loss < 0.05);        // -> learnt: 1
      exf_grad_set(ctx, 0);                       // no-grad: inference without a tape
      exf_tensor *fused = logits(ctx, &g, ids);
      int n_train = (int)exf_model_count(model);
      exf_optim_free(optim);                      // its moments are the experts'
      exf_model_merge(model);                     // for good: an ordinary dense FFN
      exf_tensor *merged = logits(ctx, &g, ids);
      printf("same bits: %d\n", merged && !memcmp(fused->data, merged->data,
             merged->size * sizeof(exf_real)));   // -> same bits: 1
      printf("parameters: %d, merged %d\n",       // -> parameters: 37540, merged 12832
             n_train, (int)exf_model_count(model));
      fputs(exf_error(ctx), stderr);
      exf_model_free(model);
      exf_ctx_free(ctx);
    }

   From here: examples/hello.c, then gpt.c, the whole loop in 150 lines to be copied, then
   charlm.c and vit.c, whole training programs with checkpoints, exact resuming,
   generation and pictures; >>api has every function and its formula. There are also
   ops         exf_div, exf_neg, exf_exp, exf_log, exf_sqrt, exf_tanh, exf_relu, exf_gelu,
               exf_gelu_tanh, exf_silu, exf_layernorm, exf_rmsnorm, exf_fuse, exf_detach
   parameters  exf_model_n_params, exf_model_param, exf_model_find, exf_param_freeze,
               exf_optim_group, exf_optim_steps; exf_gradcheck checks the gradients of all
   others      exf_st_open_memory, exf_st_read, exf_st_save, exf_rng_normal, exf_param_set

   ---- A FUSION RULE OF YOUR OWN ---------------------------------------- >>rules
   sw, dw and mb are rules: a struct of functions that says how the experts of an FFN
   become one in this step (all of them stand in >>exfusion_impl). Yours goes into
   exf_fusion_desc.rule, and blocks, gradients, clipping, optimizers, merge, checkpoints
   and exf_ffn_diagnose work with it. Usually it gives weights: expert dropout,

    #include <stdio.h>
    #include <string.h>
    #define EXFUSION_IMPLEMENTATION
    #include "exfusion.h"

    // An expert sits out with probability 1/4; all others are equal, as in evaluation.
    static exf_tensor *weights(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x, int train) {
      exf_tensor *a = exf_ones(ctx, exf_shape1(f->fusion.n_experts));
      (void)x;                                    // (..,C): what a router would read
      if (train) a = exf_dropout(ctx, a, 0.25);   // 0 or 4/3
      return exf_softmax(ctx, exf_log(ctx, a));   // divided by their sum
    }

    int main(void) {
      const exf_rule rule = {.name = "dropout", .weights = weights};
      const exf_real in[] = {0, 0, 0, 1, 1, 0, 1, 1};       // (4,2)
      exf_ctx *ctx = exf_ctx_new(NULL);
      exf_model *model = exf_model_new(ctx);
      exf_ffn *ffn = exf_ffn_new(model, "mlp", &(exf_ffn_desc){
        .width = 2, .hidden = 16, .bias = 1, .fusion.rule = &rule});
      exf_optim *optim = exf_optim_new(model, NULL);
      exf_training_set(ctx, 1);
      for (int step = 0; step < 500; step++) {    // learns to return what it is given
        exf_tensor *x = exf_tensor_new(ctx, exf_shape2(4, 2), in);
        exf_step_begin(ctx, (uint64_t)step);      // other experts in every step
        exf_tensor *error = exf_sub(ctx, exf_ffn_forward(ctx, ffn, x), x);
        exf_backward(ctx, exf_mean(ctx, exf_square(ctx, error), EXF_ALL_AXES, 0));
        exf_optim_step(optim, 0.01, NULL);
        exf_rewind(ctx);
      }
      exf_training_set(ctx, 0), exf_grad_set(ctx, 0);
      exf_optim_free(optim);
      exf_tensor *x = exf_tensor_new(ctx, exf_shape2(4, 2), in);
      exf_tensor *y = exf_ffn_forward(ctx, ffn, x);
      exf_ffn_merge(ffn);
      exf_tensor *z = exf_ffn_forward(ctx, ffn, x);
      fputs(exf_error(ctx), stderr);
      if (y && z) printf("1 -> %.1f, same bits: %d\n",      // -> 1 -> 1.0, same bits: 1
                         z->data[3], !memcmp(y->data, z->data, sizeof in));
      exf_model_free(model);
      exf_ctx_free(ctx);
    }

   What a rule learns or keeps, its init makes by exf_ffn_param; exf_ffn_tensor finds it,
   and step may change it after an update, as mb its bank. Instead of weights there may be
   - fuse, for one tensor of the FFN at a time, of any form. A weight per output row, s
     (N,h,1) for the experts e (N,h,C) of W1, (N,C,1) for W2, (N,h) and (N,C) for biases,
     is exf_sum(ctx, exf_mul(ctx, s, e), EXF_AXIS(0), 0). Every expert then has a gradient
     of its own, N times the memory of the shared one.
   - forward, the FFN's output itself: a sparse mixture takes the rows of each expert by
     exf_gather and runs it by exf_ffn_apply. It cannot be merged: files keep the experts.

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
       independent        fresh draws times sqrt(N), which fuse to a set distributed as a
                          dense init: the default from scratch
       independent-plain  fresh draws: the fused set starts 1/sqrt(N) smaller
       copy               N copies, which never separate
       drop               copies, some hidden units (row of W1, b1, column of W2) redrawn
   One can merge at any step, go on training dense, and upcycle again.

   Cost: training holds N times the FFN parameters and N times their optimizer moments,
   or one pair of moments per FFN (exf_optim_desc.shared_moments); the merged model is
   exactly dense. Beside the FFN's 3 P T multiply-adds (P parameters) fuse and <G, th_i>
   take 2 N P, 2N/(3T) of it. They are bound by memory: per dense FFN parameter fuse moves
   N+1 floats, the dots N+1, AdamW 6N+1, with shared moments 2N+5.

   ---- WHAT THE ALGEBRA SAYS -------------------------------------------- >>algebra
   1. Adam divides the scale out. For constant positive a every expert takes the same
      step whatever a_i is, up to eps, which acts as eps / a_i. So sw under AdamW is dense
      AdamW from the experts' mean with N eps, for ever; under SGD it is dense SGD at lr/N
      with N times the coupled decay. sw is a control, not a gain: a dense FFN with
      exf_optim_desc.eps = N 1e-8 (for all parameters; it hardly counts) trains the same.
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
   gradient counts from exf_backward to exf_optim_step, which uses it up; further passes
   before that add to it, exf_model_zero_grad drops it. exf_backward uses up the tape, and
   with it every graph recorded so far: one call per forward pass.
   Upcycling and merging an FFN end the life of its parameters: every exf_param and
   exf_tensor pointer to them, their gradients and moments, and graphs that hold them:
   call exf_rewind first. exf_ffn, exf_block and all other parameters stay. Make the
   optimizer anew: all its moments restart at zero. An exf_ema, of dense shapes, goes on.
   A key/value cache (exf_kv) lives from step to step: each attention of a pass adds its
   positions, the last one makes them count, exf_kv_reset forgets them.
   Ids and labels are copied. An exf_rule must outlive its FFN, an exf_custom_desc's data
   its backward. Free optimizers and averages before the model, all before the context.

   ---- ERRORS ----------------------------------------------------------- >>errors
   A context keeps the first error, and nothing is computed after it. A failed call
   returns NULL or a status; NULL given to an op is passed on, and exf_item(NULL) is NaN.
   So build, run, and check once per step. The message is one line that names the thing,
   the rule and often the remedy; exf_fail makes one of yours.

    #include <stdio.h>
    #define EXFUSION_IMPLEMENTATION
    #include "exfusion.h"

    int main(void) {
      exf_ctx *ctx = exf_ctx_new(NULL);
      exf_tensor *a = exf_tensor_new(ctx, exf_shape2(2, 3), NULL);
      exf_tensor *b = exf_matmul(ctx, a, a, 0);           // (2,3) (2,3): refused
      exf_tensor *c = exf_softmax(ctx, exf_add(ctx, b, a));
      printf("%d\n", c == NULL);                          // -> 1
      printf("%s\n", exf_status_name(exf_ctx_status(ctx)));  // -> EXF_SHAPE
      // -> matmul: (2,3) and (2,3): the inner axes differ
      printf("%s\n", exf_error(ctx));
      exf_error_clear(ctx);                               // and it can be used again
      exf_ctx_free(ctx);
    }

   A loss that is not finite is EXF_NUMERIC and names the op it came from; gradients that
   are not finite are EXF_NUMERIC in exf_optim_step, and nothing was updated. Memory that
   runs out is EXF_MEMORY. Saving leaves the old file or the new one. Loading names the
   file in every message, and compares all names and shapes before it changes a number.

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
   EXF_ALLOW_FAST_MATH      refused        accepts -ffast-math: bits may vary      one
   EXF_HEADER_NAME          "exfusion.h"   this file's name: it includes itself    one

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
       F.bank                         [N]   mb: M; a rule's own: F.NAME
       metadata exf.updates           updates made, for Adam's bias correction
       metadata exf.fusion            the FFNs, in order: 12 x dw softmax 4, 1 x dense

   Other metadata are the program's; charlm writes exf.version, exf.task, exf.seed,
   exf.step, exf.vocab (a JSON list of byte values) and exf.config: in a model a JSON text
   (n_layer, n_head, n_embd, block_size, vocab_size, bias, activation), in a checkpoint
   the run's flags, a line each, with exf.data, size and hash of the data.

   ---- HOW TO ADD AN OP ------------------------------------------------- >>add_op
   For research exf_custom may be enough. What works on numbers one by one is a line in
   the list EXF__FORMULAS, >>elementwise, and a row behind EXF__UNARY(sigmoid); then go on
   with 5, since 1 to 4 are for all other ops:
       static exf_real exf__softplus(exf_real x) {
         return EXF__MAX(x, 0) + exf__log(1 + exf__exp(-EXF__FABS(x)));
       }
       X(softplus, exf__softplus(a), dy / (1 + exf__exp(-a)), 0, 0)
       EXF__UNARY(softplus)
   The line has y and what is added to the gradients of a, b, c, in terms of a, b, c, y,
   dy and functions like that one, above the list; no comma outside of parentheses. Let it
   hold for every finite number: exf__exp ends at 0 and at infinity.
   1. exf__foo_shape(ctx, n, out) checks n->in[i]->shape and n->arg; it writes *out and
      returns 1, or returns exf__bad_shape(ctx, n, "the rule").
   2. exf__foo_forward(ctx, n) fills all of n->out->data. What backward cannot cheaply
      recompute goes to n->saved, from exf__arena. Long loops are kernels over a range of
      the output (EXF__KERNEL), which exf__parallel splits.
   3. exf__foo_backward(ctx, n), beside it: for each input, g = exf__grad(ctx, n->in[i],
      &acc); NULL means not wanted; acc means add to g, otherwise overwrite it. The
      gradient of the result is exf__dout(n).
   4. EXF__OP(foo, exf__foo_shape, exf__foo, 0) behind them makes the row and exf_foo;
      with other arguments EXF__ROW, and an exf_foo that hands an exf__arg to exf__run.
   5. X(foo) in EXF__OPS, >>table; exf_foo declared in >>ops with its formula.
   6. recipe_foo in tests/test_ops.c: P makes parameters, W adds a result to the loss. The
      tests do not compile without it.

   ---- WAS, IS ---------------------------------------------------------- >>was_is
   From 0.1.0 to 0.2.0; files stay as they were, and so does every bit of a result.
     exf_isa_set, exf_isa_get                exf_desc.isa, exf_ctx_desc(ctx).isa
     exf_threads_get, exf_seed_get           exf_ctx_desc(ctx).n_threads, .seed
     exf_shape5                              exf_shape s = {5, {a, b, c, d, e}};
     exf_matmul(.., ta, tb)                  .., EXF_TRANSPOSE_A + EXF_TRANSPOSE_B)
     exf_attention(.., n_heads, causal)      .., &(exf_attention_desc){n_heads, causal})
     exf_attn_forward(..), _block_forward    .., NULL), or the cache
     exf_attention_cached, exf_block_cached  exf_attention_desc.cache, exf_block_forward
     exf_kv_advance                          gone: the cache counts whole passes itself
     exf_linear_new(.., bias, std)           .., &(exf_linear_desc){bias, std})
     exf_layernorm_new, exf_rmsnorm_new      exf_norm_new(.., &(exf_norm_desc){.rms ..})
     exf_attn_new(.., width, heads ..)       .., &(exf_attn_desc){width, heads ..})
     exf_param_name, _tensor, _decays        param->name, &param->tensor, param->decay
     exf_ffn_name, exf_ffn_fusion            ffn->name, ffn->fusion
     exf_model_ctx                           gone: the context that made the model
     exf_act_name, exf_upcycle_name          EXF_ACT_LIST, EXF_UPCYCLE_LIST
     a negative number instead of 0          EXF_ZERO: mu, spread, drop, beta1, beta2
     exf_fusion_desc.lean                    gone: dense with N eps, see >>algebra, 1
     exf_model_load(.., st)                  by path, or exf_model_load_st
     exf_checkpoint_load(.., st)             by path, or exf_checkpoint_load_st
   New: >>rules, exf_full, exf_ones, exf_where, exf_abs, exf_clamp, exf_sigmoid, exf_max,
   exf_argmax, exf_gather, exf_sample, exf_rng_permutation, exf_shape_make, and more. */
/* ==== B. PUBLIC API ======================================================== >>api */
#ifndef EXFUSION_H
#define EXFUSION_H


#define EXF_VERSION_MAJOR 0
#define EXF_VERSION_MINOR 2
#define EXF_VERSION_PATCH 0
#define EXF_VERSION "0.2.0"

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

/* Descriptors: a member of zero, and NULL in place of a whole descriptor, mean the
   default in its comment. Where zero itself makes sense, EXF_ZERO asks for it:
   mu = EXF_ZERO. */
#define EXF_ZERO (-1)

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

/* Instruction sets of the kernels. EXF_ISA_REF is plain C, which specifies the others;
   all but SSE2 (which has no fused multiply-add) give the same bits. */
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
   state. Returns NULL when memory runs out. An instruction set that this processor or
   build lacks is EXF_ARG, to be read from exf_ctx_status. */
EXF_API exf_ctx *exf_ctx_new(const exf_desc *desc);
EXF_API void exf_ctx_free(exf_ctx *ctx);          /* NULL is fine; free models first */
EXF_API exf_desc exf_ctx_desc(const exf_ctx *ctx); /* n_threads and isa resolved */
EXF_API exf_status exf_ctx_status(const exf_ctx *ctx); /* of the first error, or EXF_OK */
EXF_API const char *exf_error(const exf_ctx *ctx);     /* its message, or "" */
EXF_API void exf_error_clear(exf_ctx *ctx);
/* Your own error, as an op of the library would report it. Returns status. */
EXF_API exf_status exf_fail(exf_ctx *ctx, exf_status status, const char *format, ...);
EXF_API exf_stats exf_ctx_stats(const exf_ctx *ctx);
EXF_API const char *exf_isa_name(exf_isa isa);    /* "avx2" ... */

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
/* Fills order (n) with a permutation of 0 .. n-1 (Fisher and Yates). */
EXF_API void exf_rng_permutation(uint64_t seed, uint32_t stream, uint32_t step,
                                 size_t *order, size_t n);

/* ---- tensors -------------------------------------------------------- >>tensor */

#define EXF_MAX_DIMS 6
typedef struct exf_shape {
  int n;                     /* number of axes; 0 is a scalar */
  size_t dim[EXF_MAX_DIMS];
} exf_shape;
EXF_API exf_shape exf_shape_make(int n, size_t a, size_t b, size_t c, size_t d);
#define exf_shape0() exf_shape_make(0, 0, 0, 0, 0)
#define exf_shape1(a) exf_shape_make(1, a, 0, 0, 0)
#define exf_shape2(a, b) exf_shape_make(2, a, b, 0, 0)
#define exf_shape3(a, b, c) exf_shape_make(3, a, b, c, 0)
#define exf_shape4(a, b, c, d) exf_shape_make(4, a, b, c, d)


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
EXF_API exf_tensor *exf_full(exf_ctx *ctx, exf_shape shape, double value);
#define exf_ones(ctx, shape) exf_full(ctx, shape, 1)
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
/* a where mask is not 0, else b; no gradient reaches the mask. A masked fill is
   exf_where(ctx, mask, exf_full(ctx, exf_shape0(), value), x). */
EXF_API exf_tensor *exf_where(exf_ctx *ctx, exf_tensor *mask, exf_tensor *a,
                              exf_tensor *b);

/* Elementwise on one tensor. */
EXF_API exf_tensor *exf_scale(exf_ctx *ctx, exf_tensor *x, double s);     /* s x */
EXF_API exf_tensor *exf_neg(exf_ctx *ctx, exf_tensor *x);                 /* -x */
EXF_API exf_tensor *exf_exp(exf_ctx *ctx, exf_tensor *x);
EXF_API exf_tensor *exf_log(exf_ctx *ctx, exf_tensor *x);
EXF_API exf_tensor *exf_sqrt(exf_ctx *ctx, exf_tensor *x);
EXF_API exf_tensor *exf_square(exf_ctx *ctx, exf_tensor *x);
EXF_API exf_tensor *exf_abs(exf_ctx *ctx, exf_tensor *x);        /* slope 0 at 0 */
EXF_API exf_tensor *exf_clamp(exf_ctx *ctx, exf_tensor *x, double low, double high);
EXF_API exf_tensor *exf_tanh(exf_ctx *ctx, exf_tensor *x);
EXF_API exf_tensor *exf_sigmoid(exf_ctx *ctx, exf_tensor *x);    /* 1 / (1 + exp(-x)) */
EXF_API exf_tensor *exf_relu(exf_ctx *ctx, exf_tensor *x);       /* max(x, 0) */
EXF_API exf_tensor *exf_gelu(exf_ctx *ctx, exf_tensor *x);       /* x Phi(x), by erf */
EXF_API exf_tensor *exf_gelu_tanh(exf_ctx *ctx, exf_tensor *x);  /* GPT-2's form */
EXF_API exf_tensor *exf_silu(exf_ctx *ctx, exf_tensor *x);       /* x / (1 + exp(-x)) */

/* a (..,m,k) b (..,k,n) -> (..,m,n); EXF_TRANSPOSE_A, _B: that side is given transposed
   (flags may be added up). The leading axes are equal, or one side has none. */
enum { EXF_TRANSPOSE_A = 1, EXF_TRANSPOSE_B = 2 };
EXF_API exf_tensor *exf_matmul(exf_ctx *ctx, exf_tensor *a, exf_tensor *b, int flags);

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
/* Rows of x (R,..) by index, copied: ids (n) -> (n,..). A row may be taken repeatedly. */
EXF_API exf_tensor *exf_gather(exf_ctx *ctx, exf_tensor *x, const int32_t *ids, size_t n);

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
/* Over the axes whose bits are set; they vanish, or stay with size 1 (EXF_KEEP). */
#define EXF_KEEP 1
EXF_API exf_tensor *exf_sum(exf_ctx *ctx, exf_tensor *x, unsigned axes, int keep);
EXF_API exf_tensor *exf_mean(exf_ctx *ctx, exf_tensor *x, unsigned axes, int keep);
/* The gradient goes to the first of equal maxima. A NaN is the maximum. */
EXF_API exf_tensor *exf_max(exf_ctx *ctx, exf_tensor *x, unsigned axes, int keep);
/* Where the maximum of each row (last axis) is, the first of equal ones: x (..,n) ->
   one index per row, in the step arena. NULL on failure. */
EXF_API const int32_t *exf_argmax(exf_ctx *ctx, const exf_tensor *x);

/* Mean over the rows with label >= 0 of -sum_v q_v log softmax(logits)_v, with
   q = (1 - s) onehot(label) + s / V, s = label_smoothing. logits (..,V), one label per
   row, copied; negative labels are ignored; none left gives 0. -> scalar */
EXF_API exf_tensor *exf_cross_entropy(exf_ctx *ctx, exf_tensor *logits,
                                      const int32_t *labels, double label_smoothing);
/* Keys and values of the positions seen so far, for generation: one sequence, no-grad.
   Each of the n_layers attentions of a pass, always called in the same order, appends its
   new positions by itself. */
typedef struct exf_kv exf_kv;
EXF_API exf_kv *exf_kv_new(exf_ctx *ctx, size_t n_layers, size_t capacity, size_t width);
EXF_API void exf_kv_free(exf_kv *kv);
EXF_API void exf_kv_reset(exf_kv *kv);            /* forgets all positions */
EXF_API size_t exf_kv_length(const exf_kv *kv);   /* positions of whole passes */

typedef struct exf_attention_desc {
  size_t n_heads;            /* 0: 1 */
  int causal;                /* position t sees 0..t */
  exf_kv *cache;             /* causal: see the positions in it, then append: B = 1 */
} exf_attention_desc;
/* Multi-head self-attention. qkv (B,T,3C) = [Q | K | V], head h = columns
   h C/H .. (h+1) C/H - 1 of each -> softmax(Q K^T / sqrt(C/H)) V, heads side by side
   (B,T,C). Keeps two numbers per row for backward, never a (T,T) matrix. */
EXF_API exf_tensor *exf_attention(exf_ctx *ctx, exf_tensor *qkv,
                                  const exf_attention_desc *desc);


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

typedef struct exf_sample_desc {
  double temperature;        /* 0: 1; EXF_ZERO: the likeliest token */
  size_t top_k;              /* only the K likeliest can come; 0: all */
  double top_p;              /* of these the fewest that hold this share; 0: 1 */
  uint64_t seed;
} exf_sample_desc;
/* Draw number `index` of a token from softmax(logits / temperature), logits (..,V): the
   last row. The same seed and index draw the same. -1 on failure. */
EXF_API int32_t exf_sample(exf_ctx *ctx, const exf_tensor *logits,
                           const exf_sample_desc *desc, uint64_t index);

/* ---- gradients -------------------------------------------------------- >>grad */

/* Gradients of a scalar: added to what the parameters already hold (gradient
   accumulation). A loss that is NaN or infinite is EXF_NUMERIC and names the op it came
   from. Uses up the tape, with all other graphs on it. A failure on the way drops all
   gradients the models had gathered: begin the accumulation again. */
EXF_API exf_status exf_backward(exf_ctx *ctx, exf_tensor *loss);

/* ---- models: registries of parameters -------------------------------- >>model */

typedef struct exf_model exf_model;

typedef struct exf_param_desc {
  exf_shape shape;
  double init_std;      /* normal with this deviation; 0: the constant init_value */
  double init_value;
  int decay;            /* weight decay applies (matrices and embeddings) */
  int buffer;           /* exf_ffn_param: kept in checkpoints, but never trained */
} exf_param_desc;

typedef struct exf_param {       /* to be read; functions change it */
  const char *name;
  exf_tensor tensor;             /* experts of an FFN: (N, ..) */
  int decay;                     /* weight decay applies */
  int frozen;
  double init_std, init_value;
  exf_model *model;
  int kind;                      /* private, as all below */
  int has_grad;                  /* tensor.grad holds something: add to it */
  int trained;                   /* its values are no fresh draw */
  uint64_t id;                   /* of all parameters the model ever had */
  char *dense_name;              /* experts: the name of the merged parameter */
  struct exf__pool *pool;        /* experts: whose one gradient G they share, or NULL */
} exf_param;

EXF_API exf_model *exf_model_new(exf_ctx *ctx);
EXF_API void exf_model_free(exf_model *model);
/* A named parameter, initialised from the stream of its name. The tensor lives as long
   as the model (that of an FFN: until it is upcycled or merged). */
EXF_API exf_tensor *exf_param_new(exf_model *model, const char *name,
                                  const exf_param_desc *desc);
/* A second name under which merged files also hold a parameter (a tied head). */
EXF_API exf_status exf_param_alias(exf_model *model, const char *alias,
                                   const char *name);
/* Values, by row-major order; n must be the size of the tensor. */
EXF_API exf_status exf_param_set(exf_param *param, const exf_real *values, size_t n);
EXF_API void exf_param_freeze(exf_param *param, int frozen); /* no gradient, no update */
EXF_API size_t exf_model_n_params(const exf_model *model);       /* tensors */
EXF_API exf_param *exf_model_param(const exf_model *model, size_t i);
EXF_API exf_param *exf_model_find(const exf_model *model, const char *name);
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
   scalar; it is called again and again, between rewinds. A right gradient has worst below
   1e-6 in a build with EXF_DOUBLE; in float small gradients drown in rounding. */
EXF_API exf_status exf_gradcheck(exf_model *model,
                                 exf_tensor *(*loss)(exf_ctx *ctx, void *user),
                                 void *user, double h, exf_gradcheck_report *report);

/* ---- modules --------------------------------------------------------- >>modules */
/* Layers own parameters named "<name>.weight" and so on, and live as long as their
   model. */

typedef struct exf_linear_desc {
  int bias;
  double init_std;      /* of the weight; 0: 1/sqrt(in) */
} exf_linear_desc;
typedef struct exf_linear_layer {
  exf_tensor *weight;   /* (out,in) */
  exf_tensor *bias;     /* (out) or NULL */
} exf_linear_layer;
EXF_API exf_linear_layer *exf_linear_new(exf_model *model, const char *name, size_t in,
                                         size_t out, const exf_linear_desc *desc);
EXF_API exf_tensor *exf_linear_forward(exf_ctx *ctx, const exf_linear_layer *layer,
                                       exf_tensor *x);

typedef struct exf_norm_desc {
  int rms;              /* RMSNorm instead of LayerNorm: no mean, no bias */
  int bias;
  double eps;           /* 0: 1e-5 */
} exf_norm_desc;
typedef struct exf_norm_layer {
  exf_tensor *weight, *bias;  /* (width), bias may be NULL */
  double eps;
  int rms;
} exf_norm_layer;
EXF_API exf_norm_layer *exf_norm_new(exf_model *model, const char *name, size_t width,
                                     const exf_norm_desc *desc);
EXF_API exf_tensor *exf_norm_forward(exf_ctx *ctx, const exf_norm_layer *layer,
                                     exf_tensor *x);

/* "<name>.weight" (n,width); init_std 0: zeros */
EXF_API exf_tensor *exf_embedding_new(exf_model *model, const char *name, size_t n,
                                      size_t width, double init_std);

/* ---- ExFusion ------------------------------------------------------- >>exfusion */

/* EXF_RULE: a fusion rule of your own, exf_fusion_desc.rule */
typedef enum exf_variant { EXF_DENSE, EXF_SW, EXF_DW, EXF_MB, EXF_RULE } exf_variant;
EXF_API const char *exf_variant_name(exf_variant v);    /* "dense" ... */

#define EXF_UPCYCLE_LIST(X)                                                              \
  X(DEFAULT, "default")          /* independent from scratch, else zerosum */           \
  X(ZEROSUM, "zerosum")          /* th_0 + s (e_i - mean e): function preserving */     \
  X(INDEPENDENT, "independent")  /* fresh draws times sqrt(N) */                        \
  X(INDEPENDENT_PLAIN, "independent-plain")             /* fresh draws */               \
  X(COPY, "copy")                /* N copies: they never separate */                    \
  X(DROP, "drop")                /* copies; a share of hidden units drawn afresh */
typedef enum exf_upcycle {
#define EXF__X(name, text) EXF_UP_##name,
  EXF_UPCYCLE_LIST(EXF__X)
#undef EXF__X
  EXF_N_UPCYCLES
} exf_upcycle;

#define EXF_ACT_LIST(X)                                                                  \
  X(GELU, "gelu") X(GELU_TANH, "gelu_tanh") X(RELU, "relu") X(SILU, "silu")              \
  X(SWIGLU, "swiglu")  /* silu(x Wg^T + bg) * (x W1^T + b1): a third matrix */
typedef enum exf_act {
#define EXF__X(name, text) EXF_##name,
  EXF_ACT_LIST(EXF__X)
#undef EXF__X
  EXF_N_ACTS
} exf_act;

typedef struct exf_rule exf_rule;
typedef struct exf_fusion_desc {
  exf_variant variant;
  size_t n_experts;          /* N; 0: 4 */
  int dw_softmax;            /* dw: a = softmax(z / tau) instead of a itself */
  int routed;                /* mb: the forward pass uses the router alone */
  int attach;                /* mb: let the router's gradient reach x as well */
  double mu;                 /* mb: bank momentum; 0: 0.95, EXF_ZERO: 0 */
  double tau;                /* temperature; 0: 1 */
  exf_upcycle upcycle;
  double spread;             /* zerosum: s; 0: 1, EXF_ZERO: 0 */
  double drop;               /* drop: the share; 0: 0.5, EXF_ZERO: 0 */
  const exf_rule *rule;      /* not NULL: EXF_RULE; must outlive the FFN */
} exf_fusion_desc;

typedef struct exf_ffn_desc {
  size_t width, hidden;       /* C, required; hidden 0: 4 C */
  exf_act act;
  int bias;
  double init_std;            /* of W1 (and Wg); 0: 1/sqrt(width) */
  double init_std_out;        /* of W2; 0: 1/sqrt(hidden) */
  const char *up, *down, *gate; /* names; NULL: "c_fc", "c_proj", "c_gate" */
  exf_fusion_desc fusion;     /* all zero: an ordinary dense FFN */
} exf_ffn_desc;

/* The tensors of an FFN, h = hidden: W1 (h,C), b1 (h), W2 (C,h), b2 (C); SwiGLU also Wg
   (h,C), bg (h) */
typedef enum exf_part {
  EXF_W1, EXF_B1, EXF_W2, EXF_B2, EXF_WG, EXF_BG, EXF_N_PARTS
} exf_part;

typedef struct exf_ffn {          /* to be read; functions change it */
  const char *name;
  exf_model *model;
  exf_ffn_desc desc;              /* resolved */
  exf_fusion_desc fusion;         /* resolved; EXF_DENSE: no experts */
  exf_param *part[EXF_N_PARTS];   /* dense (..) or experts (N,..); NULL: not there */
  struct exf__ffn_state *state;   /* private */
} exf_ffn;

/* Where the fused parameters of an FFN come from. dense, sw, dw and mb are four such
   rules; yours goes into exf_fusion_desc.rule, and block, gradients, optimizer, merge,
   files and diagnosis work with it. Of weights, fuse and forward give one:
   weights  a (N) of this pass: th = sum_i a_i th_i. The experts' gradient is then a_i G,
            never stored. NULL for the function, or NULL without an error from it: 1/N.
   fuse     th of one part, of any form, from ffn->part[part]->tensor (N,..) by ops; the
            gradient of every expert is stored.
   forward  y (..,C) itself, x (..,C): for what cannot be merged, as a sparse mixture.
   training: 1 in training mode (and under exf_routing_set). With training 0 weights and
   fuse may use neither x, which may be NULL, nor chance: evaluation and merge call them
   with the same result, so merged logits equal evaluation logits bit for bit. */
struct exf_rule {
  const char *name;           /* "dropout": goes into checkpoints */
  void *user;
  /* While an FFN is upcycled: makes what the rule needs by exf_ffn_param. It is dense
     then: N stands in fusion, C and h in ffn->desc. May be NULL. */
  void (*init)(exf_ctx *ctx, exf_ffn *ffn, const exf_fusion_desc *fusion);
  exf_tensor *(*weights)(exf_ctx *ctx, const exf_ffn *ffn, exf_tensor *x, int training);
  exf_tensor *(*fuse)(exf_ctx *ctx, const exf_ffn *ffn, exf_part part, int training);
  exf_tensor *(*forward)(exf_ctx *ctx, const exf_ffn *ffn, exf_tensor *x, int training);
  /* After each update that a backward pass through the FFN led to. mean (N): of the
     weights of these passes; NULL for rules without weights. NULL: nothing */
  void (*step)(exf_ffn *ffn, const exf_real *mean);
};
/* A parameter "<ffn>.<name>" of a rule, or a buffer of constants kept in checkpoints; for
   init only. It goes when the FFN is merged. */
EXF_API exf_tensor *exf_ffn_param(exf_ffn *ffn, const char *name,
                                  const exf_param_desc *desc);
/* By the same short name; NULL when the rule has made no such thing. */
EXF_API exf_tensor *exf_ffn_tensor(const exf_ffn *ffn, const char *name);
/* act(x W1^T + b1) W2^T + b2 (..,C), or its SwiGLU form, with the parameters th */
EXF_API exf_tensor *exf_ffn_apply(exf_ctx *ctx, const exf_ffn *ffn, exf_tensor *x,
                                  exf_tensor *const th[EXF_N_PARTS]);

EXF_API exf_ffn *exf_ffn_new(exf_model *model, const char *name,
                             const exf_ffn_desc *desc);
/* x (..,C) -> (..,C): exf_ffn_apply with the fused parameters */
EXF_API exf_tensor *exf_ffn_forward(exf_ctx *ctx, const exf_ffn *ffn, exf_tensor *x);
/* To sw, dw, mb or a rule; of dense FFNs: one with experts is to be merged first. */
EXF_API exf_status exf_ffn_upcycle(exf_ffn *ffn, const exf_fusion_desc *desc);
EXF_API exf_status exf_ffn_merge(exf_ffn *ffn);     /* for good; a dense FFN: nothing */
EXF_API exf_status exf_model_upcycle(exf_model *model, const exf_fusion_desc *desc);
EXF_API exf_status exf_model_merge(exf_model *model);
EXF_API size_t exf_model_n_ffns(const exf_model *model);
EXF_API exf_ffn *exf_model_ffn(const exf_model *model, size_t i);
/* What is known of an FFN's fusion; each output (N) may be NULL. weights: those of
   evaluation and merge (rules without weights: 1/N). router: the last training output r
   (mb; else as weights). diversity: ||th_i - th|| / ||th||, th the fused set, of rules
   without weights the mean. Returns the effective number of experts
   (sum |a|)^2 / sum a^2; 1 for a dense FFN. */
EXF_API double exf_ffn_diagnose(const exf_ffn *ffn, double *weights, double *router,
                                double *diversity);

/* ---- attention layer, block ------------------------------------------ >>block */

typedef struct exf_attn_desc {
  size_t width, n_heads;         /* required; n_heads divides width */
  int causal, bias;
  double init_std;               /* of qkv; 0: 1/sqrt(width) */
  double init_std_out;           /* of proj; 0: 1/sqrt(width) */
} exf_attn_desc;
typedef struct exf_attn_layer {
  exf_linear_layer *qkv, *proj;  /* (3C,C), (C,C) */
  size_t n_heads;
  int causal;
} exf_attn_layer;
EXF_API exf_attn_layer *exf_attn_new(exf_model *model, const char *qkv_name,
                                     const char *proj_name, const exf_attn_desc *desc);
/* x (B,T,C) -> (B,T,C). cache: NULL, or for generation, see exf_kv */
EXF_API exf_tensor *exf_attn_forward(exf_ctx *ctx, const exf_attn_layer *layer,
                                     exf_tensor *x, exf_kv *cache);

typedef enum exf_names { EXF_NAMES_GPT2, EXF_NAMES_TIMM } exf_names;
typedef struct exf_block_desc {
  size_t width, n_heads; /* required */
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
EXF_API exf_block *exf_block_new(exf_model *model, const char *name,
                                 const exf_block_desc *desc);
/* x = x + attn(norm1(x)); x = x + ffn(norm2(x)) : (B,T,C) -> (B,T,C) */
EXF_API exf_tensor *exf_block_forward(exf_ctx *ctx, const exf_block *block,
                                      exf_tensor *x, exf_kv *cache);

/* ---- optimizers ------------------------------------------------------ >>optim */

typedef enum exf_optim_kind { EXF_ADAMW, EXF_SGD } exf_optim_kind;
typedef struct exf_optim_desc {
  exf_optim_kind kind;
  double beta1, beta2;   /* AdamW; 0: 0.9, 0.999; EXF_ZERO: 0 */
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

/* The merged, dense model, fused on the way out: the model itself is unchanged. An FFN
   whose rule cannot be merged keeps its experts. */
EXF_API exf_status exf_model_save(exf_model *model, const char *path,
                                  const exf_pair *meta, size_t n_meta);
/* Into a model whose FFNs are dense, or cannot be merged; every parameter must be there,
   and nothing else. */
EXF_API exf_status exf_model_load(exf_model *model, const char *path);
EXF_API exf_status exf_model_load_st(exf_model *model, const exf_st *st);
/* Everything training needs: parameters, moments, banks, update count; meta is yours
   (geometry, step, data position). Loading is all or nothing. */
EXF_API exf_status exf_checkpoint_save(exf_model *model, const exf_optim *optim,
                                       const char *path, const exf_pair *meta,
                                       size_t n_meta);
EXF_API exf_status exf_checkpoint_load(exf_model *model, exf_optim *optim,
                                       const char *path);
EXF_API exf_status exf_checkpoint_load_st(exf_model *model, exf_optim *optim,
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

/* What differs between compilers and processors, the arithmetic that is the same on all
   of them, and the block sizes that decide its bits. What is not obvious: a sum has a
   fixed order, with lanes and blocks of fixed lengths, whatever the width of a vector. */

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
#define EXF__QUERIES 32

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

/* ---- kernels ------------------------------------------------------- >>kernels */

/* Everything that computes, as one table of kernels per instruction set. A kernel gets
   its operands as one struct and computes a part of its output, on one thread; who calls
   it splits the output. acc means: add to the output instead of overwriting it (which
   then is never read).
   What is not obvious: a kernel is written once, on vectors of EXF__W numbers. With
   vectors of one number it is the reference, plain C, which specifies the others: every
   instruction set with fused multiply-add gives exactly its bits. */

/* Computes part begin .. end-1 of its output: elements, rows or columns of it. */
typedef void exf__kernel(const void *operands, size_t begin, size_t end, void *scratch);
#define EXF__KERNEL(name) \
  static void name(const void *operands, size_t begin, size_t end, void *scratch)
/* A copy, which no store of a result can change: its members stay in registers. */
#define EXF__OPERANDS(type, name)            \
  const type name = *(const type *)operands; \
  (void)scratch

#define EXF__UNARY_LIST(X) X(EXP) X(TANH) X(RELU) X(GELU) X(GELU_TANH) X(SILU)
typedef enum exf__unary_op {
#define EXF__X(name) EXF__U_##name,
  EXF__UNARY_LIST(EXF__X)
#undef EXF__X
} exf__unary_op;

/* Range: elements. op: an exf__unary_op */
typedef struct exf__elements {
  int op, acc;
  exf_real s;
  const exf_real *x, *b, *dy;
  exf_real *y, *dx;
} exf__elements;

/* Range: rows of n. Of cross-entropy: labels, loss and lse, a number per row, and g, the
   gradient of every row's loss */
typedef struct exf__rows {
  size_t n;
  int acc;
  const exf_real *x, *dy;
  exf_real *y, *dx;
  const int32_t *labels;
  exf_real smoothing, g, *loss, *lse;
} exf__rows;

/* x, y, dy, dx (rows,n); w, b, dw, db (n); mean, rstd (rows). Without its mean a row is
   only scaled (rms). b, dw, db may be NULL. */
typedef struct exf__norm {
  size_t rows, n;
  int rms;
  exf_real eps;
  const exf_real *x, *w, *b, *dy;
  exf_real *y, *mean, *rstd, *dx, *dw, *db;
  int acc, acc_w, acc_b;
} exf__norm;

/* Range: columns. x (rows,n), y (n) */
typedef struct exf__columns {
  size_t rows, n;
  int acc;
  const exf_real *x;
  exf_real *y;
} exf__columns;

/* C (m,n) = [C +] A (m,k) B (k,n) [+ bias (n)]. Element (i,p) of A is at
   a[i a_row + p a_col], likewise B; rows of C are contiguous and c_row apart. The range
   counts what split says: rows or columns of C, or matrices, a_batch, b_batch and c_batch
   apart. padded: rows of c go on to a multiple of 16, and hold anything past n. */
enum { EXF__BY_ROWS, EXF__BY_COLUMNS, EXF__BY_MATRIX };
typedef struct exf__gemm {
  int split;
  size_t m, n, k;
  const exf_real *a, *b, *bias;
  exf_real *c;
  size_t a_row, a_col, b_row, b_col, c_row, a_batch, b_batch, c_batch;
  int acc, padded;
} exf__gemm;

/* Attention takes EXF__QUERIES queries at a time and keeps their scores transposed,
   s and dp (nk, EXF__QUERIES): a column is a query, and its softmax needs no sum across a
   vector. Range: columns; those past it hold anything. When causal, query i sees the
   first len + i keys. m and inv by query: the maximum, 1 / sum (0 when nothing is
   finite). out, dout (queries,d): rows are stride apart. */
typedef struct exf__scores {
  size_t nk, len;
  int causal;
  exf_real scale, *s, *dp, *m, *inv;
  size_t d, stride;
  exf_real *out;
  const exf_real *dout;
} exf__scores;

/* e (n_experts,stride), of which size count; a, dots (n_experts); g, out (size) */
typedef struct exf__experts {
  size_t n_experts, size, stride;
  const exf_real *a, *e, *g;
  exf_real *out;
  double *dots;
} exf__experts;

/* Range: numbers of one expert. p, m, v (n_experts,stride), g = G (stride), scale
   (n_experts). The factors are rounded once, from double: clip of every gradient,
   decay = 1 - lr * weight decay, step = lr / (1 - beta1^t), inv_sqrt_bias2 =
   1 / sqrt(1 - beta2^t). */
typedef struct exf__adam {
  size_t n_experts, stride;
  exf_real *p, *m, *v;
  const exf_real *g, *scale;
  exf_real clip, decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
  exf_real step, inv_sqrt_bias2, eps;
} exf__adam;

/* The table: scratch is the work space gemm needs, in bytes, 64-byte aligned */
#define EXF__KERNEL_LIST(X)                                                             \
  X(gemm) X(unary) X(unary_grad) X(add) X(mul) X(axpy) X(column_sum) X(norm)            \
  X(norm_grad) X(norm_grad_w) X(softmax) X(softmax_grad) X(log_softmax)                 \
  X(log_softmax_grad) X(cross_entropy) X(cross_entropy_grad) X(scores_softmax)          \
  X(scores_scale) X(scores_grad) X(fuse) X(dots) X(adamw) X(adamw_shared)
typedef struct exf__kernels {
  exf_isa isa;
  size_t scratch;
#define EXF__X(name) exf__kernel *name;
  EXF__KERNEL_LIST(EXF__X)
#undef EXF__X
} exf__kernels;

/* ---- elementary functions */

/* Double precision without libm, for schedules and normal draws: the same bits on every
   system. Errors around 1e-15. */

/* log x = e ln 2 + 2 artanh f, f = (m-1)/(m+1), x = m 2^e, m in [1/sqrt 2, sqrt 2);
   x positive and normal */
static double exf__log_d(double x) {
  static const double inverse[] = {1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13,
                                   1.0 / 11, 1.0 / 9,  1.0 / 7,  1.0 / 5,  1.0 / 3};
  uint64_t bits;
  double m, s = 0;
  memcpy(&bits, &x, sizeof bits);
  int64_t e = (int64_t)(bits >> 52) - 1023;
  bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
  memcpy(&m, &bits, sizeof m);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    e++;
  }
  double f = (m - 1) / (m + 1), f2 = f * f;
  for (int k = 0; k < 10; k++) s = (s + inverse[k]) * f2;
  s = 2 * f + 2 * f * s;
  return (double)e * 0.693147180369123816490 +
         (s + (double)e * 1.90821492927058770002e-10); /* ln 2 in two parts */
}

/* cos(pi x), |x| < 2^20: exact reduction to [0, 1/4], then Taylor */
static double exf__cospi_d(double x) {
  double sign = 1, s = 1;
  x = x < 0 ? -x : x;
  x -= 2 * (double)(int64_t)(x / 2);
  if (x > 1) x = 2 - x;
  if (x > 0.5) {
    x = 1 - x;
    sign = -1;
  }
  int use_sin = x > 0.25;
  double y = 3.14159265358979323846 * (use_sin ? 0.5 - x : x), t = -y * y;
  for (int k = use_sin ? 19 : 18; k > 1; k -= 2) s = 1 + s * t / (k * (k - 1));
  return sign * (use_sin ? y * s : s);
}

static double exf__pow_d(double b, uint64_t n) {
  double p = 1;
  for (; n; n >>= 1, b *= b)
    if (n & 1) p *= b;
  return p;
}

/* Those of kernels. In double they are libm's; in float our own, because libm differs
   between systems. Largest errors over all floats, in ulp: exp 0.93, tanh 1.97, erf 3.2,
   log 0.51. */
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
/* e^r = 1 + r + r^2 (c_0 + r (c_1 + ...)), |r| <= ln(2)/2, to 5e-9 */
#define EXF__N_EXP 5
static const float exf__exp_terms[EXF__N_EXP] = {
  0.5f, 0.166665435f, 0.0416664109f, 0.0083665764f, 0.00139399897f};
/* erf x = 1 - e^-t, t = x (c_0 + x (c_1 + ...)), 0 <= x <= 4, to 5e-8 */
#define EXF__N_ERF 9
static const float exf__erf_terms[EXF__N_ERF] = {
  1.12837923f, 0.636615038f, 0.102832176f, -0.0194005407f, 0.000370690803f,
  0.00107108697f, -0.000275149039f, 9.44864769e-06f, 3.63750451e-06f};

/* c_0 + x (c_1 + x (c_2 + ...)), n terms */
static float exf__polynomial(const float *c, int n, float x) {
  float y = c[n - 1];
  for (int i = n - 2; i >= 0; i--) y = EXF__FMA(y, x, c[i]);
  return y;
}

/* x = n ln 2 + r, |r| <= ln(2)/2; *p = (e^r - 1 - r) / r^2. Returns n. |x| < 2^20. */
static int exf__reduce(float x, float *r, float *p) {
  float n = EXF__FMA(x, EXF__LOG2E, EXF__MAGIC) - EXF__MAGIC;
  *r = EXF__FMA(n, -EXF__LN2_LO, EXF__FMA(n, -EXF__LN2_HI, x));
  *p = exf__polynomial(exf__exp_terms, EXF__N_EXP, *r);
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
  if (!(x == x)) return x;
  x = EXF__MAX(EXF__MIN(x, 89.0f), -104.0f);
  int n = exf__reduce(x, &r, &p);
  p = EXF__FMA(EXF__FMA(p, r, 1.0f), r, 1.0f);
  /* two factors: the result may be infinite or subnormal */
  return p * exf__pow2(n >> 1) * exf__pow2(n - (n >> 1));
}

/* e^x - 1 for -20 <= x <= 20: 2^n (e^r - 1) + (2^n - 1) */
static float exf__expm1(float x) {
  float r, p, s = exf__pow2(exf__reduce(x, &r, &p));
  return EXF__FMA(s, EXF__FMA(r * r, p, r), s - 1.0f);
}

/* t = tanh |x| = -u / d, d = u + 2, u = e^-2|x| - 1; then one correction by the residual
   -u - t d, which takes back the roundings of d (by e) and of t; 1 / d = (1 + t) / 2. */
static float exf__tanh(float x) {
  if (!(x == x)) return x;
  float u = exf__expm1(-2.0f * EXF__MIN(fabsf(x), 9.5f));
  float d = u + 2.0f, e = u - (d - 2.0f), t = -u / d;
  float r = EXF__FMA(-t, e, EXF__FMA(-t, d, -u));
  return copysignf(EXF__FMA(r, EXF__FMA(0.5f, t, 0.5f), t), x);
}

static float exf__erf(float x) {
  if (!(x == x)) return x;
  float y = EXF__MIN(fabsf(x), 4.0f);
  y = exf__polynomial(exf__erf_terms, EXF__N_ERF, y) * y;
  return copysignf(exf__expm1(-y), x);
}

static float exf__log(float x) {
  if (!(x > 0.0f)) return x == 0.0f ? -HUGE_VALF : sqrtf(x); /* NaN */
  return x == HUGE_VALF ? x : (float)exf__log_d((double)x);
}
#endif

#define EXF__INV_SQRT2 EXF__R(0.70710678118654752)
#define EXF__INV_SQRT_2PI EXF__R(0.39894228040143268)
#define EXF__GELU_A EXF__R(0.79788456080286536)   /* sqrt(2/pi) */
#define EXF__GELU_B EXF__R(0.035677408136300125)  /* 0.044715 sqrt(2/pi) */
#define EXF__GELU_FAR EXF__R(1e6)  /* where u is times 0, and is not to be infinite */

/* ---- reference: the matrix product, and vectors of one number */

/* Makes g the product of its rows or columns begin .. end-1, or that of matrix begin, of
   which there are then as many as it returns. */
static inline size_t exf__gemm_part(exf__gemm *g, size_t begin, size_t end) {
  if (g->split == EXF__BY_MATRIX) {
    g->a += begin * g->a_batch;
    g->b += begin * g->b_batch;
    g->c += begin * g->c_batch;
    return end - begin;
  }
  if (g->split == EXF__BY_ROWS) {
    g->m = end - begin;
    g->a += begin * g->a_row;
    g->c += begin * g->c_row;
  } else {
    g->n = end - begin;
    g->b += begin * g->b_col;
    g->c += begin;
    if (g->bias) g->bias += begin;
  }
  return 1;
}

/* Within a block of EXF__KC: s = fma(a, b, s) from 0 in order of k; blocks are added to
   c in order, then the bias. */
static exf_real exf__gemm_element(const exf__gemm *g, size_t i, size_t j) {
  exf_real y = g->acc ? g->c[i * g->c_row + j] : 0;
  for (size_t p0 = 0; p0 < g->k; p0 += EXF__KC) {
    exf_real s = 0;
    for (size_t p = p0; p < EXF__MIN(g->k, p0 + EXF__KC); p++)
      s = EXF__FMA(g->a[i * g->a_row + p * g->a_col],
                   g->b[p * g->b_row + j * g->b_col], s);
    y = p0 == 0 && !g->acc ? s : y + s;
  }
  return g->bias ? y + g->bias[j] : y;
}

EXF__KERNEL(exf__gemm_ref) {
  exf__gemm g = *(const exf__gemm *)operands;
  size_t matrices = exf__gemm_part(&g, begin, end);
  (void)scratch;
  for (; matrices; matrices--, g.a += g.a_batch, g.b += g.b_batch, g.c += g.c_batch)
    for (size_t i = 0; i < g.m; i++)
      for (size_t j = 0; j < g.n; j++)
        g.c[i * g.c_row + j] = exf__gemm_element(&g, i, j);
}

/* The 16-lane tree; destroys l. */
static exf_real exf__lane_sum(exf_real *l) {
  for (size_t w = EXF__LANES / 2; w; w /= 2)
    for (size_t j = 0; j < w; j++) l[j] += l[j + w];
  return l[0];
}

/* What kernels need of vectors, here for one number. EXF__F: a name of this instruction
   set; EXF__V: a vector of EXF__W numbers, of which EXF__NV make up the 16 lanes;
   EXF__PART: entries i .. of a run that ends at n, from there on 0; EXF__FOR_LANES: at
   the index, v the accumulator it belongs to; EXF__ADAM_BLOCK numbers of G stay in the
   first cache from expert to expert. */
#define EXF__LOWEST EXF__R(-HUGE_VAL)
#define EXF__NV (EXF__LANES / EXF__W)
#define EXF__PART(p, i, n) EXF__F(load_part)(p, i, n, 0)
#define EXF__ADAM_BLOCK 4096
#if defined(__GNUC__) && !defined(__clang__) && !defined(__TINYC__)
#define EXF__UNROLL _Pragma("GCC unroll 16")
#else
#define EXF__UNROLL
#endif

#define EXF__ISA EXF_ISA_REF
#define EXF__F(name) exf__##name##_ref
#define EXF__TARGET
#define EXF__INLINE static inline
#define EXF__V exf_real
#define EXF__W 1
#define EXF__SCRATCH 0
#define EXF__SET(x) EXF__R(x)
#define EXF__LOAD(p) (*(p))
#define EXF__STORE(p, v) (*(p) = (v))
#define EXF__FMAV(a, b, c) EXF__FMA(a, b, c)
#define EXF__MAXV(a, b) EXF__MAX(a, b)
#define EXF__MINV(a, b) EXF__MIN(a, b)
#define EXF__SQRTV(a) EXF__SQRT(a)
#define EXF__EXP_OF_ONE(x) exf__exp(x)
#define EXF__FOR_VECTORS(i, begin, end) for (size_t i = (begin); i < (end); i++)
#define EXF__FOR_LANES(at, v, n) \
  for (size_t at = 0, v = 0; at < (n); at++, v = at % EXF__LANES)
#define exf__exp_ref exf__exp
#define exf__tanh_ref exf__tanh
#define exf__erf_ref exf__erf

/* Entry i, from n on fill */
EXF__INLINE exf_real exf__load_part_ref(const exf_real *p, size_t i, size_t n,
                                        exf_real fill) {
  return i < n ? p[i] : fill;
}
EXF__INLINE void exf__store_part_ref(exf_real *p, size_t i, size_t n, exf_real x) {
  if (i < n) p[i] = x;
}
/* The sum or the largest of 16 lanes */
EXF__INLINE exf_real exf__fold_ref(exf_real *l, int max) {
  if (!max) return exf__lane_sum(l);
  for (size_t i = 1; i < EXF__LANES; i++) l[0] = EXF__MAX(l[i], l[0]);
  return l[0];
}
/* 1 where x > 0, else 0 */
EXF__INLINE exf_real exf__step_ref(exf_real x) { return x > 0 ? EXF__R(1) : 0; }
/* x, but 0 where a == b */
EXF__INLINE exf_real exf__zero_where_ref(exf_real x, exf_real a, exf_real b) {
  return a == b ? 0 : x;
}
/* x, but fill in the lanes i .. i + EXF__W - 1 that are below first */
EXF__INLINE exf_real exf__mask_below_ref(exf_real x, size_t i, size_t first,
                                         exf_real fill) {
  return i < first ? fill : x;
}

#endif /* EXF__INSTANCE */

/* ---- fast kernels --------------------------------------------------->>fast */

/* The same kernels on vectors of the native width: the header includes itself once per
   instruction set, with EXF__INSTANCE set to its exf_isa, and all is skipped but this
   section and the next. Functions carry their target, so no compiler flag is needed. */

#ifndef EXF__INSTANCE
#if EXF__X86 || EXF__ARM
#ifndef EXF_HEADER_NAME
#define EXF_HEADER_NAME "exfusion.h"
#endif

/* Blocks of the matrix product: EXF__KC x EXF__NC of b, EXF__MC x EXF__KC of a, with room
   for the last spill */
#define EXF__NC 1024
#define EXF__MC 264
/* Packing goes along so many of the k rows at once; up to so many rows, b is not packed
   if it need not be. */
#define EXF__PACK 8
#define EXF__DIRECT 96


/* Rows of a tile are EXF__MR, columns EXF__NR: the registers of a processor hold it.
   EXF__SPILL: its rows in whole vectors. Then: columns of a block of b (with AVX-512 the
   second cache holds 1 MB or more); rows of a that each panel of b passes over; above so
   many columns, contiguous rows of a are packed. */
#define EXF__NR (2 * EXF__W)
#define EXF__SPILL ((EXF__MR + EXF__W - 1) / EXF__W * EXF__W)
#define EXF__COLS (EXF__W == 16 ? 768 : EXF__NC)
#define EXF__ROWS (EXF__W == 16 ? EXF__MR : EXF__MC)
#define EXF__PACK_A (EXF__W == 16 ? SIZE_MAX : 256)
#define EXF__NOINLINE EXF__TARGET static __attribute__((noinline))
#define EXF__VI EXF__F(vi)
#define EXF__VU EXF__F(vu)
/* Of each four lanes: a0 b0 a1 b1, a2 b2 a3 b3; a0 a1 b0 b1, a2 a3 b2 b3 */
#if EXF__X86
#define EXF__LOW_PAIRS(a, b) EXF__MMZ(unpacklo_ps, a, b)
#define EXF__HIGH_PAIRS(a, b) EXF__MMZ(unpackhi_ps, a, b)
#define EXF__LOW_HALVES(a, b) EXF__MM(shuffle_ps)(a, b, 0x44)
#define EXF__HIGH_HALVES(a, b) EXF__MM(shuffle_ps)(a, b, 0xee)
#else
#define EXF__LOW_PAIRS(a, b) vzip1q_f32(a, b)
#define EXF__HIGH_PAIRS(a, b) vzip2q_f32(a, b)
#define EXF__LOW_HALVES(a, b) vcombine_f32(vget_low_f32(a), vget_low_f32(b))
#define EXF__HIGH_HALVES(a, b) vcombine_f32(vget_high_f32(a), vget_high_f32(b))
#endif

static const float exf__iota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* A block of a matrix on its way to the cache: n lines at a time, the next at entry j of
   the row `at`, of width numbers, and stride to the next row */
typedef struct exf__ahead {
  const float *at;
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

/* The next n lines of it */
static inline void exf__ahead_fetch(exf__ahead *h) {
  for (size_t i = 0; i < h->n && h->rows; i++) {
    __builtin_prefetch(h->at + h->j);
    h->j += 16;
    if (h->j < h->width) continue;
    h->j = 0;
    h->at += h->stride;
    h->rows--;
  }
}

/* C (m,n), n real columns, times a block of k, by strips of so many rows of a. b_step:
   from one column of b to the next. a_row 0: a is packed. bias may be NULL. next (2):
   what is packed next, to be fetched meanwhile, or NULL. */
typedef struct exf__tiles {
  size_t m, n, k, strip;
  const float *a, *b, *bias;
  float *c;
  size_t a_row, a_col, b_row, b_step, c_row;
  int acc;
  exf__ahead *next;
} exf__tiles;
#endif
#endif /* EXF__INSTANCE */

#ifdef EXF__INSTANCE
/* EXF__MM: an intrinsic of this width; EXF__MMZ: in a form of which GCC 12 does not warn
   (uninitialized values) */
#define EXF__ISA (exf_isa)EXF__INSTANCE
#if EXF__INSTANCE == 4
#define EXF__F(name) exf__##name##_avx512
#define EXF__TARGET __attribute__((target("avx512f")))
#define EXF__W 16
#define EXF__MR 12
#define EXF__V __m512
#define EXF__MM(name) _mm512_##name
#define EXF__MMZ(name, ...) _mm512_maskz_##name((__mmask16)0xffff, __VA_ARGS__)
#define EXF__FMAV(a, b, c) _mm512_fmadd_ps(a, b, c)
#elif EXF__INSTANCE == 3
#define EXF__F(name) exf__##name##_avx2
#define EXF__TARGET __attribute__((target("avx2,fma")))
#define EXF__W 8
#define EXF__MR 6
#define EXF__V __m256
#define EXF__MM(name) _mm256_##name
#define EXF__MMZ(name, ...) _mm256_##name(__VA_ARGS__)
#define EXF__FMAV(a, b, c) _mm256_fmadd_ps(a, b, c)
#elif EXF__INSTANCE == 2
#define EXF__F(name) exf__##name##_sse2
#define EXF__TARGET __attribute__((target("sse2")))
#define EXF__W 4
#define EXF__MR 4
#define EXF__V __m128
#define EXF__MM(name) _mm_##name
#define EXF__MMZ(name, ...) _mm_##name(__VA_ARGS__)
#define EXF__FMAV(a, b, c) ((__m128)((a) * (b) + (c)))
#define EXF__EXP_OF_ONE(x) exf__exp(x)
#else
#define EXF__F(name) exf__##name##_neon
#define EXF__TARGET
#define EXF__W 4
#define EXF__MR 8
#define EXF__V float32x4_t
#define EXF__FMAV(a, b, c) vfmaq_f32(c, a, b)
#endif
#define EXF__SCRATCH ((EXF__KC * (EXF__NC + EXF__MC) + 16) * sizeof(float))
#define EXF__INLINE EXF__TARGET static inline __attribute__((always_inline))
/* A scalar function between those of vectors costs some processors 200 cycles. */
#ifndef EXF__EXP_OF_ONE
#define EXF__EXP_OF_ONE(x) EXF__F(exp)(EXF__SET(x))[0]
#endif
/* First the whole vectors of a run, then the rest: GCC makes two loops of it, of which
   the first asks for nothing. */
#if defined(__clang__)
#define EXF__FOR_VECTORS(i, begin, end) for (size_t i = (begin); i < (end); i += EXF__W)
#else
#define EXF__FOR_VECTORS(i, begin, end)                                                 \
  EXF__UNROLL                                                                           \
  for (size_t rest = 0, i = (begin); rest < 2; rest++)                                  \
    for (; rest ? i < (end) : i + EXF__W <= (end); i += EXF__W)
#endif
#define EXF__FOR_LANES(at, v, n)                                                        \
  for (size_t lane = 0; lane < (n); lane += EXF__LANES)                                 \
    EXF__UNROLL                                                                         \
    for (size_t v = 0, at = lane; v < EXF__NV; v++, at += EXF__W)
#if EXF__X86
#define EXF__SET(x) EXF__MM(set1_ps)(x)
#define EXF__LOAD(p) EXF__MM(loadu_ps)(p)
#define EXF__STORE(p, v) EXF__MM(storeu_ps)(p, v)
#define EXF__MAXV(a, b) EXF__MMZ(max_ps, a, b)
#define EXF__MINV(a, b) EXF__MMZ(min_ps, a, b)
#define EXF__SQRTV(a) EXF__MMZ(sqrt_ps, a)
#else
#define EXF__SET(x) vdupq_n_f32(x)
#define EXF__LOAD(p) vld1q_f32(p)
#define EXF__STORE(p, v) vst1q_f32(p, v)
#define EXF__MAXV(a, b) vbslq_f32(vcgtq_f32(a, b), a, b)
#define EXF__MINV(a, b) vbslq_f32(vcltq_f32(a, b), a, b)
#define EXF__SQRTV(a) vsqrtq_f32(a)
#endif
typedef int32_t EXF__VI __attribute__((vector_size(EXF__W * 4)));
typedef uint32_t EXF__VU __attribute__((vector_size(EXF__W * 4)));

/* ---- vectors */

/* The first n entries, 0 < n < EXF__W, then fill; quads: 4 floats at p, 4 at p + stride
   ... side by side */

#if EXF__INSTANCE == 4
EXF__INLINE EXF__V EXF__F(load_first)(const float *p, size_t n, float fill) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)((1u << n) - 1u), p);
}
EXF__INLINE void EXF__F(store_first)(float *p, size_t n, EXF__V v) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1u), v);
}
EXF__INLINE EXF__V EXF__F(quads)(const float *p, size_t stride) {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + stride), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 2 * stride), 2);
  return _mm512_insertf32x4(v, _mm_loadu_ps(p + 3 * stride), 3);
}
#elif EXF__INSTANCE == 3
EXF__INLINE __m256i EXF__F(mask)(size_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
EXF__INLINE EXF__V EXF__F(load_first)(const float *p, size_t n, float fill) {
  __m256i k = EXF__F(mask)(n);
  return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, k),
                          _mm256_castsi256_ps(k));
}
EXF__INLINE void EXF__F(store_first)(float *p, size_t n, EXF__V v) {
  _mm256_maskstore_ps(p, EXF__F(mask)(n), v);
}
EXF__INLINE EXF__V EXF__F(quads)(const float *p, size_t stride) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)),
                              _mm_loadu_ps(p + stride), 1);
}
#else
EXF__INLINE EXF__V EXF__F(load_first)(const float *p, size_t n, float fill) {
  float t[4] = {p[0], n > 1 ? p[1] : fill, n > 2 ? p[2] : fill, fill};
  return EXF__LOAD(t);
}
EXF__INLINE void EXF__F(store_first)(float *p, size_t n, EXF__V v) {
  float t[4];
  EXF__STORE(t, v);
  p[0] = t[0];
  if (n > 1) p[1] = t[1];
  if (n > 2) p[2] = t[2];
}
EXF__INLINE EXF__V EXF__F(quads)(const float *p, size_t stride) {
  (void)stride;
  return EXF__LOAD(p);
}
#endif

/* The tree over 16 lanes, of sums or maxima: 8 lanes, 4, 2, 1 */
EXF__INLINE float EXF__F(fold)(const EXF__V *l, int max) {
#if EXF__W == 4
  EXF__V p = max ? EXF__MAXV(l[0], l[2]) : (EXF__V)(l[0] + l[2]);
  EXF__V r = max ? EXF__MAXV(l[1], l[3]) : (EXF__V)(l[1] + l[3]);
  EXF__V q = max ? EXF__MAXV(p, r) : (EXF__V)(p + r);
#else
#if EXF__W == 8
  __m256 h = max ? _mm256_max_ps(l[0], l[1]) : _mm256_add_ps(l[0], l[1]);
#else
  __m512d u = _mm512_castps_pd(l[0]);
  __m256 h = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, u, 0));
  __m256 g = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, u, 1));
  h = max ? _mm256_max_ps(h, g) : _mm256_add_ps(h, g);
#endif
  __m128 q = _mm256_castps256_ps128(h), r = _mm256_extractf128_ps(h, 1);
  q = max ? _mm_max_ps(q, r) : _mm_add_ps(q, r);
#endif
  float a = max ? EXF__MAX(q[0], q[2]) : q[0] + q[2];
  float b = max ? EXF__MAX(q[1], q[3]) : q[1] + q[3];
  return max ? EXF__MAX(a, b) : a + b;
}

/* Entries i .. of a run that ends at n, from there on fill; a store keeps within. */
EXF__INLINE EXF__V EXF__F(load_part)(const float *p, size_t i, size_t n, float fill) {
  if (i + EXF__W <= n) return EXF__LOAD(p + i);
  return i < n ? EXF__F(load_first)(p + i, n - i, fill) : EXF__SET(fill);
}
EXF__INLINE void EXF__F(store_part)(float *p, size_t i, size_t n, EXF__V v) {
  if (i + EXF__W <= n) EXF__STORE(p + i, v);
  else if (i < n) EXF__F(store_first)(p + i, n - i, v);
}
EXF__INLINE EXF__V EXF__F(step)(EXF__V x) {
  return (EXF__V)((EXF__VU)(x > EXF__SET(0.0f)) & (EXF__VU)EXF__SET(1.0f));
}
EXF__INLINE EXF__V EXF__F(zero_where)(EXF__V x, EXF__V a, EXF__V b) {
  return (EXF__V)((EXF__VU)x & ~(EXF__VU)(a == b));
}
EXF__INLINE EXF__V EXF__F(mask_below)(EXF__V x, size_t i, size_t first, float fill) {
  EXF__V lane = EXF__LOAD(exf__iota) + EXF__SET((float)i);
  EXF__VU below = (EXF__VU)(lane < EXF__SET((float)first));
  return (EXF__V)(((EXF__VU)x & ~below) | ((EXF__VU)EXF__SET(fill) & below));
}

/* ---- matrix product: gemm takes blocks of k and of columns, block packs b and blocks of
   a, panels goes over these by strips and panels, panel down the tiles of a panel */

/* C = [C +] s [+ bias] of a tile; past its last column by way of a copy */
EXF__INLINE void EXF__F(tile_store)(const int mr, const int nv, const exf__tiles *g,
                                    EXF__V s[EXF__MR][2]) {
  float *c = g->c, t[EXF__MR][EXF__NR];
  const size_t c_row = g->c_row;
  if (g->n == (size_t)nv * EXF__W) {
    if (g->acc) {
      EXF__UNROLL
      for (int i = 0; i < mr; i++) {
        s[i][0] = EXF__LOAD(c + (size_t)i * c_row) + s[i][0];
        if (nv > 1) s[i][1] = EXF__LOAD(c + (size_t)i * c_row + EXF__W) + s[i][1];
      }
    }
    if (g->bias) {
      EXF__V b0 = EXF__LOAD(g->bias), b1 = nv > 1 ? EXF__LOAD(g->bias + EXF__W) : b0;
      EXF__UNROLL
      for (int i = 0; i < mr; i++) s[i][0] += b0, s[i][1] += b1;
    }
    EXF__UNROLL
    for (int i = 0; i < mr; i++) {
      EXF__STORE(c + (size_t)i * c_row, s[i][0]);
      if (nv > 1) EXF__STORE(c + (size_t)i * c_row + EXF__W, s[i][1]);
    }
    return;
  }
  EXF__UNROLL
  for (int i = 0; i < mr; i++) {
    EXF__STORE(t[i], s[i][0]);
    EXF__STORE(t[i] + EXF__W, s[i][1]);
  }
  for (int i = 0; i < mr; i++, c += c_row)
    for (size_t j = 0; j < (size_t)nv * EXF__W; j += EXF__W) {
      EXF__V y = EXF__LOAD(t[i] + j);
      if (g->acc) y = EXF__PART(c, j, g->n) + y;
      if (g->bias) y += EXF__PART(g->bias, j, g->n);
      EXF__F(store_part)(c, j, g->n, y);
    }
}

/* A tile of mr x (nv EXF__W) of C stays in registers while k runs. The rows of a are
   reached from three pointers, which spares registers. */
EXF__INLINE void EXF__F(tile)(const int mr, const int nv, const exf__tiles *g) {
  EXF__V s[EXF__MR][2];
  const size_t a_row = g->a_row ? g->a_row : 1, b_row = g->b_row;
  const size_t a_col = g->a_row ? g->a_col : (size_t)mr;
  const float *b = g->b, *a = g->a;
  const float *a4 = a + 4 * (mr > 4 ? a_row : 0), *a8 = a + 8 * (mr > 8 ? a_row : 0);
  EXF__UNROLL
  for (int i = 0; i < mr; i++) {
    s[i][0] = s[i][1] = EXF__SET(0.0f);
    __builtin_prefetch(g->c + (size_t)i * g->c_row, 1);
  }
  for (size_t k = g->k; k; k--) {
    EXF__V b0 = EXF__LOAD(b), b1 = nv > 1 ? EXF__LOAD(b + EXF__W) : b0;
    EXF__UNROLL
    for (int i = 0; i < mr; i++) {
      const float *row = i < 4 ? a : i < 8 ? a4 : a8;
      EXF__V x = EXF__SET(row[(size_t)(i % 4) * a_row]);
      s[i][0] = EXF__FMAV(x, b0, s[i][0]);
      if (nv > 1) s[i][1] = EXF__FMAV(x, b1, s[i][1]);
    }
    a += a_col, a4 += a_col, a8 += a_col;
    b += b_row;
  }
  EXF__F(tile_store)(mr, nv, g, s);
}

/* Rows of the next tile, of m that are left */
EXF__INLINE size_t EXF__F(height)(size_t m) {
  return m >= EXF__MR ? EXF__MR : m >= 8 && EXF__MR > 8 ? 8 : m >= 4 ? 4 : m >= 2 ? 2 : 1;
}

/* nv vectors of columns of C: tiles from top to bottom */
EXF__INLINE void EXF__F(panel)(const int nv, exf__tiles t) {
  size_t mr, a_step = t.a_row ? t.a_row : t.k;
  for (; t.m; t.m -= mr, t.a += mr * a_step, t.c += mr * t.c_row) {
    mr = EXF__F(height)(t.m);
    if (t.next) {
      exf__ahead_fetch(&t.next[0]);
      exf__ahead_fetch(&t.next[1]);
    }
    if (mr == EXF__MR) EXF__F(tile)(EXF__MR, nv, &t);
    else if (EXF__MR > 8 && mr == 8) EXF__F(tile)(8, nv, &t);
    else if (EXF__MR > 4 && mr == 4) EXF__F(tile)(4, nv, &t);
    else if (mr == 2) EXF__F(tile)(2, nv, &t);
    else EXF__F(tile)(1, nv, &t);
  }
}

/* Not to be inlined: the loops around it would take registers from those of a tile. */
EXF__NOINLINE void EXF__F(panels)(const exf__tiles *whole) {
  const exf__tiles g = *whole;
  size_t a_step = g.a_row ? g.a_row : g.k;
  for (size_t i = 0; i < g.m; i += g.strip)
    for (size_t j = 0; j < g.n; j += EXF__NR) {
      exf__tiles t = g;
      t.m = EXF__MIN(g.m - i, g.strip);
      t.n = EXF__MIN(g.n - j, (size_t)EXF__NR);
      t.a = g.a + i * a_step;
      t.b = g.b + j * g.b_step;
      t.c = g.c + i * g.c_row + j;
      t.bias = g.bias ? g.bias + j : NULL;
      if (t.n > EXF__W) EXF__F(panel)(2, t);
      else EXF__F(panel)(1, t);
    }
}

/* Four rows of k of EXF__W columns of b, whose columns are contiguous and b_col apart:
   4 x 4 transpositions in registers */
EXF__INLINE void EXF__F(transpose)(const float *b, size_t b_col, EXF__V *r) {
  EXF__V r0 = EXF__F(quads)(b, 4 * b_col), r1 = EXF__F(quads)(b + b_col, 4 * b_col);
  EXF__V r2 = EXF__F(quads)(b + 2 * b_col, 4 * b_col);
  EXF__V r3 = EXF__F(quads)(b + 3 * b_col, 4 * b_col);
  EXF__V t0 = EXF__LOW_PAIRS(r0, r1), t1 = EXF__LOW_PAIRS(r2, r3);
  EXF__V t2 = EXF__HIGH_PAIRS(r0, r1), t3 = EXF__HIGH_PAIRS(r2, r3);
  r[0] = EXF__LOW_HALVES(t0, t1), r[1] = EXF__HIGH_HALVES(t0, t1);
  r[2] = EXF__LOW_HALVES(t2, t3), r[3] = EXF__HIGH_HALVES(t2, t3);
}

/* b (k,n) -> panels (k, EXF__NR) one after the other */
EXF__NOINLINE void EXF__F(pack_b)(size_t k, size_t n, const float *b, size_t b_row,
                                  size_t b_col, float *out) {
  if (b_col == 1) {
    for (size_t p0 = 0; p0 < k; p0 += EXF__PACK)
      for (size_t j = 0; j < n; j += EXF__W)
        for (size_t p = p0; p < EXF__MIN(k, p0 + EXF__PACK); p++)
          EXF__STORE(out + j / EXF__NR * EXF__NR * k + p * EXF__NR + j % EXF__NR,
                     EXF__PART(b + p * b_row, j, n));
    return;
  }
  for (size_t j = 0; j < n; j += EXF__W, b += EXF__W * b_col) {
    float *o = out + j / EXF__NR * EXF__NR * k + j % EXF__NR;
    size_t w = EXF__MIN(n - j, (size_t)EXF__W), p = 0;
    if (b_row == 1 && w == EXF__W)
      for (; p + 4 <= k; p += 4) {
        EXF__V r[4];
        EXF__F(transpose)(b + p, b_col, r);
        EXF__UNROLL
        for (size_t i = 0; i < 4; i++) EXF__STORE(o + (p + i) * EXF__NR, r[i]);
      }
    for (; p < k; p++) {
      EXF__STORE(o + p * EXF__NR, EXF__SET(0.0f));
      for (size_t i = 0; i < w; i++) o[p * EXF__NR + i] = b[p * b_row + i * b_col];
    }
  }
}

/* a (m,k), m <= EXF__MC -> strips (k,height) one after the other. Stores are whole
   vectors and overlap: what one spills behind its row of a strip the next overwrites. */
EXF__NOINLINE void EXF__F(pack_a)(size_t m, size_t k, const float *a, size_t a_row,
                                  size_t a_col, float *out) {
  size_t mr, chunk = a_row == 1 ? (size_t)EXF__PACK : k;
  for (size_t p0 = 0; p0 < k; p0 += chunk)
    for (size_t i = 0; i < m; i += mr) {
      const float *ai = a + i * a_row;
      float *o = out + i * k;
      size_t end = EXF__MIN(k, p0 + chunk), whole = p0, p = p0;
      mr = EXF__F(height)(m - i);
      if (mr == EXF__MR && m - i >= EXF__SPILL) whole = end < k ? end : end - 1;
      if (a_row == 1)
        for (; p < whole; p++)
          for (size_t w = 0; w < EXF__MR; w += EXF__W)
            EXF__STORE(o + p * EXF__MR + w, EXF__LOAD(ai + p * a_col + w));
      else if (a_col == 1)
        for (; p + 4 <= whole; p += 4) {
          EXF__V t[EXF__SPILL / EXF__W][4];
          for (size_t w = 0; w < EXF__SPILL / EXF__W; w++)
            EXF__F(transpose)(ai + w * EXF__W * a_row + p, a_row, t[w]);
          for (size_t r = 0; r < 4; r++)
            for (size_t w = 0; w < EXF__SPILL / EXF__W; w++)
              EXF__STORE(o + (p + r) * EXF__MR + w * EXF__W, t[w][r]);
        }
      for (; p < end; p++)
        for (size_t r = 0; r < mr; r++) o[p * mr + r] = ai[r * a_row + p * a_col];
    }
}

/* nv vectors, from column j, of one row of C, columns of b contiguous (y = W x, of a
   generating model): nothing is packed, b streams through the transposition. */
EXF__INLINE void EXF__F(gemv)(const int nv, const exf__gemm *g, size_t j) {
  const float *a = g->a, *b = g->b + j * g->b_col;
  const size_t k = g->k, a_col = g->a_col, b_col = g->b_col;
  float *c = g->c + j;
  EXF__V s[4], y[4], r[4];
  EXF__UNROLL
  for (int v = 0; v < nv; v++) y[v] = EXF__SET(0.0f); /* for GCC's warning at -Os */
  for (size_t p0 = 0, end; p0 < k; p0 = end) {
    size_t p = p0;
    end = EXF__MIN(k, p0 + EXF__KC);
    EXF__UNROLL
    for (int v = 0; v < nv; v++) s[v] = EXF__SET(0.0f);
    for (; p + 16 <= end; p += 16) { /* a cache line of each column at once */
      EXF__UNROLL
      for (int v = 0; v < nv; v++)
        for (size_t q = p; q < p + 16; q += 4) {
          EXF__F(transpose)(b + (size_t)v * EXF__W * b_col + q, b_col, r);
          EXF__UNROLL
          for (size_t i = 0; i < 4; i++)
            s[v] = EXF__FMAV(EXF__SET(a[(q + i) * a_col]), r[i], s[v]);
        }
    }
    for (; p < end; p++) {
      EXF__UNROLL
      for (int v = 0; v < nv; v++) {
        float t[EXF__W];
        const float *column = b + (size_t)v * EXF__W * b_col + p;
        for (size_t i = 0; i < EXF__W; i++) t[i] = column[i * b_col];
        s[v] = EXF__FMAV(EXF__SET(a[p * a_col]), EXF__LOAD(t), s[v]);
      }
    }
    EXF__UNROLL
    for (int v = 0; v < nv; v++) {
      if (p0 > 0) s[v] = y[v] + s[v];
      else if (g->acc) s[v] = EXF__LOAD(c + v * EXF__W) + s[v];
      y[v] = s[v];
    }
  }
  EXF__UNROLL
  for (int v = 0; v < nv; v++) {
    if (g->bias) y[v] += EXF__LOAD(g->bias + j + v * EXF__W);
    EXF__STORE(c + v * EXF__W, y[v]);
  }
}

/* Columns j .. j+nc-1 of C, a block of k from p on: C = [C +] A B of these, the bias with
   the last block. What follows a packed block of a, and of b, is named to be fetched. */
EXF__TARGET static void EXF__F(block)(const exf__gemm *g, size_t j, size_t nc, size_t p,
                                      float *scratch) {
  float *packed = scratch + EXF__KC * EXF__NC;
  exf__ahead next[2];
  const size_t m = g->m, kc = EXF__MIN(g->k - p, (size_t)EXF__KC), nr = EXF__NR;
  const float *b = g->b + p * g->b_row + j * g->b_col;
  int direct = g->b_col == 1 && m <= EXF__DIRECT && nc % EXF__W == 0;
  int pack = nc > (g->a_col == 1 ? (size_t)EXF__PACK_A : nr);
  size_t mc = m, blocks = m / (EXF__MC + 1) + 1;  /* of equal height, whole strips */
  if (pack) mc = ((m + blocks - 1) / blocks + EXF__MR - 1) / EXF__MR * EXF__MR;
  exf__tiles t = {0, g->padded ? (nc + EXF__W - 1) / EXF__W * EXF__W : nc, kc,
                  pack ? (size_t)EXF__ROWS : (size_t)EXF__MR, NULL, direct ? b : scratch,
                  g->bias && p + kc == g->k ? g->bias + j : NULL, NULL,
                  pack ? 0 : g->a_row, g->a_col, direct ? g->b_row : nr,
                  direct ? 1 : kc, g->c_row, g->acc || p > 0, pack ? next : NULL};
  if (!direct) EXF__F(pack_b)(kc, nc, b, g->b_row, g->b_col, scratch);
  for (size_t i = 0; i < m; i += mc) {
    t.m = EXF__MIN(m - i, mc);
    t.a = g->a + i * g->a_row + p * g->a_col;
    t.c = g->c + i * g->c_row + j;
    if (pack) {
      size_t tiles = (t.m + EXF__MR - 1) / EXF__MR * ((nc + nr - 1) / nr);
      size_t i1 = i + t.m < m ? i + t.m : 0, p1 = i1 ? p : p + kc;
      size_t m1 = EXF__MIN(m - i1, mc), k1 = EXF__MIN(g->k - p1, kc);
      exf__ahead_set(&next[0], k1 ? g->a + i1 * g->a_row + p1 * g->a_col : g->a, m1, k1,
                     g->a_row, g->a_col, tiles);
      exf__ahead_set(&next[1], k1 ? g->b + p1 * g->b_row + j * g->b_col : g->b,
                     i1 ? 0 : k1, nc, g->b_row, g->b_col, tiles);
      EXF__F(pack_a)(t.m, kc, t.a, g->a_row, g->a_col, packed);
      t.a = packed;
    }
    EXF__F(panels)(&t);
  }
}

/* For a block of b (EXF__KC, EXF__NC) and one of a (EXF__MC, EXF__KC), which rests in the
   second cache: panel after panel of b, in the first cache, passes over all strips of a
   (the order of Goto and van de Geijn, "Anatomy of high-performance matrix
   multiplication", 2008). With AVX-512 strip after strip of a is in the first cache, and
   the panels pass: C is walked along its rows, which gains a tenth. Scratch: both blocks,
   packed. Where packing would not pay they are read in place: b under few rows, a under
   few columns. While a block is multiplied what follows it along k is fetched: a weight
   gradient over 6,400 rows, which come from memory, gains a sixth. */
EXF__TARGET EXF__KERNEL(EXF__F(gemm)) {
  exf__gemm g = *(const exf__gemm *)operands;
  size_t matrices = exf__gemm_part(&g, begin, end);
  size_t nc_max = g.m <= EXF__MR ? EXF__NR : EXF__COLS;
  if (g.k == 0) {
    exf__gemm_ref(operands, begin, end, scratch);
    return;
  }
  for (; matrices; matrices--, g.a += g.a_batch, g.b += g.b_batch, g.c += g.c_batch) {
    size_t j = 0;
    if (g.m == 1 && g.b_row == 1) {
      for (; j + 4 * EXF__W <= g.n; j += 4 * EXF__W) EXF__F(gemv)(4, &g, j);
      for (; j + EXF__W <= g.n; j += EXF__W) EXF__F(gemv)(1, &g, j);
    }
    for (; j < g.n; j += nc_max)
      for (size_t p = 0; p < g.k; p += EXF__KC)
        EXF__F(block)(&g, j, EXF__MIN(g.n - j, nc_max), p, (float *)scratch);
  }
}

/* ---- elementary functions: the steps of their scalar forms, operation by operation, so
   that the bits are the same */

EXF__INLINE EXF__V EXF__F(abs)(EXF__V x) { return (EXF__V)((EXF__VU)x & 0x7fffffffu); }

EXF__INLINE EXF__V EXF__F(copysign)(EXF__V y, EXF__V x) {
  return (EXF__V)(((EXF__VU)y & 0x7fffffffu) | ((EXF__VU)x & 0x80000000u));
}

/* 2^n for n in (-127, 128) */
EXF__INLINE EXF__V EXF__F(pow2)(EXF__VI n) {
  return (EXF__V)(((EXF__VU)n + 127u) << 23);
}

/* c_0 + x (c_1 + x (c_2 + ...)), n terms */
EXF__INLINE EXF__V EXF__F(polynomial)(const float *c, const int n, EXF__V x) {
  EXF__V y = EXF__SET(c[n - 1]);
  EXF__UNROLL
  for (int i = n - 2; i >= 0; i--) y = EXF__FMAV(y, x, EXF__SET(c[i]));
  return y;
}

/* x = n ln 2 + r; *p = (e^r - 1 - r) / r^2. Returns n. */
EXF__INLINE EXF__VI EXF__F(reduce)(EXF__V x, EXF__V *r, EXF__V *p) {
  EXF__V t = EXF__FMAV(x, EXF__SET(EXF__LOG2E), EXF__SET(EXF__MAGIC));
  EXF__V n = t - EXF__SET(EXF__MAGIC);
  *r = EXF__FMAV(n, EXF__SET(-EXF__LN2_HI), x);
  *r = EXF__FMAV(n, EXF__SET(-EXF__LN2_LO), *r);
  *p = EXF__F(polynomial)(exf__exp_terms, EXF__N_EXP, *r);
  return (EXF__VI)((EXF__VU)t - EXF__MAGIC_BITS);
}

EXF__INLINE EXF__V EXF__F(exp)(EXF__V x) {
  EXF__V r, p, one = EXF__SET(1.0f), low = EXF__SET(-104.0f);
  x = EXF__MAXV(low, EXF__MINV(EXF__SET(89.0f), x)); /* keeps NaN */
  EXF__VI n = EXF__F(reduce)(x, &r, &p), h = n >> 1;
  p = EXF__FMAV(EXF__FMAV(p, r, one), r, one);
  /* 0 by its bits: a product that underflows costs some processors 150 cycles. */
  p = EXF__F(zero_where)(p, x, low);
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
  EXF__V p = t * d, c = EXF__SET(4097.0f) * t, th = c - (c - t), tl = t - th;
  c = EXF__SET(4097.0f) * d;
  EXF__V dh = c - (c - d), dl = d - dh;
  return (-u - p) - (((th * dh - p) + th * dl + tl * dh) + tl * dl);
#else
  return EXF__FMAV(-t, d, -u);
#endif
}

/* t = tanh |x| by expm1, then one correction by the residual */
EXF__INLINE EXF__V EXF__F(tanh)(EXF__V x) {
  EXF__V half = EXF__SET(0.5f), two = EXF__SET(2.0f);
  EXF__V u = EXF__F(expm1)(-two * EXF__MINV(EXF__SET(9.5f), EXF__F(abs)(x)));
  EXF__V d = u + two, e = u - (d - two), t = -u / d;
  e = EXF__FMAV(-t, e, EXF__F(residual)(t, d, u));
  return EXF__F(copysign)(EXF__FMAV(e, EXF__FMAV(half, t, half), t), x);
}

EXF__INLINE EXF__V EXF__F(erf)(EXF__V x) {
  EXF__V y = EXF__MINV(EXF__SET(4.0f), EXF__F(abs)(x));
  y = y * EXF__F(polynomial)(exf__erf_terms, EXF__N_ERF, y);
  return EXF__F(copysign)(EXF__F(expm1)(-y), x);
}
#endif /* EXF__INSTANCE */

/* ---- kernels of every instruction set ------------------------------------- >>bodies */

/* Compiled for the reference and once per instance. n, or end, cuts off what a vector
   has too much. */

/* y = [y +] v */
EXF__INLINE void EXF__F(add_or_set)(exf_real *y, size_t i, size_t n, EXF__V v, int acc) {
  EXF__F(store_part)(y, i, n, acc ? (EXF__V)(EXF__PART(y, i, n) + v) : v);
}
/* y = [y +] a b */
EXF__INLINE void EXF__F(fma_or_mul)(exf_real *y, size_t i, size_t n, EXF__V a, EXF__V b,
                                    int acc) {
  EXF__V v = acc ? EXF__FMAV(a, b, EXF__PART(y, i, n)) : (EXF__V)(a * b);
  EXF__F(store_part)(y, i, n, v);
}
EXF__INLINE void EXF__F(fill)(EXF__V *l, size_t n, exf_real x) {
  EXF__UNROLL
  for (size_t v = 0; v < n; v++) l[v] = EXF__SET(x);
}

/* ---- elementwise */

/* f(x) of an op */
EXF__INLINE EXF__V EXF__F(unary_f)(const int op, EXF__V x) {
  EXF__V h = EXF__SET(0.5f) * x;
  switch (op) {
    case EXF__U_EXP: return EXF__F(exp)(x);
    case EXF__U_TANH: return EXF__F(tanh)(x);
    case EXF__U_RELU: return EXF__MAXV(EXF__SET(0), x);
    case EXF__U_GELU: /* h (1 + erf(x / sqrt 2)) */
      return EXF__FMAV(h, EXF__F(erf)(x * EXF__SET(EXF__INV_SQRT2)), h);
    case EXF__U_GELU_TANH: /* h (1 + tanh(A x + B x^3)) */
      x = x * EXF__FMAV(EXF__SET(EXF__GELU_B), x * x, EXF__SET(EXF__GELU_A));
      return EXF__FMAV(h, EXF__F(tanh)(x), h);
    default: return x / (EXF__SET(1) + EXF__F(exp)(-x));
  }
}

/* f'(x), from x alone: nothing of the forward pass is kept */
EXF__INLINE EXF__V EXF__F(unary_df)(const int op, EXF__V x) {
  EXF__V t, u, one = EXF__SET(1), half = EXF__SET(0.5f), far = EXF__SET(EXF__GELU_FAR);
  switch (op) {
    case EXF__U_EXP: return EXF__F(exp)(x);
    case EXF__U_TANH: /* 1 - tanh^2 x */
      t = EXF__F(tanh)(x);
      return EXF__FMAV(-t, t, one);
    case EXF__U_RELU: return EXF__F(step)(x);
    case EXF__U_GELU: /* Phi(x) + x phi(x) */
      t = EXF__FMAV(half, EXF__F(erf)(x * EXF__SET(EXF__INV_SQRT2)), half);
      u = EXF__F(exp)(-half * x * x) * EXF__SET(EXF__INV_SQRT_2PI);
      return EXF__FMAV(x, u, t);
    case EXF__U_GELU_TANH: /* (1 + t)/2 + x/2 (1 - t^2) (A + 3 B x^2) */
      t = x * EXF__FMAV(EXF__SET(EXF__GELU_B), x * x, EXF__SET(EXF__GELU_A));
      t = EXF__F(tanh)(t);
      x = EXF__MAXV(-far, EXF__MINV(far, x));
      u = EXF__FMAV(EXF__SET(3 * EXF__GELU_B), x * x, EXF__SET(EXF__GELU_A));
      u = half * x * u;
      return EXF__FMAV(u, EXF__FMAV(-t, t, one), EXF__FMAV(half, t, half));
    default: /* s (1 + x (1 - s)), s = 1 / (1 + exp -x) */
      t = one / (one + EXF__F(exp)(-x));
      return t * EXF__FMAV(x, one - t, one);
  }
}

/* y = f(x). One loop per op: the switch is decided when compiling. */
EXF__TARGET EXF__KERNEL(EXF__F(unary)) {
  EXF__OPERANDS(exf__elements, e);
  switch (e.op) {
#define EXF__X(name)                                                                    \
  case EXF__U_##name:                                                                   \
    for (size_t i = begin; i < end; i += EXF__W) {                                      \
      EXF__V x = EXF__PART(e.x, i, end);                                                \
      EXF__F(store_part)(e.y, i, end, EXF__F(unary_f)(EXF__U_##name, x));               \
    }                                                                                   \
    break;
    EXF__UNARY_LIST(EXF__X)
#undef EXF__X
    default: break;
  }
}

/* dx = [dx +] dy f'(x), dx may be dy; and y = f(x), when y is not NULL. f and f' of a
   vector share what they have in common: y costs little more than its store. */
EXF__TARGET EXF__KERNEL(EXF__F(unary_grad)) {
  EXF__OPERANDS(exf__elements, e);
  switch (e.op) {
#define EXF__X(name)                                                                    \
  case EXF__U_##name:                                                                   \
    for (size_t i = begin; i < end; i += EXF__W) {                                      \
      EXF__V x = EXF__PART(e.x, i, end), dy = EXF__PART(e.dy, i, end);                  \
      EXF__F(fma_or_mul)(e.dx, i, end, dy, EXF__F(unary_df)(EXF__U_##name, x), e.acc);  \
      if (e.y) EXF__F(store_part)(e.y, i, end, EXF__F(unary_f)(EXF__U_##name, x));      \
    }                                                                                   \
    break;
    EXF__UNARY_LIST(EXF__X)
#undef EXF__X
    default: break;
  }
}

/* y = x + b */
EXF__TARGET EXF__KERNEL(EXF__F(add)) {
  EXF__OPERANDS(exf__elements, e);
  EXF__FOR_VECTORS(i, begin, end)
    EXF__F(store_part)(e.y, i, end, EXF__PART(e.x, i, end) + EXF__PART(e.b, i, end));
}

/* y = [y +] x b */
EXF__TARGET EXF__KERNEL(EXF__F(mul)) {
  EXF__OPERANDS(exf__elements, e);
  EXF__FOR_VECTORS(i, begin, end) {
    EXF__V x = EXF__PART(e.x, i, end), b = EXF__PART(e.b, i, end);
    EXF__F(fma_or_mul)(e.y, i, end, x, b, e.acc);
  }
}

/* y = [y +] s x; y may be x */
EXF__TARGET EXF__KERNEL(EXF__F(axpy)) {
  EXF__OPERANDS(exf__elements, e);
  EXF__FOR_VECTORS(i, begin, end)
    EXF__F(fma_or_mul)(e.y, i, end, EXF__SET(e.s), EXF__PART(e.x, i, end), e.acc);
}

/* ---- columns; 4 vectors at a time, so that loads fill lines */

/* y (n) = [y +] sum over rows of x (rows,n) */
EXF__TARGET EXF__KERNEL(EXF__F(column_sum)) {
  EXF__OPERANDS(exf__columns, c);
  for (size_t j = begin; j < end; j += 4 * EXF__W) {
    EXF__V s[4];
    EXF__F(fill)(s, 4, 0);
    for (size_t i = 0; i < c.rows; i++) {
      EXF__UNROLL
      for (size_t v = 0; v < 4; v++)
        s[v] += EXF__PART(c.x + i * c.n, j + v * EXF__W, end);
    }
    EXF__UNROLL
    for (size_t v = 0; v < 4; v++)
      EXF__F(add_or_set)(c.y, j + v * EXF__W, end, s[v], c.acc);
  }
}

/* dw (n) = [dw +] sum over rows of dy z, z = (x - mean) rstd; db = [db +] sum of dy */
EXF__TARGET EXF__KERNEL(EXF__F(norm_grad_w)) {
  EXF__OPERANDS(exf__norm, r);
  for (size_t j = begin; j < end; j += 4 * EXF__W) {
    EXF__V sw[4], sb[4];
    EXF__F(fill)(sw, 4, 0);
    EXF__F(fill)(sb, 4, 0);
    for (size_t i = 0; i < r.rows; i++) {
      EXF__V mean = EXF__SET(r.rms ? 0 : r.mean[i]), rstd = EXF__SET(r.rstd[i]);
      EXF__UNROLL
      for (size_t v = 0; v < 4; v++) {
        EXF__V dy = EXF__PART(r.dy + i * r.n, j + v * EXF__W, end);
        EXF__V z = (EXF__PART(r.x + i * r.n, j + v * EXF__W, end) - mean) * rstd;
        sw[v] = EXF__FMAV(dy, z, sw[v]);
        sb[v] += dy;
      }
    }
    EXF__UNROLL
    for (size_t v = 0; v < 4; v++) {
      if (r.dw) EXF__F(add_or_set)(r.dw, j + v * EXF__W, end, sw[v], r.acc_w);
      if (r.db) EXF__F(add_or_set)(r.db, j + v * EXF__W, end, sb[v], r.acc_b);
    }
  }
}

/* ---- rows */

/* y (n) = (x - mean) rstd w + b, rstd = 1 / sqrt(mean (x - mean)^2 + eps); rms: mean is
   0 */
EXF__TARGET EXF__KERNEL(EXF__F(norm)) {
  EXF__OPERANDS(exf__norm, r);
  const size_t n = r.n;
  for (size_t row = begin; row < end; row++) {
    const exf_real *x = r.x + row * n;
    EXF__V l[EXF__NV];
    exf_real mu = 0;
    if (!r.rms) {
      EXF__F(fill)(l, EXF__NV, 0);
      EXF__FOR_LANES(at, v, n) l[v] += EXF__PART(x, at, n);
      r.mean[row] = mu = EXF__F(fold)(l, 0) / (exf_real)n;
    }
    EXF__V mean = EXF__SET(mu);
    EXF__F(fill)(l, EXF__NV, 0);
    EXF__FOR_LANES(at, v, n) {
      EXF__V d = EXF__F(load_part)(x, at, n, mu) - mean;
      l[v] = EXF__FMAV(d, d, l[v]);
    }
    exf_real rs = r.rstd[row] = 1 / EXF__SQRT(EXF__F(fold)(l, 0) / (exf_real)n + r.eps);
    EXF__FOR_VECTORS(i, 0, n) {
      EXF__V z = (EXF__PART(x, i, n) - mean) * EXF__SET(rs), w = EXF__PART(r.w, i, n);
      z = r.b ? EXF__FMAV(z, w, EXF__PART(r.b, i, n)) : (EXF__V)(z * w);
      EXF__F(store_part)(r.y + row * n, i, n, z);
    }
  }
}

/* g = dy w, z = (x - mean) rstd: dx (n) = [dx +] rstd (g - mean g - z mean(g z)); rms:
   without the term mean g */
EXF__TARGET EXF__KERNEL(EXF__F(norm_grad)) {
  EXF__OPERANDS(exf__norm, r);
  const size_t n = r.n;
  for (size_t row = begin; row < end; row++) {
    const exf_real *x = r.x + row * n, *dy = r.dy + row * n;
    EXF__V mean = EXF__SET(r.rms ? 0 : r.mean[row]), rstd = EXF__SET(r.rstd[row]);
    EXF__V l1[EXF__NV], l2[EXF__NV];
    EXF__F(fill)(l1, EXF__NV, 0);
    EXF__F(fill)(l2, EXF__NV, 0);
    EXF__FOR_LANES(at, v, n) {
      EXF__V g = EXF__PART(dy, at, n) * EXF__PART(r.w, at, n);
      EXF__V z = (EXF__PART(x, at, n) - mean) * rstd;
      l1[v] += g;
      l2[v] = EXF__FMAV(g, z, l2[v]);
    }
    EXF__V g1 = EXF__SET(r.rms ? 0 : EXF__F(fold)(l1, 0) / (exf_real)n);
    EXF__V g2 = EXF__SET(EXF__F(fold)(l2, 0) / (exf_real)n);
    EXF__FOR_VECTORS(i, 0, n) {
      EXF__V g = EXF__PART(dy, i, n) * EXF__PART(r.w, i, n);
      EXF__V z = (EXF__PART(x, i, n) - mean) * rstd;
      EXF__F(add_or_set)(r.dx + row * n, i, n, rstd * EXF__FMAV(-z, g2, g - g1), r.acc);
    }
  }
}

/* <a, b> in lanes */
EXF__INLINE exf_real EXF__F(dot)(size_t n, const exf_real *a, const exf_real *b) {
  EXF__V l[EXF__NV];
  EXF__F(fill)(l, EXF__NV, 0);
  EXF__FOR_LANES(at, v, n)
    l[v] = EXF__FMAV(EXF__PART(a, at, n), EXF__PART(b, at, n), l[v]);
  return EXF__F(fold)(l, 0);
}

/* The largest entry, or 0 when that is -inf: then every exp(x - max) is 0 and so is the
   sum. Skips NaN, which the sum will not. */
EXF__INLINE exf_real EXF__F(max)(size_t n, const exf_real *x) {
  EXF__V l[EXF__NV];
  EXF__F(fill)(l, EXF__NV, EXF__LOWEST);
  EXF__FOR_LANES(at, v, n)
    l[v] = EXF__MAXV(EXF__F(load_part)(x, at, n, EXF__LOWEST), l[v]);
  exf_real m = EXF__F(fold)(l, 1);
  return m == EXF__LOWEST ? 0 : m;
}

/* y = exp(x - m) -> sum of y; y may be x, or NULL */
EXF__INLINE exf_real EXF__F(exp_sum)(size_t n, const exf_real *x, exf_real m,
                                     exf_real *y) {
  EXF__V l[EXF__NV];
  EXF__F(fill)(l, EXF__NV, 0);
  EXF__FOR_LANES(at, v, n) {
    EXF__V e = EXF__F(load_part)(x, at, n, EXF__LOWEST) - EXF__SET(m);
    e = EXF__F(exp)(e);
    l[v] += e;
    if (y) EXF__F(store_part)(y, at, n, e);
  }
  return EXF__F(fold)(l, 0);
}

/* y (n) = exp(x - m) / sum exp(x - m), m the maximum; 0 without a finite entry */
EXF__TARGET EXF__KERNEL(EXF__F(softmax)) {
  EXF__OPERANDS(exf__rows, r);
  for (size_t row = begin; row < end; row++) {
    const exf_real *x = r.x + row * r.n;
    exf_real *y = r.y + row * r.n, s = EXF__F(exp_sum)(r.n, x, EXF__F(max)(r.n, x), y);
    s = s == 0 ? 0 : 1 / s;
    EXF__FOR_VECTORS(i, 0, r.n)
      EXF__F(store_part)(y, i, r.n, EXF__PART(y, i, r.n) * EXF__SET(s));
  }
}

/* dx (n) = [dx +] y (dy - <y, dy>) */
EXF__TARGET EXF__KERNEL(EXF__F(softmax_grad)) {
  EXF__OPERANDS(exf__rows, r);
  for (size_t row = begin; row < end; row++) {
    const exf_real *y = r.y + row * r.n, *dy = r.dy + row * r.n;
    EXF__V s = EXF__SET(EXF__F(dot)(r.n, y, dy));
    EXF__FOR_VECTORS(i, 0, r.n)
      EXF__F(fma_or_mul)(r.dx + row * r.n, i, r.n, EXF__PART(y, i, r.n),
                         EXF__PART(dy, i, r.n) - s, r.acc);
  }
}

/* y (n) = x - m - log sum exp(x - m) */
EXF__TARGET EXF__KERNEL(EXF__F(log_softmax)) {
  EXF__OPERANDS(exf__rows, r);
  for (size_t row = begin; row < end; row++) {
    const exf_real *x = r.x + row * r.n;
    exf_real m = EXF__F(max)(r.n, x), s = EXF__F(exp_sum)(r.n, x, m, NULL);
    EXF__V lse = EXF__SET(m + exf__log(s));
    EXF__FOR_VECTORS(i, 0, r.n) {
      EXF__V y = EXF__PART(x, i, r.n) - lse;
      EXF__F(store_part)(r.y + row * r.n, i, r.n, s == 0 ? EXF__SET(0) : y);
    }
  }
}

/* dx (n) = [dx +] dy - e^y sum dy. Two zeros in a row of log-probabilities: a row without
   a finite entry. */
EXF__TARGET EXF__KERNEL(EXF__F(log_softmax_grad)) {
  EXF__OPERANDS(exf__rows, r);
  for (size_t row = begin; row < end; row++) {
    const exf_real *y = r.y + row * r.n, *dy = r.dy + row * r.n;
    int empty = r.n > 1 && y[0] == 0 && y[1] == 0;
    EXF__V l[EXF__NV];
    EXF__F(fill)(l, EXF__NV, 0);
    EXF__FOR_LANES(at, v, r.n) l[v] += EXF__PART(dy, at, r.n);
    EXF__V s = EXF__SET(EXF__F(fold)(l, 0));
    EXF__FOR_VECTORS(i, 0, r.n) {
      EXF__V d = EXF__F(exp)(EXF__PART(y, i, r.n));
      d = EXF__FMAV(-d, s, EXF__PART(dy, i, r.n));
      EXF__F(add_or_set)(r.dx + row * r.n, i, r.n, empty ? EXF__SET(0) : d, r.acc);
    }
  }
}

/* Row loss, m the maximum: log sum exp(x - m) - (1-s) (x_label - m) - s/n sum (x - m);
   lse = m + log sum exp(x - m). 0 for a negative label. */
EXF__TARGET EXF__KERNEL(EXF__F(cross_entropy)) {
  EXF__OPERANDS(exf__rows, r);
  for (size_t row = begin; row < end; row++) {
    const exf_real *x = r.x + row * r.n;
    int32_t label = r.labels[row];
    r.loss[row] = r.lse[row] = 0;
    if (label < 0) continue;
    exf_real m = EXF__F(max)(r.n, x), s = exf__log(EXF__F(exp_sum)(r.n, x, m, NULL));
    r.lse[row] = m + s;
    s -= (1 - r.smoothing) * (x[label] - m);
    if (r.smoothing != 0) {
      EXF__V l[EXF__NV];
      EXF__F(fill)(l, EXF__NV, 0);
      EXF__FOR_LANES(at, v, r.n) l[v] += EXF__F(load_part)(x, at, r.n, m) - EXF__SET(m);
      s -= r.smoothing / (exf_real)r.n * EXF__F(fold)(l, 0);
    }
    r.loss[row] = s;
  }
}

/* dx (n) = [dx +] g (softmax - q), q = smoothing / n, more by 1 - smoothing at the label:
   the whole row without that, then the label's entry once more. */
EXF__TARGET EXF__KERNEL(EXF__F(cross_entropy_grad)) {
  EXF__OPERANDS(exf__rows, r);
  exf_real q0 = r.smoothing / (exf_real)r.n, q1 = q0 + (1 - r.smoothing);
  for (size_t row = begin; row < end; row++) {
    const exf_real *x = r.x + row * r.n, lse = r.lse[row];
    exf_real *dx = r.dx + row * r.n;
    int32_t label = r.labels[row];
    if (label < 0) {
      for (size_t i = 0; i < r.n; i++) dx[i] = r.acc ? dx[i] + 0 : 0;
      continue;
    }
    exf_real old = r.acc ? dx[label] : 0, z = x[label] - lse;
    exf_real d = r.g * (EXF__EXP_OF_ONE(z) - q1);
    EXF__FOR_VECTORS(i, 0, r.n) {
      EXF__V e = EXF__F(exp)(EXF__PART(x, i, r.n) - EXF__SET(lse));
      EXF__F(add_or_set)(dx, i, r.n, EXF__SET(r.g) * (e - EXF__SET(q0)), r.acc);
    }
    dx[label] = r.acc ? old + d : d;
  }
}

/* ---- experts and the optimizer: one pass over memory each, which is what they cost */

/* out = sum_i a_i e_i, i ascending; range: numbers of one expert */
EXF__TARGET EXF__KERNEL(EXF__F(fuse)) {
  EXF__OPERANDS(exf__experts, f);
  EXF__FOR_VECTORS(j, begin, end) {
    EXF__V s = EXF__SET(f.a[0]) * EXF__PART(f.e, j, end);
    for (size_t i = 1; i < f.n_experts; i++)
      s = EXF__FMAV(EXF__SET(f.a[i]), EXF__PART(f.e + i * f.stride, j, end), s);
    EXF__F(store_part)(f.out, j, end, s);
  }
}

/* dots_i += <g, e_i>: lane sums of blocks, added up in double; range: experts */
EXF__TARGET EXF__KERNEL(EXF__F(dots)) {
  EXF__OPERANDS(exf__experts, f);
  for (size_t j = 0; j < f.size; j += EXF__SUM_BLOCK)
    for (size_t i = begin; i < end; i++)
      f.dots[i] += (double)EXF__F(dot)(EXF__MIN(f.size - j, (size_t)EXF__SUM_BLOCK),
                                       f.g + j, f.e + i * f.stride + j);
}

/* Moments: m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2, at j -> the step
   they ask for */
EXF__INLINE EXF__V EXF__F(adam)(const exf__adam *a, EXF__V g, exf_real *m, exf_real *v,
                                size_t j, size_t n) {
  EXF__V b1 = EXF__SET(a->beta1), c1 = EXF__SET(a->one_minus_beta1);
  EXF__V b2 = EXF__SET(a->beta2), c2 = EXF__SET(a->one_minus_beta2);
  EXF__V mm = EXF__FMAV(b1, EXF__PART(m, j, n), c1 * g);
  EXF__V vv = EXF__FMAV(b2, EXF__PART(v, j, n), c2 * (g * g));
  EXF__F(store_part)(m, j, n, mm);
  EXF__F(store_part)(v, j, n, vv);
  return EXF__SET(a->step) * mm /
         (EXF__SQRTV(vv) * EXF__SET(a->inv_sqrt_bias2) + EXF__SET(a->eps));
}

/* p_i = decay p_i - step, of the moments of scale_i clip G. By blocks, so that G stays in
   the cache while the experts pass. */
EXF__TARGET EXF__KERNEL(EXF__F(adamw)) {
  EXF__OPERANDS(exf__adam, a);
  EXF__V clip = EXF__SET(a.clip), decay = EXF__SET(a.decay);
  for (size_t j0 = begin; j0 < end; j0 += EXF__ADAM_BLOCK)
    for (size_t i = 0; i < a.n_experts; i++) {
      exf_real *p = a.p + i * a.stride, *m = a.m + i * a.stride, *v = a.v + i * a.stride;
      EXF__V scale = EXF__SET(a.scale[i]);
      size_t n = EXF__MIN(end, j0 + EXF__ADAM_BLOCK);
      EXF__FOR_VECTORS(j, j0, n) {
        EXF__V g = scale * (clip * EXF__PART(a.g, j, n));
        EXF__V kept = EXF__PART(p, j, n) * decay;
        EXF__F(store_part)(p, j, n, kept - EXF__F(adam)(&a, g, m, v, j, n));
      }
    }
}

/* p_i = decay p_i - scale_i step, of one m and v (stride) of clip G: every expert takes
   their step, by scale, the sign of its weight. */
EXF__TARGET EXF__KERNEL(EXF__F(adamw_shared)) {
  EXF__OPERANDS(exf__adam, a);
  EXF__V clip = EXF__SET(a.clip), decay = EXF__SET(a.decay);
  EXF__FOR_VECTORS(j, begin, end) {
    EXF__V g = clip * EXF__PART(a.g, j, end);
    EXF__V step = EXF__F(adam)(&a, g, a.m, a.v, j, end);
    for (size_t i = 0; i < a.n_experts; i++) {
      exf_real *p = a.p + i * a.stride;
      EXF__V kept = EXF__PART(p, j, end) * decay;
      EXF__F(store_part)(p, j, end, kept - EXF__SET(a.scale[i]) * step);
    }
  }
}

/* ---- scores of attention */

/* In: s = K Q^T. Out: s = exp(scale s - m), 0 where unseen; m and inv. */
EXF__TARGET EXF__KERNEL(EXF__F(scores_softmax)) {
  EXF__OPERANDS(exf__scores, a);
  size_t seen = a.causal ? EXF__MIN(a.len, a.nk) : a.nk;  /* by every query */
  EXF__V low = EXF__SET(EXF__LOWEST), one = EXF__SET(1);
  for (size_t i = begin; i < end; i += EXF__W) {
    exf_real *s = a.s + i;
    EXF__V top = low, sum = EXF__SET(0);
    for (size_t j = 0; j < a.nk; j++) {
      EXF__V x = EXF__LOAD(s + j * EXF__QUERIES) * EXF__SET(a.scale);
      if (j >= seen) x = EXF__F(mask_below)(x, i, j - seen + 1, EXF__LOWEST);
      top = EXF__MAXV(x, top);
      EXF__STORE(s + j * EXF__QUERIES, x);
    }
    top = EXF__F(zero_where)(top, top, low);
    for (size_t j = 0; j < a.nk; j++) {
      EXF__V e = EXF__F(exp)(EXF__LOAD(s + j * EXF__QUERIES) - top);
      sum += e;
      EXF__STORE(s + j * EXF__QUERIES, e);
    }
    EXF__F(store_part)(a.m, i, end, top);
    EXF__F(store_part)(a.inv, i, end, EXF__F(zero_where)(one / sum, sum, EXF__SET(0)));
  }
}

/* In: out (queries,d) = s^T V. Out: its rows times inv. */
EXF__TARGET EXF__KERNEL(EXF__F(scores_scale)) {
  EXF__OPERANDS(exf__scores, a);
  for (size_t i = begin; i < end; i++) {
    exf_real *out = a.out + i * a.stride;
    EXF__V inv = EXF__SET(a.inv[i]);
    EXF__FOR_VECTORS(j, 0, a.d)
      EXF__F(store_part)(out, j, a.d, inv * EXF__PART(out, j, a.d));
  }
}

/* In: s = K Q^T, dp = V dO^T. Out: s = P = exp(scale s - m) inv, 0 where unseen, and
   dp = dS = scale P (dP - <dout, out>). */
EXF__TARGET EXF__KERNEL(EXF__F(scores_grad)) {
  EXF__OPERANDS(exf__scores, a);
  size_t seen = a.causal ? EXF__MIN(a.len, a.nk) : a.nk;
  EXF__V scale = EXF__SET(a.scale);
  exf_real dots[EXF__QUERIES];
  for (size_t i = begin; i < end; i++) {
    double sum = 0;
    exf__experts e = {1, a.d, 0, NULL, a.out + i * a.stride, a.dout + i * a.stride, NULL,
                      &sum};
    EXF__F(dots)(&e, 0, 1, NULL);
    dots[i] = EXF__R(sum);
  }
  for (size_t i = begin; i < end; i += EXF__W) {
    exf_real *s = a.s + i, *dp = a.dp + i;
    EXF__V m = EXF__PART(a.m, i, end), inv = EXF__PART(a.inv, i, end);
    EXF__V dot = EXF__PART(dots, i, end);
    for (size_t j = 0; j < a.nk; j++) {
      EXF__V p = scale * EXF__LOAD(s + j * EXF__QUERIES) - m;
      EXF__V d = EXF__LOAD(dp + j * EXF__QUERIES) - dot;
      p = EXF__F(exp)(p) * inv;
      if (j >= seen) p = EXF__F(mask_below)(p, i, j - seen + 1, 0);
      EXF__STORE(s + j * EXF__QUERIES, p);
      EXF__STORE(dp + j * EXF__QUERIES, scale * (p * d));
    }
  }
}

static const exf__kernels EXF__F(kernels) = {EXF__ISA, EXF__SCRATCH,
#define EXF__X(name) EXF__F(name),
  EXF__KERNEL_LIST(EXF__X)
#undef EXF__X
};

#undef EXF__ISA
#undef EXF__F
#undef EXF__TARGET
#undef EXF__INLINE
#undef EXF__V
#undef EXF__W
#undef EXF__MR
#undef EXF__MM
#undef EXF__MMZ
#undef EXF__SCRATCH
#undef EXF__SET
#undef EXF__LOAD
#undef EXF__STORE
#undef EXF__FMAV
#undef EXF__MAXV
#undef EXF__MINV
#undef EXF__SQRTV
#undef EXF__EXP_OF_ONE
#undef EXF__FOR_VECTORS
#undef EXF__FOR_LANES

#ifndef EXF__INSTANCE
#if EXF__X86
#define EXF__INSTANCE 2
#include EXF_HEADER_NAME
#undef EXF__INSTANCE
#define EXF__INSTANCE 3
#include EXF_HEADER_NAME
#undef EXF__INSTANCE
#define EXF__INSTANCE 4
#include EXF_HEADER_NAME
#undef EXF__INSTANCE
#elif EXF__ARM
#define EXF__INSTANCE 5
#include EXF_HEADER_NAME
#undef EXF__INSTANCE
#endif

/* ---- which table */

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

/* From the last one downwards; the reference is always there. */
static const exf__kernels *exf__kernels_best(void) {
  int isa = EXF_ISA_NEON;
  while (!exf__kernels_for((exf_isa)isa)) isa--;
  return exf__kernels_for((exf_isa)isa);
}

/* ---- attention of whole heads, made of kernels of any table */

/* Range: (sequence, head) pairs of B sequences of tq queries and tk keys. q, key, value
   have rows q_stride, kv_stride apart; head h is their columns h d .. (h+1) d - 1, d =
   width / heads. When causal, query i sees the first tk - tq + 1 + i keys. out, dout
   (B,tq,width); stat (B,heads,2,tq): m and inv, or NULL. Backward is for tq = tk; rows of
   dq, dkey, dvalue are q_stride apart. */
typedef struct exf__attention {
  const exf__kernels *k;
  size_t tq, tk, heads, width;
  int causal, acc;
  exf_real scale;
  const exf_real *q, *key, *value;
  size_t q_stride, kv_stride;
  exf_real *out, *stat;
  const exf_real *dout;
  exf_real *dq, *dkey, *dvalue;
} exf__attention;

/* Bytes for tk keys, 0 when that overflows: the scratch of gemm, then one or two blocks
   of scores. */
static size_t exf__attention_scratch(const exf__kernels *k, size_t tk) {
  size_t bytes;
  if (!exf__mul_size(tk, 2 * EXF__QUERIES * sizeof(exf_real), &bytes) ||
      !exf__add_size(bytes, k->scratch, &bytes))
    return 0;
  return bytes;
}

/* The attention with its pointers at one pair */
static exf__attention exf__attention_pair(const void *operands, size_t pair) {
  exf__attention a = *(const exf__attention *)operands;
  size_t col = pair % a.heads * (a.width / a.heads), row = pair / a.heads * a.tq;
  size_t in = row * a.q_stride + col, out = row * a.width + col;
  a.q += in;
  a.key += pair / a.heads * a.tk * a.kv_stride + col;
  a.value += pair / a.heads * a.tk * a.kv_stride + col;
  a.out += out;
  if (a.stat) a.stat += 2 * pair * a.tq;
  if (!a.dout) return a;
  a.dout += out;
  a.dq += in;
  a.dkey += in;
  a.dvalue += in;
  return a;
}

/* out (tq,d) = softmax(scale Q K^T) V, stat (2,tq) its maxima and inverse sums */
EXF__KERNEL(exf__attention_forward) {
  for (size_t pair = begin; pair < end; pair++) {
    const exf__attention a = exf__attention_pair(operands, pair);
    const exf__kernels *k = a.k;
    exf_real *s = (exf_real *)(void *)((unsigned char *)scratch + k->scratch);
    exf_real here[2 * EXF__QUERIES];
    size_t d = a.width / a.heads, rows;
    for (size_t i = 0; i < a.tq; i += rows) {
      rows = EXF__MIN((size_t)EXF__QUERIES, a.tq - i);
      size_t len = a.tk - a.tq + i + 1, nk = a.causal ? len + rows - 1 : a.tk;
      exf_real *m = a.stat ? a.stat + i : here, *out = a.out + i * a.width;
      exf_real *inv = m + (a.stat ? a.tq : EXF__QUERIES);
      exf__scores soft = {nk, len, a.causal, a.scale, s, NULL, m, inv, d, a.width, out,
                          NULL};
      /* s (nk,rows) = K Q^T */
      exf__gemm kq = {EXF__BY_ROWS, nk, rows, d, a.key, a.q + i * a.q_stride, NULL, s,
                      a.kv_stride, 1, 1, a.q_stride, EXF__QUERIES, 0, 0, 0, 0, 1};
      /* out (rows,d) = s^T V, still to be divided by the sums */
      exf__gemm sv = {EXF__BY_ROWS, rows, d, nk, s, a.value, NULL, out, 1, EXF__QUERIES,
                      a.kv_stride, 1, a.width, 0, 0, 0, 0, 0};
      k->gemm(&kq, 0, nk, scratch);
      k->scores_softmax(&soft, 0, rows, scratch);
      k->gemm(&sv, 0, rows, scratch);
      k->scores_scale(&soft, 0, rows, scratch);
    }
  }
}

/* P = softmax, dP = dO V^T: dV = P^T dO; dS = scale P (dP - <dO, out>); dQ = dS K;
   dK = dS^T Q. From the last block of queries, which sees all keys, to the first, so that
   it may overwrite dK and dV, to which the others add. */
EXF__KERNEL(exf__attention_backward) {
  for (size_t pair = begin; pair < end; pair++) {
    const exf__attention a = exf__attention_pair(operands, pair);
    const exf__kernels *k = a.k;
    exf_real *s = (exf_real *)(void *)((unsigned char *)scratch + k->scratch);
    exf_real *dp = s + EXF__QUERIES * a.tk;
    size_t d = a.width / a.heads, t = a.tq, qs = a.q_stride, ks = a.kv_stride;
    size_t i = (t + EXF__QUERIES - 1) / EXF__QUERIES * EXF__QUERIES;
    while (i) {
      int acc_kv = a.acc || i < t;
      i -= EXF__QUERIES;
      size_t rows = EXF__MIN((size_t)EXF__QUERIES, t - i), nk = a.causal ? i + rows : t;
      const exf_real *q = a.q + i * qs, *dout = a.dout + i * a.width;
      exf__scores soft = {nk, i + 1, a.causal, a.scale, s, dp, a.stat + i,
                          a.stat + t + i, d, a.width, a.out + i * a.width, dout};
      /* s (nk,rows) = K Q^T, dp = V dO^T */
      exf__gemm kq = {EXF__BY_ROWS, nk, rows, d, a.key, q, NULL, s, ks, 1, 1, qs,
                      EXF__QUERIES, 0, 0, 0, 0, 1};
      exf__gemm vo = {EXF__BY_ROWS, nk, rows, d, a.value, dout, NULL, dp, ks, 1, 1,
                      a.width, EXF__QUERIES, 0, 0, 0, 0, 1};
      /* dq (rows,d) = [dq +] dp^T K; dk (nk,d) = [dk +] dp Q; dv = [dv +] s dO */
      exf__gemm dq = {EXF__BY_ROWS, rows, d, nk, dp, a.key, NULL, a.dq + i * qs, 1,
                      EXF__QUERIES, ks, 1, qs, 0, 0, 0, a.acc, 0};
      exf__gemm dk = {EXF__BY_ROWS, nk, d, rows, dp, q, NULL, a.dkey, EXF__QUERIES, 1,
                      qs, 1, qs, 0, 0, 0, acc_kv, 0};
      exf__gemm dv = {EXF__BY_ROWS, nk, d, rows, s, dout, NULL, a.dvalue, EXF__QUERIES, 1,
                      a.width, 1, qs, 0, 0, 0, acc_kv, 0};
      k->gemm(&kq, 0, nk, scratch);
      k->gemm(&vo, 0, nk, scratch);
      k->scores_grad(&soft, 0, rows, scratch);
      k->gemm(&dq, 0, rows, scratch);
      k->gemm(&dk, 0, nk, scratch);
      k->gemm(&dv, 0, nk, scratch);
    }
  }
}


/* ---- files of the operating system ------------------------------------ >>system */

/* The hooks of exf_files that a context uses when it is given none: unbuffered calls, so
   that nothing lies in a buffer when the file is flushed. Windows has the calls of POSIX
   that are needed most under names with an underscore before them: EXF__OS(name) is the
   local name. A handle is the descriptor plus one, as NULL means failure. */
#ifndef EXF_NO_STDIO
#include <fcntl.h>
#include <sys/stat.h>

#ifdef _WIN32
#include <io.h>
__declspec(dllimport) int __stdcall MoveFileExA(const char *from, const char *to,
                                                unsigned long flags);
#define EXF__OS(name) _##name
#define EXF__OPEN_FLAGS _O_BINARY
#define EXF__OPEN_MODE (_S_IREAD | _S_IWRITE)
#define EXF__FLUSH _commit
#else
#include <unistd.h>
#define EXF__OS(name) name
#ifdef O_CLOEXEC
#define EXF__OPEN_FLAGS O_CLOEXEC
#else
#define EXF__OPEN_FLAGS 0
#endif
#define EXF__OPEN_MODE 0666
#define EXF__FLUSH fsync
#endif

/* Most bytes handed to one call: several take no more than an int. */
#define EXF__OS_MOST ((size_t)1 << 30)

static int exf__fd(void *file) { return (int)((intptr_t)file - 1); }

/* What a signal interrupts is done again, but for closing. */
static void *exf__os_open(void *user, const char *path, int writing) {
  int flags = writing ? EXF__OS(O_WRONLY) | EXF__OS(O_CREAT) | EXF__OS(O_TRUNC)
                      : EXF__OS(O_RDONLY);
  (void)user;
  for (;;) {
    int fd = EXF__OS(open)(path, flags | EXF__OPEN_FLAGS, EXF__OPEN_MODE);
    if (fd >= 0) return (void *)((intptr_t)fd + 1);
    if (errno != EINTR) return NULL;
  }
}

static int64_t exf__os_read(void *user, void *file, void *data, size_t bytes) {
  const unsigned most = (unsigned)EXF__MIN(bytes, EXF__OS_MOST);
  (void)user;
  for (;;) {
    int64_t n = (int64_t)EXF__OS(read)(exf__fd(file), data, most);
    if (n >= 0 || errno != EINTR) return n;
  }
}

static int64_t exf__os_write(void *user, void *file, const void *data, size_t bytes) {
  const unsigned most = (unsigned)EXF__MIN(bytes, EXF__OS_MOST);
  (void)user;
  for (;;) {
    int64_t n = (int64_t)EXF__OS(write)(exf__fd(file), data, most);
    if (n >= 0 || errno != EINTR) return n;
  }
}

/* An interrupted close has freed the descriptor: trying again could close another's. */
static int exf__os_close(void *user, void *file) {
  (void)user;
  return EXF__OS(close)(exf__fd(file)) == 0 || errno == EINTR ? 0 : -1;
}

/* To the device, not only to the operating system. */
static int exf__os_sync(void *user, void *file) {
  (void)user;
#ifdef F_FULLFSYNC /* where fsync stops at the drive's own cache */
  if (fcntl(exf__fd(file), F_FULLFSYNC) == 0) return 0;
#endif
  for (;;) {
    if (EXF__FLUSH(exf__fd(file)) == 0) return 0;
    if (errno != EINTR) return -1;
  }
}

static int exf__os_remove(void *user, const char *path) {
  (void)user;
  return remove(path) == 0 ? 0 : -1;
}

#ifdef _WIN32

static int64_t exf__os_size(void *user, void *file) {
  (void)user;
  return (int64_t)_filelengthi64(exf__fd(file));
}

/* 1: replace what is there; 8: return when it is on the device. */
static int exf__os_rename(void *user, const char *from, const char *to) {
  (void)user;
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

/* Only a regular file has a size that a later read can be held to. */
static int64_t exf__os_size(void *user, void *file) {
  struct stat info;
  (void)user;
  if (fstat(exf__fd(file), &info) != 0) return -1;
  if (S_ISREG(info.st_mode)) return (int64_t)info.st_size;
  errno = S_ISDIR(info.st_mode) ? EISDIR : EINVAL;
  return -1;
}

/* Atomic, and replaces what is there. */
static int exf__os_rename(void *user, const char *from, const char *to) {
  (void)user;
  return rename(from, to) == 0 ? 0 : -1;
}

/* File systems that cannot flush a folder say EINVAL: there is nothing to wait for. */
static int exf__os_sync_dir(void *user, const char *path) {
  char folder[4096] = ".";
  const char *slash = strrchr(path, '/');
  size_t n = !slash ? 0 : slash == path ? 1 : (size_t)(slash - path);
  if (n >= sizeof folder) {
    errno = ENAMETOOLONG;
    return -1;
  }
  if (n > 0) memcpy(folder, path, n);   /* the rest of it is zeros */
  void *file = exf__os_open(user, folder, 0);
  if (!file) return -1;
  int r = exf__os_sync(user, file), cause = errno;
  exf__os_close(user, file);
  errno = cause;
  return r == 0 || cause == EINVAL ? 0 : -1;
}

#endif

/* In the order of the members of exf_files. */
static const exf_files *exf__files_default(void) {
  static const exf_files hooks = {
      NULL,         exf__os_open,  exf__os_size,   exf__os_read,   exf__os_write,
      exf__os_sync, exf__os_close, exf__os_rename, exf__os_remove, exf__os_sync_dir};
  return &hooks;
}

#else /* EXF_NO_STDIO */

/* No file is opened without hooks of the caller's own. */
static const exf_files *exf__files_default(void) { return NULL; }

#endif

/* ---- context, memory, errors ------------------------------------------ >>memory */

/* The context is the only place where anything is kept between calls: the first error,
   the settings, the tape, the memory of a step. Memory has two lifetimes. Blocks live
   until they are freed: parameters, moments, caches. The step arena is a chain of chunks
   that exf_rewind empties without giving anything back: a step asks for what the step
   before it asked for, so from the second step on nothing is allocated, and nobody has to
   guess a size. Every block and every piece of the arena starts on a cache line. */
#define EXF__ALIGN 64

/* Bytes of a new chunk when the arena holds so many; a test may want every request to be
   a chunk of its own. */
#ifndef EXF__CHUNK
#define EXF__CHUNK(held) EXF__MAX((size_t)1 << 20, (held) / 4)
#endif

typedef struct exf__block {     /* stands in front of every block */
  void *base;                   /* what the allocator returned */
  size_t bytes;                 /* as asked of the allocator */
} exf__block;

/* Chunks are filled in order and kept for ever: the first one holds what a small step
   needs, later ones what larger steps needed beyond it. */
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

typedef struct exf__pace {      /* how fast one kernel is on a team and on one thread */
  uintptr_t kernel;
  double rate[2];               /* seconds for a unit of work: one thread, a team */
  unsigned left, wait;          /* turns until the other way is tried; the last wait */
  int team;                     /* the better way */
} exf__pace;
#define EXF__N_PACES 64

struct exf_ctx {
  exf_desc desc;                /* n_threads and isa resolved */
  exf_files files;
  const exf__kernels *k;
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

/* ---- errors */

EXF_API const char *exf_status_name(exf_status status) {
  static const char *const names[] = {
#define EXF__X(name, text) "EXF_" #name,
      EXF_STATUS_LIST(EXF__X)
#undef EXF__X
  };
  return (unsigned)status < (unsigned)EXF_N_STATUS ? names[status] : "EXF_?";
}

/* Only the first error is kept: what follows is usually its consequence. Whoever finds a
   status that is not EXF_OK returns at once, so a message always names the cause. */
EXF_API exf_status exf_fail(exf_ctx *ctx, exf_status status, const char *format, ...) {
  va_list args;
  if (!ctx || ctx->status != EXF_OK || status == EXF_OK) return status;
  ctx->status = status;
  va_start(args, format);
  vsnprintf(ctx->message, sizeof ctx->message, format, args);
  va_end(args);
  return status;
}

/* A line for the log, if there is one: something worth knowing, not an error. */
static void exf__notice(exf_ctx *ctx, const char *format, ...) {
  char line[512];
  va_list args;
  if (!ctx->desc.log) return;
  va_start(args, format);
  vsnprintf(line, sizeof line, format, args);
  va_end(args);
  ctx->desc.log(ctx->desc.log_user, line);
}

EXF_API exf_status exf_ctx_status(const exf_ctx *c) { return c ? c->status : EXF_MEMORY; }
EXF_API const char *exf_error(const exf_ctx *ctx) {
  return ctx ? ctx->message : "memory: the context could not be allocated";
}
EXF_API void exf_error_clear(exf_ctx *ctx) {
  if (!ctx) return;
  ctx->status = EXF_OK;
  ctx->message[0] = 0;
}

/* ---- blocks */

static void *exf__system_alloc(void *user, size_t bytes) {
  return (void)user, malloc(bytes);
}
static void exf__system_free(void *user, void *block) { (void)user, free(block); }

/* A block that exf__free ends; not cleared. NULL and an error when there is none. */
static void *exf__alloc(exf_ctx *ctx, size_t bytes) {
  size_t total;
  if (!exf__add_size(bytes, EXF__ALIGN + sizeof(exf__block), &total)) {
    exf_fail(ctx, EXF_SIZE, "memory: %zu bytes do not fit into size_t", bytes);
    return NULL;
  }
  unsigned char *base = (unsigned char *)ctx->desc.alloc(ctx->desc.alloc_user, total);
  if (!base) {
    exf_fail(ctx, EXF_MEMORY, "memory: the allocator refused %zu bytes: free some, or "
             "use a smaller model or batch", bytes);
    return NULL;
  }
  unsigned char *data = base + sizeof(exf__block);
  data += (EXF__ALIGN - (uintptr_t)data % EXF__ALIGN) % EXF__ALIGN;
  exf__block *head = (exf__block *)(void *)(data - sizeof(exf__block));
  head->base = base;
  head->bytes = total;
  ctx->stats.n_allocs++;
  ctx->stats.bytes += total;
  ctx->stats.bytes_peak = EXF__MAX(ctx->stats.bytes_peak, ctx->stats.bytes);
  return data;
}

/* Ends a block; NULL is fine. */
static void exf__free(exf_ctx *ctx, void *data) {
  if (!data) return;
  exf__block *head = (exf__block *)(void *)((unsigned char *)data - sizeof(exf__block));
  ctx->stats.bytes -= head->bytes;
  ctx->desc.free(ctx->desc.alloc_user, head->base);
}

/* n elements of `size` bytes, the product checked; calloc: cleared. */
static void *exf__alloc_n(exf_ctx *ctx, size_t n, size_t size) {
  size_t bytes;
  if (exf__mul_size(n, size, &bytes)) return exf__alloc(ctx, bytes);
  exf_fail(ctx, EXF_SIZE, "memory: %zu x %zu bytes do not fit into size_t", n, size);
  return NULL;
}

static void *exf__calloc_n(exf_ctx *ctx, size_t n, size_t size) {
  void *data = exf__alloc_n(ctx, n, size);
  if (data && n && size) memset(data, 0, n * size);
  return data;
}

/* Makes room for `more` pointers in a growing array of n, which moves when it is full:
   array points at the pointer to it. Doubling makes the cost of all moves linear. */
static int exf__grow(exf_ctx *ctx, void *array, size_t n, size_t more, size_t *room) {
  void **old = *(void ***)array;
  size_t want = 2 * n + more + 16;
  if (more <= *room - n) return 1;
  void **fresh = (void **)exf__alloc_n(ctx, want, sizeof(void *));
  if (!fresh) return 0;
  if (n) memcpy(fresh, old, n * sizeof(void *));
  exf__free(ctx, old);
  *(void ***)array = fresh;
  *room = want;
  return 1;
}

/* A copy of a text, to be ended by exf__free. */
static char *exf__strdup(exf_ctx *ctx, const char *s) {
  size_t n = strlen(s) + 1;
  char *copy = (char *)exf__alloc(ctx, n);
  if (copy) memcpy(copy, s, n);
  return copy;
}

/* ---- the step arena */

/* The next chunk with room for `bytes`: one of an earlier step, or a new one. */
static int exf__arena_chunk(exf_ctx *ctx, size_t bytes) {
  while (ctx->chunk && bytes > ctx->chunk->size - ctx->chunk->used && ctx->chunk->next) {
    ctx->chunk = ctx->chunk->next;
    ctx->chunk->used = 0;
  }
  if (ctx->chunk && bytes <= ctx->chunk->size - ctx->chunk->used) return 1;
  size_t want = EXF__MAX(bytes, EXF__CHUNK(ctx->arena_bytes));
  exf__chunk *c = (exf__chunk *)exf__alloc(ctx, sizeof(exf__chunk));
  if (!c) return 0;
  c->data = (unsigned char *)exf__alloc(ctx, want);
  if (!c->data) {
    exf__free(ctx, c);
    return 0;
  }
  c->next = NULL;
  c->size = want;
  c->used = 0;
  ctx->arena_bytes += want;
  if (ctx->chunk) ctx->chunk->next = c;
  else ctx->first = c;
  ctx->chunk = c;
  return 1;
}

/* n elements of the step arena, not cleared. NULL after an error. */
static void *exf__arena(exf_ctx *ctx, size_t n, size_t size) {
  size_t bytes;
  if (!ctx || ctx->status != EXF_OK) return NULL;
  if (!exf__mul_size(n, size, &bytes) || bytes > SIZE_MAX - 2 * EXF__ALIGN) {
    exf_fail(ctx, EXF_SIZE, "memory: %zu x %zu bytes do not fit into size_t", n, size);
    return NULL;
  }
  bytes = (bytes + EXF__ALIGN - 1) / EXF__ALIGN * EXF__ALIGN;
  if (!exf__arena_chunk(ctx, bytes)) return NULL;
  ctx->chunk->used += bytes;
  ctx->arena_used += bytes;
  ctx->stats.arena_peak = EXF__MAX(ctx->stats.arena_peak, ctx->arena_used);
  return ctx->chunk->data + (ctx->chunk->used - bytes);
}

/* The tape goes with the tensors it points at. Its number changes, so that a loss from
   before can be told from one that is alive (exf_backward). */
EXF_API void exf_rewind(exf_ctx *ctx) {
  if (!ctx) return;
  ctx->chunk = ctx->first;
  if (ctx->chunk) ctx->chunk->used = 0;
  ctx->arena_used = 0;
  ctx->tape = NULL;
  ctx->n_tapes++;
  ctx->free_gbufs = NULL;
}

/* ---- the context */

EXF_API const char *exf_isa_name(exf_isa isa) {
  static const char *const names[] = {"auto", "ref", "sse2", "avx2", "avx512", "neon"};
  return (unsigned)isa < 6u ? names[isa] : "?";
}

/* Gives back the arena and the work spaces. Models, optimizers and caches made with the
   context are not known here: they are freed before it. */
EXF_API void exf_ctx_free(exf_ctx *ctx) {
  if (!ctx) return;
  for (exf__chunk *c = ctx->first, *next; c; c = next) {
    next = c->next;
    exf__free(ctx, c->data);
    exf__free(ctx, c);
  }
  for (int i = 0; ctx->scratch && i < ctx->desc.n_threads; i++)
    exf__free(ctx, ctx->scratch[i]);
  exf__free(ctx, ctx->scratch);
  ctx->desc.free(ctx->desc.alloc_user, ctx);
}

/* An instruction set that is not there leaves a context that holds the error. */
static void exf__ctx_kernels(exf_ctx *ctx) {
  exf_isa isa = ctx->desc.isa;
  ctx->k = isa == EXF_ISA_AUTO ? exf__kernels_best() : exf__kernels_for(isa);
  if (!ctx->k) {
    exf_fail(ctx, EXF_ARG, "isa: %s is not available on this processor or in this build: "
             "use auto or ref", exf_isa_name(isa));
    ctx->k = exf__kernels_best();
  }
  ctx->desc.isa = ctx->k->isa;
}

/* The context itself comes from the allocator, too, but not by exf__alloc, which needs
   one. More than 256 threads gain nothing on the sizes this library is made for. */
EXF_API exf_ctx *exf_ctx_new(const exf_desc *desc) {
  exf_desc d;
  memset(&d, 0, sizeof d);
  if (desc) d = *desc;
  if (!d.alloc || !d.free) {
    d.alloc = exf__system_alloc;
    d.free = exf__system_free;
  }
  exf_ctx *ctx = (exf_ctx *)d.alloc(d.alloc_user, sizeof(exf_ctx));
  if (!ctx) return NULL;
  memset(ctx, 0, sizeof *ctx);
  ctx->desc = d;
  ctx->grad_on = 1;
#if EXF__OPENMP
  if (d.n_threads <= 0) ctx->desc.n_threads = omp_get_num_procs();
#endif
  ctx->desc.n_threads = EXF__MIN(EXF__MAX(ctx->desc.n_threads, 1), 256);
  if (d.files) ctx->files = *d.files;
  else if (exf__files_default()) ctx->files = *exf__files_default();
  ctx->stats.n_allocs = 1;
  ctx->stats.bytes = ctx->stats.bytes_peak = sizeof(exf_ctx);
  exf__ctx_kernels(ctx);
  ctx->scratch =
      (void **)exf__calloc_n(ctx, (size_t)ctx->desc.n_threads, sizeof(void *));
  if (ctx->scratch) return ctx;
  exf_ctx_free(ctx);
  return NULL;
}

EXF_API exf_desc exf_ctx_desc(const exf_ctx *ctx) {
  static const exf_desc none = {0, 0, EXF_ISA_AUTO, NULL, NULL, NULL, NULL, NULL, NULL};
  return ctx ? ctx->desc : none;
}
EXF_API exf_stats exf_ctx_stats(const exf_ctx *ctx) {
  static const exf_stats none = {0, 0, 0, 0, 0};
  return ctx ? ctx->stats : none;
}

/* ---- modes: each call returns what was set, to be given back at the end of a scope */

static int exf__mode_set(int *mode, int on) {
  int was = *mode;
  *mode = on != 0;
  return was;
}

EXF_API int exf_training_set(exf_ctx *ctx, int on) {
  return ctx ? exf__mode_set(&ctx->training, on) : 0;
}
EXF_API int exf_grad_set(exf_ctx *ctx, int on) {
  return ctx ? exf__mode_set(&ctx->grad_on, on) : 0;
}
EXF_API int exf_routing_set(exf_ctx *ctx, int on) {
  return ctx ? exf__mode_set(&ctx->routing, on) : 0;
}

/* The calls of dropout within a step are numbered from here, each with a stream of its
   own. */
EXF_API void exf_step_begin(exf_ctx *ctx, uint64_t step) {
  if (!ctx) return;
  ctx->step = (uint32_t)step;
  ctx->n_dropouts = 0;
}

/* ---- threads -------------------------------------------------------- >>threads_impl */

/* A kernel's range is split over threads, a piece for each: what is split is always an
   output, never a sum, so the bits do not depend on the number of threads. Little work
   stays on one thread. A team waits for its slowest thread, and on a busy machine one may
   not be running at all: then one thread is many times faster. So both ways are timed,
   kernel by kernel: the better one is taken, the other tried again after 16 to 1024
   turns. */
#define EXF__THREAD_WORK 2e6

typedef struct exf__split {
  size_t n, grain;      /* the range [0, n), in pieces that begin at multiples of grain */
  double work;          /* roughly the operations in all */
  size_t scratch;       /* bytes of work space that each piece receives */
} exf__split;

static exf__split exf__split_make(size_t n, size_t grain, double work) {
  exf__split s = {n, grain, work, 0};
  return s;
}

/* The record of a kernel: a hash table by its address, which never empties. */
#if EXF__OPENMP
static exf__pace *exf__pace_of(exf_ctx *ctx, exf__kernel *kernel) {
  union { exf__kernel *kernel; uintptr_t bits; } key;
  exf__pace *p = ctx->paces;
  key.kernel = kernel;
  for (size_t i = 0; i < EXF__N_PACES; i++) {
    p = &ctx->paces[(key.bits / 16 + i) % EXF__N_PACES];
    if (p->kernel == 0) p->team = 1;
    if (p->kernel == 0 || p->kernel == key.bits) break;
  }
  p->kernel = key.bits;
  return p;
}

/* Whether this turn is a team's: the better way, or the other one when it is due */
static int exf__pace_team(exf__pace *p) { return p->left == 0 ? !p->team : p->team; }

/* rate: seconds for each unit of work, this time. The better way keeps a running mean,
   so that one disturbed turn does not decide; it loses its place when it is a half slower
   than the other was, or when a trial of the other was faster. */
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

/* Work space of `bytes` for each of n threads; 0 when memory runs out. */
static int exf__scratch_ready(exf_ctx *ctx, int n, size_t bytes) {
  if (bytes > ctx->scratch_bytes) {
    for (int i = 0; i < ctx->desc.n_threads; i++) {
      exf__free(ctx, ctx->scratch[i]);
      ctx->scratch[i] = NULL;
    }
    ctx->scratch_bytes = bytes;
  }
  for (int i = 0; bytes && i < n; i++) {
    if (!ctx->scratch[i]) ctx->scratch[i] = exf__alloc(ctx, ctx->scratch_bytes);
    if (!ctx->scratch[i]) return 0;
  }
  return 1;
}

/* Runs the kernel over the whole range: thread t of T takes the pieces
   pieces t / T .. pieces (t + 1) / T - 1. Returns when all are done; when memory for the
   work space ran out the context has the error and nothing was computed. */
static void exf__parallel(exf_ctx *ctx, exf__kernel *kernel, const void *operands,
                          const exf__split *split) {
  size_t n = split->n, grain = split->grain, pieces = (n + grain - 1) / grain;
  int n_threads = split->work < EXF__THREAD_WORK || !EXF__OPENMP ? 1
                                                                 : ctx->desc.n_threads;
  if (n == 0) return;
  if ((size_t)n_threads > pieces) n_threads = (int)pieces;
#if EXF__OPENMP
  exf__pace *pace = n_threads > 1 ? exf__pace_of(ctx, kernel) : NULL;
  double start = pace ? omp_get_wtime() : 0;
  if (pace && !exf__pace_team(pace)) n_threads = 1;
#endif
  if (!exf__scratch_ready(ctx, n_threads, split->scratch)) return;
#if EXF__OPENMP
#pragma omp parallel for schedule(static, 1) num_threads(n_threads) if (n_threads > 1)
#endif
  for (int t = 0; t < n_threads; t++) {
    size_t begin = pieces * (size_t)t / (size_t)n_threads * grain;
    size_t end = pieces * ((size_t)t + 1) / (size_t)n_threads * grain;
    if (end > n) end = n;
    if (begin < end) kernel(operands, begin, end, ctx->scratch[t]);
  }
#if EXF__OPENMP
  if (pace)
    exf__pace_update(pace, n_threads > 1, (omp_get_wtime() - start) / split->work);
#endif
}

/* ---- random numbers --------------------------------------------------- >>random */

/* A draw is a pure function of (seed, stream, step, index): there is no state that
   evaluation, logging, threads or a resumed run could disturb. Streams are named after
   what is drawn, a parameter for example. */

/* Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as
   1, 2, 3", 2011): ten rounds of multiply and xor turn a counter into four numbers. */
static void exf__philox(uint64_t seed, uint32_t stream, uint32_t step, uint64_t block,
                        uint32_t out[4]) {
  uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = step, c3 = stream;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

EXF_API uint32_t exf_rng_u32(uint64_t seed, uint32_t stream, uint32_t step,
                             uint64_t index) {
  uint32_t r[4];
  exf__philox(seed, stream, step, index >> 2, r);
  return r[index & 3];
}

/* 53 bits of two draws as a whole number below 2^53 */
static double exf__rng_53(uint32_t high, uint32_t low) {
  return (double)((((uint64_t)high << 32) | low) >> 11);
}

EXF_API double exf_rng_uniform(uint64_t seed, uint32_t stream, uint32_t step,
                               uint64_t index) {
  uint32_t r[4];
  exf__philox(seed, stream, step, index, r);
  return exf__rng_53(r[0], r[1]) / 9007199254740992.0;
}

/* Box and Muller: sqrt(-2 log u) cos(2 pi v), u in (0,1], v in [0,1) */
EXF_API double exf_rng_normal(uint64_t seed, uint32_t stream, uint32_t step,
                              uint64_t index) {
  uint32_t r[4];
  exf__philox(seed, stream, step, index, r);
  double u = (exf__rng_53(r[0], r[1]) + 1) / 9007199254740992.0;
  double v = exf__rng_53(r[2], r[3]) / 9007199254740992.0;
  return sqrt(-2 * exf__log_d(u)) * exf__cospi_d(2 * v);
}

/* FNV-1a */
EXF_API uint32_t exf_rng_stream(const char *name) {
  uint32_t h = 2166136261u;
  for (; *name; name++) h = (h ^ (uint32_t)(unsigned char)*name) * 16777619u;
  return h;
}

/* Fisher and Yates, from the end: place i - 1 takes one of the first i. */
EXF_API void exf_rng_permutation(uint64_t seed, uint32_t stream, uint32_t step,
                                 size_t *order, size_t n) {
  for (size_t i = 0; i < n; i++) order[i] = i;
  for (size_t i = n; i > 1; i--) {
    size_t j = (size_t)(exf_rng_uniform(seed, stream, step, i) * (double)i);
    size_t t = order[i - 1];
    order[i - 1] = order[j];
    order[j] = t;
  }
}

/* ---- text --------------------------------------------------------------- >>text */

/* UTF-8, labels for messages, and sorting. Names and paths may come from a hostile file:
   a message shows them as printable ASCII, and sorting takes n log n steps for any
   order. */

/* The number of bytes before the first that is no UTF-8; n when all are. Overlong forms,
   surrogates and code points above U+10FFFF are none. */
static size_t exf__utf8_valid(const char *text, size_t n) {
  const unsigned char *s = (const unsigned char *)text;
  for (size_t i = 0; i < n; i++) {
    unsigned c = s[i], low = 0x80, high = 0xbf;   /* of the second byte */
    if (c < 0x80) continue;
    if (c < 0xc2 || c > 0xf4) return i;
    size_t more = c < 0xe0 ? 1 : c < 0xf0 ? 2 : 3;
    if (c == 0xe0) low = 0xa0;
    if (c == 0xed) high = 0x9f;
    if (c == 0xf0) low = 0x90;
    if (c == 0xf4) high = 0x8f;
    if (more > n - i - 1 || s[i + 1] < low || s[i + 1] > high) return i;
    for (size_t k = 2; k <= more; k++)
      if ((s[i + k] & 0xc0) != 0x80) return i;
    i += more;
  }
  return n;
}

/* Writes a code point to out and returns what is behind it; at most 4 bytes. */
static char *exf__utf8_encode(char *out, unsigned long code) {
  int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  static const unsigned char lead[] = {0, 0xc0, 0xe0, 0xf0};
  *out++ = (char)(lead[more] | code >> 6 * more);
  while (more-- > 0) *out++ = (char)(0x80 | (code >> 6 * more & 0x3f));
  return out;
}

/* Bytes of a path or name in a message, its end included. */
#define EXF__LABEL 160

/* Copies text for a message: printable ASCII as it is, all else as \xNN, and shortened
   at the end (names) or at the start (paths). */
static void exf__label(char *out, const char *text, int is_path) {
  size_t room = EXF__LABEL - 8, n = 0, length = strlen(text), i = 0;
  if (is_path && length > room / 2) {
    i = length - room / 2;
    memcpy(out, "...", 3);
    n = 3;
  }
  for (; i < length && n < room; i++) {
    unsigned char c = (unsigned char)text[i];
    int plain = c >= 0x20 && c < 0x7f && c != '\'' && (c != '\\' || is_path);
    n += (size_t)snprintf(out + n, 5, plain ? "%c" : "\\x%02x", c);
  }
  if (i < length) {
    memcpy(out + n, "...", 3);
    n += 3;
  }
  out[n] = '\0';
}

/* Negative: a before b; 0: equal. */
typedef int exf__compare(const void *a, const void *b);

static void exf__swap(char *a, char *b, size_t size) {
  char t[sizeof(exf_pair)];
  memcpy(t, a, size);
  memcpy(a, b, size);
  memcpy(b, t, size);
}

/* Heap sort, in place, of elements of up to sizeof(exf_pair) bytes: no parent is smaller
   than its children, 2 parent + 1 and 2 parent + 2, so the largest is element 0. First
   the heap is built, from the last parent on; then the largest goes behind the heap, and
   what takes its place sinks. */
static void exf__sort(void *elements, size_t n, size_t size, exf__compare *compare) {
  char *e = (char *)elements;
  size_t sorted = 1, parents = n / 2, heap = n;
  while (sorted < n && compare(e + (sorted - 1) * size, e + sorted * size) <= 0) sorted++;
  if (sorted >= n) return;   /* as the names of most files are */
  while (heap > 1) {
    size_t at = 0, child;
    if (parents > 0) at = --parents;
    else exf__swap(e, e + --heap * size, size);
    for (; (child = 2 * at + 1) < heap; at = child) {
      if (child + 1 < heap && compare(e + child * size, e + (child + 1) * size) < 0)
        child++;
      if (compare(e + at * size, e + child * size) >= 0) break;
      exf__swap(e + at * size, e + child * size, size);
    }
  }
}

/* ---- tensors ------------------------------------------------------ >>tensor_impl */

/* A tensor is a shape and a pointer to its numbers: row-major, contiguous, without
   strides. So an op sees plain arrays, and reshape and detach are views, while permute
   and slice copy. Sizes are checked once, here: whatever exists fits into memory, and
   products of its axes need no further check. */

enum {
  EXF__NEEDS = 1,   /* a gradient with respect to this tensor is wanted */
  EXF__KEEP = 2     /* its gradient outlives backward */
};

EXF_API exf_shape exf_shape_make(int n, size_t a, size_t b, size_t c, size_t d) {
  exf_shape s;
  memset(&s, 0, sizeof s);
  s.n = n;
  s.dim[0] = a, s.dim[1] = b, s.dim[2] = c, s.dim[3] = d;
  return s;
}

/* "(2,3)" for messages */
typedef struct exf__shape_text { char s[160]; } exf__shape_text;

static exf__shape_text exf__show(const exf_shape *s) {
  exf__shape_text t;
  size_t used = 1;
  t.s[0] = '(';
  for (int i = 0; i < s->n && i < EXF_MAX_DIMS; i++)
    used += (size_t)snprintf(t.s + used, sizeof t.s - used, i ? ",%zu" : "%zu",
                             s->dim[i]);
  snprintf(t.s + used, sizeof t.s - used, ")");
  return t;
}

/* Equal number of axes, and equal axes */
static int exf__same(const exf_shape *a, const exf_shape *b) {
  return a->n == b->n && memcmp(a->dim, b->dim, (size_t)a->n * sizeof(size_t)) == 0;
}

/* Number of elements, of the axes begin .. end-1. Sizes of existing tensors only. */
static size_t exf__count(const exf_shape *s, int begin, int end) {
  size_t n = 1;
  for (int i = begin; i < end; i++) n *= s->dim[i];
  return n;
}

static size_t exf__shape_size(const exf_shape *s) { return exf__count(s, 0, s->n); }

/* (N,..) -> (..): the shape of one expert of a set */
static exf_shape exf__one_expert(const exf_shape *s) {
  exf_shape one = exf_shape0();
  one.n = s->n - 1;
  memcpy(one.dim, s->dim + 1, (size_t)one.n * sizeof(size_t));
  return one;
}

/* x as (rows,n), n its last axis; 0 when that does not exist or is empty. */
static int exf__as_rows(const exf_tensor *x, size_t *rows, size_t *n) {
  *rows = *n = 0;
  if (x->shape.n < 1) return 0;
  *n = x->shape.dim[x->shape.n - 1];
  *rows = exf__count(&x->shape, 0, x->shape.n - 1);
  return *n > 0;
}

/* Checks a shape and fills in the size; unused axes become 0. An axis of 0 does not
   excuse the others from the check against overflow. */
static int exf__tensor_init(exf_ctx *ctx, exf_tensor *t, const exf_shape *shape) {
  size_t size = 1, bytes;
  int empty = 0, fits = 1;
  memset(t, 0, sizeof *t);
  if (shape->n < 0 || shape->n > EXF_MAX_DIMS) {
    exf_fail(ctx, EXF_SHAPE, "tensor: %d axes, the limit is %d", shape->n, EXF_MAX_DIMS);
    return 0;
  }
  t->shape.n = shape->n;
  for (int i = 0; i < shape->n && fits; i++) {
    t->shape.dim[i] = shape->dim[i];
    empty |= shape->dim[i] == 0;
    fits = exf__mul_size(size, EXF__MAX(shape->dim[i], 1), &size);
  }
  if (!fits || !exf__mul_size(size, sizeof(exf_real), &bytes) || bytes > SIZE_MAX / 4) {
    exf_fail(ctx, EXF_SIZE, "tensor: shape %s does not fit into size_t",
             exf__show(shape).s);
    return 0;
  }
  t->size = empty ? 0 : size;
  return 1;
}

/* A tensor of the step, with the numbers of `view` or with room for its own. */
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

EXF_API exf_tensor *exf_full(exf_ctx *ctx, exf_shape shape, double value) {
  exf_tensor *t = exf__tensor(ctx, &shape, NULL);
  for (size_t i = 0; t && i < t->size; i++) t->data[i] = EXF__R(value);
  return t;
}

/* The same numbers without a history: what comes of them sends no gradient back. */
EXF_API exf_tensor *exf_detach(exf_ctx *ctx, exf_tensor *x) {
  return x ? exf__tensor(ctx, &x->shape, x->data) : NULL;
}

/* A parameter keeps its gradient anyway, in a place of its own. */
EXF_API exf_tensor *exf_grad_keep(exf_ctx *ctx, exf_tensor *x) {
  if (!ctx || !x || x->param) return x;
  x->flags |= EXF__KEEP;
  if (!x->node && ctx->grad_on) x->flags |= EXF__NEEDS;
  return x;
}

EXF_API double exf_item(const exf_tensor *x) {
  return x && x->size == 1 ? (double)x->data[0] : (double)NAN;
}

/* ---- parameters and models ----------------------------------------- >>model_impl */

/* A model is a registry: parameters in the order of creation, each with a unique name,
   and what goes with them. Optimizers, files, averages and counts are loops over it.
   Everything a constructor adds is undone by one call when it fails half-way.

   An FFN with experts keeps them as parameters (N, ..) of the kind EXF__EXPERTS. Usually
   all of its sets belong to one pool: then the gradient of expert i is a_i G, and only G
   and the sum of the weights a over the backward passes are kept. */

/* Kinds of parameters: ordinary ones; the experts of an FFN; what an FFN's rule needs
   besides, as weights and routers, and what a merge leaves out. */
enum { EXF__PLAIN, EXF__EXPERTS, EXF__FUSION };

typedef struct exf__pool {
  int refs;                   /* parameters that share it */
  size_t n;                   /* experts */
  double *a_sum;              /* (N) of all backward passes since the last update */
  size_t n_sums;
  uint64_t tape;              /* the pass that was added last: its tape and weights */
  const exf_tensor *a;
} exf__pool;

typedef struct exf__owned {   /* a block that goes with the model */
  struct exf__owned *next;
} exf__owned;

typedef struct exf__alias {
  struct exf__alias *next;
  char *name, *target;        /* the target by name: upcycling makes it anew */
} exf__alias;

typedef struct exf__buffer {  /* constants of an FFN's rule, as a memory bank */
  struct exf__buffer *next;
  char *name;
  exf_tensor tensor;
  exf_ffn *ffn;
  int saved;                  /* in checkpoints */
} exf__buffer;

struct exf_model {
  exf_ctx *ctx;
  exf_param **params;         /* (n_params) in the order of creation */
  size_t n_params, room;
  exf_ffn **ffns;
  size_t n_ffns, ffn_room;
  exf__owned *owned;
  exf__alias *aliases;
  exf__buffer *buffers;
  exf_optim *optim;           /* the one that is there, or NULL */
  uint64_t next_id;
};

/* ---- names */

typedef char exf__name[256];

/* "a.b", or b when a is empty */
static int exf__join(exf_ctx *ctx, exf__name out, const char *a, const char *b) {
  if (!a) {
    exf_fail(ctx, EXF_ARG, "name: it is NULL");
    return 0;
  }
  int n = snprintf(out, sizeof(exf__name), *a ? "%s.%s" : "%s%s", a, b);
  if (n > 0 && (size_t)n < sizeof(exf__name)) return 1;
  exf_fail(ctx, EXF_ARG, "name: '%.60s...' is longer than %d bytes", a,
           (int)sizeof(exf__name) - 1);
  return 0;
}

/* Names under which checkpoints hold an optimizer's moments. */
static int exf__moment_name(const char *name) {
  return strncmp(name, "adamw.", 6) == 0 || strncmp(name, "sgd.m.", 6) == 0;
}

/* Why a file could not hold the name beside what it holds already; NULL: it can. */
static const char *exf__name_clash(const exf_model *model, const char *name) {
  size_t n = 0;
  if (!name || !*name) return "empty";
  for (; name[n]; n++)
    if ((unsigned char)name[n] < 32) return "not printable";
  if (exf__utf8_valid(name, n) < n) return "not UTF-8";
  if (exf__moment_name(name) || strcmp(name, "__metadata__") == 0) return "reserved";
  for (size_t i = 0; i < model->n_params; i++) {
    const exf_param *p = model->params[i];
    if (strcmp(p->name, name) == 0) return "already taken";
    if (p->dense_name && strcmp(p->dense_name, name) == 0) return "that of experts";
  }
  for (const exf__alias *a = model->aliases; a; a = a->next)
    if (strcmp(a->name, name) == 0) return "that of an alias";
  for (const exf__buffer *b = model->buffers; b; b = b->next)
    if (strcmp(b->name, name) == 0) return "that of a bank";
  return NULL;
}

/* Whether the name can be given to something new; else an error: "what: the name ..." */
static int exf__name_free(exf_model *model, const char *what, const char *name) {
  const char *clash = exf__name_clash(model, name);
  if (clash) exf_fail(model->ctx, EXF_ARG, "%s: the name '%.80s' is %s", what,
                      name && strcmp(clash, "not printable") != 0 ? name : "", clash);
  return !clash;
}

/* ---- what a model owns */

/* Cleared memory that is freed with the model. */
static void *exf__model_alloc(exf_model *model, size_t bytes) {
  if (!model || model->ctx->status != EXF_OK) return NULL;
  exf__owned *o = (exf__owned *)exf__calloc_n(model->ctx, 1, EXF__ALIGN + bytes);
  if (!o) return NULL;
  o->next = model->owned;
  model->owned = o;
  return (unsigned char *)o + EXF__ALIGN;
}

static char *exf__model_strdup(exf_model *model, const char *s) {
  char *copy = (char *)exf__model_alloc(model, strlen(s) + 1);
  if (copy) memcpy(copy, s, strlen(s) + 1);
  return copy;
}

/* A pool of n experts, in one block; it goes with the last of its parameters. */
static exf__pool *exf__pool_new(exf_ctx *ctx, size_t n) {
  size_t bytes;
  if (!exf__mul_size(n, sizeof(double), &bytes)
      || !exf__add_size(bytes, EXF__ALIGN, &bytes)) {
    exf_fail(ctx, EXF_SIZE, "memory: %zu experts do not fit into size_t", n);
    return NULL;
  }
  exf__pool *pool = (exf__pool *)exf__calloc_n(ctx, 1, bytes);
  if (!pool) return NULL;
  pool->n = n;
  pool->a_sum = (double *)(void *)((unsigned char *)pool + EXF__ALIGN);
  return pool;
}

/* One parameter less holds the pool; the last one ends it. */
static void exf__pool_release(exf_ctx *ctx, exf__pool *pool) {
  if (pool && --pool->refs == 0) exf__free(ctx, pool);
}

static void exf__param_free(exf_ctx *ctx, exf_param *p) {
  if (!p) return;
  exf__pool_release(ctx, p->pool);
  exf__free(ctx, p->tensor.data);
  exf__free(ctx, p->tensor.grad);
  exf__free(ctx, p->dense_name);
  exf__free(ctx, (void *)(uintptr_t)p->name);
  exf__free(ctx, p);
}

static void exf__buffer_free(exf_ctx *ctx, exf__buffer *b) {
  if (!b) return;
  exf__free(ctx, b->tensor.data);
  exf__free(ctx, b->name);
  exf__free(ctx, b);
}

/* A constructor that fails leaves the model as it found it: whatever has been added
   since the mark goes. */
typedef struct exf__mark {
  size_t n_params, n_ffns;
  exf__owned *owned;
  exf__buffer *buffers;
} exf__mark;

/* How far the registry has come. */
static exf__mark exf__model_mark(const exf_model *m) {
  exf__mark none = {0, 0, NULL, NULL};
  if (!m) return none;
  exf__mark mark = {m->n_params, m->n_ffns, m->owned, m->buffers};
  return mark;
}

/* Back to the mark. Parameters and FFNs go from the end, blocks and buffers from the head
   of their lists, where they were added. Returns NULL, for constructors to return. */
static void *exf__model_undo(exf_model *model, const exf__mark *mark) {
  if (!model) return NULL;
  while (model->n_params > mark->n_params)
    exf__param_free(model->ctx, model->params[--model->n_params]);
  while (model->buffers != mark->buffers) {
    exf__buffer *b = model->buffers;
    model->buffers = b->next;
    exf__buffer_free(model->ctx, b);
  }
  model->n_ffns = mark->n_ffns;
  while (model->owned != mark->owned) {
    exf__owned *o = model->owned;
    model->owned = o->next;
    exf__free(model->ctx, o);
  }
  return NULL;
}

EXF_API exf_model *exf_model_new(exf_ctx *ctx) {
  if (!ctx || ctx->status != EXF_OK) return NULL;
  exf_model *m = (exf_model *)exf__calloc_n(ctx, 1, sizeof *m);
  if (m) m->ctx = ctx;
  return m;
}

/* Undoes everything, down to the empty model. */
EXF_API void exf_model_free(exf_model *model) {
  const exf__mark nothing = {0, 0, NULL, NULL};
  if (!model) return;
  exf_ctx *ctx = model->ctx;
  exf__model_undo(model, &nothing);
  exf__free(ctx, model->params);
  exf__free(ctx, model->ffns);
  exf__free(ctx, model);
}

/* ---- parameters */

/* A parameter outside the registry, values not set. */
static exf_param *exf__param_make(exf_model *model, const char *name,
                                  const exf_param_desc *desc) {
  exf_ctx *ctx = model->ctx;
  if (!(desc->init_std - desc->init_std == 0)) {
    exf_fail(ctx, EXF_ARG, "param: '%.80s': init_std %g must be finite", name,
             desc->init_std);
    return NULL;
  }
  exf_param *p = (exf_param *)exf__calloc_n(ctx, 1, sizeof *p);
  if (!p) return NULL;
  if (!exf__tensor_init(ctx, &p->tensor, &desc->shape)
      || !(p->tensor.data = (exf_real *)exf__alloc_n(ctx, p->tensor.size,
                                                     sizeof(exf_real)))
      || !(p->name = exf__strdup(ctx, name))) {
    exf__param_free(ctx, p);
    return NULL;
  }
  p->tensor.param = p;
  p->tensor.flags = EXF__NEEDS;
  p->model = model;
  p->decay = desc->decay;
  p->init_std = desc->init_std;
  p->init_value = desc->init_value;
  p->id = ++model->next_id;
  return p;
}

/* Draws number `draw` (0 for a dense parameter) into out (n): the init distribution of
   p, from the stream of its dense name, times scale. */
static void exf__param_draw(const exf_param *p, const char *dense_name, uint32_t draw,
                            double scale, exf_real *out, size_t n) {
  uint64_t seed = p->model->ctx->desc.seed;
  uint32_t stream = exf_rng_stream(dense_name);
  for (size_t i = 0; i < n; i++)
    out[i] = EXF__R(p->init_std != 0
                        ? scale * p->init_std * exf_rng_normal(seed, stream, draw, i)
                        : p->init_value);
}

/* Puts p at place `at` of the registry; the others move up. */
static int exf__param_insert(exf_model *model, exf_param *p, size_t at) {
  if (!exf__grow(model->ctx, &model->params, model->n_params, 1, &model->room)) return 0;
  memmove(model->params + at + 1, model->params + at,
          (model->n_params - at) * sizeof(exf_param *));
  model->params[at] = p;
  model->n_params++;
  return 1;
}

EXF_API exf_tensor *exf_param_new(exf_model *model, const char *name,
                                  const exf_param_desc *desc) {
  exf_param_desc d;
  memset(&d, 0, sizeof d);
  if (desc) d = *desc;
  if (!model || model->ctx->status != EXF_OK) return NULL;
  if (!exf__name_free(model, "param", name)) return NULL;
  exf_param *p = exf__param_make(model, name, &d);
  if (!p) return NULL;
  exf__param_draw(p, name, 0, 1, p->tensor.data, p->tensor.size);
  if (exf__param_insert(model, p, model->n_params)) return &p->tensor;
  exf__param_free(model->ctx, p);
  return NULL;
}

EXF_API size_t exf_model_n_params(const exf_model *m) { return m ? m->n_params : 0; }
EXF_API exf_param *exf_model_param(const exf_model *model, size_t i) {
  return model && i < model->n_params ? model->params[i] : NULL;
}

EXF_API exf_param *exf_model_find(const exf_model *model, const char *name) {
  for (size_t i = 0; model && name && i < model->n_params; i++)
    if (strcmp(model->params[i]->name, name) == 0) return model->params[i];
  return NULL;
}

/* Files hold an alias as a tensor of its own, equal to its target. */
EXF_API exf_status exf_param_alias(exf_model *model, const char *alias,
                                   const char *name) {
  if (!model) return EXF_ARG;
  exf__mark mark = exf__model_mark(model);
  exf_param *p = exf_model_find(model, name);
  if (!p || p->kind != EXF__PLAIN)
    return exf_fail(model->ctx, EXF_ARG, p ? "alias: '%s' belongs to experts"
                                           : "alias: no parameter '%s'",
                    name ? name : "");
  if (!exf__name_free(model, "alias", alias)) return model->ctx->status;
  exf__alias *a = (exf__alias *)exf__model_alloc(model, sizeof *a);
  if (!a || !(a->name = exf__model_strdup(model, alias))
      || !(a->target = exf__model_strdup(model, name))) {
    exf__model_undo(model, &mark);
    return model->ctx->status;
  }
  a->next = model->aliases;
  model->aliases = a;
  return EXF_OK;
}

EXF_API exf_status exf_param_set(exf_param *p, const exf_real *values, size_t n) {
  if (!p) return EXF_ARG;
  if (!values && n)
    return exf_fail(p->model->ctx, EXF_ARG, "param_set: the values of '%s' are NULL",
                    p->name);
  if (n != p->tensor.size)
    return exf_fail(p->model->ctx, EXF_SHAPE, "param_set: %zu values for '%s' %s, which "
                    "has %zu", n, p->name, exf__show(&p->tensor.shape).s,
                    p->tensor.size);
  if (n) memcpy(p->tensor.data, values, n * sizeof(exf_real));
  p->trained = 1;
  return EXF_OK;
}

/* Ops see the flag, not the parameter: without it nothing is recorded for its sake. */
EXF_API void exf_param_freeze(exf_param *p, int frozen) {
  if (!p) return;
  p->frozen = frozen != 0;
  p->tensor.flags = frozen ? 0u : (unsigned)EXF__NEEDS;
}

/* Values that are no fresh draws any more: what is upcycled next is to be preserved. */
static void exf__model_trained(exf_model *model) {
  for (size_t i = 0; i < model->n_params; i++) model->params[i]->trained = 1;
}

EXF_API size_t exf_model_count(const exf_model *model) {
  size_t n = 0;
  for (size_t i = 0; i < exf_model_n_params(model); i++)
    n += model->params[i]->tensor.size;
  return n;
}

/* ---- gradients of parameters */

/* The buffers stay, to be overwritten by the next backward pass. */
EXF_API void exf_model_zero_grad(exf_model *model) {
  for (size_t i = 0; i < exf_model_n_params(model); i++) {
    exf_param *p = model->params[i];
    p->has_grad = 0;
    if (!p->pool) continue;
    memset(p->pool->a_sum, 0, p->pool->n * sizeof(double));
    p->pool->n_sums = 0;
  }
}

/* Where a parameter gathers: (shape), experts of a pool (shape without N). *acc: add to
   what is there. */
static exf_real *exf__param_grad(exf_param *p, int *acc) {
  size_t n = p->pool ? p->tensor.size / p->pool->n : p->tensor.size;
  if (!p->tensor.grad)
    p->tensor.grad = (exf_real *)exf__alloc_n(p->model->ctx, n, sizeof(exf_real));
  *acc = p->has_grad;
  if (p->tensor.grad) p->has_grad = 1;
  return p->tensor.grad;
}

/* A backward pass went through experts with these weights (N). The sets of an FFN are
   fused one by one with the same weights: they count once. */
static void exf__pool_add(exf__pool *pool, const exf_tensor *a, uint64_t tape) {
  if (pool->n_sums && pool->tape == tape && pool->a == a) return;
  for (size_t i = 0; i < pool->n; i++) pool->a_sum[i] += (double)a->data[i];
  pool->n_sums++;
  pool->tape = tape;
  pool->a = a;
}

/* abar_i: the mean of a_i over the backward passes since the last update */
static exf_real exf__mean_weight(const exf__pool *pool, size_t i) {
  return EXF__R(pool->n_sums ? pool->a_sum[i] / (double)pool->n_sums : 0);
}

/* dL/dth_i = a_i G: (N,..) from abar (N) and G (..) */
EXF_API exf_status exf_expert_grad(exf_param *p, exf_real *out) {
  if (!p || !out) return EXF_ARG;
  exf_ctx *ctx = p->model->ctx;
  if (!p->has_grad)
    return exf_fail(ctx, EXF_STATE, "expert_grad: '%s' has no gradient: call "
                    "exf_backward first", p->name);
  if (!p->pool) {
    memcpy(out, p->tensor.grad, p->tensor.size * sizeof(exf_real));
    return EXF_OK;
  }
  size_t n = p->tensor.size / p->pool->n;
  exf__elements e;
  memset(&e, 0, sizeof e);
  e.x = p->tensor.grad;
  for (size_t i = 0; i < p->pool->n; i++) {
    e.s = exf__mean_weight(p->pool, i);
    e.y = out + i * n;
    ctx->k->axpy(&e, 0, n, NULL);
  }
  return EXF_OK;
}

/* ---- tape --------------------------------------------------------------- >>tape */

/* An op is a row: its name, the rule for its shape, forward, backward. Running it checks,
   allocates the result in the step arena, computes at once, and records a node when an
   input needs a gradient. The nodes hang together from the last to the first: that list
   is the tape, and exf_backward walks it. As a node points at its row, neither running
   nor walking knows any op: all ops stand below, each with its row behind its functions.

   Gradients move without being copied or cleared where that can be avoided: whoever
   writes a gradient first overwrites, and an op that passes its gradient on unchanged
   shares the buffer. */

struct exf__node;

typedef struct exf__op {
  const char *name;            /* in messages */
  /* Checks inputs and arguments; gives the shape of the result, or 0 and an error. */
  int (*shape)(exf_ctx *ctx, struct exf__node *n, exf_shape *out);
  void (*forward)(exf_ctx *ctx, struct exf__node *n);   /* fills all of n->out->data */
  void (*backward)(exf_ctx *ctx, struct exf__node *n);  /* adds to inputs' gradients */
  int kind;                    /* which of a family that shares its functions */
  int view;                    /* 1 + the input whose numbers the result takes over; 0 */
  int experts;                 /* 1 + the input that may be experts of a pool; 0 */
  int own_name;                /* a node's arg.custom.name goes before the row's */
} exf__op;

/* What an op is told besides its inputs. */
typedef union exf__arg {
  double factor;                                         /* scale */
  double eps;                                            /* norms */
  struct { int a, b; } transposed;                       /* matmul */
  struct { int on, op; } activation;                     /* linear: of its input */
  struct { const int32_t *ids; size_t n0, n1; } rows;    /* embedding, gather */
  struct { double p; uint32_t call, step; } dropout;
  exf_shape shape;                                       /* reshape */
  int axes[EXF_MAX_DIMS];                                /* permute */
  struct { int axis; size_t begin, end; } slice;         /* concat: the axis alone */
  struct { unsigned axes; int keep; } reduce;            /* sum, mean, max */
  struct { const int32_t *labels; double smoothing; size_t n_used; } loss;
  exf_attention_desc attention;
  exf_custom_desc custom;
} exf__arg;

typedef struct exf__node {     /* one executed op */
  const exf__op *op;
  exf__arg arg;
  int n_in;
  exf_tensor *in[EXF_MAX_INPUTS];
  exf_tensor *out;
  void *saved;                 /* what forward leaves for backward, in the arena */
  struct exf__node *prev;
  uint64_t tape;               /* ctx->n_tapes when it was recorded */
  int walked;                  /* by exf_backward */
} exf__node;

/* The shape rule fails with op name, shapes and a hint. */
static int exf__bad_shape(exf_ctx *ctx, const exf__node *n, const char *hint) {
  const exf_shape *a = &n->in[0]->shape, *b = n->n_in > 1 ? &n->in[1]->shape : NULL;
  exf_fail(ctx, EXF_SHAPE, "%s: %s%s%s: %s", n->op->name, exf__show(a).s,
           b ? " and " : "", b ? exf__show(b).s : "", hint);
  return 0;
}

/* ---- gradient buffers */

/* Buffers are counted, since two tensors may share one; whoever adds to a shared one
   first copies it. A buffer goes back to the list when the op whose result it belongs to
   has been walked. Ops that need room for a while take it from there, too. */
static exf__gbuf *exf__gbuf_take(exf_ctx *ctx, size_t n) {
  for (exf__gbuf **link = &ctx->free_gbufs; *link; link = &(*link)->next)
    if ((*link)->n == n) {
      exf__gbuf *g = *link;
      *link = g->next;
      g->refs = 1;
      return g;
    }
  exf__gbuf *g = (exf__gbuf *)exf__arena(ctx, 1, sizeof *g);
  if (!g || !(g->data = (exf_real *)exf__arena(ctx, n, sizeof(exf_real)))) return NULL;
  g->n = n;
  g->refs = 1;
  g->next = NULL;
  return g;
}

static void exf__gbuf_release(exf_ctx *ctx, exf__gbuf *g) {
  if (!g || --g->refs > 0) return;
  g->next = ctx->free_gbufs;
  ctx->free_gbufs = g;
}

/* The gradient of the op's result, for its backward. */
static const exf_real *exf__dout(const exf__node *node) { return node->out->gbuf->data; }

/* Where the gradient of t is to be written, or NULL when nobody wants it. *acc: add to
   what is there; else overwrite, so that nothing ever needs to be cleared. */
static exf_real *exf__grad(exf_ctx *ctx, exf_tensor *t, int *acc) {
  *acc = 0;
  if (!(t->flags & EXF__NEEDS)) return NULL;
  if (t->param) return exf__param_grad(t->param, acc);
  if (!t->gbuf) {
    t->gbuf = exf__gbuf_take(ctx, t->size);
    return t->gbuf ? t->gbuf->data : NULL;
  }
  *acc = 1;
  if (t->gbuf->refs > 1) {
    exf__gbuf *old = t->gbuf;
    t->gbuf = exf__gbuf_take(ctx, t->size);
    if (!t->gbuf) return NULL;
    memcpy(t->gbuf->data, old->data, t->size * sizeof(exf_real));
    old->refs--;
  }
  return t->gbuf->data;
}

/* The gradient of t grows by s times that of the op's result (same size). */
static void exf__grad_pass(exf_ctx *ctx, const exf__node *n, exf_tensor *t, double s) {
  exf__elements e;
  if (!(t->flags & EXF__NEEDS)) return;
  if (s == 1.0 && !t->param && !t->gbuf) {
    t->gbuf = n->out->gbuf;
    t->gbuf->refs++;
    return;
  }
  memset(&e, 0, sizeof e);
  e.s = EXF__R(s);
  e.x = exf__dout(n);
  e.y = exf__grad(ctx, t, &e.acc);
  if (e.y) ctx->k->axpy(&e, 0, t->size, NULL);
}

/* ---- running an op */

/* Inputs are there; experts of a pool, which gather one gradient for all, go to ops that
   know it. *needs: some input wants a gradient. */
static int exf__inputs_ok(exf_ctx *ctx, const exf__op *op, exf_tensor *const *in, int n,
                          int *needs) {
  *needs = 0;
  for (int i = 0; i < n; i++) {
    if (!in[i]) {
      exf_fail(ctx, EXF_ARG, "%s: input %d is NULL", op->name, i);
      return 0;
    }
    if (!(in[i]->flags & EXF__NEEDS) || !ctx->grad_on) continue;
    *needs = 1;
    if (!in[i]->param || !in[i]->param->pool || op->experts == i + 1) continue;
    exf_fail(ctx, EXF_ARG, "%s: input %d, '%.60s', holds an FFN's experts: only exf_fuse "
             "takes their gradient; use exf_detach", op->name, i, in[i]->param->name);
    return 0;
  }
  return 1;
}

/* Every op passes here: check, allocate, compute, record. arg: NULL for an op that needs
   none. */
static exf_tensor *exf__run(exf_ctx *ctx, const exf__op *op, exf_tensor *const *in,
                            int n_in, const exf__arg *arg) {
  exf_shape shape;
  int needs;
  if (!ctx || ctx->status != EXF_OK) return NULL;
  if (!exf__inputs_ok(ctx, op, in, n_in, &needs)) return NULL;
  exf__node *node = (exf__node *)exf__arena(ctx, 1, sizeof *node);
  if (!node) return NULL;
  node->op = op;
  node->n_in = n_in;
  for (int i = 0; i < n_in; i++) node->in[i] = in[i];
  node->saved = NULL;
  if (arg) node->arg = *arg;
  if (!op->shape(ctx, node, &shape)) return NULL;
  node->out = exf__tensor(ctx, &shape, op->view ? in[op->view - 1]->data : NULL);
  if (!node->out) return NULL;
  op->forward(ctx, node);
  if (ctx->status != EXF_OK) return NULL;
  ctx->stats.n_ops++;
  if (!needs) return node->out;
  node->out->flags |= EXF__NEEDS;
  node->out->node = node;
  node->prev = ctx->tape;
  node->tape = ctx->n_tapes;
  node->walked = 0;
  ctx->tape = node;
  return node->out;
}

/* ---- walking the tape -------------------------------------------------- >>backward */

/* A NaN or an infinity minus itself is NaN. */
static int exf__finite(const exf_real *x, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (!(x[i] - x[i] == 0)) return 0;
  return 1;
}

/* For messages: an op of the user's has the name that the user gave it. */
static const char *exf__node_name(const exf__node *n) {
  return n->op->own_name && n->arg.custom.name ? n->arg.custom.name : n->op->name;
}

/* The loss is not finite: the first op that made something not finite of finite inputs,
   or whose input was bad to begin with. */
static void exf__blame(exf_ctx *ctx, const exf_tensor *loss) {
  const exf__node *guilty = NULL;
  const char *name = NULL;
  for (const exf__node *n = ctx->tape; n; n = n->prev)
    if (!exf__finite(n->out->data, n->out->size)) guilty = n;
  for (int i = 0; guilty && i < guilty->n_in; i++)
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
  for (int i = 0; i < n->n_in; i++)
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
  n->walked = 1;
  for (int i = 0; i < n->n_in; i++)
    if (!n->in[i]->node && !n->in[i]->param && n->in[i]->gbuf)
      n->in[i]->grad = n->in[i]->gbuf->data;
  if (n->out->flags & EXF__KEEP) {
    n->out->grad = n->out->gbuf->data;
    return;
  }
  exf__gbuf_release(ctx, n->out->gbuf);
  n->out->gbuf = NULL;
}

/* A walk that failed leaves gradients that are not whole: models drop all of theirs. */
static void exf__walk_undo(exf__node *tape) {
  for (; tape; tape = tape->prev)
    for (int i = 0; tape->walked && i < tape->n_in; i++)
      if (tape->in[i]->param) exf_model_zero_grad(tape->in[i]->param->model);
}

/* Whether the loss is a scalar with a graph that has not been used up. */
static exf_status exf__loss_check(exf_ctx *ctx, const exf_tensor *loss) {
  if (!loss || loss->size != 1)
    return exf_fail(ctx, EXF_SHAPE, "backward: the loss must be a scalar, not %s",
                    loss ? exf__show(&loss->shape).s : "NULL");
  if (!(loss->flags & EXF__NEEDS))
    return exf_fail(ctx, EXF_STATE, "backward: the loss depends on no parameter, or was "
                    "made in a no-grad scope");
  if (loss->node && loss->node->tape != ctx->n_tapes)
    return exf_fail(ctx, EXF_STATE, "backward: the tape is used up: a call ends all "
                    "graphs recorded before it; add losses up, or run forward again");
  if (!exf__finite(loss->data, 1)) exf__blame(ctx, loss);
  return ctx->status;
}

/* dL/dL = 1; then every node whose result has a gradient hands it on to its inputs. */
EXF_API exf_status exf_backward(exf_ctx *ctx, exf_tensor *loss) {
  int acc;
  if (!ctx || ctx->status != EXF_OK) return exf_ctx_status(ctx);
  if (exf__loss_check(ctx, loss) != EXF_OK) return ctx->status;
  exf_real *seed = exf__grad(ctx, loss, &acc);
  if (!seed) return ctx->status;
  seed[0] = acc ? seed[0] + 1 : 1;
  if (!loss->node && !loss->param) loss->grad = seed;
  for (exf__node *n = ctx->tape; n && ctx->status == EXF_OK; n = n->prev) {
    if (!n->out->gbuf) continue;
    if (exf__walkable(ctx, n)) n->op->backward(ctx, n);
    exf__walked(ctx, n);
  }
  if (ctx->status != EXF_OK) exf__walk_undo(ctx->tape);
  ctx->tape = NULL;
  ctx->n_tapes++;
  return ctx->status;
}

/* ---- ops: elementwise ------------------------------------------------ >>elementwise */

/* Ops that work on numbers one by one: on one tensor, or on two or three that are
   broadcast. A formula of the value and one of the gradient make an op: macros put the
   loops around them. dx, dy are the gradients of the loss with respect to x, y. */

/* What stands behind an op's functions: its row and, for an op on one tensor x, its
   public function, which sets members of arg from its parameters, if it has any. */
#define EXF__ROW(name, shape, family, kind)                                              \
  static const exf__op exf__op_##name = {                                                \
      #name, shape, family##_forward, family##_backward, kind, 0, 0, 0};
#define EXF__OP(name, shape, family, kind)                                               \
  EXF__ROW(name, shape, family, kind)                                                    \
  EXF_API exf_tensor *exf_##name(exf_ctx *ctx, exf_tensor *x) {                          \
    return exf__run(ctx, &exf__op_##name, &x, 1, NULL);                                  \
  }
#define EXF__OP_ARG(name, shape, family, kind, set, ...)                                 \
  EXF__ROW(name, shape, family, kind)                                                    \
  EXF_API exf_tensor *exf_##name(exf_ctx *ctx, exf_tensor *x, __VA_ARGS__) {             \
    exf__arg arg;                                                                        \
    (set);                                                                               \
    return exf__run(ctx, &exf__op_##name, &x, 1, &arg);                                  \
  }

/* The usual kinds of kernels, on all threads: over n elements, and over rows of n. */
static void exf__run_elements(exf_ctx *ctx, exf__kernel *kernel, const void *operands,
                              size_t n) {
  exf__split s = exf__split_make(n, 256, 16.0 * (double)n);
  exf__parallel(ctx, kernel, operands, &s);
}

static void exf__run_rows(exf_ctx *ctx, exf__kernel *kernel, const void *operands,
                          size_t rows, size_t n) {
  exf__split s = exf__split_make(rows, 4, 8.0 * (double)rows * (double)n);
  exf__parallel(ctx, kernel, operands, &s);
}

/* The shape rule of ops on one tensor */
static int exf__same_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  (void)ctx;
  *out = n->in[0]->shape;
  return 1;
}

/* ---- functions of one tensor: x (..) -> y (..) */

/* y = f(x), dx = [dx +] dy f'(x), computed from x: the functions that a model spends time
   on, for which each instruction set has kernels. What they are stands at
   unary_f, >>bodies. */
static void exf__unary_forward(exf_ctx *ctx, exf__node *n) {
  exf__elements e = {n->op->kind, 0, 0, n->in[0]->data, NULL, NULL, n->out->data, NULL};
  exf__run_elements(ctx, ctx->k->unary, &e, n->out->size);
}

static void exf__unary_backward(exf_ctx *ctx, exf__node *n) {
  exf__elements e = {n->op->kind, 0, 0, n->in[0]->data, NULL, exf__dout(n), NULL, NULL};
  e.dx = exf__grad(ctx, n->in[0], &e.acc);
  if (e.dx) exf__run_elements(ctx, ctx->k->unary_grad, &e, n->out->size);
}

EXF__OP(exp, exf__same_shape, exf__unary, EXF__U_EXP)
EXF__OP(tanh, exf__same_shape, exf__unary, EXF__U_TANH)
EXF__OP(relu, exf__same_shape, exf__unary, EXF__U_RELU)
EXF__OP(gelu, exf__same_shape, exf__unary, EXF__U_GELU)
EXF__OP(gelu_tanh, exf__same_shape, exf__unary, EXF__U_GELU_TANH)
EXF__OP(silu, exf__same_shape, exf__unary, EXF__U_SILU)

/* y = s x, dx = s dy */
static void exf__scale_forward(exf_ctx *ctx, exf__node *n) {
  exf__elements e = {0, 0, EXF__R(n->arg.factor), n->in[0]->data, NULL, NULL,
                     n->out->data, NULL};
  exf__run_elements(ctx, ctx->k->axpy, &e, n->out->size);
}

static void exf__scale_backward(exf_ctx *ctx, exf__node *n) {
  exf__grad_pass(ctx, n, n->in[0], n->arg.factor);
}

EXF__OP_ARG(scale, exf__same_shape, exf__scale, 0, arg.factor = s, double s)
EXF__ROW(neg, exf__same_shape, exf__scale, 0)

EXF_API exf_tensor *exf_neg(exf_ctx *ctx, exf_tensor *x) {
  exf__arg arg;
  arg.factor = -1;
  return exf__run(ctx, &exf__op_neg, &x, 1, &arg);
}

/* ---- rows of a tensor under other strides */

/* A tensor that is repeated along some axes of a larger shape, or lies in it in another
   order, is walked by rows of that shape: where a row begins, and the step along it.
   Broadcasting, permuting, cutting and reducing are this walk. Steps count from the last
   axis, so that step[0] is along a row even where there is no axis at all. */
static size_t exf__row_begin(const exf_shape *full, const size_t *step, size_t row) {
  size_t at = 0;
  for (int i = 1; i < full->n; i++) {
    size_t dim = full->dim[full->n - 1 - i];
    at += row % dim * step[i];
    row /= dim;
  }
  return at;
}

static size_t exf__row_length(const exf_shape *s) { return s->n ? s->dim[s->n - 1] : 1; }

/* Steps of a tensor of shape s itself, 0 along axes of 1: there it may be repeated. */
static void exf__steps(const exf_shape *s, size_t step[EXF_MAX_DIMS]) {
  size_t next = 1;
  memset(step, 0, EXF_MAX_DIMS * sizeof *step);
  for (int i = 0; i < s->n; i++) {
    size_t dim = s->dim[s->n - 1 - i];
    if (dim != 1) step[i] = next;
    next *= dim;
  }
}

/* ---- formulas: a [, b [, c]] -> y, of the shape they make together */

/* Name; y; what the gradients of a, b, c grow by, in terms of a, b, c, y and dy. An input
   that is repeated gathers, row by row, the gradients of all its copies. */
#define EXF__FORMULAS(X)                                                                 \
  X(add, a + b, dy, dy, 0)                                                               \
  X(sub, a - b, dy, -dy, 0)                                                              \
  X(mul, a * b, dy * b, dy * a, 0)                                                       \
  X(div, a / b, dy * (1 / b), dy * (-(a / b) / b), 0)                                    \
  X(where, a != 0 ? b : c, 0, a != 0 ? dy : 0, a != 0 ? 0 : dy)                          \
  X(clamp, a < b ? b : a > c ? c : a, a >= b && a <= c ? dy : 0, 0, 0)                   \
  X(log, exf__log(a), dy / a, 0, 0)                                                      \
  X(sqrt, EXF__SQRT(a), dy / (2 * y), 0, 0)                                              \
  X(square, a * a, 2 * a * dy, 0, 0)                                                     \
  X(abs, EXF__FABS(a), a > 0 ? dy : a < 0 ? -dy : 0, 0, 0)                               \
  X(sigmoid, 1 / (1 + exf__exp(-a)), dy * (y * (1 - y)), 0, 0)

/* Range: rows of y. same: all inputs have its shape */
typedef struct exf__formula {
  exf_shape full;                 /* of y */
  size_t size, n;                 /* numbers of y, of a row (the last may be shorter) */
  const exf_real *in[3];          /* a stands for those that are not there */
  size_t step[3][EXF_MAX_DIMS];
  const exf_real *y, *dy;         /* NULL in forward */
  exf_real *out;                  /* y, or the gradient of input `side` */
  const size_t *out_step;
  int same, side, acc;
  exf__kernel *whole;             /* or NULL: for rows in which nothing is repeated, */
  exf_real s;                     /* with this factor */
} exf__formula;

/* Where all have one shape any rows will do: of 1024, for the threads. */
static exf__formula exf__formula_of(const exf__node *n) {
  exf__formula f;
  memset(&f, 0, sizeof f);
  f.size = n->out->size;
  f.same = 1;
  for (int i = 0; i < n->n_in; i++) f.same &= exf__same(&n->in[i]->shape, &n->out->shape);
  f.full = f.same ? exf_shape2(f.size / 1024 + 1, 1024) : n->out->shape;
  f.n = exf__row_length(&f.full);
  for (int i = 0; i < 3; i++) {
    f.in[i] = n->in[i < n->n_in ? i : 0]->data;
    if (i < n->n_in) exf__steps(f.same ? &f.full : &n->in[i]->shape, f.step[i]);
  }
  return f;
}

/* The loop around one formula: out = [out +] formula, where an input that is repeated
   stands still. Rows in which nothing is may be left to a kernel of the table, with the
   same bits: y = a + b or a b; dx = [dx +] s dy or dy times the other factor. */
#define EXF__FORMULA_KERNEL(name, formula)                                               \
  EXF__KERNEL(name) {                                                                    \
    EXF__OPERANDS(exf__formula, f);                                                      \
    size_t sa = f.step[0][0], sb = f.step[1][0], sc = f.step[2][0], so = f.out_step[0];  \
    int whole = f.whole && so && (f.dy || (sa && sb));                                   \
    for (size_t r = begin; r < end; r++) {                                               \
      const exf_real *pa = f.in[0] + exf__row_begin(&f.full, f.step[0], r);              \
      const exf_real *pb = f.in[1] + exf__row_begin(&f.full, f.step[1], r);              \
      const exf_real *pc = f.in[2] + exf__row_begin(&f.full, f.step[2], r);              \
      const exf_real *py = f.dy ? f.y + r * f.n : pa, *pd = f.dy ? f.dy + r * f.n : pa;  \
      exf_real *to = f.out + exf__row_begin(&f.full, f.out_step, r);                     \
      exf__elements e = {0, f.acc, f.s, pd, f.side ? pa : pb, NULL, to, NULL};           \
      size_t n = EXF__MIN(f.n, f.size - r * f.n), sd = f.dy ? 1 : 0;                     \
      if (whole) f.whole(&e, 0, n, NULL);                                                \
      for (size_t j = 0; j < n && !whole; j++) {                                         \
        const exf_real a = pa[j * sa], b = pb[j * sb], c = pc[j * sc];                   \
        const exf_real y = py[j * sd], dy = pd[j * sd];                                  \
        to[j * so] = f.acc ? to[j * so] + (formula) : (formula);                         \
        (void)a, (void)b, (void)c, (void)y, (void)dy;                                    \
      }                                                                                  \
    }                                                                                    \
  }
#define EXF__FORMULA_KERNELS(name, value, da, db, dc)                                    \
  EXF__FORMULA_KERNEL(exf__##name##_y, value)                                            \
  EXF__FORMULA_KERNEL(exf__##name##_da, da)                                              \
  EXF__FORMULA_KERNEL(exf__##name##_db, db)                                              \
  EXF__FORMULA_KERNEL(exf__##name##_dc, dc)
EXF__FORMULAS(EXF__FORMULA_KERNELS)

#define EXF__X(name, value, da, db, dc) EXF__F_##name,
enum { EXF__FORMULAS(EXF__X) EXF__F_END };
#undef EXF__X
#define EXF__X(name, value, da, db, dc)                                                  \
  {exf__##name##_y, exf__##name##_da, exf__##name##_db, exf__##name##_dc},
static exf__kernel *const exf__formulas[][4] = {EXF__FORMULAS(EXF__X)};
#undef EXF__X

/* NumPy's rule: align at the last axis; sizes are equal or one of them is 1. */
static int exf__broadcast_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  *out = n->in[0]->shape;
  for (int i = 1; i < n->n_in; i++) {
    const exf_shape a = *out, *b = &n->in[i]->shape;
    out->n = EXF__MAX(a.n, b->n);
    for (int k = 1; k <= out->n; k++) {
      size_t da = k <= a.n ? a.dim[a.n - k] : 1, db = k <= b->n ? b->dim[b->n - k] : 1;
      out->dim[out->n - k] = da == 1 ? db : da;
      if (da == db || da == 1 || db == 1) continue;
      exf_fail(ctx, EXF_SHAPE, "%s: %s and %s: axes must be equal or 1, from the last "
               "one on", n->op->name, exf__show(&a).s, exf__show(b).s);
      return 0;
    }
  }
  return 1;
}

/* y from a, b, c */
static void exf__formula_forward(exf_ctx *ctx, exf__node *n) {
  int kind = n->op->kind;
  size_t step[EXF_MAX_DIMS];
  exf__formula f = exf__formula_of(n);
  exf__split s = exf__split_make(f.size ? (f.size - 1) / f.n + 1 : 0, 4,
                                 8.0 * (double)f.size);
  exf__steps(&f.full, step);
  f.out = n->out->data;
  f.out_step = step;
  f.whole = kind == EXF__F_add ? ctx->k->add : kind == EXF__F_mul ? ctx->k->mul : NULL;
  exf__parallel(ctx, exf__formulas[kind][0], &f, &s);
}

/* The gradient of one input. When it is repeated, its rows gather in one place and stay
   on one thread, in order; else any split does. */
static void exf__formula_gradient(exf_ctx *ctx, exf__node *n, exf__formula *f) {
  exf_tensor *t = n->in[f->side];
  int kind = n->op->kind, repeated = !exf__same(&t->shape, &n->out->shape);
  int linear = kind == EXF__F_add || kind == EXF__F_sub;
  double s = kind == EXF__F_sub && f->side ? -1 : 1;
  size_t rows = (f->size - 1) / f->n + 1;
  exf__split split = exf__split_make(rows, repeated ? rows : 4, 8 * (double)f->size);
  if (linear && !repeated) {
    exf__grad_pass(ctx, n, t, s);
    return;
  }
  if (!(f->out = exf__grad(ctx, t, &f->acc))) return;
  f->out_step = f->step[f->side];
  f->s = EXF__R(s);
  f->whole = linear ? ctx->k->axpy : kind == EXF__F_mul && f->same ? ctx->k->mul : NULL;
  if (n->n_in > 1 && f->whole != ctx->k->mul) {
    if (!f->acc) memset(f->out, 0, t->size * sizeof(exf_real));
    f->acc = 1;
  }
  exf__parallel(ctx, exf__formulas[kind][1 + f->side], f, &split);
}

/* The gradients of all inputs but a mask */
static void exf__formula_backward(exf_ctx *ctx, exf__node *n) {
  exf__formula f = exf__formula_of(n);
  f.y = n->out->data;
  f.dy = exf__dout(n);
  f.side = n->op->kind == EXF__F_where;
  for (; f.size && f.side < n->n_in; f.side++) exf__formula_gradient(ctx, n, &f);
}

#define EXF__UNARY(name) \
  EXF__OP(name, exf__broadcast_shape, exf__formula, EXF__F_##name)
#define EXF__BINARY(name)                                                                \
  EXF__ROW(name, exf__broadcast_shape, exf__formula, EXF__F_##name)                      \
  EXF_API exf_tensor *exf_##name(exf_ctx *ctx, exf_tensor *a, exf_tensor *b) {           \
    exf_tensor *in[2] = {a, b};                                                          \
    return exf__run(ctx, &exf__op_##name, in, 2, NULL);                                  \
  }
EXF__BINARY(add)
EXF__BINARY(sub)
EXF__BINARY(mul)
EXF__BINARY(div)
EXF__UNARY(log)
EXF__UNARY(sqrt)
EXF__UNARY(square)
EXF__UNARY(abs)
EXF__UNARY(sigmoid)
EXF__ROW(where, exf__broadcast_shape, exf__formula, EXF__F_where)
EXF__ROW(clamp, exf__broadcast_shape, exf__formula, EXF__F_clamp)
static const exf__op exf__op_add_over = {"add", exf__broadcast_shape,
    exf__formula_forward, exf__formula_backward, EXF__F_add, 2, 0, 0};

EXF_API exf_tensor *exf_where(exf_ctx *ctx, exf_tensor *mask, exf_tensor *a,
                              exf_tensor *b) {
  exf_tensor *in[3] = {mask, a, b};
  return exf__run(ctx, &exf__op_where, in, 3, NULL);
}

EXF_API exf_tensor *exf_clamp(exf_ctx *ctx, exf_tensor *x, double low, double high) {
  exf_tensor *in[3] = {x, exf_full(ctx, exf_shape0(), low),
                       exf_full(ctx, exf_shape0(), high)};
  if (low <= high) return exf__run(ctx, &exf__op_clamp, in, 3, NULL);
  exf_fail(ctx, EXF_ARG, "clamp: from %g to %g: the first may not be larger", low, high);
  return NULL;
}

/* a + b of equal shapes, written over b, which nothing may read any more */
static exf_tensor *exf__add_over(exf_ctx *ctx, exf_tensor *a, exf_tensor *b) {
  exf_tensor *in[2] = {a, b};
  return exf__run(ctx, &exf__op_add_over, in, 2, NULL);
}

/* ---- ops: matrix products ---------------------------------------------- >>matmul */

/* All products, forward and backward, are the kernel gemm on matrices given by strides:
   transposing one is exchanging two strides, and nothing is ever copied for it. */

/* Element (i,j) at data[i row + j col]; batch: from one matrix to the next, 0 where one
   serves all. */
typedef struct exf__matrix {
  const exf_real *data;
  size_t row, col, batch;
} exf__matrix;

/* C = A B, one of `batch`; transposes are undone, C is contiguous */
typedef struct exf__product {
  size_t batch, m, n, k;
  exf__matrix a, b, c;          /* (m,k), (k,n), (m,n) */
} exf__product;

static exf__matrix exf__transposed(const exf__matrix *a) {
  exf__matrix t = {a->data, a->col, a->row, a->batch};
  return t;
}

/* C (m,n) = [C +] A (m,k) B (k,n), C contiguous. In a batch each product has its own C;
   for C in common, run them one by one. */
static exf__gemm exf__gemm_make(size_t m, size_t n, size_t k, const exf__matrix *a,
                                const exf__matrix *b, exf_real *c, int acc) {
  exf__gemm g = {EXF__BY_ROWS, m, n, k, a->data, b->data, NULL, c, a->row, a->col, b->row,
                 b->col, n, a->batch, b->batch, m * n, acc, 0};
  return g;
}

/* `batch` products, on all threads: one is split over the longer side of C, several by
   matrices. */
static void exf__gemm_run(exf_ctx *ctx, exf__gemm *g, size_t batch) {
  int wide = g->n > g->m;
  exf__split s = {wide ? g->n : g->m, 12, 0, ctx->k->scratch};
  s.work = 2.0 * (double)g->m * (double)g->n * (double)g->k * (double)batch;
  g->split = wide ? EXF__BY_COLUMNS : EXF__BY_ROWS;
  if (wide) s.grain = 32;
  if (batch != 1) {
    g->split = EXF__BY_MATRIX;
    s.n = batch;
    s.grain = 1;
  }
  if (g->m && g->n) exf__parallel(ctx, ctx->k->gemm, g, &s);
}

/* dA (m,k) = dC B^T, dB (k,n) = A^T dC, p->c being dC (m,n). A side that was given
   transposed is to have the transpose of its gradient: dA^T (k,m) = B dC^T, dB^T (n,k) =
   dC^T A. Both are products once more. */
static exf__gemm exf__gradient_a(const exf__product *p, int transposed, exf_real *da,
                                 int acc) {
  exf__matrix b = exf__transposed(&p->b), c = exf__transposed(&p->c);
  return transposed ? exf__gemm_make(p->k, p->m, p->n, &p->b, &c, da, acc)
                    : exf__gemm_make(p->m, p->k, p->n, &p->c, &b, da, acc);
}

static exf__gemm exf__gradient_b(const exf__product *p, int transposed, exf_real *db,
                                 int acc) {
  exf__matrix a = exf__transposed(&p->a), c = exf__transposed(&p->c);
  return transposed ? exf__gemm_make(p->n, p->k, p->m, &c, &p->a, db, acc)
                    : exf__gemm_make(p->k, p->n, p->m, &a, &p->c, db, acc);
}

/* ---- matmul: op(a) (..,m,k) op(b) (..,k,n) -> (..,m,n)
   ---- linear: x (..,in), w (out,in), b (out) or none -> f(x) w^T + b (..,out) */

/* linear is a product with w transposed, and f nothing or a function whose values are not
   kept: backward has them for the price of a store. */
enum { EXF__MATMUL, EXF__LINEAR };

/* The inner axes are equal, and the leading ones, or one side has none. */
static int exf__matmul_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  const exf_shape *a = &n->in[0]->shape, *b = &n->in[1]->shape;
  int ta = n->arg.transposed.a, tb = n->arg.transposed.b;
  if (a->n < 2 || b->n < 2)
    return exf__bad_shape(ctx, n, "both sides need at least two axes");
  if (a->n > 2 && b->n > 2
      && (a->n != b->n
          || memcmp(a->dim, b->dim, (size_t)(a->n - 2) * sizeof(size_t)) != 0))
    return exf__bad_shape(ctx, n, "leading axes must be equal, or one side has none");
  if (a->dim[a->n - (ta ? 2 : 1)] != b->dim[b->n - (tb ? 1 : 2)])
    return exf__bad_shape(ctx, n, "the inner axes differ");
  *out = a->n >= b->n ? *a : *b;
  out->dim[out->n - 2] = a->dim[a->n - (ta ? 1 : 2)];
  out->dim[out->n - 1] = b->dim[b->n - (tb ? 2 : 1)];
  return 1;
}

/* in and out agree with x and the bias. */
static int exf__linear_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  const exf_shape *x = &n->in[0]->shape, *w = &n->in[1]->shape;
  if (x->n < 1 || w->n != 2 || x->dim[x->n - 1] != w->dim[1])
    return exf__bad_shape(ctx, n, "x (..,in) and w (out,in): last axes differ");
  if (n->n_in > 2 && (n->in[2]->shape.n != 1 || n->in[2]->shape.dim[0] != w->dim[0]))
    return exf__bad_shape(ctx, n, "the bias must be (out)");
  *out = *x;
  out->dim[x->n - 1] = w->dim[0];
  return 1;
}

/* The product of a node; c: y or its gradient. (batch,m,k) times one matrix (k,n) is one
   product with batch m rows: so linear takes x (..,in) as (rows,in). */
static exf__product exf__product_of(const exf__node *n, const exf_real *c) {
  const exf_shape *a = &n->in[0]->shape, *b = &n->in[1]->shape;
  int linear = n->op->kind == EXF__LINEAR;
  int ta = !linear && n->arg.transposed.a, tb = linear || n->arg.transposed.b;
  size_t a_cols = a->dim[a->n - 1], a_rows = a->n > 1 ? a->dim[a->n - 2] : 1;
  size_t b_cols = b->dim[b->n - 1], b_rows = b->dim[b->n - 2];
  exf__matrix ma = {n->in[0]->data, a_cols, 1, a->n > 2 ? a_rows * a_cols : 0};
  exf__matrix mb = {n->in[1]->data, b_cols, 1, b->n > 2 ? b_rows * b_cols : 0};
  exf__product p = {1, ta ? a_cols : a_rows, tb ? b_rows : b_cols, ta ? a_rows : a_cols,
                    ta ? exf__transposed(&ma) : ma, tb ? exf__transposed(&mb) : mb,
                    {c, 0, 1, 0}};
  if (a->n > 2 || b->n > 2)
    p.batch = exf__count(a->n >= b->n ? a : b, 0, EXF__MAX(a->n, b->n) - 2);
  if (b->n == 2 && !ta) {
    p.m *= p.batch;
    p.batch = 1;
  }
  p.c.row = p.n;
  p.c.batch = p.m * p.n;
  return p;
}

/* C = f(A) B + b. The bias is added by the kernel while C is at hand. */
static void exf__product_forward(exf_ctx *ctx, exf__node *n) {
  exf__product p = exf__product_of(n, n->out->data);
  size_t size = n->in[0]->size;
  exf__gbuf *h = NULL;
  if (n->op->kind == EXF__LINEAR && n->arg.activation.on) {
    if (!(h = exf__gbuf_take(ctx, size))) return;
    exf__elements e = {n->arg.activation.op, 0, 0, p.a.data, NULL, NULL, h->data, NULL};
    exf__run_elements(ctx, ctx->k->unary, &e, size);
    p.a.data = h->data;
  }
  exf__gemm g = exf__gemm_make(p.m, p.n, p.k, &p.a, &p.b, n->out->data, 0);
  if (n->n_in > 2) g.bias = n->in[2]->data;
  exf__gemm_run(ctx, &g, p.batch);
  exf__gbuf_release(ctx, h);
}

/* A side that serves the whole batch gets the sum of its gradients. */
static void exf__gradient_run(exf_ctx *ctx, exf__gemm *g, size_t batch, int shared) {
  if (!shared || batch == 1) {
    exf__gemm_run(ctx, g, batch);
    return;
  }
  if (batch == 0 && !g->acc && g->m && g->n) memset(g->c, 0, g->m * g->n * sizeof *g->c);
  for (size_t i = 0; i < batch; i++, g->a += g->a_batch, g->b += g->b_batch, g->acc = 1)
    exf__gemm_run(ctx, g, 1);
}

/* With H = f(A): dA = [dA +] dH f'(A), and H anew for dB. dH goes to dA where that is
   free, else to a buffer. */
static void exf__backward_a(exf_ctx *ctx, exf__node *n, exf__product *p, exf__gbuf **h,
                            exf__gbuf **dh) {
  int linear = n->op->kind == EXF__LINEAR, f = linear && n->arg.activation.on, acc;
  size_t size = n->in[0]->size;
  exf_real *da = exf__grad(ctx, n->in[0], &acc), *to = da;
  exf__elements e = {n->arg.activation.op, acc, 0, p->a.data, NULL, NULL, NULL, da};
  if (f && (n->in[1]->flags & EXF__NEEDS) && !(*h = exf__gbuf_take(ctx, size))) return;
  if (f && da && acc && !(*dh = exf__gbuf_take(ctx, size))) return;
  if (*dh) to = (*dh)->data;
  if (da) {
    exf__gemm g = exf__gradient_a(p, !linear && n->arg.transposed.a, to, acc && !*dh);
    exf__gradient_run(ctx, &g, p->batch, !p->a.batch);
  }
  e.dy = to;
  if (*h) p->a.data = e.y = (*h)->data;
  if (f && (da || *h))
    exf__run_elements(ctx, da ? ctx->k->unary_grad : ctx->k->unary, &e, size);
}

/* dA and dB as above; the gradient of the bias is the column sums of dC. */
static void exf__product_backward(exf_ctx *ctx, exf__node *n) {
  exf__product p = exf__product_of(n, exf__dout(n));
  exf__columns sums = {p.m, p.n, 0, p.c.data, NULL};
  exf__split columns = exf__split_make(p.n, 64, (double)p.m * (double)p.n);
  exf__gbuf *h = NULL, *dh = NULL;
  int linear = n->op->kind == EXF__LINEAR, acc;
  exf__backward_a(ctx, n, &p, &h, &dh);
  exf_real *db = exf__grad(ctx, n->in[1], &acc);
  if (db && ctx->status == EXF_OK) {
    exf__gemm g = exf__gradient_b(&p, linear || n->arg.transposed.b, db, acc);
    exf__gradient_run(ctx, &g, p.batch, !p.b.batch);
  }
  if (n->n_in > 2) sums.y = exf__grad(ctx, n->in[2], &sums.acc);
  if (sums.y) exf__parallel(ctx, ctx->k->column_sum, &sums, &columns);
  exf__gbuf_release(ctx, h);
  exf__gbuf_release(ctx, dh);
}

EXF__ROW(matmul, exf__matmul_shape, exf__product, EXF__MATMUL)
EXF__ROW(linear, exf__linear_shape, exf__product, EXF__LINEAR)

EXF_API exf_tensor *exf_matmul(exf_ctx *ctx, exf_tensor *a, exf_tensor *b, int flags) {
  exf_tensor *in[2] = {a, b};
  exf__arg arg;
  arg.transposed.a = flags & EXF_TRANSPOSE_A;
  arg.transposed.b = flags & EXF_TRANSPOSE_B;
  return exf__run(ctx, &exf__op_matmul, in, 2, &arg);
}

EXF_API exf_tensor *exf_linear(exf_ctx *ctx, exf_tensor *x, exf_tensor *w,
                               exf_tensor *b) {
  exf_tensor *in[3] = {x, w, b};
  exf__arg arg;
  arg.activation.on = arg.activation.op = 0;
  return exf__run(ctx, &exf__op_linear, in, b ? 3 : 2, &arg);
}

/* linear of act(h), without act(h) as a tensor */
static exf_tensor *exf__linear_of(exf_ctx *ctx, exf_tensor *h, exf__unary_op act,
                                  exf_tensor *w, exf_tensor *b) {
  exf_tensor *in[3] = {h, w, b};
  exf__arg arg;
  arg.activation.on = 1;
  arg.activation.op = (int)act;
  return exf__run(ctx, &exf__op_linear, in, b ? 3 : 2, &arg);
}

/* ---- ops: rows -------------------------------------------------------- >>row_ops */

/* Ops along the last axis: x is (rows,n), whatever its leading axes are, and a row is
   computed by one thread. What a row's backward needs besides x is a number or two, kept
   from forward. */

static int exf__row_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  size_t rows, cols;
  *out = n->in[0]->shape;
  if (exf__as_rows(n->in[0], &rows, &cols)) return 1;
  return exf__bad_shape(ctx, n, "the last axis must exist and not be empty");
}

/* x, y (rows,n) of a node, for the kernels on rows */
static exf__rows exf__rows_of(const exf__node *n, size_t *rows) {
  exf__rows r;
  memset(&r, 0, sizeof r);
  exf__as_rows(n->in[0], rows, &r.n);
  r.x = n->in[0]->data;
  r.y = n->out->data;
  return r;
}

/* ---- softmax, log_softmax: x (..,n) -> y (..,n) */

enum { EXF__SOFTMAX, EXF__LOG_SOFTMAX };

/* y = exp(x) / sum exp(x), or the logarithm of that */
static void exf__softmax_forward(exf_ctx *ctx, exf__node *n) {
  size_t rows;
  exf__rows r = exf__rows_of(n, &rows);
  exf__run_rows(ctx, n->op->kind == EXF__SOFTMAX ? ctx->k->softmax : ctx->k->log_softmax,
                &r, rows, r.n);
}

/* softmax: dx = y (dy - <y, dy>); log_softmax: dx = dy - exp(y) sum dy */
static void exf__softmax_backward(exf_ctx *ctx, exf__node *n) {
  size_t rows;
  exf__rows r = exf__rows_of(n, &rows);
  exf__kernel *k = n->op->kind == EXF__SOFTMAX ? ctx->k->softmax_grad
                                               : ctx->k->log_softmax_grad;
  r.dy = exf__dout(n);
  r.dx = exf__grad(ctx, n->in[0], &r.acc);
  if (r.dx) exf__run_rows(ctx, k, &r, rows, r.n);
}

EXF__OP(softmax, exf__row_shape, exf__softmax, EXF__SOFTMAX)
EXF__OP(log_softmax, exf__row_shape, exf__softmax, EXF__LOG_SOFTMAX)

/* ---- layernorm, rmsnorm: x (..,n), w (n), b (n) or none -> y (..,n) */

enum { EXF__LAYERNORM, EXF__RMSNORM };

static int exf__norm_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  if (!exf__row_shape(ctx, n, out)) return 0;
  for (int i = 1; i < n->n_in; i++)
    if (n->in[i]->shape.n != 1 || n->in[i]->shape.dim[0] != out->dim[out->n - 1])
      return exf__bad_shape(ctx, n, "weight and bias must be (last axis)");
  return 1;
}

/* saved: mean, then rstd (rows); that of a kind without mean stays unused */
static exf__norm exf__norm_of(const exf__node *n) {
  exf__norm w;
  memset(&w, 0, sizeof w);
  exf__as_rows(n->in[0], &w.rows, &w.n);
  w.rms = n->op->kind == EXF__RMSNORM;
  w.eps = EXF__R(n->arg.eps);
  w.x = n->in[0]->data;
  w.w = n->in[1]->data;
  w.mean = (exf_real *)n->saved;
  w.rstd = w.mean + w.rows;
  return w;
}

/* y = (x - mean) rstd w + b, rstd = 1 / sqrt(var + eps); rmsnorm: without the mean */
static void exf__norm_forward(exf_ctx *ctx, exf__node *n) {
  size_t rows, cols;
  exf__as_rows(n->in[0], &rows, &cols);
  if (!(n->saved = exf__arena(ctx, 2 * rows, sizeof(exf_real)))) return;
  exf__norm w = exf__norm_of(n);
  w.b = n->n_in > 2 ? n->in[2]->data : NULL;
  w.y = n->out->data;
  exf__run_rows(ctx, ctx->k->norm, &w, rows, cols);
}

/* With h = dy w and xh the normalised x: dx = rstd (h - mean h - xh mean(h xh)), the
   mean h absent in rmsnorm; dw = sum dy xh, db = sum dy over the rows. */
static void exf__norm_backward(exf_ctx *ctx, exf__node *n) {
  exf__norm w = exf__norm_of(n);
  exf__split columns = exf__split_make(w.n, 64, 4.0 * (double)w.rows * (double)w.n);
  w.dy = exf__dout(n);
  w.dw = exf__grad(ctx, n->in[1], &w.acc_w);
  if (n->n_in > 2) w.db = exf__grad(ctx, n->in[2], &w.acc_b);
  if (w.dw || w.db) exf__parallel(ctx, ctx->k->norm_grad_w, &w, &columns);
  w.dx = exf__grad(ctx, n->in[0], &w.acc);
  if (w.dx) exf__run_rows(ctx, ctx->k->norm_grad, &w, w.rows, w.n);
}

EXF__ROW(layernorm, exf__norm_shape, exf__norm, EXF__LAYERNORM)
EXF__ROW(rmsnorm, exf__norm_shape, exf__norm, EXF__RMSNORM)

EXF_API exf_tensor *exf_layernorm(exf_ctx *ctx, exf_tensor *x, exf_tensor *w,
                                  exf_tensor *b, double eps) {
  exf_tensor *in[3] = {x, w, b};
  exf__arg arg;
  arg.eps = eps;
  return exf__run(ctx, &exf__op_layernorm, in, b ? 3 : 2, &arg);
}

EXF_API exf_tensor *exf_rmsnorm(exf_ctx *ctx, exf_tensor *x, exf_tensor *w, double eps) {
  exf_tensor *in[2] = {x, w};
  exf__arg arg;
  arg.eps = eps;
  return exf__run(ctx, &exf__op_rmsnorm, in, 2, &arg);
}

/* ---- cross_entropy: logits (..,V), one label per row -> scalar */

/* A copy of n integers in the arena, each checked to lie below limit (and, unless
   negatives mean "ignore", not below 0). */
static const int32_t *exf__copy_ids(exf_ctx *ctx, const exf__op *op, const int32_t *ids,
                                    size_t n, size_t limit, int negatives) {
  if (!ids)
    exf_fail(ctx, EXF_ARG, "%s: the integers are NULL: give one per row", op->name);
  for (size_t i = 0; i < n && ctx->status == EXF_OK; i++)
    if ((ids[i] < 0 && !negatives) || (ids[i] >= 0 && (size_t)ids[i] >= limit))
      exf_fail(ctx, EXF_ARG, "%s: integer %ld at index %zu is outside 0..%zu", op->name,
               (long)ids[i], i, limit ? limit - 1 : 0);
  int32_t *copy = (int32_t *)exf__arena(ctx, n, sizeof(int32_t));
  if (copy && n) memcpy(copy, ids, n * sizeof(int32_t));
  return copy;
}

/* Takes over the labels as a checked copy. */
static int exf__cross_entropy_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  size_t rows, classes;
  *out = exf_shape0();
  if (!(n->arg.loss.smoothing >= 0 && n->arg.loss.smoothing <= 1))
    exf_fail(ctx, EXF_ARG, "cross_entropy: smoothing %g must lie in [0, 1]",
             n->arg.loss.smoothing);
  if (!exf__as_rows(n->in[0], &rows, &classes))
    return exf__bad_shape(ctx, n, "logits must be (..,V)");
  n->arg.loss.labels = exf__copy_ids(ctx, n->op, n->arg.loss.labels, rows, classes, 1);
  return n->arg.loss.labels != NULL;
}

static exf__rows exf__cross_entropy_of(const exf__node *n, size_t *rows) {
  exf__rows r = exf__rows_of(n, rows);
  r.labels = n->arg.loss.labels;
  r.smoothing = EXF__R(n->arg.loss.smoothing);
  r.lse = (exf_real *)n->saved;
  return r;
}

/* -sum_v q_v log softmax(logits)_v of each row, then their mean over the rows in use;
   saved: the log-sum-exp of each row */
static void exf__cross_entropy_forward(exf_ctx *ctx, exf__node *n) {
  size_t rows, used = 0;
  double sum = 0;
  exf__rows r = exf__cross_entropy_of(n, &rows);
  if (!(r.loss = (exf_real *)exf__arena(ctx, 2 * rows, sizeof(exf_real)))) return;
  n->saved = r.lse = r.loss + rows;
  exf__run_rows(ctx, ctx->k->cross_entropy, &r, rows, r.n);
  for (size_t i = 0; i < rows; i++) {
    used += r.labels[i] >= 0;
    sum += (double)r.loss[i];
  }
  n->arg.loss.n_used = used;
  n->out->data[0] = EXF__R(used ? sum / (double)used : 0);
}

/* dlogits = g / n_used (softmax(logits) - q), g = dL/dy; the softmax is computed anew,
   from the log-sum-exp of its row. */
static void exf__cross_entropy_backward(exf_ctx *ctx, exf__node *n) {
  size_t rows, used = n->arg.loss.n_used;
  exf__rows r = exf__cross_entropy_of(n, &rows);
  r.g = used ? exf__dout(n)[0] / (exf_real)used : 0;
  r.dx = exf__grad(ctx, n->in[0], &r.acc);
  if (r.dx) exf__run_rows(ctx, ctx->k->cross_entropy_grad, &r, rows, r.n);
}

EXF__OP_ARG(cross_entropy, exf__cross_entropy_shape, exf__cross_entropy, 0,
            (arg.loss.labels = labels, arg.loss.smoothing = label_smoothing),
            const int32_t *labels, double label_smoothing)

/* ---- choosing from a row: no ops, as there is no gradient */

/* A token is drawn by a random number of its own, keyed by seed and index: sampling goes
   the same way whatever happens in between. */

/* Whether a comes before b as the maximum: a NaN is the largest number, and of equal
   ones the first stays. */
static int exf__larger(exf_real a, exf_real b) { return a > b || (a != a && b == b); }

/* Where the maximum of a row (n) is */
static size_t exf__max_at(const exf_real *row, size_t n) {
  size_t best = 0;
  for (size_t i = 1; i < n; i++)
    if (exf__larger(row[i], row[best])) best = i;
  return best;
}

EXF_API const int32_t *exf_argmax(exf_ctx *ctx, const exf_tensor *x) {
  size_t rows, n;
  if (!ctx || !x) return NULL;
  if (!exf__as_rows(x, &rows, &n) || n > (size_t)INT32_MAX)
    exf_fail(ctx, EXF_SHAPE, "argmax: %s: the last axis must have 1 to %ld numbers",
             exf__show(&x->shape).s, (long)INT32_MAX);
  int32_t *at = (int32_t *)exf__arena(ctx, rows, sizeof(int32_t));
  for (size_t i = 0; at && i < rows; i++)
    at[i] = (int32_t)exf__max_at(x->data + i * n, n);
  return at;
}

/* Pointers into a row of logits, by falling logit, then rising token */
static int exf__by_logit(const void *a, const void *b) {
  const exf_real *x = *(const exf_real *const *)a, *y = *(const exf_real *const *)b;
  return *x > *y ? -1 : *x < *y ? 1 : x < y ? -1 : x > y;
}

/* Fills in defaults. The last row of the logits (n), with a largest number that is
   finite, since nothing can be drawn beside NaN or infinity; or NULL after an error. */
static const exf_real *exf__sample_row(exf_ctx *ctx, const exf_tensor *logits,
                                       exf_sample_desc *d, size_t *n) {
  size_t rows = 0;
  if (d->temperature == 0) d->temperature = 1;
  if (d->top_p == 0) d->top_p = 1;
  if (!(d->temperature > 0 && d->temperature < HUGE_VAL) && d->temperature != EXF_ZERO)
    exf_fail(ctx, EXF_ARG, "sample: temperature %g must be positive (EXF_ZERO: the "
             "likeliest token)", d->temperature);
  if (!(d->top_p > 0 && d->top_p <= 1))
    exf_fail(ctx, EXF_ARG, "sample: top_p %g must lie in (0, 1]", d->top_p);
  if (!logits || !exf__as_rows(logits, &rows, n) || !rows || *n > (size_t)INT32_MAX)
    exf_fail(ctx, EXF_SHAPE, "sample: logits %s must be (..,V), with a row and tokens",
             logits ? exf__show(&logits->shape).s : "NULL");
  if (ctx->status != EXF_OK) return NULL;
  const exf_real *row = logits->data + (rows - 1) * *n;
  exf_real top = row[exf__max_at(row, *n)];
  if (top - top == 0) return row;
  exf_fail(ctx, EXF_NUMERIC, "sample: the largest of the %zu logits is %g: no token can "
           "be drawn", *n, (double)top);
  return NULL;
}

/* p_i = exp((l_i - l_0) / T) of the top_k, likeliest first; of these the first that hold
   top_p of their sum; a number u below their mass falls into the part of one. */
EXF_API int32_t exf_sample(exf_ctx *ctx, const exf_tensor *logits,
                           const exf_sample_desc *desc, uint64_t index) {
  exf_sample_desc d = {0, 0, 0, 0};
  size_t n = 0, n_drawn = 0, i;
  double total = 0, mass = 0;
  if (desc) d = *desc;
  if (!ctx || ctx->status != EXF_OK) return -1;
  const exf_real *row = exf__sample_row(ctx, logits, &d, &n);
  if (!row) return -1;
  if (d.temperature == EXF_ZERO) return (int32_t)exf__max_at(row, n);
  const exf_real **order = (const exf_real **)exf__arena(ctx, n, sizeof *order);
  double *p = (double *)exf__arena(ctx, n, sizeof *p);
  if (!order || !p) return -1;
  for (i = 0; i < n; i++) order[i] = row + i;
  exf__sort(order, n, sizeof *order, exf__by_logit);
  size_t kept = d.top_k && d.top_k < n ? d.top_k : n;
  for (i = 0; i < kept; i++) {
    double below = (double)*order[i] - (double)*order[0];
    total += p[i] = (double)exf__exp(EXF__R(below / d.temperature));
  }
  while (n_drawn < kept && (n_drawn == 0 || mass < d.top_p * total)) mass += p[n_drawn++];
  double u = mass * exf_rng_uniform(d.seed, exf_rng_stream("sample"), 0, index);
  for (i = 0; i + 1 < n_drawn && u >= p[i]; i++) u -= p[i];
  return (int32_t)(order[i] - row);
}

/* ---- ops: lookup, dropout --------------------------------------------- >>lookup */

/* Rows picked by number, and numbers dropped by chance. Neither op keeps its choice:
   backward reads the ids again, or draws again, since a draw is a function of (seed, call
   within the step, step, index). */

/* ---- embedding, gather: x (R,..), ids (n0[,n1]) -> (n0[,n1],..) */

enum { EXF__EMBEDDING, EXF__GATHER };

/* Takes over the ids as a checked copy; n1 = 0: there is no such axis. */
static int exf__lookup_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  const exf_shape *x = &n->in[0]->shape;
  size_t n0 = n->arg.rows.n0, n1 = n->arg.rows.n1, count;
  if (n->op->kind == EXF__EMBEDDING && x->n != 2)
    return exf__bad_shape(ctx, n, "the table must be (V,C)");
  if (x->n < 1) return exf__bad_shape(ctx, n, "it has no rows");
  if (!exf__mul_size(n0, n1 ? n1 : 1, &count)) {
    exf_fail(ctx, EXF_SIZE, "embedding: %zu x %zu integers do not fit into size_t", n0,
             n1);
    return 0;
  }
  n->arg.rows.ids = exf__copy_ids(ctx, n->op, n->arg.rows.ids, count, x->dim[0], 0);
  *out = n1 ? exf_shape3(n0, n1, x->dim[1]) : *x;
  if (!n1) out->dim[0] = n0;
  return n->arg.rows.ids != NULL;
}

/* y[i] = x[ids[i]] */
static void exf__lookup_forward(exf_ctx *ctx, exf__node *n) {
  size_t c = exf__count(&n->in[0]->shape, 1, n->in[0]->shape.n);
  (void)ctx;
  for (size_t i = 0; i * c < n->out->size; i++)
    memcpy(n->out->data + i * c, n->in[0]->data + (size_t)n->arg.rows.ids[i] * c,
           c * sizeof(exf_real));
}

/* dx[ids[i]] += dy[i], in the order of the rows */
static void exf__lookup_backward(exf_ctx *ctx, exf__node *n) {
  size_t c = exf__count(&n->in[0]->shape, 1, n->in[0]->shape.n);
  exf__elements e = {0, 1, 1, exf__dout(n), NULL, NULL, NULL, NULL};
  int acc;
  exf_real *dx = exf__grad(ctx, n->in[0], &acc);
  if (dx && !acc) memset(dx, 0, n->in[0]->size * sizeof(exf_real));
  for (size_t i = 0; dx && i * c < n->out->size; i++, e.x += c) {
    e.y = dx + (size_t)n->arg.rows.ids[i] * c;
    ctx->k->axpy(&e, 0, c, NULL);
  }
}

EXF__OP_ARG(embedding, exf__lookup_shape, exf__lookup, EXF__EMBEDDING,
            (arg.rows.ids = ids, arg.rows.n0 = n0, arg.rows.n1 = n1),
            const int32_t *ids, size_t n0, size_t n1)
EXF__OP_ARG(gather, exf__lookup_shape, exf__lookup, EXF__GATHER,
            (arg.rows.ids = ids, arg.rows.n0 = n, arg.rows.n1 = 0),
            const int32_t *ids, size_t n)

/* ---- dropout: x (..) -> y (..) */

/* What a draw depends on. Range: elements, from a multiple of 4 on */
typedef struct exf__drop {
  uint64_t seed;
  uint32_t stream, step;
  double p;
  const exf_real *x;
  exf_real *y;
  int acc;
} exf__drop;

/* y = [y +] 0 with probability p, else x / (1 - p); a draw is good for 4 numbers. */
EXF__KERNEL(exf__dropout_apply) {
  EXF__OPERANDS(exf__drop, d);
  exf_real s = EXF__R(1 / (1 - d.p));
  double limit = d.p * 4294967296.0;
  uint32_t r[4];
  for (size_t i = begin; i < end; i++) {
    if (i % 4 == 0) exf__philox(d.seed, d.stream, d.step, i / 4, r);
    exf_real v = (double)r[i % 4] < limit ? 0 : s * d.x[i];
    d.y[i] = d.acc ? d.y[i] + v : v;
  }
}

static void exf__dropout_run(exf_ctx *ctx, const exf__node *n, const exf_real *x,
                             exf_real *y, int acc) {
  exf__drop d = {ctx->desc.seed, 0xD0000000u + n->arg.dropout.call, n->arg.dropout.step,
                 n->arg.dropout.p, x, y, acc};
  exf__split s = exf__split_make(n->out->size, 256, 16.0 * (double)n->out->size);
  if (y) exf__parallel(ctx, exf__dropout_apply, &d, &s);
}

/* The call counts: two places in one graph draw differently, the same place in the next
   run of the step as before. */
static void exf__dropout_forward(exf_ctx *ctx, exf__node *n) {
  n->arg.dropout.call = ctx->n_dropouts++;
  n->arg.dropout.step = ctx->step;
  exf__dropout_run(ctx, n, n->in[0]->data, n->out->data, 0);
}

/* dx = dy where x was kept, / (1 - p) */
static void exf__dropout_backward(exf_ctx *ctx, exf__node *n) {
  int acc;
  exf_real *dx = exf__grad(ctx, n->in[0], &acc);
  exf__dropout_run(ctx, n, exf__dout(n), dx, acc);
}

EXF__ROW(dropout, exf__same_shape, exf__dropout, 0)

static int exf__drop_ok(exf_ctx *ctx, const char *what, double p) {
  if (p >= 0 && p < 1) return 1;
  exf_fail(ctx, EXF_ARG, "%s: probability %g must lie in [0, 1)", what, p);
  return 0;
}

EXF_API exf_tensor *exf_dropout(exf_ctx *ctx, exf_tensor *x, double p) {
  exf__arg arg;
  if (!exf__drop_ok(ctx, "dropout", p)) return NULL;
  if (p == 0 || !ctx || !ctx->training) return x;
  arg.dropout.p = p;
  return exf__run(ctx, &exf__op_dropout, &x, 1, &arg);
}

/* Stochastic depth is broadcasting: x (B,..) times a dropped-out column of ones
   (B,1,..,1). */
EXF_API exf_tensor *exf_drop_path(exf_ctx *ctx, exf_tensor *x, double p) {
  exf_shape s = exf_shape0();
  if (!exf__drop_ok(ctx, "drop_path", p)) return NULL;
  if (!ctx || !x || p == 0 || !ctx->training) return x;
  for (; s.n < x->shape.n; s.n++) s.dim[s.n] = s.n ? 1 : x->shape.dim[0];
  return exf_mul(ctx, x, exf_dropout(ctx, exf_ones(ctx, s), p));
}

/* ---- ops: shape -------------------------------------------------------- >>shape_ops */

/* Ops that move numbers and compute nothing. Only reshape is a view: the others copy, so
   that every tensor is contiguous. What is not obvious: permute, concat and slice, each
   forward and backward, are two loops, one for each direction between a tensor that is
   moved as a whole and its places in another one. Reductions use them, too. */

/* ---- reshape: x -> the same numbers under another shape */

static int exf__reshape_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  exf_tensor t;
  if (!exf__tensor_init(ctx, &t, &n->arg.shape)) return 0;
  *out = t.shape;
  if (t.size == n->in[0]->size) return 1;
  exf_fail(ctx, EXF_SHAPE, "reshape: %s has %zu elements, %s has %zu",
           exf__show(&n->in[0]->shape).s, n->in[0]->size, exf__show(out).s, t.size);
  return 0;
}

/* A view: exf__run gave it the numbers of its input. */
static void exf__reshape_forward(exf_ctx *ctx, exf__node *n) { (void)ctx, (void)n; }

static void exf__reshape_backward(exf_ctx *ctx, exf__node *n) {
  exf__grad_pass(ctx, n, n->in[0], 1.0);
}

static const exf__op exf__op_reshape = {
    "reshape", exf__reshape_shape, exf__reshape_forward, exf__reshape_backward, 0, 1, 0,
    0};

EXF_API exf_tensor *exf_reshape(exf_ctx *ctx, exf_tensor *x, exf_shape s) {
  exf__arg arg;
  arg.shape = s;
  return exf__run(ctx, &exf__op_reshape, &x, 1, &arg);
}

/* ---- moving rows between a tensor (full) and its places in another one */

/* Range: rows of full. s: a factor, of taking only */
typedef struct exf__moves {
  exf_shape full;
  size_t n, at;                  /* numbers of a row; where full begins in the other */
  size_t step[EXF_MAX_DIMS];     /* there, along the axes of full */
  double s;
  const exf_real *from;
  exf_real *to;
  int acc;
} exf__moves;

static exf__moves exf__moves_of(const exf_shape *full, const exf_shape *other) {
  exf__moves m = {*full, exf__row_length(full), 0, {0}, 1, NULL, NULL, 0};
  exf__steps(other, m.step);
  return m;
}

/* Takes them out: to (full) = [to +] s from */
EXF__KERNEL(exf__take_rows) {
  EXF__OPERANDS(exf__moves, m);
  exf_real s = EXF__R(m.s);
  for (size_t r = begin; r < end; r++) {
    const exf_real *from = m.from + m.at + exf__row_begin(&m.full, m.step, r);
    exf_real *to = m.to + r * m.n;
    for (size_t j = 0; j < m.n; j++, from += m.step[0])
      to[j] = m.acc ? to[j] + s * *from : s * *from;
  }
}

/* Puts them there: to = [to +] from (full). In the order of full: where places coincide,
   their sum has one order. */
EXF__KERNEL(exf__put_rows) {
  EXF__OPERANDS(exf__moves, m);
  for (size_t r = begin; r < end; r++) {
    const exf_real *from = m.from + r * m.n;
    exf_real *to = m.to + m.at + exf__row_begin(&m.full, m.step, r);
    for (size_t j = 0; j < m.n; j++, to += m.step[0])
      *to = m.acc ? *to + from[j] : from[j];
  }
}

/* Runs one of the two. Axes that lie one behind the other in both tensors are one axis,
   for longer rows. */
static void exf__move(exf_ctx *ctx, exf__kernel *kernel, exf__moves *m) {
  exf_shape *f = &m->full;
  size_t size = exf__shape_size(f);
  for (; f->n > 1 && m->step[1] == m->step[0] * m->n; m->n *= f->dim[f->n - 1]) {
    memmove(m->step + 1, m->step + 2, (EXF_MAX_DIMS - 2) * sizeof *m->step);
    f->n--;
  }
  exf__split s = exf__split_make(size ? size / m->n : 0, 4, 8.0 * (double)size);
  exf__parallel(ctx, kernel, m, &s);
}

/* ---- permute, concat, slice */

enum { EXF__PERMUTE, EXF__CONCAT, EXF__SLICE };

/* y: axis k is axis axes[k] of x */
static int exf__permute_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  const exf_shape *x = &n->in[0]->shape;
  unsigned seen = 0;
  *out = *x;
  for (int i = 0; i < x->n; i++) {
    int p = n->arg.axes[i];
    if (p < 0 || p >= x->n || (seen & EXF_AXIS(p)))
      return exf__bad_shape(ctx, n, "axes must be a permutation of 0..n-1");
    seen |= EXF_AXIS(p);
    out->dim[i] = x->dim[p];
  }
  return 1;
}

/* y: parts that differ along one axis, one after the other */
static int exf__concat_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  int axis = n->arg.slice.axis;
  *out = n->in[0]->shape;
  if (axis < 0 || axis >= out->n) return exf__bad_shape(ctx, n, "there is no such axis");
  for (int i = 1; i < n->n_in; i++) {
    const exf_shape *s = &n->in[i]->shape;
    int fits = s->n == out->n;
    for (int k = 0; fits && k < out->n; k++) fits = k == axis || s->dim[k] == out->dim[k];
    if (!fits) return exf__bad_shape(ctx, n, "all axes but the joined one must be equal");
    out->dim[axis] += s->dim[axis];   /* fits: a tensor's bytes end at SIZE_MAX / 4 */
  }
  return 1;
}

/* y: begin .. end-1 of one axis */
static int exf__slice_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  int axis = n->arg.slice.axis;
  size_t begin = n->arg.slice.begin, end = n->arg.slice.end;
  *out = n->in[0]->shape;
  if (axis >= 0 && axis < out->n && begin <= end && end <= out->dim[axis]) {
    out->dim[axis] = end - begin;
    return 1;
  }
  exf_fail(ctx, EXF_SHAPE, "slice: %zu..%zu of axis %d of %s: must lie within it", begin,
           end, axis, exf__show(out).s);
  return 0;
}

/* How input i and y lie in each other: of the two, the part is `full`, which is x in
   concat, else y. */
static exf__moves exf__layout_of(const exf__node *n, int i) {
  const exf_shape *x = &n->in[i]->shape, *y = &n->out->shape;
  int kind = n->op->kind, axis = n->arg.slice.axis;
  exf__moves m = exf__moves_of(kind == EXF__CONCAT ? x : y, kind == EXF__CONCAT ? y : x);
  for (int k = 0; kind == EXF__PERMUTE && k < x->n; k++)
    m.step[x->n - 1 - k] = exf__count(x, n->arg.axes[k] + 1, x->n);
  for (int k = 0; kind == EXF__CONCAT && k < i; k++)
    m.at += exf__count(&n->in[k]->shape, axis, x->n);
  if (kind == EXF__SLICE) m.at = n->arg.slice.begin * exf__count(x, axis + 1, x->n);
  return m;
}

/* y = x, rearranged */
static void exf__layout_forward(exf_ctx *ctx, exf__node *n) {
  for (int i = 0; i < n->n_in; i++) {
    exf__moves m = exf__layout_of(n, i);
    m.from = n->in[i]->data;
    m.to = n->out->data;
    exf__move(ctx, n->op->kind == EXF__CONCAT ? exf__put_rows : exf__take_rows, &m);
  }
}

/* dx = [dx +] dy, the same way back. The gradient of what a slice leaves out is 0. */
static void exf__layout_backward(exf_ctx *ctx, exf__node *n) {
  for (int i = 0; i < n->n_in; i++) {
    exf__moves m = exf__layout_of(n, i);
    m.from = exf__dout(n);
    m.to = exf__grad(ctx, n->in[i], &m.acc);
    if (!m.to) continue;
    if (n->op->kind == EXF__SLICE && !m.acc) {
      memset(m.to, 0, n->in[i]->size * sizeof(exf_real));
      m.acc = 1;
    }
    exf__move(ctx, n->op->kind == EXF__CONCAT ? exf__take_rows : exf__put_rows, &m);
  }
}

EXF__ROW(permute, exf__permute_shape, exf__layout, EXF__PERMUTE)
EXF__ROW(concat, exf__concat_shape, exf__layout, EXF__CONCAT)
EXF__OP_ARG(slice, exf__slice_shape, exf__layout, EXF__SLICE,
            (arg.slice.axis = axis, arg.slice.begin = begin, arg.slice.end = end),
            int axis, size_t begin, size_t end)

EXF_API exf_tensor *exf_permute(exf_ctx *ctx, exf_tensor *x, const int *axes) {
  exf__arg arg;
  memset(arg.axes, 0, sizeof arg.axes);
  if (x && axes) memcpy(arg.axes, axes, (size_t)x->shape.n * sizeof(int));
  return exf__run(ctx, &exf__op_permute, &x, 1, &arg);
}

EXF_API exf_tensor *exf_concat(exf_ctx *ctx, exf_tensor *const *x, int n, int axis) {
  exf__arg arg;
  arg.slice.axis = axis;
  if (x && n >= 1 && n <= EXF_MAX_INPUTS)
    return exf__run(ctx, &exf__op_concat, x, n, &arg);
  exf_fail(ctx, EXF_ARG, "concat: %d tensors, must be 1..%d", x ? n : 0, EXF_MAX_INPUTS);
  return NULL;
}

/* ---- ops: sums and maxima ------------------------------------------------ >>sums */

/* Ops over some of the axes, x (..) -> y without these axes, or with size 1 there. What
   is not obvious: x is walked as if y were broadcast to it, so that reducing and handing
   a gradient back are the moves of the section above. Sums over the last axes are made of
   lane sums and added up in double, as a mean of millions must be exact; sums over the
   first ones are column sums; others are added up in the order of x. */

enum { EXF__SUM, EXF__MEAN, EXF__MAX };

/* A bit for each axis that vanishes */
static unsigned exf__reduced_axes(const exf__node *n) {
  return n->arg.reduce.axes & (EXF_AXIS(n->in[0]->shape.n) - 1u);
}

static int exf__reduce_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  const exf_shape *x = &n->in[0]->shape;
  unsigned axes = exf__reduced_axes(n);
  if (n->arg.reduce.axes != EXF_ALL_AXES && axes != n->arg.reduce.axes)
    return exf__bad_shape(ctx, n, "an axis that does not exist");
  *out = exf_shape0();
  for (int i = 0; i < x->n; i++) {
    int reduced = (axes & EXF_AXIS(i)) != 0;
    if (reduced && x->dim[i] == 0 && n->op->kind == EXF__MAX)
      return exf__bad_shape(ctx, n, "an empty axis has no maximum");
    if (!reduced || n->arg.reduce.keep) out->dim[out->n++] = reduced ? 1 : x->dim[i];
  }
  return 1;
}

/* x is full, and y lies in it with steps of 0. s: 1, or 1 / count for the mean */
static exf__moves exf__reduce_of(const exf__node *n) {
  exf_shape kept = n->in[0]->shape;
  for (int i = 0; i < kept.n; i++)
    if (exf__reduced_axes(n) & EXF_AXIS(i)) kept.dim[i] = 1;
  exf__moves m = exf__moves_of(&n->in[0]->shape, &kept);
  if (n->op->kind == EXF__MEAN && n->in[0]->size)
    m.s = 1.0 / (double)(n->in[0]->size / n->out->size);
  return m;
}

/* y_i = s sum of the i-th run of n numbers; range: runs. Lanes and blocks are those of
   the kernels: the bits do not depend on who computes it. */
EXF__KERNEL(exf__sum_runs) {
  EXF__OPERANDS(exf__moves, m);
  for (size_t r = begin; r < end; r++) {
    const exf_real *x = m.from + r * m.n;
    double total = 0;
    for (size_t b = 0; b < m.n; b += EXF__SUM_BLOCK) {
      size_t block_end = EXF__MIN(m.n, b + EXF__SUM_BLOCK);
      exf_real lane[EXF__LANES] = {0};
      for (size_t i = b; i < block_end; i++) lane[(i - b) % EXF__LANES] += x[i];
      total += (double)exf__lane_sum(lane);
    }
    m.to[r] = EXF__R(m.s * total);
  }
}

/* y = s sum x */
static void exf__sum_forward(exf_ctx *ctx, exf__node *n) {
  exf__moves m = exf__reduce_of(n);
  size_t in = n->in[0]->size, out = n->out->size;
  unsigned axes = exf__reduced_axes(n), kept = (EXF_AXIS(m.full.n) - 1u) & ~axes;
  m.from = n->in[0]->data;
  m.to = n->out->data;
  if (out && (kept & (kept + 1)) == 0) {                  /* the last axes */
    m.n = in / out;
    exf__run_rows(ctx, exf__sum_runs, &m, out, m.n);
    return;
  }
  if (in && axes && (axes & (axes + 1)) == 0) {           /* the first ones */
    exf__columns c = {in / out, out, 0, m.from, m.to};
    exf__split s = exf__split_make(out, 64, (double)in);
    exf__parallel(ctx, ctx->k->column_sum, &c, &s);
  } else {
    if (out) memset(m.to, 0, out * sizeof(exf_real));
    m.acc = 1;
    exf__put_rows(&m, 0, in ? in / m.n : 0, NULL);
  }
  for (size_t i = 0; m.s != 1.0 && i < out; i++) m.to[i] *= EXF__R(m.s);
}

/* dx = [dx +] s dy, repeated along the summed axes */
static void exf__sum_backward(exf_ctx *ctx, exf__node *n) {
  exf__moves m = exf__reduce_of(n);
  m.from = exf__dout(n);
  m.to = exf__grad(ctx, n->in[0], &m.acc);
  if (m.to) exf__move(ctx, exf__take_rows, &m);
}

/* y = max x; saved: where in x each one is, the first in row-major order */
static void exf__max_forward(exf_ctx *ctx, exf__node *n) {
  const exf_real *x = n->in[0]->data;
  exf__moves m = exf__reduce_of(n);
  size_t *at = (size_t *)exf__arena(ctx, n->out->size, sizeof *at);
  n->saved = at;
  for (size_t i = 0; at && i < n->out->size; i++) at[i] = SIZE_MAX;
  for (size_t i = 0, *to = at; at && i < n->in[0]->size; i++, to += m.step[0]) {
    if (i % m.n == 0) to = at + exf__row_begin(&m.full, m.step, i / m.n);
    if (*to == SIZE_MAX || exf__larger(x[i], x[*to])) *to = i;
  }
  for (size_t i = 0; at && i < n->out->size; i++) n->out->data[i] = x[at[i]];
}

/* dx = dy there, 0 elsewhere */
static void exf__max_backward(exf_ctx *ctx, exf__node *n) {
  const size_t *at = (const size_t *)n->saved;
  int acc;
  exf_real *dx = exf__grad(ctx, n->in[0], &acc);
  if (dx && !acc) memset(dx, 0, n->in[0]->size * sizeof(exf_real));
  for (size_t i = 0; dx && i < n->out->size; i++) dx[at[i]] += exf__dout(n)[i];
}

#define EXF__REDUCTION(name, family, kind)                                               \
  EXF__OP_ARG(name, exf__reduce_shape, family, kind,                                     \
              (arg.reduce.axes = axes, arg.reduce.keep = keep), unsigned axes, int keep)
EXF__REDUCTION(sum, exf__sum, EXF__SUM)
EXF__REDUCTION(mean, exf__sum, EXF__MEAN)
EXF__REDUCTION(max, exf__max, EXF__MAX)

/* ---- ops: attention ------------------------------------------------- >>attention */

/* Multi-head self-attention, and the cache of keys and values that generation needs.
   The scores (T,T) never exist as a whole: the kernel takes a few queries at a time and
   keeps two numbers of each, from which backward makes them again. With a cache the same
   kernel runs with more keys than queries, and gives the bits of the whole sequence. */

/* Each layer of a model has its place in the cache. Which layer calls need not be said:
   in a pass they come in order, so counting the calls is enough. Positions count for all
   layers at once, when the last of a pass has come. */
struct exf_kv {
  exf_ctx *ctx;
  size_t n_layers, capacity, width;
  size_t length;                /* positions of whole passes */
  size_t layer, t;              /* attentions of this pass so far, its positions */
  exf_real *data;               /* (n_layers, 2, capacity, width): keys, values */
};

EXF_API exf_kv *exf_kv_new(exf_ctx *ctx, size_t n_layers, size_t capacity,
                           size_t width) {
  const exf_kv start = {ctx, n_layers, capacity, width, 0, 0, 0, NULL};
  size_t rows, all;
  if (!ctx || ctx->status != EXF_OK) return NULL;
  if (!exf__mul_size(n_layers, 2, &rows) || !exf__mul_size(rows, capacity, &rows)
      || !exf__mul_size(rows, width, &all) || all == 0) {
    exf_fail(ctx, EXF_SIZE, "kv: %zu layers x %zu positions x %zu do not make a cache",
             n_layers, capacity, width);
    return NULL;
  }
  exf_kv *kv = (exf_kv *)exf__alloc(ctx, sizeof *kv);
  if (!kv) return NULL;
  *kv = start;
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
  if (kv) kv->length = kv->layer = 0;
}

EXF_API size_t exf_kv_length(const exf_kv *kv) { return kv ? kv->length : 0; }

/* A cache holds one sequence, and keeps no values of the past for a backward pass. */
static int exf__kv_fits(exf_ctx *ctx, const exf__node *n) {
  const exf_kv *kv = n->arg.attention.cache;
  const exf_shape *x = &n->in[0]->shape;
  if (!n->arg.attention.causal)
    exf_fail(ctx, EXF_ARG, "attention: it is not causal: a cache would hide later "
             "positions");
  else if (x->dim[0] != 1 || x->dim[2] != 3 * kv->width
           || x->dim[1] > kv->capacity - kv->length
           || (ctx->grad_on && (n->in[0]->flags & EXF__NEEDS)))
    exf_fail(ctx, EXF_SHAPE, "attention: qkv %s: the cache needs (1,t,%zu) in a no-grad "
             "scope and room for t positions after %zu of %zu", exf__show(x).s,
             3 * kv->width, kv->length, kv->capacity);
  else if (kv->layer && x->dim[1] != kv->t)
    exf_fail(ctx, EXF_STATE, "attention: %zu new positions in layer %zu, but %zu in the "
             "one before: finish the pass, or exf_kv_reset", x->dim[1], kv->layer, kv->t);
  return ctx->status == EXF_OK;
}

/* Attention over the cache: keys and values (t,C) of the new positions are copied behind
   those of the layer whose turn it is, and all of them, (length + t,C), are what the
   queries see. */
static void exf__kv_append(const exf_kv *kv, exf__attention *a) {
  size_t c = kv->width, n = kv->capacity * c;
  exf_real *keys = kv->data + kv->layer * 2 * n;
  for (size_t i = 0; i < a->tq; i++) {
    exf_real *key = keys + (kv->length + i) * c;
    memcpy(key, a->key + i * a->kv_stride, c * sizeof(exf_real));
    memcpy(key + n, a->value + i * a->kv_stride, c * sizeof(exf_real));
  }
  a->key = keys;
  a->value = keys + n;
  a->kv_stride = c;
  a->tk = kv->length + a->tq;
}

/* ---- attention: qkv (B,T,3C) -> (B,T,C) */

static int exf__attention_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  const exf_shape *x = &n->in[0]->shape;
  if (x->n != 3 || x->dim[2] % 3 != 0 || x->dim[2] == 0)
    return exf__bad_shape(ctx, n, "qkv must be (B,T,3C)");
  *out = exf_shape3(x->dim[0], x->dim[1], x->dim[2] / 3);
  if (out->dim[2] % n->arg.attention.n_heads != 0) {
    exf_fail(ctx, EXF_SHAPE, "attention: width %zu is not divisible by %zu heads",
             out->dim[2], n->arg.attention.n_heads);
    return 0;
  }
  return !n->arg.attention.cache || exf__kv_fits(ctx, n);
}

/* saved: (B,H,2,T), of each row of scores its maximum and inverse sum */
static exf__attention exf__attention_of(const exf_ctx *ctx, const exf__node *n) {
  const exf_shape *y = &n->out->shape;
  size_t c = y->dim[2], heads = n->arg.attention.n_heads;
  exf__attention a;
  memset(&a, 0, sizeof a);
  a.k = ctx->k;
  a.tq = a.tk = y->dim[1];
  a.heads = heads;
  a.width = c;
  a.causal = n->arg.attention.causal != 0;
  a.scale = EXF__R(1) / EXF__SQRT((exf_real)(c / heads));
  a.q = n->in[0]->data;
  a.key = a.q + c;
  a.value = a.key + c;
  a.q_stride = a.kv_stride = 3 * c;
  a.out = n->out->data;
  a.stat = (exf_real *)n->saved;
  return a;
}

/* One piece of work for each sequence and head */
static void exf__attention_run(exf_ctx *ctx, const exf__node *n, exf__kernel *kernel,
                               const exf__attention *a) {
  double work = (a->stat ? 8.0 : 4.0) * (double)n->out->size * (double)a->tk;
  exf__split s = exf__split_make(n->out->shape.dim[0] * a->heads, 1, work);
  if (n->out->size == 0) return;
  s.scratch = exf__attention_scratch(ctx->k, a->tk);
  if (s.scratch) exf__parallel(ctx, kernel, a, &s);
  else exf_fail(ctx, EXF_SIZE, "attention: %zu positions do not fit into memory", a->tk);
}

/* softmax(Q K^T / sqrt(C/H)) V of each sequence and head, Q, K, V (T,C/H); causal: query
   t sees the keys 0..t. */
static void exf__attention_op_forward(exf_ctx *ctx, exf__node *n) {
  exf_kv *kv = n->arg.attention.cache;
  const exf_shape *y = &n->out->shape;
  size_t stats = y->dim[0] * n->arg.attention.n_heads * y->dim[1];
  if (!kv && !(n->saved = exf__arena(ctx, stats, 2 * sizeof(exf_real)))) return;
  exf__attention a = exf__attention_of(ctx, n);
  if (kv) exf__kv_append(kv, &a);
  exf__attention_run(ctx, n, exf__attention_forward, &a);
  if (!kv || ctx->status != EXF_OK) return;
  kv->t = a.tq;
  if (++kv->layer < kv->n_layers) return;
  kv->length += a.tq;
  kv->layer = 0;
}

/* With P the softmax, dP = dout V^T: dV = P^T dout, dS = P (dP - <dout, out>), dQ = dS K
   / sqrt(C/H), dK = dS^T Q / sqrt(C/H); side by side as in qkv */
static void exf__attention_op_backward(exf_ctx *ctx, exf__node *n) {
  exf__attention a = exf__attention_of(ctx, n);
  a.dout = exf__dout(n);
  if (!(a.dq = exf__grad(ctx, n->in[0], &a.acc))) return;
  a.dkey = a.dq + a.width;
  a.dvalue = a.dkey + a.width;
  exf__attention_run(ctx, n, exf__attention_backward, &a);
}

EXF__ROW(attention, exf__attention_shape, exf__attention_op, 0)

EXF_API exf_tensor *exf_attention(exf_ctx *ctx, exf_tensor *qkv,
                                  const exf_attention_desc *desc) {
  const exf_attention_desc defaults = {1, 0, NULL};
  exf__arg arg;
  arg.attention = desc ? *desc : defaults;
  if (!arg.attention.n_heads) arg.attention.n_heads = 1;
  return exf__run(ctx, &exf__op_attention, &qkv, 1, &arg);
}

/* ---- ops: fuse ----------------------------------------------------------- >>fuse */

/* th = sum_i a_i E_i, the sum that ExFusion is about: a (N), E (N,..) -> th (..). Its
   gradient with respect to E has rank one, dE_i = a_i G with G = dL/dth. So the sets of a
   pool gather G alone, and their pool the weights: the optimizer and exf_expert_grad
   multiply them. */

/* Training, evaluation and merge all come here, so that they agree bit for bit. */
static void exf__fuse_run(exf_ctx *ctx, const exf__experts *e) {
  exf__split s = exf__split_make(e->size, 1024, (double)e->n_experts * (double)e->size);
  exf__parallel(ctx, ctx->k->fuse, e, &s);
}

static int exf__fuse_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  const exf_shape *a = &n->in[0]->shape, *e = &n->in[1]->shape;
  if (a->n != 1 || e->n < 1 || a->dim[0] != e->dim[0] || a->dim[0] == 0)
    return exf__bad_shape(ctx, n, "needs weights (N) and experts (N,..), N >= 1");
  *out = exf__one_expert(e);
  return 1;
}

/* a (N), experts (N,P), th (P), seen as flat */
static exf__experts exf__experts_of(const exf__node *n) {
  exf__experts e = {n->in[0]->size, n->out->size, n->out->size, n->in[0]->data,
                    n->in[1]->data, NULL, n->out->data, NULL};
  return e;
}

static void exf__fuse_forward(exf_ctx *ctx, exf__node *n) {
  exf__experts e = exf__experts_of(n);
  exf__fuse_run(ctx, &e);
}

/* da_i = [da_i +] <G, E_i>, summed in double */
static void exf__fuse_weights_backward(exf_ctx *ctx, exf__node *n) {
  exf__experts e = exf__experts_of(n);
  exf__split s = exf__split_make(e.n_experts, 1, 2.0 * (double)n->in[1]->size);
  int acc;
  exf_real *da = exf__grad(ctx, n->in[0], &acc);
  e.g = exf__dout(n);
  if (!da || !(e.dots = (double *)exf__arena(ctx, e.n_experts, sizeof(double)))) return;
  memset(e.dots, 0, e.n_experts * sizeof(double));
  exf__parallel(ctx, ctx->k->dots, &e, &s);
  for (size_t i = 0; i < e.n_experts; i++)
    da[i] = EXF__R(e.dots[i] + (acc ? (double)da[i] : 0.0));
}

/* dE_i = [dE_i +] a_i G; of a pool: G itself, and that a was used in this pass */
static void exf__fuse_backward(exf_ctx *ctx, exf__node *n) {
  exf_tensor *a = n->in[0], *experts = n->in[1];
  exf__pool *pool = experts->param ? experts->param->pool : NULL;
  exf__elements e = {0, 0, 1, exf__dout(n), NULL, NULL, NULL, NULL};
  exf__fuse_weights_backward(ctx, n);
  if (ctx->status != EXF_OK) return;
  if (pool) exf__pool_add(pool, a, n->tape);
  e.y = exf__grad(ctx, experts, &e.acc);
  for (size_t i = 0; e.y && i < (pool ? 1 : a->size); i++, e.y += n->out->size) {
    if (!pool) e.s = a->data[i];
    ctx->k->axpy(&e, 0, n->out->size, NULL);
  }
}

static const exf__op exf__op_fuse = {
    "fuse", exf__fuse_shape, exf__fuse_forward, exf__fuse_backward, 0, 0, 2, 0};

EXF_API exf_tensor *exf_fuse(exf_ctx *ctx, exf_tensor *a, exf_tensor *experts) {
  exf_tensor *in[2] = {a, experts};
  return exf__run(ctx, &exf__op_fuse, in, 2, NULL);
}

/* ---- ops: custom ------------------------------------------------------- >>custom */

/* An op whose functions come from outside, in its descriptor: one row for all of them,
   each under its own name in messages. */

static int exf__custom_shape(exf_ctx *ctx, exf__node *n, exf_shape *out) {
  (void)ctx;
  *out = n->arg.custom.out;
  return 1;
}

static void exf__custom_forward(exf_ctx *ctx, exf__node *n) {
  (void)ctx;
  n->arg.custom.forward(n->arg.custom.user, (const exf_tensor *const *)n->in,
                        n->out->data);
}

/* The user's function only adds, to NULL for an input that needs no gradient: what is new
   is cleared first. */
static void exf__custom_backward(exf_ctx *ctx, exf__node *n) {
  exf_real *din[EXF_MAX_INPUTS];
  int acc;
  for (int i = 0; i < n->n_in; i++) {
    din[i] = exf__grad(ctx, n->in[i], &acc);
    if (din[i] && !acc) memset(din[i], 0, n->in[i]->size * sizeof(exf_real));
  }
  if (ctx->status == EXF_OK)
    n->arg.custom.backward(n->arg.custom.user, (const exf_tensor *const *)n->in, n->out,
                           exf__dout(n), din);
}

static const exf__op exf__op_custom = {
    "custom", exf__custom_shape, exf__custom_forward, exf__custom_backward, 0, 0, 0, 1};

EXF_API exf_tensor *exf_custom(exf_ctx *ctx, const exf_custom_desc *desc,
                               exf_tensor *const *in, int n) {
  exf__arg arg;
  if (!desc || !desc->forward || !desc->backward || !in || n < 1
      || n > EXF_MAX_INPUTS) {
    exf_fail(ctx, EXF_ARG, "custom: needs forward, backward and 1..%d inputs",
             EXF_MAX_INPUTS);
    return NULL;
  }
  arg.custom = *desc;
  return exf__run(ctx, &exf__op_custom, in, n, &arg);
}

/* ---- the op table ------------------------------------------------------- >>table */

/* Every row exf__op_NAME there is. The tests check the gradient of each against
   differences, and do not compile when one has no recipe: an op is added by its functions
   and its row in one of the sections above, its declaration, its name here, and a recipe
   in tests/test_ops.c. */
#define EXF__OPS(X)                                                                      \
  X(add) X(add_over) X(sub) X(mul) X(div) X(where)                                       \
  X(scale) X(neg) X(exp) X(log) X(sqrt) X(square) X(abs) X(clamp) X(tanh) X(sigmoid)     \
  X(relu) X(gelu) X(gelu_tanh) X(silu)                                                   \
  X(matmul) X(linear)                                                                    \
  X(softmax) X(log_softmax) X(layernorm) X(rmsnorm) X(cross_entropy)                     \
  X(embedding) X(gather) X(dropout)                                                      \
  X(reshape) X(permute) X(concat) X(slice)                                               \
  X(sum) X(mean) X(max)                                                                  \
  X(attention) X(fuse) X(custom)

/* ---- gradient check ------------------------------------------------- >>gradcheck */

/* Backward against the loss itself: every number of every parameter is moved a little,
   and the change of the loss is compared with the gradient. What is not obvious: all
   calls of the loss must draw the same dropout, so the count of draws starts anew. */

/* What one check is told; h is the width of a difference. */
typedef struct exf__gradcheck {
  exf_model *model;
  exf_tensor *(*loss)(exf_ctx *, void *);
  void *user;
  double h;
  exf_gradcheck_report *report;
} exf__gradcheck;

/* f'(x) = (f(x-2h) - 8 f(x-h) + 8 f(x+h) - f(x+2h)) / 12h + O(h^4) */
static exf_real exf__slope(const exf__gradcheck *g, exf_real *x) {
  static const double weight[] = {1, -8, 0, 8, -1};
  exf_ctx *ctx = g->model->ctx;
  exf_real x0 = *x;
  double sum = 0;
  for (int k = -2; k <= 2; k++) {
    if (k == 0) continue;
    ctx->n_dropouts = 0;
    *x = EXF__R((double)x0 + k * g->h);
    sum += weight[k + 2] * exf_item(g->loss(ctx, g->user));
    exf_rewind(ctx);
  }
  *x = x0;
  return EXF__R(sum / (12 * g->h));
}

/* All numbers of one parameter: grad (shape) by backward, numeric (shape) to be filled.
   The worst difference is relative to the largest number of the tensor, since rounding
   leaves small ones beside large ones no digits; worst_relative asks each for itself. */
static void exf__gradcheck_param(const exf__gradcheck *g, exf_param *p,
                                 const exf_real *grad, exf_real *numeric) {
  exf_gradcheck_report *r = g->report;
  double largest = 0;
  for (size_t i = 0; i < p->tensor.size; i++) {
    numeric[i] = exf__slope(g, &p->tensor.data[i]);
    largest = EXF__MAX(largest, fabs((double)numeric[i]));
  }
  r->largest = r->n_checked ? EXF__MIN(r->largest, largest) : largest;
  for (size_t i = 0; i < p->tensor.size; i++, r->n_checked++) {
    double diff = fabs((double)grad[i] - (double)numeric[i]), relative = 0;
    if (diff != diff) diff = HUGE_VAL;   /* a NaN is the worst of all */
    if (diff != 0) {   /* of a gradient of zeros: infinite */
      relative = diff / EXF__MAX(fabs((double)numeric[i]), largest / 1000);
      diff /= largest;
    }
    if (!(relative <= r->worst_relative)) r->worst_relative = relative;
    if (diff <= r->worst) continue;
    r->worst = diff;
    snprintf(r->where, sizeof r->where, "%.100s[%zu]", p->name, i);
  }
}

/* One backward pass, whose gradients the parameters keep, then no-grad passes alone. */
EXF_API exf_status exf_gradcheck(exf_model *model,
                                 exf_tensor *(*loss)(exf_ctx *ctx, void *user),
                                 void *user, double h, exf_gradcheck_report *report) {
  if (!model) return EXF_ARG;
  exf_ctx *ctx = model->ctx;
  if (!loss || !report)
    return exf_fail(ctx, EXF_ARG, "exf_gradcheck: the loss or the report is NULL");
  memset(report, 0, sizeof *report);
  if (h == 0) h = sizeof(exf_real) == 8 ? 1e-3 : 1e-2;
  const exf__gradcheck g = {model, loss, user, h, report};
  exf_model_zero_grad(model);
  exf_rewind(ctx);
  ctx->n_dropouts = 0;
  if (exf_backward(ctx, loss(ctx, user)) != EXF_OK) return ctx->status;
  exf_rewind(ctx);
  int was = exf_grad_set(ctx, 0);
  for (size_t i = 0; i < model->n_params && ctx->status == EXF_OK; i++) {
    exf_param *p = model->params[i];
    size_t n = p->tensor.size;
    if (p->frozen || !n) continue;
    exf_real *grad = (exf_real *)exf__calloc_n(ctx, n, 2 * sizeof(exf_real));
    if (grad && (!p->has_grad || exf_expert_grad(p, grad) == EXF_OK))
      exf__gradcheck_param(&g, p, grad, grad + n);
    exf__free(ctx, grad);
  }
  exf_grad_set(ctx, was);
  exf_model_zero_grad(model);
  return ctx->status;
}

/* ---- layers ----------------------------------------------------------- >>layers */

/* A layer is a few parameters under one name and the op that uses them. It belongs to
   its model, and a constructor that fails leaves the model as it was. */

/* Parameter "<name>.<part>". */
static exf_tensor *exf__layer_param(exf_model *model, const char *name, const char *part,
                                    exf_shape shape, double std, double value,
                                    int decay) {
  exf__name full;
  if (!model || !exf__join(model->ctx, full, name, part)) return NULL;
  const exf_param_desc d = {shape, std, value, decay, 0};
  return exf_param_new(model, full, &d);
}

/* y = x W^T + b: x (..,in), W (out,in), b (out) */
EXF_API exf_linear_layer *exf_linear_new(exf_model *model, const char *name, size_t in,
                                         size_t out, const exf_linear_desc *desc) {
  const exf_linear_desc none = {0, 0};
  exf__mark mark = exf__model_mark(model);
  exf_linear_layer *l = (exf_linear_layer *)exf__model_alloc(model, sizeof *l);
  if (!l) return NULL;
  if (!desc) desc = &none;
  double std = desc->init_std == 0 && in ? 1 / sqrt((double)in) : desc->init_std;
  l->weight = exf__layer_param(model, name, "weight", exf_shape2(out, in), std, 0, 1);
  if (desc->bias)
    l->bias = exf__layer_param(model, name, "bias", exf_shape1(out), 0, 0, 0);
  if (model->ctx->status == EXF_OK) return l;
  return (exf_linear_layer *)exf__model_undo(model, &mark);
}

EXF_API exf_tensor *exf_linear_forward(exf_ctx *ctx, const exf_linear_layer *layer,
                                       exf_tensor *x) {
  return layer ? exf_linear(ctx, x, layer->weight, layer->bias) : NULL;
}

/* LayerNorm (x - mean) / sqrt(var + eps) w + b, RMSNorm x / sqrt(mean x^2 + eps) w:
   x (..,width), w and b (width) */
EXF_API exf_norm_layer *exf_norm_new(exf_model *model, const char *name, size_t width,
                                     const exf_norm_desc *desc) {
  const exf_norm_desc none = {0, 0, 0};
  exf__mark mark = exf__model_mark(model);
  exf_norm_layer *l = (exf_norm_layer *)exf__model_alloc(model, sizeof *l);
  if (!l) return NULL;
  if (!desc) desc = &none;
  l->eps = desc->eps == 0 ? 1e-5 : desc->eps;
  l->rms = desc->rms != 0;
  l->weight = exf__layer_param(model, name, "weight", exf_shape1(width), 0, 1, 0);
  if (desc->bias && !desc->rms)
    l->bias = exf__layer_param(model, name, "bias", exf_shape1(width), 0, 0, 0);
  if (model->ctx->status == EXF_OK) return l;
  return (exf_norm_layer *)exf__model_undo(model, &mark);
}

EXF_API exf_tensor *exf_norm_forward(exf_ctx *ctx, const exf_norm_layer *layer,
                                     exf_tensor *x) {
  if (!layer) return NULL;
  return layer->rms ? exf_rmsnorm(ctx, x, layer->weight, layer->eps)
                    : exf_layernorm(ctx, x, layer->weight, layer->bias, layer->eps);
}

/* Rows for exf_embedding: (n,width) */
EXF_API exf_tensor *exf_embedding_new(exf_model *model, const char *name, size_t n,
                                      size_t width, double init_std) {
  return exf__layer_param(model, name, "weight", exf_shape2(n, width), init_std, 0, 1);
}

/* ---- ExFusion ------------------------------------------------- >>exfusion_impl */

/* An FFN is dense, or holds N experts th_1 .. th_N of each of its tensors th = W1, b1,
   W2, b2 (SwiGLU: Wg, bg too), and a rule that fuses them. In every step

     th = sum_i a_i th_i                      one set of the dense FFN's shapes
     y  = act(x W1^T + b1) W2^T + b2          one dense pass, on th
     G  = dL/dth                              as for a dense FFN
     dL/da_i  = sum over the tensors of <G, th_i>
     dL/dth_i = a_i G                         never written down: the pool of the experts
                                              keeps G and a, the optimizer multiplies

   At the end the experts are merged: th, once more, takes their place for good. It is
   parameters that are fused, not outputs of experts: two matrices and an activation would
   give cross terms. Where a comes from is all that a rule decides. Ours are

     sw   a = 1/N                             in training, evaluation and merge
     dw   a learnable, 1/N at the start, or a = softmax(z / tau), z learnable, 0 at first
     mb   training:  r = softmax((R u + c) / tau), u = mean over all rows of x
                     a = mu M + (1 - mu) r, and M <- a after the step
                     (routed: a = r, and M <- mu M + (1 - mu) r)
          evaluation and merge:  a = M, the memory bank

   and a rule from outside is written as they are: a struct of functions, what it needs
   made by exf_ffn_param, its arithmetic by ops, so that its gradients come by themselves.
   What is not obvious: evaluation and merge are one function with training = 0. That is
   why merged logits equal those of evaluation bit for bit, whatever the rule.

   ExFusion (arXiv 2603.27965) fixes sw, dw, mb and the single fused FFN; the formulas of
   router, bank and upcycling are this library's reading of it. */

struct exf__ffn_state {
  const exf_rule *rule;         /* NULL: dense */
  const exf_rule *starting;     /* whose init is running, or NULL */
  size_t n_own;                 /* parameters of the rule: right behind the parts */
  uint32_t n_upcycles;          /* so far: each draws other numbers */
};

EXF_API const char *exf_variant_name(exf_variant v) {
  static const char *const names[] = {"dense", "sw", "dw", "mb", "rule"};
  return (unsigned)v <= (unsigned)EXF_RULE ? names[v] : "?";
}

EXF_API size_t exf_model_n_ffns(const exf_model *model) {
  return model ? model->n_ffns : 0;
}

EXF_API exf_ffn *exf_model_ffn(const exf_model *model, size_t i) {
  return model && i < model->n_ffns ? model->ffns[i] : NULL;
}

/* ---- what a rule may make */

/* The parameter goes to the end of the registry, and a buffer's numbers out of it: until
   the FFN changes over, whatever is made can be undone. A rule that cannot be merged
   stays for good, and so its parameters are plain ones. */
EXF_API exf_tensor *exf_ffn_param(exf_ffn *f, const char *name,
                                  const exf_param_desc *desc) {
  exf__name full;
  if (!f || f->model->ctx->status != EXF_OK) return NULL;
  exf_model *m = f->model;
  if (!f->state->starting) {
    exf_fail(m->ctx, EXF_STATE, "ffn_param: '%.80s' of %s: only the init of its rule may "
             "make it", name ? name : "", f->name);
    return NULL;
  }
  if (!exf__join(m->ctx, full, f->name, name ? name : "")
      || !exf__name_free(m, "ffn", name && *name ? full : NULL))
    return NULL;
  exf_tensor *t = exf_param_new(m, full, desc);
  if (!t) return NULL;
  exf_param *p = t->param;
  p->kind = f->state->starting->forward ? EXF__PLAIN : EXF__FUSION;
  if (!desc || !desc->buffer) return t;
  exf__buffer *b = (exf__buffer *)exf__calloc_n(m->ctx, 1, sizeof *b);
  if (!b || !(b->name = exf__strdup(m->ctx, full))) {
    exf__free(m->ctx, b);
    return NULL;
  }
  b->tensor = p->tensor;
  b->tensor.param = NULL;
  b->tensor.flags = 0;
  b->ffn = f;
  b->saved = 1;
  b->next = m->buffers;
  m->buffers = b;
  m->n_params--;
  p->tensor.data = NULL;
  exf__param_free(m->ctx, p);
  return &b->tensor;
}

EXF_API exf_tensor *exf_ffn_tensor(const exf_ffn *f, const char *name) {
  exf__name full;
  if (!f || !name || !exf__join(f->model->ctx, full, f->name, name)) return NULL;
  exf_param *p = exf_model_find(f->model, full);
  if (p) return &p->tensor;
  for (exf__buffer *b = f->model->buffers; b; b = b->next)
    if (strcmp(b->name, full) == 0) return &b->tensor;
  return NULL;
}

/* ---- static weights: a = 1/N, which no function stands for */

static const exf_rule exf__rule_sw = {"sw", NULL, NULL, NULL, NULL, NULL, NULL};

/* ---- dynamic weights: a (N) itself, or a = softmax(z / tau) */

static void exf__dw_init(exf_ctx *ctx, exf_ffn *f, const exf_fusion_desc *d) {
  (void)ctx;
  const double start = d->dw_softmax ? 0 : 1.0 / (double)d->n_experts;
  const exf_param_desc weight = {exf_shape1(d->n_experts), 0, start, 0, 0};
  exf_ffn_param(f, "fusion.weight", &weight);
}

static exf_tensor *exf__dw_weights(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x,
                                   int training) {
  exf_tensor *a = exf_ffn_tensor(f, "fusion.weight");
  (void)x;
  (void)training;
  if (!f->fusion.dw_softmax) return a;
  if (f->fusion.tau != 1) a = exf_scale(ctx, a, 1 / f->fusion.tau);
  return exf_softmax(ctx, a);
}

static const exf_rule exf__rule_dw = {"dw", NULL, exf__dw_init, exf__dw_weights, NULL,
                                      NULL, NULL};

/* ---- memory bank: R (N,C), c (N), M (N) = 1/N; the last r (N) is kept for diagnosis */

static void exf__mb_init(exf_ctx *ctx, exf_ffn *f, const exf_fusion_desc *d) {
  (void)ctx;
  const exf_shape n = exf_shape1(d->n_experts);
  const exf_param_desc matrix = {exf_shape2(d->n_experts, f->desc.width), 0.02, 0, 0, 0};
  const exf_param_desc bias = {n, 0, 0, 0, 0};
  const exf_param_desc bank = {n, 0, 1.0 / (double)d->n_experts, 0, 1};
  exf_ffn_param(f, "router.weight", &matrix);
  exf_ffn_param(f, "router.bias", &bias);
  exf_ffn_param(f, "bank", &bank);
  if (exf_ffn_param(f, "routed", &bank)) f->model->buffers->saved = 0;
}

/* r = softmax((R u + c) / tau), u (C) = mean over all rows of x (..,C): a constant,
   unless the router is attached */
static exf_tensor *exf__mb_route(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x) {
  if (!x) return NULL;
  int last = x->shape.n - 1;
  if (last < 0 || x->shape.dim[last] != f->desc.width) {
    exf_fail(ctx, EXF_SHAPE, "ffn: '%s' takes (..,%zu), not %s", f->name, f->desc.width,
             exf__show(&x->shape).s);
    return NULL;
  }
  exf_tensor *u = exf_mean(ctx, x, EXF_AXIS(last) - 1u, 0);
  if (!f->fusion.attach) u = exf_detach(ctx, u);
  exf_tensor *l = exf_linear(ctx, u, exf_ffn_tensor(f, "router.weight"),
                             exf_ffn_tensor(f, "router.bias"));
  if (f->fusion.tau != 1) l = exf_scale(ctx, l, 1 / f->fusion.tau);
  exf_tensor *r = exf_softmax(ctx, l);
  if (r && ctx->training)
    memcpy(exf_ffn_tensor(f, "routed")->data, r->data, r->size * sizeof(exf_real));
  return r;
}

/* a = mu M + (1 - mu) r, M a constant. Written r + mu (M - r), which is exactly 1 for one
   expert. So dL/dl_i = (1 - mu) r_i / tau <G, th_i - sum_j r_j th_j>, l = R u + c. */
static exf_tensor *exf__mb_weights(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x,
                                   int training) {
  exf_tensor *bank = exf_ffn_tensor(f, "bank");
  if (!training) return bank;
  exf_tensor *r = exf__mb_route(ctx, f, x);
  if (!r || f->fusion.routed) return r;
  return exf_add(ctx, r, exf_scale(ctx, exf_sub(ctx, bank, r), f->fusion.mu));
}

/* M <- mean a; routed: M <- mu M + (1 - mu) mean r */
static void exf__mb_step(exf_ffn *f, const exf_real *mean) {
  exf_tensor *bank = exf_ffn_tensor(f, "bank");
  exf_real mu = f->fusion.routed ? EXF__R(f->fusion.mu) : 0, *m = bank->data;
  for (size_t i = 0; i < bank->size; i++) m[i] = mean[i] + mu * (m[i] - mean[i]);
}

static const exf_rule exf__rule_mb = {"mb", NULL, exf__mb_init, exf__mb_weights, NULL,
                                      NULL, exf__mb_step};

/* ---- choosing a rule */

/* 0: the default; EXF_ZERO: 0 */
static double exf__or_default(double value, double otherwise) {
  return value == 0 ? otherwise : value == EXF_ZERO ? 0 : value;
}

/* The rule of a descriptor; NULL and an error when there is none, or it is not whole. */
static const exf_rule *exf__rule_of(exf_ctx *ctx, const exf_fusion_desc *d) {
  static const exf_rule *const ours[] = {NULL, &exf__rule_sw, &exf__rule_dw,
                                         &exf__rule_mb, NULL};
  const exf_rule *r = d->rule;
  const char *wrong = NULL;
  if ((unsigned)d->variant > EXF_RULE || (unsigned)d->upcycle >= EXF_N_UPCYCLES)
    wrong = "unknown variant or upcycling mode";
  else if (!r && d->variant == EXF_RULE) wrong = "the rule is NULL";
  else if (r && d->variant != EXF_RULE && d->variant != EXF_DENSE)
    wrong = "with a rule the variant must be EXF_RULE";
  else if (r && (!r->name || !*r->name)) wrong = "the rule has no name";
  else if (r && (r->weights != NULL) + (r->fuse != NULL) + (r->forward != NULL) > 1)
    wrong = "a rule gives one of weights, fuse and forward at most";
  if (!wrong) return r ? r : ours[d->variant];
  exf_fail(ctx, EXF_ARG, "ffn: %s%s%.80s", wrong, r && r->name ? ": " : "",
           r && r->name ? r->name : "");
  return NULL;
}

/* Fills in the defaults; the rule, or NULL and an error when a value is out of range. */
static const exf_rule *exf__fusion_resolve(exf_ctx *ctx, exf_fusion_desc *d,
                                           int from_scratch) {
  const exf_rule *rule = exf__rule_of(ctx, d);
  if (!rule) return NULL;
  if (d->rule) d->variant = EXF_RULE;
  if (d->n_experts == 0) d->n_experts = 4;
  d->mu = exf__or_default(d->mu, 0.95);
  d->spread = exf__or_default(d->spread, 1);
  d->drop = exf__or_default(d->drop, 0.5);
  if (d->tau == 0) d->tau = 1;
  if (d->upcycle == EXF_UP_DEFAULT)
    d->upcycle = from_scratch ? EXF_UP_INDEPENDENT : EXF_UP_ZEROSUM;
  if (d->mu >= 0 && d->mu <= 1 && d->tau > 0 && d->drop >= 0 && d->drop <= 1
      && d->spread >= 0 && d->spread - d->spread == 0)
    return rule;
  exf_fail(ctx, EXF_ARG, "ffn: mu %g must lie in [0,1], tau %g be positive, drop %g lie "
           "in [0,1], spread %g be finite and not negative", d->mu, d->tau, d->drop,
           d->spread);
  return NULL;
}

/* ---- forward ------------------------------------------------------------- >>ffn */

/* The weights a (N) of this pass. Evaluation and merge, training = 0, show the rule no x:
   what it gives them can depend on nothing but its parameters and buffers. */
static exf_tensor *exf__ffn_weights(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x,
                                    int training) {
  const exf_rule *rule = f->state->rule;
  size_t n = f->fusion.n_experts;
  exf_tensor *a = NULL;
  if (rule->weights) a = rule->weights(ctx, f, training ? x : NULL, training);
  if (!a) a = exf_full(ctx, exf_shape1(n), 1.0 / (double)n);
  if (a && (a->shape.n != 1 || a->size != n))
    exf_fail(ctx, EXF_SHAPE, "ffn: '%s': the rule '%.80s' gives weights %s for %zu "
             "experts", f->name, rule->name, exf__show(&a->shape).s, n);
  return ctx->status == EXF_OK ? a : NULL;
}

/* What computes the FFN in this pass, th[part] (..): its parameters, or its experts
   (N,..) as the rule fuses them. 0 after an error. */
static int exf__ffn_fuse(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x, int training,
                         exf_tensor *th[EXF_N_PARTS]) {
  const exf_rule *rule = f->state->rule;
  exf_tensor *a = rule && !rule->fuse ? exf__ffn_weights(ctx, f, x, training) : NULL;
  for (int k = 0; k < EXF_N_PARTS && ctx->status == EXF_OK; k++) {
    th[k] = f->part[k] ? &f->part[k]->tensor : NULL;
    if (!rule || !th[k]) continue;
    exf_shape one = exf__one_expert(&th[k]->shape);
    th[k] = rule->fuse ? rule->fuse(ctx, f, (exf_part)k, training)
                       : exf_fuse(ctx, a, th[k]);
    if (!th[k] || !exf__same(&th[k]->shape, &one))
      exf_fail(ctx, EXF_SHAPE, "ffn: '%s': the rule '%.80s' fuses experts to %s, not %s",
               f->name, rule->name, th[k] ? exf__show(&th[k]->shape).s : "nothing",
               exf__show(&one).s);
  }
  return ctx->status == EXF_OK;
}

/* The fused set of evaluation, which is that of the merge: no tape, no dropout. */
static int exf__ffn_fuse_merged(const exf_ffn *f, exf_tensor *th[EXF_N_PARTS]) {
  exf_ctx *ctx = f->model->ctx;
  int grad = exf_grad_set(ctx, 0), training = exf_training_set(ctx, 0);
  int ok = exf__ffn_fuse(ctx, f, NULL, 0, th);
  exf_grad_set(ctx, grad);
  exf_training_set(ctx, training);
  return ok;
}

/* h = act(x W1^T + b1) (..,h), or silu(x Wg^T + bg) * (x W1^T + b1);  y = h W2^T + b2 */
EXF_API exf_tensor *exf_ffn_apply(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x,
                                  exf_tensor *const th[EXF_N_PARTS]) {
  static const exf__unary_op unary[] = {EXF__U_GELU, EXF__U_GELU_TANH, EXF__U_RELU,
                                        EXF__U_SILU};
  if (!f || !th) return NULL;
  exf_tensor *h = exf_linear(ctx, x, th[EXF_W1], th[EXF_B1]);
  if (f->desc.act != EXF_SWIGLU)
    return exf__linear_of(ctx, h, unary[f->desc.act], th[EXF_W2], th[EXF_B2]);
  h = exf_mul(ctx, exf_silu(ctx, exf_linear(ctx, x, th[EXF_WG], th[EXF_BG])), h);
  return exf_linear(ctx, h, th[EXF_W2], th[EXF_B2]);
}

EXF_API exf_tensor *exf_ffn_forward(exf_ctx *ctx, const exf_ffn *f, exf_tensor *x) {
  exf_tensor *th[EXF_N_PARTS];
  if (!ctx || !f) return NULL;
  const exf_rule *rule = f->state->rule;
  int training = ctx->training || ctx->routing;
  if (rule && rule->forward) return rule->forward(ctx, f, x, training);
  return exf__ffn_fuse(ctx, f, x, training, th) ? exf_ffn_apply(ctx, f, x, th) : NULL;
}

/* After an update: the rules of all FFNs that a backward pass went through take their
   step. mean: room for the weights of the FFN with most experts. */
static void exf__ffns_stepped(exf_model *model, exf_real *mean) {
  for (size_t i = 0; i < model->n_ffns; i++) {
    exf_ffn *f = model->ffns[i];
    const exf_rule *rule = f->state->rule;
    if (!rule || !rule->step) continue;
    const exf__pool *pool = f->part[EXF_W1]->pool;
    int used = pool && pool->n_sums;
    for (int k = 0; k < EXF_N_PARTS && !pool; k++)
      used |= f->part[k] && f->part[k]->has_grad;
    for (size_t j = 0; used && pool && j < pool->n; j++)
      mean[j] = exf__mean_weight(pool, j);
    if (used) rule->step(f, pool ? mean : NULL);
  }
}

/* ---- upcycling and merging --------------------------------------------- >>upcycle */

/* Upcycling makes experts (N,..) of the parts th_0 (..) of a dense FFN; merging makes one
   set of them again. Both are all or nothing, for every FFN of the call. What is not
   obvious: whatever is made, by the rule's init too, is appended to the registry, where a
   mark undoes it. When nothing can fail any more, new and old parameters exchange their
   places, and the mark undoes the old ones. */
typedef struct exf__change {     /* of one FFN */
  exf_fusion_desc fusion;        /* resolved; EXF_DENSE: a merge */
  const exf_rule *rule;
  exf_param *part[EXF_N_PARTS];  /* part[EXF_W1] NULL: nothing changes */
  size_t own, n_own;             /* what the rule made: place in the registry, number */
} exf__change;

/* Its place in the registry; n_params when it has none. */
static size_t exf__param_index(const exf_model *model, const exf_param *p) {
  size_t i = 0;
  while (i < model->n_params && model->params[i] != p) i++;
  return i;
}

/* Takes the parameter at `from` to the place `to`; those between move up by one. */
static void exf__param_move(exf_model *m, size_t from, size_t to) {
  exf_param *p = m->params[from];
  for (; from < to; from++) m->params[from] = m->params[from + 1];
  for (; from > to; from--) m->params[from] = m->params[from - 1];
  m->params[to] = p;
}

/* Exchanges the parameters of the FFN with those of c, in their places in the registry;
   the rule's come right behind. The old ones end up last. */
static void exf__change_apply(exf_ffn *f, const exf__change *c) {
  exf_model *m = f->model;
  size_t behind = 0, last = m->n_params - 1;
  for (int k = 0; k < EXF_N_PARTS; k++) {
    if (!f->part[k]) continue;
    size_t at = exf__param_index(m, f->part[k]);
    m->params[exf__param_index(m, c->part[k])] = f->part[k];
    m->params[at] = f->part[k] = c->part[k];
    behind = EXF__MAX(behind, at + 1);
  }
  for (size_t i = 0; i < f->state->n_own; i++) exf__param_move(m, behind, last);
  for (size_t i = 0; i < c->n_own; i++) exf__param_move(m, c->own + i, behind + i);
  for (exf__buffer **link = &m->buffers, *b; !c->rule && (b = *link) != NULL;) {
    if (b->ffn == f) *link = b->next;
    else link = &b->next;
    if (b->ffn == f) exf__buffer_free(m->ctx, b);
  }
  f->fusion = c->fusion;
  f->state->rule = c->rule;
  f->state->n_own = c->n_own;
  if (c->rule) f->state->n_upcycles++;
}

/* A parameter that draws, decays and is frozen as `like`, appended to the registry. */
static exf_param *exf__param_like(const exf_param *like, const char *name,
                                  const exf_shape *shape) {
  exf_model *m = like->model;
  const exf_param_desc d = {*shape, like->init_std, like->init_value, like->decay, 0};
  exf_param *p = exf__param_make(m, name, &d);
  if (!p) return NULL;
  exf_param_freeze(p, like->frozen);
  if (exf__param_insert(m, p, m->n_params)) return p;
  exf__param_free(m->ctx, p);
  return NULL;
}

/* ---- where experts come from */

/* zerosum: th_0 + s (e_i - mean e), e_i the draws already in E (N,P), th0 (P). The mean
   of the experts is th_0: at equal weights the function stays what it was. */
static void exf__zerosum(exf_real *e, const exf_real *th0, size_t n, size_t p, double s) {
  for (size_t j = 0; j < p; j++) {
    double mean = 0;
    for (size_t i = 0; i < n; i++) mean += (double)e[i * p + j];
    mean /= (double)n;
    for (size_t i = 0; i < n; i++)
      e[i * p + j] = EXF__R((double)th0[j] + s * ((double)e[i * p + j] - mean));
  }
}

/* drop: which of the h hidden units of an expert are drawn afresh: the first of a random
   order (unit[j] = 1). */
static void exf__drop_units(const exf_ffn *f, double share, uint32_t draw, size_t *order,
                            unsigned char *unit) {
  size_t h = f->desc.hidden, count = (size_t)(share * (double)h);
  uint32_t stream = exf_rng_stream(f->name);
  for (size_t j = 0; j < h; j++) order[j] = j;
  memset(unit, 0, h);
  for (size_t j = 0; j < count; j++) {
    double u = exf_rng_uniform(f->model->ctx->desc.seed, stream, draw, j);
    size_t pick = j + (size_t)(u * (double)(h - j)), k = order[j];
    order[j] = order[pick];
    order[pick] = k;
    unit[order[j]] = 1;
  }
}

/* Keeps the fresh draws in e (P) of the chosen units, row of W1, b1, Wg, bg and column of
   W2, and copies the rest from th0. */
static void exf__drop_mix(const exf_ffn *f, int part, const unsigned char *unit,
                          const exf_real *th0, exf_real *e, size_t p) {
  size_t h = f->desc.hidden, columns = p / h;
  for (size_t j = 0; j < p; j++) {
    int fresh = part == EXF_W2 ? unit[j % h] : part == EXF_B2 ? 0 : unit[j / columns];
    if (!fresh) e[j] = th0[j];
  }
}

/* Expert values E (N,P) of one part by the upcycling mode, e_i ~ the init distribution of
   th_0 (P) from the stream of its name: independent sqrt(N) e_i, so that the mean of the
   experts has the deviation of one dense init; independent-plain e_i; copy th_0; zerosum
   and drop as above. A fresh independent expert 0 draws what a dense FFN draws (number
   0); where th_0 stays part of the experts the draws must be others. */
static void exf__upcycle_fill(const exf_ffn *f, const exf_fusion_desc *d, int part,
                              exf_real *e) {
  exf_ctx *ctx = f->model->ctx;
  const exf_param *th0 = f->part[part];
  size_t n = d->n_experts, p = th0->tensor.size, *order = NULL;
  double scale = d->upcycle == EXF_UP_INDEPENDENT ? sqrt((double)n) : 1;
  unsigned char *unit = NULL;
  int keeps = d->upcycle == EXF_UP_ZEROSUM || d->upcycle == EXF_UP_DROP;
  uint32_t draw = (f->state->n_upcycles + (keeps ? 1u : 0u)) << 16;
  if (d->upcycle == EXF_UP_DROP) {
    order = (size_t *)exf__alloc_n(ctx, f->desc.hidden, sizeof(size_t) + 1);
    unit = order ? (unsigned char *)(order + f->desc.hidden) : NULL;
  }
  for (size_t i = 0; i < n && ctx->status == EXF_OK; i++, draw++) {
    if (d->upcycle == EXF_UP_COPY) {
      memcpy(e + i * p, th0->tensor.data, p * sizeof(exf_real));
      continue;
    }
    exf__param_draw(th0, th0->name, draw, scale, e + i * p, p);
    if (d->upcycle != EXF_UP_DROP) continue;
    exf__drop_units(f, d->drop, draw, order, unit);
    exf__drop_mix(f, part, unit, th0->tensor.data, e + i * p, p);
  }
  if (d->upcycle == EXF_UP_ZEROSUM && ctx->status == EXF_OK)
    exf__zerosum(e, th0->tensor.data, n, p, d->spread);
  exf__free(ctx, order);
}

/* ---- making the change */

/* "<ffn>.c_fc.weight" (..) -> "<ffn>.experts.c_fc.weight" (N,..). Fused by weights, the
   experts have one gradient G in common, and form a pool; else each set has a gradient
   (N,..). A rule that cannot be merged keeps them for good: they are plain parameters. */
static exf_param *exf__expert_param(exf_ffn *f, const exf__change *c, int part) {
  exf_ctx *ctx = f->model->ctx;
  const exf_param *th0 = f->part[part];
  exf__name tail, name;
  exf_shape shape = exf_shape1(c->fusion.n_experts);
  if (!exf__join(ctx, tail, "experts", th0->name + strlen(f->name) + (*f->name ? 1 : 0))
      || !exf__join(ctx, name, f->name, tail) || !exf__name_free(f->model, "ffn", name))
    return NULL;
  shape.n += th0->tensor.shape.n;
  for (int i = 1; i < shape.n; i++) shape.dim[i] = th0->tensor.shape.dim[i - 1];
  exf_param *p = exf__param_like(th0, name, &shape);
  if (!p) return NULL;
  if (!c->rule->forward) {
    p->kind = EXF__EXPERTS;
    p->dense_name = exf__strdup(ctx, th0->name);
  }
  if (!c->rule->forward && !c->rule->fuse) {
    p->pool = part == EXF_W1 ? exf__pool_new(ctx, c->fusion.n_experts)
                             : c->part[EXF_W1]->pool;
    if (p->pool) p->pool->refs++;
  }
  exf__upcycle_fill(f, &c->fusion, part, p->tensor.data);
  return p;
}

/* The experts first, then what the rule needs. */
static void exf__upcycle_make(exf_ffn *f, const exf_fusion_desc *desc, exf__change *c) {
  exf_model *m = f->model;
  exf_ctx *ctx = m->ctx;
  int fresh = 1;
  if (f->fusion.variant != EXF_DENSE) {
    exf_fail(ctx, EXF_STATE, "upcycle: %s already has experts: merge it first", f->name);
    return;
  }
  for (int k = 0; k < EXF_N_PARTS; k++) fresh &= !f->part[k] || !f->part[k]->trained;
  c->fusion = *desc;
  c->rule = exf__fusion_resolve(ctx, &c->fusion, fresh);
  if (!c->rule) return;
  for (int k = 0; k < EXF_N_PARTS && ctx->status == EXF_OK; k++)
    if (f->part[k]) c->part[k] = exf__expert_param(f, c, k);
  c->own = m->n_params;
  f->state->starting = c->rule;
  if (c->rule->init && ctx->status == EXF_OK) c->rule->init(ctx, f, &c->fusion);
  f->state->starting = NULL;
  c->n_own = m->n_params - c->own;
}

/* th (..), as evaluation fuses it, under the names of the dense FFN. Merged parameters
   count as trained: what is upcycled from them is to keep their function. */
static void exf__merge_make(exf_ffn *f, exf__change *c) {
  exf_tensor *th[EXF_N_PARTS];
  if (f->fusion.variant == EXF_DENSE) return;
  if (f->state->rule->forward) {
    exf_fail(f->model->ctx, EXF_STATE, "merge: %s: its rule '%.80s' has a forward pass "
             "of its own and cannot be merged; exf_model_save keeps its experts",
             f->name, f->state->rule->name);
    return;
  }
  if (!exf__ffn_fuse_merged(f, th)) return;
  for (int k = 0; k < EXF_N_PARTS; k++) {
    const exf_param *e = f->part[k];
    if (!e) continue;
    exf_param *p = exf__param_like(e, e->dense_name, &th[k]->shape);
    if (!p) return;
    memcpy(p->tensor.data, th[k]->data, p->tensor.size * sizeof(exf_real));
    p->trained = 1;
    c->part[k] = p;
  }
}

/* Upcycles n FFNs of a model, or merges them (NULL): all of them or none. Both ends meet
   in one undo, of the new parameters after an error, of the old ones otherwise. */
static exf_status exf__ffns_change(exf_model *m, exf_ffn *const *ffns, size_t n,
                                   const exf_fusion_desc *desc) {
  exf_ctx *ctx = m->ctx;
  exf__mark mark = exf__model_mark(m);
  if (ctx->status != EXF_OK) return ctx->status;
  exf__change *c = (exf__change *)exf__calloc_n(ctx, n, sizeof *c);
  for (size_t i = 0; i < n && ctx->status == EXF_OK; i++) {
    if (desc) exf__upcycle_make(ffns[i], desc, &c[i]);
    else exf__merge_make(ffns[i], &c[i]);
  }
  if (ctx->status == EXF_OK) {
    size_t n_params = mark.n_params;
    for (size_t i = 0; i < n; i++) {
      if (!c[i].part[EXF_W1]) continue;
      n_params = n_params + c[i].n_own - ffns[i]->state->n_own;
      exf__change_apply(ffns[i], &c[i]);
    }
    mark = exf__model_mark(m);
    mark.n_params = n_params;
  }
  exf__model_undo(m, &mark);
  exf__free(ctx, c);
  return ctx->status;
}

/* Leaving experts has a name of its own, so that no zero descriptor merges by mistake. */
static exf_status exf__upcycle(exf_model *m, exf_ffn *const *ffns, size_t n,
                               const exf_fusion_desc *desc) {
  if (m->ctx->status != EXF_OK) return m->ctx->status;
  if (!desc) return exf_fail(m->ctx, EXF_ARG, "upcycle: the descriptor is NULL");
  if (desc->variant == EXF_DENSE && !desc->rule)
    return exf_fail(m->ctx, EXF_ARG, "upcycle: the variant is dense: choose sw, dw or "
                    "mb, or merge");
  return exf__ffns_change(m, ffns, n, desc);
}

EXF_API exf_status exf_ffn_upcycle(exf_ffn *f, const exf_fusion_desc *desc) {
  return f ? exf__upcycle(f->model, &f, 1, desc) : EXF_ARG;
}

EXF_API exf_status exf_ffn_merge(exf_ffn *f) {
  return f ? exf__ffns_change(f->model, &f, 1, NULL) : EXF_ARG;
}

EXF_API exf_status exf_model_upcycle(exf_model *model, const exf_fusion_desc *desc) {
  return model ? exf__upcycle(model, model->ffns, model->n_ffns, desc) : EXF_ARG;
}

EXF_API exf_status exf_model_merge(exf_model *model) {
  return model ? exf__ffns_change(model, model->ffns, model->n_ffns, NULL) : EXF_ARG;
}

/* ---- a new FFN: dense at first, then upcycled if it is to have experts */

/* W1, Wg (h,C), W2 (C,h); b1, bg (h), b2 (C) */
static exf_param *exf__ffn_part(exf_ffn *f, exf_part part) {
  const exf_ffn_desc *d = &f->desc;
  int bias = part == EXF_B1 || part == EXF_B2 || part == EXF_BG;
  int down = part == EXF_W2 || part == EXF_B2;
  const char *layer = down ? d->down : part <= EXF_B1 ? d->up : d->gate;
  size_t out = down ? d->width : d->hidden, in = down ? d->hidden : d->width;
  exf__name name;
  if (!exf__join(f->model->ctx, name, f->name, layer)) return NULL;
  exf_shape shape = bias ? exf_shape1(out) : exf_shape2(out, in);
  double std = bias ? 0 : down ? d->init_std_out : d->init_std;
  exf_tensor *t = exf__layer_param(f->model, name, bias ? "bias" : "weight", shape, std,
                                   0, !bias);
  return t ? t->param : NULL;
}

/* Gates first: the order of the registry, which is the order of files and of sums. A
   hidden width that does not fit is refused where its tensor is made. */
static exf_ffn *exf__ffn_make(exf_model *model, const char *name,
                              const exf_ffn_desc *desc) {
  static const exf_part order[] = {EXF_WG, EXF_BG, EXF_W1, EXF_B1, EXF_W2, EXF_B2};
  exf_ffn *f = (exf_ffn *)exf__model_alloc(model, sizeof *f);
  if (f && (!name || !desc))
    exf_fail(model->ctx, EXF_ARG, "ffn: the name or the descriptor is NULL");
  if (!f || !name || !desc || !(f->name = exf__model_strdup(model, name))) return NULL;
  f->state = (struct exf__ffn_state *)exf__model_alloc(model, sizeof *f->state);
  if (!f->state) return NULL;
  f->model = model;
  f->desc = *desc;
  exf_ffn_desc *d = &f->desc;
  if (d->hidden == 0 && !exf__mul_size(4, d->width, &d->hidden)) d->hidden = SIZE_MAX;
  if (!d->up) d->up = "c_fc";
  if (!d->down) d->down = "c_proj";
  if (!d->gate) d->gate = "c_gate";
  if (d->init_std == 0 && d->width) d->init_std = 1 / sqrt((double)d->width);
  if (d->init_std_out == 0 && d->hidden) d->init_std_out = 1 / sqrt((double)d->hidden);
  if (desc->width == 0 || (unsigned)desc->act >= EXF_N_ACTS) {
    exf_fail(model->ctx, EXF_ARG, "ffn: '%s': the width must be positive and the "
             "activation known", name);
    return NULL;
  }
  for (int i = desc->act == EXF_SWIGLU ? 0 : 2; i < EXF_N_PARTS; i++)
    if (i % 2 == 0 || desc->bias) f->part[order[i]] = exf__ffn_part(f, order[i]);
  if (model->ctx->status != EXF_OK
      || !exf__grow(model->ctx, &model->ffns, model->n_ffns, 1, &model->ffn_room))
    return NULL;
  model->ffns[model->n_ffns++] = f;
  if (desc->fusion.variant == EXF_DENSE && !desc->fusion.rule) return f;
  return exf_ffn_upcycle(f, &desc->fusion) == EXF_OK ? f : NULL;
}

EXF_API exf_ffn *exf_ffn_new(exf_model *model, const char *name,
                             const exf_ffn_desc *desc) {
  exf__mark mark = exf__model_mark(model);
  exf_ffn *f = exf__ffn_make(model, name, desc);
  return f ? f : (exf_ffn *)exf__model_undo(model, &mark);
}

/* ---- the merged view: what a dense model would hold */

/* Whether merging leaves the parameter as it is. */
static int exf__kept(const exf_param *p) { return p->kind == EXF__PLAIN; }

/* Experts (N,..) count as one, and what belongs to a rule not at all. */
EXF_API size_t exf_model_count_merged(const exf_model *model) {
  size_t n = 0;
  for (size_t i = 0; i < exf_model_n_params(model); i++) {
    const exf_tensor *t = &model->params[i]->tensor;
    if (exf__kept(model->params[i])) n += t->size;
    else if (model->params[i]->dense_name) n += t->size / t->shape.dim[0];
  }
  return n;
}

/* The FFN that a set of experts belongs to, and the part that it is. */
static const exf_ffn *exf__ffn_of(const exf_param *experts, int *part) {
  const exf_model *m = experts->model;
  for (size_t i = 0; i < m->n_ffns; i++)
    for (*part = 0; *part < EXF_N_PARTS; ++*part)
      if (m->ffns[i]->part[*part] == experts) return m->ffns[i];
  return NULL;
}

/* The dense-shaped parameters of a model: those that are kept as they are, experts fused,
   the rules' own left out. All of it in the step arena; NULL on failure. */
static exf_st_item *exf__merged(exf_model *model, size_t *n) {
  exf_st_item *items =
      (exf_st_item *)exf__arena(model->ctx, model->n_params, sizeof(exf_st_item));
  const exf_ffn *fused = NULL;
  exf_tensor *th[EXF_N_PARTS];
  *n = 0;
  for (size_t i = 0; items && i < model->n_params; i++) {
    const exf_param *p = model->params[i];
    const exf_tensor *t = &p->tensor;
    int part = 0;
    if (p->kind == EXF__FUSION) continue;
    if (p->kind == EXF__EXPERTS) {
      const exf_ffn *f = exf__ffn_of(p, &part);
      if (f != fused && !exf__ffn_fuse_merged(f, th)) return NULL;
      fused = f;
      t = th[part];
    }
    const exf_st_item item = {exf__kept(p) ? p->name : p->dense_name, t->shape, t->data};
    items[(*n)++] = item;
  }
  return items;
}

/* ---- diagnosis --------------------------------------------------------- >>diagnose */

/* How far an FFN's experts are from one another, and how many of them count: read-only,
   in double, by the weights that evaluation and merge would use. */

/* diversity_i = ||th_i - th|| / ||th||, th = sum_i a_i th_i, norms over all tensors;
   a, diversity (N) */
static void exf__diversity(const exf_ffn *f, const exf_real *a, double *diversity) {
  size_t n = f->fusion.n_experts;
  double norm = 0;
  for (size_t i = 0; i < n; i++) diversity[i] = 0;
  for (int k = 0; k < EXF_N_PARTS; k++) {
    const exf_tensor *e = f->part[k] ? &f->part[k]->tensor : NULL;
    size_t p = e ? e->size / n : 0;
    for (size_t j = 0; j < p; j++) {
      double th = 0;
      for (size_t i = 0; i < n; i++) th += (double)a[i] * (double)e->data[i * p + j];
      norm += th * th;
      for (size_t i = 0; i < n; i++) {
        double d = (double)e->data[i * p + j] - th;
        diversity[i] += d * d;
      }
    }
  }
  for (size_t i = 0; i < n; i++) diversity[i] = norm > 0 ? sqrt(diversity[i] / norm) : 0;
}

/* (sum |a|)^2 / sum a^2: N when all weigh the same, 1 when one expert has it all */
EXF_API double exf_ffn_diagnose(const exf_ffn *f, double *weights, double *router,
                                double *diversity) {
  if (!f || f->fusion.variant == EXF_DENSE) return 1;
  exf_ctx *ctx = f->model->ctx;
  int grad = exf_grad_set(ctx, 0), training = exf_training_set(ctx, 0);
  const exf_tensor *a = exf__ffn_weights(ctx, f, NULL, 0);
  exf_grad_set(ctx, grad);
  exf_training_set(ctx, training);
  if (!a) return 0;
  const exf_tensor *r = f->fusion.variant == EXF_MB ? exf_ffn_tensor(f, "routed") : a;
  double sum = 0, squares = 0;
  for (size_t i = 0; i < a->size; i++) {
    double w = (double)a->data[i];
    sum += fabs(w);
    squares += w * w;
    if (weights) weights[i] = w;
    if (router) router[i] = (double)r->data[i];
  }
  if (diversity) exf__diversity(f, a->data, diversity);
  return squares > 0 ? sum * sum / squares : 0;
}

/* ---- attention layer, block ------------------------------------------- >>block_impl */

/* A pre-norm Transformer block. Training, evaluation and generation run the same code:
   dropout is nothing outside training, and a cache is seen by the attention alone. */

/* qkv (3C,C) and its bias (3C), proj (C,C) and its bias (C) */
EXF_API exf_attn_layer *exf_attn_new(exf_model *model, const char *qkv_name,
                                     const char *proj_name, const exf_attn_desc *desc) {
  exf__mark mark = exf__model_mark(model);
  exf_attn_layer *l = (exf_attn_layer *)exf__model_alloc(model, sizeof *l);
  size_t width = desc ? desc->width : 0, heads = desc ? desc->n_heads : 0, three;
  if (!l) return NULL;
  if (!desc || heads == 0 || width % heads != 0 || !exf__mul_size(3, width, &three)) {
    exf_fail(model->ctx, EXF_ARG, "attention: width %zu is not divisible by %zu heads",
             width, heads);
    return (exf_attn_layer *)exf__model_undo(model, &mark);
  }
  const exf_linear_desc qkv = {desc->bias, desc->init_std};
  const exf_linear_desc proj = {desc->bias, desc->init_std_out};
  l->n_heads = heads;
  l->causal = desc->causal;
  l->qkv = exf_linear_new(model, qkv_name, width, three, &qkv);
  l->proj = exf_linear_new(model, proj_name, width, width, &proj);
  return l->proj ? l : (exf_attn_layer *)exf__model_undo(model, &mark);
}

/* y = proj(attention(qkv(x))): (B,T,C) -> (B,T,3C) -> (B,T,C) -> (B,T,C) */
EXF_API exf_tensor *exf_attn_forward(exf_ctx *ctx, const exf_attn_layer *l,
                                     exf_tensor *x, exf_kv *cache) {
  if (!l) return NULL;
  const exf_attention_desc d = {l->n_heads, l->causal, cache};
  exf_tensor *y = exf_attention(ctx, exf_linear_forward(ctx, l->qkv, x), &d);
  return exf_linear_forward(ctx, l->proj, y);
}

/* "ln_1" ... or "norm1" ... behind the block's name; the FFN is "mlp" in both worlds */
static exf_block *exf__block_make(exf_model *model, const char *name,
                                  const exf_block_desc *desc) {
  static const char *const parts[2][6] = {
    {"ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "c_fc", "c_proj"},
    {"norm1", "attn.qkv", "attn.proj", "norm2", "fc1", "fc2"}
  };
  exf_block *b = (exf_block *)exf__model_alloc(model, sizeof *b);
  exf__name n1, qkv, proj, n2, mlp;
  if (b && !desc) exf_fail(model->ctx, EXF_ARG, "block: the descriptor is NULL");
  if (!b || !desc) return NULL;
  const char *const *part = parts[desc->names == EXF_NAMES_TIMM];
  if (!exf__drop_ok(model->ctx, "block", desc->dropout)
      || !exf__drop_ok(model->ctx, "block", desc->drop_path)
      || !exf__join(model->ctx, n1, name, part[0])
      || !exf__join(model->ctx, qkv, name, part[1])
      || !exf__join(model->ctx, proj, name, part[2])
      || !exf__join(model->ctx, n2, name, part[3])
      || !exf__join(model->ctx, mlp, name, "mlp"))
    return NULL;
  double std = desc->init_std != 0 ? desc->init_std : 0.02;
  double std_out = desc->init_std_out != 0 ? desc->init_std_out : std;
  const exf_norm_desc norm = {0, desc->bias, desc->eps};
  const exf_attn_desc attn = {desc->width, desc->n_heads, desc->causal, desc->bias, std,
                              std_out};
  exf_ffn_desc ffn = desc->ffn;
  ffn.width = desc->width;
  ffn.bias = desc->bias;
  ffn.init_std = std;
  ffn.init_std_out = std_out;
  ffn.up = part[4];
  ffn.down = part[5];
  b->dropout = desc->dropout;
  b->drop_path = desc->drop_path;
  b->norm1 = exf_norm_new(model, n1, desc->width, &norm);
  b->attn = exf_attn_new(model, qkv, proj, &attn);
  b->norm2 = exf_norm_new(model, n2, desc->width, &norm);
  b->ffn = exf_ffn_new(model, mlp, &ffn);
  return b->ffn && model->ctx->status == EXF_OK ? b : NULL;
}

/* All of the block or nothing: a part that fails takes the others with it. */
EXF_API exf_block *exf_block_new(exf_model *model, const char *name,
                                 const exf_block_desc *desc) {
  exf__mark mark = exf__model_mark(model);
  exf_block *b = exf__block_make(model, name, desc);
  return b ? b : (exf_block *)exf__model_undo(model, &mark);
}

/* x + drop_path(dropout(y)). Where the branch ends in a product, whose result nothing
   else reads, backward included, the sum takes the place of y. */
static exf_tensor *exf__residual(exf_ctx *ctx, const exf_block *b, exf_tensor *x,
                                 exf_tensor *y, int in_place) {
  y = exf_drop_path(ctx, exf_dropout(ctx, y, b->dropout), b->drop_path);
  return in_place && x && y && exf__same(&x->shape, &y->shape) ? exf__add_over(ctx, x, y)
                                                               : exf_add(ctx, x, y);
}

/* x = x + attn(norm1(x)); x = x + ffn(norm2(x)), all (B,T,C). What a rule's own forward
   pass returns may be read by others: there the sum gets a tensor of its own. */
EXF_API exf_tensor *exf_block_forward(exf_ctx *ctx, const exf_block *b, exf_tensor *x,
                                      exf_kv *cache) {
  if (!b) return NULL;
  const exf_rule *rule = b->ffn->state->rule;
  exf_tensor *y = exf_norm_forward(ctx, b->norm1, x);
  y = exf_attn_forward(ctx, b->attn, y, cache);
  x = exf__residual(ctx, b, x, y, 1);
  y = exf_ffn_forward(ctx, b->ffn, exf_norm_forward(ctx, b->norm2, x));
  return exf__residual(ctx, b, x, y, !rule || !rule->forward);
}

/* ---- optimizers ------------------------------------------------------ >>optim_impl */

/* An optimizer keeps what it has learned about a model: a slot of moments for every
   parameter that was there when it was made, found by the parameter's id. What upcycling
   or merging makes later has no slot and is refused. Experts of a pool have no gradients
   of their own: expert i meets abar_i G, with their common G and its weight's mean over
   the backward passes, so that one pass over G updates them all. All that may fail comes
   before the first change: an update is whole or not made. */

typedef struct exf__moments {      /* of one parameter */
  uint64_t id;                     /* of the parameter */
  exf_real *m, *v;                 /* (shape); SGD: no v, without momentum no m */
  exf_shape shape;                 /* the parameter's; shared moments: of one expert */
  double lr_scale, weight_decay;   /* set by groups */
} exf__moments;

struct exf_optim {
  exf_model *model;
  exf_optim_desc desc;             /* resolved */
  uint64_t t;                      /* updates made */
  size_t n;
  exf__moments *slot;              /* (n) */
};

static int exf__not_negative(double x) { return x >= 0 && x - x == 0; }  /* and finite */

static exf__moments *exf__moments_find(const exf_optim *o, const exf_param *p) {
  for (size_t i = 0; i < o->n; i++)
    if (o->slot[i].id == p->id) return &o->slot[i];
  return NULL;
}

/* The slot of p; NULL and an error when upcycling or merging made p after o. Where all
   have been checked, exf__moments_find is enough. */
static exf__moments *exf__optim_moments(const exf_optim *o, const exf_param *p) {
  exf__moments *s = exf__moments_find(o, p);
  if (!s)
    exf_fail(o->model->ctx, EXF_STATE, "optim: '%s' is newer than the optimizer: make "
             "the optimizer anew after upcycling or merging", p->name);
  return s;
}

/* ---- making and freeing */

/* Puts defaults in place of zeros; 0 and an error when a number is out of its range. */
static int exf__optim_resolve(exf_ctx *ctx, exf_optim_desc *d) {
  d->beta1 = exf__or_default(d->beta1, 0.9);
  d->beta2 = exf__or_default(d->beta2, 0.999);
  if (d->eps == 0) d->eps = 1e-8;
  if (!(d->beta1 >= 0) || !(d->beta1 < 1) || !(d->beta2 >= 0) || !(d->beta2 < 1)
      || !(d->eps > 0) || !(d->momentum >= 0) || !(d->momentum < 1)
      || !exf__not_negative(d->weight_decay) || !(d->clip >= 0))
    exf_fail(ctx, EXF_ARG, "optim: beta1 %g, beta2 %g and momentum %g must lie in [0,1), "
             "eps %g be positive, weight decay %g and clip %g not negative, the decay "
             "finite", d->beta1, d->beta2, d->momentum, d->eps, d->weight_decay, d->clip);
  if (d->shared_moments && d->kind != EXF_ADAMW)
    exf_fail(ctx, EXF_ARG, "optim: shared_moments are for AdamW: SGD has none to spare");
  return ctx->status == EXF_OK;
}

/* Cleared moments for p, as many as the algorithm keeps. After a failure the slot may be
   incomplete: exf_optim_free takes it as it is. */
static void exf__moments_init(exf_ctx *ctx, exf__moments *s, const exf_param *p,
                              const exf_optim_desc *d) {
  s->id = p->id;
  s->shape = d->shared_moments && p->pool ? exf__one_expert(&p->tensor.shape)
                                          : p->tensor.shape;
  s->lr_scale = 1;
  s->weight_decay = p->decay ? d->weight_decay : 0;
  size_t size = exf__shape_size(&s->shape);
  if (d->kind == EXF_ADAMW || d->momentum != 0)
    s->m = (exf_real *)exf__calloc_n(ctx, size, sizeof(exf_real));
  if (d->kind == EXF_ADAMW && s->m)
    s->v = (exf_real *)exf__calloc_n(ctx, size, sizeof(exf_real));
}

/* Does not look at parameters: there may be others by now. */
EXF_API void exf_optim_free(exf_optim *o) {
  if (!o) return;
  exf_ctx *ctx = o->model->ctx;
  for (size_t i = 0; i < o->n; i++) {
    exf__free(ctx, o->slot[i].m);
    exf__free(ctx, o->slot[i].v);
  }
  o->model->optim = NULL;
  exf__free(ctx, o->slot);
  exf__free(ctx, o);
}

EXF_API exf_optim *exf_optim_new(exf_model *model, const exf_optim_desc *desc) {
  exf_optim_desc d;
  memset(&d, 0, sizeof d);
  if (desc) d = *desc;
  if (!model || model->ctx->status != EXF_OK) return NULL;
  exf_ctx *ctx = model->ctx;
  if (!exf__optim_resolve(ctx, &d)) return NULL;
  if (model->optim) {
    exf_fail(ctx, EXF_STATE, "optim: the model has an optimizer, which holds its "
             "moments: exf_optim_free it first");
    return NULL;
  }
  exf_optim *o = (exf_optim *)exf__calloc_n(ctx, 1, sizeof *o);
  if (!o) return NULL;
  o->model = model;
  o->desc = d;
  o->slot = (exf__moments *)exf__calloc_n(ctx, model->n_params, sizeof(exf__moments));
  for (; ctx->status == EXF_OK && o->n < model->n_params; o->n++)
    exf__moments_init(ctx, &o->slot[o->n], model->params[o->n], &d);
  if (ctx->status == EXF_OK) return model->optim = o;
  exf_optim_free(o);
  return NULL;
}

EXF_API uint64_t exf_optim_steps(const exf_optim *o) { return o ? o->t : 0; }

/* Parameters that are newer than the optimizer are passed over; a step refuses them. */
EXF_API exf_status exf_optim_group(exf_optim *o,
                                   int (*select)(const exf_param *param, void *user),
                                   void *user, double lr_scale, double weight_decay) {
  if (!o) return EXF_ARG;
  if (!select || !exf__not_negative(lr_scale) || !exf__not_negative(weight_decay))
    return exf_fail(o->model->ctx, EXF_ARG, "optim_group: needs a predicate, lr_scale %g "
                    "and weight decay %g finite and not negative", lr_scale,
                    weight_decay);
  for (size_t i = 0; i < o->model->n_params; i++) {
    exf__moments *s = exf__moments_find(o, o->model->params[i]);
    if (!s || !select(o->model->params[i], user)) continue;
    s->lr_scale = lr_scale;
    s->weight_decay = weight_decay;
  }
  return EXF_OK;
}

/* ---- the step */

static int exf__is_updated(const exf_param *p) { return p->has_grad && !p->frozen; }

/* Squared norm of a parameter's gradient. Experts of a pool count their G once, or, when
   the norm over all experts is asked for, ||a_1 G .. a_N G||^2 = ||abar||^2 ||G||^2. */
static double exf__grad_square(const exf_optim *o, const exf_param *p) {
  const exf_real *g = p->tensor.grad;
  size_t n = p->pool ? p->tensor.size / p->pool->n : p->tensor.size;
  double square = 0, weights = 0;
  exf__experts e = {1, n, n, NULL, g, g, NULL, &square};
  o->model->ctx->k->dots(&e, 0, 1, NULL);
  if (!exf__not_negative(square)) {   /* above 1e19 a square may overflow in float */
    square = 0;
    for (size_t i = 0; i < n; i++) square += (double)g[i] * (double)g[i];
  }
  if (!p->pool || !o->desc.expert_norm) return square;
  for (size_t i = 0; i < p->pool->n; i++) {
    double a = (double)exf__mean_weight(p->pool, i);
    weights += a * a;
  }
  return square * weights;
}

/* Squared norm of all gradients, of every parameter once; 0 and an error when one has no
   slot. *bad: the first parameter whose gradient is not finite stays there. */
static int exf__optim_square(const exf_optim *o, double *square, const exf_param **bad) {
  for (size_t i = 0; i < o->model->n_params; i++) {
    const exf_param *p = o->model->params[i];
    if (!exf__is_updated(p)) continue;
    if (!exf__optim_moments(o, p)) return 0;
    double part = exf__grad_square(o, p);
    if (!*bad && !(part - part == 0)) *bad = p;
    *square += part;
  }
  return 1;
}

typedef struct exf__update {      /* of one parameter */
  exf__adam adam;                 /* AdamW's kernels see this alone; SGD: m may be NULL */
  exf_real lr, decay, momentum;   /* SGD, decay coupled */
  int nesterov;
} exf__update;

/* SGD, p and m (N,size), G (size), for every expert i:
     g = scale_i clip G + decay p;  m = momentum m + g;  p = p - lr m
   with nesterov p - lr (g + momentum m), without m p - lr g. Range: numbers of one
   expert. */
EXF__KERNEL(exf__sgd) {
  EXF__OPERANDS(exf__update, u);
  for (size_t i = 0; i < u.adam.n_experts; i++) {
    exf_real *p = u.adam.p + i * u.adam.stride;
    exf_real *m = u.adam.m ? u.adam.m + i * u.adam.stride : NULL;
    exf_real scale = u.adam.scale[i] * u.adam.clip;
    for (size_t j = begin; j < end; j++) {
      exf_real g = scale * u.adam.g[j] + u.decay * p[j];
      if (m) {
        m[j] = u.momentum * m[j] + g;
        g = u.nesterov ? g + u.momentum * m[j] : m[j];
      }
      p[j] -= u.lr * g;
    }
  }
}

/* One parameter (N,size), N = 1 without a pool, by SGD or torch.optim.AdamW:
     m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
     p = (1 - lr decay) p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
   with g = scale_i clip G (size), scale = abar (N). Moments that experts share are those
   of G. Those of expert i would be abar_i m and abar_i^2 v, and its step
   sgn(abar_i) m / (sqrt v + eps / |abar_i|): scale is the sign, 1/N stands for |abar_i|.
   scale: room for N numbers. */
static void exf__optim_update(const exf_optim *o, exf_param *p, double lr, double clip,
                              exf_real *scale) {
  exf_ctx *ctx = o->model->ctx;
  const exf_optim_desc *d = &o->desc;
  const exf__moments *s = exf__moments_find(o, p);
  size_t n = p->pool ? p->pool->n : 1, size = p->tensor.size / n;
  int shared = p->pool && d->shared_moments;
  scale[0] = 1;
  for (size_t i = 0; p->pool && i < n; i++) {
    scale[i] = exf__mean_weight(p->pool, i);
    if (shared) scale[i] = EXF__R((scale[i] > 0) - (scale[i] < 0));
  }
  lr *= s->lr_scale;
  exf__update u = {
      {n, size, p->tensor.data, s->m, s->v, p->tensor.grad, scale, EXF__R(clip),
       EXF__R(1 - lr * s->weight_decay), EXF__R(d->beta1), EXF__R(1 - d->beta1),
       EXF__R(d->beta2), EXF__R(1 - d->beta2),
       EXF__R(lr / (1 - exf__pow_d(d->beta1, o->t))),
       EXF__R(1 / sqrt(1 - exf__pow_d(d->beta2, o->t))),
       EXF__R(d->eps * (shared ? (double)n : 1))},
      EXF__R(lr), EXF__R(s->weight_decay), EXF__R(d->momentum), d->nesterov};
  exf__kernel *kernel = d->kind != EXF_ADAMW ? exf__sgd
                        : shared ? ctx->k->adamw_shared : ctx->k->adamw;
  exf__split split =
      exf__split_make(size, EXF__SUM_BLOCK, 10.0 * (double)size * (double)n);
  exf__parallel(ctx, kernel, &u, &split);
  p->trained = 1;
}

/* Check, norm, clip, update, banks. The step arena gives the only memory: room for the
   weights of one FFN. */
EXF_API exf_status exf_optim_step(exf_optim *o, double lr, double *norm) {
  if (!o) return EXF_ARG;
  exf_model *model = o->model;
  exf_ctx *ctx = model->ctx;
  if (ctx->status != EXF_OK) return ctx->status;
  if (!exf__not_negative(lr))
    return exf_fail(ctx, EXF_ARG, "optim: learning rate %g must be finite and not "
                    "negative", lr);
  size_t most = 1;
  for (size_t i = 0; i < model->n_ffns; i++)
    most = EXF__MAX(most, model->ffns[i]->fusion.n_experts);
  exf_real *weights = (exf_real *)exf__arena(ctx, most, sizeof(exf_real));
  const exf_param *bad = NULL;
  double square = 0, clip = 1;
  if (!weights || !exf__optim_square(o, &square, &bad)) return ctx->status;
  if (norm) *norm = sqrt(square);
  if (bad && !o->desc.allow_nonfinite) {
    exf_model_zero_grad(model);
    return exf_fail(ctx, EXF_NUMERIC, "optim: the gradient of '%s' is not finite; "
                    "nothing was updated: lower the learning rate or check the input",
                    bad->name);
  }
  if (o->desc.clip > 0) clip = EXF__MIN(1, o->desc.clip / (sqrt(square) + 1e-6));
  o->t++;
  for (size_t i = 0; i < model->n_params; i++)
    if (exf__is_updated(model->params[i]))
      exf__optim_update(o, model->params[i], lr, clip, weights);
  exf__ffns_stepped(model, weights);
  exf_model_zero_grad(model);
  return ctx->status;
}

/* ---- schedules and notices ---------------------------------------------- >>schedule */

/* Learning rates by step number, what weight decay makes of the experts, and notices.
   A schedule is a formula and keeps nothing, so a resumed run needs only its step. A
   notice is no error: the configuration is sound, but it reduces to something simpler. */

/* x = (step - warmup) / (steps - warmup), at most 1. linear: lr + (min_lr - lr) x;
   cosine: min_lr + (lr - min_lr) / 2 (1 + cos(pi x)). A warm-up longer than the run is
   legal: the run stays in it. */
EXF_API double exf_schedule_lr(const exf_schedule *s, uint64_t step) {
  if (!s) return 0;
  if (step < s->warmup) return s->lr * (double)(step + 1) / (double)(s->warmup + 1);
  if (s->kind == EXF_SCHEDULE_CONSTANT) return s->lr;
  double span = s->steps > s->warmup ? (double)(s->steps - s->warmup) : 1;
  double x = EXF__MIN((double)(step - s->warmup) / span, 1);
  if (s->kind == EXF_SCHEDULE_LINEAR) return s->lr + (s->min_lr - s->lr) * x;
  return s->min_lr + (s->lr - s->min_lr) / 2 * (1 + exf__cospi_d(x));
}

/* Under AdamW with constant weights all experts take the same step, so their differences
   only shrink, by 1 - lr_t wd each time. */
EXF_API double exf_expert_decay(const exf_schedule *s, double weight_decay) {
  double left = 1;
  uint64_t every = s ? s->steps / 65536 + 1 : 1;   /* long schedules are sampled */
  for (uint64_t t = 0; s && t < s->steps; t += every)
    left *= exf__pow_d(1 - exf_schedule_lr(s, t) * weight_decay,
                       EXF__MIN(every, s->steps - t));
  return left;
}

/* Whether a note of the list below holds for f. Of a rule's own fuse or forward nothing
   is known, and of its own weights not the sum; a rule without any of them is sw. */
static int exf__note_holds(const exf_ffn *f, int note, int adam) {
  const exf_fusion_desc *d = &f->fusion;
  const exf_rule *rule = d->variant == EXF_RULE ? d->rule : NULL;
  int many = d->n_experts > 1, mean = !rule || !rule->weights;
  int sw = many && (d->variant == EXF_SW || (rule && mean));
  const int holds[] = {
      !many && mean, many && d->upcycle == EXF_UP_COPY, sw && adam, sw && !adam,
      many && mean && d->upcycle == EXF_UP_INDEPENDENT_PLAIN};
  return d->variant != EXF_DENSE && !(rule && (rule->fuse || rule->forward))
         && holds[note];
}

EXF_API int exf_notices(const exf_model *model, const exf_optim *optim) {
  static const char *const texts[] = {
      "N = 1: one expert is a dense FFN (dw raw: plus one learned scalar)",
      "identical copies with equal weights receive identical gradients and stay "
      "identical: dense training in disguise; use zerosum or drop",
      "sw under AdamW is dense AdamW from the experts' mean with N times eps: expect "
      "dense results",
      "sw under SGD is dense SGD at lr/N with N times the coupled decay",
      "experts drawn without rescaling: the fused FFN starts 1/sqrt(N) smaller"};
  int said = 0, adam = !optim || optim->desc.kind == EXF_ADAMW;
  for (int note = 0; model && note < (int)(sizeof texts / sizeof *texts); note++) {
    const char *first = NULL;
    size_t n = 0;
    for (size_t i = 0; i < model->n_ffns; i++)
      if (exf__note_holds(model->ffns[i], note, adam) && n++ == 0)
        first = model->ffns[i]->name;
    if (!first) continue;
    exf__notice(model->ctx, "notice: %s (%zu of %zu FFNs): %s", first, n, model->n_ffns,
                texts[note]);
    said++;
  }
  return said;
}

/* ---- moving average ----------------------------------------------------- >>ema_impl */

/* The average of a model's merged view: plain parameters, and th fused of experts. It has
   the dense model's names and shapes, so it goes on when FFNs are upcycled or merged. The
   averages are the parameters of a model of their own, in the order of the view. */

struct exf_ema {
  exf_model *model;
  double decay;
  exf_model *averages;
};

EXF_API void exf_ema_free(exf_ema *e) {
  if (!e) return;
  exf_ctx *ctx = e->model->ctx;
  exf_model_free(e->averages);
  exf__free(ctx, e);
}

/* The average begins with what is there now. */
EXF_API exf_ema *exf_ema_new(exf_model *model, double decay) {
  size_t n;
  if (!model || model->ctx->status != EXF_OK) return NULL;
  exf_ctx *ctx = model->ctx;
  if (!(decay >= 0 && decay < 1)) {
    exf_fail(ctx, EXF_ARG, "ema: decay %g must lie in [0, 1)", decay);
    return NULL;
  }
  exf_st_item *now = exf__merged(model, &n);
  exf_ema *e = (exf_ema *)exf__calloc_n(ctx, 1, sizeof *e);
  if (!e) return NULL;
  e->model = model;
  e->decay = decay;
  e->averages = exf_model_new(ctx);
  for (size_t i = 0; now && i < n; i++) {
    exf_param_desc d;
    memset(&d, 0, sizeof d);
    d.shape = now[i].shape;
    exf_tensor *t = exf_param_new(e->averages, now[i].name, &d);
    if (t) exf_param_set(t->param, now[i].data, t->size);
  }
  if (ctx->status == EXF_OK) return e;
  exf_ema_free(e);
  return NULL;
}

/* The view still holds what is averaged, and nothing else. */
static exf_status exf__ema_check(const exf_ema *e, const exf_st_item *now, size_t n) {
  const exf_model *avg = e->averages;
  for (size_t i = 0; i < n || i < avg->n_params; i++)
    if (i >= n || i >= avg->n_params || strcmp(now[i].name, avg->params[i]->name) != 0
        || !exf__same(&now[i].shape, &avg->params[i]->tensor.shape))
      return exf_fail(avg->ctx, EXF_STATE, "ema: the parameters of the model changed at "
                      "'%s'", i < n ? now[i].name : avg->params[i]->name);
  return EXF_OK;
}

/* e = decay e + (1 - decay) th, in double */
EXF_API exf_status exf_ema_update(exf_ema *e) {
  size_t n;
  if (!e) return EXF_ARG;
  exf_ctx *ctx = e->model->ctx;
  if (ctx->status != EXF_OK) return ctx->status;
  exf_st_item *now = exf__merged(e->model, &n);
  if (!now || exf__ema_check(e, now, n) != EXF_OK) return ctx->status;
  for (size_t i = 0; i < n; i++) {
    exf_tensor *t = &e->averages->params[i]->tensor;
    exf_real *avg = t->data;
    for (size_t j = 0; j < t->size; j++)
      avg[j] = EXF__R(e->decay * (double)avg[j]
                      + (1 - e->decay) * (double)now[i].data[j]);
  }
  return EXF_OK;
}

/* Between the averages and a dense model, in either direction; all or nothing. What is
   set counts as trained: upcycling the model is to preserve it. */
static exf_status exf__ema_copy(const exf_ema *e, const exf_model *dense, int to_model) {
  if (!e || !dense) return EXF_ARG;
  for (int copy = 0; copy < 2; copy++)     /* all are checked before the first is set */
    for (size_t i = 0; i < e->averages->n_params; i++) {
      exf_param *avg = e->averages->params[i], *p = exf_model_find(dense, avg->name);
      if (!p || !exf__same(&p->tensor.shape, &avg->tensor.shape))
        return exf_fail(dense->ctx, EXF_MISMATCH, "ema: the model has no '%s' of shape "
                        "%s", avg->name, exf__show(&avg->tensor.shape).s);
      if (copy && to_model) exf_param_set(p, avg->tensor.data, p->tensor.size);
      if (copy && !to_model) exf_param_set(avg, p->tensor.data, p->tensor.size);
    }
  return EXF_OK;
}

EXF_API exf_status exf_ema_copy_to(const exf_ema *e, exf_model *dense) {
  return exf__ema_copy(e, dense, 1);
}

EXF_API exf_status exf_ema_copy_from(exf_ema *e, const exf_model *dense) {
  return exf__ema_copy(e, dense, 0);
}

/* ---- saving files ------------------------------------------------------- >>save */

/* A file is written beside its place, flushed, and renamed onto it, so that at any moment
   the path holds the old file or the new one, whole. Flushing the folder makes the rename
   last: without it a power cut could undo a save that had returned. A save keeps its
   first failure and does nothing more: begin, open, write ..., end, and look once. */
typedef struct exf__save {
  exf_ctx *ctx;
  exf_status status;
  const char *path;        /* NULL: into memory */
  char *temp;              /* path and ".tmp": the same folder, so rename is atomic */
  void *file;
  unsigned char *memory;   /* (n) so far */
  size_t n;
  char label[EXF__LABEL];
} exf__save;

/* Names the cause that the failing call left in errno, which was 0 before it. */
static exf_status exf__io_fail(exf_ctx *ctx, const char *label, const char *what) {
  int cause = errno;
  return exf_fail(ctx, EXF_IO, "%s: cannot %s: %s", label, what,
                  cause != 0 ? strerror(cause) : "no cause given");
}

/* Checks the path and the hooks that reading or saving needs, and fills in the label. */
static exf_status exf__io_begin(exf_ctx *ctx, const char *path, int saving, char *label) {
  const exf_files *f = &ctx->files;
  if (!path || !*path)
    return exf_fail(ctx, EXF_ARG, "a file path is NULL or empty: give a path");
  exf__label(label, path, 1);
  if (!f->open)
    return exf_fail(ctx, EXF_IO, "%s: built with EXF_NO_STDIO: give exf_desc.files",
                    label);
  int complete = saving ? f->write && f->sync && f->rename && f->remove && f->sync_dir
                        : f->size && f->read;
  if (f->close && complete) return EXF_OK;
  return exf_fail(ctx, EXF_ARG, "%s: a hook of exf_desc.files is NULL: give them all",
                  label);
}

/* Sets up a save of path, or of memory; nothing is created yet. */
static void exf__save_begin(exf__save *s, exf_ctx *ctx, const char *path, int to_memory) {
  memset(s, 0, sizeof *s);
  s->ctx = ctx;
  s->path = path;
  if (to_memory) memcpy(s->label, "memory", sizeof "memory");
  else s->status = exf__io_begin(ctx, path, 1, s->label);
}

/* A hook has failed: a later failure is a consequence of the first. */
static void exf__save_fail(exf__save *s, const char *what) {
  if (s->status == EXF_OK) s->status = exf__io_fail(s->ctx, s->label, what);
}

/* Creates the temporary file, or takes memory for so many bytes in all. */
static void exf__save_open(exf__save *s, size_t bytes) {
  const exf_files *f = &s->ctx->files;
  if (s->status != EXF_OK) return;
  size_t length = s->path ? strlen(s->path) : 0;
  void *block = exf__alloc(s->ctx, s->path ? length + sizeof ".tmp" : bytes);
  if (!block) {
    s->status = EXF_MEMORY;
  } else if (!s->path) {
    s->memory = (unsigned char *)block;
  } else {
    s->temp = (char *)block;
    memcpy(s->temp, s->path, length);
    memcpy(s->temp + length, ".tmp", sizeof ".tmp");
    errno = 0;
    s->file = f->open(f->user, s->temp, 1);
    if (!s->file) exf__save_fail(s, "create its temporary file (.tmp)");
  }
}

/* A write may be short: it goes on where the last one ended. */
static void exf__save_write(exf__save *s, const void *data, size_t bytes) {
  const exf_files *f = &s->ctx->files;
  const unsigned char *from = (const unsigned char *)data;
  if (s->memory) memcpy(s->memory + s->n, data, bytes);
  s->n += bytes;
  while (s->file && bytes > 0 && s->status == EXF_OK) {
    errno = 0;
    int64_t n = f->write(f->user, s->file, from, bytes);
    if (n <= 0 || (uint64_t)n > bytes) {
      exf__save_fail(s, "write (what was there is unchanged)");
    } else {
      from += n;
      bytes -= (size_t)n;
    }
  }
}

/* Makes the file current, or removes every trace of it. */
static exf_status exf__save_end(exf__save *s) {
  const exf_files *f = &s->ctx->files;
  if (s->file) {
    /* each step only after the one before it, closing in any case */
    errno = 0;
    if (s->status == EXF_OK && f->sync(f->user, s->file) != 0)
      exf__save_fail(s, "flush (what was there is unchanged)");
    errno = 0;
    if (f->close(f->user, s->file) != 0)
      exf__save_fail(s, "close (what was there is unchanged)");
    errno = 0;
    if (s->status == EXF_OK && f->rename(f->user, s->temp, s->path) != 0)
      exf__save_fail(s, "be replaced by its temporary file (.tmp)");
    errno = 0;
    if (s->status != EXF_OK) (void)f->remove(f->user, s->temp);
    else if (f->sync_dir(f->user, s->path) != 0)
      exf__save_fail(s, "flush its folder (the new file is in place, but may not survive"
                        " a power cut)");
  }
  exf__free(s->ctx, s->temp);
  return s->status;
}

EXF_API exf_status exf_file_save(exf_ctx *ctx, const char *path, const void *data,
                                 size_t bytes) {
  exf__save s;
  if (!ctx) return EXF_ARG;
  if (!data && bytes > 0)
    return exf_fail(ctx, EXF_ARG, "exf_file_save: data is NULL, but bytes is not 0");
  exf__save_begin(&s, ctx, path, 0);
  exf__save_open(&s, bytes);
  exf__save_write(&s, data, bytes);
  return exf__save_end(&s);
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

/* The types of the format; those with a conversion are read as numbers. */
typedef struct exf__st_type {
  const char *name;
  unsigned bits;                 /* of one element */
  exf_real (*convert)(const unsigned char *p);
} exf__st_type;

typedef struct exf__st_tensor {
  exf_st_entry entry;
  uint64_t begin;
} exf__st_tensor;

struct exf_st {
  exf_ctx *ctx;
  char label[EXF__LABEL];        /* the path, or "memory", for messages */
  char *header;                  /* unescaped in place: names and pairs point into it */
  size_t n_header;
  exf__st_tensor *tensor;        /* (n) in the order of the file */
  exf__st_tensor **order;        /* (n) by ascending name */
  size_t n;
  size_t *dim;                   /* (n_dims) of all tensors, one behind the other */
  size_t n_dims, dim_room;
  exf_pair *meta;                /* (n_meta) by ascending key */
  size_t n_meta;
  unsigned char *data;           /* (n_data) */
  size_t n_data;
  /* while it is being read: */
  void *file;                    /* NULL: from memory */
  const unsigned char *memory;   /* what is left of it */
  unsigned char first[8];
  size_t at;                     /* the parser's position in the header */
  const char *name;              /* of the tensor that is being checked, or NULL */
  int broken;                    /* a rule is: nothing is left to be parsed */
  int has_meta;
  const char *pairs;             /* see exf__st_metadata */
};

/* The members of one tensor. */
typedef struct exf__st_members {
  unsigned seen;                 /* bit i: the member exf__st_keys[i] */
  const exf__st_type *type;
  uint64_t dim[EXF__ST_MAX_AXES], span[2];
} exf__st_members;
static const char *const exf__st_keys[] = {"dtype", "shape", "data_offsets"};

/* What a file that breaks a rule may be instead, by its first bytes. */
static const char *const exf__st_others[][2] = {
  {"version ", "a Git LFS pointer, not the file itself: run git lfs pull"},
  {"PK\003\004", "a zip or PyTorch pickle archive: convert it first"},
  {"\200\002\212\012", "a PyTorch pickle: convert it first"},
  {"<!", "an HTML page: the download failed"},
  {"<h", "an HTML page: the download failed"},
  {"GGUF", "a GGUF file: convert it first"},
  {"\037\213\010", "gzip data: decompress it first"},
  {"\223NUMPY", "a NumPy array: convert it first"},
  {"{\"", "JSON without tensors, as the index of a sharded set: give a shard"},
};

/* Reports the first broken rule, with the tensor that breaks it unless the rule is one of
   the text; a negative number stands for a sound file that is too large for this machine.
   The parser then finds itself at the end of the header, so its functions need not look
   at one another's results: every loop ends, and what else they report is not the
   first. */
static void exf__st_fail(exf_st *st, int rule, const char *format, ...) {
  exf_status status = rule < 0 ? EXF_SIZE : rule == 18 ? EXF_LIMIT : EXF_FORMAT;
  char text[256], name[EXF__LABEL] = "";
  const char *other = NULL, *tensor = rule > 2 && rule < 8 && rule != 6 ? NULL : st->name;
  va_list args;
  if (st->broken) return;
  st->broken = 1;
  st->at = st->n_header;
  /* foreign bytes break the rules on size, encoding and syntax first */
  for (size_t i = 0; i < 9 && (rule == 1 || rule == 3 || rule == 4) && !other; i++)
    if (memcmp(st->first, exf__st_others[i][0], strlen(exf__st_others[i][0])) == 0)
      other = exf__st_others[i][1];
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (tensor) exf__label(name, tensor, 0);
  exf_fail(st->ctx, status, "%s: safetensors rule V%d: %s%s%s%s", st->label,
           rule < 0 ? -rule : rule, other ? "this looks like " : tensor ? "tensor '" : "",
           other ? "" : name, !other && tensor ? "': " : "", other ? other : text);
}

/* ---- JSON: blanks, strings, integers */

/* The next byte; '\0' at the end. */
static char exf__st_byte(const exf_st *st) {
  return st->at < st->n_header ? st->header[st->at] : '\0';
}

/* The next byte that is not blank. */
static char exf__st_peek(exf_st *st) {
  while (exf__st_byte(st) != '\0' && strchr(" \t\n\r", exf__st_byte(st))) st->at++;
  return exf__st_byte(st);
}

/* Steps over c if it comes next. */
static int exf__st_accept(exf_st *st, char c) {
  if (exf__st_peek(st) != c) return 0;
  st->at++;
  return 1;
}

/* Steps over c, with which a value of the name `what` begins, or any text (NULL). Another
   kind of value is sound JSON in a place where the format has none. */
static void exf__st_expect(exf_st *st, char c, const char *what) {
  char next = exf__st_peek(st);
  if (exf__st_accept(st, c)) return;
  if (what && next != '\0' && strchr("{[\"-0123456789tfn", next))
    exf__st_fail(st, 5, "header byte %zu: %s must be %s", st->at, what,
                 c == '{' ? "an object" : c == '[' ? "an array" : "a string");
  else if (st->at == st->n_header)
    exf__st_fail(st, 4, "the JSON header ends where '%c' is expected", c);
  else
    exf__st_fail(st, 4, "header byte %zu is 0x%02x, expected '%c'", st->at,
                 (unsigned)(unsigned char)next, c);
}

/* Four hexadecimal digits of an escape; -1 when they are not there. */
static long exf__st_hex4(exf_st *st) {
  static const char digits[] = "0123456789abcdefABCDEF";
  long v = 0;
  for (int i = 0; i < 4; i++) {
    const char c = exf__st_byte(st), *digit = c != '\0' ? strchr(digits, c) : NULL;
    if (!digit) return -1;
    st->at++;
    v = v * 16 + (long)(digit - digits) - (digit - digits >= 16 ? 6 : 0);
  }
  return v;
}

/* What follows a backslash, written to out. Returns what is behind it there. */
static char *exf__st_escape(exf_st *st, char *out) {
  static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
  const size_t backslash = st->at - 1;
  const char c = exf__st_byte(st), *simple = c != '\0' ? strchr(from, c) : NULL;
  if (c != '\0') st->at++;
  long code = simple ? to[simple - from] : c == 'u' ? exf__st_hex4(st) : -1, low = -1;
  if (code < 0)
    exf__st_fail(st, 4, "header byte %zu: an escape that JSON does not have", backslash);
  if (code == 0)
    exf__st_fail(st, 7, "header byte %zu: U+0000 in a string would cut it short",
                 backslash);
  if (code >= 0xd800 && code < 0xe000) {
    if (code < 0xdc00 && st->n_header - st->at >= 6
        && memcmp(st->header + st->at, "\\u", 2) == 0) {
      st->at += 2;
      low = exf__st_hex4(st);
    }
    if (low < 0xdc00 || low > 0xdfff)
      exf__st_fail(st, 3, "header byte %zu: an escape is half a surrogate pair",
                   backslash);
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  }
  return st->broken ? out : exf__utf8_encode(out, (unsigned long)code);
}

/* A string, unescaped where it stands and ended by NUL: no escape is shorter than what
   it means, and the closing quote makes room. "" on failure. what: NULL for a key. */
static const char *exf__st_string(exf_st *st, const char *what) {
  exf__st_expect(st, '"', what);
  char *start = st->header + st->at, *out = start;
  while (st->at < st->n_header) {
    char c = st->header[st->at++];
    if (c == '"') {
      *out = '\0';
      return start;
    }
    if ((unsigned char)c < 0x20)
      exf__st_fail(st, 4, "header byte %zu: a control character in a string", st->at - 1);
    else if (c == '\\') out = exf__st_escape(st, out);
    else *out++ = c;
  }
  exf__st_fail(st, 4, "the JSON header ends inside a string");
  return "";
}

/* Rule V10. JSON would allow a sign, a fraction and an exponent. */
static uint64_t exf__st_integer(exf_st *st) {
  char first = exf__st_peek(st), c;
  const size_t start = st->at;
  uint64_t v = 0;
  for (; (c = exf__st_byte(st)) >= '0' && c <= '9'; st->at++)
    if (v <= EXF__ST_MAX_INTEGER) v = v * 10 + (uint64_t)(c - '0');
  size_t digits = st->at - start;
  if (v > EXF__ST_MAX_INTEGER)
    exf__st_fail(st, 10, "an integer above 2^48 - 1");
  if (digits == 0 || (first == '0' && digits > 1) || c == '.' || c == 'e' || c == 'E')
    exf__st_fail(st, 10, "header byte %zu: shape and data_offsets hold integers in plain"
                 " digits only", start);
  return v;
}

/* An array of at most max integers. Returns their number. */
static int exf__st_array(exf_st *st, const char *what, uint64_t *out, int max) {
  int n = 0;
  exf__st_expect(st, '[', what);
  if (exf__st_accept(st, ']')) return 0;
  do {
    if (n < max) out[n++] = exf__st_integer(st);
    else if (max == 2)
      exf__st_fail(st, 12, "data_offsets has more than two entries");
    else exf__st_fail(st, 18, "more than %d axes", max);
  } while (exf__st_accept(st, ','));
  exf__st_expect(st, ']', NULL);
  return n;
}

/* ---- types, and numbers out of bytes that are little-endian and need not be aligned */

static uint32_t exf__load_le(const unsigned char *p, int bytes) {
  uint32_t v = 0;
  while (bytes-- > 0) v = v << 8 | p[bytes];
  return v;
}

static exf_real exf__from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return EXF__R(x);
}

static exf_real exf__from_f32(const unsigned char *p) {
  return exf__from_bits((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16
                        | (uint32_t)p[3] << 24);
}

/* Numbers beyond the range of exf_real become infinite. */
static exf_real exf__from_f64(const unsigned char *p) {
  uint64_t bits = (uint64_t)exf__load_le(p + 4, 4) << 32 | exf__load_le(p, 4);
  double x;
  memcpy(&x, &bits, 8);
  return EXF__R(x);
}

static exf_real exf__from_bf16(const unsigned char *p) {
  return exf__from_bits(exf__load_le(p, 2) << 16);
}

/* 1 sign, 5 exponent (bias 15) and 10 fraction bits -> 1, 8 (bias 127), 23; with an
   exponent of 0 the number is f 2^-24. */
static exf_real exf__from_f16(const unsigned char *p) {
  uint32_t h = exf__load_le(p, 2), sign = h & 0x8000u, e = h >> 10 & 31, f = h & 0x3ff;
  if (e == 0) return EXF__R((float)f * (sign ? -1.0f : 1.0f) * (1.0f / 16777216.0f));
  return exf__from_bits(sign << 16 | (e == 31 ? 255u : e + 112u) << 23 | f << 13);
}

/* NULL for an unknown dtype. */
static const exf__st_type *exf__st_type_of(const char *dtype) {
  static const exf__st_type known[] = {
    {"F32", 32, exf__from_f32}, {"F64", 64, exf__from_f64}, {"F16", 16, exf__from_f16},
    {"BF16", 16, exf__from_bf16}, {"BOOL", 8, NULL}, {"U8", 8, NULL}, {"I8", 8, NULL},
    {"F8_E5M2", 8, NULL}, {"F8_E4M3", 8, NULL}, {"F8_E8M0", 8, NULL},
    {"F8_E4M3FNUZ", 8, NULL}, {"F8_E5M2FNUZ", 8, NULL}, {"I16", 16, NULL},
    {"U16", 16, NULL}, {"I32", 32, NULL}, {"U32", 32, NULL}, {"C64", 64, NULL},
    {"I64", 64, NULL}, {"U64", 64, NULL}, {"F4", 4, NULL}, {"F6_E2M3", 6, NULL},
    {"F6_E3M2", 6, NULL},
  };
  for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
    if (strcmp(dtype, known[i].name) == 0) return &known[i];
  return NULL;
}

/* ---- the header: tensors and metadata */

/* Rules V12 to V14, of one tensor. Zeros in the shape do not excuse the other numbers
   from the check against overflow. */
static void exf__st_extent(exf_st *st, exf__st_tensor *t, const exf__st_members *m) {
  const char *dtype = t->entry.dtype = m->type->name;
  const unsigned long long begin = m->span[0], end = m->span[1], most = UINT64_MAX;
  unsigned long long n = 1, bits;
  int empty = 0;
  if (begin > end)
    exf__st_fail(st, 12, "data_offsets end at %llu, before their begin %llu", end, begin);
  t->entry.dim = st->dim + st->n_dims;
  for (int i = 0; i < t->entry.n_dims && !st->broken; i++) {
    const uint64_t dim = m->dim[i], factor = EXF__MAX(dim, 1);
    empty |= dim == 0;
    if (st->n_dims == st->dim_room)
      exf__st_fail(st, 18, "too many axes in all");
    else if ((size_t)dim != dim)
      exf__st_fail(st, -13, "axis %d is too long here", i);
    else if (n > most / factor)
      exf__st_fail(st, 13, "the number of elements overflows");
    else
      st->dim[st->n_dims++] = (size_t)dim;
    n *= factor;
  }
  if (n > most / m->type->bits) exf__st_fail(st, 13, "the number of bits overflows");
  if (empty) n = 0;
  bits = n * m->type->bits;
  if (bits % 8 != 0)
    exf__st_fail(st, 13, "%llu elements of %s do not fill whole bytes", n, dtype);
  if (end - begin != bits / 8)
    exf__st_fail(st, 14, "%llu elements of %s need %llu bytes, data_offsets span %llu", n,
                 dtype, bits / 8, end - begin);
  t->begin = begin;
  t->entry.bytes = (size_t)(bits / 8);
  if (t->entry.bytes != bits / 8)
    exf__st_fail(st, -13, "too large for this machine");
}

/* "key": value, in any order. Rules V6, V9, V11. */
static void exf__st_member(exf_st *st, exf__st_tensor *t, exf__st_members *m) {
  const char *key = exf__st_string(st, NULL);
  int which = 0, n;
  while (which < 3 && strcmp(key, exf__st_keys[which]) != 0) which++;
  if (which == 3)
    exf__st_fail(st, 9, "has a member besides dtype, shape and data_offsets");
  if (m->seen >> which & 1) exf__st_fail(st, 6, "has the member %s twice", key);
  m->seen |= 1u << which;
  exf__st_expect(st, ':', NULL);
  if (which == 0) {
    const char *dtype = exf__st_string(st, key);
    char label[EXF__LABEL];
    m->type = exf__st_type_of(dtype);
    if (!m->type) exf__label(label, dtype, 0);
    if (!m->type) exf__st_fail(st, 11, "unknown dtype '%s'", label);
  } else if (which == 1) {
    t->entry.n_dims = exf__st_array(st, key, m->dim, EXF__ST_MAX_AXES);
  } else if ((n = exf__st_array(st, key, m->span, 2)) != 2) {
    exf__st_fail(st, 12, "data_offsets needs two entries, has %d", n);
  }
}

/* The object behind a tensor's name. */
static void exf__st_read_tensor(exf_st *st, const char *name) {
  exf__st_tensor *t = &st->tensor[st->n];
  exf__st_members m;
  memset(&m, 0, sizeof m);
  memset(t, 0, sizeof *t);
  t->entry.name = st->name = name;
  st->order[st->n++] = t;
  if (strlen(name) > EXF__ST_MAX_NAME)
    exf__st_fail(st, 18, "a name of more than %u bytes", EXF__ST_MAX_NAME);
  exf__st_expect(st, '{', "a tensor");
  if (!exf__st_accept(st, '}')) {
    do exf__st_member(st, t, &m);
    while (exf__st_accept(st, ','));
    exf__st_expect(st, '}', NULL);
  }
  for (int i = 0; i < 3; i++)
    if (!(m.seen >> i & 1))
      exf__st_fail(st, 9, "lacks the member %s", exf__st_keys[i]);
  if (!st->broken) exf__st_extent(st, t, &m);
  st->name = NULL;
}

/* Pairs are moved together where they stand, as key, NUL, value, NUL: memory for them is
   only taken when the whole header is sound. */
static void exf__st_metadata(exf_st *st) {
  if (st->has_meta) exf__st_fail(st, 6, "__metadata__ is there twice");
  st->has_meta = 1;
  exf__st_peek(st);
  if (st->n_header - st->at >= 4 && memcmp(st->header + st->at, "null", 4) == 0) {
    st->at += 4;
    return;
  }
  exf__st_expect(st, '{', "__metadata__");
  char *out = st->header + st->at;
  st->pairs = out;
  if (exf__st_accept(st, '}')) return;
  do {
    for (int value = 0; value < 2; value++) {
      if (value && exf__st_peek(st) != '"' && st->at < st->n_header)
        exf__st_fail(st, 8, "header byte %zu: a metadata value is not a string", st->at);
      const char *text = exf__st_string(st, NULL);
      if (!value) exf__st_expect(st, ':', NULL);
      if (st->broken) return;
      size_t bytes = strlen(text) + 1;
      memmove(out, text, bytes);
      out += bytes;
    }
    st->n_meta++;
  } while (exf__st_accept(st, ','));
  exf__st_expect(st, '}', NULL);
}

static int exf__by_key(const void *a, const void *b) {
  return strcmp(((const exf_pair *)a)->key, ((const exf_pair *)b)->key);
}

/* 0 when memory runs out. */
static int exf__st_index_metadata(exf_st *st) {
  const char *text = st->pairs;
  char label[EXF__LABEL];
  st->meta = (exf_pair *)exf__alloc_n(st->ctx, st->n_meta, sizeof(exf_pair));
  if (!st->meta) return 0;
  for (size_t i = 0; i < st->n_meta; i++) {
    st->meta[i].key = text;
    st->meta[i].value = text + strlen(text) + 1;
    text = st->meta[i].value + strlen(st->meta[i].value) + 1;
  }
  exf__sort(st->meta, st->n_meta, sizeof(exf_pair), exf__by_key);
  for (size_t i = 1; i < st->n_meta; i++)
    if (strcmp(st->meta[i - 1].key, st->meta[i].key) == 0) {
      exf__label(label, st->meta[i].key, 0);
      exf__st_fail(st, 6, "metadata key '%s' is there twice", label);
    }
  return 1;
}

/* Memory for the tensors of a header, up to where it breaks a rule; 0 when memory runs
   out. Each opens a brace inside the outermost one. So does rubbish, but no text holds
   more tensors than the shortest, "":{"dtype":"U8","shape":[],"data_offsets":[0,1]}, with
   its 50 bytes allows, and more axes than one in 5 bytes, as one with 16 takes 81. */
static int exf__st_reserve(exf_st *st, size_t *max) {
  size_t depth = 0, opened = 1;
  int quoted = 0;
  for (size_t i = st->at; i < st->n_header; i++) {
    char c = st->header[i];
    if (c == '"') quoted = !quoted;
    else if (c == '\\') i++;
    else if (c == '{' && !quoted) opened += ++depth == 2;
    else if (c == '}' && !quoted && depth > 0) depth--;
  }
  opened = EXF__MIN(opened, st->n_header / 50 + 1);
  *max = EXF__MIN(opened, EXF__ST_MAX_TENSORS);
  st->dim_room = EXF__MIN(*max * EXF__ST_MAX_AXES, st->n_header / 5 + EXF__ST_MAX_AXES);
  st->tensor = (exf__st_tensor *)exf__alloc_n(st->ctx, *max, sizeof *st->tensor);
  st->order = (exf__st_tensor **)exf__alloc_n(st->ctx, *max, sizeof *st->order);
  st->dim = (size_t *)exf__alloc_n(st->ctx, st->dim_room, sizeof *st->dim);
  return st->tensor && st->order && st->dim;
}

/* The whole header, rules V3 to V14. */
static int exf__st_header(exf_st *st) {
  size_t valid = exf__utf8_valid(st->header, st->n_header), max;
  if (valid < st->n_header)
    exf__st_fail(st, 3, "header byte %zu is not UTF-8", valid);
  if (st->broken || !exf__st_reserve(st, &max)) return 0;
  exf__st_expect(st, '{', "the header");
  if (!exf__st_accept(st, '}')) {
    do {
      const char *key = exf__st_string(st, NULL);
      exf__st_expect(st, ':', NULL);
      if (strcmp(key, "__metadata__") == 0) exf__st_metadata(st);
      else if (st->n < max) exf__st_read_tensor(st, key);
      else exf__st_fail(st, 18, "more than %zu tensors", max);
    } while (exf__st_accept(st, ','));
    exf__st_expect(st, '}', NULL);
  }
  unsigned next = (unsigned char)exf__st_peek(st);
  if (st->at < st->n_header)
    exf__st_fail(st, 4, "header byte %zu is 0x%02x, after the end of the JSON: only"
                 " blanks may pad it", st->at, next);
  return !st->broken && exf__st_index_metadata(st) && !st->broken;
}

/* ---- the file */

/* Elements are pointers to structs whose first member is a name. */
static int exf__by_name(const void *a, const void *b) {
  const char *const *x, *const *y;
  memcpy(&x, a, sizeof x);
  memcpy(&y, b, sizeof y);
  return strcmp(*x, *y);
}

/* Empty tensors share their offset with the one behind them, and come before it. */
static int exf__by_offset(const void *a, const void *b) {
  const exf__st_tensor *x = *(exf__st_tensor *const *)a;
  const exf__st_tensor *y = *(exf__st_tensor *const *)b;
  if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
  return x->entry.bytes < y->entry.bytes ? -1 : x->entry.bytes > y->entry.bytes;
}

/* Rules V6, V15 and V16, of all tensors together in a buffer of so many bytes. */
static int exf__st_layout(exf_st *st, unsigned long long buffer, int may_trail) {
  unsigned long long end = 0;
  exf__sort(st->order, st->n, sizeof *st->order, exf__by_name);
  for (size_t i = 1; i < st->n; i++)
    if (exf__by_name(&st->order[i - 1], &st->order[i]) == 0) {
      st->name = st->order[i]->entry.name;
      exf__st_fail(st, 6, "is there twice");
    }
  exf__sort(st->order, st->n, sizeof *st->order, exf__by_offset);
  for (size_t i = 0; i < st->n; i++) {
    const unsigned long long begin = st->order[i]->begin;
    st->name = st->order[i]->entry.name;
    if (begin != end)
      exf__st_fail(st, 15, "begins at %llu, %s %llu where the tensor before it ends",
                   begin, begin > end ? "leaves a hole after" : "overlaps", end);
    end += st->order[i]->entry.bytes;
  }
  st->name = NULL;
  exf__sort(st->order, st->n, sizeof *st->order, exf__by_name);
  if (end > buffer)
    exf__st_fail(st, 16, "the tensors need %llu bytes, the file holds %llu: it is cut"
                 " short", end, buffer);
  if (end < buffer && !may_trail)
    exf__st_fail(st, 16, "%llu bytes after the last tensor: ask for them by trailing, if"
                 " they are meant to be there", buffer - end);
  st->n_data = (size_t)end;
  return !st->broken;
}

/* All of the bytes, or 0 and an error. */
static int exf__st_read_bytes(exf_st *st, void *out, size_t bytes) {
  const exf_files *f = &st->ctx->files;
  unsigned char *to = (unsigned char *)out;
  if (!st->file && bytes > 0) {
    memcpy(to, st->memory, bytes);
    st->memory += bytes;
    return 1;
  }
  while (bytes > 0) {
    errno = 0;
    int64_t n = f->read(f->user, st->file, to, bytes);
    if (n < 0 || (uint64_t)n > bytes) exf__io_fail(st->ctx, st->label, "read");
    else if (n == 0)
      exf_fail(st->ctx, EXF_IO, "%s: file changed while reading: %zu bytes are missing",
               st->label, bytes);
    if (n <= 0 || (uint64_t)n > bytes) return 0;
    to += n;
    bytes -= (size_t)n;
  }
  return 1;
}

/* Rule V1, and the header's length. */
static int exf__st_length(exf_st *st, size_t size) {
  unsigned long long n = 0;
  if (!exf__st_read_bytes(st, st->first, EXF__MIN(size, 8))) return 0;
  for (int i = 8; i-- > 0;) n = n << 8 | st->first[i];
  if (size < 8) exf__st_fail(st, 1, "%zu bytes, at least 8 are needed", size);
  else if (n > size - 8)
    exf__st_fail(st, 1, "a header of %llu bytes does not fit into a file of %zu: it is"
                 " cut short, or no safetensors file", n, size);
  else if (n > EXF__ST_MAX_HEADER)
    exf__st_fail(st, 1, "a header of %llu bytes, the format allows 100000000", n);
  st->n_header = (size_t)n;
  return !st->broken;
}

EXF_API void exf_st_close(exf_st *st) {
  if (!st) return;
  exf__free(st->ctx, st->header);
  exf__free(st->ctx, st->tensor);
  exf__free(st->ctx, st->order);
  exf__free(st->ctx, st->dim);
  exf__free(st->ctx, st->meta);
  exf__free(st->ctx, st->data);
  exf__free(st->ctx, st);
}

/* From a file or from memory, size bytes. The data is not allocated before the header is
   proved. */
static exf_st *exf__st_load(exf_ctx *ctx, const char *label, void *file,
                            const void *memory, size_t size, size_t *trailing) {
  exf_st *st = (exf_st *)exf__calloc_n(ctx, 1, sizeof *st);
  if (!st) return NULL;
  st->ctx = ctx;
  st->file = file;
  st->memory = (const unsigned char *)memory;
  memcpy(st->label, label, strlen(label) + 1);
  if (!exf__st_length(st, size)
      || !(st->header = (char *)exf__alloc(ctx, st->n_header))
      || !exf__st_read_bytes(st, st->header, st->n_header) || !exf__st_header(st)
      || !exf__st_layout(st, size - 8 - st->n_header, trailing != NULL)
      || !(st->data = (unsigned char *)exf__alloc(ctx, st->n_data))
      || !exf__st_read_bytes(st, st->data, st->n_data)) {
    exf_st_close(st);
    return NULL;
  }
  for (size_t i = 0; i < st->n; i++)
    st->tensor[i].entry.data = st->data + (size_t)st->tensor[i].begin;
  if (trailing) *trailing = size - 8 - st->n_header - st->n_data;
  return st;
}

EXF_API exf_st *exf_st_open(exf_ctx *ctx, const char *path, size_t *trailing) {
  char label[EXF__LABEL];
  exf_st *st = NULL;
  if (trailing) *trailing = 0;
  if (!ctx || exf__io_begin(ctx, path, 0, label) != EXF_OK) return NULL;
  errno = 0;
  void *file = ctx->files.open(ctx->files.user, path, 0);
  if (!file) exf__io_fail(ctx, label, "open");
  if (!file) return NULL;
  errno = 0;
  int64_t size = ctx->files.size(ctx->files.user, file);
  if (size < 0) exf__io_fail(ctx, label, "get its size");
  else if ((uint64_t)size != (size_t)size)
    exf_fail(ctx, EXF_SIZE, "%s: a file too large for the memory of this machine", label);
  else st = exf__st_load(ctx, label, file, NULL, (size_t)size, trailing);
  (void)ctx->files.close(ctx->files.user, file); /* nothing was written */
  return st;
}

EXF_API exf_st *exf_st_open_memory(exf_ctx *ctx, const void *data, size_t bytes,
                                   size_t *trailing) {
  if (trailing) *trailing = 0;
  if (!ctx) return NULL;
  if (data || bytes == 0) return exf__st_load(ctx, "memory", NULL, data, bytes, trailing);
  exf_fail(ctx, EXF_ARG, "exf_st_open_memory: data is NULL, but bytes is not 0");
  return NULL;
}

/* ---- what is in it */

EXF_API size_t exf_st_count(const exf_st *st) { return st ? st->n : 0; }

EXF_API const exf_st_entry *exf_st_get(const exf_st *st, size_t i) {
  return st && i < st->n ? &st->order[i]->entry : NULL;
}

EXF_API const exf_st_entry *exf_st_find(const exf_st *st, const char *name) {
  exf__st_tensor wanted, *key = &wanted, **found;
  if (!st || !name) return NULL;
  wanted.entry.name = name;
  found = (exf__st_tensor **)bsearch(&key, st->order, st->n, sizeof key, exf__by_name);
  return found ? &(*found)->entry : NULL;
}

EXF_API const char *exf_st_meta(const exf_st *st, const char *key) {
  exf_pair wanted = {key, NULL}, *found;
  if (!st || !key) return NULL;
  found = (exf_pair *)bsearch(&wanted, st->meta, st->n_meta, sizeof wanted, exf__by_key);
  return found ? found->value : NULL;
}

EXF_API exf_status exf_st_read(exf_ctx *ctx, const exf_st_entry *entry, exf_real *out,
                               size_t n) {
  char name[EXF__LABEL];
  if (!ctx) return EXF_ARG;
  if (!entry || (!out && n > 0))
    return exf_fail(ctx, EXF_ARG, "exf_st_read: the entry or out is NULL");
  const exf__st_type *type = exf__st_type_of(entry->dtype);
  const int readable = type && type->convert;
  const size_t width = readable ? type->bits / 8 : 1, have = entry->bytes / width;
  if (!readable || n != have) exf__label(name, entry->name, 0);
  if (!readable)
    return exf_fail(ctx, EXF_MISMATCH, "exf_st_read: tensor '%s' is %s: convert it to"
                    " F32, F64, F16 or BF16", name, entry->dtype);
  if (n != have)
    return exf_fail(ctx, EXF_SHAPE, "exf_st_read: tensor '%s' has %zu elements, asked for"
                    " %zu", name, have, n);
  if (type->convert == exf__from_f32)   /* inlined, as it is most of what is read */
    for (size_t i = 0; i < n; i++) out[i] = exf__from_f32(entry->data + 4 * i);
  else
    for (size_t i = 0; i < n; i++) out[i] = type->convert(entry->data + width * i);
  return EXF_OK;
}

/* ---- writing safetensors --------------------------------------------- >>st-writer */

/* Compact JSON, metadata first (keys sorted), tensors by name, padded with spaces to a
   multiple of 8; data from 0 on. The reference writer makes the same bytes, but leaves
   the order of two or more metadata keys to chance. F32; with EXF_DOUBLE, F64. All is
   checked, by the rules of the reader, and the header is built before a file is begun:
   the JSON is gone through twice, first to measure it. */
typedef struct exf__st_writer {
  exf__save *save;
  const exf_st_item **item;    /* (n) by ascending name */
  size_t n;
  exf_pair *meta;              /* (n_meta) by ascending key */
  size_t n_meta;
  unsigned char *header;       /* (n_header) its length, 8 bytes, and the JSON; NULL: it
                                  is being measured */
  size_t n_header, n_data;     /* their sum fits */
} exf__st_writer;

/* Appends to the header. Measuring stops above the limit. */
static void exf__json_char(exf__st_writer *w, char c) {
  if (w->header) w->header[w->n_header] = (unsigned char)c;
  if (w->n_header <= 8 + EXF__ST_MAX_HEADER) w->n_header++;
}

/* A short text. */
static void exf__json_print(exf__st_writer *w, const char *format, ...) {
  char text[80];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  for (const char *s = text; *s != '\0'; s++) exf__json_char(w, *s);
}

/* Escapes what JSON demands, and in the way the reference does: no byte more. */
static void exf__json_string(exf__st_writer *w, const char *s) {
  static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
  exf__json_char(w, '"');
  for (; *s != '\0'; s++) {
    const char *simple = strchr(from, *s);
    if (simple) exf__json_print(w, "\\%c", to[simple - from]);
    else if ((unsigned char)*s < 0x20) exf__json_print(w, "\\u%04x", (unsigned)*s);
    else exf__json_char(w, *s);
  }
  exf__json_char(w, '"');
}

/* {"__metadata__":{"key":"value",..},"name":{"dtype":..,"shape":[..],
   "data_offsets":[..]},..} and spaces up to a multiple of 8 */
static void exf__st_json(exf__st_writer *w) {
  size_t begin = 0, end;
  w->n_header = 8;
  exf__json_print(w, w->n_meta > 0 ? "{\"__metadata__\":{" : "{");
  for (size_t i = 0; i < w->n_meta; i++) {
    if (i > 0) exf__json_char(w, ',');
    exf__json_string(w, w->meta[i].key);
    exf__json_char(w, ':');
    exf__json_string(w, w->meta[i].value);
  }
  if (w->n_meta > 0) exf__json_print(w, w->n > 0 ? "}," : "}");
  for (size_t i = 0; i < w->n; i++, begin = end) {
    const exf_shape *shape = &w->item[i]->shape;
    end = begin + exf__shape_size(shape) * sizeof(exf_real);
    if (i > 0) exf__json_char(w, ',');
    exf__json_string(w, w->item[i]->name);
    exf__json_print(w, ":{\"dtype\":\"F%d\",\"shape\":[", 8 * (int)sizeof(exf_real));
    for (int d = 0; d < shape->n; d++)
      exf__json_print(w, d > 0 ? ",%zu" : "%zu", shape->dim[d]);
    exf__json_print(w, "],\"data_offsets\":[%zu,%zu]}", begin, end);
  }
  exf__json_char(w, '}');
  while (w->n_header % 8 != 0 && w->n_header <= 8 + EXF__ST_MAX_HEADER)
    exf__json_char(w, ' ');
}

/* kind: "tensor" or "metadata key". Of several failures the first is kept. */
static void exf__st_refuse(exf__st_writer *w, exf_status status, int rule,
                           const char *kind, const char *name, const char *text) {
  char label[EXF__LABEL];
  if (w->save->status != EXF_OK) return;
  exf__label(label, name, 0);
  w->save->status = exf_fail(w->save->ctx, status, "%s: safetensors rule V%d: %s '%s' %s",
                             w->save->label, rule, kind, label, text);
}

static int exf__is_utf8(const char *s) { return !s[exf__utf8_valid(s, strlen(s))]; }

/* A function, as where size_t has 32 bits compilers know the answer and warn. */
static int exf__st_fits(uint64_t n) { return n <= EXF__ST_MAX_INTEGER; }

/* Adds to w->n_data what the item takes. Overflow is tested before zero. */
static void exf__st_check_item(exf__st_writer *w, const exf_st_item *item) {
  const exf_shape *shape = &item->shape;
  const char *kind = "tensor", *name = item->name;
  size_t n = 1, *all = &w->n_data;
  if (strcmp(name, "__metadata__") == 0)
    exf__st_refuse(w, EXF_ARG, 7, kind, name, "has a reserved name");
  if (!exf__is_utf8(name))
    exf__st_refuse(w, EXF_ARG, 3, kind, name, "has a name that is not UTF-8");
  if (strlen(name) > EXF__ST_MAX_NAME)
    exf__st_refuse(w, EXF_LIMIT, 18, kind, name, "has too long a name");
  if (shape->n < 0 || shape->n > EXF_MAX_DIMS) {
    exf__st_refuse(w, EXF_SHAPE, 18, kind, name, "has too many axes");
    return;
  }
  int fits = 1;   /* as in rule V13 */
  for (int i = 0; i < shape->n; i++)
    fits = fits && exf__st_fits(shape->dim[i])
           && exf__mul_size(n, EXF__MAX(shape->dim[i], 1), &n) && n <= SIZE_MAX / 64;
  n = fits ? exf__shape_size(shape) : 0;
  if (!fits || !exf__add_size(*all, n * sizeof(exf_real), all)
      || !exf__st_fits(*all) || *all > SIZE_MAX / 2)
    exf__st_refuse(w, EXF_SIZE, 13, kind, name, "makes the file too large");
  if (!item->data && n > 0) exf__st_refuse(w, EXF_ARG, 13, kind, name, "has no data");
}

/* Fills in the sorted items and pairs, all of them checked. */
static void exf__st_gather(exf__st_writer *w, const exf_st_item *items,
                           const exf_pair *meta) {
  exf__save *s = w->save;
  const char *kind = "metadata key";
  for (size_t i = 0; i < w->n && s->status == EXF_OK; i++) {
    w->item[i] = &items[i];
    if (items[i].name) exf__st_check_item(w, &items[i]);
    else s->status = exf_fail(s->ctx, EXF_ARG, "%s: a tensor name is NULL", s->label);
  }
  for (size_t i = 0; i < w->n_meta && s->status == EXF_OK; i++) {
    w->meta[i] = meta[i];
    if (!meta[i].key || !meta[i].value)
      s->status = exf_fail(s->ctx, EXF_ARG, "%s: a metadata key or value is NULL",
                           s->label);
    else if (!exf__is_utf8(meta[i].key) || !exf__is_utf8(meta[i].value))
      exf__st_refuse(w, EXF_ARG, 3, kind, meta[i].key, "or its value is not UTF-8");
  }
  if (s->status != EXF_OK) return;
  exf__sort(w->item, w->n, sizeof *w->item, exf__by_name);
  exf__sort(w->meta, w->n_meta, sizeof *w->meta, exf__by_key);
  for (size_t i = 1; i < w->n; i++)
    if (exf__by_name(&w->item[i - 1], &w->item[i]) == 0)
      exf__st_refuse(w, EXF_ARG, 6, "tensor", w->item[i]->name, "is there twice");
  for (size_t i = 1; i < w->n_meta; i++)
    if (exf__by_key(&w->meta[i - 1], &w->meta[i]) == 0)
      exf__st_refuse(w, EXF_ARG, 6, kind, w->meta[i].key, "is there twice");
}

/* Measures the JSON, takes memory for it, and writes it there. */
static void exf__st_write_header(exf__st_writer *w) {
  exf__save *s = w->save;
  if (s->status != EXF_OK) return;
  exf__st_json(w);
  const size_t bytes = w->n_header - 8;
  if (bytes > EXF__ST_MAX_HEADER) {
    s->status = exf_fail(s->ctx, EXF_LIMIT, "%s: safetensors rule V1: the header would be"
                         " larger than 100000000 bytes: shorten metadata or names",
                         s->label);
  } else if (!(w->header = (unsigned char *)exf__alloc(s->ctx, w->n_header))) {
    s->status = EXF_MEMORY;
  } else {
    for (int i = 0; i < 8; i++) w->header[i] = (unsigned char)((uint64_t)bytes >> 8 * i);
    exf__st_json(w);
  }
}

/* Piece by piece through a small buffer: little-endian, on any machine. */
static void exf__st_write_data(exf__save *s, const exf_st_item *item) {
  unsigned char piece[16384];
  const size_t width = sizeof(exf_real), n = exf__shape_size(&item->shape);
  const unsigned char *from = (const unsigned char *)item->data;
  const uint16_t one = 1;
  unsigned char little;
  memcpy(&little, &one, 1);
  for (size_t at = 0, k = 0; at < n && s->status == EXF_OK; at += k) {
    for (k = 0; k < sizeof piece / width && at + k < n; k++)
      for (size_t b = 0; b < width; b++)
        piece[k * width + b] = from[(at + k) * width + (little ? b : width - 1 - b)];
    exf__save_write(s, piece, k * width);
  }
}

/* s: begun, to a file or to memory. */
static exf_status exf__st_write(exf__save *s, const exf_st_item *items, size_t n,
                                const exf_pair *meta, size_t n_meta) {
  exf__st_writer w = {s, NULL, n, NULL, n_meta, NULL, 0, 0};
  if (s->status != EXF_OK) return s->status;
  if ((!items && n > 0) || (!meta && n_meta > 0))
    return exf_fail(s->ctx, EXF_ARG, "%s: items or meta is NULL, their number is not 0",
                    s->label);
  if (n > EXF__ST_MAX_TENSORS)
    return exf_fail(s->ctx, EXF_LIMIT, "%s: safetensors rule V18: more than %u tensors",
                    s->label, EXF__ST_MAX_TENSORS);
  w.item = (const exf_st_item **)exf__alloc_n(s->ctx, n, sizeof *w.item);
  w.meta = (exf_pair *)exf__alloc_n(s->ctx, n_meta, sizeof *w.meta);
  if (w.item && w.meta) exf__st_gather(&w, items, meta);
  else s->status = EXF_MEMORY;
  exf__st_write_header(&w);
  exf__save_open(s, w.n_header + w.n_data);
  exf__save_write(s, w.header, w.n_header);
  for (size_t i = 0; i < n && s->status == EXF_OK; i++) exf__st_write_data(s, w.item[i]);
  exf__free(s->ctx, (void *)w.item);
  exf__free(s->ctx, w.meta);
  exf__free(s->ctx, w.header);
  return exf__save_end(s);
}

EXF_API exf_status exf_st_save(exf_ctx *ctx, const char *path, const exf_st_item *items,
                               size_t n, const exf_pair *meta, size_t n_meta) {
  exf__save s;
  if (!ctx) return EXF_ARG;
  exf__save_begin(&s, ctx, path, 0);
  return exf__st_write(&s, items, n, meta, n_meta);
}

EXF_API exf_status exf_st_save_memory(exf_ctx *ctx, const exf_st_item *items, size_t n,
                                      const exf_pair *meta, size_t n_meta,
                                      unsigned char **data, size_t *bytes) {
  exf__save s;
  if (!ctx) return EXF_ARG;
  if (!data || !bytes)
    return exf_fail(ctx, EXF_ARG, "exf_st_save_memory: data or bytes is NULL");
  exf__save_begin(&s, ctx, NULL, 1);
  exf_status status = exf__st_write(&s, items, n, meta, n_meta);
  *data = s.memory;
  *bytes = s.memory ? s.n : 0;
  return status;
}

EXF_API void exf_st_free_memory(exf_ctx *ctx, unsigned char *data) {
  if (ctx) exf__free(ctx, data);
}

/* ---- models and checkpoints in files --------------------------------- >>checkpoint */

/* A model file holds the merged, dense parameters and their aliases. A checkpoint holds
   the parameters as they are, the constants of the FFNs (banks), an optimizer's moments
   as "adamw.m.<name>", "adamw.v.<name>" or "sgd.m.<name>", and in its metadata what
   tensors do not tell. What a file must hold is listed in slots, which live in the step
   arena: loading compares the whole file with them before it takes over the first
   number, so that it is all or nothing. */
#define EXF__UPDATES_KEY "exf.updates"
#define EXF__FUSION_KEY "exf.fusion"

typedef struct exf__slots {
  exf_ctx *ctx;
  exf_st_item *item;           /* (n) data: the model's numbers; loading: or NULL */
  const exf_st_entry **entry;  /* (n) in the file being loaded */
  size_t n;
} exf__slots;

/* No slots yet, room for so many. */
static int exf__slots_start(exf__slots *s, exf_ctx *ctx, size_t room) {
  s->ctx = ctx;
  s->n = 0;
  s->item = (exf_st_item *)exf__arena(ctx, room, sizeof *s->item);
  s->entry = (const exf_st_entry **)exf__arena(ctx, room, sizeof *s->entry);
  return s->item && s->entry;
}

/* A slot named prefix + name. */
static void exf__slots_add(exf__slots *s, const char *prefix, const char *name,
                           const exf_shape *shape, const exf_real *data) {
  size_t size = strlen(prefix) + strlen(name) + 1;
  char *full = (char *)exf__arena(s->ctx, size, 1);
  if (!full) return;
  snprintf(full, size, "%s%s", prefix, name);
  s->item[s->n].name = full;
  s->item[s->n].shape = *shape;
  s->item[s->n++].data = data;
}

/* Finds the tensor of slot i in the file: its name, shape and type have to be right. */
static void exf__slot_match(exf__slots *s, size_t i, const exf_st *st) {
  const exf_st_item *item = &s->item[i];
  const exf_st_entry *e = s->entry[i] = exf_st_find(st, item->name);
  exf_shape have = exf_shape0();
  if (!e) {
    exf_fail(s->ctx, EXF_MISMATCH, "%s: tensor '%s' is missing from the file: is it of "
             "another configuration?", st->label, item->name);
    return;
  }
  have.n = EXF__MIN(e->n_dims, EXF_MAX_DIMS);
  memcpy(have.dim, e->dim, (size_t)have.n * sizeof *e->dim);
  if (e->n_dims != item->shape.n || !exf__same(&have, &item->shape))
    exf_fail(s->ctx, EXF_MISMATCH, "%s: tensor '%s' is %s in the file and %s in the "
             "model", st->label, item->name, exf__show(&have).s,
             exf__show(&item->shape).s);
  if (!exf__st_type_of(e->dtype)->convert)
    exf_fail(s->ctx, EXF_MISMATCH, "%s: tensor '%s' is of type %s; needs F32, F64, F16 "
             "or BF16", st->label, item->name, e->dtype);
}

/* Other tensors in the file are refused, but for moments where they are not wanted. */
static exf_status exf__slots_load(exf__slots *s, const exf_st *st, int skip_moments) {
  exf_ctx *ctx = s->ctx;
  char label[EXF__LABEL];
  for (size_t i = 0; i < s->n && ctx->status == EXF_OK; i++) exf__slot_match(s, i, st);
  /* the names of the slots are unique, so the first stranger ends the search */
  for (size_t i = 0, k; i < st->n && ctx->status == EXF_OK; i++) {
    const exf_st_entry *e = &st->order[i]->entry;
    for (k = 0; k < s->n && s->entry[k] != e; k++) continue;
    if (k < s->n || (skip_moments && exf__moment_name(e->name))) continue;
    exf__label(label, e->name, 0);
    exf_fail(ctx, EXF_MISMATCH, "%s: the file holds '%s', which the model does not have",
             st->label, label);
  }
  for (size_t i = 0; i < s->n && ctx->status == EXF_OK; i++)
    if (s->item[i].data)
      exf_st_read(ctx, s->entry[i], (exf_real *)(uintptr_t)s->item[i].data,
                  exf__shape_size(&s->item[i].shape));
  return ctx->status;
}

/* Saves with user metadata and what this library adds: "format", unless it is there, and
   fusion and updates, unless NULL. */
static exf_status exf__save_items(exf_ctx *ctx, const char *path, const exf__slots *s,
                                  const exf_pair *meta, size_t n_meta,
                                  const char *fusion, const char *updates) {
  const exf_pair more[3] = {{"format", "pt"}, {EXF__FUSION_KEY, fusion},
                            {EXF__UPDATES_KEY, updates}};
  int has_format = 0;
  if (!meta && n_meta)
    return exf_fail(ctx, EXF_ARG, "save: meta is NULL, its number is not 0");
  exf_pair *all = (exf_pair *)exf__arena(ctx, n_meta + 3, sizeof *all);
  if (!all) return ctx->status;
  for (size_t i = 0; i < n_meta; i++) {
    all[i] = meta[i];
    has_format |= meta[i].key && strcmp(meta[i].key, "format") == 0;
  }
  for (int i = has_format; i < 3; i++)
    if (more[i].value) all[n_meta++] = more[i];
  return exf_st_save(ctx, path, s->item, s->n, all, n_meta);
}

/* ---- models */

EXF_API exf_status exf_model_save(exf_model *model, const char *path,
                                  const exf_pair *meta, size_t n_meta) {
  exf__slots s;
  size_t n, room = 0;
  if (!model) return EXF_ARG;
  exf_ctx *ctx = model->ctx;
  if (ctx->status != EXF_OK) return ctx->status;
  const exf_st_item *merged = exf__merged(model, &n);
  for (const exf__alias *a = model->aliases; a; a = a->next) room++;
  if (!merged || !exf__slots_start(&s, ctx, n + room)) return ctx->status;
  for (size_t i = 0; i < n; i++) {
    s.item[s.n++] = merged[i];
    for (const exf__alias *a = model->aliases; a; a = a->next)
      if (strcmp(merged[i].name, a->target) == 0) {
        s.item[s.n] = merged[i];
        s.item[s.n++].name = a->name;
      }
  }
  return exf__save_items(ctx, path, &s, meta, n_meta, NULL, NULL);
}

EXF_API exf_status exf_model_load_st(exf_model *model, const exf_st *st) {
  exf__slots s;
  if (!model || !st) return EXF_ARG;
  exf_ctx *ctx = model->ctx;
  size_t room = model->n_params;
  for (const exf__alias *a = model->aliases; a; a = a->next) room++;
  if (!exf__slots_start(&s, ctx, room)) return ctx->status;
  for (size_t i = 0; i < model->n_params; i++) {
    exf_param *p = model->params[i];
    if (!exf__kept(p))
      exf_fail(ctx, EXF_STATE, "%s: '%s' belongs to experts: load into a dense model, "
               "then upcycle", st->label, p->name);
    exf__slots_add(&s, "", p->name, &p->tensor.shape, p->tensor.data);
  }
  /* a file may hold a parameter under its alias as well, but no other numbers */
  for (const exf__alias *a = model->aliases; a; a = a->next) {
    const exf_st_entry *one = exf_st_find(st, a->target), *two = exf_st_find(st, a->name);
    const exf_param *p = exf_model_find(model, a->target);
    if (!two || !p) continue;
    if (one && (one->bytes != two->bytes
                || memcmp(one->data, two->data, one->bytes) != 0))
      exf_fail(ctx, EXF_MISMATCH, "%s: '%s' and '%s' are one parameter and must be equal",
               st->label, a->target, a->name);
    exf__slots_add(&s, "", a->name, &p->tensor.shape, NULL);
  }
  if (exf__slots_load(&s, st, 0) == EXF_OK) exf__model_trained(model);
  return ctx->status;
}

EXF_API exf_status exf_model_load(exf_model *model, const char *path) {
  if (!model || model->ctx->status != EXF_OK)
    return model ? model->ctx->status : EXF_ARG;
  exf_st *st = exf_st_open(model->ctx, path, NULL);
  exf_model_load_st(model, st);
  exf_st_close(st);
  return model->ctx->status;
}

/* ---- checkpoints */

/* Everything a checkpoint holds: parameters, moments, constants. 0 on failure. */
static int exf__checkpoint_slots(exf__slots *s, exf_model *model, const exf_optim *o) {
  size_t room = 3 * model->n_params;
  if (o && o->model != model)
    exf_fail(model->ctx, EXF_ARG, "checkpoint: the optimizer is another model's");
  for (const exf__buffer *b = model->buffers; b; b = b->next) room++;
  if (!exf__slots_start(s, model->ctx, room)) return 0;
  for (size_t i = 0; i < model->n_params; i++) {
    exf_param *p = model->params[i];
    exf__slots_add(s, "", p->name, &p->tensor.shape, p->tensor.data);
    const exf__moments *m = o ? exf__optim_moments(o, p) : NULL;
    if (m && m->m)
      exf__slots_add(s, m->v ? "adamw.m." : "sgd.m.", p->name, &m->shape, m->m);
    if (m && m->v) exf__slots_add(s, "adamw.v.", p->name, &m->shape, m->v);
  }
  for (const exf__buffer *b = model->buffers; b; b = b->next)
    if (b->saved) exf__slots_add(s, "", b->name, &b->tensor.shape, b->tensor.data);
  return model->ctx->status == EXF_OK;
}

/* What tensors do not tell of the FFNs: "12 x dw softmax 4, 1 x dense". NULL on
   failure. */
static const char *exf__fusion_text(const exf_model *m) {
  size_t room = sizeof(exf__name) * m->n_ffns + 1, at = 0, run = 0;
  char *text = (char *)exf__arena(m->ctx, room, 1);
  exf__name one, last = "";
  if (!text) return NULL;
  for (size_t i = 0; i <= m->n_ffns; i++, run++) {
    const exf_fusion_desc *f = i < m->n_ffns ? &m->ffns[i]->fusion : NULL;
    const char *softmax = f && f->variant == EXF_DW && f->dw_softmax ? " softmax" : "";
    const char *name = !f ? "" : f->variant == EXF_RULE ? f->rule->name
                                                        : exf_variant_name(f->variant);
    if (!f || f->variant == EXF_DENSE) snprintf(one, sizeof one, "%s", name);
    else snprintf(one, sizeof one, "%.190s%s %zu", name, softmax, f->n_experts);
    if (run > 0 && strcmp(one, last) != 0) {
      at += (size_t)snprintf(text + at, room - at, "%s%zu x %s", at ? ", " : "", run,
                             last);
      run = 0;
    }
    memcpy(last, one, sizeof last);
  }
  text[at] = '\0';
  return text;
}

EXF_API exf_status exf_checkpoint_save(exf_model *model, const exf_optim *optim,
                                       const char *path, const exf_pair *meta,
                                       size_t n_meta) {
  exf__slots s;
  char updates[32];
  if (!model) return EXF_ARG;
  exf_ctx *ctx = model->ctx;
  if (ctx->status != EXF_OK) return ctx->status;
  snprintf(updates, sizeof updates, "%llu", (unsigned long long)exf_optim_steps(optim));
  const char *fusion = exf__fusion_text(model);
  if (!exf__checkpoint_slots(&s, model, optim)) return ctx->status;
  return exf__save_items(ctx, path, &s, meta, n_meta, fusion, optim ? updates : NULL);
}

EXF_API exf_status exf_checkpoint_load_st(exf_model *model, exf_optim *optim,
                                          const exf_st *st) {
  exf__slots s;
  char label[EXF__LABEL], *end = NULL;
  if (!model || !st) return EXF_ARG;
  exf_ctx *ctx = model->ctx;
  if (ctx->status != EXF_OK) return ctx->status;
  const char *stored = exf_st_meta(st, EXF__FUSION_KEY);
  const char *fusion = exf__fusion_text(model);
  exf__label(label, stored ? stored : "", 0);
  const char *count = exf_st_meta(st, EXF__UPDATES_KEY);
  errno = 0;   /* strtoull would take blanks and signs */
  const uint64_t updates = count && *count >= '0' && *count <= '9'
                               ? strtoull(count, &end, 10) : 0;
  if (optim && (!end || *end != '\0' || errno != 0))
    exf_fail(ctx, EXF_MISMATCH, "%s: the file has no update count (%s): it is not a "
             "training checkpoint", st->label, EXF__UPDATES_KEY);
  if (stored && fusion && strcmp(stored, fusion) != 0)
    exf_fail(ctx, EXF_MISMATCH, "%s: the checkpoint's FFNs are '%s', the model's '%.80s'",
             st->label, label, fusion);
  if (!exf__checkpoint_slots(&s, model, optim)
      || exf__slots_load(&s, st, !optim) != EXF_OK)
    return ctx->status;
  if (optim) optim->t = updates;
  exf_model_zero_grad(model);
  exf__model_trained(model);
  return EXF_OK;
}

EXF_API exf_status exf_checkpoint_load(exf_model *model, exf_optim *optim,
                                       const char *path) {
  if (!model || model->ctx->status != EXF_OK)
    return model ? model->ctx->status : EXF_ARG;
  exf_st *st = exf_st_open(model->ctx, path, NULL);
  exf_checkpoint_load_st(model, optim, st);
  exf_st_close(st);
  return model->ctx->status;
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
   you prefer. A: MIT No Attribution, as below. B: the public domain by the Unlicense, the
   text of which stands in the file LICENSE and at <https://unlicense.org>.

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

   0.2.0  2026-11  one path from op to kernel, fusion rules from outside, a smaller face
   0.1.0  2026-11  tensors, tape, modules, ExFusion FFNs, optimizers, safetensors */
