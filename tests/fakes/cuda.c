/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A CUDA driver that is not there: libcuda.so.1 with the functions for checkpointing, as in CUDA 13's cuda.h.
 * What they do is in cuda_engine.py, which is run for each call; only the interface is here. With -DOLD, it is
 * a driver before 570, which has none of these functions.
 *
 * PYTHON and ENGINE are the paths of both, CODES are the results with their names.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

typedef int CUresult;
typedef struct { unsigned char bytes[16]; } CUuuid;
typedef struct { CUuuid old_uuid, new_uuid; } CUcheckpointGpuPair;
typedef struct { unsigned int timeout_ms, reserved0; unsigned long long reserved1[7]; } CUcheckpointLockArgs;
typedef struct { unsigned long long reserved[8]; } CUcheckpointCheckpointArgs;
typedef struct { unsigned long long reserved[8]; } CUcheckpointUnlockArgs;
typedef struct {
    CUcheckpointGpuPair *gpu_pairs;
    unsigned int gpu_pairs_count;
    char reserved[52 - sizeof(CUcheckpointGpuPair *)];
    unsigned long long reserved1;
} CUcheckpointRestoreArgs;

_Static_assert(sizeof(CUcheckpointLockArgs) == 64, "");
_Static_assert(sizeof(CUcheckpointRestoreArgs) == 64, "");
_Static_assert(sizeof(CUcheckpointGpuPair) == 32, "");

enum { INVALID_VALUE = 1, UNKNOWN = 999 };

extern char **environ;
static int initialised;

/* As libcuda 555: cuda_engine.py's begin_restore_thread, in a process that calls cuInit. */
static int requests[2], answers[2];

static void *serve(void *nothing)
{
    char byte;

    (void)nothing;
    while (read(requests[0], &byte, 1) == 1)
        if (write(answers[1], &byte, 1) != 1)
            break;
    return NULL;
}

static void begin_restore_thread(void)
{
    char name[16];
    pthread_t thread;

    if (requests[1] || pipe2(requests, O_CLOEXEC) || pipe2(answers, O_CLOEXEC))
        return;
    snprintf(name, sizeof name, "cuda%011llx", ((unsigned long long)requests[1] << 22 | answers[0]) & 0xfffffffffffULL);
    if (!pthread_create(&thread, NULL, serve, NULL))
        pthread_setname_np(thread, name);
}

static const struct { CUresult code; const char *name, *text; } codes[] = { CODES };

static CUresult call(const char *step, int pid, const char *argument, int *value)
{
    char number[16];
    char *argv[] = {PYTHON, "-IS", ENGINE, "--driver", (char *)step, number, (char *)argument,
                    initialised ? "initialised" : "", NULL};
    posix_spawn_file_actions_t actions;
    int ends[2], result = UNKNOWN, status;
    char answer[64] = "";
    size_t length = 0;
    ssize_t got;
    pid_t child;

    snprintf(number, sizeof number, "%d", pid);
    if (pipe2(ends, O_CLOEXEC))
        return UNKNOWN;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
    if (posix_spawn(&child, PYTHON, &actions, NULL, argv, environ))
        abort();
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    while (length < sizeof answer - 1 && (got = read(ends[0], answer + length, sizeof answer - 1 - length)) != 0) {
        if (got < 0 && errno != EINTR)
            break;
        if (got > 0)
            length += got;
    }
    close(ends[0]);
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    if (sscanf(answer, "%d %d", &result, value) != 2)
        return UNKNOWN;
    return result;
}

static int zero(const void *memory, size_t size)
{
    const char *byte = memory;

    while (size--)
        if (*byte++)
            return 0;
    return 1;
}

CUresult cuInit(unsigned int flags)
{
    CUresult result;
    int ignored;

    if (flags)
        return INVALID_VALUE;
    begin_restore_thread();
    result = call("init", 0, "", &ignored);
    initialised = !result;
    return result;
}

CUresult cuDriverGetVersion(int *into)
{
    return call("version", 0, "", into);
}

CUresult cuGetErrorName(CUresult code, const char **into)
{
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        if (codes[i].code == code) {
            *into = codes[i].name;
            return 0;
        }
    *into = NULL;
    return INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult code, const char **into)
{
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        if (codes[i].code == code) {
            *into = codes[i].text;
            return 0;
        }
    *into = NULL;
    return INVALID_VALUE;
}

#ifndef OLD

CUresult cuCheckpointProcessGetState(int pid, unsigned int *state)
{
    int value;
    CUresult result = call("state", pid, "", &value);

    if (!result)
        *state = value;
    return result;
}

CUresult cuCheckpointProcessGetRestoreThreadId(int pid, int *tid)
{
    int value;
    CUresult result = call("restore-thread", pid, "", &value);

    if (!result)
        *tid = value;
    return result;
}

CUresult cuCheckpointProcessLock(int pid, CUcheckpointLockArgs *args)
{
    char timeout[16] = "0";
    int value;

    if (args) {
        if (args->reserved0 || !zero(args->reserved1, sizeof args->reserved1))
            return INVALID_VALUE;
        snprintf(timeout, sizeof timeout, "%u", args->timeout_ms);
    }
    return call("lock", pid, timeout, &value);
}

CUresult cuCheckpointProcessCheckpoint(int pid, CUcheckpointCheckpointArgs *args)
{
    int value;

    if (args && !zero(args, sizeof *args))
        return INVALID_VALUE;
    return call("checkpoint", pid, "", &value);
}

static char *print_uuid(char *into, const CUuuid *uuid)
{
    const unsigned char *b = uuid->bytes;

    return into + sprintf(into, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0],
                          b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14],
                          b[15]);
}

CUresult cuCheckpointProcessRestore(int pid, CUcheckpointRestoreArgs *args)
{
    char map[64 * 84] = "", *end = map;
    int value;

    if (args) {
        if (!zero(args->reserved, sizeof args->reserved) || args->reserved1 || args->gpu_pairs_count > 64 ||
            !args->gpu_pairs != !args->gpu_pairs_count)
            return INVALID_VALUE;
        for (unsigned int i = 0; i < args->gpu_pairs_count; i++) {
            if (i)
                *end++ = ',';
            end = print_uuid(end, &args->gpu_pairs[i].old_uuid);
            *end++ = '=';
            end = print_uuid(end, &args->gpu_pairs[i].new_uuid);
        }
    }
    return call("restore", pid, map, &value);
}

CUresult cuCheckpointProcessUnlock(int pid, CUcheckpointUnlockArgs *args)
{
    int value;

    if (args && !zero(args, sizeof *args))
        return INVALID_VALUE;
    return call("unlock", pid, "", &value);
}

#endif
