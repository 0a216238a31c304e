// SPDX-License-Identifier: Apache-2.0
// A program that allocates, frees and checks what it has, with whatever allocator it is run.
//
//   allocate SEED [WRITABLE MAPPED]
//
// Halfway, with WRITABLE and MAPPED, two paths of one empty file, it makes itself what a restored process is:
// it writes its private memory to the one, and maps it from the other in its place. Then it goes on. Memory
// that should be zeros and is not, or a block that has not what was written to it, is told, and is status 1.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BLOCKS = 1500, STEPS = 8000, THREADS = 1000, AT_ONCE = 50, PAGE = 4096 };

static struct block {
  unsigned char *at;
  size_t size;
} blocks[BLOCKS];
static uint64_t state;

static uint64_t number_below(uint64_t *from, uint64_t limit) {
  *from ^= *from << 13;
  *from ^= *from >> 7;
  *from ^= *from << 17;
  return *from % limit;
}

static void fail(const char *what, size_t block, size_t at) {
  printf("%s: block %zu at %zu\n", what, block, at);
  fflush(stdout);
  _exit(1);
}

static unsigned char byte_of(size_t block, size_t at) { return (unsigned char)(block * 31 + at / 64 + 1) | 1; }

static void check(size_t block, size_t size) {
  for (size_t at = 0; at < size; at += 61)
    if (blocks[block].at[at] != byte_of(block, at)) fail("other bytes", block, at);
}

static void fill(size_t block, size_t from) {
  for (size_t at = from; at < blocks[block].size; at++) blocks[block].at[at] = byte_of(block, at);
}

static void check_zeros(const unsigned char *at, size_t size, size_t block) {
  for (size_t i = 0; i < size; i++)
    if (at[i]) fail("not zeros", block, i);
}

static size_t some_size(void) {
  size_t limits[] = {200, 4000, 40000, 300000, 3000000};
  return 1 + number_below(&state, limits[number_below(&state, 100) % (number_below(&state, 4) ? 3 : 5)]);
}

static void drop(size_t block) {
  check(block, blocks[block].size);
  free(blocks[block].at);
  blocks[block].at = NULL;
}

// Give free memory back to the kernel, in the allocator's own way.
static void purge(void) {
  void (*tcmalloc)(void) = (void (*)(void))dlsym(RTLD_DEFAULT, "MallocExtension_ReleaseFreeMemory");
  void (*mimalloc)(int) = (void (*)(int))dlsym(RTLD_DEFAULT, "mi_collect");
  int (*jemalloc)(const char *, void *, size_t *, void *, size_t) = dlsym(RTLD_DEFAULT, "mallctl");
  if (tcmalloc) tcmalloc();
  if (mimalloc) mimalloc(1);
  if (jemalloc) jemalloc("arena.4096.purge", NULL, NULL, NULL, 0);  // MALLCTL_ARENAS_ALL
  if (!tcmalloc && !mimalloc && !jemalloc) malloc_trim(0);
}

static void step(void) {
  size_t block = number_below(&state, BLOCKS);
  struct block *b = &blocks[block];
  size_t size = some_size();
  if (!b->at) {
    b->size = size;
    switch (number_below(&state, 3)) {
      case 0:
        b->at = malloc(size);
        break;
      case 1:
        b->at = calloc(1, size);
        check_zeros(b->at, size, block);
        break;
      default:
        if (posix_memalign((void **)&b->at, PAGE, size)) abort();
    }
    fill(block, 0);
  } else if (number_below(&state, 2)) {
    drop(block);
  } else {
    size_t kept = size < b->size ? size : b->size;
    check(block, b->size);
    b->at = realloc(b->at, size);
    b->size = size;
    check(block, kept);
    fill(block, kept);
  }
  if (number_below(&state, 200) == 0) purge();
}

// Grow some large blocks further than any file goes, touch their ends, and shrink them again.
static void grow_far(void) {
  size_t far = 256 << 20, left = 20;
  for (size_t block = 0; block < BLOCKS && left; block++) {
    struct block *b = &blocks[block];
    if (!b->at || b->size < 200000) continue;
    b->at = realloc(b->at, b->size + far);
    b->at[b->size + far - 1] = 1;
    check(block, b->size);
    b->at = realloc(b->at, b->size);
    check(block, b->size);
    left--;
  }
}

static void *churn(void *argument) {
  uint64_t own = (uint64_t)(uintptr_t)argument * 2654435761u + 1;
  for (int i = 0; i < 3; i++) {
    size_t size = 1 + number_below(&own, 200000);
    unsigned char *at = calloc(1, size);
    check_zeros(at, size, 100000 + i);
    memset(at, 0xa5, size);
    at = realloc(at, 2 * size);
    for (size_t k = 0; k < size; k++)
      if (at[k] != 0xa5) fail("other bytes in a thread", i, k);
    memset(at, 0x5a, 2 * size);
    free(at);
  }
  return NULL;
}

static void run_threads(int count) {
  for (int begun = 0; begun < count; begun += AT_ONCE) {
    pthread_t threads[AT_ONCE];
    for (int i = 0; i < AT_ONCE; i++)
      if (pthread_create(&threads[i], NULL, churn, (void *)(uintptr_t)(begun + i))) abort();
    for (int i = 0; i < AT_ONCE; i++) pthread_join(threads[i], NULL);
  }
}

// A child that shares the memory drops a part of it; so it is dropped here, too.
static void drop_in_vfork(unsigned char *at, size_t size) {
  pid_t child = vfork();
  if (child == 0) _exit(madvise(at, size, MADV_DONTNEED) ? 1 : 0);
  int status;
  waitpid(child, &status, 0);
  if (status) fail("madvise in a child of vfork", 0, 0);
  check_zeros(at, size, 200000);
}

// What CRIU and a memory file do to a process. Between the copy of a mapping and its replacement nothing may
// change in it, so all of this is on the stack, which stays as it is.
static int map_all(int writable, int mapped) {
  char text[1 << 18];
  size_t length = 0;
  ssize_t got;
  int maps = open("/proc/self/maps", O_RDONLY);
  while ((got = read(maps, text + length, sizeof text - 1 - length)) > 0) length += got;
  text[length] = 0;
  close(maps);
  off_t offset = 0;
  int count = 0;
  for (char *line = text; *line;) {
    unsigned long start, end, inode;
    int name_at = 0;
    char permissions[5];
    char *next = strchr(line, '\n');
    *next = 0;
    sscanf(line, "%lx-%lx %4s %*x %*s %lu %n", &start, &end, permissions, &inode, &name_at);
    const char *name = line + name_at;
    line = next + 1;
    if (inode || permissions[1] != 'w' || (*name && strcmp(name, "[heap]"))) continue;
    for (unsigned long at = start; at < end; at += PAGE)
      for (int i = 0; i < PAGE; i += 8)
        if (*(uint64_t *)(at + i)) {
          if (pwrite(writable, (void *)at, PAGE, offset + at - start) != PAGE) abort();
          break;
        }
    if (ftruncate(writable, offset + end - start)) abort();
    void *want = (void *)start;
    if (mmap(want, end - start, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, mapped, offset) != want) abort();
    offset += end - start;
    count++;
  }
  return count;
}

int main(int count, char **words) {
  state = strtoull(words[1], NULL, 10) * 2 + 1;
  for (int i = 0; i < STEPS / 2; i++) step();
  run_threads(AT_ONCE);
  size_t size = 64 * PAGE;
  unsigned char *own = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memset(own, 7, size);
  if (count > 3) {
    int writable = open(words[2], O_WRONLY), mapped = open(words[3], O_RDONLY);
    if (writable < 0 || mapped < 0) abort();
    int areas = map_all(writable, mapped);
    fprintf(stderr, "%d areas are mapped\n", areas);
  }
  grow_far();
  for (int i = 0; i < STEPS / 2; i++) step();
  run_threads(THREADS);
  for (int i = 0; i < STEPS / 10; i++) step();
  drop_in_vfork(own + PAGE, 8 * PAGE);
  uint64_t sum = 0;
  for (size_t block = 0; block < BLOCKS; block++)
    if (blocks[block].at) {
      check(block, blocks[block].size);
      sum = sum * 31 + blocks[block].size;
    }
  for (size_t i = 0; i < size; i += PAGE) sum = sum * 31 + own[i];
  printf("%016lx\n", (unsigned long)sum);
  return 0;
}
