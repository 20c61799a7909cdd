/* hello.c - one tensor, one gradient, beside the result by hand.

   Shows: context, parameter, ops, backward; errors are checked once, at the end.
   Runs:  at once.
   Build: cc -O2 -o hello examples/hello.c -lm
   Ends:  dL/dw = 10 20   by hand: 10 20 */
#define EXFUSION_IMPLEMENTATION
#include "../exfusion.h"

#include <stdio.h>

int main(void) {
  const exf_real numbers[] = {1, 2, 3, 4};
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_model *model = exf_model_new(ctx);
  exf_tensor *w = exf_param_new(model, "w", &(exf_param_desc){     /* (2): 0.5 0.5 */
    .shape = exf_shape1(2), .init_value = 0.5});     /* what is left out is a default */
  exf_tensor *x = exf_tensor_new(ctx, exf_shape2(2, 2), numbers);  /* (2,2): 1 2 / 3 4 */

  /* L = sum_ij (x_ij w_j)^2, so dL/dw_j = 2 w_j sum_i x_ij^2 */
  exf_tensor *loss = exf_sum(ctx, exf_square(ctx, exf_mul(ctx, x, w)), EXF_ALL_AXES, 0);
  exf_backward(ctx, loss);

  if (!ctx || exf_ctx_status(ctx) != EXF_OK) {
    fprintf(stderr, "hello: %s\n", ctx ? exf_error(ctx) : "out of memory");
    return 1;
  }
  printf("L = %g   by hand: 7.5\n", exf_item(loss));
  printf("dL/dw = %g %g   by hand: 10 20\n", (double)w->grad[0], (double)w->grad[1]);
  exf_model_free(model);
  exf_ctx_free(ctx);
  return 0;
}
