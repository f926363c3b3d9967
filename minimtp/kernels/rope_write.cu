// rope_write: what is done to the queries, keys and values of a pass before it attends. Twins: layers.rms_norm and
// rotate, as gemma4.attention and qwen35.attention use them; the encode functions of kv_storage, bit for bit.
//
// A row is one head's HEAD_DIM floats of one token, at position *start + t. A query's is normed, rotated and written to
// q_out_THK; a key's is normed, rotated and kept at slot (position mod slots) of its kv head; a value's is kept, after a
// norm without weight where norm_values is 1. A weight that is null: no norm. What is kept is [G, slots, HEAD_DIM] of
// STORAGE, and for INT8 a 16-bit scale a row, [G, slots]. Of a head's columns the pairs (i, i + half) for i < turning
// rotate, by position * frequencies[i].
//
// Of a pass without keys of its own k_TGK and v_TGK are null, of one that keeps only values k_TGK is: nothing is
// written for them. Rows share nothing, so a token's bits are its own.
//
// A warp makes a row, in shared memory, read once and written once. Grid: (H + 2 G, tokens): queries, values, keys; the
// last G, or 2 G, may be left out with their pointers. Block: 32 threads. Shared: 4 * HEAD_DIM bytes. No alignment is
// needed beyond the types'. A full cache has slots >= *start + tokens; a ring as attention.cu says.

#if STORAGE == F32
typedef float Kept;
#elif STORAGE == INT8
typedef int8 Kept;
#else
typedef uint16 Kept;
#endif

__device__ inline void rms_norm(float* row_K, const float* weight_K, float eps) {
    float sum = 0;
    for (int i = threadIdx.x; i < HEAD_DIM; i += 32) sum += row_K[i] * row_K[i];
    float root = sqrtf(warp_sum(sum) / HEAD_DIM + eps);
    for (int i = threadIdx.x; i < HEAD_DIM; i += 32) row_K[i] = row_K[i] / root * (weight_K ? weight_K[i] : 1.0f);
}

__device__ inline void rotate(float* row_K, const float* frequencies_C, int turning, int half, int position) {
    for (int i = threadIdx.x; i < turning; i += 32) {
        float2 by = cos_sin(position, frequencies_C[i]);
        float a = row_K[i], b = row_K[i + half];
        row_K[i] = a * by.x - b * by.y, row_K[i + half] = b * by.x + a * by.y;
    }
}

__device__ inline void keep(Kept* kept_K, uint16* scale, const float* row_K) {
#if STORAGE == INT8
    float most = 0;
    for (int i = threadIdx.x; i < HEAD_DIM; i += 32) most = fmaxf(most, fabsf(row_K[i]));
    uint16 rounded = float_to_half(warp_max(most) / 127);
    float step = half_to_float(rounded) > 0 ? half_to_float(rounded) : 1;
    for (int i = threadIdx.x; i < HEAD_DIM; i += 32)
        kept_K[i] = int8(fminf(fmaxf(rintf(row_K[i] / step), -127.0f), 127.0f));
    if (threadIdx.x == 0) *scale = rounded;
#else
    for (int i = threadIdx.x; i < HEAD_DIM; i += 32) {
#if STORAGE == F32
        kept_K[i] = row_K[i];
#elif STORAGE == F16
        kept_K[i] = float_to_half(row_K[i]);
#else
        kept_K[i] = float_to_bf16(row_K[i]);
#endif
    }
#endif
}

extern "C" __global__ void __launch_bounds__(32) rope_write(
    float* __restrict__ q_out_THK, Kept* __restrict__ k_GSK, Kept* __restrict__ v_GSK,
    uint16* __restrict__ k_scales_GS, uint16* __restrict__ v_scales_GS, const float* __restrict__ q_THK,
    const float* __restrict__ k_TGK, const float* __restrict__ v_TGK, const float* __restrict__ q_norm_K,
    const float* __restrict__ k_norm_K, const float* __restrict__ frequencies_C, const int* __restrict__ start,
    int heads, int kv_heads, int slots, int turning, int half, int norm_values, float eps) {
    __shared__ float row_K[HEAD_DIM];
    int t = blockIdx.y, head = blockIdx.x, lane = threadIdx.x, position = *start + t;
    bool is_q = head < heads, is_v = !is_q && head < heads + kv_heads;
    int g = is_v ? head - heads : head - heads - kv_heads;
    const float* in = is_q ? q_THK : is_v ? v_TGK : k_TGK;
    if (!in) return;  // the whole block
    in += (is_q ? (long long)t * heads + head : (long long)t * kv_heads + g) * HEAD_DIM;
    for (int i = lane; i < HEAD_DIM; i += 32) row_K[i] = in[i];

    const float* weight_K = is_q ? q_norm_K : is_v ? nullptr : k_norm_K;
    if (is_v ? norm_values : weight_K != nullptr) rms_norm(row_K, weight_K, eps);
    __syncwarp();
    if (!is_v) rotate(row_K, frequencies_C, turning, half, position);
    __syncwarp();

    if (is_q) {
        float* out_K = q_out_THK + ((long long)t * heads + head) * HEAD_DIM;
        for (int i = lane; i < HEAD_DIM; i += 32) out_K[i] = row_K[i];
        return;
    }
    long long row = (long long)g * slots + position % slots;
    uint16* scales_GS = is_v ? v_scales_GS : k_scales_GS;
    keep((is_v ? v_GSK : k_GSK) + row * HEAD_DIM, scales_GS + (STORAGE == INT8 ? row : 0), row_K);
}
