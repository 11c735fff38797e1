/* Tensors with strides: making, reading, copying. */
#include "tensors.h"

#include <stdlib.h>
#include <string.h>

enum {
    FP32 = 0,
    FP16 = 1,
    I8 = 2,
    I32 = 3,
    U8 = 4,
    I16 = 6,
    U16 = 7,
    U32 = 8,
    I64 = 9,
    U64 = 10,
    FP64 = 11,
    BOOLEAN = 12,
    C64 = 16,
    C128 = 17,
    BF16 = 27
};

size_t type_size(int type)
{
    switch (type) {
    case I8:
    case U8:
    case BOOLEAN: return 1;
    case FP16:
    case BF16:
    case I16:
    case U16: return 2;
    case FP32:
    case I32:
    case U32: return 4;
    case FP64:
    case I64:
    case U64:
    case C64: return 8;
    case C128: return 16;
    default: return 0;
    }
}

static float from_bf16(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Rounds to nearest, ties to even. */
static uint16_t to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

long double read_number(const void *at, int type)
{
    switch (type) {
    case FP32: return *(const float *)at;
    case FP16: return *(const _Float16 *)at;
    case FP64: return *(const double *)at;
    case BF16: return from_bf16(*(const uint16_t *)at);
    case I8: return *(const int8_t *)at;
    case U8: return *(const uint8_t *)at;
    case BOOLEAN: return *(const uint8_t *)at != 0;
    case I16: return *(const int16_t *)at;
    case U16: return *(const uint16_t *)at;
    case I32: return *(const int32_t *)at;
    case U32: return *(const uint32_t *)at;
    case I64: return *(const int64_t *)at;
    case U64: return *(const uint64_t *)at;
    default: fake_give_up("libopapi: numbers of aclDataType %d are not provided", type);
    }
}

void write_number(void *at, int type, long double value)
{
    switch (type) {
    case FP32: *(float *)at = (float)value; break;
    case FP16: *(_Float16 *)at = (_Float16)value; break;
    case FP64: *(double *)at = (double)value; break;
    case BF16: *(uint16_t *)at = to_bf16((float)value); break;
    case I8: *(int8_t *)at = (int8_t)value; break;
    case U8: *(uint8_t *)at = (uint8_t)value; break;
    case BOOLEAN: *(uint8_t *)at = value != 0; break;
    case I16: *(int16_t *)at = (int16_t)value; break;
    case U16: *(uint16_t *)at = (uint16_t)value; break;
    case I32: *(int32_t *)at = (int32_t)value; break;
    case U32: *(uint32_t *)at = (uint32_t)value; break;
    case I64: *(int64_t *)at = (int64_t)value; break;
    case U64: *(uint64_t *)at = (uint64_t)value; break;
    default: fake_give_up("libopapi: numbers of aclDataType %d are not provided", type);
    }
}

int64_t num_elements(const struct tensor *t)
{
    int64_t count = 1;
    for (int i = 0; i < t->num_dims; i++)
        count *= t->dims[i];
    return count;
}

struct tensor narrow(const struct tensor *t, int dim, int64_t index, int64_t length)
{
    struct tensor part = *t;
    if (!t->num_dims)
        return part;
    part.data += index * t->strides[dim] * (int64_t)type_size(t->type);
    part.dims[dim] = length;
    return part;
}

/* Step to the next index in a tensor's shape; false behind the last. */
static bool advance(const struct tensor *t, int64_t *index)
{
    for (int i = t->num_dims - 1; i >= 0; i--) {
        if (++index[i] < t->dims[i])
            return true;
        index[i] = 0;
    }
    return false;
}

static char *at(const struct tensor *t, const int64_t *index)
{
    int64_t offset = 0;
    for (int i = 0; i < t->num_dims; i++)
        offset += index[i] * t->strides[i];
    return t->data + offset * (int64_t)type_size(t->type);
}

static bool broadcast(const struct tensor *target, const struct tensor *source,
                      struct tensor *fitted)
{
    int more = target->num_dims - source->num_dims;
    *fitted = *target;
    fitted->type = source->type;
    fitted->data = source->data;
    for (int i = 0; i < target->num_dims; i++) {
        bool is_new = i < more || source->dims[i - more] == 1;
        if (!is_new && source->dims[i - more] != target->dims[i])
            return false;
        fitted->strides[i] = is_new ? 0 : source->strides[i - more];
    }
    return more >= 0;
}

/* How many elements at the end of the shape lie one behind the other in both tensors. */
static int64_t common_run(const struct tensor *a, const struct tensor *b, int *first_dim)
{
    int64_t run = 1;
    int dim = a->num_dims;
    while (dim > 0 &&
           (a->dims[dim - 1] == 1 || (a->strides[dim - 1] == run && b->strides[dim - 1] == run)))
        run *= a->dims[--dim];
    *first_dim = dim;
    return run;
}

aclError copy_tensor(const struct tensor *target, const struct tensor *source)
{
    struct tensor from, outer = *target;
    int64_t index[MAX_DIMS] = {0};
    if (!num_elements(target))
        return ACL_SUCCESS;
    if (!broadcast(target, source, &from))
        return fake_error(RT_PARAM_INVALID, "copy: the shapes do not fit");
    bool is_same = target->type == source->type;
    int64_t run = is_same ? common_run(target, &from, &outer.num_dims) : 1;
    do {
        if (is_same)
            memmove(at(target, index), at(&from, index), (size_t)run * type_size(target->type));
        else
            write_number(at(target, index), target->type, read_number(at(&from, index), from.type));
    } while (advance(&outer, index));
    return ACL_SUCCESS;
}

void fill_tensor(const struct tensor *target, long double value)
{
    int64_t index[MAX_DIMS] = {0};
    if (num_elements(target))
        do
            write_number(at(target, index), target->type, value);
        while (advance(target, index));
}

EXPORT void *aclCreateTensor(const int64_t *dims, uint64_t num_dims, int type,
                             const int64_t *strides, int64_t offset, int format,
                             const int64_t *storage_dims, uint64_t num_storage_dims, void *data)
{
    (void)format, (void)storage_dims, (void)num_storage_dims;
    if (num_dims > MAX_DIMS || !type_size(type))
        fake_give_up("libopapi: a tensor of %lu dimensions and aclDataType %d",
                     (unsigned long)num_dims, type);
    struct tensor *t = calloc(1, sizeof *t);
    t->type = type;
    t->num_dims = (int)num_dims;
    for (uint64_t i = 0; i < num_dims; i++) {
        t->dims[i] = dims[i];
        t->strides[i] = strides[i];
    }
    t->data = data ? (char *)data + offset * (int64_t)type_size(type) : NULL;
    return t;
}

EXPORT aclError aclDestroyTensor(void *tensor)
{
    free(tensor);
    return ACL_SUCCESS;
}

EXPORT void *aclCreateScalar(const void *value, int type)
{
    struct scalar *s = malloc(sizeof *s);
    s->value = read_number(value, type);
    return s;
}

EXPORT aclError aclDestroyScalar(void *scalar)
{
    free(scalar);
    return ACL_SUCCESS;
}

EXPORT void *aclCreateTensorList(struct tensor *const *tensors, uint64_t count)
{
    struct tensor_list *list = malloc(sizeof *list);
    list->count = count;
    list->tensors = malloc((count ? count : 1) * sizeof *list->tensors);
    for (uint64_t i = 0; i < count; i++)
        list->tensors[i] = tensors[i];
    return list;
}

EXPORT aclError aclDestroyTensorList(struct tensor_list *list)
{
    for (uint64_t i = 0; i < list->count; i++)
        free(list->tensors[i]);
    free(list->tensors);
    free(list);
    return ACL_SUCCESS;
}

struct int_array {
    uint64_t count;
    int64_t values[];
};

EXPORT void *aclCreateIntArray(const int64_t *values, uint64_t count)
{
    struct int_array *array = malloc(sizeof *array + count * sizeof *values);
    array->count = count;
    memcpy(array->values, values, count * sizeof *values);
    return array;
}

EXPORT aclError aclDestroyIntArray(void *array)
{
    free(array);
    return ACL_SUCCESS;
}
