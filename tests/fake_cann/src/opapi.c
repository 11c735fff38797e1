/*
 * Operators, in the two steps of the aclnn interface: ...GetWorkspaceSize() describes the work,
 * the second call puts it on a stream. Only what moves KV blocks is here; torch_npu reports any
 * other operator as missing, by its name.
 */
#include "tensors.h"

#include <stdbool.h>

#include <stdlib.h>
#include <string.h>

#define RT_AICORE_EXCEPTION 507015

struct executor {
    aclError (*run)(const struct executor *);
    struct tensor target, source, index;
    long double value, step;
    int64_t dim;
    uint64_t num_parts;
    struct tensor *parts;
};

static aclError run_executor(void *argument)
{
    const struct executor *e = argument;
    return e->run(e);
}

static void drop_executor(void *argument)
{
    free(((struct executor *)argument)->parts);
    free(argument);
}

static aclError describe(struct executor content, uint64_t *workspace, void **executor)
{
    struct executor *e = malloc(sizeof *e);
    *e = content;
    if (e->dim < 0)
        e->dim += e->target.num_dims;
    *workspace = 0;
    *executor = e;
    return ACL_SUCCESS;
}

/* The second step, equal for all. */
#define OPERATOR(name)                                                                           \
    EXPORT aclError name(void *workspace, uint64_t size, void *executor, void *stream)           \
    {                                                                                            \
        int forced = fake_failure(#name);                                                        \
        (void)workspace, (void)size;                                                             \
        if (forced)                                                                              \
            return fake_error(forced, #name ": failure asked for by FAKE_CANN_FAIL");            \
        return fake_enqueue(stream, run_executor, executor, drop_executor);                      \
    }

static aclError run_copy(const struct executor *e)
{
    return copy_tensor(&e->target, &e->source);
}

EXPORT aclError aclnnInplaceCopyGetWorkspaceSize(struct tensor *target, const struct tensor *source,
                                                 uint64_t *workspace, void **executor)
{
    return describe((struct executor){.run = run_copy, .target = *target, .source = *source},
                    workspace, executor);
}
OPERATOR(aclnnInplaceCopy)

EXPORT aclError aclnnCastGetWorkspaceSize(const struct tensor *source, int type, struct tensor *target,
                                          uint64_t *workspace, void **executor)
{
    (void)type; /* that of the target */
    return aclnnInplaceCopyGetWorkspaceSize(target, source, workspace, executor);
}
OPERATOR(aclnnCast)

static aclError run_fill(const struct executor *e)
{
    fill_tensor(&e->target, e->value);
    return ACL_SUCCESS;
}

EXPORT aclError aclnnInplaceFillScalarGetWorkspaceSize(struct tensor *target, const struct scalar *value,
                                                       uint64_t *workspace, void **executor)
{
    return describe((struct executor){.run = run_fill, .target = *target, .value = value->value},
                    workspace, executor);
}
OPERATOR(aclnnInplaceFillScalar)

EXPORT aclError aclnnInplaceZeroGetWorkspaceSize(struct tensor *target, uint64_t *workspace, void **executor)
{
    return describe((struct executor){.run = run_fill, .target = *target}, workspace, executor);
}
OPERATOR(aclnnInplaceZero)

EXPORT aclError aclnnInplaceOneGetWorkspaceSize(struct tensor *target, uint64_t *workspace, void **executor)
{
    return describe((struct executor){.run = run_fill, .target = *target, .value = 1}, workspace, executor);
}
OPERATOR(aclnnInplaceOne)

/* Reads the index when it runs, as a device does. */
static aclError index_at(const struct executor *e, int64_t i, int64_t size, int64_t *index)
{
    int64_t stride = e->index.num_dims ? e->index.strides[0] : 0;
    const char *at = e->index.data + i * stride * (int64_t)type_size(e->index.type);
    *index = (int64_t)read_number(at, e->index.type);
    if (*index >= 0 && *index < size)
        return ACL_SUCCESS;
    return fake_error(RT_AICORE_EXCEPTION, "index %ld is not in a dimension of %ld", (long)*index, (long)size);
}

static aclError run_index_select(const struct executor *e)
{
    int64_t count = num_elements(&e->index), index;
    int dim = (int)e->dim;
    aclError error = ACL_SUCCESS;
    for (int64_t i = 0; i < count && !error; i++) {
        if ((error = index_at(e, i, e->source.dims[dim], &index)))
            break;
        struct tensor to = narrow(&e->target, dim, i, 1), from = narrow(&e->source, dim, index, 1);
        error = copy_tensor(&to, &from);
    }
    return error;
}

EXPORT aclError aclnnIndexSelectGetWorkspaceSize(const struct tensor *source, int64_t dim,
                                                 const struct tensor *index, struct tensor *target,
                                                 uint64_t *workspace, void **executor)
{
    return describe((struct executor){.run = run_index_select, .target = *target, .source = *source,
                                      .index = *index, .dim = dim}, workspace, executor);
}
OPERATOR(aclnnIndexSelect)

static aclError run_index_copy(const struct executor *e)
{
    int64_t count = num_elements(&e->index), index;
    int dim = (int)e->dim;
    aclError error = ACL_SUCCESS;
    for (int64_t i = 0; i < count && !error; i++) {
        if ((error = index_at(e, i, e->target.dims[dim], &index)))
            break;
        struct tensor to = narrow(&e->target, dim, index, 1), from = narrow(&e->source, dim, i, 1);
        error = copy_tensor(&to, &from);
    }
    return error;
}

EXPORT aclError aclnnInplaceIndexCopyGetWorkspaceSize(struct tensor *target, int64_t dim,
                                                      const struct tensor *index,
                                                      const struct tensor *source,
                                                      uint64_t *workspace, void **executor)
{
    return describe((struct executor){.run = run_index_copy, .target = *target, .source = *source,
                                      .index = *index, .dim = dim}, workspace, executor);
}
OPERATOR(aclnnInplaceIndexCopy)

/* Rows by one index, which is all that is needed; anything else is refused by name. */
EXPORT aclError aclnnIndexPutImplGetWorkspaceSize(struct tensor *target, const struct tensor_list *indices,
                                                  const struct tensor *source, bool accumulate,
                                                  bool unsafe, uint64_t *workspace, void **executor)
{
    (void)unsafe;
    if (indices->count != 1 || indices->tensors[0]->num_dims != 1 || accumulate)
        fake_rule_broken("libopapi: index_put_ by anything but one list of rows is not provided");
    return describe((struct executor){.run = run_index_copy, .target = *target, .source = *source,
                                      .index = *indices->tensors[0], .dim = 0}, workspace, executor);
}
OPERATOR(aclnnIndexPutImpl)

static aclError run_cat(const struct executor *e)
{
    int64_t at = 0;
    aclError error = ACL_SUCCESS;
    for (uint64_t i = 0; i < e->num_parts && !error; i++) {
        int64_t length = e->parts[i].dims[e->dim];
        struct tensor to = narrow(&e->target, (int)e->dim, at, length);
        error = copy_tensor(&to, &e->parts[i]);
        at += length;
    }
    return error;
}

EXPORT aclError aclnnCatGetWorkspaceSize(const struct tensor_list *list, int64_t dim, struct tensor *target,
                                         uint64_t *workspace, void **executor)
{
    struct tensor *parts = malloc((list->count ? list->count : 1) * sizeof *parts);
    for (uint64_t i = 0; i < list->count; i++)
        parts[i] = *list->tensors[i];
    return describe((struct executor){.run = run_cat, .target = *target, .dim = dim,
                                      .num_parts = list->count, .parts = parts}, workspace, executor);
}
OPERATOR(aclnnCat)

static aclError run_stack(const struct executor *e)
{
    aclError error = ACL_SUCCESS;
    for (uint64_t i = 0; i < e->num_parts && !error; i++) {
        struct tensor to = narrow(&e->target, (int)e->dim, (int64_t)i, 1), part = e->parts[i];
        for (int dim = part.num_dims++; dim > e->dim; dim--) {
            part.dims[dim] = part.dims[dim - 1];
            part.strides[dim] = part.strides[dim - 1];
        }
        part.dims[e->dim] = 1;
        error = copy_tensor(&to, &part);
    }
    return error;
}

EXPORT aclError aclnnStackGetWorkspaceSize(const struct tensor_list *list, int64_t dim, struct tensor *target,
                                           uint64_t *workspace, void **executor)
{
    aclError error = aclnnCatGetWorkspaceSize(list, dim, target, workspace, executor);
    ((struct executor *)*executor)->run = run_stack;
    return error;
}
OPERATOR(aclnnStack)

static aclError run_arange(const struct executor *e)
{
    for (int64_t i = 0; i < num_elements(&e->target); i++) {
        struct tensor one = narrow(&e->target, 0, i, 1);
        fill_tensor(&one, e->value + (long double)i * e->step);
    }
    return ACL_SUCCESS;
}

EXPORT aclError aclnnArangeGetWorkspaceSize(const struct scalar *start, const struct scalar *end,
                                            const struct scalar *step, struct tensor *target,
                                            uint64_t *workspace, void **executor)
{
    (void)end; /* the target has the length that follows from it */
    return describe((struct executor){.run = run_arange, .target = *target, .value = start->value,
                                      .step = step->value}, workspace, executor);
}
OPERATOR(aclnnArange)
