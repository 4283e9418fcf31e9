/* A driver that launches nothing: it writes what it is told to the file that FAKE_DRIVER_LOG names. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static __thread void* current = 0;
static __thread void* below = 0;

static FILE* log_file(void) {
    static FILE* file = 0;
    if (!file) file = fopen(getenv("FAKE_DRIVER_LOG"), "a");
    return file;
}

int cuCtxGetCurrent(void** context) {
    *context = current;
    return 0;
}

int cuCtxPushCurrent_v2(void* context) {
    fprintf(log_file(), "push %ld\n", (long)context);
    below = current;
    current = context;
    return 0;
}

int cuCtxPopCurrent_v2(void** context) {
    fprintf(log_file(), "pop\n");
    fflush(log_file());
    *context = current;
    current = below;
    return 0;
}

int cuGetErrorString(int status, const char** text) {
    *text = "an illegal memory access was encountered";
    return status == 700 ? 0 : 1;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
    static __thread int now = 0;
    const int before = now;
    now = *mode;
    *mode = before;
    return 0;
}

/* the grid's first number is how many parameters there are: a driver knows it of the function */
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned one, unsigned also_one,
                   unsigned shared, void* stream, void** parameters, void** extra) {
    if ((long)function == 666) return 700;
    fprintf(log_file(), "launch %ld grid %u %u %u threads %u %u %u shared %u stream %ld extra %d:", (long)function, x, y,
            z, threads, one, also_one, shared, (long)stream, extra != 0);
    for (unsigned i = 0; i < x; ++i) {
        int64_t value;
        memcpy(&value, parameters[i], sizeof value);
        fprintf(log_file(), " %ld", (long)value);
    }
    fprintf(log_file(), "\n");
    fflush(log_file());
    return 0;
}
