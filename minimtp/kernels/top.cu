// top: of each row of logits the TOP largest, with their ids, and the logsumexp, so that the rows need not be moved.
// Twins: golden.top_entries, layers.softcap; with TOP = 1, np.argmax.
//
// Largest first, of equal ones the lowest id; cap > 0: of the logits squashed by layers.softcap, and 0 for none. What
// is no logit (NaN, infinity) counts as infinity: it comes first, and the logsumexp is infinity, too. A row of which no
// token is left has -infinity. So Sampling accepts just the rows with a finite logsumexp.
//
// A logit and its id are one 64-bit entry, whose order as an integer is the order above. top_parts: a block takes SLICE
// logits, SLICE / THREADS a thread, sorts them in runs of TOP (bitonic), and folds: the upper half of the runs on the
// lower, entry TOP - 1 - i on entry i, where the larger stays, and each run is sorted again. What is left is one run.
// The exponentials are taken relative to its first, from the registers: logits are read once. top_merge folds the runs
// of a row's parts in the same way. For TOP = 1 this is the tree of a maximum. Of fewer than TOP logits, id -1 is none.
//
// Grid: top_parts (V / SLICE rounded up, T); top_merge T. Block: THREADS, whole warps. Dynamic shared memory: 8 * SLICE
// bytes. Entries are 8 bytes aligned. The parts of a row times TOP are at most SLICE. Compiled with SLICE, a power of
// two (4096: up to 262,144 logits), THREADS, which divides it (512), and TOP, a power of two up to 64.

typedef unsigned long long Entry;  // 0 is none, and less than any

constexpr int EACH = SLICE / THREADS;

__device__ inline Entry entry(float x, unsigned id) {
    if (!(x < INFINITY)) x = INFINITY;  // NaN, too
    unsigned bits = __float_as_uint(x == 0.0f ? 0.0f : x);  // -0 is not less than 0
    return Entry(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | ~id;
}

__device__ inline float logit(Entry entry) {
    unsigned bits = entry >> 32;
    return entry == 0 ? -INFINITY : __uint_as_float(bits >> 31 ? bits & 0x7FFFFFFFu : ~bits);
}

// One step of a bitonic sort on the first `count` entries: each is compared with the one `distance` from it. The larger
// goes first, but last in every second stretch of `size` entries (0: in none).
__device__ inline void compare(Entry* entries, int count, int distance, int size) {
    for (int i = threadIdx.x; i < count / 2; i += THREADS) {
        int low = 2 * i - (i & (distance - 1)), high = low + distance;
        Entry a = entries[low], b = entries[high];
        if ((a < b) == ((low & size) == 0)) entries[low] = b, entries[high] = a;
    }
    __syncthreads();
}

__device__ inline void sort_runs(Entry* entries, int count) {
    for (int size = 2; size <= TOP; size *= 2)
        for (int distance = size / 2; distance > 0; distance /= 2)
            compare(entries, count, distance, size < TOP ? size : 0);
}

// From `count` / TOP sorted runs, to the first alone with the largest of all. Both are powers of two.
__device__ inline void fold(Entry* entries, int count) {
    for (int left = count / 2; left >= TOP; left /= 2) {
        for (int i = threadIdx.x; i < left; i += THREADS)
            entries[i] = max(entries[i], entries[left + (i ^ (TOP - 1))]);
        __syncthreads();
        for (int distance = TOP / 2; distance > 0; distance /= 2) compare(entries, left, distance, 0);
    }
}

__device__ float block_sum(float x) {
    __shared__ float parts[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    x = warp_sum(x);
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    return warp_sum(lane < THREADS / 32 ? parts[lane] : 0.0f);
}

extern "C" __global__ void top_parts(Entry* __restrict__ parts_TPN, float* __restrict__ sums_TP,
                                     const float* __restrict__ logits_TV, int vocabulary, float cap) {
    DYNAMIC_SHARED(Entry, entries);
    const float* logits_V = logits_TV + (long long)blockIdx.y * vocabulary;
    float x_E[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        int id = blockIdx.x * SLICE + e * THREADS + threadIdx.x;
        x_E[e] = id < vocabulary ? logits_V[id] : -INFINITY;
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        int i = e * THREADS + threadIdx.x, id = blockIdx.x * SLICE + i;
        if (id < vocabulary && cap > 0) x_E[e] = tanhf(x_E[e] / cap) * cap;
        entries[i] = id < vocabulary ? entry(x_E[e], id) : 0;
    }
    __syncthreads();
    sort_runs(entries, SLICE);
    fold(entries, SLICE);

    long long part = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    float high = logit(entries[0]), sum = 0;
    if (fabsf(high) < INFINITY) {
#pragma unroll
        for (int e = 0; e < EACH; e++) sum += expf(x_E[e] - high);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums_TP[part] = sum;
    for (int n = threadIdx.x; n < TOP; n += THREADS) parts_TPN[part * TOP + n] = entries[n];
}

extern "C" __global__ void top_merge(int* __restrict__ ids_TN, float* __restrict__ top_TN,
                                     float* __restrict__ logsumexp_T, const Entry* __restrict__ parts_TPN,
                                     const float* __restrict__ sums_TP, int parts) {
    DYNAMIC_SHARED(Entry, entries);
    parts_TPN += (long long)blockIdx.x * parts * TOP, sums_TP += (long long)blockIdx.x * parts;
    int count = TOP;
    while (count < parts * TOP) count *= 2;
    for (int i = threadIdx.x; i < count; i += THREADS) entries[i] = i < parts * TOP ? parts_TPN[i] : 0;
    __syncthreads();
    fold(entries, count);

    float high = logit(entries[0]), sum = 0;
    if (fabsf(high) < INFINITY) {
        for (int p = threadIdx.x; p < parts; p += THREADS) sum += sums_TP[p] * expf(logit(parts_TPN[p * TOP]) - high);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) logsumexp_T[blockIdx.x] = fabsf(high) < INFINITY ? high + logf(sum) : high;
    for (int n = threadIdx.x; n < TOP; n += THREADS) {
        ids_TN[blockIdx.x * TOP + n] = int(~unsigned(entries[n]));
        top_TN[blockIdx.x * TOP + n] = logit(entries[n]);
    }
}
