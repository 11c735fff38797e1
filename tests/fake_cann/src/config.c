/* HcclCommConfig: which of its fields count depends on size and version (notes section 2). */
#include "hccl.h"

#include <stdio.h>
#include <string.h>

#define NOT_SET 0xffffffffu
#define MAGIC 0xf0f0f0f0u

/* Offsets are those of the table in the notes; gaps are fields that change nothing here. */
struct config {
    uint64_t size;
    uint32_t magic, version;
    uint64_t reserved;
    uint32_t buffer_mb, deterministic;
    char name[128];
    char udi[128];
    uint32_t expansion_mode, traffic_class, service_level, world_rank;
    uint64_t job;
    uint8_t zero_copy;
    int32_t exec_timeout_s;
    char unused[2240 - 320];
};
_Static_assert(sizeof(struct config) == 2240, "version 10");
_Static_assert(offsetof(struct config, expansion_mode) == 288, "expansion mode");
_Static_assert(offsetof(struct config, exec_timeout_s) == 316, "execution timeout");

static void set_defaults(struct settings *s)
{
    memset(s, 0, sizeof *s);
    s->buffer_mb = (uint32_t)fake_env_number("HCCL_BUFFSIZE", 200);
    s->exec_timeout_s = (int32_t)fake_env_number("HCCL_EXEC_TIMEOUT", 1836);
}

HcclResult read_settings(const void *given, struct settings *s)
{
    struct config c = {.size = 0};
    uint64_t size;
    set_defaults(s);
    if (!given)
        return HCCL_SUCCESS;
    memcpy(&size, given, sizeof size);
    memcpy(&c, given, size < sizeof c ? size : sizeof c);
    if (size < 24 || c.magic != MAGIC)
        return fake_error(HCCL_E_PARA, "HcclCommConfig: size %lu, magic 0x%x instead of 0x%x",
                          (unsigned long)size, c.magic, MAGIC);
    if (c.version >= 1) {
        s->buffer_mb = c.buffer_mb == NOT_SET ? s->buffer_mb : c.buffer_mb;
        s->deterministic = c.deterministic == NOT_SET ? 0 : c.deterministic;
    }
    if (c.version >= 2)
        snprintf(s->name, sizeof s->name, "%.127s", c.name);
    if (c.version >= 4)
        s->expansion_mode = c.expansion_mode == NOT_SET ? 0 : c.expansion_mode;
    if (c.version >= 8 && c.exec_timeout_s != -1)
        s->exec_timeout_s = c.exec_timeout_s;
    if (!s->buffer_mb || s->exec_timeout_s < 0 || s->deterministic > 2)
        return fake_error(HCCL_E_PARA,
                          "HcclCommConfig: buffer %u MB, deterministic %u, timeout %d s",
                          s->buffer_mb, s->deterministic, s->exec_timeout_s);
    return HCCL_SUCCESS;
}

/* 0 means never. */
double exec_timeout(const struct settings *s)
{
    return s->exec_timeout_s ? fake_scaled(s->exec_timeout_s) : 1e8;
}

/* What HcclCommConfig can say; an older library knows less of it. */
EXPORT uint32_t HcclGetCommConfigCapability(void)
{
    return (uint32_t)fake_env_number("FAKE_HCCL_CAPABILITY", 12);
}
