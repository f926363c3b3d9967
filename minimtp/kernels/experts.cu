// A mixture of experts for 1 to 8 tokens, in four kernels: route, experts_gated, experts_down, experts_sum.
// Twins: layers.best_experts, then layers.mixture (and gemma4.route, qwen35.feed_forward for what differs).
//
// A pass pays for the union of its tokens' experts. route finds it, in ascending order, and gives each its slot: the
// expert's number, the tokens that use it (bit t for token t) and each one's weight. There are at most
// S = min(TOKENS * X, E) slots; how many are used stays in device memory, and what is launched for the rest exits.
// experts_gated makes activation(gate) * up of every slot for its tokens, experts_down the outputs, experts_sum their
// weighted sum, a token's in the order of the experts' numbers: its bits do not depend on who shares the pass.
//
// As in matvec_int4 a weight is read once for all tokens, the x of the tokens comes from the cache, and every token has
// the same sums alone and in company. A warp makes two rows at once, which share x: the gate's and the up's, or two of
// the down projection. Lane l takes columns 8 l … 8 l + 7 of every 256, of AHEAD times 256 before it multiplies them.
//
// Grids: route 1; experts_gated (F / WARPS, S); experts_down (D / (2 WARPS), S); experts_sum (D / threads, TOKENS), all
// rounded up. Blocks: route 256, experts_gated and experts_down 32 * WARPS, experts_sum any. E is at most 256, X at
// most 8, columns a multiple of GROUP, which is one of 8, a row begins at 4 bytes (bf16: 16).
// Compiled with TOKENS (1 … 8), ACTIVATION (gelu or silu), SCALE (f16, bf16 or f32) and GROUP (32: columns that share a
// scale), or BF16_EXPERTS (1) instead of these two: bf16 weights, whose scales are null.

constexpr int MOST_EXPERTS = 256, MOST_CHOSEN = 8;
constexpr float NONE = -3e38f;  // below every logit, and e to its power is 0

#ifdef BF16_EXPERTS
#define SCALE f32
#define GROUP 8
typedef uint4 Eight;  // weights of consecutive columns
constexpr int AHEAD = 2;
__device__ inline float4 four_floats(unsigned ab, unsigned cd) {
    return make_float4(bf16_to_float(ab), bf16_to_float(ab >> 16), bf16_to_float(cd), bf16_to_float(cd >> 16));
}
__device__ inline float4 low_four(Eight w) { return four_floats(w.x, w.y); }
__device__ inline float4 high_four(Eight w) { return four_floats(w.z, w.w); }
__device__ inline float scale_of(const SCALE*, int) { return 1; }
#else
typedef unsigned Eight;
constexpr int AHEAD = 4;
__device__ inline float4 low_four(Eight w) { return four_nibbles(w); }
__device__ inline float4 high_four(Eight w) { return four_nibbles(w >> 16); }
__device__ inline float scale_of(const SCALE* scales_G, int column) { return widen(scales_G[column / GROUP]); }
#endif


// chosen_TX, weights_TX: each token's experts, best first, for whom wants them. per_expert_scale_E may be null.
extern "C" __global__ void route(int* __restrict__ chosen_TX, float* __restrict__ weights_TX, int* __restrict__ slots,
                                 int* __restrict__ expert_S, unsigned* __restrict__ tokens_S,
                                 float* __restrict__ weights_ST, const float* __restrict__ logits_TE,
                                 const float* __restrict__ per_expert_scale_E, int experts, int top_k) {
    __shared__ int chosen[TOKENS][MOST_CHOSEN], used[MOST_EXPERTS / 32];
    __shared__ float weights[TOKENS][MOST_CHOSEN];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (warp < TOKENS) {  // a token, its expert 32 i + lane in p[i]
        float p[MOST_EXPERTS / 32], most = NONE, sum = 0;
        for (int i = 0; i < MOST_EXPERTS / 32; i++) {
            int e = 32 * i + lane;
            p[i] = e < experts ? logits_TE[warp * experts + e] : NONE;
            most = fmaxf(most, p[i]);
        }
        most = warp_max(most);
        for (int i = 0; i < MOST_EXPERTS / 32; i++) sum += p[i] = expf(p[i] - most);
        sum = warp_sum(sum);
        for (int i = 0; i < MOST_EXPERTS / 32; i++) p[i] /= sum;
        unsigned taken = 0;
        float share = 0;
        for (int x = 0; x < top_k; x++) {
            // Probabilities are not negative and so ordered as their bits; of equal ones the lower number is greater.
            unsigned long long best = 0;
            for (int i = 0; i < MOST_EXPERTS / 32; i++) {
                int e = 32 * i + lane;
                unsigned long long key = (unsigned long long)__float_as_uint(p[i]) << 32 | (MOST_EXPERTS - e);
                if (e < experts && !(taken >> i & 1)) best = max(best, key);
            }
            for (int distance = 16; distance > 0; distance /= 2)
                best = max(best, __shfl_xor_sync(ALL_LANES, best, distance));
            int e = MOST_EXPERTS - int(best & 0xFFFFFFFF);
            if (e % 32 == lane) taken |= 1u << e / 32;
            share += __uint_as_float(unsigned(best >> 32));
            if (lane == 0) chosen[warp][x] = e, weights[warp][x] = __uint_as_float(unsigned(best >> 32));
        }
        __syncwarp();
        if (lane < top_k) {
            int e = chosen[warp][lane];
            float scale = per_expert_scale_E ? per_expert_scale_E[e] : 1;
            weights[warp][lane] = weights[warp][lane] / share * scale;
            chosen_TX[warp * top_k + lane] = e, weights_TX[warp * top_k + lane] = weights[warp][lane];
        }
    }
    __syncthreads();

    // Now a thread is an expert: who uses it, and how many used ones come before it?
    unsigned tokens = 0;
    for (int t = 0; t < TOKENS; t++)
        for (int x = 0; x < top_k; x++) tokens |= unsigned(chosen[t][x] == threadIdx.x) << t;
    unsigned users = __ballot_sync(ALL_LANES, tokens != 0);
    if (lane == 0) used[warp] = __popc(users);
    __syncthreads();
    int slot = __popc(users & ((1u << lane) - 1));
    for (int w = 0; w < warp; w++) slot += used[w];
    if (tokens) {
        expert_S[slot] = threadIdx.x, tokens_S[slot] = tokens;
        for (int t = 0; t < TOKENS; t++) {
            float mine = 0;
            for (int x = 0; x < top_k; x++) mine = chosen[t][x] == threadIdx.x ? weights[t][x] : mine;
            weights_ST[slot * TOKENS + t] = mine;
        }
    }
    if (threadIdx.x == MOST_EXPERTS - 1) *slots = slot + (tokens != 0);
}

// Adds up rows a and b times the x of those tokens whose bit is set: this lane's columns.
__device__ inline void two_rows(float (&sums_2T)[2][TOKENS], const Eight* a_W, const Eight* b_W, const SCALE* a_G,
                                const SCALE* b_G, const float* x_TI, unsigned tokens, int columns) {
    for (int first = 8 * (threadIdx.x % 32); first < columns; first += 256 * AHEAD) {
        Eight a[AHEAD] = {}, b[AHEAD] = {};
        float a_scale[AHEAD] = {}, b_scale[AHEAD] = {};
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int column = first + 256 * i;
            if (column >= columns) break;
            a[i] = __ldcs(a_W + column / 8), b[i] = __ldcs(b_W + column / 8);
            a_scale[i] = scale_of(a_G, column), b_scale[i] = scale_of(b_G, column);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int column = first + 256 * i;
            if (column >= columns) break;
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                if (!(tokens >> t & 1)) continue;
                const float4* x = reinterpret_cast<const float4*>(x_TI + (long long)t * columns + column);
                float4 low = x[0], high = x[1];
                float a_part = dot4(high, high_four(a[i]), dot4(low, low_four(a[i]), 0));
                float b_part = dot4(high, high_four(b[i]), dot4(low, low_four(b[i]), 0));
                sums_2T[0][t] = fmaf(a_part, a_scale[i], sums_2T[0][t]);
                sums_2T[1][t] = fmaf(b_part, b_scale[i], sums_2T[1][t]);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
        if (tokens >> t & 1) sums_2T[0][t] = warp_sum(sums_2T[0][t]), sums_2T[1][t] = warp_sum(sums_2T[1][t]);
}

extern "C" __global__ void experts_gated(float* __restrict__ gated_STF, const float* __restrict__ x_TD,
                                         const Eight* __restrict__ gate_EFW, const SCALE* __restrict__ gate_scales_EFG,
                                         const Eight* __restrict__ up_EFW, const SCALE* __restrict__ up_scales_EFG,
                                         const int* __restrict__ slots, const int* __restrict__ expert_S,
                                         const unsigned* __restrict__ tokens_S, int rows, int columns) {
    int slot = blockIdx.y, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (slot >= *slots || row >= rows) return;  // a whole warp
    unsigned tokens = tokens_S[slot];
    long long place = (long long)expert_S[slot] * rows + row, w = place * (columns / 8), g = place * (columns / GROUP);
    float sums_2T[2][TOKENS] = {};
    two_rows(sums_2T, gate_EFW + w, up_EFW + w, gate_scales_EFG + g, up_scales_EFG + g, x_TD, tokens, columns);
    for (int t = 0; t < TOKENS; t++)
        if (threadIdx.x % 32 == 0 && tokens >> t & 1)
            gated_STF[((long long)slot * TOKENS + t) * rows + row] = ACTIVATION(sums_2T[0][t]) * sums_2T[1][t];
}

extern "C" __global__ void experts_down(float* __restrict__ out_STD, const float* __restrict__ gated_STF,
                                        const Eight* __restrict__ down_EDW, const SCALE* __restrict__ scales_EDG,
                                        const int* __restrict__ slots, const int* __restrict__ expert_S,
                                        const unsigned* __restrict__ tokens_S, int rows, int columns) {
    int slot = blockIdx.y, row = 2 * (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32);
    if (slot >= *slots || row >= rows) return;  // a whole warp
    int next = min(row + 1, rows - 1);  // the last of an odd number is its own neighbour
    unsigned tokens = tokens_S[slot];
    long long first = (long long)expert_S[slot] * rows, a = first + row, b = first + next;
    float sums_2T[2][TOKENS] = {};
    two_rows(sums_2T, down_EDW + a * (columns / 8), down_EDW + b * (columns / 8), scales_EDG + a * (columns / GROUP),
             scales_EDG + b * (columns / GROUP), gated_STF + (long long)slot * TOKENS * columns, tokens, columns);
    for (int t = 0; t < TOKENS; t++)
        if (threadIdx.x % 32 == 0 && tokens >> t & 1) {
            float* out_D = out_STD + ((long long)slot * TOKENS + t) * rows;
            out_D[row] = sums_2T[0][t], out_D[next] = sums_2T[1][t];
        }
}

extern "C" __global__ void experts_sum(float* __restrict__ out_TD, const float* __restrict__ out_STD,
                                       const float* __restrict__ weights_ST, const int* __restrict__ slots,
                                       const unsigned* __restrict__ tokens_S, int width) {
    int t = blockIdx.y, column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= width) return;
    float sum = 0;
    for (int slot = 0; slot < *slots; slot++)
        if (tokens_S[slot] >> t & 1) {
            long long place = (long long)slot * TOKENS + t;
            sum = fmaf(out_STD[place * width + column], weights_ST[place], sum);
        }
    out_TD[t * width + column] = sum;
}
