/* y = x W^T for many tokens: the host code of a GPU library.
 *
 *   few tokens     the format's own kernel
 *   many tokens    W decoded into a scratch buffer, then one dense product on tensor cores:
 *                  cuBLASLt where it is installed, else the library's own kernel
 *
 * cuBLASLt (NVIDIA's documentation, "Using the cuBLASLt API") is opened at the first product, never linked. It is the
 * one that TVM_SPARSE_CUBLASLT names ("0": none), or else the first of: the loader's own (already loaded, on
 * LD_LIBRARY_PATH, known to ldconfig), the one beside the CUDA runtime in use (NVIDIA's wheels), CUDA_HOME, CUDA_PATH,
 * /usr/local/cuda. TVM_SPARSE_DEBUG=1 says which; where one was named or found and is of no use, that is said always.
 *
 * Same bits every run: one algorithm for each shape, the heuristics' first, and none that adds up partial sums in an
 * order of arrival. Nothing is allocated on the GPU, nothing waits: calls may be captured in a CUDA graph after a first
 * one outside.
 *
 * codegen/many_tokens.py appends one function for each product, and says which kernels it is made of.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* TVM FFI's calling convention (tvm/ffi/c_api.h) and DLPack's tensor. */
typedef struct { int32_t type_index; uint32_t padding; void* value; } Any;
typedef int Kernel(void*, const Any*, int32_t, Any*);
typedef struct { int32_t type, id; } Device;
typedef struct { uint8_t code, bits; uint16_t lanes; } DType;
typedef struct {
  void* data; Device device; int32_t ndim; DType dtype; int64_t *shape, *strides; uint64_t byte_offset;
} Tensor;
enum { ANY_TENSOR_POINTER = 7, ANY_TENSOR = 70, OBJECT_HEADER = 24 };

extern void* TVMFFIEnvGetStream(int32_t device_type, int32_t device_id);
extern void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message);

typedef struct {
  const char* name;
  Kernel* few;     /* (x, buffers..., y); none: every number of tokens is many */
  Kernel* decode;  /* (buffers..., w bfloat16 [n, k]); none: the one buffer is w */
  Kernel* dense;   /* (x, w, y): the library's own tensor core kernel */
  int64_t most;    /* tokens that are few */
} Product;

static int fail(const Product* product, const char* what, int64_t code) {
  char line[512];
  snprintf(line, sizeof line, "%s: %s (%lld)", product->name, what, (long long)code);
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", line);
  return -1;
}

/* cuBLASLt ------------------------------------------------------------------------------------------------------- */

enum { /* names as in cublasLt.h, cublas_api.h and library_types.h */
  R_32F = 0, R_16BF = 14, COMPUTE_32F = 68, OP_T = 1, DESC_TRANSA = 3,
  PREF_MAX_WORKSPACE_BYTES = 1, PREF_REDUCTION_SCHEME_MASK = 3, PREF_MIN_ALIGNMENT_A_BYTES = 5,
  REDUCTION_SCHEME_COMPUTE_TYPE = 2 /* partial sums in the workspace, added by a second kernel in a fixed order */
};
typedef struct { uint64_t data[8]; } Algo;
typedef struct { Algo algo; size_t workspace; int state; float waves; int reserved[4]; } Heuristic;

static struct {
  size_t (*GetVersion)(void);
  int (*Create)(void**);
  int (*MatmulDescCreate)(void**, int, int);
  int (*MatmulDescDestroy)(void*);
  int (*MatmulDescSetAttribute)(void*, int, const void*, size_t);
  int (*MatrixLayoutCreate)(void**, int, uint64_t, uint64_t, int64_t);
  int (*MatrixLayoutDestroy)(void*);
  int (*MatmulPreferenceCreate)(void**);
  int (*MatmulPreferenceDestroy)(void*);
  int (*MatmulPreferenceSetAttribute)(void*, int, const void*, size_t);
  int (*MatmulAlgoGetHeuristic)(void*, void*, void*, void*, void*, void*, void*, int, Heuristic*, int*);
  int (*Matmul)(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                void*, void*, const Algo*, void*, size_t, void*);
} lt;
static const char* const names[] = {
  "GetVersion", "Create", "MatmulDescCreate", "MatmulDescDestroy", "MatmulDescSetAttribute", "MatrixLayoutCreate",
  "MatrixLayoutDestroy", "MatmulPreferenceCreate", "MatmulPreferenceDestroy", "MatmulPreferenceSetAttribute",
  "MatmulAlgoGetHeuristic", "Matmul",
};
enum { ALIGNMENT = 16, DEVICES = 64, CHOSEN = 1024 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int there;             /* -1: no cuBLASLt, 1: `lt` is filled in */
static void* handles[DEVICES];
static char from[1024];       /* the file, or why there is none */

static void* open_in(const char* folder, const char* inside) {
  static const char* const files[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
  for (int i = 0; i < 2; ++i) {
    snprintf(from, sizeof from, "%s%s%s", folder ? folder : "", folder ? inside : "", files[i]);
    void* opened = dlopen(from, RTLD_NOW | RTLD_LOCAL);
    if (opened) return opened;
  }
  return NULL;
}

static void* open_library(void) {
  const char* named = getenv("TVM_SPARSE_CUBLASLT");
  if (named && *named) {
    snprintf(from, sizeof from, "%s", named);
    return strcmp(named, "0") ? dlopen(named, RTLD_NOW | RTLD_LOCAL) : NULL;
  }
  void* opened = open_in(NULL, NULL);
  Dl_info runtime;
  void* used = dlsym(RTLD_DEFAULT, "cudaGetDeviceCount");
  if (!opened && used && dladdr(used, &runtime) && strrchr(runtime.dli_fname, '/')) {
    char folder[1024];
    snprintf(folder, sizeof folder, "%s", runtime.dli_fname);
    char* slash = strrchr(folder, '/');
    if (slash) {
      slash[1] = 0;
      opened = open_in(folder, "");
    }
  }
  if (!opened && getenv("CUDA_HOME")) opened = open_in(getenv("CUDA_HOME"), "/lib64/");
  if (!opened && getenv("CUDA_PATH")) opened = open_in(getenv("CUDA_PATH"), "/lib64/");
  if (!opened) opened = open_in("/usr/local/cuda", "/lib64/");
  if (!opened) snprintf(from, sizeof from, "no libcublasLt.so.13 or .12 found");
  return opened;
}

/* From here on the library's own kernel serves. */
static void do_without(int said) {
  there = -1;
  if (said) fprintf(stderr, "tvm_sparse: many tokens: the library's own kernel (cuBLASLt: %s)\n", from);
}

static void append(const char* text) { strncat(from, text, sizeof from - strlen(from) - 1); }

/* Fills in `lt` the first time; 1 where it can be used. */
static int find_library(void) {
  if (there) return there > 0;
  const char *named = getenv("TVM_SPARSE_CUBLASLT"), *debug = getenv("TVM_SPARSE_DEBUG");
  const int asked = named && *named && strcmp(named, "0"), verbose = debug && *debug > '0';
  void* opened = open_library();
  there = opened ? 1 : -1;
  for (size_t i = 0; there > 0 && i < sizeof names / sizeof *names; ++i) {
    char symbol[64];
    snprintf(symbol, sizeof symbol, "cublasLt%s", names[i]);
    void* found = dlsym(opened, symbol);
    if (found) {
      memcpy((char*)&lt + i * sizeof found, &found, sizeof found);
    } else {
      append(" lacks ");
      append(symbol);
      there = -1;
    }
  }
  if (there < 0) do_without(verbose || asked || opened);
  else if (verbose) fprintf(stderr, "tvm_sparse: many tokens: cuBLASLt %zu (%s)\n", lt.GetVersion(), from);
  return there > 0;
}

typedef struct { int32_t device, out; int64_t m, n, k; size_t room; } Shape;
typedef struct { Shape shape; int state; Algo algo; } Chosen; /* state 1: algo, -1: cuBLASLt has none */

/* The algorithm of a shape: asked for once, kept in its place until another shape needs the place. */
static const Chosen* choose(const Shape* shape, void* op, void* w, void* x, void* y) {
  static Chosen chosen[CHOSEN];
  uint64_t hash = 0;
  for (size_t i = 0; i < sizeof *shape / 8; ++i) {
    uint64_t part;
    memcpy(&part, (const char*)shape + 8 * i, 8);
    hash = (hash ^ part) * 0x9e3779b97f4a7c15u;
  }
  Chosen* place = &chosen[hash >> 54];
  if (place->state && !memcmp(&place->shape, shape, sizeof *shape)) return place;
  void* wanted = NULL;
  uint32_t reductions = REDUCTION_SCHEME_COMPUTE_TYPE, aligned = ALIGNMENT;
  Heuristic best;
  int count = 0;
  if (lt.MatmulPreferenceCreate(&wanted)) return NULL;
  int status = lt.MatmulPreferenceSetAttribute(wanted, PREF_MAX_WORKSPACE_BYTES, &shape->room, sizeof shape->room);
  status |= lt.MatmulPreferenceSetAttribute(wanted, PREF_REDUCTION_SCHEME_MASK, &reductions, sizeof reductions);
  for (int i = 0; i < 4; ++i)
    status |= lt.MatmulPreferenceSetAttribute(wanted, PREF_MIN_ALIGNMENT_A_BYTES + i, &aligned, sizeof aligned);
  if (!status) status = lt.MatmulAlgoGetHeuristic(handles[shape->device], op, w, x, y, y, wanted, 1, &best, &count);
  lt.MatmulPreferenceDestroy(wanted);
  place->shape = *shape;
  place->state = !status && count && !best.state ? 1 : -1;
  if (place->state > 0) place->algo = best.algo;
  return place;
}

/* 1: done, 0: cuBLASLt is not there or has nothing for this shape, else an error of Product `p`. In its words, by
 * columns: y [n, m] = w [k, n]^T x [k, m]. */
static int multiply(const Product* p, const Tensor* x, const Tensor* w, const Tensor* y, void* room, size_t size) {
  Shape shape = {x->device.id, y->dtype.bits == 32 ? R_32F : R_16BF, x->shape[0], w->shape[0], w->shape[1], size};
  void *op = NULL, *of_w = NULL, *of_x = NULL, *of_y = NULL;
  const int transposed = OP_T;
  const float one = 1.f, zero = 0.f;
  int done = 0;
  pthread_mutex_lock(&lock);
  if (!find_library() || shape.device < 0 || shape.device >= DEVICES) goto end;
  if (!handles[shape.device] && lt.Create(&handles[shape.device])) {
    append(" does not start on this device");
    do_without(1);
    goto end;
  }
  int status = lt.MatmulDescCreate(&op, COMPUTE_32F, R_32F);
  if (!status) status = lt.MatmulDescSetAttribute(op, DESC_TRANSA, &transposed, sizeof transposed);
  if (!status) status = lt.MatrixLayoutCreate(&of_w, R_16BF, shape.k, shape.n, shape.k);
  if (!status) status = lt.MatrixLayoutCreate(&of_x, R_16BF, shape.k, shape.m, shape.k);
  if (!status) status = lt.MatrixLayoutCreate(&of_y, shape.out, shape.n, shape.m, shape.n);
  const Chosen* chosen = status ? NULL : choose(&shape, op, of_w, of_x, of_y);
  if (chosen && chosen->state > 0) {
    void* stream = TVMFFIEnvGetStream(x->device.type, x->device.id);
    status = lt.Matmul(handles[shape.device], op, &one, w->data, of_w, x->data, of_x, &zero, y->data, of_y, y->data,
                       of_y, &chosen->algo, room, size, stream);
    done = status ? 0 : 1;
  }
  if (status) done = fail(p, "cuBLASLt failed with status", status);
  if (of_y) lt.MatrixLayoutDestroy(of_y);
  if (of_x) lt.MatrixLayoutDestroy(of_x);
  if (of_w) lt.MatrixLayoutDestroy(of_w);
  if (op) lt.MatmulDescDestroy(op);
end:
  pthread_mutex_unlock(&lock);
  return done;
}

/* A product ------------------------------------------------------------------------------------------------------ */

static Tensor* tensor(const Any* any) {
  if (any->type_index == ANY_TENSOR_POINTER) return any->value;
  return any->type_index == ANY_TENSOR ? (Tensor*)((char*)any->value + OBJECT_HEADER) : NULL;
}

static Any pointer(Tensor* tensor) { return (Any){ANY_TENSOR_POINTER, 0, tensor}; }

static void* start(const Tensor* tensor) { return (char*)tensor->data + tensor->byte_offset; }

/* (x [m, k], buffers..., y [m, n], scratch uint8): scratch holds w where it is decoded, then cuBLASLt's workspace. */
static int run(const Product* p, const Any* args, int32_t count, Any* result) {
  enum { MOST = 16 };
  for (int i = 0; i < count; ++i)
    if (!tensor(&args[i])) return fail(p, "not a tensor: argument", i);
  if (count < 4 || count > MOST) return fail(p, "wrong number of arguments", count);
  Tensor x = *tensor(&args[0]), y = *tensor(&args[count - 2]), *scratch = tensor(&args[count - 1]);
  if (x.ndim != 2 || y.ndim != 2 || x.shape[0] != y.shape[0]) return fail(p, "x is [m, k], y is [m, n]", x.shape[0]);
  if (!x.shape[0]) return 0;
  if (p->few && x.shape[0] <= p->most) return p->few(NULL, args, count - 1, result);

  int64_t shape[2] = {y.shape[1], x.shape[1]};
  Tensor w = *tensor(&args[1]);
  size_t taken = 0, size = scratch->shape[0];
  if (p->decode) {
    w = (Tensor){start(scratch), scratch->device, 2, {4 /* bfloat16 */, 16, 1}, shape, NULL, 0};
    taken = ((size_t)shape[0] * shape[1] * 2 + 255) / 256 * 256;
    if (taken > size) return fail(p, "the scratch buffer is too small, bytes", size);
    Any passed[MOST];
    memcpy(passed, args + 1, (count - 3) * sizeof *args);
    passed[count - 3] = pointer(&w);
    if (p->decode(NULL, passed, count - 2, result)) return -1;
  }
  x.data = start(&x), w.data = start(&w), y.data = start(&y);
  x.byte_offset = w.byte_offset = y.byte_offset = 0;
  if (((uintptr_t)x.data | (uintptr_t)w.data | (uintptr_t)y.data) % ALIGNMENT)
    return fail(p, "x, the weight and y must begin at multiples of bytes", ALIGNMENT);
  int done = multiply(p, &x, &w, &y, (char*)start(scratch) + taken, size - taken);
  if (done) return done > 0 ? 0 : -1;
  Any passed[3] = {pointer(&x), pointer(&w), pointer(&y)};
  return p->dense(NULL, passed, 3, result);
}
