/*
 * The rest of what torch_npu 2.13 links against or looks up. What has no meaning without a
 * device is accepted; what would compute something is refused with its name, never skipped.
 */
#define _GNU_SOURCE
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static aclError refuse(const char *what)
{
    return fake_error(RT_NOT_SUPPORTED, "%s is not provided by the double of CANN", what);
}

#define ACCEPTED(name)                                                                             \
    EXPORT aclError name(void)                                                                     \
    {                                                                                              \
        return ACL_SUCCESS;                                                                        \
    }
#define REFUSED(name)                                                                              \
    EXPORT aclError name(void)                                                                     \
    {                                                                                              \
        return refuse(#name);                                                                      \
    }

/* Settings without an effect here. */
ACCEPTED(aclSetCompileopt)
ACCEPTED(aclmdlInitDump)
ACCEPTED(aclmdlFinalizeDump)
ACCEPTED(aclmdlSetDump)
ACCEPTED(aclrtCtxSetSysParamOpt)
ACCEPTED(aclrtSetSysParamOpt)
ACCEPTED(aclrtSetOpExecuteTimeOut)
ACCEPTED(aclrtSetOpWaitTimeout)
ACCEPTED(aclrtSetDeviceSatMode)
ACCEPTED(aclrtDeviceEnablePeerAccess)
ACCEPTED(aclrtProcessReport)
ACCEPTED(aclrtSetStreamAttribute)

/* Kernels, models and memory sharing between processes. */
REFUSED(aclrtBinaryGetFunction)
REFUSED(aclrtBinaryLoadFromData)
REFUSED(aclrtGetFunctionAddr)
REFUSED(aclrtMemExportToShareableHandle)
REFUSED(aclrtMemImportFromShareableHandle)
REFUSED(aclrtMemSetPidToShareableHandle)
REFUSED(rtDevBinaryRegister)
REFUSED(rtFunctionRegister)
REFUSED(rtGetC2cCtrlAddr)
REFUSED(rtKernelLaunch)

/* The profiler. */
ACCEPTED(MsprofRegisterCallback)
ACCEPTED(MsprofReportAdditionalInfo)
ACCEPTED(MsprofReportApi)
ACCEPTED(MsprofReportCompactInfo)
EXPORT uint64_t MsprofGetHashId(const char *text, size_t length)
{
    (void)text, (void)length;
    return 0;
}
EXPORT uint64_t MsprofSysCycleTime(void)
{
    return 0;
}

EXPORT aclError aclrtGetSysParamOpt(int option, int64_t *value)
{
    (void)option;
    *value = 0;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtCtxGetSysParamOpt(int option, int64_t *value)
{
    return aclrtGetSysParamOpt(option, value);
}

EXPORT aclError aclrtGetDeviceSatMode(int *mode)
{
    *mode = 0;
    return ACL_SUCCESS;
}

EXPORT aclError aclGetDeviceCapability(uint32_t device, int which, int64_t *value)
{
    (void)device, (void)which;
    *value = 1;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer)
{
    (void)device, (void)peer;
    *can = 0;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtDeviceGetBareTgid(int32_t *pid)
{
    *pid = getpid();
    return ACL_SUCCESS;
}

EXPORT void aclAppLog(int level, const char *function, const char *file, uint32_t line,
                      const char *format, ...)
{
    (void)level, (void)function, (void)file, (void)line, (void)format;
}

/* Operators of the older kind, compiled by name: their descriptions exist, they do not run. */
struct described {
    int type, format;
    size_t num_dims;
    int64_t dims[8];
};

EXPORT void *aclCreateTensorDesc(int type, int num_dims, const int64_t *dims, int format)
{
    struct described *d = calloc(1, sizeof *d);
    *d = (struct described){type, format, (size_t)num_dims, {0}};
    for (int i = 0; i < num_dims && i < 8; i++)
        d->dims[i] = dims[i];
    return d;
}

EXPORT void aclDestroyTensorDesc(void *desc)
{
    free(desc);
}

EXPORT int aclGetTensorDescType(const struct described *d)
{
    return d->type;
}

EXPORT int aclGetTensorDescFormat(const struct described *d)
{
    return d->format;
}

EXPORT size_t aclGetTensorDescNumDims(const struct described *d)
{
    return d->num_dims;
}

EXPORT aclError aclGetTensorDescDimV2(const struct described *d, size_t index, int64_t *size)
{
    if (index >= d->num_dims)
        return RT_PARAM_INVALID;
    *size = d->dims[index];
    return ACL_SUCCESS;
}

ACCEPTED(aclSetTensorDescName)
ACCEPTED(aclSetTensorFormat)
ACCEPTED(aclSetTensorPlaceMent)
ACCEPTED(aclSetTensorShape)
ACCEPTED(aclopSetAttrBool)
ACCEPTED(aclopSetAttrDataType)
ACCEPTED(aclopSetAttrFloat)
ACCEPTED(aclopSetAttrInt)
ACCEPTED(aclopSetAttrListBool)
ACCEPTED(aclopSetAttrListFloat)
ACCEPTED(aclopSetAttrListInt)
ACCEPTED(aclopSetAttrListListInt)
ACCEPTED(aclopSetAttrString)

EXPORT void *aclCreateDataBuffer(void *data, size_t size)
{
    (void)data, (void)size;
    return malloc(1);
}

EXPORT aclError aclDestroyDataBuffer(void *buffer)
{
    free(buffer);
    return ACL_SUCCESS;
}

EXPORT void *aclopCreateAttr(void)
{
    return malloc(1);
}

EXPORT void aclopDestroyAttr(void *attributes)
{
    free(attributes);
}

/* torch_npu submits it late, and goes on in silence after an error: so this ends the process. */
EXPORT aclError aclopCompileAndExecute(const char *name)
{
    fake_give_up("the operator %s is not provided by the double of CANN", name);
}

/* FAKE_CANN_VERSION, for every package of CANN. */
struct version {
    char text[128], parts[4][64], reserved[128];
};

static const char *version_text(void)
{
    return fake_env_text("FAKE_CANN_VERSION", "9.1.0");
}

EXPORT aclError aclsysGetCANNVersion(int package, struct version *version)
{
    (void)package;
    memset(version, 0, sizeof *version);
    snprintf(version->text, sizeof version->text, "%s", version_text());
    sscanf(version_text(), "%63[^.].%63[^.].%63[^.].%63s", version->parts[0], version->parts[1],
           version->parts[2], version->parts[3]);
    return ACL_SUCCESS;
}

EXPORT aclError aclsysGetVersionStr(const char *package, char *text)
{
    (void)package;
    snprintf(text, 128, "%s", version_text());
    return ACL_SUCCESS;
}
