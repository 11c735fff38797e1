/* Devices and contexts. A context is nothing but its device here. */
#include "internal.h"

#include <stdlib.h>

static _Thread_local int current = -1;

/* ASCEND_RT_VISIBLE_DEVICES picks from FAKE_CANN_DEVICES devices, up to the first bad number. */
static int visible(int *physical)
{
    int total = (int)fake_env_number("FAKE_CANN_DEVICES", 8), count = 0;
    const char *list = getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (total > MAX_DEVICES)
        total = MAX_DEVICES;
    if (!list) {
        for (; count < total; count++)
            physical[count] = count;
        return count;
    }
    while (*list && count < total) {
        char *end;
        long number = strtol(list, &end, 10);
        if (end == list || number < 0 || number >= total)
            break;
        physical[count++] = (int)number;
        list = *end == ',' ? end + 1 : end;
    }
    return count;
}

int fake_device_count(void)
{
    int physical[MAX_DEVICES];
    return visible(physical);
}

int fake_physical_device(int device)
{
    int physical[MAX_DEVICES];
    return device >= 0 && device < visible(physical) ? physical[device] : -1;
}

int fake_current_device(void)
{
    return current;
}

EXPORT aclError aclInit(const char *path)
{
    (void)path;
    return fake_failure("aclInit");
}

EXPORT aclError aclFinalize(void)
{
    return ACL_SUCCESS;
}

EXPORT aclError aclrtGetDeviceCount(uint32_t *count)
{
    *count = (uint32_t)fake_device_count();
    return fake_failure("aclrtGetDeviceCount");
}

EXPORT aclError aclrtSetDevice(int32_t device)
{
    int forced = fake_failure("aclrtSetDevice");
    if (forced)
        return fake_error(forced, "aclrtSetDevice: failure asked for by FAKE_CANN_FAIL");
    if (device < 0 || device >= fake_device_count())
        return fake_error(RT_INVALID_DEVICE, "aclrtSetDevice: no device %d; %d are visible", device,
                          fake_device_count());
    current = device;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtResetDevice(int32_t device)
{
    return device >= 0 && device < fake_device_count() ? ACL_SUCCESS : RT_INVALID_DEVICE;
}

EXPORT aclError aclrtResetDeviceForce(int32_t device)
{
    return aclrtResetDevice(device);
}

EXPORT aclError aclrtGetDevice(int32_t *device)
{
    if (current < 0)
        return RT_CONTEXT_NULL;
    *device = current;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtGetCurrentContext(void **context)
{
    if (current < 0)
        return RT_CONTEXT_NULL;
    *context = (void *)(intptr_t)(current + 1);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtSetCurrentContext(void *context)
{
    if (!context)
        return RT_CONTEXT_NULL;
    current = (int)(intptr_t)context - 1;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active)
{
    if (flags)
        *flags = 0;
    *active = device == current;
    return ACL_SUCCESS;
}

EXPORT const char *aclrtGetSocName(void)
{
    return fake_env_text("FAKE_CANN_SOC", "Ascend910B3");
}
