/* Counts the blocks that the C library's allocator has handed out, in each thread: preloaded by `planned_memory.py`.

   Staged are blocks of gloo's threads, and those that another thread takes while it starts a collective. */

#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>

#define SMALLEST 16384 /* bytes; smaller blocks are not counted */
#define MOST_STAGED 256

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

#define LOCAL static _Thread_local __attribute__((tls_model("initial-exec")))
LOCAL int is_quiet, is_starting; /* an operator, a collective */
LOCAL int is_gloo = -1;
static atomic_long held, peak;
static _Atomic(void *) staged[MOST_STAGED];

static void raise_peak(long now) {
    long most = atomic_load(&peak);
    while (now > most && !atomic_compare_exchange_weak(&peak, &most, now)) {
    }
}

static size_t counted(void *block) {
    size_t size = block ? malloc_usable_size(block) : 0;
    return size >= SMALLEST ? size : 0;
}

static int is_staging(void) {
    if (is_gloo < 0) {
        char name[16] = "";
        prctl(PR_GET_NAME, name);
        is_gloo = !strncmp(name, "pt_gloo", 7);
    }
    return is_starting || is_gloo;
}

static void replace_staged(void *from, void *to) {
    for (int place = 0; place < MOST_STAGED; place++) {
        void *expected = from;
        if (atomic_compare_exchange_strong(&staged[place], &expected, to))
            return;
    }
}

static void *take(void *block) {
    size_t size = counted(block);
    if (size) {
        if (is_staging())
            replace_staged(NULL, block);
        long now = atomic_fetch_add(&held, size) + size;
        if (!is_quiet)
            raise_peak(now);
    }
    return block;
}

void *malloc(size_t size) { return take(__libc_malloc(size)); }
void *calloc(size_t number, size_t size) { return take(__libc_calloc(number, size)); }
void *memalign(size_t alignment, size_t size) { return take(__libc_memalign(alignment, size)); }
void *aligned_alloc(size_t alignment, size_t size) { return take(__libc_memalign(alignment, size)); }

int posix_memalign(void **block, size_t alignment, size_t size) {
    void *found = take(__libc_memalign(alignment, size));
    if (!found && size)
        return ENOMEM;
    *block = found;
    return 0;
}

void *realloc(void *block, size_t size) {
    size_t before = counted(block);
    void *moved = __libc_realloc(block, size);
    if (before && (moved || !size)) {
        atomic_fetch_sub(&held, before);
        replace_staged(block, NULL);
    }
    return take(moved);
}

void free(void *block) {
    size_t size = counted(block);
    if (size) {
        atomic_fetch_sub(&held, size);
        replace_staged(block, NULL);
    }
    __libc_free(block);
}

/* What Python calls. */
long held_now(void) { return atomic_load(&held); }
long held_peak(void) { return atomic_load(&peak); }
void held_settle(void) { /* what is still staged stays, such as buffers of connections */
    for (int place = 0; place < MOST_STAGED; place++)
        atomic_store(&staged[place], NULL);
}
void held_begin(void) {
    atomic_store(&peak, atomic_load(&held));
    held_settle();
}
void held_enter(int collective) { /* an operator; blocks within it are in the peak if it is a collective */
    is_quiet = !collective;
    is_starting = collective;
}
void held_leave(void) {
    is_quiet = is_starting = 0;
    raise_peak(atomic_load(&held));
}
void held_keep(void *block) { replace_staged(block, NULL); } /* the result of a collective */
int held_staged(void) { /* whether anything is staged */
    for (int place = 0; place < MOST_STAGED; place++)
        if (atomic_load(&staged[place]))
            return 1;
    return 0;
}
