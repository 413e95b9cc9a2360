// What lies between the matrix products of a decoder layer, each in one pass over memory, for processors.
//
// torch takes several passes for each (widen, compute, round) and makes a tensor for every one. Here numbers are widened
// as they are read, computed in fp32, and rounded once as they are written. Which thread takes a row changes no bit: a
// row is always summed by one thread, in one order. Every function has a plain reference in deltaw/kernels and a test
// between them.
//
// Rows in flat arrays; T is bf16 or float. Indices of rows are below zero where a padding row stands for zeros.

#include "vectors.hpp"

#include <vector>

namespace {

constexpr long WORTH_THREADS = 16384;  // numbers; fewer are done before a second thread has woken
constexpr long PART = 4096;            // numbers that a thread takes at a time where there are no rows

// -- norms, rotations, gates

// 1 / sqrt(mean of squares + eps) of a row.
template <class T>
inline float rate_of(const T *x, long width, float eps) {
    floats squares{};
    each_vector(0, width, [&](long i, int count) {
        floats value = load(x + i, count);
        squares += value * value;
    });
    return 1.0f / std::sqrt(sum_of(squares) / float(width) + eps);
}

// gain[i] * x[i] * rate, of each row.
template <class T>
void rms_norm(T *out, const T *x, const float *gain, float eps, long rows, long width) {
#pragma omp parallel for schedule(static) if (rows * width > WORTH_THREADS)
    for (long row = 0; row < rows; row++) {
        const T *from = x + row * width;
        T *to = out + row * width;
        float rate = rate_of(from, width, eps);
        each_vector(0, width, [&](long i, int count) {
            store(to + i, load(from + i, count) * rate * load(gain + i, count), count);
        });
    }
}

// rate * (d * gain - unit * mean(d * gain * unit)), unit = rate * x, of each row; and `more` on top, unless it is null.
template <class T>
void rms_norm_backward(T *out, const T *d, const T *x, const float *gain, const T *more, float eps, long rows,
                       long width) {
#pragma omp parallel for schedule(static) if (rows * width > WORTH_THREADS)
    for (long row = 0; row < rows; row++) {
        const T *from = x + row * width, *slope = d + row * width;
        T *to = out + row * width;
        float rate = rate_of(from, width, eps);
        floats products{};
        each_vector(0, width, [&](long i, int count) {
            products += load(slope + i, count) * load(gain + i, count) * (load(from + i, count) * rate);
        });
        float along = sum_of(products) / float(width);
        each_vector(0, width, [&](long i, int count) {
            floats unit = load(from + i, count) * rate;
            floats value = (load(slope + i, count) * load(gain + i, count) - unit * along) * rate;
            store(to + i, more ? value + load(more + row * width + i, count) : value, count);
        });
    }
}

// The first 2*E of D numbers of each head turned in pairs (i, i + E) by the angles of its token.
template <class T>
void rotate(T *out, const T *x, const float *cos, const float *sin, long tokens, long heads, long D, long E) {
#pragma omp parallel for schedule(static) if (tokens * heads * D > WORTH_THREADS)
    for (long t = 0; t < tokens; t++)
        for (long head = 0; head < heads; head++) {
            const T *from = x + (t * heads + head) * D;
            T *to = out + (t * heads + head) * D;
            each_vector(0, E, [&](long i, int count) {
                floats first = load(from + i, count), second = load(from + E + i, count);
                floats c = load(cos + t * E + i, count), s = load(sin + t * E + i, count);
                store(to + i, first * c - second * s, count);
                store(to + E + i, second * c + first * s, count);
            });
            std::memcpy(to + 2 * E, from + 2 * E, (D - 2 * E) * sizeof(T));
        }
}

// silu(g) * u, each rounded: behind a product that was rounded once, what is huge in a model came out further off.
template <class T>
void gated(T *out, const T *g, const T *u, long numbers) {
#pragma omp parallel for schedule(static) if (numbers > WORTH_THREADS)
    for (long first = 0; first < numbers; first += PART)
        each_vector(first, first + PART < numbers ? first + PART : numbers, [&](long i, int count) {
            floats gate = load(g + i, count);
            store(out + i, rounded<T>(gate * sigmoid<T>(gate)) * load(u + i, count), count);
        });
}

// The slopes of silu(g) * u for g and u, and its value once more.
template <class T>
void gated_backward(T *dg, T *du, T *value, const T *d, const T *g, const T *u, long numbers) {
#pragma omp parallel for schedule(static) if (numbers > WORTH_THREADS)
    for (long first = 0; first < numbers; first += PART)
        each_vector(first, first + PART < numbers ? first + PART : numbers, [&](long i, int count) {
            floats gate = load(g + i, count), up = load(u + i, count), slope = load(d + i, count);
            floats share = sigmoid<T>(gate), active = rounded<T>(gate * share);
            store(dg + i, slope * up * (share * (1.0f + gate * (1.0f - share))), count);
            store(du + i, slope * active, count);
            store(value + i, active * up, count);
        });
}

// -- attention

// Rows of x [., heads * group, D] as [n, heads, group * L, D]: those of one document and group below each other.
template <class T>
void take(T *out, const T *x, const int32_t *rows, long n, long L, long heads, long group, long D) {
#pragma omp parallel for collapse(2) schedule(static) if (n * L * heads * group * D > WORTH_THREADS)
    for (long document = 0; document < n; document++)
        for (long head = 0; head < heads * group; head++) {
            T *to = out + (document * heads * group + head) * L * D;
            for (long l = 0; l < L; l++, to += D) {
                long row = rows[document * L + l];
                if (row < 0)
                    std::memset(to, 0, D * sizeof(T));
                else
                    std::memcpy(to, x + (row * heads * group + head) * D, D * sizeof(T));
            }
        }
}

// Writes back what `take` took.
template <class T>
void put(T *out, const T *x, const int32_t *rows, long n, long L, long heads, long group, long D) {
#pragma omp parallel for collapse(2) schedule(static) if (n * L * heads * group * D > WORTH_THREADS)
    for (long document = 0; document < n; document++)
        for (long head = 0; head < heads * group; head++) {
            const T *from = x + (document * heads * group + head) * L * D;
            for (long l = 0; l < L; l++, from += D) {
                long row = rows[document * L + l];
                if (row >= 0) std::memcpy(out + (row * heads * group + head) * D, from, D * sizeof(T));
            }
        }
}

// Adds in fp32 what `take` took, several times where several documents took a row: in their order, whatever the threads.
template <class T>
void add(float *out, const T *x, const int32_t *rows, long n, long L, long heads, long D) {
    long stripes = (D + LANES - 1) / LANES;
#pragma omp parallel for collapse(2) schedule(static) if (n * L * heads * D > WORTH_THREADS)
    for (long head = 0; head < heads; head++)
        for (long stripe = 0; stripe < stripes; stripe++) {
            long first = stripe * LANES;
            int count = D - first < LANES ? int(D - first) : LANES;
            for (long document = 0; document < n; document++) {
                const T *from = x + (document * heads + head) * L * D + first;
                for (long l = 0; l < L; l++, from += D) {
                    long row = rows[document * L + l];
                    if (row < 0) continue;
                    float *to = out + (row * heads + head) * D + first;
                    store(to, load(to, count) + load(from, count), count);
                }
            }
        }
}

// The keys that a query sees, and the whole vectors that hold them.
struct Seen {
    int first, last, begin, end;
    Seen(int low, int high) : first(low), last(high), begin(low & -LANES), end((high + LANES - 1) & -LANES) {}
};

// softmax in place of scale * scores [n, heads * group, L, M]; a query sees the keys from low to below high, at least
// one, and the shares of the rest are 0. M is a multiple of 16, and so of LANES.
template <class T>
void softmax(T *scores, const int32_t *low, const int32_t *high, float scale, long n, long heads, long L, long M) {
#pragma omp parallel if (n * heads * L * M > WORTH_THREADS)
    {
        std::vector<float> raised(M);
#pragma omp for schedule(static)
        for (long row = 0; row < n * heads * L; row++) {
            long query = row / (heads * L) * L + row % L;
            const Seen seen(low[query], high[query]);
            T *score = scores + row * M;
            float *e = raised.data();
            floats most = -INFINITY + floats{}, sum{};
            for (int i = seen.begin; i < seen.end; i += LANES) {
                floats value = only(load(score + i) * scale, i, seen.first, seen.last);
                store(e + i, value);
                most = larger(value, most);
            }
            float largest = most_of(most);
            for (int i = seen.begin; i < seen.end; i += LANES) {
                floats value = exp_of<T>(load(e + i) - largest);
                store(e + i, value);
                sum += value;
            }
            float share = 1.0f / sum_of(sum);
            std::memset(score, 0, seen.begin * sizeof(T));
            for (int i = seen.begin; i < seen.end; i += LANES) store(score + i, load(e + i) * share);
            std::memset(score + seen.end, 0, (M - seen.end) * sizeof(T));
        }
    }
}

// The slopes of the scores, in place of those of the shares: scale * p * (d - sum of p * d), 0 where hidden.
template <class T>
void softmax_backward(T *d, const T *shares, const int32_t *low, const int32_t *high, float scale, long n, long heads,
                      long L, long M) {
#pragma omp parallel for schedule(static) if (n * heads * L * M > WORTH_THREADS)
    for (long row = 0; row < n * heads * L; row++) {
        long query = row / (heads * L) * L + row % L;
        const Seen seen(low[query], high[query]);
        T *slope = d + row * M;
        const T *share = shares + row * M;
        floats products{};
        for (int i = seen.begin; i < seen.end; i += LANES) products += load(share + i) * load(slope + i);
        float along = sum_of(products);
        std::memset(slope, 0, seen.begin * sizeof(T));
        for (int i = seen.begin; i < seen.end; i += LANES)
            store(slope + i, scale * load(share + i) * (load(slope + i) - along));
        std::memset(slope + seen.end, 0, (M - seen.end) * sizeof(T));
    }
}

// -- the loss

// -log p(target) of each row of logits, and weight * (p - 1 at the target); sums in fp64, since one token may have all.
template <class T>
void losses_and_slopes(float *losses, T *slopes, const T *logits, const int64_t *targets, const float *weights,
                       long rows, long V) {
#pragma omp parallel if (rows * V > WORTH_THREADS)
    {
        std::vector<float> raised(V);
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            const T *logit = logits + row * V;
            T *slope = slopes + row * V;
            float *e = raised.data(), largest = -INFINITY;
            floats most = largest + floats{};
            doubles sums{};
            each_vector(0, V, [&](long i, int count) {
                floats value = load(logit + i, count);
                if (count == LANES)
                    most = larger(value, most);
                else
                    for (int lane = 0; lane < count; lane++) largest = value[lane] > largest ? value[lane] : largest;
            });
            float rest = most_of(most);
            largest = rest > largest ? rest : largest;
            each_vector(0, V, [&](long i, int count) {
                floats value = exp_of<float>(load(logit + i, count) - largest);
                store(e + i, value, count);
                for (int lane = count; lane < LANES; lane++) value[lane] = 0;
                sums += __builtin_convertvector(value, doubles);
            });
            double sum = sum_of(sums);
            long target = targets[row];
            float share = float(weights[row] / sum), chosen[LANES];
            each_vector(0, V, [&](long i, int count) { store(slope + i, load(e + i, count) * share, count); });
            store(slope + target, float(weights[row] * (e[target] - sum) / sum) + floats{}, 1);
            store(chosen, load(logit + target, 1));
            losses[row] = float(std::log(sum) + (double(largest) - double(chosen[0])));
        }
    }
}

}  // namespace

#define FOR(T, NAME)                                                                                                   \
    extern "C" {                                                                                                       \
    void rms_norm_##NAME(T *out, const T *x, const float *gain, float eps, long rows, long width) {                    \
        rms_norm(out, x, gain, eps, rows, width);                                                                      \
    }                                                                                                                  \
    void rms_norm_backward_##NAME(T *out, const T *d, const T *x, const float *gain, const T *more, float eps,         \
                                  long rows, long width) {                                                             \
        rms_norm_backward(out, d, x, gain, more, eps, rows, width);                                                    \
    }                                                                                                                  \
    void rotate_##NAME(T *out, const T *x, const float *cos, const float *sin, long tokens, long heads,                \
                       long D, long E) {                                                                               \
        rotate(out, x, cos, sin, tokens, heads, D, E);                                                                 \
    }                                                                                                                  \
    void gated_##NAME(T *out, const T *g, const T *u, long numbers) { gated(out, g, u, numbers); }                     \
    void gated_backward_##NAME(T *dg, T *du, T *value, const T *d, const T *g, const T *u, long numbers) {             \
        gated_backward(dg, du, value, d, g, u, numbers);                                                               \
    }                                                                                                                  \
    void take_##NAME(T *out, const T *x, const int32_t *rows, long n, long L, long heads, long group, long D) {        \
        take(out, x, rows, n, L, heads, group, D);                                                                     \
    }                                                                                                                  \
    void put_##NAME(T *out, const T *x, const int32_t *rows, long n, long L, long heads, long group, long D) {         \
        put(out, x, rows, n, L, heads, group, D);                                                                      \
    }                                                                                                                  \
    void add_##NAME(float *out, const T *x, const int32_t *rows, long n, long L, long heads, long D) {                 \
        add(out, x, rows, n, L, heads, D);                                                                             \
    }                                                                                                                  \
    void softmax_##NAME(T *scores, const int32_t *low, const int32_t *high, float scale, long n, long heads, long L,   \
                        long M) {                                                                                      \
        softmax(scores, low, high, scale, n, heads, L, M);                                                             \
    }                                                                                                                  \
    void softmax_backward_##NAME(T *d, const T *shares, const int32_t *low, const int32_t *high, float scale, long n,  \
                                 long heads, long L, long M) {                                                         \
        softmax_backward(d, shares, low, high, scale, n, heads, L, M);                                                 \
    }                                                                                                                  \
    void losses_and_slopes_##NAME(float *losses, T *slopes, const T *logits, const int64_t *targets,                   \
                                  const float *weights, long rows, long V) {                                           \
        losses_and_slopes(losses, slopes, logits, targets, weights, rows, V);                                          \
    }                                                                                                                  \
    }

FOR(bf16, bf16)
FOR(float, fp32)
