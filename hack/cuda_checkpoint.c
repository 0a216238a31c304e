/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Start NVIDIA's cuda-checkpoint, which is a part of libcuda (550 and newer): the program of that name only looks
 * it up in an export table and calls it. hack/get-libcuda-555 compiles this for tests.
 */

#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>

struct table {
    size_t bytes;
    void *functions[6];
    int (*cuda_checkpoint)(int argc, char **argv);
};

int main(int argc, char **argv)
{
    static const unsigned char id[16] = {0x69, 0xa2, 0x8e, 0x9f, 0x24, 0x49, 0x8b, 0x47,
                                         0xb0, 0x30, 0xc5, 0xda, 0x33, 0x0e, 0xa4, 0xe9};
    int (*get_table)(const struct table **, const void *) = NULL;
    const struct table *table = NULL;
    void *library = dlopen("libcuda.so.1", RTLD_NOW);

    if (library)
        *(void **)&get_table = dlsym(library, "cuGetExportTable");
    if (!get_table || get_table(&table, id) || table->bytes < sizeof *table) {
        fprintf(stderr, "cuda-checkpoint: %s\n", library ? "libcuda.so.1 is too old" : dlerror());
        return 1;
    }
    return table->cuda_checkpoint(argc, argv);
}
