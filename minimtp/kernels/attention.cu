// attention_split, attention_merge: each query of a decode or verify pass over the positions it sees, the context cut
// in splits. Twins: layers.attend over kv.FullKV and SlidingKV, kv_storage's decode, gemma4.keys_of_values.
//
// Query t sees the positions max(0, high - window) … high - 1, high = *start + appended * (t + 1): appended 1 for a
// pass whose own keys are written, 0 for a drafter, all of whose queries see the *start positions there are. window:
// of a layer that attends to everything 2147483647; of a drafter's sliding layer one more than the target's, where
// its edge is "inclusive". Position p lies in slot p mod slots; a ring has slots >= window + TOKENS, one that is
// lent one more.
//
// A block makes HEADS query heads of one kv head for all tokens, ROWS = TOKENS * HEADS <= 16 queries, over one
// split: tiles of 64 positions, from absolute multiples of SPLIT on. Scores: 8 lanes make those of two positions,
// eight columns of 16 bytes (f16) at a time, so a warp loads whole 128-byte lines and each key, in registers, meets
// all queries, in shared memory. Softmax, online: a warp a query. Sums: a thread has four columns of every query for
// each GROUPS-th position, 8 loads in flight; the groups are added last. A query's operations depend on its own
// positions only, not on TOKENS, HEADS, length, window position or capacity. What it does not see is left out,
// whatever is there.
//
// Bytes: all queries of a kv head at once would be 8 tokens * 8 heads * 512 floats = 128 KiB, and as many sums: more
// than a block has. 16 are 32 KiB of shared memory, and sums in 64 registers a thread: so K and V come from memory
// once a pass and from L2 for the other R / HEADS - 1 blocks beside it (grid x runs fastest): of 31B's full layers,
// R = 8, none up to 2 tokens, 1 up to 4, 3 up to 8, where 16 multiplications a number that is read outlast L2
// anyway. HEADS: the largest divisor of R = H / G with TOKENS * HEADS <= 16. With VALUES_ONLY the second reading of
// V is from L1 or L2, and the keys of 2 * turning columns cost a sine and cosine each.
//
// attention_split: grid (H / HEADS, splits), splits = ceil(slots / SPLIT) for full layers, for sliding ones
// ceil((window + TOKENS - 1) / SPLIT) + 1, the first the one in which query 0's positions begin; block 256.
// attention_merge: grid (H, TOKENS), block HEAD_DIM / 4. Scratch: sums [splits, TOKENS, H, HEAD_DIM] and weights
// [splits, TOKENS, H] of two floats, never read where not written. Rows of q, caches and sums begin at 16 bytes.
// Compiled with TOKENS, HEADS, HEAD_DIM (16 * 2^n <= 512), STORAGE, SPLIT (a multiple of 64), VALUES_ONLY (0, 1).

constexpr int THREADS = 256, WARPS = THREADS / 32, TILE = 64, QUADS = HEAD_DIM / 4, HALF = HEAD_DIM / 2;
constexpr int ROWS = TOKENS * HEADS, STRIDE = (ROWS + 3) / 4 * 4 | 4;  // an odd number of 16 bytes: other banks
constexpr int GROUPS = THREADS / QUADS < TILE ? THREADS / QUADS : TILE;
constexpr int IN_FLIGHT = TILE / GROUPS < 8 ? TILE / GROUPS : 8;  // values that a thread waits for at once
constexpr int BLOCKS = ROWS > 4 ? 1 : 2;  // of a multiprocessor at a time: registers
constexpr int UNROLL = VALUES_ONLY ? 1 : 4 / (STORAGE == INT8 ? 1 : STORAGE == F32 ? 4 : 2);  // 128 bytes in flight
static_assert(THREADS % QUADS == 0 && HEAD_DIM % 16 == 0 && SPLIT % TILE == 0 && ROWS <= 16, "see above");

// How four numbers are kept, and eight; what they are.
#if STORAGE == INT8
typedef int8 Kept;
typedef unsigned Four;
struct alignas(8) Eight { Four first, second; };
__device__ inline float4 decode(Four codes, float scale) {
    float4 x = four_bytes(codes ^ 0x80808080u, 128);
    return make_float4(x.x * scale, x.y * scale, x.z * scale, x.w * scale);
}
#elif STORAGE == F32
typedef float Kept;
typedef float4 Four;
struct alignas(16) Eight { Four first, second; };
__device__ inline float4 decode(Four x, float) { return x; }
#else
typedef uint16 Kept;
typedef uint2 Four;
struct alignas(16) Eight { Four first, second; };
__device__ inline float wide(unsigned bits) {
    return STORAGE == F16 ? half_to_float(uint16(bits)) : bf16_to_float(uint16(bits));
}
__device__ inline float4 decode(Four x, float) {
    return make_float4(wide(x.x & 0xFFFF), wide(x.x >> 16), wide(x.y & 0xFFFF), wide(x.y >> 16));
}
#endif

__device__ inline float row_scale(const uint16* scales, int slot) {
    return STORAGE == INT8 ? half_to_float(scales[slot]) : 1.0f;
}

// The positions that query t sees, and the split in which those of a pass begin.
struct Range { int low, high; };
__device__ inline Range seen(int start, int appended, int window, int t) {
    int high = start + appended * (t + 1);
    return {high > window ? high - window : 0, high};
}
__device__ inline int first_split(int start, int appended, int window) {
    return seen(start, appended, window, 0).low / SPLIT;
}

// Keys of 8 columns and of the 8 that are HALF further on, made of their values (gemma4.keys_of_values).
__device__ inline void make_keys(float* a, float* b, const float* weight_K, const float* frequencies_C, int column,
                                 int turning, int position) {
    for (int j = 0; j < 8; j++) {
        a[j] *= weight_K[column + j], b[j] *= weight_K[HALF + column + j];
        if (column + j < turning) {
            float2 by = cos_sin(position, frequencies_C[column + j]);
            float turned = a[j] * by.x - b[j] * by.y;
            b[j] = b[j] * by.x + a[j] * by.y, a[j] = turned;
        }
    }
}

__device__ inline void put(float* out, float4 x) { out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w; }

__device__ inline float add_products(float sum, float4 q, const float* k) {
    sum += q.x * k[0];
    sum += q.y * k[1];
    sum += q.z * k[2];
    return sum + q.w * k[3];
}

__device__ inline void add_weighted(float* acc, float weight, float4 v) {
    acc[0] += weight * v.x, acc[1] += weight * v.y, acc[2] += weight * v.z, acc[3] += weight * v.w;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_split(
    float* __restrict__ sums_STHK, float2* __restrict__ weights_STH, const float* __restrict__ q_THK,
    const Kept* __restrict__ k_GSK, const Kept* __restrict__ v_GSK, const uint16* __restrict__ k_scales_GS,
    const uint16* __restrict__ v_scales_GS, const float* __restrict__ k_norm_K,
    const float* __restrict__ frequencies_C, const int* __restrict__ start, int heads, int kv_heads, int slots,
    int window, int appended, int turning) {
    int split = first_split(*start, appended, window) + blockIdx.y;
    int low = seen(*start, appended, window, 0).low, high = seen(*start, appended, window, TOKENS - 1).high;  // of any
    int all_low = seen(*start, appended, window, TOKENS - 1).low, all_high = seen(*start, appended, window, 0).high;
    int begin = max(low, split * SPLIT), end = min(high, split * SPLIT + SPLIT);
    if (begin >= end) return;  // the whole block

    __shared__ float4 shared_q[ROWS * QUADS];               // last: sums of a group
    __shared__ float4 shared_p[2 * TILE * STRIDE / 4];      // of a tile: scores, then weights; two in turn
    __shared__ float factor_R[ROWS];
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, head = blockIdx.x * HEADS;
    int g = head / (heads / kv_heads);
    k_GSK += (long long)g * slots * HEAD_DIM, v_GSK += (long long)g * slots * HEAD_DIM;
    if (STORAGE == INT8) k_scales_GS += (long long)g * slots, v_scales_GS += (long long)g * slots;
    int first_slot = begin % slots;
    auto slot_of = [&](int position) {
        int slot = first_slot + position - begin;
        return slot < slots ? slot : slot - slots;
    };

    // The first halves of all eights, then the second, so that 8 lanes read 128 consecutive bytes of a query.
    for (int i = thread; i < ROWS * QUADS; i += THREADS) {
        int r = i / QUADS, quad = i % QUADS, side = quad / (QUADS / 2), at = quad % (QUADS / 2);
        int row = (r / HEADS) * heads + head + r % HEADS;
        shared_q[r * QUADS + side * (QUADS / 2) + at % 2 * (QUADS / 4) + at / 2] =
            reinterpret_cast<const float4*>(q_THK)[(long long)row * QUADS + quad];
    }
    __syncthreads();

    int quad = thread % QUADS, group = thread / QUADS;
    bool sums = group < GROUPS;
    float acc[ROWS][4] = {}, most[(ROWS + WARPS - 1) / WARPS], total[(ROWS + WARPS - 1) / WARPS] = {};
    for (float& x : most) x = -INFINITY;

    for (int tile = begin / TILE * TILE, turn = 0; tile < end; tile += TILE, turn ^= 1) {
        float* p = reinterpret_cast<float*>(shared_p) + turn * TILE * STRIDE;

        // Scores of positions tile + spot and tile + spot + 4; outside of the range its nearest, later left out.
        int spot = 8 * warp + lane / 8;
        int position[2], slot[2];
        float scale[2], score[ROWS][2] = {};
        for (int i = 0; i < 2; i++) {
            position[i] = min(max(tile + spot + 4 * i, begin), end - 1), slot[i] = slot_of(position[i]);
            scale[i] = row_scale(VALUES_ONLY ? v_scales_GS : k_scales_GS, slot[i]);
        }
#pragma unroll UNROLL
        for (int step = 0; step < (HALF + 63) / 64; step++) {
            int column = 64 * step + lane % 8 * 8;
            if (HALF % 64 && column >= HALF) continue;
            float k[2][2][8];  // left and right half, position, column
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const Kept* row = (VALUES_ONLY ? v_GSK : k_GSK) + (long long)slot[i] * HEAD_DIM + column;
                for (int side = 0; side < 2; side++) {
                    Eight kept = *reinterpret_cast<const Eight*>(row + side * HALF);
                    put(k[side][i], decode(kept.first, scale[i])), put(k[side][i] + 4, decode(kept.second, scale[i]));
                }
                if (VALUES_ONLY) make_keys(k[0][i], k[1][i], k_norm_K, frequencies_C, column, turning, position[i]);
            }
#pragma unroll
            for (int side = 0; side < 2; side++)
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const float4* q = shared_q + r * QUADS + side * (QUADS / 2) + column / 8;
                    float4 first = q[0], second = q[QUADS / 4];
                    for (int i = 0; i < 2; i++) {
                        score[r][i] = add_products(score[r][i], first, k[side][i]);
                        score[r][i] = add_products(score[r][i], second, k[side][i] + 4);
                    }
                }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < 2; i++) {
                float sum = score[r][i];
                for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
                if (lane % 8 == r % 8) p[(spot + 4 * i) * STRIDE + r] = sum;
            }
        __syncthreads();

#pragma unroll
        for (int i = 0; i < (ROWS + WARPS - 1) / WARPS; i++) {
            int r = i * WARPS + warp;
            if (r >= ROWS) continue;  // a whole warp
            Range range = seen(*start, appended, window, r / HEADS);
            int at = tile + lane;
            float *p0 = p + lane * STRIDE + r, *p1 = p0 + 32 * STRIDE;
            bool sees0 = at >= max(range.low, begin) && at < min(range.high, end);
            bool sees1 = at + 32 >= max(range.low, begin) && at + 32 < min(range.high, end);
            float before = most[i], now = fmaxf(sees0 ? *p0 : -INFINITY, sees1 ? *p1 : -INFINITY);
            now = fmaxf(before, warp_max(now));
            float factor = now == before ? 1.0f : expf(before - now);
            *p0 = sees0 ? expf(*p0 - now) : 0.0f, *p1 = sees1 ? expf(*p1 - now) : 0.0f;
            total[i] = total[i] * factor + warp_sum(*p0 + *p1), most[i] = now;
            if (lane == 0) factor_R[r] = factor;
        }
        __syncthreads();

        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < 4; j++) acc[r][j] *= factor_R[r];
        bool all = tile >= max(all_low, begin) && tile + TILE <= min(all_high, end);
        for (int first = group; sums && first < TILE; first += GROUPS * IN_FLIGHT) {
            Four kept[IN_FLIGHT];
            float scale[IN_FLIGHT];
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; i++) {
                int slot = slot_of(min(max(tile + first + i * GROUPS, begin), end - 1));
                kept[i] = *reinterpret_cast<const Four*>(v_GSK + (long long)slot * HEAD_DIM + 4 * quad);
                scale[i] = row_scale(v_scales_GS, slot);
            }
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; i++) {
                float4 v = decode(kept[i], scale[i]);
                const float4* weights = reinterpret_cast<const float4*>(p + (first + i * GROUPS) * STRIDE);
                float p_R[(ROWS + 3) / 4 * 4];
#pragma unroll
                for (int r = 0; r < ROWS; r += 4) put(p_R + r, weights[r / 4]);
                if (all) {
#pragma unroll
                    for (int r = 0; r < ROWS; r++) add_weighted(acc[r], p_R[r], v);
                } else {
#pragma unroll
                    for (int r = 0; r < ROWS; r++)
                        if (p_R[r] != 0) add_weighted(acc[r], p_R[r], v);  // a later token's values may be no numbers
                }
            }
        }
    }

    // Group 0 adds the others' sums to its own, one after the other.
    for (int other = 1; other < GROUPS; other++) {
        __syncthreads();
        for (int r = 0; r < ROWS && group == other; r++)
            shared_q[r * QUADS + quad] = make_float4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
        __syncthreads();
        for (int r = 0; r < ROWS && group == 0; r++) {
            float4 x = shared_q[r * QUADS + quad];
            acc[r][0] += x.x, acc[r][1] += x.y, acc[r][2] += x.z, acc[r][3] += x.w;
        }
    }
    long long row = (long long)blockIdx.y * TOKENS * heads + head;
    for (int r = 0; r < ROWS && group == 0; r++)
        reinterpret_cast<float4*>(sums_STHK)[(row + r / HEADS * heads + r % HEADS) * QUADS + quad] =
            make_float4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
#pragma unroll
    for (int i = 0; i < (ROWS + WARPS - 1) / WARPS; i++) {
        int r = i * WARPS + warp;
        if (lane == 0 && r < ROWS) weights_STH[row + r / HEADS * heads + r % HEADS] = make_float2(most[i], total[i]);
    }
}

// The splits of each query put together, in ascending order: their sums by exp(their maximum - the greatest of all).
extern "C" __global__ void attention_merge(
    float* __restrict__ out_THK, const float* __restrict__ sums_STHK, const float2* __restrict__ weights_STH,
    const int* __restrict__ start, int window, int appended) {
    int heads = gridDim.x, t = blockIdx.y, rows = TOKENS * heads, row = t * heads + blockIdx.x, quad = threadIdx.x;
    Range range = seen(*start, appended, window, t);
    int base = first_split(*start, appended, window);
    int first = range.low / SPLIT - base, last = (range.high + SPLIT - 1) / SPLIT - base;
    float most = -INFINITY, total = 0;
    for (int s = first; s < last; s++) most = fmaxf(most, weights_STH[(long long)s * rows + row].x);
    float4 out = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int s = first; s < last; s++) {
        float2 weight = weights_STH[(long long)s * rows + row];
        float4 sum = reinterpret_cast<const float4*>(sums_STHK)[((long long)s * rows + row) * QUADS + quad];
        float factor = expf(weight.x - most);
        total += weight.y * factor;
        out.x += sum.x * factor, out.y += sum.y * factor, out.z += sum.z * factor, out.w += sum.w * factor;
    }
    if (range.low >= range.high) total = 1;  // sees nothing: zeros
    reinterpret_cast<float4*>(out_THK)[(long long)row * QUADS + quad] =
        make_float4(out.x / total, out.y / total, out.z / total, out.w / total);
}
