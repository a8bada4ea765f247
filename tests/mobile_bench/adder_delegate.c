/* A TFLite delegate for tests: it takes the additions of float tensors, and adds; what was compiled for an Edge
   TPU is an addition too. Options make it misbehave. The structs follow tensorflow/lite/core/c/common.h. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct { int size; int data[]; } Ints;
typedef struct {
  int type; float *data; Ints *dims; float scale; int32_t zero_point; int allocation_type; size_t bytes;
  const void *allocation; const char *name; void *delegate; int buffer_handle; uint8_t stale, variable;
  int quantization; void *quantization_params; void *sparsity; const Ints *dims_signature;
} Tensor;
typedef struct { Ints *inputs, *outputs, *intermediates, *temporaries; void *user_data; } Node;
typedef struct { void *delegate; Ints *nodes, *inputs, *outputs; } Params;
struct Context;
typedef struct {
  void *(*init)(struct Context *, const char *, size_t);
  void (*free)(struct Context *, void *);
  int (*prepare)(struct Context *, Node *);
  int (*invoke)(struct Context *, Node *);
  const char *(*profiling_string)(const struct Context *, const Node *);
  int32_t builtin_code; const char *custom_name; int version;
  void *external, *async_kernel; uint64_t inplace;
} Registration;
struct Delegate;
typedef struct Context {
  size_t tensors_size;
  int (*get_execution_plan)(struct Context *, Ints **);
  Tensor *tensors; void *impl; void *resize;
  void (*report_error)(struct Context *, const char *, ...);
  void *add_tensors;
  int (*get_node)(struct Context *, int, Node **, Registration **);
  int (*replace)(struct Context *, Registration, const Ints *, struct Delegate *);
} Context;
typedef struct Delegate {
  void *data; int (*prepare)(Context *, struct Delegate *); void *from, *to, *release; int64_t flags; void *builder;
} Delegate;

static float bias;
static int fails, crash;

/* A kernel stands for a row of additions of a value to itself; each doubles it. */
static void *init(Context *context, const char *params, size_t length) {
  return (void *)((intptr_t)1 << ((const Params *)params)->nodes->size);
}
static void drop(Context *context, void *factor) {}
static int ready(Context *context, Node *node) { return 0; }
static int invoke(Context *context, Node *node) {
  Tensor *given = &context->tensors[node->inputs->data[0]], *sum = &context->tensors[node->outputs->data[0]];
  float factor = (intptr_t)node->user_data;
  for (size_t i = 0; i < sum->bytes / sizeof(float); i++) sum->data[i] = given->data[i] * factor + bias;
  return 0;
}
static int prepare(Context *context, Delegate *delegate) {
  Ints *plan, *taken;
  Node *node; Registration *operation;
  if (crash) abort();
  if (fails) return 2;
  context->get_execution_plan(context, &plan);
  taken = calloc(1, sizeof(Ints) + plan->size * sizeof(int));
  for (int i = 0; i < plan->size; i++) {
    context->get_node(context, plan->data[i], &node, &operation);
    int edgetpu = operation->builtin_code == 32 && !strcmp(operation->custom_name, "edgetpu-custom-op");
    if (operation->builtin_code == 0 || edgetpu) taken->data[taken->size++] = plan->data[i];
  }
  Registration kernel = {init, drop, ready, invoke, NULL, 51, "Adder", 1};
  int status = context->replace(context, kernel, taken, delegate);
  free(taken);
  return status;
}
Delegate *tflite_plugin_create_delegate(char **keys, char **values, size_t count, void (*report)(const char *)) {
  static Delegate delegate;
  for (size_t i = 0; i < count; i++) {
    if (!strcmp(keys[i], "bias")) bias = atof(values[i]);
    else if (!strcmp(keys[i], "fails")) fails = atoi(values[i]);
    /* As libedgetpu: kTfLiteDelegateFlagsAllowDynamicTensors lets it in before the operations are prepared. */
    else if (!strcmp(keys[i], "early")) delegate.flags = atoi(values[i]);
    else if (!strcmp(keys[i], "crash")) crash = atoi(values[i]);
    else {
      report("unknown option ");
      report(keys[i]);
      return NULL;
    }
  }
  delegate.prepare = prepare;
  return &delegate;
}
void tflite_plugin_destroy_delegate(Delegate *delegate) {}
