/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An NVML of nodes that are not here: libnvidia-ml.so.1 with the functions that pynvml looks up.
 *
 * The file that FAKE_NVML names describes the node; it is read anew at every first nvmlInit. A line is a word
 * and its value:
 *
 *     init 18                        nvmlInit fails with this code
 *     driver 580.65.06
 *     cuda 13000
 *     context 1610612736             bytes of each process with CUDA that no program has asked for
 *     gpu                            the lines below are of this GPU, up to the next
 *     name NVIDIA H200
 *     uuid GPU-...
 *     capability 9 0
 *     memory 150754820096
 *     mig 0
 *     ecc 1
 *     persistence 1
 *     used 1024                      bytes that others hold; who holds CUDA is counted, too
 *     compute 4242 4243              host PIDs; also `graphics` and `mps`
 *     nvlink 1 2 3                   GPUs, by number
 *     near 2 20                      the level of their common ancestor (nvmlGpuTopologyLevel_t); else 50
 *     fail nvmlDeviceGetMigMode 3    that function fails with this code, of this GPU; of every one if it
 *                                    stands above the first
 *
 * With FAKE_CUDA set, who holds the CUDA of cuda_engine.py on a GPU computes on it, too, and has there what its
 * state says, in equal parts on its GPUs; not while that is checkpointed.
 *
 * As with the real one, nothing can be asked before nvmlInit and after the last nvmlShutdown, text and lists
 * that are longer than the caller's buffer are refused, and /dev/nvidiactl is open between the two, or /dev where there
 * is none.
 */

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9 };
enum { GPUS = 64, PIDS = 256, FAILURES = 32, TEXT = 256 };
enum { LEVEL_SYSTEM = 50, P2P_NVLINK = 2, P2P_OK = 0, P2P_NOT_SUPPORTED = 5 };

struct failures {
    int count;
    struct { char function[TEXT]; int code; } of[FAILURES];
};

struct pids {
    unsigned count;
    unsigned pid[PIDS];
};

struct gpu {
    char name[TEXT], uuid[TEXT];
    int major, minor;
    unsigned mig, ecc, persistence;
    unsigned long long memory, used;
    struct pids compute, graphics, mps, nvlink;
    int level[GPUS];
    struct failures failures;
};

struct memory { unsigned long long total, free, used; };
struct process { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; };

static struct {
    char driver[TEXT];
    int cuda, init, gpus;
    long long context;
    struct gpu gpu[GPUS];
    struct failures failures;
} node;

static int users;
static int devices = -1;

static void read_numbers(const char *text, struct pids *into)
{
    char *end;

    for (into->count = 0; into->count < PIDS; text = end) {
        unsigned long value = strtoul(text, &end, 10);
        if (end == text)
            return;
        into->pid[into->count++] = value;
    }
}

static void read_line(const char *word, const char *value)
{
    struct gpu *gpu = node.gpus ? &node.gpu[node.gpus - 1] : NULL;
    int other, level;

    if (!strcmp(word, "gpu")) {
        if (node.gpus == GPUS)
            abort();
        gpu = &node.gpu[node.gpus++];
        gpu->persistence = 1;
        for (other = 0; other < GPUS; other++)
            gpu->level[other] = LEVEL_SYSTEM;
    } else if (!strcmp(word, "fail")) {
        struct failures *failures = gpu ? &gpu->failures : &node.failures;
        if (failures->count == FAILURES ||
            sscanf(value, "%255s %d", failures->of[failures->count].function,
                   &failures->of[failures->count].code) != 2)
            abort();
        failures->count++;
    } else if (!strcmp(word, "init")) {
        node.init = atoi(value);
    } else if (!strcmp(word, "driver")) {
        strcpy(node.driver, value);
    } else if (!strcmp(word, "cuda")) {
        node.cuda = atoi(value);
    } else if (!strcmp(word, "context")) {
        node.context = strtoll(value, NULL, 10);
    } else if (!gpu) {
        abort();
    } else if (!strcmp(word, "name")) {
        strcpy(gpu->name, value);
    } else if (!strcmp(word, "uuid")) {
        strcpy(gpu->uuid, value);
    } else if (!strcmp(word, "capability")) {
        if (sscanf(value, "%d %d", &gpu->major, &gpu->minor) != 2)
            abort();
    } else if (!strcmp(word, "persistence")) {
        gpu->persistence = atoi(value);
    } else if (!strcmp(word, "used")) {
        gpu->used = strtoull(value, NULL, 10);
    } else if (!strcmp(word, "memory")) {
        gpu->memory = strtoull(value, NULL, 10);
    } else if (!strcmp(word, "mig")) {
        gpu->mig = strtoul(value, NULL, 10);
    } else if (!strcmp(word, "ecc")) {
        gpu->ecc = strtoul(value, NULL, 10);
    } else if (!strcmp(word, "compute")) {
        read_numbers(value, &gpu->compute);
    } else if (!strcmp(word, "graphics")) {
        read_numbers(value, &gpu->graphics);
    } else if (!strcmp(word, "mps")) {
        read_numbers(value, &gpu->mps);
    } else if (!strcmp(word, "nvlink")) {
        read_numbers(value, &gpu->nvlink);
    } else if (!strcmp(word, "near") && sscanf(value, "%d %d", &other, &level) == 2 && other >= 0 &&
               other < GPUS) {
        gpu->level[other] = level;
    } else {
        abort();
    }
}

static int read_node(void)
{
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[4096];

    if (!file)
        return DRIVER_NOT_LOADED;
    memset(&node, 0, sizeof node);
    while (fgets(line, sizeof line, file)) {
        char *value = line + strcspn(line, " \n");
        line[strcspn(line, "\n")] = 0;
        if (*value)
            *value++ = 0;
        if (strlen(value) >= TEXT && strcmp(line, "compute"))
            abort();
        if (*line && *line != '#')
            read_line(line, value);
    }
    fclose(file);
    return node.init;
}

static int failure(const struct failures *failures, const char *function)
{
    for (int i = 0; i < failures->count; i++)
        if (!strcmp(failures->of[i].function, function))
            return failures->of[i].code;
    return SUCCESS;
}

static int of_node(const char *function)
{
    return users ? failure(&node.failures, function) : UNINITIALIZED;
}

static int of_gpu(const struct gpu *gpu, const char *function)
{
    int code = of_node(function);

    if (code)
        return code;
    if (gpu < node.gpu || gpu >= node.gpu + node.gpus)
        return INVALID_ARGUMENT;
    return failure(&gpu->failures, function);
}

static int give_text(const char *text, char *buffer, unsigned size)
{
    if (strlen(text) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(buffer, text);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags)
{
    int code;

    (void)flags;
    if (!users && (code = read_node()))
        return code;
    if (!users++ && (devices = open("/dev/nvidiactl", O_RDONLY | O_CLOEXEC)) < 0)
        devices = open("/dev", O_RDONLY | O_CLOEXEC);
    return SUCCESS;
}

int nvmlInit_v2(void)
{
    return nvmlInitWithFlags(0);
}

int nvmlShutdown(void)
{
    if (!users)
        return UNINITIALIZED;
    if (!--users)
        close(devices);
    return SUCCESS;
}

const char *nvmlErrorString(int code)
{
    switch (code) {
    case 0: return "Success";
    case 1: return "Uninitialized";
    case 2: return "Invalid Argument";
    case 3: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case 6: return "Not Found";
    case 7: return "Insufficient Size";
    case 9: return "Driver Not Loaded";
    case 10: return "Timeout";
    case 13: return "Function Not Found";
    case 15: return "GPU is lost";
    case 16: return "GPU requires reset";
    case 17: return "The operating system has blocked the request";
    case 18: return "Driver/library version mismatch";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *buffer, unsigned size)
{
    int code = of_node("nvmlSystemGetDriverVersion");

    return code ? code : give_text(node.driver, buffer, size);
}

int nvmlSystemGetCudaDriverVersion(int *version)
{
    int code = of_node("nvmlSystemGetCudaDriverVersion");

    if (!code)
        *version = node.cuda;
    return code;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    int code = of_node("nvmlSystemGetCudaDriverVersion_v2");

    if (!code)
        *version = node.cuda;
    return code;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    int code = of_node("nvmlDeviceGetCount_v2");

    if (!code)
        *count = node.gpus;
    return code;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct gpu **gpu)
{
    int code = of_node("nvmlDeviceGetHandleByIndex_v2");

    if (code)
        return code;
    if (index >= (unsigned)node.gpus)
        return INVALID_ARGUMENT;
    *gpu = &node.gpu[index];
    return of_gpu(*gpu, "nvmlDeviceGetHandleByIndex_v2");
}

int nvmlDeviceGetName(struct gpu *gpu, char *buffer, unsigned size)
{
    int code = of_gpu(gpu, "nvmlDeviceGetName");

    return code ? code : give_text(gpu->name, buffer, size);
}

int nvmlDeviceGetUUID(struct gpu *gpu, char *buffer, unsigned size)
{
    int code = of_gpu(gpu, "nvmlDeviceGetUUID");

    return code ? code : give_text(gpu->uuid, buffer, size);
}

int nvmlDeviceGetCudaComputeCapability(struct gpu *gpu, int *major, int *minor)
{
    int code = of_gpu(gpu, "nvmlDeviceGetCudaComputeCapability");

    if (!code) {
        *major = gpu->major;
        *minor = gpu->minor;
    }
    return code;
}

static unsigned add_holders(const char *uuid, struct process *into, unsigned room);

int nvmlDeviceGetMemoryInfo(struct gpu *gpu, struct memory *memory)
{
    int code = of_gpu(gpu, "nvmlDeviceGetMemoryInfo");
    struct process holders[PIDS];
    unsigned long long used = gpu->used;
    unsigned count;

    if (code)
        return code;
    for (count = add_holders(gpu->uuid, holders, PIDS); count-- > 0;)
        used += holders[count].memory;
    if (used > gpu->memory)
        used = gpu->memory;
    *memory = (struct memory){ gpu->memory, gpu->memory - used, used };
    return code;
}

static int give_mode(struct gpu *gpu, const char *function, unsigned mode, unsigned *current, unsigned *pending)
{
    int code = of_gpu(gpu, function);

    if (!code)
        *current = *pending = mode;
    return code;
}

int nvmlDeviceGetPersistenceMode(struct gpu *gpu, unsigned *mode)
{
    int code = of_gpu(gpu, "nvmlDeviceGetPersistenceMode");

    if (!code)
        *mode = gpu->persistence;
    return code;
}

int nvmlDeviceGetMigMode(struct gpu *gpu, unsigned *current, unsigned *pending)
{
    return give_mode(gpu, "nvmlDeviceGetMigMode", gpu->mig, current, pending);
}

int nvmlDeviceGetEccMode(struct gpu *gpu, unsigned *current, unsigned *pending)
{
    return give_mode(gpu, "nvmlDeviceGetEccMode", gpu->ecc, current, pending);
}

static int read_text(const char *path, char *into, size_t size)
{
    FILE *file = fopen(path, "r");
    size_t length;

    if (!file)
        return 0;
    length = fread(into, 1, size - 1, file);
    into[length] = 0;
    fclose(file);
    return length > 0;
}

/* What a process holds on a GPU by the CUDA of cuda_engine.py, or -1. */
static long long held(const char *pid, const char *uuid)
{
    char path[128], text[8192], *line, *bytes;
    unsigned inner = 0, gpus = 0;

    snprintf(path, sizeof path, "/proc/%.20s/status", pid);
    if (!read_text(path, text, sizeof text) || !(line = strstr(text, "NSpid:")))
        return -1;
    for (line += strlen("NSpid:"); *line != '\n' && *line;)
        inner = strtoul(line, &line, 10);
    snprintf(path, sizeof path, "/proc/%.20s/root/dev/shm/fake-cuda-%u", pid, inner);
    if (!read_text(path, text, sizeof text) || !strstr(text, uuid) || strstr(text, "\"checkpointed\"") ||
        !(bytes = strstr(text, "\"device_bytes\": ")))
        return -1;
    for (line = text; (line = strstr(line, "GPU-")); line++)
        gpus++;
    return strtoll(bytes + strlen("\"device_bytes\": "), NULL, 10) / gpus + node.context;
}

static unsigned add_holders(const char *uuid, struct process *into, unsigned room)
{
    DIR *proc = getenv("FAKE_CUDA") ? opendir("/proc") : NULL;
    struct dirent *entry;
    unsigned count = 0;

    while (proc && (entry = readdir(proc))) {
        long long bytes = *entry->d_name >= '1' && *entry->d_name <= '9' ? held(entry->d_name, uuid) : -1;
        if (bytes < 0)
            continue;
        if (count < room)
            into[count] = (struct process){ atoi(entry->d_name), bytes, -1, -1 };
        count++;
    }
    if (proc)
        closedir(proc);
    return count;
}

static int give_processes(struct gpu *gpu, const char *function, const struct pids *from, unsigned *count,
                          struct process *processes)
{
    int code = of_gpu(gpu, function);
    unsigned room = processes ? *count : 0;

    if (code)
        return code;
    *count = from->count;
    for (unsigned i = 0; i < from->count && i < room; i++)
        processes[i] = (struct process){ from->pid[i], 1 << 20, -1, -1 };
    if (from == &gpu->compute)
        *count += add_holders(gpu->uuid, room > *count ? processes + *count : NULL, room > *count ? room - *count : 0);
    return *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

#define RUNNING(function, kind)                                                            \
    int function(struct gpu *gpu, unsigned *count, struct process *processes)              \
    {                                                                                      \
        return give_processes(gpu, #function, &gpu->kind, count, processes);               \
    }

RUNNING(nvmlDeviceGetComputeRunningProcesses_v2, compute)
RUNNING(nvmlDeviceGetComputeRunningProcesses_v3, compute)
RUNNING(nvmlDeviceGetGraphicsRunningProcesses_v2, graphics)
RUNNING(nvmlDeviceGetGraphicsRunningProcesses_v3, graphics)
RUNNING(nvmlDeviceGetMPSComputeRunningProcesses_v2, mps)
RUNNING(nvmlDeviceGetMPSComputeRunningProcesses_v3, mps)

int nvmlDeviceGetP2PStatus(struct gpu *one, struct gpu *other, int capability, int *status)
{
    int code = of_gpu(one, "nvmlDeviceGetP2PStatus");

    if (!code)
        code = of_gpu(other, "nvmlDeviceGetP2PStatus");
    if (code)
        return code;
    *status = P2P_NOT_SUPPORTED;
    for (unsigned i = 0; capability == P2P_NVLINK && i < one->nvlink.count; i++)
        if (one->nvlink.pid[i] == other - node.gpu)
            *status = P2P_OK;
    return SUCCESS;
}

int nvmlDeviceGetTopologyCommonAncestor(struct gpu *one, struct gpu *other, int *level)
{
    int code = of_gpu(one, "nvmlDeviceGetTopologyCommonAncestor");

    if (!code)
        code = of_gpu(other, "nvmlDeviceGetTopologyCommonAncestor");
    if (!code)
        *level = one->level[other - node.gpu];
    return code;
}
