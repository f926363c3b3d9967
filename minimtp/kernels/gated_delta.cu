// gated_delta: the gated delta rule of a Gated DeltaNet layer, token by token, with the norms and gates before it.
// Twins: layers.l2_norm and gated_delta (its narrow way); gated_delta_replay: delta_state.DeltaState's un-reading.
//
// The memory is the committed state [H, K, V] and a log of the tokens since, of which `logged` (in device memory)
// count: for each its key, its write u and its decay. A state cannot be trimmed, but it can be written again from the
// log, by the operations that made it, so to the same bits. A pass of TOKENS writes the logged tokens again (often none
// are), reads its own, and logs them behind; the state that it ends with goes to `after`, if that is not null, and the
// committed one stays. To un-read, lower `logged`. To commit n, gated_delta_replay.
//
// The columns of a state are independent, so a block has 32 of one head's, a lane one of them, and a warp the rows
// warp * ROWS … of it, in registers: the state is read once and written once, 128 bytes a warp at a time, ROWS loads in
// flight. For a token two sums over the rows, what the faded state answers to k and then the new one to q, meet in
// shared memory. mixed is the convolution's output, a row of q [G, K], k [G, K] and v [H, V]; a and b are the
// projections of those names; q_scale is K^-1/2.
//
// Grid: (H, V / 32 rounded up). Block: 32 * WARPS threads. No alignment beyond float's. Shared memory: static, 10 KiB
// for 8 tokens of K = 128. Compiled with TOKENS (1 … 8; a replay does not use it), KEY_DIM (K) and WARPS (8, say).

constexpr int ROWS = (KEY_DIM + WARPS - 1) / WARPS, PADDED = ROWS * WARPS;  // rows beyond KEY_DIM are zeros
constexpr float L2_EPS = 1e-6f;

struct Place {
    int lane, warp, head, key_head, column;
    long long state;  // where the head's state begins, and in it this thread's column
};

__device__ inline Place place_of_thread(int key_heads, int values) {
    Place p;
    p.lane = threadIdx.x % 32, p.warp = threadIdx.x / 32;
    p.head = blockIdx.x, p.key_head = p.head / (gridDim.x / key_heads), p.column = 32 * blockIdx.y + p.lane;
    p.state = (long long)p.head * KEY_DIM * values + p.column;
    return p;
}

__device__ inline void load(float* state_R, const float* state_HKV, Place p, int values) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int row = p.warp * ROWS + r;
        bool there = row < KEY_DIM && p.column < values;
        state_R[r] = there ? state_HKV[p.state + (long long)row * values] : 0.0f;
    }
}

__device__ inline void store(float* state_HKV, const float* state_R, Place p, int values) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int row = p.warp * ROWS + r;
        if (row < KEY_DIM && p.column < values) state_HKV[p.state + (long long)row * values] = state_R[r];
    }
}

// One token's fading and write: here and in the pass a product, rounded, then one fmaf.
__device__ inline void write_again(float* state_R, const float* k_LGK, const float* u_LHV, const float* decay_LH,
                                   int count, Place p, int key_heads, int values) {
    int heads = gridDim.x;
    for (int n = 0; n < count; n++) {
        const float* k_K = k_LGK + ((long long)n * key_heads + p.key_head) * KEY_DIM;
        float u = p.column < values ? u_LHV[((long long)n * heads + p.head) * values + p.column] : 0.0f;
        float decay = decay_LH[(long long)n * heads + p.head];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            int row = p.warp * ROWS + r;
            state_R[r] = fmaf(row < KEY_DIM ? k_K[row] : 0.0f, u, state_R[r] * decay);
        }
    }
}

// A sum over all rows for each column: the warps' sums, in the order of the warps. One barrier; parts are free again
// after the next.
__device__ inline float sum_over_warps(float (*parts)[32], float x, Place p) {
    parts[p.warp][p.lane] = x;
    __syncthreads();
    float sum = parts[0][p.lane];
#pragma unroll
    for (int w = 1; w < WARPS; w++) sum += parts[w][p.lane];
    return sum;
}

extern "C" __global__ void gated_delta(float* __restrict__ out_THV, float* after_HKV, float* k_LGK, float* u_LHV,
                                       float* decay_LH, const float* __restrict__ mixed_TC,
                                       const float* __restrict__ a_TH, const float* __restrict__ b_TH,
                                       const float* __restrict__ A_log_H, const float* __restrict__ dt_bias_H,
                                       const float* state_HKV, const int* __restrict__ logged, int key_heads,
                                       int values, float q_scale) {
    __shared__ float q_TK[TOKENS][PADDED], k_TK[TOKENS][PADDED], decay_T[TOKENS], beta_T[TOKENS];
    __shared__ float answers[WARPS][32], outputs[WARPS][32];
    Place p = place_of_thread(key_heads, values);
    int heads = gridDim.x, before = *logged;
    long long channels = 2ll * key_heads * KEY_DIM + (long long)heads * values;
    float state_R[ROWS], v_T[TOKENS];
    load(state_R, state_HKV, p, values);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const float* v_V = mixed_TC + t * channels + 2ll * key_heads * KEY_DIM + (long long)p.head * values;
        v_T[t] = p.column < values ? v_V[p.column] : 0.0f;
    }

    bool logs_key = blockIdx.y == 0 && p.head % (heads / key_heads) == 0;  // several blocks have the same key
    for (int vector = p.warp; vector < 2 * TOKENS; vector += WARPS) {
        int t = vector / 2, is_key = vector % 2;
        const float* x_K = mixed_TC + t * channels + (long long)(is_key * key_heads + p.key_head) * KEY_DIM;
        float squares = 0;
        for (int i = p.lane; i < KEY_DIM; i += 32) squares = fmaf(x_K[i], x_K[i], squares);
        float root = sqrtf(warp_sum(squares) + L2_EPS);
        for (int i = p.lane; i < PADDED; i += 32) {
            float x = i < KEY_DIM ? x_K[i] / root : 0.0f;
            (is_key ? k_TK : q_TK)[t][i] = is_key ? x : x * q_scale;
            if (is_key && logs_key && i < KEY_DIM)
                k_LGK[((long long)(before + t) * key_heads + p.key_head) * KEY_DIM + i] = x;
        }
    }
    if (threadIdx.x < TOKENS) {
        int t = threadIdx.x;
        float x = a_TH[t * heads + p.head] + dt_bias_H[p.head];
        float softplus = fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
        decay_T[t] = expf(-expf(A_log_H[p.head]) * softplus);
        beta_T[t] = 1.0f / (1.0f + expf(-b_TH[t * heads + p.head]));
        if (blockIdx.y == 0) decay_LH[(long long)(before + t) * heads + p.head] = decay_T[t];
    }
    write_again(state_R, k_LGK, u_LHV, decay_LH, before, p, key_heads, values);
    __syncthreads();

#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const float *k_R = k_TK[t] + p.warp * ROWS, *q_R = q_TK[t] + p.warp * ROWS;
        float answer = 0, output = 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            state_R[r] *= decay_T[t];
            answer = fmaf(k_R[r], state_R[r], answer);
        }
        float u = beta_T[t] * (v_T[t] - sum_over_warps(answers, answer, p));
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            state_R[r] = fmaf(k_R[r], u, state_R[r]);
            output = fmaf(q_R[r], state_R[r], output);
        }
        output = sum_over_warps(outputs, output, p);
        if (p.warp == 0 && p.column < values) {
            out_THV[((long long)t * heads + p.head) * values + p.column] = output;
            u_LHV[((long long)(before + t) * heads + p.head) * values + p.column] = u;
        }
    }
    if (after_HKV) store(after_HKV, state_R, p, values);
}

// The committed state becomes that after the log's first *count tokens.
extern "C" __global__ void gated_delta_replay(float* state_HKV, const float* __restrict__ k_LGK,
                                              const float* __restrict__ u_LHV, const float* __restrict__ decay_LH,
                                              const int* __restrict__ count, int key_heads, int values) {
    Place p = place_of_thread(key_heads, values);
    float state_R[ROWS];
    load(state_R, state_HKV, p, values);
    write_again(state_R, k_LGK, u_LHV, decay_LH, *count, p, key_heads, values);
    store(state_HKV, state_R, p, values);
}
