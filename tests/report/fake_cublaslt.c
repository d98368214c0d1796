// A cublasLt of the CPU with the calls that are used, float32 only: it says no to what the real one would, and two of
// its proposals do not do what they should.  Signatures and sizes as in cublasLt.h.
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct { uint64_t data[8]; } Algorithm;
typedef struct { Algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; } Proposal;
typedef struct { int compute, scale, turn_a, turn_b; uint32_t epilogue; const float *bias; } Operation;
typedef struct { int type; uint64_t rows, columns; int64_t lead, step; int32_t count; } Layout;
typedef struct { uint64_t workspace; uint32_t reductions; } Preference;

enum { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID = 7, FAILED = 13, UNSUPPORTED = 15 };
static int created = 1, alive = 0;

void fake_without_gpu(int yes) { created = !yes; }
int fake_alive(void) { return alive; }

const char *cublasLtGetStatusName(int status) {
    return status == UNSUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED" : status == FAILED ? "CUBLAS_STATUS_EXECUTION_FAILED"
        : status == NOT_INITIALIZED ? "CUBLAS_STATUS_NOT_INITIALIZED" : "CUBLAS_STATUS_INVALID_VALUE";
}

int cublasLtCreate(void **handle) {
    *handle = created ? &created : NULL;
    return created ? SUCCESS : NOT_INITIALIZED;
}

int cublasLtMatmulDescCreate(Operation **made, int compute, int scale) {
    *made = calloc(1, sizeof(Operation));
    (*made)->compute = compute, (*made)->scale = scale, (*made)->epilogue = 1;
    return alive++, SUCCESS;
}

int cublasLtMatmulDescSetAttribute(Operation *operation, int attribute, const void *value, size_t bytes) {
    if (attribute == 3 && bytes == 4) return memcpy(&operation->turn_a, value, 4), SUCCESS;
    if (attribute == 4 && bytes == 4) return memcpy(&operation->turn_b, value, 4), SUCCESS;
    if (attribute == 7 && bytes == 4) return memcpy(&operation->epilogue, value, 4), SUCCESS;
    if (attribute == 8 && bytes == 8) return memcpy(&operation->bias, value, 8), SUCCESS;
    return INVALID;
}

int cublasLtMatrixLayoutCreate(Layout **made, int type, uint64_t rows, uint64_t columns, int64_t lead) {
    *made = calloc(1, sizeof(Layout));
    **made = (Layout){type, rows, columns, lead, 0, 1};
    return alive++, SUCCESS;
}

int cublasLtMatrixLayoutSetAttribute(Layout *layout, int attribute, const void *value, size_t bytes) {
    if (attribute == 5 && bytes == 4) return memcpy(&layout->count, value, 4), SUCCESS;
    if (attribute == 6 && bytes == 8) return memcpy(&layout->step, value, 8), SUCCESS;
    return INVALID;
}

int cublasLtMatmulPreferenceCreate(Preference **made) { return *made = calloc(1, sizeof(Preference)), alive++, SUCCESS; }

int cublasLtMatmulPreferenceSetAttribute(Preference *wanted, int attribute, const void *value, size_t bytes) {
    if (attribute == 1 && bytes == 8) return memcpy(&wanted->workspace, value, 8), SUCCESS;
    if (attribute == 3 && bytes == 4) return memcpy(&wanted->reductions, value, 4), SUCCESS;
    return INVALID;
}

int cublasLtMatmulDescDestroy(void *made) { return free(made), alive--, SUCCESS; }
int cublasLtMatrixLayoutDestroy(void *made) { return free(made), alive--, SUCCESS; }
int cublasLtMatmulPreferenceDestroy(void *made) { return free(made), alive--, SUCCESS; }

// Whether op(A) op(B) has the shape of D, and what the epilogue wants.
static int fits(const Operation *operation, const Layout *a, const Layout *b, const Layout *d) {
    uint64_t m = operation->turn_a ? a->columns : a->rows, k = operation->turn_a ? a->rows : a->columns;
    uint64_t n = operation->turn_b ? b->rows : b->columns, k_too = operation->turn_b ? b->columns : b->rows;
    return m == d->rows && n == d->columns && k == k_too && a->count == d->count && b->count == d->count
        && (operation->epilogue == 1 || (operation->epilogue == 6 && operation->bias));
}

enum { RIGHT, STATE_BAD, UNWRITTEN, FAILS, TOO_LARGE, RIGHT_AGAIN, RIGHT_TOO, COUNT };

int cublasLtMatmulAlgoGetHeuristic(void *handle, Operation *operation, Layout *a, Layout *b, Layout *c, Layout *d,
                                   Preference *wanted, int most, Proposal *found, int *count) {
    if (!handle || most < 1 || !fits(operation, a, b, d) || !wanted->reductions) return INVALID;
    if (a->type || b->type || c->type || d->type || operation->scale) return UNSUPPORTED;
    if (operation->compute != 68 && operation->compute != 77) return UNSUPPORTED;
    *count = most < COUNT ? most : COUNT;
    for (int i = 0; i < *count; i++) {
        memset(&found[i], 0, sizeof(Proposal));
        found[i].algorithm.data[0] = i == RIGHT_AGAIN ? RIGHT : i;
        found[i].workspace = i == TOO_LARGE ? wanted->workspace + 1 : wanted->workspace;
        found[i].state = i == STATE_BAD ? UNSUPPORTED : SUCCESS;
    }
    return SUCCESS;
}

int cublasLtMatmulAlgoConfigGetAttribute(const Algorithm *algorithm, int attribute, void *value, size_t bytes,
                                         size_t *written) {
    if (bytes != 4) return INVALID;
    *(uint32_t *)value = attribute == 0 ? (uint32_t)algorithm->data[0] : 0;
    return *written = 4, SUCCESS;
}

int cublasLtMatmul(void *handle, const Operation *operation, const float *alpha, const float *a_at, const Layout *a,
                   const float *b_at, const Layout *b, const float *beta, const void *c_at, const Layout *c,
                   float *d_at, const Layout *d, const Algorithm *algorithm, void *workspace, size_t bytes,
                   void *stream) {
    if (!handle || *alpha != 1 || *beta != 0 || c_at != d_at || c != d || !workspace || bytes < 32 << 20) return INVALID;
    if ((uintptr_t)stream != 77 || !fits(operation, a, b, d)) return INVALID;
    if (algorithm->data[0] == FAILS) return FAILED;
    uint64_t depth = operation->turn_a ? a->rows : a->columns;
    uint64_t columns = d->columns - (algorithm->data[0] == UNWRITTEN);
    for (int image = 0; image < d->count; image++)
        for (uint64_t i = 0; i < d->rows; i++)
            for (uint64_t j = 0; j < columns; j++) {
                double sum = 0;
                for (uint64_t t = 0; t < depth; t++)
                    sum += (double)a_at[image * a->step + (operation->turn_a ? t + i * a->lead : i + t * a->lead)]
                        * b_at[image * b->step + (operation->turn_b ? j + t * b->lead : t + j * b->lead)];
                if (operation->epilogue == 6) sum = sum + operation->bias[i] > 0 ? sum + operation->bias[i] : 0;
                d_at[image * d->step + i + j * d->lead] = (float)sum;
            }
    return SUCCESS;
}
