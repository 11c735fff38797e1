/* aclTensor and its relatives, as libopapi of the double sees them. */
#ifndef FAKE_CANN_TENSORS_H
#define FAKE_CANN_TENSORS_H

#include "internal.h"

#define MAX_DIMS 8

struct tensor {
    int type; /* aclDataType */
    int num_dims;
    int64_t dims[MAX_DIMS], strides[MAX_DIMS];
    char *data; /* of the first element */
};

struct scalar {
    long double value;
};

struct tensor_list {
    uint64_t count;
    struct tensor **tensors;
};

size_t type_size(int type); /* 0: not provided */
long double read_number(const void *at, int type);
void write_number(void *at, int type, long double value);
int64_t num_elements(const struct tensor *t);
/* The part at `index` of dimension `dim`, with that dimension kept at `length`. */
struct tensor narrow(const struct tensor *t, int dim, int64_t index, int64_t length);
/* Element by element, with conversion; `source` is broadcast. */
aclError copy_tensor(const struct tensor *target, const struct tensor *source);
void fill_tensor(const struct tensor *target, long double value);

#endif
